//! One lock a container: whoever moves it, takes it in or ends what became of it holds it, and nobody else touches it.
//!
//! The lock is a plain file beside the runtime's records, `ROOT/ID@migrate`, so that engines with different state directories
//! meet, by whatever path they come to one root. The runtime takes directories for containers and ignores it; no container can
//! be called so. It says which migration of the container is not over, and where that one's journal is:
//!
//! ```text
//!  file locked       a process is at it (its pid is in the file)
//!  file not locked   that process died; the migration named in the file has the next word, others leave the container alone
//!  no file           nobody has anything to do with the container
//! ```
//!
//! The lock is `flock`'s: a process that inherits the descriptor (the guard) holds it without a gap when the first one dies.
//! Whoever ends the migration removes the file.

use crate::migration::MigrationId;
use crate::migration::event::Side;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// More than anyone writes into the file.
const LARGEST: u64 = 64 << 10;

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(10);

/// Who has to do with a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The process that holds the lock, or held it when it died.
    pub pid: u32,
    /// The migration.
    pub migration: MigrationId,
    /// Whether the container leaves or comes.
    pub side: Side,
    /// Where it goes, or whence it comes.
    pub peer: String,
    /// When the migration began, in seconds since 1970.
    pub since: u64,
    /// Where its journal is.
    pub state_dir: PathBuf,
}

