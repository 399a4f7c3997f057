//! A router in a namespace of its own, with the real programs and nothing attached. Frames are tried
//! one by one, and whatever was counted for them is part of what is seen.
//!
//! Every link has one network in each family, and everything in it the same numbers: by interface 12
//! comes 10.0.12.0/24 and fd00:0:0:12::/64, where host 10 has the link address 02:00:00:00:12:10.
//! The router is host 1, and on `WAN` host 7 as well. Hosts 2 and 10 to 14 are resolved.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};

use portfwd::compile::{BoxPorts, Capacity, Compiler, FlowRoom, Flows, Resolved, Update, plan};
use portfwd::datapath::{Action, Counts, Datapath, Hook};
use portfwd::network::Externals;
use portfwd::rule::{Mss, Rule, Source};
use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Address, Direction, Dropped, Interface, Passed, ToStack};
use portfwd_tests::Namespace;
use portfwd_tests::packet::{Packet, TCP, UDP};

use crate::spare;

/// External.
pub const WAN: u8 = 11;
/// Internal.
pub const LAN: u8 = 12;
/// Internal, but frames cannot be redirected to it.
pub const SLOW_LAN: u8 = 13;
/// None of portfwd's.
pub const OTHER: u8 = 14;
/// External, but frames cannot be redirected to it.
pub const SLOW_WAN: u8 = 15;
/// One-armed: external and internal.
pub const ARM: u8 = 16;

const LINKS: [(u8, u32); 6] = [
    (WAN, Interface::EXTERNAL | Interface::TRANSMITS),
    (LAN, Interface::INTERNAL | Interface::TRANSMITS),
    (SLOW_LAN, Interface::INTERNAL),
    (OTHER, 0),
    (SLOW_WAN, Interface::EXTERNAL),
    (ARM, Interface::EXTERNAL | Interface::INTERNAL | Interface::TRANSMITS),
];

/// Networks by the routes that lead there.
pub const BLACKHOLE: u8 = 101;
pub const UNREACHABLE: u8 = 102;
pub const PROHIBIT: u8 = 103;
pub const NO_ROUTE: u8 = 104;
/// Behind host 10 of `LAN`, with an MTU of 1280.
pub const NARROW_INSIDE: u8 = 105;
/// Behind host 2 of `WAN`, with an MTU of 1280.
pub const NARROW_OUTSIDE: u8 = 106;
/// Behind host 10 of `OTHER`, with an MTU of 1280.
pub const NARROW_OTHER: u8 = 107;
/// Behind host 2 of `WAN`.
pub const DISTANT: u8 = 108;

/// What rules are compiled with.
pub const PORTS: BoxPorts = BoxPorts { ephemeral: 32768..=60999, masquerade: 50_000..=50_999 };

/// Room for a few rules and flows.
pub const CAPACITY: Capacity = Capacity {
    endpoints: 256,
    translations: 256,
    pages: 1024,
    counters: 64,
    flows: FlowRoom { v4: Flows(1024), v6: Flows(1024) },
    crosses: true,
    mappings: 4096,
};

/// IPv4 and IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    V4,
    V6,
}

impl Version {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub fn address(self, network: u8, host: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, 0, network, host).into(),
            // The decimal numbers read as hexadecimal ones.
            Self::V6 => format!("fd00:0:0:{network}::{host}").parse().unwrap(),
        }
    }

    pub fn at(self, network: u8, host: u8, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(network, host), port)
    }

    /// A rule in the form of `-p`; `@12.10` stands for host 10 of network 12.
    pub fn rule(self, spec: &str) -> String {
        let mut parts = spec.split('@');
        let mut text = parts.next().unwrap().to_owned();
        for part in parts {
            let end = part.find([':', '/', ' ']).unwrap_or(part.len());
            let (network, host) = part[..end].split_once('.').unwrap();
            match self.address(network.parse().unwrap(), host.parse().unwrap()) {
                IpAddr::V4(address) => text += &address.to_string(),
                IpAddr::V6(address) => text += &format!("[{address}]"),
            }
            text += &part[end..];
        }
        text
    }
}

/// The same rules in both families.
pub fn in_both(specs: &[&str]) -> Vec<String> {
    Version::BOTH.iter().flat_map(|version| specs.iter().map(|spec| version.rule(spec))).collect()
}

