//! Ending a migration at the source, either way: what a running migration does and what recovery does after a crash.

use crate::kernel::tcp_repair;
use crate::migration::MigrationId;
use crate::runtime::home::{Home, HomeError};
use crate::runtime::runc::Runc;
use crate::runtime::{Freezer, Instance, Pinned, Task, cgroup, is_gone, tasks_of_cgroup};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long killed tasks may take to be gone: freeing memory costs about 80 ms per GiB.
const DEATH_PATIENCE: Duration = Duration::from_secs(60);

/// How long a command on the packet filter may take.
const NFT_PATIENCE: Duration = Duration::from_secs(5);

/// Why a migration could not be ended cleanly.
#[derive(Debug, Error)]
pub enum RemainsError {
    /// The container's cgroup cannot be read.
    #[error("cannot list the tasks in {path}: {source}")]
    Tasks {
        /// The cgroup.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The container could not be thawed.
    #[error(transparent)]
    Freezer(#[from] crate::runtime::FreezeError),
    /// A task does not die.
    #[error("process {pid} of the container that moved away does not die")]
    StillAlive {
        /// The process.
        pid: i32,
    },
    /// The runtime keeps state of the container.
    #[error(transparent)]
    Runtime(#[from] crate::runtime::runc::RuncError),
    /// The directory it had with the engine stays.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Connections cannot be given back.
    #[error("cannot take the connections of process {pid} out of CRIU's hands: {source}")]
    Connections {
        /// The process.
        pid: i32,
        /// The system's reason.
        source: io::Error,
    },
    /// A packet filter table of CRIU could not be removed.
    #[error("cannot remove CRIU's network lock from the container's network namespace: {0}")]
    NetworkLock(String),
}

/// Lets a container go on that CRIU has let go of, or that is frozen while CRIU is dead. One that is gone is let be, and so is
/// another that has come to have its name.
pub fn let_go_on(
    runc: &Runc,
    id: &str,
    freezer: &Freezer,
    instance: &Instance,
) -> Result<(), RemainsError> {
    let Some(cgroup) = pinned(freezer, instance)? else {
        return Ok(());
    };
    // Whatever fails, the rest is done: a container that stands still for it would be worse off.
    let connected = end_tcp_repair(&cgroup);
    let unlocked = remove_network_lock(instance);
    cgroup.freezer.thaw()?;
    if runc.is(id, instance)? {
        runc.forget_checkpoint(id)?;
    }
    connected.and(unlocked)
}

/// Makes every task of the frozen copy die as soon as it is thawed. The kills are pending before the thaw, so no
/// instruction of the copy runs again.
pub fn kill_frozen(freezer: &Freezer, instance: &Instance) -> Result<(), RemainsError> {
    match pinned(freezer, instance)? {
        Some(cgroup) => kill_in(&cgroup),
        None => Ok(()),
    }
}

fn kill_in(cgroup: &Pinned) -> Result<(), RemainsError> {
    match cgroup::kill_all(cgroup.freezer.path()) {
        Err(source) if !is_gone(&source) => Err(cannot_list(cgroup)(source)),
        _ => Ok(cgroup.freezer.thaw()?),
    }
}

/// A copy of a container that lives elsewhere now.
#[derive(Clone, Copy, Debug)]
pub struct LeftCopy<'a> {
    /// The runtime.
    pub runc: &'a Runc,
    /// The container.
    pub id: &'a str,
    /// What tells it from any other of its name.
    pub instance: &'a Instance,
    /// Its freezer.
    pub freezer: &'a Freezer,
    /// The migration it had come by itself.
    pub came_by: Option<MigrationId>,
    /// The engine's state directory.
    pub state_dir: &'a Path,
}

impl LeftCopy<'_> {
    /// Waits until the copy is dead and makes the runtime forget it. Its bundle goes too if it had come by migration
    /// itself; a bundle that somebody made stays, and so does everything of another container that has its name by now.
    pub fn destroy(&self) -> Result<(), RemainsError> {
        if let Some(cgroup) = pinned(self.freezer, self.instance)? {
            kill_in(&cgroup)?;
            wait_until_gone(&tasks(&cgroup)?)?;
        }
        if self.runc.is(self.id, self.instance)? {
            self.runc.delete_dead(self.id)?;
        }
        match self.came_by {
            Some(migration) => Ok(Home::new(self.state_dir, self.id, migration).remove()?),
            None => Ok(()),
        }
    }
}

/// The cgroup of the container, if it is still there.
fn pinned(freezer: &Freezer, instance: &Instance) -> Result<Option<Pinned>, RemainsError> {
    let pinned = freezer.pinned(instance.cgroup);
    pinned.map_err(|source| RemainsError::Tasks {
        path: freezer.path().to_path_buf(),
        source,
    })
}

/// Thaws the container's cgroup; one that is gone, or another of its path, is left alone.
pub fn thaw(freezer: &Freezer, instance: &Instance) -> Result<(), RemainsError> {
    if let Some(cgroup) = pinned(freezer, instance)? {
        cgroup.freezer.thaw()?;
    }
    Ok(())
}

/// The tasks of the cgroup; a cgroup that is gone has none.
fn tasks(cgroup: &Pinned) -> Result<Vec<Task>, RemainsError> {
    match tasks_of_cgroup(cgroup.freezer.path()) {
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        listed => listed.map_err(cannot_list(cgroup)),
    }
}

fn cannot_list(cgroup: &Pinned) -> impl FnOnce(io::Error) -> RemainsError {
    let path = cgroup.freezer.path().to_path_buf();
    |source| RemainsError::Tasks { path, source }
}

fn wait_until_gone(tasks: &[Task]) -> Result<(), RemainsError> {
    let deadline = Instant::now() + DEATH_PATIENCE;
    for task in tasks {
        // A zombie runs nothing; its parent, or init, reaps it.
        while matches!(Task::read(task.pid), Ok(Some(now)) if now.start_time == task.start_time && !now.zombie)
        {
            if Instant::now() > deadline {
                return Err(RemainsError::StillAlive { pid: task.pid });
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// Gives every process of the container its connections back, which a CRIU that died leaves in repair mode.
fn end_tcp_repair(cgroup: &Pinned) -> Result<(), RemainsError> {
    let mut ended = Ok(());
    for task in tasks(cgroup)? {
        let end = tcp_repair::end(task.pid);
        ended = ended.and(end.map_err(|source| RemainsError::Connections {
            pid: task.pid,
            source,
        }));
    }
    ended
}

/// Removes the nftables table that a CRIU which died leaves in the container's network namespace.
///
/// CRIU names it `inet CRIU-<pid>` (criu/netfilter.c). Without `nft` on this host there is none of ours.
fn remove_network_lock(instance: &Instance) -> Result<(), RemainsError> {
    let init = Task::on_record(instance.init.pid, instance.init.start_time);
    let Ok(held) = File::open(format!("/proc/{}/ns/net", init.pid)) else {
        return Ok(());
    };
    // The namespace is held now: it is the container's if the process was its first one until here.
    if !init.exists() || !has_nft() {
        return Ok(());
    }
    let namespace = format!("/proc/{}/fd/{}", std::process::id(), held.as_raw_fd());
    let namespace = PathBuf::from(namespace);
    let listed = nft(&namespace, &["list", "tables"]).map_err(RemainsError::NetworkLock)?;
    for line in listed.lines() {
        if let Some(table) = line
            .strip_prefix("table inet ")
            .filter(|name| name.starts_with("CRIU-"))
        {
            nft(&namespace, &["delete", "table", "inet", table])
                .map_err(RemainsError::NetworkLock)?;
        }
    }
    Ok(())
}

fn has_nft() -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join("nft").is_file()))
}

fn nft(namespace: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", namespace.display()))
        .arg("nft")
        .args(arguments)
        .stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    // A container stands still for it. What it prints fits into its pipes.
    let deadline = Instant::now() + NFT_PATIENCE;
    while child
        .try_wait()
        .map_err(|error| error.to_string())?
        .is_none()
    {
        if Instant::now() > deadline {
            let _ = child.kill();
            return Err(format!("nft does not end within {NFT_PATIENCE:?}"));
        }
        thread::sleep(Duration::from_millis(1));
    }
    let output = child
        .wait_with_output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_string())
    }
}

/// Removes the working directory of a migration. Nothing there is no error.
pub fn remove_work(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
