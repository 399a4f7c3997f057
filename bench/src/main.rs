//! `cargo xtask bench`: portfwd and its alternatives on one rig, measured in turn.

mod measure;
mod report;
mod rig;
mod rules;
mod traffic;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use crate::measure::Bench;

/// Measures portfwd and its alternatives, as root. Everything stays in network namespaces of its own.
#[derive(Parser)]
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
    ensure!(portfwd_tests::is_root(), "measuring needs root; start it with `cargo xtask bench`");
    portfwd_tests::netns::clean_stale()?;
    let measures = measure::ALL;
    for name in &options.only {
        if !measures.iter().any(|(measure, _)| measure == name) {
            let names: Vec<_> = measures.iter().map(|(measure, _)| *measure).collect();
            bail!("--only {name}: there is no such measure; there are {}", names.join(", "));
        }
    }
    let mut bench = Bench::new(options);
    for (name, run) in measures {
        if bench.wants(name) {
            run(&mut bench).with_context(|| format!("cannot measure {name}"))?;
        }
    }
    println!("{}", bench.report.table());
    if let Some(path) = &bench.options.json {
        let text = serde_json::to_string_pretty(&bench.report.json())?;
        write(path, &text)?;
    }
    if let Some(path) = &bench.options.csv {
        write(path, &bench.report.csv())?;
    }
    Ok(())
}

fn write(path: &PathBuf, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
