//! The kernel's tables of flows: read in batches, swept, counted.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData};
use portfwd_ebpf::table::{
    Address, Candidate, ClientKey, Direction, FlowHalf, FlowKey, Jiffies, Mapping, MappingKey,
    Port, flow_flags,
};

use super::{Clock, DatapathError};
use crate::flows::{FlowRow, State, Timeouts};

/// How many entries are read in one system call.
const BATCH: usize = 1024;
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
    flows: Table<FlowKey<N>, FlowHalf<N>>,
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
        mut take: impl FnMut(&'static str) -> Map,
    ) -> Result<Self, DatapathError> {
        Ok(Self {
            v4: Family {
                flows: Table::new("FLOWS_V4", take("FLOWS_V4"))?,
                probation: Table::new("PROBATION_V4", take("PROBATION_V4"))?,
            },
            v6: Family {
                flows: Table::new("FLOWS_V6", take("FLOWS_V6"))?,
                probation: Table::new("PROBATION_V6", take("PROBATION_V6"))?,
            },
            mappings: Table::new("MAPPINGS", take("MAPPINGS"))?,
            clients: Table::new("CLIENTS", take("CLIENTS"))?,
            clock,
        })
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
        let mut seen = HashSet::new();
        let shown = self.flows.each(|key, half| {
            // A batch may bring an entry twice while others come and go.
            if key.direction != Direction::Forward as u8 || !seen.insert(*key) {
                return ControlFlow::Continue(());
            }
            // Without its other half it is about to end.
            match self.flows.get(&half.becomes.reversed()) {
                Ok(Some(reply)) => each(established(key, half, &reply)),
                _ => ControlFlow::Continue(()),
            }
        })?;
        if shown.is_break() {
            return Ok(shown);
        }
        seen.clear();
        self.probation.each(|key, candidate| {
            if !seen.insert(*key) {
                return ControlFlow::Continue(());
            }
            each(on_probation(key, candidate))
        })
    }

    fn count(&self, counts: &mut BTreeMap<u32, u64>) -> Result<(), DatapathError> {
        let mut add = |counter| *counts.entry(counter).or_default() += 1;
        self.flows.in_batches(|batch| {
            let forward = batch.iter().filter(|(key, _)| key.direction == Direction::Forward as u8);
            forward.for_each(|(_, half)| add(half.counter));
            Ok(())
        })?;
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
        let mut over: Vec<(FlowKey<N>, Option<Jiffies>)> = Vec::new();
        self.flows.in_batches(|batch| {
            over.clear();
            for (key, half) in batch {
                let forward = key.direction == Direction::Forward as u8;
                if !forward && idle(half.last) <= living.timeouts.tcp_transitory {
                    continue;
                }
                let twin = half.becomes.reversed();
                let backend = if forward { half.becomes.destination } else { key.source };
                if forward && !gone(half.counter, backend) && idle(half.last) <= shortest {
                    // Most flows: nothing else has to be read.
                    swept.flows += 1;
                    note_mapping(key, &half.becomes, used);
                    continue;
                }
                let other = self.flows.get(&twin)?;
                let Some(reply) = other.filter(|other| other.becomes == key.reversed()) else {
                    // One half alone. A packet of the client's makes it whole again, or anew.
                    if forward
                        || gone(half.counter, backend)
                        || idle(half.last) > living.timeouts.tcp
                    {
                        over.push((*key, None));
                    }
                    continue;
                };
                if !forward {
                    continue;
                }
                let row = established(key, half, &reply);
                if gone(half.counter, backend)
                    || idle(row.last) > living.timeouts.limit(row.protocol, row.state)
                {
                    swept.ended += 1;
                    over.push((*key, Some(reply.last)));
                } else {
                    swept.flows += 1;
                    note_mapping(key, &half.becomes, used);
                }
            }
            for (key, reply_seen) in &over {
                self.end(key, *reply_seen)?;
            }
            pause();
            Ok(())
        })?;
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
    /// Ends a flow, of which this is a key, and whose other half had its last packet then.
    ///
    /// The forward half goes first: a packet of the client's in between finds the reply's and makes it
    /// whole again, so that is looked at once more; and should both cross, the forward half that was
    /// made anew goes too, as one without the other is of no use.
    fn end(&self, key: &FlowKey<N>, reply_seen: Option<Jiffies>) -> Result<(), DatapathError> {
        let half = self.flows.get(key)?;
        self.flows.remove(key)?;
        let (Some(half), Some(seen)) = (half, reply_seen) else { return Ok(()) };
        let twin = half.becomes.reversed();
        if self.flows.get(&twin)?.is_some_and(|reply| reply.last == seen) {
            self.flows.remove(&twin)?;
            self.flows.remove(key)?;
        }
        Ok(())
    }
}

