//! The Debian package, installed in a machine of its own, with systemd.

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use portfwd_tests::{Machine, is_root};

const CONFIGURATION: &str = "[interfaces]
external = \"wan0\"
internal = \"lan0\"

[[rule]]
name = \"web\"
listen = 8080
to = \"10.7.0.10:80\"
";

/// A client and a server at either side, in namespaces of their own.
const NETWORK: &str = r#"
set -e
for end in client:wan:198.51.100 server:lan:10.7.0; do
    IFS=: read -r name link net <<.
$end
.
    ip netns add $name
    ip link add ${link}0 type veth peer name eth0 netns $name
    ip address add $net.1/24 dev ${link}0
    ip link set ${link}0 up
    ip -n $name address add $net.10/24 dev eth0
    ip -n $name link set eth0 up
    ip -n $name link set lo up
    ip -n $name route add default via $net.1
done
ip netns exec server socat -U TCP-LISTEN:80,fork,reuseaddr SYSTEM:'echo hello' >/dev/null 2>&1 &
"#;

/// Asks the server through the rule, until it answers.
const ASK: &str = "ip netns exec client sh -c '
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        socat -u TCP:198.51.100.1:8080,connect-timeout=2 - && exit 0
        sleep 0.5
    done
    exit 1'";

/// What the package has, beside documentation, and with which permissions.
const FILES: [(&str, &str); 14] = [
    ("/etc/portfwd", "755"),
    ("/etc/portfwd/portfwd.toml", "644"),
    ("/usr/bin/portfwd", "755"),
    ("/usr/lib/systemd/system/portfwd.service", "644"),
    ("/usr/lib/systemd/system/portfwd@.service", "644"),
    ("/usr/lib/sysusers.d/portfwd.conf", "644"),
    ("/usr/share/bash-completion/completions/portfwd", "644"),
    ("/usr/share/fish/vendor_completions.d/portfwd.fish", "644"),
    ("/usr/share/zsh/vendor-completions/_portfwd", "644"),
    ("/usr/share/man/man1/portfwd.1.gz", "644"),
    ("/usr/share/man/man1/portfwd-run.1.gz", "644"),
    ("/usr/share/doc/portfwd/changelog.Debian.gz", "644"),
    ("/usr/share/doc/portfwd/copyright", "644"),
    ("/usr/share/doc/portfwd/operating.md", "644"),
];

/// A machine with the package in /tmp.
fn machine() -> Result<Machine> {
    let machine = Machine::start()?;
    let package = env::var_os("PORTFWD_DEB").map(PathBuf::from);
    let package =
        package.context("PORTFWD_DEB names the package, as `cargo xtask test` sees to")?;
    machine.write("/tmp/portfwd.deb", fs::read(package)?)?;
    Ok(machine)
}

/// What systemd says of a property of the service.
fn property(machine: &Machine, name: &str) -> Result<String> {
    let value = machine.run(&format!("systemctl show --property={name} --value portfwd"))?;
    Ok(value.trim().to_owned())
}

#[test]
fn package_is_complete_and_right() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let machine = machine()?;
    machine.run("dpkg --install /tmp/portfwd.deb")?;
    for (path, mode) in FILES {
        let found = machine.run(&format!("stat --format '%a %U:%G' {path}"))?;
        assert_eq!(found.trim(), format!("{mode} root:root"), "{path}");
    }
    assert_eq!(machine.run("dpkg --verify portfwd")?, "");
    let version = machine.run("dpkg-query --show --showformat '${Version}' portfwd")?;
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
    let changes = machine.run("zcat /usr/share/doc/portfwd/changelog.Debian.gz | head -n 1")?;
    assert!(changes.starts_with(&format!("portfwd ({version}) ")), "{changes}");
    machine.run("getent group portfwd")?;

    // The manual, a page for each command, without a complaint of groff's.
    let commands =
        machine.run("portfwd --help | sed -n '/^Commands:/,/^$/s/^  \\([a-z]*\\) .*/\\1/p'")?;
    let commands: Vec<_> = commands.split_whitespace().filter(|name| *name != "help").collect();
    ensure!(commands.contains(&"run"), "{commands:?}");
    for page in commands.iter().map(|name| format!("portfwd-{name}")).chain(["portfwd".to_owned()])
    {
        let check = format!(
            "man --warnings --local-file -Tutf8 -Z /usr/share/man/man1/{page}.1.gz 2>&1 >/dev/null"
        );
        assert_eq!(machine.run(&check)?, "", "{page}");
    }
    machine.run("man portfwd | grep --quiet 'portfwd-run(1)'")?;
    machine
        .run("bash -ec '. /usr/share/bash-completion/completions/portfwd; complete -p portfwd'")?;

    let units = "/usr/lib/systemd/system/portfwd.service portfwd@web.service";
    assert_eq!(machine.run(&format!("systemd-analyze verify {units} 2>&1"))?, "");
    machine.run("systemd-analyze security --offline=yes --threshold=25 portfwd.service")?;
    Ok(())
}

