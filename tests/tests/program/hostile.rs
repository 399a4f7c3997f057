//! Frames that no one should send: cut short, random, and nearly right.

use portfwd_ebpf::path::Role;
use portfwd_ebpf::table::Direction;
use portfwd_tests::packet::{Packet, repair_ipv4};
use portfwd_tests::random::{self, Random};
use portfwd_tests::{is_root, wire};

use crate::router::{
    Flow, LAN, NARROW_INSIDE, Outcome, Router, Version, WAN, WEB, comes, in_both, with_router,
};

/// Lets the router have a frame; what holds for frames that are passed or dropped,
/// [`Router::try_frame`] has asserted. What is translated differs where it must, and its checksums
/// are as right as they were. Returns whether it was translated.
fn is_sound(router: &mut Router, role: Role, link: u8, frame: &[u8]) -> bool {
    if !comes(frame) {
        return false;
    }
    let seen = router.try_frame(role, link, frame);
    let hops = match seen.outcome {
        Outcome::Pass(_) | Outcome::Drop(_) => return false,
        Outcome::Answer(_) => {
            wire::verify(&seen.frame).unwrap();
            return false;
        }
        Outcome::Redirect => 1,
        Outcome::Stack(_) => 0,
    };
    let (was, is) = (wire::verify(frame), wire::verify(&seen.frame));
    assert_eq!(was.is_ok(), is.is_ok(), "{was:?}, then {is:?}: {frame:02x?}");

    // Undo what may have changed; the rest is as it was.
    let mut undone = seen.frame.clone();
    if hops == 1 {
        undone[..12].copy_from_slice(&frame[..12]);
    }
    let is_v4 = frame[12..14] == [0x08, 0x00];
    let (hop, address) = if is_v4 { (22, 4) } else { (21, 16) };
    assert_eq!(seen.frame[hop] + hops, frame[hop]);
    undone[hop] = frame[hop];
    let source = if is_v4 { 26 } else { 22 };
    let (changed, ports) = match seen.rule.unwrap().1 {
        // A client inside is masqueraded.
        Some(Direction::Forward) if role == Role::Internal => (source..source + 2 * address, 2),
        Some(Direction::Forward) => (source + address..source + 2 * address, 1),
        Some(Direction::Reply) => (source..source + address, 1),
        None => panic!("translated and dropped"),
    };
    undone[changed.clone()].copy_from_slice(&frame[changed]);
    if is_v4 {
        undone[24..26].copy_from_slice(&frame[24..26]);
    }
    let different: Vec<usize> =
        (0..frame.len()).filter(|place| undone[*place] != frame[*place]).collect();
    // Ports and a checksum.
    let headers = if is_v4 { 14 + usize::from(frame[14] & 0xf) * 4 } else { 54 };
    assert!(different.len() <= 2 * ports + 2 && different.iter().all(|place| *place >= headers));
    true
}

