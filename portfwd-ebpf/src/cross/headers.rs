//! The headers of the other address family (RFC 7915).

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::answer::Answer;
use crate::checksum::{Change, Checksum};
use crate::icmp::{Icmp, IcmpHdr};
use crate::packet::{Header, ICMP, ICMPV6};
use crate::path::{Kernel, Verdict, count, drop_counted};
use crate::table::{Address, Direction, Dropped, Jiffies, LinkAddresses, Size};

/// Where the headers are made that a packet gets. It belongs to one run of a program, like
/// [`Bench`](crate::flow::Bench).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Conversion {
    /// All from the end of the link header to the transport header, or to that of what an ICMP error quotes.
    head: [u8; 88],
    /// The rule's row in `COUNTERS`.
    pub(super) counter: u32,
    /// 1 if the link addresses are to be set.
    pub(super) routed: u32,
    pub(super) link: LinkAddresses,
    /// [`Direction`].
    pub(super) direction: u32,
    /// Of an ICMP error: what changes in its checksum by the addresses that it covers; a [`Change`].
    pub(super) pseudo: u32,
    padding: u32,
    pub(super) size: Size,
    pub(super) now: Jiffies,
    /// To the sender of one that is dropped.
    pub answer: Answer,
}

/// Bytes of the headers up to the transport header of what comes with addresses of `N` bytes: the IP header, and
/// of an `ERROR` the ICMP header and the IP header that it quotes.
pub const fn headers<const N: usize, const ERROR: bool>() -> usize {
    let ip = if N == 4 { Ipv4Hdr::LEN } else { Ipv6Hdr::LEN };
    if ERROR { ip + size_of::<IcmpHdr>() + ip } else { ip }
}

impl Conversion {
    // SAFETY: integers and arrays of them.
    pub const EMPTY: Self = unsafe { core::mem::zeroed() };

    /// The first `L` bytes of the headers.
    #[inline(always)]
    pub fn head<const L: usize>(&self) -> &[u8; L] {
        const { assert!(L <= 88) };
        // SAFETY: in bounds, of bytes.
        unsafe { &*(&raw const self.head).cast() }
    }

    /// The link addresses that it leaves with, if they are known.
    #[inline(always)]
    pub fn link(&self) -> Option<&LinkAddresses> {
        (self.routed != 0).then_some(&self.link)
    }

    /// Counts the packet, which has its headers, or could not be given them.
    #[inline(always)]
    pub fn done<K: Kernel>(&self, kernel: &K, verdict: Verdict, converted: bool) -> Verdict {
        if !converted {
            return drop_counted(kernel, self.counter, Dropped::NoHeadroom);
        }
        let direction = if self.direction == 0 { Direction::Forward } else { Direction::Reply };
        count(kernel, self.counter, direction, self.size, self.now, verdict);
        verdict
    }

    /// A header that stands `PLACE` bytes from the start.
    #[inline(always)]
    pub(super) fn part<const PLACE: usize, T: Header>(&mut self) -> &mut T {
        let () = T::UNALIGNED;
        const { assert!(PLACE + size_of::<T>() <= 88) };
        // SAFETY: in bounds, valid for any bytes.
        unsafe { &mut *(&raw mut self.head).cast::<u8>().add(PLACE).cast() }
    }

    /// Makes the header at `PLACE` one of the other family than `N`'s.
    #[inline(always)]
    pub(super) fn write<const PLACE: usize, const N: usize>(&mut self, fields: &Fields<'_>) {
        let Fields { class, protocol, hops, len, identification, source, destination } = fields;
        if N == 4 {
            let ip: &mut Ipv6Hdr = self.part::<PLACE, _>();
            ip.vcf = [0x60 | class >> 4, class << 4, 0, 0];
            ip.payload_len = len.to_be_bytes();
            (ip.next_hdr, ip.hop_limit) = (*protocol, *hops);
            (ip.src_addr, ip.dst_addr) = (source.0, destination.0);
        } else {
            let length = len.wrapping_add(Ipv4Hdr::LEN as u16).to_be_bytes();
            let frags = if *identification == 0 { [0x40, 0] } else { [0; 2] };
            let id = identification.to_be_bytes();
            let [source, destination] = [source.unmapped(), destination.unmapped()];
            let sum = Change::default()
                .word([0x45, *class])
                .word(length)
                .word(id)
                .word(frags)
                .word([*hops, *protocol])
                .words(&source)
                .words(&destination);
            let ip: &mut Ipv4Hdr = self.part::<PLACE, _>();
            (ip.vihl, ip.tos, ip.tot_len) = (0x45, *class, length);
            (ip.id, ip.frags, ip.ttl, ip.proto) = (id, frags, *hops, *protocol);
            ip.check = Checksum::EMPTY.update(sum).0;
            (ip.src_addr, ip.dst_addr) = (source.0, destination.0);
        }
    }
}

