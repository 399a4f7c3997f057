//! From rules to tables. Pure: it asks nothing of the kernel.
//!
//! [`plan`] settles what each rule means once its names are resolved, and whether it is
//! stateless. [`Compiler::compile`] turns a plan and the box's addresses into what to write.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;
use std::hash::BuildHasher as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use portfwd_ebpf::flow_table::WINDOW;
use portfwd_ebpf::packet::{TCP, UDP};
use portfwd_ebpf::table::{
    Address, AnyAddress, Claims, Direction, Endpoint, MOST_BACKENDS, Mss, Ports as PortTable,
    Shift, Translation,
};
use serde::{Deserialize, Serialize};

use self::numbered::Numbered;
use self::pages::{Area, Canvas, EVERYWHERE, Pages, Runs, area};
use crate::flows;
use crate::network::Externals;
use crate::rule::{self, Host, Ports, Precedence, Rule, Source, narrower, shared_claim};

mod numbered;
mod pages;

/// The addresses of a host: at most one of each family.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostAddresses {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl HostAddresses {
    /// The host that has just this address.
    pub fn one(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self { v4: Some(v4), v6: None },
            IpAddr::V6(v6) => Self { v4: None, v6: Some(v6) },
        }
    }

    /// Both, IPv4 first.
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

/// The names in backends and their addresses.
pub type Resolved = BTreeMap<String, HostAddresses>;

/// One rule in one address family, with its backend's address known.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Leg {
    /// The rule's place in the rules that were planned.
    pub rule: usize,
    /// The listened address; none for every external address.
    pub listen: Option<IpAddr>,
    pub ports: Ports,
    pub tcp: bool,
    pub udp: bool,
    /// All other protocols.
    pub other: bool,
    pub backend: IpAddr,
    /// From the listened port to the backend's.
    pub becomes: Becomes,
    pub state: State,
    pub masquerade: bool,
    pub mss: Mss,
    /// Some rule leads to the backend from the other address family: its answers may change theirs.
    crossed: bool,
    /// With several backends: which of them this is, and a number of their list, from 1. 0 is none.
    place: u8,
    pool: u32,
    precedence: Precedence,
}

/// Whether packets need the flow table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    Stateless,
    Stateful,
    /// But replies of no flow can be answered from the rule alone.
    AlsoAlone,
}

/// What becomes of the port.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Becomes {
    /// This much higher.
    Shifted(Shift),
    /// This one, whatever it was.
    One(u16),
}

impl Leg {
    /// The backend's ports. A shifted range never wraps: both ends are ports.
    fn backend_ports(&self) -> (u16, u16) {
        match self.becomes {
            Becomes::Shifted(Shift(shift)) => {
                let shifted = |port: u16| port.wrapping_add(shift);
                (shifted(self.ports.first()), shifted(self.ports.last()))
            }
            Becomes::One(port) => (port, port),
        }
    }

    /// Where a reply of a stateless rule leaves, but for the port's own number.
    fn answers(&self) -> (Option<IpAddr>, Becomes) {
        (self.listen, self.becomes)
    }

    /// Whether its packets change their address family.
    pub fn crosses(&self) -> bool {
        self.listen.is_some_and(|listen| listen.is_ipv4() != self.backend.is_ipv4())
    }

    /// The families in which packets are forwarded for it: is it IPv4, is it IPv6.
    pub fn forwards(&self, v4: bool) -> bool {
        self.backend.is_ipv4() == v4 || self.crosses()
    }

    fn is_stateful(&self) -> bool {
        self.state != State::Stateless
    }

    /// Whether it leads packets to one of the backends: the first of several does so for all.
    fn leads(&self) -> bool {
        self.place == 0
    }

    /// Whether protocols other than TCP and UDP go there. Flows are of those two.
    pub fn has_other(&self) -> bool {
        self.other && !self.is_stateful()
    }

    /// The IP protocols that it forwards, [`OTHER`] among them.
    fn protocols(&self) -> impl Iterator<Item = u8> {
        [(self.tcp, TCP), (self.udp, UDP), (self.has_other(), OTHER)]
            .into_iter()
            .filter_map(|(has, number)| has.then_some(number))
    }

    /// Whether some reply of a backend could be of this leg and of the other, and would have to leave
    /// differently.
    fn clashes(&self, other: &Self) -> bool {
        let shares = self.tcp && other.tcp || self.udp && other.udp || self.other && other.other;
        let ((first, last), (from, to)) = (self.backend_ports(), other.backend_ports());
        self.backend == other.backend
            && shares
            && self.answers() != other.answers()
            && first <= to
            && from <= last
    }
}

/// Why a rule needs the flow table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stateful {
    Masquerade,
    SeveralBackends,
    /// Many listened ports become one.
    OnePort,
    /// Another rule, by its place, answers differently from a port of the same backend.
    SharesPort(usize),
    /// A backend is the box itself.
    Local,
}

/// What the rules mean.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// In the order of their rules.
    pub legs: Vec<Leg>,
    /// Rules that need the flow table, by their place; all others are stateless.
    pub stateful: BTreeMap<usize, Stateful>,
    /// The backends that are the box itself.
    local: BTreeSet<IpAddr>,
    /// The lists of several backends, with what becomes of ports there.
    pools: Vec<Pool>,
}

/// The backends of a rule in one family.
type Pool = Box<[(IpAddr, Becomes)]>;

/// Why rules cannot be loaded: a line each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused(pub Vec<String>);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Refused {}

/// Works out what `rules`, which passed their own checks, mean with these addresses of their names.
///
/// # Errors
///
/// A name without an address of the family that its rule listens on.
pub fn plan(rules: &[Rule], resolved: &Resolved) -> Result<Plan, Refused> {
    let mut refused = Vec::new();
    let mut plan = Plan { legs: Vec::with_capacity(room(rules.len())), ..Plan::default() };
    for (number, rule) in rules.iter().enumerate() {
        refused.extend(plan.add_legs(number, rule, resolved));
    }
    if !refused.is_empty() {
        return Err(Refused(refused));
    }
    plan.mark(rules);
    Ok(plan)
}

/// Room for so many and some more: to move a very long list costs more than to add to it.
fn room(length: usize) -> usize {
    length + length / 8
}

impl Plan {
    /// Adds the last of `rules`, of which the others were planned. Looks at each leg once.
    ///
    /// # Errors
    ///
    /// As [`plan`]; then nothing has changed.
    pub fn add(&mut self, rules: &[Rule], resolved: &Resolved) -> Result<(), Refused> {
        let Some((rule, planned)) = rules.split_last() else { return Ok(()) };
        let (before, pools) = (self.legs.len(), self.pools.len());
        let refused = self.add_legs(planned.len(), rule, resolved);
        if !refused.is_empty() {
            self.legs.truncate(before);
            self.pools.truncate(pools);
            return Err(Refused(refused));
        }
        let (legs, new) = self.legs.split_at(before);
        let clash = |leg: &Leg| new.iter().any(|new| new.clashes(leg));
        let own = own_reason(rule, new, &self.local).is_some();
        if own || legs.iter().any(clash) {
            self.mark(rules);
        }
        Ok(())
    }

