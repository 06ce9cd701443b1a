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
use crate::migration::{ContainerId, JournalId, MigrationId, PeerAddress};
use crate::runtime::cpu_quota::{self, QuotaError, Slowed};
use crate::runtime::lock::{ContainerLock, Holder, LockError};
use crate::runtime::runc::Runc;
use crate::runtime::{Freezer, Instance, Task};
use crate::transport::{Connector, Identity, Settings, TrustStore};
use crate::wire::message::{Fate, Message, Query};
use crate::wire::peer_error::PeerError;
use std::path::{Path, PathBuf};
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
    /// The container's lock cannot be used.
    #[error(transparent)]
    Lock(#[from] LockError),
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
    /// Somebody is at the container, so it was left alone.
    Held {
        /// Who.
        by: String,
    },
    /// The container lives at the target.
    Committed,
    /// It goes on here.
    RolledBack,
    /// It goes on here as it was at the switch: the copy at the target ran, and was lost before it was complete.
    TakenBack,
    /// The copy at the target is lost, and both used the same files: a person has to say what becomes of what is frozen here.
    Stranded,
    /// The copy at the target is not known to be complete; what it may need is kept here.
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
    /// Its certificate: nobody else's word counts.
    pub peer: &'a str,
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
                meaning(self.target_journal, journal, fate),
                format!("the target says {fate:?}"),
            ),
            Ok(None) => (
                SourceEvent::TargetUnreachable,
                format!("{} gives no answer", self.target),
            ),
            Err(error) => (SourceEvent::TargetUnreachable, error.to_string()),
        }
    }

    fn answer(&self) -> Result<Option<(JournalId, Fate)>, LinkError> {
        let (heard, answers) = mpsc::channel();
        let settings = Settings {
            connect_timeout: Settings::RETRY_TIMEOUT,
            ..Settings::default()
        };
        let connector = connector(self.state_dir, settings)?;
        let link = Link::connect(self.target, connector, heard, |said| said)?;
        let mut link = link.only_to(self.peer, self.target)?;
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

/// What the word of the journal `journal` means where `target_journal` holds what was prepared: a target with another journal has
/// lost its records, and has no say.
pub(super) fn meaning(target_journal: JournalId, journal: JournalId, fate: Fate) -> SourceEvent {
    if journal != target_journal {
        return SourceEvent::TargetJournalLost;
    }
    match fate {
        Fate::Complete => SourceEvent::TargetSaysComplete,
        Fate::Serving => SourceEvent::TargetSaysServing,
        Fate::Lost => SourceEvent::TargetSaysLost,
        Fate::RolledBack => SourceEvent::TargetSaysRolledBack,
        Fate::InProgress => SourceEvent::TargetSaysPending,
        Fate::UnknownMigration => SourceEvent::TargetNeverHeard,
    }
}

impl SourceEvent {
    /// A lost copy may have written to files that what is frozen here uses too: then a person decides.
    pub(super) fn with_files_shared(self, shared: bool) -> SourceEvent {
        match self {
            SourceEvent::TargetSaysLost if shared => SourceEvent::TargetSaysLostSharing,
            event => event,
        }
    }
}

/// Why a container goes on, or waits, that had been let run at the target.
pub const LOST: &str = "its copy ran at the target and was lost there before it was complete; \
     what is here is the container as it was at the switch";

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

/// Whether the container of this migration runs at the target and may need what is kept here.
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
            SourceRecord::Deciding => found.owing.is_some_and(|owing| !owing.spaces.is_empty()),
            _ => false,
        },
        _ => false,
    }
}

/// Settles the migration `migration` from here, asking the target for at most `patience` if only it can know.
///
/// `held` is the lock of its container, if the caller has it. `None` if there is no such migration or it is still running.
pub fn settle(
    state_dir: &Path,
    migration: MigrationId,
    patience: Duration,
    held: Option<&mut ContainerLock>,
) -> Result<Option<Settled>, SettleError> {
    settle_as(state_dir, migration, patience, Sharing::AskPerson, held)
}

