//! Random packets under random rules: flows, each with its script, interleaved.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::kinds::{self, Extent};
use super::rules::{self, any_port, externals, masqueraded, server};
use crate::packet::{self, ICMP, ICMPV6, Packet, TCP, UDP};
use crate::random::Random;
use crate::rig;
use crate::rule::Rule;

/// Link addresses, the same in every rig.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
pub const WAN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub const LAN_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];
pub const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 2, 2];

/// An end of the rig.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Client,
    Server,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Client, Self::Server];

    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// Packets between a client and a server that belong together.
#[derive(Clone, Debug)]
pub struct Flow {
    /// What it tests.
    pub talk: &'static str,
    /// The rule that claims it.
    pub rule: Option<usize>,
    /// The backend, or how it sees the client, is the router's choice.
    pub chooses: bool,
    /// Among these backends.
    pub backends: Vec<IpAddr>,
    /// The client is at the server's end.
    pub inside: bool,
    pub protocol: u8,
    pub client: SocketAddr,
    /// The client, as the server sees it, but for a port that is the router's choice.
    pub appears: SocketAddr,
    /// Where the client sends to.
    pub asks: SocketAddr,
    /// Where that arrives.
    pub server: SocketAddr,
    /// Who answers, as the rules say: as the client sees it.
    pub answers: SocketAddr,
}

/// Why the two may differ about a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Strange {
    OutOfState,
    BackendFirst,
    Direct,
    ForgedSource,
    WrongHeaderChecksum,
    RouterWritesOptions,
}

/// What is wrong with a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Damage {
    /// The checksum of TCP or UDP is off by this much.
    Checksum(u16),
    /// So is that of the IPv4 header.
    HeaderChecksum(u16),
    /// Bytes at a distance from the beginning of the IP header.
    Ip(usize, Vec<u8>),
    /// Bytes at a distance from the beginning of the transport header.
    Transport(usize, Vec<u8>),
    /// The frame ends so many bytes early.
    Cut(usize),
    /// Bytes in front of the ethertype.
    Tag(Vec<u8>),
    /// It is for another station.
    Station([u8; 6]),
}

/// A packet to be sent.
#[derive(Clone, Debug)]
pub struct Step {
    /// The number of its flow.
    pub flow: usize,
    pub from: Side,
    /// The end where it is sent.
    pub at: Side,
    /// The end where it is to come out.
    pub to: Side,
    /// It is the first of its flow.
    pub begins: bool,
    pub packet: Packet,
    pub damage: Option<Damage>,
    /// It is sent in fragments with so many bytes.
    pub cut: Option<usize>,
    pub strange: Option<Strange>,
    /// What is special about it.
    pub kinds: Vec<&'static str>,
}

impl Step {
    /// The frame to send.
    pub fn frame(&self) -> Vec<u8> {
        self.damaged(&self.packet)
    }

    /// The frame of an answer to what arrived with these ends.
    pub fn answer(&self, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
        self.damaged(&Packet { source: destination, destination: source, ..self.packet.clone() })
    }

    /// The frame of an ICMP error about what arrived with these ends.
    pub fn error(&self, flow: &Flow, ends: (SocketAddr, SocketAddr)) -> Vec<u8> {
        let mut frame = self.frame();
        let expected = (flow.appears, flow.server);
        packet::set_quoted_ends(&mut frame, self.quotes(), flow.protocol, expected, ends);
        frame
    }

    /// Of an ICMP error that is a step of its own: where its header is, and how far behind that the
    /// transport header that it quotes.
    pub fn quotes(&self) -> [usize; 2] {
        let ip = if self.packet.is_v4() { 20 } else { 40 };
        [self.packet.transport_at(), 8 + ip]
    }

    /// The same of an error that the router makes about this step.
    pub fn quoted(&self) -> [usize; 2] {
        let ip = if self.packet.is_v4() { 20 } else { 40 };
        let transport = self.packet.transport_at() - packet::ETHERNET;
        [packet::ETHERNET + ip, 8 + transport]
    }

    /// The frames as which a frame of this step goes.
    pub fn frames(&self, frame: Vec<u8>) -> Vec<Vec<u8>> {
        match self.cut {
            Some(size) => packet::fragments(&frame, self.packet.number, size),
            None => vec![frame],
        }
    }

