//! What the programs make of a packet while they remember what the FIB said. All but the change of a
//! neighbour that nobody told them of must be as if they asked it each time.

use std::thread;
use std::time::Duration;

use portfwd::sysctl::Families;
use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Direction, Dropped, Interface, Passed, ToStack};
use portfwd_tests::is_root;
use portfwd_tests::packet::{Packet, TCP, UDP};

use portfwd::datapath::Hook;

use crate::router::{
    ARM, BLACKHOLE, DISTANT, Flow, LAN, NARROW_INSIDE, NARROW_OTHER, NARROW_OUTSIDE, NO_ROUTE,
    OTHER, Outcome, Router, SLOW_LAN, SLOW_WAN, Seen, Version, WAN, WEB, hook, in_both, interfaces,
    ip_batch, link_address, with_router,
};

const BOTH: Families = Families { v4: true, v6: true };
/// Longer than a test takes.
const LONG: Duration = Duration::from_secs(600);

/// As [`with_router`], on one CPU: each remembers for itself.
fn with_remembering_router<T: Send>(test: impl FnOnce(&mut Router) -> T + Send) -> T {
    with_router(|router| {
        // SAFETY: a zeroed set is an empty one, and has the size that is told.
        let done = unsafe {
            let mut cpus: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(libc::sched_getcpu() as usize, &mut cpus);
            libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus)
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        rely(router, BOTH, LONG);
        test(router)
    })
}

fn rely(router: &Router, families: Families, time: Duration) {
    router.datapath.routes().rely(families, time).unwrap();
}

fn forget(router: &Router) {
    router.datapath.routes().forget().unwrap();
}

/// Gives the next hop of a flow the link address of a host.
fn move_neighbour(flow: &Flow, to: u8) {
    let (link, host) = flow.egress;
    let address = flow.version.address(link, host);
    let mac = link_address(link, to).map(|byte| format!("{byte:02x}")).join(":");
    ip_batch(&format!("neighbour replace {address} dev link{link} lladdr {mac} nud permanent"));
}

/// The flow, if its next hop had the link address of a host.
fn by_way_of(flow: &Flow, host: u8) -> Flow {
    Flow { egress: (flow.egress.0, host), ..flow.clone() }
}

/// Asserts that a packet of the flow goes to its next hop.
fn goes(router: &mut Router, name: &str, flow: &Flow) {
    let came = flow.came();
    router.redirects(name, flow, &came, &flow.goes(&came));
}

/// Packets of a flow that differ in what routes may depend on, and in what is rewritten.
fn packets(flow: &Flow) -> Vec<Packet> {
    let came = flow.came();
    let mut packets = vec![
        came.clone(),
        Packet { hops: 2, ..came.clone() },
        Packet { hops: 1, ..came.clone() },
        Packet { class: 0xb9, number: 7, ..came.clone() },
        Packet { payload: Vec::new(), padding: vec![0; 6], ..came.clone() },
        Packet { payload: vec![0x5a; 1233], fragment: 0, ..came.clone() },
        Packet { payload: vec![0x5a; 1300], ..came.clone() },
        Packet { payload: vec![0x5a; 1300], fragment: 0, ..came.clone() },
        Packet { payload: vec![0x5a; 2000], ..came.clone() },
        Packet { source: (came.source.ip(), 5001).into(), ..came.clone() },
    ];
    if came.is_v4() {
        packets.push(Packet { fragment: 0x2000, ..came.clone() });
        packets.push(Packet { options: vec![1; 8], no_checksum: true, ..came });
    } else {
        packets.push(Packet { extensions: vec![(60, vec![0; 8])], ..came });
    }
    packets
}

