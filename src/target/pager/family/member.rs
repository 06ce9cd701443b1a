//! One address space of a family: its userfaultfd, what it wants, and how far it is.

use super::{Tally, ZERO_PAGE};
use crate::kernel::userfaultfd_missing::{MissingUffd, Placed, UffdError};
use crate::memory::{PAGE_SIZE, PageNumber, PageRange};
use crate::target::pager::pending::PendingRun;
use crate::target::pager::wanted::Wanted;
use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Pages in one chunk of the background fill: 16 KiB after a fault, doubling to [`LARGE_CHUNK`](super::LARGE_CHUNK) while none comes, because
/// a fault waits until the chunk under way is placed.
pub(super) const SMALL_CHUNK: u64 = 4;

/// How long to let CRIU restore before a range that was not registered yet is tried again: at first, and at most. A container of
/// thousands of processes takes its time, and to try all of them again and again takes the processors from CRIU.
const REGISTRATION_RETRY: Duration = Duration::from_millis(1);
const REGISTRATION_RETRY_MOST: Duration = Duration::from_millis(50);

/// How long, after the restore, a page may belong where nothing is registered before that is an error.
///
/// Of a change by a thread that is killed meanwhile no event is told. Its process dies with it, but takes its time.
const EXPLAINED_WITHIN: Duration = Duration::from_secs(5);

/// What is meant by an address where nothing is registered and something belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Absence {
    /// It may be registered later, or its process may be about to end: nothing is given up yet.
    ForNow,
    /// The mapping does not exist in this address space.
    Right,
    /// The page has no place, and nobody knows why.
    Wrong,
}

/// One address space.
#[derive(Debug)]
pub(in crate::target::pager) struct Member {
    pub uffd: MissingUffd,
    pub(super) wanted: Wanted,
    /// Filled before the rest.
    pub(super) hot: VecDeque<PageRange>,
    /// Where the fill goes on.
    pub(super) cursor: PageNumber,
    pub(super) chunk: u64,
    /// Faults read and not answered yet.
    pub faults: VecDeque<PageNumber>,
    /// Faults on pages that have not come. Placing a page wakes all who wait for it, so one entry stands for any number.
    pub(super) waiting: BTreeSet<PageNumber>,
    /// Nothing is tried for this member before then.
    pub retry_at: Option<Instant>,
    /// The next pause for want of a registered range.
    pub(super) pause: Duration,
    /// A fork made it: it has no copy of mappings that its parent kept to itself (`MADV_DONTFORK`), of which no event tells.
    pub(super) forked: bool,
    /// Since when pages belong where nothing is registered, although no change said so.
    pub(super) unexplained: Option<Instant>,
    /// All is filled and the standby was told to let go; faults are served until it has.
    pub closing: bool,
}

impl Member {
    pub(super) fn new(uffd: MissingUffd, wanted: Wanted) -> Self {
        Member {
            uffd,
            wanted,
            hot: VecDeque::new(),
            cursor: PageNumber(0),
            chunk: SMALL_CHUNK,
            faults: VecDeque::new(),
            waiting: BTreeSet::new(),
            retry_at: None,
            pause: REGISTRATION_RETRY,
            forked: false,
            unexplained: None,
            closing: false,
        }
    }

    /// The address space of a fork's child.
    pub(super) fn forked(uffd: MissingUffd, wanted: Wanted) -> Self {
        Member {
            forked: true,
            ..Member::new(uffd, wanted)
        }
    }

    /// What it means if nothing is registered where a page belongs.
    pub(super) fn absence(&mut self, restored: bool) -> Absence {
        if !restored {
            return Absence::ForNow;
        }
        if self.forked {
            return Absence::Right;
        }
        match self.unexplained {
            Some(since) if since.elapsed() >= EXPLAINED_WITHIN => Absence::Wrong,
            _ => Absence::ForNow,
        }
    }

    /// An event was read: it may be what explains.
    pub(super) fn changed(&mut self) {
        self.unexplained = None;
        self.try_again();
    }

    /// The faults that wait for owed pages are looked at again.
    pub(super) fn try_again(&mut self) {
        self.faults
            .append(&mut std::mem::take(&mut self.waiting).into_iter().collect());
    }

    /// Whether a fault at `page` waits already.
    pub fn waits_at(&self, page: PageNumber) -> bool {
        self.waiting.contains(&page)
    }

    /// Whether some of what it wants has not come yet.
    pub fn is_owed(&self) -> bool {
        self.wanted.owed.pages() != 0
    }

    /// What to fill next: hot ranges in their order, then on from the cursor, round to the start.
    pub(super) fn next_run(&mut self) -> Option<PendingRun> {
        while let Some(&hot) = self.hot.front() {
            let run = self.wanted.ready.next_from(hot.start());
            if let Some(run) = run
                && let Some(now) = run.now.intersection(hot)
            {
                return Some(PendingRun { now, ..run });
            }
            self.hot.pop_front();
        }
        self.wanted
            .ready
            .next_from(self.cursor)
            .or_else(|| self.wanted.ready.next_from(PageNumber(0)))
    }

    /// The run up to `end` is not registered now: others first, and when all were tried, a pause.
    pub(super) fn put_off(&mut self, end: PageNumber, restored: bool) {
        if restored {
            self.unexplained.get_or_insert_with(Instant::now);
        }
        if !self.hot.is_empty() {
            self.hot.rotate_left(1);
            return self.pause();
        }
        self.cursor = end;
        if self.wanted.ready.next_from(end).is_none() {
            self.pause();
        }
    }

    fn pause(&mut self) {
        self.retry_at = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(REGISTRATION_RETRY_MOST);
    }

    /// Something was placed, or can be: what could not be is tried again soon.
    pub(in crate::target::pager) fn resume(&mut self) {
        self.retry_at = None;
        self.pause = REGISTRATION_RETRY;
    }

    /// Places `data` at `to` on, leaving pages of zeros out: they read as zero once nothing is pending there. Says for how
    /// many pages that is done, and what stopped it if not for all.
    pub(super) fn place(
        &self,
        to: PageNumber,
        data: &[u8],
        absence: Absence,
        tally: &mut Tally,
    ) -> Result<(u64, Option<Placed>), UffdError> {
        const PAGE: usize = PAGE_SIZE as usize;
        let total = data.len() as u64 / PAGE_SIZE;
        let (mut done, mut window) = (0, total);
        while done < total {
            let rest = &data[(done * PAGE_SIZE) as usize..];
            if rest[..PAGE] == ZERO_PAGE {
                done += 1;
                continue;
            }
            let run = rest
                .chunks_exact(PAGE)
                .take(window as usize)
                .take_while(|page| **page != ZERO_PAGE)
                .count();
            match self
                .uffd
                .copy(PageNumber(to.0 + done), &rest[..run * PAGE])?
            {
                Placed::Pages(pages) => {
                    done += pages;
                    tally.pages += pages;
                    window = (window * 2).min(total);
                }
                Placed::Exists => done += 1,
                // The run may reach over the end of a mapping: halve it until it does not.
                Placed::NotRegistered if run > 1 => window = run as u64 / 2,
                Placed::NotRegistered if absence != Absence::ForNow => {
                    done += 1;
                    tally.unregistered += u64::from(absence == Absence::Wrong);
                }
                stop => return Ok((done, Some(stop))),
            }
        }
        Ok((done, None))
    }
}
