//! Which owed pages there are, which were sent, and what goes next.
//!
//! Enters: the owed pages, what the target wants and what it misses. Leaves: batches of pages to read and send. Does no
//! I/O; what a target says is checked against what it can know.

use crate::kernel::maps::{self, FileKinds};
use crate::kernel::process_memory::{ProcessMemory, ReadError};
use crate::memory::{PageNumber, PageRange, PageSet, SpaceId};
use crate::source::send::PagesToSend;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use thiserror::Error;

/// The most pages of one answer; what a target wants beyond them is left to the push, which goes on there.
pub(super) const ANSWER_PAGES: u64 = 16;

/// The most runs of one batch: kinds alternate at worst with every page, and a frame has so many runs.
const RUNS: usize = 128;

/// What a target says that cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Breach {
    /// It names pages that it is not owed.
    #[error("the target names {pages} of {space:?}, which it is not owed")]
    NotOwed {
        /// The space it named.
        space: SpaceId,
        /// The pages it named.
        pages: PageRange,
    },
    /// Its list of missing pages is out of order or overlaps.
    #[error("the target's list of missing pages is out of order at {pages} of {space:?}")]
    Order {
        /// The space it named.
        space: SpaceId,
        /// The pages it named.
        pages: PageRange,
    },
    /// It has pages that it was never sent.
    #[error("the target does not miss {pages} of {space:?}, which it was never sent")]
    NeverSent {
        /// The space.
        space: SpaceId,
        /// The first such run.
        pages: PageRange,
    },
    /// It says what it has no reason to say now, or on this stream.
    #[error("the target says {0} at the wrong time or place")]
    OutOfPlace(&'static str),
}

/// Pages to read and send at once.
#[derive(Debug)]
pub(super) struct Batch {
    pub space: SpaceId,
    pub memory: Arc<ProcessMemory>,
    pub ranges: Vec<PageRange>,
}

impl Batch {
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.pages()).sum()
    }
}

/// The owed pages of every space.
#[derive(Debug)]
pub(super) struct Books {
    spaces: BTreeMap<SpaceId, Owed>,
    /// Where the push goes on.
    next: (SpaceId, PageNumber),
    /// How far the target's list of missing pages has come; `None` after its end.
    listing: Option<(SpaceId, PageNumber)>,
}

#[derive(Debug)]
struct Owed {
    memory: Arc<ProcessMemory>,
    all: PageSet,
    /// Ever sent: these the target may have.
    sent: PageSet,
    /// Not sent on this connection and not known to have arrived before.
    left: PageSet,
    /// What the target's list names.
    listed: PageSet,
}

impl Books {
    /// Books over these pages; their processes must be there.
    pub fn new(pages: Vec<PagesToSend>) -> Result<Books, (i32, ReadError)> {
        let mut spaces: BTreeMap<SpaceId, Owed> = BTreeMap::new();
        for PagesToSend { space, pid, pages } in pages {
            if pages.is_empty() {
                continue;
            }
            let memory = ProcessMemory::open_shared(pid).map_err(|source| (pid, source))?;
            let owed = spaces.entry(space).or_insert_with(|| Owed {
                memory: Arc::new(memory),
                all: PageSet::new(),
                sent: PageSet::new(),
                left: PageSet::new(),
                listed: PageSet::new(),
            });
            owed.all.extend(&pages);
        }
        for owed in spaces.values_mut() {
            owed.left = owed.all.clone();
        }
        Ok(Books {
            spaces,
            next: START,
            listing: Some(START),
        })
    }

    /// Books over frozen processes of which only the target knows what they owe: it may list any of their pages.
    pub fn resume(processes: &[(SpaceId, i32)]) -> Result<Books, (i32, ReadError)> {
        let mut kinds = FileKinds::default();
        let mut pages = Vec::with_capacity(processes.len());
        for &(space, pid) in processes {
            let maps = maps::read(pid, &mut kinds).map_err(|_| (pid, ReadError::Exited { pid }))?;
            pages.push(PagesToSend {
                space,
                pid,
                pages: maps.iter().map(|vma| vma.range).collect(),
            });
        }
        let mut books = Books::new(pages)?;
        for owed in books.spaces.values_mut() {
            owed.sent = std::mem::take(&mut owed.left);
        }
        Ok(books)
    }

    /// Pages that still have to be sent.
    pub fn left(&self) -> u64 {
        self.spaces.values().map(|owed| owed.left.pages()).sum()
    }

    /// A new connection: the target will list what it misses.
    pub fn begin_list(&mut self) {
        self.listing = Some(START);
        for owed in self.spaces.values_mut() {
            owed.listed = PageSet::new();
        }
    }

