//! What the kernel's routes and neighbours make of a translated packet.

use portfwd_ebpf::table::{Direction, Dropped, Interface, Passed, ToStack};
use portfwd_tests::is_root;
use portfwd_tests::packet::{Packet, TCP, UDP};

use portfwd::datapath::Hook;

use crate::router::{
    BLACKHOLE, DISTANT, Flow, LAN, NARROW_INSIDE, NARROW_OTHER, NARROW_OUTSIDE, NO_ROUTE, OTHER,
    Outcome, PROHIBIT, SLOW_LAN, SLOW_WAN, UNREACHABLE, Version, WAN, WEB, hook, in_both,
    interface, interfaces, ip_batch, set_sysctl, with_router,
};

/// All versions and both protocols.
fn each() -> impl Iterator<Item = (Version, u8)> {
    Version::BOTH.into_iter().flat_map(|version| [(version, TCP), (version, UDP)])
}

/// A client's packet to a rule whose backend is host 10 of a network.
fn to_network(version: Version, protocol: u8, network: u8) -> Flow {
    Flow { end: version.at(network, 10, 80), ..Flow::forward(version, protocol, 8080, (10, 80)) }
}

/// A packet of the backend of [`WEB`] to host `host` of a network.
fn reply_to(version: Version, protocol: u8, network: u8, host: u8) -> Flow {
    let reply = Flow::reply(version, protocol, (10, 80), 8080);
    Flow { destination: version.at(network, host, 5000), ..reply }
}

/// More than the narrow routes carry.
fn big(came: Packet) -> Packet {
    Packet { payload: vec![0x5a; 1300], ..came }
}

#[test]
fn a_backend_without_a_way_is_a_reason_to_drop() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for (network, reason) in [
            (BLACKHOLE, Dropped::Blackhole),
            (UNREACHABLE, Dropped::Unreachable),
            (PROHIBIT, Dropped::Prohibited),
            (NO_ROUTE, Dropped::NoRoute),
            (OTHER, Dropped::NotInternal),
            (WAN, Dropped::NotInternal),
        ] {
            router.load(&in_both(&[&format!("8080:@{network}.10:80/tcp+udp")]));
            for (version, protocol) in each() {
                let flow = to_network(version, protocol, network);
                router.refuses("drop", &flow, &flow.came().bytes(), Outcome::Drop(reason));
            }
        }
        // The router itself is no backend.
        router.load(&in_both(&["8080:@12.1:80/tcp+udp"]));
        for (version, protocol) in each() {
            let flow = Flow::forward(version, protocol, 8080, (1, 80));
            router.refuses("itself", &flow, &flow.came().bytes(), Outcome::Drop(Dropped::NoRoute));
        }
    });
}

#[test]
fn an_unresolved_backend_outside_is_not_internal_either() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for network in [OTHER, WAN] {
            router.load(&in_both(&[&format!("8080:@{network}.99:80/tcp+udp")]));
            for (version, protocol) in each() {
                let flow = to_network(version, protocol, network);
                let outcome = Outcome::Drop(Dropped::NotInternal);
                router.refuses("unresolved", &flow, &flow.came().bytes(), outcome);
            }
        }
    });
}

#[test]
fn forwarding_switched_off_is_a_reason_to_drop() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for (version, key) in [(Version::V4, "ipv4"), (Version::V6, "ipv6")] {
            for protocol in [TCP, UDP] {
                let [forward, reply] = Flow::both(version, protocol, 8080, 80);
                let (came, came_back) = (forward.came(), reply.came());
                for link in [WAN, LAN] {
                    set_sysctl(&format!("{key}/conf/link{link}/forwarding"), "0");
                }
                let outcome = Outcome::Drop(Dropped::ForwardingOff);
                router.refuses("off", &forward, &came.bytes(), outcome);
                router.refuses("off", &reply, &came_back.bytes(), Outcome::Pass(Passed::Inside));
                for link in [WAN, LAN] {
                    set_sysctl(&format!("{key}/conf/link{link}/forwarding"), "1");
                }
                router.redirects("on again", &forward, &came, &forward.goes(&came));
                router.redirects("on again", &reply, &came_back, &reply.goes(&came_back));
            }
        }
    });
}

