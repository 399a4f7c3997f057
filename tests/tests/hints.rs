//! What portfwd says at start about a box on which packets will be lost.

use std::net::{TcpListener, UdpSocket};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use portfwd_tests::{Namespace, Portfwd, TempDir, is_root};

#[test]
fn what_will_lose_packets_is_told_at_start() {
    if !is_root() {
        return;
    }
    let binary = PathBuf::from(std::env::var_os("PORTFWD_BIN").expect("PORTFWD_BIN is set"));
    let [router, host] = ["router", "host"].map(|role| Namespace::new(role).unwrap());
    for port in ["port0", "port1", "lan0"] {
        router
            .ip(&format!("link add {port} type veth peer name {port} netns {}", host.name()))
            .unwrap();
    }
    for command in [
        "link add br0 type bridge",
        "link add br1 type bridge",
        "link set port0 master br0",
        "link set port1 master br1",
        "address add 198.51.100.1/24 dev br0",
        "address add 10.0.0.1/24 dev lan0",
    ] {
        router.ip(command).unwrap();
    }
    for link in ["br0", "port0", "port1", "lan0"] {
        router.ip(&format!("link set {link} up")).unwrap();
    }
    let tcp = |at: &str| router.enter(|| TcpListener::bind(at).unwrap());
    let udp = |at: &str| router.enter(|| UdpSocket::bind(at).unwrap());
    let _services = (tcp("0.0.0.0:22"), tcp("127.0.0.1:25"), udp("[::]:53"), udp("0.0.0.0:40000"));

    let directory = TempDir::new().unwrap();
    let file = directory.path().join("generic.toml");
    std::fs::write(
        &file,
        "[interfaces]\nattach = \"generic\"\n[interfaces.port0]\nattach = \"tc\"\n",
    )
    .unwrap();
    let mut arguments = vec!["-c", file.to_str().unwrap(), "-i", "br0", "-i", "port1"];
    for spec in [
        "22:10.0.0.5",
        "25:10.0.0.5",
        "53:10.0.0.6/udp",
        "39999-40001:10.0.0.7/udp",
        "203.0.113.9:80:10.0.0.5",
    ] {
        arguments.extend(["-p", spec]);
    }
    let portfwd = Portfwd::start(&router, &binary, &arguments, directory.path()).unwrap();
    let (status, said) = portfwd.stop().unwrap();
    assert!(status.success(), "{said}");
    for line in [
        "br0 gets packets of local machines and containers by port0, ",
        "port1 is a veth: ",
        "generic.toml:3: [interfaces.port0] is of no use: ",
        "port1 is a port of br1, which holds the addresses: name br1 as external\n",
        "rule \"22/tcp\": this box itself listens on tcp 22; from outside that port now leads to \
         10.0.0.5\n",
        "rule \"53/udp\": this box itself listens on udp 53; from outside that port now leads to \
         10.0.0.6\n",
        "rule \"203.0.113.9:80/tcp\" listens on 203.0.113.9, which is not an address of this box: ",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert_eq!(said.matches("this box itself listens").count(), 2, "{said}");
}

#[test]
fn why_the_box_itself_may_be_silent_is_told() {
    if !is_root() {
        return;
    }
    let binary = PathBuf::from(std::env::var_os("PORTFWD_BIN").expect("PORTFWD_BIN is set"));
    let [router, client] = ["router", "client"].map(|role| Namespace::new(role).unwrap());
    router.ip(&format!("link add wan0 type veth peer name wan0 netns {}", client.name())).unwrap();
    for (namespace, host) in [(&router, 1), (&client, 2)] {
        namespace.ip(&format!("address add 198.51.100.{host}/24 dev wan0")).unwrap();
        namespace.ip("link set wan0 up").unwrap();
    }
    router.ip("address add 10.0.0.1/32 dev wan0").unwrap();
    let _service = router.enter(|| UdpSocket::bind("0.0.0.0:8001").unwrap());

    let directory = TempDir::new().unwrap();
    let arguments = ["-i", "wan0", "-p", "8000:10.0.0.1:8001/udp"];
    let portfwd = Portfwd::start(&router, &binary, &arguments, directory.path()).unwrap();
    client.enter(|| {
        let socket = UdpSocket::bind("198.51.100.2:0").unwrap();
        socket.send_to(b"anybody?", "198.51.100.1:8000").unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(30);
    while !portfwd.stderr().contains("none come back: ") {
        assert!(Instant::now() < deadline, "{}", portfwd.stderr());
        thread::sleep(Duration::from_millis(100));
    }
    let (status, said) = portfwd.stop().unwrap();
    assert!(status.success(), "{said}");
    let why = "none come back: this box itself should answer; a UDP service that is bound to all \
               addresses does so from another of them: ";
    assert!(said.contains(why), "{said}");
}
