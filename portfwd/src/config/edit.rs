//! Changes the text of a configuration. Whatever a change is not about stays as it is, byte for byte:
//! comments, order, formatting, line endings.
//!
//! Texts are cut by lines, where the parser says that things are, and not written anew from a document.
//! Each result is read again, and refused unless it says just what it should.
//!
//! A rule ends with its last key. Its comments go along when it is removed: those in lines right above
//! it, with no blank line between, and those right below, unless they touch what follows.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt as _, fchown};
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::diff::diff;
use super::overlay::Change;
use super::{Config, ConfigError, Errors, no_rule, parse};
use crate::rule::{Invalid, Mss, Place, Rule, Source, Target};

/// Makes a change.
///
/// # Errors
///
/// As the functions below.
pub fn apply(path: &Path, text: &str, change: &Change) -> Result<String, Errors> {
    match change {
        Change::Add { spec, name } => {
            add(path, text, &super::overlay::rule(spec, name.as_deref())?)
        }
        Change::Remove { name } => remove(path, text, name),
        Change::Enable { name } => set_enabled(path, text, name, true),
        Change::Disable { name } => set_enabled(path, text, name, false),
    }
}

/// Adds a rule at the end.
///
/// # Errors
///
/// The text has mistakes, or would have with it; or its rules are not written as `[[rule]]`.
pub fn add(path: &Path, text: &str, rule: &Rule) -> Result<String, Errors> {
    let text = Text::read(path, text)?;
    text.may_be_edited()?;
    if let Some(mistake) = rule.check().into_iter().next() {
        let Invalid(message) = mistake.error;
        let error = ConfigError::new(&rule.place, Some(&rule.name), mistake.key, &message);
        return Err(Errors(vec![error]));
    }
    let mut edited = text.text.to_owned();
    let blank = edited.lines().next_back().is_none_or(is_blank);
    if !edited.is_empty() && !edited.ends_with('\n') {
        edited.push_str(text.newline());
    }
    if !blank {
        edited.push_str(text.newline());
    }
    for line in lines(rule) {
        edited.push_str(&line);
        edited.push_str(text.newline());
    }
    let mut expected = text.config.clone();
    expected.rules.push(rule.clone());
    text.checked(edited, expected)
}

/// Removes the rule of a name, which may be its default one.
///
/// # Errors
///
/// The text has mistakes, or would have without it; there is no such rule; or rules are not written as
/// `[[rule]]`.
pub fn remove(path: &Path, text: &str, name: &str) -> Result<String, Errors> {
    let text = Text::read(path, text)?;
    let found = text.find(name)?;
    let Range { mut start, mut end } = found.lines.clone();
    let comments = |line: &&str| line.trim_start().starts_with('#');
    let above = text.text[..start].split_inclusive('\n').rev().take_while(comments);
    start -= above.map(str::len).sum::<usize>();
    let below = text.text[end..].split_inclusive('\n').take_while(comments);
    let below: usize = below.map(str::len).sum();
    if text.text[end + below..].lines().next().is_none_or(is_blank) {
        end += below;
    }
    // One paragraph less: the blank lines on one side go with it.
    let (mut before, mut after) = (&text.text[..start], &text.text[end..]);
    let blank_before = || before.split_inclusive('\n').rev().take_while(|line| is_blank(line));
    if after.lines().all(is_blank) {
        after = "";
        before = &before[..before.len() - blank_before().map(str::len).sum::<usize>()];
    } else if before.is_empty() || blank_before().next().is_some() {
        let blank = after.split_inclusive('\n').take_while(|line| is_blank(line));
        after = &after[blank.map(str::len).sum::<usize>()..];
    }
    let mut expected = text.config.clone();
    expected.rules.retain(|rule| rule.name != name);
    expected.disabled.retain(|rule| rule.name != name);
    text.checked(format!("{before}{after}"), expected)
}

