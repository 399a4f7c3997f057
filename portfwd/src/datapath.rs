//! The datapath in the kernel: programs, maps and links. The only module that knows aya.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, ProgramArray, xdp::DevMap};
use aya::programs::links::Link as _;
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{ProgramError, ProgramFd, TestRun as _, TestRunOptions, Xdp};
use aya::util::nr_cpus;
use aya::{Ebpf, EbpfError, EbpfLoader, Pod};
use portfwd_ebpf::flow_table::WINDOW;
use portfwd_ebpf::path::{Part, Role};
use portfwd_ebpf::table::{
    Address, Counter, Direction, Dropped, Endpoint, Favourite, HOP_BITS, Interface, Jiffies,
    LAYOUT, Page, Passed, RouteSet, Settings, Tally, ToStack, Translation, Trust,
};
use thiserror::Error;
use tracing::warn;

pub use self::flow_tables::{FlowTables, Living, Swept};
use crate::compile::{BoxPorts, Capacity, EndpointKey, FlowRoom, Update};
use crate::config::Attach;
use crate::sysctl::Families;

mod flow_tables;

/// The compiled eBPF half; `build.rs` makes it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/portfwd"));

/// How long packets may look at rows that are no longer live, where the kernel does not tell. A run
/// of the program takes microseconds.
const GRACE: Duration = Duration::from_millis(100);

/// Why the kernel did not take what it was given: one line.
#[derive(Debug, Error)]
pub enum DatapathError {
    #[error(
        "the kernel refuses BPF ({0}): run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    )]
    NotPermitted(String),
    #[error("this kernel has no BPF ({0}): portfwd needs CONFIG_BPF_SYSCALL and CONFIG_BPF_JIT")]
    NoBpf(String),
    #[error("cannot load the eBPF object: {0}")]
    Load(String),
    #[error("the kernel's verifier refuses program {program}: {message}")]
    Verifier { program: &'static str, message: String },
    #[error("cannot run a program on a frame: {0}")]
    TryFrame(String),
    #[error("cannot write map {map}: {message}")]
    Map { map: &'static str, message: String },
    #[error("portfwd forwards between at most {DEVICES} interfaces")]
    TooManyDevices,
}

/// Why an interface cannot be attached to: one line.
#[derive(Debug, Error)]
pub enum AttachError {
    #[error(
        "{interface}: another XDP program is attached, to it or to its bridge or bond; stop the portfwd that it belongs to, or take it off with `ip link set dev {interface} xdp off`, or `bpftool net detach xdp dev {interface}`"
    )]
    Busy { interface: String },
    #[error(
        "{interface}: MTU {mtu} is too large for native XDP here ({message}); lower it with `ip link set dev {interface} mtu 1500`, or set attach = \"generic\""
    )]
    Mtu { interface: String, mtu: u32, message: String },
    #[error("{interface}: cannot attach {mode} XDP: {message}")]
    Other { interface: String, mode: Mode, message: String },
}

/// How a program is attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the stack, for drivers without XDP: slower.
    Generic,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

impl From<Mode> for XdpMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Native => Self::Driver,
            Mode::Generic => Self::Skb,
        }
    }
}

/// How many interfaces frames can be redirected to; the size of `DEVICES`.
const DEVICES: u32 = 1024;

/// The routes that the programs remember, to be forgotten when they may have changed. A handle: its
/// clones are one.
#[derive(Clone)]
pub struct Routes(Arc<Mutex<Trusted>>);

struct Trusted {
    clock: Clock,
    map: Array<MapData, Plain<Trust>>,
    /// IPv4, IPv6.
    now: [Trust; 2],
}

impl Routes {
    /// Voids all that is remembered, and has the programs remember what the FIB says from now on, but
    /// for no longer than `time`; of the families that are not to be relied on, nothing.
    ///
    /// # Errors
    ///
    /// The kernel says why.
    pub fn rely(&self, families: Families, time: Duration) -> Result<(), DatapathError> {
        let until = self.lock().clock.at(Instant::now() + time);
        let never = Jiffies::default();
        let of = |relied, trust| Trust { until: if relied { until } else { never }, ..next(trust) };
        self.write(|[v4, v6]| [of(families.v4, v4), of(families.v6, v6)])
    }

    /// Voids all that is remembered.
    ///
    /// # Errors
    ///
    /// The kernel says why.
    pub fn forget(&self) -> Result<(), DatapathError> {
        self.write(|families| families.map(next))
    }

