//! What the stream may have in it: kinds of flows, and what may be special about a packet. What portfwd
//! does not do yet is off, with the reason; who builds it switches it on.

use super::rules::{SERVERS, server};
use super::stream::{Damage, Flow, Maker, SYN, Script, Side, Step, Strange};
use crate::packet::{Packet, TCP, UDP};
use crate::random::Random;
use crate::rule::{ANY, Rule};

/// Whether a kind is in the stream.
#[derive(Clone, Copy, Debug)]
pub enum State {
    On,
    /// Not yet, and why.
    Off(&'static str),
}

/// How much of it all a stream has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent {
    /// What is on.
    Now,
    /// What is off too.
    All,
}

impl State {
    pub fn is_in(self, extent: Extent) -> bool {
        extent == Extent::All || matches!(self, Self::On)
    }
}

use State::{Off, On};

/// A kind of flow.
pub struct Talk {
    pub name: &'static str,
    pub state: State,
    /// How often, among the others.
    pub weight: usize,
    /// None if the rules have no room for it.
    pub make: fn(&mut Maker) -> Option<Script>,
}

#[rustfmt::skip]
pub const TALKS: &[Talk] = &[
    Talk { name: "datagrams", state: On, weight: 10, make: Maker::datagrams },
    Talk { name: "connection", state: On, weight: 10, make: Maker::connection },
    Talk { name: "hairpin", state: On, weight: 4, make: Maker::hairpin },
    Talk { name: "disorder", state: On, weight: 3, make: Maker::disorder },
    Talk { name: "to the box", state: On, weight: 3, make: Maker::at_the_box },
    Talk { name: "echo", state: On, weight: 1, make: Maker::echo },
    Talk { name: "routed", state: On, weight: 2, make: Maker::routed },
    Talk { name: "direct", state: On, weight: 1, make: Maker::direct },
    Talk { name: "outbound", state: On, weight: 1, make: Maker::outbound },
    Talk { name: "backend first", state: On, weight: 1, make: Maker::backend_first },
    Talk { name: "forged source", state: On, weight: 1, make: Maker::forged },
    Talk { name: "ICMP errors", state: On, weight: 5, make: Maker::errors },
    Talk { name: "other protocols", state: On, weight: 2, make: Maker::other_protocol },
];

/// Something special about a rule.
struct Shape {
    name: &'static str,
    state: State,
    /// Once in how many rules that it applies to.
    once_in: usize,
    applies: fn(&Rule) -> bool,
    change: fn(&mut Random, &mut Rule),
}

#[rustfmt::skip]
const SHAPES: &[Shape] = &[
    Shape { name: "many ports to one", state: On, once_in: 4, applies: |rule| rule.listen != ANY && !is_shifted(rule),
        change: |_, rule| rule.one_port = true },
    Shape { name: "several backends", state: On, once_in: 4, applies: |rule| !is_shifted(rule) || rule.one_port,
        change: |random, rule| {
            let others = (0..SERVERS).map(|number| server(rule.backend.is_ipv6(), number));
            let count = 1 + random.below(3);
            rule.others = others.filter(|other| *other != rule.backend.ip()).take(count).collect();
        } },
    Shape { name: "masquerade", state: On, once_in: 4, applies: |_| true,
        change: |_, rule| rule.masquerade = true },
];

/// Whether rules may send to one port of a backend and answer differently.
pub const SHARED_PORTS: State = On;

/// Whether each of several ports becomes another.
fn is_shifted(rule: &Rule) -> bool {
    rule.listen.start() != rule.listen.end() && *rule.listen.start() != rule.backend.port()
}

/// Makes a rule special, or not.
pub fn shape(random: &mut Random, extent: Extent, rule: &mut Rule) {
    for shape in SHAPES.iter().filter(|shape| shape.state.is_in(extent)) {
        if random.one_in(shape.once_in) && (shape.applies)(rule) {
            (shape.change)(random, rule);
        }
    }
}

/// What no maker of flows or rules knows yet, why, and what it needs here.
#[rustfmt::skip]
const NOT_YET: &[(&str, &str)] = &[
    ("one client socket at two addresses or ports of a rule", "nftables changes the later one's source port, anew for each connection, and tells of errors by the client's address"),
    ("fragments out of order, or larger than the MTU", "portfwd will not hold them, nftables does: a wanted difference"),
];

/// Something special about a packet.
struct Kind {
    name: &'static str,
    state: State,
    /// Once in how many packets that it applies to.
    once_in: usize,
    applies: fn(&Flow, &Step) -> bool,
    change: fn(&mut Random, &Flow, &mut Step),
}

