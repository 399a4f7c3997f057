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
    Address, AnyAddress, Claims, Direction, Endpoint, Page, Ports as PortTable, Shift, Translation,
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

/// What leads to an endpoint: an address, among those listened on (forward) or those of backends
/// (reply).
pub type EndpointKey = (Direction, IpAddr);

/// What to write so that the kernel's tables hold a plan.
#[derive(Clone, PartialEq, Debug)]
pub struct Update {
    /// New rows, at numbers that no live row refers to.
    pub translations: Vec<(u32, Translation)>,
    /// New pages, at numbers that no live row refers to.
    pub pages: Vec<(u32, Page)>,
    /// Rows of the endpoints whose next generation differs from what they hold.
    pub endpoints: Vec<(u32, Endpoint)>,
    /// Addresses that lead to those rows and did not before.
    pub new: Vec<(EndpointKey, u32)>,
    /// Addresses whose rows claim nothing, neither in the generation before nor in the next. Their
    /// numbers are used again by a later update.
    pub gone: Vec<EndpointKey>,
    /// What makes the endpoints' next generation live.
    pub generation: u32,
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
            endpoints: room(update.endpoints.len()),
            translations: room(update.translations.len()),
            pages: room(update.pages.len()),
            counters: rules.len().max(1) as u32,
        }
    }

    /// Whether `update` fits.
    pub fn holds(&self, update: &Update) -> bool {
        update.endpoints.iter().all(|(number, _)| *number < self.endpoints)
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
    endpoints: HashMap<EndpointKey, EndpointRow>,
    /// Numbers of rows to which no address leads.
    free_endpoints: Vec<u32>,
    generation: u32,
}

