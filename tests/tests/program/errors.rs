//! ICMP errors about packets of a rule, both ways: what they quote is what its sender sent.

use std::net::{IpAddr, SocketAddr};

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Direction, Dropped, Passed, ToStack};
use portfwd_tests::is_root;

use crate::router::{
    DISTANT, Flow, LAN, NARROW_INSIDE, OTHER, Outcome, Router, Version, WAN, WEB, comes, in_both,
    link_address, with_router,
};
use portfwd_tests::packet::{Packet, TCP, UDP};

/// An error about packets of a rule. As a [`Flow`] its ends are the error's; no port counts.
struct Case {
    error: Flow,
    /// Of the packets that it is about.
    protocol: u8,
    client: SocketAddr,
    external: SocketAddr,
    backend: SocketAddr,
}

impl Case {
    /// Both ways, families and protocols, of [`WEB`]. In each the sender of the error is a router that
    /// is no end of anything.
    fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for version in Version::BOTH {
            for protocol in [TCP, UDP] {
                for flow in Flow::both(version, protocol, 8080, 80) {
                    cases.push(Self::new(flow, version.at(OTHER, 77, 0)));
                }
            }
        }
        cases
    }

    /// `from` sends errors in the direction of `flow`, about packets of the other.
    fn new(flow: Flow, from: SocketAddr) -> Self {
        let Flow { protocol, direction, source, destination, end, .. } = flow;
        let (client, external, backend) = match direction {
            Direction::Forward => (source, destination, end),
            Direction::Reply => (destination, end, source),
        };
        let error = Flow { source: from, ..flow };
        Self { error, protocol, client, external, backend }
    }

    fn kinds(&self) -> &'static [u8] {
        if self.error.version == Version::V4 { &[3, 4, 11, 12] } else { &[1, 2, 3, 4] }
    }

    /// What the error is about: as its sender saw it, and as the sender of that knows it.
    fn quoted(&self, change: impl Fn(&mut Packet)) -> [Vec<u8>; 2] {
        let ends = match self.error.direction {
            Direction::Forward => [(self.external, self.client), (self.backend, self.client)],
            Direction::Reply => [(self.client, self.backend), (self.client, self.external)],
        };
        ends.map(|(source, destination)| {
            let mut packet = Packet::new(self.protocol, source, destination);
            packet.hops = 3;
            change(&mut packet);
            packet.bytes()[14..].to_vec()
        })
    }

    /// The error, as it comes and as it goes.
    fn packets(&self, kind: [u8; 2], rest: [u8; 4], quoted: [&[u8]; 2]) -> [Packet; 2] {
        let Flow { source, destination, .. } = self.error;
        let of = |source: IpAddr, destination: IpAddr, quoted| {
            let link = self.error.came();
            Packet {
                link_source: link.link_source,
                link_destination: link.link_destination,
                ..Packet::error(source, destination, kind, rest, quoted)
            }
        };
        let came = of(source.ip(), destination.ip(), quoted[0]);
        let (source, destination) = match self.error.direction {
            Direction::Forward => (source.ip(), self.backend.ip()),
            Direction::Reply => (self.external.ip(), destination.ip()),
        };
        let goes = of(source, destination, quoted[1]);
        let (link, host) = self.error.egress;
        let goes = Packet {
            hops: came.hops - 1,
            link_source: link_address(link, 1),
            link_destination: link_address(link, host),
            ..goes
        };
        [came, goes]
    }

    fn redirects(&self, router: &mut Router, name: &str, [came, goes]: &[Packet; 2]) {
        router.redirects(name, &self.error, came, goes);
    }

    fn refuses(&self, router: &mut Router, name: &str, frame: &[u8], outcome: Outcome) {
        router.refuses(name, &self.error, frame, outcome);
    }

    /// One that is translated, to be spoilt.
    fn sample(&self) -> [Packet; 2] {
        let [seen, sent] = self.quoted(|_| {});
        self.packets([self.kinds()[0], 1], [0; 4], [&seen, &sent])
    }
}

