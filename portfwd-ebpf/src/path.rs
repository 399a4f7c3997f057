//! The packet's way: parse, claim, translation, route, rewrite, count, verdict.
//!
//! Everything is decided before the first byte is changed, so a packet that is passed leaves as it
//! came. The kernel is asked through [`Kernel`], so the same code runs on the host.

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::checksum::Change;
use crate::cross::Conversion;
use crate::detour::FragmentBench;
use crate::flow::{self, Added, Bench, Flows, Refused};
use crate::icmp::Icmp;
use crate::mss::Syn;
use crate::packet::{Check, EtherType, Frame, Ip, Link, Payload, Reads, Transport, forgotten};
use crate::table::{
    Address, AnyAddress, ArrivalKey, Bucket, Claims, ClientKey, Counter, Direction, Dropped,
    Endpoint, FirstFragment, FlowKey, FragmentKey, Hook, Hop, Interface, Jiffies, LinkAddresses,
    Mapping, MappingKey, Mss, Page, Passed, Port, Ports, RememberedHop, RouteSet, Size, Tag,
    ToStack, Translation, Trust,
};

/// Where an interface stands; a constant of each entry point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Clients are there: destinations are translated.
    External,
    /// Backends are there: sources are translated.
    Internal,
    /// Both are there.
    Both,
}

/// What becomes of a packet.
// With one number in all variants no byte is ever undefined, which the verifier minds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Translated; send it out by this device, which is the hook's number for it: see [`Kernel::device`].
    Redirect(u32),
    /// Translated; the stack sends it.
    Stack(ToStack),
    /// To the stack, untouched.
    Pass(Passed),
    /// Nothing more.
    Drop(Dropped),
    /// The [detour](crate::detour) of the direction decides, which is another program; without it the
    /// packet passes.
    ForwardDetour(Passed),
    ReplyDetour(Passed),
    /// Translated, but for the MSS: [`mss::handle`](crate::mss::handle) says what becomes of it, which is
    /// another program. With the rule's counter.
    Syn(u32),
    /// A flow decides, for which there is another program: [`handle_flow`] or
    /// [`detour::handle_flow`](crate::detour::handle_flow).
    Flow(Program),
}

impl Verdict {
    #[inline(always)]
    pub const fn detour(direction: Direction, reason: Passed) -> Self {
        match direction {
            Direction::Forward => Self::ForwardDetour(reason),
            Direction::Reply => Self::ReplyDetour(reason),
        }
    }
}

/// The parts of the way that flows decide: programs of their own, one for each family, so that stateless
/// rules never pay for them. Each starts anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Part {
    /// From a client outside, to a stateful rule.
    Forward,
    /// From a backend, and not for a stateless rule to answer a client outside.
    Reply,
    /// From a client inside, which may be a backend.
    Hairpin,
    /// Those of the [detour](crate::detour::FlowPart).
    FindForward,
    FindReply,
    SendForward,
    SendReply,
    /// To and from a backend of the other address family, by the family that packets [come](crate::cross) with.
    CrossForward,
    CrossReply,
    CrossFindForward,
    CrossFindReply,
    CrossSendForward,
    CrossSendReply,
}

impl Part {
    const ALL: [Self; 13] = [
        Self::Forward,
        Self::Reply,
        Self::Hairpin,
        Self::FindForward,
        Self::FindReply,
        Self::SendForward,
        Self::SendReply,
        Self::CrossForward,
        Self::CrossReply,
        Self::CrossFindForward,
        Self::CrossFindReply,
        Self::CrossSendForward,
        Self::CrossSendReply,
    ];
    /// How many programs there are.
    pub const PROGRAMS: u32 = 2 * Self::ALL.len() as u32;

    /// Its program for addresses of `N` bytes.
    #[inline(always)]
    pub const fn program<const N: usize>(self) -> Program {
        Program(2 * self as u32 + if N == 4 { 0 } else { 1 })
    }
}

/// A part of a family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Program(u32);

impl Program {
    /// Its place among all.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Which part it is, and whether it is IPv4's.
    pub const fn part(self) -> (Part, bool) {
        (Part::ALL[self.0 as usize / 2], self.0.is_multiple_of(2))
    }
}

/// A packet's addresses and ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// AF_INET or AF_INET6.
    pub family: u8,
    /// IP protocol number.
    pub protocol: u8,
    pub source_port: Port,
    pub destination_port: Port,
    pub source: AnyAddress,
    pub destination: AnyAddress,
}

impl Flow {
    /// Of a packet with these headers. Made where it is needed: most packets need none.
    #[inline(always)]
    fn of<const N: usize, I: Ip<N>>(ip: &I, transport: &Transport<'_>) -> Self {
        Self::between(ip, transport.protocol(), transport.ports())
    }

    /// As [`of`](Self::of), of any protocol; the ports are source and destination.
    #[inline(always)]
    pub fn between<const N: usize, I: Ip<N>>(
        ip: &I,
        protocol: u8,
        (source_port, destination_port): (Port, Port),
    ) -> Self {
        Self {
            family: I::FAMILY,
            protocol,
            source_port,
            destination_port,
            source: ip.source().widen(),
            destination: ip.destination().widen(),
        }
    }

    /// The end that a direction translates.
    #[inline(always)]
    pub(crate) fn end(&self, direction: Direction) -> (AnyAddress, Port) {
        match direction {
            Direction::Forward => (self.destination, self.destination_port),
            Direction::Reply => (self.source, self.source_port),
        }
    }

    /// This flow with one end translated.
    #[inline(always)]
    pub(crate) fn translated(self, direction: Direction, address: AnyAddress, port: Port) -> Self {
        match direction {
            Direction::Forward => Self { destination: address, destination_port: port, ..self },
            Direction::Reply => Self { source: address, source_port: port, ..self },
        }
    }

    /// The same, of whose protocol and ports the verifier knows nothing any more.
    #[inline(always)]
    pub(crate) fn forgotten(self, nothing: u32) -> Self {
        let port = |port: Port| Port::new(forgotten(port.number().into(), nothing) as u16);
        Self {
            protocol: forgotten(self.protocol.into(), nothing) as u8,
            source_port: port(self.source_port),
            destination_port: port(self.destination_port),
            ..self
        }
    }

