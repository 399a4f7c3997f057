//! Interfaces on which XDP sees something else than what was on the wire.

use portfwd_ebpf::path::Role;

use crate::datapath::Mode;
use crate::network::{Link, Snapshot};

/// What is known to lose packets on this interface, a line each.
pub fn pitfalls(snapshot: &Snapshot, link: &Link, role: Role, mode: Mode) -> Vec<String> {
    let name = &link.name;
    let mut found = Vec::new();

    // With a generic program on a card its frames are not merged; with one above it they are. A
    // bond's native program runs on the cards, before that.
    let bottoms = snapshot.bottoms(link);
    let (local, cards): (Vec<&Link>, Vec<&Link>) =
        bottoms.into_iter().filter(|it| it.index != link.index).partition(|it| is(it, LOCAL));
    if mode == Mode::Generic && !cards.is_empty() {
        found.push(format!(
            "{name} gets packets merged and without checksums from {}, and they are forwarded \
             broken; run: {}",
            names(&cards),
            list(&cards, "; ", |name| format!("ethtool -K {name} gro off"))
        ));
    }
    if !local.is_empty() && mode != Mode::Tc {
        found.push(format!(
            "{name} gets packets of local machines and containers by {}, and what they send without \
             checksums, or merged, is forwarded broken; at the other end of each run: ethtool -K \
             IFACE tx off",
            names(&local)
        ));
    }
    if is(link, &["veth"]) && mode != Mode::Tc {
        found.push(format!(
            "{name} is a veth: what its other end sends without checksums is forwarded broken, what it \
             sends merged is dropped, and XDP frames may not get there; there run: ethtool -K IFACE tx \
             off gro on"
        ));
    }
    if is(link, &["tun"]) && mode != Mode::Tc {
        found.push(format!(
            "{name} is a tap: what its machine sends without checksums, or merged, is forwarded \
             broken; in there run: ethtool -K IFACE tx off"
        ));
    }

    let master = link.master.and_then(|index| snapshot.link_by_index(index));
    let master = master.filter(|it| is(it, &["bridge", "bond", "team"]));
    if role != Role::Internal {
        if let Some(Link { name: master, .. }) = master {
            found.push(format!(
                "{name} is a port of {master}, which holds the addresses: name {master} as external"
            ));
        } else if !snapshot.addresses.iter().any(|it| it.interface == link.index) {
            found.push(format!("{name} has no address"));
        }
    }

    let is_vlan = |it: &&Link| it.parent == Some(link.index) && is(it, &["vlan"]);
    let vlans: Vec<&Link> = snapshot.links.iter().filter(is_vlan).collect();
    if !vlans.is_empty() && mode != Mode::Tc {
        found.push(format!(
            "frames of {} may be taken for untagged ones, because network cards strip tags before \
             XDP sees them; run: ethtool -K {name} rxvlan off",
            names(&vlans)
        ));
    }
    found
}

/// Links whose frames come from this machine itself, which leaves checksums and segments to a
/// network card that is not there.
const LOCAL: &[&str] = &["veth", "tun"];

fn is(link: &Link, kinds: &[&str]) -> bool {
    link.driver.as_deref().is_some_and(|driver| kinds.contains(&driver))
}

fn names(links: &[&Link]) -> String {
    list(links, ", ", str::to_owned)
}

