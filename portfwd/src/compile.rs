//! From rules to tables. Pure: it asks nothing of the kernel.
//!
//! [`plan`] settles what each rule means once its names are resolved, and whether it can be
//! stateless. [`Compiler::compile`] turns a plan and the box's addresses into what to write.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use portfwd_ebpf::packet::{TCP, UDP};
use portfwd_ebpf::table::{
    Address, AnyAddress, Direction, Endpoint, EndpointKey, Page, Shift, Translation,
};

use crate::network::Externals;
use crate::rule::{Host, Ports, Precedence, Rule, narrower, shared_claim};

/// The addresses of a host: at most one of each family.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
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
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leg {
    /// The rule's place in the rules that were planned.
    pub rule: usize,
    /// The listened address; none for every external address.
    pub listen: Option<IpAddr>,
    pub ports: Ports,
    pub tcp: bool,
    pub udp: bool,
    pub backend: IpAddr,
    /// From the listened port to the backend's.
    pub shift: Shift,
    precedence: Precedence,
}

impl Leg {
    /// The backend's ports. A shifted range never wraps: both ends are ports.
    fn backend_ports(&self) -> (u16, u16) {
        let shifted = |port: u16| port.wrapping_add(self.shift.0);
        (shifted(self.ports.first()), shifted(self.ports.last()))
    }

    /// The IP protocols it forwards.
    fn protocols(&self) -> impl Iterator<Item = u8> {
        [(self.tcp, TCP), (self.udp, UDP)]
            .into_iter()
            .filter_map(|(has, number)| has.then_some(number))
    }
}

/// What the rules mean, each of them stateless.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    pub legs: Vec<Leg>,
}

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
/// A name without an address of the family that its rule listens on, and rules that would need the
/// flow table.
pub fn plan(rules: &[Rule], resolved: &Resolved) -> Result<Plan, Refused> {
    let mut refused = Vec::new();
    let mut legs = Vec::with_capacity(rules.len());
    for (number, rule) in rules.iter().enumerate() {
        for target in &rule.to {
            let host = match &target.host {
                Host::Address(address) => HostAddresses::one(*address),
                Host::Name(name) => resolved.get(name).copied().unwrap_or_default(),
            };
            let before = legs.len();
            for backend in host.iter() {
                if rule.listen.address.is_some_and(|listen| listen.is_ipv4() != backend.is_ipv4()) {
                    continue;
                }
                let first = target.ports.map_or(rule.listen.ports.first(), |ports| ports.first());
                legs.push(Leg {
                    rule: number,
                    listen: rule.listen.address,
                    ports: rule.listen.ports,
                    tcp: rule.protocol.tcp(),
                    udp: rule.protocol.udp(),
                    backend,
                    shift: Shift::between(rule.listen.ports.first(), first),
                    precedence: rule.precedence(),
                });
            }
            if legs.len() == before {
                refused.push(format!(
                    "{}: rule \"{}\": {} has no address{}; check the name, or write an address",
                    rule.place,
                    rule.name,
                    target.host,
                    match rule.listen.address {
                        Some(IpAddr::V4(_)) => " of IPv4, which the rule listens on",
                        Some(IpAddr::V6(_)) => " of IPv6, which the rule listens on",
                        None => "",
                    }
                ));
            }
        }
    }
    for (first, second, port) in ambiguous_replies(&legs) {
        let (a, b) = (&rules[legs[first].rule], &rules[legs[second].rule]);
        refused.push(format!(
            "{}: rule \"{}\" and rule \"{}\" ({}) both send to port {port} of {}: which of them a \
             reply belongs to needs the flow table, which this version does not have; give the \
             backend a second port or address",
            b.place, b.name, a.name, a.place, legs[first].backend
        ));
    }
    if refused.is_empty() { Ok(Plan { legs }) } else { Err(Refused(refused)) }
}

