//! Interfaces without a link header.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use crate::netns::Namespace;
use crate::sys::check;

/// Two `tun` devices of which each receives what the other sends, as the ends of a tunnel whose program
/// runs in userspace. They go when this is dropped.
#[derive(Debug)]
pub struct Tunnel {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Makes a device of this name in each of two namespaces.
    ///
    /// # Errors
    ///
    /// There is one already, or no `/dev/net/tun`.
    pub fn new(ends: [&Namespace; 2], name: &str) -> Result<Self> {
        let [mut a, mut b] = ends.map(|end| end.enter(|| open(name)));
        let (a, b) = (a.as_mut(), b.as_mut());
        let ends = match (a, b) {
            (Ok(a), Ok(b)) => [a.try_clone()?, b.try_clone()?],
            _ => return Err(anyhow::anyhow!("cannot make a tun device {name}")),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                relay(&ends);
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot fail.
            let _: thread::Result<()> = thread.join();
        }
    }
}

/// A `tun` device whose packets a test makes and looks at.
#[derive(Debug)]
pub struct Device(File);

impl Device {
    /// Makes one of this name.
    ///
    /// # Errors
    ///
    /// There is one already, or no `/dev/net/tun`.
    pub fn new(namespace: &Namespace, name: &str) -> Result<Self> {
        namespace.enter(|| open(name)).map(Self)
    }

    /// Has an IP packet come in there. What is none is lost.
    pub fn send(&self, packet: &[u8]) {
        let _: io::Result<usize> = (&self.0).write(packet);
    }

    /// The next IP packet that leaves there, or `None` if none does for a while.
    pub fn receive(&self) -> Result<Option<Vec<u8>>> {
        let mut ready = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: an array of one.
        unsafe { libc::poll(&raw mut ready, 1, 20) };
        let mut packet = vec![0; 65_535];
        match (&self.0).read(&mut packet) {
            Ok(length) => {
                packet.truncate(length);
                Ok(Some(packet))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Passes on what is there, or waits a little for something.
fn relay(ends: &[File; 2]) {
    let poll = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut ready = ends.each_ref().map(|end| poll(end.as_raw_fd()));
    // SAFETY: an array of two.
    unsafe { libc::poll(ready.as_mut_ptr(), 2, 20) };
    let mut packet = [0; 65_535];
    for (mut from, mut to) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])] {
        while let Ok(length) = from.read(&mut packet) {
            // What has no room is lost, as on a wire.
            let _: io::Result<usize> = to.write(&packet[..length]);
        }
    }
}

/// A device of packets, without more.
fn open(name: &str) -> Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let device = "/dev/net/tun";
    let file = OpenOptions::new().read(true).write(true).open(device).context(device)?;
    // SAFETY: ifreq is plain data; zero is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: `request` is what this takes; the flags are those of an open file.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
    Ok(file)
}
