//! The lab: portfwd between a client and a server in namespaces of their own, under live traffic,
//! with its counters checked against the wire.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{IsTerminal, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use portfwd_tests::peers::{Answer, Exchanges, Load, Pace, Server};
use portfwd_tests::rig::{self, Rig};
use portfwd_tests::wire::{Capture, Count, Direction, Key, Tally};
use portfwd_tests::{Portfwd, TempDir, interrupt, netns};
use serde_json::Value;

#[derive(clap::Args, Debug)]
#[group(skip)]
pub struct Options {
    /// How long the lab's traffic flows; 0: until Ctrl-C
    #[arg(long, value_name = "N", default_value_t = 20)]
    seconds: u64,
}

/// A forwarding and the traffic that goes through it.
struct Rule {
    name: &'static str,
    protocol: Protocol,
    listen: &'static str,
    to: &'static str,
    client: IpAddr,
    external: IpAddr,
    server: IpAddr,
    /// The ports that clients ask, as the client and as the server knows them.
    ports: &'static [(u16, u16)],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Tcp = 6,
    Udp = 17,
}

const RULES: [Rule; 4] = [
    Rule {
        name: "web",
        protocol: Protocol::Tcp,
        listen: "8080",
        to: "192.168.77.10:80",
        client: IpAddr::V4(rig::CLIENT.v4),
        external: IpAddr::V4(rig::WAN.v4),
        server: IpAddr::V4(rig::SERVER.v4),
        ports: &[(8080, 80)],
    },
    Rule {
        name: "web6",
        protocol: Protocol::Tcp,
        listen: "[2001:db8:1::1]:8080",
        to: "[fd77::10]:80",
        client: IpAddr::V6(rig::CLIENT.v6),
        external: IpAddr::V6(rig::WAN.v6),
        server: IpAddr::V6(rig::SERVER.v6),
        ports: &[(8080, 80)],
    },
    Rule {
        name: "game",
        protocol: Protocol::Udp,
        listen: "27015-27030",
        to: "192.168.77.10",
        client: IpAddr::V4(rig::CLIENT.v4),
        external: IpAddr::V4(rig::WAN.v4),
        server: IpAddr::V4(rig::SERVER.v4),
        ports: &[(27015, 27015), (27030, 27030)],
    },
    Rule {
        name: "game6",
        protocol: Protocol::Udp,
        listen: "[2001:db8:1::1]:27015-27030",
        to: "[fd77::10]:28015-28030",
        client: IpAddr::V6(rig::CLIENT.v6),
        external: IpAddr::V6(rig::WAN.v6),
        server: IpAddr::V6(rig::SERVER.v6),
        ports: &[(27015, 28015), (27030, 28030)],
    },
];

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Packets and bytes of each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    forward: Count,
    reply: Count,
}

impl Rule {
    fn servers(&self, rig: &Rig) -> Result<Vec<Server>> {
        let start = match self.protocol {
            Protocol::Tcp => Server::tcp,
            Protocol::Udp => Server::udp,
        };
        let addresses = self.ports.iter().map(|(_, port)| SocketAddr::new(self.server, *port));
        addresses.map(|address| start(&rig.server, address, Answer::Echo)).collect()
    }

    /// All rules together: 50 TCP connections and 2,000 datagrams a second.
    fn clients(&self, rig: &Rig) -> Result<Vec<Load>> {
        let addresses = self.ports.iter().map(|(port, _)| SocketAddr::new(self.external, *port));
        addresses
            .map(|address| match self.protocol {
                Protocol::Tcp => {
                    let pace = Pace { per_second: 25, limit: None };
                    Ok(Load::tcp(&rig.client, address, 8000, pace))
                }
                Protocol::Udp => {
                    let pace = Pace { per_second: 500, limit: None };
                    Load::udp(&rig.client, address, 64, pace)
                }
            })
            .collect()
    }

    /// What the client exchanged with the external address, by its own capture.
    fn at_client(&self, tally: &Tally, forward: Direction) -> Counts {
        let is_external = |address: SocketAddr| {
            address.ip() == self.external
                && self.ports.iter().any(|(port, _)| *port == address.port())
        };
        self.count(tally, forward, is_external)
    }

    /// What the server exchanged with the client's own address, by its own capture.
    fn at_server(&self, tally: &Tally, forward: Direction) -> Counts {
        let is_server = |address: SocketAddr| {
            address.ip() == self.server
                && self.ports.iter().any(|(_, port)| *port == address.port())
        };
        self.count(tally, forward, is_server)
    }

