//! ICMP errors, fragments and answers of rules that keep flows.

use super::answers::expected;
use super::errors::error;
use super::fragments::fragments;
use super::*;

type End = (Vec<u8>, u16);

const MASQUERADE: u32 = Translation::STATEFUL | Translation::MASQUERADE;
/// Hosts on the way, outside and inside.
const STRANGERS: [[&[u8]; 2]; 2] = [
    [&[203, 0, 113, 9], &[192, 168, 99, 9]],
    [
        &[0x20, 1, 0xd, 0xb8, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9],
        &[0xfd, 0x99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9],
    ],
];

/// A client's flow with a backend, and how the backend knows the client.
struct Talk {
    router: Router,
    protocol: u8,
    client: End,
    asked: End,
    seen: End,
    backend: End,
    strangers: [&'static [u8]; 2],
    /// Where the client is.
    role: Role,
}

impl Talk {
    /// Begins a flow of a rule that masquerades, with a client outside or inside, and answers it
    /// `answered` times.
    fn begin(is_v4: bool, protocol: u8, inside: bool, answered: usize) -> Self {
        let mut router = Router::new(HOP);
        for (row, flags) in [(1, MASQUERADE), (2, Translation::STATEFUL)] {
            router.rows[row].flags = flags;
            router.rows[row + 2].flags = flags;
        }
        let (client, external, backend): (&[u8], &[u8], &[u8]) = match (is_v4, inside) {
            (true, false) => (&CLIENT, &BOX, &BACKEND),
            (true, true) => (&[192, 168, 77, 20], &BOX, &BACKEND),
            (false, false) => (&CLIENT6, &BOX6, &BACKEND6),
            (false, true) => (&DMZ6, &BOX6, &BACKEND6),
        };
        let mut talk = Self {
            router,
            protocol,
            client: (client.to_vec(), 5000),
            asked: (external.to_vec(), 8080),
            seen: (Vec::new(), 0),
            backend: (backend.to_vec(), 80),
            strangers: STRANGERS[usize::from(!is_v4)],
            role: if inside { Role::Internal } else { Role::External },
        };
        let first = talk.packet(&talk.client, &talk.asked, 64, b"hello");
        let bytes = talk.goes(Direction::Forward, first);
        let (address, port) = if is_v4 { (26..30, 34) } else { (22..38, 54) };
        let port = u16::from_be_bytes([bytes[port], bytes[port + 1]]);
        talk.seen = (bytes[address].to_vec(), port);
        assert_eq!(talk.seen.0, if is_v4 { LAN.to_vec() } else { LAN6.to_vec() });
        for _ in 0..answered {
            let answer = talk.packet(&talk.backend, &talk.seen, 64, b"yes");
            talk.goes(Direction::Reply, answer);
            let next = talk.packet(&talk.client, &talk.asked, 64, b"thanks");
            talk.goes(Direction::Forward, next);
        }
        talk
    }

    /// Each family and protocol, with a client outside and inside, before and after it is established.
    fn all() -> impl Iterator<Item = Self> {
        let bools = [false, true];
        bools.into_iter().flat_map(move |is_v4| {
            bools.into_iter().flat_map(move |inside| {
                [(UDP, 0), (UDP, 2), (TCP, 0)]
                    .map(|(protocol, answered)| Self::begin(is_v4, protocol, inside, answered))
            })
        })
    }

    fn is_v4(&self) -> bool {
        self.client.0.len() == 4
    }

    fn packet(&self, from: &End, to: &End, hops: u8, payload: &[u8]) -> Vec<u8> {
        frame(self.protocol, (&from.0, from.1), (&to.0, to.1), hops, payload)
    }

    /// Both ends as a packet of this direction comes and goes.
    fn ends(&self, direction: Direction) -> [(&End, &End); 2] {
        match direction {
            Direction::Forward => [(&self.client, &self.asked), (&self.seen, &self.backend)],
            Direction::Reply => [(&self.backend, &self.seen), (&self.asked, &self.client)],
        }
    }

