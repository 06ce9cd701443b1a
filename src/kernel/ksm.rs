//! Whether KSM merges pages on this host: `/sys/kernel/mm/ksm`.
//!
//! Nothing enters; a [`KsmState`] leaves, and two of them say whether anything was merged between them. ksmd makes a merged
//! page's entry anew, without the soft-dirty bit (`replace_page` in mm/ksm.c), and may give many pages one frame.

use std::path::{Path, PathBuf};

/// Where the kernel says what KSM does.
#[derive(Clone, Debug)]
pub struct Ksm {
    directory: PathBuf,
}

/// What KSM said of itself at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KsmState([Option<u64>; FILES.len()]);

/// `run` and whatever moves when ksmd works (Documentation/admin-guide/mm/ksm.rst). `pages_scanned` came with 6.6.
const FILES: [&str; 5] = [
    "run",
    "pages_shared",
    "pages_sharing",
    "full_scans",
    "pages_scanned",
];
const RUN: usize = 0;
const PAGES_SHARED: usize = 1;

/// `run`: ksmd merges. 0: it stands still. 2: it has separated what was merged and stands still.
const MERGE: u64 = 1;

impl Ksm {
    /// This kernel's.
    pub fn here() -> Ksm {
        Ksm::at(Path::new("/sys/kernel/mm/ksm"))
    }

    /// One that is described in `directory` as the kernel does it.
    pub(crate) fn at(directory: &Path) -> Ksm {
        Ksm {
            directory: directory.to_owned(),
        }
    }

    /// What it says now. A kernel without KSM has none of the files, an older one lacks some.
    pub fn state(&self) -> KsmState {
        KsmState(FILES.map(|file| {
            let text = std::fs::read_to_string(self.directory.join(file)).ok()?;
            text.trim().parse().ok()
        }))
    }
}

impl KsmState {
    /// Whether ksmd is switched on.
    pub fn merges(&self) -> bool {
        self.0[RUN] == Some(MERGE)
    }

    /// Whether pages may share a frame: those once merged stay so when ksmd is switched off by 0.
    pub fn shares_frames(&self) -> bool {
        self.merges() || self.0[PAGES_SHARED].is_some_and(|pages| pages != 0)
    }

    /// Whether ksmd may have merged anything between `before` and this. What it counts also changes as merged pages go: that
    /// says "may have" too often, and only where pages are merged.
    ///
    /// On kernels without `pages_scanned`, KSM switched on and off again between the two goes unseen if it ends with as many
    /// merged pages as before.
    pub fn may_have_merged_since(&self, before: &KsmState) -> bool {
        self.merges() || self != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(directory: &Path, run: &str, shared: &str, scans: &str) -> KsmState {
        for (file, text) in [
            ("run", run),
            ("pages_shared", shared),
            ("pages_sharing", shared),
            ("full_scans", scans),
        ] {
            std::fs::write(directory.join(file), format!("{text}\n")).unwrap();
        }
        Ksm::at(directory).state()
    }

    #[test]
    fn ksm_merges_while_it_is_on_and_has_merged_when_it_was_on_in_between() {
        let directory = tempfile::tempdir().unwrap();
        let without = Ksm::at(directory.path()).state();
        assert!(!without.merges() && !without.shares_frames());
        assert!(!without.may_have_merged_since(&without));

        let off = describe(directory.path(), "0", "0", "3");
        assert!(!off.merges() && !off.shares_frames() && !off.may_have_merged_since(&off));
        let on = describe(directory.path(), "1", "0", "3");
        assert!(on.merges() && on.shares_frames());
        assert!(on.may_have_merged_since(&on) && on.may_have_merged_since(&off));
        let off_again = describe(directory.path(), "0", "7", "3");
        assert!(!off_again.merges() && off_again.shares_frames());
        assert!(off_again.may_have_merged_since(&on) && off_again.may_have_merged_since(&off));
        let unmerged = describe(directory.path(), "2", "0", "4");
        assert!(!unmerged.merges() && !unmerged.shares_frames());
        assert!(!unmerged.may_have_merged_since(&unmerged));
        // On and off between two looks, and nothing left of it but the count.
        assert!(describe(directory.path(), "0", "0", "4").may_have_merged_since(&off));
    }
}
