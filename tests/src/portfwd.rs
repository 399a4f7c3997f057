//! The program under test.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::netns::{self, Namespace};
use crate::peers::Background;

/// A running `portfwd run`. It ends when dropped.
#[derive(Debug)]
pub struct Portfwd {
    process: Background,
    binary: PathBuf,
    socket: PathBuf,
    stderr: PathBuf,
}

impl Portfwd {
    /// Runs `BINARY run --socket DIRECTORY/portfwd.sock ARGUMENTS` in a namespace, and waits until it
    /// takes commands. An error has what it printed.
    pub fn start<A: AsRef<std::ffi::OsStr>>(
        namespace: &Namespace,
        binary: &Path,
        arguments: &[A],
        directory: &Path,
    ) -> Result<Self> {
        let mut portfwd = Self::launch(namespace, binary, arguments, directory)?;
        portfwd.wait_until_ready()?;
        Ok(portfwd)
    }

    /// The same, without waiting.
    pub fn launch<A: AsRef<std::ffi::OsStr>>(
        namespace: &Namespace,
        binary: &Path,
        arguments: &[A],
        directory: &Path,
    ) -> Result<Self> {
        let socket = directory.join("portfwd.sock");
        let stderr = directory.join("portfwd.stderr");
        let output = File::create(&stderr).with_context(|| stderr.display().to_string())?;
        let process = Background::start(
            namespace
                .command(binary)
                .arg("run")
                .arg("--socket")
                .arg(&socket)
                .args(arguments)
                .stdout(output.try_clone()?)
                .stderr(output),
        )?;
        Ok(Self { process, binary: binary.to_owned(), socket, stderr })
    }

    /// Waits until it takes commands. An error has what it printed.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(180);
        while !self.answers() {
            if let Some(status) = self.process.exited()? {
                bail!("portfwd ended at once: {status}: {}", self.stderr().trim());
            }
            if Instant::now() > deadline {
                bail!("portfwd takes no commands after 180 s: {}", self.stderr().trim());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Whether it answers an HTTP request, whatever the answer is. That it can be connected to says
    /// only that it holds the socket, which it takes before it attaches anything.
    fn answers(&self) -> bool {
        let ask = || -> std::io::Result<()> {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: portfwd\r\nConnection: close\r\n\r\n")?;
            stream.read_exact(&mut [0])
        };
        ask().is_ok()
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it has printed so far, standard output included.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// What `portfwd COMMAND --json` says.
    pub fn json(&self, command: &str) -> Result<Value> {
        let text = netns::run(
            Command::new(&self.binary).args([command, "--json", "--socket"]).arg(&self.socket),
        )?;
        serde_json::from_str(&text).with_context(|| format!("portfwd {command} printed {text}"))
    }

    pub fn stats(&self) -> Result<Value> {
        self.json("stats")
    }

    /// Sends it a signal, `libc::SIGHUP` for example.
    pub fn signal(&mut self, signal: i32) -> Result<()> {
        self.process.signal(signal)
    }

    /// Ends it by SIGINT; returns its status and what it printed.
    pub fn stop(self) -> Result<(ExitStatus, String)> {
        self.end(libc::SIGINT)
    }

    /// Ends it by a signal; returns its status and what it printed.
    pub fn end(mut self, signal: i32) -> Result<(ExitStatus, String)> {
        self.process.signal(signal)?;
        let status = self
            .process
            .wait(Duration::from_secs(30))
            .with_context(|| format!("portfwd does not end: {}", self.stderr().trim()))?;
        Ok((status, self.stderr()))
    }
}