/// Pairs of legs whose replies come from one backend port but would have to leave differently, with
/// that port; for each leg the first pair only.
fn ambiguous_replies(legs: &[Leg]) -> Vec<(usize, usize, u16)> {
    let mut sources: BTreeMap<(IpAddr, u8), Vec<usize>> = BTreeMap::new();
    for (number, leg) in legs.iter().enumerate() {
        for protocol in leg.protocols() {
            sources.entry((leg.backend, protocol)).or_default().push(number);
        }
    }
    let mut found = BTreeMap::new();
    for mut numbers in sources.into_values() {
        numbers.sort_by_key(|number| legs[*number].backend_ports());
        // Rules that agree may overlap only where one is narrower than the other, so few are open.
        let mut open: Vec<usize> = Vec::new();
        for number in numbers {
            let leg = &legs[number];
            let (first, _) = leg.backend_ports();
            open.retain(|other| legs[*other].backend_ports().1 >= first);
            let clash = open.iter().find(|other| {
                let other = &legs[**other];
                (other.listen, other.shift) != (leg.listen, leg.shift)
            });
            match clash {
                Some(other) => {
                    let pair = (number.min(*other), number.max(*other));
                    found.entry(pair).or_insert(first);
                }
                None => open.push(number),
            }
        }
    }
    found.into_iter().map(|((a, b), port)| (a, b, port)).collect()
}

/// What each of `rules` means and why it is stateless, for people.
pub fn explain(rules: &[Rule], plan: &Plan) -> Vec<String> {
    let mut legs = plan.legs.as_slice();
    let narrower = narrower(rules);
    let explained = narrower.iter().enumerate().map(|(number, narrower)| {
        // Legs are in the order of their rules.
        let (own, rest) = legs.split_at(legs.partition_point(|leg| leg.rule == number));
        legs = rest;
        explain_one(rules, own, &rules[number], narrower)
    });
    explained.collect()
}

