//! `cargo xtask oracle`.

use std::{
    env,
    io::IsTerminal,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use portfwd_tests::{interrupt, netns, oracle, random};

use crate::{
    cargo, root,
    setup::{self, Need},
};

#[derive(clap::Args)]
#[group(skip)]
pub struct Options {
    /// How many packets
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    packets: usize,
    /// Where the random stream begins; anywhere, if not given
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Compare this portfwd, and build none
    #[arg(long, value_name = "FILE")]
    portfwd: Option<PathBuf>,
}

/// Brings what is missing, builds portfwd, and compares it with nftables.
pub fn run(options: &Options) -> Result<()> {
    setup::bring(Need::Everything)?;
    let portfwd = match &options.portfwd {
        Some(portfwd) => portfwd.clone(),
        None => cargo::build_portfwd(&["--release"])?,
    };
    if root::is_root() {
        return compare(options, &portfwd);
    }
    root::ask("comparing in network namespaces")?;
    let mut command = root::command(env::current_exe()?, &[]);
    command.arg("oracle");
    if options.portfwd.is_none() {
        command.arg("--portfwd").arg(portfwd);
    }
    command.args(env::args_os().skip(2));
    Err(command.exec()).with_context(|| format!("cannot start {:?}", command.get_program()))
}

fn compare(options: &Options, portfwd: &Path) -> Result<()> {
    interrupt::catch();
    netns::clean_stale()?;
    let seed = options.seed.unwrap_or_else(random::seed);
    println!("{} packets from seed {seed} on", options.packets);
    let began = Instant::now();
    let summary = oracle::run(portfwd, options.packets, seed, |so_far| {
        ensure!(!interrupt::interrupted(), "interrupted after {} packets", so_far.packets);
        if std::io::stderr().is_terminal() {
            eprint!("{} packets\r", so_far.packets);
        }
        Ok(())
    })?;
    print!("{summary}");
    println!("{:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}
