//! Flows: what becomes of the packets of stateful rules.
//!
//! An established flow has an entry for each direction, and a packet finds its own with one lookup. A
//! flow that is not established has one entry, under the key that its reply will have: what a forward
//! packet becomes is tried in an order that depends on nothing but the packet and the rule, so the same
//! packet finds the same entry.

use crate::path::{self, Kernel};
use crate::table::{
    Address, AnyAddress, Candidate, ClientKey, Direction, Dropped, FlowHalf, FlowKey, Jiffies,
    Mapping, MappingKey, Passed, Port, Size, Tally, Translation, flow_flags,
};

/// How many source ports are tried for a new flow: the one that the client has, its own, and others.
const TRIES: u32 = 10;
/// From which of them on a port may be taken from another client.
const TAKES_OVER: u32 = TRIES / 2;
/// So many answers establish a flow whose client says nothing more: a stream.
const STREAM: u64 = 16;
/// In ticks, of which a second has 100 to 1,000: after such a pause a forward packet looks whether its
/// flow's other half is there.
const PAUSE: u64 = 256;
/// After so many ticks another client may take over the port of one that was not answered.
const UNPROVEN: u64 = 1024;
/// The ports among which another is chosen for a client that keeps its address, if its own is taken.
const UNPRIVILEGED: [u16; 2] = [1024, u16::MAX];

/// What became of an entry that was to be added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Added {
    Yes,
    /// Another is there.
    Exists,
    /// Somebody adds one nearby: it may be this one.
    Busy,
    /// No room, or no memory.
    Full,
}

/// The tables of flows with addresses of `N` bytes.
pub trait Flows<const N: usize> {
    /// Looks at one direction of an established flow, or changes it.
    fn flow<R>(&self, key: &FlowKey<N>, look: impl FnOnce(&mut FlowHalf<N>) -> R) -> Option<R>;
    /// The same, for where most packets pass.
    fn flow_at_once<R>(
        &self,
        key: &FlowKey<N>,
        look: impl FnOnce(&mut FlowHalf<N>) -> R,
    ) -> Option<R>;
    fn add_flow(&self, half: &FlowHalf<N>) -> Added;
    fn remove_flow(&self, key: &FlowKey<N>);
    /// Looks at a flow that is not established, or changes it.
    fn candidate<R>(
        &self,
        key: &FlowKey<N>,
        look: impl FnOnce(&mut Candidate<N>) -> R,
    ) -> Option<R>;
    fn add_candidate(&self, key: &FlowKey<N>, candidate: &Candidate<N>) -> Added;
    fn remove_candidate(&self, key: &FlowKey<N>);
    /// This CPU's bench. Asked for once in a run.
    // Not through a closure: one that the compiler does not inline takes a piece of the stack more.
    #[expect(clippy::mut_from_ref, reason = "it is as if each run had its own")]
    fn bench(&self) -> Option<&mut Bench<N>>;
}

/// Where entries are made: the BPF stack is too small for them. It belongs to one run of a program;
/// none interrupts another on its CPU, as they run with bottom halves disabled.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Bench<const N: usize> {
    pub packet: Packet<N>,
    /// 1 if it comes from a client on an internal interface.
    pub inside: u32,
    /// What it becomes.
    pub becomes: FlowKey<N>,
    /// The rule's row in `COUNTERS`.
    pub counter: u32,
    /// 1 if the packet goes to a client on an internal interface.
    pub hairpin: u32,
    /// 1 if the end that its direction does not translate keeps its address.
    pub stays: u32,
    /// Of the packets that answer it.
    reply: FlowKey<N>,
    candidate: Candidate<N>,
    half: FlowHalf<N>,
    client: ClientKey,
    own: MappingKey,
    mapping: Mapping,
    /// Who had the mapping before.
    displaced: ClientKey,
    /// 1 if the client gets an address of this box.
    masquerade: u32,
    /// The port that it has there; 0 if none is known.
    known: Port,
}

