//! The one place where a path from the peer becomes a directory handle, and it cannot leave the tree.
//!
//! The kernel does the resolving (`openat2(2)`): beneath the root, through no symlink, into no mount. What
//! is done to the last component never follows it. Nobody else writes to the tree, so a handle that was
//! right stays right until this end itself removes a directory ([`Beneath::leave`]).

use super::TargetError;
use crate::wire::rootfs::TreePath;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, openat2, statx,
};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// The received tree, held open.
pub(super) struct Beneath {
    root: OwnedFd,
    /// The directory used last, with its path: entries come grouped by directory.
    parent: Option<(Vec<u8>, OwnedFd)>,
}

impl Beneath {
    pub(super) fn new(root: OwnedFd) -> Beneath {
        Beneath { root, parent: None }
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The directory that holds `path`, and its name there; `None` for the root.
    pub(super) fn parent<'p>(
        &mut self,
        path: &'p TreePath,
    ) -> Result<Option<(BorrowedFd<'_>, &'p [u8])>, TargetError> {
        let Some((parent, name)) = path.split() else {
            return Ok(None);
        };
        if parent.is_empty() {
            return Ok(Some((self.root.as_fd(), name)));
        }
        if self.parent.as_ref().is_none_or(|(open, _)| open != parent) {
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let opened = open_beneath(self.root.as_fd(), parent, flags).map_err(|source| {
                TargetError::Unreachable {
                    path: path.clone(),
                    source,
                }
            })?;
            self.parent = Some((parent.to_vec(), opened));
        }
        Ok(self.parent.as_ref().map(|(_, open)| (open.as_fd(), name)))
    }

    /// The directory to give to `*at` calls with the name to use there: for the root itself, its dot.
    pub(super) fn place<'p>(
        &mut self,
        path: &'p TreePath,
    ) -> Result<(BorrowedFd<'_>, &'p [u8]), TargetError> {
        if path.is_root() {
            return Ok((self.root.as_fd(), b"."));
        }
        self.parent(path)?
            .ok_or_else(|| TargetError::WrongType { path: path.clone() })
    }

    pub(super) fn open_directory(&self, path: &TreePath) -> Result<OwnedFd, TargetError> {
        let bytes = if path.is_root() {
            b"."
        } else {
            path.as_bytes()
        };
        open_beneath(self.root.as_fd(), bytes, OFlags::RDONLY | OFlags::DIRECTORY).map_err(
            |source| TargetError::Unreachable {
                path: path.clone(),
                source,
            },
        )
    }

    /// Whether a directory of this tree is at `path`; a mounted one is refused.
    pub(super) fn is_directory(&mut self, path: &TreePath) -> Result<bool, TargetError> {
        let (parent, name) = self.place(path)?;
        let stat = match statx(parent, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(false),
            Err(errno) => return Err(TargetError::at("looking at", path, errno)),
        };
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) && !path.is_root() {
            return Err(TargetError::Unreachable {
                path: path.clone(),
                source: Errno::XDEV,
            });
        }
        Ok(FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory)
    }

    /// Forgets the directory used last, which may have been removed.
    pub(super) fn leave(&mut self) {
        self.parent = None;
    }
}

/// Opens `path` below `root` without following a symlink or crossing a mount, the last component included.
pub(super) fn open_beneath(
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    openat2(
        root,
        path,
        flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        RESOLVE,
    )
}
