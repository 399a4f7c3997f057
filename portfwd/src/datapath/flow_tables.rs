//! The kernel's tables of flows: read, swept, counted. Those of established flows are this process's memory
//! too; others are read in batches.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CString;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::{ControlFlow, Range};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::{NonNull, null_mut};
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData, MapError};
use portfwd_ebpf::flow::Added;
use portfwd_ebpf::flow_table::{self, Slot, Slots, WINDOW};
use portfwd_ebpf::table::{
    Address, Candidate, ClientKey, FlowHalf, FlowKey, Jiffies, Lines, Mapping, MappingKey, Port,
    flow_flags,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::{Clock, DatapathError};
use crate::flows::{FlowRow, State, Timeouts};

/// How many entries are read in one system call.
const BATCH: usize = 1024;
/// So many places are many.
const LARGE: u32 = 1 << 20;
/// How many places are looked at without a pause.
const PART: u32 = 16_384;
/// A mapping that no flow uses is kept so long: its flow may just begin.
const FRESH: Duration = Duration::from_secs(5);

/// The tables of both families.
pub struct FlowTables {
    v4: Family<4>,
    v6: Family<16>,
    mappings: Table<MappingKey, Mapping>,
    clients: Table<ClientKey, Port>,
    clock: Clock,
}

struct Family<const N: usize> {
    flows: Places<N>,
    probation: Table<FlowKey<N>, Candidate<N>>,
}

/// What flows depend on that may end before they are idle.
#[derive(Clone, Debug, Default)]
pub struct Living {
    /// Counters of rules, each with the backends that it has. Sorted.
    backends: Box<[(u32, IpAddr)]>,
    timeouts: Timeouts,
}

impl Living {
    /// Flows of these counters to these backends, unless they are idle for too long.
    pub fn new(mut backends: Vec<(u32, IpAddr)>, timeouts: Timeouts) -> Self {
        backends.sort_unstable();
        backends.dedup();
        Self { backends: backends.into(), timeouts }
    }

    fn has(&self, counter: u32, backend: IpAddr) -> bool {
        self.backends.binary_search(&(counter, backend)).is_ok()
    }
}

/// What a sweep found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Swept {
    pub flows: u64,
    /// Flows that ended.
    pub ended: u64,
}

