//! The way of the few: ICMP errors, fragments, and what goes no further but has an answer. A program
//! of its own, to which the [common way](crate::path) jumps, so that it costs other packets nothing.
//!
//! It starts anew and takes any packet. Everything is decided before the first byte is changed.

use crate::answer::{About, Answer};
use crate::checksum::Change;
use crate::icmp::{Error, Icmp};
use crate::packet::{Ethernet, Fragment, Frame, ICMP, ICMPV6, Ip, Payload, Reads, TCP, UDP};
use crate::path::{
    Asked, Flow, Kernel, Verdict, Way, ask, claims, count, ethernet, remember_arrival, translation,
};
use crate::segment::Segment;
use crate::table::{
    Address, Direction, Dropped, FirstFragment, FragmentKey, Hop, Interface, Jiffies, Passed, Port,
    Translation,
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
    match ethernet(kernel, Detour(direction), &mut frame) {
        Ok(outcome) => outcome,
        Err(reason) => {
            kernel.count_passed(reason);
            Outcome::Done(Verdict::Pass(reason))
        }
    }
}

struct Detour(Direction);

impl Way for Detour {
    type End = Outcome;

    #[inline(always)]
    fn ip<const N: usize, I: Icmp<N>, K: Kernel>(
        self,
        kernel: &K,
        ethernet: &mut Ethernet,
        frame: &mut Frame<'_>,
    ) -> Result<Outcome, Passed> {
        translate::<N, I, K>(kernel, self.0, ethernet, frame)
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

/// What the rules make of a packet with these ends. What an ICMP error quotes is asked for as a packet
/// that goes the way of the error. One that `ends_here` becomes nothing, and its answer is of its rule
/// alone.
#[inline(always)]
fn becomes<const N: usize, I: Ip<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    ends: &Flow,
    ends_here: bool,
) -> Result<Becomes<N>, Passed> {
    let (address, port) = ends.end(direction);
    let claims = claims::<N, I, K>(kernel, direction, &address.narrow()).ok_or(Passed::NoRule)?;
    let (ports, place, unclaimed) = match ends.protocol {
        TCP => (claims.tcp, port, Passed::NoRule),
        UDP => (claims.udp, port, Passed::NoRule),
        protocol => (claims.other, Port::new(protocol.into()), Passed::Protocol),
    };
    let translation = translation(kernel, ports, place).ok_or(unclaimed)?;
    // What becomes of it is for its flow to say, which this does not ask.
    if translation.has(Translation::STATEFUL) && !ends_here {
        return Err(Passed::NoFlow);
    }
    let Translation { mut address, shift, flags, counter, .. } = *translation;
    // Of other protocols the control plane knows which are the box's.
    let may_be_own = matches!(ends.protocol, TCP | UDP);
    if translation.has(Translation::ASK_SOCKETS) && may_be_own && kernel.has_socket(ends) {
        return Err(Passed::Own);
    }
    if direction == Direction::Reply
        && translation.has(Translation::MANY_ADDRESSES)
        && let Some(arrival) = kernel.arrival(&ends.reversed().arrival())
    {
        address = arrival;
    }
    Ok(Becomes { address: address.narrow(), port: port.shifted(shift), flags, counter })
}

/// What of a packet is there behind its IP header.
// Not an enum with the headers in it: the verifier minds pointers that are put together from parts.
#[derive(Clone, Copy)]
enum Part {
    Segment,
    /// An ICMP error.
    Error,
    /// A fragment without the first bytes.
    Rest,
}

impl Part {
    /// Of a payload that starts where the frame does now.
    #[inline(always)]
    fn of<const N: usize, I: Icmp<N>>(
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
        if I::is_error(kind) && !fragment.more {
            Ok(Self::Error)
        } else if kind == echo {
            Ok(Self::Segment)
        } else {
            Err(Passed::Icmp)
        }
    }
}

#[inline(always)]
fn translate<const N: usize, I: Icmp<N>, K: Kernel>(
    kernel: &K,
    direction: Direction,
    ethernet: &mut Ethernet,
    frame: &mut Frame<'_>,
) -> Result<Outcome, Passed> {
    let available = frame.remaining();
    let ip: &mut I = frame.take().ok_or(Passed::Malformed)?;
    let whole = ip.whole(available)?;
    let nothing = kernel.nothing();
    let payload = ip.payload(frame, whole, Reads::All)?.forgotten(nothing)?;
    let Payload { protocol, offset, fragment, .. } = payload;
    frame.skip(offset);

    let part = Part::of::<N, I>(frame, direction, &payload)?;
    let (ports, to) = if let Part::Rest = part {
        if usize::from(fragment.offset) + payload.len > usize::from(u16::MAX) {
            return Err(Passed::Malformed);
        }
        let first = kernel.first_fragment(&key(direction, ip, protocol, fragment));
        let first = first.filter(|first| kernel.now() < first.until).ok_or(Passed::Fragment)?;
        let FirstFragment { address, counter, .. } = first;
        let to = Becomes { address: address.narrow(), port: Port::NONE, flags: 0, counter };
        (NO_PORTS, to)
    } else {
        // To look ahead: what is changed is taken when it is known that it is.
        let ahead = &mut frame.ahead();
        let (ports, ends) = if let Part::Error = part {
            // What an error quotes has ports, but not the error itself.
            (NO_PORTS, Error::<I>::take(ahead, direction, payload.len)?.ends())
        } else {
            let ports = segment(ahead, &payload)?.ports();
            (ports, Flow::between(ip, protocol, ports))
        };
        // An error goes to whoever sent what it quotes. Nobody else gets one to disturb flows with.
        if ends.destination != ip.destination().widen() {
            return Err(Passed::Icmp);
        }
        let ends_here = direction == Direction::Forward && ip.ttl() <= 1;
        let to =
            becomes::<N, I, K>(kernel, direction, &ends, ends_here).map_err(
                |reason| match reason {
                    Passed::NoRule | Passed::Protocol if protocol == I::PROTOCOL => Passed::Icmp,
                    _ => reason,
                },
            )?;
        (ports, to)
    };
    // As with the payload: all parts are one to the verifier from here on.
    let part = part as u32 ^ nothing;
    let is = |what: Part| part == what as u32;
    let payload = payload.forgotten(nothing)?;
    let protocol = payload.protocol;

    // Made where it is needed: there is little room to keep it.
    let came = || Flow::between(ip, protocol, ports);
    let port = if is(Part::Segment) { to.port } else { Port::NONE };
    let goes = || came().translated(direction, to.address.widen(), port);
    let Asked { verdict, hop, narrow } = match direction {
        _ if ip.ttl() > 1 => ask(kernel, direction, false, ip, &goes())?,
        Direction::Forward => {
            Asked { verdict: Verdict::ForwardDetour(Passed::Ttl), hop: None, narrow: None }
        }
        Direction::Reply => return Err(Passed::Ttl),
    };
    kernel.note(came);
    let dropped = match verdict {
        Verdict::ForwardDetour(Passed::Ttl) => {
            Some((Dropped::TtlExpired, Some(About::TimeExceeded)))
        }
        Verdict::ForwardDetour(_) => {
            Some((Dropped::TooBig, Some(About::TooBig(narrow.unwrap_or_default()))))
        }
        Verdict::Drop(reason) => Some((reason, None)),
        _ => None,
    };
    if let Some((reason, about)) = dropped {
        let answer = match about {
            Some(about) if is(Part::Segment) => {
                // As before; there is little room to keep it. Without the mask the compiler would do
                // sums with the end of the frame, which the verifier does not let it do.
                let rest = frame.remaining() & 0xffff;
                let available = size_of::<I>() + payload.offset + rest;
                answer(kernel, about, ethernet, ip, available)
            }
            _ => None,
        };
        kernel.count(to.counter, |counter| {
            counter.dropped[reason as usize] += 1;
            counter.answered += u64::from(answer.is_some());
        });
        return Ok(match answer {
            Some(answer) => Outcome::Answer(reason, answer),
            None => Outcome::Done(Verdict::Drop(reason)),
        });
    }
    if fragment.more && fragment.offset == 0 {
        let until = Jiffies(kernel.now().0 + FRAGMENTS_LAST * kernel.second());
        let address = to.address.widen();
        let first = FirstFragment { address, until, counter: to.counter, padding: 0 };
        kernel.set_first_fragment(&key(direction, ip, protocol, fragment), &first);
    }
    if direction == Direction::Forward
        && to.flags & Translation::MANY_ADDRESSES != 0
        && is(Part::Segment)
    {
        let first = to.flags & Translation::FIRST_ADDRESS != 0;
        remember_arrival(kernel, first, &came(), &goes());
    }
    let length = ip.length();
    if is(Part::Segment) {
        let mut segment = segment(frame, &payload)?;
        let addresses = rewrite(ethernet, ip, direction, to.address, hop);
        segment.rewrite(direction, to.port, addresses);
    } else if is(Part::Error) {
        let mut error = Error::<I>::take(frame, direction, payload.len)?;
        let addresses = rewrite(ethernet, ip, direction, to.address, hop);
        error.rewrite(direction, to.address, to.port, addresses);
    } else {
        rewrite(ethernet, ip, direction, to.address, hop);
    }
    count(kernel, to.counter, direction, length, kernel.now(), verdict);
    Ok(Outcome::Done(verdict))
}

/// Takes the header of a payload that is no ICMP error.
#[inline(always)]
fn segment<'a>(
    frame: &mut Frame<'a>,
    Payload { protocol, len, fragment, .. }: &Payload,
) -> Result<Segment<'a>, Passed> {
    Segment::take(frame, *protocol, *len, fragment.more).map_err(|reason| match reason {
        // Too short for the ports.
        Passed::Malformed if fragment.more => Passed::Fragment,
        _ => reason,
    })
}