    fn lock(&self) -> MutexGuard<'_, Trusted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, change: impl FnOnce([Trust; 2]) -> [Trust; 2]) -> Result<(), DatapathError> {
        let mut trusted = self.lock();
        trusted.now = change(trusted.now);
        for (family, trust) in trusted.now.into_iter().enumerate() {
            trusted.map.set(family as u32, Plain(trust), 0).map_err(map_error("TRUST"))?;
        }
        Ok(())
    }
}

/// The kernel's clock of [`Jiffies`], read once; it goes as CLOCK_MONOTONIC does.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    read: Jiffies,
    when: Instant,
    tick: Duration,
}

impl Clock {
    /// From a reading.
    pub(crate) fn new(read: Jiffies, when: Instant) -> Self {
        Self { read, when, tick: Self::tick() }
    }

    fn tick() -> Duration {
        // The coarse clock is as fine as the ticks are; the kernel says so in nanoseconds.
        let tick = rustix::time::clock_getres(rustix::time::ClockId::MonotonicCoarse);
        Duration::try_from(tick).unwrap_or_default().max(Duration::from_micros(1))
    }

    /// What it shows at some time, not before it was read.
    fn at(&self, time: Instant) -> Jiffies {
        let elapsed = time.saturating_duration_since(self.when).as_nanos();
        Jiffies(self.read.0.saturating_add((elapsed / self.tick.as_nanos()) as u64))
    }

    /// How long before `now` it showed `then`.
    pub fn between(&self, then: Jiffies, now: Instant) -> Duration {
        let ticks = self.at(now).0.saturating_sub(then.0);
        Duration::from_nanos(ticks.saturating_mul(self.tick.as_nanos() as u64))
    }
}

/// In the next generation. Packets look at 31 bits of it, of which one is set: 0 is none.
fn next(trust: Trust) -> Trust {
    Trust { generation: (trust.generation.wrapping_add(1) & (u32::MAX >> 1)).max(1), ..trust }
}

/// What XDP does with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Drop,
    Pass,
    Redirect,
}

/// An interface to attach to.
#[derive(Clone, Copy, Debug)]
pub struct Port<'a> {
    pub index: u32,
    pub name: &'a str,
    pub mtu: u32,
}

/// A rule's counts, summed over CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counts {
    pub forward: Tally,
    pub reply: Tally,
    /// When the last was translated; 0 for never.
    pub last: Jiffies,
    pub to_stack: [u64; ToStack::COUNT],
    pub dropped: [u64; Dropped::COUNT],
    /// Flows that began.
    pub flows: u64,
    /// Packets of flows that could not be established.
    pub crowded: u64,
    /// Of the dropped, how many were answered with an ICMP error.
    pub answered: u64,
}

/// What the verifier said of a program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verified {
    pub program: &'static str,
    /// Instructions that the verifier went through; its limit is a million.
    pub instructions: Option<u32>,
    /// Bytes of the program after translation.
    pub size: Option<u32>,
    /// Time to verify, compile and load it.
    pub time: Duration,
}

/// A type of the tables, as aya wants it: bytes without padding, checked in `table`.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T>(T);

/// The types that stand in maps.
trait Row: Copy + 'static {}
impl<const N: usize> Row for Address<N> {}
impl Row for Endpoint {}
impl Row for Page {}
impl Row for Translation {}
impl Row for Counter {}
impl Row for Interface {}
impl Row for Settings {}
impl Row for Trust {}
// SAFETY: each `Row` is `repr(C)` without padding (asserted in `table`). Rows that are read back
// from the kernel hold integers only.
unsafe impl<T: Row> Pod for Plain<T> {}

/// The loaded datapath. Dropping it detaches every program and frees the maps.
pub struct Datapath {
    ebpf: Ebpf,
    verified: Vec<Verified>,
    links: BTreeMap<u32, (XdpLink, Mode)>,
    capacity: Capacity,
    generation: u32,
    /// Addresses that [`Settings`] leads from, and their rows, by direction.
    favourites: [Option<(EndpointKey, u32)>; 2],
    /// Ends when no packet looks at the generation before the live one any more.
    readers: Option<thread::JoinHandle<()>>,
    /// The ports for masquerade, and the seed of their choice.
    masquerade: ([u16; 2], u32),
    flows: Arc<FlowTables>,
    /// The kernel empties it when nobody holds it.
    _parts: ProgramArray<MapData>,
    /// Numbers of `DEVICES` by interface index.
    devices: BTreeMap<u32, u32>,
    next_device: u32,
    routes: Routes,
    /// Empty once nobody holds it.
    _detours: ProgramArray<MapData>,
}

