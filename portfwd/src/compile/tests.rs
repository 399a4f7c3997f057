//! Tables are read back the way a packet reads them, and compared with what the rules say.

use portfwd_ebpf::table::Page;
use proptest::prelude::*;

use super::*;

const BOX: BoxPorts = BoxPorts { ephemeral: 32768..=60999, masquerade: 40_000..=41_999 };

fn rules(specs: &[&str]) -> Vec<Rule> {
    specs
        .iter()
        .map(|spec| spec.parse().unwrap_or_else(|error| panic!("{spec}: {error}")))
        .collect()
}

fn externals() -> Externals {
    Externals {
        v4: vec![[198, 51, 100, 1].into(), [198, 51, 100, 7].into()],
        v6: vec!["2001:db8::1".parse().unwrap()],
    }
}

/// Why each of these rules is stateful, if it is.
fn reasons(specs: &[&str]) -> Vec<Option<Stateful>> {
    let plan = plan(&rules(specs), &Resolved::new()).unwrap();
    (0..specs.len()).map(|rule| plan.stateful.get(&rule).copied()).collect()
}

/// From this port on: where it leads, and the name of the rule.
type Range<'a> = (u16, Option<(Translation, &'a str)>);

/// The kernel's tables, as updates fill them.
#[derive(Default)]
struct Kernel {
    compiler: Compiler,
    translations: HashMap<u32, Translation>,
    pages: HashMap<u32, Page>,
    endpoints: HashMap<u32, Endpoint>,
    addresses: HashMap<EndpointKey, u32>,
    generation: u32,
}

impl Kernel {
    fn load(&mut self, rules: &[Rule], externals: &Externals) -> Update {
        let plan = plan(rules, &Resolved::new()).unwrap_or_else(|refused| panic!("{refused}"));
        let update = self.compiler.compile(rules, &plan, externals, &BOX);
        assert_ne!(update.generation, self.generation);
        self.write(&update);
        self.go_live(&update);
        update
    }

    /// `update` was written.
    fn go_live(&mut self, update: &Update) {
        self.generation = update.generation;
        for key in &update.gone {
            self.addresses.remove(key);
        }
        self.compiler.commit(update);
    }

    /// Where each port leads, as ranges: by address and protocol the first port, the translation but
    /// for its counter, and the name of its rule. Addresses that lead nowhere are left out.
    fn meaning(&self) -> BTreeMap<Table, Vec<Range<'_>>> {
        let mut meaning = BTreeMap::new();
        for (key, number) in &self.addresses {
            let endpoint = self.endpoints.get(number).copied().unwrap_or_default();
            let Claims { tcp, udp, other } = endpoint.generations[self.generation as usize];
            for (protocol, table) in [(TCP, tcp), (UDP, udp), (OTHER, other)] {
                let mut ranges = vec![(0, None)];
                for port in (0..1024).chain(65_000..=u16::MAX) {
                    let row = self.row(&table, port);
                    if row != 0 || ranges.last().is_some_and(|(_, found)| found.is_some()) {
                        let found = (row != 0).then(|| {
                            let row = self.translations[&row];
                            let name = self.compiler.names.get(row.counter as usize);
                            (Translation { counter: 0, pool: 0, ..row }, name)
                        });
                        if ranges.last().is_none_or(|(_, last)| *last != found) {
                            ranges.push((port, found));
                        }
                    }
                }
                if ranges.len() > 1 || ranges[0].1.is_some() {
                    meaning.insert((*key, protocol), ranges);
                }
            }
        }
        meaning
    }

    /// The row of a port.
    fn row(&self, ports: &PortTable, port: u16) -> u32 {
        if ports.first <= ports.last {
            return if (ports.first..=ports.last).contains(&port) { ports.row } else { 0 };
        }
        let [high, low] = port.to_be_bytes().map(usize::from);
        let page = |number: u32, place: usize| match number {
            0 => 0,
            number => self.pages[&number].0[place],
        };
        page(page(ports.row, high), low)
    }

    /// Rows and pages that packets can reach now.
    fn live(&self) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let (mut rows, mut pages) = (BTreeSet::new(), BTreeSet::new());
        for endpoint in self.addresses.values().filter_map(|number| self.endpoints.get(number)) {
            let Claims { tcp, udp, other } = endpoint.generations[self.generation as usize];
            for table in [tcp, udp, other] {
                if table.first <= table.last {
                    rows.insert(table.row);
                } else if table.row != 0 {
                    pages.insert(table.row);
                    for page in self.pages[&table.row].0.iter().filter(|page| **page != 0) {
                        pages.insert(*page);
                        rows.extend(self.pages[page].0.iter().filter(|row| **row != 0));
                    }
                }
            }
        }
        (rows, pages)
    }

    /// Asserts that packets see the same until this is made live, whatever part of it is written.
    fn assert_harmless(&self, update: &Update) {
        let (rows, pages) = self.live();
        assert!(update.translations.iter().all(|(number, _)| !rows.contains(number)));
        assert!(update.pages.iter().all(|(number, _)| !pages.contains(number)));
        let live = self.generation as usize;
        let claims = |endpoint: &Endpoint| endpoint.generations[live];
        let used: BTreeSet<u32> = self.addresses.values().copied().collect();
        for (number, endpoint) in update.endpoints.iter().filter(|(it, _)| used.contains(it)) {
            let there = self.endpoints.get(number).copied().unwrap_or_default();
            assert_eq!(claims(endpoint), claims(&there));
        }
        for (key, number) in &update.new {
            let claimed = update.endpoints.iter().find(|(other, _)| other == number).unwrap();
            assert_eq!(claims(&claimed.1), Claims::default(), "{key:?}");
            assert!(
                self.addresses.iter().all(|(other, row)| (other == key) == (row == number)
                    || other != key && row != number)
            );
        }
        for key in &update.gone {
            let number = self.addresses.get(key).or_else(|| {
                update.new.iter().find(|(other, _)| other == key).map(|(_, number)| number)
            });
            let row = update.endpoints.iter().find(|(other, _)| Some(other) == number).unwrap();
            assert_eq!(row.1, Endpoint::default(), "{key:?}");
        }
    }

    /// Writes everything but what makes it live.
    fn write(&mut self, update: &Update) {
        self.assert_harmless(update);
        for (number, row) in &update.translations {
            assert_ne!(*number, 0);
            self.translations.insert(*number, *row);
        }
        for (number, page) in &update.pages {
            assert_ne!(*number, 0);
            self.pages.insert(*number, page.page());
        }
        self.endpoints.extend(update.endpoints.iter().copied());
        self.addresses.extend(update.new.iter().copied());
    }

    /// The row that a packet to or from this end finds.
    fn row_of(&self, direction: Direction, end: &str, protocol: u8) -> Option<Translation> {
        let (address, port) = end.rsplit_once(':').unwrap();
        let port: u16 = port.parse().unwrap();
        let address: IpAddr = address.trim_matches(['[', ']']).parse().unwrap();
        let endpoint = &self.endpoints[self.addresses.get(&(direction, address))?];
        let claims = &endpoint.generations[self.generation as usize];
        let ports = if protocol == TCP { claims.tcp } else { claims.udp };
        let row = self.row(&ports, port);
        if row == 0 {
            return None;
        }
        Some(self.translations[&row])
    }

    /// What a packet to or from this end finds: the new address and port, and the flags.
    fn find(&self, direction: Direction, end: &str, protocol: u8) -> Option<(String, u32)> {
        let row = self.row_of(direction, end, protocol)?;
        let (address, port) = end.rsplit_once(':').unwrap();
        let port = row.port(portfwd_ebpf::table::Port::new(port.parse().unwrap())).number();
        let end = if address.starts_with('[') {
            format!("[{}]:{port}", Ipv6Addr::from(row.address.narrow::<16>().0))
        } else {
            format!("{}:{port}", Ipv4Addr::from(row.address.narrow::<4>().0))
        };
        Some((end, row.flags))
    }

    /// The backends of a row that leads to several, for port 80.
    fn backends(&self, row: &Translation) -> Vec<String> {
        let rows = &self.pages[&row.pool].0[..usize::from(row.backends)];
        let end = |row: &u32| {
            let row = self.translations[row];
            let port = row.port(portfwd_ebpf::table::Port::new(80)).number();
            format!("{}:{port}", Ipv4Addr::from(row.address.narrow::<4>().0))
        };
        rows.iter().map(end).collect()
    }

    fn forward(&self, end: &str, protocol: u8) -> Option<String> {
        self.find(Direction::Forward, end, protocol).map(|(end, _)| end)
    }

    fn reply(&self, end: &str, protocol: u8) -> Option<String> {
        self.find(Direction::Reply, end, protocol).map(|(end, _)| end)
    }
}

