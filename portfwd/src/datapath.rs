//! The datapath in the kernel: programs, maps and links. The only module that knows aya.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, ProgramArray, xdp::DevMap};
use aya::programs::links::{FdLink, Link as _, LinkError, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{
    LinkOrder, Program, ProgramError, ProgramFd, ProgramInfo, SchedClassifier, TcAttachType,
    TestRun, TestRunOptions, Xdp, tc,
};
use aya::util::nr_cpus;
use aya::{Ebpf, EbpfError, EbpfLoader, Pod};
use portfwd_ebpf::path::{Part, Role};
use portfwd_ebpf::table::{
    Address, AnyAddress, Counter, Direction, Endpoint, Favourite, HOP_BITS, Interface, Jiffies,
    KEPT, LAYOUT, Mss, Page, Passed, RouteSet, Settings, Translation, Trust,
};
use thiserror::Error;
use tracing::warn;

pub use self::counts::Counts;
use self::counts::{CountMap, counter_words, passed_words};
use self::flow_tables::index_of_link;
pub use self::flow_tables::{FlowTables, Living, Swept};
pub use self::pins::{Filter, Kept, Pins};
use self::pins::{Kind, Taken};
use crate::compile::{BoxPorts, Capacity, EndpointKey, FlowRoom, Update, any_address};
use crate::config::Attach;
use crate::sysctl::Families;
pub use portfwd_ebpf::table::Hook;

mod counts;
mod flow_tables;
mod pins;

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
    #[error("{}: {message}", .path.display())]
    Pins { path: PathBuf, message: String },
    #[error(
        "there are flows in the layout of another version of portfwd ({there}; this one has {KEPT}): start that \
         version again, or end forwarding, its flows and its counters with `portfwd detach`"
    )]
    OtherLayout { there: u32 },
    #[error(
        "{crowded} flows have no room in tables of the new size: set [flows] size to what it was, or larger"
    )]
    Crowded { crowded: u64 },
}

/// Why an interface cannot be attached to: one line.
#[derive(Debug, Error)]
pub enum AttachError {
    #[error(
        "{interface}: another XDP program is attached, to it or to its bridge or bond; stop the portfwd that it belongs to, or take it off with `ip link set dev {interface} xdp off`, or `bpftool net detach xdp dev {interface}`"
    )]
    Busy { interface: String },
    #[error(
        "{interface}: MTU {mtu} is too large for native XDP here ({message}); lower it with `ip link set dev {interface} mtu 1500`, or set attach = \"tc\""
    )]
    Mtu { interface: String, mtu: u32, message: String },
    #[error(
        "{interface}: its driver has no native XDP, or not as it is set up ({message}; `dmesg` may say more); set attach = \"tc\""
    )]
    NoXdp { interface: String, message: String },
    #[error("{interface}: native XDP on a bond sees its ports instead; set attach = \"tc\"")]
    Bond { interface: String },
    #[error(
        "{interface}: cannot attach TC: {message}; before Linux 6.6 that takes two modules: `modprobe -a sch_ingress cls_bpf`"
    )]
    NoFilters { interface: String, message: String },
    #[error("{interface}: cannot attach {}: {message}", .mode.program())]
    Other { interface: String, mode: Mode, message: String },
    #[error(
        "{interface}: another portfwd is attached there, and an interface, also one to backends, belongs to one: put \
         the rules of both into one file, or stop it"
    )]
    Portfwd { interface: String },
    #[error(
        "{interface}: portfwd \"{instance}\" is attached there; end it with `portfwd detach --instance {instance}`"
    )]
    Instance { interface: String, instance: String },
    #[error(transparent)]
    Programs(#[from] DatapathError),
}

/// How a program is attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the stack, for drivers without XDP: slower.
    Generic,
    /// At the ingress of TC: for any interface.
    Tc,
}

impl Mode {
    fn kind(self) -> Kind {
        match self {
            Self::Native => Kind::Native,
            Self::Generic => Kind::Generic,
            Self::Tc => Kind::Tc,
        }
    }

    /// Which programs it takes.
    fn hook(self) -> Hook {
        match self {
            Self::Native | Self::Generic => Hook::Xdp,
            Self::Tc => Hook::Tc,
        }
    }

    /// What asks for it alone.
    pub fn as_configured(self) -> Attach {
        match self {
            Self::Native => Attach::Native,
            Self::Generic => Attach::Generic,
            Self::Tc => Attach::Tc,
        }
    }

    /// In words.
    pub fn program(self) -> &'static str {
        match self {
            Self::Native => "native XDP",
            Self::Generic => "generic XDP",
            Self::Tc => "TC",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tc => "tc",
        })
    }
}

