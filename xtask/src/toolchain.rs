//! Where the toolchain for bpfel-unknown-none is.
//!
//! The target is tier 3: no toolchain carries a compiled core for it, so `core` is compiled from source, which
//! needs the sources of that very compiler and its unstable flags. Used by `xtask`, and by
//! the build scripts of `portfwd` and `bench`, which include this file.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

/// A nightly known to build portfwd, and whose LLVM (22) Debian has too, for bpf-linker.
pub const NIGHTLY: &str = "nightly-2026-05-20";

/// The name under which set-up gives Debian's compiler, in /usr, to rustup.
pub const DEBIAN: &str = "bpf";

/// The rustup toolchain to compile the eBPF program with: [`NIGHTLY`], else any other nightly, else
/// [`DEBIAN`]; only one with the sources of core. `None` if there is none.
pub fn find() -> Option<String> {
    best(installed().into_iter().filter(|(_, path)| has_core(path)).map(|(name, _)| name))
}

/// The best of the toolchains named, for [`find`].
pub fn best(names: impl IntoIterator<Item = String>) -> Option<String> {
    let rank = |name: &String| match name.as_str() {
        name if name.starts_with(NIGHTLY) => 3,
        name if name == "nightly" || name.starts_with("nightly-") => 2,
        DEBIAN => 1,
        _ => 0,
    };
    names.into_iter().filter(|name| rank(name) > 0).max_by_key(|name| (rank(name), name.clone()))
}

/// Every toolchain that rustup has: its name and where it is.
pub fn installed() -> Vec<(String, PathBuf)> {
    let Some(rustup) = home("RUSTUP_HOME", ".rustup") else { return Vec::new() };
    fs::read_dir(rustup.join("toolchains"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect()
}

/// Are the sources of core there?
pub fn has_core(toolchain: &Path) -> bool {
    toolchain.join("lib/rustlib/src/rust/library/core").is_dir()
}

/// The first file of this name on PATH.
pub fn program(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// PATH and what it often lacks: where `cargo install` puts bpf-linker, and where system programs
/// are, which an ordinary user's PATH on Debian leaves out.
pub fn path() -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let more = home("CARGO_HOME", ".cargo").map(|home| home.join("bin"));
    let dirs = env::split_paths(&path)
        .chain(more)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    // Fails only for a directory with a colon in its name; then PATH stays as it is.
    env::join_paths(dirs).unwrap_or(path)
}

fn home(variable: &str, default: &str) -> Option<PathBuf> {
    env::var_os(variable).map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(default)))
}
