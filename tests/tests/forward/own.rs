//! The box itself at one end: as the backend, and as a client of its own external address.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use portfwd_tests::netns::Namespace;
use portfwd_tests::peers::{self, Answer, Server};
use portfwd_tests::rig::{self, Rig};
use portfwd_tests::wire::Direction;
use portfwd_tests::{attach, is_root};
use tokio::net::TcpSocket;

use crate::running::*;

/// External addresses of the router, with those of its LAN.
fn own() -> [(IpAddr, IpAddr); 2] {
    let ([a, b], [c, d]) = (rig::WAN.both(), rig::LAN.both());
    [(a, c), (b, d)]
}

/// Rules from one port to another of the router's, in both versions of IP.
fn to_the_box(name: &str, listen: u16, to: u16) -> Vec<Rule> {
    let rule = |version, (wan, lan)| Rule {
        address: Some(wan),
        ..Rule::new(&format!("{name}{version}"), "tcp+udp", listen..=listen, at(lan, to))
    };
    own().into_iter().zip([4, 6]).map(|(way, version)| rule(version, way)).collect()
}

fn services(namespace: &Namespace, address: SocketAddr, answer: Answer) -> (Server, Server) {
    (
        Server::tcp(namespace, address, answer).unwrap(),
        Server::udp(namespace, address, answer).unwrap(),
    )
}

/// What the rule counted is what the client sent and got, and all of it went through the stack.
fn is_exact(running: &Running, rule: &Rule) {
    poll(|| {
        let stats = Stats(running.portfwd.stats().unwrap());
        let counts = stats.counts(&rule.name);
        let of = |direction, end: fn(&portfwd_tests::wire::Key) -> SocketAddr| {
            running.client.look(|tally| {
                tally
                    .count(|key| key.direction == direction && rule.listens(key.protocol, end(key)))
            })
        };
        let forward = of(Direction::Sent, |key| key.destination);
        let reply = of(Direction::Received, |key| key.source);
        if counts != (Counts { forward, reply }) || forward.packets == 0 {
            return Err(format!("{counts:?} but {forward:?} and {reply:?}: {}", stats.0));
        }
        assert_eq!(stats.to_stack(&rule.name, "local"), forward.packets + reply.packets);
        assert_eq!(total(&stats.rule(&rule.name)["dropped"]), 0);
        Ok(())
    });
}

#[test]
fn the_box_itself_can_be_the_backend() {
    if !is_root() {
        return;
    }
    let rules = [to_the_box("echo", 9000, 27015), to_the_box("peer", 9001, 27016)].concat();
    let interfaces = "external = [\"wan0\"]\ninternal = [\"lan0\"]";
    let running = Running::with(Rig::new().unwrap(), rules, interfaces, &[]);
    let Rig { client, router, server, .. } = &running.rig;
    for (wan, lan) in own() {
        let _echo = services(router, at(lan, 27015), Answer::Echo);
        let _peer = services(router, at(lan, 27016), Answer::Peer);
        echo_tcp(client, at(wan, 9000), 1_000_000);
        for _ in 0..20 {
            echo_udp(client, at(wan, 9000));
            is_seen_as_itself(client, at(wan, 9001));
        }
        // Nobody is there, and who asks hears it from whom he asked.
        drop((_echo, _peer));
        let error = peers::connect(client, at(wan, 9000)).unwrap_err();
        assert!(format!("{error:#}").contains("refused"), "{error:#}");
        let socket = peers::udp_client(client, at(wan, 9000)).unwrap();
        let error = peers::exchange(&socket, b"anybody?").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    }
    // The ICMP errors are counted as replies too, but are of no port.
    running.rules.iter().filter(|rule| rule.name.starts_with("peer")).for_each(|rule| {
        is_exact(&running, rule);
    });
    // From inside by the external address, and by the service's own.
    for (wan, lan) in own() {
        let _peer = services(router, at(lan, 27016), Answer::Peer);
        is_seen_as_itself(server, at(wan, 9001));
        is_seen_as_itself(server, at(lan, 27016));
        is_seen_as_itself(router, at(lan, 27016));
    }
    let stats = Stats(running.portfwd.stats().unwrap());
    assert_eq!(total(&stats.0["verdicts"]["dropped"]), 0, "{}", stats.0);
    running.finish();
}

/// What becomes of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Closed,
    Reset,
    Refused,
}

