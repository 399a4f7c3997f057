//! Flows: what becomes of the packets of stateful rules.
//!
//! An established flow has an entry for each direction, and a packet finds its own with one lookup. A
//! flow that is not established has one entry, under the key that its reply will have: what a forward
//! packet becomes is tried in an order that depends on nothing but the packet and the rule, so the same
//! packet finds the same entry.

use crate::path::{self, Kernel, Route};
use crate::table::{
    Address, AnyAddress, Candidate, ClientKey, Direction, Dropped, Ends, FlowHalf, FlowKey, Jiffies, Mapping,
    MappingKey, Passed, Port, Tally, Translation, flow_flags,
};

/// How many source ports are tried for a new flow: the one that the client has, its own, and others.
const TRIES: u32 = 16;
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
    /// No room, or no memory.
    Full,
}

/// The tables of flows with addresses of `N` bytes.
pub trait Flows<const N: usize> {
    /// Looks at one direction of an established flow, or changes it.
    fn flow<R>(&self, key: &FlowKey<N>, look: impl FnOnce(&mut FlowHalf<N>) -> R) -> Option<R>;
    fn add_flow(&self, key: &FlowKey<N>, half: &FlowHalf<N>) -> Added;
    fn remove_flow(&self, key: &FlowKey<N>);
    /// Looks at a flow that is not established, or changes it.
    fn candidate<R>(
        &self,
        key: &FlowKey<N>,
        look: impl FnOnce(&mut Candidate<N>) -> R,
    ) -> Option<R>;
    fn add_candidate(&self, key: &FlowKey<N>, candidate: &Candidate<N>) -> Added;
    fn remove_candidate(&self, key: &FlowKey<N>);
}

/// What flows look at of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet<const N: usize> {
    pub ends: Ends<N>,
    /// IP protocol number.
    pub protocol: u8,
    /// What it is to its TCP connection.
    pub segment: Segment,
    /// [`flow_flags`] that it brings: FIN, RESET.
    pub flags: u32,
    /// Bytes of the IP packet.
    pub length: u16,
    pub now: Jiffies,
}

/// What a packet is to the TCP connection that it may belong to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Segment {
    /// SYN.
    Opens,
    /// SYN and ACK: what will acknowledge it.
    Accepts(u32),
    /// ACK without SYN or RST: what it acknowledges.
    Acknowledges(u32),
    Other,
    /// Not TCP.
    None,
}

/// Why a packet is not translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    Pass(Passed),
    Drop(Dropped),
}

/// What becomes of a packet to a backend that `translation` claims, of a flow that it may begin.
/// `hairpin`: the client is on an internal interface.
#[inline(always)]
pub fn forward<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    translation: &Translation,
    packet: &Packet<N>,
    hairpin: bool,
) -> Result<Ends<N>, Refused> {
    let key = FlowKey::new(packet.ends, packet.protocol, Direction::Forward);
    let found = kernel.flow(&key, |half| {
        // One of another rule is on its way out.
        (half.is(&key) && half.counter == translation.counter)
            .then(|| (half.becomes, half.seen(packet)))
    });
    match found {
        Some(Some((becomes, look))) => {
            if look {
                look_after(kernel, &key, &becomes, packet);
            }
            Ok(becomes)
        }
        _ => begin(kernel, translation, packet, hairpin),
    }
}

/// What becomes of a packet from a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply<const N: usize> {
    pub ends: Ends<N>,
    /// The rule's.
    pub counter: u32,
    /// The client is on an internal interface.
    pub hairpin: bool,
}

/// What becomes of a packet from a backend, if it is of a flow.
#[inline(always)]
pub fn reply<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    packet: &Packet<N>,
) -> Option<Reply<N>> {
    let key = FlowKey::new(packet.ends, packet.protocol, Direction::Reply);
    let found = kernel.flow(&key, |half| {
        let becomes = half.becomes;
        half.is(&key).then(|| (becomes, half.counter, half.flags, half.seen(packet)))
    });
    let (ends, counter, flags) = match found {
        Some(Some((becomes, counter, flags, look))) => {
            if look {
                look_after(kernel, &key, &becomes, packet);
            }
            (becomes, counter, flags)
        }
        _ => {
            let (becomes, counter, flags, answers) = kernel.candidate(&key, |candidate| {
                let becomes = candidate.becomes;
                candidate.is(&key).then(|| {
                    candidate.seen(Direction::Reply, packet);
                    candidate.flags |= flow_flags::ANSWERED;
                    if let Segment::Accepts(proof) = packet.segment {
                        candidate.proof = proof;
                        candidate.flags |= flow_flags::PROOF;
                    }
                    let answers = candidate.tallies[Direction::Reply as usize].packets;
                    (becomes, candidate.counter, candidate.flags, answers)
                })
            })??;
            if answers >= STREAM {
                establish(kernel, &key);
            }
            (becomes, counter, flags)
        }
    };
    Some(Reply { ends, counter, hairpin: flags & flow_flags::HAIRPIN != 0 })
}

