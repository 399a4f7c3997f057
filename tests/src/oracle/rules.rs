//! Random rules, and what they are in nftables.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use super::kinds::{self, Extent};
use crate::packet::{TCP, UDP};
use crate::random::Random;
use crate::rig::{self, Addresses};
use crate::rule::{ANY, Rule};

/// A second address of the router's `wan0`, of each family.
pub const SECOND_WAN: Addresses = Addresses {
    v4: Ipv4Addr::new(198, 51, 100, 7),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 7),
};

/// How many servers there are in each family, counted up from the rig's.
pub const SERVERS: u8 = 6;

/// The ports of DHCP clients, which `*` leaves alone. Nothing is sent there.
const DHCP: [u16; 2] = [68, 546];

/// The addresses of `wan0`, in the order in which the kernel lists them: the oldest IPv4 address
/// first, the latest IPv6 address.
pub fn externals(v6: bool) -> [IpAddr; 2] {
    if v6 {
        [SECOND_WAN.v6, rig::WAN.v6].map(IpAddr::V6)
    } else {
        [rig::WAN.v4, SECOND_WAN.v4].map(IpAddr::V4)
    }
}

/// One of the servers.
pub fn server(v6: bool, number: u8) -> IpAddr {
    let Addresses { v4, v6: six } = rig::SERVER;
    if v6 {
        Ipv6Addr::from_bits(six.to_bits() + u128::from(number)).into()
    } else {
        Ipv4Addr::from_bits(v4.to_bits() + u32::from(number)).into()
    }
}

/// A port that anyone may use.
pub fn any_port(random: &mut Random) -> u16 {
    loop {
        let port = random.between(1, u16::MAX);
        if !DHCP.contains(&port) {
            return port;
        }
    }
}

/// Rules that portfwd takes, the narrower before the wider.
pub fn some(random: &mut Random, extent: Extent) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    let wanted = 2 + random.below(14);
    for _ in 0..wanted * 4 {
        if rules.len() < wanted {
            let mut rule = one(random, format!("rule{}", rules.len()));
            kinds::shape(random, extent, &mut rule);
            let shared = kinds::SHARED_PORTS.is_in(extent);
            let go =
                |other: &Rule| go_together(&rule, other) && (shared || !shares_port(&rule, other));
            if rules.iter().all(go) && !rules.iter().chain([&rule]).any(|it| bars(it, &rule)) {
                rules.push(rule);
            }
        }
    }
    rules.sort_by_key(width);
    rules
}

fn one(random: &mut Random, name: String) -> Rule {
    let v6 = random.one_in(2);
    // Where many rules meet, or anywhere.
    let port = |random: &mut Random| match random.below(3) {
        0 => random.between(990, 1100),
        1 => random.between(32_700, 32_800),
        _ => any_port(random),
    };
    let first = port(random);
    let longest = [1, 1, 40, 40, 20_000][random.below(5)].min(u16::MAX - first);
    let listen = match random.below(8) {
        0 => ANY,
        1..=4 => first..=first,
        _ => first..=first + random.between(0, longest),
    };
    let width = listen.end() - listen.start();
    // A shifted range is a map with an element for each port in nftables.
    let keeps = listen == ANY || width > 100 || random.one_in(2);
    let to = if keeps { *listen.start() } else { port(random).min(u16::MAX - width) };
    let protocols: &[_] =
        if listen == ANY { &["tcp", "udp", "any"] } else { &["tcp", "udp", "tcp+udp"] };
    let protocol = random.pick(protocols);
    let backend = server(v6, random.below(SERVERS.into()) as u8);
    let address = random.one_in(2).then(|| *random.pick(&externals(v6)));
    Rule { address, ..Rule::new(&name, protocol, listen, SocketAddr::new(backend, to)) }
}

/// What decides between rules: the lower wins. README: an address before none, a port before a range
/// before `*`, a protocol before `any`.
fn width(rule: &Rule) -> (bool, u8, bool) {
    let ports = match rule.listen.end() - rule.listen.start() {
        0 => 0,
        u16::MAX => 2,
        _ => 1,
    };
    (rule.address.is_none(), ports, rule.protocol == "any")
}