/// What headers of both families say.
pub(super) struct Fields<'a> {
    /// Type of service, traffic class.
    pub(super) class: u8,
    /// IP protocol number.
    pub(super) protocol: u8,
    pub(super) hops: u8,
    /// Bytes behind the header.
    pub(super) len: u16,
    /// IPv4's; 0 if it must not be fragmented.
    pub(super) identification: u16,
    pub(super) source: &'a Address<16>,
    pub(super) destination: &'a Address<16>,
}

/// An IP header, of which the other family's is made.
pub trait Crosses<const N: usize>: Icmp<N> {
    /// IP protocol number of the other family's ICMP.
    const OTHERS_ICMP: u8;
    /// The packet with this header and nothing between it and the transport header.
    fn is_plain(&self, protocol: u8) -> bool;
    /// Type of service, traffic class.
    fn class_byte(&self) -> u8;
    /// Bytes that an IP packet of this many has in the other family.
    fn others_length(length: u16) -> u16;
    /// Bytes that an IP packet has here of this many in the other family.
    fn length_of_others(length: u32) -> u32;
    /// [`Ip::class`] of the other family's header.
    fn others_class(&self) -> [u8; 4];
    /// Whether the other family's packet of this many bytes must not be fragmented.
    fn others_is_whole(&self, length: u16) -> bool;
    /// The other family's error for one of this, with the second half of the ICMP header (RFC 7915,
    /// sections 4.2 and 5.2).
    fn others_error(kind: [u8; 2], rest: [u8; 4]) -> Option<([u8; 2], [u8; 4])>;
    /// What an ICMP checksum covers of the header before it, which has `len` bytes behind it.
    fn pseudo(source: &Address<16>, destination: &Address<16>, len: u16) -> Change;
}

const DIFFERENCE: u16 = (Ipv6Hdr::LEN - Ipv4Hdr::LEN) as u16;

/// The smallest MTU of IPv6 (RFC 8200, section 5).
const SMALLEST: u32 = 1280;

impl Crosses<4> for Ipv4Hdr {
    const OTHERS_ICMP: u8 = ICMPV6;

    #[inline(always)]
    fn is_plain(&self, _: u8) -> bool {
        self.vihl == 0x45
    }

    #[inline(always)]
    fn class_byte(&self) -> u8 {
        self.tos
    }

    #[inline(always)]
    fn others_length(length: u16) -> u16 {
        length.saturating_add(DIFFERENCE)
    }

    #[inline(always)]
    fn length_of_others(length: u32) -> u32 {
        length.saturating_sub(DIFFERENCE.into())
    }

    #[inline(always)]
    fn others_class(&self) -> [u8; 4] {
        [self.tos >> 4, self.tos << 4, 0, 0]
    }

    #[inline(always)]
    fn others_is_whole(&self, _: u16) -> bool {
        true
    }