/// What holds a program at an interface.
enum Attached {
    Xdp(XdpLink),
    Tc(SchedClassifierLink),
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
        lock(&self.0)
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

/// What a program does with a frame.
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
    /// Its packets have no link header.
    pub bare: bool,
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
impl Row for Mss {}
impl Row for Interface {}
impl Row for Settings {}
impl Row for Trust {}
impl Row for AnyAddress {}
// SAFETY: each `Row` is `repr(C)` without padding (asserted in `table`). Rows that are read back
// from the kernel hold integers only.
unsafe impl<T: Row> Pod for Plain<T> {}

/// The loaded datapath. Dropping it detaches every program and frees the maps.
pub struct Datapath {
    ebpf: Ebpf,
    verified: Vec<Verified>,
    /// Whose programs are loaded.
    hooks: Vec<Hook>,
    links: BTreeMap<u32, (Attached, Mode)>,
    /// Programs for what the box itself sends: out by an interface, and to itself.
    sent: BTreeMap<u32, SchedClassifierLink>,
    own: Option<(u32, SchedClassifierLink)>,
    capacity: Capacity,
    generation: u32,
    /// Addresses that [`Settings`] leads from, and their rows, by direction.
    favourites: [Option<(EndpointKey, u32)>; 2],
    /// Ends when no packet looks at the generation before the live one any more.
    readers: Option<thread::JoinHandle<()>>,
    /// The ports for masquerade, and the seed of their choice.
    masquerade: ([u16; 2], u32),
    flows: Arc<FlowTables>,
    /// Numbers of `DEVICES` by interface index.
    devices: BTreeMap<u32, u32>,
    next_device: u32,
    routes: Routes,
    /// Programs to jump to. The kernel empties what nobody holds.
    jumps: Vec<ProgramArray<MapData>>,
    /// Maps that counted before those of this set.
    counted: Vec<CountMap>,
    passed: Vec<CountMap>,
    /// Where all of this is pinned.
    home: Option<Home>,
}

/// Where a set is pinned, and what it has of the one before.
struct Home {
    pins: Pins,
    set: u32,
    seeds: (u64, u32),
    /// What a file says of this set, and not of the one before.
    kept: bool,
    /// Filters that hold programs of the set before.
    filters: Vec<Filter>,
    /// Flows of sets before that had to be copied, and the numbers of those.
    copied: Vec<FlowTables>,
    unfinished: Vec<u32>,
}

impl Drop for Home {
    fn drop(&mut self) {
        if !self.kept {
            let _: io::Result<()> = self.pins.remove_set(self.set);
        }
    }
}

/// What of a set the next one may have, but for what counts.
const REMEMBER: [&str; 8] = [
    "FLOWS_V4",
    "FLOWS_V6",
    "PROBATION_V4",
    "PROBATION_V6",
    "MAPPINGS",
    "CLIENTS",
    "ARRIVALS",
    "FRAGMENTS",
];

impl Datapath {
    /// Loads the maps; [programs](Self::load_programs) come when they are needed. With `log` those tell
    /// what becomes of each packet that a rule claims; without, the verifier removes that code.
    ///
    /// # Errors
    ///
    /// No permission, no BPF in the kernel, or a kernel that refuses the object.
    pub fn load(capacity: Capacity, ports: &BoxPorts, log: bool) -> Result<Self, DatapathError> {
        let seeds = (RandomState::new().hash_one(1), RandomState::new().hash_one(0) as u32);
        Self::load_with(capacity, ports, log, seeds, &[])
    }

    /// The same as a set of an instance, which is pinned there, with what the set `before` remembers, and
    /// counters for so many `names`. The
    /// programs of that go on until this set's are [attached](Self::attach). Until
    /// [`leave_before`](Self::leave_before), dropping this set unpins it again.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load); what the set before remembers cannot be taken over.
    pub fn take_over(
        mut capacity: Capacity,
        ports: &BoxPorts,
        log: bool,
        pins: &Pins,
        names: u32,
        before: Option<&Kept>,
    ) -> Result<Self, DatapathError> {
        pins.create()?;
        let set = pins.add_set()?;
        let taken = Taken::new(pins, set, &mut capacity, names, before);
        let loaded = taken.and_then(|taken| {
            let mut datapath = Self::load_with(capacity, ports, log, taken.seeds, &taken.pins)?;
            let copied = taken.old_flows(pins, datapath.clock())?;
            for old in &copied {
                // Whoever has no room has lost nothing yet.
                let crowded = datapath.flows.copy(old)?;
                if crowded > 0 {
                    return Err(DatapathError::Crowded { crowded });
                }
            }
            (datapath.counted, datapath.passed) = (taken.counted, taken.passed);
            let (pins, kept) = (pins.clone(), false);
            let filters = before.map(|before| before.filters.clone()).unwrap_or_default();
            let (seeds, unfinished) = (taken.seeds, taken.copies);
            datapath.home = Some(Home { pins, set, kept, filters, copied, unfinished, seeds });
            Ok(datapath)
        });
        loaded.inspect_err(|_| {
            let _: io::Result<()> = pins.remove_set(set);
        })
    }

