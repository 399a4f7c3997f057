use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;

use super::*;

fn rule(spec: &str) -> Rule {
    spec.parse().unwrap_or_else(|error| panic!("{spec}: {error}"))
}

/// The message of a SPEC that must be refused.
fn refused(spec: &str) -> String {
    match spec.parse::<Rule>() {
        Ok(rule) => panic!("{spec} was taken for {rule:?}"),
        Err(error) => error.to_string(),
    }
}

/// Texts and the message that each must be refused with.
fn refuses<T: FromStr<Err = Invalid> + std::fmt::Debug>(table: &[(&str, &str)]) {
    for (text, message) in table {
        match text.parse::<T>() {
            Ok(value) => panic!("{text:?} was taken for {value:?}"),
            Err(error) => assert_eq!(error.to_string(), *message, "for {text:?}"),
        }
    }
}

#[test]
fn ports_know_their_ends() {
    let ports = |text: &str| text.parse::<Ports>().unwrap();
    for (text, first, last, width) in
        [("80", 80, 80, 1), ("1-65535", 1, 65535, 65535), ("*", 0, 65535, 65536)]
    {
        let ports = ports(text);
        assert_eq!((ports.first(), ports.last(), ports.width()), (first, last, width), "{text}");
        assert_eq!(ports.to_string(), text);
    }
    assert_eq!(ports("80-80"), Ports::One(80));
    assert!(ports("10-20").contains(10) && ports("10-20").contains(20));
    assert!(!ports("10-20").contains(9) && !ports("10-20").contains(21));
    assert!(ports("10-20").overlaps(ports("20-30")) && ports("20-30").overlaps(ports("10-20")));
    assert!(!ports("10-20").overlaps(ports("21-30")) && !ports("21-30").overlaps(ports("10-20")));
    assert!(ports("*").overlaps(ports("1")));
}

#[test]
fn bad_ports_are_refused() {
    refuses::<Ports>(&[
        ("0", "there is no port 0; write a number from 1 to 65535"),
        ("0-9", "there is no port 0; write a number from 1 to 65535"),
        ("65536", "port 65536 is too high; write a number from 1 to 65535"),
        ("99999999999", "port 99999999999 is too high; write a number from 1 to 65535"),
        ("8099-8000", "the range 8099-8000 is reversed; write 8000-8099"),
        ("", "a port is missing; write PORT, FIRST-LAST or *"),
        ("80-", "a port is missing; write PORT, FIRST-LAST or *"),
        ("+80", "\"+80\" is not a port; write a number from 1 to 65535"),
        ("-80", "a port is missing; write PORT, FIRST-LAST or *"),
        ("1-2-3", "\"2-3\" is not a port; write a number from 1 to 65535"),
        (" 80", "\" 80\" is not a port; write a number from 1 to 65535"),
        ("http", "\"http\" is not a port; write a number from 1 to 65535"),
    ]);
}

#[test]
fn listen_in_every_form() {
    for (text, address, ports) in [
        ("80", None, Ports::One(80)),
        ("8000-8099", None, Ports::Range { first: 8000, last: 8099 }),
        ("*", None, Ports::All),
        ("203.0.113.7:80", Some("203.0.113.7"), Ports::One(80)),
        ("203.0.113.7:*", Some("203.0.113.7"), Ports::All),
        ("[2001:db8::1]:1-2", Some("2001:db8::1"), Ports::Range { first: 1, last: 2 }),
    ] {
        let address = address.map(|address| address.parse::<IpAddr>().unwrap());
        assert_eq!(text.parse(), Ok(Listen { address, ports }));
        assert_eq!(Listen { address, ports }.to_string(), text);
    }
}