fn loaded(specs: &[&str]) -> Kernel {
    let mut kernel = Kernel::default();
    kernel.load(&rules(specs), &externals());
    kernel
}

#[test]
fn ports_are_kept_changed_and_shifted_and_replies_go_back() {
    let kernel = loaded(&[
        "80:10.0.0.1",
        "8080:10.0.0.2:81",
        "27015-27030:10.0.0.3:1015-1030/udp",
        "[2001:db8::1]:443:[fd00::10]:8443/tcp+udp",
    ]);
    let there = [
        (TCP, "198.51.100.1:80", "10.0.0.1:80"),
        (TCP, "198.51.100.1:8080", "10.0.0.2:81"),
        (UDP, "198.51.100.1:27015", "10.0.0.3:1015"),
        (UDP, "198.51.100.1:27022", "10.0.0.3:1022"),
        (UDP, "198.51.100.1:27030", "10.0.0.3:1030"),
        (TCP, "[2001:db8::1]:443", "[fd00::10]:8443"),
        (UDP, "[2001:db8::1]:443", "[fd00::10]:8443"),
    ];
    for (protocol, external, backend) in there {
        assert_eq!(kernel.forward(external, protocol).as_deref(), Some(backend));
        assert_eq!(kernel.reply(backend, protocol).as_deref(), Some(external));
    }
    for (protocol, end) in [
        (UDP, "198.51.100.1:80"),
        (TCP, "198.51.100.1:81"),
        (TCP, "198.51.100.1:27015"),
        (UDP, "198.51.100.1:27014"),
        (UDP, "198.51.100.1:27031"),
        (TCP, "198.51.100.2:80"),
        (TCP, "[2001:db8::2]:443"),
    ] {
        assert_eq!(kernel.forward(end, protocol), None, "{end}");
    }
    assert_eq!(kernel.reply("10.0.0.3:1031", UDP), None);
    assert_eq!(kernel.reply("10.0.0.1:81", TCP), None);
}

#[test]
fn the_narrower_rule_wins() {
    let kernel = loaded(&[
        "*:10.0.0.1/any",
        "*:10.0.0.2/udp",
        "1000-2000:10.0.0.3",
        "1500:10.0.0.4",
        "198.51.100.7:*:10.0.0.5/tcp",
        "198.51.100.7:1500:10.0.0.6",
    ]);
    for (protocol, end, backend) in [
        (TCP, "198.51.100.1:999", "10.0.0.1:999"),
        (UDP, "198.51.100.1:999", "10.0.0.2:999"),
        (TCP, "198.51.100.1:1499", "10.0.0.3:1499"),
        (TCP, "198.51.100.1:1500", "10.0.0.4:1500"),
        (TCP, "198.51.100.7:1499", "10.0.0.5:1499"),
        (TCP, "198.51.100.7:1500", "10.0.0.6:1500"),
        (UDP, "198.51.100.7:1500", "10.0.0.2:1500"),
    ] {
        assert_eq!(kernel.forward(end, protocol).as_deref(), Some(backend), "{end}");
    }
}