    /// The packet as its flow's rule translates it.
    pub fn translated(&self, flow: &Flow) -> Packet {
        let hops = self.packet.hops.saturating_sub(1);
        let (source, destination) = match self.from {
            Side::Client => (flow.appears, flow.server),
            Side::Server => (flow.answers, flow.client),
        };
        let (link_destination, link_source) = link_addresses(self.to);
        let packet = self.packet.clone();
        let padding = Vec::new();
        Packet { hops, padding, link_source, link_destination, source, destination, ..packet }
    }

    /// The frame that the rule makes of it. What was wrong with it stays wrong by as much.
    pub fn expected(&self, flow: &Flow) -> Vec<u8> {
        self.damaged(&self.translated(flow))
    }

    fn damaged(&self, packet: &Packet) -> Vec<u8> {
        let mut frame = packet.bytes();
        let set = |frame: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            if let Some(place) = frame.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        let off = |frame: &mut Vec<u8>, at: usize, by: u16| {
            // In one's complement, as the checksum itself is changed by a translation.
            let sum = u32::from(u16::from_be_bytes([frame[at], frame[at + 1]])) + u32::from(by);
            let sum = (sum & 0xffff) + (sum >> 16);
            set(frame, at, &(sum as u16).to_be_bytes());
        };
        let (ip, transport) = (packet::ETHERNET, packet.transport_at());
        match &self.damage {
            None => {}
            Some(Damage::Checksum(by)) => {
                let place = if packet.protocol == TCP { 16 } else { 6 };
                off(&mut frame, transport + place, *by);
            }
            Some(Damage::HeaderChecksum(by)) => off(&mut frame, ip + 10, *by),
            Some(Damage::Ip(at, bytes)) => set(&mut frame, ip + at, bytes),
            Some(Damage::Transport(at, bytes)) => set(&mut frame, transport + at, bytes),
            Some(Damage::Cut(bytes)) => frame.truncate(frame.len().saturating_sub(*bytes).max(ip)),
            Some(Damage::Tag(tag)) => drop(frame.splice(12..12, tag.iter().copied())),
            Some(Damage::Station(address)) => set(&mut frame, 0, address),
        }
        frame
    }
}

/// Of a host at an end, and of the router there.
pub fn link_addresses(side: Side) -> ([u8; 6], [u8; 6]) {
    match side {
        Side::Client => (CLIENT_MAC, WAN_MAC),
        Side::Server => (SERVER_MAC, LAN_MAC),
    }
}

/// Rules, and packets in the order in which they are sent.
#[derive(Clone, Debug)]
pub struct Stream {
    pub rules: Vec<Rule>,
    /// How portfwd is attached.
    pub attach: &'static str,
    /// At which ends the router has an interface without Ethernet, by [`Side`].
    pub tuns: [bool; 2],
    pub flows: Vec<Flow>,
    pub steps: Vec<Step>,
}

/// How many flows are under way at a time.
const AT_A_TIME: usize = 12;

impl Stream {
    /// What a seed stands for. Fewer packets are the first of more.
    pub fn new(seed: u64, packets: usize, extent: Extent) -> Self {
        let mut random = Random::new(seed);
        let rules = rules::some(&mut random, extent);
        let attach = *random.pick(&["native", "native", "tc", "tc", "generic"]);
        let tuns = match random.below(6) {
            0 => [true, true],
            1 => [true, false],
            2 => [false, true],
            _ => [false, false],
        };
        let mut maker = Maker { random, extent, rules, flows: Vec::new() };
        let mut open: Vec<VecDeque<Step>> = Vec::new();
        let mut steps = Vec::with_capacity(packets);
        while steps.len() < packets {
            while open.len() < AT_A_TIME {
                open.extend(maker.talk().map(VecDeque::from));
            }
            let number = maker.random.below(open.len());
            let script = &mut open[number];
            // One that is over makes room for the next.
            match script.pop_front() {
                Some(step) => steps.push(step),
                None => drop(open.swap_remove(number)),
            }
        }
        let Maker { rules, flows, .. } = maker;
        Self { rules, attach, tuns, flows, steps }
    }
}