fn v4(_: &Flow, step: &Step) -> bool {
    step.packet.is_v4()
}

fn v6(_: &Flow, step: &Step) -> bool {
    !step.packet.is_v4()
}

fn any(_: &Flow, _: &Step) -> bool {
    true
}

/// There is room for more, whatever its way is.
fn is_short(_: &Flow, step: &Step) -> bool {
    step.packet.payload.len() < 1300
}

fn has_ports(_: &Flow, step: &Step) -> bool {
    matches!(step.packet.protocol, TCP | UDP)
}

fn has_checksum(flow: &Flow, step: &Step) -> bool {
    has_ports(flow, step) && !step.packet.no_checksum
}

fn is_udp(_: &Flow, step: &Step) -> bool {
    step.packet.protocol == UDP
}

/// To a rule's port.
fn is_forward(flow: &Flow, step: &Step) -> bool {
    flow.rule.is_some() && step.from == Side::Client
}

/// Into two fragments at least, which the library knows how to make.
fn may_be_cut(flow: &Flow, step: &Step) -> bool {
    let Packet { options, extensions, padding, payload, .. } = &step.packet;
    let is_plain = options.is_empty() && extensions.is_empty() && padding.is_empty();
    is_plain && payload.len() >= 8 && has_ports(flow, step) && step.packet.hops > 1
}

/// Of a flow that there is already, and goes on if this one is lost.
fn may_be_lost(flow: &Flow, step: &Step) -> bool {
    is_forward(flow, step) && is_udp(flow, step) && !step.begins
}

/// The stack copies some options into its answers, portfwd none: it answers what goes to an address of
/// the router's.
fn has_plain_answer(flow: &Flow, step: &Step) -> bool {
    step.packet.options.is_empty() || (!is_forward(flow, step) && !flow.chooses)
}

/// It begins no flow and no connection, which there would be at one of the two only.
fn may_be_refused(flow: &Flow, step: &Step) -> bool {
    let opens = step.packet.protocol == TCP && step.packet.tcp.flags & SYN != 0;
    let is_sound = step.strange.is_none() && step.damage.is_none();
    let may = has_ports(flow, step) && has_plain_answer(flow, step);
    is_sound && may && !step.begins && !opens
}

