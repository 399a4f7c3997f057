//! Ends flows that are idle or whose rule or backend is gone. A thread of its own: a million flows take
//! a while to look at.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use crate::datapath::{FlowTables, Living};
use crate::privileges;

/// How often all flows are looked at.
const ROUND: Duration = Duration::from_secs(10);
/// How often few flows are, in tables that are not large.
const SHORT_ROUND: Duration = Duration::from_secs(1);
/// So many are few.
const FEW: u64 = 10_000;
/// Between batches, so that the thread takes a small part of a core.
const PAUSE: Duration = Duration::from_millis(2);

/// The thread's side that the daemon speaks to.
#[derive(Clone, Default)]
pub struct Sweeper(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    living: Arc<Living>,
    /// None while there is nothing to look at.
    tables: Option<Arc<FlowTables>>,
    /// Some rule or backend went: the round that goes on is too old.
    due: bool,
    stopped: bool,
}

impl Sweeper {
    /// Starts the thread, which has to be told what to [`follow`](Self::follow).
    ///
    /// # Errors
    ///
    /// The system has no thread to give.
    pub fn start() -> io::Result<Self> {
        let sweeper = Self::default();
        let shared = sweeper.clone();
        thread::Builder::new().name("flows".to_owned()).spawn(move || shared.sweep())?;
        Ok(sweeper)
    }

    /// The flows are in these tables from now on, and these may live.
    pub fn follow(&self, tables: Arc<FlowTables>, living: Living) {
        self.lock().tables = Some(tables);
        self.set(living);
    }

    /// Until then, none ends: programs of other rules may have them.
    pub fn pause(&self) {
        self.lock().tables = None;
    }

    /// Which flows may live from now on; all others end soon.
    pub fn set(&self, living: Living) {
        let mut state = self.lock();
        (state.living, state.due) = (living.into(), true);
        self.0.changed.notify_all();
    }

    /// The thread ends.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.0.changed.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sweep(&self) {
        privileges::give_up_here();
        let mut wait = Duration::ZERO;
        let mut told = false;
        loop {
            let guard = self.lock();
            let asleep = |state: &mut State| !state.due && !state.stopped;
            let waited = self.0.changed.wait_timeout_while(guard, wait, asleep);
            let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if state.stopped {
                return;
            }
            let hurry = std::mem::take(&mut state.due);
            let living = state.living.clone();
            let tables = state.tables.clone();
            drop(state);
            let Some(tables) = tables else {
                wait = ROUND;
                continue;
            };
            let start = Instant::now();
            let pause = || {
                if !hurry {
                    thread::sleep(PAUSE);
                }
            };
            match tables.sweep(&living, pause) {
                Ok(swept) => {
                    let is_short = swept.flows < FEW && !tables.are_large();
                    let round = if is_short { SHORT_ROUND } else { ROUND };
                    wait = round.saturating_sub(start.elapsed());
                    if swept.ended > 0 {
                        debug!("{} flows ended, {} go on", swept.ended, swept.flows);
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        warn!("{error}; flows that are over are not removed");
                    }
                    wait = ROUND;
                }
            }
        }
    }
}
