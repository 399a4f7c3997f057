//! Stateful rules with real sockets and programs: masquerade, several backends, ports that become one,
//! clients inside, one-armed boxes, and the list of flows.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use portfwd_tests::peers::{self, Answer, Background, Server, ask_tcp, ask_udp};
use portfwd_tests::rig::{self, Options, Rig};
use portfwd_tests::wire::{Capture, Tally};
use portfwd_tests::{Namespace, Portfwd, TempDir, binary, is_root, netns};
use serde_json::Value;

/// portfwd on the router of a rig, with a capture at each other end.
struct Running {
    portfwd: Portfwd,
    captures: Vec<Capture<Tally>>,
    rig: Rig,
    _directory: TempDir,
}

impl Running {
    fn start(rig: Rig, config: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let file = directory.path().join("portfwd.toml");
        fs::write(&file, portfwd_tests::interfaces("external = [\"wan0\"]") + config).unwrap();
        let ends = [Some(&rig.client), Some(&rig.server), rig.second_server.as_ref()];
        let capture = |end: &Namespace| Capture::tally(end, "eth0").unwrap();
        let captures = ends.into_iter().flatten().map(capture).collect();
        let arguments = ["--config".as_ref(), file.as_os_str()];
        let portfwd = Portfwd::start(&rig.router, &binary(), &arguments, directory.path()).unwrap();
        Self { portfwd, captures, rig, _directory: directory }
    }

    /// Ends everything: each frame must have been valid.
    fn finish(self) {
        let (status, printed) = self.portfwd.stop().unwrap();
        assert!(status.success(), "{status}: {printed}");
        for capture in self.captures {
            let tally = capture.stop().unwrap();
            tally.ensure_valid().unwrap();
            assert!(tally.verified > 0);
        }
    }

    fn rule(&self, name: &str) -> Value {
        let stats = self.portfwd.stats().unwrap();
        let rules = stats["rules"].as_array().unwrap();
        rules.iter().find(|rule| rule["name"] == name).unwrap().clone()
    }

    fn flows(&self) -> Vec<Value> {
        self.portfwd.json("flows").unwrap()["flows"].as_array().unwrap().clone()
    }
}

/// The same rule for each family: `{}` stands for the backends' addresses.
fn for_both(name: &str, keys: &str, hosts: &[&str]) -> String {
    let to = |prefix: &str, bracket: [&str; 2]| -> String {
        let hosts = hosts.iter().map(|host| {
            let (host, port) = host.split_once(':').unwrap_or((host, ""));
            let colon = if port.is_empty() { "" } else { ":" };
            let [open, close] = if port.is_empty() { ["", ""] } else { bracket };
            format!("\"{open}{prefix}{host}{close}{colon}{port}\"")
        });
        hosts.collect::<Vec<_>>().join(", ")
    };
    let rule = |version, to: String, listen: &str| {
        let keys = keys.replace("@", listen);
        format!("[[rule]]\nname = \"{name}{version}\"\n{keys}\nto = [{to}]\n")
    };
    rule(4, to("192.168.77.", ["", ""]), "198.51.100.1:")
        + &rule(6, to("fd77::", ["[", "]"]), "[2001:db8:1::1]:")
}