impl FlowTables {
    /// From the maps with these names, which `take` hands out.
    pub(super) fn new(
        clock: Clock,
        seed: u64,
        mut take: impl FnMut(&'static str) -> Result<Map, DatapathError>,
    ) -> Result<Self, DatapathError> {
        Ok(Self {
            v4: Family {
                flows: Places::new("FLOWS_V4", take("FLOWS_V4")?, seed)?,
                probation: Table::new("PROBATION_V4", take("PROBATION_V4")?)?,
            },
            v6: Family {
                flows: Places::new("FLOWS_V6", take("FLOWS_V6")?, seed)?,
                probation: Table::new("PROBATION_V6", take("PROBATION_V6")?)?,
            },
            mappings: Table::new("MAPPINGS", take("MAPPINGS")?)?,
            clients: Table::new("CLIENTS", take("CLIENTS")?)?,
            clock,
        })
    }

    /// Adds what `other` has and this has not. Returns how many flows had no room.
    ///
    /// # Errors
    ///
    /// A table cannot be read or written.
    pub(super) fn copy(&self, other: &Self) -> Result<u64, DatapathError> {
        let crowded = self.v4.copy(&other.v4)? + self.v6.copy(&other.v6)?;
        self.mappings.copy(&other.mappings)?;
        self.clients.copy(&other.clients)?;
        Ok(crowded)
    }

    /// Whether it takes long to look at all places, whatever there is.
    pub fn are_large(&self) -> bool {
        self.v4.flows.count.saturating_add(self.v6.flows.count) > LARGE
    }

    /// The clock of the rows' times.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Shows each flow to `each`, until that breaks.
    ///
    /// # Errors
    ///
    /// A table cannot be read.
    pub fn each(
        &self,
        mut each: impl FnMut(FlowRow) -> ControlFlow<()>,
    ) -> Result<(), DatapathError> {
        if self.v4.each(&mut each)?.is_continue() {
            let _: ControlFlow<()> = self.v6.each(&mut each)?;
        }
        Ok(())
    }

    /// How many flows each rule has, by its counter.
    ///
    /// # Errors
    ///
    /// A table cannot be read.
    pub fn count(&self) -> Result<BTreeMap<u32, u64>, DatapathError> {
        let mut counts = BTreeMap::new();
        self.v4.count(&mut counts)?;
        self.v6.count(&mut counts)?;
        Ok(counts)
    }

    /// Removes flows that were idle for too long, or whose rule or backend is gone, and mappings that no
    /// flow uses. `pause` is called between batches.
    ///
    /// # Errors
    ///
    /// A table cannot be read or written.
    pub fn sweep(&self, living: &Living, mut pause: impl FnMut()) -> Result<Swept, DatapathError> {
        let mut swept = Swept::default();
        let mut used = HashSet::new();
        // Of before: what a flow begins to use behind the sweep is fresh.
        let now = Instant::now();
        self.v4.sweep(self.clock, living, &mut swept, &mut used, &mut pause)?;
        self.v6.sweep(self.clock, living, &mut swept, &mut used, &mut pause)?;
        let mut free = Vec::new();
        self.mappings.in_batches(|batch| {
            free.extend(batch.iter().filter(|(key, mapping)| {
                self.clock.between(mapping.last, now) >= FRESH && !used.contains(key)
            }));
            Ok(())
        })?;
        for (key, mapping) in &free {
            let MappingKey { address, protocol, .. } = *key;
            let Mapping { client, port, .. } = *mapping;
            let client = ClientKey { client, address, port, protocol, padding: [0; 5] };
            self.clients.remove(&client)?;
            self.mappings.remove(key)?;
        }
        Ok(swept)
    }
}

impl<const N: usize> Family<N>
where
    Address<N>: ToIp,
{
    fn each(
        &self,
        each: &mut impl FnMut(FlowRow) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, DatapathError> {
        let shown = self.flows.halves().try_for_each(|half| {
            if !half.is_forward() {
                return ControlFlow::Continue(());
            }
            // Without its other half it is about to end.
            match self.flows.get(&half.becomes().reversed()) {
                Some(reply) => each(established(&half, &reply)),
                None => ControlFlow::Continue(()),
            }
        });
        if shown.is_break() {
            return Ok(shown);
        }
        // A batch may bring an entry twice while others come and go.
        let mut seen = HashSet::new();
        self.probation.each(|key, candidate| {
            if !seen.insert(*key) {
                return ControlFlow::Continue(());
            }
            each(on_probation(key, candidate))
        })
    }

    fn count(&self, counts: &mut BTreeMap<u32, u64>) -> Result<(), DatapathError> {
        let mut add = |counter| *counts.entry(counter).or_default() += 1;
        let forward = |half: &FlowHalf<N>| half.is_forward();
        self.flows.halves().filter(forward).for_each(|half| add(half.counter));
        self.probation.in_batches(|batch| {
            batch.iter().for_each(|(_, candidate)| add(candidate.counter));
            Ok(())
        })
    }

    fn sweep(
        &self,
        clock: Clock,
        living: &Living,
        swept: &mut Swept,
        used: &mut HashSet<MappingKey>,
        pause: &mut impl FnMut(),
    ) -> Result<(), DatapathError> {
        let idle = |last: Jiffies| clock.between(last, Instant::now());
        let gone = |counter, backend: Address<N>| !living.has(counter, backend.to_ip());
        let shortest = living.timeouts.shortest();
        self.flows.in_parts(|halves| {
            for half in halves {
                let key = half.key();
                let forward = half.is_forward();
                if !forward && idle(half.last) <= living.timeouts.tcp_transitory {
                    continue;
                }
                let becomes = half.becomes();
                let backend = if forward { becomes.destination } else { key.source };
                if forward && !gone(half.counter, backend) && idle(half.last) <= shortest {
                    // Most flows: nothing else has to be read.
                    swept.flows += 1;
                    note_mapping(&key, &becomes, used);
                    continue;
                }
                let other = self.flows.get(&becomes.reversed());
                let Some(reply) = other.filter(|other| other.becomes() == key.reversed()) else {
                    // One half alone. A packet of the client's makes it whole again, or anew.
                    if forward
                        || gone(half.counter, backend)
                        || idle(half.last) > living.timeouts.tcp
                    {
                        self.flows.remove(&key);
                    }
                    continue;
                };
                if !forward {
                    continue;
                }
                let row = established(&half, &reply);
                if gone(half.counter, backend)
                    || idle(row.last) > living.timeouts.limit(row.protocol, row.state)
                {
                    swept.ended += 1;
                    self.end(&half, reply.last);
                } else {
                    swept.flows += 1;
                    note_mapping(&key, &becomes, used);
                }
            }
            pause();
        });
        let ends = |row: &FlowRow| {
            idle(row.last) > living.timeouts.limit(row.protocol, row.state)
                || !living.has(row.counter, row.backend.ip())
        };
        self.probation.in_batches(|batch| {
            for (key, candidate) in batch {
                if ends(&on_probation(key, candidate)) {
                    swept.ended += 1;
                    self.probation.remove(key)?;
                } else {
                    swept.flows += 1;
                    note_mapping(&candidate.becomes.reversed(), &key.reversed(), used);
                }
            }
            pause();
            Ok(())
        })
    }
}

impl<const N: usize> Family<N> {
    /// As [`FlowTables::copy`].
    fn copy(&self, other: &Self) -> Result<u64, DatapathError> {
        self.probation.copy(&other.probation)?;
        if self.flows.id == other.flows.id {
            return Ok(0);
        }
        let add = |half: &FlowHalf<N>| {
            // Who adds one nearby is done in no time.
            let tries = (0..1000).map(|_| flow_table::add(&self.flows, half));
            tries.into_iter().find(|added| *added != Added::Busy)
        };
        let crowded = other.flows.halves().filter(|half| add(half) == Some(Added::Full));
        Ok(crowded.count() as u64)
    }

    /// Ends a flow, of which this is the forward half, and whose other half had its last packet then.
    ///
    /// The forward half goes first: a packet of the client's in between finds the reply's and makes it
    /// whole again, so that is looked at once more; and should both cross, the forward half that was
    /// made anew goes too, as one without the other is of no use.
    fn end(&self, half: &FlowHalf<N>, reply_seen: Jiffies) {
        let key = half.key();
        self.flows.remove(&key);
        let twin = half.becomes().reversed();
        if self.flows.get(&twin).is_some_and(|reply| reply.last == reply_seen) {
            self.flows.remove(&twin);
            self.flows.remove(&key);
        }
    }
}

/// If a client that has `came` is seen by another address, that mapping is used.
fn note_mapping<const N: usize>(
    came: &FlowKey<N>,
    goes: &FlowKey<N>,
    used: &mut HashSet<MappingKey>,
) {
    if came.source != goes.source {
        used.insert(MappingKey::of(goes));
    }
}

fn established<const N: usize>(forward: &FlowHalf<N>, reply: &FlowHalf<N>) -> FlowRow
where
    Address<N>: ToIp,
{
    let has = |half: &FlowHalf<N>, flag: u32| u32::from(half.flags) & flag != 0;
    // What comes after a RST says that it was not heeded (RFC 7857, section 2.1).
    let reset = |half: &FlowHalf<N>, other: &FlowHalf<N>| {
        has(half, flow_flags::RESET) && other.last <= half.last
    };
    let reset = reset(forward, reply) || reset(reply, forward);
    let ended = has(forward, flow_flags::FIN) && has(reply, flow_flags::FIN);
    FlowRow {
        state: if reset || ended { State::Closing } else { State::Established },
        created: forward.created.ticks(),
        last: forward.last.max(reply.last),
        forward: forward.tally,
        reply: reply.tally,
        ..row(&forward.key(), &forward.becomes(), forward.counter)
    }
}

fn on_probation<const N: usize>(key: &FlowKey<N>, candidate: &Candidate<N>) -> FlowRow
where
    Address<N>: ToIp,
{
    let Candidate { becomes, counter, flags, created, last, tallies: [forward, reply], .. } =
        candidate;
    FlowRow {
        state: match flags {
            _ if flags & flow_flags::RESET != 0 => State::Closing,
            _ if flags & flow_flags::ANSWERED != 0 => State::Answered,
            _ => State::New,
        },
        created: created.ticks(),
        last: *last,
        forward: *forward,
        reply: *reply,
        ..row(&becomes.reversed(), &key.reversed(), *counter)
    }
}

/// A flow whose forward packets come with some ends and go with others.
fn row<const N: usize>(came: &FlowKey<N>, goes: &FlowKey<N>, counter: u32) -> FlowRow
where
    Address<N>: ToIp,
{
    let socket = |address: Address<N>, port: Port| SocketAddr::new(address.to_ip(), port.number());
    FlowRow {
        protocol: came.protocol,
        client: socket(came.source, came.source_port),
        listen: socket(came.destination, came.destination_port),
        source: socket(goes.source, goes.source_port),
        backend: socket(goes.destination, goes.destination_port),
        counter,
        state: State::New,
        created: Jiffies::default(),
        last: Jiffies::default(),
        forward: Default::default(),
        reply: Default::default(),
    }
}

/// An address as the standard library has it.
trait ToIp {
    fn to_ip(self) -> IpAddr;
}

impl ToIp for Address<4> {
    fn to_ip(self) -> IpAddr {
        self.0.into()
    }
}

/// One that stands for an address of IPv4 as that: of a flow that changes its family.
impl ToIp for Address<16> {
    fn to_ip(self) -> IpAddr {
        IpAddr::from(self.0).to_canonical()
    }
}

/// Types of keys and values that the kernel reads and writes as bytes.
///
/// # Safety
///
/// `repr(C)`, without padding, valid for any bytes.
unsafe trait Bytes: Copy {
    const ZERO: Self;
}

macro_rules! bytes {
    ($([$($generic:tt)*] $type:ty),*) => { $(
        // SAFETY: integers and arrays of them; sizes are asserted in `table`.
        unsafe impl<$($generic)*> Bytes for $type {
            // SAFETY: as above.
            const ZERO: Self = unsafe { std::mem::zeroed() };
        }
    )* };
}
bytes!(
    [const N: usize] FlowKey<N>,
    [const N: usize] Candidate<N>,
    [] MappingKey,
    [] Mapping,
    [] ClientKey,
    [] Port
);

/// The kernel's table of established flows, as memory of this process: programs read and write it too.
struct Places<const N: usize> {
    /// Whoever asks what maps this process has finds it.
    _map: MapData,
    slots: NonNull<Lines<FlowHalf<N>>>,
    count: u32,
    seed: u64,
    /// The kernel's number of the map.
    id: u32,
}

// SAFETY: memory that lives as long as this does; `Slot` is for many to use.
unsafe impl<const N: usize> Send for Places<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Sync for Places<N> {}

impl<const N: usize> Places<N> {
    fn new(name: &'static str, map: Map, seed: u64) -> Result<Self, DatapathError> {
        let failed = |message: String| DatapathError::Map { map: name, message };
        let Map::Array(map) = map else { return Err(failed("it is no array".to_owned())) };
        let info = map.info().map_err(|error| failed(error.to_string()))?;
        let (count, id) = (info.max_entries(), info.id());
        // One that was pinned may be anybody's.
        if info.value_size() as usize != size_of::<Lines<FlowHalf<N>>>() {
            return Err(failed(OTHER_SIZES.to_owned()));
        }
        let fd = map.fd().as_fd();
        // SAFETY: a new mapping, of the size that the map was made with.
        let slots = unsafe {
            mmap(
                null_mut(),
                Self::bytes(count),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        };
        let slots = slots.map_err(|error| failed(error.to_string()))?;
        let slots =
            NonNull::new(slots.cast()).ok_or_else(|| failed("mapped nowhere".to_owned()))?;
        Ok(Self { _map: map, slots, count, seed, id })
    }

    fn bytes(count: u32) -> usize {
        count as usize * size_of::<Lines<FlowHalf<N>>>()
    }

    fn get(&self, key: &FlowKey<N>) -> Option<FlowHalf<N>> {
        let entry = flow_table::find(self, key)?;
        // SAFETY: of a reference. Volatile: a plain copy the compiler puts behind the question whose it is.
        let half = unsafe { (&raw const *entry).read_volatile() };
        entry.is(key).then_some(half)
    }

    /// Whether it was there.
    fn remove(&self, key: &FlowKey<N>) -> bool {
        flow_table::remove(self, key)
    }

    /// All entries. Those that come or go meanwhile may be left out.
    fn halves(&self) -> impl Iterator<Item = FlowHalf<N>> {
        self.part(0..self.count)
    }

    /// The same, some at a time.
    fn in_parts(&self, mut each: impl FnMut(&mut dyn Iterator<Item = FlowHalf<N>>)) {
        for from in (0..self.count).step_by(PART as usize) {
            each(&mut self.part(from..(from + PART).min(self.count)));
        }
    }

    fn part(&self, places: Range<u32>) -> impl Iterator<Item = FlowHalf<N>> {
        places.filter_map(|number| self.slot(number)?.read())
    }
}

impl<const N: usize> Slots<N> for Places<N> {
    fn homes(&self) -> u32 {
        self.count - (WINDOW - 1)
    }

    fn seed(&self) -> u64 {
        self.seed
    }

    fn slot(&self, number: u32) -> Option<&Slot<N>> {
        // SAFETY: in bounds of the mapping, which is there for as long as this is.
        (number < self.count).then(|| unsafe {
            Slot::at(self.slots.as_ptr().add(number as usize).cast::<FlowHalf<N>>())
        })
    }
}

impl<const N: usize> Drop for Places<N> {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it any more. That it fails can only be a mistake above.
        let _: rustix::io::Result<()> =
            unsafe { munmap(self.slots.as_ptr().cast(), Self::bytes(self.count)) };
    }
}

/// Why a map is not used.
const OTHER_SIZES: &str = "its rows are of another size, as another version of portfwd had them";

/// A hash map of the kernel. aya has no batch operations, and its maps cannot be used by several threads
/// at once.
struct Table<K, V> {
    name: &'static str,
    map: MapData,
    /// The kernel's number of the map.
    id: u32,
    types: std::marker::PhantomData<fn(K) -> V>,
}

/// `union bpf_attr`, as map commands have it (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

// enum bpf_cmd and flags (linux/bpf.h); batches since 5.6 (kernel 05799638dbb2).
const LOOK_UP: libc::c_long = 1;
const UPDATE: libc::c_long = 2;
const DELETE: libc::c_long = 3;
const NEXT_KEY: libc::c_long = 4;
const GET: libc::c_long = 7;
const ABOUT: libc::c_long = 15;
/// Since 5.9 (kernel 73b11c2ab072).
const LINK_DETACH: libc::c_long = 34;
const NO_EXIST: u64 = 1;
const LOOKUP_BATCH: libc::c_long = 24;

impl<K: Bytes, V: Bytes> Table<K, V> {
    fn new(name: &'static str, map: Map) -> Result<Self, DatapathError> {
        let (Map::HashMap(map) | Map::LruHashMap(map)) = map else {
            return Err(DatapathError::Map { map: name, message: "it is no hash map".to_owned() });
        };
        let failed = |error: MapError| DatapathError::Map { map: name, message: error.to_string() };
        let info = map.info().map_err(failed)?;
        let sizes = (info.key_size() as usize, info.value_size() as usize);
        if sizes != (size_of::<K>(), size_of::<V>()) {
            return Err(DatapathError::Map { map: name, message: OTHER_SIZES.to_owned() });
        }
        let id = info.id();
        Ok(Self { name, map, id, types: std::marker::PhantomData })
    }

    fn number(&self) -> u32 {
        self.map.fd().as_fd().as_raw_fd() as u32
    }

    fn failed(&self, error: &io::Error) -> DatapathError {
        DatapathError::Map { map: self.name, message: error.to_string() }
    }

    /// Whether it was there.
    fn remove(&self, key: &K) -> Result<bool, DatapathError> {
        let mut attr =
            Element { map_fd: self.number(), key: &raw const *key as u64, ..Element::default() };
        // SAFETY: the key is of the map's size, and lives until the call returns.
        match unsafe { bpf(DELETE, &mut attr) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Adds what `other` has and this has not, as far as there is room: what is missing is made anew by its
    /// packets.
    fn copy(&self, other: &Self) -> Result<(), DatapathError> {
        if self.id == other.id {
            return Ok(());
        }
        other.in_batches(|batch| batch.iter().try_for_each(|(key, value)| self.add(key, value)))
    }

    /// Adds an entry, if there is none with the key and there is room.
    fn add(&self, key: &K, value: &V) -> Result<(), DatapathError> {
        let mut attr = Element {
            map_fd: self.number(),
            key: &raw const *key as u64,
            value: &raw const *value as u64,
            flags: NO_EXIST,
            ..Element::default()
        };
        // SAFETY: key and value are of the map's sizes, and live until the call returns.
        match unsafe { bpf(UPDATE, &mut attr) } {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::E2BIG)) => {
                Ok(())
            }
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Shows all entries until `each` breaks.
    fn each(
        &self,
        mut each: impl FnMut(&K, &V) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, DatapathError> {
        let mut flow = ControlFlow::Continue(());
        self.in_batches(|batch| {
            if flow.is_continue() {
                flow = batch.iter().try_for_each(|(key, value)| each(key, value));
            }
            Ok(())
        })?;
        Ok(flow)
    }

    /// Shows all entries, some at a time.
    fn in_batches(
        &self,
        mut each: impl FnMut(&[(K, V)]) -> Result<(), DatapathError>,
    ) -> Result<(), DatapathError> {
        let mut size = BATCH;
        // The kernel's own: a number of a bucket.
        let (mut place, mut next) = (None::<u32>, 0u32);
        let mut batch = Vec::new();
        loop {
            let (mut keys, mut values) = (vec![K::ZERO; size], vec![V::ZERO; size]);
            let mut attr = Batch {
                in_batch: place.as_ref().map_or(0, |place| &raw const *place as u64),
                out_batch: &raw mut next as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: size as u32,
                map_fd: self.number(),
                ..Batch::default()
            };
            // SAFETY: there is room for `count` keys and values of the map's sizes, and for the number
            // of a bucket; all of it lives until the call returns. The kernel writes the count.
            let result = unsafe { bpf(LOOKUP_BATCH, &mut attr) };
            let ended = match result {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                // A bucket has more than fit.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    size *= 2;
                    continue;
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                Err(error) => return Err(self.failed(&error)),
            };
            keys.truncate(attr.count as usize);
            batch.clear();
            batch.extend(keys.into_iter().zip(values));
            if !batch.is_empty() {
                each(&batch)?;
            }
            if ended {
                return Ok(());
            }
            place = Some(next);
        }
    }
}

/// The interface of a link that is pinned there: 0 where that is gone. None if it is no link.
pub(super) fn index_of_link(path: &Path) -> Option<u32> {
    #[repr(C)]
    struct About {
        fd: u32,
        length: u32,
        info: u64,
    }
    let fd = open_pin(path)?;
    // `struct bpf_link_info`: type, id, program, a gap, then what the type says; of XDP and TCX, the interface.
    let mut info = [0u32; 16];
    let mut about = About {
        fd: fd.as_raw_fd() as u32,
        length: size_of_val(&info) as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: there is room for as much as is said; it lives until the call returns.
    unsafe { bpf(ABOUT, &mut about) }.ok()?;
    Some(info[4])
}

/// What is pinned there.
fn open_pin(path: &Path) -> Option<OwnedFd> {
    #[repr(C)]
    struct Get {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut get = Get { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path lives until the call returns.
    let fd = unsafe { bpf(GET, &mut get) }.ok()?;
    // SAFETY: the kernel has just given it to us.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Detaches the program of a pinned link, whoever still holds that.
pub(super) fn detach_link(path: &Path) -> Option<()> {
    let link = open_pin(path)?;
    let mut which = link.as_raw_fd() as u32;
    // SAFETY: all that this command is given is which link.
    unsafe { bpf(LINK_DETACH, &mut which) }.ok().map(drop)
}

/// Whether anything was ever written to an array that can be mapped, whatever its rows are.
pub(super) fn has_bytes(name: &'static str, map: &MapData) -> Result<bool, DatapathError> {
    let failed = |message: String| DatapathError::Map { map: name, message };
    let info = map.info().map_err(|error| failed(error.to_string()))?;
    let bytes = info.max_entries() as usize * info.value_size().next_multiple_of(8) as usize;
    // SAFETY: a new mapping, of the size that the map was made with.
    let rows =
        unsafe { mmap(null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, map.fd().as_fd(), 0) };
    let rows = rows.map_err(|error| failed(error.to_string()))?;
    // SAFETY: that mapping, in words; others may write to it, which does no harm to who reads.
    let found =
        (0..bytes / 8).any(|word| unsafe { rows.cast::<u64>().add(word).read_volatile() } != 0);
    // SAFETY: nobody has a reference into it any more.
    let _: rustix::io::Result<()> = unsafe { munmap(rows, bytes) };
    Ok(found)
}

/// Whether a hash map has entries, whatever they are.
pub(super) fn has_keys(map: &MapData) -> bool {
    let mut key = [0u8; LARGEST_KEY];
    if map.info().is_ok_and(|info| info.key_size() as usize > LARGEST_KEY) {
        // Whoever has such keys had a use for them.
        return true;
    }
    let mut attr = Element {
        map_fd: map.fd().as_fd().as_raw_fd() as u32,
        value: key.as_mut_ptr() as u64,
        ..Element::default()
    };
    // SAFETY: without a key the first one is written, which has room.
    unsafe { bpf(NEXT_KEY, &mut attr) }.is_ok()
}

/// Bytes; the key of a flow of IPv6 has 40.
const LARGEST_KEY: usize = 512;

/// Reads a row of a per-CPU array of numbers, with room for those of all CPUs.
pub(super) fn look_up(map: RawFd, row: u32, numbers: &mut [u64]) -> io::Result<()> {
    let mut attr = Element {
        map_fd: map as u32,
        key: &raw const row as u64,
        value: numbers.as_mut_ptr() as u64,
        ..Element::default()
    };
    // SAFETY: the key is a row's; the caller says that the value has room. Both live until the call returns.
    unsafe { bpf(LOOK_UP, &mut attr) }.map(drop)
}

/// The system call: a file descriptor, or 0.
///
/// # Safety
///
/// As the command says of what the attributes point to.
unsafe fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<RawFd> {
    // SAFETY: the attributes are of the size given; the rest is for the caller to see to.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}
