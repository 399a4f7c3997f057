//! A box with one rule of each sort, the networks around it, and what its rules mean.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use portfwd::compile::{Becomes, BoxPorts, Compiler, Leg, Resolved, plan};
use portfwd::network::Externals;
use portfwd::rule::{Ports, Rule};
use portfwd_ebpf::flow_table;
use portfwd_ebpf::path::{Flow, Role, Route, Verdict};
use portfwd_ebpf::table::{
    Address, AnyAddress, Direction, Dropped, FlowKey, Interface, Jiffies, Port, Trust,
};
use portfwd_ebpf::testing::{
    BACK, BOX, BOX6, DMZ_BOX, DMZ_BOX6, HOP, INSIDE, LAN, LAN6, OUTSIDE, Router, Routes, SECOND,
    no_neighbour, nothing_but,
};

use crate::check;
use crate::wire::{Ends, Packet, TCP, UDP};

/// One more address of the box, on which some rules listen.
const THIRD: [u8; 4] = [198, 51, 100, 8];

/// Few, so that clients meet.
const MASQUERADE: [u16; 2] = [40_000, 40_003];

/// Of [`Setting::ways`]: the route to the backends is gone, and the default route takes its place.
const GONE: u8 = 3;

/// Bytes around a frame that nobody may write. AddressSanitizer, which the fuzzers have, finds those who
/// read them too, if they are not there.
const FENCE: usize = if cfg!(feature = "libfuzzer") { 0 } else { 64 };

/// How the box stands, as an input says.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// One interface for all.
    pub one_armed: bool,
    /// What the FIB says of ways; 0 is that there are some.
    ways: u8,
    /// The table of established flows holds one.
    crowded: bool,
    narrow: bool,
    sockets: bool,
    trust: bool,
}

impl Setting {
    pub fn of(byte: u8) -> Self {
        Self {
            one_armed: byte & 2 != 0,
            ways: (byte >> 2 & 7).saturating_sub(3),
            crowded: byte >> 2 & 7 == 1,
            narrow: byte & 0x20 != 0,
            sockets: byte & 0x40 != 0,
            trust: byte & 0x80 != 0,
        }
    }

    /// Nothing is in the way of packets that rules claim.
    pub fn is_clear(self) -> bool {
        self.ways == 0 && !self.narrow && !self.sockets
    }
}

/// The box, and what was seen of it.
pub struct World {
    rules: Vec<Rule>,
    legs: Vec<Leg>,
    router: Router,
    setting: Setting,
    /// What became of first fragments, and until when later ones follow.
    firsts: RefCell<HashMap<FirstKey, (IpAddr, u64)>>,
}

/// Direction, addresses, protocol (of IPv4), identification.
type FirstKey = (Direction, IpAddr, IpAddr, u8, u32);

