//! What a migration reports when it is over: `--report FILE` and the last event of the stream.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::convergence::FreezeReason;
use super::handoff::SourceState;
use super::millis;
use super::mode::{Mode, Switch};
use super::phase::Downtime;
use super::{ContainerId, MigrationId};

/// One migration, from its start to its outcome. Times are as the source's clock saw them unless said otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The migration.
    pub migration: MigrationId,
    /// The container.
    pub container: ContainerId,
    /// The target as it was named, `host:port`.
    pub target: String,
    /// How it ended.
    pub outcome: Outcome,
    /// The tracker that found dirty pages; `None` if it never came to that.
    pub tracker: Option<Tracker>,
    /// How memory was to get to the target: as asked for, or pre-copy where `auto` could not have more.
    pub mode: Mode,
    /// From the start until the outcome was known, and every page was at the target.
    #[serde(rename = "total_ms", with = "millis")]
    pub total: Duration,
    /// The rounds in order; the delta is not among them.
    pub rounds: Vec<RoundReport>,
    /// Why the rounds ended; `None` if they did not end by decision.
    pub rounds_ended: Option<FreezeReason>,
    /// What became of the pages still to be sent at the freeze; `None` if it did not come to that by decision.
    pub switch: Option<Switch>,
    /// What was expected at that moment; `downtime`, `total` and `fill_after_release` are what came.
    pub predicted: Option<Prediction>,
    /// What share of its CPU time the container was left at the slowest, by `--auto-converge`; `None` if it was not slowed.
    pub slowed_percent: Option<u32>,
    /// The last pages, sent while the container was frozen.
    pub delta: Option<RoundReport>,
    /// What was sent, all together.
    pub sent: Sent,
    /// Bytes of the container's memory that were present at the freeze (or at the last scan, if it never froze).
    pub memory_bytes: u64,
    /// How long the container stood still, by parts; `None` if it was never frozen.
    pub downtime: Option<Downtime>,
    /// From the release at the target until its last page was filled in; `None` if not known.
    #[serde(rename = "fill_after_release_ms", with = "millis::option")]
    pub fill_after_release: Option<Duration>,
    /// What followed the container after the switch; `None` if nothing was owed.
    pub post_copy: Option<PostCopyReport>,
    /// How CRIU dumped: skeleton only, or everything because the skeleton trick does not work here.
    pub dump: Option<DumpKind>,
}

/// What is expected of a freeze, at the moment it is decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prediction {
    /// How long the container will stand still.
    #[serde(rename = "downtime_ms", with = "millis")]
    pub downtime: Duration,
    /// From the start of the migration until every page is in its place at the target; `None` if nothing was measured to go
    /// by.
    #[serde(rename = "total_ms", with = "millis::option")]
    pub total: Option<Duration>,
    /// Post-copy: from the release at the target until its last page has come, a time in which the container runs with
    /// faults over the network. `None` for pre-copy, in which nothing is missing at the release, and if nothing was measured.
    #[serde(rename = "last_page_ms", with = "millis::option")]
    pub last_page: Option<Duration>,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Outcome {
    /// The container runs at the target.
    Moved,
    /// Preflight said no; nothing was touched.
    Refused {
        /// One line for each finding.
        reasons: Vec<String>,
    },
    /// `--dry-run`: preflight said yes at both ends; nothing was touched.
    WouldMove,
    /// The container goes on at the source, or is in the state its user put it in meanwhile.
    RolledBack {
        /// The state the handover was in.
        during: SourceState,
        /// What happened, one line.
        reason: String,
        /// What it does there.
        #[serde(default, skip_serializing_if = "StaysAs::is_running")]
        stays: StaysAs,
    },
    /// The target's word is missing; the container is frozen at the source.
    Unknown {
        /// What happened, one line.
        reason: String,
    },
    /// The container runs at the target, which has not said that it has every page in place and every file on disk; at the
    /// source it is kept frozen.
    Incomplete {
        /// What happened, one line.
        reason: String,
    },
    /// The copy at the target was lost, and it may have written to files that both used: the container is kept frozen at the
    /// source until a person says what becomes of it.
    Stranded {
        /// What happened, one line.
        reason: String,
    },
}

