//! Who is measured, and how each is set up: as its users would, and at its best.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddrV4;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use portfwd_tests::{Namespace, Portfwd, TempDir, netns};

use crate::Options;
use crate::proxy::{self, Forward, Proxy};
use crate::report::LIMIT;
use crate::rig::{self, Rig};
use crate::rules::Rules;
use crate::traffic::Limit;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contender {
    /// An XDP program that sets MACs and redirects.
    Limit,
    /// portfwd with its programs in the driver, and in the stack.
    Native,
    Generic,
    /// portfwd at TC.
    Tc,
    /// portfwd in the driver, with a rule that needs the flow table.
    Stateful,
    /// The kernel's routing to the server's own address: nothing is translated.
    Routing,
    /// nftables, with all rules in one map.
    NftMap,
    /// nftables, with a rule for each in a chain.
    NftChain,
    Iptables,
    Nginx,
    Haproxy,
    Socat,
    Realm,
}

/// A contender at work on a rig. It ends when dropped.
pub enum Running {
    Limit {
        _limit: Limit,
    },
    Portfwd {
        portfwd: Portfwd,
        _directory: TempDir,
    },
    Proxy {
        _proxy: Proxy,
    },
    /// In the kernel, and goes with the router.
    Kernel,
}

impl Contender {
    pub const ALL: [Self; 13] = [
        Self::Limit,
        Self::Native,
        Self::Generic,
        Self::Tc,
        Self::Stateful,
        Self::Routing,
        Self::NftMap,
        Self::NftChain,
        Self::Iptables,
        Self::Nginx,
        Self::Haproxy,
        Self::Socat,
        Self::Realm,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Limit => LIMIT,
            Self::Native => "portfwd native",
            Self::Generic => "portfwd generic",
            Self::Tc => "portfwd tc",
            Self::Stateful => "portfwd stateful",
            Self::Routing => "routing",
            Self::NftMap => "nftables",
            Self::NftChain => "nftables chain",
            Self::Iptables => "iptables",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Socat => "socat",
            Self::Realm => "realm",
        }
    }

    /// Whether a name given by a user means it: `portfwd` means each of portfwd's modes.
    pub fn is_called(self, name: &str) -> bool {
        let name = name.replace('-', " ");
        let rest = self.name().strip_prefix(name.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
    }

    /// Why it cannot be measured on this machine.
    pub fn absent(self) -> Option<String> {
        let program = |name: &str, package: &str| {
            (proxy::find(name).is_none()).then(|| format!("{name} is not installed ({package})"))
        };
        match self {
            Self::Limit
            | Self::Native
            | Self::Generic
            | Self::Tc
            | Self::Stateful
            | Self::Routing => None,
            Self::NftMap | Self::NftChain => program("nft", "nftables"),
            Self::Iptables => program("iptables-restore", "iptables"),
            Self::Nginx | Self::Haproxy | Self::Socat | Self::Realm => self.proxy()?.absent(),
        }
    }

    /// The program in user space that it is.
    pub fn proxy(self) -> Option<proxy::Program> {
        match self {
            Self::Nginx => Some(proxy::Program::Nginx),
            Self::Haproxy => Some(proxy::Program::Haproxy),
            Self::Socat => Some(proxy::Program::Socat),
            Self::Realm => Some(proxy::Program::Realm),
            _ => None,
        }
    }

    /// Whether clients send to the listened addresses; else straight to the backends.
    pub fn translates(self) -> bool {
        !matches!(self, Self::Limit | Self::Routing)
    }

    /// Where a client sends to.
    pub fn connects_to(self, rule: &Forward) -> SocketAddrV4 {
        if self.translates() { rule.listen } else { rule.to }
    }

    /// Sets it up on the router.
    pub fn start(self, options: &Options, rig: &Rig, rules: Rules) -> Result<Running> {
        self.start_for(options, rig, rules, 1)
    }

    /// As [`start`](Self::start), with room for so many flows.
    pub fn start_for(
        self,
        options: &Options,
        rig: &Rig,
        rules: Rules,
        flows: u32,
    ) -> Result<Running> {
        match self {
            Self::Limit => return Ok(Running::Limit { _limit: Limit::start(rig)? }),
            Self::Native => return portfwd(&options.portfwd, rig, &rules.toml("native")),
            Self::Generic => return portfwd(&options.portfwd, rig, &rules.toml("generic")),
            Self::Tc => return portfwd(&options.portfwd, rig, &rules.toml("tc")),
            Self::Stateful => return portfwd(&options.portfwd, rig, &rules.stateful_toml(flows)),
            Self::Routing => {}
            Self::NftMap => nft(rig, &nft_map(rules))?,
            Self::NftChain => nft(rig, &nft_chain(rules))?,
            Self::Iptables => {
                netns::feed(&mut rig.router.command("iptables-restore"), &iptables(rules))?;
            }
            Self::Nginx | Self::Haproxy | Self::Socat | Self::Realm => {
                let program = self.proxy().context("no proxy")?;
                let forwards: Vec<Forward> =
                    rules.iter().filter(|rule| program.speaks(rule.transport)).collect();
                let proxy = Proxy::start(program, &rig.router, &forwards, rig::proxy_cpu())?;
                return Ok(Running::Proxy { _proxy: proxy });
            }
        }
        Ok(Running::Kernel)
    }
}