thread_local! {
    /// To make one for each input would take longer than all else.
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

/// Has a world that nothing has happened in.
pub fn with<R>(setting: Setting, act: impl FnOnce(&World) -> R) -> R {
    WORLD.with_borrow_mut(|world| {
        world.begin(setting);
        act(world)
    })
}

impl World {
    fn new() -> Self {
        let config = portfwd::config::parse(Path::new("rules.toml"), include_str!("rules.toml"));
        let rules = config.unwrap_or_else(|errors| panic!("{errors}")).rules;
        let plan = plan(&rules, &Resolved::new()).unwrap_or_else(|refused| panic!("{refused}"));
        let externals = Externals {
            v4: [BOX, SECOND, THIRD, DMZ_BOX].map(Ipv4Addr::from).to_vec(),
            v6: [BOX6, DMZ_BOX6].map(Ipv6Addr::from).to_vec(),
        };
        let [first, last] = MASQUERADE;
        let ports = BoxPorts { ephemeral: 32768..=60999, masquerade: first..=last };
        let update = Compiler::default().compile(&rules, &plan, &externals, &ports);

        let mut router = Router::new(HOP);
        router.masquerade = MASQUERADE;
        let last = update.translations.iter().map(|(number, _)| *number).max().unwrap_or(0);
        router.rows = vec![router.rows[0]; last as usize + 1];
        for (number, row) in update.translations {
            router.rows[number as usize] = row;
        }
        router.page = update.pages.iter().map(|(number, runs)| (*number, runs.page())).collect();
        (router.endpoints4, router.endpoints6) = Default::default();
        for ((direction, address), number) in update.new {
            let row = update.endpoints.iter().find(|(row, _)| *row == number);
            let &(_, mut endpoint) = row.expect("a new address leads to a row that is written");
            // The router's generation is the first.
            endpoint.generations[0] = endpoint.generations[update.generation as usize];
            match address {
                IpAddr::V4(v4) => {
                    router.endpoints4.insert((direction, Address(v4.octets())), endpoint);
                }
                IpAddr::V6(v6) => {
                    router.endpoints6.insert((direction, Address(v6.octets())), endpoint);
                }
            }
        }
        let (setting, firsts) = (Setting::of(0), RefCell::default());
        Self { rules, legs: plan.legs, router, setting, firsts }
    }

    /// Forgets all that has happened.
    fn begin(&mut self, setting: Setting) {
        self.setting = setting;
        self.firsts.get_mut().clear();
        let router = &mut self.router;
        router.routes4.get_mut().clear();
        router.routes6.get_mut().clear();
        router.hops.get_mut().clear();
        router.arrivals.get_mut().clear();
        router.flows4.clear();
        router.flows6.clear();
        router.candidates4.get_mut().clear();
        router.candidates6.get_mut().clear();
        router.mappings.get_mut().clear();
        router.clients.get_mut().clear();
        router.fragments.get_mut().clear();
        router.answer.get_mut().take();
        router.passed.get_mut().clear();
        router.bucket = RefCell::default();
        router.now.set(100_000);
        let generation = setting.trust.into();
        router.trust.set(Trust { generation, padding: 0, until: Jiffies(u64::MAX) });
        router.flow_room = if setting.crowded { 2 } else { usize::MAX };
        router.sockets = setting.sockets;
        router.route_mtu = if setting.narrow { 600 } else { 1500 };
        router.outside_flags = Interface::EXTERNAL
            | if setting.one_armed { Interface::INTERNAL } else { 0 }
            | if setting.ways == 1 { 0 } else { Interface::TRANSMITS };
        router.routes = Some(routes(setting));
    }

    pub fn setting(&self) -> Setting {
        self.setting
    }

    pub fn now(&self) -> u64 {
        self.router.now.get()
    }

    pub fn pass_time(&self, ticks: u64) {
        self.router.now.set(self.now() + ticks);
    }

    /// As if the routes had changed.
    pub fn change_routes(&self) {
        let Trust { generation, .. } = self.router.trust.get();
        if generation != 0 {
            let generation = generation + 1;
            self.router.trust.set(Trust { generation, ..self.router.trust.get() });
        }
    }

    /// As if established flows had lost this half.
    pub fn lose(&self, direction: Direction) {
        self.router.flows4.lose(direction);
        self.router.flows6.lose(direction);
    }

    /// Whether there is an established flow whose packets come like this.
    pub fn is_established(&self, ends: &Ends, direction: Direction) -> bool {
        match (ends.source.ip(), ends.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let key = key(ends, source.octets(), destination.octets(), direction);
                flow_table::find(&self.router.flows4, &key).is_some()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let key = key(ends, source.octets(), destination.octets(), direction);
                flow_table::find(&self.router.flows6, &key).is_some()
            }
            _ => false,
        }
    }

    /// Sends a frame through the box. What holds for any frame is checked; with it comes by which way
    /// it was translated, if it was.
    pub fn send(&self, role: Role, frame: &mut Vec<u8>) -> (Verdict, Option<Direction>) {
        let router = &self.router;
        let before = frame.clone();
        let counted = *router.counter.borrow();
        router.passed.borrow_mut().clear();
        router.answer.borrow_mut().take();

        let mut fenced = [&[0xa5; FENCE][..], &before, &[0x5a; FENCE]].concat();
        let verdict = router.handle(role, &mut fenced[FENCE..FENCE + before.len()]);
        let (head, rest) = fenced.split_at(FENCE);
        let (after, tail) = rest.split_at(before.len());
        assert!(head.iter().all(|byte| *byte == 0xa5), "written before the frame: {head:02x?}");
        assert!(tail.iter().all(|byte| *byte == 0x5a), "written behind the frame: {tail:02x?}");
        *frame = after.to_vec();

        let counts = router.counter.borrow();
        let more = |direction: Direction| {
            let [now, before] = [&*counts, &counted].map(|it| it.translated[direction as usize]);
            (now.packets - before.packets, now.bytes - before.bytes)
        };
        let drops =
            |reason: Dropped| counts.dropped[reason as usize] - counted.dropped[reason as usize];
        let dropped: u64 = Dropped::ALL.iter().map(|reason| drops(*reason)).sum();
        let ways = [Direction::Forward, Direction::Reply];
        let translated: u64 = ways.map(|direction| more(direction).0).iter().sum();
        let passed = router.passed.borrow();
        let answer = router.answer.borrow();
        let is_counted = match verdict {
            Verdict::Pass(reason) => **passed == [reason] && translated + dropped == 0,
            Verdict::Drop(reason) => passed.is_empty() && translated == 0 && drops(reason) == 1,
            Verdict::Redirect(_) | Verdict::Stack(_) => {
                passed.is_empty() && translated == 1 && dropped == 0
            }
            _ => panic!("{verdict:?} and nothing more"),
        };
        assert!(is_counted, "{verdict:?}: {passed:?}, {translated} translated, {dropped} dropped");
        match (verdict, &*answer) {
            (Verdict::Drop(reason), Some(answer)) => {
                check::answer(&before, answer, reason, router.route_mtu);
            }
            (_, Some(_)) => panic!("an answer, and yet {verdict:?}"),
            _ => {}
        }
        if translated == 0 {
            assert_eq!(before, *frame, "{verdict:?} and yet changed");
            return (verdict, None);
        }
        let direction = if more(Direction::Forward).0 == 1 { ways[0] } else { ways[1] };
        let is_sent = matches!(verdict, Verdict::Redirect(_));
        let packet = check::translated(&before, frame, is_sent);
        assert_eq!(more(direction).1, packet.length() as u64, "bytes that were counted");
        self.check_ends(role, direction, &packet, &before, frame);
        (verdict, Some(direction))
    }

    /// Whether the ends of a packet became what the rules say.
    fn check_ends(
        &self,
        role: Role,
        direction: Direction,
        packet: &Packet,
        before: &[u8],
        after: &[u8],
    ) {
        let (came, goes) = (packet.ends(before), packet.ends(after));
        let hairpin = role == Role::Internal;
        let context = || format!("{came:?} -> {goes:?}, {direction:?}, {role:?}");
        let first = (
            direction,
            came.source.ip(),
            came.destination.ip(),
            if packet.is_v4 { packet.protocol } else { 0 },
            packet.identification,
        );
        let end = match direction {
            Direction::Forward => goes.destination.ip(),
            Direction::Reply => goes.source.ip(),
        };
        if packet.offset != 0 {
            let first = self.firsts.borrow().get(&first).copied();
            let is_same = first.is_some_and(|(first, until)| first == end && self.now() < until);
            assert!(is_same, "not as the first fragment, {first:?}: {}", context());
            let end = usize::from(packet.offset) + packet.end - packet.payload;
            assert!(end <= usize::from(u16::MAX), "beyond the longest packet");
            return;
        }
        if packet.more {
            self.firsts.borrow_mut().insert(first, (end, self.now() + 30 * 250));
        }
        let Some(quoted) = packet.quoted(before) else {
            let is_right = match direction {
                Direction::Forward => self.may_become(&came, &goes, hairpin, true),
                Direction::Reply => {
                    self.may_become(&goes.reversed(), &came.reversed(), hairpin, false)
                }
            };
            assert!(is_right, "no rule says so: {}", context());
            return;
        };
        // What it quotes went the other way.
        let (was, is) = (quoted.ends(before), quoted.ends(after));
        let is_right = match direction {
            Direction::Forward => {
                self.may_become(&was.reversed(), &is.reversed(), hairpin, true)
                    && [came.source.ip(), is.destination.ip()].contains(&goes.source.ip())
            }
            Direction::Reply => {
                self.may_become(&is, &was, hairpin, false)
                    && goes.source.ip() == is.destination.ip()
            }
        };
        assert!(is_right, "no rule says so: {}, about {was:?} -> {is:?}", context());
        assert_eq!(came.destination.ip(), was.source.ip(), "not to who sent it");
        assert_eq!(goes.destination.ip(), is.source.ip(), "not to who sent it");
    }

    /// Whether a packet from a client may be this on its way to the backend. Of rules that claim it the
    /// narrowest decides; a backend may answer also for a broader one.
    fn may_become(&self, came: &Ends, goes: &Ends, hairpin: bool, narrowest: bool) -> bool {
        let legs = if narrowest { self.claim(came) } else { self.claims(came).collect() };
        legs.iter().any(|leg| {
            let ports = matches!(came.protocol, TCP | UDP);
            let (source, destination) = (goes.source, goes.destination);
            let plain = source == came.source && (ports || source.port() == 0);
            let masqueraded = source.ip() == self.own_address(source.is_ipv4())
                && (MASQUERADE[0]..=MASQUERADE[1]).contains(&source.port());
            let kept = source.ip() == came.source.ip();
            let is_source_right = match (is_stateful(leg), leg.masquerade) {
                _ if hairpin && masqueraded => true,
                (false, _) => plain,
                (true, true) => masqueraded,
                (true, false) => kept,
            };
            let port = if ports { becomes(leg, came.destination.port()) } else { 0 };
            is_source_right && destination == SocketAddr::new(leg.backend, port)
        })
    }

    /// The legs of the rule that decides about a packet to the box.
    pub fn claim(&self, came: &Ends) -> Vec<&Leg> {
        let precedence = |leg: &&Leg| self.rules[leg.rule].precedence();
        let narrowest = self.claims(came).map(|leg| precedence(&leg)).min();
        self.claims(came).filter(|leg| Some(precedence(leg)) == narrowest).collect()
    }

    fn claims(&self, came: &Ends) -> impl Iterator<Item = &Leg> {
        let Ends { protocol, destination, .. } = *came;
        self.legs.iter().filter(move |leg| {
            let of_protocol = match protocol {
                TCP => leg.tcp,
                UDP => leg.udp,
                _ => leg.has_other(),
            };
            let (first, last) = (leg.ports.first(), leg.ports.last());
            let port = destination.port();
            let of_port = match protocol {
                // All ports, but those of masquerade and of DHCP clients.
                TCP | UDP if leg.ports == Ports::All => {
                    let dhcp = protocol == UDP && matches!(port, 68 | 546);
                    !dhcp && !(MASQUERADE[0]..=MASQUERADE[1]).contains(&port)
                }
                TCP | UDP => first <= port && port <= last,
                _ => true,
            };
            let listens = leg
                .listen
                .map_or_else(|| is_external(destination.ip()), |listen| listen == destination.ip());
            let of_family = leg.backend.is_ipv4() == destination.is_ipv4();
            of_protocol && of_port && listens && of_family
        })
    }

    /// The address that masqueraded clients have: of where the route to the backends leads.
    fn own_address(&self, is_v4: bool) -> IpAddr {
        match (is_v4, self.setting.one_armed || self.setting.ways == GONE) {
            (true, false) => LAN.into(),
            (true, true) => BOX.into(),
            (false, false) => LAN6.into(),
            (false, true) => BOX6.into(),
        }
    }
}

