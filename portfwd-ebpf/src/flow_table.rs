//! The table of established flows: a hash table in an array, which CPUs and the control plane change at
//! once.
//!
//! An entry has two homes, that is, places that follow from its key, and stands at one of the
//! [`WINDOW`] places from either on. Each place notes which of those from itself on hold entries that are
//! at home there, so a search looks only where something is: for most entries at one place, and for one of
//! IPv4 that is one cache line, where the kernel's own hash map reads three.
//!
//! Nothing is ever moved. Whoever adds locks its key's first home for as long as that takes, so one of two
//! who add the same key at once is refused; nobody waits. Who removes takes no lock, as the control plane
//! could be stopped while it has one; if two remove one key at once, and the second sleeps until its place
//! is another's, that one is not found for a moment. What is at a place can change while packets look at it,
//! so they look last whose it is.

use core::mem::size_of;

use crate::flow::Added;
use crate::table::{FlowHalf, FlowKey, Place};

/// At how many places from a home on an entry may stand.
pub const WINDOW: u32 = 8;

/// The memory of a table.
pub trait Slots<const N: usize> {
    /// How many places are homes; behind them are `WINDOW - 1` more. The same for as long as the table
    /// lives, as is the [`seed`](Self::seed).
    fn homes(&self) -> u32;
    /// What hashes depend on, so that nobody outside can have many flows at one home.
    fn seed(&self) -> u64;
    /// A place that is there for as long as the borrow.
    fn slot(&self, number: u32) -> Option<&Slot<N>>;
}

/// A place in the table, which others may read and write meanwhile.
#[repr(transparent)]
pub struct Slot<const N: usize>(core::cell::UnsafeCell<FlowHalf<N>>);

// SAFETY: of integers, which are written word by word; who reads looks afterwards whose they were.
unsafe impl<const N: usize> Sync for Slot<N> {}

impl<const N: usize> Slot<N> {
    /// Nothing is here.
    pub const fn empty() -> Self {
        Self(core::cell::UnsafeCell::new(FlowHalf::EMPTY))
    }

    /// The place at an address.
    ///
    /// # Safety
    ///
    /// A `FlowHalf` must be there, for as long as `'a`, aligned to 8 bytes.
    #[inline(always)]
    pub unsafe fn at<'a>(address: *mut FlowHalf<N>) -> &'a Self {
        // SAFETY: the caller's; the type is transparent.
        unsafe { &*address.cast() }
    }

    /// The entry of `key`, if this is it. It can become another's at any time: see [`FlowHalf::is`].
    #[expect(clippy::mut_from_ref, reason = "others write there in any case")]
    #[inline(always)]
    fn entry(&self, key: &FlowKey<N>) -> Option<&mut FlowHalf<N>> {
        // SAFETY: in bounds, of integers; what others write meanwhile is looked at afterwards.
        let half = unsafe { &mut *self.0.get() };
        half.is(key).then_some(half)
    }

    #[inline(always)]
    fn place(&self) -> Place {
        // SAFETY: in bounds.
        unsafe { (&raw const (*self.0.get()).place).read_volatile() }
    }

    /// Sets bits of the place: those that it had.
    #[inline(always)]
    fn set(&self, bits: u32) -> u32 {
        // SAFETY: in bounds, and aligned.
        Place::word(unsafe { atomic::or(self.0.get().cast(), Place::in_word(bits)) })
    }

    /// Clears bits of the place: those that it had.
    #[inline(always)]
    fn clear(&self, bits: u32) -> u32 {
        // SAFETY: as above.
        Place::word(unsafe { atomic::and(self.0.get().cast(), !Place::in_word(bits)) })
    }

    /// Writes an entry, but for its place.
    #[inline(always)]
    fn write(&self, half: &FlowHalf<N>) {
        let to = self.0.get();
        let (from, words) = (half.as_key(), size_of::<FlowKey<N>>() / 8);
        let from = (&raw const *from).cast::<u64>();
        // SAFETY: in bounds; the place is taken, so nobody else writes there. Others may change bits of the
        // place, in the same word as `created`: that leaves `created` as it is, and does not lose it, as it
        // is one step. Whose it is comes first, and volatile: who reads that last knows whose the rest was.
        unsafe {
            let key = (&raw mut (*to).came).cast::<u64>();
            for word in 0..words {
                key.add(word).write_volatile(from.add(word).read());
            }
            (&raw mut (*to).created).write(half.created);
            (&raw mut (*to).goes).write(half.goes);
            (&raw mut (*to).counter).write(half.counter);
            (&raw mut (*to).last).write(half.last);
            (&raw mut (*to).tally).write(half.tally);
        }
    }

