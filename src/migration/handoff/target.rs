//! The target's side of the handover: from receiving to complete, aborted or lost.
//!
//! A copy that runs is not yet as safe as the container was at the source: its pages may still be on the way to their places,
//! its files on the way to the disk. Until both are where they belong the source keeps what it has, and takes it back if the
//! copy is lost.

use serde::{Deserialize, Serialize};

use super::{ImpossibleEvent, Party, Row, Step, Then};

use TargetAction as Do;
use TargetEvent as On;
use TargetState as At;

/// Where the target stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetState {
    /// Pages and files arrive. A restore may be waiting for its inventory.
    Receiving,
    /// CRIU restores the skeleton.
    Restoring,
    /// CRIU's post-restore hook holds the copy; none of its code has run. Are all its pages here?
    Held,
    /// `prepared` is being written.
    Preparing,
    /// `prepared` is on disk and the source was told. Commit, a question or the timer ends this.
    Prepared,
    /// Commit came; `committed` is being written.
    Committing,
    /// `committed` is on disk; the hook lets the copy go. Nobody was told yet.
    Releasing,
    /// The copy runs; its pager still brings pages to their places.
    Released,
    /// Every page is in its place; the files are written to the disk.
    Completing,
    /// The files are on disk; `complete` is being written.
    RecordingComplete,
    /// The container lives here, and nothing of it is needed at the source any more.
    Complete,
    /// Pages are lost; what is left of the copy is being killed.
    Losing,
    /// The copy is dead and can never run again; `lost` is being written.
    RecordingLost,
    /// The copy ran, is lost, and that is on record.
    Lost,
    /// The copy is being removed.
    Discarding,
    /// The copy is gone; `aborted` is being written.
    RecordingAbort,
    /// There is no copy and never will be, and that is on record.
    Aborted,
}

/// What can happen at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TargetEvent {
    /// Every image and every page the source meant to send is here.
    SkeletonComplete,
    /// CRIU called the post-restore hook.
    HookReached,
    /// Every page the images name is in the store.
    CopyVerified,
    /// The record asked for is on disk.
    RecordWritten,
    /// The record asked for could not be written; it may be on disk all the same.
    RecordFailed,
    /// The source: let the copy run.
    Commit,
    /// The source lost the answer and asks how the migration ended.
    Query,
    /// The source: it is off.
    Abort,
    /// The connection to the source broke.
    PeerLost,
    /// The source broke the protocol.
    PeerViolation,
    /// The step, or the wait for a lost source, took longer than it may.
    Timeout,
    /// A step of our own failed: a page is missing, the disk is full, memory is short.
    LocalFailure,
    /// The runtime's restore ended in failure.
    RestoreFailed,
    /// The hook's connection closed while it should hold.
    HookLost,
    /// The pager died with pages missing: the kernel would hand out zeros for them.
    PagerLost,
    /// The pager has brought every page to its place, or its process has ended and wants none; or there was nothing to bring.
    PagerDone,
    /// The files are on disk.
    FilesSynced,
    /// They could not be written.
    SyncFailed,
    /// No process of the copy runs any more, seen and not assumed.
    CopyKilled,
    /// Some process of it does not die.
    KillFailed,
    /// The runtime reports the copy running.
    Resumed,
    /// No process of the copy is left, seen and not assumed.
    CopyDiscarded,
    /// Something of the copy is still there.
    DiscardFailed,
    /// The look at a release that went wrong: the copy runs.
    FoundRunning,
    /// The look: the copy is gone and none of its code ran. The hook's mark, left at CRIU's `pre-resume` before
    /// any task can run, is missing, and the host has not been restarted since.
    FoundNeverRan,
    /// The look: the copy is gone and may have run. What became of its pages the pager knows.
    FoundGone,
    /// The look: this host was restarted, so that the copy is gone and whatever was not complete is lost with it.
    FoundLost,
}

