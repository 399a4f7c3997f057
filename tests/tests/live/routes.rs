//! Routes and neighbours change while packets flow that the programs remember the way of. Each test
//! says how many packets were lost (`--nocapture`).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use portfwd_tests::rig::{self, Addresses, Options, Rig};
use portfwd_tests::wire::{Capture, Direction, Tally};
use portfwd_tests::{Namespace, Portfwd, TempDir, is_root};
use serde_json::Value;

use super::{RULES, listen, set_up, start, told, until};

/// Between the datagrams of a client.
const PACE: Duration = Duration::from_millis(5);
/// What is told to the daemon has reached the programs by then, on a busy machine too. What it is not
/// told of, it looks for every second.
const SOON: Duration = Duration::from_secs(3);

/// What a client sends in 400 ms: what is told should reach the programs by then, and the next look is
/// mostly later.
const FEW: usize = 80;

/// One who sends numbered datagrams, or sends those of others back.
struct Peer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// The last number that was sent.
    sent: AtomicU64,
    /// Numbers that came.
    came: Mutex<BTreeSet<u64>>,
}

impl Peer {
    /// Sends back what comes to an address.
    fn backend(namespace: &Namespace, address: IpAddr) -> Self {
        let socket = namespace.enter(|| UdpSocket::bind((address, 7000))).unwrap();
        let shared = Arc::<Shared>::default();
        let threads = vec![shared.receive(socket, true)];
        Self { shared, threads }
    }

    /// Sends from an address to a place all the time. No other client has its numbers.
    fn client(namespace: &Namespace, from: IpAddr, to: SocketAddr) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let socket = namespace.enter(|| UdpSocket::bind((from, 0))).unwrap();
        let shared = Arc::<Shared>::default();
        shared.sent.store(NEXT.fetch_add(1, Ordering::Relaxed) << 32, Ordering::Relaxed);
        let mut threads = vec![shared.receive(socket.try_clone().unwrap(), false)];
        let its = Arc::clone(&shared);
        threads.push(thread::spawn(move || {
            while !its.stop.load(Ordering::Relaxed) {
                let number = its.sent.load(Ordering::Relaxed) + 1;
                // An error is an ICMP message about an earlier one.
                let _ = socket.send_to(&number.to_be_bytes(), to);
                its.sent.store(number, Ordering::Relaxed);
                thread::sleep(PACE);
            }
        }));
        Self { shared, threads }
    }

    fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// How many of these numbers came.
    fn count(&self, numbers: RangeInclusive<u64>) -> usize {
        self.shared.came.lock().unwrap().range(numbers).count()
    }
}

