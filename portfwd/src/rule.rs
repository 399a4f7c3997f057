//! Rules as the user writes them: what to listen on, where to send, and whether that makes sense.
//!
//! Everything here is text and numbers in host byte order. Nothing here asks the system anything.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;

pub(crate) use self::values::invalid;
pub use self::values::{Host, Invalid, Listen, Mss, Ports, Protocol, Source, Target};

#[cfg(test)]
mod tests;
mod values;

/// Where something was written, for messages.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Place {
    /// Lines count from 1.
    File { path: Arc<Path>, line: usize },
    /// The flag and its value, `-p 80:10.0.0.1`.
    Flag(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, line } => write!(f, "{}:{line}", path.display()),
            Place::Flag(flag) => f.write_str(flag),
        }
    }
}

/// One forwarding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rule {
    pub name: String,
    pub protocol: Protocol,
    pub listen: Listen,
    /// At least one.
    pub to: Arc<[Target]>,
    pub source: Source,
    pub mss: Mss,
    #[serde(skip)]
    pub place: Place,
}

/// How narrow a rule is. The smaller one wins where rules overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Precedence {
    every_address: bool,
    width: Width,
    any_protocol: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Width {
    One,
    Range,
    All,
}

/// One thing that makes a rule impossible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The key of the file that is to blame.
    pub key: &'static str,
    /// Which of its values, if one of a list is.
    pub item: Option<usize>,
    pub error: Invalid,
}

/// How many backends a rule may have.
const MOST_BACKENDS: usize = 256;

impl Rule {
    /// The name of a rule that was given none: `8080/tcp`. One without an address whose backends have
    /// IPv6 alone ends in 6, `8080/tcp6`, as it goes beside the other.
    pub fn default_name(listen: Listen, protocol: Protocol, to: &[Target]) -> String {
        let only_v6 = !to.is_empty() && to.iter().all(|target| !target.host.may_be(false));
        let suffix = if listen.address.is_none() && only_v6 { "6" } else { "" };
        format!("{listen}/{protocol}{suffix}")
    }

    /// Whether another says the same, wherever it is written.
    pub fn same(&self, other: &Rule) -> bool {
        let Rule { name, protocol, listen, to, source, mss, place: _ } = other;
        (&self.name, self.protocol, self.listen, &self.to) == (name, *protocol, *listen, to)
            && (self.source, self.mss) == (*source, *mss)
    }

    /// Whether this rule and another claim packets of one address family. Without an address to
    /// listen on, the backends' families count; a name may have both.
    pub(crate) fn shares_family(&self, other: &Rule) -> bool {
        self.families().any(|family| other.families().any(|others| family == others))
    }

    /// Whether it claims IPv6 packets: false, true, or both.
    fn families(&self) -> impl Iterator<Item = bool> {
        let claims = |is_v6: &bool| match self.listen.address {
            Some(address) => address.is_ipv6() == *is_v6,
            None => self.to.iter().any(|target| target.host.may_be(*is_v6)),
        };
        [false, true].into_iter().filter(claims)
    }

    /// Whether its packets may have to change their address family.
    pub(crate) fn may_cross(&self) -> bool {
        let other =
            |listen: IpAddr| self.to.iter().any(|target| target.host.may_be(listen.is_ipv4()));
        self.source == Source::Masquerade && self.listen.address.is_some_and(other)
    }

    /// How narrow the rule is.
    pub fn precedence(&self) -> Precedence {
        Precedence {
            every_address: self.listen.address.is_none(),
            width: match self.listen.ports {
                Ports::One(_) => Width::One,
                Ports::Range { .. } => Width::Range,
                Ports::All => Width::All,
            },
            any_protocol: self.protocol == Protocol::Any,
        }
    }

