//! Packets that change their address family on the way to a backend of the other one, and back (RFC 7915).
//!
//! They are always of flows, which stand among those of IPv6: all addresses are
//! [written](Address::mapped) as IPv6 has them, and the key [says](FlowKey::CROSS) that the family changes. So
//! a packet of either family finds what it becomes with one lookup, as others do.
//!
//! Here everything is decided, and the headers that the packet gets are made. The hook puts them in place of
//! those that it has, as it alone can make the frame longer or shorter.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::answer::About;
use crate::checksum::{Change, Checksum};
use crate::detour::{self, Holds, NO_PORTS};
use crate::flow::{self, Bench, Flows, Refused};
use crate::icmp::{Error, IcmpHdr};
use crate::packet::{Frame, Ip, Link, Payload, Reads, TCP, Transport, UDP, forgotten};
use crate::path::{
    Asked, Asks, Flow, Kernel, OnWire, Part, Verdict, ask_about, claims, drop_counted, pass,
    payload, translation,
};
use crate::table::{Address, Direction, Dropped, FlowKey, Interface, Passed, Port, Size};

pub use self::headers::{Conversion, Crosses, headers};
use self::headers::{Fields, words};

mod headers;

/// What becomes of a packet.
// Not an enum: the verifier minds what is undefined in one. Aligned as it is written, which on the BPF stack has
// to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(8))]
pub struct Crossed {
    pub verdict: Verdict,
    pub then: Then,
}

/// What is to be done before the verdict.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Then {
    Nothing,
    /// It gets the headers of the [`Conversion`], and is [counted](Conversion::done).
    Convert,
    /// It was dropped, and [this](Conversion::answer) is to be sent in its frame.
    Answer,
}

impl Crossed {
    #[inline(always)]
    const fn done(verdict: Verdict) -> Self {
        Self { verdict, then: Then::Nothing }
    }
}

/// What a program does; a constant of each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// All, of whole packets of TCP and UDP.
    Whole,
    /// Of the detour, where there are ICMP errors, and what is only answered or dropped: finds the flow.
    Find,
    /// Of the detour: sends it.
    Send,
}

/// Decides what becomes of a packet that goes in `direction`, of a rule whose backend is of the other family.
/// `frame` is as it came.
#[inline(always)]
pub fn handle<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    step: Step,
    direction: Direction,
    mut frame: Frame<'_>,
) -> Crossed {
    let crossed = match step {
        Step::Whole => whole::<N, I, K>(kernel, direction, &mut frame),
        Step::Find => find::<N, I, K>(kernel, direction, &mut frame),
        Step::Send => send::<N, I, K>(kernel, direction, &mut frame),
    };
    or_pass(kernel, crossed)
}

#[inline(always)]
fn or_pass<K: Kernel>(kernel: &K, crossed: Result<Crossed, Passed>) -> Crossed {
    crossed.unwrap_or_else(|reason| Crossed::done(pass(kernel, reason)))
}

/// Makes this the key of a packet with these ends.
#[inline(always)]
fn put_key<const N: usize>(
    key: &mut FlowKey<16>,
    direction: Direction,
    protocol: u8,
    [source, destination]: [Address<N>; 2],
    (source_port, destination_port): (Port, Port),
) {
    key.source = source.mapped();
    key.destination = destination.mapped();
    (key.source_port, key.destination_port) = (source_port, destination_port);
    (key.protocol, key.direction) = (protocol, direction as u8 | FlowKey::<16>::CROSS);
    key.padding = [0; 2];
}

/// A whole packet of TCP or UDP.
// In steps that are not inlined, each of which reads the headers anew: so what one needs of the stack stands beside
// nothing else, and to the verifier all packets are one between them.
#[inline(always)]
fn whole<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    frame: &mut Frame<'_>,
) -> Result<Crossed, Passed> {
    let bench = Flows::<16>::bench(kernel).ok_or(Passed::NoFlow)?;
    match direction {
        Direction::Forward => {
            note::<true, N, I, K>(kernel, &mut bench.packet, frame)?;
            let crossed = look::<N, I, K>(kernel, bench);
            if crossed.then != Then::Convert {
                return Ok(crossed);
            }
            Ok(send_whole::<true, N, I, K>(kernel, bench, frame))
        }
        Direction::Reply => {
            note::<false, N, I, K>(kernel, &mut bench.packet, frame)?;
            if !flow::reply(kernel, bench) {
                return Ok(Crossed::done(Verdict::Flow(Part::Reply.program::<N>())));
            }
            Ok(send_whole::<false, N, I, K>(kernel, bench, frame))
        }
    }
}

