//! The picture of the tree at the target: which names it has, which of them are the same file, and what
//! each file held when it was sent.

use super::scan::{FileId, FileType, Stamp};
use super::writers::Writers;
use crate::wire::rootfs::{ChunkDigest, Timestamp, TreePath};
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

/// A file (any inode that is not a directory) at the target. Numbers are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Held(usize);

/// See the module.
#[derive(Default)]
pub(super) struct Known {
    /// Number of the pass under way, from 1.
    pass: u32,
    names: BTreeMap<TreePath, Name>,
    files: Vec<Option<File>>,
    /// Which file at the target stands for which inode here. One to one.
    by_id: HashMap<FileId, Held>,
}

struct Name {
    what: What,
    /// The last pass in which the scan saw this name, or in which it was made.
    seen: u32,
}

enum What {
    Directory { stamp: Stamp, racy: bool },
    File(Held),
}

struct File {
    stamp: Stamp,
    /// A later change may carry the same times: send again.
    racy: bool,
    /// A write may have been under way: compare the content again.
    compare: bool,
    /// Data chunks as the target holds them, ascending. Empty for anything but regular files.
    chunks: Vec<ChunkDigest>,
    names: Vec<TreePath>,
    /// The last pass whose scan saw this inode under any name.
    seen: u32,
    /// The last pass that sent it.
    sent: u32,
}

impl Known {
    pub(super) fn begin_pass(&mut self) {
        self.pass += 1;
    }

    /// Notes that the scan saw `path` with `stamp`, and says whether the target has it just so.
    pub(super) fn is_settled(&mut self, path: &[u8], stamp: &Stamp, writers: &Writers) -> bool {
        if stamp.file_type != FileType::Directory
            && let Some(file) = self
                .by_id
                .get(&stamp.id)
                .and_then(|held| self.files[held.0].as_mut())
        {
            file.seen = self.pass;
        }
        let Some(name) = self.names.get_mut(path) else {
            return false;
        };
        name.seen = self.pass;
        match &name.what {
            What::Directory { stamp: known, racy } => known == stamp && !racy,
            What::File(held) => self.files[held.0].as_ref().is_some_and(|file| {
                self.by_id.get(&stamp.id) == Some(held)
                    && file.stamp == *stamp
                    && !file.racy
                    && !file.compare
                    && (stamp.file_type != FileType::Regular || !writers.may_write(&stamp.id))
            }),
        }
    }

    /// Names the scan of this pass did not see; of a vanished directory only itself. Parents first.
    pub(super) fn vanished(&self) -> Vec<TreePath> {
        let gone = |path: &[u8]| {
            self.names
                .get(path)
                .is_some_and(|name| name.seen != self.pass)
        };
        self.names
            .iter()
            .filter(|(path, name)| {
                name.seen != self.pass && path.split().is_none_or(|(parent, _)| !gone(parent))
            })
            .map(|(path, _)| path.clone())
            .collect()
    }

    pub(super) fn is_directory(&self, path: &TreePath) -> bool {
        self.is_directory_at(path.as_bytes())
    }

    pub(super) fn is_directory_at(&self, path: &[u8]) -> bool {
        matches!(
            self.names.get(path),
            Some(Name {
                what: What::Directory { .. },
                ..
            })
        )
    }

    pub(super) fn directory_mtime(&self, path: &TreePath) -> Option<Timestamp> {
        match &self.names.get(path)?.what {
            What::Directory { stamp, .. } => Some(stamp.mtime),
            What::File(_) => None,
        }
    }

    pub(super) fn file_at(&self, path: &TreePath) -> Option<Held> {
        match &self.names.get(path)?.what {
            What::File(held) => Some(*held),
            What::Directory { .. } => None,
        }
    }

    /// The file at the target that stands for this inode, if it is of the same type.
    pub(super) fn held_as(&self, stamp: &Stamp) -> Option<Held> {
        let held = *self.by_id.get(&stamp.id)?;
        let file = self.files[held.0].as_ref()?;
        (file.stamp.file_type == stamp.file_type).then_some(held)
    }