/// What becomes of a frozen container whose copy is lost and has used the same files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It stays frozen.
    AskPerson,
    /// It goes on: a person has said so.
    GoOn,
}

/// [`settle`], with a person's word on what becomes of a container whose copy is lost.
pub fn settle_as(
    state_dir: &Path,
    migration: MigrationId,
    patience: Duration,
    sharing: Sharing,
    held: Option<&mut ContainerLock>,
) -> Result<Option<Settled>, SettleError> {
    let journals = JournalDir::open(state_dir)?;
    let name = JournalName {
        migration,
        side: Side::Source,
    };
    let Some(recovered) = recovered(&journals, name)? else {
        return Ok(None);
    };
    let opened = &recovered.opened;
    let (root, id) = (&opened.runtime_root, opened.container.as_str());
    if is_over(state_dir, &recovered) {
        // Neither is a container locked for it, nor a journal opened: there may be many of these.
        match held {
            Some(lock) if lock.is_anothers(migration) => {}
            Some(lock) => lock.is_over(),
            None => ContainerLock::clear(root, id, migration),
        }
        return Ok(Some(Settled::Already));
    }
    let mut taken;
    let lock = match held {
        Some(lock) => lock,
        None => {
            taken = match ContainerLock::take_now(root, id) {
                Err(LockError::Held { holder, .. }) => {
                    let by = holder.to_string();
                    return Ok(Some(Settled::Held { by }));
                }
                taken => taken?,
            };
            &mut taken
        }
    };
    // As it is now that nobody else goes on with it.
    let (journal, records) = match journals.reopen(name) {
        Err(JournalError::InUse { .. }) => return Ok(None),
        opened => opened?,
    };
    let recovered = match journal::fold(&records) {
        Ok(Recovered::Source(recovered)) => recovered,
        Ok(Recovered::Target(_)) => return Ok(None),
        Err(source) => return Err(SettleError::Damaged { migration, source }),
    };
    let is_anothers = lock.is_anothers(migration);
    if !is_anothers {
        let peer = recovered.opened.peer.to_string();
        let holder = Holder::new(migration, Side::Source, peer, state_dir);
        if let Err(error) = lock.claim(holder) {
            tracing::warn!(%error, "the container's lock does not say who has it");
        }
        lock.is_not_over();
    }
    let recovery = Recovery {
        state_dir,
        recovered: &recovered,
        instance: Instance::on_record(&recovered.opened),
        is_anothers,
        journal,
        reason: String::new(),
        stands_still: None,
        served: false,
        was_lost: false,
        sharing,
    };
    let settled = recovery.run(patience);
    if !is_anothers
        && matches!(
            settled,
            Settled::Committed | Settled::RolledBack | Settled::TakenBack
        )
    {
        lock.is_over();
    }
    if settled == Settled::RolledBack && recovered.last == SourceRecord::Opened {
        tell_target(state_dir, &recovered);
    }
    Ok(Some(settled))
}

/// Lets the target know that the source of this migration is gone and the container went on: it takes its copy away at once
/// and not when it misses the source. A question is enough, for before a commit the answer to it is to give up.
fn tell_target(state_dir: &Path, recovered: &RecoveredSource) {
    let opened = &recovered.opened;
    let question = Question {
        state_dir,
        target: &opened.peer,
        peer: &opened.peer_fingerprint,
        migration: opened.migration,
        target_journal: recovered
            .target_journal
            .unwrap_or(JournalId::from_bytes([0; 16])),
    };
    // One that cannot be reached finds out by itself.
    let (_, reason) = question.ask();
    tracing::info!(migration = %opened.migration, %reason, "told the target");
}

