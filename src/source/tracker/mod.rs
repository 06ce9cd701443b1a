//! Which pages were written since the last look: two trackers behind one trait.
//!
//! The list of the container's tasks enters each round; for each address space its mappings and the set of pages to send
//! leave. Nothing is kept per page between rounds, only runs.
//!
//! ```text
//!  tasks ──▶ sharing: which of them are one memory ──▶ uffd_wp  ─┐
//!                                                      soft_dirty ┴─▶ SpaceScan per address space
//! ```
//!
//! # What is tracked
//!
//! Private, readable mappings of ordinary memory. The rest CRIU dumps by itself: shared mappings, hugetlb, unreadable
//! mappings, the vdso. In private file mappings pages that are still the file's are left out.
//!
//! # The promise
//!
//! A scan re-arms *before* the caller reads. A page written after the scan is in the next one, so what is read is either
//! right or sent again; when the last scan and its reads happen with every task frozen, all that was sent last is right.
//! Wherever a tracker cannot know, it says "dirty".
//!
//! Tasks in the freezer may still be in a system call, and it writes its results when CRIU takes hold of them. So there is one
//! more scan under CRIU's hold, of a tracker that [`watches`](Tracker::watches) frozen tasks. Where soft-dirty is, CRIU itself
//! looks at the bits, which are cleared before it begins, and has such pages in its images.
//!
//! One writer is outside this promise: a device writing into memory pinned before a scan (an `O_DIRECT` read that was in
//! flight) sets no bit in any page table. Such writers are looked for ([`writers`](super::writers)), and what was sent of
//! their memory is compared in the end.

mod bystander;
mod choice;
mod sharing;
mod soft_dirty;
mod uffd_wp;

pub use bystander::Bystander;
pub use choice::{Objection, Trackers};

use crate::kernel::address_space::CompareError;
use crate::kernel::bugs::{KnownBug, Need};
use crate::kernel::inject::InjectError;
use crate::kernel::maps::{MapsError, Vma, VmaKind};
use crate::kernel::pagemap::{PageIs, Query, ScanError};
use crate::kernel::probe::Missing;
use crate::kernel::userfaultfd;
use crate::memory::{PageSet, SpaceId};
use crate::runtime::Task;
use std::fmt;
use std::time::Duration;

/// Finds written pages, round after round.
pub trait Tracker: Send {
    /// Which mechanism this is.
    fn kind(&self) -> TrackerKind;

    /// Looks at every address space of `tasks` once, in order of their numbers.
    ///
    /// At the first sight of a space every populated page is dirty; afterwards those written since the last scan.
    /// `tasks` must be listed anew for each scan: what they lack is forgotten. Tasks that exit meanwhile are left out.
    fn scan(&mut self, tasks: &[Task], motion: Motion) -> Result<Vec<SpaceScan>, TrackError>;

    /// Whether a further scan of frozen tasks tells what was written to them since the one before.
    fn watches(&self) -> bool {
        false
    }
}

/// The ways to track.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrackerKind {
    /// A write-tracking userfaultfd in each address space, kernel ≥ 6.7.
    UffdWp,
    /// The soft-dirty bit, where the kernel is built with it.
    SoftDirty,
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrackerKind::UffdWp => "uffd-wp",
            TrackerKind::SoftDirty => "soft-dirty",
        })
    }
}

/// Whether the tasks run during a scan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Motion {
    /// They run, and can be stopped for a moment.
    Running,
    /// Every one is in the cgroup freezer: none can be traced, and none changes but by the kernel's hand. Nothing is registered.
    Frozen,
}

/// What a scan found in one address space.
#[derive(Debug)]
pub struct SpaceScan {
    /// The space. A process that has called exec is a new space; a space not in a scan is gone.
    pub space: SpaceId,
    /// The process to read it through (or a living thread, if the process's leader has exited), on this host.
    pub pid: i32,
    /// That process's id in the container.
    pub vpid: i32,
    /// Ids in the container of other processes that share this memory (`CLONE_VM`, a `vfork` not yet ended).
    pub sharers: Vec<i32>,
    /// All its mappings, tracked or not, in address order.
    pub vmas: Vec<Vma>,
    /// Pages to send. Some may be gone by the time they are read.
    pub dirty: PageSet,
    /// Of a frozen space: pages that may come into being without being reported, so that no copy of them that was sent before
    /// is worth anything. None of them need exist.
    ///
    /// `khugepaged` makes huge pages of frozen processes' memory, too, and of what is not there it makes zeros. Who had sent
    /// what was there earlier would take that for its content.
    pub stale: PageSet,
    /// Of a frozen space: mappings of which a further scan cannot tell what was written since, and which it will report whole.
    /// What is sent of them is best sent then.
    pub unwatched: PageSet,
    /// Why writes are not tracked yet: every populated page was and will be dirty until that changes.
    pub untracked: Option<Untracked>,
}

/// Why the writes of a space are not tracked.
#[derive(Debug)]
pub enum Untracked {
    /// It was first seen frozen, when nothing can be attached.
    Frozen,
    /// Attaching to it failed; it is tried again at the next scan.
    Attach(InjectError),
    /// A userfaultfd was made in it but refused; it is tried again at the next scan.
    Userfaultfd(userfaultfd::TrackError),
    /// KSM may have merged pages of it since the last scan, which takes the soft-dirty bit from them.
    Merged,
    /// It exited or called exec while being attached to; it is tried again at the next scan.
    Restless,
}

