//! Making entries, and filling the one file that is open.

use super::beneath::{Beneath, open_beneath};
use super::{TargetError, metadata};
use crate::wire::rootfs::{CHUNK, ContentHash, Entry, Kind, TreePath};
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, Statx, StatxAttributes, StatxFlags, fallocate,
    ftruncate, linkat, makedev, mkdirat, mknodat, openat, statx, symlinkat,
};
use rustix::io::{Errno, pwrite};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Until its metadata is applied, nobody but root opens an entry.
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Unit of `st_blocks`.
const BLOCK: u64 = 512;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What the tree occupies and what it may, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Room {
    pub held: u64,
    pub limit: u64,
}

/// The regular file whose content is arriving.
pub(super) struct OpenFile {
    file: OwnedFd,
    entry: Entry,
    size: u64,
    hash: ContentHash,
    occupied_before: u64,
    /// How much it grew as of the last look, and how much was written since.
    grown: i64,
    unchecked: u64,
}

impl OpenFile {
    /// A new inode; the place must be free.
    pub(super) fn create(
        tree: &mut Beneath,
        entry: Entry,
        size: u64,
    ) -> Result<OpenFile, TargetError> {
        let (parent, name) = tree.place(&entry.path)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(parent, name, flags, PRIVATE)
            .map_err(|e| TargetError::at("creating", &entry.path, e))?;
        OpenFile::sized(file, entry, size, 0)
    }

    /// The regular file that is there.
    pub(super) fn update(
        tree: &mut Beneath,
        entry: Entry,
        size: u64,
    ) -> Result<OpenFile, TargetError> {
        let (parent, name) = tree.place(&entry.path)?;
        let stat = look(parent, name).map_err(|e| TargetError::at("looking at", &entry.path, e))?;
        if !is_regular(&stat) {
            return Err(TargetError::WrongType { path: entry.path });
        }
        let file = open_beneath(parent, name, OFlags::WRONLY | OFlags::NONBLOCK)
            .map_err(|e| TargetError::at("opening", &entry.path, e))?;
        OpenFile::sized(file, entry, size, stat.stx_blocks * BLOCK)
    }

    fn sized(
        file: OwnedFd,
        entry: Entry,
        size: u64,
        occupied_before: u64,
    ) -> Result<OpenFile, TargetError> {
        ftruncate(&file, size)
            .map_err(|e| TargetError::at("setting the size of", &entry.path, e))?;
        let hash = ContentHash::new();
        Ok(OpenFile {
            file,
            entry,
            size,
            hash,
            occupied_before,
            grown: 0,
            unchecked: 0,
        })
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), TargetError> {
        self.check_span(offset, bytes.len() as u64)?;
        self.hash.data(offset, bytes);
        self.fill(offset, bytes)
    }

    pub(super) fn punch(&mut self, offset: u64, len: u64, room: Room) -> Result<(), TargetError> {
        self.check_span(offset, len)?;
        self.hash.hole(offset, len);
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Only whole blocks are freed, and the last one of the file is whole if it is taken beyond its end.
        let reach = if offset + len == self.size {
            len + CHUNK as u64
        } else {
            len
        };
        match fallocate(&self.file, mode, offset, reach) {
            Ok(()) => Ok(()),
            // This filesystem keeps no holes: the content is what counts.
            Err(Errno::OPNOTSUPP) => {
                let end = offset + len;
                let mut at = offset;
                while at < end {
                    let step = (end - at).min(ZEROS.len() as u64);
                    self.fill(at, &ZEROS[..step as usize])?;
                    self.check_room(room)?;
                    at += step;
                }
                Ok(())
            }
            Err(errno) => Err(TargetError::at(
                "punching a hole into",
                &self.entry.path,
                errno,
            )),
        }
    }

    /// Refuses to go on once the tree occupies more than it may. The file is only asked for its blocks when
    /// what was written could exceed the limit.
    pub(super) fn check_room(&mut self, room: Room) -> Result<(), TargetError> {
        let occupied = |grown: i64, unchecked: u64| {
            room.held
                .saturating_add_signed(grown)
                .saturating_add(unchecked)
        };
        if occupied(self.grown, self.unchecked) <= room.limit {
            return Ok(());
        }
        (self.grown, self.unchecked) = (self.growth()?, 0);
        if occupied(self.grown, 0) <= room.limit {
            return Ok(());
        }
        Err(TargetError::TooManyBytes {
            path: self.entry.path.clone(),
            limit: room.limit,
        })
    }

    /// Checks the content against its hash and gives the file its metadata; returns by how many bytes on
    /// disk it grew.
    pub(super) fn close(self, tree: &mut Beneath, hash: u128) -> Result<i64, TargetError> {
        if self.hash.finish() != hash {
            return Err(TargetError::Corrupt {
                path: self.entry.path,
            });
        }
        let (parent, name) = tree.place(&self.entry.path)?;
        metadata::apply(parent, name, self.file.as_fd(), &self.entry)?;
        self.growth()
    }

