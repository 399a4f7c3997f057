//! `cargo xtask setup`: finds what is missing, plans, brings it.

use std::{
    fmt, fs,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{cargo, root, toolchain};

/// The release of bpf-linker that goes with the versions of aya in Cargo.toml.
const LINKER: &str = "0.13.0";

/// The LLVM of [`toolchain::NIGHTLY`] and of Debian's compiler.
const LLVM: u32 = 22;

/// Debian's compiler, with the sources of core.
const COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// The programs that the lab and the tests start, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 18] = [
    ("ip", "iproute2"),
    ("ethtool", "ethtool"),
    ("ping", "iputils-ping"),
    ("nginx", "nginx-light"),
    ("curl", "curl"),
    ("iperf3", "iperf3"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("vsftpd", "vsftpd"),
    ("sipp", "sip-tester"),
    ("tcpdump", "tcpdump"),
    ("nft", "nftables"),
    ("sysctl", "procps"),
    ("wg", "wireguard-tools"),
    ("pppd", "ppp"),
    ("socat", "socat"),
    ("man", "man-db"),
    ("systemctl", "systemd"),
];

/// What the bench needs and whom it compares with: programs, and nginx's module for it.
const CONTENDERS: [(&str, &str); 8] = [
    ("ip", "iproute2"),
    ("ethtool", "ethtool"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("nginx", "nginx-light"),
    (NGINX_STREAM, "libnginx-mod-stream"),
    ("haproxy", "haproxy"),
    ("socat", "socat"),
];
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// apt-get without surprises: it removes nothing, and starts and enables no service. The packages are `$@`. With a
/// qemu-utils of another release, which QEMU does not go with, that becomes the one that does.
const INSTALL: &str = r#"
export DEBIAN_FRONTEND=noninteractive
guard=/usr/sbin/policy-rc.d
if ! [ -e $guard ]; then
    trap 'rm -f $guard' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >$guard
    chmod 755 $guard
fi
# Without a network the packages may still be in apt's cache: the installation decides.
apt-get update -qq -o Acquire::http::Timeout=20 -o Acquire::Retries=1
get() { apt-get install -qq -y --no-install-recommends --no-remove "$@"; }
if ! get "$@"; then
    case " $* " in *" qemu-system-common "*) ;; *) exit 1 ;; esac
    dpkg -s qemu-utils >/dev/null 2>&1 || exit 1
    version=$(apt-cache policy qemu-system-common | sed -n 's/ *Candidate: //p')
    get --allow-downgrades "$@" "qemu-utils=$version" || exit 1
fi
for package; do
    case $package in
        nginx-light) service=nginx ;;
        haproxy|vsftpd) service=$package ;;
        *) continue ;;
    esac
    update-rc.d $service disable || systemctl disable $service || exit 1
done
"#;

/// The release of cargo-deb that makes the Debian package.
const DEB: &str = "3.8.0";

/// What it calls to find out which libraries the package depends on.
const PACKAGERS: [(&str, &str); 1] = [("dpkg-shlibdeps", "dpkg-dev")];

/// What libFuzzer is compiled with.
const FUZZERS: [(&str, &str); 1] = [("c++", "g++")];

/// What boots other kernels.
const MACHINES: [(&str, &str); 4] = [
    ("ip", "iproute2"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/lib/qemu/virtiofsd", "qemu-system-common"),
    ("cpio", "cpio"),
];

/// For what: to compile, also to run the tests and the lab, or also to compare with others, to fuzz, to
/// run tests on other kernels, or to make the package.
#[derive(Clone, Copy, PartialEq)]
pub enum Need {
    Build,
    Everything,
    Bench,
    Fuzz,
    Kernels,
    Dist,
}

impl Need {
    /// Programs and their packages.
    fn programs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Build => &[],
            Self::Everything => &PROGRAMS,
            Self::Bench => &CONTENDERS,
            Self::Fuzz => &FUZZERS,
            Self::Kernels => &MACHINES,
            Self::Dist => &PACKAGERS,
        }
    }
}

