//! What the daemon tells of its rules: from maps and rules to the API's types.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Dropped, Jiffies, Passed, Tally, ToStack};
use serde::ser::{Serialize, SerializeStruct as _, Serializer};
use tracing::warn;

use crate::api::{Count, FlowInfo, Flows, InterfaceInfo, RuleInfo, RuleStats, Verdicts};
use crate::compile::{Compiler, Plan};
use crate::config::Config;
use crate::datapath::{Clock, Counts, Datapath};
use crate::flows::{Clients, Filter, FlowRow, protocol_name};
use crate::rule::{Invalid, Rule, invalid};

/// A role's name in output.
pub fn role(role: Role) -> &'static str {
    match role {
        Role::External => "external",
        Role::Internal => "internal",
        Role::Both => "both",
    }
}

/// A rule as the user wrote it, whether it needs the flow table, whether it forwards, and whether the
/// file has it so.
pub fn rule(rule: &Rule, stateful: bool, enabled: bool, saved: bool) -> RuleInfo {
    RuleInfo {
        name: rule.name.clone(),
        protocol: rule.protocol.to_string(),
        listen: rule.listen.to_string(),
        to: rule.to.iter().map(ToString::to_string).collect(),
        source: rule.source.to_string(),
        mss: rule.mss,
        stateful,
        enabled,
        saved,
    }
}

/// The rules and interfaces, written as [`List`](crate::api::List).
///
/// This and [`Figures`] make a rule's row when it is written: all rows of 100,000 rules are 150 MB.
#[derive(Debug)]
pub struct Listed {
    pub config: Arc<Config>,
    /// The places of rules that need the flow table.
    pub stateful: BTreeSet<usize>,
    pub interfaces: Vec<InterfaceInfo>,
}

impl Serialize for Listed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_struct("List", 2)?;
        // Those that are enabled come first, in the order of their places.
        let row = |(place, (it, enabled)): (usize, (&Rule, bool))| {
            let saved = !self.config.unsaved.contains(&it.name);
            rule(it, self.stateful.contains(&place), enabled, saved)
        };
        list.serialize_field("rules", &Rows(|| self.config.all().enumerate().map(row)))?;
        list.serialize_field("interfaces", &self.interfaces)?;
        list.end()
    }
}

/// All counters at one moment, written as [`Stats`](crate::api::Stats).
#[derive(Debug)]
pub struct Figures {
    config: Arc<Config>,
    counted: Vec<Counted>,
    passed: [u64; Passed::COUNT],
    interfaces: Vec<InterfaceInfo>,
    clock: Clock,
    /// When they were read, by both clocks.
    read: (Instant, SystemTime),
}

/// What was counted of a rule.
#[derive(Debug)]
struct Counted {
    /// The rule's place.
    place: usize,
    counts: Counts,
    flows: Flows,
    stateful: bool,
}

impl Figures {
    /// Reads all counters.
    ///
    /// # Errors
    ///
    /// A map cannot be read.
    pub fn read(
        config: Arc<Config>,
        plan: &Plan,
        compiler: &Compiler,
        datapath: &Datapath,
        interfaces: Vec<InterfaceInfo>,
    ) -> anyhow::Result<Self> {
        let active = datapath.flows().count()?;
        let clock = datapath.clock();
        let passed = datapath.passed()?;
        let mut counted = Vec::with_capacity(config.rules.len());
        for (place, rule) in config.rules.iter().enumerate() {
            let Some(row) = compiler.counter(&rule.name) else { continue };
            let counts = datapath.counts(row)?;
            let active = active.get(&row).copied().unwrap_or_default();
            let Counts { flows: created, crowded, .. } = counts;
            let stateful = plan.stateful.contains_key(&place);
            let flows = Flows { active, created, crowded };
            counted.push(Counted { place, counts, flows, stateful });
        }
        let read = (Instant::now(), SystemTime::now());
        Ok(Self { config, counted, passed, interfaces, clock, read })
    }

    /// Each rule's name and counts.
    pub fn by_rule(&self) -> impl Iterator<Item = (&str, &Counts)> {
        self.counted.iter().map(|it| (self.config.rules[it.place].name.as_str(), &it.counts))
    }

    /// Each rule's name and flows.
    pub fn flows_by_rule(&self) -> impl Iterator<Item = (&str, Flows)> {
        self.counted.iter().map(|it| (self.config.rules[it.place].name.as_str(), it.flows))
    }

    /// Packets that passed untouched, by reason.
    pub fn passed(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Passed::ALL.iter().map(|reason| reason.name()).zip(self.passed)
    }

