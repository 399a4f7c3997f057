//! `cargo xtask dist`: the Debian package. What is in it, portfwd/Cargo.toml says.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cargo::{self, Executable},
    setup::{self, Need},
};

/// Builds the package, and says where it is.
pub fn run() -> Result<()> {
    let package = build()?;
    println!("{}", package.display());
    Ok(())
}

/// Brings what is missing and builds the package, with manual pages and completions as the commands
/// are. Gives the path of the package.
pub fn build() -> Result<PathBuf> {
    setup::bring(Need::Dist)?;
    let packages = ["--package", "portfwd", "--package", "portfwd-manual"];
    let built = cargo::build(&[&["build", "--profile", "dist", "--bins"], &packages[..]].concat())?;
    let path = |target: &str| {
        let executable = built.iter().find(|executable| executable.target == target);
        executable.map(|Executable { path, .. }| path).with_context(|| format!("no {target}"))
    };
    let directory = path("portfwd")?.parent().context("a directory")?;
    let manual = directory.join("manual");
    // What a command was called that is no more would stay.
    if manual.exists() {
        fs::remove_dir_all(&manual)?;
    }
    run_command(Command::new(path("portfwd-manual")?).arg(&manual))?;
    let files = fs::read_dir(&manual)?.flatten().map(|entry| entry.path());
    let pages = files.filter(|path| path.extension().is_some_and(|extension| extension == "1"));
    run_command(Command::new("gzip").args(["--best", "--no-name"]).args(pages))?;
    let package = directory.join(format!("portfwd_{}_{}.deb", version(), architecture()?));
    run_command(
        cargo::command()
            .args(["deb", "--quiet", "--package", "portfwd", "--no-build", "--output"])
            .arg(&package)
            .stdout(Stdio::null()),
    )?;
    Ok(package)
}

/// The version of the workspace.
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// What Debian calls this machine's architecture.
fn architecture() -> Result<String> {
    let output = Command::new("dpkg").arg("--print-architecture").output();
    let output = output.context("cannot start dpkg")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn run_command(command: &mut Command) -> Result<()> {
    let program = Path::new(command.get_program()).to_owned();
    let status = command.status().with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(status.success(), "{} failed; its messages are above", program.display());
    Ok(())
}
