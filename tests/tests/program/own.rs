//! The router's own traffic under rules that could swallow it. The sockets are real.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use portfwd_ebpf::table::Passed;
use portfwd_tests::is_root;
use portfwd_tests::packet::{TCP, UDP};

use crate::router::{Flow, Outcome, Version, WAN, in_both, with_router};

const OWN: Outcome = Outcome::Pass(Passed::Own);

/// Every port, ephemeral ones, and just one of those.
const ASKING: [&str; 3] = ["*:@12.10/tcp", "*:@12.10/udp", "40000-40010:@12.11/tcp+udp"];

/// A packet from a port of host 2 (or another one) to a port of the router, which the rules would
/// send to this host of `LAN`.
fn flow(protocol: u8, from: SocketAddr, to: SocketAddr, backend: u8) -> Flow {
    let version = if to.is_ipv4() { Version::V4 } else { Version::V6 };
    Flow {
        source: from,
        destination: to,
        ..Flow::forward(version, protocol, to.port(), (backend, to.port()))
    }
}

/// Closes a socket, and waits until the kernel lets go of it: a child that another test forks holds
/// it, too, until it runs its program.
fn close(socket: impl Sized, protocol: &str, port: u16) {
    const LISTENING: &str = "0A";
    drop(socket);
    let is_open = || {
        let tables = ["", "6"].map(|family| {
            fs::read_to_string(format!("/proc/thread-self/net/{protocol}{family}")).unwrap()
        });
        tables.concat().lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(1).is_some_and(|local| local.ends_with(&format!(":{port:04X}")))
                && (protocol == "udp" || fields[3] == LISTENING)
        })
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while is_open() {
        assert!(Instant::now() < deadline, "{protocol} {port} stays open");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_a_udp_socket_is_open_for_is_its_own() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&ASKING));
        for version in Version::BOTH {
            for (port, backend) in [(53, 10), (40005, 11)] {
                let (client, here) = (version.at(WAN, 2, 9), version.at(WAN, 1, port));
                let flow = flow(UDP, client, here, backend);
                let came = flow.came();
                router.redirects("before", &flow, &came, &flow.goes(&came));

                let socket = UdpSocket::bind(here).unwrap();
                router.refuses("bound", &flow, &came.bytes(), OWN);
                // The other protocol's port is free.
                let tcp = Flow { protocol: TCP, ..flow.clone() };
                router.redirects("TCP", &tcp, &tcp.came(), &tcp.goes(&tcp.came()));
                socket.connect(client).unwrap();
                router.refuses("connected", &flow, &came.bytes(), OWN);
                let stranger = Flow { source: version.at(WAN, 10, 9), ..flow.clone() };
                let strange = stranger.came();
                router.redirects(
                    "connected to another",
                    &stranger,
                    &strange,
                    &stranger.goes(&strange),
                );
                close(socket, "udp", port);

                let socket = UdpSocket::bind(version.at(WAN, 7, port)).unwrap();
                router.redirects("another address", &flow, &came, &flow.goes(&came));
                close(socket, "udp", port);
                let every = if version == Version::V4 { "0.0.0.0" } else { "::" };
                let socket = UdpSocket::bind((every, port)).unwrap();
                router.refuses("every address", &flow, &came.bytes(), OWN);
                close(socket, "udp", port);
                router.redirects("after", &flow, &came, &flow.goes(&came));
            }
        }
    });
}

#[test]
fn what_a_tcp_listener_is_open_for_is_its_own() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&ASKING));
        for version in Version::BOTH {
            for (port, backend) in [(22, 10), (40000, 11), (40010, 11)] {
                let (client, here) = (version.at(WAN, 2, 5000), version.at(WAN, 1, port));
                let flow = flow(TCP, client, here, backend);
                let came = flow.came();
                router.redirects("before", &flow, &came, &flow.goes(&came));
                let listener = TcpListener::bind(here).unwrap();
                router.refuses("listening", &flow, &came.bytes(), OWN);
                let udp = Flow { protocol: UDP, ..flow.clone() };
                router.redirects("UDP", &udp, &udp.came(), &udp.goes(&udp.came()));
                close(listener, "tcp", port);
                router.redirects("after", &flow, &came, &flow.goes(&came));
            }
        }
    });
}

/// An outbound connection of the router has no listener, just itself; it ends at an address of the
/// same router here, which the lookup does not know.
#[test]
fn an_established_connection_is_the_routers_own() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&ASKING));
        for version in Version::BOTH {
            let listener = TcpListener::bind(version.at(WAN, 7, 443)).unwrap();
            let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            drop(listener);
            // It chose the far address for its own end; take it from the side of the far end.
            let (here, there) = (connection.local_addr().unwrap(), connection.peer_addr().unwrap());
            // The rule listens on host 1; give it the address that the connection has.
            assert_eq!(there.ip(), version.address(WAN, 7));
            router.load_at(&[1, 7], &in_both(&ASKING));
            let backend = if (40000..=40010).contains(&here.port()) { 11 } else { 10 };
            let own = flow(TCP, there, here, backend);
            router.refuses("established", &own, &own.came().bytes(), OWN);
            // Another client to the same port has no part in it.
            let stranger = flow(TCP, version.at(WAN, 2, 443), here, backend);
            let came = stranger.came();
            router.redirects("a stranger", &stranger, &came, &stranger.goes(&came));
            // The end that closes first waits in TIME-WAIT, and that is the router's as well.
            drop(connection);
            drop(accepted);
            router.refuses("closed", &own, &own.came().bytes(), OWN);
        }
    });
}

#[test]
fn a_rule_for_one_port_or_for_low_ports_does_not_ask() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["40000:@12.10/tcp+udp", "1000-2000:@12.11/tcp+udp"]));
        for version in Version::BOTH {
            for (port, backend) in [(40000, 10), (1500, 11)] {
                let (client, here) = (version.at(WAN, 2, 5000), version.at(WAN, 1, port));
                let _listener = TcpListener::bind(here).unwrap();
                let _socket = UdpSocket::bind(here).unwrap();
                for protocol in [TCP, UDP] {
                    let flow = flow(protocol, client, here, backend);
                    let came = flow.came();
                    router.redirects("not asked", &flow, &came, &flow.goes(&came));
                }
            }
        }
    });
}

#[test]
fn a_range_asks_on_its_ephemeral_ports_only() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        for (rule, port, asks) in [
            ("32000-32767:@12.10/udp", 32767, false),
            ("32000-32768:@12.10/udp", 32767, false),
            ("32000-32768:@12.10/udp", 32768, true),
            ("60999-61500:@12.10/udp", 60999, true),
            ("60999-61500:@12.10/udp", 61000, false),
            ("61000-61500:@12.10/udp", 61000, false),
            ("1024-65535:@12.10/udp", 1024, false),
            ("1024-65535:@12.10/udp", 45000, true),
            ("1024-65535:@12.10/udp", 65535, false),
            ("*:@12.10/udp", 1024, true),
            ("*:@12.10/any", 65535, true),
        ] {
            router.load(&in_both(&[rule]));
            for version in Version::BOTH {
                let (client, here) = (version.at(WAN, 2, 5000), version.at(WAN, 1, port));
                let socket = UdpSocket::bind(here).unwrap();
                let flow = flow(UDP, client, here, 10);
                let came = flow.came();
                if asks {
                    router.refuses(rule, &flow, &came.bytes(), OWN);
                } else {
                    router.redirects(rule, &flow, &came, &flow.goes(&came));
                }
                close(socket, "udp", port);
            }
        }
    });
}
