//! Compiles the eBPF programs of `bench/ebpf` and leaves their object in OUT_DIR, as `bench`.

#[path = "../xtask/src/ebpf.rs"]
mod ebpf;
#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

fn main() -> anyhow::Result<()> {
    ebpf::build("portfwd-bench-ebpf", "bench", concat!(env!("CARGO_MANIFEST_DIR"), "/ebpf"))
}
