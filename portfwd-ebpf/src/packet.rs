//! Headers in a frame: read with every length checked, rewritten together with their checksums.

use core::marker::PhantomData;
use core::mem::size_of;

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::checksum::{Change, Checksum};
use crate::flow::Segment;
use crate::path::Kernel;
use crate::table::{
    Address, Claims, Direction, Endpoint, FlowKey, LinkAddresses, Passed, Port, Ports, RouteSet,
    Trust, flow_flags,
};

/// A header as it lies in a frame.
///
/// # Safety
///
/// Any bytes must be a valid value, and the alignment must be 1.
pub unsafe trait Header: Sized + 'static {
    /// Fails to compile for a type that is aligned to more than a byte.
    const UNALIGNED: () = assert!(align_of::<Self>() == 1);
}

// SAFETY: structs of byte arrays, or packed; checked by `UNALIGNED` where they are taken.
unsafe impl Header for Ethernet {}
// SAFETY: as above.
unsafe impl Header for Ipv4Hdr {}
// SAFETY: as above.
unsafe impl Header for Ipv6Hdr {}
// SAFETY: as above.
unsafe impl Header for TcpHdr {}
// SAFETY: as above.
unsafe impl Header for UdpHdr {}
// SAFETY: as above.
unsafe impl Header for ExtensionHdr {}

/// What is left to read of a frame. Each byte is handed out once, so the headers that were taken can
/// all be held, and written, at the same time.
pub struct Frame<'a> {
    next: *mut u8,
    end: *mut u8,
    bytes: PhantomData<&'a mut [u8]>,
}

impl<'a> Frame<'a> {
    /// A frame in memory, from its Ethernet header on.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        let range = bytes.as_mut_ptr_range();
        Self { next: range.start, end: range.end, bytes: PhantomData }
    }

    /// A frame in a BPF context, whose addresses are integers.
    ///
    /// # Safety
    ///
    /// `start..end` must be memory that nothing else uses during `'a`.
    #[inline(always)]
    pub unsafe fn from_addresses(start: usize, end: usize) -> Self {
        Self { next: start as *mut u8, end: end as *mut u8, bytes: PhantomData }
    }

    /// The next header, or `None` if the frame ends before it does.
    // The verifier follows pointers, not lengths: the end is compared with a pointer.
    #[inline(always)]
    pub fn take<T: Header>(&mut self) -> Option<&'a mut T> {
        let () = T::UNALIGNED;
        let header = self.next;
        let next = header.wrapping_add(size_of::<T>());
        if next > self.end {
            return None;
        }
        self.next = next;
        // SAFETY: in bounds as just checked, never handed out before, valid for any bytes.
        Some(unsafe { &mut *header.cast::<T>() })
    }

    /// The header that stands `offset` bytes from here, which is not taken.
    #[inline(always)]
    fn peek<T: Header + Copy>(&self, offset: usize) -> Option<T> {
        let () = T::UNALIGNED;
        let header = self.next.wrapping_add(offset);
        // SAFETY: in bounds, valid for any bytes; what was handed out lies before it.
        (header.wrapping_add(size_of::<T>()) <= self.end)
            .then(|| unsafe { header.cast::<T>().read_unaligned() })
    }

    /// Leaves out `len` bytes. What follows is checked when it is taken.
    #[inline(always)]
    fn skip(&mut self, len: usize) {
        self.next = self.next.wrapping_add(len);
    }

    /// How many bytes are left.
    #[inline(always)]
    pub fn remaining(&self) -> usize {
        (self.end as usize).wrapping_sub(self.next as usize)
    }
}

/// An Ethernet header. (network-types' one is aligned to two bytes, which a frame need not be.)
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ethernet {
    /// [`LinkAddresses`], at any alignment.
    link: [u8; 12],
    ether_type: [u8; 2],
}

/// What an Ethernet frame carries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct EtherType(u16);

impl EtherType {
    pub const IPV4: Self = Self::of([0x08, 0x00]);
    pub const IPV6: Self = Self::of([0x86, 0xdd]);
    /// IEEE 802.1Q, the inner or only tag.
    pub const VLAN: Self = Self::of([0x81, 0x00]);
    /// IEEE 802.1ad, the outer of two tags.
    pub const SERVICE_VLAN: Self = Self::of([0x88, 0xa8]);

    /// One number to compare, not two bytes.
    const fn of(bytes: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(bytes))
    }
}

impl Ethernet {
    #[inline(always)]
    pub fn ether_type(&self) -> EtherType {
        EtherType::of(self.ether_type)
    }

    /// Whether the frame goes to a group: the first bit on the wire.
    #[inline(always)]
    pub fn is_group(&self) -> bool {
        self.link[0] & 1 == 1
    }