    /// What makes the rule impossible.
    ///
    /// Looks at this rule alone; [`overlaps`] compares rules.
    pub fn check(&self) -> Vec<Mistake> {
        let mut found = Vec::new();
        let mut blame = |key, item, error| found.push(Mistake { key, item, error });
        if let Err(error) = check_name(&self.name) {
            blame("name", None, error);
        }
        if self.protocol == Protocol::Any && self.listen.ports != Ports::All {
            let message = format!(
                "protocol any claims every port and cannot listen on {} only; use protocol \
                 tcp+udp, or listen on *",
                self.listen.ports
            );
            blame("listen", None, Invalid(message));
        }
        match self.to.len() {
            0 => {
                let message = "the backend is missing; write its address or name".to_owned();
                blame("to", None, Invalid(message));
            }
            1..=MOST_BACKENDS => {}
            many => {
                let message = format!(
                    "{many} backends are too many; keep {MOST_BACKENDS} of them, or divide the \
                     ports among several rules"
                );
                blame("to", None, Invalid(message));
            }
        }
        if self.mss != Mss::Auto && !self.protocol.tcp() {
            let message =
                format!("protocol {} has no segments; leave this out, or use tcp", self.protocol);
            blame("mss", None, Invalid(message));
        }
        let mut known = HashSet::new();
        for (item, target) in self.to.iter().enumerate() {
            if !known.insert((&target.host, target.ports.unwrap_or(self.listen.ports))) {
                blame("to", Some(item), twice(target));
            }
            let checked = [self.check_ports(target), self.check_family(target)];
            for error in checked.into_iter().filter_map(Result::err) {
                blame("to", Some(item), error);
            }
        }
        found
    }

    fn check_family(&self, target: &Target) -> Result<(), Invalid> {
        let (Some(listen), Host::Address(backend)) = (self.listen.address, &target.host) else {
            return Ok(());
        };
        let family = |address: &IpAddr| if address.is_ipv4() { "IPv4" } else { "IPv6" };
        let (from, to) = (family(&listen), family(backend));
        match self.source {
            Source::Preserve if from != to => {
                let masquerade = match self.place {
                    Place::Flag(_) => {
                        "write the rule into a configuration file, which can say source = \
                         \"masquerade\""
                    }
                    Place::File { .. } => "set source = \"masquerade\"",
                };
                return invalid!(
                    "{backend} is {to} and the rule listens on {from}: the backend cannot see such \
                     clients; {masquerade}, or name an {from} backend"
                );
            }
            Source::Preserve => return Ok(()),
            Source::Masquerade => {}
        }
        let addresses = self.to.iter().filter_map(|target| match &target.host {
            Host::Address(address) => Some(address),
            Host::Name(_) => None,
        });
        match addresses.clone().next() {
            Some(first) if family(first) != to => invalid!(
                "{backend} is {to} and {first} is {}: the backends of a rule with an address to \
                 listen on are of one family; leave one out",
                family(first)
            ),
            _ => Ok(()),
        }
    }

    fn check_ports(&self, target: &Target) -> Result<(), Invalid> {
        let listen = self.listen.ports;
        let ports = target.ports.unwrap_or(listen);
        let dmz = self.protocol == Protocol::Any && listen == Ports::All;
        if listen.width() == ports.width() || (matches!(ports, Ports::One(_)) && !dmz) {
            return Ok(());
        }
        let bare = &target.host;
        if dmz {
            return invalid!(
                "protocol any keeps every port and cannot change it to {ports}; leave the port \
                 out: {bare}"
            );
        }
        if listen == Ports::All {
            return invalid!(
                "listen has every port and {target} has {}; leave the ports out to keep them: \
                 {bare}",
                ports.width()
            );
        }
        let equal = Target { ports: stretch(ports.first(), listen.width()), ..target.clone() };
        let remedy = match equal.ports {
            Some(_) => format!("write {equal}, or leave the port out to keep it"),
            None => "leave the port out to keep it".to_owned(),
        };
        let many = listen.width();
        let plural = if many == 1 { "" } else { "s" };
        invalid!("{many} port{plural} cannot become {}; {remedy}", ports.width())
    }
}

/// What is said of something that a list has already.
pub(crate) fn twice(named: impl fmt::Display) -> Invalid {
    Invalid(format!("{named} is named twice; name it once"))
}

/// `width` ports from `first` on, if there are as many.
fn stretch(first: u16, width: u32) -> Option<Ports> {
    let last = u16::try_from(u32::from(first) + width - 1).ok()?;
    Some(if first == last { Ports::One(first) } else { Ports::Range { first, last } })
}