    fn handle(&mut self, direction: Direction, bytes: &mut [u8]) -> Verdict {
        let inside = self.role == Role::Internal;
        // The FIB's answer for the client inside is the only one there is.
        self.router.route = if direction == Direction::Forward || inside { HOP } else { BACK };
        let role = if direction == Direction::Forward { self.role } else { Role::Internal };
        self.router.handle(role, bytes)
    }

    /// Sends a packet, which must go; with its link addresses as before.
    fn goes(&mut self, direction: Direction, mut bytes: Vec<u8>) -> Vec<u8> {
        let link: [u8; 12] = bytes[..12].try_into().unwrap();
        let verdict = self.handle(direction, &mut bytes);
        assert!(matches!(verdict, Verdict::Redirect(_)), "{direction:?}: {verdict:?}");
        bytes[..12].copy_from_slice(&link);
        bytes
    }

    fn stays(&mut self, direction: Direction, bytes: &[u8]) -> Verdict {
        let mut after = bytes.to_vec();
        let verdict = self.handle(direction, &mut after);
        assert_eq!(after, bytes, "{verdict:?}");
        verdict
    }

    /// Packets of both directions that flows have counted.
    fn counted(&self) -> u64 {
        let router = &self.router;
        let halves = router.flows4.halves().map(|half| half.tally).collect::<Vec<_>>();
        let halves6 = router.flows6.halves().map(|half| half.tally).collect::<Vec<_>>();
        let candidates =
            router.candidates4.borrow().values().flat_map(|it| it.tallies).collect::<Vec<_>>();
        let candidates6 =
            router.candidates6.borrow().values().flat_map(|it| it.tallies).collect::<Vec<_>>();
        let tallies = halves.into_iter().chain(halves6).chain(candidates).chain(candidates6);
        tallies.map(|tally| tally.packets).sum()
    }
}

const WAYS: [Direction; 2] = [Direction::Forward, Direction::Reply];

/// The packet in a frame.
fn packet(frame: Vec<u8>) -> Vec<u8> {
    frame[14..].to_vec()
}

#[test]
fn errors_say_what_both_ends_know() {
    for mut talk in Talk::all() {
        let kinds: &[u8] = if talk.is_v4() { &[3, 4, 11, 12] } else { &[1, 2, 3, 4] };
        let counted = talk.counted();
        for direction in WAYS {
            let [(_, sees), (known, sender)] = talk.ends(direction);
            let (from, to) = (sender.clone(), known.clone());
            let [stranger, _] = talk.strangers;
            let quoted = |(from, to): (&End, &End)| packet(talk.packet(to, from, 9, b"payload"));
            let [seen, sent] = talk.ends(direction).map(quoted);
            let at = sees.0.clone();
            let head = if talk.is_v4() { 20 } else { 40 };
            for kind in kinds {
                for cut in [head + 8, seen.len()] {
                    let came = error(stranger, &at, 64, [*kind, 1], [0; 4], &seen[..cut]);
                    let goes = error(&to.0, &from.0, 63, [*kind, 1], [0; 4], &sent[..cut]);
                    assert_eq!(talk.goes(direction, came), goes, "{direction:?} {kind} {cut}");
                }
            }
        }
        assert_eq!(talk.counted(), counted);
    }
}

/// Whoever sent it stays whom it was, where clients keep their addresses.
#[test]
fn errors_of_a_rule_that_does_not_masquerade_keep_their_source() {
    let mut talk = Talk::begin(true, UDP, false, 0);
    talk.router = Router::new(HOP);
    talk.router.rows[1].flags = Translation::STATEFUL;
    talk.router.rows[2].flags = Translation::STATEFUL;
    let first = talk.packet(&talk.client, &talk.asked, 64, b"hello");
    talk.goes(Direction::Forward, first);
    let [outside, inside] = talk.strangers;
    let quoted = |from, to| packet(talk.packet(from, to, 9, b"hello"));
    let (seen, sent) = (quoted(&talk.asked, &talk.client), quoted(&talk.backend, &talk.client));
    let came = error(outside, &BOX, 64, [3, 1], [0; 4], &seen);
    let goes = error(outside, &BACKEND, 63, [3, 1], [0; 4], &sent);
    let quoted = |from, to| packet(talk.packet(from, to, 9, b"hello"));
    let (seen, sent) = (quoted(&talk.client, &talk.backend), quoted(&talk.client, &talk.asked));
    assert_eq!(talk.goes(Direction::Forward, came), goes);
    let came = error(inside, &CLIENT, 64, [3, 1], [0; 4], &seen);
    let goes = error(&BOX, &CLIENT, 63, [3, 1], [0; 4], &sent);
    assert_eq!(talk.goes(Direction::Reply, came), goes);
}

#[test]
fn errors_about_no_flow_begin_none() {
    for mut talk in Talk::all() {
        for direction in WAYS {
            let [(from, to), _] = talk.ends(direction);
            let (from, to) = (from.clone(), (to.0.clone(), to.1));
            let other = match direction {
                Direction::Forward => (from.0.clone(), from.1 + 1),
                Direction::Reply => from.clone(),
            };
            let end = match direction {
                Direction::Forward => to.clone(),
                Direction::Reply => (to.0.clone(), to.1 ^ 1),
            };
            let quoted = packet(talk.packet(&end, &other, 9, b"payload"));
            let kind = if talk.is_v4() { [3, 1] } else { [1, 0] };
            let came = error(talk.strangers[0], &to.0, 64, kind, [0; 4], &quoted);
            let (counted, mappings) = (talk.counted(), talk.router.mappings.borrow().len());
            let verdict = talk.stays(direction, &came);
            assert_eq!(verdict, Verdict::Pass(Passed::NoFlow), "{direction:?}");
            assert_eq!(talk.counted(), counted);
            assert_eq!(talk.router.mappings.borrow().len(), mappings);
        }
    }
}

#[test]
fn fragments_follow_their_first_with_both_ends() {
    for mut talk in Talk::all() {
        for direction in WAYS {
            let payload: Vec<u8> = (0..999).map(|i| (i * 7) as u8).collect();
            let [(from, to), (source, destination)] = talk.ends(direction);
            let came = fragments(&talk.packet(from, to, 64, &payload), 0x1234, 64);
            let goes = fragments(&talk.packet(source, destination, 63, &payload), 0x1234, 64);
            let counted = talk.counted();
            for (came, goes) in came.iter().zip(&goes) {
                assert_eq!(&talk.goes(direction, came.clone()), goes, "{direction:?}");
            }
            assert_eq!(talk.counted(), counted + 1, "the first has the ports");
            for (came, goes) in came.iter().zip(&goes).rev() {
                assert_eq!(&talk.goes(direction, came.clone()), goes, "{direction:?}");
            }
            // Another packet's.
            let [(from, to), _] = talk.ends(direction);
            let stray = fragments(&talk.packet(from, to, 64, &payload), 9, 64).remove(1);
            assert_eq!(talk.stays(direction, &stray), Verdict::Pass(Passed::Fragment));
        }
    }
}

/// A flow may begin in fragments.
#[test]
fn a_first_fragment_begins_a_flow() {
    let mut talk = Talk::begin(true, UDP, false, 0);
    let other = (talk.client.0.clone(), 6000);
    let parts = fragments(&talk.packet(&other, &talk.asked, 64, &[7; 200]), 5, 64);
    let went: Vec<Vec<u8>> =
        parts.into_iter().map(|part| talk.goes(Direction::Forward, part)).collect();
    assert_eq!(talk.router.candidates4.borrow().len(), 2);
    let port = u16::from_be_bytes([went[0][34], went[0][35]]);
    let answer = talk.packet(&talk.backend, &(LAN.to_vec(), port), 64, b"yes");
    let expected = talk.packet(&talk.asked, &other, 63, b"yes");
    assert_eq!(talk.goes(Direction::Reply, answer), expected);
}

/// The stack would take what is sent to an address of the box for the box's own.
#[test]
fn who_sends_to_the_box_is_told_of_the_last_hop_and_of_what_fits() {
    for mut talk in Talk::all() {
        for direction in WAYS {
            let [(from, to), _] = talk.ends(direction);
            let last = talk.packet(from, to, 1, b"payload");
            let large = talk.packet(from, to, 64, &[7; 1400]);
            let (exceeded, too_big) = match talk.is_v4() {
                true => ([11, 0], [3, 4]),
                false => ([3, 0], [2, 0]),
            };
            let counted = talk.counted();
            assert_eq!(talk.stays(direction, &last), Verdict::Drop(Dropped::TtlExpired));
            assert_eq!(talk.router.answer.take(), Some(expected(&last, exceeded, [0; 4])));
            assert_eq!(talk.counted(), counted);
            talk.router.route_mtu = 1300;
            assert_eq!(talk.stays(direction, &large), Verdict::Drop(Dropped::TooBig));
            let mtu = 1300_u32.to_be_bytes();
            assert_eq!(talk.router.answer.take(), Some(expected(&large, too_big, mtu)));
            talk.router.route_mtu = 1500;
        }
    }
}

/// Where the client is seen with its own address, the stack can tell the backend itself.
#[test]
fn a_reply_to_the_clients_own_address_is_the_stacks_to_answer() {
    let mut talk = Talk::begin(true, UDP, false, 0);
    talk.router = Router::new(HOP);
    talk.router.rows[1].flags = Translation::STATEFUL;
    talk.router.rows[2].flags = Translation::STATEFUL;
    let first = talk.packet(&talk.client, &talk.asked, 64, b"hello");
    talk.goes(Direction::Forward, first);
    let last = talk.packet(&talk.backend, &talk.client, 1, b"yes");
    assert_eq!(talk.stays(Direction::Reply, &last), Verdict::Pass(Passed::Ttl));
    talk.router.route_mtu = 1400;
    let large = talk.packet(&talk.backend, &talk.client, 64, &[7; 1450]);
    assert_eq!(talk.stays(Direction::Reply, &large), Verdict::Pass(Passed::TooBig));
    assert_eq!(talk.router.answer.take(), None);
}

/// One interface: what backends send to the box's address comes in where clients do.
#[test]
fn on_one_interface_backends_errors_and_fragments_find_their_flow() {
    let mut talk = Talk::begin(true, UDP, false, 0);
    talk.router = Router::new(BACK);
    talk.router.rows[1].flags = MASQUERADE;
    talk.router.rows[2].flags = Translation::STATEFUL;
    talk.router.outside_flags = Interface::INTERNAL | Interface::EXTERNAL | Interface::TRANSMITS;
    let goes = |came: Vec<u8>| {
        let mut bytes = came.clone();
        let verdict = talk.router.handle(Role::Both, &mut bytes);
        assert!(matches!(verdict, Verdict::Redirect(_)), "{verdict:?}");
        bytes[..12].copy_from_slice(&came[..12]);
        bytes
    };
    let framed = |from: &End, to: &End, hops, payload: &[u8]| {
        frame(UDP, (&from.0, from.1), (&to.0, to.1), hops, payload)
    };
    let (client, asked, backend) = (&talk.client, &talk.asked, &talk.backend);
    let first = goes(framed(client, asked, 64, b"hello"));
    let seen = (BOX.to_vec(), u16::from_be_bytes([first[34], first[35]]));
    let quoted = packet(framed(&seen, backend, 9, b"hello"));
    let sent = packet(framed(client, asked, 9, b"hello"));
    let came = error(&BACKEND, &BOX, 64, [3, 3], [0; 4], &quoted);
    assert_eq!(goes(came), error(&BOX, &CLIENT, 63, [3, 3], [0; 4], &sent));
    let came = fragments(&framed(backend, &seen, 64, &[7; 300]), 7, 64);
    let expected = fragments(&framed(asked, client, 63, &[7; 300]), 7, 64);
    for (came, expected) in came.into_iter().zip(expected) {
        assert_eq!(goes(came), expected);
    }
}

/// They have no ports to tell flows by.
#[test]
fn pings_from_inside_to_a_dmz_host_are_the_boxs_whole_or_in_fragments() {
    let router = Router::new(HOP);
    let echo = error(&[192, 168, 77, 30], &DMZ_BOX, 64, [8, 0], [0, 7, 0, 1], &[7; 300]);
    for mut came in [vec![echo.clone()], fragments(&echo, 7, 64)].concat() {
        let before = came.clone();
        let verdict = router.handle(Role::Internal, &mut came);
        assert!(matches!(verdict, Verdict::Pass(Passed::Icmp | Passed::Fragment)), "{verdict:?}");
        assert_eq!(came, before);
    }
    assert!(router.candidates4.borrow().is_empty() && router.mappings.borrow().is_empty());
}

/// However the backend may be reached, or not.
#[test]
fn what_begins_no_flow_is_passed_without_a_way_too() {
    for mut talk in Talk::all().filter(|talk| talk.role == Role::External) {
        let client = (talk.client.0.clone(), 7000);
        let quoted = packet(talk.packet(&talk.asked, &client, 9, b"payload"));
        let kind = if talk.is_v4() { [3, 1] } else { [1, 0] };
        let mut came = error(talk.strangers[0], &talk.asked.0, 64, kind, [0; 4], &quoted);
        talk.router.route = nothing_but(Route::NotForwarded);
        let verdict = talk.router.handle(Role::External, &mut came);
        assert_eq!(verdict, Verdict::Pass(Passed::NoFlow));
    }
}

/// A rule that keeps no flows needs one for a client inside.
#[test]
fn an_answer_to_a_client_inside_that_ends_here_is_told_of_in_fragments_too() {
    let mut talk = Talk::begin(true, UDP, true, 0);
    talk.router = Router::new(HOP);
    let first = talk.packet(&talk.client, &talk.asked, 64, b"hello");
    talk.goes(Direction::Forward, first);
    let last = talk.packet(&talk.backend, &talk.seen, 1, &[7; 200]);
    for came in [vec![last.clone()], fragments(&last, 7, 128)[..1].to_vec()].concat() {
        assert_eq!(talk.stays(Direction::Reply, &came), Verdict::Drop(Dropped::TtlExpired));
        assert!(talk.router.answer.take().is_some());
    }
}

/// The kernel gives the memory of an entry to another at once, while packets look at it.
#[test]
fn an_entry_of_fragments_that_is_anothers_now_is_not_used() {
    let mut talk = Talk::begin(true, UDP, false, 0);
    let whole = talk.packet(&talk.client, &talk.asked, 64, &[7; 200]);
    let [first, second, ..] = &fragments(&whole, 5, 64)[..] else { panic!("fragments") };
    talk.goes(Direction::Forward, first.clone());
    let other = fragments(&whole, 6, 64).remove(0);
    talk.goes(Direction::Forward, other);
    talk.goes(Direction::Forward, second.clone());
    let marks: Vec<_> = talk.router.fragments.borrow().values().map(|it| it.mark).collect();
    for (entry, mark) in talk.router.fragments.borrow_mut().values_mut().zip(marks.iter().rev()) {
        entry.mark = *mark;
    }
    assert_eq!(talk.stays(Direction::Forward, second), Verdict::Pass(Passed::Fragment));
}
