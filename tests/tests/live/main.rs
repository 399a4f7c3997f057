//! The network changes underneath a running portfwd, and how it starts and ends.

mod clients;
mod routes;
mod rules;
mod service;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use portfwd::instance::Instance;
use portfwd_tests::peers::{self, Answer, Background, Server};
use portfwd_tests::rig::{self, Addresses, Options, Rig};
use portfwd_tests::{Namespace, Portfwd, TempDir, attached_as, binary, is_root, netns};

/// Both families, each with a rule that follows the external addresses.
const RULES: [&str; 4] =
    ["-p", "7004:192.168.77.10:7000/tcp+udp", "-p", "7006:[fd77::10]:7000/tcp+udp"];

fn start(rig: &Rig, arguments: &[&str], directory: &TempDir) -> Portfwd {
    let attach = as_tested(directory);
    let attach = attach.each_ref().map(String::as_str);
    let has_file = arguments.contains(&"--config");
    let arguments = [if has_file { &[][..] } else { &attach }, arguments].concat();
    Portfwd::start(&rig.router, &binary(), &arguments, directory.path()).unwrap()
}

/// A file that says how to attach, for what else the flags say.
fn as_tested(directory: &TempDir) -> [String; 2] {
    let file = directory.path().join("attach.toml");
    fs::write(&file, portfwd_tests::interfaces("")).unwrap();
    ["--config".to_owned(), file.to_str().unwrap().to_owned()]
}

/// The port of [`RULES`] at an external address.
fn listen(address: &str) -> SocketAddr {
    let address: IpAddr = address.parse().unwrap();
    SocketAddr::new(address, if address.is_ipv4() { 7004 } else { 7006 })
}

/// Answers on port 7000, TCP and UDP, IPv4 and IPv6, with the client's address.
struct Backend([Server; 4]);

impl Backend {
    fn new(namespace: &Namespace, addresses: Addresses) -> Self {
        let [v4, v6] = addresses.both().map(|address| SocketAddr::new(address, 7000));
        let tcp = |address| Server::tcp(namespace, address, Answer::Peer).unwrap();
        let udp = |address| Server::udp(namespace, address, Answer::Peer).unwrap();
        Self([tcp(v4), udp(v4), tcp(v6), udp(v6)])
    }

    /// How many of its four sockets someone has asked.
    fn asked(&self) -> usize {
        self.0.iter().filter(|server| !server.seen().is_empty()).count()
    }
}

