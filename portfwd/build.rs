//! Compiles the eBPF program of `portfwd-ebpf` and leaves its object in OUT_DIR, as `portfwd`.

use std::env;

use aya_build::{Package, Toolchain};

#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../portfwd-ebpf");

fn main() -> anyhow::Result<()> {
    let Some(name) = toolchain::find() else {
        println!(
            "cargo::error=no toolchain that can compile core for bpfel-unknown-none; run `cargo xtask setup`"
        );
        return Ok(());
    };
    let variables = [
        ("PATH", Some(toolchain::path())),
        // A stable compiler's unstable flags (build-std).
        ("RUSTC_BOOTSTRAP", (name == toolchain::DEBIAN).then(|| "1".into())),
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
    // The profile, and the versions of what the program uses. aya-build watches its sources.
    for file in ["Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={ROOT}/../{file}");
    }
    let package = Package { name: "portfwd-ebpf", root_dir: ROOT, ..Package::default() };
    aya_build::build_ebpf([package], Toolchain::Custom(&name))
}
