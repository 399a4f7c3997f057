//! Every combination of headers, both ways, in both families, over TCP and UDP.

use portfwd_ebpf::table::Passed;
use portfwd_tests::is_root;
use portfwd_tests::packet::{Packet, TCP, Tcp, UDP, checksum, repair_ipv4};

use crate::router::{Flow, Outcome, Version, WEB, in_both, with_router};

type Applies = fn(&Packet) -> bool;
/// What is different about a packet.
type Change = fn(&mut Packet);

const ANY: Applies = |_| true;
const V4: Applies = |packet| packet.is_v4();
const V6: Applies = |packet| !packet.is_v4();
const TCP_ONLY: Applies = |packet| packet.protocol == TCP;
const UDP_ONLY: Applies = |packet| packet.protocol == UDP;
const REPLY: Applies = |packet| packet.source.port() == 80;
const V4_UDP: Applies = |packet| packet.is_v4() && packet.protocol == UDP;

/// Extension headers' numbers.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Options of `8 * (1 + units)` bytes: all padding.
fn extension(number: u8, units: u8) -> (u8, Vec<u8>) {
    let mut bytes = vec![0, units, 1, 4 + units * 8];
    bytes.resize(8 * (1 + usize::from(units)), 0);
    (number, bytes)
}

fn routing(segments_left: u8) -> (u8, Vec<u8>) {
    let mut bytes = vec![0, 2, 0, segments_left, 0, 0, 0, 0];
    bytes.extend([0xfd; 16]);
    (ROUTING, bytes)
}

/// A fragment header; the offset is in bytes.
fn fragment(offset: u16, more: bool) -> (u8, Vec<u8>) {
    let [high, low] = (offset | u16::from(more)).to_be_bytes();
    (FRAGMENT, vec![0, 0, high, low, 1, 2, 3, 4])
}

/// What is translated: a change to the packet that comes, and to the one that leaves.
#[rustfmt::skip]
const TRANSLATED: &[(&str, Applies, Change)] = &[
    ("as it is", ANY, |_| {}),
    ("no payload", ANY, |packet| packet.payload.clear()),
    ("one byte", ANY, |packet| packet.payload = vec![0xa5]),
    ("two bytes", ANY, |packet| packet.payload = vec![0xff, 0xff]),
    ("a full frame", ANY, |packet| packet.payload = vec![0xa5; 1400]),
    ("odd and long", ANY, |packet| packet.payload = (0..1399).map(|i| (i * 7) as u8).collect()),
    ("zeros", ANY, |packet| packet.payload = vec![0; 64]),
    ("ones", ANY, |packet| packet.payload = vec![0xff; 65]),
    ("padding", ANY, |packet| packet.padding = vec![0xee; 18]),
    ("odd padding", ANY, |packet| packet.padding = vec![0xee; 1]),
    ("two hops left", ANY, |packet| packet.hops = 2),
    ("255 hops left", ANY, |packet| packet.hops = 255),
    ("DSCP and ECN", ANY, |packet| packet.class = 0xb8 | 3),
    ("ECN capable", ANY, |packet| packet.class = 2),
    ("flow label", V6, |packet| packet.number = 0xbeef),
    ("may be fragmented", V4, |packet| packet.fragment = 0),
    ("reserved flag", V4, |packet| packet.fragment = 0x8000),
    ("identification", V4, |packet| packet.number = 0xffff),
    ("4 bytes of options", V4, |packet| packet.options = vec![1; 4]),
    ("8 bytes of options", V4, |packet| packet.options = vec![1; 8]),
    ("12 bytes of options", V4, |packet| packet.options = vec![1; 12]),
    ("16 bytes of options", V4, |packet| packet.options = vec![1; 16]),
    ("20 bytes of options", V4, |packet| packet.options = vec![1; 20]),
    ("24 bytes of options", V4, |packet| packet.options = vec![1; 24]),
    ("28 bytes of options", V4, |packet| packet.options = vec![1; 28]),
    ("32 bytes of options", V4, |packet| packet.options = vec![1; 32]),
    ("36 bytes of options", V4, |packet| packet.options = vec![1; 36]),
    ("40 bytes of options", V4, |packet| packet.options = (0x80..0xa8).collect()),
    ("hop-by-hop options", V6, |packet| packet.extensions = vec![extension(HOP_BY_HOP, 0)]),
    ("destination options", V6, |packet| packet.extensions = vec![extension(DESTINATION, 3)]),
    ("routing at its end", V6, |packet| packet.extensions = vec![routing(0)]),
    ("long options", V6, |packet| packet.extensions = vec![extension(DESTINATION, 31)]),
    ("all in order", V6, |packet| packet.extensions = vec![
        extension(HOP_BY_HOP, 1), extension(DESTINATION, 0), routing(0), extension(DESTINATION, 2),
    ]),
    ("four", V6, |packet| packet.extensions = vec![extension(DESTINATION, 0); 4]),
    ("five", V6, |packet| packet.extensions = vec![extension(DESTINATION, 0); 5]),
    ("a fragment that is all", V6, |packet| packet.extensions = vec![fragment(0, false)]),
    ("the same behind options", V6, |packet| packet.extensions = vec![extension(HOP_BY_HOP, 0), fragment(0, false)]),
    ("the same before options", V6, |packet| packet.extensions = vec![fragment(0, false), extension(DESTINATION, 2)]),
    ("SYN with options", TCP_ONLY, |packet| packet.tcp = Tcp {
        flags: 2, options: vec![2, 4, 5, 0xa0, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7], ..packet.tcp
    }),
    ("the longest header", TCP_ONLY, |packet| packet.tcp.options = vec![1; 40]),
    ("urgent", TCP_ONLY, |packet| (packet.tcp.flags, packet.tcp.urgent) = (0x38, 5)),
    ("congestion", TCP_ONLY, |packet| packet.tcp.flags = 0xd0),
    ("RST", TCP_ONLY, |packet| packet.tcp.flags = 4),
    ("every flag", TCP_ONLY, |packet| packet.tcp.flags = 0xff),
    ("no checksum", V4_UDP, |packet| packet.no_checksum = true),
    ("no checksum, odd", V4_UDP, |packet| (packet.no_checksum, packet.payload) = (true, vec![7])),
    ("data behind the datagram", UDP_ONLY, |packet| packet.padding = vec![1; 3]),
];

