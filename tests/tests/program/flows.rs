//! Stateful rules: what becomes of packets, and of flows.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::time::Duration;

use portfwd::datapath::Living;
use portfwd::flows::{FlowRow, State, Timeouts};
use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Dropped, Passed};
use portfwd_tests::is_root;
use portfwd_tests::packet::{self, Packet, TCP, UDP};
use portfwd_tests::wire;

use crate::router::*;

const SYN: u8 = 2;
const SYN_ACK: u8 = 18;
const ACK: u8 = 16;
const FIN_ACK: u8 = 17;

/// Both ends of a frame's packet, as it left.
fn ends(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    let (addresses, size) = if frame[12..14] == [8, 0] { (26, 4) } else { (22, 16) };
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let ports = addresses + 2 * size;
    let address = |at: usize| -> IpAddr {
        match size {
            4 => <[u8; 4]>::try_from(&frame[at..at + 4]).unwrap().into(),
            _ => <[u8; 16]>::try_from(&frame[at..at + 16]).unwrap().into(),
        }
    };
    let source = SocketAddr::new(address(addresses), port(ports));
    (source, SocketAddr::new(address(addresses + size), port(ports + 2)))
}

/// Sends a packet, which is redirected in order; its ends afterwards.
fn goes(router: &mut Router, role: Role, link: u8, packet: &Packet) -> (SocketAddr, SocketAddr) {
    let seen = router.try_frame(role, link, &packet.bytes());
    assert_eq!(seen.outcome, Outcome::Redirect, "{packet:?}");
    wire::verify(&seen.frame).unwrap();
    let hops = if packet.is_v4() { seen.frame[22] } else { seen.frame[21] };
    assert_eq!(hops, packet.hops - 1);
    ends(&seen.frame)
}

fn packet(protocol: u8, link: u8, source: SocketAddr, destination: SocketAddr) -> Packet {
    Packet { link_destination: link_address(link, 1), ..Packet::new(protocol, source, destination) }
}

fn forward(
    router: &mut Router,
    protocol: u8,
    from: SocketAddr,
    to: SocketAddr,
) -> (SocketAddr, SocketAddr) {
    goes(router, Role::External, WAN, &packet(protocol, WAN, from, to))
}

fn reply(
    router: &mut Router,
    protocol: u8,
    from: SocketAddr,
    to: SocketAddr,
) -> (SocketAddr, SocketAddr) {
    goes(router, Role::Internal, LAN, &packet(protocol, LAN, from, to))
}

/// Opens a connection as TCP does; the ends that the backend sees.
fn connect(router: &mut Router, from: SocketAddr, to: SocketAddr) -> (SocketAddr, SocketAddr) {
    let segment = |flags, source, destination, link| {
        let mut packet = packet(TCP, link, source, destination);
        packet.tcp.flags = flags;
        packet
    };
    let seen = goes(router, Role::External, WAN, &segment(SYN, from, to, WAN));
    let answer = goes(router, Role::Internal, LAN, &segment(SYN_ACK, seen.1, seen.0, LAN));
    assert_eq!(answer, (to, from));
    // Every segment of these has sequence 0x01020304 and acknowledges 0x05060708.
    let mut last = segment(ACK, from, to, WAN).bytes();
    let at = if from.is_ipv4() { 34 } else { 54 } + 8;
    last[at..at + 4].copy_from_slice(&0x0102_0305_u32.to_be_bytes());
    assert_eq!(
        router.datapath.try_frame(hook(), Role::External, WAN.into(), &last).unwrap().0,
        portfwd::datapath::Action::Redirect
    );
    seen
}

fn flows(router: &Router) -> Vec<FlowRow> {
    let mut rows = Vec::new();
    let each = |row| {
        rows.push(row);
        ControlFlow::Continue(())
    };
    router.datapath.flows().each(each).unwrap();
    rows
}

fn living(router: &Router, rule: &str, backend: IpAddr, timeouts: Timeouts) -> Living {
    Living::new(vec![(router.compiler.counter(rule).unwrap(), backend)], timeouts)
}