#[test]
fn without_a_neighbour_the_stack_gets_the_translated_packet() {
    if !is_root() {
        return;
    }
    let outcome = Outcome::Stack(ToStack::NoNeighbour);
    with_router(|router| {
        router.load(&in_both(&["8080:@12.99:80/tcp+udp", "8081:@12.10:80/tcp+udp"]));
        for (version, protocol) in each() {
            let forward = Flow::forward(version, protocol, 8080, (99, 80));
            let reply =
                Flow { end: version.at(WAN, 1, 8081), ..reply_to(version, protocol, WAN, 99) };
            for flow in [forward, reply] {
                for hops in [2, 64] {
                    let came = Packet { hops, ..flow.came() };
                    let goes = flow.translated(&came);
                    router.translates("no neighbour", &flow, &came, outcome, &goes);
                }
                // A last hop is not the stack's to take off.
                let last = Packet { hops: 1, ..flow.came() };
                let outcome = match flow.direction {
                    Direction::Forward => Outcome::Answer(Dropped::TtlExpired),
                    Direction::Reply => Outcome::Pass(Passed::Ttl),
                };
                router.refuses("last hop", &flow, &last.bytes(), outcome);
            }
        }
    });
}

#[test]
fn a_neighbour_that_is_learnt_is_used() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@12.99:80/tcp+udp"]));
        for (version, protocol) in each() {
            let flow = Flow::forward(version, protocol, 8080, (99, 80));
            let (came, address) = (flow.came(), version.address(LAN, 99));
            let on = format!("neighbour replace {address} dev link12 lladdr 02:00:00:00:12:99");
            for state in ["permanent", "reachable", "stale"] {
                ip_batch(&format!("{on} nud {state}"));
                router.redirects(state, &flow, &came, &flow.goes(&came));
            }
            ip_batch(&format!("neighbour del {address} dev link12"));
            let outcome = Outcome::Stack(ToStack::NoNeighbour);
            router.translates("gone", &flow, &came, outcome, &flow.translated(&came));
        }
    });
}

#[test]
fn what_cannot_be_redirected_goes_through_the_stack() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@13.10:80/tcp+udp", "8081:@12.10:80/tcp+udp"]));
        for (version, protocol) in each() {
            let forward = to_network(version, protocol, SLOW_LAN);
            let forward = Flow { egress: (SLOW_LAN, 10), ..forward };
            let reply =
                Flow { end: version.at(WAN, 1, 8081), ..reply_to(version, protocol, SLOW_WAN, 2) };
            let reply = Flow { egress: (SLOW_WAN, 2), ..reply };
            for flow in [forward, reply] {
                let came = flow.came();
                let (outcome, goes) = flow.without_transmit(&came);
                router.translates("no transmit", &flow, &came, outcome, &goes);
            }
        }
    });
}

/// What is known of interfaces changes while packets come.
#[test]
fn interfaces_are_what_they_were_last_said_to_be() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        let flags = |router: &mut crate::router::Router, flags: Option<u32>| {
            let mut links = interfaces();
            for link in [WAN, LAN] {
                match flags {
                    Some(flags) => links.insert(link.into(), interface(link, flags)),
                    None => links.remove(&link.into()),
                };
            }
            router.datapath.set_interfaces(&links).unwrap();
        };
        for flow in Flow::all() {
            let came = flow.came();
            let neither = match flow.direction {
                Direction::Forward => Outcome::Drop(Dropped::NotInternal),
                Direction::Reply => Outcome::Pass(Passed::Inside),
            };
            let (external, internal) = (Interface::EXTERNAL, Interface::INTERNAL);
            let (outcome, goes) = flow.without_transmit(&came);
            flags(router, None);
            router.refuses("none", &flow, &came.bytes(), neither);
            flags(router, Some(external | internal));
            router.translates("both", &flow, &came, outcome, &goes);
            flags(router, Some(external | internal | Interface::TRANSMITS));
            router.redirects("both", &flow, &came, &flow.goes(&came));
            let wrong = if flow.direction == Direction::Forward { external } else { internal };
            flags(router, Some(wrong | Interface::TRANSMITS));
            router.refuses("the other one", &flow, &came.bytes(), neither);
        }
    });
}

