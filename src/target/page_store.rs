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
//! A peer could send pages without end. The number of spaces and the bytes of data have limits, and what passes
//! them is refused before it is written.

use crate::memory::{PAGE_SIZE, PageRange, PageSet, SpaceId};
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
}

/// Consecutive pages with contents of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Which pages.
    pub pages: PageRange,
    /// What they contain.
    pub content: RunContent,
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

/// What a space holds. `data` is a subset of `received`; the rest of `received` is zero.
#[derive(Debug, Default)]
struct Known {
    received: PageSet,
    data: PageSet,
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
    pub fn place(
        &self,
        space: SpaceId,
        runs: &[PageRun],
        payload: &[u8],
    ) -> Result<(), PageStoreError> {
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
        let mut payload = payload;
        for run in runs {
            match run.content {
                RunContent::Data => {
                    // The lengths were compared above, so the payload has every run's bytes.
                    let (data, rest) = payload.split_at(run.pages.bytes() as usize);
                    payload = rest;
                    self.place_data(&space, run.pages, data)?;
                }
                RunContent::Zero => self.place_zeros(&space, run.pages)?,
            }
        }
        Ok(())
    }

    /// The pages of `space` received so far, as data or as zeros; empty if the space is unknown.
    pub fn received(&self, space: SpaceId) -> PageSet {
        self.space(space)
            .map(|space| space.known().received.clone())
            .unwrap_or_default()
    }

