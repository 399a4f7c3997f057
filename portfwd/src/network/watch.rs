//! What the way of a packet depends on, watched as it changes. It blocks: for a thread of its own.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use rtnetlink::{
    MulticastGroup,
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        route::{RouteAttribute, RouteMessage},
        rule::{RuleAttribute, RuleMessage},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{NetworkError, changes::ENOBUFS};

/// All from which the kernel works out the way of a packet.
const GROUPS: [MulticastGroup; 11] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Ipv4Netconf,
    MulticastGroup::Ipv6Netconf,
    MulticastGroup::Nexthop,
];

/// Datagrams that are looked at before what they changed is told.
const AT_ONCE: usize = 256;

/// What may be different now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Changed {
    /// The way of some packets.
    pub ways: bool,
    /// What [`Watch::dependence`] says.
    pub dependence: bool,
}

impl Changed {
    const ALL: Self = Self { ways: true, dependence: true };
}

/// Why the way of a packet depends on more than its destination, by family; `None` if it does not.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Dependence {
    pub v4: Option<String>,
    pub v6: Option<String>,
}

/// Listens to the network namespace of the thread that opened it.
pub struct Watch {
    events: Socket,
    requests: Socket,
    /// The neighbours whose link addresses are known. Only what changes them matters: they are told of
    /// again whenever the kernel looks whether they are still there.
    neighbours: HashMap<(u32, IpAddr), Vec<u8>>,
}

impl Watch {
    /// Listens from now on.
    ///
    /// # Errors
    ///
    /// The kernel refuses a netlink socket.
    pub fn open() -> Result<Self, NetworkError> {
        let open = || -> io::Result<Self> {
            let mut events = Socket::new(NETLINK_ROUTE)?;
            events.bind_auto()?;
            for group in GROUPS {
                events.add_membership(group as u32)?;
            }
            events.set_non_blocking(true)?;
            let requests = Socket::new(NETLINK_ROUTE)?;
            let mut watch = Self { events, requests, neighbours: HashMap::new() };
            watch.learn_neighbours()?;
            Ok(watch)
        };
        open().map_err(|cause| NetworkError::new("listen for changes of routes", cause))
    }

    /// Waits for a change, for at most `timeout`.
    ///
    /// # Errors
    ///
    /// The kernel does not tell any more.
    pub fn wait(&mut self, timeout: Duration) -> Result<Changed, NetworkError> {
        self.wait_for_events(timeout)
            .map_err(|cause| NetworkError::new("listen for changes of routes", cause))
    }

