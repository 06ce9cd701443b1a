//! The lines of `predump.jsonl`, and the table that holds ours against theirs.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use migrate::source::tracker::TrackerKind;
use serde::{Deserialize, Serialize};

use super::{Case, Measured, Memory};
use crate::measure::Downtime;
use crate::record::Machine;

/// The mover we are held against.
pub const THEIRS: &str = "criu-predump";

/// Ours.
pub const OURS: &str = "migrate";

/// One run: a line of `predump.jsonl`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub kernel: String,
    pub machine: String,
    pub software: String,
    pub commit: String,
    /// [`THEIRS`] or [`OURS`].
    pub system: String,
    pub tracker: String,
    pub run: u32,
    pub memory_mib: u32,
    pub dirty_mb_s: u32,
    pub memory: Memory,
    pub link_mbit: u32,
    /// Rounds while the container ran.
    pub rounds: Option<usize>,
    /// The longest time the container's clock stood still in each round, in milliseconds, and the longest of these. The
    /// clock does not tell times below 2 ms from none.
    pub frozen_ms_per_round: Vec<f64>,
    pub frozen_ms_max: Option<f64>,
    /// The same for as long as the container was left alone before: what the machine does anyhow.
    pub undisturbed_ms: Option<f64>,
    /// What CRIU says it kept the container frozen, for each round and for the last dump.
    pub criu_frozen_ms: Vec<f64>,
    /// The longest time the clock stood still from the end of the last round on.
    pub downtime_ms: Option<f64>,
    /// What migrate reports of the same, `total_ms` and its parts.
    pub reported_downtime: Option<Downtime>,
    /// What both hosts put on the wire, headers included: in all, and for each round and the handover.
    pub bytes_total: Option<u64>,
    pub bytes_per_round: Vec<u64>,
    /// From the order to its end.
    pub total_s: Option<f64>,
    /// The workload found every page right afterwards.
    pub verified: bool,
    /// Why there are no figures.
    pub error: Option<String>,
    /// Processes that wanted a processor in the minute before, by `/proc/loadavg`.
    pub load_before: f64,
}

impl Record {
    /// Writes a run down, also one that failed. The pairs are system and tracker, case and number.
    pub fn new(
        machine: &Machine,
        (system, tracker): (&str, TrackerKind),
        (case, run): (&Case, u32),
        load_before: f64,
        measured: Result<Measured>,
    ) -> Record {
        let mut record = Record {
            kernel: machine.kernel.clone(),
            machine: machine.hardware.clone(),
            software: machine.software.clone(),
            commit: machine.commit.clone(),
            system: system.to_string(),
            tracker: tracker.to_string(),
            run,
            memory_mib: case.memory_mib,
            dirty_mb_s: case.dirty_mb_s,
            memory: case.memory,
            link_mbit: case.link_mbit,
            rounds: None,
            frozen_ms_per_round: Vec::new(),
            frozen_ms_max: None,
            undisturbed_ms: None,
            criu_frozen_ms: Vec::new(),
            downtime_ms: None,
            reported_downtime: None,
            bytes_total: None,
            bytes_per_round: Vec::new(),
            total_s: None,
            verified: false,
            error: None,
            load_before,
        };
        match measured {
            Ok(measured) => record.fill(measured),
            Err(why) => record.error = Some(format!("{why:#}")),
        }
        record
    }

    fn fill(&mut self, measured: Measured) {
        let mut still_ms = measured.still_ms;
        self.downtime_ms = still_ms.pop();
        self.rounds = Some(still_ms.len());
        self.frozen_ms_max = still_ms.iter().copied().reduce(f64::max);
        self.frozen_ms_per_round = still_ms;
        self.undisturbed_ms = Some(measured.undisturbed_ms);
        self.criu_frozen_ms = measured.journey.criu_frozen_ms;
        self.reported_downtime = measured.journey.reported_downtime;
        self.bytes_total = Some(measured.journey.bytes.iter().sum());
        self.bytes_per_round = measured.journey.bytes;
        self.total_s = Some(measured.journey.total_s);
        self.verified = measured.verified;
    }
}

