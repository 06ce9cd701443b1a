//! The handover at the source: the table of [`crate::migration::handoff`] carried out.
//!
//! Events come from the dump, from the target and from our own steps; the table says what to do; each action here does
//! one thing and may lead to the next event. Nothing else in the source decides who may run the container.
//!
//! ```text
//!   signals ─▶ event ─▶ Course::on ─▶ actions ─▶ perform ─┐
//!                ▲                                        │
//!                └──────────── answers ◀──────────────────┘
//! ```

mod ending;
mod frozen;
mod records;
mod sending;
mod serving;
mod window;

pub use window::{FROZEN_LIMIT, Window};

use super::dump::{Dump, DumpSignal, PreparedDump};
use super::link::{Link, LinkError};
use super::plan::Plan;
use super::rootfs_copy::RootfsCopy;
use super::send::{FrameSink, PagesToSend, Sender};
use super::serve::{ServeProgress, Serving};
use super::settle;
use super::slowing::Slowing;
use super::tracker::{SpaceScan, Tracker};
use super::watch::{Change, Watch};
use crate::criu::hook::WaitingHook;
use crate::criu::options::NetworkLock;
use crate::fault;
use crate::journal::Journal;
use crate::memory::{PageSet, SpaceId};
use crate::migration::event::Event;
use crate::migration::handoff::{Course, SourceAction, SourceEvent, SourceState};
use crate::migration::journal::{Leftover, Owing, ProcessName, Record};
use crate::migration::mode::{Mode, Switch};
use crate::migration::phase::{Mark, TargetTimes, Timeline};
use crate::migration::report::{DumpKind, RoundReport, StaysAs};
use crate::migration::{JournalId, MigrationId};
use crate::runtime::runc::{Container, Runc};
use crate::runtime::{Frozen, Task};
use crate::transport::TransportError;
use crate::wire::message::{self, Message};
use crate::wire::peer_error::PeerError;
use records::Records;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use window::Over;

/// How long the freezer may take: longer means a task in uninterruptible sleep.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a CRIU that should let go may take.
const CRIU_PATIENCE: Duration = Duration::from_secs(20);

/// How long the target is asked for an outcome before the question is left to `migrate recover`.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(30);

/// How long a target that was told to abort may take to say that it did.
const ABORT_PATIENCE: Duration = Duration::from_secs(10);

/// How long the target may take to take a message; its answer is another matter.
const SAY_PATIENCE: Duration = Duration::from_secs(10);

/// How long a record that nothing waits for may take.
const RECORD_PATIENCE: Duration = Duration::from_secs(10);

/// What reaches the handover from outside.
#[derive(Debug)]
pub enum Signal {
    /// The dump.
    Dump(DumpSignal),
    /// The target, or the end of the connection to it.
    Heard(Result<Message, TransportError>),
}

