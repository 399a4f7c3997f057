//! Other kernels than this machine's: Debian's, each in a virtual machine without KVM, which is often not
//! there, or broken where machines are virtual themselves.
//!
//! The guest's root is this machine's, read-only by virtiofs; what it writes stays in its memory. So
//! the tests that were built here run there, with all the programs that they start.

use std::{
    env::consts::ARCH,
    ffi::OsStr,
    fmt, fs,
    io::{BufRead, BufReader},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    str::FromStr,
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{cargo, root};

/// A series of kernels: `6.1`, `6.12`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Series {
    major: u32,
    minor: u32,
}

impl FromStr for Series {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('.').map(|(major, minor)| (major.parse(), minor.parse()));
        match numbers {
            Some((Ok(major), Ok(minor))) => Ok(Self { major, minor }),
            _ => Err("not a series of kernels; 6.1 and 6.12 are some".into()),
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Downloads Debian's packages `$@` and unpacks them here, without installing anything.
const UNPACK: &str = r#"
set -e
apt-get download -qq -o APT::Sandbox::User=root "$@"
for package in *.deb; do dpkg -x "$package" .; rm "$package"; done
[ -e lib/modules ] || ln -s usr/lib lib
[ -e bin/busybox ] || ln -s usr/bin bin
./bin/busybox depmod -b . "$(ls lib/modules)"
"#;

/// The first program of the guest: mounts this machine's root and goes on there, with `/guest`.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
die() { echo "init: $1"; poweroff -f; }
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in virtio_pci virtiofs overlay; do modprobe $module 2>/dev/null; done
mount -t virtiofs -o ro host /host || die "no virtiofs"
mount -t tmpfs memory /memory
mkdir /memory/changes /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/changes,workdir=/memory/work root /root ||
    die "no overlay"
for mount in proc sys dev; do mkdir -p /root/$mount && mount --move /$mount /root/$mount; done
mount -t tmpfs run /root/run
cp /guest /bin/busybox /root/run/
exec switch_root /root /bin/sh /run/guest
"#;

/// What the guest does before its task: `MODULES` stands for where its kernel's are, and the second serial
/// port is the task's output. The kernel asks for modules itself.
const BEFORE: &str = r#"
stty -F /dev/ttyS1 raw
exec </dev/null >/dev/ttyS1 2>&1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
mkdir -p /lib/modules /dev/pts /dev/shm
mount --bind MODULES /lib/modules
# Kmod's wants other tables of the modules than busybox has made.
ln -sf /run/busybox /sbin/modprobe
ln -s /proc/self/fd /dev/fd
for stream in stdin:0 stdout:1 stderr:2; do ln -s fd/${stream#*:} /dev/${stream%:*}; done
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
modprobe virtio_net
"#;

/// And after it.
const AFTER: &str = r#"
echo "status: $?"
/run/busybox poweroff -f
"#;

/// Runs the machine; arguments: the kernel's directory, seconds, and the guest's two scripts. Whoever ends it,
/// and however, all that it started ends too.
///
/// Its network is two links in a namespace of its own, which ends with it: at each link two cards, by
/// their numbers client and router, router and server. The router's outer card has queues enough to give each
/// processor one of its own for XDP; the others have not.
const RUN: &str = r#"
kernel=$1 limit=$2
run=$(mktemp -d) || exit 1
trap 'kill $files $machine 2>/dev/null; wait; rm -rf "$run"' EXIT
trap 'exit 130' HUP INT TERM
version=$(ls "$kernel/lib/modules")
modules=lib/modules/$version
mkdir -p "$run/root/$modules" && cd "$run/root" || exit 1
mkdir bin dev host memory proc root sys
cp "$kernel/bin/busybox" bin/
for module in virtio_pci virtiofs overlay; do
    grep "/$module\.ko[.a-z]*:" "$kernel/$modules/modules.dep"
done | tr -d : | tr ' ' '\n' | sort -u | (cd "$kernel/$modules" && cpio -pdm --quiet "$run/root/$modules")
cp "$kernel/$modules/modules.dep" "$kernel/$modules/modules.builtin" "$modules/"
printf %s "$3" >init
printf %s "$4" >guest
chmod 755 init
find . | cpio -o -H newc --quiet >../initrd
cd ..
# Its lock is by the path of the socket.
/usr/lib/qemu/virtiofsd --socket-path="$run/files" -o source=/ -o cache=always -o sandbox=chroot \
    >files.log 2>&1 &
files=$!
tries=0
until [ -S files ]; do
    tries=$((tries + 1))
    if [ $tries = 50 ]; then cat files.log >&2; exit 1; fi
    sleep 0.1
done
card() { # number, tap, queues
    echo "-netdev tap,id=card$1,ifname=$2,queues=$3,script=no,downscript=no"
    echo "-device virtio-net-pci,netdev=card$1,mac=52:54:00:00:00:0$1,mq=on,vectors=$((2 * $3 + 2))"
}
unshare --net sh -c '
    for link in wan lan; do
        ip link add $link type bridge mcast_snooping 0
        for end in 0 1; do
            ip tuntap add $link$end mode tap multi_queue
            ip link set $link$end addrgenmode none master $link up
        done
        ip link set $link addrgenmode none up
    done
    exec "$@"
' sh timeout "$limit" qemu-system-x86_64 -nodefaults -no-reboot -display none -accel tcg,thread=multi -cpu max \
    -smp 2 -m 3G -object memory-backend-memfd,id=memory,size=3G,share=on \
    -machine q35,memory-backend=memory \
    -chardev socket,id=files,path=files -device vhost-user-fs-pci,chardev=files,tag=host \
    $(card 1 wan0 2) $(card 2 wan1 4) $(card 3 lan0 2) $(card 4 lan1 2) \
    -serial "file:$kernel/console" -serial stdio -kernel "$kernel/boot/vmlinuz-$version" -initrd initrd \
    -append "console=ttyS0 loglevel=5 panic=-1 mitigations=off net.ifnames=0" </dev/null &
machine=$!
wait $machine
"#;

/// The cards of the machine, for `PORTFWD_TEST_CARDS`: client, router outside and inside, server.
pub const CARDS: &str = "52:54:00:00:00:01 52:54:00:00:00:02 52:54:00:00:00:03 52:54:00:00:00:04";

/// Where the newest kernel of a series is, which was brought here if it was not there: `boot/vmlinuz-*`,
/// `lib/modules` and a static `bin/busybox`.
///
/// # Errors
///
/// Another architecture than x86-64; apt knows no such kernel, or cannot get it.
pub fn bring(series: Series) -> Result<PathBuf> {
    ensure!(ARCH == "x86_64", "other kernels can be tried on x86-64 alone, and this is {ARCH}");
    let kernels = Path::new(cargo::WORKSPACE).join("target/kernels");
    fs::create_dir_all(&kernels).with_context(|| kernels.display().to_string())?;
    let directory = kernels.canonicalize()?.join(format!("{series}-amd64"));
    if directory.exists() {
        return Ok(directory);
    }
    let pattern = format!(r"^linux-image-{}\.{}\.[0-9].*-amd64$", series.major, series.minor);
    let known = Command::new("apt-cache").args(["search", "--names-only", &pattern]).output();
    let known = String::from_utf8(known.context("cannot start apt-cache")?.stdout)?;
    let package = newest(&known).with_context(|| {
        format!("apt knows no kernel {series} (linux-image-{series}*-amd64): `apt-get update`, or another series")
    })?;
    eprintln!("kernel {series}: {package}");
    // Under another name until all is there.
    let new = kernels.join(format!("{series}.new"));
    let _ = fs::remove_dir_all(&new);
    fs::create_dir(&new).with_context(|| new.display().to_string())?;
    let mut unpack = Command::new("sh");
    unpack.args(["-c", UNPACK, "sh", package, "busybox-static"]).current_dir(&new);
    let status = unpack.stdin(Stdio::null()).status().context("cannot start sh")?;
    ensure!(status.success(), "cannot get {package} and busybox-static from apt: see above");
    fs::rename(&new, &directory).with_context(|| directory.display().to_string())?;
    Ok(directory)
}

/// The package of the newest kernel in what `apt-cache search` printed.
fn newest(known: &str) -> Option<&str> {
    let numbers = |name: &&str| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    // Not those for clouds, which have no PPP, nor for real time.
    let is_plain = |name: &&str| !name.contains("-cloud-") && !name.contains("-rt-");
    known.lines().filter_map(|line| line.split(' ').next()).filter(is_plain).max_by_key(numbers)
}

/// A machine that does a task. Dropped, it ends.
pub struct Machine {
    directory: PathBuf,
    limit: Duration,
    process: Child,
    lines: Receiver<String>,
}

impl Machine {
    /// Starts one with the kernel of a directory; needs root. The task is a shell script for the guest.
    pub fn start(directory: PathBuf, task: &str, limit: Duration) -> Result<Self> {
        let modules = quoted(directory.join("lib/modules").as_os_str());
        let guest = BEFORE.replace("MODULES", &modules) + task + AFTER;
        // Ends also with this process.
        let mut command = root::command("setpriv", &[]);
        command.args(["--pdeathsig", "TERM", "sh", "-c", RUN, "sh"]);
        command.arg(&directory).arg(limit.as_secs().to_string()).args([INIT, &guest]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().context("cannot start setpriv")?;
        let output = process.stdout.take().context("the machine has no output")?;
        // Read at once: another machine may be shown first.
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line);
                let _ = sender.send(line.trim_end_matches('\r').to_owned());
            }
        });
        Ok(Self { directory, limit, process, lines })
    }