/// What a container that did not move does at the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StaysAs {
    /// It goes on.
    #[default]
    Running,
    /// Its user paused it.
    Paused,
    /// It ended, by itself or by its user.
    Ended,
}

/// What is said of the container: `web goes on here`.
impl fmt::Display for StaysAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StaysAs::Running => "goes on here",
            StaysAs::Paused => "stays here, paused",
            StaysAs::Ended => "did not move",
        })
    }
}

impl StaysAs {
    fn is_running(&self) -> bool {
        *self == StaysAs::Running
    }
}

/// Pages that followed the container.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PostCopyReport {
    /// Pages that were missing when the container went on at the target.
    pub owed_pages: u64,
    /// Faults that were answered for them over the first connection.
    pub faults: u64,
    /// Bytes that went over the wire for them over the first connection, headers included, before QUIC.
    pub bytes_wire: u64,
    /// From the release until the last one had arrived, on the target's clock; `None` if that has not happened.
    #[serde(rename = "last_page_ms", with = "millis::option")]
    pub last_page: Option<Duration>,
}

/// How dirty pages were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tracker {
    /// `/proc/PID/clear_refs` and bit 55 of pagemap.
    SoftDirty,
    /// userfaultfd write protection, asynchronous, with `PAGEMAP_SCAN`.
    UffdWp,
}

/// What CRIU wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DumpKind {
    /// Everything but the pages.
    Skeleton,
    /// The pages too.
    Full,
}

/// One round, or the delta.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Its number, from 1; the delta has the number after the last round.
    pub round: u32,
    /// What was sent.
    #[serde(flatten)]
    pub sent: Sent,
    /// How long it took.
    #[serde(rename = "duration_ms", with = "millis")]
    pub duration: Duration,
    /// Pages the scan after it found dirty; 0 for the delta, after which nothing runs.
    pub pages_dirty: u64,
    /// Pages the target lacks after it: those found dirty, and those not sent yet.
    #[serde(default)]
    pub pages_left: u64,
    /// Of those, pages the next round would hold back because they are written all the time.
    #[serde(default)]
    pub pages_held: u64,
    /// Pages a second the container dirtied meanwhile.
    pub dirty_rate: f64,
    /// Pages a second sent in the latest rounds; `None` if not known yet.
    pub throughput: Option<f64>,
    /// The downtime to expect had it been frozen right after.
    #[serde(rename = "expected_downtime_ms", with = "millis::option")]
    pub expected_downtime: Option<Duration>,
}

/// Pages and bytes. `pages` is the sum of the three kinds below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Pages read.
    pub pages: u64,
    /// Of those, sent with their content.
    pub data_pages: u64,
    /// Of those, all zero: sent as a mark.
    pub zero_pages: u64,
    /// Of those, left out because the target has the same content already, of this page or of the other process's that
    /// shares it.
    pub same_pages: u64,
    /// Bytes of the pages sent with content, before compression.
    pub bytes_raw: u64,
    /// Bytes that went over the wire for all of them, headers included, before QUIC.
    pub bytes_wire: u64,
}

impl Sent {
    /// Both together.
    pub fn plus(self, other: Sent) -> Sent {
        Sent {
            pages: self.pages.saturating_add(other.pages),
            data_pages: self.data_pages.saturating_add(other.data_pages),
            zero_pages: self.zero_pages.saturating_add(other.zero_pages),
            same_pages: self.same_pages.saturating_add(other.same_pages),
            bytes_raw: self.bytes_raw.saturating_add(other.bytes_raw),
            bytes_wire: self.bytes_wire.saturating_add(other.bytes_wire),
        }
    }

    /// How many bytes of memory one byte on the wire carried; `None` if nothing was sent.
    pub fn compression_ratio(self) -> Option<f64> {
        (self.bytes_wire > 0 && self.bytes_raw > 0)
            .then(|| self.bytes_raw as f64 / self.bytes_wire as f64)
    }
}
