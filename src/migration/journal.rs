//! What a journal holds, and what it means to recovery. The file itself is [`crate::journal`]'s.
//!
//! A journal is the list of [`Record`]s of one migration at one end, oldest first. [`fold`] reads it into
//! what recovery needs: who and where, what may be left over, and the record the handover tables go on from.

use std::num::NonZeroU64;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::handoff::source::SourceRecord;
use super::handoff::target::TargetRecord;
use super::{ContainerId, JournalId, MigrationId, PeerAddress};
use crate::memory::SpaceId;

/// One line of a journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    /// First record at the source.
    SourceOpened(SourceOpened),
    /// First record at the target.
    TargetOpened(TargetOpened),
    /// Something is about to be made that recovery has to remove. Written before it is made.
    Leftover(Leftover),
    /// Source: the rights to the outcome go to the target. Written before commit is sent.
    Deciding {
        /// The journal that holds the target's `prepared`.
        target_journal: JournalId,
        /// What becomes of the frozen container while the copy runs and is not complete.
        #[serde(default)]
        owing: Owing,
    },
    /// Source: the copy runs and is not complete, so what is frozen here must stay.
    Serving,
    /// Target: the copy is held; all of it is here but what it is owed. Written before the source is told.
    Prepared,
    /// Target: the copy may run. Source: the copy is complete, what is frozen here must die.
    Committed,
    /// Target: the copy runs.
    Released,
    /// Target: the copy will run before every page is in its place; a pager brings them. Written before `prepared`.
    Paged,
    /// Target: the copy will run before it is whole. Written before `prepared`.
    Owed {
        /// The processes that are owed pages, and what their memory is called on the wire.
        tasks: Vec<OwedTask>,
    },
    /// Target: the copy is owed nothing any more.
    Whole,
    /// Target: every page of the copy is in its place and its files are on disk. Written before the source is told.
    Complete,
    /// Target: the copy ran, was lost before it was complete, and can never run again. Written before the source is told.
    Lost,
    /// Target: there is no copy and never will be.
    Aborted,
    /// Source: the container goes on here.
    RolledBack,
    /// Source: committed, and nothing is left of it here.
    Closed,
}

/// Who moves, from here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceOpened {
    /// The migration.
    pub migration: MigrationId,
    /// The container.
    pub container: ContainerId,
    /// The runtime's state directory (`runc --root`).
    pub runtime_root: PathBuf,
    /// The container's bundle.
    pub bundle: PathBuf,
    /// The container's first process: a container of the same name with another one is not this one.
    pub init: ProcessName,
    /// When its runtime made it, as the runtime's own record says.
    pub created: String,
    /// The cgroup that freezes it.
    pub freezer: Freezer,
    /// Which directory that is: another one of this path is another container's.
    pub cgroup: Inode,
    /// The migration it came here by, if it lives in the directory that was made for it then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub came_by: Option<MigrationId>,
    /// Where the target listens.
    pub peer: PeerAddress,
    /// The target's certificate, SHA-256 in hex, and the name the trust store has for it.
    pub peer_fingerprint: String,
    /// The target's name in the trust store.
    pub peer_name: String,
    /// Directory of images, sockets and logs of this migration.
    pub work_dir: PathBuf,
    /// `/proc/sys/kernel/random/boot_id` when it began: after a restart nothing frozen is left.
    pub boot_id: String,
}

/// Who arrives, here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetOpened {
    /// The migration.
    pub migration: MigrationId,
    /// The container.
    pub container: ContainerId,
    /// The runtime's state directory (`runc --root`).
    pub runtime_root: PathBuf,
    /// The container's bundle here.
    pub bundle: PathBuf,
    /// The source's certificate, SHA-256 in hex. Only it may ask for the outcome.
    pub peer_fingerprint: String,
    /// The source's name in the trust store.
    pub peer_name: String,
    /// Directory of page stores, images, sockets, the hook's mark and logs of this migration.
    pub work_dir: PathBuf,
    /// `/proc/sys/kernel/random/boot_id` when it began: after a restart no copy is left, whether it ran or not.
    pub boot_id: String,
}

/// One process for ever: a pid alone is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessName {
    /// Process id in the agent's pid namespace.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

/// One file or directory as long as it exists: a path alone is used again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inode {
    /// The device it is on.
    pub device: u64,
    /// Its number there.
    pub number: u64,
}

