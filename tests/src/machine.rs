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

/// Makes the root in `$1` and starts systemd there, in the cgroup of this process. Nothing is started that
/// nobody asked for, and of the kernel's settings only those of the network can be written: the others are this
/// machine's.
const START: &str = r#"
mount -t tmpfs memory "$1"
cd "$1"
mkdir changes work root
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
: >etc/fstab
rm -rf etc/systemd/system/*.wants usr/sbin/policy-rc.d
find usr/lib/systemd/system -path '*.wants/*' ! -name 'systemd-journald*' -delete
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
    /// Where its root is mounted, in its own namespace only.
    _directory: TempDir,
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
        command.arg(cgroup.join("cgroup.procs")).arg("unshare").args([
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            "--cgroup",
            "--fork",
            "--kill-child",
        ]);
        command.args(["sh", "-ec", START, "sh"]).arg(directory.path());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: a bare system call.
        unsafe {
            command.pre_exec(|| {
                crate::sys::check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)).map(drop)
            });
        }
        let holder = command.spawn().context("cannot start unshare")?;
        let mut machine = Self { holder, init: 0, cgroup, _directory: directory };
        let deadline = Instant::now() + PATIENCE;
        while !machine.is_up() {
            ensure!(machine.holder.try_wait()?.is_none(), "the machine ended at its start");
            ensure!(Instant::now() < deadline, "the machine did not start in {PATIENCE:?}");
            sleep(Duration::from_millis(50));
        }
        Ok(machine)
    }

    fn is_up(&mut self) -> bool {
        let holder = self.holder.id();
        let children = fs::read_to_string(format!("/proc/{holder}/task/{holder}/children"));
        let init = children.ok().and_then(|children| children.trim().parse().ok());
        self.init = init.unwrap_or(0);
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