type Applies = fn(&Packet) -> bool;
type Change = fn(&mut Packet);

/// What the quoted packet may be like.
#[rustfmt::skip]
const QUOTED: &[(&str, Applies, Change)] = &[
    ("as it is", |_| true, |_| {}),
    ("long", |_| true, |packet| packet.payload = vec![0x5a; 1200]),
    ("odd", |_| true, |packet| packet.payload = vec![0x5a; 33]),
    ("empty", |_| true, |packet| packet.payload.clear()),
    ("expired", |_| true, |packet| packet.hops = 0),
    ("no checksum", |packet| packet.is_v4() && packet.protocol == UDP, |packet| packet.no_checksum = true),
    ("4 bytes of options", Packet::is_v4, |packet| packet.options = vec![1; 4]),
    ("40 bytes of options", Packet::is_v4, |packet| packet.options = vec![1; 40]),
    ("first fragment", Packet::is_v4, |packet| packet.fragment = 0x2000),
    ("hop-by-hop options", |packet| !packet.is_v4(), |packet| packet.extensions = vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0])]),
    ("first fragment", |packet| !packet.is_v4(), |packet| packet.extensions = vec![(44, vec![0, 0, 0, 1, 9, 9, 9, 9])]),
    ("options", |packet| !packet.is_v4(), |packet| packet.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0]); 2]),
];

#[test]
fn what_they_quote_is_what_was_sent() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        let mut count = 0;
        for case in Case::all() {
            let plain = Packet::new(case.protocol, case.client, case.external);
            for (name, applies, change) in QUOTED {
                if !applies(&plain) {
                    continue;
                }
                let [seen, sent] = case.quoted(change);
                for kind in case.kinds() {
                    let rest = [0, 0, 5, 0xdc];
                    case.redirects(router, name, &case.packets([*kind, 1], rest, [&seen, &sent]));
                    count += 1;
                }
            }
        }
        assert_eq!(router.translated(), count);
    });
}

#[test]
fn cut_short_they_are_translated_right_or_not_at_all() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for case in Case::all() {
            let [seen, sent] = case.quoted(|_| {});
            let head = if case.error.version == Version::V4 { 20 } else { 40 };
            let kind = [case.kinds()[0], 1];
            for cut in 0..=seen.len() {
                // What is quoted ends here; half of a checksum cannot be repaired.
                if case.protocol == TCP && cut == head + 17 {
                    continue;
                }
                let packets = case.packets(kind, [0; 4], [&seen[..cut], &sent[..cut]]);
                let name = format!("{cut} bytes");
                // Padding is not quoted, whatever it is.
                let padded =
                    packets.clone().map(|packet| Packet { padding: vec![0xee; 9], ..packet });
                for packets in [packets, padded] {
                    if cut < head + 8 {
                        let outcome = Outcome::Pass(Passed::Malformed);
                        case.refuses(router, &name, &packets[0].bytes(), outcome);
                    } else {
                        case.redirects(router, &name, &packets);
                    }
                }
            }
            // The frame ends before the packet does.
            let [whole, _] = case.packets(kind, [0; 4], [&seen, &sent]);
            let whole = whole.bytes();
            for length in (14..whole.len()).filter(|length| comes(&whole[..*length])) {
                let outcome = Outcome::Pass(Passed::Malformed);
                case.refuses(router, "cut", &whole[..length], outcome);
            }
        }
    });
}

#[test]
fn with_headers_of_every_length() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for case in Case::all() {
            for units in 0..=10 {
                let mut packets = case.sample();
                for packet in &mut packets {
                    packet.options = vec![1; units * 4];
                    packet.class = 0xc0;
                    if !packet.is_v4() && units > 0 {
                        let mut options = vec![0, units as u8 - 1, 1, units as u8 * 8 - 4];
                        options.resize(units * 8, 0);
                        packet.extensions = vec![(60, options)];
                    } else if !packet.is_v4() {
                        packet.options.clear();
                    }
                }
                case.redirects(router, &format!("{units} units of options"), &packets);
            }
        }
    });
}

