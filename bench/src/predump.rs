//! Against CRIU's own pre-copy: how long a container stands still in each round and at the handover, and what crosses the
//! link, for CRIU's pre-dumps and for migrate with each tracker that the running kernel has.
//!
//! ```text
//!  memory × dirty rate ─▶ mover (criu-predump | migrate soft-dirty | migrate uffd-wp) ─▶ line of predump.jsonl ─▶ table
//! ```
//!
//! Needs neither cargo nor git: a prebuilt `bench` runs in a guest. Only there it can, where the development kernel has no
//! soft-dirty bits, which CRIU's pre-dump needs. Times under emulation are long and their ratios hold.

mod criu;
mod engine;
mod journey;
mod report;
mod statistics;
mod stillness;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migrate::source::tracker::{TrackerKind, Trackers};
use rig::{Container, ContainerOptions, Host, Link, Workload};
use serde::{Deserialize, Serialize};

use crate::measure::Site;
use crate::record::{self, Machine};
use journey::Journey;
use report::Record;

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Directory for predump.jsonl, to which lines are appended, and predump.md.
    #[arg(long)]
    results: PathBuf,
    /// One run of each case instead of three, with half the memory.
    #[arg(long)]
    quick: bool,
    /// The workload's memory in MiB.
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// What the workload rewrites in incompressible memory of small pages, in MB a second.
    #[arg(
        long,
        value_name = "MB",
        value_delimiter = ',',
        default_value = "0,1,3"
    )]
    dirty: Vec<u32>,
    /// The same in memory of huge pages: one soft-dirty bit speaks for 512 pages there.
    #[arg(long, value_name = "MB", value_delimiter = ',', default_value = "1")]
    dirty_huge: Vec<u32>,
    /// The same in memory of small pages that can be compressed as a heap can.
    #[arg(long, value_name = "MB", value_delimiter = ',', default_value = "1")]
    dirty_heap: Vec<u32>,
    /// Rate of the link. Emulated processors are some twenty times slower than real ones: 50 is to them what 1 Gbit/s is to
    /// those. A faster link would show who encrypts, for emulation makes that far slower than copying.
    #[arg(long, value_name = "MBIT", default_value_t = 50)]
    link: u32,
    /// Runs of each case.
    #[arg(long, value_name = "N")]
    runs: Option<u32>,
}

/// How long a container runs before it is moved; how long its clock stands still anyhow is measured meanwhile.
const SETTLE: Duration = Duration::from_secs(3);

/// How long a container is left alone after a move: it logs its last gap, and goes on for a while.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// How long a verdict may take: guests are emulated.
const VERDICT: Duration = Duration::from_secs(240);

/// What is moved.
#[derive(Debug, Clone, Copy)]
struct Case {
    memory_mib: u32,
    dirty_mb_s: u32,
    memory: Memory,
    link_mbit: u32,
}

/// What the workload's memory is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Memory {
    /// Small pages, incompressible.
    Small,
    /// Huge pages, incompressible.
    Huge,
    /// Small pages, compressible as a heap full of records is.
    Heap,
}

impl Memory {
    fn arguments(self) -> [&'static str; 2] {
        match self {
            Memory::Small => ["--small", "--content=incompressible"],
            Memory::Huge => ["--huge", "--content=incompressible"],
            Memory::Heap => ["--small", "--content=compressible"],
        }
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Memory::Small => "small pages",
            Memory::Huge => "huge pages",
            Memory::Heap => "small pages, compressible",
        })
    }
}

/// Moved once by every mover before anything is measured.
const WARM_UP: Case = Case {
    memory_mib: 8,
    dirty_mb_s: 1,
    memory: Memory::Small,
    link_mbit: 50,
};

/// Who moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mover {
    /// `runc checkpoint --pre-dump` until p.haul would stop, then `runc checkpoint`.
    CriuPredump,
    /// `migrate --to`.
    Migrate(TrackerKind),
}

impl Mover {
    fn system(self) -> &'static str {
        match self {
            Mover::CriuPredump => report::THEIRS,
            Mover::Migrate(_) => report::OURS,
        }
    }

    fn tracker(self) -> TrackerKind {
        match self {
            Mover::CriuPredump => TrackerKind::SoftDirty,
            Mover::Migrate(tracker) => tracker,
        }
    }
}

/// What a move showed.
struct Measured {
    journey: Journey,
    /// For each round, then for the handover: the longest gap that began in it.
    still_ms: Vec<f64>,
    /// The longest gap before the order.
    undisturbed_ms: f64,
    verified: bool,
}

/// Every line of a results file as a table, in Markdown.
pub fn table(results: &std::path::Path) -> Result<String> {
    report::table(results)
}

