//! Headers in a frame: read with every length checked, rewritten together with their checksums.

use core::marker::PhantomData;
use core::mem::size_of;

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::checksum::{Change, Checksum};
use crate::flow::{Bench, Flows, Segment};
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
pub unsafe trait Header: Copy + 'static {
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
// SAFETY: bytes.
unsafe impl<const N: usize> Header for [u8; N] {}

/// What is left to read of a frame. Each byte is handed out once, so the headers that were taken can
/// all be held, and written, at the same time.
pub struct Frame<'a> {
    next: *mut u8,
    end: *mut u8,
    /// Bytes of its link header.
    link: usize,
    bytes: PhantomData<&'a mut [u8]>,
}

impl<'a> Frame<'a> {
    /// A frame in memory, from its Ethernet header on.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        let range = bytes.as_mut_ptr_range();
        Self { next: range.start, end: range.end, link: size_of::<Ethernet>(), bytes: PhantomData }
    }

    /// A frame in a BPF context, whose addresses are integers. Its link header has `link` bytes: that of
    /// Ethernet or none.
    ///
    /// # Safety
    ///
    /// `start..end` must be memory that nothing else uses during `'a`.
    #[inline(always)]
    pub unsafe fn from_addresses(start: usize, end: usize, link: usize) -> Self {
        Self { next: start as *mut u8, end: end as *mut u8, link, bytes: PhantomData }
    }

    /// The link header, with which the frame begins.
    // All frames are longer, also those without one: so there is one check for both.
    #[inline(always)]
    pub fn take_link(&mut self) -> Option<Link<'a>> {
        let start = self.next;
        if start.wrapping_add(size_of::<Ethernet>()) > self.end {
            return None;
        }
        self.next = start.wrapping_add(self.link);
        Some(Link { start: start.cast(), len: self.link, bytes: PhantomData })
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

    /// The same, to look ahead: what is taken from it is taken again later.
    #[inline(always)]
    pub fn ahead(&mut self) -> Frame<'_> {
        Frame { next: self.next, end: self.end, link: self.link, bytes: PhantomData }
    }

    /// The header that stands `offset` bytes from here, which is not taken.
    #[inline(always)]
    pub fn peek<T: Header>(&self, offset: usize) -> Option<T> {
        let () = T::UNALIGNED;
        let header = self.next.wrapping_add(offset);
        // SAFETY: in bounds, valid for any bytes; what was handed out lies before it.
        (header.wrapping_add(size_of::<T>()) <= self.end)
            .then(|| unsafe { header.cast::<T>().read_unaligned() })
    }

    /// Leaves out `len` bytes. What follows is checked when it is taken.
    #[inline(always)]
    pub fn skip(&mut self, len: usize) {
        self.next = self.next.wrapping_add(len);
    }

    /// The same, in a way that the compiler does not see through: it would check one sum of the same
    /// parts and read by another, and to the verifier they have nothing to do with each other.
    #[inline(always)]
    pub fn jump(&mut self, len: usize) {
        self.next = core::hint::black_box(self.next.wrapping_add(len));
    }

    /// How many bytes are left.
    #[inline(always)]
    pub fn remaining(&self) -> usize {
        (self.end as usize).wrapping_sub(self.next as usize)
    }
}

/// The link header of a frame. On some interfaces there is none.
pub struct Link<'a> {
    start: *mut Ethernet,
    /// 0 if there is none.
    len: usize,
    bytes: PhantomData<&'a mut Ethernet>,
}