    /// Of packets with this key.
    #[inline(always)]
    pub fn of_key<const N: usize>(ends: &FlowKey<N>) -> Self {
        Self {
            family: if N == 4 { Ipv4Hdr::FAMILY } else { Ipv6Hdr::FAMILY },
            protocol: ends.protocol,
            source_port: ends.source_port,
            destination_port: ends.destination_port,
            source: ends.source.widen(),
            destination: ends.destination.widen(),
        }
    }

    /// The same of packets that may [change](FlowKey::CROSS) their family, as they are to or from a backend.
    #[inline(always)]
    pub fn of_key_unmapped<const N: usize>(ends: &FlowKey<N>) -> Self {
        let is_forward = ends.direction & !FlowKey::<N>::CROSS == Direction::Forward as u8;
        let backend = if is_forward { &ends.destination } else { &ends.source };
        match ends.crosses() && backend.is_mapped() {
            true => Self {
                family: Ipv4Hdr::FAMILY,
                source: ends.source.unmapped().widen(),
                destination: ends.destination.unmapped().widen(),
                ..Self::of_key(ends)
            },
            false => Self::of_key(ends),
        }
    }

    /// The key of ARRIVALS, for a flow from client to backend.
    #[inline(always)]
    pub(crate) fn arrival(&self) -> ArrivalKey {
        ArrivalKey {
            client: self.source,
            backend: self.destination,
            client_port: self.source_port,
            backend_port: self.destination_port,
            protocol: self.protocol,
            padding: [0; 3],
        }
    }

    /// The same flow, seen from its other end.
    #[inline(always)]
    pub(crate) fn reversed(self) -> Self {
        Self {
            source: self.destination,
            source_port: self.destination_port,
            destination: self.source,
            destination_port: self.source_port,
            ..self
        }
    }
}

/// What the FIB told of a packet: the results of `bpf_fib_lookup`. It belongs to one run of a program, like
/// [`Bench`].
// Not an enum with the rest in it: the verifier minds what is undefined in one, and the stack has no room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Told {
    pub route: Route,
    /// The one by which it leaves, if there is one.
    pub interface: u32,
    /// The MTU that the packet is larger than; 0 if it is not.
    pub narrow: u32,
    /// Of [`Route::Via`], but for the device. The MTU is that of any way out; `u32::MAX` if it is not known.
    pub hop: Hop,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Route {
    /// By the interface, with the link addresses of the hop.
    Via,
    /// By the interface, whose neighbour is not resolved.
    NoNeighbour,
    /// Through a tunnel that the route itself encapsulates for.
    Encapsulated,
    /// To this box, or nowhere.
    NotForwarded,
    Unreachable,
    Blackhole,
    Prohibited,
    ForwardingOff,
    /// The box sends the packet itself, and its stack has chosen the way already.
    Chosen,
}

impl Told {
    /// The interface by which the packet leaves, if it is one of ours.
    #[inline(always)]
    pub(crate) fn leaves_by<K: Kernel>(&self, kernel: &K) -> Option<Interface> {
        match self.route {
            Route::Via | Route::NoNeighbour => kernel.interface(self.interface),
            _ => None,
        }
    }
}