/// What the journal of a migration from here says now; `None` if there is none.
fn recovered(
    journals: &JournalDir,
    name: JournalName,
) -> Result<Option<RecoveredSource>, SettleError> {
    let Some(records) = journals.read(name)? else {
        return Ok(None);
    };
    match journal::fold(&records) {
        Ok(Recovered::Source(recovered)) => Ok(Some(recovered)),
        Ok(Recovered::Target(_)) => Ok(None),
        Err(source) => Err(SettleError::Damaged {
            migration: name.migration,
            source,
        }),
    }
}

/// Whether a migration has ended and left nothing to do.
fn is_over(state_dir: &Path, recovered: &RecoveredSource) -> bool {
    matches!(
        recovered.last,
        SourceRecord::RolledBack | SourceRecord::Closed
    ) && !Plan::work_dir(state_dir, recovered.opened.migration).exists()
}

/// Whether anything is left to do for a migration from here; one whose journal cannot be read is left to whoever settles it.
pub fn is_unsettled(state_dir: &Path, migration: MigrationId) -> bool {
    let name = JournalName {
        migration,
        side: Side::Source,
    };
    let recovered = JournalDir::open(state_dir)
        .map_err(SettleError::from)
        .and_then(|journals| recovered(&journals, name));
    !matches!(recovered, Ok(Some(recovered)) if is_over(state_dir, &recovered))
}

/// Whether a migration from here may still have to do with this very container: then no other may begin.
pub fn concerns(state_dir: &Path, migration: MigrationId, instance: &Instance) -> bool {
    let name = JournalName {
        migration,
        side: Side::Source,
    };
    let recovered = JournalDir::open(state_dir)
        .map_err(SettleError::from)
        .and_then(|journals| recovered(&journals, name));
    match recovered {
        Ok(Some(recovered)) => {
            Instance::on_record(&recovered.opened) == *instance && !is_over(state_dir, &recovered)
        }
        Ok(None) => false,
        // What cannot be read may say anything.
        Err(_) => true,
    }
}

/// The container and the migration that a journal is about; `None` if there is none that can be read.
pub fn container_of(state_dir: &Path, migration: MigrationId) -> Option<(PathBuf, ContainerId)> {
    let name = JournalName {
        migration,
        side: Side::Source,
    };
    let journals = JournalDir::open(state_dir).ok()?;
    let opened = recovered(&journals, name).ok()??.opened;
    Some((opened.runtime_root, opened.container))
}

/// A migration being ended after its process died.
struct Recovery<'a> {
    state_dir: &'a Path,
    recovered: &'a RecoveredSource,
    /// What tells the container from any other of its name.
    instance: Instance,
    /// The container has another unfinished migration: its copy, frozen or not, is that one's.
    is_anothers: bool,
    journal: Journal,
    reason: String,
    stands_still: Option<String>,
    /// Owed pages were sent, or the target was there.
    served: bool,
    /// The target has said that its copy is lost.
    was_lost: bool,
    sharing: Sharing,
}

