//! The configuration: TOML text and flags to a [`Config`], with the place of every mistake.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::flows::FlowSettings;
use crate::rule::{self, Invalid, Place, Ports, Rule, Source, invalid, twice};

pub use self::file::parse;
use self::overlay::Change;

pub mod diff;
pub mod edit;
mod file;
pub mod overlay;
#[cfg(test)]
mod tests;

/// What `run` is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Interfaces where clients arrive.
    pub external: Vec<Interface>,
    /// Interfaces where backends are; none is "find them by the routes".
    pub internal: Vec<Interface>,
    pub attach: Way,
    /// The interfaces for which that is otherwise.
    pub attach_to: Vec<(Interface, Way)>,
    /// Where Prometheus asks, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// How often host names are resolved again.
    pub refresh: Duration,
    pub flows: FlowSettings,
    /// The ports from which this box speaks to backends for clients that it hides.
    pub masquerade: RangeInclusive<u16>,
    /// Those that forward. Each is possible by itself, names differ, and no two claim the same packets
    /// equally. Where one masquerades, none claims one of its ports by number.
    pub rules: Vec<Rule>,
    /// Those that do not. Each is possible by itself, and no rule has its name.
    pub disabled: Vec<Rule>,
    /// The names of rules that were changed since this was read.
    pub unsaved: HashSet<String>,
}

/// An interface that is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub place: Place,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            external: Vec::new(),
            internal: Vec::new(),
            attach: Way { attach: Attach::Auto, place: None },
            attach_to: Vec::new(),
            metrics: None,
            refresh: Duration::from_secs(30),
            flows: FlowSettings::default(),
            masquerade: 40000..=60999,
            rules: Vec::new(),
            disabled: Vec::new(),
            unsaved: HashSet::new(),
        }
    }
}

impl Config {
    /// How a program is attached to an interface.
    pub fn attach_to(&self, interface: &str) -> Attach {
        self.way_to(interface).attach
    }

    /// The same, with its place.
    pub fn way_to(&self, interface: &str) -> &Way {
        let own = self.attach_to.iter().find(|(named, _)| named.name == interface);
        own.map_or(&self.attach, |(_, way)| way)
    }

    /// The interfaces that are named, external ones first.
    pub fn named(&self) -> impl Iterator<Item = &Interface> {
        self.external.iter().chain(&self.internal)
    }

    /// Why an interface that neither list has should not have a table of its own.
    pub fn unnamed(&self, interface: &str) -> String {
        let named = self.named().map(|it| it.name.as_str());
        let meant = did_you_mean(interface, named);
        format!(
            "it is neither external nor internal; {meant}name it in one of the two, or leave this \
             table out"
        )
    }

    /// Each rule, and whether it is enabled.
    pub fn all(&self) -> impl Iterator<Item = (&Rule, bool)> {
        let enabled = self.rules.iter().map(|rule| (rule, true));
        enabled.chain(self.disabled.iter().map(|rule| (rule, false)))
    }
}

/// How a program is attached, and where that is asked for, if it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    pub attach: Attach,
    pub place: Option<Place>,
}

/// How the programs are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Attach {
    /// What is best for the interface.
    Auto,
    Native,
    Generic,
    Tc,
}

impl fmt::Display for Attach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Attach::Auto => "auto",
            Attach::Native => "native",
            Attach::Generic => "generic",
            Attach::Tc => "tc",
        })
    }
}

impl FromStr for Attach {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "auto" => Ok(Attach::Auto),
            "native" => Ok(Attach::Native),
            "generic" => Ok(Attach::Generic),
            "tc" => Ok(Attach::Tc),
            _ => invalid!("{text:?} is no way to attach; write auto, native, generic or tc"),
        }
    }
}

