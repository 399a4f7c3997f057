//! Calls of cargo.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The workspace's directory.
pub const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// An executable that cargo built.
pub struct Executable {
    /// Its target: `portfwd`, or the name of a test's file.
    pub target: String,
    pub path: PathBuf,
}

/// A cargo command, run in the workspace's directory.
pub fn command() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(Path::new(WORKSPACE));
    command
}

/// Builds; cargo's messages go to the terminal. Gives the executables that the arguments ask for.
pub fn build(arguments: &[&str]) -> Result<Vec<Executable>> {
    build_with(command(), arguments)
}

/// [`build`], with a command of cargo that has something more in its environment.
pub fn build_with(mut command: Command, arguments: &[&str]) -> Result<Vec<Executable>> {
    let mut child = command
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut executables = Vec::new();
    for line in BufReader::new(child.stdout.take().context("cargo has no output")?).lines() {
        let message: Value = serde_json::from_str(&line?).unwrap_or_default();
        if let (Some(path), Some(target)) =
            (message["executable"].as_str(), message["target"]["name"].as_str())
        {
            executables.push(Executable { target: target.into(), path: path.into() });
        }
    }
    if !child.wait()?.success() {
        bail!("`cargo {}` failed; its messages are above", arguments.join(" "));
    }
    Ok(executables)
}

/// Builds portfwd with the arguments given (a profile), and gives the path of the binary.
pub fn build_portfwd(arguments: &[&str]) -> Result<PathBuf> {
    build(&[&["build", "--package", "portfwd", "--bin", "portfwd"], arguments].concat())?
        .pop()
        .map(|executable| executable.path)
        .context("cargo built no portfwd")
}
