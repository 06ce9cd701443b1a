//! Processes in a container's cgroup that do not come from its first process: `runc exec` put them there.
//!
//! CRIU dumps the tree below the first process and gives up where the frozen cgroup holds anybody else. A visitor's own
//! children become the container's when it ends: the kernel gives them to the first process of the pid namespace.

use super::Task;
use std::collections::BTreeSet;
use std::fs;

/// How often a chain of parents is walked again because one of them ended meanwhile.
const ATTEMPTS: u32 = 3;

/// Those of `tasks` that do not descend from the process `init`, with their descendants.
pub fn visitors(tasks: &[Task], init: i32) -> Vec<Task> {
    let in_cgroup: BTreeSet<i32> = tasks.iter().map(|task| task.pid).collect();
    let mut own = BTreeSet::from([init]);
    tasks
        .iter()
        .filter(|task| is_visitor(task.pid, &in_cgroup, &mut own))
        .cloned()
        .collect()
}

/// The name of a process as `ps` has it; empty if it is gone.
pub fn name_of(pid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().to_string()
}

fn is_visitor(pid: i32, in_cgroup: &BTreeSet<i32>, own: &mut BTreeSet<i32>) -> bool {
    for _ in 0..ATTEMPTS {
        let mut chain = Vec::new();
        let mut at = pid;
        loop {
            if own.contains(&at) {
                own.extend(chain);
                return false;
            }
            chain.push(at);
            let Some(parent) = parent_of(at) else { break };
            if !own.contains(&parent) && !in_cgroup.contains(&parent) {
                // A parent that has just ended looks like one outside: then the child has another one now.
                if parent_of(at) == Some(parent) && (parent == 0 || parent_of(parent).is_some()) {
                    return true;
                }
                break;
            }
            at = parent;
        }
    }
    // Gone, or of a family that comes and goes faster than it can be read: no visitor that could be named.
    false
}

/// The parent of a process; 0 if it is outside our pid namespace, `None` if the process is gone.
fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold spaces and parentheses; nothing after it does.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_of_another_family_is_a_visitor_and_a_grandchild_is_none() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 1000 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(shell.stdout.take().unwrap()),
            &mut line,
        )
        .unwrap();
        let sleep: i32 = line.trim().parse().unwrap();
        let me = std::process::id().cast_signed();
        let shell_pid = shell.id().cast_signed();
        let tasks: Vec<Task> = [me, shell_pid, sleep]
            .into_iter()
            .map(|pid| Task::read(pid).unwrap().unwrap())
            .collect();
        assert_eq!(visitors(&tasks, me), []);
        // From the shell's point of view this process came from outside.
        let strangers = visitors(&tasks, shell_pid);
        assert_eq!(
            strangers.iter().map(|task| task.pid).collect::<Vec<_>>(),
            [me]
        );
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(sleep),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        shell.wait().unwrap();
        assert_eq!(visitors(&tasks, me), [], "who is gone is no visitor");
    }
}