    /// The target misses these pages.
    pub fn missing(&mut self, space: SpaceId, pages: PageRange) -> Result<(), Breach> {
        let Some(from) = &mut self.listing else {
            return Err(Breach::OutOfPlace("what it misses"));
        };
        if (space, pages.start()) < *from {
            return Err(Breach::Order { space, pages });
        }
        *from = (space, pages.end());
        owing(&mut self.spaces, space, pages)?.listed.insert(pages);
        Ok(())
    }

    /// The target misses nothing else: that is what is left to send.
    pub fn end_list(&mut self) -> Result<(), Breach> {
        if self.listing.take().is_none() {
            return Err(Breach::OutOfPlace("the end of what it misses"));
        }
        for (&space, owed) in &mut self.spaces {
            let mut has = owed.all.clone();
            has.subtract(&owed.listed);
            has.subtract(&owed.sent);
            if let Some(pages) = has.iter().next() {
                return Err(Breach::NeverSent { space, pages });
            }
            owed.left = std::mem::take(&mut owed.listed);
        }
        Ok(())
    }

    /// Whether the target has said what it misses, so that pushing makes sense.
    pub fn is_listed(&self) -> bool {
        self.listing.is_none()
    }

    /// What answers a fault at the first of `wanted`: that page in any case, and those after it that were not sent yet.
    /// The push goes on behind them.
    pub fn answer(&mut self, space: SpaceId, wanted: PageRange) -> Result<Batch, Breach> {
        let owed = owing(&mut self.spaces, space, wanted)?;
        let first = PageRange::from_start_len(wanted.start(), 1).expect("a page of a range");
        let mut ranges = owed.left.intersecting(wanted);
        if ranges
            .first()
            .is_none_or(|run| run.start() != first.start())
        {
            ranges.insert(0, first);
        }
        cut(&mut ranges, ANSWER_PAGES);
        owed.sending(&ranges);
        let end = ranges.last().map_or(wanted.end(), |run| run.end());
        let memory = Arc::clone(&owed.memory);
        self.next = (space, end);
        Ok(Batch {
            space,
            memory,
            ranges,
        })
    }

    /// The next pages to push, at most so many; `None` when all were sent.
    pub fn push(&mut self, pages: u64) -> Option<Batch> {
        let (space, page) = self.next;
        let behind = self.spaces.range_mut(space..);
        let mut behind = behind.map(|(&at, owed)| {
            let from = if at == space { page } else { PageNumber(0) };
            (at, owed, from)
        });
        let found = behind.find(|(_, owed, from)| owed.left.starting_at(*from).next().is_some());
        let (space, owed, from) = match found {
            Some(found) => found,
            // Around: what lies before the place that the push was drawn to.
            None => {
                let found = self
                    .spaces
                    .iter_mut()
                    .find(|(_, owed)| !owed.left.is_empty());
                let (&space, owed) = found?;
                (space, owed, PageNumber(0))
            }
        };
        let mut ranges = Vec::new();
        let mut room = pages;
        for run in owed.left.starting_at(from) {
            if room == 0 || ranges.len() == RUNS {
                break;
            }
            let run = run.chunks(room).next().expect("a run is not empty");
            room -= run.pages();
            ranges.push(run);
        }
        owed.sending(&ranges);
        let end = ranges.last().expect("a space with pages left").end();
        let memory = Arc::clone(&owed.memory);
        self.next = (space, end);
        Some(Batch {
            space,
            memory,
            ranges,
        })
    }

    /// The next space behind `after` that has pages left among those of `batch`, which was pushed of another: it may share
    /// them. They stay left until [`Books::take`].
    pub fn sharer(&self, batch: &Batch, after: Option<SpaceId>) -> Option<Batch> {
        let behind = after.map_or(Bound::Unbounded, Bound::Excluded);
        let (first, last) = (batch.ranges.first()?, batch.ranges.last()?);
        let others = self.spaces.range((behind, Bound::Unbounded));
        let mut others = others.filter(|&(&space, owed)| {
            // Most have none anywhere near, and faults wait while the books are held.
            let near = owed.left.starting_at(first.start()).next();
            space != batch.space && near.is_some_and(|run| run.start() < last.end())
        });
        others.find_map(|(&space, owed)| {
            let ranges = owed.left_among(&batch.ranges);
            let memory = Arc::clone(&owed.memory);
            (!ranges.is_empty()).then_some(Batch {
                space,
                memory,
                ranges,
            })
        })
    }

    /// Those of `ranges` that are left in `space`: they are sent now.
    pub fn take(&mut self, space: SpaceId, ranges: &[PageRange]) -> Vec<PageRange> {
        let Some(owed) = self.spaces.get_mut(&space) else {
            return Vec::new();
        };
        let left = owed.left_among(ranges);
        owed.sending(&left);
        left
    }

