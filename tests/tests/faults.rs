//! What happens to traffic while portfwd is killed, restarted, reloaded, upgraded or taken off, and while the network
//! changes: a constant load goes through rules of each sort, and each of its messages is accounted for.
//!
//! `PORTFWD_TEST_LONG=1` makes what takes a number of rounds longer, `PORTFWD_OTHER_BIN` names a build to change to
//! (`cargo xtask test` makes one with tables of another layout), and `SEED` repeats random moments. A table of all faults is printed when the last test is done.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use portfwd_tests::load::{self, Backend, Kind, Load, Record, Tally, Version};
use portfwd_tests::peers::{self, Answer, Background, Server};
use portfwd_tests::random::{self, Random};
use portfwd_tests::rig::{self, Options, Rig};
use portfwd_tests::wire::{self, Capture, Direction};
use portfwd_tests::{Namespace, Portfwd, TempDir, binary, is_root, netns, sys};
use serde_json::Value;

/// How long forwarding may take to come back once the network is as it was.
const RECOVERY: Duration = Duration::from_secs(15);
/// The ports of rules that change together, and their backend's.
const PROBES: [u16; 5] = [7201, 7202, 7203, 7204, 7205];
const PROBED: u16 = 7300;

fn is_long() -> bool {
    std::env::var("PORTFWD_TEST_LONG").is_ok_and(|it| it == "1")
}

/// How often it is killed: at TC, where all programs have to be loaded, less often.
fn rounds() -> u32 {
    if is_long() || portfwd_tests::attach() != "tc" { 20 } else { 5 }
}

/// Whether the kernel says which veth transmits frames of XDP (6.3): else portfwd has the stack send them.
fn veths_transmit() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    version >= (6, 3) || portfwd_tests::attach() == "tc"
}

fn pause(milliseconds: u64) {
    sleep(Duration::from_millis(milliseconds));
}

/// Prints what a fault did, and again when all is done.
fn tell(fault: &str, tally: &Tally) {
    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
    static AT_END: Once = Once::new();
    extern "C" fn at_end() {
        let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        println!("\n{}\n{}\n", load::heading(), lines.join("\n"));
    }
    // SAFETY: the function is there for as long as the process.
    AT_END.call_once(|| assert_eq!(unsafe { libc::atexit(at_end) }, 0));
    let attach = portfwd_tests::attach();
    let line = load::line(&format!("{fault} ({attach})"), tally);
    println!("{}\n{line}", load::heading());
    let total = tally.total();
    println!(
        "{} lost there, {} back, {} overtaken",
        total.lost_forward, total.lost_reply, total.reordered
    );
    total.broken.iter().for_each(|broken| println!("{broken}"));
    LINES.lock().unwrap_or_else(PoisonError::into_inner).push(line);
}

/// A rig with portfwd on its router, one at a time: what is lost for want of a processor says nothing.
struct Bed {
    portfwd: Option<Portfwd>,
    /// With one it runs with `--keep`.
    instance: Option<String>,
    binary: PathBuf,
    directory: TempDir,
    rig: Rig,
    _alone: MutexGuard<'static, ()>,
}

impl Bed {
    /// With the load's rules.
    fn plain() -> Self {
        Self::new(None)
    }

    /// The same with `--keep`, as an instance of its own.
    fn kept() -> Self {
        static NUMBER: Mutex<u32> = Mutex::new(0);
        let mut number = NUMBER.lock().unwrap_or_else(PoisonError::into_inner);
        *number += 1;
        Self::new(Some(format!("test-{}-{number}", std::process::id())))
    }

