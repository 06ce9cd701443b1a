//! The lines of `modes.jsonl`.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::curve::SlowPages;
use super::{Cell, Load, Outcome, Speed, System};
use crate::measure::Downtime;
use crate::record::{Ends, Machine};

/// One run. Times named `_s` are in seconds since the order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub bench: String,
    pub system: System,
    pub link: Speed,
    /// What the link carries: its limit, or what TCP with TLS reached.
    pub link_mb_s: f64,
    pub workload: Load,
    /// The workload's own memory; of redis, that of its records is half of it.
    pub memory_mib: u32,
    pub dirty_times_link: Option<f64>,
    /// What the workload was to rewrite, and what it did before the order: a core has its limits.
    pub dirty_mb_s: Option<u32>,
    pub dirty_reached_mb_s: Option<f64>,
    pub run: u32,
    /// The longest time the container's own clock stood still.
    pub downtime_ms: Option<f64>,
    /// What migrate reports of the same, `total_ms` and its parts.
    pub downtime_reported: Option<Downtime>,
    /// What migrate predicted when it decided to freeze, `downtime_ms`, `total_ms` and `last_page_ms` (after the release).
    pub predicted: Option<Value>,
    /// What became of the pages still to be sent then: `pre-copy` or `post-copy`.
    pub switch: Option<String>,
    /// The container ran at the target.
    pub resumed_s: Option<f64>,
    /// The last page was at the target.
    pub last_page_s: Option<f64>,
    /// All was over at the source.
    pub total_s: Option<f64>,
    /// Both hosts together, headers included.
    pub wire_bytes: Option<u64>,
    /// Rounds while the container ran at the source, and why they ended.
    pub rounds: Option<usize>,
    pub rounds_ended: Option<Value>,
    pub cpu_s: Option<Ends>,
    pub peak_rss_mib: Option<Ends>,
    /// Of the memory workload: pages it waited for longer than 30 µs, from its start on.
    #[serde(flatten)]
    pub slow: Option<SlowPages>,
    /// The container's pace before, in MB/s touched, of redis in writes a second.
    pub pace_before: Option<f64>,
    /// Work not done, in seconds of that pace.
    pub lost_s: Option<f64>,
    /// Back at nine tenths of that pace.
    pub recovered_s: Option<f64>,
    /// The pace over time: seconds since the order, and the pace since the point before.
    pub curve: Vec<(f64, f64)>,
    /// The workload found everything right afterwards.
    pub verified: bool,
    /// Why there are no figures.
    pub error: Option<String>,
    /// migrate's whole report.
    pub report: Option<Value>,
    pub commit: String,
    pub kernel: String,
    pub machine: String,
    /// Processes that wanted a processor in the minute before, by `/proc/loadavg`: what else the machine did.
    pub load_before: f64,
}

/// The lines of a results file.
pub fn read(lines: &Path) -> Result<Vec<Record>> {
    let text =
        std::fs::read_to_string(lines).with_context(|| format!("reading {}", lines.display()))?;
    text.lines()
        .map(|line| serde_json::from_str(line).map_err(anyhow::Error::from))
        .collect::<Result<_>>()
        .with_context(|| format!("in {}", lines.display()))
}

impl Record {
    /// Whether it is this run of this cell.
    pub fn is_of(&self, cell: &Cell, system: System, run: u32) -> bool {
        (self.link, self.workload, self.dirty_times_link) == (cell.speed, cell.load, cell.times)
            && (self.system, self.run) == (system, run)
    }