/// What a machine has of what portfwd needs.
struct Machine {
    /// The toolchain that can compile core for bpfel-unknown-none.
    toolchain: Option<String>,
    /// Debian's compiler with its sources is in /usr.
    compiler: bool,
    linker: bool,
    /// What bpf-linker is compiled with must be of the compiler's own LLVM.
    llvm: u32,
    /// The files of that LLVM to compile with are there.
    llvm_files: bool,
    bpffs: bool,
    deb: bool,
    /// Missing programs and their packages.
    programs: Vec<(&'static str, &'static str)>,
}

impl Machine {
    fn probe(need: Need) -> Self {
        let toolchain = toolchain::find();
        let linker = toolchain::program("bpf-linker").is_some();
        // Only asked for where it matters: it starts the compiler.
        let llvm = match &toolchain {
            Some(name) if !linker => llvm(name).unwrap_or(LLVM),
            _ => LLVM,
        };
        Self {
            toolchain,
            compiler: toolchain::has_core(Path::new("/usr"))
                && Path::new("/usr/bin/rustc").exists(),
            linker,
            llvm,
            llvm_files: Path::new(&prefix(llvm)).join("bin/llvm-config").exists(),
            bpffs: need != Need::Everything
                || fs::read_to_string("/proc/mounts")
                    .is_ok_and(|mounts| mounts.contains(" /sys/fs/bpf bpf ")),
            deb: need != Need::Dist || toolchain::program("cargo-deb").is_some(),
            programs: need
                .programs()
                .iter()
                .copied()
                .filter(|(program, _)| toolchain::program(program).is_none())
                .collect(),
        }
    }

    /// What is missing, in a reader's words.
    fn missing(&self) -> String {
        [
            (self.toolchain.is_none(), "a toolchain that compiles core for bpfel-unknown-none"),
            (!self.linker, "bpf-linker"),
            (!self.bpffs, "bpffs on /sys/fs/bpf"),
            (!self.deb, "cargo-deb"),
        ]
        .into_iter()
        .filter_map(|(missing, name)| missing.then_some(name))
        .chain(self.programs.iter().map(|(program, _)| *program))
        .collect::<Vec<_>>()
        .join(", ")
    }

    /// What to do, in this order. Where no toolchain is there, Debian's is planned.
    fn plan(&self) -> Vec<Step> {
        let mut packages = Vec::new();
        if self.toolchain.is_none() && !self.compiler {
            packages.extend(COMPILER.map(String::from));
        }
        if !self.linker && !self.llvm_files {
            let llvm = self.llvm;
            packages.extend([format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")]);
        }
        packages.extend(self.programs.iter().map(|(_, package)| String::from(*package)));
        [
            (!packages.is_empty(), Step::Packages(packages)),
            (self.toolchain.is_none(), Step::Link),
            (!self.linker, Step::Linker(self.llvm)),
            (!self.bpffs, Step::Mount),
            (!self.deb, Step::Deb),
        ]
        .into_iter()
        .filter_map(|(wanted, step)| wanted.then_some(step))
        .collect()
    }
}

/// One thing to do; shown as the command that does it.
#[derive(Debug, PartialEq)]
enum Step {
    Packages(Vec<String>),
    Link,
    /// bpf-linker with Debian's LLVM of this major version.
    Linker(u32),
    Mount,
    Deb,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let root = if self.needs_root() && !root::is_root() { "(as root) " } else { "" };
        match self {
            Self::Packages(names) => {
                write!(f, "{root}apt-get install --no-install-recommends {}", names.join(" "))
            }
            Self::Link => write!(f, "rustup toolchain link {} /usr", toolchain::DEBIAN),
            Self::Linker(llvm) => write!(
                f,
                "LLVM_PREFIX={} cargo install bpf-linker --version {LINKER} --locked \
                 --no-default-features --features llvm-{llvm}",
                prefix(*llvm)
            ),
            Self::Deb => {
                write!(f, "cargo install cargo-deb --version {DEB} --locked --no-default-features")
            }
            Self::Mount => write!(f, "{root}mount -t bpf bpf /sys/fs/bpf"),
        }
    }
}

impl Step {
    fn needs_root(&self) -> bool {
        matches!(self, Self::Packages(_) | Self::Mount)
    }