    fn new(instance: Option<String>) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let rig = Rig::with(Options { second_server: true, ..Options::default() }).unwrap();
        // A link that goes down otherwise loses its IPv6 addresses.
        rig.router.set_sysctl("net.ipv6.conf.all.keep_addr_on_down", "1").unwrap();
        // What goes through the stack is lost, as where Docker is.
        let policy = if veths_transmit() { "drop" } else { "accept" };
        let rules = format!(
            "add table inet firewall; add chain inet firewall forward \
             {{ type filter hook forward priority 0; policy {policy}; }}"
        );
        netns::run(rig.router.command("nft").arg(rules)).unwrap();
        let directory = TempDir::new().unwrap();
        let bed = Self { portfwd: None, instance, binary: binary(), directory, rig, _alone: alone };
        bed.configure("");
        bed
    }

    fn remove_firewall(&self) {
        let table = ["delete", "table", "inet", "firewall"];
        netns::run(self.rig.router.command("nft").args(table)).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("portfwd.toml")
    }

    /// Writes the file: the load's rules as they usually are, and others.
    fn configure(&self, others: &str) {
        self.configure_to(|kind| kind.backends().to_vec(), others);
    }

    fn configure_to(&self, to: impl Fn(Kind) -> Vec<Backend>, others: &str) {
        let interfaces = portfwd_tests::interfaces("external = [\"wan0\"]");
        fs::write(self.file(), interfaces + &load::rules(to) + others).unwrap();
    }

    fn instance(&self) -> Vec<&str> {
        self.instance.iter().flat_map(|name| ["--instance", name]).collect()
    }

    /// Starts it; it is ready after `wait_until_ready`.
    fn launch(&self) -> Portfwd {
        let file = self.file();
        let mut arguments = vec!["--config", file.to_str().unwrap()];
        if self.instance.is_some() {
            arguments.push("--keep");
        }
        arguments.extend(self.instance());
        Portfwd::launch(&self.rig.router, &self.binary, &arguments, self.directory.path()).unwrap()
    }

    fn start(&mut self) {
        let mut portfwd = self.launch();
        portfwd.wait_until_ready().unwrap();
        self.portfwd = Some(portfwd);
    }

    fn portfwd(&self) -> &Portfwd {
        self.portfwd.as_ref().unwrap()
    }

    /// Ends it by a signal; gives what it printed.
    fn end(&mut self, signal: i32) -> String {
        let (status, printed) = self.portfwd.take().unwrap().end(signal).unwrap();
        assert!(status.success() || signal == libc::SIGKILL, "{status}: {printed}");
        assert!(!printed.contains("panicked"), "{printed}");
        printed
    }

    /// `portfwd WORDS`, to the instance.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.rig.router.command(&self.binary);
        command.args(words).arg("--socket").arg(self.directory.path().join("portfwd.sock"));
        command.args(self.instance());
        command
    }

    /// `portfwd reload`; gives how long it took.
    fn reload(&self) -> Duration {
        let begin = Instant::now();
        let done = netns::run(&mut self.command(&["reload"]));
        done.unwrap_or_else(|error| panic!("{error:#}: {}", self.portfwd().stderr()));
        begin.elapsed()
    }

    fn load(&self) -> Load {
        let load = Load::start(&self.rig, load::Options::default()).unwrap();
        load.settle(RECOVERY).unwrap();
        load
    }

    /// Ends a load that must have lost nothing, for which `fault` was the reason.
    fn flawless(&self, fault: &str, load: Load) -> Record {
        let record = load.stop().unwrap();
        let tally = record.tally();
        tell(fault, &tally);
        if let Err(error) = tally.ensure_flawless() {
            let wire = self.rig.lost_on_wire().unwrap();
            let said = self.portfwd.as_ref().map(Portfwd::stderr).unwrap_or_default();
            panic!("{fault}: {error} ({wire} lost on the way into a veth)\n{said}");
        }
        record
    }

    fn captures(&self) -> [Capture<wire::Tally>; 3] {
        let ends = [&self.rig.client, &self.rig.server, self.rig.second_server.as_ref().unwrap()];
        ends.map(|end| Capture::tally(end, "eth0").unwrap())
    }

    /// The counters say what was sent into the wire, and for UDP what the load sent.
    fn ensure_counted(&self, record: &Record, captures: &[Capture<wire::Tally>; 3]) {
        let [client, servers @ ..] = captures;
        let count = |capture: &Capture<wire::Tally>, version, of: &dyn Fn(&wire::Key) -> bool| {
            let counted = |key: &wire::Key| {
                let is_v4 = version == Version::V4;
                key.direction == Direction::Sent && key.source.is_ipv4() == is_v4 && of(key)
            };
            capture.look(|tally| tally.count(counted).packets)
        };
        let differ = || {
            let stats = self.portfwd().stats().unwrap();
            Kind::ALL.into_iter().flat_map(|kind| Version::BOTH.map(|it| (kind, it))).find_map(
                |(kind, version)| {
                    let name = kind.rule(version);
                    let forward =
                        count(client, version, &|it| it.destination.port() == kind.listen());
                    let replies = servers.iter().map(|server| {
                        count(server, version, &|it| it.source.port() == kind.port())
                    });
                    let sent = [forward, replies.sum()];
                    let rule = rule(&stats, &name);
                    let counted = ["forward", "reply"].map(|way| packets(&rule[way]));
                    (sent != counted).then(|| format!("{name}: sent {sent:?}, counted {counted:?}"))
                },
            )
        };
        until("all is counted", 10, || differ().map_or(Ok(()), Err));

        let flows = self.portfwd().json("flows").unwrap();
        for (flow, [sent, arrived, _]) in record.flows().filter(|(flow, _)| flow.kind.is_stateful())
        {
            let is_it = |listed: &&Value| {
                listed["client"] == *flow.client.to_string()
                    && listed["rule"] == *flow.kind.rule(flow.version)
            };
            let listed = flows["flows"].as_array().unwrap().iter().find(is_it);
            let listed = listed.unwrap_or_else(|| panic!("{flow:?} is not listed: {flows}"));
            if !flow.kind.is_tcp() {
                let counted = ["forward", "reply"].map(|way| packets(&listed[way]));
                assert_eq!(counted, [sent, arrived], "{listed}");
            }
        }
        let sent = |capture: &Capture<wire::Tally>| capture.look(wire::Tally::ensure_valid);
        captures.iter().for_each(|capture| sent(capture).unwrap());
    }

    /// Where an instance's programs and maps are pinned.
    fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf/portfwd").join(self.instance.as_deref().unwrap())
    }

    fn state(&self) -> PathBuf {
        Path::new("/run/portfwd").join(format!("{}.json", self.instance.as_deref().unwrap()))
    }

    /// What is attached to the router's interfaces.
    fn attached(&self) -> Vec<String> {
        let router = &self.rig.router;
        let links = router.ip("-j -d link show").unwrap();
        let links: Value = serde_json::from_str(&links).unwrap();
        let mut found = Vec::new();
        for link in links.as_array().unwrap() {
            let name = link["ifname"].as_str().unwrap();
            if !link["xdp"].is_null() {
                found.push(format!("XDP at {name}"));
            }
            let tcx = router.enter(|| sys::tcx_programs(sys::interface_index(name).unwrap()));
            if tcx > 0 {
                found.push(format!("{tcx} of TCX at {name}"));
            }
            for way in ["ingress", "egress"] {
                let mut tc = router.command("tc");
                let filters = netns::run(tc.args(["filter", "show", "dev", name, way])).unwrap();
                if !filters.trim().is_empty() {
                    found.push(format!("{way} of {name}: {filters}"));
                }
            }
        }
        found
    }

    /// Whether a datagram to this rule is answered.
    fn answers(&self, kind: Kind, version: Version) -> bool {
        let place = SocketAddr::new(rig::WAN.both()[version as usize], kind.listen());
        let Ok(socket) = peers::udp_client(&self.rig.client, place) else { return false };
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        peers::exchange(&socket, b"who am I?").is_ok()
    }
}

