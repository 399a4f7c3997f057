//! The packet's way: parse, claim, translation, route, rewrite, count, verdict.
//!
//! Everything is decided before the first byte is changed, so a packet that is passed leaves as it
//! came. The kernel is asked through [`Kernel`], so the same code runs on the host.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::packet::{Ethernet, Frame, Ip, Transport};
use crate::table::{
    AnyAddress, ArrivalKey, Counter, Direction, Dropped, Endpoint, EndpointKey, Interface, Page,
    Passed, Port, ToStack, Translation,
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
    /// Translated; send it out by the interface with this index.
    Redirect(u32),
    /// Translated; the stack sends it.
    Stack(ToStack),
    /// To the stack, untouched.
    Pass(Passed),
    /// Nothing more.
    Drop(Dropped),
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
    /// This flow with one end translated.
    #[inline(always)]
    fn translated(self, direction: Direction, address: AnyAddress, port: Port) -> Self {
        match direction {
            Direction::Forward => Self { destination: address, destination_port: port, ..self },
            Direction::Reply => Self { source: address, source_port: port, ..self },
        }
    }

    /// The key of ARRIVALS, for a flow from client to backend.
    #[inline(always)]
    fn arrival(&self) -> ArrivalKey {
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
    fn reversed(self) -> Self {
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
    /// By this interface, with these link addresses.
    Via {
        interface: u32,
        source: [u8; 6],
        destination: [u8; 6],
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
    /// The live generation of endpoints.
    fn generation(&self) -> u8;
    fn endpoint_v4(&self, key: &EndpointKey<4>) -> Option<&Endpoint>;
    fn endpoint_v6(&self, key: &EndpointKey<16>) -> Option<&Endpoint>;
    fn page(&self, number: u32) -> Option<&Page>;
    fn translation(&self, number: u32) -> Option<&Translation>;
    /// The interface with this index, if it is one of ours.
    fn interface(&self, index: u32) -> Option<Interface>;
    /// The interface that the packet came by.
    fn ingress(&self) -> Option<Interface>;
    /// The route of a translated packet, `class` as [`Ip::class`], and whether its MTU lets `length`
    /// bytes through.
    fn route(&self, flow: &Flow, length: u16, class: [u8; 4]) -> (Route, bool);
    /// Whether a socket of this box is open for the packet.
    fn has_socket(&self, flow: &Flow) -> bool;
    /// By which address a client came, if it was not the first.
    fn arrival(&self, key: &ArrivalKey) -> Option<AnyAddress>;
    /// Remembers by which address a client came, or forgets it.
    fn set_arrival(&self, key: &ArrivalKey, address: Option<&AnyAddress>);
    /// Changes a rule's counter.
    fn count(&self, counter: u32, change: impl FnOnce(&mut Counter));
    /// Counts a packet that passes.
    fn count_passed(&self, reason: Passed);
    /// CLOCK_MONOTONIC in nanoseconds, coarse.
    fn now(&self) -> u64;
    /// Tells what became of a packet that a rule claimed, as it came in.
    fn log(&self, flow: &Flow, verdict: Verdict);
}

/// Decides and does what becomes of `frame`.
#[inline(always)]
pub fn handle<K: Kernel>(kernel: &K, role: Role, mut frame: Frame<'_>) -> Verdict {
    match ethernet(kernel, role, &mut frame) {
        Ok(verdict) => verdict,
        Err(reason) => {
            kernel.count_passed(reason);
            Verdict::Pass(reason)
        }
    }
}

#[inline(always)]
fn ethernet<K: Kernel>(kernel: &K, role: Role, frame: &mut Frame<'_>) -> Result<Verdict, Passed> {
    let ethernet: &mut Ethernet = frame.take().ok_or(Passed::Malformed)?;
    if ethernet.is_group() {
        return Err(Passed::Group);
    }
    match ethernet.ether_type {
        Ethernet::IPV4 => ip::<4, Ipv4Hdr, K>(kernel, role, ethernet, frame),
        Ethernet::IPV6 => ip::<16, Ipv6Hdr, K>(kernel, role, ethernet, frame),
        Ethernet::VLAN | Ethernet::SERVICE_VLAN => Err(Passed::Vlan),
        _ => Err(Passed::NotIp),
    }
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
    let (direction, endpoint) = claim(kernel, role, ip).ok_or(Passed::NoRule)?;

    let mut transport = ip.transport(frame, available)?;
    let (source_port, destination_port) = transport.ports();
    let port = match direction {
        Direction::Forward => destination_port,
        Direction::Reply => source_port,
    };
    let translation = translation(kernel, endpoint, &transport, port).ok_or(Passed::NoRule)?;

    let came = Flow {
        family: I::FAMILY,
        protocol: transport.protocol(),
        source_port,
        destination_port,
        source: ip.source().widen(),
        destination: ip.destination().widen(),
    };
    if translation.has(Translation::ASK_SOCKETS) && kernel.has_socket(&came) {
        return Err(Passed::Own);
    }
    if ip.ttl() <= 1 {
        return Err(Passed::Ttl);
    }

    let mut address = translation.address;
    if direction == Direction::Reply
        && translation.has(Translation::MANY_ADDRESSES)
        && let Some(arrival) = kernel.arrival(&came.reversed().arrival())
    {
        address = arrival;
    }
    let port = port.shifted(translation.shift);
    let goes = came.translated(direction, address, port);
    let length = ip.length();
    let (route, fits) = kernel.route(&goes, length, ip.class());
    let merged = || kernel.ingress().is_some_and(|ingress| u32::from(length) > ingress.mtu);
    let size = if fits {
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

    if let Verdict::Drop(reason) = verdict {
        kernel.count(translation.counter, |counter| counter.dropped[reason as usize] += 1);
        kernel.log(&came, verdict);
        return Ok(verdict);
    }
    if direction == Direction::Forward && translation.has(Translation::MANY_ADDRESSES) {
        remember_arrival(kernel, translation, &came, &goes);
    }
    // The stack takes a hop off and writes the link addresses itself.
    let mut hops = 0;
    if let Verdict::Redirect(_) = verdict
        && let Route::Via { source, destination, .. } = route
    {
        ethernet.source = source;
        ethernet.destination = destination;
        hops = 1;
    }
    let addresses = ip.rewrite(direction, address.narrow(), hops);
    transport.rewrite(direction, port, addresses);
    kernel.count(translation.counter, |counter| {
        let tally = &mut counter.translated[direction as usize];
        tally.packets += 1;
        tally.bytes += u64::from(length);
        counter.last = kernel.now();
        if let Verdict::Stack(reason) = verdict {
            counter.to_stack[reason as usize] += 1;
        }
    });
    kernel.log(&came, verdict);
    Ok(verdict)
}

/// The rules' ports at the address that this interface's role translates.
#[inline(always)]
fn claim<'k, const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &'k K,
    role: Role,
    ip: &I,
) -> Option<(Direction, &'k Endpoint)> {
    let generation = kernel.generation();
    let look = |direction, address| {
        let key = EndpointKey::new(address, direction, generation);
        I::endpoint(kernel, &key).map(|endpoint| (direction, endpoint))
    };
    let forward = match role {
        Role::External | Role::Both => look(Direction::Forward, ip.destination()),
        Role::Internal => None,
    };
    match (forward, role) {
        (None, Role::Internal | Role::Both) => look(Direction::Reply, ip.source()),
        (forward, _) => forward,
    }
}

/// The translation of a port: two array loads.
#[inline(always)]
fn translation<'k, K: Kernel>(
    kernel: &'k K,
    endpoint: &Endpoint,
    transport: &Transport<'_>,
    port: Port,
) -> Option<&'k Translation> {
    let [high, low] = port.0;
    let pages = match transport {
        Transport::Tcp(_) => &endpoint.tcp,
        Transport::Udp(_) => &endpoint.udp,
    };
    let page = kernel.page(present(pages[usize::from(high)])?)?;
    kernel.translation(present(page.0[usize::from(low)])?)
}

/// Row 0 of each table is none.
#[inline(always)]
fn present(number: u32) -> Option<u32> {
    (number != 0).then_some(number)
}

/// How a packet's length and its route's MTU go together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Size {
    Fits,
    /// The stack cuts it up.
    TooBig,
    /// The stack tells the sender.
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
                (Some(_), Size::TooBig | Size::TooBigToSplit) => Verdict::Stack(ToStack::TooBig),
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
        Route::Via { interface: index, .. } if interface.has(Interface::TRANSMITS) => {
            Verdict::Redirect(index)
        }
        Route::Via { .. } => Verdict::Stack(ToStack::NoTransmit),
        _ => Verdict::Stack(ToStack::NoNeighbour),
    }
}

/// The reply to a client that came by another address than the first must leave with that one. Only
/// those are remembered.
#[inline(always)]
fn remember_arrival<K: Kernel>(kernel: &K, translation: &Translation, came: &Flow, goes: &Flow) {
    let key = goes.arrival();
    let known = kernel.arrival(&key);
    if translation.has(Translation::FIRST_ADDRESS) {
        if known.is_some() {
            kernel.set_arrival(&key, None);
        }
    } else if known != Some(came.destination) {
        kernel.set_arrival(&key, Some(&came.destination));
    }
}

#[cfg(test)]
mod tests;
