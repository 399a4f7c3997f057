//! The control socket: HTTP and JSON on a Unix socket. The daemon serves it, the commands ask it.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use axum::extract::{FromRequestParts, RawQuery, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use nix::unistd::Group;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::geteuid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::warn;

use crate::config::diff::Diff;
use crate::config::overlay::Change;
use crate::daemon::{self, Order};
use crate::flows::{self, Filter};
use crate::report::{Figures, Listed, LiveFlows};
use crate::rule::{Invalid, Mss};
use crate::serve::{Failure, PATIENCE, Peer, Turn, guard, serve};

/// Its members may ask the daemon.
pub const GROUP: &str = "portfwd";

/// An answer larger than this is not the daemon's: 100,000 rules are some 60 MB.
const LARGEST_ANSWER: usize = 256 << 20;

/// Nor is a line longer than this of an answer in lines.
const LONGEST_LINE: usize = 64 << 10;

/// A rule as it is shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RuleInfo {
    pub name: String,
    pub protocol: String,
    pub listen: String,
    pub to: Vec<String>,
    pub source: String,
    pub mss: Mss,
    pub stateful: bool,
    /// Whether it forwards.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Whether the file, or a flag, has it as it is.
    #[serde(default = "yes")]
    pub saved: bool,
}

fn yes() -> bool {
    true
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
    /// native, generic or tc; none while it is missing or another program is in the way.
    pub attach: Option<String>,
    /// Why in that way.
    pub why: Option<String>,
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
    /// Packets of flows for which the table had no room. They were translated, but a flood could end
    /// their flows.
    #[serde(default)]
    pub crowded: u64,
}

/// A flow, a line of `/v1/flows`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowInfo {
    pub client: SocketAddr,
    pub rule: String,
    /// Where the client sends to.
    pub listen: SocketAddr,
    /// The client as the backend sees it.
    pub source: SocketAddr,
    pub backend: SocketAddr,
    pub protocol: String,
    pub state: flows::State,
    /// Seconds since the first packet.
    pub age: f64,
    /// Seconds since the last packet of either direction.
    pub idle: f64,
    pub forward: Count,
    pub reply: Count,
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

/// `POST /v1/change`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeRequest {
    pub change: Change,
    /// In the file too.
    #[serde(default)]
    pub save: bool,
}

/// What was done, and what will not work as it is now, a line for each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    pub messages: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What the daemon is asked; the answer goes back through the sender.
#[derive(Debug)]
pub enum Request {
    List(oneshot::Sender<Listed>),
    Stats(oneshot::Sender<anyhow::Result<Figures>>),
    Flows(oneshot::Sender<LiveFlows>),
    Diff(oneshot::Sender<Result<Diff, daemon::Failure>>),
}

/// The daemon's side of the control socket. The socket file goes when this is dropped, and what was
/// made for it.
#[derive(Debug)]
pub struct Socket {
    listener: Option<UnixListener>,
    path: PathBuf,
    _directories: Directories,
}

/// Directories that were made, deepest first. Those that are empty go when this is dropped.
#[derive(Debug)]
struct Directories(Vec<PathBuf>);

impl Directories {
    fn make(directory: &Path) -> anyhow::Result<Self> {
        let missing = |it: &&Path| !it.as_os_str().is_empty() && !it.exists();
        let made = Self(directory.ancestors().take_while(missing).map(Path::to_owned).collect());
        // All come as far as the socket, whatever this process keeps from others.
        let before = rustix::process::umask(Mode::from_raw_mode(0o022));
        let created = std::fs::create_dir_all(directory);
        rustix::process::umask(before);
        created.with_context(|| {
            let directory = directory.display();
            format!("{directory}: cannot make it; run as root, or name another with --socket")
        })?;
        Ok(made)
    }
}

impl Drop for Directories {
    fn drop(&mut self) {
        for directory in &self.0 {
            let _: io::Result<()> = std::fs::remove_dir(directory);
        }
    }
}