/// The ports that portfwd masquerades with. No rule may listen there by number.
const MASQUERADE: RangeInclusive<u16> = 40_000..=60_999;

/// Whether `*` leaves a port to the clients that rules masquerade.
fn leaves(rules: &[Rule], port: u16) -> bool {
    MASQUERADE.contains(&port) && rules.iter().any(|rule| rule.masquerade)
}

/// Whether a rule that masquerades keeps another from listening there.
fn bars(one: &Rule, other: &Rule) -> bool {
    let is_there = |rule: &Rule| {
        rule.listen != ANY
            && rule.listen.start() <= MASQUERADE.end()
            && MASQUERADE.start() <= rule.listen.end()
    };
    one.masquerade && is_there(other) || other.masquerade && is_there(one)
}

fn meet(a: (u16, u16), b: (u16, u16)) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

fn share_protocol(a: &Rule, b: &Rule) -> bool {
    [TCP, UDP].into_iter().any(|protocol| a.has(protocol) && b.has(protocol))
}

/// Whether two rules are not equally narrow on the same port.
fn go_together(a: &Rule, b: &Rule) -> bool {
    let listened = |rule: &Rule| (*rule.listen.start(), *rule.listen.end());
    let equal = a.backend.is_ipv4() == b.backend.is_ipv4()
        && a.address == b.address
        && width(a) == width(b)
        && meet(listened(a), listened(b));
    !(equal && share_protocol(a, b))
}

/// The rule that claims what has no ports.
pub fn dmz(rules: &[Rule], address: IpAddr) -> Option<usize> {
    let claims = |rule: &Rule| {
        rule.protocol == "any"
            && rule.backend.is_ipv4() == address.is_ipv4()
            && rule.address.is_none_or(|it| it == address)
    };
    let numbers = (0..rules.len()).filter(|number| claims(&rules[*number]));
    numbers.min_by_key(|number| width(&rules[*number]))
}

/// Whether a port of a backend's is two rules', which answer differently.
fn shares_port(a: &Rule, b: &Rule) -> bool {
    let shift = |rule: &Rule| rule.backend.port().wrapping_sub(*rule.listen.start());
    a.backends().any(|backend| b.backends().any(|other| backend == other))
        && (has_many_to_one(a)
            || has_many_to_one(b)
            || (a.address, shift(a)) != (b.address, shift(b)))
        && meet(a.answering(), b.answering())
        && share_protocol(a, b)
}

/// Whether several listened ports become one.
fn has_many_to_one(rule: &Rule) -> bool {
    rule.one_port && rule.listen.start() != rule.listen.end()
}

/// Whether a rule's replies follow from the rule alone.
pub fn is_stateless(rules: &[Rule], number: usize) -> bool {
    let rule = &rules[number];
    let others = rules.iter().enumerate().filter(|(other, _)| *other != number);
    !has_many_to_one(rule)
        && !rule.chooses()
        && others.into_iter().all(|(_, other)| !shares_port(rule, other))
}

/// The rule that gets what is sent to an address of the router, and where it goes.
pub fn claim(rules: &[Rule], protocol: u8, at: SocketAddr) -> Option<(usize, SocketAddr)> {
    let is_left = leaves(rules, at.port());
    let is_its = |rule: &Rule| rule.listens(protocol, at) && !(is_left && rule.listen == ANY);
    let number = rules.iter().position(is_its)?;
    let Rule { backend, listen, one_port, .. } = &rules[number];
    let port = backend.port() + if *one_port { 0 } else { at.port() - listen.start() };
    Some((number, SocketAddr::new(backend.ip(), port)))
}

/// A masqueraded client as the backend sees it, but for a port that is the router's choice.
pub fn masqueraded(client: SocketAddr) -> SocketAddr {
    let Addresses { v4, v6 } = rig::LAN;
    let address = if client.is_ipv4() { v4.into() } else { v6.into() };
    SocketAddr::new(address, client.port())
}

/// A map of nftables.
fn map(pairs: impl Iterator<Item = (usize, String)>) -> String {
    let pairs = pairs.map(|(from, to)| format!("{from} : {to}"));
    format!("map {{ {} }}", pairs.collect::<Vec<_>>().join(", "))
}

