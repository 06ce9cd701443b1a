//! One journal: appended to with the lock held, read by anyone.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use super::{Doing, JournalError};
use crate::migration::journal::Record;

/// Bytes set aside for a new journal. A migration writes some ten records of less than 1 KiB each; with the room
/// taken in advance a full disk cannot keep an end from recording how it ended.
const RESERVED: i64 = 64 << 10;

/// More than any journal has: a file larger than this is not read into memory.
const LARGEST: u64 = 16 << 20;

/// The journal of a running migration. The lock goes when it is dropped.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    /// Bytes of whole, durable records; what lies behind is a torn write.
    length: u64,
}

impl Journal {
    pub(super) fn create(path: &Path, opening: &Record) -> Result<Journal, JournalError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| JournalError::io(Doing::Create, path, source))?;
        let file = lock(file, path)?;
        match fallocate(&*file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, RESERVED) {
            // Some filesystems cannot set space aside; then a full disk shows when a record is written.
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
            Err(errno) => return Err(JournalError::io(Doing::Reserve, path, errno.into())),
        }
        let mut journal = Journal {
            file,
            path: path.to_owned(),
            length: 0,
        };
        journal.append(opening)?;
        Ok(journal)
    }

    pub(super) fn reopen(path: &Path) -> Result<(Journal, Vec<Record>), JournalError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| JournalError::io(Doing::Open, path, source))?;
        let file = lock(file, path)?;
        let (records, length) = parse(&read_bounded(&file, path)?, path)?;
        Ok((
            Journal {
                file,
                path: path.to_owned(),
                length,
            },
            records,
        ))
    }

    /// Appends a record; it is durable when this returns.
    ///
    /// # Errors
    /// If it cannot be written or made durable. It may be on disk all the same; another append cuts it off first.
    pub fn append(&mut self, record: &Record) -> Result<(), JournalError> {
        let mut line = serde_json::to_vec(record).map_err(|source| JournalError::Record {
            path: self.path.clone(),
            source,
        })?;
        line.push(b'\n');

        let path = self.path.as_path();
        let failed = |doing| move |source| JournalError::io(doing, path, source);
        // What a failed write or a crash left must not come to lie between two records.
        if self.file.metadata().map_err(failed(Doing::Read))?.len() > self.length {
            self.file.set_len(self.length).map_err(failed(Doing::Cut))?;
        }
        self.file
            .write_all_at(&line, self.length)
            .map_err(failed(Doing::Append))?;
        self.file.sync_data().map_err(failed(Doing::Sync))?;
        self.length += line.len() as u64;
        Ok(())
    }

    /// The file, for the hook.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Reads a journal without the lock; `None` if there is no such file.
///
/// # Errors
/// If it cannot be read, is too large, or a whole line in it is no record.
pub fn read_records(path: &Path) -> Result<Option<Vec<Record>>, JournalError> {
    match File::open(path) {
        Ok(file) => Ok(Some(parse(&read_bounded(&file, path)?, path)?.0)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(JournalError::io(Doing::Open, path, source)),
    }
}

/// The records, and the bytes they take up without a torn last line.
fn parse(bytes: &[u8], path: &Path) -> Result<(Vec<Record>, u64), JournalError> {
    let whole = bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |newline| newline + 1);
    let mut records = Vec::new();
    for (index, line) in bytes[..whole]
        .split_inclusive(|byte| *byte == b'\n')
        .enumerate()
    {
        let record = serde_json::from_slice(line).map_err(|source| JournalError::Garbage {
            path: path.to_owned(),
            line: index + 1,
            source,
        })?;
        records.push(record);
    }
    Ok((records, whole as u64))
}

fn read_bounded(file: &File, path: &Path) -> Result<Vec<u8>, JournalError> {
    let mut bytes = Vec::new();
    file.take(LARGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| JournalError::io(Doing::Read, path, source))?;
    if bytes.len() as u64 > LARGEST {
        return Err(JournalError::TooLarge {
            path: path.to_owned(),
            limit: LARGEST,
        });
    }
    Ok(bytes)
}

fn lock(file: File, path: &Path) -> Result<Flock<File>, JournalError> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => JournalError::InUse {
            path: path.to_owned(),
        },
        errno => JournalError::io(Doing::Lock, path, errno.into()),
    })
}