    /// Gives its lines, until it has come to its end. Returns whether the task succeeded.
    ///
    /// # Errors
    ///
    /// It did not come to the end of its task.
    pub fn follow(mut self, mut line: impl FnMut(&str)) -> Result<bool> {
        let mut status = None;
        for text in &self.lines {
            match text.strip_prefix("status: ") {
                Some(number) => status = Some(number == "0"),
                None => line(&text),
            }
        }
        let ended = self.process.wait()?;
        status.with_context(|| {
            let what = match ended.code() {
                Some(124) => format!("took longer than {} s", self.limit.as_secs()),
                _ => "ended before its task did".to_owned(),
            };
            let console = self.directory.join("console");
            let text = fs::read(&console).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let last = lines[lines.len().saturating_sub(10)..].join("\n");
            format!("the machine {what}; the end of {}:\n{last}", console.display())
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        use rustix::process::{Pid, Signal, kill_process};
        // Its script ends what it started. One of sudo's is not ours to end: it sees its terminal end.
        if matches!(self.process.try_wait(), Ok(None))
            && kill_process(Pid::from_child(&self.process), Signal::TERM).is_ok()
        {
            let _ = self.process.wait();
        }
    }
}

/// A word of a shell script.
pub fn quoted(word: &OsStr) -> String {
    format!("'{}'", String::from_utf8_lossy(word.as_bytes()).replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_so_by_its_numbers() {
        let known = "linux-image-6.1.0-9-amd64 - Linux 6.1\n\
                     linux-image-6.1.0-56-amd64 - Linux 6.1\n\
                     linux-image-6.1.0-10-amd64 - Linux 6.1\n";
        assert_eq!(newest(known), Some("linux-image-6.1.0-56-amd64"));
        let known = "linux-image-6.12.100+deb12-amd64 - x\nlinux-image-6.12.9+deb12-amd64 - x\n";
        assert_eq!(newest(known), Some("linux-image-6.12.100+deb12-amd64"));
        let known = "linux-image-6.1.0-7-amd64 - x\nlinux-image-6.1.0-8-cloud-amd64 - x\n\
                     linux-image-6.1.0-9-rt-amd64 - x\n";
        assert_eq!(newest(known), Some("linux-image-6.1.0-7-amd64"));
        assert_eq!(newest(""), None);
    }

    #[test]
    fn a_series_is_two_numbers() {
        assert_eq!("6.12".parse(), Ok(Series { major: 6, minor: 12 }));
        for wrong in ["6", "6.x", "v6.1", "6.1.2", ""] {
            assert!(wrong.parse::<Series>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_shell_reads_a_quoted_word_as_it_is() {
        let word = "it's $HOME \"\\\n";
        let script = format!("printf %s {}", quoted(word.as_ref()));
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(output.stdout, word.as_bytes());
    }
}
