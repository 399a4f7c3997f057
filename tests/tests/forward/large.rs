//! Links that carry more in a frame than others, or less.

use std::io::{Read, Write};
use std::time::Duration;

use portfwd_tests::is_root;
use portfwd_tests::netns::{self, Namespace};
use portfwd_tests::peers::{self, Answer, Server};
use portfwd_tests::rig::{self, Options, Rig};
use portfwd_tests::rule::Rule;
use portfwd_tests::wire::{Capture, Direction, Frame};

use crate::running::*;

/// The ends of both links, with an MTU of so many bytes.
fn set_mtu(rig: &Rig, mtu: u32) {
    let Rig { client, router, server, .. } = rig;
    let ends: [(&Namespace, &str); 4] =
        [(client, "eth0"), (router, "wan0"), (router, "lan0"), (server, "eth0")];
    for (namespace, interface) in ends {
        namespace.ip(&format!("link set {interface} mtu {mtu}")).unwrap();
    }
}

/// No frame of 9,000 bytes is in one piece at XDP.
#[test]
fn jumbo_frames() {
    if !is_root() {
        return;
    }
    let rules = for_both("game", "tcp+udp", 9000..=9000, 27015);
    for rules in [rules.clone(), masqueraded(rules)] {
        let rig = Rig::new().unwrap();
        set_mtu(&rig, 9000);
        let running = Running::start(rig, rules);
        for (wan, backend) in both() {
            let _game = (
                Server::tcp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap(),
                Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap(),
            );
            echo_tcp(&running.rig.client, at(wan, 9000), 20_000_000);
            let socket = peers::udp_client(&running.rig.client, at(wan, 9000)).unwrap();
            for length in [1, 1400, 3000, 3500, 4000, 4097, 8000, 8940] {
                let question: Vec<u8> = (0..length).map(|at| (at * 31 / 7) as u8).collect();
                let answer = peers::exchange(&socket, &question);
                assert!(answer.unwrap() == question, "{wan}: {length}");
            }
        }
        let stats = running.settle(nothing);
        for rule in &running.rules {
            let Counts { forward, reply } = stats.counts(&rule.name);
            for count in [forward, reply] {
                assert!(count.bytes > 20_000_000, "{count}");
            }
            // The echo comes in the segments that its server made: most of them full.
            assert!(forward.bytes / forward.packets > 2 * 1500, "{forward}");
            assert_eq!(stats.to_stack(&rule.name, "no_xdp_transmit"), 0);
            assert!(stats.to_stack(&rule.name, "no_neighbour") <= 4, "{}", stats.0);
        }
        running.finish_exact();
    }
}

/// Has nobody hear of packets that are too big.
fn lose_icmp(ends: [&Namespace; 2]) {
    const DROP: &str = "table inet lost { chain input { type filter hook input priority 0;
        icmp type destination-unreachable drop;
        icmpv6 type packet-too-big drop;
    }
    }";
    for end in ends {
        netns::run(end.command("nft").arg(DROP)).unwrap();
    }
}

/// The MSS of the SYNs among frames that arrived.
fn sizes(frames: &[Frame]) -> Vec<u16> {
    let received = frames.iter().filter(|frame| frame.direction == Direction::Received);
    let segments = received.filter_map(|frame| match frame.data[12..14] {
        [0x08, 0x00] if frame.data[23] == TCP => Some(&frame.data[34..]),
        [0x86, 0xdd] if frame.data[20] == TCP => Some(&frame.data[54..]),
        _ => None,
    });
    let syns = segments.filter(|tcp| tcp[13] & 2 != 0);
    syns.map(|tcp| match tcp[20..24] {
        [2, 4, high, low] => u16::from_be_bytes([high, low]),
        _ => panic!("{tcp:02x?}"),
    })
    .collect()
}

/// Sends bytes to an echo server and has them back; an error is that it took too long.
fn moves_bytes(client: &Namespace, server: std::net::SocketAddr) -> std::io::Result<()> {
    let mut stream = peers::connect(client, server).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let question = vec![0x5a; 50_000];
    stream.write_all(&question)?;
    let mut answer = vec![0; question.len()];
    stream.read_exact(&mut answer)?;
    assert!(answer == question);
    Ok(())
}

/// Where the MTU of one side is smaller and ICMP is lost, the MSS is what lets a transfer through.
#[test]
fn segments_fit_where_icmp_is_lost() {
    if !is_root() {
        return;
    }
    let rules = |mss| -> Vec<Rule> {
        let rules = for_both("web", "tcp", 8080..=8080, 80);
        rules.into_iter().map(|rule| Rule { mss, ..rule }).collect()
    };
    for (narrow, rules, most) in [
        ("wan0", rules(""), Some([1260, 1240])),
        ("lan0", rules("\"auto\""), Some([1260, 1240])),
        ("lan0", masqueraded(rules("")), Some([1260, 1240])),
        ("wan0", rules("1000"), Some([1000, 1000])),
        ("wan0", rules("false"), None),
    ] {
        let rig = Rig::new().unwrap();
        rig.router.ip(&format!("link set {narrow} mtu 1300")).unwrap();
        lose_icmp([&rig.client, &rig.server]);
        let running = Running::start(rig, rules);
        let Rig { client, server, .. } = &running.rig;
        for (version, (wan, backend)) in both().into_iter().enumerate() {
            let _echo = Server::tcp(server, at(backend, 80), Answer::Echo).unwrap();
            let captures = [client, server].map(|end| Capture::start(end, "eth0").unwrap());
            let moved = moves_bytes(client, at(wan, 8080));
            let expected = match most {
                Some(most) => most[version],
                None if wan.is_ipv4() => 1460,
                None => 1440,
            };
            for capture in captures {
                let seen = sizes(&capture.stop().unwrap());
                assert!(!seen.is_empty() && seen.iter().all(|size| *size == expected), "{seen:?}");
            }
            assert_eq!(moved.is_ok(), most.is_some(), "{narrow}: {:?}: {moved:?}", running.rules);
        }
        if most.is_some() {
            let stats = running.settle(nothing);
            assert_eq!(total(&stats.rule("web4")["dropped"]), 0);
            running.finish();
        }
    }
}

/// From one network inside to another, by the router's address outside.
#[test]
fn segments_fit_between_networks_inside() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { second_server: true, ..Options::default() }).unwrap();
    rig.router.ip("link set lan1 mtu 1300").unwrap();
    let client = rig.second_server.as_ref().unwrap();
    lose_icmp([client, &rig.server]);
    let interfaces = "external = [\"wan0\"]\ninternal = [\"lan0\", \"lan1\"]";
    let running = Running::with(rig, for_both("web", "tcp", 8080..=8080, 80), interfaces, &[]);
    let Rig { server, second_server, .. } = &running.rig;
    let client = second_server.as_ref().unwrap();
    for (wan, backend) in rig::WAN.both().into_iter().zip(rig::SERVER.both()) {
        let _echo = Server::tcp(server, at(backend, 80), Answer::Echo).unwrap();
        let captures = [client, server].map(|end| Capture::start(end, "eth0").unwrap());
        moves_bytes(client, at(wan, 8080)).unwrap();
        for capture in captures {
            let seen = sizes(&capture.stop().unwrap());
            let expected = if wan.is_ipv4() { 1260 } else { 1240 };
            assert!(!seen.is_empty() && seen.iter().all(|size| *size == expected), "{seen:?}");
        }
    }
}
