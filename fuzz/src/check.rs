//! What must hold for a packet that was translated, and for an answer.

use std::ops::Range;

use portfwd_ebpf::table::Dropped;

use crate::wire::{ICMP, ICMPV6, LINK, Packet, TCP, UDP, UDP_LITE, sum};

/// A frame before and after its translation: only what may change did, and checksums are as right as
/// they were. With `is_sent` it has new link addresses and one hop less. Gives where its parts are.
pub fn translated(before: &[u8], after: &[u8], is_sent: bool) -> Packet {
    assert_eq!(before.len(), after.len());
    let packet = Packet::of(before).expect("what was translated is a packet");
    let mut may_change = Vec::new();
    if is_sent {
        may_change.push(0..12);
        let hops = packet.hops();
        assert_eq!(before[hops].checked_sub(1), Some(after[hops]), "hops");
        may_change.push(hops..hops + 1);
    }
    let quoted = packet.quoted(before);
    for packet in [Some(&packet), quoted.as_ref()].into_iter().flatten() {
        may_change.push(packet.addresses());
        may_change.extend(packet.header().map(|header| header.start + 10..header.start + 12));
        may_change.extend(packet.ports());
        // Of a quoted TCP header there may be half of it, which nothing can repair.
        may_change.extend(packet.checksum());
    }
    if quoted.is_some() {
        may_change.push(packet.payload + 2..packet.payload + 4);
    }
    if let Some(place) = mss(&packet, before) {
        let [was, is] = [before, after].map(|bytes| &bytes[place.clone()]);
        assert!(is <= was, "an MSS of {was:?} became {is:?}");
        may_change.push(place);
    }
    for (place, (was, is)) in before.iter().zip(after).enumerate() {
        let may = may_change.iter().any(|range| range.contains(&place));
        assert!(may || was == is, "byte {place} became {is:#x} of {was:#x}");
    }
    headers(&packet, before, after);
    if let Some(quoted) = quoted {
        headers(&quoted, before, after);
    }
    packet
}

/// Where a SYN has the value of its MSS option.
fn mss(packet: &Packet, frame: &[u8]) -> Option<Range<usize>> {
    let tcp = frame.get(packet.payload..packet.end)?;
    if packet.protocol != TCP || packet.offset != 0 || tcp.get(13)? & 2 == 0 {
        return None;
    }
    let end = usize::from(tcp[12] >> 4) * 4;
    let mut at = 20;
    while at < end {
        at += match tcp.get(at..end)? {
            [0, ..] => return None,
            [1, ..] => 1,
            [2, 4, _, _, ..] => return Some(packet.payload + at + 2..packet.payload + at + 4),
            [2, ..] | [_, 0 | 1, ..] => return None,
            [_, size, ..] => usize::from(*size),
            _ => return None,
        };
    }
    None
}

/// The checksums of a packet, whole or quoted, are wrong by as much as they were.
fn headers(packet: &Packet, before: &[u8], after: &[u8]) {
    if let Some(header) = packet.header() {
        let [was, is] = [before, after].map(|bytes| sum([&bytes[header.clone()]]));
        assert_eq!(was, is, "the sum of an IPv4 header");
    }
    let segment = packet.payload..packet.end;
    let covers = |bytes: &[u8]| match packet.protocol {
        ICMP => sum([&bytes[segment.clone()]]),
        _ => sum([&bytes[packet.addresses()], &bytes[segment.clone()]]),
    };
    let is_covered = match packet.protocol {
        ICMP => packet.offset == 0,
        _ => packet.checksum().is_some(),
    };
    let [was, is] = [before, after].map(|bytes| packet.checksum().map(|place| &bytes[place]));
    // UDP's, if there is none, stays none; and one that is there is never made to none.
    let zero = Some(&[0; 2][..]);
    if matches!(packet.protocol, UDP | UDP_LITE) {
        assert_eq!(was == zero, is == zero, "a checksum that came or went");
        if was == zero {
            return;
        }
    }
    if is_covered {
        assert_eq!(
            covers(before),
            covers(after),
            "the sum that covers protocol {}",
            packet.protocol
        );
    }
}

/// An ICMP error that portfwd sends itself about the packet in a frame.
pub fn answer(frame: &[u8], answer: &[u8], reason: Dropped, mtu: u16) {
    let about = Packet::of(frame).expect("what is answered is a packet");
    let error = Packet::of(answer).expect("an answer is a packet");
    assert_eq!(answer[..6], frame[6..12], "to the neighbour that it came from");
    assert_eq!(answer[6..12], frame[..6], "from where it was sent to");
    assert_eq!(answer[12..14], frame[12..14]);
    assert_eq!(answer.len(), error.end, "nothing else in the frame");
    assert_eq!(answer[error.source()], frame[about.destination()]);
    assert_eq!(answer[error.destination()], frame[about.source()]);
    assert!(answer[error.hops()] >= 64);
    assert!(about.quoted(frame).is_none() && about.offset == 0, "about what nobody answers");
    let (protocol, longest, mtu) =
        if about.is_v4 { (ICMP, 576, mtu) } else { (ICMPV6, 1280, mtu.max(1280)) };
    let kind = match (reason, about.is_v4) {
        (Dropped::TtlExpired, true) => [11, 0],
        (Dropped::TtlExpired, false) => [3, 0],
        (Dropped::TooBig, true) => [3, 4],
        (Dropped::TooBig, false) => [2, 0],
        _ => panic!("an answer about {reason:?}"),
    };
    let rest = if reason == Dropped::TooBig { u32::from(mtu) } else { 0 };
    let (head, quoted) = answer[error.payload..].split_at(8);
    assert_eq!((error.protocol, [head[0], head[1]]), (protocol, kind));
    assert_eq!(head[4..], rest.to_be_bytes());
    let head = error.payload + 8 - LINK;
    let whole = &frame[about.start..about.end];
    assert_eq!(quoted, &whole[..whole.len().min(longest - head)]);
    if let Some(header) = error.header() {
        assert_eq!(sum([&answer[header]]), 0, "the sum of its header");
    }
    let length = (error.end - error.payload) as u16;
    let pseudo = [&answer[error.addresses()], &length.to_be_bytes(), &[0, ICMPV6]];
    let pseudo = if about.is_v4 { &[][..] } else { &pseudo[..] };
    let parts = pseudo.iter().copied().chain([&answer[error.payload..]]);
    assert_eq!(sum(parts), 0, "its checksum");
}