impl Drop for Bed {
    /// What a test that failed has left pinned would stay.
    fn drop(&mut self) {
        drop(self.portfwd.take());
        if self.instance.is_some() {
            let _ = fs::remove_dir_all(self.pins());
            for end in ["json", "lock", "sock"] {
                let _ = fs::remove_file(self.state().with_extension(end));
            }
        }
    }
}

fn rule<'a>(stats: &'a Value, name: &str) -> &'a Value {
    let rules = stats["rules"].as_array().unwrap();
    rules.iter().find(|rule| rule["name"] == name).unwrap()
}

fn packets(count: &Value) -> u64 {
    count["packets"].as_u64().unwrap()
}

fn until<T>(what: &str, patience: u64, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(patience);
    loop {
        match look() {
            Ok(found) => return found,
            Err(missing) => {
                assert!(Instant::now() < deadline, "not within {patience} s: {what}: {missing}");
            }
        }
        pause(20);
    }
}

/// Rules beside the load's: datagrams of each of these ports go to the same port of a backend.
fn other_rules(ports: impl IntoIterator<Item = u16>, backend: Backend) -> String {
    let to = SocketAddr::new(backend.address(Version::V4), PROBED);
    let rule = |port| {
        format!(
            "[[rule]]\nname = \"other-{port}\"\nprotocol = \"udp\"\nlisten = \"{port}\"\nto = \"{to}\"\n"
        )
    };
    ports.into_iter().map(rule).collect()
}