    fn growth(&self) -> Result<i64, TargetError> {
        let stat = look(self.file.as_fd(), b"")
            .map_err(|e| TargetError::at("looking at", &self.entry.path, e))?;
        Ok((stat.stx_blocks * BLOCK) as i64 - self.occupied_before as i64)
    }

    fn check_span(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(TargetError::BeyondEnd {
                path: self.entry.path.clone(),
                offset,
                size: self.size,
            }),
        }
    }

    fn fill(&mut self, offset: u64, bytes: &[u8]) -> Result<(), TargetError> {
        let mut done = 0;
        while done < bytes.len() {
            match pwrite(&self.file, &bytes[done..], offset + done as u64) {
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(TargetError::at("writing", &self.entry.path, errno)),
            }
        }
        self.unchecked += bytes.len() as u64;
        Ok(())
    }
}

/// Makes the directory, private until [`describe_directory`].
pub(super) fn make_directory(tree: &mut Beneath, entry: &Entry) -> Result<(), TargetError> {
    let (parent, name) = tree.place(&entry.path)?;
    mkdirat(parent, name, Mode::RWXU)
        .map_err(|e| TargetError::at("making the directory", &entry.path, e))
}

/// Gives a directory everything but its time.
pub(super) fn describe_directory(tree: &mut Beneath, entry: &Entry) -> Result<(), TargetError> {
    let directory = tree.open_directory(&entry.path)?;
    let (parent, name) = tree.place(&entry.path)?;
    metadata::apply(parent, name, directory.as_fd(), entry)
}

/// Makes a symlink, pipe, socket or device.
pub(super) fn make_special(tree: &mut Beneath, entry: &Entry) -> Result<(), TargetError> {
    let (parent, name) = tree.place(&entry.path)?;
    let node = |file_type, device| mknodat(parent, name, file_type, PRIVATE, device);
    let made = match &entry.kind {
        Kind::Symlink(target) => symlinkat(target.as_slice(), parent, name),
        Kind::Fifo => node(FileType::Fifo, 0),
        Kind::Socket => node(FileType::Socket, 0),
        Kind::CharDevice { major, minor } => {
            node(FileType::CharacterDevice, makedev(*major, *minor))
        }
        Kind::BlockDevice { major, minor } => node(FileType::BlockDevice, makedev(*major, *minor)),
        Kind::Regular { .. } | Kind::Directory => Err(Errno::INVAL),
    };
    made.map_err(|e| TargetError::at("making", &entry.path, e))?;
    let handle = openat(
        parent,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| TargetError::at("finding", &entry.path, e))?;
    metadata::apply(parent, name, handle.as_fd(), entry)
}

/// Refuses directories and mounts as the origin of a hard link.
pub(super) fn check_linkable(tree: &mut Beneath, existing: &TreePath) -> Result<(), TargetError> {
    let (parent, name) = tree.place(existing)?;
    let stat = look(parent, name).map_err(|e| TargetError::at("looking at", existing, e))?;
    let mounted = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    if mounted || FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory {
        return Err(TargetError::WrongType {
            path: existing.clone(),
        });
    }
    Ok(())
}

/// Makes `path`, which must be free, a further name of `existing`.
pub(super) fn link(
    tree: &mut Beneath,
    path: &TreePath,
    existing: &TreePath,
) -> Result<(), TargetError> {
    let (from, old) = tree.place(existing)?;
    // Two parents are needed at once, and the tree keeps one open.
    let from = from.try_clone_to_owned().map_err(|e| {
        TargetError::at(
            "opening the parent of",
            existing,
            Errno::from_io_error(&e).unwrap_or(Errno::IO),
        )
    })?;
    let (to, new) = tree.place(path)?;
    linkat(&from, old, to, new, AtFlags::empty()).map_err(|e| TargetError::at("linking", path, e))
}

/// Opens the file at `path` for reading if it is a regular one with content and no second name.
pub(super) fn open_reusable(
    tree: &mut Beneath,
    path: &TreePath,
) -> Result<Option<(OwnedFd, u64)>, TargetError> {
    let (parent, name) = match tree.place(path) {
        Ok(place) => place,
        // Not there, so not reusable.
        Err(TargetError::Unreachable { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let stat = match look(parent, name) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(TargetError::at("looking at", path, errno)),
    };
    if !is_regular(&stat) || stat.stx_nlink != 1 || stat.stx_size == 0 {
        return Ok(None);
    }
    let file = open_beneath(
        parent,
        name,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME,
    )
    .map_err(|e| TargetError::at("opening", path, e))?;
    Ok(Some((file, stat.stx_size)))
}

fn look(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Statx, Errno> {
    let empty = if name.is_empty() {
        AtFlags::EMPTY_PATH
    } else {
        AtFlags::empty()
    };
    statx(
        directory,
        name,
        AtFlags::SYMLINK_NOFOLLOW | empty,
        StatxFlags::BASIC_STATS,
    )
}

fn is_regular(stat: &Statx) -> bool {
    FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile
        && !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
}
