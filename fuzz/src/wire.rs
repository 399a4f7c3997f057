//! Frames, read and made without the code that is tested.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const DCCP: u8 = 33;
pub const ICMPV6: u8 = 58;
pub const UDP_LITE: u8 = 136;

/// TCP flags.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// Bytes of an Ethernet header.
pub const LINK: usize = 14;

/// Between whom a packet goes. Ports are 0 where there are none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ends {
    pub protocol: u8,
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

impl Ends {
    pub fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source, ..self }
    }
}

/// Where the parts of an IP packet stand, in a frame or in what an ICMP error quotes.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub is_v4: bool,
    pub start: usize,
    pub protocol: u8,
    /// What it carries, as far as it is there.
    pub payload: usize,
    pub end: usize,
    /// In bytes.
    pub offset: u16,
    pub more: bool,
    pub identification: u32,
}

impl Packet {
    /// The packet in a frame.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let length = |at: usize| Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?));
        let end = match length(12)? {
            0x0800 => LINK + usize::from(length(16)?),
            0x86dd => LINK + 40 + usize::from(length(18)?),
            _ => return None,
        };
        Self::read(frame, LINK, end)
    }

    fn read(bytes: &[u8], start: usize, end: usize) -> Option<Self> {
        let packet = bytes.get(start..end)?;
        let is_v4 = packet.first()? >> 4 == 4;
        packet.get(..if is_v4 { 20 } else { 40 })?;
        let mut found = Self {
            is_v4,
            start,
            protocol: *packet.get(if is_v4 { 9 } else { 6 })?,
            payload: start + if is_v4 { usize::from(packet[0] & 15) * 4 } else { 40 },
            end,
            offset: 0,
            more: false,
            identification: 0,
        };
        if is_v4 {
            let place = u16::from_be_bytes([packet[6], packet[7]]);
            found.offset = place << 3;
            found.more = place & 0x2000 != 0;
            found.identification = u16::from_be_bytes([packet[4], packet[5]]).into();
        } else if packet[0] >> 4 != 6 {
            return None;
        }
        while !is_v4 && found.offset == 0 && matches!(found.protocol, 0 | 43 | 44 | 60) {
            let header: [u8; 8] = *bytes.get(found.payload..end)?.first_chunk()?;
            if found.protocol == 44 {
                let place = u16::from_be_bytes([header[2], header[3]]);
                (found.offset, found.more) = (place & !7, place & 1 != 0);
                found.identification = u32::from_be_bytes(*header.last_chunk()?);
                found.payload += 8;
            } else {
                found.payload += 8 + 8 * usize::from(header[1]);
            }
            found.protocol = header[0];
        }
        (found.payload <= end).then_some(found)
    }

    /// What this quotes, if it is an ICMP error.
    pub fn quoted(&self, bytes: &[u8]) -> Option<Self> {
        let kind = *bytes.get(self.payload..self.end)?.first()?;
        let is_error = match self.protocol {
            ICMP => self.is_v4 && matches!(kind, 3 | 4 | 11 | 12),
            ICMPV6 => !self.is_v4 && matches!(kind, 1..=4),
            _ => false,
        };
        if !is_error || self.is_fragment() {
            return None;
        }
        Self::read(bytes, self.payload + 8, self.end)
    }

    pub fn is_fragment(&self) -> bool {
        self.more || self.offset != 0
    }

    /// Bytes of the whole packet.
    pub fn length(&self) -> usize {
        self.end - self.start
    }

    pub fn hops(&self) -> usize {
        self.start + if self.is_v4 { 8 } else { 7 }
    }

    pub fn source(&self) -> Range<usize> {
        let (at, len) = if self.is_v4 { (12, 4) } else { (8, 16) };
        self.start + at..self.start + at + len
    }

    pub fn destination(&self) -> Range<usize> {
        let source = self.source();
        source.end..source.end + source.len()
    }

    pub fn addresses(&self) -> Range<usize> {
        self.source().start..self.destination().end
    }

    /// The header, in IPv4, whose checksum covers it.
    pub fn header(&self) -> Option<Range<usize>> {
        self.is_v4.then_some(self.start..self.payload)
    }

    /// The ports, if the protocol has some that rules look at.
    pub fn ports(&self) -> Option<Range<usize>> {
        let is_there = self.offset == 0 && self.payload + 4 <= self.end;
        (is_there && matches!(self.protocol, TCP | UDP)).then_some(self.payload..self.payload + 4)
    }

    /// The checksum that covers the addresses too, if it is there.
    pub fn checksum(&self) -> Option<Range<usize>> {
        let at = match self.protocol {
            TCP => 16,
            UDP | UDP_LITE | DCCP => 6,
            ICMPV6 => 2,
            _ => return None,
        };
        let at = self.payload + at;
        (self.offset == 0 && at + 2 <= self.end).then_some(at..at + 2)
    }

    pub fn ends(&self, bytes: &[u8]) -> Ends {
        let ports = self.ports().map_or([0; 4], |place| *bytes[place].first_chunk().unwrap());
        let end = |place: Range<usize>, high: u8, low: u8| {
            let address = if self.is_v4 {
                IpAddr::V4(Ipv4Addr::from(*bytes[place].first_chunk::<4>().unwrap()))
            } else {
                IpAddr::V6(Ipv6Addr::from(*bytes[place].first_chunk::<16>().unwrap()))
            };
            SocketAddr::new(address, u16::from_be_bytes([high, low]))
        };
        let [a, b, c, d] = ports;
        Ends {
            protocol: self.protocol,
            source: end(self.source(), a, b),
            destination: end(self.destination(), c, d),
        }
    }
}