#[test]
fn bad_listens_are_refused() {
    refuses::<Listen>(&[
        ("203.0.113.7", "203.0.113.7 has no port; write 203.0.113.7:PORT or 203.0.113.7:*"),
        ("[2001:db8::1]", "2001:db8::1 has no port; write [2001:db8::1]:PORT or [2001:db8::1]:*"),
        ("2001:db8::1", "2001:db8::1 has no port; write [2001:db8::1]:PORT or [2001:db8::1]:*"),
        (
            "2001:db8:0:0:0:0:0:1:80",
            "an IPv6 address with a port needs brackets; write [2001:db8:0:0:0:0:0:1]:80",
        ),
        ("[2001:db8::1:80", "\"[2001:db8::1:80\" lacks a closing bracket; write [ADDRESS]:PORT"),
        ("[2001:db8::1]80", "\"80\" cannot follow [2001:db8::1]; write [2001:db8::1]:PORT"),
        (
            "[203.0.113.7]:80",
            "\"203.0.113.7\" is not an IPv6 address, and only those go in brackets",
        ),
        ("a:b:80", "\"a:b:80\" has too many colons; write ADDRESS:PORT or [IPV6]:PORT"),
        ("8000:8099", "\"8000:8099\" is not a range of ports; write 8000-8099"),
        (
            "eth0:80",
            "\"eth0\" is not an IP address; write an address of this box, or only the port to listen on every address",
        ),
        (
            "0.0.0.0:80",
            "0.0.0.0 is no address to listen on; leave it out to listen on every address: 80",
        ),
        (
            "[::]:80-90",
            ":: is no address to listen on; leave it out to listen on every address: 80-90",
        ),
        (
            "127.0.0.1:80",
            "127.0.0.1 is a loopback address, which never leaves the box; write an address of an external interface, or leave it out: 80",
        ),
        (
            "[::1]:80",
            "::1 is a loopback address, which never leaves the box; write an address of an external interface, or leave it out: 80",
        ),
        (
            "224.0.0.251:5353",
            "224.0.0.251 is a multicast address, which names a group of hosts; write an address of an external interface, or leave it out: 5353",
        ),
        (
            "255.255.255.255:67",
            "255.255.255.255 is the broadcast address, which names all hosts; write an address of an external interface, or leave it out: 67",
        ),
        (
            "[fe80::1]:80",
            "fe80::1 is a link-local address, which means nothing beyond one link; write an address of an external interface, or leave it out: 80",
        ),
        (
            "[::ffff:203.0.113.7]:80",
            "::ffff:203.0.113.7 is an IPv4 address in IPv6 form; write 203.0.113.7:80",
        ),
    ]);
}

#[test]
fn targets_in_every_form() {
    let address = |text: &str| Host::Address(text.parse().unwrap());
    let name = |text: &str| Host::Name(text.to_owned());
    let range = Ports::Range { first: 80, last: 90 };
    for (text, host, ports, shown) in [
        ("10.0.0.1", address("10.0.0.1"), None, "10.0.0.1"),
        ("10.0.0.1:80", address("10.0.0.1"), Some(Ports::One(80)), "10.0.0.1:80"),
        ("10.0.0.1:80-90", address("10.0.0.1"), Some(range), "10.0.0.1:80-90"),
        ("fd00::10", address("fd00::10"), None, "fd00::10"),
        ("[fd00::10]", address("fd00::10"), None, "fd00::10"),
        ("[fd00:0::10]:80", address("fd00::10"), Some(Ports::One(80)), "[fd00::10]:80"),
        ("Web.Example:80", name("web.example"), Some(Ports::One(80)), "web.example:80"),
        ("web.example.", name("web.example."), None, "web.example."),
        ("4you.example", name("4you.example"), None, "4you.example"),
    ] {
        let target = Target { host, ports };
        assert_eq!(text.parse(), Ok(target.clone()));
        assert_eq!(target.to_string(), shown);
    }
}

