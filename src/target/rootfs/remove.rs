//! Removing received trees, whole or in part: never through a symlink, never into a mount.
//!
//! A tree with something mounted inside is refused before anything in it is removed: what is mounted may
//! be somebody's data (a volume of the container), and whoever mounted it has to take it away.

use super::beneath::open_beneath;
use super::metadata::set_mtime;
use crate::wire::rootfs::Timestamp;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, Statx, StatxAttributes, StatxFlags, openat,
    statx, unlinkat,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);
/// Unit of `st_blocks`.
const BLOCK: u64 = 512;

/// Why a tree could not be removed.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// Nothing was removed. The path is that of the mount, relative to what was to be removed.
    #[error("something is mounted at {0:?}: unmount it first")]
    Mounted(PathBuf),
    /// A call failed; part of the tree may be gone.
    #[error("{action} {path:?}")]
    Filesystem {
        /// What was being done.
        action: &'static str,
        /// To which entry, relative to what was to be removed.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
}

/// What was in a tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// Entries, the top included.
    pub entries: u64,
    /// Bytes on disk of files that had no other name.
    pub bytes: u64,
    /// Whether a directory was among the entries.
    pub directories: bool,
}

/// Removes the tree (or file) at `path`; a symlink there is removed, not followed. That nothing is there is
/// no error, so that a clean-up can be repeated. `path` itself, up to its last component, is trusted.
pub fn remove_tree(path: &Path) -> Result<Removed, RemoveError> {
    let name = path
        .file_name()
        .ok_or_else(|| failed("removing", path.as_os_str().as_bytes())(Errno::INVAL))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let parent = match openat(CWD, parent, DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(parent) => parent,
        Err(Errno::NOENT) => return Ok(Removed::default()),
        Err(errno) => return Err(failed("opening", parent.as_os_str().as_bytes())(errno)),
    };
    remove_at(parent.as_fd(), name.as_bytes())
}

/// Removes the entry `name` of `parent` with everything below it, if it is there.
pub(super) fn remove_at(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Removed, RemoveError> {
    let stat = match look(parent, name) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(Removed::default()),
        Err(errno) => return Err(failed("looking at", name)(errno)),
    };
    refuse_mount(&stat, name)?;
    let mut removed = Removed::default();
    let top_entry = Surveyed::new(Vec::new(), &stat);
    removed.count(&top_entry);
    if !top_entry.directory {
        unlinkat(parent, name, AtFlags::empty()).map_err(failed("removing", name))?;
        return Ok(removed);
    }
    let top = open_beneath(parent, name, DIRECTORY).map_err(failed("opening", name))?;
    let survey = Survey::of(top.as_fd())?;
    survey.entries.iter().for_each(|entry| removed.count(entry));
    // Children were found after their directory, so from the back every directory is empty when it is due.
    for entry in survey.entries.iter().rev() {
        remove_surveyed(top.as_fd(), entry)?;
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(failed("removing", name))?;
    Ok(removed)
}

/// What is in the tree below `root`, which is not counted itself.
pub(super) fn census(root: BorrowedFd<'_>) -> Result<Removed, RemoveError> {
    let mut found = Removed::default();
    Survey::of(root)?
        .entries
        .iter()
        .for_each(|entry| found.count(entry));
    Ok(found)
}

/// Removes every entry below `root` that is `surplus`, and leaves the times of the directories they were in
/// as they are. Whatever is below a surplus directory must be surplus too.
pub(super) fn sweep(
    root: BorrowedFd<'_>,
    surplus: impl Fn(&[u8]) -> bool,
) -> Result<Removed, RemoveError> {
    let survey = Survey::of(root)?;
    let mut removed = Removed::default();
    for entry in survey
        .entries
        .iter()
        .rev()
        .filter(|entry| surplus(&entry.path))
    {
        let (parent, _) = split(&entry.path);
        let directory = open_beneath(root, parent, DIRECTORY).map_err(failed("opening", parent))?;
        let before = look(directory.as_fd(), b".")
            .map_err(failed("looking at", parent))?
            .stx_mtime;
        remove_surveyed(root, entry)?;
        removed.count(entry);
        let mtime = Timestamp {
            seconds: before.tv_sec,
            nanoseconds: before.tv_nsec,
        };
        set_mtime(&directory, mtime).map_err(failed("setting the time of", parent))?;
    }
    Ok(removed)
}

/// Everything below a directory, parents before children.
struct Survey {
    entries: Vec<Surveyed>,
}

/// Five million of them may be held at once, so it keeps what is needed of the stat.
struct Surveyed {
    path: Vec<u8>,
    directory: bool,
    /// On disk, if this is the only name.
    bytes: u64,
}

impl Survey {
    fn of(top: BorrowedFd<'_>) -> Result<Survey, RemoveError> {
        let mut listing = vec![MaybeUninit::uninit(); 64 << 10];
        let mut entries: Vec<Surveyed> = Vec::new();
        let mut ahead = vec![Vec::new()];
        while let Some(path) = ahead.pop() {
            let shown: &[u8] = if path.is_empty() { b"." } else { &path };
            let directory =
                open_beneath(top, shown, DIRECTORY).map_err(failed("opening", shown))?;
            let mut children = RawDir::new(&directory, &mut listing);
            while let Some(child) = children.next() {
                let child = child.map_err(failed("listing", shown))?;
                let name = child.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let child_path = if path.is_empty() {
                    name.to_vec()
                } else {
                    [&path, name].join(&b'/')
                };
                let stat =
                    look(directory.as_fd(), name).map_err(failed("looking at", &child_path))?;
                refuse_mount(&stat, &child_path)?;
                if is_directory(&stat) {
                    ahead.push(child_path.clone());
                }
                entries.push(Surveyed::new(child_path, &stat));
            }
        }
        Ok(Survey { entries })
    }
}

impl Surveyed {
    fn new(path: Vec<u8>, stat: &Statx) -> Surveyed {
        let bytes = if stat.stx_nlink == 1 {
            stat.stx_blocks * BLOCK
        } else {
            0
        };
        Surveyed {
            path,
            directory: is_directory(stat),
            bytes,
        }
    }
}

impl Removed {
    fn count(&mut self, entry: &Surveyed) {
        self.entries += 1;
        self.directories |= entry.directory;
        self.bytes += entry.bytes;
    }
}

fn remove_surveyed(top: BorrowedFd<'_>, entry: &Surveyed) -> Result<(), RemoveError> {
    let (parent, name) = split(&entry.path);
    let directory = open_beneath(top, parent, DIRECTORY).map_err(failed("opening", parent))?;
    let flags = if entry.directory {
        AtFlags::REMOVEDIR
    } else {
        AtFlags::empty()
    };
    unlinkat(&directory, name, flags).map_err(failed("removing", &entry.path))
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b".", path),
    }
}

fn look(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Statx, Errno> {
    statx(
        directory,
        name,
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT,
        StatxFlags::BASIC_STATS,
    )
}

fn is_directory(stat: &Statx) -> bool {
    FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory
}

fn refuse_mount(stat: &Statx, path: &[u8]) -> Result<(), RemoveError> {
    if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(RemoveError::Mounted(PathBuf::from(OsStr::from_bytes(path))));
    }
    Ok(())
}

fn failed(action: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> RemoveError {
    let path = PathBuf::from(OsStr::from_bytes(path));
    move |source| match source {
        // The kernel's word for a mount that statx did not show.
        Errno::XDEV | Errno::BUSY => RemoveError::Mounted(path),
        _ => RemoveError::Filesystem {
            action,
            path,
            source,
        },
    }
}
