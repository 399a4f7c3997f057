//! A constant load whose every message has a number, through rules of each sort at once: what was lost,
//! doubled or led astray while portfwd was mistreated is counted exactly.
//!
//! It runs between the client of a rig and its two servers, over both IP versions:
//!
//! | | protocol | rule | clients' ports |
//! |---|---|---|---|
//! | `Stateless` | UDP | to the server | one |
//! | `Masquerade` | UDP | to the server, masquerading | several |
//! | `Spread` | UDP | to both servers | several |
//! | `Tcp` | TCP | to the server | one connection |
//! | `TcpMasquerade` | TCP | to the server, masquerading | one connection |
//!
//! Servers send each message back. They listen on the ports of all rules, so that what goes to a wrong one shows.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::netns::Namespace;
use crate::peers;
use crate::random;
use crate::rig::{self, Rig};
use crate::sys;

/// Bytes of a message, and of a datagram's payload.
const SIZE: usize = 64;
/// How long threads sleep in a call before they look whether they should end.
const TICK: Duration = Duration::from_millis(20);
/// What is in flight is awaited for as long; TCP may have to send again.
const PATIENCE: Duration = Duration::from_secs(20);
/// Datagrams that have not come when nothing came for this long do not come any more.
const SILENCE: Duration = Duration::from_secs(1);
/// Room in each direction of a socket, whatever the machine allows. Memory is taken only as it is needed.
const ROOM: i32 = 64 << 20;

/// A sort of stream, and the rule that it goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Stateless,
    Masquerade,
    Spread,
    Tcp,
    TcpMasquerade,
}

impl Kind {
    pub const ALL: [Self; 5] =
        [Self::Stateless, Self::Masquerade, Self::Spread, Self::Tcp, Self::TcpMasquerade];

    pub fn name(self) -> &'static str {
        ["udp", "udp-masquerade", "udp-spread", "tcp", "tcp-masquerade"][self as usize]
    }

    pub fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp | Self::TcpMasquerade)
    }

    pub fn is_stateful(self) -> bool {
        !matches!(self, Self::Stateless | Self::Tcp)
    }

    fn masquerades(self) -> bool {
        matches!(self, Self::Masquerade | Self::TcpMasquerade)
    }

    /// The port that clients use.
    pub fn listen(self) -> u16 {
        7001 + self as u16
    }

    /// The port of the backends.
    pub fn port(self) -> u16 {
        7101 + self as u16
    }

    /// Where its rule leads unless told otherwise.
    pub fn backends(self) -> &'static [Backend] {
        if self == Self::Spread { &[Backend::A, Backend::B] } else { &[Backend::A] }
    }

    /// The name of its rule of an IP version.
    pub fn rule(self, version: Version) -> String {
        format!("{}-{}", self.name(), if version == Version::V4 { 4 } else { 6 })
    }
}

/// The rig's server, and the second one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    A,
    B,
}

impl Backend {
    const BOTH: [Self; 2] = [Self::A, Self::B];

    pub fn address(self, version: Version) -> IpAddr {
        version.of(if self == Self::A { rig::SERVER } else { rig::SECOND_SERVER })
    }

    pub fn namespace(self, rig: &Rig) -> Result<&Namespace> {
        match self {
            Self::A => Ok(&rig.server),
            Self::B => rig.second_server.as_ref().context("the rig has no second server"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V4,
    V6,
}

impl Version {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    fn of(self, addresses: rig::Addresses) -> IpAddr {
        addresses.both()[self as usize]
    }

    fn any(self) -> IpAddr {
        [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()][self as usize]
    }
}

/// The rules that the load goes through, as a configuration has them. `to` says where each leads.
pub fn rules(to: impl Fn(Kind) -> Vec<Backend>) -> String {
    let mut text = String::new();
    for kind in Kind::ALL {
        for version in Version::BOTH {
            let backends = to(kind).into_iter().map(|backend| {
                format!("\"{}\"", SocketAddr::new(backend.address(version), kind.port()))
            });
            let backends = backends.collect::<Vec<_>>().join(", ");
            // Two rules on one port cannot both listen on every address.
            let listen = match version {
                Version::V4 => kind.listen().to_string(),
                Version::V6 => SocketAddr::new(rig::WAN.v6.into(), kind.listen()).to_string(),
            };
            text += &format!(
                "[[rule]]\nname = \"{}\"\nprotocol = \"{}\"\nlisten = \"{listen}\"\nto = [{backends}]\n",
                kind.rule(version),
                if kind.is_tcp() { "tcp" } else { "udp" },
            );
            if kind.masquerades() {
                text += "source = \"masquerade\"\n";
            }
        }
    }
    text
}

/// How much there is of it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Messages of all streams. UDP has nine of ten.
    pub per_second: u32,
    /// Clients' ports of a UDP rule that keeps flows, of each IP version.
    pub ports: usize,
}

impl Default for Options {
    /// `PORTFWD_TEST_LOAD` is for machines that cannot do 2,000 messages a second.
    fn default() -> Self {
        let given = std::env::var("PORTFWD_TEST_LOAD").ok().and_then(|it| it.parse().ok());
        Self { per_second: given.unwrap_or(2000), ports: 4 }
    }
}

/// What a message is: its flow, its number there, and whether it is on its way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    flow: usize,
    number: u64,
    answer: bool,
}

impl Message {
    fn bytes(self, run: u64) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(&run.to_be_bytes());
        bytes[8..16].copy_from_slice(&(self.flow as u64).to_be_bytes());
        bytes[16..24].copy_from_slice(&self.number.to_be_bytes());
        bytes[24] = self.answer.into();
        bytes
    }