/// What the path asks of the kernel: maps and helpers.
pub trait Kernel: Flows<4> + Flows<16> {
    /// The live generation of endpoints: 0 or 1.
    fn generation(&self) -> u32;
    fn endpoint_v4(&self, direction: Direction, address: &Address<4>) -> Option<&Endpoint>;
    fn endpoint_v6(&self, direction: Direction, address: &Address<16>) -> Option<&Endpoint>;
    fn page(&self, number: u32) -> Option<&Page>;
    fn translation(&self, number: u32) -> Option<&Translation>;
    /// How far remembered routes can be relied on.
    fn trust_v4(&self) -> Trust;
    fn trust_v6(&self) -> Trust;
    /// The set of the routes that this CPU remembers which is this destination's.
    fn routes_v4<R>(
        &self,
        direction: Direction,
        destination: &Address<4>,
        look: impl FnOnce(&mut RouteSet<4>) -> R,
    ) -> Option<R>;
    fn routes_v6<R>(
        &self,
        direction: Direction,
        destination: &Address<16>,
        look: impl FnOnce(&mut RouteSet<16>) -> R,
    ) -> Option<R>;
    /// A row of the hops that this CPU remembers. As [`Flows::bench`], but many may be asked for.
    #[expect(clippy::mut_from_ref, reason = "it is as if each run had its own")]
    fn hop(&self, row: u32) -> Option<&mut RememberedHop>;
    /// The interface with this index, if it is one of ours.
    fn interface(&self, index: u32) -> Option<Interface>;
    /// The interface that the packet came by.
    fn ingress(&self) -> Option<Interface>;
    fn hook(&self) -> Hook {
        Hook::Xdp
    }
    /// What the packet is, where the kernel says so.
    fn ether_type(&self) -> Option<EtherType> {
        None
    }
    /// Bytes of the packet that `frame` goes on with, as far as that is told at once. Not all of them need
    /// be in the frame.
    fn available(&self, frame: &Frame<'_>) -> usize {
        frame.remaining()
    }
    /// How many more there are.
    fn beyond(&self) -> usize {
        0
    }
    /// Bytes of the payload in each of the packets that the stack made this one of; 0 if it did not.
    fn segment(&self) -> u32 {
        0
    }
    /// Whether a packet of this length is several that were merged, without the kernel saying so.
    fn is_merged(&self, length: u16) -> bool {
        self.ingress().is_some_and(|ingress| u32::from(length) > ingress.mtu)
    }
    /// By which number packets can be sent out by an interface at once, if they can.
    fn device(&self, _index: u32, interface: &Interface) -> Option<u32> {
        interface.has(Interface::TRANSMITS).then_some(interface.device)
    }
    /// Whether this one can, by such a number.
    fn is_sent_by(&self, _device: u32) -> bool {
        true
    }
    /// The same, of the interface that the packet came by.
    fn back(&self) -> Option<u32> {
        self.ingress().and_then(|ingress| self.device(0, &ingress))
    }
    /// Has a checksum cover what changed in the addresses and the ports.
    fn repair(&self, check: Check<'_>, addresses: Change, ports: Change) {
        check.update(addresses.and(ports));
    }
    /// Whether the packet was sent to another host of its link.
    fn is_foreign(&self) -> bool {
        false
    }
    /// Has the packet leave with these link addresses, which it has no header for.
    fn leave_by(&self, _link: &LinkAddresses) {}
    /// Notes what changed in the packet that no checksum makes up for, but for the hop limit.
    fn unbalanced(&self, _change: Change) {}
    /// The route of a translated packet of `length` bytes, `class` as [`Ip::class`]. What was told before is
    /// not used any more then.
    #[expect(clippy::mut_from_ref, reason = "it is as if each run had its own")]
    fn route(&self, flow: &Flow, length: u16, class: [u8; 4]) -> Option<&mut Told>;
    /// What the FIB told last.
    fn told(&self) -> Option<&Told>;
    /// How the rule with a counter has the MSS.
    fn mss(&self, counter: u32) -> Mss;
    /// The SYN that is translated in this run.
    #[expect(clippy::mut_from_ref, reason = "it is as if each run had its own")]
    fn syn(&self) -> Option<&mut Syn>;
    /// Whether this is a backend that is the box itself.
    fn is_own(&self, address: &AnyAddress) -> bool;
    /// Whether the box itself sends the packet, which leaves by the interface that it is at.
    fn is_sent(&self) -> bool {
        false
    }
    /// Whether a socket of this box is open for the packet.
    fn has_socket(&self, flow: &Flow) -> bool;
    /// By which address a client came, if it was not the first.
    fn arrival(&self, key: &ArrivalKey) -> Option<AnyAddress>;
    /// Remembers by which address a client came, or forgets it.
    fn set_arrival(&self, key: &ArrivalKey, address: Option<&AnyAddress>);
    /// The ports for masquerade, first and last, and the seed of their choice.
    fn masquerade(&self) -> ([u16; 2], u32);
    /// Looks at who has an address and port of this box.
    fn mapping<R>(&self, key: &MappingKey, look: impl FnOnce(&mut Mapping) -> R) -> Option<R>;
    fn add_mapping(&self, key: &MappingKey, mapping: &Mapping) -> Added;
    /// The port that a client has.
    fn client_port(&self, key: &ClientKey) -> Option<Port>;
    fn set_client_port(&self, key: &ClientKey, port: Port);
    fn remove_client(&self, key: &ClientKey);
    /// Looks at what became of the first fragment of a packet.
    fn first_fragment<R>(
        &self,
        key: &FragmentKey,
        look: impl FnOnce(&FirstFragment) -> R,
    ) -> Option<R>;
    /// Remembers it.
    fn set_first_fragment(&self, key: &FragmentKey, first: &FirstFragment);
    /// This CPU's bench for what changes its address family. As [`Flows::bench`].
    #[expect(clippy::mut_from_ref, reason = "it is as if each run had its own")]
    fn conversion(&self) -> Option<&mut Conversion>;
    /// A number that nobody can tell before.
    fn random(&self) -> u32;
    /// This CPU's bench for that. As [`Flows::bench`], and asked for again once it is not used any more.
    #[expect(clippy::mut_from_ref, reason = "it is as if each run had its own")]
    fn fragment_bench(&self) -> Option<&mut FragmentBench>;
    /// This CPU's bucket of answers.
    fn bucket<R>(&self, look: impl FnOnce(&mut Bucket) -> R) -> Option<R>;
    /// Changes a rule's counter.
    fn count(&self, counter: u32, change: impl FnOnce(&mut Counter));
    /// Counts a packet that passes.
    fn count_passed(&self, reason: Passed);
    fn now(&self) -> Jiffies;
    /// Ticks of [`now`](Self::now) in a second.
    fn second(&self) -> u64;
    /// Zero, which the verifier does not know.
    fn nothing(&self) -> u32;
    /// Notes the packet, as it came in, for whoever wants to see what becomes of those that rules
    /// claim.
    fn note(&self, flow: impl FnOnce() -> Flow);
}

/// Decides and does what becomes of `frame`.
#[inline(always)]
pub fn handle<K: Kernel>(kernel: &K, role: Role, mut frame: Frame<'_>) -> Verdict {
    network(kernel, Common(role), &mut frame).unwrap_or_else(|reason| pass(kernel, reason))
}

/// Counts a packet that passes.
#[inline(always)]
pub(crate) fn pass<K: Kernel>(kernel: &K, reason: Passed) -> Verdict {
    kernel.count_passed(reason);
    Verdict::Pass(reason)
}

/// The same for what the box itself sends, to clients and to itself. What is not a rule's is not counted.
#[inline(always)]
pub fn handle_own<K: Kernel>(kernel: &K, mut frame: Frame<'_>) -> Verdict {
    network(kernel, Own, &mut frame).unwrap_or_else(Verdict::Pass)
}

/// What goes on behind the link header.
pub(crate) trait Way {
    type End;

    fn ip<'a, const N: usize, I: Icmp<N>, K: Kernel>(
        self,
        kernel: &K,
        link: Link<'a>,
        frame: &mut Frame<'a>,
    ) -> Result<Self::End, Passed>;
}

/// The way of whole TCP and UDP packets.
struct Common(Role);

impl Way for Common {
    type End = Verdict;

    #[inline(always)]
    fn ip<'a, const N: usize, I: Icmp<N>, K: Kernel>(
        self,
        kernel: &K,
        link: Link<'a>,
        frame: &mut Frame<'a>,
    ) -> Result<Verdict, Passed> {
        ip::<N, I, K>(kernel, self.0, link, frame)
    }
}

/// The way of what the box sends. It writes nothing: the kernel copies the headers of each packet for a
/// program that may.
struct Own;

impl Way for Own {
    type End = Verdict;

    #[inline(always)]
    fn ip<'a, const N: usize, I: Icmp<N>, K: Kernel>(
        self,
        kernel: &K,
        _: Link<'a>,
        frame: &mut Frame<'a>,
    ) -> Result<Verdict, Passed> {
        let available = kernel.available(frame);
        let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
        let (source, destination) = (ip.source(), ip.destination());
        let detour = Verdict::Flow(Part::FindReply.program::<N>());
        if claims::<N, I, K>(kernel, Direction::Reply, &source).is_some() {
            // A service's that is a backend, or to one from a client with its address.
            return match ip.transport(frame, available, || kernel.beyond()) {
                Ok(_) => Ok(Verdict::Flow(Part::Reply.program::<N>())),
                Err(Passed::Icmp | Passed::Fragment) => Ok(detour),
                Err(reason) => Err(reason),
            };
        }
        if ip.may_carry_icmp() {
            return Ok(detour);
        }
        claims::<N, I, K>(kernel, Direction::Forward, &destination).ok_or(Passed::NoRule)?;
        Ok(Verdict::Flow(Part::Hairpin.program::<N>()))
    }
}

