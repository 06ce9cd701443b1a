//! What a container did from before its move to after it, by its own log.
//!
//! In goes the workload's log, with a line on its pace every [`super::REPORT_MS`] and one for every time its clock stood
//! still; out come the downtime, the pace as a curve, and what the move cost in time. Points are told by a thread that never
//! touches the workload's memory, so they come also while everything else waits for pages.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The clock the workload's log is written by, in seconds since 1970.
pub fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// Pages the container waited for, whatever for: faults over the network, faults of the kernel, a busy processor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SlowPages {
    #[serde(rename = "slow_pages")]
    pub pages: u64,
    #[serde(rename = "slow_p50_us")]
    pub p50_us: f64,
    #[serde(rename = "slow_p99_us")]
    pub p99_us: f64,
    #[serde(rename = "slow_max_us")]
    pub max_us: f64,
}

/// A container's time around its move. Times are in seconds since the order.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// The longest time it did not run, in milliseconds, by the real time: its monotonic clock stands still while it is away.
    pub downtime_ms: f64,
    /// When that was over: it ran at the target.
    pub resumed_s: f64,
    /// What it did in a second before: MB written and checked, or writes to redis.
    pub before: f64,
    /// What it wrote in a second before, in MB; of redis nothing is said.
    pub written_before_mb_s: Option<f64>,
    /// Work not done, in seconds of the pace before: downtime, slowness before it and waiting after it together.
    pub lost_s: f64,
    /// When it was back at nine tenths of the pace before, averaged over half a second; `None` if not within the curve.
    pub recovered_s: Option<f64>,
    /// When, and the pace since the point before.
    pub points: Vec<(f64, f64)>,
    pub slow: Option<SlowPages>,
}

impl Curve {
    /// Reads a log. The container was ordered away at `ordered`; lines after `until` are left out.
    pub fn read(log: &[Value], ordered: f64, until: f64) -> Result<Curve> {
        let number = |line: &Value, name: &str| line[name].as_f64();
        let (gap_ms, told_at) = log
            .iter()
            .filter_map(|line| Some((number(line, "gap_realtime_ms")?, number(line, "t")?)))
            .filter(|&(_, told_at)| told_at > ordered && told_at <= until)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .context("the workload saw no gap")?;
        let points: Vec<(f64, f64)> = log
            .iter()
            .filter_map(|line| Some((number(line, "t")?, pace(line)?)))
            .filter(|&(t, _)| t <= until)
            .map(|(t, pace)| (t - ordered, pace))
            .collect();
        let before = mean(&points, f64::NEG_INFINITY, 0.0).context("no pace before the order")?;
        let written: Vec<(f64, f64)> = log
            .iter()
            .filter_map(|line| Some((number(line, "t")? - ordered, number(line, "written_mb_s")?)))
            .collect();
        let resumed_s = told_at - ordered;
        Ok(Curve {
            downtime_ms: gap_ms,
            resumed_s,
            before,
            written_before_mb_s: mean(&written, f64::NEG_INFINITY, 0.0),
            lost_s: lost(&points, before),
            recovered_s: recovered(&points, resumed_s, before),
            points,
            slow: log
                .iter()
                .rev()
                .find_map(|line| serde_json::from_value(line.clone()).ok()),
        })
    }
}

/// What a line says of the pace, in the workload's own unit.
fn pace(line: &Value) -> Option<f64> {
    match line["written_mb_s"].as_f64() {
        Some(written) => Some(written + line["checked_mb_s"].as_f64()?),
        None => line["writes_per_s"].as_f64(),
    }
}

fn mean(points: &[(f64, f64)], from: f64, to: f64) -> Option<f64> {
    let inside = points.iter().filter(|(t, _)| *t > from && *t <= to);
    let (count, sum) = inside.fold((0u32, 0.0), |(n, sum), (_, pace)| (n + 1, sum + pace));
    (count > 0).then(|| sum / f64::from(count))
}

/// Seconds of work missing after the order. More than before makes up for less.
fn lost(points: &[(f64, f64)], before: f64) -> f64 {
    points
        .windows(2)
        .filter(|pair| pair[1].0 > 0.0)
        .map(|pair| (pair[1].0 - pair[0].0.max(0.0)) * (1.0 - pair[1].1 / before))
        .sum()
}

fn recovered(points: &[(f64, f64)], resumed_s: f64, before: f64) -> Option<f64> {
    const WINDOW: f64 = 0.5;
    let last = points.last()?.0;
    points
        .iter()
        .map(|&(t, _)| t)
        .filter(|&t| t >= resumed_s && t + WINDOW <= last)
        .find(|&t| mean(points, t, t + WINDOW).is_some_and(|pace| pace >= 0.9 * before))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A line a tenth of a second from 9.1 to 12: ten MB/s, none while it stands still from 10.5 to 11, half until 11.3.
    fn log() -> Vec<Value> {
        let mut log = vec![json!({"ready": true})];
        log.extend((1..=14).map(
            |n| json!({"t": 9.1 + f64::from(n) / 10.0, "written_mb_s": 8.0, "checked_mb_s": 2.0}),
        ));
        log.push(json!({"gap_ms": 300.0, "gap_realtime_ms": 500.0, "t": 11.0}));
        log.push(json!({"t": 11.0, "written_mb_s": 0.0, "checked_mb_s": 0.0}));
        for n in 1..=10 {
            let written = if n <= 3 { 3.0 } else { 8.0 };
            log.push(
                json!({"t": 11.0 + f64::from(n) / 10.0, "written_mb_s": written, "checked_mb_s": 2.0}),
            );
        }
        log.push(json!({"slow_pages": 3, "slow_p50_us": 40, "slow_p99_us": 90, "slow_max_us": 90, "t": 12.1}));
        log
    }

    #[test]
    fn what_a_move_cost_is_read_from_the_log() {
        let curve = Curve::read(&log(), 10.0, 12.05).expect("a curve");
        assert_eq!(curve.downtime_ms, 500.0);
        assert!((curve.resumed_s - 1.0).abs() < 1e-9);
        assert!((curve.before - 10.0).abs() < 1e-9);
        // Half a second of nothing, three tenths at half the pace.
        assert!((curve.lost_s - 0.65).abs() < 1e-6, "{}", curve.lost_s);
        let recovered = curve.recovered_s.expect("it was back");
        assert!((recovered - 1.2).abs() < 0.11, "{recovered}");
        assert_eq!(curve.slow.map(|slow| slow.pages), Some(3));
    }

    #[test]
    fn a_container_that_is_never_back_has_not_recovered() {
        let log: Vec<Value> = log()
            .into_iter()
            .filter(|line| line["t"].as_f64() < Some(11.5))
            .collect();
        let curve = Curve::read(&log, 10.0, 12.0).expect("a curve");
        assert_eq!((curve.recovered_s, curve.slow), (None, None));
    }
}
