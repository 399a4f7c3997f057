//! What the daemon tells of its rules: from maps and rules to the API's types.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Dropped, Jiffies, Passed, Tally, ToStack};
use serde::ser::{Serialize, SerializeStruct as _, Serializer};

use crate::api::{Count, Flows, InterfaceInfo, RuleInfo, RuleStats, Verdicts};
use crate::compile::Compiler;
use crate::config::Config;
use crate::datapath::{Clock, Counts, Datapath};
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

/// The rules and interfaces, written as [`List`](crate::api::List).
///
/// This and [`Figures`] make a rule's row when it is written: all rows of 100,000 rules are 150 MB.
#[derive(Debug)]
pub struct Listed {
    pub config: Arc<Config>,
    pub interfaces: Vec<InterfaceInfo>,
}

impl Serialize for Listed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_struct("List", 2)?;
        list.serialize_field("rules", &Rows(|| self.config.rules.iter().map(rule)))?;
        list.serialize_field("interfaces", &self.interfaces)?;
        list.end()
    }
}

/// All counters at one moment, written as [`Stats`](crate::api::Stats).
#[derive(Debug)]
pub struct Figures {
    config: Arc<Config>,
    /// By the rule's place.
    counts: Vec<(usize, Counts)>,
    passed: [u64; Passed::COUNT],
    interfaces: Vec<InterfaceInfo>,
    clock: Clock,
    /// When they were read, by both clocks.
    read: (Instant, SystemTime),
}

impl Figures {
    /// Reads all counters.
    ///
    /// # Errors
    ///
    /// A map cannot be read.
    pub fn read(
        config: Arc<Config>,
        compiler: &Compiler,
        datapath: &Datapath,
        interfaces: Vec<InterfaceInfo>,
    ) -> anyhow::Result<Self> {
        let clock = datapath.clock();
        let passed = datapath.passed()?;
        let mut counts = Vec::with_capacity(config.rules.len());
        for (place, rule) in config.rules.iter().enumerate() {
            let Some(row) = compiler.counter(&rule.name) else { continue };
            counts.push((place, datapath.counts(row)?));
        }
        let read = (Instant::now(), SystemTime::now());
        Ok(Self { config, counts, passed, interfaces, clock, read })
    }

    /// Each rule's name and counts.
    pub fn by_rule(&self) -> impl Iterator<Item = (&str, &Counts)> {
        self.counts.iter().map(|(place, counts)| (self.config.rules[*place].name.as_str(), counts))
    }

    /// Packets that passed untouched, by reason.
    pub fn passed(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Passed::ALL.iter().map(|reason| reason.name()).zip(self.passed)
    }

    fn rows(&self) -> impl Iterator<Item = RuleStats> {
        self.counts.iter().map(|(place, counts)| RuleStats {
            rule: rule(&self.config.rules[*place]),
            forward: count(counts.forward),
            reply: count(counts.reply),
            to_stack: reasons(ToStack::ALL, ToStack::name, &counts.to_stack),
            dropped: reasons(Dropped::ALL, Dropped::name, &counts.dropped),
            answered: counts.answered,
            flows: Flows::default(),
            last_packet: (counts.last != Jiffies::default()).then(|| {
                let when = self.read.1 - self.clock.between(counts.last, self.read.0);
                humantime::format_rfc3339_millis(when).to_string()
            }),
        })
    }

    fn verdicts(&self) -> Verdicts {
        let mut dropped = [0; Dropped::COUNT];
        for (_, counts) in &self.counts {
            dropped.iter_mut().zip(counts.dropped).for_each(|(sum, count)| *sum += count);
        }
        Verdicts {
            passed: reasons(Passed::ALL, Passed::name, &self.passed),
            dropped: reasons(Dropped::ALL, Dropped::name, &dropped),
        }
    }
}

impl Serialize for Figures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut stats = serializer.serialize_struct("Stats", 3)?;
        stats.serialize_field("rules", &Rows(|| self.rows()))?;
        stats.serialize_field("verdicts", &self.verdicts())?;
        stats.serialize_field("interfaces", &self.interfaces)?;
        stats.end()
    }
}

/// A list whose rows are made while it is written.
struct Rows<F>(F);

impl<R: Iterator<Item: Serialize>, F: Fn() -> R> Serialize for Rows<F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
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

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::api::{List, Stats};

    /// Two rules of which the first has counted.
    pub fn figures() -> Figures {
        let rules = ["80:192.0.2.1", "81:192.0.2.2"].map(|spec| spec.parse().expect(spec));
        let none = Counts {
            forward: Tally::default(),
            reply: Tally::default(),
            last: Jiffies(0),
            to_stack: [0; ToStack::COUNT],
            dropped: [0; Dropped::COUNT],
            answered: 0,
        };
        let some = Counts {
            forward: Tally { packets: 3, bytes: 180 },
            last: Jiffies(1),
            to_stack: std::array::from_fn(|reason| reason as u64),
            dropped: std::array::from_fn(|reason| 10 + reason as u64),
            answered: 7,
            ..none
        };
        let interface = InterfaceInfo {
            name: "eth0".to_owned(),
            role: "external".to_owned(),
            attach: Some("native".to_owned()),
        };
        let started = Instant::now();
        Figures {
            config: Arc::new(Config { rules: rules.to_vec(), ..Config::default() }),
            counts: vec![(0, some), (1, none)],
            passed: [9; Passed::COUNT],
            interfaces: vec![interface],
            clock: Clock::new(Jiffies(1), started),
            read: (started + Duration::from_secs(1), SystemTime::now()),
        }
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let figures = figures();
        let text = serde_json::to_string(&figures).expect("it is written");
        let stats: Stats = serde_json::from_str(&text).expect("it is read");
        assert_eq!(stats.rules, figures.rows().collect::<Vec<_>>());
        assert_eq!(stats.rules[0].rule.name, "80/tcp");
        assert_eq!(stats.rules[0].forward, Count { packets: 3, bytes: 180 });
        assert!(stats.rules[0].last_packet.is_some() && stats.rules[1].last_packet.is_none());
        assert_eq!(stats.verdicts.dropped, stats.rules[0].dropped);
        assert_eq!(stats.verdicts.passed.len(), Passed::COUNT);
        assert_eq!(stats.interfaces, figures.interfaces);
        assert_eq!(serde_json::to_string(&stats).expect("it is written"), text);

        let Figures { config, interfaces, .. } = figures;
        let listed = Listed { config: config.clone(), interfaces };
        let text = serde_json::to_string(&listed).expect("it is written");
        let list: List = serde_json::from_str(&text).expect("it is read");
        assert_eq!(list.rules, config.rules.iter().map(rule).collect::<Vec<_>>());
        assert_eq!(list.interfaces, listed.interfaces);
    }
}
