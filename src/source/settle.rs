//! Learning how a migration ended, and ending it here: what is left to do after a crash or a lost reply.
//!
//! The journal says where the handover stood; the same table as in a running migration says what to do. Only the
//! target's word settles a migration in which *commit* may have been sent: until then the container stays frozen.

use super::dump_processes::DumpProcesses;
use super::going_on;
use super::link::{Link, LinkError};
use super::plan::Plan;
use super::remains::{self, LeftCopy};
use super::resume::{Owed, Told};
use crate::journal::{Journal, JournalDir, JournalError, JournalName};
use crate::migration::event::Side;
use crate::migration::handoff::source::SourceRecord;
use crate::migration::handoff::{Course, SourceAction, SourceEvent, SourceState};
use crate::migration::journal::{self, FoldError, Leftover, Record, Recovered, RecoveredSource};
use crate::migration::{JournalId, MigrationId, PeerAddress};
use crate::runtime::cpu_quota::{self, QuotaError, Slowed};
use crate::runtime::runc::Runc;
use crate::runtime::{Freezer, Task};
use crate::transport::{Connector, Identity, Settings, TrustStore};
use crate::wire::message::{Fate, Message, Query};
use crate::wire::peer_error::PeerError;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Between two questions to a target that does not know yet or cannot be reached.
pub const PAUSE: Duration = Duration::from_millis(500);

/// How long a target that is owed pages is looked for in one attempt to settle.
const SERVING_ATTEMPT: Duration = Duration::from_secs(2);

/// How long an answer may take.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// How long a CRIU whose engine died may take to undo or finish its dump.
const CRIU_PATIENCE: Duration = Duration::from_secs(20);

/// After which a CRIU that should let go seems to wait for something.
const SLOW: Duration = Duration::from_secs(2);

/// Why a migration could not be settled.
#[derive(Debug, Error)]
pub enum SettleError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal holds what no engine wrote; the migration is left alone.
    #[error("the journal of migration {migration} is damaged, nothing was done: {source}")]
    Damaged {
        /// The migration.
        migration: MigrationId,
        /// What is wrong.
        source: FoldError,
    },
}

/// How a migration from here ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It had ended before, and nothing was left to do.
    Already,
    /// The container lives at the target.
    Committed,
    /// It goes on here.
    RolledBack,
    /// The container lives at the target, which lacks pages and cannot be reached; they are kept here.
    Incomplete {
        /// What stood in the way, last.
        reason: String,
        /// How long the target was to be looked for when the migration began.
        patience: Duration,
        /// Some pages were sent meanwhile.
        served: bool,
    },
    /// It is to go on here, and cannot be seen to.
    StandsStill {
        /// Why.
        reason: String,
    },
    /// The target has not said; the container stays frozen.
    Unknown {
        /// What stood in the way, last.
        reason: String,
    },
}

/// A question to a target about a migration.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Where identity and trust store are.
    pub state_dir: &'a Path,
    /// Whom to ask.
    pub target: &'a PeerAddress,
    /// About what.
    pub migration: MigrationId,
    /// The journal whose word counts.
    pub target_journal: JournalId,
}