/// One mistake in one line: `PLACE: [rule "NAME": ]KEY: what is wrong; how to mend it`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    fn new(place: impl fmt::Display, rule: Option<&str>, key: &str, message: &str) -> Self {
        let rule = rule.map(|name| format!("rule {name:?}: ")).unwrap_or_default();
        let key = if key.is_empty() { String::new() } else { format!("{key}: ") };
        let line = format!("{place}: {rule}{key}{message}");
        // A path, a key or a flag may hold anything; one line it shall stay.
        let escape =
            |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
        ConfigError(line.chars().map(escape).collect())
    }
}

/// All that is wrong, in the order of the file. Never empty; one line for each when displayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors(pub Vec<ConfigError>);

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            write!(f, "{newline}{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

/// Where a configuration comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub file: Option<PathBuf>,
    /// The values of `-i`.
    pub interfaces: Vec<String>,
    /// The values of `-p`.
    pub rules: Vec<String>,
}

impl Origin {
    /// Reads what is there now.
    ///
    /// # Errors
    ///
    /// As [`read`] and [`Config::add_flags`].
    pub fn read(&self) -> Result<Config, Errors> {
        let mut config = self.file.as_deref().map_or_else(|| Ok(Config::default()), read)?;
        config.add_flags(&self.interfaces, &self.rules)?;
        Ok(config)
    }

    /// Makes a change in the file.
    ///
    /// # Errors
    ///
    /// There is none, it cannot be written, or the change cannot be made there. It is as it was then.
    pub fn save(&self, change: &Change) -> Result<edit::Edited, Errors> {
        let Some(file) = &self.file else {
            let message = "there is no file to save it in: portfwd runs by flags alone; leave \
                           --save out, or run it with --config FILE";
            return Err(Errors(vec![ConfigError::new(change, None, "", message)]));
        };
        edit::save(file, |text| edit::apply(file, text, change))
    }

    /// Has the file say again what it said before a change.
    ///
    /// # Errors
    ///
    /// It cannot be written, or somebody has edited it since.
    pub fn restore(&self, edited: &edit::Edited) -> Result<(), Errors> {
        let Some(file) = self.file.as_deref() else { return Ok(()) };
        let restored = edit::save(file, |text| match text == edited.after {
            true => Ok(edited.before.clone()),
            false => {
                let message = "was edited meanwhile";
                Err(Errors(vec![ConfigError::new(file.display(), None, "", message)]))
            }
        });
        restored.map(drop)
    }
}

/// Reads and parses a file.
pub fn read(path: &Path) -> Result<Config, Errors> {
    let only = |error| Err(Errors(vec![error]));
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            let what = match error.kind() {
                io::ErrorKind::NotFound => {
                    "there is no such file; write it, name another".to_owned()
                }
                io::ErrorKind::PermissionDenied => {
                    // Root as well is refused what is others', once the daemon has given up that right.
                    match rustix::process::geteuid().is_root() {
                        true => "may not be read; have it, and the directories that it is in, belong to \
                                 root, name another",
                        false => "this user may not read it; run as root, name another",
                    }
                    .to_owned()
                }
                _ => format!("cannot be read ({error}); name another"),
            };
            let message =
                format!("{what} with --config FILE, or do without: portfwd run -i IFACE -p SPEC");
            return only(ConfigError::new(path.display(), None, "", &message));
        }
    };
    match std::str::from_utf8(&bytes) {
        Ok(text) => parse(path, text),
        Err(error) => {
            let line = 1 + bytes[..error.valid_up_to()].iter().filter(|b| **b == b'\n').count();
            let place = Place::File { path: path.into(), line };
            only(ConfigError::new(
                place,
                None,
                "",
                "this is not UTF-8 text; save the file as UTF-8",
            ))
        }
    }
}

