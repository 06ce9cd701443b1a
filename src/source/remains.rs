//! Ending a migration at the source, either way: what a running migration does and what recovery does after a crash.

use crate::kernel::tcp_repair;
use crate::runtime::home::{HomeError, remove_home};
use crate::runtime::runc::Runc;
use crate::runtime::{Freezer, Task, tasks_of_cgroup};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io;
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

/// Lets a container go on that CRIU has let go of, or that is frozen while CRIU is dead.
pub fn let_go_on(
    runc: &Runc,
    id: &str,
    freezer: &Freezer,
    init_pid: i32,
) -> Result<(), RemainsError> {
    // Whatever fails, the rest is done: a container that stands still for it would be worse off.
    let connected = end_tcp_repair(freezer);
    let unlocked = remove_network_lock(init_pid);
    freezer.thaw()?;
    runc.forget_checkpoint(id)?;
    connected.and(unlocked)
}

/// Makes every task of the frozen copy die as soon as it is thawed. The kills are pending before the thaw, so no
/// instruction of the copy runs again.
pub fn kill_frozen(freezer: &Freezer) -> Result<(), RemainsError> {
    for task in tasks(freezer)? {
        // ESRCH: it is gone already.
        let _ = kill(Pid::from_raw(task.pid), Signal::SIGKILL);
    }
    Ok(freezer.thaw()?)
}

/// A copy of a container that lives elsewhere now.
#[derive(Clone, Copy, Debug)]
pub struct LeftCopy<'a> {
    /// The runtime.
    pub runc: &'a Runc,
    /// The container.
    pub id: &'a str,
    /// Its freezer.
    pub freezer: &'a Freezer,
    /// Its bundle.
    pub bundle: &'a Path,
    /// The engine's state directory.
    pub state_dir: &'a Path,
}

impl LeftCopy<'_> {
    /// Waits until the copy is dead and makes the runtime forget it. Its bundle goes too if it had come by migration
    /// itself; a bundle that somebody made stays.
    pub fn destroy(&self) -> Result<(), RemainsError> {
        kill_frozen(self.freezer)?;
        wait_until_gone(&tasks(self.freezer)?)?;
        self.runc.delete(self.id)?;
        Ok(remove_home(self.state_dir, self.id, self.bundle)?)
    }
}

/// The tasks of the cgroup; a cgroup that is gone has none.
fn tasks(freezer: &Freezer) -> Result<Vec<Task>, RemainsError> {
    match tasks_of_cgroup(freezer.path()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(RemainsError::Tasks {
            path: freezer.path().to_path_buf(),
            source,
        }),
        Ok(tasks) => Ok(tasks),
    }
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
fn end_tcp_repair(freezer: &Freezer) -> Result<(), RemainsError> {
    let mut ended = Ok(());
    for task in tasks(freezer)? {
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
fn remove_network_lock(init_pid: i32) -> Result<(), RemainsError> {
    let namespace = PathBuf::from(format!("/proc/{init_pid}/ns/net"));
    if !namespace.exists() || !has_nft() {
        return Ok(());
    }
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
