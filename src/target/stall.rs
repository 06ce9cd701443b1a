//! How long nothing may come before it is given up: patience with a link that is dead, not with one that is slow.

use std::time::{Duration, Instant};

/// A wait that goes on as long as there is progress.
#[derive(Clone, Copy, Debug)]
pub struct Stall<T> {
    patience: Duration,
    seen: T,
    since: Instant,
}

impl<T: PartialEq> Stall<T> {
    /// Begins to wait at `now`, with this much done.
    pub fn begin(patience: Duration, seen: T, now: Instant) -> Stall<T> {
        Stall {
            patience,
            seen,
            since: now,
        }
    }

    /// How long to wait on for anything to happen; `None` if nothing has for too long.
    pub fn left(&mut self, seen: T, now: Instant) -> Option<Duration> {
        if self.seen != seen {
            (self.seen, self.since) = (seen, now);
        }
        let waited = now.saturating_duration_since(self.since);
        self.patience
            .checked_sub(waited)
            .filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_any_size_is_waited_for_and_none_is_given_up() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stall = Stall::begin(Duration::from_secs(60), 0u64, start);
        // A byte now and then, for an hour.
        for minute in 1..60 {
            assert!(stall.left(minute, at(minute * 59)).is_some());
        }
        let last = 59 * 59;
        assert_eq!(stall.left(59, at(last + 50)), Some(Duration::from_secs(10)));
        assert_eq!(stall.left(59, at(last + 60)), None);
    }
}
