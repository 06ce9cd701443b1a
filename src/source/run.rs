//! A migration from the source's side, from the first look to the outcome.
//!
//! ```text
//!  survey ─▶ connect ─▶ ask the target ─▶ journal ─▶ copy files, send rounds ─▶ hand over ─▶ report
//!  └────────── nothing is touched ─────┘  └──────────── rolls back whole ────┘  └ handoff table
//! ```

use super::dump::{DumpError, PreparedDump};
use super::guard::Guard;
use super::handover::{Ended, Handover, Signal};
use super::link::{Link, LinkError};
use super::plan::Plan;
use super::preflight::{self, Survey};
use super::proofs::{self, ProofError, Proofs};
use super::remains;
use super::rootfs_copy::{RootfsCopy, RootfsCopyError};
use super::rounds::{RoundsDone, RoundsError, name_of};
use super::send::{FrameSink, Sender};
use super::settle::{self, Settled, connector};
use super::tracker::{Bystander, TrackError, Tracker, Trackers};
use super::watch::Watch;
use crate::chain::one_line;
use crate::criu::binary::{Criu, NoCriu};
use crate::criu::kernel_cache::{KernelCache, KernelCacheError};
use crate::criu::options::NetworkLock;
use crate::journal::prune::prune;
use crate::journal::{Journal, JournalDir, JournalError, JournalName};
use crate::migration::event::{Event, Finding, Side, Verdict};
use crate::migration::handoff::{SourceEvent, SourceState};
use crate::migration::journal::{self, Record, SourceOpened};
use crate::migration::mode::{Mode, NoSuchMode, PostCopyNeeds};
use crate::migration::phase::Timeline;
use crate::migration::report::{Outcome, PostCopyReport, Report, Sent};
use crate::migration::{ContainerId, MigrationId};
use crate::runtime::Freezer;
use crate::runtime::lock::{ContainerLock, Holder, LockError};
use crate::runtime::runc::{Container, Runc, RuncError};
use crate::target::settle as arrival;
use crate::transport::{PageQueue, Settings};
use crate::wire::message::{Accepted, Begin, Message, Prestart, RootfsMode};
use crate::wire::page_frame::EncodedFrame;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant, SystemTime};
use thiserror::Error;

/// How long a target may take to look whether the container can come.
const PREFLIGHT_PATIENCE: Duration = Duration::from_secs(30);

/// How long a container that has only just come here may take to be whole.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(5);

/// Why a migration ended before it could begin: nothing was touched.
#[derive(Debug, Error)]
pub enum RunError {
    /// The container cannot be found or understood.
    #[error(transparent)]
    Runtime(#[from] RuncError),
    /// No CRIU that works.
    #[error(transparent)]
    Criu(#[from] NoCriu),
    /// CRIU's kernel cache cannot be made.
    #[error(transparent)]
    KernelCache(#[from] KernelCacheError),
    /// The tracker asked for does not work here, or none does.
    #[error("{}", crate::chain::one_line(.0))]
    Tracker(#[from] TrackError),
    /// Somebody is at the container.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// An earlier migration of the container is not settled.
    #[error(
        "migration {migration} of container {id} is not settled yet: {reason}; end it first with: migrate recover --state-dir {}", state_dir.display()
    )]
    Unsettled {
        /// The earlier one.
        migration: MigrationId,
        /// The container.
        id: ContainerId,
        /// What stands in the way.
        reason: String,
        /// Where its journal is.
        state_dir: PathBuf,
    },
    /// The target cannot be talked to.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The target says nothing that makes sense.
    #[error("the target does not answer the first question: {0}")]
    NoAnswer(String),
    /// What is said to be shared cannot be made ready to be proven.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// It was rolled back, and the container cannot be seen to go on.
    #[error(
        "the move was given up ({reason}), and {container} does not go on: {why}. It is tried on; try it now with: migrate recover --state-dir {state_dir}",
        state_dir = .state_dir.display()
    )]
    StandsStill {
        /// Which container.
        container: String,
        /// Where the engine's records are.
        state_dir: std::path::PathBuf,
        /// Why the move did not go on.
        reason: String,
        /// Why the container does not.
        why: String,
    },
    /// Another file or the system fails us.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl RunError {
    /// Whether the host or its peer is not fit for the move, as opposed to a failure of ours.
    fn is_refusal(&self) -> bool {
        !matches!(
            self,
            RunError::Journal(_)
                | RunError::System { .. }
                | RunError::Lock(LockError::File { .. })
                | RunError::StandsStill { .. }
                | RunError::Proof(ProofError::Record { .. })
        )
    }
}

