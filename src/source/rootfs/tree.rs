//! Reading a tree that somebody else is changing, without ever leaving it.

use super::conversation::SourceError;
use super::scan::{FileType, Stamp};
use crate::wire::rootfs::{Entry, Kind, MAX_ENTRY, Placement, TreePath, Xattr};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, lgetxattr, llistxattr, openat, openat2, readlinkat,
};
use rustix::io::Errno;
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// How a directory is opened to list it.
pub(super) const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// A handle that names an inode without opening it: has no effect on devices and pipes.
const HANDLE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX` of linux/limits.h.
const XATTR_MAX: usize = 64 << 10;

/// The container's rootfs, held open.
pub(super) struct SourceTree {
    root: OwnedFd,
    /// The directory used last, with its path: entries come grouped by directory.
    parent: Option<(Vec<u8>, OwnedFd)>,
    xattrs: Vec<u8>,
}

impl SourceTree {
    pub(super) fn open(root: &Path) -> Result<SourceTree, SourceError> {
        let root =
            openat(CWD, root, DIRECTORY, Mode::empty()).map_err(|source| SourceError::Tree {
                action: "opening the root of",
                path: root.to_path_buf(),
                source,
            })?;
        Ok(SourceTree {
            root,
            parent: None,
            xattrs: vec![0; XATTR_MAX],
        })
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    pub(super) fn root_stamp(&self) -> Result<Stamp, SourceError> {
        Stamp::at(self.root.as_fd(), c"", AtFlags::EMPTY_PATH)
            // That the root itself is a mount (overlayfs) is no reason not to enter it.
            .map(|stamp| Stamp {
                mount_point: false,
                ..stamp
            })
            .map_err(|errno| SourceError::tree("looking at", b"", errno))
    }

    /// Opens a path without following a link or entering a mount anywhere on the way.
    pub(super) fn open_beneath(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        openat2(&self.root, path, flags, Mode::empty(), resolve)
    }

    /// The wire entry for what `stamp` saw at `path`, with link target and attributes as they are now;
    /// `None` if it is gone or something else by now.
    pub(super) fn entry(
        &mut self,
        path: &TreePath,
        stamp: &Stamp,
        placement: Placement,
    ) -> Result<Option<Entry>, SourceError> {
        let failed = |action, errno| SourceError::tree(action, path.as_bytes(), errno);
        self.enter_parent(path.as_bytes())
            .map_err(|errno| failed("opening the parent of", errno))?;
        let Some((_, parent)) = &self.parent else {
            return Ok(None);
        };
        let name = path.split().map_or(&b"."[..], |(_, name)| name);
        let kind = match stamp.file_type {
            FileType::Regular => Kind::Regular {
                size: stamp.size,
                placement,
            },
            FileType::Directory => Kind::Directory,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharDevice => Kind::CharDevice {
                major: stamp.major,
                minor: stamp.minor,
            },
            FileType::BlockDevice => Kind::BlockDevice {
                major: stamp.major,
                minor: stamp.minor,
            },
            FileType::Symlink => match readlinkat(parent, name, Vec::new()) {
                Ok(target) => Kind::Symlink(target.into_bytes()),
                // EINVAL: no longer a symlink.
                Err(errno) if gone(errno) || errno == Errno::INVAL => return Ok(None),
                Err(errno) => return Err(failed("reading the link", errno)),
            },
        };
        let xattrs = match xattrs(parent.as_fd(), name, &mut self.xattrs) {
            Ok(xattrs) => xattrs,
            Err(errno) if gone(errno) => return Ok(None),
            Err(errno) => return Err(failed("reading the attributes of", errno)),
        };
        let entry = Entry {
            path: path.clone(),
            kind,
            mode: stamp.mode,
            owner: stamp.owner,
            mtime: stamp.mtime,
            xattrs,
        };
        if entry.encoded_len() > MAX_ENTRY {
            return Err(SourceError::XattrsTooLarge(shown(path.as_bytes())));
        }
        Ok(Some(entry))
    }

    /// The regular file at `path`, with its stamp from before the first read; `None` if there is no regular file any
    /// more.
    pub(super) fn find_regular(
        &mut self,
        path: &TreePath,
    ) -> Result<Option<(FoundFile, Stamp)>, SourceError> {
        let failed = |action, errno| SourceError::tree(action, path.as_bytes(), errno);
        self.enter_parent(path.as_bytes())
            .map_err(|errno| failed("opening the parent of", errno))?;
        let (Some((_, parent)), Some((_, name))) = (&self.parent, path.split()) else {
            return Ok(None);
        };
        let handle = match openat(parent, name, HANDLE, Mode::empty()) {
            Ok(handle) => handle,
            Err(errno) if gone(errno) => return Ok(None),
            Err(errno) => return Err(failed("finding", errno)),
        };
        let stamp = Stamp::at(handle.as_fd(), c"", AtFlags::EMPTY_PATH)
            .map_err(|errno| failed("looking at", errno))?;
        let regular = stamp.file_type == FileType::Regular && !stamp.mount_point;
        Ok(regular.then_some((FoundFile(handle), stamp)))
    }

    /// Leaves the parent directory of `path` (the root, for the root) in `self.parent`, or `None` there if
    /// it is gone.
    fn enter_parent(&mut self, path: &[u8]) -> Result<(), Errno> {
        let parent = path
            .iter()
            .rposition(|b| *b == b'/')
            .map_or(&b""[..], |slash| &path[..slash]);
        if self.parent.as_ref().is_some_and(|(open, _)| open == parent) {
            return Ok(());
        }
        self.parent = None;
        match self.open_beneath(parent, DIRECTORY) {
            Ok(opened) => self.parent = Some((parent.to_vec(), opened)),
            Err(errno) if gone(errno) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Forgets the directory used last. A new pass must look its path up anew: by now it may lead elsewhere.
    pub(super) fn leave(&mut self) {
        self.parent = None;
    }
}

/// A regular file that was found and not opened.
pub(super) struct FoundFile(OwnedFd);

impl FoundFile {
    /// Opens it for reading: this very inode, whatever bears its name by now.
    pub(super) fn open(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOATIME | OFlags::NONBLOCK;
        let link = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        openat(CWD, link, flags, Mode::empty())
    }
}

/// All attributes that travel. Goes through the directory's entry in /proc because the calls that take a
/// directory handle (`listxattrat`, Linux 6.13) are too new; the last component is not followed.
fn xattrs(parent: BorrowedFd<'_>, name: &[u8], buffer: &mut [u8]) -> Result<Vec<Xattr>, Errno> {
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    let len = match llistxattr(&path, &mut *buffer) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Ok(len) => len,
        Err(errno) => return Err(errno),
    };
    let names: Vec<Vec<u8>> = buffer[..len]
        .split(|b| *b == 0)
        .map(<[u8]>::to_vec)
        .collect();
    let mut xattrs = Vec::new();
    for name in names.into_iter().filter(|name| Xattr::travels(name)) {
        match lgetxattr(&path, name.as_slice(), &mut *buffer) {
            Ok(len) => xattrs.push(Xattr {
                name,
                value: buffer[..len].to_vec(),
            }),
            // Removed since it was listed.
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(xattrs)
}

/// Whether the error means that the entry, or a directory on the way to it, is no longer what it was: gone
/// (also on a stale handle), not a directory any more, a symlink now, or mounted over.
pub(super) fn gone(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::STALE
    )
}

impl SourceError {
    pub(super) fn tree(action: &'static str, path: &[u8], source: Errno) -> SourceError {
        SourceError::Tree {
            action,
            path: shown(path),
            source,
        }
    }
}

pub(super) fn shown(path: &[u8]) -> PathBuf {
    PathBuf::from(if path.is_empty() {
        OsStr::new("/")
    } else {
        OsStr::from_bytes(path)
    })
}
