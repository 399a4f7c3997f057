//! Traffic by the bench's own eBPF programs: frames that the kernel makes of BPF_PROG_TEST_RUN, and
//! a program that counts and checks them where they should arrive.

use anyhow::{Context, Result};
use aya::maps::{PerCpuArray, xdp::DevMap};
use aya::programs::xdp::XdpMode;
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use portfwd_bench_ebpf::{
    Clients, Expected, Headers, Pace, Position, Received, Services, Stream, Turn,
};
use portfwd_tests::Namespace;

use crate::rig::{self, Rig};

/// The compiled programs of `bench/ebpf`; `build.rs` makes them.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench"));

/// Packets that go through all programs before the next ones start.
const BATCH: u32 = 64;

/// A type of `portfwd_bench_ebpf`, as aya wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Plain<T>(pub T);

/// The types that stand in maps and in read-only data.
pub trait Row: Copy + 'static {}
impl Row for Headers {}
impl Row for Turn {}
impl Row for Stream {}
impl Row for Expected {}
impl Row for Position {}
impl Row for Received {}
impl Row for Pace {}
// SAFETY: rows are integers without padding.
unsafe impl<T: Row> Pod for Plain<T> {}

/// A loader of the object, for what has to be set before its programs are loaded.
pub struct Object<'a>(pub EbpfLoader<'a>);

impl<'a> Object<'a> {
    pub fn new() -> Self {
        Self(EbpfLoader::new())
    }

    /// Makes the maps, and the named programs ready.
    pub fn load(&mut self, programs: &[&str]) -> Result<Ebpf> {
        let mut ebpf = self.0.load(OBJECT).context("the kernel refuses the bench's eBPF object")?;
        for name in programs {
            let program = ebpf.program_mut(name).with_context(|| format!("no program {name}"))?;
            let xdp: &mut Xdp = program.try_into()?;
            xdp.load().with_context(|| format!("the kernel refuses program {name}"))?;
        }
        Ok(ebpf)
    }
}

/// Where frames come from, and where they arrive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From clients to services.
    Forward,
    Reply,
}

/// What traffic is like, whichever way it goes.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Client addresses and ports, each of which is a flow; `u32::MAX` for flows that never end.
    pub flows: u32,
    /// Bytes of the frame with its Ethernet header, without what only a wire has (FCS, gap).
    pub frame: u32,
    /// Where services are for those who send.
    pub sent_to: Services,
    /// Where they are for those who receive: elsewhere if addresses are translated on the way.
    pub arrives_at: Services,
    /// Whether what arrives comes from a client's own address.
    pub keeps_client: bool,
    /// Whether each flow has a packet, an answer and another packet before anything is measured.
    pub established: bool,
}

impl Load {
    /// What is sent in a direction. Services answer from where they are.
    fn stream(&self, direction: Direction) -> Stream {
        let (link, services) = match direction {
            Direction::Forward => ((rig::WAN_MAC, rig::CLIENT_MAC), self.sent_to),
            Direction::Reply => ((rig::LAN_MAC, rig::SERVER_MAC), self.arrives_at),
        };
        Stream {
            clients: self.clients(),
            services,
            length: self.length(),
            reply: (direction == Direction::Reply).into(),
            link: link_words(link),
        }
    }

    /// What arrives in a direction.
    pub fn expected(&self, direction: Direction) -> Expected {
        Expected {
            clients: self.clients(),
            services: match direction {
                Direction::Forward => self.arrives_at,
                Direction::Reply => self.sent_to,
            },
            length: self.length(),
            reply: (direction == Direction::Reply).into(),
            any_client: (!self.keeps_client).into(),
        }
    }

    fn clients(&self) -> Clients {
        Clients { address: rig::CLIENTS.to_bits(), port: 1024, count: self.flows }
    }

    fn length(&self) -> u32 {
        self.frame - 14
    }
}

/// Sends packets of a load.
pub struct Generator {
    ebpf: Ebpf,
    frame: Vec<u8>,
}

impl Generator {
    /// From the client's side, or from the server's.
    pub fn new(rig: &Rig, direction: Direction, load: &Load) -> Result<Self> {
        let ebpf = sender("generate", rig, direction, load)?;
        Ok(Self { ebpf, frame: vec![0; load.frame as usize] })
    }

    /// Sends so many packets. They have been through everything that runs on this core when it
    /// returns, some 10 to 20 ms after the last of them.
    pub fn send(&mut self, packets: u32) -> Result<()> {
        // The kernel takes 0 for 1.
        if packets == 0 {
            return Ok(());
        }
        run(&self.ebpf, "generate", &self.frame, packets, BATCH.min(packets))
    }
}

