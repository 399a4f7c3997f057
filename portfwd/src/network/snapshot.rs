//! Links and addresses, and what follows from them alone.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use rtnetlink::packet_route::{
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
};

use super::netdev::XdpFeatures;

/// The links and addresses of the box at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// In the kernel's order, which is that of the indexes.
    pub links: Vec<Link>,
    /// In the kernel's order: that in which it would choose a source address.
    pub addresses: Vec<LocalAddress>,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Set up by the administrator, and with carrier.
    pub up: bool,
    /// In bytes, without the Ethernet header.
    pub mtu: u32,
    pub layer: Layer,
    /// The driver of the device (`virtio_net`), or the kind of a virtual link (`veth`).
    pub driver: Option<String>,
    /// Frames that XDP redirects to it are sent. `None` if the kernel cannot say (before Linux
    /// 6.3).
    ///
    /// It depends on more than the driver: on a veth it is false until the peer has an XDP program
    /// or GRO switched on.
    pub can_transmit_xdp: Option<bool>,
    /// Also such that are in several pieces. Before Linux 6.3 the kernel sends none.
    pub can_transmit_pieces: bool,
    /// The bridge, bond or VRF that it belongs to, by its index.
    pub master: Option<u32>,
    /// The link that it stands on, by its index: of a VLAN or a macvlan, its parent. `None` if that
    /// is in another namespace.
    pub parent: Option<u32>,
}

/// What the frames of a link begin with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layer {
    /// An Ethernet header.
    Ethernet,
    /// The IP header: tunnels, PPP. The kernel sends on these without writing a link header
    /// (`dev_is_mac_header_xmit`).
    Bare,
    /// Of no network beyond this box, or in another way.
    #[default]
    Other,
}

impl From<LinkLayerType> for Layer {
    fn from(kind: LinkLayerType) -> Self {
        match kind {
            LinkLayerType::Ether => Self::Ethernet,
            LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Ipgre
            | LinkLayerType::Ip6gre
            | LinkLayerType::Void
            | LinkLayerType::None
            | LinkLayerType::Rawip
            | LinkLayerType::Ppp => Self::Bare,
            _ => Self::Other,
        }
    }
}

/// An address of the box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalAddress {
    /// Index of its link.
    pub interface: u32,
    pub address: IpAddr,
    /// Bits of the network's prefix.
    pub prefix_length: u8,
    /// Global or site scope: others can reach it from beyond the link.
    pub global: bool,
    /// Not in use: duplicate address detection has not ended, or has found a duplicate.
    pub tentative: bool,
    /// Not the box's first choice as a source: IPv4 secondary, IPv6 temporary, or deprecated.
    pub secondary: bool,
}

/// The addresses on which a rule without an address listens, the preferred one first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Externals {
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
}

impl Externals {
    /// IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.v4.iter().copied().map(IpAddr::V4);
        v4.chain(self.v6.iter().copied().map(IpAddr::V6))
    }
}

impl Link {
    /// Whether the box speaks to itself by it.
    pub fn is_loopback(&self) -> bool {
        /// `LOOPBACK_IFINDEX`.
        const INDEX: u32 = 1;
        self.index == INDEX
    }
}