/// Why a container cannot be had.
#[derive(Debug, Error)]
pub enum LockError {
    /// Somebody is at it.
    #[error("container {id} is taken: {holder}")]
    Held {
        /// The container.
        id: String,
        /// Who has it.
        holder: Holding,
    },
    /// The file cannot be used.
    #[error("cannot lock container {id} by {path}: {source}")]
    File {
        /// The container.
        id: String,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Who holds a lock, as far as the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding(pub Option<Holder>);

/// The right to touch a container. Dropping it gives it up, and says that nobody has to do with the container any more, unless
/// it was [left](ContainerLock::leave) or is another migration's.
#[derive(Debug)]
pub struct ContainerLock {
    file: File,
    path: PathBuf,
    /// What the file said when it was locked.
    before: Option<Holder>,
    /// The file stays.
    stays: bool,
}

impl Holder {
    /// This process, for a migration that begins now.
    pub fn new(migration: MigrationId, side: Side, peer: String, state_dir: &Path) -> Holder {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Holder {
            pid: std::process::id(),
            migration,
            side,
            peer,
            since: since.map_or(0, |since| since.as_secs()),
            state_dir: state_dir.to_path_buf(),
        }
    }
}

impl ContainerLock {
    /// Takes the container `id` of the runtime with this root. One that is taken is refused at once, except that an arrival is
    /// given so long to end: its last pages are put in their places, or its last files removed.
    pub fn take(
        root: &Path,
        id: &str,
        arrival_patience: Duration,
    ) -> Result<ContainerLock, LockError> {
        let deadline = Instant::now() + arrival_patience;
        loop {
            match ContainerLock::take_now(root, id) {
                Err(LockError::Held { holder, .. })
                    if holder.is_arrival() && Instant::now() < deadline =>
                {
                    thread::sleep(PAUSE);
                }
                taken => return taken,
            }
        }
    }

    /// Takes the container without waiting for anybody.
    pub fn take_now(root: &Path, id: &str) -> Result<ContainerLock, LockError> {
        let path = place(root, id);
        let failed = |source| LockError::File {
            id: id.to_owned(),
            path: path.clone(),
            source,
        };
        // As the runtime makes it.
        let mut private = DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(root).map_err(failed)?;
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(LockError::Held {
                        id: id.to_owned(),
                        holder: Holding(read(&file)),
                    });
                }
                Err(errno) => return Err(failed(errno.into())),
            }
            // Whoever had it may have removed it after it was opened here.
            if !is_at(&file, &path) {
                continue;
            }
            let before = read(&file);
            return Ok(ContainerLock {
                file,
                stays: before.is_some(),
                path,
                before,
            });
        }
    }

    /// Who has the container, without taking it.
    pub fn look(root: &Path, id: &str) -> Option<Holding> {
        let file = File::open(place(root, id)).ok()?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => None,
            Err(_) => Some(Holding(read(&file))),
        }
    }

    /// Removes what a process that died while it ended this very migration left of its lock.
    pub fn clear(root: &Path, id: &str, migration: MigrationId) {
        let path = place(root, id);
        let Ok(file) = File::open(&path) else { return };
        let is_its = read(&file).is_some_and(|holder| holder.migration == migration);
        if is_its
            && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            && is_at(&file, &path)
        {
            let _ = fs::remove_file(&path);
        }
    }

    /// The lock that another process of ours handed over; its file was locked when it did.
    pub fn inherited(descriptor: OwnedFd, root: &Path, id: &str) -> io::Result<ContainerLock> {
        // Locked already, by this same open file: locking it again changes nothing.
        let file = File::from(descriptor);
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let before = read(&file);
        Ok(ContainerLock {
            file,
            path: place(root, id),
            stays: before.is_some(),
            before,
        })
    }

    /// Another descriptor of the same open file: whoever inherits it holds the lock as well.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.file.try_clone().map(OwnedFd::from)
    }

    /// Lets others have the container for a moment, and for as long as one of them is at it.
    pub fn lend(&self, pause: Duration) {
        let _ = flock(&self.file, FlockOperation::NonBlockingUnlock);
        loop {
            thread::sleep(pause);
            if flock(&self.file, FlockOperation::NonBlockingLockExclusive) != Err(Errno::WOULDBLOCK)
            {
                return;
            }
        }
    }

    /// The migration that was not over when its process died, if there is one.
    pub fn before(&self) -> Option<&Holder> {
        self.before.as_ref()
    }

    /// Whether the container has another unfinished migration than this one.
    pub fn is_anothers(&self, migration: MigrationId) -> bool {
        self.before
            .as_ref()
            .is_some_and(|holder| holder.migration != migration)
    }

    /// Writes down who has the container now.
    pub fn claim(&mut self, holder: Holder) -> io::Result<()> {
        let line = serde_json::to_string(&holder)? + "\n";
        self.file.set_len(0)?;
        self.file.write_all_at(line.as_bytes(), 0)?;
        self.before = Some(holder);
        self.stays = false;
        Ok(())
    }

    /// Gives the container up while its migration is not over.
    pub fn leave(mut self) {
        self.stays = true;
    }

    /// Says that the migration is not over, whatever becomes of this process.
    pub fn is_not_over(&mut self) {
        self.stays = true;
    }

    /// The migration is over: nobody has to do with the container any more.
    pub fn is_over(&mut self) {
        self.stays = false;
    }
}

impl Drop for ContainerLock {
    fn drop(&mut self) {
        // Only who holds it removes it, and only if nobody has put another one in its place.
        if !self.stays && is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
        // The file is closed and not unlocked: whoever inherited it goes on holding it.
    }
}

impl Holding {
    fn is_arrival(&self) -> bool {
        matches!(&self.0, Some(holder) if holder.side == Side::Target)
    }
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(holder) = &self.0 else {
            return f.write_str("another process is about to move it");
        };
        let Holder {
            pid,
            migration,
            side,
            peer,
            since,
            ..
        } = holder;
        let way = match side {
            Side::Source => "is moving it to",
            Side::Target => "is taking it in from",
        };
        let since = utc(*since);
        write!(
            f,
            "process {pid} {way} {peer} since {since} (migration {migration})"
        )
    }
}

fn place(root: &Path, id: &str) -> PathBuf {
    root.join(format!("{id}@migrate"))
}

fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(ours), Ok(there)) = (file.metadata(), fs::symlink_metadata(path)) else {
        return false;
    };
    (ours.dev(), ours.ino()) == (there.dev(), there.ino())
}

fn read(file: &File) -> Option<Holder> {
    let mut bytes = vec![0; LARGEST as usize];
    let length = file.read_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(&bytes[..length]).ok()
}

