//! The configuration file: TOML to a [`Config`].
//!
//! The document is walked by hand and not through serde's derive, which stops at the first mistake.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{
    Config, ConfigError, Errors, Interface, Way, check_interface, did_you_mean, masquerade_ports,
};
use crate::flows::{FlowSettings, Timeouts};
use crate::rule::{
    Invalid, Listen, Mistake, Mss, Place, Protocol, Rule, Source, Target, invalid, twice,
};

/// A kind of table in the file: how messages call it and its keys, and which keys it may have.
struct Shape {
    title: &'static str,
    prefix: &'static str,
    keys: &'static [&'static str],
}

const FILE: Shape = Shape {
    title: "the file",
    prefix: "",
    keys: &["interfaces", "metrics", "names", "flows", "masquerade", "rule"],
};
const INTERFACES: Shape = Shape {
    title: "[interfaces]",
    prefix: "interfaces.",
    keys: &["external", "internal", "attach"],
};
const INTERFACE: Shape =
    Shape { title: "the table of an interface", prefix: "interfaces.", keys: &["attach"] };
const METRICS: Shape = Shape { title: "[metrics]", prefix: "metrics.", keys: &["listen"] };
const NAMES: Shape = Shape { title: "[names]", prefix: "names.", keys: &["refresh"] };
const FLOWS: Shape = Shape {
    title: "[flows]",
    prefix: "flows.",
    keys: &["size", "udp", "udp_unanswered", "tcp", "tcp_transitory"],
};
const MASQUERADE: Shape = Shape { title: "[masquerade]", prefix: "masquerade.", keys: &["ports"] };
const RULE: Shape = Shape {
    title: "[[rule]]",
    prefix: "",
    keys: &["name", "protocol", "listen", "to", "source", "mss", "enabled"],
};

const DAY: u64 = 86_400;

type Value<'a> = Spanned<DeValue<'a>>;

/// One table of the file.
struct Section<'a> {
    shape: &'static Shape,
    table: &'a DeTable<'a>,
    line: usize,
    /// The name of the rule that it is, if that has one.
    rule: Option<&'a str>,
    /// The name of the interface that it is.
    interface: Option<&'a str>,
}

impl<'a> Section<'a> {
    fn get(&self, key: &str) -> Option<&'a Value<'a>> {
        self.table.get(key)
    }

    /// How messages call a key.
    fn path(&self, key: &str) -> String {
        match self.interface {
            Some(interface) => format!("{}{interface}.{key}", self.shape.prefix),
            None => format!("{}{key}", self.shape.prefix),
        }
    }
}

/// How much of a large file is parsed at a time: what the parser makes of a text is some thirty times
/// as large.
const PIECE: usize = 64 << 10;

/// Parses the text of a file. `path` is only for messages and for the rules' places.
pub fn parse(path: &Path, text: &str) -> Result<Config, Errors> {
    parse_by(path, text, PIECE)
}

/// [`parse`], what is longer than `size` bytes in pieces of about that many.
pub(super) fn parse_by(path: &Path, text: &str, size: usize) -> Result<Config, Errors> {
    let mut reader = Reader::new(path, text);
    let pieces = if text.len() > size { reader.pieces(text, size) } else { None };
    let config = match pieces {
        Some(config) => config,
        None => {
            reader = Reader::new(path, text);
            let (document, syntax) = DeTable::parse_recoverable(text);
            if !syntax.is_empty() {
                return Err(reader.not_toml(&syntax));
            }
            reader.config(document.get_ref())
        }
    };
    for (place, error) in config.check() {
        if let Place::File { line, .. } = place {
            reader.errors.push((*line, error));
        }
    }
    if reader.errors.is_empty() { Ok(config) } else { Err(reader.into_errors()) }
}

/// Where the pieces of a file begin: the first at its start, the others at lines of `[[rule]]`.
fn beginnings(text: &str, size: usize) -> Vec<usize> {
    let mut beginnings = vec![0];
    for (at, _) in text.match_indices("[[rule]]") {
        let is_line = at == 0 || text.as_bytes()[at - 1] == b'\n';
        let is_first = beginnings.len() == 1;
        if is_line && (is_first || beginnings.last().is_some_and(|last| at - last >= size)) {
            beginnings.push(at);
        }
    }
    beginnings
}

/// So the TOML crate calls what follows a list that is not closed.
const NO_COMMA: &str = "missing comma between array elements";