impl Datapath {
    /// Loads programs and maps; nothing is attached yet. With `log` the programs tell what becomes of
    /// each packet that a rule claims; without, the verifier removes that code.
    ///
    /// # Errors
    ///
    /// No permission, no BPF in the kernel, or a kernel that refuses the object.
    pub fn load(capacity: Capacity, ports: &BoxPorts, log: bool) -> Result<Self, DatapathError> {
        let cpus = nr_cpus().map_or(1, |cpus| cpus as u32);
        let bits = route_set_bits(cpus);
        let second = (Duration::from_secs(1).as_nanos() / Clock::tick().as_nanos()) as u32;
        let level: u8 = if log { aya_log::Level::Debug as u8 } else { 0 };
        let FlowRoom { v4, v6 } = capacity.flows;
        let seed = RandomState::new().hash_one(1);
        let mut ebpf = EbpfLoader::new()
            .override_global(aya_log::LEVEL, &level, true)
            .override_global("ROUTE_SET_BITS", &bits, true)
            .override_global("SECOND", &second, true)
            .map_max_entries("ROUTES_V4", (2 * cpus) << bits)
            .map_max_entries("ROUTES_V6", (2 * cpus) << bits)
            .map_max_entries("HOPS", cpus << HOP_BITS)
            .map_max_entries("ENDPOINTS", capacity.endpoints)
            .map_max_entries("LISTENS_V4", capacity.endpoints)
            .map_max_entries("LISTENS_V6", capacity.endpoints)
            .map_max_entries("BACKENDS_V4", capacity.endpoints)
            .map_max_entries("BACKENDS_V6", capacity.endpoints)
            .map_max_entries("TRANSLATIONS", capacity.translations)
            .map_max_entries("PAGES", capacity.pages)
            .map_max_entries("COUNTERS", capacity.counters)
            .override_global("FLOW_HOMES_V4", &v4.homes(), true)
            .override_global("FLOW_HOMES_V6", &v6.homes(), true)
            .override_global("FLOW_SEED", &seed, true)
            .map_max_entries("FLOWS_V4", v4.homes() + WINDOW - 1)
            .map_max_entries("FLOWS_V6", v6.homes() + WINDOW - 1)
            .map_max_entries("PROBATION_V4", v4.probation())
            .map_max_entries("PROBATION_V6", v6.probation())
            .map_max_entries("MAPPINGS", capacity.mappings)
            .map_max_entries("CLIENTS", capacity.mappings)
            .load(OBJECT)
            .map_err(load_error)?;
        let mut verified = Vec::new();
        let clock = xdp_mut(&mut ebpf, CLOCK);
        clock.load().map_err(|error| verifier_error(CLOCK, error))?;
        let (read, when) = read_clock(clock)?;
        let clock = Clock::new(read, when);
        let common = ROLES.map(program_name).into_iter().chain(DIRECTIONS.map(detour_name));
        // Those of a family that no rule has would only take their time to be verified.
        let is_needed = |part: &&&str| if part.ends_with("v6") { v6.0 > 1 } else { v4.0 > 1 };
        for program in common.chain(PARTS.iter().filter(is_needed).copied()) {
            let xdp = xdp_mut(&mut ebpf, program);
            let start = Instant::now();
            load(xdp).map_err(|error| verifier_error(program, error))?;
            let info = xdp.info().map_err(|error| verifier_error(program, error))?;
            verified.push(Verified {
                program,
                instructions: info.verified_instruction_count(),
                size: info.size_translated(),
                time: start.elapsed(),
            });
        }
        let mut take = |name| ebpf.take_map(name).unwrap_or_else(|| missing(name));
        let mut parts = ProgramArray::try_from(take("PARTS")).map_err(map_error("PARTS"))?;
        let mut detours = ProgramArray::try_from(take("DETOURS")).map_err(map_error("DETOURS"))?;
        let flows = Arc::new(FlowTables::new(clock, seed, &mut take)?);
        let trust = Array::try_from(take("TRUST")).map_err(map_error("TRUST"))?;
        for (number, program) in PARTS.iter().enumerate().filter(|(_, it)| is_needed(it)) {
            let fd = xdp_mut(&mut ebpf, program).fd();
            let fd = fd.map_err(|error| verifier_error(program, error))?;
            parts.set(number as u32, fd, 0).map_err(map_error("PARTS"))?;
        }
        for direction in DIRECTIONS {
            let program = detour_name(direction);
            let fd = xdp_mut(&mut ebpf, program).fd();
            let fd = fd.map_err(|error| verifier_error(program, error))?;
            detours.set(direction as u32, fd, 0).map_err(map_error("DETOURS"))?;
        }
        let routes =
            Routes(Arc::new(Mutex::new(Trusted { clock, map: trust, now: Default::default() })));
        let mut datapath = Self {
            ebpf,
            verified,
            links: BTreeMap::new(),
            capacity,
            generation: 0,
            favourites: [None; 2],
            readers: None,
            // Nobody outside shall know it: it says which ports clients get.
            masquerade: (
                [*ports.masquerade.start(), *ports.masquerade.end()],
                RandomState::new().hash_one(0) as u32,
            ),
            flows,
            _parts: parts,
            devices: BTreeMap::new(),
            next_device: 0,
            routes,
            _detours: detours,
        };
        datapath.write_settings()?;
        Ok(datapath)
    }

