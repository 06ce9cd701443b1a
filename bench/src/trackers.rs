//! What tracking writes costs, for each tracker of the running kernel, and how it agrees with a program's own record.
//!
//! Needs neither cargo nor git nor a container: a prebuilt `bench` runs in a guest, with `MIGRATE_TEST_PROGRAMS` naming the
//! directory of the built programs of tests/programs, and `MIGRATE_COMMIT`. Lines are appended to a file, so that one file takes
//! several kernels.
//!
//! ```text
//!  dirtier: a block of memory ─▶ first scan, clean, 1 %, 10 %, all dirty ─┐  median of repetitions
//!  dirtier: what it saw itself (standstill, time of a write) ────────────┼─▶ a line of trackers.jsonl ─▶ table
//!  recorder: the agreement test ─────────────────────────────────────────┘
//! ```

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migrate::source::tracker::{Motion, Tracker, TrackerKind};
use serde::{Deserialize, Serialize};

#[allow(
    dead_code,
    reason = "shared with tests/tracker.rs, which uses other parts of it"
)]
#[path = "../../tests/support"]
mod support {
    pub mod agreement;
    pub mod freezer;
    pub mod offer;
    pub mod program;
}
use crate::record::Machine;
use support::freezer::Freezer;
use support::program::Commanded;
use support::{agreement, offer};

/// What to measure.
#[derive(clap::Args)]
pub struct Arguments {
    /// Memory of the tracked program, in MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// How often each cost is measured; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// File the results are appended to, one JSON object a line.
    #[arg(long)]
    out: PathBuf,
}

/// A line of `trackers.jsonl`.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    kernel: String,
    machine: String,
    commit: String,
    tracker: String,
    memory_bytes: u64,
    repetitions: u32,
    #[serde(flatten)]
    costs: Costs,
    /// Pages the program wrote in the agreement test, summed over the scans.
    recorded_pages: u64,
    /// Of these, pages not reported by the scan after.
    missed_pages: u64,
    /// Pages reported but not recorded, and their causes.
    over_reported_pages: u64,
    over_reported_huge_page_pages: u64,
    over_reported_dropped_pages: u64,
    over_reported_not_armed_pages: u64,
    over_reported_other_pages: u64,
}

/// Costs, each the median of the repetitions. A standstill is the longest time in which a thread of the program that never
/// rests did not run: on a busy machine also without any scan.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Costs {
    /// Attaching to a program of a few MiB and its first scan.
    attach_ms: f64,
    attach_standstill_ms: f64,
    /// First scan, with attaching.
    first_scan_ms_per_gib: f64,
    first_scan_standstill_ms: f64,
    /// Later scans.
    clean_scan_ms_per_gib: f64,
    clean_scan_standstill_ms: f64,
    dirty_1_percent_scan_ms_per_gib: f64,
    dirty_1_percent_scan_standstill_ms: f64,
    dirty_10_percent_scan_ms_per_gib: f64,
    dirty_10_percent_scan_standstill_ms: f64,
    all_dirty_scan_ms_per_gib: f64,
    /// As long as a clean scan, without one.
    no_scan_standstill_ms: f64,
    /// A write to a page before tracking, and the first one after a scan.
    untracked_write_ns_per_page: f64,
    first_write_after_scan_ns_per_page: f64,
    /// Giving the tracker up.
    detach_ms: f64,
    detach_standstill_ms: f64,
}

