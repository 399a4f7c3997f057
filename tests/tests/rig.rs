//! The rig, the captures and the peers by themselves: the kernel's own forwarding and nftables stand
//! where portfwd will.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

use portfwd_tests::netns::{self, Namespace};
use portfwd_tests::peers::{self, Answer, Background, Exchanges, Load, Pace, Server};
use portfwd_tests::rig::{self, Addresses, Options, Rig};
use portfwd_tests::wire::{Capture, Direction, Key};
use portfwd_tests::{Portfwd, TempDir, is_root};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Forwards port 8080/tcp to 80 and 27015/udp to itself, from every address of `wan0` to `server`.
fn forward(rig: &Rig, server: Addresses) {
    rig.router.set_sysctl("net.ipv4.ip_forward", "1").unwrap();
    rig.router.set_sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
    let rules = format!(
        "table inet portfwd {{ chain prerouting {{ type nat hook prerouting priority -100;
            iifname wan0 tcp dport 8080 dnat ip to {v4}:80
            iifname wan0 tcp dport 8080 dnat ip6 to [{v6}]:80
            iifname wan0 udp dport 27015 dnat ip to {v4}
            iifname wan0 udp dport 27015 dnat ip6 to {v6}
         }}
         }}",
        v4 = server.v4,
        v6 = server.v6
    );
    netns::run(rig.router.command("nft").arg(rules)).unwrap();
}

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

#[test]
fn client_and_server_meet_only_by_translation() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    forward(&rig, rig::SERVER);
    for (wan, server) in rig::WAN.both().into_iter().zip(rig::SERVER.both()) {
        let _web = Server::tcp(&rig.server, at(server, 80), Answer::Peer).unwrap();
        let _game = Server::udp(&rig.server, at(server, 27015), Answer::Peer).unwrap();
        let seen = peers::ask_tcp(&rig.client, at(wan, 8080)).unwrap();
        assert!(rig::CLIENT.both().contains(&seen.ip()), "{seen}");
        let seen = peers::ask_udp(&rig.client, at(wan, 27015)).unwrap();
        assert!(rig::CLIENT.both().contains(&seen.ip()), "{seen}");
        let error = peers::ask_tcp(&rig.client, at(server, 80)).unwrap_err();
        assert!(format!("{error:#}").contains("unreachable"), "{error:#}");
    }
}

#[test]
fn a_first_packet_need_not_be_sent_twice() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    let router = at(rig::WAN.v6.into(), 9);
    let _server = Server::udp(&rig.router, router, Answer::Echo).unwrap();
    let capture = Capture::start(&rig.client, "eth0").unwrap();
    let socket = peers::udp_client(&rig.client, router).unwrap();
    peers::exchange(&socket, b"hello").unwrap();
    let frames = capture.stop().unwrap();
    // ICMPv6, neighbour solicitation.
    let is_question =
        |data: &[u8]| data[12..14] == [0x86, 0xdd] && data[20] == 58 && data[54] == 135;
    let sent = frames.iter().filter(|frame| frame.direction == Direction::Sent);
    assert_eq!(sent.filter(|frame| is_question(&frame.data)).count(), 1, "{frames:02x?}");
}

