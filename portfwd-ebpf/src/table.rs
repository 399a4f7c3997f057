//! What the maps hold: the contract between the eBPF program and the control plane.
//!
//! Every type is `repr(C)`, of bytes and integers with explicit padding, so that its bytes are the
//! same on both sides. [`LAYOUT`] changes with any of them.

use core::mem::{align_of, size_of};

use crate::packet::forgotten;

/// The version of everything in this module; it stands in [`Settings`], so that halves of different
/// builds refuse each other.
pub const LAYOUT: u32 = if cfg!(feature = "other-layout") { u32::MAX } else { 6 };

/// The version of what one set of programs leaves to the next: the keys and values of `FLOWS`, `PROBATION`,
/// `MAPPINGS`, `CLIENTS`, `ARRIVALS` and `FRAGMENTS`, and how places in `FLOWS` are found.
pub const KEPT: u32 = 1;

/// A port: two bytes in network order.
// Aligned as a number is, like the addresses below: on the BPF stack nothing else is allowed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(C, align(2))]
pub struct Port(pub [u8; 2]);

impl Port {
    /// Of what has no ports.
    pub const NONE: Self = Self([0; 2]);

    /// The port with this number.
    pub const fn new(number: u16) -> Self {
        Self(number.to_be_bytes())
    }

    /// The number of this port.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be_bytes(self.0)
    }

    /// The port that a [`Shift`] leads to.
    #[inline(always)]
    pub const fn shifted(self, shift: Shift) -> Self {
        Self::new(self.number().wrapping_add(shift.0))
    }
}

/// The distance from a port to the port it is translated to, modulo 65,536.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct Shift(pub u16);

impl Shift {
    /// The shift that turns `from` into `to`.
    pub const fn between(from: u16, to: u16) -> Self {
        Self(to.wrapping_sub(from))
    }

    /// The way back.
    pub const fn inverse(self) -> Self {
        Self(self.0.wrapping_neg())
    }
}

/// An IP address of `N` bytes in network order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(C, align(4))]
pub struct Address<const N: usize>(pub [u8; N]);

/// An address of either family in one size: an IPv4 address stands in the first four bytes and the
/// rest is zero. Which family it is follows from where it stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C, align(8))]
pub struct AnyAddress(pub [u8; 16]);

impl<const N: usize> Address<N> {
    /// This address in the size of either family.
    #[inline(always)]
    pub fn widen(self) -> AnyAddress {
        const { assert!(N == 4 || N == 16) };
        let mut bytes = [0; 16];
        if N == 4 {
            // A whole word: on the BPF stack, zeros that begin in the middle of one are not allowed.
            let word =
                self.0.first_chunk().map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)));
            bytes[..8].copy_from_slice(&word.to_le_bytes());
        } else {
            bytes[..N].copy_from_slice(&self.0);
        }
        AnyAddress(bytes)
    }
}

impl<const N: usize> Address<N> {
    /// This address in IPv6's size: one of IPv4 as the IPv6 address that stands for it, `::ffff:a.b.c.d`
    /// (RFC 4291, section 2.5.5.2).
    #[inline(always)]
    pub fn mapped(self) -> Address<16> {
        const { assert!(N == 4 || N == 16) };
        let mut bytes = [0; 16];
        if N == 4 {
            // A whole word, as above.
            let address =
                self.0.first_chunk().map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)));
            bytes[8..].copy_from_slice(&(address << 32 | 0xffff_0000).to_le_bytes());
        } else {
            bytes.copy_from_slice(&self.0);
        }
        Address(bytes)
    }

    /// Whether it stands for an address of IPv4.
    #[inline(always)]
    pub fn is_mapped(&self) -> bool {
        let words = self.0.as_chunks::<4>().0;
        let word = |place: usize| words.get(place).map_or(0, |word| u32::from_be_bytes(*word));
        N == 16 && word(0) | word(1) | word(2) ^ 0xffff == 0
    }

    /// The same [in one size](Self::widen); one that [stands](Self::mapped) for an address of IPv4 as that.
    #[inline(always)]
    pub fn widen_unmapped(self) -> AnyAddress {
        if self.is_mapped() { self.unmapped().widen() } else { self.widen() }
    }

    /// The address of IPv4 that this stands for.
    #[inline(always)]
    pub fn unmapped(&self) -> Address<4> {
        let [.., a, b, c, d] = self.widen().0;
        Address([a, b, c, d])
    }
}

impl AnyAddress {
    /// Whether it is the same as another, without a branch for each part.
    #[inline(always)]
    pub fn is(&self, other: &Self) -> bool {
        Address(self.0).difference(&Address(other.0)) == 0
    }

    /// The address of `N` bytes that was [widened](Address::widen) to this.
    #[inline(always)]
    pub fn narrow<const N: usize>(&self) -> Address<N> {
        const { assert!(N <= 16) };
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[..N]);
        Address(bytes)
    }
}

/// Which end of a packet is translated.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Direction {
    /// Client to backend: the destination.
    Forward = 0,
    /// Backend to client: the source.
    Reply = 1,
}

impl Direction {
    /// The other one.
    #[inline(always)]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Forward => Self::Reply,
            Self::Reply => Self::Forward,
        }
    }
}

/// Value of `ENDPOINTS`, to which `LISTENS_V4` and `LISTENS_V6` lead from an address that rules listen
/// on, and `BACKENDS_V4` and `BACKENDS_V6` from the address of a backend: what rules claim there, in
/// two generations of which [`Settings::generation`] names the live one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Endpoint {
    pub generations: [Claims; 2],
}

/// What rules claim at an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Claims {
    pub tcp: Ports,
    pub udp: Ports,
    /// Of all other protocols, by protocol number in place of a port.
    pub other: Ports,
}

