//! Which rule gets a packet, and what it makes of the port.

use portfwd::datapath::Hook;
use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::Direction;
use portfwd_ebpf::table::{Dropped, Passed};
use portfwd_tests::is_root;
use portfwd_tests::packet::{TCP, UDP};

use crate::router::{
    ARM, Flow, LAN, Outcome, Router, Version, WAN, WEB, hook, in_both, link_address, with_router,
};

const NO_RULE: Outcome = Outcome::Pass(Passed::NoRule);

/// Asserts that a listened port leads to a host and port of `LAN`, and that its replies come back.
fn leads(router: &mut Router, rule: &str, protocol: u8, port: u16, backend: (u8, u16)) {
    for version in Version::BOTH {
        for flow in [
            Flow::forward(version, protocol, port, backend),
            Flow::reply(version, protocol, backend, port),
        ] {
            let came = flow.came();
            let name = format!("{rule}: {port}");
            let by = router.redirects(&name, &flow, &came, &flow.goes(&came));
            assert_eq!(by, version.rule(rule), "{name}: {flow:?}");
        }
    }
}

/// Asserts that no rule wants a packet to a port of the router.
fn unclaimed(router: &mut Router, protocol: u8, port: u16) {
    for version in Version::BOTH {
        let flow = Flow::forward(version, protocol, port, (10, 1));
        router.refuses(&format!("port {port}"), &flow, &flow.came().bytes(), NO_RULE);
    }
}

/// A rule, its protocols, listened ports with the backend's, and ports that are not the rule's.
type Case = (&'static str, &'static [u8], &'static [(u16, u16)], &'static [u16]);

#[test]
fn a_rule_translates_its_ports_and_no_others() {
    if !is_root() {
        return;
    }
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("80:@12.10/tcp", &[TCP], &[(80, 80)], &[79, 81, 336, 20480]),
        ("53:@12.10/udp", &[UDP], &[(53, 53)], &[52, 54]),
        ("8080:@12.10:80/tcp+udp", &[TCP, UDP], &[(8080, 80)], &[80, 8079, 8081]),
        ("1:@12.10:65535/tcp", &[TCP], &[(1, 65535)], &[2, 65535]),
        ("65535:@12.10:1/udp", &[UDP], &[(65535, 1)], &[65534, 1]),
        ("255:@12.10:256/tcp", &[TCP], &[(255, 256)], &[254, 256]),
        ("256:@12.10:255/tcp", &[TCP], &[(256, 255)], &[255, 257]),
        ("27015-27030:@12.10/udp", &[UDP], &[(27015, 27015), (27022, 27022), (27030, 27030)], &[27014, 27031]),
        ("2000-2999:@12.10:5000-5999/tcp", &[TCP], &[(2000, 5000), (2047, 5047), (2048, 5048), (2500, 5500), (2999, 5999)], &[1999, 3000, 5000]),
        ("5000-5999:@12.10:2000-2999/tcp+udp", &[TCP, UDP], &[(5000, 2000), (5375, 2375), (5999, 2999)], &[4999, 6000]),
        ("1-1000:@12.10:64536-65535/tcp", &[TCP], &[(1, 64536), (512, 65047), (1000, 65535)], &[1001]),
        ("64536-65535:@12.10:1-1000/tcp", &[TCP], &[(64536, 1), (65535, 1000)], &[64535]),
        ("255-256:@12.10/tcp", &[TCP], &[(255, 255), (256, 256)], &[254, 257]),
        ("1-65535:@12.10/udp", &[UDP], &[(1, 1), (255, 255), (256, 256), (65535, 65535)], &[]),
        ("*:@12.10/tcp", &[TCP], &[(1, 1), (22, 22), (68, 68), (546, 546), (40000, 40000), (65535, 65535)], &[]),
        ("*:@12.10/udp", &[UDP], &[(1, 1), (67, 67), (69, 69), (545, 545), (547, 547), (65535, 65535)], &[68, 546]),
        ("*:@12.10/any", &[TCP, UDP], &[(1, 1), (67, 67), (8080, 8080), (65535, 65535)], &[]),
    ];
    with_router(|router| {
        for (rule, protocols, ports, beside) in cases {
            router.load(&in_both(&[rule]));
            for protocol in [TCP, UDP] {
                if protocols.contains(&protocol) {
                    for (port, backend_port) in *ports {
                        leads(router, rule, protocol, *port, (10, *backend_port));
                    }
                    for port in *beside {
                        unclaimed(router, protocol, *port);
                    }
                } else {
                    unclaimed(router, protocol, ports[0].0);
                }
            }
        }
    });
}

