//! Memory of portfwd: its maps, by the kernel's own figures, and its daemon.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use portfwd_tests::Portfwd;

use crate::contender::{Contender, Running};
use crate::measure::{Bench, Reading};
use crate::report::Unit;
use crate::rig::{Rig, Wire};
use crate::rules::Rules;

pub const NAME: &str = "memory";

pub fn run(bench: &mut Bench) -> Result<()> {
    for count in if bench.options.quick { &[10_000][..] } else { &[1, 10_000, 100_000] } {
        let rules = Rules::Single(*count);
        let case = |what| format!("{what}, {rules}");
        bench.case(NAME, &rules.to_string(), &[Contender::Native], |options, contender| {
            let rig = Rig::new(Wire::Frames)?;
            let running = contender.start(options, &rig, rules)?;
            let Running::Portfwd { portfwd, .. } = &running else { bail!("this is not portfwd") };
            let bytes = |what, bytes: u64| Reading {
                case: case(what),
                value: bytes as f64,
                unit: Unit::Bytes,
            };
            Ok(vec![
                bytes("maps", maps(portfwd)?),
                bytes("daemon", resident(portfwd, "VmRSS:")?),
                bytes("daemon, at most so far", resident(portfwd, "VmHWM:")?),
            ])
        });
    }
    Ok(())
}

/// Bytes of all maps that a process holds, each counted once.
pub fn maps(portfwd: &Portfwd) -> Result<u64> {
    let directory = format!("/proc/{}/fdinfo", portfwd.id());
    let mut maps = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| directory.clone())? {
        let text = fs::read_to_string(entry?.path())?;
        if let (Some(id), Some(bytes)) = (field(&text, "map_id:"), field(&text, "memlock:")) {
            maps.push((id, bytes));
        }
    }
    ensure!(!maps.is_empty(), "the daemon holds no map");
    maps.sort_unstable();
    maps.dedup();
    Ok(maps.iter().map(|(_, bytes)| bytes).sum())
}

/// Bytes of memory that a process has in use, or had at most, by the kernel's name for it.
fn resident(portfwd: &Portfwd, name: &str) -> Result<u64> {
    let path = format!("/proc/{}/status", portfwd.id());
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    Ok(field(&text, name).with_context(|| format!("{path} has no {name}"))? * 1024)
}

/// The number after a name, in files of /proc with a line for each.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}
