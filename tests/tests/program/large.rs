//! Frames that are larger than a page: XDP has them in several pieces, of which programs see the first.

use std::time::Duration;

use portfwd::datapath::Hook;
use portfwd::sysctl::Families;
use portfwd_ebpf::table::{Interface, ToStack};
use portfwd_tests::is_root;
use portfwd_tests::packet::{ICMP, ICMPV6, Packet};

use crate::router::{
    Flow, LAN, Outcome, Router, SLOW_LAN, SLOW_WAN, Version, WAN, WEB, hook, in_both, interfaces,
    ip_batch, with_router,
};

/// Lengths of payloads: the first piece has about 3,500 bytes, each other 4,096.
const LENGTHS: [usize; 6] = [3000, 3500, 4000, 4001, 8000, 8940];

/// Links of 9,000 bytes. The kernel tries no such frames at TC.
fn with_large_links(test: impl FnOnce(&mut Router) + Send) {
    if !is_root() || hook() == Hook::Tc {
        return;
    }
    with_router(|router| {
        let links = [WAN, LAN, SLOW_WAN, SLOW_LAN];
        let lines = links
            .map(|link| format!("link set link{link} mtu 9000\nlink set link{link}p mtu 9000"));
        ip_batch(&lines.join("\n"));
        transmit(router, Interface::TRANSMITS_PIECES);
        test(router);
    });
}

/// With this in addition to what all interfaces have that transmit.
fn transmit(router: &mut Router, more: u32) {
    let mut all = interfaces();
    for interface in all.values_mut() {
        interface.mtu = 9000;
        if interface.has(Interface::TRANSMITS) {
            interface.flags |= more;
        }
    }
    router.datapath.set_interfaces(&all).unwrap();
}

fn large(flow: &Flow, length: usize) -> Packet {
    Packet { payload: (0..length).map(|i| (i * 7 / 3) as u8).collect(), ..flow.came() }
}

#[test]
fn they_are_translated_as_others_are() {
    with_large_links(|router| {
        for rule in [WEB[0], "8080:@12.10:80/tcp+udp @12.10:80"] {
            router.load(&in_both(&[rule]));
            for flow in Flow::all() {
                for length in LENGTHS {
                    let came = large(&flow, length);
                    router.redirects("large", &flow, &came, &flow.goes(&came));
                    // Not all of it is there.
                    let mut frame = came.bytes();
                    frame.truncate(frame.len() - 1);
                    let malformed = Outcome::Pass(portfwd_ebpf::table::Passed::Malformed);
                    router.refuses("cut", &flow, &frame, malformed);
                }
            }
        }
    });
}

#[test]
fn those_that_an_interface_cannot_transmit_go_through_the_stack() {
    with_large_links(|router| {
        transmit(router, 0);
        router.load(&in_both(&WEB));
        let both = Families { v4: true, v6: true };
        for remembered in [false, true] {
            let time = Duration::from_secs(if remembered { 100 } else { 0 });
            router.datapath.routes().rely(both, time).unwrap();
            for flow in Flow::all() {
                for _ in 0..2 {
                    for length in [0, 1400, 3000] {
                        let came = large(&flow, length);
                        router.redirects("small", &flow, &came, &flow.goes(&came));
                    }
                    for length in [3600, 8940] {
                        let came = large(&flow, length);
                        let stack = Outcome::Stack(ToStack::NoTransmit);
                        router.translates("large", &flow, &came, stack, &flow.translated(&came));
                    }
                }
            }
        }
    });
}

#[test]
fn pings_are_translated_too() {
    with_large_links(|router| {
        router.load(&in_both(&["*:@12.10/any"]));
        for version in Version::BOTH {
            let (protocol, kind) = match version {
                Version::V4 => (ICMP, 8),
                Version::V6 => (ICMPV6, 128),
            };
            let flow = Flow::forward(version, protocol, 0, (10, 0));
            for length in LENGTHS {
                let mut came = large(&flow, length);
                came.payload[..4].copy_from_slice(&[kind, 0, 0, 0]);
                router.redirects("ping", &flow, &came, &flow.goes(&came));
            }
        }
    });
}