#[test]
fn bad_targets_are_refused() {
    let bad_address = "is not an IP address; write four numbers from 0 to 255, as in 192.168.1.10";
    for text in ["192.168.1.300", "10.0.0", "10", "1.2.3.4.5", "10.0.0.1.", "0x7f000001", "a.0x"] {
        let message = format!("{text:?} {bad_address}");
        refuses::<Target>(&[(text, message.as_str())]);
    }
    let bad_name =
        "is neither an IP address nor a host name; names have letters, digits, hyphens and dots";
    let long = ["a23456789"; 26].join(".");
    let label = "a".repeat(64);
    for text in ["web_1", "-web", "web-", "a..b", ".", "wéb", "a b", "a\nb", &long, &label] {
        let message = format!("{text:?} {bad_name}");
        refuses::<Target>(&[(text, message.as_str())]);
    }
    assert!("a".repeat(63).parse::<Target>().is_ok());
    refuses::<Target>(&[
        ("", "the backend is missing; write its address or name"),
        (":80", "the backend is missing; write its address or name"),
        ("10.0.0.1:", "a port is missing; write PORT, FIRST-LAST or *"),
        ("10.0.0.1:*", "a backend cannot have the port *; leave it out to keep the port"),
        ("10.0.0.0/24", "\"10.0.0.0/24\" is not one host; write its address without a \"/\""),
        ("0.0.0.0", "0.0.0.0 names no host; write the backend's address"),
        ("::", ":: names no host; write the backend's address"),
        (
            "127.0.0.1:80",
            "127.0.0.1 is a loopback address, which never leaves the box; write the backend's own address; if that is this box, one of its others, on which the service has to listen too",
        ),
        (
            "localhost",
            "localhost is a loopback address, which never leaves the box; write the backend's own address; if that is this box, one of its others, on which the service has to listen too",
        ),
        (
            "[ff02::1]:80",
            "ff02::1 is a multicast address, which names a group of hosts; write the backend's own address",
        ),
        (
            "255.255.255.255",
            "255.255.255.255 is the broadcast address, which names all hosts; write the backend's own address",
        ),
        (
            "fe80::1",
            "fe80::1 is a link-local address, which means nothing beyond one link; write the backend's own address",
        ),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.1 is an IPv4 address in IPv6 form; write 10.0.0.1"),
    ]);
}

#[test]
fn specs_in_every_form() {
    for (spec, listen, protocol, to) in [
        ("27015:192.168.1.10:27015/udp", "27015", Protocol::Udp, "192.168.1.10:27015"),
        ("203.0.113.7:8000-8099:10.0.0.5/tcp", "203.0.113.7:8000-8099", Protocol::Tcp, "10.0.0.5"),
        (
            "[2001:db8::1]:443:[fd00::10]:8443/tcp",
            "[2001:db8::1]:443",
            Protocol::Tcp,
            "[fd00::10]:8443",
        ),
        ("*:192.168.1.20/udp", "*", Protocol::Udp, "192.168.1.20"),
        ("8080:web.example:80", "8080", Protocol::Tcp, "web.example:80"),
        ("*:10.0.0.9/any", "*", Protocol::Any, "10.0.0.9"),
        ("203.0.113.7:*:10.0.0.9/any", "203.0.113.7:*", Protocol::Any, "10.0.0.9"),
        ("203.0.113.7:80:10.0.0.5:8080", "203.0.113.7:80", Protocol::Tcp, "10.0.0.5:8080"),
        ("80:10.0.0.5:8080", "80", Protocol::Tcp, "10.0.0.5:8080"),
        ("203.0.113.7:80:10.0.0.5", "203.0.113.7:80", Protocol::Tcp, "10.0.0.5"),
        ("80-89:10.0.0.5:180-189/tcp+udp", "80-89", Protocol::TcpUdp, "10.0.0.5:180-189"),
        ("[2001:db8::1]:80:[fd00::10]", "[2001:db8::1]:80", Protocol::Tcp, "fd00::10"),
    ] {
        assert_eq!(
            rule(spec),
            Rule {
                name: format!("{listen}/{protocol}"),
                protocol,
                listen: listen.parse().unwrap(),
                to: [to.parse().unwrap()].into(),
                source: Source::Preserve,
                mss: Mss::Auto,
                place: Place::Flag(format!("-p {spec}")),
            }
        );
    }
}

