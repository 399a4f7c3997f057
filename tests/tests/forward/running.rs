//! A rig with portfwd in it, captures at both ends, and the counts that must agree.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use portfwd_tests::netns::{self, Namespace};
pub use portfwd_tests::packet::{TCP, UDP};
use portfwd_tests::peers::{self, Background};
use portfwd_tests::rig::{self, Rig};
pub use portfwd_tests::rule::{ANY, Rule};
use portfwd_tests::wire::{self, Capture, Count, Direction, Frame, Key, Tally};
use portfwd_tests::{Portfwd, TempDir, binary};
use serde_json::Value;

/// The same rules, but the server sees the router's address.
pub fn masqueraded(rules: Vec<Rule>) -> Vec<Rule> {
    rules.into_iter().map(|rule| Rule { masquerade: true, ..rule }).collect()
}

/// The same rule for the rig's server over each IP version. Two rules on one port cannot both listen on
/// every address, so that for IPv6 names the only one there is.
pub fn for_both(
    name: &str,
    protocol: &'static str,
    listen: RangeInclusive<u16>,
    to: u16,
) -> Vec<Rule> {
    let rule = |version, server| {
        Rule::new(&format!("{name}{version}"), protocol, listen.clone(), at(server, to))
    };
    let [v4, v6] = rig::SERVER.both();
    vec![rule(4, v4), Rule { address: Some(rig::WAN.v6.into()), ..rule(6, v6) }]
}

/// Counts of one rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub forward: Count,
    pub reply: Count,
}

/// portfwd on the router of a rig. `interfaces` stands at the beginning of the configuration, in `[interfaces]`.
pub fn started(
    rig: &Rig,
    interfaces: &str,
    rules: &[Rule],
    flags: &[&str],
    directory: &TempDir,
) -> Portfwd {
    let config = directory.path().join("portfwd.toml");
    let text: String = rules.iter().map(Rule::toml).collect();
    fs::write(&config, portfwd_tests::interfaces(interfaces) + &text).unwrap();
    let mut arguments = vec!["--config", config.to_str().unwrap()];
    arguments.extend(flags);
    Portfwd::start(&rig.router, &binary(), &arguments, directory.path()).unwrap()
}

/// portfwd on the router of a rig, with captures at the other ends.
pub struct Running {
    pub portfwd: Portfwd,
    pub client: Capture<Tally>,
    pub servers: Vec<Capture<Tally>>,
    /// Where rules overlap, the narrower first.
    pub rules: Vec<Rule>,
    /// Frames lost while interfaces came up and programs were attached.
    pub lost: u64,
    pub rig: Rig,
    pub directory: TempDir,
}

impl Running {
    pub fn start(rig: Rig, rules: Vec<Rule>) -> Self {
        Self::with(rig, rules, "external = [\"wan0\"]", &[])
    }

    /// `interfaces` stands at the beginning of the configuration, in `[interfaces]`.
    pub fn with(rig: Rig, rules: Vec<Rule>, interfaces: &str, flags: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        let client = Capture::tally(&rig.client, "eth0").unwrap();
        let servers = [Some(&rig.server), rig.second_server.as_ref()];
        let servers =
            servers.into_iter().flatten().map(|server| Capture::tally(server, "eth0").unwrap());
        let servers = servers.collect();
        let portfwd = started(&rig, interfaces, &rules, flags, &directory);
        let lost = rig.lost_on_wire().unwrap();
        Self { portfwd, client, servers, rules, lost, rig, directory }
    }

    /// Adds up the flows of a tally by the rule that `of` finds for them.
    pub fn sum(
        &self,
        tally: &Tally,
        direction: Direction,
        of: impl Fn(&Rule, &Key) -> bool,
        mut add: impl FnMut(usize, Count),
    ) {
        for (key, count) in tally.flows.iter().filter(|(key, _)| key.direction == direction) {
            if let Some(rule) = self.rules.iter().position(|rule| of(rule, key)) {
                add(rule, *count);
            }
        }
    }

