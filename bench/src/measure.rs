//! One case with one system: set up, move, ask the workload.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use rig::{Container, ContainerOptions, Host, Link, PeakMemory, Workload, cpu_seconds};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::record::Ends;
use crate::{checkpoint, engine, tls_copy};

/// How long a container runs before it is moved: its throughput before is measured in this time.
const SETTLE: Duration = Duration::from_secs(3);

/// How long a verdict may take.
const VERDICT: Duration = Duration::from_secs(120);

/// Who moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// `migrate --to`.
    Migrate,
    /// `runc checkpoint`, the images over TCP, `runc restore`.
    RuncCheckpoint,
    /// As many bytes over TCP and TLS, from memory to memory: no container.
    TlsCopy,
}

/// What is moved.
#[derive(Debug, Clone)]
pub struct Case {
    /// Short name for tables.
    pub name: &'static str,
    /// The workload's memory, incompressible.
    pub memory_mib: u32,
    /// What the workload rewrites in it, in MB a second.
    pub dirty_mb_s: u32,
    /// Largest packet between the hosts, in bytes.
    pub mtu: u32,
    /// The workload also checks its memory as fast as one core can; how fast is its throughput.
    pub busy: bool,
}

impl Case {
    /// The cases of the core benchmark.
    pub fn core() -> Vec<Case> {
        let mut cases = Vec::new();
        for memory_mib in [64, 512, 2048] {
            for (name, dirty_mb_s) in [("idle", 0), ("dirtying", 50)] {
                cases.push(Case {
                    name,
                    memory_mib,
                    dirty_mb_s,
                    mtu: 1500,
                    busy: false,
                });
            }
        }
        cases.push(Case {
            name: "idle",
            memory_mib: 2048,
            dirty_mb_s: 0,
            mtu: 9000,
            busy: false,
        });
        cases.push(Case {
            name: "busy",
            memory_mib: 2048,
            dirty_mb_s: 50,
            mtu: 1500,
            busy: true,
        });
        cases
    }

    /// Whether the case says anything about the system: bare bytes are never dirty, and packet size and lost throughput
    /// are not what stopping a container is about.
    pub fn suits(&self, system: System) -> bool {
        match system {
            System::Migrate => true,
            System::RuncCheckpoint => self.mtu == 1500 && !self.busy,
            System::TlsCopy => self.dirty_mb_s == 0 && self.memory_mib >= 512,
        }
    }
}

/// A downtime as the engine's report has it: `total_ms` and its parts, in milliseconds.
pub type Downtime = BTreeMap<String, f64>;

/// What came out.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Longest time the workload's clock stood still, in milliseconds.
    pub gap_ms: Option<f64>,
    /// What the engine says of the same.
    pub downtime_ms: Option<f64>,
    /// Its parts.
    pub downtime: Option<Downtime>,
    /// From the order to its end, in seconds.
    pub total_s: f64,
    /// Bytes both hosts put on the link, headers of every layer included.
    pub wire_bytes: u64,
    /// Processor seconds of everything outside the container.
    pub cpu_s: Ends,
    /// Peak memory of everything outside the container, in MiB.
    pub peak_rss_mib: Ends,
    /// Share of the workload's throughput lost from the order until it stopped.
    pub throughput_loss: Option<f64>,
    /// The workload found everything right afterwards.
    pub verified: bool,
}

/// Two hosts and the link between them.
pub struct Site<'h> {
    pub source: &'h Host,
    pub target: &'h Host,
    pub link: &'h Link<'h>,
}

/// Runs a case on two fresh hosts.
pub fn run(case: &Case, system: System) -> Result<Measured> {
    let (source, target) = (Host::new("a")?, Host::new("b")?);
    let link = Link::join(&source, &target)?;
    link.set_mtu(case.mtu)?;
    let site = Site {
        source: &source,
        target: &target,
        link: &link,
    };
    match system {
        System::TlsCopy => tls_copy::measure(&site, case),
        System::RuncCheckpoint => {
            move_container(&site, case, checkpoint::prepare, checkpoint::finish)
        }
        System::Migrate => move_container(&site, case, engine::prepare, engine::finish),
    }
}