impl Link<'_> {
    /// How far behind the beginning of the frame something is that stands at an address.
    // The compiler would make sums of this difference and other pointers, which the verifier does not let it do.
    #[inline(always)]
    pub fn distance(&self, address: usize) -> usize {
        core::hint::black_box(address).wrapping_sub(core::hint::black_box(self.start as usize))
    }

    #[inline(always)]
    pub fn ethernet(&mut self) -> Option<&mut Ethernet> {
        // SAFETY: checked when it was taken; valid for any bytes, and handed out once at a time.
        (self.len != 0).then(|| unsafe { &mut *self.start })
    }

    /// Whether the frame goes to a group.
    #[inline(always)]
    pub fn is_group(&mut self) -> bool {
        self.ethernet().is_some_and(|ethernet| ethernet.is_group())
    }

    /// Sets its addresses. False if there is none.
    #[inline(always)]
    pub fn set(&mut self, link: &LinkAddresses) -> bool {
        self.ethernet().map(|ethernet| ethernet.set_link(link)).is_some()
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

    /// Two bytes as on the wire: one number to compare.
    pub const fn of(bytes: [u8; 2]) -> Self {
        Self(u16::from_ne_bytes(bytes))
    }

    /// The two bytes on the wire, as a number in native order: as the kernel has it.
    pub const fn number(self) -> u16 {
        self.0
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

    /// The link addresses of a frame back to where this one came from.
    #[inline(always)]
    pub fn back(&self) -> LinkAddresses {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = self.link;
        LinkAddresses::from_bytes([g, h, i, j, k, l, a, b, c, d, e, f])
    }

    #[inline(always)]
    pub fn set_ether_type(&mut self, ether_type: EtherType) {
        self.ether_type = ether_type.0.to_ne_bytes();
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

    /// Where it starts, and the bytes of its header.
    #[inline(always)]
    pub fn header(&self) -> (usize, usize) {
        match self {
            Self::Tcp(tcp) => (&raw const **tcp as usize, usize::from(tcp.doff()) * 4),
            Self::Udp(udp) => (&raw const **udp as usize, UdpHdr::LEN),
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

    /// Whether it is TCP's SYN, or the answer to one.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        matches!(self, Self::Tcp(tcp) if tcp.syn() != 0)
    }

    /// The [`flow_flags`] that it brings.
    #[inline(always)]
    pub fn flow_flags(&self) -> u32 {
        let Self::Tcp(tcp) = self else { return 0 };
        let fin = if tcp.fin() != 0 { flow_flags::FIN } else { 0 };
        fin | if tcp.rst() != 0 { flow_flags::RESET } else { 0 }
    }

    /// Sets the port that `direction` translates. Returns what changed.
    #[inline(always)]
    pub fn set_port(&mut self, direction: Direction, port: Port) -> Change {
        let field = match (self, direction) {
            (Self::Tcp(tcp), Direction::Forward) => &mut tcp.dest,
            (Self::Tcp(tcp), Direction::Reply) => &mut tcp.source,
            (Self::Udp(udp), Direction::Forward) => &mut udp.dst,
            (Self::Udp(udp), Direction::Reply) => &mut udp.src,
        };
        let change = Change::default().field(*field, port.0);
        *field = port.0;
        change
    }

    /// The checksum, which covers the addresses too through the pseudo header (RFC 9293, section 3.1;
    /// RFC 768).
    #[inline(always)]
    pub fn check(&mut self) -> Check<'_> {
        match self {
            Self::Tcp(tcp) => Check { field: &mut tcp.check, is_udp: false },
            Self::Udp(udp) => Check { field: &mut udp.check, is_udp: true },
        }
    }
}

/// The checksum of a TCP or UDP header, in a frame.
pub struct Check<'a> {
    pub field: &'a mut [u8; 2],
    pub is_udp: bool,
}

impl Check<'_> {
    /// Repairs it after what it covers changed.
    #[inline(always)]
    pub fn update(self, change: Change) {
        let old = Checksum(*self.field);
        let new = if self.is_udp { old.update_udp(change) } else { old.update(change) };
        *self.field = new.0;
    }
}

/// IP protocol numbers.
pub const TCP: u8 = 6;
/// UDP's.
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

/// Which packets are read; a constant wherever it is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// No fragments.
    Whole,
    All,
    /// What an ICMP error quotes.
    Quoted,
}

impl Reads {
    /// How many are read.
    #[inline(always)]
    const fn extension_headers(self) -> usize {
        match self {
            // Each kind once in RFC 8200's order, destination options twice, and one to spare.
            Self::Whole | Self::All => 5,
            // The verifier follows each number of them for each number of the error's own.
            Self::Quoted => 2,
        }
    }
}

/// What an IP packet carries, behind options and extension headers.
#[derive(Clone, Copy)]
pub struct Payload {
    /// IP protocol number.
    pub protocol: u8,
    /// Bytes between the fixed IP header and it.
    pub offset: usize,
    /// Bytes of it that are there.
    pub len: usize,
    pub fragment: Fragment,
}