#[inline(always)]
pub(crate) fn network<W: Way, K: Kernel>(
    kernel: &K,
    way: W,
    frame: &mut Frame<'_>,
) -> Result<W::End, Passed> {
    let mut link = frame.take_link().ok_or(Passed::Malformed)?;
    if link.is_group() || kernel.is_foreign() {
        return Err(Passed::Group);
    }
    let written = || link.ethernet().map(|ethernet| ethernet.ether_type());
    match kernel.ether_type().or_else(written) {
        Some(EtherType::IPV4) => way.ip::<4, Ipv4Hdr, K>(kernel, link, frame),
        Some(EtherType::IPV6) => way.ip::<16, Ipv6Hdr, K>(kernel, link, frame),
        Some(EtherType::VLAN | EtherType::SERVICE_VLAN) => Err(Passed::Vlan),
        _ => Err(Passed::NotIp),
    }
}

/// What the live rules claim at an address.
#[inline(always)]
pub(crate) fn claims<'k, const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &'k K,
    direction: Direction,
    address: &Address<N>,
) -> Option<&'k Claims> {
    let endpoint = I::endpoint(kernel, direction, address)?;
    let [even, odd] = &endpoint.generations;
    Some(if kernel.generation() == 0 { even } else { odd })
}

#[inline(always)]
fn ip<'a, const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    role: Role,
    link: Link<'a>,
    frame: &mut Frame<'a>,
) -> Result<Verdict, Passed> {
    let available = kernel.available(frame);
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let (source, destination) = (ip.source(), ip.destination());
    let claims = |direction| {
        let end = match direction {
            Direction::Forward => &destination,
            Direction::Reply => &source,
        };
        claims::<N, I, K>(kernel, direction, end).ok_or(Passed::NoRule)
    };
    // Each direction has code of its own, in which it is a constant.
    match role {
        Role::External => {
            let forward = claims(Direction::Forward)?;
            let mut packet = match Packet::take(kernel, link, ip, frame, available) {
                Ok(packet) => packet,
                Err(reason) => return detour(Direction::Forward, reason),
            };
            translate(kernel, Direction::Forward, forward, &mut packet)
        }
        Role::Internal => {
            let Ok(reply) = claims(Direction::Reply) else {
                // Any router inside may have something to say about a packet to a backend.
                if ip.may_carry_icmp() {
                    return Ok(Verdict::ReplyDetour(Passed::Icmp));
                }
                claims(Direction::Forward)?;
                return Ok(Verdict::Flow(Part::Hairpin.program::<N>()));
            };
            let mut packet = match Packet::take(kernel, link, ip, frame, available) {
                Ok(packet) => packet,
                Err(reason) => return detour(Direction::Reply, reason),
            };
            match translate(kernel, Direction::Reply, reply, &mut packet) {
                // To no client outside.
                Err(Passed::NoRule | Passed::Inside) => {
                    Ok(Verdict::Flow(Part::Reply.program::<N>()))
                }
                done => done,
            }
        }
        Role::Both => {
            let forward = claims(Direction::Forward);
            let reply = match forward {
                Ok(_) => None,
                Err(_) => match claims(Direction::Reply) {
                    Ok(reply) => Some(reply),
                    Err(_) if ip.may_carry_icmp() => {
                        return Ok(Verdict::ReplyDetour(Passed::Icmp));
                    }
                    Err(reason) => return Err(reason),
                },
            };
            let mut packet = match Packet::take(kernel, link, ip, frame, available) {
                Ok(packet) => packet,
                Err(reason) if forward.is_ok() => return detour(Direction::Forward, reason),
                Err(reason) => return detour(Direction::Reply, reason),
            };
            if let Ok(forward) = forward {
                match translate(kernel, Direction::Forward, forward, &mut packet) {
                    // What answers a masqueraded client comes to an address of this box too.
                    Err(Passed::NoRule) => {}
                    done => return done,
                }
            }
            let reply = match reply {
                Some(reply) => reply,
                None => claims(Direction::Reply)?,
            };
            translate(kernel, Direction::Reply, reply, &mut packet)
        }
    }
}

/// What becomes of a packet that is no whole TCP or UDP packet, to or from an address of a rule.
#[inline(always)]
fn detour(direction: Direction, reason: Passed) -> Result<Verdict, Passed> {
    match reason {
        Passed::Icmp | Passed::Fragment | Passed::Protocol => {
            Ok(Verdict::detour(direction, reason))
        }
        _ => Err(reason),
    }
}

/// The part of the way that flows decide. `frame` is as it came.
#[inline(always)]
pub fn handle_flow<const N: usize, I: Ip<N>, K: Kernel + Flows<N>>(
    kernel: &K,
    part: Part,
    mut frame: Frame<'_>,
) -> Verdict {
    flow_ip::<N, I, K>(kernel, part, &mut frame).unwrap_or_else(|reason| pass(kernel, reason))
}