    /// What was sent by clients to the rules' ports, and by servers from the backends' ports. `other`
    /// is the traffic that looks like it, and is not.
    pub fn sent(&self, other: impl Fn(&Key) -> bool) -> Vec<Counts> {
        let mut counts = vec![Counts::default(); self.rules.len()];
        let asks =
            |rule: &Rule, key: &Key| rule.listens(key.protocol, key.destination) && !other(key);
        let answers =
            |rule: &Rule, key: &Key| rule.leads_to(key.protocol, key.source) && !other(key);
        self.client.look(|tally| {
            self.sum(tally, Direction::Sent, asks, |rule, count| counts[rule].forward += count);
        });
        for server in &self.servers {
            server.look(|tally| {
                self.sum(tally, Direction::Sent, answers, |rule, count| {
                    counts[rule].reply += count;
                });
            });
        }
        counts
    }

    /// What arrived of it.
    pub fn arrived(&self, other: impl Fn(&Key) -> bool) -> Vec<Counts> {
        let mut counts = vec![Counts::default(); self.rules.len()];
        let asks =
            |rule: &Rule, key: &Key| rule.leads_to(key.protocol, key.destination) && !other(key);
        let answers =
            |rule: &Rule, key: &Key| rule.listens(key.protocol, key.source) && !other(key);
        for server in &self.servers {
            server.look(|tally| {
                self.sum(tally, Direction::Received, asks, |rule, count| {
                    counts[rule].forward += count;
                });
            });
        }
        self.client.look(|tally| {
            self.sum(tally, Direction::Received, answers, |rule, count| {
                counts[rule].reply += count
            });
        });
        counts
    }

    /// Waits until portfwd has counted exactly what was sent; returns that.
    pub fn exact(&self, other: impl Fn(&Key) -> bool) -> Stats {
        poll(|| {
            let stats = Stats(self.portfwd.stats().unwrap());
            let counted: Vec<_> = self.rules.iter().map(|rule| stats.counts(&rule.name)).collect();
            let sent = self.sent(&other);
            if counted == sent {
                return Ok(stats);
            }
            let lost = self.rig.lost_on_wire().unwrap() - self.lost;
            let printed = self.portfwd.stderr();
            Err(format!(
                "counted {counted:#?}\nbut sent were {sent:#?}\nof which {lost} frames were lost \
                 before the router\n{printed}"
            ))
        })
    }

    /// The same, at the end of a test: each rule had traffic both ways, and nothing was dropped.
    pub fn settle(&self, other: impl Fn(&Key) -> bool) -> Stats {
        let stats = self.exact(other);
        for rule in &self.rules {
            let counts = stats.counts(&rule.name);
            let (forward, reply) = (counts.forward.packets, counts.reply.packets);
            assert!(forward > 0 && reply > 0, "{}: {counts:?}", rule.name);
            let dropped = &stats.rule(&rule.name)["dropped"];
            assert_eq!(total(dropped), 0, "{}: {dropped}", rule.name);
        }
        assert_eq!(total(&stats.0["verdicts"]["dropped"]), 0, "{}", stats.0);
        stats
    }

    /// Ends everything: each frame must have been valid.
    pub fn finish(self) {
        let (status, printed) = self.portfwd.stop().unwrap();
        assert!(status.success(), "{status}: {printed}");
        for capture in self.servers.into_iter().chain([self.client]) {
            let tally = capture.stop().unwrap();
            tally.ensure_valid().unwrap();
            assert!(tally.verified > 0);
        }
        assert_eq!(
            self.rig.lost_on_wire().unwrap(),
            self.lost,
            "frames were lost before the router"
        );
    }

    /// What most tests end with: all counts are exact, and all packets arrived.
    pub fn finish_exact(self) {
        self.settle(nothing);
        self.all_arrived(nothing);
        self.finish();
    }

