//! The target end of the root filesystem: makes a directory equal to the container's tree.
//!
//! What enters is a stream from a peer that may be hostile, and a directory; what leaves is the tree below
//! that directory and nothing anywhere else (`beneath`). Names, links, device nodes and attributes inside
//! the tree are the container's own business: it is written by root for a container run by root.
//!
//! ```text
//! serve:  Begin → [Ready] → (Query → Digests… Answered | Put Data Hole FileEnd | Link | Remove)* → End → Ack
//!         … once more for every pass …  Done
//! ```
//!
//! Nothing is synced while a pass is applied, because the last pass lies in the freeze. A crash of the host
//! loses the copy, not the container: the source keeps what it has until [`sync_files`] has been called.

mod beneath;
mod metadata;
mod place;
mod remove;

pub use remove::{RemoveError, Removed, remove_tree};

use crate::kernel::sparse_file::ChunkReader;
use crate::wire::rootfs::{
    CHUNK, ChunkDigest, Counts, Entry, FrameError, Kind, MAX_DIGESTS, Placement, Refusal,
    Timestamp, ToSource, ToTarget, TreePath,
};
use beneath::Beneath;
use place::{OpenFile, Room};
use remove::{remove_at, sweep};
use rustix::fs::{CWD, Mode, OFlags, Timespec, mkdirat, open, openat, syncfs};
use rustix::io::Errno;
use std::collections::HashSet;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Writes what lies in `directory` to stable storage: the whole filesystem it is on (`syncfs`).
pub fn sync_files(directory: &Path) -> Result<(), TargetError> {
    open(
        directory,
        OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(|opened| syncfs(&opened))
    .map_err(|source| TargetError::Destination {
        action: "syncing",
        path: directory.to_owned(),
        source,
    })
}

/// How much a peer may put at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that the files of the tree occupy on disk (holes do not count).
    pub bytes: u64,
    /// Entries of the tree.
    pub entries: u64,
}

impl Limits {
    /// Most entries a tree may have, whatever the caller allows: both ends hold each in memory.
    pub const MAX_ENTRIES: u64 = 5_000_000;
}

