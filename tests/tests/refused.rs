//! Bad input, to the real program: one clear line for each mistake, the right exit status, and
//! nothing attached or left behind.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use portfwd::instance::Instance;
use portfwd_tests::peers::Background;
use portfwd_tests::{Namespace, Portfwd, Rig, TempDir, binary, is_root};

/// How long any command may take that should not run on.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a command that has ended printed, and its status.
#[derive(Debug)]
struct Ended {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs a command to its end, which must come by itself.
fn end_of(command: &mut Command, directory: &Path) -> Ended {
    let [stdout, stderr] = ["stdout", "stderr"].map(|name| directory.join(name));
    command.stdout(File::create(&stdout).unwrap()).stderr(File::create(&stderr).unwrap());
    let mut process = Background::start(command).unwrap();
    let status = process.wait(PATIENCE);
    let [stdout, stderr] = [stdout, stderr].map(|path| fs::read_to_string(path).unwrap());
    let status = status.unwrap_or_else(|error| panic!("{command:?}: {error}: {stderr}"));
    Ended { status: status.code(), stdout, stderr }
}

/// A router with interfaces to attach to, and what of it must not change.
struct Place {
    rig: Rig,
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { rig: Rig::new().unwrap(), directory: TempDir::new().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("portfwd.sock")
    }

    /// `portfwd ARGUMENTS --socket SOCKET` on the router; DIR in an argument is the directory.
    fn command(&self, arguments: &str) -> Command {
        let mut command = self.rig.router.command(binary());
        let directory = self.directory.path().display().to_string();
        for argument in arguments.split_whitespace() {
            command.arg(argument.replace("DIR", &directory));
        }
        if !arguments.contains("--socket") {
            command.arg("--socket").arg(self.socket());
        }
        command.current_dir(self.directory.path());
        command
    }

    /// Asserts that the command is refused: exactly these lines (`*` is anything), this status,
    /// and nothing is left of it.
    fn refused(&self, what: &str, command: &mut Command, lines: &[&str], status: i32) {
        let before = self.traces();
        let ended = end_of(command, self.directory.path());
        let directory = self.directory.path().display().to_string();
        let stderr = ended.stderr.replace(&directory, "DIR");
        // What it did before it failed is told, too.
        let said: Vec<&str> = stderr.lines().filter(|line| !line.starts_with(" INFO ")).collect();
        assert_eq!(said.len(), lines.len(), "{what}: {stderr}");
        for (said, line) in said.iter().zip(lines) {
            assert!(matches(said, &format!("portfwd: {line}")), "{what}: {said}\nnot {line}");
            assert!(!said.contains("panicked") && !said.contains("RUST_BACKTRACE"), "{what}");
        }
        assert_eq!((ended.status, ended.stdout.as_str()), (Some(status), ""), "{what}: {stderr}");
        assert_eq!(self.traces(), before, "{what} left something behind");
    }

    /// What a portfwd changes: programs on interfaces, settings, files.
    fn traces(&self) -> (String, Vec<String>, Vec<String>) {
        const SETTINGS: [&str; 7] = [
            "ipv4/ip_forward",
            "ipv4/ip_local_reserved_ports",
            "ipv4/conf/lan0/accept_local",
            "ipv4/conf/lan0/rp_filter",
            "ipv4/conf/wan0/forwarding",
            "ipv6/conf/all/forwarding",
            "ipv6/conf/wan0/accept_ra",
        ];
        let settings = self.rig.router.enter(|| {
            let read = |key: &&str| fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap();
            SETTINGS.iter().map(read).collect()
        });
        let mut files: Vec<String> = fs::read_dir(self.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !["stdout", "stderr"].contains(&name.as_str()))
            .collect();
        files.sort();
        (programs(&self.rig.router), settings, files)
    }
}

/// The interfaces with an XDP program, and its number.
fn programs(namespace: &Namespace) -> String {
    let links: serde_json::Value =
        serde_json::from_str(&namespace.ip("-j -d link show").unwrap()).unwrap();
    let with_program = links.as_array().unwrap().iter().filter(|link| !link["xdp"].is_null());
    with_program.map(|link| format!("{} {}\n", link["ifname"], link["xdp"])).collect()
}

/// Whether the text is the pattern, in which `*` is anything.
fn matches(text: &str, pattern: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return text == pattern };
    let Some(text) = text.strip_prefix(start) else { return false };
    let ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    ends.into_iter().any(|at| matches(&text[at..], rest))
}

