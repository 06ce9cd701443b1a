//! Ending the migrations that a crash of the agent left at the target, and answering for those that ended before.

use super::pager::{self, Adopted, DONE_MARK, PagerHandleError, SUPPLY_SOCKET};
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
            Some(source) if source == fingerprint => Some(Fate::Committed),
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
        // Nobody is left to take the pages in: the copy was given up with some missing.
        TargetRecord::Released if !recovered.owed.is_empty() => Fate::Lost,
        TargetRecord::Released => Fate::Committed,
        TargetRecord::Aborted => Fate::RolledBack,
        TargetRecord::Opened | TargetRecord::Prepared | TargetRecord::Committed => Fate::InProgress,
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
    /// The copy runs and is owed pages: an agent has to take its pager over.
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
    if recovered.last == TargetRecord::Released && waits_for_pages(&recovered) {
        return Ok(Some(Settled::Owing));
    }
    let settled = matches!(
        recovered.last,
        TargetRecord::Released | TargetRecord::Aborted
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
    let owing = waits_for_pages(&recovered);
    let recovery = Recovery {
        recovered: &recovered,
        made: Made::on_record(&recovered.leftovers),
        runc: Runc::new(&recovered.opened.runtime_root),
        home: home_of(state_dir, &recovered.opened),
        journal,
        reason: String::new(),
    };
    let fate = recovery.run()?;
    let owing = owing && fate == Fate::Committed;
    if !owing && !lock.is_anothers(migration) {
        lock.is_over();
    }
    Ok(Some(if owing {
        Settled::Owing
    } else {
        Settled::Now(fate)
    }))
}

/// Whether the copy may be waiting for pages. After a restart of this host there is no copy any more.
fn waits_for_pages(recovered: &RecoveredTarget) -> bool {
    !recovered.owed.is_empty()
        && recovered.opened.work_dir.exists()
        && crate::kernel::boot_id().is_ok_and(|now| now == recovered.opened.boot_id)
}

/// A copy that runs and is owed pages, whose agent died.
#[derive(Debug)]
pub struct Orphan {
    /// Its journal, which nobody else has now.
    pub journal: Journal,
    /// Who and where.
    pub opened: TargetOpened,
    /// Who is owed.
    pub owed: Vec<OwedTask>,
    /// The right to touch it.
    pub lock: ContainerLock,
    /// Its pager; `None` if that brought every page to its place and left.
    pub adopted: Option<Adopted>,
}

/// What became of taking a copy over.
#[derive(Debug)]
pub enum Adoption {
    /// It is ours now.
    Taken(Box<Orphan>),
    /// Its pager lives and cannot be had yet: try again.
    Later,
    /// There is nothing to take over, or another process has it. A copy whose pager is dead was killed, since its missing pages
    /// would read as zeros.
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
    if recovered.last != TargetRecord::Released || !waits_for_pages(&recovered) {
        return Ok(Adoption::Nothing);
    }
    let RecoveredTarget { opened, owed, .. } = recovered;
    let mut lock = match ContainerLock::take_now(&opened.runtime_root, opened.container.as_str()) {
        Err(LockError::Held { .. }) => return Ok(Adoption::Later),
        taken => taken?,
    };
    let holder = Holder::new(migration, Side::Target, opened.peer_name.clone(), state_dir);
    if let Err(error) = lock.claim(holder) {
        tracing::warn!(%error, "the container's lock does not say who has it");
    }
    lock.is_not_over();
    let work = opened.work_dir.clone();
    let deadline = Instant::now() + ADOPTION_PATIENCE;
    let adopted = loop {
        if work.join(DONE_MARK).exists() {
            break None;
        }
        match pager::adopt(&work.join(SUPPLY_SOCKET), ADOPTION_PATIENCE) {
            Ok(adopted) => break Some(adopted),
            Err(error) if pager::is_dead(&work) => {
                give_up(state_dir, &opened, &error);
                return Ok(Adoption::Nothing);
            }
            // It opens its socket when it sees the end of its agent.
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Err(error) => {
                tracing::warn!(container = %opened.container, %error, "its pager cannot be taken over yet");
                return Ok(Adoption::Later);
            }
        }
    };
    Ok(Adoption::Taken(Box::new(Orphan {
        journal,
        opened,
        owed,
        lock,
        adopted,
    })))
}

/// Kills a copy whose missing pages are lost. Its working directory goes too: the name may be another container's next time.
fn give_up(state_dir: &Path, opened: &TargetOpened, why: &PagerHandleError) {
    tracing::error!(container = %opened.container, %why, "its pager died with pages missing: the container is killed");
    let copy = Copy {
        runc: &Runc::new(&opened.runtime_root),
        id: opened.container.as_str(),
        migration: opened.migration,
        home: &home_of(state_dir, opened),
        work: &opened.work_dir,
        made: &Made::default(),
    };
    copy.kill();
    if let Err(error) = copy.remove_work() {
        tracing::warn!(%error, "the working directory stays");
    }
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
        while let Some(action) = course.next_action() {
            if let Some(event) = self.perform(action)
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
        let waits = course.state() == TargetState::Released && waits_for_pages(self.recovered);
        if !waits && let Err(error) = self.copy().remove_work() {
            tracing::warn!(%error, "the working directory stays");
        }
        if self.same_boot() {
            self.copy().remove_idle_cgroups();
        }
        Ok(match course.state() {
            TargetState::Released => Fate::Committed,
            TargetState::Aborted => Fate::RolledBack,
            _ => Fate::InProgress,
        })
    }

    fn perform(&mut self, action: TargetAction) -> Option<TargetEvent> {
        match action {
            TargetAction::DiscardCopy => {
                self.end_restore();
                let discarded = if self.same_boot() {
                    self.copy().discard()
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
                    // After a restart the mark proves nothing: it may not have reached the disk.
                    (_, _) => TargetEvent::FoundGone,
                })
            }
            TargetAction::RecordReleased => self.write(&Record::Released),
            TargetAction::RecordAborted => self.write(&Record::Aborted),
            TargetAction::KillCopy => {
                self.copy().kill();
                None
            }
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
