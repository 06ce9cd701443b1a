//! What a prefork server costs: pages that its processes share, on the wire and in memory at both ends.
//!
//! ```text
//!  source: memory of the container's cgroup ─ before ─ most during the move        ┐
//!          RSS and PSS of its processes, summed                                    ├▶ line of prefork.jsonl ─▶ table
//!  link:   bytes ──────────────────────────────────────────────────────────────────┤
//!  target: memory of the container's cgroup, RSS and PSS, when all is filled in    ┘
//! ```
//!
//! A cgroup counts a page once however many processes map it: it grows when a page stops being shared.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rig::{Container, ContainerOptions, Host, Link, Workload};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::measure::Site;
use crate::record::{self, Machine};

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Directory for prefork.jsonl, to which lines are appended, and prefork.md.
    #[arg(long)]
    results: PathBuf,
    /// The shared table in MiB.
    #[arg(long, default_value_t = 256)]
    table: u32,
    /// Workers that share it.
    #[arg(long, value_delimiter = ',', default_value = "2,8")]
    workers: Vec<u32>,
    /// Modes of migrate; an empty word gives no --mode.
    #[arg(long, value_delimiter = ',', default_value = "pre-copy,post-copy")]
    modes: Vec<String>,
    /// What to call the build that is measured.
    #[arg(long, default_value = "this build")]
    label: String,
}

/// How long a container runs before it is moved, and after the last page until its memory is measured.
const SETTLE: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(180);
const VERDICT: Duration = Duration::from_secs(120);

/// Memory of a container, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Memory {
    /// Of its cgroup, files not counted: each page once.
    cgroup_mib: f64,
    /// Of its processes, summed: a shared page as often as it is shared.
    rss_mib: f64,
    /// The same, each page divided among those that share it.
    pss_mib: f64,
}

/// One run: a line of `prefork.jsonl`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    label: String,
    mode: String,
    table_mib: u32,
    workers: u32,
    before: Memory,
    /// The most of the source's cgroup while it was moved.
    source_peak_mib: f64,
    after: Memory,
    wire_mib: f64,
    downtime_ms: Option<f64>,
    total_s: f64,
    verified: bool,
    commit: String,
    kernel: String,
    load_before: f64,
}

/// Runs every case. Returns whether every container arrived as it should be.
pub fn run(options: &Options) -> Result<bool> {
    std::fs::create_dir_all(&options.results)
        .with_context(|| format!("creating {}", options.results.display()))?;
    let lines = options.results.join("prefork.jsonl");
    let mut out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&lines)
        .with_context(|| format!("opening {}", lines.display()))?;
    let machine = Machine::read()?;
    let mut all_verified = true;
    for &workers in &options.workers {
        for mode in &options.modes {
            let record = measure(options, workers, mode, &machine)
                .with_context(|| format!("{workers} workers, {mode}"))?;
            all_verified &= record.verified;
            let line = serde_json::to_string(&record)?;
            writeln!(out, "{line}").with_context(|| format!("writing {}", lines.display()))?;
            println!("{line}");
        }
    }
    let table = table(&lines)?;
    let page = options.results.join("prefork.md");
    std::fs::write(&page, &table).with_context(|| format!("writing {}", page.display()))?;
    println!("\n{table}");
    Ok(all_verified)
}

fn measure(options: &Options, workers: u32, mode: &str, machine: &Machine) -> Result<Record> {
    let load_before = record::load()?;
    let (source, target) = (Host::new("a")?, Host::new("b")?);
    let link = Link::join(&source, &target)?;
    let site = Site {
        source: &source,
        target: &target,
        link: &link,
    };
    let arguments = [
        format!("--table-mib={}", options.table),
        format!("--workers={workers}"),
    ];
    let workload = Workload::new("prefork", arguments);
    let container = Container::create(&source, "bench", &workload, &ContainerOptions::default())?;
    let agent = crate::engine::prepare(&site, &container)?;
    std::thread::sleep(SETTLE);

    let before = memory(&container, &source)?;
    let sent = link.bytes_sent()?.iter().sum::<u64>();
    let start = Instant::now();
    const REPORT: &str = "/run/report.json";
    let mut words = vec!["--to", agent.address(), "--report", REPORT];
    if !mode.is_empty() {
        words.extend(["--mode", mode]);
    }
    words.push(container.id());
    let mut migrate = source.spawn("migrate", words)?;
    let cgroup = source.container_memory(container.id())?;
    let (most, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let status = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // It is gone when the container is.
                most.fetch_max(cgroup.bytes().unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let status = migrate.wait(LIMIT);
        over.store(true, Ordering::Relaxed);
        status
    })?;
    let total_s = start.elapsed().as_secs_f64();
    anyhow::ensure!(status.success(), "migrate failed: {}", migrate.output()?);
    std::thread::sleep(SETTLE);
    let wire = link.bytes_sent()?.iter().sum::<u64>() - sent;
    let after = memory(&container, &target)?;
    let report: Value = serde_json::from_slice(&std::fs::read(source.path(REPORT))?)?;
    Ok(Record {
        label: options.label.clone(),
        mode: mode.to_string(),
        table_mib: options.table,
        workers,
        before,
        source_peak_mib: mib(most.into_inner()),
        after,
        wire_mib: mib(wire),
        downtime_ms: report["downtime"]["total_ms"].as_f64(),
        total_s,
        verified: container.verify(&target, VERDICT)?.verified,
        commit: machine.commit.clone(),
        kernel: machine.kernel.clone(),
        load_before,
    })
}

/// Of a container as it is on a host now.
fn memory(container: &Container, host: &Host) -> Result<Memory> {
    let cgroup = host.container_memory(container.id())?;
    let mut memory = Memory {
        cgroup_mib: mib(cgroup.bytes()?),
        rss_mib: 0.0,
        pss_mib: 0.0,
    };
    for pid in cgroup.processes()? {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let kib = |name: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next());
            number
                .and_then(|number| number.parse::<f64>().ok())
                .with_context(|| format!("no {name} in a rollup"))
        };
        memory.rss_mib += kib("Rss:")? / 1024.0;
        memory.pss_mib += kib("Pss:")? / 1024.0;
    }
    Ok(memory)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Every line of a results file as a table, in Markdown.
fn table(results: &Path) -> Result<String> {
    use std::fmt::Write;
    let text = std::fs::read_to_string(results)
        .with_context(|| format!("reading {}", results.display()))?;
    let mut table = String::from(
        "In MiB. *Memory* is what the container's cgroup is charged for, each page once; RSS and PSS are sums over its \
         processes.\n\n\
         | build | mode | workers | RSS before | PSS before | memory before | most at the source | on the wire | memory after | PSS after | total s | downtime ms | verified |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for line in text.lines() {
        let r: Record = serde_json::from_str(line)
            .with_context(|| format!("a line of {}", results.display()))?;
        writeln!(
            table,
            "| {} | {} | {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.2} | {} | {} |",
            r.label,
            r.mode,
            r.workers,
            r.before.rss_mib,
            r.before.pss_mib,
            r.before.cgroup_mib,
            r.source_peak_mib,
            r.wire_mib,
            r.after.cgroup_mib,
            r.after.pss_mib,
            r.total_s,
            r.downtime_ms
                .map_or("–".to_string(), |ms| format!("{ms:.0}")),
            r.verified
        )?;
    }
    Ok(table)
}
