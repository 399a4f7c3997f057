//! The running daemon: one task owns the state; requests come in, answers go out.
//!
//! It is level-triggered. Whatever happened, it takes a new snapshot of the network, works out what
//! should be attached and loaded, and makes it so. A lost event, a flapping link and a re-created
//! interface are the same case.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Address, Interface};
use rustix::event::{PollFd, PollFlags};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use crate::api::{self, Request, Socket};
use crate::compile::{BoxPorts, Capacity, Compiler, Plan, Resolved, plan};
use crate::config::overlay::Overlay;
use crate::config::{Attach, Config, Errors, Origin};
use crate::datapath::{AttachError, Datapath, Hook, Living, Mode, Pins, Port};
use crate::flows::FlowRow;
use crate::instance::Instance;
use crate::network::{
    self, Changes, Externals, Layer, Link, Network, NetworkError, NextHop, Snapshot,
};
use crate::rule::{Ports, Rule};
use crate::sysctl::{self, Families};
use crate::{metrics, names, privileges, report};

mod change;
mod hints;
pub(crate) mod modes;
mod protocols;
mod routes;
pub mod service;
mod state;
mod survey;
mod sweep;

pub use change::Order;
use hints::Addresses;
use routes::Keeper;
pub use state::Running;
use state::{Owned, State, World};
use survey::{Survey, check_interfaces};
use sweep::Sweeper;

/// Why the daemon does not run. Both are lines for the user.
#[derive(Debug)]
pub enum Failure {
    /// The configuration is wrong: exit status 2.
    Configuration(String),
    /// The system does not have, or allow, what is needed: exit status 1.
    System(anyhow::Error),
}

impl Failure {
    /// What is wrong with a configuration, or a change of one.
    pub fn wrong(errors: Errors) -> Self {
        Self::Configuration(errors.to_string())
    }

    /// A line for each thing that is wrong.
    pub fn lines(&self) -> String {
        match self {
            Self::Configuration(lines) => lines.clone(),
            Self::System(error) => format!("{error:#}"),
        }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::System(error.into())
    }
}

/// What `portfwd run` was asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    pub config: Config,
    /// Where that is from.
    pub origin: Origin,
    pub instance: Instance,
    pub socket: PathBuf,
    /// Go on forwarding when this process ends.
    pub keep: bool,
    /// Show what becomes of each packet that a rule claims.
    pub log_packets: bool,
}