/// Tells by their answers which of the backends is behind [`other_rules`].
struct Probe {
    _servers: [Server; 2],
}

impl Probe {
    const QUESTION: &'static [u8] = b"who is there?";

    fn new(rig: &Rig) -> Self {
        let server = |backend: Backend, answer| {
            let address = SocketAddr::new(backend.address(Version::V4), PROBED);
            Server::udp(backend.namespace(rig).unwrap(), address, answer).unwrap()
        };
        Self { _servers: [server(Backend::A, Answer::Echo), server(Backend::B, Answer::Peer)] }
    }

    /// `None` if nobody answers.
    fn ask(&self, client: &Namespace, port: u16) -> Option<Backend> {
        let socket = peers::udp_client(client, SocketAddr::new(rig::WAN.v4.into(), port)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let answer = peers::exchange(&socket, Self::QUESTION).ok()?;
        Some(if answer == Self::QUESTION { Backend::A } else { Backend::B })
    }

    /// The one behind all of [`PROBES`].
    fn ask_all(&self, client: &Namespace) -> Backend {
        let found = PROBES.map(|port| self.ask(client, port));
        assert!(found[0].is_some() && found.iter().all(|it| *it == found[0]), "{found:?}");
        found[0].unwrap()
    }
}

// The load itself.

#[test]
fn without_a_fault_nothing_is_lost() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::plain();
    bed.start();
    let captures = bed.captures();
    let load = bed.load();
    pause(10_000);
    let record = bed.flawless("none", load);
    bed.ensure_counted(&record, &captures);
}

#[test]
fn without_a_processor_to_spare_nothing_is_lost() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::plain();
    bed.start();
    let processors = std::thread::available_parallelism().unwrap().get();
    let burn = |_| {
        let mut command = Command::new("timeout");
        Background::start(command.args(["60", "sh", "-c", "while :; do :; done"])).unwrap()
    };
    let burners: Vec<_> = (0..processors).map(burn).collect();
    let load = bed.load();
    pause(10_000);
    bed.flawless("none, all processors busy", load);
    drop(burners);
}

#[test]
fn what_is_lost_shows() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::plain();
    bed.start();
    let load = bed.load();
    pause(500);
    bed.end(libc::SIGINT);
    pause(200);
    bed.start();
    load.settle(RECOVERY).unwrap();
    let tally = load.stop().unwrap().tally();
    tell("a stop and a start, nothing is kept", &tally);
    assert!(tally.ensure_flawless().is_err());
    for kind in Kind::ALL {
        let sum = tally.of(kind);
        if kind.is_tcp() {
            assert_eq!(sum.broken.len(), 2, "{sum:?}");
        } else {
            assert!(sum.lost_forward > 0 && sum.gap > Duration::from_millis(200), "{sum:?}");
        }
    }
}

#[test]
fn what_goes_astray_shows() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::plain();
    let moved = [Kind::Stateless, Kind::Masquerade];
    bed.configure_to(
        |kind| if moved.contains(&kind) { vec![Backend::B] } else { kind.backends().to_vec() },
        "",
    );
    bed.start();
    let load = bed.load();
    pause(500);
    let tally = load.stop().unwrap().tally();
    tell("two rules lead elsewhere", &tally);
    for kind in Kind::ALL {
        let sum = tally.of(kind);
        assert_eq!(sum.misdirected(), if moved.contains(&kind) { sum.sent } else { 0 }, "{sum:?}");
        assert_eq!(sum.lost(), 0, "{sum:?}");
    }
}

