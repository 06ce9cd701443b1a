//! Taking a copy away again, and finding out what became of one.

use super::restore::INVENTORY;
use super::rootfs::{RemoveError, remove_tree};
use crate::criu::hook;
use crate::runtime::runc::{Runc, RuncError, Status};
use crate::runtime::{Task, cgroup, tasks_of_cgroup};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a restore that was called off may take to undo itself before it is killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why something of a copy is still there.
#[derive(Debug, Error)]
pub enum DiscardError {
    /// The runtime keeps it.
    #[error(transparent)]
    Runtime(#[from] RuncError),
    /// A file or directory cannot be removed.
    #[error("cannot remove {path}: {source}")]
    File {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The root filesystem cannot be removed.
    #[error("cannot remove {path}: {source}")]
    Tree {
        /// The path.
        path: PathBuf,
        /// Why.
        source: RemoveError,
    },
}

/// Where a copy is, or was to be.
#[derive(Clone, Debug)]
pub struct Copy<'a> {
    /// The runtime.
    pub runc: &'a Runc,
    /// The container.
    pub id: &'a str,
    /// Its directory below the state directory: bundle, root filesystem, logs.
    pub home: &'a Path,
    /// Images, sockets and logs of the migration.
    pub work: &'a Path,
    /// The cgroups that its restore was to make.
    pub cgroups: &'a [PathBuf],
}

/// What became of a copy whose release went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It runs.
    Running,
    /// It is gone, and none of its code ran.
    NeverRan,
    /// It is gone and may have run.
    Gone,
}

impl Copy<'_> {
    /// Removes everything of the copy. Can be repeated.
    pub fn discard(&self) -> Result<(), DiscardError> {
        // The cgroups first: CRIU is in them, and one whose runtime was killed may wait for ever for an init that in turn waits
        // for CRIU to take notice of its dead threads. Such an init the runtime cannot delete.
        for cgroup in self.cgroups {
            cgroup::remove(cgroup, PATIENCE).map_err(|source| DiscardError::File {
                path: cgroup.clone(),
                source,
            })?;
        }
        self.runc.forget(self.id)?;
        self.discard_files()
    }

    /// Removes the files of a copy that a restart of the host has ended: whatever has its name now is another container.
    pub fn discard_files(&self) -> Result<(), DiscardError> {
        remove_tree(self.home).map_err(|source| DiscardError::Tree {
            path: self.home.to_path_buf(),
            source,
        })?;
        self.remove_work()
    }

    /// Removes what only the migration needed.
    pub fn remove_work(&self) -> Result<(), DiscardError> {
        match fs::remove_dir_all(self.work) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(DiscardError::File {
                path: self.work.to_path_buf(),
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Looks at the copy and at the mark its hook left.
    pub fn inspect(&self) -> Found {
        let runs = self.runc.knows(self.id)
            && matches!(self.runc.container(self.id), Ok(found) if matches!(found.status, Status::Running | Status::Paused));
        match (runs, hook::may_have_run(self.work)) {
            (true, true) => Found::Running,
            (_, false) => Found::NeverRan,
            (false, true) => Found::Gone,
        }
    }

    /// Kills every process of the copy: stopped is better than wrong. Whether none runs any more.
    pub fn kill(&self) -> bool {
        if !self.runc.knows(self.id) {
            return true;
        }
        let Ok(container) = self.runc.container(self.id) else {
            return false;
        };
        // A process may fork between listing and killing.
        for _ in 0..100 {
            match tasks_of_cgroup(container.freezer.path()) {
                Ok(tasks) if tasks.iter().any(|task| !task.zombie) => {
                    for task in tasks {
                        let _ = kill(Pid::from_raw(task.pid), Signal::SIGKILL);
                    }
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => return false,
                _ => return true,
            }
            // Under v1 a frozen task dies when it is thawed.
            let _ = container.freezer.thaw();
            thread::sleep(Duration::from_millis(10));
        }
        tracing::error!(
            container = self.id,
            "some process of the container does not die"
        );
        false
    }
}

/// Ends a runtime's restore whose agent died: lets it undo itself, then kills its process group.
pub fn end_restore(images: &Path, restore: &Task) {
    let deadline = Instant::now() + PATIENCE;
    while restore.exists() && Instant::now() < deadline {
        // A CRIU that waits for its inventory, or comes to it only now, gets an empty one.
        let inventory = OpenOptions::new()
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(images.join(INVENTORY));
        drop(inventory);
        thread::sleep(Duration::from_millis(5));
    }
    if restore.exists() {
        let _ = killpg(Pid::from_raw(restore.pid), Signal::SIGKILL);
    }
}
