//! Random rules, and what they are in nftables.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

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
pub fn some(random: &mut Random) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    let wanted = 2 + random.below(14);
    for _ in 0..wanted * 4 {
        if rules.len() < wanted {
            let rule = one(random, format!("rule{}", rules.len()));
            if rules.iter().all(|other| go_together(&rule, other)) {
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

/// Whether two rules are no mistake: neither equally narrow on the same port, nor answered
/// differently from the same port of a backend.
fn go_together(a: &Rule, b: &Rule) -> bool {
    let meet = |a: (u16, u16), b: (u16, u16)| a.0 <= b.1 && b.0 <= a.1;
    let listened = |rule: &Rule| (*rule.listen.start(), *rule.listen.end());
    let answering = |rule: &Rule| {
        let first = rule.backend.port();
        (first, first + (rule.listen.end() - rule.listen.start()))
    };
    let shift = |rule: &Rule| rule.backend.port().wrapping_sub(*rule.listen.start());
    let equal = a.backend.is_ipv4() == b.backend.is_ipv4()
        && a.address == b.address
        && width(a) == width(b)
        && meet(listened(a), listened(b));
    let answered_differently = a.backend.ip() == b.backend.ip()
        && (a.address, shift(a)) != (b.address, shift(b))
        && meet(answering(a), answering(b));
    let share = [TCP, UDP].into_iter().any(|protocol| a.has(protocol) && b.has(protocol));
    !(share && (equal || answered_differently))
}

/// The rule that gets what is sent to an address of the router, and where it goes.
pub fn claim(rules: &[Rule], protocol: u8, at: SocketAddr) -> Option<(usize, SocketAddr)> {
    let number = rules.iter().position(|rule| rule.listens(protocol, at))?;
    let Rule { backend, listen, .. } = &rules[number];
    let port = backend.port() + (at.port() - listen.start());
    Some((number, SocketAddr::new(backend.ip(), port)))
}

/// The rules in nftables.
///
/// What connection tracking takes for no part of a flow it does not translate: it would go on with
/// the wrong address, or open a flow of its own that stands in the way of later ones. Where portfwd's
/// rules claim it, it is dropped instead.
pub fn nft(rules: &[Rule]) -> String {
    let mut strange = String::new();
    let mut nat = String::new();
    for rule in rules {
        let Rule { backend, listen, .. } = rule;
        let family = if backend.is_ipv4() { "ip" } else { "ip6" };
        let (first, last, to) = (*listen.start(), *listen.end(), backend.port());
        let [ours, second] = externals(backend.is_ipv6()).map(|address| address.to_string());
        let address = rule.address.map_or(format!("{{ {ours}, {second} }}"), |it| it.to_string());
        let protocols = [(TCP, "tcp"), (UDP, "udp")].into_iter();
        let protocols: Vec<_> =
            protocols.filter(|(number, _)| rule.has(*number)).map(|(_, name)| name).collect();
        let protocols = format!("meta l4proto {{ {} }}", protocols.join(", "));
        let ports = |end: &str, first: u16| match (*listen == ANY, last == *listen.start()) {
            (true, _) => String::new(),
            (_, true) => format!("th {end} {first} "),
            _ => format!("th {end} {first}-{} ", first + (last - listen.start())),
        };
        let claimed = format!("iifname wan0 {family} daddr {address} {protocols} ");
        let claimed = claimed + &ports("dport", first);
        let target = if first == to {
            backend.ip().to_string()
        } else if first == last {
            backend.to_string()
        } else {
            let pairs = (first..=last).zip(to..=u16::MAX).map(|(from, to)| {
                let address = backend.ip();
                format!("{from} : {address} . {to}")
            });
            format!("th dport map {{ {} }}", pairs.collect::<Vec<_>>().join(", "))
        };
        let _ = writeln!(nat, "{claimed}dnat {family} to {target}");
        let _ = writeln!(strange, "{claimed}ct state invalid drop");
        let _ = writeln!(
            strange,
            "iifname lan0 {family} saddr {} {protocols} {}ct state {{ new, invalid }} drop",
            backend.ip(),
            ports("sport", to)
        );
    }
    format!(
        "table inet oracle {{\n\
         chain strange {{\ntype filter hook prerouting priority mangle\n{strange}}}\n\
         chain nat {{\ntype nat hook prerouting priority dstnat\n{nat}}}\n}}\n"
    )
}
