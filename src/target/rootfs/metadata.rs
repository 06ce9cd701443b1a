//! Owner, attributes, mode and time of one entry, in the order in which they do not undo each other:
//! chown(2) clears setuid and `security.capability`, an ACL rewrites the mode, everything moves the time.

use super::{TargetError, timespec};
use crate::wire::rootfs::{Entry, Kind, Timestamp, Xattr};
use rustix::fs::Timespec;
use rustix::fs::{
    AtFlags, Gid, Mode, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmod, chownat, futimens,
    llistxattr, lremovexattr, lsetxattr, utimensat,
};
use rustix::io::Errno;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `XATTR_LIST_MAX` of linux/limits.h.
const XATTR_LIST_MAX: usize = 64 << 10;

/// Labels that this host's security module puts on every new file by its own policy; where the source has
/// none they stay.
const LABELS: [&[u8]; 2] = [b"security.selinux", b"security.SMACK64"];

/// Makes the entry `name` of `parent` have the metadata of `entry`. `handle` is any handle of that inode
/// (also `O_PATH`). Directories keep their time.
pub(super) fn apply(
    parent: BorrowedFd<'_>,
    name: &[u8],
    handle: BorrowedFd<'_>,
    entry: &Entry,
) -> Result<(), TargetError> {
    let failed = |action| move |errno| TargetError::at(action, &entry.path, errno);
    let owner = (
        Some(Uid::from_raw(entry.owner.uid)),
        Some(Gid::from_raw(entry.owner.gid)),
    );
    chownat(parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("setting the owner of"))?;
    apply_xattrs(parent, name, &entry.xattrs).map_err(failed("setting the attributes of"))?;
    if !matches!(entry.kind, Kind::Symlink(_)) {
        // By the handle's entry in /proc: that leads to this very inode, and works for O_PATH handles, which
        // fchmod(2) refuses.
        chmod(
            format!("/proc/self/fd/{}", handle.as_raw_fd()),
            Mode::from_raw_mode(entry.mode.into()),
        )
        .map_err(failed("setting the mode of"))?;
    }
    if entry.kind != Kind::Directory {
        utimensat(
            parent,
            name,
            &modified(entry.mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(failed("setting the time of"))?;
    }
    Ok(())
}

/// Sets the modification time alone.
pub(super) fn set_mtime(handle: impl AsFd, mtime: Timestamp) -> Result<(), Errno> {
    futimens(handle, &modified(mtime))
}

fn modified(mtime: Timestamp) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: timespec(mtime),
    }
}

fn apply_xattrs(parent: BorrowedFd<'_>, name: &[u8], wanted: &[Xattr]) -> Result<(), Errno> {
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    // A new entry can have attributes too: a default ACL of its directory, a label.
    let present = present(&path)?;
    let surplus = present.split(|b| *b == 0).filter(|name| {
        Xattr::travels(name) && !LABELS.contains(name) && !wanted.iter().any(|x| x.name == *name)
    });
    for name in surplus {
        lremovexattr(&path, name)?;
    }
    for xattr in wanted {
        lsetxattr(
            &path,
            xattr.name.as_slice(),
            &xattr.value,
            XattrFlags::empty(),
        )?;
    }
    Ok(())
}

fn present(path: &CString) -> Result<Vec<u8>, Errno> {
    let mut names = [0u8; 1024];
    match llistxattr(path, &mut names[..]) {
        Ok(len) => Ok(names[..len].to_vec()),
        Err(Errno::NOTSUP) => Ok(Vec::new()),
        Err(Errno::RANGE) => {
            let mut names = vec![0; XATTR_LIST_MAX];
            let len = llistxattr(path, &mut names[..])?;
            names.truncate(len);
            Ok(names)
        }
        Err(errno) => Err(errno),
    }
}