/// Why receiving failed. The tree is then incomplete: keep it for another attempt, or [`remove_tree`] it.
#[derive(Debug, Error)]
pub enum TargetError {
    /// What came could not be read or was malformed.
    #[error("receiving the rootfs")]
    Frame(#[from] FrameError),
    /// Answering the source failed.
    #[error("answering the source of the rootfs")]
    Answer(#[source] io::Error),
    /// A well-formed frame that has no place here.
    #[error("a {frame} frame where {why}")]
    OutOfTurn {
        /// Which frame.
        frame: &'static str,
        /// Why it is out of place.
        why: &'static str,
    },
    /// The path leads through a symlink, a mount or something that is not a directory.
    #[error("{path} does not lead to a directory entry of the tree: {source}")]
    Unreachable {
        /// The path in the tree.
        path: TreePath,
        /// `ELOOP` for a symlink on the way, `EXDEV` for a mount, `ENOTDIR`, `ENOENT`.
        source: Errno,
    },
    /// A file was to be changed, or linked to, that is not a regular file or is the root.
    #[error("{path} is not what the source takes it for")]
    WrongType {
        /// The path in the tree.
        path: TreePath,
    },
    /// Content beyond the size the file was announced with.
    #[error("content of {path} at {offset} lies beyond its size of {size} bytes")]
    BeyondEnd {
        /// The path in the tree.
        path: TreePath,
        /// Where the content was to go.
        offset: u64,
        /// Announced size.
        size: u64,
    },
    /// The filesystem or a quota is full.
    #[error("no space left for {path}")]
    NoSpace {
        /// The path in the tree.
        path: TreePath,
    },
    /// See [`Limits::bytes`].
    #[error("the tree exceeds its limit of {limit} bytes at {path}")]
    TooManyBytes {
        /// The path in the tree.
        path: TreePath,
        /// The limit.
        limit: u64,
    },
    /// See [`Limits::entries`].
    #[error("the tree exceeds its limit of {limit} entries")]
    TooManyEntries {
        /// The limit.
        limit: u64,
    },
    /// The content of a file is not what was sent.
    #[error("the content of {path} does not have the hash it was sent with")]
    Corrupt {
        /// The path in the tree.
        path: TreePath,
    },
    /// Frames are missing from a pass, or too many.
    #[error("received {received:?} but {sent:?} was sent")]
    CountsDiffer {
        /// As the source counted.
        sent: Counts,
        /// As counted here.
        received: Counts,
    },
    /// A subtree could not be removed.
    #[error("clearing {path}")]
    Remove {
        /// The path in the tree.
        path: TreePath,
        /// What stood in the way.
        #[source]
        source: RemoveError,
    },
    /// Another call on an entry of the tree failed.
    #[error("{action} {path}")]
    Filesystem {
        /// What was being done.
        action: &'static str,
        /// The path in the tree.
        path: TreePath,
        /// What the kernel said.
        source: Errno,
    },
    /// The destination itself could not be made, opened or synced.
    #[error("{action} the rootfs at {path:?}")]
    Destination {
        /// What was being done.
        action: &'static str,
        /// The destination.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
}

impl TargetError {
    /// What the source is told.
    pub fn refusal(&self) -> Refusal {
        match self {
            TargetError::NoSpace { .. } => Refusal::NoSpace,
            TargetError::TooManyBytes { .. } => Refusal::TooManyBytes,
            TargetError::TooManyEntries { .. } => Refusal::TooManyEntries,
            TargetError::Corrupt { .. } | TargetError::CountsDiffer { .. } => Refusal::Integrity,
            TargetError::Remove {
                source: RemoveError::Mounted(_),
                ..
            }
            | TargetError::Unreachable {
                source: Errno::XDEV,
                ..
            } => Refusal::Mounted,
            TargetError::Filesystem { .. }
            | TargetError::Destination { .. }
            | TargetError::Remove { .. }
            | TargetError::Answer(_) => Refusal::Filesystem,
            TargetError::Frame(_)
            | TargetError::OutOfTurn { .. }
            | TargetError::Unreachable { .. }
            | TargetError::WrongType { .. }
            | TargetError::BeyondEnd { .. } => Refusal::Request,
        }
    }

    /// Tells a full disk from every other failure.
    fn at(action: &'static str, path: &TreePath, source: Errno) -> TargetError {
        let path = path.clone();
        match source {
            Errno::NOSPC | Errno::DQUOT => TargetError::NoSpace { path },
            _ => TargetError::Filesystem {
                action,
                path,
                source,
            },
        }
    }
}

/// The target end of one rootfs transfer. Needs root (owners, devices, `trusted.*`), Linux 5.8 and `/proc`.
pub struct RootfsTarget {
    tree: Beneath,
    limits: Limits,
    /// Entries and bytes of the tree as it stands.
    held: Removed,
    seed: u64,
    /// During a first pass over a destination that held something: which paths the source has named.
    named: Option<HashSet<u128>>,
    counts: Counts,
}

impl RootfsTarget {
    /// Opens `destination`, or makes it (mode 0700, the parent must exist). The path itself is trusted.
    ///
    /// The root takes the mode the container's root has, usually 0755, and the tree can hold programs with
    /// setuid and device nodes: keep it below a directory that only root may enter.
    pub fn new(destination: &Path, limits: Limits) -> Result<RootfsTarget, TargetError> {
        let failed = |action| {
            move |source| TargetError::Destination {
                action,
                path: destination.to_path_buf(),
                source,
            }
        };
        match mkdirat(CWD, destination, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("making")(errno)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = openat(CWD, destination, flags, Mode::empty()).map_err(failed("opening"))?;
        let tree = Beneath::new(root);
        let limits = Limits {
            entries: limits.entries.min(Limits::MAX_ENTRIES),
            ..limits
        };
        Ok(RootfsTarget {
            tree,
            limits,
            held: Removed::default(),
            seed: 0,
            named: None,
            counts: Counts::default(),
        })
    }

    /// Receives passes until the source says that there are no more. On an error the source is told the
    /// kind of it; the caller then closes the stream, so that a source in the middle of sending wakes up.
    pub fn serve<S: Read + Write>(&mut self, stream: &mut S) -> Result<(), TargetError> {
        let mut session = Session {
            stream: BufReader::with_capacity(CHUNK, stream),
            answer: Vec::new(),
        };
        let served = self.serve_passes(&mut session);
        if let Err(error) = &served {
            ToSource::Failed(error.refusal()).encode(&mut session.answer);
            // The stream may be what failed; the error to report is the first one.
            let _ = session.flush();
        }
        served
    }

    fn serve_passes<S: Read + Write>(
        &mut self,
        session: &mut Session<'_, S>,
    ) -> Result<(), TargetError> {
        let mut scratch = Vec::new();
        let mut begun = false;
        loop {
            match ToTarget::read(&mut session.stream, &mut scratch)? {
                ToTarget::Begin { first, seed } => {
                    if !first && !begun {
                        let why = "no first pass came before";
                        return Err(TargetError::OutOfTurn {
                            frame: "Begin",
                            why,
                        });
                    }
                    begun = true;
                    self.begin(first, seed, session)?;
                }
                ToTarget::Done => return Ok(()),
                _ => {
                    return Err(TargetError::OutOfTurn {
                        frame: "pass",
                        why: "no pass has begun",
                    });
                }
            }
            self.receive_pass(session, &mut scratch)?;
        }
    }

    fn begin<S: Read + Write>(
        &mut self,
        first: bool,
        seed: u64,
        session: &mut Session<'_, S>,
    ) -> Result<(), TargetError> {
        self.counts = Counts::default();
        self.tree.leave();
        self.seed = seed;
        if !first {
            return Ok(());
        }
        self.held = remove::census(self.tree.root()).map_err(|source| TargetError::Remove {
            path: TreePath::root(),
            source,
        })?;
        let empty = self.held.entries == 0;
        self.named = (!empty).then(HashSet::new);
        session.say(&ToSource::Ready { empty })?;
        session.flush()
    }

    fn receive_pass<S: Read + Write>(
        &mut self,
        session: &mut Session<'_, S>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), TargetError> {
        let mut open: Option<OpenFile> = None;
        loop {
            let message = ToTarget::read(&mut session.stream, scratch)?;
            let room = Room {
                held: self.held.bytes,
                limit: self.limits.bytes,
            };
            match (&mut open, message) {
                (Some(file), ToTarget::Data { offset, bytes }) => {
                    self.counts.data_bytes += bytes.len() as u64;
                    file.write(offset, bytes)?;
                    file.check_room(room)?;
                }
                (Some(file), ToTarget::Hole { offset, len }) => file.punch(offset, len, room)?,
                (Some(_), ToTarget::FileEnd(hash)) => {
                    if let Some(file) = open.take() {
                        self.held.bytes = self
                            .held
                            .bytes
                            .saturating_add_signed(file.close(&mut self.tree, hash)?);
                    }
                }
                (Some(_), _) => {
                    return Err(TargetError::OutOfTurn {
                        frame: "tree",
                        why: "a file is still open",
                    });
                }
                (None, ToTarget::Put(entry)) => open = self.put(entry)?,
                (None, ToTarget::Link { path, existing }) => self.link(&path, &existing)?,
                (None, ToTarget::Remove(path)) => {
                    self.counts.removals += 1;
                    self.clear(&path)?;
                }
                (None, ToTarget::DirTime(path, mtime)) => self.set_directory_time(&path, mtime)?,
                (None, ToTarget::Query(paths)) => self.answer(&paths, session)?,
                (None, ToTarget::End(sent)) => return self.end(sent, session),
                (None, ToTarget::Data { .. } | ToTarget::Hole { .. } | ToTarget::FileEnd(_)) => {
                    return Err(TargetError::OutOfTurn {
                        frame: "content",
                        why: "no file is open",
                    });
                }
                (None, ToTarget::Begin { .. } | ToTarget::Done) => {
                    return Err(TargetError::OutOfTurn {
                        frame: "pass",
                        why: "a pass is under way",
                    });
                }
            }
        }
    }

    fn put(&mut self, entry: Entry) -> Result<Option<OpenFile>, TargetError> {
        self.counts.puts += 1;
        self.name(&entry.path);
        match entry.kind {
            Kind::Directory => {
                if !self.tree.is_directory(&entry.path)? {
                    self.clear(&entry.path)?;
                    self.count_entry()?;
                    place::make_directory(&mut self.tree, &entry)?;
                }
                place::describe_directory(&mut self.tree, &entry)?;
                Ok(None)
            }
            Kind::Regular {
                size,
                placement: Placement::Update,
            } => OpenFile::update(&mut self.tree, entry, size).map(Some),
            Kind::Regular {
                size,
                placement: Placement::New,
            } => {
                self.clear(&entry.path)?;
                self.count_entry()?;
                OpenFile::create(&mut self.tree, entry, size).map(Some)
            }
            _ => {
                self.clear(&entry.path)?;
                self.count_entry()?;
                place::make_special(&mut self.tree, &entry)?;
                Ok(None)
            }
        }
    }

    fn link(&mut self, path: &TreePath, existing: &TreePath) -> Result<(), TargetError> {
        self.counts.links += 1;
        self.name(path);
        if path == existing {
            return Err(TargetError::WrongType { path: path.clone() });
        }
        place::check_linkable(&mut self.tree, existing)?;
        self.clear(path)?;
        self.count_entry()?;
        place::link(&mut self.tree, path, existing)
    }

    /// Removes whatever is at `path`, if anything.
    fn clear(&mut self, path: &TreePath) -> Result<(), TargetError> {
        let Some((parent, name)) = self.tree.parent(path)? else {
            return Err(TargetError::WrongType { path: path.clone() });
        };
        let removed = remove_at(parent, name).map_err(|source| TargetError::Remove {
            path: path.clone(),
            source,
        })?;
        self.held.entries = self.held.entries.saturating_sub(removed.entries);
        self.held.bytes = self.held.bytes.saturating_sub(removed.bytes);
        if removed.directories {
            self.tree.leave();
        }
        Ok(())
    }

    fn count_entry(&mut self) -> Result<(), TargetError> {
        if self.held.entries >= self.limits.entries {
            return Err(TargetError::TooManyEntries {
                limit: self.limits.entries,
            });
        }
        self.held.entries += 1;
        Ok(())
    }

    fn name(&mut self, path: &TreePath) {
        if let Some(named) = &mut self.named {
            named.insert(xxh3_128_with_seed(path.as_bytes(), self.seed));
        }
    }

    fn set_directory_time(&mut self, path: &TreePath, mtime: Timestamp) -> Result<(), TargetError> {
        let directory = self.tree.open_directory(path)?;
        metadata::set_mtime(&directory, mtime)
            .map_err(|e| TargetError::at("setting the time of", path, e))
    }

    /// Tells what the files at these paths hold. Only files with a single name are offered: others may be
    /// linked in a way the source's are not.
    fn answer<S: Read + Write>(
        &mut self,
        paths: &[TreePath],
        session: &mut Session<'_, S>,
    ) -> Result<(), TargetError> {
        let mut buffer = vec![0; CHUNK];
        for (index, path) in (0u32..).zip(paths) {
            let Some((file, size)) = place::open_reusable(&mut self.tree, path)? else {
                continue;
            };
            let mut reader = ChunkReader::new(std::os::fd::AsFd::as_fd(&file), size);
            let mut digests = Vec::new();
            while let Some(chunk) = reader
                .next(&mut buffer)
                .map_err(|e| TargetError::at("reading", path, e))?
            {
                digests.push(ChunkDigest::of(self.seed, chunk.number, &chunk.extents));
                if digests.len() == MAX_DIGESTS {
                    session.say(&ToSource::Digests {
                        index,
                        digests: std::mem::take(&mut digests),
                    })?;
                }
            }
            session.say(&ToSource::Digests { index, digests })?;
        }
        session.say(&ToSource::Answered)?;
        session.flush()
    }

    fn end<S: Read + Write>(
        &mut self,
        sent: Counts,
        session: &mut Session<'_, S>,
    ) -> Result<(), TargetError> {
        if sent != self.counts {
            return Err(TargetError::CountsDiffer {
                sent,
                received: self.counts,
            });
        }
        if let Some(named) = self.named.take() {
            let seed = self.seed;
            let unnamed = |path: &[u8]| !named.contains(&xxh3_128_with_seed(path, seed));
            let swept = sweep(self.tree.root(), unnamed).map_err(|source| TargetError::Remove {
                path: TreePath::root(),
                source,
            })?;
            self.tree.leave();
            self.held.entries = self.held.entries.saturating_sub(swept.entries);
            self.held.bytes = self.held.bytes.saturating_sub(swept.bytes);
        }
        session.say(&ToSource::Ack(self.counts))?;
        session.flush()
    }
}

/// The stream with what is read ahead and what is not yet answered.
struct Session<'s, S> {
    stream: BufReader<&'s mut S>,
    answer: Vec<u8>,
}

impl<S: Read + Write> Session<'_, S> {
    fn say(&mut self, message: &ToSource) -> Result<(), TargetError> {
        message.encode(&mut self.answer);
        if self.answer.len() >= CHUNK {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn flush(&mut self) -> Result<(), TargetError> {
        let stream = self.stream.get_mut();
        let written = stream.write_all(&self.answer).and_then(|()| stream.flush());
        self.answer.clear();
        written.map_err(TargetError::Answer)
    }
}

fn timespec(time: Timestamp) -> Timespec {
    Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    }
}
