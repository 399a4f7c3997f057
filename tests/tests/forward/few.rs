//! What is not a whole TCP or UDP packet: path MTU discovery, expired hops, fragments, pings.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

use portfwd_tests::is_root;
use portfwd_tests::netns::{self, Namespace};
use portfwd_tests::peers::{self, Answer, Server};
use portfwd_tests::rig::{self, Options, Rig};
use portfwd_tests::wire::Direction;

use crate::running::*;

/// Moves bytes both ways over one connection, more than any window; the server echoes.
fn moves_bytes(running: &Running, server: SocketAddr) {
    const SIZE: usize = 1 << 20;
    let mut stream = peers::connect(&running.rig.client, server).unwrap();
    // What does not get through is not waited for.
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    let question: Vec<u8> = (0..SIZE).map(|i| (i * 31) as u8).collect();
    let mut answer = vec![0; SIZE];
    std::thread::scope(|scope| {
        let mut writer = &stream;
        let question = &question;
        scope.spawn(move || writer.write_all(question).unwrap());
        (&stream).read_exact(&mut answer).unwrap_or_else(|error| panic!("{server}: {error}"));
    });
    assert!(answer == question, "{server}");
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

/// One of the counts of all rules with these names, for IPv4 and IPv6.
fn each(running: &Running, count: impl Fn(&serde_json::Value) -> u64) -> Vec<u64> {
    let stats = Stats(running.portfwd.stats().unwrap());
    running.rules.iter().map(|rule| count(stats.rule(&rule.name))).collect()
}

/// A client's path to the server is narrower than the interfaces at both of its ends say, first at
/// the router itself: portfwd tells the client.
#[test]
fn a_transfer_finds_the_mtu_of_the_routers_own_way() {
    if !is_root() {
        return;
    }
    let rules = for_both("web", "tcp", 8080..=8080, 80);
    for rules in [rules.clone(), masqueraded(rules)] {
        finds_the_mtu_of_the_routers_own_way(rules);
    }
}

fn finds_the_mtu_of_the_routers_own_way(rules: Vec<Rule>) {
    let running = Running::start(Rig::new().unwrap(), rules);
    let Rig { router, server, .. } = &running.rig;
    let [v4, v6] = rig::SERVER.both();
    router.ip(&format!("route add {v4}/32 dev lan0 mtu lock 1300")).unwrap();
    router.ip(&format!("route add {v6}/128 dev lan0 mtu lock 1300")).unwrap();
    for (wan, backend) in both() {
        let _echo = Server::tcp(server, at(backend, 80), Answer::Echo).unwrap();
        moves_bytes(&running, at(wan, 8080));
    }
    for told in each(&running, |rule| rule["answered"].as_u64().unwrap()) {
        assert!((1..100).contains(&told), "{told}");
    }
    for dropped in each(&running, |rule| rule["dropped"]["too_big"].as_u64().unwrap()) {
        assert!(dropped > 0);
    }
    running.finish();
}

/// At a router behind the router: what it says to the client is about the router's address.
#[test]
fn a_transfer_finds_the_mtu_of_a_way_inside() {
    if !is_root() {
        return;
    }
    let [v4, v6] = rig::DEEP.both();
    let rule = |name, backend| Rule::new(name, "tcp", 8080..=8080, at(backend, 80));
    let rules =
        vec![rule("web4", v4), Rule { address: Some(rig::WAN.v6.into()), ..rule("web6", v6) }];
    for rules in [rules.clone(), masqueraded(rules)] {
        finds_the_mtu_of_a_way_inside(rules);
    }
}

fn finds_the_mtu_of_a_way_inside(rules: Vec<Rule>) {
    let rig = Rig::with(Options { deep: true, ..Options::default() }).unwrap();
    let [v4, v6] = rig::DEEP.both();
    let server = &rig.server;
    server.ip(&format!("route add {v4}/32 dev deep0 mtu lock 1300")).unwrap();
    server.ip(&format!("route add {v6}/128 dev deep0 mtu lock 1300")).unwrap();
    let running = Running::start(rig, rules);
    let deep = running.rig.deep.as_ref().unwrap();
    for (wan, backend) in rig::WAN.both().into_iter().zip(rig::DEEP.both()) {
        let _echo = Server::tcp(deep, at(backend, 80), Answer::Echo).unwrap();
        moves_bytes(&running, at(wan, 8080));
    }
    let errors = running.client.look(|tally| {
        tally.count(|key| {
            matches!(key.protocol, 1 | 58) && rig::WAN.both().contains(&key.source.ip())
        })
    });
    assert!(errors.packets >= 2, "{errors}");
    running.finish();
}

/// At a router in front of the client: what it says to the router's address is for the server.
#[test]
fn a_transfer_finds_the_mtu_of_a_way_outside() {
    if !is_root() {
        return;
    }
    let rules = for_both("web", "tcp", 8080..=8080, 80);
    finds_the_mtu_of_a_way_outside(rules.clone(), rig::GATEWAY.both().map(IpAddr::from));
    // Whoever says it, the server sees the router.
    finds_the_mtu_of_a_way_outside(masqueraded(rules), rig::LAN.both().map(IpAddr::from));
}

fn finds_the_mtu_of_a_way_outside(rules: Vec<Rule>, from: [IpAddr; 2]) {
    let rig = Rig::with(Options { gateway: true, ..Options::default() }).unwrap();
    let gateway = rig.gateway.as_ref().unwrap();
    let [v4, v6] = rig::DISTANT_CLIENT.both();
    gateway.ip(&format!("route add {v4}/32 dev lan0 mtu lock 1300")).unwrap();
    gateway.ip(&format!("route add {v6}/128 dev lan0 mtu lock 1300")).unwrap();
    let running = Running::start(rig, rules);
    for (wan, backend) in both() {
        let _echo = Server::tcp(&running.rig.server, at(backend, 80), Answer::Echo).unwrap();
        moves_bytes(&running, at(wan, 8080));
    }
    let errors = running.servers[0].look(|tally| {
        tally.count(|key| matches!(key.protocol, 1 | 58) && from.contains(&key.source.ip()))
    });
    assert!(errors.packets >= 2, "{errors}");
    running.finish();
}

/// A UDP socket that is told of every ICMP error, and sends with so many hops.
fn probe(running: &Running, server: SocketAddr, hops: u32) -> UdpSocket {
    let socket = peers::udp_client(&running.rig.client, server).unwrap();
    let (level, ttl, errors) = match server {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TTL, libc::IP_RECVERR),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, libc::IPV6_RECVERR),
    };
    for (option, value) in [(ttl, hops), (errors, 1)] {
        let length = size_of_val(&value) as libc::socklen_t;
        // SAFETY: the kernel reads `length` bytes of the value.
        let status = unsafe {
            libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length)
        };
        assert_eq!(status, 0, "{}", io::Error::last_os_error());
    }
    socket
}

