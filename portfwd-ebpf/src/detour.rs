//! The way of the few: ICMP errors, fragments, and what goes no further but has an answer. Programs
//! of their own, to which the [common way](crate::path) jumps, so that it costs other packets nothing:
//! one for each direction, and one more for each family of those that a flow decides about.
//!
//! Each starts anew and takes any packet. Everything is decided before the first byte is changed.

use network_types::{tcp::TcpHdr, udp::UdpHdr};

use crate::answer::{About, Answer};
use crate::checksum::Change;
use crate::flow::{self, Bench, Flows, Refused};
use crate::icmp::{Error, Icmp};
use crate::packet::{Fragment, Frame, ICMP, ICMPV6, Ip, Link, Payload, Reads, TCP, UDP, forgotten};
use crate::path::{
    Asked, Flow, Kernel, OnWire, Part, Verdict, Way, ask, claims, count, drop_counted, network,
    pass, remember_arrival, translation,
};
use crate::segment::Segment;
use crate::table::{
    Address, Direction, Dropped, FirstFragment, FlowKey, FragmentKey, Hop, Interface, Jiffies,
    Passed, Port, Size, Translation,
};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Done(Verdict),
    /// It is dropped, and this is to be sent in its frame.
    Answer(Dropped, Answer),
}

/// Decides and does what becomes of a packet that goes in `direction`, but for sending an answer.
#[inline(always)]
pub fn handle<K: Kernel>(kernel: &K, direction: Direction, mut frame: Frame<'_>) -> Outcome {
    done(kernel, network(kernel, Detour(direction), &mut frame))
}

/// The part of the detour that flows decide. `frame` is as it came.
#[inline(always)]
pub fn handle_flow<const N: usize, I: Icmp<N>, K: Kernel + Flows<N>>(
    kernel: &K,
    part: FlowPart,
    mut frame: Frame<'_>,
) -> Outcome {
    done(kernel, of_flow::<N, I, K>(kernel, part, &mut frame))
}

/// Of a packet of the detour that flows decide about. To find and to send are apart: there is not room
/// enough on the stack for both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowPart {
    /// Looks for its flow.
    Find(Direction),
    /// Sends it: its flow is on the bench.
    Send(Direction),
}

#[inline(always)]
fn done<K: Kernel>(kernel: &K, decided: Result<Outcome, Passed>) -> Outcome {
    decided.unwrap_or_else(|reason| Outcome::Done(pass(kernel, reason)))
}

struct Detour(Direction);

impl Way for Detour {
    type End = Outcome;

    #[inline(always)]
    fn ip<const N: usize, I: Icmp<N>, K: Kernel>(
        self,
        kernel: &K,
        mut link: Link<'_>,
        frame: &mut Frame<'_>,
    ) -> Result<Outcome, Passed> {
        let Self(direction) = self;
        let available = kernel.available(frame);
        let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
        let decided =
            translate::<N, I, K, _>(kernel, Alone, direction, &mut link, ip, available, frame);
        let Err(reason) = decided else { return decided };
        let has = |direction, address| claims::<N, I, K>(kernel, direction, &address).is_some();
        let next = match (direction, reason) {
            (Direction::Forward, Passed::NoFlow) => Part::FindForward,
            // To an address of the box that masquerades clients, from where backends are. Errors are of any
            // router there.
            (Direction::Forward, Passed::NoRule | Passed::Icmp | Passed::Fragment)
                if kernel.ingress().is_some_and(|ingress| ingress.has(Interface::INTERNAL))
                    && (reason == Passed::Icmp || has(Direction::Reply, ip.source())) =>
            {
                Part::FindReply
            }
            (Direction::Reply, Passed::NoFlow | Passed::Inside | Passed::Ttl) => Part::FindReply,
            // Of a client inside, and whole, maybe: it came here as its extension headers could have hidden
            // ICMP.
            (Direction::Reply, Passed::NoRule)
                if !has(Direction::Reply, ip.source())
                    && has(Direction::Forward, ip.destination()) =>
            {
                Part::Hairpin
            }
            (Direction::Reply, Passed::NoRule | Passed::Icmp | Passed::Fragment)
                if has(Direction::Reply, ip.source())
                    || has(Direction::Forward, ip.destination()) =>
            {
                Part::FindReply
            }
            _ => return Err(reason),
        };
        Ok(Outcome::Done(Verdict::Flow(next.program::<N>())))
    }
}