    fn rows(&self) -> impl Iterator<Item = RuleStats> {
        let info = |place: usize, stateful| {
            let it = &self.config.rules[place];
            rule(it, stateful, true, !self.config.unsaved.contains(&it.name))
        };
        self.counted.iter().map(move |Counted { place, counts, flows, stateful }| RuleStats {
            rule: info(*place, *stateful),
            forward: count(counts.forward),
            reply: count(counts.reply),
            to_stack: reasons(ToStack::ALL, ToStack::name, &counts.to_stack),
            dropped: reasons(Dropped::ALL, Dropped::name, &counts.dropped),
            flows: *flows,
            answered: counts.answered,
            last_packet: (counts.last != Jiffies::default()).then(|| {
                let when = self.read.1 - self.clock.between(counts.last, self.read.0);
                humantime::format_rfc3339_millis(when).to_string()
            }),
        })
    }

    fn verdicts(&self) -> Verdicts {
        let mut dropped = [0; Dropped::COUNT];
        for Counted { counts, .. } in &self.counted {
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

/// Goes through the flows, in a thread that may block, until told false.
pub type FlowRows = Box<dyn FnOnce(&mut dyn FnMut(FlowRow) -> bool) -> anyhow::Result<()> + Send>;

/// The flows, to be read while they are written: a million of them are too much to hold.
pub struct LiveFlows {
    rows: FlowRows,
    clock: Clock,
    /// The rules' names, by their rows of the counters.
    names: HashMap<u32, String>,
}

impl fmt::Debug for LiveFlows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveFlows").finish_non_exhaustive()
    }
}

impl LiveFlows {
    /// What `rows` goes through, of the rules of `config`.
    pub fn new(config: &Config, compiler: &Compiler, clock: Clock, rows: FlowRows) -> Self {
        let named = |rule: &Rule| Some((compiler.counter(&rule.name)?, rule.name.clone()));
        Self { rows, clock, names: config.rules.iter().filter_map(named).collect() }
    }

