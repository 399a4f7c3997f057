//! Fragments of packets.

use super::*;

/// The fragments of the packet in a frame, each but the last with `size` bytes of it; in IPv6 with a
/// fragment header behind `options`.
pub fn fragments(frame: &[u8], identification: u16, size: usize) -> Vec<Vec<u8>> {
    let is_v4 = frame[12] == 8;
    let head = if is_v4 { 34 } else { 54 };
    let payload = &frame[head..];
    let count = payload.len().div_ceil(size);
    let cut = |(number, part): (usize, &[u8])| {
        let mut bytes = frame[..head].to_vec();
        let offset = (number * size) as u16;
        let more = number + 1 < count;
        if is_v4 {
            bytes[16..18].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
            bytes[18..20].copy_from_slice(&identification.to_be_bytes());
            let place = (offset / 8) | if more { 0x2000 } else { 0 };
            bytes[20..22].copy_from_slice(&place.to_be_bytes());
            repair(&mut bytes);
        } else {
            bytes[18..20].copy_from_slice(&(8 + part.len() as u16).to_be_bytes());
            let [high, low] = (offset | u16::from(more)).to_be_bytes();
            let [a, b] = identification.to_be_bytes();
            bytes.extend([bytes[20], 0, high, low, 0, 0, a, b]);
            bytes[20] = 44;
        }
        bytes.extend(part);
        bytes
    };
    payload.chunks(size).enumerate().map(cut).collect()
}