    /// Takes out the rule with this number. Those behind it move up.
    pub fn remove(&mut self, rules: &[Rule], rule: usize) {
        self.legs.retain(|leg| leg.rule != rule);
        for leg in self.legs.iter_mut().filter(|leg| leg.rule > rule) {
            leg.rule -= 1;
        }
        if !self.stateful.is_empty() {
            self.mark(rules);
        }
    }

    /// Notes which backends are the box itself. Returns whether that is new.
    pub fn locate(&mut self, rules: &[Rule], local: &BTreeSet<IpAddr>) -> bool {
        let new = self.local != *local;
        if new {
            self.local.clone_from(local);
            self.mark(rules);
        }
        new
    }

    /// The backends that are the box itself.
    pub fn local(&self) -> &BTreeSet<IpAddr> {
        &self.local
    }

    /// The legs to other hosts.
    pub fn remote(&self) -> impl Iterator<Item = &Leg> {
        self.legs.iter().filter(|leg| !self.local.contains(&leg.backend))
    }

    /// Whether some rule masquerades.
    pub fn masquerades(&self) -> bool {
        self.stateful.values().any(|why| *why == Stateful::Masquerade)
    }

    /// The legs of a rule; why not, if one of its backends has none.
    fn add_legs(&mut self, number: usize, rule: &Rule, resolved: &Resolved) -> Vec<String> {
        let mut refused = Vec::new();
        let first_leg = self.legs.len();
        for target in rule.to.iter() {
            let host = match &target.host {
                Host::Address(address) => HostAddresses::one(*address),
                Host::Name(name) => resolved.get(name).copied().unwrap_or_default(),
            };
            let mut usable = false;
            let like = |backend: &IpAddr| {
                rule.listen.address.is_none_or(|listen| listen.is_ipv4() == backend.is_ipv4())
            };
            // To the other family only where there is no other way.
            let crosses = rule.source == Source::Masquerade && !host.iter().any(|it| like(&it));
            for backend in host.iter() {
                if !crosses && !like(&backend) {
                    continue;
                }
                let first = target.ports.map_or(rule.listen.ports.first(), Ports::first);
                let becomes = match target.ports {
                    Some(Ports::One(port)) if rule.listen.ports.width() > 1 => Becomes::One(port),
                    _ => Becomes::Shifted(Shift::between(rule.listen.ports.first(), first)),
                };
                usable = true;
                // Two names may lead to one host.
                let same = |leg: &Leg| (leg.backend, leg.becomes) == (backend, becomes);
                if self.legs[first_leg..].iter().any(same) {
                    continue;
                }
                self.legs.push(Leg {
                    rule: number,
                    listen: rule.listen.address,
                    ports: rule.listen.ports,
                    tcp: rule.protocol.tcp(),
                    udp: rule.protocol.udp(),
                    other: rule.protocol.other(),
                    backend,
                    becomes,
                    state: State::Stateless,
                    masquerade: rule.source == Source::Masquerade,
                    mss: match rule.mss {
                        rule::Mss::Auto => Mss::AUTO,
                        rule::Mss::Off => Mss::OFF,
                        rule::Mss::At(bytes) => Mss(bytes),
                    },
                    crossed: false,
                    place: 0,
                    pool: 0,
                    precedence: rule.precedence(),
                });
            }
            if !usable {
                refused.push(no_address(rule, &target.host));
            }
        }
        let crosses = |leg: &&Leg| leg.crosses();
        let own = &self.legs[first_leg..];
        if let (Some(one), Some(other)) =
            (own.iter().find(crosses), own.iter().find(|leg| !leg.crosses()))
        {
            refused.push(two_families(rule, one.backend, other.backend));
        }
        for v4 in [true, false] {
            let of_family = |leg: &&mut Leg| leg.backend.is_ipv4() == v4;
            let legs = || self.legs[first_leg..].iter();
            let pool: Pool = legs()
                .filter(|leg| leg.backend.is_ipv4() == v4)
                .map(|leg| (leg.backend, leg.becomes))
                .take(MOST_BACKENDS)
                .collect();
            if pool.len() < 2 {
                continue;
            }
            self.pools.push(pool);
            let number = self.pools.len() as u32;
            for (place, leg) in self.legs[first_leg..].iter_mut().filter(of_family).enumerate() {
                leg.place = place as u8;
                leg.pool = number;
            }
        }
        refused
    }

    /// Finds out which rules need the flow table.
    fn mark(&mut self, rules: &[Rule]) {
        self.stateful.clear();
        for legs in self.legs.chunk_by(|a, b| a.rule == b.rule) {
            let rule = legs[0].rule;
            if let Some(why) = own_reason(&rules[rule], legs, &self.local) {
                self.stateful.insert(rule, why);
            }
        }
        let shared = shared_ports(&self.legs);
        for (rule, other) in &shared {
            self.stateful.entry(*rule).or_insert(Stateful::SharesPort(*other));
        }
        let crossed: BTreeSet<IpAddr> =
            self.legs.iter().filter(|leg| leg.crosses()).map(|leg| leg.backend).collect();
        for leg in &mut self.legs {
            leg.crossed = crossed.contains(&leg.backend);
            leg.state = match (self.stateful.get(&leg.rule), leg.becomes) {
                (None, _) => State::Stateless,
                (Some(Stateful::SeveralBackends), Becomes::Shifted(_))
                    if !shared.contains_key(&leg.rule) && !self.local.contains(&leg.backend) =>
                {
                    State::AlsoAlone
                }
                _ => State::Stateful,
            };
        }
    }
}

/// Why a rule needs the flow table, whatever the others are.
fn own_reason(rule: &Rule, legs: &[Leg], local: &BTreeSet<IpAddr>) -> Option<Stateful> {
    if rule.source == Source::Masquerade {
        return Some(Stateful::Masquerade);
    }
    if legs.iter().any(|leg| leg.pool != 0) {
        return Some(Stateful::SeveralBackends);
    }
    let one = |leg: &Leg| matches!(leg.becomes, Becomes::One(_));
    if legs.iter().any(one) {
        return Some(Stateful::OnePort);
    }
    legs.iter().any(|leg| local.contains(&leg.backend)).then_some(Stateful::Local)
}

fn two_families(rule: &Rule, one: IpAddr, other: IpAddr) -> String {
    format!(
        "{}: rule \"{}\": {one} and {other} are of two families; the backends of a rule with an \
         address to listen on are of one",
        rule.place, rule.name
    )
}

fn no_address(rule: &Rule, host: &Host) -> String {
    format!(
        "{}: rule \"{}\": {host} has no address{}; check the name, or write an address",
        rule.place,
        rule.name,
        match rule.listen.address {
            Some(IpAddr::V4(_)) => " of IPv4, which the rule listens on",
            Some(IpAddr::V6(_)) => " of IPv6, which the rule listens on",
            None => "",
        }
    )
}