pub(crate) fn check_name(name: &str) -> Result<(), Invalid> {
    if name.is_empty() {
        return invalid!("the name is empty; write one, or leave the key out");
    }
    if name.len() > 64 {
        return invalid!("the name has {} bytes; 64 are the most", name.len());
    }
    if name.chars().any(char::is_control) {
        return invalid!("the name {name:?} has a control character; leave it out");
    }
    Ok(())
}

/// The rule as `-p` takes it, without its name. Several backends, which `-p` does not take, are
/// divided by commas.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.listen)?;
        for (index, target) in self.to.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match (&target.host, target.ports) {
                (Host::Address(IpAddr::V6(address)), None) => write!(f, "{comma}[{address}]")?,
                _ => write!(f, "{comma}{target}")?,
            }
        }
        write!(f, "/{}", self.protocol)
    }
}

/// Parses and checks the SPEC of `-p`: `[ADDR:]PORT[-PORT]:BACKEND[:PORT[-PORT]][/PROTO]`.
///
/// The rule has its default name, and the flag as its place.
impl FromStr for Rule {
    type Err = Invalid;

    fn from_str(spec: &str) -> Result<Self, Invalid> {
        let (ends, protocol) = match spec.rsplit_once('/') {
            Some((_, rest)) if rest.contains(':') => {
                return invalid!("the protocol stands last; write PORT:BACKEND[:PORT]/PROTO");
            }
            Some((ends, protocol)) => (ends, protocol.parse()?),
            None => (spec, Protocol::Tcp),
        };
        let (listen, to) = split_spec(ends)?;
        let listen = listen.parse()?;
        let to: Box<[Target]> = Box::new([to.parse()?]);
        let rule = Rule {
            name: Rule::default_name(listen, protocol, &to),
            protocol,
            listen,
            to: to.into(),
            source: Source::Preserve,
            mss: Mss::Auto,
            place: Place::Flag(format!("-p {spec}")),
        };
        match rule.check().into_iter().next() {
            Some(mistake) => Err(mistake.error),
            None => Ok(rule),
        }
    }
}

/// Splits a SPEC without its protocol into the text of [`Listen`] and that of [`Target`].
fn split_spec(text: &str) -> Result<(&str, &str), Invalid> {
    // Where the colons outside brackets are.
    let mut inside = false;
    let mut colons = Vec::new();
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'[' => inside = true,
            b']' => inside = false,
            b':' if !inside => colons.push(at),
            _ => {}
        }
    }
    let is_ports = |part: &str| part.bytes().all(|b| b.is_ascii_digit() || b == b'-' || b == b'*');
    let Some(&first) = colons.first() else {
        return invalid!("{text:?} has no backend; write PORT:BACKEND, as in 80:192.168.1.10");
    };
    // An address cannot be taken for ports: it has dots or brackets.
    let divide = if is_ports(&text[..first]) { Some(&first) } else { colons.get(1) };
    let Some(&divide) = divide else {
        let (listen, to) = (&text[..first], &text[first + 1..]);
        return if listen.parse::<IpAddr>().is_ok() || listen.starts_with('[') {
            invalid!("{text:?} lacks a port or a backend; write {listen}:PORT:BACKEND")
        } else {
            invalid!("{listen:?} is not a port; write PORT:{to}, with a number from 1 to 65535")
        };
    };
    let (listen, to) = (&text[..divide], &text[divide + 1..]);
    let first = to.split(':').next().unwrap_or_default();
    if !first.is_empty() && is_ports(first) {
        return invalid!(
            "{first:?} is a port where the backend's address belongs; write \
             [ADDR:]PORT:BACKEND[:PORT], as in 8080:192.168.1.10:80"
        );
    }
    if !to.starts_with('[') && to.matches(':').count() > 1 {
        // With dots it is more likely an IPv6 address to listen on and an IPv4 backend.
        return if to.parse::<Ipv6Addr>().is_ok() && !to.contains('.') {
            invalid!(
                "an IPv6 address needs brackets in a SPEC; write {listen}:[ADDRESS] or \
                 {listen}:[ADDRESS]:PORT"
            )
        } else {
            invalid!(
                "{text:?} has too many colons; write [ADDR:]PORT:BACKEND[:PORT], with IPv6 \
                 addresses in brackets"
            )
        };
    }
    Ok((listen, to))
}