/// From port to row of `TRANSLATIONS`, for one address and protocol.
///
/// Where one row serves all ports from `first` to `last`, as with most backends, that is all. Else
/// `first` is greater than `last`, and `row` is the root of a page table over the 65,536 ports: a
/// row of `PAGES`, from a port's high byte to a second row of `PAGES`, from its low byte to the row
/// of `TRANSLATIONS`. 0 is none everywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Ports {
    /// In host byte order, like `last`.
    pub first: u16,
    pub last: u16,
    pub row: u32,
}

impl Ports {
    /// No port.
    pub const NONE: Self = Self::paged(0);

    /// The ports from `first` to `last`, all to `row` of `TRANSLATIONS`.
    pub const fn range(first: u16, last: u16, row: u32) -> Self {
        Self { first, last, row }
    }

    /// A page table with this root.
    pub const fn paged(root: u32) -> Self {
        Self { first: 1, last: 0, row: root }
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self::NONE
    }
}

/// Value of `PAGES`: half of a page table; see [`Ports`]. Equal pages are one page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct Page(pub [u32; 256]);

/// Value of `TRANSLATIONS`: what becomes of the end of a packet that a rule claims.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct Translation {
    /// The new address, of the family of the endpoint that leads here; with [`CROSS`](Self::CROSS) as
    /// [`Address::mapped`] has it.
    pub address: AnyAddress,
    /// What to add to the port; with [`ONE_PORT`](Self::ONE_PORT) the port's number itself.
    pub shift: Shift,
    /// With [`SEVERAL`](Self::SEVERAL): how many backends the rule has, at most [`MOST_BACKENDS`].
    pub backends: u16,
    #[cfg(feature = "other-layout")]
    pub pool: u32,
    /// The constants below.
    pub flags: u32,
    /// The rule's row in `COUNTERS`.
    pub counter: u32,
    /// With [`SEVERAL`](Self::SEVERAL): a row of `PAGES` that holds the backends' rows of
    /// `TRANSLATIONS`.
    #[cfg(not(feature = "other-layout"))]
    pub pool: u32,
}

/// How many backends a rule may have: what a page holds.
pub const MOST_BACKENDS: usize = 256;

impl Translation {
    /// The rule could swallow the box's own traffic: pass what a socket of the box is open for.
    pub const ASK_SOCKETS: u32 = 1;
    /// The rule listens on several addresses: a client that came by another than the first has an
    /// entry in `ARRIVALS`.
    pub const MANY_ADDRESSES: u32 = 2;
    /// On forward, beside [`MANY_ADDRESSES`](Self::MANY_ADDRESSES): this is the first of them.
    pub const FIRST_ADDRESS: u32 = 4;
    /// What becomes of a packet is for its flow to say.
    pub const STATEFUL: u32 = 8;
    /// On forward, beside [`STATEFUL`](Self::STATEFUL): the backend sees an address of this box.
    pub const MASQUERADE: u32 = 16;
    /// On forward, beside [`STATEFUL`](Self::STATEFUL): all ports become one.
    pub const ONE_PORT: u32 = 32;
    /// On forward, beside [`STATEFUL`](Self::STATEFUL): one of several backends is chosen for a flow.
    pub const SEVERAL: u32 = 64;
    /// On reply, beside [`STATEFUL`](Self::STATEFUL): what is of no flow is translated as by a stateless
    /// rule.
    pub const ALSO_ALONE: u32 = 128;
    /// On forward, beside [`STATEFUL`](Self::STATEFUL): the backend is of the other address family. On reply:
    /// some rule leads to the backend from the other family.
    pub const CROSS: u32 = 256;

    /// Whether a flag is set.
    #[inline(always)]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// What a port becomes.
    #[inline(always)]
    pub const fn port(&self, port: Port) -> Port {
        if self.has(Self::ONE_PORT) { Port::new(self.shift.0) } else { port.shifted(self.shift) }
    }
}

/// Value of `MSS`, by the rule's row in `COUNTERS`: the largest MSS of TCP that goes through the rule.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct Mss(pub u16);

impl Mss {
    /// What fits the way.
    pub const AUTO: Self = Self(0);
    /// Any.
    pub const OFF: Self = Self(u16::MAX);
}

/// A flow's packets in one direction, as they come: key of `PROBATION_V4` and `PROBATION_V6`, and of the
/// entries of `FLOWS_V4` and `FLOWS_V6`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C, align(8))]
pub struct FlowKey<const N: usize> {
    pub source: Address<N>,
    pub destination: Address<N>,
    pub source_port: Port,
    pub destination_port: Port,
    /// IP protocol number.
    pub protocol: u8,
    /// [`Direction`], and [`CROSS`](Self::CROSS).
    pub direction: u8,
    pub padding: [u8; 2],
}

impl<const N: usize> FlowKey<N> {
    /// Added to the direction: the packets change their address family. All addresses are as
    /// [`Address::mapped`] has them.
    pub const CROSS: u8 = 2;

    /// Whether the packets change their address family.
    #[inline(always)]
    pub const fn crosses(&self) -> bool {
        self.direction & Self::CROSS != 0
    }

    /// The key of the answers.
    #[inline(always)]
    pub const fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            direction: self.direction ^ 1,
            ..self
        }
    }

    /// The end that a direction translates.
    #[inline(always)]
    pub const fn end(&self, direction: Direction) -> (Address<N>, Port) {
        match direction {
            Direction::Forward => (self.destination, self.destination_port),
            Direction::Reply => (self.source, self.source_port),
        }
    }
}

