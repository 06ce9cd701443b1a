//! What the container's user does with it while it is being moved, and what that means for the move.
//!
//! Until it is frozen the container is not the engine's: it may end, be killed, paused, given other limits, and be entered
//! by `runc exec`. Each ends the move in a sentence that says so and leaves the container in the state its user put it in;
//! only visitors are waited for, since health probes last a moment.
//!
//! ```text
//!  survey ─▶ Watch::begin ─▶ rounds: look, now and then ─▶ before the freeze: look, no visitors ─▶ frozen: look once more
//! ```

use crate::runtime::runc::Container;
use crate::runtime::{Freezer, Task, name_of, visitors};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Between two looks during the rounds.
const PERIOD: Duration = Duration::from_millis(100);

/// How long visitors are waited for before the freeze, all in all.
pub const VISIT_PATIENCE: Duration = Duration::from_secs(10);

/// The files of a cgroup that hold what `runc update` and its likes can set.
const LIMITS: [&str; 26] = [
    // v1
    "blkio.bfq.weight",
    "blkio.throttle.read_bps_device",
    "blkio.throttle.write_bps_device",
    "blkio.weight",
    "cpu.cfs_period_us",
    "cpu.cfs_quota_us",
    "cpu.rt_period_us",
    "cpu.rt_runtime_us",
    "cpu.shares",
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.soft_limit_in_bytes",
    "memory.swappiness",
    // both
    "cpuset.cpus",
    "cpuset.mems",
    "pids.max",
    // v2
    "cpu.max",
    "cpu.max.burst",
    "cpu.weight",
    "io.max",
    "io.weight",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.swap.max",
];

/// Those that the engine itself changes to slow a container.
const QUOTAS: [&str; 2] = ["cpu.cfs_quota_us", "cpu.max"];

/// What happened to the container, one line for its user.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Change {
    /// Its first process is gone, or about to be.
    #[error("container {id} ended at the source while it was being moved")]
    Ended {
        /// runc's id.
        id: String,
    },
    /// Somebody stopped it.
    #[error(
        "container {id} was paused while it was being moved and stays so here: resume it and move it again"
    )]
    Paused {
        /// runc's id.
        id: String,
    },
    /// Somebody gave it another limit.
    #[error(
        "the limits of container {id} were changed while it was being moved ({file}: {was} became {now}): move it again"
    )]
    Updated {
        /// runc's id.
        id: String,
        /// The cgroup's file.
        file: String,
        /// What it held when the move began.
        was: String,
        /// What it holds now.
        now: String,
    },
    /// A process is in it that does not come from its first process.
    #[error(
        "process {pid} ({name}) was started in container {id} from outside (runc exec), and CRIU moves only what the container started itself: end it or wait for it, and move the container again"
    )]
    Visited {
        /// runc's id.
        id: String,
        /// On this host.
        pid: i32,
        /// Its name.
        name: String,
    },
}

/// The container as it was when the move began.
#[derive(Clone, Debug)]
pub struct Watch {
    id: String,
    init: Task,
    freezer: Freezer,
    limits: BTreeMap<PathBuf, String>,
    looked: Instant,
    /// Since when there has been some visitor at every look.
    visited: Option<Instant>,
}

impl Watch {
    /// Takes down what the container is now.
    pub fn begin(container: &Container) -> io::Result<Watch> {
        let pid = container.init_pid;
        let init = Task::read(pid)?;
        let directories: std::collections::BTreeSet<&Path> =
            container.cgroups.values().map(PathBuf::as_path).collect();
        Ok(Watch {
            id: container.id.clone(),
            // One that is gone by now has no start time, and is found to have ended.
            init: init.unwrap_or(Task::on_record(pid, 0)),
            freezer: container.freezer.clone(),
            limits: directories.into_iter().flat_map(limits_in).collect(),
            looked: Instant::now(),
            visited: None,
        })
    }

    /// The look of the rounds: at most every 100 ms, and cheap. `slowed`: the engine has the CPU quota in its hands.
    pub fn look_now_and_then(&mut self, slowed: bool) -> Result<(), Change> {
        if self.looked.elapsed() < PERIOD {
            return Ok(());
        }
        self.looked = Instant::now();
        self.look(slowed)
    }

    /// Whether it is as it was, before anything of ours has stopped it.
    pub fn look(&self, slowed: bool) -> Result<(), Change> {
        self.alive()?;
        if self.freezer.is_told_to_stop() {
            return Err(Change::Paused {
                id: self.id.clone(),
            });
        }
        self.limits_are_kept(slowed)
    }

    /// The same when the engine has stopped it. A process that is killed while it is frozen may be there still.
    pub fn look_while_frozen(&self) -> Result<(), Change> {
        self.alive()?;
        self.limits_are_kept(false)?;
        self.visitor()
    }

    /// Whether the container is still there: its first process, not a later one of that pid, and nobody has killed it.
    pub fn alive(&self) -> Result<(), Change> {
        let found = Task::read(self.init.pid);
        let is_there = matches!(&found, Ok(Some(now)) if now.start_time == self.init.start_time && !now.zombie);
        if is_there && !is_dying(self.init.pid) {
            return Ok(());
        }
        Err(Change::Ended {
            id: self.id.clone(),
        })
    }

