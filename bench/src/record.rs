//! Raw results: one JSON object a line, written as soon as it is known.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::measure::{Case, Downtime, Measured, System};

/// A figure for each end.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Ends {
    /// At the source.
    pub source: f64,
    /// At the target.
    pub target: f64,
}

/// One run: a line of `core.jsonl`. Fields are those of [`Measured`] and of the case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub bench: String,
    pub case: String,
    pub system: System,
    pub run: u32,
    pub memory_mib: u32,
    pub dirty_mb_s: u32,
    pub mtu: u32,
    pub gap_ms: Option<f64>,
    pub downtime_ms: Option<f64>,
    pub downtime: Option<Downtime>,
    pub total_s: Option<f64>,
    pub wire_bytes: Option<u64>,
    pub cpu_s: Option<Ends>,
    pub peak_rss_mib: Option<Ends>,
    pub throughput_loss: Option<f64>,
    pub verified: bool,
    /// Why there are no figures.
    pub error: Option<String>,
    pub commit: String,
    pub kernel: String,
    /// Processes that wanted a processor in the minute before the run, by `/proc/loadavg`: what else the machine did.
    pub load_before: f64,
}

/// Environment variable with the commit the programs were built from.
const COMMIT: &str = "MIGRATE_COMMIT";

/// Where and with what it was measured.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Commit of this repository, with a `+` when the tree differs from it.
    pub commit: String,
    /// `uname -r`.
    pub kernel: String,
    /// Processor, number of cores, memory.
    pub hardware: String,
    /// Number of cores.
    pub cores: usize,
    /// runc and CRIU.
    pub software: String,
}

impl Machine {
    /// Asks the machine.
    pub fn read() -> Result<Machine> {
        let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
        let model = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("?", |(_, m)| m);
        let cores = cpu
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count();
        let memory = std::fs::read_to_string("/proc/meminfo")?;
        let kib: u64 = memory
            .split_whitespace()
            .nth(1)
            .and_then(|kib| kib.parse().ok())
            .context("no memory in meminfo")?;
        let prefix =
            std::env::var("MIGRATE_CRIU_PREFIX").unwrap_or_else(|_| rig::CRIU_PREFIX.to_string());
        let private = format!("{prefix}/bin/criu");
        let criu = said(
            if Path::new(&private).exists() {
                &private
            } else {
                "criu"
            },
            &["--version"],
        )?;
        Ok(Machine {
            commit: commit()?,
            kernel: said("uname", &["-r"])?,
            hardware: format!(
                "{model}, {cores} cores, {:.0} GiB",
                kib as f64 / f64::from(1 << 20)
            ),
            cores,
            software: format!(
                "{}, CRIU {}",
                said("runc", &["--version"])?
                    .lines()
                    .next()
                    .unwrap_or_default(),
                criu.lines()
                    .next()
                    .unwrap_or_default()
                    .trim_start_matches("Version: ")
            ),
        })
    }
}

/// The commit that was built: where there is no repository, as in a guest, [`COMMIT`] says it.
pub fn commit() -> Result<String> {
    if let Ok(commit) = std::env::var(COMMIT) {
        return Ok(commit);
    }
    let commit = said("git", &["rev-parse", "--short=12", "HEAD"])
        .with_context(|| format!("asking git for the commit ({COMMIT} may say it instead)"))?;
    // Results are being written: they change nothing of what is measured.
    let status = [
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":!results",
    ];
    let changed = !said("git", &status)?.is_empty();
    Ok(if changed { commit + "+" } else { commit })
}

/// The load of the last minute.
pub fn load() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let first = text.split_whitespace().next();
    first
        .and_then(|load| load.parse().ok())
        .context("no figure in /proc/loadavg")
}

/// The file of raw results.
pub struct Recorder {
    path: PathBuf,
    file: File,
    machine: Machine,
    records: Vec<Record>,
}

impl Recorder {
    /// Starts an empty file.
    pub fn create(path: PathBuf, machine: Machine) -> Result<Recorder> {
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Recorder {
            path,
            file,
            machine,
            records: Vec::new(),
        })
    }

    /// Writes a run down, also one that failed, and tells the user.
    pub fn add(
        &mut self,
        case: &Case,
        system: System,
        run: u32,
        load_before: f64,
        measured: Result<Measured>,
    ) -> Result<()> {
        let (measured, error) = match measured {
            Ok(measured) => (Some(measured), None),
            Err(why) => (None, Some(format!("{why:#}"))),
        };
        let known = measured.as_ref();
        let record = Record {
            bench: "core".to_string(),
            case: case.name.to_string(),
            system,
            run,
            memory_mib: case.memory_mib,
            dirty_mb_s: case.dirty_mb_s,
            mtu: case.mtu,
            gap_ms: known.and_then(|m| m.gap_ms),
            downtime_ms: known.and_then(|m| m.downtime_ms),
            downtime: known.and_then(|m| m.downtime.clone()),
            total_s: known.map(|m| m.total_s),
            wire_bytes: known.map(|m| m.wire_bytes),
            cpu_s: known.map(|m| m.cpu_s),
            peak_rss_mib: known.map(|m| m.peak_rss_mib),
            throughput_loss: known.and_then(|m| m.throughput_loss),
            verified: known.is_some_and(|m| m.verified),
            error,
            commit: self.machine.commit.clone(),
            kernel: self.machine.kernel.clone(),
            load_before,
        };
        let line = serde_json::to_string(&record)?;
        writeln!(self.file, "{line}")
            .with_context(|| format!("writing {}", self.path.display()))?;
        println!("{line}");
        self.records.push(record);
        Ok(())
    }

    /// All runs.
    pub fn finish(self) -> Vec<Record> {
        self.records
    }
}

fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("running {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_string())
}