/// Sets whether the rule of a name, which may be its default one, is enabled.
///
/// # Errors
///
/// As those of [`remove`].
pub fn set_enabled(path: &Path, text: &str, name: &str, enabled: bool) -> Result<String, Errors> {
    let text = Text::read(path, text)?;
    let found = text.find(name)?;
    if found.enabled == enabled {
        return Ok(text.text.to_owned());
    }
    let mut edited = text.text.to_owned();
    match found.switch {
        Some(value) => edited.replace_range(value, &enabled.to_string()),
        None => {
            // Below the header, as the key below it is written.
            let key = &text.text[found.first_key..];
            let line = text.text[..found.first_key].rfind('\n').map_or(0, |newline| newline + 1);
            let indent = &text.text[line..found.first_key];
            let width = key.find('=').unwrap_or_default();
            let newline = text.newline();
            let switch = format!("{indent}{:<width$}= {enabled}{newline}", "enabled ");
            edited.insert_str(found.below_header, &switch);
        }
    }
    let mut expected = text.config.clone();
    let (from, to) = match enabled {
        true => (&mut expected.disabled, &mut expected.rules),
        false => (&mut expected.rules, &mut expected.disabled),
    };
    to.extend(from.extract_if(.., |rule| rule.name == name));
    to.sort_by_key(line);
    text.checked(edited, expected)
}

/// A configuration without mistakes, and its text.
struct Text<'a> {
    path: &'a Path,
    text: &'a str,
    config: Config,
}

/// Where a rule is. All are offsets in the text.
struct Found {
    enabled: bool,
    /// From its header to its last key.
    lines: Range<usize>,
    below_header: usize,
    first_key: usize,
    /// The value of its key `enabled`.
    switch: Option<Range<usize>>,
}

impl<'a> Text<'a> {
    fn read(path: &'a Path, text: &'a str) -> Result<Self, Errors> {
        Ok(Self { path, text, config: parse(path, text)? })
    }

    fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.config.all().map(|(rule, _)| rule)
    }

    /// Between lines that are written anew.
    fn newline(&self) -> &'static str {
        let first = self.text.split_inclusive('\n').next();
        if first.is_some_and(|line| line.ends_with("\r\n")) { "\r\n" } else { "\n" }
    }

    /// Where a line begins.
    fn offset(&self, line: usize) -> usize {
        let newlines = self.text.match_indices('\n').map(|(at, _)| at + 1);
        [0].into_iter().chain(newlines).nth(line - 1).unwrap_or(self.text.len())
    }

    fn refused(&self, line: usize, rule: Option<&str>, message: &str) -> Errors {
        let place = Place::File { path: self.path.into(), line };
        Errors(vec![ConfigError::new(place, rule, "", message)])
    }

    /// Refuses rules that are written as values of one list.
    fn may_be_edited(&self) -> Result<(), Errors> {
        let Some(first) = self.rules().min_by_key(|rule| line(rule)) else { return Ok(()) };
        let header =
            self.text[self.offset(line(first))..].trim_start_matches(['\u{feff}', ' ', '\t']);
        if header.starts_with("[[") {
            return Ok(());
        }
        let message = "rules in one list, rule = [...], are not edited; write each as [[rule]] with \
                       its keys in lines below, or edit the file by hand";
        Err(self.refused(line(first), Some(&first.name), message))
    }

    fn find(&self, name: &str) -> Result<Found, Errors> {
        let Some(rule) = self.rules().find(|rule| rule.name == name) else {
            return Err(no_rule(self.path.display(), name, self.rules()));
        };
        self.may_be_edited()?;
        let first = line(rule);
        let next = self.rules().map(line).filter(|other| *other > first).min();
        let start = self.offset(first);
        let end = next.map_or(self.text.len(), |next| self.offset(next));
        // A document by itself, of this rule and what else comes before the next one.
        let piece = &self.text[start..end];
        let unclear = || self.refused(first, Some(name), UNCLEAR);
        let document = DeTable::parse(piece).map_err(|_| unclear())?;
        let rules = document.get_ref().get("rule").and_then(|rules| rules.get_ref().as_array());
        let Some(DeValue::Table(table)) = rules.and_then(|rules| Some(rules.first()?.get_ref()))
        else {
            return Err(unclear());
        };
        let first_key = table.keys().map(|key| key.span().start).min().ok_or_else(unclear)?;
        let last_value = table.values().map(|value| value.span().end).max().ok_or_else(unclear)?;
        let line_end = |at: usize| piece[at..].find('\n').map_or(piece.len(), |more| at + more + 1);
        let switch = table.get("enabled").map(|value| value.span());
        Ok(Found {
            enabled: self.config.rules.iter().any(|rule| rule.name == name),
            lines: start..start + line_end(last_value),
            below_header: start + line_end(0),
            first_key: start + first_key,
            switch: switch.map(|value| start + value.start..start + value.end),
        })
    }

    /// The edited text, if it says what is expected.
    fn checked(&self, edited: String, expected: Config) -> Result<String, Errors> {
        let mistakes = expected.check();
        if !mistakes.is_empty() {
            return Err(Errors(mistakes.into_iter().map(|(_, error)| error).collect()));
        }
        let names = |config: &Config| -> Vec<String> {
            config.all().map(|(rule, _)| rule.name.clone()).collect()
        };
        match parse(self.path, &edited) {
            Ok(config)
                if names(&config) == names(&expected) && diff(&expected, &config).is_empty() =>
            {
                Ok(edited)
            }
            _ => Err(self.refused(1, None, UNCLEAR)),
        }
    }
}