#[test]
fn translated_packets_are_what_the_model_says() {
    if !is_root() {
        return;
    }
    let cases = with_router(|router| {
        router.load(&in_both(&WEB));
        let mut cases = 0;
        for flow in Flow::all() {
            for (name, applies, change) in TRANSLATED {
                let mut came = flow.came();
                if applies(&came) {
                    change(&mut came);
                    router.redirects(name, &flow, &came, &flow.goes(&came));
                    cases += 1;
                }
            }
        }
        assert_eq!(router.translated(), cases);
        cases
    });
    println!("{cases} packets translated");
}

#[test]
fn every_combination_of_lengths() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            for words in 0..=10 {
                for length in 0..4 {
                    let mut came = flow.came();
                    came.payload = vec![0xc3; length];
                    match flow.version {
                        Version::V4 => came.options = vec![1; words * 4],
                        Version::V6 => came.extensions = vec![extension(HOP_BY_HOP, words as u8)],
                    }
                    came.tcp.options = vec![1; words * 4];
                    let name = format!("{words} words of options, {length} bytes");
                    router.redirects(&name, &flow, &came, &flow.goes(&came));
                }
            }
        }
    });
}

/// Sets the first two bytes of an even payload so that the checksum of `packet` comes out as zero.
pub fn tune(packet: &Packet) -> Vec<u8> {
    let mut packet = Packet { payload: vec![0; 8], ..packet.clone() };
    let bytes = packet.bytes();
    let place = bytes.len() - if packet.protocol == TCP { 12 } else { 10 };
    packet.payload[..2].copy_from_slice(&bytes[place..place + 2]);
    packet.payload
}

pub fn transport_checksum(packet: &Packet) -> [u8; 2] {
    let bytes = packet.bytes();
    let place = bytes.len() - packet.payload.len() - if packet.protocol == TCP { 4 } else { 2 };
    [bytes[place], bytes[place + 1]]
}

