//! The inputs that are kept, and random changes of them, without a fuzzer.

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use portfwd_tests::random::{self, Random};

/// How many random inputs each target gets.
const INPUTS: usize = 20_000;

/// The inputs of a target in a directory here.
fn kept(directory: &str, target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory).join(target);
    let mut kept: Vec<_> = fs::read_dir(&directory)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.display().to_string(), fs::read(&path).unwrap()))
        .collect();
    kept.sort();
    kept
}

/// Has a target take what is kept, and then random changes of it.
fn run(target: &str, take: fn(&[u8])) {
    let corpus = kept("corpus", target);
    assert!(!corpus.is_empty());
    for (name, input) in corpus.iter().chain(&kept("crashes", target)) {
        assert!(catch_unwind(|| take(input)).is_ok(), "with {name}");
    }
    let inputs: Vec<&[u8]> = corpus.iter().map(|(_, input)| &input[..]).collect();
    let mut random = Random::new(random::seed());
    for _ in 0..INPUTS {
        let input = changed(&mut random, &inputs);
        assert!(catch_unwind(|| take(&input)).is_ok(), "with {input:02x?}");
    }
}

/// An input with a few changes of the sorts that fuzzers make.
fn changed(random: &mut Random, inputs: &[&[u8]]) -> Vec<u8> {
    let mut input = random.pick(inputs).to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(input.len() + 1);
        let to = at + random.below(input.len() + 1 - at).min(32);
        match random.below(6) {
            0 => {
                let length = 1 + random.below(4);
                input.splice(at..at, random.bytes(length));
            }
            1 => drop(input.drain(at..to)),
            2 => {
                let other = random.pick(inputs);
                let from = random.below(other.len() + 1);
                input.splice(at..to, other[from..].iter().take(32).copied());
            }
            3 => {
                let odd = [0, 1, 0x7f, 0x80, 0xff];
                input.get_mut(at).into_iter().for_each(|byte| *byte = *random.pick(&odd));
            }
            4 => input.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << random.below(8)),
            _ => input.get_mut(at).into_iter().for_each(|byte| *byte = random.bits() as u8),
        }
    }
    input
}

#[test]
fn whatever_a_packet_is_it_passes_as_it_came_or_is_translated_rightly() {
    run("packet", crate::packet);
}

#[test]
fn whoever_talks_answers_find_their_clients() {
    run("conversation", crate::conversation);
}

#[test]
fn whatever_a_configuration_is_it_has_a_meaning_or_a_mistake_with_its_line() {
    run("config", crate::config);
}

#[test]
fn whatever_is_changed_in_a_configuration_the_rest_of_it_stays() {
    run("edit", crate::edit);
}