    /// How many rows the tables hold.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The clock of [`Counts::last`].
    pub fn clock(&self) -> Clock {
        self.routes.lock().clock
    }

    /// The routes that the programs remember.
    pub fn routes(&self) -> Routes {
        self.routes.clone()
    }

    /// The tables of flows.
    pub fn flows(&self) -> Arc<FlowTables> {
        self.flows.clone()
    }

    /// What the verifier said of each program.
    pub fn verified(&self) -> &[Verified] {
        &self.verified
    }

    /// The program of `role`, for those who measure it.
    ///
    /// # Errors
    ///
    /// It is not loaded.
    pub fn program(&self, role: Role) -> Result<&ProgramFd, ProgramError> {
        match self.ebpf.program(program_name(role)) {
            Some(program) => program.fd(),
            None => Err(ProgramError::NotLoaded),
        }
    }

    /// Runs the program of `role` on one frame as if it came in by the interface with index `ingress`:
    /// what XDP would do, and the frame as it left. Counters count.
    ///
    /// # Errors
    ///
    /// The kernel refuses: a frame shorter than 14 bytes, or no such interface.
    pub fn try_frame(
        &mut self,
        role: Role,
        ingress: u32,
        frame: &[u8],
    ) -> Result<(Action, Vec<u8>), DatapathError> {
        /// The room that the kernel leaves behind a frame of its test run.
        const ROOM: usize = 4096;
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
        let mut after = vec![0; ROOM.max(frame.len())];
        let result = xdp_mut(&mut self.ebpf, program_name(role))
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut after),
                ctx_in: Some(&context),
                ..TestRunOptions::default()
            })
            .map_err(|error| DatapathError::TryFrame(chain(&error)))?;
        after.truncate(result.data_size_out as usize);
        let action = match result.return_value {
            1 => Action::Drop,
            2 => Action::Pass,
            4 => Action::Redirect,
            other => {
                return Err(DatapathError::TryFrame(format!("XDP action {other} is none of ours")));
            }
        };
        Ok((action, after))
    }

    /// The messages of the programs that were loaded with `log`.
    ///
    /// # Errors
    ///
    /// Taken already, or loaded without.
    pub fn logger(&mut self) -> Result<aya_log::EbpfLogger<&'static dyn log::Log>, aya_log::Error> {
        aya_log::EbpfLogger::init(&mut self.ebpf)
    }

    /// Writes all rows of `update` and makes them live at once.
    ///
    /// # Errors
    ///
    /// A map is full or out of memory: what was live stays live.
    pub fn apply(&mut self, update: &Update) -> Result<(), DatapathError> {
        // Rows of the generation before the live one are written over.
        if let Some(readers) = self.readers.take() {
            readers.join().unwrap_or_else(|_| thread::sleep(GRACE));
        }
        let mut translations = self.array::<Translation>("TRANSLATIONS")?;
        for (number, row) in &update.translations {
            translations.set(*number, Plain(*row), 0).map_err(map_error("TRANSLATIONS"))?;
        }
        let mut pages = self.array::<Page>("PAGES")?;
        for (number, page) in &update.pages {
            pages.set(*number, Plain(page.page()), 0).map_err(map_error("PAGES"))?;
        }
        let capacity = self.capacity;
        let mut endpoints = self.array::<Endpoint>("ENDPOINTS")?;
        for (number, endpoint) in &update.endpoints {
            if !capacity.has_endpoint(*number) && *endpoint == Endpoint::default() {
                continue;
            }
            endpoints.set(*number, Plain(*endpoint), 0).map_err(map_error("ENDPOINTS"))?;
        }
        // What leads to a row is never written anew: the kernel gives the memory of an entry that it
        // replaces or removes to the next one, while packets still look at it.
        for (key, number) in update.new.iter().filter(|(_, it)| capacity.has_endpoint(*it)) {
            self.write_address(key, Some(*number))?;
        }

        for direction in [Direction::Forward, Direction::Reply] {
            let favourite = &mut self.favourites[direction as usize];
            *favourite = match favourite {
                Some((key, _)) if update.gone.contains(key) => None,
                Some(_) => continue,
                // The lowest: which of several it is does not matter.
                None => {
                    let of_this =
                        |(key, _): &&(EndpointKey, u32)| key.0 == direction && key.1.is_ipv4();
                    update.new.iter().filter(of_this).min().copied()
                }
            };
        }
        self.generation = update.generation;
        self.write_settings()?;
        // What is live now stays, whatever becomes of these: their rows claim nothing.
        let removed: Result<(), _> =
            update.gone.iter().try_for_each(|key| self.write_address(key, None));
        if let Err(error) = removed {
            warn!("{error}; what was removed there stays in the way of later changes");
        }
        // While nobody waits for it: it takes several milliseconds.
        let waiting = thread::Builder::new().name("readers".to_owned()).spawn(wait_for_readers);
        self.readers = waiting.map_err(|_| wait_for_readers()).ok();
        Ok(())
    }

    /// Makes an address lead to this row of the endpoints, or to none.
    fn write_address(
        &mut self,
        (direction, address): &EndpointKey,
        row: Option<u32>,
    ) -> Result<(), DatapathError> {
        let [v4, v6] = match direction {
            Direction::Forward => ["LISTENS_V4", "LISTENS_V6"],
            Direction::Reply => ["BACKENDS_V4", "BACKENDS_V6"],
        };
        match address {
            IpAddr::V4(address) => self.write_key(v4, Address(address.octets()), row),
            IpAddr::V6(address) => self.write_key(v6, Address(address.octets()), row),
        }
    }

    fn write_key<K: Row>(
        &mut self,
        map: &'static str,
        key: K,
        row: Option<u32>,
    ) -> Result<(), DatapathError> {
        let mut rows: HashMap<&mut MapData, Plain<K>, u32> =
            HashMap::try_from(self.map_mut(map)).map_err(map_error(map))?;
        match row {
            Some(row) => rows.insert(Plain(key), row, 0).map_err(map_error(map)),
            None => match rows.remove(&Plain(key)) {
                Err(error) if os_error(&error) != Some(libc::ENOENT) => Err(map_error(map)(error)),
                _ => Ok(()),
            },
        }
    }

    fn write_settings(&mut self) -> Result<(), DatapathError> {
        let favourites = self.favourites.map(|favourite| match favourite {
            Some(((_, IpAddr::V4(address)), row)) => {
                Favourite { address: Address(address.octets()), row }
            }
            _ => Favourite::NONE,
        });
        let Self { generation, masquerade: (masquerade, seed), .. } = *self;
        let settings = Settings { layout: LAYOUT, generation, favourites, masquerade, seed };
        let mut map = self.array::<Settings>("SETTINGS")?;
        map.set(0, Plain(settings), 0).map_err(map_error("SETTINGS"))
    }

    /// Tells the programs which interfaces are external, and to which frames can be redirected. All
    /// others are taken out. [`Interface::device`] is settled here, whatever it was.
    ///
    /// # Errors
    ///
    /// A map is full.
    pub fn set_interfaces(
        &mut self,
        interfaces: &BTreeMap<u32, Interface>,
    ) -> Result<(), DatapathError> {
        let written = self.write_interfaces(interfaces);
        // Also after half of it.
        self.routes.forget()?;
        written
    }

    fn write_interfaces(
        &mut self,
        interfaces: &BTreeMap<u32, Interface>,
    ) -> Result<(), DatapathError> {
        let mut map: HashMap<&mut MapData, u32, Plain<Interface>> =
            HashMap::try_from(self.map_mut("INTERFACES")).map_err(map_error("INTERFACES"))?;
        let there: BTreeMap<u32, Interface> = map
            .iter()
            .map(|row| row.map(|(index, Plain(interface))| (index, interface)))
            .collect::<Result<_, _>>()
            .map_err(map_error("INTERFACES"))?;
        for index in there.keys().filter(|index| !interfaces.contains_key(index)) {
            map.remove(index).map_err(map_error("INTERFACES"))?;
        }
        // A device keeps its number, and a number that is free again is the last to be given: routes
        // that are remembered may still lead there.
        self.devices.retain(|index, _| interfaces.contains_key(index));
        for (index, interface) in interfaces {
            if interface.has(Interface::TRANSMITS) && !self.devices.contains_key(index) {
                let used: BTreeSet<u32> = self.devices.values().copied().collect();
                let numbers = (self.next_device..DEVICES).chain(0..self.next_device);
                let device = numbers
                    .into_iter()
                    .find(|number| !used.contains(number))
                    .ok_or(DatapathError::TooManyDevices)?;
                self.devices.insert(*index, device);
                self.next_device = (device + 1) % DEVICES;
            }
        }
        let devices = self.devices.clone();
        // Only what differs is written. The kernel takes devices out that are gone.
        let mut map: DevMap<&mut MapData> =
            DevMap::try_from(self.map_mut("DEVICES")).map_err(map_error("DEVICES"))?;
        for (index, device) in &devices {
            if !map.get(*device, 0).is_ok_and(|there| there.if_index == *index) {
                map.set(*device, *index, None, 0).map_err(map_error("DEVICES"))?;
            }
        }
        let mut map: HashMap<&mut MapData, u32, Plain<Interface>> =
            HashMap::try_from(self.map_mut("INTERFACES")).map_err(map_error("INTERFACES"))?;
        for (index, interface) in interfaces {
            let device = devices.get(index).copied().unwrap_or_default();
            let interface = Interface { device, ..*interface };
            if there.get(index) != Some(&interface) {
                map.insert(index, Plain(interface), 0).map_err(map_error("INTERFACES"))?;
            }
        }
        Ok(())
    }

    /// Attaches the program of `role` to an interface, or replaces the one that is there; `auto`
    /// tries native first. Returns how it is attached, and why not natively if it is not.
    ///
    /// # Errors
    ///
    /// Another program is there, the MTU is too large, or the kernel says why.
    pub fn attach(
        &mut self,
        port: Port<'_>,
        role: Role,
        attach: Attach,
    ) -> Result<(Mode, Option<String>), AttachError> {
        // The program of a link is replaced without a gap.
        if let Some((link, mode)) = self.links.remove(&port.index)
            && let xdp = xdp_mut(&mut self.ebpf, program_name(role))
            && let Ok(link) = xdp.attach_to_link(link).and_then(|id| xdp.take_link(id))
        {
            self.links.insert(port.index, (link, mode));
            return Ok((mode, None));
        }
        match attach {
            Attach::Native => {
                self.attach_as(port, role, Mode::Native).map(|()| (Mode::Native, None))
            }
            Attach::Generic => {
                self.attach_as(port, role, Mode::Generic).map(|()| (Mode::Generic, None))
            }
            Attach::Auto => match self.attach_as(port, role, Mode::Native) {
                Ok(()) => Ok((Mode::Native, None)),
                Err(busy @ AttachError::Busy { .. }) => Err(busy),
                Err(AttachError::Mtu { message, .. } | AttachError::Other { message, .. }) => self
                    .attach_as(port, role, Mode::Generic)
                    .map(|()| (Mode::Generic, Some(message))),
            },
        }
    }

    fn attach_as(&mut self, port: Port<'_>, role: Role, mode: Mode) -> Result<(), AttachError> {
        let interface = port.name.to_owned();
        let xdp = xdp_mut(&mut self.ebpf, program_name(role));
        let link = xdp
            .attach_to_if_index(port.index, mode.into())
            .and_then(|id| xdp.take_link(id))
            .map_err(|error| {
                let message = chain(&error);
                match os_error(&error) {
                    Some(libc::EBUSY | libc::EEXIST) => AttachError::Busy { interface },
                    Some(libc::ERANGE) => {
                        AttachError::Mtu { interface, mtu: port.mtu, message: reason(libc::ERANGE) }
                    }
                    Some(code) => AttachError::Other { interface, mode, message: reason(code) },
                    None => AttachError::Other { interface, mode, message },
                }
            })?;
        self.links.insert(port.index, (link, mode));
        Ok(())
    }

    /// Detaches from an interface, which may be gone.
    pub fn detach(&mut self, index: u32) {
        if let Some((link, _)) = self.links.remove(&index) {
            // The link's file descriptor is closed either way, and that is what detaches.
            let _: Result<(), ProgramError> = link.detach();
        }
    }

    /// A rule's counts. `row` is what [`Compiler::counter`](crate::compile::Compiler::counter) says.
    ///
    /// # Errors
    ///
    /// There is no such row.
    pub fn counts(&self, row: u32) -> Result<Counts, DatapathError> {
        let map: PerCpuArray<&MapData, Plain<Counter>> =
            PerCpuArray::try_from(self.map("COUNTERS")).map_err(map_error("COUNTERS"))?;
        let cpus = map.get(&row, 0).map_err(map_error("COUNTERS"))?;
        let mut sum = Counts {
            forward: Tally::default(),
            reply: Tally::default(),
            last: Jiffies::default(),
            to_stack: [0; ToStack::COUNT],
            dropped: [0; Dropped::COUNT],
            flows: 0,
            crowded: 0,
            answered: 0,
        };
        for Plain(counter) in cpus.iter() {
            let Counter {
                translated: [forward, reply],
                last,
                to_stack,
                dropped,
                flows,
                crowded,
                answered,
            } = counter;
            sum.flows += flows;
            sum.crowded += crowded;
            sum.forward.packets += forward.packets;
            sum.forward.bytes += forward.bytes;
            sum.reply.packets += reply.packets;
            sum.reply.bytes += reply.bytes;
            sum.last = sum.last.max(*last);
            sum.answered += answered;
            for (sum, count) in sum.to_stack.iter_mut().zip(to_stack) {
                *sum += count;
            }
            for (sum, count) in sum.dropped.iter_mut().zip(dropped) {
                *sum += count;
            }
        }
        Ok(sum)
    }

    /// Packets that passed untouched, by [`Passed`], summed over CPUs.
    ///
    /// # Errors
    ///
    /// The kernel says why.
    pub fn passed(&self) -> Result<[u64; Passed::COUNT], DatapathError> {
        let map: PerCpuArray<&MapData, u64> =
            PerCpuArray::try_from(self.map("PASSED")).map_err(map_error("PASSED"))?;
        let mut sums = [0; Passed::COUNT];
        for (reason, sum) in sums.iter_mut().enumerate() {
            let cpus = map.get(&(reason as u32), 0).map_err(map_error("PASSED"))?;
            *sum = cpus.iter().sum();
        }
        Ok(sums)
    }

    fn array<T: Row>(
        &mut self,
        map: &'static str,
    ) -> Result<Array<&mut MapData, Plain<T>>, DatapathError> {
        Array::try_from(self.map_mut(map)).map_err(map_error(map))
    }

    fn map(&self, name: &'static str) -> &Map {
        self.ebpf.map(name).unwrap_or_else(|| missing(name))
    }

    fn map_mut(&mut self, name: &'static str) -> &mut Map {
        self.ebpf.map_mut(name).unwrap_or_else(|| missing(name))
    }
}