/// What the target has to do. Each may be repeated without harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TargetAction {
    /// Compose the images and let the restore go (write the inventory it waits for).
    StartRestore,
    /// Compare the pages the images name with the store. Answers `CopyVerified` or `LocalFailure`.
    VerifyCopy,
    /// Write `prepared` durably.
    RecordPrepared,
    /// Tell the source the copy is ready, and which journal says so.
    AnswerPrepared,
    /// Start the wait after which a prepared copy without a source is given up; at its end comes `Timeout`.
    StartOrphanTimer,
    /// Write `committed` durably.
    RecordCommitted,
    /// Tell the hook to let the copy run and wait for the runtime's word. Answers `Resumed`, `RestoreFailed`,
    /// `HookLost` or `PagerLost`. Not done if the pager is dead already: that is `PagerLost`.
    ReleaseCopy,
    /// See what became of a copy whose release went wrong: wait until the restore has ended, kill the copy if its
    /// pager died, then look at its tasks and at the hook's mark. Answers `FoundRunning`, `FoundNeverRan` or
    /// `FoundGone`; in doubt `FoundGone`, which keeps the source from running what may have run here.
    InspectCopy,
    /// Write `released` durably.
    RecordReleased,
    /// Tell the source, and whoever asks from there, that the copy runs and that what is frozen there is still needed.
    AnswerCommitted,
    /// Write the copy's files to the disk (`syncfs`). Answers `FilesSynced` or `SyncFailed`; after a failure, wait before trying
    /// again.
    SyncFiles,
    /// Write `complete` durably. After a failure, wait before trying again.
    RecordComplete,
    /// Tell the source, and whoever asks from there, that it is needed no more.
    AnswerComplete,
    /// Kill a running copy whose memory has holes: stopped is better than wrong. Answers `CopyKilled` or `KillFailed`.
    KillCopy,
    /// Write `lost` durably. After a failure, wait before trying again.
    RecordLost,
    /// Tell the source, and whoever asks from there, that the copy is lost.
    AnswerLost,
    /// Remove the copy: the hook fails the restore, its processes are killed, its mounts, cgroups and files go.
    /// After a failure, wait before trying again.
    DiscardCopy,
    /// Write `aborted` durably. After a failure, wait before trying again.
    RecordAborted,
    /// Tell whoever asks from the source that there is no copy and never will be.
    AnswerRolledBack,
    /// Tell whoever asks from the source to ask again.
    AnswerPending,
}

/// What the target's journal says, when recovery or the hook reads it. No record at all means that the
/// migration was never prepared here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetRecord {
    /// The migration began.
    Opened,
    /// The copy was whole and held.
    Prepared,
    /// The copy may run.
    Committed,
    /// The copy ran.
    Released,
    /// Every page was in its place and every file on disk.
    Complete,
    /// The copy was lost before it was complete.
    Lost,
    /// There is no copy and never will be.
    Aborted,
}

impl TargetRecord {
    /// Whether a hook that lost its agent lets the copy run (exit 0) or fails the restore.
    pub fn hook_lets_go(self) -> bool {
        matches!(
            self,
            TargetRecord::Committed | TargetRecord::Released | TargetRecord::Complete
        )
    }
}

impl TargetState {
    /// Every state, in the order of the protocol.
    pub const ALL: &'static [TargetState] = &[
        At::Receiving,
        At::Restoring,
        At::Held,
        At::Preparing,
        At::Prepared,
        At::Committing,
        At::Releasing,
        At::Released,
        At::Completing,
        At::RecordingComplete,
        At::Complete,
        At::Losing,
        At::RecordingLost,
        At::Lost,
        At::Discarding,
        At::RecordingAbort,
        At::Aborted,
    ];

    /// The next state and what to do.
    ///
    /// # Errors
    /// If the table says this cannot happen here; the state stays.
    pub fn step(
        self,
        event: TargetEvent,
    ) -> Result<Step<TargetState, TargetAction>, ImpossibleEvent<TargetState, TargetEvent>> {
        super::step(TARGET_TABLE, self, event)
    }

    /// The state to go on from after a crash of the agent, and what to do first. Done before any connection is
    /// accepted, so that no commit can meet a migration that is being undone.
    pub fn recover(record: TargetRecord) -> Step<TargetState, TargetAction> {
        let (state, actions): (TargetState, &'static [TargetAction]) = match record {
            TargetRecord::Opened | TargetRecord::Prepared => (At::Discarding, &[Do::DiscardCopy]),
            TargetRecord::Committed => (At::Releasing, &[Do::InspectCopy]),
            // Next comes what became of its pages, or of its host.
            TargetRecord::Released => (At::Released, &[]),
            TargetRecord::Complete => (At::Complete, &[]),
            TargetRecord::Lost => (At::Lost, &[Do::DiscardCopy]),
            TargetRecord::Aborted => (At::Aborted, &[]),
        };
        Step {
            state,
            actions,
            ignored: None,
        }
    }

    /// Whether the outcome is known and on record.
    pub fn is_settled(self) -> bool {
        matches!(self, At::Complete | At::Lost | At::Aborted)
    }

    /// Whether the copy runs or ran, and what is frozen at the source is still needed.
    pub fn needs_source(self) -> bool {
        matches!(self, At::Released | At::Completing | At::RecordingComplete)
    }
}

