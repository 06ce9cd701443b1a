//! The world the walk goes through: two ends, two disks, two copies of a container and a network.

use super::super::source::SourceRecord;
use super::super::target::TargetRecord;
use super::super::{
    Course, SourceAction, SourceEvent, SourceState, TargetAction, TargetEvent, TargetState,
};
use super::{Flaw, Kind, Steps};

/// The container at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Here {
    Running,
    Frozen,
    Dead,
}

/// The copy at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum There {
    Nothing,
    Held,
    Running,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    Skeleton,
    Commit,
    Query,
    Abort,
    Prepared,
    Serving,
    Complete,
    Lost,
    RolledBack,
    Pending,
}

/// What brings the copy's pages to their places, from the release on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Pager {
    Filling,
    Done,
    /// It died with pages missing.
    Dead,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// `None`: the process is dead.
    source: Option<Course<SourceState>>,
    source_answer: Option<SourceEvent>,
    source_disk: SourceRecord,
    pub(super) here: Here,
    /// CRIU's hook holds the dump.
    hook_here: bool,
    /// The cgroup was frozen again under CRIU's hold.
    frozen_again: bool,
    /// The container ran after its delta was taken: the target's memory is old.
    stale: bool,

    target: Option<Course<TargetState>>,
    target_answer: Option<TargetEvent>,
    target_disk: TargetRecord,
    pub(super) there: There,
    /// The agent died while the hook held the copy; the hook will read the journal.
    orphan: bool,
    /// The hook's mark: from here on tasks of the copy may have run.
    marked: bool,

    /// Pages are missing at the target that only the source has.
    owed: bool,
    pager: Pager,
    /// The copy's files are on disk.
    synced: bool,
    /// The container ended at the target as any may, with nothing wrong.
    ended: bool,
    /// The target's host was restarted.
    restarted: bool,
    /// The copy writes to files that the frozen container uses too.
    sharing: bool,

    /// Messages under way, as a set of bits: any may arrive next, twice or never.
    under_way: u16,
}

