//! Protocols other than TCP and UDP: a DMZ host has them.

use std::collections::BTreeSet;

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Direction, Dropped, Passed};
use portfwd_tests::is_root;

use crate::router::{Flow, Outcome, Router, Version, in_both, with_router};
use portfwd_tests::packet::{DCCP, ICMP, ICMPV6, Packet, UDP_LITE, fragments};

const DMZ: [&str; 1] = ["*:@12.10/any"];

/// Both ways of a protocol in both families; its packets have no ports.
fn flows(protocol: u8) -> Vec<Flow> {
    let mut flows = Vec::new();
    for version in Version::BOTH {
        for flow in Flow::both(version, protocol, 0, 0) {
            flows.push(Flow { role: Role::Both, ..flow.clone() });
            flows.push(flow);
        }
    }
    flows
}

fn redirects(router: &mut Router, name: &str, flow: &Flow, came: &Packet) {
    let by = router.redirects(name, flow, came, &flow.goes(came));
    assert_eq!(by, flow.version.rule(DMZ[0]));
}

/// What a ping is made of: request or reply.
fn echo(flow: &Flow, length: usize) -> Packet {
    let kind = match (flow.version, flow.direction) {
        (Version::V4, Direction::Forward) => 8,
        (Version::V4, Direction::Reply) => 0,
        (Version::V6, Direction::Forward) => 128,
        (Version::V6, Direction::Reply) => 129,
    };
    let mut payload = vec![kind, 0, 0, 0, 1, 2, 3, 4];
    payload.extend((0..length).map(|i| (i * 7) as u8));
    Packet { payload, ..flow.came() }
}

fn icmp(version: Version) -> u8 {
    if version == Version::V4 { ICMP } else { ICMPV6 }
}

#[test]
fn every_protocol_is_translated_but_those_that_cannot_be() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&DMZ));
        // Extension headers of IPv6 are none of its protocols.
        let extensions = [0, 43, 44, 51, 60];
        for protocol in 0..=255 {
            for flow in flows(protocol) {
                let came = Packet { payload: vec![0xc8; 64], ..flow.came() };
                let reason = match protocol {
                    6 | 17 => continue,
                    1 | 58 => Passed::Icmp,
                    2 | 51 | 255 if flow.version == Version::V4 => Passed::Protocol,
                    2 | 255 => Passed::Protocol,
                    _ if flow.version == Version::V6 && extensions.contains(&protocol) => continue,
                    _ => {
                        redirects(router, &format!("protocol {protocol}"), &flow, &came);
                        continue;
                    }
                };
                let outcome = Outcome::Pass(reason);
                router.refuses(&format!("protocol {protocol}"), &flow, &came.bytes(), outcome);
            }
        }
    });
}

#[test]
fn checksums_over_the_addresses_are_kept() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&DMZ));
        for protocol in [UDP_LITE, DCCP] {
            for flow in flows(protocol) {
                for length in [8, 9, 33, 1200] {
                    let payload: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
                    let came = Packet { payload, ..flow.came() };
                    redirects(router, &format!("{length} bytes"), &flow, &came);
                }
                // What leaves would have zero, which UDP-Lite never has.
                let mut came = Packet { payload: vec![7; 16], ..flow.came() };
                came.payload[14..].fill(0);
                let goes = flow.goes(&came).bytes();
                let place = goes.len() - 16 + 6;
                came.payload[14..].copy_from_slice(&goes[place..place + 2]);
                redirects(router, "zero", &flow, &came);
                let short = Packet { payload: vec![7; 7], ..flow.came() };
                router.refuses("short", &flow, &short.bytes(), Outcome::Pass(Passed::Malformed));
            }
        }
    });
}

#[test]
fn pings_and_their_answers() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&DMZ));
        for version in Version::BOTH {
            for flow in flows(icmp(version)).into_iter().filter(|flow| flow.version == version) {
                for length in [0, 1, 56, 1400] {
                    redirects(router, "echo", &flow, &echo(&flow, length));
                }
                // All else of ICMP is the router's own: answers to its pings, its neighbours.
                for kind in 0..=255 {
                    let mut packet = echo(&flow, 56);
                    if packet.payload[0] == kind {
                        continue;
                    }
                    packet.payload[0] = kind;
                    let seen = router.try_frame(flow.role, flow.link, &packet.bytes());
                    let reasons = [Passed::Icmp, Passed::Malformed];
                    assert!(
                        reasons.iter().any(|reason| seen.outcome == Outcome::Pass(*reason)),
                        "{kind}: {:?}",
                        seen.outcome
                    );
                }
            }
        }
    });
}

#[test]
fn their_fragments_follow() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&DMZ));
        for version in Version::BOTH {
            for protocol in [icmp(version), 47, UDP_LITE] {
                for flow in flows(protocol).into_iter().filter(|flow| flow.version == version) {
                    let came = match protocol {
                        ICMP | ICMPV6 => echo(&flow, 1400),
                        _ => Packet { payload: vec![0x5a; 1400], ..flow.came() },
                    };
                    let [came, goes] = [came.clone(), flow.goes(&came)]
                        .map(|packet| fragments(&packet.bytes(), 7 + u16::from(protocol), 512));
                    for (came, goes) in came.iter().zip(goes) {
                        let seen = router.try_frame(flow.role, flow.link, came);
                        assert_eq!((seen.outcome, seen.frame), (Outcome::Redirect, goes));
                    }
                }
            }
        }
    });
}

#[test]
fn a_client_is_told_when_they_expire() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&DMZ));
        for flow in flows(47).into_iter().filter(|flow| flow.direction == Direction::Forward) {
            let last = Packet { hops: 1, ..flow.came() };
            let outcome = Outcome::Answer(Dropped::TtlExpired);
            router.refuses("last hop", &flow, &last.bytes(), outcome);
        }
    });
}

#[test]
fn what_the_box_speaks_is_its_own() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for own in [BTreeSet::from([47]), BTreeSet::from([50, 132]), BTreeSet::new()] {
            router.compiler.leave(&own);
            router.load(&in_both(&DMZ));
            for protocol in [47, 50, 132] {
                for flow in flows(protocol) {
                    let came = flow.came();
                    if own.contains(&protocol) {
                        let outcome = Outcome::Pass(Passed::Protocol);
                        router.refuses("its own", &flow, &came.bytes(), outcome);
                    } else {
                        redirects(router, "not its own", &flow, &came);
                    }
                }
            }
        }
    });
}

#[test]
fn no_other_rule_has_them() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["*:@12.10/tcp", "1-65535:@12.10/udp"]));
        for protocol in [47, 132, UDP_LITE] {
            for flow in flows(protocol) {
                let outcome = Outcome::Pass(Passed::Protocol);
                let came = Packet { payload: vec![7; 16], ..flow.came() };
                router.refuses("not claimed", &flow, &came.bytes(), outcome);
            }
        }
        for version in Version::BOTH {
            for flow in flows(icmp(version)).into_iter().filter(|flow| flow.version == version) {
                let outcome = Outcome::Pass(Passed::Icmp);
                router.refuses("echo", &flow, &echo(&flow, 9).bytes(), outcome);
            }
        }
    });
}