impl Party for TargetState {
    type Event = TargetEvent;
    type Action = TargetAction;
    type Record = TargetRecord;

    const FIRST: TargetState = At::Receiving;

    fn table() -> &'static [Row<TargetState, TargetEvent, TargetAction>] {
        TARGET_TABLE
    }

    fn after_crash(record: TargetRecord) -> Step<TargetState, TargetAction> {
        TargetState::recover(record)
    }
}

impl TargetEvent {
    /// Every event.
    pub const ALL: &'static [TargetEvent] = &[
        On::SkeletonComplete,
        On::HookReached,
        On::CopyVerified,
        On::RecordWritten,
        On::RecordFailed,
        On::Commit,
        On::Query,
        On::Abort,
        On::PeerLost,
        On::PeerViolation,
        On::Timeout,
        On::LocalFailure,
        On::RestoreFailed,
        On::HookLost,
        On::PagerLost,
        On::PagerDone,
        On::FilesSynced,
        On::SyncFailed,
        On::CopyKilled,
        On::KillFailed,
        On::Resumed,
        On::CopyDiscarded,
        On::DiscardFailed,
        On::FoundRunning,
        On::FoundNeverRan,
        On::FoundGone,
        On::FoundLost,
    ];
}

/// The copy was released and its end is not on record yet, or it is.
const RAN: &[TargetState] = &[
    At::Released,
    At::Completing,
    At::RecordingComplete,
    At::Complete,
    At::Losing,
    At::RecordingLost,
    At::Lost,
];

