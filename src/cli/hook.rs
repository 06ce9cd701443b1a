//! `migrate hook`: what CRIU's action script runs. It asks the engine, and the journal if the engine is gone.

use std::path::Path;

use super::plan::HookPlan;
use crate::criu::hook::{self, HookPoint, Verdict};
use crate::journal::read_records;
use crate::migration::handoff::source::SourceRecord;
use crate::migration::journal::{Record, Recovered, fold};

/// Asks, and says whether CRIU may go on. The point at which CRIU called comes from its environment
/// (`CRTOOLS_SCRIPT_ACTION`, `CRTOOLS_INIT_PID`).
pub fn run(plan: &HookPlan) -> bool {
    let action = std::env::var("CRTOOLS_SCRIPT_ACTION").unwrap_or_default();
    let init_pid = std::env::var("CRTOOLS_INIT_PID").ok();
    hook::ask(&plan.directory, &action, init_pid.as_deref(), || {
        verdict(&plan.journal, &action)
    })
}

/// What the journal says now.
///
/// A journal that cannot be read says nothing. A dump is then held, since its container may live at the target by now
/// and a person has to look; a restore fails, since nobody was told that its copy runs.
fn verdict(journal: &Path, action: &str) -> Verdict {
    let unreadable = if action == HookPoint::PostDump.name() {
        Verdict::Undecided
    } else {
        Verdict::RolledBack
    };
    match read_records(journal) {
        Ok(Some(records)) => decided(&records).unwrap_or(unreadable),
        // Removed when its migration was over, or never begun.
        Ok(None) => Verdict::RolledBack,
        Err(error) => {
            eprintln!("migrate hook: {error}");
            unreadable
        }
    }
}

fn decided(records: &[Record]) -> Option<Verdict> {
    Some(match fold(records) {
        Ok(Recovered::Source(source)) => match source.last {
            SourceRecord::Opened | SourceRecord::RolledBack => Verdict::RolledBack,
            // What the target is owed is in the memory of the stopped tasks: they may neither run nor die.
            SourceRecord::Deciding | SourceRecord::Serving => Verdict::Undecided,
            SourceRecord::Committed | SourceRecord::Closed => Verdict::Committed,
        },
        Ok(Recovered::Target(target)) if target.last.hook_lets_go() => Verdict::Committed,
        Ok(Recovered::Target(_)) => Verdict::RolledBack,
        Err(error) => {
            eprintln!("migrate hook: {error}");
            return None;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::journal::examples::{
        deciding, deciding_in_post_copy, source_opened, target_opened,
    };

    #[test]
    fn a_source_holds_from_deciding_until_it_knows() {
        let opened = vec![source_opened()];
        let held = vec![source_opened(), deciding()];
        let moved = vec![source_opened(), deciding(), Record::Committed];
        let back = vec![source_opened(), deciding(), Record::RolledBack];
        let serving = vec![source_opened(), deciding_in_post_copy(), Record::Serving];
        let whole = [serving.clone(), vec![Record::Committed]].concat();
        for (records, verdict) in [
            (opened, Verdict::RolledBack),
            (held, Verdict::Undecided),
            (moved, Verdict::Committed),
            (back, Verdict::RolledBack),
            (serving, Verdict::Undecided),
            (whole, Verdict::Committed),
        ] {
            assert_eq!(decided(&records), Some(verdict), "{records:?}");
        }
    }

    #[test]
    fn a_target_lets_go_only_what_was_committed() {
        let mut records = vec![target_opened()];
        assert_eq!(decided(&records), Some(Verdict::RolledBack));
        records.push(Record::Prepared);
        assert_eq!(decided(&records), Some(Verdict::RolledBack));
        records.push(Record::Committed);
        assert_eq!(decided(&records), Some(Verdict::Committed));
        records.push(Record::Aborted);
        assert_eq!(decided(&records), Some(Verdict::RolledBack));
    }

    #[test]
    fn an_unreadable_journal_holds_a_dump_and_fails_a_restore() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let journal = directory.path().join("j");
        assert_eq!(
            verdict(&journal, "post-dump"),
            Verdict::RolledBack,
            "there is none"
        );
        std::fs::write(&journal, "nonsense\n").expect("written");
        assert_eq!(verdict(&journal, "post-dump"), Verdict::Undecided);
        assert_eq!(verdict(&journal, "post-restore"), Verdict::RolledBack);
    }
}
