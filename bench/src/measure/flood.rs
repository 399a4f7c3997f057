//! What a flood of invented clients does to flows that are there, what memory flows take, and what becomes of
//! clients for whom there are not ports enough.

use std::ops::RangeInclusive;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use portfwd_bench_ebpf::Services;
use portfwd_tests::Portfwd;

use crate::contender::{self, Contender, Running};
use crate::measure::memory::maps;
use crate::measure::throughput::{SMALL, load};
use crate::measure::{Bench, Reading};
use crate::report::Unit;
use crate::rig::{self, Rig, Wire};
use crate::rules::{Rules, thousands};
use crate::traffic::{Direction, Generator, Load, Receiver};

pub const NAME: &str = "flood";

/// Established flows that go on.
const ESTABLISHED: u32 = 1000;
/// Each of them has an answer after so many invented ones.
const BETWEEN: u32 = 50_000;

pub fn run(bench: &mut Bench) -> Result<()> {
    let (rounds, flows) = if bench.options.quick { (4, 10_000) } else { (100, 1_000_000) };
    let case =
        format!("{} flows and {} new ones", thousands(ESTABLISHED), thousands(rounds * BETWEEN));
    bench.case(NAME, &case, &[Contender::Stateful], |options, contender| {
        let rig = Rig::new(Wire::Frames)?;
        let running = contender.start(options, &rig, Rules::Single(1))?;
        flood(&rig, &running, rounds, &case)
    });
    let case = format!("{} flows", thousands(flows));
    // Minutes for each round, so only for who asks for it.
    let waits = bench.options.only.iter().any(|name| name == NAME) && !bench.options.quick;
    bench.case(NAME, &case, &[Contender::Stateful], |options, contender| {
        let rig = Rig::new(Wire::Frames)?;
        let running = contender.start_for(options, &rig, Rules::Single(1), flows)?;
        many(&rig, &running, flows, waits, &case)
    });
    let clients = if bench.options.quick { 100_000 } else { 1_000_000 };
    let case =
        format!("{} clients for {} ports", thousands(clients), thousands(PORTS.len() as u32));
    bench.case(NAME, &case, &[Contender::Stateful], |options, _| {
        let rig = Rig::new(Wire::Frames)?;
        let rules = Rules::Single(1);
        let running = contender::portfwd(&options.portfwd, &rig, &rules.masquerade_toml(PORTS))?;
        exhaust(&rig, &running, clients, &case)
    });
    Ok(())
}

/// Those for masquerade, when they are to be too few.
const PORTS: RangeInclusive<u16> = 50_000..=51_023;

/// More clients than there are ports: each packet is either translated or counted as `no_port`.
fn exhaust(rig: &Rig, running: &Running, clients: u32, case: &str) -> Result<Vec<Reading>> {
    let Running::Portfwd { portfwd, .. } = running else { bail!("this is not portfwd") };
    let reading =
        |what: &str, value, unit| Reading { case: format!("{case}, {what}"), value, unit };
    let load = load(Contender::Stateful, Rules::Single(1), SMALL, clients);
    let _receivers = receivers(rig, &load)?;
    let began = maps(portfwd)?;
    let start = Instant::now();
    Generator::new(rig, Direction::Forward, &load)?.send(clients)?;
    let took = start.elapsed();
    let deadline = Instant::now() + Duration::from_secs(5);
    let refused = loop {
        let stats = portfwd.stats()?;
        let rule = &stats["rules"][0];
        let counts = [&rule["forward"]["packets"], &rule["dropped"]["no_port"]];
        let [translated, refused] = counts.map(|count| count.as_u64().unwrap_or_default());
        if translated + refused == u64::from(clients) {
            break refused;
        }
        ensure!(
            Instant::now() < deadline,
            "of {clients} packets {translated} were translated and {refused} refused"
        );
        thread::sleep(Duration::from_millis(20));
    };
    ensure!(refused > 0, "there were ports for all {clients} clients");
    Ok(vec![
        reading("packets", f64::from(clients) / took.as_secs_f64(), Unit::PacketsPerSecond),
        reading("maps before", began as f64, Unit::Bytes),
        reading("maps after", maps(portfwd)? as f64, Unit::Bytes),
    ])
}

/// Those of the rule that shares the backend's port with the one that is flooded.
fn established() -> Load {
    let sent_to = Services { address: rig::EXTERNAL.to_bits(), port: 9, count: 1 };
    Load { sent_to, ..load(Contender::Stateful, Rules::Single(1), SMALL, ESTABLISHED) }
}

