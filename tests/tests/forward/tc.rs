//! What only TC can: interfaces without Ethernet, and super-packets with checksums to be filled in.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use portfwd_tests::netns::Namespace;
use portfwd_tests::peers::{self, Answer, Server};
use portfwd_tests::rig::{self, Options, Rig};
use portfwd_tests::tun::Tunnel;
use portfwd_tests::wire::{Capture, Direction, Frame, Tally};
use portfwd_tests::{TempDir, is_root};

use crate::running::*;

/// What an end received, all of which was verified, and how much it sent in a way that needs a card.
#[derive(Default)]
struct End {
    received: Tally,
    unfilled: u64,
    large: u64,
}

impl End {
    fn add(&mut self, frame: &Frame) {
        match frame.direction {
            Direction::Received => self.received.add(frame),
            Direction::Sent => {
                self.unfilled += u64::from(frame.unfilled);
                self.large += u64::from(frame.data.len() > 1514);
            }
        }
    }
}

/// Sends several datagrams at once, and has them back.
fn segments(namespace: &Namespace, server: SocketAddr, size: u16, count: usize) {
    const UDP_SEGMENT: libc::c_int = 103;
    let socket: UdpSocket = peers::udp_client(namespace, server).unwrap();
    let size_of_each = libc::c_int::from(size);
    // SAFETY: an integer, and its size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            UDP_SEGMENT,
            (&raw const size_of_each).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
    let sent: Vec<u8> = (0..usize::from(size) * count).map(|at| (at / 7) as u8).collect();
    assert_eq!(socket.send(&sent).unwrap(), sent.len());
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut received = vec![0; 65_535];
    for datagram in sent.chunks(size.into()) {
        let length = socket.recv(&mut received).unwrap();
        assert_eq!(received[..length], *datagram);
    }
}

/// As between hosts and containers: nothing is split or filled in before the router's own wires, where each
/// frame is verified, and counted as portfwd did.
#[test]
fn super_packets_stay_whole_and_their_checksums_come_right() {
    if !is_root() {
        return;
    }
    for masquerade in [false, true] {
        let rig = Rig::with(Options { offloads: true, ..Options::default() }).unwrap();
        let directory = TempDir::new().unwrap();
        let rules = for_both("game", "tcp+udp", 9000..=9000, 27015);
        let rules = if masquerade { masqueraded(rules) } else { rules };
        let interfaces = "external = [\"wan0\"]\nattach = \"auto\"";
        let portfwd = started(&rig, interfaces, &rules, &[], &directory);
        let [client, server] = [&rig.client, &rig.server].map(|end| {
            Capture::with(end, "eth0", End::default(), |end, frame| end.add(frame)).unwrap()
        });
        for (wan, backend) in both() {
            let _game = (
                Server::tcp(&rig.server, at(backend, 27015), Answer::Echo).unwrap(),
                Server::udp(&rig.server, at(backend, 27015), Answer::Echo).unwrap(),
            );
            echo_tcp(&rig.client, at(wan, 9000), 5_000_000);
            echo_udp(&rig.client, at(wan, 9000));
            segments(&rig.client, at(wan, 9000), 1200, 30);
            segments(&rig.client, at(wan, 9000), 1, 10);
        }
        for (rule, (wan, backend)) in rules.iter().zip(both()) {
            poll(|| {
                let stats = Stats(portfwd.stats().unwrap());
                let forward = server
                    .look(|end| end.received.count(|key| key.destination == at(backend, 27015)));
                let reply =
                    client.look(|end| end.received.count(|key| key.source == at(wan, 9000)));
                match stats.counts(&rule.name) {
                    counts if counts == Counts { forward, reply } => Ok(()),
                    counts => Err(format!("{counts:?} but {forward} and {reply} arrived")),
                }
            });
        }
        let stats = portfwd.stats().unwrap();
        assert_eq!(total(&stats["verdicts"]["dropped"]), 0, "{stats}");
        for end in [client, server] {
            let End { received, unfilled, large } = end.stop().unwrap();
            received.ensure_valid().unwrap();
            assert!(unfilled > 100 && large > 100, "{unfilled} unfilled, {large} large");
        }
    }
}

/// Sends TCP and UDP by rules from 9000 to 27015 of these backends.
fn exchange(rig: &Rig, ways: [(IpAddr, IpAddr); 2]) {
    for (wan, backend) in ways {
        let _game = (
            Server::tcp(&rig.server, at(backend, 27015), Answer::Echo).unwrap(),
            Server::udp(&rig.server, at(backend, 27015), Answer::Echo).unwrap(),
        );
        echo_tcp(&rig.client, at(wan, 9000), 1_000_000);
        for _ in 0..20 {
            echo_udp(&rig.client, at(wan, 9000));
        }
    }
}

/// A network of its own between two hosts, over an interface `NAME` at both that is there.
fn address(ends: [&Namespace; 2], name: &str, network: u8) -> [[IpAddr; 2]; 2] {
    [0usize, 1].map(|end| {
        let host = end + 1;
        let [v4, v6] = [format!("10.9.{network}.{host}"), format!("fd99:{network}::{host}")];
        ends[end].ip(&format!("address add {v4}/24 dev {name}")).unwrap();
        ends[end].ip(&format!("address add {v6}/64 dev {name} nodad")).unwrap();
        ends[end].ip(&format!("link set {name} mtu 1400 up")).unwrap();
        [v4, v6].map(|address| address.parse().unwrap())
    })
}