#[test]
fn the_narrower_rule_has_the_port() {
    if !is_root() {
        return;
    }
    let any = "*:@12.10/any";
    let star = "*:@12.11/tcp";
    let range = "8000-8999:@12.12/tcp+udp";
    let exact = "8080:@12.13:80/tcp";
    let bound = "@11.1:8443:@12.14:443/tcp";
    let mut specs = [any, star, range, exact, bound];
    // The order in which they are written is nothing.
    for _ in 0..2 {
        with_router(|router| {
            router.load(&in_both(&specs));
            leads(router, exact, TCP, 8080, (13, 80));
            leads(router, range, UDP, 8080, (12, 8080));
            leads(router, range, TCP, 8000, (12, 8000));
            leads(router, range, TCP, 8079, (12, 8079));
            leads(router, range, TCP, 8999, (12, 8999));
            leads(router, star, TCP, 7999, (11, 7999));
            leads(router, star, TCP, 9000, (11, 9000));
            leads(router, any, UDP, 9000, (10, 9000));
            leads(router, bound, TCP, 8443, (14, 443));
            unclaimed(router, UDP, 68);
            unclaimed(router, UDP, 546);
            leads(router, star, TCP, 68, (11, 68));
            // What no other rule can have is the DMZ host's.
            for version in Version::BOTH {
                let flow = Flow::forward(version, 47, 0, (10, 0));
                let came = flow.came();
                let by = router.redirects("GRE", &flow, &came, &flow.goes(&came));
                assert_eq!(by, version.rule(any));
            }
        });
        specs.reverse();
    }
}

#[test]
fn a_rule_with_an_address_comes_before_every_rule_without() {
    if !is_root() {
        return;
    }
    let bound = "@11.7:*:@12.11/tcp";
    let open = "80:@12.10/tcp";
    with_router(|router| {
        router.load_at(&[1, 7], &in_both(&[bound, open]));
        for version in Version::BOTH {
            for (host, port, backend, rule) in [
                (1, 80, 10, Some(open)),
                (7, 80, 11, Some(bound)),
                (7, 81, 11, Some(bound)),
                (1, 81, 0, None),
            ] {
                let flow = Flow {
                    destination: version.at(WAN, host, port),
                    ..Flow::forward(version, TCP, port, (backend, port))
                };
                let came = flow.came();
                match rule {
                    Some(rule) => {
                        let by = router.redirects(rule, &flow, &came, &flow.goes(&came));
                        assert_eq!(by, version.rule(rule));
                    }
                    None => router.refuses("the other address", &flow, &came.bytes(), NO_RULE),
                }
            }
            // Its replies leave by its address.
            let flow =
                Flow { end: version.at(WAN, 7, 80), ..Flow::reply(version, TCP, (11, 80), 80) };
            let came = flow.came();
            router.redirects(bound, &flow, &came, &flow.goes(&came));
        }
    });
}

#[test]
fn what_no_rule_claims_passes() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@12.10:80/tcp", "53:@12.10/udp"]));
        for version in Version::BOTH {
            let [forward, reply] = Flow::both(version, TCP, 8080, 80);
            for (name, flow) in [
                ("port", Flow { destination: version.at(WAN, 1, 8081), ..forward.clone() }),
                ("address", Flow { destination: version.at(WAN, 7, 8080), ..forward.clone() }),
                (
                    "inner address",
                    Flow { destination: version.at(LAN, 1, 8080), ..forward.clone() },
                ),
                (
                    "the backend itself",
                    Flow { destination: version.at(LAN, 10, 80), ..forward.clone() },
                ),
                ("protocol", Flow { protocol: UDP, ..forward.clone() }),
                (
                    "the other rule's port",
                    Flow { destination: version.at(WAN, 1, 53), ..forward.clone() },
                ),
                (
                    "no rule's protocol",
                    Flow { protocol: 132, destination: version.at(WAN, 9, 1), ..forward },
                ),
                ("reply's port", Flow { source: version.at(LAN, 10, 81), ..reply.clone() }),
                (
                    "reply's listened port",
                    Flow { source: version.at(LAN, 10, 8080), ..reply.clone() },
                ),
                ("another host", Flow { source: version.at(LAN, 11, 80), ..reply.clone() }),
                ("reply's protocol", Flow { protocol: UDP, ..reply }),
            ] {
                router.refuses(name, &flow, &flow.came().bytes(), NO_RULE);
            }
        }
        router.load(&[] as &[&str]);
        for flow in Flow::all() {
            router.refuses("no rules", &flow, &flow.came().bytes(), NO_RULE);
        }
    });
}

#[test]
fn a_role_translates_its_own_direction() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let came = flow.came();
            // What goes forward from inside is a hairpin.
            if flow.direction == Direction::Reply {
                let strange = Flow { role: Role::External, ..flow.clone() };
                router.refuses("another role", &strange, &came.bytes(), NO_RULE);
            }
            let both = Flow { role: Role::Both, ..flow.clone() };
            router.redirects("both", &both, &came, &flow.goes(&came));
        }
    });
}

