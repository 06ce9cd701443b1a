//! Taking a copy away again, and finding out what became of one.
//!
//! A name proves nothing: somebody may have a container of that name here by now. What is touched carries the mark of the
//! migration: its directory a file, its record with the runtime an annotation and the inode that was taken down while the
//! restore was young, its cgroups the inodes they were made with.

use super::restore::INVENTORY;
use crate::criu::hook;
use crate::kernel::pidfd::Pidfd;
use crate::migration::MigrationId;
use crate::migration::journal::{Inode, Leftover, MadeCgroup};
use crate::runtime::cgroup;
use crate::runtime::home::{Home, HomeError};
use crate::runtime::instance::inode_of;
use crate::runtime::runc::{Container, Runc, RuncError, RuntimeRecord, Status};
use crate::runtime::{Task, tasks_of_cgroup};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, killpg};
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
    /// Its directory with the root filesystem cannot be removed.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Its first process does not die.
    #[error("process {pid} of the copy does not die")]
    StillAlive {
        /// The process.
        pid: i32,
    },
}

/// Where a copy is, or was to be.
#[derive(Clone, Debug)]
pub struct Copy<'a> {
    /// The runtime.
    pub runc: &'a Runc,
    /// The container.
    pub id: &'a str,
    /// The migration that brings it.
    pub migration: MigrationId,
    /// Its directory below the state directory: bundle, root filesystem, logs.
    pub home: &'a Home,
    /// Images, sockets and logs of the migration.
    pub work: &'a Path,
    /// What its restore was given, or made.
    pub made: &'a Made,
}

/// What was made for a copy outside of the engine's directories.
#[derive(Clone, Debug, Default)]
pub struct Made {
    /// Its cgroups.
    pub cgroups: Vec<MadeCgroup>,
    /// The runtime's directory of it, once that is known to be its own.
    pub record: Option<Inode>,
}

impl Made {
    /// What the journal has on record.
    pub fn on_record(leftovers: &[Leftover]) -> Made {
        let mut made = Made::default();
        for leftover in leftovers {
            match leftover {
                Leftover::Cgroup { path } => made.cgroups.push(MadeCgroup {
                    path: path.clone(),
                    inode: None,
                }),
                // All that were announced and are not among them were not made.
                Leftover::MadeCgroups { cgroups } => made.cgroups.clone_from(cgroups),
                Leftover::RuntimeRecord { inode } => made.record = Some(*inode),
                _ => {}
            }
        }
        made
    }
}

/// Whose the runtime's record of that name is.
enum Owner {
    /// There is none.
    Nobody,
    /// The copy's.
    Ours(RuntimeRecord),
    /// The copy's, whose restore did not come to write it.
    OursUnwritten,
    /// Another container's, or nobody can tell.
    Another(Option<RuntimeRecord>),
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
    /// It runs, and its runtime, whose restore failed after the release, knows nothing of it: nobody could ever stop it.
    Forgotten,
}

