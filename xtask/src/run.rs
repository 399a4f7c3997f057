//! `cargo xtask run`.

use std::{env, ffi::OsString, os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result};

use crate::{
    cargo, lab, root,
    setup::{self, Need},
};

#[derive(clap::Args)]
#[group(skip)]
pub struct Options {
    #[command(flatten)]
    lab: lab::Options,
    /// Arguments of `portfwd run`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, conflicts_with = "seconds")]
    arguments: Vec<OsString>,
}

/// Brings what is missing, builds, and runs the lab or portfwd. What runs takes this process's place
/// where it can, so a Ctrl-C reaches it once and its exit status is ours.
pub fn run(options: &Options) -> Result<()> {
    let in_lab = options.arguments.is_empty();
    setup::bring(if in_lab { Need::Everything } else { Need::Build })?;
    let portfwd = cargo::build_portfwd(&["--release"])?;
    if in_lab && root::is_root() {
        return lab::run(&options.lab, &portfwd);
    }
    root::ask("forwarding in the kernel")?;
    let mut command: Command;
    if in_lab {
        command = root::command(env::current_exe()?, &[]);
        // The lab's own arguments, as they came after `run`.
        command.arg("lab").arg("--portfwd").arg(portfwd).args(env::args_os().skip(2));
    } else {
        command = root::command(portfwd, &[]);
        command.arg("run").args(&options.arguments);
    }
    Err(command.exec()).with_context(|| format!("cannot start {:?}", command.get_program()))
}
