//! What users meet and do not expect: "it loaded and nothing is forwarded".

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use portfwd_ebpf::path::Role;
use tracing::{info, warn};

use super::Daemon;
use crate::network::{Externals, Snapshot};
use crate::rule::Ports;

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
    pub fn warn_of_pitfalls(&self, snapshot: &Snapshot) {
        for (index, attachment) in &self.attached {
            let Some(link) = snapshot.link_by_index(*index) else { continue };
            let name = &attachment.name;
            match link.driver.as_deref() {
                Some("veth") => info!(
                    "{name} is a veth: senders at its peer must fill in checksums themselves: there, \
                     ethtool -K IFACE tx off"
                ),
                Some("bridge" | "tun" | "tap") => warn!(
                    "{name} is a {}: packets of local machines and containers come without \
                     checksums, or merged, and are forwarded broken; there, ethtool -K IFACE tx off \
                     gro off",
                    link.driver.as_deref().unwrap_or_default()
                ),
                _ => {}
            }
            let addresses = snapshot.addresses.iter().filter(|a| a.interface == *index).count();
            if attachment.role != Role::Internal && addresses == 0 {
                warn!(
                    "{name} has no address: is it a port of a bridge or a bond? Then name that as \
                     external"
                );
            }
        }
        for leg in self.plan.legs.iter().filter(|leg| leg.listen.is_none()) {
            let Externals { v4, v6 } = &self.survey.externals;
            let (family, none) = match leg.backend {
                IpAddr::V4(_) => ("IPv4", v4.is_empty()),
                IpAddr::V6(_) => ("IPv6", v6.is_empty()),
            };
            if none {
                let rule = &self.config.rules[leg.rule].name;
                warn!("rule \"{rule}\" waits: no external interface has an {family} address yet");
            }
        }
        let wide = self.config.rules.iter().find(|rule| rule.listen.ports == Ports::All);
        let tracked = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")
            .is_ok_and(|count| count.trim() != "0");
        if let (Some(rule), true) = (wide, tracked) {
            warn!(
                "rule \"{}\" claims every port, and this box tracks connections: if it masquerades \
                 for other hosts, answers to them go to the backend instead; list the ports",
                rule.name
            );
        }
        info!("external addresses: {}", Addresses(&self.survey.externals));
    }

    /// "It loaded and nothing is forwarded": packets go to a backend and none come back.
    pub fn hint_at_silence(&mut self) {
        if self.config.rules.len() > HINTED_RULES {
            return;
        }
        for rule in &self.config.rules {
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
                warn!(
                    "rule \"{}\": packets go to {} and none come back: does it answer, and does its \
                     default route lead through this box?",
                    rule.name,
                    rule.to.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
                );
            }
        }
    }
}

/// Addresses in a message.
pub struct Addresses<'a>(pub &'a Externals);

impl fmt::Display for Addresses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Externals { v4, v6 } = self.0;
        let all: Vec<String> =
            v4.iter().map(ToString::to_string).chain(v6.iter().map(ToString::to_string)).collect();
        f.write_str(if all.is_empty() { "none yet" } else { "" })?;
        f.write_str(&all.join(", "))
    }
}
