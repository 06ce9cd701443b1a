//! Tracking with a userfaultfd in each address space (`WP_ASYNC`) and `PAGEMAP_SCAN`.
//!
//! A new space is attached to (see [`crate::kernel::inject`]), its mappings registered and armed. Later scans ask each
//! mapping what was written and arm it again in the same step. Whatever is not registered (mapped, moved or grown since)
//! is registered now and taken whole. Registration dies with the memory, so an image without one registered mapping is
//! not the image we knew: the process has called exec.
//!
//! What the process can notice: a mapping made beside or inside a registered one does not merge with it until the next
//! scan, so an `mremap` across both fails (`EFAULT`), as it does across any two mappings before Linux 6.17.

use super::sharing::{Sharing, group};
use super::{
    Motion, Numbers, PATIENCE, POPULATED, ProcessKey, SpaceScan, TrackError, Tracker, TrackerKind,
    Untracked, is_tracked, key,
};
use crate::kernel::inject;
use crate::kernel::maps::{self, FileKinds, Vma, VmaKind};
use crate::kernel::pagemap::{PageIs, Pagemap, Query, ScanError};
use crate::kernel::probe::WriteTracking;
use crate::kernel::ptrace::living_thread;
use crate::kernel::userfaultfd::{self, WriteTracker};
use crate::memory::{PageRange, PageSet, SpaceId};
use crate::runtime::Task;
use std::collections::HashMap;
use std::fs::File;

pub(super) struct UffdWp {
    device: File,
    behaviour: WriteTracking,
    /// Arming holes of hugetlb may hang ([`Bug::HugetlbHoleHangs`](crate::kernel::bugs::Bug::HugetlbHoleHangs)).
    hugetlb_hangs: bool,
    spaces: HashMap<ProcessKey, Space>,
    numbers: Numbers,
}

/// An address space seen before.
struct Space {
    id: SpaceId,
    /// `None` until attaching succeeds.
    tracker: Option<WriteTracker>,
}

/// What a look at a process gave.
enum Look {
    /// Its scan.
    Seen(SpaceScan),
    /// It has another image than the one we track.
    Replaced,
    /// It has exited, or called exec during the look: then the next scan finds it anew.
    Gone,
}

impl UffdWp {
    pub(super) fn new(device: File, behaviour: WriteTracking, hugetlb_hangs: bool) -> UffdWp {
        UffdWp {
            device,
            behaviour,
            hugetlb_hangs,
            spaces: HashMap::new(),
            numbers: Numbers::default(),
        }
    }
}

impl Tracker for UffdWp {
    fn kind(&self) -> TrackerKind {
        TrackerKind::UffdWp
    }

    fn scan(&mut self, tasks: &[Task], motion: Motion) -> Result<Vec<SpaceScan>, TrackError> {
        let mut known = std::mem::take(&mut self.spaces);
        let mut kinds = FileKinds::default();
        let (mut scans, mut fresh) = (Vec::new(), Vec::new());
        for group in group(tasks)? {
            let Some(mut space) = known.remove(&key(&group.owner)) else {
                fresh.push(group);
                continue;
            };
            match self.look(&group, &mut space, motion, &mut kinds)? {
                Look::Seen(scan) => {
                    scans.push(scan);
                    self.spaces.insert(key(&group.owner), space);
                }
                Look::Replaced => fresh.push(group),
                Look::Gone => {}
            }
        }
        // Let go of what is gone before attaching: memory that lives on in another process than the one we knew it by
        // can only be registered again then.
        drop(known);
        for group in fresh {
            let mut space = Space {
                id: self.numbers.take(),
                tracker: None,
            };
            if let Look::Seen(scan) = self.look(&group, &mut space, motion, &mut kinds)? {
                scans.push(scan);
                self.spaces.insert(key(&group.owner), space);
            }
        }
        scans.sort_by_key(|scan| scan.space);
        Ok(scans)
    }

    /// What is registered is armed at every scan, whether the tasks run or not.
    fn watches(&self) -> bool {
        true
    }
}

impl UffdWp {
    fn look(
        &self,
        group: &Sharing,
        space: &mut Space,
        motion: Motion,
        kinds: &mut FileKinds,
    ) -> Result<Look, TrackError> {
        match self.look_at_living(group, space, motion, kinds) {
            Err(error) if error.exited() => Ok(Look::Gone),
            looked => looked,
        }
    }