#[test]
fn what_could_swallow_the_box_asks_for_its_sockets() {
    let kernel = loaded(&[
        "*:10.0.0.1/udp",
        "40000-40010:10.0.0.2",
        "1000-33000:10.0.0.2",
        "40020:10.0.0.3",
    ]);
    for (protocol, end, asks) in [
        (UDP, "198.51.100.1:80", true),
        (TCP, "198.51.100.1:40005", true),
        (TCP, "198.51.100.1:1005", false),
        (TCP, "198.51.100.1:32767", false),
        (TCP, "198.51.100.1:32768", true),
        (TCP, "198.51.100.1:33000", true),
        (TCP, "198.51.100.1:40020", false),
    ] {
        let (_, flags) = kernel.find(Direction::Forward, end, protocol).unwrap();
        assert_eq!(flags & Translation::ASK_SOCKETS != 0, asks, "{end}");
    }
}

#[test]
fn every_udp_port_is_none_of_dhcp_clients() {
    // They read from raw sockets. A rule that names the port means it.
    let kernel = loaded(&["198.51.100.7:*:10.0.0.1/udp", "68:10.0.0.2/udp"]);
    let forward = |end| kernel.forward(end, UDP);
    assert_eq!(forward("198.51.100.7:67").as_deref(), Some("10.0.0.1:67"));
    assert_eq!(forward("198.51.100.7:68").as_deref(), Some("10.0.0.2:68"));
    assert_eq!(forward("198.51.100.7:546"), None);
    assert_eq!(forward("198.51.100.7:547").as_deref(), Some("10.0.0.1:547"));
    assert_eq!(kernel.reply("10.0.0.1:68", UDP), None);
    assert_eq!(kernel.reply("10.0.0.1:67", UDP).as_deref(), Some("198.51.100.7:67"));
}

#[test]
fn the_first_of_several_addresses_answers_unless_another_is_remembered() {
    let kernel = loaded(&["80:10.0.0.1", "[2001:db8::1]:80:[fd00::1]"]);
    let many = Translation::MANY_ADDRESSES;
    let flags = |direction, end| kernel.find(direction, end, TCP).map(|(_, flags)| flags);
    let first = many | Translation::FIRST_ADDRESS;
    assert_eq!(flags(Direction::Forward, "198.51.100.1:80"), Some(first));
    assert_eq!(flags(Direction::Forward, "198.51.100.7:80"), Some(many));
    assert_eq!(flags(Direction::Reply, "10.0.0.1:80"), Some(many));
    assert_eq!(flags(Direction::Forward, "[2001:db8::1]:80"), Some(0));
    assert_eq!(flags(Direction::Reply, "[fd00::1]:80"), Some(0));
}

#[test]
fn a_name_serves_both_families() {
    let rules = rules(&["80:web.example:8080"]);
    let both =
        HostAddresses { v4: Some([10, 0, 0, 1].into()), v6: Some("fd00::1".parse().unwrap()) };
    let plan = plan(&rules, &Resolved::from([("web.example".to_owned(), both)])).unwrap();
    let mut kernel = Kernel::default();
    let update = kernel.compiler.compile(&rules, &plan, &externals(), &BOX);
    let v4 = update.new.iter().filter(|((_, address), _)| address.is_ipv4()).count();
    assert_eq!((v4, update.new.len() - v4), (3, 2));
    assert_eq!(
        explain(&rules, &plan)[0],
        "every external IPv4 address, tcp 80 -> 10.0.0.1, port 8080\n\
         every external IPv6 address, tcp 80 -> fd00::1, port 8080\n\
         stateless: one backend, and no other rule answers differently from its ports"
    );
}

#[test]
fn a_rule_is_explained_with_those_that_come_before_it() {
    let specs = ["80-90:10.0.0.1", "203.0.113.7:85-99:10.0.0.2", "81:10.0.0.3", "81:10.0.0.4/udp"];
    let rules = rules(&specs);
    let plan = plan(&rules, &Resolved::new()).unwrap();
    let [text, narrower, ..] = &explain(&rules, &plan)[..] else { panic!("{plan:?}") };
    assert!(
        text.contains(
            "\nexcept tcp 203.0.113.7:85-90: rule \"203.0.113.7:85-99/tcp\" is narrower\n\
                           except tcp 81: rule \"81/tcp\" is narrower\n"
        ),
        "{text}"
    );
    assert_eq!(text.matches("except").count(), 2);
    assert!(!narrower.contains("except"));
}

#[test]
fn a_rule_to_the_other_ip_version_is_explained_as_such() {
    let mut rules = rules(&["[2001:db8::1]:80:[fd00::5]"]);
    rules[0].to = vec!["10.0.0.5".parse().unwrap()].into();
    (rules[0].source, rules[0].mss) = (Source::Masquerade, rule::Mss::At(1300));
    let plan = plan(&rules, &Resolved::new()).unwrap();
    let text = &explain(&rules, &plan)[0];
    assert!(text.contains("\nheaders of the other IP version (RFC 7915)"), "{text}");
    assert!(
        text.ends_with("\nmss: of no effect, as SYNs to the other IP version stay as they are")
    );
}

#[test]
fn rules_whose_replies_differ_at_one_port_need_flows() {
    let shares = |other| Some(Stateful::SharesPort(other));
    for (specs, expected) in [
        (&["80:10.0.0.1:80", "8080:10.0.0.1:80"][..], vec![shares(1), shares(0)]),
        (&["*:10.0.0.1/any", "8080:10.0.0.1:80"], vec![shares(1), shares(0)]),
        (&["1000-2000:10.0.0.1", "5000:10.0.0.1:2000"], vec![shares(1), shares(0)]),
        (&["198.51.100.1:80:10.0.0.1", "198.51.100.7:80:10.0.0.1"], vec![shares(1), shares(0)]),
        (&["80:10.0.0.1", "198.51.100.7:80:10.0.0.1"], vec![shares(1), shares(0)]),
        (&["53:10.0.0.1/tcp+udp", "54:10.0.0.1:53/udp"], vec![shares(1), shares(0)]),
        (&["1:10.0.0.1", "80:10.0.0.1", "8080:10.0.0.1:80"], vec![None, shares(2), shares(1)]),
        // The same translation, another protocol, another port: nothing to tell apart.
        (&["*:10.0.0.1/any", "80:10.0.0.1", "70-90:10.0.0.1/udp"], vec![None; 3]),
        (&["53:10.0.0.1/tcp", "54:10.0.0.1:53/udp"], vec![None; 2]),
        (&["80:10.0.0.1", "81:10.0.0.1"], vec![None; 2]),
        (&["80:10.0.0.1", "8080:10.0.0.2:80"], vec![None; 2]),
    ] {
        assert_eq!(reasons(specs), expected, "{specs:?}");
    }
    assert_eq!(reasons(&["8000-8099:10.0.0.1:80"]), [Some(Stateful::OnePort)]);
    // Both are; each for the reason that is its own.
    assert_eq!(
        reasons(&["8000-8099:10.0.0.1:80", "80:10.0.0.1"]),
        [Some(Stateful::OnePort), shares(0)]
    );
}

