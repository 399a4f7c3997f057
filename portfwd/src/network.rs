//! Links, addresses, routes and neighbours, through netlink: a [`Snapshot`], and an event when it
//! is stale.
//!
//! All of it is what the network namespace of the process shows.

use std::{
    io::{self, ErrorKind},
    net::IpAddr,
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt};
pub use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::{
    Handle, new_connection_with_strict_check,
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::LinkExtentMask,
        neighbour::{NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType, RouteVia},
    },
};

mod changes;
mod netdev;
mod snapshot;
mod watch;

pub use changes::Changes;
use netdev::Netdev;
pub use snapshot::{Externals, Link, LocalAddress, Snapshot};
use snapshot::{link, local_address};
pub use watch::{Changed, Dependence, Watch};

/// The kernel refused a request, or did not answer.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}: {cause}")]
pub struct NetworkError {
    doing: String,
    cause: io::Error,
}

impl NetworkError {
    fn new(doing: impl Into<String>, cause: io::Error) -> NetworkError {
        NetworkError { doing: doing.into(), cause }
    }
}

/// Where a packet from the box to an address goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Via(NextHop),
    /// It is an address of this box.
    Local,
    /// There is no route, or it is a blackhole, unreachable or prohibit route, or the address is
    /// not that of one host.
    Unreachable,
}

/// The neighbour to which a packet is handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextHop {
    /// Index of the link by which it leaves.
    pub interface: u32,
    /// The gateway, or the destination itself when it is on the link. A gateway may be of the other
    /// family.
    pub address: IpAddr,
}

/// Asks the kernel.
pub struct Network {
    handle: Handle,
    netdev: Option<Netdev>,
}

impl Network {
    /// Opens the network namespace of the calling thread. Call it inside a tokio runtime, whose
    /// threads are all in that namespace.
    pub fn open() -> Result<(Network, Changes), NetworkError> {
        let failed = |cause| NetworkError::new("open a netlink socket", cause);
        let netdev = Netdev::open().map_err(failed)?;
        let changes = Changes::open(netdev.as_ref().and_then(|it| it.group)).map_err(failed)?;
        // Strict: the kernel honours the filters of a dump instead of ignoring them.
        let (connection, handle, _) = new_connection_with_strict_check().map_err(failed)?;
        tokio::spawn(connection);
        Ok((Network { handle, netdev }, changes))
    }

