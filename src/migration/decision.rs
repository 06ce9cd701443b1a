//! The decision of a running migration: another round, or freeze, and what becomes of the pages that are left then.
//!
//! In come the rounds so far ([`Seen`]), the mode and the limits; out comes a [`Verdict`]: what to do, and what is expected
//! of it. [`convergence`](super::convergence) says when rounds have come to their end; this room adds what the rest does:
//! whether it is sent in the freeze or owed, and whether rounds should go on at all although they still help a little.
//! `docs/decision.md` explains it at length.
//!
//! The rules for `auto`, in order; the first that applies decides. *Fits* means that the downtime expected of sending all that
//! is left in the freeze is within the limit.
//!
//! | # | condition after a round                                                  | decision                                   |
//! |---|--------------------------------------------------------------------------|--------------------------------------------|
//! | 1 | the delta fits, and the rounds have converged or the next is in vain     | freeze as pre-copy                         |
//! | 2 | another round would pass the total-time limit, and the delta does not fit | freeze as post-copy; as pre-copy if only that still ends in time |
//! | 3 | rounds are over for another reason and the delta does not fit            | freeze as post-copy                        |
//! | 4 | the [`forecast`] says that no number of rounds will make the delta fit   | freeze as post-copy: `Outrun`              |
//! | 5 | otherwise                                                                | another round                              |
//!
//! A freeze that would keep neither the downtime limit nor the total-time limit is none: the move rolls back. What is left then
//! takes as long in another round as in the freeze, so there is no time for one either.
//!
//! `pre-copy` freezes as pre-copy wherever rule 1 or `convergence` ends the rounds, `hybrid` as post-copy there.
//!
//! # What is estimated
//!
//! Two scans in a row find `a` and `b` dirty pages, `c` of them both times. If writes fall evenly on a working set of `W`
//! pages, then `c / b` of them are known by chance of `a / W`: so `W = a · b / c` (ecologists count fish so, by capture and
//! recapture). In a time `t` with `r` writes a second, `W · (1 − exp(−r·t / W))` different pages are dirtied; from what one
//! scan found, `r` follows. Both together say what a round of another length would leave, without sending it.

use std::time::Duration;

use super::convergence::{
    Assessment, Decision, FreezeReason, IDLE_PAGES, Limits, RoundMeasured, USEFUL_FACTOR, assess,
    time_to_send,
};
use super::mode::{Mode, Switch};
use super::report::Prediction;

/// Pages that are owed arrive a little later than those of a round: faults break up the order, and the push is held back so
/// that a fault's answer is not stuck behind it. Their time is taken as this many times that of a round.
pub const OWED_FACTOR: f64 = 1.1;

/// Pages a second that a target puts into processes after a pre-copy release: about 2 GiB/s.
pub const FILL_RATE: f64 = 500_000.0;

/// The share of its working set from which on a container is taken to have written all of it.
const SATURATED: f64 = 0.95;

/// What a migration knows after a round.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// The rounds so far, samples among them.
    pub rounds: &'a [RoundMeasured],
    /// Pages the container has.
    pub memory: u64,
    /// Since the migration began.
    pub elapsed: Duration,
    /// What a freeze costs without a delta.
    pub fixed_downtime: Duration,
    /// Of the connection.
    pub round_trip: Duration,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// Send another round.
    Continue,
    /// Freeze the container.
    Freeze {
        /// Why now.
        why: FreezeReason,
        /// What becomes of the pages that are left.
        switch: Switch,
    },
    /// Roll back: no time is left in which the downtime limit could be kept.
    GiveUp,
}

/// A decision and what it rests on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// What to do.
    pub course: Course,
    /// What is expected if it is frozen now; as pre-copy while the rounds go on.
    pub predicted: Prediction,
    /// The figures of the rounds.
    pub assessment: Assessment,
    /// How the container writes, as far as two scans can tell.
    pub writes: Option<Writes>,
}

/// How a container writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Writes {
    /// Pages written a second, the same page counted as often as it is written.
    pub rate: f64,
    /// Different pages it writes to.
    pub working_set: f64,
}