/// A rule as `-p` takes it, named by its text; words behind it are further backends, or `masquerade`.
pub fn rule(text: &str) -> Rule {
    let mut words = text.split(' ');
    let spec = words.next().unwrap();
    let rule = spec.parse::<Rule>().unwrap_or_else(|error| panic!("{spec}: {error}"));
    let mut rule = Rule { name: text.to_owned(), ..rule };
    let mut to = rule.to.to_vec();
    for word in words {
        match word {
            "masquerade" => rule.source = Source::Masquerade,
            backend => to.push(backend.parse().unwrap()),
        }
    }
    rule.to = to.into();
    rule
}

/// The link address of a host; the numbers read alike in hexadecimal.
pub fn link_address(link: u8, host: u8) -> [u8; 6] {
    let digits = |number: u8| ((number / 10) << 4) | (number % 10);
    [2, 0, 0, 0, digits(link), digits(host)]
}

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Redirect,
    Stack(ToStack),
    Pass(Passed),
    Drop(Dropped),
    /// Dropped, and the frame is the answer.
    Answer(Dropped),
}

/// What became of a frame, the rule that counted it, and the bytes afterwards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    pub outcome: Outcome,
    /// With the direction, unless it was dropped.
    pub rule: Option<(String, Option<Direction>)>,
    pub frame: Vec<u8>,
}

/// See the module.
pub struct Router {
    pub datapath: Datapath,
    pub compiler: Compiler,
    /// Of all rules that are loaded from now on.
    pub mss: Mss,
    rules: Vec<Rule>,
}

/// Where the programs are that are tested: at TC if `PORTFWD_TEST_ATTACH` says so.
pub fn hook() -> Hook {
    if portfwd_tests::attach() == "tc" { Hook::Tc } else { Hook::Xdp }
}

/// Whether the hook can get such a frame: the kernel tries none at TC whose IP header is cut short.
pub fn comes(frame: &[u8]) -> bool {
    let header = match frame.get(12..14) {
        Some([0x08, 0x00]) => 34,
        Some([0x86, 0xdd]) => 54,
        _ => 14,
    };
    hook() == Hook::Xdp || frame.len() >= header
}

/// Runs a test in a new router.
pub fn with_router<T: Send>(test: impl FnOnce(&mut Router) -> T + Send) -> T {
    with_router_of(CAPACITY, test)
}

/// As [`with_router`], with room for so many rows.
pub fn with_router_of<T: Send>(
    capacity: Capacity,
    test: impl FnOnce(&mut Router) -> T + Send,
) -> T {
    let namespace = Namespace::new("program").unwrap();
    for (key, value) in [
        ("net.ipv6.conf.default.disable_ipv6", "0"),
        ("net.ipv6.conf.default.accept_dad", "0"),
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
    ] {
        namespace.set_sysctl(key, value).unwrap();
    }
    namespace.enter(|| {
        ip_batch(&network());
        let mut datapath = spare::take(capacity);
        datapath.set_interfaces(&interfaces()).unwrap();
        let (compiler, mss) = (Compiler::default(), Mss::Auto);
        let mut router = Router { datapath, compiler, mss, rules: Vec::new() };
        let result = test(&mut router);
        spare::give_back(router);
        result
    })
}

/// All links and what they are.
pub fn interfaces() -> BTreeMap<u32, Interface> {
    LINKS
        .iter()
        .filter(|(link, _)| *link != OTHER)
        .map(|(link, flags)| (u32::from(*link), interface(*link, *flags)))
        .collect()
}

/// What portfwd knows of a link.
pub fn interface(link: u8, flags: u32) -> Interface {
    let [IpAddr::V4(v4), IpAddr::V6(v6)] = Version::BOTH.map(|version| version.address(link, 1))
    else {
        unreachable!("one of each")
    };
    let (v4, v6) = (Address(v4.octets()), Address(v6.octets()));
    Interface { flags, mtu: 1500, device: 0, v4, v6 }
}

