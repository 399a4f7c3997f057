use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use proptest::prelude::*;

use super::*;

const FILE: &str = "f.toml";

fn rule(spec: &str, name: &str) -> Rule {
    let rule: Rule = spec.parse().unwrap();
    if name.is_empty() { rule } else { Rule { name: name.to_owned(), ..rule } }
}

fn added(text: &str, rule: &Rule) -> Result<String, String> {
    add(Path::new(FILE), text, rule).map_err(|errors| errors.to_string())
}

fn removed(text: &str, name: &str) -> Result<String, String> {
    remove(Path::new(FILE), text, name).map_err(|errors| errors.to_string())
}

fn switched(text: &str, name: &str, on: bool) -> Result<String, String> {
    set_enabled(Path::new(FILE), text, name, on).map_err(|errors| errors.to_string())
}

#[test]
fn rules_are_added_as_a_user_would_write_them() {
    let mut text = String::new();
    for (rule, lines) in [
        (
            rule("8080:10.0.0.1:80", ""),
            "protocol = \"tcp\"\nlisten   = \"8080\"\nto       = \"10.0.0.1:80\"\n",
        ),
        (
            rule("*:[fd00::1]/udp", "a \"b\" \\"),
            "name     = 'a \"b\" \\'\nprotocol = \"udp\"\nlisten   = \"*\"\nto       = \"fd00::1\"\n",
        ),
        (
            Rule {
                to: ["10.0.0.1", "[fd00::1]:80"].map(|target| target.parse().unwrap()).into(),
                source: Source::Masquerade,
                mss: Mss::At(1360),
                ..rule("82:10.0.0.1", "c")
            },
            "name     = \"c\"\nprotocol = \"tcp\"\nlisten   = \"82\"\nto       = [\"10.0.0.1\", \"[fd00::1]:80\"]\n\
             source   = \"masquerade\"\nmss      = 1360\n",
        ),
        (
            Rule { mss: Mss::Off, ..rule("[2001:db8::1]:83-84:[fd00::1]:93-94", "d") },
            "name     = \"d\"\nprotocol = \"tcp\"\nlisten   = \"[2001:db8::1]:83-84\"\nto       = \"[fd00::1]:93-94\"\n\
             mss      = false\n",
        ),
    ] {
        let blank = if text.is_empty() { "" } else { "\n" };
        let expected = format!("{text}{blank}[[rule]]\n{lines}");
        text = added(&text, &rule).unwrap();
        assert_eq!(text, expected);
    }
    let one = "[[rule]]\nprotocol = \"tcp\"\nlisten   = \"80\"\nto       = \"10.0.0.1\"\n";
    for (before, between) in [
        ("# end", "\n\n"),
        ("# end\n", "\n"),
        ("# end\n\n", ""),
        ("# end\n \n", ""),
        ("\n", ""),
        ("# a\r\n# b", "\r\n\r\n"),
        ("\u{feff}", "\n\n"),
    ] {
        let text = added(before, &rule("80:10.0.0.1", "")).unwrap();
        let newline = if before.contains('\r') { "\r\n" } else { "\n" };
        assert_eq!(text, format!("{before}{between}{}", one.replace('\n', newline)), "{before:?}");
    }
}

/// A file in which each comment says what becomes of it.
const COMMENTS: &str = "\
# stays
[[rule]] # goes with a
name = 'a' # goes with a
# goes with a
listen = '80'
to = [
  # goes with a
  '10.0.0.1',
] # goes with a
# goes with a

# stays

  # goes with b
  # goes with b
  [[rule]]
  listen = 81
  to = '10.0.0.1'
# goes with c
[[rule]]
name     = \"c\"
enabled  = false # goes with c
listen   = 81
to       = \"10.0.0.1\"
#goes with c


[metrics] # stays
# stays
";

