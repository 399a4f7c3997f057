//! UDP packets per second through one core.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portfwd_bench_ebpf::Received;

use crate::Options;
use crate::contender::Contender;
use crate::measure::{Bench, Reading};
use crate::report::Unit;
use crate::rig::{self, Rig, Wire};
use crate::rules::Rules;
use crate::traffic::{Direction, Generator, Load, Receiver};

pub const NAME: &str = "throughput";

/// Frames of 64 bytes with their Ethernet header: UDP with 22 bytes of payload. (A wire would add
/// 24 bytes: FCS, preamble, gap.)
pub const SMALL: u32 = 64;
/// The flows of most cases.
pub const FLOWS: u32 = 10_000;

const FORWARD: &[Direction] = &[Direction::Forward];
const REPLY: &[Direction] = &[Direction::Reply];
const BOTH: &[Direction] = &[Direction::Forward, Direction::Reply];

/// How long the rate is estimated.
const TRIAL: Duration = Duration::from_millis(50);

/// One case: which way, what frames (by what they are called), how many flows.
struct Case {
    name: &'static str,
    directions: &'static [Direction],
    frame: u32,
    flows: u32,
}

const CASES: [Case; 7] = [
    Case { name: "forward 64 B, 10,000 flows", directions: FORWARD, frame: SMALL, flows: FLOWS },
    Case { name: "forward 64 B, 1 flow", directions: FORWARD, frame: SMALL, flows: 1 },
    Case {
        name: "forward 64 B, 1,000,000 flows",
        directions: FORWARD,
        frame: SMALL,
        flows: 1_000_000,
    },
    Case { name: "reply 64 B, 10,000 flows", directions: REPLY, frame: SMALL, flows: FLOWS },
    Case { name: "both ways 64 B, 10,000 flows", directions: BOTH, frame: SMALL, flows: FLOWS },
    Case { name: "forward 512 B, 10,000 flows", directions: FORWARD, frame: 512, flows: FLOWS },
    // The MTU: an IP packet of 1,500 bytes.
    Case { name: "forward 1,500 B, 10,000 flows", directions: FORWARD, frame: 1514, flows: FLOWS },
];

pub fn run(bench: &mut Bench) -> Result<()> {
    let rules = Rules::Single(1);
    let quick = bench.options.quick;
    for (number, Case { name, directions, frame, flows }) in CASES.into_iter().enumerate() {
        let measured = |contender: &Contender| match contender {
            Contender::Limit | Contender::Native => true,
            Contender::Stateful => frame == SMALL,
            Contender::NftChain | Contender::Haproxy => false,
            // Replies of a proxy come from sockets that it opens, one for each client.
            Contender::Nginx | Contender::Realm => {
                directions == FORWARD && flows <= FLOWS && frame == SMALL
            }
            // A process for each client.
            Contender::Socat => directions == FORWARD && flows == 1,
            _ => !quick || number == 0,
        };
        if quick && (frame != SMALL || flows > FLOWS) {
            continue;
        }
        let contenders: Vec<Contender> = Contender::ALL.into_iter().filter(measured).collect();
        bench.case(NAME, name, &contenders, |options, contender| {
            let rig = Rig::new(Wire::Frames)?;
            let _running = contender.start_for(options, &rig, rules, flows)?;
            let load = load(contender, rules, frame, flows);
            let value = rate(options, &rig, directions, &load)?;
            Ok(vec![Reading { case: name.into(), value, unit: Unit::PacketsPerSecond }])
        });
    }
    Ok(())
}

/// What a contender with these rules is given to do: so many flows, or one for each service where
/// those are more. (Flows and services are gone through together: the one number divides the other.)
pub fn load(contender: Contender, rules: Rules, frame: u32, flows: u32) -> Load {
    let arrives_at = rules.backends();
    Load {
        flows: flows.max(arrives_at.count),
        frame,
        sent_to: if contender.translates() { rules.listened() } else { arrives_at },
        arrives_at,
        keeps_client: contender.proxy().is_none(),
        established: contender == Contender::Stateful,
    }
}

