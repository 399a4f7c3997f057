//! What users meet and do not expect: "it loaded and nothing is forwarded".

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::Daemon;
use crate::compile::{BoxPorts, Leg};
use crate::config::Interface;
use crate::network::{Externals, Snapshot};
use crate::rule::{Ports, Rule, Source};

mod links;
mod sockets;

use sockets::{Socket, taken_away};

/// Packets go to a rule's backend and none come back.
pub enum Silence {
    Since(Instant),
    Told,
}

/// How long a backend may be silent before that is worth a hint.
const SILENCE: Duration = Duration::from_secs(5);
/// Beyond this many rules nobody reads hints, and reading the counters would cost.
const HINTED_RULES: usize = 1000;

impl Daemon {
    /// What is known to lose packets, said before it does.
    pub fn warn_of_pitfalls(&mut self, snapshot: &Snapshot) {
        for (index, attachment) in &self.attached {
            let Some(link) = snapshot.link_by_index(*index) else { continue };
            for pitfall in links::pitfalls(snapshot, link, attachment.role, attachment.mode) {
                warn!("{pitfall}");
            }
        }
        for (Interface { name, place }, _) in &self.config.attach_to {
            if !self.survey.roles.contains_key(name) {
                warn!(
                    "{place}: [interfaces.{name}] is of no use: {name} is not external, and no backend is \
                     reached by it"
                );
            }
        }
        let Externals { v4, v6 } = &self.survey.externals;
        for (family, is_v4, none) in [("IPv4", true, v4.is_empty()), ("IPv6", false, v6.is_empty())]
        {
            let waits = |leg: &&Leg| leg.listen.is_none() && leg.backend.is_ipv4() == is_v4;
            let mut waiting = self.plan.legs.iter().filter(waits).filter(|_| none);
            let Some(first) = waiting.next() else { continue };
            let rule = &self.config.rules[first.rule].name;
            let others = match waiting.count() {
                0 => "waits".to_owned(),
                1 => "and another wait".to_owned(),
                more => format!("and {more} others wait"),
            };
            warn!("rule \"{rule}\" {others}: no external interface has an {family} address yet");
        }
        self.new_hints(snapshot).iter().for_each(|hint| warn!("{hint}"));
        let dmz = self.plan.legs.iter().find(|leg| leg.has_other());
        if let (Some(dmz), false) = (dmz, self.survey.own.is_empty()) {
            let own: Vec<String> = self.survey.own.iter().map(u8::to_string).collect();
            info!(
                "rule \"{}\": this box itself speaks IP protocol {}, which the DMZ host does not get",
                self.config.rules[dmz.rule].name,
                own.join(", ")
            );
        }
        info!("external addresses: {}", Addresses(&self.survey.externals));
    }

    /// What rules take from the box by their addresses and ports, as far as that was not said of the rules before.
    pub fn new_hints(&mut self, snapshot: &Snapshot) -> Vec<String> {
        if self.config.rules.len() > HINTED_RULES {
            return Vec::new();
        }
        let Self { config, plan, survey, ports: BoxPorts { ephemeral, .. }, .. } = &*self;
        let mut hints: Vec<String> = foreign_addresses(&config.rules, snapshot);
        let sockets = Socket::all();
        hints.extend(taken_away(&sockets, &config.rules, plan, &survey.externals, ephemeral));
        let tracked = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")
            .is_ok_and(|count| count.trim() != "0");
        hints.extend(tracked.then(|| claimed_sources(&config.rules, ephemeral)).flatten());
        let before = std::mem::replace(&mut self.hinted, hints.iter().cloned().collect());
        hints.retain(|hint| !before.contains(hint));
        hints
    }