/// Connects from a port of the client's, has something echoed, and ends that so. `Refused` expects
/// nobody there.
fn from_port(client: &Namespace, port: u16, server: SocketAddr, end: End) {
    let connect = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (socket, any) = match server.ip() {
                IpAddr::V4(_) => (TcpSocket::new_v4(), IpAddr::from([0; 4])),
                IpAddr::V6(_) => (TcpSocket::new_v6(), IpAddr::from([0; 16])),
            };
            let socket = socket.unwrap();
            socket.set_reuseaddr(true).unwrap();
            if end == End::Reset {
                socket.set_zero_linger().unwrap();
            }
            socket.bind((any, port).into()).unwrap();
            let connecting = tokio::time::timeout(Duration::from_secs(5), socket.connect(server));
            connecting
                .await
                .map_err(|_| ErrorKind::TimedOut)?
                .map_err(|error| error.kind())?
                .into_std()
                .map_err(|error| error.kind())
        })
    };
    // The port may be held for a moment by the connection before.
    let deadline = Instant::now() + Duration::from_secs(5);
    let connected = loop {
        match client.enter(connect) {
            Err(ErrorKind::AddrNotAvailable) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(50));
            }
            connected => break connected,
        }
    };
    if end == End::Refused {
        assert_eq!(connected.map(drop), Err(ErrorKind::ConnectionRefused), "{server}");
        return;
    }
    let mut stream = connected.unwrap_or_else(|error| panic!("{server} from {port}: {error}"));
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("{server} from {port}: {error}"));
    assert_eq!(&answer, b"hello");
    if end == End::Closed {
        // The other end has closed, too.
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut answer).unwrap(), 0);
    }
}

#[test]
fn one_port_of_a_client_uses_the_rule_and_the_service_in_turn() {
    if !is_root() {
        return;
    }
    let rule = |(wan, _)| Rule {
        address: Some(wan),
        ..Rule::new(&format!("to {wan}"), "tcp", 9000..=9000, at(wan, 27015))
    };
    let rules = own().map(rule).to_vec();
    let interfaces = "external = [\"wan0\"]\ninternal = [\"lan0\"]";
    let running = Running::with(Rig::new().unwrap(), rules, interfaces, &[]);
    let Rig { client, router, .. } = &running.rig;
    for (wan, _) in own() {
        let (by_rule, direct) = (at(wan, 9000), at(wan, 27015));
        let echo = services(router, direct, Answer::Echo);
        for (port, end) in [(5000, End::Closed), (5001, End::Reset)] {
            from_port(client, port, by_rule, end);
            from_port(client, port, direct, End::Reset);
        }
        drop(echo);
        from_port(client, 5002, by_rule, End::Refused);
        let _echo = services(router, direct, Answer::Echo);
        from_port(client, 5002, direct, End::Reset);
        for port in [5001, 5002] {
            from_port(client, port, by_rule, End::Reset);
            from_port(client, port, by_rule, End::Reset);
            from_port(client, port, direct, End::Reset);
        }
    }
    running.finish();
}

#[test]
fn clients_on_the_box_reach_backends_by_the_external_address() {
    if !is_root() {
        return;
    }
    let rules = [for_both("echo", "tcp+udp", 9000..=9000, 27015), to_the_box("own", 9001, 27016)];
    let running = Running::start(Rig::new().unwrap(), rules.concat());
    let Rig { client, router, server, .. } = &running.rig;
    // With native XDP what that needs is loaded last.
    let deadline = Instant::now() + Duration::from_secs(60);
    while !running.portfwd.stderr().contains("lo: clients on this box, TC") {
        assert!(Instant::now() < deadline, "{}", running.portfwd.stderr());
        thread::sleep(Duration::from_millis(50));
    }
    for ((wan, backend), (_, lan)) in both().into_iter().zip(own()) {
        let echo = services(server, at(backend, 27015), Answer::Echo);
        let _own = services(router, at(lan, 27016), Answer::Echo);
        for port in [9000, 9001] {
            echo_tcp(router, at(wan, port), 1_000_000);
            for _ in 0..20 {
                echo_udp(router, at(wan, port));
            }
        }
        // Answers come back by the box's address inside.
        assert!(echo.0.seen().iter().chain(&echo.1.seen()).all(|address| *address == lan));
        echo_tcp(client, at(wan, 9000), 1000);
        drop(echo);
        let error = peers::connect(router, at(wan, 9000)).unwrap_err();
        assert!(format!("{error:#}").contains("refused"), "{error:#}");
        let socket = peers::udp_client(router, at(wan, 9000)).unwrap();
        let error = peers::exchange(&socket, b"anybody?").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        // What no rule claims stays the box's.
        let error = peers::connect(router, at(wan, 9002)).unwrap_err();
        assert!(format!("{error:#}").contains("refused"), "{error:#}");
    }
    // Each packet that the backend saw was counted, and no other.
    for rule in running.rules.iter().filter(|rule| rule.name.starts_with("echo")) {
        poll(|| {
            let stats = Stats(running.portfwd.stats().unwrap());
            let counts = stats.counts(&rule.name);
            let of = |direction, end: fn(&portfwd_tests::wire::Key) -> SocketAddr| {
                running.servers[0].look(|tally| {
                    tally.count(|key| {
                        key.direction == direction && rule.leads_to(key.protocol, end(key))
                    })
                })
            };
            let forward = of(Direction::Received, |key| key.destination);
            if counts.forward != forward || forward.packets == 0 {
                return Err(format!("{counts:?} but {forward:?}: {}", stats.0));
            }
            Ok(())
        });
    }
    let stats = Stats(running.portfwd.stats().unwrap());
    assert_eq!(total(&stats.0["verdicts"]["dropped"]), 0, "{}", stats.0);
    let interfaces = stats.0["interfaces"].as_array().unwrap();
    assert!(interfaces.iter().filter(|it| it["attach"] == *attach()).count() >= 2);
    running.finish();
}
