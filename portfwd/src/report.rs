//! What the daemon tells of its rules: from maps and rules to the API's types.

use std::collections::BTreeMap;
use std::time::SystemTime;

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Dropped, Jiffies, Passed, Tally, ToStack};

use crate::api::{Count, Flows, InterfaceInfo, RuleInfo, RuleStats, Stats, Verdicts};
use crate::compile::Compiler;
use crate::datapath::Datapath;
use crate::rule::Rule;

/// A role's name in output.
pub fn role(role: Role) -> &'static str {
    match role {
        Role::External => "external",
        Role::Internal => "internal",
        Role::Both => "both",
    }
}

/// A rule as the user wrote it.
pub fn rule(rule: &Rule) -> RuleInfo {
    RuleInfo {
        name: rule.name.clone(),
        protocol: rule.protocol.to_string(),
        listen: rule.listen.to_string(),
        to: rule.to.iter().map(ToString::to_string).collect(),
        source: rule.source.to_string(),
        stateful: false,
    }
}

/// All counters.
///
/// # Errors
///
/// A map cannot be read.
pub fn stats(
    rules: &[Rule],
    compiler: &Compiler,
    datapath: &Datapath,
    interfaces: Vec<InterfaceInfo>,
) -> anyhow::Result<Stats> {
    let clock = datapath.clock();
    let mut verdicts = Verdicts {
        passed: reasons(Passed::ALL, Passed::name, &datapath.passed()?),
        dropped: reasons(Dropped::ALL, Dropped::name, &[0; Dropped::COUNT]),
    };
    let mut rows = Vec::with_capacity(rules.len());
    for each in rules {
        let Some(row) = compiler.counter(&each.name) else { continue };
        let counts = datapath.counts(row)?;
        let dropped = reasons(Dropped::ALL, Dropped::name, &counts.dropped);
        for (reason, count) in &dropped {
            *verdicts.dropped.entry(reason.clone()).or_default() += count;
        }
        rows.push(RuleStats {
            rule: rule(each),
            forward: count(counts.forward),
            reply: count(counts.reply),
            to_stack: reasons(ToStack::ALL, ToStack::name, &counts.to_stack),
            dropped,
            flows: Flows::default(),
            last_packet: (counts.last != Jiffies::default()).then(|| {
                let when = SystemTime::now() - clock.ago(counts.last);
                humantime::format_rfc3339_millis(when).to_string()
            }),
        });
    }
    Ok(Stats { rules: rows, verdicts, interfaces })
}

fn count(Tally { packets, bytes }: Tally) -> Count {
    Count { packets, bytes }
}

/// Counts under their reasons' names.
fn reasons<T: Copy>(
    all: &[T],
    name: impl Fn(T) -> &'static str,
    counts: &[u64],
) -> BTreeMap<String, u64> {
    all.iter().zip(counts).map(|(reason, count)| (name(*reason).to_owned(), *count)).collect()
}
