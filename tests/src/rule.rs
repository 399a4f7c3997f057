//! Rules as tests know them.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use crate::packet::{TCP, UDP};

/// The listened ports of `*`.
pub const ANY: RangeInclusive<u16> = 0..=u16::MAX;

/// A rule: what the configuration says of it, and what the wire should show.
#[derive(Clone, Debug)]
pub struct Rule {
    pub name: String,
    pub protocol: &'static str,
    /// `None`: every external address of the backend's family.
    pub address: Option<IpAddr>,
    pub listen: RangeInclusive<u16>,
    /// Where the first listened port leads.
    pub backend: SocketAddr,
    /// All other listened ports lead there, too.
    pub one_port: bool,
    /// Further backends, with the same ports.
    pub others: Vec<IpAddr>,
    pub masquerade: bool,
    /// As the configuration has it; empty if it has none.
    pub mss: &'static str,
}

impl Rule {
    pub fn new(
        name: &str,
        protocol: &'static str,
        listen: RangeInclusive<u16>,
        backend: SocketAddr,
    ) -> Self {
        Self {
            name: name.to_owned(),
            protocol,
            address: None,
            listen,
            backend,
            one_port: false,
            others: Vec::new(),
            masquerade: false,
            mss: "",
        }
    }

    pub fn toml(&self) -> String {
        let ports = |first: u16| match (first, first + (self.listen.end() - self.listen.start())) {
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        let address_and = |address: IpAddr, ports: String| match address {
            IpAddr::V4(address) => format!("{address}:{ports}"),
            IpAddr::V6(address) => format!("[{address}]:{ports}"),
        };
        let listened =
            if self.listen == ANY { "*".to_owned() } else { ports(*self.listen.start()) };
        let listen =
            self.address.map_or(listened.clone(), |address| address_and(address, listened));
        let to = |address: IpAddr| match self.backend.port() {
            port if self.one_port => SocketAddr::new(address, port).to_string(),
            port if port == *self.listen.start() => address.to_string(),
            port => address_and(address, ports(port)),
        };
        let to: Vec<_> = self.backends().map(|address| format!("\"{}\"", to(address))).collect();
        let to = if to.len() == 1 { to.concat() } else { format!("[{}]", to.join(", ")) };
        let source = if self.masquerade { "source = \"masquerade\"\n" } else { "" };
        let mss = if self.mss.is_empty() { String::new() } else { format!("mss = {}\n", self.mss) };
        let Self { name, protocol, .. } = self;
        format!(
            "[[rule]]\nname = \"{name}\"\nprotocol = \"{protocol}\"\nlisten = \"{listen}\"\nto = {to}\n{source}{mss}"
        )
    }

    /// The addresses of all backends.
    pub fn backends(&self) -> impl Iterator<Item = IpAddr> {
        [self.backend.ip()].into_iter().chain(self.others.iter().copied())
    }

    /// The first and the last of the backends' ports.
    pub fn answering(&self) -> (u16, u16) {
        let width = if self.one_port { 0 } else { self.listen.end() - self.listen.start() };
        (self.backend.port(), self.backend.port() + width)
    }

    /// Whether the backend, or how it sees the client, is left to the router.
    pub fn chooses(&self) -> bool {
        self.masquerade || !self.others.is_empty()
    }

    pub fn has(&self, protocol: u8) -> bool {
        match protocol {
            TCP => self.protocol != "udp",
            UDP => self.protocol != "tcp",
            _ => false,
        }
    }

    /// Whether the rule listens at an address and port that belong to the router.
    pub fn listens(&self, protocol: u8, at: SocketAddr) -> bool {
        self.has(protocol)
            && match self.address {
                Some(address) => address == at.ip(),
                None => at.is_ipv4() == self.backend.is_ipv4(),
            }
            && self.listen.contains(&at.port())
    }

    pub fn leads_to(&self, protocol: u8, at: SocketAddr) -> bool {
        let (first, last) = self.answering();
        self.has(protocol)
            && self.backends().any(|backend| backend == at.ip())
            && (first..=last).contains(&at.port())
    }
}