/// What a source needs after a crash to see a copy through that runs and is not complete.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owing {
    /// The frozen processes whose pages are owed; none unless post-copy was chosen. Which pages these are the target knows.
    pub spaces: Vec<OwingSpace>,
    /// How long a lost target is looked for before it is left to `migrate resume`, in seconds.
    pub reconnect_s: u64,
    /// The most to send, in bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<NonZeroU64>,
    /// The copy may write to files that the frozen container uses too: if it is lost, a person says what becomes of both.
    #[serde(default)]
    pub shares_files: bool,
}

/// One address space that owes pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwingSpace {
    /// Its name on the wire.
    pub space: SpaceId,
    /// The process that has it.
    pub process: ProcessName,
}

/// A process of the copy that is owed pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwedTask {
    /// Its pid inside the container.
    pub vpid: i32,
    /// The name of its memory on the wire.
    pub space: SpaceId,
}

/// The cgroup whose freezer stops the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "version", rename_all = "snake_case", deny_unknown_fields)]
pub enum Freezer {
    /// The `freezer` controller of cgroup v1: `freezer.state`.
    V1 {
        /// The cgroup's directory.
        path: PathBuf,
    },
    /// The unified hierarchy: `cgroup.freeze`.
    V2 {
        /// The cgroup's directory.
        path: PathBuf,
    },
}

/// A thing that outlives a dead agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Leftover {
    /// An nftables table with the rules of CRIU's network lock (`inet CRIU-<id>`), in the container's network
    /// namespace.
    NftTable {
        /// Family and name.
        table: String,
        /// A path to the network namespace.
        netns: PathBuf,
    },
    /// A mount.
    Mount {
        /// Its mount point.
        path: PathBuf,
    },
    /// A file or directory below the state directory or the bundle.
    Path {
        /// The path.
        path: PathBuf,
    },
    /// A cgroup that is about to be made.
    Cgroup {
        /// Its directory.
        path: PathBuf,
    },
    /// Cgroups that were made: which directories they are.
    MadeCgroups {
        /// Each of them.
        cgroups: Vec<MadeCgroup>,
    },
    /// The directory in which the runtime keeps its record of the copy, once it is there.
    RuntimeRecord {
        /// Which directory that is.
        inode: Inode,
    },
    /// The container, stopped by its freezer. A container without this on record was stopped by somebody else.
    Freeze,
    /// A CPU quota that is lowered: it has to have its original value again, unless somebody else has set another.
    CpuQuota {
        /// The cgroup's file with the quota.
        file: PathBuf,
        /// What it held.
        original: String,
        /// What it is lowered to.
        lowered: String,
    },
    /// A process we started: CRIU, runc, pager or guard.
    Process {
        /// What it is, for the log.
        what: String,
        /// Which process.
        process: ProcessName,
    },
}

/// A cgroup that was made for a container: nobody else's, whoever comes to have its path later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MadeCgroup {
    /// Its directory.
    pub path: PathBuf,
    /// Which directory that is; `None` if nobody lived to take it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inode: Option<Inode>,
}

/// What recovery knows after reading a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// The container was leaving here.
    Source(RecoveredSource),
    /// The container was coming here.
    Target(RecoveredTarget),
}

/// A migration away from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveredSource {
    /// Who and where.
    pub opened: SourceOpened,
    /// What may be left, oldest first.
    pub leftovers: Vec<Leftover>,
    /// Where the handover stood.
    pub last: SourceRecord,
    /// The journal that holds the target's `prepared`, if it came to deciding.
    pub target_journal: Option<JournalId>,
    /// What becomes of the frozen container until the copy is complete, if it came to deciding.
    pub owing: Option<Owing>,
}

/// A migration to here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveredTarget {
    /// Who and where.
    pub opened: TargetOpened,
    /// What may be left, oldest first.
    pub leftovers: Vec<Leftover>,
    /// Where the handover stood.
    pub last: TargetRecord,
    /// A pager brings pages to their places when the copy runs.
    pub paged: bool,
    /// The processes that may need pages that only the source has; empty when the copy is whole.
    pub owed: Vec<OwedTask>,
}

/// A list of records no engine wrote.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// The journal is empty.
    #[error("the journal has no records")]
    Empty,
    /// The first record does not say who migrates.
    #[error("the journal begins with {first}, not with an opening record")]
    NotOpened {
        /// The name of the record found.
        first: &'static str,
    },
    /// A record that cannot follow the ones before it.
    #[error("record {line}, {record}, cannot follow {after}")]
    OutOfOrder {
        /// Its number, from 1.
        line: usize,
        /// Its name.
        record: &'static str,
        /// Where the handover stood before it.
        after: String,
    },
}