/// Runs every case with every mover. Returns whether every container arrived as it should be.
pub fn run(options: &Options) -> Result<bool> {
    let trackers = Trackers::find();
    ensure!(
        trackers.kernel.soft_dirty.is_ok(),
        "CRIU's pre-dump needs soft-dirty bits (CONFIG_MEM_SOFT_DIRTY), which this kernel does not have: \
         run this in a guest (scripts/guest)"
    );
    let ours = [TrackerKind::SoftDirty, TrackerKind::UffdWp];
    let ours = ours
        .into_iter()
        .filter(|&kind| trackers.usable(kind).is_ok());
    let movers: Vec<Mover> = std::iter::once(Mover::CriuPredump)
        .chain(ours.map(Mover::Migrate))
        .collect();
    let memory_mib = options
        .memory
        .unwrap_or(if options.quick { 64 } else { 128 });
    let cases: Vec<Case> = [
        (Memory::Small, &options.dirty),
        (Memory::Huge, &options.dirty_huge),
        (Memory::Heap, &options.dirty_heap),
    ]
    .into_iter()
    .flat_map(|(memory, rates)| {
        rates.iter().map(move |&dirty_mb_s| Case {
            memory_mib,
            dirty_mb_s,
            memory,
            link_mbit: options.link,
        })
    })
    .collect();
    let runs = options.runs.unwrap_or(if options.quick { 1 } else { 3 });

    std::fs::create_dir_all(&options.results)
        .with_context(|| format!("creating {}", options.results.display()))?;
    let lines = options.results.join("predump.jsonl");
    let mut out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&lines)
        .with_context(|| format!("opening {}", lines.display()))?;
    let machine = Machine::read()?;
    // Whoever is first would else pay for reading all programs from the disk.
    for &mover in &movers {
        measure(mover, &WARM_UP).with_context(|| format!("the warm-up of {}", mover.system()))?;
    }
    let mut all_verified = true;
    for run in 1..=runs {
        for case in &cases {
            for &mover in &movers {
                let load_before = record::load()?;
                let measured = measure(mover, case);
                let record = Record::new(
                    &machine,
                    (mover.system(), mover.tracker()),
                    (case, run),
                    load_before,
                    measured,
                );
                all_verified &= record.verified;
                let line = serde_json::to_string(&record)?;
                writeln!(out, "{line}").with_context(|| format!("writing {}", lines.display()))?;
                println!("{line}");
            }
        }
    }
    let table = report::table(&lines)?;
    let page = options.results.join("predump.md");
    std::fs::write(&page, &table).with_context(|| format!("writing {}", page.display()))?;
    println!("\n{table}");
    Ok(all_verified)
}

/// One move between two fresh hosts.
fn measure(mover: Mover, case: &Case) -> Result<Measured> {
    let (source, target) = (Host::new("a")?, Host::new("b")?);
    let link = Link::join(&source, &target)?;
    link.limit_rate(case.link_mbit)?;
    let site = Site {
        source: &source,
        target: &target,
        link: &link,
    };
    let workload = Workload::memory_writer(case.memory_mib, case.dirty_mb_s)
        .arg(case.memory.arguments()[0])
        .arg(case.memory.arguments()[1])
        .arg(format!("--gap-ms={}", stillness::SHORTEST_MS));
    let container = Container::create(&source, "bench", &workload, &ContainerOptions::default())?;
    let settled = || -> Result<f64> {
        let settling = stillness::now()?;
        std::thread::sleep(SETTLE);
        Ok(settling)
    };
    let (settling, journey) = match mover {
        Mover::CriuPredump => {
            let waiting = criu::prepare(&site)?;
            (settled()?, criu::finish(&site, &container, waiting)?)
        }
        Mover::Migrate(tracker) => {
            let agent = crate::engine::prepare(&site, &container)?;
            (
                settled()?,
                engine::finish(&site, &container, &agent, &tracker.to_string())?,
            )
        }
    };
    std::thread::sleep(AFTERWARDS);

    ensure!(
        !container.is_running(&source)?,
        "the container still runs at the source"
    );
    let gaps = stillness::gaps(&container.log(&target)?);
    let ends = journey.began.iter().skip(1).copied().chain([f64::INFINITY]);
    let still_ms = journey
        .began
        .iter()
        .zip(ends)
        .map(|(&began, ended)| stillness::longest(&gaps, began, ended))
        .collect();
    let ordered = journey.began.first().copied().context("no order")?;
    Ok(Measured {
        still_ms,
        undisturbed_ms: stillness::longest(&gaps, settling, ordered),
        journey,
        verified: container.verify(&target, VERDICT)?.verified,
    })
}
