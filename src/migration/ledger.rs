//! What the target lacks, and which of it the next round sends: hot pages wait, cold ones go.
//!
//! In come the scans, as sets of pages; out come the pages of each round, the pages left for the freeze, and the counts
//! that [`decision`](super::decision) estimates the working set from.
//!
//! ```text
//!            ┌──────────── lacking ────────────┐
//!  scan ────▶│ hot: dirty in the last two scans │──── only when nothing much else is left, or in the freeze
//!            │ cold: the rest                   │──▶ the next round
//!            └──────────────────────────────────┘
//! ```
//!
//! # Hot and cold
//!
//! A page that was found dirty by each of the last [`HOT_SCANS`] scans is hot: sent now, it will most likely have to be sent
//! again. While there is more cold than hot memory to send, hot pages are held back. A page that was clean in one scan has
//! cooled down and goes with the next round. When less cold than hot memory is left, early rounds are over: then everything
//! goes, so that a hot set which is written more slowly than the link can send it shrinks round by round as it always did.
//! What is held back is part of what the target lacks, and so of the delta that every decision counts with: where the hot
//! set fits the downtime limit, it is simply sent in the freeze.
//!
//! # Samples
//!
//! A first round that sends everything may take minutes, all in vain if the container writes faster than the link. So the
//! first rounds are samples: a thirty-second part of the container each, the first two, then each as much as all before it
//! ([`SAMPLE_PARTS`]), and between them a look at what was dirtied. They cost little when the rest is then owed, next to
//! nothing when it is sent, and a container that writes faster and faster is found out before much was sent in vain. Being
//! short, the first ones also tell hot pages from those that a long round finds dirty whatever their heat. As soon as the link
//! is known to send what is left within a quarter of a second there are no more of them: it is time that is saved, so a small
//! container is sampled over a slow link and not over a fast one.

use std::collections::BTreeMap;
use std::time::Duration;

use super::convergence::time_to_send;
use crate::memory::{PageNumber, PageRange, PageSet, SpaceId};

/// Scans in a row that must find a page dirty before it is hot.
pub const HOT_SCANS: usize = 2;

/// Rounds that only sample: of how many parts of the container each sends one.
pub const SAMPLE_PARTS: [u64; 5] = [32, 32, 16, 8, 4];

/// Below this not even one sample is taken, which would be too short to say how fast the link is: 2048 pages are 8 MiB.
const SAMPLED_FROM: u64 = 2048;

/// What may be sent in vain, rather than sampled.
const WORTH_SAMPLING: Duration = Duration::from_millis(250);

/// Pages by address space.
pub type Pages = BTreeMap<SpaceId, PageSet>;

/// What the target lacks, between the rounds.
#[derive(Debug, Default)]
pub struct Ledger {
    lacking: Pages,
    /// What the last scan found, but for the first, which found everything.
    dirty: Pages,
    hot: Pages,
    /// What any scan but the first found, until the samples are over.
    warm: Pages,
    samples: usize,
    /// Pages that the first scan found.
    all: u64,
}

/// What a round may send, and what it leaves.
#[derive(Debug, Default)]
pub struct Round {
    /// What it sends.
    pub pages: Pages,
    /// Only a sample: cold pages are left for the next round.
    pub sample: bool,
}

/// What the scan after a round found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Pages dirtied since the scan before.
    pub dirty: u64,
    /// Of those, found dirty by the scan before as well.
    pub again: u64,
    /// Pages the target lacks now.
    pub lacking: u64,
    /// Of those, pages the next round would hold back.
    pub held: u64,
}

impl Ledger {
    /// Begins with everything there is.
    pub fn new(everything: Pages) -> Ledger {
        Ledger {
            all: count(&everything),
            lacking: everything,
            ..Ledger::default()
        }
    }

