//! `--auto-converge`: slowing the container, step by step, while its rounds do not converge.
//!
//! It is over before the container is frozen, in every course: CRIU's work on the tasks must not wait for a quota, and the
//! container has to have its own limits again wherever it goes on. Until then each step is in the journal, so that the guard
//! or `migrate recover` undoes what a dead engine left.

use super::handover::Handover;
use super::send::FrameSink;
use crate::fault;
use crate::migration::convergence::{FreezeReason, Limits};
use crate::migration::decision::{Course, Verdict};
use crate::migration::event::Event;
use crate::migration::journal::{Leftover, Record};
use crate::migration::mode::Mode;
use crate::runtime::cpu_quota::{CpuCgroup, QuotaError, Slowed, Throttle, UseSince};

/// What can slow a container: from the first round on, its CPU use is measured.
#[derive(Debug)]
pub struct Slowing {
    cgroup: CpuCgroup,
    since: UseSince,
    throttle: Option<Throttle>,
}

impl<S: FrameSink> Handover<'_, S> {
    /// Begins to measure, if the container may be slowed.
    pub(super) fn may_slow(&mut self) {
        if !self.plan.auto_converge || !matches!(self.mode, Mode::PreCopy | Mode::Auto) {
            return;
        }
        let Some(cgroup) = self.container.cpu() else {
            tracing::warn!("the container has no CPU cgroup of its own: it is not slowed");
            return;
        };
        match cgroup.measure() {
            Ok(since) => {
                self.slowing = Some(Slowing {
                    cgroup,
                    since,
                    throttle: None,
                });
            }
            Err(error) => tracing::warn!(%error, "the container is not slowed"),
        }
    }

    /// Slows the container instead of freezing it, if that is what this verdict calls for and it can be slowed further.
    pub(super) fn slow_instead(&mut self, verdict: &Verdict, limits: &Limits) -> bool {
        let unconverged = matches!(
            verdict.course,
            Course::Freeze {
                why: FreezeReason::NoProgress | FreezeReason::Outrun,
                ..
            }
        );
        if !unconverged || verdict.assessment.expected_downtime <= limits.downtime {
            return false;
        }
        match self.slow() {
            Ok(Some(share)) => {
                let percent = (share * 100.0).round() as u32;
                self.slowed = Some(percent);
                (self.emit)(Event::Slowed { percent });
                fault::before("source", format_args!("Slowed"));
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(%error, "the container cannot be slowed further");
                false
            }
        }
    }

    fn slow(&mut self) -> Result<Option<f64>, QuotaError> {
        let Some(slowing) = &mut self.slowing else {
            return Ok(None);
        };
        let throttle = match &mut slowing.throttle {
            Some(throttle) => throttle,
            none => none.insert(Throttle::new(slowing.cgroup.clone(), slowing.since)?),
        };
        let journal = &mut self.journal;
        throttle.step(|slowed| {
            let Slowed {
                file,
                original,
                lowered,
            } = slowed;
            let leftover = Leftover::CpuQuota {
                file,
                original,
                lowered,
            };
            journal
                .append(&Record::Leftover(leftover))
                .map_err(|error| error.to_string())
        })
    }
}