/// Flows by ways of all kinds, both directions, and the rules that they need.
fn of_all_kinds() -> (Vec<String>, Vec<Flow>) {
    let backends = [
        (8080, LAN, 10),
        (8081, LAN, 11),
        (8082, LAN, 99),
        (8083, SLOW_LAN, 10),
        (8084, OTHER, 10),
        (8085, WAN, 10),
        (8086, NARROW_INSIDE, 10),
        (8087, NARROW_OTHER, 10),
        (8088, BLACKHOLE, 10),
        (8089, NO_ROUTE, 10),
        (8090, ARM, 10),
    ];
    let rules: Vec<String> = (backends.iter())
        .map(|(port, network, host)| format!("{port}:@{network}.{host}:80/tcp+udp"))
        .collect();
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let clients = [
        (WAN, 2),
        (WAN, 14),
        (WAN, 99),
        (WAN, 1),
        (SLOW_WAN, 2),
        (ARM, 2),
        (DISTANT, 77),
        (NARROW_OUTSIDE, 77),
        // A way to a backend is none to a client.
        (LAN, 11),
        (NARROW_INSIDE, 10),
        (OTHER, 10),
        (BLACKHOLE, 10),
        (NO_ROUTE, 10),
    ];
    let mut flows = Vec::new();
    for (version, protocol) in [(Version::V4, TCP), (Version::V4, UDP), (Version::V6, UDP)] {
        for (port, network, host) in backends {
            for (role, link) in [(Role::External, WAN), (Role::Both, ARM)] {
                flows.push(Flow {
                    role,
                    link,
                    end: version.at(network, host, 80),
                    ..Flow::forward(version, protocol, port, (10, 80))
                });
            }
        }
        for (network, host) in clients {
            for (role, link) in [(Role::Internal, LAN), (Role::Both, ARM)] {
                flows.push(Flow {
                    role,
                    link,
                    destination: version.at(network, host, 5000),
                    ..Flow::reply(version, protocol, (10, 80), 8080)
                });
            }
        }
    }
    (in_both(&rules), flows)
}

#[test]
fn packets_are_treated_as_if_nothing_was_remembered() {
    if !is_root() {
        return;
    }
    with_remembering_router(|router| {
        let (rules, flows) = of_all_kinds();
        router.load(&rules);
        let flows = flows.into_iter().chain(Flow::all());
        let frames: Vec<(Flow, Vec<u8>)> = flows
            .flat_map(|flow| {
                let of = |packet: Packet| (flow.clone(), packet.bytes());
                packets(&flow).into_iter().map(of).collect::<Vec<_>>()
            })
            .collect();
        rely(router, Families::default(), LONG);
        let asked: Vec<Seen> = (frames.iter())
            .map(|(flow, frame)| router.try_frame(flow.role, flow.link, frame))
            .collect();
        let outcomes = |outcome| asked.iter().filter(|seen| seen.outcome == outcome).count();
        assert!(outcomes(Outcome::Redirect) > frames.len() / 4);
        for reason in [ToStack::TooBig, ToStack::NoNeighbour, ToStack::NoTransmit] {
            let can = hook() == Hook::Xdp || reason != ToStack::NoTransmit;
            assert_eq!(outcomes(Outcome::Stack(reason)) > 0, can, "{reason:?}");
        }
        rely(router, BOTH, LONG);
        // In several orders: a packet must not see what another has left behind.
        let mut order: Vec<usize> = (0..frames.len()).collect();
        for round in 0..4 {
            for at in &order {
                let (flow, frame) = &frames[*at];
                let mut seen = router.try_frame(flow.role, flow.link, frame);
                while matches!(asked[*at].outcome, Outcome::Answer(_))
                    && matches!(seen.outcome, Outcome::Drop(_))
                {
                    // There are only so many in a second.
                    thread::sleep(Duration::from_millis(1));
                    seen = router.try_frame(flow.role, flow.link, frame);
                }
                assert_eq!(seen, asked[*at], "round {round}: {flow:?}");
            }
            order.reverse();
            order.rotate_left(frames.len() / 3);
        }
    });
}