/// Measures every tracker of this kernel. Returns whether none missed a page.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let machine = Machine::read()?;
    let kinds = offer::offered();
    let outcome = agreement::run(kinds, 30, 200);
    if let Some((first, second)) = outcome.reported_by_one {
        println!(
            "reported only by {}: {first} pages, only by {}: {second} pages",
            kinds[0], kinds[1]
        );
    }
    let mut out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&arguments.out)
        .with_context(|| format!("opening {}", arguments.out.display()))?;
    for agreement in &outcome.agreements {
        for missed in &agreement.missed {
            println!("MISSED: {missed}");
        }
        let runs = (0..arguments.repetitions)
            .map(|_| measure(agreement.kind, arguments.memory))
            .collect::<Result<Vec<Costs>>>()?;
        let over = agreement.over_reported;
        let line = Line {
            kernel: machine.kernel.clone(),
            machine: machine.hardware.clone(),
            commit: machine.commit.clone(),
            tracker: agreement.kind.to_string(),
            memory_bytes: arguments.memory << 20,
            repetitions: arguments.repetitions,
            costs: medians(&runs)?,
            recorded_pages: agreement.recorded_pages,
            missed_pages: agreement.missed_pages,
            over_reported_pages: over.pages(),
            over_reported_huge_page_pages: over.huge_page,
            over_reported_dropped_pages: over.dropped,
            over_reported_not_armed_pages: over.not_armed,
            over_reported_other_pages: over.stack + over.program + over.other,
        };
        let line = serde_json::to_string(&line)?;
        writeln!(out, "{line}").with_context(|| format!("writing {}", arguments.out.display()))?;
        println!("{line}");
    }
    print!("\n{}", table(&arguments.out)?);
    Ok(outcome
        .agreements
        .iter()
        .all(|agreement| agreement.missed_pages == 0))
}

/// All costs once, with a program of its own.
fn measure(kind: TrackerKind, memory_mib: u64) -> Result<Costs> {
    let mut costs = Costs::default();
    let freezer = Freezer::new("cost");
    let mut bench = Bench {
        program: Commanded::start(&freezer),
        freezer: &freezer,
    };
    bench.program.obey("watch");
    let mut tracker = offer::opened(kind);
    (costs.attach_ms, costs.attach_standstill_ms, _) = bench.scan(tracker.as_mut())?;
    drop(tracker);

    bench.program.obey(&format!("fill {memory_mib} 0"));
    let gib = memory_mib as f64 / 1024.0;
    (_, costs.untracked_write_ns_per_page) = bench.pace(1)?;
    let mut tracker = offer::opened(kind);
    let mut scan = |bench: &mut Bench<'_>, at_least: u64| {
        let (took_ms, standstill_ms, dirty) = bench.scan(tracker.as_mut())?;
        ensure!(
            dirty >= at_least,
            "{kind} reported {dirty} pages where {at_least} were written"
        );
        Ok((took_ms / gib, standstill_ms))
    };
    let pages = memory_mib << 8;
    (costs.first_scan_ms_per_gib, costs.first_scan_standstill_ms) = scan(&mut bench, pages)?;
    (costs.clean_scan_ms_per_gib, costs.clean_scan_standstill_ms) = scan(&mut bench, 0)?;
    costs.no_scan_standstill_ms = bench
        .standstill(|_| {
            std::thread::sleep(Duration::from_secs_f64(
                costs.clean_scan_ms_per_gib * gib / 1e3,
            ));
            Ok(())
        })?
        .1;
    let (written, _) = bench.pace(100)?;
    (
        costs.dirty_1_percent_scan_ms_per_gib,
        costs.dirty_1_percent_scan_standstill_ms,
    ) = scan(&mut bench, written)?;
    let (written, _) = bench.pace(10)?;
    (
        costs.dirty_10_percent_scan_ms_per_gib,
        costs.dirty_10_percent_scan_standstill_ms,
    ) = scan(&mut bench, written)?;
    (_, costs.first_write_after_scan_ns_per_page) = bench.pace(1)?;
    (costs.all_dirty_scan_ms_per_gib, _) = scan(&mut bench, pages)?;
    (costs.detach_ms, costs.detach_standstill_ms) = bench
        .standstill(|_| {
            drop(tracker);
            Ok(())
        })
        .map(|(took, still, ())| (took, still))?;
    Ok(costs)
}

/// The measured program and its cgroup.
struct Bench<'f> {
    program: Commanded,
    freezer: &'f Freezer,
}