/// Makes flows and their scripts.
pub struct Maker {
    pub random: Random,
    extent: Extent,
    pub rules: Vec<Rule>,
    pub flows: Vec<Flow>,
}

/// The packets of a flow in their order.
pub type Script = Vec<Step>;

impl Maker {
    /// A flow of any kind, with its script. None if the rules leave no room for that kind.
    fn talk(&mut self) -> Option<Script> {
        let talks = kinds::TALKS.iter().filter(|talk| talk.state.is_in(self.extent));
        let mut place = self.random.below(talks.clone().map(|talk| talk.weight).sum());
        let talk = talks.clone().find(|talk| {
            let here = place < talk.weight;
            place = place.wrapping_sub(talk.weight);
            here
        })?;
        let mut script = (talk.make)(self)?;
        let flow = self.flows.last_mut()?;
        flow.talk = talk.name;
        script.first_mut()?.begins = true;
        for step in &mut script {
            kinds::vary(&mut self.random, self.extent, flow, step);
        }
        Some(script)
    }

    /// Adds a flow.
    fn open(&mut self, flow: Flow) -> usize {
        self.flows.push(flow);
        self.flows.len() - 1
    }

    /// A client that no other flow has: nothing ever makes two flows look alike.
    fn client(&mut self, v6: bool) -> SocketAddr {
        // 7919 and 65,536 have no common divisor.
        let port = (self.flows.len() as u16).wrapping_mul(7919).wrapping_add(20_011);
        let random = &mut self.random;
        let bits = random.bits();
        let address = if v6 {
            match random.below(3) {
                0 => rig::CLIENT.v6,
                1 => Ipv6Addr::from_bits(0x2001_0db8_000f << 80 | u128::from(bits)),
                _ => Ipv6Addr::from_bits(0x2a00 << 112 | u128::from(bits) << 32 | 0xffff),
            }
            .into()
        } else {
            let [a, b, c] = [bits as u8, (bits >> 8) as u8, (bits >> 16) as u8];
            match random.below(3) {
                0 => rig::CLIENT.v4,
                1 => Ipv4Addr::new(203, 0, 113, a),
                // No private, loopback or group address.
                _ => Ipv4Addr::new(11 + a % 100, b, c, 1),
            }
            .into()
        };
        SocketAddr::new(address, port)
    }

    fn protocol(&mut self) -> u8 {
        *self.random.pick(&[TCP, UDP])
    }

    /// A flow that a rule claims.
    fn claimed(&mut self, protocol: u8) -> Option<usize> {
        self.claimed_by(protocol, |_, _| true)
    }

    /// A flow that a stateless rule claims.
    fn claimed_without_flow(&mut self, protocol: u8) -> Option<usize> {
        self.claimed_by(protocol, rules::is_stateless)
    }

    /// A flow that one of these rules claims.
    fn claimed_by(&mut self, protocol: u8, those: fn(&[Rule], usize) -> bool) -> Option<usize> {
        let is_one =
            |rules: &[Rule], number: usize| rules[number].has(protocol) && those(rules, number);
        let numbers = 0..self.rules.len();
        let ours: Vec<_> = numbers.filter(|number| is_one(&self.rules, *number)).collect();
        if ours.is_empty() {
            return None;
        }
        let rule = &self.rules[*self.random.pick(&ours)];
        let (first, last) = (*rule.listen.start(), *rule.listen.end());
        let port = match self.random.below(4) {
            0 if first != 0 => first,
            1 => last,
            _ if first == 0 => any_port(&mut self.random),
            _ => self.random.between(first, last),
        };
        let v6 = rule.backend.is_ipv6();
        let address = rule.address.unwrap_or(*self.random.pick(&externals(v6)));
        let asks = SocketAddr::new(address, port);
        // Which may be a narrower one.
        let (rule, server) = rules::claim(&self.rules, protocol, asks)?;
        if !is_one(&self.rules, rule) {
            return None;
        }
        let client = self.client(v6);
        let flow = Flow {
            talk: "",
            rule: Some(rule),
            chooses: self.rules[rule].chooses(),
            backends: self.rules[rule].backends().collect(),
            inside: false,
            protocol,
            client,
            appears: if self.rules[rule].masquerade { masqueraded(client) } else { client },
            asks,
            server,
            answers: asks,
        };
        Some(self.open(flow))
    }