// The daemon ends and starts.

#[test]
fn killed_and_started_again() {
    if !is_root() {
        return;
    }
    let mut random = Random::new(random::seed());
    let mut bed = Bed::kept();
    bed.start();
    let captures = bed.captures();
    let load = bed.load();
    for _ in 0..rounds() {
        pause(random.below(300) as u64);
        bed.end(libc::SIGKILL);
        pause(random.below(100) as u64);
        bed.start();
    }
    load.settle(RECOVERY).unwrap();
    let record = bed.flawless(&format!("kill -9 and start, {} times", rounds()), load);
    bed.ensure_counted(&record, &captures);
}

#[test]
fn killed_while_it_starts() {
    if !is_root() {
        return;
    }
    let mut random = Random::new(random::seed());
    let mut bed = Bed::kept();
    bed.start();
    let captures = bed.captures();
    let load = bed.load();
    bed.end(libc::SIGKILL);
    let begin = Instant::now();
    bed.start();
    let takes = begin.elapsed().as_millis() as usize;
    for _ in 0..10 {
        if bed.portfwd.is_some() {
            bed.end(libc::SIGKILL);
        }
        bed.portfwd = Some(bed.launch());
        pause(random.below(takes + takes / 10) as u64);
    }
    bed.end(libc::SIGKILL);
    bed.start();
    load.settle(RECOVERY).unwrap();
    let record = bed.flawless("kill -9 while it starts, 10 times", load);
    bed.ensure_counted(&record, &captures);
    let sets = fs::read_dir(bed.pins().join("sets")).unwrap().count();
    assert_eq!(sets, 1, "sets that nobody uses are left");
}

#[test]
fn stopped_and_started_again() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::kept();
    let [stateless, stateful, ..] = PROBES;
    let others = other_rules([stateless, stateful], Backend::A) + "source = \"masquerade\"\n";
    bed.configure(&others);
    let mut more = others.clone();
    bed.start();
    let probe = Probe::new(&bed.rig);
    let captures = bed.captures();
    let load = bed.load();
    for round in 0..5 {
        pause(200);
        // A name that was not there before has a counter beside the others.
        more += &other_rules([7_400 + round as u16], Backend::A);
        bed.configure(&more);
        bed.reload();
        bed.end(libc::SIGTERM);
        // New flows come too while nobody is there.
        for port in [stateless, stateful] {
            assert_eq!(probe.ask(&bed.rig.client, port), Some(Backend::A), "round {round}");
        }
        pause(if round == 2 { 2_000 } else { 0 });
        bed.start();
    }
    load.settle(RECOVERY).unwrap();
    let record = bed.flawless("SIGTERM and start, 5 times, once 2 s away", load);
    bed.ensure_counted(&record, &captures);
    let set = fs::read_dir(bed.pins().join("sets")).unwrap().next().unwrap().unwrap().path();
    assert!(set.join("COUNTERS-0").exists() && !set.join("COUNTERS-1").exists(), "one map counts");
}

#[test]
fn an_upgrade_and_back() {
    if !is_root() {
        return;
    }
    let Some(other) = std::env::var_os("PORTFWD_OTHER_BIN") else {
        eprintln!("skipped: PORTFWD_OTHER_BIN names no other build");
        return;
    };
    let mut bed = Bed::kept();
    bed.start();
    let captures = bed.captures();
    let load = bed.load();
    for binary in [other.into(), binary()] {
        pause(500);
        bed.end(libc::SIGTERM);
        bed.binary = binary;
        bed.start();
        load.settle(RECOVERY).unwrap();
    }
    pause(500);
    let record = bed.flawless("another build, and back", load);
    bed.ensure_counted(&record, &captures);
}

// Rules change.

