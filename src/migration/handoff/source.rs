//! The source's side of the handover: from copying to committed, rolled back or unknown.
//!
//! *Committed* at the target is not the end here: its copy runs, and may yet be lost with what has not reached its place or
//! its disk. So the source goes through `Serving`, with its container frozen and the pages at hand that post-copy still owes,
//! until the target says that its copy is complete, or that it is lost.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ImpossibleEvent, Party, Row, Step, Then};

use SourceAction as Do;
use SourceEvent as On;
use SourceState as At;

/// Where the source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// The container runs; rounds are sent.
    Copying,
    /// The freezer was told to stop the container.
    Freezing,
    /// Nothing in the container runs; the delta is sent and CRIU dumps the skeleton.
    Frozen,
    /// CRIU's post-dump hook holds the dump; the images go to the target, which restores.
    Holding,
    /// The target has a whole copy, held. What is held here is looked at once more.
    Prepared,
    /// `deciding` is being written. The last state that rolls back by itself.
    Deciding,
    /// `deciding` is on disk and commit was sent: only the target's word ends this.
    CommitSent,
    /// The target's word is missing. The container stays frozen; the target is asked until it answers.
    Unknown,
    /// The copy at the target runs and is not complete: what is frozen here is kept, and sends the pages that are owed.
    Serving,
    /// The copy at the target is lost, and it may have written to files that are shared: a person says whether what is frozen
    /// here goes on.
    Stranded,
    /// The copy at the target is complete. What is frozen here must die.
    Committed,
    /// The container goes on here.
    RolledBack,
}

/// As in events and reports.
impl fmt::Display for SourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What can happen at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceEvent {
    /// Convergence says freeze.
    FreezeOrdered,
    /// Every task of the container stands still.
    CgroupFrozen,
    /// CRIU called the post-dump hook, and the delta is sent.
    HoldReached,
    /// The target: the copy is restored, whole, held and on record.
    TargetPrepared,
    /// The hook is still there and the cgroup still frozen.
    HoldConfirmed,
    /// The hook or the freeze is gone.
    HoldBroken,
    /// The record asked for is on disk.
    RecordWritten,
    /// The record asked for could not be written; it may be on disk all the same.
    RecordFailed,
    /// The target: the copy runs, and is not complete.
    TargetSaysServing,
    /// The target: every page of the copy is in its place, its files are on disk, and that is on record.
    TargetSaysComplete,
    /// The target: the copy ran, was lost before it was complete, and can never run again; and that is on record.
    TargetSaysLost,
    /// The same, and the copy may have written to files that the container here uses too.
    TargetSaysLostSharing,
    /// The target: there is no copy and there never will be.
    TargetSaysRolledBack,
    /// The target: not settled yet, ask again.
    TargetSaysPending,
    /// The target knows no such migration, and its journal is the one it prepared under.
    TargetNeverHeard,
    /// The target knows no such migration, and its journal is another one.
    TargetJournalLost,
    /// No connection to the target could be made.
    TargetUnreachable,
    /// The connection to the target broke.
    PeerLost,
    /// The target refused or failed a step, or broke the protocol.
    PeerRefused,
    /// The container could not be frozen.
    FreezeFailed,
    /// CRIU or the runtime around it failed or died.
    CriuFailed,
    /// The hook's connection closed while it should hold.
    HookLost,
    /// The container ended by itself or was killed.
    ContainerExited,
    /// A step of our own failed: reading memory, tracking, files, the disk.
    LocalFailure,
    /// The user wants to stop.
    UserCancelled,
    /// The step took longer than it may.
    Timeout,
}

/// What the source has to do. Each may be repeated without harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceAction {
    /// Freeze the container's cgroup.
    FreezeContainer,
    /// Start CRIU's skeleton dump, or let go one that was started early and waits.
    DumpSkeleton,
    /// Scan once more and send what is dirty.
    SendDelta,
    /// Freeze the cgroup again under CRIU's hold, so that nothing runs whatever happens to CRIU.
    FreezeAgain,
    /// Send the skeleton's images and what else the target needs to restore.
    SendImages,
    /// See that the hook still holds and the cgroup is still frozen.
    ConfirmHold,
    /// Write `deciding` durably, with the target's journal id. Answers with `RecordWritten` or `RecordFailed`.
    RecordDeciding,
    /// Tell the target to let its copy run.
    SendCommit,
    /// After a pause, connect if need be and ask the target how the migration ended.
    AskTarget,
    /// Write `serving` durably: the copy runs, what is frozen here must stay.
    RecordServing,
    /// Send the owed pages, if any, and wait for the target's word; connect again first if the connection is lost. Answers
    /// with what the target says, or that it cannot be reached.
    ServePages,
    /// Write `committed` durably.
    RecordCommitted,
    /// Make every task of the frozen container die: exit 0 to a hook that still holds, else SIGKILL to the whole
    /// cgroup; then thaw so that the kills land.
    DestroyFrozenCopy,
    /// Let the container go on: the hook fails the dump, CRIU lets go, its network lock is removed, the cgroup
    /// is thawed. Nothing to do if it was never frozen or has exited.
    ResumeContainer,
    /// Tell the target to abort, if it can be reached. It would find out by itself.
    AbortTarget,
    /// Write `rolled_back` durably: nothing is left to do here.
    RecordRolledBack,
    /// Write `closed` durably: nothing is left to do here.
    RecordClosed,
}