    #[inline(always)]
    pub fn set_link(&mut self, link: &LinkAddresses) {
        self.link = link.bytes();
    }
}

/// The TCP or UDP header of a packet.
pub enum Transport<'a> {
    Tcp(&'a mut TcpHdr),
    Udp(&'a mut UdpHdr),
}

impl<'a> Transport<'a> {
    /// Takes the header of `protocol`, which has `len` bytes of the IP packet for itself and its
    /// payload.
    #[inline(always)]
    fn take(frame: &mut Frame<'a>, protocol: u8, len: usize) -> Result<Self, Passed> {
        match protocol {
            TCP => {
                if len < TcpHdr::LEN {
                    return Err(Passed::Malformed);
                }
                let tcp: &mut TcpHdr = frame.take().ok_or(Passed::Malformed)?;
                let header = usize::from(tcp.doff()) * 4;
                if header < TcpHdr::LEN || header > len {
                    return Err(Passed::Malformed);
                }
                Ok(Self::Tcp(tcp))
            }
            UDP => {
                if len < UdpHdr::LEN {
                    return Err(Passed::Malformed);
                }
                let udp: &mut UdpHdr = frame.take().ok_or(Passed::Malformed)?;
                let datagram = usize::from(udp.len());
                if datagram < UdpHdr::LEN || datagram > len {
                    return Err(Passed::Malformed);
                }
                Ok(Self::Udp(udp))
            }
            ICMP | ICMPV6 => Err(Passed::Icmp),
            _ => Err(Passed::Protocol),
        }
    }

    /// The IP protocol number.
    #[inline(always)]
    pub fn protocol(&self) -> u8 {
        match self {
            Self::Tcp(_) => TCP,
            Self::Udp(_) => UDP,
        }
    }

    /// What rules claim of this protocol.
    #[inline(always)]
    pub fn claimed(&self, claims: &Claims) -> Ports {
        match self {
            Self::Tcp(_) => claims.tcp,
            Self::Udp(_) => claims.udp,
        }
    }

    /// The ports: source, destination.
    #[inline(always)]
    pub fn ports(&self) -> (Port, Port) {
        match self {
            Self::Tcp(tcp) => (Port(tcp.source), Port(tcp.dest)),
            Self::Udp(udp) => (Port(udp.src), Port(udp.dst)),
        }
    }

    /// What it is to its TCP connection, and the number that belongs to that.
    #[inline(always)]
    pub fn segment(&self) -> (Segment, u32) {
        let Self::Tcp(tcp) = self else { return (Segment::None, 0) };
        let number = u32::from_be_bytes;
        match (tcp.syn() != 0, tcp.ack() != 0, tcp.rst() != 0) {
            (true, false, _) => (Segment::Opens, 0),
            (true, true, false) => (Segment::Accepts, number(tcp.seq).wrapping_add(1)),
            (false, true, false) => (Segment::Acknowledges, number(tcp.ack_seq)),
            _ => (Segment::Other, 0),
        }
    }

    /// The [`flow_flags`] that it brings.
    #[inline(always)]
    pub fn flow_flags(&self) -> u32 {
        let Self::Tcp(tcp) = self else { return 0 };
        let fin = if tcp.fin() != 0 { flow_flags::FIN } else { 0 };
        fin | if tcp.rst() != 0 { flow_flags::RESET } else { 0 }
    }

    /// Sets the port that `direction` translates and repairs the checksum, which `addresses`
    /// changed as well, through the pseudo header (RFC 9293, section 3.1; RFC 768).
    #[inline(always)]
    pub fn rewrite(&mut self, direction: Direction, port: Port, addresses: Change) {
        match self {
            Self::Tcp(tcp) => {
                let field = match direction {
                    Direction::Forward => &mut tcp.dest,
                    Direction::Reply => &mut tcp.source,
                };
                let change = addresses.field(*field, port.0);
                *field = port.0;
                tcp.check = Checksum(tcp.check).update(change).0;
            }
            Self::Udp(udp) => {
                let field = match direction {
                    Direction::Forward => &mut udp.dst,
                    Direction::Reply => &mut udp.src,
                };
                let change = addresses.field(*field, port.0);
                *field = port.0;
                udp.check = Checksum(udp.check).update_udp(change).0;
            }
        }
    }
}

/// IP protocol numbers.
pub const TCP: u8 = 6;
/// UDP's.
pub const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// An IP header with addresses of `N` bytes.
pub trait Ip<const N: usize>: Header {
    /// The kernel's number of the address family (AF_INET, AF_INET6).
    const FAMILY: u8;

    fn source(&self) -> Address<N>;
    fn destination(&self) -> Address<N>;

    /// The packet as flows know it.
    #[inline(always)]
    fn key(&self, transport: &Transport<'_>, direction: Direction) -> FlowKey<N> {
        let (source_port, destination_port) = transport.ports();
        FlowKey {
            source: self.source(),
            destination: self.destination(),
            source_port,
            destination_port,
            protocol: transport.protocol(),
            direction: direction as u8,
            padding: [0; 2],
        }
    }

    /// Bytes of the whole IP packet, as the header says.
    fn length(&self) -> u16;
    /// Hops left.
    fn ttl(&self) -> u8;
    /// Whether a router has to refuse it rather than cut it up.
    fn must_not_fragment(&self) -> bool;
    /// What routing may look at beside addresses and ports, as `struct bpf_fib_lookup` wants it: the
    /// IPv4 TOS byte first, or IPv6 traffic class and flow label.
    fn class(&self) -> [u8; 4];

    /// Looks the end that `direction` translates up in the map of this family.
    fn endpoint<'k, K: Kernel>(
        kernel: &'k K,
        direction: Direction,
        address: &Address<N>,
    ) -> Option<&'k Endpoint>;

    /// Whether the FIB refuses some packets for their source: those are not for remembered routes.
    fn is_source_strict(&self) -> bool;

    /// How far remembered routes of this family can be relied on.
    fn trust<K: Kernel>(kernel: &K) -> Trust;

    /// Looks at a set of remembered routes of this family, or changes it.
    fn routes<K: Kernel, R>(
        kernel: &K,
        direction: Direction,
        destination: &Address<N>,
        look: impl FnOnce(&mut RouteSet<N>) -> R,
    ) -> Option<R>;

    /// Goes on from this header, which was just taken from `frame`, to the transport header.
    /// `available` is what the frame held from the start of this header on.
    fn transport<'a>(
        &self,
        frame: &mut Frame<'a>,
        available: usize,
    ) -> Result<Transport<'a>, Passed>;

    /// Sets the address that `direction` translates, takes `hops` (less than [`ttl`](Self::ttl)) off,
    /// and repairs the header's own checksum. Returns what changed for the pseudo header.
    fn rewrite(&mut self, direction: Direction, address: Address<N>, hops: u8) -> Change;
}