    fn run(&self) -> Result<()> {
        let command = match self {
            Self::Packages(names) => {
                let mut command = root::command("sh", &[]);
                command.args(["-c", INSTALL, "sh"]).args(names);
                command
            }
            Self::Link => rustup(&["toolchain", "link", toolchain::DEBIAN, "/usr"]),
            Self::Linker(llvm) => {
                let mut command = cargo::command();
                let feature = format!("llvm-{llvm}");
                command.args(["install", "bpf-linker", "--version", LINKER, "--locked"]);
                command.args(["--no-default-features", "--features", &feature]);
                command.env("LLVM_PREFIX", prefix(*llvm));
                command
            }
            Self::Deb => {
                let mut command = cargo::command();
                command.args(["install", "cargo-deb", "--version", DEB, "--locked"]);
                command.arg("--no-default-features");
                command
            }
            Self::Mount => {
                let mut command = root::command("mount", &[]);
                command.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]);
                command
            }
        };
        watch(&self.to_string(), command)
    }
}

/// Brings what is missing and says so, a line for each step. Gives the number of steps taken: none
/// if everything is there.
pub fn bring(need: Need) -> Result<usize> {
    let mut taken = 0;
    if toolchain::find().is_none() {
        if toolchain::program("rustup").is_none() {
            bail!("missing: rustup; get it from https://rustup.rs, then run `cargo xtask setup`");
        }
        match nightly() {
            Ok(()) => taken += 1,
            Err(error) => {
                // The innermost reason of rustup's long line.
                let reason = error.to_string();
                let reason = reason.rsplit(": ").next().unwrap_or_default();
                eprintln!("set-up: not from rustup ({reason}); from Debian, then");
            }
        }
    }
    let steps = Machine::probe(need).plan();
    // With what is missing now, not with what was brought before a step failed.
    let by_hand = || {
        let machine = Machine::probe(need);
        let steps: Vec<_> = machine.plan().iter().map(Step::to_string).collect();
        format!("missing: {}; to get it, with a network: {}", machine.missing(), steps.join(" && "))
    };
    if matches!(steps.first(), Some(Step::Packages(_))) && toolchain::program("apt-get").is_none() {
        bail!("{} (Debian's names; this system has no apt-get)", by_hand());
    }
    if steps.iter().any(Step::needs_root) {
        root::ask("set-up").with_context(by_hand)?;
    }
    for step in &steps {
        step.run().with_context(by_hand)?;
    }
    let left = Machine::probe(need).missing();
    if !left.is_empty() {
        bail!("set-up did all it can, and this is still missing: {left}");
    }
    Ok(taken + steps.len())
}

/// Has rustup bring a nightly with the sources of core; only the sources if a nightly is there.
/// Fails on a machine that cannot reach rustup's server.
fn nightly() -> Result<()> {
    let nightly = toolchain::best(
        toolchain::installed()
            .into_iter()
            .map(|(name, _)| name)
            .filter(|name| name != toolchain::DEBIAN),
    );
    let command = match &nightly {
        Some(name) => rustup(&["component", "add", "rust-src", "--toolchain", name]),
        None => rustup(&[
            "toolchain",
            "install",
            toolchain::NIGHTLY,
            "--component",
            "rust-src",
            "--profile",
            "minimal",
            "--no-self-update",
        ]),
    };
    let name = nightly.as_deref().unwrap_or(toolchain::NIGHTLY);
    watch(&format!("rustup: the sources of core for {name}"), command)
}

/// A rustup command that gives up soon: no second try at a download, and ten minutes at most.
fn rustup(arguments: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--foreground", "600", "rustup"]).args(arguments).env("RUSTUP_MAX_RETRIES", "0");
    command
}

/// Where Debian has this LLVM.
fn prefix(llvm: u32) -> String {
    format!("/usr/lib/llvm-{llvm}")
}