/// Returns once no packet looks at the rows that were live when this was called.
fn wait_for_readers() {
    // MEMBARRIER_CMD_GLOBAL is synchronize_rcu(), which XDP programs run under.
    const GLOBAL: libc::c_long = 1;
    // SAFETY: takes three integers.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } != 0 {
        // Not with nohz_full.
        thread::sleep(GRACE);
    }
}

fn missing(map: &str) -> ! {
    unreachable!("the object that was built in has {map}")
}

/// Bits of the hash that leads to a set of routes: 65,536 routes a CPU and family where memory allows,
/// half of them for each direction.
fn route_set_bits(cpus: u32) -> u32 {
    const MEMORY: u32 = 64 << 20;
    const SETS: usize = size_of::<RouteSet<4>>() + size_of::<RouteSet<16>>();
    let sets = MEMORY / (2 * SETS as u32) / cpus.max(1);
    sets.max(2).ilog2().min(14)
}

/// Its program of that name tells the kernel's clock.
const CLOCK: &str = "clock";

/// The kernel's clock, and when it was read.
fn read_clock(clock: &Xdp) -> Result<(Jiffies, Instant), DatapathError> {
    let mut frame = [0; 64];
    let options = TestRunOptions {
        data_in: Some(&[0; 64]),
        data_out: Some(&mut frame),
        ..TestRunOptions::default()
    };
    clock.test_run(options).map_err(|error| DatapathError::TryFrame(chain(&error)))?;
    let [first, ..] = *frame.as_chunks().0 else { unreachable!("a frame of 64 bytes") };
    Ok((Jiffies(u64::from_ne_bytes(first)), Instant::now()))
}

