//! The source end of the root filesystem: walks the container's tree and tells the target what is new.
//!
//! What enters is a directory that a running container is changing, and a stream to the target; what
//! leaves is a [`Summary`] per pass. The source keeps a picture of the tree *at the target* (`known`):
//! a pass compares the tree with the picture, sends the differences and corrects the picture by exactly
//! what it sent, so that every frame is valid at the target whatever the container does meanwhile.
//!
//! ```text
//! first_pass     the picture is empty                                    container runs
//! changed_pass   differences only, as often as wanted                    container runs
//! last_pass      differences only: afterwards both trees are the same    container frozen
//! finish
//!
//! a pass:  look at the tasks (not the last) → scan → directories → links of known files to new names → removals → files → directory times
//! ```
//!
//! Nothing is trusted to stand still: directories are opened beneath the root without following links or
//! entering mounts, and a file is opened for reading only after its inode was seen to be a regular file
//! (opening a device node that took its place could do harm) that nobody has a lease on. A file that changes while it is read is
//! sent torn, and comes again in the next pass, because what is remembered of it is what was seen *before*
//! it was read.

mod conversation;
mod files;
mod known;
mod leases;
mod scan;
mod tree;
mod writers;

pub use conversation::SourceError;
pub use writers::ListTasks;

use crate::wire::rootfs::{
    CHUNK, ChunkDigest, Counts, Entry, MAX_QUERY, Placement, Timestamp, ToSource, ToTarget,
    TreePath,
};
use conversation::Conversation;
use known::{Held, Known};
use leases::Leases;
use rustix::time::{ClockId, clock_gettime};
use scan::{FileType, Found, Stamp};
use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;
use std::io::{Read, Write};
use std::path::Path;
use tree::SourceTree;
use writers::Writers;

/// A change this close before the pass may share its timestamp with a later one: the kernel stamps files
/// from a clock that ticks every 1 to 10 ms (`current_time`, fs/inode.c). Twice that for comfort.
const CLOCK_TICK_NS: i128 = 20_000_000;

/// A regular file changed this shortly before the pass is compared by content in the next one, for writes under
/// way that the look at the tasks could not see (see [`writers`]).
const WRITE_IN_PROGRESS_NS: i128 = 2_000_000_000;

/// The source end of one rootfs transfer. Needs root (other owners' files, `trusted.*` attributes,
/// `O_NOATIME`), Linux 5.8 and `/proc`.
pub struct RootfsSource {
    tree: SourceTree,
    known: Known,
    /// Whether `known` is what the target holds: not before a first pass, nor after a failure.
    in_step: bool,
    tasks: ListTasks,
    /// Files whose content could change without a trace at some pass: they are compared in every later one.
    writers: Writers,
    leases: Leases,
    seed: u64,
    buffer: Vec<u8>,
}

/// What the tree at `root` takes on disk, without what is mounted in it.
pub fn bytes_on_disk(root: &Path) -> Result<u64, SourceError> {
    let mut bytes = 0;
    SourceTree::open(root)?.walk(|_, stamp, blocks| {
        if !stamp.mount_point {
            bytes += blocks * 512;
        }
        Ok(())
    })?;
    Ok(bytes)
}

/// What one pass did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Entries seen in the tree, the root not counted.
    pub entries: u64,
    /// Entries created or updated at the target, of which directories are sent without their mtime.
    pub puts: u64,
    /// Hard links made, including those by which a renamed file keeps its content.
    pub links: u64,
    /// Subtrees or files removed.
    pub removals: u64,
    /// Bytes of file content sent.
    pub data_bytes: u64,
    /// Bytes of file content read, to send or to compare.
    pub read_bytes: u64,
    /// Entries that vanished or changed their type during the pass. Not 0 with the container frozen means
    /// that somebody else writes to the tree: the two trees may then differ.
    pub skipped: u64,
}