    /// What is here, or was.
    pub fn get_mut(&mut self) -> &mut FlowHalf<N> {
        self.0.get_mut()
    }

    /// What is here, if something is.
    pub fn read(&self) -> Option<FlowHalf<N>> {
        // Most places are empty.
        if !self.place().is_live() {
            return None;
        }
        // SAFETY: in bounds, of integers.
        let half = unsafe { self.0.get().read_volatile() };
        // SAFETY: as above.
        unsafe { (*self.0.get()).is(half.as_key()) }.then_some(half)
    }
}

/// Which of its two homes an entry stands near.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Choice {
    First,
    Second,
}

/// The bit of a home that says that an entry which is at home there stands `distance` places on.
#[inline(always)]
const fn holds(choice: Choice, distance: u32) -> u32 {
    1 << match choice {
        Choice::First => distance,
        Choice::Second => WINDOW + distance,
    }
}

/// The homes of a key.
// No array: the compiler checks an index into it, and the verifier does not know that it is right.
#[derive(Clone, Copy)]
struct Homes {
    first: u32,
    second: u32,
}

impl Homes {
    #[inline(always)]
    fn of<const N: usize, S: Slots<N>>(slots: &S, key: &FlowKey<N>) -> Self {
        let hash = key.hash(slots.seed());
        let home = |part: u64| ((part * u64::from(slots.homes())) >> 32) as u32;
        Self { first: home(hash >> 32), second: home(hash & 0xffff_ffff) }
    }

    #[inline(always)]
    const fn get(self, choice: Choice) -> u32 {
        match choice {
            Choice::First => self.first,
            Choice::Second => self.second,
        }
    }
}

/// The entry of a key.
// Not inlined, like the others: the verifier would follow all that comes after it once for each place.
#[inline(never)]
pub fn find<'a, const N: usize, S: Slots<N>>(
    slots: &'a S,
    key: &FlowKey<N>,
) -> Option<&'a mut FlowHalf<N>> {
    let homes = Homes::of(slots, key);
    match near(slots, key, homes.first, Choice::First) {
        None => near(slots, key, homes.second, Choice::Second),
        entry => entry,
    }
}

/// The same, for where most packets pass: most entries stand where they are found without a call.
#[inline(always)]
pub fn find_at_once<'a, const N: usize, S: Slots<N>>(
    slots: &'a S,
    key: &FlowKey<N>,
) -> Option<&'a mut FlowHalf<N>> {
    match slots.slot(Homes::of(slots, key).first)?.entry(key) {
        None => find(slots, key),
        entry => entry,
    }
}

#[inline(always)]
fn near<'a, const N: usize, S: Slots<N>>(
    slots: &'a S,
    key: &FlowKey<N>,
    home: u32,
    choice: Choice,
) -> Option<&'a mut FlowHalf<N>> {
    let place = slots.slot(home)?.place();
    for distance in 0..window() {
        if !place.has(holds(choice, distance)) {
            continue;
        }
        if let Some(entry) = slots.slot(home + distance)?.entry(key) {
            return Some(entry);
        }
    }
    None
}

/// [`WINDOW`], which the compiler does not know: unrolled, the loops take more of the stack than there is.
#[inline(always)]
fn window() -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        let mut window = u64::from(WINDOW);
        // SAFETY: it stays as it is, and the verifier knows that. (`black_box` would go through memory.)
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) window, options(pure, nomem, nostack)) };
        window as u32
    }
    #[cfg(not(target_arch = "bpf"))]
    WINDOW
}

/// Adds an entry, if none of its key is there.
#[inline(never)]
pub fn add<const N: usize, S: Slots<N>>(slots: &S, half: &FlowHalf<N>) -> Added {
    let key = half.as_key();
    let homes = Homes::of(slots, key);
    let Some(lock) = slots.slot(homes.first) else { return Added::Full };
    if lock.set(Place::LOCKED) & Place::LOCKED != 0 {
        return Added::Busy;
    }
    let added = match find(slots, key) {
        Some(_) => Added::Exists,
        None => match take(slots, homes) {
            Some((slot, home, bit)) => {
                slot.write(half);
                slot.set(Place::LIVE);
                home.set(bit);
                Added::Yes
            }
            None => Added::Full,
        },
    };
    lock.clear(Place::LOCKED);
    added
}

