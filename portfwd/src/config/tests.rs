use proptest::prelude::*;

use super::*;
use crate::flows::Timeouts;
use crate::rule::Mss;
use crate::rule::{Protocol, Target};

fn good(text: &str) -> Config {
    parse(Path::new("portfwd.toml"), text).unwrap_or_else(|errors| panic!("{errors}"))
}

/// The errors of a file that must be refused, a line each.
fn bad(text: &str) -> String {
    match parse(Path::new("portfwd.toml"), text) {
        Ok(config) => panic!("{text:?} was taken for {config:?}"),
        Err(errors) => errors.to_string(),
    }
}

fn interface(name: &str, line: usize) -> Interface {
    let path = Path::new("portfwd.toml").into();
    Interface { name: name.to_owned(), place: Place::File { path, line } }
}

fn flags(config: &mut Config, interfaces: &[&str], specs: &[&str]) -> Result<(), String> {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    config.add_flags(&owned(interfaces), &owned(specs)).map_err(|errors| errors.to_string())
}

#[test]
fn a_whole_file() {
    let config = good(
        r#"
[interfaces]
external = ["eth0", "ppp0"]
internal = "eth1"
attach   = "generic"

[metrics]
listen = "127.0.0.1:9464"

[names]
refresh = 60

[flows]
size           = 1_000_000
udp            = "10m"
udp_unanswered = "2m 30s"
tcp            = "2h4m"
tcp_transitory = 60

[masquerade]
ports = "10000-20000"

[[rule]]
name     = "csgo"
protocol = "udp"
listen   = "27015-27030"
to       = "192.168.1.10"
source   = "preserve"

[[rule]]
listen   = 8080
to       = ["web.example:80"]

[[rule]]
listen   = "8000-8099"
to       = [
  "10.0.0.5:80",
  "10.0.0.6",
]
source   = "masquerade"
"#,
    );
    let path: std::sync::Arc<Path> = Path::new("portfwd.toml").into();
    let rules = vec![
        Rule {
            name: "csgo".to_owned(),
            place: Place::File { path: path.clone(), line: 23 },
            ..spec("27015-27030:192.168.1.10/udp")
        },
        Rule {
            place: Place::File { path: path.clone(), line: 30 },
            ..spec("8080:web.example:80/tcp")
        },
        Rule {
            to: ["10.0.0.5:80", "10.0.0.6"].map(|target| target.parse().unwrap()).into(),
            source: Source::Masquerade,
            place: Place::File { path, line: 34 },
            ..spec("8000-8099:10.0.0.5:80")
        },
    ];
    assert_eq!(rules[1].name, "8080/tcp");
    assert_eq!(
        config,
        Config {
            external: vec![interface("eth0", 3), interface("ppp0", 3)],
            internal: vec![interface("eth1", 4)],
            attach: Way { attach: Attach::Generic, place: Some(interface("", 5).place) },
            attach_to: Vec::new(),
            metrics: Some("127.0.0.1:9464".parse().unwrap()),
            refresh: Duration::from_secs(60),
            flows: FlowSettings {
                size: 1_000_000,
                timeouts: Timeouts {
                    udp: Duration::from_secs(600),
                    udp_unanswered: Duration::from_secs(150),
                    tcp: Duration::from_secs(7440),
                    tcp_transitory: Duration::from_secs(60),
                },
            },
            masquerade: 10000..=20000,
            rules,
            ..Config::default()
        }
    );
}

fn spec(text: &str) -> Rule {
    text.parse().unwrap()
}

#[test]
fn an_interface_may_be_attached_to_in_its_own_way() {
    let config = good("[interfaces]\nattach = \"native\"\n[interfaces.wg0]\nattach = \"tc\"\n");
    assert_eq!(config.attach_to("wg0"), Attach::Tc);
    assert_eq!(config.attach_to("eth0"), Attach::Native);
    let place = |interface| config.way_to(interface).place.as_ref().map(ToString::to_string);
    assert_eq!(place("wg0").as_deref(), Some("portfwd.toml:4"));
    assert_eq!(place("eth0").as_deref(), Some("portfwd.toml:2"));
    assert_eq!(good("[interfaces.wg0]\n"), Config::default());
}

#[test]
fn an_interface_with_its_own_way_must_be_one_of_those_that_are_named() {
    let table = "[interfaces.eht1]\nattach = \"tc\"\n";
    let file = |lists: &str| format!("[interfaces]\n{lists}\n{table}");
    assert_eq!(
        bad(&file("external = [\"eth0\"]\ninternal = [\"eth1\"]")),
        "portfwd.toml:4: interfaces.eht1: it is neither external nor internal; did you mean eth1? \
         name it in one of the two, or leave this table out"
    );
    assert_eq!(
        bad(&file("external = \"wan0\"\ninternal = \"wan0\"")),
        "portfwd.toml:4: interfaces.eht1: it is neither external nor internal; name it in one of the \
         two, or leave this table out"
    );
    // Routes and flags may name it.
    for lists in ["external = \"eth0\"", "internal = \"eth0\"", "internal = \"eht1\"", ""] {
        good(&file(lists));
    }
    good(&file("external = \"eht1\"\ninternal = \"eth1\""));
}

