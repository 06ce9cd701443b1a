//! Tracking with the soft-dirty bit (`CONFIG_MEM_SOFT_DIRTY`).
//!
//! `clear_refs` clears the bits of a whole process at once. A page written between reading its bit and the clearing would
//! lose the bit and never be sent, so both happen while every thread of every process of the space is stopped, as in CRIU's
//! pre-dump; what cannot be stopped is read and not cleared, which only makes the next answer larger. A space seen for
//! the first time needs no stop: it is cleared first and then taken whole.
//!
//! The bit does not show a page that was dropped (`MADV_DONTNEED`) and then only read: the kernel maps the page of zeros
//! there, clean. Such pages are told by their frame, and are dirty when they were not zeros at the last scan. Nor does it show
//! pages that `mremap` has moved together with their page table: those are told by their frames too
//! ([`PageTables`]), and any page that was not there at the last scan is dirty whatever its bit says.
//!
//! KSM takes the bit from a page that it merges, and may be switched on while a migration runs. So KSM is asked before the
//! bits of a space are cleared and after they have been read the next time: if it may have merged anything in between, the
//! whole space is dirty.

use super::sharing::{Sharing, group};
use super::{
    Motion, Numbers, PATIENCE, POPULATED, ProcessKey, SpaceScan, TrackError, Tracker, TrackerKind,
    Untracked, is_tracked, key,
};
use crate::kernel::ksm::{Ksm, KsmState};
use crate::kernel::maps::{self, FileKinds, Image, MapsError, Vma};
use crate::kernel::page_tables::PageTables;
use crate::kernel::pagemap::{Entry, PageIs, Pagemap, Query, ScanError, clear_soft_dirty};
use crate::kernel::ptrace::{living_thread, trace};
use crate::kernel::zero_frames::ZeroFrames;
use crate::memory::{PageRange, PageSet, SpaceId};
use crate::runtime::Task;
use std::collections::HashMap;

pub(super) struct SoftDirty {
    reader: Reader,
    /// `mremap` may move page tables without setting the bit.
    tables_move: bool,
    ksm: Ksm,
    spaces: HashMap<ProcessKey, Space>,
    numbers: Numbers,
}

/// How the bits are read on this kernel.
enum Reader {
    /// `PAGEMAP_SCAN`, kernel ≥ 6.7.
    Scan,
    /// The classic pagemap; it does not flag zeros, so their frames are known beforehand.
    Classic(ZeroFrames),
}

/// An address space seen before.
struct Space {
    id: SpaceId,
    image: Image,
    /// Pages that existed at the last scan.
    populated: PageSet,
    /// Those of them that were the page of zeros.
    zeros: PageSet,
    tables: PageTables,
    /// What KSM said before the bits were last cleared.
    ksm: KsmState,
}

/// What the page tables say.
#[derive(Default)]
struct Bits {
    populated: PageSet,
    soft_dirty: PageSet,
    zeros: PageSet,
}

impl SoftDirty {
    /// `scan`: the kernel has a `PAGEMAP_SCAN` that tells all that is asked here. `tables_move`: `mremap` may move whole page
    /// tables without setting the bit.
    pub(super) fn new(scan: bool, tables_move: bool) -> Result<SoftDirty, ScanError> {
        let reader = if scan {
            Reader::Scan
        } else {
            Reader::Classic(ZeroFrames::find()?)
        };
        Ok(SoftDirty {
            reader,
            tables_move,
            ksm: Ksm::here(),
            spaces: HashMap::new(),
            numbers: Numbers::default(),
        })
    }
}

impl Tracker for SoftDirty {
    fn kind(&self) -> TrackerKind {
        TrackerKind::SoftDirty
    }

    fn scan(&mut self, tasks: &[Task], motion: Motion) -> Result<Vec<SpaceScan>, TrackError> {
        let mut known = std::mem::take(&mut self.spaces);
        let mut kinds = FileKinds::default();
        let mut scans = Vec::new();
        for group in group(tasks)? {
            let space = known
                .remove(&key(&group.owner))
                .filter(|space| space.image.in_use());
            match self.look(&group, space, motion, &mut kinds) {
                Ok((space, scan)) => {
                    self.spaces.insert(key(&group.owner), space);
                    scans.push(scan);
                }
                Err(error) if error.exited() => {}
                Err(error) => return Err(error),
            }
        }
        scans.sort_by_key(|scan| scan.space);
        Ok(scans)
    }
}