/// External address and server, for each IP version.
fn both() -> [(IpAddr, IpAddr); 2] {
    let ([a, b], [c, d]) = (rig::WAN.both(), rig::SERVER.both());
    [(a, c), (b, d)]
}

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// Sends bytes to an echo server and has them back.
fn echo(client: &Namespace, place: SocketAddr, size: usize) {
    let question: Vec<u8> = (0..size).map(|i| (i * 31) as u8).collect();
    let stream = peers::connect(client, place).unwrap();
    let mut answer = vec![0; size];
    std::thread::scope(|scope| {
        scope.spawn(|| (&stream).write_all(&question).unwrap());
        (&stream).read_exact(&mut answer).unwrap();
    });
    assert!(answer == question, "{place}");
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn masquerade_serves_a_backend_that_has_no_way_back() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    rig.server.ip("route del default").unwrap();
    rig.server.ip("-6 route del default").unwrap();
    let keys = "protocol = \"tcp+udp\"\nlisten = \"@8080\"\nsource = \"masquerade\"";
    let config =
        "[masquerade]\nports = \"50000-52000\"\n".to_owned() + &for_both("web", keys, &["10:80"]);
    let running = Running::start(rig, &config);
    let reserved = fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports");
    assert!(reserved.is_ok());
    for ((wan, server), lan) in both().into_iter().zip(rig::LAN.both()) {
        let tcp = Server::tcp(&running.rig.server, at(server, 80), Answer::Peer).unwrap();
        let _udp = Server::udp(&running.rig.server, at(server, 80), Answer::Peer).unwrap();
        let mut ports = BTreeSet::new();
        for _ in 0..20 {
            for seen in [
                ask_tcp(&running.rig.client, at(wan, 8080)).unwrap(),
                ask_udp(&running.rig.client, at(wan, 8080)).unwrap(),
            ] {
                assert_eq!(seen.ip(), lan);
                assert!((50_000..=52_000).contains(&seen.port()), "{seen}");
                ports.insert(seen);
            }
        }
        assert!(ports.len() > 20);
        drop(tcp);
        let _echo = Server::tcp(&running.rig.server, at(server, 80), Answer::Echo).unwrap();
        echo(&running.rig.client, at(wan, 8080), 2 << 20);
    }
    for name in ["web4", "web6"] {
        let rule = running.rule(name);
        assert_eq!(rule["flows"]["created"], 41, "{rule}");
        assert_eq!(rule["stateful"], true);
        assert!(rule["dropped"].as_object().unwrap().values().all(|count| *count == 0), "{rule}");
    }
    running.finish();
}

#[test]
fn iperf3_runs_through_masquerade() {
    if !is_root() {
        return;
    }
    let keys = "protocol = \"tcp+udp\"\nlisten = \"@5301\"\nsource = \"masquerade\"";
    let running = Running::start(Rig::new().unwrap(), &for_both("iperf", keys, &["10:5201"]));
    for (wan, server) in both() {
        let log = fs::File::create("/dev/null").unwrap();
        let mut command = running.rig.server.command("iperf3");
        command.args(["-s", "-p", "5201", "-B", &server.to_string()]);
        let _iperf = Background::start(command.stdout(log)).unwrap();
        for flags in [&[][..], &["-R"], &["-u"], &["-u", "-R"]] {
            let rate = if flags.contains(&"-u") { "20M" } else { "200M" };
            let bytes = until("iperf3", || {
                let mut client = running.rig.client.command("iperf3");
                client.args(["-c", &wan.to_string(), "-p", "5301", "-t", "1", "-b", rate]);
                client.args(["-l", "1200", "--json"]).args(flags);
                let printed = netns::run(&mut client).ok()?;
                let result: Value = serde_json::from_str(&printed).ok()?;
                let sum = if flags.contains(&"-u") { "sum" } else { "sum_received" };
                result["end"][sum]["bytes"].as_u64()
            });
            assert!(bytes > 100_000, "{flags:?}: {bytes}");
        }
    }
    running.finish();
}