/// Takes a free place, the nearest to either home; also its home, and the bit there.
#[inline(always)]
fn take<const N: usize, S: Slots<N>>(slots: &S, homes: Homes) -> Option<(&Slot<N>, &Slot<N>, u32)> {
    for distance in 0..window() {
        for choice in [Choice::First, Choice::Second] {
            let home = homes.get(choice);
            let slot = slots.slot(home + distance)?;
            // Looked at first: setting it takes the line from other CPUs.
            if !slot.place().has(Place::TAKEN) && slot.set(Place::TAKEN) & Place::TAKEN == 0 {
                return Some((slot, slots.slot(home)?, holds(choice, distance)));
            }
        }
    }
    None
}

/// Removes the entry of a key: whether it was there.
#[inline(never)]
pub fn remove<const N: usize, S: Slots<N>>(slots: &S, key: &FlowKey<N>) -> bool {
    let homes = Homes::of(slots, key);
    for choice in [Choice::First, Choice::Second] {
        let home = homes.get(choice);
        let Some(home_slot) = slots.slot(home) else { return false };
        for distance in 0..window() {
            let Some(slot) = slots.slot(home + distance) else { return false };
            if !home_slot.place().has(holds(choice, distance)) || slot.entry(key).is_none() {
                continue;
            }
            if slot.clear(Place::LIVE) & Place::LIVE == 0 {
                // Another removes it.
                return false;
            }
            // The place is still taken, so whose it is stays as it is now.
            if !slot.read_taken(key) {
                slot.set(Place::LIVE);
                return false;
            }
            home_slot.clear(holds(choice, distance));
            slot.clear(Place::TAKEN);
            return true;
        }
    }
    false
}

impl<const N: usize> Slot<N> {
    /// Whether `key` is of what stands here, live or not.
    #[inline(always)]
    fn read_taken(&self, key: &FlowKey<N>) -> bool {
        // SAFETY: in bounds, of integers.
        unsafe { (*self.0.get()).differs(key) == 0 }
    }
}

/// Read-modify-write of a word, in one step for all CPUs.
mod atomic {
    /// # Safety
    ///
    /// `at` must be valid and aligned.
    #[cfg(target_arch = "bpf")]
    #[inline(always)]
    pub unsafe fn or(at: *mut u64, bits: u64) -> u64 {
        let mut value = bits;
        // SAFETY: the caller's. Since Linux 5.12 (kernel 981f94c3e921); core has no such operation for
        // this target.
        unsafe {
            core::arch::asm!(
                "{value} = atomic_fetch_or((u64 *)({at} + 0), {value})",
                at = in(reg) at,
                value = inout(reg) value,
            );
        }
        value
    }

    /// # Safety
    ///
    /// As [`or`].
    #[cfg(target_arch = "bpf")]
    #[inline(always)]
    pub unsafe fn and(at: *mut u64, bits: u64) -> u64 {
        let mut value = bits;
        // SAFETY: as above.
        unsafe {
            core::arch::asm!(
                "{value} = atomic_fetch_and((u64 *)({at} + 0), {value})",
                at = in(reg) at,
                value = inout(reg) value,
            );
        }
        value
    }

    #[cfg(not(target_arch = "bpf"))]
    use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

    /// # Safety
    ///
    /// `at` must be valid and aligned.
    #[cfg(not(target_arch = "bpf"))]
    pub unsafe fn or(at: *mut u64, bits: u64) -> u64 {
        // SAFETY: the caller's.
        unsafe { AtomicU64::from_ptr(at) }.fetch_or(bits, SeqCst)
    }

    /// # Safety
    ///
    /// As [`or`].
    #[cfg(not(target_arch = "bpf"))]
    pub unsafe fn and(at: *mut u64, bits: u64) -> u64 {
        // SAFETY: the caller's.
        unsafe { AtomicU64::from_ptr(at) }.fetch_and(bits, SeqCst)
    }
}

#[cfg(test)]
mod tests;
