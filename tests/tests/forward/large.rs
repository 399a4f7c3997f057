//! Links that carry more in a frame than others.

use portfwd_tests::is_root;
use portfwd_tests::netns::Namespace;
use portfwd_tests::peers::{self, Answer, Server};
use portfwd_tests::rig::Rig;

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
