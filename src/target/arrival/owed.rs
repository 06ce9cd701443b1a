//! Post-copy: the copy is released with pages missing, and stays an arrival until it is whole.

use super::{Arrival, Resumption, micros};
use crate::migration::handoff::{TargetEvent, TargetState};
use crate::migration::journal::Record;
use crate::target::arrivals::Arrivals;
use crate::target::owing::{Debt, Owing, OwingEvent};
use crate::target::pager::OwedMemory;
use crate::wire::message::{self, Fate, Manifest, SpaceOwner};
use crate::wire::peer_error::PeerError;
use std::sync::Arc;

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
        owing
            .resume(pager, &self.connection)
            .map_err(|error| failed(&error))?;
        self.owing = Some(owing);
        Ok(())
    }

    /// What became of the copy, for a source that asks.
    pub(super) fn fate(&self) -> Fate {
        match &self.owing {
            _ if self.lost => Fate::Lost,
            Some(owing) if !owing.is_whole() => Fate::Serving,
            _ => Fate::Committed,
        }
    }

    pub(super) fn owing_event(&mut self) -> Option<TargetEvent> {
        // Whole is told when the copy runs, and not before.
        let released = self.course.state() == TargetState::Released && !self.lost;
        if released && self.filled {
            self.needs_nothing();
        }
        match self.owing.as_mut().filter(|_| released)?.event()? {
            OwingEvent::Whole => self.tell_whole(),
            OwingEvent::Lost(error) => {
                tracing::warn!(
                    container = %self.begin.container, error = %crate::chain::one_line(&error),
                    "pages are missing and their source is gone: the container waits where it needs one"
                );
            }
        }
        None
    }

    /// All that is needed is in its place, whatever has not come: what waited for the rest is gone.
    fn needs_nothing(&mut self) {
        if let Some(owing) = self.owing.as_mut().filter(|owing| !owing.is_whole()) {
            owing.forget();
            self.tell_whole();
        }
    }

    fn tell_whole(&mut self) {
        tracing::info!(container = %self.begin.container, "the copy has every page");
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
        self.connection = connection;
        self.link += 1;
        listen(self.link);
        let answer = match (
            self.course.state(),
            self.fate(),
            &mut self.owing,
            &self.pager,
        ) {
            (TargetState::Released, Fate::Serving, Some(owing), Some(pager)) => {
                owing.resume(pager, &self.connection).map(|()| true)
            }
            _ => Ok(false),
        };
        match answer {
            Ok(true) => {
                tracing::info!(container = %self.begin.container, "the source is back");
                self.say(message::Resumed {});
            }
            Ok(false) => {
                let fate = match self.course.state() {
                    TargetState::Released => self.fate(),
                    TargetState::Aborted => Fate::RolledBack,
                    _ => Fate::InProgress,
                };
                self.say(message::Outcome {
                    journal: self.journal_id,
                    fate,
                });
            }
            Err(error) => {
                tracing::error!(container = %self.begin.container, %error, "cannot go on with the source that is back");
                self.connection.close(PeerError::FillFailed);
            }
        }
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