/// How nftables knows a rule's packets by one of their ends.
fn matches(rules: &[Rule], rule: &Rule, end: &str, ports: (u16, u16)) -> Vec<String> {
    let (left, up_to) = (MASQUERADE.start(), MASQUERADE.end());
    let ports = match ports {
        (0, u16::MAX) if leaves(rules, *left) => format!("th {end} != {left}-{up_to}"),
        (0, u16::MAX) => String::new(),
        (first, last) if first == last => format!("th {end} {first}"),
        (first, last) => format!("th {end} {first}-{last}"),
    };
    let protocols = match rule.protocol {
        "any" | "tcp+udp" => "tcp, udp",
        protocol => protocol,
    };
    let mut matches = vec![format!("meta l4proto {{ {protocols} }} {ports}")];
    if rule.protocol == "any" {
        matches.push("meta l4proto != { tcp, udp, icmp, ipv6-icmp }".into());
    }
    matches
}

/// The rules in nftables.
///
/// What connection tracking takes for no part of a flow it does not translate: it would go on with
/// the wrong address, or open a flow of its own that stands in the way of later ones. Where portfwd's
/// stateless rules claim it, it is dropped instead. Clients inside are masqueraded whatever the rule
/// is; that there is a shorter way they are not told.
pub fn nft(rules: &[Rule]) -> String {
    let mut strange = String::new();
    let mut nat = String::new();
    for (number, rule) in rules.iter().enumerate() {
        let Rule { backend, listen, .. } = rule;
        let family = if backend.is_ipv4() { "ip" } else { "ip6" };
        let (first, last) = (*listen.start(), *listen.end());
        let [one, two] = externals(backend.is_ipv6()).map(|address| address.to_string());
        let address = rule.address.map_or(format!("{{ {one}, {two} }}"), |it| it.to_string());
        let keeps = first == backend.port() && !rule.one_port;
        let has_one = rule.answering().0 == rule.answering().1;
        let at = |address: IpAddr, port: u16| format!("{address} . {port}");
        let target = match rule.backends().count() {
            1 if keeps => backend.ip().to_string(),
            1 if has_one => backend.to_string(),
            1 => {
                let shifted = (first..=last).zip(backend.port()..=u16::MAX);
                let pairs = shifted.map(|(from, to)| (from.into(), at(backend.ip(), to)));
                format!("th dport {}", map(pairs))
            }
            count => {
                let to = |address: IpAddr| {
                    if keeps { address.to_string() } else { at(address, backend.port()) }
                };
                let pairs = rule.backends().map(to).enumerate();
                format!("jhash {family} saddr . th sport mod {count} {}", map(pairs))
            }
        };
        let mark = if rule.masquerade { "ct mark set 1 " } else { "" };
        let to_us = format!("{family} daddr {address}");
        for claimed in matches(rules, rule, "dport", (first, last)) {
            let _ = writeln!(nat, "{to_us} {claimed} {mark}dnat {family} to {target}");
            if is_stateless(rules, number) {
                let _ = writeln!(strange, "iifname wan0 {to_us} {claimed} ct state invalid drop");
            }
        }
        if !is_stateless(rules, number) {
            continue;
        }
        if rule.protocol == "any" {
            let icmp = if backend.is_ipv4() { "icmp" } else { "icmpv6" };
            let _ = writeln!(
                nat,
                "iifname wan0 {to_us} {icmp} type echo-request dnat {family} to {target}"
            );
        }
        for claimed in matches(rules, rule, "sport", rule.answering()) {
            let _ = writeln!(
                strange,
                "iifname lan0 {family} saddr {} fib daddr type != local {claimed} ct state {{ new, invalid }} drop",
                backend.ip(),
            );
        }
    }
    format!(
        "table inet oracle {{\n\
         chain strange {{\ntype filter hook prerouting priority mangle\n{strange}}}\n\
         chain nat {{\ntype nat hook prerouting priority dstnat\n{nat}}}\n\
         chain leave {{\ntype nat hook postrouting priority srcnat\n\
         ct mark 1 masquerade\niifname lan0 ct status dnat masquerade\n}}\n\
         chain tell {{\ntype filter hook output priority filter\nicmpv6 type nd-redirect drop\n}}\n}}\n"
    )
}
