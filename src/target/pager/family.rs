//! The memory of one restored task and of the children it forks while pages are missing: one store, several address
//! spaces.
//!
//! Enters: the task's memfd, userfaultfds, faults and changes of the address spaces. Leaves: pages in their places, and
//! holes in the memfd where nobody needs the page any more.
//!
//! A child forked before all is filled misses the same pages as its parent did at the fork: the kernel lets
//! no page be placed between the copying of the page tables and the reading of the event. So the child starts with a
//! copy of the parent's [`Wanted`], and a page stays in the store until the last that wants it has it.
//!
//! Pages that are still owed by the source are in no one's reach here until they have come: see `owed`.

mod member;
mod owed;

pub(super) use member::Member;

use super::standby_link::Change;
use super::wanted::Wanted;
use super::window;
use crate::kernel::userfaultfd_missing::{MissingUffd, Placed, UffdError};
use crate::memory::{PAGE_SIZE, PageNumber, PageRange};
use crate::target::page_store::punch;
use member::SMALL_CHUNK;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use owed::Owed;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Pages in the largest chunk of the background fill: 1 MiB.
pub(super) const LARGE_CHUNK: u64 = 256;

/// How long to let a process at its memory limit breathe.
const MEMORY_RETRY: Duration = Duration::from_millis(1);

static ZERO_PAGE: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// What went wrong beyond repair while supplying a task's memory.
#[derive(Debug, thiserror::Error)]
pub enum FamilyError {
    /// A userfaultfd operation failed.
    #[error("task {vpid}: {source}")]
    Uffd {
        /// The task's pid inside the container.
        vpid: i32,
        /// What failed.
        source: UffdError,
    },
    /// The memfd could not be read, searched or punched.
    #[error("task {vpid}: {action} in the page store: {source}")]
    Store {
        /// The task's pid inside the container.
        vpid: i32,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Names one address space among all of a pager's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub(super) struct MemberId(pub u32);

/// A task's store and the address spaces filled from it.
#[derive(Debug)]
pub(super) struct Family {
    pub vpid: i32,
    store: File,
    /// What the task's own address space wants, until its userfaultfd arrives.
    unclaimed: Option<Wanted>,
    hot: Vec<PageRange>,
    /// In post-copy.
    owed: Option<Owed>,
    pub members: BTreeMap<MemberId, Member>,
    pub tally: Tally,
}

/// What was done for a family.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub spaces: u32,
    pub pages: u64,
    pub faults: u64,
    pub unregistered: u64,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Something was done; there may be more.
    Progress,
    /// Read the waiting events first.
    Changing,
    /// Come back at `retry_at`.
    Later,
    /// Nothing can be done until owed pages come.
    Waiting,
    /// Nothing is left to do.
    Complete,
    /// The address space is gone.
    Gone,
}

impl Family {
    pub fn new(vpid: i32, memfd: OwnedFd, lazy: Vec<PageRange>) -> Self {
        Family {
            vpid,
            store: File::from(memfd),
            unclaimed: Some(Wanted::at_home(lazy)),
            hot: Vec::new(),
            owed: None,
            members: BTreeMap::new(),
            tally: Tally::default(),
        }
    }

    pub fn set_hot(&mut self, hot: Vec<PageRange>) {
        self.hot = hot;
    }

    /// The memfd.
    pub fn store(&self) -> BorrowedFd<'_> {
        self.store.as_fd()
    }

    /// How many pages the family waits for, over all its address spaces; pages that are zero count too.
    pub fn pending_pages(&self) -> u64 {
        self.wanted().map(Wanted::pages).sum()
    }

    /// What its address spaces want, that of a userfaultfd that has not come included.
    fn wanted(&self) -> impl Iterator<Item = &Wanted> {
        let members = self.members.values().map(|member| &member.wanted);
        members.chain(&self.unclaimed)
    }

    /// The task's own userfaultfd has come. `false` if it had come before.
    pub fn claim(&mut self, id: MemberId, uffd: MissingUffd) -> bool {
        let Some(wanted) = self.unclaimed.take() else {
            return false;
        };
        let mut member = Member::new(uffd, wanted);
        member.hot = std::mem::take(&mut self.hot).into();
        self.tally.spaces += 1;
        self.members.insert(id, member);
        true
    }

