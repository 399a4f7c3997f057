//! Rules that change, and what loading costs.

use portfwd::compile::Capacity;
use portfwd::datapath::Datapath;
use portfwd_ebpf::table::Passed;
use portfwd_tests::is_root;
use portfwd_tests::packet::{TCP, UDP};

use crate::router::{
    CAPACITY, Flow, Outcome, PORTS, Router, Version, hook, in_both, with_router, with_router_of,
};

const NO_RULE: Outcome = Outcome::Pass(Passed::NoRule);

/// Asserts that a port leads to this host, or nowhere.
fn leads(router: &mut Router, version: Version, port: u16, host: Option<u8>) {
    let [forward, reply] = [
        Flow::forward(version, TCP, port, (host.unwrap_or(10), 80)),
        Flow::reply(version, TCP, (host.unwrap_or(10), 80), port),
    ];
    for flow in [forward, reply] {
        let came = flow.came();
        if host.is_some() {
            router.redirects(&format!("port {port}"), &flow, &came, &flow.goes(&came));
        } else {
            router.refuses(&format!("port {port}"), &flow, &came.bytes(), NO_RULE);
        }
    }
}

#[test]
fn packets_see_the_old_rules_until_they_see_the_new() {
    if !is_root() {
        return;
    }
    let stays = "9000:@12.13:80/tcp";
    with_router(|router| {
        for version in Version::BOTH {
            let rules = |host: u8| {
                vec![version.rule(&format!("8080:@12.{host}:80/tcp")), version.rule(stays)]
            };
            router.load(&rules(10));
            leads(router, version, 8080, Some(10));
            leads(router, version, 9000, Some(13));
            let counts = router.counts(&version.rule(stays));
            assert_eq!((counts.forward.packets, counts.reply.packets), (1, 1));

            // Compiled and not written: nothing has changed.
            router.compile_at(&[1], &rules(11));
            leads(router, version, 8080, Some(10));
            // Compiled anew and written: what was forgotten plays no part.
            router.load(&rules(12));
            leads(router, version, 8080, Some(12));
            let gone = Flow::reply(version, TCP, (10, 80), 8080);
            router.refuses("the old backend", &gone, &gone.came().bytes(), NO_RULE);
            leads(router, version, 9000, Some(13));
            let counts = router.counts(&version.rule(stays));
            assert_eq!((counts.forward.packets, counts.reply.packets), (2, 2));

            // A rule that goes keeps its counter for when it comes back.
            router.load(&rules(12)[..1]);
            leads(router, version, 9000, None);
            router.load(&rules(12));
            leads(router, version, 9000, Some(13));
            let counts = router.counts(&version.rule(stays));
            assert_eq!((counts.forward.packets, counts.reply.packets), (3, 3));
        }
    });
}

/// Rows and pages that are free are used again, without harm to those that are not.
#[test]
fn many_changes() {
    if !is_root() {
        return;
    }
    let capacity =
        Capacity { endpoints: 32, translations: 16, pages: 16, counters: 256, ..CAPACITY };
    with_router_of(capacity, |router| {
        for round in 0..60_u16 {
            let host = 10 + (round % 3) as u8;
            let port = 1000 + round * 300;
            router.load(&in_both(&[&format!("{port}:@12.{host}:80/tcp"), "9000:@12.13:80/tcp"]));
            for version in Version::BOTH {
                leads(router, version, port, Some(host));
                leads(router, version, 9000, Some(13));
                if round > 0 {
                    let before = Flow::forward(version, TCP, port - 300, (host, 80));
                    router.refuses("the port before", &before, &before.came().bytes(), NO_RULE);
                }
            }
        }
        for version in Version::BOTH {
            let counts = router.counts(&version.rule("9000:@12.13:80/tcp"));
            assert_eq!((counts.forward.packets, counts.reply.packets), (60, 60));
        }
    });
}

