//! ICMP errors that portfwd makes: to clients, about what they sent to a rule.

use std::thread;
use std::time::{Duration, Instant};

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Dropped, Interface};
use portfwd_tests::{is_root, wire};

use portfwd::datapath::Hook;

use crate::router::{
    Flow, NARROW_INSIDE, Outcome, Router, Version, WAN, WEB, hook, in_both, interfaces, with_router,
};
use portfwd_tests::packet::{Packet, TCP, UDP, fragments};

/// What the client gets about its packet.
fn answer(about: &Packet, kind: [u8; 2], rest: [u8; 4]) -> Vec<u8> {
    let longest = if about.is_v4() { 576 - 28 } else { 1280 - 48 };
    let packet = Packet { padding: vec![], ..about.clone() }.bytes().split_off(14);
    let quoted = &packet[..packet.len().min(longest)];
    let (from, to) = (about.destination.ip(), about.source.ip());
    Packet {
        link_source: about.link_destination,
        link_destination: about.link_source,
        class: if about.is_v4() { 0xc0 } else { 0 },
        number: 0,
        ..Packet::error(from, to, kind, rest, quoted)
    }
    .bytes()
}

pub fn time_exceeded(about: &Packet) -> Vec<u8> {
    answer(about, if about.is_v4() { [11, 0] } else { [3, 0] }, [0; 4])
}

pub fn too_big(about: &Packet, mtu: u32) -> Vec<u8> {
    answer(about, if about.is_v4() { [3, 4] } else { [2, 0] }, mtu.to_be_bytes())
}

/// Asserts that the client of a packet is told.
pub fn tells(router: &mut Router, flow: &Flow, came: &Packet, reason: Dropped, expected: &[u8]) {
    let mut seen = router.try_frame(flow.role, flow.link, &came.bytes());
    for _ in 0..100 {
        if seen.outcome == Outcome::Drop(reason) {
            // There are only so many in a second.
            thread::sleep(Duration::from_millis(2));
            seen = router.try_frame(flow.role, flow.link, &came.bytes());
        }
    }
    assert_eq!(seen.outcome, Outcome::Answer(reason), "{flow:?}");
    wire::verify(&seen.frame).unwrap();
    assert_eq!(seen.frame, expected, "{flow:?}");
    assert_eq!(seen.rule.unwrap().1, None);
}

/// Forward flows, each as one interface's and as one that is both.
fn flows(port: u16) -> Vec<Flow> {
    let mut flows = Vec::new();
    for version in Version::BOTH {
        for protocol in [TCP, UDP] {
            let flow = Flow::forward(version, protocol, port, (10, 80));
            flows.push(Flow { role: Role::Both, ..flow.clone() });
            flows.push(flow);
        }
    }
    flows
}

#[test]
fn the_last_hop() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in flows(8080) {
            for length in [0, 1, 2, 3, 4, 5, 500, 519, 520, 521, 1203, 1204, 1205, 1400] {
                let payload = (0..length).map(|i| (i * 7) as u8).collect();
                let came = Packet { payload, hops: 1, ..flow.came() };
                tells(router, &flow, &came, Dropped::TtlExpired, &time_exceeded(&came));
            }
            let came = Packet { padding: vec![0xee; 7], hops: 0, ..flow.came() };
            tells(router, &flow, &came, Dropped::TtlExpired, &time_exceeded(&came));
            let mut came = Packet { hops: 1, ..flow.came() };
            if came.is_v4() {
                came.options = vec![1; 40];
            } else {
                came.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0]); 3];
            }
            tells(router, &flow, &came, Dropped::TtlExpired, &time_exceeded(&came));
        }
    });
}

#[test]
fn what_fits() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&[&format!("8080:@{NARROW_INSIDE}.10:80/tcp+udp")]));
        for flow in flows(8080) {
            for length in [1300, 1301, 1400] {
                let came = Packet { payload: vec![0x5a; length], ..flow.came() };
                tells(router, &flow, &came, Dropped::TooBig, &too_big(&came, 1280));
            }
        }
    });
}

