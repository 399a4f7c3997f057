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
    packet_core::{NLM_F_ACK, NLM_F_CREATE},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::LinkExtentMask,
        neighbour::{NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType, RouteVia},
    },
};

mod changes;
mod netdev;
mod requests;
mod snapshot;
mod watch;

pub use changes::Changes;
use netdev::Netdev;
use requests::{AT_ONCE, Answer, Requests};
pub use snapshot::{Externals, Layer, Link, LocalAddress, Snapshot};
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
        Ok(self.routes(&[to]).await?.pop().unwrap_or(Route::Unreachable))
    }

    /// [`route`](Self::route) to each of these addresses: some 3 microseconds each. Other tasks have
    /// their turn in between.
    pub async fn routes(&self, to: &[IpAddr]) -> Result<Vec<Route>, NetworkError> {
        let failed = |cause| NetworkError::new("look up routes", cause);
        let mut requests = Requests::open().map_err(failed)?;
        let mut routes = Vec::with_capacity(to.len());
        for to in to.chunks(AT_ONCE) {
            let questions = to.iter().map(|to| route_question(*to));
            let answers = requests.ask(questions, 0).map_err(failed)?;
            for (to, answer) in to.iter().zip(answers) {
                routes.push(route(*to, answer)?);
            }
            tokio::task::yield_now().await;
        }
        Ok(routes)
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
        match self.keep_all_resolved(std::slice::from_ref(hop)).await.pop() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// [`keep_resolved`](Self::keep_resolved) for each of these. Returns what went wrong. Other tasks
    /// have their turn in between.
    pub async fn keep_all_resolved(&self, hops: &[NextHop]) -> Vec<NetworkError> {
        let failed = |cause| NetworkError::new("look up and resolve neighbours", cause);
        let mut requests = match Requests::open() {
            Ok(requests) => requests,
            Err(error) => return vec![failed(error)],
        };
        let mut errors = Vec::new();
        for hops in hops.chunks(AT_ONCE) {
            match keep_some_resolved(&mut requests, hops) {
                Ok(some) => errors.extend(some),
                Err(error) => {
                    errors.push(failed(error));
                    break;
                }
            }
            tokio::task::yield_now().await;
        }
        errors
    }

    /// What the kernel knows of this neighbour; `None` if it has no entry.
    pub async fn neighbour(&self, hop: &NextHop) -> Result<Option<NeighbourState>, NetworkError> {
        let failed = |cause| NetworkError::new("look up a neighbour", cause);
        let question = RouteNetlinkMessage::GetNeighbour(neighbour_message(hop));
        let answers = Requests::open().and_then(|mut it| it.ask([question], 0)).map_err(failed)?;
        let mut entries = answers.into_iter().map(|answer| neighbour_entry(hop, answer));
        let entry = entries.next().transpose()?.flatten();
        Ok(entry.map(|entry| entry.header.state))
    }
}

/// For at most [`AT_ONCE`] neighbours. Returns what went wrong with some; fails where the rest cannot
/// be asked for.
fn keep_some_resolved(requests: &mut Requests, hops: &[NextHop]) -> io::Result<Vec<NetworkError>> {
    let mut errors = Vec::new();
    let mut due = Vec::new();
    let questions =
        hops.iter().map(|hop| RouteNetlinkMessage::GetNeighbour(neighbour_message(hop)));
    for (hop, answer) in hops.iter().zip(requests.ask(questions, 0)?) {
        match neighbour_entry(hop, answer) {
            Ok(entry) if entry.as_ref().is_none_or(is_due) => due.push(hop),
            Ok(_) => {}
            Err(error) => errors.push(error),
        }
    }
    let uses = due.iter().map(|hop| {
        let mut message = neighbour_message(hop);
        message.header.flags = NeighbourFlags::Use;
        RouteNetlinkMessage::NewNeighbour(message)
    });
    let answers = requests.ask(uses, NLM_F_ACK | NLM_F_CREATE)?;
    for (hop, answer) in due.iter().zip(answers) {
        let failed = |cause| NetworkError::new(format!("resolve neighbour {}", hop.address), cause);
        errors.extend(answer.map_err(failed).err());
    }
    Ok(errors)
}

/// Whether the kernel has to be told to resolve it.
fn is_due(entry: &NeighbourMessage) -> bool {
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
    due && !theirs
}

fn neighbour_entry(
    hop: &NextHop,
    answer: Answer,
) -> Result<Option<NeighbourMessage>, NetworkError> {
    match answer {
        Ok(Some(RouteNetlinkMessage::NewNeighbour(entry))) => Ok(Some(entry)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(NetworkError::new(format!("look up neighbour {}", hop.address), error)),
    }
}

fn route_question(to: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    (message.header.address_family, message.header.destination_prefix_length) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    message.attributes.push(RouteAttribute::Destination(to.into()));
    RouteNetlinkMessage::GetRoute(message)
}

/// What the answer to [`route_question`] means.
fn route(to: IpAddr, answer: Answer) -> Result<Route, NetworkError> {
    let answer = match answer {
        Ok(Some(RouteNetlinkMessage::NewRoute(answer))) => answer,
        Ok(_) => return Ok(Route::Unreachable),
        // What a packet would get: no route, an unreachable, a prohibit, a blackhole route; or a
        // family that the kernel does not have.
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
        Err(error) => return Err(NetworkError::new(format!("look up the route to {to}"), error)),
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
