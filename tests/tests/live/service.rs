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