impl Contender {
    /// What a rule is added with: a command, which is a process of its own, or a call.
    pub fn adds_with(self) -> &'static str {
        match self {
            Self::Native => "portfwd (library)",
            Self::NftMap => "nft add element",
            Self::NftChain => "nft add rule",
            Self::Iptables => "iptables -A",
            _ => self.name(),
        }
    }

    /// Adds one rule to those that it was started with, by the command that users would type.
    pub fn add(self, rig: &Rig, rule: Forward) -> Result<()> {
        let Forward { transport, listen, to } = rule;
        let (protocol, ip, port) = (transport.name(), listen.ip(), listen.port());
        match self {
            Self::NftMap => nft(
                rig,
                &format!(
                    "add element ip bench forward {{ {protocol} . {ip} . {port} : {} . {} }}",
                    to.ip(),
                    to.port()
                ),
            ),
            Self::NftChain => nft(
                rig,
                &format!(
                    "add rule ip bench prerouting ip daddr {ip} {protocol} dport {port} dnat to {to}"
                ),
            ),
            Self::Iptables => {
                let line = format!(
                    "-t nat -A PREROUTING -d {ip} -p {protocol} --dport {port} -j DNAT --to-destination {to}"
                );
                let mut command = rig.router.command("iptables");
                netns::run(command.args(line.split(' '))).map(drop)
            }
            _ => bail!("{} has no command that adds a rule", self.name()),
        }
    }
}

/// portfwd with this configuration.
pub fn portfwd(binary: &Path, rig: &Rig, text: &str) -> Result<Running> {
    ensure!(
        binary.exists(),
        "{}: there is no such file; name portfwd with --portfwd FILE",
        binary.display()
    );
    let directory = TempDir::new()?;
    let config = directory.path().join("portfwd.toml");
    fs::write(&config, text)?;
    let arguments = ["--config".as_ref(), config.as_os_str()];
    let portfwd = Portfwd::start(&rig.router, binary, &arguments, directory.path())?;
    Ok(Running::Portfwd { portfwd, _directory: directory })
}

fn nft(rig: &Rig, rules: &str) -> Result<()> {
    netns::feed(rig.router.command("nft").args(["-f", "-"]), rules)
}

const NFT_CHAIN: &str = "chain prerouting {\ntype nat hook prerouting priority dstnat\n";

