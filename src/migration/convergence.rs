//! When to stop copying and freeze: a pure function of what the rounds measured.
//!
//! In come the rounds so far, the time used, the limits and the cost of a freeze that no round can lower;
//! out comes an [`Assessment`]: another round, or freeze and why, and the downtime to expect either way.
//!
//! This is how `--mode pre-copy` decides; [`decision`](super::decision) builds the other modes on it.
//!
//! A round sends what was dirty when it began; while it runs the container dirties pages, which the next scan
//! finds. So the next round is smaller exactly when pages are sent faster than they are dirtied, and the ratio
//! *found dirty / sent* of a round is that of the two rates.
//!
//! The rules, in order; the first that applies decides:
//!
//! | # | condition after a round                                                               | decision                |
//! |---|---------------------------------------------------------------------------------------|-------------------------|
//! | 1 | at most [`IDLE_PAGES`] dirty                                                          | freeze: `Idle`          |
//! | 2 | the delta fits the budget and is small beside the fixed cost ([`SMALL_DELTA`])        | freeze: `Converged`     |
//! | 3 | the delta fits the budget and the last round shrank it too little to try again, or [`POLISH_ROUNDS`] rounds already ended within the budget | freeze: `Converged` |
//! | 4 | one more round and the freeze would pass the timeout                                  | freeze: `Timeout`       |
//! | 5 | `max_rounds` rounds are done, samples ([`ledger`](super::ledger)) not counted        | freeze: `MaxRounds`     |
//! | 6 | [`STALLED_ROUNDS`] rounds in a row did not shrink what is left ([`USEFUL_FACTOR`])    | freeze: `NoProgress`    |
//! | 7 | otherwise                                                                             | `Continue`              |
//!
//! *Budget* is the downtime limit less the fixed cost. Rule 3 goes on inside the budget while rounds still pay,
//! because a round costs the container little and every page not in the delta is time it does not stand still.
//! Rule 6 asks for two rounds so that one burst of writes does not end the rounds early. Rules 4 to 6 freeze
//! although the limit may be missed: the limit is an aim, and a move that never ends helps nobody; the
//! expected downtime is in the assessment, so a caller that wants to refuse can.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Dirty pages that cost less than asking for one more round: 64 pages are 256 KiB.
pub const IDLE_PAGES: u64 = 64;

/// A delta shorter than the fixed cost divided by this is not worth another round.
pub const SMALL_DELTA: u32 = 16;

/// A round pays if it leaves at most this share of the pages it sent.
pub const USEFUL_FACTOR: f64 = 0.8;

/// Rounds in a row without [`USEFUL_FACTOR`] that count as no progress.
pub const STALLED_ROUNDS: usize = 2;

/// Rounds that may end inside the budget before the freeze comes anyway.
pub const POLISH_ROUNDS: usize = 4;

/// Rounds whose speed counts. Older ones sent other pages under another load.
const RECENT_ROUNDS: usize = 3;

/// What one round did, measured when the scan after it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundMeasured {
    /// Pages this round read: what was dirty when it began.
    pub pages_sent: u64,
    /// Of those, pages that were all zero and travelled as a mark only.
    pub zero_pages: u64,
    /// Bytes that went over the wire for them, headers included.
    pub bytes_sent: u64,
    /// From one scan to the next: the time in which the pages found dirty were dirtied.
    pub duration: Duration,
    /// Of that, until all of the round was at the target.
    pub sending: Duration,
    /// Pages the next scan found dirty.
    pub pages_dirty: u64,
    /// Of those, pages that the scan before found dirty too.
    pub pages_again: u64,
    /// Pages the target lacked when the round began.
    pub pages_before: u64,
    /// Pages the target lacks now: what the next round, or the delta, has to send.
    pub pages_left: u64,
    /// It was only a sample, and left pages for the next round that nothing spoke against sending.
    pub sample: bool,
}

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the container should stand still at most.
    pub downtime: Duration,
    /// Rounds after which the freeze comes anyway; 0 counts as 1.
    pub max_rounds: u32,
    /// How long the whole migration should take at most, from its start to the release at the target.
    pub timeout: Duration,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send what is dirty in another round.
    Continue,
    /// Freeze the container and send what is dirty as the delta.
    Freeze(FreezeReason),
}