#[test]
fn an_empty_file_has_the_defaults() {
    assert_eq!(good(""), Config::default());
    assert_eq!(good("\u{feff}# nothing\r\n[names]\r\nrefresh = \"30s\"\r\n"), Config::default());
    assert_eq!(Config::default().refresh, Duration::from_secs(30));
    assert_eq!(Config::default().attach_to("eth0"), Attach::Auto);
    assert_eq!(Config::default().flows.size, 65_536);
    assert_eq!(Config::default().masquerade, 40000..=60999);
    assert_eq!(good("[flows]\nudp = \"5m\"\n[masquerade]\n"), Config::default());
}

#[test]
fn the_ends_of_what_may_be_set() {
    let flows = |line: &str| good(&format!("flows.{line}")).flows;
    assert_eq!(flows("size = 1024").size, 1024);
    assert_eq!(flows("size = 0x100_0000").size, 16_777_216);
    assert_eq!(flows("udp = 120").timeouts.udp, Duration::from_secs(120));
    assert_eq!(flows("udp_unanswered = '7days'").timeouts.udp_unanswered.as_secs(), 604_800);
    assert_eq!(flows("tcp = '1s 500ms'").timeouts.tcp, Duration::from_millis(1500));
    assert_eq!(flows("tcp_transitory = 1").timeouts.tcp_transitory.as_secs(), 1);
    let masquerade = |ports: &str| good(&format!("masquerade.ports = '{ports}'")).masquerade;
    assert_eq!(masquerade("1024-2047"), 1024..=2047);
    assert_eq!(masquerade("64512-65535"), 64512..=65535);
    // `*` leaves the box its own traffic, and without masquerade the ports are free.
    let rule = |listen: &str, source: &str| {
        format!("[[rule]]\nlisten = '{listen}'\nto = '10.0.0.1'\nsource = '{source}'\n")
    };
    good(
        &(rule("*", "masquerade") + &rule("39999", "preserve") + &rule("61000-61999", "preserve")),
    );
    good(&rule("50000", "preserve"));
}

#[test]
fn forms_of_values() {
    for (value, ports) in [
        ("0x50", Ports::One(80)),
        ("8_080", Ports::One(8080)),
        ("\"8080\"", Ports::One(8080)),
        ("'*'", Ports::All),
    ] {
        let config = good(&format!("rule = [{{ listen = {value}, to = 'fd00::1' }}]"));
        assert_eq!(config.rules[0].listen.ports, ports, "{value}");
        assert_eq!(config.rules[0].protocol, Protocol::Tcp);
    }
}

