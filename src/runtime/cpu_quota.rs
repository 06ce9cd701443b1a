//! Slowing a container by its cgroup's CPU quota, and giving it back what it had.
//!
//! In comes the container's `cpu` cgroup; a [`Throttle`] lowers the quota in steps below the CPU time the container was
//! measured to use, and puts the original back when it is dropped. Before each step the caller writes down what is needed to
//! undo it ([`Slowed`]), so that a process that dies leaves nobody throttled: [`restore`] undoes it from that record.
//!
//! A quota is never loosened beyond what it was, and one that somebody else has set meanwhile is left as it is.
//!
//! Facts: `cpu.cfs_quota_us` and `cpu.cfs_period_us` of v1, -1 for none (Documentation/scheduler/sched-bwc.rst); `cpu.max` of v2,
//! `max` for none, and `cpu.stat` (Documentation/admin-guide/cgroup-v2.rst). A quota is at least 1 ms.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The share of its measured CPU use that each step leaves the container.
const STEPS: [f64; 5] = [0.5, 0.25, 0.12, 0.06, 0.03];

/// The least quota the kernel takes.
const LEAST: Duration = Duration::from_millis(1);

/// Where a container's CPU quota is set, and where its CPU use is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CpuCgroup {
    /// cgroup v1: the directories in the `cpu` and the `cpuacct` hierarchy.
    V1 {
        /// Of `cpu.cfs_quota_us`.
        cpu: PathBuf,
        /// Of `cpuacct.usage`.
        usage: PathBuf,
    },
    /// cgroup v2: the container's directory.
    V2(PathBuf),
}

/// CPU time in each period; `None` for all there is.
pub type Quota = Option<Duration>;

/// What was done to a quota: enough to undo it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slowed {
    /// The file with the quota: `cpu.cfs_quota_us` or `cpu.max`.
    pub file: PathBuf,
    /// What it held before the first step, as the kernel wrote it.
    pub original: String,
    /// What this step makes of it.
    pub lowered: String,
}

/// Why a quota cannot be used.
#[derive(Debug, Error)]
pub enum QuotaError {
    /// The kernel's file cannot be read or written.
    #[error("cannot {doing} {path}: {source}")]
    File {
        /// Read or write.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It does not hold what the kernel writes.
    #[error("{path} holds {text:?}, which is no CPU quota")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// What is needed to undo it could not be written down.
    #[error("the step is not on record: {0}")]
    Record(String),
}

/// A container that is slowed as long as this lives.
#[derive(Debug)]
pub struct Throttle {
    cgroup: CpuCgroup,
    original: String,
    period: Duration,
    quota: Quota,
    /// CPUs' worth of time the container used before it was slowed.
    use_before: f64,
    steps: usize,
    lowered: Vec<String>,
}

/// What a meter read when it was started.
#[derive(Clone, Copy, Debug)]
pub struct UseSince {
    used: Duration,
    at: Instant,
}

impl CpuCgroup {
    /// Starts to measure CPU use.
    pub fn measure(&self) -> Result<UseSince, QuotaError> {
        Ok(UseSince {
            used: self.used()?,
            at: Instant::now(),
        })
    }

    fn used(&self) -> Result<Duration, QuotaError> {
        let (file, unit): (PathBuf, fn(u64) -> Duration) = match self {
            CpuCgroup::V1 { usage, .. } => (usage.join("cpuacct.usage"), Duration::from_nanos),
            CpuCgroup::V2(path) => (path.join("cpu.stat"), Duration::from_micros),
        };
        let text = read(&file)?;
        let number = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))
            .unwrap_or(&text);
        match number.trim().parse() {
            Ok(number) => Ok(unit(number)),
            Err(_) => Err(malformed(&file, &text)),
        }
    }

    fn file(&self) -> PathBuf {
        match self {
            CpuCgroup::V1 { cpu, .. } => cpu.join("cpu.cfs_quota_us"),
            CpuCgroup::V2(path) => path.join("cpu.max"),
        }
    }

    /// The quota now and its period, and the text of the quota's file.
    fn quota(&self) -> Result<(Quota, Duration, String), QuotaError> {
        let file = self.file();
        let text = read(&file)?;
        let micros = |text: &str| text.parse().map(Duration::from_micros).ok();
        let parsed = match self {
            CpuCgroup::V1 { cpu, .. } => {
                let period = micros(&read(&cpu.join("cpu.cfs_period_us"))?);
                let quota = match text.as_str() {
                    "-1" => Some(None),
                    some => micros(some).map(Some),
                };
                quota.zip(period)
            }
            CpuCgroup::V2(_) => text.split_once(' ').and_then(|(quota, period)| {
                let quota = match quota {
                    "max" => None,
                    some => Some(micros(some)?),
                };
                Some((quota, micros(period)?))
            }),
        };
        match parsed {
            Some((quota, period)) if !period.is_zero() => Ok((quota, period, text)),
            _ => Err(malformed(&file, &text)),
        }
    }

    fn text(&self, quota: Duration, period: Duration) -> String {
        match self {
            CpuCgroup::V1 { .. } => quota.as_micros().to_string(),
            CpuCgroup::V2(_) => format!("{} {}", quota.as_micros(), period.as_micros()),
        }
    }
}

