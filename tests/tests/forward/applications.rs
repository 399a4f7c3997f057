//! Applications that ask more of a forwarder than one flow: large DNS answers, TFTP.

use std::fs::{self, Permissions};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;

use portfwd_tests::is_root;
use portfwd_tests::netns::{self, Namespace};
use portfwd_tests::rig::{self, Rig};
use portfwd_tests::wire::{Direction, Key};

use crate::running::*;

/// The same rules, but the server sees the router's address.
fn masqueraded(rules: Vec<Rule>) -> Vec<Rule> {
    rules.into_iter().map(|rule| Rule { masquerade: true, ..rule }).collect()
}

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
