//! Which tracker a migration from this host uses: decided here for [`open`](super::open) and for `migrate check` alike.
//!
//! What the kernel can do and which bugs it has enter; a tracker leaves, or what stands against each.

use super::{TrackError, Tracker, TrackerKind, soft_dirty, uffd_wp};
use crate::kernel::bugs::{Bug, Feature, KnownBug, Need, Reports};
use crate::kernel::probe::{KernelFeatures, Missing};
use std::fmt;

/// What this host has for tracking.
#[derive(Debug)]
pub struct Trackers {
    /// What works.
    pub kernel: KernelFeatures,
    /// Which kernel bugs are here.
    pub bugs: Reports,
}

/// What stands against a tracker.
#[derive(Clone, Copy, Debug)]
pub enum Objection<'a> {
    /// The kernel, or a privilege, lacks something.
    Missing(&'a Missing),
    /// A kernel bug whose remedy does not work here.
    Bug(&'static KnownBug, Need),
}

impl fmt::Display for Objection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Objection::Missing(missing) => missing.fmt(f),
            Objection::Bug(known, need) => write!(
                f,
                "tracker avoided because of a kernel bug, {} ({}): what would be done about it needs {need}",
                known.name, known.reference
            ),
        }
    }
}

impl Trackers {
    /// Tries everything out; takes a few milliseconds.
    pub fn find() -> Trackers {
        let kernel = KernelFeatures::probe();
        let bugs = Reports::here(&kernel);
        Trackers { kernel, bugs }
    }

    /// Whether a tracker can be used, and if not, why.
    pub fn usable(&self, kind: TrackerKind) -> Result<(), Objection<'_>> {
        let (works, feature) = match kind {
            TrackerKind::UffdWp => {
                let tracks = self.kernel.write_tracking.as_ref().map(drop);
                let injects = self.kernel.inject.as_ref().map(drop);
                (tracks.and(injects), Feature::UffdWp)
            }
            TrackerKind::SoftDirty => (
                self.kernel.soft_dirty.as_ref().map(drop),
                Feature::SoftDirty,
            ),
        };
        works.map_err(Objection::Missing)?;
        match self.bugs.against(feature) {
            Some((known, need)) => Err(Objection::Bug(known, need)),
            None => Ok(()),
        }
    }

    /// The tracker used where none is asked for: the first that can be. uffd-wp disturbs nobody else, soft-dirty is shared.
    pub fn preferred(&self) -> Option<TrackerKind> {
        let mut kinds = [TrackerKind::UffdWp, TrackerKind::SoftDirty].into_iter();
        kinds.find(|kind| self.usable(*kind).is_ok())
    }

    /// Starts tracking in the way asked for, or in the preferred one.
    pub fn open(self, asked: Option<TrackerKind>) -> Result<Box<dyn Tracker>, TrackError> {
        let Some(kind) = asked.or_else(|| self.preferred()) else {
            return Err(TrackError::NoTracker {
                uffd_wp: self.against(TrackerKind::UffdWp),
                soft_dirty: self.against(TrackerKind::SoftDirty),
            });
        };
        let Trackers { kernel, bugs } = self;
        let unsupported = |missing| TrackError::Unsupported { kind, missing };
        let avoided = |feature| match bugs.against(feature) {
            Some((bug, need)) => Err(TrackError::Avoided { kind, bug, need }),
            None => Ok(()),
        };
        match kind {
            TrackerKind::UffdWp => {
                let behaviour = kernel.write_tracking.map_err(unsupported)?;
                kernel.inject.map_err(unsupported)?;
                avoided(Feature::UffdWp)?;
                let hugetlb_hangs = bugs.threatens(Bug::HugetlbHoleHangs);
                Ok(Box::new(uffd_wp::UffdWp::new(behaviour, hugetlb_hangs)))
            }
            TrackerKind::SoftDirty => {
                kernel.soft_dirty.map_err(unsupported)?;
                avoided(Feature::SoftDirty)?;
                let scan = kernel.pagemap_scan.is_ok()
                    && !bugs.threatens(Bug::HugeZeroNotFlagged)
                    && !bugs.threatens(Bug::ScanLacksSoftDirty);
                let tables_move = bugs.threatens(Bug::MremapLosesSoftDirty);
                Ok(Box::new(soft_dirty::SoftDirty::new(scan, tables_move)?))
            }
        }
    }

    fn against(&self, kind: TrackerKind) -> String {
        self.usable(kind)
            .err()
            .map_or_else(String::new, |objection| objection.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::bug_probes::Sightings;
    use crate::kernel::bugs::{Abilities, Release};

    /// A host with these mechanisms, on which page tables move without a trace.
    fn host(uffd_wp: bool, soft_dirty: bool, frames: bool) -> Trackers {
        use crate::kernel::probe::WriteTracking;
        let behaviour = WriteTracking {
            mremap_keeps_protection: false,
            close_keeps_protection: false,
        };
        let kernel = KernelFeatures {
            soft_dirty: soft_dirty.then_some(()).ok_or(Missing::SoftDirty),
            pagemap_scan: Ok(()),
            userfaultfd: Ok(()),
            write_tracking: uffd_wp.then_some(behaviour).ok_or(Missing::Filtered),
            read_memory: Ok(()),
            inject: Ok(()),
        };
        let abilities = Abilities {
            uffd_wp,
            soft_dirty,
            frames,
            ksm_stopped: true,
        };
        let mut seen = Sightings::default();
        seen.add(Bug::MremapLosesSoftDirty, Some(true));
        let bugs = Reports::new(Release::parse("6.18.44", ""), abilities, &seen);
        Trackers { kernel, bugs }
    }

    #[test]
    fn uffd_wp_is_preferred_and_soft_dirty_taken_where_it_can_be() {
        assert_eq!(
            host(true, true, true).preferred(),
            Some(TrackerKind::UffdWp)
        );
        assert_eq!(
            host(false, true, true).preferred(),
            Some(TrackerKind::SoftDirty)
        );
        assert_eq!(host(false, false, true).preferred(), None);
    }

    #[test]
    fn a_tracker_with_a_bug_that_nothing_can_be_done_about_is_avoided() {
        // Frames are hidden: a moved page table would go unseen.
        assert_eq!(
            host(true, true, false).preferred(),
            Some(TrackerKind::UffdWp)
        );
        assert_eq!(host(false, true, false).preferred(), None);
        let asked = host(true, true, false)
            .open(Some(TrackerKind::SoftDirty))
            .map(drop);
        assert!(
            matches!(&asked, Err(TrackError::Avoided { bug, .. }) if bug.bug == Bug::MremapLosesSoftDirty),
            "{asked:?}"
        );
        let none = host(false, true, false).open(None).map(drop);
        let text = none.expect_err("no tracker is left").to_string();
        assert!(text.contains("avoided because of a kernel bug"), "{text}");
    }
}