/// Waits until something is so.
fn until(what: &str, patience: u64, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(patience);
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {patience} s: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether a datagram to this place is answered, from there, by one who sees the client.
fn answers(client: &Namespace, place: SocketAddr) -> bool {
    let Ok(socket) = peers::udp_client(client, place) else { return false };
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let Ok(answer) = peers::exchange(&socket, b"who am I?") else { return false };
    let seen: SocketAddr = String::from_utf8(answer).unwrap().parse().unwrap();
    assert_eq!(seen, socket.local_addr().unwrap(), "the client's address was not preserved");
    true
}

/// Waits until the backend answers there with UDP, then asks with TCP.
fn reached_within(patience: u64, client: &Namespace, place: SocketAddr) {
    until(&format!("{place} answers"), patience, || answers(client, place));
    let seen = peers::ask_tcp(client, place).unwrap();
    assert_eq!(seen.is_ipv4(), place.is_ipv4());
}

fn reached(client: &Namespace, place: SocketAddr) {
    reached_within(5, client, place);
}

fn both_reached(client: &Namespace) {
    for address in rig::WAN.both() {
        reached(client, listen(&address.to_string()));
    }
}

/// Waits until portfwd has printed this.
fn told(portfwd: &Portfwd, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !portfwd.stderr().contains(text) {
        assert!(Instant::now() < deadline, "{text:?} is not told: {}", portfwd.stderr());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Packets that the rules have forwarded, and packets that no rule claimed.
fn claimed(portfwd: &Portfwd) -> (u64, u64) {
    let stats = portfwd.stats().unwrap();
    let rules = stats["rules"].as_array().unwrap().iter();
    let forward = rules.map(|rule| rule["forward"]["packets"].as_u64().unwrap()).sum();
    (forward, stats["verdicts"]["passed"]["no_rule"].as_u64().unwrap_or(0))
}

/// Waits until a datagram to this place goes to the stack instead of to a rule.
fn left_alone(portfwd: &Portfwd, client: &Namespace, place: SocketAddr) {
    until(&format!("{place} is not claimed"), 5, || {
        let (forward, no_rule) = claimed(portfwd);
        assert!(!answers(client, place) || claimed(portfwd).0 > forward);
        let after = claimed(portfwd);
        after.0 == forward && after.1 > no_rule
    });
}

/// The interfaces of a namespace that have an XDP program.
fn attached(namespace: &Namespace) -> Vec<String> {
    let links: serde_json::Value =
        serde_json::from_str(&namespace.ip("-j -d link show").unwrap()).unwrap();
    let links = links.as_array().unwrap().iter().filter(|link| !link["xdp"].is_null());
    links.map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
}

fn sysctl(namespace: &Namespace, key: &str) -> String {
    let path = format!("/proc/sys/net/{key}");
    namespace.enter(|| fs::read_to_string(path)).unwrap().trim().to_owned()
}

/// Gives one end of a veth its addresses, and makes it send as on a wire and take what XDP
/// redirects to it.
fn set_up(namespace: &Namespace, interface: &str, addresses: Addresses) {
    let Addresses { v4, v6 } = addresses;
    for arguments in [
        format!("address add {v4}/24 dev {interface}"),
        format!("address add {v6}/64 dev {interface} nodad"),
        format!("link set {interface} up"),
    ] {
        namespace.ip(&arguments).unwrap();
    }
    let features = ["tx", "off", "tso", "off", "gso", "off", "gro", "on"];
    netns::run(namespace.command("ethtool").args(["-K", interface]).args(features)).unwrap();
}

/// Makes the router's way to the server anew after `ip link delete lan0`.
fn restore_lan0(rig: &Rig) {
    rig.server
        .ip(&format!("link add eth0 type veth peer name lan0 netns {}", rig.router.name()))
        .unwrap();
    set_up(&rig.server, "eth0", rig::SERVER);
    set_up(&rig.router, "lan0", rig::LAN);
    for address in rig::LAN.both() {
        rig.server.ip(&format!("route add default via {address}")).unwrap();
    }
}

/// Likewise the way to the client.
fn restore_wan0(rig: &Rig) {
    rig.client
        .ip(&format!("link add eth0 type veth peer name wan0 netns {}", rig.router.name()))
        .unwrap();
    set_up(&rig.client, "eth0", rig::CLIENT);
    set_up(&rig.router, "wan0", rig::WAN);
}

#[test]
fn rules_follow_the_external_addresses() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    both_reached(&rig.client);

    // One more.
    let more = ["198.51.100.7", "2001:db8:1::7"];
    rig.router.ip("address add 198.51.100.7/24 dev wan0").unwrap();
    rig.router.ip("address add 2001:db8:1::7/64 dev wan0 nodad").unwrap();
    for address in more {
        reached(&rig.client, listen(address));
    }
    both_reached(&rig.client);

    // No longer. The client still knows whom it belonged to.
    for address in more {
        rig.router.ip(&format!("address del {address}{} dev wan0", prefix(address))).unwrap();
        left_alone(&portfwd, &rig.client, listen(address));
    }
    both_reached(&rig.client);

    // Another instead of the only one, as DHCP does it.
    for (old, new) in [("198.51.100.1", "198.51.100.9"), ("2001:db8:1::1", "2001:db8:1::9")] {
        rig.router.ip(&format!("address del {old}{} dev wan0", prefix(old))).unwrap();
        rig.router.ip(&format!("address add {new}{} dev wan0", prefix(new))).unwrap();
        reached(&rig.client, listen(new));
        left_alone(&portfwd, &rig.client, listen(old));
    }
    let (status, said) = portfwd.stop().unwrap();
    assert!(status.success());
    assert!(said.contains("external addresses: 198.51.100.9, 2001:db8:1::9\n"), "{said}");
    let is_odd = |line: &&str| line.contains("WARN") && !line.contains(" is a veth: ");
    assert_eq!(said.lines().find(is_odd), None, "{said}");
    assert!(!said.contains("panicked"), "{said}");
}

fn prefix(address: &str) -> &'static str {
    if address.contains(':') { "/64" } else { "/24" }
}

#[test]
fn an_external_address_may_come_later() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    rig.router.ip("address flush dev wan0").unwrap();
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    told(&portfwd, "external addresses: none yet");
    told(&portfwd, "wan0 has no address");
    for address in rig::WAN.both() {
        let address = address.to_string();
        rig.router.ip(&format!("address add {address}{} dev wan0", prefix(&address))).unwrap();
        reached(&rig.client, listen(&address));
    }
}

