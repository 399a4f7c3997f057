//! What outlives the process: maps and links that are pinned in bpffs, in a folder for each instance.
//!
//! A *set* is what one load of the object uses: the maps that remember, which it may have from the set
//! before, and the arrays of programs to jump to, which the kernel empties once nobody holds them. Links
//! stand beside the sets: their programs are replaced from one set to the next.

use std::ffi::CStr;
use std::fs::{self, DirBuilder};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapData};
use aya::programs::TcAttachType;
use aya::programs::tc::{SchedClassifierLink, TcHandle};
use portfwd_ebpf::table::{Hook, KEPT};
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};

use super::counts::{CountMap, counter_words, passed_words};
use super::flow_tables::{self, FlowTables};
use super::{Clock, DatapathError, Programs, REMEMBER, wait_for_readers};
use crate::compile::Capacity;

/// Where the kernel's BPF filesystem belongs.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` (linux/magic.h).
const MAGIC: u64 = 0xcafe_4a11;

/// The folder of an instance, which has to be there only for what writes to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pins {
    folder: PathBuf,
}

/// What a set leaves to the next, whatever version of portfwd loads that. It stands in a file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// [`KEPT`](portfwd_ebpf::table::KEPT) of the set.
    pub layout: u32,
    /// The set's number.
    pub set: u32,
    /// Secrets: where flows stand in their tables, and which ports clients get.
    pub flow_seed: u64,
    pub masquerade_seed: u32,
    /// What the maps of counters count, from the oldest to the one that counts now.
    pub counters: Vec<Words>,
    /// The same of packets that passed: a row is a reason.
    pub passed: Vec<Words>,
    /// Filters of TC, which have no link to pin.
    pub filters: Vec<Filter>,
    /// Sets before this one, of other sizes, whose programs may still begin flows there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unfinished: Vec<u32>,
}

/// Names of numbers that stand side by side in a map.
pub type Words = Vec<String>;

/// A filter of the qdisc `clsact`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Filter {
    pub index: u32,
    /// At the egress, not the ingress.
    pub egress: bool,
    pub priority: u16,
    pub handle: u32,
}

impl Filter {
    /// What a link is, if it is none of the kernel's.
    pub(super) fn of(index: u32, egress: bool, link: &SchedClassifierLink) -> Option<Self> {
        let (priority, handle) = (link.priority().ok()?, link.handle().ok()?.into());
        Some(Self { index, egress, priority, handle })
    }

    /// As aya has it. Dropped, it is detached.
    pub(super) fn link(self, interface: &str) -> Option<SchedClassifierLink> {
        let place = if self.egress { TcAttachType::Egress } else { TcAttachType::Ingress };
        let handle = TcHandle::from(self.handle);
        SchedClassifierLink::attached(interface, place, self.priority, handle, None).ok()
    }

    /// Detaches it, if it and its interface are there.
    pub fn take_off(self) {
        let mut name = [0u8; libc::IF_NAMESIZE];
        // SAFETY: there is room for a name.
        let found = unsafe { libc::if_indextoname(self.index, name.as_mut_ptr().cast()) };
        let name = CStr::from_bytes_until_nul(&name).ok().filter(|_| !found.is_null());
        // What is dropped is detached.
        drop(name.and_then(|name| self.link(name.to_str().ok()?)));
    }
}

/// What holds a program at an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Native,
    Generic,
    Tc,
    /// At the egress.
    Sent,
    /// At the loopback interface.
    Own,
}

impl Kind {
    /// Of what comes by an interface: one at a time.
    pub const OF_PACKETS: [Self; 3] = [Self::Native, Self::Generic, Self::Tc];
    const ALL: [Self; 5] = [Self::Native, Self::Generic, Self::Tc, Self::Sent, Self::Own];

    /// Of its program.
    pub fn hook(self) -> Hook {
        match self {
            Self::Native | Self::Generic => Hook::Xdp,
            Self::Tc | Self::Sent | Self::Own => Hook::Tc,
        }
    }