#[test]
fn a_backend_talking_to_others_inside_is_left_alone() {
    if !is_root() {
        return;
    }
    let outcome = Outcome::Pass(Passed::Inside);
    with_router(|router| {
        router.load(&in_both(&WEB));
        for (version, protocol) in each() {
            for (name, network, host) in [
                ("its own network", LAN, 11),
                ("its own network, unresolved", LAN, 99),
                ("another network", SLOW_LAN, 10),
                ("another network, unresolved", SLOW_LAN, 99),
                ("none of ours", OTHER, 10),
                ("the router inside", LAN, 1),
                ("the router outside", WAN, 1),
                ("the router's second address", WAN, 7),
                ("blackhole", BLACKHOLE, 10),
                ("unreachable", UNREACHABLE, 10),
                ("prohibit", PROHIBIT, 10),
                ("no route", NO_ROUTE, 10),
                ("behind a host inside", NARROW_INSIDE, 10),
            ] {
                let flow = reply_to(version, protocol, network, host);
                router.refuses(name, &flow, &flow.came().bytes(), outcome);
            }
        }
    });
}

#[test]
fn a_gateway_is_the_next_hop() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        let inside = format!("8080:@{NARROW_INSIDE}.77:80/tcp+udp");
        router.load(&in_both(&[&inside, "8081:@12.10:80/tcp+udp"]));
        for (version, protocol) in each() {
            let forward = Flow {
                end: version.at(NARROW_INSIDE, 77, 80),
                ..Flow::forward(version, protocol, 8080, (10, 80))
            };
            let reply =
                Flow { end: version.at(WAN, 1, 8081), ..reply_to(version, protocol, DISTANT, 77) };
            for flow in [forward, reply] {
                let came = flow.came();
                router.redirects("gateway", &flow, &came, &flow.goes(&came));
            }
        }
    });
}

#[test]
fn what_is_too_big_for_the_route_to_the_backend_is_cut_up_or_refused() {
    if !is_root() {
        return;
    }
    let refused = Outcome::Answer(Dropped::TooBig);
    with_router(|router| {
        router.load(&in_both(&[&format!("8080:@{NARROW_INSIDE}.10:80/tcp+udp")]));
        for (version, protocol) in each() {
            let flow = to_network(version, protocol, NARROW_INSIDE);
            let must_not = big(flow.came());
            router.refuses("must not be cut up", &flow, &must_not.bytes(), refused);
            if version == Version::V4 {
                let may = Packet { fragment: 0, ..must_not };
                let outcome = Outcome::Stack(ToStack::TooBig);
                router.translates("may be cut up", &flow, &may, outcome, &flow.translated(&may));
            }
            // As large as it may be, and one more.
            let mut came = flow.came();
            let room = 1280 - (came.length() - came.payload.len());
            came.payload = vec![1; room];
            router.redirects("just fits", &flow, &came, &flow.goes(&came));
            came.payload.push(1);
            router.refuses("one more", &flow, &came.bytes(), refused);
        }
    });
}

/// Or it would leave by where no backend is.
#[test]
fn what_is_too_big_for_a_route_that_is_not_internal_is_dropped() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for network in [NARROW_OTHER, NARROW_OUTSIDE] {
            router.load(&in_both(&[&format!("8080:@{network}.10:80/tcp+udp")]));
            for (version, protocol) in each() {
                let flow = to_network(version, protocol, network);
                let outcome = Outcome::Drop(Dropped::NotInternal);
                router.refuses("small", &flow, &flow.came().bytes(), outcome);
                router.refuses("too big", &flow, &big(flow.came()).bytes(), outcome);
            }
        }
    });
}