/// A rule with several backends.
fn balanced(spec: &str, more: &[&str]) -> Rule {
    let rule: Rule = spec.parse().unwrap();
    let more = more.iter().map(|to| to.parse().unwrap());
    Rule { to: rule.to.iter().cloned().chain(more).collect(), ..rule }
}

#[test]
fn several_backends_are_led_to_by_one_row_and_answer_by_themselves() {
    let rule = balanced("80:10.0.0.1", &["10.0.0.2:81", "10.0.0.3"]);
    let mut kernel = Kernel::default();
    kernel.load(&[rule], &externals());
    let found = kernel.row_of(Direction::Forward, "198.51.100.7:80", TCP).unwrap();
    let flags = Translation::STATEFUL | Translation::SEVERAL;
    assert_eq!((found.flags, found.backends), (flags, 3));
    assert_eq!(kernel.backends(&found), ["10.0.0.1:80", "10.0.0.2:81", "10.0.0.3:80"]);
    let reply = kernel.find(Direction::Reply, "10.0.0.2:81", TCP).unwrap();
    let flags = Translation::STATEFUL | Translation::ALSO_ALONE;
    assert_eq!(reply, ("198.51.100.1:80".to_owned(), flags));
}

#[test]
fn a_backend_that_is_exchanged_changes_the_pool() {
    let mut kernel = Kernel::default();
    kernel.load(&[balanced("80:10.0.0.1", &["10.0.0.2"])], &externals());
    let update = kernel.load(&[balanced("80:10.0.0.1", &["10.0.0.3"])], &externals());
    let found = kernel.row_of(Direction::Forward, "198.51.100.1:80", TCP).unwrap();
    assert_eq!(kernel.backends(&found), ["10.0.0.1:80", "10.0.0.3:80"]);
    assert!(update.gone.is_empty(), "the next change takes it out");
    assert_eq!(kernel.find(Direction::Reply, "10.0.0.2:80", TCP), None);
    kernel.load(&rules(&["80:10.0.0.1"]), &externals());
    assert_eq!(kernel.compiler.pages.used(), 0);
}

/// Rules that masquerade.
fn masqueraded(specs: &[&str]) -> Vec<Rule> {
    let rule = |spec: &&str| {
        let (listen, to) = spec.split_once(" to ").unwrap();
        let (listen, to) = (listen.parse().unwrap(), [to.parse().unwrap()].into());
        let name = (*spec).to_owned();
        Rule { name, listen, to, source: Source::Masquerade, ..rules(&["80:10.0.0.1"])[0].clone() }
    };
    specs.iter().map(rule).collect()
}

#[test]
fn backends_of_the_other_family_have_flows_that_change_it() {
    let rules = masqueraded(&[
        "[2001:db8::1]:80 to 10.0.0.1:8080",
        "198.51.100.1:80 to [fd00::1]:8080",
        "198.51.100.1:81 to 10.0.0.1:8081",
    ]);
    let plan = plan(&rules, &Resolved::new()).unwrap();
    assert_eq!(plan.legs.iter().map(Leg::crosses).collect::<Vec<_>>(), [true, true, false]);
    let update = Compiler::default().compile(&rules, &plan, &externals(), &BOX);
    let rows: Vec<(Vec<u8>, bool)> = update
        .translations
        .iter()
        .map(|(_, row)| (row.address.0.to_vec(), row.has(Translation::CROSS)))
        .collect();
    let mapped = "::ffff:10.0.0.1".parse::<Ipv6Addr>().unwrap().octets().to_vec();
    let v6 = "fd00::1".parse::<Ipv6Addr>().unwrap().octets().to_vec();
    let v4 = any_address("10.0.0.1".parse().unwrap()).0.to_vec();
    // For answers and for questions. The backend's other answers may be of such a flow too.
    let expected = [(&mapped, [true; 2]), (&v6, [true; 2]), (&v4, [true, false])];
    let expected: Vec<(Vec<u8>, bool)> = expected
        .iter()
        .flat_map(|(address, crosses)| crosses.map(|crosses| ((*address).clone(), crosses)))
        .collect();
    assert_eq!(rows, expected);

    let capacity = |rules: &[Rule]| {
        let plan = super::plan(rules, &Resolved::new()).unwrap();
        Capacity::for_plan(rules, &plan, &BOX, 2048)
    };
    let (with, without) = (capacity(&rules[..1]), capacity(&rules[2..]));
    assert!(with.crosses && with.holds(&update) && with.flows.v6 == Flows(2048));
    assert!(!without.crosses && !without.holds(&update) && without.flows.v6 == Flows(1));
}