#[test]
fn reloaded_again_and_again() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::kept();
    bed.start();
    let probe = Probe::new(&bed.rig);
    let captures = bed.captures();
    let load = bed.load();
    let deadline = Instant::now() + Duration::from_secs(if is_long() { 60 } else { 10 });
    let mut took = Vec::new();
    let mut round = 0;
    while Instant::now() < deadline || round < 6 {
        let many = if round == 3 { 10_000 } else { round % 7 * 10 };
        let probed = PROBES[usize::from(round % 2)];
        let ports = (10_000..10_000 + many).chain([probed]);
        bed.configure(&other_rules(ports, Backend::A));
        let time = bed.reload();
        took.push((time, many));
        // It is live when the command ends.
        assert_eq!(probe.ask(&bed.rig.client, probed), Some(Backend::A), "round {round}");
        let list = bed.portfwd().json("list").unwrap();
        let rules = Kind::ALL.len() * Version::BOTH.len() + usize::from(many) + 1;
        assert_eq!(list["rules"].as_array().unwrap().len(), rules, "round {round}");
        if many == 10_000 {
            assert!(probe.ask(&bed.rig.client, 19_999).is_some());
        } else if round > 0 {
            assert_eq!(probe.ask(&bed.rig.client, PROBES[usize::from(1 - round % 2)]), None);
        }
        round += 1;
    }
    for (time, many) in took.iter().filter(|(_, many)| *many == 10_000) {
        println!("a reload to {many} rules more took {time:.1?}");
    }
    let mut few: Vec<_> = took.iter().filter(|(_, many)| *many < 10_000).collect();
    few.sort();
    let [first, middle, last] = [0, few.len() / 2, few.len() - 1].map(|at| few[at].0);
    println!("{} reloads to few: {first:.1?}, median {middle:.1?}, {last:.1?} at most", few.len());
    let record = bed.flawless(&format!("{round} reloads, one to 10,000 rules"), load);
    bed.ensure_counted(&record, &captures);
}

#[test]
fn a_rule_moves_to_another_backend() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::kept();
    bed.start();
    let mut load = bed.load();
    let moved = [Kind::Stateless, Kind::Masquerade];
    let mut windows = Vec::new();
    for round in 0..10 {
        let backend = if round % 2 == 0 { Backend::B } else { Backend::A };
        bed.configure_to(
            |kind| if moved.contains(&kind) { vec![backend] } else { kind.backends().to_vec() },
            "",
        );
        pause(200);
        // An answer that is on its way when its rule goes has no rule any more.
        let begin = Instant::now() - Duration::from_millis(50);
        moved.iter().for_each(|kind| load.allow(*kind, &[Backend::A, Backend::B]));
        bed.reload();
        moved.iter().for_each(|kind| load.allow(*kind, &[backend]));
        windows.push(begin..Instant::now());
    }
    pause(200);
    let record = load.stop().unwrap();
    tell("two rules move to another backend, 10 times", &record.tally());
    let within = |sent: Instant| windows.iter().any(|window| window.contains(&sent));
    let meanwhile = record.tally_of(within).total();
    let [lost, raw] = [meanwhile.lost_reply, meanwhile.misdirected_reply];
    println!("of the answers that were on their way {lost} were lost, {raw} came untranslated");
    record.tally_of(|sent| !within(sent)).ensure_flawless().unwrap();
    let total = record.tally().total();
    assert_eq!((total.lost_forward, total.misdirected_forward), (0, 0), "{total:?}");
    assert_eq!((total.duplicated, total.broken.len()), (0, 0), "{total:?}");
    // A few of each flow. What comes back without its rule may come from the backend's own address.
    let flows = record.flows().filter(|(flow, _)| moved.contains(&flow.kind)).count() as u64;
    assert!(total.lost_reply + total.misdirected_reply <= 10 * flows * 3, "{total:?}");
    for kind in Kind::ALL.into_iter().filter(|kind| !moved.contains(kind)) {
        let tally = record.tally();
        assert!(tally.of(kind).is_flawless(), "{tally:?}");
    }
}

