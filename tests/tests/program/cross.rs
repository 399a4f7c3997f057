//! Backends of the other IP version: packets of flows change their headers as RFC 7915 says.

use std::net::SocketAddr;

use portfwd::rule::Rule;
use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Direction, Dropped, Passed};
use portfwd_tests::is_root;
use portfwd_tests::packet::{ETHERNET, Packet, TCP, UDP, ends};

use crate::answers::{tells, time_exceeded, too_big};
use crate::headers::{transport_checksum, tune};
use crate::router::{
    self, Flow, LAN, NARROW_INSIDE, OTHER, Outcome, PORTS, Router, Version, WAN, hex, link_address,
    with_router,
};

/// Clients of this version, and a backend of the other.
fn rule(version: Version, backend: (u8, u8)) -> Rule {
    let spec = version.rule("@11.1:8080:@12.10:80/tcp+udp masquerade");
    let to = other(version).at(backend.0, backend.1, 80).to_string().parse().unwrap();
    Rule { name: format!("{version:?}"), to: vec![to].into(), ..router::rule(&spec) }
}

fn other(version: Version) -> Version {
    if version == Version::V4 { Version::V6 } else { Version::V4 }
}

/// A flow through such a rule, with the ends that it has on each side.
#[derive(Clone, Copy)]
struct Crossing {
    version: Version,
    protocol: u8,
    client: SocketAddr,
    listen: SocketAddr,
    /// The client, as the backend sees it.
    appears: SocketAddr,
    backend: SocketAddr,
}

impl Crossing {
    /// Begins a flow in each version and protocol. All have an answer.
    fn all(router: &mut Router) -> Vec<Self> {
        router.load_rules(Version::BOTH.map(|version| rule(version, (LAN, 10))).into());
        let both = Version::BOTH.into_iter();
        let kinds: Vec<_> = both.flat_map(|it| [TCP, UDP].map(|protocol| (it, protocol))).collect();
        kinds
            .into_iter()
            .map(|(version, protocol)| Self::begin(router, version, protocol))
            .collect()
    }

    fn begin(router: &mut Router, version: Version, protocol: u8) -> Self {
        let (client, listen) = (version.at(WAN, 2, 5000), version.at(WAN, 1, 8080));
        let backend = other(version).at(LAN, 10, 80);
        let mut crossing = Self { version, protocol, client, listen, appears: client, backend };
        let came = crossing.came(Direction::Forward);
        let seen = router.try_frame(Role::External, WAN, &came.bytes());
        assert_eq!(seen.outcome, Outcome::Redirect);
        let ip = if version == Version::V4 { 40 } else { 20 };
        let (appears, to) = ends(&seen.frame, ETHERNET + ip).unwrap();
        assert_eq!((appears.ip(), to), (other(version).address(LAN, 1), backend));
        assert!(PORTS.masquerade.contains(&appears.port()), "{appears}");
        crossing.appears = appears;
        crossing.converts(router, "answer", Direction::Reply, &crossing.came(Direction::Reply));
        crossing
    }

    /// The version of what comes in this direction.
    fn comes_as(&self, direction: Direction) -> Version {
        match direction {
            Direction::Forward => self.version,
            Direction::Reply => other(self.version),
        }
    }

    fn flow(&self, direction: Direction) -> Flow {
        match direction {
            Direction::Forward => Flow::forward(self.version, self.protocol, 8080, (10, 80)),
            Direction::Reply => Flow::reply(other(self.version), self.protocol, (10, 80), 8080),
        }
    }

    /// Source and destination of a packet in this direction, as it comes and as it goes.
    fn ends(&self, direction: Direction) -> [(SocketAddr, SocketAddr); 2] {
        match direction {
            Direction::Forward => [(self.client, self.listen), (self.appears, self.backend)],
            Direction::Reply => [(self.backend, self.appears), (self.listen, self.client)],
        }
    }

    fn came(&self, direction: Direction) -> Packet {
        let (source, destination) = self.ends(direction)[0];
        Packet { source, destination, ..self.flow(direction).came() }
    }

    /// The packet with headers of the other version. An identification stands for any.
    fn goes(&self, direction: Direction, came: &Packet) -> Packet {
        let (link, host) = self.flow(direction).egress;
        let (source, destination) = self.ends(direction)[1];
        Packet {
            link_source: link_address(link, 1),
            link_destination: link_address(link, host),
            hops: came.hops - 1,
            ..converted(came, source, destination)
        }
    }