    /// The same, for packets of the server alone: they leave with the first address.
    fn claimed_reply(&mut self, protocol: u8) -> Option<usize> {
        let number = self.claimed_without_flow(protocol)?;
        let flow = &mut self.flows[number];
        let address = self.rules[flow.rule?].address;
        flow.answers.set_ip(address.unwrap_or(externals(flow.asks.is_ipv6())[0]));
        Some(number)
    }

    /// A flow to an address of the router's or of a server's, on a port that is no rule's.
    fn unclaimed(&mut self, protocol: u8, address: IpAddr) -> Option<usize> {
        let at = SocketAddr::new(address, any_port(&mut self.random));
        let taken = if externals(address.is_ipv6()).contains(&address) {
            rules::claim(&self.rules, protocol, at).is_some()
        } else {
            self.rules.iter().any(|rule| rule.leads_to(protocol, at))
        };
        if taken {
            return None;
        }
        let client = self.client(address.is_ipv6());
        let flow = Flow {
            talk: "",
            rule: None,
            chooses: false,
            backends: Vec::new(),
            inside: false,
            protocol,
            client,
            appears: client,
            asks: at,
            server: at,
            answers: at,
        };
        Some(self.open(flow))
    }

    fn any_server(&mut self) -> IpAddr {
        let v6 = self.random.one_in(2);
        server(v6, self.any_number())
    }

    /// Of a server.
    fn any_number(&mut self) -> u8 {
        self.random.below(rules::SERVERS.into()) as u8
    }

    fn any_external(&mut self) -> IpAddr {
        let v6 = self.random.one_in(2);
        *self.random.pick(&externals(v6))
    }

    /// A packet of a flow with some payload.
    pub fn step(&mut self, number: usize, from: Side) -> Step {
        let flow = &self.flows[number];
        let (source, destination) = match from {
            Side::Client => (flow.client, flow.asks),
            Side::Server => (flow.server, flow.appears),
        };
        let [at, to] = if flow.inside { [Side::Server; 2] } else { [from, from.other()] };
        let (link_source, link_destination) = link_addresses(at);
        let random = &mut self.random;
        let length = match random.below(8) {
            0 => 0,
            1 => 1,
            2 => random.below(1300),
            _ => random.below(60),
        };
        let fresh = Packet::new(flow.protocol, source, destination);
        let packet = Packet {
            link_source,
            link_destination,
            hops: random.between(3, 255) as u8,
            number: random.bits() as u16,
            payload: random.bytes(length),
            ..fresh
        };
        Step {
            flow: number,
            from,
            at,
            to,
            begins: false,
            packet,
            damage: None,
            cut: None,
            strange: None,
            kinds: Vec::new(),
        }
    }

    /// A TCP segment.
    fn segment(&mut self, flow: usize, from: Side, flags: u8) -> Step {
        let mut step = self.step(flow, from);
        step.packet.tcp.flags = flags;
        step.packet.tcp.sequence = self.random.bits() as u32;
        step.packet.tcp.acknowledgement = self.random.bits() as u32;
        if flags & (SYN | RST) != 0 {
            step.packet.payload.clear();
        }
        if flags & SYN != 0 {
            step.packet.tcp.options = SYN_OPTIONS.to_vec();
        }
        step
    }

    fn segments(&mut self, flow: usize, script: &[(Side, u8)]) -> Script {
        script.iter().map(|(from, flags)| self.segment(flow, *from, *flags)).collect()
    }

    /// UDP there and, for most, back, some of it twice.
    pub fn datagrams(&mut self) -> Option<Script> {
        let flow = self.claimed(UDP)?;
        Some(self.exchange(flow))
    }

    fn exchange(&mut self, flow: usize) -> Script {
        let answered = !self.random.one_in(4);
        let mut script = vec![self.step(flow, Side::Client)];
        for _ in 0..self.random.below(8) {
            let from = if answered { *self.random.pick(&Side::BOTH) } else { Side::Client };
            script.push(self.step(flow, from));
            if self.random.one_in(8) {
                script.push(script[script.len() - 1].clone());
            }
        }
        script
    }

