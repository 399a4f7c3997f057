//! Stateful rules.

use std::collections::BTreeSet;

use super::*;
use crate::table::flow_flags;

const STATEFUL: u32 = Translation::STATEFUL;
const MASQUERADE: u32 = STATEFUL | Translation::MASQUERADE;
const SYN: u8 = 2;
const ACK: u8 = 16;
const RST: u8 = 4;
const FIN: u8 = 1;

type End = ([u8; 4], u16);

const GAMER: End = (CLIENT, 5000);
const SERVER: End = (BACKEND, 80);

/// A rule for port 8080 of the box to port 80 of the backend.
fn router(flags: u32) -> Router {
    let mut router = Router::new(HOP);
    router.rows[1].flags = flags;
    router.rows[2].flags = flags & STATEFUL;
    router
}

/// With a range of 100 ports from 8000 on that all become port 80.
fn many_to_one(flags: u32) -> Router {
    let mut router = router(flags | STATEFUL | Translation::ONE_PORT);
    router.rows[1].shift = Shift(80);
    let claims = Ports::range(8000, 8099, 1);
    let live = Claims { tcp: claims, udp: claims, other: Ports::NONE };
    let endpoint = Endpoint { generations: [live, Claims::default()] };
    router.endpoints4.insert((Direction::Forward, Address(BOX)), endpoint);
    router
}

/// Ten backends, by a page of their rows.
fn several() -> Router {
    let mut router = router(STATEFUL | Translation::SEVERAL);
    let mut pool = Page([0; 256]);
    for place in 0..10u8 {
        let number = router.rows.len() as u32;
        let address = Address([192, 168, 77, 100 + place]);
        let row = Translation { address: address.widen(), flags: STATEFUL, ..router.rows[1] };
        router.rows.push(row);
        pool.0[usize::from(place)] = number;
        let endpoint = router.endpoints4[&(Direction::Reply, Address(BACKEND))];
        router.endpoints4.insert((Direction::Reply, address), endpoint);
    }
    router.page.insert(900, pool);
    (router.rows[1].pool, router.rows[1].backends) = (900, 10);
    router
}

/// What a packet of either direction becomes; or its verdict, if it is not translated. TCP has flags,
/// and the numbers of sequence and acknowledgement.
fn send(
    router: &mut Router,
    (role, protocol): (Role, u8),
    from: End,
    to: End,
    tcp: (u8, u32, u32),
) -> Result<(End, End), Verdict> {
    let (flags, sequence, acknowledges) = tcp;
    let mut bytes = frame(protocol, (&from.0, from.1), (&to.0, to.1), 64, b"hello");
    if protocol == TCP {
        bytes[38..42].copy_from_slice(&sequence.to_be_bytes());
        bytes[42..46].copy_from_slice(&acknowledges.to_be_bytes());
        bytes[47] = flags;
        let tcp = etherparse::TcpSlice::from_slice(&bytes[34..]).unwrap();
        let sum = tcp.calc_checksum_ipv4(from.0, to.0).unwrap();
        bytes[50..52].copy_from_slice(&sum.to_be_bytes());
    }
    let came = bytes.clone();
    match router.handle(role, &mut bytes) {
        Verdict::Redirect(_) => {
            assert!(is_valid(&bytes), "{bytes:02x?}");
            assert_eq!(bytes[22], 63, "time to live");
            let end = |address: usize, port: usize| {
                let address: [u8; 4] = bytes[address..address + 4].try_into().unwrap();
                (address, u16::from_be_bytes([bytes[port], bytes[port + 1]]))
            };
            Ok((end(26, 34), end(30, 36)))
        }
        verdict => {
            assert_eq!(bytes, came, "{verdict:?}");
            Err(verdict)
        }
    }
}

fn forward(router: &mut Router, from: End, port: u16) -> Result<(End, End), Verdict> {
    router.route = HOP;
    send(router, (Role::External, UDP), from, (BOX, port), (0, 0, 0))
}

fn reply(router: &mut Router, from: End, to: End) -> Result<(End, End), Verdict> {
    router.route = BACK;
    send(router, (Role::Internal, UDP), from, to, (0, 0, 0))
}

/// A TCP packet from the client, and one to it.
fn segment(router: &mut Router, tcp: (u8, u32, u32)) -> Result<(End, End), Verdict> {
    router.route = HOP;
    send(router, (Role::External, TCP), GAMER, (BOX, 8080), tcp)
}

