//! The commands: from arguments to what runs, and from answers to tables.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IsTerminal as _, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::api::{
    self, ChangeRequest, Changed, Count, FlowInfo, List, Nobody, Refused, RuleInfo, RuleStats,
    Stats,
};
use crate::compile::{BoxPorts, Capacity, Plan, explain, plan};
use crate::config::diff::Diff;
use crate::config::overlay::Change;
use crate::config::{self, Config, Origin};
use crate::daemon::{self, Failure, Options, modes, resolve_all};
use crate::datapath::{Datapath, DatapathError, Hook, Pins, Verified};
use crate::flows::{self, Filter};
use crate::instance::Instance;
use crate::network::{Layer, Network, Route};
use crate::rule::Invalid;
use crate::{privileges, report};

/// Where the configuration is unless told otherwise.
const DEFAULT_CONFIG: &str = "/etc/portfwd/portfwd.toml";

/// Port forwarding inside the Linux kernel.
#[derive(Debug, Parser)]
#[command(name = "portfwd", version, about, max_term_width = 100)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Which daemon, where several run: a name; without it, the one of --socket, or `portfwd`
    #[arg(long, global = true, value_name = "NAME")]
    instance: Option<Instance>,
    /// The daemon's control socket; without it, /run/portfwd/INSTANCE.sock
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Say more; with `run`, what becomes of each packet that a rule claims
    #[arg(short, long, global = true)]
    verbose: bool,
    /// Print JSON instead of a table
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Load, attach and forward until Ctrl-C
    Run(Run),
    /// Validate a configuration without touching the kernel; with -v, try what the kernel says of
    /// the programs
    Check(Check),
    /// The rules of the running daemon
    List,
    /// The rules with their counters and rates, and what became of other packets
    Stats,
    /// The flows of stateful rules, as they are now
    Flows(Flows),
    /// Read the configuration again; what was changed since then and not saved is gone. One with
    /// mistakes changes nothing
    Reload,
    /// Add a rule
    Add(Add),
    /// Remove a rule
    Remove(Named),
    /// Have a rule forward again
    Enable(Named),
    /// Have a rule forward nothing, and keep it
    Disable(Named),
    /// What differs between the configuration and what runs: - is only in the configuration, + runs,
    /// ~ is other. Exit status 1 if anything does
    Diff,
    /// Stop forwarding, and take everything off, also what `run --keep` or a killed daemon left
    Detach,
}

#[derive(Debug, Args)]
struct Run {
    /// The configuration; without it, and without -p, /etc/portfwd/portfwd.toml
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// An interface where clients arrive, beside those of the configuration
    #[arg(short, long = "interface", value_name = "IFACE")]
    interfaces: Vec<String>,
    /// A rule: [ADDR:]PORT[-PORT]:BACKEND[:PORT[-PORT]][/PROTO]; * for every port; PROTO is tcp
    /// (default), udp, tcp+udp or any. Replaces the configuration's rule on the same port
    #[arg(short = 'p', long = "publish", value_name = "SPEC")]
    rules: Vec<String>,
    /// Forward on when this ends, until `portfwd detach` or the next start
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Args)]
struct Add {
    /// The rule, as `run` takes it
    #[arg(short = 'p', long = "publish", value_name = "SPEC")]
    rule: String,
    /// Its name; without one, listen and protocol: 8080/tcp
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Write it to the configuration too
    #[arg(long)]
    save: bool,
}

#[derive(Debug, Args)]
struct Named {
    /// The rule; `portfwd list` has all names
    name: String,
    /// Change the configuration too; its comments and order stay
    #[arg(long)]
    save: bool,
}

#[derive(Debug, Args)]
struct Check {
    /// The configuration
    #[arg(value_name = "FILE", default_value = DEFAULT_CONFIG)]
    file: PathBuf,
    /// Show what each rule means and why
    #[arg(long)]
    explain: bool,
}

#[derive(Debug, Args)]
struct Flows {
    /// Only those of this rule
    #[arg(long, value_name = "NAME")]
    rule: Option<String>,
    /// Only those of this client, or of all in a network: 203.0.113.7 or 203.0.113.0/24
    #[arg(long, value_name = "ADDR")]
    client: Option<String>,
}