impl Question<'_> {
    /// Asks once. The text says what the answer was, for people.
    pub fn ask(&self) -> (SourceEvent, String) {
        match self.answer() {
            Ok(Some((journal, fate))) => (
                self.meaning(journal, fate),
                format!("the target says {fate:?}"),
            ),
            Ok(None) => (
                SourceEvent::TargetUnreachable,
                format!("{} gives no answer", self.target),
            ),
            Err(error) => (SourceEvent::TargetUnreachable, error.to_string()),
        }
    }

    fn meaning(&self, journal: JournalId, fate: Fate) -> SourceEvent {
        match fate {
            Fate::Committed => SourceEvent::TargetSaysCommitted,
            // What is lost there is kept here: whether it is worth anything is for a person to say.
            Fate::Serving | Fate::Lost => SourceEvent::TargetSaysServing,
            Fate::RolledBack => SourceEvent::TargetSaysRolledBack,
            Fate::InProgress => SourceEvent::TargetSaysPending,
            // "Never heard of it" proves something only from the journal that prepared it.
            Fate::UnknownMigration if journal == self.target_journal => {
                SourceEvent::TargetNeverHeard
            }
            Fate::UnknownMigration => SourceEvent::TargetJournalLost,
        }
    }

    fn answer(&self) -> Result<Option<(JournalId, Fate)>, LinkError> {
        let (heard, answers) = mpsc::channel();
        let settings = Settings {
            connect_timeout: Settings::RETRY_TIMEOUT,
            ..Settings::default()
        };
        let connector = connector(self.state_dir, settings)?;
        let mut link = Link::connect(self.target, connector, heard, |said| said)?;
        link.say(Query {
            migration: self.migration,
        })?;
        let deadline = Instant::now() + ANSWER_PATIENCE;
        let mut answer = None;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match answers.recv_timeout(left) {
                Ok(Ok(Message::Outcome(outcome))) => {
                    answer = Some((outcome.journal, outcome.fate));
                    break;
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error.into()),
                Err(_) => break,
            }
        }
        link.close(PeerError::Done);
        Ok(answer)
    }
}

impl SourceEvent {
    /// A target that says it is owed pages when it is not is not believed: it is asked again.
    pub(super) fn unless_nothing_is_owed(self, nothing_is_owed: bool) -> SourceEvent {
        match self {
            SourceEvent::TargetSaysServing if nothing_is_owed => SourceEvent::TargetSaysPending,
            event => event,
        }
    }
}

/// What connects to targets as this host.
pub fn connector(state_dir: &Path, settings: Settings) -> Result<Connector, LinkError> {
    let identity = Identity::load_or_create(state_dir)?;
    let trust = TrustStore::in_dir(state_dir);
    Ok(Connector::new(Arc::new(identity), trust, settings))
}

/// Whether there is a journal of this migration from here.
pub fn is_known(state_dir: &Path, migration: MigrationId) -> bool {
    let name = JournalName {
        migration,
        side: Side::Source,
    };
    JournalDir::open(state_dir).is_ok_and(|journals| journals.file(name).exists())
}

/// Whether the container of this migration lives at the target and may lack pages that are kept here.
pub fn is_serving(state_dir: &Path, migration: MigrationId) -> bool {
    let name = JournalName {
        migration,
        side: Side::Source,
    };
    let records = JournalDir::open(state_dir).and_then(|journals| journals.read(name));
    let Ok(Some(records)) = records else {
        return false;
    };
    match journal::fold(&records) {
        Ok(Recovered::Source(found)) => match found.last {
            SourceRecord::Serving => true,
            SourceRecord::Deciding => found.owing.is_some(),
            _ => false,
        },
        _ => false,
    }
}

/// Settles the migration `migration` from here, asking the target for at most `patience` if only it can know.
///
/// `None` if there is no such migration or it is still running.
pub fn settle(
    state_dir: &Path,
    migration: MigrationId,
    patience: Duration,
) -> Result<Option<Settled>, SettleError> {
    let journals = JournalDir::open(state_dir)?;
    let name = JournalName {
        migration,
        side: Side::Source,
    };
    if journals.read(name)?.is_none() {
        return Ok(None);
    }
    let (journal, records) = match journals.reopen(name) {
        Err(JournalError::InUse { .. }) => return Ok(None),
        opened => opened?,
    };
    let recovered = match journal::fold(&records) {
        Ok(Recovered::Source(recovered)) => recovered,
        Ok(Recovered::Target(_)) => return Ok(None),
        Err(source) => return Err(SettleError::Damaged { migration, source }),
    };
    if matches!(
        recovered.last,
        SourceRecord::RolledBack | SourceRecord::Closed
    ) {
        // It is removed last of all: while it is there, something was left to do.
        if !Plan::work_dir(state_dir, migration).exists() {
            return Ok(Some(Settled::Already));
        }
    }
    let recovery = Recovery {
        state_dir,
        recovered: &recovered,
        journal,
        reason: String::new(),
        stands_still: None,
        served: false,
    };
    Ok(Some(recovery.run(patience)))
}