impl FrameSink for PageQueue {
    fn send(&mut self, frame: EncodedFrame) -> io::Result<Duration> {
        let start = Instant::now();
        PageQueue::send(self, frame).map_err(io::Error::other)?;
        Ok(start.elapsed())
    }
}

/// Moves the container as planned. `Err` is a failure of ours before anything was touched; every other end is in the
/// report.
pub fn run(plan: &Plan, emit: &dyn Fn(Event), cancelled: &AtomicBool) -> Result<Report, RunError> {
    let began = Instant::now();
    let migration = new_migration()?;
    emit(Event::Started {
        migration,
        container: plan.container.clone(),
        target: plan.target.to_string(),
    });
    match move_container(plan, migration, began, emit, cancelled) {
        Err(error) if error.is_refusal() => {
            let reasons = vec![error.to_string()];
            let report = Report::new(migration, plan);
            Ok(report.ended(Outcome::Refused { reasons }, began.elapsed()))
        }
        ended => ended,
    }
}

fn move_container(
    plan: &Plan,
    migration: MigrationId,
    began: Instant,
    emit: &dyn Fn(Event),
    cancelled: &AtomicBool,
) -> Result<Report, RunError> {
    let mut report = Report::new(migration, plan);
    let runc = Runc::new(&plan.runtime_root);
    let mut lock = lock_container(plan, migration, &runc)?;
    let container = runc.container(plan.container.as_str())?;
    let watch = Watch::begin(&container).map_err(system("looking at the container"))?;
    let criu = Criu::find()?;
    proofs::sweep(&plan.state_dir);
    let mut survey =
        preflight::survey(&container, &criu, plan).map_err(system("looking at the container"))?;
    emit(Event::Preflight {
        side: Side::Source,
        findings: survey.findings.clone(),
    });
    let reasons = survey.refusals();
    if !reasons.is_empty() {
        return Ok(report.ended(Outcome::Refused { reasons }, began.elapsed()));
    }
    let cache = KernelCache::prepare(&criu, &plan.state_dir.join("criu"))?;
    let (mut tracker, untracked) = open_tracker(plan, cache.skeleton.works())?;
    if let Some(tracker) = &mut tracker {
        tracker.set_container(&container.freezer);
    }

    let (signal, signals) = mpsc::channel();
    let settings = Settings {
        bandwidth_limit: plan.bandwidth_limit,
        ..Settings::default()
    };
    let mut link = Link::connect(
        &plan.target,
        connector(&plan.state_dir, settings)?,
        signal.clone(),
        Signal::Heard,
    )?;
    // Removed again as soon as the target has answered.
    let (proofs, shared) = Proofs::write(&plan.state_dir, migration, &survey.places)?;
    survey.requirements.shared = shared;
    let (accepted, mut refusals) = ask_target(plan, migration, &survey, &mut link, &signals)?;
    drop(proofs);
    let hosts = PostCopyNeeds {
        skeleton: cache.skeleton.works(),
        lazy: accepted.lazy,
    };
    let chosen = if refusals.is_empty() {
        choose_mode(plan.mode, hosts, untracked)
    } else {
        Ok((plan.mode, None))
    };
    let why = match chosen {
        Ok((mode, why)) => {
            report.mode = mode;
            why
        }
        Err(NoMode::Refused(error)) => {
            refusals.push(error.to_string());
            None
        }
        Err(NoMode::Untracked(error)) => {
            link.close(crate::wire::peer_error::PeerError::Done);
            return Err(error.into());
        }
    };
    emit(answer_of_target(&link, &refusals));
    if !refusals.is_empty() {
        link.close(crate::wire::peer_error::PeerError::Done);
        return Ok(report.ended(Outcome::Refused { reasons: refusals }, began.elapsed()));
    }
    emit(Event::Mode {
        asked: plan.mode,
        mode: report.mode,
        why,
    });
    if plan.dry_run {
        link.close(crate::wire::peer_error::PeerError::Done);
        return Ok(report.ended(Outcome::WouldMove, began.elapsed()));
    }

    let work_dir = Plan::work_dir(&plan.state_dir, migration);
    let journal = open_journal(plan, migration, &container, &link, &work_dir)?;
    // Until it is settled, whatever becomes of this process.
    if let Some(lock) = &mut lock {
        lock.is_not_over();
    }
    let journal_file = journal.path().to_path_buf();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&work_dir)
        .map_err(system("making the working directory"))?;
    report.tracker = tracker
        .as_ref()
        .filter(|_| report.mode != Mode::PostCopy)
        .map(|tracker| name_of(tracker.kind()));
    let guard = Guard::start(&plan.program, &plan.state_dir, migration, lock.as_ref());

    let sinks = link.page_queues(plan.page_streams);
    let rootfs = start_rootfs(plan, &container, &link);
    let sender = Sender::new(sinks.unwrap_or_default(), plan.compression);
    let prestart = Prestart {
        config: container.spec.to_string(),
        stdio: survey.stdio,
        pages_apart: tracker.is_some(),
    };
    let network_lock = if survey.speaks_tcp {
        NetworkLock::Nftables
    } else {
        NetworkLock::Skip
    };
    let (rootfs, rootfs_error) = match rootfs {
        Ok(rootfs) => (rootfs, None),
        Err(error) => (None, Some(error.to_string())),
    };
    let mut handover = Handover::new(
        migration,
        plan,
        report.mode,
        &runc,
        &container,
        watch,
        journal,
        link,
        signals,
        sender,
        tracker,
        rootfs,
        emit,
        began,
        cancelled,
        prestart,
        network_lock,
    );
    let mut prepare = |handover: &mut Handover<'_, PageQueue>| -> Result<(), String> {
        let dump = PreparedDump::new(
            &plan.program,
            &work_dir,
            &journal_file,
            &container,
            criu.clone(),
            &cache,
            network_lock,
            signal.clone(),
            Signal::Dump,
        );
        handover.start_dump(dump.map_err(|error: DumpError| error.to_string())?)
    };
    let begun = match (guard, rootfs_error) {
        (Err(error), _) => Err(RoundsError::Prepare(error.to_string())),
        (_, Some(error)) => Err(RoundsError::Prepare(error)),
        (Ok(guard), None) => {
            let done = if report.mode == Mode::PostCopy || handover.tracker.is_none() {
                handover.no_rounds(&mut prepare)
            } else {
                handover.rounds(&mut prepare)
            };
            done.map(|done| (guard, done))
        }
    };
    // Kept to the end: a guard that finds the working directory there does all of it again.
    let _guard;
    let (state, ended, timeline) = match begun {
        Ok((guard, done)) => {
            _guard = guard;
            let last = done.rounds.last().map_or(0, |round| round.round);
            emit(Event::Freezing {
                why: done.why,
                expected_downtime: done.predicted.downtime,
                switch: done.switch,
                predicted: done.predicted,
            });
            let (switch, expected) = (done.switch, done.predicted.downtime);
            report.take_rounds(done);
            handover.hand_over(last, switch, expected)
        }
        Err(RoundsError::Interrupted(event)) => handover.give_up(event, String::new()),
        Err(error) => handover.give_up(SourceEvent::LocalFailure, error.to_string()),
    };
    if let Some(why) = ended.stands_still {
        return Err(RunError::StandsStill {
            container: plan.container.to_string(),
            state_dir: plan.state_dir.clone(),
            reason: ended.reason.unwrap_or_default(),
            why,
        });
    }
    if state.is_settled()
        && let Err(error) = remains::remove_work(&work_dir)
    {
        tracing::warn!(%error, path = %work_dir.display(), "cannot remove the working directory");
    }
    if state.is_settled()
        && let Some(lock) = &mut lock
    {
        lock.is_over();
    }
    let report = conclude(report, plan, state, ended, &timeline, began, emit);
    Ok(report)
}