impl<const N: usize> Bench<N> {
    /// Nothing is on it.
    // SAFETY: integers and arrays of them, and an enum that has a zero.
    pub const EMPTY: Self = unsafe { core::mem::zeroed() };
}

/// What flows look at of a packet.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Packet<const N: usize> {
    pub key: FlowKey<N>,
    /// What it is to its TCP connection.
    pub segment: Segment,
    /// With [`Segment::Accepts`], what will acknowledge it; with [`Segment::Acknowledges`], what it
    /// acknowledges.
    pub number: u32,
    /// [`flow_flags`] that it brings: FIN, RESET.
    pub flags: u32,
    pub size: Size,
    pub now: Jiffies,
}

impl<const N: usize> Packet<N> {
    /// Whether it may begin a flow.
    #[inline(always)]
    fn begins(&self) -> bool {
        self.segment != Segment::Looks && self.flags & flow_flags::RESET == 0
    }
}

/// What a packet is to the TCP connection that it may belong to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Segment {
    /// SYN.
    Opens,
    /// SYN and ACK.
    Accepts,
    /// ACK without SYN or RST.
    Acknowledges,
    Other,
    /// Not TCP.
    None,
    /// Of either: it neither begins a flow nor counts in one. What an ICMP error quotes, for example.
    Looks,
}

/// Why a packet is not translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    Pass(Passed),
    Drop(Dropped),
}

/// Works out what the packet on the bench becomes, which goes to a backend, which `translation` claims,
/// and whose flow it may begin.
#[inline(always)]
pub fn forward<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    translation: &Translation,
    bench: &mut Bench<N>,
) -> Result<(), Refused> {
    if established(kernel, bench) { Ok(()) } else { begin(kernel, translation, bench) }
}

/// The same, if it is of an established flow, of the rule whose counter is on the bench.
#[inline(always)]
pub fn established<const N: usize, K: Kernel + Flows<N>>(kernel: &K, bench: &mut Bench<N>) -> bool {
    let Bench { packet, becomes, counter, .. } = bench;
    let found = kernel.flow_at_once(&packet.key, |half| {
        *becomes = half.becomes();
        // One of another rule is on its way out.
        (half.is(&packet.key) && half.counter == *counter).then(|| half.seen(packet))
    });
    let Some(Some(look)) = found else { return false };
    if look {
        look_after(kernel, bench);
    }
    true
}

/// The same, if it is of none.
#[inline(always)]
pub fn begin<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    translation: &Translation,
    bench: &mut Bench<N>,
) -> Result<(), Refused> {
    match on_probation(kernel, translation, bench) {
        Begun::Ours => Ok(()),
        Begun::Proven => {
            bench.reply = bench.becomes.reversed();
            establish(kernel, bench);
            Ok(())
        }
        Begun::Half => {
            if kernel.add_flow(&bench.half) == Added::Exists {
                take_over(kernel, bench);
            }
            Ok(())
        }
        Begun::NoFlow => Err(Refused::Pass(Passed::NoFlow)),
        Begun::NoBackend | Begun::NoAddress | Begun::NoPort if !bench.packet.begins() => {
            Err(Refused::Pass(Passed::NoFlow))
        }
        Begun::NoBackend => Err(Refused::Drop(Dropped::NoRoute)),
        Begun::NoAddress => Err(Refused::Drop(Dropped::NoAddress)),
        Begun::NoPort => Err(Refused::Drop(Dropped::NoPort)),
        Begun::NoRoom => Err(Refused::Drop(Dropped::NoRoom)),
    }
}

