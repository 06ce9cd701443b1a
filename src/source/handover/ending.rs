//! The two ends at the source: the frozen copy dies, or the container goes on.

use super::{ABORT_PATIENCE, CRIU_PATIENCE, Handover, Signal, in_time};
use crate::migration::phase::Mark;
use crate::migration::report::StaysAs;
use crate::runtime::runc::Container;
use crate::runtime::stopped::stop_again;
use crate::source::dump::{Dump, DumpSignal};
use crate::source::going_on::{self, GoesOn};
use crate::source::remains::{self, LeftCopy};
use crate::source::send::FrameSink;
use crate::wire::message::{self, Message};
use crate::wire::peer_error::PeerError;
use std::time::{Duration, Instant};

/// How long a CRIU that should let go may do nothing before the container is thawed around it.
const THAW_PATIENCE: Duration = Duration::from_secs(1);

/// How long it may do nothing, thawed, before it is killed.
const STUCK_PATIENCE: Duration = Duration::from_secs(5);

impl<S: FrameSink> Handover<'_, S> {
    pub(super) fn destroy_frozen_copy(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            frozen.give_away();
        }
        self.tracker = None;
        // Killed before the hook says go and before the thaw: not one instruction runs here again.
        let destroyed = remains::kill_frozen(&self.container.freezer, &self.container.instance);
        if let Some(hold) = self.hold.take() {
            let _ = hold.go();
        }
        let ended = self.dump.as_mut().map(|dump| dump.wait(CRIU_PATIENCE));
        if let Some(Err(error)) = ended {
            tracing::warn!(%error, "the dump of the container that moved away did not end");
        }
        let copy = LeftCopy {
            runc: self.runc,
            id: &self.container.id,
            instance: &self.container.instance,
            freezer: &self.container.freezer,
            came_by: self.container.came_by(&self.plan.state_dir),
            state_dir: &self.plan.state_dir,
        };
        let destroyed = destroyed.and_then(|()| copy.destroy());
        if let Err(error) = destroyed {
            tracing::error!(%error, "the container moved away, but something of it is left here");
            self.ended.untidy.get_or_insert(error.to_string());
        }
    }

    pub(super) fn resume_container(&mut self) {
        // Tracking costs the container a fault per written page; it is over.
        self.tracker = None;
        self.end_dump();
        if let Some(frozen) = self.frozen.take() {
            frozen.give_away();
        }
        if self.timeline.at(Mark::FreezeBegan).is_none() {
            // Whoever stopped it in the meantime is its user.
            return;
        }
        let Container {
            id,
            freezer,
            instance,
            ..
        } = self.container;
        if self.is_ours_to_thaw() {
            stop_again(&self.stopped);
            if let Err(error) = remains::let_go_on(self.runc, id, freezer, instance) {
                tracing::error!(%error, "the container goes on, but not as it was");
                self.ended.untidy.get_or_insert(error.to_string());
            }
            let dump = self.dump.as_ref().map(Dump::processes);
            match going_on::make_sure(freezer, instance, dump) {
                Ok(GoesOn::Yes) => {}
                Ok(GoesOn::Ended) => self.ended.stays = StaysAs::Ended,
                Err(error) => {
                    tracing::error!(%error, "the container does not go on");
                    self.ended.stands_still = Some(error.to_string());
                }
            }
        } else {
            self.ended.stays = match going_on::has_ended(freezer) {
                true => StaysAs::Ended,
                false => StaysAs::Paused,
            };
        }
        // A container whose copy ran stood still until then.
        if self.timeline.at(Mark::Committed).is_none() {
            self.mark(Mark::Resumed);
        }
    }

    /// Whether it is frozen by us: what its user paused stays paused.
    fn is_ours_to_thaw(&self) -> bool {
        !self.paused && self.timeline.at(Mark::FreezeBegan).is_some()
    }

    /// Has CRIU let go of what it holds: by the answer of its hooks, or if it does not get on, by a thaw that may be what it
    /// waits for, and in the end by force. Forced in the middle of its work it may leave connections in repair mode.
    fn end_dump(&mut self) {
        let thaws = self.is_ours_to_thaw();
        let Some(dump) = &mut self.dump else { return };
        dump.call_off();
        let began = Instant::now();
        let (mut progress, mut moved) = (dump.progress(), began);
        let mut killed = false;
        loop {
            if let Some(hold) = self.hold.take() {
                let _ = hold.refuse();
            }
            // A runtime that was killed leaves a CRIU that goes on with its dump.
            if !matches!(dump.ended(), Ok(None)) && dump.processes().living().is_empty() {
                return;
            }
            if dump.progress() != progress {
                (progress, moved) = (dump.progress(), Instant::now());
            }
            if moved.elapsed() > THAW_PATIENCE {
                dump.processes().wake();
            }
            if thaws && moved.elapsed() > THAW_PATIENCE {
                let _ = remains::thaw(&self.container.freezer, &self.container.instance);
            }
            if moved.elapsed() > STUCK_PATIENCE || began.elapsed() > CRIU_PATIENCE {
                if killed {
                    tracing::error!("the dump was killed and does not die");
                    return;
                }
                dump.processes().kill();
                (killed, moved) = (true, Instant::now());
            }
            if let Ok(Signal::Dump(DumpSignal::Held(hook))) =
                self.signals.recv_timeout(Duration::from_millis(1))
            {
                self.hold = Some(hook);
            }
        }
    }

    pub(super) fn abort_target(&mut self) {
        let Some(link) = &mut self.link else { return };
        let reason = self.ended.reason.clone().unwrap_or_default();
        let abort = message::Abort {
            code: PeerError::SourceAborted,
            text: reason.as_str().into(),
        };
        if link.say_within(abort, &in_time(ABORT_PATIENCE)).is_err() {
            return;
        }
        let deadline = Instant::now() + ABORT_PATIENCE;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.signals.recv_timeout(left) {
                Ok(Signal::Heard(Ok(Message::RolledBack(_)) | Err(_))) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }
}