/// Rules that share a port of a backend with another that answers differently: each once, with one of
/// those.
///
/// Takes n log n steps.
fn shared_ports(legs: &[Leg]) -> BTreeMap<usize, usize> {
    let mut sources: BTreeMap<(IpAddr, u8), Vec<&Leg>> = BTreeMap::new();
    for leg in legs {
        for protocol in leg.protocols() {
            sources.entry((leg.backend, protocol)).or_default().push(leg);
        }
    }
    let mut found = BTreeMap::new();
    for mut legs in sources.into_values().filter(|legs| legs.len() > 1) {
        legs.sort_by_key(|leg| leg.backend_ports());
        // Those that still are open agree with each other: else they would have been found.
        let mut open: Vec<&Leg> = Vec::new();
        // Of those that were found, the two that reach farthest and answer differently.
        let mut farthest: [Option<&Leg>; 2] = [None; 2];
        for leg in legs {
            let (first, _) = leg.backend_ports();
            let meets = |other: &&Leg| other.backend_ports().1 >= first;
            let differs = |other: &&Leg| other.answers() != leg.answers();
            open.retain(meets);
            let mut clash = farthest.into_iter().flatten().filter(meets).find(differs);
            let mut reaches = Vec::new();
            if open.first().is_some_and(differs) {
                clash = open.first().copied();
                for other in open.drain(..) {
                    found.entry(other.rule).or_insert(leg.rule);
                    reaches.push(other);
                }
            }
            match clash {
                Some(other) => {
                    found.entry(leg.rule).or_insert(other.rule);
                    reaches.push(leg);
                }
                None => open.push(leg),
            }
            for leg in reaches {
                farthest = farther(farthest, leg);
            }
        }
    }
    found
}

/// The farthest of all, and the farthest of those that answer differently from it.
fn farther<'a>([first, second]: [Option<&'a Leg>; 2], leg: &'a Leg) -> [Option<&'a Leg>; 2] {
    let end = |leg: &Leg| leg.backend_ports().1;
    let differ = |a: &Leg, b: &Leg| a.answers() != b.answers();
    match first {
        None => [Some(leg), None],
        Some(best) if end(leg) > end(best) => {
            let second = if differ(best, leg) { Some(best) } else { second };
            [Some(leg), second]
        }
        Some(best) if differ(best, leg) && second.is_none_or(|other| end(leg) > end(other)) => {
            [first, Some(leg)]
        }
        _ => [first, second],
    }
}

/// What each of `rules` means and why it is stateless or stateful, for people.
pub fn explain(rules: &[Rule], plan: &Plan) -> Vec<String> {
    let mut legs = plan.legs.as_slice();
    let narrower = narrower(rules);
    let explained = narrower.iter().enumerate().map(|(number, narrower)| {
        // Legs are in the order of their rules.
        let (own, rest) = legs.split_at(legs.partition_point(|leg| leg.rule == number));
        legs = rest;
        explain_one(rules, own, number, plan.stateful.get(&number), narrower)
    });
    explained.collect()
}

fn explain_one(
    rules: &[Rule],
    legs: &[Leg],
    number: usize,
    stateful: Option<&Stateful>,
    narrower: &BTreeSet<usize>,
) -> String {
    let rule = &rules[number];
    let mut lines = Vec::new();
    for leg in legs {
        let (first, last) = leg.backend_ports();
        let ports = match (rule.listen.ports, leg.becomes) {
            (Ports::All, Becomes::Shifted(_)) => "the same port".to_owned(),
            _ if first == last => format!("port {first}"),
            _ => format!("ports {first}-{last}"),
        };
        let listen = leg.listen.map_or_else(
            || {
                let family = if leg.backend.is_ipv4() { "IPv4" } else { "IPv6" };
                format!("every external {family} address")
            },
            |address| address.to_string(),
        );
        let backend = leg.backend;
        lines.push(format!("{listen}, {} {} -> {backend}, {ports}", rule.protocol, leg.ports));
    }
    for other in narrower.iter().map(|other| &rules[*other]) {
        let claim = shared_claim(rule, other).unwrap_or_default();
        lines.push(format!("except {claim}: rule \"{}\" is narrower", other.name));
    }
    lines.push(match stateful {
        None => "stateless: one backend, and no other rule answers differently from its ports"
            .to_owned(),
        Some(Stateful::Masquerade) => "stateful: masquerade hides clients behind an address of \
                                       this box, so each needs a port of its own"
            .to_owned(),
        Some(Stateful::SeveralBackends) => {
            "stateful: several backends, and a flow stays with the one that it began with"
                .to_owned()
        }
        Some(Stateful::OnePort) => {
            "stateful: several listened ports become one, and a reply must find back".to_owned()
        }
        Some(Stateful::Local) => "stateful: the backend is this box, whose other connections from \
                                  that port stay as they are"
            .to_owned(),
        Some(Stateful::SharesPort(other)) => format!(
            "stateful: rule \"{}\" answers differently from a port of the same backend",
            rules[*other].name
        ),
    });
    let crosses = legs.iter().any(Leg::crosses);
    if crosses {
        lines.push("headers of the other IP version (RFC 7915): the backend is of that".to_owned());
    }
    match rule.mss {
        rule::Mss::Auto => {}
        _ if crosses => lines
            .push("mss: of no effect, as SYNs to the other IP version stay as they are".to_owned()),
        rule::Mss::Off => lines.push("mss: segments of TCP may be larger than the way".to_owned()),
        rule::Mss::At(bytes) => {
            lines.push(format!("mss: segments of TCP have {bytes} bytes at most"))
        }
    }
    if stateful.is_some() && rule.protocol.other() {
        lines.push(
            "TCP and UDP only: pings and other protocols have no ports to tell flows by".to_owned(),
        );
    }
    lines.join("\n")
}

/// What leads to an endpoint: an address, among those listened on (forward) or those of backends
/// (reply).
pub type EndpointKey = (Direction, IpAddr);

/// What to write so that the kernel's tables hold a plan.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Update {
    /// New rows, at numbers that no live row refers to.
    pub translations: Vec<(u32, Translation)>,
    /// New pages, at numbers that no live row refers to.
    pub pages: Vec<(u32, Runs)>,
    /// Rows of the endpoints whose next generation differs from what they hold.
    pub endpoints: Vec<(u32, Endpoint)>,
    /// Addresses that lead to those rows and did not before.
    pub new: Vec<(EndpointKey, u32)>,
    /// Addresses whose rows claim nothing, neither in the generation before nor in the next. Their
    /// numbers are used again by a later update.
    pub gone: Vec<EndpointKey>,
    /// What makes the endpoints' next generation live.
    pub generation: u32,
    /// By the rules' counters, where it differs. Written once that is live.
    pub mss: Vec<(u32, Mss)>,
    /// How many rows of counters have names.
    pub counters: u32,
}

