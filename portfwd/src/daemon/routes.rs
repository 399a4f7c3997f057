//! Lets the programs remember what the kernel's routing said, for as long as it is true.
//!
//! A thread of its own: whatever else the daemon is busy with, a change voids what is remembered at
//! once. If the thread ends or hangs, the programs ask the kernel for each packet again: slower, and
//! right.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::datapath::{DatapathError, Routes};
use crate::network::{Dependence, NetworkError, Watch};
use crate::privileges;
use crate::sysctl::{self, Families};

/// How often what is remembered is voided even if nothing was told: path MTUs that were learned, for
/// example, make no event.
const TICK: Duration = Duration::from_secs(1);
/// How long the programs rely on this thread.
const TRUST: Duration = Duration::from_secs(3);
/// The kernel tells of some changes before it makes them (routes and nexthops that are removed), so
/// what is remembered is voided again so long after.
const AGAIN: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(200)];

/// The thread's side that the daemon speaks to.
#[derive(Clone, Default)]
pub struct Keeper {
    /// Interfaces that programs are attached to.
    interfaces: Arc<Mutex<BTreeSet<String>>>,
}

impl Keeper {
    /// Starts the thread. While it cannot do its work, which it says once, nothing is remembered.
    ///
    /// # Errors
    ///
    /// The system has no thread to give.
    pub fn start(routes: Routes) -> io::Result<Self> {
        let keeper = Self::default();
        // There, runs of the program on one CPU can interrupt each other.
        let real_time = std::fs::read_to_string("/sys/kernel/realtime");
        if real_time.is_ok_and(|text| text.trim() == "1") {
            info!("real-time kernel: routes are not remembered, which is slower");
            return Ok(keeper);
        }
        let interfaces = keeper.clone();
        let run = move || {
            privileges::give_up_here();
            let mut told = false;
            loop {
                let Err(error) = interfaces.keep(&routes);
                // At once, if that can be done; if not, trust runs out.
                let _: Result<(), DatapathError> = routes.rely(Families::default(), Duration::ZERO);
                if !std::mem::replace(&mut told, true) {
                    warn!(
                        "{error}; routes are not remembered until it works again, which is slower"
                    );
                }
                thread::sleep(TICK);
            }
        };
        thread::Builder::new().name("routes".to_owned()).spawn(run)?;
        Ok(keeper)
    }

    /// Says to which interfaces programs are attached.
    pub fn set_interfaces(&self, names: BTreeSet<String>) {
        *self.interfaces.lock().unwrap_or_else(PoisonError::into_inner) = names;
    }

    fn keep(&self, routes: &Routes) -> Result<Infallible, Failure> {
        let mut watch = Watch::open()?;
        let mut dependence = Dependence::default();
        let mut look_again = true;
        let mut due = Instant::now();
        let mut again: Vec<Instant> = Vec::new();
        loop {
            if look_again {
                // Until it is known what the way of a packet depends on.
                routes.rely(Families::default(), Duration::ZERO)?;
                dependence = tell(watch.dependence()?, &dependence);
            }
            let now = Instant::now();
            if now >= due || look_again {
                let families = self.forwarding();
                let families = Families {
                    v4: families.v4 && dependence.v4.is_none(),
                    v6: families.v6 && dependence.v6.is_none(),
                };
                routes.rely(families, TRUST)?;
                due = now + TICK;
            } else if again.iter().any(|time| *time <= now) {
                routes.forget()?;
            }
            again.retain(|time| *time > now);
            let next = again.iter().copied().min().map_or(due, |time| time.min(due));
            let changed = watch.wait(next.saturating_duration_since(now))?;
            look_again = changed.dependence;
            if changed.ways {
                routes.forget()?;
                let now = Instant::now();
                again = AGAIN.iter().map(|time| now + *time).collect();
            }
        }
    }

    /// In which families every interface forwards: the kernel looks at the one that a packet came by,
    /// which what is remembered does not tell.
    fn forwarding(&self) -> Families {
        let interfaces = self.interfaces.lock().unwrap_or_else(PoisonError::into_inner);
        let all = |family| interfaces.iter().all(|name| sysctl::forwards(family, name));
        Families { v4: all("ipv4"), v6: all("ipv6") }
    }
}

/// Says what is new of what keeps routes from being remembered.
fn tell(now: Dependence, before: &Dependence) -> Dependence {
    for (family, now, before) in [("IPv4", &now.v4, &before.v4), ("IPv6", &now.v6, &before.v6)] {
        match now {
            Some(reason) if Some(reason) != before.as_ref() => info!(
                "{family}: {reason}, so the kernel is asked for each packet's route, which is slower"
            ),
            None if before.is_some() => info!("{family}: routes are remembered again"),
            _ => {}
        }
    }
    now
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}
