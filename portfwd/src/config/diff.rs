//! What differs between the configuration of a file and the one that runs.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Config, Interface};
use crate::flows::{FlowSettings, Timeouts};
use crate::rule::{Mss, Rule, Source};

/// `portfwd diff --json`. As text, a line for each, as other programs that compare write them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    pub only_running: Vec<Only>,
    pub only_file: Vec<Only>,
    /// Rules of one name that say different things.
    pub differ: Vec<Differs>,
    /// Rules that are on in one and off in the other.
    pub switched: Vec<Switched>,
    pub settings: Vec<Setting>,
}

/// A rule that one of them has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Only {
    pub name: String,
    pub rule: String,
    pub enabled: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differs {
    pub name: String,
    pub file: String,
    pub running: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switched {
    pub name: String,
    /// Whether it forwards.
    pub running: bool,
}

/// What is not a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// As in `[interfaces] external`.
    pub key: String,
    pub file: String,
    pub running: String,
}

impl Diff {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = |on: bool| if on { "on" } else { "off" };
        let off = |only: &Only| if only.enabled { "" } else { ", off" };
        let mut lines = Vec::new();
        for only in &self.only_file {
            lines.push(format!("- rule {:?}: {}{}", only.name, only.rule, off(only)));
        }
        for only in &self.only_running {
            lines.push(format!("+ rule {:?}: {}{}", only.name, only.rule, off(only)));
        }
        for Differs { name, file, running } in &self.differ {
            lines.push(format!("~ rule {name:?}: {file} -> {running}"));
        }
        for Switched { name, running } in &self.switched {
            lines.push(format!("~ rule {name:?}: {} -> {}", state(!running), state(*running)));
        }
        for Setting { key, file, running } in &self.settings {
            lines.push(format!("~ {key}: {file} -> {running}"));
        }
        f.write_str(&lines.join("\n"))
    }
}

/// What differs. Places and the order of rules do not count.
pub fn diff(file: &Config, running: &Config) -> Diff {
    let only = |rule: &Rule, enabled| Only { name: rule.name.clone(), rule: text(rule), enabled };
    let mut of_file: HashMap<&str, (&Rule, bool)> =
        file.all().map(|(rule, on)| (rule.name.as_str(), (rule, on))).collect();
    let mut diff = Diff { settings: settings(file, running), ..Diff::default() };
    for (rule, on) in running.all() {
        let name = || rule.name.clone();
        let Some((other, was)) = of_file.remove(rule.name.as_str()) else {
            diff.only_running.push(only(rule, on));
            continue;
        };
        if !rule.same(other) {
            diff.differ.push(Differs { name: name(), file: text(other), running: text(rule) });
        }
        if on != was {
            diff.switched.push(Switched { name: name(), running: on });
        }
    }
    let left = file.all().filter(|(rule, _)| of_file.contains_key(rule.name.as_str()));
    diff.only_file = left.map(|(rule, on)| only(rule, on)).collect();
    diff
}

/// All that a rule says but its name.
fn text(rule: &Rule) -> String {
    let mut text = rule.to_string();
    if rule.source != Source::Preserve {
        text.push_str(&format!(", source {}", rule.source));
    }
    match rule.mss {
        Mss::Auto => {}
        Mss::Off => text.push_str(", mss false"),
        Mss::At(bytes) => text.push_str(&format!(", mss {bytes}")),
    }
    text
}

/// Settings with other values, as texts.
fn settings(file: &Config, running: &Config) -> Vec<Setting> {
    let mut found = Vec::new();
    let keys = all_settings(running).into_iter().zip(all_settings(file));
    for ((key, running), (_, file)) in keys {
        if running != file {
            found.push(Setting { key: key.to_owned(), file, running });
        }
    }
    let own = |config: &Config, name: &str| {
        let own = config.attach_to.iter().find(|(interface, _)| interface.name == name);
        own.map(|(_, way)| way.attach.to_string())
    };
    let mut names: Vec<&str> = [file, running]
        .into_iter()
        .flat_map(|config| &config.attach_to)
        .map(|(interface, _)| interface.name.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let (file, running) = (own(file, name), own(running, name));
        if file != running {
            let key = format!("[interfaces.{name}] attach");
            let shown = |own: Option<String>| own.unwrap_or_else(none);
            found.push(Setting { key, file: shown(file), running: shown(running) });
        }
    }
    found
}

fn none() -> String {
    "none".to_owned()
}

fn all_settings(config: &Config) -> [(&'static str, String); 11] {
    let Config { external, internal, attach, metrics, refresh, flows, masquerade, .. } = config;
    let FlowSettings { size, timeouts: Timeouts { udp, udp_unanswered, tcp, tcp_transitory } } =
        flows;
    let names = |interfaces: &[Interface]| {
        let names: Vec<&str> = interfaces.iter().map(|it| it.name.as_str()).collect();
        if names.is_empty() { none() } else { names.join(", ") }
    };
    let time = |time| humantime::format_duration(time).to_string();
    [
        ("[interfaces] external", names(external)),
        ("[interfaces] internal", names(internal)),
        ("[interfaces] attach", attach.attach.to_string()),
        ("[metrics] listen", metrics.map_or_else(none, |address| address.to_string())),
        ("[names] refresh", time(*refresh)),
        ("[flows] size", size.to_string()),
        ("[flows] udp", time(*udp)),
        ("[flows] udp_unanswered", time(*udp_unanswered)),
        ("[flows] tcp", time(*tcp)),
        ("[flows] tcp_transitory", time(*tcp_transitory)),
        ("[masquerade] ports", format!("{}-{}", masquerade.start(), masquerade.end())),
    ]
}

#[cfg(test)]
mod tests;