#[test]
fn a_name_leads_to_the_other_family_where_it_has_no_other_address() {
    let resolved = |v4: Option<&str>, v6: Option<&str>| {
        let (v4, v6) = (v4.map(|it| it.parse().unwrap()), v6.map(|it| it.parse().unwrap()));
        Resolved::from([("web.lan".to_owned(), HostAddresses { v4, v6 })])
    };
    let rules = masqueraded(&["[2001:db8::1]:80 to web.lan"]);
    let backends = |resolved: &Resolved| -> Vec<IpAddr> {
        plan(&rules, resolved).unwrap().legs.iter().map(|leg| leg.backend).collect()
    };
    let address = |text: &str| -> IpAddr { text.parse().unwrap() };
    assert_eq!(backends(&resolved(Some("10.0.0.1"), None)), [address("10.0.0.1")]);
    assert_eq!(backends(&resolved(Some("10.0.0.1"), Some("fd00::1"))), [address("fd00::1")]);
    assert!(plan(&rules, &resolved(None, None)).is_err());
}

#[test]
fn masquerade_has_its_ports_for_itself() {
    let masquerade = Rule { source: Source::Masquerade, ..rules(&["80:10.0.0.1"])[0].clone() };
    let dmz = rules(&["*:10.0.0.2/any"]).remove(0);
    let mut kernel = Kernel::default();
    kernel.load(&[masquerade, dmz.clone()], &externals());
    for protocol in [TCP, UDP] {
        for (port, claimed) in [(39_999, true), (40_000, false), (41_999, false), (42_000, true)] {
            let found = kernel.forward(&format!("198.51.100.1:{port}"), protocol);
            assert_eq!(found.is_some(), claimed, "{port}");
        }
    }
    let flags = kernel.find(Direction::Forward, "198.51.100.1:80", TCP).unwrap().1;
    assert_eq!(flags, Translation::STATEFUL | Translation::MASQUERADE);
    // Without such a rule they are as any.
    kernel.load(&[dmz], &externals());
    assert!(kernel.forward("198.51.100.1:40000", TCP).is_some());
}

#[test]
fn a_rule_that_needs_flows_says_why() {
    let rules = [
        rules(&["8000-8099:10.0.0.1:80", "80:10.0.0.1"]),
        vec![balanced("81:10.0.0.5", &["10.0.0.6"])],
    ];
    let rules = rules.concat();
    let plan = plan(&rules, &Resolved::new()).unwrap();
    let explained = explain(&rules, &plan);
    for (text, why) in explained.iter().zip([
        "stateful: several listened ports become one, and a reply must find back",
        "stateful: rule \"8000-8099/tcp\" answers differently from a port of the same backend",
        "stateful: several backends, and a flow stays with the one that it began with",
    ]) {
        assert_eq!(text.lines().last(), Some(why));
    }
    assert!(explained[0].contains("tcp 8000-8099 -> 10.0.0.1, port 80"), "{}", explained[0]);
}

#[test]
fn a_name_without_an_address_of_the_family_is_refused() {
    let rules = rules(&["[2001:db8::1]:80:web.example"]);
    let v4 = HostAddresses { v4: Some([10, 0, 0, 1].into()), v6: None };
    let refused = plan(&rules, &Resolved::from([("web.example".to_owned(), v4)])).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "-p [2001:db8::1]:80:web.example: rule \"[2001:db8::1]:80/tcp\": web.example has no address \
         of IPv6, which the rule listens on; check the name, or write an address"
    );
}

#[test]
fn a_change_writes_what_changed() {
    let specs: Vec<String> = (1..=10_000).map(|port| format!("{port}:10.0.0.1")).collect();
    let mut specs: Vec<&str> = specs.iter().map(String::as_str).collect();
    let mut kernel = Kernel::default();
    let all = kernel.load(&rules(&specs), &externals());
    // Forward rows for the first address and the others, and reply rows.
    assert_eq!(all.translations.len(), 30_000);
    let counter = kernel.compiler.counter("5000/tcp");

    let same = kernel.load(&rules(&specs), &externals());
    assert_eq!((same.translations.len(), same.pages.len()), (0, 0));

    specs.push("20000:10.0.0.2");
    let one = kernel.load(&rules(&specs), &externals());
    // At each of the two addresses a page of ports and the one that leads there.
    assert_eq!((one.translations.len(), one.pages.len()), (3, 4));
    assert_eq!((one.endpoints.len(), one.new.len()), (3, 1));
    assert_eq!(kernel.forward("198.51.100.1:20000", TCP).as_deref(), Some("10.0.0.2:20000"));
    assert_eq!(kernel.compiler.counter("5000/tcp"), counter);

    // Numbers are used again once nothing live refers to them.
    let rows = |kernel: &Kernel| kernel.translations.keys().max().copied();
    let pages = |kernel: &Kernel| kernel.pages.keys().max().copied();
    let (most_rows, most_pages) = (rows(&kernel).unwrap(), pages(&kernel).unwrap());
    for turn in 0..10 {
        let last = if turn % 2 == 0 { "20000:10.0.0.3" } else { "20000:10.0.0.2" };
        *specs.last_mut().unwrap() = last;
        kernel.load(&rules(&specs), &externals());
    }
    assert!(rows(&kernel) <= Some(most_rows + 3) && pages(&kernel) <= Some(most_pages + 4));
}

#[test]
fn the_tables_have_room_for_addresses_that_come_and_go() {
    let specs: Vec<String> = (1..=200)
        .map(|port| format!("{port}:10.0.0.1"))
        .chain(["30000-40000:10.0.0.2/udp".to_owned(), "*:10.0.0.3/udp".to_owned()])
        .collect();
    let rules = rules(&specs.iter().map(String::as_str).collect::<Vec<_>>());
    let plan = plan(&rules, &Resolved::new()).unwrap();
    let capacity = Capacity::for_plan(&rules, &plan, &BOX, 1024);
    let mut kernel = Kernel::default();
    // No address at first, as with PPPoE at boot; then one, many, others.
    for last_bytes in [0..0, 1..2, 1..9, 5..7, 0..0, 20..40, 7..8] {
        let v4 = last_bytes.map(|byte| Ipv4Addr::new(198, 51, 100, byte)).collect();
        let update = kernel.load(&rules, &Externals { v4, v6: Vec::new() });
        assert!(capacity.holds(&update), "{capacity:?}");
    }
}