/// Why the rounds ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FreezeReason {
    /// The delta fits into the downtime limit, and more rounds would not shorten it enough to pay.
    Converged,
    /// The container dirties memory as fast as it can be sent.
    NoProgress,
    /// The allowed number of rounds is used up.
    MaxRounds,
    /// Another round would pass the timeout.
    Timeout,
    /// Next to nothing is dirty.
    Idle,
    /// More rounds would not bring the delta within the downtime limit.
    Outrun,
    /// No rounds were wanted, or none are possible: it froze as soon as everything was ready.
    NoRounds,
}

/// A decision with the figures it rests on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assessment {
    /// What to do now.
    pub decision: Decision,
    /// How long the container would stand still if it were frozen now: fixed cost and delta.
    pub expected_downtime: Duration,
    /// Pages per second sent in the latest rounds; `None` before any page was sent.
    pub throughput: Option<f64>,
    /// Pages per second the container dirtied in the last round.
    pub dirty_rate: f64,
}

/// What a freeze costs without any delta, for a container of so many processes and so many present pages: freezer, CRIU's
/// dump and restore, records and round trips.
///
/// Measured with CRIU 4.2.1 on one 2-core machine: about 90 ms for one small process, 6 ms more for each further one, and
/// 40 ms for each GiB, because CRIU's dump walks the page tables twice. An estimate to end the rounds by, not a promise.
pub fn fixed_downtime(processes: u32, pages: u64) -> Duration {
    let processes = Duration::from_millis(6) * processes.saturating_sub(1);
    let walks = Duration::from_micros(pages / 256 * 39);
    Duration::from_millis(90) + processes + walks
}

/// What it costs to compare so many pages with what was sent of them, frozen: about 150 ms for each GiB with two streams.
pub fn comparing(pages: u64) -> Duration {
    Duration::from_nanos(600).saturating_mul(u32::try_from(pages).unwrap_or(u32::MAX))
}

/// Decides what to do after the last of `rounds`.
///
/// `elapsed` is the time since the migration began. `fixed_downtime` is what a freeze costs without any delta:
/// freezing, dump, restore and the round trips. Without any round done the answer is to do one.
pub fn assess(
    rounds: &[RoundMeasured],
    elapsed: Duration,
    limits: &Limits,
    fixed_downtime: Duration,
) -> Assessment {
    let Some(last) = rounds.last() else {
        return Assessment {
            decision: Decision::Continue,
            expected_downtime: fixed_downtime,
            throughput: None,
            dirty_rate: 0.0,
        };
    };
    let throughput = throughput(rounds);
    let delta = time_to_send(last.pages_left, throughput);
    let expected_downtime = fixed_downtime.saturating_add(delta);

    let decision = if last.pages_left <= IDLE_PAGES {
        Decision::Freeze(FreezeReason::Idle)
    } else if expected_downtime <= limits.downtime
        && no_round_pays(rounds, delta, throughput, limits, fixed_downtime)
    {
        Decision::Freeze(FreezeReason::Converged)
    } else if elapsed
        .saturating_add(delta)
        .saturating_add(expected_downtime)
        >= limits.timeout
    {
        Decision::Freeze(FreezeReason::Timeout)
    } else if whole(rounds) >= limits.max_rounds.max(1) as usize {
        Decision::Freeze(FreezeReason::MaxRounds)
    } else if stalled(rounds) {
        Decision::Freeze(FreezeReason::NoProgress)
    } else {
        Decision::Continue
    };
    Assessment {
        decision,
        expected_downtime,
        throughput,
        dirty_rate: per_second(last.pages_dirty, last.duration),
    }
}

