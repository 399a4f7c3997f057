//! The values of a rule: ports, protocols, addresses to listen on and backends, to and from text.

use std::cmp::Ordering;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What is wrong with a value and how to mend it, in one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

/// `Err(Invalid)` from a format string.
macro_rules! invalid {
    ($($message:tt)*) => { Err(Invalid(format!($($message)*))) };
}
pub(crate) use invalid;

/// Ports as a rule names them.
///
/// Parsing never makes a port 0 and never a range whose first port is not below its last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ports {
    /// One port, `80`.
    One(u16),
    /// Both ends belong to it, `27015-27030`.
    Range { first: u16, last: u16 },
    /// Every port, `*`.
    All,
}

impl Ports {
    /// The lowest port, 0 for [`Ports::All`].
    pub fn first(self) -> u16 {
        match self {
            Ports::One(port) => port,
            Ports::Range { first, .. } => first,
            Ports::All => 0,
        }
    }

    /// The highest port.
    pub fn last(self) -> u16 {
        match self {
            Ports::One(port) => port,
            Ports::Range { last, .. } => last,
            Ports::All => u16::MAX,
        }
    }

    /// How many ports these are, 65,536 for [`Ports::All`].
    pub fn width(self) -> u32 {
        u32::from(self.last()) - u32::from(self.first()) + 1
    }

    /// Whether `port` is one of these.
    pub fn contains(self, port: u16) -> bool {
        (self.first()..=self.last()).contains(&port)
    }

    /// Whether any port is in both.
    pub fn overlaps(self, other: Ports) -> bool {
        self.first() <= other.last() && other.first() <= self.last()
    }

    /// The ports of both, which must overlap.
    pub(super) fn shared(self, other: Ports) -> Ports {
        if self == Ports::All {
            return other;
        }
        let (first, last) = (self.first().max(other.first()), self.last().min(other.last()));
        if first == last { Ports::One(first) } else { Ports::Range { first, last } }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ports::One(port) => write!(f, "{port}"),
            Ports::Range { first, last } => write!(f, "{first}-{last}"),
            Ports::All => f.write_str("*"),
        }
    }
}

impl FromStr for Ports {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text == "*" {
            return Ok(Ports::All);
        }
        let Some((first, last)) = text.split_once('-') else {
            return Ok(Ports::One(port(text)?));
        };
        let (first, last) = (port(first)?, port(last)?);
        match first.cmp(&last) {
            Ordering::Less => Ok(Ports::Range { first, last }),
            Ordering::Equal => Ok(Ports::One(first)),
            Ordering::Greater => {
                invalid!("the range {first}-{last} is reversed; write {last}-{first}")
            }
        }
    }
}

fn port(text: &str) -> Result<u16, Invalid> {
    if text.is_empty() {
        return invalid!("a port is missing; write PORT, FIRST-LAST or *");
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return invalid!("{text:?} is not a port; write a number from 1 to 65535");
    }
    match text.parse() {
        Ok(0) => invalid!("there is no port 0; write a number from 1 to 65535"),
        Ok(port) => Ok(port),
        Err(_) => invalid!("port {text} is too high; write a number from 1 to 65535"),
    }
}

/// The transport protocols that a rule claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    TcpUdp,
    /// Whatever no narrower rule claims: the DMZ host.
    Any,
}

impl Protocol {
    /// Whether TCP is among them.
    pub fn tcp(self) -> bool {
        self != Protocol::Udp
    }

    /// Whether UDP is among them.
    pub fn udp(self) -> bool {
        self != Protocol::Tcp
    }

    /// Whether all others are among them.
    pub fn other(self) -> bool {
        self == Protocol::Any
    }

    /// The protocol of both, if they have one.
    pub(super) fn shared(self, other: Protocol) -> Option<Protocol> {
        match (self.tcp() && other.tcp(), self.udp() && other.udp()) {
            (true, true) => Some(Protocol::TcpUdp),
            (true, false) => Some(Protocol::Tcp),
            (false, true) => Some(Protocol::Udp),
            (false, false) => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::TcpUdp => "tcp+udp",
            Protocol::Any => "any",
        })
    }
}

impl FromStr for Protocol {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            "tcp+udp" => Ok(Protocol::TcpUdp),
            "any" => Ok(Protocol::Any),
            _ => invalid!("{text:?} is not a protocol; write tcp, udp, tcp+udp or any"),
        }
    }
}

/// The external address and ports that a rule claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Listen {
    /// `None` is every address of the external interfaces.
    pub address: Option<IpAddr>,
    pub ports: Ports,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        self.ports.fmt(f)
    }
}