#[test]
fn masquerade_hides_the_client_and_answers_find_it() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@12.10:80/tcp+udp masquerade"]));
        for version in Version::BOTH {
            for protocol in [TCP, UDP] {
                let (client, listen) = (version.at(WAN, 2, 5000), version.at(WAN, 1, 8080));
                let backend = version.at(LAN, 10, 80);
                let mut sources = HashSet::new();
                for port in 5000..5050 {
                    let client = SocketAddr::new(client.ip(), port);
                    let (source, destination) = forward(router, protocol, client, listen);
                    assert_eq!((source.ip(), destination), (version.address(LAN, 1), backend));
                    assert!(PORTS.masquerade.contains(&source.port()), "{source}");
                    assert_eq!(source.port() % 2, port % 2);
                    assert!(sources.insert(source));
                    for _ in 0..3 {
                        assert_eq!(reply(router, protocol, backend, source), (listen, client));
                        assert_eq!(forward(router, protocol, client, listen), (source, backend));
                    }
                }
                // Its own port, as that is free and portfwd's.
                let client = SocketAddr::new(client.ip(), 50_999);
                let (source, _) = forward(router, protocol, client, listen);
                let free = !sources.iter().any(|other| other.port() == 50_999);
                assert_eq!(source.port() == 50_999, free);
            }
        }
    });
}

#[test]
fn several_backends_share_clients_who_stay() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@12.10:80/udp @12.11:81 @12.12:82"]));
        for version in Version::BOTH {
            let listen = version.at(WAN, 1, 8080);
            let mut chosen = Vec::new();
            for port in 6000..6060 {
                let client = version.at(WAN, 2, port);
                let (source, backend) = forward(router, UDP, client, listen);
                assert_eq!(source, client);
                assert_eq!(reply(router, UDP, backend, client), (listen, client));
                assert_eq!(forward(router, UDP, client, listen), (client, backend));
                chosen.push((client, backend));
            }
            let backends: BTreeSet<SocketAddr> = chosen.iter().map(|(_, to)| *to).collect();
            let expected = [(10, 80), (11, 81), (12, 82)];
            assert_eq!(backends, expected.map(|(host, port)| version.at(LAN, host, port)).into());
            // A reply that is of no flow has one meaning only.
            let stranger = version.at(WAN, 2, 7);
            assert_eq!(reply(router, UDP, version.at(LAN, 11, 81), stranger), (listen, stranger));
        }
    });
}

#[test]
fn many_ports_and_rules_share_a_backend_port() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8000-8009:@12.10:80/udp", "9000:@12.10:80/udp"]));
        for version in Version::BOTH {
            let backend = version.at(LAN, 10, 80);
            let mut seen = Vec::new();
            // One socket of a client to all of them.
            let client = version.at(WAN, 2, 5000);
            for port in (8000..8010).chain([9000]) {
                let listen = version.at(WAN, 1, port);
                let (source, destination) = forward(router, UDP, client, listen);
                assert_eq!((source.ip(), destination), (client.ip(), backend));
                seen.push((source, listen));
            }
            let sources: HashSet<SocketAddr> = seen.iter().map(|(source, _)| *source).collect();
            assert_eq!(sources.len(), 11);
            for (source, listen) in &seen {
                assert_eq!(reply(router, UDP, backend, *source), (*listen, client));
                assert_eq!(forward(router, UDP, client, *listen), (*source, backend));
                assert_eq!(reply(router, UDP, backend, *source), (*listen, client));
            }
            // Of no flow: the backend's own.
            let own = packet(UDP, LAN, backend, version.at(WAN, 2, 9));
            let outcome = router.try_frame(Role::Internal, LAN, &own.bytes()).outcome;
            assert_eq!(outcome, Outcome::Pass(Passed::NoFlow));
        }
    });
}