/// Every kind of frame that the program tells apart, both ways.
fn every_kind() -> Vec<(Flow, Vec<u8>)> {
    let mut frames = Vec::new();
    for flow in Flow::all() {
        let came = flow.came();
        let mut packets = vec![
            came.clone(),
            Packet { padding: vec![0; 18], ..came.clone() },
            Packet { protocol: if came.is_v4() { 1 } else { 58 }, ..came.clone() },
            Packet { protocol: 47, ..came.clone() },
        ];
        if came.is_v4() {
            packets.push(Packet { options: vec![1; 40], ..came.clone() });
            packets.push(Packet { fragment: 0x2000, ..came.clone() });
        } else {
            let options = |number| (number, vec![0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            let extensions = vec![options(0), options(60)];
            packets.push(Packet { extensions, ..came.clone() });
            let fragment = (44, vec![0, 0, 0, 1, 1, 2, 3, 4]);
            packets.push(Packet { extensions: vec![options(0), fragment], ..came.clone() });
        }
        let mut with_options = came.clone();
        with_options.tcp.options = vec![1; 40];
        packets.push(with_options);
        for packet in packets {
            frames.push((flow.clone(), packet.bytes()));
        }
        let mut tagged = came.bytes();
        tagged.splice(12..12, [0x81, 0x00, 0, 5]);
        frames.push((flow.clone(), tagged));
        let mut arp = came.bytes();
        arp[12..14].copy_from_slice(&[8, 6]);
        frames.push((flow, arp));
    }
    frames
}

#[test]
fn frames_cut_short_are_translated_whole_or_not_at_all() {
    if !is_root() {
        return;
    }
    let tried = with_router(|router| {
        router.load(&in_both(&WEB));
        let mut tried = 0;
        for (flow, frame) in every_kind() {
            let whole = is_sound(router, flow.role, flow.link, &frame);
            // Only padding may be missing.
            let needed = wire::verify(&frame)
                .ok()
                .flatten()
                .map_or(frame.len(), |packet| 14 + packet.length as usize);
            for length in 14..frame.len() {
                let translated = is_sound(router, flow.role, flow.link, &frame[..length]);
                assert_eq!(translated, whole && length >= needed, "{length}: {frame:02x?}");
                tried += 1;
            }
        }
        tried
    });
    println!("{tried} frames cut short");
}

#[test]
fn random_frames() {
    if !is_root() {
        return;
    }
    let mut random = Random::new(random::seed());
    with_router(|router| {
        router.load(&in_both(&["*:@12.10/any"]));
        let mut translated = 0;
        for number in 0..2000 {
            let length = 14 + random.below(200);
            let mut frame = random.bytes(length);
            // Pure noise ends early. Most frames get a head that leads on.
            let version = *random.pick(&Version::BOTH);
            let [forward, reply] = Flow::both(version, *random.pick(&[6, 17]), 80, 80);
            let flow = random.pick(&[forward, reply]).clone();
            if number % 8 != 0 {
                let came = flow.came().bytes();
                let head = if version == Version::V4 { 34 } else { 54 };
                let keep = head.min(frame.len());
                frame[..keep].copy_from_slice(&came[..keep]);
                if random.below(2) == 0 && frame.len() >= 20 {
                    // The length of the header that the noise follows is right.
                    let field = if version == Version::V4 { 16 } else { 18 };
                    let start = if version == Version::V4 { 14 } else { 54 };
                    let length = frame.len().saturating_sub(start) as u16;
                    frame[field..field + 2].copy_from_slice(&length.to_be_bytes());
                }
            }
            let role = *random.pick(&[flow.role, Role::Both]);
            translated += u64::from(is_sound(router, role, flow.link, &frame));
        }
        println!("{translated} of 2000 frames were translated");
        assert_eq!(router.translated(), translated);
        assert!(translated > 0, "noise never got through");
    });
}

#[test]
fn nearly_right_frames() {
    if !is_root() {
        return;
    }
    let mut random = Random::new(random::seed());
    let (translated, tried) = with_router(|router| {
        // One rule each for what is redirected, for the stack without a neighbour, and too big.
        router.load_at(
            &[1, 7],
            &in_both(&[
                "8080:@12.10:80/tcp+udp",
                "8081:@12.99:80/tcp+udp",
                &format!("8082:@{NARROW_INSIDE}.10:80/tcp+udp"),
                "20000-60000:@12.11/tcp+udp",
            ]),
        );
        let (mut translated, mut tried) = (0, 0);
        for _ in 0..2000 {
            let version = *random.pick(&Version::BOTH);
            let protocol = *random.pick(&[6, 17]);
            let port = *random.pick(&[8080, 8081, 8082, 20000, 40000]);
            let [forward, reply] = Flow::both(version, protocol, port, 80);
            let mut flow = random.pick(&[forward, reply]).clone();
            match random.below(8) {
                0 => flow.role = Role::Both,
                1 => flow.destination = version.at(WAN, 7, port),
                2 => flow.destination = version.at(WAN, 99, 5000),
                3 => flow.source = version.at(LAN, 11, 20000 + random.below(1000) as u16),
                _ => {}
            }
            let length = *random.pick(&[0, 1, 7, 64, 333, 1400]);
            let mut came = Packet { payload: random.bytes(length), ..flow.came() };
            let words = random.below(11);
            if version == Version::V4 {
                came.options = random.bytes(words * 4);
                came.fragment = *random.pick(&[0, 0x4000, 0x4000, 0x4000, 0x2000]);
                came.number = random.bits() as u16;
                came.no_checksum = random.below(4) == 0;
            } else {
                for _ in 0..random.below(4) {
                    let number = *random.pick(&[0, 43, 60]);
                    let units = random.below(4);
                    let mut bytes = random.bytes(8 * (1 + units));
                    bytes[1] = units as u8;
                    bytes[3] = 0;
                    came.extensions.push((number, bytes));
                }
            }
            let words = random.below(11);
            came.tcp.options = random.bytes(words * 4);
            came.hops = *random.pick(&[1, 2, 64, 255]);
            came.class = random.bits() as u8;
            came.padding = vec![0; random.below(4)];
            let mut frame = came.bytes();
            for _ in 0..random.below(4) {
                let place = 12 + random.below(frame.len() - 12);
                match random.below(3) {
                    0 => frame[place] = random.bits() as u8,
                    1 => frame[place] ^= 1 << random.below(8),
                    _ => frame.truncate(place.max(14)),
                }
            }
            if frame.len() > 34 && frame[12] == 8 && random.below(2) == 0 {
                repair_ipv4(&mut frame);
            }
            translated += u64::from(is_sound(router, flow.role, flow.link, &frame));
            tried += 1;
        }
        // The counters say the same.
        assert_eq!(router.translated(), translated);
        (translated, tried)
    });
    println!("{translated} of {tried} frames were translated");
    assert!(translated > 200, "too few frames got through: {translated}");
}
