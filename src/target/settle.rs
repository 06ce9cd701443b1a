//! Ending the migrations that a crash of the agent left at the target, and answering for those that ended before.

use super::pager::{self, Adopted, Life, SUPPLY_SOCKET};
use super::remains::{Copy, Found, Made, end_restore};
use crate::journal::{Journal, JournalDir, JournalError, JournalName};
use crate::migration::MigrationId;
use crate::migration::event::Side;
use crate::migration::handoff::target::TargetRecord;
use crate::migration::handoff::{Course, TargetAction, TargetEvent, TargetState};
use crate::migration::journal::{
    self, FoldError, Leftover, OwedTask, Record, Recovered, RecoveredTarget, TargetOpened,
};
use crate::runtime::Task;
use crate::runtime::home::Home;
use crate::runtime::lock::{ContainerLock, Holder, LockError};
use crate::runtime::runc::Runc;
use crate::wire::message::Fate;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Between two attempts to remove something.
const PAUSE: Duration = Duration::from_millis(500);

/// How long a settling may take until it is reported as not done.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a pager may take to see that its agent is gone, and to hand itself over.
const ADOPTION_PATIENCE: Duration = Duration::from_secs(5);

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
    /// Somebody is at the container, or nobody can tell.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Something of the copy cannot be removed.
    #[error("migration {migration} cannot be undone yet: {reason}")]
    Stuck {
        /// The migration.
        migration: MigrationId,
        /// What stands in the way.
        reason: String,
    },
}

/// What the journal says of a migration, for whoever asks with the certificate `fingerprint`.
///
/// `None` if the asker is not the one the migration came from.
pub fn fate(
    journals: &JournalDir,
    migration: MigrationId,
    fingerprint: &str,
) -> Result<Option<Fate>, SettleError> {
    let name = JournalName {
        migration,
        side: Side::Target,
    };
    let Some(records) = journals.read(name)? else {
        // A journal is removed when its end is old; that a container is here is known for ever.
        return Ok(match journals.moved(migration)? {
            Some(source) if source == fingerprint => Some(Fate::Complete),
            Some(_) => None,
            None => Some(Fate::UnknownMigration),
        });
    };
    let Recovered::Target(recovered) = fold(migration, &records)? else {
        return Ok(Some(Fate::UnknownMigration));
    };
    if recovered.opened.peer_fingerprint != fingerprint {
        return Ok(None);
    }
    Ok(Some(match recovered.last {
        TargetRecord::Complete => Fate::Complete,
        TargetRecord::Lost => Fate::Lost,
        TargetRecord::Aborted => Fate::RolledBack,
        // Whatever becomes of it: nobody is at it at this moment, and the record of the outcome is not there.
        TargetRecord::Opened
        | TargetRecord::Prepared
        | TargetRecord::Committed
        | TargetRecord::Released => Fate::InProgress,
    }))
}

/// How a migration to here ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Somebody is at the container, so it was left alone.
    Held(String),
    /// It had ended before, and nothing was left to do.
    Already,
    /// It was ended now.
    Now(Fate),
    /// The copy ran and is not complete: an agent has to see it through.
    Owing,
}

/// Settles the migration `migration` to here. `None` if there is none or it is still running. `held` is the lock of its
/// container, if the caller has it.
pub fn settle(
    state_dir: &Path,
    migration: MigrationId,
    held: Option<&mut ContainerLock>,
) -> Result<Option<Settled>, SettleError> {
    let journals = JournalDir::open(state_dir)?;
    let name = JournalName {
        migration,
        side: Side::Target,
    };
    if journals.read(name)?.is_none() {
        return Ok(None);
    }
    let (journal, records) = match journals.reopen(name) {
        Err(JournalError::InUse { .. }) => return Ok(None),
        opened => opened?,
    };
    let Recovered::Target(recovered) = fold(migration, &records)? else {
        return Ok(None);
    };
    // The directory goes when the outcome is on record; an engine that knew no `complete` had none after `released`.
    let settled = matches!(
        recovered.last,
        TargetRecord::Complete
            | TargetRecord::Lost
            | TargetRecord::Aborted
            | TargetRecord::Released
    );
    if settled && !recovered.opened.work_dir.exists() {
        let opened = &recovered.opened;
        match held {
            Some(lock) if lock.is_anothers(migration) => {}
            Some(lock) => lock.is_over(),
            None => {
                ContainerLock::clear(&opened.runtime_root, opened.container.as_str(), migration);
            }
        }
        return Ok(Some(Settled::Already));
    }
    let opened = &recovered.opened;
    let mut taken;
    let lock = match held {
        Some(lock) => lock,
        None => {
            taken = match ContainerLock::take_now(&opened.runtime_root, opened.container.as_str()) {
                Err(LockError::Held { holder, .. }) => {
                    return Ok(Some(Settled::Held(holder.to_string())));
                }
                taken => taken?,
            };
            &mut taken
        }
    };
    let recovery = Recovery {
        recovered: &recovered,
        made: Made::on_record(&recovered.leftovers),
        runc: Runc::new(&recovered.opened.runtime_root),
        home: home_of(state_dir, &recovered.opened),
        journal,
        reason: String::new(),
    };
    let fate = recovery.run()?;
    let owing = fate == Fate::Serving;
    if !owing && !lock.is_anothers(migration) {
        lock.is_over();
    }
    Ok(Some(if owing {
        Settled::Owing
    } else {
        Settled::Now(fate)
    }))
}

