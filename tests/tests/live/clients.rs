//! Who asks the daemon: many, slow and broken ones, and those who may only look.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;

use super::*;

/// How many files a portfwd has open.
fn open_files(portfwd: &Portfwd) -> usize {
    // The last of its programs has one.
    told(portfwd, "lo: clients on this box, TC");
    fs::read_dir(format!("/proc/{}/fd", portfwd.id())).unwrap().count()
}

/// What the daemon answers, as it comes.
fn ask(socket: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // It may close the connection before all of a request is there.
    let _: std::io::Result<()> = stream.write_all(request);
    let mut answer = Vec::new();
    let _: std::io::Result<usize> = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn slow_broken_and_many_clients_keep_nobody_waiting() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let _backend = Backend::new(&rig.server, rig::SERVER);
    let portfwd = start(&rig, &[&["-i", "wan0"], &RULES[..]].concat(), &directory);
    // The last programs are loaded by then.
    until("it serves the box itself", 60, || portfwd.stderr().contains("clients on this box"));
    let before = open_files(&portfwd);
    let requests: [&[u8]; 4] = [
        b"",
        b"\x16\x03\x01garbage\0\xff\r\n",
        b"GET /v1/stats HTTP/1.1\r\nHost: portf",
        // The answers are never read.
        b"GET /v1/stats HTTP/1.1\r\nHost: portfwd\r\n\r\nGET /v1/rules HTTP/1.1\r\nHost: portfwd\r\n\r\n",
    ];
    let mut clients = Vec::new();
    for number in 0..1000 {
        let mut stream = UnixStream::connect(portfwd.socket()).unwrap();
        // The daemon may have closed it: one more came.
        let _: std::io::Result<()> = stream.write_all(requests[number % requests.len()]);
        clients.push(stream);
        if number % 250 == 249 {
            let list = portfwd.json("list").unwrap();
            assert_eq!(list["rules"].as_array().unwrap().len(), RULES.len() / 2);
        }
    }
    both_reached(&rig.client);
    assert!(open_files(&portfwd) < before + 200);
    drop(clients);
    until("their connections are closed", 30, || open_files(&portfwd) <= before);

    let head =
        format!("POST /v1/change HTTP/1.1\r\nHost: portfwd\r\nContent-Length: {}\r\n\r\n", 2 << 20);
    let large = [head.as_bytes(), &vec![b' '; 2 << 20]].concat();
    let answer = ask(portfwd.socket(), &large);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let answer = ask(
        portfwd.socket(),
        b"GET /v1/flows?colour=red HTTP/1.1\r\nHost: portfwd\r\nConnection: close\r\n\r\n",
    );
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("colour"), "{answer}");
    let answer = ask(
        portfwd.socket(),
        b"POST /v1/change HTTP/1.1\r\nHost: portfwd\r\nConnection: close\r\nContent-Length: 4\r\n\r\n{\"a\"",
    );
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("not a change"), "{answer}");
    both_reached(&rig.client);
}

#[test]
fn only_root_changes_rules() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let portfwd = start(&rig, &["-i", "wan0", "-p", "80:192.168.77.10"], &directory);
    // As if there was such a group.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(portfwd.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let everyones = directory.path().join("portfwd");
    fs::hard_link(binary(), &everyones)
        .or_else(|_| fs::copy(binary(), &everyones).map(drop))
        .unwrap();
    let as_nobody = |words: &[&str]| {
        Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(&everyones)
            .args(words)
            .arg("--socket")
            .arg(portfwd.socket())
            .output()
            .unwrap()
    };
    for words in [&["list"][..], &["stats", "--json"], &["flows"]] {
        let output = as_nobody(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
    }
    for words in [
        &["add", "-p", "81:192.168.77.10"][..],
        &["remove", "80/tcp"],
        &["disable", "80/tcp"],
        &["reload"],
    ] {
        let output = as_nobody(words);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("only root may change this; this is user 65534"), "{said}");
    }
    assert_eq!(portfwd.json("list").unwrap()["rules"].as_array().unwrap().len(), 1);
}

#[test]
fn members_of_the_group_may_look() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // A portfwd that finds the group; nobody else does. What its caller keeps from others is not what it keeps.
    let groups = directory.path().join("group");
    fs::write(&groups, "root:x:0:\nportfwd:x:64123:\n").unwrap();
    let wrapper = directory.path().join("wrapper");
    let inside = "umask 077 && mount --bind \"$0\" /etc/group && exec \"$@\"";
    let script = format!(
        "#!/bin/sh\nexec unshare --mount sh -c '{inside}' {} {} \"$@\"\n",
        groups.display(),
        binary().display()
    );
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let run = directory.path().join("run");
    let mut process = Background::start(
        rig.router
            .command(&wrapper)
            .args(["run", "-i", "wan0", "-p", "80:192.168.77.10", "--socket"])
            .arg(run.join("portfwd.sock"))
            .args(as_tested(&directory))
            .stderr(fs::File::create(directory.path().join("log")).unwrap()),
    )
    .unwrap();
    let socket = run.join("portfwd.sock");
    until("it takes commands", 60, || {
        assert!(process.exited().unwrap().is_none());
        stats(&rig.router, &socket)
    });
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&run), mode(&socket)), (0o755, 0o660));
    let owner = fs::metadata(&socket).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (0, 64123));

    let everyones = directory.path().join("portfwd");
    fs::hard_link(binary(), &everyones)
        .or_else(|_| fs::copy(binary(), &everyones).map(drop))
        .unwrap();
    let as_nobody = |groups: &str, words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", groups]).arg(&everyones).args(words);
        let output = command.arg("--socket").arg(&socket).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(as_nobody("--groups=64123", &["list"]), (Some(0), String::new()));
    let (status, said) = as_nobody("--groups=64123", &["remove", "80/tcp"]);
    assert_eq!(status, Some(1));
    assert!(said.contains("only root may change this; this is user 65534"), "{said}");
    let (status, said) = as_nobody("--clear-groups", &["list"]);
    assert_eq!(status, Some(1));
    assert!(said.contains("run as root, or as a member of group portfwd"), "{said}");
}

#[test]
fn the_metrics_bear_as_much() {
    if !is_root() {
        return;
    }
    let (rig, directory) = (Rig::new().unwrap(), TempDir::new().unwrap());
    let file = directory.path().join("portfwd.toml");
    let config = portfwd_tests::interfaces("external = ['wan0']");
    fs::write(&file, config + "[metrics]\nlisten = '127.0.0.1:9464'\n").unwrap();
    let arguments = ["--config", file.to_str().unwrap(), "-p", "80:192.168.77.10"];
    let portfwd = start(&rig, &arguments, &directory);
    let before = open_files(&portfwd);
    let connect = || {
        let stream = std::net::TcpStream::connect("127.0.0.1:9464").unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    };
    rig.router.enter(|| {
        let mut clients = Vec::new();
        for number in 0..300 {
            let mut stream = connect();
            let request: &[u8] = match number % 3 {
                0 => b"",
                1 => b"GET /metrics HT",
                _ => b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
            };
            let _: std::io::Result<()> = stream.write_all(request);
            clients.push(stream);
        }
        let mut stream = connect();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("# EOF"), "{answer}");
        assert!(open_files(&portfwd) < before + 100);
    });
    until("their connections are closed", 30, || open_files(&portfwd) <= before);
}