impl Ip<4> for Ipv4Hdr {
    const FAMILY: u8 = 2;

    #[inline(always)]
    fn source(&self) -> Address<4> {
        Address(self.src_addr)
    }

    #[inline(always)]
    fn destination(&self) -> Address<4> {
        Address(self.dst_addr)
    }

    #[inline(always)]
    fn length(&self) -> u16 {
        self.tot_len()
    }

    #[inline(always)]
    fn ttl(&self) -> u8 {
        self.ttl
    }

    #[inline(always)]
    fn must_not_fragment(&self) -> bool {
        self.frags[0] & 0x40 != 0
    }

    #[inline(always)]
    fn class(&self) -> [u8; 4] {
        [self.tos, 0, 0, 0]
    }

    #[inline(always)]
    fn endpoint<'k, K: Kernel>(
        kernel: &'k K,
        direction: Direction,
        address: &Address<4>,
    ) -> Option<&'k Endpoint> {
        kernel.endpoint_v4(direction, address)
    }

    #[inline(always)]
    fn is_source_strict(&self) -> bool {
        false
    }

    #[inline(always)]
    fn trust<K: Kernel>(kernel: &K) -> Trust {
        kernel.trust_v4()
    }

    #[inline(always)]
    fn routes<K: Kernel, R>(
        kernel: &K,
        direction: Direction,
        destination: &Address<4>,
        look: impl FnOnce(&mut RouteSet<4>) -> R,
    ) -> Option<R> {
        kernel.routes_v4(direction, destination, look)
    }

    #[inline(always)]
    fn transport<'a>(
        &self,
        frame: &mut Frame<'a>,
        available: usize,
    ) -> Result<Transport<'a>, Passed> {
        let header = usize::from(self.vihl & 0xf) * 4;
        let length = usize::from(self.tot_len());
        if self.vihl >> 4 != 4 || header < Self::LEN || header > length || length > available {
            return Err(Passed::Malformed);
        }
        // More fragments, or an offset (RFC 791).
        if self.frags[0] & 0x3f != 0 || self.frags[1] != 0 {
            return Err(Passed::Fragment);
        }
        frame.skip(header - Self::LEN);
        Transport::take(frame, self.proto, length - header)
    }

    #[inline(always)]
    fn rewrite(&mut self, direction: Direction, address: Address<4>, hops: u8) -> Change {
        let field = match direction {
            Direction::Forward => &mut self.dst_addr,
            Direction::Reply => &mut self.src_addr,
        };
        let addresses = Change::default().address(field, &address.0);
        *field = address.0;
        let ttl = self.ttl.wrapping_sub(hops);
        let header = addresses.field([self.ttl, self.proto], [ttl, self.proto]);
        self.ttl = ttl;
        self.check = Checksum(self.check).update(header).0;
        addresses
    }
}