impl World {
    /// `owed`: the target's copy will run before it has every page. `sharing`: both use the same files.
    pub(super) fn first(owed: bool, sharing: bool) -> World {
        World {
            source: Some(Course::start()),
            source_answer: None,
            source_disk: SourceRecord::Opened,
            here: Here::Running,
            hook_here: false,
            frozen_again: false,
            stale: false,
            target: Some(Course::start()),
            target_answer: None,
            target_disk: TargetRecord::Opened,
            there: There::Nothing,
            orphan: false,
            marked: false,
            owed,
            pager: Pager::Filling,
            synced: false,
            ended: false,
            restarted: false,
            sharing,
            under_way: 0,
        }
    }

    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.here == Here::Running && self.there == There::Running {
            return Err("two copies run");
        }
        if self.there == There::Running && self.stale {
            return Err("the copy runs on old memory");
        }
        if self.here == Here::Dead && !self.is_complete() {
            return Err("the source destroyed what the copy may still need");
        }
        if self.here == Here::Running && self.marked && self.target_disk != TargetRecord::Lost {
            return Err("the source runs a container whose copy is not known to be lost");
        }
        if self.target_disk == TargetRecord::Lost
            && (matches!(self.there, There::Running | There::Held) || self.orphan)
        {
            return Err("a copy that was said to be lost may run");
        }
        if self.ended && self.pager == Pager::Done && !self.restarted && self.here == Here::Running
        {
            return Err("a container that had run to its end runs again");
        }
        Ok(())
    }

    pub(super) fn has_run(&self) -> bool {
        self.marked
    }

    /// All of it is in its place and on disk, and the target has that on record.
    fn is_complete(&self) -> bool {
        self.target_disk == TargetRecord::Complete
            && self.pager == Pager::Done
            && self.synced
            && !self.owed
    }

    /// Both ends know the outcome, nothing is left to do, and exactly one copy runs.
    pub(super) fn is_settled(&self) -> bool {
        let source = self
            .source
            .as_ref()
            .is_some_and(|course| course.state().is_settled() && course.is_idle());
        let target = self
            .target
            .as_ref()
            .is_some_and(|course| course.state().is_settled() && course.is_idle());
        let one = match (self.here, self.there) {
            (Here::Running, There::Nothing | There::Gone) => true,
            (Here::Dead, There::Running) => true,
            // It ran at the target and ended there, as any container may, or with its host.
            (Here::Dead, There::Gone) => self.marked,
            // Nothing runs, and a person is told.
            (Here::Frozen, There::Gone) => self.sharing && self.target_disk == TargetRecord::Lost,
            _ => false,
        };
        let source = source
            || self
                .source
                .as_ref()
                .is_some_and(|course| course.state() == SourceState::Stranded && course.is_idle());
        source
            && target
            && one
            && !self.orphan
            && self.source_answer.is_none()
            && self.target_answer.is_none()
    }

    /// Every world one step away.
    pub(super) fn steps(&self, flaw: Flaw) -> Result<Steps, String> {
        let mut steps = Steps::new();
        self.source_steps(flaw, &mut steps)?;
        self.target_steps(flaw, &mut steps)?;
        self.network_steps(&mut steps)?;
        self.pages_steps(&mut steps);
        self.copy_steps(&mut steps);
        if self.orphan {
            self.orphan_hook(flaw, &mut steps);
        }
        Ok(steps)
    }

    /// Pages cross while both ends work, whatever becomes of the messages; a copy that ended needs none.
    fn pages_steps(&self, steps: &mut Steps) {
        let served = self.here == Here::Frozen
            && self.there == There::Running
            && self.target.is_some()
            && self
                .source
                .as_ref()
                .is_some_and(|course| course.state() == SourceState::Serving);
        if self.owed && (served || self.there == There::Gone && self.marked) {
            let mut whole = self.clone();
            whole.owed = false;
            steps.push((Kind::Works, whole));
        }
        // The pager works by itself, with or without an agent.
        if !self.owed && self.pager == Pager::Filling && self.marked && self.there != There::Held {
            let mut done = self.clone();
            done.pager = Pager::Done;
            steps.push((Kind::Works, done));
        }
    }

    /// What becomes of the copy and of its pager, whoever is alive to see it.
    fn copy_steps(&self, steps: &mut Steps) {
        if self.pager == Pager::Filling && self.marked {
            let mut lost = self.clone();
            lost.pager = Pager::Dead;
            steps.push((Kind::Fails, lost));
        }
        if self.there == There::Running && !self.ended {
            let mut ended = self.clone();
            ended.there = There::Gone;
            ended.ended = true;
            steps.push((Kind::Fails, ended));
        }
        if !self.restarted && self.there != There::Nothing {
            let mut restarted = self.clone();
            restarted.restarted = true;
            restarted.target = None;
            restarted.target_answer = None;
            restarted.orphan = false;
            restarted.there = There::Gone;
            if restarted.pager == Pager::Filling {
                restarted.pager = Pager::Dead;
            }
            steps.push((Kind::Fails, restarted));
        }
    }

    fn network_steps(&self, steps: &mut Steps) -> Result<(), String> {
        use Message::*;
        for message in [
            Skeleton, Commit, Query, Abort, Prepared, Serving, Complete, Lost, RolledBack, Pending,
        ] {
            if !self.carries(message) {
                continue;
            }
            let mut lost = self.clone();
            lost.under_way &= !bit(message);
            steps.push((Kind::Fails, lost.clone()));
            let arrived = match message {
                Skeleton => lost.target_sees(TargetEvent::SkeletonComplete)?,
                Commit => lost.target_sees(TargetEvent::Commit)?,
                Query => lost.target_sees(TargetEvent::Query)?,
                Abort => lost.target_sees(TargetEvent::Abort)?,
                Prepared => lost.source_sees(SourceEvent::TargetPrepared)?,
                Serving => lost.source_sees(SourceEvent::TargetSaysServing)?,
                Complete => lost.source_sees(SourceEvent::TargetSaysComplete)?,
                Lost if self.sharing => lost.source_sees(SourceEvent::TargetSaysLostSharing)?,
                Lost => lost.source_sees(SourceEvent::TargetSaysLost)?,
                RolledBack => lost.source_sees(SourceEvent::TargetSaysRolledBack)?,
                Pending => lost.source_sees(SourceEvent::TargetSaysPending)?,
            };
            let Some(arrived) = arrived else { continue };
            // Only what is sent in datagrams of their own could come twice; a question and its answers may, on
            // a second connection.
            if matches!(
                message,
                Query | Commit | Serving | Complete | Lost | RolledBack
            ) {
                let mut twice = arrived.clone();
                twice.under_way |= bit(message);
                steps.push((Kind::Fails, twice));
            }
            steps.push((Kind::Works, arrived));
        }
        Ok(())
    }

    fn source_steps(&self, flaw: Flaw, steps: &mut Steps) -> Result<(), String> {
        let Some(course) = &self.source else {
            let mut back = self.clone();
            back.source = Some(Course::recover(self.source_disk));
            steps.push((Kind::Works, back));
            return Ok(());
        };
        let state = course.state();
        let mut dead = self.clone();
        dead.source = None;
        dead.source_answer = None;
        dead.hook_here = false;
        steps.push((Kind::Fails, dead.clone()));
        if self.here == Here::Frozen && !self.frozen_again {
            // The hook sees its agent go and fails the dump; CRIU lets the tasks run.
            dead.here = Here::Running;
            dead.stale = true;
            steps.push((Kind::Fails, dead));
        }

        if let Some(answer) = self.source_answer {
            let mut told = self.clone();
            told.source_answer = None;
            steps.extend(told.source_sees(answer)?.map(|world| (Kind::Works, world)));
        } else {
            let mut acting = self.clone();
            let action = acting.source.as_mut().and_then(Course::next_action);
            if let Some(action) = action {
                acting.source_does(action, flaw, steps);
            } else if state == SourceState::Copying {
                steps.extend(
                    self.source_sees(SourceEvent::FreezeOrdered)?
                        .map(|world| (Kind::Works, world)),
                );
            }
        }

        // Time passes: whoever waits for something that does not come gives up waiting, or asks again.
        let waits = if matches!(state, SourceState::Unknown | SourceState::Serving) {
            SourceEvent::PeerLost
        } else {
            SourceEvent::Timeout
        };
        if !(flaw == Flaw::NeverAsks && state == SourceState::Unknown) {
            steps.extend(self.source_sees(waits)?.map(|world| (Kind::Works, world)));
        }
        for event in [
            SourceEvent::PeerLost,
            SourceEvent::UserCancelled,
            SourceEvent::LocalFailure,
        ] {
            if flaw == Flaw::NeverAsks && state == SourceState::Unknown {
                continue;
            }
            if flaw == Flaw::SilenceMeansNo
                && event == SourceEvent::PeerLost
                && state == SourceState::CommitSent
            {
                steps.extend(
                    self.source_sees(SourceEvent::TargetSaysRolledBack)?
                        .map(|world| (Kind::Fails, world)),
                );
            }
            steps.extend(self.source_sees(event)?.map(|world| (Kind::Fails, world)));
        }
        if self.hook_here {
            // CRIU is killed. Its tasks run unless the cgroup was frozen again.
            let mut killed = self.clone();
            killed.hook_here = false;
            if self.here == Here::Frozen && !self.frozen_again {
                killed.here = Here::Running;
                killed.stale = true;
            }
            // The agent may hear of it much later, or never before it acts.
            steps.push((Kind::Fails, killed.clone()));
            steps.extend(
                killed
                    .source_sees(SourceEvent::HookLost)?
                    .map(|world| (Kind::Fails, world)),
            );
        }
        Ok(())
    }

    fn source_does(mut self, action: SourceAction, flaw: Flaw, steps: &mut Steps) {
        use SourceAction::*;
        match action {
            FreezeContainer => {
                if self.here == Here::Running {
                    self.here = Here::Frozen;
                }
                steps.push((
                    Kind::Fails,
                    self.clone().source_answers(SourceEvent::FreezeFailed),
                ));
                steps.push((Kind::Works, self.source_answers(SourceEvent::CgroupFrozen)));
            }
            DumpSkeleton => steps.push((Kind::Works, self)),
            SendDelta => {
                steps.push((
                    Kind::Fails,
                    self.clone().source_answers(SourceEvent::CriuFailed),
                ));
                self.hook_here = true;
                steps.push((Kind::Works, self.source_answers(SourceEvent::HoldReached)));
            }
            FreezeAgain => {
                if self.here == Here::Running {
                    self.here = Here::Frozen;
                }
                self.frozen_again = true;
                steps.push((Kind::Works, self));
            }
            SendImages => steps.push((Kind::Works, self.sends(Message::Skeleton))),
            ConfirmHold => {
                let holds =
                    self.hook_here && self.here == Here::Frozen || flaw == Flaw::HoldNotConfirmed;
                let answer = if holds {
                    SourceEvent::HoldConfirmed
                } else {
                    SourceEvent::HoldBroken
                };
                steps.push((Kind::Works, self.source_answers(answer)));
            }
            RecordDeciding if flaw == Flaw::DecidingIsNotDurable => {
                steps.push((Kind::Works, self.source_answers(SourceEvent::RecordWritten)));
            }
            RecordDeciding => self.source_writes(SourceRecord::Deciding, steps),
            RecordServing => self.source_writes(SourceRecord::Serving, steps),
            RecordCommitted => self.source_writes(SourceRecord::Committed, steps),
            RecordRolledBack => self.source_writes(SourceRecord::RolledBack, steps),
            RecordClosed => self.source_writes(SourceRecord::Closed, steps),
            SendCommit => steps.push((Kind::Works, self.sends(Message::Commit))),
            AskTarget | ServePages => steps.push((Kind::Works, self.sends(Message::Query))),
            AbortTarget => steps.push((Kind::Works, self.sends(Message::Abort))),
            DestroyFrozenCopy => {
                self.here = Here::Dead;
                steps.push((Kind::Works, self));
            }
            ResumeContainer => {
                if self.here == Here::Frozen {
                    self.here = Here::Running;
                    self.stale = true;
                }
                self.hook_here = false;
                steps.push((Kind::Works, self));
            }
        }
    }

    fn source_writes(self, record: SourceRecord, steps: &mut Steps) {
        let mut written = self.clone();
        written.source_disk = record;
        steps.push((Kind::Fails, self.source_answers(SourceEvent::RecordFailed)));
        // Reported as failed and there all the same.
        steps.push((
            Kind::Fails,
            written.clone().source_answers(SourceEvent::RecordFailed),
        ));
        steps.push((
            Kind::Works,
            written.source_answers(SourceEvent::RecordWritten),
        ));
    }

    fn target_steps(&self, flaw: Flaw, steps: &mut Steps) -> Result<(), String> {
        let Some(course) = &self.target else {
            let mut back = self.clone();
            back.target = Some(Course::recover(self.target_disk));
            steps.push((Kind::Works, back));
            return Ok(());
        };
        let mut dead = self.clone();
        dead.target = None;
        dead.target_answer = None;
        dead.orphan = self.orphan || self.there == There::Held;
        steps.push((Kind::Fails, dead));

        if let Some(answer) = self.target_answer {
            let mut told = self.clone();
            told.target_answer = None;
            steps.extend(told.target_sees(answer)?.map(|world| (Kind::Works, world)));
        } else {
            let mut acting = self.clone();
            if let Some(action) = acting.target.as_mut().and_then(Course::next_action) {
                acting.target_does(action, flaw, steps);
            } else if let Some(news) = self.news_of_copy(course.state(), flaw) {
                steps.extend(self.target_sees(news)?.map(|world| (Kind::Works, world)));
            }
        }

        steps.extend(
            self.target_sees(TargetEvent::Timeout)?
                .map(|world| (Kind::Works, world)),
        );
        for event in [TargetEvent::PeerLost, TargetEvent::LocalFailure] {
            steps.extend(self.target_sees(event)?.map(|world| (Kind::Fails, world)));
        }
        if self.there == There::Held && !self.orphan {
            // Hook or CRIU is killed: the restore fails and no task ran. Heard of now, or later by acting.
            let mut failed = self.clone();
            failed.there = There::Gone;
            steps.push((Kind::Fails, failed.clone()));
            if course.state() != TargetState::Receiving {
                steps.extend(
                    failed
                        .target_sees(TargetEvent::HookLost)?
                        .map(|world| (Kind::Fails, world)),
                );
            }
        }
        Ok(())
    }

    /// What a look at a copy that was released tells.
    fn news_of_copy(&self, state: TargetState, flaw: Flaw) -> Option<TargetEvent> {
        match (state, self.pager) {
            (TargetState::Released, _) if self.restarted => Some(TargetEvent::FoundLost),
            (TargetState::Released, Pager::Done) => Some(TargetEvent::PagerDone),
            (TargetState::Released, Pager::Dead) => Some(TargetEvent::PagerLost),
            (TargetState::Released, Pager::Filling) if flaw == Flaw::CompleteSaidBeforeItIs => {
                Some(TargetEvent::PagerDone)
            }
            _ => None,
        }
    }

    fn target_does(mut self, action: TargetAction, flaw: Flaw, steps: &mut Steps) {
        use TargetAction::*;
        match action {
            StartRestore => {
                steps.push((
                    Kind::Fails,
                    self.clone().target_answers(TargetEvent::RestoreFailed),
                ));
                self.there = There::Held;
                steps.push((Kind::Works, self.target_answers(TargetEvent::HookReached)));
            }
            VerifyCopy => {
                steps.push((
                    Kind::Fails,
                    self.clone().target_answers(TargetEvent::LocalFailure),
                ));
                steps.push((Kind::Works, self.target_answers(TargetEvent::CopyVerified)));
            }
            RecordPrepared => self.target_writes(TargetRecord::Prepared, steps),
            RecordCommitted => {
                if flaw == Flaw::CompleteSaidBeforeRelease {
                    self.under_way |= bit(Message::Complete);
                }
                self.target_writes(TargetRecord::Committed, steps);
            }
            RecordReleased => self.target_writes(TargetRecord::Released, steps),
            RecordAborted => self.target_writes(TargetRecord::Aborted, steps),
            AnswerPrepared => steps.push((Kind::Works, self.sends(Message::Prepared))),
            RecordComplete => self.target_writes(TargetRecord::Complete, steps),
            RecordLost => self.target_writes(TargetRecord::Lost, steps),
            AnswerCommitted if flaw == Flaw::CompleteSaidAtRelease => {
                steps.push((Kind::Works, self.sends(Message::Complete)))
            }
            AnswerCommitted => steps.push((Kind::Works, self.sends(Message::Serving))),
            AnswerComplete => steps.push((Kind::Works, self.sends(Message::Complete))),
            AnswerLost => steps.push((Kind::Works, self.sends(Message::Lost))),
            SyncFiles => {
                steps.push((
                    Kind::Fails,
                    self.clone().target_answers(TargetEvent::SyncFailed),
                ));
                self.synced |= flaw != Flaw::FilesNotSynced;
                steps.push((Kind::Works, self.target_answers(TargetEvent::FilesSynced)));
            }
            KillCopy => {
                steps.push((
                    Kind::Fails,
                    self.clone().target_answers(TargetEvent::KillFailed),
                ));
                if flaw != Flaw::LostSaidBeforeKill {
                    self.there = There::Gone;
                }
                steps.push((Kind::Works, self.target_answers(TargetEvent::CopyKilled)));
            }
            AnswerRolledBack => steps.push((Kind::Works, self.sends(Message::RolledBack))),
            AnswerPending => steps.push((Kind::Works, self.sends(Message::Pending))),
            StartOrphanTimer => steps.push((Kind::Works, self)),
            ReleaseCopy if self.there == There::Held => {
                let mut failed = self.clone();
                failed.there = There::Gone;
                steps.push((
                    Kind::Fails,
                    failed.clone().target_answers(TargetEvent::HookLost),
                ));
                // Failed after its tasks may have run.
                failed.marked = true;
                steps.push((
                    Kind::Fails,
                    failed.target_answers(TargetEvent::RestoreFailed),
                ));
                self.there = There::Running;
                self.marked = true;
                steps.push((Kind::Works, self.target_answers(TargetEvent::Resumed)));
            }
            ReleaseCopy => {
                steps.push((Kind::Works, self.target_answers(TargetEvent::RestoreFailed)))
            }
            InspectCopy if self.there == There::Held => {
                // It waits until the restore has ended: put back.
                let mut waiting = self;
                if let Some(course) = &mut waiting.target {
                    course.pending.push_front(InspectCopy);
                }
                steps.push((Kind::Works, waiting));
            }
            InspectCopy => {
                let answer = match (self.there, self.marked) {
                    // The mark may not have reached the disk.
                    _ if self.restarted => TargetEvent::FoundLost,
                    (There::Running, _) => TargetEvent::FoundRunning,
                    (_, true) => TargetEvent::FoundGone,
                    (_, false) => TargetEvent::FoundNeverRan,
                };
                steps.push((Kind::Works, self.target_answers(answer)));
            }
            DiscardCopy => {
                steps.push((
                    Kind::Fails,
                    self.clone().target_answers(TargetEvent::DiscardFailed),
                ));
                if flaw == Flaw::RolledBackSaidBeforeDiscard {
                    self.under_way |= bit(Message::RolledBack);
                    steps.push((
                        Kind::Fails,
                        self.clone().target_answers(TargetEvent::DiscardFailed),
                    ));
                }
                if self.there == There::Held {
                    self.there = There::Gone;
                }
                self.orphan = false;
                steps.push((Kind::Works, self.target_answers(TargetEvent::CopyDiscarded)));
            }
        }
    }

    fn target_writes(self, record: TargetRecord, steps: &mut Steps) {
        let mut written = self.clone();
        written.target_disk = record;
        steps.push((Kind::Fails, self.target_answers(TargetEvent::RecordFailed)));
        steps.push((
            Kind::Fails,
            written.clone().target_answers(TargetEvent::RecordFailed),
        ));
        steps.push((
            Kind::Works,
            written.target_answers(TargetEvent::RecordWritten),
        ));
    }

    /// The hook lost its agent and reads the journal.
    fn orphan_hook(&self, flaw: Flaw, steps: &mut Steps) {
        let mut done = self.clone();
        done.orphan = false;
        done.there = There::Gone;
        // Killed, or told by the record to fail the restore.
        steps.push((Kind::Fails, done.clone()));
        if self.target_disk.hook_lets_go() || flaw == Flaw::HookLetsGoWithoutRecord {
            done.there = There::Running;
            done.marked = true;
        }
        steps.push((Kind::Works, done));
    }

    fn source_sees(&self, event: SourceEvent) -> Result<Option<World>, String> {
        let mut world = self.clone();
        let Some(course) = &mut world.source else {
            return Ok(None);
        };
        course
            .on(event)
            .map_err(|impossible| format!("{impossible}\nin {self:?}"))?;
        Ok(Some(world))
    }

    fn target_sees(&self, event: TargetEvent) -> Result<Option<World>, String> {
        let mut world = self.clone();
        let Some(course) = &mut world.target else {
            return Ok(None);
        };
        course
            .on(event)
            .map_err(|impossible| format!("{impossible}\nin {self:?}"))?;
        Ok(Some(world))
    }

    fn source_answers(mut self, event: SourceEvent) -> World {
        self.source_answer = Some(event);
        self
    }

    fn target_answers(mut self, event: TargetEvent) -> World {
        self.target_answer = Some(event);
        self
    }

    fn sends(mut self, message: Message) -> World {
        self.under_way |= bit(message);
        self
    }

    fn carries(&self, message: Message) -> bool {
        self.under_way & bit(message) != 0
    }
}

fn bit(message: Message) -> u16 {
    1 << message as u16
}
