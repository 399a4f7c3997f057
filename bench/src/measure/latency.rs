//! Round trips of UDP through a contender, idle and under load.
//!
//! Client, router and server share one core, and what is on its way waits for that core: that is
//! the latency measured here. Packets are those of [`crate::traffic`], 64-byte frames of [`FLOWS`]
//! clients. One packet in [`BATCH`] is a probe: it carries the time at which it was due, an XDP
//! program at the server's end sends it back, and one at the client's end takes the time. So a probe
//! meets the contender twice, forward and reply, but no socket: those, and the scheduler that wakes
//! who waits for them, cost 8 us and scatter more than what is measured, the same for all.
//!
//! What makes it fair:
//!
//! - Packets come in batches, as a network card's interrupt brings them, and batches come at random
//!   (exponential gaps), as those of many clients do. They queue when some come close together: that
//!   is what load does to latency. With regular gaps they would never wait for each other.
//! - Batches come when they are due, whether the last one is through or not, and a probe's time
//!   begins when it was due. A core that is late, because it is busy forwarding, cannot hide it.
//! - The load is a share of what this contender moves at most, on this rig, in this run, with
//!   generator, receiver and probes included: they share its core. Only the third table compares at
//!   the same packet rate: 80 % of nftables' maximum in the same round.
//! - Proxies have the other core for their process. The kernel's part of their work stays here.
//! - A probe that does not come back counts as slower than all that do: where as many are lost as
//!   a percentile leaves out in any round, there is no such figure, and a note says how many.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::maps::{Array, PerCpuArray};
use aya::programs::xdp::XdpMode;
use portfwd_bench_ebpf::{BUCKETS, GAPS, Pace, Received, least_of};

use crate::Options;
use crate::contender::{Contender, Running};
use crate::measure::throughput::{SMALL, arrived, lasting, load};
use crate::measure::{Bench, Reading};
use crate::report::Unit;
use crate::rig::{self, Rig, Wire};
use crate::rules::Rules;
use crate::traffic::{self, Direction, Object, Plain};

pub const NAME: &str = "latency";

/// Clients: few enough that each may be a process, as socat has it.
const FLOWS: u32 = 64;
/// Packets that come at once. Idle, one does.
const BATCH: u32 = 32;
/// From one probe to the next when there is nothing else: 20,000 a second.
const IDLE: Duration = Duration::from_micros(50);
/// Frames that are sent, or not being due dropped, before anyone looks at the clock again.
const CHUNK: u32 = 262_144;
/// How long what is under way may take to arrive.
const REST: Duration = Duration::from_millis(100);

const CONTENDERS: [Contender; 9] = [
    Contender::Limit,
    Contender::Native,
    Contender::Generic,
    Contender::Routing,
    Contender::NftMap,
    Contender::Iptables,
    Contender::Nginx,
    Contender::Socat,
    Contender::Realm,
];

/// Those that are compared at one packet rate. nftables comes first: the rate is its own.
const AT_ONE_RATE: [Contender; 5] = [
    Contender::NftMap,
    Contender::Limit,
    Contender::Native,
    Contender::Generic,
    Contender::Routing,
];

const PERCENTILES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

pub fn run(bench: &mut Bench) -> Result<()> {
    let mut losses = Losses::default();
    bench.case(NAME, "round trip", &CONTENDERS, |options, contender| {
        let mut path = Path::new(options, contender)?;
        path.on_core(|path| {
            let most = path.most(options.time())?;
            let maximum = "packets per second at most, 64 flows".into();
            let mut readings =
                vec![Reading { case: maximum, value: most, unit: Unit::PacketsPerSecond }];
            let loads = [
                ("idle", None),
                ("50 % of its own maximum", Some(0.5 * most)),
                ("80 % of its own maximum", Some(0.8 * most)),
            ];
            for (name, rate) in loads {
                let trips = path.round_trips(rate, options.time())?;
                readings.extend(trips.readings(name)?);
                losses.add(contender, name, &trips);
            }
            Ok(readings)
        })
    });

    if bench.contenders(&AT_ONE_RATE).first() == Some(&AT_ONE_RATE[0]) {
        at_one_rate(bench, &mut losses);
    } else {
        let note = "latency, 80 % of nftables' maximum: not measured without nftables";
        bench.report.notes.push(note.into());
    }
    bench.report.notes.extend(losses.notes());
    Ok(())
}

fn at_one_rate(bench: &mut Bench, losses: &mut Losses) {
    let case = "80 % of nftables' maximum";
    let mut rate = None;
    bench.case(NAME, case, &AT_ONE_RATE, |options, contender| {
        // Each round has its own. If nftables is refused, there is none from then on.
        if contender == AT_ONE_RATE[0] {
            rate = None;
        }
        let mut path = Path::new(options, contender)?;
        path.on_core(|path| {
            let most = path.most(options.time())?;
            if contender == Contender::NftMap {
                rate = Some(0.8 * most);
            }
            let rate = rate.context("nftables, whose rate this is, was not measured")?;
            let trips = path.round_trips(Some(rate), options.time())?;
            losses.add(contender, case, &trips);
            trips.readings(case)
        })
    });
}