/// A whole packet.
struct Packet<'a, I> {
    link: Link<'a>,
    ip: &'a mut I,
    transport: Transport<'a>,
    /// Neither options nor extension headers.
    is_plain: bool,
}

impl<'a, I> Packet<'a, I> {
    #[inline(always)]
    fn take<const N: usize, K: Kernel>(kernel: &K, frame: &mut Frame<'a>) -> Result<Self, Passed>
    where
        I: Crosses<N>,
    {
        let link = frame.take_link().ok_or(Passed::Malformed)?;
        let available = kernel.available(frame);
        let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
        let payload = payload::<N, I, K>(kernel, ip, frame, available)?;
        frame.jump(payload.offset);
        let transport = Payload { offset: 0, ..payload }.transport(frame)?;
        Ok(Self { link, ip, transport, is_plain: payload.offset == 0 })
    }

    /// What it is on a wire.
    #[inline(always)]
    fn on_wire<const N: usize, K: Kernel>(&self, kernel: &K) -> OnWire
    where
        I: Crosses<N>,
    {
        OnWire::of(kernel, self.ip, &self.transport)
    }
}

/// Writes down what flows look at of a whole packet.
#[inline(never)]
fn note<const FORWARD: bool, const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    to: &mut flow::Packet<16>,
    frame: &mut Frame<'_>,
) -> Result<(), Passed> {
    let direction = if FORWARD { Direction::Forward } else { Direction::Reply };
    let mut ahead = frame.ahead();
    let packet = Packet::<I>::take(kernel, &mut ahead)?;
    let Packet { ip, transport, .. } = &packet;
    let ends = [ip.source(), ip.destination()];
    put_key(&mut to.key, direction, transport.protocol(), ends, transport.ports());
    (to.segment, to.number) = transport.segment();
    to.flags = transport.flow_flags();
    (to.size, to.now) = (packet.on_wire(kernel).size, kernel.now());
    Ok(())
}

/// Looks for the flow of the packet on the bench, to a backend, or begins it: it is to be converted if it has one.
#[inline(always)]
fn look<const N: usize, I: Crosses<N>, K: Kernel>(kernel: &K, bench: &mut Bench<16>) -> Crossed {
    or_pass(kernel, looked::<N, I, K>(kernel, bench))
}

#[inline(always)]
fn looked<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    bench: &mut Bench<16>,
) -> Result<Crossed, Passed> {
    let ingress = kernel.ingress().ok_or(Passed::NoRule)?;
    (bench.inside, bench.hairpin) = (u32::from(!ingress.has(Interface::EXTERNAL)), 0);
    let FlowKey { destination, destination_port, protocol, .. } = &bench.packet.key;
    let listen = match N == 4 {
        true => destination.unmapped().widen(),
        false => destination.widen(),
    };
    let claims = claims::<N, I, K>(kernel, Direction::Forward, &listen.narrow());
    let claims = claims.ok_or(Passed::NoRule)?;
    let claimed = if *protocol == TCP { claims.tcp } else { claims.udp };
    let rule = translation(kernel, claimed, *destination_port).ok_or(Passed::NoRule)?;
    bench.counter = rule.counter;
    match flow::forward(kernel, rule, bench) {
        Ok(()) => Ok(Crossed { verdict: Verdict::Pass(Passed::NoFlow), then: Then::Convert }),
        Err(Refused::Pass(reason)) => Err(reason),
        Err(Refused::Drop(reason)) => Ok(dropped(kernel, bench, reason)),
    }
}