impl FromStr for Listen {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (address, ports) = match split_host(text)? {
            (host, Some(ports)) => (host, ports),
            (host, None) => match host.parse::<IpAddr>() {
                Ok(IpAddr::V4(address)) => {
                    return invalid!("{address} has no port; write {address}:PORT or {address}:*");
                }
                Ok(IpAddr::V6(address)) => {
                    return invalid!(
                        "{address} has no port; write [{address}]:PORT or [{address}]:*"
                    );
                }
                Err(_) => return Ok(Listen { address: None, ports: host.parse()? }),
            },
        };
        let Ok(address) = address.parse::<IpAddr>() else {
            if let (Ok(Ports::One(first)), Ok(Ports::One(last))) =
                (address.parse::<Ports>(), ports.parse::<Ports>())
            {
                return invalid!("{text:?} is not a range of ports; write {first}-{last}");
            }
            return invalid!(
                "{address:?} is not an IP address; write an address of this box, or only the \
                 port to listen on every address"
            );
        };
        let ports = ports.parse()?;
        if address.is_unspecified() {
            return invalid!(
                "{address} is no address to listen on; leave it out to listen on every address: \
                 {ports}"
            );
        }
        if let IpAddr::V6(v6) = address
            && let Some(v4) = v6.to_ipv4_mapped()
        {
            return invalid!("{address} is an IPv4 address in IPv6 form; write {v4}:{ports}");
        }
        if let Some(reason) = not_a_host(address) {
            return invalid!(
                "{address} is {reason}; write an address of an external interface, or leave it \
                 out: {ports}"
            );
        }
        Ok(Listen { address: Some(address), ports })
    }
}

/// Splits `HOST`, `HOST:PORTS`, `[V6]`, `[V6]:PORTS` and a bare `V6`, without looking at the ports.
fn split_host(text: &str) -> Result<(&str, Option<&str>), Invalid> {
    if let Some(rest) = text.strip_prefix('[') {
        let Some((host, rest)) = rest.split_once(']') else {
            return invalid!("{text:?} lacks a closing bracket; write [ADDRESS]:PORT");
        };
        if host.parse::<Ipv6Addr>().is_err() {
            return invalid!("{host:?} is not an IPv6 address, and only those go in brackets");
        }
        return match rest.strip_prefix(':') {
            Some(ports) => Ok((host, Some(ports))),
            None if rest.is_empty() => Ok((host, None)),
            None => invalid!("{rest:?} cannot follow [{host}]; write [{host}]:PORT"),
        };
    }
    if text.parse::<Ipv6Addr>().is_ok() {
        return Ok((text, None));
    }
    match text.rsplit_once(':') {
        Some((host, ports)) if host.parse::<Ipv6Addr>().is_ok() => {
            invalid!("an IPv6 address with a port needs brackets; write [{host}]:{ports}")
        }
        Some((host, _)) if host.contains(':') => {
            invalid!("{text:?} has too many colons; write ADDRESS:PORT or [IPV6]:PORT")
        }
        Some((host, ports)) => Ok((host, Some(ports))),
        None => Ok((text, None)),
    }
}

/// What a backend is that is the box itself.
const THIS_BOX: &str = "the backend's own address; if that is this box, one of its others, on which \
                        the service has to listen too";

/// Why packets of other hosts can neither be sent to this address nor arrive by it.
fn not_a_host(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_loopback() => Some("a loopback address, which never leaves the box"),
        _ if address.is_multicast() => Some("a multicast address, which names a group of hosts"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("the broadcast address, which names all hosts"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Some("a link-local address, which means nothing beyond one link")
        }
        _ => None,
    }
}

/// What a rule sends to, before names are resolved.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    Address(IpAddr),
    /// A host name after RFC 1123, in lower case, with its final dot if the user wrote one.
    Name(String),
}

impl Host {
    /// Whether it can have an IPv6 address, or an IPv4 one: a name may have both.
    pub(super) fn may_be(&self, v6: bool) -> bool {
        match self {
            Host::Address(address) => address.is_ipv6() == v6,
            Host::Name(_) => true,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Address(address) => address.fmt(f),
            Host::Name(name) => f.write_str(name),
        }
    }
}

