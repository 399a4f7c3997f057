//! The control plane's view of the network, against a real kernel.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use portfwd::network::{Changes, Layer, Link, NeighbourState, Network, NextHop, Route};
use portfwd::sysctl::{self, Families};
use portfwd_tests::{Namespace, is_root, netns};
use tokio::time::{Instant, sleep, timeout};

/// A router and a host, joined by `r0` (10.0.0.1, fd00::1) and `h0` (10.0.0.2, fd00::2).
struct Wire {
    router: Namespace,
    host: Namespace,
}

impl Wire {
    fn new() -> Self {
        let [router, host] = ["router", "host"].map(|role| Namespace::new(role).unwrap());
        router.set_sysctl("net.ipv4.ip_forward", "0").unwrap();
        for namespace in [&router, &host] {
            // Link-local addresses are there at once, and not in the middle of a test.
            namespace.set_sysctl("net.ipv6.conf.default.accept_dad", "0").unwrap();
        }
        let wire = Self { router, host };
        wire.plug();
        wire
    }

    /// Makes the two links.
    fn plug(&self) {
        let Self { router, host } = self;
        router.ip(&format!("link add r0 type veth peer name h0 netns {}", host.name())).unwrap();
        for (namespace, link, number) in [(router, "r0", 1), (host, "h0", 2)] {
            namespace.ip(&format!("address add 10.0.0.{number}/24 dev {link}")).unwrap();
            namespace.ip(&format!("address add fd00::{number}/64 dev {link} nodad")).unwrap();
            namespace.ip(&format!("link set {link} up")).unwrap();
        }
    }

    fn ip(&self, arguments: &str) -> String {
        self.router.ip(arguments).unwrap()
    }

    /// Runs it in a runtime in the router.
    fn run<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        run(&self.router, work)
    }
}

fn run<T: Send>(namespace: &Namespace, work: impl AsyncFnOnce() -> T + Send) -> T {
    namespace.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { timeout(Duration::from_secs(60), work()).await.unwrap() })
    })
}

async fn index_of(network: &Network, link: &str) -> u32 {
    network.snapshot().await.unwrap().link(link).unwrap().index
}

#[test]
fn a_snapshot_shows_links_and_addresses() {
    if !is_root() {
        return;
    }
    let wire = Wire::new();
    wire.ip("address add 10.0.0.9/24 dev r0");
    wire.ip("address add 10.0.0.77/32 peer 10.0.0.78 dev r0");
    wire.ip("address add fd00::9/64 dev r0 nodad preferred_lft 0");
    let gro = |state| {
        netns::run(wire.host.command("ethtool").args(["-K", "h0", "gro", state])).unwrap();
    };
    wire.run(async || {
        let (network, _changes) = Network::open().unwrap();
        let snapshot = network.snapshot().await.unwrap();
        let r0 = snapshot.link("r0").unwrap();
        assert_eq!((r0.up, r0.mtu, r0.layer), (true, 1500, Layer::Ethernet));
        assert_eq!(r0.driver.as_deref(), Some("veth"));
        assert_eq!(snapshot.link_by_index(r0.index), Some(r0));
        assert_eq!((r0.can_transmit_xdp, r0.can_transmit_pieces), (Some(false), false));
        assert_eq!(snapshot.link("lo").unwrap().layer, Layer::Other);
        let externals = snapshot.external_addresses(&[r0.index]);
        let text =
            |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let v4: Vec<IpAddr> = externals.v4.into_iter().map(IpAddr::from).collect();
        let v6: Vec<IpAddr> = externals.v6.into_iter().map(IpAddr::from).collect();
        assert_eq!(text(&v4), ["10.0.0.1", "10.0.0.77", "10.0.0.9"]);
        assert_eq!(text(&v6), ["fd00::1", "fd00::9"]);

        // A veth takes frames for a peer that is ready.
        for (state, can) in [("on", true), ("off", false)] {
            gro(state);
            let snapshot = network.snapshot().await.unwrap();
            let r0 = snapshot.link("r0").unwrap();
            let cans = (r0.can_transmit_xdp, r0.can_transmit_pieces);
            assert_eq!(cans, (Some(can), can), "gro {state}");
        }
        wire.host.ip("link set h0 down").unwrap();
        assert!(!network.snapshot().await.unwrap().link("r0").unwrap().up);

        // What stands on what. The other end of a veth is not below it.
        wire.ip("link add br0 type bridge");
        wire.ip("link add v0 type veth peer name v1");
        wire.ip("link set v0 master br0");
        wire.ip("link set v1 master br0");
        let snapshot = network.snapshot().await.unwrap();
        let [br0, v0, v1] = ["br0", "v0", "v1"].map(|name| snapshot.link(name).unwrap());
        assert_eq!((v0.master, v0.parent), (Some(br0.index), None));
        assert_eq!(snapshot.bottoms(v0), [v0]);
        let mut ports = [v0, v1];
        ports.sort_by_key(|port| port.index);
        assert_eq!(snapshot.bottoms(br0), ports);
    });
}