fn nft_map(rules: Rules) -> String {
    if rules == Rules::Range {
        return nft_chain(rules);
    }
    let mut text = "table ip bench {\nmap forward {\ntype inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service\nelements = {\n".to_owned();
    for Forward { transport, listen, to } in rules.iter() {
        let _ = writeln!(
            text,
            "{} . {} . {} : {} . {},",
            transport.name(),
            listen.ip(),
            listen.port(),
            to.ip(),
            to.port()
        );
    }
    text + "}\n}\n"
        + NFT_CHAIN
        + "dnat ip to meta l4proto . ip daddr . th dport map @forward\n}\n}\n"
}

fn nft_chain(rules: Rules) -> String {
    let mut text = format!("table ip bench {{\n{NFT_CHAIN}");
    for Forward { transport, listen, to } in rules.iter() {
        let (ip, port, protocol) = (listen.ip(), listen.port(), transport.name());
        let _ = writeln!(text, "ip daddr {ip} {protocol} dport {port} dnat to {to}");
    }
    if rules == Rules::Range {
        let (from, to) = (rig::EXTERNAL, rig::SERVER);
        let _ = writeln!(text, "ip daddr {from} udp dport 1-65535 dnat to {to}");
    }
    text + "}\n}\n"
}

fn iptables(rules: Rules) -> String {
    let mut text = "*nat\n".to_owned();
    for Forward { transport, listen, to } in rules.iter() {
        let (ip, port, protocol) = (listen.ip(), listen.port(), transport.name());
        let _ = writeln!(
            text,
            "-A PREROUTING -d {ip} -p {protocol} --dport {port} -j DNAT --to-destination {to}"
        );
    }
    if rules == Rules::Range {
        let (from, to) = (rig::EXTERNAL, rig::SERVER);
        let _ = writeln!(
            text,
            "-A PREROUTING -d {from} -p udp --dport 1:65535 -j DNAT --to-destination {to}"
        );
    }
    text + "COMMIT\n"
}

/// Room for connection tracking, so that nftables and iptables are measured at their best: its
/// tables are the machine's, and too small for a million flows by default. As before when dropped.
pub struct ConntrackRoom(Vec<(&'static str, String)>);

impl ConntrackRoom {
    const SIZES: [(&'static str, u64); 2] = [
        ("/sys/module/nf_conntrack/parameters/hashsize", 1 << 20),
        ("/proc/sys/net/netfilter/nf_conntrack_max", 8 << 20),
    ];

    /// Makes room, and says how much, or that there is none to make.
    pub fn make() -> Result<(Self, String)> {
        let mut before = Self(Vec::new());
        // The files come with connection tracking, and that with the first rules that need it.
        let is_there = || Self::SIZES.iter().all(|(path, _)| Path::new(path).exists());
        let why = if is_there() { None } else { Self::load().err() };
        if !is_there() {
            let mut note = "nftables and iptables: connection tracking has the room that this \
                            machine gives it; there are no files to set it"
                .to_owned();
            if let Some(why) = why {
                let _ = write!(note, " ({why:#})");
            }
            return Ok((before, note));
        }
        for (path, size) in Self::SIZES {
            let old = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
            fs::write(path, size.to_string())
                .with_context(|| format!("cannot write {size} to {path}"))?;
            before.0.push((path, old));
        }
        let note = "nftables and iptables: connection tracking has room for 8,388,608 flows in \
                    1,048,576 buckets (nf_conntrack_max, hashsize)";
        Ok((before, note.into()))
    }

    /// Has the kernel load connection tracking, by a table in a namespace that goes at once.
    fn load() -> Result<()> {
        let namespace = Namespace::new("conntrack")?;
        let table = format!("table ip bench {{\n{NFT_CHAIN}}}\n}}\n");
        netns::feed(namespace.command("nft").args(["-f", "-"]), &table)
    }
}

impl Drop for ConntrackRoom {
    fn drop(&mut self) {
        for (path, size) in &self.0 {
            if let Err(error) = fs::write(path, size.trim()) {
                eprintln!("cannot set {path} to {} again: {error}", size.trim());
            }
        }
    }
}