#[test]
fn configurations() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let router = &place.rig.router;
    for command in [
        "tuntap add tun0 mode tun",
        "tuntap add tun1 mode tun",
        "link set tun1 up",
        "address add 10.7.7.1/24 dev tun1",
    ] {
        router.ip(command).unwrap();
    }
    const WAN0: &str = "[interfaces]\nexternal = ['wan0']\n";
    // What is wrong; the file; what is said of it. Status 2.
    let files: &[(&str, &str, &[&str])] = &[
        (
            "an unknown key",
            "[[rule]]\nlisten = 80\nto = '192.168.77.10'\nprotcol = 'udp'\n",
            &[
                "DIR/portfwd.toml:6: protcol: no such key; did you mean protocol? [[rule]] has name, protocol, listen, to, source, mss, enabled",
            ],
        ),
        (
            "a name twice",
            "[[rule]]\nname = 'a'\nlisten = 80\nto = '192.168.77.10'\n[[rule]]\nname = 'a'\nlisten = 81\nto = '192.168.77.10'\n",
            &[
                "DIR/portfwd.toml:7: rule \"a\": name: the rule at DIR/portfwd.toml:3 has this name already; give each its own",
            ],
        ),
        (
            "rules that overlap",
            "[[rule]]\nname = 'a'\nlisten = '80-90'\nto = '192.168.77.10'\n[[rule]]\nname = 'b'\nlisten = '85-99'\nto = '192.168.77.10'\n",
            &[
                "DIR/portfwd.toml:7: *rule \"a\" (DIR/portfwd.toml:3) and rule \"b\" (DIR/portfwd.toml:7) both listen on tcp 85-90; change one of them, or remove it",
            ],
        ),
        (
            "port 0",
            "[[rule]]\nlisten = 0\nto = '192.168.77.10'\n",
            &["DIR/portfwd.toml:4: listen: there is no port 0; write a number from 1 to 65535"],
        ),
        (
            "port 65536, twice",
            "[[rule]]\nlisten = 65536\nto = '192.168.77.10:65536'\n",
            &[
                "DIR/portfwd.toml:4: listen: port 65536 is too high; write a number from 1 to 65535",
                "DIR/portfwd.toml:5: to: port 65536 is too high; write a number from 1 to 65535",
            ],
        ),
        (
            "a reversed range",
            "[[rule]]\nlisten = '90-80'\nto = '192.168.77.10'\n",
            &["DIR/portfwd.toml:4: listen: the range 90-80 is reversed; write 80-90"],
        ),
        (
            "ranges of unequal length",
            "[[rule]]\nname = 'a'\nlisten = '80-89'\nto = '192.168.77.10:80-99'\n",
            &[
                "DIR/portfwd.toml:6: rule \"a\": to: 10 ports cannot become 20; write 192.168.77.10:80-89, or leave the port out to keep it",
            ],
        ),
        (
            "IPv4 to IPv6",
            "[[rule]]\nname = 'a'\nlisten = '198.51.100.1:80'\nto = 'fd77::10'\n",
            &[
                "DIR/portfwd.toml:6: rule \"a\": to: fd77::10 is IPv6 and the rule listens on IPv4: the backend cannot see such clients; set source = \"masquerade\", or name an IPv4 backend",
            ],
        ),
        (
            "backends that do not fit",
            "[[rule]]\nname = 'a'\nlisten = '80-89'\nto = [\n'192.168.77.10',\n'192.168.77.10:80-89',\n'192.168.77.11:80-81']\n",
            &[
                "DIR/portfwd.toml:8: rule \"a\": to: 192.168.77.10:80-89 is named twice; name it once",
                "DIR/portfwd.toml:9: rule \"a\": to: 10 ports cannot become 2; write 192.168.77.11:80-89, or leave the port out to keep it",
            ],
        ),
        (
            "a port by which others masquerade",
            "[[rule]]\nname = 'a'\nlisten = 80\nto = '192.168.77.10'\nsource = 'masquerade'\n[[rule]]\nname = 'b'\nlisten = 50000\nto = '192.168.77.10'\n",
            &[
                "DIR/portfwd.toml:8: rule \"b\": listen: 50000 is among the ports 40000-60999, by which rule \"a\" (DIR/portfwd.toml:3) masquerades; listen on others, or set [masquerade] ports",
            ],
        ),
        (
            "flows that cannot be",
            "[flows]\nsize = 0\nudp = '1m'\ntcp = 'long'\n[masquerade]\nports = '1-65535'\n",
            &[
                "DIR/portfwd.toml:4: flows.size: there cannot be 0 flows; write a number from 1024 to 16777216",
                "DIR/portfwd.toml:5: flows.udp: this is too short; write seconds from 120 to 604800, as in 300 or \"5m\"",
                "DIR/portfwd.toml:6: flows.tcp: this is not a time; write seconds from 1 to 604800, as in 7440 or \"2h 4m\"",
                "DIR/portfwd.toml:8: masquerade.ports: 1-65535 has ports below 1024, which are for services; write a range above them, as in 40000-60999",
            ],
        ),
        (
            "ways to attach that there are not",
            "attach = 'xdp'\n[interfaces.wan0]\nattach = 'best'\nmtu = 9000\n[[rule]]\nlisten = 80\nto = '192.168.77.10'\n",
            &[
                "DIR/portfwd.toml:3: interfaces.attach: \"xdp\" is no way to attach; write auto, native, generic or tc",
                "DIR/portfwd.toml:5: interfaces.wan0.attach: \"best\" is no way to attach; write auto, native, generic or tc",
                "DIR/portfwd.toml:6: interfaces.wan0.mtu: no such key; the table of an interface has attach",
            ],
        ),
        (
            "an interface that is not named, with a way of its own",
            "internal = 'lan0'\n[interfaces.lan1]\nattach = 'tc'\n[[rule]]\nlisten = 80\nto = '192.168.77.10'\n",
            &[
                "DIR/portfwd.toml:4: interfaces.lan1: it is neither external nor internal; did you mean lan0? name it in one of the two, or leave this table out",
            ],
        ),
        (
            "TOML that is none",
            "[[rule]\nlisten = 80\n",
            &[
                "DIR/portfwd.toml:3: this is not TOML: unclosed array table, expected `]`; correct it here",
            ],
        ),
        (
            "a name that does not resolve",
            "[[rule]]\nname = 'a'\nlisten = 80\nto = 'no-such-host.invalid'\n",
            &[
                "DIR/portfwd.toml:3: rule \"a\": cannot resolve \"no-such-host.invalid\": *; check the name, or write an address",
            ],
        ),
        (
            "two names that do not resolve",
            "[[rule]]\nname = 'a'\nlisten = 80\nto = 'one.invalid'\n[[rule]]\nname = 'b'\nlisten = 81\nto = 'two.invalid'\n",
            &[
                "DIR/portfwd.toml:3: rule \"a\": cannot resolve \"one.invalid\": *",
                "DIR/portfwd.toml:7: rule \"b\": cannot resolve \"two.invalid\": *",
            ],
        ),
    ];
    let file = place.path("portfwd.toml");
    for (what, text, lines) in files {
        fs::write(&file, format!("{WAN0}{text}")).unwrap();
        for command in ["run --config DIR/portfwd.toml", "check DIR/portfwd.toml"] {
            place.refused(what, &mut place.command(command), lines, 2);
        }
    }

    // What only `run` can know, since it depends on the box.
    let run = "run --config DIR/portfwd.toml";
    let box_: &[(&str, &str, &[&str], i32)] = &[
        (
            "no rules",
            WAN0,
            &["there is no rule; add a [[rule]] to the configuration, or -p SPEC"],
            2,
        ),
        (
            "no external interface",
            "[[rule]]\nlisten = 80\nto = '192.168.77.10'\n",
            &[
                "no external interface is named: where do clients arrive? Add -i IFACE, or [interfaces] external to the configuration",
            ],
            2,
        ),
        (
            "interfaces that do not exist",
            "[interfaces]\nexternal = ['wan0', 'wan7']\ninternal = ['lan7']\n[[rule]]\nlisten = 80\nto = '192.168.77.10'\n",
            &[
                "DIR/portfwd.toml:2: there is no interface wan7; this box has *lan0*",
                "DIR/portfwd.toml:3: there is no interface lan7; this box has *wan0*",
            ],
            2,
        ),
        (
            "a table of an interface that does not exist",
            "[interfaces]\nexternal = ['wan0']\n[interfaces.lan7]\nattach = 'tc'\n[[rule]]\nlisten = 80\nto = '192.168.77.10'\n",
            &["DIR/portfwd.toml:3: there is no interface lan7; this box has *lan0*"],
            2,
        ),
        (
            "no Ethernet, outside and by the routes",
            "[interfaces]\nattach = 'generic'\nexternal = ['tun0', 'wan0']\n[interfaces.tun1]\nattach = 'native'\n[[rule]]\nlisten = 80\nto = '10.7.7.7'\n",
            &[
                "DIR/portfwd.toml:2: tun0 has no Ethernet header (tun), which XDP needs; set attach = \"tc\" in [interfaces.tun0]",
                "DIR/portfwd.toml:5: tun1 has no Ethernet header (tun), which XDP needs; set attach = \"tc\" in [interfaces.tun1]",
            ],
            2,
        ),
        (
            "backends without a route",
            "[interfaces]\nexternal = ['wan0']\n[[rule]]\nname = 'a'\nlisten = 80\nto = '10.9.9.9'\n[[rule]]\nname = 'b'\nlisten = 81\nto = '2001:db8:9::9'\n",
            &[
                "DIR/portfwd.toml:3: rule \"a\": backend 10.9.9.9 has no route; add one: ip route add 10.9.9.9/32 via GATEWAY, or dev IFACE",
                "DIR/portfwd.toml:7: rule \"b\": backend 2001:db8:9::9 has no route; add one: ip route add 2001:db8:9::9/128 via GATEWAY, or dev IFACE",
            ],
            1,
        ),
        (
            "a backend beyond an interface that is not internal",
            "[interfaces]\nexternal = ['wan0']\ninternal = ['wan0']\n[[rule]]\nlisten = 80\nto = '192.168.77.10'\n",
            &[
                "*: rule \"*\": backend 192.168.77.10 is reached by lan0, which is not internal; add it to [interfaces] internal, or correct the route",
            ],
            1,
        ),
    ];
    for (what, text, lines, status) in box_ {
        fs::write(&file, text).unwrap();
        place.refused(what, &mut place.command(run), lines, *status);
    }

    fs::write(&file, b"\x7fELF\xff\xfe\0\x01").unwrap();
    let lines = &["DIR/portfwd.toml:1: this is not UTF-8 text; save the file as UTF-8"];
    place.refused("a binary file", &mut place.command(run), lines, 2);
    place.refused("a binary file", &mut place.command("check DIR/portfwd.toml"), lines, 2);
    let remedy = "name another with --config FILE, or do without: portfwd run -i IFACE -p SPEC";
    let missing = format!("DIR/missing.toml: there is no such file; write it, {remedy}");
    place.refused("no file", &mut place.command("run -c DIR/missing.toml"), &[&missing], 2);
    place.refused("no file", &mut place.command("check DIR/missing.toml"), &[&missing], 2);
    let directory = format!("DIR: cannot be read (*); {remedy}");
    place.refused("a directory", &mut place.command("run -c DIR"), &[&directory], 2);
}