    /// Asserts that a packet leaves converted and right.
    fn converts(&self, router: &mut Router, name: &str, direction: Direction, came: &Packet) {
        self.leaves(router, name, direction, came, self.goes(direction, came));
    }

    fn leaves(
        &self,
        router: &mut Router,
        name: &str,
        direction: Direction,
        came: &Packet,
        mut goes: Packet,
    ) {
        let flow = self.flow(direction);
        let seen = router.try_frame(flow.role, flow.link, &came.bytes());
        let case = format!("{name}, {:?}, {direction:?}, {}", self.version, self.protocol);
        assert_eq!(seen.outcome, Outcome::Redirect, "{case}");
        if goes.is_v4() && goes.fragment == 0 {
            goes.number = u16::from_be_bytes([seen.frame[18], seen.frame[19]]);
            assert_ne!(goes.number, 0, "{case}");
        }
        assert_eq!(hex(&seen.frame), hex(&goes.bytes()), "{case}");
        assert_eq!(seen.rule.unwrap().1, Some(direction), "{case}");
        if let Err(error) = portfwd_tests::wire::verify(&seen.frame) {
            panic!("{case}: {error:#}");
        }
    }

    fn refuses(
        &self,
        router: &mut Router,
        name: &str,
        direction: Direction,
        came: &Packet,
        outcome: Outcome,
    ) {
        let case = format!("{name}, {:?}, {direction:?}", self.version);
        router.refuses(&case, &self.flow(direction), &came.bytes(), outcome);
    }
}

/// A packet of the other version between these ends, with what both versions have.
fn converted(came: &Packet, source: SocketAddr, destination: SocketAddr) -> Packet {
    let mut goes = Packet { source, destination, ..came.clone() };
    goes.number = 0;
    // RFC 7915, section 5.1: what has more than 1,260 bytes must not be fragmented.
    goes.fragment = if goes.is_v4() && goes.length() > 1260 { 0x4000 } else { 0 };
    goes
}

type Applies = fn(&Packet) -> bool;
type Change = fn(&mut Packet);

const TCP_ONLY: Applies = |packet| packet.protocol == TCP;

#[rustfmt::skip]
const PACKETS: &[(&str, Applies, Change)] = &[
    ("as it is", |_| true, |_| {}),
    ("empty", |_| true, |packet| packet.payload.clear()),
    ("odd", |_| true, |packet| packet.payload = vec![0x5a; 33]),
    ("long", |_| true, |packet| packet.payload = vec![0xa5; 1400]),
    ("longest that may be fragmented", |_| true, |packet| {
        let room = 1260 - 20 - if packet.protocol == TCP { 20 } else { 8 };
        packet.payload = vec![0xa5; room];
    }),
    ("a byte longer", |_| true, |packet| {
        let room = 1260 - 20 - if packet.protocol == TCP { 20 } else { 8 };
        packet.payload = vec![0xa5; room + 1];
    }),
    ("class", |_| true, |packet| packet.class = 0xb9),
    ("every bit of the class", |_| true, |packet| packet.class = 0xff),
    ("many hops", |_| true, |packet| packet.hops = 255),
    ("last hop but one", |_| true, |packet| packet.hops = 2),
    ("may be fragmented", Packet::is_v4, |packet| packet.fragment = 0),
    ("flow label", |packet| !packet.is_v4(), |packet| packet.number = 0xffff),
    ("options of TCP", TCP_ONLY, |packet| packet.tcp.options = [[1, 1, 8, 10], [0, 1, 2, 3], [4, 5, 6, 7]].concat()),
    ("urgent", TCP_ONLY, |packet| (packet.tcp.flags, packet.tcp.urgent) = (0x38, 7)),
];

#[test]
fn whole_packets_change_their_headers() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for crossing in Crossing::all(router) {
            for direction in [Direction::Forward, Direction::Reply] {
                for (name, applies, change) in PACKETS {
                    let mut came = crossing.came(direction);
                    if applies(&came) {
                        change(&mut came);
                        crossing.converts(router, name, direction, &came);
                    }
                }
            }
        }
    });
}