/// Links, addresses, neighbours and routes, for `ip -batch`.
fn network() -> String {
    let mut lines = Vec::new();
    for (link, _) in LINKS {
        let name = format!("link{link}");
        let mac = |host| link_address(link, host).map(|byte| format!("{byte:02x}")).join(":");
        let own = mac(1);
        lines.push(format!(
            "link add {name} index {link} address {own} type veth peer name {name}p"
        ));
        lines.push(format!("link set {name} up"));
        lines.push(format!("link set {name}p up"));
        for version in Version::BOTH {
            let (length, nodad) = if version == Version::V4 { (24, "") } else { (64, " nodad") };
            let own: &[u8] = if link == WAN { &[1, 7] } else { &[1] };
            for host in own {
                let address = version.address(link, *host);
                lines.push(format!("address add {address}/{length} dev {name}{nodad}"));
            }
            for host in [2, 10, 11, 12, 13, 14] {
                let (address, mac) = (version.address(link, host), mac(host));
                lines
                    .push(format!("neighbour add {address} lladdr {mac} dev {name} nud permanent"));
            }
        }
    }
    for version in Version::BOTH {
        let length = if version == Version::V4 { 24 } else { 64 };
        let to = |network| format!("{}/{length}", version.address(network, 0));
        for (kind, network) in
            [("blackhole", BLACKHOLE), ("unreachable", UNREACHABLE), ("prohibit", PROHIBIT)]
        {
            lines.push(format!("route add {kind} {}", to(network)));
        }
        for (network, link, host, mtu) in [
            (NARROW_INSIDE, LAN, 10, " mtu lock 1280"),
            (NARROW_OUTSIDE, WAN, 2, " mtu lock 1280"),
            (NARROW_OTHER, OTHER, 10, " mtu lock 1280"),
            (DISTANT, WAN, 2, ""),
        ] {
            let via = version.address(link, host);
            lines.push(format!("route add {} via {via} dev link{link}{mtu}", to(network)));
        }
    }
    lines.join("\n")
}

/// `ip` with a command on each line, in the namespace of this thread.
pub fn ip_batch(lines: &str) {
    let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    ip.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(ip.wait().unwrap().success(), "{lines}");
}

/// Sets a key below /proc/sys/net in the namespace of this thread.
pub fn set_sysctl(key: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
}

impl Router {
    /// Makes these the rules, named by their text, for the router's first address on `WAN`.
    pub fn load(&mut self, specs: &[impl AsRef<str>]) {
        self.load_at(&[1], specs);
    }

    /// As [`load`](Self::load), of rules that have no such text.
    pub fn load_rules(&mut self, rules: Vec<Rule>) {
        let update = self.compile_rules(&[1], rules);
        self.datapath.apply(&update).unwrap();
        self.compiler.commit(&update);
    }

    /// As [`load`](Self::load), for several of the router's addresses on `WAN`, by their hosts.
    pub fn load_at(&mut self, hosts: &[u8], specs: &[impl AsRef<str>]) {
        let update = self.compile_at(hosts, specs);
        self.datapath.apply(&update).unwrap();
        self.compiler.commit(&update);
    }

    /// What would be written for these rules.
    pub fn compile_at(&mut self, hosts: &[u8], specs: &[impl AsRef<str>]) -> Update {
        self.compile_rules(hosts, specs.iter().map(|spec| rule(spec.as_ref())).collect())
    }

    fn compile_rules(&mut self, hosts: &[u8], mut rules: Vec<Rule>) -> Update {
        for rule in &mut rules {
            rule.mss = self.mss;
        }
        let plan = plan(&rules, &Resolved::new()).unwrap_or_else(|refused| panic!("{refused}"));
        let mut externals = Externals { v4: Vec::new(), v6: Vec::new() };
        for host in hosts {
            for version in Version::BOTH {
                match version.address(WAN, *host) {
                    IpAddr::V4(address) => externals.v4.push(address),
                    IpAddr::V6(address) => externals.v6.push(address),
                }
            }
        }
        let update = self.compiler.compile(&rules, &plan, &externals, &PORTS);
        for rule in rules {
            if self.rules.iter().all(|known| known.name != rule.name) {
                self.rules.push(rule);
            }
        }
        update
    }

    /// The counts of a rule that was loaded once.
    pub fn counts(&self, name: &str) -> Counts {
        self.datapath.counts(self.compiler.counter(name).unwrap()).unwrap()
    }

    /// Counts of all rules that were ever loaded, by name.
    fn all_counts(&self) -> Vec<(String, Counts)> {
        self.rules.iter().map(|rule| (rule.name.clone(), self.counts(&rule.name))).collect()
    }

    /// Packets that were translated, by all rules in both directions.
    pub fn translated(&self) -> u64 {
        let counts = self.all_counts();
        counts.iter().map(|(_, counts)| counts.forward.packets + counts.reply.packets).sum()
    }

