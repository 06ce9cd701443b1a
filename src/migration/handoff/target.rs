//! The target's side of the handover: from receiving to released or aborted.

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
    /// The copy runs; the container lives here.
    Released,
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
    /// The look: the copy is gone and may have run.
    FoundGone,
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
    /// Tell whoever asks from the source that the copy runs.
    AnswerCommitted,
    /// Kill a running copy whose memory has holes: stopped is better than wrong.
    KillCopy,
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
    /// There is no copy and never will be.
    Aborted,
}

impl TargetRecord {
    /// Whether a hook that lost its agent lets the copy run (exit 0) or fails the restore.
    pub fn hook_lets_go(self) -> bool {
        matches!(self, TargetRecord::Committed | TargetRecord::Released)
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
            TargetRecord::Released => (At::Released, &[]),
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
        matches!(self, At::Released | At::Aborted)
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
        On::Resumed,
        On::CopyDiscarded,
        On::DiscardFailed,
        On::FoundRunning,
        On::FoundNeverRan,
        On::FoundGone,
    ];
}

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
        // Gone but may have run: it was the container, and it ended here.
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
    // The copy runs.
    Row {
        from: &[At::Released],
        on: &[On::Query, On::Commit],
        then: Then::Go(At::Released, &[Do::AnswerCommitted]),
    },
    Row {
        from: &[At::Released],
        on: &[On::PagerLost],
        then: Then::Go(At::Released, &[Do::KillCopy]),
    },
    Row {
        from: &[At::Released],
        on: &[On::RecordFailed],
        then: Then::Ignore(
            "`committed` is on disk; recovery looks at the copy again and finds it running",
        ),
    },
    Row {
        from: &[At::Released],
        on: &[
            On::RecordWritten,
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
        then: Then::Ignore("the outcome is settled"),
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
            At::RecordingAbort,
            At::Aborted,
        ],
        on: &[On::CopyDiscarded, On::DiscardFailed],
        then: Then::Impossible("only Discarding removes a copy"),
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
        on: &[On::FoundRunning, On::FoundNeverRan, On::FoundGone],
        then: Then::Impossible("only Releasing looks what became of a copy"),
    },
    Row {
        from: &[At::Released],
        on: &[On::FoundNeverRan],
        then: Then::Impossible("the copy ran, and the hook left its mark before it did"),
    },
];