/// Takes the container, so that nobody else moves it or takes up what an earlier attempt left. A dry run only looks.
fn lock_container(
    plan: &Plan,
    migration: MigrationId,
    runc: &Runc,
) -> Result<Option<ContainerLock>, RunError> {
    let (root, id) = (plan.runtime_root.as_path(), plan.container.as_str());
    if !runc.knows(id) {
        return Err(RuncError::NoSuchContainer {
            id: id.to_owned(),
            root: root.to_path_buf(),
        }
        .into());
    }
    if plan.dry_run {
        return match ContainerLock::look(root, id) {
            Some(holder) => Err(LockError::Held {
                id: id.to_owned(),
                holder,
            }
            .into()),
            None => Ok(None),
        };
    }
    let mut lock = ContainerLock::take(root, id, ARRIVAL_PATIENCE)?;
    if let Some(earlier) = lock.before().cloned() {
        end_earlier(plan, runc, &earlier, &mut lock)?;
    }
    let holder = Holder::new(
        migration,
        Side::Source,
        plan.target.to_string(),
        &plan.state_dir,
    );
    lock.claim(holder)
        .map_err(system("locking the container"))?;
    Ok(Some(lock))
}

/// Ends what an earlier migration, whose processes died, left of this container; an error if only a person can.
fn end_earlier(
    plan: &Plan,
    runc: &Runc,
    earlier: &Holder,
    lock: &mut ContainerLock,
) -> Result<(), RunError> {
    let state_dir = &earlier.state_dir;
    let unsettled = |reason: String| RunError::Unsettled {
        migration: earlier.migration,
        id: plan.container.clone(),
        reason,
        state_dir: state_dir.clone(),
    };
    let stays = match earlier.side {
        Side::Source => {
            let settled = settle::settle(state_dir, earlier.migration, Duration::ZERO, Some(lock));
            let reason = match settled {
                Ok(
                    None
                    | Some(
                        Settled::Already
                        | Settled::Committed
                        | Settled::RolledBack
                        | Settled::TakenBack,
                    ),
                ) => return Ok(()),
                Ok(Some(
                    Settled::Unknown { reason }
                    | Settled::Incomplete { reason, .. }
                    | Settled::StandsStill { reason }
                    | Settled::Held { by: reason },
                )) => reason,
                Ok(Some(Settled::Stranded)) => settle::LOST.to_owned(),
                Err(error) => error.to_string(),
            };
            // It may be about a container that had the name before.
            let container = runc.container(plan.container.as_str())?;
            settle::concerns(state_dir, earlier.migration, &container.instance).then_some(reason)
        }
        Side::Target => match arrival::settle(state_dir, earlier.migration, Some(lock)) {
            Ok(Some(arrival::Settled::Owing)) => {
                Some("it lacks pages that are kept at its source".into())
            }
            Ok(_) => None,
            Err(error) => Some(error.to_string()),
        },
    };
    match stays {
        Some(reason) => Err(unsettled(reason)),
        None => Ok(()),
    }
}