/// What became of the pages of a copy that was released and is not known to be complete. `None` after a restart of this host:
/// there is no copy any more.
fn life_of_pager(recovered: &RecoveredTarget) -> Option<Life> {
    if crate::kernel::boot_id().is_ok_and(|now| now != recovered.opened.boot_id) {
        return None;
    }
    Some(if recovered.paged {
        Life::of(&recovered.opened.work_dir)
    } else {
        Life::Done
    })
}

/// A copy that ran and is not known to be complete, whose agent died.
#[derive(Debug)]
pub struct Orphan {
    /// Its journal, which nobody else has now.
    pub journal: Journal,
    /// Who and where.
    pub opened: TargetOpened,
    /// What its restore made.
    pub made: Made,
    /// A pager brings its pages to their places.
    pub paged: bool,
    /// Who is owed.
    pub owed: Vec<OwedTask>,
    /// The right to touch it.
    pub lock: ContainerLock,
    /// Its pager; `None` if that needs nothing, and is to be watched.
    pub adopted: Option<Adopted>,
}

/// What became of taking a copy over.
#[derive(Debug)]
pub enum Adoption {
    /// It is ours now.
    Taken(Box<Orphan>),
    /// Its pager lives and cannot be had yet: try again.
    Later,
    /// There is nothing to take over, or another process has it.
    Nothing,
}

/// Takes a copy over that [`settle`] found owing.
pub fn adopt(state_dir: &Path, migration: MigrationId) -> Result<Adoption, SettleError> {
    let name = JournalName {
        migration,
        side: Side::Target,
    };
    let (journal, records) = match JournalDir::open(state_dir)?.reopen(name) {
        Err(JournalError::InUse { .. }) => return Ok(Adoption::Nothing),
        opened => opened?,
    };
    let Recovered::Target(recovered) = fold(migration, &records)? else {
        return Ok(Adoption::Nothing);
    };
    if recovered.last != TargetRecord::Released {
        return Ok(Adoption::Nothing);
    }
    let mut lock = match ContainerLock::take_now(
        &recovered.opened.runtime_root,
        recovered.opened.container.as_str(),
    ) {
        Err(LockError::Held { .. }) => return Ok(Adoption::Later),
        taken => taken?,
    };
    let holder = Holder::new(
        migration,
        Side::Target,
        recovered.opened.peer_name.clone(),
        state_dir,
    );
    if let Err(error) = lock.claim(holder) {
        tracing::warn!(%error, "the container's lock does not say who has it");
    }
    lock.is_not_over();
    let made = Made::on_record(&recovered.leftovers);
    let work = recovered.opened.work_dir.clone();
    let deadline = Instant::now() + ADOPTION_PATIENCE;
    let adopted = loop {
        // Done or dead it is nobody's to adopt, and one that has all it needs asks for nobody: these are watched.
        if recovered.owed.is_empty() || life_of_pager(&recovered) != Some(Life::Filling) {
            break None;
        }
        match pager::adopt(&work.join(SUPPLY_SOCKET), ADOPTION_PATIENCE) {
            Ok(adopted) => break Some(adopted),
            // It opens its socket when it sees the end of its agent.
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Err(error) => {
                tracing::warn!(container = %recovered.opened.container, %error, "its pager cannot be taken over yet");
                return Ok(Adoption::Later);
            }
        }
    };
    let RecoveredTarget {
        opened,
        owed,
        paged,
        ..
    } = recovered;
    Ok(Adoption::Taken(Box::new(Orphan {
        journal,
        opened,
        made,
        paged,
        owed,
        lock,
        adopted,
    })))
}

fn home_of(state_dir: &Path, opened: &TargetOpened) -> Home {
    Home::new(state_dir, opened.container.as_str(), opened.migration)
}

fn fold(migration: MigrationId, records: &[Record]) -> Result<Recovered, SettleError> {
    journal::fold(records).map_err(|source| SettleError::Damaged { migration, source })
}

/// A migration being ended after the agent died.
struct Recovery<'a> {
    recovered: &'a RecoveredTarget,
    made: Made,
    runc: Runc,
    home: Home,
    journal: Journal,
    reason: String,
}

