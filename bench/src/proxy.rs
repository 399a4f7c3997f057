//! The proxies in user space that portfwd is compared with: started in a namespace, each on one CPU of
//! its own, set up as their manuals say for a plain port forwarding.

use std::fs::{self, File};
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use portfwd_tests::peers::Background;
use portfwd_tests::{Namespace, TempDir};

/// Bytes that a UDP socket may hold. A burst of small packets takes a page each, and the kernel's
/// default, 208 KiB, is too small for two of them. The kernel gives what net.core.rmem_max allows.
const BUFFER: u32 = 4 << 20;

/// How many sockets a proxy may have, two for each client; fewer where the machine allows fewer.
const SOCKETS: u64 = 400_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// What to forward: all that arrives at `listen` to `to`.
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    pub transport: Transport,
    pub listen: SocketAddrV4,
    pub to: SocketAddrV4,
}

impl Forward {
    /// As portfwd's `-p` has it.
    pub fn spec(&self) -> String {
        format!("{}:{}/{}", self.listen, self.to, self.transport.name())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// nginx with its stream module, one worker.
    Nginx,
    /// HAProxy, one thread. It has no UDP.
    Haproxy,
    /// socat, one process for each client.
    Socat,
    /// realm (github.com/zhboner/realm), one thread; `bin/realm.rs` makes a program of it.
    Realm,
}

impl Program {
    /// The file to execute, and the name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Socat => "socat",
            Self::Realm => "realm",
        }
    }

    pub fn speaks(self, transport: Transport) -> bool {
        self != Self::Haproxy || transport == Transport::Tcp
    }

    /// Why it cannot be started on this machine; `None` if it can.
    pub fn absent(self) -> Option<String> {
        if self.executable().is_none() {
            return Some(match self {
                Self::Realm => "the bench was built without it (--features realm)".into(),
                _ => format!("{} is not installed", self.name()),
            });
        }
        (self == Self::Nginx && nginx_modules().is_none())
            .then(|| "nginx has no stream module (libnginx-mod-stream)".into())
    }

    /// realm is built with the bench, and stands beside it.
    fn executable(self) -> Option<PathBuf> {
        match self {
            Self::Realm => {
                let beside = std::env::current_exe().ok()?.with_file_name(self.name());
                beside.is_file().then_some(beside)
            }
            _ => find(self.name()),
        }
    }

    /// The commands that do these forwardings; configuration goes to a directory.
    fn commands(self, forwards: &[Forward], directory: &Path) -> Result<Vec<Vec<String>>> {
        let file = directory.join(self.name());
        let path = file.display().to_string();
        let words = |line: &[&str]| line.iter().map(ToString::to_string).collect::<Vec<_>>();
        Ok(match self {
            Self::Nginx => {
                fs::write(&file, nginx(forwards, directory)?)?;
                let prefix = directory.display().to_string();
                let log = directory.join("nginx.log").display().to_string();
                vec![words(&["nginx", "-p", &prefix, "-e", &log, "-c", &path])]
            }
            Self::Haproxy => {
                fs::write(&file, haproxy(forwards))?;
                vec![words(&["haproxy", "-db", "-f", &path])]
            }
            Self::Realm => vec![realm(forwards)?],
            Self::Socat => forwards.iter().map(socat).collect(),
        })
    }
}

/// Running processes of a proxy. They end when dropped.
#[derive(Debug)]
pub struct Proxy {
    processes: Vec<Background>,
    _directory: TempDir,
}

impl Proxy {
    /// Starts a proxy on one CPU and waits until it listens. An error has what the proxy printed.
    pub fn start(
        program: Program,
        namespace: &Namespace,
        forwards: &[Forward],
        cpu: usize,
    ) -> Result<Self> {
        let name = program.name();
        for forward in forwards {
            let transport = forward.transport;
            ensure!(program.speaks(transport), "{name} does not forward {transport:?}");
        }
        let directory = TempDir::new()?;
        let output = directory.path().join("output");
        let file = File::create(&output)?;
        let mut processes = Vec::new();
        for words in program.commands(forwards, directory.path())? {
            let mut command = namespace.command("taskset");
            command.args(["-c", &cpu.to_string()]).args(words);
            let command = command.stdout(file.try_clone()?).stderr(file.try_clone()?);
            processes.push(Background::start(command)?);
        }
        let mut proxy = Self { processes, _directory: directory };
        proxy.wait(namespace, forwards).with_context(|| {
            let output = fs::read_to_string(&output).unwrap_or_default();
            format!("{name} does not start: {}", output.trim().replace('\n', "; "))
        })?;
        Ok(proxy)
    }

