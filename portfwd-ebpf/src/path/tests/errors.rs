//! ICMP errors.

use super::*;

/// Between the box and the client, or the box and the backend; none of ours.
const ROUTER: [u8; 4] = [203, 0, 113, 9];
const ROUTER6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];

/// An ICMP error about a packet.
pub fn error(
    from: &[u8],
    to: &[u8],
    hops: u8,
    kind: [u8; 2],
    rest: [u8; 4],
    quoted: &[u8],
) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MACS.0, MACS.1);
    let mut bytes = Vec::new();
    match (<[u8; 4]>::try_from(from), <[u8; 4]>::try_from(to)) {
        (Ok(source), Ok(destination)) => ethernet
            .ipv4(source, destination, hops)
            .icmpv4_raw(kind[0], kind[1], rest)
            .write(&mut bytes, quoted)
            .unwrap(),
        _ => ethernet
            .ipv6(from.try_into().unwrap(), to.try_into().unwrap(), hops)
            .icmpv6_raw(kind[0], kind[1], rest)
            .write(&mut bytes, quoted)
            .unwrap(),
    }
    bytes
}

/// The packet in a frame.
fn packet(frame: Vec<u8>) -> Vec<u8> {
    frame[14..].to_vec()
}

/// One way and family of errors about the rule's packets.
struct Case {
    direction: Direction,
    router: &'static [u8],
    client: &'static [u8],
    external: &'static [u8],
    backend: &'static [u8],
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        let families: [[&[u8]; 4]; 2] =
            [[&ROUTER, &CLIENT, &BOX, &BACKEND], [&ROUTER6, &CLIENT6, &BOX6, &BACKEND6]];
        families.into_iter().flat_map(|[router, client, external, backend]| {
            [Direction::Forward, Direction::Reply].map(|direction| Self {
                direction,
                router,
                client,
                external,
                backend,
            })
        })
    }

    fn is_v4(&self) -> bool {
        self.client.len() == 4
    }

    fn kinds(&self) -> &'static [u8] {
        if self.is_v4() { &[3, 4, 11, 12] } else { &[1, 2, 3, 4] }
    }

    fn way(&self) -> Told {
        if self.direction == Direction::Forward { HOP } else { BACK }
    }

    /// The packet that the error is about: as the router saw it, and as its sender knows it.
    fn quoted(&self, protocol: u8, payload: &[u8]) -> [Vec<u8>; 2] {
        let client = (self.client, 5000);
        let [seen, sent] = [(self.external, 8080), (self.backend, 80)];
        match self.direction {
            Direction::Forward => [seen, sent].map(|end| frame(protocol, end, client, 9, payload)),
            Direction::Reply => [sent, seen].map(|end| frame(protocol, client, end, 9, payload)),
        }
        .map(packet)
    }

    fn came(&self, kind: [u8; 2], rest: [u8; 4], quoted: &[u8]) -> Vec<u8> {
        let to = match self.direction {
            Direction::Forward => self.external,
            Direction::Reply => self.client,
        };
        error(self.router, to, 64, kind, rest, quoted)
    }

    fn goes(&self, kind: [u8; 2], rest: [u8; 4], quoted: &[u8]) -> Vec<u8> {
        let (from, to, link) = match self.direction {
            Direction::Forward => {
                (self.router, self.backend, [[2, 0, 0, 0, 0, 10], [2, 0, 0, 0, 0, 3]])
            }
            Direction::Reply => {
                (self.external, self.client, [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]])
            }
        };
        let mut bytes = error(from, to, 63, kind, rest, quoted);
        bytes[..12].copy_from_slice(link.as_flattened());
        bytes
    }

    fn redirected(&self) -> Verdict {
        Verdict::Redirect(match self.direction {
            Direction::Forward => INSIDE_DEVICE,
            Direction::Reply => OUTSIDE_DEVICE,
        })
    }
}

#[test]
fn they_say_what_was_sent_whole_or_cut() {
    for case in Case::all() {
        for protocol in [TCP, UDP] {
            let [seen, sent] = case.quoted(protocol, b"payload");
            let head = if case.is_v4() { 20 } else { 40 };
            for kind in case.kinds() {
                let (kind, rest) = ([*kind, 1], [1, 2, 5, 0xdc]);
                for cut in 0..=seen.len() {
                    // Half of a checksum cannot be repaired; nobody quotes so little more.
                    if protocol == TCP && cut == head + 17 {
                        continue;
                    }
                    let router = Router::new(case.way());
                    let came = case.came(kind, rest, &seen[..cut]);
                    let mut bytes = came.clone();
                    let verdict = router.handle(Role::Both, &mut bytes);
                    if cut < head + 8 {
                        assert_eq!(verdict, Verdict::Pass(Passed::Malformed), "{kind:?} {cut}");
                        assert_eq!(bytes, came);
                        continue;
                    }
                    assert_eq!(verdict, case.redirected(), "{kind:?} {cut}");
                    assert_eq!(bytes, case.goes(kind, rest, &sent[..cut]), "{kind:?} {cut}");
                    let tally = router.counter.borrow().translated[case.direction as usize];
                    assert_eq!((tally.packets, tally.bytes), (1, bytes.len() as u64 - 14));
                }
            }
        }
    }
}

