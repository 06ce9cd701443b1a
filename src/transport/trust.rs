//! The peers this host lets in: a file of names and fingerprints.
//!
//! The file is JSON, mode 0600, and replaced as a whole by a rename, so a reader sees the old list or the new one.
//! Changes hold a lock file beside it, so two `migrate trust add` at once both count. Who accepts connections reads
//! looks at the file at every handshake and reads it when it is another one; a change needs no restart.

use super::fingerprint::Fingerprint;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// The file's name in the directory given to [`TrustStore::in_dir`].
pub const FILE_NAME: &str = "trusted-peers.json";

/// The file of trusted peers.
#[derive(Clone, Debug)]
pub struct TrustStore {
    path: PathBuf,
    /// What was read last; clones share it.
    last: Arc<Mutex<Option<Reading>>>,
}

/// A list as it was read, and from which file.
#[derive(Debug)]
struct Reading {
    stamp: Stamp,
    trusted: Arc<Trusted>,
}

/// Tells one state of a file from every other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Of the last change, in seconds and nanoseconds.
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Stamp {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether a later state could look the same: the file system's clock may stand still for some milliseconds.
    fn is_fresh(self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        self.changed.0.abs_diff(now) < FRESH_SECONDS
    }
}

/// For so long after a change the file is read every time.
const FRESH_SECONDS: u64 = 2;

/// The largest list that is read: some ten thousand peers.
const MAX_BYTES: u64 = 4 << 20;

/// The peers that were trusted when the file was read.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Trusted {
    peers: Vec<TrustedPeer>,
}

/// A host that may connect and be connected to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TrustedPeer {
    /// What this host calls it.
    pub name: PeerName,
    /// Its certificate.
    pub fingerprint: Fingerprint,
}

/// What a host calls another: 1 to 64 of `A-Z a-z 0-9 _ . -`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerName(String);

/// Why the list of peers could not be read or changed.
#[derive(Debug, Error)]
pub enum TrustError {
    /// The file or its directory cannot be read, made or written.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not a list of peers.
    #[error("{path} is not a list of peers: {source}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A text that is no peer name.
    #[error("a peer's name is 1 to 64 of A-Z a-z 0-9 _ . -")]
    Name,
    /// Another peer has the name.
    #[error("{name} is already trusted, with another fingerprint ({fingerprint}); remove it first")]
    NameTaken {
        /// The name.
        name: PeerName,
        /// Who has it.
        fingerprint: Fingerprint,
    },
    /// The peer has another name.
    #[error("this fingerprint is already trusted, as {0}")]
    FingerprintTaken(PeerName),
    /// No peer has the name.
    #[error("no trusted peer is called {0}")]
    NotFound(PeerName),
}

impl TrustStore {
    /// The store in `dir`; there need not be a file yet.
    pub fn in_dir(dir: &Path) -> TrustStore {
        TrustStore {
            path: dir.join(FILE_NAME),
            last: Arc::default(),
        }
    }

