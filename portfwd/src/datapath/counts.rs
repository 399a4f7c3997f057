//! What the programs count, also in maps of sets before this one, whatever those counted.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::maps::MapData;
use aya::util::nr_cpus;
use portfwd_ebpf::table::{Counter, Dropped, Jiffies, Passed, Tally, ToStack};

use super::DatapathError;
use super::flow_tables::look_up;
use super::pins::Words;

/// A rule's counts, summed over CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    pub forward: Tally,
    pub reply: Tally,
    /// When the last was translated; 0 for never.
    pub last: Jiffies,
    pub to_stack: [u64; ToStack::COUNT],
    pub dropped: [u64; Dropped::COUNT],
    /// Flows that began.
    pub flows: u64,
    /// Packets of flows that could not be established.
    pub crowded: u64,
    /// Of the dropped, how many were answered with an ICMP error.
    pub answered: u64,
}

impl Counts {
    /// Adds those of one CPU.
    pub(super) fn add(&mut self, counter: &Counter) {
        let Counter {
            translated: [forward, reply],
            last,
            to_stack,
            dropped,
            flows,
            crowded,
            answered,
        } = counter;
        self.flows += flows;
        self.crowded += crowded;
        self.forward.packets += forward.packets;
        self.forward.bytes += forward.bytes;
        self.reply.packets += reply.packets;
        self.reply.bytes += reply.bytes;
        self.last = self.last.max(*last);
        self.answered += answered;
        for (sum, count) in self.to_stack.iter_mut().zip(to_stack) {
            *sum += count;
        }
        for (sum, count) in self.dropped.iter_mut().zip(dropped) {
            *sum += count;
        }
    }

    /// Adds those of another map, by their names. What has none here is not counted any more.
    pub(super) fn add_words(&mut self, names: &Words, counts: &[u64]) {
        let counts = || names.iter().map(String::as_str).zip(counts.iter().copied());
        let last = counts().find(|(name, _)| *name == LAST).map_or(0, |(_, last)| last);
        self.last = self.last.max(Jiffies(last));
        for (name, own) in self.named() {
            *own += counts().find(|(other, _)| *other == name).map_or(0, |(_, count)| count);
        }
    }

    /// All that is summed up, in no order.
    fn named(&mut self) -> Vec<(String, &mut u64)> {
        let mut all = vec![
            ("forward.packets".to_owned(), &mut self.forward.packets),
            ("forward.bytes".to_owned(), &mut self.forward.bytes),
            ("reply.packets".to_owned(), &mut self.reply.packets),
            ("reply.bytes".to_owned(), &mut self.reply.bytes),
            ("flows".to_owned(), &mut self.flows),
            ("crowded".to_owned(), &mut self.crowded),
            ("answered".to_owned(), &mut self.answered),
        ];
        let reasons = ToStack::ALL.iter().zip(&mut self.to_stack);
        all.extend(reasons.map(|(reason, count)| (format!("to_stack.{}", reason.name()), count)));
        let reasons = Dropped::ALL.iter().zip(&mut self.dropped);
        all.extend(reasons.map(|(reason, count)| (format!("dropped.{}", reason.name()), count)));
        all
    }
}

const LAST: &str = "last";

/// What stands in a [`Counter`], in its order.
pub(super) fn counter_words() -> Words {
    let mut words: Words =
        ["forward.packets", "forward.bytes", "reply.packets", "reply.bytes", LAST]
            .map(str::to_owned)
            .into();
    words.extend(ToStack::ALL.iter().map(|reason| format!("to_stack.{}", reason.name())));
    words.extend(Dropped::ALL.iter().map(|reason| format!("dropped.{}", reason.name())));
    words.extend(["flows", "crowded", "answered"].map(str::to_owned));
    if cfg!(feature = "other-layout") {
        words.rotate_right(1);
    }
    const { assert!(size_of::<Counter>() == 8 * (8 + ToStack::COUNT + Dropped::COUNT)) };
    words
}

/// The rows of `PASSED`.
pub(super) fn passed_words() -> Words {
    Passed::ALL.iter().map(|reason| reason.name().to_owned()).collect()
}

/// A per-CPU array of numbers, of a set before this one: nobody counts there any more.
pub(super) struct CountMap {
    map: MapData,
    words: Words,
    entries: u32,
    /// How many numbers a row has.
    width: usize,
}

impl CountMap {
    pub fn new(map: MapData, words: Words) -> Result<Self, DatapathError> {
        let info = map.info().map_err(super::map_error("COUNTERS"))?;
        let (entries, bytes) = (info.max_entries(), info.value_size() as usize);
        if bytes % 8 != 0 || bytes == 0 {
            let message = format!("rows of {bytes} bytes are no numbers");
            return Err(DatapathError::Map { map: "COUNTERS", message });
        }
        let width = bytes / 8;
        Ok(Self { map, words, entries, width })
    }

    /// The names of a row's numbers, or of rows.
    pub fn words(&self) -> &Words {
        &self.words
    }

    /// How many rows there are.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// A row, summed over CPUs, but for `last`, of which the latest counts. None beyond the end.
    pub fn row(&self, row: u32) -> Result<Vec<u64>, DatapathError> {
        if row >= self.entries {
            return Ok(Vec::new());
        }
        let failed =
            |error: io::Error| DatapathError::Map { map: "COUNTERS", message: error.to_string() };
        let cpus = nr_cpus().map_err(|(_, error)| failed(error))?;
        let mut all = vec![0; cpus * self.width];
        look_up(self.map.fd().as_fd().as_raw_fd(), row, &mut all).map_err(failed)?;
        let mut sums = vec![0; self.width];
        for cpu in all.chunks_exact(self.width) {
            for (word, (sum, count)) in sums.iter_mut().zip(cpu).enumerate() {
                let latest = self.words.get(word).is_some_and(|name| name == LAST);
                *sum = if latest { (*count).max(*sum) } else { *sum + *count };
            }
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_counter() {
        let words = counter_words();
        assert_eq!(words.len() * 8, size_of::<Counter>());
        let mut counter = [0u64; size_of::<Counter>() / 8];
        for (number, word) in counter.iter_mut().enumerate() {
            *word = number as u64 + 1;
        }
        // SAFETY: numbers side by side, as many as the counter is large.
        let typed: Counter = unsafe { std::mem::transmute(counter) };
        let (mut one, mut other) = (Counts::default(), Counts::default());
        one.add(&typed);
        other.add_words(&words, &counter);
        assert_eq!(one, other);
    }

    #[test]
    fn another_versions_counters_are_read_by_their_names() {
        let names: Words = ["dropped.flew_away", "reply.packets", LAST, "dropped.no_route"]
            .map(str::to_owned)
            .into();
        let mut counts = Counts { last: Jiffies(4), ..Counts::default() };
        counts.reply.packets = 5;
        counts.add_words(&names, &[1, 2, 3, 4]);
        assert_eq!(counts.reply.packets, 7);
        assert_eq!(counts.last, Jiffies(4));
        assert_eq!(counts.dropped.iter().sum::<u64>(), 4);
        counts.add_words(&names, &[]);
        assert_eq!(counts.reply.packets, 7);
    }
}
