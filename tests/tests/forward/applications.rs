//! Applications that ask more of a forwarder than one flow: large DNS answers, TFTP, FTP, SIP, QUIC.

use std::fs::{self, File, Permissions};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use portfwd_tests::is_root;
use portfwd_tests::netns::{self, Namespace};
use portfwd_tests::peers::Background;
use portfwd_tests::rig::{self, Rig};
use portfwd_tests::wire::{Direction, Key};
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig, TokioRuntime, VarInt,
};
use rustls::RootCertStore;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::time::timeout;

use crate::running::*;

/// What went through each of the rules of `for_both`, by the addresses alone, as fragments have no
/// ports: what was sent, or what was received.
fn by_address(running: &Running, way: Direction) -> [Counts; 2] {
    both().map(|(wan, server)| {
        let is_with = |key: &Key, address| {
            let ends = [key.source.ip(), key.destination.ip()];
            key.direction == way && matches!(key.protocol, TCP | UDP) && ends.contains(&address)
        };
        let client = running.client.look(|tally| tally.count(|key| is_with(key, wan)));
        let server = running.servers[0].look(|tally| tally.count(|key| is_with(key, server)));
        match way {
            Direction::Sent => Counts { forward: client, reply: server },
            Direction::Received => Counts { forward: server, reply: client },
        }
    })
}

/// The answer to the question for the large text; dig has each of its strings in quotes.
fn asks_for_large_text(namespace: &Namespace, wan: IpAddr, options: &[&str]) {
    let printed = dig_for(namespace, at(wan, 5353), options, ["large.test", "TXT"]);
    let strings: Vec<_> = large_text().iter().map(|string| format!("\"{string}\"")).collect();
    assert_eq!(printed, strings.join(" "), "{wan} {options:?}");
}

#[test]
fn large_dns_answers_come_in_fragments_or_by_tcp() {
    if !is_root() {
        return;
    }
    let running = Running::start(Rig::new().unwrap(), for_both("dns", "tcp+udp", 5353..=5353, 53));
    let Rig { client, server, .. } = &running.rig;
    let _dns = dnsmasq(server, rig::SERVER.both(), running.directory.path());
    let count = |server: IpAddr, protocol, fragments| {
        running.servers[0].look(|tally| {
            let of_interest = |key: &Key| {
                key.direction == Direction::Sent
                    && key.protocol == protocol
                    && key.source.ip() == server
                    && (key.source.port() == 0) == fragments
            };
            tally.count(of_interest).packets
        })
    };
    for (wan, server) in both() {
        // What is cut is not asked for again.
        asks_for_large_text(client, wan, &["+bufsize=4096", "+notcp", "+ignore"]);
        assert!(count(server, UDP, true) >= 3, "{wan}");
        assert_eq!((count(server, UDP, false), count(server, TCP, false)), (0, 0), "{wan}");
        asks_for_large_text(client, wan, &["+bufsize=1232"]);
        assert_eq!(count(server, UDP, false), 1, "{wan}");
        assert!(count(server, TCP, false) > 0, "{wan}");
    }
    poll(|| {
        let stats = Stats(running.portfwd.stats().unwrap());
        let counted = [0, 1].map(|rule| stats.counts(&running.rules[rule].name));
        let seen = [Direction::Sent, Direction::Received].map(|way| by_address(&running, way));
        let differ = || format!("counted {counted:#?}\nbut sent and received were {seen:#?}");
        if seen == [counted, counted] { Ok(()) } else { Err(differ()) }
    });
    assert_eq!(Stats(running.portfwd.stats().unwrap()).passed("fragment"), 0);
    running.finish();
}

#[test]
fn dns_answers_that_were_cut_come_by_tcp_through_masquerade() {
    if !is_root() {
        return;
    }
    let rules = masqueraded(for_both("dns", "tcp+udp", 5353..=5353, 53));
    let running = Running::start(Rig::new().unwrap(), rules);
    let Rig { client, server, .. } = &running.rig;
    let _dns = dnsmasq(server, rig::SERVER.both(), running.directory.path());
    for (wan, _) in both() {
        asks_for_large_text(client, wan, &["+bufsize=1232"]);
    }
    for protocol in [TCP, UDP] {
        let sent = running.client.look(|tally| tally.count(|key| key.protocol == protocol));
        assert!(sent.packets > 0);
    }
    running.finish_exact();
}

