//! ICMP errors: what they quote is translated backwards, so that whoever sent the packet knows it
//! (RFC 5508, section 4).

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::checksum::{Change, Checksum};
use crate::packet::{Frame, Header, ICMP, ICMPV6, Ip, Payload, Reads, TCP, UDP};
use crate::path::Flow;
use crate::segment::Segment;
use crate::table::{Address, Direction, Passed, Port};

/// The header of all messages that are looked at here.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct IcmpHdr {
    /// And code.
    pub kind: [u8; 2],
    pub checksum: [u8; 2],
    pub rest: [u8; 4],
}

// SAFETY: bytes.
unsafe impl Header for IcmpHdr {}

/// What is ICMP's own of an address family.
pub trait Icmp<const N: usize>: Ip<N> {
    /// IP protocol number.
    const PROTOCOL: u8;
    const ECHO: u8;
    const ECHO_REPLY: u8;
    /// The checksum covers the addresses.
    const PSEUDO_HEADER: bool;

    /// Kinds and codes.
    const TIME_EXCEEDED: [u8; 2];
    const TOO_BIG: [u8; 2];
    /// Bytes that an error with all that it quotes has at most.
    const LONGEST_ERROR: usize;

    /// Whether messages of this kind are errors that quote a packet.
    fn is_error(kind: u8) -> bool;

    /// The second half of the header of "too big".
    fn mtu(mtu: u32) -> [u8; 4];

    /// Whether an address may be one of a single host.
    fn is_host(address: &Address<N>) -> bool;

    /// Its length with options and the protocol that it carries, if no extension header follows.
    fn plain(&self) -> Option<(usize, u8)>;

    /// The sum of its bytes, which are `Self`'s and options.
    fn sum(&self) -> Change;

    /// Makes this the header of an error with `len` bytes behind it. Returns what the error's checksum
    /// has to cover of it.
    fn begin_error(&mut self, source: Address<N>, destination: Address<N>, len: u16) -> Change;
}

impl Icmp<4> for Ipv4Hdr {
    const PROTOCOL: u8 = ICMP;
    const ECHO: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const PSEUDO_HEADER: bool = false;
    const TIME_EXCEEDED: [u8; 2] = [11, 0];
    const TOO_BIG: [u8; 2] = [3, 4];
    /// RFC 1812, section 4.3.2.3.
    const LONGEST_ERROR: usize = 576;

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Unreachable, source quench, time exceeded, parameter problem.
        matches!(kind, 3 | 4 | 11 | 12)
    }

    #[inline(always)]
    fn mtu(mtu: u32) -> [u8; 4] {
        let [.., high, low] = mtu.to_be_bytes();
        [0, 0, high, low]
    }

    #[inline(always)]
    fn is_host(address: &Address<4>) -> bool {
        let [first, ..] = address.0;
        matches!(first, 1..=126 | 128..=223)
    }

    #[inline(always)]
    fn plain(&self) -> Option<(usize, u8)> {
        Some((usize::from(self.vihl & 0xf) * 4, self.proto))
    }

    #[inline(always)]
    fn sum(&self) -> Change {
        // Its checksum sees to that.
        Change::default()
    }

    #[inline(always)]
    fn begin_error(&mut self, source: Address<4>, destination: Address<4>, len: u16) -> Change {
        /// "Internetwork control", as Linux has it.
        const CONTROL: u8 = 0xc0;
        const HOPS: u8 = 64;
        let length = (len + Self::LEN as u16).to_be_bytes();
        self.vihl = 0x45;
        self.tos = CONTROL;
        self.tot_len = length;
        self.id = [0; 2];
        // Not to be fragmented: it has no identification.
        self.frags = [0x40, 0];
        self.ttl = HOPS;
        self.proto = ICMP;
        self.src_addr = source.0;
        self.dst_addr = destination.0;
        let sum = Change::default()
            .word([0x45, CONTROL])
            .word(length)
            .word([0x40, 0])
            .word([HOPS, ICMP])
            .words(&source)
            .words(&destination);
        self.check = Checksum::EMPTY.update(sum).0;
        Change::default()
    }
}