/// Everything the handover works on.
pub struct Handover<'a, S> {
    /// The migration.
    pub migration: MigrationId,
    /// As it was asked for.
    pub plan: &'a Plan,
    /// How memory gets to the target: as asked for, or what these hosts can do instead.
    pub mode: Mode,
    /// The runtime.
    pub runc: &'a Runc,
    /// The container.
    pub container: &'a Container,
    /// The source's journal of this migration.
    pub journal: Records,
    /// The connection to the target.
    pub link: Option<Link>,
    /// What its user does with the container.
    pub watch: Watch,
    /// What comes from outside.
    pub signals: Receiver<Signal>,
    /// Where pages go.
    ///
    /// It is taken out while a round is sent.
    pub sender: Option<Sender<S>>,
    /// What finds dirty pages; `None` where the dump has all of them.
    pub tracker: Option<Box<dyn Tracker>>,
    /// What copies the root filesystem; `None` where it is shared.
    pub rootfs: Option<RootfsCopy>,
    /// Where events go.
    pub emit: &'a dyn Fn(Event),
    /// When the migration began.
    pub began: Instant,
    /// The times of the handover.
    pub timeline: Timeline,
    /// Set when the user wants to stop.
    pub cancelled: &'a AtomicBool,
    /// Pages that the last scan of the rounds found dirty and that no round has sent.
    pub unsent: BTreeMap<SpaceId, PageSet>,
    /// The process each space can be read through, as of the last scan.
    pub readers: BTreeMap<SpaceId, i32>,
    /// The target was told to start its restore.
    pub prestarted: bool,
    /// What it was, or will be, told.
    pub prestart: message::Prestart,
    /// How the dump, once it begins, keeps packets still.
    pub network_lock: NetworkLock,
    /// What becomes of the pages that are still to be sent at the freeze; known when the rounds are over.
    pub switch: Switch,
    /// What slows the container while its rounds do not converge; never beyond them.
    pub slowing: Option<Slowing>,
    /// What share of its CPU time the container was left at the slowest, in per cent; `None` if it was not slowed.
    pub slowed: Option<u32>,
    /// The target's certificate: nobody else's word about the outcome counts.
    peer: String,
    window: Window<'a>,
    cancel_heard: bool,
    dump_at_gate: bool,
    rounds_received: u32,
    course: Course<SourceState>,
    queue: VecDeque<SourceEvent>,
    dump: Option<Dump>,
    hold: Option<WaitingHook>,
    frozen: Option<Frozen>,
    /// Somebody paused the container before it could be frozen: it is not for us to thaw.
    paused: bool,
    /// Processes that job control had stopped before the freeze.
    stopped: Vec<Task>,
    scans: Vec<SpaceScan>,
    /// Dirty pages that wait for the dump to say whether they can be owed.
    put_off: BTreeMap<SpaceId, PageSet>,
    owed: Vec<PagesToSend>,
    owing: Owing,
    server: Option<Serving>,
    /// The server has ended well: every owed page has arrived, and the target is about to say so.
    served: bool,
    progress: Option<Arc<ServeProgress>>,
    lost: Option<Instant>,
    committed_told: bool,
    serving_told: Option<Instant>,
    target_journal: Option<JournalId>,
    round: u32,
    delta: Option<RoundReport>,
    ended: Ended,
}

/// What is known at the end.
#[derive(Debug, Default)]
pub struct Ended {
    /// Why it did not go on; the first reason counts.
    pub reason: Option<String>,
    /// The state in which that happened.
    pub during: Option<SourceState>,
    /// As [`Handover::slowed`].
    pub slowed: Option<u32>,
    /// Bytes of the container's memory at the freeze.
    pub memory_bytes: u64,
    /// The pages sent while it was frozen.
    pub delta: Option<RoundReport>,
    /// What CRIU wrote.
    pub dump: Option<DumpKind>,
    /// When the target had the last page in its place.
    pub filled: Option<message::Filled>,
    /// Post-copy: from the release until the last owed page had arrived, on the target's clock.
    pub whole: Option<Duration>,
    /// Pages that were owed when the copy began to run.
    pub owed_pages: u64,
    /// Faults answered over the first connection.
    pub faults: u64,
    /// Bytes sent for owed pages over the first connection.
    pub bytes_owed: u64,
    /// What became of a container that did not move.
    pub stays: StaysAs,
    /// What stayed behind and why, if ending it was not clean.
    pub untidy: Option<String>,
    /// Why the container could not be seen to go on, though it should.
    pub stands_still: Option<String>,
}

