//! A container that arrives: the target's side of one migration.
//!
//! ```text
//!  accepted ─▶ pages, files, root filesystem come in
//!  prestart ─▶ pager and runc restore start up, CRIU waits for its inventory
//!  manifest ─▶ everything is there? compose ─▶ inventory ─▶ CRIU restores
//!  hook     ─▶ held before its first instruction ─▶ journal: prepared ─▶ "prepared"
//!  commit   ─▶ journal: committed ─▶ hook lets go ─▶ it runs ─▶ journal: released ─▶ "committed"
//!           ─▶ the pager fills what is left ─▶ "filled" ─▶ files to disk ─▶ journal: complete ─▶ outcome "complete"
//!           ─▶ the pager is lost ─▶ the copy is killed ─▶ journal: lost ─▶ outcome "lost"
//! ```
//!
//! Who may run the container is decided by the table of [`crate::migration::handoff`] alone; this file carries it out.

mod copy;
mod owed;

use super::owing::Owing;
use super::page_store::{PageStore, PageStoreLimits};
use super::pager::{Life, PagerEvent, PagerHandle, PagerHandleError};
use super::receive::Receiver;
use super::remains::{Copy, Made};
use super::restore::{INVENTORY, Restore};
use super::rootfs::{Limits, RootfsTarget, sync_files};
use super::shared::Proven;
use crate::criu::binary::Criu;
use crate::criu::hook::{HookServer, WaitingHook};
use crate::criu::kernel_cache::KernelCache;
use crate::fault;
use crate::journal::{Journal, JournalDir, JournalName};
use crate::migration::event::Side;
use crate::migration::handoff::{Course, TargetAction, TargetEvent, TargetState};
use crate::migration::journal::{Leftover, Record, TargetOpened};
use crate::migration::{ContainerId, JournalId};
use crate::runtime::home::Home;
use crate::runtime::instance::inode_of;
use crate::runtime::lock::ContainerLock;
use crate::runtime::runc::Runc;
use crate::transport::{BlockingStream, Connection, ControlSender, TransportError, TwoWay};
use crate::wire::message::{
    self, Begin, Fate, MOST_SPACES, Manifest, Message, Requirements, RootfsMode,
};
use crate::wire::peer_error::PeerError;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Signals, Sender};
use std::thread;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// How long a prepared copy waits for a source it lost.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(30);

/// How long nothing of announced pages and files may arrive until they are given up.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(60);

/// How long CRIU may take to restore, and to let go.
const RESTORE_PATIENCE: Duration = Duration::from_secs(60);

/// How long the pager may take for a step.
const PAGER_PATIENCE: Duration = Duration::from_secs(20);

/// How long a source that came on another connection may take to hear the outcome.
const END_GRACE: Duration = Duration::from_secs(5);

/// Between two attempts to remove what does not go, or to write what cannot be written.
const DISCARD_PAUSE: Duration = Duration::from_millis(500);

/// How the agent is set up.
#[derive(Clone, Debug)]
pub struct Host {
    /// Journals, identity, containers and working files.
    pub state_dir: PathBuf,
    /// The runtime.
    pub runc: Runc,
    /// CRIU.
    pub criu: Criu,
    /// CRIU's kernel cache.
    pub cache: KernelCache,
    /// The `migrate` program, which hooks and pager are started from.
    pub program: PathBuf,
    /// Whether CRIU can restore through userfaultfd here.
    pub lazy: bool,
}

/// What reaches an arrival from outside.
#[derive(Debug)]
pub enum Signal {
    /// The source, or the end of the connection to it.
    Heard {
        /// On which connection: 0 is the first. What comes late from one that was replaced is of no interest.
        link: u32,
        /// What was said.
        said: Result<Message, TransportError>,
    },
    /// The source is back on another connection and has what the copy is owed.
    Resume(Resumption),
    /// The agent wants to stop. A copy whose source is away is left to its pager, and to the next agent.
    Leave,
    /// CRIU holds the restored copy.
    Hook(WaitingHook),
    /// A hook that was held is gone without an answer.
    HookGone,
    /// The root filesystem's stream is done, or why it failed.
    Rootfs(Result<(), String>),
    /// The files are on disk, or why not.
    Synced(Result<(), String>),
    /// The source asks on another connection; the answer goes here.
    Query(Sender<Fate>),
}