impl FromStr for Host {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let Ok(address) = text.parse::<IpAddr>() else {
            return host_name(text).map(Host::Name);
        };
        if address.is_unspecified() {
            return invalid!("{address} names no host; write the backend's address");
        }
        if let IpAddr::V6(v6) = address
            && let Some(v4) = v6.to_ipv4_mapped()
        {
            return invalid!("{address} is an IPv4 address in IPv6 form; write {v4}");
        }
        if let Some(reason) = not_a_host(address) {
            let host = if address.is_loopback() { THIS_BOX } else { "the backend's own address" };
            return invalid!("{address} is {reason}; write {host}");
        }
        Ok(Host::Address(address))
    }
}

fn host_name(text: &str) -> Result<String, Invalid> {
    if text.is_empty() {
        return invalid!("the backend is missing; write its address or name");
    }
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let last = name.rsplit('.').next().unwrap_or_default();
    // Resolvers take such "names" for odd spellings of IPv4 addresses: 10.0.1 for 10.0.0.1.
    let number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let hex = |digits: &str| digits.bytes().all(|b| b.is_ascii_hexdigit());
    if number(last) || last.strip_prefix("0x").is_some_and(hex) {
        return invalid!(
            "{text:?} is not an IP address; write four numbers from 0 to 255, as in 192.168.1.10"
        );
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return invalid!(
            "{text:?} is neither an IP address nor a host name; names have letters, digits, \
             hyphens and dots"
        );
    }
    if last == "localhost" {
        return invalid!(
            "{text} is a loopback address, which never leaves the box; write {THIS_BOX}"
        );
    }
    Ok(if text.ends_with('.') { name + "." } else { name })
}

/// One backend of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    pub host: Host,
    /// `None` keeps the port that the client used. Parsing never makes [`Ports::All`].
    pub ports: Option<Ports>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.ports) {
            (host, None) => host.fmt(f),
            (Host::Address(IpAddr::V6(address)), Some(ports)) => write!(f, "[{address}]:{ports}"),
            (host, Some(ports)) => write!(f, "{host}:{ports}"),
        }
    }
}

impl FromStr for Target {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (host, ports) = split_host(text)?;
        if host.contains('/') {
            return invalid!("{host:?} is not one host; write its address without a \"/\"");
        }
        let target = Target { host: host.parse()?, ports: ports.map(str::parse).transpose()? };
        match target.ports {
            Some(Ports::All) => {
                invalid!("a backend cannot have the port *; leave it out to keep the port")
            }
            _ => Ok(target),
        }
    }
}

/// What becomes of the client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// The backend sees the client's address.
    Preserve,
    /// The backend sees an address of this box.
    Masquerade,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Preserve => "preserve",
            Source::Masquerade => "masquerade",
        })
    }
}

impl FromStr for Source {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "preserve" => Ok(Source::Preserve),
            "masquerade" => Ok(Source::Masquerade),
            _ => invalid!("{text:?} is not a kind of source; write preserve or masquerade"),
        }
    }
}

/// The largest segments of TCP that a rule lets ends agree on (the MSS option of SYNs).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Mss {
    /// What fits the way through this box.
    #[default]
    Auto,
    /// Whatever they like.
    Off,
    /// Bytes of a segment's payload.
    At(u16),
}

impl Mss {
    /// Linux takes no lower one for its own; the header of IPv4 and TCP is 40 bytes of 65,535.
    const RANGE: std::ops::RangeInclusive<i64> = 88..=65_495;

    /// As the file has it beside text.
    pub fn number(number: i64) -> Result<Self, Invalid> {
        if !Self::RANGE.contains(&number) {
            let (least, most) = (Self::RANGE.start(), Self::RANGE.end());
            return invalid!(
                "segments cannot have at most {number} bytes; write a number from {least} to \
                 {most}, \"auto\", or false"
            );
        }
        Ok(Self::At(number as u16))
    }
}

impl FromStr for Mss {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => invalid!("{text:?} is no size of segments; write a number, \"auto\", or false"),
        }
    }
}

/// As the user writes it: `"auto"`, `false` or a number.
impl Serialize for Mss {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Off => serializer.serialize_bool(false),
            Self::At(bytes) => serializer.serialize_u16(*bytes),
        }
    }
}

impl<'de> Deserialize<'de> for Mss {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Number(i64),
            Off(bool),
        }
        let read = match Written::deserialize(deserializer)? {
            Written::Text(text) => text.parse(),
            Written::Number(number) => Self::number(number),
            Written::Off(false) => Ok(Self::Off),
            Written::Off(true) => "true".parse(),
        };
        read.map_err(serde::de::Error::custom)
    }
}

/// JSON has these as the user writes them.
macro_rules! serde_as_text {
    ($($type:ty),*) => { $(
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )* };
}

serde_as_text!(Ports, Protocol, Listen, Host, Target, Source);