/// The first eight bytes of an IPv6 extension header (RFC 8200, section 4).
#[derive(Clone, Copy)]
#[repr(C)]
struct ExtensionHdr {
    next: u8,
    /// In units of eight bytes, beyond the first eight.
    len: u8,
    kind: u8,
    segments_left: u8,
    rest: [u8; 4],
}

/// How many extension headers are read: each kind once in RFC 8200's order, destination options
/// twice, and one to spare.
const EXTENSION_HEADERS: usize = 5;
/// Bytes of extension headers that are read past: a page, which no frame in XDP is longer than.
const LONGEST_EXTENSIONS: usize = 4096;

impl Ip<16> for Ipv6Hdr {
    const FAMILY: u8 = 10;

    #[inline(always)]
    fn source(&self) -> Address<16> {
        Address(self.src_addr)
    }

    #[inline(always)]
    fn destination(&self) -> Address<16> {
        Address(self.dst_addr)
    }

    #[inline(always)]
    fn length(&self) -> u16 {
        self.payload_len().saturating_add(Self::LEN as u16)
    }

    #[inline(always)]
    fn ttl(&self) -> u8 {
        self.hop_limit
    }

    #[inline(always)]
    fn must_not_fragment(&self) -> bool {
        true
    }

    #[inline(always)]
    fn class(&self) -> [u8; 4] {
        [self.vcf[0] & 0x0f, self.vcf[1], self.vcf[2], self.vcf[3]]
    }

    #[inline(always)]
    fn endpoint<'k, K: Kernel>(
        kernel: &'k K,
        direction: Direction,
        address: &Address<16>,
    ) -> Option<&'k Endpoint> {
        kernel.endpoint_v6(direction, address)
    }

    #[inline(always)]
    fn is_source_strict(&self) -> bool {
        // Multicast, link-local, loopback (rt6_need_strict), and a few more that begin alike.
        matches!(self.src_addr[0], 0x00 | 0xfe | 0xff)
    }

    #[inline(always)]
    fn trust<K: Kernel>(kernel: &K) -> Trust {
        kernel.trust_v6()
    }

    #[inline(always)]
    fn routes<K: Kernel, R>(
        kernel: &K,
        direction: Direction,
        destination: &Address<16>,
        look: impl FnOnce(&mut RouteSet<16>) -> R,
    ) -> Option<R> {
        kernel.routes_v6(direction, destination, look)
    }

    #[inline(always)]
    fn transport<'a>(
        &self,
        frame: &mut Frame<'a>,
        available: usize,
    ) -> Result<Transport<'a>, Passed> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const AUTHENTICATION: u8 = 51;
        const DESTINATION: u8 = 60;

        let mut len = usize::from(self.payload_len());
        if self.vcf[0] >> 4 != 6 || len + Self::LEN > available {
            return Err(Passed::Malformed);
        }
        let mut protocol = self.next_hdr;
        let mut offset = 0;
        for _ in 0..=EXTENSION_HEADERS {
            match protocol {
                HOP_BY_HOP | ROUTING | DESTINATION => {}
                FRAGMENT => return Err(Passed::Fragment),
                AUTHENTICATION => return Err(Passed::Extension),
                _ => {
                    // To the verifier all numbers of headers are alike then, and what follows is
                    // looked at once.
                    if offset > LONGEST_EXTENSIONS {
                        return Err(Passed::Extension);
                    }
                    frame.skip(offset);
                    return Transport::take(frame, protocol, len);
                }
            }
            let extension: ExtensionHdr = frame.peek(offset).ok_or(Passed::Malformed)?;
            // On its way through a source route the destination is not the one of the pseudo header.
            if protocol == ROUTING && extension.segments_left != 0 {
                return Err(Passed::Extension);
            }
            let size = size_of::<ExtensionHdr>() + usize::from(extension.len) * 8;
            protocol = extension.next;
            offset += size;
            len = len.checked_sub(size).ok_or(Passed::Malformed)?;
        }
        Err(Passed::Extension)
    }

    #[inline(always)]
    fn rewrite(&mut self, direction: Direction, address: Address<16>, hops: u8) -> Change {
        let field = match direction {
            Direction::Forward => &mut self.dst_addr,
            Direction::Reply => &mut self.src_addr,
        };
        let addresses = Change::default().address(field, &address.0);
        *field = address.0;
        self.hop_limit = self.hop_limit.wrapping_sub(hops);
        addresses
    }
}
