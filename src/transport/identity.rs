//! This host's own certificate and key.
//!
//! One file holds both, so that a crash or a second process can never leave a key without its certificate. It is made
//! on first use: written beside its place, then linked to it, which the kernel does for one process only; whoever
//! comes second reads what the first one made.

use super::fingerprint::Fingerprint;
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The file's name in the directory given to [`Identity::load_or_create`].
pub const FILE_NAME: &str = "identity.pem";

/// A self-signed certificate and its private key.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

/// Why there is no identity.
#[derive(Debug, Error)]
pub enum IdentityError {
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
    /// Others than the owner may read or change the key.
    #[error("{path} is open to others (mode {mode:04o}): chmod 600 it, or remove it for a new identity", path = path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file does not hold a certificate and a key.
    #[error("{path} does not hold a certificate and its key: {source}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is missing.
        source: rustls::pki_types::pem::Error,
    },
    /// No certificate could be made.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
}

impl Identity {
    /// Reads the identity in `dir`, making the directory (0700) and the identity (0600) if there is none.
    pub fn load_or_create(dir: &Path) -> Result<Identity, IdentityError> {
        let path = dir.join(FILE_NAME);
        match Identity::load(&path) {
            Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Identity::create(dir, &path)?;
                Identity::load(&path)
            }
            loaded => loaded,
        }
    }

    /// The fingerprint other hosts know this one by.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    pub(super) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }

    fn load(path: &Path) -> Result<Identity, IdentityError> {
        let io = |action| in_file(action, path);
        let pem = fs::read(path).map_err(io("read"))?;
        let mode = fs::metadata(path).map_err(io("read"))?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        let content = |source| IdentityError::Content {
            path: path.to_owned(),
            source,
        };
        Ok(Identity {
            certificate: CertificateDer::from_pem_slice(&pem).map_err(content)?,
            key: PrivateKeyDer::from_pem_slice(&pem).map_err(content)?,
        })
    }

    fn create(dir: &Path, path: &Path) -> Result<(), IdentityError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(in_file("make the directory", dir))?;
        let mut params = CertificateParams::new(Vec::new())?;
        params
            .distinguished_name
            .push(DnType::CommonName, "migrate");
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let pem = certificate.pem() + &key.serialize_pem();

        let draft = dir.join(format!(".{FILE_NAME}.{}", std::process::id()));
        let written = write_new(&draft, pem.as_bytes())
            .map_err(in_file("write", &draft))
            .and_then(|()| match fs::hard_link(&draft, path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(in_file("make", path)(e)),
                _ => Ok(()),
            });
        // The draft is only a second name by now, or a failed attempt; another try would trip over it.
        let removed = fs::remove_file(&draft).map_err(in_file("remove", &draft));
        written.and(removed)
    }
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    // A draft of a crashed process with our pid would block us for ever; nobody alive can own it.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn in_file<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> IdentityError + 'a {
    move |source| IdentityError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity")
            .field(&self.fingerprint())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_identity_is_made_once_and_kept_private() {
        let base = tempfile::tempdir().expect("a directory");
        let dir = base.path().join("state");
        let first = Identity::load_or_create(&dir).expect("made");
        let again = Identity::load_or_create(&dir).expect("read");
        assert_eq!(first.fingerprint(), again.fingerprint());
        let mode = |path: &Path| fs::metadata(path).expect("exists").mode() & 0o7777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join(FILE_NAME)), 0o600);
        let names: Vec<_> = fs::read_dir(&dir).expect("readable").collect();
        assert_eq!(names.len(), 1, "nothing but the identity is left");
    }

    #[test]
    fn two_hosts_have_different_identities() {
        let [one, other] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let of = |dir: &tempfile::TempDir| {
            Identity::load_or_create(dir.path())
                .expect("made")
                .fingerprint()
        };
        assert_ne!(of(&one), of(&other));
    }

    #[test]
    fn threads_that_race_for_the_first_use_get_the_same_identity() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE_NAME);
        Identity::create(dir.path(), &path).expect("the first one makes it");
        let first = Identity::load(&path).expect("readable");
        Identity::create(dir.path(), &path).expect("the second one finds it");
        let second = Identity::load(&path).expect("readable");
        assert_eq!(first.fingerprint(), second.fingerprint());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        Identity::load_or_create(dir.path()).expect("made");
        let path = dir.path().join(FILE_NAME);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod");
        let error = Identity::load_or_create(dir.path()).expect_err("is exposed");
        assert!(matches!(error, IdentityError::Exposed { mode: 0o640, .. }));
    }

    #[test]
    fn a_damaged_file_is_an_error_and_is_not_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE_NAME);
        write_new(&path, b"nonsense").expect("written");
        let error = Identity::load_or_create(dir.path()).expect_err("is damaged");
        assert!(matches!(error, IdentityError::Content { .. }));
        assert_eq!(fs::read(&path).expect("readable"), b"nonsense");
    }
}
