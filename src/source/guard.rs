//! The guard: a process that outlives the source's, and ends its migration if it dies.
//!
//! A container whose cgroup is frozen stays frozen when the process that froze it is killed. So before anything is
//! frozen a second process is started that does nothing but wait for the end of a pipe. When it comes and the journal
//! says that the migration is not settled, it does what `migrate recover` does, for as long as it takes.

use super::settle::{self, Settled};
use crate::migration::MigrationId;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long one attempt of the guard to settle a migration asks the target; attempts follow one another.
const ATTEMPT: Duration = Duration::from_secs(60);

/// Between two looks at a journal that someone else has locked.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// The guard could not be started: without it nothing is frozen.
#[derive(Debug, Error)]
#[error("cannot start the guard process: {0}")]
pub struct GuardError(#[source] io::Error);

/// A guard at work. Dropping it, as dying does, lets it look at the journal and go.
#[derive(Debug)]
pub struct Guard {
    child: Option<Child>,
}

impl Guard {
    /// Starts `program guard` for a migration.
    pub fn start(
        program: &Path,
        state_dir: &Path,
        migration: MigrationId,
    ) -> Result<Guard, GuardError> {
        let child = Command::new(program)
            .arg("guard")
            .arg(state_dir)
            .arg(migration.to_string())
            // Not in our process group: what the terminal kills us with must not kill it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(GuardError)?;
        Ok(Guard { child: Some(child) })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.stdin.take());
            // It goes at once if the migration is settled, and stays as long as it takes if it is not.
            thread::spawn(move || child.wait());
        }
    }
}

/// What the guard process does.
pub fn watch(state_dir: &Path, migration: MigrationId) {
    // Nothing is ever written: the end of the pipe is the end of its writer.
    let _ = io::stdin().read(&mut [0]);
    let mut lost: Option<Instant> = None;
    loop {
        match settle::settle(state_dir, migration, ATTEMPT) {
            Ok(Some(Settled::Unknown { reason })) => {
                tracing::warn!(%reason, "the outcome is still unknown, asking on")
            }
            Ok(Some(Settled::StandsStill { reason })) => {
                tracing::error!(%reason, "the container does not go on, trying on");
                thread::sleep(settle::PAUSE);
            }
            Ok(Some(Settled::Incomplete {
                reason,
                patience,
                served,
            })) => {
                // A target that took pages is looked for anew.
                lost = lost.filter(|_| !served);
                if lost.get_or_insert_with(Instant::now).elapsed() > patience {
                    tracing::error!(%reason, "pages of a container that moved are still here; go on with: migrate resume");
                    return;
                }
                // `migrate resume` may want the journal.
                thread::sleep(settle::PAUSE);
            }
            // The lock of a process that was just killed may outlive its end of our pipe for a moment: the kernel drops
            // both in no particular order. `migrate recover` may have it too, and leave the question open.
            Ok(None) if settle::is_known(state_dir, migration) => thread::sleep(LOCK_PAUSE),
            Ok(_) => return,
            Err(error) => {
                tracing::error!(%error, "the guard cannot settle the migration");
                return;
            }
        }
    }
}
