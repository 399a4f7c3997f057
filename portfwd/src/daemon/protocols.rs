//! Protocols other than TCP and UDP that the box itself speaks: a DMZ host does not get them. No lookup
//! finds their sockets when a packet comes, so they are looked for when rules are loaded, and again
//! every few seconds.

use std::collections::BTreeSet;
use std::fs;

use crate::network::{Link, Snapshot};

const IPIP: u8 = 4;
const IPV6: u8 = 41;
const GRE: u8 = 47;
const ESP: u8 = 50;
const IPCOMP: u8 = 108;
const L2TP: u8 = 115;
const SCTP: u8 = 132;
const UDP_LITE: u8 = 136;

/// Those of the namespace of the calling thread.
pub fn of_the_box(snapshot: &Snapshot) -> BTreeSet<u8> {
    let table = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
    let lines = |name| -> Vec<String> {
        table(name).unwrap_or_default().lines().skip(1).map(str::to_owned).collect()
    };
    let mut own: BTreeSet<u8> = snapshot.links.iter().flat_map(of_link).copied().collect();
    let raw = ["raw", "raw6"].map(lines).concat();
    own.extend(raw.iter().filter_map(|line| local_port(line)).filter_map(of_raw_socket));
    let udp = ["udp", "udp6"].map(lines).concat();
    if udp.iter().filter_map(|line| local_port(line)).any(|port| matches!(port, 500 | 4500)) {
        own.extend([ESP, IPCOMP]);
    }
    if ["udplite", "udplite6"].map(lines).concat().iter().any(|line| local_port(line).is_some()) {
        own.insert(UDP_LITE);
    }
    if ["sctp/eps", "sctp/assocs"].map(lines).concat().iter().any(|line| !line.trim().is_empty()) {
        own.insert(SCTP);
    }
    own
}

/// What a tunnel is made of. One that is down is nobody's: the kernel has some of its own.
fn of_link(link: &Link) -> &'static [u8] {
    match link.driver.as_deref() {
        Some(kind) if link.up => match kind {
            "gre" | "gretap" | "erspan" | "ip6gre" | "ip6gretap" | "ip6erspan" => &[GRE],
            "ipip" => &[IPIP],
            "sit" => &[IPV6, IPIP],
            "ip6tnl" => &[IPV6, IPIP],
            "vti" | "vti6" | "xfrm" => &[ESP, IPCOMP],
            "l2tp" => &[L2TP],
            _ => &[],
        },
        _ => &[],
    }
}

/// The local port in a line of a table of sockets; of a raw socket, the protocol.
fn local_port(line: &str) -> Option<u16> {
    let (_, port) = line.split_ascii_whitespace().nth(1)?.split_once(':')?;
    u16::from_str_radix(port, 16).ok()
}

/// Pings, and those who listen to all of ICMP, take nothing from anyone: of ICMP a DMZ host gets echo
/// requests only. And 255 is not for receiving.
fn of_raw_socket(protocol: u16) -> Option<u8> {
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;
    const RAW: u8 = 255;
    u8::try_from(protocol).ok().filter(|it| !matches!(*it, ICMP | ICMPV6 | RAW))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnels_that_are_up_are_the_boxs() {
        let link =
            |up, driver: &str| Link { up, driver: Some(driver.to_owned()), ..Link::default() };
        let links = vec![link(true, "sit"), link(false, "gre"), link(true, "veth")];
        let own = of_the_box(&Snapshot { links, addresses: Vec::new() });
        assert!(own.contains(&IPV6) && !own.contains(&GRE), "{own:?}");
        assert_eq!(of_link(&link(true, "ip6gretap")), [GRE]);
        assert_eq!(of_link(&link(true, "vti")), [ESP, IPCOMP]);
        assert!(of_link(&Link { up: true, ..Link::default() }).is_empty());
    }

    #[test]
    fn lines_of_the_kernel_are_read() {
        let ospf = "   89: 00000000:0059 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 10305 2 ffff8 0";
        assert_eq!(local_port(ospf), Some(89));
        let ospf6 = "   89: 00000000000000000000000000000000:0059 00000000000000000000000000000000:0000 07 0";
        assert_eq!(local_port(ospf6), Some(89));
        for bad in ["", "  sl  local_address rem_address", "0: 00000000:G", "0: 00000000:10000"] {
            assert_eq!(local_port(bad), None, "{bad}");
        }
        assert_eq!([1, 58, 255, 256, 112].map(of_raw_socket), [None, None, None, None, Some(112)]);
    }
}
