//! A set of pages kept as sorted, disjoint, non-adjacent runs.
//!
//! Memory is proportional to the number of runs, not of pages: a fully present 64 GiB space is one entry.

use super::{PageNumber, PageRange};
use std::collections::BTreeMap;

/// A set of pages of one address space.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// start → end of each run; runs neither overlap nor touch.
    runs: BTreeMap<u64, u64>,
    pages: u64,
}

impl PageSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many pages are in the set.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: PageNumber) -> bool {
        self.runs
            .range(..=page.0)
            .next_back()
            .is_some_and(|(_, &end)| page.0 < end)
    }

    /// Adds every page of `range`.
    pub fn insert(&mut self, range: PageRange) {
        let (mut start, mut end) = (range.start().0, range.end().0);
        // The run before may reach into or up to the new one; every later run that touches is swallowed.
        if let Some((&before, &before_end)) = self.runs.range(..=start).next_back()
            && before_end >= start
        {
            start = before;
        }
        let touched: Vec<(u64, u64)> = self
            .runs
            .range(start..=end)
            .map(|(&s, &e)| (s, e))
            .collect();
        for (touched_start, touched_end) in touched {
            self.runs.remove(&touched_start);
            self.pages -= touched_end - touched_start;
            end = end.max(touched_end);
        }
        self.runs.insert(start, end);
        self.pages += end - start;
    }

    /// Takes every page of `range` out.
    pub fn remove(&mut self, range: PageRange) {
        for hit in self.intersecting(range) {
            let (&start, &end) = self
                .runs
                .range(..=hit.start().0)
                .next_back()
                .expect("an intersecting run has an entry");
            self.runs.remove(&start);
            if start < hit.start().0 {
                self.runs.insert(start, hit.start().0);
            }
            if hit.end().0 < end {
                self.runs.insert(hit.end().0, end);
            }
            self.pages -= hit.pages();
        }
    }

    /// Adds every page of `other`.
    pub fn extend(&mut self, other: &PageSet) {
        for range in other.iter() {
            self.insert(range);
        }
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &PageSet) {
        for range in other.iter() {
            self.remove(range);
        }
    }

    /// The parts of `range` that are in the set, in order.
    pub fn intersecting(&self, range: PageRange) -> Vec<PageRange> {
        let first = self
            .runs
            .range(..=range.start().0)
            .next_back()
            .map_or(range.start().0, |(&start, _)| start);
        self.runs
            .range(first..range.end().0)
            .filter_map(|(&start, &end)| {
                PageRange::new(PageNumber(start), PageNumber(end))?.intersection(range)
            })
            .collect()
    }

    /// The runs from `page` on, in order; the first one begins there if `page` is inside it.
    pub fn starting_at(&self, page: PageNumber) -> impl Iterator<Item = PageRange> + '_ {
        let inside = self
            .runs
            .range(..page.0)
            .next_back()
            .and_then(|(_, &end)| PageRange::new(page, PageNumber(end)));
        let after = self.runs.range(page.0..).map(|(&start, &end)| {
            PageRange::new(PageNumber(start), PageNumber(end)).expect("a run is not empty")
        });
        inside.into_iter().chain(after)
    }

    /// The runs, in order; no two touch.
    pub fn iter(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.runs.iter().map(|(&start, &end)| {
            PageRange::new(PageNumber(start), PageNumber(end)).expect("a run is not empty")
        })
    }
}

impl FromIterator<PageRange> for PageSet {
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut set = PageSet::new();
        for range in ranges {
            set.insert(range);
        }
        set
    }
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u64, u64),
        Remove(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        (any::<bool>(), 0u64..60, 1u64..12).prop_map(|(insert, start, len)| {
            if insert {
                Step::Insert(start, len)
            } else {
                Step::Remove(start, len)
            }
        })
    }

    fn range(start: u64, len: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(start), len).expect("a test range is valid")
    }

    proptest! {
        #[test]
        fn a_page_set_behaves_like_a_set_of_single_pages(steps in prop::collection::vec(step(), 0..40)) {
            let mut set = PageSet::new();
            let mut model = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Insert(start, len) => {
                        set.insert(range(start, len));
                        model.extend(start..start + len);
                    }
                    Step::Remove(start, len) => {
                        set.remove(range(start, len));
                        model.retain(|page| !(start..start + len).contains(page));
                    }
                }
                let pages: Vec<u64> = set.iter().flat_map(|r| r.start().0..r.end().0).collect();
                prop_assert_eq!(&pages, &model.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(set.pages(), model.len() as u64);
                for pair in set.iter().collect::<Vec<_>>().windows(2) {
                    prop_assert!(pair[0].end() < pair[1].start(), "runs must not touch: {:?}", set);
                }
                let window = range(20, 20);
                let inside: Vec<u64> = set.intersecting(window).into_iter().flat_map(|r| r.start().0..r.end().0).collect();
                prop_assert_eq!(inside, model.range(20..40).copied().collect::<Vec<_>>());
                prop_assert_eq!(set.contains(PageNumber(25)), model.contains(&25));
                let from: Vec<u64> = set.starting_at(PageNumber(25)).flat_map(|r| r.start().0..r.end().0).collect();
                prop_assert_eq!(from, model.range(25..).copied().collect::<Vec<_>>());
            }
        }
    }
}
