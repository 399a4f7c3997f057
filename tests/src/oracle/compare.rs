//! Field by field: what differs, and which differences are wanted.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::stream::{Flow, Side, Step, Strange};
use super::world::Seen;
use crate::packet::{ETHERNET, ICMP, ICMPV6, TCP, UDP, repair_ipv4};
use crate::wire;

/// The number of the IPv6 fragment header.
const FRAGMENT: u8 = 44;

/// A difference that is meant.
pub struct Wanted {
    pub name: &'static str,
    pub reason: &'static str,
    grants: Grants,
}

enum Grants {
    /// Both are the same once this is done to every frame.
    Without(fn(&Step, Side, &mut Vec<u8>)),
    /// Of packets that are strange in this way portfwd makes what the rule says, and nothing else,
    /// whatever nftables makes of them.
    ByTheRule(Strange),
}

use Grants::{ByTheRule, Without};

pub const WANTED: &[Wanted] = &[
    Wanted {
        name: "padding",
        reason: "the stack cuts off what follows the IP packet in a frame; in XDP it stays, and \
                 no receiver reads it",
        grants: Without(without_padding),
    },
    Wanted {
        name: "identification",
        reason: "each router numbers the IPv4 packets that it makes itself in its own way; portfwd's \
                 errors have no number, may not be fragmented (RFC 6864) and are of class CS6, \
                 where the stack keeps some of the question's bits",
        grants: Without(|step, side, frame| without_identification(step, side, frame)),
    },
    Wanted {
        name: "out of state",
        reason: "connection tracking refuses TCP that is in no state that it knows; stateless rules \
                 leave that to the two ends",
        grants: ByTheRule(Strange::OutOfState),
    },
    Wanted {
        name: "backend first",
        reason: "what a backend sends from a rule's port is the rule's, also where no client asked; \
                 connection tracking has no flow for it",
        grants: ByTheRule(Strange::BackendFirst),
    },
    Wanted {
        name: "direct",
        reason: "so is its answer to whoever asked it by its own address",
        grants: ByTheRule(Strange::Direct),
    },
    Wanted {
        name: "forged source",
        reason: "the stack drops sources that no packet can have; redirected packets pass none of \
                 its filters, as README says",
        grants: ByTheRule(Strange::ForgedSource),
    },
    Wanted {
        name: "header checksum",
        reason: "the stack drops a wrong IPv4 header checksum; portfwd repairs by the difference, so \
                 it stays wrong by as much, and the receiver drops it",
        grants: ByTheRule(Strange::WrongHeaderChecksum),
    },
    Wanted {
        name: "options that routers write to",
        reason: "the stack records its address where IPv4 options ask for it; portfwd is no hop that \
                 tells of itself",
        grants: ByTheRule(Strange::RouterWritesOptions),
    },
];

/// How what came out compares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Same,
    /// A wanted difference, by its place in [`WANTED`].
    Wanted(usize),
    Wrong,
}

/// Compares what came out of nftables and of portfwd.
pub fn compare(step: &Step, flow: &Flow, nftables: &Seen, portfwd: &Seen) -> Verdict {
    if nftables == portfwd {
        return Verdict::Same;
    }
    let (mut theirs, mut ours) = (nftables.clone(), portfwd.clone());
    for (place, wanted) in WANTED.iter().enumerate() {
        let granted = match wanted.grants {
            Without(change) => {
                theirs.each(|side, frame| change(step, side, frame));
                ours.each(|side, frame| change(step, side, frame));
                theirs == ours
            }
            ByTheRule(strange) => {
                step.strange == Some(strange)
                    && ours.at(step.to) == [step.expected(flow)]
                    && ours.at(step.to.other()).is_empty()
            }
        };
        if granted {
            return Verdict::Wanted(place);
        }
    }
    Verdict::Wrong
}

/// Whether the same came out at two times.
pub fn is_like(step: &Step, one: &Seen, other: &Seen) -> bool {
    let [mut one, mut other] = [one, other].map(Seen::clone);
    for seen in [&mut one, &mut other] {
        seen.each(|side, frame| without_identification(step, side, frame));
    }
    one == other
}

fn without_padding(_: &Step, _: Side, frame: &mut Vec<u8>) {
    let length = |at: usize| {
        let bytes = frame.get(at..at + 2)?;
        Some(usize::from(u16::from_be_bytes([bytes[0], bytes[1]])))
    };
    let end = match frame[12..ETHERNET] {
        [0x08, 0x00] => length(ETHERNET + 2).map(|length| ETHERNET + length),
        [0x86, 0xdd] => length(ETHERNET + 4).map(|length| ETHERNET + 40 + length),
        _ => None,
    };
    frame.truncate(end.unwrap_or(frame.len()));
}