    /// The peers now, read again only if the file is another than the last time.
    pub fn current(&self) -> Result<Arc<Trusted>, TrustError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let metadata = match fs::metadata(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Arc::default()),
            found => found.map_err(in_file("read", &self.path))?,
        };
        let stamp = Stamp::of(&metadata);
        if let Some(reading) = &*last
            && reading.stamp == stamp
        {
            return Ok(Arc::clone(&reading.trusted));
        }
        let (trusted, stamp) = self.read()?;
        let trusted = Arc::new(trusted);
        *last = stamp
            .filter(|stamp| !stamp.is_fresh())
            .map(|stamp| Reading {
                stamp,
                trusted: Arc::clone(&trusted),
            });
        Ok(trusted)
    }

    /// The peers now; none if there is no file.
    pub fn load(&self) -> Result<Trusted, TrustError> {
        self.read().map(|(trusted, _)| trusted)
    }

    /// The peers, and the state of the file they were read from.
    fn read(&self) -> Result<(Trusted, Option<Stamp>), TrustError> {
        let file = match File::open(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((Trusted::default(), None)),
            opened => opened.map_err(in_file("read", &self.path))?,
        };
        let metadata = file.metadata().map_err(in_file("read", &self.path))?;
        let mut text = Vec::new();
        file.take(MAX_BYTES)
            .read_to_end(&mut text)
            .map_err(in_file("read", &self.path))?;
        let trusted = serde_json::from_slice(&text).map_err(|source| TrustError::Content {
            path: self.path.clone(),
            source,
        })?;
        Ok((trusted, Some(Stamp::of(&metadata))))
    }

    /// Trusts a peer. Adding the same name and fingerprint again changes nothing.
    pub fn add(&self, name: PeerName, fingerprint: Fingerprint) -> Result<(), TrustError> {
        let _lock = self.lock()?;
        let mut trusted = self.load()?;
        for peer in &trusted.peers {
            match (peer.name == name, peer.fingerprint == fingerprint) {
                (true, true) => return Ok(()),
                (true, false) => {
                    return Err(TrustError::NameTaken {
                        name,
                        fingerprint: peer.fingerprint,
                    });
                }
                (false, true) => return Err(TrustError::FingerprintTaken(peer.name.clone())),
                (false, false) => {}
            }
        }
        trusted.peers.push(TrustedPeer { name, fingerprint });
        self.replace(&trusted)
    }

    /// Trusts a peer no longer. Connections it has now go on.
    pub fn remove(&self, name: &PeerName) -> Result<TrustedPeer, TrustError> {
        let _lock = self.lock()?;
        let mut trusted = self.load()?;
        let at = trusted
            .peers
            .iter()
            .position(|peer| peer.name == *name)
            .ok_or_else(|| TrustError::NotFound(name.clone()))?;
        let removed = trusted.peers.remove(at);
        self.replace(&trusted)?;
        Ok(removed)
    }

    fn lock(&self) -> Result<Flock<File>, TrustError> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(in_file("make the directory", dir))?;
        let path = self.path.with_extension("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(in_file("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| in_file("lock", &path)(errno.into()))
    }

    /// Replaces the file; the lock must be held.
    fn replace(&self, trusted: &Trusted) -> Result<(), TrustError> {
        let draft = self.path.with_extension("draft");
        let mut text =
            serde_json::to_string_pretty(trusted).map_err(|source| TrustError::Content {
                path: self.path.clone(),
                source,
            })?;
        text.push('\n');
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            })
            .map_err(in_file("write", &draft))?;
        fs::rename(&draft, &self.path).map_err(in_file("replace", &self.path))
    }
}

impl Trusted {
    /// The peers, in the order they were added.
    pub fn peers(&self) -> &[TrustedPeer] {
        &self.peers
    }

    /// The name of the peer with this fingerprint, if it is trusted.
    pub fn name_of(&self, fingerprint: Fingerprint) -> Option<&PeerName> {
        self.peers
            .iter()
            .find(|peer| peer.fingerprint == fingerprint)
            .map(|peer| &peer.name)
    }
}

impl FromIterator<TrustedPeer> for Trusted {
    fn from_iter<I: IntoIterator<Item = TrustedPeer>>(peers: I) -> Trusted {
        Trusted {
            peers: peers.into_iter().collect(),
        }
    }
}

impl FromStr for PeerName {
    type Err = TrustError;

    fn from_str(name: &str) -> Result<PeerName, TrustError> {
        PeerName::try_from(name.to_owned())
    }
}

impl TryFrom<String> for PeerName {
    type Error = TrustError;

    fn try_from(name: String) -> Result<PeerName, TrustError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
            Ok(PeerName(name))
        } else {
            Err(TrustError::Name)
        }
    }
}

