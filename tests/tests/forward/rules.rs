//! Each kind of rule leads where it says, and the server sees who asks.

use std::net::UdpSocket;
use std::time::Duration;

use portfwd_tests::is_root;
use portfwd_tests::peers::{self, Answer, Server};
use portfwd_tests::rig::{self, Options, Rig};
use portfwd_tests::wire::{Capture, Direction};

use crate::running::*;

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