    fn look_at_living(
        &self,
        group: &Sharing,
        space: &mut Space,
        motion: Motion,
        kinds: &mut FileKinds,
    ) -> Result<Look, TrackError> {
        let mut untracked = None;
        let new = space.tracker.is_none();
        if new {
            match self.attach(group, motion) {
                Ok(tracker) => space.tracker = Some(tracker),
                Err(reason) => untracked = Some(reason),
            }
        }
        // The mappings are read after attaching, so that none slips in between unregistered and unseen.
        let Ok(pid) = living_thread(group.owner.pid) else {
            return Ok(Look::Gone);
        };
        let vmas = maps::read(pid, kinds)?;
        let mut eyes = Eyes {
            pagemap: Pagemap::open(pid)?,
            dirty: PageSet::new(),
        };

        let mut unknown = Vec::new();
        let (mut stale, mut unwatched) = (PageSet::new(), PageSet::new());
        let mut tracked = 0;
        for (index, vma) in vmas.iter().enumerate().filter(|(_, vma)| is_tracked(vma)) {
            tracked += 1;
            // Right after attaching nothing is registered; asking would say so.
            if new || !eyes.take_written(vma.range)? {
                unknown.push((vma.range, with_gap(vma.range, vmas.get(index + 1))));
            } else if matches!(vma.kind, VmaKind::File { .. }) {
                eyes.take_dropped(vma.range)?;
            }
            // CRIU's parasite makes a page at the start of an executable mapping, registered or not.
            if motion == Motion::Frozen && vma.executable {
                stale.insert(vma.range);
                eyes.pagemap
                    .scan(vma.range, POPULATED, |run, _| stale.remove(run))?;
            }
        }
        if !new && unknown.len() == tracked {
            return Ok(Look::Replaced);
        }
        let mut registered = Vec::new();
        for (range, reach) in &unknown {
            if motion == Motion::Running
                && let Some(tracker) = &space.tracker
            {
                match self.adopt(tracker, *reach)? {
                    Adopted::Registered => registered.push(*range),
                    Adopted::Left => {}
                    Adopted::Gone => {
                        space.tracker = None;
                        untracked = Some(Untracked::Restless);
                    }
                }
            }
        }
        if self.hugetlb_hangs && !registered.is_empty() {
            spare_hugetlb(&mut registered, &maps::read(pid, kinds)?);
        }
        for range in registered {
            // Armed for the next scan; this one takes all that is populated, so that the answer does not matter.
            eyes.take_written(range)?;
        }
        for (range, _) in unknown {
            eyes.take_populated(range)?;
            // In what is registered the userfaultfd keeps khugepaged from filling holes.
            if motion == Motion::Frozen {
                stale.insert(range);
                unwatched.insert(range);
            }
        }
        stale.subtract(&eyes.dirty);
        Ok(Look::Seen(SpaceScan {
            space: space.id,
            pid,
            vpid: group.owner.vpid,
            sharers: group.sharers(),
            vmas,
            dirty: eyes.dirty,
            stale,
            unwatched,
            untracked,
        }))
    }

    /// Makes a userfaultfd in the memory of the group, through the first member that can be stopped.
    fn attach(&self, group: &Sharing, motion: Motion) -> Result<WriteTracker, Untracked> {
        if motion == Motion::Frozen {
            return Err(Untracked::Frozen);
        }
        let mut reason = Untracked::Restless;
        // A vfork parent cannot be stopped while it waits, but the child it waits for has the same memory.
        for task in group.tasks() {
            match inject::userfaultfd(task.pid, &self.device, PATIENCE) {
                Ok(made) => {
                    tracing::debug!(pid = task.pid, stopped = ?made.stopped, "attached");
                    return WriteTracker::new(made.fd).map_err(Untracked::Userfaultfd);
                }
                Err(error) if error.exited() => {}
                Err(error) => reason = Untracked::Attach(error),
            }
        }
        Err(reason)
    }