/// Where more rounds would lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// Whether the delta comes to fit the downtime limit before the total-time limit.
    pub fits: bool,
    /// Rounds until then, or until they help no more.
    pub rounds: u32,
    /// How long those take.
    pub time: Duration,
}

/// Decides after a round.
pub fn decide(mode: Mode, seen: &Seen, limits: &Limits) -> Verdict {
    let assessment = assess(seen.rounds, seen.elapsed, limits, seen.fixed_downtime);
    let left = seen.left();
    let fits = assessment.expected_downtime <= limits.downtime;
    let writes = seen.writes();
    let (pre, post) = (
        seen.pre_copy(&assessment),
        seen.post_copy(&assessment, left),
    );

    let in_time = |one: &Prediction| one.total.is_some_and(|total| total <= limits.timeout);
    let rest = |why| match mode {
        Mode::PreCopy => Switch::PreCopy,
        Mode::PostCopy | Mode::Hybrid => Switch::PostCopy,
        Mode::Auto if fits => Switch::PreCopy,
        Mode::Auto if why == FreezeReason::Timeout && !in_time(&post) && in_time(&pre) => {
            Switch::PreCopy
        }
        Mode::Auto => Switch::PostCopy,
    };
    let course = match (mode, assessment.decision) {
        (Mode::PostCopy, _) => Course::Freeze {
            why: FreezeReason::NoRounds,
            switch: Switch::PostCopy,
        },
        (_, Decision::Freeze(why)) => Course::Freeze {
            why,
            switch: rest(why),
        },
        (Mode::Auto, Decision::Continue) if !fits && seen.outrun(&assessment, limits) => {
            Course::Freeze {
                why: FreezeReason::Outrun,
                switch: Switch::PostCopy,
            }
        }
        (_, Decision::Continue) if fits && seen.next_round_is_in_vain(&assessment) => {
            Course::Freeze {
                why: FreezeReason::Converged,
                switch: rest(FreezeReason::Converged),
            }
        }
        (_, Decision::Continue) => Course::Continue,
    };
    let predicted = match course {
        Course::Freeze {
            switch: Switch::PostCopy,
            ..
        } => post,
        _ => pre,
    };
    let course = match course {
        Course::Freeze { .. } if seen.is_too_late(&predicted, limits) => Course::GiveUp,
        course => course,
    };
    Verdict {
        course,
        predicted,
        assessment,
        writes,
    }
}

/// What is expected of a freeze that leaves so many pages owed. Without a throughput, in pages a second, it is not known how
/// long they take.
pub fn expect_post_copy(
    elapsed: Duration,
    fixed_downtime: Duration,
    owed: u64,
    throughput: Option<f64>,
) -> Prediction {
    let last_page = throughput.map(|rate| time_to_send(owed, Some(rate / OWED_FACTOR)));
    Prediction {
        downtime: fixed_downtime,
        total: last_page.map(|last| elapsed.saturating_add(fixed_downtime).saturating_add(last)),
        last_page,
    }
}