#[test]
fn checksums_that_come_out_as_zero() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let zero = if flow.protocol == UDP { [0xff, 0xff] } else { [0, 0] };
            // What leaves has it.
            let mut came = flow.came();
            came.payload = tune(&flow.goes(&came));
            assert_eq!(transport_checksum(&flow.goes(&came)), zero);
            assert_ne!(transport_checksum(&came), zero);
            router.redirects("leaves with zero", &flow, &came, &flow.goes(&came));
            // What comes has it.
            let mut came = flow.came();
            came.payload = tune(&came);
            assert_eq!(transport_checksum(&came), zero);
            router.redirects("comes with zero", &flow, &came, &flow.goes(&came));
            // The IPv4 header that leaves, or comes, has it.
            if flow.version == Version::V4 {
                for leaves in [true, false] {
                    let mut came = Packet { number: 0, ..flow.came() };
                    let tuned = if leaves { flow.goes(&came) } else { came.clone() }.bytes();
                    came.number = u16::from_be_bytes([tuned[24], tuned[25]]);
                    let tuned = if leaves { flow.goes(&came) } else { came.clone() }.bytes();
                    assert_eq!(tuned[24..26], [0, 0]);
                    router.redirects("header with zero", &flow, &came, &flow.goes(&came));
                }
            }
        }
    });
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let came = flow.came();
            let (mut wrong, mut expected) = (came.bytes(), flow.goes(&came).bytes());
            for frame in [&mut wrong, &mut expected] {
                *frame.last_mut().unwrap() ^= 1;
            }
            let seen = router.try_frame(flow.role, flow.link, &wrong);
            assert_eq!((seen.outcome, seen.frame), (Outcome::Redirect, expected), "{flow:?}");
        }
    });
}

/// Which byte of a frame is the first behind IP's headers, without extension headers.
fn transport(packet: &Packet) -> usize {
    if packet.is_v4() { 34 + packet.options.len() } else { 54 }
}

/// A frame of `packet` with a change to its bytes; the IPv4 header's checksum is right.
fn with_bytes(packet: &Packet, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = packet.bytes();
    change(&mut frame);
    if packet.is_v4() && frame.len() >= 34 {
        repair_ipv4(&mut frame);
    }
    frame
}

fn set(frame: &mut [u8], place: usize, value: u16) {
    frame[place..place + 2].copy_from_slice(&value.to_be_bytes());
}

/// A frame with VLAN tags of these ethertypes.
fn tagged(packet: &Packet, tags: &[[u8; 2]]) -> Vec<u8> {
    let mut frame = packet.bytes();
    for [high, low] in tags {
        frame.splice(12..12, [*high, *low, 0, 100]);
    }
    frame
}

fn arp(packet: &Packet) -> Vec<u8> {
    let mut frame = packet.bytes()[..12].to_vec();
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.resize(60, 0);
    frame
}

fn icmp(packet: &Packet) -> Vec<u8> {
    let echo = vec![8, 0, 0, 0, 0, 1, 0, 1];
    let sum = checksum(&echo).to_be_bytes();
    let payload = [&echo[..2], &sum, &echo[4..]].concat();
    Packet { protocol: if packet.is_v4() { 1 } else { 58 }, payload, ..packet.clone() }.bytes()
}

type Make = fn(&Packet) -> Vec<u8>;