#[test]
fn ended_in_the_middle_of_a_reload() {
    if !is_root() {
        return;
    }
    let mut random = Random::new(random::seed());
    let mut bed = Bed::kept();
    let ports = || PROBES.into_iter().chain(10_000..10_500);
    let write = |bed: &Bed, backend| bed.configure(&other_rules(ports(), backend));
    write(&bed, Backend::A);
    bed.start();
    let probe = Probe::new(&bed.rig);
    let captures = bed.captures();
    let load = bed.load();
    write(&bed, Backend::B);
    let mut takes = bed.reload();
    write(&bed, Backend::A);
    takes = takes.max(bed.reload());
    let (mut old, mut new) = (0, 0);
    for round in 0..rounds() {
        let [before, after] =
            if round % 2 == 0 { [Backend::A, Backend::B] } else { [Backend::B, Backend::A] };
        assert_eq!(probe.ask_all(&bed.rig.client), before, "round {round}");
        write(&bed, after);
        let signal = if random.one_in(2) { libc::SIGKILL } else { libc::SIGTERM };
        let mut command = bed.command(&["reload"]);
        let mut reload =
            Background::start(command.stdout(Stdio::null()).stderr(Stdio::null())).unwrap();
        sleep(takes * random.below(1_200) as u32 / 1_000);
        bed.end(signal);
        reload.wait(Duration::from_secs(30)).unwrap();
        // All of the old or all of the new.
        let found = probe.ask_all(&bed.rig.client);
        *(if found == before { &mut old } else { &mut new }) += 1;
        bed.start();
        assert_eq!(probe.ask_all(&bed.rig.client), after, "round {round}");
        let list = bed.portfwd().json("list").unwrap();
        let listed = list["rules"].as_array().unwrap().iter();
        let to = SocketAddr::new(after.address(Version::V4), PROBED).to_string();
        let others = listed.filter(|rule| rule["to"][0] == *to);
        assert_eq!(others.count(), ports().count(), "round {round}");
    }
    println!("while nobody was there: {old} times the old rules, {new} times the new");
    let record =
        bed.flawless(&format!("ended in the middle of a reload, {} times", rounds()), load);
    bed.ensure_counted(&record, &captures);
}

// The network changes.

/// Does something to the network under load, and tells what was lost meanwhile; afterwards nothing must be. `keeps`:
/// nothing may be lost in between either. Returns how many connections the box itself has reset.
fn disturbed(bed: &Bed, fault: &str, keeps: bool, disturb: impl FnOnce(&Namespace)) -> u64 {
    let load = bed.load();
    pause(300);
    let resets = resets(&bed.rig.router);
    disturb(&bed.rig.router);
    let well = Instant::now();
    let settled = load.settle(RECOVERY).unwrap_or_else(|error| panic!("{fault}: {error}"));
    pause(1_000);
    let record = load.stop().unwrap();
    tell(fault, &record.tally());
    let resets = self::resets(&bed.rig.router) - resets;
    println!("all came again after {:.1?}; the box itself sent {resets} resets", settled - well);
    let after = record.since(settled);
    for kind in Kind::ALL.into_iter().filter(|kind| keeps || !kind.is_tcp()) {
        let sum = after.of(kind);
        assert!(sum.sent > 0 && sum.is_flawless(), "{fault}: {}: {sum:?}", kind.name());
    }
    if keeps {
        record.tally().ensure_flawless().unwrap();
    }
    resets
}

/// How often a namespace's own stack has reset a connection.
fn resets(namespace: &Namespace) -> u64 {
    let text = namespace.enter(|| fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let [names, values] = [(); 2].map(|()| lines.next().unwrap().split(' '));
    names.zip(values).find(|(name, _)| *name == "OutRsts").unwrap().1.parse().unwrap()
}

/// Addresses with their prefixes.
fn with_prefix(addresses: rig::Addresses) -> [String; 2] {
    addresses.both().map(|address| match address {
        IpAddr::V4(address) => format!("{address}/24"),
        IpAddr::V6(address) => format!("{address}/64"),
    })
}

fn add(router: &Namespace, address: &str, interface: &str) {
    let no_dad = if address.contains(':') { " nodad" } else { "" };
    router.ip(&format!("address add {address} dev {interface}{no_dad}")).unwrap();
}

fn delete(router: &Namespace, address: &str, interface: &str) {
    router.ip(&format!("address del {address} dev {interface}")).unwrap();
}

#[test]
fn interfaces_go_down_and_up() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::plain();
    bed.start();
    for interface in ["wan0", "lan0"] {
        let resets = disturbed(&bed, &format!("{interface} down for 1 s"), false, |router| {
            router.ip(&format!("link set {interface} down")).unwrap();
            pause(1_000);
            router.ip(&format!("link set {interface} up")).unwrap();
        });
        assert_eq!(resets, 0, "{interface}");
    }
}