/// Each side by Ethernet or without it, and none of it through the stack.
#[test]
fn interfaces_without_ethernet_at_either_side() {
    if !is_root() {
        return;
    }
    for (outside, inside) in [(true, false), (false, true), (true, true)] {
        for offloads in [false, true] {
            let rig = Rig::with(Options { offloads, ..Options::default() }).unwrap();
            let directory = TempDir::new().unwrap();
            let Rig { client, router, server, .. } = &rig;
            let mut tunnels = Vec::new();
            let (mut external, mut wan) = ("wan0", rig::WAN.both());
            if outside {
                tunnels.push(Tunnel::new([router, client], "far0").unwrap());
                (external, [wan, _]) = ("far0", address([router, client], "far0", 1));
            }
            let mut backends = rig::SERVER.both();
            if inside {
                tunnels.push(Tunnel::new([router, server], "near0").unwrap());
                [_, backends] = address([router, server], "near0", 2);
                let clients = match outside {
                    true => ["10.9.1.0/24", "fd99:1::/64"],
                    false => ["198.51.100.0/24", "2001:db8:1::/64"],
                };
                for network in clients {
                    server.ip(&format!("route replace {network} dev near0")).unwrap();
                }
            }
            let rules: Vec<Rule> = wan
                .into_iter()
                .zip(backends)
                .enumerate()
                .map(|(number, (wan, backend))| Rule {
                    address: Some(wan),
                    ..Rule::new(&number.to_string(), "tcp+udp", 9000..=9000, at(backend, 27015))
                })
                .collect();
            let interfaces = format!("external = [\"{external}\"]\nattach = \"auto\"");
            let portfwd = started(&rig, &interfaces, &rules, &[], &directory);
            exchange(&rig, [0, 1].map(|family| (wan[family], backends[family])));
            let stats = Stats(portfwd.stats().unwrap());
            for rule in &rules {
                let Counts { forward, reply } = stats.counts(&rule.name);
                let case = format!("{outside} {inside} {offloads}: {}", stats.0);
                assert!(forward.packets > 300 && reply.packets > 300, "{case}");
                assert_eq!(total(&stats.rule(&rule.name)["dropped"]), 0, "{case}");
                // But for the first packets, whose neighbour may not be known yet.
                let unknown = stats.to_stack(&rule.name, "no_neighbour");
                assert!(unknown <= 2, "{case}");
                assert_eq!(total(&stats.rule(&rule.name)["to_stack"]), unknown, "{case}");
            }
        }
    }
}

/// What fits is said of the whole way, not of the way to the gateway, whose link address nobody has to know.
#[test]
fn without_ethernet_a_route_by_a_gateway_has_its_own_mtu() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    let directory = TempDir::new().unwrap();
    let Rig { client, router, server, .. } = &rig;
    let _tunnel = Tunnel::new([router, client], "far0").unwrap();
    let [wan, gateways] = address([router, client], "far0", 1);
    let [distant4, distant6] = rig::DISTANT_CLIENT.both();
    let other4: IpAddr = "203.0.113.3".parse().unwrap();
    // The gateway of IPv4 may be one of IPv6.
    let ways = [(other4, 0, gateways[1]), (distant4, 0, gateways[0]), (distant6, 1, gateways[1])];
    let backends = rig::SERVER.both();
    for (host, _, gateway) in ways {
        client.ip(&format!("address add {host} dev lo")).unwrap();
        let inet6 = if gateway.is_ipv6() { "inet6" } else { "" };
        router.ip(&format!("route add {host} via {inet6} {gateway} mtu lock 1280")).unwrap();
    }
    let rules: Vec<Rule> = [0, 1]
        .map(|family| Rule {
            address: Some(wan[family]),
            ..Rule::new(&family.to_string(), "udp", 9000..=9000, at(backends[family], 27015))
        })
        .into();
    let interfaces = "external = [\"far0\"]\nattach = \"auto\"";
    let portfwd = started(&rig, interfaces, &rules, &[], &directory);
    for (number, (host, family, _)) in ways.into_iter().enumerate() {
        let backend = at(backends[family], 27015);
        let _game = Server::udp(server, backend, Answer::Echo).unwrap();
        let socket = client.enter(|| UdpSocket::bind((host, 0)).unwrap());
        socket.connect((wan[family], 9000)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        // What fits has made the way known. Of what does not, the backend is told, and cuts the next up.
        for length in [100, 1300] {
            poll(|| {
                socket.send(&vec![7; length]).unwrap();
                let answered = socket.recv(&mut [0; 1500]);
                answered.map_err(|error| format!("{host}: {error}"))
            });
        }
        let stats = Stats(portfwd.stats().unwrap());
        assert!(stats.passed("too_big") > number as u64, "{host}: {}", stats.0);
    }
}
