//! Services of the box itself whose port a rule takes away.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use crate::compile::{Leg, Plan};
use crate::network::Externals;
use crate::rule::{Ports, Rule};

/// A socket of the box that takes packets from anyone: TCP that listens, UDP without a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    tcp: bool,
    /// Unspecified for every address. `::` is taken to mean IPv4 too: the kernel's table does not
    /// say whether it does.
    address: IpAddr,
    port: u16,
}

impl Socket {
    /// All in the namespace of the calling thread. A table that cannot be read counts as empty.
    pub fn all() -> Vec<Self> {
        let tables = [("tcp", true), ("tcp6", true), ("udp", false), ("udp6", false)];
        let read = |(table, tcp)| {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"));
            text.unwrap_or_default().lines().filter_map(|line| Self::parse(line, tcp)).collect()
        };
        tables.into_iter().flat_map::<Vec<_>, _>(read).collect()
    }

    /// Reads a line of the table of TCP or UDP sockets. `None` if it is its head, or a socket with a
    /// peer.
    fn parse(line: &str, tcp: bool) -> Option<Self> {
        // net/tcp_states.h: TCP_LISTEN, and TCP_CLOSE, which UDP is in while it has no peer.
        let open = if tcp { "0A" } else { "07" };
        let mut fields = line.split_ascii_whitespace();
        let local = fields.nth(1)?;
        if fields.nth(1)? != open {
            return None;
        }
        let (address, port) = local.split_once(':')?;
        // Words that have the address's bytes as they are in memory.
        let words: Vec<[u8; 4]> = (0..address.len())
            .step_by(8)
            .map(|at| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes))
            .collect::<Option<_>>()?;
        let address = match words.as_flattened() {
            v4 if v4.len() == 4 => Ipv4Addr::from(<[u8; 4]>::try_from(v4).ok()?).into(),
            v6 => Ipv6Addr::from(<[u8; 16]>::try_from(v6).ok()?).to_canonical(),
        };
        Some(Self { tcp, address, port: u16::from_str_radix(port, 16).ok()? })
    }

    /// Whether it takes packets to this address of the box.
    fn takes(&self, address: IpAddr) -> bool {
        match self.address {
            IpAddr::V4(own) if own.is_unspecified() => address.is_ipv4(),
            IpAddr::V6(own) if own.is_unspecified() => true,
            own => own == address,
        }
    }
}