#[test]
fn bad_specs_are_refused() {
    refuses::<Rule>(&[
        ("", "\"\" has no backend; write PORT:BACKEND, as in 80:192.168.1.10"),
        ("80", "\"80\" has no backend; write PORT:BACKEND, as in 80:192.168.1.10"),
        ("80:", "the backend is missing; write its address or name"),
        (":10.0.0.1", "a port is missing; write PORT, FIRST-LAST or *"),
        (
            "http:10.0.0.1",
            "\"http\" is not a port; write PORT:10.0.0.1, with a number from 1 to 65535",
        ),
        (
            "203.0.113.7:80",
            "\"203.0.113.7:80\" lacks a port or a backend; write 203.0.113.7:PORT:BACKEND",
        ),
        (
            "80:fd00::10",
            "an IPv6 address needs brackets in a SPEC; write 80:[ADDRESS] or 80:[ADDRESS]:PORT",
        ),
        (
            "80:8080:192.168.1.20",
            "\"8080\" is a port where the backend's address belongs; write \
             [ADDR:]PORT:BACKEND[:PORT], as in 8080:192.168.1.10:80",
        ),
        (
            "192.168.1.20:80:8080",
            "\"8080\" is a port where the backend's address belongs; write \
             [ADDR:]PORT:BACKEND[:PORT], as in 8080:192.168.1.10:80",
        ),
        ("80/tcp:10.0.0.1", "the protocol stands last; write PORT:BACKEND[:PORT]/PROTO"),
        (
            "[2001:db8::1]:443:fd00::10/tcp",
            "an IPv6 address needs brackets in a SPEC; write [2001:db8::1]:443:[ADDRESS] or \
             [2001:db8::1]:443:[ADDRESS]:PORT",
        ),
        (
            "2001:db8::1:443:10.0.0.1",
            "\"2001:db8::1:443:10.0.0.1\" has too many colons; write [ADDR:]PORT:BACKEND[:PORT], with IPv6 addresses in brackets",
        ),
        (
            "80:10.0.0.1:80:81",
            "\"80:10.0.0.1:80:81\" has too many colons; write [ADDR:]PORT:BACKEND[:PORT], with IPv6 addresses in brackets",
        ),
        ("80:10.0.0.1/sctp", "\"sctp\" is not a protocol; write tcp, udp, tcp+udp or any"),
        ("0:10.0.0.1", "there is no port 0; write a number from 1 to 65535"),
        (
            "80:192.168.1.300",
            "\"192.168.1.300\" is not an IP address; write four numbers from 0 to 255, as in 192.168.1.10",
        ),
    ]);
}

#[test]
fn impossible_rules_are_refused() {
    for (spec, message) in [
        (
            "*:10.0.0.1:80-89/udp",
            "listen has every port and 10.0.0.1:80-89 has 10; leave the ports out to keep them: 10.0.0.1",
        ),
        (
            "80-89:[fd00::1]:80-90",
            "10 ports cannot become 11; write [fd00::1]:80-89, or leave the port out to keep it",
        ),
        (
            "80:10.0.0.1:80-90",
            "1 port cannot become 11; write 10.0.0.1:80, or leave the port out to keep it",
        ),
        (
            "80:10.0.0.1/any",
            "protocol any claims every port and cannot listen on 80 only; use protocol tcp+udp, or listen on *",
        ),
        (
            "*:10.0.0.1:80/any",
            "protocol any keeps every port and cannot change it to 80; leave the port out: 10.0.0.1",
        ),
        (
            "203.0.113.7:80:[fd00::1]",
            "fd00::1 is IPv6 and the rule listens on IPv4: the backend cannot see such clients; write the rule into a configuration file, which can say source = \"masquerade\", or name an IPv4 backend",
        ),
        (
            "[2001:db8::1]:80:10.0.0.1",
            "10.0.0.1 is IPv4 and the rule listens on IPv6: the backend cannot see such clients; write the rule into a configuration file, which can say source = \"masquerade\", or name an IPv6 backend",
        ),
    ] {
        assert_eq!(refused(spec), message, "for {spec}");
    }
}

#[test]
fn many_ports_may_become_one() {
    for spec in [
        "27015-27030:10.0.0.1:80",
        "1-65535:10.0.0.1:80/tcp+udp",
        "*:10.0.0.1:80/udp",
        "203.0.113.7:*:web.example:80/tcp+udp",
    ] {
        assert_eq!(rule(spec).to[0].ports, Some(Ports::One(80)), "{spec}");
    }
}