impl Shared {
    fn receive(self: &Arc<Self>, socket: UdpSocket, back: bool) -> JoinHandle<()> {
        let its = Arc::clone(self);
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        thread::spawn(move || {
            let mut number = [0; 8];
            while !its.stop.load(Ordering::Relaxed) {
                let Ok((8, peer)) = socket.recv_from(&mut number) else { continue };
                its.came.lock().unwrap().insert(u64::from_be_bytes(number));
                if back {
                    let _ = socket.send_to(&number, peer);
                }
            }
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A client and the backend that its rule leads to.
#[derive(Clone, Copy)]
struct Pair<'a> {
    client: &'a Peer,
    backend: &'a Peer,
}

impl Pair<'_> {
    /// Waits until a datagram that is sent from now on comes back from the backend.
    fn flows(&self, what: &str) {
        // One is being sent.
        let first = self.client.sent() + 2;
        let deadline = Instant::now() + SOON;
        let came = |peer: &Peer| peer.count(first..=self.client.sent().max(first)) > 0;
        while !came(self.client) || !came(self.backend) {
            assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asserts that for some time nothing is lost.
    fn is_steady(&self, what: &str) {
        let first = self.client.sent() + 1;
        thread::sleep(Duration::from_millis(400));
        let last = self.client.sent();
        assert!(last > first, "{what}");
        thread::sleep(Duration::from_millis(200));
        assert_eq!(self.lost(first..=last), [0, 0], "{what}");
    }

    /// How many of these did not come to the backend, and how many of those that did not come back.
    fn lost(&self, numbers: RangeInclusive<u64>) -> [usize; 2] {
        let [came, back] = [self.backend, self.client].map(|peer| peer.count(numbers.clone()));
        [numbers.count() - came, came.saturating_sub(back)]
    }

    /// How many datagrams come to the backend, of those that the client sends in a while.
    fn comes(&self) -> usize {
        let first = self.client.sent() + 2;
        thread::sleep(Duration::from_millis(300));
        self.backend.count(first..=self.client.sent().max(first))
    }

    /// Asserts that nothing comes to the backend any more, soon.
    fn stops(&self, what: &str) {
        let deadline = Instant::now() + SOON;
        loop {
            if self.comes() == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "still after {SOON:?}: {what}");
        }
    }
}

/// A rig with traffic in both families.
struct Flowing {
    clients: [Peer; 2],
    backends: [Peer; 2],
}

impl Flowing {
    fn new(rig: &Rig, from: Addresses, to: Addresses) -> Self {
        let backends = rig::SERVER.both().map(|address| Peer::backend(&rig.server, address));
        let [v4, v6] = to.both().map(|address| listen(&address.to_string()));
        let client = |from, to| Peer::client(&rig.client, from, to);
        let clients = [client(from.v4.into(), v4), client(from.v6.into(), v6)];
        let flowing = Self { clients, backends };
        flowing.flow("at first");
        flowing
    }

    fn pairs(&self) -> [Pair<'_>; 2] {
        [0, 1].map(|family| Pair { client: &self.clients[family], backend: &self.backends[family] })
    }

    /// Waits until both flow, and asserts that they go on.
    fn flow(&self, what: &str) {
        self.pairs().iter().for_each(|pair| pair.flows(what));
        self.pairs().iter().for_each(|pair| pair.is_steady(what));
    }

    fn stop(&self, what: &str) {
        self.pairs().iter().for_each(|pair| pair.stops(what));
    }

    fn sent(&self) -> [u64; 2] {
        [0, 1].map(|family| self.clients[family].sent())
    }

    /// Says how many were lost since then, and asserts that it was told and did not have to look.
    fn lost_few(&self, what: &str, since: [u64; 2]) {
        for (pair, since) in self.pairs().iter().zip(since) {
            let last = pair.client.sent().saturating_sub(40);
            let [there, back] = pair.lost(since..=last);
            eprintln!("{what}: of {}, lost there {there}, back {back}", last - since);
            assert!(there + back <= FEW, "{what}");
        }
    }
}

/// Drops of a reason, by all rules.
fn dropped(portfwd: &Portfwd, reason: &str) -> u64 {
    let count = |stats: Value| stats["verdicts"]["dropped"][reason].as_u64();
    count(portfwd.stats().unwrap()).unwrap_or(0)
}

/// Waits until packets are dropped for a reason, in both families: more than one of them sends.
fn drops(portfwd: &Portfwd, reason: &str) {
    let before = dropped(portfwd, reason);
    until(&format!("dropped as {reason}"), 5, || dropped(portfwd, reason) > before + 4);
}

/// Whether the router has this link address for all of these.
fn has_neighbours(rig: &Rig, interface: &str, of: Addresses, mac: &str) -> bool {
    let known = rig.router.ip(&format!("neigh show dev {interface}")).unwrap();
    of.both().iter().all(|address| {
        let mut lines = known.lines();
        lines.any(|line| line.starts_with(&format!("{address} ")) && line.contains(mac))
    })
}

/// Frames that an interface received from the rules, so far.
fn received(capture: &Capture<Tally>) -> u64 {
    capture.look(|tally| {
        tally.ensure_valid().unwrap();
        let ours = |port| matches!(port, 7004 | 7006 | 7000);
        let of_interest = |key: &portfwd_tests::wire::Key| {
            key.direction == Direction::Received
                && key.protocol == 17
                && (ours(key.source.port()) || ours(key.destination.port()))
        };
        tally.count(of_interest).packets
    })
}

/// A second link between client and router, `eth1` to `wan1`: .2 and .1 of networks of its own.
fn second_link(rig: &Rig) -> [Addresses; 2] {
    let [theirs, ours] = [2, 1].map(|host| Addresses {
        v4: [192, 0, 2, host].into(),
        v6: [0x2001, 0xdb8, 9, 0, 0, 0, 0, u16::from(host)].into(),
    });
    let peer = format!("link add eth1 type veth peer name wan1 netns {}", rig.router.name());
    rig.client.ip(&peer).unwrap();
    set_up(&rig.client, "eth1", theirs);
    set_up(&rig.router, "wan1", ours);
    for key in ["all", "default", "eth0", "eth1"] {
        rig.client.set_sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0").unwrap();
    }
    [theirs, ours]
}

#[test]
fn replies_follow_a_gateway_that_changes_its_mac() {
    if !is_root() {
        return;
    }
    const MAC: &str = "02:00:00:00:00:77";
    let rig = Rig::with(Options { gateway: true, ..Options::default() }).unwrap();
    let directory = TempDir::new().unwrap();
    let gateway = rig.gateway.as_ref().unwrap();
    // It announces itself, as whoever takes over an address does.
    gateway.set_sysctl("net.ipv4.conf.wan0.arp_notify", "1").unwrap();
    gateway.set_sysctl("net.ipv6.conf.wan0.ndisc_notify", "1").unwrap();
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    let traffic = Flowing::new(&rig, rig::DISTANT_CLIENT, rig::WAN);
    let since = traffic.sent();
    gateway.ip(&format!("link set wan0 address {MAC}")).unwrap();
    until("the router knows", 10, || has_neighbours(&rig, "wan0", rig::GATEWAY, MAC));
    traffic.flow("by the new link address");
    traffic.lost_few("a gateway changed its MAC", since);
    assert!(portfwd.stop().unwrap().0.success());
}

#[test]
fn replies_follow_the_default_route() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { gateway: true, ..Options::default() }).unwrap();
    let directory = TempDir::new().unwrap();
    let [theirs, _] = second_link(&rig);
    let portfwd = start(&rig, &[&["-i", "wan0", "-i", "wan1"][..], &RULES].concat(), &directory);
    let traffic = Flowing::new(&rig, rig::DISTANT_CLIENT, rig::WAN);
    let first = Capture::tally(rig.gateway.as_ref().unwrap(), "wan0").unwrap();
    let second = Capture::tally(&rig.client, "eth1").unwrap();
    for (via, interface, now, before) in [
        (theirs, "wan1", &second, &first),
        (rig::GATEWAY, "wan0", &first, &second),
        (theirs, "wan1", &second, &first),
    ] {
        let (since, old) = (traffic.sent(), received(before));
        for address in via.both() {
            rig.router.ip(&format!("route replace default via {address} dev {interface}")).unwrap();
        }
        traffic.flow(interface);
        let counts = [received(now), received(before)];
        traffic.flow("and goes on");
        assert!(received(now) > counts[0], "{interface}");
        assert_eq!(received(before), counts[1], "some still go the old way: {interface}");
        assert!(counts[1] - old <= 2 * FEW as u64, "{} went the old way", counts[1] - old);
        eprintln!("{interface}: {} of both families went the old way", counts[1] - old);
        traffic.lost_few("the default route moved", since);
    }
    assert!(portfwd.stop().unwrap().0.success());
}

#[test]
fn packets_are_dropped_while_the_route_to_a_backend_is_gone() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { gateway: true, ..Options::default() }).unwrap();
    let directory = TempDir::new().unwrap();
    let portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    let traffic = Flowing::new(&rig, rig::DISTANT_CLIENT, rig::WAN);
    let outside = Capture::tally(rig.gateway.as_ref().unwrap(), "wan0").unwrap();
    let networks = ["192.168.77.0/24", "fd77::/64"];
    let route = |what: &str, which: &str| rig.router.ip(&format!("route {what} {which}")).unwrap();

    // The default route would carry them outside.
    networks.iter().for_each(|network| drop(route("del", &format!("{network} dev lan0"))));
    traffic.stop("the route is gone");
    drops(&portfwd, "not_internal");
    let count = dropped(&portfwd, "no_route");
    // Nor is there another.
    for address in rig::GATEWAY.both() {
        route("del", &format!("default via {address}"));
    }
    drops(&portfwd, "no_route");
    assert_eq!(count, 0);
    let escaped = outside.look(|tally| {
        let backend = |address| rig::SERVER.both().contains(&address);
        tally.count(|key| backend(key.destination.ip()) || backend(key.source.ip())).packets
    });
    assert_eq!(escaped, 0);

    let since = traffic.sent();
    for network in networks {
        route("add", &format!("{network} dev lan0"));
    }
    for address in rig::GATEWAY.both() {
        route("add", &format!("default via {address}"));
    }
    traffic.flow("routes are back");
    traffic.lost_few("routes came back", since);
    assert!(portfwd.stop().unwrap().0.success());
}

