//! The measures, and what they have in common: rounds, waiting for an idle machine, progress.

mod control;
pub mod cost;
pub mod flood;
pub mod latency;
pub mod memory;
pub mod new_flows;
pub mod rules;
pub mod tcp;
pub mod throughput;
pub mod udp;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::Options;
use crate::contender::Contender;
use crate::report::{Report, Sample, Unit};

type Measure = fn(&mut Bench) -> Result<()>;

/// Every measure by its name.
pub const ALL: [(&str, Measure); 9] = [
    (throughput::NAME, throughput::run),
    (new_flows::NAME, new_flows::run),
    (rules::NAME, rules::run),
    (latency::NAME, latency::run),
    (tcp::NAME, tcp::run),
    (udp::NAME, udp::run),
    (cost::NAME, cost::run),
    (memory::NAME, memory::run),
    (flood::NAME, flood::run),
];

/// What is asked for, and what was found.
pub struct Bench {
    pub options: Options,
    pub report: Report,
    /// How often something was about to be measured, and how often of those the machine was busy
    /// with something else all the same.
    waits: u32,
    busy: u32,
}

/// One figure of one run.
pub struct Reading {
    pub case: String,
    pub value: f64,
    pub unit: Unit,
}

impl Options {
    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 5 })
    }

    /// How long one figure is measured.
    pub fn time(&self) -> Duration {
        Duration::from_millis(if self.quick { 150 } else { 1000 })
    }
}

impl Bench {
    pub fn new(options: Options) -> Self {
        Self { options, report: Report::default(), waits: 0, busy: 0 }
    }

    /// Whether a measure is asked for.
    pub fn wants(&self, measure: &str) -> bool {
        let measures = |name: &&String| ALL.iter().any(|(measure, _)| measure == *name);
        let mut named = self.options.only.iter().filter(measures).peekable();
        named.peek().is_none() || named.any(|name| name == measure)
    }

    /// Those contenders that are asked for and can be measured on this machine.
    pub fn contenders(&self, all: &[Contender]) -> Vec<Contender> {
        let called = |name: &String| Contender::ALL.iter().any(|one| one.is_called(name));
        let named: Vec<&String> = self.options.only.iter().filter(|name| called(name)).collect();
        let wanted =
            |one: &Contender| named.is_empty() || named.iter().any(|name| one.is_called(name));
        all.iter().copied().filter(|one| wanted(one) && one.absent().is_none()).collect()
    }

    /// Measures one case in rounds: every contender in turn, then again. Who fails once is refused in
    /// all that this case has figures of, and not asked again.
    pub fn case(
        &mut self,
        measure: &'static str,
        case: &str,
        contenders: &[Contender],
        run: impl FnMut(&Options, Contender) -> Result<Vec<Reading>>,
    ) {
        self.case_of(measure, case, contenders, Contender::name, run);
    }

    /// As [`case`](Self::case), with other names for what is measured.
    pub fn case_of(
        &mut self,
        measure: &'static str,
        case: &str,
        contenders: &[Contender],
        name: impl Fn(Contender) -> &'static str,
        mut run: impl FnMut(&Options, Contender) -> Result<Vec<Reading>>,
    ) {
        let rounds = self.options.rounds();
        let contenders = self.contenders(contenders);
        let first = self.report.samples.len();
        let mut refused = Vec::new();
        for round in 1..=rounds {
            for contender in &contenders {
                let name = name(*contender);
                if refused.iter().any(|(other, _)| *other == name) {
                    continue;
                }
                self.wait_for_idle();
                match run(&self.options, *contender) {
                    Ok(readings) => {
                        for Reading { case, value, unit } in readings {
                            let shown = unit.show(value);
                            progress(&format!(
                                "{measure}: {case}: {round}/{rounds} {name} {shown}"
                            ));
                            self.sample(measure, &case, name, round, (value, unit));
                        }
                    }
                    Err(error) => {
                        let why = format!("{error:#}").replace('\n', "; ");
                        progress(&format!("{measure}: {case}: {name} refused: {why}"));
                        refused.push((name, why));
                    }
                }
            }
        }
        self.report.settle(measure, case, first, rounds, &refused);
    }

    /// Waits a while for an idle machine.
    pub fn wait_for_idle(&mut self) {
        self.waits += 1;
        self.busy += u32::from(!becomes_idle(&self.options));
    }

    /// What a reader must know of the machine while it measured.
    pub fn busy_note(&self) -> Option<String> {
        let Self { waits, busy, .. } = self;
        (*busy > 0).then(|| {
            format!("the machine was busy with something else before {busy} of {waits} runs")
        })
    }

    pub fn sample(
        &mut self,
        measure: &'static str,
        case: &str,
        contender: &str,
        round: u32,
        (value, unit): (f64, Unit),
    ) {
        let (case, contender) = (case.to_owned(), contender.to_owned());
        self.report.samples.push(Sample { measure, case, contender, round, value, unit });
    }
}

/// Says on standard error what goes on.
pub fn progress(text: &str) {
    eprintln!("{text}");
}

/// Waits until nothing else runs on this machine, but not for ever; whether it came to that.
fn becomes_idle(options: &Options) -> bool {
    const WINDOW: Duration = Duration::from_millis(20);
    let patience = Duration::from_millis(if options.quick { 200 } else { 3000 });
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        let Some(before) = busy() else { return true };
        thread::sleep(WINDOW);
        // /proc/stat counts hundredths of a second: one tick in a window is a quarter of two cores.
        if busy().is_none_or(|now| now <= before + 1) {
            return true;
        }
    }
    false
}

/// Ticks that all cores were busy.
fn busy() -> Option<u64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    // cpu, then user nice system idle iowait irq softirq steal.
    let ticks: Vec<u64> =
        text.lines().next()?.split_whitespace().skip(1).flat_map(str::parse).collect();
    let idle: u64 = ticks.get(3..5)?.iter().sum();
    Some(ticks.iter().take(8).sum::<u64>() - idle)
}