/// Downloads what a TFTP server has, by these rules. The server answers from a port that nobody has
/// asked yet.
fn downloads_by_tftp(rules: Vec<Rule>, options: &[&str]) -> Running {
    let running = Running::start(Rig::new().unwrap(), rules);
    let Rig { client, server, .. } = &running.rig;
    let directory = running.directory.path();
    let (file, copy) = (directory.join("file"), directory.join("copy"));
    random_file(&file, 200_000);
    // dnsmasq as root gives what everyone may read.
    fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    let root = format!("--tftp-root={}", directory.display());
    let options = [&["--port=0", "--enable-tftp", &root], options].concat();
    let _tftp = dnsmasq_with(server, rig::SERVER.both(), directory, &options);
    for (wan, backend) in both() {
        wait_for_socket(server, "-lu", at(backend, 69));
        // Each block is a packet that is answered: the smallest there are, and those of an Ethernet.
        for blocks in ["512", "1428"] {
            let url = format!("tftp://{}/file", at(wan, 69));
            let mut curl = curl(client);
            netns::run(curl.args(["--tftp-blksize", blocks, &url, "-o"]).arg(&copy)).unwrap();
            assert!(fs::read(&copy).unwrap() == fs::read(&file).unwrap(), "{url}");
            fs::remove_file(&copy).unwrap();
        }
        let from_there = |key: &Key| key.direction == Direction::Sent && key.source.port() == 69;
        let answers = running.servers[0].look(|tally| tally.count(from_there));
        assert_eq!(answers.packets, 0, "the server has answered from the port that was asked");
    }
    running
}

#[test]
fn a_dmz_host_answers_tftp_from_a_port_of_its_choice() {
    if !is_root() {
        return;
    }
    downloads_by_tftp(for_both("dmz", "any", ANY, 0), &[]).finish_exact();
}

/// Another rule's port, that is.
#[test]
fn tftp_answers_come_by_a_rule_that_was_not_asked() {
    if !is_root() {
        return;
    }
    let mut rules = for_both("tftp", "udp", 69..=69, 69);
    rules.extend(for_both("transfer", "udp", 30_000..=30_009, 30_000));
    let running = downloads_by_tftp(rules, &["--tftp-port-range=30000,30009"]);
    let stats = running.exact(nothing);
    for (asked, transfer) in [("tftp4", "transfer4"), ("tftp6", "transfer6")] {
        // Two downloads.
        let asked = stats.counts(asked);
        assert_eq!((asked.forward.packets, asked.reply.packets), (2, 0));
        let transfer = stats.counts(transfer);
        assert_eq!(transfer.forward.packets, transfer.reply.packets);
    }
    assert_eq!(total(&stats.0["verdicts"]["dropped"]), 0);
    running.all_arrived(nothing);
    running.finish();
}

/// An FTP server that takes files in its directory `incoming`, and has data connections come to ports
/// 30000 to 30009 of the external address.
fn vsftpd(namespace: &Namespace, wan: IpAddr, address: IpAddr, directory: &Path) -> Background {
    let (root, config) = (directory.join("ftp"), directory.join("vsftpd.conf"));
    let incoming = root.join("incoming");
    fs::create_dir_all(&incoming).unwrap();
    fs::set_permissions(&root, Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&incoming, Permissions::from_mode(0o777)).unwrap();
    // Only for IPv4 is the address told.
    let listen = match wan {
        IpAddr::V4(_) => format!("listen=YES\nlisten_address={address}\npasv_address={wan}"),
        IpAddr::V6(_) => format!("listen=NO\nlisten_ipv6=YES\nlisten_address6={address}"),
    };
    let path = directory.display();
    fs::write(
        &config,
        format!(
            "{listen}
background=NO
anonymous_enable=YES
no_anon_password=YES
anon_root={path}/ftp
write_enable=YES
anon_upload_enable=YES
anon_umask=022
pasv_min_port=30000
pasv_max_port=30009
secure_chroot_dir={path}/ftp
isolate_network=NO
vsftpd_log_file={path}/vsftpd.log
"
        ),
    )
    .unwrap();
    let vsftpd = Background::start(namespace.command("vsftpd").arg(&config)).unwrap();
    wait_for_socket(namespace, "-lt", at(address, 21));
    vsftpd
}

/// Options of curl for FTP in passive mode: EPSV names a port; PASV an address too, which curl would
/// rather not believe, and which IPv6 does not have.
const PASSIVE: [&[&str]; 2] = [&[], &["--disable-epsv", "--no-ftp-skip-pasv-ip"]];
/// The server opens the data connections: EPRT and PORT.
const ACTIVE: [&[&str]; 2] = [&["--ftp-port", "-"], &["--ftp-port", "-", "--disable-eprt"]];

