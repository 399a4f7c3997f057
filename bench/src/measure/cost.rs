//! Nanoseconds of the programs for each class of packet, in BPF_PROG_TEST_RUN, beside the limit; and
//! what the verifier says of them.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::maps::{Array, ProgramArray, xdp::DevMap};
use aya::programs::{ProgramFd, TestRun as _, TestRunOptions, Xdp};
use etherparse::PacketBuilder;
use portfwd::datapath::Hook;
use portfwd::rule::Rule;
use portfwd_bench_ebpf::{HEADERS, Headers, Turn};
use portfwd_ebpf::path::Role;

use crate::measure::control::{self, Control};
use crate::measure::{Bench, progress};
use crate::proxy::{Forward, Transport};
use crate::report::{LIMIT, Unit, median};
use crate::rig::{self, Rig, Wire};
use crate::rules::{Rules, nth};
use crate::traffic::{Object, Plain};

pub const NAME: &str = "cost";

/// How often a packet is run at a time, and how many such times make one figure.
const REPEAT: u32 = 40_000;
const TIMES: u32 = 5;
/// Bytes of a frame.
const FRAME: usize = 128;

/// Rules under which some classes of packets are run.
struct Set {
    name: &'static str,
    /// In the form of `-p`.
    rules: Vec<String>,
    classes: Vec<Class>,
}

/// Packets that go the same way through the program.
struct Class {
    name: &'static str,
    role: Role,
    /// What XDP does with them.
    hit: bool,
    /// In turn.
    frames: Vec<Headers>,
}

pub fn run(bench: &mut Bench) -> Result<()> {
    let rig = Rig::new(Wire::Frames)?;
    let [wan, lan] = ["wan0", "lan0"].map(|name| rig::interface(&rig.router, name));
    let (wan, lan) = (wan?, lan?);
    let rounds = bench.options.rounds();
    let sets = sets(bench.options.quick);
    rig.router.enter(|| -> Result<()> {
        rig::pin(rig::PATH_CPU)?;
        let most = sets.iter().flat_map(|set| &set.classes).map(|class| class.frames.len()).max();
        let mut runner = Runner::new(lan, most.unwrap_or(1))?;
        let mut datapaths = Vec::new();
        for set in &sets {
            let rules: Vec<Rule> =
                set.rules.iter().map(|spec| control::rule(spec)).collect::<Result<_>>()?;
            let mut control = Control::load(&rig, &rules)
                .with_context(|| format!("cannot load the rules of \"{}\"", set.name))?;
            // A client that speaks again after an answer: what keeps flows has established this one.
            let [first, second] = [0, 1].map(|number| set.classes.get(number));
            if let (Some(forward), Some(reply)) = (first, second) {
                for class in [forward, reply, forward] {
                    let ingress = if class.role == Role::External { wan } else { lan };
                    let mut bytes = [0; FRAME];
                    let words = class.frames[0].0.iter().flat_map(|word| word.to_ne_bytes());
                    bytes.iter_mut().zip(words).for_each(|(byte, new)| *byte = new);
                    control.datapath.try_frame(Hook::Xdp, class.role, ingress, &bytes)?;
                }
            }
            datapaths.push(control.datapath);
        }
        for round in 1..=rounds {
            progress(&format!("{NAME}: round {round} of {rounds}"));
            for (set, datapath) in sets.iter().zip(&datapaths) {
                bench.wait_for_idle();
                for class in &set.classes {
                    let case = format!("{}, {}", class.name, set.name);
                    let ingress = if class.role == Role::External { wan } else { lan };
                    runner.set_frames(ingress, &class.frames)?;
                    let [limit, program] = runner
                        .compare(datapath.program(Hook::Xdp, class.role)?, class.hit)
                        .with_context(|| case.clone())?;
                    let mut sample = |contender, value| {
                        bench.sample(NAME, &case, contender, round, (value, Unit::Nanoseconds));
                    };
                    sample(LIMIT, limit);
                    sample("portfwd", program);
                    sample("portfwd, beyond the limit", program - limit);
                }
            }
        }
        if let Some(datapath) = datapaths.first() {
            for verified in datapath.verified() {
                let case = format!("program {}", verified.program);
                let mut sample = |what, value, unit| {
                    bench.sample(NAME, &case, what, 1, (value, unit));
                };
                if let Some(instructions) = verified.instructions {
                    sample("verified", instructions.into(), Unit::Instructions);
                }
                if let Some(size) = verified.size {
                    sample("size", size.into(), Unit::Bytes);
                }
                let milliseconds = verified.time.as_secs_f64() * 1e3;
                sample("verifier and compiler", milliseconds, Unit::Milliseconds);
            }
        }
        Ok(())
    })
}