/// Files and all the lines that they must be refused with.
#[test]
fn bad_files_are_refused() {
    const RULE: &str = "[[rule]]\nname = \"web\"\nlisten = 80\nto = \"10.0.0.1\"\n";
    let with = |more: &str| format!("{RULE}{more}");
    let table: &[(String, &[&str])] = &[
        // Keys.
        (
            "[interfaces]\nexternl = [\"eth0\"]\n".into(),
            &["portfwd.toml:2: interfaces.externl: no such key; did you mean external? [interfaces] has external, internal, attach"],
        ),
        (
            "[interface]\n".into(),
            &["portfwd.toml:1: interface: no such key; did you mean interfaces? the file has interfaces, metrics, names, flows, masquerade, rule"],
        ),
        (
            with("backend = 1\n"),
            &["portfwd.toml:5: rule \"web\": backend: no such key; [[rule]] has name, protocol, listen, to, source, mss, enabled"],
        ),
        (
            with("enabled = \"no\"\n"),
            &["portfwd.toml:5: rule \"web\": enabled: this is a string; write true or false"],
        ),
        // Disabled rules are checked, and have names of their own.
        (
            "[[rule]]\nname = \"x\"\nenabled = false\nlisten = 0\nto = \"10.0.0.1\"\n".into(),
            &["portfwd.toml:4: rule \"x\": listen: there is no port 0; write a number from 1 to 65535"],
        ),
        (
            with("[[rule]]\nname = \"web\"\nlisten = 81\nto = \"10.0.0.1\"\nenabled = false\n"),
            &["portfwd.toml:5: rule \"web\": name: the rule at portfwd.toml:1 has this name already; give each its own"],
        ),
        (
            "[[rule]]\nlisten = 80\nto = \"10.0.0.1\"\nenabled = false\n[[rule]]\nlisten = 80\nto = \"10.0.0.1\"\n".into(),
            &["portfwd.toml:5: rule \"80/tcp\": name: the rule at portfwd.toml:1 has this name already; give each its own"],
        ),
        (
            with("weight = 1\n"),
            &["portfwd.toml:5: rule \"web\": weight: no such key; [[rule]] has name, protocol, listen, to, source, mss, enabled"],
        ),
        (
            with("\"a\\nb\" = 1\n"),
            &["portfwd.toml:5: rule \"web\": a\\nb: no such key; [[rule]] has name, protocol, listen, to, source, mss, enabled"],
        ),
        (
            "[metrics]\nport = 1\n".into(),
            &["portfwd.toml:2: metrics.port: no such key; [metrics] has listen"],
        ),
        (
            "[names]\nrefesh = 1\n".into(),
            &["portfwd.toml:2: names.refesh: no such key; did you mean refresh? [names] has refresh"],
        ),
        // TOML.
        (
            "[[rule]]\nlisten = 8000-8099\nto = 10.0.0.1\nprotocol = udp\n".into(),
            &[
                "portfwd.toml:2: this is not TOML: invalid date, expected `-` (MM-DD); put text in quotes, as in listen = \"8000-8099\"",
                "portfwd.toml:3: this is not TOML: invalid float, expected nothing; put text in quotes, as in listen = \"8000-8099\"",
                "portfwd.toml:4: this is not TOML: string values must be quoted, expected literal string; put text in quotes, as in listen = \"8000-8099\"",
            ],
        ),
        (
            with("listen = 81\n"),
            &["portfwd.toml:5: this is not TOML: duplicate key; keep one of them; several rules are several [[rule]]"],
        ),
        (
            "\n[[rule]\n".into(),
            &["portfwd.toml:2: this is not TOML: unclosed array table, expected `]`; correct it here"],
        ),
        // What comes behind a list that is not closed is taken for a part of it.
        (
            "[interfaces]\nexternal = [\"wan0\"\n[[rule]]\nlisten = 80\nto = \"10.0.0.1\"\n".into(),
            &["portfwd.toml:3: this is not TOML: missing comma between array elements, expected `,`; put it there, or close the list before this with `]`"],
        ),
        (
            "metrics = x\n[[rule]]\nlisten = 80\nto = [\"10.0.0.1\"\n[[rule]]\nlisten = 81\nto = [\"10.0.0.1\"]\n".into(),
            &[
                "portfwd.toml:1: this is not TOML: string values must be quoted, expected literal string; put text in quotes, as in listen = \"8000-8099\"",
                "portfwd.toml:5: this is not TOML: missing comma between array elements, expected `,`; put it there, or close the list before this with `]`",
            ],
        ),
        // Types.
        (
            "interfaces = 1\nmetrics = []\n".into(),
            &[
                "portfwd.toml:1: interfaces: this is an integer; write [interfaces]",
                "portfwd.toml:2: metrics: this is an array; write [metrics]",
            ],
        ),
        (
            "[rule]\nlisten = 80\n".into(),
            &["portfwd.toml:1: rule: rules are a list; write it as [[rule]]"],
        ),
        (
            "rule = [1]\n".into(),
            &["portfwd.toml:1: rule: a rule is a table; write [[rule]] and its keys in lines below"],
        ),
        (
            "[[rule]]\nname = 1\nprotocol = true\nlisten = [80]\nto = [\n  80,\n]\nsource = 1.5\n".into(),
            &[
                "portfwd.toml:2: name: this is an integer; write text in quotes",
                "portfwd.toml:3: protocol: this is a boolean; write text in quotes",
                "portfwd.toml:4: listen: this is an array; write a port or text, as in \"8000-8099\"",
                "portfwd.toml:6: to: this is an integer; write text, as in \"192.168.1.10\"",
                "portfwd.toml:8: source: this is a float; write text in quotes",
            ],
        ),
        // Interfaces.
        (
            "[interfaces]\nexternal = [\"eth0\", \"eth0\"]\ninternal = [\n \"\",\n \"a/b\",\n \"abcdefghijklmnop\",\n 7]\nattach = \"fast\"\n".into(),
            &[
                "portfwd.toml:2: interfaces.external: eth0 is named twice; name it once",
                "portfwd.toml:4: interfaces.internal: the interface's name is empty; write one that `ip link` lists",
                "portfwd.toml:5: interfaces.internal: \"a/b\" cannot be an interface; write one that `ip link` lists",
                "portfwd.toml:6: interfaces.internal: \"abcdefghijklmnop\" has 16 bytes; interface names have 15 at most",
                "portfwd.toml:7: interfaces.internal: this is an integer; write a list of names, as in [\"eth0\"]",
                "portfwd.toml:8: interfaces.attach: \"fast\" is no way to attach; write auto, native, generic or tc",
            ],
        ),
        (
            "[interfaces]\nattach = \"xdp\"\n".into(),
            &["portfwd.toml:2: interfaces.attach: \"xdp\" is no way to attach; write auto, native, generic or tc"],
        ),
        // Metrics and names.
        (
            "[metrics]\nlisten = \"9464\"\n".into(),
            &["portfwd.toml:2: metrics.listen: \"9464\" is not an address with a port; write one, as in 127.0.0.1:9464"],
        ),
        (
            "[metrics]\nlisten = \"127.0.0.1:0\"\n".into(),
            &["portfwd.toml:2: metrics.listen: \"127.0.0.1:0\" is not an address with a port; write one, as in 127.0.0.1:9464"],
        ),
        (
            "names.refresh = 0\n".into(),
            &["portfwd.toml:1: names.refresh: this is too short; write seconds from 1 to 86400, as in 30 or \"30s\""],
        ),
        (
            "names.refresh = 86401\n".into(),
            &["portfwd.toml:1: names.refresh: this is too long; write seconds from 1 to 86400, as in 30 or \"30s\""],
        ),
        // Flows and masquerade.
        (
            "[flows]\nudp = 119\nudp_unanswered = \"119s 999ms\"\ntcp = \"2 h 4\"\ntcp_transitory = -1\nudp_answered = 1\n".into(),
            &[
                "portfwd.toml:2: flows.udp: this is too short; write seconds from 120 to 604800, as in 300 or \"5m\"",
                "portfwd.toml:3: flows.udp_unanswered: this is too short; write seconds from 120 to 604800, as in 120 or \"2m\"",
                "portfwd.toml:4: flows.tcp: this is not a time; write seconds from 1 to 604800, as in 7440 or \"2h 4m\"",
                "portfwd.toml:5: flows.tcp_transitory: this is not a time; write seconds from 1 to 604800, as in 240 or \"4m\"",
                "portfwd.toml:6: flows.udp_answered: no such key; did you mean udp_unanswered? [flows] has size, udp, udp_unanswered, tcp, tcp_transitory",
            ],
        ),
        (
            "flows.udp = 1.5\nflows.tcp = \"99999999999999999999h\"\nflows.tcp_transitory = \"8days\"\n".into(),
            &[
                "portfwd.toml:1: flows.udp: this is not a time; write seconds from 120 to 604800, as in 300 or \"5m\"",
                "portfwd.toml:2: flows.tcp: this is not a time; write seconds from 1 to 604800, as in 7440 or \"2h 4m\"",
                "portfwd.toml:3: flows.tcp_transitory: this is too long; write seconds from 1 to 604800, as in 240 or \"4m\"",
            ],
        ),
        (
            "flows.size = 1023\n".into(),
            &["portfwd.toml:1: flows.size: there cannot be 1023 flows; write a number from 1024 to 16777216"],
        ),
        (
            "flows.size = 99999999999999999999\n".into(),
            &["portfwd.toml:1: flows.size: there cannot be 99999999999999999999 flows; write a number from 1024 to 16777216"],
        ),
        (
            "flows.size = \"many\"\n".into(),
            &["portfwd.toml:1: flows.size: this is a string; write a number from 1024 to 16777216"],
        ),
        (
            "masquerade = 40000\nflows = []\n".into(),
            &[
                "portfwd.toml:1: masquerade: this is an integer; write [masquerade]",
                "portfwd.toml:2: flows: this is an array; write [flows]",
            ],
        ),
        (
            "[masquerade]\nports = 40000\n".into(),
            &["portfwd.toml:2: masquerade.ports: this is an integer; write text in quotes"],
        ),
        (
            "[masquerade]\nports = \"1023-60999\"\n".into(),
            &["portfwd.toml:2: masquerade.ports: 1023-60999 has ports below 1024, which are for services; write a range above them, as in 40000-60999"],
        ),
        (
            "[masquerade]\nports = \"40000-41022\"\n".into(),
            &["portfwd.toml:2: masquerade.ports: 40000-41022 is too narrow; write a range of at least 1024 ports, as in 40000-60999"],
        ),
        (
            // What is left out because of a mistake makes no further ones.
            "[masquerade]\nports = \"60999-40000\"\n[[rule]]\nlisten = 50000\nto = \"10.0.0.1\"\nsource = \"masquerade\"\n".into(),
            &["portfwd.toml:2: masquerade.ports: the range 60999-40000 is reversed; write 40000-60999"],
        ),
        (
            "[masquerade]\nports = \"50000-51999\"\n[[rule]]\nname = \"m\"\nlisten = 80\nto = \"10.0.0.1\"\nsource = \"masquerade\"\n[[rule]]\nlisten = 50000\nto = \"10.0.0.1\"\n[[rule]]\nname = \"w\"\nlisten = \"1-50000\"\nto = \"10.0.0.1\"\n[[rule]]\nname = \"x\"\nlisten = 52000\nto = \"10.0.0.1\"\n".into(),
            &[
                "portfwd.toml:8: rule \"50000/tcp\": listen: 50000 is among the ports 50000-51999, by which rule \"m\" (portfwd.toml:3) masquerades; listen on others, or set [masquerade] ports",
                "portfwd.toml:11: rule \"w\": listen: 1-50000 has some of the ports 50000-51999, by which rule \"m\" (portfwd.toml:3) masquerades; listen on others, or set [masquerade] ports",
            ],
        ),
        // Values of a rule.
        (
            "[[rule]]\nname = \"x\"\n[[rule]]\n".into(),
            &[
                "portfwd.toml:1: rule \"x\": listen: this is missing; write listen = \"PORT\"",
                "portfwd.toml:1: rule \"x\": to: this is missing; write to = \"ADDRESS\"",
                "portfwd.toml:3: listen: this is missing; write listen = \"PORT\"",
                "portfwd.toml:3: to: this is missing; write to = \"ADDRESS\"",
            ],
        ),
        (
            "[[rule]]\nname = \"x\"\nprotocol = \"sctp\"\nlisten = 0\nto = [\"10.0.0.1\",\n\"10.0.0.300\"]\nsource = \"nat\"\n".into(),
            &[
                "portfwd.toml:3: rule \"x\": protocol: \"sctp\" is not a protocol; write tcp, udp, tcp+udp or any",
                "portfwd.toml:4: rule \"x\": listen: there is no port 0; write a number from 1 to 65535",
                "portfwd.toml:6: rule \"x\": to: \"10.0.0.300\" is not an IP address; write four numbers from 0 to 255, as in 192.168.1.10",
                "portfwd.toml:7: rule \"x\": source: \"nat\" is not a kind of source; write preserve or masquerade",
            ],
        ),
        (
            with("mss = 87\n"),
            &["portfwd.toml:5: rule \"web\": mss: segments cannot have at most 87 bytes; write a number from 88 to 65495, \"auto\", or false"],
        ),
        (
            with("mss = 65496\n"),
            &["portfwd.toml:5: rule \"web\": mss: segments cannot have at most 65496 bytes; write a number from 88 to 65495, \"auto\", or false"],
        ),
        (
            with("mss = \"pmtu\"\n"),
            &["portfwd.toml:5: rule \"web\": mss: \"pmtu\" is no size of segments; write a number, \"auto\", or false"],
        ),
        (
            with("mss = true\n"),
            &["portfwd.toml:5: rule \"web\": mss: \"true\" is no size of segments; write a number, \"auto\", or false"],
        ),
        (
            with("mss = 1.5\n"),
            &["portfwd.toml:5: rule \"web\": mss: this is a float; write a number, \"auto\", or false"],
        ),
        (
            with("protocol = \"udp\"\nmss = 1400\n"),
            &["portfwd.toml:6: rule \"web\": mss: protocol udp has no segments; leave this out, or use tcp"],
        ),
        (
            "[[rule]]\nlisten = 65536\nto = \"10.0.0.1\"\n".into(),
            &["portfwd.toml:2: listen: port 65536 is too high; write a number from 1 to 65535"],
        ),
        (
            "[[rule]]\nlisten = -1\nto = \"10.0.0.1\"\n".into(),
            &["portfwd.toml:2: listen: there is no port -1; write a number from 1 to 65535"],
        ),
        (
            "[[rule]]\nlisten = 99999999999999999999\nto = \"10.0.0.1\"\n".into(),
            &["portfwd.toml:2: listen: there is no port 99999999999999999999; write a number from 1 to 65535"],
        ),
        (
            "[[rule]]\nlisten = \"8099-8000\"\nto = \"10.0.0.1\"\n".into(),
            &["portfwd.toml:2: listen: the range 8099-8000 is reversed; write 8000-8099"],
        ),
        (
            "[[rule]]\nlisten = \"80\\n\"\nto = []\n".into(),
            &["portfwd.toml:2: listen: \"80\\n\" is not a port; write a number from 1 to 65535"],
        ),
        // A rule as a whole.
        (
            "[[rule]]\nname = \"\"\nlisten = 80\nto = []\n".into(),
            &[
                "portfwd.toml:2: rule \"\": name: the name is empty; write one, or leave the key out",
                "portfwd.toml:4: rule \"\": to: the backend is missing; write its address or name",
            ],
        ),
        (
            "[[rule]]\nname = \"x\"\nprotocol = \"any\"\nlisten = 80\nto = [\"10.0.0.1\", \"10.0.0.2\",\n\"10.0.0.3:90\",\n\"10.0.0.1:80\", \"10.0.0.4:1-2\"]\n".into(),
            &[
                "portfwd.toml:4: rule \"x\": listen: protocol any claims every port and cannot listen on 80 only; use protocol tcp+udp, or listen on *",
                "portfwd.toml:7: rule \"x\": to: 10.0.0.1:80 is named twice; name it once",
                "portfwd.toml:7: rule \"x\": to: 1 port cannot become 2; write 10.0.0.4:1, or leave the port out to keep it",
            ],
        ),
        (
            "[[rule]]\nname = \"x\"\nlisten = \"203.0.113.7:80-89\"\nto = \"[fd00::1]:80-90\"\n".into(),
            &[
                "portfwd.toml:4: rule \"x\": to: 10 ports cannot become 11; write [fd00::1]:80-89, or leave the port out to keep it",
                "portfwd.toml:4: rule \"x\": to: fd00::1 is IPv6 and the rule listens on IPv4: the backend cannot see such clients; set source = \"masquerade\", or name an IPv4 backend",
            ],
        ),
        // Rules among each other.
        (
            with("\n[[rule]]\nname = \"b\"\nprotocol = \"tcp+udp\"\nlisten = 80\nto = \"10.0.0.2\"\n"),
            &["portfwd.toml:6: listen: rule \"web\" (portfwd.toml:1) and rule \"b\" (portfwd.toml:6) both listen on tcp 80; change one of them, or remove it"],
        ),
        (
            "[[rule]]\nlisten = 80\nto = \"10.0.0.1\"\n[[rule]]\nlisten = \"80\"\nto = \"10.0.0.2\"\n".into(),
            &["portfwd.toml:4: listen: rule \"80/tcp\" (portfwd.toml:1) and rule \"80/tcp\" (portfwd.toml:4) both listen on tcp 80; change one of them, or remove it"],
        ),
        (
            with("[[rule]]\nname = \"web\"\nlisten = 81\nto = \"10.0.0.1\"\n"),
            &["portfwd.toml:5: rule \"web\": name: the rule at portfwd.toml:1 has this name already; give each its own"],
        ),
        // All of it, in the order of the lines.
        (
            "[[rule]]\nlisten = 80\nto = \"10.0.0.1\"\n[[rule]]\nlisten = 80\nto = \"10.0.0.1\"\nto_port = 1\n[interfaces]\nattach = \"\"\n".into(),
            &[
                "portfwd.toml:4: listen: rule \"80/tcp\" (portfwd.toml:1) and rule \"80/tcp\" (portfwd.toml:4) both listen on tcp 80; change one of them, or remove it",
                "portfwd.toml:7: to_port: no such key; [[rule]] has name, protocol, listen, to, source, mss, enabled",
                "portfwd.toml:9: interfaces.attach: \"\" is no way to attach; write auto, native, generic or tc",
            ],
        ),
    ];
    for (text, lines) in table {
        assert_eq!(bad(text), lines.join("\n"), "for {text}");
    }
}

