//! The packet's way: parse, claim, translation, route, rewrite, count, verdict.
//!
//! Everything is decided before the first byte is changed, so a packet that is passed leaves as it
//! came. The kernel is asked through [`Kernel`], so the same code runs on the host.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::icmp::Icmp;
use crate::packet::{EtherType, Ethernet, Frame, Ip, Transport};
use crate::table::{
    Address, AnyAddress, ArrivalKey, Bucket, Claims, Counter, Direction, Dropped, Endpoint,
    FirstFragment, FragmentKey, Hop, Interface, Jiffies, LinkAddresses, Page, Passed, Port, Ports,
    RememberedHop, RouteSet, Tag, ToStack, Translation, Trust,
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
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Translated; send it out by this row of `DEVICES`.
    Redirect(u32),
    /// Translated; the stack sends it.
    Stack(ToStack),
    /// To the stack, untouched.
    Pass(Passed),
    /// Nothing more.
    Drop(Dropped),
    /// The [detour](crate::detour) of the direction decides, which is another program; without it the
    /// packet passes.
    // Not one with the direction in it: with one number in all variants no byte is ever undefined.
    ForwardDetour(Passed),
    ReplyDetour(Passed),
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

/// The route of a packet: the results of `bpf_fib_lookup`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// By this interface, with these link addresses; packets of up to `mtu` bytes.
    Via {
        interface: u32,
        mtu: u32,
        link: LinkAddresses,
    },
    /// By this interface, whose neighbour is not resolved.
    NoNeighbour {
        interface: u32,
    },
    /// Through a tunnel that the route itself encapsulates for.
    Encapsulated,
    /// To this box, or nowhere.
    NotForwarded,
    Unreachable,
    Blackhole,
    Prohibited,
    ForwardingOff,
}

/// What the path asks of the kernel: maps and helpers.
pub trait Kernel {
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
    /// A row of the hops that this CPU remembers.
    fn hop<R>(&self, row: u32, look: impl FnOnce(&mut RememberedHop) -> R) -> Option<R>;
    /// The interface with this index, if it is one of ours.
    fn interface(&self, index: u32) -> Option<Interface>;
    /// The interface that the packet came by.
    fn ingress(&self) -> Option<Interface>;
    /// The route of a translated packet, `class` as [`Ip::class`], and its MTU if that does not let
    /// `length` bytes through.
    fn route(&self, flow: &Flow, length: u16, class: [u8; 4]) -> (Route, Option<u32>);
    /// Whether a socket of this box is open for the packet.
    fn has_socket(&self, flow: &Flow) -> bool;
    /// By which address a client came, if it was not the first.
    fn arrival(&self, key: &ArrivalKey) -> Option<AnyAddress>;
    /// Remembers by which address a client came, or forgets it.
    fn set_arrival(&self, key: &ArrivalKey, address: Option<&AnyAddress>);
    /// What became of the first fragment of a packet.
    fn first_fragment(&self, key: &FragmentKey) -> Option<FirstFragment>;
    /// Remembers it.
    fn set_first_fragment(&self, key: &FragmentKey, first: &FirstFragment);
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
    match ethernet(kernel, Common(role), &mut frame) {
        Ok(verdict) => verdict,
        Err(reason) => {
            kernel.count_passed(reason);
            Verdict::Pass(reason)
        }
    }
}

/// What goes on behind the Ethernet header.
pub(crate) trait Way {
    type End;

    fn ip<const N: usize, I: Icmp<N>, K: Kernel>(
        self,
        kernel: &K,
        ethernet: &mut Ethernet,
        frame: &mut Frame<'_>,
    ) -> Result<Self::End, Passed>;
}

/// The way of whole TCP and UDP packets.
struct Common(Role);

impl Way for Common {
    type End = Verdict;

    #[inline(always)]
    fn ip<const N: usize, I: Icmp<N>, K: Kernel>(
        self,
        kernel: &K,
        ethernet: &mut Ethernet,
        frame: &mut Frame<'_>,
    ) -> Result<Verdict, Passed> {
        ip::<N, I, K>(kernel, self.0, ethernet, frame)
    }
}

