//! Rules whose backend is of the other address family.

use super::answers::expected;
use super::errors::error;
use super::fragments::repair;
use super::*;

const CROSS: u32 = Translation::STATEFUL | Translation::MASQUERADE | Translation::CROSS;
/// Taken by clients, and free among those for masquerade.
const PORT: u16 = 40_100;

/// A client, where it asks, the backend, and the box as that sees it.
struct Case {
    client: &'static [u8],
    listen: &'static [u8],
    backend: &'static [u8],
    lan: &'static [u8],
    protocol: u8,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        let families: [[&[u8]; 4]; 2] =
            [[&CLIENT, &BOX, &BACKEND6, &LAN6], [&CLIENT6, &BOX6, &BACKEND, &LAN]];
        families.into_iter().flat_map(|[client, listen, backend, lan]| {
            [TCP, UDP].map(|protocol| Self { client, listen, backend, lan, protocol })
        })
    }

    fn asked(&self, hops: u8, payload: &[u8]) -> Vec<u8> {
        frame(self.protocol, (self.client, PORT), (self.listen, 8080), hops, payload)
    }

    fn asks(&self, hops: u8, payload: &[u8]) -> Vec<u8> {
        frame(self.protocol, (self.lan, PORT), (self.backend, 80), hops, payload)
    }

    fn answers(&self, hops: u8, payload: &[u8]) -> Vec<u8> {
        frame(self.protocol, (self.backend, 80), (self.lan, PORT), hops, payload)
    }

    fn answered(&self, hops: u8, payload: &[u8]) -> Vec<u8> {
        frame(self.protocol, (self.listen, 8080), (self.client, PORT), hops, payload)
    }
}

/// Both rules, from port 8080 to port 80.
fn router() -> Router {
    let mut router = Router::new(HOP);
    let to = |address: Address<16>, flags| Translation {
        address: address.widen(),
        shift: Shift::between(8080, 80),
        backends: 0,
        flags,
        counter: 0,
        pool: 0,
    };
    let number = router.rows.len() as u32;
    router.rows.push(to(Address(BACKEND6), CROSS));
    router.rows.push(to(Address(BACKEND).mapped(), CROSS));
    let endpoint = |port, row| {
        let ports = Ports::range(port, port, row);
        let live = Claims { tcp: ports, udp: ports, other: Ports::NONE };
        Endpoint { generations: [live, Claims::default()] }
    };
    router.endpoints4.insert((Direction::Forward, Address(BOX)), endpoint(8080, number));
    router.endpoints6.insert((Direction::Reply, Address(BACKEND6)), endpoint(80, number));
    router.endpoints6.insert((Direction::Forward, Address(BOX6)), endpoint(8080, number + 1));
    router.endpoints4.insert((Direction::Reply, Address(BACKEND)), endpoint(80, number + 1));
    router.routes = Some(std::boxed::Box::new(|flow| {
        let inside = [Address(BACKEND).widen(), Address(BACKEND6).widen()];
        if inside.contains(&flow.destination) { HOP } else { BACK }
    }));
    router
}

/// What a frame became, whose ways out are one as the other.
fn converted(router: &Router, role: Role, mut frame: Vec<u8>) -> Result<Vec<u8>, Verdict> {
    router.converted.take();
    match router.handle(role, &mut frame) {
        Verdict::Redirect(_) | Verdict::Stack(_) => {
            let converted = router.converted.take().expect("a frame of the other family");
            assert!(is_valid(&converted), "{converted:02x?}");
            Ok(plain(converted))
        }
        verdict => Err(verdict),
    }
}

/// With the link addresses and, of IPv4, the identification of frames that are made here.
fn plain(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&MACS.1);
    frame[6..12].copy_from_slice(&MACS.0);
    if frame[12] == 8 {
        let length = u16::from_be_bytes([frame[16], frame[17]]);
        let whole = frame[20] & 0x40 != 0;
        assert_eq!(whole, length > 1260, "{length}");
        assert_eq!(whole, frame[18..20] == [0, 0], "an identification");
        frame[18..22].copy_from_slice(&[0, 0, 0x40, 0]);
        repair(&mut frame);
    }
    frame
}

#[test]
fn they_become_what_the_other_family_has_and_back() {
    for case in Case::all() {
        for length in [0, 1, 2, 500, 1231, 1232, 1233, 1252, 1253, 1300] {
            let payload: Vec<u8> = (0..length).map(|at| (at * 7) as u8).collect();
            let router = router();
            for _ in 0..3 {
                let asks = converted(&router, Role::External, case.asked(64, &payload)).unwrap();
                assert_eq!(asks, plain_of(case.asks(63, &payload)));
                let answered =
                    converted(&router, Role::Internal, case.answers(64, &payload)).unwrap();
                assert_eq!(answered, plain_of(case.answered(63, &payload)));
            }
            assert_eq!([Direction::Forward, Direction::Reply].map(|it| router.packets(it)), [3, 3]);
            assert_eq!(router.counter.borrow().flows, 1);
        }
    }
}