/// Sends one whose flow is on the bench.
// Not inlined: what it needs of the stack stands beside nothing else.
#[inline(never)]
fn send_whole<const FORWARD: bool, const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    bench: &Bench<16>,
    frame: &mut Frame<'_>,
) -> Crossed {
    let direction = if FORWARD { Direction::Forward } else { Direction::Reply };
    or_pass(kernel, sent::<N, I, K>(kernel, direction, bench, frame))
}

#[inline(always)]
fn sent<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    bench: &Bench<16>,
    frame: &mut Frame<'_>,
) -> Result<Crossed, Passed> {
    let packet = Packet::<I>::take(kernel, frame)?;
    let longest = packet.on_wire(kernel).longest;
    let Packet { mut link, ip, mut transport, is_plain } = packet;
    let is_udp = matches!(transport, Transport::Udp(_));
    // IPv6 has no UDP without a checksum (RFC 8200, section 8.1).
    let lacks_sum = is_udp && *transport.check().field == [0, 0];
    if !is_plain || lacks_sum {
        return Ok(dropped(kernel, bench, Dropped::NoCounterpart));
    }
    let protocol = transport.protocol();
    let leaves = Leaves { protocol, ports: transport.ports(), longest, is_error: false };
    let verdict = match leave::<N, I, K>(kernel, direction, bench, &mut link, ip, leaves)? {
        Crossed { verdict, then: Then::Convert } => verdict,
        other => return Ok(other),
    };
    let FlowKey { source_port, destination_port, .. } = bench.becomes;
    let ports = transport.set_port(Direction::Forward, destination_port);
    let ports = ports.and(transport.set_port(Direction::Reply, source_port));
    kernel.repair(transport.check(), changed(bench), ports);
    let len = ip.length().wrapping_sub(headers::<N, false>() as u16);
    begin::<N, I, K>(kernel, bench, ip, protocol, len, longest)?;
    Ok(Crossed { verdict, then: Then::Convert })
}

/// An ICMP error; or a packet that goes no further, or in fragments, of which only errors are translated.
#[inline(always)]
fn find<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    frame: &mut Frame<'_>,
) -> Result<Crossed, Passed> {
    frame.take_link().ok_or(Passed::Malformed)?;
    let available = kernel.available(frame);
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let nothing = kernel.nothing();
    let whole = ip.whole(available, || kernel.beyond())?;
    let payload = ip.payload(frame, whole, Reads::All)?.forgotten(nothing)?;
    // As in the detour: to look ahead.
    let ahead = &mut frame.ahead();
    ahead.jump(payload.offset);
    let part = Holds::of::<N, I>(ahead, direction, &payload)?;
    let ends = match part {
        Holds::Segment => {
            let ports = detour::segment(ahead, &payload)?.ports();
            Flow::between(ip, payload.protocol, ports)
        }
        Holds::Error => Error::<I>::take(ahead, direction, payload.len)?.ends(),
        Holds::Rest => return Err(Passed::Fragment),
    };
    if ends.destination != ip.destination().widen() {
        return Err(Passed::Icmp);
    }
    if !matches!(ends.protocol, TCP | UDP) {
        return Err(Passed::Protocol);
    }
    let is_error = forgotten(u32::from(matches!(part, Holds::Error)), nothing) != 0;
    let ends = ends.forgotten(nothing);
    let payload = payload.forgotten(nothing)?;
    let bench = Flows::<16>::bench(kernel).ok_or(Passed::NoFlow)?;
    let addresses = [ends.source.narrow::<N>(), ends.destination.narrow()];
    let ports = (ends.source_port, ends.destination_port);
    put_key(&mut bench.packet.key, direction, ends.protocol, addresses, ports);
    let length = ip.length();
    (bench.packet.segment, bench.packet.number) = (flow::Segment::Looks, 0);
    (bench.packet.flags, bench.packet.now) = (0, kernel.now());
    bench.packet.size = Size::one(length);
    match direction {
        Direction::Forward => {
            let rule = detour::claimed::<N, I, K>(kernel, direction, &ends)?;
            if detour::is_own(kernel, rule, &ends) {
                return Err(Passed::Own);
            }
            let ingress = kernel.ingress().ok_or(Passed::NoRule)?;
            (bench.inside, bench.hairpin) = (u32::from(!ingress.has(Interface::EXTERNAL)), 0);
            bench.counter = rule.counter;
            let fragment = payload.fragment.has_more();
            if fragment {
                return Ok(dropped(kernel, bench, Dropped::NoCounterpart));
            }
            if flow::forward(kernel, rule, bench).is_err() {
                return Err(if is_error { Passed::Icmp } else { Passed::NoFlow });
            }
        }
        Direction::Reply => {
            if !flow::reply(kernel, bench) {
                return Err(match is_error {
                    true => Passed::Icmp,
                    false if ip.ttl() <= 1 => Passed::Ttl,
                    false => Passed::NoFlow,
                });
            }
        }
    }
    let part = match direction {
        Direction::Forward => Part::CrossSendForward,
        Direction::Reply => Part::CrossSendReply,
    };
    Ok(Crossed::done(Verdict::Flow(part.program::<N>())))
}

