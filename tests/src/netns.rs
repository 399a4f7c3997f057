//! Network namespaces that end with the value that made them.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::sys;

/// Names are `pfwd-PID-NUMBER-ROLE`: unique in the machine, and whose they are can be read off.
const PREFIX: &str = "pfwd-";
/// Where iproute2 keeps named namespaces.
const DIRECTORY: &str = "/run/netns";

/// A network namespace. Dropped, it goes with all that is in it: interfaces, rules, and processes
/// that were started in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: Arc<File>,
}

impl Namespace {
    /// Makes a namespace with `lo` up. `role` becomes the end of its name.
    pub fn new(role: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{role}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let path = Path::new(DIRECTORY).join(&name);
        let handle = match File::open(&path) {
            Ok(file) => Arc::new(file),
            Err(error) => {
                delete(&name);
                return Err(error).with_context(|| format!("cannot open {}", path.display()));
            }
        };
        let namespace = Self { name, handle };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name under which `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a closure in a thread that is in this namespace. Sockets that it makes stay in the
    /// namespace wherever they are used later; a thread that it spawns is in it too.
    ///
    /// # Panics
    ///
    /// If the closure panics, or the kernel refuses the namespace to a process that made it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            if let Err(error) = sys::enter_network(self.handle.as_fd()) {
                panic!("cannot enter namespace {}: {error}", self.name);
            }
            work()
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A command that will run in this namespace. Only its network differs: /sys and all other
    /// mounts are as they are here.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let handle = Arc::clone(&self.handle);
        let mut command = Command::new(program);
        // SAFETY: setns is a bare system call, which is all that may happen between fork and exec.
        unsafe { command.pre_exec(move || sys::enter_network(handle.as_fd())) };
        command
    }

    /// `ip ARGUMENTS` in this namespace; the arguments are split at spaces. Returns what it printed.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        run(self.command("ip").args(arguments.split_whitespace()))
            .with_context(|| format!("in namespace {}", self.name))
    }

    /// `ip` with a command on each line.
    pub fn ip_batch(&self, lines: &[String]) -> Result<()> {
        feed(self.command("ip").args(["-batch", "-"]), &lines.join("\n"))
            .with_context(|| format!("in namespace {}", self.name))
    }

    /// Sets a key below net, such as `net.ipv4.ip_forward`.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.enter(|| fs::write(&path, value))
            .with_context(|| format!("cannot write {value} to {} in {}", path.display(), self.name))
    }

    /// One number of an interface's statistics, by its name in `ip -s -j link`: `tx.dropped`.
    pub fn link_statistic(&self, interface: &str, name: &str) -> Result<u64> {
        let links: serde_json::Value =
            serde_json::from_str(&self.ip(&format!("-s -j link show dev {interface}"))?)?;
        let pointer = format!("/0/stats64/{}", name.replace('.', "/"));
        links
            .pointer(&pointer)
            .and_then(serde_json::Value::as_u64)
            .with_context(|| format!("{interface} has no statistic {name}"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

/// Removes the namespaces that runs left behind which were killed: those whose name says that a
/// process made them which is no more. Returns their names.
pub fn clean_stale() -> Result<Vec<String>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(DIRECTORY),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let stale: Vec<String> = names.filter(|name| is_stale(name)).collect();
    for name in &stale {
        delete(name);
    }
    Ok(stale)
}

fn is_stale(name: &str) -> bool {
    let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
    maker
        .and_then(|pid| pid.parse::<u32>().ok())
        .is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Ends the processes of a namespace, which would keep it alive, and removes it.
fn delete(name: &str) {
    let pids = run(Command::new("ip").args(["netns", "pids", name])).unwrap_or_default();
    for pid in pids.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()) {
        if pid.unsigned_abs() != std::process::id() {
            // SAFETY: a bare system call. The process is in a namespace that only we use.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    if let Err(error) = run(Command::new("ip").args(["netns", "delete", name])) {
        eprintln!("cannot remove namespace {name}: {error:#}");
    }
}

/// Runs a command to its end and returns what it printed; an error has what it complained of.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command to its end, with this as its input.
pub fn feed(command: &mut Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let written = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, complaint.trim());
    written.transpose()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_of_dead_makers_are_stale() {
        assert!(!is_stale(&format!("{PREFIX}{}-0-client", std::process::id())));
        assert!(!is_stale("pfwd-lab"));
        assert!(!is_stale("other-1-0-client"));
        assert!(is_stale(&format!("{PREFIX}{}-0-client", u32::MAX)));
    }
}
