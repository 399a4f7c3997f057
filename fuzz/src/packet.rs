//! One packet, any bytes.

use portfwd_ebpf::path::{Role, Verdict};
use portfwd_ebpf::table::Direction;

use crate::input::Input;
use crate::wire::{self, ACK, Content, Ends, Packet, SYN, TCP, UDP};
use crate::world::{self, Setting, World, is_inside, is_own};

/// Sends one frame through the box, and, if it leads to a backend, has that answer. The first byte is
/// the setting, with the role in its lowest bits, and the bits of the second have something happen
/// before; the rest is the frame.
pub fn packet(input: &[u8]) {
    let mut input = Input::new(input);
    let first = input.byte();
    let setting = Setting::of(first);
    let role = match first & 3 {
        0 => Role::External,
        1 => Role::Internal,
        _ => Role::Both,
    };
    let before = input.byte();
    let mut frame = input.rest().to_vec();
    world::with(setting, |world| {
        for (bit, (ends, role)) in known().into_iter().enumerate() {
            let role = if setting.one_armed { Role::Both } else { role };
            let packet = wire::packet(&ends, &CONTENT);
            if before >> bit & 1 != 0 {
                world.send(role, &mut wire::frame(&packet));
            }
            if before & 0x40 != 0 {
                world.send(role, &mut wire::frame(&wire::fragments(&packet, 7, 8)[0]));
            }
        }
        if before & 0x80 != 0 {
            // One after the other, with time between.
            let mut same = frame.clone();
            world.send(role, &mut same);
            world.pass_time(300);
            world.change_routes();
        }
        let came = Packet::of(&frame).map(|packet| (packet, packet.ends(&frame)));
        let (verdict, direction) = world.send(role, &mut frame);
        let is_sent = matches!(verdict, Verdict::Redirect(_));
        if let (Some((packet, came)), true, Some(Direction::Forward)) = (came, is_sent, direction) {
            let is_whole = !packet.is_fragment() && matches!(came.protocol, TCP | UDP);
            if is_whole && setting.is_clear() && can_be_answered(role, &came) {
                answer(world, role, &came, &packet.ends(&frame));
            }
        }
    });
}

const CONTENT: Content = Content { hops: 64, flags: SYN, numbers: [1, 0], payload: b"hello" };

/// Packets that begin flows: masqueraded, of several backends, and hairpin; and some of stateless rules.
fn known() -> [(Ends, Role); 6] {
    let ends = |source: &str, destination: &str| Ends {
        protocol: UDP,
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    };
    [
        (ends("198.51.100.2:40001", "198.51.100.1:8082"), Role::External),
        (ends("[2001:db8:1::2]:5000", "[2001:db8:1::1]:8081"), Role::External),
        (ends("192.168.77.200:5000", "198.51.100.1:8080"), Role::Internal),
        (ends("198.51.100.2:5000", "198.51.100.8:8080"), Role::External),
        (ends("[2001:db8:1::2]:5000", "[2001:db8:1::1]:8080"), Role::External),
        (ends("192.168.77.11:9000", "198.51.100.2:5000"), Role::Internal),
    ]
}

/// Whether the box hears the answer, and it goes back by where the client is.
fn can_be_answered(role: Role, came: &Ends) -> bool {
    let client = came.source.ip();
    let right = match role {
        Role::External => !is_inside(client),
        Role::Internal => is_inside(client),
        Role::Both => true,
    };
    right && !is_own(client)
}

/// What a backend answers comes back to the client from where it sent to.
pub fn answer(world: &World, role: Role, came: &Ends, goes: &Ends) -> Vec<u8> {
    let role = if role == Role::Both { Role::Both } else { Role::Internal };
    let content = Content { flags: SYN | ACK, numbers: [7, 2], ..CONTENT };
    let mut frame = wire::frame(&wire::packet(&goes.reversed(), &content));
    let (verdict, direction) = world.send(role, &mut frame);
    let expected = Content { hops: 63, ..content };
    let expected = wire::packet(&came.reversed(), &expected);
    assert!(
        matches!(verdict, Verdict::Redirect(_)) && direction == Some(Direction::Reply),
        "{verdict:?} for the answer to {came:?}, which went as {goes:?}"
    );
    assert_eq!(frame[wire::LINK..], expected, "the answer to {came:?}, which went as {goes:?}");
    frame
}
