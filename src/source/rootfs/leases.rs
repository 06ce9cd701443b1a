//! Files under a lease (`F_SETLEASE`, fcntl(2)), and how to read them all the same.
//!
//! To open such a file tells its holder to let go of it, by a signal that kills a process which does not expect it;
//! `O_NONBLOCK` spares the opener the wait, not the holder the signal. To read through a descriptor that is open
//! already tells nobody. So each file is asked about before it is opened, and one under a lease is read through a
//! duplicate of its holder's descriptor, whose position is shared and left alone.
//!
//! `/proc/locks` says that there are leases, but its inode numbers are not those of `stat` on btrfs and overlays: which
//! files they are is found at the descriptors, and only when the leases have changed.

use super::scan::{FileId, Stamp};
use super::writers::ListTasks;
use crate::kernel::pidfd::Pidfd;
use rustix::fs::{AtFlags, OFlags, fcntl_getfl};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How old an answer may be. A lease taken since would be broken; a holder that comes and goes so fast expects that.
const FRESH: Duration = Duration::from_millis(2);

/// A descriptor that a lease was taken with.
#[derive(Debug, Clone, Copy)]
struct Holder {
    pid: i32,
    descriptor: i32,
}

/// The leases on the container's files.
#[derive(Debug, Default)]
pub(super) struct Leases {
    asked: Option<Instant>,
    /// The lines of `/proc/locks` that the holders were looked up for.
    lines: Vec<String>,
    holders: BTreeMap<FileId, Holder>,
}

/// How a file can be opened.
pub(super) enum Access {
    /// As any other.
    Free,
    /// Through this descriptor, whose position is somebody else's.
    Through(OwnedFd),
    /// Not at all: its holder cannot read it either.
    Unreadable,
}

impl Leases {
    /// How to open `file`.
    pub(super) fn access(&mut self, file: FileId, tasks: &ListTasks) -> io::Result<Access> {
        self.refresh(tasks, false)?;
        if !self.holders.contains_key(&file) {
            return Ok(Access::Free);
        }
        // A descriptor may have been given away or closed, its lease with it.
        for again in [false, true] {
            self.refresh(tasks, again)?;
            let Some(holder) = self.holders.get(&file) else {
                return Ok(Access::Free);
            };
            let Some(descriptor) = holder.descriptor_of(file) else {
                continue;
            };
            let mode = fcntl_getfl(&descriptor)? & OFlags::RWMODE;
            return Ok(match mode {
                OFlags::WRONLY => Access::Unreadable,
                _ => Access::Through(descriptor),
            });
        }
        Ok(Access::Unreadable)
    }

    fn refresh(&mut self, tasks: &ListTasks, anyway: bool) -> io::Result<()> {
        if !anyway && self.asked.is_some_and(|asked| asked.elapsed() < FRESH) {
            return Ok(());
        }
        let locks = fs::read_to_string("/proc/locks")?;
        let lines: Vec<String> = locks
            .lines()
            .filter(|line| line.contains(" LEASE "))
            .map(str::to_owned)
            .collect();
        if anyway || lines != self.lines {
            self.holders.clear();
            if !lines.is_empty() {
                // Also those who are not in the container: a file server of this host may hold one.
                let named = lines.iter().filter_map(|line| pid_of(line));
                let pids: BTreeSet<i32> = tasks()?.into_iter().chain(named).collect();
                for pid in pids {
                    self.look_up(pid);
                }
            }
            self.lines = lines;
        }
        self.asked = Some(Instant::now());
        Ok(())
    }

    fn look_up(&mut self, pid: i32) {
        // A process that ends has its leases taken from it.
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else {
            return;
        };
        for descriptor in descriptors.flatten() {
            let Some(number) = descriptor
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let info = fs::read_to_string(descriptor.path()).unwrap_or_default();
            let mut locks = info.lines().filter(|line| line.starts_with("lock:"));
            if !locks.any(is_broken_by_reading) {
                continue;
            }
            let link = format!("/proc/{pid}/fd/{number}");
            if let Ok(stamp) = Stamp::followed(&link) {
                let holder = Holder {
                    pid,
                    descriptor: number,
                };
                self.holders.insert(stamp.id, holder);
            }
        }
    }
}

impl Holder {
    /// The descriptor, if it still is one of `file`.
    fn descriptor_of(&self, file: FileId) -> Option<OwnedFd> {
        let descriptor = Pidfd::open(self.pid).ok()?.getfd(self.descriptor).ok()?;
        let stamp = Stamp::at(descriptor.as_fd(), c"", AtFlags::EMPTY_PATH).ok()?;
        (stamp.id == file).then_some(descriptor)
    }
}

/// `lock: 1: LEASE  ACTIVE    WRITE 123 08:01:456 0 EOF`: only a lease for reading that is not being broken lets others
/// read.
fn is_broken_by_reading(line: &str) -> bool {
    line.contains(" LEASE ") && !(line.contains(" ACTIVE ") && line.contains(" READ "))
}

/// The process that a line of `/proc/locks` names; 0 or less if this namespace has no number for it.
fn pid_of(line: &str) -> Option<i32> {
    let mut fields = line
        .split_whitespace()
        .skip_while(|field| *field != "LEASE");
    fields.nth(3)?.parse().ok().filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_locks_names_the_holder_and_says_whether_readers_are_in_its_way() {
        let write = "3: LEASE  ACTIVE    WRITE 1234 08:01:5678 0 EOF";
        assert_eq!(pid_of(write), Some(1234));
        assert!(is_broken_by_reading(write));
        assert!(!is_broken_by_reading(
            "lock:\t3: LEASE  ACTIVE    READ  1234 08:01:5678 0 EOF"
        ));
        assert!(is_broken_by_reading(
            "lock:\t3: LEASE  BREAKING  READ  1234 08:01:5678 0 EOF"
        ));
        assert_eq!(pid_of("3: LEASE  BREAKER   UNLCK 0 08:01:5678 0 EOF"), None);
    }
}
