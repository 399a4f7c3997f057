use std::path::Path;

use super::*;
use crate::config::parse;

fn config(text: &str) -> Config {
    parse(Path::new("f.toml"), text).unwrap()
}

const FILE: &str = "\
[interfaces]
external = 'eth0'
[[rule]]
name = 'web'
listen = 80
to = '10.0.0.1'
[[rule]]
name = 'old'
listen = 81
to = '10.0.0.1'
enabled = false
[[rule]]
listen = 82
to = ['10.0.0.1', 'web.lan:80']
source = 'masquerade'
mss = 1360
";

#[test]
fn what_says_the_same_does_not_differ() {
    let rules: Vec<&str> = FILE.split("[[rule]]").collect();
    let other = format!(
        "# {}[[rule]]{}[[rule]]{}[[rule]]{}",
        rules[0].replacen("[int", "\n[int", 1),
        rules[3],
        rules[2],
        rules[1]
    );
    let diff = diff(&config(FILE), &config(&other));
    assert!(diff.is_empty(), "{diff}");
    assert_eq!(diff.to_string(), "");
}

#[test]
fn rules_that_differ() {
    let running = FILE
        .replace("name = 'web'\nlisten = 80", "name = 'web'\nlisten = 8080\nmss = false")
        .replace("name = 'old'", "name = 'new \"one\"'")
        .replace("listen = 82", "listen = 82\nenabled = false")
        + "[[rule]]\nlisten = '*'\nto = '10.0.0.9'\nprotocol = 'any'\n";
    let diff = diff(&config(FILE), &config(&running));
    assert_eq!(
        diff.to_string(),
        "- rule \"old\": 81:10.0.0.1/tcp, off\n\
         + rule \"*/any\": *:10.0.0.9/any\n\
         + rule \"new \\\"one\\\"\": 81:10.0.0.1/tcp, off\n\
         ~ rule \"web\": 80:10.0.0.1/tcp -> 8080:10.0.0.1/tcp, mss false\n\
         ~ rule \"82/tcp\": on -> off"
    );
    let json = serde_json::to_string(&diff).unwrap();
    assert_eq!(serde_json::from_str::<Diff>(&json).unwrap(), diff);
    assert_eq!(
        json,
        "{\"only_running\":[{\"name\":\"*/any\",\"rule\":\"*:10.0.0.9/any\",\"enabled\":true},\
         {\"name\":\"new \\\"one\\\"\",\"rule\":\"81:10.0.0.1/tcp\",\"enabled\":false}],\
         \"only_file\":[{\"name\":\"old\",\"rule\":\"81:10.0.0.1/tcp\",\"enabled\":false}],\
         \"differ\":[{\"name\":\"web\",\"file\":\"80:10.0.0.1/tcp\",\"running\":\"8080:10.0.0.1/tcp, mss false\"}],\
         \"switched\":[{\"name\":\"82/tcp\",\"running\":false}],\"settings\":[]}"
    );
    let back = super::diff(&config(&running), &config(FILE));
    assert_eq!(back.to_string().lines().last(), Some("~ rule \"82/tcp\": off -> on"));
}

#[test]
fn each_setting_counts() {
    let settings = "\
[interfaces]
external = ['eth0', 'eth1']
internal = 'eth2'
attach = 'tc'
[interfaces.eth1]
attach = 'native'
[metrics]
listen = '127.0.0.1:9464'
[names]
refresh = 60
[flows]
size = 2048
udp = '6m'
udp_unanswered = '3m'
tcp = '1h'
tcp_transitory = '5m'
[masquerade]
ports = '10000-20000'
";
    assert_eq!(
        diff(&Config::default(), &config(settings)).to_string(),
        "~ [interfaces] external: none -> eth0, eth1\n\
         ~ [interfaces] internal: none -> eth2\n\
         ~ [interfaces] attach: auto -> tc\n\
         ~ [metrics] listen: none -> 127.0.0.1:9464\n\
         ~ [names] refresh: 30s -> 1m\n\
         ~ [flows] size: 65536 -> 2048\n\
         ~ [flows] udp: 5m -> 6m\n\
         ~ [flows] udp_unanswered: 2m -> 3m\n\
         ~ [flows] tcp: 2h 4m -> 1h\n\
         ~ [flows] tcp_transitory: 4m -> 5m\n\
         ~ [masquerade] ports: 40000-60999 -> 10000-20000\n\
         ~ [interfaces.eth1] attach: none -> native"
    );
}