    /// Packets between the client and one side of the translation; those in direction `forward` go
    /// there, the others come from there.
    fn count(
        &self,
        tally: &Tally,
        forward: Direction,
        is_ours: impl Fn(SocketAddr) -> bool,
    ) -> Counts {
        let of = |key: &Key, theirs: SocketAddr, ours: SocketAddr| {
            key.protocol == self.protocol as u8 && theirs.ip() == self.client && is_ours(ours)
        };
        Counts {
            forward: tally
                .count(|key| key.direction == forward && of(key, key.source, key.destination)),
            reply: tally
                .count(|key| key.direction != forward && of(key, key.destination, key.source)),
        }
    }
}

/// Makes the lab, lets its traffic flow, and compares what portfwd counted with what was sent. Needs
/// root. Leaves nothing behind, also if it is interrupted.
///
/// # Errors
///
/// The lab cannot be made, or something differs: then the summary shows it.
pub fn run(options: &Options, portfwd: &Path) -> Result<()> {
    interrupt::catch();
    netns::clean_stale()?;
    let mut out = std::io::stdout();
    let rig = Rig::new().context("cannot make the lab's namespaces")?;
    let client_side = Capture::tally(&rig.client, "eth0")?;
    let server_side = Capture::tally(&rig.server, "eth0")?;

    let directory = TempDir::new().context("cannot make a temporary directory")?;
    let config = directory.path().join("portfwd.toml");
    fs::write(&config, configuration()).with_context(|| config.display().to_string())?;
    let arguments = ["--config".as_ref(), config.as_os_str()];
    let portfwd = Portfwd::start(&rig.router, portfwd, &arguments, directory.path())?;
    introduce(&mut out, &portfwd)?;

    let servers: Vec<_> = RULES.iter().map(|rule| rule.servers(&rig)).collect::<Result<_>>()?;
    let clients: Vec<_> = RULES.iter().map(|rule| rule.clients(&rig)).collect::<Result<_>>()?;
    watch(&mut out, &portfwd, options.seconds)?;
    let exchanges: Vec<_> = clients.into_iter().map(stop_all).collect();
    settle(&portfwd, &client_side, &server_side)?;

    let counted = counters(&portfwd)?;
    let lost = rig.lost_on_wire()?;
    let (client_side, server_side) = (client_side.stop()?, server_side.stop()?);
    let (status, messages) = portfwd.stop()?;
    let mut problems = compare(&mut out, &counted, &client_side, &server_side)?;

    let Exchanges { asked, answered } = sum(exchanges.iter().copied());
    writeln!(out, "requests    {} of {} answered", number(answered), number(asked))?;
    for (rule, exchanges) in RULES.iter().zip(&exchanges) {
        if exchanges.answered < exchanges.asked || exchanges.asked == 0 {
            problems.push(format!(
                "{}: {} of {} requests answered",
                rule.name, exchanges.answered, exchanges.asked
            ));
        }
    }
    let frames = client_side.frames() + server_side.frames();
    let verified = client_side.verified + server_side.verified;
    writeln!(out, "checksums   {} of {} frames valid", number(verified), number(frames))?;
    for (place, tally) in [("client", &client_side), ("server", &server_side)] {
        if let Err(error) = tally.ensure_valid() {
            problems.push(format!("{place}: {error:#}"));
        }
    }
    let seen: BTreeSet<IpAddr> = servers.iter().flatten().flat_map(Server::seen).collect();
    let list: Vec<String> = seen.iter().map(IpAddr::to_string).collect();
    writeln!(out, "client      the server saw {}", list.join(" and "))?;
    if seen != BTreeSet::from(rig::CLIENT.both()) {
        problems.push("the server did not see the client's own addresses".to_owned());
    }
    if lost > 0 {
        problems.push(format!("{lost} frames did not fit into a veth: the box is too busy"));
    }
    if !status.success() {
        problems.push(format!("portfwd ended with {status}: {}", messages.trim()));
    }
    if !problems.is_empty() {
        bail!("{}", problems.join("\n       "));
    }
    Ok(())
}

/// The rules as portfwd's configuration.
fn configuration() -> String {
    let mut text = "[interfaces]\nexternal = [\"wan0\"]\n".to_owned();
    for Rule { name, protocol, listen, to, .. } in &RULES {
        let protocol = protocol.name();
        // A string takes any text.
        let _ = write!(
            text,
            "\n[[rule]]\nname = \"{name}\"\nprotocol = \"{protocol}\"\nlisten = \"{listen}\"\nto = \"{to}\"\n"
        );
    }
    text
}

