//! Post-copy: the copy is released with pages missing, and stays an arrival until it is whole.

use super::{Arrival, Host, Resumption, Signal, Times, micros};
use crate::memory::{PAGE_SIZE, PageSet};
use crate::migration::JournalId;
use crate::migration::handoff::target::TargetRecord;
use crate::migration::handoff::{Course, TargetEvent, TargetState};
use crate::migration::journal::Record;
use crate::runtime::home::Home;
use crate::target::arrivals::Arrivals;
use crate::target::owing::{Debt, Owing, OwingEvent};
use crate::target::page_store::{PageStore, PageStoreLimits};
use crate::target::pager::{Adopted, OwedMemory};
use crate::target::settle::Orphan;
use crate::wire::message::{self, Fate, MOST_SPACES, Manifest, SpaceOwner};
use crate::wire::peer_error::PeerError;
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Signals, Sender};
use std::time::Instant;
use tokio::runtime::Handle;

type Failure = (PeerError, String);

impl Arrival<'_> {
    /// What a process of the copy is owed; `None` if nothing.
    pub(super) fn debt_of(&self, owner: &SpaceOwner) -> Result<Option<Debt>, Failure> {
        let pages = self.store.owed(owner.space);
        if pages.is_empty() {
            return Ok(None);
        }
        Ok(Some(Debt {
            vpid: owner.vpid.cast_signed(),
            space: owner.space,
            pages,
            arrivals: Arrivals::new().map_err(no_record)?,
        }))
    }

    /// A page that the source believes to owe and that nobody waits for here would keep both hosts waiting for ever.
    pub(super) fn check_debts(&self, manifest: &Manifest, debts: &[Debt]) -> Result<(), Failure> {
        let owed: u64 = debts.iter().map(|debt| debt.pages.pages()).sum();
        if owed == manifest.owed_pages {
            return Ok(());
        }
        Err((
            PeerError::PagesMissing,
            format!(
                "the source owes {} pages, and {owed} are known here to be owed",
                manifest.owed_pages
            ),
        ))
    }

    /// Begins to take in what is owed: CRIU's restore may touch some of it. On record first, for a successor.
    pub(super) fn take_in_debts(&mut self, debts: Vec<Debt>) -> Result<(), Failure> {
        let failed = |error: &dyn std::fmt::Display| (PeerError::FillFailed, error.to_string());
        let mut owing = Owing::new(Arc::clone(&self.store), debts);
        let tasks = owing.tasks();
        self.journal
            .append(&Record::Owed { tasks })
            .map_err(|error| failed(&error))?;
        let pager = self.pager.as_ref().ok_or((
            PeerError::Unexpected,
            "pages are owed to a copy that cannot wait for them".to_string(),
        ))?;
        let connection = self
            .connection
            .as_ref()
            .ok_or((PeerError::SourceLost, "the source is gone".to_string()))?;
        owing
            .resume(pager, connection)
            .map_err(|error| failed(&error))?;
        self.owing = Some(owing);
        Ok(())
    }

    /// What became of the copy, for a source that asks.
    pub(super) fn fate(&self) -> Fate {
        match self.course.state() {
            state if state.needs_source() => Fate::Serving,
            TargetState::Complete => Fate::Complete,
            TargetState::Lost => Fate::Lost,
            TargetState::Aborted => Fate::RolledBack,
            _ => Fate::InProgress,
        }
    }

    /// Pages are missing and nobody brings them.
    pub(super) fn is_stranded(&self) -> bool {
        self.course.state() == TargetState::Released
            && self.owing.as_ref().is_some_and(Owing::is_alone)
    }

    pub(super) fn owing_event(&mut self) -> Option<TargetEvent> {
        // Whole is told when the copy runs, and not before.
        let released = self.course.state().needs_source() && !self.pager_lost;
        match self.owing.as_mut().filter(|_| released)?.event()? {
            OwingEvent::Whole => self.tell_whole(),
            OwingEvent::Lost(error) => {
                tracing::warn!(
                    container = %self.container, error = %crate::chain::one_line(&error),
                    "pages are missing and their source is gone: the container waits where it needs one"
                );
            }
        }
        None
    }

    /// All that is needed is in its place, whatever has not come: what waited for the rest is gone.
    pub(super) fn needs_nothing(&mut self) {
        if let Some(owing) = self.owing.as_mut().filter(|owing| !owing.is_whole()) {
            owing.forget();
            self.tell_whole();
        }
    }

    fn tell_whole(&mut self) {
        tracing::info!(container = %self.container, "the copy has every page");
        // Not on record it is asked for again, and found out again.
        self.record(&Record::Whole);
        self.say(message::Whole {
            after_release_us: self
                .released
                .map_or(0, |released| micros(released.elapsed())),
        });
    }

    /// The source is back.
    pub(super) fn resume(&mut self, resumption: Resumption) {
        let Resumption {
            connection,
            control,
            listen,
        } = resumption;
        self.control = Some(control);
        self.connection = Some(connection.clone());
        self.link += 1;
        listen(self.link);
        let fate = self.fate();
        if fate != Fate::Serving {
            self.told.get_or_insert_with(Instant::now);
            self.say(message::Outcome {
                journal: self.journal_id,
                fate,
            });
            return;
        }
        let answer = match (&mut self.owing, &self.pager) {
            (Some(owing), Some(pager)) if !owing.is_whole() => {
                owing.resume(pager, &connection).map(|()| true)
            }
            _ => Ok(false),
        };
        match answer {
            Ok(owed) => {
                tracing::info!(container = %self.container, owed, "the source is back");
                self.say(message::Resumed { owed });
            }
            Err(error) => {
                tracing::error!(container = %self.container, %error, "cannot go on with the source that is back");
                connection.close(PeerError::FillFailed);
            }
        }
    }
}