    /// Whether the task's userfaultfd came and every address space was filled and let go.
    pub fn done(&self) -> bool {
        self.unclaimed.is_none() && self.members.is_empty()
    }

    /// Applies a change of a member's address space; says which store pages that member does not want any more. A
    /// fork's userfaultfd is `child`.
    ///
    /// A member not here was filled and let go: its memory misses nothing, and a child's neither.
    pub fn apply(
        &mut self,
        id: MemberId,
        change: &Change,
        child: Option<MissingUffd>,
    ) -> Vec<PageRange> {
        if let Change::Fork { child: child_id } = change {
            if let Some(uffd) = child {
                let parent = self.members.get(&id);
                let wanted = parent.map(|parent| parent.wanted.clone());
                self.tally.spaces += 1;
                self.members
                    .insert(*child_id, Member::forked(uffd, wanted.unwrap_or_default()));
            }
            return Vec::new();
        }
        let Some(member) = self.members.get_mut(&id) else {
            return Vec::new();
        };
        // What a thread waits for may be gone or elsewhere now, and the answer another.
        member.changed();
        match change {
            Change::Remap { from, to } => from
                .range()
                .map(|from| member.wanted.remap(from, PageNumber(*to))),
            Change::Drop { pages } => pages.range().map(|pages| member.wanted.remove(pages)),
            Change::Fork { .. } => None,
        }
        .unwrap_or_default()
    }

    /// Answers the oldest fault of a member. [`Step::Complete`]: none waits.
    pub fn serve_fault(&mut self, id: MemberId) -> Result<Step, FamilyError> {
        let Some(page) = self
            .members
            .get(&id)
            .and_then(|m| m.faults.front().copied())
        else {
            return Ok(Step::Complete);
        };
        if self.wait_for_owed(id, page)? {
            return Ok(Step::Progress);
        }
        let Some(member) = self.members.get_mut(&id) else {
            return Ok(Step::Complete);
        };
        let one = PageRange::from_start_len(page, 1);
        let mut data = ZERO_PAGE;
        if let Some(store) = member.wanted.ready.lookup(page) {
            self.store
                .read_exact_at(&mut data, store.addr().0)
                .map_err(|source| FamilyError::Store {
                    vpid: self.vpid,
                    action: "reading a page",
                    source,
                })?;
        }
        let placed = if data == ZERO_PAGE {
            member.uffd.zero(page)
        } else {
            member.uffd.copy(page, &data)
        }
        .map_err(|source| FamilyError::Uffd {
            vpid: self.vpid,
            source,
        })?;
        match placed {
            Placed::Pages(_) => {
                self.tally.faults += 1;
                self.tally.pages += u64::from(data != ZERO_PAGE);
            }
            Placed::Changing => return Ok(Step::Changing),
            Placed::NoMemory => {
                member.retry_at = Some(Instant::now() + MEMORY_RETRY);
                return Ok(Step::Later);
            }
            Placed::Gone => return Ok(Step::Gone),
            // There already: the sleeper may have gone to sleep after whoever placed it woke the waiters. Or the
            // mapping vanished under the sleeper: it faults again and learns of it from the kernel.
            Placed::Exists | Placed::NotRegistered => {
                if let Some(one) = one {
                    member.uffd.wake(one);
                }
            }
        }
        member.faults.pop_front();
        if placed != Placed::NotRegistered {
            // Memory is used in runs: what follows the page is likely to be wanted next.
            member.cursor = PageNumber(page.0 + 1);
            member.chunk = SMALL_CHUNK;
            if let Some(one) = one {
                let freed = member.wanted.remove(one);
                self.free(&freed)?;
            }
        }
        Ok(Step::Progress)
    }