#[test]
fn a_removed_rule_takes_its_comments_along() {
    let start = COMMENTS.replacen("# stays\n", "# stays\n\n", 1);
    for (name, kept) in [("a", 20), ("81/tcp", 25), ("c", 23)] {
        let text = removed(&start, name).unwrap();
        let gone = if name == "81/tcp" { "# goes with b" } else { &format!("goes with {name}") };
        let wanted: Vec<&str> = start.lines().filter(|line| !is_blank(line)).collect();
        assert!(!text.contains(gone), "{text}");
        for comment in ["# stays", "goes with a", "goes with b", "goes with c"] {
            let count = |text: &str| text.matches(comment).count();
            assert!(gone.ends_with(comment) || count(&text) == count(&start), "{text}");
        }
        assert!(text.lines().filter(|line| !is_blank(line)).count() < wanted.len());
        assert_eq!(text.lines().count(), kept, "{text}");
    }
    // What touches the header above is the rule's.
    assert!(removed(COMMENTS, "a").unwrap().starts_with("# stays\n\n  # goes with b"));
    let all = ["a", "81/tcp", "c"].iter().try_fold(start, |text, name| removed(&text, name));
    assert_eq!(all.unwrap(), "# stays\n\n# stays\n\n[metrics] # stays\n# stays\n");
    // The file ends with the rule before.
    let two = "[[rule]]\nname = 'a'\nlisten = 80\nto = '10.0.0.1'\n\n[[rule]]\nname = 'b'\nlisten = 81\nto = '10.0.0.1'";
    assert_eq!(removed(two, "b").unwrap(), "[[rule]]\nname = 'a'\nlisten = 80\nto = '10.0.0.1'\n");
    assert_eq!(removed(&removed(two, "b").unwrap(), "a").unwrap(), "");
}

#[test]
fn rules_are_switched_where_they_are() {
    let off = switched(COMMENTS, "a", false).unwrap();
    assert_eq!(off, COMMENTS.replace("goes with a\nname", "goes with a\nenabled = false\nname"));
    assert_eq!(switched(&off, "a", true).unwrap(), off.replace("d = false\nn", "d = true\nn"));
    let off = switched(COMMENTS, "81/tcp", false).unwrap();
    assert_eq!(off, COMMENTS.replace("  listen = 81", "  enabled = false\n  listen = 81"));
    assert_eq!(switched(COMMENTS, "c", false).unwrap(), COMMENTS);
    assert_eq!(
        switched(COMMENTS, "c", true).unwrap_err(),
        "f.toml:20: listen: rule \"81/tcp\" (f.toml:16) and rule \"c\" (f.toml:20) both listen on tcp 81; \
         change one of them, or remove it"
    );
    let text = removed(COMMENTS, "81/tcp").unwrap();
    assert_eq!(switched(&text, "c", true).unwrap(), text.replace("= false #", "= true #"));
    let aligned = "[[rule]]\r\nname     = 'a'\r\nlisten   = 80\r\nto       = '10.0.0.1'\r\n";
    assert_eq!(
        switched(aligned, "a", false).unwrap(),
        aligned.replace("]]\r\n", "]]\r\nenabled  = false\r\n")
    );
}

#[test]
fn what_cannot_be_edited_is_refused() {
    let web = rule("80:10.0.0.1", "web");
    let inline = "rule = [{ name = 'a', listen = 80, to = '10.0.0.1' },\n { listen = 81, to = '10.0.0.1' }]\n";
    let refused = |line: usize, name: &str| {
        format!(
            "f.toml:{line}: rule {name:?}: rules in one list, rule = [...], are not edited; write each as \
             [[rule]] with its keys in lines below, or edit the file by hand"
        )
    };
    let unclear = "f.toml:1: it is not clear where lines go here; make this change by hand";
    assert_eq!(added(inline, &web).unwrap_err(), refused(1, "a"));
    assert_eq!(removed(inline, "81/tcp").unwrap_err(), refused(1, "a"));
    assert_eq!(switched(inline, "a", false).unwrap_err(), refused(1, "a"));
    assert_eq!(added("rule = []", &web).unwrap_err(), unclear);
    assert_eq!(
        removed(COMMENTS, "81/tpc").unwrap_err(),
        "f.toml: there is no rule \"81/tpc\"; did you mean \"81/tcp\"? `portfwd list` has all names"
    );
    assert_eq!(
        switched("", "web", true).unwrap_err(),
        "f.toml: there is no rule \"web\"; `portfwd list` has all names"
    );
    assert_eq!(
        added(COMMENTS, &web).unwrap_err(),
        "-p 80:10.0.0.1: listen: rule \"a\" (f.toml:2) and rule \"web\" (-p 80:10.0.0.1) both listen on tcp \
         80; change one of them, or remove it"
    );
    assert_eq!(
        added(COMMENTS, &rule("90:10.0.0.1", "c")).unwrap_err(),
        "-p 90:10.0.0.1: rule \"c\": name: the rule at f.toml:20 has this name already; give each its own"
    );
    assert_eq!(
        added("", &rule("90:10.0.0.1", "\n")).unwrap_err(),
        "-p 90:10.0.0.1: rule \"\\n\": name: the name \"\\n\" has a control character; leave it out"
    );
    // It has mistakes already.
    assert!(
        removed("[[rule]]\nname = 'a'\n", "a")
            .unwrap_err()
            .starts_with("f.toml:1: rule \"a\": listen")
    );
    // The last line of a text looks like a comment.
    let odd = "[[rule]]\nlisten = 80\nto = '10.0.0.1'\nname = '''\n#''' # '''\n[[rule]]\nname = 'b'\nlisten = 81\nto = '10.0.0.1'\n";
    assert_eq!(removed(odd, "b").unwrap_err(), unclear);
}