/// What passes as it came, and why.
#[rustfmt::skip]
const PASSED: &[(&str, Applies, Make, Passed)] = &[
    ("ARP", ANY, arp, Passed::NotIp),
    ("another ethertype", ANY, |packet| with_bytes(packet, |frame| set(frame, 12, 0x88cc)), Passed::NotIp),
    ("an 802.3 length", ANY, |packet| with_bytes(packet, |frame| set(frame, 12, 46)), Passed::NotIp),
    ("VLAN tag", ANY, |packet| tagged(packet, &[[0x81, 0x00]]), Passed::Vlan),
    ("service tag", ANY, |packet| tagged(packet, &[[0x88, 0xa8]]), Passed::Vlan),
    ("two tags", ANY, |packet| tagged(packet, &[[0x81, 0x00], [0x88, 0xa8]]), Passed::Vlan),
    ("two VLAN tags", ANY, |packet| tagged(packet, &[[0x81, 0x00], [0x81, 0x00]]), Passed::Vlan),
    ("broadcast", ANY, |packet| Packet { link_destination: [0xff; 6], ..packet.clone() }.bytes(), Passed::Group),
    ("multicast", ANY, |packet| Packet { link_destination: [1, 0, 0x5e, 0, 0, 1], ..packet.clone() }.bytes(), Passed::Group),
    ("IPv6 multicast", ANY, |packet| Packet { link_destination: [0x33, 0x33, 0, 0, 0, 1], ..packet.clone() }.bytes(), Passed::Group),
    ("echo request", ANY, icmp, Passed::Icmp),
    ("GRE", ANY, |packet| Packet { protocol: 47, ..packet.clone() }.bytes(), Passed::Protocol),
    ("ESP", ANY, |packet| Packet { protocol: 50, ..packet.clone() }.bytes(), Passed::Protocol),
    ("SCTP", ANY, |packet| Packet { protocol: 132, ..packet.clone() }.bytes(), Passed::Protocol),
    ("UDP-Lite", ANY, |packet| Packet { protocol: 136, payload: vec![7; 16], ..packet.clone() }.bytes(), Passed::Protocol),
    ("no next header", V6, |packet| Packet { protocol: 59, ..packet.clone() }.bytes(), Passed::Protocol),
    ("authentication", V4, |packet| Packet { protocol: 51, ..packet.clone() }.bytes(), Passed::Protocol),
    ("authentication", V6, |packet| Packet { extensions: vec![extension(AUTHENTICATION, 1)], ..packet.clone() }.bytes(), Passed::Extension),
    ("no hops left", REPLY, |packet| Packet { hops: 0, ..packet.clone() }.bytes(), Passed::Ttl),
    ("the last hop", REPLY, |packet| Packet { hops: 1, ..packet.clone() }.bytes(), Passed::Ttl),
    ("middle fragment", V4, |packet| Packet { fragment: 0x2000 | 100, ..packet.clone() }.bytes(), Passed::Fragment),
    ("last fragment", V4, |packet| Packet { fragment: 185, ..packet.clone() }.bytes(), Passed::Fragment),
    ("last fragment, far", V4, |packet| Packet { fragment: 0x1f00, ..packet.clone() }.bytes(), Passed::Fragment),
    ("middle fragment", V6, |packet| Packet { extensions: vec![fragment(800, true)], ..packet.clone() }.bytes(), Passed::Fragment),
    ("last fragment", V6, |packet| Packet { extensions: vec![fragment(1480, false)], ..packet.clone() }.bytes(), Passed::Fragment),
    ("last fragment behind options", V6, |packet| Packet { extensions: vec![extension(HOP_BY_HOP, 0), fragment(1480, false)], ..packet.clone() }.bytes(), Passed::Fragment),
    ("fragment of a fragment", V6, |packet| Packet { extensions: vec![fragment(0, true), fragment(0, true)], ..packet.clone() }.bytes(), Passed::Extension),
    ("routing on its way", V6, |packet| Packet { extensions: vec![routing(1)], ..packet.clone() }.bytes(), Passed::Extension),
    ("routing behind options", V6, |packet| Packet { extensions: vec![extension(DESTINATION, 0), routing(1)], ..packet.clone() }.bytes(), Passed::Extension),
    ("six extension headers", V6, |packet| Packet { extensions: vec![extension(DESTINATION, 0); 6], ..packet.clone() }.bytes(), Passed::Extension),
    ("IHL below 5", V4, |packet| with_bytes(packet, |frame| frame[14] = 0x44), Passed::Malformed),
    ("IHL 0", V4, |packet| { let mut frame = packet.bytes(); frame[14] = 0x40; frame }, Passed::Malformed),
    ("IHL beyond the packet", V4, |packet| { let mut frame = Packet { payload: vec![], ..packet.clone() }.bytes(); frame[14] = 0x4f; frame }, Passed::Malformed),
    ("version 6 in IPv4", V4, |packet| with_bytes(packet, |frame| frame[14] = 0x65), Passed::Malformed),
    ("version 4 in IPv6", V6, |packet| with_bytes(packet, |frame| frame[14] = 0x40), Passed::Malformed),
    ("longer than the frame", V4, |packet| with_bytes(packet, |frame| { let length = frame.len() as u16 - 13; set(frame, 16, length); }), Passed::Malformed),
    ("much longer than the frame", V4, |packet| with_bytes(packet, |frame| set(frame, 16, 0xffff)), Passed::Malformed),
    ("longer than the frame", V6, |packet| with_bytes(packet, |frame| { let length = frame.len() as u16 - 53; set(frame, 18, length); }), Passed::Malformed),
    ("much longer than the frame", V6, |packet| with_bytes(packet, |frame| set(frame, 18, 0xffff)), Passed::Malformed),
    ("jumbogram", V6, |packet| with_bytes(packet, |frame| set(frame, 18, 0)), Passed::Malformed),
    ("shorter than its header", V4, |packet| with_bytes(packet, |frame| set(frame, 16, 19)), Passed::Malformed),
    ("length 0", V4, |packet| with_bytes(packet, |frame| set(frame, 16, 0)), Passed::Malformed),
    ("ends within the ports", V4, |packet| with_bytes(packet, |frame| set(frame, 16, 23)), Passed::Malformed),
    ("ends within the ports", V6, |packet| with_bytes(packet, |frame| set(frame, 18, 3)), Passed::Malformed),
    ("extension beyond the packet", V6, |packet| { let mut frame = Packet { extensions: vec![extension(DESTINATION, 0)], ..packet.clone() }.bytes(); frame[55] = 200; frame }, Passed::Malformed),
    ("TCP header below 20", TCP_ONLY, |packet| with_bytes(packet, |frame| frame[transport(packet) + 12] = 0x40), Passed::Malformed),
    ("TCP header 0", TCP_ONLY, |packet| with_bytes(packet, |frame| frame[transport(packet) + 12] = 0), Passed::Malformed),
    ("TCP header beyond the packet", TCP_ONLY, |packet| with_bytes(packet, |frame| frame[transport(packet) + 12] = 0xf0), Passed::Malformed),
    ("UDP length below 8", UDP_ONLY, |packet| with_bytes(packet, |frame| set(frame, transport(packet) + 4, 7)), Passed::Malformed),
    ("UDP length 0", UDP_ONLY, |packet| with_bytes(packet, |frame| set(frame, transport(packet) + 4, 0)), Passed::Malformed),
    ("UDP length beyond the packet", UDP_ONLY, |packet| with_bytes(packet, |frame| { let length = (frame.len() - transport(packet)) as u16 + 1; set(frame, transport(packet) + 4, length); }), Passed::Malformed),
    ("UDP length into the padding", UDP_ONLY, |packet| { let padded = Packet { padding: vec![0; 8], ..packet.clone() }; with_bytes(&padded, |frame| { let length = (frame.len() - transport(packet)) as u16 - 4; set(frame, transport(packet) + 4, length); }) }, Passed::Malformed),
];