/// Packets that arrive in a second, all directions together, while as many are sent as one core
/// sends and forwards.
///
/// # Errors
///
/// Nothing arrives, or something that is not what it should be.
pub fn rate(options: &Options, rig: &Rig, directions: &[Direction], load: &Load) -> Result<f64> {
    let time = options.time();
    // Flows that never end have no second packet to be quicker.
    let flows = if load.flows == u32::MAX { 0 } else { load.flows };
    if load.established {
        for direction in [Direction::Forward, Direction::Reply, Direction::Forward] {
            let mut generator = Generator::new(rig, direction, load)?;
            on_path(|| generator.send(flows))?;
        }
    }
    let mut generators = Vec::new();
    let mut receivers = Vec::new();
    for direction in directions {
        generators.push(Generator::new(rig, *direction, load)?);
        receivers.push(Receiver::new(rig, *direction, load)?);
    }
    // Clients speak first: who tracks connections knows each flow by then.
    if directions == [Direction::Reply] {
        let mut clients = Generator::new(rig, Direction::Forward, load)?;
        on_path(|| clients.send(flows))?;
    }
    let first = generators.first_mut().context("no direction")?;
    let packets = on_path(|| {
        first.send(flows)?;
        lasting(time, |packets| first.send(packets))
    })?;

    // A proxy takes its time to open a socket for each client.
    let warm = if load.keeps_client { time / 5 } else { time * 3 };
    let stop = AtomicBool::new(false);
    let (before, after, elapsed) = thread::scope(|scope| {
        let floods: Vec<_> = generators
            .iter_mut()
            .map(|generator| {
                scope.spawn(|| -> Result<()> {
                    rig::pin(rig::PATH_CPU)?;
                    while !stop.load(Ordering::Relaxed) {
                        generator.send(packets)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let all = || receivers.iter().map(Receiver::received).collect::<Result<Vec<Received>>>();
        let look = || -> Result<(Vec<Received>, Vec<Received>, Duration)> {
            thread::sleep(warm);
            let (before, start) = (all()?, Instant::now());
            thread::sleep(time);
            let (after, elapsed) = (all()?, start.elapsed());
            Ok((before, after, elapsed))
        };
        let seen = look();
        stop.store(true, Ordering::Relaxed);
        for flood in floods {
            flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        seen
    })?;
    let mut sum = 0;
    for ((direction, before), after) in directions.iter().zip(&before).zip(&after) {
        sum += arrived(before, after).with_context(|| format!("{direction:?}").to_lowercase())?;
    }
    Ok(sum as f64 / elapsed.as_secs_f64())
}

/// How many packets arrived in between, all that were checked being right.
pub fn arrived(before: &Received, after: &Received) -> Result<u64> {
    let arrived = after.packets - before.packets;
    ensure!(arrived > 0, "no packet arrived");
    let Received { checked, wrong, .. } = after;
    ensure!(*checked > 0, "too few packets arrived to check one: {arrived}");
    ensure!(
        *wrong == 0,
        "{wrong} of {checked} packets that were checked are not what they should be"
    );
    Ok(arrived)
}

/// How many packets to send in one call, so that sending them lasts longer than `time`: calls take a
/// while to begin and to end, of which nothing should be in a figure. (The same while makes the
/// estimate too low, hence twice as many.)
pub fn lasting(time: Duration, mut send: impl FnMut(u32) -> Result<()>) -> Result<u32> {
    let mut trial = 1024;
    loop {
        let start = Instant::now();
        send(trial)?;
        let took = start.elapsed();
        if took >= TRIAL {
            let longer = 2.0 * time.as_secs_f64() / took.as_secs_f64();
            return Ok((f64::from(trial) * longer) as u32);
        }
        trial *= 2;
    }
}

/// Does something on the core of the data path.
fn on_path<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pinned = || {
        rig::pin(rig::PATH_CPU)?;
        work()
    };
    thread::scope(|scope| scope.spawn(pinned).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_direction_is_checked() {
        let none = Received::default();
        let some = Received { packets: 640, checked: 10, wrong: 0 };
        assert_eq!(arrived(&none, &some).unwrap(), 640);
        assert_eq!(arrived(&some, &some).unwrap_err().to_string(), "no packet arrived");
        let unchecked = Received { packets: 5, ..none };
        assert!(arrived(&none, &unchecked).unwrap_err().to_string().contains("too few"));
        let wrong = Received { wrong: 1, ..some };
        assert!(arrived(&none, &wrong).unwrap_err().to_string().starts_with("1 of 10 packets"));
    }

    #[test]
    fn a_call_lasts_longer_than_what_is_measured() {
        let mut sent = 0;
        let packets = lasting(TRIAL * 3, |packets| {
            sent = packets;
            thread::sleep(if packets < 4096 { TRIAL / 10 } else { TRIAL });
            Ok(())
        });
        // Six times what took as long as a trial, or a little less: sleep oversleeps.
        let packets = packets.unwrap();
        assert_eq!(sent, 4096);
        assert!((3 * 4096..=6 * 4096).contains(&packets), "{packets}");
    }
}