/// Reads the records of one journal into what recovery needs.
///
/// # Errors
/// If the records are none that an engine writes in this order. Recovery then leaves the migration alone and says so.
pub fn fold(records: &[Record]) -> Result<Recovered, FoldError> {
    let (first, rest) = records.split_first().ok_or(FoldError::Empty)?;
    match first {
        Record::SourceOpened(opened) => fold_source(opened, rest).map(Recovered::Source),
        Record::TargetOpened(opened) => fold_target(opened, rest).map(Recovered::Target),
        other => Err(FoldError::NotOpened {
            first: other.name(),
        }),
    }
}

fn fold_source(opened: &SourceOpened, rest: &[Record]) -> Result<RecoveredSource, FoldError> {
    let mut found = RecoveredSource {
        opened: opened.clone(),
        leftovers: Vec::new(),
        last: SourceRecord::Opened,
        target_journal: None,
        owing: None,
    };
    for (index, record) in rest.iter().enumerate() {
        found.last = match (found.last, record) {
            (last, Record::Leftover(leftover)) => {
                found.leftovers.push(leftover.clone());
                last
            }
            (
                SourceRecord::Opened,
                Record::Deciding {
                    target_journal,
                    owing,
                },
            ) => {
                found.target_journal = Some(*target_journal);
                found.owing = Some(owing.clone());
                SourceRecord::Deciding
            }
            (SourceRecord::Deciding | SourceRecord::Serving, Record::Serving) => {
                SourceRecord::Serving
            }
            (
                SourceRecord::Deciding | SourceRecord::Serving | SourceRecord::Committed,
                Record::Committed,
            ) => SourceRecord::Committed,
            // Also after `serving`: the target has said that its copy is lost.
            (
                SourceRecord::Opened
                | SourceRecord::Deciding
                | SourceRecord::Serving
                | SourceRecord::RolledBack,
                Record::RolledBack,
            ) => SourceRecord::RolledBack,
            // Closing may be all that is recorded if writing `committed` failed.
            (
                SourceRecord::Deciding
                | SourceRecord::Serving
                | SourceRecord::Committed
                | SourceRecord::Closed,
                Record::Closed,
            ) => SourceRecord::Closed,
            (last, record) => return Err(out_of_order(index, record, last)),
        };
    }
    Ok(found)
}

fn fold_target(opened: &TargetOpened, rest: &[Record]) -> Result<RecoveredTarget, FoldError> {
    let mut found = RecoveredTarget {
        opened: opened.clone(),
        leftovers: Vec::new(),
        last: TargetRecord::Opened,
        paged: false,
        owed: Vec::new(),
    };
    for (index, record) in rest.iter().enumerate() {
        found.last = match (found.last, record) {
            (last, Record::Leftover(leftover)) => {
                found.leftovers.push(leftover.clone());
                last
            }
            (TargetRecord::Opened, Record::Prepared) => TargetRecord::Prepared,
            (TargetRecord::Prepared, Record::Committed) => TargetRecord::Committed,
            (TargetRecord::Committed | TargetRecord::Released, Record::Released) => {
                TargetRecord::Released
            }
            (TargetRecord::Opened, Record::Paged) => {
                found.paged = true;
                TargetRecord::Opened
            }
            (TargetRecord::Opened, Record::Owed { tasks }) => {
                found.owed = tasks.clone();
                TargetRecord::Opened
            }
            // `released` may be all that could not be written.
            (TargetRecord::Committed | TargetRecord::Released, Record::Whole) => {
                found.owed = Vec::new();
                TargetRecord::Released
            }
            // Written twice if the first could not be said to be on disk.
            (
                TargetRecord::Committed | TargetRecord::Released | TargetRecord::Complete,
                Record::Complete,
            ) => TargetRecord::Complete,
            (
                TargetRecord::Committed | TargetRecord::Released | TargetRecord::Lost,
                Record::Lost,
            ) => TargetRecord::Lost,
            // Also after `committed`: a release that failed before anything ran is taken back.
            (
                TargetRecord::Opened
                | TargetRecord::Prepared
                | TargetRecord::Committed
                | TargetRecord::Aborted,
                Record::Aborted,
            ) => TargetRecord::Aborted,
            (last, record) => return Err(out_of_order(index, record, last)),
        };
    }
    Ok(found)
}

fn out_of_order(index: usize, record: &Record, after: impl std::fmt::Debug) -> FoldError {
    // The opening record is line 1 and is not in the slice.
    FoldError::OutOfOrder {
        line: index + 2,
        record: record.name(),
        after: format!("{after:?}"),
    }
}