#[inline(always)]
fn of_flow<const N: usize, I: Icmp<N>, K: Kernel + Flows<N>>(
    kernel: &K,
    part: FlowPart,
    frame: &mut Frame<'_>,
) -> Result<Outcome, Passed> {
    let link = &mut frame.take_link().ok_or(Passed::Malformed)?;
    let available = kernel.available(frame);
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let bench = kernel.bench().ok_or(Passed::NoFlow)?;
    let (direction, decided) = match part {
        FlowPart::Find(direction) => {
            let finds = Finds(bench);
            (direction, translate(kernel, finds, direction, link, ip, available, frame))
        }
        FlowPart::Send(direction) => {
            let found = Found(bench);
            (direction, translate(kernel, found, direction, link, ip, available, frame))
        }
    };
    let is_claimed = || claims::<N, I, K>(kernel, Direction::Forward, &ip.destination()).is_some();
    match decided {
        // From a client inside, then.
        Err(
            Passed::NoRule
            | Passed::NoFlow
            | Passed::Inside
            | Passed::Icmp
            | Passed::Fragment
            | Passed::Ttl,
        ) if direction == Direction::Reply && is_claimed() => {
            Ok(Outcome::Done(Verdict::Flow(Part::FindForward.program::<N>())))
        }
        decided => decided,
    }
}

/// What the end becomes that a direction translates.
#[derive(Clone, Copy)]
struct Becomes<const N: usize> {
    address: Address<N>,
    port: Port,
    /// Of the [`Translation`].
    flags: u32,
    /// The rule's row in `COUNTERS`.
    counter: u32,
}

/// What the end becomes that a direction does not translate.
#[derive(Clone, Copy)]
struct Other<const N: usize> {
    address: Address<N>,
    port: Port,
    /// It is the address that it had. Of an ICMP error, which may come from anywhere, that is of what it
    /// quotes.
    stays: bool,
}

/// How a packet is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Asks {
    /// It may begin a flow, and counts in it.
    begins: bool,
    size: Size,
    /// It has no hop left.
    ends_here: bool,
}

impl Asks {
    /// The packet for the bench.
    #[inline(always)]
    fn packet<const N: usize, K: Kernel>(
        &self,
        kernel: &K,
        direction: Direction,
        ends: &Flow,
    ) -> flow::Packet<N> {
        flow::Packet {
            key: FlowKey {
                source: ends.source.narrow(),
                destination: ends.destination.narrow(),
                source_port: ends.source_port,
                destination_port: ends.destination_port,
                protocol: ends.protocol,
                direction: direction as u8,
                padding: [0; 2],
            },
            segment: match ends.protocol {
                _ if !self.begins => flow::Segment::Looks,
                UDP => flow::Segment::None,
                // Whether a connection begins or ends is not looked for in fragments.
                _ => flow::Segment::Other,
            },
            number: 0,
            flags: 0,
            size: self.size,
            now: kernel.now(),
        }
    }
}

/// What becomes of a packet that is not translated.
type Otherwise = Result<Verdict, Passed>;

/// Who says what becomes of a packet.
trait Decides<const N: usize, K: Kernel> {
    /// What a packet with these ends becomes. What an ICMP error quotes is asked for as a packet that
    /// goes the way of the error. A forward packet that ends here becomes nothing, and its answer is of
    /// its rule alone.
    fn becomes<I: Ip<N>>(
        &mut self,
        kernel: &K,
        direction: Direction,
        ends: &Flow,
        asks: Asks,
    ) -> Result<Becomes<N>, Otherwise>;

    /// What a later fragment becomes.
    fn like(
        &mut self,
        direction: Direction,
        first: &FirstFragment,
    ) -> Result<Becomes<N>, Otherwise>;

    /// What the other end becomes of a packet of which that is known; none if it stays.
    fn other(&self, direction: Direction) -> Option<Other<N>>;

    /// To be remembered with the first fragment: [`FirstFragment`]'s.
    fn flags(&self) -> u32;
}

/// What rules claim of a packet with these ends.
#[inline(always)]
pub(crate) fn claimed<'k, const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &'k K,
    direction: Direction,
    ends: &Flow,
) -> Result<&'k Translation, Passed> {
    let (address, port) = ends.end(direction);
    let claims = claims::<N, I, K>(kernel, direction, &address.narrow()).ok_or(Passed::NoRule)?;
    let (ports, place, unclaimed) = match ends.protocol {
        TCP => (claims.tcp, port, Passed::NoRule),
        UDP => (claims.udp, port, Passed::NoRule),
        protocol => (claims.other, Port::new(protocol.into()), Passed::Protocol),
    };
    translation(kernel, ports, place).ok_or(unclaimed)
}