#[test]
fn interfaces_go_and_come_back() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    // lan0 is found by its routes in one round, and named in the other.
    let file = directory.path().join("portfwd.toml");
    fs::write(&file, portfwd_tests::interfaces("external = ['wan0']\ninternal = ['lan0']"))
        .unwrap();
    let file = file.to_str().unwrap();
    for (flags, missing) in [
        (["-i", "wan0"], "backend 192.168.77.10 has no route"),
        (["--config", file], "lan0: there is no such interface now; waiting for it"),
    ] {
        let portfwd = start(&rig, &[&flags[..], &RULES].concat(), &directory);
        both_reached(&rig.client);

        rig.router.ip("link delete lan0").unwrap();
        told(&portfwd, missing);
        for address in rig::WAN.both() {
            assert!(!answers(&rig.client, listen(&address.to_string())));
        }
        restore_lan0(&rig);
        both_reached(&rig.client);
        told(&portfwd, "all is well again");

        rig.router.ip("link delete wan0").unwrap();
        told(&portfwd, "wan0: there is no such interface now; waiting for it");
        restore_wan0(&rig);
        both_reached(&rig.client);
        until("all is well again, twice", 5, || {
            portfwd.stderr().matches("all is well again").count() == 2
        });
        let stats = portfwd.stats().unwrap();
        for interface in stats["interfaces"].as_array().unwrap() {
            assert_eq!(interface["attach"], portfwd_tests::attach(), "{stats}");
        }
        let (status, said) = portfwd.stop().unwrap();
        assert!(status.success() && !said.contains("panicked"), "{said}");
    }
}

#[test]
fn links_flap() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    // A link that goes down otherwise loses its IPv6 addresses.
    rig.router.set_sysctl("net.ipv6.conf.all.keep_addr_on_down", "1").unwrap();
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    both_reached(&rig.client);
    for interface in ["wan0", "lan0"] {
        rig.router.ip(&format!("link set {interface} down")).unwrap();
        for address in rig::WAN.both() {
            assert!(!answers(&rig.client, listen(&address.to_string())));
        }
        rig.router.ip(&format!("link set {interface} up")).unwrap();
        both_reached(&rig.client);
    }
    // Faster than anyone looks.
    for _ in 0..20 {
        for change in ["wan0 down", "wan0 up", "lan0 down", "lan0 up"] {
            rig.router.ip(&format!("link set {change}")).unwrap();
        }
    }
    both_reached(&rig.client);
    assert_eq!(attached(&rig.router), ["wan0", "lan0"]);
    assert!(portfwd.stop().unwrap().0.success());
}