/// The TOML crate's words with what to do.
fn syntax_message(words: &str) -> String {
    let unquoted = ["string values must be quoted", "invalid date", "invalid float", "invalid int"];
    let remedy = if words == "duplicate key" {
        "keep one of them; several rules are several [[rule]]"
    } else if words.starts_with(NO_COMMA) {
        "put it there, or close the list before this with `]`"
    } else if unquoted.iter().any(|start| words.starts_with(start)) {
        "put text in quotes, as in listen = \"8000-8099\""
    } else {
        "correct it here"
    };
    format!("this is not TOML: {words}; {remedy}")
}

/// Reads one file and collects what is wrong with it, by line.
struct Reader {
    path: Arc<Path>,
    /// The offset of each, to find lines.
    newlines: Vec<usize>,
    /// Where the piece begins that is read now. The offsets of its values count from there.
    beginning: usize,
    errors: Vec<(usize, ConfigError)>,
}

impl Reader {
    fn new(path: &Path, text: &str) -> Self {
        let newlines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let newlines = newlines.map(|(at, _)| at).collect();
        Self { path: path.into(), newlines, beginning: 0, errors: Vec::new() }
    }

    fn line(&self, offset: usize) -> usize {
        1 + self.newlines.partition_point(|newline| *newline < self.beginning + offset)
    }

    fn error(&mut self, line: usize, rule: Option<&str>, key: &str, message: &str) {
        let place = Place::File { path: self.path.clone(), line };
        self.errors.push((line, ConfigError::new(place, rule, key, message)));
    }

    /// Blames one value of a key.
    fn blame(&mut self, section: &Section<'_>, key: &str, value: &Value<'_>, message: &str) {
        let line = self.line(value.span().start);
        self.error(line, section.rule, &section.path(key), message);
    }

    /// Blames a key where it is, or its table where it is not.
    fn blame_key(&mut self, section: &Section<'_>, key: &str, message: &str) {
        match section.get(key) {
            Some(value) => self.blame(section, key, value, message),
            None => self.error(section.line, section.rule, key, message),
        }
    }

    fn into_errors(mut self) -> Errors {
        self.errors.sort_by_key(|(line, _)| *line);
        Errors(self.errors.into_iter().map(|(_, error)| error).collect())
    }

    fn not_toml(mut self, syntax: &[toml::de::Error]) -> Errors {
        let mut unclosed = Vec::new();
        for error in syntax {
            let line = self.line(error.span().map_or(0, |span| span.start));
            if error.message().starts_with("unclosed") || error.message().starts_with(NO_COMMA) {
                unclosed.push(line);
            }
            self.error(line, None, "", &syntax_message(error.message()));
        }
        // What could be made of the rest is guesswork, and so are further errors on a line, and all
        // behind a bracket that is not closed.
        self.errors.sort_by_key(|(line, _)| *line);
        self.errors.dedup_by_key(|(line, _)| *line);
        if let Some(line) = unclosed.into_iter().min() {
            self.errors.retain(|(other, _)| *other <= line);
        }
        self.into_errors()
    }

    /// What is good of a document, read piece by piece. `None` if it has to be read as a whole: the
    /// pieces are not documents with the same meaning. They are if each is valid, the first has no
    /// rules, and the others, which begin with `[[rule]]`, have nothing else. A text or list that is
    /// cut in two is not valid.
    fn pieces(&mut self, text: &str, size: usize) -> Option<Config> {
        let mut config = Config::default();
        let beginnings = beginnings(text, size);
        let ends = beginnings.iter().skip(1).copied().chain([text.len()]);
        for (number, (beginning, end)) in beginnings.iter().copied().zip(ends).enumerate() {
            let (document, syntax) = DeTable::parse_recoverable(&text[beginning..end]);
            let document = document.get_ref();
            let only_rules = document.len() == 1 && document.contains_key("rule");
            let alone = if number == 0 { !document.contains_key("rule") } else { only_rules };
            if !syntax.is_empty() || !alone {
                return None;
            }
            self.beginning = beginning;
            let piece = self.config(document);
            if number == 0 {
                config = piece;
            } else {
                config.rules.extend(piece.rules);
                config.disabled.extend(piece.disabled);
            }
        }
        config.rules.shrink_to_fit();
        Some(config)
    }

