//! The ways memory can go to the target, as asked for and as done.
//!
//! ```text
//!                     rounds                    freeze                  afterwards
//!  pre-copy    until it pays to freeze    all that is left goes     nothing is missing
//!  hybrid      until they help no more    what is left is owed      it follows, asked for or not
//!  post-copy   none                       everything is owed        it follows, asked for or not
//!  auto        decided while running: one of the above
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How memory is to get to the target: what the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All of it before the container runs there.
    PreCopy,
    /// All of it afterwards: the container is frozen at once, and its pages follow it.
    PostCopy,
    /// In rounds while they help, the rest afterwards.
    Hybrid,
    /// Decided while running, by what the rounds measure.
    #[default]
    Auto,
}

/// What happens, at the freeze, to the pages that are still to be sent: what it came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// They are sent while the container stands still.
    PreCopy,
    /// They are owed: the container goes on at the target without them, and they follow.
    PostCopy,
}

/// What post-copy needs, at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostCopyNeeds {
    /// The source can dump without pages.
    pub skeleton: bool,
    /// The target can restore with pages missing.
    pub lazy: bool,
}

/// A mode that cannot be had between these hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--mode {mode} is not possible: {why}; use --mode pre-copy, or auto")]
pub struct NoSuchMode {
    mode: Mode,
    why: &'static str,
}

/// A word that is no mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a mode: write pre-copy, post-copy, hybrid or auto")]
pub struct ParseModeError(String);

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 4] = [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid, Mode::Auto];

    /// The mode to use between two hosts that can do so much: `auto` does without post-copy where it must.
    ///
    /// # Errors
    /// If this mode was asked for by name and needs what is missing.
    pub fn between(self, hosts: PostCopyNeeds) -> Result<Mode, NoSuchMode> {
        match (self, hosts.lacks()) {
            (mode, None) => Ok(mode),
            (Mode::PreCopy | Mode::Auto, Some(_)) => Ok(Mode::PreCopy),
            (mode @ (Mode::PostCopy | Mode::Hybrid), Some(why)) => Err(NoSuchMode { mode, why }),
        }
    }

    /// As it is written on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Mode::PreCopy => "pre-copy",
            Mode::PostCopy => "post-copy",
            Mode::Hybrid => "hybrid",
            Mode::Auto => "auto",
        }
    }
}

impl PostCopyNeeds {
    /// What post-copy lacks, in words; `None` if nothing.
    pub fn lacks(self) -> Option<&'static str> {
        if !self.skeleton {
            Some("the skeleton dump does not work on this host (migrate check)")
        } else if !self.lazy {
            Some("the target cannot restore with pages missing (migrate check, there)")
        } else {
            None
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = ParseModeError;

    fn from_str(text: &str) -> Result<Mode, ParseModeError> {
        Mode::ALL
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| ParseModeError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: PostCopyNeeds = PostCopyNeeds {
        skeleton: true,
        lazy: true,
    };

    #[test]
    fn a_mode_is_read_as_it_is_written_everywhere() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
            let json = serde_json::to_string(&mode).expect("serializable");
            assert_eq!(json, format!("\"{mode}\""));
        }
        assert!("precopy".parse::<Mode>().is_err());
    }

    #[test]
    fn where_nothing_is_missing_every_mode_is_itself() {
        for mode in Mode::ALL {
            assert_eq!(mode.between(ALL), Ok(mode));
        }
    }

    #[test]
    fn where_something_is_missing_auto_falls_back_and_a_mode_asked_for_by_name_does_not() {
        for lacking in [
            PostCopyNeeds {
                skeleton: false,
                ..ALL
            },
            PostCopyNeeds { lazy: false, ..ALL },
        ] {
            assert_eq!(Mode::Auto.between(lacking), Ok(Mode::PreCopy));
            assert_eq!(Mode::PreCopy.between(lacking), Ok(Mode::PreCopy));
            for mode in [Mode::PostCopy, Mode::Hybrid] {
                let said = mode.between(lacking).expect_err("refused").to_string();
                assert!(
                    said.contains(mode.as_str()) && !said.contains('\n'),
                    "{said}"
                );
                assert!(said.contains(lacking.lacks().expect("lacking")), "{said}");
            }
        }
    }
}