/// Starts the container, lets `prepare` do what may be done before the clock runs, and measures `finish`, which moves and
/// returns the downtime it knows of.
fn move_container<P>(
    site: &Site,
    case: &Case,
    prepare: impl FnOnce(&Site, &Container) -> Result<P>,
    finish: impl FnOnce(&Site, &Container, &P) -> Result<Option<Downtime>>,
) -> Result<Measured> {
    let mut workload =
        Workload::memory_writer(case.memory_mib, case.dirty_mb_s).arg("--report-ms=100");
    if case.busy {
        workload = workload.arg("--check-mb-s=max");
    }
    let container = Container::create(
        site.source,
        "bench",
        &workload,
        &ContainerOptions::default(),
    )?;
    let prepared = prepare(site, &container)?;
    std::thread::sleep(SETTLE);

    let costs = Costs::start(site)?;
    let ordered_at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    let start = Instant::now();
    let downtime = finish(site, &container, &prepared)?;
    let total_s = start.elapsed().as_secs_f64();
    // Long enough for the workload to notice and log the gap.
    std::thread::sleep(Duration::from_millis(500));
    let mut measured = costs.end(site)?;

    ensure!(
        !container.is_running(site.source)?,
        "the container still runs at the source"
    );
    let verdict = container.verify(site.target, VERDICT)?;
    measured.verified = verdict.verified;
    // By the real time: a restored container's monotonic clock goes on where it was dumped.
    measured.gap_ms = verdict.more["longest_gap_realtime_ms"].as_f64();
    measured.downtime_ms = downtime
        .as_ref()
        .and_then(|parts| parts.get("total_ms").copied());
    measured.downtime = downtime;
    measured.total_s = total_s;
    if case.busy {
        measured.throughput_loss = Some(throughput_loss(&container.log(site.target)?, ordered_at)?);
    }
    Ok(measured)
}

/// Processor time, memory and bytes from one moment to another.
pub struct Costs {
    cpu_s: Ends,
    sent: u64,
    source_memory: PeakMemory,
    target_memory: PeakMemory,
}

impl Costs {
    /// Starts counting.
    pub fn start(site: &Site) -> Result<Costs> {
        Ok(Costs {
            cpu_s: Ends {
                source: cpu_seconds(site.source)?,
                target: cpu_seconds(site.target)?,
            },
            sent: site.link.bytes_sent()?.iter().sum(),
            source_memory: PeakMemory::watch(site.source)?,
            target_memory: PeakMemory::watch(site.target)?,
        })
    }

    /// Stops counting.
    pub fn end(self, site: &Site) -> Result<Measured> {
        Ok(Measured {
            cpu_s: Ends {
                source: cpu_seconds(site.source)? - self.cpu_s.source,
                target: cpu_seconds(site.target)? - self.cpu_s.target,
            },
            wire_bytes: site.link.bytes_sent()?.iter().sum::<u64>() - self.sent,
            peak_rss_mib: Ends {
                source: self.source_memory.peak_mib(),
                target: self.target_memory.peak_mib(),
            },
            ..Measured::default()
        })
    }
}

/// Of the workload's checking: how much slower it was between the order and the stop than before the order.
fn throughput_loss(log: &[Value], ordered_at: f64) -> Result<f64> {
    let number = |line: &Value, name: &str| line[name].as_f64();
    // A gap is told when it is over.
    let stopped_at = log
        .iter()
        .filter_map(|line| Some((number(line, "gap_realtime_ms")?, number(line, "t")?)))
        .filter(|&(_, told_at)| told_at > ordered_at)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(gap_ms, told_at)| told_at - gap_ms / 1000.0)
        .context("the workload saw no gap")?;
    let mean = |from: f64, to: f64| {
        let rates: Vec<f64> = log
            .iter()
            .filter(|line| number(line, "t").is_some_and(|t| t > from && t < to))
            .filter_map(|line| number(line, "checked_mb_s"))
            .collect();
        (!rates.is_empty()).then(|| rates.iter().sum::<f64>() / rates.len() as f64)
    };
    let before = mean(ordered_at - SETTLE.as_secs_f64() + 0.5, ordered_at)
        .context("no throughput before the order")?;
    // The line that was being measured when the order came belongs to neither.
    let during = mean(ordered_at + 0.1, stopped_at).context("no throughput during the rounds")?;
    Ok(1.0 - during / before)
}