/// Runs a command to its exit status: 0 done, 1 failed, 2 wrong usage or configuration.
pub fn main(arguments: Arguments) -> ExitCode {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    // Those that block on files, names and slow readers need no privileges.
    runtime.on_thread_start(privileges::give_up_here);
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&Failure::System(error.into())),
    };
    let result = runtime.block_on(dispatch(arguments));
    // A name lookup may still block a thread; nobody waits for it.
    runtime.shutdown_background();
    match result {
        Ok(status) => status,
        Err(Failure::System(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure),
    }
}

/// Says what is wrong, a line for each, and with what status that ends.
fn fail(failure: &Failure) -> ExitCode {
    for line in failure.lines().lines() {
        eprintln!("portfwd: {line}");
    }
    ExitCode::from(match failure {
        Failure::Configuration(_) => 2,
        Failure::System(_) => 1,
    })
}

/// Whoever read our output has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

async fn dispatch(arguments: Arguments) -> Result<ExitCode, Failure> {
    let Arguments { command, instance, socket, verbose, json } = arguments;
    let (instance, socket) = match (instance, socket) {
        (Some(instance), Some(socket)) => (instance, socket),
        (instance, None) => {
            let instance = instance.unwrap_or_default();
            let socket = instance.socket();
            (instance, socket)
        }
        (None, Some(socket)) => (Instance::of_socket(&socket), socket),
    };
    let done = obey(command, &instance, socket, verbose, json).await;
    done.map_err(|failure| match failure {
        Failure::System(error)
            if error.is::<Nobody>() && Pins::new(&instance.to_string()).has_links() =>
        {
            Failure::System(anyhow::anyhow!(
                "no daemon of instance \"{instance}\" is running, but what the last one left goes on forwarding: \
                 start it again as before, or end that with `portfwd detach`"
            ))
        }
        other => other,
    })
}