#[test]
fn what_was_not_committed_does_no_harm() {
    let mut kernel = loaded(&["80:10.0.0.1", "81:10.0.0.2"]);
    let other = rules(&["80:10.0.0.9"]);
    let plan = plan(&other, &Resolved::new()).unwrap();
    for _ in 0..3 {
        // Its rows are new numbers: writing them touches nothing that is live.
        let update = kernel.compiler.compile(&other, &plan, &externals(), &BOX);
        kernel.write(&update);
        assert_eq!(kernel.forward("198.51.100.1:80", TCP).as_deref(), Some("10.0.0.1:80"));
        assert_eq!(kernel.reply("10.0.0.2:81", TCP).as_deref(), Some("198.51.100.1:81"));
    }
    kernel.load(&rules(&["80:10.0.0.1", "81:10.0.0.2"]), &externals());
    assert_eq!(kernel.forward("198.51.100.1:81", TCP).as_deref(), Some("10.0.0.2:81"));
}

#[test]
fn sizes_of_segments_are_written_where_they_change() {
    let mut kernel = Kernel::default();
    let with = |sizes: [rule::Mss; 3]| -> Vec<Rule> {
        let rules = rules(&["80:10.0.0.1", "81:10.0.0.1/tcp+udp", "1-9:10.0.0.2"]);
        rules.into_iter().zip(sizes).map(|(rule, mss)| Rule { mss, ..rule }).collect()
    };
    let (auto, off) = (rule::Mss::Auto, rule::Mss::Off);
    let mut load = |sizes| {
        let rules = with(sizes);
        let update = kernel.load(&rules, &externals());
        let row = |place: usize| kernel.compiler.counter(&rules[place].name).unwrap();
        let of = |row_| (0..3).find(|place| row(*place) == row_).unwrap();
        update.mss.iter().map(|(row, mss)| (of(*row), mss.0)).collect::<Vec<_>>()
    };
    assert_eq!(load([auto; 3]), []);
    assert_eq!(load([auto, off, rule::Mss::At(1360)]), [(1, u16::MAX), (2, 1360)]);
    assert_eq!(load([auto, off, rule::Mss::At(1360)]), []);
    assert_eq!(load([off, off, auto]), [(0, u16::MAX), (2, 0)]);
}

#[test]
fn what_was_not_committed_of_sizes_is_written_again() {
    let mut kernel = loaded(&["80:10.0.0.1"]);
    let small: Vec<Rule> = rules(&["80:10.0.0.1"])
        .into_iter()
        .map(|rule| Rule { mss: rule::Mss::At(1000), ..rule })
        .collect();
    let plan = plan(&small, &Resolved::new()).unwrap();
    for _ in 0..2 {
        let update = kernel.compiler.compile(&small, &plan, &externals(), &BOX);
        assert_eq!(update.mss, [(0, Mss(1000))]);
    }
    assert_eq!(kernel.load(&rules(&["80:10.0.0.1"]), &externals()).mss, []);
}

#[test]
fn a_range_needs_no_page_and_equal_pages_are_one() {
    let pages = |specs: &[&str]| {
        let update = Kernel::default().load(&rules(specs), &externals());
        (update.translations.len(), update.pages.len())
    };
    // A row each: first address, second address, reply.
    assert_eq!(pages(&["80:10.0.0.1"]), (3, 0));
    assert_eq!(pages(&["1-20000:10.0.0.1/tcp+udp"]), (3, 0));
    assert_eq!(pages(&["*:10.0.0.1/tcp"]), (3, 0));
    // Each has a root, a page with a hole for each DHCP client, and one for all others.
    assert_eq!(pages(&["*:10.0.0.1/udp"]), (3, 3 * 4));
}

#[test]
fn a_change_undone_before_it_was_live_leaves_nothing() {
    let mut kernel = loaded(&["80:10.0.0.1"]);
    let plan_of = |specs: &[&str]| (rules(specs), plan(&rules(specs), &Resolved::new()).unwrap());
    for backend in ["10.0.0.2", "10.0.0.3"] {
        let (rules, plan) = plan_of(&[&format!("80:{backend}")]);
        let update = kernel.compiler.compile(&rules, &plan, &externals(), &BOX);
        // Half of it: the kernel refused the rest.
        kernel.endpoints.extend(update.endpoints.iter().take(2).copied());
        kernel.addresses.extend(update.new.iter().copied());
    }
    kernel.load(&rules(&["80:10.0.0.1", "81:10.0.0.4"]), &externals());
    assert_eq!(kernel.addresses.len(), 4);
    for (end, backend) in [("80", "10.0.0.1:80"), ("81", "10.0.0.4:81")] {
        assert_eq!(kernel.forward(&format!("198.51.100.7:{end}"), TCP).as_deref(), Some(backend));
    }
    let numbers: std::collections::BTreeSet<_> = kernel.addresses.values().collect();
    assert_eq!(numbers.len(), 4);
}

#[test]
fn what_did_not_fit_is_no_obstacle_to_what_fits() {
    let mut kernel = loaded(&["80:10.0.0.1"]);
    let capacity = Capacity {
        endpoints: 4,
        translations: 10,
        pages: 4,
        ..Capacity::for_plan(&[], &Plan::default(), &BOX, 1024)
    };
    let many: Vec<String> = (1..50).map(|port| format!("{port}:10.0.1.{port}")).collect();
    let many = rules(&many.iter().map(String::as_str).collect::<Vec<_>>());
    let many_plan = plan(&many, &Resolved::new()).unwrap();
    for port in 81..90 {
        let update = kernel.compiler.compile(&many, &many_plan, &externals(), &BOX);
        assert!(!capacity.holds(&update));
        let update = kernel.load(&rules(&[&format!("{port}:10.0.0.1")]), &externals());
        assert!(capacity.holds(&update), "{update:?}");
    }
}