impl Snapshot {
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    pub fn link_by_index(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// By which the box speaks to itself, if that is up.
    pub fn loopback(&self) -> Option<&Link> {
        self.links.iter().find(|link| link.is_loopback() && link.up)
    }

    /// The links to which the frames of this one come first: the ports of a bridge or a bond, the
    /// parent of a VLAN, and so on down to those that stand on no other. `link` alone if it is such
    /// a one.
    pub fn bottoms<'a>(&'a self, link: &'a Link) -> Vec<&'a Link> {
        let mut open = vec![link];
        let mut seen = vec![link.index];
        let mut bottoms = Vec::new();
        while let Some(link) = open.pop() {
            let below = |it: &&Link| it.master == Some(link.index) || link.parent == Some(it.index);
            let below: Vec<&Link> = self.links.iter().filter(below).collect();
            if below.is_empty() {
                bottoms.push(link);
            }
            for link in below {
                if !seen.contains(&link.index) {
                    seen.push(link.index);
                    open.push(link);
                }
            }
        }
        bottoms.sort_by_key(|link| link.index);
        bottoms
    }

    /// The addresses of these interfaces that others can reach: global or site scope and in use.
    ///
    /// In the order of the interfaces, then the kernel's; secondary, temporary and deprecated ones
    /// after all others.
    pub fn external_addresses(&self, interfaces: &[u32]) -> Externals {
        let mut usable: Vec<_> = interfaces
            .iter()
            .flat_map(|&interface| {
                self.addresses.iter().filter(move |it| it.interface == interface)
            })
            .filter(|it| it.global && !it.tentative)
            .collect();
        usable.sort_by_key(|it| it.secondary);
        let mut externals = Externals::default();
        for it in usable {
            match it.address {
                IpAddr::V4(address) => {
                    let local = address.is_link_local() || address.is_loopback();
                    if !local && !externals.v4.contains(&address) {
                        externals.v4.push(address);
                    }
                }
                IpAddr::V6(address) => {
                    let local = address.is_unicast_link_local() || address.is_loopback();
                    if !local && !externals.v6.contains(&address) {
                        externals.v6.push(address);
                    }
                }
            }
        }
        externals
    }
}

pub(super) fn link(message: &LinkMessage, features: Option<XdpFeatures>) -> Link {
    let header = &message.header;
    let (mut bus, mut device, mut elsewhere) = (None, None, false);
    let mut link = Link {
        index: header.index,
        name: String::new(),
        up: header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        mtu: 0,
        layer: header.link_layer_type.into(),
        driver: None,
        can_transmit_xdp: features.map(XdpFeatures::transmit),
        can_transmit_pieces: features.is_some_and(XdpFeatures::transmit_pieces),
        master: None,
        parent: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name.clone(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                link.driver = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::Link(index) => link.parent = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::ParentDevBusName(name) => bus = Some(name),
            LinkAttribute::ParentDevName(name) => device = Some(name),
            _ => {}
        }
    }
    // What these two call so is the other end.
    if elsewhere || matches!(link.driver.as_deref(), Some("veth" | "netkit")) {
        link.parent = None;
    }
    if let (None, Some(bus), Some(device)) = (&link.driver, bus, device) {
        // Not /sys/class/net: what it shows is of the namespace in which it was mounted.
        link.driver = fs::read_link(format!("/sys/bus/{bus}/devices/{device}/driver"))
            .ok()
            .and_then(|driver| Some(driver.file_name()?.to_str()?.to_owned()));
    }
    link
}

pub(super) fn local_address(message: &AddressMessage) -> Option<LocalAddress> {
    let header = &message.header;
    let mut flags = AddressFlags::from_bits_retain(header.flags.bits().into());
    let (mut local, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(LocalAddress {
        interface: header.index,
        // Without a peer, IPv6 says `Address` only.
        address: local.or(peer)?,
        prefix_length: header.prefix_len,
        global: u8::from(header.scope) < RT_SCOPE_LINK,
        tentative: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed),
        // IPv6 temporary is the same bit as IPv4 secondary.
        secondary: flags.intersects(AddressFlags::Secondary | AddressFlags::Deprecated),
    })
}

/// rtnetlink.h; whatever is lower reaches farther.
const RT_SCOPE_LINK: u8 = 253;

#[cfg(test)]
mod tests {
    use super::*;

    fn address(interface: u32, address: &str) -> LocalAddress {
        LocalAddress {
            interface,
            address: address.parse().unwrap(),
            prefix_length: 24,
            global: true,
            tentative: false,
            secondary: false,
        }
    }

    fn externals(v4: &[&str], v6: &[&str]) -> Externals {
        Externals {
            v4: v4.iter().map(|it| it.parse().unwrap()).collect(),
            v6: v6.iter().map(|it| it.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn external_addresses_are_ordered_and_reachable() {
        let snapshot = Snapshot {
            links: Vec::new(),
            addresses: vec![
                LocalAddress { global: false, ..address(1, "127.0.0.1") },
                LocalAddress { secondary: true, ..address(2, "192.0.2.9") },
                address(2, "192.0.2.2"),
                address(2, "192.0.2.1"),
                address(2, "169.254.7.7"),
                address(3, "198.51.100.1"),
                address(3, "192.0.2.1"),
                address(4, "203.0.113.1"),
                LocalAddress { tentative: true, ..address(2, "2001:db8::7") },
                LocalAddress { secondary: true, ..address(2, "2001:db8::8") },
                address(2, "2001:db8::1"),
                LocalAddress { global: false, ..address(2, "fe80::1") },
                address(2, "fe80::2"),
                address(3, "fd00::1"),
            ],
        };
        assert_eq!(
            snapshot.external_addresses(&[2, 3]),
            externals(
                &["192.0.2.2", "192.0.2.1", "198.51.100.1", "192.0.2.9"],
                &["2001:db8::1", "fd00::1", "2001:db8::8"],
            )
        );
        assert_eq!(
            snapshot.external_addresses(&[3, 2]),
            externals(
                &["198.51.100.1", "192.0.2.1", "192.0.2.2", "192.0.2.9"],
                &["fd00::1", "2001:db8::1", "2001:db8::8"],
            )
        );
        assert_eq!(snapshot.external_addresses(&[1, 9]), Externals::default());
        assert_eq!(snapshot.external_addresses(&[]), Externals::default());
    }
}