impl Copy<'_> {
    /// Removes everything of the copy. Can be repeated.
    pub fn discard(&self) -> Result<(), DiscardError> {
        // The cgroups first: CRIU is in them, and one whose runtime was killed may wait for ever for an init that in turn waits
        // for CRIU to take notice of its dead threads. Such an init the runtime cannot delete.
        let owner = self.owner()?;
        for cgroup in &self.made.cgroups {
            if let Owner::Another(Some(record)) = &owner
                && record.cgroups.contains(&cgroup.path)
            {
                continue;
            }
            cgroup
                .remove(PATIENCE)
                .map_err(|source| DiscardError::File {
                    path: cgroup.path.clone(),
                    source,
                })?;
        }
        self.forget(owner)?;
        self.discard_files()
    }

    /// Removes the files of a copy that a restart of the host has ended: whatever has its name now is another container.
    pub fn discard_files(&self) -> Result<(), DiscardError> {
        self.home.remove()?;
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

    /// Removes the cgroups that the runtime had no use for.
    pub fn remove_idle_cgroups(&self) {
        for cgroup in &self.made.cgroups {
            cgroup.remove_if_empty();
        }
    }

    /// Looks at the copy and at the mark its hook left.
    pub fn inspect(&self) -> Found {
        let runs = self
            .container()
            .is_some_and(|found| matches!(found.status, Status::Running | Status::Paused));
        match (runs, hook::may_have_run(self.work)) {
            (true, true) => Found::Running,
            (_, false) => Found::NeverRan,
            (false, true) if self.is_forgotten() => Found::Forgotten,
            (false, true) => Found::Gone,
        }
    }

    /// Whether processes live in the cgroups that were made for the copy. What cannot be looked at may be in use.
    fn is_forgotten(&self) -> bool {
        let mut made = self.made.cgroups.iter();
        made.any(|cgroup| cgroup.is_in_use().unwrap_or(true))
    }

    /// Kills a copy that its runtime has forgotten. Whether none of it runs any more.
    pub fn kill_forgotten(&self) -> bool {
        for cgroup in &self.made.cgroups {
            if let Err(error) = cgroup.remove(PATIENCE) {
                tracing::error!(container = self.id, %error, path = %cgroup.path.display(), "a copy that its runtime has forgotten does not end");
            }
        }
        !self.is_forgotten()
    }

    /// Kills every process of the copy: stopped is better than wrong. Whether none runs any more.
    pub fn kill(&self) -> bool {
        let container = match self.owner() {
            Ok(Owner::Ours(_)) => self.runc.container(self.id).ok(),
            // The copy is gone, and nobody or another has its name.
            Ok(Owner::Nobody | Owner::Another(_)) => return true,
            Ok(Owner::OursUnwritten) | Err(_) => None,
        };
        let Some(container) = container else {
            return false;
        };
        // Another of its path is another's.
        let cgroup = match container.freezer.pinned(container.instance.cgroup) {
            Ok(Some(cgroup)) => cgroup,
            Ok(None) => return true,
            Err(_) => return false,
        };
        let place = cgroup.freezer.path();
        // A process may fork between listing and killing.
        for _ in 0..100 {
            match tasks_of_cgroup(place) {
                Ok(tasks) if tasks.iter().any(|task| !task.zombie) => {
                    let _ = cgroup::kill_all(place);
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => return false,
                _ => return true,
            }
            // Under v1 a frozen task dies when it is thawed.
            let _ = cgroup.freezer.thaw();
            thread::sleep(Duration::from_millis(10));
        }
        tracing::error!(
            container = self.id,
            "some process of the container does not die"
        );
        false
    }

    /// The copy, if it is the container that the runtime knows by its name.
    fn container(&self) -> Option<Container> {
        match self.owner() {
            Ok(Owner::Ours(_)) => self.runc.container(self.id).ok(),
            _ => None,
        }
    }

    fn owner(&self) -> Result<Owner, DiscardError> {
        let directory = self.runc.directory(self.id);
        let inode = inode_of(&directory).map_err(|source| DiscardError::File {
            path: directory,
            source,
        })?;
        let Some(inode) = inode else {
            return Ok(Owner::Nobody);
        };
        let is_it = |known| known == inode;
        Ok(match self.runc.record(self.id)? {
            Some(record)
                if record.came_by == Some(self.migration)
                    && self.made.record.is_none_or(is_it)
                    && record
                        .bundle
                        .as_deref()
                        .is_some_and(|bundle| self.is_home(bundle)) =>
            {
                Owner::Ours(record)
            }
            None if self.made.record.is_some_and(is_it) => Owner::OursUnwritten,
            record => Owner::Another(record),
        })
    }

    /// Whether the runtime's bundle is the copy's home, whichever of them is written with a symlink.
    fn is_home(&self, bundle: &Path) -> bool {
        let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        real(bundle) == real(self.home.path())
    }

    /// Makes the runtime forget the copy.
    fn forget(&self, owner: Owner) -> Result<(), DiscardError> {
        let directory = self.runc.directory(self.id);
        let failed = |source| DiscardError::File {
            path: directory.clone(),
            source,
        };
        match owner {
            Owner::Nobody => {}
            Owner::Ours(record) => {
                let init = Task::on_record(record.init.pid, record.init.start_time);
                // The processes of its pid namespace die with it. That it cannot be reached shows below.
                let _ = init.kill();
                let deadline = Instant::now() + PATIENCE;
                while matches!(Task::read(init.pid), Ok(Some(now)) if now.start_time == init.start_time && !now.zombie)
                {
                    if Instant::now() > deadline {
                        return Err(DiscardError::StillAlive { pid: init.pid });
                    }
                    thread::sleep(Duration::from_millis(2));
                }
                self.runc.delete_dead(self.id)?;
            }
            Owner::OursUnwritten => fs::remove_dir_all(&directory).map_err(failed)?,
            Owner::Another(Some(_)) => {
                tracing::info!(
                    container = self.id,
                    "another container has the name here: it is left alone"
                );
            }
            // Of a restore that died before it could be told from another's: one in use is not empty.
            Owner::Another(None) => {
                let _ = fs::remove_dir(&directory);
            }
        }
        Ok(())
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
    // While the process is held and lives, its number is no other group's.
    if let Ok(process) = Pidfd::open(restore.pid)
        && restore.exists()
        && !process.exited()
    {
        let _ = killpg(Pid::from_raw(restore.pid), Signal::SIGKILL);
    }
}