#[test]
fn who_uses_the_external_address_from_inside_gets_an_answer() {
    if !is_root() {
        return;
    }
    for rule in ["8080:@12.10:80/tcp+udp", "8080:@12.10:80/tcp+udp masquerade"] {
        with_router(|router| {
            router.load(&in_both(&[rule]));
            for version in Version::BOTH {
                let (listen, backend) = (version.at(WAN, 1, 8080), version.at(LAN, 10, 80));
                // A neighbour, and the backend itself.
                for client in [version.at(LAN, 12, 5000), version.at(LAN, 10, 5001)] {
                    for protocol in [TCP, UDP] {
                        for _ in 0..3 {
                            let (source, to) = reply(router, protocol, client, listen);
                            assert_eq!((source.ip(), to), (version.address(LAN, 1), backend));
                            let answer = reply(router, protocol, backend, source);
                            assert_eq!(answer, (listen, client), "{rule}");
                        }
                    }
                }
                // What they say to each other is theirs.
                let own = packet(UDP, LAN, backend, version.at(LAN, 12, 9));
                let outcome = router.try_frame(Role::Internal, LAN, &own.bytes()).outcome;
                let own = if rule.contains("masq") { Passed::NoFlow } else { Passed::Inside };
                assert_eq!(outcome, Outcome::Pass(own));
            }
        });
    }
}

#[test]
fn who_is_inside_may_begin_with_extension_headers() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@12.10:80/tcp+udp"]));
        let version = Version::V6;
        let (client, listen) = (version.at(LAN, 12, 5000), version.at(WAN, 1, 8080));
        for protocol in [TCP, UDP] {
            let plain = packet(protocol, LAN, client, listen);
            let came = Packet { extensions: vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])], ..plain };
            let seen = router.try_frame(Role::Internal, LAN, &came.bytes());
            assert_eq!(seen.outcome, Outcome::Redirect);
            wire::verify(&seen.frame).unwrap();
            let (source, to) = packet::ends(&seen.frame, came.transport_at()).unwrap();
            assert_eq!((source.ip(), to), (version.address(LAN, 1), version.at(LAN, 10, 80)));
        }
    });
}

#[test]
fn one_arm_is_enough_with_masquerade() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        // Beside a host that gets everything else.
        let rules = ["@11.1:8080:@16.10:80/udp masquerade", "*:@16.11/any"];
        router.load(&in_both(&rules));
        for version in Version::BOTH {
            let (client, listen) = (version.at(ARM, 2, 5000), version.at(WAN, 1, 8080));
            for _ in 0..3 {
                let seen = goes(router, Role::Both, ARM, &packet(UDP, ARM, client, listen));
                assert_eq!(seen.1, version.at(ARM, 10, 80));
                assert_eq!(seen.0.ip(), version.address(ARM, 1));
                let answer = packet(UDP, ARM, seen.1, seen.0);
                assert_eq!(goes(router, Role::Both, ARM, &answer), (listen, client));
            }
        }
    });
}

#[test]
fn ports_that_run_out_are_told() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@12.10:80/udp masquerade"]));
        let version = Version::V4;
        let listen = version.at(WAN, 1, 8080);
        let mut refused = 0;
        for port in (2000..3400).step_by(2) {
            let came = packet(UDP, WAN, version.at(WAN, 2, port), listen);
            match router.try_frame(Role::External, WAN, &came.bytes()).outcome {
                Outcome::Redirect => {}
                outcome => {
                    assert_eq!(outcome, Outcome::Drop(Dropped::NoPort));
                    refused += 1;
                }
            }
        }
        assert!((200..300).contains(&refused), "{refused}");
    });
}

#[test]
fn a_flow_is_what_was_sent() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        let rule = "8080:@12.10:80/tcp+udp masquerade";
        router.load(&in_both(&[rule]));
        for version in Version::BOTH {
            let (client, listen) = (version.at(WAN, 2, 5000), version.at(WAN, 1, 8080));
            let of = |router: &Router, protocol| {
                let rows = flows(router);
                let mut own =
                    rows.into_iter().filter(|it| it.protocol == protocol && it.client == client);
                let row = own.next().unwrap();
                assert_eq!(own.next(), None);
                row
            };
            let (source, backend) = forward(router, UDP, client, listen);
            let row = of(router, UDP);
            assert_eq!((row.listen, row.source, row.backend), (listen, source, backend));
            assert_eq!(row.state, State::New);
            reply(router, UDP, backend, source);
            assert_eq!(of(router, UDP).state, State::Answered);
            forward(router, UDP, client, listen);
            forward(router, UDP, client, listen);
            let row = of(router, UDP);
            assert_eq!(row.state, State::Established);
            let bytes = packet(UDP, WAN, client, listen).length() as u64;
            assert_eq!((row.forward.packets, row.forward.bytes), (3, 3 * bytes));
            assert_eq!((row.reply.packets, row.reply.bytes), (1, bytes));
            assert_eq!(row.counter, router.compiler.counter(&version.rule(rule)).unwrap());

            let (source, backend) = connect(router, client, listen);
            assert_eq!(of(router, TCP).state, State::Established);
            let mut end = packet(TCP, LAN, backend, source);
            end.tcp.flags = FIN_ACK;
            goes(router, Role::Internal, LAN, &end);
            assert_eq!(of(router, TCP).state, State::Established);
            let mut end = packet(TCP, WAN, client, listen);
            end.tcp.flags = FIN_ACK;
            goes(router, Role::External, WAN, &end);
            assert_eq!(of(router, TCP).state, State::Closing);
        }
        assert_eq!(router.datapath.flows().count().unwrap().values().sum::<u64>(), 4);
    });
}