impl SoftDirty {
    fn look(
        &mut self,
        group: &Sharing,
        space: Option<Space>,
        motion: Motion,
        kinds: &mut FileKinds,
    ) -> Result<(Space, SpaceScan), TrackError> {
        let gone = |_| MapsError::Exited {
            pid: group.owner.pid,
        };
        let pid = living_thread(group.owner.pid).map_err(gone)?;
        let image = Image::of(pid)?;
        let ksm = self.ksm.state();
        let mut untracked = None;
        let (id, vmas, bits, mut dirty, mut tables) = match space {
            Some(space) => {
                let (vmas, bits, cleared) = match motion {
                    Motion::Running => self.read_and_clear(group, pid, kinds)?,
                    Motion::Frozen => {
                        let (vmas, bits) = self.read(pid, kinds)?;
                        (vmas, bits, true)
                    }
                };
                if !cleared {
                    untracked = Some(Untracked::Restless);
                }
                let dirty = if self.ksm.state().may_have_merged_since(&space.ksm) {
                    untracked = Some(Untracked::Merged);
                    bits.populated.clone()
                } else {
                    changed(&bits, &space)
                };
                (space.id, vmas, bits, dirty, space.tables)
            }
            None => {
                match motion {
                    Motion::Running => clear_soft_dirty(pid)?,
                    Motion::Frozen => untracked = Some(Untracked::Frozen),
                }
                let (vmas, bits) = self.read(pid, kinds)?;
                let dirty = bits.populated.clone();
                (self.numbers.take(), vmas, bits, dirty, PageTables::new())
            }
        };
        if self.tables_move {
            // The process may run again: a table that is moved during this look is told by this one or by the next.
            let mut own = bits.populated.clone();
            own.subtract(&bits.zeros);
            for range in tables.replaced(&Pagemap::open(pid)?, &own)?.iter() {
                dirty.extend(&bits.populated.intersecting(range).into_iter().collect());
            }
        }
        let mut stale = PageSet::new();
        if motion == Motion::Frozen {
            stale.extend(&vmas.iter().map(|vma| vma.range).collect());
            stale.subtract(&bits.populated);
        }
        let space = Space {
            id,
            image,
            populated: bits.populated,
            zeros: bits.zeros,
            tables,
            ksm,
        };
        let scan = SpaceScan {
            space: id,
            pid,
            vpid: group.owner.vpid,
            sharers: group.sharers(),
            vmas,
            dirty,
            stale,
            unwatched: PageSet::new(),
            untracked,
        };
        Ok((space, scan))
    }

    /// Reads the bits and clears them with every process of the group stopped. `false` if one could not be stopped: then
    /// nothing was cleared.
    fn read_and_clear(
        &self,
        group: &Sharing,
        pid: i32,
        kinds: &mut FileKinds,
    ) -> Result<(Vec<Vma>, Bits, bool), TrackError> {
        trace(|tracer| {
            let stopped: Result<Vec<_>, _> = group
                .tasks()
                .map(|task| tracer.stop_process(task.pid, PATIENCE))
                .collect();
            let (vmas, bits) = self.read(pid, kinds)?;
            match stopped {
                Ok(_still_stopped) => {
                    clear_soft_dirty(pid)?;
                    Ok((vmas, bits, true))
                }
                Err(_) => Ok((vmas, bits, false)),
            }
        })
    }

    fn read(&self, pid: i32, kinds: &mut FileKinds) -> Result<(Vec<Vma>, Bits), TrackError> {
        let vmas = maps::read(pid, kinds)?;
        let mut pagemap = Pagemap::open(pid)?;
        let mut bits = Bits::default();
        for vma in vmas.iter().filter(|vma| is_tracked(vma)) {
            match &self.reader {
                Reader::Scan => bits.scan(&mut pagemap, vma.range)?,
                Reader::Classic(zeros) => bits.read(&pagemap, vma.range, zeros)?,
            }
        }
        Ok((vmas, bits))
    }
}

impl Bits {
    fn scan(&mut self, pagemap: &mut Pagemap, range: PageRange) -> Result<(), ScanError> {
        let query = Query {
            report: PageIs::SOFT_DIRTY.or(PageIs::ZERO),
            ..POPULATED
        };
        pagemap.scan(range, query, |run, flags| {
            self.add(run, flags.has(PageIs::SOFT_DIRTY), flags.has(PageIs::ZERO));
        })
    }

