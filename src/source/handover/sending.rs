//! Pages are sent on other threads, so that the one that decides can go on looking whether they are still wanted.

use super::Handover;
use crate::source::send::{FrameSink, Progress, Sender};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// How long a sender that is told to stop may take: the frame in hand goes out, unless the target takes none.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

impl<S: FrameSink> Handover<'_, S> {
    /// Has `work` done with the sender while `unwanted`, asked again and again, says no. Then the sender stops at its next
    /// frame, and if the target takes none, the connection ends with it.
    pub(in crate::source) fn with_sender<T: Send>(
        &mut self,
        progress: &Progress,
        work: impl FnOnce(&mut Sender<S>) -> T + Send,
        mut unwanted: impl FnMut(&mut Self) -> bool,
    ) -> Result<T, SenderGone> {
        let mut sender = self.sender.take().ok_or(SenderGone)?;
        let done = thread::scope(|scope| {
            let working = scope.spawn(|| work(&mut sender));
            let mut stopped: Option<Instant> = None;
            while !working.is_finished() {
                match stopped {
                    None if unwanted(self) => {
                        progress.cancelled.store(true, Ordering::Relaxed);
                        stopped = Some(Instant::now());
                    }
                    Some(since) if since.elapsed() > STOP_PATIENCE => {
                        if let Some(link) = &self.link {
                            link.break_off();
                        }
                        thread::sleep(LOOK);
                    }
                    _ => thread::sleep(LOOK),
                }
            }
            working
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        self.sender = Some(sender);
        Ok(done)
    }
}

/// Between two looks: what is waited for here adds to the downtime.
const LOOK: Duration = Duration::from_micros(200);

/// The page streams were taken out before.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the page streams are gone")]
pub struct SenderGone;