#[inline(always)]
fn flow_ip<const N: usize, I: Ip<N>, K: Kernel + Flows<N>>(
    kernel: &K,
    part: Part,
    frame: &mut Frame<'_>,
) -> Result<Verdict, Passed> {
    let link = frame.take_link().ok_or(Passed::Malformed)?;
    let available = kernel.available(frame);
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let transport = payload::<N, I, K>(kernel, ip, frame, available)
        .and_then(|payload| payload.transport(frame));
    let transport = match transport {
        Err(Passed::Icmp | Passed::Fragment) if part == Part::Hairpin => {
            return Ok(Verdict::Flow(Part::FindForward.program::<N>()));
        }
        transport => transport?,
    };
    let mut packet = Packet { link, ip, transport };
    let bench = kernel.bench().ok_or(Passed::NoFlow)?;
    let claimed = |packet: &Packet<'_, I>, direction| {
        let end = match direction {
            Direction::Forward => packet.ip.destination(),
            Direction::Reply => packet.ip.source(),
        };
        let claims = claims::<N, I, K>(kernel, direction, &end).ok_or(Passed::NoRule)?;
        claimed(kernel, direction, claims, packet)
    };
    if part == Part::Reply {
        if packet.ip.ttl() <= 1 && !kernel.is_sent() {
            return Ok(Verdict::Flow(Part::FindReply.program::<N>()));
        }
        if let Some(sent) = reply_flow(kernel, bench, &mut packet) {
            let masqueraded = !bench.becomes.destination.is(&bench.packet.key.destination);
            return match sent {
                // The way to the client is gone. The address is the box's, and its stack would end what it
                // knows nothing of.
                Err(Passed::Inside) if masqueraded => {
                    Ok(drop_counted(kernel, bench.counter, Dropped::NoRoute))
                }
                sent => sent,
            };
        }
        if let Ok(reply) = claimed(&packet, Direction::Reply)
            && reply.has(Translation::ALSO_ALONE)
        {
            bench.becomes = bench.packet.key;
            bench.becomes.source = reply.address.narrow();
            bench.becomes.source_port = bench.packet.key.source_port.shifted(reply.shift);
            (bench.counter, bench.hairpin) = (reply.counter, 0);
            match send_flow::<false, N, I, K>(kernel, bench, &mut packet) {
                Err(Passed::Inside) => {}
                sent => return sent,
            }
        }
        return Ok(Verdict::Flow(Part::Hairpin.program::<N>()));
    }
    let hairpin = part == Part::Hairpin;
    packet.of_flow(kernel, Direction::Forward, &mut bench.packet);
    // Hops to backends are the same wherever the client is.
    (bench.inside, bench.hairpin) = (hairpin.into(), 0);
    if !hairpin && flow::established(kernel, bench) {
        return send_flow::<true, N, I, K>(kernel, bench, &mut packet);
    }
    match claimed(&packet, Direction::Forward) {
        Ok(translation) if translation.has(Translation::CROSS) => {
            Ok(Verdict::Flow(Part::CrossForward.program::<N>()))
        }
        Ok(translation) => {
            bench.counter = translation.counter;
            let known = hairpin && flow::established(kernel, bench);
            let known = if known { Ok(()) } else { flow::begin(kernel, translation, bench) };
            match known {
                Ok(()) => send_flow::<true, N, I, K>(kernel, bench, &mut packet),
                Err(Refused::Pass(reason)) => Err(reason),
                Err(Refused::Drop(reason)) => {
                    kernel.note(|| Flow::of(packet.ip, &packet.transport));
                    Ok(drop_counted(kernel, bench.counter, reason))
                }
            }
        }
        Err(Passed::Ttl) => Ok(Verdict::Flow(Part::FindForward.program::<N>())),
        // A backend's, but of no flow, and not to us.
        Err(Passed::NoRule) if hairpin => Err(match claimed(&packet, Direction::Reply) {
            Ok(reply) if reply.has(Translation::STATEFUL) => Passed::NoFlow,
            Ok(_) => Passed::Inside,
            Err(reason) => reason,
        }),
        Err(reason) => Err(reason),
    }
}

/// What a whole packet carries behind `ip`, from whose start on `available` bytes are there.
#[inline(always)]
pub(crate) fn payload<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    ip: &I,
    frame: &Frame<'_>,
    available: usize,
) -> Result<Payload, Passed> {
    let whole = ip.whole(available, || kernel.beyond())?;
    let payload = ip.payload(frame, whole, Reads::Whole)?;
    // Where extension headers may be, each number of them would be verified with all that follows.
    if N == 4 { Ok(payload) } else { payload.forgotten(kernel.nothing()) }
}

/// The headers of a packet that may be a rule's.
struct Packet<'a, I> {
    link: Link<'a>,
    ip: &'a mut I,
    transport: Transport<'a>,
}

impl<'a, I> Packet<'a, I> {
    /// Takes what follows `ip`, from whose start on `available` bytes are there.
    #[inline(always)]
    fn take<const N: usize, K: Kernel>(
        kernel: &K,
        link: Link<'a>,
        ip: &'a mut I,
        frame: &mut Frame<'a>,
        available: usize,
    ) -> Result<Self, Passed>
    where
        I: Ip<N>,
    {
        let transport = ip.transport(frame, available, || kernel.beyond())?;
        Ok(Self { link, ip, transport })
    }

    /// What flows look at.
    #[inline(always)]
    fn of_flow<const N: usize, K: Kernel>(
        &self,
        kernel: &K,
        direction: Direction,
        flow: &mut flow::Packet<N>,
    ) where
        I: Ip<N>,
    {
        let Self { ip, transport, .. } = self;
        ip.key(transport, direction).write_to(&mut flow.key);
        (flow.segment, flow.number) = transport.segment();
        flow.flags = transport.flow_flags();
        (flow.size, flow.now) = (self.on_wire(kernel).size, kernel.now());
    }

    /// What becomes of a translated SYN, which goes by `hop` if it is redirected.
    #[inline(always)]
    fn syn<const N: usize, K: Kernel>(
        &self,
        kernel: &K,
        hop: Option<&Hop>,
        rule: u32,
        then: Verdict,
    ) -> Verdict
    where
        I: Ip<N>,
    {
        let told = || kernel.told().map(|told| &told.hop);
        let (Some(syn), Some(Hop { mtu, .. })) = (kernel.syn(), hop.or_else(told)) else {
            return then;
        };
        let place = self.link.distance(self.transport.header().0) as u32;
        *syn = Syn { then, mtu: *mtu, headers: (size_of::<I>() + TcpHdr::LEN) as u32, rule, place };
        Verdict::Syn(rule)
    }

    /// What it is on a wire.
    #[inline(always)]
    fn on_wire<const N: usize, K: Kernel>(&self, kernel: &K) -> OnWire
    where
        I: Ip<N>,
    {
        OnWire::of(kernel, self.ip, &self.transport)
    }
}

/// What a packet is on a wire.
pub(crate) struct OnWire {
    pub size: Size,
    /// Bytes of the longest IP packet.
    pub longest: u16,
}

impl OnWire {
    /// Of a whole packet with these headers.
    #[inline(always)]
    pub(crate) fn of<const N: usize, I: Ip<N>, K: Kernel>(
        kernel: &K,
        ip: &I,
        transport: &Transport<'_>,
    ) -> Self {
        let (start, len) = transport.header();
        let first = &raw const *ip as usize;
        // The mask has the compiler do no sums with where the packet is, which the verifier does not let it
        // do: 15 bits, as it would know that 16 are no mask here.
        Self::new(kernel, ip.length(), || (start.wrapping_sub(first) & 0x7fff) + len)
    }