    /// What is good of a document; `errors` has the rest.
    fn config(&mut self, document: &DeTable<'_>) -> Config {
        let file = Section { shape: &FILE, table: document, line: 1, rule: None, interface: None };
        self.unknown_keys(&file);
        let mut config = Config::default();
        if let Some(section) = self.section(&file, "interfaces", &INTERFACES) {
            config.external = self.interfaces(&section, "external");
            config.internal = self.interfaces(&section, "internal");
            config.attach = self.way(&section).unwrap_or(config.attach);
            config.attach_to = self.attach_to(&section, &config);
        }
        if let Some(section) = self.section(&file, "metrics", &METRICS) {
            config.metrics = self.metrics(&section);
        }
        if let Some(section) = self.section(&file, "names", &NAMES) {
            self.time(&section, "refresh", &mut config.refresh, 1..=DAY);
        }
        if let Some(section) = self.section(&file, "flows", &FLOWS) {
            self.flows(&section, &mut config.flows);
        }
        if let Some(section) = self.section(&file, "masquerade", &MASQUERADE) {
            self.masquerade(&section, &mut config.masquerade);
        }
        if let Some(rules) = file.get("rule") {
            match rules.get_ref() {
                DeValue::Array(rules) => {
                    for (rule, enabled) in rules.iter().filter_map(|rule| self.rule(&file, rule)) {
                        let list = if enabled { &mut config.rules } else { &mut config.disabled };
                        list.push(rule);
                    }
                    config.rules.shrink_to_fit();
                }
                _ => self.blame_key(&file, "rule", "rules are a list; write it as [[rule]]"),
            }
        }
        config
    }

    /// A rule, and whether it is enabled.
    fn rule(&mut self, file: &Section<'_>, value: &Value<'_>) -> Option<(Rule, bool)> {
        let DeValue::Table(table) = value.get_ref() else {
            let message = "a rule is a table; write [[rule]] and its keys in lines below";
            self.blame(file, "rule", value, message);
            return None;
        };
        let line = self.line(value.span().start);
        let name = table.get("name").and_then(|name| name.get_ref().as_str());
        let section = Section { shape: &RULE, table, line, rule: name, interface: None };
        self.unknown_keys(&section);
        let before = self.errors.len();
        self.text(&section, "name");
        let protocol = self.parsed(&section, "protocol").unwrap_or(Protocol::Tcp);
        let source = self.parsed(&section, "source").unwrap_or(Source::Preserve);
        let mss = self.mss(&section).unwrap_or_default();
        let enabled = self.boolean(&section, "enabled").unwrap_or(true);
        let listen = self.listen(&section);
        let to = self.targets(&section);
        // The rule as a whole is looked at only where its parts are good.
        let listen = listen.filter(|_| self.errors.len() == before)?;
        let rule = Rule {
            name: name.map_or_else(|| Rule::default_name(listen, protocol, &to), str::to_owned),
            protocol,
            listen,
            to: to.into(),
            source,
            mss,
            place: Place::File { path: self.path.clone(), line },
        };
        for Mistake { key, item, error: Invalid(message) } in rule.check() {
            let list = section.get(key).and_then(|value| value.get_ref().as_array());
            match item.and_then(|item| list?.get(item)) {
                Some(value) => self.blame(&section, key, value, &message),
                None => self.blame_key(&section, key, &message),
            }
        }
        Some((rule, enabled))
    }

    fn listen(&mut self, section: &Section<'_>) -> Option<Listen> {
        let Some(value) = section.get("listen") else {
            self.blame_key(section, "listen", "this is missing; write listen = \"PORT\"");
            return None;
        };
        let listen = match value.get_ref() {
            DeValue::String(text) => text.parse(),
            // The parser of ports has the words for most wrong numbers.
            DeValue::Integer(number) => match integer(value) {
                Some(number @ 0..) => number.to_string().parse(),
                _ => invalid!("there is no port {number}; write a number from 1 to 65535"),
            },
            other => Err(Invalid(wrong_type(other, "a port or text, as in \"8000-8099\""))),
        };
        self.or_blame(section, "listen", value, listen)
    }

    fn mss(&mut self, section: &Section<'_>) -> Option<Mss> {
        let value = section.get("mss")?;
        let mss = match value.get_ref() {
            DeValue::String(text) => text.parse(),
            DeValue::Boolean(false) => Ok(Mss::Off),
            DeValue::Boolean(true) => "true".parse(),
            DeValue::Integer(_) => Mss::number(integer(value).unwrap_or(i64::MAX)),
            other => Err(Invalid(wrong_type(other, "a number, \"auto\", or false"))),
        };
        self.or_blame(section, "mss", value, mss)
    }

    fn targets(&mut self, section: &Section<'_>) -> Box<[Target]> {
        if section.get("to").is_none() {
            self.blame_key(section, "to", "this is missing; write to = \"ADDRESS\"");
        }
        self.texts(section, "to", "text, as in \"192.168.1.10\"")
            .into_iter()
            .filter_map(|(value, text)| self.or_blame(section, "to", value, text.parse()))
            .collect()
    }