fn answer(router: &mut Router, tcp: (u8, u32, u32)) -> Result<(End, End), Verdict> {
    router.route = BACK;
    send(router, (Role::Internal, TCP), SERVER, GAMER, tcp)
}

/// Many others, each with one packet.
fn crowd(router: &mut Router, clients: u16) -> u64 {
    let mut refused = 0;
    for client in 0..clients {
        let [a, b] = client.to_be_bytes();
        match forward(router, ([10, 9, a, b], 5000), 8080) {
            Ok(_) => {}
            Err(verdict) => {
                assert_eq!(verdict, Verdict::Drop(Dropped::NoPort));
                refused += 1;
            }
        }
    }
    refused
}

fn established(router: &Router) -> usize {
    let halves = router.flows4.halves().count();
    assert_eq!(halves % 2, 0);
    halves / 2
}

#[test]
fn a_masqueraded_client_is_seen_as_the_box_and_gets_its_answer() {
    let mut router = router(MASQUERADE);
    let (source, destination) = forward(&mut router, GAMER, 8080).unwrap();
    assert_eq!((source.0, destination), (LAN, SERVER));
    assert!((PORTS[0]..=PORTS[1]).contains(&source.1));
    assert_eq!(source.1 % 2, GAMER.1 % 2, "parity");
    assert_eq!(reply(&mut router, SERVER, source), Ok(((BOX, 8080), GAMER)));
    // Again, and again after it is established.
    for _ in 0..3 {
        assert_eq!(forward(&mut router, GAMER, 8080), Ok((source, SERVER)));
        assert_eq!(reply(&mut router, SERVER, source), Ok(((BOX, 8080), GAMER)));
    }
    assert_eq!(established(&router), 1);
    assert!(router.candidates4.borrow().is_empty());
    assert_eq!(router.counter.borrow().flows, 1);
    let packets: Vec<u64> = router.flows4.halves().map(|half| half.tally.packets).collect();
    assert_eq!(packets, [4, 4]);
}

#[test]
fn who_answers_nobody_is_passed_as_it_came() {
    let mut router = router(MASQUERADE);
    let (source, _) = forward(&mut router, GAMER, 8080).unwrap();
    let stranger = (source.0, source.1 ^ 2);
    let no_flow = Err(Verdict::Pass(Passed::NoFlow));
    assert_eq!(reply(&mut router, SERVER, stranger), no_flow);
    assert_eq!(reply(&mut router, SERVER, GAMER), no_flow);
    // Another port of the backend is nobody's.
    assert_eq!(reply(&mut router, (BACKEND, 81), source), Err(Verdict::Pass(Passed::NoRule)));
}

#[test]
fn a_port_is_kept_if_it_is_ours_and_free_and_never_given_twice() {
    let mut router = router(MASQUERADE);
    let own = (CLIENT, PORTS[0] + 7);
    assert_eq!(forward(&mut router, own, 8080), Ok(((LAN, own.1), SERVER)));
    let mut given = BTreeSet::from([own.1]);
    for client in 0..200 {
        let (source, _) = forward(&mut router, ([203, 0, 113, client], own.1), 8080).unwrap();
        assert!(given.insert(source.1), "{} twice", source.1);
        assert_eq!(source.1 % 2, own.1 % 2);
    }
    for client in 0..200 {
        let again = forward(&mut router, ([203, 0, 113, client], own.1), 8080).unwrap();
        assert!(!given.insert(again.0.1));
    }
    assert_eq!(router.mappings.borrow().len(), 201);
}

#[test]
fn a_client_has_one_port_whatever_it_talks_to() {
    let mut router = many_to_one(Translation::MASQUERADE);
    let (first, _) = forward(&mut router, GAMER, 8000).unwrap();
    // Another backend: the same mapping.
    router.rows[1].address = Address([192, 168, 77, 11]).widen();
    let (second, destination) = forward(&mut router, GAMER, 8001).unwrap();
    assert_eq!((first, destination), (second, ([192, 168, 77, 11], 80)));
}

#[test]
fn ports_run_out_with_a_reason_and_come_back() {
    let mut router = router(MASQUERADE);
    let refused = crowd(&mut router, 700);
    // 500 ports of one parity; the last are found only by chance.
    assert!((200..280).contains(&refused), "{refused}");
    assert_eq!(router.counter.borrow().dropped[Dropped::NoPort as usize], refused);
    // Nobody was answered: a while later others have their turn.
    router.now.set(5000);
    let (source, _) = forward(&mut router, GAMER, 8080).unwrap();
    assert_eq!(reply(&mut router, SERVER, source), Ok(((BOX, 8080), GAMER)));
    // Of those who lost theirs nothing stays.
    crowd(&mut router, 1400);
    assert_eq!(router.mappings.borrow().len(), router.clients.borrow().len());
}

