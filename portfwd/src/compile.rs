//! From rules to tables. Pure: it asks nothing of the kernel.
//!
//! [`plan`] settles what each rule means once its names are resolved, and whether it can be
//! stateless. [`Compiler::compile`] turns a plan and the box's addresses into what to write.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;
use std::hash::BuildHasher as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use portfwd_ebpf::packet::{TCP, UDP};
use portfwd_ebpf::table::{
    Address, AnyAddress, Claims, Direction, Endpoint, Ports as PortTable, Shift, Translation,
};

use self::numbered::Numbered;
use self::pages::{Area, Canvas, EVERYWHERE, Pages, Runs, area};
use crate::network::Externals;
use crate::rule::{Host, Ports, Precedence, Rule, narrower, shared_claim};

mod numbered;
mod pages;

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
    pub shift: Shift,
    precedence: Precedence,
}

impl Leg {
    /// The backend's ports. A shifted range never wraps: both ends are ports.
    fn backend_ports(&self) -> (u16, u16) {
        let shifted = |port: u16| port.wrapping_add(self.shift.0);
        (shifted(self.ports.first()), shifted(self.ports.last()))
    }

    /// The IP protocols that it forwards, [`OTHER`] among them.
    fn protocols(&self) -> impl Iterator<Item = u8> {
        [(self.tcp, TCP), (self.udp, UDP), (self.other, OTHER)]
            .into_iter()
            .filter_map(|(has, number)| has.then_some(number))
    }

    /// The first backend port whose replies this leg and another would have to answer differently.
    fn clash(&self, other: &Self) -> Option<u16> {
        let shares = self.tcp && other.tcp || self.udp && other.udp || self.other && other.other;
        if self.backend != other.backend
            || !shares
            || (self.listen, self.shift) == (other.listen, other.shift)
        {
            return None;
        }
        let ((first, last), (from, to)) = (self.backend_ports(), other.backend_ports());
        (first <= to && from <= last).then_some(first.max(from))
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
    let mut legs = Vec::with_capacity(room(rules.len()));
    for (number, rule) in rules.iter().enumerate() {
        refused.extend(add_legs(&mut legs, number, rule, resolved));
    }
    for (first, second, port) in ambiguous_replies(&legs) {
        refused.push(ambiguity(rules, &legs[first], &legs[second], port));
    }
    if refused.is_empty() { Ok(Plan { legs }) } else { Err(Refused(refused)) }
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
        let mut legs = Vec::new();
        let mut refused = add_legs(&mut legs, planned.len(), rule, resolved);
        for leg in &legs {
            let clash = |other: &Leg| other.clash(leg).map(|port| (*other, port));
            if let Some((other, port)) = self.legs.iter().find_map(clash) {
                refused.push(ambiguity(rules, &other, leg, port));
            }
        }
        if !refused.is_empty() {
            return Err(Refused(refused));
        }
        self.legs.extend(legs);
        Ok(())
    }

    /// Takes out the rule with this number. Those behind it move up.
    pub fn remove(&mut self, rule: usize) {
        self.legs.retain(|leg| leg.rule != rule);
        for leg in self.legs.iter_mut().filter(|leg| leg.rule > rule) {
            leg.rule -= 1;
        }
    }
}

/// The legs of a rule; why not, if one of its backends has none.
fn add_legs(legs: &mut Vec<Leg>, number: usize, rule: &Rule, resolved: &Resolved) -> Vec<String> {
    let mut refused = Vec::new();
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
                other: rule.protocol.other(),
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
    refused
}

fn ambiguity(rules: &[Rule], first: &Leg, second: &Leg, port: u16) -> String {
    let (a, b) = (&rules[first.rule], &rules[second.rule]);
    format!(
        "{}: rule \"{}\" and rule \"{}\" ({}) both send to port {port} of {}: which of them a \
         reply belongs to needs the flow table, which this version does not have; give the \
         backend a second port or address",
        b.place, b.name, a.name, a.place, first.backend
    )
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
            let clash = open.iter().find(|other| legs[**other].clash(leg).is_some());
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
            counters: (rules.len() + rules.len() / 4) as u32 + 256,
        }
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
            && update.translations.iter().all(|(number, _)| *number < self.translations)
            && update.pages.iter().all(|(number, _)| *number < self.pages)
            && update.counters <= self.counters
    }
}

