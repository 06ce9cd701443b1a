//! The page store: the newest copy of every page received so far, placed where it will be taken from.
//!
//! Enters: runs of pages with their raw contents, from several placing threads. Leaves: one memfd per address space
//! in which the page at address A lies at file offset A, and the set of pages that were received at all.
//!
//! A page of zeros takes no memory: it is a hole in the file, like a page never received. The two differ only in the
//! set of received pages, which is what completeness is proven with before commit. The newest copy wins because the
//! streams keep the frames of one page in order: the callers place a page's copies one after another, so no lock is
//! held while bytes are written, and frames of one space are placed in parallel.
//!
//! # Owed pages
//!
//! A page that is *owed* exists at the source and its content comes later, in post-copy; what was received of it before
//! is forgotten. Once a space has a record of its arrivals ([`PageStore::track`]), its owed pages are placed from streams
//! that know nothing of each other, while a pager takes them out again. So from then on the *first* copy wins: it is
//! claimed before it is written, written, put on record, and every other copy of it is dropped, because the pager may
//! have taken the page and freed it already. The source is frozen, all copies are the same. A page that was never owed
//! is refused.
//!
//! A peer could send pages without end. The number of spaces and the bytes of data have limits, and what passes
//! them is refused before it is written.

use super::arrivals::Arrivals;
use crate::memory::{PAGE_SIZE, PageRange, PageSet, SpaceId};
use crate::wire::page_frame::{Run, RunKind};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Why a page store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PageStoreError {
    /// One space more than allowed.
    #[error("refusing {space:?}: the page store may hold {limit} spaces")]
    TooManySpaces {
        /// The space that would have been added.
        space: SpaceId,
        /// How many are allowed.
        limit: usize,
    },
    /// More data than allowed.
    #[error("refusing {pages} more pages of {space:?}: the page store may hold {limit} bytes")]
    Full {
        /// The space the pages belong to.
        space: SpaceId,
        /// How many pages of data would have been added.
        pages: u64,
        /// How many bytes of data are allowed.
        limit: u64,
    },
    /// This host has no memory for the pages.
    #[error("placing {range} of {space:?}: no memory left on this host ({errno})")]
    OutOfMemory {
        /// The space the pages belong to.
        space: SpaceId,
        /// The pages that were being placed.
        range: PageRange,
        /// ENOSPC or ENOMEM.
        errno: Errno,
    },
    /// The data runs and the payload disagree.
    #[error("runs of {space:?} announce {announced} bytes of data, the payload has {actual}")]
    PayloadLength {
        /// The space the runs belong to.
        space: SpaceId,
        /// What the runs add up to.
        announced: u64,
        /// What came.
        actual: u64,
    },
    /// Nothing was ever placed in this space.
    #[error("{0:?} is not in the page store")]
    UnknownSpace(SpaceId),
    /// Pages came for which the source had said nothing, in a space that takes only owed pages by now.
    #[error("{range} of {space:?} came, and not all of it was owed")]
    NotOwed {
        /// The space.
        space: SpaceId,
        /// What came.
        range: PageRange,
    },
    /// Pages were said to be another space's, which does not have them.
    #[error(
        "{range} of {space:?} is said to be what {origin:?} has there, and that is not all known"
    )]
    NoOrigin {
        /// The space.
        space: SpaceId,
        /// Where the pages were to be taken from.
        origin: SpaceId,
        /// Which.
        range: PageRange,
    },
    /// The buffer does not have the size of the range to read.
    #[error("a buffer of {actual} bytes cannot take {range}")]
    BufferLength {
        /// What was to be read.
        range: PageRange,
        /// The buffer's size.
        actual: usize,
    },
    /// A system call on a space's memfd failed.
    #[error("{action} of {space:?}: {source}")]
    Memfd {
        /// What was being done.
        action: &'static str,
        /// To which space.
        space: SpaceId,
        /// Why it failed.
        source: io::Error,
    },
}

/// What a store may hold at most.
#[derive(Clone, Copy, Debug)]
pub struct PageStoreLimits {
    /// Address spaces; each takes a file descriptor.
    pub spaces: usize,
    /// Bytes of data over all spaces; zero pages are free.
    pub bytes: u64,
}

/// What a run of pages contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunContent {
    /// Its bytes are next in the payload.
    Data,
    /// Zeros; nothing of it is in the payload.
    Zero,
    /// Not known yet, it comes later; nothing of it is in the payload.
    Owed,
    /// What the same pages of this other space hold as data; nothing of it is in the payload.
    Same(SpaceId),
}