#[test]
fn flags() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.rig.router.ip("tuntap add tun0 mode tun").unwrap();
    fs::write(place.path("native.toml"), "[interfaces]\nattach = 'native'\n").unwrap();
    for (arguments, lines, status) in [
        (
            "run -i nosuch -p 80:192.168.77.10",
            &["-i nosuch: there is no interface nosuch; this box has *"][..],
            2,
        ),
        ("run -i wan0 -p 0:192.168.77.10", &["-p 0:192.168.77.10: *there is no port 0; *"], 2),
        (
            "run -i wan0 -p 80 -p 81:10.0.0.300",
            &["-p 80: *has no backend; *", "-p 81:10.0.0.300: *is not an IP address; *"],
            2,
        ),
        (
            "run -i wan0 -p 80:10.9.9.9",
            &["-p 80:10.9.9.9: rule \"80/tcp\": backend 10.9.9.9 has no route; *"],
            1,
        ),
        (
            "run -i lo -p 80:192.168.77.10",
            &[
                "-i lo: lo is the loopback interface: programs on this box reach the rules without it; name one where others arrive",
            ],
            2,
        ),
        (
            "run -c DIR/native.toml -i tun0 -p 80:192.168.77.10",
            &[
                "DIR/native.toml:2: tun0 has no Ethernet header (tun), which XDP needs; set attach = \"tc\" in [interfaces.tun0]",
            ],
            2,
        ),
        (
            "run -i wan0 -p 198.51.100.1:80:[fd77::10]",
            &[
                "-p 198.51.100.1:80:[fd77::10]: fd77::10 is IPv6 and *; write the rule into a configuration file, which can say source = \"masquerade\", or name an IPv4 backend",
            ],
            2,
        ),
        ("run -p 80:192.168.77.10", &["no external interface is named: *Add -i IFACE, or *"], 2),
        ("list", &["DIR/portfwd.sock: no portfwd is running there; *`portfwd run`*--socket"], 1),
        ("stats", &["DIR/portfwd.sock: no portfwd is running there; *`portfwd run`*--socket"], 1),
        ("stats --json", &["DIR/portfwd.sock: no portfwd is running there; *"], 1),
        ("flows", &["DIR/portfwd.sock: no portfwd is running there; *`portfwd run`*--socket"], 1),
        ("flows --json", &["DIR/portfwd.sock: no portfwd is running there; *"], 1),
        (
            "flows --client 10.0.0.300",
            &[
                "--client 10.0.0.300: \"10.0.0.300\" is neither an address nor a network; write one, *",
            ],
            2,
        ),
    ] {
        place.refused(arguments, &mut place.command(arguments), lines, status);
    }
    // What clap refuses has its own form.
    for arguments in ["run --no-such-flag", "no-such-command", "check a b", ""] {
        let ended = end_of(&mut place.command(arguments), place.directory.path());
        assert_eq!((ended.status, ended.stdout.as_str()), (Some(2), ""), "{arguments}");
        assert!(ended.stderr.contains("Usage: portfwd"), "{arguments}: {}", ended.stderr);
    }
}

