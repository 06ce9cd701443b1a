//! What one address space still wants: pages that can be placed now, and pages that are still owed by the source.
//!
//! Enters: the lazy pages, which of them are owed, every change of the address space, every arrival. Leaves: for a page of
//! now, what belongs there and whether it has come. Both parts follow the changes by the same rules; an arrival moves pages
//! from one to the other.

use super::pending::{Pending, PendingRun};
use crate::memory::{PageNumber, PageRange};

/// The wanted pages of one address space. No page is in both parts.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    /// In the store.
    pub ready: Pending,
    /// Not in the store yet.
    pub owed: Pending,
}

impl Wanted {
    /// All of `lazy` wanted at its own addresses and in the store.
    pub fn at_home(lazy: impl IntoIterator<Item = PageRange>) -> Self {
        Wanted {
            ready: Pending::at_home(lazy),
            owed: Pending::default(),
        }
    }

    /// Those of `runs` that are wanted are not in the store yet. For an address space that has not changed.
    pub fn owe(&mut self, runs: &[PageRange]) {
        for &run in runs {
            for part in self.ready.take(run) {
                self.owed.insert(part);
            }
        }
    }

    /// These pages of the store have come. Says where those that were owed here belong now.
    pub fn arrive(&mut self, store: PageRange) -> Vec<PendingRun> {
        let come = self.owed.take_stored(store);
        for &part in &come {
            self.ready.insert(part);
        }
        come
    }

    /// How many pages are wanted.
    pub fn pages(&self) -> u64 {
        self.ready.pages() + self.owed.pages()
    }

    /// Takes the pages at `now` out; says which store pages that frees.
    pub fn remove(&mut self, now: PageRange) -> Vec<PageRange> {
        let mut freed = self.ready.remove(now);
        freed.extend(self.owed.remove(now));
        freed
    }

    /// Moves what is wanted in `from` to `to` on; says which store pages that frees. See [`Pending::remap`].
    pub fn remap(&mut self, from: PageRange, to: PageNumber) -> Vec<PageRange> {
        let mut freed = self.ready.remap(from, to);
        freed.extend(self.owed.remap(from, to));
        freed
    }

    /// The parts of `store` pages that are wanted here.
    pub fn wants(&self, store: PageRange) -> Vec<PageRange> {
        let mut wanted = self.ready.wants(store);
        wanted.extend(self.owed.wants(store));
        wanted
    }

    /// Every wanted store page.
    pub fn store_pages(&self) -> Vec<PageRange> {
        let (ready, owed) = (self.ready.store_pages(), self.owed.store_pages());
        ready.iter().chain(owed.iter()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(start: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(start), pages).expect("a test range is valid")
    }

    #[test]
    fn what_is_owed_moves_with_the_memory_and_arrives_where_it_is_now() {
        let mut wanted = Wanted::at_home([pages(0, 100)]);
        wanted.owe(&[pages(10, 20), pages(90, 50)]);
        assert_eq!((wanted.ready.pages(), wanted.owed.pages()), (70, 30));
        // Owed and other pages move together, over others of both kinds.
        let freed = wanted.remap(pages(25, 10), PageNumber(85));
        assert_eq!(freed.iter().map(|run| run.pages()).sum::<u64>(), 10);
        assert_eq!(wanted.owed.lookup(PageNumber(85)), Some(PageNumber(25)));
        assert_eq!(wanted.ready.lookup(PageNumber(90)), Some(PageNumber(30)));
        assert_eq!(wanted.owed.lookup(PageNumber(90)), None);
        let come = wanted.arrive(pages(20, 8));
        assert_eq!(come.iter().map(|part| part.now.pages()).sum::<u64>(), 8);
        assert_eq!(wanted.ready.lookup(PageNumber(87)), Some(PageNumber(27)));
        assert_eq!(wanted.owed.lookup(PageNumber(88)), Some(PageNumber(28)));
        assert!(wanted.arrive(pages(20, 8)).is_empty(), "only once");
        assert!(
            wanted.arrive(pages(40, 5)).is_empty(),
            "what was never owed stays as it is"
        );
        assert_eq!(wanted.pages(), 90);
    }

    #[test]
    fn what_was_dropped_before_it_came_is_wanted_no_more() {
        let mut wanted = Wanted::at_home([pages(0, 10)]);
        wanted.owe(&[pages(0, 10)]);
        assert_eq!(wanted.remove(pages(2, 3)), [pages(2, 3)]);
        let come = wanted.arrive(pages(0, 10));
        assert_eq!(come.iter().map(|part| part.now.pages()).sum::<u64>(), 7);
        assert_eq!(wanted.wants(pages(0, 10)), [pages(0, 2), pages(5, 5)]);
    }
}
