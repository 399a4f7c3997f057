//! What the daemon is to the system: a service.

use std::os::unix::net::UnixDatagram;
use std::process::Command;

use super::*;

/// systemd, as far as a service sees it.
struct Manager {
    socket: UnixDatagram,
    directory: TempDir,
    told: Vec<String>,
}

impl Manager {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, directory, told: Vec::new() }
    }

    fn manage<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("NOTIFY_SOCKET", self.directory.path().join("notify"))
    }

    /// Waits until `count` lines came that start so. Returns all that came.
    fn hears(&mut self, start: &str, count: usize) -> Vec<String> {
        until(&format!("{start:?} comes"), 30, || {
            let mut message = [0; 4096];
            while let Ok(length) = self.socket.recv(&mut message) {
                let message = std::str::from_utf8(&message[..length]).unwrap();
                self.told.extend(message.lines().map(str::to_owned));
            }
            self.told.iter().filter(|it| it.starts_with(start)).count() >= count
        });
        self.told.clone()
    }
}

fn daemon(rig: &Rig, directory: &TempDir) -> Command {
    let mut command = rig.router.command(binary());
    command.arg("run").arg("--socket").arg(directory.path().join("portfwd.sock"));
    let log = fs::File::create(directory.path().join("log")).unwrap();
    command.args(as_tested(directory)).args(["-i", "wan0"]).args(RULES).stderr(log);
    command
}

#[test]
fn systemd_is_told() {
    if !is_root() {
        return;
    }
    let (rig, directory, mut manager) =
        (Rig::new().unwrap(), TempDir::new().unwrap(), Manager::new());
    let mut command = daemon(&rig, &directory);
    manager.manage(&mut command).env("WATCHDOG_USEC", "400000");
    let mut process = Background::start(&mut command).unwrap();
    assert_eq!(manager.hears("READY=1", 1)[0], "READY=1");
    assert_eq!(attached(&rig.router), ["wan0", "lan0"]);
    manager.hears("STATUS=forwarding 2 rules, 2 interfaces", 1);
    manager.hears("WATCHDOG=1", 3);
    rig.router.ip("link delete lan0").unwrap();
    manager.hears("STATUS=forwarding 2 rules, 1 interface; ", 1);
    process.signal(libc::SIGTERM).unwrap();
    let all = manager.hears("STOPPING=1", 1);
    assert!(process.wait(Duration::from_secs(10)).unwrap().success());
    assert_eq!(all.iter().filter(|it| *it == "READY=1").count(), 1, "{all:?}");
    assert_eq!(all.last().unwrap(), "STOPPING=1");

    // Who watches another process hears no beats.
    let mut manager = Manager::new();
    let mut command = daemon(&rig, &directory);
    manager.manage(&mut command).env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1");
    restore_lan0(&rig);
    let mut process = Background::start(&mut command).unwrap();
    manager.hears("STATUS=forwarding 2 rules, 2 interfaces", 1);
    std::thread::sleep(Duration::from_millis(100));
    process.signal(libc::SIGTERM).unwrap();
    let all = manager.hears("STOPPING=1", 1);
    assert_eq!(all, ["READY=1", "STATUS=forwarding 2 rules, 2 interfaces", "STOPPING=1"]);
}

/// CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF.
const KEPT: u64 = 1 << 12 | 1 << 38 | 1 << 39;

/// Each thread's name and lines of its status that are about privileges.
fn privileges(process: u32) -> Vec<(String, String)> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let of = |thread: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let name = status.lines().next().unwrap().to_owned();
        let about = |line: &&str| line.starts_with("Cap") || line.starts_with("NoNewPrivs");
        let lines: Vec<String> =
            status.lines().filter(about).map(|line| line.replace('\t', " ")).collect();
        (name, lines.join("\n"))
    };
    threads.map(of).collect()
}

#[test]
fn only_the_privileges_that_it_needs_are_kept() {
    if !is_root() {
        return;
    }
    let wanted = format!(
        "CapInh: {0:016x}\nCapPrm: {KEPT:016x}\nCapEff: {KEPT:016x}\nCapBnd: {KEPT:016x}\n\
         CapAmb: {0:016x}\nNoNewPrivs: 1",
        0
    );
    let config = "[interfaces]\nexternal = ['wan0']\ninternal = ['lan0']\nattach = 'native'\n\
                  [interfaces.lan0]\nattach = 'tc'\n";
    // It may have been started with no more.
    for restricted in [false, true] {
        let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
        let _backend = Backend::new(&rig.server, rig::SERVER);
        let file = directory.path().join("portfwd.toml");
        fs::write(&file, config).unwrap();
        let wrapper = directory.path().join("portfwd");
        let prefix = match restricted {
            true => "setpriv --bounding-set=-all,+cap_12,+cap_38,+cap_39 --inh-caps=-all",
            false => "",
        };
        let script = format!("#!/bin/sh\nexec {prefix} {} \"$@\"\n", binary().display());
        fs::write(&wrapper, script).unwrap();
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        let arguments = [&["-v", "--config", file.to_str().unwrap()][..], &RULES].concat();
        let portfwd = Portfwd::start(&rig.router, &wrapper, &arguments, directory.path()).unwrap();
        let said = "DEBUG privileges that are kept: CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF";
        told(&portfwd, said);
        both_reached(&rig.client);

        // One that writes an answer among them.
        portfwd.stats().unwrap();
        told(&portfwd, "lo: clients on this box, TC");
        let threads = privileges(portfwd.id());
        for name in ["portfwd", "routes", "flows", "tokio"] {
            let has = |(it, _): &(String, String)| it.starts_with(&format!("Name:\t{name}"));
            assert!(threads.iter().any(has), "{name} is not in {threads:?}");
        }
        for (name, privileges) in threads {
            assert_eq!(privileges, wanted, "{name}");
        }

        // Interfaces that come, settings, and all that was taken off is made anew.
        rig.router.ip("link delete lan0").unwrap();
        told(&portfwd, "lan0: there is no such interface now; waiting for it");
        restore_lan0(&rig);
        rig.router.ip("link delete wan0").unwrap();
        told(&portfwd, "wan0: there is no such interface now; waiting for it");
        restore_wan0(&rig);
        both_reached(&rig.client);
        let list = portfwd.json("list").unwrap();
        let attached = |place| list["interfaces"][place]["attach"].clone();
        assert_eq!((attached(0), attached(1)), ("native".into(), "tc".into()), "{list}");
        let (status, said) = portfwd.stop().unwrap();
        assert!(status.success() && !said.contains("cannot"), "{said}");
        assert_eq!(said.matches("privileges").count(), 1, "{said}");
    }
}
