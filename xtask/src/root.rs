//! Root, directly or through sudo.

use std::{
    env,
    ffi::{OsStr, OsString},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::toolchain;

/// What a command of ours as root keeps of the user's environment; sudo drops the rest.
const KEPT: [&str; 7] = [
    "CI",
    "NO_COLOR",
    "PORTFWD_OTHER_BIN",
    "PORTFWD_TEST_LONG",
    "RUST_BACKTRACE",
    "RUST_LOG",
    "SEED",
];

/// Are we root?
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The program, to be started as root. `variables` are added to its environment.
pub fn command(program: impl AsRef<OsStr>, variables: &[(&str, &OsStr)]) -> Command {
    if is_root() {
        let mut command = Command::new(program);
        command.envs(variables.iter().copied());
        return command;
    }
    let mut command = Command::new("sudo");
    // Through env(1): sudo itself sets variables only for whom sudoers says so.
    command.arg("env");
    let kept = KEPT.iter().filter_map(|name| Some((*name, env::var_os(name)?)));
    let given = variables.iter().map(|(name, value)| (*name, value.to_os_string()));
    for (name, value) in kept.chain(given) {
        let mut pair = OsString::from(name);
        pair.push("=");
        pair.push(value);
        command.arg(pair);
    }
    command.arg(program);
    command
}

/// Has sudo ask for the password now, if it must; says why. Does nothing as root.
pub fn ask(why: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    if toolchain::program("sudo").is_none() {
        bail!("{why} needs root, and sudo is not installed; run this command as root");
    }
    eprintln!("{why} needs root: asking sudo");
    let status = Command::new("sudo").arg("--validate").status();
    if !status.context("cannot start sudo")?.success() {
        bail!("{why} needs root, and sudo refused; run this command as root");
    }
    Ok(())
}