    /// The regular file at `path` whose own inode is gone from the source: the target's copy may become
    /// the new file that took its name, and keeps what they have in common.
    pub(super) fn orphan_at(&self, path: &TreePath) -> Option<Held> {
        let held = self.file_at(path)?;
        let file = self.files[held.0].as_ref()?;
        (file.stamp.file_type == FileType::Regular && file.seen != self.pass).then_some(held)
    }

    pub(super) fn name_of(&self, held: Held) -> TreePath {
        self.file(held).names[0].clone()
    }

    pub(super) fn stamp_of(&self, held: Held) -> &Stamp {
        &self.file(held).stamp
    }

    pub(super) fn is_racy(&self, held: Held) -> bool {
        self.file(held).racy
    }

    pub(super) fn chunks_of(&self, held: Held) -> &[ChunkDigest] {
        &self.file(held).chunks
    }

    pub(super) fn was_sent_this_pass(&self, held: Held) -> bool {
        self.file(held).sent == self.pass
    }

    pub(super) fn set_directory(&mut self, path: &TreePath, stamp: Stamp, racy: bool) {
        self.unname(path);
        let name = Name {
            what: What::Directory { stamp, racy },
            seen: self.pass,
        };
        self.names.insert(path.clone(), name);
    }

    pub(super) fn set_new_file(&mut self, path: &TreePath, stamp: Stamp, racy: bool) -> Held {
        self.unname(path);
        let held = Held(self.files.len());
        self.files.push(Some(File {
            stamp,
            racy,
            compare: false,
            chunks: Vec::new(),
            names: vec![path.clone()],
            seen: self.pass,
            sent: self.pass,
        }));
        self.by_id.insert(stamp.id, held);
        self.names.insert(
            path.clone(),
            Name {
                what: What::File(held),
                seen: self.pass,
            },
        );
        held
    }

    pub(super) fn set_link(&mut self, path: &TreePath, held: Held) {
        // Named anew before the old name goes, so that a file with one name never has none.
        self.file_mut(held).names.push(path.clone());
        self.unname(path);
        self.names.insert(
            path.clone(),
            Name {
                what: What::File(held),
                seen: self.pass,
            },
        );
    }

    /// What was just sent (or found unchanged) of a regular file.
    pub(super) fn set_content(
        &mut self,
        held: Held,
        stamp: Stamp,
        racy: bool,
        compare: bool,
        chunks: Vec<ChunkDigest>,
    ) {
        let pass = self.pass;
        let file = self.file_mut(held);
        let before = std::mem::replace(&mut file.stamp, stamp);
        (file.racy, file.compare, file.chunks) = (racy, compare, chunks);
        (file.seen, file.sent) = (pass, pass);
        if before.id != stamp.id {
            if self.by_id.get(&before.id) == Some(&held) {
                self.by_id.remove(&before.id);
            }
            self.by_id.insert(stamp.id, held);
        }
    }

    /// Drops `path` and everything below it.
    pub(super) fn forget(&mut self, path: &TreePath) {
        let from = [path.as_bytes(), b"/"].concat();
        let below: Vec<TreePath> = self
            .names
            .range::<[u8], _>((Bound::Included(&from[..]), Bound::Unbounded))
            .take_while(|(name, _)| name.as_bytes().starts_with(&from))
            .map(|(name, _)| name.clone())
            .collect();
        for name in below.iter().chain([path]) {
            self.unname(name);
        }
    }

    fn unname(&mut self, path: &TreePath) {
        let Some(Name {
            what: What::File(held),
            ..
        }) = self.names.remove(path)
        else {
            return;
        };
        let file = self.file_mut(held);
        if let Some(at) = file.names.iter().position(|name| name == path) {
            file.names.swap_remove(at);
        }
        if file.names.is_empty() {
            let id = file.stamp.id;
            self.files[held.0] = None;
            if self.by_id.get(&id) == Some(&held) {
                self.by_id.remove(&id);
            }
        }
    }

    fn file(&self, held: Held) -> &File {
        self.files[held.0]
            .as_ref()
            .expect("a held file has a name that leads to it")
    }

    fn file_mut(&mut self, held: Held) -> &mut File {
        self.files[held.0]
            .as_mut()
            .expect("a held file has a name that leads to it")
    }
}