    /// The target says that every page has arrived: then every page was sent.
    pub fn complete(&self) -> Result<(), Breach> {
        if self.listing.is_some() {
            return Err(Breach::OutOfPlace("that all has arrived"));
        }
        for (&space, owed) in &self.spaces {
            let mut never = owed.all.clone();
            never.subtract(&owed.sent);
            if let Some(pages) = never.iter().next() {
                return Err(Breach::NeverSent { space, pages });
            }
        }
        Ok(())
    }
}

const START: (SpaceId, PageNumber) = (SpaceId(0), PageNumber(0));

impl Owed {
    fn left_among(&self, ranges: &[PageRange]) -> Vec<PageRange> {
        let left = ranges.iter().map(|&range| self.left.intersecting(range));
        left.flatten().collect()
    }

    fn sending(&mut self, ranges: &[PageRange]) {
        for &range in ranges {
            self.left.remove(range);
            self.sent.insert(range);
        }
    }
}

/// The space, if all of `pages` are owed in it.
fn owing(
    spaces: &mut BTreeMap<SpaceId, Owed>,
    space: SpaceId,
    pages: PageRange,
) -> Result<&mut Owed, Breach> {
    spaces
        .get_mut(&space)
        .filter(|owed| owed.all.intersecting(pages) == [pages])
        .ok_or(Breach::NotOwed { space, pages })
}

