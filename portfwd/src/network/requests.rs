//! Many requests in one system call.

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_REQUEST, NLMSG_ALIGNTO, NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// How many requests are sent at once: what comes back has to fit in the socket's buffer, which has
/// 208 KiB unless the box says otherwise, at some 4 KiB an answer.
pub(super) const AT_ONCE: usize = 16;

/// What the kernel says to a request; `None` is that it is done.
pub(super) type Answer = io::Result<Option<RouteNetlinkMessage>>;

/// A socket for requests that have one answer each.
pub(super) struct Requests {
    socket: Socket,
    sent: Vec<u8>,
    received: Vec<u8>,
}

impl Requests {
    pub(super) fn open() -> io::Result<Requests> {
        let socket = Socket::new(NETLINK_ROUTE)?;
        // The kernel answers within the call that sends. What is not there then never comes.
        socket.set_non_blocking(true)?;
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Requests { socket, sent: Vec::new(), received: Vec::with_capacity(16 << 10) })
    }

    /// Sends at most [`AT_ONCE`] requests and reads their answers, in the order of the requests.
    ///
    /// An error leaves answers behind that nobody reads: the socket is of no more use.
    pub(super) fn ask(
        &mut self,
        messages: impl IntoIterator<Item = RouteNetlinkMessage>,
        flags: u16,
    ) -> io::Result<Vec<Answer>> {
        self.sent.clear();
        let mut count = 0;
        for message in messages {
            let mut message = NetlinkMessage::from(message);
            message.header.flags = NLM_F_REQUEST | flags;
            message.finalize();
            let start = self.sent.len();
            let length = message.buffer_len().next_multiple_of(NLMSG_ALIGNTO.into());
            self.sent.resize(start + length, 0);
            message.serialize(&mut self.sent[start..]);
            count += 1;
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        self.socket.send_to(&self.sent, &SocketAddr::new(0, 0), 0)?;
        (0..count).map(|_| self.receive()).collect()
    }

    fn receive(&mut self) -> io::Result<Answer> {
        self.received.clear();
        self.socket.recv(&mut self.received, 0)?;
        let answer = NetlinkMessage::deserialize(&self.received).map_err(io::Error::other)?;
        Ok(match answer.payload {
            NetlinkPayload::InnerMessage(answer) => Ok(Some(answer)),
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(None),
        })
    }
}