impl Socket {
    /// Binds `path`, for its owner and the members of [`GROUP`], in place of the socket that a dead daemon left.
    ///
    /// # Errors
    ///
    /// A daemon answers there, something else than a socket is there, or the directory cannot be
    /// written.
    pub async fn bind(path: &Path) -> anyhow::Result<Self> {
        let directories = Directories::make(path.parent().unwrap_or(Path::new("")))?;
        let running = || {
            anyhow::anyhow!(
                "{}: a portfwd is running on this socket; stop it, or name another with --socket",
                path.display()
            )
        };
        match UnixStream::connect(path).await {
            Ok(_) => return Err(running()),
            // Many wait to be let in.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(running()),
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
        share(path);
        Ok(Self { listener: Some(listener), path: path.to_owned(), _directories: directories })
    }

    /// Serves until the task that runs this is dropped. Requests go to `requests`.
    pub async fn serve(
        mut self,
        requests: mpsc::Sender<Request>,
        orders: mpsc::Sender<Order>,
    ) -> io::Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let orders = Router::new()
            .route("/v1/reload", post(reload))
            .route("/v1/change", post(change))
            .route("/v1/detach", post(detach))
            .with_state(orders);
        let router = Router::new()
            .route("/v1/rules", get(list))
            .route("/v1/stats", get(stats))
            .route("/v1/flows", get(flows))
            .route("/v1/diff", get(differs))
            .with_state(requests)
            .merge(orders)
            // Of all that stands above.
            .layer(middleware::from_fn(guard));
        serve(listener, router, peer).await
    }
}

fn peer(stream: &UnixStream) -> Peer {
    match stream.peer_cred().map(|credentials| credentials.uid()) {
        Ok(user) if user == 0 || user == geteuid().as_raw() => Peer::Owner,
        Ok(user) => Peer::User(user),
        Err(_) => Peer::Unknown,
    }
}

/// Lets the members of [`GROUP`] ask, if there is one.
fn share(path: &Path) {
    let shown = path.display();
    match Group::from_name(GROUP) {
        Ok(Some(group)) => {
            if let Err(error) = give(path, group.gid.as_raw()) {
                warn!("{shown}: stays its owner's, and cannot be group {GROUP}'s too: {error}");
            }
        }
        Ok(None) => {}
        Err(error) => {
            warn!("{shown}: stays its owner's: whether there is a group {GROUP}: {error}")
        }
    }
}

/// Gives a socket to a group, and nothing that somebody puts in its place.
fn give(path: &Path, group: u32) -> io::Result<()> {
    let socket =
        rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("not a socket any more"));
    }
    let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
    chown(&path, None, Some(group))?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o660))
}

impl Drop for Socket {
    fn drop(&mut self) {
        // It may be gone already; there is nobody left to tell.
        let _: io::Result<()> = std::fs::remove_file(&self.path);
    }
}

