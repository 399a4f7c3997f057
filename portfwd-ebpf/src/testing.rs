//! A kernel of plain tables, for tests on the host and for `fuzz`.

extern crate std;

use std::boxed::Box;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::HashMap;
use std::vec;
use std::vec::Vec;

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::cross::{self, Conversion, Crossed, Crosses, Step, Then, headers};
use crate::detour::{self, FlowPart, FragmentBench, Outcome};
use crate::flow::{Added, Bench, Flows};
use crate::flow_table::{self, Slot, Slots, WINDOW};
use crate::mss::{self, Syn};
use crate::packet::Frame;
use crate::path::{
    Flow, Kernel, Part, Role, Route, Told, Verdict, handle, handle_flow, handle_own,
};
use crate::table::{
    Address, AnyAddress, ArrivalKey, Bucket, Candidate, Claims, ClientKey, Counter, Direction,
    Endpoint, FirstFragment, FlowHalf, FlowKey, FragmentKey, Hop, Interface, Jiffies,
    LinkAddresses, Mapping, MappingKey, Mss, Page, Passed, Port, Ports, RememberedHop, RouteSet,
    Shift, Translation, Trust,
};

pub const CLIENT: [u8; 4] = [198, 51, 100, 2];
pub const BOX: [u8; 4] = [198, 51, 100, 1];
pub const SECOND: [u8; 4] = [198, 51, 100, 7];
pub const BACKEND: [u8; 4] = [192, 168, 77, 10];
pub const CLIENT6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
pub const BOX6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
pub const BACKEND6: [u8; 16] = [0xfd, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10];
/// The box's addresses inside.
pub const LAN: [u8; 4] = [192, 168, 77, 1];
pub const LAN6: [u8; 16] = [0xfd, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// An address of the box all of whose protocols but TCP and UDP lead to another host.
pub const DMZ_BOX: [u8; 4] = [198, 51, 100, 9];
pub const DMZ: [u8; 4] = [192, 168, 77, 20];
pub const DMZ_BOX6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
pub const DMZ6: [u8; 16] = [0xfd, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20];
pub const INSIDE: u32 = 3;
pub const OUTSIDE: u32 = 2;
/// Of the hash that leads to a set of routes.
pub const BITS: u32 = 4;
/// Rows of `DEVICES`.
pub const INSIDE_DEVICE: u32 = 7;
pub const OUTSIDE_DEVICE: u32 = 8;
pub const HOP: Told = via(INSIDE, [2, 0, 0, 0, 0, 10], [2, 0, 0, 0, 0, 3]);
pub const BACK: Told = via(OUTSIDE, [2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

pub const fn via(interface: u32, destination: [u8; 6], source: [u8; 6]) -> Told {
    let link = LinkAddresses::new(destination, source);
    Told {
        route: Route::Via,
        hop: Hop { device: 0, mtu: 1500, link, padding: 0 },
        ..no_neighbour(interface)
    }
}

pub const fn no_neighbour(interface: u32) -> Told {
    Told { interface, ..nothing_but(Route::NoNeighbour) }
}

/// Without an interface.
pub const fn nothing_but(route: Route) -> Told {
    let hop = Hop { device: 0, mtu: 1500, link: LinkAddresses::new([0; 6], [0; 6]), padding: 0 };
    Told { route, interface: 0, narrow: 0, hop }
}

/// The ports for masquerade.
pub const PORTS: [u16; 2] = [40_000, 40_999];

/// The way of a packet with these ends.
pub type Routes = Box<dyn Fn(&Flow) -> Told>;

/// A box with one rule, 8080 to port 80 of the backend, for TCP and UDP in both families, and one for
/// all other protocols.
pub struct Router {
    pub endpoints4: HashMap<(Direction, Address<4>), Endpoint>,
    pub endpoints6: HashMap<(Direction, Address<16>), Endpoint>,
    pub page: HashMap<u32, Page>,
    pub trust: Cell<Trust>,
    /// Sets that are not here are empty.
    pub routes4: RefCell<HashMap<(Direction, u32), RouteSet<4>>>,
    pub routes6: RefCell<HashMap<(Direction, u32), RouteSet<16>>>,
    pub hops: UnsafeCell<HashMap<u32, Box<RememberedHop>>>,
    /// What the FIB told last, and how often it was asked.
    pub told: UnsafeCell<Told>,
    pub fib: Cell<u32>,
    /// Of the only rule.
    pub mss: Mss,
    pub syn: UnsafeCell<Syn>,
    pub rows: Vec<Translation>,
    pub arrivals: RefCell<Vec<(ArrivalKey, AnyAddress)>>,
    pub flows4: Places<4>,
    pub flows6: Places<16>,
    /// How many of each there may be.
    pub flow_room: usize,
    pub candidates4: RefCell<HashMap<FlowKey<4>, Candidate<4>>>,
    pub candidates6: RefCell<HashMap<FlowKey<16>, Candidate<16>>>,
    pub bench4: UnsafeCell<Bench<4>>,
    pub bench6: UnsafeCell<Bench<16>>,
    pub conversion: UnsafeCell<Conversion>,
    /// The last frame that changed its address family.
    pub converted: RefCell<Option<Vec<u8>>>,
    /// There is no room for longer headers.
    pub cramped: bool,
    pub fragment_bench: UnsafeCell<FragmentBench>,
    /// The ports for masquerade.
    pub masquerade: [u16; 2],
    pub mappings: RefCell<HashMap<MappingKey, Mapping>>,
    pub clients: RefCell<HashMap<ClientKey, Port>>,
    pub outside_flags: u32,
    pub fragments: RefCell<HashMap<FragmentKey, FirstFragment>>,
    pub bucket: RefCell<Bucket>,
    pub now: Cell<u64>,
    /// The last ICMP error that was sent.
    pub answer: RefCell<Option<Vec<u8>>>,
    pub route: Told,
    /// In place of that one, by the ends of the packet.
    pub routes: Option<Routes>,
    pub route_mtu: u16,
    pub ingress_mtu: u32,
    /// Bytes of the first piece of a frame. Programs do not see the others.
    pub piece: usize,
    pub beyond: Cell<usize>,
    /// Whether interfaces transmit frames in several.
    pub transmits_pieces: bool,
    /// Where the packet comes by: flags of an [`Interface`].
    pub ingress: Cell<u32>,
    pub sockets: bool,
    /// The backend that is the box itself.
    pub own: Option<AnyAddress>,
    /// The box sends what is handled.
    pub sent: bool,
    pub asked: Cell<bool>,
    /// Endpoints, pages and translations that were looked up.
    pub lookups: Cell<[u32; 3]>,
    pub counter: RefCell<Counter>,
    pub passed: RefCell<Vec<Passed>>,
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
    pub fn new(route: Told) -> Self {
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
            hops: UnsafeCell::default(),
            told: UnsafeCell::new(route),
            fib: Cell::default(),
            mss: Mss::AUTO,
            syn: UnsafeCell::new(Syn {
                then: Verdict::Pass(Passed::NoRule),
                mtu: 0,
                headers: 0,
                rule: 0,
                place: 0,
            }),
            rows,
            arrivals: RefCell::default(),
            flows4: Places::default(),
            flows6: Places::default(),
            flow_room: usize::MAX,
            candidates4: RefCell::default(),
            candidates6: RefCell::default(),
            bench4: UnsafeCell::new(Bench::EMPTY),
            bench6: UnsafeCell::new(Bench::EMPTY),
            conversion: UnsafeCell::new(Conversion::EMPTY),
            converted: RefCell::default(),
            cramped: false,
            fragment_bench: UnsafeCell::new(FragmentBench::EMPTY),
            masquerade: PORTS,
            mappings: RefCell::default(),
            clients: RefCell::default(),
            outside_flags: Interface::EXTERNAL | Interface::TRANSMITS,
            fragments: RefCell::default(),
            bucket: RefCell::default(),
            now: Cell::new(1),
            answer: RefCell::default(),
            route,
            routes: None,
            route_mtu: 1500,
            ingress_mtu: 1500,
            piece: usize::MAX,
            beyond: Cell::default(),
            transmits_pieces: true,
            ingress: Cell::default(),
            sockets: false,
            own: None,
            sent: false,
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
    pub fn handle(&self, role: Role, frame: &mut [u8]) -> Verdict {
        self.ingress.set(match role {
            Role::External => Interface::EXTERNAL,
            Role::Internal => Interface::INTERNAL,
            Role::Both => Interface::EXTERNAL | Interface::INTERNAL,
        });
        let verdict = handle(self, role, Frame::new(self.first(frame)));
        self.jump(verdict, frame)
    }

    /// The same of what the box sends.
    pub fn handle_own(&self, frame: &mut [u8]) -> Verdict {
        self.ingress.set(Interface::INTERNAL);
        let verdict = handle_own(self, Frame::new(self.first(frame)));
        self.jump(verdict, frame)
    }

    /// The first piece of a frame.
    fn first<'a>(&self, frame: &'a mut [u8]) -> &'a mut [u8] {
        let (first, beyond) = frame.split_at_mut(frame.len().min(self.piece));
        self.beyond.set(beyond.len());
        first
    }

    /// Runs the programs that others jump to.
    fn jump(&self, mut verdict: Verdict, frame: &mut [u8]) -> Verdict {
        let frame = self.first(frame);
        loop {
            let detour = |direction, frame| detour::handle(self, direction, Frame::new(frame));
            let outcome = match verdict {
                Verdict::ForwardDetour(_) => detour(Direction::Forward, frame),
                Verdict::ReplyDetour(_) => detour(Direction::Reply, frame),
                Verdict::Flow(program) => match program.part() {
                    (part, true) => self.part::<4, Ipv4Hdr>(part, frame),
                    (part, false) => self.part::<16, Ipv6Hdr>(part, frame),
                },
                Verdict::Syn(_) => Outcome::Done(mss::handle(self, Frame::new(frame))),
                verdict => return verdict,
            };
            verdict = self.done(outcome, frame);
        }
    }

    fn part<const N: usize, I: Crosses<N>>(&self, part: Part, bytes: &mut [u8]) -> Outcome
    where
        Self: Flows<N>,
    {
        let detour = |part, frame| detour::handle_flow::<N, I, _>(self, part, frame);
        match part {
            Part::CrossForward => {
                return self.cross::<N, I>(Step::Whole, Direction::Forward, bytes);
            }
            Part::CrossReply => return self.cross::<N, I>(Step::Whole, Direction::Reply, bytes),
            Part::CrossFindForward => {
                return self.cross::<N, I>(Step::Find, Direction::Forward, bytes);
            }
            Part::CrossFindReply => return self.cross::<N, I>(Step::Find, Direction::Reply, bytes),
            Part::CrossSendForward => {
                return self.cross::<N, I>(Step::Send, Direction::Forward, bytes);
            }
            Part::CrossSendReply => return self.cross::<N, I>(Step::Send, Direction::Reply, bytes),
            _ => {}
        }
        let frame = Frame::new(bytes);
        match part {
            Part::FindForward => detour(FlowPart::Find(Direction::Forward), frame),
            Part::FindReply => detour(FlowPart::Find(Direction::Reply), frame),
            Part::SendForward => detour(FlowPart::Send(Direction::Forward), frame),
            Part::SendReply => detour(FlowPart::Send(Direction::Reply), frame),
            part => Outcome::Done(handle_flow::<N, I, _>(self, part, frame)),
        }
    }

    /// As the hooks do. The frame that came stays as it is but for what is behind the headers.
    fn cross<const N: usize, I: Crosses<N>>(
        &self,
        step: Step,
        direction: Direction,
        bytes: &mut [u8],
    ) -> Outcome {
        let Crossed { verdict, then } =
            cross::handle::<N, I, _>(self, step, direction, Frame::new(bytes));
        let conversion = self.conversion().unwrap();
        match (then, verdict) {
            (Then::Answer, Verdict::Drop(reason)) => {
                return Outcome::Answer(reason, conversion.answer);
            }
            (Then::Convert, _) => {}
            _ => return Outcome::Done(verdict),
        }
        let is_error = step == Step::Send;
        let head = match (N, is_error) {
            (4, false) => conversion.head::<40>().as_slice(),
            (_, false) => conversion.head::<20>(),
            (4, true) => conversion.head::<88>(),
            (_, true) => conversion.head::<48>(),
        };
        let ether_type = if N == 4 { [0x86, 0xdd] } else { [0x08, 0x00] };
        let link =
            conversion.link().map_or_else(|| bytes[..12].to_vec(), |link| link.bytes().to_vec());
        let headers = if is_error { headers::<N, true>() } else { headers::<N, false>() };
        let rest = &bytes[14 + headers..];
        *self.converted.borrow_mut() = Some([&link, &ether_type[..], head, rest].concat());
        Outcome::Done(conversion.done(self, verdict, !self.cramped))
    }

    fn done(&self, outcome: Outcome, frame: &[u8]) -> Verdict {
        match outcome {
            Outcome::Done(verdict) => verdict,
            Outcome::Answer(reason, answer) => {
                assert_eq!(Some(answer.device), self.ingress().map(|ingress| ingress.device));
                let (link, packet) = frame.split_at(14);
                let mut bytes = link.to_vec();
                bytes.extend(vec![0xee; answer.growth()]);
                bytes.extend(&packet[..answer.quoted()]);
                answer.write(Frame::new(&mut bytes), false).unwrap();
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

    pub fn packets(&self, direction: Direction) -> u64 {
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
    fn hop(&self, row: u32) -> Option<&mut RememberedHop> {
        // SAFETY: as in `flows!`; each row stays where it is.
        let hops = unsafe { &mut *self.hops.get() };
        Some(hops.entry(row).or_default().as_mut())
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
    fn beyond(&self) -> usize {
        self.beyond.get()
    }
    fn is_sent_by(&self, _device: u32) -> bool {
        self.transmits_pieces || self.beyond() == 0
    }
    fn route(&self, flow: &Flow, length: u16, _class: [u8; 4]) -> Option<&mut Told> {
        self.fib.set(self.fib.get() + 1);
        // SAFETY: as in `flows!`.
        let told = unsafe { &mut *self.told.get() };
        *told = self.routes.as_ref().map_or(self.route, |routes| routes(flow));
        told.narrow = if length > self.route_mtu { self.route_mtu.into() } else { 0 };
        Some(told)
    }
    fn told(&self) -> Option<&Told> {
        // SAFETY: as in `flows!`.
        Some(unsafe { &*self.told.get() })
    }
    fn mss(&self, _counter: u32) -> Mss {
        self.mss
    }
    fn syn(&self) -> Option<&mut Syn> {
        // SAFETY: as in `flows!`.
        Some(unsafe { &mut *self.syn.get() })
    }
    fn first_fragment<R>(
        &self,
        key: &FragmentKey,
        look: impl FnOnce(&FirstFragment) -> R,
    ) -> Option<R> {
        self.fragments.borrow().get(key).map(look)
    }
    fn fragment_bench(&self) -> Option<&mut FragmentBench> {
        // SAFETY: as in `flows!`.
        Some(unsafe { &mut *self.fragment_bench.get() })
    }
    fn conversion(&self) -> Option<&mut Conversion> {
        // SAFETY: as in `flows!`.
        Some(unsafe { &mut *self.conversion.get() })
    }
    fn random(&self) -> u32 {
        0x1234_5678
    }
    fn set_first_fragment(&self, key: &FragmentKey, first: &FirstFragment) {
        self.fragments.borrow_mut().insert(*key, *first);
    }
    fn bucket<R>(&self, look: impl FnOnce(&mut Bucket) -> R) -> Option<R> {
        Some(look(&mut self.bucket.borrow_mut()))
    }
    fn is_own(&self, address: &AnyAddress) -> bool {
        self.own == Some(*address)
    }
    fn is_sent(&self) -> bool {
        self.sent
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
        (self.masquerade, 7)
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

/// A table of flows.
pub struct Places<const N: usize>(Box<[Slot<N>]>);

impl<const N: usize> Default for Places<N> {
    fn default() -> Self {
        Self::with_homes(1024)
    }
}

impl<const N: usize> Places<N> {
    pub fn with_homes(homes: u32) -> Self {
        Self((0..homes + WINDOW - 1).map(|_| Slot::empty()).collect())
    }

    /// All entries.
    pub fn halves(&self) -> impl Iterator<Item = FlowHalf<N>> {
        self.0.iter().filter_map(Slot::read)
    }

    pub fn halves_mut(&mut self) -> impl Iterator<Item = &mut FlowHalf<N>> {
        self.0.iter_mut().filter_map(|slot| slot.read().is_some().then(|| slot.get_mut()))
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.0.iter_mut().for_each(|slot| *slot = Slot::empty());
    }

    /// Removes those of a direction.
    pub fn lose(&self, direction: Direction) {
        for half in self.halves().filter(|half| half.direction == direction as u8) {
            flow_table::remove(self, &half.key());
        }
    }

    fn add(&self, half: &FlowHalf<N>, room: usize) -> Added {
        let is_full = || room != usize::MAX && self.halves().count() >= room;
        match flow_table::find(self, &half.key()) {
            None if is_full() => Added::Full,
            _ => flow_table::add(self, half),
        }
    }
}

impl<const N: usize> Slots<N> for Places<N> {
    fn homes(&self) -> u32 {
        self.0.len() as u32 - (WINDOW - 1)
    }
    fn seed(&self) -> u64 {
        1
    }
    fn slot(&self, number: u32) -> Option<&Slot<N>> {
        self.0.get(number as usize)
    }
}

macro_rules! flows {
    ($size:literal, $flows:ident, $candidates:ident, $bench:ident) => {
        impl Flows<$size> for Router {
            fn flow<R>(
                &self,
                key: &FlowKey<$size>,
                look: impl FnOnce(&mut FlowHalf<$size>) -> R,
            ) -> Option<R> {
                flow_table::find(&self.$flows, key).map(look)
            }
            fn flow_at_once<R>(
                &self,
                key: &FlowKey<$size>,
                look: impl FnOnce(&mut FlowHalf<$size>) -> R,
            ) -> Option<R> {
                flow_table::find_at_once(&self.$flows, key).map(look)
            }
            fn add_flow(&self, half: &FlowHalf<$size>) -> Added {
                self.$flows.add(half, self.flow_room)
            }
            fn remove_flow(&self, key: &FlowKey<$size>) {
                flow_table::remove(&self.$flows, key);
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
                // SAFETY: a run asks once, and ends before the next begins.
                Some(unsafe { &mut *self.$bench.get() })
            }
        }
    };
}
flows!(4, flows4, candidates4, bench4);
flows!(16, flows6, candidates6, bench6);
