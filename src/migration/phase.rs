//! The times of a migration as a state machine, so that downtime cannot be recorded out of order.
//!
//! A [`Timeline`] takes [`Mark`]s with the time since the migration began. Each mark needs certain others before
//! it, may be set once, and never lies before an earlier one. Downtime and its parts are then differences of marks.
//!
//! ```text
//!            ┌ freeze ┐┌──── delta ────┐
//!  Started ─▶ FreezeBegan ─▶ Frozen ─┬─▶ DeltaSent ─┬─▶ ImagesSent ─▶ Prepared ─▶ CommitSent ─▶ Committed
//!                                    └─▶ DumpHeld ──┘
//!                            └── dump ──┘└ images ┘  └ restore, fill ┘         └─ commit, resume ─┘
//! ```

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::millis;

/// A moment of a migration, seen at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mark {
    /// The freezer was told to stop the container.
    FreezeBegan,
    /// Nothing runs any more.
    Frozen,
    /// The last byte of the delta was handed to the network.
    DeltaSent,
    /// CRIU's dump is held by its hook.
    DumpHeld,
    /// The last byte of the images was handed to the network.
    ImagesSent,
    /// The target's *prepared* arrived.
    Prepared,
    /// `deciding` is on disk and commit was handed to the network.
    CommitSent,
    /// The target's *committed* arrived: the copy runs.
    Committed,
    /// The container goes on at the source.
    Resumed,
}

impl Mark {
    /// Every mark.
    pub const ALL: &'static [Mark] = &[
        Mark::FreezeBegan,
        Mark::Frozen,
        Mark::DeltaSent,
        Mark::DumpHeld,
        Mark::ImagesSent,
        Mark::Prepared,
        Mark::CommitSent,
        Mark::Committed,
        Mark::Resumed,
    ];

    /// The marks that must be set before this one.
    pub const fn needs(self) -> &'static [Mark] {
        match self {
            Mark::FreezeBegan => &[],
            Mark::Frozen | Mark::Resumed => &[Mark::FreezeBegan],
            Mark::DeltaSent | Mark::DumpHeld => &[Mark::Frozen],
            Mark::ImagesSent => &[Mark::DeltaSent, Mark::DumpHeld],
            Mark::Prepared => &[Mark::ImagesSent],
            Mark::CommitSent => &[Mark::Prepared],
            Mark::Committed => &[Mark::CommitSent],
        }
    }
}

/// A mark that cannot be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarkError {
    /// A mark it needs is missing.
    #[error("{mark:?} was recorded before {needed:?}")]
    OutOfOrder {
        /// The mark.
        mark: Mark,
        /// The one missing.
        needed: Mark,
    },
    /// It is set already.
    #[error("{mark:?} was recorded twice")]
    Twice {
        /// The mark.
        mark: Mark,
    },
    /// The migration has ended in the other way.
    #[error("{mark:?} was recorded after {ended:?}")]
    AfterTheEnd {
        /// The mark.
        mark: Mark,
        /// How it ended.
        ended: Mark,
    },
    /// Its time lies before that of an earlier mark.
    #[error("{mark:?} at {at:?} lies before {latest:?}, the time of the latest mark")]
    TimeWentBack {
        /// The mark.
        mark: Mark,
        /// Its time.
        at: Duration,
        /// The latest time so far.
        latest: Duration,
    },
}

/// The marks set so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    marks: Vec<(Mark, Duration)>,
    at_target: TargetTimes,
}

/// What only the target can measure, by its own clock: lengths, so the clocks need not agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetTimes {
    /// From the last image's arrival until the copy was held, without `fill`.
    #[serde(rename = "restore_ms", with = "millis")]
    pub restore: Duration,
    /// Filling pages before the copy was prepared; zero if all were filled after the release.
    #[serde(rename = "fill_ms", with = "millis")]
    pub fill: Duration,
    /// From the hook's release until the copy ran.
    #[serde(rename = "resume_ms", with = "millis")]
    pub resume: Duration,
}