impl<const N: usize> FlowKey<N> {
    /// Whether it is the same as another. Without a branch for each part, as the verifier follows each.
    #[inline(always)]
    pub fn is(&self, other: &Self) -> bool {
        let ports = |key: &Self| {
            u32::from(key.source_port.number()) << 16 | u32::from(key.destination_port.number())
        };
        let kind = |key: &Self| u32::from(key.protocol) << 8 | u32::from(key.direction);
        self.source.difference(&other.source)
            | self.destination.difference(&other.destination)
            | (ports(self) ^ ports(other))
            | (kind(self) ^ kind(other))
            == 0
    }
}

/// Of the key of an entry: see [`Candidate::mark`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Mark(u32);

impl<const N: usize> FlowKey<N> {
    #[inline(always)]
    pub fn mark(&self) -> Mark {
        let ports =
            u32::from(self.source_port.number()) << 16 | u32::from(self.destination_port.number());
        let mut mark = ports ^ u32::from(self.protocol) ^ u32::from(self.direction) << 8;
        for end in [&self.source, &self.destination] {
            for word in end.0.as_chunks::<4>().0 {
                mark = (mark ^ u32::from_ne_bytes(*word)).wrapping_mul(0x9e37_79b1);
                mark ^= mark >> 15;
            }
        }
        Mark(mark)
    }
}

/// A packet's addresses and ports.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct Ends<const N: usize> {
    pub source: Address<N>,
    pub destination: Address<N>,
    pub source_port: Port,
    pub destination_port: Port,
}

impl<const N: usize> FlowKey<N> {
    #[inline(always)]
    pub const fn ends(&self) -> Ends<N> {
        let Self { source, destination, source_port, destination_port, .. } = *self;
        Ends { source, destination, source_port, destination_port }
    }

    #[inline(always)]
    const fn of(ends: Ends<N>, protocol: u8, direction: u8) -> Self {
        let Ends { source, destination, source_port, destination_port } = ends;
        let padding = [0; 2];
        Self { source, destination, source_port, destination_port, protocol, direction, padding }
    }

    /// What its last eight bytes say: ports, protocol and direction.
    const LAST_WORD: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);

    /// Writes it in words, as it will be read: a CPU waits for a word that was just written in pieces.
    #[inline(always)]
    pub fn write_to(&self, to: &mut Self) {
        let (from, to) = ((&raw const *self).cast::<u64>(), (&raw mut *to).cast::<u64>());
        for word in 0..size_of::<Self>() / 8 {
            // SAFETY: of references, in bounds, aligned, and without padding. Volatile, so that the compiler
            // does not take it apart.
            unsafe { to.add(word).write_volatile(from.add(word).read()) };
        }
    }

    /// Where in a [table](crate::flow_table) it stands.
    #[inline(always)]
    pub fn hash(&self, seed: u64) -> u64 {
        const { assert!(size_of::<Self>().is_multiple_of(8) && align_of::<Self>() == 8) };
        let mut hash = seed;
        let words = size_of::<Self>() / 8;
        for word in 0..words {
            let mask = if word + 1 == words { Self::LAST_WORD } else { !0 };
            // SAFETY: in bounds, aligned, and without padding.
            hash ^= unsafe { (&raw const *self).cast::<u64>().add(word).read() } & mask;
            // Half of the finalizer of MurmurHash3.
            hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
        }
        // The other half: without it the ports of one client stand in steps that are all the same.
        hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        hash ^ hash >> 33
    }
}

/// Value of `FLOWS_V4` and `FLOWS_V6`, each at a place of a [hash table](crate::flow_table): one direction
/// of an established flow. One of IPv4 is a cache line, one of IPv6 two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(8))]
pub struct FlowHalf<const N: usize> {
    /// Whether this is an entry, and which others are near: the table's own.
    pub(crate) place: Place,
    /// When the flow began.
    pub created: Moment,
    /// What the packets are as they come.
    pub came: Ends<N>,
    /// IP protocol number.
    pub protocol: u8,
    /// As [`FlowKey`]'s.
    pub direction: u8,
    /// The constants below, of what came in this direction.
    pub flags: u16,
    /// What the packets are from now on. Reversed, it is what those of the other direction come with.
    pub goes: Ends<N>,
    /// The rule's row in `COUNTERS`.
    pub counter: u32,
    /// When the last packet came.
    pub last: Jiffies,
    /// The packets that came. What two CPUs count at once is counted once.
    pub tally: Tally,
}

/// A value that begins with a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Lines<T>(pub T);

impl<const N: usize> FlowHalf<N> {
    /// Nothing.
    // SAFETY: integers, and arrays of them.
    pub const EMPTY: Self = unsafe { core::mem::zeroed() };

    /// Becomes the entry of `key`, whose packets become `becomes`.
    // In place: another beside it is more than the stack has room for.
    #[inline(always)]
    pub fn fill(
        &mut self,
        key: &FlowKey<N>,
        becomes: &FlowKey<N>,
        counter: u32,
        flags: u32,
        created: Moment,
    ) {
        self.created = created;
        self.came = key.ends();
        (self.protocol, self.direction, self.flags) = (key.protocol, key.direction, flags as u16);
        self.goes = becomes.ends();
        self.counter = counter;
        self.last = created.ticks();
        self.tally = Tally::default();
    }

    /// Becomes the entry of the other direction.
    #[inline(always)]
    pub fn reverse(&mut self) {
        core::mem::swap(&mut self.came.source, &mut self.goes.destination);
        core::mem::swap(&mut self.came.destination, &mut self.goes.source);
        core::mem::swap(&mut self.came.source_port, &mut self.goes.destination_port);
        core::mem::swap(&mut self.came.destination_port, &mut self.goes.source_port);
        self.direction ^= 1;
    }

    /// Whether this is the half of what clients send.
    #[inline(always)]
    pub const fn is_forward(&self) -> bool {
        self.direction & !FlowKey::<N>::CROSS == Direction::Forward as u8
    }

