//! UDP in bulk, as QUIC sends it: datagrams that programs hand over and take by 64 KiB at once (GSO, GRO).
//!
//! As with [TCP](super::tcp) both ends and the path between them share one core. The sender waits while
//! 1 MiB is on the way, so that what is measured is work, and not how much can be lost.

use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portfwd_tests::sys::set_option;

use crate::contender::Contender;
use crate::measure::tcp::Path;
use crate::measure::{Bench, Reading};
use crate::proxy::Transport;
use crate::report::Unit;
use crate::rig::{PATH_CPU, Wire, pin};

pub const NAME: &str = "udp";

const CONTENDERS: [Contender; 7] = [
    Contender::Limit,
    Contender::Native,
    Contender::Generic,
    Contender::Tc,
    Contender::Routing,
    Contender::NftMap,
    Contender::Iptables,
];

/// Bytes of a datagram: with its headers an MTU of 1,500.
const DATAGRAM: usize = 1472;
/// So many are handed over at once.
const AT_ONCE: usize = 44;
/// Bytes that may be on the way.
const WINDOW: u64 = 1 << 20;

pub fn run(bench: &mut Bench) -> Result<()> {
    for (case, wire) in [("GSO", Wire::Offloads), ("GSO, without offloads", Wire::Frames)] {
        if bench.options.quick && wire == Wire::Frames {
            continue;
        }
        bench.case(NAME, case, &CONTENDERS, |options, contender| {
            let path = Path::new(options, contender, Transport::Udp, wire)?;
            let value = rate(&path, options.time())?;
            Ok(vec![Reading { case: case.into(), value, unit: Unit::BitsPerSecond }])
        });
    }
    Ok(())
}

/// Bits of payload that arrive in a second.
fn rate(path: &Path, time: Duration) -> Result<f64> {
    const WARM_UP: Duration = Duration::from_millis(200);
    let server = path.rig.server.enter(|| UdpSocket::bind(path.backend))?;
    set_option(server.as_fd(), libc::SOL_UDP, libc::UDP_GRO, &1)?;
    set_option(server.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(8 << 20))?;
    server.set_read_timeout(Some(Duration::from_millis(20)))?;
    let client = path.rig.client.enter(|| UdpSocket::bind("0.0.0.0:0"))?;
    client.connect(path.target)?;
    set_option(client.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, &(DATAGRAM as libc::c_int))?;

    let (stop, arrived) = (AtomicBool::new(false), AtomicU64::new(0));
    let stopped = || stop.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let receiver = scope.spawn(|| -> Result<()> {
            pin(PATH_CPU)?;
            let mut buffer = vec![0; 1 << 16];
            while !stopped() {
                if let Ok(length) = server.recv(&mut buffer) {
                    ensure!(buffer[..length].iter().all(|byte| *byte == 7), "wrong bytes arrived");
                    arrived.fetch_add(length as u64, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        let sender = scope.spawn(|| -> Result<()> {
            pin(PATH_CPU)?;
            let bytes = [7; DATAGRAM * AT_ONCE];
            let mut lost = 0;
            let (mut sent, mut progress) = (0, (0, Instant::now()));
            while !stopped() {
                let there = arrived.load(Ordering::Relaxed) + lost;
                if progress.0 != there {
                    progress = (there, Instant::now());
                }
                if sent - there >= WINDOW {
                    // What did not come by now does not.
                    if progress.1.elapsed() > Duration::from_millis(20) {
                        lost += sent - there;
                    }
                    thread::yield_now();
                    continue;
                }
                sent += client.send(&bytes).context("cannot send with GSO")? as u64;
            }
            Ok(())
        });
        thread::sleep(WARM_UP);
        let (start, before) = (Instant::now(), arrived.load(Ordering::Relaxed));
        thread::sleep(time);
        let (bytes, time) = (arrived.load(Ordering::Relaxed) - before, start.elapsed());
        stop.store(true, Ordering::Relaxed);
        for thread in [sender, receiver] {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        ensure!(bytes > 0, "nothing arrived");
        Ok(bytes as f64 * 8.0 / time.as_secs_f64())
    })
}
