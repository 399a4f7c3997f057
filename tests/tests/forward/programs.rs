//! Real programs: nginx and curl, iperf3, dnsmasq and dig, a thousand connections.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::time::Duration;

use portfwd_tests::is_root;
use portfwd_tests::netns;
use portfwd_tests::peers::{Answer, Background, Server};
use portfwd_tests::rig::{self, Rig};
use portfwd_tests::wire::Direction;
use serde_json::Value;

use crate::running::*;

#[test]
fn a_download_from_nginx_arrives_whole() {
    if !is_root() {
        return;
    }
    const SIZE: u64 = 100 << 20;
    let running = Running::start(Rig::new().unwrap(), for_both("web", "tcp", 8080..=8080, 80));
    let directory = running.directory.path();
    let file = directory.join("file");
    random_file(&file, SIZE);
    let path = directory.display();
    let listen: String =
        both().iter().map(|(_, server)| format!("listen {};", at(*server, 80))).collect();
    fs::write(
        directory.join("nginx.conf"),
        format!(
            "daemon off; user root; worker_processes 1; pid {path}/nginx.pid;
             error_log {path}/nginx.log;
             events {{}}
             http {{
               access_log off; client_body_temp_path {path}/body; proxy_temp_path {path}/proxy;
               fastcgi_temp_path {path}/fastcgi; uwsgi_temp_path {path}/uwsgi;
               scgi_temp_path {path}/scgi;
               server {{ root {path}; {listen} }}
             }}"
        ),
    )
    .unwrap();
    let _nginx = Background::start(
        running
            .rig
            .server
            .command("nginx")
            .args(["-e", "nginx.log", "-c", "nginx.conf", "-p"])
            .arg(directory),
    )
    .unwrap();
    let sum = sha256(&file);
    for (wan, server) in both() {
        wait_for_socket(&running.rig.server, "-lt", at(server, 80));
        let copy = directory.join("copy");
        let url = format!("http://{}/file", at(wan, 8080));
        netns::run(curl(&running.rig.client).args([&url, "-o"]).arg(&copy)).unwrap();
        assert_eq!(fs::metadata(&copy).unwrap().len(), SIZE);
        assert_eq!(sha256(&copy), sum, "{url}");
    }
    let stats = running.settle(nothing);
    for rule in &running.rules {
        assert!(stats.counts(&rule.name).reply.bytes > SIZE);
    }
    running.finish();
}

/// iperf3 through a rule with another port, one IP version: TCP and UDP, up and down.
fn iperf(wan: IpAddr, server: IpAddr) {
    let rule = Rule::new("iperf", "tcp+udp", 5301..=5301, at(server, 5201));
    let running = Running::start(Rig::new().unwrap(), vec![rule]);
    let bind = server.to_string();
    let log = File::create(running.directory.path().join("iperf3.log")).unwrap();
    let _iperf = Background::start(
        running
            .rig
            .server
            .command("iperf3")
            .args(["-s", "-p", "5201", "-B", &bind])
            .stdout(log.try_clone().unwrap())
            .stderr(log),
    )
    .unwrap();
    wait_for_socket(&running.rig.server, "-lt", at(server, 5201));
    let wan = wan.to_string();
    for flags in [&[][..], &["-R"], &["-u"], &["-u", "-R"]] {
        // TCP at its own pace would be all that two processors can do.
        let rate = if flags.contains(&"-u") { "20M" } else { "200M" };
        let mut client = running.rig.client.command("iperf3");
        client.args(["-c", &wan, "-p", "5301", "-t", "1", "-b", rate, "-l", "1200", "--json"]);
        client.args(flags);
        // The server may not be done with the run before.
        let result: Value = poll(|| {
            let printed = netns::run(&mut client).map_err(|error| format!("{error:#}"))?;
            let result: Value = serde_json::from_str(&printed).unwrap();
            result.get("error").map_or(Ok(result.clone()), |error| Err(error.to_string()))
        });
        let end = &result["end"];
        let received = if flags.contains(&"-u") { "sum" } else { "sum_received" };
        let bytes = end[received]["bytes"].as_u64().unwrap_or_else(|| panic!("{result:#}"));
        assert!(bytes > 100_000, "{flags:?}: {end:#}");
    }
    let stats = running.settle(nothing);
    let counts = stats.counts("iperf");
    // Both ways, a second at 20 Mbit/s at least, less what a busy machine may not manage.
    assert!(counts.forward.bytes > 1_000_000 && counts.reply.bytes > 1_000_000, "{counts:?}");
    running.finish();
}

#[test]
fn iperf3_runs_both_ways_over_ipv4() {
    if !is_root() {
        return;
    }
    let [(wan, server), _] = both();
    iperf(wan, server);
}

#[test]
fn iperf3_runs_both_ways_over_ipv6() {
    if !is_root() {
        return;
    }
    let [_, (wan, server)] = both();
    iperf(wan, server);
}

#[test]
fn dig_asks_a_real_dns_server() {
    if !is_root() {
        return;
    }
    let running = Running::start(Rig::new().unwrap(), for_both("dns", "tcp+udp", 5353..=5353, 53));
    let _dns = dnsmasq(&running.rig.server, rig::SERVER.both(), running.directory.path());
    for (wan, _) in both() {
        dig(&running.rig.client, at(wan, 5353));
    }
    running.finish_exact();
}

#[test]
fn a_thousand_connections_are_open_at_once() {
    if !is_root() {
        return;
    }
    const EACH: usize = 500;
    raise_file_limit();
    let running = Running::start(Rig::new().unwrap(), for_both("web", "tcp", 8080..=8080, 80));
    let servers = both()
        .map(|(_, server)| Server::tcp(&running.rig.server, at(server, 80), Answer::Echo).unwrap());
    let streams: Vec<TcpStream> = running.rig.client.enter(|| {
        let wans = rig::WAN.both().into_iter().cycle().take(2 * EACH);
        wans.map(|wan| TcpStream::connect(at(wan, 8080)).unwrap()).collect()
    });
    // A few at a time, though all are open: what a veth holds is limited.
    let question = |number: usize| format!("{number:0>1999}\n").into_bytes();
    let numbered: Vec<_> = streams.iter().enumerate().collect();
    for some in numbered.chunks(20) {
        for &(number, mut stream) in some {
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            stream.write_all(&question(number)).unwrap();
        }
        for &(number, mut stream) in some {
            let mut answer = vec![0; 2000];
            stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("{number}: {error}"));
            assert_eq!(answer, question(number));
        }
    }
    for some in numbered.chunks(20) {
        for &(_, stream) in some {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        for &(_, mut stream) in some {
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        }
    }
    let stats = running.settle(nothing);
    let segment = u64::try_from(2000 * EACH).unwrap();
    for rule in &running.rules {
        let counts = stats.counts(&rule.name);
        assert!(counts.forward.bytes > segment && counts.reply.bytes > segment, "{counts:?}");
    }
    let connections = running.client.look(|tally| {
        tally
            .flows
            .keys()
            .filter(|key| key.direction == Direction::Sent && key.protocol == TCP)
            .count()
    });
    assert_eq!(connections, 2 * EACH);
    drop(servers);
    running.finish_exact();
}

/// Both ends of a thousand connections are in this process.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel reads and writes one rlimit.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_cur.max(8192);
        limit.rlim_max = limit.rlim_max.max(limit.rlim_cur);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
}