    /// The packets as they come.
    #[inline(always)]
    pub const fn key(&self) -> FlowKey<N> {
        FlowKey::of(self.came, self.protocol, self.direction)
    }

    /// The same where it is: the flags stand in its padding, at which nobody looks.
    #[inline(always)]
    pub(crate) fn as_key(&self) -> &FlowKey<N> {
        const {
            assert!(core::mem::offset_of!(Self, came).is_multiple_of(8));
            assert!(core::mem::offset_of!(FlowKey<N>, protocol) == size_of::<Ends<N>>());
            assert!(core::mem::offset_of!(Self, flags) + 2 - 8 == size_of::<FlowKey<N>>());
        }
        // SAFETY: the same fields in the same places, and aligned, as was asserted.
        unsafe { &*(&raw const self.came).cast() }
    }

    /// What they are from now on. Reversed, it is the key of the other direction.
    #[inline(always)]
    pub const fn becomes(&self) -> FlowKey<N> {
        FlowKey::of(self.goes, self.protocol, self.direction)
    }

    /// Whether this is of `key`, and was when what was read before was read: who looks asks last, as
    /// others remove and add entries meanwhile.
    // The processor may read in another order, on arm64; and what else is read by plain loads the compiler may
    // put behind this: it did so with a copy of all, not in the programs.
    #[inline(always)]
    pub fn is(&self, key: &FlowKey<N>) -> bool {
        let differs = self.differs(key);
        // SAFETY: of a reference.
        let place = unsafe { (&raw const self.place).read_volatile() };
        differs | u64::from(!place.is_live()) == 0
    }

    /// Bits in which its key and another differ in any of their words. Without a branch for each, as the
    /// verifier follows each.
    #[inline(always)]
    pub(crate) fn differs(&self, key: &FlowKey<N>) -> u64 {
        const { assert!(size_of::<FlowKey<N>>() == size_of::<Ends<N>>() + 4) };
        const { assert!(core::mem::offset_of!(Self, came).is_multiple_of(8)) };
        let words = size_of::<FlowKey<N>>() / 8;
        let (own, other) = ((&raw const self.came).cast::<u64>(), (&raw const *key).cast::<u64>());
        let mut differs = 0;
        for word in 0..words {
            let mask = if word + 1 == words { FlowKey::<N>::LAST_WORD } else { !0 };
            // SAFETY: both begin with the ends, four bytes follow them, and both are aligned. Volatile, so
            // that it is read after what was read before.
            differs |= unsafe { own.add(word).read_volatile() ^ other.add(word).read() } & mask;
        }
        differs
    }
}

/// What the [table of flows](crate::flow_table) notes at a place. It is changed in one step, together with the
/// word behind it, which that leaves as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct Place(u32);

impl Place {
    /// Something is here, or about to be.
    pub(crate) const TAKEN: u32 = 1 << 31;
    /// An entry is here.
    pub(crate) const LIVE: u32 = 1 << 30;
    /// Somebody adds an entry whose first home is here.
    pub(crate) const LOCKED: u32 = 1 << 29;

    #[inline(always)]
    pub(crate) const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// Whether an entry is here.
    #[inline(always)]
    pub const fn is_live(self) -> bool {
        self.has(Self::LIVE)
    }

    /// Where bits of it are in the word of eight bytes that begins with it.
    #[inline(always)]
    pub(crate) const fn in_word(bits: u32) -> u64 {
        (bits as u64) << Self::SHIFT
    }

    /// Of a word of eight bytes that begins with it.
    #[inline(always)]
    pub(crate) const fn word(word: u64) -> u32 {
        (word >> Self::SHIFT) as u32
    }

    const SHIFT: u32 = if cfg!(target_endian = "little") { 0 } else { 32 };
}

/// Value of `PROBATION_V4` and `PROBATION_V6`, under the key of its reply: a flow whose client did not
/// show yet that it hears the answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Candidate<const N: usize> {
    /// Of its key. The kernel gives the memory of an entry that is removed to the next at once, while
    /// packets look at it. It writes this first, so who reads it last knows whose the rest was.
    pub mark: Mark,
    /// The rule's row in `COUNTERS`.
    pub counter: u32,
    /// What a reply is from now on. Reversed, it is the key of the forward direction.
    pub becomes: FlowKey<N>,
    /// When the last packet of either direction came.
    pub last: Jiffies,
    pub created: Moment,
    /// The constants below.
    pub flags: u32,
    /// What the client will acknowledge if the backend's SYN and ACK reached it.
    pub proof: u32,
    pub padding: u32,
    /// By [`Direction`].
    pub tallies: [Tally; 2],
}

/// A time in units of 16 ticks, which half the bits are enough for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct Moment(u32);

impl From<Jiffies> for Moment {
    #[inline(always)]
    fn from(ticks: Jiffies) -> Self {
        Self((ticks.0 >> 4) as u32)
    }
}

impl Moment {
    #[inline(always)]
    pub const fn ticks(self) -> Jiffies {
        Jiffies((self.0 as u64) << 4)
    }
}

/// Flags of [`FlowHalf`] and [`Candidate`].
pub mod flow_flags {
    /// A TCP FIN came.
    pub const FIN: u32 = 1;
    /// A TCP RST came.
    pub const RESET: u32 = 2;
    /// The backend answered.
    pub const ANSWERED: u32 = 4;
    /// The client is on an internal interface.
    pub const HAIRPIN: u32 = 8;
    /// [`Candidate::proof`](super::Candidate::proof) is known.
    pub const PROOF: u32 = 16;
}

/// Key of `MAPPINGS`: an address and port of this box that a client may have.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct MappingKey {
    pub address: AnyAddress,
    pub port: Port,
    /// IP protocol number.
    pub protocol: u8,
    pub padding: [u8; 5],
}

