//! Many packets, of clients, backends and routers, that know what became of those before.

use std::net::{IpAddr, SocketAddr};

use portfwd_ebpf::path::{Role, Verdict};
use portfwd_ebpf::table::{Direction, Dropped};

use crate::input::Input;
use crate::wire::{self, ACK, Content, Ends, FIN, LINK, Packet, RST, SYN, TCP, UDP};
use crate::world::{self, Setting, World, is_stateful};

/// Clients outside, and inside, of IPv4 and of IPv6.
const CLIENTS: [[&[&str]; 2]; 2] = [
    [
        &["198.51.100.2:40001", "198.51.100.3:40001", "198.51.100.2:5000"],
        &["[2001:db8:1::2]:40001", "[2001:db8:1::3]:40001"],
    ],
    [
        &["192.168.77.200:40001", "192.168.77.201:5000", "192.168.77.10:5000"],
        &["[fd77::200]:5000", "[fd77::10]:40001"],
    ],
];

/// What they send to: rules of each sort, and some of no rule.
const LISTENS: [&str; 25] = [
    "198.51.100.1:8080",
    "198.51.100.7:8080",
    "198.51.100.8:8080",
    "198.51.100.1:8081",
    "198.51.100.1:8082",
    "198.51.100.7:8082",
    "198.51.100.1:8083",
    "198.51.100.1:8084",
    "198.51.100.1:8100",
    "198.51.100.1:8101",
    "198.51.100.7:8101",
    "198.51.100.1:8200",
    "198.51.100.1:8201",
    "198.51.100.1:9010",
    "198.51.100.7:7003",
    "198.51.100.9:443",
    "198.51.100.9:8082",
    "198.51.100.1:22",
    "198.51.100.9:40001",
    "[2001:db8:1::1]:8080",
    "[2001:db8:1::9]:8081",
    "[2001:db8:1::1]:8082",
    "[2001:db8:1::1]:9150",
    "[2001:db8:1::9]:53",
    "[2001:db8:1::1]:22",
];

/// After so many ticks another client may have the port of one that was not answered.
const UNPROVEN: u64 = 1024;

/// A packet that went to a backend.
#[derive(Clone, Copy, Debug)]
struct Flow {
    came: Ends,
    goes: Ends,
    /// By where it came.
    role: Role,
    /// The flow decides, and not the rule.
    is_stateful: bool,
    /// When it had its last packet, of either direction.
    last: u64,
    /// Until when it surely had its port: a packet or an answer that came before it could be taken.
    kept: u64,
}

struct Conversation<'a> {
    world: &'a World,
    /// Of which each is what an answer to it must find.
    flows: Vec<Flow>,
    /// The last frame, and where it went.
    last: Option<(Role, Vec<u8>)>,
    /// There are no flows but those.
    is_sure: bool,
    number: u16,
}

/// Has clients, backends and routers talk, as the input says: its first byte is the setting, and what
/// follows are steps.
pub fn conversation(input: &[u8]) {
    let mut input = Input::new(input);
    let setting = Setting::of(input.byte());
    world::with(setting, |world| {
        let (flows, last) = (Vec::new(), None);
        let mut conversation = Conversation { world, flows, last, is_sure: true, number: 0 };
        // What takes long is not worth it.
        for _ in 0..200 {
            if input.is_empty() {
                break;
            }
            conversation.step(&mut input);
        }
    });
}

