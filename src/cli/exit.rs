//! How the program ends: one number for each thing a script may want to tell apart.

use std::process::ExitCode;

use crate::migration::report::Outcome;

/// An exit code. The numbers are part of the interface; the README lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// The container runs at the target; or the command did what it was asked.
    Done = 0,
    /// The engine itself failed: an error that is none of the others. Nothing moved, unless it says to run
    /// `migrate recover`.
    Internal = 1,
    /// The command line is wrong. Nothing was touched.
    Usage = 2,
    /// Preflight refused, somebody else is moving the container, or the target cannot be reached. Nothing was touched.
    Refused = 3,
    /// The migration failed before it was decided; the container goes on at the source.
    RolledBack = 4,
    /// The target's answer to commit is missing; the container is frozen at the source. `migrate recover` finds out.
    Unknown = 5,
    /// The container runs at the target, which has not said that it is complete there, or was lost there; it is kept frozen at
    /// the source. `migrate resume` goes on, or a person decides.
    Incomplete = 6,
}

impl Exit {
    /// The code for the way a migration ended.
    pub fn of(outcome: &Outcome) -> Exit {
        match outcome {
            Outcome::Moved | Outcome::WouldMove => Exit::Done,
            Outcome::Refused { .. } => Exit::Refused,
            Outcome::RolledBack { .. } => Exit::RolledBack,
            Outcome::Unknown { .. } => Exit::Unknown,
            Outcome::Incomplete { .. } | Outcome::Stranded { .. } => Exit::Incomplete,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::handoff::SourceState;
    use crate::migration::report::StaysAs;

    #[test]
    fn every_outcome_has_the_code_that_is_documented() {
        let said = String::new;
        for (outcome, code) in [
            (Outcome::Moved, 0),
            (Outcome::WouldMove, 0),
            (Outcome::Refused { reasons: vec![] }, 3),
            (
                Outcome::RolledBack {
                    during: SourceState::Holding,
                    reason: said(),
                    stays: StaysAs::Running,
                },
                4,
            ),
            (Outcome::Unknown { reason: said() }, 5),
            (Outcome::Incomplete { reason: said() }, 6),
            (Outcome::Stranded { reason: said() }, 6),
        ] {
            assert_eq!(Exit::of(&outcome) as u8, code, "{outcome:?}");
        }
    }
}