impl Timeline {
    /// Sets a mark, `at` being the time since the migration began.
    ///
    /// # Errors
    /// If a mark it needs is missing, it is set already, the migration is over, or time went back. Nothing is set then.
    pub fn record(&mut self, mark: Mark, at: Duration) -> Result<(), MarkError> {
        if self.at(mark).is_some() {
            return Err(MarkError::Twice { mark });
        }
        if let Some(ended) = [Mark::Committed, Mark::Resumed]
            .into_iter()
            .find(|end| self.at(*end).is_some())
        {
            return Err(MarkError::AfterTheEnd { mark, ended });
        }
        if let Some(needed) = mark
            .needs()
            .iter()
            .find(|needed| self.at(**needed).is_none())
        {
            return Err(MarkError::OutOfOrder {
                mark,
                needed: *needed,
            });
        }
        match self.marks.last() {
            Some((_, latest)) if at < *latest => Err(MarkError::TimeWentBack {
                mark,
                at,
                latest: *latest,
            }),
            _ => {
                self.marks.push((mark, at));
                Ok(())
            }
        }
    }

    /// Takes over what the target measured.
    pub fn set_target_times(&mut self, times: TargetTimes) {
        self.at_target = times;
    }

    /// What the target measured, as far as it is known.
    pub fn target_times(&self) -> TargetTimes {
        self.at_target
    }

    /// When a mark was set.
    pub fn at(&self, mark: Mark) -> Option<Duration> {
        self.marks
            .iter()
            .find(|(set, _)| *set == mark)
            .map(|(_, at)| *at)
    }

    /// How long the container stood still so far, by parts; `None` if it was never stopped. `now` ends it if it
    /// still stands still.
    pub fn downtime(&self, now: Duration) -> Option<Downtime> {
        let began = self.at(Mark::FreezeBegan)?;
        let end = self
            .at(Mark::Committed)
            .or(self.at(Mark::Resumed))
            .unwrap_or(now);
        let from = |start: Option<Duration>, until: Mark| match (start, self.at(until)) {
            (Some(start), Some(until)) => until.saturating_sub(start),
            _ => Duration::ZERO,
        };
        let frozen = self.at(Mark::Frozen);
        let both = self.at(Mark::DeltaSent).max(self.at(Mark::DumpHeld));
        let answered = from(self.at(Mark::CommitSent), Mark::Committed);
        Some(Downtime {
            total: end.saturating_sub(began),
            freeze: from(Some(began), Mark::Frozen),
            delta: from(frozen, Mark::DeltaSent),
            dump: from(frozen, Mark::DumpHeld),
            images: from(both, Mark::ImagesSent),
            restore: self.at_target.restore,
            fill: self.at_target.fill,
            commit: answered.saturating_sub(self.at_target.resume),
            resume: self.at_target.resume,
        })
    }
}