#[test]
fn a_backends_name_is_followed() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { second_server: true, ..Options::default() }).unwrap();
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    let names = |of: Option<Addresses>| {
        let lines = of.map(|of| of.both().map(|address| format!("{address} backend.example\n")));
        fs::write(path("names"), lines.unwrap_or_default().concat()).unwrap();
    };
    names(Some(rig::SERVER));
    fs::write(path("hosts"), "").unwrap();
    fs::write(path("resolv.conf"), "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n").unwrap();
    let mut dnsmasq = Background::start(
        rig.router
            .command("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
            .args(["--user=root", "--pid-file=", "--listen-address=127.0.0.1", "--bind-interfaces"])
            .args(["--local=/example/", "--log-facility=/dev/null"])
            .arg(format!("--addn-hosts={}", path("names").display())),
    )
    .unwrap();
    let resolver = "127.0.0.1:53".parse().unwrap();
    peers::wait_for_tcp(&rig.router, resolver, Duration::from_secs(10)).unwrap();
    // A portfwd that takes its resolver and its hosts from the directory.
    let inside = "mount --bind \"$0/resolv.conf\" /etc/resolv.conf &&
        mount --bind \"$0/hosts\" /etc/hosts && exec \"$@\"";
    let wrapper = path("portfwd");
    let script = format!(
        "#!/bin/sh\nexec unshare --mount sh -c '{inside}' {} {} \"$@\"\n",
        directory.path().display(),
        binary().display()
    );
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let file = portfwd_tests::interfaces(
        "external = ['wan0']\n[names]\nrefresh = 1\n[[rule]]\nprotocol = 'tcp+udp'\nlisten = 7000\n\
         to = 'backend.example'",
    );
    fs::write(path("portfwd.toml"), file).unwrap();
    let first = Backend::new(&rig.server, rig::SERVER);
    let second = Backend::new(rig.second_server.as_ref().unwrap(), rig::SECOND_SERVER);

    let arguments = ["--config", path("portfwd.toml").to_str().unwrap()].map(str::to_owned);
    let portfwd = Portfwd::start(&rig.router, &wrapper, &arguments, directory.path()).unwrap();
    let places = rig::WAN.both().map(|address| SocketAddr::new(address, 7000));
    places.iter().for_each(|place| reached(&rig.client, *place));
    assert_eq!((first.asked(), second.asked()), (4, 0));

    names(Some(rig::SECOND_SERVER));
    dnsmasq.signal(libc::SIGHUP).unwrap();
    told(&portfwd, "\"backend.example\" is 192.168.78.10, fd78::10 now");
    drop(first);
    places.iter().for_each(|place| reached(&rig.client, *place));
    assert_eq!(second.asked(), 4);
    told(&portfwd, &format!("lan1: internal, {}", attached_as()));

    // No such name; and later nobody to ask.
    names(None);
    dnsmasq.signal(libc::SIGHUP).unwrap();
    told(&portfwd, "cannot resolve \"backend.example\": ");
    places.iter().for_each(|place| reached(&rig.client, *place));
    // Told once, however often it is asked.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(portfwd.stderr().matches("its address stays as it was").count(), 1);
    names(Some(rig::SECOND_SERVER));
    dnsmasq.signal(libc::SIGHUP).unwrap();
    told(&portfwd, "\"backend.example\" resolves again");
    drop(dnsmasq);
    until("the silence of the resolver is told", 10, || {
        portfwd.stderr().matches("its address stays as it was").count() == 2
    });
    places.iter().for_each(|place| reached(&rig.client, *place));
    let (status, said) = portfwd.stop().unwrap();
    assert!(status.success(), "{said}");
    assert_eq!(said.matches("\"backend.example\" is ").count(), 1, "{said}");
}

#[test]
fn connections_survive_an_address_that_comes() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let servers = rig::SERVER.both().map(|address| {
        Server::tcp(&rig.server, SocketAddr::new(address, 7000), Answer::Echo).unwrap()
    });
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    let mut open = rig::WAN
        .both()
        .map(|address| peers::connect(&rig.client, listen(&address.to_string())).unwrap());
    let mut echo = |round: u8| {
        for stream in &mut open {
            let mut answer = [0; 3];
            stream.write_all(&[round; 3]).unwrap();
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [round; 3]);
        }
    };
    echo(1);
    // The kernel lists an IPv6 address that comes before those that are there.
    for address in ["198.51.100.7/24", "2001:db8:1::7/64"] {
        rig.router.ip(&format!("address add {address} dev wan0 nodad")).unwrap();
    }
    told(&portfwd, "external addresses: 198.51.100.1, 198.51.100.7, 2001:db8:1::1, 2001:db8:1::7");
    echo(2);
    for address in ["198.51.100.7", "2001:db8:1::7"] {
        peers::connect(&rig.client, listen(address)).unwrap();
    }
    echo(3);
    drop((portfwd, servers));
}