    /// TCP as it should be, with what the network does to it: refused, unanswered, repeated, seen
    /// from the middle on, and reopened.
    pub fn connection(&mut self) -> Option<Script> {
        let flow = self.claimed(TCP)?;
        Some(self.tcp(flow))
    }

    fn tcp(&mut self, flow: usize) -> Script {
        use Side::{Client, Server};
        let mut script = match self.random.below(10) {
            0 => return self.segments(flow, &[(Client, SYN), (Server, RST | ACK)]),
            1 => return self.segments(flow, &[(Client, SYN); 3]),
            2 => self.segments(flow, &[(Client, ACK), (Server, ACK)]),
            3 => self.segments(
                flow,
                &[
                    (Client, SYN),
                    (Client, SYN),
                    (Server, SYN | ACK),
                    (Server, SYN | ACK),
                    (Client, ACK),
                ],
            ),
            4 => self.segments(
                flow,
                &[(Client, SYN), (Server, SYN | ACK), (Server, ACK), (Client, ACK)],
            ),
            _ => self.segments(flow, &HANDSHAKE),
        };
        for _ in 0..=self.random.below(3) {
            for _ in 0..self.random.below(8) {
                let flags =
                    *self.random.pick(&[ACK, ACK | PSH, ACK | PSH | ECE, ACK | CWR, ACK | URG]);
                let from = *self.random.pick(&Side::BOTH);
                let mut step = self.segment(flow, from, flags);
                step.packet.tcp.urgent = if flags & URG == 0 { 0 } else { 5 };
                step.packet.tcp.options = self.random.pick(&[&[][..], &TIMESTAMP]).to_vec();
                script.push(step);
                if self.random.one_in(10) {
                    script.push(script[script.len() - 1].clone());
                }
            }
            let (first, second) =
                if self.random.one_in(2) { (Client, Server) } else { (Server, Client) };
            let end: &[(Side, u8)] = match self.random.below(5) {
                0 => return script,
                1 => &[(first, RST)],
                2 => &[(first, RST | ACK)],
                3 => &[(first, FIN | ACK), (second, FIN | ACK), (first, ACK), (second, ACK)],
                _ => &[(first, FIN | ACK), (second, ACK), (second, FIN | ACK), (first, ACK)],
            };
            script.extend(self.segments(flow, end));
            script.extend(self.segments(flow, &HANDSHAKE));
        }
        script
    }

    fn bring_inside(&mut self, number: usize) {
        let inside = server(self.flows[number].asks.is_ipv6(), self.any_number());
        let flow = &mut self.flows[number];
        flow.client.set_ip(inside);
        flow.appears = masqueraded(flow.client);
        (flow.inside, flow.chooses) = (true, true);
    }

    /// A client inside that uses an address of the router's; it may be the backend itself.
    pub fn hairpin(&mut self) -> Option<Script> {
        let protocol = self.protocol();
        let number = self.claimed(protocol)?;
        self.bring_inside(number);
        Some(if protocol == UDP { self.exchange(number) } else { self.tcp(number) })
    }

    /// TCP with any flags in any order, once there is a connection.
    pub fn disorder(&mut self) -> Option<Script> {
        let flow = self.claimed_without_flow(TCP)?;
        let mut script = self.segments(flow, &HANDSHAKE);
        for _ in 0..4 + self.random.below(8) {
            let flags = self.random.bits() as u8;
            let from = *self.random.pick(&Side::BOTH);
            let mut step = self.segment(flow, from, flags);
            if from == Side::Client && self.random.one_in(8) {
                // A header shorter than the shortest, or longer than the packet: nobody's.
                step.packet.payload.clear();
                let words = *self.random.pick(&[0x00, 0x40, 0xf0]);
                step.damage = Some(Damage::Transport(12, vec![words]));
            } else {
                step.strange = Some(Strange::OutOfState);
            }
            script.push(step);
        }
        Some(script)
    }