/// Repairs the checksum of an IPv4 header.
pub fn repair(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let Ok((header, _)) = etherparse::Ipv4Header::from_slice(&frame[14..]) else { return };
    frame[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
}

/// The ends of a packet as it comes and as it leaves.
type Ends = [(&'static [u8], u16); 2];

/// Each way, its route, and the ends.
fn ways() -> [(Direction, Told, Ends, Ends); 4] {
    let [v4, v6]: [[&[u8]; 3]; 2] = [[&CLIENT, &BOX, &BACKEND], [&CLIENT6, &BOX6, &BACKEND6]];
    let way = |direction, [client, external, backend]: [&'static [u8]; 3]| {
        let (client, external, backend) = ((client, 5000), (external, 8080), (backend, 80));
        match direction {
            Direction::Forward => (direction, HOP, [client, external], [client, backend]),
            Direction::Reply => (direction, BACK, [backend, client], [external, client]),
        }
    };
    let (forward, reply) = (Direction::Forward, Direction::Reply);
    [way(forward, v4), way(reply, v4), way(forward, v6), way(reply, v6)]
}

/// As a frame leaves: with the link addresses of the route.
fn linked(mut frame: Vec<u8>, told: Told) -> Vec<u8> {
    if told.route == Route::Via {
        frame[..12].copy_from_slice(&told.hop.link.bytes());
    }
    frame
}

#[test]
fn they_leave_as_fragments_of_the_translated_packet() {
    for (direction, route, came, goes) in ways() {
        for protocol in [TCP, UDP] {
            let payload: Vec<u8> = (0..999).map(|i| (i * 7) as u8).collect();
            let router = Router::new(route);
            let whole = frame(protocol, came[0], came[1], 64, &payload);
            let expected = frame(protocol, goes[0], goes[1], 63, &payload);
            let expected = fragments(&expected, 0x1234, 64);
            let came = fragments(&whole, 0x1234, 64);
            for (number, (mut bytes, expected)) in came.iter().cloned().zip(&expected).enumerate() {
                let verdict = router.handle(Role::Both, &mut bytes);
                assert!(matches!(verdict, Verdict::Redirect(_)), "{number}: {verdict:?}");
                assert_eq!(bytes, linked(expected.clone(), route), "{direction:?} {number}");
            }
            assert_eq!(router.packets(direction), came.len() as u64);
            let bytes: usize = came.iter().map(|frame| frame.len() - 14).sum();
            assert_eq!(router.counter.borrow().translated[direction as usize].bytes, bytes as u64);
            // Another order, with the first before.
            for (mut bytes, expected) in came.iter().cloned().zip(&expected).rev() {
                router.handle(Role::Both, &mut bytes);
                assert_eq!(bytes, linked(expected.clone(), route));
            }
        }
    }
}

#[test]
fn without_their_first_they_pass() {
    for (_, route, came, _) in ways() {
        let whole = frame(UDP, came[0], came[1], 64, &[7; 200]);
        let [first, second, ..] = &fragments(&whole, 7, 64)[..] else { panic!("three") };
        let router = Router::new(route);
        let passes = |frame: &[u8]| {
            let mut bytes = frame.to_vec();
            let verdict = router.handle(Role::Both, &mut bytes);
            assert_eq!((verdict, &bytes[..]), (Verdict::Pass(Passed::Fragment), frame));
        };
        passes(second);
        let before = router.now.get();
        router.handle(Role::Both, &mut first.clone());
        assert!(matches!(router.handle(Role::Both, &mut second.clone()), Verdict::Redirect(_)));
        // Another packet's.
        passes(&fragments(&whole, 8, 64)[1]);
        let stranger = frame(UDP, (came[0].0, 5001), (came[0].0, 9), 64, &[7; 200]);
        let verdict = router.handle(Role::Both, &mut fragments(&stranger, 7, 64)[1].clone());
        assert!(matches!(verdict, Verdict::Pass(_)), "{verdict:?}");
        // After 30 seconds.
        router.now.set(before + 30 * router.second() - 1);
        assert!(matches!(router.handle(Role::Both, &mut second.clone()), Verdict::Redirect(_)));
        router.now.set(before + 30 * router.second());
        passes(second);
    }
}

#[test]
fn the_first_is_remembered_only_if_it_went() {
    for (direction, _, came, _) in ways() {
        let whole = frame(UDP, came[0], came[1], 64, &[7; 200]);
        let [first, second, ..] = &fragments(&whole, 7, 64)[..] else { panic!("three") };
        let wrong = if direction == Direction::Forward { BACK } else { HOP };
        let mut router = Router::new(wrong);
        let verdict = router.handle(Role::Both, &mut first.clone());
        assert!(matches!(verdict, Verdict::Drop(_) | Verdict::Pass(_)));
        router.route = if direction == Direction::Forward { HOP } else { BACK };
        let mut bytes = second.clone();
        let verdict = router.handle(Role::Both, &mut bytes);
        assert_eq!((verdict, &bytes), (Verdict::Pass(Passed::Fragment), second));
    }
}

#[test]
fn a_first_one_without_all_of_its_header_passes() {
    for (_, route, came, _) in ways() {
        for (protocol, least) in [(TCP, 24), (UDP, 8)] {
            let whole = frame(protocol, came[0], came[1], 64, &[7; 100]);
            for size in (8..32).step_by(8) {
                let mut first = fragments(&whole, 7, size).swap_remove(0);
                let before = first.clone();
                let verdict = Router::new(route).handle(Role::Both, &mut first);
                if size < least {
                    assert_eq!(verdict, Verdict::Pass(Passed::Fragment));
                    assert_eq!(first, before);
                } else {
                    assert!(matches!(verdict, Verdict::Redirect(_)), "{verdict:?}");
                }
            }
        }
    }
}

/// Also one that says to have more of it than there is.
#[test]
fn a_first_one_whose_header_goes_on_in_the_next_passes() {
    for (_, route, came, _) in ways() {
        let mut whole = frame(TCP, came[0], came[1], 64, &[7; 100]);
        let head = if came[0].0.len() == 4 { 34 } else { 54 };
        whole[head + 12] = 0xf0;
        for (size, passes) in [(56, true), (64, false)] {
            let mut first = fragments(&whole, 7, size).swap_remove(0);
            let before = first.clone();
            let verdict = Router::new(route).handle(Role::Both, &mut first);
            if passes {
                assert_eq!((verdict, first), (Verdict::Pass(Passed::Fragment), before));
            } else {
                assert!(matches!(verdict, Verdict::Redirect(_)), "{verdict:?}");
            }
        }
    }
}

/// What is behind the fragment header of a later one is no header, whatever its number says.
#[test]
fn later_ones_begin_anywhere() {
    for (_, route, came, goes) in &ways()[2..] {
        let [mut came, mut goes] = [(came, 64), (goes, 63)].map(|(ends, hops)| {
            let mut whole = frame(UDP, ends[0], ends[1], hops, &[0xff; 200]);
            // Options between the fragment header and UDP's.
            whole.splice(54..54, [17, 0, 1, 4, 0, 0, 0, 0]);
            whole[20] = 60;
            let length = whole.len() as u16 - 54;
            whole[18..20].copy_from_slice(&length.to_be_bytes());
            fragments(&whole, 7, 104)
        });
        let router = Router::new(*route);
        for (came, goes) in came.iter_mut().zip(goes.drain(..)) {
            let verdict = router.handle(Role::Both, came);
            assert!(matches!(verdict, Verdict::Redirect(_)), "{verdict:?}");
            assert_eq!(*came, linked(goes, *route));
        }
    }
}

#[test]
fn beyond_the_longest_packet_they_are_malformed() {
    for (_, route, came, _) in ways() {
        let whole = frame(UDP, came[0], came[1], 64, &[7; 200]);
        let [first, last, ..] = &fragments(&whole, 7, 104)[..] else { panic!("two") };
        let router = Router::new(route);
        router.handle(Role::Both, &mut first.clone());
        let mut far = last.clone();
        if came[0].0.len() == 4 {
            far[20..22].copy_from_slice(&0x1fff_u16.to_be_bytes());
            repair(&mut far);
        } else {
            far[56..58].copy_from_slice(&0xfff8_u16.to_be_bytes());
        }
        let before = far.clone();
        let verdict = router.handle(Role::Both, &mut far);
        assert_eq!((verdict, far), (Verdict::Pass(Passed::Malformed), before));
    }
}

#[test]
fn a_packet_in_one_fragment_is_whole() {
    let (_, route, came, goes) = ways()[2];
    for protocol in [TCP, UDP] {
        let [came, goes] = [(came, 64), (goes, 63)]
            .map(|(ends, hops)| frame(protocol, ends[0], ends[1], hops, b"x"))
            .map(|whole| fragments(&whole, 7, 1000).swap_remove(0));
        let router = Router::new(route);
        let mut bytes = came;
        assert_eq!(router.handle(Role::Both, &mut bytes), Verdict::Redirect(INSIDE_DEVICE));
        assert_eq!(bytes, linked(goes, route));
        assert!(router.fragments.borrow().is_empty());
    }
}