async fn obey(
    command: Command,
    instance: &Instance,
    socket: PathBuf,
    verbose: bool,
    json: bool,
) -> Result<ExitCode, Failure> {
    let change = async |change, save| {
        let asked = ChangeRequest { change, save };
        let answer = api::post_json(&socket, "/v1/change", &asked).await;
        print_changed(json, answer)
    };
    let done = match command {
        Command::Run(run) => {
            start_log(verbose);
            let keep = run.keep;
            let origin = run.origin();
            let config = origin.read().map_err(Failure::wrong)?;
            let log_packets = verbose;
            let instance = instance.clone();
            daemon::run(Options { config, origin, instance, socket, keep, log_packets }).await
        }
        Command::Check(check) => check.run(verbose, json).await,
        Command::List => {
            let list: List = api::get_json(&socket, "/v1/rules").await?;
            print(json, &list, || rules_table(&list))
        }
        Command::Stats => {
            let stats: Stats = api::get_json(&socket, "/v1/stats").await?;
            if json {
                print(true, &stats, String::new)?;
                return Ok(ExitCode::SUCCESS);
            }
            // A rate needs two looks.
            let start = Instant::now();
            tokio::time::sleep(RATE_WINDOW).await;
            let later: Stats = api::get_json(&socket, "/v1/stats").await?;
            print(false, &later, || stats_table(&later, &stats, start.elapsed()))
        }
        Command::Flows(flows) => flows.run(&socket, json).await,
        Command::Reload => print_changed(json, api::order_json(&socket, "/v1/reload").await),
        Command::Detach => {
            start_log(verbose);
            let messages = vec![detach(instance, &socket).await?.to_owned()];
            print_changed(json, Ok(Changed { messages, ..Changed::default() }))
        }
        Command::Add(Add { rule, name, save }) => {
            change(Change::Add { spec: rule, name }, save).await
        }
        Command::Remove(Named { name, save }) => change(Change::Remove { name }, save).await,
        Command::Enable(Named { name, save }) => change(Change::Enable { name }, save).await,
        Command::Disable(Named { name, save }) => change(Change::Disable { name }, save).await,
        Command::Diff => {
            let diff: Diff = api::get_json(&socket, "/v1/diff").await.map_err(refused)?;
            let same = diff.is_empty();
            let text = || if same { "no difference".to_owned() } else { diff.to_string() };
            print(json, &diff, text)?;
            return Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Tells what the daemon found wrong with a request from what went wrong.
fn refused(error: anyhow::Error) -> Failure {
    match error.downcast_ref::<Refused>() {
        Some(refused) if refused.is_wrong_input() => Failure::Configuration(refused.said.clone()),
        _ => Failure::System(error),
    }
}

fn print_changed(json: bool, answer: anyhow::Result<Changed>) -> Result<(), Failure> {
    let changed = answer.map_err(refused)?;
    if !json {
        changed.warnings.iter().for_each(|warning| eprintln!("portfwd: warning: {warning}"));
    }
    if !json && changed.messages.is_empty() {
        return Ok(());
    }
    print(json, &changed, || changed.messages.join("\n"))
}

/// Ends forwarding, with the daemon if there is one. Returns what was there.
async fn detach(instance: &Instance, socket: &Path) -> Result<&'static str, Failure> {
    let running = match daemon::take_off(instance) {
        Ok(true) => return Ok("nothing is forwarded any more"),
        Ok(false) => {
            let others = Pins::instances();
            if others.is_empty() {
                return Ok("there was nothing to take off");
            }
            let others: Vec<String> =
                others.iter().map(|other| format!("--instance {other}")).collect();
            let others = others.join(", ");
            return Err(Failure::System(anyhow::anyhow!(
                "instance \"{instance}\" forwards nothing, but another does: `portfwd detach` takes {others}"
            )));
        }
        Err(error) => error,
    };
    if !running.is::<daemon::Running>() {
        return Err(running.into());
    }
    // Its answer may be cut off, as it ends.
    let unheard = match api::order_json::<Changed>(socket, "/v1/detach").await {
        Ok(_) => None,
        Err(error) if error.is::<Refused>() => return Err(refused(error)),
        Err(error) => Some(error),
    };
    let deadline = Instant::now() + if unheard.is_none() { PATIENCE } else { UNHEARD };
    loop {
        match daemon::take_off(instance) {
            Ok(_) => return Ok("nothing is forwarded any more, and the daemon has ended"),
            Err(error) if error.is::<daemon::Running>() && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // It was not asked by the socket it has.
            Err(error) if error.is::<daemon::Running>() => {
                return Err(unheard.unwrap_or(error).into());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// How long a daemon may take to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// And if it may not have heard that it shall.
const UNHEARD: Duration = Duration::from_secs(3);

/// Over how long `stats` measures rates.
const RATE_WINDOW: Duration = Duration::from_millis(500);

/// Messages go to standard error, one line each.
fn start_log(verbose: bool) {
    let level = if verbose {
        tracing::level_filters::LevelFilter::DEBUG
    } else {
        tracing::level_filters::LevelFilter::INFO
    };
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::WARN.into())
        .parse_lossy(format!("portfwd={level}"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
}

impl Run {
    /// The file, and what the flags add.
    fn origin(self) -> Origin {
        let Self { config, interfaces, rules, .. } = self;
        let default = || rules.is_empty().then(|| DEFAULT_CONFIG.into());
        Origin { file: config.or_else(default), interfaces, rules }
    }
}

impl Flows {
    async fn run(self, socket: &Path, json: bool) -> Result<(), Failure> {
        let wrong = |client: &str, Invalid(message): Invalid| {
            Failure::Configuration(format!("--client {client}: {message}"))
        };
        let parsed = |client: String| client.parse().map_err(|error| wrong(&client, error));
        let client = self.client.map(parsed).transpose()?;
        let path = format!("/v1/flows?{}", Filter { rule: self.rule, client }.query());
        let mut printer = FlowPrinter::new(json, io::stdout().lock());
        api::get_lines(socket, &path, |flow| Ok(printer.add(flow)?)).await?;
        Ok(printer.end()?)
    }
}

/// Prints flows while they come: there may be a million.
struct FlowPrinter<W: io::Write> {
    json: bool,
    out: io::BufWriter<W>,
    /// How many there were.
    count: u64,
    /// Those that a table waits for.
    waiting: Vec<FlowInfo>,
}

/// How many flows a table has, so that its columns can be made wide enough.
const FLOWS_IN_TABLE: usize = 1000;

impl<W: io::Write> FlowPrinter<W> {
    fn new(json: bool, out: W) -> Self {
        Self { json, out: io::BufWriter::new(out), count: 0, waiting: Vec::new() }
    }

    fn add(&mut self, flow: FlowInfo) -> io::Result<()> {
        let start = if self.count == 0 { "{\"flows\":[" } else { "," };
        self.count += 1;
        if self.json {
            self.out.write_all(start.as_bytes())?;
            return Ok(serde_json::to_writer(&mut self.out, &flow)?);
        }
        self.waiting.push(flow);
        if self.waiting.len() < FLOWS_IN_TABLE { Ok(()) } else { self.print_table() }
    }

    fn print_table(&mut self) -> io::Result<()> {
        writeln!(self.out, "{}", flows_table(&self.waiting))?;
        self.waiting.clear();
        Ok(())
    }

    fn end(mut self) -> io::Result<()> {
        if !self.waiting.is_empty() {
            self.print_table()?;
        }
        let last = match (self.json, self.count) {
            (true, 0) => "{\"flows\":[]}".to_owned(),
            (true, _) => "]}".to_owned(),
            (false, 0) => "no flows".to_owned(),
            (false, 1) => "1 flow".to_owned(),
            (false, count) => format!("{count} flows"),
        };
        writeln!(self.out, "{last}")?;
        self.out.flush()
    }
}

/// What `check --json` prints.
#[derive(Serialize)]
struct Checked {
    file: PathBuf,
    flows: CheckedFlows,
    /// What is not wrong, but has to come from flags.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    lacks: Vec<&'static str>,
    rules: Vec<CheckedRule>,
    /// Those that are on this box.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    interfaces: Vec<CheckedInterface>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    programs: Vec<CheckedProgram>,
}

#[derive(Serialize)]
struct CheckedFlows {
    size: u32,
    /// Bytes.
    memory: u64,
}

#[derive(Serialize)]
struct CheckedRule {
    #[serde(flatten)]
    rule: api::RuleInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    explanation: Option<String>,
}

#[derive(Serialize)]
struct CheckedInterface {
    name: String,
    attach: String,
    why: String,
}

#[derive(Serialize)]
struct CheckedProgram {
    name: &'static str,
    instructions: Option<u32>,
    translated_bytes: Option<u32>,
    milliseconds: u128,
}

impl Check {
    async fn run(&self, verbose: bool, json: bool) -> Result<(), Failure> {
        let config = config::read(&self.file).map_err(Failure::wrong)?;
        let resolved = resolve_all(&config.rules).await?;
        let mut plan = plan(&config.rules, &resolved)
            .map_err(|refused| Failure::Configuration(refused.to_string()))?;
        // A file for another box can be checked too, and by anybody.
        let network = Network::open().ok().map(|(network, _)| network);
        if let Some(network) = &network {
            locate(network, &config, &mut plan).await;
        }
        let programs = if verbose { try_programs(&config, &plan)? } else { Vec::new() };
        let lacks = [
            (config.rules.is_empty(), "no rule: `portfwd run` needs -p SPEC beside it"),
            (
                config.external.is_empty(),
                "no external interface: `portfwd run` needs -i IFACE beside it",
            ),
        ];
        let lacks = lacks.into_iter().filter_map(|(lacks, what)| lacks.then_some(what)).collect();
        let explanations = if self.explain { explain(&config.rules, &plan) } else { Vec::new() };
        let off = "off (enabled = false): it claims no packets".to_owned();
        let off = config.disabled.iter().filter(|_| self.explain).map(|_| off.clone());
        let mut explanations = explanations.into_iter().chain(off);
        let interfaces = match network.filter(|_| self.explain) {
            Some(network) => foresee(&network, &config).await,
            None => Vec::new(),
        };
        let size = config.flows.size;
        let checked = Checked {
            file: self.file.clone(),
            flows: CheckedFlows { size, memory: flows::memory(size) },
            lacks,
            rules: config
                .all()
                .enumerate()
                .map(|(place, (rule, enabled))| CheckedRule {
                    rule: report::rule(rule, plan.stateful.contains_key(&place), enabled, true),
                    explanation: explanations.next(),
                })
                .collect(),
            interfaces,
            programs: programs
                .into_iter()
                .map(|verified| CheckedProgram {
                    name: verified.program,
                    instructions: verified.instructions,
                    translated_bytes: verified.size,
                    milliseconds: verified.time.as_millis(),
                })
                .collect(),
        };
        print(json, &checked, || checked.text())
    }
}

/// Notes which backends are this box, if the kernel says.
async fn locate(network: &Network, config: &Config, plan: &mut Plan) {
    let backends: BTreeSet<IpAddr> = plan.legs.iter().map(|leg| leg.backend).collect();
    let backends: Vec<IpAddr> = backends.into_iter().collect();
    let Ok(routes) = network.routes(&backends).await else { return };
    let routes = backends.into_iter().zip(routes);
    let local = routes.filter(|(_, route)| *route == Route::Local).map(|(backend, _)| backend);
    plan.locate(&config.rules, &local.collect());
}

/// How programs would be attached to the interfaces that are named and here.
async fn foresee(network: &Network, config: &Config) -> Vec<CheckedInterface> {
    let Ok(snapshot) = network.snapshot().await else { return Vec::new() };
    let names: BTreeSet<&str> =
        config.external.iter().chain(&config.internal).map(|it| it.name.as_str()).collect();
    let links = names.into_iter().filter_map(|name| snapshot.link(name));
    links
        .filter(|link| link.layer != Layer::Other)
        .map(|link| {
            let (mode, why) = modes::foresee(link, config.attach_to(&link.name));
            CheckedInterface { name: link.name.clone(), attach: mode.to_string(), why }
        })
        .collect()
}

/// Loads the programs, attaches nothing, and takes them off again.
fn try_programs(config: &Config, plan: &Plan) -> Result<Vec<Verified>, DatapathError> {
    let ports = BoxPorts { ephemeral: 32768..=60999, masquerade: config.masquerade.clone() };
    let capacity = Capacity::for_plan(&config.rules, plan, &ports, config.flows.size);
    let mut datapath = Datapath::load(capacity, &ports, false)?;
    for hook in [Hook::Xdp, Hook::Tc] {
        datapath.load_programs(hook)?;
    }
    Ok(datapath.verified().to_vec())
}

impl Checked {
    fn text(&self) -> String {
        let count = self.rules.len();
        let plural = if count == 1 { "" } else { "s" };
        let off = self.rules.iter().filter(|checked| !checked.rule.enabled).count();
        let off = if off == 0 { String::new() } else { format!(" ({off} off)") };
        let mut text = format!("{}: {count} rule{plural}{off}, no mistakes", self.file.display());
        for lack in &self.lacks {
            text.push_str(&format!("\n{lack}"));
        }
        let CheckedFlows { size, memory } = self.flows;
        text.push_str(&format!("\nroom for {size} flows takes {} MiB at most", memory >> 20));
        for CheckedRule { rule, explanation } in &self.rules {
            let Some(explanation) = explanation else { continue };
            text.push_str(&format!("\n\n{}", rule.name));
            for line in explanation.lines() {
                text.push_str(&format!("\n  {line}"));
            }
        }
        if !self.interfaces.is_empty() {
            text.push('\n');
        }
        for CheckedInterface { name, attach, why } in &self.interfaces {
            text.push_str(&format!("\n{name}: {attach} ({why})"));
        }
        if !self.programs.is_empty() {
            let mut table = table(&["program", "instructions verified", "bytes", "load time"]);
            right(&mut table, 1..4);
            for program in &self.programs {
                let number = |number: Option<u32>| {
                    number.map_or("not told".to_owned(), |number| number.to_string())
                };
                table.add_row([
                    program.name.to_owned(),
                    number(program.instructions),
                    number(program.translated_bytes),
                    format!("{} ms", program.milliseconds),
                ]);
            }
            text.push_str(&format!(
                "\n\n{table}\nThe verifier's limit is 1,000,000 instructions a program."
            ));
        }
        text
    }
}

/// Prints facts as JSON or as text.
fn print(json: bool, facts: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
    let text = if json { serde_json::to_string(facts)? } else { text() };
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()?;
    Ok(())
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header);
    table
}

/// Numbers stand to the right.
fn right(table: &mut Table, columns: std::ops::Range<usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn rules_table(list: &List) -> String {
    let mut rules = table(&["rule", "protocol", "listen", "to", "source", "state"]);
    for rule in &list.rules {
        rules.add_row([
            rule.name.as_str(),
            &rule.protocol,
            &rule.listen,
            &rule.to.join(", "),
            &rule.source,
            &match (rule.enabled, state(rule)) {
                (true, state) if state.is_empty() => keeps_flows(rule).to_owned(),
                (true, state) => format!("{}, {state}", keeps_flows(rule)),
                (false, state) => state,
            },
        ]);
    }
    format!("{rules}\n{}", interfaces_line(&list.interfaces))
}

fn keeps_flows(rule: &RuleInfo) -> &'static str {
    if rule.stateful { "stateful" } else { "stateless" }
}

/// What is out of the ordinary.
fn state(rule: &RuleInfo) -> String {
    let said = [(rule.enabled, "off"), (rule.saved, "not saved")];
    let said: Vec<&str> =
        said.into_iter().filter_map(|(usual, said)| (!usual).then_some(said)).collect();
    said.join(", ")
}

fn interfaces_line(interfaces: &[api::InterfaceInfo]) -> String {
    let each: Vec<String> = interfaces
        .iter()
        .map(|interface| {
            let attach = interface.attach.as_deref().unwrap_or("not attached");
            let why = interface.why.as_ref().map(|why| format!("; {why}")).unwrap_or_default();
            format!("{} ({}, {attach}{why})", interface.name, interface.role)
        })
        .collect();
    format!("interfaces: {}", each.join(", "))
}

fn stats_table(stats: &Stats, before: &Stats, elapsed: Duration) -> String {
    let mut header = vec![
        "rule", "listen", "to", "forward", "bytes", "per s", "reply", "bytes", "per s", "dropped",
    ];
    let has_states = stats.rules.iter().any(|rule| !state(&rule.rule).is_empty());
    if has_states {
        header.push("state");
    }
    let mut rules = table(&header);
    right(&mut rules, 3..10);
    let before: BTreeMap<&str, &RuleStats> =
        before.rules.iter().map(|rule| (rule.rule.name.as_str(), rule)).collect();
    for rule in &stats.rules {
        let earlier = before.get(rule.rule.name.as_str());
        let rate = |now: Count, then: Option<Count>| {
            let packets = now.packets.saturating_sub(then.unwrap_or(now).packets);
            format!("{:.0}", packets as f64 / elapsed.as_secs_f64())
        };
        let mut row = vec![
            rule.rule.name.clone(),
            format!("{} {}", rule.rule.protocol, rule.rule.listen),
            rule.rule.to.join(", "),
            rule.forward.packets.to_string(),
            rule.forward.bytes.to_string(),
            rate(rule.forward, earlier.map(|rule| rule.forward)),
            rule.reply.packets.to_string(),
            rule.reply.bytes.to_string(),
            rate(rule.reply, earlier.map(|rule| rule.reply)),
            rule.dropped.values().sum::<u64>().to_string(),
        ];
        if has_states {
            row.push(state(&rule.rule));
        }
        rules.add_row(row);
    }
    let list = |title: &str, counts: &BTreeMap<String, u64>| {
        let each: Vec<String> = counts
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        let each = if each.is_empty() { "none".to_owned() } else { each.join(", ") };
        format!("{title}: {each}")
    };
    let mut to_stack = BTreeMap::new();
    for (reason, count) in stats.rules.iter().flat_map(|rule| &rule.to_stack) {
        *to_stack.entry(reason.clone()).or_default() += count;
    }
    [
        rules.to_string(),
        list("passed untouched", &stats.verdicts.passed),
        list("dropped", &stats.verdicts.dropped),
        list("forwarded through the stack", &to_stack),
        interfaces_line(&stats.interfaces),
    ]
    .join("\n")
}

fn flows_table(flows: &[FlowInfo]) -> Table {
    let mut table = table(&[
        "client", "rule", "listen", "backend", "source", "state", "age", "idle", "forward",
        "bytes", "reply", "bytes",
    ]);
    right(&mut table, 6..12);
    let time =
        |seconds: f64| humantime::format_duration(Duration::from_secs(seconds as u64)).to_string();
    for flow in flows {
        table.add_row([
            flow.client.to_string(),
            flow.rule.clone(),
            format!("{} {}", flow.protocol, flow.listen),
            flow.backend.to_string(),
            if flow.source == flow.client { String::new() } else { flow.source.to_string() },
            flow.state.to_string(),
            time(flow.age),
            time(flow.idle),
            flow.forward.packets.to_string(),
            flow.forward.bytes.to_string(),
            flow.reply.packets.to_string(),
            flow.reply.bytes.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn arguments_are_what_was_typed() {
        Arguments::command().debug_assert();
        let parsed = |line: &str| Arguments::try_parse_from(line.split(' '));
        for (line, told) in [
            ("portfwd list", "- None List"),
            ("portfwd reload --instance game", "game None Reload"),
            (
                "portfwd add -p 80:10.0.0.1 --name web --save",
                "- None Add(Add { rule: \"80:10.0.0.1\", name: Some(\"web\"), save: true })",
            ),
            (
                "portfwd --socket /s remove 80/tcp",
                "- Some(\"/s\") Remove(Named { name: \"80/tcp\", save: false })",
            ),
            ("portfwd enable web --save", "- None Enable(Named { name: \"web\", save: true })"),
            ("portfwd disable web", "- None Disable(Named { name: \"web\", save: false })"),
            ("portfwd diff --json", "- None Diff"),
            ("portfwd detach", "- None Detach"),
            (
                "portfwd run --keep -i eth0",
                "- None Run(Run { config: None, interfaces: [\"eth0\"], rules: [], keep: true })",
            ),
        ] {
            let Arguments { command, instance, socket, .. } = parsed(line).expect(line);
            let instance = instance.map_or("-".to_owned(), |it| it.to_string());
            assert_eq!(format!("{instance} {socket:?} {command:?}"), told);
        }
        for line in [
            "portfwd add",
            "portfwd add web",
            "portfwd remove",
            "portfwd remove a b",
            "portfwd diff --instance a/b",
        ] {
            assert_eq!(parsed(line).expect_err(line).exit_code(), 2);
        }
    }

    #[test]
    fn the_file_is_the_default_one_where_nothing_is_named() {
        let origin = |config: Option<&str>, rules: &[&str]| {
            let rules = rules.iter().map(|rule| (*rule).to_owned()).collect();
            let config = config.map(Into::into);
            Run { config, interfaces: Vec::new(), rules, keep: false }.origin().file
        };
        assert_eq!(origin(None, &[]), Some(DEFAULT_CONFIG.into()));
        assert_eq!(origin(Some("a"), &["80:10.0.0.1"]), Some("a".into()));
        assert_eq!(origin(None, &["80:10.0.0.1"]), None);
        let origin = Origin { rules: vec!["80:10.0.0.1".to_owned()], ..Origin::default() };
        assert_eq!(origin.read().expect("a rule").rules.len(), 1);
        assert_eq!(
            origin.save(&Change::Remove { name: "a".to_owned() }).expect_err("no file").to_string(),
            "remove a: there is no file to save it in: portfwd runs by flags alone; leave --save out, or \
             run it with --config FILE"
        );
    }

    /// Rules that are on and off, saved and not.
    fn infos() -> Vec<RuleInfo> {
        let states = [(true, true), (true, false), (false, true), (false, false)];
        let info = |(enabled, saved)| {
            report::rule(&"80:192.0.2.1".parse().expect("a rule"), saved, enabled, saved)
        };
        states.map(info).into()
    }

    /// The last column of a table.
    fn last_cells(table: &str) -> String {
        let mut cells = String::new();
        for line in table.lines().filter(|line| line.starts_with('│')) {
            let cell = line.trim_end_matches('│').rsplit(['│', '┆']).next().unwrap_or_default();
            writeln!(cells, "{}", cell.trim()).expect("room");
        }
        cells
    }

    #[test]
    fn tables_say_which_rules_are_off_or_not_saved() {
        let list = List { rules: infos(), interfaces: Vec::new() };
        assert_eq!(
            last_cells(&rules_table(&list)),
            "state\nstateful\nstateless, not saved\noff\noff, not saved\n"
        );
        let stats = |rules: &[RuleInfo]| {
            let rules = rules.iter().map(|rule| RuleStats {
                rule: rule.clone(),
                forward: Count::default(),
                reply: Count::default(),
                to_stack: BTreeMap::new(),
                dropped: BTreeMap::new(),
                answered: 0,
                flows: api::Flows::default(),
                last_packet: None,
            });
            let rules = rules.collect();
            let stats = Stats { rules, verdicts: Default::default(), interfaces: Vec::new() };
            last_cells(&stats_table(&stats, &stats, RATE_WINDOW))
        };
        assert_eq!(stats(&infos()), "state\n\nnot saved\noff\noff, not saved\n");
        assert_eq!(stats(&infos()[..1]), "dropped\n0\n");
        // A daemon of before does not tell.
        let mut old = serde_json::to_value(&infos()[0]).expect("JSON");
        for key in ["enabled", "saved"] {
            old.as_object_mut().expect("an object").remove(key);
        }
        assert_eq!(serde_json::from_value::<RuleInfo>(old).expect("a rule"), infos()[0]);
    }

    #[test]
    fn what_is_wrong_with_a_request_is_wrong_input() {
        let status = |refusal: (axum::http::StatusCode, String)| refusal.0.as_u16();
        let wrong = Failure::Configuration("a\nb".to_owned());
        assert_eq!(status(api::refusal(wrong)), 422);
        assert_eq!(status(api::refusal(Failure::System(anyhow::anyhow!("no")))), 500);
    }

    fn flows(count: usize) -> Vec<FlowInfo> {
        let flow = FlowInfo {
            client: "203.0.113.7:5000".parse().expect("an address"),
            rule: "web".to_owned(),
            listen: "198.51.100.1:80".parse().expect("an address"),
            source: "192.168.1.1:40000".parse().expect("an address"),
            backend: "192.168.1.10:8080".parse().expect("an address"),
            protocol: "tcp".to_owned(),
            state: flows::State::Answered,
            age: 75.25,
            idle: 0.004,
            forward: Count { packets: 3, bytes: 180 },
            reply: Count { packets: 2, bytes: 900 },
        };
        let mut preserved = FlowInfo { source: flow.client, ..flow.clone() };
        preserved.rule = "game".to_owned();
        [flow, preserved].into_iter().cycle().take(count).collect()
    }

    fn printed(json: bool, flows: Vec<FlowInfo>) -> String {
        let mut out = Vec::new();
        let mut printer = FlowPrinter::new(json, &mut out);
        flows.into_iter().try_for_each(|flow| printer.add(flow)).expect("it prints");
        printer.end().expect("it ends");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn flows_in_json_are_one_document() {
        for count in [0, 1, 2, 2500] {
            let flows = flows(count);
            let document: serde_json::Value =
                serde_json::from_str(&printed(true, flows.clone())).expect("JSON");
            assert_eq!(document, serde_json::json!({ "flows": flows }));
        }
        assert_eq!(
            printed(true, flows(1)),
            "{\"flows\":[{\"client\":\"203.0.113.7:5000\",\"rule\":\"web\",\"listen\":\"198.51.100.1:80\",\
             \"source\":\"192.168.1.1:40000\",\"backend\":\"192.168.1.10:8080\",\"protocol\":\"tcp\",\
             \"state\":\"answered\",\"age\":75.25,\"idle\":0.004,\"forward\":{\"packets\":3,\"bytes\":180},\
             \"reply\":{\"packets\":2,\"bytes\":900}}]}\n"
        );
    }

    #[test]
    fn flows_are_printed_in_tables() {
        assert_eq!(printed(false, flows(0)), "no flows\n");
        assert!(printed(false, flows(1)).ends_with("\n1 flow\n"));
        let text = printed(false, flows(2));
        let cells = |line: &str| {
            line.split(['│', '┆']).map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
        };
        let rows: Vec<_> = text.lines().filter(|line| line.contains("203.0")).map(cells).collect();
        let [masqueraded, preserved] = rows.as_slice() else { panic!("{text}") };
        assert_eq!(
            masqueraded[1..13],
            [
                "203.0.113.7:5000",
                "web",
                "tcp 198.51.100.1:80",
                "192.168.1.10:8080",
                "192.168.1.1:40000",
                "answered",
                "1m 15s",
                "0s",
                "3",
                "180",
                "2",
                "900",
            ]
        );
        assert_eq!((preserved[2].as_str(), preserved[5].as_str()), ("game", ""));
        // Each table has its header.
        let text = printed(false, flows(2001));
        assert_eq!(text.lines().filter(|line| line.contains("client")).count(), 3);
        assert!(text.ends_with("\n2001 flows\n"), "{text}");
    }
}