    fn wait(&mut self, namespace: &Namespace, forwards: &[Forward]) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let are_bound = || {
            forwards.iter().try_fold(true, |all, forward| {
                Ok::<_, anyhow::Error>(all && is_bound(forward.transport, forward.listen)?)
            })
        };
        while !namespace.enter(are_bound)? {
            for process in &mut self.processes {
                if let Some(status) = process.exited()? {
                    bail!("it ended at once: {status}");
                }
            }
            ensure!(Instant::now() < deadline, "it does not listen after 10 s");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        for process in &self.processes {
            // socat's children too: each process was started as the head of a group.
            // SAFETY: a bare system call; the head has not been waited for, so the number is its.
            unsafe { libc::kill(-(process.id() as i32), libc::SIGKILL) };
        }
    }
}

/// Is a server's socket bound to an address, in the namespace of the calling thread?
pub fn is_bound(transport: Transport, address: SocketAddrV4) -> Result<bool> {
    let (table, state) = match transport {
        Transport::Tcp => ("tcp", "0A"), // LISTEN
        Transport::Udp => ("udp", "07"), // without a peer
    };
    let table = fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
    let ip = u32::from_ne_bytes(address.ip().octets());
    let local = format!("{ip:08X}:{:04X}", address.port());
    // Each line: number, local address, remote address, state, and more.
    Ok(table.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(&local) && words.nth(1) == Some(state)
    }))
}

/// [`SOCKETS`], or what a process may have at most.
fn sockets() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes to `limit`, and cannot fail with a valid pointer.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    SOCKETS.min(limit.rlim_max)
}

/// One worker in the foreground, without log. UDP clients are forgotten after 10 s of silence.
fn nginx(forwards: &[Forward], directory: &Path) -> Result<String> {
    let sockets = sockets();
    let module = nginx_modules().context("nginx has no stream module (libnginx-mod-stream)")?;
    let servers: String = forwards
        .iter()
        .map(|Forward { transport, listen, to }| {
            let options = match transport {
                Transport::Tcp => "backlog=4096",
                Transport::Udp => &format!("udp rcvbuf={BUFFER}"),
            };
            format!("    server {{ listen {listen} {options}; proxy_pass {to}; }}\n")
        })
        .collect();
    Ok(format!(
        "load_module {};\ndaemon off;\nmaster_process off;\nworker_processes 1;\n\
         worker_rlimit_nofile {sockets};\npid {};\nerror_log stderr emerg;\n\
         events {{ worker_connections {sockets}; }}\n\
         stream {{\n    proxy_timeout 10s;\n{servers}}}\n",
        module.display(),
        directory.join("nginx.pid").display(),
    ))
}

fn haproxy(forwards: &[Forward]) -> String {
    let mut text = format!(
        "global\n    nbthread 1\n    maxconn {}\n\
         defaults\n    mode tcp\n    backlog 4096\n    timeout connect 5s\n    \
         timeout client 1m\n    timeout server 1m\n",
        // It needs a few for itself.
        sockets() / 2 - 50
    );
    for (number, Forward { listen, to, .. }) in forwards.iter().enumerate() {
        text += &format!("listen forward{number}\n    bind {listen}\n    server backend {to}\n");
    }
    text
}

fn realm(forwards: &[Forward]) -> Result<Vec<String>> {
    let executable = Program::Realm.executable().context("the bench was built without realm")?;
    let mut words = vec![executable.display().to_string()];
    for Forward { transport, listen, to } in forwards {
        words.extend([transport.name().into(), listen.to_string(), to.to_string()]);
    }
    Ok(words)
}

/// A child for each client. Those of UDP never learn that their client has gone: 10 s of silence end
/// them.
fn socat(Forward { transport, listen, to }: &Forward) -> Vec<String> {
    let (ip, port) = (listen.ip(), listen.port());
    let line = match transport {
        Transport::Tcp => {
            format!("socat TCP4-LISTEN:{port},bind={ip},fork,reuseaddr,backlog=4096 TCP4:{to}")
        }
        Transport::Udp => {
            format!(
                "socat -T 10 UDP4-LISTEN:{port},bind={ip},fork,reuseaddr,rcvbuf={BUFFER} UDP4:{to}"
            )
        }
    };
    line.split(' ').map(String::from).collect()
}

/// The stream module, which Debian packs by itself.
fn nginx_modules() -> Option<PathBuf> {
    let places = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/local/nginx/modules"];
    places
        .iter()
        .map(|place| Path::new(place).join("ngx_stream_module.so"))
        .find(|path| path.exists())
}

/// The first file of this name on PATH.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| path.is_file())
}