/// The target's whole table: one row for every pair of state and event.
pub const TARGET_TABLE: &[Row<TargetState, TargetEvent, TargetAction>] = &[
    // The way forward.
    Row {
        from: &[At::Receiving],
        on: &[On::SkeletonComplete],
        then: Then::Go(At::Restoring, &[Do::StartRestore]),
    },
    Row {
        from: &[At::Restoring],
        on: &[On::HookReached],
        then: Then::Go(At::Held, &[Do::VerifyCopy]),
    },
    Row {
        from: &[At::Held],
        on: &[On::CopyVerified],
        then: Then::Go(At::Preparing, &[Do::RecordPrepared]),
    },
    Row {
        from: &[At::Preparing],
        on: &[On::RecordWritten],
        then: Then::Go(At::Prepared, &[Do::AnswerPrepared]),
    },
    Row {
        from: &[At::Prepared],
        on: &[On::Commit],
        then: Then::Go(At::Committing, &[Do::RecordCommitted]),
    },
    Row {
        from: &[At::Committing],
        on: &[On::RecordWritten],
        then: Then::Go(At::Releasing, &[Do::ReleaseCopy]),
    },
    Row {
        from: &[At::Releasing],
        // Gone but may have run: it was the container, and it ended here. Or its pages were lost, which its pager tells.
        on: &[On::Resumed, On::FoundRunning, On::FoundGone],
        then: Then::Go(At::Released, &[Do::RecordReleased, Do::AnswerCommitted]),
    },
    // Before a commit was accepted every failure discards the copy, and so does a question: the asker stands still.
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Held,
            At::Preparing,
            At::Prepared,
        ],
        on: &[
            On::Query,
            On::Abort,
            On::PeerViolation,
            On::Timeout,
            On::LocalFailure,
            On::RestoreFailed,
            On::PagerLost,
        ],
        then: Then::Go(At::Discarding, &[Do::DiscardCopy]),
    },
    Row {
        from: &[At::Receiving, At::Restoring, At::Held, At::Preparing],
        // A commit before the answer `prepared` breaks the protocol.
        on: &[On::PeerLost, On::Commit],
        then: Then::Go(At::Discarding, &[Do::DiscardCopy]),
    },
    Row {
        from: &[At::Restoring, At::Held, At::Preparing, At::Prepared],
        on: &[On::HookLost],
        then: Then::Go(At::Discarding, &[Do::DiscardCopy]),
    },
    Row {
        from: &[At::Preparing],
        on: &[On::RecordFailed],
        then: Then::Go(At::Discarding, &[Do::DiscardCopy]),
    },
    Row {
        from: &[At::Prepared],
        on: &[On::PeerLost],
        then: Then::Go(At::Prepared, &[Do::StartOrphanTimer]),
    },
    // Commit was accepted, but nobody was told and the source still holds its frozen container.
    Row {
        from: &[At::Committing],
        // The record may be on disk all the same and a hook without agent would believe it: the copy must be gone
        // before anyone is told.
        on: &[On::RecordFailed],
        then: Then::Go(At::Discarding, &[Do::DiscardCopy]),
    },
    Row {
        from: &[At::Committing],
        on: &[
            On::RestoreFailed,
            On::HookLost,
            On::PagerLost,
            On::LocalFailure,
        ],
        then: Then::Ignore("the release that follows the record will find out"),
    },
    Row {
        from: &[At::Releasing],
        on: &[
            On::RestoreFailed,
            On::HookLost,
            On::PagerLost,
            On::Timeout,
            On::LocalFailure,
        ],
        then: Then::Go(At::Releasing, &[Do::InspectCopy]),
    },
    Row {
        from: &[At::Releasing],
        on: &[On::FoundNeverRan],
        then: Then::Go(At::Discarding, &[Do::DiscardCopy]),
    },
    Row {
        from: &[At::Committing],
        on: &[On::Query],
        then: Then::Go(At::Committing, &[Do::AnswerPending]),
    },
    Row {
        from: &[At::Releasing],
        on: &[On::Query],
        then: Then::Go(At::Releasing, &[Do::AnswerPending]),
    },
    Row {
        from: &[At::Committing, At::Releasing],
        on: &[On::Commit],
        then: Then::Ignore("said before"),
    },
    Row {
        from: &[At::Committing, At::Releasing],
        on: &[On::Abort, On::PeerLost, On::PeerViolation],
        then: Then::Ignore("a source that sent commit has given up the right to abort"),
    },
    Row {
        from: &[At::Committing],
        on: &[On::Timeout],
        then: Then::Ignore("the disk will answer"),
    },
    // The copy runs. It is complete when its pages are in their places, then its files on disk, then that on record.
    Row {
        from: &[At::Released],
        on: &[On::PagerDone],
        then: Then::Go(At::Completing, &[Do::SyncFiles]),
    },
    Row {
        from: &[At::Completing],
        on: &[On::FilesSynced],
        then: Then::Go(At::RecordingComplete, &[Do::RecordComplete]),
    },
    Row {
        from: &[At::Completing],
        on: &[On::SyncFailed],
        then: Then::Go(At::Completing, &[Do::SyncFiles]),
    },
    Row {
        from: &[At::RecordingComplete],
        on: &[On::RecordWritten],
        then: Then::Go(At::Complete, &[Do::AnswerComplete]),
    },
    Row {
        from: &[At::RecordingComplete],
        on: &[On::RecordFailed],
        then: Then::Go(At::RecordingComplete, &[Do::RecordComplete]),
    },
    Row {
        from: &[At::Released],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::Released, &[Do::AnswerCommitted]),
    },
    Row {
        from: &[At::Completing],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::Completing, &[Do::AnswerCommitted]),
    },
    Row {
        from: &[At::RecordingComplete],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::RecordingComplete, &[Do::AnswerCommitted]),
    },
    Row {
        from: &[At::Complete],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::Complete, &[Do::AnswerComplete]),
    },
    // Its pages are lost: first what runs is killed, then the record says so, then the source may hear it and go on.
    Row {
        from: &[At::Released],
        on: &[On::PagerLost],
        then: Then::Go(At::Losing, &[Do::KillCopy]),
    },
    Row {
        from: &[At::Losing],
        on: &[On::KillFailed],
        then: Then::Go(At::Losing, &[Do::KillCopy]),
    },
    Row {
        from: &[At::Losing],
        on: &[On::CopyKilled],
        then: Then::Go(At::RecordingLost, &[Do::RecordLost]),
    },
    Row {
        from: &[At::Releasing, At::Released],
        on: &[On::FoundLost],
        then: Then::Go(At::RecordingLost, &[Do::RecordLost]),
    },
    Row {
        from: &[At::RecordingLost],
        on: &[On::RecordFailed],
        then: Then::Go(At::RecordingLost, &[Do::RecordLost]),
    },
    Row {
        from: &[At::RecordingLost],
        on: &[On::RecordWritten],
        then: Then::Go(At::Lost, &[Do::DiscardCopy, Do::AnswerLost]),
    },
    Row {
        from: &[At::Losing],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::Losing, &[Do::AnswerPending]),
    },
    Row {
        from: &[At::RecordingLost],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::RecordingLost, &[Do::AnswerPending]),
    },
    Row {
        from: &[At::Lost],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::Lost, &[Do::AnswerLost]),
    },
    Row {
        from: &[At::Lost],
        on: &[On::DiscardFailed],
        then: Then::Go(At::Lost, &[Do::DiscardCopy]),
    },
    Row {
        from: &[At::Lost],
        on: &[On::CopyDiscarded],
        then: Then::Ignore("the outcome is settled"),
    },
    Row {
        from: &[At::Released],
        on: &[On::RecordWritten, On::RecordFailed],
        then: Then::Ignore("`committed` is on disk; `complete` or `lost` will follow it"),
    },
    Row {
        from: &[At::Completing, At::Losing],
        on: &[On::RecordWritten, On::RecordFailed],
        then: Then::Ignore("the record of a step before"),
    },
    Row {
        from: &[At::Complete, At::Lost],
        on: &[On::RecordWritten, On::RecordFailed],
        then: Then::Ignore("the outcome is on disk"),
    },
    Row {
        from: &[At::Completing, At::RecordingComplete, At::Complete],
        on: &[On::PagerLost, On::PagerDone],
        then: Then::Ignore("every page was in its place before"),
    },
    Row {
        from: &[At::Losing, At::RecordingLost, At::Lost],
        on: &[On::PagerLost, On::PagerDone],
        then: Then::Ignore("the copy is lost already"),
    },
    Row {
        from: RAN,
        on: &[
            On::Abort,
            On::PeerLost,
            On::PeerViolation,
            On::Timeout,
            On::LocalFailure,
            On::RestoreFailed,
            On::HookLost,
            On::Resumed,
            On::FoundRunning,
            On::FoundGone,
        ],
        then: Then::Ignore("the copy ran: what was released is not taken back"),
    },
    Row {
        from: &[
            At::Completing,
            At::RecordingComplete,
            At::Complete,
            At::Losing,
            At::RecordingLost,
            At::Lost,
        ],
        on: &[On::FoundLost],
        then: Then::Ignore("only of a copy that is not known to be complete or lost"),
    },
    // The way back: first the copy goes, then the record says so, then the source may hear it.
    Row {
        from: &[At::Discarding],
        on: &[On::CopyDiscarded],
        then: Then::Go(At::RecordingAbort, &[Do::RecordAborted]),
    },
    Row {
        from: &[At::Discarding],
        // A restore that got as far as its hook in the meantime has to be removed too.
        on: &[On::DiscardFailed, On::HookReached],
        then: Then::Go(At::Discarding, &[Do::DiscardCopy]),
    },
    Row {
        from: &[At::RecordingAbort],
        on: &[On::RecordWritten],
        then: Then::Go(At::Aborted, &[Do::AnswerRolledBack]),
    },
    Row {
        from: &[At::RecordingAbort],
        // An older `committed` may be on disk, so nothing is said until `aborted` is.
        on: &[On::RecordFailed],
        then: Then::Go(At::RecordingAbort, &[Do::RecordAborted]),
    },
    Row {
        from: &[At::Discarding],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::Discarding, &[Do::AnswerPending]),
    },
    Row {
        from: &[At::RecordingAbort],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::RecordingAbort, &[Do::AnswerPending]),
    },
    Row {
        from: &[At::Aborted],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::Aborted, &[Do::AnswerRolledBack]),
    },
    Row {
        from: &[At::Discarding, At::RecordingAbort, At::Aborted],
        on: &[
            On::SkeletonComplete,
            On::CopyVerified,
            On::Abort,
            On::PeerLost,
            On::PeerViolation,
            On::Timeout,
            On::LocalFailure,
            On::RestoreFailed,
            On::HookLost,
            On::PagerLost,
        ],
        then: Then::Ignore("it is being given up already"),
    },
    Row {
        from: &[At::Discarding],
        on: &[On::RecordWritten, On::RecordFailed],
        then: Then::Ignore(
            "the record of a step that was given up meanwhile; `aborted` will follow it",
        ),
    },
    Row {
        from: &[At::Aborted],
        on: &[On::RecordWritten, On::RecordFailed],
        then: Then::Ignore("`aborted` is on disk"),
    },
    // What our own code does not do.
    Row {
        from: &[
            At::Restoring,
            At::Held,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Releasing,
            At::Released,
            At::Completing,
            At::RecordingComplete,
            At::Complete,
            At::Losing,
            At::RecordingLost,
            At::Lost,
        ],
        on: &[On::SkeletonComplete],
        then: Then::Impossible(
            "the manifest that completes the skeleton is taken once, in Receiving",
        ),
    },
    Row {
        from: &[
            At::Receiving,
            At::Held,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Releasing,
            At::Released,
            At::Completing,
            At::RecordingComplete,
            At::Complete,
            At::Losing,
            At::RecordingLost,
            At::Lost,
            At::RecordingAbort,
            At::Aborted,
        ],
        on: &[On::HookReached],
        then: Then::Impossible(
            "the restore is let go once, in Restoring, and is gone when its copy is",
        ),
    },
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Releasing,
            At::Released,
            At::Completing,
            At::RecordingComplete,
            At::Complete,
            At::Losing,
            At::RecordingLost,
            At::Lost,
        ],
        on: &[On::CopyVerified],
        then: Then::Impossible("the copy is verified once, in Held"),
    },
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Held,
            At::Prepared,
            At::Releasing,
        ],
        on: &[On::RecordWritten, On::RecordFailed],
        then: Then::Impossible("no record is being written"),
    },
    Row {
        from: &[At::Receiving],
        on: &[On::HookLost],
        then: Then::Impossible("the restore waits and has no hook yet"),
    },
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Held,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Discarding,
            At::RecordingAbort,
            At::Aborted,
        ],
        on: &[On::Resumed],
        then: Then::Impossible("only Releasing lets a copy run"),
    },
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Held,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Releasing,
            At::Released,
            At::Completing,
            At::RecordingComplete,
            At::Complete,
            At::Losing,
            At::RecordingLost,
            At::RecordingAbort,
            At::Aborted,
        ],
        on: &[On::CopyDiscarded, On::DiscardFailed],
        then: Then::Impossible("only Discarding and Lost remove a copy"),
    },
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Held,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Discarding,
            At::RecordingAbort,
            At::Aborted,
        ],
        on: &[
            On::FoundRunning,
            On::FoundNeverRan,
            On::FoundGone,
            On::FoundLost,
        ],
        then: Then::Impossible("only Releasing looks what became of a copy"),
    },
    Row {
        from: RAN,
        on: &[On::FoundNeverRan],
        then: Then::Impossible("the copy ran, and the hook left its mark before it did"),
    },
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Held,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Releasing,
        ],
        on: &[On::PagerDone],
        then: Then::Impossible("what the pager has done counts when the copy runs"),
    },
    Row {
        from: &[At::Discarding, At::RecordingAbort, At::Aborted],
        on: &[On::PagerDone],
        then: Then::Impossible("the copy never ran"),
    },
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Held,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Releasing,
            At::Released,
            At::RecordingComplete,
            At::Complete,
            At::Losing,
            At::RecordingLost,
            At::Lost,
            At::Discarding,
            At::RecordingAbort,
            At::Aborted,
        ],
        on: &[On::FilesSynced, On::SyncFailed],
        then: Then::Impossible("the files are written once, in Completing"),
    },
    Row {
        from: &[
            At::Receiving,
            At::Restoring,
            At::Held,
            At::Preparing,
            At::Prepared,
            At::Committing,
            At::Releasing,
            At::Released,
            At::Completing,
            At::RecordingComplete,
            At::Complete,
            At::RecordingLost,
            At::Lost,
            At::Discarding,
            At::RecordingAbort,
            At::Aborted,
        ],
        on: &[On::CopyKilled, On::KillFailed],
        then: Then::Impossible("a copy that ran is killed once, in Losing"),
    },
];