/// Of the protocols other than TCP and UDP the control plane knows which are the box's.
#[inline(always)]
pub(crate) fn is_own<K: Kernel>(kernel: &K, translation: &Translation, ends: &Flow) -> bool {
    translation.has(Translation::ASK_SOCKETS)
        && matches!(ends.protocol, TCP | UDP)
        && kernel.has_socket(ends)
}

/// Stateless rules.
struct Alone;

impl<const N: usize, K: Kernel> Decides<N, K> for Alone {
    #[inline(always)]
    fn becomes<I: Ip<N>>(
        &mut self,
        kernel: &K,
        direction: Direction,
        ends: &Flow,
        Asks { ends_here, .. }: Asks,
    ) -> Result<Becomes<N>, Otherwise> {
        let translation = claimed::<N, I, K>(kernel, direction, ends).map_err(Err)?;
        if translation.has(Translation::STATEFUL) && !(ends_here && direction == Direction::Forward)
        {
            return Err(Err(Passed::NoFlow));
        }
        if is_own(kernel, translation, ends) {
            return Err(Err(Passed::Own));
        }
        let Translation { mut address, shift, flags, counter, .. } = *translation;
        if direction == Direction::Reply
            && translation.has(Translation::MANY_ADDRESSES)
            && let Some(arrival) = kernel.arrival(&ends.reversed().arrival())
        {
            address = arrival;
        }
        let (_, port) = ends.end(direction);
        Ok(Becomes { address: address.narrow(), port: port.shifted(shift), flags, counter })
    }

    #[inline(always)]
    fn like(&mut self, _: Direction, first: &FirstFragment) -> Result<Becomes<N>, Otherwise> {
        if first.flags & FirstFragment::OF_FLOW != 0 {
            return Err(Err(Passed::NoFlow));
        }
        let FirstFragment { address, counter, .. } = *first;
        Ok(Becomes { address: address.narrow(), port: Port::NONE, flags: 0, counter })
    }

    #[inline(always)]
    fn other(&self, _: Direction) -> Option<Other<N>> {
        None
    }

    #[inline(always)]
    fn flags(&self) -> u32 {
        0
    }
}

/// Looks for a flow, or begins one. What the packet becomes is on the bench then.
struct Finds<'k, const N: usize>(&'k mut Bench<N>);

impl<const N: usize, K: Kernel + Flows<N>> Decides<N, K> for Finds<'_, N> {
    #[inline(always)]
    fn becomes<I: Ip<N>>(
        &mut self,
        kernel: &K,
        direction: Direction,
        ends: &Flow,
        asks: Asks,
    ) -> Result<Becomes<N>, Otherwise> {
        let Self(bench) = self;
        // Others have no ports to tell flows by.
        if !matches!(ends.protocol, TCP | UDP) {
            let ends_here = direction == Direction::Reply && asks.ends_here;
            return Err(Err(if ends_here { Passed::Ttl } else { Passed::Protocol }));
        }
        bench.packet = asks.packet(kernel, direction, ends);
        if direction == Direction::Reply && flow::reply(kernel, bench) {
            return Err(Ok(send::<N>(direction)));
        }
        let translation = claimed::<N, I, K>(kernel, direction, ends).map_err(Err)?;
        if translation.has(Translation::CROSS) {
            let part = match direction {
                Direction::Forward => Part::CrossFindForward,
                Direction::Reply => Part::CrossFindReply,
            };
            return Err(Ok(Verdict::Flow(part.program::<N>())));
        }
        (bench.becomes, bench.counter) = (bench.packet.key, translation.counter);
        bench.hairpin = 0;
        Err(match direction {
            Direction::Forward => {
                if is_own(kernel, translation, ends) {
                    return Err(Err(Passed::Own));
                }
                let ingress = kernel.ingress().ok_or(Err(Passed::NoRule))?;
                bench.inside = u32::from(!ingress.has(Interface::EXTERNAL));
                // Clients inside need a flow whatever the rule says.
                if bench.inside == 0 && !translation.has(Translation::STATEFUL) {
                    return Err(Err(Passed::NoRule));
                }
                if asks.ends_here {
                    return Err(Ok(send::<N>(direction)));
                }
                match flow::forward(kernel, translation, bench) {
                    Ok(()) => Ok(send::<N>(direction)),
                    Err(Refused::Pass(reason)) => Err(reason),
                    Err(Refused::Drop(reason)) => {
                        Ok(drop_counted(kernel, translation.counter, reason))
                    }
                }
            }
            Direction::Reply if translation.has(Translation::ALSO_ALONE) => {
                bench.becomes.source = translation.address.narrow();
                bench.becomes.source_port = ends.source_port.shifted(translation.shift);
                Ok(send::<N>(direction))
            }
            Direction::Reply if asks.ends_here => Err(Passed::Ttl),
            Direction::Reply if translation.has(Translation::STATEFUL) => Err(Passed::NoFlow),
            Direction::Reply => Err(Passed::Inside),
        })
    }

    #[inline(always)]
    fn like(&mut self, direction: Direction, _: &FirstFragment) -> Result<Becomes<N>, Otherwise> {
        Err(Ok(send::<N>(direction)))
    }

    #[inline(always)]
    fn other(&self, _: Direction) -> Option<Other<N>> {
        None
    }

    #[inline(always)]
    fn flags(&self) -> u32 {
        0
    }
}