    /// To a port of the router's that no rule claims.
    pub fn at_the_box(&mut self) -> Option<Script> {
        let (protocol, address) = (self.protocol(), self.any_external());
        let flow = self.unclaimed(protocol, address)?;
        Some(if protocol == UDP {
            vec![self.step(flow, Side::Client)]
        } else {
            let flags = *self.random.pick(&[SYN, ACK, ACK | PSH]);
            self.segments(flow, &[(Side::Client, flags)])
        })
    }

    /// An echo request to the router, which answers, or its DMZ host, which does.
    pub fn echo(&mut self) -> Option<Script> {
        let address = self.any_external();
        let (protocol, kind) = if address.is_ipv4() { (ICMP, 8) } else { (ICMPV6, 128) };
        let rule = rules::dmz(&self.rules, address);
        if rule.is_some_and(|rule| !rules::is_stateless(&self.rules, rule)) {
            return None;
        }
        let client = self.client(address.is_ipv6());
        let at = SocketAddr::new(address, 0);
        let server = rule.map_or(at, |rule| SocketAddr::new(self.rules[rule].backend.ip(), 0));
        let flow = self.open(Flow {
            talk: "",
            rule,
            chooses: false,
            backends: Vec::new(),
            inside: false,
            protocol,
            client,
            appears: client,
            asks: at,
            server,
            answers: at,
        });
        let mut request = self.step(flow, Side::Client);
        let number = self.random.bytes(4);
        let head = |kind: u8| [&[kind, 0, 0, 0][..], &number].concat();
        request.packet.payload.splice(0..0, head(kind));
        if rule.is_none() {
            return Some(vec![request]);
        }
        let mut reply = self.step(flow, Side::Server);
        reply.packet.payload.splice(0..0, head(if kind == 8 { 0 } else { 129 }));
        Some(vec![request, reply])
    }

    /// To a server's own address, on a port that no rule leads to, and back.
    pub fn routed(&mut self) -> Option<Script> {
        let (protocol, address) = (self.protocol(), self.any_server());
        let flow = self.unclaimed(protocol, address)?;
        Some(if protocol == UDP { self.exchange(flow) } else { self.tcp(flow) })
    }

    /// To a server's own address, on a port to which a rule leads.
    pub fn direct(&mut self) -> Option<Script> {
        let flow = self.claimed_reply(UDP)?;
        self.flows[flow].asks = self.flows[flow].server;
        let mut script = self.exchange(flow);
        for step in script.iter_mut().filter(|step| step.from == Side::Server) {
            step.strange = Some(Strange::Direct);
        }
        Some(script)
    }

    /// A server that speaks first, from a port that no rule leads to.
    pub fn outbound(&mut self) -> Option<Script> {
        let (protocol, address) = (self.protocol(), self.any_server());
        let flow = self.unclaimed(protocol, address)?;
        use Side::{Client, Server};
        Some(if protocol == UDP {
            [Server, Client, Server].map(|from| self.step(flow, from)).into()
        } else {
            let script = [(Server, SYN), (Client, SYN | ACK), (Server, ACK), (Client, ACK | PSH)];
            self.segments(flow, &script)
        })
    }

    /// A server that speaks first, from a rule's port.
    pub fn backend_first(&mut self) -> Option<Script> {
        let protocol = self.protocol();
        let flow = self.claimed_reply(protocol)?;
        let mut step = if protocol == UDP {
            self.step(flow, Side::Server)
        } else {
            let flags = *self.random.pick(&[SYN, SYN | ACK, ACK, RST]);
            self.segment(flow, Side::Server, flags)
        };
        step.strange = Some(Strange::BackendFirst);
        Some(vec![step])
    }

    /// From an address that no client has.
    pub fn forged(&mut self) -> Option<Script> {
        let flow = self.claimed_without_flow(UDP)?;
        let Flow { client, appears, .. } = &mut self.flows[flow];
        client.set_ip(if client.is_ipv4() {
            let octets: [u8; 4] = *self.random.pick(&[
                [127, 0, 0, 1],
                [0, 0, 0, 0],
                [224, 0, 0, 1],
                [255, 255, 255, 255],
                rig::WAN.v4.octets(),
                rig::LAN.v4.octets(),
            ]);
            octets.into()
        } else {
            let addresses = [Ipv6Addr::LOCALHOST, rig::WAN.v6, rig::LAN.v6];
            (*self.random.pick(&addresses)).into()
        });
        *appears = *client;
        let mut step = self.step(flow, Side::Client);
        step.strange = Some(Strange::ForgedSource);
        Some(vec![step])
    }