impl Recovery<'_> {
    fn run(mut self) -> Result<Fate, SettleError> {
        let deadline = Instant::now() + PATIENCE;
        let mut course = Course::<TargetState>::recover(self.recovered.last);
        loop {
            let event = match course.next_action() {
                Some(action) => self.perform(action),
                // The rest is for an agent, which can also answer the source meanwhile.
                None if course.state() == TargetState::Released => match self.news_of_copy() {
                    Some(news) => Some(news),
                    None => return Ok(Fate::Serving),
                },
                None => break,
            };
            if let Some(event) = event
                && let Err(impossible) = course.on(event)
            {
                tracing::error!(%impossible, "recovery stays where it is");
            }
            if Instant::now() > deadline && !course.state().is_settled() {
                return Err(SettleError::Stuck {
                    migration: self.recovered.opened.migration,
                    reason: self.reason,
                });
            }
        }
        if let Err(error) = self.copy().remove_work() {
            tracing::warn!(%error, "the working directory stays");
        }
        if self.same_boot() {
            self.copy().remove_idle_cgroups();
        }
        Ok(match course.state() {
            TargetState::Complete => Fate::Complete,
            TargetState::Lost => Fate::Lost,
            TargetState::Aborted => Fate::RolledBack,
            _ => Fate::InProgress,
        })
    }

    /// What ended a copy that was released, if something did.
    fn news_of_copy(&self) -> Option<TargetEvent> {
        let container = &self.recovered.opened.container;
        match life_of_pager(self.recovered) {
            None => {
                tracing::error!(%container, "this host was restarted before the copy was complete: it is lost, and the source goes on with what it has kept");
                Some(TargetEvent::FoundLost)
            }
            Some(Life::Dead) => {
                tracing::error!(%container, "its pager died with pages missing: the copy is killed, and the source goes on with what it has kept");
                Some(TargetEvent::PagerLost)
            }
            Some(Life::Filling | Life::Done) => None,
        }
    }

    fn perform(&mut self, action: TargetAction) -> Option<TargetEvent> {
        match action {
            TargetAction::DiscardCopy => {
                self.end_restore();
                let discarded = if self.same_boot() {
                    self.copy().discard()
                } else if self.runc.knows(self.recovered.opened.container.as_str()) {
                    // Started since this host was: it is nobody's copy, and its files may be where the copy's were.
                    self.copy().remove_work()
                } else {
                    self.copy().discard_files()
                };
                Some(match discarded {
                    Ok(()) => TargetEvent::CopyDiscarded,
                    Err(error) => {
                        self.reason = error.to_string();
                        thread::sleep(PAUSE);
                        TargetEvent::DiscardFailed
                    }
                })
            }
            TargetAction::InspectCopy => {
                self.end_restore();
                Some(match (self.same_boot(), self.copy().inspect()) {
                    (true, Found::Running) => TargetEvent::FoundRunning,
                    (true, Found::NeverRan) => TargetEvent::FoundNeverRan,
                    (true, Found::Gone) => TargetEvent::FoundGone,
                    (true, Found::Forgotten) if self.copy().kill_forgotten() => {
                        TargetEvent::FoundLost
                    }
                    (true, Found::Forgotten) => {
                        self.reason =
                            "processes of a copy that its runtime has forgotten do not end".into();
                        thread::sleep(PAUSE);
                        TargetEvent::LocalFailure
                    }
                    // After a restart the mark proves nothing: it may not have reached the disk.
                    (false, _) => TargetEvent::FoundLost,
                })
            }
            TargetAction::RecordReleased => self.write(&Record::Released),
            TargetAction::RecordAborted => self.write(&Record::Aborted),
            TargetAction::RecordLost => self.write(&Record::Lost),
            TargetAction::KillCopy => Some(if self.copy().kill() {
                TargetEvent::CopyKilled
            } else {
                self.reason = "some process of the copy does not die".into();
                thread::sleep(PAUSE);
                TargetEvent::KillFailed
            }),
            // Nobody is connected during recovery; whoever asks later is answered from the journal.
            _ => None,
        }
    }

    fn write(&mut self, record: &Record) -> Option<TargetEvent> {
        Some(match self.journal.append(record) {
            Ok(()) => TargetEvent::RecordWritten,
            Err(error) => {
                self.reason = error.to_string();
                thread::sleep(PAUSE);
                TargetEvent::RecordFailed
            }
        })
    }

    /// A restore that was let go finishes by itself; one that was not undoes itself.
    fn end_restore(&self) {
        if !self.same_boot() {
            return;
        }
        for leftover in &self.recovered.leftovers {
            if let Leftover::Process { process, .. } = leftover {
                let task = Task::on_record(process.pid, process.start_time);
                end_restore(&self.recovered.opened.work_dir.join("images"), &task);
            }
        }
    }

    fn same_boot(&self) -> bool {
        crate::kernel::boot_id().is_ok_and(|now| now == self.recovered.opened.boot_id)
    }

    fn copy(&self) -> Copy<'_> {
        Copy {
            runc: &self.runc,
            id: self.recovered.opened.container.as_str(),
            migration: self.recovered.opened.migration,
            home: &self.home,
            work: &self.recovered.opened.work_dir,
            made: &self.made,
        }
    }
}
