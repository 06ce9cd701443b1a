//! Every way of moving memory, held against each other: pre-copy, post-copy, both in turn, the engine's own choice, and
//! stock CRIU's post-copy, on slow, ordinary and unshaped links, for containers from idle to far beyond what the link takes.
//!
//! ```text
//!  link × workload × dirty rate ─▶ mover (pre-copy | post-copy | hybrid | auto | criu-lazy-pages)
//!     └▶ two fresh hosts ─▶ move ─▶ line of modes.jsonl, with what the container did meanwhile as a curve ─▶ modes.md
//! ```
//!
//! Every figure of standing still, throughput and waiting for pages is the container's own; a line is verified only if the
//! workload found everything right afterwards.

mod curve;
mod engine;
mod lazy;
mod page;
mod record;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use rig::{Container, ContainerOptions, Host, Link, Workload};
use serde::{Deserialize, Serialize};

use crate::measure::{self, Costs, Measured, Site};
use crate::record::{self as machine, Machine};
use crate::tls_copy;
use curve::Curve;
use record::Record;

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Directory for modes.jsonl and modes.md.
    #[arg(long)]
    results: PathBuf,
    /// Fewer dirty rates.
    #[arg(long)]
    quick: bool,
    /// Who moves.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "pre-copy,post-copy,hybrid,auto,criu-lazy-pages"
    )]
    systems: Vec<System>,
    /// Links to measure on.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "100mbit,1gbit,unshaped"
    )]
    links: Vec<Speed>,
    /// What the memory workload rewrites, in multiples of what the link carries [default: 0,0.25,1,2,4, quick: 0,4].
    #[arg(long, value_name = "TIMES", value_delimiter = ',')]
    rates: Option<Vec<f64>>,
    /// Workloads.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "memory-writer,redis"
    )]
    workloads: Vec<Load>,
    /// Runs of each cell.
    #[arg(long, value_name = "N", default_value_t = 1)]
    runs: u32,
    /// Go on where an interrupted benchmark was: keep what modes.jsonl has and measure only what is missing in it.
    #[arg(long)]
    resume: bool,
}

/// Who moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// `migrate --mode pre-copy`.
    PreCopy,
    /// `migrate --mode post-copy`.
    PostCopy,
    /// `migrate --mode hybrid`.
    Hybrid,
    /// `migrate --mode auto`.
    Auto,
    /// `runc checkpoint --lazy-pages` and `runc restore --lazy-pages`.
    CriuLazyPages,
}

impl System {
    /// Its name in tables; of ours also the mode's.
    pub fn name(self) -> &'static str {
        match self {
            System::PreCopy => "pre-copy",
            System::PostCopy => "post-copy",
            System::Hybrid => "hybrid",
            System::Auto => "auto",
            System::CriuLazyPages => "criu-lazy-pages",
        }
    }
}

/// How fast the link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Speed {
    /// 100 Mbit/s both ways.
    #[value(name = "100mbit")]
    #[serde(rename = "100mbit")]
    Mbit100,
    /// 1 Gbit/s both ways.
    #[value(name = "1gbit")]
    #[serde(rename = "1gbit")]
    Gbit1,
    /// As fast as this machine copies.
    Unshaped,
}

impl Speed {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Speed::Mbit100 => "100mbit",
            Speed::Gbit1 => "1gbit",
            Speed::Unshaped => "unshaped",
        }
    }

    fn limit_mbit(self) -> Option<u32> {
        match self {
            Speed::Mbit100 => Some(100),
            Speed::Gbit1 => Some(1000),
            Speed::Unshaped => None,
        }
    }

    /// The workload's memory: two to three seconds of the link, less on an unshaped one.
    fn memory_mib(self) -> u32 {
        match self {
            Speed::Mbit100 => 32,
            Speed::Gbit1 => 256,
            Speed::Unshaped => 512,
        }
    }
}

/// What is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// Incompressible memory, rewritten at random at a given rate.
    MemoryWriter,
    /// redis and a client that writes 500 records a second.
    Redis,
}

impl Load {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Load::MemoryWriter => "memory-writer",
            Load::Redis => "redis",
        }
    }
}

/// One kind of move.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    pub speed: Speed,
    /// What the link carries, in MB a second: the limit, or for an unshaped one what TCP with TLS reached.
    pub link_mb_s: f64,
    pub load: Load,
    /// Of the memory workload: its dirty rate as a multiple of `link_mb_s`.
    pub times: Option<f64>,
}

impl Cell {
    /// What the memory workload is to rewrite in a second.
    pub fn dirty_mb_s(&self) -> Option<u32> {
        self.times.map(|times| (times * self.link_mb_s) as u32)
    }

    fn workload(&self) -> Workload {
        let memory = self.speed.memory_mib();
        let report = format!("--report-ms={REPORT_MS}");
        match self.load {
            Load::MemoryWriter => Workload::memory_writer(memory, self.dirty_mb_s().unwrap_or(0))
                .arg("--small")
                .arg(format!("--slow-us={SLOW_US}"))
                .arg(report),
            Load::Redis => Workload::redis(memory / 2).arg(report),
        }
    }
}

/// Between two points of a curve.
const REPORT_MS: u32 = 50;

/// A page that took longer was waited for: well above a fault that the kernel serves alone.
const SLOW_US: u32 = 30;

/// How long a container runs before it is moved: its own pace is measured in this time.
const SETTLE: Duration = Duration::from_millis(1500);

/// How long a container is left alone after the last page: whether it is back at its pace.
const AFTERWARDS: Duration = Duration::from_millis(750);

/// How long a move may take until its last page.
const LIMIT: Duration = Duration::from_secs(120);