/// A contender on a rig of its own, between a generator and what sends probes back.
struct Path {
    generator: Ebpf,
    server: Ebpf,
    client: Ebpf,
    /// Before the rig: it ends first.
    _running: Running,
    _rig: Rig,
}

impl Path {
    fn new(options: &Options, contender: Contender) -> Result<Self> {
        let rules = Rules::Single(2);
        let rig = Rig::new(Wire::Frames)?;
        let running = contender.start(options, &rig, rules)?;
        let load = load(contender, rules, SMALL, FLOWS);
        let generator = traffic::sender("paced", &rig, Direction::Forward, &load)?;
        let end = |program, direction, namespace| -> Result<Ebpf> {
            let expected = Plain(load.expected(direction));
            let mut object = Object::new();
            object.0.override_global("EXPECTED", &expected, true);
            let mut ebpf = object.load(&[program])?;
            traffic::set_device(&mut ebpf, namespace, "eth0")?;
            traffic::attach(&mut ebpf, program, namespace, "eth0", XdpMode::Driver)?;
            Ok(ebpf)
        };
        let server = end("echo", Direction::Forward, &rig.server)?;
        let client = end("record", Direction::Reply, &rig.client)?;
        Ok(Self { generator, server, client, _running: running, _rig: rig })
    }