/// A migration being ended after its process died.
struct Recovery<'a> {
    state_dir: &'a Path,
    recovered: &'a RecoveredSource,
    journal: Journal,
    reason: String,
    stands_still: Option<String>,
    /// Owed pages were sent.
    served: bool,
}

impl Recovery<'_> {
    fn run(mut self, patience: Duration) -> Settled {
        // Whatever became of it, and even if that stays unknown: nothing is slowed for a migration that is over.
        if self.same_boot() {
            self.tidy(
                "give the container its CPU quota back",
                self.restore_quota(),
            );
        }
        let began = Instant::now();
        let mut course = Course::<SourceState>::recover(self.recovered.last);
        while let Some(action) = course.next_action() {
            if let Some(event) = self.perform(action)
                && let Err(impossible) = course.on(event)
            {
                tracing::error!(%impossible, "recovery stays where it is");
            }
            let reason = || self.reason.clone();
            match course.state() {
                SourceState::Unknown if Instant::now() > began + patience => {
                    return Settled::Unknown { reason: reason() };
                }
                // Served as long as it takes; who looks for a lost target goes on with another attempt, and leaves the
                // journal to others in between.
                SourceState::Serving if Instant::now() > began + SERVING_ATTEMPT => {
                    let owing = self.recovered.owing.as_ref();
                    return Settled::Incomplete {
                        reason: reason(),
                        patience: Duration::from_secs(owing.map_or(0, |owing| owing.reconnect_s)),
                        served: self.served,
                    };
                }
                SourceState::Unknown | SourceState::Serving => thread::sleep(PAUSE),
                _ => {}
            }
        }
        if let Some(reason) = self.stands_still {
            return Settled::StandsStill { reason };
        }
        let settled = match course.state() {
            SourceState::Committed => Settled::Committed,
            SourceState::RolledBack => Settled::RolledBack,
            // Stopped half way by what cannot be: nothing may be touched.
            state => {
                let reason = format!("recovery stopped in state {state:?}: {}", self.reason);
                return Settled::Unknown { reason };
            }
        };
        let work_dir = Plan::work_dir(self.state_dir, self.recovered.opened.migration);
        if let Err(error) = remains::remove_work(&work_dir) {
            tracing::warn!(%error, path = %work_dir.display(), "cannot remove the working directory");
        }
        settled
    }

    fn perform(&mut self, action: SourceAction) -> Option<SourceEvent> {
        match action {
            SourceAction::AskTarget => {
                let Some(target_journal) = self.recovered.target_journal else {
                    return Some(SourceEvent::TargetUnreachable);
                };
                let question = Question {
                    state_dir: self.state_dir,
                    target: &self.recovered.opened.peer,
                    migration: self.recovered.opened.migration,
                    target_journal,
                };
                let (event, reason) = question.ask();
                tracing::info!(%reason, "asked the target");
                self.reason = reason;
                Some(event.unless_nothing_is_owed(self.recovered.owing.is_none()))
            }
            SourceAction::RecordServing => self.write(&Record::Serving),
            SourceAction::ServePages => Some(self.serve_pages()),
            SourceAction::ResumeContainer => {
                // On record first: a hook that still holds the dump reads it and makes CRIU let go.
                self.write(&Record::RolledBack);
                self.wait_for_dump(|| {
                    // Perhaps for that: CRIU cannot take hold of some tasks while they are frozen.
                    self.tidy("thaw the container", self.freezer().thaw());
                });
                if self.same_boot() {
                    let opened = &self.recovered.opened;
                    let went_on = remains::let_go_on(
                        &Runc::new(&opened.runtime_root),
                        opened.container.as_str(),
                        &self.freezer(),
                        opened.init.pid,
                    );
                    self.tidy("let the container go on", went_on);
                    let goes_on = going_on::make_sure(&self.freezer(), self.dump().as_ref());
                    self.stands_still = goes_on.err().map(|error| error.to_string());
                }
                None
            }
            SourceAction::DestroyFrozenCopy => {
                if self.same_boot() {
                    self.tidy(
                        "kill the frozen copy",
                        remains::kill_frozen(&self.freezer()),
                    );
                    self.wait_for_dump(|| {});
                    let opened = &self.recovered.opened;
                    let copy = LeftCopy {
                        runc: &Runc::new(&opened.runtime_root),
                        id: opened.container.as_str(),
                        freezer: &self.freezer(),
                        bundle: &opened.bundle,
                        state_dir: self.state_dir,
                    };
                    self.tidy("remove the frozen copy", copy.destroy());
                }
                None
            }
            SourceAction::RecordCommitted => self.write(&Record::Committed),
            SourceAction::RecordRolledBack => self.write(&Record::RolledBack),
            SourceAction::RecordClosed => self.write(&Record::Closed),
            // The target learns from its own timer; the rest belongs to a migration on its way forward.
            _ => None,
        }
    }

    fn serve_pages(&mut self) -> SourceEvent {
        let opened = &self.recovered.opened;
        let Some(owing) = self.recovered.owing.as_ref().filter(|_| self.same_boot()) else {
            self.reason = "this host was restarted: the pages the copy lacks are lost".into();
            return SourceEvent::TargetUnreachable;
        };
        let owed = Owed {
            state_dir: self.state_dir,
            target: &opened.peer,
            migration: opened.migration,
            owing,
        };
        let mut served = false;
        let (event, reason) = owed.serve(&mut |told| match told {
            Told::Connected => {
                tracing::info!(migration = %opened.migration, "serving owed pages")
            }
            Told::Progress(progress) => {
                served |= progress.has_sent();
                tracing::debug!(?progress, "serving owed pages");
            }
            Told::Whole(_) => {
                tracing::info!(migration = %opened.migration, "the copy has every page")
            }
        });
        tracing::info!(%reason, "served owed pages");
        self.served |= served;
        self.reason = reason;
        event
    }

    fn restore_quota(&self) -> Result<(), QuotaError> {
        let steps = self.recovered.leftovers.iter();
        let steps: Vec<Slowed> = steps
            .filter_map(|leftover| match leftover {
                Leftover::CpuQuota {
                    file,
                    original,
                    lowered,
                } => Some(Slowed {
                    file: file.clone(),
                    original: original.clone(),
                    lowered: lowered.clone(),
                }),
                _ => None,
            })
            .collect();
        cpu_quota::restore(&steps)
    }

    fn write(&mut self, record: &Record) -> Option<SourceEvent> {
        let written = self.journal.append(record);
        written.err().map(|error| {
            tracing::warn!(%error, "the outcome is not on record");
            SourceEvent::RecordFailed
        })
    }

    /// The processes of the dump that the dead engine started.
    fn dump(&self) -> Option<DumpProcesses> {
        let runtime = self
            .recovered
            .leftovers
            .iter()
            .find_map(|leftover| match leftover {
                Leftover::Process { process, .. } => {
                    Some(Task::on_record(process.pid, process.start_time))
                }
                _ => None,
            })?;
        self.same_boot()
            .then(|| DumpProcesses::new(runtime, &self.recovered.opened.work_dir))
    }

    /// Waits for the dump that the dead engine started; `when_slow` is done once it takes long, and what does not end is
    /// killed.
    fn wait_for_dump(&self, when_slow: impl FnOnce()) {
        let Some(dump) = self.dump() else { return };
        let began = Instant::now();
        let mut when_slow = Some(when_slow);
        while !dump.living().is_empty() {
            if began.elapsed() > CRIU_PATIENCE {
                dump.kill();
                return;
            }
            if began.elapsed() > SLOW
                && let Some(when_slow) = when_slow.take()
            {
                when_slow();
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn same_boot(&self) -> bool {
        crate::kernel::boot_id().is_ok_and(|now| now == self.recovered.opened.boot_id)
    }

    fn freezer(&self) -> Freezer {
        freezer_on_record(&self.recovered.opened.freezer)
    }

    fn tidy<E: std::fmt::Display>(&self, what: &'static str, result: Result<(), E>) {
        if let Err(error) = result {
            tracing::error!(%error, "could not {what}");
        }
    }
}

fn freezer_on_record(freezer: &journal::Freezer) -> Freezer {
    match freezer {
        journal::Freezer::V1 { path } => Freezer::V1(path.clone()),
        journal::Freezer::V2 { path } => Freezer::V2(path.clone()),
    }
}
