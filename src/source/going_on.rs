//! Whether a container that was given back goes on: read back, not believed.
//!
//! A thaw that was written may be undone by a CRIU that is still at work, and a thawed task may still be held by it. So a
//! rollback is one only when the freezer says that nothing is frozen and no task is in the hands of the dump.

use super::dump_processes::DumpProcesses;
use crate::runtime::{FreezeError, Freezer, FreezerState, Task, tasks_of_cgroup};
use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long it is tried; tasks of a host under load may take a moment to wake.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a dump that should be gone is left to go before it is killed.
const GRACE: Duration = Duration::from_secs(1);

/// What was read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoesOn {
    /// Its tasks run, or do what they did when they were frozen.
    Yes,
    /// It has none any more: it ended by itself.
    Ended,
}

/// It could not be seen to go on.
#[derive(Debug, Error)]
pub enum StandsStill {
    /// Its cgroup is not thawed.
    #[error("the cgroup {path} stays {state}: write THAWED to its freezer.state (cgroup v1) or 0 to its cgroup.freeze (v2)", path = .path.display())]
    Frozen {
        /// The cgroup.
        path: std::path::PathBuf,
        /// What it says of itself.
        state: FreezerState,
    },
    /// A process has hold of a task.
    #[error(
        "process {vpid} of the container (pid {pid} on this host) is held by process {tracer}, which does not die: it waits for a disk or a device, and lets go when that answers"
    )]
    Held {
        /// The task, inside.
        vpid: i32,
        /// The task, here.
        pid: i32,
        /// Who holds it.
        tracer: i32,
    },
    /// The freezer cannot be used.
    #[error(transparent)]
    Freezer(#[from] FreezeError),
    /// The tasks cannot be listed.
    #[error("cannot list the tasks in {path}: {source}", path = .path.display())]
    Tasks {
        /// The cgroup.
        path: std::path::PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Thaws until it is thawed and nothing of `dump` holds a task any more; what of `dump` does not end is killed.
pub fn make_sure(freezer: &Freezer, dump: Option<&DumpProcesses>) -> Result<GoesOn, StandsStill> {
    let began = Instant::now();
    let mut killed = false;
    loop {
        let still = match look(freezer, dump, killed) {
            Ok(goes_on) => return Ok(goes_on),
            Err(still) => still,
        };
        if began.elapsed() > PATIENCE {
            return Err(still);
        }
        if began.elapsed() > GRACE {
            dump.map(DumpProcesses::kill);
            killed = true;
        }
        thread::sleep(Duration::from_millis(5));
        freezer.thaw()?;
    }
}

/// Whether none of its processes is left.
pub fn has_ended(freezer: &Freezer) -> bool {
    match tasks_of_cgroup(freezer.path()) {
        Ok(tasks) => tasks.iter().all(|task| task.zombie),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// `killed`: what lives of the dump has met its SIGKILL, or will before it does anything else.
fn look(
    freezer: &Freezer,
    dump: Option<&DumpProcesses>,
    killed: bool,
) -> Result<GoesOn, StandsStill> {
    let path = || freezer.path().to_path_buf();
    let tasks = match tasks_of_cgroup(freezer.path()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(GoesOn::Ended),
        tasks => tasks.map_err(|source| StandsStill::Tasks {
            path: path(),
            source,
        })?,
    };
    let living: Vec<&Task> = tasks.iter().filter(|task| !task.zombie).collect();
    if living.is_empty() {
        return Ok(GoesOn::Ended);
    }
    // The dump first: one that lives may freeze again what is thawed.
    let dump = dump.map_or_else(Vec::new, DumpProcesses::living);
    let holders: Vec<i32> = dump.iter().map(|task| task.pid).collect();
    let held = living.iter().find_map(|task| {
        let tracer = tracer_of(task.pid)?;
        holders.contains(&tracer).then_some(StandsStill::Held {
            vpid: task.vpid,
            pid: task.pid,
            tracer,
        })
    });
    if let Some(held) = held {
        return Err(held);
    }
    match freezer.state()? {
        FreezerState::Thawed if holders.is_empty() || killed => Ok(GoesOn::Yes),
        state => Err(StandsStill::Frozen {
            path: path(),
            state,
        }),
    }
}

/// Who traces a process, if anybody does.
pub fn tracer_of(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tracer = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))?;
    tracer.trim().parse().ok().filter(|&tracer| tracer != 0)
}

/// That a process is in the hands of a debugger, in words.
pub fn traced_by(vpid: i32, container: &str, tracer: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
    format!(
        "process {vpid} in container {container} is traced by {} (process {tracer} on this host), and only one tracer can hold it: end that first",
        name.trim()
    )
}
