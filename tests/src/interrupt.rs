//! Ctrl-C that lets a program clean up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP do not end this process: [`interrupted`] tells of them.
/// Children start with the usual way.
pub fn catch() {
    extern "C" fn remember(_signal: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let handler = remember as extern "C" fn(libc::c_int) as libc::sighandler_t;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic. These signals may be caught: no error.
        unsafe { libc::signal(signal, handler) };
    }
}

/// Whether one of the signals has come.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Sleeps until a time, or until one of the signals comes.
pub fn sleep_until(time: Instant) {
    const TICK: Duration = Duration::from_millis(50);
    while !interrupted() && Instant::now() < time {
        thread::sleep(TICK.min(time.saturating_duration_since(Instant::now())));
    }
}