    /// `None` if it is not of this run and of one of its flows.
    fn read(bytes: &[u8], run: u64, flows: usize) -> Option<Self> {
        let word = |at: usize| Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let flow = word(8)? as usize;
        (bytes.len() == SIZE && word(0)? == run && flow < flows).then_some(())?;
        Some(Self { flow, number: word(16)?, answer: bytes[24] == 1 })
    }
}

/// A socket or connection of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub kind: Kind,
    pub version: Version,
    pub client: SocketAddr,
}

/// Something that happened to a message.
#[derive(Clone, Copy, Debug)]
struct Event {
    flow: usize,
    number: u64,
    when: Instant,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Sent,
    /// At a backend, at the port of a sort of stream.
    Arrived(Backend, Kind),
    /// Back at the client; whether at the right socket and from the right address.
    Answered(bool),
}

/// From a time on, these backends are right for a sort of stream.
#[derive(Clone, Debug)]
struct Allowed {
    from: Instant,
    kind: Kind,
    backends: Vec<Backend>,
}

#[derive(Debug)]
struct Shared {
    run: u64,
    no_more: AtomicBool,
    stop: AtomicBool,
    progress: Vec<Progress>,
    /// What ended a connection, and messages that are none of ours.
    faults: Mutex<BTreeMap<usize, String>>,
    strange: AtomicU64,
}

/// How far a flow is.
#[derive(Debug, Default)]
struct Progress {
    sent: AtomicU64,
    /// One more than the highest number that came back.
    reached: AtomicU64,
    answers: AtomicU64,
    broken: AtomicBool,
}

impl Shared {
    fn broken(&self, flow: usize, why: impl std::fmt::Display) {
        self.progress[flow].broken.store(true, Ordering::Relaxed);
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.entry(flow).or_insert_with(|| why.to_string());
    }

    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn sending(&self) -> bool {
        !self.no_more.load(Ordering::Relaxed)
    }

    fn sent(&self, flow: usize) {
        self.progress[flow].sent.fetch_add(1, Ordering::Relaxed);
    }

    fn answered(&self, message: Message) {
        let progress = &self.progress[message.flow];
        progress.reached.fetch_max(message.number + 1, Ordering::Relaxed);
        progress.answers.fetch_add(1, Ordering::Relaxed);
    }

    fn message(&self, bytes: &[u8]) -> Option<Message> {
        let message = Message::read(bytes, self.run, self.progress.len());
        if message.is_none() {
            self.strange.fetch_add(1, Ordering::Relaxed);
        }
        message
    }
}

type Worker = JoinHandle<Result<Vec<Event>>>;

/// A load that is running. It ends when dropped.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    flows: Vec<Flow>,
    allowed: Vec<Allowed>,
    senders: Vec<Worker>,
    receivers: Vec<Worker>,
}