#[test]
fn a_reply_that_is_too_big_is_the_stacks() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for (version, protocol) in each() {
            let flow = reply_to(version, protocol, NARROW_OUTSIDE, 2);
            let came = flow.came();
            router.redirects("small", &flow, &came, &flow.goes(&came));
            let must_not = big(came);
            let outcome = Outcome::Pass(Passed::TooBig);
            router.refuses("must not be cut up", &flow, &must_not.bytes(), outcome);
            if version == Version::V4 {
                let may = Packet { fragment: 0, ..must_not };
                let outcome = Outcome::Stack(ToStack::TooBig);
                router.translates("may be cut up", &flow, &may, outcome, &flow.translated(&may));
                // To another network inside it is none of ours.
                let inside = reply_to(version, protocol, NARROW_INSIDE, 10);
                let may = Packet { fragment: 0, ..big(inside.came()) };
                router.refuses("inside", &inside, &may.bytes(), Outcome::Pass(Passed::Inside));
            }
        }
    });
}

/// Longer than the interface that it came by can bring: its checksum is lost.
#[test]
fn what_was_merged_on_its_way_is_dropped() {
    if !is_root() {
        return;
    }
    let merged = |packet: Packet| Packet { payload: vec![1; 2000], ..packet };
    with_router(|router| {
        router.load(&in_both(&WEB));
        for (version, protocol) in each() {
            let forward = Flow::forward(version, protocol, 8080, (10, 80));
            let outside = reply_to(version, protocol, NARROW_OUTSIDE, 2);
            let [large, reply] = [&forward, &outside].map(|flow| merged(flow.came()).bytes());
            match hook() {
                Hook::Xdp => {
                    let outcome = Outcome::Drop(Dropped::Merged);
                    router.refuses("forward", &forward, &large, outcome);
                    router.refuses("reply", &outside, &reply, outcome);
                }
                // There it is a large packet like others.
                Hook::Tc => {
                    let seen = router.try_frame(forward.role, forward.link, &large);
                    assert_eq!(seen.outcome, Outcome::Answer(Dropped::TooBig));
                    router.refuses("reply", &outside, &reply, Outcome::Pass(Passed::TooBig));
                }
            }
            let inside = reply_to(version, protocol, NARROW_INSIDE, 10);
            let outcome = Outcome::Pass(Passed::Inside);
            router.refuses("inside", &inside, &merged(inside.came()).bytes(), outcome);
        }
    });
}

#[test]
fn a_route_that_encapsulates_is_the_stacks() {
    if !is_root() {
        return;
    }
    const TUNNEL: u8 = 109;
    with_router(|router| {
        router
            .load(&in_both(&[&format!("8080:@{TUNNEL}.10:80/tcp+udp"), "8081:@12.10:80/tcp+udp"]));
        for version in Version::BOTH {
            let (kind, length) = if version == Version::V4 { ("ip", 24) } else { ("ip6", 64) };
            let (network, end) = (version.address(TUNNEL, 0), version.address(LAN, 10));
            let encap = format!("encap {kind} id 1 dst {end} dev link12");
            ip_batch(&format!("route add {network}/{length} {encap}"));
        }
        for (version, protocol) in each() {
            let flow = to_network(version, protocol, TUNNEL);
            let (came, outcome) = (flow.came(), Outcome::Stack(ToStack::Encapsulated));
            router.translates("encapsulated", &flow, &came, outcome, &flow.translated(&came));
            let flow = reply_to(version, protocol, TUNNEL, 2);
            router.refuses("reply", &flow, &flow.came().bytes(), Outcome::Pass(Passed::Inside));
        }
    });
}