/// Every line of a results file as a table, in Markdown: medians of the runs that were verified, and for ours how many
/// times less than theirs it is.
pub fn table(results: &Path) -> Result<String> {
    let text = std::fs::read_to_string(results)
        .with_context(|| format!("reading {}", results.display()))?;
    let records = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Record>, _>>()
        .with_context(|| format!("in {}", results.display()))?;
    Ok(table_of(&records)?)
}

fn table_of(records: &[Record]) -> Result<String, std::fmt::Error> {
    let mut text = String::from(
        "In brackets: theirs over ours, of the same kernel, memory and dirty rate; above 1 ours is ahead.\n\n\
         | kernel | MiB | memory | dirty MB/s | link Mbit/s | system | tracker | runs | rounds | longest stop in a round, ms | undisturbed, ms | downtime ms | MB on the wire | total s |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut cases: Vec<Vec<&Record>> = Vec::new();
    for record in records {
        match cases.iter_mut().find(|case| is_of(case[0], record)) {
            Some(case) => case.push(record),
            None => cases.push(vec![record]),
        }
    }
    for case in &cases {
        let theirs: Vec<&Record> = case
            .iter()
            .filter(|r| r.system == THEIRS)
            .copied()
            .collect();
        let mut movers: Vec<(&str, &str)> = Vec::new();
        for record in case {
            let mover = (record.system.as_str(), record.tracker.as_str());
            if !movers.contains(&mover) {
                movers.push(mover);
            }
        }
        for (system, tracker) in movers {
            let runs: Vec<&Record> = case
                .iter()
                .filter(|r| (r.system.as_str(), r.tracker.as_str()) == (system, tracker))
                .copied()
                .collect();
            let versus = (system == OURS).then_some(theirs.as_slice());
            row(&mut text, &runs, versus)?;
        }
    }
    for record in records.iter().filter(|record| !record.verified) {
        let why = record
            .error
            .as_deref()
            .unwrap_or("the workload found its memory wrong");
        writeln!(
            text,
            "\nFAILED: {} {}, kernel {}, {} MiB, {}, {} MB/s, run {}: {}",
            record.system,
            record.tracker,
            record.kernel,
            record.memory_mib,
            record.memory,
            record.dirty_mb_s,
            record.run,
            why.lines().next().unwrap_or_default()
        )?;
    }
    Ok(text)
}

/// Whether two runs may be compared.
fn is_of(case: &Record, record: &Record) -> bool {
    let key = |r: &Record| {
        (
            r.kernel.clone(),
            r.memory_mib,
            r.dirty_mb_s,
            r.memory,
            r.link_mbit,
        )
    };
    key(case) == key(record)
}

fn row(text: &mut String, runs: &[&Record], versus: Option<&[&Record]>) -> std::fmt::Result {
    let Some(first) = runs.first() else {
        return Ok(());
    };
    let cell = |digits: usize, figure: &dyn Fn(&Record) -> Option<f64>| {
        let Some(here) = median(runs, figure) else {
            return "–".to_string();
        };
        match versus.and_then(|theirs| median(theirs, figure)) {
            Some(theirs) => format!("{here:.digits$} ({:.1}×)", theirs / here),
            None => format!("{here:.digits$}"),
        }
    };
    let plain = |figure: &dyn Fn(&Record) -> Option<f64>| {
        median(runs, figure).map_or("–".to_string(), |figure| format!("{figure:.0}"))
    };
    writeln!(
        text,
        "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
        first.kernel,
        first.memory_mib,
        first.memory,
        first.dirty_mb_s,
        first.link_mbit,
        first.system,
        first.tracker,
        runs.iter().filter(|run| run.verified).count(),
        plain(&|run| run.rounds.map(|rounds| rounds as f64)),
        cell(1, &|run| run.frozen_ms_max),
        plain(&|run| run.undisturbed_ms),
        cell(0, &|run| run.downtime_ms),
        cell(1, &|run| run.bytes_total.map(|bytes| bytes as f64 / 1e6)),
        cell(1, &|run| run.total_s),
    )
}

/// Of the runs that were verified.
fn median(runs: &[&Record], figure: &dyn Fn(&Record) -> Option<f64>) -> Option<f64> {
    let verified = runs.iter().filter(|run| run.verified);
    let mut figures: Vec<f64> = verified.filter_map(|run| figure(run)).collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}