    /// Of a packet of `length` bytes, of which headers take some.
    #[inline(always)]
    pub(crate) fn new<K: Kernel>(kernel: &K, length: u16, headers: impl FnOnce() -> usize) -> Self {
        let segment = kernel.segment();
        if segment == 0 {
            return Self { size: Size::one(length), longest: length };
        }
        let headers = headers() as u32 & 0xffff;
        let payload = u32::from(length).saturating_sub(headers);
        let packets = payload.div_ceil(segment).max(1);
        let longest = headers + segment.min(payload);
        Self {
            size: Size { packets, bytes: payload + packets * headers },
            longest: longest.min(0xffff) as u16,
        }
    }
}

/// What a packet becomes.
struct Goes<'a, const N: usize> {
    ends: &'a FlowKey<N>,
    /// The packet as it came, if it is of a flow. Then both ends may have changed, else just the one that the
    /// direction translates.
    came: Option<&'a FlowKey<N>>,
    /// The flags of its translation that count once it is known to go.
    flags: u32,
    counter: u32,
    /// The client is on an internal interface.
    hairpin: bool,
}

/// A packet to or from an address of a rule.
#[inline(always)]
fn translate<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    claims: &Claims,
    packet: &mut Packet<'_, I>,
) -> Result<Verdict, Passed> {
    let translation = match claimed(kernel, direction, claims, packet) {
        Ok(translation) => translation,
        // Whoever sent it is told, by the detour.
        Err(Passed::Ttl) => {
            return Ok(match direction {
                Direction::Forward => Verdict::ForwardDetour(Passed::Ttl),
                // To an address of the box, maybe: otherwise the stack tells.
                Direction::Reply => Verdict::Flow(Part::FindReply.program::<N>()),
            });
        }
        Err(reason) => return Err(reason),
    };
    if translation.has(Translation::STATEFUL) {
        let part = match direction {
            Direction::Forward if translation.has(Translation::CROSS) => Part::CrossForward,
            Direction::Forward => {
                // So that it need not look for the rule again.
                if let Some(bench) = I::bench(kernel) {
                    bench.counter = translation.counter;
                }
                Part::Forward
            }
            Direction::Reply if translation.has(Translation::CROSS) => Part::CrossReply,
            Direction::Reply => Part::Reply,
        };
        return Ok(Verdict::Flow(part.program::<N>()));
    }
    let mut ends = packet.ip.key(&packet.transport, direction);
    let mut address: Address<N> = translation.address.narrow();
    if direction == Direction::Reply
        && translation.has(Translation::MANY_ADDRESSES)
        && let came = Flow::of(packet.ip, &packet.transport)
        && let Some(arrival) = kernel.arrival(&came.reversed().arrival())
    {
        address = arrival.narrow();
    }
    let (end, port) = match direction {
        Direction::Forward => (&mut ends.destination, &mut ends.destination_port),
        Direction::Reply => (&mut ends.source, &mut ends.source_port),
    };
    *end = address;
    *port = port.shifted(translation.shift);
    let Translation { flags, counter, .. } = *translation;
    let goes = Goes { ends: &ends, came: None, flags, counter, hairpin: false };
    send(kernel, direction, goes, packet, kernel.now())
}

/// The translation of a packet, which no socket of this box is open for and whose time to live does not
/// end here.
#[inline(always)]
fn claimed<'k, const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &'k K,
    direction: Direction,
    claims: &Claims,
    packet: &Packet<'_, I>,
) -> Result<&'k Translation, Passed> {
    let Packet { ip, transport, .. } = packet;
    let (source_port, destination_port) = transport.ports();
    let port = match direction {
        Direction::Forward => destination_port,
        Direction::Reply => source_port,
    };
    let translation = translation(kernel, transport.claimed(claims), port).ok_or(Passed::NoRule)?;
    if translation.has(Translation::ASK_SOCKETS) && kernel.has_socket(&Flow::of(*ip, transport)) {
        return Err(Passed::Own);
    }
    if ip.ttl() <= 1 {
        return Err(Passed::Ttl);
    }
    Ok(translation)
}

/// A packet from a backend, if it is of a flow.
#[inline(always)]
fn reply_flow<const N: usize, I: Ip<N>, K: Kernel + Flows<N>>(
    kernel: &K,
    bench: &mut Bench<N>,
    packet: &mut Packet<'_, I>,
) -> Option<Result<Verdict, Passed>> {
    packet.of_flow(kernel, Direction::Reply, &mut bench.packet);
    if kernel.is_sent()
        && bench.packet.segment == flow::Segment::Accepts
        && flow::is_over(kernel, bench)
    {
        return None;
    }
    flow::reply(kernel, bench).then(|| send_flow::<false, N, I, K>(kernel, bench, packet))
}

/// Sends a packet of a flow.
// Not inlined: what it needs of the stack stands beside nothing else.
#[inline(never)]
fn send_flow<const FORWARD: bool, const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    bench: &Bench<N>,
    packet: &mut Packet<'_, I>,
) -> Result<Verdict, Passed> {
    let direction = if FORWARD { Direction::Forward } else { Direction::Reply };
    let Bench { becomes: ends, counter, hairpin, .. } = bench;
    let came = Some(&bench.packet.key);
    let goes = Goes { ends, came, flags: 0, counter: *counter, hairpin: *hairpin != 0 };
    send(kernel, direction, goes, packet, bench.packet.now)
}

#[inline(always)]
pub(crate) fn drop_counted<K: Kernel>(kernel: &K, counter: u32, reason: Dropped) -> Verdict {
    kernel.count(counter, |counter| add_one(&mut counter.dropped, reason as usize));
    Verdict::Drop(reason)
}

/// Counts one for a reason.
#[inline(always)]
fn add_one(counts: &mut [u64], reason: usize) {
    // The compiler knows that there is no other reason; the verifier wants to see it checked.
    if let Some(count) = counts.get_mut(core::hint::black_box(reason)) {
        *count += 1;
    }
}