impl RootfsSource {
    /// Opens the tree at `root`, which is read but never written. `tasks` lists the processes that may write to it.
    pub fn new(root: &Path, tasks: ListTasks) -> Result<RootfsSource, SourceError> {
        let tree = SourceTree::open(root)?;
        Ok(RootfsSource {
            writers: Writers::of(tree.root()),
            tree,
            known: Known::default(),
            in_step: false,
            tasks,
            leases: Leases::default(),
            seed: 0,
            buffer: vec![0; CHUNK],
        })
    }

    /// Sends the whole tree while the container runs.
    pub fn first_pass<S: Read + Write>(&mut self, stream: &mut S) -> Result<Summary, SourceError> {
        self.known = Known::default();
        // RandomState is seeded by the kernel's random numbers.
        self.seed = RandomState::new().hash_one(0);
        self.pass(stream, PassKind::First)
    }

    /// Sends what changed since the last pass: deletions, new and changed files, metadata.
    pub fn changed_pass<S: Read + Write>(
        &mut self,
        stream: &mut S,
    ) -> Result<Summary, SourceError> {
        self.pass(stream, PassKind::Changed)
    }

    /// The same while nothing can write to the tree (the container is frozen). Once it returns `Ok`, the target's tree
    /// is the same as this one.
    pub fn last_pass<S: Read + Write>(&mut self, stream: &mut S) -> Result<Summary, SourceError> {
        self.pass(stream, PassKind::Last)
    }

    /// Tells the target that no more passes follow.
    pub fn finish<S: Read + Write>(self, stream: &mut S) -> Result<(), SourceError> {
        let mut conversation = Conversation::new(stream);
        conversation.say(&ToTarget::Done)?;
        conversation.flush()
    }

    fn pass<S: Read + Write>(
        &mut self,
        stream: &mut S,
        kind: PassKind,
    ) -> Result<Summary, SourceError> {
        if kind != PassKind::First && !self.in_step {
            return Err(SourceError::FirstPassNeeded);
        }
        self.in_step = false;
        let started_ns = now_ns();
        if kind != PassKind::Last {
            let looked = self.writers.look(&self.tasks);
            looked.map_err(SourceError::Tasks)?;
        }
        self.known.begin_pass();
        self.tree.leave();
        let mut pass = Pass {
            source: self,
            target: Conversation::new(stream),
            started_ns,
            summary: Summary::default(),
            touched: BTreeSet::new(),
        };
        let target_is_empty = pass.begin(kind == PassKind::First)?;
        let found = pass.scan()?;
        pass.send_directories(&found)?;
        pass.link_known_files(&found)?;
        pass.remove_vanished()?;
        if target_is_empty {
            pass.send_files(&found, &mut BTreeMap::new())?;
        } else {
            pass.send_files_not_held(&found)?;
        }
        pass.send_directory_times()?;
        let summary = pass.end()?;
        self.in_step = true;
        Ok(summary)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PassKind {
    First,
    Changed,
    Last,
}

/// One pass under way.
struct Pass<'p, S> {
    source: &'p mut RootfsSource,
    target: Conversation<'p, S>,
    /// Before the look at the tasks.
    started_ns: i128,
    summary: Summary,
    /// Directories whose mtime at the target was disturbed or is new.
    touched: BTreeSet<TreePath>,
}

impl<S: Read + Write> Pass<'_, S> {
    /// Returns whether there is no point in asking the target what it holds.
    fn begin(&mut self, first: bool) -> Result<bool, SourceError> {
        self.target.say(&ToTarget::Begin {
            first,
            seed: self.source.seed,
        })?;
        if !first {
            return Ok(true);
        }
        match self.target.hear()? {
            ToSource::Ready { empty } => Ok(empty),
            _ => Err(SourceError::OutOfTurn("Ready")),
        }
    }

