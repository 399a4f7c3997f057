//! A client, a router and a server, wired up in namespaces of their own:
//!
//! ```text
//!   client                        router                        server
//!   198.51.100.2  eth0 ---- wan0  198.51.100.1
//!   2001:db8:1::2                 2001:db8:1::1
//!                                 192.168.77.1  lan0 ---- eth0  192.168.77.10
//!                                 fd77::1                       fd77::10
//! ```
//!
//! The server's default route is the router. The client has no route to the server: whatever
//! reaches it untranslated, or should be sent to the server's own address, shows.
//!
//! Client and server send every frame as it would be on a wire: one packet, with its checksums
//! filled in. Nothing merges or splits frames before a capture sees them.
//!
//! The links are veth pairs. In a virtual machine the two of the picture can be network cards instead, which
//! `PORTFWD_TEST_CARDS` names by their link addresses, from left to right.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::netns::{self, Namespace};
use crate::sys::{self, Offload};

/// An IPv4 and an IPv6 address of one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Addresses {
    pub fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// `wan0` of the router.
pub const WAN: Addresses = external(1);
/// `lan0` of the router.
pub const LAN: Addresses = internal(0, 1);
/// `eth0` of the server.
pub const SERVER: Addresses = internal(0, 10);
/// `eth0` of the second server.
pub const SECOND_SERVER: Addresses = internal(1, 10);
/// `eth0` of the host behind the server.
pub const DEEP: Addresses = internal(2, 10);
/// `eth0` of the client, unless a gateway is in front of it.
pub const CLIENT: Addresses = external(2);
/// `wan0` of the gateway, in the network between it and the router.
pub const GATEWAY: Addresses = external(254);
/// `eth0` of the client behind the gateway.
pub const DISTANT_CLIENT: Addresses = distant(2);

const fn external(host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(198, 51, 100, host),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, bcd(host)),
    }
}

const fn distant(host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(203, 0, 113, host),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, bcd(host)),
    }
}

/// 192.168.77.0/24 and fd77::/64 are network 0, 192.168.78.0/24 and fd78::/64 network 1, and so on.
const fn internal(network: u8, host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(192, 168, 77 + network, host),
        v6: Ipv6Addr::new(0xfd77 + network as u16, 0, 0, 0, 0, 0, 0, bcd(host)),
    }
}

/// The hexadecimal number that reads like the decimal one: .10 and ::10 belong together.
const fn bcd(host: u8) -> u16 {
    let host = host as u16;
    (host / 100) << 8 | (host / 10 % 10) << 4 | (host % 10)
}

/// What a rig may have beyond the picture above.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Further addresses of the router's `wan0`, each with its prefix: `198.51.100.7/24`.
    pub external: &'a [&'a str],
    /// A second server: 192.168.78.10 and fd78::10, behind the router's `lan1`.
    pub second_server: bool,
    /// A host behind the server, which is a router then: 192.168.79.10 and fd79::10.
    pub deep: bool,
    /// The client is 203.0.113.2 and 2001:db8:2::2 behind a router of its own, `gateway`, whose
    /// `wan0` is 198.51.100.254 and 2001:db8:1::254.
    pub gateway: bool,
    /// Client and server leave checksums and segments to a network card, as hosts do. What the router sends
    /// them is as on a wire.
    pub offloads: bool,
}

/// The namespaces; all of it goes when dropped.
#[derive(Debug)]
pub struct Rig {
    pub client: Namespace,
    pub router: Namespace,
    pub server: Namespace,
    pub second_server: Option<Namespace>,
    pub deep: Option<Namespace>,
    pub gateway: Option<Namespace>,
    /// The programs that pass, at every end but the router's.
    _programs: Vec<OwnedFd>,
    /// Given back last.
    _cards: Option<Cards>,
}

/// The network cards of this machine, which one rig at a time has.
#[derive(Debug)]
struct Cards {
    addresses: Vec<String>,
}

static CARDS_TAKEN: AtomicBool = AtomicBool::new(false);

impl Drop for Cards {
    fn drop(&mut self) {
        CARDS_TAKEN.store(false, Ordering::Release);
    }
}

impl Cards {
    /// Waits until no other rig has them. `None` if this machine's are not to be used.
    fn take() -> Option<Self> {
        let addresses = std::env::var("PORTFWD_TEST_CARDS").ok()?;
        while CARDS_TAKEN.swap(true, Ordering::Acquire) {
            thread::sleep(Duration::from_millis(10));
        }
        Some(Self { addresses: addresses.split_whitespace().map(str::to_owned).collect() })
    }

