//! The two ends at the source: the frozen copy dies, or the container goes on.

use super::{ABORT_PATIENCE, CRIU_PATIENCE, Handover, Signal};
use crate::migration::phase::Mark;
use crate::runtime::runc::Container;
use crate::source::dump::DumpSignal;
use crate::source::remains::{self, LeftCopy};
use crate::source::send::FrameSink;
use crate::wire::message::{self, Message};
use crate::wire::peer_error::PeerError;
use std::time::{Duration, Instant};

impl<S: FrameSink> Handover<'_, S> {
    pub(super) fn destroy_frozen_copy(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            frozen.give_away();
        }
        self.tracker = None;
        // Killed before the hook says go and before the thaw: not one instruction runs here again.
        let destroyed = remains::kill_frozen(&self.container.freezer);
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
            freezer: &self.container.freezer,
            bundle: &self.container.bundle,
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
        let deadline = Instant::now() + CRIU_PATIENCE;
        if let Some(dump) = &mut self.dump {
            dump.call_off();
            loop {
                if let Some(hold) = self.hold.take() {
                    let _ = hold.refuse();
                }
                if !matches!(dump.ended(), Ok(None)) {
                    break;
                }
                if Instant::now() > deadline {
                    let _ = dump.wait(Duration::ZERO);
                    break;
                }
                if let Ok(Signal::Dump(DumpSignal::Held(hook))) =
                    self.signals.recv_timeout(Duration::from_millis(1))
                {
                    self.hold = Some(hook);
                }
            }
        }
        if let Some(frozen) = self.frozen.take() {
            frozen.give_away();
        }
        let Container {
            id,
            freezer,
            init_pid,
            ..
        } = self.container;
        if let Err(error) = remains::let_go_on(self.runc, id, freezer, *init_pid) {
            tracing::error!(%error, "the container goes on, but not as it was");
            self.ended.untidy.get_or_insert(error.to_string());
        }
        // A container whose copy ran stood still until then.
        let stands = self.timeline.at(Mark::Committed).is_none();
        if stands && self.timeline.at(Mark::FreezeBegan).is_some() {
            self.mark(Mark::Resumed);
        }
    }

    pub(super) fn abort_target(&mut self) {
        let Some(link) = &mut self.link else { return };
        let reason = self.ended.reason.clone().unwrap_or_default();
        let abort = message::Abort {
            code: PeerError::SourceAborted,
            text: reason.as_str().into(),
        };
        if link.say(abort).is_err() {
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
