//! Datapaths that tests are done with, as good as new for the next: the verifier takes its time for all
//! the programs.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

use portfwd::compile::{Capacity, Update};
use portfwd::datapath::Datapath;
use portfwd::sysctl::Families;
use portfwd_ebpf::path::Role;
use portfwd_tests::sys::{bpf, bpf_fd};

use crate::router::{CAPACITY, PORTS, Router, hook};

static SPARES: Mutex<Vec<Datapath>> = Mutex::new(Vec::new());

/// One with so much room.
pub fn take(capacity: Capacity) -> Datapath {
    let fits = |spare: &mut Datapath| spare.capacity() == capacity;
    let spare = SPARES.lock().unwrap().pop_if(fits);
    spare.unwrap_or_else(|| {
        let mut datapath = Datapath::load(capacity, &PORTS, false).unwrap();
        datapath.load_programs(hook()).unwrap();
        datapath
    })
}

/// Takes it back from a test that passed: without rules, flows, counts or interfaces.
pub fn give_back(mut router: Router) {
    // Others are rare.
    if router.datapath.capacity() != CAPACITY {
        return;
    }
    // The generation before holds rules as well.
    for _ in 0..2 {
        router.load(&[""; 0]);
    }
    let Router { mut datapath, .. } = router;
    datapath.set_interfaces(&BTreeMap::new()).unwrap();
    datapath.routes().rely(Families { v4: false, v6: false }, Duration::ZERO).unwrap();
    let mut maps = BTreeMap::new();
    for role in [Role::External, Role::Internal] {
        find_maps(datapath.program(hook(), role).unwrap().as_fd(), &mut maps);
    }
    for map in maps.values() {
        map.clear();
    }
    datapath.apply(&Update::default()).unwrap();
    SPARES.lock().unwrap().push(datapath);
}

/// A map of the kernel.
struct Map {
    fd: OwnedFd,
    info: MapInfo,
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    name: [u8; 16],
}

/// The beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    length: u32,
    jited: u64,
    instructions: u64,
    load_time: u64,
    user: u32,
    map_count: u32,
    maps: u64,
}

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PROGRAMS: u32 = 3;
const PER_CPU_ARRAY: u32 = 6;
const LRU_HASH: u32 = 9;
const DEVICES: u32 = 14;
const RING_BUFFER: u32 = 27;

const LOOK_UP: i32 = 1;
const UPDATE: i32 = 2;
const DELETE: i32 = 3;
const NEXT_KEY: i32 = 4;
const PROGRAM_BY_ID: i32 = 13;
const MAP_BY_ID: i32 = 14;
const INFO: i32 = 15;

/// The maps of a program and of those it can jump to, by their numbers.
fn find_maps(program: BorrowedFd<'_>, found: &mut BTreeMap<u32, Map>) {
    let mut ids = [0_u32; 64];
    let wanted =
        ProgramInfo { map_count: 64, maps: ids.as_mut_ptr() as u64, ..ProgramInfo::default() };
    let info = info(program, wanted);
    for id in &ids[..info.map_count as usize] {
        if found.contains_key(id) {
            continue;
        }
        let fd = bpf_fd(MAP_BY_ID, &[*id, 0, 0]).unwrap();
        let map = Map { info: self::info(fd.as_fd(), MapInfo::default()), fd };
        let jumps = if map.info.kind == PROGRAMS { map.info.max_entries } else { 0 };
        let programs: Vec<u32> = (0..jumps).filter_map(|number| map.look_up(number)).collect();
        found.insert(*id, map);
        for id in programs {
            find_maps(bpf_fd(PROGRAM_BY_ID, &[id, 0, 0]).unwrap().as_fd(), found);
        }
    }
}

impl Map {
    /// Removes all entries, or makes them zero; but what leads nowhere without an entry elsewhere stays, and
    /// what never changes.
    fn clear(&self) {
        /// `BPF_F_RDONLY_PROG`: read-only data, which is frozen.
        const READ_ONLY: u32 = 1 << 7;
        let MapInfo { kind, key_size, value_size, max_entries, flags, name, .. } = self.info;
        let name = str::from_utf8(&name).unwrap().trim_end_matches('\0');
        let stays = matches!(name, "SETTINGS" | "TRUST" | "ROUTES_V4" | "ROUTES_V6" | "HOPS");
        match kind {
            _ if stays => {}
            HASH | LRU_HASH => {
                let mut key = vec![0_u8; key_size as usize];
                while self.call(NEXT_KEY, None, &mut key) {
                    self.call(DELETE, Some(&key.clone()), &mut []);
                }
            }
            DEVICES => {
                for number in 0..max_entries {
                    self.call(DELETE, Some(&number.to_ne_bytes()), &mut []);
                }
            }
            ARRAY if flags & READ_ONLY != 0 => {}
            ARRAY | PER_CPU_ARRAY => {
                // The kernel reads as many as it may have.
                let cpus = if kind == ARRAY { 1 } else { 8192 };
                let mut zero = vec![0_u8; value_size.next_multiple_of(8) as usize * cpus];
                for number in 0..max_entries {
                    let written = self.call(UPDATE, Some(&number.to_ne_bytes()), &mut zero);
                    assert!(written, "{name}: {}", Error::last_os_error());
                }
            }
            // Of the log.
            PROGRAMS | RING_BUFFER => {}
            _ => panic!("{name}: nobody knows how to clear a map of type {kind}"),
        }
    }

    fn look_up(&self, number: u32) -> Option<u32> {
        let mut value = [0; 4];
        let found = self.call(LOOK_UP, Some(&number.to_ne_bytes()), &mut value);
        found.then(|| u32::from_ne_bytes(value))
    }

    /// Whether there is such an entry, or another.
    fn call(&self, command: i32, key: Option<&[u8]>, value: &mut [u8]) -> bool {
        #[repr(C)]
        struct Entry {
            map: u64,
            key: u64,
            value: u64,
            flags: u64,
        }
        let key = key.map_or(0, |key| key.as_ptr() as u64);
        let map = self.fd.as_raw_fd() as u64;
        let value = if value.is_empty() { 0 } else { value.as_mut_ptr() as u64 };
        match bpf(command, &Entry { map, key, value, flags: 0 }) {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Fills the kernel's description in, as far as `T` goes.
fn info<T>(of: BorrowedFd<'_>, mut info: T) -> T {
    #[repr(C)]
    struct Info {
        fd: u32,
        size: u32,
        info: u64,
    }
    let size = size_of::<T>() as u32;
    bpf(INFO, &Info { fd: of.as_raw_fd() as u32, size, info: (&raw mut info) as u64 }).unwrap();
    info
}
