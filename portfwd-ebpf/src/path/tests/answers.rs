//! ICMP errors that portfwd makes itself.

use super::errors::error;
use super::fragments::fragments;
use super::*;

/// What the client sent, and to where.
const FAMILIES: [(&[u8], &[u8]); 2] = [(&CLIENT, &BOX), (&CLIENT6, &BOX6)];

/// The error that whoever sent a frame must get about it.
pub fn expected(frame: &[u8], kind: [u8; 2], rest: [u8; 4]) -> Vec<u8> {
    let is_v4 = frame[12] == 8;
    let (from, to, longest) = if is_v4 {
        (&frame[30..34], &frame[26..30], 576 - 28)
    } else {
        (&frame[38..54], &frame[22..38], 1280 - 48)
    };
    let packet = &frame[14..];
    let quoted = &packet[..packet.len().min(longest)];
    let mut bytes = error(from, to, 64, kind, rest, quoted);
    bytes[..6].copy_from_slice(&frame[6..12]);
    bytes[6..12].copy_from_slice(&frame[..6]);
    if is_v4 {
        bytes[15] = 0xc0;
        super::fragments::repair(&mut bytes);
    }
    bytes
}

fn time_exceeded(frame: &[u8]) -> Vec<u8> {
    expected(frame, if frame[12] == 8 { [11, 0] } else { [3, 0] }, [0; 4])
}

#[test]
fn a_client_is_told_of_its_last_hop() {
    for (client, external) in FAMILIES {
        for protocol in [TCP, UDP] {
            for length in [0, 1, 2, 3, 500, 1229, 1230, 1231, 1400] {
                for hops in [0, 1] {
                    let router = Router::new(HOP);
                    let payload: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
                    let came = frame(protocol, (client, 5000), (external, 8080), hops, &payload);
                    let mut bytes = came.clone();
                    // What Ethernet adds is not quoted.
                    bytes.extend([0xaa; 3]);
                    let verdict = router.handle(Role::External, &mut bytes);
                    assert_eq!(verdict, Verdict::Drop(Dropped::TtlExpired));
                    assert_eq!(router.answer.take(), Some(time_exceeded(&came)), "{length}");
                    let counter = router.counter.borrow();
                    assert_eq!(counter.dropped[Dropped::TtlExpired as usize], 1);
                    assert_eq!((counter.answered, router.packets(Direction::Forward)), (1, 0));
                }
            }
        }
    }
}

/// Its answer needs no flow, and begins none.
#[test]
fn a_client_is_told_of_its_last_hop_whether_or_not_the_rule_keeps_flows() {
    for (client, external) in FAMILIES {
        let mut router = Router::new(HOP);
        for row in &mut router.rows {
            row.flags |= Translation::STATEFUL;
        }
        let came = frame(UDP, (client, 5000), (external, 8080), 1, &[7; 20]);
        let verdict = router.handle(Role::External, &mut came.clone());
        assert_eq!(verdict, Verdict::Drop(Dropped::TtlExpired));
        assert_eq!(router.answer.take(), Some(time_exceeded(&came)));
    }
}

#[test]
fn a_client_is_told_what_fits() {
    for (client, external) in FAMILIES {
        for mtu in [1400, 1280, 600] {
            let mut router = Router::new(HOP);
            router.route_mtu = mtu;
            let came = frame(UDP, (client, 5000), (external, 8080), 64, &[7; 1450]);
            let verdict = router.handle(Role::External, &mut came.clone());
            assert_eq!(verdict, Verdict::Drop(Dropped::TooBig));
            let (kind, mtu) = match client.len() {
                4 => ([3, 4], u32::from(mtu)),
                _ => ([2, 0], u32::from(mtu).max(1280)),
            };
            assert_eq!(router.answer.take(), Some(expected(&came, kind, mtu.to_be_bytes())));
        }
    }
}

#[test]
fn a_packet_that_may_be_fragmented_is_the_stacks() {
    let mut router = Router::new(HOP);
    router.route_mtu = 600;
    let mut came = frame(UDP, (&CLIENT, 5000), (&BOX, 8080), 64, &[7; 1450]);
    came[20] = 0;
    super::fragments::repair(&mut came);
    let verdict = router.handle(Role::External, &mut came);
    assert_eq!(verdict, Verdict::Stack(ToStack::TooBig));
    assert_eq!(router.answer.take(), None);
}

#[test]
fn nobody_is_told_who_must_not_be() {
    let drops = |frame: Vec<u8>, why: &str| {
        let router = Router::new(HOP);
        let verdict = router.handle(Role::External, &mut frame.clone());
        assert_eq!(verdict, Verdict::Drop(Dropped::TtlExpired), "{why}");
        assert_eq!(router.answer.take(), None, "{why}");
        assert_eq!(router.counter.borrow().answered, 0, "{why}");
    };
    for source in [[0; 4], [127, 0, 0, 1], [224, 0, 0, 1], [255; 4], [240, 1, 2, 3]] {
        drops(frame(UDP, (&source, 5000), (&BOX, 8080), 1, b""), "source");
    }
    let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let loopback = 1_u128.to_be_bytes();
    for source in [[0; 16], group, loopback] {
        drops(frame(UDP, (&source, 5000), (&BOX6, 8080), 1, b""), "source");
    }
    for (client, external) in FAMILIES {
        let came = frame(UDP, (client, 5000), (external, 8080), 1, b"");
        let mut from_group = came.clone();
        from_group[6] |= 1;
        drops(from_group, "from a group's link address");
        // An error, about whatever.
        let kind = if client.len() == 4 { [3, 0] } else { [1, 0] };
        let quoted = frame(UDP, (external, 8080), (client, 5000), 9, b"");
        drops(error(client, external, 1, kind, [0; 4], &quoted[14..]), "an error");
    }
}

#[test]
fn of_fragments_only_the_first_is_told_of() {
    for (client, external) in FAMILIES {
        let whole = frame(UDP, (client, 5000), (external, 8080), 64, &[7; 200]);
        let came = fragments(&whole, 7, 104);
        let router = Router::new(HOP);
        let last_hop = |frame: &Vec<u8>| {
            let mut frame = frame.clone();
            if client.len() == 4 {
                frame[22] = 1;
                super::fragments::repair(&mut frame);
            } else {
                frame[21] = 1;
            }
            let verdict = router.handle(Role::External, &mut frame.clone());
            assert_eq!(verdict, Verdict::Drop(Dropped::TtlExpired));
            (router.answer.take(), time_exceeded(&frame))
        };
        let (answer, expected) = last_hop(&came[0]);
        assert_eq!(answer, Some(expected));
        assert!(matches!(
            router.handle(Role::External, &mut came[0].clone()),
            Verdict::Redirect(_)
        ));
        assert_eq!(last_hop(&came[1]).0, None);
    }
}

#[test]
fn no_more_are_told_than_the_rate_allows() {
    let router = Router::new(HOP);
    let mut came = frame(UDP, (&CLIENT, 5000), (&BOX, 8080), 1, b"");
    for _ in 0..1000 {
        let verdict = router.handle(Role::External, &mut came);
        assert_eq!(verdict, Verdict::Drop(Dropped::TtlExpired));
    }
    let counter = router.counter.borrow();
    assert_eq!(counter.dropped[Dropped::TtlExpired as usize], 1000);
    assert!((1..=Bucket::BURST).contains(&counter.answered), "{}", counter.answered);
}