    /// Where TC has it.
    pub fn place(self) -> TcAttachType {
        if self == Self::Sent { TcAttachType::Egress } else { TcAttachType::Ingress }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tc => "tc",
            Self::Sent => "sent",
            Self::Own => "own",
        }
    }
}

impl Pins {
    /// The instance with this name, which has to be fit for a file.
    pub fn new(name: &str) -> Self {
        Self { folder: Path::new(BPFFS).join("portfwd").join(name) }
    }

    /// Makes its folders, and mounts bpffs where the system has not.
    ///
    /// # Errors
    ///
    /// There is no bpffs and it cannot be mounted, or it cannot be written.
    pub fn create(&self) -> Result<(), DatapathError> {
        let is_bpffs = || rustix::fs::statfs(BPFFS).is_ok_and(|fs| fs.f_type as u64 == MAGIC);
        if !is_bpffs() {
            mount("bpf", BPFFS, "bpf", MountFlags::empty(), Some(c"mode=0700"))
                .map_err(|error| failed(Path::new(BPFFS), &error.into()))?;
        }
        for folder in [self.folder.join("sets"), self.links()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(|error| failed(&folder, &error))?;
        }
        // In some bpffs everybody can make folders.
        let all = self.folder.parent().unwrap_or(&self.folder);
        for folder in [all, &self.folder] {
            let there = fs::metadata(folder).map_err(|error| failed(folder, &error))?;
            if there.uid() != 0 || there.mode() & 0o022 != 0 {
                return Err(failed(folder, &io::Error::other("belongs to others; remove it")));
            }
        }
        Ok(())
    }

    /// Another instance that has a program of XDP at this interface.
    pub(super) fn other_at(&self, index: u32) -> Option<String> {
        let all = self.folder.parent()?;
        names(all).find(|name| {
            let other = Self { folder: all.join(name) };
            let has = |kind| flow_tables::index_of_link(&other.link(index, kind)) == Some(index);
            other != *self && (has(Kind::Native) || has(Kind::Generic))
        })
    }

    /// The instances that have something there.
    pub fn instances() -> Vec<String> {
        let all = names(&Path::new(BPFFS).join("portfwd"));
        let mut all: Vec<String> = all.filter(|name| Self::new(name).is_there()).collect();
        all.sort();
        all
    }

    /// Whether what is pinned goes with this process: it has a file system for it that others do not see.
    pub fn are_private() -> bool {
        let device = |root| fs::metadata(format!("{root}{BPFFS}")).map(|it| it.dev());
        matches!((device(""), device("/proc/1/root")), (Ok(own), Ok(first)) if own != first)
    }

    /// Whether this set is there, whole.
    pub fn has(&self, kept: &Kept) -> bool {
        let set = self.set(kept.set);
        let counts = |map, words: &[Words]| set.join(numbered(map, words.len() - 1)).exists();
        is_whole(&set)
            && !kept.counters.is_empty()
            && !kept.passed.is_empty()
            && counts(COUNTERS, &kept.counters)
            && counts(PASSED, &kept.passed)
    }

    /// Whether something of it is there.
    pub fn is_there(&self) -> bool {
        self.sets().next().is_some() || self.has_links()
    }

    /// Whether programs of it are attached, or were.
    pub fn has_links(&self) -> bool {
        self.pinned().next().is_some()
    }

    pub(super) fn set(&self, number: u32) -> PathBuf {
        self.folder.join("sets").join(number.to_string())
    }

    fn links(&self) -> PathBuf {
        self.folder.join("links")
    }

    pub(super) fn link(&self, index: u32, kind: Kind) -> PathBuf {
        self.links().join(format!("{index}-{}", kind.name()))
    }

    /// The numbers of its sets.
    pub(super) fn sets(&self) -> impl Iterator<Item = u32> + use<> {
        names(&self.folder.join("sets")).filter_map(|name| name.parse().ok())
    }