impl Payload {
    /// Takes the transport header of this, which is what follows the IP header that was taken from
    /// `frame`.
    #[inline(always)]
    pub fn transport<'a>(self, frame: &mut Frame<'a>) -> Result<Transport<'a>, Passed> {
        let Self { protocol, offset, len, .. } = self;
        frame.skip(offset);
        Transport::take(frame, protocol, len)
    }

    /// The same, of which the verifier knows nothing any more.
    #[inline(always)]
    pub fn forgotten(self, nothing: u32) -> Result<Self, Passed> {
        let Self { protocol, offset, len, fragment } = self;
        // Linux before 6.3 forgets a comparison with what is on the stack, and wants the bound there itself.
        const BOUND: usize = (2 * LONGEST_EXTENSIONS).next_power_of_two() - 1;
        let offset = forgotten(offset as u32, nothing) as usize & BOUND;
        if offset > LONGEST_EXTENSIONS {
            return Err(Passed::Extension);
        }
        let Fragment { identification, offset: place, more } = fragment;
        let place = forgotten(u32::from(place) << 16 | u32::from(more), nothing);
        let identification = forgotten(u32::from_ne_bytes(identification), nothing);
        Ok(Self {
            protocol: forgotten(protocol.into(), nothing) as u8,
            offset,
            len: forgotten(len as u32, nothing) as usize,
            fragment: Fragment {
                identification: identification.to_ne_bytes(),
                offset: (place >> 16) as u16,
                more: place as u8,
            },
        })
    }
}

/// A number of which the verifier knows nothing any more: what follows is verified once, and not for each
/// way here. `nothing` is zero, which it does not know either.
#[inline(always)]
pub fn forgotten(number: u32, nothing: u32) -> u32 {
    // Not later, as the compiler would.
    core::hint::black_box(number ^ nothing)
}

/// Where a fragment belongs. A whole packet is one that nothing precedes or follows.
// Not an option: the verifier minds what is undefined in one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fragment {
    pub identification: [u8; 4],
    /// In bytes, of the payload.
    pub offset: u16,
    /// 1 if others follow it.
    more: u8,
}

impl Fragment {
    /// Whether others follow it.
    #[inline(always)]
    pub fn has_more(&self) -> bool {
        self.more != 0
    }
}

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
    /// Whether it may carry ICMP of its family, as far as this header tells.
    fn may_carry_icmp(&self) -> bool;
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

    /// This CPU's bench for flows of this family.
    #[expect(clippy::mut_from_ref, reason = "it is as if each run had its own")]
    fn bench<K: Kernel>(kernel: &K) -> Option<&mut Bench<N>>;

    /// How far remembered routes of this family can be relied on.
    fn trust<K: Kernel>(kernel: &K) -> Trust;

    /// Looks at a set of remembered routes of this family, or changes it.
    fn routes<K: Kernel, R>(
        kernel: &K,
        direction: Direction,
        destination: &Address<N>,
        look: impl FnOnce(&mut RouteSet<N>) -> R,
    ) -> Option<R>;

    /// Bytes of the whole packet, of which the frame held `available` from the start of this header
    /// on, and `beyond` what it did not: they may be more, but not less.
    fn whole(&self, available: usize, beyond: impl FnOnce() -> usize) -> Result<usize, Passed>;

    /// What the packet carries of which this header, which was just taken from `frame`, and what
    /// follows are `len` bytes.
    fn payload(&self, frame: &Frame<'_>, len: usize, reads: Reads) -> Result<Payload, Passed>;

    /// Goes on from this header, which was just taken from `frame`, to the transport header.
    /// `available` is what the frame held from the start of this header on, and `beyond` as in
    /// [`whole`](Self::whole).
    #[inline(always)]
    fn transport<'a>(
        &self,
        frame: &mut Frame<'a>,
        available: usize,
        beyond: impl FnOnce() -> usize,
    ) -> Result<Transport<'a>, Passed> {
        let payload = self.payload(frame, self.whole(available, beyond)?, Reads::Whole)?;
        payload.transport(frame)
    }

    /// Sets the address that `direction` translates, takes `hops` (less than [`ttl`](Self::ttl)) off,
    /// and repairs the header's own checksum. Returns what changed for the pseudo header.
    fn rewrite(&mut self, direction: Direction, address: Address<N>, hops: u8) -> Change;
}