impl Load {
    /// Starts it in a rig with a second server, whose portfwd has the [`rules`].
    pub fn start(rig: &Rig, options: Options) -> Result<Self> {
        let (mut flows, mut sockets) = (Vec::new(), Vec::new());
        for kind in Kind::ALL {
            for version in Version::BOTH {
                let many = kind.is_stateful() && !kind.is_tcp();
                for _ in 0..if many { options.ports } else { 1 } {
                    let mut client = SocketAddr::new(version.of(rig::CLIENT), 0);
                    if !kind.is_tcp() {
                        let any = SocketAddr::new(version.any(), 0);
                        let socket = udp_socket(&rig.client, any)?;
                        client.set_port(socket.local_addr()?.port());
                        sockets.push((flows.len(), socket));
                    }
                    flows.push(Flow { kind, version, client });
                }
            }
        }
        let shared = Arc::new(Shared {
            run: random::now(),
            no_more: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            progress: flows.iter().map(|_| Progress::default()).collect(),
            faults: Mutex::default(),
            strange: AtomicU64::new(0),
        });
        let begin = Instant::now();
        let allowed =
            Kind::ALL.map(|kind| Allowed { from: begin, kind, backends: kind.backends().to_vec() });
        let mut load = Self {
            shared,
            flows,
            allowed: allowed.to_vec(),
            senders: Vec::new(),
            receivers: Vec::new(),
        };
        for backend in Backend::BOTH {
            load.serve_udp(backend, backend.namespace(rig)?)?;
        }
        load.ask_udp(sockets, options)?;
        for flow in 0..load.flows.len() {
            if load.flows[flow].kind.is_tcp() {
                load.connect(rig, flow, options)?;
            }
        }
        Ok(load)
    }

    fn serve_udp(&mut self, backend: Backend, namespace: &Namespace) -> Result<()> {
        let mut sockets = Vec::new();
        for kind in Kind::ALL.into_iter().filter(|kind| !kind.is_tcp()) {
            for version in Version::BOTH {
                let address = SocketAddr::new(backend.address(version), kind.port());
                sockets.push((kind, udp_socket(namespace, address)?));
            }
        }
        let shared = Arc::clone(&self.shared);
        self.receivers.push(thread::spawn(move || {
            let mut events = Vec::new();
            receive(&shared, &sockets, |kind, socket, bytes, peer| {
                let Some(message) = shared.message(bytes) else { return };
                let Message { flow, number, .. } = message;
                let what = What::Arrived(backend, *kind);
                events.push(Event { flow, number, when: Instant::now(), what });
                // One that does not get away is missed by the client.
                let answer = Message { answer: true, ..message }.bytes(shared.run);
                let _ = socket.send_to(&answer, peer);
            })?;
            Ok(events)
        }));
        Ok(())
    }

    /// The client's end of all flows of UDP: a thread that receives, and one for each sort that sends.
    fn ask_udp(&mut self, sockets: Vec<(usize, UdpSocket)>, options: Options) -> Result<()> {
        for kind in Kind::ALL.into_iter().filter(|kind| !kind.is_tcp()) {
            let mut mine = Vec::new();
            for (flow, socket) in &sockets {
                let Flow { kind: its, version, .. } = self.flows[*flow];
                if its == kind {
                    let to = SocketAddr::new(version.of(rig::WAN), kind.listen());
                    mine.push((*flow, socket.try_clone()?, to));
                }
            }
            let shared = Arc::clone(&self.shared);
            let pace = Duration::from_secs(1) / (options.per_second * 3 / 10).max(1);
            self.senders.push(thread::spawn(move || {
                let mut events = Vec::new();
                let mut numbers = 0..;
                at_pace(&shared, pace, || {
                    let number = numbers.next().unwrap_or(u64::MAX);
                    let (flow, socket, to) = &mine[number as usize % mine.len()];
                    let number = number / mine.len() as u64;
                    let message = Message { flow: *flow, number, answer: false };
                    let when = Instant::now();
                    events.push(Event { flow: *flow, number, when, what: What::Sent });
                    shared.sent(*flow);
                    // What the client itself refuses, without a route for example, is lost too.
                    let _ = socket.send_to(&message.bytes(shared.run), to);
                    Ok(true)
                })?;
                Ok(events)
            }));
        }
        let (shared, flows) = (Arc::clone(&self.shared), self.flows.clone());
        self.receivers.push(thread::spawn(move || {
            let mut events = Vec::new();
            receive(&shared, &sockets, |of, _, bytes, peer| {
                let Some(message) = shared.message(bytes) else { return };
                let Message { flow, number, answer } = message;
                let Flow { kind, version, .. } = flows[flow];
                let right = SocketAddr::new(version.of(rig::WAN), kind.listen());
                let what = What::Answered(*of == flow && answer && peer == right);
                events.push(Event { flow, number, when: Instant::now(), what });
                shared.answered(message);
            })?;
            Ok(events)
        }));
        Ok(())
    }