    /// Takes out what the next round sends. `throughput` is in pages a second, if it is known yet.
    pub fn next_round(&mut self, throughput: Option<f64>) -> Round {
        if !self.is_worth_sampling(throughput) {
            self.samples = SAMPLE_PARTS.len();
        }
        if let Some(parts) = SAMPLE_PARTS.get(self.samples) {
            self.samples += 1;
            return self.sample(self.all / parts);
        }
        let held = self.held();
        let mut pages = std::mem::replace(&mut self.lacking, held);
        subtract(&mut pages, &self.lacking);
        Round {
            pages,
            sample: false,
        }
    }

    fn is_worth_sampling(&self, throughput: Option<f64>) -> bool {
        self.all >= SAMPLED_FROM
            && (throughput.is_none() || time_to_send(self.lacking(), throughput) > WORTH_SAMPLING)
    }

    /// The first pages that nobody has written to since the beginning, as far as there are any: which of the others are hot
    /// is not known yet.
    fn sample(&mut self, most: u64) -> Round {
        let warm = intersection(&self.lacking, &self.warm);
        subtract(&mut self.lacking, &warm);
        let mut pages = take(&mut self.lacking, most);
        let room = most - count(&pages);
        extend(&mut self.lacking, &warm);
        extend(&mut pages, &take(&mut self.lacking, room));
        Round {
            pages,
            sample: true,
        }
    }

    /// Enters the scan after a round. Spaces it does not know are gone.
    pub fn scanned(&mut self, dirty: Pages) -> Found {
        self.lacking.retain(|space, _| dirty.contains_key(space));
        extend(&mut self.lacking, &dirty);
        if self.samples < SAMPLE_PARTS.len() {
            extend(&mut self.warm, &dirty);
        }
        self.hot = intersection(&dirty, &self.dirty);
        self.dirty = dirty;
        Found {
            dirty: count(&self.dirty),
            again: count(&self.hot),
            lacking: count(&self.lacking),
            held: count(&self.held()),
        }
    }

    /// Enters a scan that no round was before, as when something else was waited for: nothing is learnt of heat.
    pub fn found(&mut self, dirty: Pages) {
        self.lacking.retain(|space, _| dirty.contains_key(space));
        extend(&mut self.lacking, &dirty);
    }

    /// Pages the target lacks.
    pub fn lacking(&self) -> u64 {
        count(&self.lacking)
    }

    /// What is left for the freeze.
    pub fn into_lacking(self) -> Pages {
        self.lacking
    }

    /// The hot pages among those the target lacks, as long as there is more cold memory than hot.
    fn held(&self) -> Pages {
        let hot = intersection(&self.lacking, &self.hot);
        if count(&hot) * 2 < count(&self.lacking) {
            hot
        } else {
            Pages::new()
        }
    }
}

/// How many pages there are.
pub fn count(pages: &Pages) -> u64 {
    pages.values().map(PageSet::pages).sum()
}

fn extend(pages: &mut Pages, others: &Pages) {
    for (space, others) in others {
        pages.entry(*space).or_default().extend(others);
    }
}

fn subtract(pages: &mut Pages, others: &Pages) {
    for (space, others) in others {
        if let Some(pages) = pages.get_mut(space) {
            pages.subtract(others);
        }
    }
}

/// Takes out the first `most` pages in the order of their addresses over all spaces: forked processes have the same pages at
/// the same addresses, and what goes in one round crosses once.
fn take(pages: &mut Pages, most: u64) -> Pages {
    let mut windows: BTreeMap<u64, Vec<(SpaceId, PageRange)>> = BTreeMap::new();
    for (space, pages) in pages.iter() {
        for part in pages.iter().flat_map(in_windows) {
            let window = part.start().0 / WINDOW_PAGES;
            windows.entry(window).or_default().push((*space, part));
        }
    }
    let mut taken = Pages::new();
    let mut room = most;
    for (space, part) in windows.into_values().flatten() {
        let Some(first) = part.chunks(room.max(1)).next().filter(|_| room > 0) else {
            break;
        };
        room -= first.pages();
        taken.entry(space).or_default().insert(first);
    }
    subtract(pages, &taken);
    taken
}

/// Pages of an address window of [`take`].
const WINDOW_PAGES: u64 = 512;