/// How long the container stood still, and for what. `delta` and `dump` run side by side, and waiting for the
/// network is in no part, so the parts do not add up to the total.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the order to freeze until the source knew that it runs again, there or here. Seen from inside the
    /// container it is shorter by half a round trip.
    #[serde(rename = "total_ms", with = "millis")]
    pub total: Duration,
    /// Until every task stood still.
    #[serde(rename = "freeze_ms", with = "millis")]
    pub freeze: Duration,
    /// Last scan, reading and sending of the dirty pages.
    #[serde(rename = "delta_ms", with = "millis")]
    pub delta: Duration,
    /// CRIU's dump, until its hook held it.
    #[serde(rename = "dump_ms", with = "millis")]
    pub dump: Duration,
    /// Sending the images, after delta and dump.
    #[serde(rename = "images_ms", with = "millis")]
    pub images: Duration,
    /// CRIU's restore at the target, until its hook held it.
    #[serde(rename = "restore_ms", with = "millis")]
    pub restore: Duration,
    /// Filling pages before the copy was prepared.
    #[serde(rename = "fill_ms", with = "millis")]
    pub fill: Duration,
    /// The target's record and the round trip.
    #[serde(rename = "commit_ms", with = "millis")]
    pub commit: Duration,
    /// From the hook's release until the copy ran.
    #[serde(rename = "resume_ms", with = "millis")]
    pub resume: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_parts_of_a_downtime_are_the_gaps_between_its_marks() {
        let mut timeline = Timeline::default();
        for (mark, at) in [
            (Mark::FreezeBegan, 1000),
            (Mark::Frozen, 1003),
            (Mark::DeltaSent, 1030),
            (Mark::DumpHeld, 1040),
            (Mark::ImagesSent, 1045),
            (Mark::Prepared, 1095),
            (Mark::CommitSent, 1098),
            (Mark::Committed, 1110),
        ] {
            timeline.record(mark, ms(at)).expect("in order");
        }
        timeline.set_target_times(TargetTimes {
            restore: ms(40),
            fill: ms(8),
            resume: ms(5),
        });
        let expected = Downtime {
            total: ms(110),
            freeze: ms(3),
            delta: ms(27),
            dump: ms(37),
            images: ms(5),
            restore: ms(40),
            fill: ms(8),
            commit: ms(7),
            resume: ms(5),
        };
        assert_eq!(timeline.downtime(ms(5000)), Some(expected));
    }

    #[test]
    fn a_container_never_frozen_has_no_downtime() {
        assert_eq!(Timeline::default().downtime(ms(5)), None);
    }

    #[test]
    fn a_rollback_ends_the_downtime_and_the_timeline() {
        let mut timeline = Timeline::default();
        timeline.record(Mark::FreezeBegan, ms(10)).expect("first");
        timeline.record(Mark::Frozen, ms(12)).expect("second");
        assert_eq!(
            timeline.downtime(ms(20)).map(|downtime| downtime.total),
            Some(ms(10)),
            "still frozen"
        );
        timeline
            .record(Mark::Resumed, ms(15))
            .expect("a rollback may come any time");
        assert_eq!(
            timeline.downtime(ms(20)).map(|downtime| downtime.total),
            Some(ms(5))
        );
        assert_eq!(
            timeline.record(Mark::DeltaSent, ms(16)),
            Err(MarkError::AfterTheEnd {
                mark: Mark::DeltaSent,
                ended: Mark::Resumed
            })
        );
    }

    #[test]
    fn time_does_not_go_back() {
        let mut timeline = Timeline::default();
        timeline.record(Mark::FreezeBegan, ms(10)).expect("first");
        let refused = MarkError::TimeWentBack {
            mark: Mark::Frozen,
            at: ms(9),
            latest: ms(10),
        };
        assert_eq!(timeline.record(Mark::Frozen, ms(9)), Err(refused));
        assert_eq!(timeline.at(Mark::Frozen), None);
    }

    proptest! {
        #[test]
        fn no_mark_is_ever_set_without_those_it_needs(tries in prop::collection::vec((0..Mark::ALL.len(), 0u64..100), 0..60)) {
            let mut timeline = Timeline::default();
            for (index, at) in tries {
                let mark = Mark::ALL[index];
                if timeline.record(mark, ms(at)).is_ok() {
                    for needed in mark.needs() {
                        let needed = timeline.at(*needed);
                        prop_assert!(needed.is_some_and(|needed| needed <= ms(at)));
                    }
                }
            }
            if let Some(downtime) = timeline.downtime(ms(100)) {
                prop_assert!(downtime.freeze + downtime.images <= downtime.total);
                prop_assert!(downtime.freeze + downtime.delta <= downtime.total);
                prop_assert!(downtime.freeze + downtime.dump <= downtime.total);
            }
        }
    }
}
