//! What is not forwarded: the box itself, its neighbours, other traffic.

use std::io;
use std::net::UdpSocket;
use std::time::Duration;

use portfwd_tests::is_root;
use portfwd_tests::peers::{self, Answer, Exchanges, Load, Pace, Server};
use portfwd_tests::rig::{self, Options, Rig};
use portfwd_tests::wire::{Capture, Count, Direction, Key};

use crate::running::*;

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
        // The backend of IPv6 is asked for, and may answer, before the programs are there.
        let unseen = sent.packets.checked_sub(translated.packets + passed);
        if !matches!(unseen, Some(0 | 1)) {
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
        let forgets_and_asks = || {
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
            let unknown = |stats: &Stats| stats.to_stack(&rule.name, "no_neighbour");
            unknown(&after) > unknown(&before)
        };
        // Mostly nobody but the packet itself makes the client known again. But hosts ask now and then
        // whether the router is there, which tells it of them.
        assert!((0..5).any(|_| forgets_and_asks()));
    }
    running.finish_exact();
}
