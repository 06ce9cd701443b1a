//! What a file looks like from outside, and the walk that collects it: one `statx` per entry.

use super::conversation::SourceError;
use super::tree::{DIRECTORY, SourceTree, gone};
use crate::wire::rootfs::{Owner, Timestamp, TreePath};
use rustix::fs::{
    AtFlags, CWD, OFlags, RawDir, Statx, StatxAttributes, StatxFlags, StatxTimestamp, makedev,
    statx,
};
use rustix::io::Errno;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

/// A file, whatever its names: what `stat` calls `st_dev` and `st_ino`. On overlayfs `/proc/PID/maps` shows
/// the numbers of a lower layer; `stat` of `/proc/PID/map_files/…` gives these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// `st_dev`, as `makedev(3)` packs it.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// Type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileType {
    Regular,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// Everything by which a change of an entry shows from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub id: FileId,
    pub file_type: FileType,
    pub mode: u16,
    pub owner: Owner,
    /// Bytes of a regular file, else 0 (a directory's says nothing about its content).
    pub size: u64,
    pub major: u32,
    pub minor: u32,
    pub mtime: Timestamp,
    /// No program can set it back, so equal stamps mean an untouched inode, within the clock's tick.
    pub ctime: Timestamp,
    /// Something is mounted here: the place is sent, but not what is in it.
    pub mount_point: bool,
}

/// An entry the scan wants looked at.
pub(super) struct Found {
    pub path: TreePath,
    pub stamp: Stamp,
}

impl Stamp {
    pub(super) fn at(
        directory: BorrowedFd<'_>,
        name: &CStr,
        flags: AtFlags,
    ) -> Result<Stamp, Errno> {
        seen_at(directory, name, flags).map(|(stamp, _)| stamp)
    }

    /// The stamp of what a link of /proc leads to; nothing is opened.
    pub(super) fn followed(link: impl rustix::path::Arg) -> Result<Stamp, Errno> {
        Stamp::new(&statx(
            CWD,
            link,
            AtFlags::NO_AUTOMOUNT,
            StatxFlags::BASIC_STATS,
        )?)
    }

    fn new(stat: &Statx) -> Result<Stamp, Errno> {
        let file_type = match rustix::fs::FileType::from_raw_mode(stat.stx_mode.into()) {
            rustix::fs::FileType::RegularFile => FileType::Regular,
            rustix::fs::FileType::Directory => FileType::Directory,
            rustix::fs::FileType::Symlink => FileType::Symlink,
            rustix::fs::FileType::Fifo => FileType::Fifo,
            rustix::fs::FileType::Socket => FileType::Socket,
            rustix::fs::FileType::CharacterDevice => FileType::CharDevice,
            rustix::fs::FileType::BlockDevice => FileType::BlockDevice,
            rustix::fs::FileType::Unknown => return Err(Errno::INVAL),
        };
        let mount_point = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        let regular = file_type == FileType::Regular && !mount_point;
        Ok(Stamp {
            id: FileId {
                device: makedev(stat.stx_dev_major, stat.stx_dev_minor),
                inode: stat.stx_ino,
            },
            file_type,
            mode: stat.stx_mode & 0o7777,
            owner: Owner {
                uid: stat.stx_uid,
                gid: stat.stx_gid,
            },
            size: if regular { stat.stx_size } else { 0 },
            major: stat.stx_rdev_major,
            minor: stat.stx_rdev_minor,
            mtime: timestamp(&stat.stx_mtime),
            ctime: timestamp(&stat.stx_ctime),
            mount_point,
        })
    }
}

/// An entry's stamp, and the 512-byte blocks it takes.
fn seen_at(directory: BorrowedFd<'_>, name: &CStr, flags: AtFlags) -> Result<(Stamp, u64), Errno> {
    let flags = flags | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = statx(directory, name, flags, StatxFlags::BASIC_STATS)?;
    Ok((Stamp::new(&stat)?, stat.stx_blocks))
}

fn timestamp(time: &StatxTimestamp) -> Timestamp {
    Timestamp {
        seconds: time.tv_sec,
        nanoseconds: time.tv_nsec,
    }
}

impl SourceTree {
    /// Calls `each` for every entry below the root, parents before children, with the 512-byte blocks it takes. What vanishes while it is
    /// looked at is left out. Returns how many entries there were.
    pub(super) fn walk(
        &self,
        mut each: impl FnMut(&[u8], &Stamp, u64) -> Result<(), SourceError>,
    ) -> Result<u64, SourceError> {
        let mut listing = vec![MaybeUninit::uninit(); 64 << 10];
        let mut ahead = vec![Vec::new()];
        let mut entries = 0;
        while let Some(directory) = ahead.pop() {
            let failed = |action, path: &[u8], errno| Err(SourceError::tree(action, path, errno));
            let opened = match self.open_beneath(&directory, DIRECTORY | OFlags::NOATIME) {
                Ok(opened) => opened,
                Err(errno) if gone(errno) => continue,
                Err(errno) => return failed("opening", &directory, errno),
            };
            let mut path = directory;
            if !path.is_empty() {
                path.push(b'/');
            }
            let prefix = path.len();
            let mut children = RawDir::new(&opened, &mut listing);
            while let Some(child) = children.next() {
                let child = match child {
                    Ok(child) => child,
                    // The directory was removed while it was listed.
                    Err(Errno::NOENT) => break,
                    Err(errno) => return failed("listing", &path, errno),
                };
                let name = child.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                path.truncate(prefix);
                path.extend_from_slice(name.to_bytes());
                let (stamp, blocks) = match seen_at(opened.as_fd(), name, AtFlags::empty()) {
                    Ok(seen) => seen,
                    Err(errno) if gone(errno) => continue,
                    Err(errno) => return failed("looking at", &path, errno),
                };
                entries += 1;
                each(&path, &stamp, blocks)?;
                if stamp.file_type == FileType::Directory && !stamp.mount_point {
                    ahead.push(path.clone());
                }
            }
        }
        Ok(entries)
    }
}