/// XDP has them in several pieces; the answer quotes the beginning. The kernel tries none at TC.
#[test]
fn what_fits_no_page() {
    if !is_root() || hook() == Hook::Tc {
        return;
    }
    with_router(|router| {
        let inside = format!("8081:@{NARROW_INSIDE}.10:80/tcp+udp");
        router.load(&in_both(&[WEB[0], &inside]));
        let mut large = interfaces();
        large.values_mut().for_each(|interface| interface.mtu = 9000);
        router.datapath.set_interfaces(&large).unwrap();
        for length in [3400, 3500, 4000, 8000, 8900] {
            for (port, hops) in [(8080, 1), (8081, 64)] {
                for flow in flows(port) {
                    let payload = (0..length).map(|i| (i * 7) as u8).collect();
                    let came = Packet { payload, hops, ..flow.came() };
                    let (reason, expected) = match hops {
                        1 => (Dropped::TtlExpired, time_exceeded(&came)),
                        _ => (Dropped::TooBig, too_big(&came, 1280)),
                    };
                    tells(router, &flow, &came, reason, &expected);
                }
            }
        }
    });
}

#[test]
fn from_the_address_that_the_client_used() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load_at(&[1, 7], &in_both(&WEB));
        for flow in flows(8080) {
            let destination = flow.version.at(WAN, 7, 8080);
            let flow = Flow { destination, ..flow };
            let came = Packet { hops: 1, ..flow.came() };
            tells(router, &flow, &came, Dropped::TtlExpired, &time_exceeded(&came));
        }
    });
}

#[test]
fn to_nobody_who_is_not_one_host() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        let dropped = Outcome::Drop(Dropped::TtlExpired);
        for (version, sources) in [
            (Version::V4, ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"]),
            (Version::V6, ["::", "::1", "ff02::1", "ff0e::1"]),
        ] {
            let flow = Flow::forward(version, UDP, 8080, (10, 80));
            for source in sources {
                let source = (source.parse::<std::net::IpAddr>().unwrap(), 5000).into();
                let came = Packet { hops: 1, source, ..flow.came() };
                router.refuses(&format!("{source}"), &flow, &came.bytes(), dropped);
            }
            let came = Packet { hops: 1, link_source: [3, 0, 0, 0, 0, 1], ..flow.came() };
            router.refuses("a group's link address", &flow, &came.bytes(), dropped);
        }
    });
}

#[test]
fn not_about_later_fragments() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in flows(8080) {
            let packet = Packet { payload: vec![7; 200], ..flow.came() };
            let last = Packet { hops: 1, ..packet.clone() };
            let [first, next] = [packet, last].map(|packet| fragments(&packet.bytes(), 5, 104));
            let dropped = Outcome::Drop(Dropped::TtlExpired);
            let told = Outcome::Answer(Dropped::TtlExpired);
            router.refuses("the first", &flow, &next[0], told);
            router.refuses("left", &flow, &first[0], Outcome::Redirect);
            router.refuses("the next", &flow, &next[1], dropped);
        }
    });
}

#[test]
fn by_an_interface_that_can_send_them() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        let mut links = interfaces();
        links.get_mut(&WAN.into()).unwrap().flags = Interface::EXTERNAL;
        router.datapath.set_interfaces(&links).unwrap();
        for flow in flows(8080) {
            let came = Packet { hops: 1, ..flow.came() };
            match hook() {
                Hook::Xdp => {
                    let outcome = Outcome::Drop(Dropped::TtlExpired);
                    router.refuses("slow", &flow, &came.bytes(), outcome);
                }
                Hook::Tc => {
                    let expected = time_exceeded(&came);
                    tells(router, &flow, &came, Dropped::TtlExpired, &expected);
                }
            }
        }
    });
}

/// And not more than there may be.
#[test]
fn at_the_rate_that_is_allowed() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        let flow = Flow::forward(Version::V4, UDP, 8080, (10, 80));
        let frame = Packet { hops: 1, ..flow.came() }.bytes();
        let name = flow.version.rule(WEB[0]);
        let start = Instant::now();
        let mut tried = 0;
        while start.elapsed().as_millis() < 500 {
            router.datapath.try_frame(hook(), flow.role, flow.link.into(), &frame).unwrap();
            tried += 1;
        }
        let allowed = 100 + start.elapsed().as_millis() as u64 + 20;
        let counts = router.counts(&name);
        assert_eq!(counts.dropped[Dropped::TtlExpired as usize], tried);
        let cpus = thread::available_parallelism().unwrap().get() as u64;
        println!("{} of {tried} were answered", counts.answered);
        assert!((100..=allowed * cpus).contains(&counts.answered), "{}", counts.answered);
        assert!(tried > 1000 && counts.answered < tried, "{tried}");
    });
}
