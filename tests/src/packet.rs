//! Packets as fields, and their bytes with every checksum computed in full. What a translated packet
//! must look like is the packet that came with some fields changed: nothing here knows how portfwd
//! does it.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
/// The first four bytes of the payload are its type, its code, and what its checksum replaces.
pub const ICMP: u8 = 1;
/// As [`ICMP`].
pub const ICMPV6: u8 = 58;
/// Bytes 6 and 7 of the payload are what its checksum replaces.
pub const UDP_LITE: u8 = 136;
/// As [`UDP_LITE`].
pub const DCCP: u8 = 33;

/// An IP packet in an Ethernet frame.
#[derive(Clone, Debug)]
pub struct Packet {
    pub link_destination: [u8; 6],
    pub link_source: [u8; 6],
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// TCP, UDP, or another one that has just a payload.
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub hops: u8,
    /// TOS byte or traffic class, ECN included.
    pub class: u8,
    /// IPv4 identification, or the lower 16 bits of the flow label.
    pub number: u16,
    /// IPv4 flags and fragment offset.
    pub fragment: u16,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: number, and a multiple of eight bytes of which the first is replaced
    /// by the number of the next.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub tcp: Tcp,
    /// UDP without a checksum.
    pub no_checksum: bool,
    pub payload: Vec<u8>,
    /// What Ethernet adds behind the packet.
    pub padding: Vec<u8>,
}

/// Where the IP header begins in a frame.
pub const ETHERNET: usize = 14;

/// What is TCP's own.
#[derive(Clone, Debug)]
pub struct Tcp {
    pub sequence: u32,
    pub acknowledgement: u32,
    /// FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128.
    pub flags: u8,
    pub urgent: u16,
    /// A multiple of four bytes.
    pub options: Vec<u8>,
}

impl Packet {
    pub fn new(protocol: u8, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            link_destination: [2, 0, 0, 0, 0, 1],
            link_source: [2, 0, 0, 0, 0, 2],
            source,
            destination,
            protocol,
            hops: 64,
            class: 0,
            number: 0x1234,
            fragment: 0x4000,
            options: Vec::new(),
            extensions: Vec::new(),
            tcp: Tcp {
                sequence: 0x0102_0304,
                acknowledgement: 0x0506_0708,
                flags: 0x18,
                urgent: 0,
                options: Vec::new(),
            },
            no_checksum: false,
            payload: b"payload".to_vec(),
            padding: Vec::new(),
        }
    }

    pub fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// An ICMP error, of either family, about a packet. `rest` is the second half of its header.
    pub fn error(
        source: IpAddr,
        destination: IpAddr,
        kind: [u8; 2],
        rest: [u8; 4],
        quoted: &[u8],
    ) -> Self {
        let [source, destination] = [source, destination].map(|ip| SocketAddr::new(ip, 0));
        let protocol = if source.is_ipv4() { ICMP } else { ICMPV6 };
        let payload = [&kind, &[0; 2], &rest[..], quoted].concat();
        Self { payload, ..Self::new(protocol, source, destination) }
    }

    /// Bytes of the IP packet.
    pub fn length(&self) -> usize {
        self.bytes().len() - 14 - self.padding.len()
    }

    /// Where the transport header begins in the frame.
    pub fn transport_at(&self) -> usize {
        ETHERNET + self.length() - self.transport().len()
    }

    /// The frame.
    ///
    /// # Panics
    ///
    /// The addresses are of two families.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = [self.link_destination, self.link_source].concat();
        let transport = self.transport();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let words = 5 + self.options.len() / 4;
                let length = (words * 4 + transport.len()) as u16;
                let mut header = vec![0x40 | words as u8, self.class];
                header.extend(length.to_be_bytes());
                header.extend(self.number.to_be_bytes());
                header.extend(self.fragment.to_be_bytes());
                header.extend([self.hops, self.protocol, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend(&self.options);
                let sum = checksum(&header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend([0x08, 0x00]);
                frame.extend(header);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let numbers = self.extensions.iter().map(|(number, _)| *number);
                let mut numbers = numbers.chain([self.protocol]);
                let first = numbers.next().unwrap();
                let extensions: Vec<u8> = (self.extensions.iter().zip(numbers))
                    .flat_map(|((_, bytes), next)| [&[next], &bytes[1..]].concat())
                    .collect();
                let length = (extensions.len() + transport.len()) as u16;
                frame.extend([0x86, 0xdd, 0x60 | self.class >> 4, self.class << 4]);
                frame.extend(self.number.to_be_bytes());
                frame.extend(length.to_be_bytes());
                frame.extend([first, self.hops]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                frame.extend(extensions);
            }
            _ => panic!("{} and {} are of two families", self.source, self.destination),
        }
        [frame, transport, self.padding.clone()].concat()
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if matches!(self.protocol, TCP | UDP) {
            bytes.extend(self.source.port().to_be_bytes());
            bytes.extend(self.destination.port().to_be_bytes());
        }
        let place = match self.protocol {
            TCP => {
                let words = 5 + self.tcp.options.len() / 4;
                bytes.extend(self.tcp.sequence.to_be_bytes());
                bytes.extend(self.tcp.acknowledgement.to_be_bytes());
                bytes.extend([(words as u8) << 4, self.tcp.flags, 2, 0, 0, 0]);
                bytes.extend(self.tcp.urgent.to_be_bytes());
                bytes.extend(&self.tcp.options);
                16
            }
            UDP => {
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                6
            }
            ICMP | ICMPV6 if self.payload.len() >= 4 => 2,
            UDP_LITE | DCCP if self.payload.len() >= 8 => 6,
            _ => return self.payload.clone(),
        };
        bytes.extend(&self.payload);
        if self.protocol == UDP && self.no_checksum {
            return bytes;
        }
        bytes[place..place + 2].fill(0);
        let mut covered = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => [a.octets(), b.octets()].concat(),
            (IpAddr::V6(a), IpAddr::V6(b)) => [a.octets(), b.octets()].concat(),
            _ => panic!("{} and {} are of two families", self.source, self.destination),
        };
        covered.extend([0, self.protocol]);
        covered.extend((bytes.len() as u16).to_be_bytes());
        if self.protocol == ICMP {
            covered.clear();
        }
        covered.extend(&bytes);
        let mut sum = checksum(&covered);
        if matches!(self.protocol, UDP | UDP_LITE) && sum == 0 {
            sum = 0xffff;
        }
        bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }
}