/// Leaves the first `pages` pages of `ranges`.
fn cut(ranges: &mut Vec<PageRange>, pages: u64) {
    let mut room = pages;
    let mut kept = Vec::with_capacity(ranges.len());
    for range in ranges.iter() {
        if room == 0 {
            break;
        }
        let range = range.chunks(room).next().expect("a range is not empty");
        room -= range.pages();
        kept.push(range);
    }
    *ranges = kept;
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: SpaceId = SpaceId(1);
    const TWO: SpaceId = SpaceId(2);

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(start), pages).expect("a test range is valid")
    }

    /// Space 1 owes 100..200 and 300..310, space 2 owes 50..60; the target has listed them all.
    fn books() -> Books {
        let mut books = unlisted();
        for (space, pages) in [
            (ONE, range(100, 100)),
            (ONE, range(300, 10)),
            (TWO, range(50, 10)),
        ] {
            books.missing(space, pages).expect("listed");
        }
        books.end_list().expect("the end");
        books
    }

    fn unlisted() -> Books {
        let own = |space, pages: &[PageRange]| PagesToSend {
            space,
            pid: std::process::id().cast_signed(),
            pages: pages.iter().copied().collect(),
        };
        let pages = vec![
            own(ONE, &[range(100, 100), range(300, 10)]),
            own(TWO, &[range(50, 10)]),
        ];
        Books::new(pages).expect("this process is there")
    }

    #[test]
    fn the_push_goes_through_all_pages_once_in_order_and_comes_around() {
        let mut books = books();
        let answer = books.answer(ONE, range(150, 4)).expect("owed");
        assert_eq!(answer.ranges, [range(150, 4)]);
        let mut pushed = Vec::new();
        while let Some(batch) = books.push(32) {
            assert!(batch.ranges.iter().map(|run| run.pages()).sum::<u64>() <= 32);
            pushed.push((batch.space, batch.ranges));
        }
        let expected = [
            (ONE, vec![range(154, 32)]),
            (ONE, vec![range(186, 14), range(300, 10)]),
            (TWO, vec![range(50, 10)]),
            (ONE, vec![range(100, 32)]),
            (ONE, vec![range(132, 18)]),
        ];
        assert_eq!(pushed, expected);
        assert_eq!(books.left(), 0);
        books.complete().expect("all was sent");
    }

    #[test]
    fn a_fault_is_answered_even_if_its_page_was_sent_but_not_with_neighbours_that_were() {
        let mut books = books();
        books.push(8).expect("some");
        let answer = books.answer(ONE, range(102, 10)).expect("owed");
        assert_eq!(answer.ranges, [range(102, 1), range(108, 4)]);
        let answer = books.answer(ONE, range(120, 60)).expect("owed");
        assert_eq!(answer.ranges, [range(120, ANSWER_PAGES)]);
        let next = books.push(4).expect("some");
        assert_eq!(next.ranges, [range(136, 4)]);
    }

    /// Spaces 1 to 4: 100..120, the same, 130..140, 110..112 and 118..125.
    fn neighbours() -> Books {
        let pages = [
            (1, vec![range(100, 20)]),
            (2, vec![range(100, 20)]),
            (3, vec![range(130, 10)]),
            (4, vec![range(110, 2), range(118, 7)]),
        ];
        let pages = pages.map(|(space, pages)| PagesToSend {
            space: SpaceId(space),
            pid: std::process::id().cast_signed(),
            pages: pages.into_iter().collect(),
        });
        let mut books = Books::new(pages.to_vec()).expect("this process is there");
        for PagesToSend { space, pages, .. } in pages {
            for pages in pages.iter() {
                books.missing(space, pages).expect("listed");
            }
        }
        books.end_list().expect("the end");
        books
    }

    #[test]
    fn who_has_the_pushed_pages_left_is_named_in_turn_and_nobody_else() {
        let mut books = neighbours();
        let pushed = books.push(64).expect("some");
        assert_eq!(
            (pushed.space, &pushed.ranges[..]),
            (ONE, &[range(100, 20)][..])
        );
        let second = books.sharer(&pushed, None).expect("space 2");
        assert_eq!(
            (second.space, &second.ranges[..]),
            (TWO, &[range(100, 20)][..])
        );
        let fourth = books.sharer(&pushed, Some(TWO)).expect("space 4");
        assert_eq!(fourth.space, SpaceId(4));
        assert_eq!(fourth.ranges, [range(110, 2), range(118, 2)]);
        assert!(books.sharer(&pushed, Some(fourth.space)).is_none());
    }

    #[test]
    fn what_is_named_is_sent_and_what_was_sent_meanwhile_is_not_named() {
        let mut books = neighbours();
        let pushed = books.push(64).expect("some");
        let left = books.left();
        let second = books.sharer(&pushed, None).expect("space 2");
        assert_eq!(books.left(), left, "nothing is sent yet");
        books.answer(TWO, range(104, 2)).expect("owed");
        let same = [range(102, 4), range(110, 5)];
        let taken = books.take(second.space, &same);
        assert_eq!(taken, [range(102, 2), range(110, 5)]);
        assert!(books.take(second.space, &same).is_empty());
        assert_eq!(books.left(), left - 2 - 7);
        // What only looked as if it were shared is still to come.
        let mut pushed = Vec::new();
        while let Some(batch) = books.push(64) {
            pushed.push((batch.space.0, batch.ranges));
        }
        let second = vec![range(106, 4), range(115, 5)];
        let before = vec![range(100, 2)];
        assert_eq!(pushed[0], (2, second));
        assert_eq!(pushed.last(), Some(&(2, before)));
        books.complete().expect("all was sent");
    }

    #[test]
    fn a_target_that_wants_what_it_is_not_owed_is_found_out() {
        let mut books = books();
        let left = books.left();
        for (space, pages) in [
            (SpaceId(9), range(100, 1)),
            (ONE, range(99, 2)),
            (ONE, range(200, 1)),
            (TWO, range(59, 2)),
        ] {
            let error = books.answer(space, pages).expect_err("not owed");
            assert_eq!(error, Breach::NotOwed { space, pages });
        }
        assert_eq!(books.left(), left);
    }

    #[test]
    fn after_a_new_list_only_what_is_missing_is_left() {
        let mut books = books();
        while books.push(64).is_some() {}
        books.begin_list();
        assert!(!books.is_listed());
        books.missing(ONE, range(190, 10)).expect("listed");
        books.missing(TWO, range(50, 1)).expect("listed");
        books.end_list().expect("the end");
        assert_eq!(books.left(), 11);
        assert_eq!(books.push(64).expect("some").ranges, [range(190, 10)]);
        assert_eq!(books.push(64).expect("some").ranges, [range(50, 1)]);
        assert!(books.push(64).is_none());
    }

    #[test]
    fn a_list_that_cannot_be_is_refused() {
        let mut books = unlisted();
        let complete = books.complete().expect_err("nothing was sent");
        assert!(matches!(complete, Breach::OutOfPlace(_)));
        books.missing(ONE, range(120, 10)).expect("listed");
        for pages in [range(125, 10), range(100, 5), range(120, 10)] {
            let error = books.missing(ONE, pages).expect_err("out of order");
            assert_eq!(error, Breach::Order { space: ONE, pages });
        }
        let error = books.missing(ONE, range(195, 10)).expect_err("not owed");
        assert!(matches!(error, Breach::NotOwed { .. }));
        let error = books.end_list().expect_err("it cannot have the rest");
        let pages = range(100, 20);
        assert_eq!(error, Breach::NeverSent { space: ONE, pages });
        let mut books = self::books();
        let again = books.end_list().expect_err("ended before");
        assert!(matches!(again, Breach::OutOfPlace(_)));
        let error = books.complete().expect_err("nothing was sent");
        assert!(matches!(error, Breach::NeverSent { .. }));
    }
}