    /// The links that are pinned: interface and kind.
    pub(super) fn pinned(&self) -> impl Iterator<Item = (u32, Kind)> + use<> {
        names(&self.links()).filter_map(|name| {
            let (index, name) = name.split_once('-')?;
            let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name)?;
            Some((index.parse().ok()?, kind))
        })
    }

    /// Unpins a link. Its program is detached once nobody else holds it. Returns whether it was there.
    pub(super) fn unpin(&self, index: u32, kind: Kind) -> bool {
        fs::remove_file(self.link(index, kind)).is_ok()
    }

    /// The same, and nobody else's hold keeps the program attached, which would otherwise be until the kernel has
    /// given the pin up.
    pub(super) fn take_off(&self, index: u32, kind: Kind) -> bool {
        flow_tables::detach_link(&self.link(index, kind));
        self.unpin(index, kind)
    }

    /// Makes the folder of a new set: its number.
    pub(super) fn add_set(&self) -> Result<u32, DatapathError> {
        let number = self.sets().max().map_or(1, |last| last + 1);
        let folder = self.set(number);
        DirBuilder::new().mode(0o700).create(&folder).map_err(|error| failed(&folder, &error))?;
        Ok(number)
    }

    /// Unpins all of a set. Maps that others use stay.
    pub(super) fn remove_set(&self, number: u32) -> io::Result<()> {
        // bpffs has no way to remove a tree at once.
        fs::remove_dir_all(self.set(number))
    }

    /// Unpins everything: links, which detaches programs that no process holds, and sets.
    ///
    /// # Errors
    ///
    /// Something cannot be removed; what could be is.
    pub fn remove(&self) -> io::Result<()> {
        for (index, kind) in self.pinned() {
            self.unpin(index, kind);
        }
        // Programs that still run jump to others of their set.
        wait_for_readers();
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => removed?,
        }
        // The last one; others may have theirs there.
        if let Some(all) = self.folder.parent() {
            let _: io::Result<()> = fs::remove_dir(all);
        }
        Ok(())
    }
}

/// What a set has of the one before, pinned where the set is.
pub(super) struct Taken {
    /// Of the flows' places, and of masquerade's ports.
    pub seeds: (u64, u32),
    /// Maps, and where they are pinned or will be.
    pub pins: Vec<(&'static str, PathBuf)>,
    /// Maps that counted before.
    pub counted: Vec<CountMap>,
    pub passed: Vec<CountMap>,
    /// The sets whose flows have to be copied, as their tables have another size.
    pub copies: Vec<u32>,
}

impl Taken {
    /// Pins what the set `before` remembers for a new one, as far as that is to be as large. The room for
    /// counters becomes what there is, if that is enough for so many `names`.
    pub fn new(
        instance: &Pins,
        set: u32,
        capacity: &mut Capacity,
        names: u32,
        before: Option<&Kept>,
    ) -> Result<Self, DatapathError> {
        let folder = instance.set(set);
        let mut pins: Vec<_> = REMEMBER.map(|name| (name, folder.join(name))).into();
        for hook in [Hook::Xdp, Hook::Tc] {
            let Programs { detour_map, part_map, .. } = Programs::of(hook);
            pins.extend([*detour_map, *part_map].map(|name| (name, folder.join(name))));
        }
        let Some(before) = before else {
            let seeds = (RandomState::new().hash_one(1), RandomState::new().hash_one(0) as u32);
            pins.push((COUNTERS, folder.join(numbered(COUNTERS, 0))));
            pins.push((PASSED, folder.join(numbered(PASSED, 0))));
            return Ok(Self {
                seeds,
                pins,
                counted: Vec::new(),
                passed: Vec::new(),
                copies: Vec::new(),
            });
        };
        let old = instance.set(before.set);
        let there = |name: &str| {
            open(&old.join(name))?
                .ok_or_else(|| failed(&old.join(name), &ErrorKind::NotFound.into()))
        };
        let mut copies = Vec::new();
        if before.layout == KEPT {
            for name in REMEMBER {
                let map = there(name)?;
                // A smaller one would have to refuse flows.
                if capacity.make_room(name, entries(&map)?) {
                    pin(&map, &folder.join(name))?;
                } else {
                    copies = vec![before.set];
                }
            }
            // One that is not whole was copied before.
            let is_there = |set: &u32| is_whole(&instance.set(*set));
            copies.extend(before.unfinished.iter().filter(|set| is_there(set)));
        } else if has_flows(&there)? {
            return Err(DatapathError::OtherLayout { there: before.layout });
        }
        let mut count = |name, words: &[Words], own: &Words, rows: u32| {
            let mut maps = Vec::new();
            for (number, words) in words.iter().enumerate() {
                let map = there(&numbered(name, number))?;
                pin(&map, &folder.join(numbered(name, number)))?;
                maps.push(CountMap::new(map, words.clone())?);
            }
            // The last goes on counting, if it counts what this one does and has room.
            let goes_on = maps
                .pop_if(|last| last.words() == own && last.entries() >= rows)
                .map(|it| it.entries());
            pins.push((name, folder.join(numbered(name, maps.len()))));
            Ok((maps, goes_on))
        };
        let (counted, entries) = count(COUNTERS, &before.counters, &counter_words(), names)?;
        capacity.counters = entries.unwrap_or(capacity.counters);
        let reasons = passed_words();
        let (passed, _) = count(PASSED, &before.passed, &reasons, reasons.len() as u32)?;
        let seeds = (before.flow_seed, before.masquerade_seed);
        Ok(Self { seeds, pins, counted, passed, copies })
    }