fn introduce(out: &mut impl Write, portfwd: &Portfwd) -> Result<()> {
    let end = |addresses: rig::Addresses| format!("{}, {}", addresses.v4, addresses.v6);
    writeln!(out, "client  {}", end(rig::CLIENT))?;
    writeln!(out, "router  {}, with portfwd", end(rig::WAN))?;
    writeln!(out, "server  {}", end(rig::SERVER))?;
    for line in portfwd.stderr().lines() {
        writeln!(out, "portfwd says: {line}")?;
    }
    writeln!(out)?;
    for Rule { name, protocol, listen, to, .. } in &RULES {
        writeln!(out, "{name:<6} {listen:<28} -> {to}/{}", protocol.name())?;
    }
    writeln!(out)?;
    Ok(())
}

/// Shows the counters once a second: in place on a terminal, line by line elsewhere.
fn watch(out: &mut (impl Write + IsTerminal), portfwd: &Portfwd, seconds: u64) -> Result<()> {
    let in_place = out.is_terminal();
    let began = Instant::now();
    let mut before = counters(portfwd)?;
    for second in 1.. {
        interrupt::sleep_until(began + Duration::from_secs(second));
        if interrupt::interrupted() {
            writeln!(out)?;
            return Ok(());
        }
        let now = counters(portfwd)?;
        if in_place {
            if second > 1 {
                // To the first line of the last table, and away with it.
                write!(out, "\x1b[{}F\x1b[J", RULES.len() + 1)?;
            }
            // A narrow terminal cuts lines: were they wrapped, there would be more to go back.
            write!(out, "\x1b[?7l{}\x1b[?7h", table(second, &now, &before))?;
        } else {
            writeln!(out, "{}", line(second, &now))?;
        }
        out.flush()?;
        before = now;
        if second == seconds {
            writeln!(out)?;
            break;
        }
    }
    Ok(())
}

/// The counters of a moment and of a second before, as a table with a line for each rule.
fn table(second: u64, now: &Counters, before: &Counters) -> String {
    let elapsed = format!("{second} s");
    let mut text = format!(
        "{elapsed:<8}{:>10}{:>9}{:>13}{:>12}{:>9}{:>13}\n",
        "forward", "/s", "bytes", "reply", "/s", "bytes"
    );
    for Rule { name, .. } in &RULES {
        let (now, before) = (of(now, name), of(before, name));
        let rate = |now: Count, before: Count| number(now.packets.saturating_sub(before.packets));
        // A string takes any text.
        let _ = writeln!(
            text,
            "{name:<8}{:>10}{:>9}{:>13}{:>12}{:>9}{:>13}",
            number(now.forward.packets),
            rate(now.forward, before.forward),
            number(now.forward.bytes),
            number(now.reply.packets),
            rate(now.reply, before.reply),
            number(now.reply.bytes),
        );
    }
    text
}

/// The counters as one line: packets of each rule, forward and reply.
fn line(second: u64, counters: &Counters) -> String {
    let rules = RULES.iter().map(|rule| {
        let Counts { forward, reply } = of(counters, rule.name);
        format!("{} {} + {}", rule.name, number(forward.packets), number(reply.packets))
    });
    format!("{second:>3} s  {}", rules.collect::<Vec<_>>().join("   "))
}

/// Ends the clients of a rule; what they did together.
fn stop_all(clients: Vec<Load>) -> Exchanges {
    sum(clients.into_iter().map(Load::stop))
}

fn sum(exchanges: impl Iterator<Item = Exchanges>) -> Exchanges {
    exchanges.fold(Exchanges::default(), |all, one| Exchanges {
        asked: all.asked + one.asked,
        answered: all.answered + one.answered,
    })
}

/// Waits until nothing moves any more: the last connections close after their clients have ended.
fn settle(portfwd: &Portfwd, client: &Capture<Tally>, server: &Capture<Tally>) -> Result<()> {
    let look = || -> Result<_> {
        let count = |tally: &Tally| tally.count(|key| matches!(key.protocol, 6 | 17));
        Ok((client.look(count), server.look(count), counters(portfwd)?))
    };
    let mut before = look()?;
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(250));
        let now = look()?;
        if now == before {
            break;
        }
        before = now;
    }
    Ok(())
}

/// What portfwd counted, by the rule's name.
type Counters = BTreeMap<String, Counts>;

fn of(counters: &Counters, name: &str) -> Counts {
    counters.get(name).copied().unwrap_or_default()
}

fn counters(portfwd: &Portfwd) -> Result<Counters> {
    let stats = portfwd.stats().with_context(|| format!("portfwd: {}", portfwd.stderr().trim()))?;
    read_counters(&stats).with_context(|| format!("counters are missing in {stats}"))
}

