//! Through interfaces that are made upon others, at either side, attached as `auto` finds right.

use std::path::Path;
use std::process::{Command, Stdio};

use portfwd_tests::netns::Namespace;
use portfwd_tests::peers::{Answer, Server};
use portfwd_tests::rig::{self, Addresses, Rig};
use portfwd_tests::wire::{Capture, Direction, Frame, Tally};
use portfwd_tests::{TempDir, is_root, netns};

use crate::running::*;

/// How an interface `over0` is made upon another.
struct Kind {
    name: &'static str,
    /// What ip(8) does at the router: `@` is the interface below, `LOCAL` and `REMOTE` are the addresses
    /// of both ends there.
    near: &'static [&'static str],
    /// The same at its peer, unless that needs none of its own.
    far: Option<&'static [&'static str]>,
    /// How `auto` attaches to it.
    attach: &'static str,
    /// IPv6 over it as well.
    v6: bool,
    /// It takes packets to others too, as backends send their answers by it.
    routes: bool,
    /// What is to be done then: at this end of the two, which have these addresses below.
    then: fn(&Namespace, usize, [Addresses; 2]) -> Result<(), String>,
}

impl Kind {
    /// The same at both ends, which carries both families.
    const fn pair(name: &'static str, commands: &'static [&'static str]) -> Self {
        Self {
            name,
            near: commands,
            far: Some(commands),
            attach: "tc",
            v6: true,
            routes: true,
            then: |_, _, _| Ok(()),
        }
    }

    /// Of the router alone.
    const fn near(name: &'static str, commands: &'static [&'static str]) -> Self {
        Self {
            name,
            near: commands,
            far: None,
            attach: "tc",
            v6: true,
            routes: true,
            then: |_, _, _| Ok(()),
        }
    }

    /// Makes it at both ends. An error if this kernel has none.
    fn make(
        &self,
        ends: [&Namespace; 2],
        below: &str,
        outer: [Addresses; 2],
    ) -> Result<(), String> {
        for (end, commands, below) in
            [(0, self.near, below), (1, self.far.unwrap_or_default(), "eth0")]
        {
            for command in commands {
                let (local, remote) = (outer[end], outer[1 - end]);
                let command = command
                    .replace('@', below)
                    .replace("LOCAL6", &local.v6.to_string())
                    .replace("REMOTE6", &remote.v6.to_string())
                    .replace("LOCAL", &local.v4.to_string())
                    .replace("REMOTE", &remote.v4.to_string());
                if let Err(error) = ends[end].ip(&command) {
                    let error = format!("{error:#}");
                    let lacks = ["Unknown device type", "Operation not supported"];
                    if command.contains(" type ") && lacks.iter().any(|it| error.contains(it)) {
                        return Err(format!("this kernel has no {}", self.name));
                    }
                    panic!("{error}");
                }
            }
            (self.then)(ends[end], end, outer)?;
        }
        Ok(())
    }
}

/// What an end received, all of which was verified.
fn received(tally: &mut Tally, frame: &Frame) {
    if frame.direction == Direction::Received {
        tally.add(frame);
    }
}

/// Forwards through it from outside, then to inside: each packet arrives, right, and is counted.
fn through(kind: &Kind) {
    if !is_root() {
        return;
    }
    let sides: &[bool] = if kind.routes { &[false, true] } else { &[false] };
    for &inside in sides {
        let rig = Rig::new().unwrap();
        let Rig { client, router, server, .. } = &rig;
        let (peer, below, outer) = match inside {
            false => (client, "wan0", [rig::WAN, rig::CLIENT]),
            true => (server, "lan0", [rig::LAN, rig::SERVER]),
        };
        // The interface below answers only for its own address: both may be on one network.
        router.set_sysctl("net.ipv4.conf.all.arp_ignore", "1").unwrap();
        if let Err(why) = kind.make([router, peer], below, outer) {
            eprintln!("skipped: {why}");
            return;
        }
        let far = if kind.far.is_none() { "eth0" } else { "over0" };
        for (end, name, host) in [(router, "over0", 1), (peer, far, 2)] {
            end.ip(&format!("address add 10.9.3.{host}/24 dev {name}")).unwrap();
            end.ip(&format!("address add fd99:3::{host}/64 dev {name} nodad")).unwrap();
            end.ip(&format!("link set {name} mtu 1400 up")).unwrap();
        }
        // One by one, as they are counted.
        netns::run(peer.command("ethtool").args(["-K", far, "gro", "off"])).unwrap();
        let near = ["10.9.3.1", "fd99:3::1"];
        let (external, listened, backends) = match inside {
            false => ("over0", near.map(address), rig::SERVER.both()),
            true => ("wan0", rig::WAN.both(), ["10.9.3.2", "fd99:3::2"].map(address)),
        };
        if inside {
            for (network, gateway) in [("198.51.100.0/24", near[0]), ("2001:db8:1::/64", near[1])] {
                server.ip(&format!("route replace {network} via {gateway} dev {far}")).unwrap();
            }
        }
        let families = if kind.v6 { 0..2 } else { 0..1 };
        let rules: Vec<Rule> = families
            .clone()
            .map(|family| Rule {
                address: Some(listened[family]),
                ..Rule::new(
                    &family.to_string(),
                    "tcp+udp",
                    9000..=9000,
                    at(backends[family], 27015),
                )
            })
            .collect();
        let directory = TempDir::new().unwrap();
        let interfaces = format!("external = [\"{external}\"]\nattach = \"auto\"");
        let portfwd = started(&rig, &interfaces, &rules, &[], &directory);
        let case = format!("{} {}", kind.name, if inside { "inside" } else { "outside" });
        let list = portfwd.json("list").unwrap();
        let mut attached = list["interfaces"].as_array().unwrap().iter();
        let attached = attached.find(|it| it["name"] == "over0").expect(&case);
        assert_eq!(attached["attach"], kind.attach, "{case}: {list}");

        let interfaces = if inside { ["eth0", far] } else { [far, "eth0"] };
        let ends = [client, server].into_iter().zip(interfaces);
        let captures: Vec<Capture<Tally>> = ends
            .map(|(end, name)| Capture::with(end, name, Tally::default(), received).unwrap())
            .collect();
        for family in families {
            let backend = at(backends[family], 27015);
            let _game = (
                Server::tcp(server, backend, Answer::Echo).unwrap(),
                Server::udp(server, backend, Answer::Echo).unwrap(),
            );
            let listened = at(listened[family], 9000);
            echo_tcp(client, listened, 500_000);
            for _ in 0..20 {
                echo_udp(client, listened);
            }
            poll(|| {
                let stats = Stats(portfwd.stats().unwrap());
                let counted = stats.counts(&family.to_string());
                let forward =
                    captures[1].look(|tally| tally.count(|key| key.destination == backend));
                let reply = captures[0].look(|tally| tally.count(|key| key.source == listened));
                let arrived = Counts { forward, reply };
                assert_eq!(total(&stats.0["verdicts"]["dropped"]), 0, "{case}: {}", stats.0);
                let differ = || format!("{case}: {counted:?} but {arrived:?} arrived");
                if counted == arrived { Ok(()) } else { Err(differ()) }
            });
        }
        // But for the first packets, whose neighbour may not be known yet.
        let stats = Stats(portfwd.stats().unwrap());
        for rule in &rules {
            let through = total(&stats.rule(&rule.name)["to_stack"]);
            assert!(through <= 2, "{case}: {}", stats.0);
        }
        for capture in captures {
            let tally = capture.stop().unwrap();
            tally.ensure_valid().unwrap();
            assert!(tally.verified > 300, "{case}: {}", tally.verified);
        }
    }
}

#[test]
fn a_bridge() {
    through(&Kind::near(
        "bridge",
        &["link add over0 type bridge mcast_snooping 0", "link set @ master over0"],
    ));
}

#[test]
fn a_macvlan() {
    through(&Kind::near("macvlan", &["link add link @ name over0 type macvlan mode bridge"]));
}

/// It is given only packets to its own addresses.
#[test]
fn an_ipvlan() {
    let near = Kind::near("ipvlan", &["link add link @ name over0 type ipvlan mode l2"]);
    through(&Kind { routes: false, ..near });
}

#[test]
fn a_bond() {
    const MAKE: &str = "link add over0 type bond mode active-backup miimon 100";
    through(&Kind::near("bond", &[MAKE, "link set @ down", "link set @ master over0"]));
}

#[test]
fn a_vlan() {
    through(&Kind::pair("VLAN", &["link add link @ name over0 type vlan id 100"]));
}

#[test]
fn a_vxlan() {
    const MAKE: &str = "link add over0 type vxlan id 7 local LOCAL remote REMOTE dstport 4789";
    through(&Kind::pair("VXLAN", &[MAKE]));
}

#[test]
fn a_geneve_tunnel() {
    through(&Kind::pair("Geneve", &["link add over0 type geneve id 7 remote REMOTE"]));
}

#[test]
fn a_gre_tunnel() {
    through(&Kind::pair("GRE", &["link add over0 type gre local LOCAL remote REMOTE"]));
}

#[test]
fn a_gre_tunnel_with_ethernet() {
    through(&Kind::pair(
        "GRE with Ethernet",
        &["link add over0 type gretap local LOCAL remote REMOTE"],
    ));
}

#[test]
fn a_gre_tunnel_over_ipv6() {
    through(&Kind::pair(
        "GRE over IPv6",
        &["link add over0 type ip6gre local LOCAL6 remote REMOTE6"],
    ));
}

#[test]
fn an_ipip_tunnel() {
    const MAKE: &str = "link add over0 type ipip local LOCAL remote REMOTE";
    through(&Kind { v6: false, ..Kind::pair("IPIP", &[MAKE]) });
}

#[test]
fn a_sit_tunnel() {
    through(&Kind::pair("SIT", &["link add over0 type sit mode any local LOCAL remote REMOTE"]));
}

#[test]
fn a_tunnel_over_ipv6() {
    const MAKE: &str = "link add over0 type ip6tnl mode any local LOCAL6 remote REMOTE6";
    through(&Kind::pair("tunnel over IPv6", &[MAKE]));
}

/// Gives one end of two over WireGuard its key and its peer's.
fn with_keys(namespace: &Namespace, end: usize, outer: [Addresses; 2]) -> Result<(), String> {
    let wg = |input: &str, arguments: &[&str]| {
        let script = r#"printf %s "$0" | wg "$@""#;
        let mut command = namespace.command("sh");
        netns::run(command.args(["-c", script, input]).args(arguments)).unwrap()
    };
    // Any 32 bytes but zeros, in base64.
    let private = ["B", "C"].map(|letter| letter.repeat(42) + "A=");
    let public = wg(&private[1 - end], &["pubkey"]);
    let endpoint = format!("{}:51820", outer[1 - end].v4);
    let own = ["set", "over0", "listen-port", "51820", "private-key", "/dev/stdin"];
    let peer = ["peer", public.trim(), "endpoint", &endpoint, "allowed-ips", "0.0.0.0/0,::/0"];
    wg(&private[end], &[own, peer].concat());
    Ok(())
}

#[test]
fn a_wireguard_tunnel() {
    let pair = Kind::pair("WireGuard", &["link add over0 type wireguard"]);
    through(&Kind { then: with_keys, ..pair });
}

/// Has a PPP daemon at each end, which speak to each other by TCP.
fn with_daemons(namespace: &Namespace, end: usize, outer: [Addresses; 2]) -> Result<(), String> {
    // Not there until its module is, and that may be none of this kernel's.
    let there = || Path::new("/dev/ppp").exists();
    if !there() {
        let _: Result<_, _> = netns::run(Command::new("modprobe").arg("ppp_generic"));
    }
    if !there() {
        return Err("this kernel has no PPP".into());
    }
    let line = match end {
        0 => format!("socat - TCP-LISTEN:7000,bind={}", outer[0].v4),
        _ => format!("socat - TCP:{}:7000,retry=100,interval=0.1", outer[0].v4),
    };
    let addresses = ["10.9.4.1:10.9.4.2", "10.9.4.2:10.9.4.1"][end];
    let mut daemon = namespace.command("pppd");
    daemon
        .args(["nodetach", "noauth", "local", "ifname", "over0", addresses, "+ipv6", "pty", &line]);
    // Ends with the namespace.
    drop(daemon.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
    // Both ends speak once the second is there.
    if end == 1 {
        poll(|| match namespace.ip("address show dev over0 to 10.9.4.2") {
            Ok(shown) if shown.contains("inet") => Ok(()),
            other => Err(format!("no address yet: {other:?}")),
        });
    }
    Ok(())
}

#[test]
fn a_ppp_link() {
    through(&Kind { then: with_daemons, ..Kind::pair("PPP", &[]) });
}
