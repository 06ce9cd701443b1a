//! Processes that job control has stopped, in a container that is frozen.
//!
//! Under cgroup v1 a stopped thread that is frozen cannot be seized: `PTRACE_SEIZE` asks it to change from one kind of stop
//! to another and waits, deaf to all but SIGKILL, until it has, which it cannot before the thaw. CRIU seizes before it
//! thaws, so it would hang there. A thread that is frozen on its way out of a stop is seized like any other. So each stopped
//! process is told to continue and at once to stop again: neither reaches it before the thaw, the second takes the first
//! back, and what it does when it wakes is to take the SIGSTOP, without an instruction of its own in between. CRIU counts the
//! SIGSTOP that waits and brings the process back stopped, at the target as here.
//!
//! What can be noticed: the parent gets one more SIGCHLD, and a Ctrl-Z (SIGTSTP) has become a SIGSTOP.

use super::{Freezer, Task};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;

/// Where a thread that job control has stopped waits in the kernel; its state shows as that of any frozen thread.
const STOPPED_IN: &str = "do_signal_stop";

/// The stopped processes of a frozen container, made ready to be seized.
///
/// Nothing under cgroup v2, where stopped threads are seized as they are.
pub fn make_seizable(freezer: &Freezer, tasks: &[Task]) -> Vec<Task> {
    if matches!(freezer, Freezer::V2(_)) {
        return Vec::new();
    }
    let stopped: Vec<Task> = tasks
        .iter()
        .filter(|task| is_stopped(task))
        .cloned()
        .collect();
    for task in &stopped {
        tracing::debug!(pid = task.pid, vpid = task.vpid, "stopped by a signal");
        // It is frozen, so its pid is still its own; what is killed meanwhile needs neither.
        let pid = Pid::from_raw(task.pid);
        let _ = kill(pid, Signal::SIGCONT);
        let _ = kill(pid, Signal::SIGSTOP);
    }
    stopped
}

/// Stops them again. A CRIU that was killed while it had taken their SIGSTOP in hand has let them run on.
pub fn stop_again(tasks: &[Task]) {
    for task in tasks.iter().filter(|task| task.exists()) {
        let _ = kill(Pid::from_raw(task.pid), Signal::SIGSTOP);
    }
}

fn is_stopped(task: &Task) -> bool {
    let wchan = fs::read_to_string(format!("/proc/{}/wchan", task.pid));
    !task.zombie && wchan.is_ok_and(|wchan| wchan.trim() == STOPPED_IN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn a_stopped_process_is_told_from_one_that_sleeps() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("sleep");
        let pid = child.id().cast_signed();
        let task = || Task::read(pid).expect("readable").expect("there");
        assert!(!is_stopped(&task()));
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("stopped");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_stopped(&task()) {
            assert!(Instant::now() < deadline, "it never shows as stopped");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }
}
