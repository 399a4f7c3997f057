//! What cargo cannot do alone: bring what the build needs, run what needs root.

mod bench;
mod cargo;
mod dist;
mod fuzz;
mod kernels;
mod lab;
mod oracle;
mod root;
mod run;
mod setup;
mod test;
mod toolchain;

use std::{env, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// Set-up, tests and runs of portfwd.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring what is missing: a toolchain for eBPF, bpf-linker, bpffs, the programs that tests use
    Setup,
    /// Run the tests; as an ordinary user, asks sudo for those that need root
    Test(test::Options),
    /// Without arguments: a lab of network namespaces with live traffic. With: `portfwd run` with
    /// them on this box. As an ordinary user, asks for root through sudo, once
    Run(run::Options),
    /// Measure portfwd and its alternatives, with the arguments of the bench (--help shows them); as
    /// an ordinary user, asks for root through sudo, once
    #[command(disable_help_flag = true)]
    Bench(bench::Options),
    /// Send the same random packets through portfwd and through nftables, and compare what comes out;
    /// as an ordinary user, asks for root through sudo, once
    Oracle(oracle::Options),
    /// Look for packets and configurations that are taken wrongly, with libFuzzer
    Fuzz(fuzz::Options),
    /// Make the Debian package, target/dist/portfwd_VERSION_ARCH.deb
    Dist,
    /// The lab itself, as root, with portfwd already built
    #[command(hide = true)]
    Lab {
        #[arg(long)]
        portfwd: PathBuf,
        #[command(flatten)]
        options: lab::Options,
    },
}

fn main() -> ExitCode {
    // SAFETY: the only thread there is.
    unsafe { env::set_var("PATH", toolchain::path()) };
    let done = match Arguments::parse().command {
        Command::Setup => setup::bring(setup::Need::Everything).map(|steps| {
            if steps == 0 {
                println!("everything is there");
            }
        }),
        Command::Test(options) => test::run(&options),
        Command::Run(options) => run::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Oracle(options) => oracle::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Dist => dist::run(),
        Command::Lab { portfwd, options } => lab::run(&options, &portfwd),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