    pub fn all_arrived(&self, other: impl Fn(&Key) -> bool) {
        poll(|| {
            let (sent, arrived) = (self.sent(&other), self.arrived(&other));
            let lost = || format!("sent {sent:#?}\nbut arrived {arrived:#?}");
            if sent == arrived { Ok(()) } else { Err(lost()) }
        });
    }
}

/// Looks again and again until there is what is looked for, or until it is too late.
pub fn poll<T>(mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match look() {
            Ok(found) => return found,
            Err(missing) => assert!(Instant::now() < deadline, "{missing}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// What `stats --json` printed.
pub struct Stats(pub Value);

impl Stats {
    pub fn rule(&self, name: &str) -> &Value {
        let rules = self.0["rules"].as_array().unwrap();
        rules.iter().find(|rule| rule["name"] == name).unwrap()
    }

    pub fn counts(&self, name: &str) -> Counts {
        let rule = self.rule(name);
        let count = |direction: &str| Count {
            packets: rule[direction]["packets"].as_u64().unwrap(),
            bytes: rule[direction]["bytes"].as_u64().unwrap(),
        };
        Counts { forward: count("forward"), reply: count("reply") }
    }

    pub fn to_stack(&self, name: &str, reason: &str) -> u64 {
        self.rule(name)["to_stack"][reason].as_u64().unwrap()
    }

    pub fn passed(&self, reason: &str) -> u64 {
        self.0["verdicts"]["passed"][reason].as_u64().unwrap()
    }
}

/// The sum of counts by reason.
pub fn total(reasons: &Value) -> u64 {
    reasons.as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
}

pub fn nothing(_: &Key) -> bool {
    false
}

pub fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

pub fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// External address and server, for each IP version.
pub fn both() -> [(IpAddr, IpAddr); 2] {
    let ([a, b], [c, d]) = (rig::WAN.both(), rig::SERVER.both());
    [(a, c), (b, d)]
}

/// Waits until a program has a socket on a port; `kind` is `-lt` or `-lu`.
pub fn wait_for_socket(namespace: &Namespace, kind: &str, address: SocketAddr) {
    let filter = format!("src {address}");
    poll(|| {
        let found = netns::run(namespace.command("ss").args(["-Hn", kind, &filter])).unwrap();
        let missing = || format!("nothing listens on {address} in {}", namespace.name());
        if found.is_empty() { Err(missing()) } else { Ok(()) }
    });
}

/// Sends bytes to an echo server over TCP, a connection for itself, and has them back.
pub fn echo_tcp(namespace: &Namespace, server: SocketAddr, size: usize) {
    let question: Vec<u8> = (0..size).map(|i| (i * 31) as u8).collect();
    let mut stream = peers::connect(namespace, server).unwrap();
    let mut answer = vec![0; size];
    thread::scope(|scope| {
        let mut writer = &stream;
        scope.spawn(move || writer.write_all(&question).unwrap());
        (&stream).read_exact(&mut answer).unwrap();
    });
    assert!(answer.iter().enumerate().all(|(i, byte)| *byte == (i * 31) as u8), "{server}");
    // Until the server has closed too: nothing is in flight after that.
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

pub fn echo_udp(namespace: &Namespace, server: SocketAddr) {
    let socket = peers::udp_client(namespace, server).unwrap();
    let question = format!("hello, {server}");
    let answer = peers::exchange(&socket, question.as_bytes());
    assert_eq!(answer.unwrap_or_else(|error| panic!("{server}: {error}")), question.as_bytes());
}

/// Asks a server that answers with the peer it sees: that must be this very socket.
pub fn is_seen_as_itself(namespace: &Namespace, server: SocketAddr) {
    let mut stream = peers::connect(namespace, server).unwrap();
    let mut seen = String::new();
    stream.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, stream.local_addr().unwrap().to_string(), "{server}/tcp");
    let socket = peers::udp_client(namespace, server).unwrap();
    let seen = peers::exchange(&socket, b"who am I?").unwrap();
    let me = socket.local_addr().unwrap().to_string();
    assert_eq!(String::from_utf8(seen).unwrap(), me, "{server}/udp");
}

pub fn sha256(file: &Path) -> String {
    let printed = netns::run(Command::new("sha256sum").arg("--").arg(file)).unwrap();
    printed.split_whitespace().next().unwrap().to_owned()
}

/// What the DNS server knows of `large.test`: no packet of an Ethernet holds it.
pub fn large_text() -> Vec<String> {
    ('a'..='l').map(|letter| letter.to_string().repeat(250)).collect()
}

/// dnsmasq at these addresses, with nothing of the machine's configuration.
pub fn dnsmasq_with(
    namespace: &Namespace,
    addresses: [IpAddr; 2],
    directory: &Path,
    options: &[&str],
) -> Background {
    let mut command = namespace.command("dnsmasq");
    command
        .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
        .args(["--user=root", "--bind-interfaces"])
        .args(addresses.map(|address| format!("--listen-address={address}")))
        .arg(format!("--pid-file={}/dnsmasq.pid", directory.display()))
        .arg(format!("--log-facility={}/dnsmasq.log", directory.display()))
        .args(options);
    Background::start(&mut command).unwrap()
}

/// A DNS server that knows two names, and asks no one.
pub fn dnsmasq(namespace: &Namespace, addresses: [IpAddr; 2], directory: &Path) -> Background {
    let large = format!("--txt-record=large.test,{}", large_text().join(","));
    let game = "--host-record=game.test,192.0.2.7,2001:db8::7";
    let options = ["--edns-packet-max=4096", game, &large];
    let dnsmasq = dnsmasq_with(namespace, addresses, directory, &options);
    for address in addresses {
        wait_for_socket(namespace, "-lt", at(address, 53));
        wait_for_socket(namespace, "-lu", at(address, 53));
    }
    dnsmasq
}

/// What dig prints as the answer, with these options.
pub fn dig_for(
    namespace: &Namespace,
    server: SocketAddr,
    options: &[&str],
    question: [&str; 2],
) -> String {
    let (to, port) = (format!("@{}", server.ip()), server.port().to_string());
    let mut dig = namespace.command("dig");
    dig.args(["-r", &to, "-p", &port, "+tries=1", "+timeout=3", "+short"]);
    netns::run(dig.args(options).args(question)).unwrap().trim().to_owned()
}

pub fn dig(namespace: &Namespace, server: SocketAddr) {
    for transport in ["+notcp", "+tcp"] {
        for (kind, answer) in [("A", "192.0.2.7"), ("AAAA", "2001:db8::7")] {
            let printed = dig_for(namespace, server, &[transport], ["game.test", kind]);
            assert_eq!(printed, answer, "{server} {transport}");
        }
    }
}

/// curl, which takes no proxy and no longer than half a minute.
pub fn curl(namespace: &Namespace) -> Command {
    let mut curl = namespace.command("curl");
    curl.args(["-sS", "--fail", "--noproxy", "*", "--max-time", "30"]);
    curl
}

/// A file of random bytes.
pub fn random_file(path: &Path, size: u64) {
    let mut random = File::open("/dev/urandom").unwrap().take(size);
    io::copy(&mut random, &mut File::create(path).unwrap()).unwrap();
}

/// The IP packets of frames one way between a port of the server and the client, in order.
pub fn packets(frames: &[Frame], direction: Direction, server: SocketAddr) -> Vec<Vec<u8>> {
    let of_interest = |frame: &&Frame| {
        frame.direction == direction
            && wire::verify(&frame.data)
                .unwrap()
                .is_some_and(|packet| [packet.source, packet.destination].contains(&server))
    };
    frames.iter().filter(of_interest).map(|frame| frame.data[14..].to_vec()).collect()
}