/// A row of the endpoints.
struct EndpointRow {
    number: u32,
    /// What the kernel has, but for the next generation unless it is `written`.
    endpoint: Endpoint,
    written: bool,
    /// The kernel has the address.
    known: bool,
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
            if !self.counters.contains_key(&rule.name) {
                let next = self.counters.len() as u32;
                self.counters.insert(rule.name.clone(), next);
            }
        }
        let strokes = self.strokes(rules, plan, externals, ephemeral);
        let mut canvas = Canvas::default();
        let mut wanted = HashMap::new();
        for strokes in strokes.chunk_by(|a, b| a.endpoint == b.endpoint) {
            let claims = canvas.paint(strokes, &mut self.pages);
            wanted.insert(strokes[0].endpoint, claims);
        }
        self.update(wanted)
    }

    /// Every leg as strokes on its endpoints: by endpoint, and there from broad to narrow, so that
    /// the narrower rule has the last word on a port.
    fn strokes(
        &mut self,
        rules: &[Rule],
        plan: &Plan,
        externals: &Externals,
        ephemeral: &RangeInclusive<u16>,
    ) -> Vec<Stroke> {
        let mut legs: Vec<&Leg> = plan.legs.iter().collect();
        legs.sort_by_key(|leg| std::cmp::Reverse(leg.precedence));
        let mut strokes = Vec::with_capacity(2 * legs.len());
        for leg in legs {
            let counter = self.counters[&rules[leg.rule].name];
            let every;
            let addresses = match &leg.listen {
                Some(address) => std::slice::from_ref(address),
                None => {
                    every = of_family(externals, leg.backend);
                    &every
                }
            };
            let Some(first) = addresses.first() else { continue };
            let many = if addresses.len() > 1 { Translation::MANY_ADDRESSES } else { 0 };
            let claimed = (leg.ports.first(), leg.ports.last());
            let asking = asking_ports(leg.ports, ephemeral);
            let mut stroke = |endpoint, ports, row| {
                strokes.push(Stroke {
                    endpoint,
                    ports,
                    row,
                    tcp: leg.tcp,
                    udp: leg.udp,
                    all: leg.ports == Ports::All,
                });
            };

            for (place, address) in addresses.iter().enumerate() {
                let is_first = if many != 0 && place == 0 { Translation::FIRST_ADDRESS } else { 0 };
                let mut row = |ask| {
                    self.translations.number(&Translation {
                        address: any_address(leg.backend),
                        shift: leg.shift,
                        padding: [0; 2],
                        flags: many | is_first | ask,
                        counter,
                        padding_2: 0,
                    })
                };
                let endpoint = (Direction::Forward, *address);
                if asking != Some(claimed) {
                    stroke(endpoint, claimed, row(0));
                }
                if let Some(asking) = asking {
                    stroke(endpoint, asking, row(Translation::ASK_SOCKETS));
                }
            }
            let row = self.translations.number(&Translation {
                address: any_address(*first),
                shift: leg.shift.inverse(),
                padding: [0; 2],
                flags: many,
                counter,
                padding_2: 0,
            });
            stroke((Direction::Reply, leg.backend), leg.backend_ports(), row);
        }
        strokes.sort_by_key(|stroke| stroke.endpoint);
        strokes
    }

    /// What differs between what the kernel has and these claims in the next of the two generations.
    fn update(&mut self, mut wanted: HashMap<EndpointKey, Claims>) -> Update {
        let live = self.generation as usize;
        let next = live ^ 1;
        let (mut endpoints, mut new, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for key in wanted.keys() {
            let rows = self.endpoints.len();
            self.endpoints.entry(*key).or_insert_with(|| EndpointRow {
                number: self.free_endpoints.pop().unwrap_or(rows as u32),
                endpoint: Endpoint::default(),
                written: false,
                known: false,
            });
        }
        for (key, row) in &mut self.endpoints {
            let claims = wanted.remove(key);
            if claims.is_none() && row.endpoint.generations[live] == Claims::default() {
                gone.push(*key);
            }
            let claims = claims.unwrap_or_default();
            if row.endpoint.generations[next] != claims || !row.written {
                row.endpoint.generations[next] = claims;
                row.written = false;
                endpoints.push((row.number, row.endpoint));
            }
            if !row.known {
                new.push((*key, row.number));
            }
        }
        Update {
            translations: self.translations.take_fresh(),
            pages: self.pages.take_fresh(),
            endpoints,
            new,
            gone,
            generation: next as u32,
        }
    }

    /// `update`, which the last [`compile`](Self::compile) returned, is live now.
    pub fn commit(&mut self, update: &Update) {
        self.translations.commit();
        self.pages.commit();
        for row in self.endpoints.values_mut() {
            row.written = true;
            row.known = true;
        }
        for key in &update.gone {
            let row = self.endpoints.remove(key);
            self.free_endpoints.extend(row.map(|row| row.number));
        }
        self.generation = update.generation;
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

/// Ports of an endpoint that a rule claims: what is painted over what was there.
#[derive(Clone, Copy, Debug)]
struct Stroke {
    endpoint: EndpointKey,
    /// First and last.
    ports: (u16, u16),
    row: u32,
    tcp: bool,
    udp: bool,
    /// Of `*`.
    all: bool,
}

/// The 65,536 ports of one protocol at one endpoint, while rules are painted on them.
struct Canvas {
    rows: Vec<Page>,
}

impl Default for Canvas {
    fn default() -> Self {
        Self { rows: vec![Page([0; 256]); 256] }
    }
}

impl Canvas {
    /// The claims of an endpoint.
    fn paint(&mut self, strokes: &[Stroke], pages: &mut Interner<Page>) -> Claims {
        let tcp = strokes.iter().filter(|stroke| stroke.tcp).map(|it| (it.ports, it.row));
        let udp = strokes.iter().filter(|stroke| stroke.udp).flat_map(|it| {
            let all_but_dhcp: &[(u16, u16)] = if it.all { &ALL_BUT_DHCP } else { &[] };
            let ports = if it.all { all_but_dhcp } else { std::slice::from_ref(&it.ports) };
            ports.iter().map(|ports| (*ports, it.row))
        });
        Claims { tcp: self.ports(tcp, pages), udp: self.ports(udp, pages) }
    }

    /// The ports of one protocol.
    fn ports(
        &mut self,
        mut strokes: impl Iterator<Item = ((u16, u16), u32)>,
        pages: &mut Interner<Page>,
    ) -> PortTable {
        let Some(((first, last), row)) = strokes.next() else { return PortTable::NONE };
        let Some(second) = strokes.next() else { return PortTable::range(first, last, row) };
        let mut touched = [false; 256];
        for ((first, last), row) in [((first, last), row), second].into_iter().chain(strokes) {
            let [first_high, first_low] = first.to_be_bytes();
            let [last_high, last_low] = last.to_be_bytes();
            for high in first_high..=last_high {
                let from = if high == first_high { first_low } else { 0 };
                let to = if high == last_high { last_low } else { u8::MAX };
                touched[usize::from(high)] = true;
                self.rows[usize::from(high)].0[usize::from(from)..=usize::from(to)].fill(row);
            }
        }
        let mut root = Page([0; 256]);
        for (high, _) in touched.iter().enumerate().filter(|(_, touched)| **touched) {
            root.0[high] = pages.number(&self.rows[high]);
            self.rows[high] = Page([0; 256]);
        }
        PortTable::paged(pages.number(&root))
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