    /// The links and addresses as they are now.
    pub async fn snapshot(&self) -> Result<Snapshot, NetworkError> {
        let features = match &self.netdev {
            Some(netdev) => netdev
                .xdp_features()
                .map_err(|cause| NetworkError::new("read XDP features", cause))?,
            None => Default::default(),
        };
        let links = self.handle.link().get();
        let links = links
            .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats])
            .execute()
            .map_ok(|message| link(&message, features.get(&message.header.index).copied()))
            .try_collect()
            .await
            .map_err(|error| NetworkError::new("read the links", io_error(error)))?;
        let addresses = self
            .handle
            .address()
            .get()
            .execute()
            .try_filter_map(async |message| Ok(local_address(&message)))
            .try_collect()
            .await
            .map_err(|error| NetworkError::new("read the addresses", io_error(error)))?;
        Ok(Snapshot { links, addresses })
    }

    /// The way of a packet from the box to this address, through all routing rules and tables. Of
    /// several equal paths it is the one that the kernel chooses.
    pub async fn route(&self, to: IpAddr) -> Result<Route, NetworkError> {
        let mut message = RouteMessage::default();
        (message.header.address_family, message.header.destination_prefix_length) = match to {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        message.attributes.push(RouteAttribute::Destination(to.into()));
        let answer = match self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_REQUEST).await
        {
            Ok(answer) => answer,
            // What a packet would get: no route, an unreachable, a prohibit, a blackhole route; or
            // a family that the kernel does not have.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NetworkUnreachable
                        | ErrorKind::HostUnreachable
                        | ErrorKind::PermissionDenied
                        | ErrorKind::InvalidInput
                        | ErrorKind::Unsupported
                ) =>
            {
                return Ok(Route::Unreachable);
            }
            Err(error) => {
                return Err(NetworkError::new(format!("look up the route to {to}"), error));
            }
        };
        let Some(RouteNetlinkMessage::NewRoute(answer)) = answer else {
            return Ok(Route::Unreachable);
        };
        Ok(match answer.header.kind {
            RouteType::Local | RouteType::Anycast => Route::Local,
            RouteType::Unicast => match paths(&answer).next() {
                Some((interface, gateway)) => {
                    Route::Via(NextHop { interface, address: gateway.unwrap_or(to) })
                }
                None => Route::Unreachable,
            },
            _ => Route::Unreachable,
        })
    }

    /// The gateways of all routes in the main table that leave by these interfaces, each once,
    /// sorted.
    ///
    /// It reads the whole table: a few milliseconds per thousand routes.
    pub async fn gateways(&self, interfaces: &[u32]) -> Result<Vec<NextHop>, NetworkError> {
        let mut gateways = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            let mut routes = self.handle.route().get(message).execute();
            while let Some(route) = routes.next().await {
                let route =
                    route.map_err(|error| NetworkError::new("read the routes", io_error(error)))?;
                for (interface, gateway) in paths(&route) {
                    let Some(address) = gateway else { continue };
                    let hop = NextHop { interface, address };
                    if interfaces.contains(&interface) && !gateways.contains(&hop) {
                        gateways.push(hop);
                    }
                }
            }
        }
        gateways.sort();
        Ok(gateways)
    }

    /// Makes the kernel find the link address of this neighbour, or find out whether an old one is
    /// still true. Returns before it is known.
    ///
    /// To keep it known, call this every few seconds, at most [`REFRESH`] apart: XDP does not tell
    /// the neighbour table which entries it uses. Nothing is left behind that would have to be
    /// undone. What is valid stays so, and an entry that someone else looks after (permanent,
    /// managed, learned by a routing daemon) is left alone.
    pub async fn keep_resolved(&self, hop: &NextHop) -> Result<(), NetworkError> {
        if let Some(entry) = self.neighbour_entry(hop).await? {
            // NTF_USE would clear these flags, and would end a permanent entry's permanence.
            let theirs = entry.header.flags.contains(NeighbourFlags::ExtLearned)
                || entry.attributes.iter().any(|attribute| {
                    matches!(attribute, NeighbourAttribute::ExtFlags(flags)
                        if flags.contains(NeighbourExtFlags::Managed))
                });
            let due = matches!(
                entry.header.state,
                NeighbourState::None | NeighbourState::Stale | NeighbourState::Failed
            );
            if theirs || !due {
                return Ok(());
            }
        }
        let mut message = neighbour_message(hop);
        message.header.flags = NeighbourFlags::Use;
        let request = RouteNetlinkMessage::NewNeighbour(message);
        match self.request(request, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE).await {
            Ok(_) => Ok(()),
            Err(error) => {
                Err(NetworkError::new(format!("resolve neighbour {}", hop.address), error))
            }
        }
    }

    /// What the kernel knows of this neighbour; `None` if it has no entry.
    pub async fn neighbour(&self, hop: &NextHop) -> Result<Option<NeighbourState>, NetworkError> {
        Ok(self.neighbour_entry(hop).await?.map(|entry| entry.header.state))
    }

    async fn neighbour_entry(
        &self,
        hop: &NextHop,
    ) -> Result<Option<NeighbourMessage>, NetworkError> {
        let request = RouteNetlinkMessage::GetNeighbour(neighbour_message(hop));
        match self.request(request, NLM_F_REQUEST).await {
            Ok(Some(RouteNetlinkMessage::NewNeighbour(entry))) => Ok(Some(entry)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(NetworkError::new(format!("look up neighbour {}", hop.address), error))
            }
        }
    }

    /// The first answer to a request that has at most one.
    async fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        let mut answers = self.handle.clone().request(message).map_err(io_error)?;
        let mut first = None;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(answer) => first = first.or(Some(answer)),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
        Ok(first)
    }
}

/// How often [`Network::keep_resolved`] wants to be called. The kernel waits as long before it asks
/// whether a stale entry is still true, and forgets one that was not used for a minute.
pub const REFRESH: Duration = Duration::from_secs(5);

fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// The paths of a route: interface, and gateway if there is one.
fn paths(route: &RouteMessage) -> impl Iterator<Item = (u32, Option<IpAddr>)> {
    let single = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(interface) => Some((*interface, gateway(&route.attributes))),
        _ => None,
    });
    let several = route.attributes.iter().filter_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => Some(hops),
        _ => None,
    });
    let several = several.flatten().map(|hop| (hop.interface_index, gateway(&hop.attributes)));
    single.into_iter().chain(several)
}

fn gateway(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some((*address).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
    })
}

fn neighbour_message(hop: &NextHop) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match hop.address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = hop.interface;
    message.attributes.push(NeighbourAttribute::Destination(hop.address.into()));
    message
}