/// How a request is refused that cannot be done.
pub fn refusal(failure: daemon::Failure) -> Failure {
    let status = match failure {
        daemon::Failure::Configuration(_) => StatusCode::UNPROCESSABLE_ENTITY,
        daemon::Failure::System(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, failure.lines())
}

const STOPPING: &str = "the daemon is stopping";

async fn ask<T>(
    requests: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Result<T, Failure> {
    let (sender, receiver) = oneshot::channel();
    let unavailable = |line: &str| (StatusCode::SERVICE_UNAVAILABLE, line.to_owned());
    let answer = async {
        requests.send(request(sender)).await.ok()?;
        receiver.await.ok()
    };
    match timeout(PATIENCE, answer).await {
        Ok(answer) => answer.ok_or_else(|| unavailable("the daemon is stopping")),
        Err(_) => Err(unavailable("the daemon is busy; try again")),
    }
}

type Requests = State<mpsc::Sender<Request>>;

async fn list(
    _: NoQuery,
    turn: Turn,
    State(requests): Requests,
) -> Result<impl IntoResponse, Failure> {
    ask(&requests, Request::List).await.map(|list| turn.json(list))
}

async fn stats(
    _: NoQuery,
    turn: Turn,
    State(requests): Requests,
) -> Result<impl IntoResponse, Failure> {
    figures(&requests).await.map(|stats| turn.json(stats))
}

/// What has no filters is asked for without.
struct NoQuery;

impl<S: Sync> FromRequestParts<S> for NoQuery {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        match parts.uri.query().filter(|query| !query.is_empty()) {
            None => Ok(Self),
            Some(query) => {
                let line = format!("{} takes no filter, as in {query:?}", parts.uri.path());
                Err((StatusCode::BAD_REQUEST, line))
            }
        }
    }
}

async fn differs(turn: Turn, State(requests): Requests) -> Result<impl IntoResponse, Failure> {
    ask(&requests, Request::Diff).await?.map(|diff| turn.json(diff)).map_err(refusal)
}

type Orders = State<mpsc::Sender<Order>>;

async fn order(
    orders: mpsc::Sender<Order>,
    order: impl FnOnce(oneshot::Sender<Result<Changed, daemon::Failure>>) -> Order,
) -> Result<impl IntoResponse, Failure> {
    let (sender, receiver) = oneshot::channel();
    let stopping = || (StatusCode::SERVICE_UNAVAILABLE, STOPPING.to_owned());
    orders.send(order(sender)).await.map_err(|_| stopping())?;
    receiver.await.map_err(|_| stopping())?.map(Json).map_err(refusal)
}

async fn reload(State(orders): Orders) -> Result<impl IntoResponse, Failure> {
    order(orders, Order::Reload).await
}

async fn detach(State(orders): Orders) -> Result<impl IntoResponse, Failure> {
    order(orders, Order::Detach).await
}

async fn change(State(orders): Orders, body: Bytes) -> Result<impl IntoResponse, Failure> {
    let asked: ChangeRequest = serde_json::from_slice(&body)
        .map_err(|error| (StatusCode::BAD_REQUEST, format!("not a change: {error}")))?;
    order(orders, |sender| Order::Change(asked, sender)).await
}

/// A line for each flow.
async fn flows(
    RawQuery(query): RawQuery,
    turn: Turn,
    State(requests): Requests,
) -> Result<impl IntoResponse, Failure> {
    let refused = |status| move |Invalid(message): Invalid| (status, message);
    let filter =
        Filter::from_query(&query.unwrap_or_default()).map_err(refused(StatusCode::BAD_REQUEST))?;
    let live = ask(&requests, Request::Flows).await?;
    let found = live.find(filter).map_err(refused(StatusCode::NOT_FOUND))?;
    let body = turn.write(move |out| found.write(out));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body))
}

/// The statistics, also for the metrics.
///
/// # Errors
///
/// As an HTTP status and a line.
pub async fn figures(requests: &mpsc::Sender<Request>) -> Result<Figures, Failure> {
    ask(requests, Request::Stats)
        .await?
        .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")))
}

/// Asks the daemon on `socket` for `path`.
///
/// # Errors
///
/// No daemon there, no permission, or an answer that is none.
pub async fn get_json<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    let answer = whole(socket, request(socket, Method::GET, path, Bytes::new()).await?).await?;
    read(socket, &answer)
}

/// Sends `body` to `path` of the daemon on `socket`.
///
/// # Errors
///
/// As [`get_json`].
pub async fn post_json<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    body: &impl Serialize,
) -> anyhow::Result<T> {
    let body = serde_json::to_vec(body)?.into();
    read(socket, &whole(socket, request(socket, Method::POST, path, body).await?).await?)
}

/// Has the daemon on `socket` do what `path` says.
///
/// # Errors
///
/// As [`get_json`].
pub async fn order_json<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    let answer = request(socket, Method::POST, path, Bytes::new()).await?;
    read(socket, &whole(socket, answer).await?)
}

/// Asks the daemon on `socket` for `path`, and takes each line of the answer as it comes.
///
/// # Errors
///
/// As [`get_json`], and what `each` fails with.
pub async fn get_lines<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    mut each: impl FnMut(T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut body = request(socket, Method::GET, path, Bytes::new()).await?.into_body();
    let shown = socket.display();
    let mut begun = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            anyhow::anyhow!("{shown}: the answer broke off ({error}); the daemon's log says why")
        })?;
        let Ok(piece) = frame.into_data() else { continue };
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            begun.extend_from_slice(part);
            // What is too long cannot be read, which says it.
            if begun.ends_with(b"\n") || begun.len() > LONGEST_LINE {
                each(read(socket, &begun)?)?;
                begun.clear();
            }
        }
    }
    if begun.is_empty() { Ok(()) } else { each(read(socket, &begun)?) }
}

