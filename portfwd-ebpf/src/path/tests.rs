//! The path on plain tables, without a kernel.

extern crate std;

mod answers;
mod cross;
mod errors;
mod flow_detours;
mod fragments;
mod mss;
mod others;

use std::collections::{HashMap, HashSet};
use std::vec;
use std::vec::Vec;

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::packet::{TCP, UDP};
use crate::table::{Address, Dropped, HOP_BITS, Shift};
use crate::testing::*;

mod flows;

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// A valid frame between two ends.
fn frame(protocol: u8, from: (&[u8], u16), to: (&[u8], u16), ttl: u8, payload: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MACS.0, MACS.1);
    let mut bytes = Vec::new();
    let ip = match (<[u8; 4]>::try_from(from.0), <[u8; 4]>::try_from(to.0)) {
        (Ok(source), Ok(destination)) => ethernet.ipv4(source, destination, ttl),
        _ => ethernet.ipv6(from.0.try_into().unwrap(), to.0.try_into().unwrap(), ttl),
    };
    match protocol {
        TCP => ip.tcp(from.1, to.1, 1, 512).write(&mut bytes, payload).unwrap(),
        _ => ip.udp(from.1, to.1).write(&mut bytes, payload).unwrap(),
    }
    bytes
}

/// Whether all checksums of a frame are right, computed in full by another library.
fn is_valid(frame: &[u8]) -> bool {
    let Ok(sliced) = SlicedPacket::from_ethernet(frame) else { return false };
    let transport = sliced.transport.as_ref();
    match &sliced.net {
        Some(etherparse::NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            let payload = ip.payload().payload;
            header.header_checksum == header.calc_header_checksum()
                && match transport {
                    Some(TransportSlice::Tcp(tcp)) => tcp
                        .calc_checksum_ipv4(header.source, header.destination)
                        .is_ok_and(|sum| sum == tcp.checksum()),
                    Some(TransportSlice::Udp(udp)) => {
                        udp.checksum() == 0
                            || udp
                                .to_header()
                                .calc_checksum_ipv4_raw(
                                    header.source,
                                    header.destination,
                                    &payload[8..usize::from(udp.length())],
                                )
                                .is_ok_and(|sum| sum == udp.checksum())
                    }
                    Some(TransportSlice::Icmpv4(_)) => {
                        let sum = etherparse::checksum::Sum16BitWords::new().add_slice(payload);
                        sum.ones_complement() == 0
                    }
                    _ => true,
                }
        }
        Some(etherparse::NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            let (source, destination) = (header.source(), header.destination());
            match transport {
                Some(TransportSlice::Tcp(tcp)) => tcp
                    .calc_checksum_ipv6(source, destination)
                    .is_ok_and(|sum| sum == tcp.checksum()),
                Some(TransportSlice::Udp(udp)) => udp
                    .to_header()
                    .calc_checksum_ipv6_raw(source, destination, udp.payload())
                    .is_ok_and(|sum| sum == udp.checksum()),
                Some(TransportSlice::Icmpv6(icmp)) => icmp.is_checksum_valid(source, destination),
                _ => true,
            }
        }
        _ => true,
    }
}