#[test]
fn routes_and_gateways() {
    if !is_root() {
        return;
    }
    let wire = Wire::new();
    for arguments in [
        "route add default via 10.0.0.2",
        "route add 192.0.2.0/24 via inet6 fd00::2 dev r0",
        "route add 198.51.100.0/24 nexthop via 10.0.0.3 dev r0 nexthop via 10.0.0.4 dev r0",
        "route add blackhole 203.0.113.1",
        "route add prohibit 203.0.113.2",
        "route add unreachable 203.0.113.3",
        "route add table 7 10.7.0.0/16 via 10.0.0.7",
        "-6 route add 2001:db8::/32 via fd00::2",
        "-6 route add blackhole 2001:db8::b",
        "-6 route add prohibit 2001:db8::c",
        "-6 route add unreachable 2001:db8::d",
        "rule add to 10.9.0.0/16 prohibit",
        "nexthop add id 5 via 10.0.0.5 dev r0",
        "route add 10.5.0.0/16 nhid 5",
    ] {
        wire.ip(arguments);
    }
    wire.run(async || {
        let (network, _changes) = Network::open().unwrap();
        let interface = index_of(&network, "r0").await;
        let via =
            |gateway: &str| Route::Via(NextHop { interface, address: gateway.parse().unwrap() });
        for (to, route) in [
            ("10.0.0.2", via("10.0.0.2")),
            ("1.1.1.1", via("10.0.0.2")),
            ("192.0.2.5", via("fd00::2")),
            ("10.5.1.1", via("10.0.0.5")),
            ("10.0.0.1", Route::Local),
            ("127.0.0.1", Route::Local),
            ("fd00::1", Route::Local),
            ("::1", Route::Local),
            ("203.0.113.1", Route::Unreachable),
            ("203.0.113.2", Route::Unreachable),
            ("203.0.113.3", Route::Unreachable),
            ("10.9.1.1", Route::Unreachable),
            ("10.0.0.255", Route::Unreachable),
            ("224.0.0.5", Route::Unreachable),
            ("fd00::2", via("fd00::2")),
            ("2001:db8::1", via("fd00::2")),
            ("2001:db8::b", Route::Unreachable),
            ("2001:db8::c", Route::Unreachable),
            ("2001:db8::d", Route::Unreachable),
            ("2001:db9::1", Route::Unreachable),
        ] {
            assert_eq!(network.route(to.parse().unwrap()).await.unwrap(), route, "{to}");
        }
        // More than are asked for at once, each with its own answer.
        let many: Vec<IpAddr> =
            (1..=100u8).flat_map(|n| [[10, 0, 0, n], [203, 0, 113, 1]]).map(IpAddr::from).collect();
        let routes = network.routes(&many).await.unwrap();
        assert_eq!(routes.len(), many.len());
        for (to, route) in many.iter().zip(routes) {
            assert_eq!(route, network.route(*to).await.unwrap(), "{to}");
        }
        let gateways = network.gateways(&[interface]).await.unwrap();
        let addresses: Vec<String> = gateways.iter().map(|hop| hop.address.to_string()).collect();
        assert_eq!(addresses, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "fd00::2"]);
        assert_eq!(network.gateways(&[1]).await.unwrap(), []);
        wire.ip("route del default");
        let route = network.route("1.1.1.1".parse().unwrap()).await.unwrap();
        assert_eq!(route, Route::Unreachable);
    });
}