    fn wait_for_events(&mut self, timeout: Duration) -> io::Result<Changed> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.events, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut changed = Changed::default();
        // Not to their end: there may be none while a routing daemon fills the table.
        for _ in 0..AT_ONCE {
            match self.events.recv_from_full() {
                Ok((datagram, _)) => {
                    for message in messages(&datagram) {
                        let Changed { ways, dependence } = self.look_at(message);
                        changed.ways |= ways;
                        changed.dependence |= dependence;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Some were lost.
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => {
                    self.learn_neighbours()?;
                    changed = Changed::ALL;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(changed)
    }

    /// What a message says has changed.
    fn look_at(&mut self, message: Option<RouteNetlinkMessage>) -> Changed {
        let ways = Changed { ways: true, dependence: false };
        match message {
            Some(RouteNetlinkMessage::NewNeighbour(entry)) => {
                Changed { ways: self.neighbour(&entry, is_valid(entry.header.state)), ..ways }
            }
            Some(RouteNetlinkMessage::DelNeighbour(entry)) => {
                Changed { ways: self.neighbour(&entry, false), ..ways }
            }
            Some(RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_)) => Changed::ALL,
            Some(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
                Changed { dependence: route_depends_on(&route).is_some(), ..ways }
            }
            Some(_) => ways,
            // Forwarding was switched on or off, or it is not understood.
            None => Changed::ALL,
        }
    }

    /// Takes a neighbour into account. Whether a way that led to it may have changed.
    fn neighbour(&mut self, entry: &NeighbourMessage, valid: bool) -> bool {
        let ip = matches!(entry.header.family, AddressFamily::Inet | AddressFamily::Inet6);
        let Some(key) = neighbour_key(entry) else { return false };
        // Bridges tell of their stations in the same way.
        if !ip || entry.header.flags.contains(NeighbourFlags::Proxy) {
            return false;
        }
        let link = entry.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(address) => Some(address.clone()),
            _ => None,
        });
        match link {
            Some(link) if valid => {
                let before = self.neighbours.insert(key, link.clone());
                before.is_some_and(|before| before != link)
            }
            _ => self.neighbours.remove(&key).is_some(),
        }
    }

    fn learn_neighbours(&mut self) -> io::Result<()> {
        self.neighbours.clear();
        let mut neighbours = Vec::new();
        let all = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.dump(all, |message| neighbours.extend(message))?;
        for message in neighbours {
            self.look_at(Some(message));
        }
        Ok(())
    }

    /// Whether the way of a packet follows from its destination alone.
    ///
    /// # Errors
    ///
    /// The kernel does not tell.
    pub fn dependence(&self) -> Result<Dependence, NetworkError> {
        let failed = |cause| NetworkError::new("read the routing rules", cause);
        let mut dependence = Dependence::default();
        let requests = [
            RouteNetlinkMessage::GetRule(RuleMessage::default()),
            RouteNetlinkMessage::GetRoute(RouteMessage::default()),
        ];
        let mut look = |message: Option<RouteNetlinkMessage>| {
            let (family, reason) = match &message {
                Some(RouteNetlinkMessage::NewRule(rule)) => {
                    (rule.header.family, rule_depends_on(rule))
                }
                Some(RouteNetlinkMessage::NewRoute(route)) => {
                    (route.header.address_family, route_depends_on(route))
                }
                Some(_) => return,
                None => {
                    (AddressFamily::Unspec, Some("a rule or route is not understood".to_owned()))
                }
            };
            let Dependence { v4, v6 } = &mut dependence;
            if family != AddressFamily::Inet6 && v4.is_none() {
                v4.clone_from(&reason);
            }
            if family != AddressFamily::Inet && v6.is_none() {
                *v6 = reason;
            }
        };
        for request in requests {
            self.dump(request, &mut look).map_err(failed)?;
        }
        Ok(dependence)
    }

    /// Looks at all that the kernel has of a kind; `None` for what is not understood.
    fn dump(
        &self,
        request: RouteNetlinkMessage,
        mut look: impl FnMut(Option<RouteNetlinkMessage>),
    ) -> io::Result<()> {
        /// NLMSG_ERROR and NLMSG_DONE of netlink.h.
        const ERROR: u16 = 2;
        const DONE: u16 = 3;
        let mut request = NetlinkMessage::from(request);
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.requests.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        loop {
            let (datagram, _) = self.requests.recv_from_full()?;
            for bytes in split(&datagram) {
                let kind = bytes.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
                match kind {
                    Some(DONE) => return Ok(()),
                    Some(ERROR) => {
                        let code = bytes.get(16..).and_then(|rest| rest.first_chunk());
                        let code = code.map_or(libc::EPROTO, |code| -i32::from_ne_bytes(*code));
                        return Err(io::Error::from_raw_os_error(code));
                    }
                    _ => look(message(bytes)),
                }
            }
        }
    }
}

/// The messages of a datagram; `None` for one that is not understood.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Option<RouteNetlinkMessage>> {
    split(datagram).map(message)
}

fn message(bytes: &[u8]) -> Option<RouteNetlinkMessage> {
    match NetlinkMessage::deserialize(bytes).ok()?.payload {
        NetlinkPayload::InnerMessage(message) => Some(message),
        _ => None,
    }
}

/// Each message of a datagram with its header: `struct nlmsghdr` begins with the length, and the next
/// begins at a multiple of four.
fn split(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
        const HEADER: usize = 16;
        let message = datagram.get(..length.max(HEADER))?;
        datagram = datagram.get(message.len().next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn neighbour_key(entry: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
            Some((entry.header.ifindex, (*address).into()))
        }
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
            Some((entry.header.ifindex, (*address).into()))
        }
        _ => None,
    })
}

/// Whether the kernel sends to it (NUD_VALID).
fn is_valid(state: NeighbourState) -> bool {
    !matches!(state, NeighbourState::None | NeighbourState::Incomplete | NeighbourState::Failed)
}

