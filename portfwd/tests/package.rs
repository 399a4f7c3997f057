//! What the package installs in /etc is right.

use std::path::Path;

use portfwd::config::{self, parse};

const FILE: &str = include_str!("../../dist/portfwd.toml");

#[test]
fn its_configuration_has_no_rule_and_a_right_one_when_uncommented() {
    let path = Path::new("portfwd.toml");
    assert_eq!(parse(path, FILE), Ok(config::Config::default()));
    let settings = FILE.lines().map(|line| match line.strip_prefix('#') {
        Some(setting) if !setting.starts_with(' ') => setting,
        _ => line,
    });
    let text = settings.collect::<Vec<_>>().join("\n");
    let config = parse(path, &text).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!((config.external.len(), config.internal.len(), config.rules.len()), (1, 1, 1));
    assert!(config.metrics.is_some());
}