#[test]
fn package_starts_survives_an_upgrade_and_goes() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    let mut machine = machine()?;
    live(&mut machine)
        .with_context(|| machine.run("journalctl --unit portfwd --no-pager").unwrap_or_default())
}

fn forwards(machine: &Machine) -> Result<()> {
    ensure!(machine.run(ASK)? == "hello\n", "another answer");
    ensure!(property(machine, "ActiveState")? == "active", "it forwards, but is not active");
    Ok(())
}

fn live(machine: &mut Machine) -> Result<()> {
    machine.run(NETWORK)?;
    machine.run("dpkg --install /tmp/portfwd.deb")?;
    // Enabled, and not started, as there is no rule: that is no failure.
    machine.run("systemctl is-enabled portfwd")?;
    assert_eq!(property(machine, "ActiveState")?, "inactive");
    assert_eq!(property(machine, "NRestarts")?, "0");
    machine.run("systemctl start portfwd")?;
    assert_eq!(property(machine, "ActiveState")?, "inactive");

    machine.write("/etc/portfwd/portfwd.toml", CONFIGURATION)?;
    machine.run("portfwd check && systemctl enable --now portfwd")?;
    // Without readiness told, started is not yet forwarding.
    forwards(machine)?;
    machine.run("portfwd list | grep --quiet web")?;
    machine.run("systemctl reload portfwd")?;
    forwards(machine)?;

    // The same version again: the daemon is another, and what the user wrote is kept.
    let before = property(machine, "MainPID")?;
    machine.run("dpkg --install /tmp/portfwd.deb")?;
    forwards(machine)?;
    assert_ne!(property(machine, "MainPID")?, before);
    assert_eq!(machine.run("cat /etc/portfwd/portfwd.toml")?, CONFIGURATION);
    machine.run("systemctl kill --signal KILL portfwd")?;
    assert_eq!(machine.run(ASK)?, "hello\n");
    machine.run("systemctl stop portfwd")?;
    assert_eq!(machine.run(ASK)?, "hello\n");
    machine.run("systemctl start portfwd")?;

    // At boot its interfaces may come after it: then it tries again.
    machine.reboot()?;
    machine.run(NETWORK)?;
    machine.run(ASK).or_else(|_| machine.run(ASK))?;
    forwards(machine)?;

    machine.run("dpkg --remove portfwd")?;
    assert!(machine.run("ip netns exec client socat -u TCP:198.51.100.1:8080 -").is_err());
    assert_eq!(
        machine
            .run("bpftool --version >/dev/null 2>&1; ip -d link show wan0 | grep prog/ || true")?,
        ""
    );
    assert_eq!(machine.run("cat /etc/portfwd/portfwd.toml")?, CONFIGURATION);
    machine.run("! [ -e /usr/bin/portfwd ] && ! pgrep -x portfwd")?;
    machine.run("dpkg --purge portfwd")?;
    let left = "ls -d /etc/portfwd /run/portfwd /sys/fs/bpf/portfwd /etc/systemd/system/multi-user.target.wants/portfwd.service";
    assert_eq!(machine.run(&format!("{left} 2>/dev/null || true"))?, "");
    Ok(())
}