#[inline(always)]
pub(crate) fn ethernet<W: Way, K: Kernel>(
    kernel: &K,
    way: W,
    frame: &mut Frame<'_>,
) -> Result<W::End, Passed> {
    let ethernet: &mut Ethernet = frame.take().ok_or(Passed::Malformed)?;
    if ethernet.is_group() {
        return Err(Passed::Group);
    }
    match ethernet.ether_type() {
        EtherType::IPV4 => way.ip::<4, Ipv4Hdr, K>(kernel, ethernet, frame),
        EtherType::IPV6 => way.ip::<16, Ipv6Hdr, K>(kernel, ethernet, frame),
        EtherType::VLAN | EtherType::SERVICE_VLAN => Err(Passed::Vlan),
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
fn ip<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    role: Role,
    ethernet: &mut Ethernet,
    frame: &mut Frame<'_>,
) -> Result<Verdict, Passed> {
    let available = frame.remaining();
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let end = |direction| match direction {
        Direction::Forward => ip.destination(),
        Direction::Reply => ip.source(),
    };
    let claims = |direction| claims::<N, I, K>(kernel, direction, &end(direction));
    // What follows is made twice for `Both`, so that the direction is a constant of each.
    if matches!(role, Role::External | Role::Both) {
        match claims(Direction::Forward) {
            Some(claims) => {
                let headers = Headers { ethernet, ip, available };
                return translate(kernel, Direction::Forward, claims, headers, frame);
            }
            None if role == Role::External => return Err(Passed::NoRule),
            None => {}
        }
    }
    let Some(claims) = claims(Direction::Reply) else {
        // Any router inside may have something to say about a packet to a backend.
        return match ip.may_carry_icmp() {
            true => Ok(Verdict::ReplyDetour(Passed::Icmp)),
            false => Err(Passed::NoRule),
        };
    };
    let headers = Headers { ethernet, ip, available };
    translate(kernel, Direction::Reply, claims, headers, frame)
}

/// The headers that stand before the transport header.
struct Headers<'a, I> {
    ethernet: &'a mut Ethernet,
    ip: &'a mut I,
    /// What the frame held from the start of `ip` on.
    available: usize,
}

/// A packet to or from an address of a rule.
#[inline(always)]
fn translate<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    claims: &Claims,
    Headers { ethernet, ip, available }: Headers<'_, I>,
    frame: &mut Frame<'_>,
) -> Result<Verdict, Passed> {
    let mut transport = match ip.transport(frame, available) {
        Ok(transport) => transport,
        Err(reason @ (Passed::Icmp | Passed::Fragment | Passed::Protocol)) => {
            return Ok(Verdict::detour(direction, reason));
        }
        Err(reason) => return Err(reason),
    };
    let (source_port, destination_port) = transport.ports();
    let port = match direction {
        Direction::Forward => destination_port,
        Direction::Reply => source_port,
    };
    let translation = translation(kernel, transport.claimed(claims), port).ok_or(Passed::NoRule)?;

    if translation.has(Translation::ASK_SOCKETS) && kernel.has_socket(&Flow::of(ip, &transport)) {
        return Err(Passed::Own);
    }
    if ip.ttl() <= 1 {
        return match direction {
            Direction::Forward => Ok(Verdict::ForwardDetour(Passed::Ttl)),
            Direction::Reply => Err(Passed::Ttl),
        };
    }

    let mut address: Address<N> = translation.address.narrow();
    if direction == Direction::Reply
        && translation.has(Translation::MANY_ADDRESSES)
        && let Some(arrival) = kernel.arrival(&Flow::of(ip, &transport).reversed().arrival())
    {
        address = arrival.narrow();
    }
    let port = port.shifted(translation.shift);
    let length = ip.length();
    let now = kernel.now();

    let destination = match direction {
        Direction::Forward => address,
        Direction::Reply => ip.destination(),
    };
    // Read before the FIB is asked: what it says then is void if the network changes meanwhile.
    let tag = tag(kernel, direction, ip, now);
    let remembered = remembered::<N, I, K>(kernel, direction, &destination, tag);
    let (verdict, link) = match remembered {
        Some(hop) if u32::from(length) <= hop.mtu => {
            (Verdict::Redirect(hop.device), Some(hop.link))
        }
        _ => {
            let goes = Flow::of(ip, &transport).translated(direction, address.widen(), port);
            let Asked { verdict, hop, .. } = ask(kernel, direction, ip, &goes)?;
            if let Verdict::ForwardDetour(_) = verdict {
                return Ok(verdict);
            }
            if let (Some(tag), Some(hop)) = (tag, hop)
                && let row = hop.row::<N>(direction)
                && kernel.hop(row, |row| row.claim(tag, &hop)) == Some(true)
            {
                I::routes(kernel, direction, &destination, |set| {
                    set.remember(destination, tag, row);
                });
            }
            (verdict, hop.map(|hop| hop.link))
        }
    };

    kernel.note(|| Flow::of(ip, &transport));
    if let Verdict::Drop(reason) = verdict {
        kernel.count(translation.counter, |counter| counter.dropped[reason as usize] += 1);
        return Ok(verdict);
    }
    if direction == Direction::Forward && translation.has(Translation::MANY_ADDRESSES) {
        let came = Flow::of(ip, &transport);
        let goes = came.translated(direction, address.widen(), port);
        let first = translation.has(Translation::FIRST_ADDRESS);
        remember_arrival(kernel, first, &came, &goes);
    }
    // The stack takes a hop off and writes the link addresses itself.
    let mut hops = 0;
    if let Some(link) = link {
        ethernet.set_link(&link);
        hops = 1;
    }
    let addresses = ip.rewrite(direction, address, hops);
    transport.rewrite(direction, port, addresses);
    count(kernel, translation.counter, direction, length, now, verdict);
    Ok(verdict)
}

