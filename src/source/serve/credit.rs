//! How much of the push may be under way: what is in flight decides how long a fault waits behind it.
//!
//! Enters: bytes pushed, bytes the target says it has, round trips. Leaves: how many more may go now. No clock is read.
//!
//! | what is known of the link | may be under way |
//! |---|---|
//! | nothing yet | 256 KiB |
//! | it takes `rate` bytes/s, the shortest round trip was `rtt` | 1.5 × rate × rtt, at least 2 ms of `rate` and 64 KiB, at most 12 MiB |
//!
//! of which the "2 ms" count for at most 256 KiB: on a fast link with a short round trip that much keeps it busy. One and a
//! half bandwidth-delay products let the estimate grow by half every round trip while the link takes more, and add half a
//! round trip of waiting once it does not. On a slow link 256 KiB would be tens of milliseconds, hence the smaller
//! floor. 12 MiB stay below QUIC's send window, which the push must never fill.

use crate::memory::PAGE_SIZE;
use crate::wire::page_frame::MAX_PAGES;
use std::time::{Duration, Instant};

const KIB: u64 = 1 << 10;
const UNKNOWN: u64 = 256 * KIB;
const LEAST: u64 = 64 * KIB;
const MOST: u64 = 12 << 20;
const ALWAYS: Duration = Duration::from_millis(2);
/// Rates are measured over at least this long: shorter spans see how packets were bunched.
const WINDOW: Duration = Duration::from_millis(20);
/// The best of so many windows counts, so that a pause is not taken for a slow link.
const WINDOWS: usize = 8;

/// How many bytes may be under way on a link that takes `rate` bytes per second and answers after `rtt`.
pub fn allowance(rtt: Duration, rate: Option<f64>) -> u64 {
    let Some(rate) = rate else {
        return UNKNOWN;
    };
    let product = 1.5 * rate * rtt.as_secs_f64();
    let floor = (rate * ALWAYS.as_secs_f64()) as u64;
    (product as u64).max(floor.clamp(LEAST, UNKNOWN)).min(MOST)
}

/// The push's account with the target, on one connection.
#[derive(Debug, Default)]
pub struct Credit {
    sent: u64,
    received: u64,
    rtt: Option<Duration>,
    window: Option<(Instant, u64)>,
    rates: [f64; WINDOWS],
    next: usize,
}

/// The target claims to have bytes that were not sent, or fewer than before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the target says it has {claimed} bytes of pushed pages, between {had} and {sent} are possible"
)]
pub struct CreditError {
    claimed: u64,
    had: u64,
    sent: u64,
}

impl Credit {
    /// `bytes` are about to be sent.
    pub fn sending(&mut self, bytes: u64, now: Instant) {
        if self.sent == self.received {
            // Nothing was under way: the time until now says nothing about the link.
            self.window = Some((now, self.received));
        }
        self.sent += bytes;
    }

    /// The target has `total` bytes now, and a round trip takes `rtt`.
    pub fn received(&mut self, total: u64, rtt: Duration, now: Instant) -> Result<(), CreditError> {
        if !(self.received..=self.sent).contains(&total) {
            return Err(CreditError {
                claimed: total,
                had: self.received,
                sent: self.sent,
            });
        }
        self.received = total;
        let shortest = self.rtt.map_or(rtt, |known| known.min(rtt));
        self.rtt = Some(shortest);
        let (since, had) = *self.window.get_or_insert((now, total));
        let time = now.saturating_duration_since(since);
        if time >= WINDOW.max(shortest) {
            self.rates[self.next] = (total - had) as f64 / time.as_secs_f64();
            self.next = (self.next + 1) % WINDOWS;
            self.window = Some((now, total));
        }
        Ok(())
    }

    /// Bytes sent that the target has not confirmed.
    pub fn under_way(&self) -> u64 {
        self.sent - self.received
    }

    /// What the link was last seen to take, bytes per second.
    pub fn rate(&self) -> Option<f64> {
        let best = self.rates.iter().copied().fold(0.0, f64::max);
        (best > 0.0).then_some(best)
    }

