//! A machine of its own: this one's files under an overlay in memory, in namespaces of its own, with systemd as
//! its first process. What is installed or changed there is gone when it ends.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::netns::run;

/// Keeps its files in `$1`, and starts it by `$2`, once or again.
const HOLD: &str = r#"
mount -t tmpfs memory "$1"
cd "$1"
mkdir changes work root
: >again
while [ -e again ]; do
    rm again
    setpriv --pdeathsig KILL unshare --mount --pid --net --ipc --uts --cgroup --fork --kill-child \
        sh -ec "$2" || true
done
"#;

/// Makes the root and starts systemd there, in the cgroup of this process. Nothing is started that
/// nobody asked for, and of the kernel's settings only those of the network can be written: the others are this
/// machine's.
const START: &str = r#"
mount -t overlay -o lowerdir=/,upperdir=changes,workdir=work root root
cd root
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,ro proc/sys
mount -t sysfs sys sys
mount -t bpf bpf sys/fs/bpf
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs run run
mount -t tmpfs tmp tmp
mount -t tmpfs -o mode=755 dev dev
mkdir dev/shm dev/pts
for node in null zero full random urandom tty; do
    touch dev/$node
    mount --bind /dev/$node dev/$node
done
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
if ! [ -e var/lib/was-up ]; then
    : >var/lib/was-up
    : >etc/fstab
    rm -rf etc/systemd/system/*.wants usr/sbin/policy-rc.d
    find usr/lib/systemd/system -path '*.wants/*' ! -name 'systemd-journald*' -delete
fi
ip link set lo up
mkdir host
pivot_root . host
umount --lazy host
rmdir host
exec env -i container=portfwd-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    chroot . /lib/systemd/systemd --unit=multi-user.target --show-status=no
"#;

/// How long it may take to start.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running machine. Dropped, it ends with all that runs there.
#[derive(Debug)]
pub struct Machine {
    holder: Child,
    /// Its first process, by the number that it has here.
    init: i32,
    cgroup: PathBuf,
    /// Where its files are, in its own namespace only.
    directory: TempDir,
}

impl Machine {
    /// Starts a machine and waits until its services can be told what to do.
    pub fn start() -> Result<Self> {
        let directory = TempDir::new()?;
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroup = cgroups()?.join(format!("portfwd-test-{}-{number}", std::process::id()));
        fs::create_dir(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
        let mut command = Command::new("sh");
        // In the cgroup first: the namespace's root is where its maker is.
        command.args(["-ec", r#"echo 0 >"$1"; shift; exec "$@""#, "sh"]);
        command.arg(cgroup.join("cgroup.procs")).args(["unshare", "--mount"]);
        command.args(["sh", "-ec", HOLD, "sh"]).arg(directory.path()).arg(START);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: a bare system call.
        unsafe {
            command.pre_exec(|| {
                crate::sys::check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)).map(drop)
            });
        }
        let holder = command.spawn().context("cannot start unshare")?;
        let mut machine = Self { holder, init: 0, cgroup, directory };
        machine.wait_until_up()?;
        Ok(machine)
    }

    /// Turns it off and on again: of what was there, its files outlive that.
    pub fn reboot(&mut self) -> Result<()> {
        let root = Path::new("/proc").join(self.holder.id().to_string()).join("root");
        let again = self.directory.path().strip_prefix("/")?.join("again");
        fs::write(root.join(again), "").context("cannot start it again")?;
        // SAFETY: a bare system call. All that runs there ends with its first process.
        unsafe { libc::kill(self.init, libc::SIGKILL) };
        let old = Path::new("/proc").join(self.init.to_string());
        while old.exists() {
            sleep(Duration::from_millis(10));
        }
        self.wait_until_up()
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_up() {
            ensure!(self.holder.try_wait()?.is_none(), "the machine ended at its start");
            ensure!(Instant::now() < deadline, "the machine did not start in {PATIENCE:?}");
            sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn is_up(&mut self) -> bool {
        let child = |of: u32| -> Option<u32> {
            let children = fs::read_to_string(format!("/proc/{of}/task/{of}/children"));
            children.ok()?.trim().parse().ok()
        };
        let init = child(self.holder.id()).and_then(child);
        self.init = init.map_or(0, |init| init as i32);
        let name = fs::read_to_string(format!("/proc/{}/comm", self.init)).unwrap_or_default();
        name.trim() == "systemd" && self.run("systemctl is-system-running").is_ok()
    }

    /// A shell command that will run there.
    pub fn command(&self, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string()]);
        command.args(["--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--root", "--wd"]);
        command.args(["sh", "-c", script]).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        command.stdin(Stdio::null());
        command
    }

    /// Runs a shell command there to its end and returns what it printed; an error has what it complained of.
    pub fn run(&self, script: &str) -> Result<String> {
        run(&mut self.command(script))
    }

    /// Puts a file there.
    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) -> Result<()> {
        let path = Path::new(path).strip_prefix("/")?;
        let path = Path::new("/proc").join(self.init.to_string()).join("root").join(path);
        fs::create_dir_all(path.parent().context("a directory")?)?;
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.init != 0 {
            // SAFETY: a bare system call. All that runs there ends with its first process.
            unsafe { libc::kill(self.init, libc::SIGKILL) };
        }
        self.holder.kill().ok();
        self.holder.wait().ok();
        // Its processes take a moment to be gone.
        let deadline = Instant::now() + Duration::from_secs(5);
        while remove_cgroup(&self.cgroup).is_err() && Instant::now() < deadline {
            sleep(Duration::from_millis(50));
        }
    }
}

/// Where the cgroups of version 2 are.
fn cgroups() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = mounts.find(|fields| fields.get(2) == Some(&"cgroup2"));
    Ok(mount.context("no cgroup2 is mounted")?[1].into())
}

fn remove_cgroup(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
