//! `cargo xtask fuzz`.

use std::{
    env::consts::ARCH,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{
    cargo::{self, Executable},
    setup::{self, Need},
};

/// What cargo-fuzz gives the compiler: coverage as libFuzzer reads it, and checks of addresses.
const FLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Zsanitizer=address",
];

#[derive(clap::Args)]
#[group(skip)]
pub struct Options {
    /// What takes the inputs; each in its turn, if not given
    #[arg(value_enum)]
    target: Option<Target>,
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Target {
    /// One packet
    Packet,
    /// Many, of clients, backends and routers
    Conversation,
    /// A configuration file
    Config,
    /// A change in one
    Edit,
}

impl Target {
    const ALL: [Self; 4] = [Self::Packet, Self::Conversation, Self::Config, Self::Edit];

    fn name(self) -> &'static str {
        ["packet", "conversation", "config", "edit"][self as usize]
    }

    /// Bytes of the longest input.
    fn longest(self) -> usize {
        [1600, 600, 3000, 3000][self as usize]
    }
}

/// Brings what is missing, builds the fuzzers and runs what the options ask for.
pub fn run(options: &Options) -> Result<()> {
    setup::bring(Need::Fuzz)?;
    let fuzzers = build()?;
    let targets = options.target.map_or(Target::ALL.to_vec(), |target| vec![target]);
    targets.into_iter().try_for_each(|target| fuzz(target, &fuzzers, options.seconds))
}

fn build() -> Result<Vec<Executable>> {
    // With a target, so that build scripts and macros are compiled without the flags.
    let host = format!("{ARCH}-unknown-linux-gnu");
    let arguments = ["build", "--package", "portfwd-fuzz", "--bins", "--features", "libfuzzer"];
    let mut command = cargo::command();
    // The sanitizer is there in every toolchain, but only unlocked in a nightly.
    command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    cargo::build_with(
        command,
        &[&arguments[..], &["--profile", "fuzz", "--target", &host]].concat(),
    )
}

/// Runs a fuzzer. What it learns stays in the build directory, and what a target does not take in
/// `fuzz/crashes`, which tests try from then on.
fn fuzz(target: Target, fuzzers: &[Executable], seconds: u64) -> Result<()> {
    let name = target.name();
    let fuzzer = fuzzers.iter().find(|fuzzer| fuzzer.target == name);
    let fuzzer = fuzzer.with_context(|| format!("cargo built no {name}"))?;
    let kept = Path::new(cargo::WORKSPACE).join("fuzz");
    let learned = learned(&fuzzer.path, name)?;
    let crashes = kept.join("crashes").join(name);
    fs::create_dir_all(&crashes)?;
    let status = std::process::Command::new(&fuzzer.path)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={}", target.longest()))
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .args(["-timeout=10", "-print_final_stats=1"])
        .args([&learned, &kept.join("corpus").join(name), &crashes])
        .status()
        .with_context(|| format!("cannot start {}", fuzzer.path.display()))?;
    if !status.success() {
        bail!("{name} does not take an input, which is kept in {}", crashes.display());
    }
    Ok(())
}

/// The directory beside a fuzzer for the inputs that it found to lead somewhere new.
fn learned(fuzzer: &Path, name: &str) -> Result<PathBuf> {
    let directory = fuzzer.with_file_name("corpus").join(name);
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}