#[test]
fn both_sides_see_the_same_packets_all_valid() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    forward(&rig, rig::SERVER);
    for (wan, server) in rig::WAN.both().into_iter().zip(rig::SERVER.both()) {
        let client_side = Capture::tally(&rig.client, "eth0").unwrap();
        let server_side = Capture::tally(&rig.server, "eth0").unwrap();
        let web = Server::tcp(&rig.server, at(server, 80), Answer::Echo).unwrap();
        let game = Server::udp(&rig.server, at(server, 27015), Answer::Echo).unwrap();
        let limit = Some(200);
        let tcp = Pace { per_second: 100, limit };
        let tcp = Load::tcp(&rig.client, at(wan, 8080), 5000, tcp);
        let udp = Pace { per_second: 1000, limit };
        let udp = Load::udp(&rig.client, at(wan, 27015), 33, udp).unwrap();
        assert_eq!(udp.finish(), Exchanges { asked: 200, answered: 200 });
        assert_eq!(tcp.finish(), Exchanges { asked: 200, answered: 200 });
        for server in [&web, &game] {
            assert!(server.seen().iter().all(|peer| rig::CLIENT.both().contains(peer)));
            assert_eq!(server.seen().len(), 1);
        }
        let (client_side, server_side) = (client_side.stop().unwrap(), server_side.stop().unwrap());
        client_side.ensure_valid().unwrap();
        server_side.ensure_valid().unwrap();
        assert_eq!(rig.lost_on_wire().unwrap(), 0);

        let header = if wan.is_ipv4() { 28 } else { 48 };
        for protocol in [TCP, UDP] {
            let forward = |direction| {
                move |key: &Key| {
                    key.direction == direction
                        && key.protocol == protocol
                        && matches!(key.destination.port(), 80 | 8080 | 27015)
                }
            };
            let reply = |direction| {
                move |key: &Key| {
                    key.direction == direction
                        && key.protocol == protocol
                        && matches!(key.source.port(), 80 | 8080 | 27015)
                }
            };
            let asked = client_side.count(forward(Direction::Sent));
            assert_eq!(asked, server_side.count(forward(Direction::Received)));
            let answered = server_side.count(reply(Direction::Sent));
            assert_eq!(answered, client_side.count(reply(Direction::Received)));
            if protocol == UDP {
                assert_eq!((asked.packets, asked.bytes), (200, 200 * (header + 33)));
                assert_eq!(answered, asked);
            } else {
                assert!(asked.bytes > 200 * 5000 && answered.bytes > 200 * 5000);
            }
        }
    }
}

#[test]
fn a_bulk_download_is_captured_whole() {
    if !is_root() {
        return;
    }
    const SIZE: usize = 100 << 20;
    let rig = Rig::new().unwrap();
    forward(&rig, rig::SERVER);
    let listener = rig.server.enter(|| TcpListener::bind(at(rig::SERVER.v6.into(), 80))).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&vec![0x5a; SIZE]).unwrap();
    });
    let client_side = Capture::tally(&rig.client, "eth0").unwrap();
    let server_side = Capture::tally(&rig.server, "eth0").unwrap();
    let began = Instant::now();
    let mut stream = peers::connect(&rig.client, at(rig::WAN.v6.into(), 8080)).unwrap();
    let mut received = Vec::with_capacity(SIZE);
    stream.read_to_end(&mut received).unwrap();
    println!("download: {:?}", began.elapsed());
    server.join().unwrap();
    assert_eq!(received.len(), SIZE);
    let (client_side, server_side) = (client_side.stop().unwrap(), server_side.stop().unwrap());
    println!("verified: {:?}, {} frames", began.elapsed(), client_side.frames());
    client_side.ensure_valid().unwrap();
    server_side.ensure_valid().unwrap();
    let lost = rig.lost_on_wire().unwrap();
    assert_eq!(lost, 0);
    let down = server_side.count(|key| key.direction == Direction::Sent && key.protocol == TCP);
    assert!(down.bytes > SIZE as u64 && down.packets > (SIZE / 1500) as u64);
    let arrived =
        client_side.count(|key| key.direction == Direction::Received && key.protocol == TCP);
    // The kernel forwards in bursts, which may be more than fits.
    let lost = rig.router.link_statistic("wan0", "tx.dropped").unwrap();
    assert_eq!(down.packets, arrived.packets + lost);
}

#[test]
fn options_add_addresses_a_second_server_and_a_gateway() {
    if !is_root() {
        return;
    }
    let rig = Rig::with(Options {
        external: &["198.51.100.7/24", "2001:db8:1::7/64"],
        second_server: true,
        gateway: true,
        ..Options::default()
    })
    .unwrap();
    forward(&rig, rig::SECOND_SERVER);
    let second = rig.second_server.as_ref().unwrap();
    for (server, more) in
        rig::SECOND_SERVER.both().into_iter().zip(["198.51.100.7", "2001:db8:1::7"])
    {
        let _web = Server::tcp(second, at(server, 80), Answer::Peer).unwrap();
        let seen = peers::ask_tcp(&rig.client, at(more.parse().unwrap(), 8080)).unwrap();
        assert!(rig::DISTANT_CLIENT.both().contains(&seen.ip()), "{seen}");
    }
}