/// How long a verdict may take.
const VERDICT: Duration = Duration::from_secs(60);

/// What moves a container says of the move. Times are in seconds since the order.
#[derive(Debug, Default)]
pub struct Moved {
    /// The mover itself was done: all is over at the source.
    pub total_s: f64,
    /// The last page was at the target, if the mover knows.
    pub last_page_s: Option<f64>,
    /// migrate's report.
    pub report: Option<serde_json::Value>,
}

/// What a move showed.
struct Outcome {
    moved: Moved,
    costs: Measured,
    curve: Curve,
    verified: bool,
}

/// Runs every cell with every mover. Returns whether every container arrived as it should be.
pub fn run(options: &Options) -> Result<bool> {
    std::fs::create_dir_all(&options.results)
        .with_context(|| format!("creating {}", options.results.display()))?;
    let lines = options.results.join("modes.jsonl");
    let done = match options.resume {
        true => record::read(&lines)?,
        false => Vec::new(),
    };
    let mut out = OpenOptions::new()
        .create(true)
        .write(true)
        .append(options.resume)
        .truncate(!options.resume)
        .open(&lines)
        .with_context(|| format!("opening {}", lines.display()))?;
    let machine = Machine::read()?;
    let mut all_verified = true;
    for cell in cells(options, &done)? {
        for run in 1..=options.runs {
            for &system in &options.systems {
                if done.iter().any(|known| known.is_of(&cell, system, run)) {
                    continue;
                }
                let load_before = machine::load()?;
                let outcome = measure(&cell, system);
                let record = Record::new(&machine, &cell, system, run, load_before, outcome);
                all_verified &= record.verified;
                let line = serde_json::to_string(&record)?;
                writeln!(out, "{line}").with_context(|| format!("writing {}", lines.display()))?;
                println!("{}", record.in_short());
            }
        }
    }
    let text = page::write(&lines, &machine)?;
    let page = options.results.join("modes.md");
    std::fs::write(&page, &text).with_context(|| format!("writing {}", page.display()))?;
    println!("\n{text}");
    Ok(all_verified)
}

fn cells(options: &Options, done: &[Record]) -> Result<Vec<Cell>> {
    let times = match &options.rates {
        Some(times) => times.clone(),
        None if options.quick => vec![0.0, 4.0],
        None => vec![0.0, 0.25, 1.0, 2.0, 4.0],
    };
    let mut cells = Vec::new();
    for &speed in &options.links {
        let link_mb_s = match speed.limit_mbit() {
            Some(mbit) => f64::from(mbit) / 8.0,
            None => match done.iter().find(|known| known.link == speed) {
                Some(known) => known.link_mb_s,
                None => unshaped_mb_s()?,
            },
        };
        let cell = |load, times| Cell {
            speed,
            link_mb_s,
            load,
            times,
        };
        for &load in &options.workloads {
            match load {
                Load::MemoryWriter => {
                    cells.extend(times.iter().map(|&times| cell(load, Some(times))));
                }
                // One link is enough to see what it does to a real server when time is short.
                Load::Redis if options.quick && speed != Speed::Gbit1 => {}
                Load::Redis => cells.push(cell(load, None)),
            }
        }
    }
    Ok(cells)
}

/// What an unshaped link carries: one TCP connection with TLS, from memory to memory.
fn unshaped_mb_s() -> Result<f64> {
    const MIB: u32 = 512;
    let (source, target) = (Host::new("a")?, Host::new("b")?);
    let link = Link::join(&source, &target)?;
    let site = Site {
        source: &source,
        target: &target,
        link: &link,
    };
    let case = measure::Case {
        name: "link",
        memory_mib: MIB,
        dirty_mb_s: 0,
        mtu: 1500,
        busy: false,
    };
    let took = tls_copy::measure(&site, &case)?.total_s;
    Ok(f64::from(MIB) * f64::from(1 << 20) / 1e6 / took)
}

/// One move between two fresh hosts.
fn measure(cell: &Cell, system: System) -> Result<Outcome> {
    let (source, target) = (Host::new("a")?, Host::new("b")?);
    let link = Link::join(&source, &target)?;
    if let Some(mbit) = cell.speed.limit_mbit() {
        link.limit_rate(mbit)?;
    }
    let site = Site {
        source: &source,
        target: &target,
        link: &link,
    };
    let container = Container::create(
        &source,
        "bench",
        &cell.workload(),
        &ContainerOptions::default(),
    )?;
    let (ordered, costs, moved) = match system {
        System::CriuLazyPages => {
            let waiting = lazy::prepare(&site)?;
            let (ordered, costs) = settled(&site)?;
            let moved = lazy::finish(&site, &container, &waiting)?;
            (ordered, costs, moved)
        }
        ours => {
            let agent = crate::engine::prepare(&site, &container)?;
            let (ordered, costs) = settled(&site)?;
            let moved = engine::finish(&site, &container, &agent, ours.name())?;
            (ordered, costs, moved)
        }
    };
    let costs = costs.end(&site)?;
    std::thread::sleep(AFTERWARDS);

    ensure!(
        !container.is_running(&source)?,
        "the container still runs at the source"
    );
    // The verdict reads every page at once: the curve ends before it.
    let until = curve::now()?;
    let verdict = container.verify(&target, VERDICT)?;
    let curve = Curve::read(&container.log(&target)?, ordered, until)?;
    Ok(Outcome {
        moved,
        costs,
        curve,
        verified: verdict.verified,
    })
}

/// Lets the container run, and starts counting; returns when, in seconds since 1970.
fn settled(site: &Site) -> Result<(f64, Costs)> {
    std::thread::sleep(SETTLE);
    let costs = Costs::start(site)?;
    Ok((curve::now()?, costs))
}