/// Rules 2 and 3: inside the budget, is another round a waste?
fn no_round_pays(
    rounds: &[RoundMeasured],
    delta: Duration,
    throughput: Option<f64>,
    limits: &Limits,
    fixed_downtime: Duration,
) -> bool {
    let fitted = |round: &&RoundMeasured| {
        fixed_downtime.saturating_add(time_to_send(round.pages_left, throughput)) <= limits.downtime
    };
    delta <= fixed_downtime / SMALL_DELTA
        || rounds.last().is_some_and(stood)
        || rounds.iter().filter(fitted).count() > POLISH_ROUNDS
}

/// Rule 6. The first round counts too: if everything is dirty again after it, it brought nothing.
fn stalled(rounds: &[RoundMeasured]) -> bool {
    rounds.len() >= STALLED_ROUNDS && rounds.iter().rev().take(STALLED_ROUNDS).all(stood)
}

/// Whether the round did not help. A sample whose pages are all dirty again says nothing of the rest.
fn stood(round: &RoundMeasured) -> bool {
    !round.sample && !shrank(round)
}

/// Whether the round left usefully less to send: at least a fifth of what it sent is not wanted again.
fn shrank(round: &RoundMeasured) -> bool {
    let gained = round.pages_before as f64 - round.pages_left as f64;
    gained >= (1.0 - USEFUL_FACTOR) * round.pages_sent as f64
}

/// Rounds that were no samples.
pub fn whole(rounds: &[RoundMeasured]) -> usize {
    rounds.iter().filter(|round| !round.sample).count()
}

/// Pages per second over the latest rounds. Zero pages cost no wire and are left out, so that a first round
/// over a half-empty container does not promise a speed its dirty pages will not have; only when nothing but
/// zeros was sent do they count.
pub fn throughput(rounds: &[RoundMeasured]) -> Option<f64> {
    let recent = &rounds[rounds.len().saturating_sub(RECENT_ROUNDS)..];
    let time: Duration = recent
        .iter()
        .map(|round| round.sending)
        .fold(Duration::ZERO, Duration::saturating_add);
    let all = recent
        .iter()
        .fold(0u64, |sum, round| sum.saturating_add(round.pages_sent));
    let data = recent.iter().fold(0u64, |sum, round| {
        sum.saturating_add(round.pages_sent.saturating_sub(round.zero_pages))
    });
    let pages = if data > 0 { data } else { all };
    (pages > 0 && !time.is_zero()).then(|| per_second(pages, time))
}

/// How long these pages take. At an unknown speed nothing can be promised, so it takes for ever.
pub(super) fn time_to_send(pages: u64, throughput: Option<f64>) -> Duration {
    match throughput {
        _ if pages == 0 => Duration::ZERO,
        Some(rate) => Duration::try_from_secs_f64(pages as f64 / rate).unwrap_or(Duration::MAX),
        None => Duration::MAX,
    }
}