/// Consecutive pages with contents of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Which pages.
    pub pages: PageRange,
    /// What they contain.
    pub content: RunContent,
}

impl From<&Run> for PageRun {
    fn from(run: &Run) -> PageRun {
        PageRun {
            pages: run.range,
            content: match run.kind {
                RunKind::Data => RunContent::Data,
                RunKind::Zero => RunContent::Zero,
                RunKind::Owed => RunContent::Owed,
                RunKind::Same(origin) => RunContent::Same(origin),
            },
        }
    }
}

/// The newest copy of every page of a container, shared by the placing threads.
#[derive(Debug)]
pub struct PageStore {
    limits: PageStoreLimits,
    spaces: RwLock<HashMap<SpaceId, Arc<Space>>>,
    /// Pages of data over all spaces, counting those whose writing is under way.
    data_pages: AtomicU64,
}

#[derive(Debug)]
struct Space {
    id: SpaceId,
    memfd: File,
    known: Mutex<Known>,
}

/// What a space holds. `data` is a subset of `received`; the rest of `received` is zero. `owed` and `received` share
/// nothing; `claimed` is a subset of `owed`.
#[derive(Debug, Default)]
struct Known {
    received: PageSet,
    data: PageSet,
    owed: PageSet,
    /// Owed pages whose first copy is being placed.
    claimed: PageSet,
    /// Where arrivals of owed pages are put on record, once they are.
    arrivals: Option<Arc<Arrivals>>,
}

impl PageStore {
    /// An empty store.
    pub fn new(limits: PageStoreLimits) -> Self {
        PageStore {
            limits,
            spaces: RwLock::default(),
            data_pages: AtomicU64::new(0),
        }
    }

    /// Places `runs` of `space`, whose data are in `payload` one after another, over what was there.
    ///
    /// Copies of one page must be placed one after another; different pages may be placed at the same time. After an
    /// error some of the runs may have been placed; those are counted as received, the failed one is not.
    ///
    /// In a space with a record of arrivals only owed pages are taken, in any order and from any thread, and of each the
    /// first copy. Returns those that arrived thereby; elsewhere nothing.
    pub fn place(
        &self,
        space: SpaceId,
        runs: &[PageRun],
        payload: &[u8],
    ) -> Result<Vec<PageRange>, PageStoreError> {
        let announced: u64 = runs
            .iter()
            .filter(|run| run.content == RunContent::Data)
            .map(|run| run.pages.bytes())
            .sum();
        if announced != payload.len() as u64 {
            return Err(PageStoreError::PayloadLength {
                space,
                announced,
                actual: payload.len() as u64,
            });
        }
        let space = self.space_or_new(space)?;
        let arrivals = space.known().arrivals.clone();
        if let Some(arrivals) = arrivals {
            return self.place_owed(&space, &arrivals, runs, payload);
        }
        let mut payload = payload;
        for run in runs {
            match run.content {
                RunContent::Data => {
                    // The lengths were compared above, so the payload has every run's bytes.
                    let (data, rest) = payload.split_at(run.pages.bytes() as usize);
                    payload = rest;
                    self.place_data(&space, run.pages, data)?;
                }
                RunContent::Zero => {
                    self.forget_data(&space, run.pages)?;
                    let mut known = space.known();
                    known.owed.remove(run.pages);
                    known.received.insert(run.pages);
                }
                RunContent::Same(origin) => self.place_same(&space, origin, run.pages)?,
                RunContent::Owed => {
                    self.forget_data(&space, run.pages)?;
                    let mut known = space.known();
                    known.received.remove(run.pages);
                    known.owed.insert(run.pages);
                }
            }
        }
        Ok(Vec::new())
    }

    /// From now on takes only owed pages of `space`, and puts on record those that arrive.
    ///
    /// What `arrivals` has on record already is no longer owed. Nothing may be placing pages in the space.
    pub fn track(&self, space: SpaceId, arrivals: Arrivals) -> Result<(), PageStoreError> {
        let space = self.space_or_new(space)?;
        let mut known = space.known();
        let owed: Vec<PageRange> = known.owed.iter().collect();
        for range in owed {
            for arrived in space.on_record(&arrivals, range)? {
                known.owed.remove(arrived);
                known.received.insert(arrived);
            }
        }
        known.arrivals = Some(Arc::new(arrivals));
        Ok(())
    }