    #[inline(always)]
    fn others_error([kind, code]: [u8; 2], rest: [u8; 4]) -> Option<([u8; 2], [u8; 4])> {
        const UNREACHABLE: u8 = 1;
        const TOO_BIG: [u8; 2] = [2, 0];
        const TIME_EXCEEDED: u8 = 3;
        const PARAMETER: u8 = 4;
        Some(match (kind, code) {
            (3, 0 | 1 | 5..=8 | 11 | 12) => ([UNREACHABLE, 0], [0; 4]),
            // Of the protocol: it points at the next header.
            (3, 2) => ([PARAMETER, 1], [0, 0, 0, 6]),
            (3, 3) => ([UNREACHABLE, 4], [0; 4]),
            (3, 4) => {
                let mtu = u32::from(u16::from_be_bytes([rest[2], rest[3]]));
                (TOO_BIG, (mtu + u32::from(DIFFERENCE)).max(SMALLEST).to_be_bytes())
            }
            (3, 9 | 10 | 13 | 15) => ([UNREACHABLE, 1], [0; 4]),
            (11, code) => ([TIME_EXCEEDED, code], [0; 4]),
            (12, 0 | 2) => {
                let pointer = match rest[0] {
                    place @ (0 | 1) => place,
                    2 | 3 => 4,
                    8 => 7,
                    9 => 6,
                    12..=15 => 8,
                    16..=19 => 24,
                    _ => return None,
                };
                ([PARAMETER, 0], [0, 0, 0, pointer])
            }
            _ => return None,
        })
    }

    #[inline(always)]
    fn pseudo(_: &Address<16>, _: &Address<16>, _: u16) -> Change {
        Change::default()
    }
}

impl Crosses<16> for Ipv6Hdr {
    const OTHERS_ICMP: u8 = ICMP;

    #[inline(always)]
    fn is_plain(&self, protocol: u8) -> bool {
        self.next_hdr == protocol
    }

    #[inline(always)]
    fn class_byte(&self) -> u8 {
        self.vcf[0] << 4 | self.vcf[1] >> 4
    }

    #[inline(always)]
    fn others_length(length: u16) -> u16 {
        length.saturating_sub(DIFFERENCE)
    }

    #[inline(always)]
    fn length_of_others(length: u32) -> u32 {
        length.saturating_add(DIFFERENCE.into())
    }

    #[inline(always)]
    fn others_class(&self) -> [u8; 4] {
        [self.class_byte(), 0, 0, 0]
    }

    #[inline(always)]
    fn others_is_whole(&self, length: u16) -> bool {
        // RFC 7915, section 5.1: who sends so much may be told of a smaller MTU.
        u32::from(length) > SMALLEST - u32::from(DIFFERENCE)
    }

    #[inline(always)]
    fn others_error([kind, code]: [u8; 2], rest: [u8; 4]) -> Option<([u8; 2], [u8; 4])> {
        const UNREACHABLE: u8 = 3;
        const TIME_EXCEEDED: u8 = 11;
        const PARAMETER: u8 = 12;
        Some(match (kind, code) {
            (1, 0 | 2 | 3) => ([UNREACHABLE, 1], [0; 4]),
            (1, 1) => ([UNREACHABLE, 10], [0; 4]),
            (1, 4) => ([UNREACHABLE, 3], [0; 4]),
            (2, _) => {
                let mtu = u32::from_be_bytes(rest).saturating_sub(DIFFERENCE.into());
                let [.., high, low] = mtu.min(u16::MAX.into()).to_be_bytes();
                ([UNREACHABLE, 4], [0, 0, high, low])
            }
            (3, code) => ([TIME_EXCEEDED, code], [0; 4]),
            (4, 0) => {
                let pointer = match u32::from_be_bytes(rest) {
                    place @ (0 | 1) => place as u8,
                    4 | 5 => 2,
                    6 => 9,
                    7 => 8,
                    8..=23 => 12,
                    24..=39 => 16,
                    _ => return None,
                };
                ([PARAMETER, 0], [pointer, 0, 0, 0])
            }
            (4, 1) => ([UNREACHABLE, 2], [0; 4]),
            _ => return None,
        })
    }

    #[inline(always)]
    fn pseudo(source: &Address<16>, destination: &Address<16>, len: u16) -> Change {
        let ends = Change::default().words(source).words(destination);
        ends.word(len.to_be_bytes()).word([0, ICMPV6])
    }
}

/// The sum of a header's bytes.
#[inline(always)]
pub(super) fn words<T: Header>(header: &T) -> Change {
    const { assert!(size_of::<T>().is_multiple_of(2)) };
    let words = (&raw const *header).cast::<[u8; 2]>();
    let mut sum = Change::default();
    for place in 0..size_of::<T>() / 2 {
        // SAFETY: in bounds, of bytes.
        sum = sum.word(unsafe { *words.add(place) });
    }
    sum
}
