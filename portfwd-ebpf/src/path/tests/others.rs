//! Protocols other than TCP and UDP, which a DMZ host has.

use super::errors::error;
use super::fragments::{fragments, repair};
use super::*;
use crate::packet::{ICMP, ICMPV6};

const UDP_LITE: u8 = 136;
const DCCP: u8 = 33;

/// A packet of any protocol. Where there is a checksum that covers the addresses, it is right.
fn packet(protocol: u8, from: &[u8], to: &[u8], hops: u8, payload: &[u8]) -> Vec<u8> {
    use etherparse::checksum::Sum16BitWords;
    let mut bytes = frame(UDP, (from, 0), (to, 0), hops, b"");
    let head = if from.len() == 4 { 34 } else { 54 };
    bytes.truncate(head);
    bytes.extend(payload);
    let place = match protocol {
        UDP_LITE | DCCP => Some(6),
        ICMPV6 => Some(2),
        _ => None,
    };
    let length = payload.len() as u16;
    if from.len() == 4 {
        bytes[16..18].copy_from_slice(&(20 + length).to_be_bytes());
        bytes[23] = protocol;
        repair(&mut bytes);
    } else {
        bytes[18..20].copy_from_slice(&length.to_be_bytes());
        bytes[20] = protocol;
    }
    if let Some(place) = place {
        bytes[head + place..head + place + 2].fill(0);
        let sum = Sum16BitWords::new()
            .add_slice(from)
            .add_slice(to)
            .add_2bytes([0, protocol])
            .add_2bytes(length.to_be_bytes())
            .add_slice(&bytes[head..])
            .ones_complement()
            .to_be();
        let sum = if protocol == UDP_LITE && sum == 0 { 0xffff } else { sum };
        bytes[head + place..head + place + 2].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// Way, route, and the ends as they come and as they leave.
type Case = (Direction, Told, [&'static [u8]; 2], [&'static [u8]; 2]);

fn ways() -> [Case; 4] {
    [
        (Direction::Forward, HOP, [&CLIENT, &DMZ_BOX], [&CLIENT, &DMZ]),
        (Direction::Reply, BACK, [&DMZ, &CLIENT], [&DMZ_BOX, &CLIENT]),
        (Direction::Forward, HOP, [&CLIENT6, &DMZ_BOX6], [&CLIENT6, &DMZ6]),
        (Direction::Reply, BACK, [&DMZ6, &CLIENT6], [&DMZ_BOX6, &CLIENT6]),
    ]
}

fn linked(mut frame: Vec<u8>, told: Told) -> Vec<u8> {
    if told.route == Route::Via {
        frame[..12].copy_from_slice(&told.hop.link.bytes());
    }
    frame
}

#[test]
fn their_addresses_are_translated() {
    for (direction, route, came, goes) in ways() {
        // IPIP, IPv6, GRE, ESP, SCTP and whatever else.
        for protocol in [4, 41, 47, 50, 132, 253, UDP_LITE, DCCP] {
            for payload in [&[0x11; 8][..], &[0xff; 33], &[0; 64]] {
                let router = Router::new(route);
                let mut bytes = packet(protocol, came[0], came[1], 64, payload);
                let verdict = router.handle(Role::Both, &mut bytes);
                assert!(matches!(verdict, Verdict::Redirect(_)), "{protocol}: {verdict:?}");
                let expected = packet(protocol, goes[0], goes[1], 63, payload);
                assert_eq!(bytes, linked(expected, route), "{protocol} {direction:?}");
                assert_eq!(router.packets(direction), 1);
                // Nobody is asked for a socket that no lookup can find.
                assert!(!router.asked.get());
            }
        }
    }
}

#[test]
fn a_checksum_that_must_not_be_zero_is_not() {
    for (_, route, came, goes) in ways() {
        // Whatever the last two bytes are, one value of them makes the checksum zero.
        let mut payload = [7; 16];
        payload[14..].fill(0);
        let leaves = packet(UDP_LITE, goes[0], goes[1], 63, &payload);
        let head = leaves.len() - 16;
        payload[14..].copy_from_slice(&leaves[head + 6..head + 8]);
        let leaves = packet(UDP_LITE, goes[0], goes[1], 63, &payload);
        assert_eq!(leaves[head + 6..head + 8], [0xff, 0xff]);
        let mut bytes = packet(UDP_LITE, came[0], came[1], 64, &payload);
        Router::new(route).handle(Role::Both, &mut bytes);
        assert_eq!(bytes, linked(leaves, route));
    }
}

#[test]
fn of_icmp_a_dmz_host_has_echo() {
    for (direction, route, came, goes) in ways() {
        let (protocol, echo, reply) =
            if came[0].len() == 4 { (ICMP, 8, 0) } else { (ICMPV6, 128, 129) };
        let claimed = if direction == Direction::Forward { echo } else { reply };
        for kind in 0..=255 {
            let message = |from, to, hops| error(from, to, hops, [kind, 0], [1, 2, 3, 4], b"ping");
            let before = message(came[0], came[1], 64);
            let mut bytes = before.clone();
            let verdict = Router::new(route).handle(Role::Both, &mut bytes);
            if kind == claimed {
                assert!(matches!(verdict, Verdict::Redirect(_)), "{kind}: {verdict:?}");
                assert_eq!(bytes, linked(message(goes[0], goes[1], 63), route));
            } else {
                let reasons = [Passed::Icmp, Passed::Malformed];
                assert!(
                    matches!(verdict, Verdict::Pass(reason) if reasons.contains(&reason)),
                    "{kind}: {verdict:?}"
                );
                assert_eq!(bytes, before);
            }
        }
        // The other family's.
        let wrong = if protocol == ICMP { ICMPV6 } else { ICMP };
        let before = packet(wrong, came[0], came[1], 64, &[echo, 0, 0, 0, 1, 2, 3, 4]);
        let mut bytes = before.clone();
        let verdict = Router::new(route).handle(Role::Both, &mut bytes);
        assert_eq!((verdict, bytes), (Verdict::Pass(Passed::Icmp), before));
    }
}

#[test]
fn their_fragments_follow() {
    for (direction, route, came, goes) in ways() {
        let (kind, echo) = match (direction, came[0].len()) {
            (Direction::Forward, 4) => (ICMP, 8),
            (Direction::Reply, 4) => (ICMP, 0),
            (Direction::Forward, _) => (ICMPV6, 128),
            _ => (ICMPV6, 129),
        };
        for protocol in [kind, UDP_LITE, 47] {
            let whole = |ends: [&[u8]; 2], hops| match protocol {
                ICMP | ICMPV6 => error(ends[0], ends[1], hops, [echo, 0], [1; 4], &[9; 300]),
                _ => packet(protocol, ends[0], ends[1], hops, &[9; 300]),
            };
            let router = Router::new(route);
            let parts = fragments(&whole(came, 64), 7, 128);
            let expected = fragments(&whole(goes, 63), 7, 128);
            for (mut bytes, expected) in parts.into_iter().zip(expected) {
                let verdict = router.handle(Role::Both, &mut bytes);
                assert!(matches!(verdict, Verdict::Redirect(_)), "{protocol}: {verdict:?}");
                assert_eq!(bytes, linked(expected, route), "{protocol}");
            }
        }
    }
}

#[test]
fn errors_about_them_come_back() {
    for (direction, route, came, goes) in ways() {
        let is_v4 = came[0].len() == 4;
        let icmp = if is_v4 { ICMP } else { ICMPV6 };
        // What the error is about went the other way.
        let echo = match (direction, is_v4) {
            (Direction::Forward, true) => 0,
            (Direction::Reply, true) => 8,
            (Direction::Forward, false) => 129,
            (Direction::Reply, false) => 128,
        };
        for protocol in [icmp, 47, UDP_LITE] {
            let about = |ends: [&[u8]; 2]| {
                let packet = match protocol {
                    ICMP | ICMPV6 => error(ends[1], ends[0], 3, [echo, 0], [1; 4], b"ping"),
                    _ => packet(protocol, ends[1], ends[0], 3, &[9; 30]),
                };
                packet[14..].to_vec()
            };
            let kind = if is_v4 { [11, 0] } else { [3, 0] };
            let mut bytes = error(came[0], came[1], 64, kind, [0; 4], &about(came));
            let verdict = Router::new(route).handle(Role::Both, &mut bytes);
            assert!(matches!(verdict, Verdict::Redirect(_)), "{protocol}: {verdict:?}");
            let expected = error(goes[0], goes[1], 63, kind, [0; 4], &about(goes));
            assert_eq!(bytes, linked(expected, route), "{protocol} {direction:?}");
        }
        // About a ping of the box's own.
        let own = match (direction, is_v4) {
            (Direction::Forward, true) => 8,
            (Direction::Forward, false) => 128,
            _ => continue,
        };
        let about = error(came[1], came[0], 3, [own, 0], [1; 4], b"ping");
        let kind = if is_v4 { [11, 0] } else { [3, 0] };
        let before = error(came[0], came[1], 64, kind, [0; 4], &about[14..]);
        let mut bytes = before.clone();
        let verdict = Router::new(route).handle(Role::Both, &mut bytes);
        assert_eq!((verdict, bytes), (Verdict::Pass(Passed::Icmp), before));
    }
}

#[test]
fn what_has_sums_over_the_addresses_with_a_key_passes() {
    let (_, route, came, _) = ways()[0];
    let before = packet(51, came[0], came[1], 64, &[9; 30]);
    let mut bytes = before.clone();
    let verdict = Router::new(route).handle(Role::Both, &mut bytes);
    assert_eq!((verdict, bytes), (Verdict::Pass(Passed::Protocol), before));
}

#[test]
fn a_sender_is_told_of_their_last_hop_too() {
    for (direction, route, came, _) in ways() {
        let mut bytes = packet(47, came[0], came[1], 1, &[9; 30]);
        let router = Router::new(route);
        let verdict = router.handle(Role::Both, &mut bytes);
        match direction {
            Direction::Forward => {
                assert_eq!(verdict, Verdict::Drop(Dropped::TtlExpired));
                assert!(router.answer.borrow().is_some());
            }
            Direction::Reply => assert_eq!(verdict, Verdict::Pass(Passed::Ttl)),
        }
    }
}