/// Rules over few addresses and ports, so that they meet.
fn few_rules() -> impl Strategy<Value = Vec<Rule>> {
    let listen = prop_oneof![Just(""), Just("198.51.100.1:"), Just("198.51.100.7:")];
    let ports = prop_oneof![
        3 => (1u16..12).prop_map(|port| port.to_string()),
        2 => (1u16..8, 1u16..8).prop_map(|(first, width)| format!("{first}-{}", first + width)),
        1 => Just("*".to_owned()),
    ];
    let shift = prop_oneof![3 => Just(0u16), 1 => 0u16..4];
    let rule = (listen, ports, 1u8..6, shift, prop_oneof![Just("tcp"), Just("udp"), Just("any")])
        .prop_filter_map("a rule", |(listen, ports, backend, shift, protocol)| {
            let to = match ports.split_once('-') {
                _ if ports == "*" || shift == 0 => String::new(),
                Some((first, last)) => {
                    let moved = |port: &str| port.parse::<u16>().unwrap() + 256 * shift;
                    format!(":{}-{}", moved(first), moved(last))
                }
                None => format!(":{}", ports.parse::<u16>().unwrap() + 256 * shift),
            };
            format!("{listen}{ports}:10.0.0.{backend}{to}/{protocol}").parse::<Rule>().ok()
        });
    prop::collection::vec(rule, 1..8)
}

/// Rules that share pages and go over several, with some that are one place after another.
fn rules_over_pages() -> impl Strategy<Value = Vec<Rule>> {
    let listen = prop_oneof![Just(""), Just("198.51.100.1:"), Just("198.51.100.2:")];
    let ports = prop_oneof![
        4 => (1u16..5, 0u16..3).prop_map(|(low, high)| (256 * high + low).to_string()),
        2 => (1u16..300, 1u16..600).prop_map(|(first, width)| format!("{first}-{}", first + width)),
        1 => Just("*".to_owned()),
    ];
    let protocol = prop_oneof![Just("tcp"), Just("udp"), Just("any"), Just("tcp+udp")];
    let rule = (listen, ports, 1u8..5, protocol).prop_filter_map("a rule", |it| {
        let (listen, ports, backend, protocol) = it;
        format!("{listen}{ports}:10.0.0.{backend}/{protocol}").parse::<Rule>().ok()
    });
    prop::collection::vec(rule, 1..16)
}

/// The rules of `pool` in the `mask`, without those that cannot go beside the ones before; their plan
/// is made rule by rule.
fn chosen(pool: &[Rule], mask: u16) -> (Vec<Rule>, Plan) {
    let (mut rules, mut plan) = (Vec::new(), Plan::default());
    for (_, rule) in pool.iter().enumerate().filter(|(place, _)| mask >> place & 1 == 1) {
        rules.push(rule.clone());
        let fits = crate::rule::overlaps(&rules).is_empty();
        if !fits || plan.add(&rules, &Resolved::new()).is_err() {
            rules.pop();
        }
    }
    (rules, plan)
}

#[test]
fn a_dmz_host_gets_all_protocols_but_those_of_the_box() {
    let rules = rules(&["*:10.0.0.1/any", "*:[fd00::1]/any", "*:10.0.0.2/tcp"]);
    let mut kernel = Kernel::default();
    let claimed = |kernel: &Kernel, key: (Direction, &str)| -> BTreeSet<u16> {
        let number = kernel.addresses[&(key.0, key.1.parse().unwrap())];
        let other = kernel.endpoints[&number].generations[kernel.generation as usize].other;
        (0..=u16::MAX).filter(|protocol| kernel.row(&other, *protocol) != 0).collect()
    };
    let ends = [
        (Direction::Forward, "198.51.100.1"),
        (Direction::Forward, "198.51.100.7"),
        (Direction::Forward, "2001:db8::1"),
        (Direction::Reply, "10.0.0.1"),
        (Direction::Reply, "fd00::1"),
    ];
    for own in [BTreeSet::new(), BTreeSet::from([47, 50, 254]), BTreeSet::from([0])] {
        kernel.compiler.leave(&own);
        kernel.load(&rules, &externals());
        let expected: BTreeSet<u16> = (0..=254)
            .filter(|protocol| ![2, 6, 17, 51].contains(protocol) && !own.contains(protocol))
            .map(u16::from)
            .collect();
        for end in ends {
            assert_eq!(claimed(&kernel, end), expected, "{end:?}");
        }
        assert_eq!(claimed(&kernel, (Direction::Reply, "10.0.0.2")), BTreeSet::new());
    }
}