    /// The pages of `wanted` that were never received for `space`.
    pub fn missing(&self, space: SpaceId, wanted: &PageSet) -> PageSet {
        let mut missing = wanted.clone();
        if let Ok(space) = self.space(space) {
            let known = space.known();
            for range in wanted.iter() {
                for there in known.received.intersecting(range) {
                    missing.remove(there);
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
            self.data_pages
                .fetch_sub(space.known().data.pages(), Ordering::Relaxed);
        }
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
        Ok(())
    }

    fn place_zeros(&self, space: &Space, range: PageRange) -> Result<(), PageStoreError> {
        let had_data = space.known().data.intersecting(range);
        for &run in &had_data {
            punch(&space.memfd, run)
                .map_err(|errno| space.failed("freeing pages that became zero", errno.into()))?;
        }
        let mut known = space.known();
        known.received.insert(range);
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
mod tests {
    use super::*;
    use crate::memory::PageNumber;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const SPACE: SpaceId = SpaceId(3);

    fn store() -> PageStore {
        PageStore::new(PageStoreLimits {
            spaces: 2,
            bytes: 64 * PAGE_SIZE,
        })
    }

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(start), pages).expect("a test range is valid")
    }

    fn data(start: u64, pages: u64) -> PageRun {
        PageRun {
            pages: range(start, pages),
            content: RunContent::Data,
        }
    }

    fn zero(start: u64, pages: u64) -> PageRun {
        PageRun {
            pages: range(start, pages),
            content: RunContent::Zero,
        }
    }

    fn filled(byte: u8, pages: u64) -> Vec<u8> {
        vec![byte; (pages * PAGE_SIZE) as usize]
    }

    fn first_byte(store: &PageStore, page: u64) -> u8 {
        let mut buffer = filled(0xee, 1);
        store
            .read(SPACE, range(page, 1), &mut buffer)
            .expect("a page is read");
        assert!(buffer.iter().all(|&byte| byte == buffer[0]));
        buffer[0]
    }

    #[test]
    fn a_page_that_became_zero_gives_its_memory_back_and_stays_received() {
        let store = store();
        store
            .place(SPACE, &[data(10, 8)], &filled(7, 8))
            .expect("placed");
        assert_eq!(store.memory_in_use().expect("measured"), 8 * PAGE_SIZE);
        store
            .place(SPACE, &[zero(8, 6)], &[])
            .expect("zeros placed");
        assert_eq!(store.memory_in_use().expect("measured"), 4 * PAGE_SIZE);
        assert_eq!(first_byte(&store, 13), 0);
        assert_eq!(first_byte(&store, 14), 7);
        assert_eq!(store.received(SPACE), PageSet::from_iter([range(8, 10)]));
    }

    #[test]
    fn pages_that_were_never_received_are_told_from_zero_pages() {
        let store = store();
        store
            .place(SPACE, &[data(1, 2), zero(4, 2)], &filled(1, 2))
            .expect("placed");
        let wanted = PageSet::from_iter([range(0, 6)]);
        assert_eq!(
            store.missing(SPACE, &wanted),
            PageSet::from_iter([range(0, 1), range(3, 1)])
        );
        assert_eq!(store.missing(SpaceId(77), &wanted), wanted);
    }

    #[test]
    fn the_byte_limit_counts_data_once_and_refuses_before_writing() {
        let store = store();
        store
            .place(SPACE, &[data(0, 60)], &filled(1, 60))
            .expect("below the limit");
        store
            .place(SPACE, &[data(0, 60)], &filled(2, 60))
            .expect("newer copies take no more memory");
        let refused = store.place(SPACE, &[data(100, 5)], &filled(3, 5));
        assert!(
            matches!(refused, Err(PageStoreError::Full { pages: 5, .. })),
            "{refused:?}"
        );
        assert_eq!(store.memory_in_use().expect("measured"), 60 * PAGE_SIZE);
        assert!(!store.received(SPACE).contains(PageNumber(100)));
        store
            .place(SPACE, &[zero(0, 10)], &[])
            .expect("zeros are free");
        store
            .place(SPACE, &[data(100, 5)], &filled(3, 5))
            .expect("there is room again");
        store.drop_space(SPACE);
        assert_eq!(store.memory_in_use().expect("measured"), 0);
        store
            .place(SPACE, &[data(0, 64)], &filled(1, 64))
            .expect("all of it is free again");
    }

    #[test]
    fn the_number_of_spaces_is_limited() {
        let store = store();
        for id in [0, 1] {
            store
                .place(SpaceId(id), &[zero(0, 1)], &[])
                .expect("within the limit");
        }
        assert!(matches!(
            store.place(SpaceId(2), &[zero(0, 1)], &[]),
            Err(PageStoreError::TooManySpaces { limit: 2, .. })
        ));
        assert_eq!(store.spaces(), [SpaceId(0), SpaceId(1)]);
    }

    #[test]
    fn a_payload_of_the_wrong_length_is_refused() {
        let store = store();
        for length in [0, 4095, 4097, 8192] {
            let refused = store.place(SPACE, &[data(0, 1), zero(1, 1)], &vec![1; length]);
            assert!(
                matches!(refused, Err(PageStoreError::PayloadLength { .. })),
                "{length}"
            );
        }
        assert!(store.spaces().is_empty());
    }

    #[test]
    fn the_last_page_a_user_can_have_is_placed_like_any_other() {
        let store = store();
        let last = PageNumber::LIMIT.0 - 1;
        store
            .place(SPACE, &[data(last, 1)], &filled(9, 1))
            .expect("placed");
        assert_eq!(first_byte(&store, last), 9);
    }

    #[test]
    fn frames_of_one_space_are_placed_from_several_threads() {
        let store = PageStore::new(PageStoreLimits {
            spaces: 1,
            bytes: 4096 * PAGE_SIZE,
        });
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let store = &store;
                scope.spawn(move || {
                    for round in 0..8u8 {
                        for page in 0..64 {
                            store
                                .place(
                                    SPACE,
                                    &[data(page * 4 + thread, 1)],
                                    &filled(round * 4 + thread as u8, 1),
                                )
                                .expect("placed");
                        }
                    }
                });
            }
        });
        for page in 0..256 {
            assert_eq!(first_byte(&store, page), 28 + (page % 4) as u8);
        }
        assert_eq!(store.received(SPACE).pages(), 256);
    }

    proptest! {
        #[test]
        fn the_newest_copy_of_every_page_is_kept(
            frames in prop::collection::vec((any::<bool>(), 0u64..24, 1u64..8, 1u8..255), 0..40)
        ) {
            let store = store();
            let mut model = BTreeMap::new();
            for (is_data, start, pages, byte) in frames {
                if is_data {
                    store.place(SPACE, &[data(start, pages)], &filled(byte, pages)).expect("placed");
                } else {
                    store.place(SPACE, &[zero(start, pages)], &[]).expect("placed");
                }
                model.extend((start..start + pages).map(|page| (page, if is_data { byte } else { 0 })));
            }
            let pages: Vec<u64> = store.received(SPACE).iter().flat_map(|r| r.start().0..r.end().0).collect();
            prop_assert_eq!(pages, model.keys().copied().collect::<Vec<_>>());
            for (&page, &byte) in &model {
                prop_assert_eq!(first_byte(&store, page), byte);
            }
            let with_data = model.values().filter(|&&byte| byte != 0).count() as u64;
            prop_assert_eq!(store.memory_in_use().expect("measured"), with_data * PAGE_SIZE);
        }
    }
}