#[test]
fn a_neighbour_that_moves_is_seen_when_routes_are_forgotten() {
    if !is_root() {
        return;
    }
    with_remembering_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let (home, away) = (flow.egress.1, by_way_of(&flow, 14));
            goes(router, "asked", &flow);
            move_neighbour(&flow, 14);
            goes(router, "remembered", &flow);
            forget(router);
            goes(router, "asked again", &away);
            move_neighbour(&flow, home);
            goes(router, "remembered again", &away);
            // Relying anew begins anew.
            rely(router, BOTH, LONG);
            goes(router, "home", &flow);
            // To rely on it does not depend on the protocol.
            move_neighbour(&flow, 14);
            let other = Flow { protocol: TCP ^ UDP ^ flow.protocol, ..flow.clone() };
            goes(router, "remembered by destination", &other);
            move_neighbour(&flow, home);
            forget(router);
        }
    });
}

#[test]
fn families_are_relied_on_each_by_itself() {
    if !is_root() {
        return;
    }
    let v4 = Families { v4: true, v6: false };
    let v6 = Families { v4: false, v6: true };
    with_remembering_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let (home, away) = (flow.egress.1, by_way_of(&flow, 14));
            let (own, other) = if flow.version == Version::V4 { (v4, v6) } else { (v6, v4) };
            for (families, time) in
                [(Families::default(), LONG), (other, LONG), (BOTH, Duration::ZERO)]
            {
                // Something was remembered before.
                rely(router, BOTH, LONG);
                goes(router, "before", &flow);
                rely(router, families, time);
                goes(router, "not relied on", &flow);
                move_neighbour(&flow, 14);
                goes(router, "asked", &away);
                // Forgetting is no reason to rely on it.
                forget(router);
                goes(router, "asked", &away);
                move_neighbour(&flow, home);
                goes(router, "asked", &flow);
            }
            rely(router, own, LONG);
            goes(router, "relied on", &flow);
            move_neighbour(&flow, 14);
            goes(router, "remembered", &flow);
            move_neighbour(&flow, home);
        }
    });
}

/// Nobody has looked after it.
#[test]
fn what_is_remembered_runs_out() {
    if !is_root() {
        return;
    }
    let time = Duration::from_secs(4);
    with_remembering_router(|router| {
        router.load(&in_both(&WEB));
        rely(router, BOTH, time);
        let start = std::time::Instant::now();
        for flow in Flow::all() {
            goes(router, "asked", &flow);
            move_neighbour(&flow, 14);
        }
        for flow in Flow::all() {
            goes(router, "remembered", &flow);
        }
        // A second before and a tick or two after.
        std::thread::sleep(Duration::from_secs(3).saturating_sub(start.elapsed()));
        if start.elapsed() < time - Duration::from_millis(200) {
            Flow::all().iter().for_each(|flow| goes(router, "still remembered", flow));
        }
        std::thread::sleep((time + Duration::from_millis(30)).saturating_sub(start.elapsed()));
        for flow in Flow::all() {
            goes(router, "asked again", &by_way_of(&flow, 14));
        }
    });
}

/// A gateway is one, the MTUs of the routes by it are two.
#[test]
fn what_is_too_big_is_not_sent_by_a_remembered_way() {
    if !is_root() {
        return;
    }
    with_remembering_router(|router| {
        let narrow = format!("8080:@{NARROW_INSIDE}.77:80/tcp+udp");
        router.load(&in_both(&[&narrow, "8081:@12.10:80/tcp+udp"]));
        for version in Version::BOTH {
            for protocol in [TCP, UDP] {
                let forward = |port, network, host| Flow {
                    end: version.at(network, host, 80),
                    ..Flow::forward(version, protocol, port, (10, 80))
                };
                let reply = |network, host| Flow {
                    destination: version.at(network, host, 5000),
                    ..Flow::reply(version, protocol, (10, 80), 8081)
                };
                let big = Outcome::Answer(Dropped::TooBig);
                for (narrow, wide, outcome) in [
                    (forward(8080, NARROW_INSIDE, 77), forward(8081, LAN, 10), big),
                    (reply(NARROW_OUTSIDE, 77), reply(DISTANT, 77), Outcome::Pass(Passed::TooBig)),
                    (reply(NARROW_OUTSIDE, 78), reply(WAN, 2), Outcome::Pass(Passed::TooBig)),
                ] {
                    let sized = |flow: &Flow, length: usize| {
                        let came = flow.came();
                        let room = length - (came.length() - came.payload.len());
                        Packet { payload: vec![1; room], ..came }
                    };
                    let fits = |router: &mut Router, flow: &Flow, length| {
                        let came = sized(flow, length);
                        router.redirects("fits", flow, &came, &flow.goes(&came));
                    };
                    let too_big = |router: &mut Router, length| {
                        let frame = sized(&narrow, length).bytes();
                        router.refuses_or_passes(&narrow, &frame, outcome);
                    };
                    // Whichever is the first.
                    for narrow_first in [true, false] {
                        forget(router);
                        for round in 0..3 {
                            if narrow_first || round > 0 {
                                fits(router, &narrow, 200);
                                fits(router, &narrow, 1280);
                                too_big(router, 1281);
                                too_big(router, 1500);
                            }
                            fits(router, &wide, 1281);
                            fits(router, &wide, 1500);
                        }
                    }
                }
            }
        }
    });
}