const OTHER_VERSION: &str = "this daemon is of another version";

/// A daemon's answer from JSON.
fn read<T: DeserializeOwned>(socket: &Path, text: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(text).with_context(|| format!("{}: {OTHER_VERSION}", socket.display()))
}

/// All of an answer.
async fn whole(socket: &Path, answer: hyper::Response<Incoming>) -> anyhow::Result<Bytes> {
    let body = Limited::new(answer.into_body(), LARGEST_ANSWER).collect().await;
    body.map(|body| body.to_bytes())
        .map_err(|error| anyhow::anyhow!("{}: {error}", socket.display()))
}

/// That no daemon listens at a socket.
#[derive(Debug, thiserror::Error)]
#[error(
    "{}: no portfwd is running there; start it with `portfwd run`, or name its socket with --socket", .0.display()
)]
pub struct Nobody(PathBuf);

/// That the daemon does not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{}: {said}", socket.display())]
pub struct Refused {
    socket: PathBuf,
    status: StatusCode,
    /// Why, a line for each reason.
    pub said: String,
}

impl Refused {
    /// Whether the request is wrong, and nothing else.
    pub fn is_wrong_input(&self) -> bool {
        matches!(
            self.status,
            StatusCode::BAD_REQUEST | StatusCode::CONFLICT | StatusCode::UNPROCESSABLE_ENTITY
        )
    }
}

/// Connects, if need be after many others.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket).await {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < PATIENCE =>
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            done => return done,
        }
    }
}