/// Forwards until SIGINT or SIGTERM.
///
/// # Errors
///
/// Whatever keeps it from starting; then nothing is attached and nothing is left behind. Once it
/// runs, trouble is told and forwarding resumes when it ends.
pub async fn run(options: Options) -> Result<(), Failure> {
    keep_large_tables_apart();
    let interrupt = signal(SignalKind::interrupt())?;
    let terminate = signal(SignalKind::terminate())?;
    let hangup = signal(SignalKind::hangup())?;
    let Options { config, origin, instance, socket, keep, log_packets } = options;
    if config.rules.is_empty() {
        return Err(Failure::Configuration(
            "there is no rule; add a [[rule]] to the configuration, or -p SPEC".to_owned(),
        ));
    }
    if config.external.is_empty() {
        return Err(Failure::Configuration(
            "no external interface is named: where do clients arrive? Add -i IFACE, or \
             [interfaces] external to the configuration"
                .to_owned(),
        ));
    }
    let owned = Owned::take(&instance)?;
    // Pins that are gone with their file system are as good as none.
    let before = owned.read()?.filter(|before| owned.pins.has(&before.kept));
    let forwards = owned.pins.has_links();
    let (base, mut overlay) = (config, Overlay::default());
    if let Some(before) = &before {
        overlay = before.world.changes(&origin).settle(&base);
    }
    let config = overlay.apply(&base).unwrap_or_else(|errors| {
        warn!("what was changed at run time does not go with the configuration any more, and is gone: {errors}");
        overlay = Overlay::default();
        base.clone()
    });
    let resolved = match &before {
        None => resolve_all(&config.rules).await?,
        Some(before) => resolve_again(&config.rules, &before.world.resolved).await?,
    };
    let mut plan = plan(&config.rules, &resolved)
        .map_err(|refused| Failure::Configuration(refused.to_string()))?;

    let (network, changes) = Network::open()?;
    let snapshot = network.snapshot().await?;
    let known = before.as_ref().map(|before| before.world.survey()).unwrap_or_default();
    let survey = Survey::take(&network, &snapshot, &config, &plan, &known).await?;
    if before.is_none() {
        // Later they are waited for.
        check_interfaces(&config, &snapshot, &survey)?;
        // Who is to forward for long goes without a backend whose network is not there.
        if !keep {
            none(&survey.problems)?;
        }
    }
    plan.locate(&config.rules, &survey.local);
    let ports =
        BoxPorts { ephemeral: sysctl::ephemeral_ports()?, masquerade: config.masquerade.clone() };

    let (requests, inbox) = mpsc::channel(16);
    let (orders, ordered) = mpsc::channel(16);
    let metrics = metrics::listen(config.metrics, requests.clone()).await?;
    let socket = Socket::bind(&socket).await?;
    let logs = log_packets && sysctl::verifies_logs();
    if log_packets && !logs {
        warn!("-v shows no packets here: that takes Linux 6.3 or later");
    }
    let log_packets = logs;
    let names = before.iter().flat_map(|before| before.names.iter().map(String::as_str));
    let mut compiler = Compiler::with_names(names);
    compiler.leave(&survey.own);
    let update = compiler.compile(&config.rules, &plan, &survey.externals, &ports);
    let mut capacity = Capacity::for_plan(&config.rules, &plan, &ports, config.flows.size);
    capacity.counters = Capacity::counters(update.counters);
    let kept = before.as_ref().map(|before| &before.kept);
    let mut datapath = match owned.pins.create() {
        Ok(()) => {
            let names = update.counters;
            Datapath::take_over(capacity, &ports, log_packets, &owned.pins, names, kept)?
        }
        Err(error) if keep => return Err(error.into()),
        Err(error) => {
            warn!("{error}; forwarding ends with this process, however that ends");
            Datapath::load(capacity, &ports, log_packets)?
        }
    };
    if Pins::are_private() {
        info!("this is a mount namespace of its own: forwarding ends when that does");
    }
    datapath.set_own(plan.local())?;
    datapath.apply(&update)?;
    compiler.commit(&update);
    drop(update);

    let keeper = Keeper::start(datapath.routes())?;
    let sweeper = Sweeper::start()?;
    let reserved = before.as_ref().map(|before| before.world.reserved()).unwrap_or_default();
    let mut daemon = Daemon {
        owned,
        keeper,
        sweeper,
        origin,
        base: Arc::new(base),
        overlay,
        config: Arc::new(config),
        network,
        resolved,
        plan,
        loaded: (survey.externals.clone(), survey.own.clone()),
        survey,
        compiler,
        datapath,
        attached: BTreeMap::new(),
        unprepared: false,
        told: BTreeSet::new(),
        hinted: BTreeSet::new(),
        unresolved: BTreeSet::new(),
        silent: BTreeMap::new(),
        gateways: Vec::new(),
        gateways_since: None,
        reserved,
        ports,
        log_packets,
        packet_log: None,
        renewed: false,
        started: false,
    };
    let inputs = Inputs { interrupt, terminate, hangup, changes, inbox, orders: ordered };
    let served =
        daemon.start_and_serve(&snapshot, before.as_ref(), inputs, socket, (requests, orders));
    let ended = served.await;
    if let Some(metrics) = metrics {
        metrics.abort();
    }
    let keep = match ended {
        Ok(Ended::Detached) => false,
        // Whoever could not start leaves what was there: nothing, perhaps.
        Err(_) if !daemon.started => forwards || before.is_some(),
        _ => keep,
    };
    daemon.stop(keep);
    ended.map(drop)
}

/// Why the daemon ends.
enum Ended {
    /// By a signal.
    Asked,
    /// By `portfwd detach`: forwarding ends too.
    Detached,
}

/// Ends forwarding that goes on without a daemon. Returns whether there was some.
///
/// # Errors
///
/// A daemon runs, or something cannot be taken off.
pub fn take_off(instance: &Instance) -> anyhow::Result<bool> {
    Owned::take(instance)?.take_off()
}

/// What wakes the daemon.
struct Inputs {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    changes: Changes,
    inbox: mpsc::Receiver<Request>,
    orders: mpsc::Receiver<Order>,
}

/// Gives the system what was freed: to read and compile many rules takes several times what stays,
/// and the C library keeps it, as small pieces of it are in use.
fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has the C library take large tables from the system one by one, whatever was freed before: they
/// grow without being copied, room in them that is not used yet costs nothing, and all of it goes
/// back.
fn keep_large_tables_apart() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes integers, and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 10);
    }
}

/// Fails with all problems, if there are any.
fn none(problems: &[String]) -> Result<(), Failure> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(Failure::System(anyhow::anyhow!("{}", problems.join("\n"))))
}

