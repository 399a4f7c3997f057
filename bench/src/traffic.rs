//! The bench's own eBPF programs: the limit, traffic, and how to run them.

use anyhow::{Context, Result};
use aya::programs::Xdp;
use aya::{Ebpf, Pod};
use portfwd_bench_ebpf::{Headers, Turn};

/// The compiled programs of `bench/ebpf`; `build.rs` makes them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench"));

/// A type of `portfwd_bench_ebpf`, as aya wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Plain<T>(pub T);

/// The types that stand in maps and in read-only data.
pub trait Row: Copy + 'static {}
impl Row for Headers {}
impl Row for Turn {}
// SAFETY: rows are integers without padding.
unsafe impl<T: Row> Pod for Plain<T> {}

/// Loads a program of the object.
pub fn load<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf.program_mut(name).with_context(|| format!("there is no program {name}"))?;
    let xdp: &mut Xdp = program.try_into()?;
    xdp.load().with_context(|| format!("the kernel refuses program {name}"))?;
    Ok(xdp)
}