    /// "It loaded and nothing is forwarded": packets go to a backend and none come back.
    pub fn hint_at_silence(&mut self) {
        if self.config.rules.len() > HINTED_RULES {
            return;
        }
        for (number, rule) in self.config.rules.iter().enumerate() {
            let counts =
                self.compiler.counter(&rule.name).and_then(|row| self.datapath.counts(row).ok());
            let Some(counts) = counts else { continue };
            if counts.forward.packets == 0 || counts.reply.packets > 0 {
                continue;
            }
            let silence = self
                .silent
                .entry(rule.name.clone())
                .or_insert_with(|| Silence::Since(Instant::now()));
            if let Silence::Since(since) = silence
                && since.elapsed() >= SILENCE
            {
                *silence = Silence::Told;
                let elsewhere = self.plan.remote().any(|leg| leg.rule == number);
                let why = match rule.source {
                    _ if !elsewhere && rule.protocol.udp() => {
                        "this box itself should answer; a UDP service that is bound to all addresses \
                         does so from another of them: bind it to the one in `to`, or have `to` name \
                         the one that clients use"
                    }
                    _ if !elsewhere => {
                        "this box itself should answer; does its firewall let in the port in `to`?"
                    }
                    Source::Preserve => {
                        "does it answer, and does its default route lead through this box?"
                    }
                    Source::Masquerade => "does it answer?",
                };
                let to: Vec<_> = rule.to.iter().map(ToString::to_string).collect();
                let to = to.join(", ");
                warn!("rule \"{}\": packets go to {to} and none come back: {why}", rule.name);
            }
        }
    }
}

/// A line for each rule that listens on an address which the box does not have.
fn foreign_addresses(rules: &[Rule], snapshot: &Snapshot) -> Vec<String> {
    let own: BTreeSet<IpAddr> = snapshot.addresses.iter().map(|it| it.address).collect();
    let foreign = |rule: &Rule| {
        let address = rule.listen.address.filter(|address| !own.contains(address))?;
        Some(format!(
            "rule \"{}\" listens on {address}, which is not an address of this box: packets come \
             here only if they are routed here",
            rule.name
        ))
    };
    rules.iter().filter_map(foreign).collect()
}

/// A line for the first rule that claims many of the ports from which clients connect. A box that
/// masquerades lets them keep theirs. A single port is not worth a line.
fn claimed_sources(rules: &[Rule], ephemeral: &RangeInclusive<u16>) -> Option<String> {
    let many = |ports| !matches!(ports, Ports::One(_));
    let rule = rules
        .iter()
        .map(|rule| (rule, rule.listen.ports))
        .find(|(_, ports)| many(*ports) && ports.last() >= *ephemeral.start());
    rule.map(|(rule, ports)| {
        format!(
            "rule \"{}\" claims {}, and this box tracks connections: if it masquerades for other \
             hosts, answers to their connections from these ports go to the backend instead; claim \
             ports below {} only",
            rule.name,
            if ports == Ports::All { "every port".to_owned() } else { format!("ports {ports}") },
            ephemeral.start()
        )
    })
}

/// Addresses in a message.
pub struct Addresses<'a>(pub &'a Externals);

impl fmt::Display for Addresses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(|address| address.to_string()).collect();
        f.write_str(if all.is_empty() { "none yet" } else { "" })?;
        f.write_str(&all.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::LocalAddress;

    fn rules(specs: &[&str]) -> Vec<Rule> {
        specs.iter().map(|spec| spec.parse().expect(spec)).collect()
    }

    #[test]
    fn an_address_that_the_box_lacks_is_told() {
        let address = LocalAddress {
            interface: 2,
            address: [203, 0, 113, 7].into(),
            prefix_length: 24,
            global: true,
            tentative: false,
            secondary: false,
        };
        let snapshot = Snapshot { links: Vec::new(), addresses: vec![address] };
        let rules = rules(&["80:10.0.0.1", "203.0.113.7:80:10.0.0.1", "203.0.113.9:80:10.0.0.1"]);
        assert_eq!(
            foreign_addresses(&rules, &snapshot).join("\n"),
            "rule \"203.0.113.9:80/tcp\" listens on 203.0.113.9, which is not an address of this \
             box: packets come here only if they are routed here"
        );
    }

    #[test]
    fn ports_that_masqueraded_clients_use_are_told() {
        let told = |spec| claimed_sources(&rules(&[spec]), &(32768..=60999)).is_some();
        for spec in ["*:10.0.0.1/any", "1000-32768:10.0.0.1", "61000-62000:10.0.0.1"] {
            assert!(told(spec), "{spec}");
        }
        for spec in ["40000:10.0.0.1", "1000-32767:10.0.0.1"] {
            assert!(!told(spec), "{spec}");
        }
    }
}
