//! What the daemon may do: no more than it does.

use std::fmt;

use rustix::io::{self, Errno};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};
use tracing::{debug, warn};

/// Programs, maps and links; the network's settings, neighbours among them; and the verifier's limits, which are
/// lower for others.
const NEEDED: CapabilitySet =
    CapabilitySet::BPF.union(CapabilitySet::NET_ADMIN).union(CapabilitySet::PERFMON);

/// Has this thread, and those that it will start, keep what the daemon needs, if it has that. A thread that is there
/// already calls [`give_up_here`].
pub fn give_up() {
    match try_to_give_up() {
        Ok(kept) => debug!("privileges that are kept: {}", Names(kept)),
        Err(error) => warn!("cannot give up privileges: {error}"),
    }
}

/// The same, of one thread among others, of which one tells.
pub fn give_up_here() {
    let _: io::Result<CapabilitySet> = try_to_give_up();
}

fn try_to_give_up() -> io::Result<CapabilitySet> {
    set_no_new_privs(true)?;
    let now = capabilities(None)?;
    for capability in (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        match capability_is_in_bounding_set(capability) {
            // This kernel has no more.
            Err(Errno::INVAL) => break,
            Ok(true) if !NEEDED.contains(capability) => {
                match remove_capability_from_bounding_set(capability) {
                    // Not allowed to; nothing is started that could have it.
                    Err(Errno::PERM) => break,
                    done => done?,
                }
            }
            other => drop(other?),
        }
    }
    let kept = now.permitted & NEEDED;
    clear_ambient_capability_set()?;
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )?;
    Ok(kept)
}

/// Capabilities in a message.
struct Names(CapabilitySet);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (place, (name, _)) in self.0.iter_names().enumerate() {
            write!(f, "{}CAP_{name}", if place == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_up_what_it_has() {
        // Others keep theirs.
        let before = capabilities(None).expect("this thread's");
        let after = std::thread::spawn(|| {
            give_up_here();
            // The second time, there is nothing to do.
            give_up();
            assert!(rustix::thread::no_new_privs().expect("a flag"));
            capabilities(None).expect("that thread's")
        });
        let after = after.join().expect("it ends");
        let kept = before.permitted & NEEDED;
        assert_eq!((after.permitted, after.effective), (kept, kept));
        assert!(after.inheritable.is_empty());
        assert_eq!(capabilities(None).expect("this thread's"), before);
    }

    #[test]
    fn capabilities_have_names() {
        assert_eq!(Names(NEEDED).to_string(), "CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF");
        assert_eq!(Names(CapabilitySet::empty()).to_string(), "none");
    }
}
