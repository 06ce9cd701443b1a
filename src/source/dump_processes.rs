//! The processes of one dump: the runtime, CRIU with what it forks, and their hooks.
//!
//! They are a process group of their own, led by the runtime. A group's number may be another's once its processes are
//! gone, so each one proves itself: the runtime by its start time, the others by the directory they work in, which is
//! the migration's and below which nobody else has a reason to be.

use crate::runtime::Task;
use nix::sys::signal::Signal;
use std::fs;
use std::path::{Path, PathBuf};

/// What the processes of a dump are known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpProcesses {
    runtime: Task,
    work_dir: PathBuf,
}

impl DumpProcesses {
    /// Those led by the process `runtime`, of the migration that works in `work_dir`.
    pub fn new(runtime: Task, work_dir: &Path) -> DumpProcesses {
        DumpProcesses {
            runtime,
            work_dir: work_dir.to_path_buf(),
        }
    }

    /// Those that live, zombies left out.
    pub fn living(&self) -> Vec<Task> {
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        let pids = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|&pid| group_of(pid) == Some(self.runtime.pid))
            .filter_map(|pid| Task::read(pid).ok().flatten())
            .filter(|task| !task.zombie && self.is_ours(task))
            .collect()
    }

    /// Kills what lives of them; returns whether that was anything.
    pub fn kill(&self) -> bool {
        let living = self.living();
        for task in &living {
            tracing::warn!(pid = task.pid, "a process of the dump does not end: killed");
            let _ = task.kill();
        }
        !living.is_empty()
    }

    /// Continues what somebody has stopped of them. CRIU alone can let go of a task that it has changed in part: killed then, it
    /// takes the task with it.
    pub fn wake(&self) {
        for task in self.living() {
            let _ = task.signal(Signal::SIGCONT);
        }
    }

    fn is_ours(&self, task: &Task) -> bool {
        if task.pid == self.runtime.pid {
            return task.start_time == self.runtime.start_time;
        }
        fs::read_link(format!("/proc/{}/cwd", task.pid))
            .is_ok_and(|directory| directory.starts_with(&self.work_dir))
    }
}

fn group_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // State, parent, group.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    fn sleeper(directory: &Path, group: i32) -> Child {
        let mut command = Command::new("sleep");
        command
            .arg("600")
            .current_dir(directory)
            .process_group(group);
        command.spawn().expect("sleep")
    }

    fn task(child: &Child) -> Task {
        let task = Task::read(child.id().cast_signed());
        task.expect("readable").expect("there")
    }

    #[test]
    fn only_what_works_for_the_dump_is_killed() {
        let (work, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut runtime = sleeper(work.path(), 0);
        let group = runtime.id().cast_signed();
        let mut criu = sleeper(work.path(), group);
        let mut stranger = sleeper(elsewhere.path(), group);
        let mut other = sleeper(work.path(), 0);
        let processes = DumpProcesses::new(task(&runtime), work.path());
        let mut found: Vec<i32> = processes.living().iter().map(|task| task.pid).collect();
        found.sort_unstable();
        let mut expected = [&runtime, &criu].map(|child| child.id().cast_signed());
        expected.sort_unstable();
        assert_eq!(found, expected);
        assert!(processes.kill());
        runtime.wait().unwrap();
        criu.wait().unwrap();
        assert!(!processes.kill(), "all of it is dead");
        for spared in [&mut stranger, &mut other] {
            assert!(spared.try_wait().unwrap().is_none(), "not ours, and dead");
            spared.kill().unwrap();
            spared.wait().unwrap();
        }
    }

    #[test]
    fn another_process_with_the_number_of_the_runtime_is_not_ours() {
        let work = tempfile::tempdir().unwrap();
        let mut child = sleeper(work.path(), 0);
        let earlier = Task {
            start_time: task(&child).start_time - 1,
            ..task(&child)
        };
        assert!(DumpProcesses::new(earlier, work.path()).living().is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