#[test]
fn who_got_no_port_gets_one_later_while_some_are_free() {
    let mut router = router(MASQUERADE);
    // 500 ports of one parity.
    let clients: Vec<End> = (0..450u16).map(|n| ([10, 9, (n >> 8) as u8, n as u8], 5000)).collect();
    let mut refused = clients.clone();
    for times in 1..14 {
        router.now.set(times * 64);
        refused.retain(|client| forward(&mut router, *client, 8080).is_err());
        assert!(times > 1 || !refused.is_empty());
    }
    assert!(refused.len() < 5, "{refused:?}");
    // And keeps it.
    let ports: BTreeSet<u16> = clients
        .iter()
        .filter_map(|client| forward(&mut router, *client, 8080).ok())
        .map(|(source, _)| source.1)
        .collect();
    assert!(ports.len() > 445 && router.mappings.borrow().len() == ports.len());
}

#[test]
fn a_client_keeps_its_port_while_there_are_others() {
    let mut router = router(MASQUERADE);
    let own = (CLIENT, PORTS[0] + 7);
    assert_eq!(forward(&mut router, own, 8080), Ok(((LAN, own.1), SERVER)));
    router.now.set(50_000);
    let (source, _) = forward(&mut router, ([203, 0, 113, 9], own.1), 8080).unwrap();
    assert_ne!(source.1, own.1);
    assert_eq!(reply(&mut router, SERVER, (LAN, own.1)), Ok(((BOX, 8080), own)));
}

#[test]
fn an_established_client_keeps_its_port() {
    let mut router = router(MASQUERADE);
    let (source, _) = forward(&mut router, GAMER, 8080).unwrap();
    reply(&mut router, SERVER, source).unwrap();
    forward(&mut router, GAMER, 8080).unwrap();
    router.now.set(50_000);
    assert!(crowd(&mut router, 700) > 200);
    assert_eq!(reply(&mut router, SERVER, source), Ok(((BOX, 8080), GAMER)));
    assert_eq!(forward(&mut router, GAMER, 8080), Ok((source, SERVER)));
}

#[test]
fn a_port_that_the_box_uses_is_not_given() {
    let mut router = router(MASQUERADE);
    router.sockets = true;
    assert_eq!(forward(&mut router, GAMER, 8080), Err(Verdict::Drop(Dropped::NoPort)));
}

#[test]
fn many_ports_become_one_and_answers_find_back() {
    let mut router = many_to_one(0);
    assert_eq!(forward(&mut router, GAMER, 8042), Ok((GAMER, SERVER)));
    assert_eq!(reply(&mut router, SERVER, GAMER), Ok(((BOX, 8042), GAMER)));
    // The same socket to another listened port: to the backend it must look different.
    let (source, destination) = forward(&mut router, GAMER, 8043).unwrap();
    assert_eq!(destination, SERVER);
    assert!(source.0 == CLIENT && source.1 != GAMER.1, "{source:?}");
    assert_eq!(reply(&mut router, SERVER, source), Ok(((BOX, 8043), GAMER)));
    assert_eq!(reply(&mut router, SERVER, GAMER), Ok(((BOX, 8042), GAMER)));
    assert_eq!(forward(&mut router, GAMER, 8043), Ok((source, SERVER)));
}

#[test]
fn a_flow_keeps_its_backend_for_life() {
    let mut router = several();
    let mut chosen: Vec<(End, End)> = Vec::new();
    for client in 0..100 {
        let client = ([203, 0, 113, client], 5000);
        let (source, backend) = forward(&mut router, client, 8080).unwrap();
        assert_eq!((source, backend.1), (client, 80));
        assert_eq!(reply(&mut router, backend, client), Ok(((BOX, 8080), client)));
        assert_eq!(forward(&mut router, client, 8080), Ok((client, backend)));
        chosen.push((client, backend));
    }
    let backends: BTreeSet<End> = chosen.iter().map(|(_, backend)| *backend).collect();
    assert_eq!((backends.len(), established(&router)), (10, 100));
    // For new flows, two of ten backends are gone.
    router.rows[1].backends = 8;
    for (client, backend) in chosen {
        assert_eq!(forward(&mut router, client, 8080), Ok((client, backend)));
    }
}

