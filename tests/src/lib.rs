//! What portfwd's lab and its network tests are made of: network namespaces wired up as a client, a
//! router and a server, captures that verify every frame, and real programs as peers.
//!
//! Everything here needs root, but nothing of it touches the network of the machine: all traffic
//! stays in namespaces that end with the value that made them.

pub mod interrupt;
pub mod load;
pub mod machine;
pub mod netns;
pub mod oracle;
pub mod packet;
pub mod peers;
mod portfwd;
pub mod random;
pub mod rig;
pub mod rule;
pub mod sys;
pub mod tun;
pub mod wire;

pub use machine::Machine;
pub use netns::Namespace;
pub use portfwd::Portfwd;
pub use rig::Rig;
pub use tempfile::TempDir;

/// Whether this process may make namespaces. A test that may not says so and returns:
///
/// ```no_run
/// if !portfwd_tests::is_root() {
///     return;
/// }
/// ```
pub fn is_root() -> bool {
    // SAFETY: geteuid takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// The portfwd to test: what PORTFWD_BIN names. `cargo xtask test` sets it.
///
/// # Panics
///
/// It is not set.
pub fn binary() -> std::path::PathBuf {
    let binary = std::env::var_os("PORTFWD_BIN");
    binary.expect("PORTFWD_BIN names the portfwd to test, as `cargo xtask test` sees to").into()
}

/// How programs are attached in tests that do not ask for a way: what `PORTFWD_TEST_ATTACH` says, else
/// `native`.
pub fn attach() -> String {
    std::env::var("PORTFWD_TEST_ATTACH").unwrap_or_else(|_| "native".to_owned())
}

/// The same, in the daemon's words.
pub fn attached_as() -> &'static str {
    match attach().as_str() {
        "tc" => "TC",
        "generic" => "generic XDP",
        _ => "native XDP",
    }
}

/// The beginning of a configuration: `[interfaces]` with these lines, and a way to attach if they have none.
pub fn interfaces(lines: &str) -> String {
    let attach = if lines.contains("attach = ") {
        String::new()
    } else {
        format!("attach = \"{}\"\n", attach())
    };
    format!("[interfaces]\n{attach}{lines}\n")
}
