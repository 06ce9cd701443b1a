//! The rounds: memory crosses while the container works.
//!
//! ```text
//!  scan ─▶ round 1: all pages ─▶ scan ─▶ round 2: what was dirtied meanwhile ─▶ … ─▶ freeze
//!             │
//!             └ beside it: the root filesystem is copied, CRIU and the target's restore start up and wait
//! ```
//!
//! Each scan re-arms before its pages are read, so a page written while it is read is dirty again in the next one.

use super::handover::{Handover, mapped_files};
use super::link::Link;
use super::preflight::resident_bytes;
use super::rootfs_copy::RootfsCopyError;
use super::send::{FrameSink, PagesToSend, Progress, SendError, Sender};
use super::tracker::{Motion, SpaceScan, TrackError, TrackerKind};
use crate::fault;
use crate::memory::{PAGE_SIZE, PageSet, SpaceId};
use crate::migration::convergence::{
    FreezeReason, IDLE_PAGES, Limits, RoundMeasured, fixed_downtime, throughput, whole,
};
use crate::migration::decision::{Course, Seen, decide, expect_post_copy};
use crate::migration::event::Event;
use crate::migration::handoff::SourceEvent;
use crate::migration::ledger::{self, Ledger, Pages};
use crate::migration::mode::{Mode, Switch};
use crate::migration::report::{Prediction, RoundReport, Tracker as TrackerName};
use crate::wire::message::RoundEnd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How often a round tells how far it is.
const PROGRESS_PERIOD: Duration = Duration::from_millis(200);

/// What the rounds came to.
#[derive(Debug)]
pub struct RoundsDone {
    /// Each round, in order.
    pub rounds: Vec<RoundReport>,
    /// Why they ended.
    pub why: FreezeReason,
    /// What becomes of the pages still to be sent.
    pub switch: Switch,
    /// What to expect of that.
    pub predicted: Prediction,
}

