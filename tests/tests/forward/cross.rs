//! Clients of one IP version, a server of the other.

use std::net::{IpAddr, SocketAddr};

use portfwd_tests::is_root;
use portfwd_tests::peers::{Answer, Server};
use portfwd_tests::rig::{self, Rig};

use crate::running::*;

/// Where clients ask, and the server of the other version.
fn crossed() -> [(IpAddr, IpAddr); 2] {
    let ([v4, v6], [server4, server6]) = (rig::WAN.both(), rig::SERVER.both());
    [(v4, server6), (v6, server4)]
}

fn rules() -> Vec<Rule> {
    let rule = |(wan, server): (IpAddr, IpAddr)| Rule {
        address: Some(wan),
        ..Rule::new(
            if wan.is_ipv4() { "4to6" } else { "6to4" },
            "tcp+udp",
            8080..=8080,
            at(server, 80),
        )
    };
    masqueraded(crossed().map(rule).into())
}

/// A question over TCP and one over UDP; the server sees the router.
fn is_seen_as_the_router(running: &Running, listen: SocketAddr, seen: &Server) {
    echo_tcp(&running.rig.client, listen, 1000);
    echo_udp(&running.rig.client, listen);
    let lan = rig::LAN.both().map(IpAddr::from);
    assert!(seen.seen().iter().all(|address| lan.contains(address)), "{:?}", seen.seen());
}

#[test]
fn a_server_of_the_other_ip_version_answers() {
    if !is_root() {
        return;
    }
    let interfaces = "external = [\"wan0\"]";
    let running = Running::with(Rig::new().unwrap(), rules(), interfaces, &[]);
    for (wan, server) in crossed() {
        let tcp = Server::tcp(&running.rig.server, at(server, 80), Answer::Echo).unwrap();
        let _udp = Server::udp(&running.rig.server, at(server, 80), Answer::Echo).unwrap();
        for _ in 0..10 {
            is_seen_as_the_router(&running, at(wan, 8080), &tcp);
        }
    }
    running.settle(nothing);
    poll(|| {
        let [sent, arrived] = [running.sent(nothing), running.arrived(nothing)].map(|all| {
            all.iter().map(|it| [it.forward.packets, it.reply.packets]).collect::<Vec<_>>()
        });
        if sent == arrived { Ok(()) } else { Err(format!("sent {sent:?}, arrived {arrived:?}")) }
    });
    running.finish();
}
