//! Journals of migrations that are over go after a while: by age, and by number.
//!
//! Only what nobody can ask about any more is forgotten. Nobody asks a source how its migration ended, so a source's journal that
//! is settled may go. Of a target, "never heard of it" means *rolled back* to the source that asks: just what a journal with
//! `aborted` says, so that may go, too. One that says that the copy is complete must never become "never heard of it", or
//! its source would resume a second copy, and the source may have been switched off for a year. Of such a journal a line stays,
//! a hundred bytes, in the file `moved`:
//!
//! ```text
//!  <migration id> <the source's fingerprint>
//! ```
//!
//! The line is durable before the journal goes. A copy that is not complete, one that was lost, a journal that cannot be understood and one
//! whose working directory is still there are never touched.

use super::{JournalDir, JournalError, JournalName};
use crate::migration::handoff::source::SourceRecord;
use crate::migration::handoff::target::TargetRecord;
use crate::migration::journal::{Recovered, fold};
use std::time::{Duration, SystemTime};

/// How long the journal of a migration that is over is kept: for a person who wants to know what happened.
pub const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How many journals are kept at most, unless more are needed.
pub const KEPT_AT_MOST: usize = 1000;

/// Removes journals that are over and old, or over and too many. What cannot be removed is left for another time.
pub fn prune(journals: &JournalDir, now: SystemTime) {
    if let Err(error) = try_prune(journals, now) {
        tracing::warn!(%error, "old journals stay");
    }
}

fn try_prune(journals: &JournalDir, now: SystemTime) -> Result<(), JournalError> {
    let mut known: Vec<(SystemTime, JournalName)> = Vec::new();
    for name in journals.list()? {
        // One that has gone meanwhile is nobody's concern.
        if let Ok(modified) = journals
            .file(name)
            .metadata()
            .and_then(|file| file.modified())
        {
            known.push((modified, name));
        }
    }
    known.sort_by(|one, other| other.cmp(one));
    for (index, (modified, name)) in known.into_iter().enumerate() {
        let age = now.duration_since(modified).unwrap_or_default();
        if index >= KEPT_AT_MOST || age > KEPT_FOR {
            remove_if_over(journals, name)?;
        }
    }
    Ok(())
}

fn remove_if_over(journals: &JournalDir, name: JournalName) -> Result<(), JournalError> {
    // Locked, so that nobody goes on with it meanwhile.
    let Ok((_journal, records)) = journals.reopen(name) else {
        return Ok(());
    };
    match fold(&records) {
        Ok(Recovered::Source(source))
            if matches!(source.last, SourceRecord::RolledBack | SourceRecord::Closed)
                && !source.opened.work_dir.exists() =>
        {
            journals.remove(name)
        }
        Ok(Recovered::Target(target)) if !target.opened.work_dir.exists() => match target.last {
            TargetRecord::Aborted => journals.remove(name),
            TargetRecord::Complete => {
                journals.note_moved(name.migration, &target.opened.peer_fingerprint)?;
                journals.remove(name)
            }
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::MigrationId;
    use crate::migration::event::Side;
    use crate::migration::journal::Record;
    use crate::migration::journal::examples::{deciding, source_opened, target_opened};

    fn name(number: u8, side: Side) -> JournalName {
        JournalName {
            migration: MigrationId::from_bytes([number; 16]),
            side,
        }
    }

    #[test]
    fn what_can_no_longer_be_asked_about_goes_with_time_and_nothing_else() {
        let state = tempfile::tempdir().expect("a directory");
        let journals = JournalDir::open(state.path()).expect("opened");
        let owed = || Record::Owed { tasks: vec![] };
        let some_owed = || {
            let mut record = serde_json::to_value(owed()).expect("in words");
            record["tasks"] = serde_json::json!([{ "vpid": 1, "space": 3 }]);
            serde_json::from_value::<Record>(record).expect("a record")
        };
        let over = [
            Record::Prepared,
            Record::Committed,
            Record::Released,
            Record::Complete,
        ];
        // Whether it goes, and the records after the opening one.
        let cases: [(bool, Side, Vec<Record>); 10] = [
            (true, Side::Source, vec![Record::RolledBack]),
            (true, Side::Source, vec![deciding(), Record::Closed]),
            (false, Side::Source, vec![]),
            (false, Side::Source, vec![deciding()]),
            (false, Side::Source, vec![deciding(), Record::Committed]),
            (true, Side::Target, vec![Record::Aborted]),
            (true, Side::Target, over.to_vec()),
            (false, Side::Target, [&[some_owed()], &over[..3]].concat()),
            (false, Side::Target, over[..3].to_vec()),
            (false, Side::Target, [&over[..3], &[Record::Lost]].concat()),
        ];
        for (number, (_, side, records)) in (1..).zip(&cases) {
            let opening = match side {
                Side::Source => source_opened(),
                Side::Target => target_opened(),
            };
            let mut journal = journals
                .create(name(number, *side), &opening)
                .expect("made");
            for record in records {
                journal.append(record).expect("written");
            }
        }
        prune(&journals, SystemTime::now());
        assert_eq!(journals.list().expect("listed").len(), cases.len());
        prune(&journals, SystemTime::now() + KEPT_FOR * 2);
        for (number, (goes, side, records)) in (1..).zip(&cases) {
            let there = journals.file(name(number, *side)).exists();
            assert_eq!(there, !goes, "{number}: {records:?}");
        }
        // The one that moved is still known to have, and to whom that may be said.
        let moved = |number| journals.moved(MigrationId::from_bytes([number; 16]));
        assert_eq!(moved(7).expect("read"), Some("cd".repeat(32)));
        assert_eq!(moved(6).expect("read"), None);
    }

    #[test]
    fn too_many_go_though_they_are_young() {
        let state = tempfile::tempdir().expect("a directory");
        let journals = JournalDir::open(state.path()).expect("opened");
        let many = KEPT_AT_MOST + 3;
        for number in 0..many as u128 {
            let migration = MigrationId::from_bytes(number.to_be_bytes());
            let path = journals.file(JournalName {
                migration,
                side: Side::Source,
            });
            let lines = [source_opened(), Record::RolledBack]
                .map(|record| serde_json::to_string(&record).expect("in words") + "\n");
            std::fs::write(path, lines.concat()).expect("written");
        }
        prune(&journals, SystemTime::now());
        assert_eq!(journals.list().expect("listed").len(), KEPT_AT_MOST);
    }

    #[test]
    fn a_line_that_was_torn_is_not_believed_and_spoils_no_other() {
        let state = tempfile::tempdir().expect("a directory");
        let journals = JournalDir::open(state.path()).expect("opened");
        let one = MigrationId::from_bytes([1; 16]);
        std::fs::write(state.path().join("journal/moved"), format!("{one} abab")).expect("written");
        assert_eq!(journals.moved(one).expect("read"), None);
        let two = MigrationId::from_bytes([2; 16]);
        journals.note_moved(two, "cdcd").expect("noted");
        assert_eq!(journals.moved(two).expect("read"), Some("cdcd".into()));
        journals.note_moved(one, "abab").expect("noted");
        assert_eq!(journals.moved(one).expect("read"), Some("abab".into()));
    }
}
