//! What was changed at run time, on top of the configuration of file and flags.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Config, ConfigError, Errors, no_rule};
use crate::rule::{Invalid, Place, Rule, check_name};

/// Rules that are added, gone, on or off, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Overlay {
    pub added: Vec<Added>,
    pub removed: BTreeSet<String>,
    /// Of rules below and of those added.
    pub enabled: BTreeMap<String, bool>,
}

/// A rule that was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    pub name: String,
    pub spec: String,
}

/// What somebody asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    Add {
        spec: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    Remove {
        name: String,
    },
    Enable {
        name: String,
    },
    Disable {
        name: String,
    },
}

/// As the command has it.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Add { spec, name: None } => write!(f, "add -p {spec}"),
            Change::Add { spec, name: Some(name) } => write!(f, "add -p {spec} --name {name}"),
            Change::Remove { name } => write!(f, "remove {name}"),
            Change::Enable { name } => write!(f, "enable {name}"),
            Change::Disable { name } => write!(f, "disable {name}"),
        }
    }
}

/// The rule of a SPEC, by a name or by its default one.
pub(super) fn rule(spec: &str, name: Option<&str>) -> Result<Rule, Errors> {
    let place = format!("add -p {spec}");
    let refused = |key: &str, Invalid(message): Invalid| {
        Errors(vec![ConfigError::new(&place, name, key, &message)])
    };
    let mut rule: Rule = spec.parse().map_err(|error| refused("", error))?;
    if let Some(name) = name {
        check_name(name).map_err(|error| refused("name", error))?;
        rule.name = name.to_owned();
    }
    rule.place = Place::Flag(place);
    Ok(rule)
}

impl Overlay {
    /// The configuration with this on top.
    ///
    /// # Errors
    ///
    /// What a file would be refused for.
    pub fn apply(&self, base: &Config) -> Result<Config, Errors> {
        let mut next = base.clone();
        let Self { added, removed, enabled } = self;
        if !removed.is_empty() {
            next.rules.retain(|rule| !removed.contains(&rule.name));
            next.disabled.retain(|rule| !removed.contains(&rule.name));
        }
        let mut errors = Vec::new();
        for Added { name, spec } in added {
            match rule(spec, Some(name)) {
                Ok(rule) => next.rules.push(rule),
                Err(Errors(mistakes)) => errors.extend(mistakes),
            }
        }
        if !enabled.is_empty() {
            let is = |rule: &mut Rule, on: bool| enabled.get(&rule.name) == Some(&on);
            let off: Vec<Rule> = next.rules.extract_if(.., |rule| is(rule, false)).collect();
            next.rules.extend(next.disabled.extract_if(.., |rule| is(rule, true)));
            next.disabled.extend(off);
        }
        next.unsaved =
            added.iter().map(|added| &added.name).chain(enabled.keys()).cloned().collect();
        errors.extend(next.check().into_iter().map(|(_, error)| error));
        if errors.is_empty() { Ok(next) } else { Err(Errors(errors)) }
    }

    /// This with one more change, and the configuration with that on top.
    ///
    /// # Errors
    ///
    /// The rule is not there, or there already, its SPEC has a mistake, or it claims what another does.
    pub fn with(&self, base: &Config, change: &Change) -> Result<(Self, Config), Errors> {
        let mut next = self.clone();
        match change {
            Change::Add { spec, name } => {
                let rule = rule(spec, name.as_deref())?;
                if let Some(other) = self.place(base, &rule.name) {
                    let message = format!(
                        "there is such a rule already ({other}); remove that one first, or give \
                         this one another name with --name"
                    );
                    let error = ConfigError::new(&rule.place, Some(&rule.name), "", &message);
                    return Err(Errors(vec![error]));
                }
                next.added.push(Added { name: rule.name, spec: spec.clone() });
            }
            Change::Remove { name } | Change::Enable { name } | Change::Disable { name }
                if self.place(base, name).is_none() =>
            {
                let added: Vec<Rule> = self.added.iter().filter_map(Added::rule).collect();
                let of_base = base.all().map(|(rule, _)| rule);
                let kept = of_base.filter(|rule| !self.removed.contains(&rule.name));
                return Err(no_rule(change, name, kept.chain(&added)));
            }
            Change::Remove { name } => {
                next.added.retain(|added| added.name != *name);
                next.removed.insert(name.clone());
            }
            Change::Enable { name } => drop(next.enabled.insert(name.clone(), true)),
            Change::Disable { name } => drop(next.enabled.insert(name.clone(), false)),
        }
        let next = next.settle(base);
        let config = next.apply(base)?;
        Ok((next, config))
    }

    /// Where the rule of a name was written, if there is one.
    fn place(&self, base: &Config, name: &str) -> Option<Place> {
        if let Some(Added { spec, .. }) = self.added.iter().find(|added| added.name == name) {
            return Some(Place::Flag(format!("add -p {spec}")));
        }
        let of_base = base.all().find(|(rule, _)| rule.name == name);
        of_base.filter(|_| !self.removed.contains(name)).map(|(rule, _)| rule.place.clone())
    }

    /// Without what the configuration below says itself, or no longer has.
    pub fn settle(mut self, base: &Config) -> Self {
        if self == Self::default() {
            return self;
        }
        let below: HashMap<&str, (&Rule, bool)> =
            base.all().map(|(rule, on)| (rule.name.as_str(), (rule, on))).collect();
        let Self { added, removed, enabled } = &mut self;
        added.retain(|one| {
            let of_base = below.get(one.name.as_str());
            let Some((rule, _)) = of_base else { return true };
            let same = one.rule().is_some_and(|added| added.same(rule));
            if same {
                // That one stands again. It is on or off as this one was.
                removed.remove(&one.name);
                enabled.entry(one.name.clone()).or_insert(true);
            }
            !same
        });
        removed.retain(|name| below.contains_key(name.as_str()));
        if enabled.is_empty() {
            return self;
        }
        let added: HashSet<&str> = added.iter().map(|added| added.name.as_str()).collect();
        enabled.retain(|name, on| match below.get(name.as_str()) {
            _ if added.contains(name.as_str()) => !*on,
            Some((_, was)) => !removed.contains(name) && on != was,
            None => false,
        });
        self
    }
}

impl Added {
    /// The rule, if the SPEC has no mistake.
    fn rule(&self) -> Option<Rule> {
        rule(&self.spec, Some(&self.name)).ok()
    }
}

#[cfg(test)]
mod tests;