#[test]
fn a_fresh_namespace_has_nothing() {
    if !is_root() {
        return;
    }
    let namespace = Namespace::new("fresh").unwrap();
    namespace.ip("address flush dev lo").unwrap();
    namespace.ip("link set lo down").unwrap();
    run(&namespace, async || {
        let (network, _changes) = Network::open().unwrap();
        let snapshot = network.snapshot().await.unwrap();
        assert_eq!((snapshot.links.len(), snapshot.addresses.len()), (1, 0));
        assert!(!snapshot.links[0].up);
        for to in ["1.1.1.1", "2001:db8::1"] {
            assert_eq!(network.route(to.parse().unwrap()).await.unwrap(), Route::Unreachable);
        }
        assert_eq!(network.gateways(&[1]).await.unwrap(), []);
    });
}

/// Waits until the changes so far have been told.
async fn quiet(changes: &mut Changes) {
    while let Ok(change) = timeout(Duration::from_millis(400), changes.next()).await {
        change.unwrap();
    }
}

async fn changed(changes: &mut Changes, what: &str) {
    timeout(Duration::from_secs(5), changes.next()).await.expect(what).unwrap();
}

#[test]
fn changes_are_told_even_after_an_overflow() {
    if !is_root() {
        return;
    }
    let wire = Wire::new();
    wire.run(async || {
        let (network, mut changes) = Network::open().unwrap();
        quiet(&mut changes).await;
        for arguments in [
            "address add 10.0.0.8/24 dev r0",
            "address add fd00::8/64 dev r0 nodad",
            "route add 1.2.3.4 via 10.0.0.2",
            "-6 route add 2001:db8::/32 via fd00::2",
            "rule add to 9.9.9.9 prohibit",
            "-6 rule add to 2001:db8::9 prohibit",
            "link add d0 type veth",
            "link set r0 mtu 1400",
        ] {
            wire.ip(arguments);
            changed(&mut changes, arguments).await;
            quiet(&mut changes).await;
        }
        // The peer's GRO changes no link, only whether it takes what XDP sends.
        netns::run(wire.host.command("ethtool").args(["-K", "h0", "gro", "on"])).unwrap();
        changed(&mut changes, "gro").await;
        quiet(&mut changes).await;
        // Neighbours are not listened to: our own refreshing does not wake us.
        let interface = index_of(&network, "r0").await;
        let hop = NextHop { interface, address: "10.0.0.2".parse().unwrap() };
        network.keep_resolved(&hop).await.unwrap();
        assert!(timeout(Duration::from_millis(500), changes.next()).await.is_err());
        // A call that is given up midway loses nothing.
        wire.ip("address add 10.0.0.99/24 dev r0");
        assert!(timeout(Duration::from_millis(1), changes.next()).await.is_err());
        changed(&mut changes, "what came while a call was given up").await;
        quiet(&mut changes).await;
        // More than the socket holds while nobody reads.
        let routes: String = (0..20_000)
            .map(|n| format!("route add 20.{}.{}.0/24 via 10.0.0.2\n", n / 256, n % 256))
            .collect();
        let batch = tempfile(&routes);
        wire.ip(&format!("-batch {}", batch.path().join("batch").display()));
        changed(&mut changes, "an overflow").await;
        quiet(&mut changes).await;
        assert_eq!(network.gateways(&[interface]).await.unwrap().len(), 2);
        wire.ip("address del 10.0.0.99/24 dev r0");
        changed(&mut changes, "a change after an overflow").await;
    });
}