/// Routes, rewrites and counts a packet.
#[inline(always)]
fn send<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    goes: Goes<'_, N>,
    packet: &mut Packet<'_, I>,
    now: Jiffies,
) -> Result<Verdict, Passed> {
    let OnWire { longest, .. } = packet.on_wire(kernel);
    let Packet { link: header, ip, transport } = &mut *packet;
    let Goes { ends, came, flags, counter, hairpin } = goes;
    let destination = ends.destination;
    // Read before the FIB is asked: what it says then is void if the network changes meanwhile.
    let tag = match hairpin || kernel.is_sent() {
        true => Tag::NONE,
        false => tag(kernel, direction, *ip, now),
    };
    let remembered = remembered::<N, I, K>(kernel, direction, &destination, tag);
    let (verdict, hop) = match remembered {
        Some(hop) if u32::from(longest) <= hop.mtu && kernel.is_sent_by(hop.device) => {
            (Verdict::Redirect(hop.device), Some(hop))
        }
        _ => {
            let asked = Flow::of_key(ends);
            let Asked { verdict, hop, .. } = ask(kernel, direction, hairpin, *ip, longest, &asked)?;
            match verdict {
                Verdict::ForwardDetour(_) if came.is_some() => {
                    return Ok(Verdict::Flow(Part::SendForward.program::<N>()));
                }
                Verdict::ForwardDetour(_) => return Ok(verdict),
                Verdict::ReplyDetour(_) if came.is_some() && !destination.is(&ip.destination()) => {
                    return Ok(Verdict::Flow(Part::SendReply.program::<N>()));
                }
                // As it came, so that the stack's answer reaches the backend with the header that it
                // sent.
                Verdict::ReplyDetour(reason) => return Err(reason),
                _ => {}
            }
            if tag != Tag::NONE
                && let Some(hop) = hop
                && let row = hop.row::<N>(direction, kernel.hook())
                && kernel.hop(row).is_some_and(|row| row.claim(tag, hop))
            {
                I::routes(kernel, direction, &destination, |set| {
                    set.remember(destination, tag, row);
                });
            }
            (verdict, hop)
        }
    };

    kernel.note(|| Flow::of(*ip, transport));
    if let Verdict::Drop(reason) = verdict {
        return Ok(drop_counted(kernel, counter, reason));
    }
    if direction == Direction::Forward && flags & Translation::MANY_ADDRESSES != 0 {
        let came = Flow::of(*ip, transport);
        let first = flags & Translation::FIRST_ADDRESS != 0;
        remember_arrival(kernel, first, &came, &Flow::of_key(ends));
    }
    // The stack takes a hop off and writes the link addresses itself.
    let mut hops = 0;
    if let Some(Hop { link, .. }) = hop {
        if !header.set(link) {
            kernel.leave_by(link);
        }
        hops = 1;
    }
    let (source, target) = ((ends.source, ends.source_port), (destination, ends.destination_port));
    let (end, other) = match direction {
        Direction::Forward => (target, source),
        Direction::Reply => (source, target),
    };
    // Without masquerade that end stays as it is.
    let stays = |came: &FlowKey<N>| {
        let end = came.end(direction.opposite());
        end.0.is(&other.0) && end.1 == other.1
    };
    let mut addresses = ip.rewrite(direction, end.0, hops);
    let mut ports = transport.set_port(direction, end.1);
    if came.is_some_and(|came| !stays(came)) {
        addresses = addresses.and(ip.rewrite(direction.opposite(), other.0, 0));
        ports = ports.and(transport.set_port(direction.opposite(), other.1));
    }
    kernel.repair(transport.check(), addresses, ports);
    // Again, and not kept: there is little room on the stack.
    count(kernel, counter, direction, packet.on_wire(kernel).size, now, verdict);
    if packet.transport.is_syn() {
        return Ok(packet.syn(kernel, hop, counter, verdict));
    }
    Ok(verdict)
}

/// Counts a translated packet.
#[inline(always)]
pub(crate) fn count<K: Kernel>(
    kernel: &K,
    counter: u32,
    direction: Direction,
    size: Size,
    now: Jiffies,
    verdict: Verdict,
) {
    kernel.count(counter, |counter| {
        counter.translated[direction as usize].add(size);
        counter.last = now;
        if let Verdict::Stack(reason) = verdict {
            add_one(&mut counter.to_stack, reason as usize);
        }
    });
}

/// The translation of a port: a comparison, or two array loads.
#[inline(always)]
pub(crate) fn translation<K: Kernel>(kernel: &K, ports: Ports, port: Port) -> Option<&Translation> {
    let row = if ports.first <= ports.last {
        let number = port.number();
        (ports.first <= number && number <= ports.last).then_some(ports.row)
    } else {
        let [high, low] = port.0;
        let root = kernel.page(present(ports.row)?)?;
        let leaf = kernel.page(present(root.0[usize::from(high)])?)?;
        Some(leaf.0[usize::from(low)])
    };
    kernel.translation(present(row?)?)
}

/// Row 0 of each table is none.
#[inline(always)]
pub(crate) fn present(number: u32) -> Option<u32> {
    (number != 0).then_some(number)
}

/// Under which routes are remembered now; none while they cannot be relied on.
// Not an option: the verifier minds what is undefined in one.
#[inline(always)]
fn tag<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    ip: &I,
    now: Jiffies,
) -> Tag {
    let trust = I::trust(kernel);
    // One branch, not three.
    let trusted = (trust.generation != 0) & (now < trust.until) & !ip.is_source_strict();
    if trusted { Tag::new(trust.generation, direction, kernel.hook()) } else { Tag::NONE }
}

/// The way to `destination` that the FIB told lately.
// Not a closure: one that the compiler does not inline takes the direction by its address, and then it
// is no constant any more.
#[inline(always)]
fn remembered<'k, const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &'k K,
    direction: Direction,
    destination: &Address<N>,
    tag: Tag,
) -> Option<&'k Hop> {
    if tag == Tag::NONE {
        return None;
    }
    let row = I::routes(kernel, direction, destination, |set| set.find(destination, tag))??;
    Some(&kernel.hop(row)?.hop)
}

/// What follows from what the FIB told.
pub(crate) struct Asked<'k> {
    pub verdict: Verdict,
    /// The way if it is one by which packets can be redirected at once.
    pub hop: Option<&'k Hop>,
    /// The MTU that the packet is larger than; 0 if it is not.
    pub narrow: u32,
}