/// What is measured: each class under the rules that it needs and no others, as a program may be made
/// for its rules.
fn sets(quick: bool) -> Vec<Set> {
    let client = SocketAddr::new(nth(rig::CLIENTS, 7).into(), 5000);
    let client6 = SocketAddr::new(rig::CLIENT6.into(), 5000);
    let foreign = SocketAddr::from(([203, 0, 113, 9], 10_000));
    let external = |port| SocketAddr::new(rig::EXTERNAL.into(), port);
    let backend = |port| SocketAddr::new(rig::SERVER.into(), port);
    let (external6, backend6) = (IpAddr::from(rig::WAN6), IpAddr::from(rig::SERVER6));
    let (udp, tcp) = (Transport::Udp, Transport::Tcp);
    let class = |name, role, hit, frames| Class { name, role, hit, frames };
    let forward = |name, transport, from, to| {
        class(name, Role::External, true, vec![frame(transport, from, to)])
    };
    let reply = |name, transport, from, to| {
        class(name, Role::Internal, true, vec![frame(transport, from, to)])
    };
    let misses = || {
        let miss = |name, to| class(name, Role::External, false, vec![frame(udp, client, to)]);
        let none = miss("miss: our address, no rule", external(9));
        let foreign = miss("miss: foreign address", foreign);
        let inside = vec![frame(udp, SocketAddr::from(([192, 168, 77, 200], 9)), client)];
        [none, foreign, class("miss: reply, no backend", Role::Internal, false, inside)]
    };
    let v4 = format!("{}:{}/udp", external(10_000), backend(20_000));
    let v4_tcp = format!("{}:{}/tcp", external(10_000), backend(20_000));
    let v6 = format!("[{external6}]:10000:[{backend6}]:20000/udp");
    let v6_at = |address, port| SocketAddr::new(address, port);

    const MANY: u32 = 10_000;
    let many: Vec<String> = Rules::Single(MANY).iter().map(|rule| rule.spec()).collect();
    let each = |frame: &dyn Fn(&Forward) -> Headers| {
        let udp_rules = Rules::Single(MANY).iter().filter(|rule| rule.transport == udp);
        udp_rules.map(|rule| frame(&rule)).collect::<Vec<_>>()
    };
    let all_forward = each(&|rule| frame(udp, client, rule.listen.into()));
    let all_reply = each(&|rule| frame(udp, rule.to.into(), client));

    let mut sets = vec![
        Set {
            name: "1 rule",
            rules: vec![v4.clone()],
            classes: [
                forward("forward v4 UDP", udp, client, external(10_000)),
                reply("reply v4 UDP", udp, backend(20_000), client),
            ]
            .into_iter()
            .chain(misses())
            .collect(),
        },
        Set {
            name: "1 rule",
            rules: vec![v4_tcp],
            classes: vec![
                forward("forward v4 TCP", tcp, client, external(10_000)),
                reply("reply v4 TCP", tcp, backend(20_000), client),
            ],
        },
        Set {
            name: "1 rule",
            rules: vec![v6.clone()],
            classes: vec![
                forward("forward v6 UDP", udp, client6, v6_at(external6, 10_000)),
                reply("reply v6 UDP", udp, v6_at(backend6, 20_000), client6),
            ],
        },
        Set {
            name: "with a flow",
            rules: vec![v4.clone(), format!("{}:{}/udp", external(9), backend(20_000))],
            classes: vec![
                forward("forward v4 UDP", udp, client, external(10_000)),
                reply("reply v4 UDP", udp, backend(20_000), client),
            ],
        },
        Set {
            name: "with a flow",
            rules: vec![v6.clone(), format!("[{external6}]:9:[{backend6}]:20000/udp")],
            classes: vec![
                forward("forward v6 UDP", udp, client6, v6_at(external6, 10_000)),
                reply("reply v6 UDP", udp, v6_at(backend6, 20_000), client6),
            ],
        },
        Set {
            name: "65,535 ports as one range",
            rules: vec![format!("{}:1-65535:{}/udp", rig::EXTERNAL, rig::SERVER)],
            classes: vec![
                forward("forward v4 UDP", udp, client, external(10_000)),
                forward("forward v4 UDP, ephemeral port", udp, client, external(40_000)),
                reply("reply v4 UDP", udp, backend(10_000), client),
            ],
        },
        Set {
            name: "DMZ host",
            rules: vec![format!("{}:*:{}", rig::EXTERNAL, rig::SERVER) + "/udp"],
            classes: vec![
                forward("forward v4 UDP", udp, client, external(10_000)),
                reply("reply v4 UDP", udp, backend(10_000), client),
            ],
        },
    ];
    if !quick {
        let mut classes = vec![
            forward("forward v4 UDP", udp, client, external(10_000)),
            class("forward v4 UDP, all rules in turn", Role::External, true, all_forward),
            reply("reply v4 UDP", udp, backend(20_000), client),
            class("reply v4 UDP, all rules in turn", Role::Internal, true, all_reply),
        ];
        classes.extend(misses());
        sets.push(Set { name: "10,000 rules", rules: many, classes });
    }
    sets
}

