//! The rules under which all contenders are measured, as each of them writes them.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::RangeInclusive;

use portfwd_bench_ebpf::{PORTS, Services};

use crate::proxy::{Forward, Transport};
use crate::rig;

/// The first listened port of each external address.
const LISTEN: u16 = 10_000;
/// The first port of each backend.
const BACKEND: u16 = 20_000;

/// Which rules there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rules {
    /// So many single ports, UDP and TCP in turn: an external address has 8,192 ports of each, and a
    /// backend of its own. Ports change on the way.
    Single(u32),
    /// All 65,535 UDP ports of one address as one rule; ports stay as they are.
    Range,
}

impl Rules {
    /// The rules for single ports, one by one.
    pub fn iter(self) -> impl Iterator<Item = Forward> {
        let count = match self {
            Self::Single(count) => count,
            Self::Range => 0,
        };
        (0..count).map(|number| {
            let transport = if number % 2 == 0 { Transport::Udp } else { Transport::Tcp };
            let (address, port) = ((number / 2) / PORTS, ((number / 2) % PORTS) as u16);
            Forward {
                transport,
                listen: SocketAddrV4::new(nth(rig::EXTERNAL, address), LISTEN + port),
                to: SocketAddrV4::new(nth(rig::SERVER, address), BACKEND + port),
            }
        })
    }

    /// The UDP services where clients see them.
    pub fn listened(self) -> Services {
        self.services(rig::EXTERNAL, LISTEN)
    }

    /// The UDP services where they are.
    pub fn backends(self) -> Services {
        self.services(rig::SERVER, if self == Self::Range { LISTEN } else { BACKEND })
    }

    /// One rule more, which the others leave room for.
    pub fn another(self) -> Option<Forward> {
        match self {
            Self::Single(count) => Self::Single(count + 1).iter().last(),
            Self::Range => None,
        }
    }

    /// Traffic for the range goes to some of its ports below the ephemeral ones.
    fn services(self, address: Ipv4Addr, port: u16) -> Services {
        let count = match self {
            Self::Single(count) => count.div_ceil(2),
            Self::Range => 5000,
        };
        Services { address: address.to_bits(), port: port.into(), count }
    }

    /// portfwd's configuration.
    pub fn toml(self, attach: &str) -> String {
        let mut text = format!(
            "[interfaces]\nexternal = [\"wan0\"]\ninternal = [\"lan0\"]\nattach = \"{attach}\"\n"
        );
        for Forward { transport, listen, to } in self.iter() {
            let protocol = transport.name();
            let _ = write!(
                text,
                "[[rule]]\nname = \"{listen}/{protocol}\"\nprotocol = \"{protocol}\"\nlisten = \"{listen}\"\nto = \"{to}\"\n",
            );
        }
        if self == Self::Range {
            let _ = write!(
                text,
                "[[rule]]\nname = \"range\"\nprotocol = \"udp\"\nlisten = \"{}:1-65535\"\nto = \"{}\"\n",
                rig::EXTERNAL,
                rig::SERVER
            );
        }
        text
    }
}

impl Rules {
    /// portfwd's configuration, with a rule more that shares a port of the first backend: both need flows
    /// then. There is room for so many that are not established yet: half of the size.
    pub fn stateful_toml(self, flows: u32) -> String {
        let (listen, to) = (SocketAddrV4::new(rig::EXTERNAL, 9), self.backends());
        let to = SocketAddrV4::new(Ipv4Addr::from_bits(to.address), to.port as u16);
        let size = (2 * flows).max(65_536);
        let rule = format!(
            "[flows]\nsize = {size}\n[[rule]]\nname = \"twin\"\nprotocol = \"udp\"\nlisten = \"{listen}\"\nto = \"{to}\"\n"
        );
        // Tables that are not rules come first.
        self.toml("native").replacen("[[rule]]", &format!("{rule}[[rule]]"), 1)
    }
}

impl Rules {
    /// portfwd's configuration, with masquerade on these ports.
    pub fn masquerade_toml(self, ports: RangeInclusive<u16>) -> String {
        let (first, last) = ports.into_inner();
        let table = format!("[masquerade]\nports = \"{first}-{last}\"\n[[rule]]");
        let text = self.toml("native").replace("[[rule]]\n", "[[rule]]\nsource = \"masquerade\"\n");
        text.replacen("[[rule]]", &table, 1)
    }
}

/// The address that is `number` after the first.
pub fn nth(first: Ipv4Addr, number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(first.to_bits() + number)
}

/// The last of some services: in a chain of rules, the one that is looked at last.
pub fn last(services: Services) -> Services {
    let Services { address, port, count } = services;
    let last = count - 1;
    Services { address: address + last / PORTS, port: port + last % PORTS, count: 1 }
}

/// `10,000`
pub fn thousands(number: u32) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl std::fmt::Display for Rules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Single(1) => f.write_str("1 rule"),
            Self::Single(count) => write!(f, "{} rules", thousands(*count)),
            Self::Range => f.write_str("one range of 65,535 ports"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_what_the_rules_forward() {
        let rules = Rules::Single(40_000);
        let udp: Vec<Forward> =
            rules.iter().filter(|rule| rule.transport == Transport::Udp).collect();
        for (services, end) in [
            (rules.listened(), (|rule: &Forward| rule.listen) as fn(&Forward) -> SocketAddrV4),
            (rules.backends(), |rule| rule.to),
        ] {
            assert_eq!(services.count as usize, udp.len());
            for (number, rule) in udp.iter().enumerate() {
                let number = number as u32;
                let at = end(rule);
                assert_eq!(at.ip().to_bits(), services.address + number / PORTS);
                assert_eq!(u32::from(at.port()), services.port + number % PORTS);
            }
            let last = last(services);
            let end = end(udp.last().unwrap());
            assert_eq!((last.address, last.port), (end.ip().to_bits(), end.port().into()));
        }
    }

    #[test]
    fn there_are_addresses_for_100_000_rules() {
        let last = Rules::Single(100_001).iter().last().unwrap();
        assert!(last.listen.ip().to_bits() < rig::EXTERNAL.to_bits() + rig::ADDRESSES);
    }

    #[test]
    fn rules_have_short_names() {
        assert_eq!(Rules::Single(1).to_string(), "1 rule");
        assert_eq!(Rules::Single(100).to_string(), "100 rules");
        assert_eq!(Rules::Single(100_000).to_string(), "100,000 rules");
        assert_eq!(thousands(1_000_000), "1,000,000");
    }
}
