//! Ending what a crash left at this host, in whatever role: `migrate recover`.

use crate::journal::prune::prune;
use crate::journal::{JournalDir, JournalError};
use crate::migration::MigrationId;
use crate::migration::event::Side;
use crate::source::settle::{self as source, Settled, Sharing};
use crate::target::settle as target;
use crate::wire::message::Fate;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

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
    /// A process of the engine is still at it: which, as far as it is known.
    Running(Option<String>),
    /// The target has not said; the container stays frozen at the source.
    Unknown(String),
    /// The container runs at the target and is not known to be complete there; it is kept at the source.
    Incomplete(String),
    /// Its copy here was lost before it was complete: the source goes on with what it kept.
    Lost,
    /// It goes on here as it was at the switch: its copy was lost at the target.
    TakenBack,
    /// Its copy is lost, and it is frozen here until a person says what becomes of it.
    Stranded,
    /// Something stands in the way.
    Stuck(String),
}

/// Settles every migration in the journals of `state_dir` that is not settled, and says how each of them ended.
///
/// Migrations that had ended before are not among the findings.
/// The container of migration `resume_source` goes on here if its copy is lost, whatever files they shared.
pub fn recover(
    state_dir: &Path,
    resume_source: Option<MigrationId>,
) -> Result<Vec<Finding>, JournalError> {
    crate::source::proofs::sweep(state_dir);
    let mut findings = Vec::new();
    let journals = JournalDir::open(state_dir)?;
    prune(&journals, SystemTime::now());
    for name in journals.list()? {
        let end = match name.side {
            Side::Source if resume_source == Some(name.migration) => {
                source_end(state_dir, name.migration, Sharing::GoOn)
            }
            Side::Source => source_end(state_dir, name.migration, Sharing::AskPerson),
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

/// Looks after every container that moved away from here and is not complete, until it is or its target is looked for in vain.
pub fn resume(state_dir: &Path) -> Result<Vec<Finding>, JournalError> {
    let mut findings = Vec::new();
    for name in JournalDir::open(state_dir)?.list()? {
        if name.side == Side::Target || !source::is_serving(state_dir, name.migration) {
            continue;
        }
        let deadline = Instant::now() + LOCK_PATIENCE;
        let end = loop {
            match source_end(state_dir, name.migration, Sharing::AskPerson) {
                // The guard tries now and then, and lets go in between.
                Some(End::Running(_)) if Instant::now() < deadline => {
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

fn source_end(state_dir: &Path, migration: MigrationId, sharing: Sharing) -> Option<End> {
    Some(
        match source::settle_as(state_dir, migration, PATIENCE, sharing, None) {
            Ok(None) => End::Running(None),
            Ok(Some(Settled::Held { by })) => End::Running(Some(by)),
            Ok(Some(Settled::Already)) => return None,
            Ok(Some(Settled::Committed)) => End::Moved,
            Ok(Some(Settled::RolledBack)) => End::RolledBack,
            Ok(Some(Settled::TakenBack)) => End::TakenBack,
            Ok(Some(Settled::Stranded)) => End::Stranded,
            Ok(Some(Settled::StandsStill { reason })) => End::Stuck(format!(
                "rolled back, and the container does not go on: {reason}"
            )),
            Ok(Some(Settled::Unknown { reason })) => End::Unknown(reason),
            Ok(Some(Settled::Incomplete { reason, .. })) => End::Incomplete(reason),
            Err(error) => End::Stuck(error.to_string()),
        },
    )
}

fn target_end(state_dir: &Path, migration: MigrationId) -> Option<End> {
    Some(match target::settle(state_dir, migration, None) {
        Ok(None) => End::Running(None),
        Ok(Some(target::Settled::Held(by))) => End::Running(Some(by)),
        Ok(Some(target::Settled::Already)) => return None,
        Ok(Some(target::Settled::Owing)) => {
            End::Incomplete("start the agent here, and it sees it through".into())
        }
        Ok(Some(target::Settled::Now(Fate::Complete))) => End::Moved,
        Ok(Some(target::Settled::Now(Fate::Lost))) => End::Lost,
        Ok(Some(target::Settled::Now(_))) => End::RolledBack,
        Err(error) => End::Stuck(error.to_string()),
    })
}