/// The programs of [`portfwd_ebpf::path::Part`], by their number.
const PARTS: [&str; Part::PROGRAMS as usize] = [
    "forward_v4",
    "forward_v6",
    "reply_v4",
    "reply_v6",
    "hairpin_v4",
    "hairpin_v6",
    "find_forward_v4",
    "find_forward_v6",
    "find_reply_v4",
    "find_reply_v6",
    "send_forward_v4",
    "send_forward_v6",
    "send_reply_v4",
    "send_reply_v6",
];

const ROLES: [Role; 3] = [Role::External, Role::Internal, Role::Both];
const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Reply];

fn program_name(role: Role) -> &'static str {
    match role {
        Role::External => "external",
        Role::Internal => "internal",
        Role::Both => "both",
    }
}

/// The program to which others jump with the few packets of a direction.
fn detour_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Forward => "forward_detour",
        Direction::Reply => "reply_detour",
    }
}

fn xdp_mut<'a>(ebpf: &'a mut Ebpf, program: &str) -> &'a mut Xdp {
    ebpf.program_mut(program)
        .and_then(|program| <&mut Xdp>::try_from(program).ok())
        .unwrap_or_else(|| unreachable!("the object that was built in has its programs"))
}

fn map_error<E: std::error::Error>(map: &'static str) -> impl Fn(E) -> DatapathError {
    move |error| DatapathError::Map { map, message: chain(&error) }
}