#[test]
fn both_directions_both_families_both_protocols() {
    let families: [(&[u8], &[u8], &[u8]); 2] =
        [(&CLIENT, &BOX, &BACKEND), (&CLIENT6, &BOX6, &BACKEND6)];
    for (client, external, backend) in families {
        for protocol in [TCP, UDP] {
            for payload in [&b""[..], b"odd", b"even"] {
                let rule = Router::new(HOP);
                let mut forward = frame(protocol, (client, 5000), (external, 8080), 64, payload);
                assert_eq!(
                    rule.handle(Role::External, &mut forward),
                    Verdict::Redirect(INSIDE_DEVICE)
                );
                let mut expected = frame(protocol, (client, 5000), (backend, 80), 63, payload);
                expected[..6].copy_from_slice(&[2, 0, 0, 0, 0, 10]);
                expected[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 3]);
                assert_eq!(forward, expected);
                assert_eq!(rule.packets(Direction::Forward), 1);

                let rule = Router::new(BACK);
                let mut reply = frame(protocol, (backend, 80), (client, 5000), 64, payload);
                assert_eq!(
                    rule.handle(Role::Internal, &mut reply),
                    Verdict::Redirect(OUTSIDE_DEVICE)
                );
                let mut expected = frame(protocol, (external, 8080), (client, 5000), 63, payload);
                expected[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
                expected[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
                assert_eq!(reply, expected);
                let length = reply.len() as u64 - 14;
                let tally = rule.counter.borrow().translated[Direction::Reply as usize];
                assert_eq!((tally.packets, tally.bytes), (1, length));
            }
        }
    }
}

/// Of a frame in several pieces only the headers need be in the first.
#[test]
fn the_payload_may_be_in_other_pieces() {
    for (client, external) in [(&CLIENT[..], &BOX[..]), (&CLIENT6, &BOX6)] {
        for protocol in [TCP, UDP] {
            let came = frame(protocol, (client, 5000), (external, 8080), 64, &[7; 1000]);
            let headers = came.len() - 1000;
            for piece in [headers - 1, headers, headers + 1, came.len() - 1, came.len()] {
                for (transmits_pieces, trusted) in
                    [(false, false), (false, true), (true, false), (true, true)]
                {
                    let rule = Router { piece, transmits_pieces, ..Router::new(HOP) };
                    let until = Jiffies(if trusted { 100 } else { 0 });
                    rule.trust.set(Trust { generation: 1, padding: 0, until });
                    // The way is remembered from a frame in one piece.
                    let mut small = frame(protocol, (client, 5000), (external, 8080), 64, b"");
                    if piece >= small.len() {
                        let verdict = rule.handle(Role::External, &mut small);
                        assert_eq!(verdict, Verdict::Redirect(INSIDE_DEVICE));
                    }
                    let mut bytes = came.clone();
                    let verdict = rule.handle(Role::External, &mut bytes);
                    let expected = match piece {
                        _ if piece < headers => Verdict::Pass(Passed::Malformed),
                        _ if transmits_pieces || piece == came.len() => {
                            Verdict::Redirect(INSIDE_DEVICE)
                        }
                        _ => Verdict::Stack(ToStack::NoTransmit),
                    };
                    assert_eq!(verdict, expected, "{piece} {transmits_pieces} {trusted}");
                    if piece < headers {
                        assert_eq!(bytes, came);
                    } else {
                        assert!(is_valid(&bytes));
                        assert_eq!(bytes[headers..], came[headers..]);
                    }
                    // What is in no piece is missing.
                    let mut cut = came.clone();
                    cut.pop();
                    let verdict = rule.handle(Role::External, &mut cut);
                    assert_eq!(verdict, Verdict::Pass(Passed::Malformed));
                }
            }
        }
    }
}

#[test]
fn a_packet_costs_the_same_lookups_whatever_the_rules_are() {
    for (role, destination, port, lookups) in [
        (Role::External, BOX, 8080, [1, 2, 1]),
        (Role::External, BOX, 8081, [1, 2, 0]),
        (Role::External, BOX, 80, [1, 1, 0]),
        (Role::External, SECOND, 8080, [1, 0, 1]),
        (Role::External, SECOND, 80, [1, 0, 0]),
        (Role::External, BACKEND, 80, [1, 0, 0]),
        (Role::Both, BACKEND, 80, [2, 0, 0]),
    ] {
        let router = Router::new(HOP);
        router.handle(role, &mut frame(UDP, (&CLIENT, 5000), (&destination, port), 64, b""));
        assert_eq!(router.lookups.get(), lookups, "{role:?} {destination:?} {port}");
    }
}

#[test]
fn what_the_fib_said_is_remembered_until_it_may_have_changed() {
    let trust = |generation, until| Trust { generation, padding: 0, until: Jiffies(until) };
    let families: [(&[u8], &[u8], &[u8]); 2] =
        [(&CLIENT, &BOX, &BACKEND), (&CLIENT6, &BOX6, &BACKEND6)];
    for (client, external, backend) in families {
        let to_backend = || frame(UDP, (client, 5000), (external, 8080), 64, b"x");
        let to_client = || frame(UDP, (backend, 80), (client, 5000), 64, b"x");
        let router = Router::new(HOP);
        let asked = |mut packet: Vec<u8>| {
            let before = router.fib.get();
            let verdict = router.handle(Role::Both, &mut packet);
            (verdict, router.fib.get() - before, packet)
        };
        let (verdict, count, translated) = asked(to_backend());
        assert_eq!((verdict, count), (Verdict::Redirect(INSIDE_DEVICE), 1));
        // The clock stands at 1.
        for (now, times) in [
            (trust(0, 2), [1, 1]),
            (trust(1, 2), [1, 0]),
            (trust(2, 2), [1, 0]),
            (trust(2, 1), [1, 1]),
            (trust(2, 2), [0, 0]),
            (trust(3, 2), [1, 0]),
        ] {
            router.trust.set(now);
            for times in times {
                assert_eq!(asked(to_backend()), (verdict, times, translated.clone()), "{now:?}");
            }
        }
        // A way to a backend is not one to a client, whatever the address is.
        let mut same = frame(UDP, (backend, 80), (backend, 5000), 64, b"x");
        assert_eq!(router.handle(Role::Internal, &mut same), Verdict::Pass(Passed::Inside));
        assert_eq!(asked(to_client()).0, Verdict::Pass(Passed::Inside));
    }
}

#[test]
fn a_remembered_way_is_not_for_packets_beyond_its_mtu() {
    let mut router = Router::new(HOP);
    router.trust.set(Trust { generation: 1, padding: 0, until: Jiffies(2) });
    let packet =
        |length: usize| frame(UDP, (&CLIENT, 5000), (&BOX, 8080), 64, &vec![0; length - 28]);
    assert_eq!(router.handle(Role::External, &mut packet(1500)), Verdict::Redirect(INSIDE_DEVICE));
    router.route_mtu = 1400;
    // The way that was remembered takes 1,500.
    let verdict = router.handle(Role::External, &mut packet(1500));
    assert_eq!((verdict, router.fib.get()), (Verdict::Redirect(INSIDE_DEVICE), 1));
    router.ingress_mtu = 9000;
    let verdict = router.handle(Role::External, &mut packet(1501));
    assert_eq!((verdict, router.fib.get()), (Verdict::Drop(Dropped::TooBig), 3));
}

#[test]
fn only_ways_to_redirect_by_are_remembered() {
    for route in [
        no_neighbour(INSIDE),
        nothing_but(Route::Encapsulated),
        nothing_but(Route::NotForwarded),
        nothing_but(Route::Prohibited),
        BACK,
    ] {
        let router = Router::new(route);
        router.trust.set(Trust { generation: 1, padding: 0, until: Jiffies(2) });
        for times in 1..4 {
            router.handle(Role::External, &mut frame(TCP, (&CLIENT, 1), (&BOX, 8080), 64, b""));
            assert_eq!(router.fib.get(), times, "{route:?}");
        }
    }
}

#[test]
fn two_destinations_of_one_set_are_both_remembered() {
    let of =
        |set| (0u32..).map(|n| Address(n.to_be_bytes())).filter(move |a| a.route_set(BITS) == set);
    let tag = Tag::new(1, Direction::Reply, Hook::Xdp);
    let mut routes = RouteSet::EMPTY;
    let found: Vec<Address<4>> = of(3).take(3).collect();
    for (hop, address) in found.iter().enumerate() {
        assert_eq!(routes.find(address, tag), None);
        routes.remember(*address, tag, hop as u32);
    }
    assert_eq!(routes.find(&found[0], tag), None);
    assert_eq!(routes.find(&found[1], tag), Some(1));
    assert_eq!(routes.find(&found[2], tag), Some(2));
    assert_eq!(routes.find(&found[2], Tag::new(2, Direction::Reply, Hook::Xdp)), None);
    assert_eq!(routes.find(&found[2], Tag::new(1, Direction::Forward, Hook::Xdp)), None);
    assert_eq!(routes.find(&found[2], Tag::new(1, Direction::Reply, Hook::Tc)), None);
}

#[test]
fn ten_thousand_neighbours_have_sets_with_room_for_each() {
    let full = |addresses: &mut dyn Iterator<Item = u32>| {
        let mut sets = HashMap::<u32, u32>::new();
        for address in addresses {
            *sets.entry(Address(address.to_be_bytes()).route_set(14)).or_default() += 1;
        }
        sets.into_values().filter(|count| *count > 2).sum::<u32>()
    };
    let first = u32::from_be_bytes([198, 18, 0, 0]);
    assert_eq!(full(&mut (first..first + 10_000)), 0);
    assert!(full(&mut (0..10_000).map(|n| first + 256 * n)) < 1_500);
    let ipv6 = |n: u16| {
        let [high, low] = n.to_be_bytes();
        Address([0x20, 1, 0xd, 0xb8, 0, 7, high, low, 2, 0x10, 0, 0xff, 0xfe, 1, low, high])
    };
    let mut sets = HashMap::<u32, u32>::new();
    (0..10_000).for_each(|n| *sets.entry(ipv6(n).route_set(14)).or_default() += 1);
    assert!(sets.into_values().filter(|count| *count > 2).sum::<u32>() < 2_000);
}

#[test]
fn a_hop_that_is_in_use_is_not_written_over() {
    let hop = |device| Hop { device, ..Hop::default() };
    let [first, second] =
        [1, 2].map(|generation| Tag::new(generation, Direction::Reply, Hook::Xdp));
    let mut row = RememberedHop::default();
    assert!(row.claim(first, &hop(1)));
    assert!(row.claim(first, &hop(1)));
    assert!(!row.claim(first, &hop(2)));
    assert_eq!(row.hop, hop(1));
    assert!(row.claim(second, &hop(2)));
    assert!(!row.claim(second, &hop(1)));
    // Hops that differ by a bit anywhere mostly have rows of their own.
    let rows: std::collections::BTreeSet<u32> = (0..96)
        .map(|bit| {
            let mut bytes = [0x52, 0x54, 0, 1, 2, 3, 2, 0, 0, 0, 0, 9];
            bytes[bit / 8] ^= 1 << (bit % 8);
            Hop { device: 3, link: LinkAddresses::from_bytes(bytes), ..Hop::default() }
                .row::<4>(Direction::Reply, Hook::Xdp)
        })
        .collect();
    assert!(rows.len() > 85, "{}", rows.len());
    let row = |mtu| Hop { mtu, ..hop(3) }.row::<4>(Direction::Reply, Hook::Xdp);
    assert!(row(1500) != row(1400) && row(1500) != row(1280));
    // And never share one with those that have other tags.
    let hops = || (0..2000).map(hop);
    let rows = [
        hops().map(|hop| hop.row::<4>(Direction::Forward, Hook::Xdp)).collect::<HashSet<_>>(),
        hops().map(|hop| hop.row::<4>(Direction::Reply, Hook::Xdp)).collect(),
        hops().map(|hop| hop.row::<16>(Direction::Forward, Hook::Xdp)).collect(),
        hops().map(|hop| hop.row::<16>(Direction::Reply, Hook::Xdp)).collect(),
        hops().map(|hop| hop.row::<4>(Direction::Forward, Hook::Tc)).collect(),
        hops().map(|hop| hop.row::<4>(Direction::Reply, Hook::Tc)).collect(),
        hops().map(|hop| hop.row::<16>(Direction::Forward, Hook::Tc)).collect(),
        hops().map(|hop| hop.row::<16>(Direction::Reply, Hook::Tc)).collect(),
    ];
    for (place, own) in rows.iter().enumerate() {
        assert!(own.len() > 500 && own.iter().all(|row| *row < 1 << HOP_BITS));
        assert!(rows[place + 1..].iter().all(|others| own.is_disjoint(others)));
    }
}

#[test]
fn a_role_translates_its_own_end_only() {
    let rule = Router::new(HOP);
    let mut forward = frame(TCP, (&CLIENT, 5000), (&BOX, 8080), 64, b"");
    assert_eq!(rule.handle(Role::Both, &mut forward), Verdict::Redirect(INSIDE_DEVICE));

    let rule = Router::new(BACK);
    let mut reply = frame(TCP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"");
    assert_eq!(rule.handle(Role::External, &mut reply), Verdict::Pass(Passed::NoRule));
    assert_eq!(rule.handle(Role::Both, &mut reply), Verdict::Redirect(OUTSIDE_DEVICE));
}

#[test]
fn what_the_stack_sends_keeps_its_hops_and_link_addresses() {
    let rule = Router::new(no_neighbour(INSIDE));
    let mut forward = frame(UDP, (&CLIENT, 5000), (&BOX, 8080), 2, b"x");
    let verdict = rule.handle(Role::External, &mut forward);
    assert_eq!(verdict, Verdict::Stack(ToStack::NoNeighbour));
    assert_eq!(forward, frame(UDP, (&CLIENT, 5000), (&BACKEND, 80), 2, b"x"));
    assert_eq!(rule.packets(Direction::Forward), 1);
    assert_eq!(rule.counter.borrow().to_stack[ToStack::NoNeighbour as usize], 1);
}

#[test]
fn routes_decide_before_a_byte_is_changed() {
    use Direction::{Forward, Reply};
    let elsewhere = via(9, [0; 6], [0; 6]);
    let cases = [
        (Forward, BACK, Verdict::Drop(Dropped::NotInternal)),
        (Forward, elsewhere, Verdict::Drop(Dropped::NotInternal)),
        (Forward, no_neighbour(9), Verdict::Drop(Dropped::NotInternal)),
        (Forward, nothing_but(Route::NotForwarded), Verdict::Drop(Dropped::NoRoute)),
        (Forward, nothing_but(Route::Unreachable), Verdict::Drop(Dropped::Unreachable)),
        (Forward, nothing_but(Route::Blackhole), Verdict::Drop(Dropped::Blackhole)),
        (Forward, nothing_but(Route::Prohibited), Verdict::Drop(Dropped::Prohibited)),
        (Forward, nothing_but(Route::ForwardingOff), Verdict::Drop(Dropped::ForwardingOff)),
        (Reply, HOP, Verdict::Pass(Passed::Inside)),
        (Reply, elsewhere, Verdict::Pass(Passed::Inside)),
        (Reply, no_neighbour(INSIDE), Verdict::Pass(Passed::Inside)),
        (Reply, nothing_but(Route::NotForwarded), Verdict::Pass(Passed::Inside)),
        (Reply, nothing_but(Route::Unreachable), Verdict::Pass(Passed::Inside)),
        (Reply, nothing_but(Route::Encapsulated), Verdict::Pass(Passed::Inside)),
    ];
    for (direction, route, verdict) in cases {
        let rule = Router::new(route);
        let mut packet = match direction {
            Forward => frame(TCP, (&CLIENT, 5000), (&BOX, 8080), 64, b"x"),
            Reply => frame(TCP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"x"),
        };
        let before = packet.clone();
        assert_eq!(rule.handle(Role::Both, &mut packet), verdict, "{direction:?} {route:?}");
        assert_eq!(packet, before, "{direction:?} {route:?}");
        let dropped: u64 = rule.counter.borrow().dropped.iter().sum();
        assert_eq!(dropped, u64::from(matches!(verdict, Verdict::Drop(_))));
        assert_eq!(rule.passed.borrow().len(), usize::from(matches!(verdict, Verdict::Pass(_))));
        assert_eq!(rule.packets(direction), 0);
    }
}

#[test]
fn a_reply_that_is_too_big_asks_the_sender_or_is_cut_up() {
    let mut rule = Router::new(BACK);
    rule.route_mtu = 28;
    let mut may = frame(UDP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"x");
    may[20] &= !0x40; // etherparse sets "don't fragment"
    let checksum = {
        let sliced = SlicedPacket::from_ethernet(&may).unwrap();
        let Some(etherparse::NetSlice::Ipv4(ip)) = sliced.net else { panic!("IPv4") };
        ip.header().to_header().calc_header_checksum()
    };
    may[24..26].copy_from_slice(&checksum.to_be_bytes());
    let verdict = rule.handle(Role::Internal, &mut may);
    assert_eq!(verdict, Verdict::Stack(ToStack::TooBig));
    assert!(is_valid(&may));

    let mut must_not = frame(UDP, (&BACKEND6, 80), (&CLIENT6, 5000), 64, b"x");
    let before = must_not.clone();
    assert_eq!(rule.handle(Role::Internal, &mut must_not), Verdict::Pass(Passed::TooBig));
    assert_eq!(must_not, before);

    // Longer than anything on the wire that it came by: merged, and its checksum is gone.
    rule.ingress_mtu = 28;
    let verdict = rule.handle(Role::Internal, &mut must_not);
    assert_eq!(verdict, Verdict::Drop(Dropped::Merged));
    assert_eq!(must_not, before);

    // Too big for another network inside: none of ours.
    rule.route = HOP;
    rule.ingress_mtu = 1500;
    let mut may = frame(UDP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"x");
    may[20] &= !0x40;
    assert_eq!(rule.handle(Role::Internal, &mut may), Verdict::Pass(Passed::Inside));
}

#[test]
fn only_rules_that_could_swallow_the_box_ask_for_its_sockets() {
    let mut rule = Router::new(HOP);
    rule.sockets = true;
    let mut packet = frame(UDP, (&CLIENT, 53), (&BOX, 8080), 64, b"");
    assert_eq!(rule.handle(Role::External, &mut packet), Verdict::Redirect(INSIDE_DEVICE));
    assert!(!rule.asked.get());
    let mut packet = frame(UDP, (&CLIENT6, 53), (&BOX6, 8080), 64, b"");
    let before = packet.clone();
    assert_eq!(rule.handle(Role::External, &mut packet), Verdict::Pass(Passed::Own));
    assert_eq!(packet, before);
}

#[test]
fn a_reply_leaves_with_the_address_that_the_client_came_by() {
    let mut rule = Router::new(HOP);
    let mut ask = |external: [u8; 4]| {
        rule.route = HOP;
        let mut packet = frame(UDP, (&CLIENT, 5000), (&external, 8080), 64, b"");
        assert_eq!(rule.handle(Role::External, &mut packet), Verdict::Redirect(INSIDE_DEVICE));
        rule.route = BACK;
        let mut packet = frame(UDP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"");
        assert_eq!(rule.handle(Role::Internal, &mut packet), Verdict::Redirect(OUTSIDE_DEVICE));
        assert!(is_valid(&packet));
        let source: [u8; 4] = packet[26..30].try_into().unwrap();
        (source, rule.arrivals.borrow().len())
    };
    assert_eq!(ask(BOX), (BOX, 0));
    assert_eq!(ask(SECOND), (SECOND, 1));
    assert_eq!(ask(SECOND), (SECOND, 1));
    // The client's port comes again, by the first address.
    assert_eq!(ask(BOX), (BOX, 0));
}

#[test]
fn the_last_hop_is_not_taken() {
    for (ttl, forward, reply) in [
        (0, Verdict::Drop(Dropped::TtlExpired), Verdict::Pass(Passed::Ttl)),
        (1, Verdict::Drop(Dropped::TtlExpired), Verdict::Pass(Passed::Ttl)),
        (2, Verdict::Redirect(INSIDE_DEVICE), Verdict::Redirect(OUTSIDE_DEVICE)),
    ] {
        let families: [[&[u8]; 3]; 2] = [[&CLIENT, &BOX, &BACKEND], [&CLIENT6, &BOX6, &BACKEND6]];
        for [client, external, backend] in families {
            let mut packet = frame(TCP, (client, 5000), (external, 8080), ttl, b"");
            assert_eq!(Router::new(HOP).handle(Role::External, &mut packet), forward);
            let mut packet = frame(TCP, (backend, 80), (client, 5000), ttl, b"");
            assert_eq!(Router::new(BACK).handle(Role::Internal, &mut packet), reply);
        }
    }
}

#[test]
fn frames_cut_short_pass_as_they_came() {
    for (client, external) in [(&CLIENT[..], &BOX[..]), (&CLIENT6, &BOX6)] {
        for protocol in [TCP, UDP] {
            let whole = frame(protocol, (client, 5000), (external, 8080), 64, b"payload");
            for length in 0..whole.len() {
                let mut cut = whole[..length].to_vec();
                let verdict = Router::new(HOP).handle(Role::Both, &mut cut);
                assert_eq!(verdict, Verdict::Pass(Passed::Malformed), "{length} bytes");
                assert_eq!(cut, whole[..length]);
            }
        }
    }
}

/// A frame that a rule claims, with up to four bytes set at random.
fn nearly_valid() -> impl Strategy<Value = Vec<u8>> {
    let ends = prop_oneof![
        Just((CLIENT.to_vec(), BOX.to_vec(), 5000, 8080)),
        Just((BACKEND.to_vec(), CLIENT.to_vec(), 80, 5000)),
        Just((CLIENT6.to_vec(), BOX6.to_vec(), 5000, 8080)),
        Just((BACKEND6.to_vec(), CLIENT6.to_vec(), 80, 5000)),
    ];
    let noise = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (ends, any::<bool>(), 0u8.., prop::collection::vec(any::<u8>(), 0..64), noise).prop_map(
        |((from, to, from_port, to_port), tcp, ttl, payload, noise)| {
            let protocol = if tcp { TCP } else { UDP };
            let mut bytes = frame(protocol, (&from, from_port), (&to, to_port), ttl, &payload);
            for (place, value) in noise {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            bytes
        },
    )
}

proptest! {
    #[test]
    fn what_passes_is_unchanged_and_what_is_translated_stays_valid(
        mut bytes in prop_oneof![nearly_valid(), prop::collection::vec(any::<u8>(), 0..200)],
        route in prop_oneof![
            Just(HOP), Just(BACK), Just(nothing_but(Route::NotForwarded)),
            Just(no_neighbour(INSIDE)),
        ],
        route_mtu in prop_oneof![Just(1500), 20u16..80],
    ) {
        let before = bytes.clone();
        let mut rule = Router::new(route);
        rule.route_mtu = route_mtu;
        let verdict = rule.handle(Role::Both, &mut bytes);
        let translated = rule.packets(Direction::Forward) + rule.packets(Direction::Reply);
        match verdict {
            Verdict::ForwardDetour(_) | Verdict::ReplyDetour(_) => prop_assert!(false, "{verdict:?} and nothing more"),
            Verdict::Pass(reason) => {
                prop_assert_eq!(&bytes, &before);
                prop_assert_eq!(rule.passed.take(), vec![reason]);
                prop_assert_eq!(translated, 0);
            }
            Verdict::Drop(_) => prop_assert_eq!(translated, 0),
            Verdict::Flow(..) | Verdict::Syn(_) => {
                prop_assert!(false, "a part that decides nothing");
            }
            Verdict::Redirect(_) | Verdict::Stack(_) => {
                prop_assert_eq!(translated, 1);
                prop_assert_eq!(is_valid(&bytes), is_valid(&before));
                prop_assert_eq!(bytes.len(), before.len());
            }
        }
    }
}