/// The backend itself, the client itself, and others.
#[test]
fn whoever_sends_them() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for version in Version::BOTH {
            for protocol in [TCP, UDP] {
                let [forward, reply] = Flow::both(version, protocol, 8080, 80);
                for (flow, from) in [
                    (forward.clone(), version.at(WAN, 2, 0)),
                    (forward, version.at(WAN, 10, 0)),
                    (reply.clone(), version.at(LAN, 10, 0)),
                    (reply, version.at(LAN, 11, 0)),
                ] {
                    for role in [flow.role, Role::Both] {
                        let case = Case::new(Flow { role, ..flow.clone() }, from);
                        case.redirects(router, "from someone", &case.sample());
                    }
                }
            }
        }
    });
}

#[test]
fn those_about_other_packets_are_left_alone() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for case in Case::all() {
            let unclaimed = Outcome::Pass(Passed::Icmp);
            let other = |change: fn(&mut Case)| {
                let mut other = Case::new(case.error.clone(), case.error.source);
                (other.client, other.external, other.backend) =
                    (case.client, case.external, case.backend);
                change(&mut other);
                let [seen, sent] = other.quoted(|_| {});
                case.packets([case.kinds()[0], 1], [0; 4], [&seen, &sent])[0].bytes()
            };
            let port = other(|it| {
                it.external.set_port(8081);
                it.backend.set_port(81);
            });
            case.refuses(router, "another port", &port, unclaimed);
            let host = other(|it| {
                it.external.set_ip(it.error.version.address(WAN, 99));
                it.backend.set_ip(it.error.version.address(LAN, 99));
            });
            case.refuses(router, "another host", &host, unclaimed);
            if case.error.direction == Direction::Reply {
                let client = other(|it| it.client.set_ip(it.error.version.address(WAN, 3)));
                case.refuses(router, "another client", &client, unclaimed);
            }
            let protocol = other(|it| it.protocol = 132);
            case.refuses(router, "another protocol", &protocol, unclaimed);

            let [seen, sent] = case.quoted(|_| {});
            for kind in 0..=255 {
                if case.kinds().contains(&kind) {
                    continue;
                }
                let [packet, _] = case.packets([kind, 0], [0; 4], [&seen, &sent]);
                case.refuses(router, &format!("type {kind}"), &packet.bytes(), unclaimed);
            }
            // Of later fragments nobody knows the ports.
            let [seen, sent] = case.quoted(|packet| {
                packet.fragment = 185;
                packet.extensions = vec![];
                if !packet.is_v4() {
                    packet.extensions = vec![(44, vec![0, 0, 5, 0xc8, 9, 9, 9, 9])];
                }
            });
            let [packet, _] = case.packets([case.kinds()[0], 0], [0; 4], [&seen, &sent]);
            case.refuses(router, "about a later fragment", &packet.bytes(), unclaimed);
        }
    });
}

#[test]
fn errors_that_are_fragments_or_end_here() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for case in Case::all() {
            let [came, _] = case.sample();
            let mut fragment = Packet { fragment: 0x2000, ..came.clone() };
            if !fragment.is_v4() {
                fragment.extensions = vec![(44, vec![0, 0, 0, 1, 9, 9, 9, 9])];
            }
            case.refuses(router, "first", &fragment.bytes(), Outcome::Pass(Passed::Icmp));
            let last = Packet { hops: 1, ..came };
            let outcome = match case.error.direction {
                Direction::Forward => Outcome::Drop(Dropped::TtlExpired),
                Direction::Reply => Outcome::Pass(Passed::Ttl),
            };
            case.refuses(router, "last hop", &last.bytes(), outcome);
        }
    });
}

