//! Serves HTTP to whoever connects. Those who are slow, broken or many get a bounded part of the daemon, and take no
//! one else's.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use axum::{Extension, Router};
use futures_util::stream;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_io_timeout::TimeoutStream;
use tracing::trace;

/// How many may be connected, of the owner and of all others. For one more, the oldest has to go.
const CONNECTIONS: usize = 64;
/// How many of those are answered at once: counters of 100,000 rules are 30 MB each time, and a thread writes.
const TURNS: usize = 8;
/// How long one may wait for that; and for the daemon, then.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long a client may take for a request, or not send another.
const REQUEST: Duration = Duration::from_secs(10);
/// How long nobody may read of an answer: `portfwd flows | less` may stand for a while.
const UNREAD: Duration = Duration::from_secs(300);
/// The same while others wait for their turn.
const STALLED: Duration = Duration::from_millis(500);
/// What a request may be that changes something.
const LARGEST_BODY: usize = 1 << 20;
/// Of a connection's two buffers.
const BUFFER: usize = 64 << 10;

/// Who is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// root, or the user that the daemon runs as.
    Owner,
    User(u32),
    Unknown,
}

/// An HTTP status and a line.
pub type Failure = (StatusCode, String);

/// Serves until the task that runs this is dropped, which also ends what goes on.
///
/// Handlers find a [`Peer`] among the extensions, and take a [`Turn`] for what may be large.
pub async fn serve<L: Listener>(
    mut listener: L,
    router: Router,
    peer: impl Fn(&L::Io) -> Peer,
) -> io::Result<()> {
    let mut connections = JoinSet::new();
    let [mut owner, mut others] = [Room::default(), Room::default()];
    loop {
        let (stream, _) = listener.accept().await;
        while connections.try_join_next().is_some() {}
        let peer = peer(&stream);
        let room = if peer == Peer::Owner { &mut owner } else { &mut others };
        let router = router.clone().layer(Extension(peer)).layer(Extension(room.turns.clone()));
        room.admit(connections.spawn(converse::<L>(stream, router)));
    }
}

/// Takes a client's requests, until it has none.
async fn converse<L: Listener>(stream: L::Io, router: Router) {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(UNREAD));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        trace!("a client: {error}");
    }
}

/// Those of one sort who are connected.
#[derive(Default)]
struct Room {
    /// The oldest first.
    connections: VecDeque<AbortHandle>,
    turns: Arc<Turns>,
}

impl Room {
    fn admit(&mut self, connection: AbortHandle) {
        self.connections.retain(|it| !it.is_finished());
        if self.connections.len() == CONNECTIONS
            && let Some(oldest) = self.connections.pop_front()
        {
            oldest.abort();
        }
        self.connections.push_back(connection);
    }
}

#[derive(Debug)]
struct Turns {
    free: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Default for Turns {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(TURNS)), waiting: AtomicUsize::new(0) }
    }
}

impl Turns {
    async fn next(self: Arc<Self>) -> Option<Turn> {
        let waiting = Waiting::new(&self.waiting);
        let permit = timeout(PATIENCE, self.free.clone().acquire_owned()).await.ok()?.ok()?;
        drop(waiting);
        Some(Turn { turns: self, _permit: permit })
    }
}

/// Counts one who waits, however that ends.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A client's turn to ask for something that may be large, and to have it written. Handlers take it first.
#[derive(Debug)]
pub struct Turn {
    turns: Arc<Turns>,
    _permit: OwnedSemaphorePermit,
}

impl<S: Sync> FromRequestParts<S> for Turn {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        let turns = parts.extensions.get::<Arc<Turns>>().cloned().unwrap_or_default();
        let busy = || {
            (StatusCode::SERVICE_UNAVAILABLE, "too many ask at the same time; try again".to_owned())
        };
        turns.next().await.ok_or_else(busy)
    }
}

impl Turn {
    /// An answer that is written while it is sent, in a thread of its own: of many rules it is too much to hold.
    pub fn write(
        self,
        write: impl FnOnce(&mut dyn io::Write) -> io::Result<()> + Send + 'static,
    ) -> Body {
        let (sender, mut receiver) = mpsc::channel(2);
        let runtime = Handle::current();
        tokio::task::spawn_blocking(move || {
            let pieces = Pieces { sender, turn: self, runtime };
            let mut out = io::BufWriter::with_capacity(BUFFER, pieces);
            match write(&mut out).and_then(|()| io::Write::flush(&mut out)) {
                Ok(()) => drop(out.get_ref().send(None)),
                // What is left in the buffer stays there.
                Err(_) => drop(out.into_parts()),
            }
        });
        let mut over = false;
        Body::from_stream(stream::poll_fn(move |context| {
            if over {
                return Poll::Ready(None::<io::Result<Bytes>>);
            }
            receiver.poll_recv(context).map(|piece| {
                over = !matches!(piece, Some(Some(_)));
                // Without an end it is not whole, which whoever asked has to see.
                piece.ok_or_else(|| io::ErrorKind::BrokenPipe.into()).transpose()
            })
        }))
    }

    /// Whether others wait for it.
    fn is_wanted(&self) -> bool {
        self.turns.waiting.load(Ordering::Relaxed) > 0
    }

    pub fn json(self, facts: impl Serialize + Send + 'static) -> impl IntoResponse {
        let body = self.write(move |out| serde_json::to_writer(out, &facts).map_err(Into::into));
        ([(header::CONTENT_TYPE, "application/json")], body)
    }
}

/// Pieces of an answer, and `None` as its end.
struct Pieces {
    sender: mpsc::Sender<Option<Bytes>>,
    turn: Turn,
    runtime: Handle,
}

impl Pieces {
    fn send(&self, piece: Option<Bytes>) -> io::Result<()> {
        let start = Instant::now();
        self.runtime.block_on(async {
            loop {
                match timeout(STALLED, self.sender.reserve()).await {
                    Ok(Ok(permit)) => {
                        permit.send(piece);
                        return Ok(());
                    }
                    Ok(Err(_)) => return Err(io::ErrorKind::BrokenPipe.into()),
                    Err(_) if self.turn.is_wanted() || start.elapsed() >= UNREAD => {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    Err(_) => {}
                }
            }
        })
    }
}

impl io::Write for Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.send(Some(Bytes::copy_from_slice(piece)))?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A layer: everybody who is connected may GET, and only the owner anything else, with a body that is not too large and
/// comes soon. Handlers get it whole.
pub async fn guard(
    Extension(peer): Extension<Peer>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return Ok(next.run(request).await);
    }
    let who = match peer {
        Peer::Owner => None,
        Peer::User(user) => Some(format!("; this is user {user}")),
        Peer::Unknown => Some(String::new()),
    };
    if let Some(who) = who {
        return Err((StatusCode::FORBIDDEN, format!("only root may change this{who}")));
    }
    let (parts, body) = request.into_parts();
    let whole = match timeout(REQUEST, Limited::new(body, LARGEST_BODY).collect()).await {
        Ok(Ok(whole)) => whole.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let line = format!("a request has at most {} MiB", LARGEST_BODY >> 20);
            return Err((StatusCode::PAYLOAD_TOO_LARGE, line));
        }
        Ok(Err(error)) => {
            return Err((StatusCode::BAD_REQUEST, format!("the request broke off: {error}")));
        }
        Err(_) => {
            let line = format!("the request did not come within {} s", REQUEST.as_secs());
            return Err((StatusCode::REQUEST_TIMEOUT, line));
        }
    };
    Ok(next.run(Request::from_parts(parts, whole.into())).await)
}