/// What a routing rule asks for that two packets to one destination may differ in. XDP programs have
/// no mark and no socket, so rules for those are the same for all packets.
fn rule_depends_on(rule: &RuleMessage) -> Option<String> {
    let mut selectors = Vec::new();
    let mut priority = 0;
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Source(address) => selectors.push(format!("from {address}")),
            RuleAttribute::Iifname(name) => selectors.push(format!("iif {name}")),
            RuleAttribute::IpProtocol(_) => selectors.push("ipproto".to_owned()),
            RuleAttribute::SourcePortRange(_) => selectors.push("sport".to_owned()),
            RuleAttribute::DestinationPortRange(_) => selectors.push("dport".to_owned()),
            RuleAttribute::L3MDev(true) => selectors.push("l3mdev".to_owned()),
            // A selector of a later kernel.
            RuleAttribute::Other(_) => selectors.push("another selector".to_owned()),
            _ => {}
        }
    }
    if rule.header.tos != 0 {
        selectors.push("tos".to_owned());
    }
    (!selectors.is_empty()).then(|| format!("ip rule {priority} has {}", selectors.join(", ")))
}

fn route_depends_on(route: &RouteMessage) -> Option<String> {
    if route.header.source_prefix_length != 0 {
        return Some("a route has a source prefix".to_owned());
    }
    // The kernel chooses one by a hash of more than the destination.
    let several = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::MultiPath(hops) if hops.len() > 1);
    if route.attributes.iter().any(several) {
        return Some("a route has several paths".to_owned());
    }
    (route.header.tos != 0).then(|| "a route has a type of service".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(attributes: Vec<RuleAttribute>) -> Option<String> {
        let mut rule = RuleMessage::default();
        rule.attributes = attributes;
        rule_depends_on(&rule)
    }

    #[test]
    fn rules_that_look_at_the_destination_alone_do_no_harm() {
        assert_eq!(rule(vec![RuleAttribute::Priority(32766), RuleAttribute::Table(254)]), None);
        let to = RuleAttribute::Destination([10, 0, 0, 0].into());
        assert_eq!(
            rule(vec![to, RuleAttribute::FwMark(7), RuleAttribute::Oifname("a".into())]),
            None
        );
        let from = RuleAttribute::Source([10, 0, 0, 0].into());
        assert_eq!(
            rule(vec![RuleAttribute::Priority(100), from]).as_deref(),
            Some("ip rule 100 has from 10.0.0.0")
        );
        assert!(rule(vec![RuleAttribute::L3MDev(true)]).is_some());
        let mut route = RouteMessage::default();
        assert_eq!(route_depends_on(&route), None);
        route.header.source_prefix_length = 64;
        assert!(route_depends_on(&route).is_some());
    }

    #[test]
    fn only_what_changes_a_known_neighbour_matters() {
        let mut watch = Watch {
            events: Socket::new(NETLINK_ROUTE).unwrap(),
            requests: Socket::new(NETLINK_ROUTE).unwrap(),
            neighbours: HashMap::new(),
        };
        let entry = |family, state, link: Option<u8>| {
            let mut entry = NeighbourMessage::default();
            entry.header.family = family;
            entry.header.ifindex = 3;
            entry.header.state = state;
            let address = NeighbourAddress::Inet([10, 0, 0, 1].into());
            entry.attributes.push(NeighbourAttribute::Destination(address));
            let link =
                link.map(|last| NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, last]));
            entry.attributes.extend(link);
            RouteNetlinkMessage::NewNeighbour(entry)
        };
        let ip = AddressFamily::Inet;
        for (message, ways) in [
            (entry(ip, NeighbourState::Incomplete, None), false),
            (entry(ip, NeighbourState::Reachable, Some(1)), false),
            (entry(ip, NeighbourState::Stale, Some(1)), false),
            (entry(AddressFamily::Bridge, NeighbourState::Reachable, Some(2)), false),
            (entry(ip, NeighbourState::Stale, Some(2)), true),
            (entry(ip, NeighbourState::Probe, Some(2)), false),
            (entry(ip, NeighbourState::Failed, None), true),
            (entry(ip, NeighbourState::Failed, None), false),
        ] {
            let changed = watch.look_at(Some(message.clone()));
            assert_eq!(changed, Changed { ways, dependence: false }, "{message:?}");
        }
        assert_eq!(watch.look_at(None), Changed::ALL);
    }

    #[test]
    fn a_datagram_of_several_messages_is_taken_apart() {
        let mut datagram = Vec::new();
        for length in [17u32, 20, 16] {
            datagram.extend(length.to_ne_bytes());
            datagram.resize(datagram.len() + length as usize - 4, 0);
            datagram.resize(datagram.len().next_multiple_of(4), 0);
        }
        let lengths: Vec<usize> = split(&datagram).map(<[u8]>::len).collect();
        assert_eq!(lengths, [17, 20, 16]);
        // A length that lies ends it.
        assert_eq!(split(&[255, 0, 0, 0, 1]).count(), 0);
        assert_eq!(split(&[0; 40]).count(), 2);
    }
}