/// The sum of 16-bit words in ones' complement, of which 0xffff is 0 too.
pub fn sum<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u16 {
    let words = parts.into_iter().flat_map(|part| part.chunks(2));
    let word = |word: &[u8]| u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0));
    (words.map(word).sum::<u64>() % 0xffff) as u16
}

/// The checksum with which a sum becomes zero.
fn checksum(sum: u16) -> [u8; 2] {
    if sum == 0 { [0; 2] } else { (!sum).to_be_bytes() }
}

/// What is in a packet beside its ends.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    pub hops: u8,
    /// Of TCP.
    pub flags: u8,
    pub numbers: [u32; 2],
    pub payload: &'a [u8],
}

/// An IP packet with the right checksums: TCP, or UDP.
pub fn packet(ends: &Ends, content: &Content) -> Vec<u8> {
    let Content { hops, flags, numbers: [sequence, acknowledges], payload } = content;
    let mut segment = Vec::new();
    segment.extend(ends.source.port().to_be_bytes());
    segment.extend(ends.destination.port().to_be_bytes());
    if ends.protocol == TCP {
        segment.extend(sequence.to_be_bytes());
        segment.extend(acknowledges.to_be_bytes());
        segment.extend([0x50, *flags, 2, 0, 0, 0, 0, 0]);
    } else {
        segment.extend((8 + payload.len() as u16).to_be_bytes());
        segment.extend([0; 2]);
    }
    segment.extend(*payload);
    ip(ends, *hops, segment)
}

/// An ICMP error with the right checksums.
pub fn error(
    from: IpAddr,
    to: IpAddr,
    hops: u8,
    kind: [u8; 2],
    rest: [u8; 4],
    quoted: &[u8],
) -> Vec<u8> {
    let protocol = if from.is_ipv4() { ICMP } else { ICMPV6 };
    let mut message = vec![kind[0], kind[1], 0, 0];
    message.extend(rest);
    message.extend(quoted);
    let ends =
        Ends { protocol, source: SocketAddr::new(from, 0), destination: SocketAddr::new(to, 0) };
    ip(&ends, hops, message)
}

/// An IP packet around what it carries, whose checksum it gets right.
fn ip(ends: &Ends, hops: u8, mut segment: Vec<u8>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let length = segment.len() as u16;
    match (ends.source.ip(), ends.destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            bytes.extend([0x45, 0]);
            bytes.extend((20 + length).to_be_bytes());
            bytes.extend([0, 0, 0x40, 0, hops, ends.protocol, 0, 0]);
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
            let sum = checksum(sum([&bytes[..]]));
            bytes[10..12].copy_from_slice(&sum);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend(length.to_be_bytes());
            bytes.extend([ends.protocol, hops]);
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
        }
        _ => panic!("{ends:?} are of two families"),
    }
    let at = match ends.protocol {
        TCP => 16,
        UDP => 6,
        _ => 2,
    };
    let addresses = if ends.source.is_ipv4() { 12 } else { 8 };
    let pseudo = [&[0, ends.protocol][..], &length.to_be_bytes(), &bytes[addresses..]];
    let pseudo = if ends.protocol == ICMP { &[][..] } else { &pseudo[..] };
    let mut sum = checksum(sum(pseudo.iter().copied().chain([&segment[..]])));
    if ends.protocol == UDP && sum == [0, 0] {
        sum = [0xff; 2];
    }
    segment[at..at + 2].copy_from_slice(&sum);
    bytes.extend(segment);
    bytes
}

/// The fragments of an IP packet, each but the last with `size` bytes of what it carries.
pub fn fragments(packet: &[u8], identification: u16, size: usize) -> Vec<Vec<u8>> {
    let is_v4 = packet[0] >> 4 == 4;
    let (head, payload) = packet.split_at(if is_v4 { 20 } else { 40 });
    let count = payload.len().div_ceil(size);
    let cut = |(number, part): (usize, &[u8])| {
        let mut bytes = head.to_vec();
        let (offset, more) = ((number * size) as u16, number + 1 < count);
        if is_v4 {
            bytes[2..4].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
            bytes[4..6].copy_from_slice(&identification.to_be_bytes());
            let place = (offset / 8) | if more { 0x2000 } else { 0 };
            bytes[6..8].copy_from_slice(&place.to_be_bytes());
            bytes[10..12].fill(0);
            let sum = checksum(sum([&bytes[..]]));
            bytes[10..12].copy_from_slice(&sum);
        } else {
            bytes[4..6].copy_from_slice(&(8 + part.len() as u16).to_be_bytes());
            let [high, low] = (offset | u16::from(more)).to_be_bytes();
            let [a, b] = identification.to_be_bytes();
            bytes.extend([bytes[6], 0, high, low, 0, 0, a, b]);
            bytes[6] = 44;
        }
        bytes.extend(part);
        bytes
    };
    payload.chunks(size).enumerate().map(cut).collect()
}

/// A frame around an IP packet.
pub fn frame(packet: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    bytes.extend(if packet[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] });
    bytes.extend(packet);
    bytes
}