impl Seen<'_> {
    fn left(&self) -> u64 {
        self.rounds
            .last()
            .map_or(self.memory, |last| last.pages_left)
    }

    /// Whether a freeze would keep neither the downtime limit nor the one for the whole time.
    fn is_too_late(&self, predicted: &Prediction, limits: &Limits) -> bool {
        predicted.downtime > limits.downtime
            && self.elapsed.saturating_add(predicted.downtime) > limits.timeout
    }

    fn pre_copy(&self, assessment: &Assessment) -> Prediction {
        let downtime = assessment.expected_downtime;
        let fill = seconds(self.memory as f64 / FILL_RATE);
        Prediction {
            downtime,
            total: Some(self.elapsed.saturating_add(downtime).saturating_add(fill)),
            last_page: None,
        }
    }

    fn post_copy(&self, assessment: &Assessment, left: u64) -> Prediction {
        expect_post_copy(
            self.elapsed,
            self.fixed_downtime,
            left,
            assessment.throughput,
        )
    }

    /// How the container writes: what the last round says, and of samples, which are short, the slower of the last two, so
    /// that one burst does not decide.
    ///
    /// A round in which the whole working set was dirtied says how large that is, but not how fast it is written: then the
    /// fastest that any round has seen counts, which a sample saw.
    ///
    /// `None` until there were two scans to compare.
    pub fn writes(&self) -> Option<Writes> {
        let mut pairs: Vec<Writes> = self
            .rounds
            .windows(2)
            .filter_map(|pair| match pair {
                [before, now] => Some(self.writes_in(before, now)),
                _ => None,
            })
            .collect();
        let mut last = pairs.pop()?;
        let round = self.rounds.last()?;
        if round.pages_dirty as f64 >= SATURATED * last.working_set {
            let rates = pairs.iter().map(|pair| pair.rate);
            last.rate = rates.fold(last.rate, f64::max);
        } else if round.sample {
            // The first of all rounds has none before it to compare with, but the second's working set to go by.
            let first = self.rounds.first().map(|first| {
                Writes::from_capture(first.pages_dirty, last.working_set, first.duration)
            });
            let before = pairs.pop().or(first);
            last.rate = before.map_or(last.rate, |before| before.rate.min(last.rate));
        }
        Some(last)
    }

    fn writes_in(&self, before: &RoundMeasured, now: &RoundMeasured) -> Writes {
        let most = self
            .memory
            .max(now.pages_dirty)
            .max(before.pages_dirty)
            .max(1) as f64;
        let least = before.pages_dirty.max(now.pages_dirty).max(1) as f64;
        let recaptured =
            before.pages_dirty as f64 * now.pages_dirty as f64 / (now.pages_again.max(1) as f64);
        Writes::from_capture(now.pages_dirty, recaptured.clamp(least, most), now.duration)
    }

    /// The second half of rule 1: what is left is written so fast that a round would have to be sent again whole.
    fn next_round_is_in_vain(&self, assessment: &Assessment) -> bool {
        let (Some(writes), Some(throughput)) = (self.writes(), assessment.throughput) else {
            return false;
        };
        let left = self.left() as f64;
        let round = seconds(left / throughput).saturating_add(self.round_trip);
        self.rounds.last().is_some_and(|last| !last.sample)
            && writes.dirtied_in(round) > USEFUL_FACTOR * left
    }

    /// Rule 4. One round alone says too little.
    fn outrun(&self, assessment: &Assessment, limits: &Limits) -> bool {
        let (Some(writes), Some(throughput)) = (self.writes(), assessment.throughput) else {
            return false;
        };
        !forecast(self, writes, throughput, limits).fits
    }
}

impl Writes {
    /// From `dirty` different pages found dirty of a working set after a time.
    fn from_capture(dirty: u64, working_set: f64, time: Duration) -> Writes {
        let working_set = working_set.max(1.0);
        // Where all of it is dirty the rate has no upper end: taken as one that leaves a page in a thousand.
        let share = (dirty as f64 / working_set).min(0.999);
        Writes {
            rate: -working_set * (1.0 - share).ln() / time.as_secs_f64().max(1e-6),
            working_set,
        }
    }

    /// Different pages dirtied in a time.
    pub fn dirtied_in(&self, time: Duration) -> f64 {
        self.working_set * (1.0 - (-self.rate * time.as_secs_f64() / self.working_set).exp())
    }
}

/// Plays the rounds to come, as long as each helps.
pub fn forecast(seen: &Seen, writes: Writes, throughput: f64, limits: &Limits) -> Forecast {
    let mut left = seen.left() as f64;
    let mut time = Duration::ZERO;
    let mut rounds = 0;
    let delta = |pages: f64| seconds(pages / throughput);
    loop {
        let fits = left <= IDLE_PAGES as f64
            || seen.fixed_downtime.saturating_add(delta(left)) <= limits.downtime;
        let round = delta(left).saturating_add(seen.round_trip);
        let dirtied = writes.dirtied_in(round);
        let ends = seen
            .elapsed
            .saturating_add(time)
            .saturating_add(round)
            .saturating_add(delta(dirtied));
        if fits
            || dirtied > USEFUL_FACTOR * left
            || ends >= limits.timeout
            || rounds >= limits.max_rounds
        {
            return Forecast { fits, rounds, time };
        }
        time = time.saturating_add(round);
        rounds += 1;
        left = dirtied;
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
