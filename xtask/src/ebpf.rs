//! Compiles a package of eBPF programs from a build script, which includes this file and
//! `toolchain.rs`.

use std::{env, fs, path::Path};

use anyhow::Context as _;
use aya_build::{Package, Toolchain};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

use crate::toolchain;

/// Where this is set, warnings are errors: with another compiler than ours there may be others.
const STRICT: &str = "PORTFWD_DENY_WARNINGS";

/// Leaves the object of the package in `directory` in OUT_DIR, by the name of its binary, without
/// what only a debugger reads. `directory` is given from the package that is built.
pub fn build(name: &str, binary: &str, directory: &str) -> anyhow::Result<()> {
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
    let wanted = [("strict", STRICT), ("other-layout", "CARGO_FEATURE_OTHER_LAYOUT")];
    let features: Vec<&str> = wanted
        .into_iter()
        .filter(|(_, variable)| env::var_os(variable).is_some())
        .map(|(feature, _)| feature)
        .collect();
    let package = Package { name, root_dir: directory, features: &features, ..Package::default() };
    aya_build::build_ebpf([package], Toolchain::Custom(&chain))?;
    let object = env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?;
    let object = Path::new(&object).join(binary);
    fs::write(&object, strip(&fs::read(&object)?)?)?;
    Ok(())
}

/// An object without DWARF, of which BTF is made, and which is four fifths of it.
fn strip(object: &[u8]) -> Result<Vec<u8>, object::build::Error> {
    let mut builder = Builder::read(object)?;
    for section in &mut builder.sections {
        let name = &section.name[..];
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    builder.delete_orphans();
    // LLVM has the names of sections among those of symbols.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}