#[test]
fn several_backends_share_the_clients() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    for host in [11, 12] {
        rig.server.ip(&format!("address add 192.168.77.{host}/24 dev eth0")).unwrap();
        rig.server.ip(&format!("address add fd77::{host}/64 dev eth0 nodad")).unwrap();
    }
    let keys = "protocol = \"tcp+udp\"\nlisten = \"@8080\"";
    let running = Running::start(rig, &for_both("web", keys, &["10:80", "11:81", "12:82"]));
    for (family, wan) in rig::WAN.both().into_iter().enumerate() {
        let places = [(10, 80), (11, 81), (12, 82)].map(|(host, port)| {
            let text = [format!("192.168.77.{host}"), format!("fd77::{host}")];
            at(text[family].parse().unwrap(), port)
        });
        let tcp = places.map(|it| Server::tcp(&running.rig.server, it, Answer::Peer).unwrap());
        let udp = places.map(|it| Server::udp(&running.rig.server, it, Answer::Peer).unwrap());
        let client = rig::CLIENT.both()[family];
        // One socket has one backend, for as long as it speaks.
        let socket = peers::udp_client(&running.rig.client, at(wan, 8080)).unwrap();
        for _ in 0..30 {
            let seen = peers::exchange(&socket, b"who am I?").unwrap();
            assert_eq!(String::from_utf8(seen).unwrap(), socket.local_addr().unwrap().to_string());
        }
        assert_eq!(udp.iter().filter(|server| !server.seen().is_empty()).count(), 1);
        for _ in 0..60 {
            assert_eq!(ask_tcp(&running.rig.client, at(wan, 8080)).unwrap().ip(), client);
            assert_eq!(ask_udp(&running.rig.client, at(wan, 8080)).unwrap().ip(), client);
        }
        for server in tcp.iter().chain(&udp) {
            assert_eq!(server.seen(), BTreeSet::from([client]), "{}", server.address());
        }
    }
    running.finish();
}

#[test]
fn many_ports_and_two_rules_lead_to_one_port() {
    if !is_root() {
        return;
    }
    let config = for_both("range", "protocol = \"tcp+udp\"\nlisten = \"@8000-8099\"", &["10:80"])
        + &for_both("other", "protocol = \"tcp+udp\"\nlisten = \"@9000\"", &["10:80"]);
    let running = Running::start(Rig::new().unwrap(), &config);
    for (wan, server) in both() {
        let _tcp = Server::tcp(&running.rig.server, at(server, 80), Answer::Peer).unwrap();
        let _udp = Server::udp(&running.rig.server, at(server, 80), Answer::Echo).unwrap();
        for port in [8000, 8042, 8099, 9000] {
            let seen = ask_tcp(&running.rig.client, at(wan, port)).unwrap();
            assert!(rig::CLIENT.both().contains(&seen.ip()));
        }
        // One socket to all of them: each answers from the port that it was asked at.
        let any: IpAddr = if wan.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = running.rig.client.enter(|| UdpSocket::bind((any, 0))).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        for _ in 0..3 {
            for port in (8000..8100).chain([9000]) {
                let mut answer = [0; 64];
                socket.send_to(port.to_string().as_bytes(), at(wan, port)).unwrap();
                let (length, from) = socket.recv_from(&mut answer).unwrap();
                assert_eq!(from, at(wan, port));
                assert_eq!(answer[..length], *port.to_string().as_bytes());
            }
        }
    }
    running.finish();
}

#[test]
fn clients_inside_reach_the_external_address() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { second_server: true, ..Options::default() }).unwrap();
    let config = for_both("web", "protocol = \"tcp+udp\"\nlisten = \"@8080\"", &["10:80"])
        // So that the second server's interface is an internal one.
        + "[[rule]]\nname = \"second\"\nlisten = \"9\"\nto = \"192.168.78.10\"\n";
    let running = Running::start(rig, &config);
    let second = running.rig.second_server.as_ref().unwrap();
    for ((wan, server), lan) in both().into_iter().zip(rig::LAN.both()) {
        let tcp = Server::tcp(&running.rig.server, at(server, 80), Answer::Peer).unwrap();
        let _udp = Server::udp(&running.rig.server, at(server, 80), Answer::Peer).unwrap();
        // Who comes from outside is seen as before.
        let outside = ask_udp(&running.rig.client, at(wan, 8080)).unwrap();
        assert!(rig::CLIENT.both().contains(&outside.ip()));
        for inside in [second, &running.rig.server] {
            for _ in 0..10 {
                assert_eq!(ask_udp(inside, at(wan, 8080)).unwrap().ip(), lan);
                assert_eq!(ask_tcp(inside, at(wan, 8080)).unwrap().ip(), lan);
            }
        }
        drop(tcp);
        let _echo = Server::tcp(&running.rig.server, at(server, 80), Answer::Echo).unwrap();
        echo(second, at(wan, 8080), 1 << 20);
        echo(&running.rig.server, at(wan, 8080), 1 << 20);
    }
    running.finish();
}

