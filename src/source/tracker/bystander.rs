//! No tracking: the tasks and their mappings, and not a page of them. For post-copy, in which nothing is sent before the
//! freeze and CRIU's own page maps say what there is.

use super::{Motion, SpaceScan, TrackError, Tracker, TrackerKind, sharing};
use crate::kernel::maps::{self, FileKinds, MapsError};
use crate::kernel::ptrace::living_thread;
use crate::memory::{PageSet, SpaceId};
use crate::runtime::Task;

/// Looks on, and leaves the container as it is.
#[derive(Debug, Default)]
pub struct Bystander;

impl Tracker for Bystander {
    /// As for uffd-wp, CRIU's dump changes nothing that is looked at here, and may begin before a scan.
    fn kind(&self) -> TrackerKind {
        TrackerKind::UffdWp
    }

    /// The spaces of this moment, numbered in their order: whoever scans twice cannot compare them.
    fn scan(&mut self, tasks: &[Task], _: Motion) -> Result<Vec<SpaceScan>, TrackError> {
        let mut kinds = FileKinds::default();
        let mut scans = Vec::new();
        for (number, group) in (0..).zip(sharing::group(tasks)?) {
            // A leader that has exited while other threads live on shows no mappings.
            let Ok(pid) = living_thread(group.owner.pid) else {
                continue;
            };
            match maps::read(pid, &mut kinds) {
                Ok(vmas) => scans.push(SpaceScan {
                    space: SpaceId(number),
                    pid,
                    vpid: group.owner.vpid,
                    sharers: group.sharers(),
                    vmas,
                    dirty: PageSet::new(),
                    stale: PageSet::new(),
                    unwatched: PageSet::new(),
                    untracked: None,
                }),
                Err(MapsError::Exited { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(scans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bystander_sees_mappings_and_no_pages() {
        let me = Task::read(std::process::id().cast_signed())
            .unwrap()
            .unwrap();
        let scans = Bystander
            .scan(std::slice::from_ref(&me), Motion::Frozen)
            .unwrap();
        let [scan] = scans.as_slice() else {
            panic!("{scans:?}");
        };
        assert_eq!((scan.pid, scan.vpid), (me.pid, me.vpid));
        assert!(scan.vmas.len() > 5 && scan.dirty.is_empty());
    }
}