/// Ticks every `period`, the first time after one.
fn every(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Passes the programs' messages on from a thread of its own: more may come than can be written, and
/// the daemon has other things to do. That ends when what is returned is dropped.
fn log_from(mut logger: aya_log::EbpfLogger<&'static dyn log::Log>) -> std::io::Result<OwnedFd> {
    let (ended, end) = rustix::pipe::pipe()?;
    let pass_on = move || {
        loop {
            let mut wait =
                [PollFd::new(&logger, PollFlags::IN), PollFd::new(&ended, PollFlags::empty())];
            let waited = rustix::event::poll(&mut wait, None);
            let is_over = !wait[1].revents().is_empty();
            match waited {
                Ok(_) | Err(rustix::io::Errno::INTR) => logger.flush(),
                Err(error) => return warn!("no more messages of the programs: {error}"),
            }
            if is_over {
                return;
            }
        }
    };
    std::thread::Builder::new().name("packet log".to_owned()).spawn(pass_on)?;
    Ok(end)
}

/// Resolves all names, of which none may fail at start.
///
/// # Errors
///
/// A line for each name that does not resolve.
pub async fn resolve_all(rules: &[Rule]) -> Result<Resolved, Failure> {
    let (resolved, failed) = names::resolve(names::of(rules), Resolved::new()).await;
    if failed.is_empty() { Ok(resolved) } else { Err(unresolved(rules, &failed)) }
}

/// The same, but that names stay what they were `before` where they do not resolve now.
async fn resolve_again(rules: &[Rule], before: &Resolved) -> Result<Resolved, Failure> {
    let names = names::of(rules);
    let mut known = before.clone();
    known.retain(|name, _| names.contains(name));
    let (resolved, failed) = names::resolve(names, known).await;
    let (old, new): (Vec<_>, Vec<_>) =
        failed.into_iter().partition(|(name, _)| resolved.contains_key(name));
    for (name, reason) in old {
        warn!("cannot resolve \"{name}\": {reason}; its address stays as it was");
    }
    if new.is_empty() { Ok(resolved) } else { Err(unresolved(rules, &new)) }
}

/// A line for each name that does not resolve, with the reason.
fn unresolved(rules: &[Rule], failed: &[(String, String)]) -> Failure {
    let lines: Vec<String> = failed
        .iter()
        .map(|(name, reason)| {
            let rule = rules
                .iter()
                .find(|rule| rule.to.iter().any(|target| target.host.to_string() == *name));
            let place = rule
                .map(|rule| format!("{}: rule \"{}\": ", rule.place, rule.name))
                .unwrap_or_default();
            format!(
                "{place}cannot resolve \"{name}\": {reason}; check the name, or write an address"
            )
        })
        .collect();
    Failure::Configuration(lines.join("\n"))
}

/// Where to attach.
fn port(link: &Link) -> Port<'_> {
    let Link { index, name, mtu, layer, .. } = link;
    Port { index: *index, name, mtu: *mtu, bare: *layer == Layer::Bare }
}

/// A program on an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Attachment {
    name: String,
    role: Role,
    mode: Mode,
    /// Why in that way.
    why: String,
    /// What was asked for.
    wanted: Attach,
}

/// Which flows may live: those of a rule to one of its backends.
fn living(config: &Config, plan: &Plan, compiler: &Compiler) -> Living {
    let counter = |rule: usize| compiler.counter(&config.rules[rule].name);
    let backends = plan.legs.iter().filter_map(|leg| Some((counter(leg.rule)?, leg.backend)));
    Living::new(backends.collect(), config.flows.timeouts)
}

struct Daemon {
    owned: Owned,
    keeper: Keeper,
    sweeper: Sweeper,
    /// Where the configuration is from, what it said when it was read last, and what was changed since then.
    origin: Origin,
    base: Arc<Config>,
    overlay: Overlay,
    /// What runs.
    config: Arc<Config>,
    network: Network,
    resolved: Resolved,
    plan: Plan,
    survey: Survey,
    /// The external addresses that the tables have, and the protocols that they leave to the box.
    loaded: (Externals, BTreeSet<u8>),
    compiler: Compiler,
    datapath: Datapath,
    /// By interface index.
    attached: BTreeMap<u32, Attachment>,
    /// Whether something was attached since the sysctls were set.
    unprepared: bool,
    /// Problems that were told and still are there.
    told: BTreeSet<String>,
    /// What was said of the rules.
    hinted: BTreeSet<String>,
    /// Names that did not resolve the last time, which was told.
    unresolved: BTreeSet<String>,
    /// Rules that packets go to and none come back from: since when.
    silent: BTreeMap<String, hints::Silence>,
    gateways: Vec<NextHop>,
    gateways_since: Option<Instant>,
    /// Ports that are reserved, and would not be without this daemon or those before it.
    reserved: BTreeSet<u16>,
    ports: BoxPorts,
    log_packets: bool,
    /// Dropped, it ends.
    packet_log: Option<OwnedFd>,
    /// A new set is loaded, and its programs are not attached yet.
    renewed: bool,
    /// It forwards.
    started: bool,
}

/// How long gateways are taken for known: to find them, the whole routing table is read.
const GATEWAYS_LAST: Duration = Duration::from_secs(30);
/// Between the programs for clients on the box, which are loaded when all else is done.
const LOAD_OWN: Duration = Duration::from_millis(20);
/// With fewer ports for connections of the box itself the user is warned.
const FEW_PORTS: usize = 1024;