/// A line of a file, and whose it is: 0 is nobody's.
type Line = (usize, String);

/// Some lines with blank ones around them. Rules have the number as port, name and backend.
fn paragraphs() -> impl Strategy<Value = Vec<Line>> {
    let comments = || prop::collection::vec("#[ a-z\"'\\[]{0,8}", 0..3);
    let rule = (comments(), comments(), comments(), 0..4u8, any::<bool>(), any::<[bool; 3]>());
    let one = prop_oneof![
        4 => rule.prop_map(Some),
        2 => Just(None),
    ];
    (prop::collection::vec((one, comments(), 1..3usize), 0..7)).prop_map(|parts| {
        let mut lines: Vec<Line> = Vec::new();
        for (number, (rule, free, blank)) in (1..).zip(parts) {
            match rule {
                Some((above, within, below, switch, list, [indent, named, last])) => {
                    let pad = if indent { "  " } else { "" };
                    let mut own: Vec<String> = above;
                    own.push(format!("{pad}[[rule]]"));
                    own.extend(within);
                    if named {
                        own.push(format!("{pad}name = 'r{number}'"));
                    }
                    let switches = ["enabled = true", "enabled = false # off", "enabled=false", ""];
                    let switch = switches[usize::from(switch)];
                    if !switch.is_empty() {
                        own.push(format!("{pad}{switch}"));
                    }
                    own.push(format!("{pad}listen = {number}"));
                    match list {
                        true => {
                            own.extend(["to = [", "# in it", "'10.0.0.1' ]"].map(str::to_owned))
                        }
                        false => own.push(format!("{pad}to = '10.0.0.1' # there")),
                    }
                    if !last {
                        own.extend(below);
                    }
                    lines.extend(own.into_iter().map(|line| (number, line)));
                }
                None => lines.extend(free.into_iter().map(|line| (0, line))),
            }
            lines.extend(std::iter::repeat_n((0, String::new()), blank));
        }
        lines
    })
}

#[derive(Clone, Debug)]
enum Step {
    Add(bool),
    Remove(prop::sample::Index),
    Switch(prop::sample::Index, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        any::<bool>().prop_map(Step::Add),
        any::<prop::sample::Index>().prop_map(Step::Remove),
        any::<(prop::sample::Index, bool)>().prop_map(|(which, on)| Step::Switch(which, on)),
    ];
    prop::collection::vec(step, 0..12)
}

