//! Ways to run: verbose, with metrics, generic.

use portfwd_tests::netns;
use portfwd_tests::peers::{self, Answer, Server};
use portfwd_tests::rig::{self, Rig};
use portfwd_tests::{Portfwd, is_root};

use crate::running::*;

#[test]
fn verbose_shows_each_packet_and_silence_none() {
    if !is_root() {
        return;
    }
    if !portfwd::sysctl::verifies_logs() {
        return eprintln!("skipped: programs of this kernel do not log");
    }
    for verbose in [true, false] {
        let flags = if verbose { &["-v"][..] } else { &[] };
        let rules = for_both("game", "udp", 9000..=9000, 27015);
        let running = Running::with(Rig::new().unwrap(), rules, "external = [\"wan0\"]", flags);
        let mut lines = Vec::new();
        for (wan, backend) in both() {
            let _game = Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap();
            let socket = peers::udp_client(&running.rig.client, at(wan, 9000)).unwrap();
            assert_eq!(peers::exchange(&socket, b"hello").unwrap(), b"hello");
            let me = socket.local_addr().unwrap();
            lines.push(format!("{me} -> {}", at(wan, 9000)));
            lines.push(format!("{} -> {me}", at(backend, 27015)));
        }
        if verbose {
            poll(|| {
                let printed = running.portfwd.stderr();
                let missing = lines.iter().find(|line| !printed.contains(*line));
                missing.map_or(Ok(()), |line| Err(format!("{line} is not in\n{printed}")))
            });
        }
        running.settle(nothing);
        if !verbose {
            let (_, printed) = running.portfwd.stop().unwrap();
            assert!(!printed.contains(" -> ") && printed.contains("wan0"), "{printed}");
        } else {
            running.finish_exact();
        }
    }
}

#[test]
fn prometheus_scrapes_the_counters() {
    if !is_root() {
        return;
    }
    let interfaces = "external = [\"wan0\"]\n[metrics]\nlisten = \"127.0.0.1:9464\"";
    let rules = for_both("game", "udp", 9000..=9000, 27015);
    let running = Running::with(Rig::new().unwrap(), rules, interfaces, &[]);
    for (wan, backend) in both() {
        let _game = Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap();
        for _ in 0..7 {
            echo_udp(&running.rig.client, at(wan, 9000));
        }
    }
    let stats = running.settle(nothing);
    let mut curl = curl(&running.rig.router);
    let text = netns::run(curl.arg("http://127.0.0.1:9464/metrics")).unwrap();
    for rule in &running.rules {
        let Counts { forward, reply } = stats.counts(&rule.name);
        assert_eq!((forward.packets, reply.packets), (7, 7));
        for (direction, count) in [("forward", forward), ("reply", reply)] {
            let labels = format!("{{rule=\"{}\",direction=\"{direction}\"}}", rule.name);
            for line in [
                format!("portfwd_packets_total{labels} {}", count.packets),
                format!("portfwd_bytes_total{labels} {}", count.bytes),
            ] {
                assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
            }
        }
    }
    running.finish_exact();
}

/// How `list --json` says an interface is attached.
fn attached(portfwd: &Portfwd, interface: &str) -> String {
    let list = portfwd.json("list").unwrap();
    let interfaces = list["interfaces"].as_array().unwrap();
    let found = interfaces.iter().find(|found| found["name"] == interface);
    found.unwrap_or_else(|| panic!("{list}"))["attach"].as_str().unwrap().to_owned()
}

/// TCP and UDP exchanges by a rule from 9000 to 27015.
fn exchange_by_rule(running: &Running) {
    for (wan, backend) in both() {
        let _game = (
            Server::tcp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap(),
            Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap(),
        );
        echo_tcp(&running.rig.client, at(wan, 9000), 2_000_000);
        for _ in 0..20 {
            echo_udp(&running.rig.client, at(wan, 9000));
        }
    }
}

#[test]
fn generic_xdp_forwards_too() {
    if !is_root() {
        return;
    }
    let rules = for_both("game", "tcp+udp", 9000..=9000, 27015);
    let interfaces = "external = [\"wan0\"]\nattach = \"generic\"";
    let running = Running::with(Rig::new().unwrap(), rules, interfaces, &[]);
    for interface in ["wan0", "lan0"] {
        assert_eq!(attached(&running.portfwd, interface), "generic");
    }
    exchange_by_rule(&running);
    let stats = running.settle(nothing);
    for rule in &running.rules {
        assert_eq!(stats.to_stack(&rule.name, "no_xdp_transmit"), 0);
    }
    running.finish_exact();
}

/// XDP at one side and TC at the other.
#[test]
fn each_side_in_its_own_way() {
    if !is_root() {
        return;
    }
    for ways in [["native", "tc"], ["tc", "native"], ["generic", "tc"], ["tc", "generic"]] {
        let rules = for_both("game", "tcp+udp", 9000..=9000, 27015);
        let [wan, lan] = ways;
        let interfaces = format!(
            "external = [\"wan0\"]\nattach = \"{wan}\"\n[interfaces.lan0]\nattach = \"{lan}\""
        );
        let running = Running::with(Rig::new().unwrap(), rules, &interfaces, &[]);
        assert_eq!(["wan0", "lan0"].map(|name| attached(&running.portfwd, name)), ways);
        exchange_by_rule(&running);
        let stats = running.settle(nothing);
        for rule in &running.rules {
            assert_eq!(stats.to_stack(&rule.name, "no_xdp_transmit"), 0, "{ways:?}");
        }
        running.finish_exact();
    }
}

/// A bridge has no native XDP, and cannot be redirected to from a driver.
#[test]
fn auto_takes_tc_for_what_has_no_xdp_and_says_so() {
    if !is_root() {
        return;
    }
    for wan in ["native", "auto"] {
        let rig = Rig::new().unwrap();
        for command in [
            "link add br0 type bridge mcast_snooping 0".to_owned(),
            "address flush dev lan0".to_owned(),
            "link set lan0 master br0".to_owned(),
            "link set br0 up".to_owned(),
            format!("address add {}/24 dev br0", rig::LAN.v4),
            format!("address add {}/64 dev br0 nodad", rig::LAN.v6),
        ] {
            rig.router.ip(&command).unwrap();
        }
        let interfaces = format!(
            "external = [\"wan0\"]\nattach = \"auto\"\n[interfaces.wan0]\nattach = \"{wan}\""
        );
        let rules = for_both("game", "tcp+udp", 9000..=9000, 27015);
        let running = Running::with(rig, rules, &interfaces, &[]);
        let expected = if wan == "auto" { "tc" } else { wan };
        assert_eq!(attached(&running.portfwd, "wan0"), expected);
        assert_eq!(attached(&running.portfwd, "br0"), "tc");
        let printed = running.portfwd.stderr();
        let line = "br0: internal, TC (bridge: packets of this machine stay whole there)";
        assert!(printed.contains(line), "{printed}");
        exchange_by_rule(&running);
        let stats = running.settle(nothing);
        for rule in &running.rules {
            let counts = stats.counts(&rule.name);
            let through = stats.to_stack(&rule.name, "no_xdp_transmit");
            // Neighbours are known from the first packet on, so all that XDP gets go this way.
            assert_eq!(through > 0, wan == "native");
            assert!(through <= counts.forward.packets);
        }
        running.finish_exact();
    }
}