    fn load_with(
        capacity: Capacity,
        ports: &BoxPorts,
        log: bool,
        (seed, masquerade_seed): (u64, u32),
        pins: &[(&'static str, PathBuf)],
    ) -> Result<Self, DatapathError> {
        let cpus = nr_cpus().map_or(1, |cpus| cpus as u32);
        let bits = route_set_bits(cpus);
        let second = (Duration::from_secs(1).as_nanos() / Clock::tick().as_nanos()) as u32;
        let level: u8 = if log { aya_log::Level::Debug as u8 } else { 0 };
        let FlowRoom { v4, v6 } = capacity.flows;
        let mut loader = EbpfLoader::new();
        for (name, path) in pins {
            loader.map_pin_path(name, path);
        }
        let mut ebpf = loader
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
            .map_max_entries("MSS", capacity.counters)
            .override_global("FLOW_HOMES_V4", &v4.homes(), true)
            .override_global("FLOW_HOMES_V6", &v6.homes(), true)
            .override_global("FLOW_SEED", &seed, true)
            .map_max_entries("FLOWS_V4", v4.entries())
            .map_max_entries("FLOWS_V6", v6.entries())
            .map_max_entries("PROBATION_V4", v4.probation())
            .map_max_entries("PROBATION_V6", v6.probation())
            .map_max_entries("MAPPINGS", capacity.mappings)
            .map_max_entries("CLIENTS", capacity.mappings)
            .load(OBJECT)
            .map_err(load_error)?;
        let clock = xdp_mut(&mut ebpf, CLOCK);
        load(|| clock.load()).map_err(|error| verifier_error(CLOCK, error))?;
        let (read, when) = read_clock(clock)?;
        let clock = Clock::new(read, when);
        let mut take = |name| ebpf.take_map(name).unwrap_or_else(|| missing(name));
        let flows = Arc::new(FlowTables::new(clock, seed, |name| Ok(take(name)))?);
        let trust = Array::try_from(take("TRUST")).map_err(map_error("TRUST"))?;
        let routes =
            Routes(Arc::new(Mutex::new(Trusted { clock, map: trust, now: Default::default() })));
        let mut datapath = Self {
            ebpf,
            verified: Vec::new(),
            hooks: Vec::new(),
            links: BTreeMap::new(),
            sent: BTreeMap::new(),
            own: None,
            capacity,
            generation: 0,
            favourites: [None; 2],
            readers: None,
            // Nobody outside shall know it: it says which ports clients get.
            masquerade: ([*ports.masquerade.start(), *ports.masquerade.end()], masquerade_seed),
            flows,
            devices: BTreeMap::new(),
            next_device: 0,
            routes,
            jumps: Vec::new(),
            counted: Vec::new(),
            passed: Vec::new(),
            home: None,
        };
        datapath.write_settings()?;
        Ok(datapath)
    }

    /// Loads the programs of a hook, unless they are, on all CPUs: the verifier takes its time for each.
    ///
    /// # Errors
    ///
    /// The kernel refuses them.
    pub fn load_programs(&mut self, hook: Hook) -> Result<(), DatapathError> {
        let wanted = self.missing_programs(hook);
        let named = |name: &str| wanted.iter().find(|wanted| **wanted == name).copied();
        let programs = self.ebpf.programs_mut();
        let programs = programs.filter_map(|(name, program)| Some((named(name)?, program)));
        let (mut verified, refused) = verify_all(programs);
        verified.sort_by_key(|it| wanted.iter().position(|name| *name == it.program));
        self.verified.extend(verified);
        refused.map_or_else(|| self.link_programs(hook), Err)
    }

    /// Loads one more of them. Returns whether all are loaded.
    ///
    /// # Errors
    ///
    /// The kernel refuses it.
    pub fn load_next(&mut self, hook: Hook) -> Result<bool, DatapathError> {
        let Some(name) = self.missing_programs(hook).first().copied() else {
            self.link_programs(hook)?;
            return Ok(true);
        };
        let verified = verify(name, self.program_mut(name))?;
        self.verified.push(verified);
        Ok(false)
    }

    /// The programs of a hook that are needed and not loaded.
    fn missing_programs(&self, hook: Hook) -> Vec<&'static str> {
        let Programs { entries, own, detours, parts, .. } = Programs::of(hook);
        let parts = parts.iter().filter(|part| self.is_needed(part));
        let mut names: Vec<&str> =
            entries.iter().chain(*own).chain(*detours).chain(parts).copied().collect();
        names.retain(|name| !self.is_loaded(name));
        names
    }

    fn is_loaded(&self, program: &str) -> bool {
        self.verified.iter().any(|verified| verified.program == program)
    }

    /// Parts of a family that no rule has would only take their time to be verified.
    fn is_needed(&self, part: &str) -> bool {
        let Capacity { flows: FlowRoom { v4, v6 }, crosses, .. } = self.capacity;
        match part {
            _ if part.contains("cross") => crosses,
            _ if part.ends_with("v6") => v6.0 > 1,
            _ => v4.0 > 1,
        }
    }

    /// Lets the programs of a hook jump to each other, once they are loaded.
    fn link_programs(&mut self, hook: Hook) -> Result<(), DatapathError> {
        if self.hooks.contains(&hook) {
            return Ok(());
        }
        let Programs { detours, parts, part_map, detour_map, .. } = Programs::of(hook);
        for (map, names) in [(part_map, parts.as_slice()), (detour_map, detours)] {
            let taken = self.ebpf.take_map(map).unwrap_or_else(|| missing(map));
            let mut array = ProgramArray::try_from(taken).map_err(map_error(map))?;
            for (number, name) in names.iter().enumerate().filter(|(_, name)| self.is_loaded(name))
            {
                let fd = self.program_fd(name).map_err(|error| verifier_error(name, error))?;
                array.set(number as u32, fd, 0).map_err(map_error(map))?;
            }
            self.jumps.push(array);
        }
        self.hooks.push(hook);
        Ok(())
    }

    /// Whether the programs of a hook are loaded.
    pub fn has(&self, hook: Hook) -> bool {
        self.hooks.contains(&hook)
    }

    fn program_mut(&mut self, name: &str) -> &mut Program {
        self.ebpf.program_mut(name).unwrap_or_else(|| no_program(name))
    }

    fn program_fd(&self, name: &str) -> Result<&ProgramFd, ProgramError> {
        match self.ebpf.program(name).unwrap_or_else(|| no_program(name)) {
            Program::Xdp(xdp) => xdp.fd(),
            Program::SchedClassifier(tc) => tc.fd(),
            _ => Err(ProgramError::UnexpectedProgramType),
        }
    }

    /// How many rows the tables hold.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The clock of [`Counts::last`].
    pub fn clock(&self) -> Clock {
        self.routes.lock().clock
    }

    /// Has those who vouch for what the programs of another datapath remember vouch for these.
    ///
    /// # Errors
    ///
    /// The kernel says why.
    pub fn vouched_as(&mut self, other: &Self) -> Result<(), DatapathError> {
        let routes = other.routes.clone();
        {
            // Others wait for one of them, and never for both.
            let (mut own, mut theirs) = (self.routes.lock(), routes.lock());
            std::mem::swap(&mut *own, &mut *theirs);
        }
        self.routes = routes;
        self.routes.forget()
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
    pub fn program(&self, hook: Hook, role: Role) -> Result<&ProgramFd, ProgramError> {
        self.program_fd(Programs::of(hook).entry(role, false))
    }

    /// Runs the program of `role` on one frame as if it came in by the interface with index `ingress`:
    /// what the kernel would do, and the frame as it left. Counters count.
    ///
    /// # Errors
    ///
    /// The kernel refuses: a frame shorter than 14 bytes, or no such interface.
    pub fn try_frame(
        &mut self,
        hook: Hook,
        role: Role,
        ingress: u32,
        frame: &[u8],
    ) -> Result<(Action, Vec<u8>), DatapathError> {
        /// The room that the kernel leaves behind a frame of its test run.
        const ROOM: usize = 4096;
        let failed = |error| DatapathError::TryFrame(chain(&error));
        let mut after = vec![0; ROOM.max(frame.len())];
        let mut options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut after),
            ..TestRunOptions::default()
        };
        let program = self.program_mut(Programs::of(hook).entry(role, false));
        let (size, action) = match program {
            Program::Xdp(xdp) => {
                // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
                // egress_ifindex.
                let context =
                    [0, frame.len() as u32, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
                options.ctx_in = Some(&context);
                let result = xdp.test_run(options).map_err(failed)?;
                let action = match result.return_value {
                    1 => Some(Action::Drop),
                    2 => Some(Action::Pass),
                    4 => Some(Action::Redirect),
                    _ => None,
                };
                (result.data_size_out, action.ok_or(result.return_value))
            }
            Program::SchedClassifier(tc) => {
                // `struct __sk_buff`, of which ifindex is the eleventh word.
                let mut context = [[0; 4]; 48];
                context[10] = ingress.to_ne_bytes();
                options.ctx_in = Some(context.as_flattened());
                let result = tc.test_run(options).map_err(failed)?;
                let action = match result.return_value as i32 {
                    2 => Some(Action::Drop),
                    -1 => Some(Action::Pass),
                    7 => Some(Action::Redirect),
                    _ => None,
                };
                (result.data_size_out, action.ok_or(result.return_value))
            }
            _ => unreachable!("programs are XDP's or TC's"),
        };
        after.truncate(size as usize);
        let action = action
            .map_err(|other| DatapathError::TryFrame(format!("action {other} is none of ours")))?;
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

    /// From the next [`apply`](Self::apply) on, clients that are masqueraded get these ports.
    pub fn masquerade_by(&mut self, ports: &BoxPorts) {
        self.masquerade.0 = [*ports.masquerade.start(), *ports.masquerade.end()];
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
        if let Err(error) = self.write_mss(&update.mss) {
            warn!("{error}; segments of TCP may stay larger or smaller than rules say");
        }
        // While nobody waits for it: it takes several milliseconds.
        let waiting = thread::Builder::new().name("readers".to_owned()).spawn(wait_for_readers);
        self.readers = waiting.map_err(|_| wait_for_readers()).ok();
        Ok(())
    }

    fn write_mss(&mut self, rules: &[(u32, Mss)]) -> Result<(), DatapathError> {
        let mut rows = self.array::<Mss>("MSS")?;
        rules
            .iter()
            .try_for_each(|(rule, mss)| rows.set(*rule, Plain(*mss), 0).map_err(map_error("MSS")))
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

    /// Attaches the program of `role` to an interface, or replaces the one that is there, also that of the set
    /// before.
    ///
    /// # Errors
    ///
    /// Another program is there, the MTU is too large, or the kernel says why.
    pub fn attach(&mut self, port: Port<'_>, role: Role, mode: Mode) -> Result<(), AttachError> {
        self.load_programs(mode.hook())?;
        let name = Programs::of(mode.hook()).entry(role, port.bare);
        let kind = mode.kind();
        let (before, other) = match self.links.remove(&port.index) {
            Some((link, before)) if before == mode => (Some(link), None),
            // Where both can be at a time there is always one.
            other => (self.adopt(port, kind), other.filter(|(_, it)| it.hook() != mode.hook())),
        };
        match self.attach_beside(name, before, port, mode) {
            Ok(link) => {
                self.links.insert(port.index, (link, mode));
                for other in Kind::OF_PACKETS.into_iter().filter(|other| *other != kind) {
                    self.unpin(port.index, other);
                }
                Ok(())
            }
            Err(error) => {
                self.links.extend(other.map(|other| (port.index, other)));
                Err(error)
            }
        }
    }

    /// Attaches a program to an interface, and has that outlive this process.
    fn attach_beside(
        &mut self,
        name: &str,
        before: Option<Attached>,
        port: Port<'_>,
        mode: Mode,
    ) -> Result<Attached, AttachError> {
        let kind = mode.kind();
        if mode != Mode::Tc {
            // An interface has one of these.
            let other = if kind == Kind::Native { Kind::Generic } else { Kind::Native };
            if let Some(home) = &self.home {
                home.pins.take_off(port.index, other);
            }
        }
        if mode == Mode::Tc && before.is_none() && has_portfwd(port.name) {
            return Err(AttachError::Portfwd { interface: port.name.to_owned() });
        }
        let link = match self.attach_program(name, before, port, mode, kind) {
            Err(AttachError::Busy { interface }) => {
                let other = self.home.as_ref().and_then(|home| home.pins.other_at(port.index));
                return Err(match other {
                    Some(instance) => AttachError::Instance { interface, instance },
                    None => AttachError::Busy { interface },
                });
            }
            attached => attached?,
        };
        Ok(self.pin(port.index, kind, link)?)
    }

    /// What holds a program of the set before.
    fn adopt(&mut self, port: Port<'_>, kind: Kind) -> Option<Attached> {
        let home = self.home.as_mut()?;
        let path = home.pins.link(port.index, kind);
        if index_of_link(&path).is_some_and(|index| index != port.index) {
            // Its interface is gone, and another has the number.
            home.pins.unpin(port.index, kind);
        }
        if let Ok(pinned) = PinnedLink::from_pin(path) {
            let link = FdLink::from(pinned);
            return match kind {
                Kind::Native | Kind::Generic => XdpLink::try_from(link).ok().map(Attached::Xdp),
                Kind::Tc | Kind::Sent | Kind::Own => {
                    SchedClassifierLink::try_from(link).ok().map(Attached::Tc)
                }
            };
        }
        let egress = kind == Kind::Sent;
        let same = |filter: &Filter| (filter.index, filter.egress) == (port.index, egress);
        let place = home.filters.iter().position(same).filter(|_| kind.hook() == Hook::Tc)?;
        home.filters.swap_remove(place).link(port.name).map(Attached::Tc)
    }

    fn attach_program(
        &mut self,
        name: &str,
        before: Option<Attached>,
        port: Port<'_>,
        mode: Mode,
        kind: Kind,
    ) -> Result<Attached, AttachError> {
        // What cannot be replaced, as its interface went, is in the way.
        let home = self.home.as_ref().map(|home| home.pins.clone());
        let give_up = || home.is_some_and(|instance| instance.take_off(port.index, kind));
        let link = match self.program_mut(name) {
            Program::Xdp(xdp) => attach_xdp(xdp, before, give_up, port, mode).map(Attached::Xdp),
            Program::SchedClassifier(tc) => {
                let before = before.and_then(|before| match before {
                    Attached::Tc(link) => Some(link),
                    Attached::Xdp(_) => None,
                });
                let place = kind.place();
                attach_tc(tc, before, give_up, port, place).map(Attached::Tc)
            }
            _ => unreachable!("programs are XDP's or TC's"),
        };
        link.map_err(|error| attach_error(port, mode, &error))
    }

    fn unpin(&self, index: u32, kind: Kind) -> bool {
        self.home.as_ref().is_some_and(|home| home.pins.unpin(index, kind))
    }

    /// Has a link outlive this process, unless it does.
    fn pin(&self, index: u32, kind: Kind, link: Attached) -> Result<Attached, DatapathError> {
        let Some(path) = self.home.as_ref().map(|home| home.pins.link(index, kind)) else {
            return Ok(link);
        };
        // A filter has none.
        let has_link = match &link {
            Attached::Xdp(_) => true,
            Attached::Tc(link) => <&FdLink>::try_from(link).is_ok(),
        };
        if path.exists() || !has_link {
            return Ok(link);
        }
        let failed = |error: &dyn std::error::Error| DatapathError::Pins {
            path: path.clone(),
            message: chain(error),
        };
        let pin = |link: FdLink| link.pin(&path).map(FdLink::from).map_err(|error| failed(&error));
        match link {
            Attached::Xdp(link) => {
                let link = pin(link.try_into().map_err(|error: LinkError| failed(&error))?)?;
                XdpLink::try_from(link).map(Attached::Xdp).map_err(|error| failed(&error))
            }
            Attached::Tc(link) => {
                let link = pin(link.try_into().map_err(|error: LinkError| failed(&error))?)?;
                SchedClassifierLink::try_from(link)
                    .map(Attached::Tc)
                    .map_err(|error| failed(&error))
            }
        }
    }

    /// How interfaces have programs of the set before.
    pub fn modes_before(&self) -> BTreeMap<u32, Mode> {
        let Some(home) = &self.home else { return BTreeMap::new() };
        let filters = home.filters.iter().filter(|filter| !filter.egress);
        let mut modes: BTreeMap<u32, Mode> =
            filters.map(|filter| (filter.index, Mode::Tc)).collect();
        modes.extend(home.pins.pinned().filter_map(|(index, kind)| {
            let mode = [Mode::Native, Mode::Generic, Mode::Tc].into_iter();
            Some((index, mode.into_iter().find(|mode| mode.kind() == kind)?))
        }));
        modes
    }

    /// Has the kernel verify all programs that interfaces will need in place of those of the set before, and in these
    /// modes, so that they can be attached one right after the other.
    ///
    /// # Errors
    ///
    /// The kernel refuses one.
    pub fn prepare(&mut self, modes: impl Iterator<Item = Mode>) -> Result<(), DatapathError> {
        let mut hooks: Vec<Hook> = modes.map(Mode::hook).collect();
        if let Some(home) = &self.home {
            hooks.extend(home.pins.pinned().map(|(_, kind)| kind.hook()));
            hooks.extend(home.filters.first().map(|_| Hook::Tc));
        }
        for hook in [Hook::Xdp, Hook::Tc] {
            if hooks.contains(&hook) {
                self.load_programs(hook)?;
            }
        }
        Ok(())
    }

    /// What the next set of the instance has to know of this one; it stands where no other process but that
    /// finds it, before any program of this set is attached, and after.
    pub fn kept(&self) -> Option<Kept> {
        let home = self.home.as_ref()?;
        let words = |maps: &[CountMap], own| {
            maps.iter().map(|map| map.words().clone()).chain([own]).collect()
        };
        let mut filters = home.filters.clone();
        let of = |index: &u32, egress, link| Filter::of(*index, egress, link);
        filters.extend(self.links.iter().filter_map(|(index, (link, _))| match link {
            Attached::Tc(link) => of(index, false, link),
            Attached::Xdp(_) => None,
        }));
        filters.extend(self.sent.iter().filter_map(|(index, link)| of(index, true, link)));
        filters.extend(self.own.iter().filter_map(|(index, link)| of(index, false, link)));
        Some(Kept {
            layout: KEPT,
            set: home.set,
            flow_seed: home.seeds.0,
            masquerade_seed: home.seeds.1,
            counters: words(&self.counted, counter_words()),
            passed: words(&self.passed, passed_words()),
            filters,
            unfinished: home.unfinished.clone(),
        })
    }

    /// What [`kept`](Self::kept) says stands where the next one finds it: this set stays.
    pub fn stay(&mut self) {
        if let Some(home) = &mut self.home {
            home.kept = true;
        }
    }

    /// Once programs of this set are attached wherever they should be: takes off what is left of the sets
    /// before.
    ///
    /// # Errors
    ///
    /// Something of them cannot be taken off.
    pub fn leave_before(&mut self) -> Result<(), DatapathError> {
        let Some(home) = &mut self.home else { return Ok(()) };
        if !home.copied.is_empty() {
            // Programs that still run may begin flows there.
            wait_for_readers();
            home.copied.iter().try_for_each(|old| self.flows.copy(old).map(drop))?;
            (home.copied, home.unfinished) = Default::default();
        }
        std::mem::take(&mut home.filters).into_iter().for_each(Filter::take_off);
        for (index, kind) in home.pins.pinned() {
            let used = match kind {
                Kind::Native | Kind::Generic | Kind::Tc => {
                    self.links.get(&index).is_some_and(|(_, mode)| mode.kind() == kind)
                }
                Kind::Sent => self.sent.contains_key(&index),
                Kind::Own => self.own.as_ref().is_some_and(|(own, _)| *own == index),
            };
            if !used {
                home.pins.unpin(index, kind);
            }
        }
        // Programs that still run jump to others of their set.
        wait_for_readers();
        for set in home.pins.sets().filter(|set| *set != home.set) {
            home.pins.remove_set(set).map_err(|error| DatapathError::Pins {
                path: home.pins.set(set),
                message: error.to_string(),
            })?;
        }
        Ok(())
    }

    /// Leaves everything attached, as another set of the instance goes on, or nobody does.
    pub fn leave(mut self) {
        // What has no link to pin would be detached.
        for (_, (link, _)) in std::mem::take(&mut self.links) {
            if let Attached::Tc(link) = link {
                leave_filter(link);
            }
        }
        std::mem::take(&mut self.sent).into_values().for_each(leave_filter);
        self.own.take().into_iter().for_each(|(_, link)| leave_filter(link));
    }

    /// Detaches every program, and unpins what outlives the process.
    ///
    /// # Errors
    ///
    /// Something cannot be unpinned.
    pub fn take_off(self) -> io::Result<()> {
        let instance = self.home.as_ref().map(|home| home.pins.clone());
        drop(self);
        instance.map_or(Ok(()), |instance| instance.remove())
    }

    /// Attaches to what the box itself sends by an interface, for the answers of a backend that is this box.
    ///
    /// # Errors
    ///
    /// The kernel says why.
    pub fn attach_sent(&mut self, port: Port<'_>) -> Result<(), AttachError> {
        if self.sent.contains_key(&port.index) {
            return Ok(());
        }
        let name = if port.bare { "bare_sent" } else { "tc_sent" };
        let link = self.attach_own_program(name, port, Kind::Sent)?;
        self.sent.insert(port.index, link);
        Ok(())
    }

    /// Detaches from what the box sends by an interface, which may be gone.
    pub fn detach_sent(&mut self, index: u32) {
        self.unpin(index, Kind::Sent);
        if let Some(link) = self.sent.remove(&index) {
            // As in `detach`.
            let _: Result<(), ProgramError> = link.detach();
        }
    }

    /// Attaches to what the box sends to itself by its loopback interface.
    ///
    /// # Errors
    ///
    /// The kernel says why.
    pub fn attach_own(&mut self, loopback: Port<'_>) -> Result<bool, AttachError> {
        let new = self.own.is_none();
        if new {
            let link = self.attach_own_program("tc_own", loopback, Kind::Own)?;
            self.own = Some((loopback.index, link));
        }
        Ok(new)
    }

    fn attach_own_program(
        &mut self,
        name: &str,
        port: Port<'_>,
        kind: Kind,
    ) -> Result<SchedClassifierLink, AttachError> {
        self.load_programs(Hook::Tc)?;
        let before = self.adopt(port, kind);
        let link = self.attach_program(name, before, port, Mode::Tc, kind)?;
        match self.pin(port.index, kind, link)? {
            Attached::Tc(link) => Ok(link),
            Attached::Xdp(_) => unreachable!("the program is TC's"),
        }
    }

    /// Notes which backends are the box itself.
    ///
    /// # Errors
    ///
    /// The map is full.
    pub fn set_own(&mut self, own: &BTreeSet<IpAddr>) -> Result<(), DatapathError> {
        let mut map: HashMap<&mut MapData, Plain<AnyAddress>, u32> =
            HashMap::try_from(self.map_mut("OWN")).map_err(map_error("OWN"))?;
        let wanted: BTreeSet<[u8; 16]> =
            own.iter().map(|address| any_address(*address).0).collect();
        let there = map.keys().collect::<Result<Vec<_>, _>>().map_err(map_error("OWN"))?;
        for key in there.iter().filter(|key| !wanted.contains(&key.0.0)) {
            map.remove(key).map_err(map_error("OWN"))?;
        }
        for address in wanted {
            map.insert(Plain(AnyAddress(address)), 1, 0).map_err(map_error("OWN"))?;
        }
        Ok(())
    }

    /// Detaches from an interface, which may be gone.
    pub fn detach(&mut self, index: u32) {
        self.detach_sent(index);
        for kind in Kind::OF_PACKETS {
            self.unpin(index, kind);
        }
        if let Some((link, _)) = self.links.remove(&index) {
            // The link's file descriptor is closed either way, and that is what detaches; a filter goes with
            // its interface.
            let _: Result<(), ProgramError> = match link {
                Attached::Xdp(link) => link.detach(),
                Attached::Tc(link) => link.detach(),
            };
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
        let mut sum = Counts::default();
        cpus.iter().for_each(|Plain(counter)| sum.add(counter));
        for before in &self.counted {
            sum.add_words(before.words(), &before.row(row)?);
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
        for before in &self.passed {
            for (row, name) in before.words().iter().enumerate() {
                let reason = Passed::ALL.iter().position(|reason| reason.name() == name);
                if let (Some(reason), [count, ..]) = (reason, before.row(row as u32)?.as_slice()) {
                    sums[reason] += *count;
                }
            }
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

/// Attaches a program of XDP; the one of a link is replaced without a gap, or given up.
fn attach_xdp(
    xdp: &mut Xdp,
    before: Option<Attached>,
    give_up: impl FnOnce() -> bool,
    port: Port<'_>,
    mode: Mode,
) -> Result<XdpLink, ProgramError> {
    if let Some(Attached::Xdp(link)) = before {
        if let Ok(link) = xdp.attach_to_link(link).and_then(|id| xdp.take_link(id)) {
            return Ok(link);
        }
        give_up();
    }
    let mode = if mode == Mode::Generic { XdpMode::Skb } else { XdpMode::Driver };
    xdp.attach_to_if_index(port.index, mode).and_then(|id| xdp.take_link(id))
}

/// The same of TC: before the programs that are there, and behind them at the egress, where the kernel orders
/// them (TCX, Linux 6.6), else as a filter of the qdisc `clsact`.
fn attach_tc(
    tc: &mut SchedClassifier,
    before: Option<SchedClassifierLink>,
    give_up: impl FnOnce() -> bool,
    port: Port<'_>,
    place: TcAttachType,
) -> Result<SchedClassifierLink, ProgramError> {
    if let Some(link) = before {
        if let Ok(link) = tc.attach_to_link(link).and_then(|id| tc.take_link(id)) {
            return Ok(link);
        }
        give_up();
    }
    let order = match place {
        TcAttachType::Egress => LinkOrder::last(),
        _ => LinkOrder::first(),
    };
    let attached = match tc.attach_with_options(port.name, place, TcAttachOptions::TcxOrder(order))
    {
        // No such attach type.
        Err(error) if os_error(&error) == Some(libc::EINVAL) => {
            match tc::qdisc_add_clsact(port.name) {
                Ok(()) => {}
                // Of another's, or the qdisc `ingress`.
                Err(error) if os_error(&error) == Some(libc::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
            // What a daemon left behind that was killed.
            for name in TC.entries.iter().chain(TC.own) {
                let _: Result<(), _> = tc::qdisc_detach_program(port.name, place, name);
            }
            // The kernel puts it before the others.
            let options = TcAttachOptions::Netlink(NlOptions::default());
            tc.attach_with_options(port.name, place, options)
        }
        attached => attached,
    };
    attached.and_then(|id| tc.take_link(id))
}

/// Leaves a filter where it is; a link stays if it is pinned.
fn leave_filter(link: SchedClassifierLink) {
    if <&FdLink>::try_from(&link).is_err() {
        std::mem::forget(link);
    }
}

/// Whether programs of another portfwd are attached by TCX. Where the kernel does not tell there are none.
fn has_portfwd(interface: &str) -> bool {
    let programs = SchedClassifier::query_tcx(interface, TcAttachType::Ingress);
    let is_ours =
        |info: &ProgramInfo| TC.entries.iter().any(|name| info.name_as_str() == Some(name));
    programs.is_ok_and(|(_, programs)| programs.iter().any(is_ours))
}

/// The names of a hook's programs and of the maps by which they jump.
struct Programs {
    /// By role; then the same for interfaces without link header.
    entries: &'static [&'static str],
    /// For what the box itself sends.
    own: &'static [&'static str],
    /// By direction; then the one for SYNs.
    detours: &'static [&'static str],
    /// Of [`portfwd_ebpf::path::Part`], by their number.
    parts: &'static [&'static str; Part::PROGRAMS as usize],
    detour_map: &'static str,
    part_map: &'static str,
}

const XDP: Programs = Programs {
    entries: &["external", "internal", "both"],
    own: &[],
    detours: &["forward_detour", "reply_detour", "syn"],
    parts: &[
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
        "cross_forward_v4",
        "cross_forward_v6",
        "cross_reply_v4",
        "cross_reply_v6",
        "cross_find_forward_v4",
        "cross_find_forward_v6",
        "cross_find_reply_v4",
        "cross_find_reply_v6",
        "cross_send_forward_v4",
        "cross_send_forward_v6",
        "cross_send_reply_v4",
        "cross_send_reply_v6",
    ],
    detour_map: "DETOURS",
    part_map: "PARTS",
};

const TC: Programs = Programs {
    entries: &[
        "tc_external",
        "tc_internal",
        "tc_both",
        "bare_external",
        "bare_internal",
        "bare_both",
    ],
    own: &["tc_own", "tc_sent", "bare_sent"],
    detours: &["tc_forward_detour", "tc_reply_detour", "tc_syn"],
    parts: &[
        "tc_forward_v4",
        "tc_forward_v6",
        "tc_reply_v4",
        "tc_reply_v6",
        "tc_hairpin_v4",
        "tc_hairpin_v6",
        "tc_find_forward_v4",
        "tc_find_forward_v6",
        "tc_find_reply_v4",
        "tc_find_reply_v6",
        "tc_send_forward_v4",
        "tc_send_forward_v6",
        "tc_send_reply_v4",
        "tc_send_reply_v6",
        "tc_cross_forward_v4",
        "tc_cross_forward_v6",
        "tc_cross_reply_v4",
        "tc_cross_reply_v6",
        "tc_cross_find_forward_v4",
        "tc_cross_find_forward_v6",
        "tc_cross_find_reply_v4",
        "tc_cross_find_reply_v6",
        "tc_cross_send_forward_v4",
        "tc_cross_send_forward_v6",
        "tc_cross_send_reply_v4",
        "tc_cross_send_reply_v6",
    ],
    detour_map: "TC_DETOURS",
    part_map: "TC_PARTS",
};

impl Programs {
    fn of(hook: Hook) -> &'static Self {
        match hook {
            Hook::Xdp => &XDP,
            Hook::Tc => &TC,
        }
    }

    /// The one that is attached.
    fn entry(&self, role: Role, bare: bool) -> &'static str {
        let role = match role {
            Role::External => 0,
            Role::Internal => 1,
            Role::Both => 2,
        };
        self.entries[if bare && self.entries.len() > 3 { 3 + role } else { role }]
    }
}

/// In the line that a user gets.
fn attach_error(port: Port<'_>, mode: Mode, error: &ProgramError) -> AttachError {
    let interface = port.name.to_owned();
    let message = chain(error);
    match os_error(error) {
        Some(libc::EBUSY | libc::EEXIST) if mode != Mode::Tc => AttachError::Busy { interface },
        Some(libc::ERANGE) if mode != Mode::Tc => {
            AttachError::Mtu { interface, mtu: port.mtu, message: reason(libc::ERANGE) }
        }
        Some(code @ libc::EOPNOTSUPP) if mode == Mode::Native => {
            AttachError::NoXdp { interface, message: reason(code) }
        }
        // Of the qdisc or the filter.
        Some(code @ libc::ENOENT) if mode == Mode::Tc => {
            AttachError::NoFilters { interface, message: reason(code) }
        }
        Some(code) => AttachError::Other { interface, mode, message: reason(code) },
        None => AttachError::Other { interface, mode, message },
    }
}

fn no_program(name: &str) -> ! {
    unreachable!("the object that was built in has {name}")
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

/// Has the kernel verify and load these programs, by their names, on all CPUs. Returns those that are loaded, and
/// why one was refused: what it still works on then is loaded, and no more is begun.
fn verify_all<'a>(
    programs: impl Iterator<Item = (&'static str, &'a mut Program)> + Send,
) -> (Vec<Verified>, Option<DatapathError>) {
    let programs = Mutex::new(programs);
    let done = Mutex::new((Vec::new(), None));
    // Not in the loop's head, which would hold it as long as the program takes.
    let next = || lock(&programs).next();
    let work = || {
        while let Some((name, program)) = next() {
            let verified = verify(name, program);
            let (loaded, refused) = &mut *lock(&done);
            match verified {
                Ok(verified) => loaded.push(verified),
                Err(error) => *refused = Some(error),
            }
            if refused.is_some() {
                break;
            }
        }
    };
    thread::scope(|scope| {
        let cpus = thread::available_parallelism().map_or(1, NonZero::get);
        for _ in 1..cpus {
            scope.spawn(work);
        }
        work();
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// What panics holding it has written all or nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the kernel verify and load a program.
fn verify(name: &'static str, program: &mut Program) -> Result<Verified, DatapathError> {
    let start = Instant::now();
    let info = match program {
        Program::Xdp(xdp) => load(|| xdp.load()).and_then(|()| xdp.info()),
        Program::SchedClassifier(tc) => load(|| tc.load()).and_then(|()| tc.info()),
        _ => unreachable!("programs are XDP's or TC's"),
    };
    let info: ProgramInfo = info.map_err(|error| verifier_error(name, error))?;
    Ok(Verified {
        program: name,
        instructions: info.verified_instruction_count(),
        size: info.size_translated(),
        time: start.elapsed(),
    })
}

/// Loads a program, while this thread takes no signals: a signal has the verifier give up with EAGAIN, and aya
/// then asks it again for its reasons, which takes many times as long.
fn load(program: impl FnOnce() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: sets of signals of the right size, of which the first is filled before it is read. That it fails
    // is not possible, and would only mean that a signal is in the way.
    unsafe {
        let mut all = MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let loaded = program();
    // SAFETY: as above; it was written by the call before.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), null_mut()) };
    loaded
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
    fn an_mtu_that_a_driver_refuses_is_explained() {
        let message = reason(libc::ERANGE);
        let refused = AttachError::Mtu { interface: "eth0".to_owned(), mtu: 9000, message };
        assert_eq!(
            refused.to_string(),
            "eth0: MTU 9000 is too large for native XDP here (Numerical result out of range (os error 34)); lower it with `ip link set dev eth0 mtu 1500`, or set attach = \"tc\""
        );
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