impl Config {
    /// Adds what `-i` and `-p` say: interfaces to the external ones, and rules.
    ///
    /// A rule with the listen and protocol of one of the file, which may be disabled, replaces it and
    /// keeps its name.
    /// On an error nothing has changed.
    pub fn add_flags(&mut self, interfaces: &[String], specs: &[String]) -> Result<(), Errors> {
        if interfaces.is_empty() && specs.is_empty() {
            return Ok(());
        }
        let mut next = self.clone();
        let mut errors = Vec::new();
        for (index, name) in interfaces.iter().enumerate() {
            let checked = match interfaces[..index].contains(name) {
                true => Err(twice(name)),
                false => check_interface(name),
            };
            match checked {
                Err(Invalid(message)) => {
                    errors.push(ConfigError::new(format!("-i {name}"), None, "", &message));
                }
                Ok(()) if next.external.iter().any(|known| known.name == *name) => {}
                Ok(()) => {
                    let place = Place::Flag(format!("-i {name}"));
                    next.external.push(Interface { name: name.clone(), place });
                }
            }
        }
        for spec in specs {
            match spec.parse::<Rule>() {
                Err(Invalid(message)) => {
                    errors.push(ConfigError::new(format!("-p {spec}"), None, "", &message));
                }
                Ok(rule) => {
                    let same = |of_file: &Rule| {
                        matches!(of_file.place, Place::File { .. })
                            && (of_file.listen, of_file.protocol) == (rule.listen, rule.protocol)
                            && of_file.shares_family(&rule)
                    };
                    if let Some(of_file) = next.rules.iter_mut().find(|it| same(it)) {
                        *of_file = Rule { name: std::mem::take(&mut of_file.name), ..rule };
                    } else if let Some(place) = next.disabled.iter().position(same) {
                        let Rule { name, .. } = next.disabled.remove(place);
                        next.rules.push(Rule { name, ..rule });
                    } else {
                        next.rules.push(rule);
                    }
                }
            }
        }
        errors.extend(next.check().into_iter().map(|(_, error)| error));
        if !errors.is_empty() {
            return Err(Errors(errors));
        }
        *self = next;
        Ok(())
    }

    /// What makes the rules impossible together, each with the place of the rule to blame.
    fn check(&self) -> Vec<(&Place, ConfigError)> {
        let mut found = self.check_overlaps();
        found.extend(self.check_names());
        found.extend(self.check_masquerade());
        found
    }

    /// Rules that claim the same packets. The later one is to blame.
    fn check_overlaps(&self) -> Vec<(&Place, ConfigError)> {
        let overlaps = rule::overlaps(&self.rules).into_iter();
        overlaps
            .map(|(first, second)| {
                let (a, b) = (&self.rules[first], &self.rules[second]);
                let message = format!(
                    "rule {:?} ({}) and rule {:?} ({}) both listen on {}; change one of them, or \
                     remove it",
                    a.name,
                    a.place,
                    b.name,
                    b.place,
                    rule::shared_claim(a, b).unwrap_or_default(),
                );
                (&b.place, ConfigError::new(&b.place, None, "listen", &message))
            })
            .collect()
    }

    /// Rules, disabled ones among them, that have one name. The later one is to blame.
    fn check_names(&self) -> Vec<(&Place, ConfigError)> {
        let mut all: Vec<_> = self.all().collect();
        all.sort_by_key(|(rule, _)| match rule.place {
            Place::File { line, .. } => line,
            Place::Flag(_) => usize::MAX,
        });
        let mut names = HashMap::with_capacity(all.len());
        let mut found = Vec::new();
        for (index, (rule, enabled)) in all.iter().enumerate() {
            let first = *names.entry(rule.name.as_str()).or_insert(index);
            if first == index {
                continue;
            }
            let (other, other_enabled) = all[first];
            // Two rules without a name have the same one only where they overlap, told above.
            let told = *enabled
                && other_enabled
                && rule.name == Rule::default_name(rule.listen, rule.protocol, &rule.to)
                && (rule.listen, rule.protocol) == (other.listen, other.protocol);
            if !told {
                let message =
                    format!("the rule at {} has this name already; give each its own", other.place);
                let error = ConfigError::new(&rule.place, Some(&rule.name), "name", &message);
                found.push((&rule.place, error));
            }
        }
        found
    }

