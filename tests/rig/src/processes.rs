//! The processes of a host.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use anyhow::Result;

use crate::host::Host;

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