/// Works out what the packet on the bench becomes, which comes from a backend: false if it is of no
/// flow.
#[inline(always)]
pub fn reply<const N: usize, K: Kernel + Flows<N>>(kernel: &K, bench: &mut Bench<N>) -> bool {
    let Bench { packet, becomes, counter, hairpin, own, .. } = bench;
    let is_hairpin = |flags| u32::from(flags & flow_flags::HAIRPIN != 0);
    let found = kernel.flow_at_once(&packet.key, |half| {
        *becomes = half.becomes();
        (*counter, *hairpin) = (half.counter, is_hairpin(half.flags.into()));
        half.is(&packet.key).then(|| half.seen(packet))
    });
    if let Some(Some(look)) = found {
        if look {
            look_after(kernel, bench);
        }
        return true;
    }
    let found = kernel.candidate(&packet.key, |candidate| {
        *becomes = candidate.becomes;
        (*counter, *hairpin) = (candidate.counter, is_hairpin(candidate.flags));
        candidate.is(&packet.key).then(|| {
            if packet.segment == Segment::Looks {
                return false;
            }
            candidate.seen(Direction::Reply, packet);
            candidate.flags |= flow_flags::ANSWERED;
            if packet.segment == Segment::Accepts {
                candidate.proof = packet.number;
                candidate.flags |= flow_flags::PROOF;
            }
            candidate.tallies[Direction::Reply as usize].packets >= STREAM
        })
    });
    let Some(Some(is_stream)) = found else { return false };
    // Who is answered keeps the port, if it has not gone to another.
    if !becomes.destination.is(&packet.key.destination) && packet.begins() {
        let (address, port) = (becomes.destination.widen(), becomes.destination_port);
        *own = MappingKey::of(&packet.key.reversed());
        kernel.mapping(own, |mapping| {
            if mapping.client.is(&address) && mapping.port == port {
                mapping.last = packet.now;
            }
        });
    }
    if is_stream {
        bench.reply = bench.packet.key;
        establish(kernel, bench);
    }
    true
}

/// Whether the flow that has the ends of the packet on the bench, by which a service of this box accepts a
/// connection, was closing. A connection of the flow would have made it new, so this one is the service's
/// own, and the flow ends.
#[inline(never)]
pub fn is_over<const N: usize, K: Kernel + Flows<N>>(kernel: &K, bench: &mut Bench<N>) -> bool {
    let Bench { packet: Packet { key, .. }, reply: other, .. } = bench;
    let closing = |candidate: &mut Candidate<N>| candidate.flags & CLOSING != 0;
    if kernel.candidate(key, closing) == Some(true) {
        kernel.remove_candidate(key);
        return true;
    }
    let closing = |half: &mut FlowHalf<N>| u32::from(half.flags) & CLOSING != 0;
    let own = kernel.flow(key, |half| {
        *other = half.becomes().reversed();
        closing(half)
    });
    let Some(closes) = own else { return false };
    let over = closes || kernel.flow(other, closing) == Some(true);
    if over {
        kernel.remove_flow(other);
        kernel.remove_flow(key);
    }
    over
}

/// Has the forward half of the flow of the packet on the bench counted for the rule that claims it now.
#[inline(never)]
fn take_over<const N: usize, K: Kernel + Flows<N>>(kernel: &K, bench: &mut Bench<N>) {
    let Bench { packet, becomes, counter, .. } = bench;
    kernel.flow(&packet.key, |half| {
        if half.becomes().is(becomes) && half.is(&packet.key) {
            half.counter = *counter;
            half.seen(packet);
        }
    });
}

/// What became of a flow that is not established.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Begun {
    /// Known, or new.
    Ours,
    /// Known, and the client has shown that it hears the answers.
    Proven,
    /// Established, but its forward half is missing: it is on the bench.
    Half,
    /// There is none, and the packet begins none.
    NoFlow,
    NoBackend,
    NoAddress,
    NoPort,
    NoRoom,
}