    /// The pages of `space` that are owed and have not arrived.
    pub fn owed(&self, space: SpaceId) -> PageSet {
        self.space(space)
            .map(|space| space.known().owed.clone())
            .unwrap_or_default()
    }

    /// The pages of `space` received so far, as data or as zeros; empty if the space is unknown.
    pub fn received(&self, space: SpaceId) -> PageSet {
        self.space(space)
            .map(|space| space.known().received.clone())
            .unwrap_or_default()
    }

    /// The pages of `wanted` that were never received for `space` and are not owed either.
    pub fn missing(&self, space: SpaceId, wanted: &PageSet) -> PageSet {
        let mut missing = wanted.clone();
        if let Ok(space) = self.space(space) {
            let known = space.known();
            for range in wanted.iter() {
                for there in [&known.received, &known.owed] {
                    for there in there.intersecting(range) {
                        missing.remove(there);
                    }
                }
            }
        }
        missing
    }

    /// Reads `range` of `space`; what was not received reads as zeros. `into` has exactly the range's bytes.
    pub fn read(
        &self,
        space: SpaceId,
        range: PageRange,
        into: &mut [u8],
    ) -> Result<(), PageStoreError> {
        if into.len() as u64 != range.bytes() {
            return Err(PageStoreError::BufferLength {
                range,
                actual: into.len(),
            });
        }
        let space = self.space(space)?;
        space
            .memfd
            .read_exact_at(into, range.start().addr().0)
            .map_err(|source| space.failed("reading pages", source))
    }

    /// Forgets every page of `space` that is not in `keep`. A space that nothing was placed in holds nothing to forget.
    pub fn retain(&self, space: SpaceId, keep: &PageSet) -> Result<(), PageStoreError> {
        let Ok(space) = self.space(space) else {
            return Ok(());
        };
        let mut known = space.known();
        let mut stale = known.received.clone();
        stale.subtract(keep);
        for range in stale.iter() {
            for run in known.data.intersecting(range) {
                punch(&space.memfd, run)
                    .map_err(|errno| space.failed("freeing stale pages", errno.into()))?;
                known.data.remove(run);
                self.data_pages.fetch_sub(run.pages(), Ordering::Relaxed);
            }
            known.received.remove(range);
        }
        let mut stale = known.owed.clone();
        stale.subtract(keep);
        known.owed.subtract(&stale);
        Ok(())
    }

    /// The spaces in the store, in order.
    pub fn spaces(&self) -> Vec<SpaceId> {
        let mut ids: Vec<SpaceId> = self.table().keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// [`PageStore::memfd`] of a space in which possibly nothing was placed.
    pub fn memfd_or_new(&self, space: SpaceId) -> Result<OwnedFd, PageStoreError> {
        self.space_or_new(space)?;
        self.memfd(space)
    }

    /// A second descriptor of the memfd of `space`, for the pager.
    pub fn memfd(&self, space: SpaceId) -> Result<OwnedFd, PageStoreError> {
        let space = self.space(space)?;
        space
            .memfd
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| space.failed("duplicating the memfd", source))
    }

    /// Bytes of memory the files occupy now, as the kernel counts them (it sees holes that others punch, too).
    pub fn memory_in_use(&self) -> Result<u64, PageStoreError> {
        let spaces: Vec<Arc<Space>> = self.table().values().cloned().collect();
        spaces.iter().try_fold(0, |sum, space| {
            let stat = fstat(&space.memfd)
                .map_err(|errno| space.failed("measuring the memfd", errno.into()))?;
            Ok(sum + u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
        })
    }

    /// Forgets `space` and its pages (its process ended or called exec). Its memory is freed when nobody else
    /// holds its memfd. Nothing may be placing pages in it.
    pub fn drop_space(&self, space: SpaceId) {
        let dropped = self
            .spaces
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&space);
        if let Some(space) = dropped {
            // Taken out, so that a frame that is still being placed counts them no second time.
            let data = std::mem::take(&mut space.known().data);
            self.data_pages.fetch_sub(data.pages(), Ordering::Relaxed);
        }
    }