#[test]
fn a_checksum_left_to_hardware_is_told() {
    if !is_root() {
        return;
    }
    let [a, b] = ["a", "b"].map(|role| Namespace::new(role).unwrap());
    a.ip(&format!("link add eth0 type veth peer name eth0 netns {}", b.name())).unwrap();
    for (namespace, address) in [(&a, "198.51.100.1/24"), (&b, "198.51.100.2/24")] {
        namespace.ip(&format!("address add {address} dev eth0")).unwrap();
        namespace.ip("link set eth0 up").unwrap();
    }
    let capture = Capture::start(&b, "eth0").unwrap();
    let tally = Capture::tally(&b, "eth0").unwrap();
    let server: SocketAddr = "198.51.100.2:9".parse().unwrap();
    let _server = Server::udp(&b, server, Answer::Echo).unwrap();
    let socket = peers::udp_client(&a, server).unwrap();
    assert_eq!(peers::exchange(&socket, b"hello").unwrap(), b"hello");
    let frames = capture.stop().unwrap();
    let unfilled: Vec<_> = frames.iter().filter(|frame| frame.unfilled).collect();
    assert_eq!(unfilled.len(), 2, "{frames:02x?}");
    assert_eq!(unfilled[0].direction, Direction::Received);
    assert_eq!(unfilled[1].direction, Direction::Sent);
    assert!(unfilled.iter().all(|frame| frame.data.ends_with(b"hello")));
    assert_eq!(tally.stop().unwrap().faulty, 2);
}

#[test]
fn nothing_is_left() {
    if !is_root() {
        return;
    }
    let rig = Rig::new().unwrap();
    let name = rig.client.name().to_owned();
    // One that no one waits for: the namespace ends it.
    let mut child = rig.client.command("sleep").arg("1000").spawn().unwrap();
    drop(rig);
    assert!(!child.wait().unwrap().success());
    assert!(!netns::run(Command::new("ip").args(["netns", "list"])).unwrap().contains(&name));
}

#[test]
fn what_a_killed_run_left_is_removed() {
    if !is_root() {
        return;
    }
    let mut dead = Command::new("true").spawn().unwrap();
    let stale = format!("pfwd-{}-0-client", dead.id());
    dead.wait().unwrap();
    netns::run(Command::new("ip").args(["netns", "add", &stale])).unwrap();
    let alive = Namespace::new("client").unwrap();
    let removed = netns::clean_stale().unwrap();
    assert!(removed.contains(&stale) && !removed.contains(&alive.name().to_owned()));
    let left = netns::run(Command::new("ip").args(["netns", "list"])).unwrap();
    assert!(!left.contains(&stale) && left.contains(alive.name()));
}

#[test]
fn children_end_with_their_owner() {
    // What a shell ignores, the program that takes its place ignores too.
    let mut deaf =
        Background::start(Command::new("sh").args(["-c", "trap '' TERM; exec sleep 60"])).unwrap();
    assert!(deaf.wait(Duration::from_millis(100)).is_err());
    let process = format!("/proc/{}", deaf.id());
    assert!(std::path::Path::new(&process).exists());
    drop(deaf);
    assert!(!std::path::Path::new(&process).exists());
}

#[test]
fn a_program_that_fails_to_start_is_quoted() {
    if !is_root() {
        return;
    }
    let namespace = Namespace::new("router").unwrap();
    let directory = TempDir::new().unwrap();
    let program = directory.path().join("portfwd");
    std::fs::write(&program, "#!/bin/sh\necho no such interface >&2\nexit 2\n").unwrap();
    netns::run(Command::new("chmod").arg("+x").arg(&program)).unwrap();
    let error =
        Portfwd::start(&namespace, &program, &["-i", "wan0"], directory.path()).unwrap_err();
    assert_eq!(format!("{error:#}"), "portfwd ended at once: exit status: 2: no such interface");
}