/// The tracker for the rounds, or for post-copy, which has none, a bystander. Where none works `auto` may yet do without: then the reason is returned.
fn open_tracker(plan: &Plan, skeleton: bool) -> Result<OpenedTracker, TrackError> {
    if !skeleton {
        return Ok((None, None));
    }
    if plan.mode == Mode::PostCopy {
        return Ok((Some(Box::new(Bystander)), None));
    }
    match Trackers::find().open(plan.tracker) {
        Ok(tracker) => Ok((Some(tracker), None)),
        Err(error) if plan.mode == Mode::Auto && plan.tracker.is_none() => {
            Ok((Some(Box::new(Bystander)), Some(error)))
        }
        Err(error) => Err(error),
    }
}

/// The mode these hosts can have, and why it is another than was asked for.
fn choose_mode(
    asked: Mode,
    hosts: PostCopyNeeds,
    untracked: Option<TrackError>,
) -> Result<(Mode, Option<String>), NoMode> {
    match (asked.between(hosts)?, untracked) {
        // Only post-copy moves a container whose writes nobody sees and leaves its memory out of the downtime.
        (Mode::Auto, Some(error)) => Ok((Mode::PostCopy, Some(one_line(&error)))),
        (_, Some(error)) => Err(NoMode::Untracked(error)),
        (mode, None) if mode != asked => Ok((mode, hosts.lacks().map(str::to_owned))),
        (mode, None) => Ok((mode, None)),
    }
}

