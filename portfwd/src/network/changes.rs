//! When to look again.

use std::{io, time::Duration};

use rtnetlink::{
    MulticastGroup,
    sys::{
        AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket,
        protocols::{NETLINK_GENERIC, NETLINK_ROUTE},
    },
};
use tokio::time::{Instant, timeout};

use super::NetworkError;

/// errno.h; `io::ErrorKind` has no name for it.
pub(super) const ENOBUFS: i32 = 105;

/// What [`Changes`] listens to.
const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Nexthop,
];

/// Says when links, addresses, routes, routing rules or XDP features have changed.
pub struct Changes {
    route: TokioSocket,
    features: Option<TokioSocket>,
    /// When the first change came that [`Changes::next`] has not told of yet.
    since: Option<Instant>,
}

/// Changes come in bursts. One is over when nothing came for this long.
const QUIET: Duration = Duration::from_millis(20);
/// One that does not end is told of after this long.
const LONGEST: Duration = Duration::from_millis(200);

impl Changes {
    /// Listens from now on, to `xdp`, the multicast group of changed XDP features, too.
    pub(super) fn open(xdp: Option<u32>) -> io::Result<Changes> {
        let mut route = TokioSocket::new(NETLINK_ROUTE)?;
        let groups = GROUPS.iter().fold(0, |mask, group| mask | 1 << (*group as u32 - 1));
        route.socket_mut().bind(&SocketAddr::new(0, groups))?;
        let mut features = None;
        if let Some(group) = xdp {
            let mut socket = TokioSocket::new(NETLINK_GENERIC)?;
            socket.socket_mut().bind_auto()?;
            socket.socket_ref().add_membership(group)?;
            features = Some(socket);
        }
        Ok(Changes { route, features, since: None })
    }

    /// Returns when the network has changed, at most 220 ms later. A call that is given up midway
    /// loses nothing.
    pub async fn next(&mut self) -> Result<(), NetworkError> {
        let since = match self.since {
            Some(since) => since,
            None => {
                self.event().await?;
                *self.since.insert(Instant::now())
            }
        };
        while since.elapsed() < LONGEST
            && let Ok(event) = timeout(QUIET, self.event()).await
        {
            event?;
        }
        self.since = None;
        Ok(())
    }

    async fn event(&self) -> Result<(), NetworkError> {
        // What has changed does not matter, so the rest of a longer message may be cut off.
        let (mut route, mut features) = (Vec::with_capacity(64), Vec::with_capacity(64));
        let received = tokio::select! {
            received = self.route.recv(&mut route) => received,
            received = async {
                match &self.features {
                    Some(socket) => socket.recv(&mut features).await,
                    None => std::future::pending().await,
                }
            } => received,
        };
        match received {
            // Messages were lost, so something has changed.
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => Ok(()),
            received => received
                .map_err(|cause| NetworkError::new("listen for changes of the network", cause)),
        }
    }
}