/// As traceroute does: each hop says who it is, and the client's kernel knows which packet it means.
#[test]
fn a_client_is_told_where_its_packets_expire() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options { deep: true, ..Options::default() }).unwrap();
    let [v4, v6] = rig::DEEP.both();
    let rule = |name, backend| Rule::new(name, "udp", 9000..=9000, at(backend, 9));
    let rules =
        vec![rule("game4", v4), Rule { address: Some(rig::WAN.v6.into()), ..rule("game6", v6) }];
    let running = Running::start(rig, rules);
    let deep = running.rig.deep.as_ref().unwrap();
    for (wan, backend) in rig::WAN.both().into_iter().zip(rig::DEEP.both()) {
        let server = at(wan, 9000);
        // The router, and the router behind it.
        for hops in [1, 2] {
            let socket = probe(&running, server, hops);
            let error = peers::exchange(&socket, b"where?").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{server} {hops}: {error}");
        }
        // Nobody listens yet.
        let error = peers::exchange(&probe(&running, server, 3), b"there?").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{server}: {error}");
        let _echo = Server::udp(deep, at(backend, 9), Answer::Echo).unwrap();
        assert_eq!(peers::exchange(&probe(&running, server, 3), b"here").unwrap(), b"here");
    }
    assert_eq!(each(&running, |rule| rule["answered"].as_u64().unwrap()), [1, 1]);
    assert_eq!(each(&running, |rule| rule["dropped"]["ttl_expired"].as_u64().unwrap()), [1, 1]);
    running.finish();
}