/// That the packet is sent as the bench says.
const fn send<const N: usize>(direction: Direction) -> Verdict {
    let part = match direction {
        Direction::Forward => Part::SendForward,
        Direction::Reply => Part::SendReply,
    };
    Verdict::Flow(part.program::<N>())
}

/// Sends what was found.
struct Found<'k, const N: usize>(&'k mut Bench<N>);

impl<const N: usize, K: Kernel> Decides<N, K> for Found<'_, N> {
    #[inline(always)]
    fn becomes<I: Ip<N>>(
        &mut self,
        _: &K,
        direction: Direction,
        _: &Flow,
        _: Asks,
    ) -> Result<Becomes<N>, Otherwise> {
        let Self(Bench { packet, becomes, stays, .. }) = self;
        let [came, goes] = [packet.key, *becomes].map(|key| key.end(direction.opposite()).0);
        *stays = came.is(&goes).into();
        Ok(self.translated(direction))
    }

    #[inline(always)]
    fn like(
        &mut self,
        direction: Direction,
        first: &FirstFragment,
    ) -> Result<Becomes<N>, Otherwise> {
        if first.flags & FirstFragment::OF_FLOW == 0 {
            return Err(Err(Passed::Fragment));
        }
        let Self(bench) = self;
        let (address, other) = (first.address.narrow(), first.other.narrow());
        (bench.becomes.source, bench.becomes.destination) = match direction {
            Direction::Forward => (other, address),
            Direction::Reply => (address, other),
        };
        bench.counter = first.counter;
        bench.hairpin = (first.flags & FirstFragment::HAIRPIN != 0).into();
        bench.stays = (first.flags & FirstFragment::STAYS != 0).into();
        Ok(self.translated(direction))
    }

    #[inline(always)]
    fn other(&self, direction: Direction) -> Option<Other<N>> {
        let (address, port) = self.0.becomes.end(direction.opposite());
        Some(Other { address, port, stays: self.0.stays != 0 })
    }

    #[inline(always)]
    fn flags(&self) -> u32 {
        let Bench { hairpin, stays, .. } = &*self.0;
        let flags = [*hairpin * FirstFragment::HAIRPIN, *stays * FirstFragment::STAYS];
        FirstFragment::OF_FLOW | flags[0] | flags[1]
    }
}

impl<const N: usize> Found<'_, N> {
    #[inline(always)]
    fn translated(&self, direction: Direction) -> Becomes<N> {
        let (address, port) = self.0.becomes.end(direction);
        Becomes { address, port, flags: 0, counter: self.0.counter }
    }
}

/// What of a packet is there behind its IP header.
// Not an enum with the headers in it: the verifier minds pointers that are put together from parts.
#[derive(Clone, Copy)]
pub(crate) enum Holds {
    Segment,
    /// An ICMP error.
    Error,
    /// A fragment without the first bytes.
    Rest,
}

