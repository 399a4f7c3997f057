//! `cargo xtask bench`: portfwd and its alternatives on one rig, measured in turn.

mod contender;
mod machine;
mod measure;
mod plot;
mod proxy;
mod report;
mod rig;
mod rules;
mod traffic;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use crate::contender::{ConntrackRoom, Contender};
use crate::measure::Bench;
use crate::report::{Failure, Report};

/// Measures portfwd and its alternatives, as root. Everything stays in network namespaces of its own.
#[derive(Clone, Parser)]
#[command(name = "bench", bin_name = "cargo xtask bench")]
pub struct Options {
    /// All of it in under two minutes: short runs, one round, fewer cases
    #[arg(long)]
    pub quick: bool,
    /// Only these measures and contenders; of either kind all, if none of that kind is named
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub only: Vec<String>,
    /// How often everything is measured; 5, or 1 with --quick
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: Option<u32>,
    /// Write all samples as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write all samples as CSV
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Measure nothing, and show what earlier runs wrote with --json; may be given several times
    #[arg(long, value_name = "FILE")]
    pub from: Vec<PathBuf>,
    /// Draw plots for people, as SVG and PNG
    #[arg(long, value_name = "DIRECTORY")]
    pub plots: Option<PathBuf>,
    /// The portfwd to measure
    #[arg(long, value_name = "FILE", default_value = "target/release/portfwd")]
    pub portfwd: PathBuf,
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<()> {
    let report = if options.from.is_empty() { measured(&options)? } else { read(&options.from)? };
    println!("{}", report.table());
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        write(path, &text)?;
    }
    if let Some(path) = &options.csv {
        write(path, &report.csv())?;
    }
    if let Some(directory) = &options.plots {
        for path in plot::plots(&report, directory)? {
            println!("{}", path.display());
        }
    }
    let refused = report.failures.len();
    ensure!(refused == 0, "{refused} figures were refused; the table says why");
    Ok(())
}

/// What earlier runs found.
fn read(files: &[PathBuf]) -> Result<Report> {
    let mut report = Report::default();
    for path in files {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        report.add(&text).with_context(|| format!("{} is not of the bench", path.display()))?;
    }
    Ok(report)
}

/// What is found now.
fn measured(options: &Options) -> Result<Report> {
    ensure!(portfwd_tests::is_root(), "measuring needs root; start it with `cargo xtask bench`");
    portfwd_tests::netns::clean_stale()?;
    let measures = measure::ALL;
    for name in &options.only {
        if !measures.iter().any(|(measure, _)| measure == name)
            && !Contender::ALL.iter().any(|contender| contender.is_called(name))
        {
            let names = measures.iter().map(|(measure, _)| *measure);
            let names: Vec<_> = names.chain(Contender::ALL.map(Contender::name)).collect();
            bail!(
                "--only {name}: there is no such measure or contender; there are {}",
                names.join(", ")
            );
        }
    }
    // All but the data path, which pins itself.
    rig::pin(rig::proxy_cpu())?;
    let mut bench = Bench::new(options.clone());
    bench.report.notes.extend(machine::notes(&bench.options.portfwd));
    for contender in Contender::ALL {
        if let Some(why) = contender.absent() {
            bench.report.notes.push(format!("absent: {}: {why}", contender.name()));
        }
    }
    let (_room, note) = ConntrackRoom::make()?;
    bench.report.notes.push(note);
    for (name, run) in measures {
        if bench.wants(name) {
            // What the others find is kept, whatever becomes of one.
            if let Err(error) = run(&mut bench) {
                let why = format!("{error:#}").replace('\n', "; ");
                measure::progress(&format!("{name}: refused: {why}"));
                let (case, contender) = ("the measure".into(), "all".into());
                bench.report.failures.push(Failure { measure: name, case, contender, why });
            }
        }
    }
    let busy = bench.busy_note();
    bench.report.notes.extend(busy);
    Ok(bench.report)
}

fn write(path: &PathBuf, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