fn load_error(error: EbpfError) -> DatapathError {
    let message = chain(&error);
    match os_error(&error) {
        Some(libc::EPERM | libc::EACCES) => DatapathError::NotPermitted(message),
        Some(libc::ENOSYS) => DatapathError::NoBpf(message),
        _ => DatapathError::Load(message),
    }
}

/// Loads a program. A signal that comes meanwhile has the verifier give up with EAGAIN: then again, as libbpf
/// does.
fn load(program: &mut Xdp) -> Result<(), ProgramError> {
    const ATTEMPTS: u32 = 5;
    for _ in 1..ATTEMPTS {
        match program.load() {
            Err(error) if os_error(&error) == Some(libc::EAGAIN) => {}
            result => return result,
        }
    }
    program.load()
}

fn verifier_error(program: &'static str, error: ProgramError) -> DatapathError {
    let message = match &error {
        // The log is thousands of lines; the verdict stands near its end.
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let verdict = log
                .lines()
                .rev()
                .find(|line| {
                    let statistics = ["verification time", "stack depth", "processed"];
                    !line.is_empty() && !statistics.iter().any(|start| line.starts_with(start))
                })
                .unwrap_or_default()
                .to_owned();
            format!("{io_error}: {verdict}")
        }
        error => chain(error),
    };
    match os_error(&error) {
        Some(libc::EPERM) => DatapathError::NotPermitted(message),
        _ => DatapathError::Verifier { program, message },
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let text = error.to_string();
        if !message.ends_with(&text) {
            message = format!("{message}: {text}");
        }
        source = error.source();
    }
    message.replace('\n', " ")
}

