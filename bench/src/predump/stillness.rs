//! When the container stood still, by its own clock, told apart by the phases of a move.
//!
//! In go the workload's log and the moments at which phases began; out comes the longest gap of each phase. A gap belongs
//! to the phase in which it began: the one of the freeze ends at the target, long after.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde_json::Value;

/// The workload logs gaps above this, in milliseconds: what a short stop looks like, and what ordinary scheduling does in
/// an emulated machine too.
pub const SHORTEST_MS: u32 = 2;

/// A time at which the container did not run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gap {
    /// Seconds since 1970.
    pub began: f64,
    /// Milliseconds.
    pub lasted_ms: f64,
}

/// The gaps in a workload's log. A line is written when its gap is over.
pub fn gaps(log: &[Value]) -> Vec<Gap> {
    log.iter()
        .filter_map(|line| {
            // By the real time: the monotonic clock stands still between dump and restore.
            let lasted_ms = line["gap_realtime_ms"].as_f64()?;
            Some(Gap {
                began: line["t"].as_f64()? - lasted_ms / 1000.0,
                lasted_ms,
            })
        })
        .collect()
}

/// The longest gap that began within `from..to`, in milliseconds; [`SHORTEST_MS`] if none was as long as that.
pub fn longest(gaps: &[Gap], from: f64, to: f64) -> f64 {
    gaps.iter()
        .filter(|gap| (from..to).contains(&gap.began))
        .map(|gap| gap.lasted_ms)
        .fold(f64::from(SHORTEST_MS), f64::max)
}

/// The clock the workload's log is written by, in seconds.
pub fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_gap_counts_in_the_phase_in_which_it_began() {
        let log = [
            json!({"ready": true}),
            json!({"gap_ms": 5.0, "gap_realtime_ms": 5.0, "t": 10.5}),
            json!({"t": 11.0, "seq": 7, "longest_gap_ms": 5.0}),
            json!({"gap_ms": 400.0, "gap_realtime_ms": 400.0, "t": 12.2}),
        ];
        let gaps = gaps(&log);
        assert_eq!(gaps.len(), 2);
        assert_eq!(longest(&gaps, 10.0, 11.0), 5.0);
        assert_eq!(longest(&gaps, 11.0, 12.0), 400.0);
        assert_eq!(longest(&gaps, 12.0, 13.0), f64::from(SHORTEST_MS));
    }
}
