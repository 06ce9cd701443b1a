//! Killing a container whose memory is lost. Better no container than one that computes with zeros.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long the sweeps go on. A process in uninterruptible sleep dies when it wakes; the signal stays with it.
const SWEEP_FOR: Duration = Duration::from_secs(30);
const SWEEP_EVERY: Duration = Duration::from_millis(5);

/// One line in the state directory that says what was done and why.
#[derive(Debug, Serialize)]
struct DeathRecord<'a> {
    unix_ms: u128,
    reason: &'a str,
    cgroups: &'a [PathBuf],
    /// Host pids that were sent SIGKILL.
    killed: Vec<i32>,
    /// Whether every cgroup was empty in the end.
    all_gone: bool,
}

/// Kills every process in `cgroups` and below, again until none is left, and records it as `record`.
///
/// The record is written even when some process would not die.
pub(super) fn kill_container(
    cgroups: &[PathBuf],
    record: &Path,
    reason: &str,
) -> Result<(), io::Error> {
    let mut killed = BTreeSet::new();
    let deadline = Instant::now() + SWEEP_FOR;
    let mut all_gone = false;
    while !all_gone && Instant::now() < deadline {
        all_gone = true;
        for cgroup in cgroups {
            for pid in processes(cgroup) {
                all_gone = false;
                // Gone in between is what is wanted; nothing else can stop root.
                if matches!(
                    kill(Pid::from_raw(pid), Signal::SIGKILL),
                    Ok(()) | Err(Errno::EPERM)
                ) {
                    killed.insert(pid);
                }
            }
            thaw(cgroup);
        }
        if !all_gone {
            std::thread::sleep(SWEEP_EVERY);
        }
    }
    let line = serde_json::to_string(&DeathRecord {
        unix_ms: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis()),
        reason,
        cgroups,
        killed: killed.into_iter().collect(),
        all_gone,
    })?;
    let mut file = fs::File::create(record)?;
    writeln!(file, "{line}")?;
    file.sync_all()
}

/// The host pids in `cgroup` and below. A cgroup that is gone has none.
fn processes(cgroup: &Path) -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let mut pids: Vec<i32> = fs::read_to_string(cgroup.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        // 0 stands for a process that has no pid here, and would address our own group.
        .filter(|&pid| pid > 1 && pid != own)
        .collect();
    for below in below(cgroup) {
        pids.extend(processes(&below));
    }
    pids
}

/// A frozen v1 cgroup keeps even SIGKILL waiting, as does one below it that was frozen by itself.
fn thaw(cgroup: &Path) {
    let state = cgroup.join("freezer.state");
    if state.exists() {
        let _ = fs::write(state, "THAWED");
    }
    for below in below(cgroup) {
        thaw(&below);
    }
}

fn below(cgroup: &Path) -> Vec<PathBuf> {
    fs::read_dir(cgroup)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}