    /// Places the next chunk of a member. `restored`: no mapping will be registered from now on.
    pub fn fill(
        &mut self,
        id: MemberId,
        buffer: &mut [u8],
        restored: bool,
    ) -> Result<Step, FamilyError> {
        let Some(member) = self.members.get_mut(&id) else {
            return Ok(Step::Complete);
        };
        let Some(mut run) = member.next_run() else {
            return Ok(match member.wanted.owed.pages() {
                0 => Step::Complete,
                _ => Step::Waiting,
            });
        };
        // While pages are awaited faults come at any moment, and one waits until the chunk under way is placed.
        let most = match member.wanted.owed.pages() {
            0 => LARGE_CHUNK,
            _ => window::MOST,
        };
        let vpid = self.vpid;
        let failed = |action| {
            move |source: io::Error| FamilyError::Store {
                vpid,
                action,
                source,
            }
        };
        // Long holes are skipped by asking the file; short ones are seen as zeros below. (SEEK_HOLE would say where the
        // data ends, but walks all of it to find out, for every chunk again.)
        match next_data(&self.store, run.store_range())
            .map_err(|errno| failed("looking for data")(errno.into()))?
        {
            None => {
                member.wanted.ready.remove(run.now);
                return Ok(Step::Progress);
            }
            Some(first) if first > run.store => {
                let skip = first.0 - run.store.0;
                if let Some(hole) = PageRange::from_start_len(run.now.start(), skip) {
                    member.wanted.ready.remove(hole);
                }
                let Some(rest) =
                    PageRange::new(PageNumber(run.now.start().0 + skip), run.now.end())
                else {
                    return Ok(Step::Progress);
                };
                (run.now, run.store) = (rest, first);
            }
            Some(_) => {}
        }
        let pages = run
            .now
            .pages()
            .min(member.chunk)
            .min(buffer.len() as u64 / PAGE_SIZE);
        let data = &mut buffer[..(pages * PAGE_SIZE) as usize];
        self.store
            .read_exact_at(data, run.store.addr().0)
            .map_err(failed("reading pages"))?;
        let absence = member.absence(restored);
        let (done, stop) = member
            .place(run.now.start(), data, absence, &mut self.tally)
            .map_err(|source| FamilyError::Uffd { vpid, source })?;
        if let Some(placed) = PageRange::from_start_len(run.now.start(), done) {
            let freed = member.wanted.ready.remove(placed);
            member.cursor = placed.end();
            member.resume();
            self.free(&freed)?;
        }
        let Some(member) = self.members.get_mut(&id) else {
            return Ok(Step::Complete);
        };
        Ok(match stop {
            None => {
                member.chunk = (member.chunk * 2).min(most);
                Step::Progress
            }
            Some(Placed::Gone) => Step::Gone,
            Some(Placed::NoMemory) => {
                member.retry_at = Some(Instant::now() + MEMORY_RETRY);
                Step::Later
            }
            Some(Placed::NotRegistered) => {
                member.put_off(run.now.end(), restored);
                Step::Later
            }
            Some(_) => Step::Changing,
        })
    }

    /// A member's address space is gone: it wants nothing any more.
    pub fn abandon(&mut self, id: MemberId) -> Result<(), FamilyError> {
        let Some(member) = self.members.get_mut(&id) else {
            return Ok(());
        };
        let wanted = std::mem::take(&mut member.wanted);
        member.faults.clear();
        member.waiting.clear();
        member.hot.clear();
        self.free(&wanted.store_pages())
    }

    /// Frees the memory of those of the store pages that no member wants.
    pub fn free(&self, store: &[PageRange]) -> Result<(), FamilyError> {
        for &range in store {
            let mut unwanted = crate::memory::PageSet::from_iter([range]);
            for wanted in self.wanted().flat_map(|wanted| wanted.wants(range)) {
                unwanted.remove(wanted);
            }
            for range in unwanted.iter() {
                punch(&self.store, range).map_err(|errno| FamilyError::Store {
                    vpid: self.vpid,
                    action: "freeing pages",
                    source: errno.into(),
                })?;
            }
        }
        Ok(())
    }
}

/// The first page with data in `range` of a sparse file.
fn next_data(store: &File, range: PageRange) -> Result<Option<PageNumber>, Errno> {
    let start = i64::try_from(range.start().addr().0).map_err(|_| Errno::EFBIG)?;
    match lseek(store, start, Whence::SeekData) {
        Ok(offset) => {
            let page = PageNumber(offset as u64 / PAGE_SIZE);
            Ok((page < range.end()).then_some(page.max(range.start())))
        }
        // No data from here to the end of the file.
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno),
    }
}