    fn read(
        &mut self,
        pagemap: &Pagemap,
        range: PageRange,
        zeros: &ZeroFrames,
    ) -> Result<(), ScanError> {
        // Entries come page by page; runs of equal pages are added at once.
        let mut run: Option<(PageRange, (bool, bool))> = None;
        pagemap.read(range, |page, entry| {
            let Some(page) = PageRange::from_start_len(page, 1) else {
                return;
            };
            let state = own_page(entry, zeros);
            match (&mut run, state) {
                (Some((pages, of)), Some(state)) if *of == state && pages.end() == page.start() => {
                    *pages = PageRange::new(pages.start(), page.end()).unwrap_or(*pages);
                }
                (_, state) => {
                    let next = state.map(|state| (page, state));
                    if let Some((pages, (soft_dirty, zero))) = std::mem::replace(&mut run, next) {
                        self.add(pages, soft_dirty, zero);
                    }
                }
            }
        })?;
        if let Some((pages, (soft_dirty, zero))) = run {
            self.add(pages, soft_dirty, zero);
        }
        Ok(())
    }

    fn add(&mut self, run: PageRange, soft_dirty: bool, zero: bool) {
        self.populated.insert(run);
        if soft_dirty {
            self.soft_dirty.insert(run);
        }
        if zero {
            self.zeros.insert(run);
        }
    }
}

/// Whether a page exists and is the process's own, and if so whether it is soft-dirty and whether it is the zeros.
fn own_page(entry: Entry, zeros: &ZeroFrames) -> Option<(bool, bool)> {
    let own = (entry.present() || entry.swapped()) && !entry.file();
    own.then(|| {
        let zero = entry.frame().is_some_and(|frame| zeros.contains(frame));
        (entry.soft_dirty(), zero)
    })
}

/// What differs from the last scan: written pages, pages that were not there, and pages that have become zeros.
fn changed(bits: &Bits, before: &Space) -> PageSet {
    let mut dirty = bits.zeros.clone();
    dirty.subtract(&before.zeros);
    let mut new = bits.populated.clone();
    new.subtract(&before.populated);
    dirty.extend(&new);
    dirty.extend(&bits.soft_dirty);
    dirty
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::probe;
    use crate::kernel::scratch::{HUGE_PAGES, Scratch};

    /// No bit says so: with the bit the kernel forgets it, and without the bit (as here, where there is none) nothing could.
    #[test]
    fn a_page_table_moved_over_another_is_sent_and_one_that_stays_is_not() {
        let filled = || {
            let scratch = Scratch::aligned(HUGE_PAGES).unwrap();
            (0..HUGE_PAGES).for_each(|page| scratch.write(page));
            scratch
        };
        let (first, second, stays) = (filled(), filled(), filled());
        let own = Task::read(std::process::id() as i32).unwrap().unwrap();
        let mut tracker = SoftDirty::new(probe::pagemap_scan().is_ok(), true).unwrap();
        let mut scan = |motion| {
            let mut scans = tracker.scan(std::slice::from_ref(&own), motion).unwrap();
            scans.pop().unwrap().dirty
        };
        scan(Motion::Running);
        let moved = second.moved_over(first).unwrap();
        // This process cannot be stopped by itself, so it is said to stand still.
        let dirty = scan(Motion::Frozen);
        assert_eq!(dirty.intersecting(moved.range), [moved.range]);
        assert_eq!(dirty.intersecting(stays.range), []);
        assert_eq!(scan(Motion::Frozen).intersecting(stays.range), []);
    }

    #[test]
    fn a_space_is_sent_whole_while_ksm_merges_and_once_after() {
        let ksm = tempfile::tempdir().unwrap();
        let switch = |run| std::fs::write(ksm.path().join("run"), run).unwrap();
        let scratch = Scratch::aligned(HUGE_PAGES).unwrap();
        (0..HUGE_PAGES).for_each(|page| scratch.write(page));
        let own = Task::read(std::process::id() as i32).unwrap().unwrap();
        let mut tracker = SoftDirty::new(probe::pagemap_scan().is_ok(), false).unwrap();
        tracker.ksm = Ksm::at(ksm.path());
        // This process cannot be stopped by itself, so it is said to stand still.
        let mut scan = |motion| {
            let mut scans = tracker.scan(std::slice::from_ref(&own), motion).unwrap();
            let scan = scans.pop().unwrap();
            let whole = scan.dirty.intersecting(scratch.range) == [scratch.range];
            (whole, matches!(scan.untracked, Some(Untracked::Merged)))
        };
        switch("0\n");
        assert_eq!(scan(Motion::Running), (true, false), "at first sight");
        assert_eq!(scan(Motion::Frozen), (false, false));
        switch("1\n");
        assert_eq!(scan(Motion::Frozen), (true, true));
        assert_eq!(scan(Motion::Frozen), (true, true));
        switch("2\n");
        assert_eq!(scan(Motion::Frozen), (true, true), "since the last scan");
        assert_eq!(scan(Motion::Frozen), (false, false));
    }
}