fn per_second(pages: u64, time: Duration) -> f64 {
    // A round shorter than the clock can tell is taken as one microsecond, so that no rate is infinite.
    pages as f64 / time.as_secs_f64().max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        downtime: Duration::from_millis(300),
        max_rounds: 30,
        timeout: Duration::from_secs(600),
    };
    const FIXED: Duration = Duration::from_millis(120);

    /// A container on a link, as numbers: each round sends what is dirty, the container dirties meanwhile.
    struct Simulation {
        memory: u64,
        link: f64,
        limits: Limits,
    }

    impl Simulation {
        /// 2 GiB over a link of 200 000 pages a second (800 MB/s).
        fn of_2_gib() -> Simulation {
            Simulation {
                memory: 524_288,
                link: 200_000.0,
                limits: LIMITS,
            }
        }

        /// Runs until the freeze. `dirty_rate` gives pages a second for the time since the start, in seconds.
        fn run(&self, dirty_rate: impl Fn(f64) -> f64) -> (FreezeReason, u32, Assessment) {
            let mut rounds = Vec::new();
            let mut pages = self.memory;
            let mut elapsed = 0.0;
            for number in 1..=self.limits.max_rounds {
                let duration = pages as f64 / self.link + 0.002;
                let dirtied = (dirty_rate(elapsed) * duration) as u64;
                elapsed += duration;
                let left = dirtied.min(self.memory);
                rounds.push(RoundMeasured {
                    pages_sent: pages,
                    zero_pages: 0,
                    bytes_sent: pages * 4096,
                    duration: Duration::from_secs_f64(duration),
                    sending: Duration::from_secs_f64(duration),
                    pages_dirty: left,
                    pages_again: 0,
                    pages_before: pages,
                    pages_left: left,
                    sample: false,
                });
                pages = left;
                let assessment = assess(
                    &rounds,
                    Duration::from_secs_f64(elapsed),
                    &self.limits,
                    FIXED,
                );
                if let Decision::Freeze(why) = assessment.decision {
                    return (why, number, assessment);
                }
            }
            panic!("no freeze after {} rounds", self.limits.max_rounds);
        }
    }

    #[test]
    fn a_freeze_costs_more_with_processes_and_with_memory() {
        let gib = 1 << 18;
        assert_eq!(fixed_downtime(1, 0), Duration::from_millis(90));
        assert_eq!(fixed_downtime(41, 0), Duration::from_millis(330));
        assert!(fixed_downtime(1, 2 * gib) > Duration::from_millis(165));
        assert!(
            fixed_downtime(u32::MAX, u64::MAX) > Duration::from_secs(1),
            "nothing overflows"
        );
    }

    #[test]
    fn an_idle_container_is_frozen_after_one_round() {
        let (why, rounds, assessment) = Simulation::of_2_gib().run(|_| 5.0);
        assert_eq!((why, rounds), (FreezeReason::Idle, 1));
        assert!(assessment.expected_downtime < FIXED + Duration::from_millis(1));
    }

    #[test]
    fn a_dirty_rate_below_the_link_converges_to_a_small_delta() {
        // 50 MB/s against 800 MB/s.
        let (why, rounds, assessment) = Simulation::of_2_gib().run(|_| 12_800.0);
        assert_eq!(why, FreezeReason::Converged);
        assert!(rounds <= 5, "{rounds} rounds");
        assert!(
            assessment.expected_downtime < Duration::from_millis(140),
            "{:?}",
            assessment.expected_downtime
        );
    }

    #[test]
    fn a_dirty_rate_at_the_link_or_above_ends_without_progress() {
        for rate in [190_000.0, 200_000.0, 1_000_000.0] {
            let (why, rounds, assessment) = Simulation::of_2_gib().run(|_| rate);
            assert_eq!(
                (why, rounds),
                (FreezeReason::NoProgress, 2),
                "at {rate} pages/s"
            );
            assert!(assessment.expected_downtime > LIMITS.downtime);
            assert!(assessment.dirty_rate > 0.9 * assessment.throughput.expect("rounds were sent"));
        }
    }

    #[test]
    fn one_burst_does_not_end_the_rounds() {
        // Everything is dirtied in the fourth second, next to nothing before and after.
        let burst = |at: f64| {
            if (2.5..2.7).contains(&at) {
                400_000.0
            } else {
                30_000.0
            }
        };
        let (why, _, assessment) = Simulation::of_2_gib().run(burst);
        assert_eq!(why, FreezeReason::Converged);
        assert!(assessment.expected_downtime <= LIMITS.downtime);
    }

    #[test]
    fn a_growing_dirty_rate_ends_the_rounds() {
        let (why, rounds, _) = Simulation::of_2_gib().run(|at| 60_000.0 + 30_000.0 * at);
        assert!(
            matches!(why, FreezeReason::NoProgress | FreezeReason::Converged),
            "{why:?}"
        );
        assert!(rounds < LIMITS.max_rounds);
    }

    #[test]
    fn a_slowly_shrinking_set_ends_at_the_allowed_rounds() {
        let mut simulation = Simulation::of_2_gib();
        simulation.limits.max_rounds = 4;
        let (why, rounds, _) = simulation.run(|_| 150_000.0);
        assert_eq!((why, rounds), (FreezeReason::MaxRounds, 4));
    }

    #[test]
    fn the_freeze_comes_in_time_for_the_timeout() {
        let mut simulation = Simulation::of_2_gib();
        simulation.limits.timeout = Duration::from_secs(6);
        let (why, _, _) = simulation.run(|_| 150_000.0);
        assert_eq!(why, FreezeReason::Timeout);
    }

    #[test]
    fn a_limit_below_the_fixed_cost_still_ends() {
        let mut simulation = Simulation::of_2_gib();
        simulation.limits.downtime = Duration::from_millis(10);
        // With 12 800 pages/s a round of a few hundred pages is as long as its scan: it stops shrinking or is idle.
        let (why, rounds, _) = simulation.run(|_| 12_800.0);
        assert!(
            matches!(why, FreezeReason::Idle | FreezeReason::NoProgress),
            "{why:?}"
        );
        assert!(rounds < 12, "{rounds} rounds");
    }

    #[test]
    fn zero_pages_promise_no_speed() {
        let round = RoundMeasured {
            pages_sent: 500_000,
            zero_pages: 490_000,
            bytes_sent: 10_000 * 4096,
            duration: Duration::from_secs(1),
            sending: Duration::from_secs(1),
            pages_dirty: 10_000,
            pages_again: 0,
            pages_before: 500_000,
            pages_left: 10_000,
            sample: false,
        };
        let assessment = assess(&[round], Duration::from_secs(1), &LIMITS, FIXED);
        assert_eq!(assessment.expected_downtime, FIXED + Duration::from_secs(1));
        assert_eq!(assessment.decision, Decision::Continue);
    }

    #[test]
    fn before_any_round_the_answer_is_a_round() {
        assert_eq!(
            assess(&[], Duration::ZERO, &LIMITS, FIXED).decision,
            Decision::Continue
        );
    }

    fn any_round() -> impl Strategy<Value = RoundMeasured> {
        (
            any::<u64>(),
            any::<u64>(),
            any::<u64>(),
            0..u64::MAX / 2,
            any::<u64>(),
        )
            .prop_map(|(pages_sent, zero_pages, bytes_sent, nanos, pages_dirty)| {
                RoundMeasured {
                    pages_sent,
                    zero_pages,
                    bytes_sent,
                    duration: Duration::from_nanos(nanos),
                    sending: Duration::from_nanos(nanos),
                    pages_dirty,
                    pages_again: 0,
                    pages_before: pages_sent,
                    pages_left: pages_dirty,
                    sample: false,
                }
            })
    }

    proptest! {
        #[test]
        fn the_rounds_always_end(
            measured in prop::collection::vec(any_round(), 40),
            max_rounds in 0u32..40,
            downtime_ms in any::<u32>(),
            fixed_ms in any::<u32>(),
        ) {
            let limits = Limits {
                downtime: Duration::from_millis(downtime_ms.into()),
                max_rounds,
                timeout: Duration::MAX,
            };
            let fixed = Duration::from_millis(fixed_ms.into());
            let ended = (1..=measured.len()).find(|done| {
                assess(&measured[..*done], Duration::ZERO, &limits, fixed).decision != Decision::Continue
            });
            prop_assert!(ended.is_some_and(|done| done <= max_rounds.max(1) as usize));
        }

        #[test]
        fn a_freeze_inside_the_limit_is_never_called_a_failure(rounds in prop::collection::vec(any_round(), 1..10)) {
            let assessment = assess(&rounds, Duration::ZERO, &LIMITS, FIXED);
            if assessment.decision == Decision::Freeze(FreezeReason::Converged) {
                prop_assert!(assessment.expected_downtime <= LIMITS.downtime);
            }
        }
    }
}