    /// [`PageStore::place`] where the first copy of an owed page wins.
    fn place_owed(
        &self,
        space: &Space,
        arrivals: &Arrivals,
        runs: &[PageRun],
        payload: &[u8],
    ) -> Result<Vec<PageRange>, PageStoreError> {
        let mut arrived = PageSet::new();
        let mut payload = payload;
        for run in runs {
            let is_data = match run.content {
                RunContent::Data => true,
                RunContent::Zero => false,
                RunContent::Owed | RunContent::Same(_) => {
                    return Err(PageStoreError::NotOwed {
                        space: space.id,
                        range: run.pages,
                    });
                }
            };
            let data;
            (data, payload) = payload.split_at(if is_data {
                run.pages.bytes() as usize
            } else {
                0
            });
            let claims = space.claim(arrivals, run.pages)?;
            for (index, &claim) in claims.iter().enumerate() {
                let placed = if is_data {
                    let from = (claim.start().0 - run.pages.start().0) * PAGE_SIZE;
                    let data = &data[from as usize..][..claim.bytes() as usize];
                    self.place_data(space, claim, data)
                } else {
                    // An owed page has no data in the file: it is a hole as it is.
                    space.known().received.insert(claim);
                    Ok(())
                };
                let recorded = placed.and_then(|()| {
                    arrivals
                        .mark(claim)
                        .map_err(|source| space.failed("recording arrivals", source))
                });
                if let Err(error) = recorded {
                    // Still owed, and free for another copy.
                    for &unused in &claims[index..] {
                        self.forget_data(space, unused)?;
                        let mut known = space.known();
                        known.received.remove(unused);
                        known.claimed.remove(unused);
                    }
                    return Err(error);
                }
                let mut known = space.known();
                known.claimed.remove(claim);
                known.owed.remove(claim);
            }
            for claim in claims {
                arrived.insert(claim);
            }
        }
        Ok(arrived.iter().collect())
    }

    fn place_data(
        &self,
        space: &Space,
        range: PageRange,
        data: &[u8],
    ) -> Result<(), PageStoreError> {
        let there: u64 = space
            .known()
            .data
            .intersecting(range)
            .iter()
            .map(|run| run.pages())
            .sum();
        let growth = range.pages() - there;
        self.reserve(space.id, growth)?;
        if let Err(source) = space.memfd.write_all_at(data, range.start().addr().0) {
            // Some pages may have been written; they are not in `data`, so a later copy reserves them again.
            self.data_pages.fetch_sub(growth, Ordering::Relaxed);
            return Err(match source.raw_os_error().map(Errno::from_raw) {
                Some(errno @ (Errno::ENOSPC | Errno::ENOMEM)) => PageStoreError::OutOfMemory {
                    space: space.id,
                    range,
                    errno,
                },
                _ => space.failed("placing pages", source),
            });
        }
        let mut known = space.known();
        known.received.insert(range);
        known.data.insert(range);
        if known.arrivals.is_none() {
            known.owed.remove(range);
        }
        Ok(())
    }

    /// Places what `origin` has of `range`. Both spaces' copies of a page come from one stream, so it is what the source
    /// means: the caller places the frames of a stream one after another.
    fn place_same(
        &self,
        space: &Space,
        origin: SpaceId,
        range: PageRange,
    ) -> Result<(), PageStoreError> {
        let there = self.space(origin).ok().filter(|there| {
            let known = there.known();
            let data = known.data.intersecting(range);
            data.iter().map(|run| run.pages()).sum::<u64>() == range.pages()
        });
        let Some(there) = there else {
            return Err(PageStoreError::NoOrigin {
                space: space.id,
                origin,
                range,
            });
        };
        // At most a frame's pages: this much could have come as data.
        let mut bytes = vec![0; range.bytes() as usize];
        there
            .memfd
            .read_exact_at(&mut bytes, range.start().addr().0)
            .map_err(|source| there.failed("reading pages for another space", source))?;
        self.place_data(space, range, &bytes)
    }

