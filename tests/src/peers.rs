//! Real servers and clients: sockets of the kernel in a namespace, and children.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::netns::Namespace;
use crate::sys;

/// How long threads sleep in a call before they look whether they should end.
const TICK: Duration = Duration::from_millis(50);
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a server answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// What it was sent.
    Echo,
    /// The client's address and port as it sees them, as text: once for each TCP connection, which
    /// it then closes, and for each datagram.
    Peer,
}

/// A TCP or UDP server in threads of its own. It ends when dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<BTreeSet<IpAddr>>,
}

impl Shared {
    fn saw(&self, peer: IpAddr) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(peer);
    }

    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

impl Server {
    /// Listens with TCP at an address of the namespace; port 0 takes any free one.
    pub fn tcp(namespace: &Namespace, address: SocketAddr, answer: Answer) -> Result<Self> {
        let listener = namespace
            .enter(|| TcpListener::bind(address))
            .with_context(|| format!("cannot listen on {address}/tcp"))?;
        sys::set_receive_timeout(listener.as_fd(), TICK)?;
        let address = listener.local_addr()?;
        Ok(Self::start(address, move |shared| {
            thread::scope(|scope| {
                while shared.running() {
                    match listener.accept() {
                        Ok((stream, peer)) => {
                            shared.saw(peer.ip());
                            scope.spawn(move || serve(stream, peer, answer, shared));
                        }
                        Err(error) if is_timeout(&error) => {}
                        // Out of descriptors, or the client has gone: the next may do better.
                        Err(_) => thread::sleep(TICK),
                    }
                }
            });
            sys::stop_listening(listener.as_fd());
        }))
    }

    /// Answers datagrams sent to an address of the namespace; port 0 takes any free one.
    pub fn udp(namespace: &Namespace, address: SocketAddr, answer: Answer) -> Result<Self> {
        let socket = namespace
            .enter(|| UdpSocket::bind(address))
            .with_context(|| format!("cannot bind {address}/udp"))?;
        socket.set_read_timeout(Some(TICK))?;
        let address = socket.local_addr()?;
        Ok(Self::start(address, move |shared| {
            let mut buffer = [0; 65_536];
            while shared.running() {
                // An error may be an ICMP message about an earlier answer: go on.
                let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
                shared.saw(peer.ip());
                let _ = match answer {
                    Answer::Echo => socket.send_to(&buffer[..length], peer),
                    Answer::Peer => socket.send_to(peer.to_string().as_bytes(), peer),
                };
            }
        }))
    }

