//! `cargo xtask bench`.

use std::{ffi::OsString, os::unix::process::CommandExt};

use anyhow::{Context, Result};

use crate::{
    cargo, root,
    setup::{self, Need},
};

#[derive(clap::Args)]
#[group(skip)]
pub struct Options {
    /// Arguments of the bench
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Brings what is missing, builds portfwd and the bench for speed, and runs the bench in this
/// process's place.
pub fn run(options: &Options) -> Result<()> {
    setup::bring(Need::Build)?;
    if let Err(error) = setup::bring(Need::Bench) {
        eprintln!("set-up: {error:#}; what stays absent is not measured");
    }
    let portfwd = cargo::build_portfwd(&["--release"])?;
    // With realm, as a program of ours around the library that crates.io has.
    let arguments = ["build", "--release", "--package", "portfwd-bench", "--features", "realm"];
    let bench = cargo::build(&[&arguments[..], &["--bins"]].concat())?
        .into_iter()
        .find(|executable| executable.target == "bench")
        .context("cargo built no bench")?;
    root::ask("measuring in network namespaces")?;
    let mut command = root::command(bench.path, &[]);
    command.arg("--portfwd").arg(portfwd).args(&options.arguments);
    Err(command.exec()).context("cannot start the bench")
}
