//! The processes of a container as the host sees them.

use crate::kernel::ptrace::living_thread;
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
        Ok(Some(Task {
            pid,
            vpid,
            start_time,
            zombie: matches!(*state, "Z" | "X") && living_thread(pid).is_err(),
        }))
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
    let mut pids = BTreeSet::new();
    collect_pids(cgroup, &mut pids)?;
    let mut tasks = Vec::with_capacity(pids.len());
    for pid in pids {
        tasks.extend(Task::read(pid)?);
    }
    Ok(tasks)
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
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
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
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_named_by_its_pid_and_start_time() {
        let me = Task::read(std::process::id().cast_signed())
            .unwrap()
            .unwrap();
        assert!(me.exists() && !me.zombie);
        let impostor = Task {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(!impostor.exists());
        assert_eq!(Task::read(i32::MAX).unwrap(), None);
    }
}