    /// The flows that have to be copied.
    pub fn old_flows(
        &self,
        instance: &Pins,
        clock: Clock,
    ) -> Result<Vec<FlowTables>, DatapathError> {
        let of = |set: &u32| {
            let folder = instance.set(*set);
            let take = |name: &'static str| {
                let path = folder.join(name);
                open_map(&path)?.ok_or_else(|| failed(&path, &ErrorKind::NotFound.into()))
            };
            FlowTables::new(clock, self.seeds.0, take)
        };
        self.copies.iter().map(of).collect()
    }
}

/// Whether a set has all that the next one wants of it.
fn is_whole(set: &Path) -> bool {
    REMEMBER.iter().all(|map| set.join(map).exists())
}

const COUNTERS: &str = "COUNTERS";
const PASSED: &str = "PASSED";

fn numbered(map: &str, number: usize) -> String {
    format!("{map}-{number}")
}

/// Whether there are, or were lately, flows of whatever layout.
fn has_flows(
    there: &impl Fn(&str) -> Result<MapData, DatapathError>,
) -> Result<bool, DatapathError> {
    for name in ["FLOWS_V4", "FLOWS_V6"] {
        if flow_tables::has_bytes(name, &there(name)?)? {
            return Ok(true);
        }
    }
    for name in ["PROBATION_V4", "PROBATION_V6"] {
        if flow_tables::has_keys(&there(name)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn names(folder: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

fn failed(path: &Path, error: &io::Error) -> DatapathError {
    DatapathError::Pins { path: path.to_owned(), message: error.to_string() }
}

/// A map that is pinned there, if one is.
fn open(path: &Path) -> Result<Option<MapData>, DatapathError> {
    if !path.exists() {
        return Ok(None);
    }
    let map = MapData::from_pin(path).map_err(|error| failed(path, &io::Error::other(error)))?;
    Ok(Some(map))
}

/// The same, in the type that aya gives it.
fn open_map(path: &Path) -> Result<Option<Map>, DatapathError> {
    let map = open(path)?;
    map.map(Map::from_map_data).transpose().map_err(|error| failed(path, &io::Error::other(error)))
}

/// How many entries a map has room for.
fn entries(map: &MapData) -> Result<u32, DatapathError> {
    let info = map.info().map_err(super::map_error("of a set"))?;
    Ok(info.max_entries())
}

/// Pins a map at one more place.
fn pin(map: &MapData, path: &Path) -> Result<(), DatapathError> {
    map.pin(path).map_err(|error| failed(path, &io::Error::other(error)))
}