/// Keeps what is loaded, so that a change writes what it changes and nothing else.
#[derive(Default)]
pub struct Compiler {
    /// The names of rules, numbered as their counters are.
    names: Names,
    rows: Rows,
    pages: Pages,
    /// What is live.
    legs: Vec<Placed>,
    world: World,
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
    /// Tables as they were painted.
    tables: Vec<(Table, PortTable)>,
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
    /// Ranges ask for the box's own sockets on the `ephemeral` ports, `*` on all.
    ///
    /// Every leg is compared with what is live, in about 50 ns; all other work grows with the
    /// difference.
    pub fn compile(
        &mut self,
        rules: &[Rule],
        plan: &Plan,
        externals: &Externals,
        ephemeral: &RangeInclusive<u16>,
    ) -> Update {
        self.forget();
        let world = World::new(externals, ephemeral, &self.own);
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
        let mut update = self.update();
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
        let Self { names, rows, legs: live, world: before, endpoints, .. } = self;
        let live_table = |(key, protocol): Table| {
            let number = endpoints.find(&key);
            number.map_or(PortTable::NONE, |number| {
                *table_of(&mut endpoints[number].claims.clone(), protocol)
            })
        };
        let stays = before.stays(&world);
        let same = |placed: &Placed, leg: &Leg| {
            placed.leg == Leg { rule: placed.leg.rule, ..*leg }
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
        let (mut added, mut translations) = (Vec::new(), Vec::new());
        for leg in wanted {
            let leg = Leg { rule: names.number(&rules[leg.rule].name), ..*leg };
            if let Some(place) = there.remove(&leg) {
                remains[place] = true;
                between.push(live[place]);
                continue;
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
        (Pending { front, back, between, world, added, dropped, tables }, translations)
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
            counters: self.names.len(),
        }
    }

    /// `update`, which the last [`compile`](Self::compile) returned, is live now.
    pub fn commit(&mut self, update: &Update) {
        let Some(pending) = self.pending.take() else { return };
        let Pending { front, back, between, world, dropped, tables, .. } = pending;
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
        self.rows.free.extend(pending.added.into_iter().map(Reverse));
    }
}

/// What rules mean depends on.
#[derive(Default)]
struct World {
    /// External addresses.
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// First and last.
    ephemeral: (u16, u16),
    /// Protocols other than TCP and UDP that rules may claim, as the ports of [`OTHER`].
    protocols: Vec<(u16, u16)>,
}

/// A leg has at most so many translations: the reply's, then for its first address and for the
/// others each one that does not ask for sockets and one that does.
const VARIANTS: usize = 5;

impl World {
    fn new(externals: &Externals, ephemeral: &RangeInclusive<u16>, own: &BTreeSet<u8>) -> Self {
        let claimed: Vec<u16> = (0..OTHER)
            .filter(|number| !NEVER_CLAIMED.contains(number) && !own.contains(number))
            .map(u16::from)
            .collect();
        let pieces = claimed.chunk_by(|one, next| one + 1 == *next);
        Self {
            v4: externals.v4.iter().copied().map(IpAddr::V4).collect(),
            v6: externals.v6.iter().copied().map(IpAddr::V6).collect(),
            ephemeral: (*ephemeral.start(), *ephemeral.end()),
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
        let protocols = self.protocols == other.protocols;
        move |leg| {
            let family = if leg.backend.is_ipv4() { v4 } else { v6 };
            (leg.listen.is_some() || family)
                && (ranges || !matches!(leg.ports, Ports::Range { .. }))
                && (protocols || !leg.other)
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
        let many = if addresses.len() > 1 { Translation::MANY_ADDRESSES } else { 0 };
        let is_first = if many == 0 { 0 } else { Translation::FIRST_ADDRESS };
        let translation = |address, shift, flags| Translation {
            address: any_address(address),
            shift,
            padding: [0; 2],
            flags: many | flags,
            counter: leg.rule as u32,
            padding_2: 0,
        };
        let forward = |flags| Some(translation(leg.backend, leg.shift, flags));
        let [plain, asking] = self.forward_ports(leg).map(|ports| ports.is_some());
        let ask = Translation::ASK_SOCKETS;
        [
            Some(translation(*first, leg.shift.inverse(), 0)),
            forward(is_first).filter(|_| plain),
            forward(is_first | ask).filter(|_| asking),
            forward(0).filter(|_| plain && many != 0),
            forward(ask).filter(|_| asking && many != 0),
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
    let mut strokes = Vec::new();
    for Placed { leg, rows: [reply, first, first_asking, other, other_asking] } in legs {
        if *reply == 0 {
            continue;
        }
        for protocol in leg.protocols() {
            let mut paint = |table: u32, ports: (u16, u16), row: u32| {
                let (.., area) = &touched.tables[table as usize];
                let pieces = match protocol {
                    OTHER => world.protocols.as_slice(),
                    UDP if leg.ports == Ports::All => &ALL_BUT_DHCP,
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
                    if let Some(ports) = ports {
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

fn any_address(address: IpAddr) -> AnyAddress {
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