/// A connection that takes the place of a lost one.
pub struct Resumption {
    /// The connection.
    pub connection: Connection,
    /// Where the answer goes, and all that is said later.
    pub control: ControlSender,
    /// Reads what the source says there, and sends it on as coming from the link of this number.
    pub listen: Box<dyn FnOnce(u32) + Send>,
}

impl std::fmt::Debug for Resumption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Resumption by {}", self.connection.peer().name)
    }
}

/// One arrival.
pub struct Arrival<'a> {
    host: &'a Host,
    container: ContainerId,
    /// What the source said it needs; `None` for a copy that was taken over when it ran.
    requirements: Option<&'a Requirements>,
    journal: Journal,
    journal_id: JournalId,
    control: Option<ControlSender>,
    /// The connection that `control` is on, and its number.
    connection: Option<Connection>,
    link: u32,
    runtime: Handle,
    signals: Signals<Signal>,
    signal: Sender<Signal>,
    work: PathBuf,
    home: Home,
    /// What was made for the restore elsewhere, to be removed if the runtime cannot.
    made: Made,
    /// The right to touch the container; given up when it runs and lacks nothing.
    lock: Option<ContainerLock>,
    /// Those it will be in, made by whomever.
    all_cgroups: Vec<PathBuf>,
    store: Arc<PageStore>,
    /// `None` for a copy that was taken over when it ran.
    receiver: Option<Receiver>,
    course: Course<TargetState>,
    askers: Vec<Sender<Fate>>,
    pages_apart: bool,
    hooks: Option<HookServer>,
    hook: Option<WaitingHook>,
    restore: Option<Restore>,
    pager: Option<PagerHandle>,
    /// The pager holds every userfaultfd.
    armed: bool,
    /// What the copy is owed; `None` unless it runs before it is whole.
    owing: Option<Owing>,
    /// The pager was another agent's: without a socket to it, what it does is seen by its files.
    watched: bool,
    /// The pager and its standby are gone with pages missing.
    pager_lost: bool,
    /// The agent wants to stop.
    leaving: bool,
    deadline: Option<Instant>,
    reason: Option<(PeerError, String)>,
    manifest: Option<Manifest>,
    times: Times,
    released: Option<Instant>,
    /// Every page is in its place.
    filled: bool,
    /// When the outcome was said.
    told: Option<Instant>,
    /// What was proven to be the same as at the source.
    shared: Vec<Proven>,
}

#[derive(Default)]
struct Times {
    compose: Duration,
    restore_began: Option<Instant>,
    restore: Duration,
    resume: Duration,
}

