//! Packets as fields, and their bytes with every checksum computed in full. What a translated packet
//! must look like is the packet that came with some fields changed: nothing here knows how portfwd
//! does it.

use std::net::{IpAddr, SocketAddr};

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

/// What is TCP's own.
#[derive(Clone, Debug)]
pub struct Tcp {
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
            tcp: Tcp { flags: 0x18, urgent: 0, options: Vec::new() },
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

    /// The frame.
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
                bytes.extend([1, 2, 3, 4, 5, 6, 7, 8, (words as u8) << 4, self.tcp.flags, 2, 0]);
                bytes.extend([0, 0]);
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