    /// Walks the tree; returns what differs from the picture or cannot be told from its stamps alone.
    fn scan(&mut self) -> Result<Vec<Found>, SourceError> {
        let RootfsSource {
            tree,
            known,
            writers,
            ..
        } = &mut *self.source;
        let mut changed = Vec::new();
        self.summary.entries = tree.walk(|path, stamp, _| {
            if !known.is_settled(path, stamp, writers) {
                changed.push(Found {
                    path: TreePath::parse(path)?,
                    stamp: *stamp,
                });
            }
            Ok(())
        })?;
        let root = tree.root_stamp()?;
        if !known.is_settled(b"", &root, writers) {
            changed.insert(
                0,
                Found {
                    path: TreePath::root(),
                    stamp: root,
                },
            );
        }
        Ok(changed)
    }

    fn send_directories(&mut self, found: &[Found]) -> Result<(), SourceError> {
        for Found { path, stamp } in found {
            if stamp.file_type != FileType::Directory || !self.has_parent(path) {
                continue;
            }
            let Some(entry) = self.source.tree.entry(path, stamp, Placement::New)? else {
                self.summary.skipped += 1;
                continue;
            };
            let is_new = !self.source.known.is_directory(path);
            self.say_put(entry)?;
            if is_new {
                self.touch_parent(path);
            }
            self.touched.insert(path.clone());
            let racy = self.is_racy(stamp);
            self.source.known.set_directory(path, *stamp, racy);
        }
        Ok(())
    }

    /// Gives known files their new names before the old ones go, so that a rename moves no data. If the
    /// inode number was reused for another file the content comparison that follows repairs it.
    fn link_known_files(&mut self, found: &[Found]) -> Result<(), SourceError> {
        for Found { path, stamp } in found {
            if stamp.file_type != FileType::Regular
                || !self.has_parent(path)
                || self.source.known.is_directory(path)
            {
                continue;
            }
            if let Some(held) = self.source.known.held_as(stamp) {
                self.link(path, held)?;
            }
        }
        Ok(())
    }

    fn remove_vanished(&mut self) -> Result<(), SourceError> {
        for path in self.source.known.vanished() {
            self.target.say(&ToTarget::Remove(path.clone()))?;
            self.summary.removals += 1;
            self.touch_parent(&path);
            self.source.known.forget(&path);
        }
        Ok(())
    }

    /// Sends files in batches, asking before each what an earlier attempt left at the target.
    fn send_files_not_held(&mut self, found: &[Found]) -> Result<(), SourceError> {
        for batch in found.chunks(MAX_QUERY) {
            let asked: Vec<TreePath> = batch
                .iter()
                .filter(|f| f.stamp.file_type == FileType::Regular && f.stamp.size > 0)
                .map(|f| f.path.clone())
                .collect();
            let mut held = BTreeMap::new();
            if !asked.is_empty() {
                self.target.say(&ToTarget::Query(asked.clone()))?;
                self.hear_digests(&asked, &mut held)?;
            }
            self.send_files(batch, &mut held)?;
        }
        Ok(())
    }

    fn hear_digests(
        &mut self,
        asked: &[TreePath],
        held: &mut BTreeMap<TreePath, Vec<ChunkDigest>>,
    ) -> Result<(), SourceError> {
        loop {
            match self.target.hear()? {
                ToSource::Digests { index, digests } => {
                    let path = usize::try_from(index).ok().and_then(|i| asked.get(i));
                    let path = path.ok_or(SourceError::OutOfTurn("a file that was asked about"))?;
                    let chunks = held.entry(path.clone()).or_default();
                    let in_order = match (chunks.last(), digests.first()) {
                        (Some(last), Some(next)) => last.chunk < next.chunk,
                        _ => true,
                    };
                    if !in_order {
                        return Err(SourceError::OutOfTurn("chunks in ascending order"));
                    }
                    chunks.extend(digests);
                }
                ToSource::Answered => return Ok(()),
                _ => return Err(SourceError::OutOfTurn("Digests")),
            }
        }
    }

