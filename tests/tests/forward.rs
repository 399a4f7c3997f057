//! Real traffic of real programs through portfwd. Every frame at the client and the servers is
//! verified, and what the wire shows was sent is, to the packet and byte, what portfwd counts.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use portfwd_tests::netns::{self, Namespace};
use portfwd_tests::peers::{self, Answer, Background, Exchanges, Load, Pace, Server};
use portfwd_tests::rig::{self, Options, Rig};
use portfwd_tests::wire::{self, Capture, Count, Direction, Frame, Key, Tally};
use portfwd_tests::{Portfwd, TempDir, is_root};
use serde_json::Value;

const TCP: u8 = 6;
const UDP: u8 = 17;

const ANY: RangeInclusive<u16> = 0..=u16::MAX;

/// A rule: what the configuration says of it, and what the wire should show.
#[derive(Clone, Debug)]
struct Rule {
    name: String,
    protocol: &'static str,
    /// `None`: every external address of the backend's family.
    address: Option<IpAddr>,
    listen: RangeInclusive<u16>,
    /// Where the first listened port leads.
    backend: SocketAddr,
}

impl Rule {
    fn new(
        name: &str,
        protocol: &'static str,
        listen: RangeInclusive<u16>,
        backend: SocketAddr,
    ) -> Self {
        Self { name: name.to_owned(), protocol, address: None, listen, backend }
    }

    fn toml(&self) -> String {
        let ports = |first: u16| match (first, first + (self.listen.end() - self.listen.start())) {
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        let address_and = |address: IpAddr, ports: String| match address {
            IpAddr::V4(address) => format!("{address}:{ports}"),
            IpAddr::V6(address) => format!("[{address}]:{ports}"),
        };
        let listened =
            if self.listen == ANY { "*".to_owned() } else { ports(*self.listen.start()) };
        let listen =
            self.address.map_or(listened.clone(), |address| address_and(address, listened));
        let to = if self.backend.port() == *self.listen.start() {
            self.backend.ip().to_string()
        } else {
            address_and(self.backend.ip(), ports(self.backend.port()))
        };
        let Self { name, protocol, .. } = self;
        format!(
            "[[rule]]\nname = \"{name}\"\nprotocol = \"{protocol}\"\nlisten = \"{listen}\"\nto = \"{to}\"\n"
        )
    }

    fn has(&self, protocol: u8) -> bool {
        match protocol {
            TCP => self.protocol != "udp",
            UDP => self.protocol != "tcp",
            _ => false,
        }
    }

    /// Whether the rule listens at an address and port that belong to the router.
    fn listens(&self, protocol: u8, at: SocketAddr) -> bool {
        self.has(protocol)
            && at.is_ipv4() == self.backend.is_ipv4()
            && self.address.is_none_or(|address| address == at.ip())
            && self.listen.contains(&at.port())
    }

    fn leads_to(&self, protocol: u8, at: SocketAddr) -> bool {
        let width = self.listen.end() - self.listen.start();
        self.has(protocol)
            && at.ip() == self.backend.ip()
            && (self.backend.port()..=self.backend.port() + width).contains(&at.port())
    }
}

/// The same rule for the rig's server over each IP version. Two rules on one port cannot both listen on
/// every address, so that for IPv6 names the only one there is.
fn for_both(name: &str, protocol: &'static str, listen: RangeInclusive<u16>, to: u16) -> Vec<Rule> {
    let rule = |version, server| {
        Rule::new(&format!("{name}{version}"), protocol, listen.clone(), at(server, to))
    };
    let [v4, v6] = rig::SERVER.both();
    vec![rule(4, v4), Rule { address: Some(rig::WAN.v6.into()), ..rule(6, v6) }]
}

/// Counts of one rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    forward: Count,
    reply: Count,
}

/// portfwd on the router of a rig, with captures at the other ends.
struct Running {
    portfwd: Portfwd,
    client: Capture<Tally>,
    servers: Vec<Capture<Tally>>,
    /// Where rules overlap, the narrower first.
    rules: Vec<Rule>,
    /// Frames lost while interfaces came up and programs were attached.
    lost: u64,
    rig: Rig,
    directory: TempDir,
}

impl Running {
    fn start(rig: Rig, rules: Vec<Rule>) -> Self {
        Self::with(rig, rules, "external = [\"wan0\"]", &[])
    }

    /// `interfaces` stands at the beginning of the configuration, in `[interfaces]`.
    fn with(rig: Rig, rules: Vec<Rule>, interfaces: &str, flags: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        let config = directory.path().join("portfwd.toml");
        let text: String = rules.iter().map(Rule::toml).collect();
        fs::write(&config, format!("[interfaces]\n{interfaces}\n{text}")).unwrap();
        let client = Capture::tally(&rig.client, "eth0").unwrap();
        let servers = [Some(&rig.server), rig.second_server.as_ref()];
        let servers =
            servers.into_iter().flatten().map(|server| Capture::tally(server, "eth0").unwrap());
        let servers = servers.collect();
        let mut arguments = vec!["--config", config.to_str().unwrap()];
        arguments.extend(flags);
        let portfwd = Portfwd::start(&rig.router, &binary(), &arguments, directory.path()).unwrap();
        let lost = rig.lost_on_wire().unwrap();
        Self { portfwd, client, servers, rules, lost, rig, directory }
    }