/// Whether a flow decides about its packets.
pub fn is_stateful(leg: &Leg) -> bool {
    leg.state != portfwd::compile::State::Stateless
}

fn becomes(leg: &Leg, port: u16) -> u16 {
    match leg.becomes {
        Becomes::Shifted(shift) => port.wrapping_add(shift.0),
        Becomes::One(port) => port,
    }
}

fn key<const N: usize>(
    ends: &Ends,
    source: [u8; N],
    destination: [u8; N],
    direction: Direction,
) -> FlowKey<N> {
    FlowKey {
        source: Address(source),
        destination: Address(destination),
        source_port: Port::new(ends.source.port()),
        destination_port: Port::new(ends.destination.port()),
        protocol: ends.protocol,
        direction: direction as u8,
        padding: [0; 2],
    }
}

/// An address on which rules without one listen.
fn is_external(address: IpAddr) -> bool {
    let v4 = [BOX, SECOND, THIRD, DMZ_BOX].map(IpAddr::from);
    v4.contains(&address) || [BOX6, DMZ_BOX6].map(IpAddr::from).contains(&address)
}

/// An address of the box.
pub fn is_own(address: IpAddr) -> bool {
    is_external(address) || [IpAddr::from(LAN), LAN6.into()].contains(&address)
}

/// Where backends are, and maybe clients.
pub fn is_inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[..3] == LAN[..3],
        IpAddr::V6(v6) => v6.octets()[..8] == LAN6[..8],
    }
}

/// What the FIB says.
fn routes(setting: Setting) -> Routes {
    Box::new(move |flow: &Flow| {
        let address = address(&flow.destination, flow.family == 2);
        let inside = is_inside(address) && !setting.one_armed;
        match setting.ways {
            _ if is_own(address) => nothing_but(Route::NotForwarded),
            2 => no_neighbour(if inside { INSIDE } else { OUTSIDE }),
            GONE => BACK,
            4 => nothing_but(Route::Encapsulated),
            _ if inside => HOP,
            _ => BACK,
        }
    })
}

fn address(any: &AnyAddress, is_v4: bool) -> IpAddr {
    if is_v4 { any.narrow::<4>().0.into() } else { any.narrow::<16>().0.into() }
}
