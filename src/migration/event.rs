//! What a migration tells while it runs: one stream for `--json`, the progress display and the library.
//!
//! The JSON is documented in `docs/events.md`; a test holds the two together. Fields may be added; a field
//! documented there does not change its meaning. Times end in `_ms`, sizes in bytes start with `bytes_`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::convergence::FreezeReason;
use super::handoff::SourceState;
use super::millis;
use super::mode::{Mode, Switch};
use super::report::{DumpKind, Prediction, Report, RoundReport, Tracker};
use super::{ContainerId, MigrationId};

/// An event and when it happened: one line of `--json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimedEvent {
    /// Since the migration began.
    #[serde(rename = "at_ms", with = "millis")]
    pub at: Duration,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The migration has a name.
    Started {
        /// Its name.
        migration: MigrationId,
        /// The container.
        container: ContainerId,
        /// The target as it was named, `host:port`.
        target: String,
    },
    /// It is known how memory will go.
    Mode {
        /// As it was asked for.
        asked: Mode,
        /// As it will be: pre-copy where `auto` cannot have more.
        mode: Mode,
        /// Why `auto` came to that.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// One end looked whether it can work.
    Preflight {
        /// Which end.
        side: Side,
        /// What it found.
        findings: Vec<Finding>,
    },
    /// Tracking began.
    Tracking {
        /// How dirty pages are found.
        tracker: Tracker,
        /// Processes tracked.
        processes: u32,
        /// Pages present in them.
        pages: u64,
    },
    /// The root filesystem was copied, or what changed in it since.
    Rootfs {
        /// 1 for the whole tree, then one more for each pass over the changes.
        pass: u32,
        /// The container stood still meanwhile.
        frozen: bool,
        /// Files, directories and other entries sent.
        entries: u64,
        /// Entries deleted at the target.
        deleted: u64,
        /// Content of files that was sent.
        bytes_wire: u64,
        /// How long it took.
        #[serde(rename = "duration_ms", with = "millis")]
        duration: Duration,
    },
    /// A round began.
    RoundStarted {
        /// Its number, from 1.
        round: u32,
        /// Pages it has to send.
        pages: u64,
    },
    /// A round is under way. Sent now and then.
    RoundProgress {
        /// Its number.
        round: u32,
        /// Pages it has to send.
        pages: u64,
        /// Pages sent so far.
        pages_sent: u64,
        /// Bytes over the wire so far.
        bytes_wire: u64,
    },
    /// A round is done.
    RoundFinished(RoundReport),
    /// The rounds do not converge, and the container is slowed by its CPU quota until they are over.
    Slowed {
        /// What share of the CPU time it used it is left, in per cent.
        percent: u32,
    },
    /// The rounds are over; the container is being frozen.
    Freezing {
        /// Why now.
        why: FreezeReason,
        /// The downtime to expect.
        #[serde(rename = "expected_downtime_ms", with = "millis")]
        expected_downtime: Duration,
        /// What becomes of the pages still to be sent.
        switch: Switch,
        /// All that is expected.
        predicted: Prediction,
    },
    /// Nothing in the container runs.
    Frozen {
        /// How long the freezer took.
        #[serde(rename = "duration_ms", with = "millis")]
        duration: Duration,
    },
    /// The last dirty pages are sent.
    Delta(RoundReport),
    /// CRIU's dump is held.
    Hold {
        /// What CRIU wrote.
        dump: DumpKind,
        /// Bytes of its images.
        bytes_images: u64,
        /// Pages of memory in its images. Of a skeleton, those that the engine does not carry (shared, unreadable) and, where
        /// the kernel has soft-dirty, the few that CRIU itself writes to in every thread when it stops it.
        pages_dumped: u64,
        /// From frozen to held.
        #[serde(rename = "duration_ms", with = "millis")]
        duration: Duration,
    },
    /// The target holds a whole copy.
    Prepared {
        /// How long the target took to restore.
        #[serde(rename = "restore_ms", with = "millis")]
        restore: Duration,
        /// How long it took to fill pages before that.
        #[serde(rename = "fill_ms", with = "millis")]
        fill: Duration,
    },
    /// The decision is on disk and commit was sent. From here only the target's word counts.
    CommitSent,
    /// The container runs at the target.
    Committed {
        /// How long it stood still.
        #[serde(rename = "downtime_ms", with = "millis")]
        downtime: Duration,
    },
    /// Post-copy: the container runs at the target, which is owed pages. Sent now and then until it has them.
    Serving {
        /// Pages still to be sent.
        pages_left: u64,
        /// Bytes over the wire for owed pages so far.
        bytes_wire: u64,
        /// Faults answered so far.
        faults: u64,
    },
    /// The connection is lost before the target said that its copy is complete. In post-copy the container waits where it
    /// touches a page that is owed.
    LinkLost {
        /// What happened, one line.
        reason: String,
        /// How long the target is looked for.
        #[serde(rename = "patience_ms", with = "millis")]
        patience: Duration,
    },
    /// Connected again; in post-copy the pages still missing are sent.
    LinkBack {
        /// How long the link was away.
        #[serde(rename = "duration_ms", with = "millis")]
        duration: Duration,
    },
    /// Post-copy: the last owed page has arrived.
    Whole {
        /// Since the release, on the target's clock.
        #[serde(rename = "duration_ms", with = "millis")]
        duration: Duration,
    },
    /// The target was looked for long enough, or its copy is lost and a person has to say what becomes of what is here. It is
    /// kept frozen.
    Incomplete {
        /// What happened, one line.
        reason: String,
        /// The command that goes on.
        how_to_go_on: String,
    },
    /// The container goes on at the source.
    RolledBack {
        /// Where the handover stood.
        during: SourceState,
        /// What happened, one line.
        reason: String,
        /// How long it stood still; `None` if it was never frozen.
        #[serde(rename = "downtime_ms", with = "millis::option")]
        downtime: Option<Duration>,
    },
    /// The target's word is missing; the container stays frozen.
    Unknown {
        /// What happened, one line.
        reason: String,
        /// The command that finds out.
        how_to_find_out: String,
    },
    /// The target filled in the last page after the release.
    Filled {
        /// Since the release.
        #[serde(rename = "duration_ms", with = "millis")]
        duration: Duration,
    },
    /// It is over. Always the last event.
    Done {
        /// Everything.
        report: Box<Report>,
    },
}

/// An end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Where the container is.
    Source,
    /// Where it goes.
    Target,
}

/// One thing preflight looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, a short name.
    pub what: String,
    /// Whether it will do.
    pub verdict: Verdict,
    /// What was found, one line.
    pub detail: String,
    /// The command that puts it right, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// Whether a thing will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It will.
    Ok,
    /// It will, but something is lost by it.
    Warning,
    /// It will not: the migration is refused.
    Refused,
}

#[cfg(test)]
pub(crate) mod examples;