impl MappingKey {
    /// The one that packets of this source have. The families that clients are of share the ports of an
    /// address.
    #[inline(always)]
    pub fn of<const N: usize>(goes: &FlowKey<N>) -> Self {
        let address = match goes.crosses() {
            true => goes.source.widen_unmapped(),
            false => goes.source.widen(),
        };
        Self { address, port: goes.source_port, protocol: goes.protocol, padding: [0; 5] }
    }
}

/// Value of `MAPPINGS`: who has the port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Mapping {
    pub client: AnyAddress,
    /// When a flow of it last began or, before it was established, had a packet.
    pub last: Jiffies,
    pub port: Port,
    pub padding: [u8; 2],
    /// 1 once a flow of it was established: until then another client may take it over.
    pub established: u32,
}

/// Key of `CLIENTS`: a client and an address of this box. The value is the port that it has there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct ClientKey {
    pub client: AnyAddress,
    pub address: AnyAddress,
    pub port: Port,
    /// IP protocol number.
    pub protocol: u8,
    pub padding: [u8; 5],
}

/// Key of `ARRIVALS`: one client's traffic with one backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ArrivalKey {
    pub client: AnyAddress,
    pub backend: AnyAddress,
    pub client_port: Port,
    pub backend_port: Port,
    /// IP protocol number.
    pub protocol: u8,
    pub padding: [u8; 3],
}

/// Key of `FRAGMENTS`: what the fragments of one packet have in common.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct FragmentKey {
    pub source: AnyAddress,
    pub destination: AnyAddress,
    /// IPv4's in the last two bytes.
    pub identification: [u8; 4],
    /// AF_INET or AF_INET6.
    pub family: u8,
    /// IP protocol number of IPv4; IPv6 does not tell packets apart by it.
    pub protocol: u8,
    pub direction: Direction,
    pub padding: u8,
}

/// Value of `FRAGMENTS`: what became of the first fragment, which alone has the ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct FirstFragment {
    /// Of its key, as in [`FlowHalf`].
    pub mark: Mark,
    /// The rule's row in `COUNTERS`.
    pub counter: u32,
    /// The constants below.
    pub flags: u32,
    pub padding: u32,
    /// The new address of the end that is translated.
    pub address: AnyAddress,
    /// With [`OF_FLOW`](Self::OF_FLOW): the new address of the other end.
    pub other: AnyAddress,
    /// From then on it is another packet that has the identification.
    pub until: Jiffies,
}

impl FirstFragment {
    /// A flow said what became of it.
    pub const OF_FLOW: u32 = 1;
    /// It goes to a client on an internal interface.
    pub const HAIRPIN: u32 = 2;
    /// The address of the other end stays as it came.
    pub const STAYS: u32 = 4;

    /// Whether this is of `key`, and was when the rest was read.
    #[inline(always)]
    pub fn is(&self, key: &FragmentKey) -> bool {
        // SAFETY: of a reference; volatile, so that it is read after the rest.
        unsafe { (&raw const self.mark).read_volatile() == key.mark() }
    }
}

impl FragmentKey {
    #[inline(always)]
    pub fn mark(&self) -> Mark {
        let kind = u32::from(self.family) << 16
            | u32::from(self.protocol) << 8
            | u32::from(self.direction as u8);
        let mut mark = u32::from_ne_bytes(self.identification) ^ kind;
        for end in [&self.source, &self.destination] {
            for word in end.0.as_chunks::<4>().0 {
                mark = (mark ^ u32::from_ne_bytes(*word)).wrapping_mul(0x9e37_79b1);
                mark ^= mark >> 15;
            }
        }
        Mark(mark)
    }
}

/// Value of the single row of `ANSWERS`, per CPU: how many ICMP errors may be sent. A token bucket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Bucket {
    /// Answers, times ticks of a second.
    level: u64,
    filled: Jiffies,
}

impl Bucket {
    /// Answers in a second, and at once after a pause.
    pub const RATE: u64 = 1000;
    pub const BURST: u64 = 100;

    /// Takes an answer out, if there is one, of a clock that has `second` ticks in a second.
    #[inline(always)]
    pub fn take(&mut self, now: Jiffies, second: u64) -> bool {
        let ticks = now.0.wrapping_sub(self.filled.0).min(second);
        self.filled = now;
        self.level = (self.level + ticks * Self::RATE).min(Self::BURST * second);
        if self.level < second {
            return false;
        }
        self.level -= second;
        true
    }
}

/// Value of `INTERFACES`, by interface index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Interface {
    /// The constants below.
    pub flags: u32,
    /// Bytes of the largest IP packet that a wire would bring.
    pub mtu: u32,
    /// Its row in `DEVICES`.
    pub device: u32,
    /// The box's own address there, for masquerade; zero is none.
    pub v4: Address<4>,
    pub v6: Address<16>,
}

impl Interface {
    /// Clients are there: reply translations apply to what leaves by it.
    pub const EXTERNAL: u32 = 1;
    /// Backends are there: forward translations apply to what leaves by it.
    pub const INTERNAL: u32 = 2;
    /// XDP frames can be redirected to it, by `device`. What XDP has for another goes through the stack.
    pub const TRANSMITS: u32 = 4;
    /// Its packets have no link header.
    pub const BARE: u32 = 8;
    /// With [`TRANSMITS`](Self::TRANSMITS): frames in several pieces can be, too.
    pub const TRANSMITS_PIECES: u32 = 16;

    /// Whether a flag is set.
    #[inline(always)]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// The box's own address of `N` bytes there; zero is none.
    #[inline(always)]
    pub fn address<const N: usize>(&self) -> Address<N> {
        if N == 4 { self.v4.widen().narrow() } else { self.v6.widen().narrow() }
    }
}