/// The length of a packet that is there.
#[inline(always)]
fn fits(length: usize, available: usize, beyond: impl FnOnce() -> usize) -> Result<usize, Passed> {
    let is_there = length <= available || length <= available.wrapping_add(beyond());
    if is_there { Ok(length) } else { Err(Passed::Malformed) }
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
    fn may_carry_icmp(&self) -> bool {
        self.proto == ICMP
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
    fn bench<K: Kernel>(kernel: &K) -> Option<&mut Bench<4>> {
        Flows::<4>::bench(kernel)
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
    fn whole(&self, available: usize, beyond: impl FnOnce() -> usize) -> Result<usize, Passed> {
        fits(self.tot_len().into(), available, beyond)
    }

    #[inline(always)]
    fn payload(&self, _frame: &Frame<'_>, len: usize, reads: Reads) -> Result<Payload, Passed> {
        let header = usize::from(self.vihl & 0xf) * 4;
        if self.vihl >> 4 != 4 || header < Self::LEN || header > len {
            return Err(Passed::Malformed);
        }
        // More fragments, or an offset (RFC 791).
        let [high, low] = self.frags;
        let is_fragment = high & 0x3f != 0 || low != 0;
        if is_fragment && reads == Reads::Whole {
            return Err(Passed::Fragment);
        }
        let fragment = Fragment {
            identification: [0, 0, self.id[0], self.id[1]],
            offset: u16::from_be_bytes([high & 0x1f, low]) << 3,
            more: high >> 5 & 1,
        };
        let (offset, len) = (header - Self::LEN, len - header);
        Ok(Payload { protocol: self.proto, offset, len, fragment })
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

/// Bytes of extension headers that are read past: a page, which no piece of a frame in XDP is longer than.
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
    fn may_carry_icmp(&self) -> bool {
        !matches!(self.next_hdr, TCP | UDP)
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
    fn bench<K: Kernel>(kernel: &K) -> Option<&mut Bench<16>> {
        Flows::<16>::bench(kernel)
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
    fn whole(&self, available: usize, beyond: impl FnOnce() -> usize) -> Result<usize, Passed> {
        fits(usize::from(self.payload_len()) + Self::LEN, available, beyond)
    }

    #[inline(always)]
    fn payload(&self, frame: &Frame<'_>, len: usize, reads: Reads) -> Result<Payload, Passed> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const AUTHENTICATION: u8 = 51;
        const DESTINATION: u8 = 60;

        if self.vcf[0] >> 4 != 6 {
            return Err(Passed::Malformed);
        }
        let mut len = len.checked_sub(Self::LEN).ok_or(Passed::Malformed)?;
        let mut protocol = self.next_hdr;
        let mut offset = 0;
        let (mut fragment, mut is_fragment) = (Fragment::default(), false);
        for _ in 0..=reads.extension_headers() {
            // What a later fragment has is the rest of something.
            let starts = fragment.offset == 0;
            match protocol {
                HOP_BY_HOP | ROUTING | DESTINATION if starts => {}
                FRAGMENT if reads == Reads::Whole => return Err(Passed::Fragment),
                FRAGMENT if starts && !is_fragment => {}
                FRAGMENT | AUTHENTICATION if starts => return Err(Passed::Extension),
                _ => {
                    // To the verifier all numbers of headers are alike then, and what follows is
                    // looked at once.
                    if offset > LONGEST_EXTENSIONS {
                        return Err(Passed::Extension);
                    }
                    return Ok(Payload { protocol, offset, len, fragment });
                }
            }
            let extension: ExtensionHdr = frame.peek(offset).ok_or(Passed::Malformed)?;
            // On its way through a source route the destination is not the one of the pseudo header.
            if protocol == ROUTING && extension.segments_left != 0 {
                return Err(Passed::Extension);
            }
            let mut size = size_of::<ExtensionHdr>() + usize::from(extension.len) * 8;
            if protocol == FRAGMENT {
                // RFC 8200, section 4.5: of 16 bits the upper 13 are the offset in units of eight.
                let place = u16::from_be_bytes([extension.kind, extension.segments_left]);
                size = size_of::<ExtensionHdr>();
                is_fragment = true;
                fragment = Fragment {
                    identification: extension.rest,
                    offset: place & !7,
                    more: place as u8 & 1,
                };
            }
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