fn tempfile(text: &str) -> portfwd_tests::TempDir {
    let directory = portfwd_tests::TempDir::new().unwrap();
    fs::write(directory.path().join("batch"), text).unwrap();
    directory
}

/// Waits until the kernel says this of a neighbour.
async fn becomes(network: &Network, hop: &NextHop, wanted: NeighbourState) {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let is = network.neighbour(hop).await.unwrap();
        if is == Some(wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "{hop:?} is {is:?}, wanted {wanted:?}");
        sleep(Duration::from_millis(2)).await;
    }
}

#[test]
fn neighbours_are_resolved_and_those_of_others_left_alone() {
    use NeighbourState::{Delay, Failed, Incomplete, Reachable};
    if !is_root() {
        return;
    }
    let wire = Wire::new();
    for family in ["ipv4", "ipv6"] {
        for (key, value) in [("delay_first_probe_time", "1"), ("retrans_time_ms", "100")] {
            wire.router.set_sysctl(&format!("net.{family}.neigh.r0.{key}"), value).unwrap();
        }
    }
    let links: serde_json::Value =
        serde_json::from_str(&wire.host.ip("-j link show dev h0").unwrap()).unwrap();
    let mac = links[0]["address"].as_str().unwrap();
    wire.run(async || {
        let (network, _changes) = Network::open().unwrap();
        let interface = index_of(&network, "r0").await;
        for address in ["10.0.0.2", "fd00::2"] {
            let hop = NextHop { interface, address: address.parse().unwrap() };
            assert_eq!(network.neighbour(&hop).await.unwrap(), None, "{address}");
            network.keep_resolved(&hop).await.unwrap();
            becomes(&network, &hop, Reachable).await;
            for _ in 0..20 {
                network.keep_resolved(&hop).await.unwrap();
                assert_eq!(network.neighbour(&hop).await.unwrap(), Some(Reachable));
            }
            // Stale: valid all the while, and soon known to be true again.
            wire.ip(&format!("neigh replace {address} lladdr {mac} dev r0 nud stale"));
            network.keep_resolved(&hop).await.unwrap();
            assert_eq!(network.neighbour(&hop).await.unwrap(), Some(Delay));
            becomes(&network, &hop, Reachable).await;
            // Failed: asks again.
            wire.ip(&format!("neigh del {address} dev r0"));
            wire.host.ip("link set h0 arp off").unwrap();
            wire.host.ip("address del fd00::2/64 dev h0").unwrap();
            network.keep_resolved(&hop).await.unwrap();
            assert_eq!(network.neighbour(&hop).await.unwrap(), Some(Incomplete));
            becomes(&network, &hop, Failed).await;
            wire.host.ip("link set h0 arp on").unwrap();
            wire.host.ip("address add fd00::2/64 dev h0 nodad").unwrap();
            network.keep_resolved(&hop).await.unwrap();
            becomes(&network, &hop, Reachable).await;
            // The user's, and those of other programs.
            for (theirs, shown) in [
                ("lladdr 02:00:00:00:00:09 nud permanent", "PERMANENT"),
                ("lladdr 02:00:00:00:00:09 nud noarp", "NOARP"),
                ("lladdr 02:00:00:00:00:09 nud stale extern_learn", "extern_learn"),
                ("managed", "managed"),
            ] {
                wire.ip(&format!("neigh del {address} dev r0"));
                wire.ip(&format!("neigh replace {address} dev r0 {theirs}"));
                network.keep_resolved(&hop).await.unwrap();
                let after = wire.ip(&format!("neigh show {address} dev r0 nud all"));
                assert!(after.contains(shown), "{theirs}: {after}");
            }
        }
        // A link that has gone is an error and no panic.
        let gone = NextHop { interface: 4711, address: "10.0.0.2".parse().unwrap() };
        network.keep_resolved(&gone).await.unwrap_err();
    });
}