impl<'a> Arrival<'a> {
    /// Makes room for a container that was accepted, and begins to take it in.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of an arrival, gathered once"
    )]
    pub fn begin(
        host: &'a Host,
        begin: &'a Begin,
        connection: &Connection,
        control: ControlSender,
        runtime: &Handle,
        signal: Sender<Signal>,
        signals: Signals<Signal>,
        journals: &JournalDir,
        mut lock: ContainerLock,
    ) -> Result<Arrival<'a>, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let work = host
            .state_dir
            .join("work")
            .join(begin.migration.to_string());
        let home = Home::new(&host.state_dir, begin.container.as_str(), begin.migration);
        let opened = TargetOpened {
            migration: begin.migration,
            container: begin.container.clone(),
            runtime_root: host.runc.root().to_path_buf(),
            bundle: home.path().to_path_buf(),
            peer_fingerprint: connection.peer().fingerprint.to_string(),
            peer_name: connection.peer().name.to_string(),
            work_dir: work.clone(),
            boot_id: crate::kernel::boot_id().map_err(|error| text(&error))?,
        };
        let name = JournalName {
            migration: begin.migration,
            side: Side::Target,
        };
        let journal = journals
            .create(name, &Record::TargetOpened(opened))
            .map_err(|error| text(&error))?;
        // Until it is settled, whatever becomes of this process.
        lock.is_not_over();
        let limits = PageStoreLimits {
            spaces: MOST_SPACES,
            // Pages may be written anew while they are counted; what a peer says it needs is held to twice.
            bytes: begin
                .requirements
                .memory_bytes
                .saturating_mul(2)
                .saturating_add(PAGE_RESERVE),
        };
        let store = Arc::new(PageStore::new(limits));
        let images = work.join("images");
        let mut private = DirBuilder::new();
        private.recursive(true).mode(0o700);
        for directory in [&images, &work.join("work")] {
            private
                .create(directory)
                .map_err(|error| format!("cannot make {}: {error}", directory.display()))?;
        }
        home.make().map_err(|error| text(&error))?;
        let receiver = Receiver::start(
            connection,
            runtime,
            begin.requirements.page_streams,
            &store,
            &images,
            (INVENTORY, work.join(INVENTORY)),
            begin
                .requirements
                .memory_bytes
                .saturating_mul(2)
                // Deleted files are in the images.
                .saturating_add(begin.requirements.rootfs_bytes)
                .saturating_add(IMAGE_RESERVE),
        );
        // The source removes the proofs once it is answered.
        let shared = begin.requirements.shared.iter().map(Proven::new);
        let shared: Result<Vec<Proven>, String> = shared.collect();
        let shared = shared.map_err(|why| format!("no longer the same as at the source: {why}"))?;
        let arrival = Arrival {
            host,
            container: begin.container.clone(),
            requirements: Some(&begin.requirements),
            journal,
            journal_id: journals.id(),
            control: Some(control),
            connection: Some(connection.clone()),
            link: 0,
            runtime: runtime.clone(),
            signals,
            signal,
            work,
            home,
            made: Made::default(),
            lock: Some(lock),
            all_cgroups: Vec::new(),
            store,
            receiver: Some(receiver),
            course: Course::start(),
            askers: Vec::new(),
            pages_apart: false,
            hooks: None,
            hook: None,
            restore: None,
            pager: None,
            armed: false,
            owing: None,
            watched: false,
            pager_lost: false,
            leaving: false,
            deadline: None,
            reason: None,
            manifest: None,
            times: Times::default(),
            released: None,
            filled: false,
            told: None,
            shared,
        };
        if begin.requirements.rootfs == RootfsMode::Copied {
            arrival.receive_rootfs(connection, begin.requirements.rootfs_bytes)?;
        }
        Ok(arrival)
    }

    /// Carries the arrival to its end: the container is complete, or nothing of it is left.
    pub fn run(mut self) -> TargetState {
        loop {
            let event = match self.course.next_action() {
                Some(action) => self.perform(action),
                None if self.course.state().is_settled() && self.was_heard() => break,
                None if self.leaving && self.is_stranded() => {
                    tracing::info!(container = %self.container, "its source is away: it is left to its pager");
                    if let Some(lock) = self.lock.take() {
                        lock.leave();
                    }
                    return self.course.state();
                }
                None => self.next_event(),
            };
            if let Some(event) = event {
                self.take(event);
            }
        }
        // First: as long as the working directory is there, a successor looks whether the lock is left.
        self.give_up_lock();
        self.copy().remove_idle_cgroups();
        let remove = self.copy().remove_work();
        drop(self.hooks.take());
        if let Err(error) = remove {
            tracing::warn!(%error, "the working directory stays");
        }
        self.course.state()
    }

    /// It is over: the container may move on.
    fn give_up_lock(&mut self) {
        if let Some(mut lock) = self.lock.take() {
            lock.is_over();
        }
    }

    /// Whether the source knows the outcome, or has had the time to hear it. On the first connection its session waits for that.
    fn was_heard(&self) -> bool {
        let owing = self.course.state() == TargetState::Complete
            && self.owing.as_ref().is_some_and(|owing| !owing.is_over());
        let away = self.link == 0
            || self.control.is_none()
            || self.told.is_none_or(|told| told.elapsed() > END_GRACE);
        !owing && away
    }

    fn take(&mut self, event: TargetEvent) {
        let before = self.course.state();
        match self.course.on(event) {
            Ok(ignored) => {
                tracing::debug!(?before, ?event, after = ?self.course.state(), ignored, "handover")
            }
            Err(impossible) => tracing::error!(%impossible, "the handover stays where it is"),
        }
    }

    fn next_event(&mut self) -> Option<TargetEvent> {
        // While a restore is awaited its end is polled for; otherwise everything comes as a signal.
        let wait = match self.course.state() {
            TargetState::Restoring | TargetState::Releasing => Duration::from_micros(300),
            _ => Duration::from_millis(20),
        };
        if let Ok(signal) = self.signals.recv_timeout(wait) {
            return self.event_of(signal);
        }
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() > deadline)
        {
            self.deadline = None;
            self.because(
                PeerError::TimedOut,
                format!("nothing came in state {:?}", self.course.state()),
            );
            return Some(TargetEvent::Timeout);
        }
        self.note_record();
        if let Some(error) = self.receiver.as_ref().and_then(Receiver::failure)
            && !self.course.state().is_settled()
            && self.course.state() == TargetState::Receiving
        {
            self.because(PeerError::ReceiveFailed, error.to_string());
            return Some(TargetEvent::LocalFailure);
        }
        self.restore_ended()
            .or_else(|| self.pager_event())
            .or_else(|| self.owing_event())
    }

    /// Takes down which directory the runtime has made for its record of the copy, before it is in the frozen window.
    fn note_record(&mut self) {
        if self.made.record.is_some()
            || self.course.state() != TargetState::Receiving
            || !self.restore.as_ref().is_some_and(Restore::has_begun)
        {
            return;
        }
        if let Ok(Some(inode)) = inode_of(&self.host.runc.directory(self.container.as_str())) {
            self.made.record = Some(inode);
            let leftover = Leftover::RuntimeRecord { inode };
            if let Err(error) = self.journal.append(&Record::Leftover(leftover)) {
                tracing::warn!(%error, "the runtime's record of the copy is not in the journal");
            }
        }
    }

    fn restore_ended(&mut self) -> Option<TargetEvent> {
        let ended = self.restore.as_mut()?.poll().ok()??;
        self.restore = None;
        match ended {
            Ok(()) if self.course.state() == TargetState::Releasing => {
                self.times.resume = self
                    .released
                    .map_or(Duration::ZERO, |released| released.elapsed());
                Some(TargetEvent::Resumed)
            }
            Ok(()) => None,
            Err(words) => {
                self.because(PeerError::RestoreFailed, words);
                Some(TargetEvent::RestoreFailed)
            }
        }
    }

    fn pager_event(&mut self) -> Option<TargetEvent> {
        let released = self.course.state() == TargetState::Released;
        if released && self.pager_lost {
            return Some(TargetEvent::PagerLost);
        }
        if released && self.pager.is_none() {
            return self.pager_seen();
        }
        match self.pager.as_mut()?.next_event(Duration::ZERO) {
            Ok(None) => None,
            Ok(Some(PagerEvent::Done(summary))) if !summary.is_whole() => {
                self.miss_pages(&summary);
                Some(TargetEvent::PagerLost)
            }
            Ok(Some(PagerEvent::Done(summary))) => {
                tracing::info!(?summary, "every page is in its place");
                self.pager = None;
                self.have_filled();
                None
            }
            Ok(Some(PagerEvent::Failed { reason }))
                if self.course.state() != TargetState::Released =>
            {
                self.because(PeerError::FillFailed, reason);
                Some(TargetEvent::PagerLost)
            }
            Ok(Some(PagerEvent::Armed { .. })) => {
                self.armed = true;
                None
            }
            Ok(Some(event)) => {
                tracing::debug!(?event, "pager");
                None
            }
            Err(error) => self.lose_pager(&error).then_some(TargetEvent::PagerLost),
        }
    }

    /// What becomes of the pages of a copy that runs, where no pager says it: none was needed, or it has said it before, or it is
    /// another agent's.
    fn pager_seen(&mut self) -> Option<TargetEvent> {
        if self.watched && !self.filled {
            match Life::of(&self.work) {
                Life::Filling => return None,
                Life::Done => self.have_filled(),
                Life::Dead => {
                    self.because(PeerError::FillFailed, PagerHandleError::Gone.to_string());
                    self.pager_lost = true;
                    return Some(TargetEvent::PagerLost);
                }
            }
        }
        self.filled = true;
        self.needs_nothing();
        Some(TargetEvent::PagerDone)
    }

    fn have_filled(&mut self) {
        self.filled = true;
        self.say(message::Filled {
            after_release_us: self
                .released
                .map_or(0, |released| micros(released.elapsed())),
        });
    }

    fn event_of(&mut self, signal: Signal) -> Option<TargetEvent> {
        match signal {
            Signal::Heard { link, .. } if link != self.link => None,
            Signal::Heard {
                said: Ok(message), ..
            } => self.event_of_message(message),
            Signal::Resume(resumption) => {
                self.resume(resumption);
                None
            }
            Signal::Leave => {
                self.leaving = true;
                None
            }
            Signal::Heard {
                said: Err(error), ..
            } => {
                self.control = None;
                tracing::info!(%error, state = ?self.course.state(), "the source is gone");
                self.reason
                    .get_or_insert((PeerError::SourceLost, error.to_string()));
                Some(TargetEvent::PeerLost)
            }
            Signal::Hook(hook) => {
                self.times.restore = self
                    .times
                    .restore_began
                    .map_or(Duration::ZERO, |began| began.elapsed());
                self.hook = Some(hook);
                Some(TargetEvent::HookReached)
            }
            Signal::HookGone => {
                self.hook.take()?;
                self.because(
                    PeerError::RestoreFailed,
                    "the hook that held the copy is gone".into(),
                );
                Some(TargetEvent::HookLost)
            }
            Signal::Rootfs(Ok(())) => None,
            Signal::Rootfs(Err(reason)) => {
                if self.course.state() != TargetState::Receiving {
                    return None;
                }
                self.because(PeerError::FilesFailed, reason);
                Some(TargetEvent::LocalFailure)
            }
            Signal::Synced(Ok(())) => Some(TargetEvent::FilesSynced),
            Signal::Synced(Err(reason)) => {
                tracing::error!(container = %self.container, reason, "its files are not on disk yet");
                Some(TargetEvent::SyncFailed)
            }
            Signal::Query(asker) => {
                self.askers.push(asker);
                Some(TargetEvent::Query)
            }
        }
    }

    fn event_of_message(&mut self, message: Message) -> Option<TargetEvent> {
        let done = match message {
            Message::RoundEnd(end) => self.frames_are_here(&end.frames_per_stream).map(|()| {
                self.say(message::RoundReceived { round: end.round });
                None
            }),
            Message::SpacesEnded(ended) if self.course.state() == TargetState::Receiving => {
                // What a forking container had once must not fill the store.
                for space in ended.spaces {
                    self.store.drop_space(space);
                }
                Ok(None)
            }
            Message::Prestart(prestart) => self.prestart(&prestart).map(|()| None),
            Message::Manifest(manifest) => self
                .everything_is_here(manifest)
                .map(|()| Some(TargetEvent::SkeletonComplete)),
            Message::Commit(_) => return Some(TargetEvent::Commit),
            Message::Abort(abort) => {
                self.because(PeerError::SourceAborted, abort.text.to_string());
                return Some(TargetEvent::Abort);
            }
            unexpected => {
                self.because(PeerError::Unexpected, unexpected.name().to_string());
                return Some(TargetEvent::PeerViolation);
            }
        };
        match done {
            Ok(event) => event,
            Err((code, reason)) => {
                self.because(code, reason);
                Some(TargetEvent::LocalFailure)
            }
        }
    }

    fn perform(&mut self, action: TargetAction) -> Option<TargetEvent> {
        fault::before("target", action);
        match action {
            TargetAction::StartRestore => self.start_restore().err().map(|(code, reason)| {
                self.because(code, reason);
                TargetEvent::LocalFailure
            }),
            TargetAction::VerifyCopy => Some(match self.verify_copy() {
                Ok(()) => TargetEvent::CopyVerified,
                Err(reason) => {
                    self.because(PeerError::FillFailed, reason);
                    TargetEvent::LocalFailure
                }
            }),
            TargetAction::RecordPrepared => Some(self.record(&Record::Prepared)),
            TargetAction::AnswerPrepared => {
                self.deadline = None;
                self.say(message::Prepared {
                    journal: self.journal_id,
                    compose_us: micros(self.times.compose),
                    restore_us: micros(self.times.restore),
                    filled_pages: 0,
                });
                None
            }
            TargetAction::StartOrphanTimer => {
                self.deadline = Some(Instant::now() + fault::patience(ORPHAN_PATIENCE));
                None
            }
            TargetAction::RecordCommitted => {
                self.deadline = None;
                Some(self.record(&Record::Committed))
            }
            TargetAction::ReleaseCopy => self.release_copy(),
            TargetAction::InspectCopy => Some(self.inspect_copy()),
            TargetAction::RecordReleased => {
                let written = self.record(&Record::Released);
                (written == TargetEvent::RecordFailed).then_some(written)
            }
            TargetAction::AnswerCommitted => {
                self.deadline = None;
                self.say(message::Committed {
                    resume_us: micros(self.times.resume),
                    fill_us: 0,
                });
                self.answer(self.fate());
                None
            }
            TargetAction::SyncFiles => {
                let (home, signal) = (self.home.clone(), self.signal.clone());
                thread::spawn(move || {
                    let synced = sync_files(home.path()).map_err(|error| error.to_string());
                    if synced.is_err() {
                        thread::sleep(DISCARD_PAUSE);
                    }
                    let _ = signal.send(Signal::Synced(synced));
                });
                None
            }
            TargetAction::RecordComplete => Some(self.record_outcome(&Record::Complete)),
            TargetAction::RecordLost => Some(self.record_outcome(&Record::Lost)),
            TargetAction::AnswerComplete => {
                tracing::info!(container = %self.container, "complete: every page is in its place, every file on disk");
                // Whoever hears the next words may move it on at once.
                self.give_up_lock();
                self.tell_outcome(Fate::Complete);
                None
            }
            TargetAction::AnswerLost => {
                self.tell_outcome(Fate::Lost);
                None
            }
            TargetAction::KillCopy => Some(self.kill_copy()),
            TargetAction::DiscardCopy => Some(self.discard_copy()),
            TargetAction::RecordAborted => Some(self.record_outcome(&Record::Aborted)),
            TargetAction::AnswerRolledBack => {
                let (code, text) = self
                    .reason
                    .clone()
                    .unwrap_or((PeerError::Internal, String::new()));
                tracing::info!(container = %self.container, %code, text, "rolled back");
                self.say(message::RolledBack {
                    code,
                    text: text.as_str().into(),
                });
                self.answer(Fate::RolledBack);
                None
            }
            TargetAction::AnswerPending => {
                self.answer(Fate::InProgress);
                None
            }
        }
    }

    fn receive_rootfs(&self, connection: &Connection, rootfs_bytes: u64) -> Result<(), String> {
        let limits = Limits {
            // Files grow while they are copied; what a peer says it needs is held to twice.
            bytes: rootfs_bytes
                .saturating_mul(2)
                .saturating_add(ROOTFS_RESERVE),
            entries: Limits::MAX_ENTRIES,
        };
        let mut target = RootfsTarget::new(&self.home.path().join("rootfs"), limits)
            .map_err(|error| error.to_string())?;
        let (connection, runtime, signal) = (
            connection.clone(),
            self.runtime.clone(),
            self.signal.clone(),
        );
        thread::spawn(move || {
            let served = match runtime.block_on(connection.accept_stream(TwoWay::Rootfs)) {
                Ok((_, send, receive)) => {
                    let mut stream = BlockingStream::new(send, receive, connection);
                    target
                        .serve(&mut stream)
                        .map_err(|error| crate::chain::one_line(&error))
                }
                Err(error) => Err(error.to_string()),
            };
            let _ = signal.send(Signal::Rootfs(served));
        });
        Ok(())
    }

    fn is_lazy(&self) -> bool {
        self.host.lazy && self.pages_apart
    }

    fn copy(&self) -> Copy<'_> {
        Copy {
            runc: &self.host.runc,
            id: self.container.as_str(),
            migration: self.home.migration(),
            home: &self.home,
            work: &self.work,
            made: &self.made,
        }
    }

    fn record(&mut self, record: &Record) -> TargetEvent {
        match self.journal.append(record) {
            Ok(()) => TargetEvent::RecordWritten,
            Err(error) => {
                self.because(PeerError::StorageFull, error.to_string());
                TargetEvent::RecordFailed
            }
        }
    }

    /// A record that nothing can do without.
    fn record_outcome(&mut self, record: &Record) -> TargetEvent {
        let written = self.record(record);
        if written == TargetEvent::RecordFailed {
            thread::sleep(DISCARD_PAUSE);
        }
        written
    }

    fn tell_outcome(&mut self, fate: Fate) {
        self.told = Some(Instant::now());
        self.say(message::Outcome {
            journal: self.journal_id,
            fate,
        });
        self.answer(fate);
    }

    /// Says something to the source; one that is gone will ask.
    pub fn say(&mut self, message: impl Into<Message>) {
        let Some(control) = &mut self.control else {
            return;
        };
        if let Err(error) = self.runtime.block_on(control.send(message)) {
            tracing::debug!(%error, "the source does not hear");
        }
    }

    fn answer(&mut self, fate: Fate) {
        for asker in self.askers.drain(..) {
            let _ = asker.send(fate);
        }
    }

    fn because(&mut self, code: PeerError, reason: String) {
        tracing::info!(state = ?self.course.state(), %code, %reason, "a step failed");
        self.reason.get_or_insert((code, reason));
    }
}

/// Bytes of pages above what the source announced: processes start and grow meanwhile.
const PAGE_RESERVE: u64 = 256 << 20;

/// Bytes of images above the announced memory.
const IMAGE_RESERVE: u64 = 256 << 20;

/// Bytes of files above the announced root filesystem.
const ROOTFS_RESERVE: u64 = 256 << 20;

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
