use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::config::diff::diff;
use crate::config::parse;

fn base(text: &str) -> Config {
    parse(Path::new("f.toml"), text).unwrap()
}

const BASE: &str = "\
[[rule]]
name = 'web'
listen = 80
to = '10.0.0.1'
[[rule]]
listen = 81
to = '10.0.0.1'
[[rule]]
name = 'off'
listen = 80
to = '10.0.0.2'
enabled = false
";

fn add(spec: &str, name: &str) -> Change {
    let name = (!name.is_empty()).then(|| name.to_owned());
    Change::Add { spec: spec.to_owned(), name }
}

fn remove(name: &str) -> Change {
    Change::Remove { name: name.to_owned() }
}

fn switch(name: &str, on: bool) -> Change {
    let name = name.to_owned();
    if on { Change::Enable { name } } else { Change::Disable { name } }
}

/// What comes of some changes, as text: the overlay, then each rule; an error.
fn after(changes: &[Change]) -> Result<(Overlay, Vec<String>), String> {
    let base = base(BASE);
    let start = (Overlay::default(), base.clone());
    let (overlay, config) = changes
        .iter()
        .try_fold(start, |(overlay, _), change| overlay.with(&base, change))
        .map_err(|errors| errors.to_string())?;
    assert_eq!(overlay.clone().settle(&base), overlay);
    assert_eq!(overlay.apply(&base).unwrap(), config);
    let rules = config.all().map(|(rule, on)| {
        let off = if on { "" } else { ", off" };
        let unsaved = if config.unsaved.contains(&rule.name) { ", not saved" } else { "" };
        format!("{} {rule}{off}{unsaved}", rule.name)
    });
    Ok((overlay, rules.collect()))
}

const WEB: &str = "web 80:10.0.0.1/tcp";
const PLAIN: &str = "81/tcp 81:10.0.0.1/tcp";
const OFF: &str = "off 80:10.0.0.2/tcp, off";

#[test]
fn changes_come_on_top() {
    for (changes, rules) in [
        (vec![], vec![WEB, PLAIN, OFF]),
        (vec![remove("web")], vec![PLAIN, OFF]),
        (vec![remove("off"), remove("81/tcp")], vec![WEB]),
        (
            vec![add("82:10.0.0.3", ""), add("83:10.0.0.3/udp", "game")],
            vec![
                WEB,
                PLAIN,
                "82/tcp 82:10.0.0.3/tcp, not saved",
                "game 83:10.0.0.3/udp, not saved",
                OFF,
            ],
        ),
        (vec![switch("web", false)], vec![PLAIN, OFF, "web 80:10.0.0.1/tcp, off, not saved"]),
        (
            vec![switch("web", false), switch("off", true)],
            vec![PLAIN, "off 80:10.0.0.2/tcp, not saved", "web 80:10.0.0.1/tcp, off, not saved"],
        ),
        (
            vec![add("82:10.0.0.3", "a"), switch("a", false)],
            vec![WEB, PLAIN, OFF, "a 82:10.0.0.3/tcp, off, not saved"],
        ),
        // The same name for something else.
        (
            vec![remove("web"), add("80:10.0.0.3", "web")],
            vec![PLAIN, "web 80:10.0.0.3/tcp, not saved", OFF],
        ),
        (vec![remove("off"), add("80:10.0.0.2", "off"), remove("web")], vec![]),
    ] {
        if rules.is_empty() {
            assert!(after(&changes).unwrap_err().contains("both listen on tcp 80"));
            continue;
        }
        assert_eq!(after(&changes).unwrap().1, rules, "{changes:?}");
    }
}

#[test]
fn what_is_as_below_is_no_change() {
    for changes in [
        vec![switch("web", false), switch("web", true)],
        vec![switch("web", true), switch("off", false)],
        vec![remove("web"), add("80:10.0.0.1/tcp", "web")],
        vec![switch("web", false), remove("web"), add("80:10.0.0.1", "web")],
        vec![add("82:10.0.0.1", ""), switch("82/tcp", false), remove("82/tcp")],
        vec![
            remove("web"),
            remove("off"),
            add("80:10.0.0.2", "off"),
            switch("off", false),
            add("80:10.0.0.1", "web"),
        ],
    ] {
        assert_eq!(
            after(&changes).unwrap(),
            (Overlay::default(), after(&[]).unwrap().1),
            "{changes:?}"
        );
    }
    // It was off below, and is on.
    let changes = [remove("web"), remove("off"), add("80:10.0.0.2", "off")];
    let (overlay, rules) = after(&changes).unwrap();
    assert_eq!((overlay.added.len(), overlay.enabled["off"]), (0, true));
    assert_eq!(rules, [PLAIN, "off 80:10.0.0.2/tcp, not saved"]);
}

#[test]
fn what_was_saved_is_settled() {
    let base = base(BASE);
    let changes =
        [add("82:10.0.0.3", "a"), add("83:10.0.0.3", "b"), remove("81/tcp"), switch("web", false)];
    let (overlay, config) =
        changes.iter().fold((Overlay::default(), base.clone()), |(overlay, _), change| {
            overlay.with(&base, change).unwrap()
        });
    let mut text = BASE.to_owned();
    let path = Path::new("f.toml");
    for (saved, change) in (1..).zip(&changes) {
        text = crate::config::edit::apply(path, &text, change).unwrap();
        let file = parse(path, &text).unwrap();
        let left = overlay.clone().settle(&file);
        assert_eq!(
            left.added.len() + left.removed.len() + left.enabled.len(),
            4 - saved,
            "{left:?}"
        );
        assert!(diff(&left.apply(&file).unwrap(), &config).is_empty());
        assert_eq!(left == Overlay::default(), saved == 4);
    }
    // What the file no longer has is neither removed nor switched.
    assert_eq!(Overlay { added: vec![], ..overlay }.settle(&Config::default()), Overlay::default());
}