impl Record {
    fn name(&self) -> &'static str {
        match self {
            Record::SourceOpened(_) => "source_opened",
            Record::TargetOpened(_) => "target_opened",
            Record::Leftover(_) => "leftover",
            Record::Deciding { .. } => "deciding",
            Record::Serving => "serving",
            Record::Prepared => "prepared",
            Record::Committed => "committed",
            Record::Released => "released",
            Record::Paged => "paged",
            Record::Owed { .. } => "owed",
            Record::Whole => "whole",
            Record::Complete => "complete",
            Record::Lost => "lost",
            Record::Aborted => "aborted",
            Record::RolledBack => "rolled_back",
            Record::Closed => "closed",
        }
    }
}

/// Records for the tests of this room and of those that read journals.
#[cfg(test)]
pub(crate) mod examples {
    use super::*;

    pub(crate) fn source_opened() -> Record {
        Record::SourceOpened(SourceOpened {
            migration: MigrationId::from_bytes([7; 16]),
            container: "web".parse().expect("a container id"),
            runtime_root: "/run/runc".into(),
            bundle: "/srv/web".into(),
            init: ProcessName {
                pid: 4242,
                start_time: 99,
            },
            created: "2026-01-01T00:00:00Z".into(),
            freezer: Freezer::V1 {
                path: "/sys/fs/cgroup/freezer/web".into(),
            },
            cgroup: Inode {
                device: 30,
                number: 17,
            },
            came_by: None,
            peer: "10.0.0.2:7070".parse().expect("an address"),
            peer_fingerprint: "ab".repeat(32),
            peer_name: "host-b".into(),
            work_dir: "/var/lib/migrate/work/07".into(),
            boot_id: "5cb1b6a5-0000-4000-8000-000000000000".into(),
        })
    }

    pub(crate) fn target_opened() -> Record {
        Record::TargetOpened(TargetOpened {
            migration: MigrationId::from_bytes([7; 16]),
            container: "web".parse().expect("a container id"),
            runtime_root: "/run/runc".into(),
            bundle: "/var/lib/migrate/bundles/web".into(),
            peer_fingerprint: "cd".repeat(32),
            peer_name: "host-a".into(),
            work_dir: "/var/lib/migrate/work/07".into(),
            boot_id: "5cb1b6a5-0000-4000-8000-000000000000".into(),
        })
    }

    pub(crate) fn deciding() -> Record {
        Record::Deciding {
            target_journal: JournalId::from_bytes([9; 16]),
            owing: Owing::default(),
        }
    }