/// Why there is no mode to move the container by.
#[derive(Debug, Error)]
enum NoMode {
    #[error(transparent)]
    Refused(#[from] NoSuchMode),
    #[error(transparent)]
    Untracked(TrackError),
}

type OpenedTracker = (Option<Box<dyn Tracker>>, Option<TrackError>);

/// Asks the target whether the container can come. Returns what else it says, and why not; empty if it can.
fn ask_target(
    plan: &Plan,
    migration: MigrationId,
    survey: &Survey,
    link: &mut Link,
    signals: &Receiver<Signal>,
) -> Result<(Accepted, Vec<String>), RunError> {
    link.say(Begin {
        migration,
        container: plan.container.clone(),
        requirements: survey.requirements.clone(),
        dry_run: plan.dry_run,
    })?;
    match signals.recv_timeout(PREFLIGHT_PATIENCE) {
        Ok(Signal::Heard(Ok(Message::Accepted(accepted)))) => Ok((accepted, Vec::new())),
        Ok(Signal::Heard(Ok(Message::Refused(refused)))) => {
            let line = |refusal: &crate::wire::message::Refusal| {
                format!("{}: {}", refusal.code, refusal.text)
            };
            Ok((
                Accepted::default(),
                refused.refusals.iter().map(line).collect(),
            ))
        }
        Ok(Signal::Heard(Ok(other))) => {
            Err(RunError::NoAnswer(format!("it said {}", other.name())))
        }
        Ok(Signal::Heard(Err(error))) => Err(LinkError::from(error).into()),
        Ok(Signal::Dump(_)) | Err(_) => Err(RunError::NoAnswer(format!(
            "nothing within {PREFLIGHT_PATIENCE:?}"
        ))),
    }
}

fn start_rootfs(
    plan: &Plan,
    container: &Container,
    link: &Link,
) -> Result<Option<RootfsCopy>, RootfsStartError> {
    match plan.rootfs {
        RootfsMode::Shared => Ok(None),
        RootfsMode::Copied => Ok(Some(RootfsCopy::start(
            &container.rootfs,
            container.list_tasks(),
            link.rootfs_stream()?,
        )?)),
    }
}

#[derive(Debug, Error)]
enum RootfsStartError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Copy(#[from] RootfsCopyError),
}

fn open_journal(
    plan: &Plan,
    migration: MigrationId,
    container: &Container,
    link: &Link,
    work_dir: &std::path::Path,
) -> Result<Journal, RunError> {
    let opened = SourceOpened {
        migration,
        container: plan.container.clone(),
        runtime_root: plan.runtime_root.clone(),
        bundle: container.bundle.clone(),
        init: container.instance.init,
        created: container.instance.created.clone(),
        freezer: match &container.freezer {
            Freezer::V1(path) => journal::Freezer::V1 { path: path.clone() },
            Freezer::V2(path) => journal::Freezer::V2 { path: path.clone() },
        },
        cgroup: container.instance.cgroup,
        came_by: container.came_by(&plan.state_dir),
        peer: plan.target.clone(),
        peer_fingerprint: link.peer().fingerprint.to_string(),
        peer_name: link.peer().name.to_string(),
        work_dir: work_dir.to_path_buf(),
        boot_id: crate::kernel::boot_id().map_err(system("reading the boot id"))?,
    };
    let name = JournalName {
        migration,
        side: Side::Source,
    };
    let journals = JournalDir::open(&plan.state_dir)?;
    prune(&journals, SystemTime::now());
    Ok(journals.create(name, &Record::SourceOpened(opened))?)
}

fn conclude(
    mut report: Report,
    plan: &Plan,
    state: SourceState,
    ended: Ended,
    timeline: &Timeline,
    began: Instant,
    emit: &dyn Fn(Event),
) -> Report {
    report.downtime = timeline.downtime(began.elapsed());
    report.memory_bytes = ended.memory_bytes;
    report.dump = ended.dump;
    report.slowed_percent = ended.slowed;
    if let Some(delta) = &ended.delta {
        report.sent = report.sent.plus(delta.sent);
    }
    report.delta = ended.delta;
    report.fill_after_release = ended
        .filled
        .map(|filled| Duration::from_micros(filled.after_release_us));
    report.post_copy = (ended.owed_pages > 0).then_some(PostCopyReport {
        owed_pages: ended.owed_pages,
        faults: ended.faults,
        bytes_wire: ended.bytes_owed,
        last_page: ended.whole,
    });
    report.sent.bytes_wire += ended.bytes_owed;
    if let Some(duration) = report.fill_after_release {
        emit(Event::Filled { duration });
    }
    let reason = ended.reason.unwrap_or_default();
    let outcome = match state {
        SourceState::Committed => Outcome::Moved,
        SourceState::RolledBack => {
            let during = ended.during.unwrap_or(SourceState::Copying);
            emit(Event::RolledBack {
                during,
                reason: reason.clone(),
                downtime: report.downtime.as_ref().map(|downtime| downtime.total),
            });
            Outcome::RolledBack {
                during,
                reason,
                stays: ended.stays,
            }
        }
        SourceState::Serving => {
            emit(Event::Incomplete {
                reason: reason.clone(),
                how_to_go_on: format!("migrate resume --state-dir {}", plan.state_dir.display()),
            });
            Outcome::Incomplete { reason }
        }
        SourceState::Stranded => {
            emit(Event::Incomplete {
                reason: reason.clone(),
                how_to_go_on: resume_source(&plan.state_dir, report.migration),
            });
            Outcome::Stranded { reason }
        }
        _ => {
            emit(Event::Unknown {
                reason: reason.clone(),
                how_to_find_out: format!(
                    "migrate recover --state-dir {}",
                    plan.state_dir.display()
                ),
            });
            Outcome::Unknown { reason }
        }
    };
    report.ended(outcome, began.elapsed())
}

/// The command by which a person lets a container go on whose copy is lost.
pub fn resume_source(state_dir: &std::path::Path, migration: MigrationId) -> String {
    format!(
        "migrate recover --state-dir {} --resume-source {migration}",
        state_dir.display()
    )
}

impl Report {
    fn new(migration: MigrationId, plan: &Plan) -> Report {
        Report {
            migration,
            container: plan.container.clone(),
            target: plan.target.to_string(),
            outcome: Outcome::WouldMove,
            tracker: None,
            mode: plan.mode,
            total: Duration::ZERO,
            rounds: Vec::new(),
            rounds_ended: None,
            switch: None,
            predicted: None,
            slowed_percent: None,
            delta: None,
            sent: Sent::default(),
            memory_bytes: 0,
            downtime: None,
            fill_after_release: None,
            post_copy: None,
            dump: None,
        }
    }