    /// Lets the program of `role` have a frame that comes by `link`. Asserts what holds for every
    /// frame: it is counted once, by its length, and unchanged unless it was translated.
    pub fn try_frame(&mut self, role: Role, link: u8, frame: &[u8]) -> Seen {
        let (passed, counts) = (self.datapath.passed().unwrap(), self.all_counts());
        let (action, after) = self.datapath.try_frame(hook(), role, link.into(), frame).unwrap();
        let mut counted = Vec::new();
        let mut rule = None;
        let passed_now = self.datapath.passed().unwrap();
        for (reason, (before, now)) in Passed::ALL.iter().zip(passed.iter().zip(passed_now)) {
            counted.extend((*before..now).map(|_| Outcome::Pass(*reason)));
        }
        for ((name, before), (_, now)) in counts.into_iter().zip(self.all_counts()) {
            let stack: Vec<ToStack> = (ToStack::ALL.iter())
                .filter(|reason| {
                    now.to_stack[**reason as usize] != before.to_stack[**reason as usize]
                })
                .copied()
                .collect();
            for (direction, before, tally) in [
                (Direction::Forward, before.forward, now.forward),
                (Direction::Reply, before.reply, now.reply),
            ] {
                let packets = tally.packets - before.packets;
                assert_eq!(tally.bytes - before.bytes, packets * ip_length(frame), "{frame:02x?}");
                for _ in 0..packets {
                    counted
                        .push(stack.first().map_or(Outcome::Redirect, |why| Outcome::Stack(*why)));
                    rule = Some((name.clone(), Some(direction)));
                    assert!(now.last.0 > 0);
                }
            }
            let answered = now.answered - before.answered;
            for (reason, (before, now)) in
                Dropped::ALL.iter().zip(before.dropped.iter().zip(now.dropped))
            {
                for _ in *before..now {
                    counted.push(match answered {
                        0 => Outcome::Drop(*reason),
                        _ => Outcome::Answer(*reason),
                    });
                    rule = Some((name.clone(), None));
                }
            }
            let stacked = now.to_stack.iter().sum::<u64>() - before.to_stack.iter().sum::<u64>();
            let outcomes = counted.iter().filter(|outcome| matches!(outcome, Outcome::Stack(_)));
            assert!(stacked as usize <= outcomes.count(), "{frame:02x?}");
        }
        let [outcome] = counted[..] else {
            panic!("{action:?}, counted as {counted:?}: {frame:02x?}")
        };
        let expected = match outcome {
            Outcome::Redirect | Outcome::Answer(_) => Action::Redirect,
            Outcome::Stack(_) | Outcome::Pass(_) => Action::Pass,
            Outcome::Drop(_) => Action::Drop,
        };
        assert_eq!(action, expected, "{outcome:?}: {frame:02x?}");
        match outcome {
            Outcome::Pass(_) | Outcome::Drop(_) => assert_eq!(after, frame, "{outcome:?}"),
            Outcome::Answer(_) => {}
            _ => {
                // To the other IP version, if the link header says so: of errors, two headers.
                let grown = after.len() as isize - frame.len() as isize;
                let expected: &[isize] = match (&frame[12..14], &after[12..14]) {
                    ([0x08, 0x00], [0x86, 0xdd]) => &[20, 40],
                    ([0x86, 0xdd], [0x08, 0x00]) => &[-20, -40],
                    _ => &[0],
                };
                assert!(expected.contains(&grown), "{grown} bytes more: {frame:02x?}");
            }
        }
        Seen { outcome, rule, frame: after }
    }

    /// Asserts that a packet is redirected as `goes`; returns the name of the rule that did it.
    pub fn redirects(&mut self, name: &str, flow: &Flow, came: &Packet, goes: &Packet) -> String {
        self.translates(name, flow, came, Outcome::Redirect, goes)
    }

    /// Asserts that a packet is translated to `goes`; returns the name of the rule that did it.
    pub fn translates(
        &mut self,
        name: &str,
        flow: &Flow,
        came: &Packet,
        outcome: Outcome,
        goes: &Packet,
    ) -> String {
        let seen = self.try_frame(flow.role, flow.link, &came.bytes());
        assert_eq!(seen.outcome, outcome, "{name}: {flow:?}");
        assert_eq!(hex(&seen.frame), hex(&goes.bytes()), "{name}: {flow:?}");
        let (rule, direction) = seen.rule.unwrap();
        assert_eq!(direction, Some(flow.direction), "{name}: {flow:?}");
        if let Err(error) = portfwd_tests::wire::verify(&seen.frame) {
            panic!("{name}: {flow:?}: {error:#}");
        }
        rule
    }

