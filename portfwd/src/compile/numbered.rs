//! Values with a key, by number.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{BuildHasher as _, Hash};
use std::ops::{Index, IndexMut};

use hashbrown::{DefaultHashBuilder, HashTable};

/// Values with a key each, numbered from 0. The lowest that is free is given
/// first: tables have an end.
pub struct Numbered<K, V> {
    entries: Vec<(K, V)>,
    numbers: HashTable<u32>,
    free: BinaryHeap<Reverse<u32>>,
    hasher: DefaultHashBuilder,
}

impl<K, V> Default for Numbered<K, V> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            numbers: HashTable::new(),
            free: BinaryHeap::new(),
            hasher: DefaultHashBuilder::default(),
        }
    }
}

impl<K: Hash + Eq, V: Default> Numbered<K, V> {
    /// The number of a key.
    pub fn find(&self, key: &K) -> Option<u32> {
        let same = |number: &u32| self.entries[*number as usize].0 == *key;
        self.numbers.find(self.hasher.hash_one(key), same).copied()
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// The key of one that is there.
    pub fn key(&self, number: u32) -> &K {
        &self.entries[number as usize].0
    }

    /// Puts in what was not there.
    pub fn insert(&mut self, key: K, value: V) -> u32 {
        let Self { entries, numbers, free, hasher } = self;
        let hash = hasher.hash_one(&key);
        let number = match free.pop() {
            Some(Reverse(number)) => {
                entries[number as usize] = (key, value);
                number
            }
            None => {
                entries.push((key, value));
                entries.len() as u32 - 1
            }
        };
        let rehash = |number: &u32| hasher.hash_one(&entries[*number as usize].0);
        numbers.insert_unique(hash, number, rehash);
        number
    }

    /// Takes out what is there.
    pub fn remove(&mut self, number: u32) {
        let (key, value) = &mut self.entries[number as usize];
        *value = V::default();
        let hash = self.hasher.hash_one(&*key);
        if let Ok(entry) = self.numbers.find_entry(hash, |other| *other == number) {
            entry.remove();
            self.free.push(Reverse(number));
        }
    }
}

impl<K, V> Index<u32> for Numbered<K, V> {
    type Output = V;

    fn index(&self, number: u32) -> &V {
        &self.entries[number as usize].1
    }
}

impl<K, V> IndexMut<u32> for Numbered<K, V> {
    fn index_mut(&mut self, number: u32) -> &mut V {
        &mut self.entries[number as usize].1
    }
}