    /// Registers a range.
    fn adopt(&self, tracker: &WriteTracker, range: PageRange) -> Result<Adopted, TrackError> {
        use userfaultfd::TrackError::{NotMapped, Taken, TargetExited, Untrackable};
        match tracker.register(range) {
            Ok(()) => {}
            Err(TargetExited) => return Ok(Adopted::Gone),
            Err(NotMapped { .. } | Untrackable { .. } | Taken { .. }) => return Ok(Adopted::Left),
            Err(error) => return Err(error.into()),
        }
        if self.behaviour.protection_outlives_tracking() {
            match tracker.disarm(range) {
                Ok(()) => {}
                // Something new was mapped into the range that instant: start over with the next scan.
                Err(TargetExited | NotMapped { .. }) => return Ok(Adopted::Gone),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Adopted::Registered)
    }
}

/// What became of a range that was to be registered.
enum Adopted {
    /// It is tracked.
    Registered,
    /// It cannot be (unmapped again, held by another userfaultfd, droppable). It must not be armed either: a scan arms
    /// whoever's registration it finds, and the other would miss the writes. All of it is taken at every scan.
    Left,
    /// The tracker belongs to an image that is gone, or the range changes too fast.
    Gone,
}

/// Takes out of `registered` what has become hugetlb since it was listed, so that it is not armed.
///
/// What is mapped after this is not registered, and a scan that arms refuses it: only what was mapped between the listing
/// and the registering could be hugetlb and be armed.
fn spare_hugetlb(registered: &mut Vec<PageRange>, now: &[Vma]) {
    registered.retain(|range| {
        let mut hugetlb = now.iter().filter(|vma| vma.kind == VmaKind::Hugetlb);
        hugetlb.all(|vma| vma.range.intersection(*range).is_none())
    });
}

/// A mapping and the gap behind it, up to `next`. If the mapping grew into the gap since it was listed, registering only
/// the old part would cut it in two, and `mremap` (so `realloc`) of the process would fail on it.
fn with_gap(range: PageRange, next: Option<&Vma>) -> PageRange {
    next.and_then(|next| PageRange::new(range.start(), next.range.start()))
        .unwrap_or(range)
}

/// The pages of one process during one scan.
struct Eyes {
    pagemap: Pagemap,
    dirty: PageSet,
}

impl Eyes {
    /// Adds what was written in `range` and arms it again. `false` if (part of) it is not registered: then part of it may
    /// have been armed without being added, and all of it must be taken.
    fn take_written(&mut self, range: PageRange) -> Result<bool, ScanError> {
        let written = Query {
            all_of: PageIs::WRITTEN,
            tracked: true,
            arm: true,
            ..POPULATED
        };
        match self
            .pagemap
            .scan(range, written, |run, _| self.dirty.insert(run))
        {
            Ok(()) => Ok(true),
            Err(ScanError::NotTracked { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Adds what may have been dropped from `range`, a mapping of a file.
    ///
    /// A private copy that is dropped (`MADV_DONTNEED`) while it is armed leaves a marker that keeps the protection: such a
    /// page shows as swapped and not as written, though its content is the file's again. Real swap looks the same; it is
    /// taken too, which brings it in.
    fn take_dropped(&mut self, range: PageRange) -> Result<(), ScanError> {
        let dropped = Query {
            any_of: PageIs::SWAPPED,
            ..POPULATED
        };
        self.pagemap
            .scan(range, dropped, |run, _| self.dirty.insert(run))
    }

    /// Adds everything in `range`.
    fn take_populated(&mut self, range: PageRange) -> Result<(), ScanError> {
        self.pagemap
            .scan(range, POPULATED, |run, _| self.dirty.insert(run))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageNumber;

    #[test]
    fn what_has_become_hugetlb_is_not_armed() {
        let pages = |start, pages| PageRange::from_start_len(PageNumber(start), pages).unwrap();
        let vma = |range, kind| Vma {
            range,
            readable: true,
            writable: true,
            executable: false,
            shared: false,
            kind,
        };
        let mut registered = vec![pages(512, 512), pages(2048, 16), pages(4096, 1024)];
        let now = [
            vma(pages(512, 512), VmaKind::Hugetlb),
            vma(pages(2048, 16), VmaKind::Anonymous),
            vma(pages(4608, 512), VmaKind::Hugetlb),
        ];
        spare_hugetlb(&mut registered, &now);
        assert_eq!(registered, [pages(2048, 16)]);
    }
}
