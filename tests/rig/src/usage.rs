//! What a host's own work costs: processor time and memory of everything that runs on it outside containers.
//!
//! Agents, runtimes and CRIU live in a cgroup of their own, `rig`, beside those of the containers: its figures are theirs.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::host::Host;

/// How often memory is looked at: a peak shorter than this may be missed.
const SAMPLE: Duration = Duration::from_millis(5);

/// Processor time the host's own processes have used since it was made, in seconds, ended ones included.
pub fn cpu_seconds(host: &Host) -> Result<f64> {
    if let Ok(file) = own_file(host, "cpuacct.usage") {
        return Ok(fs::read_to_string(file)?.trim().parse::<f64>()? / 1e9);
    }
    let stat = fs::read_to_string(own_file(host, "cpu.stat")?)?;
    Ok(field(&stat, "usage_usec").context("cpu.stat has no usage_usec")? as f64 / 1e6)
}

/// The memory of a container on a host, as its cgroup counts it.
pub struct ContainerMemory {
    stat: PathBuf,
}

impl Host {
    /// Finds it; it is there as long as the container is.
    pub fn container_memory(&self, id: &str) -> Result<ContainerMemory> {
        let stat = cgroup_file(self, id, "memory.stat")?;
        Ok(ContainerMemory { stat })
    }
}

impl ContainerMemory {
    /// Bytes held privately and in shared memory, each page once. The page cache of files is not counted.
    pub fn bytes(&self) -> Result<u64> {
        held_bytes(&self.stat)
    }

    /// The container's processes.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let procs = self.stat.with_file_name("cgroup.procs");
        let text =
            fs::read_to_string(&procs).with_context(|| format!("reading {}", procs.display()))?;
        text.lines()
            .map(|pid| pid.parse().context("a process id"))
            .collect()
    }
}

/// Samples the memory of a host's own processes until it is asked for the peak.
///
/// Counted is what they hold privately and in shared memory such as memfds and tmpfs. The page cache of files is not.
pub struct PeakMemory {
    stop: Arc<AtomicBool>,
    peak: Arc<AtomicU64>,
    sampler: Option<JoinHandle<()>>,
}

impl PeakMemory {
    /// Starts sampling.
    pub fn watch(host: &Host) -> Result<PeakMemory> {
        let stat = own_file(host, "memory.stat")?;
        held_bytes(&stat)?;
        let stop = Arc::new(AtomicBool::new(false));
        let peak = Arc::new(AtomicU64::new(0));
        let sampler = std::thread::spawn({
            let (stop, peak) = (stop.clone(), peak.clone());
            move || {
                loop {
                    // Once more after the word to stop: what is held at the end counts, however late this thread is.
                    let stopping = stop.load(Ordering::Relaxed);
                    peak.fetch_max(held_bytes(&stat).unwrap_or(0), Ordering::Relaxed);
                    if stopping {
                        break;
                    }
                    std::thread::sleep(SAMPLE);
                }
            }
        });
        Ok(PeakMemory {
            stop,
            peak,
            sampler: Some(sampler),
        })
    }

    /// Stops, and returns the most seen, in MiB.
    pub fn peak_mib(mut self) -> f64 {
        self.end();
        self.peak.load(Ordering::Relaxed) as f64 / f64::from(1 << 20)
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sampler) = self.sampler.take() {
            // It has nothing that could panic.
            let _ = sampler.join();
        }
    }
}

impl Drop for PeakMemory {
    fn drop(&mut self) {
        self.end();
    }
}

/// A file of the cgroup of the host's own processes.
fn own_file(host: &Host, name: &str) -> Result<PathBuf> {
    cgroup_file(host, "rig", name)
}

fn cgroup_file(host: &Host, cgroup: &str, name: &str) -> Result<PathBuf> {
    host.cgroups()?
        .into_iter()
        .map(|root| root.join(cgroup).join(name))
        .find(|file| file.exists())
        .with_context(|| format!("host {} has no cgroup {cgroup} with {name}", host.name()))
}

fn held_bytes(stat: &PathBuf) -> Result<u64> {
    let text = fs::read_to_string(stat).with_context(|| format!("reading {}", stat.display()))?;
    let private = field(&text, "rss")
        .or_else(|| field(&text, "anon"))
        .context("memory.stat has neither rss nor anon")?;
    Ok(private + field(&text, "shmem").unwrap_or(0))
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}
