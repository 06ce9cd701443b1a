//! What can go wrong with a journal.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::migration::ParseIdError;

/// A journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The system refused.
    #[error("cannot {doing} {path}: {source}")]
    Io {
        /// What was being done.
        doing: Doing,
        /// To which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Its migration is running: another process holds the lock.
    #[error("{path} is in use by a running migration")]
    InUse {
        /// The journal.
        path: PathBuf,
    },
    /// A whole line is no record.
    #[error("line {line} of {path} is no record: {source}")]
    Garbage {
        /// The journal.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It is larger than any journal an engine writes.
    #[error("{path} has more than {limit} bytes, which no journal has")]
    TooLarge {
        /// The journal.
        path: PathBuf,
        /// The most it may have.
        limit: u64,
    },
    /// A record could not be put into words: a path in it is not UTF-8.
    #[error("cannot write a record to {path}: {source}")]
    Record {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The directory's id is damaged.
    #[error("{path} is damaged: {source}")]
    Id {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ParseIdError,
    },
    /// The directory's id was removed while it was being made.
    #[error("{path} was removed by someone else")]
    IdVanished {
        /// The file.
        path: PathBuf,
    },
    /// The kernel gave no random bytes for the directory's id.
    #[error("cannot get random bytes for a journal id: {0}")]
    Random(getrandom::Error),
}

/// What was being done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Making the journal directory.
    MakeDirectory,
    /// Listing the journal directory.
    List,
    /// Making a journal.
    Create,
    /// Opening a journal.
    Open,
    /// Locking a journal.
    Lock,
    /// Setting space aside for a journal.
    Reserve,
    /// Reading a file.
    Read,
    /// Writing a record.
    Append,
    /// Cutting off a torn line.
    Cut,
    /// Making a write durable.
    Sync,
    /// Removing a file.
    Remove,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Doing::MakeDirectory => "make the directory",
            Doing::List => "list",
            Doing::Create => "create",
            Doing::Open => "open",
            Doing::Lock => "lock",
            Doing::Reserve => "set space aside for",
            Doing::Read => "read",
            Doing::Append => "write to",
            Doing::Cut => "cut a torn line off",
            Doing::Sync => "make durable",
            Doing::Remove => "remove",
        })
    }
}

impl JournalError {
    pub(super) fn io(doing: Doing, path: &Path, source: io::Error) -> JournalError {
        JournalError::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    }
}