#[test]
fn where_the_source_chooses_the_way_the_kernel_is_asked() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { second_server: true, ..Options::default() }).unwrap();
    let directory = TempDir::new().unwrap();
    let second = rig.second_server.as_ref().unwrap();
    second.ip(&format!("address add {}/32 dev lo", rig::SERVER.v4)).unwrap();
    second.ip(&format!("address add {}/128 dev lo nodad", rig::SERVER.v6)).unwrap();
    // Another client, in the same place, with an address that no rule is about.
    let other =
        Addresses { v4: [203, 0, 113, 9].into(), v6: [0x2001, 0xdb8, 5, 0, 0, 0, 0, 9].into() };
    rig.client.ip(&format!("address add {}/32 dev eth0", other.v4)).unwrap();
    rig.client.ip(&format!("address add {}/128 dev eth0 nodad", other.v6)).unwrap();
    for (other, client) in other.both().into_iter().zip(rig::CLIENT.both()) {
        rig.router.ip(&format!("route add {other} via {client}")).unwrap();
    }
    for (to, via) in rig::SERVER.both().into_iter().zip(rig::SECOND_SERVER.both()) {
        rig.router.ip(&format!("route add {to} via {via} dev lan1 table 100")).unwrap();
    }
    let file = directory.path().join("portfwd.toml");
    let text = portfwd_tests::interfaces("external = ['wan0']\ninternal = ['lan0', 'lan1']");
    std::fs::write(&file, text).unwrap();
    let portfwd =
        start(&rig, &[&["--config", file.to_str().unwrap()][..], &RULES].concat(), &directory);
    let traffic = Flowing::new(&rig, rig::CLIENT, rig::WAN);
    let others = rig::SERVER.both().map(|address| Peer::backend(second, address));
    let bystanders = [other.v4.into(), other.v6.into()]
        .into_iter()
        .zip(rig::WAN.both())
        .map(|(from, to)| Peer::client(&rig.client, from, listen(&to.to_string())))
        .collect::<Vec<_>>();
    let rules = [("IPv4", "rule", "198.51.100.0/24"), ("IPv6", "-6 rule", "2001:db8:1::/64")];
    for (family, (name, rule, network)) in rules.into_iter().enumerate() {
        let (client, backend) = (&traffic.clients[family], &traffic.backends[family]);
        let (other, bystander) = (&others[family], &bystanders[family]);
        let main = Pair { client, backend };
        let by_table = Pair { client, backend: other };
        let beside = Pair { client: bystander, backend };
        for round in 1..=2 {
            beside.flows("a bystander");
            rig.router.ip(&format!("{rule} add from {network} lookup 100")).unwrap();
            by_table.flows("by the table's route");
            main.stops("by the main table's");
            by_table.is_steady("by the table's route");
            beside.is_steady("a bystander");
            assert_eq!(main.comes(), 0);
            let asked = format!("{name}: ip rule 32765 has from");
            until("it is told", 5, || portfwd.stderr().matches(&asked).count() == round);
            told(&portfwd, "so the kernel is asked for each packet's route, which is slower");

            rig.router.ip(&format!("{rule} del from {network} lookup 100")).unwrap();
            main.flows("by the main table's route");
            by_table.stops("by the table's route");
            main.is_steady("by the main table's route");
            beside.is_steady("a bystander");
            let again = format!("{name}: routes are remembered again");
            until("it is told", 5, || portfwd.stderr().matches(&again).count() == round);
        }
        // The rule is not about them.
        let all = bystander.sent() & !u64::from(u32::MAX)..=bystander.sent();
        assert_eq!(other.count(all), 0);
    }
    assert!(portfwd.stop().unwrap().0.success());
}