/// `range` cut at the borders of windows.
fn in_windows(range: PageRange) -> impl Iterator<Item = PageRange> {
    let (mut at, end) = (range.start(), range.end());
    std::iter::from_fn(move || {
        let border = PageNumber((at.0 / WINDOW_PAGES + 1) * WINDOW_PAGES);
        let part = PageRange::new(at, border.min(end))?;
        at = part.end();
        Some(part)
    })
}

fn intersection(one: &Pages, other: &Pages) -> Pages {
    let mut both = Pages::new();
    for (space, pages) in one {
        let Some(others) = other.get(space) else {
            continue;
        };
        // Looking up the ranges of the set with fewer of them.
        let (few, many) = if pages.iter().count() <= others.iter().count() {
            (pages, others)
        } else {
            (others, pages)
        };
        let common: PageSet = few
            .iter()
            .flat_map(|range| many.intersecting(range))
            .collect();
        both.insert(*space, common);
    }
    both
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pages a second of a link over which everything is worth sampling: 1 MB/s.
    const SLOW: Option<f64> = Some(256.0);

    const SPACE: SpaceId = SpaceId(1);

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(start), pages).expect("a range")
    }

    fn pages(ranges: &[(u64, u64)]) -> Pages {
        let set = ranges.iter().map(|&(start, len)| range(start, len));
        Pages::from([(SPACE, set.collect())])
    }

    #[test]
    fn a_page_dirty_in_two_scans_waits_while_there_is_more_cold_memory() {
        let mut ledger = Ledger::new(pages(&[(0, 1000)]));
        assert_eq!(count(&ledger.next_round(SLOW).pages), 1000);
        ledger.scanned(pages(&[(0, 10), (100, 50)]));
        assert_eq!(
            count(&ledger.next_round(SLOW).pages),
            60,
            "nothing is hot after one scan"
        );
        let found = ledger.scanned(pages(&[(0, 10), (200, 50)]));
        let expected = Found {
            dirty: 60,
            again: 10,
            lacking: 60,
            held: 10,
        };
        assert_eq!(found, expected);
        assert_eq!(ledger.next_round(SLOW).pages, pages(&[(200, 50)]));
        assert_eq!(ledger.lacking(), 10, "what is held back is still lacking");
    }

    #[test]
    fn a_page_that_cools_down_goes_with_the_next_round() {
        let mut ledger = Ledger::new(pages(&[(0, 1000)]));
        ledger.next_round(SLOW);
        ledger.scanned(pages(&[(0, 10), (100, 50)]));
        ledger.next_round(SLOW);
        ledger.scanned(pages(&[(0, 10), (200, 50)]));
        assert_eq!(ledger.next_round(SLOW).pages, pages(&[(200, 50)]));
        ledger.scanned(pages(&[(300, 5)]));
        assert_eq!(ledger.next_round(SLOW).pages, pages(&[(0, 10), (300, 5)]));
    }

    #[test]
    fn a_hot_set_goes_once_there_is_little_else() {
        let mut ledger = Ledger::new(pages(&[(0, 1000)]));
        ledger.next_round(SLOW);
        ledger.scanned(pages(&[(0, 100), (500, 90)]));
        ledger.next_round(SLOW);
        let found = ledger.scanned(pages(&[(0, 100), (600, 90)]));
        assert_eq!(found.held, 0);
        assert_eq!(ledger.next_round(SLOW).pages, pages(&[(0, 100), (600, 90)]));
    }

    #[test]
    fn a_large_container_is_sampled_before_the_rest_is_sent() {
        let mut ledger = Ledger::new(pages(&[(0, 32_000)]));
        // The same pages are dirtied all the time: once that is seen they wait.
        let hot = [(500, 1000)];
        let parts = [
            vec![(0, 1000)],
            vec![(1500, 1000)],
            vec![(2500, 2000)],
            vec![(4500, 4000)],
            vec![(8500, 8000)],
        ];
        for part in parts {
            let sample = ledger.next_round(SLOW);
            assert!(sample.sample);
            assert_eq!(sample.pages, pages(&part));
            assert_eq!(ledger.scanned(pages(&hot)).dirty, 1000);
        }
        let rest = ledger.next_round(SLOW);
        assert!(!rest.sample);
        assert_eq!(rest.pages, pages(&[(16_500, 15_500)]), "hot pages wait");
        assert_eq!(ledger.into_lacking(), pages(&hot));
    }

    #[test]
    fn samples_end_when_the_rest_takes_no_time_worth_saving() {
        // 32 MiB: 2.6 s at 100 Mbit/s, 26 ms at 10 Gbit/s.
        let everything = pages(&[(0, 8192)]);
        for (throughput, samples) in [(3000.0, 5), (30_000.0, 3), (300_000.0, 1)] {
            let mut ledger = Ledger::new(everything.clone());
            let mut taken = 0;
            let mut known = None;
            while ledger.next_round(known).sample {
                ledger.scanned(pages(&[]));
                known = Some(throughput);
                taken += 1;
            }
            assert_eq!(taken, samples, "at {throughput} pages a second");
            assert_eq!(ledger.lacking(), 0);
        }
        let mut tiny = Ledger::new(pages(&[(0, SAMPLED_FROM - 1)]));
        assert!(!tiny.next_round(None).sample);
    }

    #[test]
    fn a_sample_has_the_same_pages_of_forked_processes() {
        let space = |id, start| (SpaceId(id), [range(start, 16_384)].into_iter().collect());
        let mut ledger = Ledger::new(Pages::from([space(1, 0), space(2, 0), space(3, 1 << 30)]));
        let sample = ledger.next_round(SLOW).pages;
        assert_eq!(count(&sample), 3 * 16_384 / 32);
        assert_eq!(sample[&SpaceId(1)], [range(0, 1024)].into_iter().collect());
        assert_eq!(sample[&SpaceId(2)], [range(0, 512)].into_iter().collect());
        assert!(!sample.contains_key(&SpaceId(3)));
    }

    #[test]
    fn where_everything_is_written_samples_are_taken_from_that() {
        let all = [(0, 32_000)];
        let mut ledger = Ledger::new(pages(&all));
        for part in SAMPLE_PARTS {
            assert_eq!(count(&ledger.next_round(SLOW).pages), 32_000 / part);
            assert_eq!(ledger.scanned(pages(&all)).lacking, 32_000);
        }
    }

    #[test]
    fn a_space_that_is_gone_is_owed_no_more() {
        let mut ledger = Ledger::new(pages(&[(0, 32_000)]));
        ledger.next_round(SLOW);
        let other = Pages::from([(SpaceId(2), [range(0, 7)].into_iter().collect())]);
        assert_eq!(ledger.scanned(other).lacking, 7);
    }

    fn any_pages() -> impl Strategy<Value = Pages> {
        prop::collection::vec((0u64..40_000, 1u64..3000), 0..12).prop_map(|ranges| pages(&ranges))
    }

    proptest! {
        /// Whatever is sent and held back, nothing is forgotten: what the target has not got in its newest state is lacking.
        #[test]
        fn no_page_is_ever_forgotten(everything in any_pages(), scans in prop::collection::vec(any_pages(), 1..8)) {
            let mut stale: PageSet = everything[&SPACE].clone();
            let mut ledger = Ledger::new(everything);
            for dirty in scans {
                let sent = ledger.next_round(SLOW).pages;
                if let Some(sent) = sent.get(&SPACE) {
                    stale.subtract(sent);
                }
                stale.extend(&dirty[&SPACE]);
                let found = ledger.scanned(dirty);
                prop_assert_eq!(found.lacking, stale.pages());
                prop_assert!(found.held * 2 < found.lacking || found.held == 0);
                prop_assert!(found.again <= found.dirty && found.dirty <= found.lacking);
            }
            prop_assert_eq!(&ledger.into_lacking()[&SPACE], &stale);
        }
    }
}