#[test]
fn each_of_several_backends_must_fit() {
    let with = |spec: &str, to: &[&str]| Rule {
        to: to.iter().map(|target| target.parse().unwrap()).collect(),
        ..rule(spec)
    };
    for to in [
        &["10.0.0.1", "10.0.0.2:8080", "10.0.0.1:8080", "web.example", "fd00::1"][..],
        &["10.0.0.1:1", "10.0.0.1:2"],
    ] {
        assert_eq!(with("80:10.0.0.9", to).check(), [], "{to:?}");
    }
    for (spec, to, mistakes) in [
        (
            "80:10.0.0.9",
            &["10.0.0.1", "10.0.0.2", "10.0.0.1:80"][..],
            &[(2, "10.0.0.1:80 is named twice; name it once")][..],
        ),
        (
            "80:10.0.0.9",
            &["a.example", "A.example"],
            &[(1, "a.example is named twice; name it once")],
        ),
        (
            "80-89:10.0.0.9",
            &["10.0.0.1:80-88", "10.0.0.1:80-89", "10.0.0.1:80", "10.0.0.1"],
            &[
                (
                    0,
                    "10 ports cannot become 9; write 10.0.0.1:80-89, or leave the port out to keep it",
                ),
                (3, "10.0.0.1 is named twice; name it once"),
            ],
        ),
        (
            "203.0.113.7:80:10.0.0.9",
            &["10.0.0.1", "fd00::1", "web.example"],
            &[(
                1,
                "fd00::1 is IPv6 and the rule listens on IPv4: the backend cannot see such clients; write the rule into a configuration file, which can say source = \"masquerade\", or name an IPv4 backend",
            )],
        ),
        (
            "*:10.0.0.9/any",
            &["10.0.0.1", "10.0.0.2:80"],
            &[(
                1,
                "protocol any keeps every port and cannot change it to 80; leave the port out: 10.0.0.2",
            )],
        ),
    ] {
        let found = with(spec, to).check();
        let found: Vec<_> =
            found.iter().map(|it| (it.item.unwrap(), it.error.0.as_str())).collect();
        assert_eq!(found, mistakes, "{spec} to {to:?}");
    }
    let many: Vec<String> = (0..257).map(|i| format!("10.0.{}.{}", i / 200, i % 200)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(with("80:10.0.0.9", &many[1..]).check(), []);
    assert_eq!(
        with("80:10.0.0.9", &many).check()[0].error.to_string(),
        "257 backends are too many; keep 256 of them, or divide the ports among several rules"
    );
}

#[test]
fn check_tells_everything_with_its_key() {
    let good = rule("80:10.0.0.1");
    assert_eq!(good.check(), []);
    assert_eq!(Rule { source: Source::Masquerade, ..good.clone() }.check(), []);
    let bad = Rule {
        name: String::new(),
        to: ["10.0.0.1".parse().unwrap(), "10.0.0.2:80-81".parse().unwrap()].into(),
        ..good
    };
    let found: Vec<_> =
        bad.check().into_iter().map(|it| format!("{}: {}", it.key, it.error)).collect();
    assert_eq!(
        found,
        [
            "name: the name is empty; write one, or leave the key out",
            "to: 1 port cannot become 2; write 10.0.0.2:80, or leave the port out to keep it",
        ]
    );
    let empty = Rule { to: [].into(), ..rule("80:10.0.0.1") };
    let missing = "the backend is missing; write its address or name";
    assert_eq!(empty.check()[0].error.to_string(), missing);
}

#[test]
fn names_are_short_and_printable() {
    assert_eq!(check_name(&"n".repeat(64)), Ok(()));
    assert_eq!(
        check_name(&"n".repeat(65)).unwrap_err().to_string(),
        "the name has 65 bytes; 64 are the most"
    );
    assert_eq!(
        check_name("a\tb").unwrap_err().to_string(),
        "the name \"a\\tb\" has a control character; leave it out"
    );
    // The longest default name fits.
    let longest = "[2001:db8:1111:2222:3333:4444:5555:6666]:10000-20000:[fd00::1]/tcp+udp";
    assert_eq!(check_name(&rule(longest).name), Ok(()));
}

#[test]
fn the_narrower_rule_comes_first() {
    let specs = [
        "203.0.113.7:80:10.0.0.1/udp",
        "203.0.113.7:80-81:10.0.0.1/tcp",
        "203.0.113.7:*:10.0.0.1/tcp",
        "203.0.113.7:*:10.0.0.1/any",
        "80:10.0.0.1/tcp+udp",
        "1-65535:10.0.0.1",
        "*:10.0.0.1/tcp",
        "*:10.0.0.1/any",
    ];
    let rules = specs.map(rule);
    for pair in rules.windows(2) {
        assert!(pair[0].precedence() < pair[1].precedence(), "{} then {}", pair[0], pair[1]);
    }
    assert_eq!(overlaps(&rules), []);
    assert_eq!(rule("80:10.0.0.1/tcp").precedence(), rule("90:10.0.0.1/udp").precedence());
}

#[test]
fn the_families_of_an_address_that_is_left_out_are_apart() {
    let (v4, v6, both) = (rule("80:10.0.0.1"), rule("80:[fd00::1]"), rule("80:web.example"));
    assert_eq!(overlaps(&[v4.clone(), v6.clone()]), []);
    assert_eq!(overlaps(&[v4.clone(), both.clone()]), [(0, 1)]);
    assert_eq!(overlaps(&[v6.clone(), both.clone()]), [(0, 1)]);
    // So do backends of both.
    let to = [v4.to[0].clone(), v6.to[0].clone()];
    let name = Rule::default_name(v4.listen, v4.protocol, &to);
    let mixed = Rule { to: to.into(), name, ..v4.clone() };
    assert_eq!(overlaps(&[v4.clone(), mixed.clone()]), [(0, 1)]);
    assert_eq!(overlaps(&[v6.clone(), mixed.clone()]), [(0, 1)]);
    let names = [v4.name, v6.name, both.name, mixed.name];
    assert_eq!(names, ["80/tcp", "80/tcp6", "80/tcp", "80/tcp"]);
}

#[test]
fn equal_rules_overlap() {
    for (a, b, shared) in [
        ("80:10.0.0.1", "80:10.0.0.2", Some("tcp 80")),
        ("80:10.0.0.1", "80:10.0.0.2/udp", None),
        ("80:10.0.0.1/tcp+udp", "80:10.0.0.2/udp", Some("udp 80")),
        ("80:10.0.0.1/tcp+udp", "80:10.0.0.2/tcp+udp", Some("tcp+udp 80")),
        ("80-90:10.0.0.1", "85-99:10.0.0.2", Some("tcp 85-90")),
        ("80-90:10.0.0.1", "90-99:10.0.0.2", Some("tcp 90")),
        ("80-90:10.0.0.1", "91-99:10.0.0.2", None),
        ("80-90:10.0.0.1", "85:10.0.0.2", None),
        ("*:10.0.0.1/any", "*:10.0.0.2/any", Some("tcp+udp *")),
        ("*:10.0.0.1/any", "*:10.0.0.2/tcp", None),
        ("*:10.0.0.1/tcp+udp", "*:10.0.0.2/tcp", Some("tcp *")),
        ("203.0.113.7:80:10.0.0.1", "80:10.0.0.2", None),
        ("203.0.113.7:80:10.0.0.1", "203.0.113.8:80:10.0.0.2", None),
        ("203.0.113.7:80:10.0.0.1", "203.0.113.7:80:10.0.0.2", Some("tcp 203.0.113.7:80")),
        (
            "[2001:db8::1]:80:[fd00::1]",
            "[2001:db8:0::1]:80:[fd00::2]",
            Some("tcp [2001:db8::1]:80"),
        ),
    ] {
        let rules = [rule(a), rule(b)];
        let found = overlaps(&rules);
        assert_eq!(found, if shared.is_some() { vec![(0, 1)] } else { vec![] }, "{a} and {b}");
        if shared.is_some() {
            assert_eq!(shared_claim(&rules[0], &rules[1]).as_deref(), shared);
        }
    }
}

#[test]
fn a_wide_range_overlaps_with_what_is_far_behind_it() {
    let rules = ["10-900:10.0.0.1", "20-30:10.0.0.1", "40-50:10.0.0.1", "800-999:10.0.0.1"];
    assert_eq!(overlaps(&rules.map(rule)), [(0, 1), (0, 2), (0, 3)]);
}

#[test]
fn one_overlap_among_100_000_rules_is_found() {
    let mut rules: Vec<Rule> = (0..100_000u32)
        .map(|i| {
            rule(&format!(
                "198.51.{}.{}:{}:10.0.0.1/udp",
                i % 2,
                i / 60_000 + 1,
                i % 60_000 / 2 + 1
            ))
        })
        .collect();
    assert_eq!(overlaps(&rules), []);
    rules.push(Rule { to: ["10.0.0.2".parse().unwrap()].into(), ..rules[4_711].clone() });
    assert_eq!(overlaps(&rules), [(4_711, 100_000)]);
    // The worst case: all of them are one.
    rules.fill(rule("1-65535:10.0.0.1/tcp+udp"));
    assert_eq!(overlaps(&rules).len(), 100_000);
}

#[test]
fn json_is_what_the_user_wrote() {
    let rule = Rule { name: "csgo".to_owned(), ..rule("27015-27030:192.168.1.10/udp") };
    assert_eq!(
        serde_json::to_string(&rule).unwrap(),
        r#"{"name":"csgo","protocol":"udp","listen":"27015-27030","to":["192.168.1.10"],"source":"preserve","mss":"auto"}"#
    );
    assert_eq!(serde_json::from_str::<Protocol>("\"tcp+udp\"").unwrap(), Protocol::TcpUdp);
    let error = serde_json::from_str::<Listen>("\"0\"").unwrap_err().to_string();
    assert!(error.starts_with("there is no port 0"), "{error}");
}

#[test]
fn places_are_told_as_the_user_knows_them() {
    let path = Path::new("portfwd.toml").into();
    assert_eq!(Place::File { path, line: 12 }.to_string(), "portfwd.toml:12");
    assert_eq!(rule("80:10.0.0.1").place.to_string(), "-p 80:10.0.0.1");
}

fn addresses() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
}

