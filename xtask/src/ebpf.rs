//! Compiles a package of eBPF programs from a build script, which includes this file and
//! `toolchain.rs`.

use std::env;

use aya_build::{Package, Toolchain};

use crate::toolchain;

/// Where this is set, warnings are errors: with another compiler than ours there may be others.
const STRICT: &str = "PORTFWD_DENY_WARNINGS";

/// Leaves the object of the package in `directory` in OUT_DIR, by the name of its binary.
/// `directory` is given from the package that is built.
pub fn build(name: &str, directory: &str) -> anyhow::Result<()> {
    let Some(chain) = toolchain::find() else {
        println!(
            "cargo::error=no toolchain that can compile core for bpfel-unknown-none; run `cargo xtask setup`"
        );
        return Ok(());
    };
    println!("cargo::rerun-if-env-changed={STRICT}");
    let variables = [
        ("PATH", Some(toolchain::path())),
        // A stable compiler's unstable flags (build-std).
        ("RUSTC_BOOTSTRAP", (chain == toolchain::DEBIAN).then(|| "1".into())),
        // aya-build turns each line of the inner cargo into a warning of ours; errors still come.
        ("CARGO_TERM_QUIET", Some("true".into())),
    ];
    for (variable, value) in variables {
        // SAFETY: the only thread there is.
        unsafe {
            match value {
                Some(value) => env::set_var(variable, value),
                None => env::remove_var(variable),
            }
        }
    }
    if toolchain::program("bpf-linker").is_none() {
        println!("cargo::error=bpf-linker is not installed; run `cargo xtask setup`");
        return Ok(());
    }
    // A build script starts in its package, all of which are one level below the workspace. The
    // profile, and the versions of what the programs use; aya-build watches their sources.
    for file in ["Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed=../{file}");
    }
    // A feature, as aya-build leaves no other way to tell the compiler.
    let features: &[&str] = if env::var_os(STRICT).is_some() { &["strict"] } else { &[] };
    let package = Package { name, root_dir: directory, features, ..Package::default() };
    aya_build::build_ebpf([package], Toolchain::Custom(&chain))
}