/// Value of the single row of `SETTINGS`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Settings {
    /// [`LAYOUT`].
    pub layout: u32,
    /// The generation of endpoints that is live, 0 or 1. One write to it changes all rules at once.
    pub generation: u32,
    /// By [`Direction`]: an address that is found without a lookup.
    pub favourites: [Favourite; 2],
    /// The ports for masquerade, first and last, in host byte order.
    pub masquerade: [u16; 2],
    /// A random number, so that nobody outside knows which ports a client gets.
    pub seed: u32,
}

/// An entry of `LISTENS_V4` or `BACKENDS_V4` that stands in [`Settings`] too: on most boxes there is
/// one address to listen on, and its packets need no hash. Never changed but from none or to none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(8))]
pub struct Favourite {
    pub address: Address<4>,
    /// Of `ENDPOINTS`.
    pub row: u32,
}

impl Favourite {
    /// Leads nowhere.
    pub const NONE: Self = Self { address: Address([0; 4]), row: u32::MAX };
}

/// The link addresses of a frame, as they begin it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C, align(4))]
pub struct LinkAddresses([u8; 12]);

impl LinkAddresses {
    pub const fn new(destination: [u8; 6], source: [u8; 6]) -> Self {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (destination, source);
        Self([a, b, c, d, e, f, g, h, i, j, k, l])
    }

    /// The destination's six bytes, then the source's.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 12]) -> Self {
        Self(bytes)
    }

    /// The destination's six bytes, then the source's.
    #[inline(always)]
    pub const fn bytes(&self) -> [u8; 12] {
        self.0
    }

    /// Whether the destination is a group: the first bit on the wire.
    #[inline(always)]
    pub const fn is_group(&self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Whether the destination is all zeros, which nobody has.
    #[inline(always)]
    pub fn is_unknown(&self) -> bool {
        let [a, b, c, d, e, f, ..] = self.0;
        a | b | c | d | e | f == 0
    }
}

/// Where a frame goes that can be redirected at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C, align(8))]
pub struct Hop {
    /// Of the hook that remembers it: see [`Verdict::Redirect`](crate::path::Verdict::Redirect).
    pub device: u32,
    /// Bytes of the largest IP packet that may go this way.
    pub mtu: u32,
    pub link: LinkAddresses,
    pub padding: u32,
}

/// A time in ticks of the kernel's clock, of which the configuration of the kernel says how many make
/// a second. Reading it is an instruction or two; CLOCK_MONOTONIC, also the coarse one, took a third
/// of what a translated packet costs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
#[repr(transparent)]
pub struct Jiffies(pub u64);

impl Jiffies {
    /// How many ticks after `then` this is; none if it is before.
    #[inline(always)]
    pub const fn since(self, then: Self) -> u64 {
        self.0.saturating_sub(then.0)
    }
}

/// Value of `TRUST`, row 0 for IPv4 and 1 for IPv6: how far the programs may rely on what the FIB
/// told before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Trust {
    /// A new one voids every route that is remembered. 0: the FIB is asked for each packet.
    pub generation: u32,
    pub padding: u32,
    /// From then on nobody has looked after the generation.
    pub until: Jiffies,
}

/// Where programs are attached, as far as ways out depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Hook {
    Xdp,
    Tc,
}

/// Under which a route was remembered: a generation of [`Trust`], a direction and a hook. 0 is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct Tag(u32);

impl Tag {
    pub const NONE: Self = Self(0);

    /// The upper two bits of a generation are not looked at.
    #[inline(always)]
    pub const fn new(generation: u32, direction: Direction, hook: Hook) -> Self {
        Self(generation << 2 | (hook as u32) << 1 | direction as u32)
    }
}

/// Value of `HOPS`, by CPU, family, direction and a hash of the hop: a way that the FIB told of, under a
/// tag. Many destinations share it, as they do a gateway, so it is not written over while its tag holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct RememberedHop {
    pub tag: Tag,
    pub padding: u32,
    pub hop: Hop,
}

impl RememberedHop {
    /// Makes this the row of `hop` under `tag`. False if it is another's.
    #[inline(always)]
    pub fn claim(&mut self, tag: Tag, hop: &Hop) -> bool {
        if self.tag == tag {
            return self.hop == *hop;
        }
        *self = Self { tag, padding: 0, hop: *hop };
        true
    }
}

/// Value of `ROUTES_V4` and `ROUTES_V6`, by CPU, direction and a hash of the destination: the last two
/// destinations that were asked for, the later first, each with its tag and its row of `HOPS`. Small,
/// so that those of ten thousand clients stay in the CPU's own cache. The directions do not share
/// sets: a flood of clients cannot push out the ways to backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct RouteSet<const N: usize>([RememberedRoute<N>; 2]);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
struct RememberedRoute<const N: usize> {
    destination: Address<N>,
    tag: Tag,
    hop: u32,
}

impl<const N: usize> RememberedRoute<N> {
    const NONE: Self = Self { destination: Address([0; N]), tag: Tag(0), hop: 0 };

    /// Without a branch for each word: it is faster, and shorter to verify.
    #[inline(always)]
    fn is(&self, destination: &Address<N>, tag: Tag) -> bool {
        (self.tag.0 ^ tag.0) | self.destination.difference(destination) == 0
    }
}

impl<const N: usize> RouteSet<N> {
    /// Nothing is remembered.
    pub const EMPTY: Self = Self([RememberedRoute::NONE; 2]);