#[test]
fn what_is_not_translated_passes_as_it_came() {
    if !is_root() {
        return;
    }
    let cases = with_router(|router| {
        router.load(&in_both(&WEB));
        let mut cases = 0;
        for flow in Flow::all() {
            let came = flow.came();
            for (name, applies, make, reason) in PASSED {
                if applies(&came) {
                    router.refuses(name, &flow, &make(&came), Outcome::Pass(*reason));
                    cases += 1;
                }
            }
        }
        assert_eq!(router.translated(), 0);
        cases
    });
    println!("{cases} packets passed");
}

/// A datagram may end before its packet does: what is behind it is covered by no checksum.
#[test]
fn a_datagram_shorter_than_its_packet() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all().into_iter().filter(|flow| flow.protocol == UDP) {
            let came = flow.came();
            let lengthen = |packet: &Packet| {
                with_bytes(packet, |frame| {
                    frame.extend([1, 2, 3]);
                    let (place, more) = if packet.is_v4() { (16, 3) } else { (18, 3) };
                    let length = u16::from_be_bytes([frame[place], frame[place + 1]]) + more;
                    set(frame, place, length);
                })
            };
            let seen = router.try_frame(flow.role, flow.link, &lengthen(&came));
            assert_eq!(seen.outcome, Outcome::Redirect);
            assert_eq!(seen.frame, lengthen(&flow.goes(&came)));
        }
    });
}