proptest! {
    #[test]
    fn what_is_not_changed_stays(
        start in paragraphs(),
        metrics in any::<bool>(),
        steps in steps(),
        crlf in any::<bool>(),
    ) {
        let newline = if crlf { "\r\n" } else { "\n" };
        let top = if metrics { vec![(0, "[metrics] # of none".to_owned()), (0, String::new())] } else { vec![] };
        let mut lines: Vec<Line> = top.into_iter().chain(start).collect();
        let mut text: String = lines.iter().map(|(_, line)| line.clone() + newline).collect();
        lines.retain(|(_, line)| !line.is_empty());
        let mut next = 100;
        for step in steps {
            // Whose lines there are, whether they have a name, and whether they are on.
            let mut rules: Vec<(usize, bool, bool)> = Vec::new();
            for (owner, line) in lines.iter().filter(|(owner, _)| *owner > 0) {
                if rules.last().is_none_or(|(last, ..)| last != owner) {
                    rules.push((*owner, false, true));
                }
                let last = rules.last_mut().unwrap();
                last.1 |= line.trim().starts_with("name");
                last.2 &= !line.trim().starts_with("enabled") || !line.contains("false");
            }
            let name = |(number, named, _): (usize, bool, bool)| match named {
                true => format!("r{number}"),
                false => format!("{number}/tcp"),
            };
            let config = parse(Path::new(FILE), &text).unwrap();
            for on in [true, false] {
                let of_file = if on { &config.rules } else { &config.disabled };
                let told: Vec<_> = of_file.iter().map(|rule| (rule.name.clone(), rule.listen.to_string())).collect();
                let known = rules.iter().filter(|rule| rule.2 == on);
                prop_assert_eq!(told, known.map(|rule| (name(*rule), rule.0.to_string())).collect::<Vec<_>>());
            }
            match step {
                Step::Add(named) => {
                    let name = if named { format!("r{next}") } else { String::new() };
                    let rule = rule(&format!("{next}:10.0.0.1"), &name);
                    text = added(&text, &rule).unwrap();
                    lines.extend(super::lines(&rule).into_iter().map(|line| (next, line)));
                    next += 1;
                }
                Step::Remove(_) | Step::Switch(..) if rules.is_empty() => {}
                Step::Remove(which) => {
                    let rule = *which.get(&rules);
                    text = removed(&text, &name(rule)).unwrap();
                    lines.retain(|(owner, _)| *owner != rule.0);
                }
                Step::Switch(which, on) => {
                    let rule = *which.get(&rules);
                    text = switched(&text, &name(rule), on).unwrap();
                    let own = |(owner, _): &Line| *owner == rule.0;
                    let switch = lines.iter_mut().find(|line| own(line) && line.1.trim().starts_with("enabled"));
                    match switch {
                        Some((_, line)) => *line = line.replace(&(!on).to_string(), &on.to_string()),
                        None if on => {}
                        None => {
                            let header = lines.iter().position(|line| own(line) && line.1.contains("[[rule]]"));
                            let header = header.unwrap();
                            let key = |line: &&Line| line.1.contains('=') && !line.1.trim().starts_with('#');
                            let key = lines[header..].iter().find(key).unwrap().1.clone();
                            let indent = &key[..key.len() - key.trim_start().len()];
                            let space = if key.contains("  =") || key.contains("protocol") { "  " } else { " " };
                            lines.insert(header + 1, (rule.0, format!("{indent}enabled{space}= false")));
                        }
                    }
                }
            }
            let left: Vec<&str> = text.lines().filter(|line| !is_blank(line)).collect();
            prop_assert_eq!(left, lines.iter().map(|(_, line)| line.as_str()).collect::<Vec<_>>(), "{}", text);
            // A file that became empty has forgotten.
            let [all, long] = ["\n", "\r\n"].map(|newline| text.matches(newline).count());
            prop_assert!(long == 0 || long == all);
        }
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_file_is_replaced_as_a_whole() {
    let directory = tempfile::tempdir().unwrap();
    let real = directory.path().join("real.toml");
    let link = directory.path().join("portfwd.toml");
    fs::write(&real, "# one\n").unwrap();
    fs::set_permissions(&real, Permissions::from_mode(0o640)).unwrap();
    symlink("real.toml", &link).unwrap();
    // As root, also somebody else's.
    let owner = if fs::metadata(&real).unwrap().uid() == 0 { Some(65534) } else { None };
    std::os::unix::fs::chown(&real, owner, owner).unwrap();
    let before = fs::metadata(&real).unwrap();
    // Whoever has it open goes on with the old one.
    let opened = File::open(&real).unwrap();
    save(&link, |text| Ok(format!("{text}# two\n"))).unwrap();
    let after = fs::metadata(&real).unwrap();
    assert_eq!(fs::read_to_string(&real).unwrap(), "# one\n# two\n");
    assert_eq!(io::read_to_string(opened).unwrap(), "# one\n");
    assert_eq!((after.uid(), after.gid(), mode(&real)), (before.uid(), before.gid(), 0o640));
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_ne!(before.ino(), after.ino());
    // Nothing to write.
    save(&link, |text| Ok(text.to_owned())).unwrap();
    assert_eq!(fs::metadata(&real).unwrap().ino(), after.ino());
    // What is refused is not written.
    let rule = rule("80:10.0.0.1", "");
    let web = "[[rule]]\nlisten = 80\nto = '10.0.0.1'\n";
    fs::write(&real, web).unwrap();
    save(&link, |text| add(&link, text, &rule)).unwrap_err();
    assert_eq!(fs::read_to_string(&real).unwrap(), web);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);

    let message = |path: &Path| save(path, |_| Ok(String::new())).unwrap_err().to_string();
    let missing = directory.path().join("missing.toml");
    assert_eq!(
        message(&missing),
        format!(
            "{}: cannot be read (No such file or directory (os error 2)) and stays as it was; write it first",
            missing.display()
        )
    );
    fs::write(&real, b"\xff").unwrap();
    assert!(message(&link).contains("cannot be read (stream did not contain valid UTF-8)"));
}