/// Of UDP's, all ones stand for nothing: no checksum is something else.
#[test]
fn checksums_that_come_or_leave_as_nothing() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for crossing in Crossing::all(router) {
            let nothing = if crossing.protocol == UDP { [0xff, 0xff] } else { [0, 0] };
            for direction in [Direction::Forward, Direction::Reply] {
                let mut came = crossing.came(direction);
                came.payload = tune(&crossing.goes(direction, &came));
                assert_eq!(transport_checksum(&crossing.goes(direction, &came)), nothing);
                crossing.converts(router, "leaves as nothing", direction, &came);
                came.payload = tune(&came);
                assert_eq!(transport_checksum(&came), nothing);
                crossing.converts(router, "comes as nothing", direction, &came);
            }
        }
    });
}

#[rustfmt::skip]
const WITHOUT_COUNTERPART: &[(&str, Applies, Change)] = &[
    ("options", Packet::is_v4, |packet| packet.options = vec![1; 4]),
    ("no checksum", |packet| packet.is_v4() && packet.protocol == UDP, |packet| packet.no_checksum = true),
    ("first fragment", Packet::is_v4, |packet| packet.fragment = 0x2000),
    ("hop-by-hop options", |packet| !packet.is_v4(), |packet| packet.extensions = vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0])]),
    ("destination options", |packet| !packet.is_v4(), |packet| packet.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])]),
    ("first fragment", |packet| !packet.is_v4(), |packet| packet.extensions = vec![(44, vec![0, 0, 0, 1, 9, 9, 9, 9])]),
];

#[test]
fn what_the_other_version_does_not_have_is_dropped() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for crossing in Crossing::all(router) {
            for direction in [Direction::Forward, Direction::Reply] {
                for (name, applies, change) in WITHOUT_COUNTERPART {
                    let mut came = crossing.came(direction);
                    if applies(&came) {
                        change(&mut came);
                        let dropped = Outcome::Drop(Dropped::NoCounterpart);
                        crossing.refuses(router, name, direction, &came, dropped);
                    }
                }
            }
        }
    });
}

/// Its sender hears of it in its own version, from the address that it sent to.
#[test]
fn a_packet_that_ends_here_is_answered() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for crossing in Crossing::all(router) {
            for direction in [Direction::Forward, Direction::Reply] {
                let came = Packet { hops: 1, ..crossing.came(direction) };
                tells(
                    router,
                    &crossing.flow(direction),
                    &came,
                    Dropped::TtlExpired,
                    &time_exceeded(&came),
                );
            }
        }
    });
}

#[test]
fn senders_are_told_what_fits_in_their_version() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        // What has 1,280 bytes in the other version.
        for (version, fits) in [(Version::V4, 1260_u16), (Version::V6, 1300)] {
            router.load_rules(vec![rule(version, (NARROW_INSIDE, 10))]);
            for protocol in [TCP, UDP] {
                let flow = Flow::forward(version, protocol, 8080, (10, 80));
                let sized = |length: u16| {
                    let came = flow.came();
                    let headers = came.length() - came.payload.len();
                    Packet { payload: vec![7; usize::from(length) - headers], ..came }
                };
                let seen = router.try_frame(flow.role, flow.link, &sized(fits).bytes());
                assert_eq!(seen.outcome, Outcome::Redirect, "{version:?}");
                let came = sized(fits + 1);
                let expected = too_big(&came, fits.into());
                tells(router, &flow, &came, Dropped::TooBig, &expected);
            }
        }
    });
}

type Kind = ([u8; 2], [u8; 4]);

/// Errors of IPv4, and what they are in IPv6 (RFC 7915, section 4.2).
#[rustfmt::skip]
const OF_V4: &[(Kind, Option<Kind>)] = &[
    (([3, 0], [0; 4]), Some(([1, 0], [0; 4]))),
    (([3, 1], [0; 4]), Some(([1, 0], [0; 4]))),
    (([3, 2], [0; 4]), Some(([4, 1], [0, 0, 0, 6]))),
    (([3, 3], [0; 4]), Some(([1, 4], [0; 4]))),
    // 1400 and 20; and the least that IPv6 has.
    (([3, 4], [0, 0, 0x05, 0x78]), Some(([2, 0], [0, 0, 0x05, 0x8c]))),
    (([3, 4], [0, 0, 0x02, 0x40]), Some(([2, 0], [0, 0, 0x05, 0x00]))),
    (([3, 5], [0; 4]), Some(([1, 0], [0; 4]))),
    (([3, 9], [0; 4]), Some(([1, 1], [0; 4]))),
    (([3, 13], [0; 4]), Some(([1, 1], [0; 4]))),
    (([3, 14], [0; 4]), None),
    (([4, 0], [0; 4]), None),
    (([11, 0], [0; 4]), Some(([3, 0], [0; 4]))),
    (([11, 1], [0; 4]), Some(([3, 1], [0; 4]))),
    (([12, 0], [9, 0, 0, 0]), Some(([4, 0], [0, 0, 0, 6]))),
    (([12, 0], [16, 0, 0, 0]), Some(([4, 0], [0, 0, 0, 24]))),
    (([12, 0], [6, 0, 0, 0]), None),
    (([12, 1], [0; 4]), None),
];