/// What `frame` made, which is without an identification.
fn plain_of(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&MACS.1);
    frame[6..12].copy_from_slice(&MACS.0);
    frame
}

#[test]
fn the_class_of_traffic_stays() {
    let router = router();
    let mut asked = frame(UDP, (&CLIENT, PORT), (&BOX, 8080), 64, b"hello");
    asked[15] = 0xb9;
    repair(&mut asked);
    let asks = converted(&router, Role::External, asked).unwrap();
    assert_eq!(asks[14..18], [0x6b, 0x90, 0, 0]);
    let mut asked = frame(UDP, (&CLIENT6, PORT), (&BOX6, 8080), 64, b"hello");
    asked[14..18].copy_from_slice(&[0x6b, 0x91, 2, 3]);
    let asks = converted(&router, Role::External, asked).unwrap();
    assert_eq!(asks[15], 0xb9);
}

#[test]
fn clients_of_both_families_share_the_ports_of_an_address() {
    let mut router = router();
    let number = router.rows.len() as u32;
    let flags = Translation::STATEFUL | Translation::MASQUERADE;
    router.rows.push(Translation { flags, ..router.rows[1] });
    let ports = Ports::range(8080, 8080, number);
    let live = Claims { tcp: ports, udp: ports, other: Ports::NONE };
    let endpoint = Endpoint { generations: [live, Claims::default()] };
    router.endpoints4.insert((Direction::Forward, Address(SECOND)), endpoint);
    let mut first = frame(UDP, (&CLIENT, PORT), (&SECOND, 8080), 64, b"hello");
    assert!(matches!(router.handle(Role::External, &mut first), Verdict::Redirect(_)));
    assert_eq!(first[34..36], PORT.to_be_bytes());
    let asked = frame(UDP, (&CLIENT6, PORT), (&BOX6, 8080), 64, b"hello");
    let asks = converted(&router, Role::External, asked).unwrap();
    let port = [asks[34], asks[35]];
    assert_ne!(port, PORT.to_be_bytes());
    // Each answer finds its client.
    let to = u16::from_be_bytes(port);
    let answers = frame(UDP, (&BACKEND, 80), (&LAN, to), 64, b"hello");
    let answered = converted(&router, Role::Internal, answers).unwrap();
    assert_eq!(answered[38..54], CLIENT6);
    let mut answers = frame(UDP, (&BACKEND, 80), (&LAN, PORT), 64, b"hello");
    assert!(matches!(router.handle(Role::Internal, &mut answers), Verdict::Redirect(_)));
    assert_eq!(answers[30..34], CLIENT);
}

#[test]
fn errors_are_about_what_was_sent() {
    let kinds = [
        // A port, a host, a hop; then what fits.
        ([3, 3], [0; 4], [1, 4], [0; 4]),
        ([3, 1], [0; 4], [1, 0], [0; 4]),
        ([11, 0], [0; 4], [3, 0], [0; 4]),
        ([3, 4], [0, 0, 5, 0x78], [2, 0], [0, 0, 5, 0x8c]),
    ];
    for case in Case::all() {
        for (v4, rest4, v6, rest6) in kinds {
            let router = router();
            let payload = [7; 100];
            converted(&router, Role::External, case.asked(64, &payload)).unwrap();
            converted(&router, Role::Internal, case.answers(64, &payload)).unwrap();
            let far = |like: &[u8]| match like.len() {
                4 => vec![203, 0, 113, 9],
                _ => Vec::from([0x20, 1, 0xd, 0xb8, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]),
            };
            let kinds = |like: &[u8]| match like.len() {
                // What the other family has of unreachable hosts is less.
                4 if v4 == [3, 1] => ([3, 1], rest4),
                4 => (v4, rest4),
                _ => (v6, rest6),
            };
            let quoted = |frame: Vec<u8>| frame[14..].to_vec();
            // Of a router inside, about what the client asked.
            let (kind, rest) = kinds(case.backend);
            let said = error(
                &far(case.backend),
                case.lan,
                64,
                kind,
                rest,
                &quoted(plain_of(case.asks(63, &payload))),
            );
            let told = converted(&router, Role::Internal, said).unwrap();
            let (kind, rest) = kinds(case.client);
            let expected =
                error(case.listen, case.client, 63, kind, rest, &quoted(case.asked(63, &payload)));
            same_error(told, plain_of(expected));
            // Of one outside, about what the backend answered.
            let (kind, rest) = kinds(case.client);
            let said = error(
                &far(case.client),
                case.listen,
                64,
                kind,
                rest,
                &quoted(case.answered(63, &payload)),
            );
            let told = converted(&router, Role::External, said).unwrap();
            let (kind, rest) = kinds(case.backend);
            let expected =
                error(case.lan, case.backend, 63, kind, rest, &quoted(case.answers(63, &payload)));
            same_error(told, plain_of(expected));
        }
    }
}