/// A flow that is not established, known or new.
// Not inlined, like what it calls: it is verified on its own stack, and off the common way.
#[inline(never)]
fn begin<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    translation: &Translation,
    packet: &Packet<N>,
    hairpin: bool,
) -> Result<Ends<N>, Refused> {
    let ends = &packet.ends;
    let counter = translation.counter;
    let (backend, backend_port) =
        backend(kernel, translation, ends).ok_or(Refused::Drop(Dropped::NoRoute))?;
    let masquerade = hairpin || translation.has(Translation::MASQUERADE);
    let mut becomes = Ends { destination: backend, destination_port: backend_port, ..*ends };
    if masquerade {
        becomes.source = own_address(kernel, packet.protocol, &becomes)
            .ok_or(Refused::Drop(Dropped::NoAddress))?;
    }
    let (ports, seed) = kernel.masquerade();
    let hash = hash(&ends.source, ends.source_port, seed);
    let own = ends.source_port.number();
    let mut known = None;
    if masquerade {
        known = kernel.client_port(&client_key(packet, becomes.source));
    }
    for attempt in 0..TRIES {
        becomes.source_port = match (attempt, known) {
            (0, Some(port)) => port,
            (0, None) => continue,
            (1, _) if !masquerade || (ports[0] <= own && own <= ports[1]) => ends.source_port,
            _ => nth_port(if masquerade { ports } else { UNPRIVILEGED }, own, hash, attempt),
        };
        if masquerade {
            if !has_mapping(kernel, packet, &becomes) {
                continue;
            }
            if known.is_none() {
                kernel.set_client_port(&client_key(packet, becomes.source), becomes.source_port);
            }
        }
        match find_or_add(kernel, packet, &becomes, counter, hairpin) {
            Found::Ours => return Ok(becomes),
            Found::Proven => {
                establish(kernel, &FlowKey::new(becomes.reversed(), packet.protocol, Direction::Reply));
                return Ok(becomes);
            }
            Found::Anothers => {}
            Found::Nothing => return Err(Refused::Pass(Passed::NoFlow)),
            Found::NoRoom => return Err(Refused::Drop(Dropped::NoRoom)),
        }
    }
    Err(Refused::Drop(Dropped::NoPort))
}

/// What is there under a key.
enum Found {
    Ours,
    /// Ours, and the client has shown that it hears the answers.
    Proven,
    Anothers,
    /// And the packet begins no flow.
    Nothing,
    /// Nothing, and nothing can be added.
    NoRoom,
}

#[inline(never)]
fn find_or_add<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    packet: &Packet<N>,
    becomes: &Ends<N>,
    counter: u32,
    hairpin: bool,
) -> Found {
    let key = FlowKey::new(becomes.reversed(), packet.protocol, Direction::Reply);
    let back = packet.ends.reversed();
    // Twice at most: what another CPU adds meanwhile is looked at.
    for _ in 0..2 {
        let candidate = kernel.candidate(&key, |candidate| {
            let ours = candidate.becomes == back && candidate.is(&key);
            if ours {
                candidate.seen(Direction::Forward, packet);
                candidate.counter = counter;
            }
            (ours, ours && candidate.is_proven(packet), packet.now.since(candidate.last))
        });
        match candidate {
            Some((true, proven, _)) => {
                return if proven { Found::Proven } else { Found::Ours };
            }
            Some((false, _, idle)) if idle <= UNPROVEN || becomes.source == packet.ends.source => {
                return Found::Anothers;
            }
            // Whoever had it was not answered, and the port is ours now.
            Some(_) => kernel.remove_candidate(&key),
            None => {}
        }
        let established = kernel.flow(&key, |half| {
            (half.becomes == back && half.is(&key)).then(|| {
                half.counter = counter;
                (half.created, half.flags)
            })
        });
        match established {
            // Its forward half is missing.
            Some(Some((created, flags))) => {
                let flags = flags & flow_flags::HAIRPIN;
                let twin = key.twin(back);
                let mut half = FlowHalf::new(&twin, *becomes, counter, flags, created);
                half.seen(packet);
                kernel.add_flow(&twin, &half);
                return Found::Ours;
            }
            Some(None) => return Found::Anothers,
            None => {}
        }
        if packet.flags & flow_flags::RESET != 0 {
            return Found::Nothing;
        }
        let flags = if hairpin { flow_flags::HAIRPIN } else { 0 };
        let mut new = Candidate {
            mark: key.mark(),
            counter,
            becomes: back,
            flags,
            proof: 0,
            padding: 0,
            created: packet.now,
            last: packet.now,
            tallies: [Tally::default(); 2],
        };
        new.seen(Direction::Forward, packet);
        match kernel.add_candidate(&key, &new) {
            Added::Yes => {
                kernel.count(counter, |counter| counter.flows += 1);
                return Found::Ours;
            }
            Added::Exists => {}
            Added::Full => return Found::NoRoom,
        }
    }
    Found::Anothers
}