/// How many rows the tables hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    pub endpoints: u32,
    pub translations: u32,
    pub pages: u32,
    pub counters: u32,
    pub flows: FlowRoom,
    /// Packets may change their address family.
    pub crosses: bool,
    /// Addresses and ports that clients get.
    pub mappings: u32,
}

/// Room for flows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowRoom {
    /// How many established flows there may be in each family; one is none.
    pub v4: Flows,
    pub v6: Flows,
}

/// How many established flows there may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flows(pub u32);

impl Flows {
    /// How many places of their table are homes.
    pub fn homes(self) -> u32 {
        flows::homes(self.0)
    }

    /// As many as a table with so many places was made for.
    fn with_entries(entries: u32) -> Self {
        let homes = u64::from((entries + 1).saturating_sub(WINDOW));
        Self((homes * 3).div_ceil(8) as u32)
    }

    /// How many places their table has.
    pub fn entries(self) -> u32 {
        self.homes() + WINDOW - 1
    }

    /// How many flows may be on probation.
    pub fn probation(self) -> u32 {
        if self.0 <= 1 { 1024 } else { flows::probation(self.0) }
    }
}

/// Room for flows where no rule needs them, but a client inside may use an external address.
const HAIRPIN_FLOWS: u32 = 16_384;
/// For how many addresses of the box there is room, with all their ports.
const MASQUERADE_ADDRESSES: u32 = 16;

impl Capacity {
    /// Enough for `plan` of `rules` with any number of external addresses, of either family where a
    /// name may have both, and with room for as much again: while a change is written the old rows
    /// and the new ones are there.
    pub fn for_plan(rules: &[Rule], plan: &Plan, ports: &BoxPorts, flows: u32) -> Self {
        // From two on, further addresses share the rows and pages of the second.
        let externals = Externals {
            v4: vec![Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST],
            v6: vec![Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED],
        };
        let update = Compiler::default().compile(rules, plan, &externals, ports);
        let is_name = |rule: &Rule| rule.to.iter().any(|to| matches!(to.host, Host::Name(_)));
        let families = if rules.iter().any(is_name) { 2 } else { 1 };
        let room = |rows: usize| (2 * families * rows) as u32 + 256;
        Self {
            endpoints: room(update.endpoints.len()),
            translations: room(update.translations.len()),
            pages: room(update.pages.len()),
            counters: Self::counters(rules.len() as u32),
            ..Self::of_flows(rules, plan, ports, flows)
        }
    }

    /// Room for the counters of so many names, and more.
    pub fn counters(names: u32) -> u32 {
        names + names / 2 + 256
    }

    /// What `plan` needs for flows, and nothing for its tables.
    pub fn of_flows(rules: &[Rule], plan: &Plan, ports: &BoxPorts, flows: u32) -> Self {
        let is_name = |rule: &Rule| rule.to.iter().any(|to| matches!(to.host, Host::Name(_)));
        let named = rules.iter().any(is_name);
        let crosses = rules.iter().any(Rule::may_cross);
        let flows = |v4: bool| {
            let mut legs = plan.legs.iter().filter(|leg| leg.backend.is_ipv4() == v4);
            // Flows that change their family stand among those of IPv6.
            let crosses = crosses && !v4;
            let needs =
                crosses || legs.clone().any(Leg::is_stateful) || named && !plan.stateful.is_empty();
            Flows(match legs.next() {
                _ if needs => flows,
                None if !named => 1,
                _ => flows.min(HAIRPIN_FLOWS),
            })
        };
        Self {
            endpoints: 0,
            translations: 0,
            pages: 0,
            counters: 0,
            flows: FlowRoom { v4: flows(true), v6: flows(false) },
            crosses,
            mappings: 2 * MASQUERADE_ADDRESSES * ports.masquerade.len() as u32,
        }
    }

    /// Whether a table of flows that is `there`, with so many entries, has room enough; then there is as much as
    /// it has. Other maps do, always.
    pub fn make_room(&mut self, map: &str, there: u32) -> bool {
        let FlowRoom { v4, v6 } = &mut self.flows;
        let (wanted, room) = match map {
            "FLOWS_V4" => (v4.entries(), Some(v4)),
            "FLOWS_V6" => (v6.entries(), Some(v6)),
            "PROBATION_V4" => (v4.probation(), None),
            "PROBATION_V6" => (v6.probation(), None),
            "MAPPINGS" | "CLIENTS" => (self.mappings, None),
            _ => return true,
        };
        if let (Some(room), true) = (room, there > wanted) {
            *room = Flows::with_entries(there);
        }
        there >= wanted
    }

    /// Whether there is this row of the endpoints. An update that did not fit may have left numbers
    /// beyond the end, which the next one empties: that needs no writing.
    pub fn has_endpoint(&self, number: u32) -> bool {
        number < self.endpoints
    }

    /// Whether `update` fits.
    pub fn holds(&self, update: &Update) -> bool {
        let is_empty = |endpoint: &Endpoint| *endpoint == Endpoint::default();
        update.endpoints.iter().all(|(number, it)| self.has_endpoint(*number) || is_empty(it))
            && update.translations.iter().all(|(number, translation)| {
                *number < self.translations
                    && (self.crosses || !translation.has(Translation::CROSS))
            })
            && update.pages.iter().all(|(number, _)| *number < self.pages)
            && update.counters <= self.counters
    }
}

/// The ports that the box itself uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BoxPorts {
    /// From which the kernel picks for the box's own connections.
    pub ephemeral: RangeInclusive<u16>,
    /// Which clients get that masquerade.
    pub masquerade: RangeInclusive<u16>,
}

/// Keeps what is loaded, so that a change writes what it changes and nothing else.
#[derive(Default)]
pub struct Compiler {
    /// The names of rules, numbered as their counters are.
    names: Names,
    /// Lists of several backends, numbered from 0. They stay, like the names.
    pools: Numbered<Pool, ()>,
    rows: Rows,
    pages: Pages,
    /// The page of each rule with several backends, by the row that leads there.
    pool_pages: HashMap<u32, u32>,
    /// What is live.
    legs: Vec<Placed>,
    world: World,
    /// By the number of a rule's name; from the end on, [`Mss::AUTO`].
    mss: Vec<Mss>,
    endpoints: Numbered<EndpointKey, EndpointRow>,
    /// Where the kernel may not have the same in both generations.
    unsettled: Vec<EndpointKey>,
    generation: u32,
    pending: Option<Pending>,
    /// Protocols beside TCP and UDP that the box itself speaks.
    own: BTreeSet<u8>,
}

/// A leg with its rows.
#[derive(Clone, Copy)]
struct Placed {
    /// Its rule is the number of the rule's name: the same as long as the name is.
    leg: Leg,
    /// Rows of its [`translations`].
    rows: [u32; VARIANTS],
}