/// What a user without rights, or a kernel without BPF, gets.
#[test]
fn rights() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    // Where others may read, and run what may be below a directory that they cannot enter.
    fs::set_permissions(place.directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let everyones = place.path("portfwd");
    fs::hard_link(binary(), &everyones)
        .or_else(|_| fs::copy(binary(), &everyones).map(drop))
        .unwrap();
    let arguments = ["run", "-i", "wan0", "-p", "80:192.168.77.10", "--socket"];
    let as_nobody = || {
        let mut command = place.rig.router.command("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&everyones);
        command
    };
    place.refused(
        "not root",
        as_nobody().args(arguments).arg(place.socket()),
        &["/run/portfwd*: cannot * it; run as root: *"],
        1,
    );
    let mut uncapable = place.rig.router.command("setpriv");
    uncapable.args(["--bounding-set", "-all", "--inh-caps", "-all", "--"]);
    place.refused(
        "root without capabilities",
        uncapable.arg(binary()).args(arguments).arg(place.socket()),
        &["the kernel refuses BPF (*): run as root, or with CAP_BPF, *"],
        1,
    );
    let run = "run -i wan0 -p 80:192.168.77.10";
    for (error, line) in [
        (
            libc::ENOSYS,
            "this kernel has no BPF (*): portfwd needs CONFIG_BPF_SYSCALL and CONFIG_BPF_JIT",
        ),
        (libc::EPERM, "the kernel refuses BPF (*): run as root, or with CAP_BPF, *"),
    ] {
        let mut command = place.command(run);
        // SAFETY: bare system calls, which is all that may happen between fork and exec.
        unsafe { command.pre_exec(move || without_bpf(error)) };
        place.refused("no BPF", &mut command, &[line], 1);
    }
}

/// From now on bpf(2) fails with an error in this process.
fn without_bpf(error: i32) -> std::io::Result<()> {
    let step = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let filter = [
        // The number of the system call: the first field of `struct seccomp_data`.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_bpf as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | error as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the filter outlives the call, and the kernel only reads it.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER as libc::c_ulong,
                &raw const program,
            ) != 0
    };
    if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Whatever else the box has running or lying about.
#[test]
fn what_is_in_the_way() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let router = &place.rig.router;
    let run = "run -i wan0 -p 80:192.168.77.10 -p 40000:192.168.77.10";

    let taken = router.enter(|| TcpListener::bind("127.0.0.1:9464").unwrap());
    let metrics = "[interfaces]\nexternal = ['wan0']\n[metrics]\nlisten = '127.0.0.1:9464'\n[[rule]]\nlisten = 40000\nto = '192.168.77.10'\n";
    fs::write(place.path("metrics.toml"), metrics).unwrap();
    place.refused(
        "the address for metrics",
        &mut place.command("run -c DIR/metrics.toml"),
        &["[metrics] listen: cannot listen on 127.0.0.1:9464; choose another: Address already in use*"],
        1,
    );
    drop(taken);

    fs::write(place.path("file"), "precious").unwrap();
    place.refused(
        "a socket that is a file",
        &mut place.command(&format!("{run} --socket DIR/file")),
        &["DIR/file: not a socket; remove it, or name another with --socket"],
        1,
    );
    assert_eq!(fs::read(place.path("file")).unwrap(), b"precious");
    place.refused(
        "a socket that is a directory",
        &mut place.command(&format!("{run} --socket DIR")),
        &["DIR: not a socket; remove it, or name another with --socket"],
        1,
    );
    place.refused(
        "a socket below a file",
        &mut place.command(&format!("{run} --socket DIR/file/portfwd.sock")),
        &["DIR/file: cannot make it; run as root, or name another with --socket: File exists *"],
        1,
    );
    place.refused(
        "a socket in a directory that cannot be made",
        &mut place.command(&format!("{run} --socket /proc/portfwd/portfwd.sock")),
        &["/proc/portfwd: cannot make it; run as root, or name another with --socket: *"],
        1,
    );
    place.refused(
        "a socket with a long path in a directory that has to be made",
        &mut place.command(&format!("{run} --socket DIR/new/{}", "x".repeat(120))),
        &["DIR/new/xxx*: *; name another with --socket"],
        1,
    );
    let long = format!("DIR/{}", "x".repeat(120));
    place.refused(
        "a socket with a long path",
        &mut place.command(&format!("{run} --socket {long}")),
        &["DIR/xxx*: *; name another with --socket"],
        1,
    );
    // Someone listens there who is no portfwd.
    let listener = UnixListener::bind(place.path("other.sock")).unwrap();
    place.refused(
        "a live socket",
        &mut place.command(&format!("{run} --socket DIR/other.sock")),
        &["DIR/other.sock: a portfwd is running on this socket; stop it, or name another with --socket"],
        1,
    );
    drop(listener);

    // Another program on an interface: on the external one, then on the internal one alone.
    fs::create_dir(place.path("first")).unwrap();
    fs::write(place.path("native.toml"), "[interfaces]\nattach = 'native'\n").unwrap();
    let native = place.path("native.toml");
    let run = run.replace("run ", "run -c DIR/native.toml ");
    for busy in ["wan0", "lan0"] {
        let file = native.to_str().unwrap();
        let arguments = &["-c", file, "-i", busy, "-p", "81:192.168.77.10"];
        let first = Portfwd::start(router, &binary(), arguments, &place.path("first")).unwrap();
        let instance = Instance::of_socket(first.socket());
        // It has made a router of the box.
        let other =
            if busy == "wan0" { run.replace("192.168.77.10", "198.51.100.2") } else { run.clone() };
        place.refused(
            "another program",
            &mut place.command(&other),
            &[&format!(
                "{busy}: portfwd \"{instance}\" is attached there; end it with `portfwd detach --instance {instance}`"
            )],
            1,
        );
        assert!(programs(router).contains(busy), "the first one has gone");
        first.stats().unwrap();
        let (status, _) = first.stop().unwrap();
        assert!(status.success());
    }
    assert_eq!(programs(router), "");

    let file = "[interfaces]\nexternal = 'wan0'\n[[rule]]\nname = 'own'\nprotocol = 'tcp+udp'\nlisten = '[2001:db8:1::1]:80'\nto = '192.168.77.1:85'\nsource = 'masquerade'\n";
    fs::write(place.path("own.toml"), file).unwrap();
    place.refused(
        "the box as backend of the other IP version",
        &mut place.command("run -c DIR/own.toml"),
        &["DIR/own.toml:3: rule \"own\": backend 192.168.77.1 is this box, which cannot be one of the other IP version; listen on IPv4, or name another host"],
        1,
    );

    router.ip("link add bridge0 type bridge").unwrap();
    router.ip("address add 198.51.101.1/24 dev bridge0").unwrap();
    router.ip("link set bridge0 up").unwrap();
    place.refused(
        "a driver without XDP",
        &mut place.command(&run.replace("wan0", "bridge0")),
        &["bridge0: its driver has no native XDP, or not as it is set up (Operation not supported *; `dmesg` may say more); set attach = \"tc\""],
        1,
    );
    router.ip("link delete bridge0").unwrap();

    let arguments = ["-i", "wan0", "-p", "81:192.168.77.10"];
    let first = Portfwd::start(router, &binary(), &arguments, &place.path("first")).unwrap();
    place.refused(
        "another portfwd at TC",
        &mut place.command("run -i wan0 -p 80:192.168.77.10"),
        &[
            "lan0: another portfwd is attached there, and an interface, also one to backends, belongs to one: put the rules of both into one file, or stop it",
            "wan0: another portfwd is attached there, and an interface, also one to backends, belongs to one: put the rules of both into one file, or stop it",
        ],
        1,
    );
    assert!(first.stop().unwrap().0.success());
}