/// A line for each rule and port where clients will not reach one of these sockets any more.
///
/// Not where the datapath asks for a socket of the box first: `*`, and the `ephemeral` ports of a
/// range.
pub fn taken_away(
    sockets: &[Socket],
    rules: &[Rule],
    plan: &Plan,
    externals: &Externals,
    ephemeral: &RangeInclusive<u16>,
) -> BTreeSet<String> {
    let mut addresses: BTreeSet<IpAddr> = plan.legs.iter().filter_map(|leg| leg.listen).collect();
    addresses.extend(externals.iter());
    let mut found = BTreeSet::new();
    for socket in sockets {
        for address in addresses.iter().filter(|address| socket.takes(**address)) {
            let claims = |leg: &&Leg| {
                (if socket.tcp { leg.tcp } else { leg.udp })
                    && leg.ports.contains(socket.port)
                    && match leg.listen {
                        Some(listen) => listen == *address,
                        None => {
                            leg.backend.is_ipv4() == address.is_ipv4()
                                && externals.iter().any(|external| external == *address)
                        }
                    }
            };
            // The narrowest of them gets the packets.
            let winner =
                plan.legs.iter().filter(claims).min_by_key(|leg| rules[leg.rule].precedence());
            let Some(leg) = winner else { continue };
            let asked = match leg.ports {
                Ports::One(_) => false,
                Ports::Range { .. } => ephemeral.contains(&socket.port),
                Ports::All => true,
            };
            if !asked {
                found.insert(format!(
                    "rule \"{}\": this box itself listens on {} {}; from outside that port now leads \
                     to {}",
                    rules[leg.rule].name,
                    if socket.tcp { "tcp" } else { "udp" },
                    socket.port,
                    leg.backend
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;
    use crate::compile::{Resolved, plan};

    fn socket(tcp: bool, at: &str) -> Socket {
        let at: std::net::SocketAddr = at.parse().unwrap();
        Socket { tcp, address: at.ip(), port: at.port() }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn lines_of_the_kernel_are_read() {
        let tcp4 = "   1: 070200C0:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 10305 1 ffff8 100 0 0 10 0";
        assert_eq!(Socket::parse(tcp4, true), Some(socket(true, "192.0.2.7:22")));
        let tcp6 = "   0: B80D0120000000000000000007000000:01BB 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 f 100 0 0 10 0";
        assert_eq!(Socket::parse(tcp6, true), Some(socket(true, "[2001:db8::7]:443")));
        let mapped = "   0: 0000000000000000FFFF0000070200C0:0035 00000000000000000000000000000000:0000 07 0 0";
        assert_eq!(Socket::parse(mapped, false), Some(socket(false, "192.0.2.7:53")));
        // Others than those that take packets from anyone, and what is no line of a socket.
        assert_eq!(Socket::parse(&tcp4.replace(" 0A ", " 01 "), true), None);
        assert_eq!(Socket::parse(tcp4, false), None);
        assert_eq!(Socket::parse(mapped, true), None);
        for bad in [
            "  sl  local_address rem_address   st tx_queue",
            "",
            "0: 070200C0 0 0A",
            "0: 070200:0016 0 0A",
            "0: :0016 0 0A",
            "0: 070200C0070200C0:0016 0 0A",
            "0: 07äüC0:0016 0 0A",
            "0: 070200C0:10000 0 0A",
        ] {
            assert_eq!(Socket::parse(bad, true), None, "{bad}");
        }
    }

    #[test]
    fn open_sockets_are_found_and_connected_ones_are_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = ["127.0.0.1:0", "127.0.0.1:0"].map(|at| UdpSocket::bind(at).unwrap());
        udp[1].connect(udp[0].local_addr().unwrap()).unwrap();
        let all = Socket::all();
        let has = |tcp, at: std::net::SocketAddr| all.contains(&socket(tcp, &at.to_string()));
        assert!(has(true, listener.local_addr().unwrap()));
        assert!(has(false, udp[0].local_addr().unwrap()));
        assert!(!has(false, udp[1].local_addr().unwrap()));
    }

    fn lines(specs: &[&str], sockets: &[Socket]) -> Vec<String> {
        let rules: Vec<Rule> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
        let plan = plan(&rules, &Resolved::new()).unwrap();
        let externals = Externals {
            v4: vec![Ipv4Addr::new(198, 51, 100, 1)],
            v6: vec!["2001:db8::1".parse().unwrap()],
        };
        taken_away(sockets, &rules, &plan, &externals, &(32768..=60999)).into_iter().collect()
    }

    #[test]
    fn a_service_whose_port_a_rule_takes_is_told() {
        let line = "rule \"22/tcp\": this box itself listens on tcp 22; from outside that port now \
                    leads to 10.0.0.5";
        for at in ["0.0.0.0:22", "198.51.100.1:22", "[::]:22"] {
            assert_eq!(lines(&["22:10.0.0.5"], &[socket(true, at)]), [line], "{at}");
        }
        // Twice the same is told once.
        let both = [socket(true, "0.0.0.0:22"), socket(true, "[::]:22")];
        assert_eq!(lines(&["22:10.0.0.5"], &both), [line]);
        for (tcp, at) in [
            (false, "0.0.0.0:22"),
            (true, "0.0.0.0:23"),
            (true, "127.0.0.1:22"),
            (true, "192.168.1.1:22"),
            (true, "[2001:db8::1]:22"),
        ] {
            assert_eq!(lines(&["22:10.0.0.5"], &[socket(tcp, at)]), [""; 0], "{at}");
        }
        assert_eq!(lines(&["22:[fd00::5]"], &[socket(true, "0.0.0.0:22")]), [""; 0]);
        // An address of its own, external or not.
        let own = ["203.0.113.9:22:10.0.0.5"];
        assert_eq!(lines(&own, &[socket(true, "203.0.113.9:22")]).len(), 1);
        assert_eq!(lines(&own, &[socket(true, "198.51.100.1:22")]), [""; 0]);
    }

    #[test]
    fn the_narrowest_rule_is_named_and_what_asks_for_sockets_is_not() {
        let all = "*:10.0.0.1/any";
        let range = "1-40000:10.0.0.2/udp";
        let one = "53:10.0.0.3/udp";
        let dns = [socket(false, "0.0.0.0:53")];
        assert!(lines(&[all, range, one], &dns)[0].ends_with("leads to 10.0.0.3"));
        assert!(lines(&[all, range], &dns)[0].ends_with("leads to 10.0.0.2"));
        assert_eq!(lines(&[all], &dns), [""; 0]);
        assert_eq!(lines(&[range], &[socket(false, "0.0.0.0:33000")]), [""; 0]);
        assert_eq!(lines(&["33000:10.0.0.3/udp"], &[socket(false, "0.0.0.0:33000")]).len(), 1);
    }
}