    /// How many pages the next frame may have, if one may go now: a quarter of what may be under way, so that the link
    /// does not run dry while a frame is made.
    pub fn next_frame(&self) -> Option<u64> {
        let allowed = allowance(self.rtt.unwrap_or_default(), self.rate());
        let pages = (allowed / 4 / PAGE_SIZE).clamp(1, MAX_PAGES);
        let fits = self.under_way() + pages * PAGE_SIZE <= allowed;
        (fits || self.under_way() == 0).then_some(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_allowance_follows_the_table() {
        let mbit = 1e6 / 8.0;
        let cases = [
            (MS, None, 256 * KIB),
            // Loopback: the product is small, 2 ms of the rate are more than the floor counts.
            (MS / 10, Some(1e9), 256 * KIB),
            // 100 Mbit/s nearby: 256 KiB would be 21 ms.
            (MS, Some(100.0 * mbit), 64 * KIB),
            // 500 Mbit/s nearby: 2 ms.
            (MS / 5, Some(500.0 * mbit), 125_000),
            // 1 Gbit/s and 20 ms: one and a half products.
            (20 * MS, Some(1000.0 * mbit), 3_750_000),
            // A long fat link stops below the send window.
            (200 * MS, Some(10_000.0 * mbit), MOST),
            (Duration::ZERO, Some(0.0), 64 * KIB),
        ];
        for (rtt, rate, expected) in cases {
            assert_eq!(allowance(rtt, rate), expected, "{rtt:?} {rate:?}");
        }
    }

    /// Pushes over a link of `rate` bytes/s and `rtt` for four seconds; of the last two it says what was under way at most, and the
    /// rate reached.
    fn simulate(rate: f64, rtt: Duration) -> (u64, f64) {
        let start = Instant::now();
        let (mut credit, mut sent) = (Credit::default(), 0);
        // Frames under way: when their receipt is here, and the total it tells.
        let mut receipts = std::collections::VecDeque::new();
        let mut link_free = start;
        let step = Duration::from_micros(50);
        let mut most = 0;
        let mut at_half = 0;
        for tick in 0..80_000 {
            let now = start + step * tick;
            while let Some(&(due, total)) = receipts.front()
                && due <= now
            {
                receipts.pop_front();
                credit.received(total, rtt, now).expect("honest");
            }
            while let Some(pages) = credit.next_frame() {
                let bytes = pages * PAGE_SIZE;
                credit.sending(bytes, now);
                sent += bytes;
                let wire = Duration::from_secs_f64(bytes as f64 / rate);
                link_free = link_free.max(now) + wire;
                receipts.push_back((link_free + rtt, sent));
            }
            if tick == 40_000 {
                at_half = sent;
            } else if tick > 40_000 {
                most = most.max(credit.under_way());
            }
        }
        (most, (sent - at_half) as f64 / 2.0)
    }

    #[test]
    fn a_link_is_kept_busy_with_little_more_than_it_holds() {
        for (rate, rtt) in [
            (125e6, 20 * MS),
            (12.5e6, MS),
            (1e9, MS / 10),
            (12.5e6, 100 * MS),
        ] {
            let (under_way, reached) = simulate(rate, rtt);
            assert!(reached > 0.9 * rate, "{rate} {rtt:?}: reached {reached}");
            let holds = rate * rtt.as_secs_f64();
            let limit = (1.7 * holds).max(300.0 * 1024.0);
            assert!(
                (under_way as f64) < limit,
                "{rate} {rtt:?}: {under_way} under way"
            );
        }
    }

    #[test]
    fn a_target_that_claims_what_it_cannot_have_is_found_out() {
        let now = Instant::now();
        let mut credit = Credit::default();
        credit.sending(1000, now);
        credit.received(400, MS, now).expect("possible");
        for claimed in [399, 1001, u64::MAX] {
            let error = credit.received(claimed, MS, now).expect_err("impossible");
            assert_eq!(
                error,
                CreditError {
                    claimed,
                    had: 400,
                    sent: 1000
                }
            );
        }
        credit.received(1000, MS, now).expect("all of it");
        assert_eq!(credit.under_way(), 0);
    }

    #[test]
    fn without_credit_nothing_goes_and_with_nothing_under_way_something_always_does() {
        let now = Instant::now();
        let mut credit = Credit::default();
        while let Some(pages) = credit.next_frame() {
            credit.sending(pages * PAGE_SIZE, now);
        }
        assert_eq!(credit.under_way(), 256 * KIB);
        credit.received(256 * KIB, MS, now).expect("possible");
        assert!(credit.next_frame().is_some());
    }
}
