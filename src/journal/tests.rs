use super::*;
use std::os::unix::fs::PermissionsExt;

use crate::migration::journal::TargetOpened;

fn name() -> JournalName {
    JournalName {
        migration: MigrationId::from_bytes([3; 16]),
        side: Side::Target,
    }
}

fn opening() -> Record {
    Record::TargetOpened(TargetOpened {
        migration: MigrationId::from_bytes([3; 16]),
        container: "web".parse().expect("a container id"),
        runtime_root: "/run/runc".into(),
        bundle: "/var/lib/migrate/bundles/web".into(),
        peer_fingerprint: "cd".repeat(32),
        peer_name: "host-a".into(),
        work_dir: "/var/lib/migrate/work/03".into(),
        boot_id: "5cb1b6a5-0000-4000-8000-000000000000".into(),
    })
}

fn state_dir() -> (tempfile::TempDir, JournalDir) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let journals = JournalDir::open(directory.path()).expect("a journal directory");
    (directory, journals)
}

fn add_to_file(path: &Path, bytes: &[u8]) {
    let mut file = OpenOptions::new()
        .append(true)
        .open(path)
        .expect("the journal exists");
    file.write_all(bytes).expect("written");
}

#[test]
fn what_was_appended_is_read_again() {
    let (_directory, journals) = state_dir();
    let mut journal = journals.create(name(), &opening()).expect("created");
    journal.append(&Record::Prepared).expect("appended");
    assert_eq!(
        journals.read(name()).expect("readable"),
        Some(vec![opening(), Record::Prepared])
    );
    drop(journal);

    let (mut journal, records) = journals.reopen(name()).expect("reopened");
    assert_eq!(records, [opening(), Record::Prepared]);
    journal.append(&Record::Aborted).expect("appended");
    let expected = vec![opening(), Record::Prepared, Record::Aborted];
    assert_eq!(journals.read(name()).expect("readable"), Some(expected));
}

#[test]
fn files_are_private_and_the_directory_keeps_its_id() {
    let (directory, journals) = state_dir();
    let journal = journals.create(name(), &opening()).expect("created");
    let mode = |path: &Path| fs::metadata(path).expect("exists").permissions().mode() & 0o777;
    assert_eq!(mode(journal.path()), 0o600);
    assert_eq!(mode(&directory.path().join("journal")), 0o700);
    assert_eq!(mode(&directory.path().join("journal/id")), 0o600);
    assert_eq!(
        JournalDir::open(directory.path())
            .expect("opened again")
            .id(),
        journals.id()
    );
    let (_other, others) = state_dir();
    assert_ne!(others.id(), journals.id());
}

#[test]
fn a_torn_last_line_is_ignored_and_cut_off_before_the_next_record() {
    let (_directory, journals) = state_dir();
    let path = journals
        .create(name(), &opening())
        .expect("created")
        .path()
        .to_owned();
    add_to_file(&path, br#"{"record":"prepa"#);
    assert_eq!(
        journals.read(name()).expect("readable"),
        Some(vec![opening()])
    );

    let (mut journal, records) = journals.reopen(name()).expect("reopened");
    assert_eq!(records, [opening()]);
    journal.append(&Record::Prepared).expect("appended");
    assert_eq!(
        journals.read(name()).expect("readable"),
        Some(vec![opening(), Record::Prepared])
    );
}

#[test]
fn a_journal_torn_at_any_byte_is_read_as_the_records_before_it() {
    let (_directory, journals) = state_dir();
    let mut journal = journals.create(name(), &opening()).expect("created");
    journal.append(&Record::Prepared).expect("appended");
    let whole = fs::read(journal.path()).expect("readable");
    let first = whole
        .iter()
        .position(|byte| *byte == b'\n')
        .expect("two lines")
        + 1;
    for length in 0..=whole.len() {
        fs::write(journal.path(), &whole[..length]).expect("written");
        let records = journals
            .read(name())
            .expect("a torn line is no error")
            .expect("the file exists");
        let expected = if length < first {
            0
        } else if length < whole.len() {
            1
        } else {
            2
        };
        assert_eq!(records.len(), expected, "torn at byte {length}");
    }
}

#[test]
fn garbage_in_the_middle_is_an_error_that_names_the_line() {
    let (_directory, journals) = state_dir();
    let path = journals
        .create(name(), &opening())
        .expect("created")
        .path()
        .to_owned();
    add_to_file(
        &path,
        b"{\"record\":\"nonsense\"}\n{\"record\":\"prepared\"}\n",
    );
    assert!(matches!(
        journals.read(name()),
        Err(JournalError::Garbage { line: 2, .. })
    ));
    assert!(matches!(
        journals.reopen(name()),
        Err(JournalError::Garbage { line: 2, .. })
    ));
}

#[test]
fn a_running_migration_keeps_recovery_out() {
    let (_directory, journals) = state_dir();
    let journal = journals.create(name(), &opening()).expect("created");
    assert!(matches!(
        journals.reopen(name()),
        Err(JournalError::InUse { .. })
    ));
    drop(journal);
    journals.reopen(name()).expect("nobody holds it any more");
}

#[test]
fn a_migration_has_one_journal_only() {
    let (_directory, journals) = state_dir();
    journals.create(name(), &opening()).expect("created");
    assert!(matches!(
        journals.create(name(), &opening()),
        Err(JournalError::Io {
            doing: Doing::Create,
            ..
        })
    ));
}

#[test]
fn journals_are_listed_by_name_and_removed_for_good() {
    let (directory, journals) = state_dir();
    let other = JournalName {
        migration: MigrationId::from_bytes([1; 16]),
        side: Side::Source,
    };
    journals.create(name(), &opening()).expect("created");
    journals.create(other, &opening()).expect("created");
    fs::write(directory.path().join("journal/notes.txt"), "not a journal").expect("written");
    assert_eq!(journals.list().expect("listed"), [other, name()]);
    journals.remove(other).expect("removed");
    journals
        .remove(other)
        .expect("removing what is gone is no error");
    assert_eq!(journals.list().expect("listed"), [name()]);
    assert_eq!(journals.read(other).expect("no error"), None);
}

#[test]
fn a_damaged_id_is_an_error_and_not_replaced() {
    let (directory, _journals) = state_dir();
    fs::write(directory.path().join("journal/id"), "nonsense\n").expect("written");
    assert!(matches!(
        JournalDir::open(directory.path()),
        Err(JournalError::Id { .. })
    ));
}