/// Also where the kernel makes a frame longer for a program that is not the driver's.
#[test]
fn generic_programs_tell_too() {
    if !is_root() {
        return;
    }
    let interfaces = "external = [\"wan0\"]\nattach = \"generic\"";
    let rules = for_both("game", "udp", 9000..=9000, 9);
    let running = Running::with(Rig::new().unwrap(), rules, interfaces, &[]);
    for (wan, backend) in both() {
        let _echo = Server::udp(&running.rig.server, at(backend, 9), Answer::Echo).unwrap();
        let error = peers::exchange(&probe(&running, at(wan, 9000), 1), &[7; 1000]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{wan}: {error}");
        exchanges_large(&running, at(wan, 9000));
    }
    assert_eq!(each(&running, |rule| rule["answered"].as_u64().unwrap()), [1, 1]);
    running.finish();
}

/// A datagram of many fragments, and its echo.
fn exchanges_large(running: &Running, server: SocketAddr) {
    let socket = peers::udp_client(&running.rig.client, server).unwrap();
    let question: Vec<u8> = (0..60_000).map(|i| (i * 31 + i / 256) as u8).collect();
    for _ in 0..5 {
        let answer = peers::exchange(&socket, &question);
        let answer = answer.unwrap_or_else(|error| panic!("{server}: {error}"));
        assert!(answer == question, "{server}");
    }
}

#[test]
fn datagrams_of_60_kilobytes_arrive_whole() {
    if !is_root() {
        return;
    }
    let rules = for_both("game", "udp", 9000..=9000, 27015);
    for rules in [rules.clone(), masqueraded(rules)] {
        carries_datagrams_of_60_kilobytes(rules);
    }
}

fn carries_datagrams_of_60_kilobytes(rules: Vec<Rule>) {
    let running = Running::start(Rig::new().unwrap(), rules);
    for (wan, backend) in both() {
        let _echo = Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap();
        exchanges_large(&running, at(wan, 9000));
    }
    // Each datagram is 41 or 42 fragments, all of them counted.
    for direction in ["forward", "reply"] {
        for packets in each(&running, |rule| rule[direction]["packets"].as_u64().unwrap()) {
            assert!((5 * 41..=5 * 43).contains(&packets), "{packets}");
        }
    }
    let stats = Stats(running.portfwd.stats().unwrap());
    assert_eq!(stats.passed("fragment"), 0);
    running.finish();
}

/// Large datagrams of the router itself, which are no rule's.
#[test]
fn the_boxs_own_fragments_are_left_alone() {
    if !is_root() {
        return;
    }
    let running = Running::start(Rig::new().unwrap(), for_both("game", "udp", 9000..=9000, 27015));
    for (wan, backend) in both() {
        let _game = Server::udp(&running.rig.server, at(backend, 27015), Answer::Echo).unwrap();
        let _own = Server::udp(&running.rig.router, at(wan, 9001), Answer::Echo).unwrap();
        for _ in 0..3 {
            exchanges_large(&running, at(wan, 9000));
            exchanges_large(&running, at(wan, 9001));
        }
    }
    running.finish();
}

/// Three pings of many bytes from a namespace, all answered.
fn pings(namespace: &Namespace, to: &str, size: u32) {
    let size = size.to_string();
    let mut ping = namespace.command("ping");
    ping.args(["-n", "-c", "3", "-i", "0.1", "-W", "2", "-s", &size, to]);
    let printed = netns::run(&mut ping).unwrap_or_else(|error| panic!("{to}: {error:#}"));
    assert!(printed.contains("3 received"), "{printed}");
}

#[test]
fn a_dmz_host_answers_pings_of_any_size() {
    if !is_root() {
        return;
    }
    let running = Running::start(Rig::new().unwrap(), for_both("dmz", "any", ANY, 0));
    let Rig { client, router, .. } = &running.rig;
    for ((wan, backend), outside) in both().into_iter().zip(rig::CLIENT.both()) {
        for size in [0, 56, 1400, 3000, 20_000] {
            pings(client, &wan.to_string(), size);
        }
        // They came from there; and what the router asks is answered to the router.
        let from_host = running.servers[0].look(|tally| {
            tally.count(|key| {
                key.direction == Direction::Sent
                    && matches!(key.protocol, 1 | 58)
                    && key.source.ip() == backend
                    && key.destination.ip() == outside
            })
        });
        assert!(from_host.packets >= 15, "{from_host}");
        pings(router, &outside.to_string(), 56);
        pings(router, &outside.to_string(), 3000);
    }
    running.finish();
}

/// A protocol of nobody's (RFC 3692).
const EXPERIMENT: i32 = 253;

/// A socket for packets of that protocol, which have just a payload.
fn raw(namespace: &Namespace, address: IpAddr) -> UdpSocket {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // Not to be inherited by portfwd.
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: a bare system call.
    let socket = namespace.enter(|| unsafe { libc::socket(family, kind, EXPERIMENT) });
    assert!(socket >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for us alone. What is called on it is the same
    // for sockets of any kind.
    let socket = unsafe { UdpSocket::from_raw_fd(socket) };
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

/// The last bytes of the next packet, and who sent it; before them may be an IP header.
fn receives(socket: &UdpSocket) -> io::Result<(IpAddr, String)> {
    let mut buffer = [0; 100];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok((from.ip(), String::from_utf8_lossy(&buffer[length - 5..length]).into_owned()))
}

/// Says something by a protocol that has no ports, and has an answer.
fn converses(client: &Namespace, to: IpAddr, with: &UdpSocket) {
    let socket = raw(client, to);
    socket.send_to(b"hello", at(to, 0)).unwrap();
    let (from, said) = receives(with).unwrap();
    assert_eq!(said, "hello");
    with.send_to(b"there", at(from, 0)).unwrap();
    assert_eq!(receives(&socket).unwrap(), (to, "there".to_owned()));
}

#[test]
fn other_protocols_are_the_dmz_hosts_but_not_those_of_the_box() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    let own = rig::WAN.both().map(|wan| raw(&rig.router, wan));
    let running = Running::start(rig, for_both("dmz", "any", ANY, 0));
    let Rig { client, server, .. } = &running.rig;
    for ((wan, backend), own) in both().into_iter().zip(&own) {
        let theirs = raw(server, backend);
        converses(client, wan, own);
        assert!(receives(&theirs).is_err());
    }
    assert_eq!(each(&running, |rule| rule["forward"]["packets"].as_u64().unwrap()), [0, 0]);
    // Without a socket they are not the router's any more, once portfwd has looked again.
    drop(own);
    for (wan, backend) in both() {
        let theirs = raw(server, backend);
        // It does every five seconds.
        let arrives = |_| {
            raw(client, wan).send_to(b"probe", at(wan, 0)).unwrap();
            receives(&theirs).is_ok()
        };
        assert!((0..20).any(arrives), "{wan}: {}", running.portfwd.stderr());
        converses(client, wan, &theirs);
    }
    running.finish();
}
