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
use super::rootfs_copy::RootfsCopyError;
use super::send::{FrameSink, PagesToSend, Progress, SendError};
use super::tracker::{Motion, SpaceScan, TrackError, TrackerKind};
use crate::fault;
use crate::memory::SpaceId;
use crate::migration::convergence::{
    Assessment, Decision, FreezeReason, Limits, RoundMeasured, assess, fixed_downtime,
};
use crate::migration::event::Event;
use crate::migration::handoff::SourceEvent;
use crate::migration::mode::{Mode, Switch};
use crate::migration::report::{Prediction, RoundReport, Tracker as TrackerName};
use crate::wire::message::RoundEnd;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::thread;
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
        let mut to_send = self.scan()?;
        self.announce_tracking(&to_send);
        let processes = u32::try_from(to_send.len()).unwrap_or(u32::MAX);
        let fixed = fixed_downtime(processes, count(&to_send));
        let mut prepared = false;
        loop {
            let round = u32::try_from(done.len())
                .unwrap_or(u32::MAX)
                .saturating_add(1);
            let start = Instant::now();
            let sent = self.send_round(round, &to_send, |handover| {
                if !std::mem::replace(&mut prepared, true) {
                    prepare(handover).map_err(RoundsError::Prepare)?;
                }
                Ok(())
            })?;
            to_send = self.scan()?;
            let pages_dirty = count(&to_send);
            measured.push(RoundMeasured {
                pages_sent: sent.pages,
                zero_pages: sent.zero_pages + sent.same_pages,
                bytes_sent: sent.bytes_wire,
                duration: start.elapsed(),
                pages_dirty,
            });
            let Assessment {
                decision,
                expected_downtime,
                throughput,
                dirty_rate,
            } = assess(&measured, self.began.elapsed(), &limits, fixed);
            let report = RoundReport {
                round,
                sent,
                duration: start.elapsed(),
                pages_dirty,
                dirty_rate,
                throughput,
                expected_downtime: Some(expected_downtime),
            };
            (self.emit)(Event::RoundFinished(report.clone()));
            done.push(report);
            fault::before("source", format_args!("Round"));
            let Decision::Freeze(why) = decision else {
                continue;
            };
            if !self.is_ready()? {
                // Nothing is gained by sending the same pages again and again meanwhile.
                self.wait_until_ready()?;
                for scan in self.scan()? {
                    merge(&mut to_send, scan);
                }
                continue;
            }
            self.unsent = to_send
                .into_iter()
                .map(|pages| (pages.space, pages.pages))
                .collect();
            return Ok(RoundsDone {
                rounds: done,
                why,
                switch: self.switch_at(expected_downtime),
                predicted: self.predict(expected_downtime),
            });
        }
    }

    fn switch_at(&self, expected_downtime: Duration) -> Switch {
        match self.mode {
            Mode::PreCopy => Switch::PreCopy,
            Mode::Auto if expected_downtime <= self.plan.downtime_limit => Switch::PreCopy,
            Mode::Auto | Mode::Hybrid | Mode::PostCopy => Switch::PostCopy,
        }
    }

    fn predict(&self, downtime: Duration) -> Prediction {
        Prediction {
            downtime,
            total: self.began.elapsed().saturating_add(downtime),
            last_page: None,
        }
    }

    /// No rounds: the container is frozen as soon as everything is ready. In post-copy every page is owed; otherwise there
    /// is no tracker, and CRIU's dump will have every page.
    pub fn no_rounds(
        &mut self,
        prepare: &mut dyn FnMut(&mut Self) -> Result<(), String>,
    ) -> Result<RoundsDone, RoundsError> {
        prepare(self).map_err(RoundsError::Prepare)?;
        self.wait_until_ready()?;
        Ok(RoundsDone {
            rounds: Vec::new(),
            why: FreezeReason::NoRounds,
            switch: match self.mode {
                Mode::PostCopy => Switch::PostCopy,
                Mode::PreCopy | Mode::Hybrid | Mode::Auto => Switch::PreCopy,
            },
            predicted: self.predict(fixed_downtime(1, 0)),
        })
    }

    fn scan(&mut self) -> Result<Vec<PagesToSend>, RoundsError> {
        let tasks = self.container.tasks().map_err(RoundsError::Tasks)?;
        let Some(tracker) = &mut self.tracker else {
            return Ok(Vec::new());
        };
        let scans = tracker.scan(&tasks, Motion::Running)?;
        self.mapped_files = mapped_files(&scans);
        Ok(scans.into_iter().map(pages_of).collect())
    }

    fn announce_tracking(&self, to_send: &[PagesToSend]) {
        let Some(tracker) = &self.tracker else { return };
        (self.emit)(Event::Tracking {
            tracker: name_of(tracker.kind()),
            processes: u32::try_from(to_send.len()).unwrap_or(u32::MAX),
            pages: count(to_send),
        });
    }

    /// Sends a round and waits until all of it is at the target; `beside` runs while pages are sent.
    fn send_round(
        &mut self,
        round: u32,
        to_send: &[PagesToSend],
        beside: impl FnOnce(&mut Self) -> Result<(), RoundsError>,
    ) -> Result<crate::migration::report::Sent, RoundsError> {
        let pages = count(to_send);
        (self.emit)(Event::RoundStarted { round, pages });
        let progress = Progress::default();
        // The sender works on a thread of its own, so the handover can be worked on meanwhile.
        let mut sender = self
            .sender
            .take()
            .ok_or_else(|| RoundsError::Prepare("the page streams are gone".into()))?;
        let (sent, interrupted) = thread::scope(|scope| {
            let sending = scope.spawn(|| sender.send(to_send, &progress));
            let mut interrupted = beside(self).err();
            let mut told = Instant::now();
            while !sending.is_finished() && interrupted.is_none() {
                interrupted = self
                    .interruption(Duration::from_millis(2))
                    .map(RoundsError::Interrupted);
                if told.elapsed() > PROGRESS_PERIOD {
                    told = Instant::now();
                    (self.emit)(Event::RoundProgress {
                        round,
                        pages,
                        pages_sent: progress.pages.load(Ordering::Relaxed),
                        bytes_wire: progress.bytes_wire.load(Ordering::Relaxed),
                    });
                }
            }
            if interrupted.is_some() {
                progress.cancelled.store(true, Ordering::Relaxed);
            }
            let sent = sending
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (sent, interrupted)
        });
        let frames_per_stream = sender.frames();
        self.sender = Some(sender);
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
        while self.rounds_received() < round {
            self.check(Duration::from_millis(2))?;
        }
        Ok(sent)
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

/// The tracker, as reports call it.
pub(super) fn name_of(kind: TrackerKind) -> TrackerName {
    match kind {
        TrackerKind::UffdWp => TrackerName::UffdWp,
        TrackerKind::SoftDirty => TrackerName::SoftDirty,
    }
}

fn pages_of(scan: SpaceScan) -> PagesToSend {
    if let Some(why) = &scan.untracked {
        tracing::debug!(
            vpid = scan.vpid,
            ?why,
            "not tracked yet: all its pages count as dirty"
        );
    }
    PagesToSend {
        space: scan.space,
        pid: scan.pid,
        pages: scan.dirty,
    }
}

fn count(to_send: &[PagesToSend]) -> u64 {
    to_send.iter().map(|pages| pages.pages.pages()).sum()
}

/// Adds what a later scan found to what an earlier one found and nobody sent.
fn merge(to_send: &mut Vec<PagesToSend>, later: PagesToSend) {
    let mut by_space: BTreeMap<SpaceId, &mut PagesToSend> = to_send
        .iter_mut()
        .map(|pages| (pages.space, pages))
        .collect();
    match by_space.get_mut(&later.space) {
        Some(earlier) => {
            earlier.pid = later.pid;
            earlier.pages.extend(&later.pages);
        }
        None => to_send.push(later),
    }
}
