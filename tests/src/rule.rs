//! Rules of one backend.

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
}

impl Rule {
    pub fn new(
        name: &str,
        protocol: &'static str,
        listen: RangeInclusive<u16>,
        backend: SocketAddr,
    ) -> Self {
        Self { name: name.to_owned(), protocol, address: None, listen, backend }
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
        let to = if self.backend.port() == *self.listen.start() {
            self.backend.ip().to_string()
        } else {
            address_and(self.backend.ip(), ports(self.backend.port()))
        };
        let Self { name, protocol, .. } = self;
        format!(
            "[[rule]]\nname = \"{name}\"\nprotocol = \"{protocol}\"\nlisten = \"{listen}\"\nto = \"{to}\"\n"
        )
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
            && at.is_ipv4() == self.backend.is_ipv4()
            && self.address.is_none_or(|address| address == at.ip())
            && self.listen.contains(&at.port())
    }

    pub fn leads_to(&self, protocol: u8, at: SocketAddr) -> bool {
        let width = self.listen.end() - self.listen.start();
        self.has(protocol)
            && at.ip() == self.backend.ip()
            && (self.backend.port()..=self.backend.port() + width).contains(&at.port())
    }
}