#[test]
fn addresses_come_and_go() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::plain();
    bed.start();
    let more = ["198.51.100.7/24", "2001:db8:1::7/64"];
    disturbed(&bed, "an address of wan0 more, and gone", true, |router| {
        for change in [add, delete] {
            more.iter().for_each(|address| change(router, address, "wan0"));
            pause(500);
        }
    });
    // Clients on the link go with its address, and are known again through the stack.
    bed.remove_firewall();
    for (interface, addresses, others) in [
        ("wan0", rig::WAN, ["198.51.100.9/24", "2001:db8:1::9/64"]),
        ("lan0", rig::LAN, ["192.168.77.9/24", "fd77::9/64"]),
    ] {
        let addresses = with_prefix(addresses);
        disturbed(&bed, &format!("{interface} has other addresses for 1 s"), false, |router| {
            addresses.iter().for_each(|it| delete(router, it, interface));
            others.iter().for_each(|it| add(router, it, interface));
            pause(1_000);
            others.iter().for_each(|it| delete(router, it, interface));
            addresses.iter().for_each(|it| add(router, it, interface));
        });
    }
}

#[test]
fn the_network_changes_while_nobody_is_there() {
    if !is_root() {
        return;
    }
    let mut bed = Bed::kept();
    // Neighbours that go with a link come back through the stack, if nobody asks for them.
    bed.remove_firewall();
    for interface in ["wan0", "lan0"] {
        bed.start();
        bed.end(libc::SIGKILL);
        disturbed(&bed, &format!("{interface} down for 1 s, nobody there"), false, |router| {
            router.ip(&format!("link set {interface} down")).unwrap();
            pause(1_000);
            router.ip(&format!("link set {interface} up")).unwrap();
        });
        bed.start();
        disturbed(&bed, "none, after that", true, |_| {});
        bed.end(libc::SIGTERM);
    }
}

// It is taken off.

#[test]
fn detached_nothing_is_left() {
    if !is_root() {
        return;
    }
    for running in [false, true] {
        let mut bed = Bed::kept();
        let reserved = |bed: &Bed| {
            let path = "/proc/sys/net/ipv4/ip_local_reserved_ports";
            bed.rig.router.enter(|| fs::read_to_string(path)).unwrap()
        };
        let before = reserved(&bed);
        assert_eq!(bed.attached(), [""; 0]);
        bed.start();
        let address = SocketAddr::new(Backend::A.address(Version::V4), Kind::Stateless.port());
        let server = Server::udp(&bed.rig.server, address, Answer::Echo).unwrap();
        assert!(bed.answers(Kind::Stateless, Version::V4));
        let mut portfwd = if running {
            bed.portfwd.take()
        } else {
            bed.end(libc::SIGKILL);
            None
        };
        // It is all there, so that it can be gone.
        assert!(bed.answers(Kind::Stateless, Version::V4));
        assert!(bed.pins().join("links").is_dir() && bed.state().is_file());
        assert!(!bed.attached().is_empty());
        assert_ne!(reserved(&bed), before);

        netns::run(&mut bed.command(&["detach"])).unwrap();
        if let Some(portfwd) = &mut portfwd {
            until("the daemon ends", 10, || {
                portfwd.signal(0).map_or(Ok(()), |()| Err("it runs".to_owned()))
            });
        }
        assert_eq!(bed.attached(), [""; 0]);
        assert!(!bed.answers(Kind::Stateless, Version::V4));
        assert!(!bed.pins().exists(), "{}", bed.pins().display());
        assert!(!bed.state().exists(), "{}", bed.state().display());
        assert_eq!(reserved(&bed), before);

        // And it can start anew.
        drop(server);
        bed.start();
        let load = bed.load();
        pause(500);
        let what =
            if running { "detached, the daemon there" } else { "detached, without a daemon" };
        bed.flawless(&format!("{what}, and started"), load);
    }
}
