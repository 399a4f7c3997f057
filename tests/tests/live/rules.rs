//! Rules that change while portfwd runs, and in its file.

use std::cell::RefCell;

use super::*;

/// Runs a command on the daemon: its exit status and what it printed, standard output first.
fn command(rig: &Rig, portfwd: &Portfwd, words: &[&str]) -> (i32, String) {
    let mut command = rig.router.command(binary());
    let output = command.args(words).arg("--socket").arg(portfwd.socket()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(said).unwrap())
}

fn place(port: u16) -> SocketAddr {
    SocketAddr::new(rig::WAN.v4.into(), port)
}

/// Whether a rule is listed, is on, and is saved.
fn listed(portfwd: &Portfwd, name: &str) -> Option<(bool, bool)> {
    let list = portfwd.json("list").unwrap();
    let rule = list["rules"].as_array().unwrap().iter().find(|rule| rule["name"] == name)?;
    Some((rule["enabled"].as_bool().unwrap(), rule["saved"].as_bool().unwrap()))
}

#[test]
fn rules_change_at_run_time_and_in_the_file() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    let file = directory.path().join("portfwd.toml");
    let first = format!(
        "{}\n# The first.\n[[rule]]\nname = \"one\"\nprotocol = \"udp\"\nlisten = 7101\nto = \"192.168.77.10:7000\"  # there\n",
        portfwd_tests::interfaces("external = \"wan0\"")
    );
    fs::write(&file, &first).unwrap();
    let start = || start(&rig, &["--config", file.to_str().unwrap()], &directory);
    let portfwd = start();
    let run = |portfwd: &Portfwd, words: &[&str]| command(&rig, portfwd, words);
    let done = |portfwd: &Portfwd, words: &[&str]| {
        let (status, said) = run(portfwd, words);
        assert_eq!(status, 0, "{words:?}: {said}");
        said
    };
    until("the file's rule answers", 5, || answers(&rig.client, place(7101)));
    assert_eq!(run(&portfwd, &["diff"]), (0, "no difference\n".to_owned()));

    // At run time alone.
    done(&portfwd, &["add", "-p", "7102:192.168.77.10:7000/udp", "--name", "two"]);
    until("the new rule answers", 5, || answers(&rig.client, place(7102)));
    assert_eq!(listed(&portfwd, "two"), Some((true, false)));
    assert_eq!(fs::read_to_string(&file).unwrap(), first);
    let (status, said) = run(&portfwd, &["diff"]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("two"), "{said}");
    done(&portfwd, &["disable", "one"]);
    assert!(!answers(&rig.client, place(7101)));
    assert_eq!(listed(&portfwd, "one"), Some((false, false)));
    done(&portfwd, &["enable", "one"]);
    until("it answers again", 5, || answers(&rig.client, place(7101)));

    // What is wrong changes nothing, and says so.
    for (words, reason) in [
        (&["add", "-p", "7102:192.168.77.10/udp", "--name", "three"][..], "both listen"),
        (&["add", "-p", "7103:192.168.77.10/udp", "--name", "two"], "already"),
        (&["add", "-p", "nonsense"], "-p nonsense"),
        (&["remove", "twoo"], "did you mean"),
        (&["disable", "nobody"], "there is no rule"),
        (&["add", "-p", "7103:203.0.113.9/udp"], "has no route"),
    ] {
        let (status, said) = run(&portfwd, words);
        assert_eq!(status, 2, "{words:?}: {said}");
        assert!(said.contains(reason), "{words:?}: {said}");
    }
    assert!(answers(&rig.client, place(7101)) && answers(&rig.client, place(7102)));

    // In the file too, which keeps its comments.
    done(&portfwd, &["add", "-p", "7103:192.168.77.10:7000/udp", "--name", "three", "--save"]);
    until("the saved rule answers", 5, || answers(&rig.client, place(7103)));
    assert_eq!(listed(&portfwd, "three"), Some((true, true)));
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.starts_with(&first) && text.contains("7103"), "{text}");

    // What was changed before can be saved.
    done(&portfwd, &["add", "-p", "7102:192.168.77.10:7000/udp", "--name", "two", "--save"]);
    assert_eq!(listed(&portfwd, "two"), Some((true, true)));
    done(&portfwd, &["remove", "two"]);
    assert!(!answers(&rig.client, place(7102)));
    done(&portfwd, &["remove", "two", "--save"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    assert_eq!(run(&portfwd, &["diff"]), (0, "no difference\n".to_owned()));
    done(&portfwd, &["add", "-p", "7102:192.168.77.10:7000/udp", "--name", "two"]);
    until("the rule answers again", 5, || answers(&rig.client, place(7102)));

    // Whoever takes what the box itself listens for is told.
    let address = SocketAddr::new(rig::WAN.v4.into(), 7107);
    let own = rig.router.enter(|| std::net::TcpListener::bind(address)).unwrap();
    let said = done(&portfwd, &["add", "-p", "7107:192.168.77.10:7000", "--name", "own"]);
    assert!(said.contains("warning: rule \"own\": this box itself listens on tcp 7107"), "{said}");
    done(&portfwd, &["remove", "own"]);
    drop(own);

    // Counters go on, and what was changed at run time is as it was, after a restart.
    let packets = |portfwd: &Portfwd, name: &str| {
        let stats = portfwd.stats().unwrap();
        let mut rules = stats["rules"].as_array().unwrap().iter();
        rules.find(|rule| rule["name"] == name).unwrap()["forward"]["packets"].as_u64().unwrap()
    };
    let before = packets(&portfwd, "two");
    assert!(before > 0);
    let mut portfwd = portfwd;
    portfwd.signal(libc::SIGKILL).unwrap();
    drop(portfwd);
    assert!(answers(&rig.client, place(7102)));
    let mut portfwd = start();
    assert_eq!(listed(&portfwd, "two"), Some((true, false)));
    assert_eq!(packets(&portfwd, "two"), before + 1);

    // The file is what is, once it is read again: by a command, and by a signal.
    done(&portfwd, &["remove", "three", "--save"]);
    assert_eq!(fs::read_to_string(&file).unwrap().trim_end(), first.trim_end());
    assert!(!answers(&rig.client, place(7103)));
    fs::write(&file, format!("{first}nonsense\n")).unwrap();
    let (status, said) = run(&portfwd, &["reload"]);
    assert_eq!(status, 2, "{said}");
    assert!(answers(&rig.client, place(7102)));
    fs::write(&file, first.replace("7101", "7104")).unwrap();
    done(&portfwd, &["reload"]);
    until("the moved rule answers", 5, || answers(&rig.client, place(7104)));
    assert!(!answers(&rig.client, place(7101)) && !answers(&rig.client, place(7102)));
    fs::write(&file, &first).unwrap();
    portfwd.signal(libc::SIGHUP).unwrap();
    until("it is back", 5, || answers(&rig.client, place(7101)));
    // The way to the other family, and flows: more than the tables had room for.
    done(&portfwd, &["add", "-p", "7105:[fd77::10]:7000/udp"]);
    done(&portfwd, &["add", "-p", "7106-8106:192.168.77.10:7000/udp", "--name", "many"]);
    until("IPv6 answers", 5, || answers(&rig.client, SocketAddr::new(rig::WAN.v6.into(), 7105)));
    until("many ports answer", 5, || answers(&rig.client, place(7777)));
    assert!(portfwd.stop().unwrap().0.success());
}

#[test]
fn a_start_that_the_kernel_refuses_leaves_forwarding_as_it_was() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    let spread = ["-i", "wan0", "-p", "7010-7011:192.168.77.10:7000/udp"];
    let moved = ["-i", "wan0", "-p", "7010-7011:192.168.77.12:7000/udp"];
    let mut portfwd = start(&rig, &[&spread, &RULES[..]].concat(), &directory);
    both_reached(&rig.client);
    let flows = |portfwd: &Portfwd| {
        let stats = portfwd.stats().unwrap();
        let mut rules = stats["rules"].as_array().unwrap().iter();
        let rule = rules.find(|rule| rule["listen"] == "7010-7011").unwrap();
        rule["flows"]["active"].as_u64().unwrap()
    };
    assert!(answers(&rig.client, place(7010)));
    until("there is a flow", 5, || flows(&portfwd) == 1);
    let (socket, before) = (portfwd.socket().to_owned(), claimed(&portfwd).0);
    portfwd.signal(libc::SIGKILL).unwrap();
    drop(portfwd);
    let list = rig.router.command(binary()).arg("list").arg("--socket").arg(&socket).output();
    let said = String::from_utf8(list.unwrap().stderr).unwrap();
    assert!(said.contains("goes on forwarding"), "{said}");
    for _ in 0..2 {
        // The verifier refuses programs to whoever lacks that.
        let mut command = rig.router.command("setpriv");
        command.args(["--bounding-set", "-perfmon,-sys_admin", "--inh-caps", "-all", "--"]);
        command.arg(binary()).arg("run").arg("--socket").arg(&socket);
        // Flows to where the old rules lead are not its business.
        let output = command.args(as_tested(&directory)).args(moved).args(RULES).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        both_reached(&rig.client);
    }
    let portfwd = start(&rig, &[&spread, &RULES[..]].concat(), &directory);
    assert!(claimed(&portfwd).0 > before, "counters began anew");
    assert_eq!(flows(&portfwd), 1);
    both_reached(&rig.client);
}

