//! A configuration, any text.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use portfwd::compile::{BoxPorts, Capacity, Compiler, HostAddresses, Resolved, explain, plan};
use portfwd::config::diff::diff;
use portfwd::config::overlay::{Change, Overlay};
use portfwd::config::{edit, parse};
use portfwd::network::Externals;
use portfwd::rule::{Host, Place, Rule};

/// Reads a configuration: a mistake has its line, and what has none can be compiled. A text in one line
/// is also read as the SPEC of `-p`.
pub fn config(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let path = Path::new("portfwd.toml");
    match parse(path, text) {
        Ok(config) => {
            let lines = 1..=text.lines().count().max(1);
            for rule in &config.rules {
                let Place::File { line, .. } = rule.place else { panic!("{:?}", rule.place) };
                assert!(lines.contains(&line), "line {line} of {lines:?}");
            }
            let mut config = config;
            check(&config.rules, config.masquerade.clone());
            // Nothing is asked for, nothing changes.
            let before = config.clone();
            config.add_flags(&[], &[]).unwrap();
            assert_eq!(before, config);
        }
        Err(errors) => {
            assert!(!errors.0.is_empty(), "neither a configuration nor a mistake");
            for error in &errors.0 {
                let error = error.to_string();
                let line = error.strip_prefix("portfwd.toml:").and_then(|rest| {
                    let (line, message) = rest.split_once(": ")?;
                    (!message.is_empty()).then(|| line.parse::<usize>().ok()).flatten()
                });
                // A mistake may be that something is missing at the end.
                let lines = 1..=text.split('\n').count() + 1;
                assert!(line.is_some_and(|line| lines.contains(&line)), "{error:?}");
                assert!(!error.contains('\n'), "{error:?}");
            }
        }
    }
    if let Ok(rule) = text.parse::<Rule>() {
        assert!(rule.check().is_empty(), "{rule} is impossible after all");
        let again: Rule =
            rule.to_string().parse().unwrap_or_else(|error| panic!("{rule}: {error}"));
        let place = rule.place.clone();
        assert_eq!(Rule { place, ..again }, rule, "{rule} says something else");
        check(&[rule], 40000..=60999);
    }
}

/// Changes the text of a configuration: what comes out says what was said before, with the change. The
/// first line is a SPEC to add, or the name of a rule; the others are the configuration.
pub fn edit(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (first, text) = text.split_once('\n').unwrap_or((text, ""));
    let path = Path::new("portfwd.toml");
    let before = parse(path, text);
    let mut changes = vec![
        Change::Add { spec: first.to_owned(), name: None },
        Change::Add { spec: "1:192.0.2.1".to_owned(), name: Some(first.to_owned()) },
        Change::Remove { name: first.to_owned() },
    ];
    for (rule, enabled) in before.iter().flat_map(|config| config.all()).take(8) {
        let name = rule.name.clone();
        changes.push(Change::Remove { name: name.clone() });
        changes.push(match enabled {
            true => Change::Disable { name },
            false => Change::Enable { name },
        });
    }
    for change in changes {
        let edited = match (&before, edit::apply(path, text, &change)) {
            (Ok(before), Ok(edited)) => (before, edited),
            (Err(_), Ok(_)) => panic!("{change} was made in a file with mistakes"),
            (_, Err(errors)) => {
                for error in errors.0 {
                    assert!(!error.to_string().contains('\n'), "{error:?}");
                }
                continue;
            }
        };
        let (before, edited) = edited;
        let after = parse(path, &edited).unwrap_or_else(|errors| panic!("{change}: {errors}"));
        // The same by another way: on top of what was there.
        let (overlay, expected) = Overlay::default()
            .with(before, &change)
            .unwrap_or_else(|errors| panic!("{change}: {errors}"));
        assert!(diff(&expected, &after).is_empty(), "{change}: {}", diff(&expected, &after));
        assert_eq!(overlay.settle(&after), Overlay::default(), "{change}");
    }
}

/// Whatever was let through has a meaning, and tables of it fit where they are made for.
fn check(rules: &[Rule], masquerade: std::ops::RangeInclusive<u16>) {
    let both = HostAddresses {
        v4: Some(Ipv4Addr::new(192, 168, 77, 10)),
        v6: Some(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x10)),
    };
    let resolved: Resolved = rules
        .iter()
        .flat_map(|rule| rule.to.iter())
        .filter_map(|target| match &target.host {
            Host::Name(name) => Some((name.clone(), both)),
            Host::Address(_) => None,
        })
        .collect();
    let plan = plan(rules, &resolved).unwrap_or_else(|refused| panic!("{refused}"));
    assert_eq!(explain(rules, &plan).len(), rules.len());
    let externals = Externals {
        v4: vec![Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(198, 51, 100, 7)],
        v6: vec![Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1)],
    };
    let ports = BoxPorts { ephemeral: 32768..=60999, masquerade };
    let capacity = Capacity::for_plan(rules, &plan, &ports, 1000);
    let mut compiler = Compiler::default();
    let update = compiler.compile(rules, &plan, &externals, &ports);
    assert!(capacity.holds(&update), "{capacity:?}");
    compiler.commit(&update);
    // The same again: the other half of each endpoint, and nothing new.
    let update = compiler.compile(rules, &plan, &externals, &ports);
    assert!(update.translations.is_empty() && update.pages.is_empty() && update.new.is_empty());
    assert!(capacity.holds(&update), "{capacity:?}");
    for leg in &plan.legs {
        let listens = leg.listen.map_or(leg.backend, |listen| listen);
        assert_eq!(listens.is_ipv4(), leg.backend.is_ipv4(), "{leg:?}");
    }
}