    /// The row of `HOPS` to `destination` that was remembered under `tag`.
    #[inline(always)]
    pub fn find(&self, destination: &Address<N>, tag: Tag) -> Option<u32> {
        let [later, earlier] = &self.0;
        if later.is(destination, tag) {
            return Some(later.hop);
        }
        earlier.is(destination, tag).then_some(earlier.hop)
    }

    /// Remembers the row to `destination` in place of the earlier one.
    #[inline(always)]
    pub fn remember(&mut self, destination: Address<N>, tag: Tag, hop: u32) {
        self.0[1] = self.0[0];
        self.0[0] = RememberedRoute { destination, tag, hop };
    }
}

/// Bits of the number of a CPU's row of `HOPS`.
pub const HOP_BITS: u32 = 13;

impl Hop {
    /// Which of a CPU's rows of `HOPS` is this one's, on the way to destinations of `N` bytes. Families,
    /// directions and hooks do not share rows: they have tags of their own, and who writes over a row with
    /// another tag relies on it that the one before never comes back.
    #[inline(always)]
    pub fn row<const N: usize>(&self, direction: Direction, hook: Hook) -> u32 {
        // Routes by one gateway may differ in their MTU.
        let mut sum = self.device ^ self.mtu << 10;
        for word in self.link.0.as_chunks::<4>().0 {
            sum = (sum ^ u32::from_ne_bytes(*word)).wrapping_mul(0x9e37_79b1);
            sum ^= sum >> 16;
        }
        let family = u32::from(N > 4);
        let kind = (hook as u32) << 2 | family << 1 | direction as u32;
        (sum << 3 | kind) & ((1 << HOP_BITS) - 1)
    }
}

impl<const N: usize> Address<N> {
    /// Whether it is the same as another, without a branch for each part.
    #[inline(always)]
    pub fn is(&self, other: &Self) -> bool {
        self.difference(other) == 0
    }

    /// Bits in which this address and another differ in any of their words.
    #[inline(always)]
    fn difference(&self, other: &Self) -> u32 {
        let words = self.0.as_chunks::<4>().0.iter().zip(other.0.as_chunks::<4>().0);
        words.fold(0, |bits, (a, b)| bits | (u32::from_ne_bytes(*a) ^ u32::from_ne_bytes(*b)))
    }

    /// Which of `1 << bits` sets of routes is this destination's: the upper bits of a product with
    /// 2^64 divided by the golden ratio (Knuth, The Art of Computer Programming 3, section 6.4).
    #[inline(always)]
    pub fn route_set(&self, bits: u32) -> u32 {
        let mut hash = 0u64;
        for word in self.0.as_chunks::<4>().0 {
            // As numbers, neighbours differ in the lowest bits, which the product spreads best.
            hash ^= u64::from(u32::from_be_bytes(*word));
            hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if N > 4 {
                hash ^= hash >> 32;
            }
        }
        (hash >> (64 - bits)) as u32
    }
}

/// What a packet is on a wire, where it may be several that the stack made one of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Size {
    pub packets: u32,
    /// Of their IP packets.
    pub bytes: u32,
}

impl Size {
    /// Of one IP packet of `length` bytes.
    #[inline(always)]
    pub const fn one(length: u16) -> Self {
        Self { packets: 1, bytes: length as u32 }
    }
}

/// Packets and the bytes of their IP packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Tally {
    pub packets: u64,
    pub bytes: u64,
}

impl Tally {
    /// Counts them.
    #[inline(always)]
    pub fn add(&mut self, size: Size) {
        self.packets += u64::from(size.packets);
        self.bytes += u64::from(size.bytes);
    }
}

/// Value of `COUNTERS`, per CPU: a rule's packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Counter {
    #[cfg(feature = "other-layout")]
    pub answered: u64,
    /// Translated packets by [`Direction`].
    pub translated: [Tally; 2],
    /// When the last packet was translated; 0 for never.
    pub last: Jiffies,
    /// Of the translated, how many went out through the stack, by [`ToStack`].
    pub to_stack: [u64; ToStack::COUNT],
    /// Packets that the rule claimed and that were dropped, by [`Dropped`].
    pub dropped: [u64; Dropped::COUNT],
    /// Flows that began.
    pub flows: u64,
    /// Packets of flows that could not be established, as the table is full. They were translated.
    pub crowded: u64,
    /// Of the dropped, how many were answered with an ICMP error.
    #[cfg(not(feature = "other-layout"))]
    pub answered: u64,
}