#[test]
fn forwarding_is_switched_on_where_it_is_off() {
    if !is_root() {
        return;
    }
    let wire = Wire::new();
    // A name with a dot, as VLANs have it.
    wire.ip("link add r0.100 type veth peer name other");
    wire.ip("link add management type veth peer name router");
    wire.run(async || {
        let (network, _changes) = Network::open().unwrap();
        let snapshot = network.snapshot().await.unwrap();
        let (r0, vlan) = (snapshot.link("r0").unwrap(), snapshot.link("r0.100").unwrap());
        let write =
            |key: &str, value: &str| fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
        let read = |key: &str| fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap();
        write("ipv6/conf/all/forwarding", "0");
        write("ipv4/conf/all/rp_filter", "1");
        // One asks for no advertisements, one is a router's already.
        write("ipv6/conf/other/accept_ra", "0");
        write("ipv6/conf/router/forwarding", "1");
        let both = Families { v4: true, v6: true };
        let prepare = |families| -> Vec<String> {
            let mut changes = Vec::new();
            sysctl::prepare(&[r0], &[vlan], families, &mut changes).unwrap();
            changes.iter().map(ToString::to_string).collect()
        };
        assert_eq!(prepare(Families::default()), [""; 0]);
        let said = prepare(both);
        let said: Vec<&str> =
            said.iter().map(|change| change.split(" (").next().unwrap()).collect();
        assert_eq!(
            said,
            [
                "set net.ipv4.ip_forward = 1",
                "set net.ipv4.conf.r0/100.accept_local = 1",
                "set net.ipv4.conf.r0/100.rp_filter = 2",
                "set net.ipv6.conf.default.accept_ra = 2",
                "set net.ipv6.conf.management.accept_ra = 2",
                "set net.ipv6.conf.r0.accept_ra = 2",
                "set net.ipv6.conf.r0/100.accept_ra = 2",
                "set net.ipv6.conf.all.forwarding = 1",
            ]
        );
        assert_eq!(read("ipv4/conf/r0.100/rp_filter"), "2\n");
        assert_eq!(read("ipv4/conf/r0/forwarding"), "1\n");
        assert_eq!(read("ipv6/conf/r0.100/forwarding"), "1\n");
        assert_eq!(prepare(both), [""; 0]);
        assert_eq!(read("ipv6/conf/router/accept_ra"), "1\n");
        write("ipv4/conf/r0/forwarding", "0");
        write("ipv6/conf/r0.100/forwarding", "0");
        assert_eq!(
            prepare(both),
            [
                "set net.ipv4.conf.r0.forwarding = 1 (was 0)",
                "set net.ipv6.conf.r0/100.forwarding = 1 (was 0)"
            ]
        );
        // What was done before an error is told.
        write("ipv4/conf/r0/forwarding", "0");
        let gone = Link { name: "zz".to_owned(), ..Link::default() };
        let mut changes = Vec::new();
        sysctl::prepare(&[r0], &[&gone], both, &mut changes).unwrap_err();
        let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
        assert_eq!(changes, ["set net.ipv4.conf.r0.forwarding = 1 (was 0)"]);
    });
}

/// Lets the host say that it is a router, again and again for two seconds, until the router has a
/// default route to it. Returns whether it has.
fn learns_a_route(wire: &Wire) -> bool {
    // RFC 4861, 4.2: type, code, checksum (filled in by the kernel), hop limit, flags, 1800 s, ...
    const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut sent = 0;
    let deadline = std::time::Instant::now() + Duration::from_secs(2);
    while std::time::Instant::now() < deadline {
        // It cannot be sent before the link has its own address.
        let said = wire.host.enter(|| raw_icmpv6("h0").send_to(&ADVERTISEMENT, "[ff02::1]:0"));
        sent += u32::from(said.is_ok());
        std::thread::sleep(Duration::from_millis(20));
        if has_learned_route(wire) {
            return true;
        }
    }
    assert!(sent > 10, "{sent}");
    false
}