    /// Adds up the flows of a tally by the rule that `of` finds for them.
    fn sum(
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
    fn sent(&self, other: impl Fn(&Key) -> bool) -> Vec<Counts> {
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
    fn arrived(&self, other: impl Fn(&Key) -> bool) -> Vec<Counts> {
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
    fn exact(&self, other: impl Fn(&Key) -> bool) -> Stats {
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
    fn settle(&self, other: impl Fn(&Key) -> bool) -> Stats {
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
    fn finish(self) {
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
    fn finish_exact(self) {
        self.settle(nothing);
        self.all_arrived(nothing);
        self.finish();
    }

    fn all_arrived(&self, other: impl Fn(&Key) -> bool) {
        poll(|| {
            let (sent, arrived) = (self.sent(&other), self.arrived(&other));
            let lost = || format!("sent {sent:#?}\nbut arrived {arrived:#?}");
            if sent == arrived { Ok(()) } else { Err(lost()) }
        });
    }
}

/// Looks again and again until there is what is looked for, or until it is too late.
fn poll<T>(mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match look() {
            Ok(found) => return found,
            Err(missing) => assert!(Instant::now() < deadline, "{missing}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// What `stats --json` printed.
struct Stats(Value);

impl Stats {
    fn rule(&self, name: &str) -> &Value {
        let rules = self.0["rules"].as_array().unwrap();
        rules.iter().find(|rule| rule["name"] == name).unwrap()
    }

    fn counts(&self, name: &str) -> Counts {
        let rule = self.rule(name);
        let count = |direction: &str| Count {
            packets: rule[direction]["packets"].as_u64().unwrap(),
            bytes: rule[direction]["bytes"].as_u64().unwrap(),
        };
        Counts { forward: count("forward"), reply: count("reply") }
    }

    fn to_stack(&self, name: &str, reason: &str) -> u64 {
        self.rule(name)["to_stack"][reason].as_u64().unwrap()
    }

    fn passed(&self, reason: &str) -> u64 {
        self.0["verdicts"]["passed"][reason].as_u64().unwrap()
    }
}

/// The sum of counts by reason.
fn total(reasons: &Value) -> u64 {
    reasons.as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
}

fn nothing(_: &Key) -> bool {
    false
}

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// External address and server, for each IP version.
fn both() -> [(IpAddr, IpAddr); 2] {
    let ([a, b], [c, d]) = (rig::WAN.both(), rig::SERVER.both());
    [(a, c), (b, d)]
}

fn binary() -> PathBuf {
    std::env::var_os("PORTFWD_BIN")
        .expect("PORTFWD_BIN must say where the binary is, as `cargo xtask test` does")
        .into()
}

/// Waits until a program has a socket on a port; `kind` is `-lt` or `-lu`.
fn wait_for_socket(namespace: &Namespace, kind: &str, address: SocketAddr) {
    let filter = format!("src {address}");
    poll(|| {
        let found = netns::run(namespace.command("ss").args(["-Hn", kind, &filter])).unwrap();
        let missing = || format!("nothing listens on {address} in {}", namespace.name());
        if found.is_empty() { Err(missing()) } else { Ok(()) }
    });
}

/// Sends bytes to an echo server over TCP, a connection for itself, and has them back.
fn echo_tcp(namespace: &Namespace, server: SocketAddr, size: usize) {
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

fn echo_udp(namespace: &Namespace, server: SocketAddr) {
    let socket = peers::udp_client(namespace, server).unwrap();
    let question = format!("hello, {server}");
    let answer = peers::exchange(&socket, question.as_bytes());
    assert_eq!(answer.unwrap_or_else(|error| panic!("{server}: {error}")), question.as_bytes());
}

/// Asks a server that answers with the peer it sees: that must be this very socket.
fn is_seen_as_itself(namespace: &Namespace, server: SocketAddr) {
    let mut stream = peers::connect(namespace, server).unwrap();
    let mut seen = String::new();
    stream.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, stream.local_addr().unwrap().to_string(), "{server}/tcp");
    let socket = peers::udp_client(namespace, server).unwrap();
    let seen = peers::exchange(&socket, b"who am I?").unwrap();
    let me = socket.local_addr().unwrap().to_string();
    assert_eq!(String::from_utf8(seen).unwrap(), me, "{server}/udp");
}

fn sha256(file: &Path) -> String {
    let printed = netns::run(Command::new("sha256sum").arg("--").arg(file)).unwrap();
    printed.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_download_from_nginx_arrives_whole() {
    if !is_root() {
        return;
    }
    const SIZE: u64 = 100 << 20;
    let running = Running::start(Rig::new().unwrap(), for_both("web", "tcp", 8080..=8080, 80));
    let directory = running.directory.path();
    let file = directory.join("file");
    io::copy(
        &mut File::open("/dev/urandom").unwrap().take(SIZE),
        &mut File::create(&file).unwrap(),
    )
    .unwrap();
    let path = directory.display();
    let listen: String =
        both().iter().map(|(_, server)| format!("listen {};", at(*server, 80))).collect();
    fs::write(
        directory.join("nginx.conf"),
        format!(
            "daemon off; user root; worker_processes 1; pid {path}/nginx.pid;
             error_log {path}/nginx.log;
             events {{}}
             http {{
               access_log off; client_body_temp_path {path}/body; proxy_temp_path {path}/proxy;
               fastcgi_temp_path {path}/fastcgi; uwsgi_temp_path {path}/uwsgi;
               scgi_temp_path {path}/scgi;
               server {{ root {path}; {listen} }}
             }}"
        ),
    )
    .unwrap();
    let _nginx = Background::start(
        running
            .rig
            .server
            .command("nginx")
            .args(["-e", "nginx.log", "-c", "nginx.conf", "-p"])
            .arg(directory),
    )
    .unwrap();
    let sum = sha256(&file);
    for (wan, server) in both() {
        wait_for_socket(&running.rig.server, "-lt", at(server, 80));
        let copy = directory.join("copy");
        let url = format!("http://{}/file", at(wan, 8080));
        netns::run(
            running
                .rig
                .client
                .command("curl")
                .args(["-sS", "--fail", "--noproxy", "*", "--max-time", "30", &url, "-o"])
                .arg(&copy),
        )
        .unwrap();
        assert_eq!(fs::metadata(&copy).unwrap().len(), SIZE);
        assert_eq!(sha256(&copy), sum, "{url}");
    }
    let stats = running.settle(nothing);
    for rule in &running.rules {
        assert!(stats.counts(&rule.name).reply.bytes > SIZE);
    }
    running.finish();
}

/// iperf3 through a rule with another port, one IP version: TCP and UDP, up and down.
fn iperf(wan: IpAddr, server: IpAddr) {
    let rule = Rule::new("iperf", "tcp+udp", 5301..=5301, at(server, 5201));
    let running = Running::start(Rig::new().unwrap(), vec![rule]);
    let bind = server.to_string();
    let log = File::create(running.directory.path().join("iperf3.log")).unwrap();
    let _iperf = Background::start(
        running
            .rig
            .server
            .command("iperf3")
            .args(["-s", "-p", "5201", "-B", &bind])
            .stdout(log.try_clone().unwrap())
            .stderr(log),
    )
    .unwrap();
    wait_for_socket(&running.rig.server, "-lt", at(server, 5201));
    let wan = wan.to_string();
    for flags in [&[][..], &["-R"], &["-u"], &["-u", "-R"]] {
        // TCP at its own pace would be all that two processors can do.
        let rate = if flags.contains(&"-u") { "20M" } else { "200M" };
        let mut client = running.rig.client.command("iperf3");
        client.args(["-c", &wan, "-p", "5301", "-t", "1", "-b", rate, "-l", "1200", "--json"]);
        client.args(flags);
        // The server may not be done with the run before.
        let result: Value = poll(|| {
            let printed = netns::run(&mut client).map_err(|error| format!("{error:#}"))?;
            let result: Value = serde_json::from_str(&printed).unwrap();
            result.get("error").map_or(Ok(result.clone()), |error| Err(error.to_string()))
        });
        let end = &result["end"];
        let received = if flags.contains(&"-u") { "sum" } else { "sum_received" };
        let bytes = end[received]["bytes"].as_u64().unwrap_or_else(|| panic!("{result:#}"));
        assert!(bytes > 100_000, "{flags:?}: {end:#}");
    }
    let stats = running.settle(nothing);
    let counts = stats.counts("iperf");
    // Both ways, a second at 20 Mbit/s at least, less what a busy machine may not manage.
    assert!(counts.forward.bytes > 1_000_000 && counts.reply.bytes > 1_000_000, "{counts:?}");
    running.finish();
}

#[test]
fn iperf3_runs_both_ways_over_ipv4() {
    if !is_root() {
        return;
    }
    let [(wan, server), _] = both();
    iperf(wan, server);
}

#[test]
fn iperf3_runs_both_ways_over_ipv6() {
    if !is_root() {
        return;
    }
    let [_, (wan, server)] = both();
    iperf(wan, server);
}

/// A DNS server that knows one name, and asks no one.
fn dnsmasq(namespace: &Namespace, addresses: [IpAddr; 2], directory: &Path) -> Background {
    let mut command = namespace.command("dnsmasq");
    command
        .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
        .args(["--user=root", "--bind-interfaces", "--host-record=game.test,192.0.2.7,2001:db8::7"])
        .args(addresses.map(|address| format!("--listen-address={address}")))
        .arg(format!("--pid-file={}/dnsmasq.pid", directory.display()))
        .arg(format!("--log-facility={}/dnsmasq.log", directory.display()));
    let dnsmasq = Background::start(&mut command).unwrap();
    for address in addresses {
        wait_for_socket(namespace, "-lt", at(address, 53));
        wait_for_socket(namespace, "-lu", at(address, 53));
    }
    dnsmasq
}

fn dig(namespace: &Namespace, server: SocketAddr) {
    let (to, port) = (format!("@{}", server.ip()), server.port().to_string());
    for transport in ["+notcp", "+tcp"] {
        for (kind, answer) in [("A", "192.0.2.7"), ("AAAA", "2001:db8::7")] {
            let mut dig = namespace.command("dig");
            dig.args(["-r", &to, "-p", &port, transport, "+tries=1", "+timeout=3", "+short"]);
            let printed = netns::run(dig.args(["game.test", kind])).unwrap();
            assert_eq!(printed.trim(), answer, "{server} {transport}");
        }
    }
}

#[test]
fn dig_asks_a_real_dns_server() {
    if !is_root() {
        return;
    }
    let running = Running::start(Rig::new().unwrap(), for_both("dns", "tcp+udp", 5353..=5353, 53));
    let _dns = dnsmasq(&running.rig.server, rig::SERVER.both(), running.directory.path());
    for (wan, _) in both() {
        dig(&running.rig.client, at(wan, 5353));
    }
    running.finish_exact();
}

#[test]
fn a_thousand_connections_are_open_at_once() {
    if !is_root() {
        return;
    }
    const EACH: usize = 500;
    raise_file_limit();
    let running = Running::start(Rig::new().unwrap(), for_both("web", "tcp", 8080..=8080, 80));
    let servers = both()
        .map(|(_, server)| Server::tcp(&running.rig.server, at(server, 80), Answer::Echo).unwrap());
    let streams: Vec<TcpStream> = running.rig.client.enter(|| {
        let wans = rig::WAN.both().into_iter().cycle().take(2 * EACH);
        wans.map(|wan| TcpStream::connect(at(wan, 8080)).unwrap()).collect()
    });
    // A few at a time, though all are open: what a veth holds is limited.
    let question = |number: usize| format!("{number:0>1999}\n").into_bytes();
    let numbered: Vec<_> = streams.iter().enumerate().collect();
    for some in numbered.chunks(20) {
        for &(number, mut stream) in some {
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            stream.write_all(&question(number)).unwrap();
        }
        for &(number, mut stream) in some {
            let mut answer = vec![0; 2000];
            stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("{number}: {error}"));
            assert_eq!(answer, question(number));
        }
    }
    for some in numbered.chunks(20) {
        for &(_, stream) in some {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        for &(_, mut stream) in some {
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        }
    }
    let stats = running.settle(nothing);
    let segment = u64::try_from(2000 * EACH).unwrap();
    for rule in &running.rules {
        let counts = stats.counts(&rule.name);
        assert!(counts.forward.bytes > segment && counts.reply.bytes > segment, "{counts:?}");
    }
    let connections = running.client.look(|tally| {
        tally
            .flows
            .keys()
            .filter(|key| key.direction == Direction::Sent && key.protocol == TCP)
            .count()
    });
    assert_eq!(connections, 2 * EACH);
    drop(servers);
    running.finish_exact();
}

/// Both ends of a thousand connections are in this process.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel reads and writes one rlimit.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_cur.max(8192);
        limit.rlim_max = limit.rlim_max.max(limit.rlim_cur);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
}

#[test]
fn the_server_sees_the_clients_address_and_port() {
    if !is_root() {
        return;
    }
    let running =
        Running::start(Rig::new().unwrap(), for_both("game", "tcp+udp", 9000..=9000, 27015));
    let frames =
        [&running.rig.client, &running.rig.server].map(|end| Capture::start(end, "eth0").unwrap());
    for (wan, server) in both() {
        let _tcp = Server::tcp(&running.rig.server, at(server, 27015), Answer::Peer).unwrap();
        let _udp = Server::udp(&running.rig.server, at(server, 27015), Answer::Peer).unwrap();
        for _ in 0..20 {
            is_seen_as_itself(&running.rig.client, at(wan, 9000));
        }
    }
    // What was sent with 64 hops has 63 left.
    for frames in frames {
        let frames = frames.stop().unwrap();
        for (wan, server) in both() {
            let places = [at(wan, 9000), at(server, 27015)];
            let packets = places.map(|place| packets(&frames, Direction::Received, place)).concat();
            assert!(packets.len() >= 20 * 4);
            for packet in packets {
                assert_eq!(if wan.is_ipv4() { packet[8] } else { packet[7] }, 63, "{packet:02x?}");
            }
        }
    }
    running.finish_exact();
}

#[test]
fn each_port_of_a_range_leads_to_its_own() {
    if !is_root() {
        return;
    }
    let mut rules = for_both("same", "tcp+udp", 27015..=27018, 27015);
    rules.extend(for_both("shifted", "tcp+udp", 8000..=8099, 9000));
    // Across a page of 256 ports, and into the ports that the kernel picks from.
    rules.extend(for_both("wide", "tcp+udp", 40190..=40310, 50250));
    let running = Running::start(Rig::new().unwrap(), rules);
    let ports = [
        (27015, 27015),
        (27016, 27016),
        (27018, 27018),
        (8000, 9000),
        (8050, 9050),
        (8099, 9099),
        (40190, 50250),
        (40191, 50251),
        (40192, 50252),
        (40310, 50370),
    ];
    for (wan, server) in both() {
        for (listen, backend) in ports {
            // Nothing else listens, so an answer says that it came to the right port.
            let _tcp = Server::tcp(&running.rig.server, at(server, backend), Answer::Peer).unwrap();
            let _udp = Server::udp(&running.rig.server, at(server, backend), Answer::Peer).unwrap();
            is_seen_as_itself(&running.rig.client, at(wan, listen));
        }
        // The router refuses what lies just outside.
        for outside in [27014, 27019, 7999, 8100, 40189, 40311] {
            let error = peers::connect(&running.rig.client, at(wan, outside)).unwrap_err();
            assert!(format!("{error:#}").contains("refused"), "{outside}: {error:#}");
        }
    }
    running.finish_exact();
}

#[test]
fn every_udp_port_leads_to_the_backend() {
    if !is_root() {
        return;
    }
    let running = Running::start(Rig::new().unwrap(), for_both("all", "udp", ANY, 0));
    for (wan, server) in both() {
        for port in [1, 53, 255, 256, 27015, 40_000, 65_535] {
            let _udp = Server::udp(&running.rig.server, at(server, port), Answer::Echo).unwrap();
            echo_udp(&running.rig.client, at(wan, port));
        }
        let error = peers::connect(&running.rig.client, at(wan, 27015)).unwrap_err();
        assert!(format!("{error:#}").contains("refused"), "{error:#}");
    }
    running.finish_exact();
}

#[test]
fn the_dmz_host_gets_what_no_narrower_rule_claims() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { second_server: true, ..Options::default() }).unwrap();
    let mut rules = for_both("web", "tcp", 8080..=8080, 80);
    let [v4, v6] = rig::SECOND_SERVER.both();
    rules.push(Rule::new("dmz4", "any", ANY, at(v4, 0)));
    rules.push(Rule {
        address: Some(rig::WAN.v6.into()),
        ..Rule::new("dmz6", "any", ANY, at(v6, 0))
    });
    let running = Running::start(rig, rules);
    let second = running.rig.second_server.as_ref().unwrap();
    for ((wan, server), dmz) in both().into_iter().zip(rig::SECOND_SERVER.both()) {
        let web = Server::tcp(&running.rig.server, at(server, 80), Answer::Peer).unwrap();
        for port in [1, 22, 80, 8081, 33_000, 65_535] {
            let _tcp = Server::tcp(second, at(dmz, port), Answer::Peer).unwrap();
            let _udp = Server::udp(second, at(dmz, port), Answer::Peer).unwrap();
            is_seen_as_itself(&running.rig.client, at(wan, port));
        }
        assert!(web.seen().is_empty());
        let seen = peers::ask_tcp(&running.rig.client, at(wan, 8080)).unwrap();
        assert!(rig::CLIENT.both().contains(&seen.ip()));
        // The same port, of the protocol that the narrower rule does not have.
        let _udp = Server::udp(second, at(dmz, 8080), Answer::Echo).unwrap();
        echo_udp(&running.rig.client, at(wan, 8080));
    }
    running.finish_exact();
}

#[test]
fn each_external_address_answers_for_itself() {
    if !is_root() {
        return;
    }
    let external = ["198.51.100.7/24", "198.51.100.8/24", "2001:db8:1::7/64", "2001:db8:1::8/64"];
    let options = Options { external: &external, second_server: true, ..Options::default() };
    let wans = [
        (7000, [rig::WAN.v4.into(), address("198.51.100.7"), address("198.51.100.8")]),
        (8000, [rig::WAN.v6.into(), address("2001:db8:1::7"), address("2001:db8:1::8")]),
    ];
    let mut rules = Vec::new();
    for (((_, server), second), (port, [_, bound, _])) in
        both().into_iter().zip(rig::SECOND_SERVER.both()).zip(wans)
    {
        let version = if server.is_ipv4() { "4" } else { "6" };
        let rule = Rule::new(&format!("bound{version}"), "tcp+udp", port..=port, at(second, 7001));
        rules.push(Rule { address: Some(bound), ..rule });
        rules.push(Rule::new(&format!("all{version}"), "tcp+udp", port..=port, at(server, 7002)));
    }
    let running = Running::start(Rig::with(options).unwrap(), rules);
    let client = &running.rig.client;
    let second_server = running.rig.second_server.as_ref().unwrap();
    for (((_, server), second), (port, [first, bound, last])) in
        both().into_iter().zip(rig::SECOND_SERVER.both()).zip(wans)
    {
        let all = (
            Server::tcp(&running.rig.server, at(server, 7002), Answer::Peer).unwrap(),
            Server::udp(&running.rig.server, at(server, 7002), Answer::Peer).unwrap(),
        );
        // A connected socket takes no answer from another address.
        is_seen_as_itself(client, at(first, port));
        is_seen_as_itself(client, at(last, port));
        let _bound = (
            Server::tcp(second_server, at(second, 7001), Answer::Peer).unwrap(),
            Server::udp(second_server, at(second, 7001), Answer::Peer).unwrap(),
        );
        drop(all);
        is_seen_as_itself(client, at(bound, port));

        // One socket that comes by both addresses in turn has each answer from the one it asked.
        let _all = Server::udp(&running.rig.server, at(server, 7002), Answer::Echo).unwrap();
        let any = if first.is_ipv4() { address("0.0.0.0") } else { address("::") };
        let socket = client.enter(|| UdpSocket::bind((any, 0))).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        for asked in [first, last, last, first, last, first, first] {
            let mut answer = [0; 64];
            socket.send_to(asked.to_string().as_bytes(), at(asked, port)).unwrap();
            let (length, from) = socket.recv_from(&mut answer).unwrap();
            assert_eq!(from, at(asked, port));
            assert_eq!(answer[..length], *asked.to_string().as_bytes());
        }
    }
    running.finish_exact();
}

/// The IP packets of frames one way between a port of the server and the client, in order.
fn packets(frames: &[Frame], direction: Direction, server: SocketAddr) -> Vec<Vec<u8>> {
    let of_interest = |frame: &&Frame| {
        frame.direction == direction
            && wire::verify(&frame.data)
                .unwrap()
                .is_some_and(|packet| [packet.source, packet.destination].contains(&server))
    };
    frames.iter().filter(of_interest).map(|frame| frame.data[14..].to_vec()).collect()
}

/// What a router makes of an IP packet: one hop less, and nothing else.
fn routed(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        // The checksum is over words, of which the TTL is an upper byte.
        packet[8] -= 1;
        let sum = u32::from(u16::from_be_bytes([packet[10], packet[11]])) + 0x100;
        let sum = (sum & 0xffff) + (sum >> 16);
        packet[10..12].copy_from_slice(&(sum as u16).to_be_bytes());
    } else {
        packet[7] -= 1;
    }
    packet
}

#[test]
fn traffic_that_no_rule_claims_is_untouched() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { second_server: true, ..Options::default() }).unwrap();
    rig.client.ip(&format!("route add 192.168.77.0/24 via {}", rig::WAN.v4)).unwrap();
    rig.client.ip(&format!("route add fd77::/64 via {}", rig::WAN.v6)).unwrap();
    let rules = for_both("game", "tcp+udp", 27015..=27015, 27015);
    let interfaces = "external = [\"wan0\"]\ninternal = [\"lan0\", \"lan1\"]";
    let running = Running::with(rig, rules, interfaces, &[]);
    let Rig { client, router, server, .. } = &running.rig;
    let second = running.rig.second_server.as_ref().unwrap();
    let client_frames = Capture::start(client, "eth0").unwrap();
    let server_frames = Capture::start(server, "eth0").unwrap();
    for ((wan, backend), lan) in both().into_iter().zip(rig::LAN.both()) {
        // Services of the router itself.
        let _echo = (
            Server::tcp(router, at(wan, 7), Answer::Echo).unwrap(),
            Server::udp(router, at(wan, 7), Answer::Echo).unwrap(),
        );
        echo_tcp(client, at(wan, 7), 20_000);
        echo_udp(client, at(wan, 7));

        // What the kernel routes.
        let _routed = (
            Server::tcp(server, at(backend, 4000), Answer::Echo).unwrap(),
            Server::udp(server, at(backend, 4000), Answer::Echo).unwrap(),
        );
        echo_tcp(client, at(backend, 4000), 20_000);
        echo_udp(client, at(backend, 4000));

        // A rule's backend, from the client by the rule, and from inside: from the
        // router and from another network.
        let game = (
            Server::tcp(server, at(backend, 27015), Answer::Echo).unwrap(),
            Server::udp(server, at(backend, 27015), Answer::Echo).unwrap(),
        );
        echo_tcp(client, at(wan, 27015), 20_000);
        echo_udp(client, at(wan, 27015));
        echo_tcp(router, at(backend, 27015), 20_000);
        echo_udp(router, at(backend, 27015));
        echo_tcp(second, at(backend, 27015), 20_000);
        echo_udp(second, at(backend, 27015));

        // The backend asks the router, from the very port.
        drop(game);
        let _lan = Server::udp(router, at(lan, 7), Answer::Peer).unwrap();
        let socket = server.enter(|| UdpSocket::bind(at(backend, 27015))).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        server.enter(|| socket.connect(at(lan, 7))).unwrap();
        let seen = peers::exchange(&socket, b"who am I?").unwrap();
        assert_eq!(seen, at(backend, 27015).to_string().as_bytes());
    }

    let inside = |key: &Key| {
        [rig::LAN, rig::SECOND_SERVER]
            .iter()
            .any(|hosts| hosts.both().contains(&key.destination.ip()))
    };
    let stats = running.settle(inside);
    let not_external = running.servers[0].look(|tally| {
        tally.count(|key| {
            key.direction == Direction::Sent && key.source.port() == 27015 && inside(key)
        })
    });
    assert!(not_external.packets > 0);
    assert_eq!(stats.passed("not_external"), not_external.packets);

    let client_frames = client_frames.stop().unwrap();
    let server_frames = server_frames.stop().unwrap();
    for (_, backend) in both() {
        let service = at(backend, 4000);
        for (from, to) in [(&client_frames, &server_frames), (&server_frames, &client_frames)] {
            let sent = packets(from, Direction::Sent, service);
            let arrived = packets(to, Direction::Received, service);
            assert!(sent.len() > 10, "{}", sent.len());
            assert_eq!(sent.into_iter().map(routed).collect::<Vec<_>>(), arrived);
        }
    }
    running.finish();
}

/// Every IP packet that came in is either the rules' or passed, and once.
#[test]
fn every_packet_is_accounted_for_once() {
    if !is_root() {
        return;
    }
    let running =
        Running::start(Rig::new().unwrap(), for_both("game", "udp", 27015..=27015, 27015));
    let Rig { client, router, server, .. } = &running.rig;
    for (wan, backend) in both() {
        let _game = Server::udp(server, at(backend, 27015), Answer::Echo).unwrap();
        let _echo = Server::udp(router, at(wan, 7), Answer::Echo).unwrap();
        let pace = Pace { per_second: 2000, limit: Some(300) };
        let game = Load::udp(client, at(wan, 27015), 100, pace).unwrap();
        let other = Load::udp(client, at(wan, 7), 100, pace).unwrap();
        assert_eq!(game.finish(), Exchanges { asked: 300, answered: 300 });
        assert_eq!(other.finish(), Exchanges { asked: 300, answered: 300 });
        // The client says by ICMP that nothing listens there.
        let client_address =
            if wan.is_ipv4() { rig::CLIENT.v4.into() } else { rig::CLIENT.v6.into() };
        let socket = peers::udp_client(router, at(client_address, 9)).unwrap();
        let error = peers::exchange(&socket, b"hello").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    running.settle(nothing);
    poll(|| {
        let stats = Stats(running.portfwd.stats().unwrap());
        let unicast =
            |key: &Key| key.direction == Direction::Sent && !key.destination.ip().is_multicast();
        let ends = running.servers.iter().chain([&running.client]);
        let sent: Count = ends.map(|end| end.look(|tally| tally.count(unicast))).sum();
        let rules = running.rules.iter().map(|rule| stats.counts(&rule.name));
        let translated: Count = rules.flat_map(|counts| [counts.forward, counts.reply]).sum();
        let passed =
            total(&stats.0["verdicts"]["passed"]) - stats.passed("group") - stats.passed("not_ip");
        if sent.packets != translated.packets + passed {
            return Err(format!("{sent} were sent: {:#}", stats.0));
        }
        assert_eq!(translated.packets, 4 * 300);
        assert!(stats.passed("no_rule") >= 600 && stats.passed("icmp") >= 2, "{}", stats.0);
        Ok(())
    });
    running.finish();
}

#[test]
fn the_box_keeps_its_own_traffic_beside_a_dmz_host() {
    if !is_root() {
        return;
    }
    let running = Running::start(Rig::new().unwrap(), for_both("dmz", "any", ANY, 0));
    let Rig { client, router, server, .. } = &running.rig;
    let _dns = dnsmasq(client, rig::CLIENT.both(), running.directory.path());
    for ((wan, backend), outside) in both().into_iter().zip(rig::CLIENT.both()) {
        // What the box asks: by UDP and by TCP.
        dig(router, at(outside, 53));
        let _far = Server::tcp(client, at(outside, 4000), Answer::Echo).unwrap();
        echo_tcp(router, at(outside, 4000), 20_000);
        // What it is asked.
        let _ssh = Server::tcp(router, at(wan, 22), Answer::Echo).unwrap();
        let _ntp = Server::udp(router, at(wan, 123), Answer::Echo).unwrap();
        echo_tcp(client, at(wan, 22), 20_000);
        echo_udp(client, at(wan, 123));
        // All else is the DMZ host's, the same ports of the other protocol too.
        for port in [23, 123, 2222, 50_000] {
            let _tcp = Server::tcp(server, at(backend, port), Answer::Echo).unwrap();
            echo_tcp(client, at(wan, port), 20_000);
        }
        for port in [22, 53, 2222, 50_000] {
            let _udp = Server::udp(server, at(backend, port), Answer::Echo).unwrap();
            echo_udp(client, at(wan, port));
        }
    }
    let own = |key: &Key| {
        let clients = rig::CLIENT.both();
        // Seen from the client, whichever way the packet goes.
        let (near, far) = if clients.contains(&key.source.ip()) {
            (key.source, key.destination)
        } else {
            (key.destination, key.source)
        };
        clients.contains(&near.ip())
            && rig::WAN.both().contains(&far.ip())
            && (matches!(near.port(), 53 | 4000)
                || matches!((key.protocol, far.port()), (TCP, 22) | (UDP, 123)))
    };
    let stats = running.settle(own);
    running.all_arrived(own);
    let kept = running.client.look(|tally| {
        tally.count(|key| {
            key.direction == Direction::Sent && matches!(key.protocol, TCP | UDP) && own(key)
        })
    });
    assert!(kept.packets > 0);
    assert_eq!(stats.passed("own_socket"), kept.packets);
    running.finish();
}

#[test]
fn a_first_packet_without_neighbours_is_not_lost() {
    if !is_root() {
        return;
    }
    let running = Running::start(Rig::new().unwrap(), for_both("game", "udp", 27015..=27015, 9));
    let Rig { client, router, server, .. } = &running.rig;
    for (rule, (wan, backend)) in running.rules.iter().zip(both()) {
        let _game = Server::udp(server, at(backend, 9), Answer::Echo).unwrap();
        // Now the client and the server know the router, and the router knows them.
        echo_udp(client, at(wan, 27015));
        let before = running.exact(nothing);
        router.ip("neigh flush all").unwrap();
        echo_udp(client, at(wan, 27015));
        let after = running.exact(nothing);
        let packets = |stats: &Stats| {
            let Counts { forward, reply } = stats.counts(&rule.name);
            (forward.packets, reply.packets)
        };
        let (asked, answered) = packets(&before);
        assert_eq!(packets(&after), (asked + 1, answered + 1), "one question, one answer");
        // No one but the packet itself could make the client known again.
        assert!(
            after.to_stack(&rule.name, "no_neighbour")
                > before.to_stack(&rule.name, "no_neighbour")
        );
    }
    running.finish_exact();
}

#[test]
fn verbose_shows_each_packet_and_silence_none() {
    if !is_root() {
        return;
    }
    for verbose in [true, false] {
        let flags = if verbose { &["-v"][..] } else { &[] };
        let rules = for_both("game", "udp", 9000..=9000, 27015);
        let running = Running::with(Rig::new().unwrap(), rules, "external = [\"wan0\"]", flags);
        let mut lines = Vec::new();
        for (wan, backend) in both() {
            let _game = Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap();
            let socket = peers::udp_client(&running.rig.client, at(wan, 9000)).unwrap();
            assert_eq!(peers::exchange(&socket, b"hello").unwrap(), b"hello");
            let me = socket.local_addr().unwrap();
            lines.push(format!("{me} -> {}", at(wan, 9000)));
            lines.push(format!("{} -> {me}", at(backend, 27015)));
        }
        if verbose {
            poll(|| {
                let printed = running.portfwd.stderr();
                let missing = lines.iter().find(|line| !printed.contains(*line));
                missing.map_or(Ok(()), |line| Err(format!("{line} is not in\n{printed}")))
            });
        }
        running.settle(nothing);
        if !verbose {
            let (_, printed) = running.portfwd.stop().unwrap();
            assert!(!printed.contains(" -> ") && printed.contains("wan0"), "{printed}");
        } else {
            running.finish_exact();
        }
    }
}

#[test]
fn prometheus_scrapes_the_counters() {
    if !is_root() {
        return;
    }
    let interfaces = "external = [\"wan0\"]\n[metrics]\nlisten = \"127.0.0.1:9464\"";
    let rules = for_both("game", "udp", 9000..=9000, 27015);
    let running = Running::with(Rig::new().unwrap(), rules, interfaces, &[]);
    for (wan, backend) in both() {
        let _game = Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap();
        for _ in 0..7 {
            echo_udp(&running.rig.client, at(wan, 9000));
        }
    }
    let stats = running.settle(nothing);
    let mut curl = running.rig.router.command("curl");
    curl.args(["-sS", "--fail", "--noproxy", "*", "--max-time", "5"]);
    let text = netns::run(curl.arg("http://127.0.0.1:9464/metrics")).unwrap();
    for rule in &running.rules {
        let Counts { forward, reply } = stats.counts(&rule.name);
        assert_eq!((forward.packets, reply.packets), (7, 7));
        for (direction, count) in [("forward", forward), ("reply", reply)] {
            let labels = format!("{{rule=\"{}\",direction=\"{direction}\"}}", rule.name);
            for line in [
                format!("portfwd_packets_total{labels} {}", count.packets),
                format!("portfwd_bytes_total{labels} {}", count.bytes),
            ] {
                assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
            }
        }
    }
    running.finish_exact();
}

/// How `list --json` says an interface is attached.
fn attached(portfwd: &Portfwd, interface: &str) -> String {
    let list = portfwd.json("list").unwrap();
    let interfaces = list["interfaces"].as_array().unwrap();
    let found = interfaces.iter().find(|found| found["name"] == interface);
    found.unwrap_or_else(|| panic!("{list}"))["attach"].as_str().unwrap().to_owned()
}

/// TCP and UDP exchanges by a rule from 9000 to 27015.
fn exchange_by_rule(running: &Running) {
    for (wan, backend) in both() {
        let _game = (
            Server::tcp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap(),
            Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap(),
        );
        echo_tcp(&running.rig.client, at(wan, 9000), 2_000_000);
        for _ in 0..20 {
            echo_udp(&running.rig.client, at(wan, 9000));
        }
    }
}

#[test]
fn generic_xdp_forwards_too() {
    if !is_root() {
        return;
    }
    let rules = for_both("game", "tcp+udp", 9000..=9000, 27015);
    let interfaces = "external = [\"wan0\"]\nattach = \"generic\"";
    let running = Running::with(Rig::new().unwrap(), rules, interfaces, &[]);
    for interface in ["wan0", "lan0"] {
        assert_eq!(attached(&running.portfwd, interface), "generic");
    }
    exchange_by_rule(&running);
    let stats = running.settle(nothing);
    for rule in &running.rules {
        assert_eq!(stats.to_stack(&rule.name, "no_xdp_transmit"), 0);
    }
    running.finish_exact();
}

/// A bridge has no native XDP, and cannot be redirected to from a driver.
#[test]
fn auto_falls_back_to_generic_and_says_so() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    for command in [
        "link add br0 type bridge mcast_snooping 0".to_owned(),
        "address flush dev lan0".to_owned(),
        "link set lan0 master br0".to_owned(),
        "link set br0 up".to_owned(),
        format!("address add {}/24 dev br0", rig::LAN.v4),
        format!("address add {}/64 dev br0 nodad", rig::LAN.v6),
    ] {
        rig.router.ip(&command).unwrap();
    }
    let running = Running::start(rig, for_both("game", "tcp+udp", 9000..=9000, 27015));
    assert_eq!(attached(&running.portfwd, "wan0"), "native");
    assert_eq!(attached(&running.portfwd, "br0"), "generic");
    let printed = running.portfwd.stderr();
    let line = printed.lines().find(|line| line.contains("br0") && line.contains("generic XDP"));
    let line = line.unwrap_or_else(|| panic!("{printed}"));
    assert!(line.contains("WARN") && line.contains("no native XDP"), "{line}");
    exchange_by_rule(&running);
    let stats = running.settle(nothing);
    for rule in &running.rules {
        let counts = stats.counts(&rule.name);
        // Neighbours are known from the first packet on, so all of them go this way.
        assert!(stats.to_stack(&rule.name, "no_xdp_transmit") > 0);
        assert!(stats.to_stack(&rule.name, "no_xdp_transmit") <= counts.forward.packets);
    }
    running.finish_exact();
}