impl<'a> Arrival<'a> {
    /// A copy that ran and is not known to be complete, taken over from an agent that died. The source has to come back.
    pub fn adopt(
        host: &'a Host,
        orphan: Orphan,
        journal_id: JournalId,
        runtime: &Handle,
        signal: Sender<Signal>,
        signals: Signals<Signal>,
    ) -> Result<Arrival<'a>, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let Orphan {
            journal,
            opened,
            made,
            paged,
            owed,
            lock,
            adopted,
        } = orphan;
        // Nobody answers on the line that comes along: the pager waits for the source, and for a line of ours when it is back.
        let (pager, tasks) = match adopted {
            Some(Adopted { pager, tasks, .. }) => (Some(pager), tasks),
            None => (None, Vec::new()),
        };
        let pages: u64 = tasks
            .iter()
            .flat_map(|task| &task.owed.pages)
            .map(|run| run.pages())
            .sum();
        let store = Arc::new(PageStore::new(PageStoreLimits {
            spaces: MOST_SPACES,
            bytes: pages.saturating_mul(PAGE_SIZE),
        }));
        let mut debts = Vec::with_capacity(tasks.len());
        for task in tasks {
            let known = owed.iter().find(|owed| owed.vpid == task.vpid);
            let space = known.map(|owed| owed.space).ok_or_else(|| {
                format!(
                    "the pager waits for pages of process {}, which is not on record",
                    task.vpid
                )
            })?;
            let pages: PageSet = task.owed.pages.into_iter().collect();
            store
                .adopt(space, task.memfd, pages.clone())
                .map_err(|error| text(&error))?;
            debts.push(Debt {
                vpid: task.vpid,
                space,
                pages,
                arrivals: task.owed.arrivals,
            });
        }
        Ok(Arrival {
            host,
            container: opened.container.clone(),
            requirements: None,
            journal,
            journal_id,
            control: None,
            connection: None,
            link: 0,
            runtime: runtime.clone(),
            signals,
            signal,
            work: opened.work_dir.clone(),
            home: Home::new(&host.state_dir, opened.container.as_str(), opened.migration),
            made,
            lock: Some(lock),
            all_cgroups: Vec::new(),
            owing: (!debts.is_empty()).then(|| Owing::new(Arc::clone(&store), debts)),
            store,
            receiver: None,
            course: Course::recover(TargetRecord::Released),
            askers: Vec::new(),
            pages_apart: true,
            hooks: None,
            hook: None,
            restore: None,
            filled: false,
            shared: Vec::new(),
            pager,
            armed: true,
            watched: paged,
            pager_lost: false,
            leaving: false,
            deadline: None,
            reason: None,
            manifest: None,
            times: Times::default(),
            released: None,
            told: None,
        })
    }
}

/// What the pager has to know of a debt.
pub(super) fn owed_memory(debt: &Debt) -> Result<OwedMemory, Failure> {
    Ok(OwedMemory {
        pages: debt.pages.iter().collect(),
        arrivals: debt.arrivals.try_clone().map_err(no_record)?,
    })
}

fn no_record(error: std::io::Error) -> Failure {
    (
        PeerError::StorageFull,
        format!("a record of arrivals: {error}"),
    )
}
