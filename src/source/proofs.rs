//! Files that show the target whether it sees the same directories: written here, read there, removed again.
//!
//! What is about to be written is on record first, in `STATE/shared/MIGRATION`, which is locked while its owner lives.
//! The record of an owner that died is found by the next who looks ([`sweep`]), and its files are removed.

use super::host_mounts::{Place, Provable};
use crate::migration::MigrationId;
use crate::wire::message::shared::{Digest, PROOF_PREFIX, Proof, Secret, Shared};
use crate::wire::path::AbsolutePath;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, fsync, openat, unlinkat};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a place could not be made ready to be proven.
#[derive(Debug, Error)]
pub enum ProofError {
    /// The user's path cannot be named to the target.
    #[error("{0:?} cannot be named to the target: only plain absolute paths in UTF-8 can")]
    Name(PathBuf),
    /// Nothing can be written there.
    #[error(
        "{path} cannot be proven to be the same at the target, because no file can be written there: {source}"
    )]
    Write {
        /// The place.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// What the container reads cannot be read.
    #[error("reading {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// What is to be removed again cannot be noted.
    #[error("noting the proofs of shared directories in {path}: {source}")]
    Record {
        /// The record.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Written proofs. Dropping it removes them.
#[derive(Debug)]
pub struct Proofs {
    record: PathBuf,
    /// Locked.
    lock: Option<File>,
    written: Vec<PathBuf>,
}

impl Proofs {
    /// Writes what proves the `places`; says what to tell the target.
    pub fn write(
        state_dir: &Path,
        migration: MigrationId,
        places: &[Place],
    ) -> Result<(Proofs, Vec<Shared>), ProofError> {
        let mut proofs = Proofs {
            record: records(state_dir).join(migration.to_string()),
            lock: None,
            written: Vec::new(),
        };
        let mut shared = Vec::new();
        let mut files = Vec::new();
        for place in places {
            let named = |path: &Path| -> Result<AbsolutePath, ProofError> {
                let name = path.to_str().and_then(|path| path.parse().ok());
                name.ok_or_else(|| ProofError::Name(path.to_path_buf()))
            };
            let proof = match directory(place) {
                Some(directory) => {
                    let (name, content) = (random(&place.path)?, random(&place.path)?);
                    let file = directory.join(format!("{PROOF_PREFIX}{}", name.as_str()));
                    files.push((place, file, content.clone()));
                    Proof::Written { name, content }
                }
                None => Proof::Content {
                    sha256: digest(&place.real)?,
                },
            };
            shared.push(Shared {
                path: named(&place.path)?,
                real: named(&place.real)?,
                proof,
            });
        }
        if !files.is_empty() {
            proofs.note(&files)?;
        }
        for (place, file, content) in files {
            write(&file, content.as_str()).map_err(|source| ProofError::Write {
                path: place.path.clone(),
                source,
            })?;
        }
        Ok((proofs, shared))
    }

    fn note(&mut self, files: &[(&Place, PathBuf, Secret)]) -> Result<(), ProofError> {
        let path = self.record.clone();
        let failed = |source| ProofError::Record {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).map_err(failed)?;
        let mut record = File::create_new(&path).map_err(failed)?;
        flock(&record, FlockOperation::LockExclusive).map_err(|errno| failed(errno.into()))?;
        let mut text = Vec::new();
        for (_, file, _) in files {
            text.extend_from_slice(file.as_os_str().as_bytes());
            text.push(0);
        }
        record.write_all(&text).map_err(failed)?;
        record.sync_all().map_err(failed)?;
        self.written = files.iter().map(|(_, file, _)| file.clone()).collect();
        self.lock = Some(record);
        Ok(())
    }
}

impl Drop for Proofs {
    fn drop(&mut self) {
        if self.lock.is_some() && remove(&self.written) {
            let _ = fs::remove_file(&self.record);
        }
    }
}

/// Removes the proofs of those who died before they could.
pub fn sweep(state_dir: &Path) {
    for record in fs::read_dir(records(state_dir))
        .into_iter()
        .flatten()
        .flatten()
    {
        let Ok(mut file) = File::open(record.path()) else {
            continue;
        };
        let mut text = Vec::new();
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
            || file.read_to_end(&mut text).is_err()
            // Its owner has not come to write it yet.
            || text.is_empty()
        {
            continue;
        }
        let files: Vec<PathBuf> = text
            .split(|byte| *byte == 0)
            .filter(|path| !path.is_empty())
            .map(|path| PathBuf::from(std::ffi::OsString::from_vec(path.to_vec())))
            .collect();
        if remove(&files) {
            let _ = fs::remove_file(record.path());
        }
    }
}

fn records(state_dir: &Path) -> PathBuf {
    state_dir.join("shared")
}

/// Where the file that proves a place is written; `None` if its content proves it.
fn directory(place: &Place) -> Option<&Path> {
    match place.provable {
        Provable::Within => Some(&place.real),
        Provable::Beside => place.real.parent(),
        Provable::Content => None,
    }
}

fn random(path: &Path) -> Result<Secret, ProofError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| ProofError::Write {
        path: path.to_path_buf(),
        source: io::Error::other(error.to_string()),
    })?;
    Ok(Secret::from_bytes(bytes))
}