#[test]
fn packets_for_a_backend_whose_route_is_gone_do_not_go_outside() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    rig.router.ip(&format!("route add default via {}", rig::CLIENT.v4)).unwrap();
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    both_reached(&rig.client);
    let roles = || {
        let list = portfwd.json("list").unwrap();
        let all = list["interfaces"].as_array().unwrap().clone();
        all.iter().map(|one| format!("{} {}", one["name"], one["role"])).collect::<Vec<_>>()
    };
    let before = roles();

    rig.router.ip("route del 192.168.77.0/24 dev lan0").unwrap();
    told(&portfwd, "reached through 198.51.100.2 by wan0, where clients are");
    let dropped = || {
        let stats = portfwd.stats().unwrap();
        stats["verdicts"]["dropped"]["not_internal"].as_u64().unwrap()
    };
    assert_eq!(dropped(), 0);
    assert!(!answers(&rig.client, listen(&rig::WAN.v4.to_string())));
    until("it is dropped", 5, || dropped() == 1);
    assert_eq!(roles(), before);
    reached(&rig.client, listen(&rig::WAN.v6.to_string()));

    rig.router.ip("route add 192.168.77.0/24 dev lan0 src 192.168.77.1").unwrap();
    both_reached(&rig.client);
    told(&portfwd, "all is well again");
}

#[test]
fn an_interface_takes_on_a_second_role() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    // Nobody is at this address; what counts is where it is.
    let extra = ["-p", "7010:198.51.100.200:7000"];
    rig.router.ip("route add 198.51.100.200/32 dev lan0").unwrap();
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES, &extra].concat(), &directory);
    both_reached(&rig.client);
    let said = portfwd.stderr();
    assert!(said.contains(&format!("wan0: external, {}", attached_as())), "{said}");
    rig.router.ip("route del 198.51.100.200/32 dev lan0").unwrap();
    told(&portfwd, &format!("wan0: both, {}", attached_as()));
    both_reached(&rig.client);
    assert!(!portfwd.stderr().contains("detached"), "{}", portfwd.stderr());
}

#[test]
fn a_backend_changes_its_mac() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    // The kernel believes for 15 to 45 s what it has learned; here for one.
    for (key, value) in [
        ("base_reachable_time_ms", "1000"),
        ("delay_first_probe_time", "1"),
        ("retrans_time_ms", "200"),
    ] {
        for family in ["ipv4", "ipv6"] {
            rig.router.set_sysctl(&format!("net.{family}.neigh.lan0.{key}"), value).unwrap();
        }
    }
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    both_reached(&rig.client);
    rig.server.ip("link set eth0 address 02:00:00:00:00:99").unwrap();
    // It tells nobody: it neither announces itself nor has to ask for the router.
    let lan0 = rig.router.ip("-o link show lan0").unwrap();
    let (_, mac) = lan0.split_once("link/ether ").unwrap();
    let mac = mac.split_whitespace().next().unwrap();
    for router in rig::LAN.both() {
        let permanent = format!("neigh replace {router} lladdr {mac} dev eth0 nud permanent");
        rig.server.ip(&permanent).unwrap();
    }
    // A neighbour that nobody uses stays valid, however wrong it is, and XDP is nobody.
    for address in rig::WAN.both() {
        reached_within(30, &rig.client, listen(&address.to_string()));
    }
    let neighbours = rig.router.ip("neigh show dev lan0").unwrap();
    for server in rig::SERVER.both() {
        let entry = neighbours.lines().find(|line| line.starts_with(&format!("{server} ")));
        assert!(entry.is_some_and(|entry| entry.contains("02:00:00:00:00:99")), "{neighbours}");
    }
    drop(portfwd);
}