impl Router {
    /// Asserts what becomes of a frame that is not redirected.
    fn refuses_or_passes(&mut self, flow: &Flow, frame: &[u8], outcome: Outcome) {
        let seen = self.try_frame(flow.role, flow.link, frame);
        assert_eq!(seen.outcome, outcome, "{flow:?}");
    }
}

/// The FIB looks at the source there, and what is remembered does not.
#[test]
fn sources_that_are_never_forwarded_are_refused() {
    if !is_root() {
        return;
    }
    with_remembering_router(|router| {
        router.load(&in_both(&WEB));
        for protocol in [TCP, UDP] {
            let flow = Flow::forward(Version::V6, protocol, 8080, (10, 80));
            for source in ["fe80::2", "febf::2", "ff02::2", "ff0e::2", "::1"] {
                let source = std::net::SocketAddr::new(source.parse().unwrap(), 5000);
                let frame = Packet { source, ..flow.came() }.bytes();
                rely(router, Families::default(), LONG);
                let asked = router.try_frame(flow.role, flow.link, &frame);
                assert_eq!(asked.outcome, Outcome::Drop(Dropped::NoRoute), "{source}");
                rely(router, BOTH, LONG);
                for _ in 0..2 {
                    assert_eq!(router.try_frame(flow.role, flow.link, &frame), asked, "{source}");
                    goes(router, "another", &flow);
                }
            }
        }
    });
}

#[test]
fn more_destinations_than_can_be_remembered() {
    if !is_root() {
        return;
    }
    /// Networks of 256 clients, each behind one of these hosts of `WAN`.
    const NETWORKS: u16 = 160;
    const GATEWAYS: [u8; 5] = [10, 11, 12, 13, 14];
    let gateway = |network: u16| GATEWAYS[usize::from(network) % GATEWAYS.len()];
    with_remembering_router(|router| {
        router.load(&in_both(&WEB));
        for version in Version::BOTH {
            let client = |network: u16, host: u16| -> std::net::IpAddr {
                let text = match version {
                    Version::V4 => format!("172.16.{network}.{host}"),
                    Version::V6 => format!("fd01:0:0:{network:x}:{host:x}::7"),
                };
                text.parse().unwrap()
            };
            let length = if version == Version::V4 { 24 } else { 64 };
            let routes: Vec<String> = (0..NETWORKS)
                .map(|network| {
                    let (to, via) = (client(network, 0), version.address(WAN, gateway(network)));
                    let to = if version == Version::V4 {
                        to.to_string()
                    } else {
                        format!("fd01:0:0:{network:x}::")
                    };
                    format!("route add {to}/{length} via {via} dev link{WAN}")
                })
                .collect();
            ip_batch(&routes.join("\n"));
            let reply = Flow::reply(version, UDP, (10, 80), 8080);
            let all: Vec<(u16, u16)> = (0..256)
                .flat_map(|host| (0..NETWORKS).map(move |network| (network, host)))
                .collect();
            // The way back comes upon what the last were, and upon what was pushed out.
            for (network, host) in all.iter().chain(all.iter().rev()) {
                let destination = (client(*network, *host), 5000).into();
                let frame = Packet { destination, ..reply.came() }.bytes();
                let (_, after) = router
                    .datapath
                    .try_frame(hook(), reply.role, reply.link.into(), &frame)
                    .unwrap();
                let hop = link_address(WAN, gateway(*network));
                assert_eq!(after[..6], hop, "{destination}");
            }
            let last = client(NETWORKS - 1, 255);
            let flow = Flow {
                destination: (last, 5000).into(),
                egress: (WAN, gateway(NETWORKS - 1)),
                ..reply
            };
            goes(router, "the last", &flow);
        }
    });
}