#[test]
fn an_interface_that_does_not_forward_is_asked_for() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let [theirs, ours] = second_link(&rig);
    let portfwd = start(&rig, &[&["-i", "wan0", "-i", "wan1"][..], &RULES].concat(), &directory);
    let traffic = Flowing::new(&rig, rig::CLIENT, rig::WAN);
    // They keep the way to the backend in mind.
    let others: Vec<Peer> = (theirs.both().into_iter().zip(ours.both()))
        .map(|(from, to)| Peer::client(&rig.client, from, listen(&to.to_string())))
        .collect();
    for (family, key) in ["ipv4", "ipv6"].into_iter().enumerate() {
        let pair = traffic.pairs()[family];
        let other = Pair { client: &others[family], ..pair };
        other.flows("by the other interface");
        let key = format!("net.{key}.conf.wan0.forwarding");
        rig.router.set_sysctl(&key, "0").unwrap();
        pair.stops("forwarding is off");
        drops(&portfwd, "forwarding_off");
        other.is_steady("by the other interface");
        assert_eq!(pair.comes(), 0);
        rig.router.set_sysctl(&key, "1").unwrap();
        pair.flows("forwarding is on again");
        pair.is_steady("forwarding is on again");
    }
    assert!(portfwd.stop().unwrap().0.success());
}