/// The same, once its flow is on the bench. To find and to send are apart: there is not room enough on the stack
/// for both.
#[inline(always)]
fn send<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    frame: &mut Frame<'_>,
) -> Result<Crossed, Passed> {
    let bench = Flows::<16>::bench(kernel).ok_or(Passed::NoFlow)?;
    match direction {
        Direction::Forward => send_few::<true, N, I, K>(kernel, bench, frame),
        Direction::Reply => send_few::<false, N, I, K>(kernel, bench, frame),
    }
}

// As with whole packets, in steps that are not inlined.
#[inline(always)]
fn send_few<const FORWARD: bool, const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    bench: &Bench<16>,
    frame: &mut Frame<'_>,
) -> Result<Crossed, Passed> {
    let crossed = leave_few::<FORWARD, N, I, K>(kernel, bench, frame);
    if crossed.then != Then::Convert {
        return Ok(crossed);
    }
    let begun = begin_error::<N, I, K>(kernel, bench, &mut frame.ahead());
    Ok(match begun.and_then(|()| write_error::<FORWARD, N, I, K>(kernel, bench, frame)) {
        Ok(()) => crossed,
        Err(_) => dropped(kernel, bench, Dropped::NoCounterpart),
    })
}

/// The way of an ICMP error, which is to be converted then; others are answered or dropped.
#[inline(never)]
fn leave_few<const FORWARD: bool, const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    bench: &Bench<16>,
    frame: &mut Frame<'_>,
) -> Crossed {
    let direction = if FORWARD { Direction::Forward } else { Direction::Reply };
    or_pass(kernel, left::<N, I, K>(kernel, direction, bench, &mut frame.ahead()))
}

#[inline(always)]
fn left<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    bench: &Bench<16>,
    frame: &mut Frame<'_>,
) -> Result<Crossed, Passed> {
    let mut link = frame.take_link().ok_or(Passed::Malformed)?;
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let is_error = ip.may_carry_icmp() && ip.is_plain(I::PROTOCOL);
    let ends_here = ip.ttl() <= 1;
    if !(is_error || ends_here) {
        return Ok(dropped(kernel, bench, Dropped::NoCounterpart));
    }
    let protocol = if is_error { I::OTHERS_ICMP } else { bench.packet.key.protocol };
    let leaves = Leaves { protocol, ports: NO_PORTS, longest: ip.length(), is_error };
    leave::<N, I, K>(kernel, direction, bench, &mut link, ip, leaves)
}

/// Makes the first header of an ICMP error that [leaves](leave).
#[inline(never)]
fn begin_error<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    bench: &Bench<16>,
    frame: &mut Frame<'_>,
) -> Result<(), Passed> {
    frame.take_link().ok_or(Passed::Malformed)?;
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let length = ip.length();
    if !ip.is_plain(I::PROTOCOL) {
        return Err(Passed::Icmp);
    }
    let len = length.wrapping_sub(headers::<N, false>() as u16);
    let others_len = I::others_length(len);
    begin::<N, I, K>(kernel, bench, ip, I::OTHERS_ICMP, others_len, length)?;
    let mut change = I::pseudo(&ip.source().mapped(), &ip.destination().mapped(), len).inverse();
    if N == 4 {
        let FlowKey { source, destination, .. } = &bench.becomes;
        change = change.and(Ipv6Hdr::pseudo(source, destination, others_len));
    }
    kernel.conversion().ok_or(Passed::NoFlow)?.pseudo = change.sum();
    Ok(())
}