#[test]
fn one_arm_is_both() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["@16.1:8080:@16.10:80/tcp+udp"]));
        for version in Version::BOTH {
            for protocol in [TCP, UDP] {
                let [forward, reply] = Flow::both(version, protocol, 8080, 80);
                let forward = Flow {
                    role: Role::Both,
                    link: ARM,
                    source: version.at(ARM, 2, 5000),
                    destination: version.at(ARM, 1, 8080),
                    end: version.at(ARM, 10, 80),
                    egress: (ARM, 10),
                    ..forward
                };
                let reply = Flow {
                    role: Role::Both,
                    link: ARM,
                    source: version.at(ARM, 10, 80),
                    destination: version.at(ARM, 2, 5000),
                    end: version.at(ARM, 1, 8080),
                    egress: (ARM, 2),
                    ..reply
                };
                for flow in [forward, reply] {
                    let came = flow.came();
                    router.redirects("one arm", &flow, &came, &flow.goes(&came));
                }
            }
        }
    });
}

/// A client's traffic by one of the router's addresses, and the answer it gets.
fn asks(router: &mut Router, version: Version, protocol: u8, client_port: u16, host: u8) {
    let [forward, reply] = Flow::both(version, protocol, 8080, 80);
    let forward = Flow {
        source: version.at(WAN, 2, client_port),
        destination: version.at(WAN, host, 8080),
        ..forward
    };
    let came = forward.came();
    router.redirects("asks", &forward, &came, &forward.goes(&came));
    answers(router, &reply, version.at(WAN, 2, client_port), host);
}

fn answers(router: &mut Router, reply: &Flow, client: std::net::SocketAddr, host: u8) {
    let end = reply.version.at(WAN, host, 8080);
    let reply = Flow { destination: client, end, ..reply.clone() };
    let came = reply.came();
    router.redirects("is answered", &reply, &came, &reply.goes(&came));
}

#[test]
fn a_reply_leaves_with_the_address_that_its_client_came_by() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load_at(&[1, 7], &in_both(&WEB));
        for version in Version::BOTH {
            for protocol in [TCP, UDP] {
                asks(router, version, protocol, 5001, 7);
                asks(router, version, protocol, 5002, 1);
                // Each has its own memory.
                let [_, reply] = Flow::both(version, protocol, 8080, 80);
                answers(router, &reply, version.at(WAN, 2, 5001), 7);
                answers(router, &reply, version.at(WAN, 2, 5002), 1);
                // The same ports move from the second address to the first, and back.
                asks(router, version, protocol, 5001, 1);
                asks(router, version, protocol, 5001, 7);
                asks(router, version, protocol, 5001, 1);
                // Another client behind the same port number is another client.
                asks(router, version, protocol, 5001, 7);
                let other = Flow { egress: (WAN, 10), ..reply.clone() };
                answers(router, &other, version.at(WAN, 10, 5001), 1);
                asks(router, version, protocol, 5001, 1);
            }
            // TCP's memory is not UDP's.
            asks(router, version, TCP, 5003, 7);
            asks(router, version, UDP, 5003, 1);
            let [_, reply] = Flow::both(version, TCP, 8080, 80);
            answers(router, &reply, version.at(WAN, 2, 5003), 7);
        }
    });
}

/// A packet that is not forwarded says nothing about where its client came by.
#[test]
fn only_forwarded_packets_are_remembered() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load_at(&[1, 7], &in_both(&WEB));
        for version in Version::BOTH {
            let [forward, reply] = Flow::both(version, UDP, 8080, 80);
            let strange = Flow { destination: version.at(WAN, 7, 8080), ..forward };
            let mut came = strange.came();
            came.hops = 1;
            let outcome = Outcome::Answer(Dropped::TtlExpired);
            router.refuses("last hop", &strange, &came.bytes(), outcome);
            answers(router, &reply, version.at(WAN, 2, 5000), 1);
        }
    });
}

/// The link addresses that a frame came with play no part, as long as it is for one host, or at TC for this.
#[test]
fn link_addresses_are_the_next_hops() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let mut came = flow.came();
            came.link_source = link_address(99, 98);
            came.link_destination = link_address(97, 96);
            match hook() {
                Hook::Xdp => {
                    router.redirects("strange link addresses", &flow, &came, &flow.goes(&came));
                }
                // There the kernel knows its own.
                Hook::Tc => {
                    let outcome = Outcome::Pass(Passed::Group);
                    router.refuses("another host", &flow, &came.bytes(), outcome);
                }
            }
        }
    });
}