fn flood(rig: &Rig, running: &Running, rounds: u32, case: &str) -> Result<Vec<Reading>> {
    let Running::Portfwd { portfwd, .. } = running else { bail!("this is not portfwd") };
    let load = established();
    let new = self::load(Contender::Stateful, Rules::Single(1), SMALL, u32::MAX);
    let _receivers = receivers(rig, &new)?;
    establish(rig, &load)?;
    let before = [2, 1].map(|packets| u64::from(packets * ESTABLISHED));
    arrive(portfwd, before)?;
    let began = maps(portfwd)?;
    let mut new = Generator::new(rig, Direction::Forward, &new)?;
    let mut reply = Generator::new(rig, Direction::Reply, &load)?;
    let mut flooded = Duration::ZERO;
    for _ in 0..rounds {
        let start = Instant::now();
        new.send(BETWEEN)?;
        flooded += start.elapsed();
        reply.send(ESTABLISHED)?;
    }
    // Clients have one generator at a time.
    drop(new);
    Generator::new(rig, Direction::Forward, &load)?.send(ESTABLISHED)?;
    let [forward, reply] = before;
    arrive(portfwd, [forward + u64::from(ESTABLISHED), reply + u64::from(rounds * ESTABLISHED)])?;
    let reading =
        |what: &str, value, unit| Reading { case: format!("{case}, {what}"), value, unit };
    let speed = f64::from(rounds * BETWEEN) / flooded.as_secs_f64();
    Ok(vec![
        reading("new ones", speed, Unit::PacketsPerSecond),
        reading("maps before", began as f64, Unit::Bytes),
        reading("maps after", maps(portfwd)? as f64, Unit::Bytes),
    ])
}

fn many(rig: &Rig, running: &Running, flows: u32, waits: bool, case: &str) -> Result<Vec<Reading>> {
    let Running::Portfwd { portfwd, .. } = running else { bail!("this is not portfwd") };
    let reading =
        |what: &str, value, unit| Reading { case: format!("{case}, {what}"), value, unit };
    let bytes =
        |what: &str| -> Result<Reading> { Ok(reading(what, maps(portfwd)? as f64, Unit::Bytes)) };
    let mut readings: Vec<Reading> = vec![bytes("maps before")?];
    let load = load(Contender::Stateful, Rules::Single(1), SMALL, flows);
    let _receivers = receivers(rig, &load)?;
    establish(rig, &load)?;
    let there = active(portfwd)?;
    // The last packets may be on their way.
    ensure!(
        there <= u64::from(flows) && there + 1000 > u64::from(flows),
        "{there} of {flows} flows"
    );
    readings.push(bytes("maps with them")?);
    if waits {
        // Idle for five minutes, they end; what comes late is swept a moment after.
        let start = Instant::now();
        while active(portfwd)? > 0 {
            ensure!(start.elapsed() < Duration::from_secs(400), "they do not end");
            thread::sleep(Duration::from_secs(1));
        }
        readings.push(reading("until they are gone", start.elapsed().as_secs_f64(), Unit::Seconds));
        readings.push(bytes("maps after them")?);
    }
    Ok(readings)
}

/// They drop what arrives: the hosts themselves would say that nobody listens.
fn receivers(rig: &Rig, load: &Load) -> Result<[Receiver; 2]> {
    let [forward, reply] =
        [Direction::Forward, Direction::Reply].map(|direction| Receiver::new(rig, direction, load));
    Ok([forward?, reply?])
}

/// Each flow has a packet, an answer and another packet.
fn establish(rig: &Rig, load: &Load) -> Result<()> {
    for direction in [Direction::Forward, Direction::Reply, Direction::Forward] {
        Generator::new(rig, direction, load)?.send(load.flows)?;
    }
    Ok(())
}

/// Waits until so many packets of the established flows went to and from the backend, all that were sent.
fn arrive(portfwd: &Portfwd, sent: [u64; 2]) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let went = counted(portfwd)?;
        if went == sent {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "of {sent:?} packets to and from the backend {went:?} got through"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Packets of the established flows, each way.
fn counted(portfwd: &Portfwd) -> Result<[u64; 2]> {
    let stats = portfwd.stats()?;
    let rules = stats["rules"].as_array().context("no rules")?;
    let rule = rules.iter().find(|rule| rule["name"] == "twin").context("no such rule")?;
    let packets = |direction: &str| rule[direction]["packets"].as_u64().context("no packets");
    Ok([packets("forward")?, packets("reply")?])
}

/// Flows that are there.
fn active(portfwd: &Portfwd) -> Result<u64> {
    let stats = portfwd.stats()?;
    let rules = stats["rules"].as_array().context("no rules")?;
    rules.iter().map(|rule| rule["flows"]["active"].as_u64().context("no flows")).sum()
}