impl Holds {
    /// Of a payload that starts where the frame does now.
    #[inline(always)]
    pub(crate) fn of<const N: usize, I: Icmp<N>>(
        frame: &Frame<'_>,
        direction: Direction,
        Payload { protocol, fragment, .. }: &Payload,
    ) -> Result<Self, Passed> {
        if fragment.offset != 0 {
            return Ok(Self::Rest);
        }
        if !matches!(*protocol, ICMP | ICMPV6) {
            return Ok(Self::Segment);
        }
        if *protocol != I::PROTOCOL {
            return Err(Passed::Icmp);
        }
        let [kind] = frame.peek::<[u8; 1]>(0).ok_or(Passed::Malformed)?;
        // Answers to the box are the box's, and all that is about its neighbours.
        let echo = match direction {
            Direction::Forward => I::ECHO,
            Direction::Reply => I::ECHO_REPLY,
        };
        if I::is_error(kind) && !fragment.has_more() {
            Ok(Self::Error)
        } else if kind == echo {
            Ok(Self::Segment)
        } else {
            Err(Passed::Icmp)
        }
    }
}

#[inline(always)]
fn translate<const N: usize, I: Icmp<N>, K: Kernel, D: Decides<N, K>>(
    kernel: &K,
    mut decides: D,
    direction: Direction,
    link: &mut Link<'_>,
    ip: &mut I,
    available: usize,
    frame: &mut Frame<'_>,
) -> Result<Outcome, Passed> {
    let whole = ip.whole(available, || kernel.beyond())?;
    let nothing = kernel.nothing();
    let payload = ip.payload(frame, whole, Reads::All)?.forgotten(nothing)?;
    let Payload { protocol, fragment, .. } = payload;
    // To look ahead: what is changed is taken when it is known that it is.
    let ahead = &mut frame.ahead();
    ahead.jump(payload.offset);
    let part = Holds::of::<N, I>(ahead, direction, &payload)?;
    let ends = match part {
        Holds::Segment => Flow::between(ip, protocol, segment(ahead, &payload)?.ports()),
        Holds::Error => Error::<I>::take(ahead, direction, payload.len)?.ends(),
        Holds::Rest => Flow::between(ip, protocol, NO_PORTS),
    };
    // An error goes to whoever sent what it quotes. Nobody else gets one to disturb flows with.
    if ends.destination != ip.destination().widen() {
        return Err(Passed::Icmp);
    }
    // As with the payload: all packets are one to the verifier from here on.
    const FIRST: u32 = 1 << 8;
    const ENDS_HERE: u32 = 1 << 9;
    let first = if fragment.has_more() && fragment.offset == 0 { FIRST } else { 0 };
    let last = if ip.ttl() <= 1 && !kernel.is_sent() { ENDS_HERE } else { 0 };
    let state = forgotten(part as u32 | first | last, nothing);
    let is = |what: Holds| state & 0xff == what as u32;
    let (is_first, ends_here) = (state & FIRST != 0, state & ENDS_HERE != 0);
    let ends = ends.forgotten(nothing);
    let payload = payload.forgotten(nothing)?;
    let Payload { protocol, fragment, .. } = payload;
    frame.jump(payload.offset);
    let ports = match is(Holds::Segment) {
        true => (ends.source_port, ends.destination_port),
        // What an error quotes has ports, but not the error itself.
        false => NO_PORTS,
    };
    let to = if is(Holds::Rest) {
        if usize::from(fragment.offset) + payload.len > usize::from(u16::MAX) {
            return Err(Passed::Malformed);
        }
        let FragmentBench { key, first: copy } = kernel.fragment_bench().ok_or(Passed::Fragment)?;
        *key = key_of(direction, ip, protocol, fragment);
        let is_its = kernel.first_fragment(key, |first| {
            *copy = *first;
            first.is(key)
        });
        if is_its != Some(true) || kernel.now() >= copy.until {
            return Err(Passed::Fragment);
        }
        match decides.like(direction, copy) {
            Ok(to) => to,
            Err(otherwise) => return otherwise.map(Outcome::Done),
        }
    } else {
        let size = Size::one(ip.length());
        let asks = Asks { begins: is_first && !ends_here, size, ends_here };
        match decides.becomes::<I>(kernel, direction, &ends, asks) {
            Ok(to) => to,
            Err(Err(Passed::NoRule | Passed::Protocol)) if protocol == I::PROTOCOL => {
                return Err(Passed::Icmp);
            }
            Err(otherwise) => return otherwise.map(Outcome::Done),
        }
    };

    // Made where it is needed: there is little room to keep it.
    let came = || Flow::between(ip, protocol, ports);
    // The stack would take it for the box's own, and cannot tell the sender.
    let is_to_box = match direction {
        Direction::Forward => true,
        Direction::Reply => decides.other(direction).is_some_and(|client| !client.stays),
    };
    let Asked { verdict, hop, narrow } = if ends_here {
        Asked { verdict: Verdict::detour(direction, Passed::Ttl), hop: None, narrow: 0 }
    } else {
        let hairpin = decides.flags() & FirstFragment::HAIRPIN != 0;
        let other = decides.other(direction);
        let goes = goes(came(), direction, &to, other, is(Holds::Segment));
        let longest = on_wire(kernel, ip, frame, &payload).longest;
        ask(kernel, direction, hairpin, ip, longest, &goes)?
    };
    let (reason, about) = match verdict {
        Verdict::ForwardDetour(reason) | Verdict::ReplyDetour(reason) if !is_to_box => {
            return Err(reason);
        }
        Verdict::ForwardDetour(Passed::Ttl) | Verdict::ReplyDetour(Passed::Ttl) => {
            (Some(Dropped::TtlExpired), About::TIME_EXCEEDED)
        }
        Verdict::ForwardDetour(_) | Verdict::ReplyDetour(_) => {
            (Some(Dropped::TooBig), About::too_big(narrow))
        }
        Verdict::Drop(reason) => (Some(reason), About::NOTHING),
        _ => (None, About::NOTHING),
    };
    kernel.note(came);
    if let Some(reason) = reason {
        let answer = match about != About::NOTHING && is(Holds::Segment) {
            true => answer(kernel, about, link, ip),
            false => None,
        };
        let dropped = drop_counted(kernel, to.counter, reason);
        let Some(answer) = answer else { return Ok(Outcome::Done(dropped)) };
        kernel.count(to.counter, |counter| counter.answered += 1);
        return Ok(Outcome::Answer(reason, answer));
    }
    if is_first && let Some(FragmentBench { key, first }) = kernel.fragment_bench() {
        let until = Jiffies(kernel.now().0 + FRAGMENTS_LAST * kernel.second());
        let (address, counter, flags) = (to.address.widen(), to.counter, decides.flags());
        let other = decides.other(direction).map_or(address, |other| other.address.widen());
        *key = key_of(direction, ip, protocol, fragment);
        let mark = key.mark();
        *first = FirstFragment { mark, counter, flags, padding: 0, address, other, until };
        kernel.set_first_fragment(key, first);
    }
    if direction == Direction::Forward
        && to.flags & Translation::MANY_ADDRESSES != 0
        && is(Holds::Segment)
    {
        let first = to.flags & Translation::FIRST_ADDRESS != 0;
        let goes = goes(came(), direction, &to, None, true);
        remember_arrival(kernel, first, &came(), &goes);
    }
    let size = on_wire(kernel, ip, frame, &payload).size;
    let both = Both { direction, end: (to.address, to.port), other: decides.other(direction) };
    if is(Holds::Segment) {
        let mut segment = segment(frame, &payload)?;
        both.rewrite(kernel, link, ip, hop, |direction, _, port, addresses| {
            segment.rewrite(kernel, direction, port, addresses);
            if N == 16 && !segment.has_checksum() {
                kernel.unbalanced(addresses);
            }
        });
    } else if is(Holds::Error) {
        let mut error = Error::<I>::take(frame, direction, payload.len)?;
        both.rewrite(kernel, link, ip, hop, |direction, address, port, addresses| {
            error.rewrite(direction, address, port, addresses);
        });
    } else {
        both.rewrite(kernel, link, ip, hop, |_, _, _, addresses| {
            if N == 16 {
                kernel.unbalanced(addresses);
            }
        });
    }
    count(kernel, to.counter, direction, size, kernel.now(), verdict);
    Ok(Outcome::Done(verdict))
}