fn ports() -> impl Strategy<Value = Ports> {
    prop_oneof![
        (1..=u16::MAX).prop_map(Ports::One),
        (1..u16::MAX, 1..=u16::MAX)
            .prop_filter("first below last", |(first, last)| first < last)
            .prop_map(|(first, last)| Ports::Range { first, last }),
        Just(Ports::All),
    ]
}

fn protocols() -> impl Strategy<Value = Protocol> {
    prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::TcpUdp, Protocol::Any])
}

/// Rules that hold by themselves.
fn rules() -> impl Strategy<Value = Rule> {
    let hosts = prop_oneof![
        addresses().prop_map(Host::Address),
        "[a-z][a-z0-9]{0,8}(-[a-z0-9]{1,4})?(\\.[a-z]{2,5}){0,2}\\.?".prop_map(Host::Name)
    ];
    let to = (hosts, any::<u16>(), any::<bool>(), any::<bool>());
    (protocols(), proptest::option::of(addresses()), ports(), to).prop_filter_map(
        "a rule that holds",
        |(protocol, address, ports, to)| {
            let (host, first, keep, one) = to;
            let shifted = stretch(first.max(1), if one { 1 } else { ports.width() });
            let listen = Listen { address, ports };
            let to = vec![Target { host, ports: if keep { None } else { Some(shifted?) } }];
            let good = listen.to_string().parse::<Listen>().is_ok()
                && to[0].to_string().parse::<Target>().is_ok();
            let name = Rule::default_name(listen, protocol, &to);
            let place = Place::Flag(String::new());
            let rule = Rule {
                name,
                protocol,
                listen,
                to: to.into(),
                source: Source::Preserve,
                mss: Mss::Auto,
                place,
            };
            (good && rule.check().is_empty()).then_some(rule)
        },
    )
}