    /// Rules that take ports from those that masquerade. `*` gives way to the box's own traffic.
    fn check_masquerade(&self) -> Vec<(&Place, ConfigError)> {
        let masquerades = |rule: &&Rule| rule.source == Source::Masquerade;
        let Some(other) = self.rules.iter().find(masquerades) else { return Vec::new() };
        let (first, last) = (self.masquerade.start(), self.masquerade.end());
        let takes =
            |ports: Ports| ports != Ports::All && ports.first() <= *last && *first <= ports.last();
        let rules = self.rules.iter();
        rules
            .filter(|rule| takes(rule.listen.ports))
            .map(|rule| {
                let (ports, name, place) = (rule.listen.ports, &other.name, &other.place);
                let takes = if ports.width() == 1 { "is among" } else { "has some of" };
                let message = format!(
                    "{ports} {takes} the ports {first}-{last}, by which rule {name:?} ({place}) \
                     masquerades; listen on others, or set [masquerade] ports"
                );
                let error = ConfigError::new(&rule.place, Some(&rule.name), "listen", &message);
                (&rule.place, error)
            })
            .collect()
    }
}

/// That there is no rule of a name; which ones are called alike.
fn no_rule<'a>(
    place: impl fmt::Display,
    name: &str,
    rules: impl Iterator<Item = &'a Rule>,
) -> Errors {
    const MOST: usize = 3;
    let (low, letters) = (name.to_lowercase(), name.chars().count());
    let near = |rule: &'a Rule| {
        let known = rule.name.to_lowercase();
        let part = !low.is_empty() && known.contains(&low);
        // A word with as many other letters is another word. Most names are too long or too short.
        let most = (letters / 3).clamp(1, 3);
        let close = known.chars().count().abs_diff(letters) <= most;
        let changes = if close { edit_distance(&low, &known) } else { usize::MAX };
        (changes <= most || part).then_some((changes, &rule.name))
    };
    let mut near: Vec<_> = rules.filter_map(near).collect();
    near.sort();
    let near: Vec<String> = near.iter().take(MOST).map(|(_, name)| format!("{name:?}")).collect();
    let meant = if near.is_empty() {
        String::new()
    } else {
        format!("did you mean {}? ", near.join(" or "))
    };
    let message = format!("there is no rule {name:?}; {meant}`portfwd list` has all names");
    Errors(vec![ConfigError::new(place, None, "", &message)])
}

/// The beginning of a remedy: which of those that there are may be meant.
fn did_you_mean<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    match known.map(|known| (edit_distance(name, known), known)).min() {
        Some((changes @ ..=2, known)) if changes < known.len() => format!("did you mean {known}? "),
        _ => String::new(),
    }
}

/// How many letters must be put in, left out or exchanged to make one word of the other.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, to) in b.chars().enumerate() {
            let exchanged = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = exchanged.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.chars().count()]
}

fn check_interface(name: &str) -> Result<(), Invalid> {
    if name.is_empty() {
        return invalid!("the interface's name is empty; write one that `ip link` lists");
    }
    if name.len() > 15 {
        return invalid!("{name:?} has {} bytes; interface names have 15 at most", name.len());
    }
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.contains(odd) || name == "." || name == ".." {
        return invalid!("{name:?} cannot be an interface; write one that `ip link` lists");
    }
    Ok(())
}

/// The ports by which rules masquerade, from text: above those of services, and enough for many
/// clients.
fn masquerade_ports(text: &str) -> Result<RangeInclusive<u16>, Invalid> {
    const LOWEST: u16 = 1024;
    const FEWEST: u32 = 1024;
    let ports: Ports = text.parse()?;
    if ports.first() < LOWEST {
        return invalid!(
            "{ports} has ports below {LOWEST}, which are for services; write a range above them, \
             as in 40000-60999"
        );
    }
    if ports.width() < FEWEST {
        return invalid!(
            "{ports} is too narrow; write a range of at least {FEWEST} ports, as in 40000-60999"
        );
    }
    Ok(ports.first()..=ports.last())
}
