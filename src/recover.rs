//! Ending what a crash left at this host, in whatever role: `migrate recover`.

use crate::journal::{JournalDir, JournalError};
use crate::migration::MigrationId;
use crate::migration::event::Side;
use crate::source::settle::{self as source, Settled};
use crate::target::settle as target;
use crate::wire::message::Fate;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long a target is asked for the outcome of one migration.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was found of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The migration.
    pub migration: MigrationId,
    /// Which end this host was.
    pub side: Side,
    /// How it ended.
    pub end: End,
}

/// How a migration ended at this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The container lives at the target.
    Moved,
    /// It goes on at the source.
    RolledBack,
    /// A process of the engine is still at it.
    Running,
    /// The target has not said; the container stays frozen at the source.
    Unknown(String),
    /// The container lives at the target and lacks pages that are kept at the source.
    Incomplete(String),
    /// Something stands in the way.
    Stuck(String),
}

/// Settles every migration in the journals of `state_dir` that is not settled, and says how each of them ended.
///
/// Migrations that had ended before are not among the findings.
pub fn recover(state_dir: &Path) -> Result<Vec<Finding>, JournalError> {
    let mut findings = Vec::new();
    for name in JournalDir::open(state_dir)?.list()? {
        let end = match name.side {
            Side::Source => source_end(state_dir, name.migration),
            Side::Target => target_end(state_dir, name.migration),
        };
        findings.extend(end.map(|end| Finding {
            migration: name.migration,
            side: name.side,
            end,
        }));
    }
    Ok(findings)
}

/// How long another process that looks for the target may take to let go of its journal: it asks and tries to serve, and each
/// may take as long as a connection.
const LOCK_PATIENCE: Duration = Duration::from_secs(40);

/// Serves every container that moved away from here and lacks pages, until it has them or its target is looked for in vain.
pub fn resume(state_dir: &Path) -> Result<Vec<Finding>, JournalError> {
    let mut findings = Vec::new();
    for name in JournalDir::open(state_dir)?.list()? {
        if name.side == Side::Target || !source::is_serving(state_dir, name.migration) {
            continue;
        }
        let deadline = Instant::now() + LOCK_PATIENCE;
        let end = loop {
            match source_end(state_dir, name.migration) {
                // The guard tries now and then, and lets go in between.
                Some(End::Running) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(20));
                }
                end => break end,
            }
        };
        findings.extend(end.map(|end| Finding {
            migration: name.migration,
            side: name.side,
            end,
        }));
    }
    Ok(findings)
}

fn source_end(state_dir: &Path, migration: MigrationId) -> Option<End> {
    Some(match source::settle(state_dir, migration, PATIENCE) {
        Ok(None) => End::Running,
        Ok(Some(Settled::Already)) => return None,
        Ok(Some(Settled::Committed)) => End::Moved,
        Ok(Some(Settled::RolledBack)) => End::RolledBack,
        Ok(Some(Settled::StandsStill { reason })) => End::Stuck(format!(
            "rolled back, and the container does not go on: {reason}"
        )),
        Ok(Some(Settled::Unknown { reason })) => End::Unknown(reason),
        Ok(Some(Settled::Incomplete { reason, .. })) => End::Incomplete(reason),
        Err(error) => End::Stuck(error.to_string()),
    })
}

fn target_end(state_dir: &Path, migration: MigrationId) -> Option<End> {
    Some(match target::settle(state_dir, migration) {
        Ok(None) => End::Running,
        Ok(Some(target::Settled::Already)) => return None,
        Ok(Some(target::Settled::Owing)) => {
            End::Incomplete("start the agent here, and it takes them in".into())
        }
        Ok(Some(target::Settled::Now(Fate::Committed))) => End::Moved,
        Ok(Some(target::Settled::Now(_))) => End::RolledBack,
        Err(error) => End::Stuck(error.to_string()),
    })
}
