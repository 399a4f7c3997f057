//! The control socket: HTTP and JSON on a Unix socket. The daemon serves it, the commands ask it.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use futures_util::stream;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use rustix::fs::Mode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::report::{Figures, Listed};

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/portfwd/portfwd.sock";

/// An answer larger than this is not the daemon's: 100,000 rules are some 60 MB.
const LARGEST_ANSWER: usize = 256 << 20;

/// A rule as it is shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RuleInfo {
    pub name: String,
    pub protocol: String,
    pub listen: String,
    pub to: Vec<String>,
    pub source: String,
    pub stateful: bool,
}

/// `portfwd list --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct List {
    pub rules: Vec<RuleInfo>,
    pub interfaces: Vec<InterfaceInfo>,
}

/// An interface that the configuration names, or that leads to a backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterfaceInfo {
    pub name: String,
    /// external, internal or both.
    pub role: String,
    /// native or generic; none while it is missing or another program is in the way.
    pub attach: Option<String>,
}

/// Packets and bytes of IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

/// Flows of a rule's flow table; a stateless rule has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flows {
    pub active: u64,
    pub created: u64,
}

/// A rule with its counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RuleStats {
    #[serde(flatten)]
    pub rule: RuleInfo,
    pub forward: Count,
    pub reply: Count,
    /// Of the translated packets, those that went out through the stack, by reason.
    pub to_stack: BTreeMap<String, u64>,
    pub dropped: BTreeMap<String, u64>,
    /// Of the dropped, how many were answered with an ICMP error.
    pub answered: u64,
    pub flows: Flows,
    /// RFC 3339, UTC.
    pub last_packet: Option<String>,
}

/// Packets that no rule translated, by reason; `dropped` sums up the rules'.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdicts {
    pub passed: BTreeMap<String, u64>,
    pub dropped: BTreeMap<String, u64>,
}

/// `portfwd stats --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub rules: Vec<RuleStats>,
    pub verdicts: Verdicts,
    pub interfaces: Vec<InterfaceInfo>,
}

/// What the daemon is asked; the answer goes back through the sender.
#[derive(Debug)]
pub enum Request {
    List(oneshot::Sender<Listed>),
    Stats(oneshot::Sender<anyhow::Result<Figures>>),
}

/// The daemon's side of the control socket. The socket file goes when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl Socket {
    /// Binds `path`, for its owner alone, in place of the socket that a dead daemon left.
    ///
    /// # Errors
    ///
    /// A daemon answers there, something else than a socket is there, or the directory cannot be
    /// written.
    pub async fn bind(path: &Path) -> anyhow::Result<Self> {
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty())
        {
            std::fs::create_dir_all(directory).with_context(|| {
                let directory = directory.display();
                format!("{directory}: cannot make it; run as root, or name another with --socket")
            })?;
        }
        match UnixStream::connect(path).await {
            Ok(_) => bail!(
                "{}: a portfwd is running on this socket; stop it, or name another with --socket",
                path.display()
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                if !std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
                    bail!(
                        "{}: not a socket; remove it, or name another with --socket",
                        path.display()
                    );
                }
                std::fs::remove_file(path)
                    .with_context(|| format!("{}: cannot replace a dead socket", path.display()))?;
            }
            Err(error) => bail!("{}: {error}; name another with --socket", path.display()),
        }
        // The mode counts from the first moment: whoever connects waits in the queue.
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        let listener = bound.with_context(|| {
            format!("{}: cannot bind; run as root, or name another with --socket", path.display())
        })?;
        Ok(Self { listener: Some(listener), path: path.to_owned() })
    }

    /// Serves until the task that runs this is dropped. Requests go to `requests`.
    pub async fn serve(mut self, requests: mpsc::Sender<Request>) -> io::Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let router = Router::new()
            .route("/v1/rules", get(list))
            .route("/v1/stats", get(stats))
            .with_state(requests);
        axum::serve(listener, router).await
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // It may be gone already; there is nobody left to tell.
        let _: io::Result<()> = std::fs::remove_file(&self.path);
    }
}

type Failure = (StatusCode, String);

const STOPPING: &str = "the daemon is stopping";

async fn ask<T>(
    requests: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Result<T, Failure> {
    let (sender, receiver) = oneshot::channel();
    let stopping = || (StatusCode::SERVICE_UNAVAILABLE, STOPPING.to_owned());
    requests.send(request(sender)).await.map_err(|_| stopping())?;
    receiver.await.map_err(|_| stopping())
}

type Requests = State<mpsc::Sender<Request>>;

async fn list(State(requests): Requests) -> Result<impl IntoResponse, Failure> {
    ask(&requests, Request::List).await.map(json)
}

async fn stats(State(requests): Requests) -> Result<impl IntoResponse, Failure> {
    figures(&requests).await.map(json)
}

/// The statistics, also for the metrics.
///
/// # Errors
///
/// As an HTTP status and a line.
pub async fn figures(requests: &mpsc::Sender<Request>) -> Result<Figures, (StatusCode, String)> {
    ask(requests, Request::Stats)
        .await?
        .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")))
}

fn json(facts: impl Serialize + Send + 'static) -> impl IntoResponse {
    let body = streamed(move |out| serde_json::to_writer(out, &facts).map_err(Into::into));
    ([(header::CONTENT_TYPE, "application/json")], body)
}

/// What is written while it is sent, in a thread of its own: of many rules it is too much to hold.
pub fn streamed(write: impl FnOnce(&mut dyn io::Write) -> io::Result<()> + Send + 'static) -> Body {
    let (sender, mut receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        let mut out = io::BufWriter::with_capacity(64 << 10, Pieces(sender.clone()));
        let written = write(&mut out).and_then(|()| io::Write::flush(&mut out));
        if let Err(error) = written {
            // Whoever asked sees that it is not whole, or has gone.
            let _: Result<(), _> = sender.blocking_send(Err(error));
        }
    });
    Body::from_stream(stream::poll_fn(move |context| receiver.poll_recv(context)))
}

struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl io::Write for Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(piece)));
        sent.map(|()| piece.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Asks the daemon on `socket` for `path`.
///
/// # Errors
///
/// No daemon there, no permission, or an answer that is none.
pub async fn get_json<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    let shown = socket.display();
    let is_file = || std::fs::metadata(socket).is_ok_and(|file| !file.file_type().is_socket());
    let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        _ if is_file() => anyhow::anyhow!("{shown}: not a socket; name the daemon's with --socket"),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => anyhow::anyhow!(
            "{shown}: no portfwd is running there; start it with `portfwd run`, or name its socket with --socket"
        ),
        io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!("{shown}: this user may not ask the daemon; run as root")
        }
        _ => anyhow::anyhow!("{shown}: {error}"),
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .with_context(|| format!("{shown}: does not speak HTTP"))?;
    let connection = tokio::spawn(connection);
    let request = hyper::Request::get(path)
        .header(hyper::header::HOST, "portfwd")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await.with_context(|| format!("{shown}"))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LARGEST_ANSWER)
        .collect()
        .await
        .map_err(|error| anyhow::anyhow!("{shown}: {error}"))?
        .to_bytes();
    connection.abort();
    if !status.is_success() {
        bail!("{shown}: {}", String::from_utf8_lossy(&body));
    }
    serde_json::from_slice(&body)
        .with_context(|| format!("{shown}: this daemon is of another version"))
}