#[test]
fn jumbo_frames_need_no_other_way_to_attach() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let router = &place.rig.router;
    router.ip("link add big0 mtu 9000 type veth peer name big1 mtu 9000").unwrap();
    for interface in ["big0", "big1"] {
        router.ip(&format!("link set {interface} up")).unwrap();
    }
    let file = "[interfaces]\nexternal = ['big0']\nattach = 'native'\n[[rule]]\nlisten = 80\nto = '192.168.77.10'\n";
    fs::write(place.path("portfwd.toml"), file).unwrap();
    let started = |attach: [&str; 2]| {
        let path = place.path("portfwd.toml");
        let arguments = ["--config", path.to_str().unwrap()];
        let portfwd =
            Portfwd::start(router, &binary(), &arguments, place.directory.path()).unwrap();
        let stats = portfwd.stats().unwrap();
        let interfaces = stats["interfaces"].as_array().unwrap();
        let attached = interfaces.iter().map(|it| [&it["name"], &it["attach"]]);
        let expected = [["big0", attach[0]], ["lan0", attach[1]]];
        assert!(attached.eq(expected.iter().map(|pair| pair.each_ref())), "{stats}");
        portfwd.stop().unwrap().1
    };
    started(["native", "native"]);
    fs::write(place.path("portfwd.toml"), file.replace("'native'", "'auto'")).unwrap();
    let said = started(["tc", "tc"]);
    assert!(
        said.contains("big0: external, TC (veth: packets of this machine stay whole there)"),
        "{said}"
    );
}