/// The object with a program that sends a load from the side where its direction begins.
pub fn sender(program: &str, rig: &Rig, direction: Direction, load: &Load) -> Result<Ebpf> {
    let namespace = match direction {
        Direction::Forward => &rig.client,
        Direction::Reply => &rig.server,
    };
    let stream = Plain(load.stream(direction));
    let mut object = Object::new();
    object.0.override_global("STREAM", &stream, true);
    let mut ebpf = object.load(&[program])?;
    set_device(&mut ebpf, namespace, "eth0")?;
    // Where it does nothing but be attached. Else the kernel would make each run known to its XDP
    // dispatcher, and wait for RCU afterwards: 24 ms on top of each.
    attach(&mut ebpf, program, namespace, "lo", XdpMode::Skb)?;
    Ok(ebpf)
}

/// Runs a program that sends frames: so many, and so many in a batch.
pub fn run(ebpf: &Ebpf, program: &str, frame: &[u8], frames: u32, batch: u32) -> Result<()> {
    let program: &Xdp = ebpf.program(program).context("no such program")?.try_into()?;
    let mut options =
        TestRunOptions { data_in: Some(frame), repeat: frames, ..TestRunOptions::default() };
    options.attrs = options.attrs.xdp_live_frames(batch);
    program.test_run(options).context("cannot send frames")?;
    Ok(())
}

/// Counts, checks and drops the packets of a load.
pub struct Receiver {
    ebpf: Ebpf,
}

impl Receiver {
    /// At the end to which the direction leads.
    pub fn new(rig: &Rig, direction: Direction, load: &Load) -> Result<Self> {
        let namespace = match direction {
            Direction::Forward => &rig.server,
            Direction::Reply => &rig.client,
        };
        let expected = Plain(load.expected(direction));
        let mut object = Object::new();
        object.0.override_global("EXPECTED", &expected, true);
        let mut ebpf = object.load(&["receive"])?;
        attach(&mut ebpf, "receive", namespace, "eth0", XdpMode::Driver)?;
        Ok(Self { ebpf })
    }

    /// What came so far.
    pub fn received(&self) -> Result<Received> {
        received(&self.ebpf)
    }
}

/// What the program of an object that counts has seen so far.
pub fn received(ebpf: &Ebpf) -> Result<Received> {
    let map: PerCpuArray<_, Plain<Received>> =
        ebpf.map("RECEIVED").context("RECEIVED")?.try_into()?;
    let mut sum = Received::default();
    for Plain(cpu) in map.get(&0, 0)?.iter() {
        sum.packets += cpu.packets;
        sum.checked += cpu.checked;
        sum.wrong += cpu.wrong;
    }
    Ok(sum)
}

/// The limit on the router: a program on each side that sends everything to the other.
pub struct Limit {
    _programs: [Ebpf; 2],
}

impl Limit {
    pub fn start(rig: &Rig) -> Result<Self> {
        let one = |from, to, link| -> Result<Ebpf> {
            let link = link_words(link);
            let mut object = Object::new();
            object.0.override_global("LINK", &link, true);
            let mut ebpf = object.load(&["swap"])?;
            set_device(&mut ebpf, &rig.router, to)?;
            attach(&mut ebpf, "swap", &rig.router, from, XdpMode::Driver)?;
            Ok(ebpf)
        };
        let forward = one("wan0", "lan0", (rig::SERVER_MAC, rig::LAN_MAC))?;
        let reply = one("lan0", "wan0", (rig::CLIENT_MAC, rig::WAN_MAC))?;
        Ok(Self { _programs: [forward, reply] })
    }
}

/// The device that programs of this object redirect to.
pub fn set_device(ebpf: &mut Ebpf, namespace: &Namespace, name: &str) -> Result<()> {
    let index = rig::interface(namespace, name)?;
    let mut devices: DevMap<_> = ebpf.map_mut("DEVICE").context("DEVICE")?.try_into()?;
    // The map takes the device out of the namespace of who writes it.
    namespace.enter(|| devices.set(0, index, None, 0)).context("cannot redirect to a device")
}

/// Attaches a program, until the object is dropped.
pub fn attach(
    ebpf: &mut Ebpf,
    program: &str,
    namespace: &Namespace,
    interface: &str,
    mode: XdpMode,
) -> Result<()> {
    let index = rig::interface(namespace, interface)?;
    let xdp: &mut Xdp = ebpf.program_mut(program).context("no such program")?.try_into()?;
    namespace
        .enter(|| xdp.attach_to_if_index(index, mode))
        .with_context(|| format!("cannot attach {program} to {interface}"))?;
    Ok(())
}

/// Link addresses, destination and source, as they stand in a frame.
fn link_words((destination, source): ([u8; 6], [u8; 6])) -> [u32; 3] {
    let bytes = [destination, source].concat();
    std::array::from_fn(|at| u32::from_ne_bytes(std::array::from_fn(|byte| bytes[4 * at + byte])))
}