/// A packet as it comes to the router.
fn frame(transport: Transport, from: SocketAddr, to: SocketAddr) -> Headers {
    let (source, destination) =
        if to.ip() == IpAddr::from(rig::CLIENT6) || to.ip() == IpAddr::from(nth(rig::CLIENTS, 7)) {
            (rig::SERVER_MAC, rig::LAN_MAC)
        } else {
            (rig::CLIENT_MAC, rig::WAN_MAC)
        };
    let link = PacketBuilder::ethernet2(source, destination);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => link.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => link.ipv6(from.octets(), to.octets(), 64),
        (from, to) => unreachable!("{from} and {to} are of two families"),
    };
    let headers = if from.is_ipv4() { 34 } else { 54 };
    let mut bytes = Vec::with_capacity(FRAME);
    let written = match transport {
        Transport::Udp => {
            ip.udp(from.port(), to.port()).write(&mut bytes, &[0; FRAME][headers + 8..])
        }
        Transport::Tcp => {
            let tcp = ip.tcp(from.port(), to.port(), 1, 1024).ack(1);
            tcp.write(&mut bytes, &[0; FRAME][headers + 20..])
        }
    };
    written.unwrap_or_else(|error| unreachable!("a vector takes all: {error}"));
    let mut words = [0; HEADERS / 8];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    }
    Headers(words)
}

/// Runs programs on frames that come in turn.
struct Runner {
    /// The limit, and a program that does nothing.
    programs: Ebpf,
    prepare: Ebpf,
    ingress: u32,
}

impl Runner {
    /// `device` is where the limit redirects to; there will never be more than `frames` frames.
    fn new(device: u32, frames: usize) -> Result<Self> {
        let mut programs = Object::new().load(&["swap", "nothing"])?;
        let mut devices: DevMap<_> = programs.map_mut("DEVICE").context("DEVICE")?.try_into()?;
        devices.set(0, device, None, 0)?;
        let mut object = Object::new();
        object.0.map_max_entries("FRAMES", frames as u32);
        let prepare = object.load(&["prepare"])?;
        Ok(Self { programs, prepare, ingress: 0 })
    }

    /// These frames come in turn by an interface from here on.
    fn set_frames(&mut self, ingress: u32, frames: &[Headers]) -> Result<()> {
        self.ingress = ingress;
        let map = self.prepare.map_mut("FRAMES").context("FRAMES")?;
        let mut map: Array<_, Plain<Headers>> = map.try_into()?;
        for (number, frame) in frames.iter().enumerate() {
            map.set(number as u32, Plain(*frame), 0)?;
        }
        let map = self.prepare.map_mut("TURN").context("TURN")?;
        let mut turn: Array<_, Plain<Turn>> = map.try_into()?;
        turn.set(0, Plain(Turn { next: 0, frames: frames.len() as u32 }), 0)?;
        Ok(())
    }

    /// Nanoseconds that the limit takes for a packet, and that `program` takes, beyond a program
    /// that does nothing.
    fn compare(&mut self, program: &ProgramFd, hit: bool) -> Result<[f64; 2]> {
        const PASS: u32 = 2;
        const REDIRECT: u32 = 4;
        let Self { programs, prepare, ingress } = self;
        let fd = |name: &str| -> Result<&ProgramFd> {
            Ok(programs.program(name).context("no such program")?.fd()?)
        };
        let all = [
            (fd("nothing")?, PASS),
            (fd("swap")?, REDIRECT),
            (program, if hit { REDIRECT } else { PASS }),
        ];
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..TIMES {
            for ((program, expected), times) in all.iter().zip(&mut times) {
                times.push(time(prepare, *ingress, program, *expected)?);
            }
        }
        let [nothing, limit, program] = times.map(|times| median(&times));
        Ok([limit - nothing, program - nothing])
    }
}

/// Nanoseconds of one run of `prepare` and then `program`, which ends with the action `expected`.
fn time(prepare: &mut Ebpf, ingress: u32, program: &ProgramFd, expected: u32) -> Result<f64> {
    let mut next: ProgramArray<_> = prepare.map_mut("PROGRAM").context("PROGRAM")?.try_into()?;
    next.set(0, program, 0).context("a program cannot be called from `prepare`")?;
    // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, FRAME as u32, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
    let prepare: &Xdp = prepare.program("prepare").context("prepare")?.try_into()?;
    let result = prepare.test_run(TestRunOptions {
        data_in: Some(&[0; FRAME]),
        ctx_in: Some(&context),
        repeat: REPEAT,
        ..TestRunOptions::default()
    })?;
    let action = result.return_value;
    ensure!(action == expected, "XDP action {action} where {expected} is right");
    // In whole nanoseconds. A clock of our own would see what the call waits for around the runs.
    Ok(result.duration.as_nanos() as f64)
}
