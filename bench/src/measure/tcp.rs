//! TCP: bulk throughput, CPU time for each gigabyte, and connections per second.
//!
//! Both ends and the path between them share one core, as with the other measures; a proxy has the
//! other core for its process. So throughput in bulk says how much work a byte is for all of them
//! together, and what the scheduler makes of two cores is not in it.
//!
//! The interfaces are as the kernel sets them up: segments of up to 64 KiB go through a router whole,
//! and their checksums are never computed. XDP sees single frames, of which it must know the
//! checksums; so for contenders that use it the ends have `ethtool -K eth0 tx off`, as portfwd's
//! README tells users of veth, and that takes segmentation along. This is what users get and what
//! native XDP on veth costs them. How the same contenders do where there is no such help, as with
//! traffic off a wire, is the case without offloads.
//!
//! A connection is: connect, a request of [`REQUEST`] bytes, an answer of [`ANSWER`] bytes, and the
//! server closes, so no client runs out of ports. [`THREADS`] clients do that at once.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use portfwd_tests::peers::Background;
use portfwd_tests::{Namespace, TempDir, netns};
use serde_json::Value;

use crate::Options;
use crate::contender::{Contender, Running};
use crate::measure::{Bench, Reading, busy};
use crate::proxy::{Transport, is_bound};
use crate::report::Unit;
use crate::rig::{PATH_CPU, Rig, Wire, pin};
use crate::rules::Rules;

pub const NAME: &str = "tcp";

const CONTENDERS: [Contender; 11] = [
    Contender::Limit,
    Contender::Native,
    Contender::Generic,
    Contender::Tc,
    Contender::Routing,
    Contender::NftMap,
    Contender::Iptables,
    Contender::Nginx,
    Contender::Haproxy,
    Contender::Socat,
    Contender::Realm,
];

/// Bytes of a request and of its answer.
const REQUEST: usize = 64;
const ANSWER: usize = 512;
/// Clients that connect at once, and as many threads that answer.
const THREADS: usize = 8;
/// How long an end waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);
/// /proc/stat counts hundredths of a second.
const TICK: f64 = 0.01;

/// One way to move many bytes.
struct Bulk {
    name: &'static str,
    streams: u32,
    /// From the server to the client.
    reverse: bool,
    wire: Wire,
}

const BULKS: [Bulk; 5] = [
    Bulk { name: "1 stream", streams: 1, reverse: false, wire: Wire::Offloads },
    Bulk { name: "1 stream, reverse", streams: 1, reverse: true, wire: Wire::Offloads },
    Bulk { name: "16 streams", streams: 16, reverse: false, wire: Wire::Offloads },
    Bulk { name: "16 streams, reverse", streams: 16, reverse: true, wire: Wire::Offloads },
    Bulk { name: "1 stream, without offloads", streams: 1, reverse: false, wire: Wire::Frames },
];

pub fn run(bench: &mut Bench) -> Result<()> {
    // iperf3 runs for whole seconds.
    let bulks = if bench.options.quick { &BULKS[..1] } else { &BULKS };
    for bulk in bulks {
        bench.case(NAME, bulk.name, &CONTENDERS, |options, contender| {
            let path = Path::new(options, contender, Transport::Tcp, bulk.wire)?;
            bulk.measure(&path, if options.quick { 1 } else { 2 })
        });
    }
    bench.case(NAME, "connections", &CONTENDERS, |options, contender| {
        let path = Path::new(options, contender, Transport::Tcp, Wire::Offloads)?;
        connections(&path, options.time())
    });
    Ok(())
}

/// A contender on a rig of its own, with a rule for TCP, or for UDP.
pub(super) struct Path {
    /// Before the rig: it ends first.
    _running: Running,
    pub rig: Rig,
    /// Where clients connect to.
    pub target: SocketAddrV4,
    /// Where the server is.
    pub backend: SocketAddrV4,
}

impl Path {
    pub fn new(
        options: &Options,
        contender: Contender,
        transport: Transport,
        wire: Wire,
    ) -> Result<Self> {
        let rules = Rules::Single(2);
        let rule = rules.iter().find(|rule| rule.transport == transport);
        let rule = rule.context("no rule for it")?;
        let rig = Rig::new(wire)?;
        // Ports for all the connections that a client, or a proxy, makes.
        for namespace in [&rig.client, &rig.router] {
            namespace.set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")?;
            namespace.set_sysctl("net.ipv4.tcp_tw_reuse", "1")?;
        }
        if matches!(contender, Contender::Limit | Contender::Native | Contender::Generic) {
            for end in [&rig.client, &rig.server] {
                netns::run(end.command("ethtool").args(["-K", "eth0", "tx", "off"]))?;
            }
        }
        let running = contender.start(options, &rig, rules)?;
        let target = contender.connects_to(&rule);
        Ok(Self { target, backend: rule.to, _running: running, rig })
    }
}