#[rustfmt::skip]
const KINDS: &[Kind] = &[
    Kind { name: "DSCP and ECN", state: On, once_in: 4, applies: any,
        change: |random, _, step| step.packet.class = random.bits() as u8 },
    Kind { name: "flags of IPv4", state: On, once_in: 3, applies: v4,
        change: |random, _, step| step.packet.fragment = *random.pick(&[0, 0x8000, 0xc000]) },
    Kind { name: "options of IPv4", state: On, once_in: 12, applies: v4,
        change: |random, _, step| step.packet.options = options(random) },
    Kind { name: "room for a router's address", state: On, once_in: 200, applies: |flow, step| v4(flow, step) && has_ports(flow, step) && flow.rule.is_some(),
        change: |_, _, step| {
            // Record route: the pointer is at the first of two places.
            step.packet.options = vec![7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            step.strange = Some(Strange::RouterWritesOptions);
        } },
    Kind { name: "source route", state: Off("forwarded; the kernel drops it (accept_source_route)"), once_in: 200, applies: |flow, step| v4(flow, step) && may_be_lost(flow, step),
        change: |_, _, step| step.packet.options = vec![131, 7, 4, 198, 51, 100, 1, 0] },
    Kind { name: "extension headers", state: On, once_in: 6, applies: v6,
        change: |random, _, step| step.packet.extensions = extensions(random) },
    Kind { name: "authentication header", state: Off("passed: its sum is over the addresses"), once_in: 50, applies: |flow, step| v6(flow, step) && may_be_lost(flow, step),
        change: |random, _, step| step.packet.extensions = vec![(51, [&[0, 4][..], &random.bytes(22)].concat())] },
    Kind { name: "two hops left", state: On, once_in: 20, applies: any,
        change: |_, _, step| step.packet.hops = 2 },
    Kind { name: "last hop", state: On, once_in: 20, applies: |flow, step| !is_forward(flow, step) && step.strange.is_none() && has_plain_answer(flow, step),
        change: |_, _, step| step.packet.hops = 1 },
    Kind { name: "last hop, to a rule", state: On, once_in: 20, applies: |flow, step| may_be_lost(flow, step) && has_plain_answer(flow, step),
        change: |_, _, step| step.packet.hops = 1 },
    Kind { name: "as large as may be", state: On, once_in: 10, applies: may_be_refused,
        change: |random, _, step| {
            // Larger than the MTU of some ways.
            let headers = step.packet.length() - step.packet.payload.len();
            let length = 1500 - random.below(80);
            step.packet.payload = random.bytes(length - headers);
        } },
    Kind { name: "zeros", state: On, once_in: 16, applies: has_ports,
        change: |_, _, step| step.packet.payload.fill(0) },
    Kind { name: "ones", state: On, once_in: 16, applies: has_ports,
        change: |_, _, step| step.packet.payload.fill(0xff) },
    Kind { name: "no checksum", state: On, once_in: 8, applies: is_udp,
        change: |_, _, step| step.packet.no_checksum = true },
    Kind { name: "checksum comes out as zero", state: On, once_in: 16, applies: has_checksum, change: tune },
    Kind { name: "wrong checksum", state: On, once_in: 16, applies: has_checksum,
        change: |random, _, step| step.damage = Some(Damage::Checksum(random.between(1, 0xfffe))) },
    Kind { name: "padding", state: On, once_in: 10, applies: is_short,
        change: |random, _, step| {
            let length = 1 + random.below(20);
            step.packet.padding = random.bytes(length);
        } },
    Kind { name: "fragments", state: On, once_in: 20, applies: may_be_cut,
        change: |random, _, step| {
            let packet = &step.packet;
            // The first has the whole header, or portfwd passes it: that is an attack (RFC 1858, 7112).
            let is_tcp = packet.protocol == TCP;
            let head = if is_tcp { 20 + packet.tcp.options.len() } else { 8 };
            let size = 8 * (head.div_ceil(8) + random.below(packet.payload.len() / 8));
            // Each fits: nftables asks that of the whole packet.
            step.cut = Some(size.min(1280));
            step.packet.fragment = 0;
        } },
    // What follows is lost at one of the two, or at both.
    // At its last hop, or if it is too large, the stack drops it untold, and portfwd tells the client.
    Kind { name: "wrong header checksum", state: On, once_in: 60, applies: |flow, step| v4(flow, step) && may_be_lost(flow, step) && step.packet.hops > 1 && is_short(flow, step),
        change: |random, _, step| {
            step.damage = Some(Damage::HeaderChecksum(random.between(1, 0xfffe)));
            step.strange = Some(Strange::WrongHeaderChecksum);
        } },
    Kind { name: "cut short", state: On, once_in: 60, applies: may_be_lost,
        change: |random, _, step| {
            step.packet.padding.clear();
            step.damage = Some(Damage::Cut(1 + random.below(40)));
        } },
    Kind { name: "wrong version", state: On, once_in: 100, applies: may_be_lost,
        change: |_, _, step| step.damage = Some(Damage::Ip(0, vec![0x55])) },
    Kind { name: "UDP longer than the packet", state: On, once_in: 60, applies: may_be_lost,
        change: |_, _, step| step.damage = Some(Damage::Transport(4, vec![0xff, 0])) },
    Kind { name: "UDP shorter than its header", state: On, once_in: 60, applies: may_be_lost,
        change: |random, _, step| step.damage = Some(Damage::Transport(4, vec![0, random.below(8) as u8])) },
    Kind { name: "UDP shorter than the packet", state: On, once_in: 60, applies: may_be_lost,
        change: |_, _, step| step.damage = Some(Damage::Transport(4, vec![0, 8])) },
    Kind { name: "VLAN tag", state: On, once_in: 60, applies: |flow, step| may_be_lost(flow, step) && is_short(flow, step),
        change: |random, _, step| step.damage = Some(Damage::Tag(random.pick(&[[0x81, 0, 0, 7], [0x88, 0xa8, 0, 7]]).to_vec())) },
    Kind { name: "for another station", state: Off("translated; the stack leaves it to its station"), once_in: 60, applies: may_be_lost,
        change: |_, _, step| step.damage = Some(Damage::Station([2, 0, 0, 0, 9, 9])) },
];

/// All that is not in the stream, and why.
pub fn off() -> impl Iterator<Item = (&'static str, &'static str)> {
    let states = TALKS.iter().map(|talk| (talk.name, talk.state));
    let states = states.chain(SHAPES.iter().map(|shape| (shape.name, shape.state)));
    let states = states.chain([("two rules to one backend port", SHARED_PORTS)]);
    let states = states.chain(KINDS.iter().map(|kind| (kind.name, kind.state)));
    let off = states.filter_map(|(name, state)| match state {
        On => None,
        Off(why) => Some((name, why)),
    });
    off.chain(NOT_YET.iter().copied())
}

/// Makes a packet special, or not. What changes its fate goes by itself, so that what is found has one
/// reason.
pub fn vary(random: &mut Random, extent: Extent, flow: &Flow, step: &mut Step) {
    for kind in KINDS.iter().filter(|kind| kind.state.is_in(extent)) {
        if !random.one_in(kind.once_in) || !(kind.applies)(flow, step) {
            continue;
        }
        let mut changed = step.clone();
        (kind.change)(random, flow, &mut changed);
        let fate = |step: &Step| (step.strange, step.damage.clone(), step.cut);
        if fate(step) == (None, None, None) || fate(step) == fate(&changed) {
            *step = changed;
            step.kinds.push(kind.name);
        }
    }
}

/// Options that no router has to write to.
fn options(random: &mut Random) -> Vec<u8> {
    let all: [&[u8]; 4] = [
        &[1, 1, 1, 1],
        // Router alert.
        &[148, 4, 0, 0],
        // One that nobody knows.
        &[0x5e, 4, 0xaa, 0x55],
        &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ];
    let mut options = Vec::new();
    if random.one_in(4) {
        // A recorded route without room left; two of them are a mistake.
        options.extend([7, 7, 8, 192, 0, 2, 1, 1]);
    }
    for _ in 0..random.below(3) {
        options.extend(*random.pick(&all));
    }
    // The end of the list stands at its end.
    options.extend([1, 1, 1, *random.pick(&[0, 1])]);
    options
}

/// Extension headers in a legal order, with what routers let through.
fn extensions(random: &mut Random) -> Vec<(u8, Vec<u8>)> {
    // An option that may be skipped, of 14 bytes after the two of the header; and padding.
    let long = [&[0, 1, 0x1e, 12][..], &[0xc3; 12]].concat();
    let short = vec![0, 0, 1, 4, 0, 0, 0, 0];
    let routing = [&[0, 2, 4, 0, 0, 0, 0, 0][..], &[0xfd; 16]].concat();
    let all = [(0, &short), (0, &long), (60, &short), (43, &routing), (60, &long)];
    let mut chosen: Vec<(u8, Vec<u8>)> = Vec::new();
    for (number, bytes) in all {
        // Hop-by-hop options stand first, and once.
        let again = number == 0 && !chosen.is_empty();
        if !again && random.one_in(2) {
            chosen.push((number, bytes.clone()));
        }
    }
    chosen
}

/// Has the translated packet's checksum come out as zero, which UDP must send as 0xffff.
fn tune(_: &mut Random, flow: &Flow, step: &mut Step) {
    if step.packet.payload.len() < 2 {
        return;
    }
    step.packet.payload[..2].fill(0);
    let translated = step.translated(flow);
    let place = translated.transport_at() + if translated.protocol == TCP { 16 } else { 6 };
    let bytes = translated.bytes();
    step.packet.payload[..2].copy_from_slice(&bytes[place..place + 2]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::stream::Stream;

    #[test]
    fn every_kind_that_is_on_occurs() {
        for extent in [Extent::Now, Extent::All] {
            let streams = (0..32).map(|seed| Stream::new(seed, 1000, extent));
            let streams: Vec<Stream> = streams.collect();
            let steps = || streams.iter().flat_map(|stream| &stream.steps);
            for kind in KINDS {
                let occurs = steps().any(|step| step.kinds.contains(&kind.name));
                assert_eq!(occurs, kind.state.is_in(extent), "{}", kind.name);
            }
            for talk in TALKS {
                let mut flows = streams.iter().flat_map(|stream| &stream.flows);
                let occurs = flows.any(|flow| flow.talk == talk.name);
                assert_eq!(occurs, talk.state.is_in(extent), "{}", talk.name);
            }
            let shapes: [fn(&Rule) -> bool; 3] =
                [|rule| rule.one_port, |rule| !rule.others.is_empty(), |rule| rule.masquerade];
            for (shape, has) in SHAPES.iter().zip(shapes) {
                let mut rules = streams.iter().flat_map(|stream| &stream.rules);
                assert_eq!(rules.any(has), shape.state.is_in(extent), "{}", shape.name);
            }
        }
    }

    #[test]
    fn fewer_packets_are_the_first_of_more() {
        let [few, many] = [100, 1000].map(|packets| Stream::new(7, packets, Extent::Now));
        for (a, b) in few.steps.iter().zip(&many.steps) {
            assert_eq!(a.frame(), b.frame());
        }
    }
}
