//! The runtime's restore, started before there is anything to restore.
//!
//! CRIU's start-up costs tens of milliseconds, so it is spent before the freeze: the image directory has a FIFO for
//! an inventory, and CRIU blocks on it. Writing the inventory, last of all files, lets it go.
//!
//! ```text
//!  prestart ── runc restore ── criu waits on the FIFO
//!  images arrive, are composed
//!  let_go   ── inventory ────▶ criu restores ──▶ post-restore hook waits
//! ```

use crate::criu::environment::Environment;
use crate::runtime::runc::Runc;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// CRIU's inventory, which it reads first.
pub const INVENTORY: &str = "inventory.img";

/// How long a runtime may take until CRIU reads its inventory. An emulated host takes seconds; the source, whose container stands
/// still, gives up after a minute, and should hear the reason before.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// Why a restore could not be driven.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A file of the restore cannot be made.
    #[error("cannot prepare the restore: {path}: {source}")]
    Prepare {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// runc cannot be started.
    #[error("cannot start runc: {0}")]
    Start(#[source] io::Error),
    /// CRIU never came to read its inventory.
    #[error("the restore does not start: {0}")]
    NotWaiting(String),
}

/// CRIU waits for its inventory, at the other end of this pipe.
#[derive(Debug)]
pub struct Ready(File);

/// A restore under way. Dropping it kills it and what it restored, unless it was finished.
#[derive(Debug)]
pub struct Restore {
    child: Child,
    inventory: PathBuf,
    work: PathBuf,
    finished: bool,
}

impl Restore {
    /// Starts `runc restore` of `id` in `images`, which must hold `descriptors.json` and nothing else yet.
    ///
    /// `stdio` are the container's standard streams.
    pub fn prestart(
        runc: &Runc,
        environment: &Environment,
        id: &str,
        bundle: &Path,
        images: &Path,
        work: &Path,
        stdio: [Stdio; 3],
    ) -> Result<Restore, RestoreError> {
        let inventory = images.join(INVENTORY);
        nix::unistd::mkfifo(&inventory, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| {
            RestoreError::Prepare {
                path: inventory.clone(),
                source: errno.into(),
            }
        })?;
        let mut command = runc.restore(id, bundle, images, work);
        let [stdin, stdout, stderr] = stdio;
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        // Its own process group, so that a signal to the agent's terminal does not hit the container.
        command.process_group(0);
        environment
            .apply(&mut command)
            .map_err(RestoreError::Start)?;
        let child = command.spawn().map_err(RestoreError::Start)?;
        Ok(Restore {
            child,
            inventory,
            work: work.to_path_buf(),
            finished: false,
        })
    }

    /// Waits until CRIU waits for its inventory. It is in the container's cgroups then.
    pub fn wait_ready(&mut self) -> Result<Ready, RestoreError> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            // Without a reader a non-blocking open for writing says ENXIO.
            let opened = OpenOptions::new()
                .write(true)
                .custom_flags(OFlag::O_NONBLOCK.bits())
                .open(&self.inventory);
            match opened {
                Ok(fifo) => return Ok(Ready(fifo)),
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
                Err(source) => {
                    return Err(RestoreError::Prepare {
                        path: self.inventory.clone(),
                        source,
                    });
                }
            }
            let ended = self.child.try_wait().is_ok_and(|status| status.is_some());
            if ended || Instant::now() > deadline {
                return Err(RestoreError::NotWaiting(self.last_words()));
            }
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Gives CRIU its inventory: from here on it restores.
    pub fn let_go(&mut self, ready: Ready, inventory: &[u8]) -> Result<(), RestoreError> {
        let Ready(mut fifo) = ready;
        // An inventory is far smaller than a pipe's buffer, so the write does not block.
        fifo.write_all(inventory)
            .map_err(|source| RestoreError::Prepare {
                path: self.inventory.clone(),
                source,
            })
    }

    /// Whether the runtime has ended, and if so whether the container runs.
    pub fn poll(&mut self) -> io::Result<Option<Result<(), String>>> {
        Ok(self.child.try_wait()?.map(|status| {
            if status.success() {
                self.finished = true;
                Ok(())
            } else {
                Err(self.last_words())
            }
        }))
    }

    /// Whether the runtime has come to start CRIU, which it does when its own record of the container is made.
    pub fn has_begun(&self) -> bool {
        // Any of the runtime's threads may be the one that starts it.
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let has_child = |thread: fs::DirEntry| {
            let children = fs::read_to_string(thread.path().join("children"));
            children.is_ok_and(|children| !children.is_empty())
        };
        threads.into_iter().flatten().flatten().any(has_child)
    }

    /// The pid of the runtime's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the runtime and CRIU said last.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(self.work.join("restore.log")).unwrap_or_default();
        let criu = log
            .lines()
            .find(|line| line.contains("Error (") && !line.contains("rlimit"));
        match criu {
            Some(line) => line.trim().to_string(),
            None => Runc::last_words(&self.work),
        }
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // A CRIU that waits for its inventory gets an empty one and gives up; one that holds in its hook gives up when
        // the hook does. Killing the runtime alone would leave either behind.
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            // Again and again: it may be starting up, and come to its inventory only now.
            let _ = OpenOptions::new()
                .write(true)
                .custom_flags(OFlag::O_NONBLOCK.bits())
                .open(&self.inventory)
                .map(drop::<File>);
            thread::sleep(Duration::from_millis(1));
        }
        let group = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