#[test]
fn a_reply_of_no_flow_is_answered_by_the_rule_where_that_is_enough() {
    let mut router = several();
    router.rows[2].flags |= Translation::ALSO_ALONE;
    let backend = ([192, 168, 77, 103], 80);
    assert_eq!(reply(&mut router, backend, GAMER), Ok(((BOX, 8080), GAMER)));
}

#[test]
fn a_connection_is_established_when_the_client_acknowledges_the_backend() {
    let mut router = router(STATEFUL);
    segment(&mut router, (SYN, 100, 0)).unwrap();
    segment(&mut router, (SYN, 100, 0)).unwrap();
    answer(&mut router, (SYN | ACK, 900, 101)).unwrap();
    // An invented source repeats itself, or guesses.
    segment(&mut router, (SYN, 100, 0)).unwrap();
    segment(&mut router, (ACK, 101, 900)).unwrap();
    assert_eq!(established(&router), 0);
    segment(&mut router, (ACK, 101, 901)).unwrap();
    assert_eq!(established(&router), 1);

    // A host whose address was used says that it knows of nothing.
    let mut router = self::router(STATEFUL);
    segment(&mut router, (SYN, 100, 0)).unwrap();
    answer(&mut router, (SYN | ACK, 900, 101)).unwrap();
    segment(&mut router, (RST, 101, 0)).unwrap();
    segment(&mut router, (ACK, 101, 901)).unwrap();
    assert_eq!(established(&router), 0);
}

#[test]
fn the_end_of_a_connection_is_noted_and_a_new_one_begins_afresh() {
    let mut router = router(STATEFUL);
    segment(&mut router, (SYN, 100, 0)).unwrap();
    answer(&mut router, (SYN | ACK, 900, 101)).unwrap();
    segment(&mut router, (ACK, 101, 901)).unwrap();
    let flags = |router: &Router| -> BTreeSet<u32> {
        router.flows4.halves().map(|half| half.flags.into()).collect()
    };
    answer(&mut router, (FIN | ACK, 901, 101)).unwrap();
    assert_eq!(flags(&router), BTreeSet::from([0, flow_flags::FIN]));
    segment(&mut router, (FIN | ACK, 101, 902)).unwrap();
    assert_eq!(flags(&router), BTreeSet::from([flow_flags::FIN]));
    segment(&mut router, (SYN, 7000, 0)).unwrap();
    assert_eq!(flags(&router), BTreeSet::from([0]));
    answer(&mut router, (RST | ACK, 0, 7001)).unwrap();
    assert_eq!(flags(&router), BTreeSet::from([0, flow_flags::RESET]));
    // Not heeded.
    answer(&mut router, (ACK, 0, 7001)).unwrap();
    assert_eq!(flags(&router), BTreeSet::from([0]));
}

#[test]
fn a_connection_that_was_refused_may_be_tried_again() {
    let mut router = router(STATEFUL);
    segment(&mut router, (SYN, 100, 0)).unwrap();
    answer(&mut router, (RST | ACK, 0, 101)).unwrap();
    segment(&mut router, (SYN, 500, 0)).unwrap();
    // Of nothing that it was answered.
    segment(&mut router, (ACK, 501, 901)).unwrap();
    assert_eq!(established(&router), 0);
    answer(&mut router, (SYN | ACK, 900, 501)).unwrap();
    segment(&mut router, (ACK, 501, 901)).unwrap();
    assert_eq!(established(&router), 1);
}

#[test]
fn a_reset_begins_no_flow() {
    let mut router = router(MASQUERADE);
    assert_eq!(segment(&mut router, (RST, 1, 0)), Err(Verdict::Pass(Passed::NoFlow)));
    assert!(router.candidates4.borrow().is_empty());
}

#[test]
fn a_full_table_keeps_what_it_has_and_new_flows_work_beside_it() {
    let mut router = router(MASQUERADE);
    router.flow_room = 2;
    let mut sources = Vec::new();
    for client in [1, 2, 3] {
        let client = ([203, 0, 113, client], 5000);
        let (source, _) = forward(&mut router, client, 8080).unwrap();
        sources.push((client, source));
        reply(&mut router, SERVER, source).unwrap();
        forward(&mut router, client, 8080).unwrap();
    }
    assert_eq!(established(&router), 1);
    assert_eq!(router.counter.borrow().crowded, 2);
    for (client, source) in sources {
        assert_eq!(forward(&mut router, client, 8080), Ok((source, SERVER)));
        assert_eq!(reply(&mut router, SERVER, source), Ok(((BOX, 8080), client)));
    }
}

