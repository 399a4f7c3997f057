//! What README.md shows is what there is.

use std::path::Path;

use portfwd::config::parse;
use portfwd::rule::Rule;
use portfwd_ebpf::table::{Dropped, Passed, ToStack};

const README: &str = include_str!("../../README.md");

/// The text between the first `start` and the `end` that follows it.
fn between(start: &str, end: &str) -> &'static str {
    let (_, rest) = README.split_once(start).unwrap_or_else(|| panic!("{start} is in README.md"));
    rest.split_once(end).unwrap_or_else(|| panic!("{end} follows {start}")).0
}

#[test]
fn its_configuration_is_right_and_has_every_key() {
    let text = between("```toml\n", "```");
    let config = parse(Path::new("README.md"), text).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!((config.external.len(), config.internal.len(), config.rules.len()), (1, 1, 1));
    assert!(config.metrics.is_some());
    // A key that is unknown is refused with the list of those that exist.
    for table in ["[interfaces]", "[metrics]", "[names]", "[flows]", "[masquerade]", "[[rule]]"] {
        let wrong = format!("{table}\nx = 1\n");
        let errors = parse(Path::new("x"), &wrong).expect_err("x is no key").to_string();
        let keys = errors.lines().find_map(|line| line.split_once(" has ")).expect("the keys").1;
        for key in keys.split(", ") {
            assert!(text.contains(key), "{table} {key} is not in README.md");
        }
    }
}

#[test]
fn its_rules_on_the_command_line_are_right() {
    let mut specs = 0;
    for row in between("| example | does |", "\n\n").lines() {
        let Some((_, spec)) = row.split_once("`-p ") else { continue };
        let spec = spec.split('`').next().unwrap_or_default().trim_matches('\'');
        spec.parse::<Rule>().unwrap_or_else(|error| panic!("{spec}: {error}"));
        specs += 1;
    }
    assert!(specs >= 5);
}

#[test]
fn it_has_every_reason_with_its_meaning() {
    let passed = Passed::ALL.iter().map(|reason| (reason.name(), reason.meaning()));
    let dropped = Dropped::ALL.iter().map(|reason| (reason.name(), reason.meaning()));
    let to_stack = ToStack::ALL.iter().map(|reason| (reason.name(), reason.meaning()));
    for (name, meaning) in passed.chain(dropped).chain(to_stack) {
        let row = format!("| `{name}` | {meaning} |");
        assert!(README.contains(&row), "README.md has no row {row}");
    }
}