/// Declares the reasons of a verdict once: their numbers in the maps, their names for users, and
/// what they mean.
macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $reason:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum $name { $($(#[doc = $doc])+ $reason,)+ }

        impl $name {
            /// All of them; a reason's place is its number in the maps.
            pub const ALL: &[Self] = &[$(Self::$reason,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The same, of which the verifier knows nothing any more: see [`forgotten`].
            #[inline(always)]
            pub fn forgotten(self, nothing: u32) -> Self {
                let number = forgotten(self as u32, nothing) as usize;
                Self::ALL.get(number).copied().unwrap_or(Self::ALL[0])
            }

            /// The name that users see.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$reason => $text,)+ }
            }

            /// What it means, in a sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$reason => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    /// Why a packet went to the stack untouched.
    Passed {
        /// No rule listens there.
        NoRule = "no_rule",
        /// Neither IPv4 nor IPv6: ARP, for example.
        NotIp = "not_ip",
        /// Sent to a group address, broadcast or multicast, or to another host of the link.
        Group = "group",
        /// A VLAN tag: it belongs to another network.
        Vlan = "vlan",
        /// Lengths that contradict each other or the frame.
        Malformed = "malformed",
        /// A fragment whose first was not translated, or came later; or a first one without the ports.
        Fragment = "fragment",
        /// ICMP, but not about a rule's packets.
        Icmp = "icmp",
        /// Neither TCP nor UDP, and no DMZ host has it.
        Protocol = "protocol",
        /// IPv6 extension headers that hide the ports: too many, authentication, or a source route.
        Extension = "extension_header",
        /// A socket of this box is open for it.
        Own = "own_socket",
        /// A reply to a client's own address whose time to live ends here: the stack tells the backend.
        Ttl = "ttl_expired",
        /// From a backend, but not to a client: it does not leave by an external interface.
        Inside = "not_external",
        /// A reply to a client's own address, larger than its route's MTU: the stack tells the backend.
        TooBig = "too_big",
        /// Of no flow of a stateful rule: a backend's own packet, or one that comes too late.
        NoFlow = "no_flow",
    }
}

reasons! {
    /// Why a translated packet went out through the stack instead of being redirected.
    ToStack {
        /// The next hop's link address is not known yet; the stack resolves it.
        NoNeighbour = "no_neighbour",
        /// The egress interface cannot transmit XDP frames, or none that are larger than a page.
        NoTransmit = "no_xdp_transmit",
        /// Larger than its route's MTU; the stack fragments it.
        TooBig = "too_big",
        /// The route encapsulates.
        Encapsulated = "encapsulated",
        /// The backend or the client is this box itself.
        Local = "local",
    }
}

reasons! {
    /// Why a packet was dropped.
    Dropped {
        /// No route to the backend.
        NoRoute = "no_route",
        /// A route says unreachable.
        Unreachable = "unreachable",
        /// A route says blackhole.
        Blackhole = "blackhole",
        /// A route says prohibit.
        Prohibited = "prohibited",
        /// The route to the backend does not leave by an internal interface.
        NotInternal = "not_internal",
        /// Merged from several packets, whose checksums are lost: turn GRO off below the interface; with
        /// a veth, `ethtool -K IFACE tx off gro on` at its other end.
        Merged = "merged",
        /// Forwarding is off on the interface it came by (sysctl).
        ForwardingOff = "forwarding_off",
        /// None of the ports that were tried is free to tell this client's flow from others: see [masquerade] ports.
        NoPort = "no_port",
        /// The interface to the backend has no address to masquerade with.
        NoAddress = "no_address",
        /// The kernel had no memory for the flow.
        NoRoom = "no_room",
        /// Its time to live ended here; the sender is told.
        TtlExpired = "ttl_expired",
        /// Larger than its route's MTU, and not to be fragmented; the sender is told.
        TooBig = "too_big",
        /// The other IP version has no such packet: a fragment, options or extension headers, UDP without a checksum, some ICMP errors.
        NoCounterpart = "no_counterpart",
        /// There was no room before the packet for the other IP version's header.
        NoHeadroom = "no_headroom",
    }
}

// No hidden padding, and the sizes that the maps are made with.
const _: () = {
    assert!(size_of::<Address<4>>() == 4 && size_of::<Address<16>>() == 16);
    assert!(size_of::<Endpoint>() == 48 && align_of::<Endpoint>() == 4);
    assert!(size_of::<Page>() == 1024);
    assert!(size_of::<Translation>() == 32);
    assert!(size_of::<ArrivalKey>() == 40);
    assert!(size_of::<Settings>() == 32 && size_of::<Trust>() == 16);
    assert!(size_of::<Interface>() == 32);
    assert!(size_of::<FlowKey<4>>() == 16 && size_of::<FlowKey<16>>() == 40);
    assert!(size_of::<FlowHalf<4>>() == 64 && size_of::<FlowHalf<16>>() == 112);
    assert!(size_of::<Lines<FlowHalf<4>>>() == 64 && size_of::<Lines<FlowHalf<16>>>() == 128);
    assert!(size_of::<Candidate<4>>() == 80 && size_of::<Candidate<16>>() == 104);
    assert!(size_of::<MappingKey>() == 24 && size_of::<Mapping>() == 32);
    assert!(size_of::<ClientKey>() == 40);
    assert!(size_of::<RememberedHop>() == 32);
    assert!(size_of::<RouteSet<4>>() == 24 && size_of::<RouteSet<16>>() == 48);
    assert!(size_of::<FragmentKey>() == 40 && size_of::<FirstFragment>() == 56);
    assert!(size_of::<Bucket>() == 16);
    assert!(size_of::<Counter>() == 64 + 8 * (ToStack::COUNT + Dropped::COUNT));
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_lead_there_and_back_across_the_end_of_the_range() {
        for (from, to) in [(80, 8080), (8080, 80), (65535, 1), (1, 65535), (443, 443)] {
            let shift = Shift::between(from, to);
            assert_eq!(Port::new(from).shifted(shift), Port::new(to));
            assert_eq!(Port::new(to).shifted(shift.inverse()), Port::new(from));
        }
    }

    #[test]
    fn answers_are_as_many_as_the_rate_allows() {
        for second in [100, 250, 300, 1000] {
            let mut bucket = Bucket::default();
            let mut taken = |from: u64, ticks: u64| {
                let ticks = from..from + ticks;
                ticks.map(|now| (0..50).filter(|_| bucket.take(Jiffies(now), second)).count()).sum()
            };
            // What a pause saved, and then as much as comes.
            let first: usize = taken(1 << 32, second);
            assert!((1090..=1100).contains(&first), "{second}: {first}");
            let next: usize = taken((1 << 32) + second, second);
            assert!((990..=1001).contains(&next), "{second}: {next}");
        }
    }

    #[test]
    fn reasons_are_numbered_by_their_place() {
        for (place, reason) in Passed::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, place);
        }
        assert_eq!(Passed::NoRule.name(), "no_rule");
        assert_eq!(Passed::NoRule.meaning(), "No rule listens there.");
        assert_eq!(Dropped::ALL[0].name(), "no_route");
    }
}
