//! What everything is measured on: a client, a router and a server in namespaces of their own.
//!
//! ```text
//!   198.18.0.0/15 behind
//!   client                          router                        server
//!   198.51.100.2   eth0 ---- wan0   198.51.100.1, .16 ...
//!   2001:db8:1::2                   2001:db8:1::1
//!                                   192.168.77.1   lan0 ---- eth0  192.168.77.16 ...
//!                                   fd77::1                        fd77::10
//! ```
//!
//! The server's default route is the router; the client knows the server only for contenders that
//! do not translate. Neighbours are permanent: nobody waits for ARP, and nobody answers it.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use portfwd_tests::Namespace;

/// The core of the data path: generator, contender in the kernel, receiver.
pub const PATH_CPU: usize = 0;

pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
pub const WAN: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The first external address with rules.
pub const EXTERNAL: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 16);
pub const LAN: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
const BACKENDS: &str = "192.168.77.0/24";
/// The first backend.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 16);
/// External addresses and backends that there are from the first on.
pub const ADDRESSES: u32 = 16;
/// The first of 131,072 clients, all behind [`CLIENT`].
pub const CLIENTS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);

pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
pub const WAN6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
pub const LAN6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
pub const SERVER6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x10);

/// Link addresses, in the order of the picture.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
pub const WAN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub const LAN_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];
pub const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 2, 2];

/// What the interfaces do with packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wire {
    /// Every frame is one packet with its checksums filled in.
    Frames,
    /// As veth comes: segmentation and checksums are left to whoever needs them.
    Offloads,
}

/// The namespaces; all of it goes when dropped.
#[derive(Debug)]
pub struct Rig {
    pub client: Namespace,
    pub router: Namespace,
    pub server: Namespace,
}

impl Rig {
    pub fn new(wire: Wire) -> Result<Self> {
        let client = host("client")?;
        let router = host("router")?;
        let server = host("server")?;
        router.set_sysctl("net.ipv4.ip_forward", "1")?;
        router.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
        let rig = Self { client, router, server };
        let Self { client, router, server } = &rig;
        let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let [client_mac, wan_mac, lan_mac, server_mac] =
            [CLIENT_MAC, WAN_MAC, LAN_MAC, SERVER_MAC].map(mac);

        let mut lines = vec![
            format!(
                "link add wan0 address {wan_mac} type veth peer name eth0 address {client_mac} netns {}",
                client.name()
            ),
            format!(
                "link add lan0 address {lan_mac} type veth peer name eth0 address {server_mac} netns {}",
                server.name()
            ),
            format!("address add {WAN}/24 dev wan0"),
            format!("address add {WAN6}/64 dev wan0 nodad"),
            format!("address add {LAN}/24 dev lan0"),
            format!("address add {LAN6}/64 dev lan0 nodad"),
            "link set wan0 up".into(),
            "link set lan0 up".into(),
            format!("neighbour add {CLIENT} lladdr {client_mac} dev wan0 nud permanent"),
            format!("neighbour add {CLIENT6} lladdr {client_mac} dev wan0 nud permanent"),
            format!("neighbour add {SERVER6} lladdr {server_mac} dev lan0 nud permanent"),
            format!("route add {CLIENTS}/15 via {CLIENT} dev wan0"),
        ];
        let mut at_server = vec![
            format!("address add {SERVER6}/64 dev eth0 nodad"),
            "link set eth0 up".into(),
            format!("neighbour add {LAN} lladdr {lan_mac} dev eth0 nud permanent"),
            format!("neighbour add {LAN6} lladdr {lan_mac} dev eth0 nud permanent"),
        ];
        let mut at_client = vec![
            format!("address add {CLIENT}/24 dev eth0"),
            format!("address add {CLIENT6}/64 dev eth0 nodad"),
            "link set eth0 up".into(),
            format!("neighbour add {WAN} lladdr {wan_mac} dev eth0 nud permanent"),
            format!("neighbour add {WAN6} lladdr {wan_mac} dev eth0 nud permanent"),
            format!("route add {BACKENDS} via {WAN} dev eth0"),
        ];
        for number in 0..ADDRESSES {
            let external = crate::rules::nth(EXTERNAL, number);
            let backend = crate::rules::nth(SERVER, number);
            lines.push(format!("address add {external}/24 dev wan0"));
            lines.push(format!(
                "neighbour add {backend} lladdr {server_mac} dev lan0 nud permanent"
            ));
            at_server.push(format!("address add {backend}/24 dev eth0"));
            at_client
                .push(format!("neighbour add {external} lladdr {wan_mac} dev eth0 nud permanent"));
        }
        // Once the interface is up.
        at_server.push(format!("route add default via {LAN}"));
        at_server.push(format!("route add default via {LAN6} dev eth0"));
        router.ip_batch(&lines)?;
        client.ip_batch(&at_client)?;
        server.ip_batch(&at_server)?;
        for (namespace, interface) in
            [(client, "eth0"), (router, "wan0"), (router, "lan0"), (server, "eth0")]
        {
            // Frames that XDP redirects to a veth reach only one that runs NAPI, as with GRO on.
            let mut ethtool = namespace.command("ethtool");
            ethtool.args(["-K", interface, "gro", "on"]);
            if wire == Wire::Frames {
                ethtool.args(["tx", "off", "tso", "off", "gso", "off"]);
            }
            portfwd_tests::netns::run(&mut ethtool)?;
        }
        Ok(rig)
    }
}

/// A namespace whose addresses are usable at once, and that asks no one for more of them.
fn host(role: &str) -> Result<Namespace> {
    let namespace = Namespace::new(role)?;
    namespace.set_sysctl("net.ipv6.conf.default.disable_ipv6", "0")?;
    namespace.set_sysctl("net.ipv6.conf.default.accept_dad", "0")?;
    namespace.set_sysctl("net.ipv6.conf.default.accept_ra", "0")?;
    Ok(namespace)
}

/// The index of an interface of a namespace.
pub fn interface(namespace: &Namespace, name: &str) -> Result<u32> {
    let text = namespace.ip(&format!("-o link show dev {name}"))?;
    let index = text.split(':').next().and_then(|index| index.trim().parse().ok());
    index.with_context(|| format!("`ip link` printed {text}"))
}

/// The core of contenders that are processes, and of all else; the same one on a machine that has
/// no other.
pub fn proxy_cpu() -> usize {
    cores().min(2) - 1
}

fn cores() -> usize {
    // SAFETY: asks for a number.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as usize
}

/// Keeps the calling thread on one core, and all threads and processes that it starts.
pub fn pin(cpu: usize) -> Result<()> {
    // SAFETY: plain data, of which zero is a value; the kernel reads the size given.
    let status = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
    };
    let error = std::io::Error::last_os_error();
    ensure!(status == 0, "cannot run on core {cpu}: {error}");
    Ok(())
}