/// The major version of the LLVM of a rustup toolchain.
fn llvm(toolchain: &str) -> Option<u32> {
    let output = rustup(&["run", toolchain, "rustc", "-vV"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

/// Runs a command without its output; tells what it does, that it still does, and when it is done.
/// An error is the line that says why.
fn watch(what: &str, mut command: Command) -> Result<()> {
    eprintln!("set-up: {what}");
    let start = Instant::now();
    command.stdin(Stdio::null());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(command.output()));
    let output = loop {
        match receiver.recv_timeout(Duration::from_secs(10)) {
            Ok(output) => break output.with_context(|| format!("{what}: cannot start"))?,
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("set-up: ... {} s", start.elapsed().as_secs());
            }
            Err(RecvTimeoutError::Disconnected) => bail!("{what}: lost"),
        }
    };
    if !output.status.success() {
        bail!("{}", reason(&String::from_utf8_lossy(&output.stderr)));
    }
    eprintln!("set-up: done in {} s", start.elapsed().as_secs());
    Ok(())
}

/// The line of an output that says why a command failed: the first that calls itself an error, else the last.
fn reason(output: &str) -> &str {
    let mut lines = output.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.clone().find(|line| line.starts_with("E: ") || line.starts_with("error"));
    first.or_else(|| lines.next_back()).unwrap_or("it failed without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete() -> Machine {
        Machine {
            toolchain: Some("nightly".into()),
            compiler: false,
            linker: true,
            llvm: LLVM,
            llvm_files: false,
            bpffs: true,
            deb: true,
            programs: Vec::new(),
        }
    }

    fn packages(names: &[&str]) -> Step {
        Step::Packages(names.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn nothing_missing_nothing_to_do() {
        assert_eq!(complete().plan(), []);
        assert_eq!(complete().missing(), "");
    }

    #[test]
    fn fresh_debian_takes_one_call_of_apt_for_all_packages() {
        let machine = Machine {
            toolchain: None,
            linker: false,
            bpffs: false,
            programs: vec![("iperf3", "iperf3"), ("dig", "bind9-dnsutils")],
            ..complete()
        };
        let names = [
            "rustc-web",
            "cargo-web",
            "rust-web-src",
            "llvm-22-dev",
            "libpolly-22-dev",
            "iperf3",
            "bind9-dnsutils",
        ];
        assert_eq!(machine.plan(), [packages(&names), Step::Link, Step::Linker(22), Step::Mount]);
        assert_eq!(
            machine.missing(),
            "a toolchain that compiles core for bpfel-unknown-none, bpf-linker, bpffs on \
             /sys/fs/bpf, iperf3, dig"
        );
    }

    #[test]
    fn rustups_nightly_still_wants_the_llvm_that_matches_it_for_the_linker() {
        let machine = Machine { linker: false, llvm: 23, ..complete() };
        assert_eq!(
            machine.plan(),
            [packages(&["llvm-23-dev", "libpolly-23-dev"]), Step::Linker(23)]
        );
    }

    #[test]
    fn what_is_installed_already_is_not_installed_again() {
        let machine = Machine {
            toolchain: None,
            compiler: true,
            linker: false,
            llvm_files: true,
            ..complete()
        };
        assert_eq!(machine.plan(), [Step::Link, Step::Linker(22)]);
    }

    #[test]
    fn only_packages_and_mounts_need_root() {
        let steps = [packages(&["curl"]), Step::Link, Step::Linker(22), Step::Mount];
        assert_eq!(steps.each_ref().map(Step::needs_root), [true, false, false, true]);
    }

    #[test]
    fn the_reason_is_the_line_that_calls_itself_an_error() {
        let apt = "W: old\nE: Unable to locate package rustc-web\nE: another\n";
        assert_eq!(reason(apt), "E: Unable to locate package rustc-web");
        assert_eq!(reason("mount: permission denied.\n\n"), "mount: permission denied.");
        assert_eq!(reason(""), "it failed without a message");
    }

    #[test]
    fn the_known_nightly_comes_first_and_debians_last() {
        let known = format!("{}-x86_64-unknown-linux-gnu", toolchain::NIGHTLY);
        let best = |names: &[&str]| toolchain::best(names.iter().map(ToString::to_string));
        assert_eq!(best(&["bpf", "nightly-x86_64", &known]), Some(known.clone()));
        assert_eq!(best(&["bpf", "nightly-x86_64", "stable"]), Some("nightly-x86_64".into()));
        assert_eq!(best(&["stable", "bpf"]), Some("bpf".into()));
        assert_eq!(best(&["stable", "1.95.0"]), None);
    }
}
