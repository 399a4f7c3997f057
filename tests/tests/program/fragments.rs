//! Fragments of packets of a rule, both ways.

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::{Direction, Dropped, Passed};
use portfwd_tests::is_root;

use crate::router::{Flow, Outcome, Router, Version, WEB, comes, in_both, with_router};
use portfwd_tests::packet::{Packet, TCP, fragments, repair_ipv4};

const PASSED: Outcome = Outcome::Pass(Passed::Fragment);

/// A long packet of a flow in fragments, as they come and as they must leave.
fn cut(flow: &Flow, identification: u16, size: usize) -> Vec<[Vec<u8>; 2]> {
    let came = Packet { payload: (0..999).map(|i| (i * 7) as u8).collect(), ..flow.came() };
    let of = |packet: &Packet| fragments(&packet.bytes(), identification, size);
    of(&came).into_iter().zip(of(&flow.goes(&came))).map(|(came, goes)| [came, goes]).collect()
}

fn redirects(router: &mut Router, name: &str, flow: &Flow, [came, goes]: &[Vec<u8>; 2]) {
    let seen = router.try_frame(flow.role, flow.link, came);
    assert_eq!(seen.outcome, Outcome::Redirect, "{name}: {flow:?}");
    assert_eq!(seen.frame, *goes, "{name}: {flow:?}");
    let (rule, direction) = seen.rule.unwrap();
    assert_eq!((rule, direction), (flow.version.rule(WEB[0]), Some(flow.direction)), "{name}");
}

#[test]
fn they_leave_as_fragments_of_the_translated_packet() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            for size in [24, 64, 512] {
                let parts = cut(&flow, size as u16, size);
                assert!(parts.len() > 1);
                for (number, part) in parts.iter().enumerate() {
                    redirects(router, &format!("{number} of {size}"), &flow, part);
                }
                // The last, and all that came before, in another order.
                for part in parts.iter().rev() {
                    redirects(router, "backwards", &flow, part);
                }
            }
        }
    });
}

#[test]
fn those_of_several_flows_may_be_mixed() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        // All have the same identification, and those of a family the same addresses but for the way.
        let mut flows = Flow::all();
        // In IPv6 the protocol does not tell them apart.
        flows.retain(|flow| flow.version == Version::V4 || flow.protocol == TCP);
        let parts: Vec<_> = flows.iter().map(|flow| cut(flow, 7, 256)).collect();
        for number in 0..parts[0].len() {
            for (flow, parts) in flows.iter().zip(&parts) {
                redirects(router, "mixed", flow, &parts[number.min(parts.len() - 1)]);
            }
        }
    });
}

#[test]
fn without_their_first_they_pass() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let both = Flow { role: Role::Both, ..flow.clone() };
            // In IPv6 the protocol does not tell packets apart.
            let number = 0x4300 + u16::from(flow.protocol);
            let parts = cut(&flow, number, 256);
            for flow in [&flow, &both] {
                router.refuses("no first", flow, &parts[1][0], PASSED);
            }
            redirects(router, "first", &flow, &parts[0]);
            redirects(router, "second", &both, &parts[1]);
            let [other, ..] = &cut(&flow, number + 0x100, 256)[1];
            router.refuses("another packet's", &flow, other, PASSED);
            // Another packet of the same number begins before the first one's last came.
            let unclaimed = Flow {
                source: (flow.source.ip(), 81).into(),
                destination: (flow.destination.ip(), 81).into(),
                ..flow.clone()
            };
            let [first, ..] = &cut(&unclaimed, number + 0x200, 256)[0];
            router.refuses("unclaimed", &unclaimed, first, Outcome::Pass(Passed::NoRule));
            router.refuses(
                "unclaimed",
                &unclaimed,
                &cut(&unclaimed, number + 0x200, 256)[1][0],
                PASSED,
            );
            // In one role they are not known to the other.
            let strange = match flow.direction {
                Direction::Forward => Flow { role: Role::Internal, ..flow.clone() },
                Direction::Reply => Flow { role: Role::External, ..flow.clone() },
            };
            let seen = router.try_frame(strange.role, strange.link, &parts[1][0]);
            assert!(matches!(seen.outcome, Outcome::Pass(_)), "{seen:?}");
        }
    });
}