/// If a client that has `came` is seen by another address, that mapping is used.
fn note_mapping<const N: usize>(
    came: &FlowKey<N>,
    goes: &FlowKey<N>,
    used: &mut HashSet<MappingKey>,
) {
    if came.source != goes.source {
        let (address, port) = (goes.source.widen(), goes.source_port);
        let protocol = came.protocol;
        used.insert(MappingKey { address, port, protocol, padding: [0; 5] });
    }
}

fn established<const N: usize>(
    key: &FlowKey<N>,
    forward: &FlowHalf<N>,
    reply: &FlowHalf<N>,
) -> FlowRow
where
    Address<N>: ToIp,
{
    // What comes after a RST says that it was not heeded (RFC 7857, section 2.1).
    let reset = |half: &FlowHalf<N>, other: &FlowHalf<N>| {
        half.flags & flow_flags::RESET != 0 && other.last <= half.last
    };
    let reset = reset(forward, reply) || reset(reply, forward);
    let ended = forward.flags & reply.flags & flow_flags::FIN != 0;
    FlowRow {
        state: if reset || ended { State::Closing } else { State::Established },
        created: forward.created.into(),
        last: forward.last.max(reply.last),
        forward: forward.tally,
        reply: reply.tally,
        ..row(key, &forward.becomes, forward.counter)
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
        created: (*created).into(),
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

impl ToIp for Address<16> {
    fn to_ip(self) -> IpAddr {
        self.0.into()
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
    [const N: usize] FlowHalf<N>,
    [const N: usize] Candidate<N>,
    [] MappingKey,
    [] Mapping,
    [] ClientKey,
    [] Port
);

/// A hash map of the kernel. aya has no batch operations, and its maps cannot be used by several threads
/// at once.
struct Table<K, V> {
    name: &'static str,
    map: MapData,
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

// enum bpf_cmd (linux/bpf.h); batches since 5.6 (kernel 05799638dbb2).
const LOOKUP: libc::c_long = 1;
const DELETE: libc::c_long = 3;
const LOOKUP_BATCH: libc::c_long = 24;

impl<K: Bytes, V: Bytes> Table<K, V> {
    fn new(name: &'static str, map: Map) -> Result<Self, DatapathError> {
        let (Map::HashMap(map) | Map::LruHashMap(map)) = map else {
            return Err(DatapathError::Map { map: name, message: "it is no hash map".to_owned() });
        };
        Ok(Self { name, map, types: std::marker::PhantomData })
    }

    fn number(&self) -> u32 {
        self.map.fd().as_fd().as_raw_fd() as u32
    }

    fn failed(&self, error: &io::Error) -> DatapathError {
        DatapathError::Map { map: self.name, message: error.to_string() }
    }

    fn get(&self, key: &K) -> Result<Option<V>, DatapathError> {
        let mut value = V::ZERO;
        let mut attr = Element {
            map_fd: self.number(),
            key: &raw const *key as u64,
            value: &raw mut value as u64,
            ..Element::default()
        };
        // SAFETY: key and value are of the map's sizes, and live until the call returns.
        match unsafe { bpf(LOOKUP, &mut attr) } {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Whether it was there.
    fn remove(&self, key: &K) -> Result<bool, DatapathError> {
        let mut attr =
            Element { map_fd: self.number(), key: &raw const *key as u64, ..Element::default() };
        // SAFETY: the key is of the map's size, and lives until the call returns.
        match unsafe { bpf(DELETE, &mut attr) } {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
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
                Ok(()) => false,
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

/// The system call.
///
/// # Safety
///
/// As the command says of what the attributes point to.
unsafe fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<()> {
    // SAFETY: the attributes are of the size given; the rest is for the caller to see to.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
