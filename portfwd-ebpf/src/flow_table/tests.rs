extern crate std;

use std::collections::HashSet;
use std::sync::Barrier;
use std::thread;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::table::{Address, Direction, Moment, Port};
use crate::testing::Places;

fn key(number: u32) -> FlowKey<4> {
    FlowKey {
        source: Address((number / 3).to_be_bytes()),
        destination: Address([198, 51, 100, 1]),
        source_port: Port::new(number as u16),
        destination_port: Port::new(80),
        protocol: 17,
        direction: Direction::Forward as u8,
        padding: [0; 2],
    }
}

/// The entry of this number's key, which says so elsewhere too.
fn half(number: u32) -> FlowHalf<4> {
    let mut half = FlowHalf::EMPTY;
    half.fill(&key(number), &key(number ^ 1), number, 0, Moment::default());
    half
}

fn counter(table: &Places<4>, number: u32) -> Option<u32> {
    find(table, &key(number)).map(|half| half.counter)
}

#[test]
fn what_was_added_is_found_until_it_is_removed() {
    let table = Places::with_homes(64);
    assert_eq!(counter(&table, 1), None);
    assert_eq!(add(&table, &half(1)), Added::Yes);
    assert_eq!(add(&table, &half(1)), Added::Exists);
    assert_eq!((counter(&table, 1), counter(&table, 2)), (Some(1), None));
    assert!(remove(&table, &key(1)));
    assert!(!remove(&table, &key(1)));
    assert_eq!(counter(&table, 1), None);
    assert_eq!(add(&table, &half(1)), Added::Yes);
    assert_eq!(table.halves().count(), 1);
}

#[test]
fn it_takes_as_many_flows_as_its_size_says() {
    for homes in [64, 1024, 90_000] {
        let table = Places::with_homes(homes);
        let (mut refused, wanted) = (0, homes * 3 / 4);
        for number in 0..wanted {
            match add(&table, &half(number)) {
                Added::Yes => {}
                Added::Full => refused += 1,
                Added::Exists | Added::Busy => {
                    unreachable!("{number} is new, and nobody else is here")
                }
            }
        }
        assert!(refused <= wanted / 200, "{homes}: {refused} refused of {wanted}");
        let found = (0..wanted).filter(|number| counter(&table, *number) == Some(*number));
        assert_eq!(found.count() as u32, wanted - refused);
        // And again: nothing is left of what is removed.
        (0..wanted).for_each(|number| {
            remove(&table, &key(number));
        });
        assert_eq!(table.halves().count(), 0);
        let again = (0..wanted).filter(|number| add(&table, &half(*number)) == Added::Yes).count();
        assert_eq!(again as u32, wanted - refused);
    }
}

#[test]
fn one_client_with_many_ports_has_room_too() {
    let table = Places::with_homes(23_000);
    let half = |number: u32| {
        let mut half = half(0);
        half.came.source_port = Port::new(number as u16);
        half
    };
    let refused = (0..17_250).filter(|number| add(&table, &half(*number)) == Added::Full).count();
    assert!(refused <= 17_250 / 400, "{refused}");
}

#[test]
fn who_meets_another_who_adds_is_told() {
    let table = Places::with_homes(1);
    table.slot(0).unwrap().set(Place::LOCKED);
    assert_eq!(add(&table, &half(1)), Added::Busy);
    table.slot(0).unwrap().clear(Place::LOCKED);
    assert_eq!(add(&table, &half(1)), Added::Yes);
}

#[test]
fn entries_of_ipv6_are_told_apart_by_every_word() {
    let table = Places::<16>::with_homes(64);
    let mut half = FlowHalf::EMPTY;
    let key = FlowKey {
        source: Address([1; 16]),
        destination: Address([2; 16]),
        source_port: Port::new(3),
        destination_port: Port::new(4),
        protocol: 6,
        direction: Direction::Forward as u8,
        padding: [0; 2],
    };
    half.fill(&key, &key.reversed(), 7, 0xffff, Moment::default());
    assert_eq!(add(&table, &half), Added::Yes);
    assert_eq!(find(&table, &key).map(|half| half.counter), Some(7));
    for at in 0..16 {
        for end in [0, 1] {
            let mut other = key;
            let ends = [&mut other.source, &mut other.destination];
            ends.into_iter().nth(end).unwrap().0[at] ^= 0x80;
            assert!(find(&table, &other).is_none() && !half.is(&other));
        }
    }
    for other in [
        FlowKey { source_port: Port::new(4), ..key },
        FlowKey { destination_port: Port::new(3), ..key },
        FlowKey { protocol: 17, ..key },
        FlowKey { direction: Direction::Reply as u8, ..key },
    ] {
        assert!(find(&table, &other).is_none() && half.differs(&other) != 0);
    }
    assert!(remove(&table, &key) && find(&table, &key).is_none());
}

