//! One move, cut into its rounds and the handover: when each began, and what it put on the link.

use std::time::Instant;

use anyhow::Result;
use rig::WireBytes;

use super::stillness::now;
use crate::measure::{Downtime, Site};

/// What was measured of a move, whoever moved.
#[derive(Debug, Clone, Default)]
pub struct Journey {
    /// When each phase began, in seconds since 1970: the rounds, then the handover.
    pub began: Vec<f64>,
    /// What both hosts put on the wire in each phase.
    pub bytes: Vec<u64>,
    /// From the order to its end.
    pub total_s: f64,
    /// For each phase how long CRIU itself says it kept the container frozen; empty when CRIU did not do it.
    pub criu_frozen_ms: Vec<f64>,
    /// What the engine's report says of the downtime.
    pub reported_downtime: Option<Downtime>,
}

/// Takes the time and counts the bytes of a move under way.
pub struct Stopwatch<'s> {
    site: &'s Site<'s>,
    start: Instant,
    /// At the start, at the end of each round, and at the end.
    counted: Vec<WireBytes>,
    journey: Journey,
}

impl<'s> Stopwatch<'s> {
    /// The first round begins.
    pub fn start(site: &'s Site) -> Result<Stopwatch<'s>> {
        Ok(Stopwatch {
            site,
            start: Instant::now(),
            counted: vec![site.link.ask_wire_bytes()?],
            journey: Journey {
                began: vec![now()?],
                ..Journey::default()
            },
        })
    }

    /// A round is over; another, or the handover, begins.
    pub fn round_ends(&mut self) -> Result<()> {
        self.journey.began.push(now()?);
        self.count()
    }

    /// The move is over.
    pub fn stop(mut self) -> Result<Journey> {
        self.journey.total_s = self.start.elapsed().as_secs_f64();
        self.count()?;
        let counted = self
            .counted
            .into_iter()
            .map(WireBytes::answer)
            .collect::<Result<Vec<u64>>>()?;
        self.journey.bytes = counted.windows(2).map(|pair| pair[1] - pair[0]).collect();
        Ok(self.journey)
    }

    /// Not waited for: the move goes on meanwhile, and what it sends until then counts in the phase that ends.
    fn count(&mut self) -> Result<()> {
        self.counted.push(self.site.link.ask_wire_bytes()?);
        Ok(())
    }
}