/// The ends of a TCP or UDP packet whose transport header begins at `transport` in the frame; none if
/// the frame is too short.
pub fn ends(frame: &[u8], transport: usize) -> Option<(SocketAddr, SocketAddr)> {
    let [source, destination] = addresses_at(frame).map(|at| {
        if at.len() == 4 {
            frame.get(at)?.first_chunk::<4>().map(|bytes| IpAddr::from(*bytes))
        } else {
            frame.get(at)?.first_chunk::<16>().map(|bytes| IpAddr::from(*bytes))
        }
    });
    let port = |at: usize| Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?));
    Some((
        SocketAddr::new(source?, port(transport)?),
        SocketAddr::new(destination?, port(transport + 2)?),
    ))
}

/// Changes the ends of a TCP or UDP packet that [has](ends) others. A checksum that was wrong stays
/// wrong by as much.
pub fn set_ends(frame: &mut [u8], protocol: u8, transport: usize, ends: (SocketAddr, SocketAddr)) {
    let is_v4 = ends.0.is_ipv4();
    let is_udp = protocol == UDP;
    let sum = transport + if is_udp { 6 } else { 16 };
    let has_sum = !(is_udp && frame[sum..sum + 2] == [0, 0]);
    let [source, destination] = addresses_at(frame);
    for (at, address, port_at, port) in [
        (source.start, ends.0.ip(), transport, ends.0.port()),
        (destination.start, ends.1.ip(), transport + 2, ends.1.port()),
    ] {
        let address = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let port = port.to_be_bytes();
        let addresses = (at..).step_by(2).zip(address.chunks(2));
        let pairs = addresses.chain([(port_at, &port[..])]);
        for (at, new) in pairs {
            let old = [frame[at], frame[at + 1]];
            frame[at..at + 2].copy_from_slice(new);
            if is_v4 && at < transport {
                amend(frame, ETHERNET + 10, old, new);
            }
            if has_sum {
                amend(frame, sum, old, new);
            }
        }
    }
    if is_udp && has_sum && frame[sum..sum + 2] == [0, 0] {
        frame[sum..sum + 2].fill(0xff);
    }
}