fn explain_one(rules: &[Rule], legs: &[Leg], rule: &Rule, narrower: &BTreeSet<usize>) -> String {
    let mut lines = Vec::new();
    for leg in legs {
        let (first, last) = leg.backend_ports();
        let ports = match rule.listen.ports {
            Ports::All => "the same port".to_owned(),
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
    lines.push(
        "stateless: one backend, and no other rule answers differently from its ports".to_owned(),
    );
    lines.join("\n")
}

/// What to write so that the kernel's tables hold a plan.
#[derive(Clone, PartialEq, Debug)]
pub struct Update {
    /// New rows, at numbers that no live row refers to.
    pub translations: Vec<(u32, Translation)>,
    /// New pages, at numbers that no live row refers to.
    pub pages: Vec<(u32, Page)>,
    /// All endpoints of the new generation.
    pub v4: Vec<(EndpointKey<4>, Endpoint)>,
    /// All endpoints of the new generation.
    pub v6: Vec<(EndpointKey<16>, Endpoint)>,
    /// What makes the endpoints live.
    pub generation: u8,
}

/// How many rows the tables hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    pub endpoints: u32,
    pub translations: u32,
    pub pages: u32,
    pub counters: u32,
}

impl Capacity {
    /// Enough for `plan` of `rules` with any number of external addresses, of either family where a
    /// name may have both, and with room for as much again: while a change is written the old rows
    /// and the new ones are there.
    pub fn for_plan(rules: &[Rule], plan: &Plan, ephemeral: &RangeInclusive<u16>) -> Self {
        // From two on, further addresses share the rows and pages of the second.
        let externals = Externals {
            v4: vec![Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST],
            v6: vec![Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED],
        };
        let update = Compiler::default().compile(rules, plan, &externals, ephemeral);
        let is_name = |rule: &Rule| rule.to.iter().any(|to| matches!(to.host, Host::Name(_)));
        let families = if rules.iter().any(is_name) { 2 } else { 1 };
        let room = |rows: usize| (2 * families * rows) as u32 + 256;
        Self {
            endpoints: room(update.v4.len().max(update.v6.len())),
            translations: room(update.translations.len()),
            pages: room(update.pages.len()),
            counters: rules.len().max(1) as u32,
        }
    }

    /// Whether `update` fits.
    pub fn holds(&self, update: &Update) -> bool {
        update.v4.len().max(update.v6.len()) as u32 <= self.endpoints / 2
            && update.translations.iter().all(|(number, _)| *number < self.translations)
            && update.pages.iter().all(|(number, _)| *number < self.pages)
    }
}

/// Keeps what is loaded, so that what does not change keeps its numbers.
#[derive(Default)]
pub struct Compiler {
    translations: Interner<Translation>,
    pages: Interner<Page>,
    counters: BTreeMap<String, u32>,
    generation: u8,
}

impl Compiler {
    /// The counter of a rule's name.
    pub fn counter(&self, name: &str) -> Option<u32> {
        self.counters.get(name).copied()
    }

    /// Works out what to write for `plan` of `rules`. Nothing is live until it is written and
    /// [`commit`](Self::commit) said so; what is not committed is forgotten by the next call.
    ///
    /// Ranges ask for the box's own sockets on the `ephemeral` ports, `*` on all.
    pub fn compile(
        &mut self,
        rules: &[Rule],
        plan: &Plan,
        externals: &Externals,
        ephemeral: &RangeInclusive<u16>,
    ) -> Update {
        self.translations.begin();
        self.pages.begin();
        // A name keeps its counter, also while no rule has it.
        for rule in rules {
            let next = self.counters.len() as u32;
            self.counters.entry(rule.name.clone()).or_insert(next);
        }

        // From broad to narrow, so that the narrower rule has the last word on a port.
        let mut legs: Vec<&Leg> = plan.legs.iter().collect();
        legs.sort_by_key(|leg| std::cmp::Reverse(leg.precedence));
        let mut painted: BTreeMap<(IpAddr, Direction), Painted> = BTreeMap::new();
        for leg in legs {
            let counter = self.counters[&rules[leg.rule].name];
            let addresses = match leg.listen {
                Some(address) => vec![address],
                None => of_family(externals, leg.backend),
            };
            let Some(first) = addresses.first() else { continue };
            let many = if addresses.len() > 1 { Translation::MANY_ADDRESSES } else { 0 };
            let claimed = (leg.ports.first(), leg.ports.last());
            let asking = asking_ports(leg.ports, ephemeral);

            for (place, address) in addresses.iter().enumerate() {
                let is_first = if many != 0 && place == 0 { Translation::FIRST_ADDRESS } else { 0 };
                let mut row = |ask| {
                    self.translations.number(&Translation {
                        address: any_address(leg.backend),
                        shift: leg.shift,
                        padding: [0; 2],
                        flags: many | is_first | ask,
                        counter,
                    })
                };
                let endpoint = painted.entry((*address, Direction::Forward)).or_default();
                if asking != Some(claimed) {
                    endpoint.paint(leg, claimed, row(0));
                }
                if let Some(asking) = asking {
                    endpoint.paint(leg, asking, row(Translation::ASK_SOCKETS));
                }
            }
            let row = self.translations.number(&Translation {
                address: any_address(*first),
                shift: leg.shift.inverse(),
                padding: [0; 2],
                flags: many,
                counter,
            });
            let endpoint = painted.entry((leg.backend, Direction::Reply)).or_default();
            endpoint.paint(leg, leg.backend_ports(), row);
        }

        // Two generations suffice: the live one and the next.
        let generation = self.generation ^ 1;
        let mut update = Update {
            translations: Vec::new(),
            pages: Vec::new(),
            v4: Vec::new(),
            v6: Vec::new(),
            generation,
        };
        for ((address, direction), painted) in painted {
            let endpoint = Endpoint {
                tcp: painted.tcp.intern(&mut self.pages),
                udp: painted.udp.intern(&mut self.pages),
            };
            match address {
                IpAddr::V4(v4) => {
                    update.v4.push((endpoint_key(v4.octets(), direction, generation), endpoint))
                }
                IpAddr::V6(v6) => {
                    update.v6.push((endpoint_key(v6.octets(), direction, generation), endpoint))
                }
            }
        }
        update.translations = self.translations.take_fresh();
        update.pages = self.pages.take_fresh();
        update
    }

    /// What the last [`compile`](Self::compile) returned is live now.
    pub fn commit(&mut self) {
        self.translations.commit();
        self.pages.commit();
        self.generation ^= 1;
    }
}

/// The external addresses of the family of `like`.
fn of_family(externals: &Externals, like: IpAddr) -> Vec<IpAddr> {
    match like {
        IpAddr::V4(_) => externals.v4.iter().copied().map(IpAddr::V4).collect(),
        IpAddr::V6(_) => externals.v6.iter().copied().map(IpAddr::V6).collect(),
    }
}

/// The UDP ports of `*`. DHCPv4 and DHCPv6 clients (68, 546) read replies from raw sockets, which no
/// lookup finds: their ports are left alone.
const ALL_BUT_DHCP: [(u16, u16); 3] = [(0, 67), (69, 545), (547, u16::MAX)];

/// The ports of a rule, first and last, that the box itself may use: there its sockets come first.
/// Nobody listens on a range for the box's sake, but its connections start from the ephemeral ports;
/// with `*` nobody meant the box's own services.
fn asking_ports(ports: Ports, ephemeral: &RangeInclusive<u16>) -> Option<(u16, u16)> {
    let (first, last) = match ports {
        Ports::One(_) => return None,
        Ports::Range { first, last } => (first.max(*ephemeral.start()), last.min(*ephemeral.end())),
        Ports::All => (ports.first(), ports.last()),
    };
    (first <= last).then_some((first, last))
}

fn any_address(address: IpAddr) -> AnyAddress {
    match address {
        IpAddr::V4(v4) => Address(v4.octets()).widen(),
        IpAddr::V6(v6) => Address(v6.octets()).widen(),
    }
}

fn endpoint_key<const N: usize>(
    address: [u8; N],
    direction: Direction,
    generation: u8,
) -> EndpointKey<N> {
    EndpointKey::new(Address(address), direction, generation)
}

/// The ports of an endpoint while rules are painted on it, one over the other.
#[derive(Default)]
struct Painted {
    tcp: PaintedPorts,
    udp: PaintedPorts,
}

impl Painted {
    /// Gives `ports` to `row` in the protocols of `leg`.
    fn paint(&mut self, leg: &Leg, ports: (u16, u16), row: u32) {
        if leg.tcp {
            self.tcp.paint(ports, row);
        }
        if leg.udp && leg.ports == Ports::All {
            ALL_BUT_DHCP.iter().for_each(|ports| self.udp.paint(*ports, row));
        } else if leg.udp {
            self.udp.paint(ports, row);
        }
    }
}

/// Ports of one protocol: pages by the port's high byte.
#[derive(Default)]
struct PaintedPorts(BTreeMap<u8, Page>);

impl PaintedPorts {
    fn paint(&mut self, (first, last): (u16, u16), row: u32) {
        let [first_high, first_low] = first.to_be_bytes();
        let [last_high, last_low] = last.to_be_bytes();
        for high in first_high..=last_high {
            let from = if high == first_high { first_low } else { 0 };
            let to = if high == last_high { last_low } else { u8::MAX };
            let page = self.0.entry(high).or_insert(Page([0; 256]));
            page.0[usize::from(from)..=usize::from(to)].fill(row);
        }
    }

    fn intern(&self, pages: &mut Interner<Page>) -> [u32; 256] {
        let mut numbers = [0; 256];
        for (high, page) in &self.0 {
            numbers[usize::from(*high)] = pages.number(page);
        }
        numbers
    }
}

/// Gives equal values one number, from 1. A number whose value is neither live nor wanted any more
/// is given again.
struct Interner<T> {
    entries: HashMap<T, Entry>,
    fresh: Vec<(u32, T)>,
    free: Vec<u32>,
    next: u32,
    round: u64,
    live: u64,
}

/// A number, and the last rounds in which it was live and wanted.
struct Entry {
    number: u32,
    live: u64,
    wanted: u64,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            fresh: Vec::new(),
            free: Vec::new(),
            next: 1,
            round: 0,
            live: 0,
        }
    }
}

