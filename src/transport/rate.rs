//! The bandwidth limit: a token bucket that every bulk sender of a connection draws from.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// A limit in bytes per second shared by all senders, or none.
#[derive(Debug)]
pub struct RateLimit {
    bucket: Mutex<Option<TokenBucket>>,
    changed: Notify,
}

impl RateLimit {
    /// A limit of `bytes_per_second`, or none.
    pub fn new(bytes_per_second: Option<NonZeroU64>) -> RateLimit {
        RateLimit {
            bucket: Mutex::new(bytes_per_second.map(|rate| TokenBucket::new(rate, Instant::now()))),
            changed: Notify::new(),
        }
    }

    /// Changes the limit; who waits because of the old one goes on at once.
    pub fn set(&self, bytes_per_second: Option<NonZeroU64>) {
        *self.lock() = bytes_per_second.map(|rate| TokenBucket::new(rate, Instant::now()));
        self.changed.notify_waiters();
    }

    /// Waits until `bytes` may be sent.
    pub async fn acquire(&self, bytes: usize) {
        // Registered before the bucket is read, so that a change in between is not missed.
        let changed = self.changed.notified();
        let wait = match self.lock().as_mut() {
            Some(bucket) => bucket.take(bytes as u64, Instant::now()),
            None => return,
        };
        if !wait.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<TokenBucket>> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tokens are bytes; they may be owed, and who owes waits.
#[derive(Debug)]
struct TokenBucket {
    rate: f64,
    tokens: f64,
    capacity: f64,
    at: Instant,
}

/// How much may be sent at once after a pause. Short, so that the limit holds on the scale of a round trip or two.
const BURST: Duration = Duration::from_millis(20);

impl TokenBucket {
    fn new(rate: NonZeroU64, now: Instant) -> TokenBucket {
        let rate = rate.get() as f64;
        let capacity = rate * BURST.as_secs_f64();
        TokenBucket {
            rate,
            tokens: capacity,
            capacity,
            at: now,
        }
    }

    /// Takes `bytes` and says how long to wait before they are sent.
    fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.rate).min(self.capacity) - bytes as f64;
        self.at = now;
        Duration::try_from_secs_f64(-self.tokens / self.rate).unwrap_or(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn rate(bytes_per_second: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(bytes_per_second)
    }

    #[tokio::test(start_paused = true)]
    async fn senders_share_the_limit() {
        let limit = Arc::new(RateLimit::new(rate(1_000_000)));
        let start = Instant::now();
        let senders: Vec<_> = (0..4)
            .map(|_| {
                let limit = limit.clone();
                tokio::spawn(async move {
                    for _ in 0..25 {
                        limit.acquire(100_000).await;
                    }
                })
            })
            .collect();
        for sender in senders {
            sender.await.expect("finishes");
        }
        let took = start.elapsed().as_secs_f64();
        assert!((9.9..10.1).contains(&took), "10 MB at 1 MB/s took {took} s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_does_not_save_up_more_than_a_burst() {
        let limit = RateLimit::new(rate(1_000_000));
        tokio::time::sleep(Duration::from_secs(60)).await;
        let start = Instant::now();
        limit.acquire(1_000_000).await;
        assert!(start.elapsed() >= Duration::from_millis(979));
    }

    #[tokio::test(start_paused = true)]
    async fn lifting_the_limit_lets_waiting_senders_go() {
        let limit = Arc::new(RateLimit::new(rate(1)));
        let waiting = tokio::spawn({
            let limit = limit.clone();
            async move { limit.acquire(1 << 20).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!waiting.is_finished());
        limit.set(None);
        let start = Instant::now();
        waiting.await.expect("finishes");
        limit.acquire(1 << 30).await;
        assert!(start.elapsed() < Duration::from_millis(10));
    }
}