#[test]
fn a_first_start_that_was_killed_is_in_nobodys_way() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    // What it leaves that has a set, and no file yet.
    let instance = Instance::of_socket(&directory.path().join("portfwd.sock"));
    fs::create_dir_all(format!("/sys/fs/bpf/portfwd/{instance}/sets/1")).unwrap();
    let arguments = [&["-i", "wan0"], &RULES[..]].concat();
    let mut portfwd = start(&rig, &arguments, &directory);
    both_reached(&rig.client);
    let before = claimed(&portfwd).0;

    // Nor one that was killed while it removed a set whose flows it had copied.
    portfwd.signal(libc::SIGKILL).unwrap();
    drop(portfwd);
    let (file, set) = (
        format!("/run/portfwd/{instance}.json"),
        format!("/sys/fs/bpf/portfwd/{instance}/sets/99"),
    );
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    state["kept"]["unfinished"] = vec![99].into();
    fs::write(&file, state.to_string()).unwrap();
    fs::create_dir(&set).unwrap();
    let portfwd = start(&rig, &arguments, &directory);
    assert!(claimed(&portfwd).0 >= before);
    both_reached(&rig.client);
    assert!(!Path::new(&set).exists());
    assert!(portfwd.stop().unwrap().0.success());
    assert!(!Path::new(&format!("/sys/fs/bpf/portfwd/{instance}")).exists());
}