    fn interfaces(&mut self, section: &Section<'_>, key: &str) -> Vec<Interface> {
        let mut interfaces: Vec<Interface> = Vec::new();
        for (value, name) in self.texts(section, key, "a list of names, as in [\"eth0\"]") {
            let checked = match interfaces.iter().any(|other| other.name == name) {
                true => Err(twice(name)),
                false => check_interface(name),
            };
            if self.or_blame(section, key, value, checked).is_some() {
                let line = self.line(value.span().start);
                let place = Place::File { path: self.path.clone(), line };
                interfaces.push(Interface { name: name.to_owned(), place });
            }
        }
        interfaces
    }

    /// Tables of `[interfaces]` are named as interfaces.
    fn attach_to(&mut self, section: &Section<'_>, config: &Config) -> Vec<(Interface, Way)> {
        let mut attach_to = Vec::new();
        for (key, value) in section.table {
            let name = key.get_ref().as_ref();
            let DeValue::Table(table) = value.get_ref() else { continue };
            if INTERFACES.keys.contains(&name) {
                continue;
            }
            let line = self.line(key.span().start);
            let interface = Some(name);
            let own = Section { shape: &INTERFACE, table, line, rule: None, interface };
            self.unknown_keys(&own);
            let checked = check_interface(name);
            if self.or_blame(section, name, value, checked).is_none() {
                continue;
            }
            // Of the rest, flags and routes can make one.
            let all_named = !config.external.is_empty() && !config.internal.is_empty();
            if all_named && !config.named().any(|named| named.name == name) {
                self.error(line, None, &section.path(name), &config.unnamed(name));
            }
            if let Some(way) = self.way(&own) {
                let place = Place::File { path: self.path.clone(), line };
                attach_to.push((Interface { name: name.to_owned(), place }, way));
            }
        }
        attach_to
    }

    fn way(&mut self, section: &Section<'_>) -> Option<Way> {
        let attach = self.parsed(section, "attach")?;
        let line = self.line(section.get("attach")?.span().start);
        Some(Way { attach, place: Some(Place::File { path: self.path.clone(), line }) })
    }

    fn metrics(&mut self, section: &Section<'_>) -> Option<SocketAddr> {
        let text = self.text(section, "listen")?;
        let address = text.parse().ok().filter(|address: &SocketAddr| address.port() != 0);
        if address.is_none() {
            let message =
                format!("{text:?} is not an address with a port; write one, as in 127.0.0.1:9464");
            self.blame_key(section, "listen", &message);
        }
        address
    }

    fn flows(&mut self, section: &Section<'_>, flows: &mut FlowSettings) {
        const WEEK: u64 = 7 * DAY;
        self.size(section, &mut flows.size);
        let Timeouts { udp, udp_unanswered, tcp, tcp_transitory } = &mut flows.timeouts;
        // RFC 4787, REQ-5: never in less than two minutes.
        self.time(section, "udp", udp, 120..=WEEK);
        self.time(section, "udp_unanswered", udp_unanswered, 120..=WEEK);
        self.time(section, "tcp", tcp, 1..=WEEK);
        self.time(section, "tcp_transitory", tcp_transitory, 1..=WEEK);
    }

    /// Takes over how many flows there may be, if the key is there.
    fn size(&mut self, section: &Section<'_>, size: &mut u32) {
        const SIZES: RangeInclusive<i64> = 1024..=16_777_216;
        let Some(value) = section.get("size") else { return };
        let remedy = format!("a number from {} to {}", SIZES.start(), SIZES.end());
        let message = match (value.get_ref(), integer(value)) {
            (_, Some(number)) if SIZES.contains(&number) => return *size = number as u32,
            (DeValue::Integer(number), _) => {
                format!("there cannot be {number} flows; write {remedy}")
            }
            (other, _) => wrong_type(other, &remedy),
        };
        self.blame(section, "size", value, &message);
    }

    fn masquerade(&mut self, section: &Section<'_>, ports: &mut RangeInclusive<u16>) {
        let Some(text) = self.text(section, "ports") else { return };
        let Some(value) = section.get("ports") else { return };
        let range = self.or_blame(section, "ports", value, masquerade_ports(text));
        // Where there are none, no rule takes one of them.
        *ports = range.unwrap_or(RangeInclusive::new(1, 0));
    }