#[test]
fn signals_end_it_and_nothing_stays() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    let socket = directory.path().join("portfwd.sock");
    let reserved = || sysctl(&rig.router, "ipv4/ip_local_reserved_ports");
    rig.router.set_sysctl("net.ipv4.ip_local_reserved_ports", "8080,40000-40010").unwrap();
    let rules = [&["-i", "wan0", "-p", "50000:192.168.77.10/udp"][..], &RULES].concat();
    let run = || {
        let mut command = rig.router.command(binary());
        command.arg("run").arg("--socket").arg(&socket).args(as_tested(&directory)).args(&rules);
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let process = Background::start(command.stderr(log)).unwrap();
        until("it takes commands", 20, || stats(&rig.router, &socket));
        process
    };

    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut process = run();
        assert_eq!(attached(&rig.router), ["wan0", "lan0"]);
        assert_eq!(reserved(), "8080,40000-40010,50000");
        both_reached(&rig.client);
        process.signal(signal).unwrap();
        let status = process.wait(Duration::from_secs(10)).unwrap();
        assert_eq!(status.code(), Some(0), "signal {signal}");
        assert_eq!(attached(&rig.router), [""; 0]);
        assert!(!socket.exists());
        assert_eq!(reserved(), "8080,40000-40010");
    }

    let mut process = run();
    process.signal(libc::SIGKILL).unwrap();
    process.wait(Duration::from_secs(10)).unwrap();
    // Forwarding goes on.
    assert_eq!(attached(&rig.router), ["wan0", "lan0"]);
    both_reached(&rig.client);
    assert!(socket.exists() && !stats(&rig.router, &socket));
    // The next one takes the place of the dead.
    let process = run();
    both_reached(&rig.client);

    // And lets nobody take its own.
    let output = rig
        .router
        .command(binary())
        .args(["run", "-i", "wan0", "-p", "1:192.168.77.10", "--socket"])
        .arg(&socket)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        format!(
            "portfwd: a portfwd runs as instance \"{}\" already: stop it, or give this one another name with --instance\n",
            Instance::of_socket(&socket)
        )
    );
    both_reached(&rig.client);
    assert!(stats(&rig.router, &socket));
    assert_eq!(attached(&rig.router), ["wan0", "lan0"]);
    drop(process);
    assert!(!socket.exists());
    assert_eq!(reserved(), "8080,40000-40010");
}

/// Whether a daemon answers on this socket.
fn stats(namespace: &Namespace, socket: &Path) -> bool {
    let mut command = namespace.command(binary());
    command.args(["stats", "--json", "--socket"]).arg(socket).output().unwrap().status.success()
}

#[test]
fn the_socket_is_its_owners_alone() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let portfwd = start(&rig, &["-i", "wan0", "-p", "80:192.168.77.10"], &directory);
    let mode = fs::metadata(portfwd.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Others may come as far as the socket, and run the program.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let everyones = directory.path().join("portfwd");
    fs::hard_link(binary(), &everyones)
        .or_else(|_| fs::copy(binary(), &everyones).map(drop))
        .unwrap();
    for command in ["list", "stats"] {
        let output = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(&everyones)
            .args([command, "--socket"])
            .arg(portfwd.socket())
            .output()
            .unwrap();
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]));
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            format!(
                "portfwd: {}: this user may not ask the daemon; run as root, or as a member of group portfwd\n",
                portfwd.socket().display()
            )
        );
    }
}

#[test]
fn sysctls_are_set_and_said() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let router = &rig.router;
    for (key, value) in [
        ("net.ipv6.conf.all.forwarding", "0"),
        ("net.ipv4.conf.all.rp_filter", "1"),
        ("net.ipv6.conf.wan0.accept_ra", "1"),
    ] {
        router.set_sysctl(key, value).unwrap();
    }
    // Of these, only the single one among the ephemeral ports needs to be reserved.
    let rules = ["80:192.168.77.10", "40000:192.168.77.10", "40100-40200:192.168.77.10"];
    let rules = rules.iter().flat_map(|rule| ["-p", rule]);
    let arguments: Vec<&str> = ["-i", "wan0"].into_iter().chain(rules).chain(RULES).collect();
    let portfwd = start(&rig, &arguments, &directory);
    told(&portfwd, "stop with Ctrl-C");
    const SET: [(&str, &str, &str); 6] = [
        ("ipv4/ip_forward", "0", "1"),
        ("ipv4/conf/lan0/accept_local", "0", "1"),
        ("ipv4/conf/lan0/rp_filter", "", "2"),
        ("ipv6/conf/wan0/accept_ra", "1", "2"),
        ("ipv6/conf/all/forwarding", "0", "1"),
        ("ipv4/ip_local_reserved_ports", "", "40000"),
    ];
    for (path, from, to) in SET {
        assert_eq!(sysctl(router, path), to, "{path}");
        let said = format!("set net.{} = {to} (was {from}", path.replace('/', "."));
        assert!(portfwd.stderr().contains(&said), "{said} is not in {}", portfwd.stderr());
    }
    // What is not its business stays.
    for path in ["ipv4/conf/wan0/accept_local", "ipv4/conf/wan0/rp_filter"] {
        assert_eq!(sysctl(router, path), "0", "{path}");
    }
    let (status, said) = portfwd.stop().unwrap();
    assert!(status.success());
    assert!(said.contains("set net.ipv4.ip_local_reserved_ports = \"\" (was 40000)"), "{said}");
    assert_eq!(sysctl(router, "ipv4/ip_local_reserved_ports"), "");
    assert_eq!(sysctl(router, "ipv4/ip_forward"), "1");

    // The second time there is nothing to say.
    let portfwd = start(&rig, &["-i", "wan0", "-p", "80:192.168.77.10"], &directory);
    let (_, said) = portfwd.stop().unwrap();
    assert!(!said.contains("set net."), "{said}");
}