/// Looks for a flow that is not established, or begins it.
// Not inlined, like what it calls: it is verified on its own stack, and off the common way.
#[inline(never)]
fn on_probation<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    translation: &Translation,
    bench: &mut Bench<N>,
) -> Begun {
    if !choose_backend(kernel, translation, bench) {
        return Begun::NoBackend;
    }
    // What the box itself answers comes by here whoever the client is.
    let crosses = bench.becomes.crosses();
    bench.masquerade = match !crosses && kernel.is_own(&bench.becomes.destination.widen()) {
        true => 0,
        false => bench.inside | u32::from(translation.has(Translation::MASQUERADE)),
    };
    bench.known = Port::new(0);
    if bench.masquerade != 0 {
        if !choose_address(kernel, bench) {
            return Begun::NoAddress;
        }
        bench.known = kernel.client_port(&bench.client).unwrap_or(Port::new(0));
    }
    for attempt in 0..TRIES {
        let found = match try_port(kernel, bench, attempt) {
            Found::Nothing => find_or_add(kernel, bench),
            found => found,
        };
        match found {
            Found::Ours => return Begun::Ours,
            Found::Proven => return Begun::Proven,
            Found::Half => return Begun::Half,
            Found::Anothers => {}
            Found::Nothing => return Begun::NoFlow,
            Found::NoRoom => return Begun::NoRoom,
        }
    }
    Begun::NoPort
}

/// Whether the packet on the bench can have this source port: who has it among those that are not
/// established.
#[inline(never)]
fn try_port<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    bench: &mut Bench<N>,
    attempt: u32,
) -> Found {
    let (ports, seed) = kernel.masquerade();
    let Bench { packet, becomes, masquerade, known, .. } = bench;
    let masquerade = *masquerade != 0;
    let FlowKey { source, source_port: port, destination_port: listen, .. } = &packet.key;
    let own = port.number();
    // One socket of a client may go to many listened ports.
    let mut seed = seed ^ u32::from(listen.number()) << 8;
    // Who got none has other chances a while later. Who got one is found by it.
    if masquerade && attempt >= TAKES_OVER {
        seed ^= (packet.now.0 >> 6) as u32;
    }
    let is_known = known.number() != 0;
    becomes.source_port = match attempt {
        0 if is_known => *known,
        0 => return Found::Anothers,
        1 if !masquerade || (ports[0] <= own && own <= ports[1]) => *port,
        _ => {
            let ports = if masquerade { ports } else { UNPRIVILEGED };
            nth_port(ports, own, hash(source, *port, seed), attempt)
        }
    };
    // Those who have a port keep it while there are others.
    if masquerade && !has_mapping(kernel, bench, !is_known, attempt >= TAKES_OVER) {
        return Found::Anothers;
    }
    find(kernel, bench)
}

/// What is there under a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Found {
    Ours,
    Proven,
    Half,
    Anothers,
    /// In the end, also: and the packet begins no flow.
    Nothing,
    /// Nothing, and nothing can be added.
    NoRoom,
}

/// Looks for it among the flows on probation.
#[inline(always)]
fn find<const N: usize, K: Kernel + Flows<N>>(kernel: &K, bench: &mut Bench<N>) -> Found {
    let Bench { packet, becomes, counter, reply, candidate: new, .. } = bench;
    let counter = *counter;
    let looks = packet.segment == Segment::Looks;
    *reply = becomes.reversed();
    let back = &mut new.becomes;
    *back = packet.key.reversed();
    let found = kernel.candidate(reply, |candidate| {
        let ours = candidate.becomes.is(back) && candidate.is(reply);
        if ours && !looks {
            candidate.seen(Direction::Forward, packet);
            candidate.counter = counter;
        }
        (ours, ours && candidate.is_proven(packet), packet.now.since(candidate.last))
    });
    match found {
        Some((true, true, _)) => Found::Proven,
        Some((true, false, _)) => Found::Ours,
        Some((false, _, idle))
            if !packet.begins() || idle <= UNPROVEN || becomes.source.is(&packet.key.source) =>
        {
            Found::Anothers
        }
        // Whoever had it has not shown that it hears the answers, and the port is ours now.
        Some(_) => {
            kernel.remove_candidate(reply);
            Found::Nothing
        }
        None => Found::Nothing,
    }
}