fn has_learned_route(wire: &Wire) -> bool {
    wire.ip("-6 route show default dev r0").contains("proto ra")
}

/// A socket whose packets to groups leave by this interface, with a hop limit of 255.
fn raw_icmpv6(interface: &str) -> UdpSocket {
    // SAFETY: a bare system call; the descriptor is new and nobody else's.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let name = std::ffi::CString::new(interface).unwrap();
    // SAFETY: a string that ends with zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) } as libc::c_int;
    for (option, value) in [(libc::IPV6_MULTICAST_HOPS, 255), (libc::IPV6_MULTICAST_IF, index)] {
        let length = size_of_val(&value) as libc::socklen_t;
        let value = (&raw const value).cast();
        // SAFETY: the kernel reads one int.
        let status = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IPV6, option, value, length)
        };
        assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    }
    socket.into()
}

#[test]
fn learned_default_routes_outlive_that_the_box_becomes_a_router() {
    if !is_root() {
        return;
    }
    // Nothing is served on r0: it might lead to the administrator.
    let prepare = || {
        let mut changes = Vec::new();
        sysctl::prepare(&[], &[], Families { v4: false, v6: true }, &mut changes).unwrap();
        changes.len()
    };
    let wire = Wire::new();
    assert!(learns_a_route(&wire));
    assert_ne!(wire.router.enter(prepare), 0);
    assert!(has_learned_route(&wire));
    wire.ip("link del r0");
    wire.plug();
    assert!(learns_a_route(&wire));

    // A box that was a router before, and as such ignores advertisements.
    let wire = Wire::new();
    wire.router.set_sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
    assert_eq!(wire.router.enter(prepare), 0);
    assert!(!learns_a_route(&wire));
}

#[test]
fn ports_are_reserved_and_released() {
    if !is_root() {
        return;
    }
    let namespace = Namespace::new("ports").unwrap();
    namespace.enter(|| {
        const LIST: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
        assert_eq!(sysctl::ephemeral_ports().unwrap(), 32768..=60999);
        fs::write(LIST, "8080,40000-40010").unwrap();
        let ports = BTreeSet::from([80, 32768, 40005, 40011, 50000, 60999, 61000]);
        let new = sysctl::not_reserved(&ports).unwrap();
        assert_eq!(new, BTreeSet::from([32768, 40011, 50000, 60999]));
        let change = sysctl::reserve_ports(&new).unwrap().unwrap();
        assert_eq!(change.to, "8080,32768,40000-40011,50000,60999");
        assert_eq!(sysctl::reserve_ports(&new).unwrap(), None);
        assert_eq!(sysctl::not_reserved(&ports).unwrap(), BTreeSet::new());
        let change = sysctl::release_ports(&new).unwrap().unwrap();
        assert_eq!(change.to, "8080,40000-40010");
        assert_eq!(sysctl::release_ports(&new).unwrap(), None);
        fs::write(LIST, "\n").unwrap();
        // The longest list, far beyond a page: every second port.
        let many: BTreeSet<u16> = (32768..61000).step_by(2).collect();
        assert_eq!(sysctl::not_reserved(&many).unwrap(), many);
        assert!(sysctl::reserve_ports(&many).unwrap().is_some());
        assert_eq!(sysctl::reserve_ports(&many).unwrap(), None);
        for _ in 0..500 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            assert_eq!(port % 2, 1, "{port} is reserved");
        }
        assert_eq!(sysctl::release_ports(&many).unwrap().unwrap().to, "");
    });
}