/// Asks the daemon on `socket` for `path`, which it does not refuse.
async fn request(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
) -> anyhow::Result<hyper::Response<Incoming>> {
    let shown = socket.display();
    let is_file = || std::fs::metadata(socket).is_ok_and(|file| !file.file_type().is_socket());
    let stream = connect(socket).await.map_err(|error| match error.kind() {
        _ if is_file() => anyhow::anyhow!("{shown}: not a socket; name the daemon's with --socket"),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Nobody(socket.into()).into(),
        io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!(
                "{shown}: this user may not ask the daemon; run as root, or as a member of group {GROUP}"
            )
        }
        _ => anyhow::anyhow!("{shown}: {error}"),
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .with_context(|| format!("{shown}: does not speak HTTP"))?;
    // It ends with the answer.
    tokio::spawn(connection);
    let mut request =
        hyper::Request::builder().method(method).uri(path).header(header::HOST, "portfwd");
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(body))?;
    let answer = sender.send_request(request).await.with_context(|| format!("{shown}"))?;
    let status = answer.status();
    if !status.is_success() {
        let said = whole(socket, answer).await?;
        let said =
            if said.is_empty() { OTHER_VERSION.into() } else { String::from_utf8_lossy(&said) };
        bail!(Refused { socket: socket.to_owned(), status, said: said.into_owned() });
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::config::Config;
    use crate::report::tests::live_flows;

    /// A daemon with this many flows, and its socket.
    async fn daemon(directory: &Path, count: u32) -> PathBuf {
        let path = directory.join("portfwd.sock");
        let socket = Socket::bind(&path).await.expect("the socket binds");
        let (requests, mut inbox) = mpsc::channel(1);
        tokio::spawn(socket.serve(requests, mpsc::channel(1).0));
        tokio::spawn(async move {
            while let Some(request) = inbox.recv().await {
                match request {
                    Request::Flows(sender) => drop(sender.send(live_flows(count))),
                    Request::List(sender) => {
                        let config = Config::default().into();
                        let (stateful, interfaces) = Default::default();
                        drop(sender.send(Listed { config, stateful, interfaces }));
                    }
                    _ => {}
                }
            }
        });
        path
    }

    #[tokio::test]
    async fn flows_come_line_by_line() {
        const COUNT: u32 = 100_000;
        let directory = tempfile::tempdir().expect("a directory");
        let socket = daemon(directory.path(), COUNT).await;
        let count = async |query: &str| {
            let mut flows: Vec<FlowInfo> = Vec::new();
            let path = format!("/v1/flows{query}");
            let add = |flow| {
                flows.push(flow);
                Ok(())
            };
            get_lines(&socket, &path, add).await.map(|()| flows)
        };
        let all = count("").await.expect("all flows");
        assert_eq!(all.len(), COUNT as usize);
        assert_eq!(all[1].client, "10.0.0.1:5000".parse().expect("an address"));
        assert_eq!((all[1].rule.as_str(), all[1].state), ("game", flows::State::Established));
        let few = count("?rule=web&client=10.0.0.0/29").await.expect("four flows");
        assert_eq!(few.len(), 4);
        assert!(few.iter().all(|flow| flow.rule == "web" && flow.protocol == "udp"));

        let shown = socket.display();
        let refused = async |query| count(query).await.expect_err(query).to_string();
        let no_rule = "there is no rule \"nosuch\"; `portfwd list` has their names";
        assert_eq!(refused("?rule=nosuch").await, format!("{shown}: {no_rule}"));
        assert!(refused("?client=10").await.contains("\"10\" is neither an address nor"));
        assert!(refused("x").await.ends_with(OTHER_VERSION));
    }

    #[tokio::test]
    async fn changes_are_posted() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("portfwd.sock");
        // What a daemon answers is its own business.
        let router = Router::new()
            .route(
                "/change",
                post(async |body: String| {
                    Json(Changed { messages: vec![body], ..Changed::default() })
                }),
            )
            .route("/conflict", post(async || (StatusCode::CONFLICT, "one\ntwo")))
            .route("/broken", post(async || (StatusCode::INTERNAL_SERVER_ERROR, "three")));
        let listener = UnixListener::bind(&socket).expect("the socket binds");
        tokio::spawn(async move { axum::serve(listener, router).await });

        let change = Change::Remove { name: "web".to_owned() };
        let asked = ChangeRequest { change, save: true };
        let done: Changed = post_json(&socket, "/change", &asked).await.expect("an answer");
        assert_eq!(done.messages, ["{\"change\":{\"remove\":{\"name\":\"web\"}},\"save\":true}"]);
        let text = "{\"change\":{\"remove\":{\"name\":\"web\"}}}";
        assert!(!serde_json::from_str::<ChangeRequest>(text).expect("a change").save);
        let done: Changed = order_json(&socket, "/change").await.expect("an answer");
        assert_eq!(done.messages, [""]);

        let shown = socket.display();
        for (path, wrong_input, said) in [
            ("/conflict", true, "one\ntwo"),
            ("/broken", false, "three"),
            ("/nosuch", false, OTHER_VERSION),
        ] {
            let error = order_json::<Changed>(&socket, path).await.expect_err(path);
            let refused: &Refused = error.downcast_ref().expect("a refusal");
            assert_eq!((refused.is_wrong_input(), refused.said.as_str()), (wrong_input, said));
            assert_eq!(error.to_string(), format!("{shown}: {said}"));
        }
    }

    #[tokio::test]
    async fn whoever_has_seen_enough_may_go() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = daemon(directory.path(), u32::MAX).await;
        let mut left = 3;
        let enough = |_: FlowInfo| {
            left -= 1;
            if left > 0 { Ok(()) } else { Err(anyhow::anyhow!("enough")) }
        };
        let error = get_lines(&socket, "/v1/flows", enough).await.expect_err("it ends");
        assert_eq!(error.to_string(), "enough");
    }

    /// A client that has sent this.
    async fn client(socket: &Path, request: &str) -> UnixStream {
        let mut stream = connect(socket).await.expect("it connects");
        // Whom the daemon does not listen to cannot send.
        let _: io::Result<()> = stream.write_all(request.as_bytes()).await;
        stream
    }

    /// The status and the last line of the answer to this.
    async fn answer(socket: &Path, request: &str) -> (u16, String) {
        let mut stream = client(socket, request).await;
        let mut answer = Vec::new();
        let _: io::Result<usize> = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).expect("text");
        let status = answer.get(9..12).and_then(|status| status.parse().ok());
        let line = answer.lines().last().unwrap_or_default();
        (status.unwrap_or_else(|| panic!("{answer}")), line.to_owned())
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = daemon(directory.path(), 4).await;
        let get = async |what: &str| {
            let request =
                format!("GET {what} HTTP/1.1\r\nHost: portfwd\r\nConnection: close\r\n\r\n");
            answer(&socket, &request).await
        };
        assert_eq!(get("/v1/rules").await.0, 200);
        assert_eq!(get("/v1/rules?").await.0, 200);
        for (what, status, line) in [
            ("/v1/rules?x", 400, "/v1/rules takes no filter, as in \"x\""),
            ("/v1/stats?rule=web", 400, "/v1/stats takes no filter, as in \"rule=web\""),
            ("/v1/flows?rule=%00", 404, "there is no rule \"\\0\"; `portfwd list` has their names"),
            ("/v1/flows?rule=web&rule=game", 400, "rule is there twice; write it once"),
            ("/v1/flows?&=&", 400, "there is no filter \"\"; write rule=NAME or client=ADDRESS"),
            (
                "/v1/flows?client=%ff",
                400,
                "\"\u{fffd}\" is neither an address nor a network; write one, as in 203.0.113.7 or 203.0.113.0/24",
            ),
        ] {
            assert_eq!(get(what).await, (status, line.to_owned()), "{what}");
        }
        assert_eq!(get("/v1/nothing").await.0, 404);

        let post = async |length: usize, body: &str| {
            let head = format!(
                "POST /v1/rules HTTP/1.1\r\nHost: portfwd\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            );
            answer(&socket, &(head + body)).await
        };
        // The path is for reading.
        assert_eq!(post(1 << 20, &" ".repeat(1 << 20)).await.0, 405);
        let large = " ".repeat((1 << 20) + 1);
        assert_eq!(
            post(large.len(), &large).await,
            (413, "a request has at most 1 MiB".to_owned())
        );
        let mut chunked =
            "POST /v1/rules HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".to_owned();
        chunked.push_str(&format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len()));
        assert_eq!(answer(&socket, &chunked).await.0, 413);
        assert_eq!(answer(&socket, "nonsense\r\n\r\n").await.0, 400);
    }

    #[tokio::test]
    async fn many_who_do_not_read_leave_room() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = daemon(directory.path(), u32::MAX).await;
        let mut clients = Vec::new();
        for number in 0..400 {
            let request = match number % 4 {
                0 => "GET /v1/rules HT",
                1 => "",
                // Answers without end.
                _ => "GET /v1/flows HTTP/1.1\r\nHost: portfwd\r\n\r\n",
            };
            clients.push(client(&socket, request).await);
        }
        for _ in 0..3 {
            let list = get_json::<List>(&socket, "/v1/rules");
            let list = timeout(Duration::from_secs(20), list).await.expect("soon");
            assert_eq!(list.expect("a list").rules, []);
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_broken_off_looks_so() {
        const COUNT: u32 = 20_000;
        let directory = tempfile::tempdir().expect("a directory");
        let socket = daemon(directory.path(), COUNT).await;
        let mut clients = Vec::new();
        for _ in 0..8 {
            let request = "GET /v1/flows HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
            clients.push(client(&socket, request).await);
        }
        // One of them loses its turn to this.
        get_json::<List>(&socket, "/v1/rules").await.expect("a list");
        let mut broken = 0;
        for mut client in clients {
            let mut text = Vec::new();
            let read = timeout(Duration::from_secs(20), client.read_to_end(&mut text)).await;
            let _: io::Result<usize> = read.expect("it ends");
            assert!(text.starts_with(b"HTTP/1.1 200 OK"));
            // Each has three of these, and nothing else has.
            let flows = text.iter().filter(|byte| **byte == b'{').count() / 3;
            let is_whole = flows == COUNT as usize;
            assert_eq!(is_whole, text.ends_with(b"\r\n0\r\n\r\n"), "{flows}");
            broken += usize::from(!is_whole);
        }
        assert!(broken > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = daemon(directory.path(), 4).await;
        for request in ["", "GET /v1/rules HT", "GET /v1/rules HTTP/1.1\r\nHost: a\r\n\r\n"] {
            let mut stream = client(&socket, request).await;
            let mut text = Vec::new();
            let ended = timeout(Duration::from_secs(60), stream.read_to_end(&mut text)).await;
            assert!(ended.is_ok(), "{request:?}");
        }
        let half = "POST /v1/rules HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{";
        let (status, line) = answer(&socket, half).await;
        assert_eq!((status, &line[..]), (408, "the request did not come within 10 s"));
    }
}