    /// Writes a run down, also one that failed.
    pub fn new(
        machine: &Machine,
        cell: &Cell,
        system: System,
        run: u32,
        load_before: f64,
        outcome: Result<Outcome>,
    ) -> Record {
        let mut record = Record {
            bench: "modes".to_string(),
            system,
            link: cell.speed,
            link_mb_s: cell.link_mb_s,
            workload: cell.load,
            memory_mib: cell.speed.memory_mib(),
            dirty_times_link: cell.times,
            dirty_mb_s: cell.dirty_mb_s(),
            dirty_reached_mb_s: None,
            run,
            downtime_ms: None,
            downtime_reported: None,
            predicted: None,
            switch: None,
            resumed_s: None,
            last_page_s: None,
            total_s: None,
            wire_bytes: None,
            rounds: None,
            rounds_ended: None,
            cpu_s: None,
            peak_rss_mib: None,
            slow: None,
            pace_before: None,
            lost_s: None,
            recovered_s: None,
            curve: Vec::new(),
            verified: false,
            error: None,
            report: None,
            commit: machine.commit.clone(),
            kernel: machine.kernel.clone(),
            machine: machine.hardware.clone(),
            load_before,
        };
        match outcome {
            Ok(outcome) => record.fill(outcome),
            Err(why) => record.error = Some(format!("{why:#}")),
        }
        record
    }

    fn fill(&mut self, outcome: Outcome) {
        let Outcome {
            moved,
            costs,
            curve,
            verified,
        } = outcome;
        self.downtime_ms = Some(curve.downtime_ms);
        self.resumed_s = Some(curve.resumed_s);
        self.last_page_s = moved.last_page_s;
        self.total_s = Some(moved.total_s);
        self.wire_bytes = Some(costs.wire_bytes);
        self.cpu_s = Some(costs.cpu_s);
        self.peak_rss_mib = Some(costs.peak_rss_mib);
        self.dirty_reached_mb_s = curve.written_before_mb_s;
        self.slow = curve.slow;
        self.pace_before = Some(curve.before);
        self.lost_s = Some(curve.lost_s);
        self.recovered_s = curve.recovered_s;
        // A second before the order is enough to see what it was like.
        self.curve = curve
            .points
            .into_iter()
            .filter(|(t, _)| *t > -1.0)
            .map(|(t, pace)| ((t * 1e3).round() / 1e3, pace))
            .collect();
        self.verified = verified;
        if let Some(report) = moved.report {
            self.read_report(report);
        }
    }

    fn read_report(&mut self, report: Value) {
        let rounds = report["rounds"].as_array();
        self.rounds = rounds.map(Vec::len);
        self.rounds_ended = Some(report["rounds_ended"].clone()).filter(|why| !why.is_null());
        self.predicted = Some(report["predicted"].clone()).filter(|known| !known.is_null());
        self.switch = report["switch"].as_str().map(str::to_string);
        self.downtime_reported = serde_json::from_value(report["downtime"].clone()).ok();
        // In pre-copy the target fills in pages it already has; what is owed arrives from the source.
        let arrived = report["post_copy"]["last_page_ms"].as_f64();
        let filled = arrived.or(report["fill_after_release_ms"].as_f64());
        self.last_page_s = match (self.resumed_s, filled) {
            (Some(resumed), Some(filled)) => Some(resumed + filled / 1e3),
            _ => None,
        };
        self.report = Some(report);
    }

    /// A predicted time, in milliseconds.
    pub fn predicted_ms(&self, name: &str) -> Option<f64> {
        self.predicted.as_ref()?[name].as_f64()
    }

    /// The whole as one line for the terminal.
    pub fn in_short(&self) -> String {
        let show = |figure: Option<f64>, unit| {
            figure.map_or("–".to_string(), |figure| format!("{figure:.2} {unit}"))
        };
        format!(
            "{} {} {} {}: downtime {}, total {}, lost {}, {}",
            self.link.name(),
            self.workload.name(),
            self.dirty_times_link
                .map_or(String::new(), |times| format!("×{times}")),
            self.system.name(),
            show(self.downtime_ms, "ms"),
            show(self.total_s, "s"),
            show(self.lost_s, "s"),
            match &self.error {
                Some(why) => why.as_str(),
                None if self.verified => "verified",
                None => "WRONG",
            }
        )
    }
}