/// Looks for it among the established flows, or begins it.
#[inline(never)]
fn find_or_add<const N: usize, K: Kernel + Flows<N>>(kernel: &K, bench: &mut Bench<N>) -> Found {
    let Bench { packet, becomes, counter, inside, reply, candidate: new, half: new_half, .. } =
        bench;
    let counter = *counter;
    let looks = packet.segment == Segment::Looks;
    let back = &new.becomes;
    let established = kernel.flow(reply, |half| {
        let (created, flags) = (half.created, u32::from(half.flags) & flow_flags::HAIRPIN);
        (half.becomes().is(back) && half.is(reply)).then(|| {
            if !looks {
                half.counter = counter;
            }
            (created, flags)
        })
    });
    match established {
        Some(Some(_)) if looks => return Found::Ours,
        Some(Some((created, flags))) => {
            new_half.fill(&packet.key, becomes, counter, flags, created);
            new_half.seen(packet);
            return Found::Half;
        }
        Some(None) => return Found::Anothers,
        None => {}
    }
    if !packet.begins() {
        return Found::Nothing;
    }
    new.mark = reply.mark();
    new.counter = counter;
    (new.last, new.created) = (packet.now, packet.now.into());
    new.flags = if *inside != 0 { flow_flags::HAIRPIN } else { 0 };
    (new.proof, new.padding) = (0, 0);
    new.tallies = [Tally::default(); 2];
    new.seen(Direction::Forward, packet);
    match kernel.add_candidate(reply, new) {
        Added::Yes => {
            kernel.count(counter, |counter| counter.flows += 1);
            Found::Ours
        }
        // By another CPU, meanwhile.
        Added::Exists | Added::Busy => {
            let ours = |it: &mut Candidate<N>| it.becomes.is(&new.becomes) && it.is(reply);
            if kernel.candidate(reply, ours) == Some(true) { Found::Ours } else { Found::Anothers }
        }
        Added::Full => Found::NoRoom,
    }
}

/// Makes two entries of one, that of `bench.reply`: the reply's first, so that no forward packet leads to
/// an answer that is not known. What stands there already is this flow's own, written by another CPU, or
/// nothing is done.
#[inline(never)]
fn establish<const N: usize, K: Kernel + Flows<N>>(kernel: &K, bench: &mut Bench<N>) {
    let Bench { reply, half, own, .. } = bench;
    let forward = kernel.candidate(reply, |candidate| {
        let flags = candidate.flags & !(flow_flags::ANSWERED | flow_flags::PROOF);
        let Candidate { becomes, counter, created, .. } = candidate;
        half.fill(reply, becomes, *counter, flags, *created);
        (half.last, half.tally) = (candidate.last, candidate.tallies[1]);
        candidate.tallies[0]
    });
    let Some(forward) = forward else { return };
    let there = kernel.add_flow(half);
    if !is_added(kernel, half, there) {
        return;
    }
    half.reverse();
    half.tally = forward;
    let added = kernel.add_flow(half);
    if !is_added(kernel, half, added) {
        // Who is just adding it relies on the other half.
        if there == Added::Yes && added != Added::Busy {
            kernel.remove_flow(reply);
        }
        return;
    }
    // Whoever added that half may have taken it back meanwhile. Then the next packet adds it.
    if there != Added::Yes && kernel.flow(reply, |_| ()).is_none() {
        return;
    }
    if !half.goes.source.is(&half.came.source) {
        *own = MappingKey::of(&half.becomes());
        kernel.mapping(own, |mapping| mapping.established = 1);
    }
    kernel.remove_candidate(reply);
}

/// Whether what was to be added is there.
#[inline(always)]
fn is_added<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    half: &FlowHalf<N>,
    added: Added,
) -> bool {
    match added {
        Added::Yes => true,
        Added::Exists => {
            let key = half.key();
            let same =
                |there: &mut FlowHalf<N>| there.becomes().is(&half.becomes()) && there.is(&key);
            kernel.flow(&key, same) == Some(true)
        }
        // The next packet tries again.
        Added::Busy => false,
        Added::Full => {
            kernel.count(half.counter, |counter| counter.crowded += 1);
            false
        }
    }
}