    /// Makes `range` a hole.
    fn forget_data(&self, space: &Space, range: PageRange) -> Result<(), PageStoreError> {
        let had_data = space.known().data.intersecting(range);
        for &run in &had_data {
            punch(&space.memfd, run)
                .map_err(|errno| space.failed("freeing pages without data", errno.into()))?;
        }
        let mut known = space.known();
        for run in had_data {
            known.data.remove(run);
            self.data_pages.fetch_sub(run.pages(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn reserve(&self, space: SpaceId, pages: u64) -> Result<(), PageStoreError> {
        let limit = self.limits.bytes / PAGE_SIZE;
        self.data_pages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(pages).filter(|&used| used <= limit)
            })
            .map(|_| ())
            .map_err(|_| PageStoreError::Full {
                space,
                pages,
                limit: self.limits.bytes,
            })
    }

    fn space(&self, id: SpaceId) -> Result<Arc<Space>, PageStoreError> {
        self.table()
            .get(&id)
            .cloned()
            .ok_or(PageStoreError::UnknownSpace(id))
    }

    /// Takes a space over from a store whose process died: its memfd, and the pages that were owed to it.
    pub fn adopt(&self, id: SpaceId, memfd: OwnedFd, owed: PageSet) -> Result<(), PageStoreError> {
        let mut spaces = self.spaces.write().unwrap_or_else(PoisonError::into_inner);
        if spaces.len() >= self.limits.spaces {
            return Err(PageStoreError::TooManySpaces {
                space: id,
                limit: self.limits.spaces,
            });
        }
        let known = Known {
            owed,
            ..Known::default()
        };
        let space = Space {
            id,
            memfd: memfd.into(),
            known: Mutex::new(known),
        };
        spaces.insert(id, Arc::new(space));
        Ok(())
    }

    fn space_or_new(&self, id: SpaceId) -> Result<Arc<Space>, PageStoreError> {
        if let Ok(space) = self.space(id) {
            return Ok(space);
        }
        let mut spaces = self.spaces.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(space) = spaces.get(&id) {
            return Ok(space.clone());
        }
        if spaces.len() >= self.limits.spaces {
            return Err(PageStoreError::TooManySpaces {
                space: id,
                limit: self.limits.spaces,
            });
        }
        let space = Arc::new(Space::new(id)?);
        spaces.insert(id, space.clone());
        Ok(space)
    }

    fn table(&self) -> std::sync::RwLockReadGuard<'_, HashMap<SpaceId, Arc<Space>>> {
        // A panic while the lock was held leaves the table whole: it is changed by single inserts and removes.
        self.spaces.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Space {
    fn new(id: SpaceId) -> Result<Self, PageStoreError> {
        let failed = |source: io::Error| PageStoreError::Memfd {
            action: "making the memfd",
            space: id,
            source,
        };
        let name = format!("migrate-space-{}", id.0);
        let memfd = memfd_create(name.as_str(), MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| failed(errno.into()))?;
        let memfd = File::from(memfd);
        // As long as any user address, so that reading a page that was never placed is reading a hole.
        memfd
            .set_len(crate::memory::PageNumber::LIMIT.addr().0)
            .map_err(failed)?;
        Ok(Space {
            id,
            memfd,
            known: Mutex::default(),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parts of `range` that the caller may place: owed, and nobody else is at them. The rest has arrived or is just
    /// arriving; if it was never owed, all is refused.
    fn claim(
        &self,
        arrivals: &Arrivals,
        range: PageRange,
    ) -> Result<Vec<PageRange>, PageStoreError> {
        let mut known = self.known();
        let mut others = PageSet::from_iter([range]);
        let mut free = PageSet::new();
        for owed in known.owed.intersecting(range) {
            others.remove(owed);
            free.insert(owed);
        }
        for claimed in known.claimed.intersecting(range) {
            free.remove(claimed);
        }
        for other in others.iter() {
            if self.on_record(arrivals, other)? != [other] {
                return Err(PageStoreError::NotOwed {
                    space: self.id,
                    range,
                });
            }
        }
        known.claimed.extend(&free);
        Ok(free.iter().collect())
    }

    fn on_record(
        &self,
        arrivals: &Arrivals,
        range: PageRange,
    ) -> Result<Vec<PageRange>, PageStoreError> {
        arrivals
            .among(range)
            .map_err(|source| self.failed("reading what has arrived", source))
    }

    fn failed(&self, action: &'static str, source: io::Error) -> PageStoreError {
        PageStoreError::Memfd {
            action,
            space: self.id,
            source,
        }
    }
}

/// Frees the memory of `range` in a file laid out by address; it reads as zeros afterwards.
pub(super) fn punch(file: impl AsFd, range: PageRange) -> Result<(), Errno> {
    let offset = i64::try_from(range.start().addr().0).map_err(|_| Errno::EFBIG)?;
    let length = i64::try_from(range.bytes()).map_err(|_| Errno::EFBIG)?;
    fallocate(
        file,
        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        offset,
        length,
    )
}

#[cfg(test)]
mod tests;