#[test]
fn one_interface_is_enough_with_masquerade() {
    if !is_root() {
        return;
    }
    // The backend is a neighbour of the clients' gateway.
    let rig = Rig::with(Options { gateway: true, ..Options::default() }).unwrap();
    let gateway = rig::GATEWAY.both();
    let config = format!(
        "internal = [\"wan0\"]\n\
         [[rule]]\nname = \"v4\"\nprotocol = \"tcp+udp\"\nlisten = \"8080\"\nto = \"{}:80\"\nsource = \"masquerade\"\n\
         [[rule]]\nname = \"v6\"\nprotocol = \"tcp+udp\"\nlisten = \"[{}]:8080\"\nto = \"[{}]:80\"\nsource = \"masquerade\"\n",
        gateway[0],
        rig::WAN.v6,
        gateway[1]
    );
    let running = Running::start(rig, &config);
    let host = running.rig.gateway.as_ref().unwrap();
    for (wan, backend) in rig::WAN.both().into_iter().zip(gateway) {
        let _tcp = Server::tcp(host, at(backend, 80), Answer::Peer).unwrap();
        let _udp = Server::udp(host, at(backend, 80), Answer::Peer).unwrap();
        for _ in 0..10 {
            assert_eq!(ask_tcp(&running.rig.client, at(wan, 8080)).unwrap().ip(), wan);
            assert_eq!(ask_udp(&running.rig.client, at(wan, 8080)).unwrap().ip(), wan);
        }
    }
    running.portfwd.stop().unwrap();
}

#[test]
fn flows_are_listed_with_what_they_carried() {
    if !is_root() {
        return;
    }
    let keys = "protocol = \"udp\"\nlisten = \"@8080\"\nsource = \"masquerade\"";
    let running = Running::start(Rig::new().unwrap(), &for_both("game", keys, &["10:80"]));
    assert_eq!(running.flows(), Vec::<Value>::new());
    for ((wan, server), lan) in both().into_iter().zip(rig::LAN.both()) {
        let _udp = Server::udp(&running.rig.server, at(server, 80), Answer::Echo).unwrap();
        let socket = peers::udp_client(&running.rig.client, at(wan, 8080)).unwrap();
        let own = socket.local_addr().unwrap().to_string();
        for _ in 0..5 {
            peers::exchange(&socket, b"0123456789").unwrap();
        }
        let bytes = 5 * (10 + 8 + if wan.is_ipv4() { 20 } else { 40 });
        let flow = until("the flow", || {
            let is_it = |flow: &Value| flow["client"] == own.as_str();
            running.flows().into_iter().find(|flow| is_it(flow) && flow["reply"]["packets"] == 5)
        });
        assert_eq!(flow["rule"], if wan.is_ipv4() { "game4" } else { "game6" });
        assert_eq!(flow["listen"], at(wan, 8080).to_string());
        assert_eq!(flow["backend"], at(server, 80).to_string());
        let source: SocketAddr = flow["source"].as_str().unwrap().parse().unwrap();
        assert_eq!(source.ip(), lan);
        assert_eq!((&flow["protocol"], &flow["state"]), (&"udp".into(), &"established".into()));
        for direction in ["forward", "reply"] {
            assert_eq!(flow[direction]["packets"], 5, "{flow}");
            assert_eq!(flow[direction]["bytes"], bytes, "{flow}");
        }
        assert!(flow["idle"].as_f64().unwrap() <= flow["age"].as_f64().unwrap());
    }
    assert_eq!(running.flows().len(), 2);
    for name in ["game4", "game6"] {
        let flows = &running.rule(name)["flows"];
        assert_eq!((&flows["active"], &flows["created"]), (&1.into(), &1.into()));
    }
    running.finish();
}