    /// Takes over the time under a key, if it is there: seconds, or text as in `5m`.
    fn time(
        &mut self,
        section: &Section<'_>,
        key: &str,
        time: &mut Duration,
        seconds: RangeInclusive<u64>,
    ) {
        let Some(value) = section.get(key) else { return };
        let read = match value.get_ref() {
            DeValue::Integer(_) => {
                integer(value).and_then(|number| number.try_into().ok()).map(Duration::from_secs)
            }
            DeValue::String(text) => humantime::parse_duration(text).ok(),
            _ => None,
        };
        let (least, most) = (*seconds.start(), *seconds.end());
        let wrong = match read {
            None => "this is not a time",
            Some(read) if read < Duration::from_secs(least) => "this is too short",
            Some(read) if read > Duration::from_secs(most) => "this is too long",
            Some(read) => return *time = read,
        };
        let (number, text) = (time.as_secs(), humantime::format_duration(*time));
        let message =
            format!("{wrong}; write seconds from {least} to {most}, as in {number} or \"{text}\"");
        self.blame(section, key, value, &message);
    }

    fn section<'a>(
        &mut self,
        file: &Section<'a>,
        key: &str,
        shape: &'static Shape,
    ) -> Option<Section<'a>> {
        let value = file.get(key)?;
        let DeValue::Table(table) = value.get_ref() else {
            self.blame(file, key, value, &wrong_type(value.get_ref(), shape.title));
            return None;
        };
        let section = Section {
            shape,
            table,
            line: self.line(value.span().start),
            rule: None,
            interface: None,
        };
        self.unknown_keys(&section);
        Some(section)
    }

    fn unknown_keys(&mut self, section: &Section<'_>) {
        let Shape { title, keys, .. } = section.shape;
        for (key, value) in section.table {
            let name = key.get_ref().as_ref();
            let is_interface = *title == INTERFACES.title && value.get_ref().is_table();
            if keys.contains(&name) || is_interface {
                continue;
            }
            let hint = did_you_mean(name, keys.iter().copied());
            let message = format!("no such key; {hint}{title} has {}", keys.join(", "));
            let line = self.line(key.span().start);
            self.error(line, section.rule, &section.path(name), &message);
        }
    }

    /// The text of a key, if it is there.
    fn text<'a>(&mut self, section: &Section<'a>, key: &str) -> Option<&'a str> {
        let value = section.get(key)?;
        if let DeValue::String(text) = value.get_ref() {
            return Some(text);
        }
        self.blame(section, key, value, &wrong_type(value.get_ref(), "text in quotes"));
        None
    }

    fn boolean(&mut self, section: &Section<'_>, key: &str) -> Option<bool> {
        let value = section.get(key)?;
        if let DeValue::Boolean(boolean) = value.get_ref() {
            return Some(*boolean);
        }
        self.blame(section, key, value, &wrong_type(value.get_ref(), "true or false"));
        None
    }

    /// The text of a key, parsed, if it is there.
    fn parsed<T>(&mut self, section: &Section<'_>, key: &str) -> Option<T>
    where
        T: FromStr<Err = Invalid>,
    {
        let parsed = self.text(section, key)?.parse();
        self.or_blame(section, key, section.get(key)?, parsed)
    }

    /// The text or list of texts of a key, each with its value for the line.
    fn texts<'a>(
        &mut self,
        section: &Section<'a>,
        key: &str,
        expected: &str,
    ) -> Vec<(&'a Value<'a>, &'a str)> {
        let values = match section.get(key) {
            Some(value) => value.get_ref().as_array().map_or(std::slice::from_ref(value), |a| a),
            None => &[],
        };
        let mut texts = Vec::new();
        for value in values {
            match value.get_ref() {
                DeValue::String(text) => texts.push((value, text.as_ref())),
                other => self.blame(section, key, value, &wrong_type(other, expected)),
            }
        }
        texts
    }

    fn or_blame<T>(
        &mut self,
        section: &Section<'_>,
        key: &str,
        value: &Value<'_>,
        result: Result<T, Invalid>,
    ) -> Option<T> {
        result.map_err(|Invalid(message)| self.blame(section, key, value, &message)).ok()
    }
}

fn integer(value: &Value<'_>) -> Option<i64> {
    let number = value.get_ref().as_integer()?;
    i64::from_str_radix(number.as_str(), number.radix()).ok()
}

fn wrong_type(value: &DeValue<'_>, expected: &str) -> String {
    let article = if value.is_integer() || value.is_array() { "an" } else { "a" };
    format!("this is {article} {}; write {expected}", value.type_str())
}