#[test]
fn a_full_table_refuses_and_keeps_what_it_has() {
    let table = Places::with_homes(1);
    let added: Vec<_> =
        (0..50).filter(|number| add(&table, &half(*number)) == Added::Yes).collect();
    assert_eq!(added.len() as u32, WINDOW);
    assert_eq!(add(&table, &half(50)), Added::Full);
    assert!(added.iter().all(|number| counter(&table, *number) == Some(*number)));
    assert!(remove(&table, &key(added[3])));
    assert_eq!(add(&table, &half(50)), Added::Yes);
    assert_eq!(counter(&table, 50), Some(50));
}

#[test]
fn an_entry_that_becomes_anothers_while_it_is_looked_at_is_known_as_that() {
    let table = Places::with_homes(1);
    add(&table, &half(1));
    let looked_at = find(&table, &key(1)).unwrap();
    assert!(looked_at.is(&key(1)));
    remove(&table, &key(1));
    assert!(!looked_at.is(&key(1)));
    add(&table, &half(2));
    assert!(!looked_at.is(&key(1)));
}

/// Of each thread, what came of adding some numbers, in its own order.
fn add_at_once(table: &Places<4>, threads: u32, numbers: u32) -> Vec<Vec<Added>> {
    let barrier = Barrier::new(threads as usize);
    let add_all = || {
        barrier.wait();
        let add = |number| {
            let mut added = Added::Busy;
            while added == Added::Busy {
                added = add(table, &half(number));
            }
            added
        };
        (0..numbers).map(add).collect()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(add_all)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn of_many_who_add_the_same_at_once_one_succeeds() {
    for _ in 0..50 {
        let table = Places::with_homes(200);
        let added = add_at_once(&table, 4, 150);
        for number in 0..150 {
            let yes = added.iter().filter(|added| added[number as usize] == Added::Yes).count();
            assert_eq!(yes, 1, "{number}");
            assert_eq!(counter(&table, number), Some(number));
        }
        assert_eq!(table.halves().count(), 150);
    }
}

#[test]
fn whoever_adds_and_removes_at_once_nothing_is_lost_or_left() {
    let table = Places::with_homes(24);
    let stop = std::sync::atomic::AtomicBool::new(false);
    // One CPU looks for what stays there all the time, others come and go around it.
    (0..4).for_each(|number| assert_eq!(add(&table, &half(number)), Added::Yes));
    thread::scope(|scope| {
        for thread in 1..4 {
            let (table, stop) = (&table, &stop);
            scope.spawn(move || {
                for round in 0..20_000 {
                    let number = 1000 * thread + round % 5;
                    if add(table, &half(number)) == Added::Yes {
                        assert_eq!(counter(table, number), Some(number));
                        assert!(remove(table, &key(number)));
                        assert_eq!(counter(table, number), None);
                    }
                }
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            });
        }
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            (0..4).for_each(|number| assert_eq!(counter(&table, number), Some(number)));
        }
    });
    assert_eq!(table.halves().count(), 4);
    (0..4).for_each(|number| assert!(remove(&table, &key(number))));
    // Every place is free again, and no home points at anything.
    assert!((0..24 + WINDOW - 1).all(|at| table.slot(at).unwrap().place() == Place::default()));
}

proptest! {
    #[test]
    fn it_is_a_map(steps in prop::collection::vec((any::<bool>(), 0..40u32), 0..200)) {
        let table = Places::with_homes(16);
        let mut model = HashSet::new();
        for (adds, number) in steps {
            if adds {
                match add(&table, &half(number)) {
                    Added::Yes => prop_assert!(model.insert(number)),
                    Added::Exists => prop_assert!(model.contains(&number)),
                    Added::Full => prop_assert!(!model.contains(&number)),
                    Added::Busy => prop_assert!(false, "nobody else is here"),
                }
            } else {
                prop_assert_eq!(remove(&table, &key(number)), model.remove(&number));
            }
            for number in 0..40 {
                let is_there = model.contains(&number).then_some(number);
                prop_assert_eq!(counter(&table, number), is_there);
            }
        }
    }
}