impl Daemon {
    /// Puts this set in the place of the one before, if there is one, and forwards.
    async fn start_and_serve(
        &mut self,
        snapshot: &Snapshot,
        before: Option<&State>,
        inputs: Inputs,
        socket: Socket,
        (requests, orders): (mpsc::Sender<Request>, mpsc::Sender<Order>),
    ) -> Result<Ended, Failure> {
        self.renewed = true;
        // What the kernel refuses is of no use to the next one.
        let modes = self.modes_until(&self.wanted(snapshot));
        self.datapath.prepare(modes.into_values())?;
        self.save()?;
        self.datapath.stay();
        // The first packet finds its way: without a neighbour the stack would have to take it.
        for error in self.network.keep_all_resolved(&self.survey.hops).await {
            debug!("{error}");
        }
        let problems = self.settle(snapshot);
        if before.is_none() {
            none(&problems)?;
        }
        if before.is_some() {
            info!("went on from what an earlier daemon left: flows and counters are as they were");
        }
        privileges::give_up();
        // Whoever was refused so far finds the box's settings as they were.
        let server = tokio::spawn(socket.serve(requests, orders));
        self.serve(snapshot, inputs, server).await
    }

    fn world(&self) -> World {
        let Self { survey, reserved, resolved, origin, overlay, .. } = self;
        World::of(survey, reserved, resolved, origin, overlay)
    }

    /// Notes what the next daemon has to know.
    fn save(&mut self) -> anyhow::Result<()> {
        let Some(kept) = self.datapath.kept() else { return Ok(()) };
        let world = self.world();
        self.owned.write(kept, world, self.compiler.names())
    }

    /// Forwards until a signal comes or the control socket fails.
    async fn serve(
        &mut self,
        snapshot: &Snapshot,
        inputs: Inputs,
        mut server: JoinHandle<std::io::Result<()>>,
    ) -> Result<Ended, Failure> {
        let Inputs { mut interrupt, mut terminate, mut hangup, mut changes, .. } = inputs;
        let Inputs { mut inbox, mut orders, .. } = inputs;
        self.prepare(snapshot)?;
        self.reserve_ports()?;
        // Whether a peer can be sent to is known once the programs are attached.
        self.refresh(&mut inbox).await;
        self.warn_of_pitfalls(snapshot);
        self.keep_resolved(&mut inbox).await;
        if self.log_packets {
            self.packet_log = Some(log_from(self.datapath.logger()?)?);
        }
        give_back_memory();
        let rules = self.config.rules.len();
        info!("forwarding {rules} rule{}; stop with Ctrl-C", if rules == 1 { "" } else { "s" });
        service::ready();
        self.started = true;
        // Once more, into the other generation, so that the first change finds only itself to write.
        if let Some(problem) = self.load() {
            warn!("{problem}");
        }

        let mut told_of_changes = true;
        let mut loads_own = !self.datapath.has(Hook::Tc);
        let mut load_own = every(LOAD_OWN);
        let mut neighbours = every(network::REFRESH);
        let mut refresh_names = every(self.config.refresh);
        let (answers, mut answered) = mpsc::channel(1);
        let mut status = service::Status::default();
        let mut watchdog = service::Watchdog::find();
        let ended = loop {
            status.show(self.config.rules.len(), self.attached.len(), self.told.len());
            tokio::select! {
                _ = interrupt.recv() => break Ok(Ended::Asked),
                _ = terminate.recv() => break Ok(Ended::Asked),
                () = watchdog.due() => service::alive(),
                Some(request) = inbox.recv() => self.answer(request),
                Some(order) = orders.recv() => {
                    if self.obey(order, &mut inbox).await {
                        break Ok(Ended::Detached);
                    }
                }
                _ = hangup.recv() => {
                    // It is logged.
                    let _: Result<api::Changed, Failure> = self.reload(&mut inbox).await;
                    self.keep_resolved(&mut inbox).await;
                }
                changed = changes.next(), if told_of_changes => {
                    if let Err(error) = changed {
                        let seconds = network::REFRESH.as_secs();
                        warn!("{error}; looking for changes every {seconds} s instead");
                        told_of_changes = false;
                    }
                    self.refresh(&mut inbox).await;
                }
                _ = neighbours.tick() => {
                    self.refresh(&mut inbox).await;
                    self.keep_resolved(&mut inbox).await;
                    self.hint_at_silence();
                }
                // One program at a time: others are served meanwhile.
                _ = load_own.tick(), if loads_own => match self.datapath.load_next(Hook::Tc) {
                    Ok(false) => {}
                    Ok(true) => {
                        loads_own = false;
                        self.refresh(&mut inbox).await;
                    }
                    Err(error) => {
                        loads_own = false;
                        warn!("clients on this box cannot use external addresses: {error}");
                    }
                },
                _ = refresh_names.tick() => {
                    let names = names::of(&self.config.rules);
                    // One round at a time: the channel holds one, and a slow resolver delays the next.
                    if let (false, Ok(permit)) = (names.is_empty(), answers.clone().try_reserve_owned()) {
                        let before = self.resolved.clone();
                        tokio::spawn(async move { permit.send(names::resolve(names, before).await) });
                    }
                }
                Some((resolved, failed)) = answered.recv() => {
                    self.follow_names(resolved, failed, &mut inbox).await;
                }
                ended = &mut server => {
                    break Err(Failure::System(anyhow::anyhow!("the control socket failed: {ended:?}")));
                }
            }
        };
        service::stopping();
        if !server.is_finished() {
            server.abort();
            // The task owns the socket; its file is gone once the task is.
            let _: Result<_, tokio::task::JoinError> = server.await;
        }
        ended
    }