/// Looks at the other half of the flow of the packet on the bench: it may have been taken for over, or a
/// TCP connection begins anew between the same ends.
#[inline(never)]
fn look_after<const N: usize, K: Kernel + Flows<N>>(kernel: &K, bench: &mut Bench<N>) {
    let Bench { packet, becomes, reply: other, half: new, .. } = bench;
    *other = becomes.reversed();
    let there = kernel.flow(other, |half| {
        if packet.segment == Segment::Opens {
            half.flags &= !(CLOSING as u16);
        }
    });
    if there.is_some() {
        return;
    }
    let own = kernel.flow(&packet.key, |half| {
        let flags = u32::from(half.flags) & flow_flags::HAIRPIN;
        new.fill(other, &packet.key.reversed(), half.counter, flags, half.created);
        half.is(&packet.key)
    });
    if own == Some(true) {
        kernel.add_flow(new);
    }
}

/// What says that a connection ends.
const CLOSING: u32 = flow_flags::FIN | flow_flags::RESET;

/// Has the packet on the bench become one for a backend: false if there is none.
#[inline(always)]
fn choose_backend<const N: usize, K: Kernel>(
    kernel: &K,
    translation: &Translation,
    Bench { packet, becomes, .. }: &mut Bench<N>,
) -> bool {
    let mut chosen = translation;
    if translation.has(Translation::SEVERAL) {
        let Some(pool) = path::present(translation.pool).and_then(|page| kernel.page(page)) else {
            return false;
        };
        // Without the seed: the same client comes to the same backend after a restart.
        let hash = u64::from(hash(&packet.key.source, packet.key.source_port, 0));
        let place = (hash * u64::from(translation.backends)) >> 32;
        let row = path::present(pool.0[place as usize & 0xff]);
        let Some(row) = row.and_then(|row| kernel.translation(row)) else { return false };
        chosen = row;
    }
    *becomes = packet.key;
    becomes.destination = chosen.address.narrow();
    becomes.destination_port = chosen.port(packet.key.destination_port);
    true
}

/// Gives what the packet becomes the address of the interface by which it leaves: false if there is
/// none. Also says who the client is.
#[inline(never)]
fn choose_address<const N: usize, K: Kernel>(kernel: &K, bench: &mut Bench<N>) -> bool {
    let Bench { packet, becomes, client, .. } = bench;
    let told = kernel.route(&path::Flow::of_key_unmapped(becomes), 1, [0; 4]);
    let Some(interface) = told.and_then(|told| told.leaves_by(kernel)) else { return false };
    becomes.source = match becomes.crosses() && becomes.destination.is_mapped() {
        true => interface.address::<4>().mapped().widen().narrow(),
        false => interface.address(),
    };
    let FlowKey { source, source_port: port, protocol, .. } = packet.key;
    let (source, address) = (source.widen(), MappingKey::of(becomes).address);
    *client = ClientKey { client: source, address, port, protocol, padding: [0; 5] };
    !address.is(&AnyAddress([0; 16]))
}

/// Whether the client of the packet on the bench has the address and port that it becomes, or gets them
/// now; then it is noted as the client's port if that is wanted. `take` one over that another client has
/// not shown to need: in a flood each invented client has a port.
#[inline(never)]
fn has_mapping<const N: usize, K: Kernel>(
    kernel: &K,
    bench: &mut Bench<N>,
    note: bool,
    take: bool,
) -> bool {
    let Bench { packet, becomes, client, own, mapping: new, displaced, .. } = bench;
    *own = MappingKey::of(becomes);
    *displaced = *client;
    let there = kernel.mapping(own, |mapping| {
        let idle = packet.now.since(mapping.last);
        let is_ours = mapping.client.is(&client.client) && mapping.port == client.port;
        if !packet.begins() {
            return is_ours;
        }
        if is_ours || take && mapping.established == 0 && idle > UNPROVEN {
            (displaced.client, displaced.port) = (mapping.client, mapping.port);
            (mapping.client, mapping.port) = (client.client, client.port);
            mapping.last = packet.now;
            return true;
        }
        false
    });
    if there == Some(true)
        && !(displaced.client.is(&client.client) && displaced.port == client.port)
        && kernel.client_port(displaced) == Some(becomes.source_port)
    {
        kernel.remove_client(displaced);
    }
    let has = there.unwrap_or_else(|| {
        if !packet.begins() {
            return false;
        }
        let (last, port) = (packet.now, client.port);
        *new = Mapping { client: client.client, last, port, padding: [0; 2], established: 0 };
        // Connections of the box itself, begun before the ports were reserved.
        let is_free = !kernel.has_socket(&path::Flow::of_key_unmapped(&becomes.reversed()));
        is_free && kernel.add_mapping(own, new) == Added::Yes
    });
    if has && note && packet.begins() {
        kernel.set_client_port(client, becomes.source_port);
    }
    has
}