/// Errors of IPv6, and what they are in IPv4 (RFC 7915, section 5.2).
#[rustfmt::skip]
const OF_V6: &[(Kind, Option<Kind>)] = &[
    (([1, 0], [0; 4]), Some(([3, 1], [0; 4]))),
    (([1, 1], [0; 4]), Some(([3, 10], [0; 4]))),
    (([1, 2], [0; 4]), Some(([3, 1], [0; 4]))),
    (([1, 3], [0; 4]), Some(([3, 1], [0; 4]))),
    (([1, 4], [0; 4]), Some(([3, 3], [0; 4]))),
    (([1, 5], [0; 4]), None),
    (([2, 0], [0, 0, 0x05, 0xdc]), Some(([3, 4], [0, 0, 0x05, 0xc8]))),
    (([3, 0], [0; 4]), Some(([11, 0], [0; 4]))),
    (([3, 1], [0; 4]), Some(([11, 1], [0; 4]))),
    (([4, 0], [0, 0, 0, 7]), Some(([12, 0], [8, 0, 0, 0]))),
    (([4, 0], [0, 0, 0, 30]), Some(([12, 0], [16, 0, 0, 0]))),
    (([4, 0], [0, 0, 0, 2]), None),
    (([4, 1], [0; 4]), Some(([3, 2], [0; 4]))),
    (([4, 2], [0; 4]), None),
];

#[test]
fn icmp_errors_change_with_what_they_quote() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for crossing in Crossing::all(router) {
            for direction in [Direction::Forward, Direction::Reply] {
                let comes_as = crossing.comes_as(direction);
                let kinds = if comes_as == Version::V4 { OF_V4 } else { OF_V6 };
                // About what went the other way, by a router that is no end of anything. More than 1,260
                // bytes, so that nothing is numbered.
                let [came_ends, went_ends] = crossing.ends(direction);
                let quoted = |version: Version, (source, destination): (SocketAddr, SocketAddr)| {
                    let packet = Packet::new(crossing.protocol, destination, source);
                    let fragment = if version == Version::V4 { 0x4000 } else { 0 };
                    let payload = vec![0x5a; 1300];
                    Packet { hops: 3, class: 0x28, number: 0, fragment, payload, ..packet }.bytes()
                        [ETHERNET..]
                        .to_vec()
                };
                let seen = quoted(comes_as, came_ends);
                let sent = quoted(other(comes_as), went_ends);
                let link = crossing.came(direction);
                for ((kind, rest), expected) in kinds {
                    let from = comes_as.address(OTHER, 77);
                    let error = Packet::error(from, came_ends.1.ip(), *kind, *rest, &seen);
                    let came = Packet {
                        link_source: link.link_source,
                        link_destination: link.link_destination,
                        ..error
                    };
                    let name = format!("{kind:?} {rest:?}");
                    let Some((kind, rest)) = expected else {
                        let dropped = Outcome::Drop(Dropped::NoCounterpart);
                        crossing.refuses(router, &name, direction, &came, dropped);
                        continue;
                    };
                    let (source, destination) = (went_ends.0.ip(), went_ends.1.ip());
                    let error = Packet::error(source, destination, *kind, *rest, &sent);
                    let goes = Packet {
                        protocol: error.protocol,
                        payload: error.payload,
                        ..crossing.goes(direction, &came)
                    };
                    let goes =
                        Packet { source: error.source, destination: error.destination, ..goes };
                    crossing.leaves(router, &name, direction, &came, goes);
                }
            }
        }
    });
}

/// What is of no flow is the box's own, in either version.
#[test]
fn packets_of_no_flow_pass() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for crossing in Crossing::all(router) {
            let mut came = crossing.came(Direction::Reply);
            came.destination.set_port(crossing.appears.port() ^ 1);
            let passed = Outcome::Pass(Passed::NoFlow);
            crossing.refuses(router, "another port", Direction::Reply, &came, passed);
        }
    });
}