    /// Those that somebody asks for.
    ///
    /// # Errors
    ///
    /// There is no such rule.
    pub fn find(self, Filter { rule, client }: Filter) -> Result<FoundFlows, Invalid> {
        let counter = match rule {
            None => None,
            Some(rule) => match self.names.iter().find(|(_, name)| **name == rule) {
                Some((counter, _)) => Some(*counter),
                None => {
                    return invalid!("there is no rule {rule:?}; `portfwd list` has their names");
                }
            },
        };
        Ok(FoundFlows { flows: self, counter, client })
    }
}

/// Those [`LiveFlows`] that somebody asked for.
#[derive(Debug)]
pub struct FoundFlows {
    flows: LiveFlows,
    counter: Option<u32>,
    client: Option<Clients>,
}

impl FoundFlows {
    /// Writes each as a line of JSON, [`FlowInfo`]. Flows of a rule that is gone are about to end,
    /// and are left out.
    ///
    /// # Errors
    ///
    /// Nobody reads it any more, or the tables cannot be read, which is also logged.
    pub fn write(self, out: &mut dyn io::Write) -> io::Result<()> {
        let Self { flows: LiveFlows { rows, clock, names }, counter, client } = self;
        let mut written = Ok(());
        let walked = rows(&mut |row| {
            let wanted = counter.is_none_or(|counter| row.counter == counter)
                && client.is_none_or(|clients| clients.contain(row.client.ip()));
            if let (true, Some(rule)) = (wanted, names.get(&row.counter)) {
                let flow = flow(&row, rule.clone(), clock);
                written = serde_json::to_writer(&mut *out, &flow)
                    .map_err(io::Error::from)
                    .and_then(|()| out.write_all(b"\n"));
            }
            written.is_ok()
        });
        written?;
        walked.map_err(|error| {
            warn!("flows cannot be told: {error:#}");
            io::Error::other(error)
        })
    }
}

fn flow(row: &FlowRow, rule: String, clock: Clock) -> FlowInfo {
    let now = Instant::now();
    let since = |then| clock.between(then, now).as_millis() as f64 / 1000.0;
    FlowInfo {
        client: row.client,
        rule,
        listen: row.listen,
        source: row.source,
        backend: row.backend,
        protocol: protocol_name(row.protocol).into_owned(),
        state: row.state,
        age: since(row.created),
        idle: since(row.last),
        forward: count(row.forward),
        reply: count(row.reply),
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
    use std::net::IpAddr;
    use std::time::Duration;

    use super::*;
    use crate::api::{List, Stats};
    use crate::flows::State;

    /// Two rules of which the first has counted.
    pub fn figures() -> Figures {
        let rules = ["80:192.0.2.1", "81:192.0.2.2"].map(|spec| spec.parse().expect(spec));
        let none = Counts {
            forward: Tally::default(),
            reply: Tally::default(),
            last: Jiffies(0),
            to_stack: [0; ToStack::COUNT],
            dropped: [0; Dropped::COUNT],
            flows: 5,
            crowded: 1,
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
            why: Some("as configured".to_owned()),
        };
        let started = Instant::now();
        Figures {
            config: Arc::new(Config { rules: rules.to_vec(), ..Config::default() }),
            counted: vec![
                Counted {
                    place: 0,
                    counts: some,
                    flows: Flows { active: 2, created: 5, crowded: 1 },
                    stateful: true,
                },
                Counted { place: 1, counts: none, flows: Flows::default(), stateful: false },
            ],
            passed: [9; Passed::COUNT],
            interfaces: vec![interface],
            clock: Clock::new(Jiffies(1), started),
            read: (started + Duration::from_secs(1), SystemTime::now()),
        }
    }

    /// Live flows of the rules `web` and `game`, with counters 3 and 4: `count` of them, in turns.
    pub fn live_flows(count: u32) -> LiveFlows {
        let [listen, source, backend] =
            ["203.0.113.7:80", "192.168.1.1:40000", "192.168.1.10:8080"]
                .map(|text| text.parse().expect(text));
        let started = Instant::now();
        let rows = move |each: &mut dyn FnMut(FlowRow) -> bool| {
            let mut all = (0..count).map(|number| FlowRow {
                protocol: 17,
                client: (IpAddr::from(number.wrapping_add(10 << 24).to_be_bytes()), 5000).into(),
                listen,
                source,
                backend,
                counter: 3 + number % 2,
                state: State::Established,
                created: Jiffies(1),
                last: Jiffies(2),
                forward: Tally { packets: 3, bytes: 180 },
                reply: Tally { packets: 2, bytes: 900 },
            });
            all.all(each);
            Ok(())
        };
        let names = [(3, "web".to_owned()), (4, "game".to_owned())];
        let clock = Clock::new(Jiffies(1), started);
        LiveFlows { rows: Box::new(rows), clock, names: names.into() }
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
        assert_eq!(stats.rules[0].flows, Flows { active: 2, created: 5, crowded: 1 });
        assert_eq!(stats.verdicts.dropped, stats.rules[0].dropped);
        assert_eq!(stats.verdicts.passed.len(), Passed::COUNT);
        assert_eq!(stats.interfaces, figures.interfaces);
        assert_eq!(serde_json::to_string(&stats).expect("it is written"), text);

        let Figures { config, interfaces, .. } = figures;
        let mut config = Config::clone(&config);
        config.disabled.push("82:192.0.2.3".parse().expect("a rule"));
        config.unsaved.insert("81/tcp".to_owned());
        let config = Arc::new(config);
        let stateful = BTreeSet::from([0]);
        let listed = Listed { config: config.clone(), stateful, interfaces };
        let text = serde_json::to_string(&listed).expect("it is written");
        let list: List = serde_json::from_str(&text).expect("it is read");
        let [first, second] = &config.rules[..] else { panic!("{config:?}") };
        let wanted = [
            rule(first, true, true, true),
            rule(second, false, true, false),
            rule(&config.disabled[0], false, false, true),
        ];
        assert_eq!(list.rules, wanted);
        assert_eq!(list.interfaces, listed.interfaces);
    }

    #[test]
    fn flows_of_rules_that_are_gone_are_left_out() {
        let mut live = live_flows(5);
        live.names.remove(&4);
        let mut text = Vec::new();
        let found = live.find(Filter::default()).expect("all rules");
        found.write(&mut text).expect("it is written");
        let read = |line: &[u8]| serde_json::from_slice::<FlowInfo>(line).expect("a flow");
        let flows: Vec<FlowInfo> =
            text.trim_ascii().split(|byte| *byte == b'\n').map(read).collect();
        assert_eq!(flows.len(), 3);
        assert!(flows.iter().all(|flow| flow.rule == "web" && flow.age >= flow.idle));
        assert_eq!(flows[2].forward, Count { packets: 3, bytes: 180 });

        let gone = Filter { rule: Some("game".to_owned()), ..Filter::default() };
        let mut live = live_flows(5);
        live.names.remove(&4);
        assert_eq!(
            live.find(gone).expect_err("there is no such rule").to_string(),
            "there is no rule \"game\"; `portfwd list` has their names"
        );
    }

    #[test]
    fn flows_that_cannot_be_read_or_written() {
        struct Full;
        impl io::Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        // It stops at the first, or it would take its time.
        let all = live_flows(u32::MAX).find(Filter::default()).expect("all rules");
        assert_eq!(all.write(&mut Full).expect_err("full").kind(), io::ErrorKind::BrokenPipe);

        let broken = LiveFlows { rows: Box::new(|_| anyhow::bail!("no map")), ..live_flows(0) };
        let all = broken.find(Filter::default()).expect("all rules");
        assert_eq!(all.write(&mut Vec::new()).expect_err("broken").to_string(), "no map");
    }
}