/// What was compiled last and is not live yet.
struct Pending {
    /// Live legs that stay, at the front and at the back, and what stands between.
    front: usize,
    back: usize,
    between: Vec<Placed>,
    world: World,
    /// Rows that this uses and nothing live.
    added: Vec<u32>,
    /// Rows that this does not use any more.
    dropped: Vec<u32>,
    /// Rows with several backends, and their pages.
    pool_pages: Vec<(u32, u32)>,
    /// Tables as they were painted.
    tables: Vec<(Table, PortTable)>,
    /// As in [`Update`].
    mss: Vec<(u32, Mss)>,
}

/// A row of the endpoints.
#[derive(Default)]
struct EndpointRow {
    /// What is live.
    claims: Claims,
    /// The kernel has the address.
    known: bool,
}

/// One protocol at an endpoint.
type Table = (EndpointKey, u8);

/// Stands for all protocols but TCP and UDP: a number that none of them has.
const OTHER: u8 = 255;

fn table_of(claims: &mut Claims, protocol: u8) -> &mut PortTable {
    match protocol {
        TCP => &mut claims.tcp,
        UDP => &mut claims.udp,
        _ => &mut claims.other,
    }
}

impl Compiler {
    /// With these names of rules, whose counters are numbered in this order.
    pub fn with_names<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut compiler = Self::default();
        for name in names {
            compiler.names.number(name);
        }
        compiler
    }

    /// All names that have counters, in their order, also of rules that are gone.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.names.len()).map(|number| self.names.get(number as usize))
    }

    /// The counter of a rule's name.
    pub fn counter(&self, name: &str) -> Option<u32> {
        self.names.find(name)
    }

    /// From the next [`compile`](Self::compile) on, no rule claims these protocols.
    pub fn leave(&mut self, own: &BTreeSet<u8>) {
        self.own.clone_from(own);
    }

    /// Works out what to write for `plan` of `rules`. Nothing is live until it is written and
    /// [`commit`](Self::commit) said so; what is not committed is forgotten by the next call.
    ///
    /// Ranges ask for the box's own sockets on the ephemeral ports, `*` on all.
    ///
    /// Every leg is compared with what is live, in about 50 ns; all other work grows with the
    /// difference.
    pub fn compile(
        &mut self,
        rules: &[Rule],
        plan: &Plan,
        externals: &Externals,
        ports: &BoxPorts,
    ) -> Update {
        self.forget();
        let world = World::new(externals, ports, plan.masquerades(), &self.own);
        let mut touched = Touched::default();
        let (pending, translations) = self.place(rules, plan, world, &mut touched);
        for (_, live, painted) in &mut touched.tables {
            *painted = area(*live, painted.clone());
        }
        let pending = self.pending.insert(pending);
        let (front, rest) = self.legs.split_at(pending.front);
        let back = &rest[rest.len() - pending.back..];
        let legs = front.iter().chain(&pending.between).chain(back);
        let strokes = strokes(legs, &pending.world, &touched);
        let mut canvas = Canvas::default();
        let mut strokes = strokes.as_slice();
        let mut tables = Vec::with_capacity(touched.tables.len());
        for (number, (table, live, area)) in touched.tables.into_iter().enumerate() {
            let end = strokes.partition_point(|stroke| stroke.table == number as u32);
            let (own, others) = strokes.split_at(end);
            strokes = others;
            let own = own.iter().map(|stroke| (stroke.ports, stroke.row));
            let ports = canvas.paint(&mut self.pages, live, area, own);
            self.pages.acquire(ports);
            tables.push((table, ports));
        }
        pending.tables = tables;
        let mss = pending.mss.clone();
        let mut update = self.update();
        update.mss = mss;
        update.translations = translations;
        update.pages = self.pages.take_fresh();
        update
    }

    /// Finds out which legs are new or gone, gives rows to the new ones, and notes which parts of
    /// which tables all of them touch.
    fn place(
        &mut self,
        rules: &[Rule],
        plan: &Plan,
        world: World,
        touched: &mut Touched,
    ) -> (Pending, Vec<(u32, Translation)>) {
        let Self { names, pools, rows, pages, legs: live, world: before, endpoints, .. } = self;
        let before_mss = &self.mss;
        let live_table = |(key, protocol): Table| {
            let number = endpoints.find(&key);
            number.map_or(PortTable::NONE, |number| {
                *table_of(&mut endpoints[number].claims.clone(), protocol)
            })
        };
        let mut number =
            |pool: &Pool| pools.find(pool).unwrap_or_else(|| pools.insert(pool.clone(), ()));
        let numbers: Vec<u32> = plan.pools.iter().map(&mut number).collect();
        let pool_of = |leg: &Leg| match leg.pool {
            0 => 0,
            number => numbers[number as usize - 1] + 1,
        };
        let stays = before.stays(&world);
        let same = |placed: &Placed, leg: &Leg| {
            placed.leg == Leg { rule: placed.leg.rule, pool: pool_of(leg), ..*leg }
                && stays(leg)
                && names.get(placed.leg.rule) == rules[leg.rule].name
        };
        let pairs = || live.iter().zip(&plan.legs);
        let front = pairs().take_while(|(placed, leg)| same(placed, leg)).count();
        let ends = live[front..].iter().rev().zip(plan.legs[front..].iter().rev());
        let back = ends.take_while(|(placed, leg)| same(placed, leg)).count();
        let live = &live[front..live.len() - back];
        let wanted = &plan.legs[front..plan.legs.len() - back];

        // Among the others, wherever they stand.
        let there = live.iter().enumerate().filter(|(_, placed)| stays(&placed.leg));
        let mut there: HashMap<Leg, usize> =
            there.map(|(place, placed)| (placed.leg, place)).collect();
        let mut remains = vec![false; live.len()];
        let mut between = Vec::with_capacity(wanted.len());
        let (mut added, mut translations, mut mss) = (Vec::new(), Vec::new(), Vec::new());
        for leg in wanted {
            let rule = names.number(&rules[leg.rule].name);
            let leg = Leg { rule, pool: pool_of(leg), ..*leg };
            if let Some(place) = there.remove(&leg) {
                remains[place] = true;
                between.push(live[place]);
                continue;
            }
            let own = (rule as u32, leg.mss);
            if before_mss.get(rule).copied().unwrap_or_default() != leg.mss
                && mss.last() != Some(&own)
            {
                mss.push(own);
            }
            let mut placed = Placed { leg, rows: [0; VARIANTS] };
            for (row, translation) in placed.rows.iter_mut().zip(world.translations(&leg)) {
                if let Some(translation) = translation {
                    *row = rows.take();
                    added.push(*row);
                    translations.push((*row, translation));
                }
            }
            touched.leg(&leg, &world, live_table);
            between.push(placed);
        }
        let pool_pages = fill_pools(&between, pages, &mut translations);
        let mut dropped = Vec::new();
        for (placed, _) in live.iter().zip(remains).filter(|(_, remains)| !remains) {
            dropped.extend(placed.rows.iter().filter(|row| **row != 0));
            touched.leg(&placed.leg, before, live_table);
        }
        // An address that came or went.
        for address in before.differing(&world) {
            for protocol in [TCP, UDP, OTHER] {
                touched.table(((Direction::Forward, address), protocol), EVERYWHERE, live_table);
            }
        }
        let tables = Vec::new();
        let pending =
            Pending { front, back, between, world, added, dropped, pool_pages, tables, mss };
        (pending, translations)
    }

    /// What to write so that the next generation has the pending tables, and all others as they are.
    fn update(&mut self) -> Update {
        let Self { endpoints: rows, unsettled, pending, .. } = self;
        let tables = pending.iter().flat_map(|pending| &pending.tables);
        let live = |rows: &Numbered<EndpointKey, EndpointRow>, key| {
            rows.find(key).map_or(Claims::default(), |number| rows[number].claims)
        };
        let mut wanted: HashMap<EndpointKey, Claims> =
            unsettled.iter().map(|key| (*key, live(rows, key))).collect();
        for ((key, protocol), ports) in tables {
            // An address without rules needs no row.
            if *ports != PortTable::NONE || rows.find(key).is_some() {
                let claims = wanted.entry(*key).or_insert_with(|| live(rows, key));
                *table_of(claims, *protocol) = *ports;
            }
        }
        let (live, next) = (self.generation as usize, self.generation ^ 1);
        let (mut endpoints, mut new, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for (key, claims) in &wanted {
            let number =
                rows.find(key).unwrap_or_else(|| rows.insert(*key, EndpointRow::default()));
            let row = &rows[number];
            let mut endpoint = Endpoint { generations: [*claims; 2] };
            endpoint.generations[live] = row.claims;
            endpoints.push((number, endpoint));
            if !row.known {
                new.push((*key, number));
            }
            if endpoint == Endpoint::default() {
                gone.push(*key);
            }
        }
        *unsettled = wanted.into_keys().collect();
        Update {
            translations: Vec::new(),
            pages: Vec::new(),
            endpoints,
            new,
            gone,
            generation: next,
            mss: Vec::new(),
            counters: self.names.len(),
        }
    }

    /// `update`, which the last [`compile`](Self::compile) returned, is live now.
    pub fn commit(&mut self, update: &Update) {
        let Some(pending) = self.pending.take() else { return };
        let Pending { front, back, between, world, dropped, pool_pages, tables, mss, .. } = pending;
        for (rule, mss) in mss {
            let rule = rule as usize;
            self.mss.resize(self.mss.len().max(rule + 1), Mss::AUTO);
            self.mss[rule] = mss;
        }
        for page in dropped.iter().filter_map(|row| self.pool_pages.remove(row)) {
            self.pages.release_pool(page);
        }
        self.pool_pages.extend(pool_pages);
        for key in &self.unsettled {
            if let Some(number) = self.endpoints.find(key) {
                self.endpoints[number].known = true;
            }
        }
        self.unsettled.clear();
        for ((key, protocol), ports) in tables {
            let Some(number) = self.endpoints.find(&key) else { continue };
            let before =
                std::mem::replace(table_of(&mut self.endpoints[number].claims, protocol), ports);
            self.pages.release(before);
            if before != ports {
                self.unsettled.push(key);
            }
        }
        for key in &update.gone {
            if let Some(number) = self.endpoints.find(key) {
                self.endpoints.remove(number);
            }
        }
        self.rows.free.extend(dropped.into_iter().map(Reverse));
        if self.legs.is_empty() {
            // Room for the first that are added.
            self.legs.reserve_exact(room(between.len()));
        }
        self.legs.splice(front..self.legs.len() - back, between);
        self.world = world;
        self.generation = update.generation;
    }

    /// What was compiled last did not become live.
    fn forget(&mut self) {
        let Some(pending) = self.pending.take() else { return };
        for (_, ports) in pending.tables {
            self.pages.release(ports);
        }
        for (_, page) in pending.pool_pages {
            self.pages.release_pool(page);
        }
        self.rows.free.extend(pending.added.into_iter().map(Reverse));
    }
}

