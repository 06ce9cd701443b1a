//! From the release of the copy until it is complete: what is frozen here is kept, and in post-copy brings what the copy lacks.
//!
//! ```text
//!  post-copy: freeze ─▶ send_delta: only what cannot be lazy ─▶ send_images: the rest is declared owed, the service begins
//!  commit ─▶ the copy runs ─▶ it is waited for, and served, over a new connection if need be
//!                               ├─▶ complete: what is frozen here dies
//!                               └─▶ lost: what is frozen here goes on, or waits for a person if both used the same files
//! ```

use super::Handover;
use crate::migration::event::Event;
use crate::migration::handoff::SourceEvent;
use crate::migration::journal::{Owing, OwingSpace, ProcessName};
use crate::migration::mode::Switch;
use crate::runtime::Task;
use crate::source::preflight::writes_to_bind_mounts;
use crate::source::resume::{Owed, Told};
use crate::source::send::{FrameSink, PagesToSend};
use crate::source::serve::{PageServer, Served};
use crate::source::settle;
use crate::wire::message::{Fate, RootfsMode, Whole};
use std::time::{Duration, Instant};

/// How often is told how far the serving is.
const PROGRESS_PERIOD: Duration = Duration::from_millis(200);

impl<S: FrameSink> Handover<'_, S> {
    pub(super) fn is_post_copy(&self) -> bool {
        self.switch == Switch::PostCopy
    }

    /// Begins to send owed pages. CRIU's restore may touch some of them, so this does not wait for the commit.
    pub(super) fn start_service(&mut self) -> Result<(), String> {
        let Some(link) = self.link.as_ref().filter(|_| !self.owed.is_empty()) else {
            return Ok(());
        };
        let server = PageServer::new(self.owed.clone(), self.plan.compression)
            .map_err(|error| error.to_string())?;
        self.progress = Some(server.progress());
        let serving = server.attach(link.connection());
        self.server = Some(serving.map_err(|error| error.to_string())?);
        Ok(())
    }

    /// A service that ended has told the target why by closing the connection; what is left to do is to say so here.
    pub(super) fn service_failed(&mut self) -> Option<SourceEvent> {
        let server = self.server.take_if(|server| server.is_over())?;
        let (_, served) = server.wait();
        let Err(error) = served else {
            self.served = true;
            return None;
        };
        if self.course.state().is_settled() {
            return None;
        }
        self.link = None;
        self.because(format!(
            "serving owed pages: {}",
            crate::chain::one_line(&error)
        ));
        Some(SourceEvent::PeerLost)
    }

    /// What recovery needs to go on in our place. Taken down while the tasks are held: later a pid could be another process's.
    pub(super) fn take_down_owing(&self) -> Owing {
        let space = |pages: &PagesToSend| OwingSpace {
            space: pages.space,
            process: ProcessName {
                pid: pages.pid,
                start_time: Task::read(pages.pid)
                    .ok()
                    .flatten()
                    .map_or(0, |task| task.start_time),
            },
        };
        Owing {
            spaces: self.owed.iter().map(space).collect(),
            reconnect_s: self.plan.reconnect_timeout.as_secs(),
            bandwidth_limit: self.plan.bandwidth_limit,
            shares_files: self.plan.rootfs == RootfsMode::Shared
                || writes_to_bind_mounts(&self.container.spec),
        }
    }

    /// Every owed page has arrived.
    pub(super) fn heard_whole(&mut self, whole: Whole) {
        let duration = Duration::from_micros(whole.after_release_us);
        if self.ended.whole.is_none() {
            self.ended.whole = Some(duration);
            (self.emit)(Event::Whole { duration });
        }
    }

    /// What the target says, unasked, of a copy that it let run.
    pub(super) fn heard_outcome(&mut self, fate: Fate) -> Option<SourceEvent> {
        let event = match fate {
            Fate::Complete => SourceEvent::TargetSaysComplete,
            Fate::Lost => SourceEvent::TargetSaysLost,
            fate => {
                self.because(format!("the target said {fate:?} out of turn"));
                return Some(SourceEvent::PeerRefused);
            }
        };
        Some(self.if_lost(event))
    }

    /// What a lost copy means for what is frozen here.
    pub(super) fn if_lost(&mut self, event: SourceEvent) -> SourceEvent {
        if event == SourceEvent::TargetSaysLost {
            self.ended.reason = Some(settle::LOST.into());
        }
        event.with_files_shared(self.owing.shares_files)
    }

    /// Over a connection that lives it goes on by itself; without one the target is looked for.
    pub(super) fn serve_pages(&mut self) -> Option<SourceEvent> {
        let served = self.owed.is_empty() || self.server.is_some() || self.served;
        if self.link.is_some() && served {
            return None;
        }
        // Nothing that matters comes over it any more.
        self.link = None;
        self.server = None;
        let owing = self.owing.clone();
        let Some(target_journal) = self.target_journal else {
            return Some(SourceEvent::TargetUnreachable);
        };
        let owed = Owed {
            state_dir: &self.plan.state_dir,
            target: &self.plan.target,
            peer: &self.peer,
            migration: self.migration,
            target_journal,
            owing: &owing,
        };
        let patience = self.plan.reconnect_timeout;
        if self.lost.is_some() {
            std::thread::sleep(settle::PAUSE);
        } else {
            let reason = self.ended.reason.clone().unwrap_or_default();
            (self.emit)(Event::LinkLost { reason, patience });
            self.lost = Some(Instant::now());
        }
        let (emit, lost) = (self.emit, &mut self.lost);
        let since = *lost;
        let (mut whole, mut filled) = (None, None);
        let (event, reason) = owed.serve(&mut |told| match told {
            Told::Connected { owed } => {
                let duration = since.map_or(Duration::ZERO, |since| since.elapsed());
                // Only a word is waited for, and the line for it is there.
                if !owed {
                    *lost = None;
                }
                emit(Event::LinkBack { duration });
            }
            Told::Progress(served) => {
                // A link over which nothing goes is as good as none.
                if served.has_sent() {
                    *lost = None;
                }
                emit(event_of(&served));
            }
            Told::Whole(said) => whole = Some(said),
            Told::Filled(said) => filled = Some(said),
        });
        if let Some(whole) = whole {
            self.heard_whole(whole);
        }
        self.ended.filled = self.ended.filled.or(filled);
        self.ended.reason = Some(reason.clone());
        match event {
            SourceEvent::TargetSaysComplete | SourceEvent::TargetSaysLost => {}
            // It is there: only one that is not is given up in the end.
            SourceEvent::TargetSaysPending => self.lost = Some(Instant::now()),
            _ if self.lost.is_none() => {
                (self.emit)(Event::LinkLost { reason, patience });
                self.lost = Some(Instant::now());
            }
            _ => {}
        }
        Some(self.if_lost(event))
    }

    /// Now and then says how far the service is.
    pub(super) fn tell_serving(&mut self) {
        let due = self
            .serving_told
            .is_none_or(|told| told.elapsed() > PROGRESS_PERIOD);
        if due
            && self.committed_told
            && self.server.is_some()
            && let Some(progress) = &self.progress
        {
            self.serving_told = Some(Instant::now());
            (self.emit)(event_of(&progress.now()));
        }
    }
}

fn event_of(served: &Served) -> Event {
    Event::Serving {
        pages_left: served.pages_left,
        bytes_wire: served.pushed_bytes + served.answered_bytes,
        faults: served.faults,
    }
}