/// A moment in seconds since 1970, as people write it.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years of 365 or 366 days, the year beginning in March so that the odd day comes last.
    let (era, day) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (
        day - (153 * month + 2) / 5 + 1,
        if month < 10 { month + 3 } else { month - 9 },
    );
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: MigrationId = MigrationId::from_bytes([1; 16]);

    fn holder() -> Holder {
        Holder::new(
            ONE,
            Side::Source,
            "10.0.0.2:7070".into(),
            Path::new("/var/lib/migrate"),
        )
    }

    #[test]
    fn a_container_that_is_taken_is_refused_by_whatever_path_and_told_who_has_it() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink(root.path(), &link).unwrap();
        let mut lock = ContainerLock::take_now(root.path(), "web").unwrap();
        assert!(ContainerLock::take_now(root.path(), "other").is_ok());
        lock.claim(holder()).unwrap();
        let refused = ContainerLock::take_now(&link, "web")
            .unwrap_err()
            .to_string();
        for part in [
            "container web is taken",
            &format!("process {}", std::process::id()),
            "to 10.0.0.2:7070",
            "since 20",
            "01010101",
        ] {
            assert!(refused.contains(part), "{refused}");
        }
        assert_eq!(
            ContainerLock::look(&link, "web"),
            Some(Holding(Some(holder_of(&lock))))
        );
        drop(lock);
        assert_eq!(ContainerLock::look(root.path(), "web"), None);
        let left = fs::read_dir(root.path()).unwrap().count();
        assert_eq!(left, 1, "only the link is there");
    }

    fn holder_of(lock: &ContainerLock) -> Holder {
        lock.before().cloned().unwrap()
    }

    #[test]
    fn what_is_not_over_is_found_by_the_next_and_left_by_one_who_is_not_it() {
        let root = tempfile::tempdir().unwrap();
        let mut lock = ContainerLock::take_now(root.path(), "web").unwrap();
        lock.claim(holder()).unwrap();
        lock.leave();
        let next = ContainerLock::take_now(root.path(), "web").unwrap();
        assert!(!next.is_anothers(ONE));
        assert!(next.is_anothers(MigrationId::from_bytes([2; 16])));
        drop(next);
        let mut next = ContainerLock::take_now(root.path(), "web").unwrap();
        assert_eq!(next.before().map(|holder| holder.migration), Some(ONE));
        next.is_over();
        drop(next);
        let mut last = ContainerLock::take_now(root.path(), "web").unwrap();
        assert!(last.before().is_none());
        last.claim(holder()).unwrap();
        last.leave();
        ContainerLock::clear(root.path(), "web", MigrationId::from_bytes([2; 16]));
        assert!(place(root.path(), "web").exists());
        ContainerLock::clear(root.path(), "web", ONE);
        assert!(!place(root.path(), "web").exists());
    }

    #[test]
    fn whoever_inherits_the_lock_holds_it_on() {
        let root = tempfile::tempdir().unwrap();
        let mut lock = ContainerLock::take_now(root.path(), "web").unwrap();
        lock.claim(holder()).unwrap();
        let shared = lock.share().unwrap();
        lock.leave();
        assert!(ContainerLock::take_now(root.path(), "web").is_err());
        let mut inherited = ContainerLock::inherited(shared, root.path(), "web").unwrap();
        assert!(!inherited.is_anothers(ONE));
        inherited.is_over();
        drop(inherited);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_lock_file_that_was_removed_meanwhile_is_not_taken_for_the_lock() {
        let root = tempfile::tempdir().unwrap();
        let lock = ContainerLock::take_now(root.path(), "web").unwrap();
        fs::remove_file(place(root.path(), "web")).unwrap();
        let next = ContainerLock::take_now(root.path(), "web").unwrap();
        drop(lock);
        assert!(ContainerLock::look(root.path(), "web").is_some());
        drop(next);
    }

    #[test]
    fn a_moment_is_written_as_people_write_it() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_798_761_599), "2026-12-31 23:59:59 UTC");
    }
}