    fn take_rounds(&mut self, done: RoundsDone) {
        self.sent = done
            .rounds
            .iter()
            .fold(Sent::default(), |sum, round| sum.plus(round.sent));
        self.rounds = done.rounds;
        self.rounds_ended = Some(done.why);
        self.switch = Some(done.switch);
        self.predicted = Some(done.predicted);
    }

    fn ended(mut self, outcome: Outcome, total: Duration) -> Report {
        self.outcome = outcome;
        self.total = total;
        self
    }
}

fn answer_of_target(link: &Link, refusals: &[String]) -> Event {
    let finding = |verdict, detail: String| Finding {
        what: link.peer().name.to_string(),
        verdict,
        detail,
        fix: None,
    };
    let mut findings: Vec<Finding> = refusals
        .iter()
        .map(|refusal| finding(Verdict::Refused, refusal.clone()))
        .collect();
    if findings.is_empty() {
        findings.push(finding(Verdict::Ok, "takes the container".into()));
    }
    Event::Preflight {
        side: Side::Target,
        findings,
    }
}

fn new_migration() -> Result<MigrationId, RunError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| RunError::System {
        doing: "choosing a name for the migration",
        source: io::Error::other(error.to_string()),
    })?;
    Ok(MigrationId::from_bytes(bytes))
}

fn system(doing: &'static str) -> impl Fn(io::Error) -> RunError {
    move |source| RunError::System { doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: PostCopyNeeds = PostCopyNeeds {
        skeleton: true,
        lazy: true,
    };

    fn no_tracker() -> Option<TrackError> {
        Some(TrackError::NoTracker {
            uffd_wp: "no WP_ASYNC".into(),
            soft_dirty: "no CONFIG_MEM_SOFT_DIRTY".into(),
        })
    }

    #[test]
    fn without_a_tracker_auto_is_post_copy_and_says_why() {
        let (mode, why) = choose_mode(Mode::Auto, HOSTS, no_tracker()).expect("post-copy can");
        assert_eq!(mode, Mode::PostCopy);
        assert!(why.is_some_and(|why| why.contains("WP_ASYNC")));
    }

    #[test]
    fn without_a_tracker_and_without_lazy_pages_there_is_no_way() {
        let hosts = PostCopyNeeds {
            lazy: false,
            ..HOSTS
        };
        let chosen = choose_mode(Mode::Auto, hosts, no_tracker());
        assert!(matches!(chosen, Err(NoMode::Untracked(_))), "{chosen:?}");
    }

    #[test]
    fn auto_without_lazy_pages_is_pre_copy_and_says_why() {
        let hosts = PostCopyNeeds {
            lazy: false,
            ..HOSTS
        };
        let (mode, why) = choose_mode(Mode::Auto, hosts, None).expect("pre-copy always can");
        assert_eq!(mode, Mode::PreCopy);
        assert_eq!(why.as_deref(), hosts.lacks());
        let refused = choose_mode(Mode::Hybrid, hosts, None);
        assert!(matches!(refused, Err(NoMode::Refused(_))), "{refused:?}");
    }
}