#[test]
fn who_forwards_for_long_goes_without_a_backend_that_has_no_route() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    let arguments = [&["--keep", "-i", "wan0", "-p", "7103:203.0.113.9/udp"], &RULES[..]].concat();
    let portfwd = start(&rig, &arguments, &directory);
    told(&portfwd, "backend 203.0.113.9 has no route");
    both_reached(&rig.client);
    // It is there later.
    rig.router.ip("route add 203.0.113.9 via 192.168.77.10").unwrap();
    told(&portfwd, "all is well again");
    // Another instance is none of this.
    let mut other = rig.router.command(binary());
    let other = other.args(["detach", "--instance", "nobody-has-this"]).output().unwrap();
    assert_eq!(other.status.code(), Some(1));
    both_reached(&rig.client);
    let (status, said) = command(&rig, &portfwd, &["detach"]);
    assert_eq!(status, 0, "{said}");
    assert!(!answers(&rig.client, place(7004)));
}

#[test]
fn a_reload_attaches_in_another_way_or_changes_nothing() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    for bridge in ["none0", "none1"] {
        rig.router.ip(&format!("link add {bridge} type bridge")).unwrap();
        rig.router.ip(&format!("link set {bridge} up")).unwrap();
    }
    let file = directory.path().join("portfwd.toml");
    let external = RefCell::new("\"wan0\", \"none0\"".to_owned());
    let write = |all: &str, one: &str, listen: u16| {
        let external = external.borrow();
        let text = format!(
            "[interfaces]\nexternal = [{external}]\nattach = \"{all}\"\n\
             [interfaces.none0]\nattach = \"{one}\"\n\
             [[rule]]\nprotocol = \"udp\"\nlisten = {listen}\nto = \"192.168.77.10:7000\"\n"
        );
        fs::write(&file, text).unwrap();
    };
    let ways = |portfwd: &Portfwd| -> Vec<String> {
        let list = portfwd.json("list").unwrap();
        let interfaces = list["interfaces"].as_array().unwrap().iter();
        interfaces.map(|it| format!("{} {}", it["name"], it["attach"]).replace('"', "")).collect()
    };
    write("tc", "tc", 7101);
    let portfwd = start(&rig, &["--config", file.to_str().unwrap()], &directory);
    until("it answers", 5, || answers(&rig.client, place(7101)));
    assert_eq!(ways(&portfwd), ["none0 tc", "wan0 tc", "lan0 tc"]);
    for way in ["native", "generic", "tc", "generic", "native"] {
        write(way, "tc", 7101);
        let (status, said) = command(&rig, &portfwd, &["reload"]);
        assert_eq!(status, 0, "{said}");
        assert_eq!(
            ways(&portfwd),
            ["none0 tc".into(), format!("wan0 {way}"), format!("lan0 {way}")]
        );
        assert!(answers(&rig.client, place(7101)), "{way}: {}", portfwd.stderr());
    }
    // A bridge has no native XDP, and nor has another one that is new.
    for (all, one, others, refused) in
        [("generic", "native", "", "none0"), ("native", "tc", ", \"none1\"", "none1")]
    {
        external.replace(format!("\"wan0\", \"none0\"{others}"));
        write(all, one, 7102);
        let (status, said) = command(&rig, &portfwd, &["reload"]);
        assert_eq!(status, 2, "{said}");
        assert!(said.contains(&format!("{refused}: its driver has no native XDP")), "{said}");
        assert_eq!(ways(&portfwd), ["none0 tc", "wan0 native", "lan0 native"]);
        assert!(answers(&rig.client, place(7101)) && !answers(&rig.client, place(7102)));
    }

    // A start that goes on from there has it stay as it was.
    external.replace("\"wan0\", \"none0\"".to_owned());
    write("native", "native", 7101);
    let mut portfwd = portfwd;
    portfwd.signal(libc::SIGKILL).unwrap();
    drop(portfwd);
    let portfwd = start(&rig, &["--config", file.to_str().unwrap()], &directory);
    assert_eq!(ways(&portfwd), ["none0 tc", "wan0 native", "lan0 native"]);
    told(&portfwd, "none0: its driver has no native XDP");
    assert!(answers(&rig.client, place(7101)));
    assert!(portfwd.stop().unwrap().0.success());
}