fn read_counters(stats: &Value) -> Option<Counters> {
    let count = |value: &Value| {
        Some(Count { packets: value["packets"].as_u64()?, bytes: value["bytes"].as_u64()? })
    };
    let rules = stats["rules"].as_array()?.iter();
    rules
        .map(|rule| {
            let counts =
                Counts { forward: count(&rule["forward"])?, reply: count(&rule["reply"])? };
            Some((rule["name"].as_str()?.to_owned(), counts))
        })
        .collect()
}

/// Shows for each rule and direction what was sent, what portfwd counted and what arrived; returns
/// what differs.
fn compare(
    out: &mut impl Write,
    counted: &Counters,
    client: &Tally,
    server: &Tally,
) -> Result<Vec<String>> {
    writeln!(
        out,
        "{:<7}{:<8}{:>9}{:>12}{:>11}{:>12}{:>10}",
        "rule", "", "sent", "bytes", "counted", "bytes", "arrived"
    )?;
    let mut differing = Vec::new();
    for rule in &RULES {
        let at_client = rule.at_client(client, Direction::Sent);
        let at_server = rule.at_server(server, Direction::Received);
        let counted = of(counted, rule.name);
        for (way, sent, counted, arrived) in [
            ("forward", at_client.forward, counted.forward, at_server.forward),
            ("reply", at_server.reply, counted.reply, at_client.reply),
        ] {
            let same = sent.packets > 0 && sent == counted && sent == arrived;
            writeln!(
                out,
                "{:<7}{way:<8}{:>9}{:>12}{:>11}{:>12}{:>10}  {}",
                rule.name,
                number(sent.packets),
                number(sent.bytes),
                number(counted.packets),
                number(counted.bytes),
                number(arrived.packets),
                if same { "OK" } else { "DIFFERS" }
            )?;
            if !same {
                differing.push(format!(
                    "{} {way}: sent {sent}; counted {counted}; arrived {arrived}",
                    rule.name
                ));
            }
        }
    }
    writeln!(out)?;
    Ok(differing)
}

/// A number with its thousands apart: 1,234,567.
fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_stand_apart() {
        let numbers = [0, 999, 1000, 12_345, 1_234_567].map(number);
        assert_eq!(numbers, ["0", "999", "1,000", "12,345", "1,234,567"]);
    }

    #[test]
    fn counters_are_read_by_rule() {
        let stats = serde_json::json!({ "rules": [{
            "name": "web",
            "forward": { "packets": 1, "bytes": 60 },
            "reply": { "packets": 2, "bytes": 120 },
        }]});
        let web = of(&read_counters(&stats).unwrap(), "web");
        assert_eq!(web.forward, Count { packets: 1, bytes: 60 });
        assert_eq!(web.reply, Count { packets: 2, bytes: 120 });
        assert_eq!(read_counters(&serde_json::json!({ "rules": [{ "name": "web" }] })), None);
    }

    #[test]
    fn a_packet_that_was_not_counted_differs() {
        let rule = &RULES[2];
        let (port, server_port) = rule.ports[0];
        let client = SocketAddr::new(rule.client, 40_000);
        let (mut at_client, mut at_server) = (Tally::default(), Tally::default());
        let outside = SocketAddr::new(rule.external, port);
        let inside = SocketAddr::new(rule.server, server_port);
        for (tally, far, forward, reply) in [
            (&mut at_client, outside, Direction::Sent, Direction::Received),
            (&mut at_server, inside, Direction::Received, Direction::Sent),
        ] {
            let key = |direction, source, destination| Key {
                direction,
                protocol: 17,
                source,
                destination,
            };
            tally.flows.insert(key(forward, client, far), Count { packets: 3, bytes: 300 });
            tally.flows.insert(key(reply, far, client), Count { packets: 2, bytes: 200 });
        }
        let mut counts = Counts {
            forward: Count { packets: 3, bytes: 300 },
            reply: Count { packets: 2, bytes: 200 },
        };
        let differing = |counts: Counts| {
            let counted = Counters::from([(rule.name.to_owned(), counts)]);
            let lines = compare(&mut Vec::new(), &counted, &at_client, &at_server).unwrap();
            lines.into_iter().filter(|line| line.starts_with("game ")).collect::<Vec<_>>()
        };
        assert_eq!(differing(counts), Vec::<String>::new());
        counts.reply.packets -= 1;
        assert_eq!(differing(counts).len(), 1);
        assert!(differing(counts)[0].starts_with("game reply: sent 2 packets"));
    }
}