#[test]
fn two_external_interfaces() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    let other = Namespace::new("client2").unwrap();
    other
        .ip(&format!("link add eth0 type veth peer name wan1 netns {}", rig.router.name()))
        .unwrap();
    let [theirs, ours] = [2, 1].map(|host| Addresses {
        v4: [203, 0, 113, host].into(),
        v6: [0x2001, 0xdb8, 9, 0, 0, 0, 0, u16::from(host)].into(),
    });
    set_up(&other, "eth0", theirs);
    set_up(&rig.router, "wan1", ours);
    let portfwd = start(&rig, &[&["-i", "wan0", "-i", "wan1"][..], &RULES].concat(), &directory);
    both_reached(&rig.client);
    for address in ours.both() {
        reached(&other, listen(&address.to_string()));
    }
    both_reached(&rig.client);
    let stats = portfwd.stats().unwrap();
    let roles = ["lan0", "wan0", "wan1"].map(|name| {
        let mut interfaces = stats["interfaces"].as_array().unwrap().iter();
        interfaces.find(|interface| interface["name"] == name).unwrap()["role"].clone()
    });
    assert_eq!(roles, ["internal", "external", "external"]);
    assert!(portfwd.stop().unwrap().0.success());
}

/// Client, server and box are on one wire.
#[test]
fn a_box_with_one_arm() {
    if !is_root() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let [client, router, server, switch] =
        ["client", "router", "server", "switch"].map(|role| Namespace::new(role).unwrap());
    for (key, value) in [("net.ipv4.ip_forward", "0"), ("net.ipv6.conf.default.accept_dad", "0")] {
        router.set_sysctl(key, value).unwrap();
    }
    switch.ip("link add name br0 type bridge").unwrap();
    switch.ip("link set br0 up").unwrap();
    for (namespace, port, addresses) in [
        (&client, "client", rig::CLIENT),
        (&router, "router", rig::WAN),
        (&server, "server", rig::SERVER),
    ] {
        let link = format!("link add eth0 type veth peer name {port} netns {}", switch.name());
        namespace.ip(&link).unwrap();
        set_up(namespace, "eth0", addresses);
        switch.ip(&format!("link set {port} master br0 up")).unwrap();
        netns::run(switch.command("ethtool").args(["-K", port, "gro", "on"])).unwrap();
    }
    router.ip(&format!("address add {}/24 dev eth0", rig::LAN.v4)).unwrap();
    router.ip(&format!("address add {}/64 dev eth0 nodad", rig::LAN.v6)).unwrap();
    for address in rig::LAN.both() {
        server.ip(&format!("route add default via {address}")).unwrap();
    }
    let _backend = Backend::new(&server, rig::SERVER);
    let arguments = [&["-i", "eth0"][..], &RULES].concat();
    let portfwd = Portfwd::start(&router, &binary(), &arguments, directory.path()).unwrap();
    both_reached(&client);
    let stats = portfwd.stats().unwrap();
    let why = "veth: packets of this machine stay whole there";
    assert_eq!(
        stats["interfaces"],
        serde_json::json!([{"name": "eth0", "role": "both", "attach": "tc", "why": why}])
    );
    for rule in stats["rules"].as_array().unwrap() {
        // A datagram, and a handshake that the client ends.
        for direction in ["forward", "reply"] {
            assert!(rule[direction]["packets"].as_u64().unwrap() >= 4, "{stats}");
        }
        assert_eq!(rule["to_stack"]["no_xdp_transmit"], 0, "{stats}");
    }
    assert!(portfwd.stop().unwrap().0.success());
}