proptest! {
    #[test]
    fn a_plan_grows_and_shrinks_as_if_it_were_made_anew(
        pool in rules_over_pages(), gone in prop::collection::vec(0usize..16, 0..8)
    ) {
        let anew = |rules: &[Rule]| super::plan(rules, &Resolved::new());
        let mut rules: Vec<Rule> = Vec::new();
        let mut plan = Plan::default();
        for rule in &pool {
            rules.push(rule.clone());
            let before = plan.clone();
            let added = plan.add(&rules, &Resolved::new());
            prop_assert_eq!(added.is_ok(), anew(&rules).is_ok());
            if added.is_err() {
                prop_assert_eq!(&plan, &before);
                rules.pop();
            }
        }
        prop_assert_eq!(Ok(plan.clone()), anew(&rules));
        for rule in gone {
            if rule < rules.len() {
                rules.remove(rule);
                plan.remove(&rules, rule);
            }
        }
        prop_assert_eq!(Ok(plan.clone()), anew(&rules));
    }

    #[test]
    fn changes_lead_to_the_same_as_starting_anew(
        pool in rules_over_pages(),
        steps in prop::collection::vec(
            (any::<u16>(), 0u8..6, 0u8..4, prop::bool::weighted(0.7), prop::bool::weighted(0.2)),
            1..8,
        )
    ) {
        let mut kernel = Kernel::default();
        for (mask, first, count, live, tunnel) in steps {
            let (rules, plan) = chosen(&pool, mask);
            let v4 = (0..count).map(|place| [198, 51, 100, 1 + (first + place) % 4].into()).collect();
            // Sometimes another range of ephemeral ports.
            let ephemeral = if first < 4 { BOX.ephemeral } else { 100..=300 };
            let ports = BoxPorts { ephemeral, ..BOX };
            let externals = Externals { v4, v6: Vec::new() };
            let own = tunnel.then_some(47).into_iter().collect();
            kernel.compiler.leave(&own);
            let update = kernel.compiler.compile(&rules, &plan, &externals, &ports);
            kernel.write(&update);
            if !live {
                continue;
            }
            kernel.go_live(&update);
            let mut anew = Kernel::default();
            anew.compiler.leave(&own);
            let update = anew.compiler.compile(&rules, &plan, &externals, &ports);
            anew.write(&update);
            anew.go_live(&update);
            prop_assert_eq!(kernel.meaning(), anew.meaning());

            // Nothing is kept that is not used.
            let compiler = &kernel.compiler;
            let (rows, pages) = kernel.live();
            let placed: usize =
                compiler.legs.iter().flat_map(|leg| leg.rows).filter(|row| *row != 0).count();
            prop_assert_eq!(compiler.rows.last as usize - compiler.rows.free.len(), placed);
            prop_assert!(rows.len() <= placed);
            prop_assert_eq!(pages.len(), anew.live().1.len());
            prop_assert_eq!(kernel.compiler.pages.used(), pages.len());
        }
    }

    #[test]
    fn rules_share_a_port_where_two_legs_answer_it_differently(rules in few_rules()) {
        let legs: Vec<Leg> =
            rules.iter().flat_map(|rule| plan(std::slice::from_ref(rule), &Resolved::new())).enumerate()
                .map(|(number, plan)| Leg { rule: number, ..plan.legs[0] })
                .collect();
        let clash = |a: &Leg, b: &Leg| {
            let ((first, last), (from, to)) = (a.backend_ports(), b.backend_ports());
            let meet = a.backend == b.backend && (a.tcp && b.tcp || a.udp && b.udp);
            meet && first <= to && from <= last && (a.listen, a.becomes) != (b.listen, b.becomes)
        };
        let found = shared_ports(&legs);
        for (number, leg) in legs.iter().enumerate() {
            let clashes = legs.iter().any(|other| clash(leg, other));
            prop_assert_eq!(found.contains_key(&number), clashes, "{:?}", leg);
        }
        for (rule, other) in &found {
            prop_assert!(clash(&legs[*rule], &legs[*other]), "{} {}", rule, other);
        }
    }

    #[test]
    fn tables_say_what_the_rules_say(rules in few_rules()) {
        prop_assume!(crate::rule::overlaps(&rules).is_empty());
        let Ok(plan) = plan(&rules, &Resolved::new()) else { return Ok(()) };
        let mut kernel = Kernel::default();
        kernel.load(&rules, &externals());
        for (address, protocol) in [("198.51.100.1", TCP), ("198.51.100.7", TCP), ("198.51.100.1", UDP)] {
            for port in (1u16..20).chain(255..280) {
                let claims = |rule: &&Rule| {
                    let speaks = if protocol == TCP { rule.protocol.tcp() } else { rule.protocol.udp() };
                    let here = rule.listen.address.is_none_or(|listen| listen.to_string() == address);
                    speaks && here && rule.listen.ports.contains(port)
                };
                let winner = rules.iter().filter(claims).min_by_key(|rule| rule.precedence());
                let expected = winner.map(|rule| {
                    let to = &rule.to[0];
                    let first = to.ports.map_or(rule.listen.ports.first(), |ports| ports.first());
                    format!("{}:{}", to.host, port - rule.listen.ports.first() + first)
                });
                let external = format!("{address}:{port}");
                prop_assert_eq!(kernel.forward(&external, protocol), expected.clone(), "{}", external);
                // Whoever listens on one address only answers from there; the others from the first.
                let Some(backend) = expected else { continue };
                let from = match winner.and_then(|rule| rule.listen.address) {
                    Some(listen) => format!("{listen}:{port}"),
                    None => format!("198.51.100.1:{port}"),
                };
                let place = rules.iter().position(|rule| Some(rule) == winner);
                if place.is_some_and(|place| plan.stateful.contains_key(&place)) {
                    let flags = kernel.find(Direction::Reply, &backend, protocol).unwrap().1;
                    prop_assert_ne!(flags & Translation::STATEFUL, 0);
                    continue;
                }
                prop_assert_eq!(kernel.reply(&backend, protocol), Some(from), "{:?}", plan);
            }
        }
    }
}

#[test]
fn a_backend_that_is_the_box_has_flows() {
    let rules = rules(&["80:10.0.0.1:8080", "81:10.0.0.2", "82:10.0.0.2"]);
    let mut plan = plan(&rules, &Resolved::new()).unwrap();
    assert_eq!(plan.stateful, BTreeMap::new());
    assert_eq!(plan.remote().count(), 3);
    let local = BTreeSet::from([IpAddr::from([10, 0, 0, 1])]);
    assert!(plan.locate(&rules, &local));
    assert!(!plan.locate(&rules, &local));
    assert_eq!(plan.stateful, BTreeMap::from([(0, Stateful::Local)]));
    let states = plan.legs.iter().map(|leg| leg.state);
    assert!(states.eq([State::Stateful, State::Stateless, State::Stateless]));
    assert_eq!(plan.remote().count(), 2);
    assert_eq!(
        explain(&rules, &plan)[0],
        "every external IPv4 address, tcp 80 -> 10.0.0.1, port 8080\n\
         stateful: the backend is this box, whose other connections from that port stay as they are"
    );
    assert!(plan.locate(&rules, &BTreeSet::new()));
    assert_eq!(plan.stateful, BTreeMap::new());
}

#[test]
fn a_table_of_flows_tells_how_many_it_was_made_for() {
    for flows in [1, 2, 3, 5, 1000, 16_384, 65_535, 65_536, 1 << 20] {
        let flows = Flows(flows);
        assert_eq!(Flows::with_entries(flows.entries()), flows);
    }
}