/// Has the first of several backends lead to all of them: where its translations are new, so are the
/// others', and they stand behind it. The rows that lead there, and their pages, which are acquired.
fn fill_pools(
    placed: &[Placed],
    pages: &mut Pages,
    translations: &mut [(u32, Translation)],
) -> Vec<(u32, u32)> {
    let numbers: HashMap<u32, usize> = translations
        .iter()
        .enumerate()
        .filter(|(_, (_, translation))| translation.has(Translation::SEVERAL))
        .map(|(place, (row, _))| (*row, place))
        .collect();
    let mut found = Vec::new();
    for (place, head) in placed.iter().enumerate().filter(|(_, it)| it.leg.pool != 0) {
        let new = head.rows.iter().filter_map(|row| Some((*row, *numbers.get(row)?)));
        let new: Vec<(u32, usize)> = new.collect();
        if new.is_empty() {
            continue;
        }
        let of_rule = placed[place..].iter().take_while(|it| it.leg.rule == head.leg.rule);
        let backends = of_rule.filter(|it| it.leg.pool == head.leg.pool);
        let rows: Vec<u32> = backends.map(|it| it.rows[POOLED]).collect();
        for (row, translation) in new {
            let page = pages.acquire_pool(&rows);
            let translation = &mut translations[translation].1;
            translation.pool = page;
            translation.backends = rows.len() as u16;
            found.push((row, page));
        }
    }
    found
}

/// What rules mean depends on.
#[derive(Default)]
struct World {
    /// External addresses.
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// First and last.
    ephemeral: (u16, u16),
    /// The ports of masquerade, if some rule does that, first and last.
    masquerade: Option<(u16, u16)>,
    /// Protocols other than TCP and UDP that rules may claim, as the ports of [`OTHER`].
    protocols: Vec<(u16, u16)>,
}

/// A leg has at most so many translations: the reply's, then for its first address and for the
/// others each one that does not ask for sockets and one that does. To a stateful leg all addresses are
/// alike; one of several backends has, in place of those for other addresses, its own.
const VARIANTS: usize = 5;
/// The translation to one of several backends.
const POOLED: usize = 3;

impl World {
    fn new(externals: &Externals, ports: &BoxPorts, masquerades: bool, own: &BTreeSet<u8>) -> Self {
        let BoxPorts { ephemeral, masquerade } = ports;
        let claimed: Vec<u16> = (0..OTHER)
            .filter(|number| !NEVER_CLAIMED.contains(number) && !own.contains(number))
            .map(u16::from)
            .collect();
        let pieces = claimed.chunk_by(|one, next| one + 1 == *next);
        Self {
            v4: externals.v4.iter().copied().map(IpAddr::V4).collect(),
            v6: externals.v6.iter().copied().map(IpAddr::V6).collect(),
            ephemeral: (*ephemeral.start(), *ephemeral.end()),
            masquerade: masquerades.then_some((*masquerade.start(), *masquerade.end())),
            protocols: pieces.map(|piece| (piece[0], piece[piece.len() - 1])).collect(),
        }
    }