    /// Does work in a thread that stays on the core of the path, and that no other process of this
    /// machine keeps from it.
    fn on_core<T: Send>(&mut self, work: impl FnOnce(&mut Self) -> Result<T> + Send) -> Result<T> {
        let work = || {
            rig::pin(rig::PATH_CPU)?;
            // SAFETY: a bare system call, which on Linux is for this thread alone. Where it is
            // refused, as in some containers, figures scatter a little more.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
            work(self)
        };
        thread::scope(|scope| {
            scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Packets per second that arrive when the core does nothing else: in the middle of one call, as
    /// calls take a while to begin and to end.
    fn most(&mut self, time: Duration) -> Result<f64> {
        let (warm, time) = (time / 10, time / 2);
        self.set_pace(BATCH, &[0; GAPS as usize])?;
        let Self { generator, server, .. } = self;
        let send = |frames| traffic::run(generator, "paced", &[0; SMALL as usize], frames, BATCH);
        // Flows are known and neighbours resolved after the first packets.
        let frames = lasting(warm + time, send)?;
        let stop = AtomicBool::new(false);
        let seen = thread::scope(|scope| {
            let watcher = scope.spawn(|| -> Result<(Received, Received, Duration)> {
                rig::pin(rig::proxy_cpu())?;
                let look = || {
                    thread::sleep(warm);
                    let (before, start) = (traffic::received(server)?, Instant::now());
                    thread::sleep(time);
                    Ok((before, traffic::received(server)?, start.elapsed()))
                };
                let seen = look();
                stop.store(true, Ordering::Relaxed);
                seen
            });
            while !stop.load(Ordering::Relaxed) {
                send(frames)?;
            }
            watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        thread::sleep(REST);
        let (before, after, elapsed) = seen?;
        Ok(arrived(&before, &after)? as f64 / elapsed.as_secs_f64())
    }

    /// Round trips at so many packets per second, or without load.
    fn round_trips(&mut self, rate: Option<f64>, time: Duration) -> Result<RoundTrips> {
        let (batch, gaps) = match rate {
            Some(rate) => (BATCH, gaps(f64::from(BATCH) / rate)),
            // A little longer, for 20,000 probes a second at least.
            None => (1, vec![IDLE.as_nanos() as u32; GAPS as usize]),
        };
        let before = self.latencies()?;
        let wrong = traffic::received(&self.client)?.wrong;
        self.set_pace(batch, &gaps)?;
        let (start, time) = (Instant::now(), time.mul_f64(1.05));
        while start.elapsed() < time {
            traffic::run(&self.generator, "paced", &[0; SMALL as usize], CHUNK, batch)?;
        }
        let pace: Array<_, Plain<Pace>> = self.generator.map("PACE").context("PACE")?.try_into()?;
        let sent = pace.get(&0, 0)?.0.probes;
        thread::sleep(REST);
        let wrong = traffic::received(&self.client)?.wrong - wrong;
        ensure!(wrong == 0, "{wrong} probes came back from elsewhere than they were sent to");
        let counts = self.latencies()?.into_iter().zip(before).map(|(now, then)| now - then);
        Ok(RoundTrips { sent, counts: counts.collect() })
    }

    /// Has batches come with these gaps between them, in nanoseconds, one drawn at a time; the first
    /// at once.
    fn set_pace(&mut self, batch: u32, gaps: &[u32]) -> Result<()> {
        let map = self.generator.map_mut("DRAWN").context("DRAWN")?;
        let mut drawn: Array<_, u32> = map.try_into()?;
        for (index, gap) in (0..).zip(gaps) {
            drawn.set(index, gap, 0)?;
        }
        let map = self.generator.map_mut("PACE").context("PACE")?;
        let mut pace: Array<_, Plain<Pace>> = map.try_into()?;
        Ok(pace.set(0, Plain(Pace { batch, ..Pace::default() }), 0)?)
    }

    /// How often each latency was met so far.
    fn latencies(&self) -> Result<Vec<u64>> {
        let map = self.client.map("LATENCIES").context("LATENCIES")?;
        let map: PerCpuArray<_, u64> = map.try_into()?;
        (0..BUCKETS).map(|bucket| Ok(map.get(&bucket, 0)?.iter().sum())).collect()
    }
}

/// Exponential gaps with this mean, in seconds, given in nanoseconds: the middles of as many equally
/// likely parts of the distribution.
fn gaps(mean: f64) -> Vec<u32> {
    let gap = |part: u32| -mean * (1.0 - (f64::from(part) + 0.5) / f64::from(GAPS)).ln();
    (0..GAPS).map(|part| (1e9 * gap(part)) as u32).collect()
}

/// What became of probes.
struct RoundTrips {
    sent: u64,
    /// How often each latency was met, by its bucket.
    counts: Vec<u64>,
}

impl RoundTrips {
    fn readings(&self, load: &str) -> Result<Vec<Reading>> {
        let figures: Vec<_> = PERCENTILES
            .iter()
            .filter_map(|(name, share)| {
                let value = self.percentile(*share)? as f64 / 1e3;
                Some(Reading { case: format!("{name}, {load}"), value, unit: Unit::Microseconds })
            })
            .collect();
        ensure!(!figures.is_empty(), "{load}: {} of {} probes were lost", self.lost(), self.sent);
        Ok(figures)
    }

    /// Nanoseconds that this share of all probes took at most; none if they were lost.
    fn percentile(&self, share: f64) -> Option<u64> {
        let rank = (share * self.sent as f64).ceil() as u64;
        let mut so_far = 0;
        let mut buckets = (0..).zip(&self.counts);
        let (bucket, _) = buckets.find(|(_, count)| {
            so_far += **count;
            so_far >= rank.max(1)
        })?;
        Some(least_of(bucket))
    }

    fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.counts.iter().sum())
    }
}

/// Probes lost and sent, in all rounds, by who lost them at which load.
#[derive(Default)]
struct Losses(BTreeMap<(&'static str, &'static str), (u64, u64)>);

impl Losses {
    fn add(&mut self, contender: Contender, load: &'static str, trips: &RoundTrips) {
        let (lost, sent) = self.0.entry((load, contender.name())).or_default();
        *lost += trips.lost();
        *sent += trips.sent;
    }

    /// What a reader must know besides the figures.
    fn notes(&self) -> impl Iterator<Item = String> {
        let lossy = self.0.iter().filter(|(_, (lost, _))| *lost > 0);
        lossy.map(|((load, name), (lost, sent))| {
            format!("latency, {load}: {name} lost {lost} of {sent} probes")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portfwd_bench_ebpf::bucket;

    fn trips(sent: u64, latencies: &[(u64, u64)]) -> RoundTrips {
        let mut counts = vec![0; BUCKETS as usize];
        for (latency, count) in latencies {
            counts[bucket(*latency) as usize] += count;
        }
        RoundTrips { sent, counts }
    }

    #[test]
    fn percentiles_are_of_all_probes_sent() {
        let all = trips(1000, &[(100, 600), (200, 395), (4096, 5)]);
        assert_eq!(PERCENTILES.map(|(_, share)| all.percentile(share)), [100, 200, 4096].map(Some));
        let mut losses = Losses::default();
        losses.add(Contender::Limit, "idle", &all);
        assert_eq!(losses.notes().count(), 0);
    }

    #[test]
    fn lost_probes_are_the_slowest() {
        let lossy = trips(1000, &[(100, 995)]);
        assert_eq!(lossy.percentile(0.99), Some(100));
        assert_eq!(lossy.percentile(0.999), None);
        assert_eq!(lossy.readings("idle").unwrap().len(), 2);
        let mut losses = Losses::default();
        losses.add(Contender::Limit, "idle", &lossy);
        losses.add(Contender::Limit, "idle", &lossy);
        let notes: Vec<_> = losses.notes().collect();
        assert_eq!(notes, ["latency, idle: limit lost 10 of 2000 probes"]);
        let error = trips(10, &[]).readings("idle").err().unwrap();
        assert_eq!(error.to_string(), "idle: 10 of 10 probes were lost");
    }

    #[test]
    fn gaps_have_the_mean_asked_for() {
        let gaps = gaps(50e-6);
        let mean = gaps.iter().copied().map(f64::from).sum::<f64>() / f64::from(GAPS);
        assert!((49_900.0..50_000.0).contains(&mean), "{mean}");
        // As many batches come early as late, but some come very late.
        assert!(gaps[GAPS as usize / 2] < 36_000 && gaps[GAPS as usize - 1] > 400_000);
    }
}
