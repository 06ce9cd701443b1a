//! The processes of a host, and the end of all of them at once.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::Host;

/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(60);

/// A process of a host, in a container or not.
#[derive(Debug, Clone)]
pub struct Process {
    /// As seen on this machine.
    pub pid: i32,
    /// The file name of its program.
    pub program: String,
    /// Its command line, the program's name first.
    pub arguments: Vec<String>,
}

impl Host {
    /// What runs on the host now, but for the process that is the host.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let mut found = Vec::new();
        for root in self.cgroups()? {
            below(&root, &mut |cgroup| {
                let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
                found.extend(pids.lines().filter_map(|pid| pid.parse::<i32>().ok()));
            });
        }
        found.sort_unstable();
        found.dedup();
        found.retain(|&pid| pid != self.pid());
        // One that is gone meanwhile is none of the host's.
        Ok(found.into_iter().filter_map(Process::read).collect())
    }

    /// What a power cut and a new start do: every process ends at once, and with it what is only in memory, `/run`, cgroups, packet
    /// filters. Disks and network stay, and the boot id is another one.
    pub fn restart(&self) -> Result<()> {
        let deadline = Instant::now() + GONE;
        loop {
            let alive = self.processes()?;
            for process in &alive {
                // ESRCH: it has ended by itself.
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            // A frozen process dies when it is thawed.
            for root in self.cgroups()? {
                below(&root, &mut |cgroup| {
                    let _ = fs::write(cgroup.join("freezer.state"), "THAWED");
                    let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
                });
            }
            if alive.is_empty() {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "host {} does not go down: {alive:?}",
                self.name()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        for root in self.cgroups()? {
            for entry in fs::read_dir(&root)?.flatten() {
                if entry.path().is_dir() && entry.file_name() != "rig" {
                    remove_cgroup(&entry.path())?;
                }
            }
        }
        // Programs that the host enters by are made when it is made: /run/.enter, and the boot id of before.
        self.run(
            "find",
            [
                "/run",
                "-mindepth",
                "1",
                "-xdev",
                "!",
                "-name",
                ".*",
                "-delete",
            ],
        )?;
        self.in_network("nft flush ruleset")?;
        let id =
            fs::read_to_string("/proc/sys/kernel/random/uuid").context("reading a new uuid")?;
        const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
        fs::write(self.path("/run/.boot_id"), id).context("writing another boot id")?;
        self.run("mount", ["--bind", "/run/.boot_id", BOOT_ID])
            .map(drop)
    }
}

impl Process {
    fn read(pid: i32) -> Option<Process> {
        let directory = Path::new("/proc").join(pid.to_string());
        // A zombie has no program.
        let program = fs::read_link(directory.join("exe")).ok()?;
        let line = fs::read(directory.join("cmdline")).ok()?;
        let arguments = line
            .split(|&byte| byte == 0)
            .map(|word| {
                OsString::from_vec(word.to_vec())
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        Some(Process {
            pid,
            program: program.file_name()?.to_string_lossy().into_owned(),
            arguments,
        })
    }
}

fn below(cgroup: &Path, look: &mut impl FnMut(&Path)) {
    look(cgroup);
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&entry.path(), look);
        }
    }
}

fn remove_cgroup(cgroup: &Path) -> Result<()> {
    for entry in fs::read_dir(cgroup)?.flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    let deadline = Instant::now() + GONE;
    // A process that has ended keeps its cgroup busy until it has been waited for.
    while let Err(why) = fs::remove_dir(cgroup) {
        ensure!(
            Instant::now() < deadline,
            "cannot remove {}: {why}",
            cgroup.display()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