/// What a packet becomes, which has ports if it is a segment.
#[inline(always)]
fn goes<const N: usize>(
    came: Flow,
    direction: Direction,
    to: &Becomes<N>,
    other: Option<Other<N>>,
    is_segment: bool,
) -> Flow {
    let port = |port| if is_segment { port } else { Port::NONE };
    let goes = came.translated(direction, to.address.widen(), port(to.port));
    match other {
        Some(Other { stays: true, port: other, .. }) => {
            let (address, _) = goes.end(direction.opposite());
            goes.translated(direction.opposite(), address, port(other))
        }
        Some(Other { address, port: other, .. }) => {
            goes.translated(direction.opposite(), address.widen(), port(other))
        }
        None => goes,
    }
}

/// Takes the header of a payload that is no ICMP error.
#[inline(always)]
pub(crate) fn segment<'a>(
    frame: &mut Frame<'a>,
    Payload { protocol, len, fragment, .. }: &Payload,
) -> Result<Segment<'a>, Passed> {
    Segment::take(frame, *protocol, *len, fragment.has_more()).map_err(|reason| match reason {
        // Too short for the ports.
        Passed::Malformed if fragment.has_more() => Passed::Fragment,
        _ => reason,
    })
}

/// What the ends become.
struct Both<const N: usize> {
    direction: Direction,
    /// The one that the direction translates.
    end: (Address<N>, Port),
    other: Option<Other<N>>,
}