#[test]
fn check_of_a_good_file() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let file = "[[rule]]\nname = 'web'\nlisten = 80\nto = '192.168.77.10:8080'\n\
                [[rule]]\nname = 'dmz'\nprotocol = 'any'\nlisten = '*'\nto = '192.168.77.10'\n";
    // Not 8080 and everything to one backend: that would need the flow table.
    fs::write(place.path("portfwd.toml"), file.replace("10'\n", "11'\n")).unwrap();
    let before = place.traces();
    let check = |flags: &str| {
        let arguments = format!("check DIR/portfwd.toml {flags}");
        let ended = end_of(&mut place.command(&arguments), place.directory.path());
        assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""), "{arguments}");
        ended.stdout
    };
    let short = check("");
    let lacks = "no external interface: `portfwd run` needs -i IFACE beside it";
    let text = format!("portfwd.toml: 2 rules, no mistakes\n{lacks}\nroom for 65536 flows takes ");
    assert!(short.contains(&text), "{short}");
    let long = check("--explain");
    for line in [
        "\nweb\n  every external IPv4 address, tcp 80 -> 192.168.77.10, port 8080\n  stateless: ",
        "\ndmz\n  every external IPv4 address, any * -> 192.168.77.11, the same port\n  except tcp 80: rule \"web\" is narrower\n  stateless: ",
    ] {
        assert!(long.contains(line), "{line} is not in {long}");
    }
    let json: serde_json::Value = serde_json::from_str(&check("--explain --json")).unwrap();
    assert!(json.get("interfaces").is_none());
    assert_eq!(json["rules"][0]["name"], "web");
    assert_eq!(json["rules"][0]["stateful"], false);
    assert!(json["rules"][1]["explanation"].as_str().unwrap().contains("any *"));
    assert_eq!(json["flows"]["size"], 65_536);
    assert!(json["flows"]["memory"].as_u64().unwrap() > 65_536 * 256);
    assert!(json.get("programs").is_none());

    // How those would be attached to that are here.
    let interfaces = "[interfaces]\nexternal = ['wan0', 'elsewhere0']\ninternal = 'lan0'\n\
                      [interfaces.lan0]\nattach = 'native'\n";
    let file = place.path("portfwd.toml");
    let rules = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("{interfaces}{rules}")).unwrap();
    let ways = "\n\nlan0: native (as configured)\n\
                wan0: tc (veth: packets of this machine stay whole there)\n";
    assert!(check("--explain").ends_with(ways), "{}", check("--explain"));
    fs::write(&file, &rules).unwrap();

    // The box itself as backend; anybody can know.
    let own = fs::read_to_string(&file).unwrap().replace("10:8080", "1:8080");
    fs::write(&file, own).unwrap();
    let stateful = "\n  stateful: the backend is this box, ";
    assert!(check("--explain").contains(stateful), "{}", check("--explain"));
    assert!(check("--json").contains("\"stateful\":true"), "{}", check("--json"));
    fs::write(&file, rules).unwrap();

    let verified = check("-v");
    assert!(verified.contains("instructions verified"), "{verified}");
    let json: serde_json::Value = serde_json::from_str(&check("-v --json")).unwrap();
    let programs = json["programs"].as_array().unwrap();
    // The three entries, at TC three more and three for what the box sends, and at each hook two detours, one for SYNs and,
    // without IPv6, three programs of flows and four of their detour.
    assert_eq!(programs.len(), 13 + 19);
    for program in programs {
        let instructions = program["instructions"].as_u64().unwrap();
        assert!((100..1_000_000).contains(&instructions), "{program}");
    }
    assert_eq!(place.traces(), before);
}

/// Whoever reads our output may have seen enough.
#[test]
fn a_closed_output_is_no_error() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    fs::write(place.path("portfwd.toml"), "[[rule]]\nlisten = 80\nto = '192.168.77.10'\n").unwrap();
    let arguments = ["-i", "wan0", "-p", "80:192.168.77.10"];
    let portfwd =
        Portfwd::start(&place.rig.router, &binary(), &arguments, place.directory.path()).unwrap();
    for arguments in [
        "list",
        "list --json",
        "stats",
        "stats --json",
        "flows",
        "flows --json",
        "check DIR/portfwd.toml",
        "--help",
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = place.command(arguments);
        let child = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).spawn();
        let output = child.unwrap().wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments}");
        assert!(output.status.success(), "{arguments}: {}", output.status);
    }
    portfwd.stats().unwrap();
    let no_rule = "DIR/portfwd.sock: there is no rule \"81/tcp\"; `portfwd list` has their names";
    place.refused("no such rule", &mut place.command("flows --rule 81/tcp"), &[no_rule], 1);
}
