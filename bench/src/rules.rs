//! The rules under which all contenders are measured, as each of them writes them.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};

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

    /// How many external addresses, and as many backends, there are.
    pub fn addresses(self) -> u32 {
        match self {
            Self::Single(count) => count.div_ceil(2).div_ceil(PORTS).max(1),
            Self::Range => 1,
        }
    }

    /// The UDP services where clients see them.
    pub fn listened(self) -> Services {
        self.services(rig::EXTERNAL, LISTEN)
    }

    /// The UDP services where they are.
    pub fn backends(self) -> Services {
        self.services(rig::SERVER, if self == Self::Range { LISTEN } else { BACKEND })
    }

    /// Traffic for the range goes to as many of its ports as there are below the ephemeral ones.
    fn services(self, address: Ipv4Addr, port: u16) -> Services {
        let count = match self {
            Self::Single(count) => count.div_ceil(2),
            Self::Range => PORTS,
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

/// The address that is `number` after the first.
pub fn nth(first: Ipv4Addr, number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(first.to_bits() + number)
}