/// Lists, uploads and downloads by FTP, at this external port, with each of these options.
fn transfers_by_ftp(rules: Vec<Rule>, port: u16, ways: &[&[&str]]) {
    const SIZE: u64 = 3 << 20;
    let running = Running::start(Rig::new().unwrap(), rules);
    let Rig { client, server, .. } = &running.rig;
    let directory = running.directory.path();
    let (file, copy) = (directory.join("file"), directory.join("copy"));
    for (wan, backend) in both() {
        let _vsftpd = vsftpd(server, wan, backend, directory);
        let incoming = format!("ftp://{}/incoming/", at(wan, port));
        for (number, way) in ways.iter().enumerate() {
            let name = format!("file{number}");
            let there = format!("{incoming}{name}");
            random_file(&file, SIZE);
            netns::run(curl(client).args(*way).arg("-T").arg(&file).arg(&there)).unwrap();
            let list = netns::run(curl(client).args(*way).args(["-l", &incoming])).unwrap();
            assert!(list.lines().any(|line| line == name), "{there}: {list}");
            netns::run(curl(client).args(*way).arg(&there).arg("-o").arg(&copy)).unwrap();
            assert_eq!(sha256(&copy), sha256(&file), "{there}");
            fs::remove_file(directory.join("ftp/incoming").join(name)).unwrap();
        }
    }
    running.finish_exact();
}

/// A rule for the control connection, and one for the data.
fn for_ftp() -> Vec<Rule> {
    let mut rules = for_both("ftp", "tcp", 2121..=2121, 21);
    rules.extend(for_both("data", "tcp", 30_000..=30_009, 30_000));
    rules
}

#[test]
fn ftp_in_passive_mode_has_its_data_by_a_range() {
    if !is_root() {
        return;
    }
    transfers_by_ftp(for_ftp(), 2121, &PASSIVE);
}

#[test]
fn ftp_in_passive_mode_has_its_data_by_a_range_with_masquerade() {
    if !is_root() {
        return;
    }
    transfers_by_ftp(masqueraded(for_ftp()), 2121, &PASSIVE);
}

#[test]
fn a_dmz_host_opens_the_data_connections_of_ftp() {
    if !is_root() {
        return;
    }
    transfers_by_ftp(for_both("dmz", "any", ANY, 0), 21, &[PASSIVE, ACTIVE].concat());
}

/// One of sipp's own scenarios, with some of it replaced, in a file.
fn scenario(name: &str, replaced: &[(&str, &str)], file: &Path) {
    // It prints it, and says that it failed.
    let printed = Command::new("sipp").args(["-sd", name]).output().unwrap();
    let mut text = String::from_utf8(printed.stdout).unwrap();
    for (old, new) in replaced {
        assert!(text.contains(old), "{old}: {text}");
        text = text.replace(old, new);
    }
    fs::write(file, text).unwrap();
}

/// A command of sipp at an address, with its media at port 6000, and a log beside its scenario.
fn sipp(namespace: &Namespace, address: IpAddr, scenario: &Path) -> Command {
    let address = address.to_string();
    let log = File::create(scenario.with_extension("log")).unwrap();
    let mut sipp = namespace.command("sipp");
    sipp.arg("-sf").arg(scenario).args(["-i", &address, "-mi", &address, "-mp", "6000"]);
    sipp.args(["-p", "5060", "-nostdin"]).stdout(log.try_clone().unwrap()).stderr(log);
    sipp
}

/// Calls by SIP, in which half a second of sound goes each way by RTP. The server says where its media
/// are as clients should see it.
fn calls_by_sip(masquerade: bool) {
    const CALLS: u64 = 3;
    let mut rules = for_both("sip", "udp", 15_060..=15_060, 5060);
    rules.extend(for_both("rtp", "udp", 16_000..=16_009, 6000));
    let rules = if masquerade { masqueraded(rules) } else { rules };
    let running = Running::start(Rig::new().unwrap(), rules);
    let Rig { client, server, .. } = &running.rig;
    let directory = running.directory.path();
    random_file(&directory.join("sound"), 4000);
    let sound = format!(
        "<nop><action><exec rtp_stream=\"{}/sound,1,0\"/></action></nop>
         <pause milliseconds=\"1500\"/>",
        directory.display()
    );
    let (called, calling) = (directory.join("called.xml"), directory.join("calling.xml"));
    let ports = [("[media_port]", "[rtpstream_audio_port]"), ("<pause/>", &sound)];
    scenario("uac", &ports, &calling);
    let seen = if masquerade { rig::LAN } else { rig::CLIENT };
    for (((wan, backend), from), seen) in
        both().into_iter().zip(rig::CLIENT.both()).zip(seen.both())
    {
        let media = [("[media_ip]", &*wan.to_string()), ("[media_port]", "16000")];
        scenario("uas", &media, &called);
        let _called = Background::start(sipp(server, backend, &called).arg("-rtp_echo")).unwrap();
        wait_for_socket(server, "-lu", at(backend, 5060));
        let mut calls = sipp(client, from, &calling);
        calls.args(["-m", &CALLS.to_string(), "-timeout", "30", "-timeout_error"]);
        let status = calls.arg(at(wan, 15_060).to_string()).status().unwrap();
        let log = || fs::read_to_string(calling.with_extension("log")).unwrap();
        assert!(status.success(), "{wan}: {status}: {}", log());
        let others = running.servers[0].look(|tally| {
            tally.count(|key| {
                key.protocol == UDP && key.destination.ip() == backend && key.source.ip() != seen
            })
        });
        assert_eq!(others.packets, 0, "{wan}");
    }
    for name in ["rtp4", "rtp6"] {
        // A packet for 20 ms at most, and its echo.
        let counts = poll(|| {
            let counts = Stats(running.portfwd.stats().unwrap()).counts(name);
            if counts.forward == counts.reply { Ok(counts) } else { Err(format!("{counts:?}")) }
        });
        assert!((CALLS..=CALLS * 25).contains(&counts.forward.packets), "{counts:?}");
    }
    running.finish_exact();
}

