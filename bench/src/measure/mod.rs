//! The measures, and what they have in common: rounds, waiting for an idle machine, progress.

pub mod cost;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::Options;
use crate::report::{Report, Sample, Unit};

type Measure = fn(&mut Bench) -> Result<()>;

/// Every measure by its name.
pub const ALL: [(&str, Measure); 1] = [(cost::NAME, cost::run)];

/// What is asked for, and what was found.
pub struct Bench {
    pub options: Options,
    pub report: Report,
}

impl Options {
    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 5 })
    }
}

impl Bench {
    pub fn new(options: Options) -> Self {
        Self { options, report: Report::default() }
    }

    /// Whether a measure is asked for.
    pub fn wants(&self, measure: &str) -> bool {
        let measures = |name: &&String| ALL.iter().any(|(measure, _)| measure == *name);
        let mut named = self.options.only.iter().filter(measures).peekable();
        named.peek().is_none() || named.any(|name| name == measure)
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

/// Waits until nothing else runs on this machine, but not for ever.
pub fn wait_for_idle() {
    const WINDOW: Duration = Duration::from_millis(20);
    const PATIENCE: Duration = Duration::from_secs(3);
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let Some(before) = busy() else { return };
        thread::sleep(WINDOW);
        // /proc/stat counts hundredths of a second: one tick in a window is a tenth of two cores.
        if busy().is_none_or(|now| now <= before + 1) {
            return;
        }
    }
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