/// Makes two entries of one: the reply's first, so that no forward packet leads to an answer that is not
/// known. What stands there already is this flow's own, written by another CPU, or nothing is done.
#[inline(never)]
fn establish<const N: usize, K: Kernel + Flows<N>>(kernel: &K, key: &FlowKey<N>) {
    let half = kernel.candidate(key, |candidate| {
        let flags = candidate.flags & !(flow_flags::ANSWERED | flow_flags::PROOF);
        let Candidate { becomes, counter, created, last, tallies: [_, tally], .. } = *candidate;
        FlowHalf { last, tally, ..FlowHalf::new(key, becomes, counter, flags, created) }
    });
    let Some(mut half) = half else { return };
    let twin = key.twin(half.becomes);
    let there = kernel.add_flow(key, &half);
    if !is_added(kernel, key, &half, there) {
        return;
    }
    half.mark = twin.mark();
    half.becomes = key.ends.reversed();
    let forward = |candidate: &mut Candidate<N>| candidate.tallies[Direction::Forward as usize];
    half.tally = kernel.candidate(key, forward).unwrap_or_default();
    let added = kernel.add_flow(&twin, &half);
    if !is_added(kernel, &twin, &half, added) {
        if there == Added::Yes {
            kernel.remove_flow(key);
        }
        return;
    }
    if half.becomes.source != twin.ends.source {
        let key = MappingKey {
            address: half.becomes.source.widen(),
            port: half.becomes.source_port,
            protocol: key.protocol,
            padding: [0; 5],
        };
        kernel.mapping(&key, |mapping| mapping.established = 1);
    }
    kernel.remove_candidate(key);
}

/// Whether what was to be added is there.
#[inline(always)]
fn is_added<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    key: &FlowKey<N>,
    half: &FlowHalf<N>,
    added: Added,
) -> bool {
    match added {
        Added::Yes => true,
        Added::Exists => {
            kernel.flow(key, |there| there.becomes == half.becomes && there.is(key)) == Some(true)
        }
        Added::Full => {
            kernel.count(half.counter, |counter| counter.crowded += 1);
            false
        }
    }
}

/// Looks at the other half of a flow: it may have been taken for over, or a TCP connection begins anew
/// between the same ends.
#[inline(never)]
fn look_after<const N: usize, K: Kernel + Flows<N>>(
    kernel: &K,
    key: &FlowKey<N>,
    becomes: &Ends<N>,
    packet: &Packet<N>,
) {
    let twin = key.twin(*becomes);
    let there = kernel.flow(&twin, |half| {
        if packet.segment == Segment::Opens {
            half.flags &= !CLOSING;
        }
    });
    if there.is_some() {
        return;
    }
    let own = kernel.flow(key, |half| (half.counter, half.flags & flow_flags::HAIRPIN, half.created));
    let Some((counter, flags, created)) = own else { return };
    kernel.add_flow(&twin, &FlowHalf::new(&twin, key.ends.reversed(), counter, flags, created));
}

/// What says that a connection ends.
const CLOSING: u32 = flow_flags::FIN | flow_flags::RESET;

/// The backend of a new flow.
#[inline(always)]
fn backend<const N: usize, K: Kernel>(
    kernel: &K,
    translation: &Translation,
    ends: &Ends<N>,
) -> Option<(Address<N>, Port)> {
    let port = ends.destination_port;
    if !translation.has(Translation::SEVERAL) {
        return Some((translation.address.narrow(), translation.port(port)));
    }
    let pool = kernel.page(path::present(translation.pool)?)?;
    // Without the seed: the same client comes to the same backend after a restart.
    let hash = u64::from(hash(&ends.source, ends.source_port, 0));
    let place = (hash * u64::from(translation.backends)) >> 32;
    let chosen = kernel.translation(path::present(pool.0[place as usize & 0xff])?)?;
    Some((chosen.address.narrow(), chosen.port(port)))
}

/// The address of the interface by which a packet leaves.
#[inline(never)]
fn own_address<const N: usize, K: Kernel>(
    kernel: &K,
    protocol: u8,
    goes: &Ends<N>,
) -> Option<Address<N>> {
    let flow = path::Flow::between(goes, protocol);
    let (Route::Via { interface, .. } | Route::NoNeighbour { interface }) =
        kernel.route(&flow, 0, [0; 4]).0
    else {
        return None;
    };
    let address = kernel.interface(interface)?.address();
    (address != Address([0; N])).then_some(address)
}