#[test]
fn sip_calls_have_sound_both_ways() {
    if !is_root() {
        return;
    }
    calls_by_sip(false);
}

#[test]
fn sip_calls_have_sound_both_ways_with_masquerade() {
    if !is_root() {
        return;
    }
    calls_by_sip(true);
}

/// An end of QUIC connections at a socket that stays when the end has gone: what comes late is not
/// answered by ICMP.
fn endpoint(server: Option<ServerConfig>, socket: &UdpSocket) -> Endpoint {
    let socket = socket.try_clone().unwrap();
    Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime)).unwrap()
}

/// Echoes each stream of a connection until the client closes it. Gives the address that the client had
/// at each.
async fn echo_streams(server: Endpoint) -> Vec<SocketAddr> {
    let connection = server.accept().await.unwrap().await.unwrap();
    let mut clients = Vec::new();
    while let Ok((mut sender, mut receiver)) = connection.accept_bi().await {
        let question = receiver.read_to_end(usize::MAX).await.unwrap();
        clients.push(connection.remote_address());
        sender.write_all(&question).await.unwrap();
        sender.finish().unwrap();
    }
    clients
}

/// Sends bytes on a stream of its own, and has them back.
async fn echo_stream(connection: &Connection) {
    let question: Vec<u8> = (0..1 << 20).map(|i| (i * 31 + i / 256) as u8).collect();
    let (mut sender, mut receiver) = connection.open_bi().await.unwrap();
    sender.write_all(&question).await.unwrap();
    sender.finish().unwrap();
    assert!(receiver.read_to_end(usize::MAX).await.unwrap() == question);
}

/// A QUIC connection that goes on when the client's socket becomes another.
fn moves_by_quic(masquerade: bool) {
    let rules = for_both("quic", "udp", 8443..=8443, 443);
    let rules = if masquerade { masqueraded(rules) } else { rules };
    let running = Running::start(Rig::new().unwrap(), rules);
    let Rig { client, server, .. } = &running.rig;
    let certified = rcgen::generate_simple_self_signed(["game.test".to_owned()]).unwrap();
    let certificate = certified.cert.der();
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let serve = ServerConfig::with_single_cert(vec![certificate.clone()], key.into()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let trust = ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut sockets = Vec::new();
    for (((wan, backend), outside), lan) in
        both().into_iter().zip(rig::CLIENT.both()).zip(rig::LAN.both())
    {
        let ends = [(server, at(backend, 443)), (client, at(outside, 0)), (client, at(outside, 0))];
        let [listening, first, second] =
            ends.map(|(end, address)| end.enter(|| UdpSocket::bind(address)).unwrap());
        let talk = async {
            let client = endpoint(None, &first);
            let connecting = client.connect_with(trust.clone(), at(wan, 8443), "game.test");
            let connection = connecting.unwrap().await.unwrap();
            echo_stream(&connection).await;
            client.rebind(second.try_clone().unwrap()).unwrap();
            echo_stream(&connection).await;
            connection.close(VarInt::default(), b"");
            client.wait_idle().await;
        };
        let both_ends =
            async { tokio::join!(echo_streams(endpoint(Some(serve.clone()), &listening)), talk).0 };
        let limited = async { timeout(Duration::from_secs(30), both_ends).await };
        let seen = runtime.block_on(limited).unwrap_or_else(|_| panic!("{wan}: not in 30 s"));
        if masquerade {
            assert_eq!([seen[0].ip(), seen[1].ip()], [lan, lan]);
            assert_ne!(seen[0].port(), seen[1].port());
        } else {
            assert_eq!(seen, [&first, &second].map(|socket| socket.local_addr().unwrap()));
        }
        sockets.push([listening, first, second]);
    }
    running.finish_exact();
}

#[test]
fn a_quic_connection_moves_to_another_socket() {
    if !is_root() {
        return;
    }
    moves_by_quic(false);
}

#[test]
fn a_quic_connection_moves_to_another_socket_with_masquerade() {
    if !is_root() {
        return;
    }
    moves_by_quic(true);
}