impl Conversation<'_> {
    fn step(&mut self, input: &mut Input) {
        match input.byte() % 16 {
            0..4 => {
                let (role, ends) = self.client(input);
                self.forward(role, ends, &content(input));
            }
            4..6 => {
                if let Some(Flow { role, came, .. }) = self.known(input) {
                    self.forward(role, came, &content(input));
                }
            }
            6..9 => {
                if let Some(flow) = self.known(input) {
                    let content = content(input);
                    self.answer(&flow, &content);
                }
            }
            9 => {
                if let Some(flow) = self.known(input) {
                    let is_about_answer = input.byte() & 1 != 0;
                    self.error(&flow, is_about_answer, input);
                }
            }
            10 => {
                let (role, ends) = self.client(input);
                self.fragments(role, &ends, input);
            }
            11 => {
                if let Some(Flow { role, goes, .. }) = self.known(input) {
                    self.fragments(self.inside(role), &goes.reversed(), input);
                }
            }
            12 => self.world.pass_time(input.pick(&[1, 100, 300, UNPROVEN, UNPROVEN + 1, 8000])),
            13 => self.world.change_routes(),
            14 => self.lose(input),
            _ => self.damaged(input),
        }
    }

    fn role(&self, inside: bool) -> Role {
        match (self.world.setting().one_armed, inside) {
            (true, _) => Role::Both,
            (false, false) => Role::External,
            (false, true) => Role::Internal,
        }
    }

    /// By where backends answer what came in by this.
    fn inside(&self, role: Role) -> Role {
        if role == Role::Both { Role::Both } else { Role::Internal }
    }

    /// A client, and what it sends to.
    fn client(&self, input: &mut Input) -> (Role, Ends) {
        let who = input.byte();
        let destination: SocketAddr = input.pick(&LISTENS).parse().unwrap();
        let inside = who & 8 != 0 && !self.world.setting().one_armed;
        let clients = CLIENTS[usize::from(inside)][usize::from(destination.is_ipv6())];
        let source = clients[usize::from(who & 7) % clients.len()].parse().unwrap();
        let protocol = if who & 0x10 != 0 { TCP } else { UDP };
        (self.role(inside), Ends { protocol, source, destination })
    }

    fn known(&self, input: &mut Input) -> Option<Flow> {
        let place = usize::from(input.byte());
        (!self.flows.is_empty()).then(|| self.flows[place % self.flows.len()])
    }

    fn send(&mut self, role: Role, packet: &[u8]) -> (Option<Direction>, Verdict, Vec<u8>) {
        let mut frame = wire::frame(packet);
        self.last = Some((role, frame.clone()));
        let (verdict, direction) = self.world.send(role, &mut frame);
        (direction, verdict, frame.split_off(LINK))
    }

    /// A packet to the box.
    fn forward(&mut self, role: Role, came: Ends, content: &Content) {
        let is_claimed = !self.world.claim(&came).is_empty();
        let (direction, verdict, packet) = self.send(role, &wire::packet(&came, content));
        if direction.is_none() {
            let is_crowded = matches!(verdict, Verdict::Drop(Dropped::NoPort));
            let begins = content.flags & RST == 0 || came.protocol == UDP;
            let must = is_claimed && self.world.setting().is_clear() && content.hops > 1 && begins;
            let may = is_crowded && self.is_stateful(role, &came);
            assert!(!must || may, "{verdict:?} for {came:?}");
            return;
        }
        assert_eq!(direction, Some(Direction::Forward), "{came:?}");
        let frame = wire::frame(&packet);
        let goes = Packet::of(&frame).unwrap().ends(&frame);
        let is_sent = matches!(verdict, Verdict::Redirect(_));
        let expected = Content { hops: content.hops - u8::from(is_sent), ..*content };
        assert_eq!(packet, wire::packet(&goes, &expected), "{came:?} -> {goes:?}");
        self.remember(role, came, goes);
    }

    /// Whether a flow decides about a packet to the box.
    fn is_stateful(&self, role: Role, came: &Ends) -> bool {
        role == Role::Internal || self.world.claim(came).into_iter().any(is_stateful)
    }

    /// No two clients look the same to a backend, and none looks different from one packet to the next.
    fn remember(&mut self, role: Role, came: Ends, goes: Ends) {
        let (is_stateful, now) = (self.is_stateful(role, &came), self.world.now());
        let flow = Flow { came, goes, role, is_stateful, last: now, kept: now };
        self.flows.retain(|known| {
            let idle = now - known.last > UNPROVEN;
            if (known.came, known.role) == (came, role) {
                let lost = now - known.kept > UNPROVEN;
                assert!(known.goes == goes || lost, "{known:?} is seen as another now: {goes:?}");
                return false;
            }
            let is_established = self.world.is_established(&known.came, Direction::Forward);
            let is_masqueraded = goes.source.ip() != came.source.ip();
            let shares = (known.goes.protocol, known.goes.source) == (goes.protocol, goes.source);
            if is_masqueraded && shares && known.came.source != came.source {
                let may = now - known.kept > UNPROVEN && !is_established;
                assert!(may, "{known:?} has the port that {flow:?} got");
            }
            if known.goes != goes {
                return true;
            }
            // Of stateless rules, by which of its addresses a client came last.
            let lost = idle && !is_established;
            assert!(!known.is_stateful && !is_stateful || lost, "{known:?} is seen as {flow:?}");
            false
        });
        self.flows.push(flow);
    }

    /// A packet from a backend to whom it knows.
    fn answer(&mut self, flow: &Flow, content: &Content) {
        let Flow { came, goes, role, .. } = *flow;
        let role = self.inside(role);
        let (direction, verdict, packet) =
            self.send(role, &wire::packet(&goes.reversed(), content));
        let must = self.world.setting().is_clear() && content.hops > 1;
        assert!(!must || direction.is_some(), "{verdict:?} for an answer to {flow:?}");
        if direction.is_some() {
            let is_sent = matches!(verdict, Verdict::Redirect(_));
            let expected = Content { hops: content.hops - u8::from(is_sent), ..*content };
            let expected = wire::packet(&came.reversed(), &expected);
            assert_eq!(packet, expected, "an answer to {flow:?}");
            let now = self.world.now();
            for known in self.flows.iter_mut().filter(|known| known.goes == goes) {
                known.last = now;
                // An answer that comes too late does not bring back what another got meanwhile.
                if now - known.kept <= UNPROVEN {
                    known.kept = now;
                }
            }
        }
    }

    /// An ICMP error about a packet of a flow, as somebody on its way had it.
    fn error(&mut self, flow: &Flow, is_about_answer: bool, input: &mut Input) {
        let Flow { came, goes, role, .. } = *flow;
        let role = if is_about_answer { role } else { self.inside(role) };
        let content = content(input);
        let quote = |ends: &Ends| wire::packet(ends, &content);
        // As it was sent, and as it was on its way.
        let (sent, seen) =
            if is_about_answer { (goes.reversed(), came.reversed()) } else { (came, goes) };
        let is_v4 = came.source.is_ipv4();
        let head = if is_v4 { 20 } else { 40 };
        let length = quote(&seen).len();
        let cut = match input.byte() {
            0..128 => length,
            cut => (head + usize::from(cut & 63)).min(length),
        };
        let has_half_a_checksum = came.protocol == TCP && cut == head + 17;
        if cut < head + 8 || has_half_a_checksum {
            return;
        }
        let kinds: [&[u8]; 2] = [&[1, 2, 3, 4], &[3, 4, 11, 12]];
        let kind = [input.pick(kinds[usize::from(is_v4)]), input.byte()];
        let rest = [0, 0, 5, input.byte()];
        let router: IpAddr = match (is_v4, is_about_answer) {
            (true, true) => "203.0.113.9",
            (false, true) => "2001:db8:9::9",
            (true, false) => "192.168.77.99",
            (false, false) => "fd77::99",
        }
        .parse()
        .unwrap();
        let error = wire::error(router, seen.source.ip(), 64, kind, rest, &quote(&seen)[..cut]);
        let (direction, verdict, packet) = self.send(role, &error);
        let must = self.world.setting().is_clear();
        assert!(!must || direction.is_some(), "{verdict:?} for an error about {flow:?}");
        if direction.is_some() {
            let hops = if matches!(verdict, Verdict::Redirect(_)) { 63 } else { 64 };
            let from = match is_about_answer {
                // Whoever it is from, the backend sees the box.
                true if goes.source.ip() != came.source.ip() => goes.source.ip(),
                true => router,
                false => came.destination.ip(),
            };
            let expected =
                wire::error(from, sent.source.ip(), hops, kind, rest, &quote(&sent)[..cut]);
            assert_eq!(packet, expected, "an error about {flow:?}");
        }
    }

    /// A packet in fragments, in some order.
    fn fragments(&mut self, role: Role, ends: &Ends, input: &mut Input) {
        let payload = [7; 200];
        let content = Content { payload: &payload, ..content(input) };
        let order = input.byte();
        let size = usize::from(order & 7) * 8 + 24;
        self.number += u16::from(order & 0x80 == 0);
        let mut parts = wire::fragments(&wire::packet(ends, &content), self.number, size);
        let middle = parts.len() / 2;
        match order >> 3 & 3 {
            0 | 1 => {}
            2 => parts[1..].reverse(),
            _ => parts.rotate_left(middle),
        }
        for part in &parts {
            let (direction, _, packet) = self.send(role, part);
            let frame = wire::frame(&packet);
            let first = Packet::of(&frame).filter(|packet| packet.offset == 0);
            if let (Some(Direction::Forward), Some(first)) = (direction, first) {
                self.remember(role, *ends, first.ends(&frame));
            }
            self.world.pass_time(if order & 0x40 != 0 { 3000 } else { 0 });
        }
    }

    /// The last frame again, with something else in it: what holds for any holds for it too.
    fn damaged(&mut self, input: &mut Input) {
        let [place, length, value, byte] = [(); 4].map(|()| input.byte());
        let Some((role, mut frame)) = self.last.take() else { return };
        let place = usize::from(place) % frame.len();
        frame[place] = value;
        if length & 1 != 0 {
            frame.truncate(usize::from(length >> 1) + usize::from(byte));
        }
        let role = if value & 1 != 0 { role } else { self.inside(role) };
        self.world.send(role, &mut frame);
        // It may be another flow's.
        self.flows.clear();
        self.is_sure = false;
    }

    /// Established flows lose a half, and are whole again with the client's next packet: at once from the
    /// reply's, after a pause from the forward half. Before that others could have their ports, so that is
    /// for when there are no others.
    fn lose(&mut self, input: &mut Input) {
        let is_settled = |flow: &Flow| {
            !flow.is_stateful || self.world.is_established(&flow.came, Direction::Forward)
        };
        if input.byte() & 1 == 0 || !self.is_sure || !self.flows.iter().all(is_settled) {
            return self.world.lose(Direction::Forward);
        }
        self.world.lose(Direction::Reply);
        self.world.pass_time(300);
        let content = Content { flags: ACK, ..content(input) };
        for Flow { role, came, .. } in self.flows.clone() {
            self.forward(role, came, &Content { hops: 64, ..content });
        }
    }
}

/// What is in a packet beside its ends.
fn content(input: &mut Input) -> Content<'static> {
    let (flags, number) = (input.byte(), input.byte());
    let kinds = [SYN, SYN | ACK, ACK, FIN | ACK, RST, RST | ACK, ACK, 0];
    Content {
        hops: if flags & 0xf0 == 0xf0 { flags & 3 } else { 64 },
        flags: kinds[usize::from(flags & 7)],
        numbers: [u32::from(number >> 4), u32::from(number & 15)],
        payload: &b"a payload of some length"[..usize::from(flags >> 3 & 7)],
    }
}
