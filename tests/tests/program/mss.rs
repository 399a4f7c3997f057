//! The MSS option of SYNs, in the kernel's programs.

use std::collections::BTreeMap;

use portfwd::rule::Mss;
use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Direction, Interface, ToStack};
use portfwd_tests::is_root;
use portfwd_tests::packet::{Packet, TCP};

use crate::router::{
    Flow, LAN, NARROW_INSIDE, NARROW_OUTSIDE, Outcome, Router, SLOW_LAN, Version, WAN, in_both,
    interfaces, with_router,
};

const SYN: u8 = 2;
const SYN_ACK: u8 = 0x12;

/// 1460, behind options that are read past.
fn options(value: u16, shift: usize) -> Vec<u8> {
    let [high, low] = value.to_be_bytes();
    let mut options = vec![1; shift];
    options.extend([4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 2, 4, high, low]);
    options.resize(options.len().next_multiple_of(4), 0);
    options
}

fn with_options(came: &Packet, flags: u8, options: Vec<u8>) -> Packet {
    let mut packet = came.clone();
    (packet.tcp.flags, packet.tcp.options) = (flags, options);
    packet
}

/// Interfaces of which this one has an MTU of so many bytes.
fn narrow(link: u8, mtu: u32) -> BTreeMap<u32, Interface> {
    let mut all = interfaces();
    all.get_mut(&u32::from(link)).unwrap().mtu = mtu;
    all
}

/// Asserts that of segments of 1,460 bytes so many are left, wherever the option stands and whatever the
/// flags are.
fn leaves(router: &mut Router, flow: &Flow, most: u16) {
    for flags in [SYN, SYN_ACK, 0x10] {
        for shift in 0..=9 {
            let came = with_options(&flow.came(), flags, options(1460, shift));
            let expected = if flags == 0x10 { 1460 } else { most };
            let goes = with_options(&flow.goes(&came), flags, options(expected, shift));
            router.redirects("mss", flow, &came, &goes);
        }
    }
    // Less is less.
    let came = with_options(&flow.came(), SYN, options(most.min(500), 1));
    router.redirects("less", flow, &came, &flow.goes(&came));
    for options in [vec![], vec![2, 3, 255, 1], vec![3, 0, 2, 4, 5, 180, 0, 0], vec![0, 2, 4, 255]]
    {
        let came = with_options(&flow.came(), SYN, options);
        router.redirects("none", flow, &came, &flow.goes(&came));
    }
}

fn headers(version: Version) -> u16 {
    if version == Version::V4 { 40 } else { 60 }
}

#[test]
fn it_fits_both_interfaces_and_the_route() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        let inside = format!("8081:@{NARROW_INSIDE}.10:80/tcp");
        router.load(&in_both(&["8080:@12.10:80/tcp", &inside, "8082:@12.10:82/tcp @12.10:83"]));
        for version in Version::BOTH {
            let most = |mtu: u16| mtu - headers(version);
            for role in [Role::Both, Role::External] {
                for (ingress, mtu) in [(1500, 1500), (1400, 1400), (9000, 1500)] {
                    router.datapath.set_interfaces(&narrow(WAN, ingress)).unwrap();
                    let flow = Flow { role, ..Flow::forward(version, TCP, 8080, (10, 80)) };
                    leaves(router, &flow, most(mtu).min(1460));
                    let end = version.at(NARROW_INSIDE, 10, 80);
                    let flow = Flow { end, ..Flow::forward(version, TCP, 8081, (10, 80)) };
                    leaves(router, &flow, most(mtu.min(1280)));
                }
            }
            router.datapath.set_interfaces(&narrow(LAN, 1400)).unwrap();
            let reply = Flow::reply(version, TCP, (10, 80), 8080);
            leaves(router, &reply, most(1400));
            let destination = version.at(NARROW_OUTSIDE, 10, 5000);
            leaves(router, &Flow { destination, ..reply }, most(1280));
        }
    });
}

#[test]
fn flows_too() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        // Each of two ports may be the client's choice: only replies know it.
        router.load(&in_both(&["8080:@12.10:80/tcp", "8081:@12.10:80/tcp"]));
        router.datapath.set_interfaces(&narrow(LAN, 1400)).unwrap();
        for version in Version::BOTH {
            let most = 1400 - headers(version);
            for port in [8080, 8081] {
                let [forward, reply] =
                    Flow::both(version, TCP, port, 80).map(|flow| match flow.direction {
                        Direction::Forward => {
                            Flow { source: version.at(WAN, 2, 5000 + port), ..flow }
                        }
                        Direction::Reply => {
                            Flow { destination: version.at(WAN, 2, 5000 + port), ..flow }
                        }
                    });
                let came = with_options(&forward.came(), SYN, options(1460, 3));
                let goes = with_options(
                    &forward.goes(&came),
                    SYN,
                    options(1460.min(1500 - headers(version)), 3),
                );
                router.redirects("forward", &forward, &came, &goes);
                let came = with_options(&reply.came(), SYN_ACK, options(1460, 3));
                let goes = with_options(&reply.goes(&came), SYN_ACK, options(most, 3));
                router.redirects("reply", &reply, &came, &goes);
            }
        }
    });
}

#[test]
fn what_the_stack_sends_too() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@12.99:80/tcp"]));
        router.datapath.set_interfaces(&narrow(WAN, 1400)).unwrap();
        for version in Version::BOTH {
            let flow = Flow::forward(version, TCP, 8080, (99, 80));
            let came = with_options(&flow.came(), SYN, options(1460, 2));
            let most = 1400 - headers(version);
            let goes = with_options(&flow.translated(&came), SYN, options(most, 2));
            let outcome = Outcome::Stack(ToStack::NoNeighbour);
            router.translates("no neighbour", &flow, &came, outcome, &goes);
        }
        router.load(&in_both(&[&format!("8080:@{SLOW_LAN}.10:80/tcp")]));
        for version in Version::BOTH {
            let end = version.at(SLOW_LAN, 10, 80);
            let flow =
                Flow { end, egress: (SLOW_LAN, 10), ..Flow::forward(version, TCP, 8080, (10, 80)) };
            let came = with_options(&flow.came(), SYN, options(1460, 2));
            let (outcome, goes) = flow.without_transmit(&came);
            let goes = with_options(&goes, SYN, options(1400 - headers(version), 2));
            router.translates("no transmit", &flow, &came, outcome, &goes);
        }
    });
}

#[test]
fn or_what_the_rule_says() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.datapath.set_interfaces(&narrow(WAN, 1400)).unwrap();
        for (mss, most) in [
            (Mss::At(1000), 1000),
            (Mss::Off, 1460),
            (Mss::At(88), 88),
            (Mss::Auto, 1340),
            (Mss::At(1459), 1459),
        ] {
            router.mss = mss;
            router.load(&in_both(&["8080:@12.10:80/tcp"]));
            for direction in [0, 1] {
                let flow = &Flow::both(Version::V6, TCP, 8080, 80)[direction];
                let most = if direction == 1 && mss == Mss::Auto { 1440 } else { most };
                leaves(router, flow, most);
            }
        }
    });
}