/// Only of answers that are right: a wrong one is not made alike.
fn without_identification(step: &Step, side: Side, frame: &mut [u8]) {
    if frame[12..ETHERNET] == [8, 0] && wire::verify(frame).is_ok() {
        const DO_NOT_FRAGMENT: u8 = 0x40;
        let is_error =
            frame[ETHERNET + 9] == ICMP && matches!(frame.get(ETHERNET + 20), Some(3 | 11));
        // Of the router's own.
        if side != step.at || (side == step.to && !is_error) {
            return;
        }
        frame[ETHERNET + 4..ETHERNET + 6].fill(0);
        if is_error {
            frame[ETHERNET + 6] &= !DO_NOT_FRAGMENT;
            frame[ETHERNET + 1] = 0xc0;
        }
        repair_ipv4(frame);
    }
}

/// What both made of a packet, for people: a line for each field, with those that differ marked.
pub fn report(nftables: &Seen, portfwd: &Seen) -> String {
    let mut text = String::new();
    for side in Side::BOTH {
        let (theirs, ours) = (nftables.at(side), portfwd.at(side));
        for number in 0..theirs.len().max(ours.len()) {
            let [theirs, ours] = [theirs, ours].map(|frames| frames.get(number));
            let _ = writeln!(text, "  at the {side:?}, frame {}:", number + 1);
            let [theirs, ours] = [theirs, ours].map(|frame| frame.map(|frame| fields(frame)));
            text.push_str(&columns(theirs.as_deref(), ours.as_deref()));
        }
    }
    if text.is_empty() { "  nothing came out of either\n".into() } else { text }
}

fn columns(theirs: Option<&[Field]>, ours: Option<&[Field]>) -> String {
    let mut text = format!("    {:28} {:32} {:32}\n", "", "nftables", "portfwd");
    let (Some(theirs), Some(ours)) = (theirs, ours) else {
        let (who, fields) = if theirs.is_some() { ("nftables", theirs) } else { ("portfwd", ours) };
        let _ = writeln!(text, "    only from {who}:");
        for (name, value) in fields.into_iter().flatten() {
            let _ = writeln!(text, "    {name:28} {value}");
        }
        return text;
    };
    let value = |fields: &[Field], name: &str| {
        fields
            .iter()
            .find(|(other, _)| other == name)
            .map_or("-".into(), |(_, value)| value.clone())
    };
    let more = ours.iter().filter(|(name, _)| !theirs.iter().any(|(other, _)| other == name));
    for (name, _) in theirs.iter().chain(more) {
        let (theirs, ours) = (value(theirs, name), value(ours, name));
        let _ = if theirs == ours {
            writeln!(text, "    {name:28} {theirs}")
        } else {
            writeln!(text, "    {name:28} {theirs:32} {ours:32} <- differs")
        };
    }
    text
}

type Field = (String, String);

/// What stands in a frame.
pub fn fields(frame: &[u8]) -> Vec<Field> {
    let mut reader = Reader { rest: frame, prefix: String::new(), fields: Vec::new() };
    // Where it ends, it ends.
    let _ = reader.ethernet();
    reader.bytes("payload or rest");
    reader.fields
}