    fn start(address: SocketAddr, work: impl FnOnce(&Shared) + Send + 'static) -> Self {
        let shared = Arc::<Shared>::default();
        let its = Arc::clone(&shared);
        Self { shared, address, thread: Some(thread::spawn(move || work(&its))) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The addresses of all clients so far, as the server sees them.
    pub fn seen(&self) -> BTreeSet<IpAddr> {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One TCP connection, until the client closes it. An error ends it, which the client sees.
fn serve(mut stream: TcpStream, peer: SocketAddr, answer: Answer, shared: &Shared) {
    if answer == Answer::Peer {
        let _ = stream.write_all(peer.to_string().as_bytes());
        return;
    }
    let mut buffer = [0; 16_384];
    if stream.set_read_timeout(Some(TICK)).is_err() {
        return;
    }
    while shared.running() {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if is_timeout(&error) => {}
            Err(_) => return,
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Asks a server that answers with `Answer::Peer` over TCP, which address it sees.
pub fn ask_tcp(namespace: &Namespace, server: SocketAddr) -> Result<SocketAddr> {
    let mut stream = connect(namespace, server)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    text.parse().with_context(|| format!("{server} answered {text:?}"))
}

/// Asks a server that answers with `Answer::Peer` over UDP, which address it sees.
pub fn ask_udp(namespace: &Namespace, server: SocketAddr) -> Result<SocketAddr> {
    let text = String::from_utf8(exchange(&udp_client(namespace, server)?, b"who am I?")?)?;
    text.parse().with_context(|| format!("{server} answered {text:?}"))
}

/// Sends a datagram and waits for the answer to it.
pub fn exchange(socket: &UdpSocket, datagram: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 65_536];
    socket.send(datagram)?;
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

/// A UDP socket of the namespace, connected to a server; `recv` gives up after 2 s.
pub fn udp_client(namespace: &Namespace, server: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = namespace.enter(|| UdpSocket::bind((any, 0)))?;
    namespace
        .enter(|| socket.connect(server))
        .with_context(|| format!("cannot reach {server}/udp from {}", namespace.name()))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// A TCP connection from the namespace to a server; connecting and reading give up after 2 s.
pub fn connect(namespace: &Namespace, server: SocketAddr) -> Result<TcpStream> {
    let stream = namespace
        .enter(|| TcpStream::connect_timeout(&server, PATIENCE))
        .with_context(|| format!("cannot connect to {server}/tcp from {}", namespace.name()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Waits until a server accepts TCP connections at an address.
pub fn wait_for_tcp(namespace: &Namespace, server: SocketAddr, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    namespace.enter(|| {
        loop {
            match TcpStream::connect_timeout(&server, TICK) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| {
                        format!("nothing listens on {server}/tcp in {}", namespace.name())
                    });
                }
                Err(_) => thread::sleep(TICK / 5),
            }
        }
    })
}

/// How often a client asks, and how often in all.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub per_second: u32,
    /// `None`: until it is stopped.
    pub limit: Option<u64>,
}

/// What a client did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchanges {
    pub asked: u64,
    /// Those that got the very bytes back.
    pub answered: u64,
}

/// A client that asks an echo server again and again at a steady rate, each time waiting for the
/// answer. It ends when dropped.
#[derive(Debug)]
pub struct Load {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Progress {
    stop: AtomicBool,
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Load {
    /// Datagrams of `size` bytes, all from one socket.
    pub fn udp(ns: &Namespace, server: SocketAddr, size: usize, pace: Pace) -> Result<Self> {
        let socket = udp_client(ns, server)?;
        // The answer to an earlier question that came too late is no answer to this one.
        Ok(Self::start(ns, pace, move |number| {
            let question = question(number, size);
            exchange(&socket, &question).is_ok_and(|answer| answer == question)
        }))
    }

    /// A TCP connection for each question of `size` bytes.
    pub fn tcp(ns: &Namespace, server: SocketAddr, size: usize, pace: Pace) -> Self {
        Self::start(ns, pace, move |number| {
            let ask = || -> std::io::Result<bool> {
                let question = question(number, size);
                let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.write_all(&question)?;
                stream.shutdown(Shutdown::Write)?;
                let mut answer = Vec::with_capacity(size);
                stream.read_to_end(&mut answer)?;
                Ok(answer == question)
            };
            ask().unwrap_or(false)
        })
    }

    fn start(
        namespace: &Namespace,
        pace: Pace,
        mut ask: impl FnMut(u64) -> bool + Send + 'static,
    ) -> Self {
        let progress = Arc::<Progress>::default();
        let its = Arc::clone(&progress);
        let interval = Duration::from_secs(1) / pace.per_second.max(1);
        let work = move || {
            let mut due = Instant::now();
            for number in 0..pace.limit.unwrap_or(u64::MAX) {
                if its.stop.load(Ordering::Relaxed) {
                    return;
                }
                its.asked.fetch_add(1, Ordering::Relaxed);
                its.answered.fetch_add(u64::from(ask(number)), Ordering::Relaxed);
                // Who is late does not catch up: that would be a burst.
                due = (due + interval).max(Instant::now() - interval);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        };
        // A thread is in the namespace of the one that spawned it.
        let thread = namespace.enter(|| thread::spawn(work));
        Self { progress, thread: Some(thread) }
    }

    /// What it has done so far.
    pub fn so_far(&self) -> Exchanges {
        // The answers first: there are never more of them than questions.
        let answered = self.progress.answered.load(Ordering::Relaxed);
        Exchanges { asked: self.progress.asked.load(Ordering::Relaxed), answered }
    }

    /// Waits until the limit of its pace is reached.
    pub fn finish(mut self) -> Exchanges {
        self.join();
        self.so_far()
    }

    /// Ends it after the question that it is at.
    pub fn stop(self) -> Exchanges {
        self.progress.stop.store(true, Ordering::Relaxed);
        self.finish()
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.progress.stop.store(true, Ordering::Relaxed);
        self.join();
    }
}

/// Bytes that no other question of this client has in the same place.
fn question(number: u64, size: usize) -> Vec<u8> {
    number.to_be_bytes().into_iter().cycle().take(size).collect()
}

/// A child that runs beside us: SIGTERM when dropped, SIGKILL if that does not help in 2 s.
#[derive(Debug)]
pub struct Background {
    child: Child,
}

impl Background {
    /// Starts a command. It gets no input, and no Ctrl-C of the terminal: its end is ours to choose.
    pub fn start(command: &mut Command) -> Result<Self> {
        command.stdin(std::process::Stdio::null()).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        Ok(Self { child })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The status, if it has ended.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "process {} still runs after {timeout:?}",
                self.child.id()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends it a signal, `libc::SIGHUP` for example.
    pub fn signal(&mut self, signal: i32) -> Result<()> {
        // One that has been waited for may have lent its number to another process.
        if self.exited()?.is_some() {
            return Err(anyhow!("process {} has ended", self.child.id()));
        }
        // SAFETY: a bare system call on a child that we have not waited for.
        sys::check(unsafe { libc::kill(self.child.id() as i32, signal) })?;
        Ok(())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.signal(libc::SIGTERM).is_ok() && self.wait(PATIENCE).is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