    /// Does what takes a while with many backends, and answers requests meanwhile.
    async fn answering<T>(
        &self,
        inbox: &mut mpsc::Receiver<Request>,
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                Some(request) = inbox.recv() => self.answer(request),
            }
        }
    }

    /// The network as it is, and what that asks for.
    async fn look(&self) -> Result<(Snapshot, Survey), NetworkError> {
        let Self { network, config, plan, survey, .. } = self;
        let snapshot = network.snapshot().await?;
        let survey = Survey::take(network, &snapshot, config, plan, survey).await?;
        Ok((snapshot, survey))
    }

    /// Looks at the network, and makes everything as it should be.
    async fn refresh(&mut self, inbox: &mut mpsc::Receiver<Request>) {
        match self.answering(inbox, self.look()).await {
            Ok((snapshot, survey)) => {
                self.survey = survey;
                let mut problems = self.survey.problems.clone();
                let moved = self.loaded.0 != self.survey.externals;
                let located = self.plan.locate(&self.config.rules, &self.survey.local);
                if located || moved || self.loaded.1 != self.survey.own {
                    let problem = self.load();
                    if moved && problem.is_none() {
                        info!("external addresses: {}", Addresses(&self.loaded.0));
                    }
                    problems.extend(problem);
                }
                problems.extend(self.settle(&snapshot));
                problems.extend(self.prepare(&snapshot).err().map(|error| error.to_string()));
                // Another instance that ends takes those with it that it had reserved first.
                problems.extend(self.reserve_ports().err().map(|error| error.to_string()));
                // What has changed, the next daemon goes on from.
                problems.extend(self.save().err().map(|error| error.to_string()));
                self.tell(problems);
            }
            Err(error) => self.tell(vec![error.to_string()]),
        }
    }

    /// Warns of each problem once, and says when all are gone.
    fn tell(&mut self, problems: Vec<String>) {
        let now: BTreeSet<String> = problems.into_iter().collect();
        for problem in now.difference(&self.told) {
            warn!("{problem}");
        }
        if now.is_empty() && !self.told.is_empty() {
            info!("all is well again");
        }
        self.told = now;
    }

    /// Loads the plan with the addresses there are. Returns what kept it from that.
    fn load(&mut self) -> Option<String> {
        let lacks_room = self.lacks_room();
        let Self { config, plan, survey, compiler, datapath, ports, .. } = &mut *self;
        compiler.leave(&survey.own);
        let update = compiler.compile(&config.rules, plan, &survey.externals, ports);
        if lacks_room || !datapath.capacity().holds(&update) {
            if let Err(error) = self.renew() {
                return Some(format!("{error:#}"));
            }
            self.loaded = (self.survey.externals.clone(), self.survey.own.clone());
            return None;
        }
        // Flows may refer to a rule by the number of its name from now on.
        if let Err(error) = self.save() {
            return Some(error.to_string());
        }
        let Self { config, plan, survey, loaded, compiler, datapath, sweeper, ports, .. } = self;
        datapath.masquerade_by(ports);
        match datapath.set_own(plan.local()).and_then(|()| datapath.apply(&update)) {
            Ok(()) => {
                compiler.commit(&update);
                *loaded = (survey.externals.clone(), survey.own.clone());
                sweeper.set(living(config, plan, compiler));
                None
            }
            Err(error) => Some(error.to_string()),
        }
    }

    /// Attaches and detaches as the survey asks, and tells the programs of the interfaces. Returns
    /// what could not be done.
    fn settle(&mut self, snapshot: &Snapshot) -> Vec<String> {
        let mut problems = Vec::new();
        let wanted = self.wanted(snapshot);

        let gone: Vec<u32> =
            self.attached.keys().copied().filter(|index| !wanted.contains_key(index)).collect();
        for index in gone {
            self.datapath.detach(index);
            if let Some(attachment) = self.attached.remove(&index) {
                info!("{}: detached", attachment.name);
            }
        }
        // A program that starts knows the interfaces already.
        let modes = self.modes_until(&wanted);
        problems.extend(self.tell_programs(snapshot, &wanted, &modes));
        // Where backends are first: from then on their answers find flows that only these programs begin.
        let mut in_order: Vec<_> = wanted.values().collect();
        in_order.sort_by_key(|(_, role)| *role != Role::Internal);
        for (link, role) in in_order {
            if !self.is_attached(link, *role) {
                problems.extend(self.attach(link, *role).err().map(|error| error.to_string()));
            }
        }
        let modes = self.modes();
        problems.extend(self.tell_programs(snapshot, &wanted, &modes));
        problems.extend(self.settle_own(snapshot, &wanted));
        if self.renewed {
            let left = self.datapath.leave_before().map_err(anyhow::Error::from);
            // Else it is tried again.
            self.renewed = left.is_err();
            // Programs of other rules have none any more.
            let living = living(&self.config, &self.plan, &self.compiler);
            self.sweeper.follow(self.datapath.flows(), living);
            problems.extend(left.and_then(|()| self.save()).err().map(|error| error.to_string()));
        }
        let names = self.attached.values().map(|attachment| attachment.name.clone()).collect();
        self.keeper.set_interfaces(names);
        problems
    }

    /// Where programs are to be.
    fn wanted<'a>(&self, snapshot: &'a Snapshot) -> BTreeMap<u32, (&'a Link, Role)> {
        let roles = self.survey.roles.iter();
        roles
            .filter_map(|(name, role)| snapshot.link(name).map(|link| (link, *role)))
            .filter(|(link, _)| link.layer != Layer::Other)
            .map(|(link, role)| (link.index, (link, role)))
            .collect()
    }

    /// Whether an interface is attached to as it is to be.
    fn is_attached(&self, link: &Link, role: Role) -> bool {
        self.attached.get(&link.index).is_some_and(|attachment| {
            (attachment.role, &attachment.name) == (role, &link.name)
                && attachment.wanted == self.config.attach_to(&link.name)
        })
    }

    /// Attaches to an interface as the configuration asks, or has what is there stay.
    fn attach(&mut self, link: &Link, role: Role) -> Result<(), AttachError> {
        let wanted = self.config.attach_to(&link.name);
        let before = match self.attached.remove(&link.index) {
            Some(before) => Some(before.mode),
            None if self.renewed => self.datapath.modes_before().get(&link.index).copied(),
            None => None,
        };
        let attach = |mode| self.datapath.attach(port(link), role, mode).map(|()| mode);
        let attached = modes::attach(link, wanted, attach).map(|(mode, why)| {
            info!("{}: {}, {} ({why})", link.name, report::role(role), mode.program());
            self.unprepared = true;
            Attachment { name: link.name.clone(), role, mode, why, wanted }
        });
        let error = match attached {
            Ok(attached) => {
                self.attached.insert(link.index, attached);
                return Ok(());
            }
            Err(error) => error,
        };
        if let Some(mode) = before
            && self.datapath.attach(port(link), role, mode).is_ok()
        {
            // It is tried again.
            let why = "as before, as what is configured does not go".to_owned();
            let (name, wanted) = (link.name.clone(), mode.as_configured());
            self.attached.insert(link.index, Attachment { name, role, mode, why, wanted });
        }
        Err(error)
    }

    /// How interfaces are attached to.
    fn modes(&self) -> BTreeMap<u32, Mode> {
        self.attached.iter().map(|(index, attachment)| (*index, attachment.mode)).collect()
    }

    /// How they are attached to by now or will be soon, native where it is both: not all can be sent to from there.
    fn modes_until(&self, wanted: &BTreeMap<u32, (&Link, Role)>) -> BTreeMap<u32, Mode> {
        let mut modes = if self.renewed { self.datapath.modes_before() } else { BTreeMap::new() };
        modes.extend(self.modes());
        for (index, (link, role)) in wanted {
            let way = self.config.attach_to(&link.name);
            // What was automatic is what it was.
            let is_kept = way == Attach::Auto && !self.attached.contains_key(index);
            let now = modes.get(index).copied();
            if self.is_attached(link, *role)
                || now == Some(Mode::Native)
                || is_kept && now.is_some()
            {
                continue;
            }
            modes.insert(*index, modes::foresee(link, way).0);
        }
        modes
    }

    /// Attaches to what the box itself sends: to clients, if it is a backend, and to itself once the programs
    /// are loaded for that. Returns what could not be done.
    fn settle_own(
        &mut self,
        snapshot: &Snapshot,
        wanted: &BTreeMap<u32, (&Link, Role)>,
    ) -> Vec<String> {
        let mut problems = Vec::new();
        let serves = !self.plan.local().is_empty();
        for (index, (link, _)) in wanted {
            if !(serves && self.attached.contains_key(index)) {
                self.datapath.detach_sent(*index);
            } else if let Err(error) = self.datapath.attach_sent(port(link)) {
                problems.push(error.to_string());
            }
        }
        if let Some(loopback) = snapshot.loopback()
            && self.datapath.has(Hook::Tc)
        {
            match self.datapath.attach_own(port(loopback)) {
                Ok(true) => info!("{}: clients on this box, TC", loopback.name),
                Ok(false) => {}
                Err(error) => problems.push(error.to_string()),
            }
        }
        problems
    }

    /// Sets what forwarding needs of the kernel, once something new is attached.
    fn prepare(&mut self, snapshot: &Snapshot) -> Result<(), sysctl::SysctlError> {
        if !self.unprepared {
            return Ok(());
        }
        let of = |not: Role| -> Vec<&Link> {
            let attached = self.attached.iter().filter(|(_, attachment)| attachment.role != not);
            attached.filter_map(|(index, _)| snapshot.link_by_index(*index)).collect()
        };
        let families = Families {
            v4: self.plan.remote().any(|leg| leg.forwards(true)),
            v6: self.plan.remote().any(|leg| leg.forwards(false)),
        };
        let mut changes = Vec::new();
        let mut external = of(Role::Internal);
        external.extend(snapshot.loopback());
        let mut internal = of(Role::External);
        if self.plan.masquerades() {
            // Masqueraded packets come from outside with an address of the box as well.
            internal.extend(&external);
        }
        let prepared = sysctl::prepare(&external, &internal, families, &mut changes);
        changes.iter().for_each(|change| info!("{change}"));
        prepared?;
        self.unprepared = false;
        Ok(())
    }

    /// Tells the programs what they have to know of each interface, which is attached to in one of these modes.
    /// Returns what kept it from that.
    fn tell_programs(
        &mut self,
        snapshot: &Snapshot,
        wanted: &BTreeMap<u32, (&Link, Role)>,
        modes: &BTreeMap<u32, Mode>,
    ) -> Option<String> {
        // Generic XDP sends by the stack's own transmit, which every interface has.
        let all_generic = modes.values().all(|mode| *mode != Mode::Native);
        let row = |index: &u32, link: &Link, role: Role| {
            let place = match role {
                Role::External => Interface::EXTERNAL,
                Role::Internal => Interface::INTERNAL,
                Role::Both => Interface::EXTERNAL | Interface::INTERNAL,
            };
            // Where the kernel does not say (before 6.3), a driver with native XDP transmits, but
            // veth only to a peer that is ready.
            let transmits = modes.get(index).is_some_and(|mode| {
                let likely = *mode == Mode::Native && link.driver.as_deref() != Some("veth");
                let can = all_generic || link.can_transmit_xdp.unwrap_or(likely);
                can && link.layer == Layer::Ethernet
            });
            let transmits = match transmits {
                true if all_generic || link.can_transmit_pieces => {
                    Interface::TRANSMITS | Interface::TRANSMITS_PIECES
                }
                true => Interface::TRANSMITS,
                false => 0,
            };
            let bare = if link.layer == Layer::Bare { Interface::BARE } else { 0 };
            let own = snapshot.external_addresses(&[*index]);
            Interface {
                flags: place | transmits | bare,
                mtu: link.mtu,
                device: 0,
                v4: Address(own.v4.first().map_or([0; 4], Ipv4Addr::octets)),
                v6: Address(own.v6.first().map_or([0; 16], Ipv6Addr::octets)),
            }
        };
        let mut rows: BTreeMap<u32, Interface> =
            wanted.iter().map(|(index, (link, role))| (*index, row(index, link, *role))).collect();
        // Where its own clients are.
        if let Some(loopback) = snapshot.loopback() {
            rows.insert(loopback.index, row(&loopback.index, loopback, Role::Internal));
        }
        self.datapath.set_interfaces(&rows).err().map(|error| error.to_string())
    }

    /// Single ports among those that the kernel picks for the box's own connections are reserved, and
    /// the ports of masquerade.
    fn reserve_ports(&mut self) -> Result<(), sysctl::SysctlError> {
        let mut ports: BTreeSet<u16> = self
            .config
            .rules
            .iter()
            .filter_map(|rule| match rule.listen.ports {
                Ports::One(port) => Some(port),
                _ => None,
            })
            .collect();
        if self.plan.masquerades() {
            ports.extend(self.ports.masquerade.clone());
        }
        // Of a daemon before, with other rules.
        let idle: BTreeSet<u16> = self.reserved.difference(&ports).copied().collect();
        if !idle.is_empty()
            && let Some(change) = sysctl::release_ports(&idle)?
        {
            info!("{change}");
        }
        self.reserved.retain(|port| ports.contains(port));
        // Whoever is killed right after has noted it.
        let new = sysctl::not_reserved(&ports)?;
        if !new.is_empty() {
            self.reserved.extend(&new);
            if let Err(error) = self.save() {
                warn!("{error}");
            }
        }
        if let Some(change) = sysctl::reserve_ports(&new)? {
            info!("{change}");
            let ephemeral = sysctl::ephemeral_ports()?;
            let left = ephemeral.clone().filter(|port| !ports.contains(port)).count();
            if left < FEW_PORTS {
                let (first, last) = ephemeral.into_inner();
                warn!(
                    "connections of the box itself have {left} ports left of {first}-{last}: narrow \
                     [masquerade] ports, or widen net.ipv4.ip_local_port_range"
                );
            }
        }
        Ok(())
    }

    /// Has the kernel resolve the next hops of backends and the gateways to clients, before a packet
    /// needs them.
    async fn keep_resolved(&mut self, inbox: &mut mpsc::Receiver<Request>) {
        if self.gateways_since.is_none_or(|since| since.elapsed() >= GATEWAYS_LAST) {
            let external: Vec<u32> = self
                .attached
                .iter()
                .filter(|(_, attachment)| attachment.role != Role::Internal)
                .map(|(index, _)| *index)
                .collect();
            match self.network.gateways(&external).await {
                Ok(gateways) => self.gateways = gateways,
                Err(error) => debug!("{error}"),
            }
            self.gateways_since = Some(Instant::now());
        }
        for hops in [&self.survey.hops, &self.gateways] {
            for error in self.answering(inbox, self.network.keep_all_resolved(hops)).await {
                debug!("{error}");
            }
        }
    }

    /// A backend's name has new addresses, or does not resolve now.
    async fn follow_names(
        &mut self,
        resolved: Resolved,
        failed: Vec<(String, String)>,
        inbox: &mut mpsc::Receiver<Request>,
    ) {
        for (name, reason) in &failed {
            if !self.unresolved.contains(name) {
                warn!("cannot resolve \"{name}\": {reason}; its address stays as it was");
            }
        }
        let failed: BTreeSet<String> = failed.into_iter().map(|(name, _)| name).collect();
        for name in self.unresolved.difference(&failed) {
            info!("\"{name}\" resolves again");
        }
        self.unresolved = failed;
        // Names may have come and gone since they were looked up.
        let mut now = self.resolved.clone();
        now.extend(resolved.into_iter().filter(|(name, _)| self.resolved.contains_key(name)));
        let resolved = now;
        if resolved == self.resolved {
            return;
        }
        match plan(&self.config.rules, &resolved) {
            Ok(plan) => {
                for (name, addresses) in &resolved {
                    if self.resolved.get(name) != Some(addresses) {
                        let list: Vec<String> = addresses.iter().map(|ip| ip.to_string()).collect();
                        info!("\"{name}\" is {} now", list.join(", "));
                    }
                }
                let old = std::mem::replace(&mut self.plan, plan);
                self.plan.locate(&self.config.rules, &self.survey.local);
                if let Some(problem) = self.load() {
                    self.plan = old;
                    return warn!("{problem}");
                }
                self.resolved = resolved;
                // A family may be new.
                self.unprepared = true;
                self.refresh(inbox).await;
                self.keep_resolved(inbox).await;
            }
            Err(refused) => warn!("{refused}; the addresses stay as they were"),
        }
    }

    fn answer(&self, request: Request) {
        // Whoever asked may have gone; then nobody wants the answer.
        match request {
            Request::List(sender) => {
                let config = self.config.clone();
                let stateful = self.plan.stateful.keys().copied().collect();
                let interfaces = self.list_interfaces();
                let listed = report::Listed { config, stateful, interfaces };
                let _: Result<(), _> = sender.send(listed);
            }
            Request::Stats(sender) => {
                let stats = report::Figures::read(
                    self.config.clone(),
                    &self.plan,
                    &self.compiler,
                    &self.datapath,
                    self.list_interfaces(),
                );
                let _: Result<(), _> = sender.send(stats);
            }
            Request::Diff(sender) => {
                let _: Result<(), _> = sender.send(self.diff());
            }
            Request::Flows(sender) => {
                let tables = self.datapath.flows();
                let rows = move |each: &mut dyn FnMut(FlowRow) -> bool| {
                    let each = |row| match each(row) {
                        true => ControlFlow::Continue(()),
                        false => ControlFlow::Break(()),
                    };
                    tables.each(each).map_err(Into::into)
                };
                let clock = self.datapath.clock();
                let live =
                    report::LiveFlows::new(&self.config, &self.compiler, clock, Box::new(rows));
                let _: Result<(), _> = sender.send(live);
            }
        }
    }

    /// External interfaces first.
    fn list_interfaces(&self) -> Vec<api::InterfaceInfo> {
        let mut roles: Vec<(&String, Role)> =
            self.survey.roles.iter().map(|(name, role)| (name, *role)).collect();
        roles.sort_by_key(|(_, role)| *role == Role::Internal);
        roles
            .into_iter()
            .map(|(name, role)| {
                let attached = self.attached.values().find(|it| it.name == *name);
                api::InterfaceInfo {
                    name: name.clone(),
                    role: report::role(role).to_owned(),
                    attach: attached.map(|attachment| attachment.mode.to_string()),
                    why: attached.map(|attachment| attachment.why.clone()),
                }
            })
            .collect()
    }

    /// Ends, and forwarding with it unless that is to be kept: takes back what was done to the box, but for the
    /// sysctls that make it a router.
    fn stop(mut self, keep: bool) {
        self.sweeper.stop();
        if keep {
            // Whoever has not started may have no set that stays.
            if self.started
                && let Err(error) = self.save()
            {
                warn!("{error}");
            }
            info!("forwarding goes on without this daemon; `portfwd detach` ends it");
            return self.datapath.leave();
        }
        if !self.reserved.is_empty() {
            match sysctl::release_ports(&self.reserved) {
                Ok(Some(change)) => info!("{change}"),
                Ok(None) => {}
                Err(error) => warn!("{error}"),
            }
        }
        if let Err(error) = self.datapath.take_off() {
            warn!("{error}");
        }
        for attachment in self.attached.values() {
            info!("{}: detached", attachment.name);
        }
        if let Err(error) = self.owned.remove() {
            warn!("{error}");
        }
    }
}