impl<T: Copy + Eq + Hash> Interner<T> {
    /// Starts a round. What the live round does not use is free from here on.
    fn begin(&mut self) {
        let Self { entries, fresh, free, next: _, round, live } = self;
        *round += 1;
        fresh.clear();
        entries.retain(|_, entry| {
            let keep = entry.live == *live;
            if !keep {
                free.push(entry.number);
            }
            keep
        });
    }

    /// The number of `value` in this round.
    fn number(&mut self, value: &T) -> u32 {
        if let Some(entry) = self.entries.get_mut(value) {
            entry.wanted = self.round;
            return entry.number;
        }
        let number = self.free.pop().unwrap_or_else(|| {
            let next = self.next;
            self.next += 1;
            next
        });
        let entry = Entry { number, live: u64::MAX, wanted: self.round };
        self.entries.insert(*value, entry);
        self.fresh.push((number, *value));
        number
    }

    /// The values that are new in this round.
    fn take_fresh(&mut self) -> Vec<(u32, T)> {
        std::mem::take(&mut self.fresh)
    }

    /// This round is live.
    fn commit(&mut self) {
        self.live = self.round;
        for entry in self.entries.values_mut() {
            if entry.wanted == self.round {
                entry.live = self.round;
            }
        }
    }
}

#[cfg(test)]
mod tests;