/// Makes the other headers. It has no counterpart if this fails.
#[inline(never)]
fn write_error<const FORWARD: bool, const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    bench: &Bench<16>,
    frame: &mut Frame<'_>,
) -> Result<(), Passed> {
    let direction = if FORWARD { Direction::Forward } else { Direction::Reply };
    frame.take_link().ok_or(Passed::Malformed)?;
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let len = ip.length().wrapping_sub(headers::<N, false>() as u16);
    let Error { icmp, ip: quoted, mut segment } =
        Error::<I>::take(frame, direction, usize::from(len))?;
    let (kind, rest) = I::others_error(icmp.kind, icmp.rest).ok_or(Passed::Icmp)?;
    // Else what follows would be verified for each kind.
    let nothing = kernel.nothing();
    let [first, second, ..] =
        forgotten(u32::from_ne_bytes([kind[0], kind[1], 0, 0]), nothing).to_ne_bytes();
    let kind = [first, second];
    let rest = forgotten(u32::from_ne_bytes(rest), nothing).to_ne_bytes();
    if !quoted.is_plain(segment.protocol()) {
        return Err(Passed::Icmp);
    }
    let FlowKey { source, destination, source_port, destination_port, .. } = &bench.becomes;
    // What was quoted went the other way.
    let before = segment.rewrite_quoted(Direction::Forward, *source_port, changed(bench));
    let behind =
        segment.rewrite_quoted(Direction::Reply, *destination_port, Change::default()).and(before);
    kernel.unbalanced(behind);
    let conversion = kernel.conversion().ok_or(Passed::NoFlow)?;
    let fields = Fields {
        class: quoted.class_byte(),
        protocol: segment.protocol(),
        hops: quoted.ttl(),
        len: quoted.length().wrapping_sub(headers::<N, false>() as u16),
        identification: identification::<N, I, K>(kernel, quoted, quoted.length()),
        source: destination,
        destination: source,
    };
    let change = Change::default()
        .field(icmp.kind, kind)
        .field([icmp.rest[0], icmp.rest[1]], [rest[0], rest[1]])
        .field([icmp.rest[2], icmp.rest[3]], [rest[2], rest[3]])
        .and(words(quoted).inverse())
        .and(Change::from_sum(conversion.pseudo))
        .and(behind);
    let (header, change) = if N == 4 {
        conversion.write::<48, N>(&fields);
        let quoted = words(conversion.part::<48, Ipv6Hdr>());
        (conversion.part::<40, IcmpHdr>(), change.and(quoted))
    } else {
        conversion.write::<28, N>(&fields);
        let quoted = words(conversion.part::<28, Ipv4Hdr>());
        (conversion.part::<20, IcmpHdr>(), change.and(quoted))
    };
    let checksum = Checksum(icmp.checksum).update(change).0;
    *header = IcmpHdr { kind, checksum, rest };
    Ok(())
}

/// What changed in the ends of the packet on the bench, for the pseudo header.
// An address that stands for one of IPv4 sums to the same as that: 0xffff is nothing.
#[inline(always)]
fn changed(bench: &Bench<16>) -> Change {
    let (came, goes) = (&bench.packet.key, &bench.becomes);
    Change::default()
        .address(&came.source.0, &goes.source.0)
        .address(&came.destination.0, &goes.destination.0)
}

#[inline(always)]
fn dropped<K: Kernel>(kernel: &K, bench: &Bench<16>, reason: Dropped) -> Crossed {
    kernel.note(|| Flow::of_key(&bench.packet.key));
    Crossed::done(drop_counted(kernel, bench.counter, reason))
}

/// What leaves.
struct Leaves {
    /// As it leaves.
    protocol: u8,
    ports: (Port, Port),
    /// As it came.
    longest: u16,
    is_error: bool,
}

