//! What a page server has done, to be read from any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of the histogram: the last one holds everything from half a second up.
const BUCKETS: usize = 20;

/// Counters of a page server at work, over all its connections.
#[derive(Debug, Default)]
pub struct ServeProgress {
    pub(super) left: AtomicU64,
    pub(super) pushed_pages: AtomicU64,
    pub(super) pushed_bytes: AtomicU64,
    pub(super) same_pages: AtomicU64,
    pub(super) answered_pages: AtomicU64,
    pub(super) answered_bytes: AtomicU64,
    latency: [AtomicU64; BUCKETS],
}

/// A page server's counters at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Served {
    /// Owed pages that were not sent yet, or not since the connection was last made.
    pub pages_left: u64,
    /// Pages pushed.
    pub pushed_pages: u64,
    /// Bytes of frames that took.
    pub pushed_bytes: u64,
    /// Of the pages pushed, those that were only named: another process shares them, of which they had just been sent.
    pub same_pages: u64,
    /// Faults answered.
    pub faults: u64,
    /// Pages sent as answers.
    pub answered_pages: u64,
    /// Bytes of frames that took.
    pub answered_bytes: u64,
    /// How long answering took here, from the request's arrival until QUIC had the answer: below 1 µs, 2 µs, 4 µs, ...
    /// The last count has everything slower.
    pub latency: Vec<u64>,
}

impl Served {
    /// Whether any page was sent.
    pub fn has_sent(&self) -> bool {
        self.pushed_pages + self.answered_pages > 0
    }
}

impl ServeProgress {
    /// The counters now.
    pub fn now(&self) -> Served {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let latency: Vec<u64> = self.latency.iter().map(of).collect();
        Served {
            pages_left: of(&self.left),
            pushed_pages: of(&self.pushed_pages),
            pushed_bytes: of(&self.pushed_bytes),
            same_pages: of(&self.same_pages),
            faults: latency.iter().sum(),
            answered_pages: of(&self.answered_pages),
            answered_bytes: of(&self.answered_bytes),
            latency,
        }
    }

    pub(super) fn answered(&self, pages: u64, bytes: u64, took: Duration) {
        self.answered_pages.fetch_add(pages, Ordering::Relaxed);
        self.answered_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.latency[bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn pushed(&self, pages: u64, bytes: u64) {
        self.pushed_pages.fetch_add(pages, Ordering::Relaxed);
        self.pushed_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn pushed_same(&self, pages: u64, bytes: u64) {
        self.same_pages.fetch_add(pages, Ordering::Relaxed);
        self.pushed(pages, bytes);
    }
}

/// Bucket `n` ends at 2^n µs.
fn bucket(took: Duration) -> usize {
    let bits = u128::BITS - took.as_micros().leading_zeros();
    (bits as usize).min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_falls_below_the_end_of_its_bucket() {
        let cases = [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 2),
            (4, 3),
            (1000, 10),
            (60_000_000, BUCKETS - 1),
        ];
        for (micros, expected) in cases {
            assert_eq!(
                bucket(Duration::from_micros(micros)),
                expected,
                "{micros} µs"
            );
        }
        let progress = ServeProgress::default();
        progress.answered(4, 16_500, Duration::from_micros(3));
        let served = progress.now();
        assert_eq!(
            (served.faults, served.answered_pages, served.latency[2]),
            (1, 4, 1)
        );
    }

    #[test]
    fn a_page_that_is_only_named_counts_as_pushed() {
        let progress = ServeProgress::default();
        progress.pushed(16, 65_600);
        progress.pushed_same(12, 72);
        let served = progress.now();
        assert_eq!((served.pushed_pages, served.pushed_bytes), (28, 65_672));
        assert_eq!(served.same_pages, 12);
    }
}