/// Whether a client has an address and port of this box, or gets it now.
#[inline(never)]
fn has_mapping<const N: usize, K: Kernel>(
    kernel: &K,
    packet: &Packet<N>,
    becomes: &Ends<N>,
) -> bool {
    let key = MappingKey {
        address: becomes.source.widen(),
        port: becomes.source_port,
        protocol: packet.protocol,
        padding: [0; 5],
    };
    let client: AnyAddress = packet.ends.source.widen();
    let port = packet.ends.source_port;
    let there = kernel.mapping(&key, |mapping| {
        let idle = packet.now.since(mapping.last);
        let is_ours = mapping.client == client && mapping.port == port;
        // Not yet shown to hear answers: in a flood each invented client has a port.
        if is_ours || mapping.established == 0 && idle > UNPROVEN {
            (mapping.client, mapping.port) = (client, port);
            mapping.last = packet.now;
            return true;
        }
        false
    });
    there.unwrap_or_else(|| {
        // Connections of the box itself, begun before the ports were reserved.
        let answer = path::Flow::between(&becomes.reversed(), packet.protocol);
        let new = Mapping { client, last: packet.now, port, padding: [0; 2], established: 0 };
        !kernel.has_socket(&answer) && kernel.add_mapping(&key, &new) == Added::Yes
    })
}

#[inline(always)]
fn client_key<const N: usize>(packet: &Packet<N>, own: Address<N>) -> ClientKey {
    ClientKey {
        client: packet.ends.source.widen(),
        address: own.widen(),
        port: packet.ends.source_port,
        protocol: packet.protocol,
        padding: [0; 5],
    }
}

/// A port among `ports`, first and last, of the parity of `own` (RFC 4787, section 4.2.2).
#[inline(always)]
fn nth_port([first, last]: [u16; 2], own: u16, hash: u32, attempt: u32) -> Port {
    let (first, last) = (u32::from(first), u32::from(last));
    let lowest = first + ((first ^ u32::from(own)) & 1);
    let count = (last.saturating_sub(lowest) / 2).wrapping_add(1);
    // An odd step meets others' ports at other places.
    let place = hash.wrapping_add(attempt.wrapping_mul(hash >> 16 | 1)) % count;
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
    #[inline(always)]
    fn new(key: &FlowKey<N>, becomes: Ends<N>, counter: u32, flags: u32, created: Jiffies) -> Self {
        let (mark, tally) = (key.mark(), Tally::default());
        Self { mark, counter, becomes, flags, created, last: created, tally }
    }

    /// Whether this is of `key`, and was when the rest was read.
    #[inline(always)]
    fn is(&self, key: &FlowKey<N>) -> bool {
        // SAFETY: of a reference; volatile, so that it is read after the rest.
        unsafe { (&raw const self.mark).read_volatile() == key.mark() }
    }

    /// Notes a packet. Whether somebody should look after the other half.
    #[inline(always)]
    fn seen(&mut self, packet: &Packet<N>) -> bool {
        let opens = packet.segment == Segment::Opens;
        let look = opens || packet.now.since(self.last) >= PAUSE;
        // What comes after a RST says that it was not heeded (RFC 7857, section 2.1).
        let stays = if opens { !CLOSING } else { !flow_flags::RESET };
        self.flags = self.flags & stays | packet.flags;
        self.last = packet.now;
        self.tally.add(packet.length);
        look
    }
}

impl<const N: usize> Candidate<N> {
    #[inline(always)]
    fn is(&self, key: &FlowKey<N>) -> bool {
        // SAFETY: as in `FlowHalf::is`.
        unsafe { (&raw const self.mark).read_volatile() == key.mark() }
    }

    #[inline(always)]
    fn seen(&mut self, direction: Direction, packet: &Packet<N>) {
        self.flags |= packet.flags;
        self.last = packet.now;
        self.tallies[direction as usize].add(packet.length);
    }

    /// Whether this packet, from the client, shows that it hears the answers.
    #[inline(always)]
    fn is_proven(&self, packet: &Packet<N>) -> bool {
        let answered = self.flags & flow_flags::ANSWERED != 0;
        match packet.segment {
            Segment::Acknowledges(number) => {
                let proof = self.flags & flow_flags::PROOF == 0 || self.proof == number;
                answered && proof && self.flags & flow_flags::RESET == 0
            }
            Segment::Opens | Segment::Accepts(_) | Segment::Other => false,
            // A stream that nobody answers is one too.
            Segment::None => {
                let long = packet.now.since(self.created) > UNPROVEN;
                answered || long && self.tallies[Direction::Forward as usize].packets > STREAM
            }
        }
    }
}