    pub(crate) fn deciding_in_post_copy() -> Record {
        Record::Deciding {
            target_journal: JournalId::from_bytes([9; 16]),
            owing: Owing {
                spaces: vec![OwingSpace {
                    space: SpaceId(3),
                    process: ProcessName {
                        pid: 4242,
                        start_time: 99,
                    },
                }],
                reconnect_s: 300,
                bandwidth_limit: None,
                shares_files: false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::examples::{deciding, deciding_in_post_copy, source_opened, target_opened};
    use super::*;

    fn leftover() -> Record {
        Record::Leftover(Leftover::Mount {
            path: "/run/migrate/07".into(),
        })
    }

    fn last_source(records: &[Record]) -> SourceRecord {
        match fold(records) {
            Ok(Recovered::Source(found)) => found.last,
            other => panic!("not a source's journal: {other:?}"),
        }
    }

    fn last_target(records: &[Record]) -> TargetRecord {
        match fold(records) {
            Ok(Recovered::Target(found)) => found.last,
            other => panic!("not a target's journal: {other:?}"),
        }
    }

    #[test]
    fn every_prefix_of_a_committed_migration_says_where_it_stood() {
        let source = [
            source_opened(),
            leftover(),
            deciding(),
            Record::Serving,
            Record::Committed,
            Record::Closed,
        ];
        let stood = [
            SourceRecord::Opened,
            SourceRecord::Opened,
            SourceRecord::Deciding,
            SourceRecord::Serving,
            SourceRecord::Committed,
            SourceRecord::Closed,
        ];
        for (count, expected) in (1..).zip(stood) {
            assert_eq!(last_source(&source[..count]), expected);
        }
        let target = [
            target_opened(),
            Record::Prepared,
            Record::Committed,
            leftover(),
            Record::Released,
            Record::Complete,
            Record::Complete,
        ];
        let stood = [
            TargetRecord::Opened,
            TargetRecord::Prepared,
            TargetRecord::Committed,
            TargetRecord::Committed,
            TargetRecord::Released,
            TargetRecord::Complete,
            TargetRecord::Complete,
        ];
        for (count, expected) in (1..).zip(stood) {
            assert_eq!(last_target(&target[..count]), expected);
        }
    }

    fn owed() -> Record {
        Record::Owed {
            tasks: vec![OwedTask {
                vpid: 1,
                space: SpaceId(3),
            }],
        }
    }

    #[test]
    fn what_is_owed_is_known_until_the_copy_is_whole() {
        let source = [
            source_opened(),
            deciding_in_post_copy(),
            Record::Serving,
            Record::Committed,
            Record::Closed,
        ];
        let stood = [
            SourceRecord::Opened,
            SourceRecord::Deciding,
            SourceRecord::Serving,
            SourceRecord::Committed,
            SourceRecord::Closed,
        ];
        for (count, expected) in (1..).zip(stood) {
            assert_eq!(last_source(&source[..count]), expected);
        }
        let Ok(Recovered::Source(found)) = fold(&source[..3]) else {
            panic!("a good journal was refused");
        };
        assert_eq!(found.owing.map(|owing| owing.spaces.len()), Some(1));

        let target = [
            target_opened(),
            owed(),
            Record::Prepared,
            Record::Committed,
            Record::Released,
            Record::Whole,
            Record::Complete,
        ];
        for (count, expected) in (1..).zip([false, true, true, true, true, false, false]) {
            let Ok(Recovered::Target(found)) = fold(&target[..count]) else {
                panic!("a good journal was refused");
            };
            assert_eq!(!found.owed.is_empty(), expected, "{count} records");
        }
        assert!(fold(&[target_opened(), Record::Prepared, owed()]).is_err());
    }

    #[test]
    fn a_copy_that_was_lost_gives_the_container_back_and_one_that_is_complete_never_does() {
        let back = [
            source_opened(),
            deciding(),
            Record::Serving,
            Record::RolledBack,
        ];
        assert_eq!(last_source(&back), SourceRecord::RolledBack);
        let ran = [
            target_opened(),
            Record::Paged,
            Record::Prepared,
            Record::Committed,
            Record::Released,
        ];
        let then = |last: &[Record]| [&ran[..], last].concat();
        assert_eq!(last_target(&then(&[Record::Lost])), TargetRecord::Lost);
        assert!(fold(&then(&[Record::Lost, Record::Complete])).is_err());
        assert!(fold(&then(&[Record::Complete, Record::Lost])).is_err());
        assert!(fold(&[target_opened(), Record::Prepared, Record::Lost]).is_err());
    }

    #[test]
    fn leftovers_and_the_targets_journal_are_kept() {
        let Ok(Recovered::Source(found)) = fold(&[source_opened(), leftover(), deciding()]) else {
            panic!("a good journal was refused");
        };
        assert_eq!(
            found.leftovers,
            [Leftover::Mount {
                path: "/run/migrate/07".into()
            }]
        );
        assert_eq!(found.target_journal, Some(JournalId::from_bytes([9; 16])));
    }

    #[test]
    fn a_release_that_failed_is_taken_back_but_one_that_ran_is_not() {
        let taken_back = [
            target_opened(),
            Record::Prepared,
            Record::Committed,
            Record::Aborted,
        ];
        assert_eq!(last_target(&taken_back), TargetRecord::Aborted);
        let ran = [
            target_opened(),
            Record::Prepared,
            Record::Committed,
            Record::Released,
            Record::Aborted,
        ];
        assert!(matches!(
            fold(&ran),
            Err(FoldError::OutOfOrder {
                line: 5,
                record: "aborted",
                ..
            })
        ));
    }

    #[test]
    fn a_record_of_the_other_end_or_out_of_order_is_refused() {
        assert_eq!(fold(&[]), Err(FoldError::Empty));
        assert_eq!(
            fold(&[Record::Prepared]),
            Err(FoldError::NotOpened { first: "prepared" })
        );
        for bad in [
            vec![source_opened(), Record::Prepared],
            vec![source_opened(), Record::Committed],
            vec![
                source_opened(),
                deciding(),
                Record::Committed,
                Record::RolledBack,
            ],
            vec![source_opened(), source_opened()],
            vec![target_opened(), deciding()],
            vec![target_opened(), Record::Committed],
            vec![
                target_opened(),
                Record::Prepared,
                Record::Aborted,
                Record::Committed,
            ],
        ] {
            assert!(
                matches!(fold(&bad), Err(FoldError::OutOfOrder { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_record_survives_being_written_and_read() {
        for record in [
            source_opened(),
            target_opened(),
            leftover(),
            deciding(),
            Record::Prepared,
            Record::RolledBack,
        ] {
            let line = serde_json::to_string(&record).expect("serializable");
            assert_eq!(serde_json::from_str::<Record>(&line).expect(&line), record);
        }
    }
}