/// Rewrites the headers before the transport header. Returns what changed for the pseudo header.
#[inline(always)]
fn rewrite<const N: usize, I: Ip<N>>(
    ethernet: &mut Ethernet,
    ip: &mut I,
    direction: Direction,
    address: Address<N>,
    hop: Option<Hop>,
) -> Change {
    // The stack takes a hop off and writes the link addresses itself.
    let mut hops = 0;
    if let Some(hop) = hop {
        ethernet.set_link(&hop.link);
        hops = 1;
    }
    ip.rewrite(direction, address, hops)
}

const NO_PORTS: (Port, Port) = (Port::NONE, Port::NONE);

/// Seconds for which the first fragment of a packet is remembered: as long as Linux waits for the rest.
const FRAGMENTS_LAST: u64 = 30;

/// What the fragments of a packet have in common.
#[inline(always)]
fn key<const N: usize, I: Ip<N>>(
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

/// The answer to the sender of a packet, in a frame that had `available` bytes for it, if it may have
/// one: by the interface that the packet came by, to the neighbour that it came from.
#[inline(always)]
fn answer<const N: usize, I: Icmp<N>, K: Kernel>(
    kernel: &K,
    about: About,
    ethernet: &Ethernet,
    ip: &I,
    available: usize,
) -> Option<Answer> {
    let interface = kernel.ingress()?;
    let may = I::is_host(&ip.source())
        && !ethernet.back().is_group()
        && interface.has(Interface::TRANSMITS)
        && kernel.bucket(|bucket| bucket.take(kernel.now(), kernel.second()))?;
    may.then(|| Answer::new(about, ip, available, interface.device))
}
