//! The pages of the port tables: each kept once, as the few runs of ports that it mostly is, and
//! numbered as long as somebody uses it.

use std::ops::RangeInclusive;
use std::sync::Arc;

use portfwd_ebpf::table::{Page, Ports as PortTable};

use super::numbered::Numbered;

/// Neighbours in a page that lead to the same number, which is not 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Run {
    first: u8,
    last: u8,
    number: u32,
}

/// What a page holds. Where it is empty, it leads nowhere.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Runs(Arc<[Run]>);

impl Runs {
    fn of(page: &Page) -> Self {
        let mut runs = Vec::new();
        let mut place = 0;
        for same in page.0.chunk_by(|a, b| a == b) {
            let last = place + same.len() - 1;
            if same[0] != 0 {
                runs.push(Run { first: place as u8, last: last as u8, number: same[0] });
            }
            place = last + 1;
        }
        Self(runs.into())
    }

    /// The page as the kernel has it.
    pub fn page(&self) -> Page {
        let mut page = Page([0; 256]);
        for run in self.0.iter() {
            page.0[usize::from(run.first)..=usize::from(run.last)].fill(run.number);
        }
        page
    }
}

/// All pages that are in use, each with whether it is a root, which leads to pages and not to
/// translations, and how many tables or runs of roots use it. The kernel's numbers are one more.
#[derive(Default)]
pub struct Pages {
    users: Numbered<(bool, Runs), u32>,
    fresh: Vec<u32>,
}

impl Pages {
    /// The number of a page that is like this. Unless it is used before the next
    /// [`take_fresh`](Self::take_fresh), a new number is free again.
    fn number(&mut self, page: &Page, root: bool) -> u32 {
        let key = (root, Runs::of(page));
        let number = self.users.find(&key).unwrap_or_else(|| {
            let number = self.users.insert(key, 0);
            self.fresh.push(number);
            number
        });
        number + 1
    }

    fn runs(&self, number: u32) -> &Runs {
        &self.users.key(number - 1).1
    }

    /// A page with these rows of translations, at most 256, kept.
    pub fn acquire_pool(&mut self, rows: &[u32]) -> u32 {
        let mut page = Page([0; 256]);
        page.0[..rows.len()].copy_from_slice(rows);
        let number = self.number(&page, false);
        self.users[number - 1] += 1;
        number
    }

    /// Frees a page of [`acquire_pool`](Self::acquire_pool) if nobody else uses it.
    pub fn release_pool(&mut self, page: u32) {
        self.let_go(page);
    }

    /// Keeps the pages of a table.
    pub fn acquire(&mut self, table: PortTable) {
        let Some(root) = root(table) else { return };
        self.users[root - 1] += 1;
        if self.users[root - 1] == 1 {
            for run in self.runs(root).clone().0.iter() {
                self.users[run.number - 1] += 1;
            }
        }
    }

    /// Frees those pages of an [acquired](Self::acquire) table that nobody else uses.
    pub fn release(&mut self, table: PortTable) {
        let Some(root) = root(table) else { return };
        let runs = self.runs(root).clone();
        if self.let_go(root) {
            for run in runs.0.iter() {
                self.let_go(run.number);
            }
        }
    }

    /// Whether that was the last user.
    fn let_go(&mut self, number: u32) -> bool {
        self.users[number - 1] -= 1;
        let last = self.users[number - 1] == 0;
        if last {
            self.users.remove(number - 1);
        }
        last
    }

    /// The pages that are in use and were not when this was last asked.
    pub fn take_fresh(&mut self) -> Vec<(u32, Runs)> {
        let fresh = std::mem::take(&mut self.fresh);
        let mut used = Vec::with_capacity(fresh.len());
        for number in fresh {
            match self.users[number] {
                0 => self.users.remove(number),
                _ => used.push((number + 1, self.runs(number + 1).clone())),
            }
        }
        used
    }

    /// How many pages are in use.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.users.len()
    }

    /// The ports below this root, first and last, and their row, if they are in one piece.
    fn one_range(&self, root: &Page) -> Option<(u16, u16, u32)> {
        let mut whole: Option<(u16, u16, u32)> = None;
        for (high, page) in root.0.iter().enumerate().filter(|(_, page)| **page != 0) {
            for run in self.runs(*page).0.iter() {
                let port = |low: u8| (high as u16) << 8 | u16::from(low);
                whole = Some(match whole {
                    None => (port(run.first), port(run.last), run.number),
                    Some((first, last, row))
                        if row == run.number && last + 1 == port(run.first) =>
                    {
                        (first, port(run.last), row)
                    }
                    Some(_) => return None,
                });
            }
        }
        whole
    }
}

/// The number of a table's root, if it has one.
fn root(table: PortTable) -> Option<u32> {
    (table.first > table.last && table.row != 0).then_some(table.row)
}

/// Ports, first and last, to paint a row on.
pub type Stroke = ((u16, u16), u32);

/// The part of a table that is painted, in high bytes of ports.
pub type Area = RangeInclusive<u8>;

/// All of a table.
pub const EVERYWHERE: Area = 0..=u8::MAX;

/// What is to be painted of a table that is `live`, where a change touches `area`. A table without
/// pages is painted as a whole.
pub fn area(live: PortTable, area: Area) -> Area {
    if root(live).is_some() { area } else { EVERYWHERE }
}

/// The 65,536 ports of one protocol at one endpoint, while rules are painted on them.
pub struct Canvas {
    rows: Vec<Page>,
}

impl Default for Canvas {
    fn default() -> Self {
        Self { rows: vec![Page([0; 256]); 256] }
    }
}

impl Canvas {
    /// The table that is as the `live` one outside of `area`, and has these strokes there, the later
    /// over the earlier.
    pub fn paint(
        &mut self,
        pages: &mut Pages,
        live: PortTable,
        area: Area,
        strokes: impl Iterator<Item = Stroke> + Clone,
    ) -> PortTable {
        if area == EVERYWHERE {
            let mut few = strokes.clone();
            match (few.next(), few.next()) {
                (None, _) => return PortTable::NONE,
                (Some(((first, last), row)), None) => return PortTable::range(first, last, row),
                _ => {}
            }
        }
        let mut touched = [false; 256];
        for ((first, last), row) in strokes {
            let [first_high, first_low] = first.to_be_bytes();
            let [last_high, last_low] = last.to_be_bytes();
            for high in first_high.max(*area.start())..=last_high.min(*area.end()) {
                let from = if high == first_high { first_low } else { 0 };
                let to = if high == last_high { last_low } else { u8::MAX };
                touched[usize::from(high)] = true;
                self.rows[usize::from(high)].0[usize::from(from)..=usize::from(to)].fill(row);
            }
        }
        let mut top = root(live).map_or(Page([0; 256]), |root| pages.runs(root).page());
        for high in area.map(usize::from) {
            top.0[high] = 0;
            if touched[high] {
                top.0[high] = pages.number(&self.rows[high], false);
                self.rows[high] = Page([0; 256]);
            }
        }
        match pages.one_range(&top) {
            Some((first, last, row)) => PortTable::range(first, last, row),
            None if top == Page([0; 256]) => PortTable::NONE,
            None => PortTable::paged(pages.number(&top, true)),
        }
    }
}
