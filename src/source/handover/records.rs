//! The journal of a migration under way, whose disk may stop answering while a container stands still.

use super::window::Window;
use crate::journal::{Journal, JournalError};
use crate::migration::journal::Record;
use thiserror::Error;

/// Why a record may not be on disk.
#[derive(Debug, Error)]
pub enum RecordError {
    /// It could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// It was not waited for any longer; it may get there yet.
    #[error("this host's disk does not take the record in time")]
    Stalled,
}

/// The journal, until its disk stalls: then it stays with the thread that waits for the disk.
#[derive(Debug)]
pub struct Records {
    journal: Option<Journal>,
}

impl Records {
    /// The records of a journal.
    pub fn new(journal: Journal) -> Records {
        Records {
            journal: Some(journal),
        }
    }

    /// Writes a record, as long as that takes.
    pub fn append(&mut self, record: &Record) -> Result<(), RecordError> {
        let journal = self.journal.as_mut().ok_or(RecordError::Stalled)?;
        Ok(journal.append(record)?)
    }

    /// Writes a record, unless the window is over first. Then it may or may not come to be written, and no other will.
    pub(super) fn append_within(
        &mut self,
        record: &Record,
        window: &Window<'_>,
    ) -> Result<(), RecordError> {
        let mut journal = self.journal.take().ok_or(RecordError::Stalled)?;
        let record = record.clone();
        let written = window.apart(move || {
            let written = journal.append(&record);
            (journal, written)
        });
        let (journal, written) = written.ok_or(RecordError::Stalled)?;
        self.journal = Some(journal);
        Ok(written?)
    }
}