struct Reader<'a> {
    rest: &'a [u8],
    /// Before the names of what an ICMP error quotes.
    prefix: String,
    fields: Vec<Field>,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*bytes)
    }

    fn add(&mut self, name: &str, value: impl ToString) {
        self.fields.push((format!("{}{name}", self.prefix), value.to_string()));
    }

    fn number(&mut self, name: &str) -> Option<u16> {
        let number = u16::from_be_bytes(self.take()?);
        self.add(name, number);
        Some(number)
    }

    fn hex<const N: usize>(&mut self, name: &str) -> Option<[u8; N]> {
        let bytes = self.take::<N>()?;
        self.add(name, hex(&bytes));
        Some(bytes)
    }

    /// So many bytes, or as many as there are.
    fn some(&mut self, name: &str, length: usize) {
        let (bytes, rest) = self.rest.split_at(length.min(self.rest.len()));
        self.rest = rest;
        if !bytes.is_empty() {
            self.add(name, format!("{} bytes: {}", bytes.len(), hex(bytes)));
        }
    }

    /// All that is left.
    fn bytes(&mut self, name: &str) {
        self.some(name, usize::MAX);
    }

    fn ethernet(&mut self) -> Option<()> {
        self.hex::<6>("link destination")?;
        self.hex::<6>("link source")?;
        let ethertype = self.hex::<2>("ethertype")?;
        match ethertype {
            [0x08, 0x00] => self.ipv4(),
            [0x86, 0xdd] => self.ipv6(),
            _ => None,
        }
    }

    fn ipv4(&mut self) -> Option<()> {
        let [first, class] = self.take::<2>()?;
        self.add("version and header length", hex(&[first]));
        self.add("DSCP and ECN", hex(&[class]));
        self.number("total length")?;
        self.number("identification")?;
        let [flags, offset] = self.hex::<2>("flags and fragment offset")?;
        let [ttl, protocol] = self.take::<2>()?;
        self.add("time to live", ttl);
        self.add("protocol", protocol);
        self.hex::<2>("header checksum")?;
        let (source, destination) = (self.take::<4>()?, self.take::<4>()?);
        self.add("source", Ipv4Addr::from(source));
        self.add("destination", Ipv4Addr::from(destination));
        self.some("options of IPv4", usize::from(first & 0xf).saturating_sub(5) * 4);
        let is_first = flags & 0x1f == 0 && offset == 0;
        if is_first { self.transport(protocol) } else { None }
    }

    fn ipv6(&mut self) -> Option<()> {
        self.hex::<4>("class and flow label")?;
        self.number("payload length")?;
        let [mut protocol, hops] = self.take::<2>()?;
        self.add("hop limit", hops);
        let (source, destination) = (self.take::<16>()?, self.take::<16>()?);
        self.add("source", Ipv6Addr::from(source));
        self.add("destination", Ipv6Addr::from(destination));
        let mut place = 1;
        while matches!(protocol, 0 | 43 | FRAGMENT | 60) {
            let [next, units, offset, flags] = *self.rest.first_chunk::<4>()?;
            let length = if protocol == FRAGMENT { 8 } else { (usize::from(units) + 1) * 8 };
            self.some(&format!("extension header {place} ({protocol})"), length);
            let is_later = protocol == FRAGMENT && (offset != 0 || flags & 0xf8 != 0);
            (protocol, place) = (next, place + 1);
            if is_later {
                return None;
            }
        }
        self.add("protocol", protocol);
        self.transport(protocol)
    }

    fn transport(&mut self, protocol: u8) -> Option<()> {
        match protocol {
            TCP | UDP => {
                self.number("source port")?;
                self.number("destination port")?;
            }
            ICMP | ICMPV6 => {
                let [kind, code] = self.take::<2>()?;
                self.add("ICMP type and code", format!("{kind}, {code}"));
                self.hex::<2>("ICMP checksum")?;
                self.hex::<4>("ICMP rest of header")?;
                let is_error =
                    if protocol == ICMP { matches!(kind, 3..=5 | 11 | 12) } else { kind < 128 };
                if is_error && self.prefix.is_empty() {
                    self.prefix = "quoted ".into();
                    if protocol == ICMP { self.ipv4()? } else { self.ipv6()? }
                }
                return Some(());
            }
            _ => return None,
        }
        if protocol == UDP {
            self.number("UDP length")?;
            self.hex::<2>("UDP checksum")?;
        } else {
            self.hex::<4>("sequence number")?;
            self.hex::<4>("acknowledgement")?;
            let [offset, _] = self.hex::<2>("header length and flags")?;
            self.number("window")?;
            self.hex::<2>("TCP checksum")?;
            self.number("urgent pointer")?;
            self.some("options of TCP", usize::from(offset >> 4).saturating_sub(5) * 4);
        }
        Some(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::kinds::Extent;
    use crate::oracle::stream::Stream;

    /// One changed bit of a translated packet is a difference, and one that a field shows.
    #[test]
    fn a_flipped_bit_shows() {
        let stream = Stream::new(3, 400, Extent::Now);
        let ordinary = |step: &&Step| step.strange.is_none() && step.damage.is_none();
        for step in stream.steps.iter().filter(ordinary).take(40) {
            let flow = &stream.flows[step.flow];
            let frame = step.expected(flow);
            let right = Seen::one(step.to, frame.clone());
            assert_eq!(compare(step, flow, &right, &right.clone()), Verdict::Same);
            for bit in 0..frame.len() * 8 {
                let mut changed = frame.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(fields(&frame), fields(&changed), "bit {bit} of {}", hex(&frame));
                let wrong = Seen::one(step.to, changed);
                assert_eq!(compare(step, flow, &right, &wrong), Verdict::Wrong);
            }
        }
    }

    #[test]
    fn nothing_instead_of_something_is_wrong() {
        let stream = Stream::new(5, 400, Extent::Now);
        for step in &stream.steps {
            let flow = &stream.flows[step.flow];
            let frame = Seen::one(step.to, step.expected(flow));
            let nothing = Seen::default();
            assert_eq!(compare(step, flow, &frame, &nothing), Verdict::Wrong);
            let granted = matches!(compare(step, flow, &nothing, &frame), Verdict::Wanted(_));
            assert_eq!(granted, step.strange.is_some());
        }
    }
}