impl Throttle {
    /// Ready to slow the container, which used so much CPU time since `since`. Nothing is changed yet.
    pub fn new(cgroup: CpuCgroup, since: UseSince) -> Result<Throttle, QuotaError> {
        let used = cgroup.used()?.saturating_sub(since.used);
        let (quota, period, original) = cgroup.quota()?;
        Ok(Throttle {
            use_before: used.as_secs_f64() / since.at.elapsed().as_secs_f64().max(1e-3),
            cgroup,
            original,
            period,
            quota,
            steps: 0,
            lowered: Vec::new(),
        })
    }

    /// Slows the container by one more step, which `record` writes down first. Returns the share of its CPU use that it is
    /// left; `None` if there is no further step.
    pub fn step(
        &mut self,
        record: impl FnOnce(Slowed) -> Result<(), String>,
    ) -> Result<Option<f64>, QuotaError> {
        let Some(share) = STEPS.get(self.steps) else {
            return Ok(None);
        };
        self.steps += 1;
        let quota = self.period.mul_f64(self.use_before * share).max(LEAST);
        // Never above what it was.
        let quota = self.quota.map_or(quota, |original| original.min(quota));
        let slowed = Slowed {
            file: self.cgroup.file(),
            original: self.original.clone(),
            lowered: self.cgroup.text(quota, self.period),
        };
        let (file, lowered) = (slowed.file.clone(), slowed.lowered.clone());
        record(slowed).map_err(QuotaError::Record)?;
        self.lowered.push(lowered.clone());
        write(&file, &lowered)?;
        Ok(Some(*share))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let undone = restore_any(&self.cgroup.file(), &self.original, &self.lowered);
        if let Err(error) = undone {
            tracing::error!(%error, "the container stays slowed");
        }
    }
}

/// Undoes the steps a dead process wrote down. A cgroup that is gone, and a quota that none of the steps set, are left alone.
pub fn restore(steps: &[Slowed]) -> Result<(), QuotaError> {
    let Some(first) = steps.first() else {
        return Ok(());
    };
    let lowered: Vec<String> = steps.iter().map(|step| step.lowered.clone()).collect();
    restore_any(&first.file, &first.original, &lowered)
}

fn restore_any(file: &Path, original: &str, lowered: &[String]) -> Result<(), QuotaError> {
    if lowered.is_empty() {
        return Ok(());
    }
    match read(file) {
        Ok(now) if lowered.contains(&now) => write(file, original),
        Ok(_) => Ok(()),
        Err(QuotaError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn read(path: &Path) -> Result<String, QuotaError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim_end().to_owned()),
        Err(source) => Err(QuotaError::File {
            doing: "read",
            path: path.to_path_buf(),
            source,
        }),
    }
}

fn write(path: &Path, text: &str) -> Result<(), QuotaError> {
    fs::write(path, text).map_err(|source| QuotaError::File {
        doing: "write",
        path: path.to_path_buf(),
        source,
    })
}