    /// The external addresses of the family of `like`.
    fn of_family(&self, like: IpAddr) -> &[IpAddr] {
        if like.is_ipv4() { &self.v4 } else { &self.v6 }
    }

    /// The addresses that a leg listens on.
    fn listened<'a>(&'a self, leg: &'a Leg) -> &'a [IpAddr] {
        match &leg.listen {
            Some(address) => std::slice::from_ref(address),
            None => self.of_family(leg.backend),
        }
    }

    /// Which legs have the same translations in both worlds.
    fn stays(&self, other: &Self) -> impl Fn(&Leg) -> bool + use<> {
        let same =
            |a: &[IpAddr], b: &[IpAddr]| a.first() == b.first() && (a.len() > 1) == (b.len() > 1);
        let (v4, v6) = (same(&self.v4, &other.v4), same(&self.v6, &other.v6));
        let ranges = self.ephemeral == other.ephemeral;
        let all = self.masquerade == other.masquerade;
        let protocols = self.protocols == other.protocols;
        move |leg| {
            let family = if leg.backend.is_ipv4() { v4 } else { v6 };
            let ports = match leg.ports {
                Ports::One(_) => true,
                Ports::Range { .. } => ranges,
                Ports::All => all,
            };
            (leg.listen.is_some() || family) && ports && (protocols || !leg.other)
        }
    }

    /// Addresses that only one of the two worlds has.
    fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = IpAddr> + 'a {
        let all = |world: &'a Self| world.v4.iter().chain(&world.v6);
        let lacks = |world: &'a Self| move |address: &&IpAddr| !all(world).any(|it| it == *address);
        all(self).filter(lacks(other)).chain(all(other).filter(lacks(self))).copied()
    }

    /// What becomes of the packets of a leg, by variant.
    fn translations(&self, leg: &Leg) -> [Option<Translation>; VARIANTS] {
        let addresses = self.listened(leg);
        let Some(first) = addresses.first() else { return [None; VARIANTS] };
        if leg.is_stateful() {
            return self.stateful_translations(leg, *first);
        }
        let many = if addresses.len() > 1 { Translation::MANY_ADDRESSES } else { 0 };
        let is_first = if many == 0 { 0 } else { Translation::FIRST_ADDRESS };
        let translation = |address, shift, flags| Translation {
            address: any_address(address),
            shift,
            backends: 0,
            flags: many | flags,
            counter: leg.rule as u32,
            pool: 0,
        };
        // One port for many is stateful.
        let Becomes::Shifted(shift) = leg.becomes else { return [None; VARIANTS] };
        let forward = |flags| Some(translation(leg.backend, shift, flags));
        let [plain, asking] = self.forward_ports(leg).map(|ports| ports.is_some());
        let ask = Translation::ASK_SOCKETS;
        [
            Some(translation(*first, shift.inverse(), 0)),
            forward(is_first).filter(|_| plain),
            forward(is_first | ask).filter(|_| asking),
            forward(0).filter(|_| plain && many != 0),
            forward(ask).filter(|_| asking && many != 0),
        ]
    }

    /// What becomes of the packets of a stateful leg, by variant. The reply's is up to the flow; where
    /// there is none, `first` may be the address that answers.
    fn stateful_translations(&self, leg: &Leg, first: IpAddr) -> [Option<Translation>; VARIANTS] {
        let (shift, one_port) = match leg.becomes {
            Becomes::Shifted(shift) => (shift, 0),
            Becomes::One(port) => (Shift(port), Translation::ONE_PORT),
        };
        let masquerade = if leg.masquerade { Translation::MASQUERADE } else { 0 };
        let several = if leg.pool == 0 { 0 } else { Translation::SEVERAL };
        let (address, crosses) = match (leg.crosses(), leg.backend) {
            (true, IpAddr::V4(v4)) => (any_address(v4.to_ipv6_mapped().into()), Translation::CROSS),
            (crosses, backend) => {
                (any_address(backend), if crosses { Translation::CROSS } else { 0 })
            }
        };
        let to_backend = Translation {
            address,
            shift,
            backends: 0,
            flags: Translation::STATEFUL | masquerade | one_port | crosses,
            counter: leg.rule as u32,
            pool: 0,
        };
        let with = |flags| Translation { flags: to_backend.flags | flags, ..to_backend };
        let alone = match leg.state {
            State::AlsoAlone => Translation {
                address: any_address(first),
                shift: shift.inverse(),
                ..with(Translation::ALSO_ALONE)
            },
            _ if leg.crossed => with(Translation::CROSS),
            _ => to_backend,
        };
        let [plain, asking] = self.forward_ports(leg).map(|ports| ports.is_some());
        [
            Some(alone),
            Some(with(several)).filter(|_| leg.leads() && plain),
            Some(with(several | Translation::ASK_SOCKETS)).filter(|_| leg.leads() && asking),
            Some(to_backend).filter(|_| leg.pool != 0),
            None,
        ]
    }

    /// The ports on which a leg does not ask for sockets, and over these those on which it does.
    fn forward_ports(&self, leg: &Leg) -> [Option<(u16, u16)>; 2] {
        let claimed = (leg.ports.first(), leg.ports.last());
        let asking = asking_ports(leg.ports, self.ephemeral);
        [(asking != Some(claimed)).then_some(claimed), asking]
    }
}

/// The parts of tables that a change touches.
#[derive(Default)]
struct Touched {
    numbers: HashMap<Table, u32>,
    /// Each as it is live, with what is to be painted.
    tables: Vec<(Table, PortTable, Area)>,
}

impl Touched {
    fn table(&mut self, table: Table, area: Area, live: impl Fn(Table) -> PortTable) {
        let number = *self.numbers.entry(table).or_insert_with(|| {
            self.tables.push((table, live(table), area.clone()));
            self.tables.len() as u32 - 1
        });
        let (.., touched) = &mut self.tables[number as usize];
        let (first, last) = (touched.start().min(area.start()), touched.end().max(area.end()));
        *touched = *first..=*last;
    }

    /// All that a leg is painted on in this world.
    fn leg(&mut self, leg: &Leg, world: &World, live: impl Fn(Table) -> PortTable + Copy) {
        let addresses = world.listened(leg);
        for protocol in leg.protocols() {
            let highs = |(first, last): (u16, u16)| match protocol {
                OTHER => 0..=0,
                _ => first.to_be_bytes()[0]..=last.to_be_bytes()[0],
            };
            for address in addresses {
                let area = highs((leg.ports.first(), leg.ports.last()));
                self.table(((Direction::Forward, *address), protocol), area, live);
            }
            if !addresses.is_empty() {
                let table = ((Direction::Reply, leg.backend), protocol);
                self.table(table, highs(leg.backend_ports()), live);
            }
        }
    }
}