impl Recovery<'_> {
    fn run(mut self, patience: Duration) -> Settled {
        // Whatever became of it, and even if that stays unknown: nothing is slowed for a migration that is over.
        if self.may_touch() && self.is_there() {
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
            SourceState::RolledBack if self.was_lost => Settled::TakenBack,
            SourceState::RolledBack => Settled::RolledBack,
            SourceState::Stranded => return Settled::Stranded,
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
                    peer: &self.recovered.opened.peer_fingerprint,
                    migration: self.recovered.opened.migration,
                    target_journal,
                };
                let (event, reason) = question.ask();
                tracing::info!(%reason, "asked the target");
                self.reason = reason;
                Some(self.if_lost(event))
            }
            SourceAction::RecordServing => self.write(&Record::Serving),
            SourceAction::ServePages => Some(self.serve_pages()),
            SourceAction::ResumeContainer => {
                // On record first: a hook that still holds the dump reads it and makes CRIU let go.
                self.write(&Record::RolledBack);
                self.wait_for_dump(|| {
                    // Perhaps for that: CRIU cannot take hold of some tasks while they are frozen.
                    if self.may_touch() && self.was_frozen() {
                        let thawed = remains::thaw(&self.freezer(), &self.instance);
                        self.tidy("thaw the container", thawed);
                    }
                });
                if self.may_touch() && self.was_frozen() {
                    let opened = &self.recovered.opened;
                    let went_on = remains::let_go_on(
                        &Runc::new(&opened.runtime_root),
                        opened.container.as_str(),
                        &self.freezer(),
                        &self.instance,
                    );
                    self.tidy("let the container go on", went_on);
                    let goes_on =
                        going_on::make_sure(&self.freezer(), &self.instance, self.dump().as_ref());
                    self.stands_still = goes_on.err().map(|error| error.to_string());
                }
                None
            }
            SourceAction::DestroyFrozenCopy => {
                if self.may_touch() {
                    self.tidy(
                        "kill the frozen copy",
                        remains::kill_frozen(&self.freezer(), &self.instance),
                    );
                    self.wait_for_dump(|| {});
                    let opened = &self.recovered.opened;
                    let copy = LeftCopy {
                        runc: &Runc::new(&opened.runtime_root),
                        id: opened.container.as_str(),
                        instance: &self.instance,
                        freezer: &self.freezer(),
                        came_by: opened.came_by,
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
        let Some(target_journal) = self.recovered.target_journal else {
            return SourceEvent::TargetUnreachable;
        };
        if !self.same_boot() {
            // What was frozen here is gone: only the target can know whether it needed it.
            let question = Question {
                state_dir: self.state_dir,
                target: &opened.peer,
                peer: &opened.peer_fingerprint,
                migration: opened.migration,
                target_journal,
            };
            let (event, reason) = question.ask();
            self.reason = format!("{reason}; this host was restarted: what was kept here is lost");
            return match event {
                SourceEvent::TargetSaysServing => SourceEvent::TargetSaysPending,
                event => self.if_lost(event),
            };
        }
        let nothing = journal::Owing::default();
        let owed = Owed {
            state_dir: self.state_dir,
            target: &opened.peer,
            peer: &opened.peer_fingerprint,
            migration: opened.migration,
            target_journal,
            owing: self.recovered.owing.as_ref().unwrap_or(&nothing),
        };
        let mut served = false;
        let (event, reason) = owed.serve(&mut |told| match told {
            Told::Connected { owed } => {
                served |= !owed;
                tracing::info!(migration = %opened.migration, "the target is there, its copy is not complete")
            }
            Told::Progress(progress) => {
                served |= progress.has_sent();
                tracing::debug!(?progress, "serving owed pages");
            }
            Told::Whole(_) => {
                tracing::info!(migration = %opened.migration, "the copy has every page")
            }
            Told::Filled(_) => {}
        });
        tracing::info!(%reason, "looked after the copy");
        self.served |= served || event == SourceEvent::TargetSaysPending;
        self.reason = reason;
        self.if_lost(event)
    }

    /// What a lost copy means for what is frozen here.
    fn if_lost(&mut self, event: SourceEvent) -> SourceEvent {
        if event == SourceEvent::TargetSaysLost {
            self.was_lost = true;
            self.reason = LOST.into();
        }
        let owing = self.recovered.owing.as_ref();
        let shares_files = owing.is_some_and(|owing| owing.shares_files);
        event.with_files_shared(shares_files && self.sharing == Sharing::AskPerson)
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

    /// Whether the engine may have stopped the container, or somebody else if it is stopped.
    fn was_frozen(&self) -> bool {
        self.recovered.leftovers.contains(&Leftover::Freeze)
    }

    fn same_boot(&self) -> bool {
        crate::kernel::boot_id().is_ok_and(|now| now == self.recovered.opened.boot_id)
    }

    /// Whether what the journal is about may be touched, if it is still there.
    fn may_touch(&self) -> bool {
        self.same_boot() && !self.is_anothers
    }

    /// Whether the container's cgroups are still its own.
    fn is_there(&self) -> bool {
        matches!(self.freezer().pinned(self.instance.cgroup), Ok(Some(_)))
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