#[test]
fn they_go_where_routes_lead() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&[
            "8080:@12.99:80/tcp+udp",
            &format!("8081:@{OTHER}.10:80/tcp+udp"),
            &format!("8082:@{NARROW_INSIDE}.10:80/tcp+udp"),
        ]));
        for version in Version::BOTH {
            let from = version.at(WAN, 77, 0);
            // The backend is not resolved.
            let flow = Flow::forward(version, TCP, 8080, (99, 80));
            let case = Case::new(flow, from);
            let [came, goes] = case.sample();
            let outcome = Outcome::Stack(ToStack::NoNeighbour);
            let goes = Packet {
                hops: came.hops,
                link_source: came.link_source,
                link_destination: came.link_destination,
                ..goes
            };
            router.translates("unresolved", &case.error, &came, outcome, &goes);
            // It is nowhere inside.
            let flow = Flow {
                end: version.at(OTHER, 10, 80),
                ..Flow::forward(version, UDP, 8081, (10, 80))
            };
            let case = Case::new(flow, from);
            let outcome = Outcome::Drop(Dropped::NotInternal);
            case.refuses(router, "outside", &case.sample()[0].bytes(), outcome);
            // An error that is too big gets no answer.
            let end = version.at(NARROW_INSIDE, 10, 80);
            let case = Case::new(Flow { end, ..Flow::forward(version, UDP, 8082, (10, 80)) }, from);
            let [seen, sent] = case.quoted(|packet| packet.payload = vec![1; 1300]);
            let [came, _] = case.packets([case.kinds()[0], 0], [0; 4], [&seen, &sent]);
            case.refuses(router, "too big", &came.bytes(), Outcome::Drop(Dropped::TooBig));
            // A client behind a gateway, and one that is inside.
            let reply = Flow::reply(version, UDP, (99, 80), 8080);
            let client = version.at(DISTANT, 77, 5000);
            let case =
                Case::new(Flow { destination: client, ..reply.clone() }, version.at(LAN, 11, 0));
            case.redirects(router, "behind a gateway", &case.sample());
            let client = version.at(LAN, 12, 5000);
            let case = Case::new(Flow { destination: client, ..reply }, version.at(LAN, 11, 0));
            let outcome = Outcome::Pass(Passed::Inside);
            case.refuses(router, "inside", &case.sample()[0].bytes(), outcome);
        }
    });
}

/// A client that came by the second address is told by that one.
#[test]
fn they_come_from_the_address_that_the_client_used() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load_at(&[1, 7], &in_both(&WEB));
        for version in Version::BOTH {
            for host in [7, 1] {
                let flow = Flow::forward(version, UDP, 8080, (10, 80));
                let flow = Flow { destination: version.at(WAN, host, 8080), ..flow };
                let came = flow.came();
                router.redirects("asks", &flow, &came, &flow.goes(&came));
                let end = version.at(WAN, host, 8080);
                let reply = Flow { end, ..Flow::reply(version, UDP, (10, 80), 8080) };
                let case = Case::new(reply, version.at(LAN, 11, 0));
                case.redirects(router, "is told", &case.sample());
            }
        }
    });
}

/// The router's own connections, from ports that a rule has too.
#[test]
fn the_routers_own_are_left_alone() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["*:@12.10/udp"]));
        for version in Version::BOTH {
            let flow = Flow::forward(version, UDP, 40000, (10, 40000));
            let case = Case::new(flow, version.at(WAN, 10, 0));
            case.redirects(router, "free", &case.sample());
            let socket = std::net::UdpSocket::bind(version.at(WAN, 1, 40000)).unwrap();
            let outcome = Outcome::Pass(Passed::Own);
            case.refuses(router, "the router's", &case.sample()[0].bytes(), outcome);
            drop(socket);
        }
    });
}