    /// Whether nobody else is in the container. An error once visitors have been there for longer than they are waited for.
    pub fn is_alone(&mut self) -> Result<bool, Change> {
        let Err(visitor) = self.visitor() else {
            self.visited = None;
            return Ok(true);
        };
        let since = *self.visited.get_or_insert_with(Instant::now);
        if since.elapsed() > VISIT_PATIENCE {
            return Err(visitor);
        }
        Ok(false)
    }

    /// What is the likely cause if a step failed now: what happened to the container, rather than how the step noticed it.
    pub fn cause(&self) -> Option<Change> {
        self.alive().and_then(|()| self.visitor()).err()
    }

    /// The container's own processes among `tasks`.
    pub fn own(&self, mut tasks: Vec<Task>) -> Vec<Task> {
        let visitors = visitors(&tasks, self.init.pid);
        tasks.retain(|task| !visitors.contains(task));
        tasks
    }

    /// A zombie is none: nothing of it can be moved or lost.
    fn visitor(&self) -> Result<(), Change> {
        // Without the cgroup there is nobody in it.
        let tasks = crate::runtime::tasks_of_cgroup(self.freezer.path()).unwrap_or_default();
        let mut visitors = visitors(&tasks, self.init.pid);
        visitors.retain(|task| !task.zombie);
        match visitors.first() {
            None => Ok(()),
            Some(task) => Err(Change::Visited {
                id: self.id.clone(),
                pid: task.pid,
                name: name_of(task.pid),
            }),
        }
    }

    fn limits_are_kept(&self, slowed: bool) -> Result<(), Change> {
        for (file, was) in &self.limits {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            if slowed && QUOTAS.contains(&&*name) {
                continue;
            }
            // What cannot be read is gone with the container, which is found by other looks.
            let Ok(now) = fs::read_to_string(file) else {
                continue;
            };
            if now.trim() != was {
                return Err(Change::Updated {
                    id: self.id.clone(),
                    file: name.into_owned(),
                    was: was.clone(),
                    now: now.trim().to_owned(),
                });
            }
        }
        Ok(())
    }
}

fn limits_in(directory: &Path) -> impl Iterator<Item = (PathBuf, String)> {
    LIMITS.iter().filter_map(move |name| {
        let file = directory.join(name);
        let text = fs::read_to_string(&file).ok()?;
        Some((file, text.trim().to_owned()))
    })
}

/// Whether a process has a SIGKILL it has not met yet (in the v1 freezer it meets it when it is thawed), or is on its way
/// out with all its threads.
fn is_dying(pid: i32) -> bool {
    const SIGKILL: u64 = 1 << 8;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & SIGKILL != 0)
    };
    pending("SigPnd:") || pending("ShdPnd:")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(cgroup: &Path, pid: i32) -> Container {
        Container {
            id: "web".into(),
            status: crate::runtime::runc::Status::Running,
            bundle: PathBuf::new(),
            rootfs: PathBuf::new(),
            init_pid: pid,
            freezer: Freezer::V1(cgroup.to_path_buf()),
            cgroups: BTreeMap::from([(String::new(), cgroup.to_path_buf())]),
            stdio: Vec::new(),
            annotated_criu_config: None,
            instance: crate::runtime::Instance {
                init: crate::migration::journal::ProcessName { pid, start_time: 0 },
                created: String::new(),
                cgroup: crate::migration::journal::Inode::default(),
            },
            spec: serde_json::Value::Null,
        }
    }

    #[test]
    fn a_limit_that_somebody_changes_is_named_and_our_own_quota_is_not() {
        let cgroup = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(cgroup.path().join(name), text).unwrap();
        write("cpu.cfs_quota_us", "-1\n");
        write("memory.limit_in_bytes", "4096\n");
        let me = std::process::id().cast_signed();
        let watch = Watch::begin(&container(cgroup.path(), me)).unwrap();
        assert_eq!(watch.look(false), Ok(()));

        write("cpu.cfs_quota_us", "50000\n");
        assert_eq!(watch.look(true), Ok(()));
        let seen = watch.look(false).unwrap_err().to_string();
        assert!(seen.contains("cpu.cfs_quota_us: -1 became 50000"), "{seen}");

        write("memory.limit_in_bytes", "8192\n");
        let seen = watch.look(true).unwrap_err().to_string();
        assert!(
            seen.contains("memory.limit_in_bytes: 4096 became 8192"),
            "{seen}"
        );
    }

    #[test]
    fn a_pause_is_seen_while_it_takes_effect() {
        let cgroup = tempfile::tempdir().unwrap();
        let me = std::process::id().cast_signed();
        let watch = Watch::begin(&container(cgroup.path(), me)).unwrap();
        for (state, is_paused) in [
            ("THAWED\n", false),
            ("FREEZING\n", true),
            ("FROZEN\n", true),
        ] {
            fs::write(cgroup.path().join("freezer.state"), state).unwrap();
            let seen = watch.look(false);
            assert_eq!(
                matches!(seen, Err(Change::Paused { .. })),
                is_paused,
                "{state}"
            );
        }
    }

    #[test]
    fn a_later_process_of_the_same_pid_is_not_the_container() {
        let cgroup = tempfile::tempdir().unwrap();
        let me = std::process::id().cast_signed();
        let mut watch = Watch::begin(&container(cgroup.path(), me)).unwrap();
        assert_eq!(watch.alive(), Ok(()));
        watch.init.start_time += 1;
        assert!(matches!(watch.alive(), Err(Change::Ended { .. })));
    }
}