fn list(links: &[&Link], between: &str, text: impl Fn(&str) -> String) -> String {
    links.iter().map(|link| text(&link.name)).collect::<Vec<_>>().join(between)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::LocalAddress;

    fn link(index: u32, name: &str, driver: &str) -> Link {
        let (name, driver) = (name.to_owned(), Some(driver.to_owned()));
        Link { index, name, driver, ..Link::default() }
    }

    /// Of the first link, which has an address.
    fn said(links: &[Link], role: Role, mode: Mode) -> Vec<String> {
        let address = LocalAddress {
            interface: links[0].index,
            address: [192, 0, 2, 1].into(),
            prefix_length: 24,
            global: true,
            tentative: false,
            secondary: false,
        };
        let snapshot = Snapshot { links: links.to_vec(), addresses: vec![address] };
        pitfalls(&snapshot, &snapshot.links[0], role, mode)
    }

    #[test]
    fn a_bare_interface_has_none() {
        for (driver, mode) in
            [("virtio_net", Mode::Native), ("virtio_net", Mode::Generic), ("veth", Mode::Tc)]
        {
            let links = [link(2, "eth0", driver), link(3, "eth1", driver)];
            assert_eq!(said(&links, Role::Both, mode), [""; 0]);
        }
    }

    #[test]
    fn what_lower_cards_merge_is_told() {
        let merged = "br0 gets packets merged and without checksums from eth0, eth1, and they are \
                      forwarded broken; run: ethtool -K eth0 gro off; ethtool -K eth1 gro off";
        let bridge = [
            link(5, "br0", "bridge"),
            Link { master: Some(5), ..link(2, "eth0", "igb") },
            Link { master: Some(6), ..link(3, "eth1", "igb") },
            // A bond and a VLAN between.
            link(6, "bond0", "bond"),
            Link { parent: Some(6), master: Some(5), ..link(7, "bond0.7", "vlan") },
            link(8, "eth8", "igb"),
        ];
        assert_eq!(said(&bridge, Role::Internal, Mode::Generic), [merged]);
        assert_eq!(said(&bridge, Role::Internal, Mode::Native), [""; 0]);
        for kind in ["vlan", "macvlan"] {
            let stacked =
                [Link { parent: Some(2), ..link(5, "up", kind) }, link(2, "eth0", "virtio_net")];
            let said = said(&stacked, Role::External, Mode::Generic).join("\n");
            assert!(said.starts_with("up gets packets merged and without checksums from eth0, "));
            assert!(said.ends_with(" run: ethtool -K eth0 gro off"), "{said}");
        }
    }

    #[test]
    fn what_local_machines_leave_to_cards_is_told() {
        let bridge = [
            link(5, "br0", "bridge"),
            Link { master: Some(5), ..link(2, "veth1", "veth") },
            Link { master: Some(5), ..link(3, "tap0", "tun") },
        ];
        for mode in [Mode::Native, Mode::Generic] {
            let said = said(&bridge, Role::Internal, mode).join("\n");
            assert!(said.starts_with("br0 gets packets of local machines"), "{said}");
            assert!(said.contains(" by veth1, tap0, "), "{said}");
            assert!(said.ends_with("ethtool -K IFACE tx off") && !said.contains("gro"), "{said}");
        }
        let tap = said(&[link(2, "tap0", "tun")], Role::Internal, Mode::Native);
        assert!(matches!(&tap[..], [line] if line.starts_with("tap0 is a tap: ")), "{tap:?}");
        for mode in [Mode::Native, Mode::Generic] {
            let veth = said(&[link(2, "veth0", "veth")], Role::External, mode).join("\n");
            assert!(veth.starts_with("veth0 is a veth: "), "{veth}");
            assert!(veth.ends_with("ethtool -K IFACE tx off gro on"), "{veth}");
        }
    }

    #[test]
    fn a_port_is_told_from_what_holds_the_addresses() {
        let port = |kind| [Link { master: Some(5), ..link(2, "eth0", "igb") }, link(5, "up", kind)];
        for kind in ["bridge", "bond", "team"] {
            assert_eq!(
                said(&port(kind), Role::External, Mode::Native),
                ["eth0 is a port of up, which holds the addresses: name up as external"]
            );
            assert_eq!(said(&port(kind), Role::Internal, Mode::Native), [""; 0]);
        }
        // The addresses stay with what is in a VRF.
        assert_eq!(said(&port("vrf"), Role::External, Mode::Native), [""; 0]);

        let bare = Snapshot { links: vec![link(2, "eth0", "igb")], addresses: Vec::new() };
        let of_bare = |role| pitfalls(&bare, &bare.links[0], role, Mode::Native);
        assert_eq!(of_bare(Role::Both), ["eth0 has no address"]);
        assert_eq!(of_bare(Role::Internal), [""; 0]);
    }

    #[test]
    fn vlans_above_are_told() {
        let links = [
            link(2, "eth0", "igb"),
            Link { parent: Some(2), ..link(3, "eth0.7", "vlan") },
            Link { parent: Some(2), ..link(4, "mac0", "macvlan") },
            Link { parent: Some(9), ..link(5, "eth1.7", "vlan") },
        ];
        assert_eq!(
            said(&links, Role::Internal, Mode::Native).join("\n"),
            "frames of eth0.7 may be taken for untagged ones, because network cards strip tags \
             before XDP sees them; run: ethtool -K eth0 rxvlan off"
        );
    }
}