#[test]
fn a_flow_that_lost_a_half_is_made_whole() {
    for lost in [Direction::Forward, Direction::Reply] {
        let mut router = router(MASQUERADE);
        let (source, _) = forward(&mut router, GAMER, 8080).unwrap();
        reply(&mut router, SERVER, source).unwrap();
        forward(&mut router, GAMER, 8080).unwrap();
        router.flows4.lose(lost);
        router.now.set(1000);
        assert_eq!(forward(&mut router, GAMER, 8080), Ok((source, SERVER)), "{lost:?}");
        assert_eq!(reply(&mut router, SERVER, source), Ok(((BOX, 8080), GAMER)), "{lost:?}");
        assert_eq!(established(&router), 1);
    }
}

#[test]
fn an_entry_whose_memory_is_anothers_now_is_not_used() {
    let mut router = router(STATEFUL);
    forward(&mut router, GAMER, 8080).unwrap();
    reply(&mut router, SERVER, GAMER).unwrap();
    forward(&mut router, GAMER, 8080).unwrap();
    for half in router.flows4.halves_mut() {
        half.came.source = Address([10, 9, 9, 9]);
        half.goes.destination = Address([10, 9, 9, 8]);
    }
    assert_eq!(reply(&mut router, SERVER, GAMER), Err(Verdict::Pass(Passed::NoFlow)));
}

#[test]
fn a_stream_is_established_whoever_sends_it() {
    let mut router = router(STATEFUL);
    forward(&mut router, GAMER, 8080).unwrap();
    for _ in 0..16 {
        reply(&mut router, SERVER, GAMER).unwrap();
    }
    assert_eq!(established(&router), 1);

    let mut router = self::router(STATEFUL);
    for packet in 0..40 {
        router.now.set(100 * packet);
        forward(&mut router, GAMER, 8080).unwrap();
    }
    assert_eq!(established(&router), 1);
}

#[test]
fn a_client_inside_that_uses_the_external_address_gets_its_answer() {
    // Of a stateless rule, and of those with flows.
    for flags in [0, STATEFUL, MASQUERADE] {
        let mut router = router(flags);
        for client in [([192, 168, 77, 20], 5000), (BACKEND, 5000)] {
            router.route = HOP;
            let there = send(&mut router, (Role::Internal, UDP), client, (BOX, 8080), (0, 0, 0));
            let (source, destination) = there.unwrap();
            assert_eq!((source.0, destination), (LAN, SERVER), "{flags} {client:?}");
            // The FIB's answer for the client, which is the only one here.
            let back = send(&mut router, (Role::Internal, UDP), SERVER, source, (0, 0, 0));
            assert_eq!(back, Ok(((BOX, 8080), client)), "{flags} {client:?}");
            let other = (source.0, source.1 ^ 1);
            let back = send(&mut router, (Role::Internal, UDP), SERVER, other, (0, 0, 0));
            let reason = if flags == 0 { Passed::Inside } else { Passed::NoFlow };
            assert_eq!(back, Err(Verdict::Pass(reason)));
        }
    }
}

#[test]
fn what_hairpins_is_not_remembered_as_a_way_to_clients_outside() {
    let mut router = router(STATEFUL);
    router.trust.set(Trust { generation: 1, padding: 0, until: Jiffies(u64::MAX) });
    let client = ([192, 168, 77, 20], 5000);
    router.route = HOP;
    let there = send(&mut router, (Role::Internal, UDP), client, (BOX, 8080), (0, 0, 0));
    let (source, _) = there.unwrap();
    send(&mut router, (Role::Internal, UDP), SERVER, source, (0, 0, 0)).unwrap();
    // What the backend sends to that client is none of ours.
    router.rows[2].flags = 0;
    let answer = send(&mut router, (Role::Internal, UDP), SERVER, client, (0, 0, 0));
    assert_eq!(answer, Err(Verdict::Pass(Passed::Inside)));
}