    /// Moves a card into a namespace under a name. It may still be on its way back from the one before.
    fn give(&self, number: usize, end: &End<'_>) -> Result<()> {
        let address = self.addresses.get(number).context("PORTFWD_TEST_CARDS names too few")?;
        let deadline = Instant::now() + Duration::from_secs(20);
        let name = loop {
            let links = netns::run(Command::new("ip").args(["-j", "link"]))?;
            let links: serde_json::Value = serde_json::from_str(&links)?;
            let mut links = links.as_array().into_iter().flatten();
            if let Some(link) = links.find(|link| link["address"] == **address) {
                break link["ifname"].as_str().unwrap_or_default().to_owned();
            }
            ensure!(Instant::now() < deadline, "no network card has the address {address}");
            thread::sleep(Duration::from_millis(10));
        };
        let (namespace, interface) = (end.namespace.name(), end.interface);
        let command = format!("link set {name} mtu 1500 netns {namespace} name {interface}");
        netns::run(Command::new("ip").args(command.split(' '))).map(drop)
    }
}

/// One end of a link.
struct End<'a> {
    namespace: &'a Namespace,
    interface: &'a str,
    address: Addresses,
}

impl Rig {
    pub fn new() -> Result<Self> {
        Self::with(Options::default())
    }

    pub fn with(options: Options<'_>) -> Result<Self> {
        let cards = Cards::take();
        let outside = cards.as_ref().map(|cards| (cards, [0, 1]));
        let inside = cards.as_ref().map(|cards| (cards, [2, 3]));
        let client = host("client")?;
        let router = host("router")?;
        let server = host("server")?;
        let second_server = options.second_server.then(|| host("server2")).transpose()?;
        let deep = options.deep.then(|| host("deep")).transpose()?;
        let gateway = options.gateway.then(|| host("gateway")).transpose()?;
        // Forwarding is for the program under test to switch on; the kernel starts a namespace with
        // what the machine has.
        router.set_sysctl("net.ipv4.ip_forward", "0")?;

        let wan0 = End { namespace: &router, interface: "wan0", address: WAN };
        let mut programs = Vec::new();
        if let Some(gateway) = &gateway {
            let inner = End { namespace: gateway, interface: "lan0", address: distant(1) };
            let outer = End { namespace: gateway, interface: "wan0", address: GATEWAY };
            let eth0 = End { namespace: &client, interface: "eth0", address: DISTANT_CLIENT };
            connect(&eth0, &inner, None)?;
            connect(&outer, &wan0, outside)?;
            for end in [&eth0, &inner, &outer] {
                programs.extend(end.as_on_a_wire()?);
            }
            gateway.set_sysctl("net.ipv4.ip_forward", "1")?;
            gateway.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
            client.ip(&format!("route add 198.51.100.0/24 via {}", inner.address.v4))?;
            client.ip(&format!("route add 2001:db8:1::/64 via {}", inner.address.v6))?;
            router.ip(&format!("route add default via {}", GATEWAY.v4))?;
            router.ip(&format!("route add default via {}", GATEWAY.v6))?;
        } else {
            let eth0 = End { namespace: &client, interface: "eth0", address: CLIENT };
            connect(&eth0, &wan0, outside)?;
            programs.extend(eth0.as_on_a_wire()?);
        }
        for address in options.external {
            router.ip(&format!("address add {address} dev wan0{}", no_dad(address)))?;
            if let Some(Ok(IpAddr::V6(address))) = address.split('/').next().map(str::parse) {
                wait_until_asked_for(&router, "wan0", address)?;
            }
        }
        for (number, (server, lan)) in
            [Some(&server), second_server.as_ref()].into_iter().zip(["lan0", "lan1"]).enumerate()
        {
            let Some(server) = server else { continue };
            let number = number as u8;
            let lan = End { namespace: &router, interface: lan, address: internal(number, 1) };
            let eth0 = End { namespace: server, interface: "eth0", address: internal(number, 10) };
            connect(&lan, &eth0, inside.filter(|_| number == 0))?;
            programs.extend(eth0.as_on_a_wire()?);
            server.ip(&format!("route add default via {}", lan.address.v4))?;
            server.ip(&format!("route add default via {}", lan.address.v6))?;
        }
        if let Some(deep) = &deep {
            let deep0 = End { namespace: &server, interface: "deep0", address: internal(2, 1) };
            let eth0 = End { namespace: deep, interface: "eth0", address: DEEP };
            connect(&eth0, &deep0, None)?;
            programs.extend(eth0.as_on_a_wire()?);
            programs.extend(deep0.as_on_a_wire()?);
            server.set_sysctl("net.ipv4.ip_forward", "1")?;
            server.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
            deep.ip(&format!("route add default via {}", deep0.address.v4))?;
            deep.ip(&format!("route add default via {}", deep0.address.v6))?;
            router.ip(&format!("route add 192.168.79.0/24 via {}", SERVER.v4))?;
            router.ip(&format!("route add fd79::/64 via {}", SERVER.v6))?;
        }
        if options.offloads {
            for end in [&client, &server] {
                let features = ["tx", "tso", "gso", "tx-udp-segmentation"];
                let mut command = end.command("ethtool");
                command.args(["-K", "eth0"]).args(features.map(|it| [it, "on"]).as_flattened());
                netns::run(&mut command)?;
            }
        }
        Ok(Self {
            client,
            router,
            server,
            second_server,
            deep,
            gateway,
            _programs: programs,
            _cards: cards,
        })
    }