#[test]
fn flows_end_when_they_are_idle_or_their_backend_is_gone() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        let rule = "8080:@12.10:80/udp masquerade";
        router.load(&in_both(&[rule]));
        for version in Version::BOTH {
            let rule = version.rule(rule);
            let listen = version.at(WAN, 1, 8080);
            let backend = version.address(LAN, 10);
            let long = living(router, &rule, backend, Timeouts::default());
            for port in 1000..1200 {
                let client = version.at(WAN, 2, port);
                let (source, to) = forward(router, UDP, client, listen);
                if port % 2 == 0 {
                    reply(router, UDP, to, source);
                    forward(router, UDP, client, listen);
                }
            }
            assert_eq!(flows(router).len(), 200);
            let tables = router.datapath.flows();
            let swept = tables.sweep(&long, || {}).unwrap();
            assert_eq!((swept.flows, swept.ended), (200, 0));
            // What nobody answered ends first.
            let brief = Timeouts { udp_unanswered: Duration::ZERO, ..Timeouts::default() };
            std::thread::sleep(Duration::from_millis(50));
            let swept = tables.sweep(&living(router, &rule, backend, brief), || {}).unwrap();
            assert_eq!((swept.flows, swept.ended), (100, 100));
            // Those that live go on as they were.
            let client = version.at(WAN, 2, 1000);
            let (source, to) = forward(router, UDP, client, listen);
            assert_eq!(reply(router, UDP, to, source), (listen, client));
            let other = living(router, &rule, version.address(LAN, 11), Timeouts::default());
            let swept = tables.sweep(&other, || {}).unwrap();
            assert_eq!((swept.flows, swept.ended), (0, 100));
            assert_eq!(flows(router), []);
            let lost = packet(UDP, LAN, to, source);
            let outcome = router.try_frame(Role::Internal, LAN, &lost.bytes()).outcome;
            assert_eq!(outcome, Outcome::Pass(Passed::NoFlow));
        }
    });
}

#[test]
fn a_full_table_keeps_its_flows_and_says_who_has_no_place() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        let rule = "8080:@12.10:80/udp";
        router.load(&in_both(&["8000-8001:@12.10:80/udp", rule]));
        let version = Version::V4;
        let listen = version.at(WAN, 1, 8080);
        let mut clients = Vec::new();
        // Room for 1,024, and for some more: as hashes fall.
        const CLIENTS: u16 = 2000;
        for port in 1..=CLIENTS {
            let client = version.at(DISTANT, 2, port);
            let (source, backend) = forward(router, UDP, client, listen);
            reply(router, UDP, backend, source);
            forward(router, UDP, client, listen);
            clients.push(client);
        }
        let established =
            flows(router).iter().filter(|row| row.state == State::Established).count();
        assert!((1020..1365 + 4).contains(&established), "{established}");
        let crowded = router.counts(&version.rule(rule)).crowded;
        assert_eq!(crowded, u64::from(CLIENTS) - established as u64);
        // All of them go on.
        for client in clients {
            let (source, backend) = forward(router, UDP, client, listen);
            assert_eq!(reply(router, UDP, backend, source), (listen, client));
        }
    });
}
