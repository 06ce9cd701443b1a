//! Stopping every task of a container at once, by its cgroup.

use super::tasks_of_cgroup;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// The freezer of one container's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Freezer {
    /// cgroup v1: the container's directory in the freezer hierarchy.
    V1(PathBuf),
    /// cgroup v2: the container's directory in the unified hierarchy.
    V2(PathBuf),
}

/// Why a container could not be frozen or thawed.
#[derive(Debug, Error)]
pub enum FreezeError {
    /// The freezer's files cannot be used.
    #[error("cannot {doing} through {path}: {source}")]
    File {
        /// Freeze, thaw or read.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Some task did not stop.
    #[error("the container is not frozen after {waited:?}: {who}")]
    Timeout {
        /// How long was waited.
        waited: Duration,
        /// Which process did not stop, as far as can be told.
        who: String,
    },
    /// It was frozen before, by somebody else.
    #[error("the container is frozen already: it was paused meanwhile")]
    Paused,
    /// It was no longer wanted.
    #[error("the freeze was called off")]
    CalledOff,
}

/// What a freezer says of its cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezerState {
    /// Everything runs.
    Thawed,
    /// Some tasks have not stopped yet.
    Freezing,
    /// Everything stands still.
    Frozen,
}

impl std::fmt::Display for FreezerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FreezerState::Thawed => "thawed",
            FreezerState::Freezing => "freezing",
            FreezerState::Frozen => "frozen",
        })
    }
}

/// A container is frozen while this lives: dropping it thaws, unless it was given away.
#[derive(Debug)]
pub struct Frozen {
    freezer: Freezer,
    armed: bool,
}

impl Freezer {
    /// The cgroup directory.
    pub fn path(&self) -> &Path {
        match self {
            Freezer::V1(path) | Freezer::V2(path) => path,
        }
    }

    /// The cgroup version, 1 or 2.
    pub fn version(&self) -> u8 {
        match self {
            Freezer::V1(_) => 1,
            Freezer::V2(_) => 2,
        }
    }

    /// Stops every task and waits until all have stopped, or `called_off` says that nobody wants it any more.
    ///
    /// On failure the container is running again.
    pub fn freeze(
        &self,
        patience: Duration,
        mut called_off: impl FnMut() -> bool,
    ) -> Result<Frozen, FreezeError> {
        let frozen = Frozen {
            freezer: self.clone(),
            armed: true,
        };
        self.request_freeze()?;
        let start = Instant::now();
        while !self.is_frozen()? {
            if called_off() {
                return Err(FreezeError::CalledOff);
            }
            if start.elapsed() > patience {
                drop(frozen);
                return Err(FreezeError::Timeout {
                    waited: patience,
                    who: self.who_does_not_stop(),
                });
            }
            thread::sleep(Duration::from_micros(100));
        }
        Ok(frozen)
    }

    /// Whether every task has stopped.
    pub fn is_frozen(&self) -> Result<bool, FreezeError> {
        Ok(self.state()? == FreezerState::Frozen)
    }

    /// What the cgroup is in. A cgroup that is gone has nothing frozen.
    pub fn state(&self) -> Result<FreezerState, FreezeError> {
        match self {
            Freezer::V1(path) => Ok(match self.read(&path.join("freezer.state"))?.trim() {
                "FROZEN" => FreezerState::Frozen,
                "FREEZING" => FreezerState::Freezing,
                _ => FreezerState::Thawed,
            }),
            Freezer::V2(path) => {
                let events = self.read(&path.join("cgroup.events"))?;
                if events.lines().any(|line| line == "frozen 1") {
                    return Ok(FreezerState::Frozen);
                }
                Ok(match self.read(&path.join("cgroup.freeze"))?.trim() {
                    "1" => FreezerState::Freezing,
                    _ => FreezerState::Thawed,
                })
            }
        }
    }

    fn read(&self, file: &Path) -> Result<String, FreezeError> {
        match fs::read_to_string(file) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(FreezeError::File {
                doing: "read the state",
                path: file.to_path_buf(),
                source,
            }),
            text => Ok(text.unwrap_or_default()),
        }
    }

    /// The process that keeps a freezer waiting, looked for after the thaw: while it freezes, every stopped task looks like
    /// one that cannot be stopped.
    fn who_does_not_stop(&self) -> String {
        const LOOKS: usize = 20;
        let Ok(tasks) = tasks_of_cgroup(self.path()) else {
            return "its processes cannot be listed".into();
        };
        let stuck = tasks.iter().find(|task| {
            (0..LOOKS).all(|look| {
                thread::sleep(Duration::from_millis(if look == 0 { 0 } else { 5 }));
                is_uninterruptible(task.pid)
            })
        });
        match stuck {
            Some(task) => format!(
                "process {} in it does not stop, it waits in the kernel for a disk or a device (D state)",
                task.vpid
            ),
            None => "a process in it did not stop in time".into(),
        }
    }

    /// Lets the tasks go on. A cgroup that is gone has nothing to thaw.
    pub fn thaw(&self) -> Result<(), FreezeError> {
        let (file, word) = match self {
            Freezer::V1(path) => (path.join("freezer.state"), "THAWED"),
            Freezer::V2(path) => (path.join("cgroup.freeze"), "0"),
        };
        match fs::write(&file, word) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(FreezeError::File {
                doing: "thaw",
                path: file,
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Tells every task to stop, and does not wait for it.
    pub fn request_freeze(&self) -> Result<(), FreezeError> {
        let (file, word) = match self {
            Freezer::V1(path) => (path.join("freezer.state"), "FROZEN"),
            Freezer::V2(path) => (path.join("cgroup.freeze"), "1"),
        };
        fs::write(&file, word).map_err(|source| FreezeError::File {
            doing: "freeze",
            path: file,
            source,
        })
    }
}

impl Frozen {
    /// Leaves the container frozen for someone else to thaw.
    pub fn give_away(mut self) {
        self.armed = false;
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.freezer.thaw()
        {
            tracing::error!(%error, "the container stays frozen");
        }
    }
}

/// Whether a thread of the process waits uninterruptibly.
fn is_uninterruptible(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes());
        state.and_then(|state| state.first()) == Some(&b'D')
    })
}