/// Rules on few ports and addresses, so that many overlap.
fn crowds() -> impl Strategy<Value = Vec<Rule>> {
    let addresses = prop::sample::select(vec![None, Some(IpAddr::from([203, 0, 113, 7]))]);
    let ports = prop_oneof![
        9 => (1..30u16, 0..10u32).prop_map(|(first, more)| stretch(first, more + 1).unwrap()),
        1 => Just(Ports::All)
    ];
    let hosts = prop::sample::subsequence(vec!["10.0.0.1", "fd00::1", "web.example"], 1..=3);
    let rule =
        (protocols(), addresses, ports, hosts).prop_map(|(protocol, address, ports, hosts)| Rule {
            protocol,
            listen: Listen { address, ports },
            to: hosts.iter().map(|host| host.parse().unwrap()).collect(),
            ..rule("80:10.0.0.1")
        });
    prop::collection::vec(rule, 0..12)
}

/// Whether a rule forwards IPv4, and IPv6.
fn families(rule: &Rule) -> [bool; 2] {
    let of = |address: &IpAddr| [address.is_ipv4(), address.is_ipv6()];
    let to = rule.to.iter().map(|target| match &target.host {
        Host::Address(address) => of(address),
        Host::Name(_) => [true, true],
    });
    match &rule.listen.address {
        Some(address) => of(address),
        None => to.fold([false, false], |[v4, v6], [and_v4, and_v6]| [v4 | and_v4, v6 | and_v6]),
    }
}