/// But for the identification of what is quoted, which nobody remembers.
fn same_error(mut told: Vec<u8>, mut expected: Vec<u8>) {
    if told[12] == 8 {
        for frame in [&mut told, &mut expected] {
            frame[36..38].fill(0); // of ICMP
            frame[46..50].fill(0); // identification and fragments
            frame[52..54].fill(0);
        }
    }
    assert_eq!(told, expected);
}

#[test]
fn senders_are_told_what_fits_and_where_packets_end() {
    for case in Case::all() {
        let is_v4 = case.client.len() == 4;
        let mut router = router();
        let too_big = case.asked(64, &[7; 1400]);
        router.route_mtu = 1400;
        assert_eq!(
            converted(&router, Role::External, too_big.clone()),
            Err(Verdict::Drop(Dropped::TooBig))
        );
        let (kind, mtu) = if is_v4 { ([3, 4], 1380u32) } else { ([2, 0], 1420) };
        assert_eq!(router.answer.take(), Some(expected(&too_big, kind, mtu.to_be_bytes())));
        router.route_mtu = 1500;
        converted(&router, Role::External, case.asked(64, b"hello")).unwrap();
        let kind = if is_v4 { [3, 0] } else { [11, 0] };
        let last = case.answers(1, b"hello");
        assert_eq!(
            converted(&router, Role::Internal, last.clone()),
            Err(Verdict::Drop(Dropped::TtlExpired))
        );
        assert_eq!(router.answer.take(), Some(expected(&last, kind, [0; 4])));
        let last = case.asked(1, b"hello");
        let kind = if is_v4 { [11, 0] } else { [3, 0] };
        assert_eq!(
            converted(&router, Role::External, last.clone()),
            Err(Verdict::Drop(Dropped::TtlExpired))
        );
        assert_eq!(router.answer.take(), Some(expected(&last, kind, [0; 4])));
        assert_eq!(router.counter.borrow().answered, 3);
    }
}

#[test]
fn what_has_no_counterpart_is_dropped_and_counted() {
    let mut unsummed = frame(UDP, (&CLIENT, PORT), (&BOX, 8080), 64, b"hello");
    unsummed[40..42].fill(0);
    let mut optional = frame(UDP, (&CLIENT, PORT), (&BOX, 8080), 64, b"hello");
    optional[14] = 0x46;
    optional[17] += 4;
    optional.splice(34..34, [1; 4]);
    repair(&mut optional);
    let mut fragment = frame(UDP, (&CLIENT, PORT), (&BOX, 8080), 64, b"hello");
    fragment[20] = 0x20;
    repair(&mut fragment);
    for frame in [unsummed, optional, fragment] {
        let router = router();
        let dropped = Err(Verdict::Drop(Dropped::NoCounterpart));
        assert_eq!(converted(&router, Role::External, frame), dropped);
        assert_eq!(router.counter.borrow().dropped[Dropped::NoCounterpart as usize], 1);
        assert_eq!(router.packets(Direction::Forward), 0);
    }
}

#[test]
fn without_room_for_the_header_it_is_dropped() {
    let mut router = router();
    router.cramped = true;
    let mut asked = frame(UDP, (&CLIENT, PORT), (&BOX, 8080), 64, b"hello");
    let dropped = Verdict::Drop(Dropped::NoHeadroom);
    assert_eq!(router.handle(Role::External, &mut asked), dropped);
    assert_eq!(router.packets(Direction::Forward), 0);
}

proptest! {
    #[test]
    fn whatever_comes_stays_valid(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        port in 1u16..,
        is_v4 in any::<bool>(),
        tcp in any::<bool>(),
    ) {
        let router = router();
        let protocol = if tcp { TCP } else { UDP };
        let (client, listen): (&[u8], &[u8]) = if is_v4 { (&CLIENT, &BOX) } else { (&CLIENT6, &BOX6) };
        let asked = frame(protocol, (client, port), (listen, 8080), 64, &payload);
        let asks = converted(&router, Role::External, asked.clone()).unwrap();
        let (from, at) = if is_v4 { (LAN6.to_vec(), 54) } else { (LAN.to_vec(), 34) };
        let (backend, size): (&[u8], usize) = if is_v4 { (&BACKEND6, 54) } else { (&BACKEND, 34) };
        let seen = u16::from_be_bytes([asks[at], asks[at + 1]]);
        prop_assert!((PORTS[0]..=PORTS[1]).contains(&seen), "{seen}");
        let header = if tcp { 20 } else { 8 };
        prop_assert_eq!(&asks[size + header..], &payload);
        let answers = frame(protocol, (backend, 80), (&from, seen), 64, &payload);
        let answered = converted(&router, Role::Internal, answers).unwrap();
        prop_assert_eq!(answered, plain_of(frame(protocol, (listen, 8080), (client, port), 63, &payload)));
    }
}