#[test]
fn an_answer_to_a_masqueraded_client_comes_in_where_clients_do() {
    let mut router = router(MASQUERADE);
    // One interface: the address that is listened on is the one that masquerades.
    router.route = BACK;
    let flag = Interface::INTERNAL | Interface::EXTERNAL | Interface::TRANSMITS;
    router.outside_flags = flag;
    let both = (Role::Both, UDP);
    let (source, destination) = send(&mut router, both, GAMER, (BOX, 8080), (0, 0, 0)).unwrap();
    assert_eq!((source.0, destination), (BOX, SERVER));
    let answer = send(&mut router, both, SERVER, source, (0, 0, 0));
    assert_eq!(answer, Ok(((BOX, 8080), GAMER)));
}

#[test]
fn the_box_answers_as_a_backend_by_the_address_that_was_asked() {
    let mut router = router(STATEFUL);
    router.own = Some(Address(SERVER.0).widen());
    for route in [Route::NotForwarded, Route::ForwardingOff] {
        router.route = nothing_but(route);
        for ttl in [64, 2] {
            let (listen, server) = ((&BOX[..], 8080), (&SERVER.0[..], SERVER.1));
            let mut asked = frame(UDP, (&GAMER.0, GAMER.1), listen, ttl, b"hello");
            let verdict = router.handle(Role::External, &mut asked);
            assert_eq!(verdict, Verdict::Stack(ToStack::Local));
            assert_eq!(asked, frame(UDP, (&GAMER.0, GAMER.1), server, ttl, b"hello"));
        }
    }
    (router.sent, router.route) = (true, nothing_but(Route::Chosen));
    // How far it may go is not portfwd's to say.
    for ttl in [64, 1] {
        let (listen, server) = ((&BOX[..], 8080), (&SERVER.0[..], SERVER.1));
        let mut answer = frame(UDP, server, (&GAMER.0, GAMER.1), ttl, b"hello");
        assert_eq!(router.handle_own(&mut answer), Verdict::Stack(ToStack::Local));
        assert_eq!(answer, frame(UDP, listen, (&GAMER.0, GAMER.1), ttl, b"hello"));
        // To another client, of whom no rule knows.
        let mut own = frame(UDP, server, (&GAMER.0, 7), ttl, b"hello");
        let came = own.clone();
        assert!(matches!(router.handle_own(&mut own), Verdict::Pass(_)));
        assert_eq!(own, came);
    }
    assert!(router.answer.borrow().is_none());
}

#[test]
fn a_client_on_the_box_is_masqueraded_and_answered() {
    let mut router = router(0);
    router.route = HOP;
    let client = (BOX, 40_001);
    let mut asked = frame(UDP, (&client.0, client.1), (&BOX, 8080), 64, b"hello");
    assert_eq!(router.handle_own(&mut asked), Verdict::Redirect(INSIDE_DEVICE));
    let source =
        ([0, 1, 2, 3].map(|at| asked[26 + at]), u16::from_be_bytes([asked[34], asked[35]]));
    assert_eq!(source.0, LAN);
    router.route = nothing_but(Route::NotForwarded);
    let (server, to) = ((&SERVER.0[..], SERVER.1), (&source.0[..], source.1));
    let mut answer = frame(UDP, server, to, 64, b"hello");
    assert_eq!(router.handle(Role::Internal, &mut answer), Verdict::Stack(ToStack::Local));
    assert_eq!(answer, frame(UDP, (&BOX, 8080), (&client.0, client.1), 64, b"hello"));
    // What is to another address of its own is not looked at.
    let mut own = frame(UDP, (&BOX, 40_001), (&SECOND, 53), 64, b"hello");
    assert_eq!(router.handle_own(&mut own), Verdict::Pass(Passed::NoRule));
}

proptest! {
    /// Whatever comes, no two clients look the same to a backend, and every answer finds its client.
    #[test]
    fn answers_find_their_clients(
        masquerade in any::<bool>(),
        clients in prop::collection::vec((0u8..6, 40_000u16..40_004, 8000u16..8004), 1..60),
    ) {
        let mut router = many_to_one(if masquerade { Translation::MASQUERADE } else { 0 });
        let mut seen: HashMap<End, (End, u16)> = HashMap::new();
        for (client, port, listen) in clients {
            let client = ([203, 0, 113, client], port);
            let (source, destination) = forward(&mut router, client, listen).unwrap();
            prop_assert_eq!(destination, SERVER);
            let ends = *seen.entry(source).or_insert((client, listen));
            prop_assert_eq!(ends, (client, listen));
            for (source, (client, listen)) in &seen {
                prop_assert_eq!(reply(&mut router, SERVER, *source), Ok(((BOX, *listen), *client)));
            }
        }
    }
}