#[test]
fn without_a_daemon_that_looks_after_it_nothing_is_remembered() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let mut portfwd = start(&rig, &[&["-i", "wan0"][..], &RULES].concat(), &directory);
    let traffic = Flowing::new(&rig, rig::CLIENT, rig::WAN);
    let change = |number: u8| {
        let mac = format!("02:00:00:00:00:{number:02x}");
        rig.server.ip(&format!("link set eth0 address {mac}")).unwrap();
        for server in rig::SERVER.both() {
            let permanent = format!("neigh replace {server} lladdr {mac} dev lan0 nud permanent");
            rig.router.ip(&permanent).unwrap();
        }
    };
    change(0x91);
    traffic.flow("the daemon runs");
    portfwd.signal(libc::SIGSTOP).unwrap();
    thread::sleep(Duration::from_millis(4500));
    for number in 0x92..0x95 {
        change(number);
        // At once: the kernel is asked for each.
        traffic.pairs().iter().for_each(|pair| pair.is_steady("the daemon sleeps"));
    }
    portfwd.signal(libc::SIGCONT).unwrap();
    traffic.flow("the daemon is back");
    let since = traffic.sent();
    change(0x99);
    traffic.flow("and told of changes");
    traffic.lost_few("a backend changed its MAC", since);
    assert!(portfwd.stop().unwrap().0.success());
}