#[test]
fn those_about_other_packets_are_left_alone() {
    for case in Case::all() {
        let [seen, _] = case.quoted(UDP, b"");
        let kind = [case.kinds()[0], 0];
        let passes = |frame: Vec<u8>, why: &str| {
            let router = Router::new(case.way());
            let mut bytes = frame.clone();
            assert_eq!(router.handle(Role::Both, &mut bytes), Verdict::Pass(Passed::Icmp), "{why}");
            assert_eq!(bytes, frame, "{why}");
        };
        // Ports stand behind the header: source, destination.
        let head = if case.is_v4() { 20 } else { 40 };
        let (ours, address) = match case.direction {
            Direction::Forward => (head, if case.is_v4() { 12 } else { 8 }),
            Direction::Reply => (head + 2, if case.is_v4() { 16 } else { 24 }),
        };
        let changed = |at: usize| {
            let mut quoted = seen.clone();
            quoted[at] ^= 1;
            case.came(kind, [0; 4], &quoted)
        };
        passes(changed(ours), "another port");
        passes(changed(address + 3), "another address");
        // The other end: whom it is about does not get it.
        let other = match case.direction {
            Direction::Forward => case.came(kind, [0; 4], &seen),
            Direction::Reply => error(case.router, case.router, 64, kind, [0; 4], &seen),
        };
        if case.direction == Direction::Reply {
            passes(other, "to another than the sender");
        }
        for kind in (0..=255).filter(|kind| !case.kinds().contains(kind)) {
            passes(case.came([kind, 0], [0; 4], &seen), "no error");
        }
        // Of a later fragment nobody knows the ports, though its bytes read as such.
        let later = if case.is_v4() {
            let mut framed = frame(UDP, (case.client, 0), (case.client, 0), 9, b"");
            framed.splice(14.., seen.iter().copied());
            framed[20..22].copy_from_slice(&185_u16.to_be_bytes());
            super::fragments::repair(&mut framed);
            packet(framed)
        } else {
            let mut quoted = seen.clone();
            let header = [std::mem::replace(&mut quoted[6], 44), 0, 5, 0xc8, 1, 2, 3, 4];
            quoted.splice(40..40, header);
            quoted
        };
        passes(case.came(kind, [0; 4], &later), "about a later fragment");
    }
}

#[test]
fn they_leave_by_the_right_interface_or_not_at_all() {
    for case in Case::all() {
        let [seen, _] = case.quoted(TCP, b"");
        let kind = [case.kinds()[0], 0];
        let came = case.came(kind, [0; 4], &seen);
        let (wrong, verdict) = match case.direction {
            Direction::Forward => (BACK, Verdict::Drop(Dropped::NotInternal)),
            Direction::Reply => (HOP, Verdict::Pass(Passed::Inside)),
        };
        let mut bytes = came.clone();
        assert_eq!(Router::new(wrong).handle(Role::Both, &mut bytes), verdict);
        assert_eq!(bytes, came);
        // Each role has its own.
        let strange = match case.direction {
            Direction::Forward => Role::Internal,
            Direction::Reply => Role::External,
        };
        let verdict = Router::new(case.way()).handle(strange, &mut bytes);
        let reason = match case.direction {
            // From inside it would be about a flow of a client there.
            Direction::Forward => Passed::NoFlow,
            Direction::Reply => Passed::NoRule,
        };
        assert_eq!(verdict, Verdict::Pass(reason));
        assert_eq!(bytes, came);
    }
}

#[test]
fn those_that_the_stack_sends_keep_their_hops() {
    for case in Case::all() {
        let interface = if case.direction == Direction::Forward { INSIDE } else { OUTSIDE };
        let [seen, sent] = case.quoted(UDP, b"x");
        let kind = [case.kinds()[0], 0];
        let mut bytes = case.came(kind, [0; 4], &seen);
        let verdict = Router::new(no_neighbour(interface)).handle(Role::Both, &mut bytes);
        assert_eq!(verdict, Verdict::Stack(ToStack::NoNeighbour));
        let mut goes = case.goes(kind, [0; 4], &sent);
        goes[..12].copy_from_slice(&bytes[..12]);
        let hops = if case.is_v4() { 22 } else { 21 };
        assert_eq!((bytes[hops], goes[hops]), (64, 63));
        assert_eq!(bytes[38..], goes[38..]);
        assert!(is_valid(&bytes));
    }
}

#[test]
fn a_quoted_datagram_without_a_checksum_stays_without() {
    for direction in [Direction::Forward, Direction::Reply] {
        let case = Case::all().find(|case| case.direction == direction).unwrap();
        let [mut seen, mut sent] = case.quoted(UDP, b"x");
        for quoted in [&mut seen, &mut sent] {
            quoted[26..28].fill(0);
        }
        let mut bytes = case.came([3, 3], [0; 4], &seen);
        let verdict = Router::new(case.way()).handle(Role::Both, &mut bytes);
        assert_eq!((verdict, bytes), (case.redirected(), case.goes([3, 3], [0; 4], &sent)));
    }
}

proptest! {
    #[test]
    fn with_any_change_they_pass_as_they_came_or_stay_as_right_as_they_were(
        case in 0usize..4,
        tcp in any::<bool>(),
        payload in prop::collection::vec(any::<u8>(), 0..64),
        cut in 0usize..100,
        noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let case = Case::all().nth(case).unwrap();
        let [seen, _] = case.quoted(if tcp { TCP } else { UDP }, &payload);
        let mut before = case.came([case.kinds()[0], 0], [0; 4], &seen[..cut.min(seen.len())]);
        for (place, value) in noise {
            let place = place.index(before.len());
            before[place] = value;
        }
        let mut bytes = before.clone();
        let router = Router::new(case.way());
        match router.handle(Role::Both, &mut bytes) {
            Verdict::Redirect(_) => {
                prop_assert_eq!(is_valid(&bytes), is_valid(&before));
                prop_assert_eq!(router.packets(case.direction), 1);
            }
            Verdict::Pass(reason) => {
                prop_assert_eq!(&bytes, &before);
                prop_assert_eq!(router.passed.take(), vec![reason]);
            }
            Verdict::Drop(_) => prop_assert_eq!(bytes, before),
            verdict => prop_assert!(false, "{verdict:?}"),
        }
    }
}