/// Asks the FIB.
#[inline(always)]
pub(crate) fn ask<'k, const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &'k K,
    direction: Direction,
    hairpin: bool,
    ip: &I,
    longest: u16,
    goes: &Flow,
) -> Result<Asked<'k>, Passed> {
    let asks = Asks { longest, came: longest, class: ip.class(), whole: ip.must_not_fragment() };
    ask_about(kernel, direction, hairpin, asks, goes)
}

/// What the FIB is asked about a packet beside its ends.
pub(crate) struct Asks {
    /// Bytes of the longest IP packet that it is on a wire, as it leaves and as it came.
    pub longest: u16,
    pub came: u16,
    /// [`Ip::class`], as it leaves.
    pub class: [u8; 4],
    /// Whether a router has to refuse it rather than cut it up.
    pub whole: bool,
}

/// Asks the FIB.
#[inline(always)]
pub(crate) fn ask_about<'k, K: Kernel>(
    kernel: &'k K,
    direction: Direction,
    hairpin: bool,
    Asks { longest, came, class, whole }: Asks,
    goes: &Flow,
) -> Result<Asked<'k>, Passed> {
    let told = kernel.route(goes, longest, class).ok_or(Passed::NoRule)?;
    let room = if told.narrow == 0 {
        Room::Fits
    } else if kernel.is_merged(came) {
        Room::Merged
    } else if whole {
        Room::TooBigToSplit
    } else {
        Room::TooBig
    };
    let verdict = match direction {
        Direction::Forward => forward(kernel, told, room, &goes.destination),
        Direction::Reply => reply(kernel, told, room, hairpin)?,
    };
    // Else what follows would be verified for each reason.
    let nothing = kernel.nothing();
    let verdict = match verdict {
        Verdict::Stack(reason) => Verdict::Stack(reason.forgotten(nothing)),
        Verdict::Drop(reason) => Verdict::Drop(reason.forgotten(nothing)),
        verdict => verdict,
    };
    let narrow = told.narrow;
    let hop = match verdict {
        Verdict::Redirect(device) => {
            told.hop.device = device;
            Some(&told.hop)
        }
        _ => None,
    };
    Ok(Asked { verdict, hop, narrow })
}

/// How a packet's length and its route's MTU go together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Room {
    Fits,
    /// The stack cuts it up.
    TooBig,
    /// The sender is told.
    TooBigToSplit,
    /// Longer than any packet on the wire that it came by: several, merged by the stack or a driver
    /// before this program saw them.
    Merged,
}

/// A packet to a backend is the rule's whatever the route is. It leaves by an internal interface or
/// not at all: where the route to the backend is gone, the default route would carry it outside.
#[inline(always)]
fn forward<K: Kernel>(kernel: &K, told: &Told, room: Room, backend: &AnyAddress) -> Verdict {
    match told.route {
        // A box that serves clients itself need not be a router.
        Route::NotForwarded | Route::ForwardingOff if kernel.is_own(backend) => {
            Verdict::Stack(ToStack::Local)
        }
        Route::Via | Route::NoNeighbour => {
            let internal =
                told.leaves_by(kernel).filter(|interface| interface.has(Interface::INTERNAL));
            match (internal, room) {
                (None, _) => Verdict::Drop(Dropped::NotInternal),
                (Some(_), Room::Merged) => Verdict::Drop(Dropped::Merged),
                (Some(_), Room::TooBig) => Verdict::Stack(ToStack::TooBig),
                (Some(_), Room::TooBigToSplit) => Verdict::ForwardDetour(Passed::TooBig),
                (Some(interface), Room::Fits) => leave(kernel, interface, told),
            }
        }
        Route::Encapsulated => Verdict::Stack(ToStack::Encapsulated),
        Route::NotForwarded | Route::Chosen => Verdict::Drop(Dropped::NoRoute),
        Route::Unreachable => Verdict::Drop(Dropped::Unreachable),
        Route::Blackhole => Verdict::Drop(Dropped::Blackhole),
        Route::Prohibited => Verdict::Drop(Dropped::Prohibited),
        Route::ForwardingOff => Verdict::Drop(Dropped::ForwardingOff),
    }
}

/// A packet of a backend is the rule's only if it leaves by an external interface, or by an internal one
/// to a client that came from there, or is for a client on the box; whatever else it is, the stack knows
/// better.
#[inline(always)]
fn reply<K: Kernel>(kernel: &K, told: &Told, room: Room, hairpin: bool) -> Result<Verdict, Passed> {
    match told.route {
        Route::Chosen => return Ok(Verdict::Stack(ToStack::Local)),
        Route::NotForwarded | Route::ForwardingOff if hairpin => {
            return Ok(Verdict::Stack(ToStack::Local));
        }
        _ => {}
    }
    let place = if hairpin { Interface::INTERNAL } else { Interface::EXTERNAL };
    let interface =
        told.leaves_by(kernel).filter(|interface| interface.has(place)).ok_or(Passed::Inside)?;
    match room {
        Room::Fits => Ok(leave(kernel, interface, told)),
        Room::TooBig => Ok(Verdict::Stack(ToStack::TooBig)),
        Room::TooBigToSplit => Ok(Verdict::ReplyDetour(Passed::TooBig)),
        Room::Merged => Ok(Verdict::Drop(Dropped::Merged)),
    }
}

/// To a known neighbour: redirected, unless the interface cannot transmit it.
#[inline(always)]
fn leave<K: Kernel>(kernel: &K, interface: Interface, told: &Told) -> Verdict {
    match told.route {
        Route::Via => kernel
            .device(told.interface, &interface)
            .filter(|device| kernel.is_sent_by(*device))
            .map_or(Verdict::Stack(ToStack::NoTransmit), Verdict::Redirect),
        _ => Verdict::Stack(ToStack::NoNeighbour),
    }
}

/// The reply to a client that came by another address than the first must leave with that one. Only
/// those are remembered.
#[inline(always)]
pub(crate) fn remember_arrival<K: Kernel>(kernel: &K, first: bool, came: &Flow, goes: &Flow) {
    let key = goes.arrival();
    let known = kernel.arrival(&key);
    if first {
        if known.is_some() {
            kernel.set_arrival(&key, None);
        }
    } else if known != Some(came.destination) {
        kernel.set_arrival(&key, Some(&came.destination));
    }
}

#[cfg(test)]
mod tests;