impl<const N: usize> Both<N> {
    /// Rewrites the headers before the transport header, and lets `rest` rewrite the rest: what a
    /// direction translates, to this address and port, with what changed for the pseudo header.
    #[inline(always)]
    fn rewrite<I: Ip<N>, K: Kernel>(
        self,
        kernel: &K,
        link: &mut Link<'_>,
        ip: &mut I,
        hop: Option<&Hop>,
        mut rest: impl FnMut(Direction, Address<N>, Port, Change),
    ) {
        let Self { direction, end, other } = self;
        if let Some(Other { address, port, stays }) = other {
            let addresses = match stays {
                true => Change::default(),
                false => ip.rewrite(direction.opposite(), address, 0),
            };
            rest(direction.opposite(), address, port, addresses);
        }
        // The stack takes a hop off and writes the link addresses itself.
        let mut hops = 0;
        if let Some(hop) = hop {
            if !link.set(&hop.link) {
                kernel.leave_by(&hop.link);
            }
            hops = 1;
        }
        let (address, port) = end;
        let addresses = ip.rewrite(direction, address, hops);
        rest(direction, address, port, addresses);
    }
}

pub(crate) const NO_PORTS: (Port, Port) = (Port::NONE, Port::NONE);

/// Seconds for which the first fragment of a packet is remembered: as long as Linux waits for the rest.
const FRAGMENTS_LAST: u64 = 30;

/// Where the entry of a first fragment is made: the BPF stack is too small for it. It belongs to one run
/// of a program, like [`Bench`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct FragmentBench {
    key: FragmentKey,
    first: FirstFragment,
}

impl FragmentBench {
    /// Nothing is on it.
    // SAFETY: integers and arrays of them, and an enum that has a zero.
    pub const EMPTY: Self = unsafe { core::mem::zeroed() };
}

/// What the fragments of a packet have in common.
#[inline(always)]
fn key_of<const N: usize, I: Ip<N>>(
    direction: Direction,
    ip: &I,
    protocol: u8,
    fragment: Fragment,
) -> FragmentKey {
    FragmentKey {
        source: ip.source().widen(),
        destination: ip.destination().widen(),
        identification: fragment.identification,
        family: I::FAMILY,
        protocol: if N == 4 { protocol } else { 0 },
        direction,
        padding: 0,
    }
}

/// The answer to the sender of a packet, if it may have one: by the interface that the packet came by, to the neighbour that it came from.
#[inline(always)]
pub(crate) fn answer<const N: usize, I: Icmp<N>, K: Kernel>(
    kernel: &K,
    about: About,
    link: &mut Link<'_>,
    ip: &I,
) -> Option<Answer> {
    let device = kernel.back()?;
    let may = I::is_host(&ip.source())
        && !link.ethernet().is_some_and(|ethernet| ethernet.back().is_group())
        && kernel.bucket(|bucket| bucket.take(kernel.now(), kernel.second()))?;
    may.then(|| Answer::new(about, ip, device))
}

/// What a packet is on a wire whose payload `frame` goes on with.
#[inline(always)]
fn on_wire<const N: usize, I: Icmp<N>, K: Kernel>(
    kernel: &K,
    ip: &I,
    frame: &Frame<'_>,
    payload: &Payload,
) -> OnWire {
    OnWire::new(kernel, ip.length(), || {
        let transport = match payload.protocol {
            TCP => frame.peek::<TcpHdr>(0).map_or(0, |tcp| usize::from(tcp.doff()) * 4),
            _ => UdpHdr::LEN,
        };
        size_of::<I>() + payload.offset + transport
    })
}