/// Overlap by the words of the contract, port by port.
fn naive(a: &Rule, b: &Rule) -> bool {
    let kind = |ports| match ports {
        Ports::One(_) => 0,
        Ports::Range { .. } => 1,
        Ports::All => 2,
    };
    a.listen.address == b.listen.address
        && families(a).into_iter().zip(families(b)).any(|(of_a, of_b)| of_a && of_b)
        && kind(a.listen.ports) == kind(b.listen.ports)
        && (a.protocol == Protocol::Any) == (b.protocol == Protocol::Any)
        && ((a.protocol.tcp() && b.protocol.tcp()) || (a.protocol.udp() && b.protocol.udp()))
        && (0..40).any(|port| a.listen.ports.contains(port) && b.listen.ports.contains(port))
}

proptest! {
    #[test]
    fn a_rule_survives_its_text(rule in rules()) {
        let text = rule.to_string();
        let parsed: Rule = text.parse().unwrap();
        prop_assert_eq!(&parsed.place, &Place::Flag(format!("-p {text}")));
        prop_assert_eq!(Rule { place: rule.place.clone(), ..parsed }, rule);
    }

    #[test]
    fn no_text_panics(text in ".*", spec in "[0-9a-f:.*/\\[\\]-]{0,24}(/(tcp|udp|any))?") {
        for text in [text, spec] {
            let _ = text.parse::<Listen>();
            let _ = text.parse::<Target>();
            match text.parse::<Rule>() {
                Ok(rule) => prop_assert_eq!(rule.check(), vec![]),
                Err(Invalid(message)) => prop_assert!(!message.contains('\n')),
            }
        }
    }

    #[test]
    fn the_sweep_finds_what_comparing_all_pairs_finds(rules in crowds()) {
        let mut pairs = BTreeSet::new();
        for second in 0..rules.len() {
            for first in 0..second {
                if naive(&rules[first], &rules[second]) {
                    pairs.insert((first, second));
                }
            }
        }
        let found: BTreeSet<_> = overlaps(&rules).into_iter().collect();
        prop_assert!(found.is_subset(&pairs), "{found:?} of {pairs:?}");
        let named = |pairs: &BTreeSet<(usize, usize)>| -> BTreeSet<usize> {
            pairs.iter().flat_map(|pair| [pair.0, pair.1]).collect()
        };
        prop_assert_eq!(named(&found), named(&pairs));
        for (first, second) in found {
            prop_assert!(shared_claim(&rules[first], &rules[second]).is_some());
        }
    }

    #[test]
    fn narrower_rules_are_those_that_comparing_all_pairs_finds(crowd in crowds()) {
        let mut rules: Vec<Rule> = Vec::new();
        for rule in crowd {
            if !rules.iter().any(|other| naive(other, &rule)) {
                rules.push(rule);
            }
        }
        let expected: Vec<BTreeSet<usize>> = rules
            .iter()
            .map(|rule| {
                let comes_before = |other: &Rule| {
                    other.precedence() < rule.precedence()
                        && rule.shares_family(other)
                        && rule.listen.address.is_none_or(|a| other.listen.address == Some(a))
                        && shared_claim(rule, other).is_some()
                };
                (0..rules.len()).filter(|other| comes_before(&rules[*other])).collect()
            })
            .collect();
        prop_assert_eq!(narrower(&rules), expected, "{:?}", rules);
    }
}