/// Asks for the way of a packet whose flow is on the bench, and notes what it leaves with. It is only converted
/// if this says so.
#[inline(always)]
fn leave<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    bench: &Bench<16>,
    link: &mut Link<'_>,
    ip: &I,
    Leaves { protocol, ports, longest, is_error }: Leaves,
) -> Result<Crossed, Passed> {
    let FlowKey { source, destination, source_port, destination_port, .. } = &bench.becomes;
    let [source, destination] = match N == 4 {
        true => [source.widen(), destination.widen()],
        false => [source.unmapped().widen(), destination.unmapped().widen()],
    };
    let family = if N == 4 { Ipv6Hdr::FAMILY } else { Ipv4Hdr::FAMILY };
    let ports = if ports == NO_PORTS { ports } else { (*source_port, *destination_port) };
    let goes = Flow {
        family,
        protocol,
        source_port: ports.0,
        destination_port: ports.1,
        source,
        destination,
    };
    let length = I::others_length(longest);
    let Asked { verdict, hop, narrow } = if ip.ttl() <= 1 {
        Asked { verdict: Verdict::detour(direction, Passed::Ttl), hop: None, narrow: 0 }
    } else {
        let (class, whole) = (ip.others_class(), ip.others_is_whole(length));
        let asks = Asks { longest: length, came: longest, class, whole };
        ask_about(kernel, direction, bench.hairpin != 0, asks, &goes)?
    };
    let (reason, about) = match verdict {
        Verdict::ForwardDetour(Passed::Ttl) | Verdict::ReplyDetour(Passed::Ttl) => {
            (Dropped::TtlExpired, About::TIME_EXCEEDED)
        }
        Verdict::ForwardDetour(_) | Verdict::ReplyDetour(_) => {
            (Dropped::TooBig, About::too_big(I::length_of_others(narrow)))
        }
        Verdict::Drop(reason) => (reason, About::NOTHING),
        verdict => {
            kernel.note(|| Flow::of_key(&bench.packet.key));
            let conversion = kernel.conversion().ok_or(Passed::NoFlow)?;
            conversion.routed = u32::from(hop.is_some());
            if let Some(hop) = hop {
                conversion.link = hop.link;
            }
            (conversion.counter, conversion.direction) = (bench.counter, direction as u32);
            (conversion.size, conversion.now) = (bench.packet.size, bench.packet.now);
            return Ok(Crossed { verdict, then: Then::Convert });
        }
    };
    let answer = match about != About::NOTHING && !is_error {
        true => detour::answer(kernel, about, link, ip),
        false => None,
    };
    let crossed = dropped(kernel, bench, reason);
    let Some(answer) = answer else { return Ok(crossed) };
    kernel.count(bench.counter, |counter| counter.answered += 1);
    kernel.conversion().ok_or(Passed::NoFlow)?.answer = answer;
    Ok(Crossed { verdict: Verdict::Drop(reason), then: Then::Answer })
}

/// Makes the first header, of a packet that [leaves](leave) with `len` bytes behind it.
#[inline(always)]
fn begin<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    bench: &Bench<16>,
    ip: &I,
    protocol: u8,
    len: u16,
    longest: u16,
) -> Result<(), Passed> {
    let conversion = kernel.conversion().ok_or(Passed::NoFlow)?;
    let FlowKey { source, destination, .. } = &bench.becomes;
    // The stack takes a hop off itself.
    let hops = ip.ttl().wrapping_sub(conversion.routed as u8);
    let class = ip.class_byte();
    let identification = identification::<N, I, K>(kernel, ip, longest);
    let fields = Fields { class, protocol, hops, len, identification, source, destination };
    conversion.write::<0, N>(&fields);
    Ok(())
}

/// Of what had `length` bytes: 0 if it must not be fragmented.
#[inline(always)]
fn identification<const N: usize, I: Crosses<N>, K: Kernel>(
    kernel: &K,
    ip: &I,
    length: u16,
) -> u16 {
    match ip.others_is_whole(I::others_length(length)) {
        true => 0,
        false => (kernel.random() as u16).max(1),
    }
}