/// What is said of texts that only look as if they could be cut by lines.
const UNCLEAR: &str = "it is not clear where lines go here; make this change by hand";

/// Where a rule of a file is.
fn line(rule: &Rule) -> usize {
    match rule.place {
        Place::File { line, .. } => line,
        Place::Flag(_) => usize::MAX,
    }
}

fn is_blank(line: &str) -> bool {
    line.trim().is_empty()
}

/// A rule as a user would write it.
fn lines(rule: &Rule) -> Vec<String> {
    let Rule { name, protocol, listen, to, source, mss, place: _ } = rule;
    let quoted = |text: String| toml::Value::String(text).to_string();
    let mut lines = vec!["[[rule]]".to_owned()];
    let mut add = |key: &str, value: String| lines.push(format!("{key:<8} = {value}"));
    if *name != Rule::default_name(*listen, *protocol, to) {
        add("name", quoted(name.clone()));
    }
    add("protocol", quoted(protocol.to_string()));
    add("listen", quoted(listen.to_string()));
    let texts: Vec<String> = to.iter().map(Target::to_string).map(quoted).collect();
    add("to", if let [one] = &texts[..] { one.clone() } else { format!("[{}]", texts.join(", ")) });
    if *source != Source::Preserve {
        add("source", quoted(source.to_string()));
    }
    match mss {
        Mss::Auto => {}
        Mss::Off => add("mss", "false".to_owned()),
        Mss::At(bytes) => add("mss", bytes.to_string()),
    }
    lines
}

/// What a file said, and what it says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Edited {
    pub before: String,
    pub after: String,
}

/// Edits a file. Whoever reads it finds the old text or the new one, also after a crash.
///
/// # Errors
///
/// What `edit` says, or why the file cannot be read or written. It is as it was then.
pub fn save(
    path: &Path,
    edit: impl FnOnce(&str) -> Result<String, Errors>,
) -> Result<Edited, Errors> {
    let refused = |what: &str, error: io::Error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => "write it first",
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                "allow portfwd to, or edit it by hand"
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "make room on its file system"
            }
            io::ErrorKind::ResourceBusy => "it is mounted by itself: mount its directory instead",
            _ => "edit it by hand",
        };
        let message = format!("cannot be {what} ({error}) and stays as it was; {remedy}");
        Errors(vec![ConfigError::new(path.display(), None, "", &message)])
    };
    // A link to it stays a link.
    let file = fs::canonicalize(path).map_err(|error| refused("read", error))?;
    let before = fs::read_to_string(&file).map_err(|error| refused("read", error))?;
    let after = edit(&before)?;
    if after != before {
        replace(&file, &after).map_err(|error| refused("written", error))?;
    }
    Ok(Edited { before, after })
}

/// Puts a new file in place of one, with its mode and owner.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("/"));
    let before = fs::metadata(file)?;
    let mut prefix = file.file_name().unwrap_or_default().to_owned();
    prefix.push(".");
    // It is gone if anything fails.
    let mut new = tempfile::Builder::new().prefix(&prefix).tempfile_in(directory)?;
    let owner = |file: &fs::Metadata| (file.uid(), file.gid());
    if owner(&new.as_file().metadata()?) != owner(&before) {
        fchown(new.as_file(), Some(before.uid()), Some(before.gid())).map_err(|error| {
            let message = format!(
                "it belongs to another user or group, which this process may not give a file to: {error}; chown \
                 root:root"
            );
            io::Error::new(error.kind(), message)
        })?;
    }
    new.as_file().set_permissions(before.permissions())?;
    new.as_file_mut().write_all(text.as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(file)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests;