/// What the source's journal says, when recovery reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceRecord {
    /// The migration began.
    Opened,
    /// Commit may have been sent.
    Deciding,
    /// The target's copy runs and is not complete.
    Serving,
    /// The target's copy is complete.
    Committed,
    /// The container went on here.
    RolledBack,
    /// Committed, and the frozen copy is gone.
    Closed,
}

impl SourceState {
    /// Every state, in the order of the protocol.
    pub const ALL: &'static [SourceState] = &[
        At::Copying,
        At::Freezing,
        At::Frozen,
        At::Holding,
        At::Prepared,
        At::Deciding,
        At::CommitSent,
        At::Unknown,
        At::Serving,
        At::Stranded,
        At::Committed,
        At::RolledBack,
    ];

    /// The next state and what to do.
    ///
    /// # Errors
    /// If the table says this cannot happen here; the state stays.
    pub fn step(
        self,
        event: SourceEvent,
    ) -> Result<Step<SourceState, SourceAction>, ImpossibleEvent<SourceState, SourceEvent>> {
        super::step(SOURCE_TABLE, self, event)
    }

    /// The state to go on from after a crash, and what to do first.
    pub fn recover(record: SourceRecord) -> Step<SourceState, SourceAction> {
        let (state, actions): (SourceState, &'static [SourceAction]) = match record {
            SourceRecord::Opened => (At::RolledBack, &[Do::ResumeContainer, Do::RecordRolledBack]),
            SourceRecord::Deciding => (At::Unknown, &[Do::AskTarget]),
            SourceRecord::Serving => (At::Serving, &[Do::ServePages]),
            SourceRecord::Committed => (At::Committed, &[Do::DestroyFrozenCopy, Do::RecordClosed]),
            SourceRecord::RolledBack => (At::RolledBack, &[]),
            SourceRecord::Closed => (At::Committed, &[]),
        };
        Step {
            state,
            actions,
            ignored: None,
        }
    }

    /// Whether the outcome is known.
    pub fn is_settled(self) -> bool {
        matches!(self, At::Committed | At::RolledBack)
    }

    /// Whether a wish to stop still rolls back: commit was not sent.
    pub fn can_cancel(self) -> bool {
        BEFORE_COMMIT.contains(&self)
    }
}

impl Party for SourceState {
    type Event = SourceEvent;
    type Action = SourceAction;
    type Record = SourceRecord;

    const FIRST: SourceState = At::Copying;

    fn table() -> &'static [Row<SourceState, SourceEvent, SourceAction>] {
        SOURCE_TABLE
    }

    fn after_crash(record: SourceRecord) -> Step<SourceState, SourceAction> {
        SourceState::recover(record)
    }
}

impl SourceEvent {
    /// Every event.
    pub const ALL: &'static [SourceEvent] = &[
        On::FreezeOrdered,
        On::CgroupFrozen,
        On::HoldReached,
        On::TargetPrepared,
        On::HoldConfirmed,
        On::HoldBroken,
        On::RecordWritten,
        On::RecordFailed,
        On::TargetSaysServing,
        On::TargetSaysComplete,
        On::TargetSaysLost,
        On::TargetSaysLostSharing,
        On::TargetSaysRolledBack,
        On::TargetSaysPending,
        On::TargetNeverHeard,
        On::TargetJournalLost,
        On::TargetUnreachable,
        On::PeerLost,
        On::PeerRefused,
        On::FreezeFailed,
        On::CriuFailed,
        On::HookLost,
        On::ContainerExited,
        On::LocalFailure,
        On::UserCancelled,
        On::Timeout,
    ];
}

const BEFORE_COMMIT: &[SourceState] = &[
    At::Copying,
    At::Freezing,
    At::Frozen,
    At::Holding,
    At::Prepared,
    At::Deciding,
];