    /// A connection: it sends, it is answered, and it reads, in three threads.
    fn connect(&mut self, rig: &Rig, flow: usize, options: Options) -> Result<()> {
        let Flow { kind, version, .. } = self.flows[flow];
        let address = SocketAddr::new(Backend::A.address(version), kind.port());
        let listener = rig
            .server
            .enter(|| TcpListener::bind(address))
            .with_context(|| format!("cannot listen on {address}/tcp"))?;
        let to = SocketAddr::new(version.of(rig::WAN), kind.listen());
        let client = peers::connect(&rig.client, to)?;
        self.flows[flow].client = client.local_addr()?;
        sys::set_receive_timeout(listener.as_fd(), PATIENCE)?;
        let (server, _) = listener.accept().with_context(|| format!("nobody came to {address}"))?;
        for stream in [&client, &server] {
            make_room(stream.as_fd())?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(TICK))?;
            stream.set_write_timeout(Some(PATIENCE))?;
        }

        let shared = Arc::clone(&self.shared);
        self.receivers.push(thread::spawn(move || {
            let mut events = Vec::new();
            let what = What::Arrived(Backend::A, kind);
            read_all(&shared, flow, &server, "the server", |message| {
                events.push(Event { flow, number: message.number, when: Instant::now(), what });
                (&server).write_all(&Message { answer: true, ..message }.bytes(shared.run))
            });
            Ok(events)
        }));
        let (shared, its) = (Arc::clone(&self.shared), client.try_clone()?);
        self.receivers.push(thread::spawn(move || {
            let mut events = Vec::new();
            read_all(&shared, flow, &its, "the client", |message| {
                let what = What::Answered(message.answer);
                events.push(Event { flow, number: message.number, when: Instant::now(), what });
                shared.answered(message);
                Ok(())
            });
            Ok(events)
        }));
        let shared = Arc::clone(&self.shared);
        let pace = Duration::from_secs(1) / (options.per_second / 40).max(1);
        self.senders.push(thread::spawn(move || {
            let mut events = Vec::new();
            let mut numbers = 0..;
            at_pace(&shared, pace, || {
                let number = numbers.next().unwrap_or(u64::MAX);
                let when = Instant::now();
                events.push(Event { flow, number, when, what: What::Sent });
                shared.sent(flow);
                let bytes = Message { flow, number, answer: false }.bytes(shared.run);
                if let Err(error) = (&client).write_all(&bytes) {
                    shared.broken(flow, format_args!("the client cannot send: {error}"));
                }
                Ok(!shared.progress[flow].broken.load(Ordering::Relaxed))
            })?;
            Ok(events)
        }));
        Ok(())
    }

    pub fn flows(&self) -> &[Flow] {
        &self.flows
    }

    /// From now on, only these backends are right for a sort of stream. A message may go by what was right when
    /// it was sent, and by what has become right before it arrived.
    pub fn allow(&mut self, kind: Kind, backends: &[Backend]) {
        self.allowed.push(Allowed { from: Instant::now(), kind, backends: backends.to_vec() });
    }

    /// Waits until every flow has an answer to a message that was sent after this call, but for connections that
    /// are broken.
    pub fn settle(&self, patience: Duration) -> Result<Instant> {
        let begin = Instant::now();
        let sent = |progress: &Progress| progress.sent.load(Ordering::Relaxed);
        let before: Vec<u64> = self.shared.progress.iter().map(sent).collect();
        loop {
            let flows = self.flows.iter().zip(&self.shared.progress).zip(&before);
            let late = flows.filter(|((_, progress), before)| {
                !progress.broken.load(Ordering::Relaxed)
                    && progress.reached.load(Ordering::Relaxed) <= **before
            });
            let late: Vec<_> = late.map(|((flow, _), _)| flow).collect();
            if late.is_empty() {
                return Ok(Instant::now());
            }
            ensure!(begin.elapsed() < patience, "no answers after {patience:?}: {late:?}");
            thread::sleep(TICK / 4);
        }
    }

    /// Stops sending, waits for what is in flight, and gives what there was. An error if a socket of the load
    /// itself has lost something: then nothing can be concluded from the rest.
    pub fn stop(mut self) -> Result<Record> {
        let mut events = Vec::new();
        self.shared.no_more.store(true, Ordering::Relaxed);
        for sender in self.senders.drain(..) {
            events.extend(joined(sender)?);
        }
        self.wait_for_answers();
        self.shared.stop.store(true, Ordering::Relaxed);
        for receiver in self.receivers.drain(..) {
            events.extend(joined(receiver)?);
        }
        let strange = self.shared.strange.load(Ordering::Relaxed);
        ensure!(strange == 0, "{strange} messages that nobody of this load has sent");
        let faults = self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Record::new(std::mem::take(&mut self.flows), &events, self.allowed.clone(), faults))
    }

    fn wait_for_answers(&self) {
        let begin = Instant::now();
        let (mut answers, mut last) = (0, begin);
        while begin.elapsed() < PATIENCE {
            let missing = |tcp: bool| {
                self.flows.iter().zip(&self.shared.progress).any(|(flow, progress)| {
                    flow.kind.is_tcp() == tcp
                        && !progress.broken.load(Ordering::Relaxed)
                        && progress.answers.load(Ordering::Relaxed)
                            < progress.sent.load(Ordering::Relaxed)
                })
            };
            let now =
                self.shared.progress.iter().map(|it| it.answers.load(Ordering::Relaxed)).sum();
            if now != answers {
                (answers, last) = (now, Instant::now());
            }
            if !missing(true) && (!missing(false) || last.elapsed() > SILENCE) {
                break;
            }
            thread::sleep(TICK / 4);
        }
        // What comes twice comes soon.
        thread::sleep(SILENCE / 5);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.no_more.store(true, Ordering::Relaxed);
        self.shared.stop.store(true, Ordering::Relaxed);
        for worker in self.senders.drain(..).chain(self.receivers.drain(..)) {
            let _ = worker.join();
        }
    }
}

