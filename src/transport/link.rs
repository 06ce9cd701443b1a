//! How fast the link takes bytes, seen from the senders that wait for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that the link took in a time in which it was the bottleneck.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkSample {
    /// Bytes of frames written.
    pub bytes: u64,
    /// In this time.
    pub time: Duration,
}

/// Counts what the senders of a connection write and how long they wait.
#[derive(Debug, Default)]
pub struct LinkMeter(Mutex<Meter>);

/// Says that a sender is waiting; dropping it says that it is not.
pub struct Waiting(Arc<LinkMeter>);

#[derive(Debug, Default)]
struct Meter {
    waiting: usize,
    waiting_since: Option<Instant>,
    waited: Duration,
    bytes: u64,
    sampled: Option<Instant>,
}

/// The share of an interval that some sender must have waited for the interval to say something about the link.
const SATURATED: f64 = 0.7;

/// Shorter intervals are left to grow: a few writes into an empty send buffer look like a fast link.
const MIN_INTERVAL: Duration = Duration::from_millis(20);

impl LinkMeter {
    /// A sender begins to write.
    pub fn wait(self: &Arc<Self>) -> Waiting {
        self.lock().begin(Instant::now());
        Waiting(self.clone())
    }

    /// `bytes` were written.
    pub fn wrote(&self, bytes: usize) {
        self.lock().bytes += bytes as u64;
    }

    /// What the link took since the last sample, if it was the bottleneck most of the time.
    pub fn sample(&self) -> Option<LinkSample> {
        self.lock().sample(Instant::now())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Meter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.lock().end(Instant::now());
    }
}

impl Meter {
    fn begin(&mut self, now: Instant) {
        if self.waiting == 0 {
            self.waiting_since = Some(now);
        }
        self.sampled.get_or_insert(now);
        self.waiting += 1;
    }

    fn end(&mut self, now: Instant) {
        self.waiting = self.waiting.saturating_sub(1);
        if self.waiting == 0
            && let Some(since) = self.waiting_since.take()
        {
            self.waited += now.saturating_duration_since(since);
        }
    }

    fn sample(&mut self, now: Instant) -> Option<LinkSample> {
        let time = now.saturating_duration_since(self.sampled?);
        if time < MIN_INTERVAL {
            return None;
        }
        let mut waited = self.waited;
        if let Some(since) = &mut self.waiting_since {
            waited += now.saturating_duration_since(*since);
            *since = now;
        }
        let sample = LinkSample {
            bytes: self.bytes,
            time,
        };
        (self.waited, self.bytes, self.sampled) = (Duration::ZERO, 0, Some(now));
        (waited.as_secs_f64() >= SATURATED * time.as_secs_f64() && sample.bytes > 0)
            .then_some(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn only_a_link_that_was_waited_for_is_measured() {
        let start = Instant::now();
        let mut busy = Meter::default();
        busy.begin(start);
        busy.bytes += 1000;
        busy.end(start + 90 * MS);
        let sample = busy.sample(start + 100 * MS);
        assert_eq!(
            sample,
            Some(LinkSample {
                bytes: 1000,
                time: 100 * MS
            })
        );

        let mut idle = Meter::default();
        idle.begin(start);
        idle.bytes += 1000;
        idle.end(start + 10 * MS);
        assert_eq!(idle.sample(start + 100 * MS), None);
    }

    #[test]
    fn senders_that_wait_together_count_once() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.begin(start);
        meter.begin(start + 10 * MS);
        meter.end(start + 30 * MS);
        meter.end(start + 40 * MS);
        assert_eq!(meter.waited, 40 * MS);
    }

    #[test]
    fn a_sender_still_waiting_counts_in_both_intervals() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.begin(start);
        meter.bytes = 5;
        assert!(meter.sample(start + 100 * MS).is_some());
        meter.bytes = 7;
        meter.end(start + 200 * MS);
        assert_eq!(
            meter.sample(start + 200 * MS),
            Some(LinkSample {
                bytes: 7,
                time: 100 * MS
            })
        );
    }
}
