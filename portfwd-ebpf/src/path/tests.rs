//! The path on plain tables, without a kernel.

extern crate std;

mod answers;
mod errors;
mod flow_detours;
mod fragments;
mod others;

use std::boxed::Box;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::vec;
use std::vec::Vec;

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::detour::{self, FlowPart, Outcome};
use crate::packet::{TCP, UDP};
use crate::table::{Address, Candidate, Dropped, FlowHalf, FlowKey, HOP_BITS, Shift};

mod flows;

const CLIENT: [u8; 4] = [198, 51, 100, 2];
const BOX: [u8; 4] = [198, 51, 100, 1];
const SECOND: [u8; 4] = [198, 51, 100, 7];
const BACKEND: [u8; 4] = [192, 168, 77, 10];
const CLIENT6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const BOX6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const BACKEND6: [u8; 16] = [0xfd, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10];
/// The box's addresses inside.
const LAN: [u8; 4] = [192, 168, 77, 1];
const LAN6: [u8; 16] = [0xfd, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// An address of the box all of whose protocols but TCP and UDP lead to another host.
const DMZ_BOX: [u8; 4] = [198, 51, 100, 9];
const DMZ: [u8; 4] = [192, 168, 77, 20];
const DMZ_BOX6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
const DMZ6: [u8; 16] = [0xfd, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20];
const INSIDE: u32 = 3;
const OUTSIDE: u32 = 2;
/// Of the hash that leads to a set of routes.
const BITS: u32 = 4;
/// Rows of `DEVICES`.
const INSIDE_DEVICE: u32 = 7;
const OUTSIDE_DEVICE: u32 = 8;
const HOP: Route = via(INSIDE, [2, 0, 0, 0, 0, 10], [2, 0, 0, 0, 0, 3]);
const BACK: Route = via(OUTSIDE, [2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

const fn via(interface: u32, destination: [u8; 6], source: [u8; 6]) -> Route {
    Route::Via { interface, mtu: 1500, link: LinkAddresses::new(destination, source) }
}

/// The ports for masquerade.
const PORTS: [u16; 2] = [40_000, 40_999];

/// A box with one rule, 8080 to port 80 of the backend, for TCP and UDP in both families, and one for
/// all other protocols.
struct Router {
    endpoints4: HashMap<(Direction, Address<4>), Endpoint>,
    endpoints6: HashMap<(Direction, Address<16>), Endpoint>,
    page: HashMap<u32, Page>,
    trust: Cell<Trust>,
    /// Sets that are not here are empty.
    routes4: RefCell<HashMap<(Direction, u32), RouteSet<4>>>,
    routes6: RefCell<HashMap<(Direction, u32), RouteSet<16>>>,
    hops: RefCell<HashMap<u32, RememberedHop>>,
    /// How often the FIB was asked.
    fib: Cell<u32>,
    rows: Vec<Translation>,
    arrivals: RefCell<Vec<(ArrivalKey, AnyAddress)>>,
    flows4: RefCell<HashMap<FlowKey<4>, FlowHalf<4>>>,
    flows6: RefCell<HashMap<FlowKey<16>, FlowHalf<16>>>,
    /// How many of each there may be.
    flow_room: usize,
    candidates4: RefCell<HashMap<FlowKey<4>, Candidate<4>>>,
    candidates6: RefCell<HashMap<FlowKey<16>, Candidate<16>>>,
    mappings: RefCell<HashMap<MappingKey, Mapping>>,
    clients: RefCell<HashMap<ClientKey, Port>>,
    outside_flags: u32,
    fragments: RefCell<HashMap<FragmentKey, FirstFragment>>,
    bucket: RefCell<Bucket>,
    now: Cell<u64>,
    /// The last ICMP error that was sent.
    answer: RefCell<Option<Vec<u8>>>,
    route: Route,
    route_mtu: u16,
    ingress_mtu: u32,
    /// Where the packet comes by: of an [`Interface`].
    ingress: Cell<u32>,
    sockets: bool,
    asked: Cell<bool>,
    /// Endpoints, pages and translations that were looked up.
    lookups: Cell<[u32; 3]>,
    counter: RefCell<Counter>,
    passed: RefCell<Vec<Passed>>,
}

/// One port by a page table.
fn paged(port: u16, row: u32, pages: &mut HashMap<u32, Page>) -> Ports {
    let [high, low] = Port::new(port).0;
    let mut add = |place: u8, row| {
        let number = pages.len() as u32 + 1;
        let mut page = Page([0; 256]);
        page.0[usize::from(place)] = row;
        pages.insert(number, page);
        number
    };
    let leaf = add(low, row);
    Ports::paged(add(high, leaf))
}

impl Router {
    fn new(route: Route) -> Self {
        let row = |address, from, to, flags| Translation {
            address,
            shift: Shift::between(from, to),
            backends: 0,
            flags,
            counter: 0,
            pool: 0,
        };
        let many = Translation::MANY_ADDRESSES;
        let rows = vec![
            row(Address([0; 4]).widen(), 0, 0, 0),
            row(Address(BACKEND).widen(), 8080, 80, many | Translation::FIRST_ADDRESS),
            row(Address(BOX).widen(), 80, 8080, many),
            row(Address(BACKEND6).widen(), 8080, 80, Translation::ASK_SOCKETS),
            row(Address(BOX6).widen(), 80, 8080, 0),
            row(Address(BACKEND).widen(), 8080, 80, many),
            row(Address(DMZ).widen(), 0, 0, Translation::ASK_SOCKETS),
            row(Address(DMZ_BOX).widen(), 0, 0, 0),
            row(Address(DMZ6).widen(), 0, 0, Translation::ASK_SOCKETS),
            row(Address(DMZ_BOX6).widen(), 0, 0, 0),
        ];
        let mut page = HashMap::new();
        let endpoint = |ports| {
            let live = Claims { tcp: ports, udp: ports, other: Ports::NONE };
            Endpoint { generations: [live, Claims::default()] }
        };
        let single = |port, row| endpoint(Ports::range(port, port, row));
        let others = |row| {
            let live = Claims { other: Ports::range(0, 254, row), ..Claims::default() };
            Endpoint { generations: [live, Claims::default()] }
        };
        let endpoints4 = HashMap::from([
            ((Direction::Forward, Address(BOX)), endpoint(paged(8080, 1, &mut page))),
            ((Direction::Forward, Address(SECOND)), single(8080, 5)),
            ((Direction::Reply, Address(BACKEND)), single(80, 2)),
            ((Direction::Forward, Address(DMZ_BOX)), others(6)),
            ((Direction::Reply, Address(DMZ)), others(7)),
        ]);
        let endpoints6 = HashMap::from([
            ((Direction::Forward, Address(BOX6)), single(8080, 3)),
            ((Direction::Reply, Address(BACKEND6)), endpoint(paged(80, 4, &mut page))),
            ((Direction::Forward, Address(DMZ_BOX6)), others(8)),
            ((Direction::Reply, Address(DMZ6)), others(9)),
        ]);
        Self {
            endpoints4,
            endpoints6,
            page,
            trust: Cell::default(),
            routes4: RefCell::default(),
            routes6: RefCell::default(),
            hops: RefCell::default(),
            fib: Cell::default(),
            rows,
            arrivals: RefCell::default(),
            flows4: RefCell::default(),
            flows6: RefCell::default(),
            flow_room: usize::MAX,
            candidates4: RefCell::default(),
            candidates6: RefCell::default(),
            mappings: RefCell::default(),
            clients: RefCell::default(),
            outside_flags: Interface::EXTERNAL | Interface::TRANSMITS,
            fragments: RefCell::default(),
            bucket: RefCell::default(),
            now: Cell::new(1),
            answer: RefCell::default(),
            route,
            route_mtu: 1500,
            ingress_mtu: 1500,
            ingress: Cell::default(),
            sockets: false,
            asked: Cell::new(false),
            lookups: Cell::default(),
            counter: RefCell::new(Counter {
                translated: Default::default(),
                last: Jiffies(0),
                to_stack: Default::default(),
                dropped: Default::default(),
                flows: 0,
                crowded: 0,
                answered: 0,
            }),
            passed: RefCell::default(),
        }
    }

    /// As the programs do. An answer leaves the frame as it is.
    fn handle(&self, role: Role, frame: &mut [u8]) -> Verdict {
        self.ingress.set(match role {
            Role::External => Interface::EXTERNAL,
            Role::Internal => Interface::INTERNAL,
            Role::Both => Interface::EXTERNAL | Interface::INTERNAL,
        });
        let mut verdict = handle(self, role, Frame::new(frame));
        loop {
            let came = Frame::new(frame);
            let outcome = match verdict {
                Verdict::ForwardDetour(_) => detour::handle(self, Direction::Forward, came),
                Verdict::ReplyDetour(_) => detour::handle(self, Direction::Reply, came),
                Verdict::Flow(program) => match program.part() {
                    (part, true) => self.part::<4, Ipv4Hdr>(part, came),
                    (part, false) => self.part::<16, Ipv6Hdr>(part, came),
                },
                verdict => return verdict,
            };
            verdict = self.done(outcome, frame);
        }
    }

    fn part<const N: usize, I: Icmp<N>>(&self, part: Part, frame: Frame<'_>) -> Outcome
    where
        Self: Flows<N>,
    {
        let detour = |part, frame| detour::handle_flow::<N, I, _>(self, part, frame);
        match part {
            Part::FindForward => detour(FlowPart::Find(Direction::Forward), frame),
            Part::FindReply => detour(FlowPart::Find(Direction::Reply), frame),
            Part::SendForward => detour(FlowPart::Send(Direction::Forward), frame),
            Part::SendReply => detour(FlowPart::Send(Direction::Reply), frame),
            part => Outcome::Done(handle_flow::<N, I, _>(self, part, frame)),
        }
    }

    fn done(&self, outcome: Outcome, frame: &[u8]) -> Verdict {
        match outcome {
            Outcome::Done(verdict) => verdict,
            Outcome::Answer(reason, answer) => {
                let device = self.ingress().unwrap().device;
                assert_eq!(answer.device, device);
                let mut bytes = vec![0xee; answer.growth()];
                bytes.extend(frame);
                bytes.truncate(bytes.len() - answer.cut as usize);
                answer.write(Frame::new(&mut bytes)).unwrap();
                *self.answer.borrow_mut() = Some(bytes);
                Verdict::Drop(reason)
            }
        }
    }

    fn looked_up(&self, table: usize) {
        let mut lookups = self.lookups.get();
        lookups[table] += 1;
        self.lookups.set(lookups);
    }

    fn packets(&self, direction: Direction) -> u64 {
        self.counter.borrow().translated[direction as usize].packets
    }
}

impl Kernel for Router {
    fn generation(&self) -> u32 {
        0
    }
    fn endpoint_v4(&self, direction: Direction, address: &Address<4>) -> Option<&Endpoint> {
        self.looked_up(0);
        self.endpoints4.get(&(direction, *address))
    }
    fn endpoint_v6(&self, direction: Direction, address: &Address<16>) -> Option<&Endpoint> {
        self.looked_up(0);
        self.endpoints6.get(&(direction, *address))
    }
    fn trust_v4(&self) -> Trust {
        self.trust.get()
    }
    fn trust_v6(&self) -> Trust {
        self.trust.get()
    }
    fn routes_v4<R>(
        &self,
        direction: Direction,
        destination: &Address<4>,
        look: impl FnOnce(&mut RouteSet<4>) -> R,
    ) -> Option<R> {
        let mut routes = self.routes4.borrow_mut();
        Some(look(
            routes.entry((direction, destination.route_set(BITS))).or_insert(RouteSet::EMPTY),
        ))
    }
    fn routes_v6<R>(
        &self,
        direction: Direction,
        destination: &Address<16>,
        look: impl FnOnce(&mut RouteSet<16>) -> R,
    ) -> Option<R> {
        let mut routes = self.routes6.borrow_mut();
        Some(look(
            routes.entry((direction, destination.route_set(BITS))).or_insert(RouteSet::EMPTY),
        ))
    }
    fn page(&self, number: u32) -> Option<&Page> {
        self.looked_up(1);
        self.page.get(&number)
    }
    fn translation(&self, number: u32) -> Option<&Translation> {
        self.looked_up(2);
        self.rows.get(number as usize)
    }
    fn hop<R>(&self, row: u32, look: impl FnOnce(&mut RememberedHop) -> R) -> Option<R> {
        Some(look(self.hops.borrow_mut().entry(row).or_default()))
    }
    fn interface(&self, index: u32) -> Option<Interface> {
        match index {
            INSIDE => Some((Interface::INTERNAL | Interface::TRANSMITS, INSIDE_DEVICE)),
            OUTSIDE => Some((self.outside_flags, OUTSIDE_DEVICE)),
            _ => None,
        }
        .map(|(flags, device)| {
            let [v4, v6] =
                if index == INSIDE { [LAN.as_slice(), &LAN6] } else { [&BOX[..], &BOX6] };
            let (v4, v6) = (Address(v4.try_into().unwrap()), Address(v6.try_into().unwrap()));
            Interface { flags, mtu: 1500, device, v4, v6 }
        })
    }
    fn ingress(&self) -> Option<Interface> {
        let (v4, v6) = (Address([0; 4]), Address([0; 16]));
        let flags = Interface::TRANSMITS | self.ingress.get();
        let device = match self.ingress.get() {
            Interface::INTERNAL => INSIDE_DEVICE,
            _ => OUTSIDE_DEVICE,
        };
        Some(Interface { flags, mtu: self.ingress_mtu, device, v4, v6 })
    }
    fn route(&self, _flow: &Flow, length: u16, _class: [u8; 4]) -> (Route, Option<u32>) {
        self.fib.set(self.fib.get() + 1);
        (self.route, (length > self.route_mtu).then_some(self.route_mtu.into()))
    }
    fn first_fragment<R>(
        &self,
        key: &FragmentKey,
        look: impl FnOnce(&FirstFragment) -> R,
    ) -> Option<R> {
        self.fragments.borrow().get(key).map(look)
    }
    fn fragment_bench(&self) -> Option<&mut FragmentBench> {
        Some(Box::leak(Box::new(FragmentBench::EMPTY)))
    }
    fn set_first_fragment(&self, key: &FragmentKey, first: &FirstFragment) {
        self.fragments.borrow_mut().insert(*key, *first);
    }
    fn bucket<R>(&self, look: impl FnOnce(&mut Bucket) -> R) -> Option<R> {
        Some(look(&mut self.bucket.borrow_mut()))
    }
    fn has_socket(&self, _flow: &Flow) -> bool {
        self.asked.set(true);
        self.sockets
    }
    fn arrival(&self, key: &ArrivalKey) -> Option<AnyAddress> {
        self.arrivals.borrow().iter().find(|(known, _)| known == key).map(|(_, address)| *address)
    }
    fn set_arrival(&self, key: &ArrivalKey, address: Option<&AnyAddress>) {
        self.arrivals.borrow_mut().retain(|(known, _)| known != key);
        if let Some(address) = address {
            self.arrivals.borrow_mut().push((*key, *address));
        }
    }
    fn count(&self, _counter: u32, change: impl FnOnce(&mut Counter)) {
        change(&mut self.counter.borrow_mut());
    }
    fn count_passed(&self, reason: Passed) {
        self.passed.borrow_mut().push(reason);
    }
    fn now(&self) -> Jiffies {
        Jiffies(self.now.get())
    }
    fn masquerade(&self) -> ([u16; 2], u32) {
        (PORTS, 7)
    }
    fn mapping<R>(&self, key: &MappingKey, look: impl FnOnce(&mut Mapping) -> R) -> Option<R> {
        self.mappings.borrow_mut().get_mut(key).map(look)
    }
    fn add_mapping(&self, key: &MappingKey, mapping: &Mapping) -> Added {
        add(&mut self.mappings.borrow_mut(), usize::MAX, key, mapping)
    }
    fn client_port(&self, key: &ClientKey) -> Option<Port> {
        self.clients.borrow().get(key).copied()
    }
    fn set_client_port(&self, key: &ClientKey, port: Port) {
        self.clients.borrow_mut().insert(*key, port);
    }
    fn remove_client(&self, key: &ClientKey) {
        self.clients.borrow_mut().remove(key);
    }
    fn second(&self) -> u64 {
        250
    }
    fn nothing(&self) -> u32 {
        0
    }
    fn note(&self, _flow: impl FnOnce() -> Flow) {}
}

fn add<K: Copy + Eq + std::hash::Hash, V: Copy>(
    table: &mut HashMap<K, V>,
    room: usize,
    key: &K,
    value: &V,
) -> Added {
    match table.len() {
        _ if table.contains_key(key) => Added::Exists,
        length if length >= room => Added::Full,
        _ => {
            table.insert(*key, *value);
            Added::Yes
        }
    }
}

macro_rules! flows {
    ($size:literal, $flows:ident, $candidates:ident) => {
        impl Flows<$size> for Router {
            fn flow<R>(
                &self,
                key: &FlowKey<$size>,
                look: impl FnOnce(&mut FlowHalf<$size>) -> R,
            ) -> Option<R> {
                self.$flows.borrow_mut().get_mut(key).map(look)
            }
            fn add_flow(&self, key: &FlowKey<$size>, half: &FlowHalf<$size>) -> Added {
                add(&mut self.$flows.borrow_mut(), self.flow_room, key, half)
            }
            fn remove_flow(&self, key: &FlowKey<$size>) {
                self.$flows.borrow_mut().remove(key);
            }
            fn candidate<R>(
                &self,
                key: &FlowKey<$size>,
                look: impl FnOnce(&mut Candidate<$size>) -> R,
            ) -> Option<R> {
                self.$candidates.borrow_mut().get_mut(key).map(look)
            }
            fn add_candidate(&self, key: &FlowKey<$size>, candidate: &Candidate<$size>) -> Added {
                add(&mut self.$candidates.borrow_mut(), usize::MAX, key, candidate)
            }
            fn remove_candidate(&self, key: &FlowKey<$size>) {
                self.$candidates.borrow_mut().remove(key);
            }
            fn bench(&self) -> Option<&mut Bench<$size>> {
                Some(std::boxed::Box::leak(std::boxed::Box::new(Bench::EMPTY)))
            }
        }
    };
}
flows!(4, flows4, candidates4);
flows!(16, flows6, candidates6);

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// A valid frame between two ends.
fn frame(protocol: u8, from: (&[u8], u16), to: (&[u8], u16), ttl: u8, payload: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MACS.0, MACS.1);
    let mut bytes = Vec::new();
    let ip = match (<[u8; 4]>::try_from(from.0), <[u8; 4]>::try_from(to.0)) {
        (Ok(source), Ok(destination)) => ethernet.ipv4(source, destination, ttl),
        _ => ethernet.ipv6(from.0.try_into().unwrap(), to.0.try_into().unwrap(), ttl),
    };
    match protocol {
        TCP => ip.tcp(from.1, to.1, 1, 512).write(&mut bytes, payload).unwrap(),
        _ => ip.udp(from.1, to.1).write(&mut bytes, payload).unwrap(),
    }
    bytes
}

/// Whether all checksums of a frame are right, computed in full by another library.
fn is_valid(frame: &[u8]) -> bool {
    let Ok(sliced) = SlicedPacket::from_ethernet(frame) else { return false };
    let transport = sliced.transport.as_ref();
    match &sliced.net {
        Some(etherparse::NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            let payload = ip.payload().payload;
            header.header_checksum == header.calc_header_checksum()
                && match transport {
                    Some(TransportSlice::Tcp(tcp)) => tcp
                        .calc_checksum_ipv4(header.source, header.destination)
                        .is_ok_and(|sum| sum == tcp.checksum()),
                    Some(TransportSlice::Udp(udp)) => {
                        udp.checksum() == 0
                            || udp
                                .to_header()
                                .calc_checksum_ipv4_raw(
                                    header.source,
                                    header.destination,
                                    &payload[8..usize::from(udp.length())],
                                )
                                .is_ok_and(|sum| sum == udp.checksum())
                    }
                    Some(TransportSlice::Icmpv4(_)) => {
                        let sum = etherparse::checksum::Sum16BitWords::new().add_slice(payload);
                        sum.ones_complement() == 0
                    }
                    _ => true,
                }
        }
        Some(etherparse::NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            let (source, destination) = (header.source(), header.destination());
            match transport {
                Some(TransportSlice::Tcp(tcp)) => tcp
                    .calc_checksum_ipv6(source, destination)
                    .is_ok_and(|sum| sum == tcp.checksum()),
                Some(TransportSlice::Udp(udp)) => udp
                    .to_header()
                    .calc_checksum_ipv6_raw(source, destination, udp.payload())
                    .is_ok_and(|sum| sum == udp.checksum()),
                Some(TransportSlice::Icmpv6(icmp)) => icmp.is_checksum_valid(source, destination),
                _ => true,
            }
        }
        _ => true,
    }
}

#[test]
fn both_directions_both_families_both_protocols() {
    let families: [(&[u8], &[u8], &[u8]); 2] =
        [(&CLIENT, &BOX, &BACKEND), (&CLIENT6, &BOX6, &BACKEND6)];
    for (client, external, backend) in families {
        for protocol in [TCP, UDP] {
            for payload in [&b""[..], b"odd", b"even"] {
                let rule = Router::new(HOP);
                let mut forward = frame(protocol, (client, 5000), (external, 8080), 64, payload);
                assert_eq!(
                    rule.handle(Role::External, &mut forward),
                    Verdict::Redirect(INSIDE_DEVICE)
                );
                let mut expected = frame(protocol, (client, 5000), (backend, 80), 63, payload);
                expected[..6].copy_from_slice(&[2, 0, 0, 0, 0, 10]);
                expected[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 3]);
                assert_eq!(forward, expected);
                assert_eq!(rule.packets(Direction::Forward), 1);

                let rule = Router::new(BACK);
                let mut reply = frame(protocol, (backend, 80), (client, 5000), 64, payload);
                assert_eq!(
                    rule.handle(Role::Internal, &mut reply),
                    Verdict::Redirect(OUTSIDE_DEVICE)
                );
                let mut expected = frame(protocol, (external, 8080), (client, 5000), 63, payload);
                expected[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
                expected[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
                assert_eq!(reply, expected);
                let length = reply.len() as u64 - 14;
                let tally = rule.counter.borrow().translated[Direction::Reply as usize];
                assert_eq!((tally.packets, tally.bytes), (1, length));
            }
        }
    }
}

#[test]
fn a_packet_costs_the_same_lookups_whatever_the_rules_are() {
    for (role, destination, port, lookups) in [
        (Role::External, BOX, 8080, [1, 2, 1]),
        (Role::External, BOX, 8081, [1, 2, 0]),
        (Role::External, BOX, 80, [1, 1, 0]),
        (Role::External, SECOND, 8080, [1, 0, 1]),
        (Role::External, SECOND, 80, [1, 0, 0]),
        (Role::External, BACKEND, 80, [1, 0, 0]),
        (Role::Both, BACKEND, 80, [2, 0, 0]),
    ] {
        let router = Router::new(HOP);
        router.handle(role, &mut frame(UDP, (&CLIENT, 5000), (&destination, port), 64, b""));
        assert_eq!(router.lookups.get(), lookups, "{role:?} {destination:?} {port}");
    }
}

#[test]
fn what_the_fib_said_is_remembered_until_it_may_have_changed() {
    let trust = |generation, until| Trust { generation, padding: 0, until: Jiffies(until) };
    let families: [(&[u8], &[u8], &[u8]); 2] =
        [(&CLIENT, &BOX, &BACKEND), (&CLIENT6, &BOX6, &BACKEND6)];
    for (client, external, backend) in families {
        let to_backend = || frame(UDP, (client, 5000), (external, 8080), 64, b"x");
        let to_client = || frame(UDP, (backend, 80), (client, 5000), 64, b"x");
        let router = Router::new(HOP);
        let asked = |mut packet: Vec<u8>| {
            let before = router.fib.get();
            let verdict = router.handle(Role::Both, &mut packet);
            (verdict, router.fib.get() - before, packet)
        };
        let (verdict, count, translated) = asked(to_backend());
        assert_eq!((verdict, count), (Verdict::Redirect(INSIDE_DEVICE), 1));
        // The clock stands at 1.
        for (now, times) in [
            (trust(0, 2), [1, 1]),
            (trust(1, 2), [1, 0]),
            (trust(2, 2), [1, 0]),
            (trust(2, 1), [1, 1]),
            (trust(2, 2), [0, 0]),
            (trust(3, 2), [1, 0]),
        ] {
            router.trust.set(now);
            for times in times {
                assert_eq!(asked(to_backend()), (verdict, times, translated.clone()), "{now:?}");
            }
        }
        // A way to a backend is not one to a client, whatever the address is.
        let mut same = frame(UDP, (backend, 80), (backend, 5000), 64, b"x");
        assert_eq!(router.handle(Role::Internal, &mut same), Verdict::Pass(Passed::Inside));
        assert_eq!(asked(to_client()).0, Verdict::Pass(Passed::Inside));
    }
}

#[test]
fn a_remembered_way_is_not_for_packets_beyond_its_mtu() {
    let mut router = Router::new(HOP);
    router.trust.set(Trust { generation: 1, padding: 0, until: Jiffies(2) });
    let packet =
        |length: usize| frame(UDP, (&CLIENT, 5000), (&BOX, 8080), 64, &vec![0; length - 28]);
    assert_eq!(router.handle(Role::External, &mut packet(1500)), Verdict::Redirect(INSIDE_DEVICE));
    router.route_mtu = 1400;
    // The way that was remembered takes 1,500.
    let verdict = router.handle(Role::External, &mut packet(1500));
    assert_eq!((verdict, router.fib.get()), (Verdict::Redirect(INSIDE_DEVICE), 1));
    router.ingress_mtu = 9000;
    let verdict = router.handle(Role::External, &mut packet(1501));
    assert_eq!((verdict, router.fib.get()), (Verdict::Drop(Dropped::TooBig), 3));
}

#[test]
fn only_ways_to_redirect_by_are_remembered() {
    for route in [
        Route::NoNeighbour { interface: INSIDE },
        Route::Encapsulated,
        Route::NotForwarded,
        Route::Prohibited,
        BACK,
    ] {
        let router = Router::new(route);
        router.trust.set(Trust { generation: 1, padding: 0, until: Jiffies(2) });
        for times in 1..4 {
            router.handle(Role::External, &mut frame(TCP, (&CLIENT, 1), (&BOX, 8080), 64, b""));
            assert_eq!(router.fib.get(), times, "{route:?}");
        }
    }
}

#[test]
fn two_destinations_of_one_set_are_both_remembered() {
    let of =
        |set| (0u32..).map(|n| Address(n.to_be_bytes())).filter(move |a| a.route_set(BITS) == set);
    let tag = Tag::new(1, Direction::Reply);
    let mut routes = RouteSet::EMPTY;
    let found: Vec<Address<4>> = of(3).take(3).collect();
    for (hop, address) in found.iter().enumerate() {
        assert_eq!(routes.find(address, tag), None);
        routes.remember(*address, tag, hop as u32);
    }
    assert_eq!(routes.find(&found[0], tag), None);
    assert_eq!(routes.find(&found[1], tag), Some(1));
    assert_eq!(routes.find(&found[2], tag), Some(2));
    assert_eq!(routes.find(&found[2], Tag::new(2, Direction::Reply)), None);
    assert_eq!(routes.find(&found[2], Tag::new(1, Direction::Forward)), None);
}

#[test]
fn ten_thousand_neighbours_have_sets_with_room_for_each() {
    let full = |addresses: &mut dyn Iterator<Item = u32>| {
        let mut sets = HashMap::<u32, u32>::new();
        for address in addresses {
            *sets.entry(Address(address.to_be_bytes()).route_set(14)).or_default() += 1;
        }
        sets.into_values().filter(|count| *count > 2).sum::<u32>()
    };
    let first = u32::from_be_bytes([198, 18, 0, 0]);
    assert_eq!(full(&mut (first..first + 10_000)), 0);
    assert!(full(&mut (0..10_000).map(|n| first + 256 * n)) < 1_500);
    let ipv6 = |n: u16| {
        let [high, low] = n.to_be_bytes();
        Address([0x20, 1, 0xd, 0xb8, 0, 7, high, low, 2, 0x10, 0, 0xff, 0xfe, 1, low, high])
    };
    let mut sets = HashMap::<u32, u32>::new();
    (0..10_000).for_each(|n| *sets.entry(ipv6(n).route_set(14)).or_default() += 1);
    assert!(sets.into_values().filter(|count| *count > 2).sum::<u32>() < 2_000);
}

#[test]
fn a_hop_that_is_in_use_is_not_written_over() {
    let hop = |device| Hop { device, ..Hop::default() };
    let [first, second] = [1, 2].map(|generation| Tag::new(generation, Direction::Reply));
    let mut row = RememberedHop::default();
    assert!(row.claim(first, &hop(1)));
    assert!(row.claim(first, &hop(1)));
    assert!(!row.claim(first, &hop(2)));
    assert_eq!(row.hop, hop(1));
    assert!(row.claim(second, &hop(2)));
    assert!(!row.claim(second, &hop(1)));
    // Hops that differ by a bit anywhere mostly have rows of their own.
    let rows: std::collections::BTreeSet<u32> = (0..96)
        .map(|bit| {
            let mut bytes = [0x52, 0x54, 0, 1, 2, 3, 2, 0, 0, 0, 0, 9];
            bytes[bit / 8] ^= 1 << (bit % 8);
            Hop { device: 3, link: LinkAddresses::from_bytes(bytes), ..Hop::default() }
                .row::<4>(Direction::Reply)
        })
        .collect();
    assert!(rows.len() > 85, "{}", rows.len());
    let row = |mtu| Hop { mtu, ..hop(3) }.row::<4>(Direction::Reply);
    assert!(row(1500) != row(1400) && row(1500) != row(1280));
    // And never share one with those that have other tags.
    let hops = || (0..2000).map(hop);
    let rows = [
        hops().map(|hop| hop.row::<4>(Direction::Forward)).collect::<HashSet<_>>(),
        hops().map(|hop| hop.row::<4>(Direction::Reply)).collect(),
        hops().map(|hop| hop.row::<16>(Direction::Forward)).collect(),
        hops().map(|hop| hop.row::<16>(Direction::Reply)).collect(),
    ];
    for (rows, others) in rows.iter().zip(rows.iter().cycle().skip(1)) {
        assert!(rows.len() > 500 && rows.iter().all(|row| *row < 1 << HOP_BITS));
        assert!(rows.is_disjoint(others));
    }
}

#[test]
fn a_role_translates_its_own_end_only() {
    let rule = Router::new(HOP);
    let mut forward = frame(TCP, (&CLIENT, 5000), (&BOX, 8080), 64, b"");
    assert_eq!(rule.handle(Role::Both, &mut forward), Verdict::Redirect(INSIDE_DEVICE));

    let rule = Router::new(BACK);
    let mut reply = frame(TCP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"");
    assert_eq!(rule.handle(Role::External, &mut reply), Verdict::Pass(Passed::NoRule));
    assert_eq!(rule.handle(Role::Both, &mut reply), Verdict::Redirect(OUTSIDE_DEVICE));
}

#[test]
fn what_the_stack_sends_keeps_its_hops_and_link_addresses() {
    let rule = Router::new(Route::NoNeighbour { interface: INSIDE });
    let mut forward = frame(UDP, (&CLIENT, 5000), (&BOX, 8080), 2, b"x");
    let verdict = rule.handle(Role::External, &mut forward);
    assert_eq!(verdict, Verdict::Stack(ToStack::NoNeighbour));
    assert_eq!(forward, frame(UDP, (&CLIENT, 5000), (&BACKEND, 80), 2, b"x"));
    assert_eq!(rule.packets(Direction::Forward), 1);
    assert_eq!(rule.counter.borrow().to_stack[ToStack::NoNeighbour as usize], 1);
}

#[test]
fn routes_decide_before_a_byte_is_changed() {
    use Direction::{Forward, Reply};
    let elsewhere = via(9, [0; 6], [0; 6]);
    let cases = [
        (Forward, BACK, Verdict::Drop(Dropped::NotInternal)),
        (Forward, elsewhere, Verdict::Drop(Dropped::NotInternal)),
        (Forward, Route::NoNeighbour { interface: 9 }, Verdict::Drop(Dropped::NotInternal)),
        (Forward, Route::NotForwarded, Verdict::Drop(Dropped::NoRoute)),
        (Forward, Route::Unreachable, Verdict::Drop(Dropped::Unreachable)),
        (Forward, Route::Blackhole, Verdict::Drop(Dropped::Blackhole)),
        (Forward, Route::Prohibited, Verdict::Drop(Dropped::Prohibited)),
        (Forward, Route::ForwardingOff, Verdict::Drop(Dropped::ForwardingOff)),
        (Reply, HOP, Verdict::Pass(Passed::Inside)),
        (Reply, elsewhere, Verdict::Pass(Passed::Inside)),
        (Reply, Route::NoNeighbour { interface: INSIDE }, Verdict::Pass(Passed::Inside)),
        (Reply, Route::NotForwarded, Verdict::Pass(Passed::Inside)),
        (Reply, Route::Unreachable, Verdict::Pass(Passed::Inside)),
        (Reply, Route::Encapsulated, Verdict::Pass(Passed::Inside)),
    ];
    for (direction, route, verdict) in cases {
        let rule = Router::new(route);
        let mut packet = match direction {
            Forward => frame(TCP, (&CLIENT, 5000), (&BOX, 8080), 64, b"x"),
            Reply => frame(TCP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"x"),
        };
        let before = packet.clone();
        assert_eq!(rule.handle(Role::Both, &mut packet), verdict, "{direction:?} {route:?}");
        assert_eq!(packet, before, "{direction:?} {route:?}");
        let dropped: u64 = rule.counter.borrow().dropped.iter().sum();
        assert_eq!(dropped, u64::from(matches!(verdict, Verdict::Drop(_))));
        assert_eq!(rule.passed.borrow().len(), usize::from(matches!(verdict, Verdict::Pass(_))));
        assert_eq!(rule.packets(direction), 0);
    }
}

#[test]
fn a_reply_that_is_too_big_asks_the_sender_or_is_cut_up() {
    let mut rule = Router::new(BACK);
    rule.route_mtu = 28;
    let mut may = frame(UDP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"x");
    may[20] &= !0x40; // etherparse sets "don't fragment"
    let checksum = {
        let sliced = SlicedPacket::from_ethernet(&may).unwrap();
        let Some(etherparse::NetSlice::Ipv4(ip)) = sliced.net else { panic!("IPv4") };
        ip.header().to_header().calc_header_checksum()
    };
    may[24..26].copy_from_slice(&checksum.to_be_bytes());
    let verdict = rule.handle(Role::Internal, &mut may);
    assert_eq!(verdict, Verdict::Stack(ToStack::TooBig));
    assert!(is_valid(&may));

    let mut must_not = frame(UDP, (&BACKEND6, 80), (&CLIENT6, 5000), 64, b"x");
    let before = must_not.clone();
    assert_eq!(rule.handle(Role::Internal, &mut must_not), Verdict::Pass(Passed::TooBig));
    assert_eq!(must_not, before);

    // Longer than anything on the wire that it came by: merged, and its checksum is gone.
    rule.ingress_mtu = 28;
    let verdict = rule.handle(Role::Internal, &mut must_not);
    assert_eq!(verdict, Verdict::Drop(Dropped::Merged));
    assert_eq!(must_not, before);

    // Too big for another network inside: none of ours.
    rule.route = HOP;
    rule.ingress_mtu = 1500;
    let mut may = frame(UDP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"x");
    may[20] &= !0x40;
    assert_eq!(rule.handle(Role::Internal, &mut may), Verdict::Pass(Passed::Inside));
}

#[test]
fn only_rules_that_could_swallow_the_box_ask_for_its_sockets() {
    let mut rule = Router::new(HOP);
    rule.sockets = true;
    let mut packet = frame(UDP, (&CLIENT, 53), (&BOX, 8080), 64, b"");
    assert_eq!(rule.handle(Role::External, &mut packet), Verdict::Redirect(INSIDE_DEVICE));
    assert!(!rule.asked.get());
    let mut packet = frame(UDP, (&CLIENT6, 53), (&BOX6, 8080), 64, b"");
    let before = packet.clone();
    assert_eq!(rule.handle(Role::External, &mut packet), Verdict::Pass(Passed::Own));
    assert_eq!(packet, before);
}

#[test]
fn a_reply_leaves_with_the_address_that_the_client_came_by() {
    let mut rule = Router::new(HOP);
    let mut ask = |external: [u8; 4]| {
        rule.route = HOP;
        let mut packet = frame(UDP, (&CLIENT, 5000), (&external, 8080), 64, b"");
        assert_eq!(rule.handle(Role::External, &mut packet), Verdict::Redirect(INSIDE_DEVICE));
        rule.route = BACK;
        let mut packet = frame(UDP, (&BACKEND, 80), (&CLIENT, 5000), 64, b"");
        assert_eq!(rule.handle(Role::Internal, &mut packet), Verdict::Redirect(OUTSIDE_DEVICE));
        assert!(is_valid(&packet));
        let source: [u8; 4] = packet[26..30].try_into().unwrap();
        (source, rule.arrivals.borrow().len())
    };
    assert_eq!(ask(BOX), (BOX, 0));
    assert_eq!(ask(SECOND), (SECOND, 1));
    assert_eq!(ask(SECOND), (SECOND, 1));
    // The client's port comes again, by the first address.
    assert_eq!(ask(BOX), (BOX, 0));
}

#[test]
fn the_last_hop_is_not_taken() {
    for (ttl, forward, reply) in [
        (0, Verdict::Drop(Dropped::TtlExpired), Verdict::Pass(Passed::Ttl)),
        (1, Verdict::Drop(Dropped::TtlExpired), Verdict::Pass(Passed::Ttl)),
        (2, Verdict::Redirect(INSIDE_DEVICE), Verdict::Redirect(OUTSIDE_DEVICE)),
    ] {
        let families: [[&[u8]; 3]; 2] = [[&CLIENT, &BOX, &BACKEND], [&CLIENT6, &BOX6, &BACKEND6]];
        for [client, external, backend] in families {
            let mut packet = frame(TCP, (client, 5000), (external, 8080), ttl, b"");
            assert_eq!(Router::new(HOP).handle(Role::External, &mut packet), forward);
            let mut packet = frame(TCP, (backend, 80), (client, 5000), ttl, b"");
            assert_eq!(Router::new(BACK).handle(Role::Internal, &mut packet), reply);
        }
    }
}

#[test]
fn frames_cut_short_pass_as_they_came() {
    for (client, external) in [(&CLIENT[..], &BOX[..]), (&CLIENT6, &BOX6)] {
        for protocol in [TCP, UDP] {
            let whole = frame(protocol, (client, 5000), (external, 8080), 64, b"payload");
            for length in 0..whole.len() {
                let mut cut = whole[..length].to_vec();
                let verdict = Router::new(HOP).handle(Role::Both, &mut cut);
                assert_eq!(verdict, Verdict::Pass(Passed::Malformed), "{length} bytes");
                assert_eq!(cut, whole[..length]);
            }
        }
    }
}

/// A frame that a rule claims, with up to four bytes set at random.
fn nearly_valid() -> impl Strategy<Value = Vec<u8>> {
    let ends = prop_oneof![
        Just((CLIENT.to_vec(), BOX.to_vec(), 5000, 8080)),
        Just((BACKEND.to_vec(), CLIENT.to_vec(), 80, 5000)),
        Just((CLIENT6.to_vec(), BOX6.to_vec(), 5000, 8080)),
        Just((BACKEND6.to_vec(), CLIENT6.to_vec(), 80, 5000)),
    ];
    let noise = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (ends, any::<bool>(), 0u8.., prop::collection::vec(any::<u8>(), 0..64), noise).prop_map(
        |((from, to, from_port, to_port), tcp, ttl, payload, noise)| {
            let protocol = if tcp { TCP } else { UDP };
            let mut bytes = frame(protocol, (&from, from_port), (&to, to_port), ttl, &payload);
            for (place, value) in noise {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            bytes
        },
    )
}

proptest! {
    #[test]
    fn what_passes_is_unchanged_and_what_is_translated_stays_valid(
        mut bytes in prop_oneof![nearly_valid(), prop::collection::vec(any::<u8>(), 0..200)],
        route in prop_oneof![
            Just(HOP), Just(BACK), Just(Route::NotForwarded),
            Just(Route::NoNeighbour { interface: INSIDE }),
        ],
        route_mtu in prop_oneof![Just(1500), 20u16..80],
    ) {
        let before = bytes.clone();
        let mut rule = Router::new(route);
        rule.route_mtu = route_mtu;
        let verdict = rule.handle(Role::Both, &mut bytes);
        let translated = rule.packets(Direction::Forward) + rule.packets(Direction::Reply);
        match verdict {
            Verdict::ForwardDetour(_) | Verdict::ReplyDetour(_) => prop_assert!(false, "{verdict:?} and nothing more"),
            Verdict::Pass(reason) => {
                prop_assert_eq!(&bytes, &before);
                prop_assert_eq!(rule.passed.take(), vec![reason]);
                prop_assert_eq!(translated, 0);
            }
            Verdict::Drop(_) => prop_assert_eq!(translated, 0),
            Verdict::Flow(..) => prop_assert!(false, "a part that decides nothing"),
            Verdict::Redirect(_) | Verdict::Stack(_) => {
                prop_assert_eq!(translated, 1);
                prop_assert_eq!(is_valid(&bytes), is_valid(&before));
                prop_assert_eq!(bytes.len(), before.len());
            }
        }
    }
}