/// The container may have been stopped, so it is let go first and the rest is told after.
const ROLL_BACK: &[SourceAction] = &[Do::ResumeContainer, Do::AbortTarget, Do::RecordRolledBack];

/// The copy ran, so there is nothing to abort at the target, which has said the last word.
const GO_ON: &[SourceAction] = &[Do::ResumeContainer, Do::RecordRolledBack];

/// The source's whole table: one row for every pair of state and event.
pub const SOURCE_TABLE: &[Row<SourceState, SourceEvent, SourceAction>] = &[
    // The way forward.
    Row {
        from: &[At::Copying],
        on: &[On::FreezeOrdered],
        then: Then::Go(At::Freezing, &[Do::FreezeContainer]),
    },
    Row {
        from: &[At::Freezing],
        on: &[On::CgroupFrozen],
        then: Then::Go(At::Frozen, &[Do::DumpSkeleton, Do::SendDelta]),
    },
    Row {
        from: &[At::Frozen],
        on: &[On::HoldReached],
        then: Then::Go(At::Holding, &[Do::FreezeAgain, Do::SendImages]),
    },
    Row {
        from: &[At::Holding],
        on: &[On::TargetPrepared],
        then: Then::Go(At::Prepared, &[Do::ConfirmHold]),
    },
    Row {
        from: &[At::Prepared],
        on: &[On::HoldConfirmed],
        then: Then::Go(At::Deciding, &[Do::RecordDeciding]),
    },
    Row {
        from: &[At::Deciding],
        on: &[On::RecordWritten],
        then: Then::Go(At::CommitSent, &[Do::SendCommit]),
    },
    Row {
        from: &[At::CommitSent, At::Unknown],
        on: &[On::TargetSaysServing],
        then: Then::Go(At::Serving, &[Do::RecordServing, Do::ServePages]),
    },
    Row {
        from: &[At::CommitSent, At::Unknown, At::Serving],
        on: &[On::TargetSaysComplete],
        then: Then::Go(
            At::Committed,
            &[Do::RecordCommitted, Do::DestroyFrozenCopy, Do::RecordClosed],
        ),
    },
    // Before commit was sent every failure rolls back.
    Row {
        from: BEFORE_COMMIT,
        on: &[
            On::TargetUnreachable,
            On::PeerLost,
            On::PeerRefused,
            On::ContainerExited,
            // The dump may have been started early, to wait for the freeze.
            On::CriuFailed,
            On::HookLost,
            On::LocalFailure,
            On::UserCancelled,
            On::Timeout,
            On::TargetSaysRolledBack,
            // Answers to a question nobody asked: the target breaks the protocol.
            On::TargetSaysServing,
            On::TargetSaysComplete,
            On::TargetSaysLost,
            On::TargetSaysLostSharing,
            On::TargetSaysPending,
            On::TargetNeverHeard,
            On::TargetJournalLost,
        ],
        then: Then::Go(At::RolledBack, ROLL_BACK),
    },
    Row {
        from: &[At::Freezing],
        on: &[On::FreezeFailed],
        then: Then::Go(At::RolledBack, ROLL_BACK),
    },
    Row {
        from: &[At::Prepared],
        on: &[On::HoldBroken],
        then: Then::Go(At::RolledBack, ROLL_BACK),
    },
    Row {
        from: &[At::Deciding],
        on: &[On::RecordFailed],
        then: Then::Go(At::RolledBack, ROLL_BACK),
    },
    Row {
        from: &[At::Copying, At::Freezing, At::Frozen],
        on: &[On::TargetPrepared],
        // It cannot have what was not sent: the target breaks the protocol.
        then: Then::Go(At::RolledBack, ROLL_BACK),
    },
    // Commit was sent: only the target's word ends it.
    Row {
        from: &[At::CommitSent, At::Unknown],
        on: &[On::TargetSaysRolledBack, On::TargetNeverHeard],
        then: Then::Go(At::RolledBack, ROLL_BACK),
    },
    Row {
        from: &[At::CommitSent],
        on: &[
            On::TargetUnreachable,
            On::PeerLost,
            On::PeerRefused,
            On::TargetJournalLost,
            On::Timeout,
        ],
        then: Then::Go(At::Unknown, &[Do::AskTarget]),
    },
    Row {
        from: &[At::CommitSent],
        on: &[On::TargetSaysPending],
        then: Then::Ignore("the answer will come on the same connection"),
    },
    Row {
        from: &[At::Unknown],
        on: &[
            On::TargetSaysPending,
            On::TargetUnreachable,
            On::PeerLost,
            On::PeerRefused,
            On::TargetJournalLost,
        ],
        then: Then::Go(At::Unknown, &[Do::AskTarget]),
    },
    Row {
        from: &[At::Unknown],
        on: &[On::Timeout, On::UserCancelled],
        then: Then::Ignore(
            "the process may leave, the container stays frozen; `migrate recover` goes on asking",
        ),
    },
    Row {
        from: &[At::CommitSent],
        on: &[On::UserCancelled],
        then: Then::Ignore("too late: the target may already run the copy"),
    },
    Row {
        from: &[At::CommitSent, At::Unknown],
        on: &[
            On::CriuFailed,
            On::HookLost,
            On::HoldBroken,
            On::LocalFailure,
        ],
        then: Then::Ignore(
            "the cgroup freezer still holds the container, and both ends of it work without CRIU",
        ),
    },
    Row {
        from: &[At::CommitSent, At::Unknown],
        on: &[On::ContainerExited],
        then: Then::Ignore(
            "if the target committed it had to die anyway, if not there is nothing to resume",
        ),
    },
    Row {
        from: &[At::Prepared, At::Deciding, At::CommitSent, At::Unknown],
        on: &[On::TargetPrepared],
        then: Then::Ignore("said before"),
    },
    // The copy is lost and can never run again: the container goes on as it was at the switch, if its files are.
    Row {
        from: &[At::CommitSent, At::Unknown, At::Serving, At::Stranded],
        on: &[On::TargetSaysLost],
        then: Then::Go(At::RolledBack, GO_ON),
    },
    Row {
        from: &[At::CommitSent, At::Unknown, At::Serving],
        on: &[On::TargetSaysLostSharing],
        then: Then::Go(At::Stranded, &[]),
    },
    Row {
        from: &[At::Stranded],
        on: &[
            On::TargetSaysLostSharing,
            On::TargetSaysServing,
            On::TargetPrepared,
            On::RecordWritten,
            On::RecordFailed,
            On::TargetSaysPending,
            On::TargetNeverHeard,
            On::TargetJournalLost,
            On::TargetUnreachable,
            On::PeerLost,
            On::PeerRefused,
            On::CriuFailed,
            On::HookLost,
            On::HoldBroken,
            On::LocalFailure,
            On::ContainerExited,
            On::UserCancelled,
            On::Timeout,
        ],
        then: Then::Ignore(
            "`migrate recover --resume-source` asks the target again and lets the container go on",
        ),
    },
    Row {
        from: &[At::Stranded],
        on: &[On::TargetSaysComplete, On::TargetSaysRolledBack],
        then: Then::Impossible(
            "the target said before that its copy is lost, and keeps that on record",
        ),
    },
    // The copy runs at the target and is not complete. Whatever happens, what is frozen here stays.
    Row {
        from: &[At::Serving],
        on: &[
            On::PeerLost,
            On::PeerRefused,
            On::TargetUnreachable,
            On::TargetSaysPending,
            On::TargetNeverHeard,
            On::TargetJournalLost,
        ],
        then: Then::Go(At::Serving, &[Do::ServePages]),
    },
    Row {
        from: &[At::Serving],
        on: &[On::TargetSaysServing, On::TargetPrepared],
        then: Then::Ignore("said before"),
    },
    Row {
        from: &[At::Serving],
        on: &[On::Timeout, On::UserCancelled],
        then: Then::Ignore(
            "the process may leave, the container stays frozen; the guard and `migrate resume` go on serving",
        ),
    },
    Row {
        from: &[At::Serving],
        on: &[On::RecordWritten, On::RecordFailed],
        then: Then::Ignore("recovery asks the target again and gets the same answer"),
    },
    Row {
        from: &[At::Serving],
        on: &[
            On::CriuFailed,
            On::HookLost,
            On::HoldBroken,
            On::LocalFailure,
            On::ContainerExited,
        ],
        then: Then::Ignore("the cgroup freezer holds what is left, and only the target may run"),
    },
    Row {
        from: &[At::Serving],
        on: &[On::TargetSaysRolledBack],
        then: Then::Impossible(
            "the target said before that its copy runs, and keeps that on record",
        ),
    },
    // Settled: late news changes nothing, but nothing may be left frozen.
    Row {
        from: &[At::RolledBack],
        on: &[On::CgroupFrozen, On::HoldReached],
        then: Then::Go(At::RolledBack, &[Do::ResumeContainer]),
    },
    Row {
        from: &[At::RolledBack],
        on: &[On::RecordFailed],
        then: Then::Ignore(
            "recovery rolls back again, or asks the target and gets the same answer",
        ),
    },
    Row {
        from: &[At::Committed],
        on: &[On::RecordFailed],
        then: Then::Ignore("recovery asks the target again and gets the same answer"),
    },
    Row {
        from: &[At::Committed, At::RolledBack],
        on: &[
            On::FreezeOrdered,
            On::HoldConfirmed,
            On::HoldBroken,
            On::RecordWritten,
            On::TargetPrepared,
            On::TargetSaysPending,
            On::TargetUnreachable,
            On::PeerLost,
            On::PeerRefused,
            On::FreezeFailed,
            On::CriuFailed,
            On::HookLost,
            On::ContainerExited,
            On::LocalFailure,
            On::UserCancelled,
            On::Timeout,
        ],
        then: Then::Ignore("the outcome is settled"),
    },
    Row {
        from: &[At::Committed],
        on: &[On::TargetSaysComplete, On::TargetSaysServing],
        then: Then::Ignore("said before"),
    },
    Row {
        from: &[At::RolledBack],
        on: &[
            On::TargetSaysRolledBack,
            On::TargetNeverHeard,
            On::TargetJournalLost,
            On::TargetSaysLost,
            On::TargetSaysLostSharing,
        ],
        then: Then::Ignore("the outcome is settled"),
    },
    Row {
        from: &[At::RolledBack],
        on: &[On::TargetSaysServing],
        then: Then::Ignore("of a copy that was lost, said before it was"),
    },
    Row {
        from: &[At::RolledBack],
        on: &[On::TargetSaysComplete],
        then: Then::Impossible(
            "the source rolls back only if commit was never sent or the target said that its copy will never run",
        ),
    },
    Row {
        from: &[At::Committed],
        on: &[
            On::TargetSaysRolledBack,
            On::TargetSaysLost,
            On::TargetSaysLostSharing,
            On::TargetNeverHeard,
            On::TargetJournalLost,
        ],
        then: Then::Impossible(
            "the target said before that its copy is complete, and keeps that on record",
        ),
    },
    // What our own code does not do.
    Row {
        from: &[
            At::Freezing,
            At::Frozen,
            At::Holding,
            At::Prepared,
            At::Deciding,
            At::CommitSent,
            At::Unknown,
            At::Serving,
            At::Stranded,
        ],
        on: &[On::FreezeOrdered],
        then: Then::Impossible("the freeze is ordered once, to end the rounds"),
    },
    Row {
        from: &[
            At::Copying,
            At::Frozen,
            At::Holding,
            At::Prepared,
            At::Deciding,
            At::CommitSent,
            At::Unknown,
            At::Serving,
            At::Stranded,
            At::Committed,
        ],
        on: &[On::CgroupFrozen],
        then: Then::Impossible("only Freezing waits for the freezer"),
    },
    Row {
        from: &[
            At::Copying,
            At::Frozen,
            At::Holding,
            At::Prepared,
            At::Deciding,
            At::CommitSent,
            At::Unknown,
            At::Serving,
            At::Stranded,
        ],
        on: &[On::FreezeFailed],
        then: Then::Impossible(
            "only Freezing waits for the freezer; a freeze lost later is HoldBroken",
        ),
    },
    Row {
        from: &[
            At::Copying,
            At::Freezing,
            At::Holding,
            At::Prepared,
            At::Deciding,
            At::CommitSent,
            At::Unknown,
            At::Serving,
            At::Stranded,
            At::Committed,
        ],
        on: &[On::HoldReached],
        then: Then::Impossible("the dump is started once, in Frozen"),
    },
    Row {
        from: &[
            At::Copying,
            At::Freezing,
            At::Frozen,
            At::Holding,
            At::Deciding,
            At::CommitSent,
            At::Unknown,
            At::Serving,
            At::Stranded,
        ],
        on: &[On::HoldConfirmed],
        then: Then::Impossible("the hold is looked at once, in Prepared"),
    },
    Row {
        from: &[
            At::Copying,
            At::Freezing,
            At::Frozen,
            At::Holding,
            At::Deciding,
        ],
        on: &[On::HoldBroken],
        then: Then::Impossible("the hold is looked at once, in Prepared"),
    },
    Row {
        from: &[
            At::Copying,
            At::Freezing,
            At::Frozen,
            At::Holding,
            At::Prepared,
            At::CommitSent,
            At::Unknown,
        ],
        on: &[On::RecordWritten, On::RecordFailed],
        then: Then::Impossible("no record is being written"),
    },
];
