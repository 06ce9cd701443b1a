//! What one address space still has to get, and where it lies in the store.
//!
//! Enters: the lazy pages of a task at their addresses of the dump, then every change of the address space. Leaves:
//! for a page at its address of *now*, the page of the store that belongs there, if any still does.
//!
//! A page that is not pending is zero as far as the pager is concerned: it was never part of the container, or it is
//! in place already, or the process threw it away. So a page leaves this map when it is placed, removed or unmapped,
//! and moves with mremap. In one map a store page occurs at most once.

use crate::memory::{PageNumber, PageRange, PageSet};
use std::collections::{BTreeMap, BTreeSet};

/// The pending pages of one address space.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    /// First page now → segment. Segments do not overlap; neighbours are never merged, because the caller splits
    /// them at the ends of mappings, which one UFFDIO_COPY cannot cross.
    segments: BTreeMap<u64, Segment>,
    /// First pages of those segments that are not at home: their store pages have other numbers. Few, because few
    /// processes move memory while pages are missing.
    displaced: BTreeSet<u64>,
    /// The store pages of all segments.
    store: PageSet,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    /// One past the last page now.
    end: u64,
    /// The store page of the first page.
    store: u64,
}

/// A run of pending pages: where it belongs now and the store page of its first page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PendingRun {
    pub now: PageRange,
    pub store: PageNumber,
}

impl PendingRun {
    /// The same run in the store.
    pub fn store_range(&self) -> PageRange {
        PageRange::from_start_len(self.store, self.now.pages())
            .expect("a pending run came from valid store pages")
    }
}

impl Pending {
    /// All of `runs` pending at their own addresses. Pages named twice count once.
    pub fn at_home(runs: impl IntoIterator<Item = PageRange>) -> Self {
        let mut pending = Pending::default();
        for run in runs {
            pending.remove(run);
            pending.insert(PendingRun {
                now: run,
                store: run.start(),
            });
        }
        pending
    }

    /// How many pages are pending.
    pub fn pages(&self) -> u64 {
        self.store.pages()
    }

    /// The store page that belongs at `page` now.
    pub fn lookup(&self, page: PageNumber) -> Option<PageNumber> {
        let (&start, segment) = self.segments.range(..=page.0).next_back()?;
        (page.0 < segment.end).then(|| PageNumber(segment.store + (page.0 - start)))
    }

    /// The first pending run at or after `page`, cut at the end of its segment.
    pub fn next_from(&self, page: PageNumber) -> Option<PendingRun> {
        if let Some((&start, segment)) = self.segments.range(..page.0).next_back()
            && page.0 < segment.end
        {
            return Some(run(page.0, segment.end, segment.store + (page.0 - start)));
        }
        let (&start, segment) = self.segments.range(page.0..).next()?;
        Some(run(start, segment.end, segment.store))
    }

    /// The parts of `store` pages that are pending here.
    pub fn wants(&self, store: PageRange) -> Vec<PageRange> {
        self.store.intersecting(store)
    }

    /// Every pending store page.
    pub fn store_pages(&self) -> &PageSet {
        &self.store
    }

    /// Takes the pages at `now` out; says which store pages that frees.
    pub fn remove(&mut self, now: PageRange) -> Vec<PageRange> {
        self.take(now).iter().map(PendingRun::store_range).collect()
    }

    /// Moves what is pending in `from` to the same places in the equally long run that starts at `to`; says which
    /// store pages were pending there and are not any more. A target that is no valid run is one where nothing can be
    /// mapped, so what would go there is lost.
    pub fn remap(&mut self, from: PageRange, to: PageNumber) -> Vec<PageRange> {
        let moving = self.take(from);
        let Some(target) = PageRange::from_start_len(to, from.pages()) else {
            return moving.iter().map(PendingRun::store_range).collect();
        };
        let freed = self.remove(target);
        for part in moving {
            let start = to.0 + (part.now.start().0 - from.start().0);
            self.insert(run(start, start + part.now.pages(), part.store.0));
        }
        freed
    }

    /// Makes a run pending. Neither its place nor its store pages are pending yet.
    pub fn insert(&mut self, part: PendingRun) {
        self.store.insert(part.store_range());
        self.put(
            part.now.start().0,
            Segment {
                end: part.now.end().0,
                store: part.store.0,
            },
        );
    }

    /// Takes out whatever of these pages of the store is pending, wherever it belongs now.
    pub fn take_stored(&mut self, store: PageRange) -> Vec<PendingRun> {
        let found = self.places_of(store);
        for part in &found {
            self.take(part.now);
        }
        found
    }

    fn places_of(&self, store: PageRange) -> Vec<PendingRun> {
        let sum = |lengths: &mut dyn Iterator<Item = u64>| lengths.sum::<u64>();
        let wanted = sum(&mut self.store.intersecting(store).iter().map(|run| run.pages()));
        if wanted == 0 {
            return Vec::new();
        }
        let cut = |start: u64, segment: &Segment| {
            let from = store.start().0.max(segment.store);
            let to = store.end().0.min(segment.store + (segment.end - start));
            let now = |page: u64| start + (page - segment.store);
            (from < to).then(|| run(now(from), now(to), from))
        };
        let first = self.segments.range(..=store.start().0).next_back();
        let first = first.map_or(store.start().0, |(&start, _)| start);
        let mut found: Vec<PendingRun> = self
            .segments
            .range(first..store.end().0)
            .filter(|(start, segment)| segment.store == **start)
            .filter_map(|(&start, segment)| cut(start, segment))
            .collect();
        if sum(&mut found.iter().map(|part| part.now.pages())) < wanted {
            let displaced = self.displaced.iter();
            found.extend(displaced.filter_map(|&start| cut(start, &self.segments[&start])));
        }
        found
    }

