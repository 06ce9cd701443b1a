//! The frozen window: from the order to freeze until the commit. Everything that may wait in it asks here whether to go on.
//!
//! What can be interrupted is (a send is cancelled, a connection closed, a wait left). What cannot, a local disk that does not
//! answer, is done on a thread that is left behind: the container does not wait with it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How long the container may stand still before the commit, if twice what was expected is not more.
pub(super) const FROZEN_LIMIT: Duration = Duration::from_secs(60);

/// Between two looks at the clock and at the user's wish.
const LOOK: Duration = Duration::from_millis(2);

/// When the container has stood still for long enough, and who may end it sooner.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    until: Option<Instant>,
    limit: Duration,
    cancelled: &'a AtomicBool,
}

/// Why it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The user wants to stop.
    Cancelled,
    /// The container stood still for so long.
    Late(Duration),
}

impl<'a> Window<'a> {
    /// Nothing is frozen yet: only the user ends it.
    pub fn closed(cancelled: &'a AtomicBool) -> Window<'a> {
        Window {
            until: None,
            limit: Duration::MAX,
            cancelled,
        }
    }

    /// The freeze is ordered now.
    pub fn open(self, limit: Duration) -> Window<'a> {
        Window {
            until: Instant::now().checked_add(limit),
            limit,
            ..self
        }
    }

    /// Why nothing more should be waited for; `None` as long as it should.
    pub fn over(&self) -> Option<Over> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Some(Over::Cancelled);
        }
        let late = self.until.is_some_and(|until| Instant::now() > until);
        late.then_some(Over::Late(self.limit))
    }

    /// Does what cannot be interrupted, on a thread of its own. `None` if the window was over first: then the thread is left
    /// behind with all it was given, and what it does afterwards is as if it had come too late.
    pub fn apart<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (done, outcome) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name("apart".into())
            .spawn(move || drop(done.send(work())));
        if let Err(error) = thread {
            tracing::error!(%error, "no thread for what may not be waited for");
            return None;
        }
        loop {
            match outcome.recv_timeout(LOOK) {
                Ok(outcome) => return Some(outcome),
                Err(RecvTimeoutError::Timeout) if self.over().is_none() => {}
                Err(_) => return None,
            }
        }
    }

    /// What [`crate::source::link::Link`]'s futures are raced against.
    pub async fn end(&self) {
        while self.over().is_none() {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// How long the container may stand still: what is usual or twice what was expected, but no longer than what is left of the
/// time for the whole move and the downtime that the user allows.
pub(super) fn limit(
    expected: Duration,
    timeout: Duration,
    elapsed: Duration,
    downtime_limit: Duration,
) -> Duration {
    let left = timeout.saturating_sub(elapsed);
    FROZEN_LIMIT
        .max(expected.saturating_mul(2))
        .min(left.saturating_add(downtime_limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_limit_follows_what_was_expected_and_what_the_user_allows() {
        let hour = 3600 * SECOND;
        let downtime = Duration::from_millis(300);
        assert_eq!(limit(SECOND, hour, SECOND, downtime), FROZEN_LIMIT);
        assert_eq!(limit(90 * SECOND, hour, SECOND, downtime), 180 * SECOND);
        assert_eq!(
            limit(SECOND, 10 * SECOND, 8 * SECOND, downtime),
            2 * SECOND + downtime
        );
        assert_eq!(limit(SECOND, 2 * SECOND, 9 * SECOND, downtime), downtime);
        assert!(limit(Duration::MAX, Duration::MAX, SECOND, downtime) > hour);
    }

    #[test]
    fn what_does_not_end_is_left_behind_when_time_is_up_or_the_user_wants_to() {
        let cancelled = AtomicBool::new(false);
        let window = Window::closed(&cancelled);
        assert_eq!(window.apart(|| 7), Some(7));
        let (_never, waits) = mpsc::channel::<()>();
        let late = window.open(Duration::from_millis(20));
        assert_eq!(late.apart(move || waits.recv().is_ok()), None);
        assert_eq!(late.over(), Some(Over::Late(Duration::from_millis(20))));
        let (_never, waits) = mpsc::channel::<()>();
        cancelled.store(true, Ordering::Relaxed);
        assert_eq!(
            window
                .open(Duration::MAX)
                .apart(move || waits.recv().is_ok()),
            None
        );
        assert_eq!(window.over(), Some(Over::Cancelled));
    }
}