/// The container may do what it likes in the directory: the file is made new, and no link is followed.
fn write(file: &Path, content: &str) -> io::Result<()> {
    let (directory, name) = parts(file)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let mut made = File::from(openat(&directory, name, flags, mode)?);
    made.write_all(content.as_bytes())?;
    fsync(&made)?;
    Ok(())
}

/// Whether none of them is left. Their names are random: nobody else's file is called so.
fn remove(files: &[PathBuf]) -> bool {
    let mut all = true;
    for file in files {
        let removed = parts(file).and_then(|(directory, name)| {
            if !name.starts_with(PROOF_PREFIX.as_bytes()) {
                return Ok(());
            }
            Ok(unlinkat(&directory, name, AtFlags::empty())?)
        });
        all &= match removed {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
    }
    all
}

fn parts(file: &Path) -> io::Result<(OwnedFd, &[u8])> {
    let (Some(directory), Some(name)) = (file.parent(), file.file_name()) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(CWD, directory, flags, Mode::empty())?;
    Ok((directory, name.as_bytes()))
}

fn digest(path: &Path) -> Result<Digest, ProofError> {
    let failed = |source| ProofError::Read {
        path: path.to_path_buf(),
        source,
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let mut hash = Sha256::new();
    io::copy(&mut File::from(file), &mut hash).map_err(failed)?;
    Ok(Digest::from_bytes(hash.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIGRATION: MigrationId = MigrationId::from_bytes([7; 16]);

    fn left_in(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    fn written(state: &Path, volume: &Path) -> Proofs {
        let place = Place {
            path: volume.to_path_buf(),
            real: volume.to_path_buf(),
            provable: Provable::Within,
        };
        let (proofs, shared) = Proofs::write(state, MIGRATION, &[place]).unwrap();
        assert!(matches!(&shared[0].proof, Proof::Written { .. }));
        assert_eq!(left_in(volume), 1);
        proofs
    }

    #[test]
    fn proofs_go_with_their_owner_or_after_its_death_with_the_next_sweep() {
        let (state, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (state, volume) = (state.path(), volume.path());
        drop(written(state, volume));
        assert_eq!((left_in(volume), left_in(&records(state))), (0, 0));

        let mut proofs = written(state, volume);
        sweep(state);
        assert_eq!(left_in(volume), 1, "its owner lives");
        // What a crash does: the lock goes, nothing else.
        drop(proofs.lock.take());
        drop(proofs);
        assert_eq!(left_in(volume), 1);
        fs::write(volume.join("of-the-container"), "").unwrap();
        sweep(state);
        assert_eq!((left_in(volume), left_in(&records(state))), (1, 0));
    }
}