#[test]
fn what_is_wrong_is_said_in_one_line() {
    for (change, line) in [
        (
            remove("wep"),
            "remove wep: there is no rule \"wep\"; did you mean \"web\"? `portfwd list` has all names",
        ),
        (remove(""), "remove : there is no rule \"\"; `portfwd list` has all names"),
        (
            switch("82", true),
            "enable 82: there is no rule \"82\"; did you mean \"82/tcp\"? `portfwd list` has all names",
        ),
        (
            switch("gone", false),
            "disable gone: there is no rule \"gone\"; `portfwd list` has all names",
        ),
        (
            add("90:10.0.0.1", "web"),
            "add -p 90:10.0.0.1: rule \"web\": there is such a rule already (f.toml:1); remove that one first, \
             or give this one another name with --name",
        ),
        (
            add("82:10.0.0.9", ""),
            "add -p 82:10.0.0.9: rule \"82/tcp\": there is such a rule already (add -p 82:10.0.0.3); remove \
             that one first, or give this one another name with --name",
        ),
        (
            add("0:10.0.0.1", ""),
            "add -p 0:10.0.0.1: there is no port 0; write a number from 1 to 65535",
        ),
        (
            add("90:10.0.0.1", "a\nb"),
            "add -p 90:10.0.0.1: rule \"a\\nb\": name: the name \"a\\nb\" has a control character; leave it out",
        ),
        (add("75-85:10.0.0.1", ""), ""),
        (
            add("80:10.0.0.9", "b"),
            "add -p 80:10.0.0.9: listen: rule \"web\" (f.toml:1) and rule \"b\" (add -p 80:10.0.0.9) both listen \
             on tcp 80; change one of them, or remove it",
        ),
        (
            switch("off", true),
            "f.toml:8: listen: rule \"web\" (f.toml:1) and rule \"off\" (f.toml:8) both listen on tcp 80; change \
             one of them, or remove it",
        ),
    ] {
        let changes = [
            remove("81/tcp"),
            add("81:10.0.0.1", "gnu"),
            remove("gnu"),
            add("82:10.0.0.3", ""),
            change,
        ];
        // A range is wider than a port, and both may be.
        if line.is_empty() {
            after(&changes).unwrap();
        } else {
            assert_eq!(after(&changes).unwrap_err(), line);
        }
    }
}

#[test]
fn changes_in_json() {
    for (change, json) in [
        (add("80:10.0.0.1", ""), r#"{"add":{"spec":"80:10.0.0.1"}}"#),
        (add("80:10.0.0.1", "a"), r#"{"add":{"spec":"80:10.0.0.1","name":"a"}}"#),
        (remove("a"), r#"{"remove":{"name":"a"}}"#),
        (switch("a", true), r#"{"enable":{"name":"a"}}"#),
        (switch("a", false), r#"{"disable":{"name":"a"}}"#),
    ] {
        assert_eq!(serde_json::to_string(&change).unwrap(), json);
        assert_eq!(serde_json::from_str::<Change>(json).unwrap(), change);
    }
    let (overlay, _) =
        after(&[add("82:10.0.0.3", "a"), remove("web"), switch("off", true)]).unwrap();
    let json =
        r#"{"added":[{"name":"a","spec":"82:10.0.0.3"}],"removed":["web"],"enabled":{"off":true}}"#;
    assert_eq!(serde_json::to_string(&overlay).unwrap(), json);
    assert_eq!(serde_json::from_str::<Overlay>(json).unwrap(), overlay);
    assert_eq!(serde_json::from_str::<Overlay>("{}").unwrap(), Overlay::default());
}

proptest! {
    /// Against a list of rules that is changed in place.
    #[test]
    fn changes_mean_what_they_say(
        steps in prop::collection::vec((0..4u8, 0..5u16, 1..3u8), 0..20),
        off in prop::collection::vec(any::<bool>(), 0..4),
    ) {
        let mut model: Vec<(String, String, bool)> = Vec::new();
        let mut text = String::new();
        for (number, off) in (0..).zip(off) {
            text += &format!("[[rule]]\nname='r{number}'\nlisten={}\nto='10.0.0.1'\nenabled={}\n", number + 100, !off);
            model.push((format!("r{number}"), format!("{}:10.0.0.1/tcp", number + 100), !off));
        }
        let base = base(&text);
        let mut overlay = Overlay::default();
        for (kind, number, host) in steps {
            let name = format!("r{number}");
            let spec = format!("{}:10.0.0.{host}/tcp", number + 100);
            let found = model.iter().position(|rule| rule.0 == name);
            let change = match kind {
                0 => add(&spec, &name),
                1 => remove(&name),
                2 => switch(&name, true),
                _ => switch(&name, false),
            };
            let with = overlay.with(&base, &change);
            prop_assert_eq!(with.is_ok(), found.is_some() == (kind > 0), "{:?}", change);
            let Ok((next, config)) = with else { continue };
            overlay = next;
            match (kind, found) {
                (0, _) => model.push((name, spec, true)),
                (1, Some(at)) => drop(model.remove(at)),
                (_, Some(at)) => model[at].2 = kind == 2,
                _ => unreachable!(),
            }
            let mut told: Vec<_> =
                config.all().map(|(rule, on)| (rule.name.clone(), rule.to_string(), on)).collect();
            let mut wanted = model.clone();
            told.sort();
            wanted.sort();
            prop_assert_eq!(told, wanted);
            let same = diff(&base, &config).is_empty();
            prop_assert_eq!(overlay == Overlay::default(), same, "{:?}", overlay);
        }
    }
}