/// Counts a translated packet of `length` bytes.
#[inline(always)]
pub(crate) fn count<K: Kernel>(
    kernel: &K,
    counter: u32,
    direction: Direction,
    length: u16,
    now: Jiffies,
    verdict: Verdict,
) {
    kernel.count(counter, |counter| {
        let tally = &mut counter.translated[direction as usize];
        tally.packets += 1;
        tally.bytes += u64::from(length);
        counter.last = now;
        if let Verdict::Stack(reason) = verdict {
            counter.to_stack[reason as usize] += 1;
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
fn present(number: u32) -> Option<u32> {
    (number != 0).then_some(number)
}

/// Under which routes are remembered now; none while they cannot be relied on.
#[inline(always)]
fn tag<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    ip: &I,
    now: Jiffies,
) -> Option<Tag> {
    let trust = I::trust(kernel);
    // One branch, not three.
    let trusted = (trust.generation != 0) & (now < trust.until) & !ip.is_source_strict();
    trusted.then(|| Tag::new(trust.generation, direction))
}

/// The way to `destination` that the FIB told lately.
// Not a closure: one that the compiler does not inline takes the direction by its address, and then it
// is no constant any more.
#[inline(always)]
fn remembered<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    destination: &Address<N>,
    tag: Option<Tag>,
) -> Option<Hop> {
    let tag = tag?;
    let row = I::routes(kernel, direction, destination, |set| set.find(destination, tag))??;
    kernel.hop(row, |row| row.hop)
}

/// What the FIB said.
pub(crate) struct Asked {
    pub verdict: Verdict,
    /// The way if it is one by which packets can be redirected at once.
    pub hop: Option<Hop>,
    /// The MTU that the packet is larger than.
    pub narrow: Option<u32>,
}

/// Asks the FIB.
#[inline(always)]
pub(crate) fn ask<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    ip: &I,
    goes: &Flow,
) -> Result<Asked, Passed> {
    let length = ip.length();
    let (route, narrow) = kernel.route(goes, length, ip.class());
    let merged = || kernel.ingress().is_some_and(|ingress| u32::from(length) > ingress.mtu);
    let size = if narrow.is_none() {
        Size::Fits
    } else if merged() {
        Size::Merged
    } else if ip.must_not_fragment() {
        Size::TooBigToSplit
    } else {
        Size::TooBig
    };
    let verdict = match direction {
        Direction::Forward => forward(kernel, route, size),
        Direction::Reply => reply(kernel, route, size)?,
    };
    let hop = match (verdict, route) {
        (Verdict::Redirect(device), Route::Via { mtu, link, .. }) => {
            Some(Hop { device, mtu, link, padding: 0 })
        }
        _ => None,
    };
    Ok(Asked { verdict, hop, narrow })
}

/// How a packet's length and its route's MTU go together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Size {
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
fn forward<K: Kernel>(kernel: &K, route: Route, size: Size) -> Verdict {
    let internal =
        |index| kernel.interface(index).filter(|interface| interface.has(Interface::INTERNAL));
    match route {
        Route::Via { interface: index, .. } | Route::NoNeighbour { interface: index } => {
            match (internal(index), size) {
                (None, _) => Verdict::Drop(Dropped::NotInternal),
                (Some(_), Size::Merged) => Verdict::Drop(Dropped::Merged),
                (Some(_), Size::TooBig) => Verdict::Stack(ToStack::TooBig),
                (Some(_), Size::TooBigToSplit) => Verdict::ForwardDetour(Passed::TooBig),
                (Some(interface), Size::Fits) => leave(interface, route),
            }
        }
        Route::Encapsulated => Verdict::Stack(ToStack::Encapsulated),
        Route::NotForwarded => Verdict::Drop(Dropped::NoRoute),
        Route::Unreachable => Verdict::Drop(Dropped::Unreachable),
        Route::Blackhole => Verdict::Drop(Dropped::Blackhole),
        Route::Prohibited => Verdict::Drop(Dropped::Prohibited),
        Route::ForwardingOff => Verdict::Drop(Dropped::ForwardingOff),
    }
}

/// A packet of a backend is the rule's only if it leaves by an external interface; whatever else it
/// is, the stack knows better.
#[inline(always)]
fn reply<K: Kernel>(kernel: &K, route: Route, size: Size) -> Result<Verdict, Passed> {
    let (Route::Via { interface: index, .. } | Route::NoNeighbour { interface: index }) = route
    else {
        return Err(Passed::Inside);
    };
    let interface = kernel
        .interface(index)
        .filter(|interface| interface.has(Interface::EXTERNAL))
        .ok_or(Passed::Inside)?;
    match size {
        Size::Fits => Ok(leave(interface, route)),
        Size::TooBig => Ok(Verdict::Stack(ToStack::TooBig)),
        // As it came, so that the stack's answer reaches the backend with the header that it sent.
        Size::TooBigToSplit => Err(Passed::TooBig),
        Size::Merged => Ok(Verdict::Drop(Dropped::Merged)),
    }
}

/// To a known neighbour: redirected, unless the interface cannot transmit.
#[inline(always)]
fn leave(interface: Interface, route: Route) -> Verdict {
    match route {
        Route::Via { .. } if interface.has(Interface::TRANSMITS) => {
            Verdict::Redirect(interface.device)
        }
        Route::Via { .. } => Verdict::Stack(ToStack::NoTransmit),
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