/// Changes the ends of the packet that an ICMP error quotes, if they are as expected, and so whom the
/// error goes to. Its header begins at `icmp` in the frame, the quoted transport header `transport`
/// behind that. As in [`set_ends`], what was wrong stays wrong.
pub fn set_quoted_ends(
    frame: &mut [u8],
    [icmp, transport]: [usize; 2],
    protocol: u8,
    expected: (SocketAddr, SocketAddr),
    ends: (SocketAddr, SocketAddr),
) {
    let quote = icmp + ICMP_HEADER;
    let Some(quoted) = frame.get(quote..) else { return };
    let mut quoted = [&frame[..ETHERNET], quoted].concat();
    let transport = transport - ICMP_HEADER + ETHERNET;
    if self::ends(&quoted, transport) != Some(expected) {
        return;
    }
    set_ends(&mut quoted, protocol, transport, ends);
    let (to, sum) = match ends.0.ip() {
        IpAddr::V4(address) => (address.octets().to_vec(), ETHERNET + 10),
        IpAddr::V6(address) => (address.octets().to_vec(), icmp + 2),
    };
    let [_, destination] = addresses_at(frame);
    replace(frame, destination.start, &to, sum);
    replace(frame, quote, &quoted[ETHERNET..], icmp + 2);
}

const ICMP_HEADER: usize = 8;

/// Puts other bytes where a checksum is over them.
fn replace(frame: &mut [u8], at: usize, new: &[u8], sum: usize) {
    for (at, new) in (at..).step_by(2).zip(new.chunks(2)) {
        if let [old, more] = frame[at..at + new.len()] {
            amend(frame, sum, [old, more], new);
        }
        frame[at..at + new.len()].copy_from_slice(new);
    }
}

/// Where the addresses are: source, destination.
fn addresses_at(frame: &[u8]) -> [Range<usize>; 2] {
    let (first, length) = if frame[12..ETHERNET] == [0x08, 0x00] { (12, 4) } else { (8, 16) };
    let first = ETHERNET + first;
    [first..first + length, first + length..first + 2 * length]
}

/// RFC 1624: what two bytes that a checksum is over became.
fn amend(frame: &mut [u8], at: usize, old: [u8; 2], new: &[u8]) {
    let sum = [!frame[at], !frame[at + 1], !old[0], !old[1], new[0], new[1]];
    frame[at..at + 2].copy_from_slice(&checksum(&sum).to_be_bytes());
}

/// RFC 1071, word by word.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    !(sum as u16)
}