    /// Frames that client and servers sent into a full veth: captures there have seen them, but
    /// no one else did. An exact comparison of both sides needs this to be 0.
    pub fn lost_on_wire(&self) -> Result<u64> {
        let ends = [Some(&self.client), Some(&self.server), self.second_server.as_ref()];
        ends.into_iter().flatten().map(|end| end.link_statistic("eth0", "tx.dropped")).sum()
    }
}

/// A namespace whose addresses are usable at once, which asks no one for more of them, and whose
/// bursts of TCP stay well below the 256 frames that a veth holds.
fn host(role: &str) -> Result<Namespace> {
    let namespace = Namespace::new(role)?;
    namespace.set_sysctl("net.ipv6.conf.default.accept_dad", "0")?;
    namespace.set_sysctl("net.ipv6.conf.default.accept_ra", "0")?;
    namespace.set_sysctl("net.ipv6.conf.default.disable_ipv6", "0")?;
    namespace.set_sysctl("net.ipv4.tcp_limit_output_bytes", "65536")?;
    Ok(namespace)
}

/// Connects two namespaces, up and with addresses: by two of the cards, else by a veth pair.
fn connect(a: &End<'_>, b: &End<'_>, cards: Option<(&Cards, [usize; 2])>) -> Result<()> {
    if let Some((cards, numbers)) = cards {
        cards.give(numbers[0], a)?;
        cards.give(numbers[1], b)?;
    } else {
        a.namespace.ip(&format!(
            "link add {} type veth peer name {} netns {}",
            a.interface,
            b.interface,
            b.namespace.name()
        ))?;
    }
    for End { namespace, interface, address } in [a, b] {
        namespace.ip(&format!("address add {}/24 dev {interface}", address.v4))?;
        namespace.ip(&format!("address add {}/64 dev {interface} nodad", address.v6))?;
        namespace.ip(&format!("link set {interface} up"))?;
        // Whatever this end sends leaves as single packets with their checksums filled in.
        namespace
            .enter(|| {
                [Offload::TransmitChecksum, Offload::TcpSegmentation, Offload::Segmentation]
                    .into_iter()
                    .try_for_each(|offload| sys::switch_off(interface, offload))
            })
            .with_context(|| format!("cannot switch the offloads of {interface} off"))?;
    }
    for End { namespace, interface, address } in [a, b] {
        wait_until_asked_for(namespace, interface, address.v6)?;
    }
    Ok(())
}

impl End<'_> {
    /// Makes this end receive frames one by one, those too that XDP at the other end redirects to it.
    fn as_on_a_wire(&self) -> Result<[OwnedFd; 2]> {
        self.namespace.enter(|| {
            let program = sys::attach_pass(sys::interface_index(self.interface)?)
                .context("cannot attach an XDP program to a veth")?;
            // Attaching it has switched GRO on.
            sys::switch_off(self.interface, Offload::Receive)
                .with_context(|| format!("cannot switch GRO of {} off", self.interface))?;
            Ok(program)
        })
    }
}

/// Waits until an interface answers to an address. The kernel sets IPv6 up in the background: a
/// neighbour solicitation that comes before is lost, and sent again after a second.
fn wait_until_asked_for(namespace: &Namespace, interface: &str, address: Ipv6Addr) -> Result<()> {
    let [.., a, b, c] = address.octets();
    let group = format!("ff0200000000000000000001ff{a:02x}{b:02x}{c:02x}");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        // Each line: index, interface, group, and more.
        let groups = namespace.enter(|| fs::read_to_string("/proc/thread-self/net/igmp6"))?;
        let solicited: Vec<&str> = groups
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace().skip(1);
                (words.next() == Some(interface)).then(|| words.next())?
            })
            .filter(|group| group.starts_with("ff0200000000000000000001ff"))
            .collect();
        // The link-local address's group is joined last, after the route for multicast is there.
        if solicited.len() > 1 && solicited.contains(&group.as_str()) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{interface} does not come up with {address}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn no_dad(address: &str) -> &'static str {
    if address.contains(':') { " nodad" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_alike() {
        assert_eq!(WAN.v6, "2001:db8:1::1".parse::<Ipv6Addr>().unwrap());
        assert_eq!(SERVER.v6, "fd77::10".parse::<Ipv6Addr>().unwrap());
        assert_eq!(SECOND_SERVER.v6, "fd78::10".parse::<Ipv6Addr>().unwrap());
        assert_eq!(GATEWAY.v6, "2001:db8:1::254".parse::<Ipv6Addr>().unwrap());
        assert_eq!(DISTANT_CLIENT.v6, "2001:db8:2::2".parse::<Ipv6Addr>().unwrap());
    }
}