/// A port among `ports`, first and last, of the parity of `own` (RFC 4787, section 4.2.2).
#[inline(always)]
fn nth_port([first, last]: [u16; 2], own: u16, hash: u32, attempt: u32) -> Port {
    let (first, last) = (u32::from(first), u32::from(last));
    let lowest = first + ((first ^ u32::from(own)) & 1);
    let count = (last.saturating_sub(lowest) / 2).wrapping_add(1);
    let place = (mix(u64::from(hash) << 8 | u64::from(attempt)) >> 32) as u32 % count;
    Port::new((lowest + 2 * place) as u16)
}

/// A number that depends on a client's address and port.
#[inline(always)]
fn hash<const N: usize>(address: &Address<N>, port: Port, seed: u32) -> u32 {
    let mut hash = u64::from(seed) << 16 | u64::from(port.number());
    for word in address.0.as_chunks::<4>().0 {
        hash = mix(hash ^ u64::from(u32::from_ne_bytes(*word)) << 32);
    }
    (mix(hash) >> 32) as u32
}

/// Half of the finalizer of MurmurHash3.
#[inline(always)]
fn mix(hash: u64) -> u64 {
    let hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ hash >> 33
}

impl<const N: usize> FlowHalf<N> {
    /// Notes a packet. Whether somebody should look after the other half.
    #[inline(always)]
    fn seen(&mut self, packet: &Packet<N>) -> bool {
        let opens = packet.segment == Segment::Opens;
        if packet.segment == Segment::Looks {
            return false;
        }
        let look = opens || packet.now.since(self.last) >= PAUSE;
        // What comes after a RST says that it was not heeded (RFC 7857, section 2.1).
        let stays = if opens { !CLOSING } else { !flow_flags::RESET };
        let flags = u32::from(self.flags) & stays | packet.flags;
        self.flags = flags as u16;
        self.last = packet.now;
        self.tally.add(packet.size);
        look
    }
}

impl<const N: usize> Candidate<N> {
    #[inline(always)]
    fn is(&self, key: &FlowKey<N>) -> bool {
        // SAFETY: of a reference; volatile, so that it is read after the rest.
        unsafe { (&raw const self.mark).read_volatile() == key.mark() }
    }

    #[inline(always)]
    fn seen(&mut self, direction: Direction, packet: &Packet<N>) {
        if packet.segment == Segment::Opens && self.flags & CLOSING != 0 {
            self.flags &= flow_flags::HAIRPIN;
        }
        self.flags |= packet.flags;
        self.last = packet.now;
        self.tallies[direction as usize].add(packet.size);
    }

    /// Whether this packet, from the client, shows that it hears the answers.
    #[inline(always)]
    fn is_proven(&self, packet: &Packet<N>) -> bool {
        let answered = self.flags & flow_flags::ANSWERED != 0;
        match packet.segment {
            Segment::Acknowledges => {
                let proof = self.flags & flow_flags::PROOF == 0 || self.proof == packet.number;
                answered && proof && self.flags & flow_flags::RESET == 0
            }
            Segment::Opens | Segment::Accepts | Segment::Other | Segment::Looks => false,
            // A stream that nobody answers is one too.
            Segment::None => {
                let long = packet.now.since(self.created.ticks()) > UNPROVEN;
                answered || long && self.tallies[Direction::Forward as usize].packets > STREAM
            }
        }
    }
}