/// Next hops of either direction share rows with others, whose hash is the same.
#[test]
fn more_next_hops_than_can_be_remembered() {
    if !is_root() {
        return;
    }
    const HOSTS: u32 = 2000;
    let mac = |link: u8, host: u32| {
        let [_, _, high, low] = host.to_be_bytes();
        [2, 0, 7, link, high, low]
    };
    let v4 = |link: u8, host: u32| -> std::net::IpAddr {
        let [_, _, high, low] = host.to_be_bytes();
        [172, link + 16, high, low].into()
    };
    with_remembering_router(|router| {
        // Between packets to clients, one to each of many backends.
        let ports = 0..64_u16;
        let rules: Vec<String> =
            ports.clone().map(|n| format!("{}:{}:80/udp", 8080 + n, v4(LAN, n.into()))).collect();
        router.load(&rules);
        let mut lines = Vec::new();
        for link in [WAN, LAN] {
            lines.push(format!("route add {}/16 dev link{link}", v4(link, 0)));
            lines.extend((0..HOSTS).map(|host| {
                let mac = mac(link, host).map(|byte| format!("{byte:02x}")).join(":");
                let address = v4(link, host);
                format!("neighbour add {address} dev link{link} lladdr {mac} nud permanent")
            }));
        }
        ip_batch(&lines.join("\n"));
        let mut destination_of = |flow: &Flow| -> [u8; 6] {
            let frame = flow.came().bytes();
            let (_, after) =
                router.datapath.try_frame(hook(), flow.role, flow.link.into(), &frame).unwrap();
            after[..6].try_into().unwrap()
        };
        for round in 0..2 {
            for host in 0..HOSTS {
                let port = (host % 64) as u16;
                let forward = Flow::forward(Version::V4, UDP, 8080 + port, (10, 80));
                assert_eq!(destination_of(&forward), mac(LAN, port.into()), "{round}: {port}");
                let reply = Flow {
                    source: (v4(LAN, port.into()), 80).into(),
                    destination: (v4(WAN, host), 5000).into(),
                    ..Flow::reply(Version::V4, UDP, (10, 80), 8080)
                };
                assert_eq!(destination_of(&reply), mac(WAN, host), "{round}: {host}");
            }
        }
    });
}

#[test]
fn interfaces_are_what_they_were_last_said_to_be() {
    if !is_root() {
        return;
    }
    with_remembering_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let came = flow.came();
            let (egress, neither) = match flow.direction {
                Direction::Forward => (LAN, Outcome::Drop(Dropped::NotInternal)),
                Direction::Reply => (WAN, Outcome::Pass(Passed::Inside)),
            };
            let mut links = interfaces();
            goes(router, "asked", &flow);
            goes(router, "remembered", &flow);
            let all = links[&egress.into()];
            let slow = Interface { flags: all.flags & !Interface::TRANSMITS, ..all };
            links.insert(egress.into(), slow);
            router.datapath.set_interfaces(&links).unwrap();
            let (outcome, without) = flow.without_transmit(&came);
            router.translates("no transmit", &flow, &came, outcome, &without);
            links.insert(egress.into(), all);
            router.datapath.set_interfaces(&links).unwrap();
            goes(router, "transmits again", &flow);
            links.remove(&egress.into());
            router.datapath.set_interfaces(&links).unwrap();
            router.refuses("none of ours", &flow, &came.bytes(), neither);
            router.datapath.set_interfaces(&interfaces()).unwrap();
        }
    });
}