    /// ICMP errors about packets in both directions, from the ends and from routers on the way.
    pub fn errors(&mut self) -> Option<Script> {
        let protocol = self.protocol();
        let number = self.claimed(protocol)?;
        if self.random.one_in(4) {
            self.bring_inside(number);
        }
        let flow = self.flows[number].clone();
        let mut script: Script = if protocol == UDP {
            Side::BOTH.map(|from| self.step(number, from)).into()
        } else {
            self.segments(number, &HANDSHAKE)
        };
        for _ in 0..=self.random.below(3) {
            let about = self.random.pick(&script[..2]).clone();
            let quoted = about.translated(&flow);
            let quoted_bytes = &quoted.bytes()[packet::ETHERNET..];
            let least = quoted_bytes.len() - quoted.payload.len();
            let most = quoted_bytes.len().min(540);
            let length = least + self.random.below(most.saturating_sub(least) + 1);
            let kinds: &[[u8; 2]] = if quoted.is_v4() {
                &[[3, 0], [3, 1], [3, 3], [3, 4], [3, 13], [11, 0], [12, 0]]
            } else {
                &[[1, 0], [1, 3], [1, 4], [2, 0], [3, 0], [4, 0]]
            };
            let kind = *self.random.pick(kinds);
            let mtu = if quoted.is_v4() { [0, 0, 4, 210] } else { [0, 0, 5, 0] };
            let from = about.from.other();
            let mut step = self.step(number, from);
            let mut source = step.packet.source.ip();
            if self.random.one_in(2) {
                // A router beyond the end.
                source = match (step.at, quoted.is_v4()) {
                    (Side::Server, v4) => server(!v4, 40),
                    (_, true) => Ipv4Addr::new(203, 0, 113, 254).into(),
                    (_, false) => Ipv6Addr::from_bits(0x2001_0db8_000f << 80 | 0xfe).into(),
                };
            }
            let destination = step.packet.destination.ip();
            let error = Packet::error(source, destination, kind, mtu, &quoted_bytes[..length]);
            let Packet { protocol, source, destination, payload, .. } = error;
            step.packet = Packet { protocol, source, destination, payload, ..step.packet };
            script.push(step);
        }
        Some(script)
    }

    /// A protocol without ports, to the DMZ host, and back.
    pub fn other_protocol(&mut self) -> Option<Script> {
        let is_dmz = |rules: &[Rule], number: usize| {
            rules[number].protocol == "any" && rules::is_stateless(rules, number)
        };
        let number = self.claimed_by(UDP, is_dmz)?;
        let flow = &mut self.flows[number];
        // ESP, and one that nobody knows: connection tracking has a flow for each pair of addresses.
        flow.protocol = *self.random.pick(&[50, 200]);
        let Flow { client, appears, asks, server, answers, .. } = flow;
        for end in [client, appears, asks, server, answers] {
            end.set_port(0);
        }
        // By way of another address of ours the server could not tell it apart: nftables drops it.
        let flow = self.flows[number].clone();
        let is_alike = |it: &Flow| {
            (it.protocol, it.client, it.server) == (flow.protocol, flow.client, flow.server)
                && it.asks != flow.asks
        };
        if self.flows.iter().any(is_alike) {
            return None;
        }
        Some([Side::Client, Side::Server].map(|from| self.step(number, from)).into())
    }
}

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const URG: u8 = 32;
pub const ECE: u8 = 64;
pub const CWR: u8 = 128;

const HANDSHAKE: [(Side, u8); 3] =
    [(Side::Client, SYN), (Side::Server, SYN | ACK), (Side::Client, ACK)];

/// MSS, which fits every way, as portfwd lowers it otherwise; selective acknowledgements, timestamps, window
/// scale.
const SYN_OPTIONS: [u8; 20] = [2, 4, 2, 24, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];
const TIMESTAMP: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 2, 0, 0, 0, 1];