#[test]
fn rules_may_be_disabled() {
    let rule = |name: &str, more: &str| {
        format!("[[rule]]\nname = '{name}'\nlisten = 50000\nto = '10.0.0.1'\n{more}\n")
    };
    let masquerades = "enabled = false\nsource = 'masquerade'";
    let text =
        rule("a", "enabled = false") + &rule("b", "enabled = true") + &rule("c", masquerades);
    // They may claim what others do, and take no port from those that masquerade.
    let mut config = good(&text);
    let names = |rules: &[Rule]| rules.iter().map(|rule| rule.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&config.rules), ["b"]);
    assert_eq!(names(&config.disabled), ["a", "c"]);
    assert_eq!(config, super::file::parse_by(Path::new("portfwd.toml"), &text, 1).unwrap());

    // A flag replaces the one that forwards, else one that does not, which then does.
    flags(&mut config, &[], &["50000:10.0.0.2"]).unwrap();
    assert_eq!((names(&config.rules), config.disabled.len()), (vec!["b".to_owned()], 2));
    let mut config = good(&rule("a", "enabled = false"));
    flags(&mut config, &[], &["50000:10.0.0.2"]).unwrap();
    assert_eq!((names(&config.rules), config.disabled.len()), (vec!["a".to_owned()], 0));
    assert_eq!(config.rules[0].to_string(), "50000:10.0.0.2/tcp");
}