    fn put(&mut self, start: u64, segment: Segment) {
        if segment.store != start {
            self.displaced.insert(start);
        }
        self.segments.insert(start, segment);
    }

    /// Takes out the parts of runs that belong at `now`.
    pub fn take(&mut self, now: PageRange) -> Vec<PendingRun> {
        let (from, to) = (now.start().0, now.end().0);
        let first = self
            .segments
            .range(..=from)
            .next_back()
            .map_or(from, |(&start, _)| start);
        let touched: Vec<(u64, Segment)> = self
            .segments
            .range(first..to)
            .filter(|(_, segment)| segment.end > from)
            .map(|(&start, &segment)| (start, segment))
            .collect();
        let mut taken = Vec::with_capacity(touched.len());
        for (start, segment) in touched {
            self.segments.remove(&start);
            if segment.store != start {
                self.displaced.remove(&start);
            }
            if start < from {
                self.put(
                    start,
                    Segment {
                        end: from,
                        store: segment.store,
                    },
                );
            }
            if to < segment.end {
                self.put(
                    to,
                    Segment {
                        end: segment.end,
                        store: segment.store + (to - start),
                    },
                );
            }
            let (cut, cut_end) = (start.max(from), segment.end.min(to));
            let part = run(cut, cut_end, segment.store + (cut - start));
            self.store.remove(part.store_range());
            taken.push(part);
        }
        taken
    }
}

fn run(start: u64, end: u64, store: u64) -> PendingRun {
    PendingRun {
        now: PageRange::new(PageNumber(start), PageNumber(end))
            .expect("a segment is not empty and lies in user space"),
        store: PageNumber(store),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Remove(u64, u64),
        Remap(u64, u64, u64),
        TakeStored(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..64, 1u64..20).prop_map(|(start, pages)| Step::Remove(start, pages)),
            // The kernel refuses an mremap whose old and new ranges overlap.
            (0u64..64, 0u64..64, 1u64..20)
                .prop_filter("overlapping mremap", |(from, to, pages)| {
                    from.abs_diff(*to) >= *pages
                })
                .prop_map(|(from, to, pages)| Step::Remap(from, to, pages)),
            (0u64..64, 1u64..20).prop_map(|(start, pages)| Step::TakeStored(start, pages)),
        ]
    }

    fn pages(start: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(start), pages).expect("a test range is valid")
    }

    proptest! {
        #[test]
        fn the_map_behaves_like_a_table_of_single_pages(
            home in prop::collection::vec((0u64..64, 1u64..16), 0..6),
            steps in prop::collection::vec(step(), 0..30),
        ) {
            let mut pending = Pending::at_home(home.iter().map(|&(start, len)| pages(start, len)));
            let mut model: BTreeMap<u64, u64> =
                home.iter().flat_map(|&(start, len)| start..start + len).map(|page| (page, page)).collect();
            for step in steps {
                let mut freed: Vec<u64> = Vec::new();
                let reported = match step {
                    Step::Remove(start, len) => {
                        for page in start..start + len {
                            freed.extend(model.remove(&page));
                        }
                        pending.remove(pages(start, len))
                    }
                    Step::Remap(from, to, len) => {
                        let moved: Vec<(u64, Option<u64>)> =
                            (0..len).map(|i| (to + i, model.remove(&(from + i)))).collect();
                        for (page, store) in moved {
                            freed.extend(model.remove(&page));
                            if let Some(store) = store {
                                model.insert(page, store);
                            }
                        }
                        pending.remap(pages(from, len), PageNumber(to))
                    }
                    Step::TakeStored(start, len) => {
                        let mut expected = BTreeMap::new();
                        model.retain(|&page, &mut store| {
                            let hit = (start..start + len).contains(&store);
                            if hit {
                                expected.insert(page, store);
                            }
                            !hit
                        });
                        freed.extend(expected.values());
                        let mut taken = BTreeMap::new();
                        let parts = pending.take_stored(pages(start, len));
                        for part in &parts {
                            for i in 0..part.now.pages() {
                                taken.insert(part.now.start().0 + i, part.store.0 + i);
                            }
                        }
                        prop_assert_eq!(taken, expected);
                        parts.iter().map(PendingRun::store_range).collect()
                    }
                };
                let mut reported: Vec<u64> =
                    reported.into_iter().flat_map(|r| r.start().0..r.end().0).collect();
                reported.sort_unstable();
                freed.sort_unstable();
                prop_assert_eq!(reported, freed);
                for page in 0..100 {
                    prop_assert_eq!(pending.lookup(PageNumber(page)).map(|p| p.0), model.get(&page).copied());
                }
                let mut walked = BTreeMap::new();
                let mut cursor = PageNumber(0);
                while let Some(part) = pending.next_from(cursor) {
                    for i in 0..part.now.pages() {
                        walked.insert(part.now.start().0 + i, part.store.0 + i);
                    }
                    cursor = part.now.end();
                }
                prop_assert_eq!(&walked, &model);
                prop_assert_eq!(pending.pages(), model.len() as u64);
            }
        }
    }
}