/// What claims of equal precedence may meet: the listened address, whether it is IPv6, whether it is
/// UDP, and how narrow the rule is.
type Class = (Option<IpAddr>, bool, bool, Precedence);

/// What the rules claim: the class, its first port there, and the rule's index. Sorted.
fn claims(rules: &[Rule]) -> Vec<(Class, u16, usize)> {
    let mut claims: Vec<_> = rules
        .iter()
        .enumerate()
        .flat_map(|(index, rule)| {
            let protocols = [(rule.protocol.tcp(), false), (rule.protocol.udp(), true)];
            protocols.into_iter().filter(|(claimed, _)| *claimed).flat_map(move |(_, udp)| {
                rule.families().map(move |v6| {
                    let class = (rule.listen.address, v6, udp, rule.precedence());
                    (class, rule.listen.ports.first(), index)
                })
            })
        })
        .collect();
    claims.sort_unstable();
    claims
}

/// Pairs of rules (by index, the lower first) that claim the same packets and are equally narrow,
/// so that neither wins. Sorted.
///
/// Each rule that overlaps is in some pair, but not every pair is told: of a hundred equal rules
/// the caller hears 99 times, not 4,950. Takes n log n steps.
pub(crate) fn overlaps(rules: &[Rule]) -> Vec<(usize, usize)> {
    let mut found = BTreeSet::new();
    // Of the class so far, the rule that reaches farthest.
    let mut farthest = None;
    for (class, first, index) in claims(rules) {
        let last = rules[index].listen.ports.last();
        match farthest {
            Some((reigning, end, other)) if reigning == class && first <= end => {
                found.insert((index.min(other), index.max(other)));
                if last > end {
                    farthest = Some((class, last, index));
                }
            }
            _ => farthest = Some((class, last, index)),
        }
    }
    found.into_iter().collect()
}

/// For each of the rules, of which no two [overlap](overlaps), those that are narrower and claim
/// some of its packets.
///
/// Takes n log n steps and one for each that is found; a rule without an address takes some for
/// each address that others have.
pub(crate) fn narrower(rules: &[Rule]) -> Vec<BTreeSet<usize>> {
    let claims = claims(rules);
    let classes: Vec<_> = claims.chunk_by(|(class, ..), (next, ..)| class == next).collect();
    let of = |rule: &Rule| {
        let Listen { address, ports } = rule.listen;
        let start = classes.partition_point(|class| class[0].0.0 < address);
        let end = classes.partition_point(|class| class[0].0.0 <= address);
        let meeting = if address.is_none() { &classes[..] } else { &classes[start..end] };
        let narrower = meeting.iter().filter(|class| class[0].0.3 < rule.precedence());
        narrower
            .flat_map(|class| {
                // They do not overlap: they end in the order in which they begin.
                let ends_before = |index: usize| rules[index].listen.ports.last() < ports.first();
                let from = class.partition_point(|(.., index)| ends_before(*index));
                class[from..].iter().take_while(|(_, first, _)| *first <= ports.last())
            })
            .map(|(.., index)| *index)
            .filter(|index| {
                let other = &rules[*index];
                rule.shares_family(other) && rule.protocol.shared(other.protocol).is_some()
            })
            .collect()
    };
    rules.iter().map(of).collect()
}

/// What two overlapping rules both claim, as in `tcp 203.0.113.7:80`.
pub(crate) fn shared_claim(a: &Rule, b: &Rule) -> Option<String> {
    let protocol = a.protocol.shared(b.protocol)?;
    let ports =
        a.listen.ports.overlaps(b.listen.ports).then(|| a.listen.ports.shared(b.listen.ports))?;
    Some(format!("{protocol} {}", Listen { address: a.listen.address.or(b.listen.address), ports }))
}
