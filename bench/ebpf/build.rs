//! What bpf-linker, which generates the code, has to know of the processor.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Headers lie at any address. Without this each of their fields is put together byte by byte; the
    // kernel allows such access on every processor that can do it (x86, arm64, s390, POWER).
    println!("cargo::rustc-link-arg-bins=--cpu-features=+allows-misaligned-mem-access");
}
