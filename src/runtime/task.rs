//! The processes of a container as the host sees them.

use crate::kernel::pidfd::{Pidfd, PidfdError};
use crate::kernel::ptrace::living_thread;
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

/// One process (thread group) of the container at the moment it was listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id in the agent's pid namespace.
    pub pid: i32,
    /// Process id in the container's innermost pid namespace (`NSpid` in `/proc/PID/status`): CRIU's name for it.
    pub vpid: i32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`): with the pid it names one process for ever.
    pub start_time: u64,
    /// The process has exited, with all its threads, and waits to be reaped; it has no memory.
    pub zombie: bool,
}

impl Task {
    /// The task that a record names: to be asked whether it is still there, not to be read.
    pub fn on_record(pid: i32, start_time: u64) -> Task {
        Task {
            pid,
            vpid: pid,
            start_time,
            zombie: false,
        }
    }

    /// The process `pid`, or `None` if it is gone.
    pub fn read(pid: i32) -> io::Result<Option<Task>> {
        let process = Path::new("/proc").join(pid.to_string());
        let (Some(stat), Some(status)) =
            (read(&process.join("stat"))?, read(&process.join("status"))?)
        else {
            return Ok(None);
        };
        let malformed = || {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid} does not read as expected"),
            )
        };
        // The command name may hold spaces and parentheses; nothing after it does.
        let (_, after_name) = stat.rsplit_once(')').ok_or_else(malformed)?;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let state = fields.first().ok_or_else(malformed)?;
        let start_time = fields
            .get(19)
            .and_then(|field| field.parse().ok())
            .ok_or_else(malformed)?;
        let vpid = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .and_then(|pids| pids.split_whitespace().next_back()?.parse().ok())
            .ok_or_else(malformed)?;
        // It was reaped while its status was being written.
        if vpid == 0 {
            return Ok(None);
        }
        Ok(Some(Task {
            pid,
            vpid,
            start_time,
            zombie: matches!(*state, "Z" | "X") && living_thread(pid).is_err(),
        }))
    }

    /// Sends SIGKILL to this very process, never to a later one with its pid. One that is gone is no error.
    pub fn kill(&self) -> Result<(), PidfdError> {
        self.signal(Signal::SIGKILL)
    }

    /// The same with another signal.
    pub fn signal(&self, signal: Signal) -> Result<(), PidfdError> {
        match Pidfd::open(self.pid) {
            // The descriptor is of this process if the pid was still its own after it was opened.
            Ok(process) if self.exists() => match process.send_signal(signal) {
                Err(PidfdError::Exited { .. }) => Ok(()),
                sent => sent,
            },
            Ok(_) | Err(PidfdError::Exited { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether this very process, not a later one with its pid, still exists.
    pub fn exists(&self) -> bool {
        matches!(Task::read(self.pid), Ok(Some(now)) if now.start_time == self.start_time)
    }
}

/// Every process in the cgroup and in the cgroups below it, in ascending order of pid.
///
/// Processes that exit meanwhile are left out; ones that are born meanwhile may be missed, so the list is final only
/// while the container is frozen.
pub fn tasks_of_cgroup(cgroup: &Path) -> io::Result<Vec<Task>> {
    let pids = pids_of_cgroup(cgroup)?;
    let mut tasks = Vec::with_capacity(pids.len());
    for pid in pids {
        tasks.extend(Task::read(pid)?);
    }
    Ok(tasks)
}

/// The pids of [`tasks_of_cgroup`], of which nothing else is looked at.
pub fn pids_of_cgroup(cgroup: &Path) -> io::Result<BTreeSet<i32>> {
    let mut pids = BTreeSet::new();
    collect_pids(cgroup, &mut pids)?;
    Ok(pids)
}

/// Every thread in the cgroup and in the cgroups below it.
pub fn threads_of_cgroup(cgroup: &Path) -> io::Result<Vec<i32>> {
    // cgroup v2, v1.
    let listed = match fs::read_to_string(cgroup.join("cgroup.threads")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::read_to_string(cgroup.join("tasks"))?
        }
        listed => listed?,
    };
    let mut threads: Vec<i32> = listed
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|&tid| tid > 0)
        .collect();
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match threads_of_cgroup(&entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                below => threads.extend(below.unwrap_or_default()),
            }
        }
    }
    Ok(threads)
}

fn collect_pids(cgroup: &Path, pids: &mut BTreeSet<i32>) -> io::Result<()> {
    let listed = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    // A process of another pid namespace shows as 0.
    pids.extend(
        listed
            .lines()
            .filter_map(|line| line.parse::<i32>().ok())
            .filter(|&pid| pid > 0),
    );
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match collect_pids(&entry.path(), pids) {
                Err(error) if !is_gone(&error) => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// The file's text, or `None` if the process it belongs to is gone.
fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a file of a process or a cgroup could not be read because that has gone, before it was opened (ENOENT) or since (ESRCH,
/// ENODEV).
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me_again() -> Task {
        Task::read(std::process::id().cast_signed())
            .unwrap()
            .unwrap()
    }

    #[test]
    fn a_process_is_named_by_its_pid_and_start_time() {
        let me = me_again();
        assert!(me.exists() && !me.zombie);
        let impostor = Task {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(!impostor.exists());
        impostor.kill().expect("nobody is killed");
        assert!(me_again().exists());
        assert_eq!(Task::read(i32::MAX).unwrap(), None);
    }
}
