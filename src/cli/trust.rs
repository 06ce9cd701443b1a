//! `migrate identity` and `migrate trust`: who this host is, and whom it lets in.

use std::io::{self, Write};
use std::path::Path;

use super::plan::{TrustChange, TrustPlan};
use crate::transport::{Identity, IdentityError, TrustError, TrustStore};

/// Why a command on identity or trust failed.
#[derive(Debug, thiserror::Error)]
pub enum TrustCommandError {
    /// The identity could not be read or made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The list of peers could not be read or changed.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The answer could not be written.
    #[error("cannot write the answer: {0}")]
    Write(#[from] io::Error),
}

impl TrustCommandError {
    /// Whether what was asked for is wrong, as opposed to this host not being able to do it.
    pub fn is_usage(&self) -> bool {
        use TrustError::{FingerprintTaken, Name, NameTaken, NotFound};
        let TrustCommandError::Trust(error) = self else {
            return false;
        };
        matches!(
            error,
            Name | NameTaken { .. } | FingerprintTaken(_) | NotFound(_)
        )
    }
}

/// Prints this host's fingerprint, making its identity on first use.
pub fn identity(state_dir: &Path, to: &mut impl Write) -> Result<(), TrustCommandError> {
    let identity = Identity::load_or_create(state_dir)?;
    writeln!(to, "{}", identity.fingerprint())?;
    Ok(())
}

/// Changes or prints the list of trusted peers.
pub fn trust(plan: &TrustPlan, to: &mut impl Write) -> Result<(), TrustCommandError> {
    let store = TrustStore::in_dir(&plan.state_dir);
    match &plan.change {
        TrustChange::Add { name, fingerprint } => {
            store.add(name.clone(), *fingerprint)?;
            writeln!(to, "{name} is trusted: {fingerprint}")?;
        }
        TrustChange::List => {
            for peer in store.load()?.peers() {
                writeln!(to, "{:<20} {}", peer.name, peer.fingerprint)?;
            }
        }
        TrustChange::Remove { name } => {
            let removed = store.remove(name)?;
            writeln!(to, "{} is no longer trusted", removed.name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Fingerprint;

    #[test]
    fn an_identity_is_made_once_and_can_be_trusted_listed_and_removed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let printed = || {
            let mut text = Vec::new();
            identity(directory.path(), &mut text).expect("an identity");
            String::from_utf8(text).expect("text")
        };
        let fingerprint: Fingerprint = printed()
            .trim_end()
            .parse()
            .expect("identity prints a fingerprint");
        assert_eq!(printed(), format!("{fingerprint}\n"));

        let run = |change| {
            let mut text = Vec::new();
            trust(
                &TrustPlan {
                    state_dir: directory.path().to_owned(),
                    change,
                },
                &mut text,
            )?;
            Ok::<String, TrustCommandError>(String::from_utf8(text).expect("text"))
        };
        let name = || "host-b".parse().expect("a name");
        run(TrustChange::Add {
            name: name(),
            fingerprint,
        })
        .expect("added");
        let listed = run(TrustChange::List).expect("listed");
        assert_eq!(listed, format!("{:<20} {fingerprint}\n", "host-b"));
        run(TrustChange::Remove { name: name() }).expect("removed");
        assert_eq!(run(TrustChange::List).expect("listed"), "");
        assert!(matches!(
            run(TrustChange::Remove { name: name() }),
            Err(TrustCommandError::Trust(_))
        ));
    }
}