/// The system's error number at the end of a chain of errors.
fn os_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut error = Some(error);
    while let Some(inner) = error {
        if let Some(code) = inner.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(code);
        }
        error = inner.source();
    }
    None
}

fn reason(code: i32) -> String {
    io::Error::from_raw_os_error(code).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_by_the_ticks_of_the_kernel() {
        let when = Instant::now();
        let clock = Clock { tick: Duration::from_millis(4), ..Clock::new(Jiffies(1000), when) };
        let later = when + Duration::from_millis(2003);
        assert_eq!(clock.at(later), Jiffies(1500));
        assert_eq!(clock.between(Jiffies(1250), later), Duration::from_secs(1));
        assert_eq!(clock.between(Jiffies(1501), later), Duration::ZERO);
        // What kernels are configured for: 1,000 to 100 ticks a second.
        let tick = Clock::new(Jiffies(0), when).tick;
        assert!(Duration::from_micros(900) < tick && tick < Duration::from_millis(11), "{tick:?}");
    }

    #[test]
    fn generations_are_never_none() {
        let of = |generation| Trust { generation, ..Trust::default() };
        assert_eq!(next(of(0)).generation, 1);
        assert_eq!(next(of(7)).generation, 8);
        // The last that differ in the bits that packets look at.
        assert_eq!(next(of(u32::MAX >> 1)).generation, 1);
    }

    #[test]
    fn every_cpu_remembers_as_many_routes_as_memory_allows() {
        assert_eq!(route_set_bits(0), 14);
        assert_eq!(route_set_bits(2), 14);
        assert_eq!(route_set_bits(128), 11);
        assert!(route_set_bits(8192) >= 1);
    }
}