/// Why a scan or a tracker failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// This kernel cannot track in the way asked for.
    #[error("the {kind} tracker does not work on this host")]
    Unsupported {
        /// The tracker asked for.
        kind: TrackerKind,
        /// What is missing.
        #[source]
        missing: Missing,
    },
    /// This kernel can, but has a bug that nothing can be done about here.
    #[error("the {kind} tracker is avoided because of a kernel bug, {name} ({reference}): what would be done about it needs {need}", name = .bug.name, reference = .bug.reference)]
    Avoided {
        /// The tracker asked for.
        kind: TrackerKind,
        /// The bug.
        bug: &'static KnownBug,
        /// What its remedy needs.
        need: Need,
    },
    /// No tracker was asked for, and none can be used.
    #[error("no tracker works on this host: uffd-wp: {uffd_wp}; soft-dirty: {soft_dirty}")]
    NoTracker {
        /// What stands against uffd-wp.
        uffd_wp: String,
        /// What stands against soft-dirty.
        soft_dirty: String,
    },
    /// Telling which processes share memory failed.
    #[error("telling which processes share memory")]
    Sharing(#[from] CompareError),
    /// The mappings of a process are not known.
    #[error("listing the mappings of a process")]
    Maps(#[from] MapsError),
    /// Pages could not be scanned.
    #[error("scanning the pages of a process")]
    Scan(#[from] ScanError),
    /// A userfaultfd refused.
    #[error("tracking the writes of a process")]
    Userfaultfd(#[from] userfaultfd::TrackError),
}

impl TrackError {
    /// Whether the process had simply exited or called exec meanwhile.
    fn exited(&self) -> bool {
        matches!(
            self,
            TrackError::Maps(MapsError::Exited { .. }) | TrackError::Scan(ScanError::Exited { .. })
        )
    }
}

/// Starts tracking in the given way, after proving on memory of our own that this kernel can.
pub fn open(kind: TrackerKind) -> Result<Box<dyn Tracker>, TrackError> {
    Trackers::find().open(Some(kind))
}

/// Whether the engine, not CRIU, carries the pages of a mapping.
pub fn is_tracked(vma: &Vma) -> bool {
    !vma.shared
        && vma.readable
        && match vma.kind {
            VmaKind::Anonymous | VmaKind::Heap | VmaKind::Stack | VmaKind::File { .. } => true,
            VmaKind::Hugetlb
            | VmaKind::Device
            | VmaKind::AioRing
            | VmaKind::IoUring
            | VmaKind::Vdso
            | VmaKind::Vvar
            | VmaKind::Special => false,
        }
}

/// Every page that exists and is the process's own.
const POPULATED: Query = Query {
    all_of: PageIs::NOTHING,
    any_of: PageIs::PRESENT.or(PageIs::SWAPPED),
    none_of: PageIs::FILE,
    report: PageIs::NOTHING,
    tracked: false,
    arm: false,
};

/// How long to wait for a thread to stop before its space goes untracked, or uncleared, for one round.
///
/// A thread that runs or sleeps stops within microseconds. One that has used up its cgroup's quota (`cpu.max`) stops when the
/// next period begins, 100 ms by default: waiting less, a container at its limit would never be tracked. The limit is for
/// uninterruptible waits (a `vfork`, a disk), during which what was stopped before stands still in vain.
const PATIENCE: Duration = Duration::from_millis(150);

/// Names one process for ever: its pid and start time.
type ProcessKey = (i32, u64);

fn key(task: &Task) -> ProcessKey {
    (task.pid, task.start_time)
}

/// Gives out space numbers.
#[derive(Debug, Default)]
struct Numbers {
    next: u32,
}

impl Numbers {
    fn take(&mut self) -> SpaceId {
        let id = SpaceId(self.next);
        self.next += 1;
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::probe;
    use crate::memory::{PageNumber, PageRange};

    #[test]
    fn only_private_readable_ordinary_memory_is_tracked() {
        let plain = Vma {
            range: PageRange::from_start_len(PageNumber(16), 1).unwrap(),
            readable: true,
            writable: false,
            executable: false,
            shared: false,
            kind: VmaKind::Anonymous,
        };
        assert!(is_tracked(&plain));
        assert!(!is_tracked(&Vma {
            shared: true,
            ..plain
        }));
        assert!(!is_tracked(&Vma {
            readable: false,
            writable: true,
            ..plain
        }));
        for kind in [
            VmaKind::Hugetlb,
            VmaKind::Device,
            VmaKind::AioRing,
            VmaKind::IoUring,
            VmaKind::Vdso,
            VmaKind::Vvar,
            VmaKind::Special,
        ] {
            assert!(!is_tracked(&Vma { kind, ..plain }), "{kind:?}");
        }
    }

    #[test]
    fn a_tracker_opens_exactly_where_its_probe_succeeds() {
        assert_eq!(
            open(TrackerKind::UffdWp).is_ok(),
            probe::write_tracking().is_ok()
        );
        match (open(TrackerKind::SoftDirty), probe::soft_dirty()) {
            (Ok(tracker), Ok(())) => assert_eq!(tracker.kind(), TrackerKind::SoftDirty),
            (Err(error), Err(Missing::SoftDirty)) => {
                assert_eq!(
                    error.to_string(),
                    "the soft-dirty tracker does not work on this host"
                );
                let cause = std::error::Error::source(&error).expect("there is a reason");
                assert!(
                    cause.to_string().contains("CONFIG_MEM_SOFT_DIRTY"),
                    "{cause}"
                );
            }
            (opened, probed) => panic!("{:?} but {probed:?}", opened.map(|tracker| tracker.kind())),
        }
    }
}