impl Icmp<16> for Ipv6Hdr {
    const PROTOCOL: u8 = ICMPV6;
    const ECHO: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const PSEUDO_HEADER: bool = true;
    const TIME_EXCEEDED: [u8; 2] = [3, 0];
    const TOO_BIG: [u8; 2] = [2, 0];
    /// RFC 4443, section 2.4 (c).
    const LONGEST_ERROR: usize = 1280;

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Unreachable, too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn mtu(mtu: u32) -> [u8; 4] {
        // Every link of IPv6 carries so much (RFC 8200, section 5).
        mtu.max(1280).to_be_bytes()
    }

    #[inline(always)]
    fn is_host(address: &Address<16>) -> bool {
        let number = u128::from_be_bytes(address.0);
        // Neither a group, nor "unspecified" or "loopback".
        number >> 120 != 0xff && number > 1
    }

    #[inline(always)]
    fn plain(&self) -> Option<(usize, u8)> {
        matches!(self.next_hdr, TCP | UDP).then_some((Self::LEN, self.next_hdr))
    }

    #[inline(always)]
    fn sum(&self) -> Change {
        let [a, b, c, d] = self.vcf;
        let first = Change::default().word([a, b]).word([c, d]).word(self.payload_len);
        let (source, destination) = (self.source(), self.destination());
        first.word([self.next_hdr, self.hop_limit]).words(&source).words(&destination)
    }

    #[inline(always)]
    fn begin_error(&mut self, source: Address<16>, destination: Address<16>, len: u16) -> Change {
        const HOPS: u8 = 64;
        let length = len.to_be_bytes();
        self.vcf = [0x60, 0, 0, 0];
        self.payload_len = length;
        self.next_hdr = ICMPV6;
        self.hop_limit = HOPS;
        self.src_addr = source.0;
        self.dst_addr = destination.0;
        Change::default().word(length).word([0, ICMPV6]).words(&source).words(&destination)
    }
}

/// An error about a packet that had been translated, or would have been.
pub struct Error<'a, I> {
    pub(crate) icmp: &'a mut IcmpHdr,
    pub(crate) ip: &'a mut I,
    pub(crate) segment: Segment<'a>,
}

impl<'a, I> Error<'a, I> {
    /// Takes an error of `len` bytes that goes in `direction`; what it quotes went the other way.
    #[inline(always)]
    pub fn take<const N: usize>(
        frame: &mut Frame<'a>,
        direction: Direction,
        len: usize,
    ) -> Result<Self, Passed>
    where
        I: Icmp<N>,
    {
        let quoted = len.checked_sub(size_of::<IcmpHdr>()).ok_or(Passed::Malformed)?;
        if quoted < size_of::<I>() {
            return Err(Passed::Malformed);
        }
        let icmp: &mut IcmpHdr = frame.take().ok_or(Passed::Malformed)?;
        let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
        let Payload { protocol, offset, len, fragment } =
            ip.payload(frame, quoted, Reads::Quoted)?;
        if fragment.offset != 0 {
            return Err(Passed::Icmp);
        }
        frame.skip(offset);
        if protocol == I::PROTOCOL {
            let went = match direction {
                Direction::Forward => I::ECHO_REPLY,
                Direction::Reply => I::ECHO,
            };
            let kind = frame.peek::<[u8; 1]>(0).ok_or(Passed::Malformed)?;
            if kind != [went] {
                return Err(Passed::Icmp);
            }
        }
        let segment = Segment::quoted(frame, protocol, len)?;
        Ok(Self { icmp, ip, segment })
    }

    /// The ends of a packet that goes the way of the error, which is back.
    #[inline(always)]
    pub fn ends<const N: usize>(&self) -> Flow
    where
        I: Ip<N>,
    {
        Flow::between(self.ip, self.segment.protocol(), self.segment.ports()).reversed()
    }

    /// Makes the quoted packet what its sender sent: the end that `direction` translates becomes
    /// `address` and `port`. `addresses` is what changed in the header before the error.
    #[inline(always)]
    pub fn rewrite<const N: usize>(
        &mut self,
        direction: Direction,
        address: Address<N>,
        port: Port,
        addresses: Change,
    ) where
        I: Icmp<N>,
    {
        let end = direction.opposite();
        // An IPv4 header sums to the same as before: its checksum sees to that.
        let quoted = self.ip.rewrite(end, address, 0);
        let mut change = self.segment.rewrite_quoted(end, port, quoted);
        if I::PSEUDO_HEADER {
            change = change.and(quoted).and(addresses);
        }
        self.icmp.checksum = Checksum(self.icmp.checksum).update(change).0;
    }
}
