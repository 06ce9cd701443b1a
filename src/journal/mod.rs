//! The journals of one host: a file of records for each migration and end, durable before every step that
//! cannot be taken back. What the records mean is [`crate::migration::journal`]'s.
//!
//! ```text
//!  <state dir>/journal/                      0700
//!      id                                    this directory's JournalId
//!      <migration id>.source.jsonl           0600, one JSON record a line, only ever appended to
//!      <migration id>.target.jsonl
//!      moved                                 what stays of journals that were removed (prune)
//! ```
//!
//! A line counts when its newline is there: a crash in the middle of a write leaves a torn last line, which is
//! ignored and cut off before the next record. Anything else that is no record is an error, and recovery leaves
//! the migration alone. A journal is locked (`flock`) while its migration runs, so recovery cannot meddle with a
//! living one; the hook reads without the lock.

mod error;
mod file;
pub mod prune;

pub use error::{Doing, JournalError};
pub use file::{Journal, read_records};

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::migration::event::Side;
use crate::migration::journal::Record;
use crate::migration::{JournalId, MigrationId};

/// The name of the file with the directory's own id.
const ID_FILE: &str = "id";

/// The name of the file with what stays of journals that were removed.
const MOVED_FILE: &str = "moved";

/// A host's journal directory.
#[derive(Clone, Debug)]
pub struct JournalDir {
    path: PathBuf,
    id: JournalId,
}

/// One journal as it is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JournalName {
    /// The migration.
    pub migration: MigrationId,
    /// The end this host was.
    pub side: Side,
}

impl JournalDir {
    /// Opens the directory `journal` below `state_dir`, making it, its parents and its id if they are missing.
    ///
    /// # Errors
    /// If it cannot be made or read, or if its id is damaged: then nobody can say which records were lost.
    pub fn open(state_dir: &Path) -> Result<JournalDir, JournalError> {
        let path = state_dir.join("journal");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|source| JournalError::io(Doing::MakeDirectory, &path, source))?;
        let id = match read_id(&path)? {
            Some(id) => id,
            None => make_id(&path)?,
        };
        Ok(JournalDir { path, id })
    }

    /// The directory's id: what a target answers under.
    pub fn id(&self) -> JournalId {
        self.id
    }

    /// Begins the journal of a migration with its opening record; both are durable when this returns.
    ///
    /// # Errors
    /// If the migration has a journal already, or it cannot be written.
    pub fn create(&self, name: JournalName, opening: &Record) -> Result<Journal, JournalError> {
        let journal = Journal::create(&self.file(name), opening)?;
        sync_directory(&self.path)?;
        Ok(journal)
    }

    /// Opens a journal to go on with it, with what is in it.
    ///
    /// # Errors
    /// [`JournalError::InUse`] if its migration is running; else if it cannot be read or holds what no engine wrote.
    pub fn reopen(&self, name: JournalName) -> Result<(Journal, Vec<Record>), JournalError> {
        Journal::reopen(&self.file(name))
    }

    /// Reads a journal without locking it; `None` if this host has none of that name.
    ///
    /// # Errors
    /// If it cannot be read or holds what no engine wrote.
    pub fn read(&self, name: JournalName) -> Result<Option<Vec<Record>>, JournalError> {
        read_records(&self.file(name))
    }

    /// The names of all journals here, in order.
    ///
    /// # Errors
    /// If the directory cannot be read. Files with other names are not journals and are left out.
    pub fn list(&self) -> Result<Vec<JournalName>, JournalError> {
        let listing = |source| JournalError::io(Doing::List, &self.path, source);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(listing)? {
            names.extend(
                entry
                    .map_err(listing)?
                    .file_name()
                    .to_str()
                    .and_then(JournalName::of_file),
            );
        }
        names.sort();
        Ok(names)
    }

    /// Removes a journal for good. Only for a migration whose outcome nobody will ask for again.
    ///
    /// # Errors
    /// If it cannot be removed; that there is none is no error.
    pub fn remove(&self, name: JournalName) -> Result<(), JournalError> {
        let path = self.file(name);
        match fs::remove_file(&path) {
            Ok(()) => sync_directory(&self.path),
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(JournalError::io(Doing::Remove, &path, source)),
        }
    }

    /// Puts on record, durably, that a container moved here for good, for when its journal is gone.
    ///
    /// # Errors
    /// If it cannot be written: then the journal has to stay.
    pub fn note_moved(
        &self,
        migration: MigrationId,
        fingerprint: &str,
    ) -> Result<(), JournalError> {
        let path = self.path.join(MOVED_FILE);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| JournalError::io(Doing::Open, &path, source))?;
        // The newline before it ends a line that a crash has torn.
        let line = format!("\n{migration} {fingerprint}\n");
        (&file)
            .write_all(line.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(|source| JournalError::io(Doing::Append, &path, source))?;
        sync_directory(&self.path)
    }

    /// The source of a container that moved here for good and whose journal is gone; `None` if there is none of that name.
    ///
    /// # Errors
    /// If it cannot be told.
    pub fn moved(&self, migration: MigrationId) -> Result<Option<String>, JournalError> {
        let path = self.path.join(MOVED_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(JournalError::io(Doing::Read, &path, source)),
        };
        let of = format!("{migration} ");
        let mut lines = text.split_inclusive('\n');
        Ok(lines.find_map(|line| Some(line.strip_prefix(&of)?.strip_suffix('\n')?.to_owned())))
    }

    /// The path of a journal: what the hook is given.
    pub fn file(&self, name: JournalName) -> PathBuf {
        self.path.join(name.to_file())
    }
}

impl JournalName {
    fn to_file(self) -> String {
        match self.side {
            Side::Source => format!("{}.source.jsonl", self.migration),
            Side::Target => format!("{}.target.jsonl", self.migration),
        }
    }

    fn of_file(file: &str) -> Option<JournalName> {
        let (id, rest) = file.split_once('.')?;
        let side = match rest {
            "source.jsonl" => Side::Source,
            "target.jsonl" => Side::Target,
            _ => return None,
        };
        Some(JournalName {
            migration: id.parse().ok()?,
            side,
        })
    }
}

fn read_id(directory: &Path) -> Result<Option<JournalId>, JournalError> {
    let path = directory.join(ID_FILE);
    match fs::read_to_string(&path) {
        Ok(text) => text
            .trim_end()
            .parse()
            .map(Some)
            .map_err(|source| JournalError::Id { path, source }),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(JournalError::io(Doing::Read, &path, source)),
    }
}

/// Writes the id aside and links it into place, so that it is whole or missing; of two that try at once one wins.
fn make_id(directory: &Path) -> Result<JournalId, JournalError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(JournalError::Random)?;
    let id = JournalId::from_bytes(bytes);

    let aside = directory.join(format!("{ID_FILE}.{id}"));
    let path = directory.join(ID_FILE);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)
        .and_then(|mut file| writeln!(file, "{id}").and_then(|()| file.sync_all()));
    written.map_err(|source| JournalError::io(Doing::Append, &aside, source))?;
    let linked = fs::hard_link(&aside, &path);
    fs::remove_file(&aside).map_err(|source| JournalError::io(Doing::Remove, &aside, source))?;
    match linked {
        Err(source) if source.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(JournalError::io(Doing::Create, &path, source));
        }
        _ => sync_directory(directory)?,
    }
    read_id(directory)?.ok_or(JournalError::IdVanished { path })
}

fn sync_directory(path: &Path) -> Result<(), JournalError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| JournalError::io(Doing::Sync, path, source))
}

#[cfg(test)]
mod tests;