#[test]
fn rules_that_do_not_fit_change_nothing() {
    if !is_root() {
        return;
    }
    let room = Capacity { pages: 256, counters: 256, ..CAPACITY };
    let cases: [(&str, Capacity, &[&str]); 3] = [
        ("TRANSLATIONS", Capacity { translations: 6, ..room }, &["1:@12.11/tcp"]),
        ("PAGES", Capacity { pages: 8, ..room }, &["1-513:@12.11/tcp", "600:@12.12/tcp"]),
        ("ENDPOINTS", Capacity { endpoints: 4, ..room }, &["1:@12.11/tcp", "2:@12.12/tcp"]),
    ];
    for (map, capacity, specs) in cases {
        with_router_of(capacity, |router| {
            let small = in_both(&["8080:@12.10:80/tcp"]);
            router.load(&small);
            for _ in 0..3 {
                let update = router.compile_at(&[1], &in_both(specs));
                let error = router.datapath.apply(&update).unwrap_err().to_string();
                assert!(error.starts_with(&format!("cannot write map {map}: ")), "{error}");
                for version in Version::BOTH {
                    leads(router, version, 8080, Some(10));
                    let new = Flow::forward(version, TCP, 1, (11, 1));
                    router.refuses("new rule", &new, &new.came().bytes(), NO_RULE);
                }
            }
            // What was written of it is no obstacle to rules that fit.
            router.load(&small);
            for version in Version::BOTH {
                leads(router, version, 8080, Some(10));
            }
        });
    }
}

#[test]
fn the_verifier_has_room_to_spare() {
    if !is_root() {
        return;
    }
    // Messages are for looking into things; there the kernel's own limit of a million is enough. Verifiers
    // before 6.3 find fewer states to be the same, and change no more.
    let old = !portfwd::sysctl::verifies_logs();
    for (log, limit) in [(false, if old { 900_000 } else { 500_000 }), (true, 950_000)] {
        // There they do not log.
        if log && old {
            continue;
        }
        let mut datapath = Datapath::load(CAPACITY, &PORTS, log).unwrap();
        datapath.load_programs(hook()).unwrap();
        for verified in datapath.verified() {
            println!("log {log}: {verified:?}");
            let instructions = verified.instructions.expect("this kernel tells");
            assert!(instructions < limit, "{verified:?}");
        }
    }
}

/// Exactly as many packets and bytes as were translated, rule by rule.
#[test]
fn counters_count_each_packet_once() {
    if !is_root() {
        return;
    }
    let specs = ["8080:@12.10:80/tcp+udp", "9000-9009:@12.11/tcp"];
    with_router(|router| {
        router.load(&in_both(&specs));
        for version in Version::BOTH {
            let mut expected = [(0, 0); 4];
            for number in 0..100_u16 {
                let flows = [
                    Flow::forward(version, if number % 3 == 0 { UDP } else { TCP }, 8080, (10, 80)),
                    Flow::reply(version, TCP, (10, 80), 8080),
                    Flow::forward(version, TCP, 9000 + number % 10, (11, 9000 + number % 10)),
                    Flow::reply(version, TCP, (11, 9009), 9009),
                ];
                let which = usize::from(number * 7 % 11 % 4);
                let mut came = flows[which].came();
                came.payload = vec![7; usize::from(number)];
                came.padding = vec![0; usize::from(number % 5)];
                router.redirects("one of many", &flows[which], &came, &flows[which].goes(&came));
                expected[which].0 += 1;
                expected[which].1 += came.length() as u64;
            }
            for (spec, expected) in specs.iter().zip(expected.chunks(2)) {
                let counts = router.counts(&version.rule(spec));
                let tallies = [counts.forward, counts.reply];
                assert_eq!(tallies.map(|tally| (tally.packets, tally.bytes)), *expected);
                assert_eq!(counts.to_stack.iter().chain(&counts.dropped).sum::<u64>(), 0);
            }
        }
    });
}