/// Ports of a table that a rule claims: what is painted over what was there.
struct Stroke {
    table: u32,
    /// First and last.
    ports: (u16, u16),
    row: u32,
    precedence: Precedence,
}

/// What these legs paint on the tables that are touched: by table, and there from broad to narrow, so
/// that the narrower rule has the last word on a port.
fn strokes<'a>(
    legs: impl Iterator<Item = &'a Placed>,
    world: &World,
    touched: &Touched,
) -> Vec<Stroke> {
    // Legs without an address meet the same few tables.
    let every = |addresses: &[IpAddr], protocol| -> Vec<(usize, u32)> {
        let table = |(place, address): (usize, &IpAddr)| {
            let table = touched.numbers.get(&((Direction::Forward, *address), protocol))?;
            Some((place, *table))
        };
        addresses.iter().enumerate().filter_map(table).collect()
    };
    let every =
        [&world.v4, &world.v6].map(|addresses| [TCP, UDP, OTHER].map(|it| every(addresses, it)));
    // Also of replies: what a backend sends from a port that nobody listens on is its own.
    let all_tcp = without(&[(0, u16::MAX)], world.masquerade);
    let all_udp = without(&ALL_BUT_DHCP, world.masquerade);
    let mut strokes = Vec::new();
    for Placed { leg, rows: [reply, first, first_asking, other, other_asking] } in legs {
        let [other, other_asking] =
            if leg.is_stateful() { [first, first_asking] } else { [other, other_asking] };
        if *reply == 0 {
            continue;
        }
        for protocol in leg.protocols() {
            let mut paint = |table: u32, ports: (u16, u16), row: u32| {
                let (.., area) = &touched.tables[table as usize];
                let pieces = match protocol {
                    OTHER => world.protocols.as_slice(),
                    UDP if ports == (0, u16::MAX) => &all_udp,
                    TCP if ports == (0, u16::MAX) => &all_tcp,
                    _ => std::slice::from_ref(&ports),
                };
                for ports in pieces {
                    let [first, last] = [ports.0, ports.1].map(|port| port.to_be_bytes()[0]);
                    if first <= *area.end() && *area.start() <= last {
                        let precedence = leg.precedence;
                        strokes.push(Stroke { table, ports: *ports, row, precedence });
                    }
                }
            };
            let [plain, asking] = world.forward_ports(leg);
            let mut forward = |place: usize, table: u32| {
                let rows = if place == 0 { [first, first_asking] } else { [other, other_asking] };
                for (ports, row) in [plain, asking].into_iter().zip(rows) {
                    if let (Some(ports), true) = (ports, leg.leads()) {
                        paint(table, ports, *row);
                    }
                }
            };
            match leg.listen {
                Some(address) => {
                    let table = touched.numbers.get(&((Direction::Forward, address), protocol));
                    table.into_iter().for_each(|table| forward(0, *table));
                }
                None => {
                    let [v4, v6] = &every;
                    let [tcp, udp, other] = if leg.backend.is_ipv4() { v4 } else { v6 };
                    let tables = match protocol {
                        TCP => tcp,
                        UDP => udp,
                        _ => other,
                    };
                    tables.iter().for_each(|(place, table)| forward(*place, *table));
                }
            }
            if let Some(table) = touched.numbers.get(&((Direction::Reply, leg.backend), protocol)) {
                paint(*table, leg.backend_ports(), *reply);
            }
        }
    }
    strokes.sort_by_key(|stroke| (stroke.table, Reverse(stroke.precedence)));
    strokes
}

/// The UDP ports of `*`. DHCPv4 and DHCPv6 clients (68, 546) read replies from raw sockets, which no
/// lookup finds: their ports are left alone.
const ALL_BUT_DHCP: [(u16, u16); 3] = [(0, 67), (69, 545), (547, u16::MAX)];

/// Protocols that are not among the others: TCP and UDP, which have tables of their own, IGMP, which
/// is about the box's own link, and the authentication header, whose sums are over the addresses.
const NEVER_CLAIMED: [u8; 4] = [TCP, UDP, 2, 51];

/// These ports without those of masquerade.
fn without(ports: &[(u16, u16)], masquerade: Option<(u16, u16)>) -> Vec<(u16, u16)> {
    let Some((from, to)) = masquerade else { return ports.to_vec() };
    let around = |(first, last): &(u16, u16)| {
        let below = from.checked_sub(1).map(|end| (*first, end.min(*last)));
        let above = to.checked_add(1).map(|start| (start.max(*first), *last));
        [below, above].into_iter().flatten().filter(|(first, last)| first <= last)
    };
    ports.iter().flat_map(around).collect()
}

/// The ports of a rule, first and last, that the box itself may use: there its sockets come first.
/// Nobody listens on a range for the box's sake, but its connections start from the ephemeral ports;
/// with `*` nobody meant the box's own services.
fn asking_ports(ports: Ports, ephemeral: (u16, u16)) -> Option<(u16, u16)> {
    let (first, last) = match ports {
        Ports::One(_) => return None,
        Ports::Range { first, last } => (first.max(ephemeral.0), last.min(ephemeral.1)),
        Ports::All => (ports.first(), ports.last()),
    };
    (first <= last).then_some((first, last))
}

pub(crate) fn any_address(address: IpAddr) -> AnyAddress {
    match address {
        IpAddr::V4(v4) => Address(v4.octets()).widen(),
        IpAddr::V6(v6) => Address(v6.octets()).widen(),
    }
}

/// Gives out numbers of rows, from 1, the lowest first: the table has an end.
#[derive(Default)]
struct Rows {
    free: BinaryHeap<Reverse<u32>>,
    last: u32,
}

impl Rows {
    fn take(&mut self) -> u32 {
        self.free.pop().map_or_else(
            || {
                self.last += 1;
                self.last
            },
            |Reverse(number)| number,
        )
    }
}

/// Names, numbered from 0 as they came: in one text, as there may be very many.
#[derive(Default)]
struct Names {
    text: String,
    /// By number.
    ends: Vec<u32>,
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Names {
    fn len(&self) -> u32 {
        self.ends.len() as u32
    }

    fn get(&self, number: usize) -> &str {
        let start = number.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        &self.text[start..self.ends[number] as usize]
    }

    fn find(&self, name: &str) -> Option<u32> {
        let same = |number: &u32| self.get(*number as usize) == name;
        self.numbers.find(self.hasher.hash_one(name), same).copied()
    }

    /// The number of a name, which may be new.
    fn number(&mut self, name: &str) -> usize {
        if let Some(number) = self.find(name) {
            return number as usize;
        }
        let number = self.ends.len();
        self.text.push_str(name);
        self.ends.push(self.text.len() as u32);
        let hash = self.hasher.hash_one(name);
        let mut numbers = std::mem::take(&mut self.numbers);
        numbers.insert_unique(hash, number as u32, |other| {
            self.hasher.hash_one(self.get(*other as usize))
        });
        self.numbers = numbers;
        number
    }
}

#[cfg(test)]
mod tests;