fn joined(worker: Worker) -> Result<Vec<Event>> {
    worker.join().unwrap_or_else(|_| bail!("a thread of the load panicked"))
}

fn udp_socket(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket> {
    let socket = namespace
        .enter(|| UdpSocket::bind(address))
        .with_context(|| format!("cannot bind {address}/udp"))?;
    socket.set_nonblocking(true)?;
    make_room(socket.as_fd())?;
    Ok(socket)
}

fn make_room(socket: BorrowedFd<'_>) -> Result<()> {
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        sys::set_option(socket, libc::SOL_SOCKET, option, &ROOM)?;
    }
    Ok(())
}

/// Calls this at a steady rate until it says no, or nothing more is to be sent. Who is late does not catch up: that
/// would be a burst.
fn at_pace(shared: &Shared, pace: Duration, mut send: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut due = Instant::now();
    while shared.sending() && send()? {
        due = (due + pace).max(Instant::now() - pace);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// Takes in datagrams until the load is to stop; fails if a socket had no room for one.
fn receive<T>(
    shared: &Shared,
    sockets: &[(T, UdpSocket)],
    mut take: impl FnMut(&T, &UdpSocket, &[u8], SocketAddr),
) -> Result<()> {
    let descriptors: Vec<_> = sockets.iter().map(|(_, socket)| socket.as_fd()).collect();
    let mut buffer = [0; 2 * SIZE];
    while shared.running() {
        for ready in sys::wait_readable(&descriptors, TICK)? {
            let (of, socket) = &sockets[ready];
            loop {
                match socket.recv_from(&mut buffer) {
                    Ok((length, peer)) => take(of, socket, &buffer[..length], peer),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // ICMP about an earlier one.
                    Err(_) => {}
                }
            }
        }
    }
    for (_, socket) in sockets {
        let dropped = sys::dropped(socket.as_fd())?;
        ensure!(dropped == 0, "{dropped} datagrams had no room at {:?}", socket.local_addr());
    }
    Ok(())
}

/// Takes in the messages of a connection, which must have the next number each, until the load is to stop or the
/// connection breaks.
fn read_all(
    shared: &Shared,
    flow: usize,
    mut stream: &TcpStream,
    who: &str,
    mut take: impl FnMut(Message) -> std::io::Result<()>,
) {
    let (mut buffer, mut filled, mut next) = ([0; SIZE], 0, 0);
    while shared.running() {
        let done = match stream.read(&mut buffer[filled..]) {
            Ok(0) => Err(Error::from(ErrorKind::UnexpectedEof)),
            Ok(length) => {
                filled += length;
                Ok(())
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            },
        };
        let done = done.and_then(|()| {
            if filled < SIZE {
                return Ok(());
            }
            filled = 0;
            match shared.message(&buffer) {
                Some(message) if message.flow == flow && message.number == next => {
                    next += 1;
                    take(message)
                }
                other => Err(Error::other(format!("{other:?} came instead of number {next}"))),
            }
        });
        if let Err(error) = done {
            // The other end may have stopped first.
            if shared.running() {
                shared.broken(flow, format_args!("{who}: {error}"));
            }
            return;
        }
    }
}

/// All that happened, by flow and number.
#[derive(Debug)]
pub struct Record {
    flows: Vec<(Flow, History)>,
    allowed: Vec<Allowed>,
}

#[derive(Debug, Default)]
struct History {
    sent: Vec<Instant>,
    /// By number.
    arrived: Vec<Vec<(Instant, Backend, Kind)>>,
    answered: Vec<Vec<(Instant, bool)>>,
    broken: Option<String>,
}

impl Record {
    fn new(
        flows: Vec<Flow>,
        events: &[Event],
        allowed: Vec<Allowed>,
        mut faults: BTreeMap<usize, String>,
    ) -> Self {
        let histories = flows.into_iter().enumerate().map(|(index, flow)| {
            (flow, History { broken: faults.remove(&index), ..History::default() })
        });
        let mut flows: Vec<(Flow, History)> = histories.collect();
        for event in events.iter().filter(|event| event.what == What::Sent) {
            let history = &mut flows[event.flow].1;
            history.sent.push(event.when);
            history.arrived.push(Vec::new());
            history.answered.push(Vec::new());
        }
        for Event { flow, number, when, what } in events {
            let (history, number) = (&mut flows[*flow].1, *number as usize);
            match what {
                What::Sent => {}
                What::Arrived(backend, port) => {
                    history.arrived[number].push((*when, *backend, *port));
                }
                What::Answered(right) => history.answered[number].push((*when, *right)),
            }
        }
        Self { flows, allowed }
    }

    pub fn tally(&self) -> Tally {
        self.tally_of(|_| true)
    }

    /// Of the messages that were sent from this time on.
    pub fn since(&self, from: Instant) -> Tally {
        self.tally_of(|sent| sent >= from)
    }

    /// Of the messages that were sent from this time on, but not from that time on.
    pub fn between(&self, from: Instant, to: Instant) -> Tally {
        self.tally_of(|sent| sent >= from && sent < to)
    }

    /// Of the messages that were sent at times of which this says yes.
    pub fn tally_of(&self, counts: impl Fn(Instant) -> bool) -> Tally {
        let mut tally = Tally::default();
        // By sort and IP version, when answers came.
        let mut answers = BTreeMap::<_, Vec<Instant>>::new();
        for (flow, history) in &self.flows {
            let sum = &mut tally.0[flow.kind as usize];
            let times = answers.entry((flow.kind, flow.version)).or_default();
            if let Some(why) = &history.broken {
                sum.broken.push(format!("{}: {why}", flow.kind.rule(flow.version)));
            }
            let (mut home, mut last_arrival, mut last_answer) = (None, None, None);
            let messages = history.sent.iter().zip(&history.arrived).zip(&history.answered);
            for ((sent, arrived), answered) in messages {
                let first_arrival = arrived.iter().map(|(when, ..)| *when).min();
                let first_answer = answered.iter().map(|(when, _)| *when).min();
                let late = |last: &mut Option<Instant>, first: Option<Instant>| {
                    let late = first < *last && first.is_some();
                    *last = first.max(*last);
                    u64::from(late)
                };
                let reordered =
                    late(&mut last_arrival, first_arrival) + late(&mut last_answer, first_answer);
                let elsewhere = arrived.iter().filter(|(when, backend, port)| {
                    !self.is_right(flow.kind, &mut home, *sent, *when, *backend, *port)
                });
                let elsewhere = elsewhere.count() as u64;
                let from_elsewhere = answered.iter().filter(|(_, right)| !right).count() as u64;
                if !counts(*sent) {
                    continue;
                }
                sum.sent += 1;
                sum.arrived += u64::from(!arrived.is_empty());
                sum.answered += u64::from(!answered.is_empty());
                sum.lost_forward += u64::from(arrived.is_empty());
                sum.lost_reply += u64::from(!arrived.is_empty() && answered.is_empty());
                sum.duplicated += arrived.len().saturating_sub(1) as u64;
                sum.duplicated += answered.len().saturating_sub(1) as u64;
                sum.misdirected_forward += elsewhere;
                sum.misdirected_reply += from_elsewhere;
                sum.reordered += reordered;
                times.extend(first_answer);
            }
        }
        for ((kind, _), mut times) in answers {
            times.sort_unstable();
            let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
            let gap = &mut tally.0[kind as usize].gap;
            *gap = gaps.max().unwrap_or_default().max(*gap);
        }
        tally
    }

    /// Whether a message may have arrived there. `home` is where the flow's last one did: a flow keeps its backend
    /// for as long as the rule has it.
    fn is_right(
        &self,
        kind: Kind,
        home: &mut Option<Backend>,
        sent: Instant,
        when: Instant,
        backend: Backend,
        port: Kind,
    ) -> bool {
        let changes: Vec<_> = self.allowed.iter().filter(|it| it.kind == kind).collect();
        let at_sending = changes.iter().rposition(|it| it.from <= sent).unwrap_or(0);
        let mut valid =
            changes.iter().enumerate().filter(|(i, it)| *i == at_sending || it.from > sent);
        let allowed = valid.any(|(_, it)| it.from <= when && it.backends.contains(&backend));
        let stays = kind != Kind::Spread
            || home.is_none_or(|home| {
                home == backend || !changes[at_sending].backends.contains(&home)
            });
        let right = port == kind && allowed && stays;
        if right {
            *home = Some(backend);
        }
        right
    }

    /// Each flow with how many messages it sent, how many arrived, and how many came back.
    pub fn flows(&self) -> impl Iterator<Item = (&Flow, [u64; 3])> {
        let some = |lists: usize| lists as u64;
        self.flows.iter().map(move |(flow, history)| {
            let arrived = history.arrived.iter().filter(|it| !it.is_empty()).count();
            let answered = history.answered.iter().filter(|it| !it.is_empty()).count();
            (flow, [some(history.sent.len()), some(arrived), some(answered)])
        })
    }
}

/// What became of the messages of one sort of stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub sent: u64,
    pub arrived: u64,
    pub answered: u64,
    /// On the way to a backend.
    pub lost_forward: u64,
    /// On the way back.
    pub lost_reply: u64,
    /// Both ways.
    pub duplicated: u64,
    /// Both ways: those that a later one has overtaken.
    pub reordered: u64,
    /// At a backend or port that is not right.
    pub misdirected_forward: u64,
    /// Back from an address or at a socket that is not right.
    pub misdirected_reply: u64,
    /// The longest time without an answer.
    pub gap: Duration,
    /// Connections that broke, and how.
    pub broken: Vec<String>,
}

impl Sum {
    pub fn lost(&self) -> u64 {
        self.lost_forward + self.lost_reply
    }

    pub fn misdirected(&self) -> u64 {
        self.misdirected_forward + self.misdirected_reply
    }

    /// Nothing is missing, too much or elsewhere, and no connection is broken.
    pub fn is_flawless(&self) -> bool {
        self.lost() + self.duplicated + self.misdirected() == 0 && self.broken.is_empty()
    }

    fn add(&mut self, other: &Self) {
        self.sent += other.sent;
        self.arrived += other.arrived;
        self.answered += other.answered;
        self.lost_forward += other.lost_forward;
        self.lost_reply += other.lost_reply;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
        self.misdirected_forward += other.misdirected_forward;
        self.misdirected_reply += other.misdirected_reply;
        self.gap = self.gap.max(other.gap);
        self.broken.extend(other.broken.iter().cloned());
    }
}

/// The sums by sort of stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally([Sum; Kind::ALL.len()]);

impl Tally {
    pub fn of(&self, kind: Kind) -> &Sum {
        &self.0[kind as usize]
    }

    pub fn total(&self) -> Sum {
        let mut total = Sum::default();
        self.0.iter().for_each(|sum| total.add(sum));
        total
    }

    /// Everything was sent, arrived once, where it should, and came back once, and no connection broke.
    pub fn ensure_flawless(&self) -> Result<()> {
        for (kind, sum) in Kind::ALL.iter().zip(&self.0) {
            ensure!(sum.sent > 0, "{}: nothing was sent", kind.name());
            ensure!(sum.is_flawless(), "{}: {sum:?}", kind.name());
        }
        Ok(())
    }
}

/// The lines above the [`line()`]s of a table.
pub fn heading() -> String {
    let mut text = format!("{:50} {:>8}", "lost/duplicated/misdirected", "messages");
    for kind in Kind::ALL {
        text += &format!(" {:>14}", kind.name());
    }
    text + "  longest gap"
}

/// What a fault did to the load.
pub fn line(fault: &str, tally: &Tally) -> String {
    let total = tally.total();
    let mut text = format!("{fault:50} {:>8}", total.sent);
    for kind in Kind::ALL {
        let sum = tally.of(kind);
        let broken = if sum.broken.is_empty() { "" } else { " broken" };
        let figures = format!("{}/{}/{}{broken}", sum.lost(), sum.duplicated, sum.misdirected());
        text += &format!(" {figures:>14}");
    }
    text + &format!("  {:>8} ms", total.gap.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind::Spread;

    struct Story {
        begin: Instant,
        events: Vec<Event>,
        allowed: Vec<Allowed>,
    }

    impl Story {
        fn new() -> Self {
            let begin = Instant::now();
            let backends = KIND.backends().to_vec();
            let allowed = vec![Allowed { from: begin, kind: KIND, backends }];
            Self { begin, events: Vec::new(), allowed }
        }

        fn at(&self, time: u64) -> Instant {
            self.begin + Duration::from_millis(time)
        }

        fn event(&mut self, time: u64, number: u64, what: What) {
            let when = self.at(time);
            self.events.push(Event { flow: 0, number, when, what });
        }

        /// A message that goes there and back.
        fn whole(&mut self, time: u64, number: u64, backend: Backend) {
            self.event(time, number, What::Sent);
            self.event(time + 1, number, What::Arrived(backend, KIND));
            self.event(time + 2, number, What::Answered(true));
        }

        fn record(self) -> Record {
            let client = SocketAddr::new(rig::CLIENT.v4.into(), 40_000);
            let flow = Flow { kind: KIND, version: Version::V4, client };
            Record::new(vec![flow], &self.events, self.allowed, BTreeMap::new())
        }

        fn sum(self) -> Sum {
            self.record().tally().of(KIND).clone()
        }
    }

    #[test]
    fn what_comes_and_goes_is_flawless() {
        let mut story = Story::new();
        story.whole(10, 0, Backend::A);
        story.whole(20, 1, Backend::A);
        let sum = story.sum();
        let gap = Duration::from_millis(10);
        assert_eq!(sum, Sum { sent: 2, arrived: 2, answered: 2, gap, ..Sum::default() });
    }

    #[test]
    fn each_way_loses_for_itself() {
        let mut story = Story::new();
        story.event(10, 0, What::Sent);
        story.event(20, 1, What::Sent);
        story.event(21, 1, What::Arrived(Backend::A, KIND));
        story.whole(30, 2, Backend::A);
        let begin = story.at(15);
        let record = story.record();
        let tally = record.tally();
        let sum = tally.of(KIND);
        assert_eq!((sum.sent, sum.lost_forward, sum.lost_reply), (3, 1, 1));
        assert!(tally.ensure_flawless().is_err());
        let later = record.since(begin);
        assert_eq!((later.of(KIND).lost_forward, later.of(KIND).lost_reply), (0, 1));
    }

    #[test]
    fn what_comes_twice_or_late_shows() {
        let mut story = Story::new();
        story.whole(10, 0, Backend::A);
        story.event(13, 0, What::Arrived(Backend::A, KIND));
        story.event(14, 0, What::Answered(true));
        story.event(20, 1, What::Sent);
        story.whole(21, 2, Backend::A);
        story.event(24, 1, What::Arrived(Backend::A, KIND));
        story.event(25, 1, What::Answered(true));
        // Number 2 came after number 1 was sent and before it arrived.
        let sum = story.sum();
        assert_eq!((sum.duplicated, sum.reordered, sum.lost()), (2, 2, 0));
    }

    #[test]
    fn a_flow_has_one_backend() {
        let mut story = Story::new();
        story.whole(10, 0, Backend::A);
        story.whole(20, 1, Backend::B);
        story.whole(30, 2, Backend::A);
        story.event(40, 3, What::Sent);
        story.event(41, 3, What::Arrived(Backend::A, Kind::Masquerade));
        story.event(42, 3, What::Answered(false));
        let sum = story.sum();
        assert_eq!((sum.misdirected_forward, sum.misdirected_reply), (2, 1));
    }

    #[test]
    fn a_change_is_right_for_what_is_in_flight() {
        let mut story = Story::new();
        for (time, backends) in [(15, KIND.backends()), (25, &[Backend::B])] {
            let from = story.at(time);
            story.allowed.push(Allowed { from, kind: KIND, backends: backends.to_vec() });
        }
        story.whole(10, 0, Backend::A);
        // Sent when A was right too, arrived when it no longer was.
        story.whole(24, 1, Backend::A);
        story.whole(26, 2, Backend::B);
        story.whole(30, 3, Backend::A);
        assert_eq!(story.sum().misdirected(), 1);
    }

    #[test]
    fn messages_are_read_as_they_were_written() {
        let message = Message { flow: 7, number: 1 << 40, answer: true };
        let bytes = message.bytes(9);
        assert_eq!(Message::read(&bytes, 9, 8), Some(message));
        assert_eq!(Message::read(&bytes, 8, 8), None);
        assert_eq!(Message::read(&bytes, 9, 7), None);
        assert_eq!(Message::read(&bytes[..63], 9, 8), None);
    }
}
