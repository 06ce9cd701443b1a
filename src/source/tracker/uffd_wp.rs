//! Tracking with a userfaultfd in each address space (`WP_ASYNC`) and `PAGEMAP_SCAN`.
//!
//! New spaces are attached to, all in one standstill (see [`crate::kernel::inject`]), their mappings registered and armed. Later scans ask each
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
use crate::kernel::ptrace::{living_thread, living_threads};
use crate::kernel::userfaultfd::{self, WriteTracker};
use crate::memory::{PageRange, PageSet, SpaceId};
use crate::runtime::{Freezer, Task, threads_of_cgroup};
use std::collections::HashMap;
use std::io;

pub(super) struct UffdWp {
    /// Where the container's threads are listed.
    container: Option<Freezer>,
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
    pub(super) fn new(behaviour: WriteTracking, hugetlb_hangs: bool) -> UffdWp {
        UffdWp {
            container: None,
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
        let (mut scans, mut unattached) = (Vec::new(), Vec::new());
        for group in group(tasks)? {
            let mut space = match known.remove(&key(&group.owner)) {
                Some(space) if space.tracker.is_some() => space,
                untracked => {
                    unattached.push((group, untracked.map(|space| space.id)));
                    continue;
                }
            };
            match self.look(&group, &mut space, None, motion, &mut kinds)? {
                Look::Seen(scan) => {
                    scans.push(scan);
                    self.spaces.insert(key(&group.owner), space);
                }
                Look::Replaced => unattached.push((group, None)),
                Look::Gone => {}
            }
        }
        // Let go of what is gone before attaching: memory that lives on in another process than the one we knew it by
        // can only be registered again then.
        drop(known);
        let groups: Vec<&Sharing> = unattached.iter().map(|(group, _)| group).collect();
        let attached = self.attach(&groups, tasks, motion);
        for ((group, id), attached) in unattached.into_iter().zip(attached) {
            let mut space = Space {
                id: id.unwrap_or_else(|| self.numbers.take()),
                tracker: None,
            };
            if let Look::Seen(scan) =
                self.look(&group, &mut space, Some(attached), motion, &mut kinds)?
            {
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

    fn set_container(&mut self, freezer: &Freezer) {
        self.container = Some(freezer.clone());
    }
}

impl UffdWp {
    /// Looks at a space. One that had no tracker comes with what attaching to it gave.
    fn look(
        &self,
        group: &Sharing,
        space: &mut Space,
        attached: Option<Result<WriteTracker, Untracked>>,
        motion: Motion,
        kinds: &mut FileKinds,
    ) -> Result<Look, TrackError> {
        match self.look_at_living(group, space, attached, motion, kinds) {
            Err(error) if error.exited() => Ok(Look::Gone),
            looked => looked,
        }
    }

    fn look_at_living(
        &self,
        group: &Sharing,
        space: &mut Space,
        attached: Option<Result<WriteTracker, Untracked>>,
        motion: Motion,
        kinds: &mut FileKinds,
    ) -> Result<Look, TrackError> {
        let mut untracked = None;
        let new = attached.is_some();
        match attached {
            Some(Ok(tracker)) => space.tracker = Some(tracker),
            Some(Err(reason)) => untracked = Some(reason),
            None => {}
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
            if new
                || !self.is_ours(&mut eyes, space, group, vma.range)?
                || !eyes.take_written(vma.range)?
            {
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
            if let Some(tracker) = &space.tracker {
                match self.adopt(tracker, group, *reach)? {
                    // In what is frozen nothing is armed; it was only asked whether another has it.
                    _ if motion == Motion::Frozen => {}
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
        let mut ours = registered.is_empty();
        for range in registered {
            // Armed for the next scan; this one takes all that is populated, so that what was written does not matter.
            ours |= eyes.take_written(range)?;
        }
        if new && !ours {
            // What the tracker registered is nowhere in this memory: it is another's.
            space.tracker = None;
            untracked = Some(Untracked::Restless);
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

    /// Makes a userfaultfd in the memory of each group while the whole container stands still.
    fn attach(
        &self,
        groups: &[&Sharing],
        tasks: &[Task],
        motion: Motion,
    ) -> Vec<Result<WriteTracker, Untracked>> {
        let all = |reason: &dyn Fn() -> Untracked| groups.iter().map(|_| Err(reason())).collect();
        // A container that its user has paused does not stop for us, and starts only for him.
        let paused = |freezer: &Freezer| freezer.is_frozen().unwrap_or(false);
        if motion == Motion::Frozen || self.container.as_ref().is_some_and(paused) {
            return all(&|| Untracked::Frozen);
        }
        if groups.is_empty() {
            return Vec::new();
        }
        let memories = groups.iter();
        let memories = memories.map(|group| group.tasks().map(|task| task.pid).collect());
        let injected = inject::userfaultfds(memories.collect(), self.everyone(tasks), PATIENCE);
        let injected = match injected {
            Ok(injected) => injected,
            Err(error) => return all(&|| Untracked::Attach(error.into())),
        };
        tracing::debug!(spaces = groups.len(), threads = injected.threads, stopped = ?injected.stopped, "attached");
        let trackers = injected.each.into_iter().map(|made| match made {
            Ok(fd) => WriteTracker::new(fd).map_err(Untracked::Userfaultfd),
            Err(error) => Err(Untracked::Attach(error)),
        });
        trackers.collect()
    }

    /// Lists the threads that could take a descriptor out of a process of the container: all that are in it.
    fn everyone(&self, tasks: &[Task]) -> inject::Everyone {
        let container = self.container.clone();
        let tasks: Vec<i32> = tasks.iter().map(|task| task.pid).collect();
        Box::new(move || match &container {
            Some(freezer) => threads_of_cgroup(freezer.path()),
            None => Ok::<_, io::Error>(
                tasks
                    .iter()
                    .filter_map(|&pid| living_threads(pid).ok())
                    .flatten()
                    .collect(),
            ),
        })
    }

    /// Whether a mapping is registered, and with us. A scan asks and arms whoever's registration it finds: with another's it
    /// would take what the other waits for, and be told nothing of what was written before the other's last scan.
    fn is_ours(
        &self,
        eyes: &mut Eyes,
        space: &Space,
        group: &Sharing,
        range: PageRange,
    ) -> Result<bool, TrackError> {
        let Some(tracker) = &space.tracker else {
            return Ok(false);
        };
        if !eyes.is_registered(range)? {
            return Ok(false);
        }
        // Registering what is ours changes nothing; what is another's is refused.
        match tracker.register(range) {
            Err(userfaultfd::TrackError::Taken { range }) => Err(taken(group, range)),
            registered => Ok(registered.is_ok()),
        }
    }

    /// Registers a range.
    fn adopt(
        &self,
        tracker: &WriteTracker,
        group: &Sharing,
        range: PageRange,
    ) -> Result<Adopted, TrackError> {
        use userfaultfd::TrackError::{NotMapped, Taken, TargetExited, Untrackable};
        match tracker.register(range) {
            Ok(()) => {}
            Err(TargetExited) => return Ok(Adopted::Gone),
            Err(NotMapped { .. } | Untrackable { .. }) => return Ok(Adopted::Left),
            Err(Taken { range }) => return Err(taken(group, range)),
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
    /// It cannot be (unmapped again, droppable). All of it is taken at every scan.
    Left,
    /// The tracker belongs to an image that is gone, or the range changes too fast.
    Gone,
}

fn taken(group: &Sharing, range: PageRange) -> TrackError {
    TrackError::Taken {
        vpid: group.owner.vpid,
        range,
    }
}

/// Whether writes to any memory of a process, which we do not track yet, are tracked by somebody else.
pub(super) fn is_tracked_already(pid: i32) -> Result<bool, TrackError> {
    let vmas = maps::read(pid, &mut FileKinds::default())?;
    let mut eyes = Eyes {
        pagemap: Pagemap::open(pid)?,
        dirty: PageSet::new(),
    };
    for vma in vmas.iter().filter(|vma| is_tracked(vma)) {
        if eyes.is_registered(vma.range)? {
            return Ok(true);
        }
    }
    Ok(false)
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

    /// Whether anybody tracks writes to the mapping `range`. Nothing is armed, and little is looked at.
    fn is_registered(&mut self, range: PageRange) -> Result<bool, ScanError> {
        let first = PageRange::from_start_len(range.start(), 1).expect("a range has a first page");
        let tracked = Query {
            tracked: true,
            ..POPULATED
        };
        match self.pagemap.scan(first, tracked, |_, _| {}) {
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