impl<'a, S: FrameSink> Handover<'a, S> {
    /// A handover in its first state: rounds are being sent.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a migration, gathered once"
    )]
    pub fn new(
        migration: MigrationId,
        plan: &'a Plan,
        mode: Mode,
        runc: &'a Runc,
        container: &'a Container,
        watch: Watch,
        journal: Journal,
        link: Link,
        signals: Receiver<Signal>,
        sender: Sender<S>,
        tracker: Option<Box<dyn Tracker>>,
        rootfs: Option<RootfsCopy>,
        emit: &'a dyn Fn(Event),
        began: Instant,
        cancelled: &'a AtomicBool,
        prestart: message::Prestart,
        network_lock: NetworkLock,
    ) -> Handover<'a, S> {
        Handover {
            migration,
            plan,
            mode,
            runc,
            container,
            journal: Records::new(journal),
            peer: link.peer().fingerprint.to_string(),
            link: Some(link),
            watch,
            signals,
            sender: Some(sender),
            tracker,
            rootfs,
            emit,
            began,
            timeline: Timeline::default(),
            cancelled,
            unsent: BTreeMap::new(),
            readers: BTreeMap::new(),
            prestarted: false,
            prestart,
            network_lock,
            switch: Switch::PreCopy,
            slowing: None,
            slowed: None,
            window: Window::closed(cancelled),
            cancel_heard: false,
            dump_at_gate: false,
            rounds_received: 0,
            course: Course::start(),
            queue: VecDeque::new(),
            dump: None,
            hold: None,
            frozen: None,
            paused: false,
            stopped: Vec::new(),
            scans: Vec::new(),
            put_off: BTreeMap::new(),
            owed: Vec::new(),
            owing: Owing::default(),
            server: None,
            served: false,
            progress: None,
            lost: None,
            committed_told: false,
            serving_told: None,
            target_journal: None,
            round: 0,
            delta: None,
            ended: Ended::default(),
        }
    }

    /// Starts the runtime of a dump that is ready, and records its process for recovery.
    pub fn start_dump(&mut self, prepared: PreparedDump) -> Result<(), String> {
        let dump = prepared
            .start(self.runc, self.container)
            .map_err(|error| error.to_string())?;
        let pid = dump.pid().cast_signed();
        self.dump = Some(dump);
        let task = Task::read(pid).map_err(|error| error.to_string())?;
        let process = ProcessName {
            pid,
            start_time: task.map_or(0, |task| task.start_time),
        };
        let leftover = Leftover::Process {
            what: "runc checkpoint".into(),
            process,
        };
        self.journal
            .append(&Record::Leftover(leftover))
            .map_err(|error| error.to_string())
    }

    /// Tells the target to start its restore, which then waits for the images.
    pub fn prestart_target(&mut self) -> Result<(), LinkError> {
        match &mut self.link {
            Some(link) => link.say(self.prestart.clone()),
            // The end of the connection is among the signals.
            None => Ok(()),
        }
    }

    /// Whether CRIU has started up and waits for the freeze.
    pub fn dump_is_ready(&self) -> bool {
        self.dump_at_gate
    }

    /// The last round that is wholly at the target.
    pub fn rounds_received(&self) -> u32 {
        self.rounds_received
    }

    /// Waits a moment for what comes from outside during the rounds; `Some` if it ends them.
    pub fn interruption(&mut self, wait: Duration) -> Option<SourceEvent> {
        let mut signal = self.signals.recv_timeout(wait).ok();
        while let Some(arrived) = signal {
            if let Some(event) = self.event_of(arrived) {
                return Some(event);
            }
            signal = self.signals.try_recv().ok();
        }
        if let Some(event) = self.heard_cancel() {
            return Some(event);
        }
        if self.began.elapsed() > self.plan.timeout {
            self.because(format!(
                "not done within {:?} (--timeout)",
                self.plan.timeout
            ));
            return Some(SourceEvent::Timeout);
        }
        if let Err(change) = self.watch.look_now_and_then(self.slowing.is_some()) {
            return Some(self.changed(change));
        }
        self.dump_failed()
    }

    /// Its user did something with the container that ends the move.
    pub fn changed(&mut self, change: Change) -> SourceEvent {
        let (stays, event) = match &change {
            Change::Ended { .. } => (StaysAs::Ended, SourceEvent::ContainerExited),
            Change::Paused { .. } => (StaysAs::Paused, SourceEvent::LocalFailure),
            Change::Updated { .. } | Change::Visited { .. } => {
                (StaysAs::Running, SourceEvent::LocalFailure)
            }
        };
        if self.ended.reason.is_none() {
            tracing::info!(state = ?self.course.state(), %change, "the container is not as it was");
            self.ended.stays = stays;
            self.ended.reason = Some(change.to_string());
        }
        event
    }

    fn heard_cancel(&mut self) -> Option<SourceEvent> {
        if self.cancel_heard || !self.cancelled.load(Ordering::Relaxed) {
            return None;
        }
        self.cancel_heard = true;
        self.because("cancelled".into());
        Some(SourceEvent::UserCancelled)
    }

    /// The runtime that dumps has ended although nobody let it.
    fn dump_failed(&mut self) -> Option<SourceEvent> {
        let status = self.dump.as_mut()?.ended().ok()??;
        let words = self.dump.as_ref().map(Dump::last_words).unwrap_or_default();
        self.because_of_step(format!("CRIU's dump ended ({status}): {words}"));
        Some(SourceEvent::CriuFailed)
    }

    /// Gives the migration up before anything was frozen, for this reason.
    pub fn give_up(mut self, event: SourceEvent, reason: String) -> (SourceState, Ended, Timeline) {
        self.slowing = None;
        if !reason.is_empty() {
            self.because(reason);
        }
        self.queue.push_back(event);
        self.run_to_the_end()
    }

    /// Freezes, sends the rest or owes it, hands over: returns when the outcome is known, or nobody can tell.
    /// `expected` is the downtime that was announced.
    pub fn hand_over(
        mut self,
        round: u32,
        switch: Switch,
        expected: Duration,
    ) -> (SourceState, Ended, Timeline) {
        // At full speed again: a task that has used up its quota would keep the freezer, and then CRIU, waiting.
        self.slowing = None;
        self.round = round;
        self.switch = switch;
        self.window = self.window.open(window::limit(
            expected,
            self.plan.timeout,
            self.began.elapsed(),
            self.plan.downtime_limit,
        ));
        self.queue.push_back(SourceEvent::FreezeOrdered);
        self.run_to_the_end()
    }

    fn run_to_the_end(mut self) -> (SourceState, Ended, Timeline) {
        let mut unknown_since = None;
        loop {
            if let Some(action) = self.course.next_action() {
                if let Some(answer) = self.perform(action) {
                    self.take(answer);
                }
            } else if let Some(event) = self.queue.pop_front() {
                self.take(event);
            } else if self.course.state().is_settled()
                || self.course.state() == SourceState::Stranded
            {
                break;
            } else {
                let event = self.next_event();
                self.take(event);
            }
            if self.course.state() == SourceState::Unknown {
                let since = *unknown_since.get_or_insert_with(Instant::now);
                if since.elapsed() > fault::patience(UNKNOWN_PATIENCE) {
                    break;
                }
            }
            if self.course.state() == SourceState::Serving
                && self
                    .lost
                    .is_some_and(|lost| lost.elapsed() > self.plan.reconnect_timeout)
            {
                break;
            }
        }
        if matches!(
            self.course.state(),
            SourceState::Unknown | SourceState::Serving | SourceState::Stranded
        ) {
            // It stays as it is for whoever learns the truth: frozen, and held by a hook that reads the journal.
            if let Some(frozen) = self.frozen.take() {
                frozen.give_away();
            }
            std::mem::forget(self.hold.take());
        }
        if let Some(link) = self.link.take() {
            let why = match self.course.state() {
                SourceState::Committed | SourceState::Stranded => PeerError::Done,
                _ => PeerError::SourceAborted,
            };
            link.close(why);
        }
        self.ended.slowed = self.slowed;
        self.ended.delta = self.delta.take();
        if let Some(progress) = &self.progress {
            let served = progress.now();
            self.ended.faults = served.faults;
            self.ended.bytes_owed = served.pushed_bytes + served.answered_bytes;
        }
        (self.course.state(), self.ended, self.timeline)
    }

    fn take(&mut self, event: SourceEvent) {
        let before = self.course.state();
        match self.course.on(event) {
            Ok(ignored) => {
                let after = self.course.state();
                tracing::debug!(?before, ?event, ?after, ignored, "handover");
                if after == SourceState::RolledBack && before != after {
                    self.ended.during = Some(before);
                    self.ended
                        .reason
                        .get_or_insert_with(|| format!("{event:?}"));
                }
            }
            Err(impossible) => tracing::error!(%impossible, "the handover stays where it is"),
        }
    }

    fn next_event(&mut self) -> SourceEvent {
        loop {
            self.tell_serving();
            let signal = self.signals.recv_timeout(Duration::from_millis(5));
            match signal {
                Ok(signal) => {
                    if let Some(event) = self.event_of(signal) {
                        return event;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if let Some(event) = self.heard_cancel().or_else(|| self.service_failed()) {
                return event;
            }
            if matches!(
                self.course.state(),
                SourceState::Frozen | SourceState::Holding | SourceState::Prepared
            ) && let Some(event) = self.dump_failed()
            {
                return event;
            }
            if let Some(event) = self.stood_still_too_long() {
                return event;
            }
        }
    }

    fn stood_still_too_long(&mut self) -> Option<SourceEvent> {
        let state = self.course.state();
        match (self.window.over(), state) {
            (_, SourceState::Unknown | SourceState::Serving) => None,
            // The target's word is on its way, and the only thing that counts.
            (Some(_), SourceState::CommitSent) => {
                let since = self.timeline.at(Mark::CommitSent)?;
                let waited = self.began.elapsed().saturating_sub(since);
                (waited > window::FROZEN_LIMIT).then(|| {
                    self.because(format!("no answer to commit within {waited:?}"));
                    SourceEvent::Timeout
                })
            }
            (Some(Over::Late(limit)), _) => {
                self.because(format!(
                    "the container stood still for {limit:.1?}, longer than it may before the commit (in state {state:?})"
                ));
                Some(SourceEvent::Timeout)
            }
            (Some(Over::Cancelled) | None, _) => None,
        }
    }

    /// What a signal means; `None` if it only has to be kept.
    fn event_of(&mut self, signal: Signal) -> Option<SourceEvent> {
        match signal {
            Signal::Dump(DumpSignal::AtGate) => {
                self.dump_at_gate = true;
                None
            }
            Signal::Dump(DumpSignal::Held(hook)) => {
                self.hold = Some(hook);
                self.hold_reached()
            }
            Signal::Dump(DumpSignal::HookGone) => {
                if self.course.state().is_settled() {
                    return None;
                }
                self.hold = None;
                self.because("the hook that held the dump is gone".into());
                Some(SourceEvent::HookLost)
            }
            Signal::Heard(Err(error)) => {
                // The connection is of no use any more; a question later makes a new one.
                self.link = None;
                if self.course.state().is_settled() {
                    return None;
                }
                self.because(error.to_string());
                Some(SourceEvent::PeerLost)
            }
            Signal::Heard(Ok(message)) => self.event_of_message(message),
        }
    }

    fn event_of_message(&mut self, message: Message) -> Option<SourceEvent> {
        match message {
            Message::RoundReceived(received) => {
                self.rounds_received = self.rounds_received.max(received.round);
                None
            }
            Message::Filled(filled) => {
                self.ended.filled = Some(filled);
                None
            }
            Message::Prepared(prepared) => {
                self.target_journal = Some(prepared.journal);
                self.mark(Mark::Prepared);
                let restore = Duration::from_micros(prepared.compose_us + prepared.restore_us);
                self.timeline.set_target_times(TargetTimes {
                    restore,
                    ..TargetTimes::default()
                });
                (self.emit)(Event::Prepared {
                    restore,
                    fill: Duration::ZERO,
                });
                Some(SourceEvent::TargetPrepared)
            }
            Message::Committed(committed) => {
                self.mark(Mark::Committed);
                let mut times = self.timeline.target_times();
                times.resume = Duration::from_micros(committed.resume_us);
                self.timeline.set_target_times(times);
                Some(SourceEvent::TargetSaysServing)
            }
            Message::Whole(whole) => {
                self.heard_whole(whole);
                None
            }
            Message::Outcome(outcome) if Some(outcome.journal) == self.target_journal => {
                self.heard_outcome(outcome.fate)
            }
            Message::RolledBack(said) => {
                self.because(format!(
                    "the target rolled back: {}: {}",
                    said.code, said.text
                ));
                Some(SourceEvent::TargetSaysRolledBack)
            }
            unexpected => {
                self.because(format!("the target said {} out of turn", unexpected.name()));
                Some(SourceEvent::PeerRefused)
            }
        }
    }

    fn perform(&mut self, action: SourceAction) -> Option<SourceEvent> {
        fault::before("source", action);
        match action {
            SourceAction::FreezeContainer => self.freeze(),
            // It was started before the freeze and waits at its gate, which the delta's scan opens.
            SourceAction::DumpSkeleton => None,
            SourceAction::SendDelta => self.attempt(Self::send_delta),
            SourceAction::FreezeAgain => self.attempt(Self::freeze_again),
            SourceAction::SendImages => self.attempt(Self::send_images),
            SourceAction::ConfirmHold => Some(self.confirm_hold()),
            SourceAction::RecordDeciding => {
                let target_journal = self.target_journal?;
                let owing = self.owing.clone();
                Some(self.record(&Record::Deciding {
                    target_journal,
                    owing,
                }))
            }
            SourceAction::SendCommit => self.send_commit(),
            SourceAction::AskTarget => Some(self.ask_target()),
            SourceAction::RecordServing => {
                self.tell_committed();
                self.note_record(&Record::Serving)
            }
            SourceAction::ServePages => self.serve_pages(),
            SourceAction::RecordCommitted => {
                self.tell_committed();
                self.note_record(&Record::Committed)
            }
            SourceAction::DestroyFrozenCopy => {
                self.destroy_frozen_copy();
                None
            }
            SourceAction::ResumeContainer => {
                self.resume_container();
                None
            }
            SourceAction::AbortTarget => {
                self.abort_target();
                None
            }
            SourceAction::RecordRolledBack => self.note_record(&Record::RolledBack),
            SourceAction::RecordClosed => self.note_record(&Record::Closed),
        }
    }

    /// Once, however the target's word came and whatever it lacked.
    fn tell_committed(&mut self) {
        if !std::mem::replace(&mut self.committed_told, true) {
            let downtime = self.timeline.downtime(self.began.elapsed());
            let downtime = downtime.map_or(Duration::ZERO, |downtime| downtime.total);
            (self.emit)(Event::Committed { downtime });
        }
    }

    fn record(&mut self, record: &Record) -> SourceEvent {
        match self.journal.append_within(record, &self.window) {
            Ok(()) => SourceEvent::RecordWritten,
            Err(error) => {
                self.because(error.to_string());
                SourceEvent::RecordFailed
            }
        }
    }

    /// A record after the outcome: nothing waits for it, recovery can do without.
    fn note_record(&mut self, record: &Record) -> Option<SourceEvent> {
        match self
            .journal
            .append_within(record, &in_time(RECORD_PATIENCE))
        {
            Ok(()) => None,
            Err(error) => {
                tracing::warn!(%error, "the outcome is not on record here");
                Some(SourceEvent::RecordFailed)
            }
        }
    }

    fn send_commit(&mut self) -> Option<SourceEvent> {
        self.mark(Mark::CommitSent);
        (self.emit)(Event::CommitSent);
        let said = match &mut self.link {
            Some(link) => link
                .say_within(message::Commit {}, &in_time(SAY_PATIENCE))
                .map_err(|error| error.to_string()),
            None => Err("the connection to the target is gone".into()),
        };
        said.err().map(|reason| {
            self.because(reason);
            SourceEvent::PeerLost
        })
    }

    fn ask_target(&mut self) -> SourceEvent {
        self.link = None;
        let Some(target_journal) = self.target_journal else {
            return SourceEvent::TargetUnreachable;
        };
        std::thread::sleep(settle::PAUSE);
        let question = settle::Question {
            state_dir: &self.plan.state_dir,
            target: &self.plan.target,
            peer: &self.peer,
            migration: self.migration,
            target_journal,
        };
        let (event, reason) = question.ask();
        if matches!(
            event,
            SourceEvent::TargetSaysComplete | SourceEvent::TargetSaysServing
        ) {
            self.mark(Mark::Committed);
        }
        self.because(reason);
        self.if_lost(event)
    }

    /// Does a step whose failure rolls back.
    fn attempt(
        &mut self,
        step: impl FnOnce(&mut Self) -> Result<(), String>,
    ) -> Option<SourceEvent> {
        let reason = step(self).err()?;
        tracing::debug!(%reason, "a step failed");
        // What failed because it was given up is not the reason for giving up.
        let wanted = self.heard_cancel().or_else(|| self.stood_still_too_long());
        Some(wanted.unwrap_or_else(|| {
            self.because_of_step(reason);
            SourceEvent::LocalFailure
        }))
    }

    pub(super) fn because(&mut self, reason: String) {
        tracing::info!(state = ?self.course.state(), %reason, "a step failed");
        if self.ended.reason.is_some() {
            return;
        }
        // What a step notices of a container that was killed says nothing to the one who killed it.
        match self.watch.alive() {
            Err(change) if self.course.state().can_cancel() => drop(self.changed(change)),
            _ => self.ended.reason = Some(reason),
        }
    }

    /// A step that looks into the container failed: a visitor in it is the likely cause, whatever the step says.
    fn because_of_step(&mut self, reason: String) {
        match self.watch.cause() {
            Some(change) if self.course.state().can_cancel() => {
                tracing::info!(%reason, "a step failed");
                self.changed(change);
            }
            _ => self.because(reason),
        }
    }

    fn mark(&mut self, mark: Mark) {
        self.mark_at(mark, self.began.elapsed());
    }

    fn mark_at(&mut self, mark: Mark, at: Duration) {
        if let Err(error) = self.timeline.record(mark, at) {
            tracing::error!(%error, "the report's times are incomplete");
        }
    }
}

/// A wait after the container has been given back, which nobody can cancel and only time ends.
fn in_time(patience: Duration) -> Window<'static> {
    static NEVER: AtomicBool = AtomicBool::new(false);
    Window::closed(&NEVER).open(patience)
}
