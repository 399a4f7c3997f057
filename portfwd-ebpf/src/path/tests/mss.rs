//! The MSS option of SYNs.

use super::*;
use crate::table::Mss;

/// A segment with these options between client and rule, or back.
fn segment(direction: Direction, is_v4: bool, syn: bool, ack: bool, options: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MACS.0, MACS.1);
    let forward = direction == Direction::Forward;
    let (from, to) = if forward { (5000, 8080) } else { (80, 5000) };
    let ip = match (is_v4, forward) {
        (true, true) => ethernet.ipv4(CLIENT, BOX, 64),
        (true, false) => ethernet.ipv4(BACKEND, CLIENT, 64),
        (false, true) => ethernet.ipv6(CLIENT6, BOX6, 64),
        (false, false) => ethernet.ipv6(BACKEND6, CLIENT6, 64),
    };
    let mut tcp = ip.tcp(from, to, 1, 512);
    if syn {
        tcp = tcp.syn();
    }
    if ack {
        tcp = tcp.ack(7);
    }
    let mut bytes = Vec::new();
    tcp.options_raw(options).unwrap().write(&mut bytes, b"early").unwrap();
    bytes
}

/// The frame as it goes, which is valid.
fn goes(rule: &Router, direction: Direction, frame: &[u8]) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    let (role, device) = match direction {
        Direction::Forward => (Role::External, INSIDE_DEVICE),
        Direction::Reply => (Role::Internal, OUTSIDE_DEVICE),
    };
    assert_eq!(rule.handle(role, &mut bytes), Verdict::Redirect(device));
    assert!(is_valid(&bytes));
    bytes
}

fn router(direction: Direction, mss: Mss, [ingress, egress]: [u32; 2]) -> Router {
    let mut route = if direction == Direction::Forward { HOP } else { BACK };
    route.hop.mtu = egress;
    Router { mss, ingress_mtu: ingress, ..Router::new(route) }
}

/// Where the options begin.
fn options_at(is_v4: bool) -> usize {
    if is_v4 { 54 } else { 74 }
}

const WAYS: [(Direction, bool); 4] = [
    (Direction::Forward, true),
    (Direction::Forward, false),
    (Direction::Reply, true),
    (Direction::Reply, false),
];

#[test]
fn it_is_what_fits_the_narrower_side_or_what_the_rule_says() {
    for (direction, is_v4) in WAYS {
        let headers = if is_v4 { 40 } else { 60 };
        for (mss, mtus, expected) in [
            (Mss::AUTO, [1500, 1500], 1460.min(1500 - headers)),
            (Mss::AUTO, [1492, 1500], 1492 - headers),
            (Mss::AUTO, [1500, 1400], 1400 - headers),
            (Mss::AUTO, [9000, 65_535], 1460),
            // Never raised.
            (Mss(1461), [1400, 1400], 1460),
            (Mss(1459), [1400, 1400], 1459),
            (Mss(88), [9000, 9000], 88),
            (Mss::OFF, [1400, 1400], 1460),
            // Of what has no room for the headers nothing is known.
            (Mss::AUTO, [1500, 30], 1460),
        ] {
            let mut options = [1, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 2, 4, 0x05, 0xb4];
            // 1460, at an even place and at an odd one.
            for shift in [0, 1] {
                if shift == 1 {
                    options.rotate_left(1);
                    options[15] = 0;
                }
                let frame =
                    segment(direction, is_v4, true, direction == Direction::Reply, &options);
                let after = goes(&router(direction, mss, mtus), direction, &frame);
                let mut expected_options = options;
                let value = (expected as u16).to_be_bytes();
                expected_options[14 - shift..16 - shift].copy_from_slice(&value);
                let at = options_at(is_v4);
                assert_eq!(after[at..at + 16], expected_options, "{mss:?} {mtus:?} {shift}");
            }
        }
    }
}

#[test]
fn without_a_neighbour_too() {
    let rule = Router { ingress_mtu: 1400, ..Router::new(no_neighbour(INSIDE)) };
    let mut frame = segment(Direction::Forward, true, true, false, &[2, 4, 0x05, 0xb4]);
    let verdict = rule.handle(Role::External, &mut frame);
    assert_eq!(verdict, Verdict::Stack(ToStack::NoNeighbour));
    assert!(is_valid(&frame));
    assert_eq!(frame[56..58], 1360_u16.to_be_bytes());
}

/// Where the value is, by another way of looking: from the end of each option to the next.
fn value(options: &[u8]) -> Option<usize> {
    let mut rest = options;
    loop {
        let at = options.len() - rest.len();
        rest = match rest {
            [] | [0, ..] => return None,
            [1, rest @ ..] => rest,
            [2, 4, _, _, ..] => return Some(at + 2),
            [2, ..] | [_] => return None,
            [_, size, ..] if *size < 2 => return None,
            [_, size, ..] => rest.get(usize::from(*size)..)?,
        };
    }
}

/// Options that are nearly right.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let option = prop_oneof![
        3 => Just(vec![1]),
        2 => any::<[u8; 2]>().prop_map(|[high, low]| vec![2, 4, high, low]),
        2 => (2_u8..40, prop::collection::vec(any::<u8>(), 0..20)).prop_map(|(kind, mut data)| {
            data.splice(0..0, [kind, data.len() as u8 + 2]);
            data
        }),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop::collection::vec(option, 0..20).prop_map(|options| {
        let mut bytes = options.concat();
        bytes.truncate(40);
        bytes.resize(bytes.len().next_multiple_of(4), 1);
        bytes
    })
}

proptest! {
    /// Valid, never raised, of SYNs alone, and all else as without it.
    #[test]
    fn nothing_but_the_value_changes(
        options in options(),
        (way, syn, ack) in (0..4_usize, prop::bool::weighted(0.8), any::<bool>()),
        mss in prop_oneof![Just(Mss::AUTO), any::<u16>().prop_map(Mss)],
        mtus in prop::array::uniform2(prop_oneof![60_u32..9000, Just(1500), 60_u32..70_000]),
    ) {
        let (direction, is_v4) = WAYS[way];
        let headers = if is_v4 { 40 } else { 60 };
        let frame = segment(direction, is_v4, syn, ack, &options);
        // The frame itself fits.
        let mtus = mtus.map(|mtu| mtu.max(frame.len() as u32));
        let mut expected = goes(&router(direction, Mss::OFF, mtus), direction, &frame);
        let after = goes(&router(direction, mss, mtus), direction, &frame);
        let most = match mss {
            Mss::AUTO => mtus[0].min(mtus[1]) - headers,
            Mss::OFF => u32::MAX,
            Mss(most) => most.into(),
        };
        if syn && let Some(at) = value(&options) {
            let at = options_at(is_v4) + at;
            let field = &mut expected[at..at + 2];
            let before = u32::from(u16::from_be_bytes([field[0], field[1]]));
            field.copy_from_slice(&(before.min(most) as u16).to_be_bytes());
        }
        // Valid is one of them as it is.
        let check = options_at(is_v4) - 4..options_at(is_v4) - 2;
        expected[check.clone()].copy_from_slice(&after[check]);
        prop_assert_eq!(after, expected);
    }
}
