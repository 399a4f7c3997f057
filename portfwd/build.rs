//! Compiles the eBPF program of `portfwd-ebpf` and leaves its object in OUT_DIR, as `portfwd`.

#[path = "../xtask/src/ebpf.rs"]
mod ebpf;
#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

fn main() -> anyhow::Result<()> {
    ebpf::build("portfwd-ebpf", "portfwd", concat!(env!("CARGO_MANIFEST_DIR"), "/../portfwd-ebpf"))
}