    /// Asserts that a frame is not translated.
    pub fn refuses(&mut self, name: &str, flow: &Flow, frame: &[u8], outcome: Outcome) {
        let seen = self.try_frame(flow.role, flow.link, frame);
        assert_eq!(seen.outcome, outcome, "{name}: {flow:?}:\n{}", hex(frame));
    }
}

/// Bytes of the IP packet in a frame, as its header says.
fn ip_length(frame: &[u8]) -> u64 {
    let (start, more) = if frame.get(12..14) == Some(&[0x08, 0x00]) { (16, 0) } else { (18, 40) };
    frame
        .get(start..start + 2)
        .map_or(0, |field| more + u64::from(u16::from_be_bytes([field[0], field[1]])))
}

/// Bytes in rows of sixteen, to be read in a failed assertion.
pub fn hex(frame: &[u8]) -> String {
    frame.chunks(16).map(|row| format!("{row:02x?}\n")).collect()
}

/// Packets one way through a rule, and where they go.
#[derive(Clone, Debug)]
pub struct Flow {
    pub version: Version,
    pub protocol: u8,
    pub direction: Direction,
    pub role: Role,
    /// Where the packets come in.
    pub link: u8,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// What replaces the end that `direction` translates.
    pub end: SocketAddr,
    /// By which link they leave, and to which host there.
    pub egress: (u8, u8),
}

/// What most tests have loaded: port 8080 of the router to port 80 of host 10 on `LAN`.
pub const WEB: [&str; 1] = ["8080:@12.10:80/tcp+udp"];

impl Flow {
    /// What becomes of a packet that leaves by an interface which cannot transmit XDP frames.
    pub fn without_transmit(&self, came: &Packet) -> (Outcome, Packet) {
        match hook() {
            Hook::Xdp => (Outcome::Stack(ToStack::NoTransmit), self.translated(came)),
            Hook::Tc => (Outcome::Redirect, self.goes(came)),
        }
    }

    /// The two ways between host 2 of `WAN` and a port of the router there that leads to a port of
    /// host 10 of `LAN`.
    pub fn both(version: Version, protocol: u8, port: u16, backend_port: u16) -> [Self; 2] {
        [Self::forward(version, protocol, port, (10, backend_port)), {
            Self::reply(version, protocol, (10, backend_port), port)
        }]
    }

    /// From host 2 of `WAN` to a port of the router, which leads to a host and port of `LAN`.
    pub fn forward(version: Version, protocol: u8, port: u16, backend: (u8, u16)) -> Self {
        Self {
            version,
            protocol,
            direction: Direction::Forward,
            role: Role::External,
            link: WAN,
            source: version.at(WAN, 2, 5000),
            destination: version.at(WAN, 1, port),
            end: version.at(LAN, backend.0, backend.1),
            egress: (LAN, backend.0),
        }
    }

    /// From a host and port of `LAN` to host 2 of `WAN`, as if from a port of the router.
    pub fn reply(version: Version, protocol: u8, backend: (u8, u16), port: u16) -> Self {
        Self {
            version,
            protocol,
            direction: Direction::Reply,
            role: Role::Internal,
            link: LAN,
            source: version.at(LAN, backend.0, backend.1),
            destination: version.at(WAN, 2, 5000),
            end: version.at(WAN, 1, port),
            egress: (WAN, 2),
        }
    }

    /// TCP and UDP in both families, both ways, through [`WEB`].
    pub fn all() -> Vec<Self> {
        let mut flows = Vec::new();
        for version in Version::BOTH {
            for protocol in [TCP, UDP] {
                flows.extend(Self::both(version, protocol, 8080, 80));
            }
        }
        flows
    }

    /// A packet of this flow.
    pub fn came(&self) -> Packet {
        let host = if self.direction == Direction::Forward { 2 } else { 10 };
        Packet {
            link_source: link_address(self.link, host),
            link_destination: link_address(self.link, 1),
            ..Packet::new(self.protocol, self.source, self.destination)
        }
    }

    /// A packet as it leaves through the stack: with the one end changed.
    pub fn translated(&self, came: &Packet) -> Packet {
        match self.direction {
            Direction::Forward => Packet { destination: self.end, ..came.clone() },
            Direction::Reply => Packet { source: self.end, ..came.clone() },
        }
    }

    /// A packet as it leaves redirected: a hop less, and with the link addresses of the next.
    pub fn goes(&self, came: &Packet) -> Packet {
        Packet {
            hops: came.hops - 1,
            link_source: link_address(self.egress.0, 1),
            link_destination: link_address(self.egress.0, self.egress.1),
            ..self.translated(came)
        }
    }
}