fn malformed(path: &Path, text: &str) -> QuotaError {
    QuotaError::Malformed {
        path: path.to_path_buf(),
        text: text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// The files of a cgroup in a directory of our own; the real ones are in tests/failure.
    fn v1(quota: &str) -> (TempDir, CpuCgroup) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().to_path_buf();
        for (name, text) in [
            ("cpu.cfs_quota_us", quota),
            ("cpu.cfs_period_us", "100000"),
            ("cpuacct.usage", "0"),
        ] {
            fs::write(path.join(name), format!("{text}\n")).expect(name);
        }
        let cgroup = CpuCgroup::V1 {
            cpu: path.clone(),
            usage: path,
        };
        (dir, cgroup)
    }

    fn v2(max: &str) -> (TempDir, CpuCgroup) {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("cpu.max"), format!("{max}\n")).expect("cpu.max");
        fs::write(dir.path().join("cpu.stat"), "usage_usec 0\nuser_usec 0\n").expect("cpu.stat");
        let cgroup = CpuCgroup::V2(dir.path().to_path_buf());
        (dir, cgroup)
    }

    /// A throttle of a container that used `cpus`.
    fn throttle(cgroup: &CpuCgroup, cpus: f64) -> Throttle {
        let since = cgroup.measure().expect("measured");
        let mut throttle = Throttle::new(cgroup.clone(), since).expect("a quota");
        throttle.use_before = cpus;
        throttle
    }

    fn steps(throttle: &mut Throttle) -> Vec<Slowed> {
        let mut written = Vec::new();
        while throttle
            .step(|slowed| {
                written.push(slowed);
                Ok(())
            })
            .expect("a step")
            .is_some()
        {}
        written
    }

    fn now(cgroup: &CpuCgroup) -> String {
        read(&cgroup.file()).expect("readable")
    }

    #[test]
    fn steps_go_down_from_the_measured_use_and_the_original_comes_back() {
        for (cgroup, first, last, original) in [
            (v1("-1"), "50000", "3000", "-1"),
            (v1("200000"), "50000", "3000", "200000"),
            (
                v2("max 100000"),
                "50000 100000",
                "3000 100000",
                "max 100000",
            ),
            (
                v2("40000 50000"),
                "25000 50000",
                "1500 50000",
                "40000 50000",
            ),
        ] {
            let (_dir, cgroup) = cgroup;
            let mut slow = throttle(&cgroup, 1.0);
            let written = steps(&mut slow);
            assert_eq!(written.len(), STEPS.len());
            assert_eq!(written[0].lowered, first);
            assert_eq!(now(&cgroup), last);
            drop(slow);
            assert_eq!(now(&cgroup), original);
        }
    }

    #[test]
    fn a_quota_is_never_loosened() {
        let (_dir, cgroup) = v1("10000");
        let mut slow = throttle(&cgroup, 1.9);
        for slowed in steps(&mut slow) {
            assert!(slowed.lowered.parse::<u64>().expect("a number") <= 10_000);
        }
    }

    #[test]
    fn an_idle_container_keeps_the_least_the_kernel_takes() {
        let (_dir, cgroup) = v2("max 100000");
        let mut slow = throttle(&cgroup, 0.0);
        assert!(
            steps(&mut slow)
                .iter()
                .all(|slowed| slowed.lowered == "1000 100000")
        );
    }

    #[test]
    fn what_a_dead_process_left_is_undone_once_and_only_if_it_is_still_there() {
        let (_dir, cgroup) = v1("-1");
        let mut slow = throttle(&cgroup, 1.0);
        let written = steps(&mut slow);
        std::mem::forget(slow);
        restore(&written).expect("restored");
        assert_eq!(now(&cgroup), "-1");
        // Its owner has set another meanwhile.
        fs::write(cgroup.file(), "70000\n").expect("set");
        restore(&written).expect("left alone");
        assert_eq!(now(&cgroup), "70000");
        fs::remove_file(cgroup.file()).expect("gone");
        restore(&written).expect("a cgroup that is gone is not throttled");
    }

    #[test]
    fn a_step_that_is_not_on_record_is_not_taken() {
        let (_dir, cgroup) = v1("-1");
        let mut slow = throttle(&cgroup, 1.0);
        slow.step(|_| Err("the disk is full".into()))
            .expect_err("not recorded");
        assert_eq!(now(&cgroup), "-1");
    }

    #[test]
    fn what_the_kernel_never_writes_is_no_quota() {
        for text in ["", "lots", "5000"] {
            let (_dir, cgroup) = v2(text);
            let since = cgroup.measure().expect("measured");
            assert!(Throttle::new(cgroup, since).is_err(), "{text:?}");
        }
    }
}
