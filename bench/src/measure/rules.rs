//! What many rules cost: throughput, time to load them, time to add one.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use portfwd::rule::Rule;

use crate::contender::Contender;
use crate::measure::control::{self, Control};
use crate::measure::throughput::{FLOWS, SMALL, load, rate};
use crate::measure::{Bench, Reading};
use crate::proxy::Forward;
use crate::report::{Unit, median};
use crate::rig::{Rig, Wire};
use crate::rules::{Rules, last};
use crate::traffic::Direction;

pub const NAME: &str = "rules";

/// Those in the kernel. A proxy has a socket for each rule.
const CONTENDERS: [Contender; 7] = [
    Contender::Limit,
    Contender::Native,
    Contender::Generic,
    Contender::Routing,
    Contender::NftMap,
    Contender::NftChain,
    Contender::Iptables,
];

/// How many rules a chain is measured with: each flow's first packet walks through it, and with ten
/// times as many it takes minutes until all flows are known.
const LONGEST_CHAIN: u32 = 10_000;

pub fn run(bench: &mut Bench) -> Result<()> {
    let counts: &[u32] =
        if bench.options.quick { &[1, 10_000] } else { &[1, 100, 10_000, 100_000] };
    for count in counts {
        let rules = Rules::Single(*count);
        throughput(bench, rules, false);
        if *count > 1 {
            throughput(bench, rules, true);
        }
    }
    throughput(bench, Rules::Range, false);
    for count in counts {
        change(bench, *count);
    }
    Ok(())
}

/// Whether a contender is measured with so many rules.
fn takes(contender: Contender, rules: Rules) -> bool {
    let chain = matches!(contender, Contender::NftChain | Contender::Iptables);
    !matches!(rules, Rules::Single(count) if chain && count > LONGEST_CHAIN)
}

/// Packets per second, spread over all rules or all to the last of them.
fn throughput(bench: &mut Bench, rules: Rules, to_last: bool) {
    let case = if to_last { format!("{rules}, all to the last") } else { rules.to_string() };
    let quick = bench.options.quick;
    let few = |one: &Contender| !quick || matches!(one, Contender::Limit | Contender::Native);
    let contenders: Vec<_> =
        CONTENDERS.into_iter().filter(|one| takes(*one, rules) && few(one)).collect();
    bench.case(NAME, &case, &contenders, |options, contender| {
        let rig = Rig::new(Wire::Frames)?;
        let _running = contender.start(options, &rig, rules)?;
        let mut load = load(contender, rules, SMALL, FLOWS);
        if to_last {
            (load.sent_to, load.arrives_at) = (last(load.sent_to), last(load.arrives_at));
        }
        let value = rate(options, &rig, &[Direction::Forward], &load)?;
        Ok(vec![Reading { case: case.clone(), value, unit: Unit::PacketsPerSecond }])
    });
}

/// Time until the first packet can be forwarded, and time to add one rule more to those that are
/// there: with the contender's own command, and with portfwd in the process, as it has none yet.
fn change(bench: &mut Bench, count: u32) {
    let rules = Rules::Single(count);
    let (loading, adding) = (format!("load {rules}"), format!("add one to {rules}"));
    let changeable =
        [Contender::Native, Contender::NftMap, Contender::NftChain, Contender::Iptables];
    bench.case(NAME, &loading, &changeable, |options, contender| {
        let rig = Rig::new(Wire::Frames)?;
        let start = Instant::now();
        let _running = contender.start(options, &rig, rules)?;
        let value = start.elapsed().as_secs_f64();
        Ok(vec![Reading { case: loading.clone(), value, unit: Unit::Seconds }])
    });
    bench.case_of(NAME, &adding, &changeable, Contender::adds_with, |options, contender| {
        let rig = Rig::new(Wire::Frames)?;
        let another = rules.another().context("there is room for one rule more")?;
        let added = if contender == Contender::Native {
            rig.router.enter(|| add_in_process(&rig, rules, another))?
        } else {
            let _running = contender.start(options, &rig, rules)?;
            let start = Instant::now();
            contender.add(&rig, another)?;
            start.elapsed()
        };
        let value = added.as_secs_f64() * 1e3;
        Ok(vec![Reading { case: adding.clone(), value, unit: Unit::Milliseconds }])
    });
}

/// The rule comes and goes several times, not at once: a change right behind another one waits until the
/// kernel's readers have left what that one took out, which here takes 16 ms.
fn add_in_process(rig: &Rig, rules: Rules, another: Forward) -> Result<Duration> {
    const TIMES: usize = 5;
    const QUIET: Duration = Duration::from_millis(100);
    let mut all: Vec<Rule> =
        rules.iter().map(|rule| control::rule(&rule.spec())).collect::<Result<_>>()?;
    let mut control = Control::load(rig, &all)?;
    all.push(control::rule(&another.spec())?);
    let few = &all[..all.len() - 1];
    let mut times = Vec::new();
    for _ in 0..TIMES {
        thread::sleep(QUIET);
        let start = Instant::now();
        control.add(&all)?;
        times.push(start.elapsed().as_secs_f64());
        control.remove_after(few)?;
    }
    Ok(Duration::from_secs_f64(median(&times)))
}