impl From<PeerName> for String {
    fn from(name: PeerName) -> String {
        name.0
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn in_file<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> TrustError + 'a {
    move |source| TrustError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn name(name: &str) -> PeerName {
        name.parse().expect("a name")
    }

    fn fingerprint(digit: char) -> Fingerprint {
        format!("sha256:{}", digit.to_string().repeat(64))
            .parse()
            .expect("a fingerprint")
    }

    #[test]
    fn an_unchanged_list_is_read_once_and_a_changed_one_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = TrustStore::in_dir(dir.path());
        assert!(store.current().expect("none yet").peers().is_empty());
        let fingerprint = |digit: &str| format!("sha256:{}", digit.repeat(64)).parse();
        for digit in ["1", "2", "3"] {
            let name: PeerName = format!("peer-{digit}").parse().expect("a name");
            let fingerprint = fingerprint(digit).expect("a fingerprint");
            store.add(name.clone(), fingerprint).expect("added");
            let current = store.current().expect("read");
            assert_eq!(current.name_of(fingerprint), Some(&name));
            store.remove(&name).expect("removed");
            let current = store.current().expect("read");
            assert_eq!(current.name_of(fingerprint), None, "trusted no longer");
        }
        let fresh = store.current().expect("read");
        while !Arc::ptr_eq(&fresh, &store.current().expect("read"))
            && store.last.lock().expect("unharmed").is_none()
        {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let (first, second) = (store.clone().current(), store.current());
        assert!(Arc::ptr_eq(&first.expect("known"), &second.expect("known")));
        fs::remove_file(dir.path().join(FILE_NAME)).expect("removed");
        assert!(store.current().expect("none").peers().is_empty());
    }

    #[test]
    fn peers_are_added_listed_and_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = TrustStore::in_dir(&dir.path().join("new"));
        assert_eq!(store.load().expect("empty").peers(), []);
        store.add(name("a"), fingerprint('1')).expect("added");
        store.add(name("b"), fingerprint('2')).expect("added");
        store.add(name("a"), fingerprint('1')).expect("again");
        let trusted = store.load().expect("read");
        assert_eq!(trusted.peers().len(), 2);
        assert_eq!(trusted.name_of(fingerprint('2')), Some(&name("b")));
        assert_eq!(trusted.name_of(fingerprint('3')), None);
        store.remove(&name("a")).expect("removed");
        assert_eq!(store.load().expect("read").name_of(fingerprint('1')), None);
        let mode = fs::metadata(&store.path).expect("exists").mode() & 0o7777;
        assert_eq!(mode, 0o600);
    }

    #[test]
    fn a_name_or_fingerprint_is_not_given_twice() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = TrustStore::in_dir(dir.path());
        store.add(name("a"), fingerprint('1')).expect("added");
        assert!(matches!(
            store.add(name("a"), fingerprint('2')),
            Err(TrustError::NameTaken { .. })
        ));
        assert!(matches!(
            store.add(name("b"), fingerprint('1')),
            Err(TrustError::FingerprintTaken(_))
        ));
        assert!(matches!(
            store.remove(&name("b")),
            Err(TrustError::NotFound(_))
        ));
        for bad in ["", "a b", "a/b", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<PeerName>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_damaged_list_trusts_nobody_and_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = TrustStore::in_dir(dir.path());
        for text in [
            "",
            "[]",
            r#"{"peers":[{"name":"a","fingerprint":"sha256:12"}]}"#,
        ] {
            fs::write(&store.path, text).expect("written");
            assert!(
                matches!(store.load(), Err(TrustError::Content { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn additions_at_the_same_time_are_all_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = TrustStore::in_dir(dir.path());
        std::thread::scope(|scope| {
            for digit in "0123456789abcdef".chars() {
                let store = &store;
                scope.spawn(move || {
                    store
                        .add(name(&format!("peer-{digit}")), fingerprint(digit))
                        .expect("added")
                });
            }
        });
        assert_eq!(store.load().expect("read").peers().len(), 16);
    }
}