#[test]
fn segments_are_as_large_as_a_rule_says() {
    let with =
        |mss: &str| good(&format!("[[rule]]\nlisten = 80\nto = '10.0.0.1'\n{mss}")).rules[0].mss;
    for (text, mss, json) in [
        ("", Mss::Auto, "\"auto\""),
        ("mss = 'auto'", Mss::Auto, "\"auto\""),
        ("mss = false", Mss::Off, "false"),
        ("mss = 88", Mss::At(88), "88"),
        ("mss = 0x550", Mss::At(1360), "1360"),
        ("mss = 65_495", Mss::At(65_495), "65495"),
    ] {
        assert_eq!(with(text), mss, "{text}");
        assert_eq!(serde_json::to_string(&mss).unwrap(), json);
        assert_eq!(serde_json::from_str::<Mss>(json).unwrap(), mss);
    }
    for json in ["true", "1", "\"off\"", "null"] {
        assert!(serde_json::from_str::<Mss>(json).is_err(), "{json}");
    }
}

#[test]
fn files_that_cannot_be_read() {
    let dir = std::env::temp_dir().join(format!("portfwd-config-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let message = |path: &Path| read(path).unwrap_err().to_string();
    let remedy = "with --config FILE, or do without: portfwd run -i IFACE -p SPEC";
    let missing = dir.join("missing.toml");
    assert_eq!(
        message(&missing),
        format!("{}: there is no such file; write it, name another {remedy}", missing.display())
    );
    assert_eq!(
        message(&dir),
        format!(
            "{}: cannot be read (Is a directory (os error 21)); name another {remedy}",
            dir.display()
        )
    );
    let latin = dir.join("latin.toml");
    std::fs::write(&latin, b"# one\n# caf\xe9\n").unwrap();
    assert_eq!(
        message(&latin),
        format!("{}:2: this is not UTF-8 text; save the file as UTF-8", latin.display())
    );
    let fine = dir.join("fine.toml");
    std::fs::write(&fine, "[interfaces]\nexternal = 'eth0'\n").unwrap();
    assert_eq!(read(&fine).unwrap().external[0].name, "eth0");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn flags_add_to_a_file() {
    let mut config =
        good("[interfaces]\nexternal = 'eth0'\n[[rule]]\nname='web'\nlisten=80\nto='10.0.0.1'\n");
    let two = ["80:10.0.0.2:8080", "80:10.0.0.3/udp"];
    flags(&mut config, &["eth0", "eth1"], &two).unwrap();
    let names: Vec<&str> = config.external.iter().map(|each| each.name.as_str()).collect();
    assert_eq!(names, ["eth0", "eth1"]);
    let shown: Vec<_> =
        config.rules.iter().map(|rule| format!("{} {rule} {}", rule.name, rule.place)).collect();
    assert_eq!(
        shown,
        [
            "web 80:10.0.0.2:8080/tcp -p 80:10.0.0.2:8080",
            "80/udp 80:10.0.0.3/udp -p 80:10.0.0.3/udp"
        ]
    );
}

#[test]
fn bad_flags_change_nothing() {
    for (interfaces, specs, message) in [
        (
            &["a b"][..],
            &[][..],
            "-i a b: \"a b\" cannot be an interface; write one that `ip link` lists",
        ),
        (&["eth1", "eth1"], &[], "-i eth1: eth1 is named twice; name it once"),
        (
            &["eth1"],
            &["80\n"],
            "-p 80\\n: \"80\\n\" has no backend; write PORT:BACKEND, as in 80:192.168.1.10",
        ),
        (
            &["eth1"],
            &["82:10.0.0.1", "0:10.0.0.1", "80:10.0.0.1/x"],
            "-p 0:10.0.0.1: there is no port 0; write a number from 1 to 65535\n\
             -p 80:10.0.0.1/x: \"x\" is not a protocol; write tcp, udp, tcp+udp or any",
        ),
        (
            &[],
            &["80:10.0.0.1/tcp+udp"],
            "-p 80:10.0.0.1/tcp+udp: listen: rule \"81/tcp\" (portfwd.toml:1) and rule \"80/tcp+udp\" (-p 80:10.0.0.1/tcp+udp) both listen on tcp 80; change one of them, or remove it",
        ),
        (
            &[],
            &["80:10.0.0.2", "80:10.0.0.3"],
            "-p 80:10.0.0.3: listen: rule \"81/tcp\" (-p 80:10.0.0.2) and rule \"80/tcp\" (-p 80:10.0.0.3) both listen on tcp 80; change one of them, or remove it",
        ),
        (
            &[],
            &["81:10.0.0.2"],
            "-p 81:10.0.0.2: rule \"81/tcp\": name: the rule at portfwd.toml:1 has this name already; give each its own",
        ),
        (
            &[],
            &["40000:10.0.0.2"],
            "-p 40000:10.0.0.2: rule \"40000/tcp\": listen: 40000 is among the ports 40000-60999, by which rule \"m\" (portfwd.toml:5) masquerades; listen on others, or set [masquerade] ports",
        ),
    ] {
        let mut config = good(
            "[[rule]]\nname = '81/tcp'\nlisten = 80\nto = '10.0.0.1'\n\
             [[rule]]\nname = 'm'\nlisten = '7'\nto = '10.0.0.1'\nsource = 'masquerade'\n",
        );
        let before = config.clone();
        assert_eq!(flags(&mut config, interfaces, specs), Err(message.to_owned()));
        assert_eq!(config, before);
    }
}

#[test]
fn a_hundred_thousand_rules() {
    let text: String = (0..100_000u32)
        .map(|i| {
            let (net, host, port) = (i / 50_000, i % 200 + 1, i % 50_000 / 200 + 1);
            format!("[[rule]]\nlisten = \"198.51.{net}.{host}:{port}\"\nto = \"10.0.0.1:{port}\"\n")
        })
        .collect();
    assert_eq!(good(&text).rules.len(), 100_000);
    let again = text.clone() + "[[rule]]\nlisten = '198.51.0.1:1'\nto = '10.0.0.2'\n";
    assert_eq!(
        bad(&again),
        "portfwd.toml:300001: listen: rule \"198.51.0.1:1/tcp\" (portfwd.toml:1) and rule \"198.51.0.1:1/tcp\" (portfwd.toml:300001) both listen on tcp 198.51.0.1:1; change one of them, or remove it"
    );
}

proptest! {
    #[test]
    fn no_file_panics(
        lines in prop::collection::vec(
            prop::sample::select(vec![
                "[interfaces]", "[metrics]", "[names]", "[[rule]]", "[rule]", "external = ['eth0']",
                "internal = [1, 'a', ['b']]", "attach = 'tc'", "listen = '127.0.0.1:9'", "listen = 80",
                "listen = -0x1", "listen = 1979-05-27", "to = ['10.0.0.1', '10.0.0.2']", "to = 'a'", "to = {",
                "name = \"a\\nb\"", "name = 'é'", "refresh = 1e9", "protocol = 'any'", "source = 'masquerade'",
                "[flows]", "[masquerade]", "udp = '5m'", "udp = ''", "tcp = -1", "size = 1024", "size = 'é'",
                "ports = '40000-60999'", "ports = '*'", "ports = 1", "to = ['a', 'a']", "listen = '1-65535'",
                "rule.a.b = 1", "rule = [{}, 1]", "enabled = false", "enabled = 0", "]", "\"\"\"", "é = 'é'", "\u{1}", "",
            ]),
            0..20,
        ),
        text in ".*",
    ) {
        for text in [lines.join("\n"), text, lines.join("\r\n")] {
            let count = text.split('\n').count();
            let Err(errors) = parse(Path::new("f"), &text) else { continue };
            prop_assert!(!errors.0.is_empty());
            let mut before = 0;
            for line in errors.to_string().split('\n') {
                // Each names its line, in order, and has a remedy.
                let number = line.strip_prefix("f:").and_then(|rest| rest.split(':').next());
                let number: usize = number.and_then(|number| number.parse().ok()).unwrap_or(0);
                prop_assert!((1..=count).contains(&number) && number >= before, "{line}");
                prop_assert!(line.contains("; "), "{line}");
                before = number;
            }
        }
    }
}

proptest! {
    #[test]
    fn pieces_mean_what_the_whole_does(
        lines in prop::collection::vec(
            prop_oneof![
                8 => (1..500u16, "[a-c]?").prop_map(|(port, name)| {
                    let name = if name.is_empty() { name } else { format!("name = '{name}'\n") };
                    format!("[[rule]]\n{name}listen = {port}\nto = '10.0.0.1:{port}'")
                }),
                2 => prop::sample::select(vec![
                    "[interfaces]\nexternal = ['eth0']", "[metrics]", "[names]\nrefresh = 5", "[[rule]]",
                    "[masquerade]\nports = '2000-4000'", "[flows]\nudp = 1", "source = 'masquerade'",
                    "rule = []", "rule = [", "]", "[rule]", "[rule.sub]", "[[rule.sub]]", "  [[rule]]",
                    "listen = 80", "enabled = false", "nothing = 1", "name = \"\"\"", "\"\"\"", "'''", "# [[rule]]",
                    "# \"\"\"", "\u{feff}", "x = '", "",
                ])
                .prop_map(str::to_owned),
            ],
            0..12,
        ),
        size in 0..200usize,
    ) {
        for text in [lines.join("\n"), lines.join("\n").replace('\n', "\r\n")] {
            let parsed = |size| super::file::parse_by(Path::new("f"), &text, size);
            prop_assert_eq!(parsed(size), parsed(usize::MAX), "{}", text);
        }
    }
}

/// Backends, some of which are equal or do not fit.
fn targets() -> impl Strategy<Value = Vec<Target>> {
    let hosts = prop::sample::select(vec!["10.0.0.1", "10.0.0.2", "[fd00::1]", "web.example"]);
    let ports = prop::sample::select(vec!["", ":80", ":90", ":80-89", ":90-99", ":80-88"]);
    let target = (hosts, ports).prop_map(|(host, ports)| format!("{host}{ports}").parse().unwrap());
    prop::collection::vec(target, 1..6)
}

proptest! {
    #[test]
    fn a_list_of_backends_is_what_was_written(
        to in targets(),
        listen in prop::sample::select(vec!["80", "80-89", "*", "203.0.113.7:80-89", "[fd00::2]:80"]),
        masquerade in any::<bool>(),
    ) {
        let source = if masquerade { Source::Masquerade } else { Source::Preserve };
        let lines: String = to.iter().map(|target| format!("  '{target}',\n")).collect();
        let text = format!("[[rule]]\nname = 'a'\nlisten = '{listen}'\nsource = '{source}'\nto = [\n{lines}]\n");
        let listen: rule::Listen = listen.parse().unwrap();
        let fits = |target: &Target| {
            let ports = target.ports.unwrap_or(listen.ports);
            let width = ports.width() == 1 || ports.width() == listen.ports.width();
            let v6 = target.to_string().starts_with(['[', 'f']);
            let name = |target: &Target| target.to_string().starts_with('w');
            // With masquerade, all are as the first.
            let first = to.iter().find(|target| !name(target));
            let first = first.map(|target| target.to_string().starts_with(['[', 'f']));
            let family = listen.address.map(|address| match masquerade {
                true => first.unwrap_or(v6),
                false => address.is_ipv6(),
            });
            width && (name(target) || family.is_none_or(|family| family == v6))
        };
        let same = |a: &Target, b: &Target| {
            let of = |target: &Target| target.ports.map_or(listen.ports.to_string(), |p| p.to_string());
            a.host == b.host && of(a) == of(b)
        };
        let wrong = |item: &usize| {
            !fits(&to[*item]) || to[..*item].iter().any(|other| same(other, &to[*item]))
        };
        let wrong: Vec<usize> = (0..to.len()).filter(wrong).collect();
        match parse(Path::new("f"), &text) {
            Ok(config) => {
                prop_assert_eq!(wrong, Vec::<usize>::new());
                prop_assert_eq!(&config.rules[0].to[..], &to[..]);
                prop_assert_eq!(config.rules[0].source, source);
            }
            Err(errors) => {
                let errors = errors.to_string();
                // Each backend has its line.
                let mut blamed: Vec<usize> = errors
                    .lines()
                    .map(|line| line.split(':').nth(1).unwrap().parse::<usize>().unwrap() - 6)
                    .collect();
                blamed.dedup();
                prop_assert_eq!(blamed, wrong, "{}", errors);
            }
        }
    }

    #[test]
    fn times_are_read_as_they_are_printed(milliseconds in 1000..86_400_000u64) {
        let time = Duration::from_millis(milliseconds);
        let text = humantime::format_duration(time).to_string();
        prop_assert_eq!(good(&format!("names.refresh = '{text}'")).refresh, time);
        let dense = text.replace(' ', "");
        prop_assert_eq!(good(&format!("flows.tcp = '{dense}'")).flows.timeouts.tcp, time);
    }
}