#[test]
fn a_first_one_without_all_of_its_header_passes() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            for size in [8, 16, 24] {
                let parts = cut(&flow, 7 + size as u16, size);
                if flow.protocol == TCP && size < 20 {
                    router.refuses("tiny", &flow, &parts[0][0], PASSED);
                    router.refuses("its next", &flow, &parts[1][0], PASSED);
                } else {
                    redirects(router, "enough", &flow, &parts[0]);
                }
            }
        }
    });
}

#[test]
fn at_their_limits() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let parts = cut(&flow, 77, 504);
            redirects(router, "first", &flow, &parts[0]);
            let at = |frame: &[u8], offset: u16| {
                let mut frame = frame.to_vec();
                if flow.version == Version::V4 {
                    frame[20..22].copy_from_slice(&(offset / 8).to_be_bytes());
                    repair_ipv4(&mut frame);
                } else {
                    frame[56..58].copy_from_slice(&offset.to_be_bytes());
                }
                frame
            };
            let [came, goes] = &parts[1];
            let length = came.len() - if flow.version == Version::V4 { 34 } else { 62 };
            let last = (65535 - length) as u16 & !7;
            let parts = [at(came, last), at(goes, last)];
            redirects(router, "the longest packet", &flow, &parts);
            let beyond = at(came, last + 8);
            let outcome = Outcome::Pass(Passed::Malformed);
            router.refuses("longer than any", &flow, &beyond, outcome);
        }
    });
}

#[test]
fn cut_short_they_pass() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let parts = cut(&flow, 9, 64);
            redirects(router, "first", &flow, &parts[0]);
            for [came, _] in &parts[..2] {
                for length in (14..came.len()).filter(|length| comes(&came[..*length])) {
                    let outcome = Outcome::Pass(Passed::Malformed);
                    router.refuses("cut", &flow, &came[..length], outcome);
                }
            }
        }
    });
}

/// What is not translated says nothing of what follows.
#[test]
fn only_those_whose_first_one_left() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&["8080:@104.10:80/tcp+udp"]));
        for version in Version::BOTH {
            let flow = Flow::forward(version, TCP, 8080, (10, 80));
            let parts = cut(&flow, 9, 64);
            let dropped = Outcome::Drop(Dropped::NoRoute);
            router.refuses("no route", &flow, &parts[0][0], dropped);
            router.refuses("its next", &flow, &parts[1][0], PASSED);
        }
    });
}

#[test]
fn with_options_before_and_behind() {
    if !is_root() {
        return;
    }
    with_router(|router| {
        router.load(&in_both(&WEB));
        for flow in Flow::all() {
            let options = |number| (number, vec![0, 0, 1, 4, 0, 0, 0, 0]);
            let header = |offset: u8, more: u8| (44, vec![0, 0, 0, offset | more, 1, 2, 3, 4]);
            let part = |offset: u8, more: u8| {
                let mut packet = flow.came();
                if packet.is_v4() {
                    packet.options = vec![1; 12];
                    packet.fragment = (u16::from(offset) / 8) | (u16::from(more) << 13);
                } else {
                    let behind = (offset == 0).then(|| options(60));
                    let before = [options(0), options(60), header(offset, more)];
                    packet.extensions = before.into_iter().chain(behind).collect();
                }
                packet
            };
            let first = part(0, 1);
            router.redirects("first", &flow, &first, &flow.goes(&first));
            // What a later one has is nothing but bytes, though they read as ports.
            let later = part(128, 0);
            let mut goes = flow.goes(&later).bytes();
            let bytes = later.bytes();
            let payload =
                bytes.len() - later.payload.len() - if flow.protocol == TCP { 20 } else { 8 };
            goes[payload..].copy_from_slice(&bytes[payload..]);
            redirects(router, "later", &flow, &[bytes, goes]);
        }
    });
}