/// Why the rounds did not end by decision.
#[derive(Debug, Error)]
pub enum RoundsError {
    /// Something from outside ended them; the handover knows the reason.
    #[error("the rounds were interrupted: {0:?}")]
    Interrupted(SourceEvent),
    /// Dirty pages could not be found.
    #[error("tracking memory: {0}")]
    Track(#[from] TrackError),
    /// The tasks could not be listed.
    #[error("listing the container's tasks: {0}")]
    Tasks(#[source] std::io::Error),
    /// Pages could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The target could not be told.
    #[error(transparent)]
    Link(#[from] super::link::LinkError),
    /// The root filesystem could not be copied.
    #[error(transparent)]
    Rootfs(#[from] RootfsCopyError),
    /// The dump or the restore could not be started.
    #[error("{0}")]
    Prepare(String),
}

impl<S: FrameSink> Handover<'_, S> {
    /// Sends rounds until a freeze is due. `prepare` starts what has to wait for the freeze; it runs once, beside the
    /// first round.
    pub fn rounds(
        &mut self,
        prepare: &mut dyn FnMut(&mut Self) -> Result<(), String>,
    ) -> Result<RoundsDone, RoundsError> {
        let mut done: Vec<RoundReport> = Vec::new();
        let mut measured: Vec<RoundMeasured> = Vec::new();
        let limits = Limits {
            downtime: self.plan.downtime_limit,
            max_rounds: self.plan.max_rounds,
            timeout: self.plan.timeout,
        };
        let first = self.scan()?;
        self.announce_tracking(&first);
        let mut looked = Instant::now();
        let memory = ledger::count(&first);
        // Once, while nothing else is under way: behind a round's pages it would be longer.
        let round_trip = self.round_trip();
        let fixed_downtime = fixed_downtime_over(first.len(), memory, round_trip);
        let mut ledger = Ledger::new(first);
        let mut prepared = false;
        // Rounds before the container was slowed say nothing of those after it.
        let mut since_slowed = 0;
        self.may_slow();
        loop {
            let round = u32::try_from(done.len())
                .unwrap_or(u32::MAX)
                .saturating_add(1);
            let pages_before = ledger.lacking();
            // The first round's pages went out while other things were prepared, which says little of the link.
            let known = measured.get(since_slowed.max(1)..).and_then(throughput);
            let ledger::Round { pages, sample } = ledger.next_round(known);
            let to_send = self.to_send(pages);
            let start = Instant::now();
            let (sent, sending) = self.send_round(round, &to_send, |handover| {
                if !std::mem::replace(&mut prepared, true) {
                    prepare(handover).map_err(RoundsError::Prepare)?;
                }
                Ok(())
            })?;
            let found = ledger.scanned(self.scan()?);
            let now = Instant::now();
            measured.push(RoundMeasured {
                pages_sent: sent.pages,
                zero_pages: sent.zero_pages + sent.same_pages,
                bytes_sent: sent.bytes_wire,
                duration: now - std::mem::replace(&mut looked, now),
                sending,
                pages_dirty: found.dirty,
                pages_again: found.again,
                pages_before,
                pages_left: found.lacking,
                sample,
            });
            let whole_before = u32::try_from(whole(&measured[..since_slowed])).unwrap_or(u32::MAX);
            let seen = Seen {
                rounds: &measured[since_slowed..],
                memory,
                elapsed: self.began.elapsed(),
                fixed_downtime,
                round_trip,
            };
            let limits = Limits {
                max_rounds: limits.max_rounds.saturating_sub(whole_before),
                ..limits
            };
            let verdict = decide(self.mode, &seen, &limits);
            tracing::debug!(measured = ?measured.last(), memory, ?verdict, "decided");
            let report = RoundReport {
                round,
                sent,
                duration: start.elapsed(),
                pages_dirty: found.dirty,
                pages_left: found.lacking,
                pages_held: found.held,
                dirty_rate: verdict.assessment.dirty_rate,
                throughput: verdict.assessment.throughput,
                expected_downtime: Some(verdict.assessment.expected_downtime),
            };
            (self.emit)(Event::RoundFinished(report.clone()));
            done.push(report);
            fault::before("source", format_args!("Round"));
            let (why, switch) = match verdict.course {
                Course::Continue => continue,
                Course::Freeze { why, switch } => (why, switch),
                Course::GiveUp => {
                    self.because(format!(
                        "not done within {:?} (--timeout): a freeze now would cost {:.1?} of downtime, and the limit is {:?}",
                        limits.timeout, verdict.predicted.downtime, limits.downtime
                    ));
                    return Err(RoundsError::Interrupted(SourceEvent::Timeout));
                }
            };
            if self.slow_instead(&verdict, &limits) {
                since_slowed = measured.len();
                continue;
            }
            let mut predicted = verdict.predicted;
            if !self.is_ready()? {
                // Nothing is gained by sending the same pages again and again meanwhile.
                self.wait_until_ready()?;
                ledger.found(self.scan()?);
                looked = Instant::now();
                // What is owed need not be few. And where no more is left than before, one more round would help no more than
                // it would have then.
                if switch == Switch::PreCopy && ledger.lacking() > found.lacking + IDLE_PAGES {
                    continue;
                }
                if switch == Switch::PostCopy {
                    predicted = expect_post_copy(
                        self.began.elapsed(),
                        fixed_downtime,
                        ledger.lacking(),
                        verdict.assessment.throughput,
                    );
                }
            }
            self.unsent = ledger.into_lacking();
            return Ok(RoundsDone {
                rounds: done,
                why,
                switch,
                predicted,
            });
        }
    }

    fn round_trip(&self) -> Duration {
        self.link.as_ref().map_or(Duration::ZERO, Link::round_trip)
    }

    /// No rounds: the container is frozen as soon as everything is ready. In post-copy every page is owed; otherwise there
    /// is no tracker, and CRIU's dump will have every page.
    pub fn no_rounds(
        &mut self,
        prepare: &mut dyn FnMut(&mut Self) -> Result<(), String>,
    ) -> Result<RoundsDone, RoundsError> {
        prepare(self).map_err(RoundsError::Prepare)?;
        self.wait_until_ready()?;
        let tasks = self.container.tasks().map_err(RoundsError::Tasks)?;
        let memory: u64 = tasks.iter().map(|task| resident_bytes(task.pid)).sum();
        let pages = memory / PAGE_SIZE;
        // Nothing has been measured. A limit is at least an upper end.
        let limit = self.plan.bandwidth_limit;
        let predicted = expect_post_copy(
            self.began.elapsed(),
            fixed_downtime_over(tasks.len(), pages, self.round_trip()),
            pages,
            limit.map(|bytes| bytes.get() as f64 / PAGE_SIZE as f64),
        );
        Ok(RoundsDone {
            rounds: Vec::new(),
            why: FreezeReason::NoRounds,
            switch: match self.mode {
                Mode::PostCopy => Switch::PostCopy,
                Mode::PreCopy | Mode::Hybrid | Mode::Auto => Switch::PreCopy,
            },
            predicted,
        })
    }

    /// Looks at every task. What is found of a space is read through the process that the latest scan names.
    fn scan(&mut self) -> Result<Pages, RoundsError> {
        let tasks = self.container.tasks().map_err(RoundsError::Tasks)?;
        let Some(tracker) = &mut self.tracker else {
            return Ok(Pages::new());
        };
        let scans = tracker.scan(&tasks, Motion::Running)?;
        self.mapped_files = mapped_files(&scans);
        self.readers = scans.iter().map(|scan| (scan.space, scan.pid)).collect();
        Ok(scans.into_iter().map(pages_of).collect())
    }

    fn to_send(&self, pages: Pages) -> Vec<PagesToSend> {
        let with_reader = |(space, pages)| {
            let pid = *self.readers.get(&space)?;
            Some(PagesToSend { space, pid, pages })
        };
        pages.into_iter().filter_map(with_reader).collect()
    }

    fn announce_tracking(&self, found: &Pages) {
        let Some(tracker) = &self.tracker else { return };
        (self.emit)(Event::Tracking {
            tracker: name_of(tracker.kind()),
            processes: u32::try_from(found.len()).unwrap_or(u32::MAX),
            pages: ledger::count(found),
        });
    }

    /// Sends a round and waits until all of it is at the target; `beside` runs while pages are sent. Also says how long the
    /// pages took, which may be less than `beside` did.
    fn send_round(
        &mut self,
        round: u32,
        to_send: &[PagesToSend],
        beside: impl FnOnce(&mut Self) -> Result<(), RoundsError>,
    ) -> Result<(crate::migration::report::Sent, Duration), RoundsError> {
        let pages = to_send.iter().map(|part| part.pages.pages()).sum();
        (self.emit)(Event::RoundStarted { round, pages });
        let progress = Progress::default();
        let mut beside = Some(beside);
        let mut interrupted = None;
        let mut told = Instant::now();
        let sending = |sender: &mut Sender<S>| {
            let start = Instant::now();
            (sender.send(to_send, &progress), start.elapsed())
        };
        let done = self.with_sender(&progress, sending, |handover| {
            if let Some(beside) = beside.take() {
                interrupted = beside(handover).err();
            }
            if interrupted.is_none() {
                interrupted = handover
                    .interruption(Duration::from_millis(2))
                    .map(RoundsError::Interrupted);
            }
            if told.elapsed() > PROGRESS_PERIOD {
                told = Instant::now();
                (handover.emit)(Event::RoundProgress {
                    round,
                    pages,
                    pages_sent: progress.pages.load(Ordering::Relaxed),
                    bytes_wire: progress.bytes_wire.load(Ordering::Relaxed),
                });
            }
            interrupted.is_some()
        });
        let (sent, took) = done.map_err(|error| RoundsError::Prepare(error.to_string()))?;
        // What was sent before anybody could look.
        if let Some(beside) = beside {
            interrupted = beside(self).err();
        }
        let frames_per_stream = self.sender.as_ref().map_or_else(Vec::new, Sender::frames);
        if let Some(interrupted) = interrupted {
            return Err(interrupted);
        }
        let sent = sent?;
        let round_end = RoundEnd {
            round,
            pages: sent.pages,
            frames_per_stream,
        };
        if let Some(link) = &mut self.link {
            link.say(round_end)?;
        }
        let said = Instant::now();
        while self.rounds_received() < round {
            self.check(Duration::from_millis(2))?;
        }
        Ok((sent, took + said.elapsed()))
    }

    /// Whether everything that must be done before a freeze is.
    fn is_ready(&mut self) -> Result<bool, RoundsError> {
        if let Some(rootfs) = &mut self.rootfs
            && let Some(pass) = rootfs.poll_pass()
        {
            let (summary, duration) = pass?;
            let event = rootfs.event(summary, false, duration);
            let another = rootfs.passes() < LIVE_PASSES;
            if another {
                rootfs.begin_pass(self.mapped_files.clone())?;
            }
            (self.emit)(event);
        }
        let rootfs_ready = self.rootfs.as_ref().is_none_or(|rootfs| !rootfs.is_busy());
        if rootfs_ready && !std::mem::replace(&mut self.prestarted, true) {
            self.prestart_target()?;
        }
        Ok(rootfs_ready && self.dump_is_ready())
    }

    fn wait_until_ready(&mut self) -> Result<(), RoundsError> {
        while !self.is_ready()? {
            self.check(Duration::from_millis(2))?;
        }
        Ok(())
    }

    fn check(&mut self, wait: Duration) -> Result<(), RoundsError> {
        match self.interruption(wait) {
            Some(event) => Err(RoundsError::Interrupted(event)),
            None => Ok(()),
        }
    }
}

/// Passes over the root filesystem while the container runs: the whole tree, and once what changed during that.
const LIVE_PASSES: u32 = 2;

/// What a freeze costs without a delta: also the answers to the images and to commit.
fn fixed_downtime_over(processes: usize, pages: u64, round_trip: Duration) -> Duration {
    fixed_downtime(u32::try_from(processes).unwrap_or(u32::MAX), pages)
        .saturating_add(round_trip.saturating_mul(2))
}

/// The tracker, as reports call it.
pub(super) fn name_of(kind: TrackerKind) -> TrackerName {
    match kind {
        TrackerKind::UffdWp => TrackerName::UffdWp,
        TrackerKind::SoftDirty => TrackerName::SoftDirty,
    }
}

fn pages_of(scan: SpaceScan) -> (SpaceId, PageSet) {
    if let Some(why) = &scan.untracked {
        tracing::debug!(
            vpid = scan.vpid,
            ?why,
            "not tracked yet: all its pages count as dirty"
        );
    }
    (scan.space, scan.dirty)
}
