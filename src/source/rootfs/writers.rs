//! Which files the container's tasks can change without a trace, looked up before a pass reads any of them.
//!
//! A store through a shared mapping shows in a file's times only when its page is faulted in for writing: after
//! that, and until the kernel has written the page back, stores leave no trace. A `write(2)` stamps the file when
//! it begins and may still be copying long after. So a pass first looks at every mapping and every descriptor:
//!
//! ```text
//!  the look begins ──▶ the look ends ──▶ a file's times are taken ──▶ it is read ──▶ … ──▶ the last pass
//!  └ faulted in, or write begun, before: the look finds the mapping or the descriptor, and the file is compared
//!                   └ after: its times are as young as the look, and the file is compared;
//!                                                 └ or they differ from those taken, and it is sent
//! ```
//!
//! Once found, a file is compared in every later pass; the last one needs no look, because what came after the look
//! before it shows in the times. What the look cannot see: a write under way through a descriptor that another
//! thread has closed since (such a file is also compared if it was changed in the last two seconds before the look),
//! and a mapping that `mremap(2)` moves from ahead of the look to behind it.

use super::scan::{FileId, FileType, Stamp};
use crate::kernel::file_table;
use crate::kernel::maps::shared_file_mappings;
use crate::kernel::mount_table::{Mount, unescaped};
use crate::kernel::ptrace::{living_thread, living_threads};
use rustix::fs::{AtFlags, CWD, StatxFlags, fstatfs, statat, statfs, statx};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// Lists the pids of the container's processes.
pub type ListTasks = Box<dyn Fn() -> io::Result<Vec<i32>> + Send>;

/// Listings after which a container that forks without end is taken as looked at: a mapping that escaped was handed
/// on so often by processes that all ended before their turn.
const MOST_LISTINGS: usize = 64;

/// How often the mappings of one process are read again because one of them went, or changed its ends, meanwhile.
const MOST_READINGS: usize = 32;

/// Regular files that may change without a trace in their times.
#[derive(Debug, Default)]
pub(super) struct Writers {
    /// All of them: the filesystem does not tell.
    pub(super) every_file: bool,
    files: BTreeSet<FileId>,
}

impl Writers {
    /// For a tree whose root is `root`.
    pub(super) fn of(root: BorrowedFd<'_>) -> Writers {
        Writers {
            every_file: !times_tell(root),
            files: BTreeSet::new(),
        }
    }

    pub(super) fn may_write(&self, id: &FileId) -> bool {
        self.every_file || self.files.contains(id)
    }

    /// Adds the files that the listed processes have open for writing, or mapped shared from such a descriptor.
    pub(super) fn look(&mut self, list: &ListTasks) -> io::Result<()> {
        if self.every_file {
            return Ok(());
        }
        let mut looked_at = BTreeSet::new();
        for _ in 0..MOST_LISTINGS {
            let mut born = list()?;
            born.retain(|pid| looked_at.insert(*pid));
            if born.is_empty() {
                break;
            }
            for pid in born {
                match self.look_at(pid) {
                    Err(error) if !is_gone(&error) => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn look_at(&mut self, pid: i32) -> io::Result<()> {
        // Of a process whose first thread has ended, the others still have the memory and the descriptors.
        let Ok(living) = living_thread(pid) else {
            return Ok(());
        };
        self.look_at_mappings(living)?;
        self.look_at_descriptors(living)?;
        for thread in living_threads(pid).unwrap_or_default() {
            if thread != living && !file_table::is_shared(living, thread) {
                self.look_at_descriptors(thread)?;
            }
        }
        Ok(())
    }

    /// Write protection is no protection: `mprotect(2)` gives a dirty page back without a fault.
    fn look_at_mappings(&mut self, pid: i32) -> io::Result<()> {
        let links = format!("/proc/{pid}/map_files");
        for _ in 0..MOST_READINGS {
            let mut changed = false;
            for (start, end) in shared_file_mappings(pid)? {
                let link = format!("{links}/{start:x}-{end:x}");
                match open_for_writing(Path::new(&link)) {
                    Ok(file) => self.files.extend(file),
                    Err(error) if is_gone(&error) => changed = true,
                    Err(error) => return Err(error),
                }
            }
            if !changed {
                break;
            }
        }
        Ok(())
    }

    fn look_at_descriptors(&mut self, thread: i32) -> io::Result<()> {
        for descriptor in fs::read_dir(format!("/proc/{thread}/fd"))? {
            match open_for_writing(&descriptor?.path()) {
                Ok(file) => self.files.extend(file),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The regular file behind a link in /proc whose own mode says that it was opened for writing. Nothing is opened:
/// that could break a lease or wait for a pipe's other end. And `stat` is asked for its numbers, because those that
/// /proc shows are other ones on btrfs and overlays.
fn open_for_writing(link: &Path) -> io::Result<Option<FileId>> {
    let opened = statat(CWD, link, AtFlags::SYMLINK_NOFOLLOW)?;
    if opened.st_mode & 0o200 == 0 {
        return Ok(None);
    }
    match Stamp::followed(link) {
        Ok(stamp) => Ok((stamp.file_type == FileType::Regular).then_some(stamp.id)),
        // Not every anonymous file has a type.
        Err(Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The process, the mapping or the descriptor is there no more.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ESRCH | libc::EBADF)
    )
}

/// Filesystems that stamp a file at the first store to a page of a shared mapping (`page_mkwrite`). Others let the
/// store pass unseen: tmpfs maps pages writable when they are read, FUSE and NFS leave the time to the server.
const STAMPED_BY_STORES: [i64; 4] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683e, // btrfs
    0xf2f5_2010, // f2fs
];

const OVERLAY: i64 = 0x794c_7630;

fn times_tell(root: BorrowedFd<'_>) -> bool {
    let tells = |kind: i64| STAMPED_BY_STORES.contains(&kind);
    match fstatfs(root) {
        // What is written lies in the upper directory.
        Ok(stat) if stat.f_type == OVERLAY => upper_directory(root)
            .and_then(|upper| statfs(&upper).ok())
            .is_some_and(|stat| tells(stat.f_type)),
        Ok(stat) => tells(stat.f_type),
        Err(_) => false,
    }
}

/// Where the overlay at `root` keeps what is written, if its mount says so by a path that can be looked up here.
fn upper_directory(root: BorrowedFd<'_>) -> Option<PathBuf> {
    let stat = statx(root, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    let mounts = Mount::list("thread-self").ok()?;
    let mount = mounts.iter().find(|mount| mount.id == stat.stx_mnt_id)?;
    let upper = mount
        .options
        .split(|byte| *byte == b',')
        .find_map(|option| option.strip_prefix(b"upperdir="))?;
    let upper = unescaped(upper);
    upper.is_absolute().then_some(upper)
}