impl Bench<'_> {
    /// Scans. Returns how long it took and the program stood still, in ms, and how many pages are dirty.
    fn scan(&mut self, tracker: &mut dyn Tracker) -> Result<(f64, f64, u64)> {
        self.standstill(|freezer| {
            let scans = tracker.scan(&freezer.tasks(), Motion::Running)?;
            ensure!(scans.len() == 1, "the program is one address space");
            ensure!(
                scans[0].untracked.is_none(),
                "not tracked: {:?}",
                scans[0].untracked
            );
            Ok(scans[0].dirty.pages())
        })
    }

    /// Does `work`, and returns how long it took and the program stood still meanwhile, in ms.
    fn standstill<T>(&mut self, work: impl FnOnce(&Freezer) -> Result<T>) -> Result<(f64, f64, T)> {
        self.program.ask("gap");
        let start = Instant::now();
        let result = work(self.freezer)?;
        let took = start.elapsed();
        let gap: f64 = self
            .program
            .ask("gap")
            .parse()
            .context("the program's gap")?;
        Ok((took.as_secs_f64() * 1e3, gap / 1e6, result))
    }

    /// Lets the program write every `stride`th page: how many it wrote, and ns a page.
    fn pace(&mut self, stride: u32) -> Result<(u64, f64)> {
        let answer = self.program.ask(&format!("pace {stride}"));
        let (pages, ns) = answer.split_once(' ').context("the program's pace")?;
        let (pages, ns): (u64, f64) = (pages.parse()?, ns.parse()?);
        Ok((pages, ns / pages as f64))
    }
}

/// The median of each cost.
fn medians(runs: &[Costs]) -> Result<Costs> {
    let runs = runs
        .iter()
        .map(serde_json::to_value)
        .collect::<Result<Vec<_>, _>>()?;
    let mut costs = serde_json::Map::new();
    for name in runs
        .first()
        .and_then(|run| run.as_object())
        .context("no runs")?
        .keys()
    {
        let mut figures: Vec<f64> = runs.iter().filter_map(|run| run[name].as_f64()).collect();
        figures.sort_by(f64::total_cmp);
        let median = figures.get(figures.len() / 2).context("no figure")?;
        costs.insert(name.clone(), (*median).into());
    }
    Ok(serde_json::from_value(costs.into())?)
}

/// Every line of a results file as a table, in Markdown.
pub fn table(results: &Path) -> Result<String> {
    use std::fmt::Write;
    let text = std::fs::read_to_string(results)
        .with_context(|| format!("reading {}", results.display()))?;
    let mut table = String::from(
        "| kernel | tracker | MiB | attach ms | first scan ms/GiB | clean | 1 % dirty | 10 % dirty | standstill ms (clean scan / 10 % / no scan) | write ns (untracked / first after scan) | detach ms | missed | over-reported |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for line in text.lines() {
        let line: Line = serde_json::from_str(line)
            .with_context(|| format!("a line of {}", results.display()))?;
        let costs = &line.costs;
        writeln!(
            table,
            "| {} | {} | {} | {:.2} | {:.1} | {:.1} | {:.1} | {:.1} | {:.2} / {:.2} / {:.2} | {:.0} / {:.0} | {:.2} | {} | {} of {} |",
            line.kernel,
            line.tracker,
            line.memory_bytes >> 20,
            costs.attach_ms,
            costs.first_scan_ms_per_gib,
            costs.clean_scan_ms_per_gib,
            costs.dirty_1_percent_scan_ms_per_gib,
            costs.dirty_10_percent_scan_ms_per_gib,
            costs.clean_scan_standstill_ms,
            costs.dirty_10_percent_scan_standstill_ms,
            costs.no_scan_standstill_ms,
            costs.untracked_write_ns_per_page,
            costs.first_write_after_scan_ns_per_page,
            costs.detach_ms,
            line.missed_pages,
            line.over_reported_pages,
            line.over_reported_pages + line.recorded_pages,
        )?;
    }
    Ok(table)
}