    fn send_files(
        &mut self,
        found: &[Found],
        at_target: &mut BTreeMap<TreePath, Vec<ChunkDigest>>,
    ) -> Result<(), SourceError> {
        for Found { path, stamp } in found {
            if stamp.file_type == FileType::Directory {
                continue;
            }
            if !self.has_parent(path) {
                self.summary.skipped += 1;
            } else if stamp.file_type == FileType::Regular {
                self.send_regular(path, stamp, at_target.remove(path))?;
            } else {
                self.send_special(path, stamp)?;
            }
        }
        Ok(())
    }

    /// Symlinks, pipes, sockets and devices: small enough to be made anew whenever anything changed.
    fn send_special(&mut self, path: &TreePath, stamp: &Stamp) -> Result<(), SourceError> {
        if let Some(held) = self.source.known.held_as(stamp)
            && self.source.known.was_sent_this_pass(held)
        {
            return self.link(path, held);
        }
        let Some(entry) = self.source.tree.entry(path, stamp, Placement::New)? else {
            self.summary.skipped += 1;
            return Ok(());
        };
        self.say_put(entry)?;
        self.touch_parent(path);
        let racy = self.is_racy(stamp);
        self.source.known.set_new_file(path, *stamp, racy);
        Ok(())
    }

    /// Makes `path` a name of `held`, unless it is one already.
    fn link(&mut self, path: &TreePath, held: Held) -> Result<(), SourceError> {
        if self.source.known.file_at(path) == Some(held) {
            return Ok(());
        }
        let existing = self.source.known.name_of(held);
        self.target.say(&ToTarget::Link {
            path: path.clone(),
            existing,
        })?;
        self.summary.links += 1;
        self.touch_parent(path);
        self.source.known.set_link(path, held);
        Ok(())
    }

    fn send_directory_times(&mut self) -> Result<(), SourceError> {
        for path in std::mem::take(&mut self.touched) {
            if let Some(mtime) = self.source.known.directory_mtime(&path) {
                self.target.say(&ToTarget::DirTime(path, mtime))?;
            }
        }
        Ok(())
    }

    fn end(mut self) -> Result<Summary, SourceError> {
        let sent = Counts {
            puts: self.summary.puts,
            links: self.summary.links,
            removals: self.summary.removals,
            data_bytes: self.summary.data_bytes,
        };
        self.target.say(&ToTarget::End(sent))?;
        match self.target.hear()? {
            ToSource::Ack(received) if received == sent => Ok(self.summary),
            ToSource::Ack(received) => Err(SourceError::CountsDiffer { sent, received }),
            _ => Err(SourceError::OutOfTurn("Ack")),
        }
    }

    fn say_put(&mut self, entry: Entry) -> Result<(), SourceError> {
        self.summary.puts += 1;
        self.target.say(&ToTarget::Put(entry))
    }

    fn has_parent(&self, path: &TreePath) -> bool {
        path.split()
            .is_none_or(|(parent, _)| self.source.known.is_directory_at(parent))
    }

    fn touch_parent(&mut self, path: &TreePath) {
        if let Some((parent, _)) = path.split() {
            let parent = if parent.is_empty() {
                Ok(TreePath::root())
            } else {
                TreePath::parse(parent)
            };
            self.touched.extend(parent);
        }
    }

    fn is_racy(&self, stamp: &Stamp) -> bool {
        nanoseconds(stamp.ctime) >= self.started_ns - CLOCK_TICK_NS
    }

    fn may_be_written(&self, stamp: &Stamp) -> bool {
        nanoseconds(stamp.ctime) >= self.started_ns - WRITE_IN_PROGRESS_NS
    }
}

fn nanoseconds(time: Timestamp) -> i128 {
    i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanoseconds)
}

/// The clock that stamps files.
fn now_ns() -> i128 {
    let now = clock_gettime(ClockId::Realtime);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}