impl Bulk {
    /// Throughput, and busy time of all cores for each gigabyte that arrived.
    fn measure(&self, path: &Path, seconds: u64) -> Result<Vec<Reading>> {
        let directory = TempDir::new()?;
        let output = directory.path().join("output");
        let (target, backend) = (path.target, path.backend);
        let _server = {
            let mut command = iperf3(&path.rig.server);
            command.args(["-s", "-1", "-B", &backend.ip().to_string()]);
            command.args(["-p", &backend.port().to_string()]).stdout(File::create("/dev/null")?);
            Background::start(&mut command)?
        };
        let deadline = Instant::now() + PATIENCE;
        while !path.rig.server.enter(|| is_bound(Transport::Tcp, backend))? {
            ensure!(Instant::now() < deadline, "iperf3 does not listen");
            thread::sleep(Duration::from_millis(5));
        }

        let mut command = iperf3(&path.rig.client);
        command.args(["-c", &target.ip().to_string(), "-p", &target.port().to_string()]);
        command.args(["-J", "-t", &seconds.to_string(), "-P", &self.streams.to_string()]);
        command.args(["--connect-timeout", "2000"]).args(self.reverse.then_some("-R"));
        let before = busy().context("/proc/stat has no line for all cores")?;
        let mut client = Background::start(command.stdout(File::create(&output)?))?;
        client.wait(Duration::from_secs(seconds + 5)).context("iperf3 does not end")?;
        let ticks = busy().unwrap_or(before) - before;

        let said: Value = serde_json::from_str(&fs::read_to_string(&output)?)
            .context("iperf3 printed no JSON")?;
        if let Some(error) = said["error"].as_str() {
            bail!("iperf3: {error}");
        }
        let arrived = &said["end"]["sum_received"];
        let number = |name: &str| arrived[name].as_f64().filter(|number| *number > 0.0);
        let bytes = number("bytes").context("nothing arrived")?;
        let per_second = number("bits_per_second").context("nothing arrived")?;
        let name = self.name;
        Ok(vec![
            Reading { case: name.into(), value: per_second, unit: Unit::BitsPerSecond },
            Reading {
                case: format!("{name}, CPU time"),
                value: ticks as f64 * TICK / (bytes / 1e9),
                unit: Unit::SecondsPerGigabyte,
            },
        ])
    }
}

fn iperf3(namespace: &Namespace) -> Command {
    let mut command = namespace.command("iperf3");
    command.args(["-A", &PATH_CPU.to_string()]);
    command
}

/// Connections per second. One that fails is no small loss but a contender that does not work: it
/// refuses the figure.
fn connections(path: &Path, time: Duration) -> Result<Vec<Reading>> {
    const WARM_UP: Duration = Duration::from_millis(200);
    let _server = Threads::answering(&path.rig.server, path.backend)?;
    let clients = Threads::asking(&path.rig.client, path.target);
    thread::sleep(WARM_UP);
    let (start, before) = (Instant::now(), clients.done());
    thread::sleep(time);
    let (count, time) = (clients.done() - before, start.elapsed());
    clients.stop()?;
    ensure!(count > 0, "no connection came about");
    let value = count as f64 / time.as_secs_f64();
    Ok(vec![Reading { case: "connections".into(), value, unit: Unit::PerSecond }])
}

/// Threads of one end, on the core of the path. They end when dropped.
struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicU64,
}

impl Threads {
    /// Servers for connections to an address.
    fn answering(namespace: &Namespace, address: SocketAddrV4) -> Result<Self> {
        let listener = namespace
            .enter(|| TcpListener::bind(address))
            .with_context(|| format!("cannot listen on {address}/tcp"))?;
        // It holds for `accept`, and for the connections.
        let socket = TcpStream::from(OwnedFd::from(listener.try_clone()?));
        socket.set_read_timeout(Some(PATIENCE / 10))?;
        let listener = Arc::new(listener);
        Ok(Self::start(namespace, move || {
            let listener = Arc::clone(&listener);
            move || {
                // Too late, or the client has gone: it says so, or nobody waits any more.
                let Ok((mut stream, _)) = listener.accept() else { return Ok(()) };
                let mut request = [0; REQUEST];
                let _ =
                    stream.read_exact(&mut request).and_then(|()| stream.write_all(&[1; ANSWER]));
                Ok(())
            }
        }))
    }

    /// Clients of an address, each at one connection at a time.
    fn asking(namespace: &Namespace, address: SocketAddrV4) -> Self {
        Self::start(namespace, move || {
            move || {
                let mut stream = TcpStream::connect_timeout(&address.into(), PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.write_all(&[2; REQUEST])?;
                let mut answer = [0; ANSWER + 1];
                let mut length = 0;
                loop {
                    match stream.read(&mut answer[length..])? {
                        0 => break,
                        more => length += more,
                    }
                }
                ensure!(answer[..length] == [1; ANSWER], "an answer was not what the server sent");
                Ok(())
            }
        })
    }

    /// Each thread does its work again and again, until it is told to stop or an error comes.
    fn start<W>(namespace: &Namespace, work: impl Fn() -> W) -> Self
    where
        W: FnMut() -> Result<()> + Send + 'static,
    {
        let shared = Arc::<Shared>::default();
        let spawn = |mut work: W| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                pin(PATH_CPU)?;
                while !shared.stop.load(Ordering::Relaxed) {
                    work()?;
                    shared.done.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        };
        let works: Vec<W> = (0..THREADS).map(|_| work()).collect();
        // A thread is in the namespace of the one that spawned it.
        let threads = namespace.enter(|| works.into_iter().map(spawn).collect());
        Self { shared, threads }
    }

    /// How often the work was done so far.
    fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Ends the threads; gives the first error that one of them met.
    fn stop(mut self) -> Result<()> {
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        ended.into_iter().flatten().collect()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Who wants to know called `stop`.
        let _ = self.join();
    }
}
