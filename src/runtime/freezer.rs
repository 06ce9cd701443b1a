//! Stopping every task of a container at once, by its cgroup.

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
    #[error(
        "the container in {path} is not frozen after {waited:?}: a task does not stop (D state?)"
    )]
    Timeout {
        /// The cgroup.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
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

    /// Stops every task and waits until all have stopped.
    ///
    /// On failure the container is running again.
    pub fn freeze(&self, patience: Duration) -> Result<Frozen, FreezeError> {
        let frozen = Frozen {
            freezer: self.clone(),
            armed: true,
        };
        self.request_freeze()?;
        let start = Instant::now();
        while !self.is_frozen()? {
            if start.elapsed() > patience {
                return Err(FreezeError::Timeout {
                    path: self.path().to_path_buf(),
                    waited: patience,
                });
            }
            thread::sleep(Duration::from_micros(100));
        }
        Ok(frozen)
    }

    /// Whether every task has stopped.
    pub fn is_frozen(&self) -> Result<bool, FreezeError> {
        let (file, frozen) = match self {
            Freezer::V1(path) => (path.join("freezer.state"), "FROZEN"),
            Freezer::V2(path) => (path.join("cgroup.events"), "frozen 1"),
        };
        let text = fs::read_to_string(&file).map_err(|source| FreezeError::File {
            doing: "read the state",
            path: file,
            source,
        })?;
        Ok(text.lines().any(|line| line == frozen))
    }

    /// Whether somebody has told the tasks to stop, whether they have or not. A cgroup that is gone stops nobody.
    pub fn is_told_to_stop(&self) -> bool {
        let (file, words): (_, &[&str]) = match self {
            Freezer::V1(path) => (path.join("freezer.state"), &["FREEZING", "FROZEN"]),
            Freezer::V2(path) => (path.join("cgroup.freeze"), &["1"]),
        };
        fs::read_to_string(file).is_ok_and(|text| words.contains(&text.trim()))
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