/// Repairs the checksum of an IPv4 header that was changed.
pub fn repair_ipv4(frame: &mut [u8]) {
    let end = 14 + usize::from(frame[14] & 0xf) * 4;
    frame[24..26].fill(0);
    let sum = checksum(&frame[14..end.min(frame.len())]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

/// The fragments of the packet in a frame without options or extension headers, each but the last with
/// `size` bytes.
pub fn fragments(frame: &[u8], identification: u16, size: usize) -> Vec<Vec<u8>> {
    let is_v4 = frame[12] == 8;
    let (head, payload) = frame.split_at(if is_v4 { 34 } else { 54 });
    let parts = payload.chunks(size).enumerate().map(|(number, part)| {
        let mut fragment = head.to_vec();
        let offset = (number * size) as u16;
        let more = offset as usize + part.len() < payload.len();
        if is_v4 {
            fragment[16..18].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
            fragment[18..20].copy_from_slice(&identification.to_be_bytes());
            let place = (offset / 8) | if more { 0x2000 } else { 0 };
            fragment[20..22].copy_from_slice(&place.to_be_bytes());
            repair_ipv4(&mut fragment);
        } else {
            fragment[18..20].copy_from_slice(&(8 + part.len() as u16).to_be_bytes());
            let next = std::mem::replace(&mut fragment[20], 44);
            fragment.extend([next, 0]);
            fragment.extend((offset | u16::from(more)).to_be_bytes());
            fragment.extend(u32::from(identification).to_be_bytes());
        }
        [&fragment, part].concat()
    });
    parts.collect()
}

/// Puts fragments together that came in order, one packet's after the other's, and whose headers agree.
/// All else stays as it is.
pub fn reassembled(frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let (mut packets, mut open) = (Vec::new(), Vec::new());
    for frame in frames {
        let Some(fragment) = Fragment::of(&frame) else {
            packets.push(frame);
            continue;
        };
        let is_last = !fragment.has_more;
        open.push((fragment, frame));
        if is_last && let Some(packet) = whole(&open) {
            packets.push(packet);
            open.clear();
        }
    }
    packets.extend(open.into_iter().map(|(_, frame)| frame));
    packets
}

/// What stands in the headers of a fragment.
struct Fragment {
    /// What all fragments of a packet have in common.
    common: Vec<u8>,
    offset: usize,
    has_more: bool,
    /// Where its part of the payload begins in the frame.
    payload_at: usize,
}

impl Fragment {
    /// If it is one, and its header is valid.
    fn of(frame: &[u8]) -> Option<Self> {
        crate::wire::verify(frame).ok()?.filter(|packet| packet.fragment)?;
        let is_v4 = frame[12] == 8;
        // What differs: lengths, places, and IPv4's checksum.
        let (place, common, payload_at) = if is_v4 {
            let common = [&frame[..16], &frame[18..20], &frame[22..24], &frame[26..34]];
            (20, common, ETHERNET + usize::from(frame[ETHERNET] & 0xf) * 4)
        } else if frame[20] == 44 {
            (56, [&frame[..18], &frame[20..55], &frame[58..62], &[]], 62)
        } else {
            return None;
        };
        let place = u16::from_be_bytes([frame[place], frame[place + 1]]);
        let (offset, has_more) = match is_v4 {
            true => (usize::from(place & 0x1fff) * 8, place & 0x2000 != 0),
            false => (usize::from(place & !7), place & 1 != 0),
        };
        Some(Self { common: common.concat(), offset, has_more, payload_at })
    }
}

/// The frame of the packet of which these are all fragments.
fn whole(fragments: &[(Fragment, Vec<u8>)]) -> Option<Vec<u8>> {
    let (first, frame) = fragments.first()?;
    let mut payload: Vec<u8> = Vec::new();
    for (fragment, frame) in fragments {
        if fragment.offset != payload.len() || fragment.common != first.common {
            return None;
        }
        payload.extend(&frame[fragment.payload_at..]);
    }
    let mut packet = frame[..first.payload_at].to_vec();
    if packet[12] == 8 {
        let length = (first.payload_at - ETHERNET + payload.len()) as u16;
        packet[16..18].copy_from_slice(&length.to_be_bytes());
        packet[20] &= !0x20;
        repair_ipv4(&mut packet);
    } else {
        packet[20] = packet[54];
        packet.truncate(54);
        packet[18..20].copy_from_slice(&(payload.len() as u16).to_be_bytes());
    }
    packet.extend(payload);
    Some(packet)
}

#[test]
fn fragments_are_reassembled() {
    for (from, to) in [("10.0.0.1:5000", "10.0.0.2:80"), ("[fd00::1]:5000", "[fd00::2]:80")] {
        let ends = [from, to].map(|text| text.parse().unwrap());
        let packet =
            Packet { payload: vec![7; 100], fragment: 0, ..Packet::new(UDP, ends[0], ends[1]) };
        let frame = packet.bytes();
        let parts = fragments(&frame, 0x1234, 32);
        assert_eq!(parts.len(), 4);
        assert_eq!(reassembled(parts.clone()), std::slice::from_ref(&frame));
        assert_eq!(reassembled([parts.clone(), parts.clone()].concat()), [&frame[..], &frame]);
        // One that is lost, or has another number of hops.
        assert_eq!(reassembled(parts[1..].to_vec()), parts[1..]);
        let mut others = parts.clone();
        others[1] = fragments(&Packet { hops: 9, ..packet }.bytes(), 0x1234, 32).remove(1);
        assert_eq!(reassembled(others.clone()), others);
    }
}

#[test]
fn packets_are_what_another_library_makes_of_the_same_fields() {
    use etherparse::PacketBuilder;
    for (from, to) in [("10.0.0.1:5000", "10.0.0.2:80"), ("[fd00::1]:5000", "[fd00::2]:80")] {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        for protocol in [TCP, UDP] {
            let packet = Packet::new(protocol, from, to);
            let link = PacketBuilder::ethernet2(packet.link_source, packet.link_destination);
            let ip = match (from.ip(), to.ip()) {
                (IpAddr::V4(from), IpAddr::V4(to)) => link.ip(etherparse::IpHeaders::Ipv4(
                    etherparse::Ipv4Header {
                        identification: packet.number,
                        dont_fragment: true,
                        ..etherparse::Ipv4Header::new(
                            0,
                            64,
                            etherparse::IpNumber(protocol),
                            from.octets(),
                            to.octets(),
                        )
                        .unwrap()
                    },
                    Default::default(),
                )),
                (IpAddr::V6(from), IpAddr::V6(to)) => link.ip(etherparse::IpHeaders::Ipv6(
                    etherparse::Ipv6Header {
                        flow_label: etherparse::Ipv6FlowLabel::try_new(packet.number.into())
                            .unwrap(),
                        hop_limit: 64,
                        source: from.octets(),
                        destination: to.octets(),
                        ..Default::default()
                    },
                    Default::default(),
                )),
                _ => unreachable!("one family"),
            };
            let mut bytes = Vec::new();
            if protocol == TCP {
                let tcp = ip.tcp(from.port(), to.port(), 0x0102_0304, 0x200);
                tcp.ack(0x0506_0708).psh().write(&mut bytes, &packet.payload).unwrap();
            } else {
                ip.udp(from.port(), to.port()).write(&mut bytes, &packet.payload).unwrap();
            }
            assert_eq!(packet.bytes(), bytes);
        }
    }
}

#[test]
fn an_error_with_changed_ends_is_one_about_a_packet_that_had_them() {
    for [from, to, other, another] in [
        ["10.0.0.1:5000", "10.0.0.2:80", "10.0.0.3:1", "10.0.0.4:7"],
        ["[fd00::1]:5000", "[fd00::2]:80", "[fd00::3]:1", "[fd00::4]:7"],
    ] {
        let ends = |from: &str, to: &str| (from.parse().unwrap(), to.parse().unwrap());
        for (protocol, length) in [(TCP, 7), (UDP, 8)] {
            let error = |(from, to): (SocketAddr, SocketAddr)| {
                let payload = vec![1; length];
                let quoted = Packet { payload, ..Packet::new(protocol, from, to) };
                let transport = quoted.transport_at() - ETHERNET + ICMP_HEADER;
                let source = if from.is_ipv4() { "10.0.0.9" } else { "fd00::9" };
                let source = source.parse().unwrap();
                let quoted = &quoted.bytes()[ETHERNET..];
                let error = Packet::error(source, from.ip(), [3, 1], [0; 4], quoted);
                let padding = vec![7; 5];
                let places = [error.transport_at(), transport];
                (places, Packet { padding, ..error }.bytes())
            };
            let (was, is) = (ends(from, to), ends(other, another));
            let (places, mut frame) = error(was);
            set_quoted_ends(&mut frame, places, protocol, is, was);
            assert_eq!(frame, error(was).1);
            set_quoted_ends(&mut frame, places, protocol, was, is);
            assert_eq!(frame, error(is).1);
        }
    }
}

#[test]
fn changed_ends_have_the_checksums_of_new_packets() {
    for (from, to, others) in [
        ("10.0.0.1:5000", "10.0.0.2:80", ["192.168.1.1:1", "0.0.0.0:65535"]),
        ("[fd00::1]:5000", "[fd00::2]:80", ["[::]:1", "[2001:db8::7]:65535"]),
    ] {
        let parse = |text: &str| -> SocketAddr { text.parse().unwrap() };
        for protocol in [TCP, UDP] {
            let packet = Packet::new(protocol, parse(from), parse(to));
            let [source, destination] = others.map(parse);
            let (mut frame, transport) = (packet.bytes(), packet.transport_at());
            assert_eq!(ends(&frame, transport), Some((packet.source, packet.destination)));
            set_ends(&mut frame, protocol, transport, (source, destination));
            assert_eq!(frame, Packet { source, destination, ..packet }.bytes());
        }
    }
}
