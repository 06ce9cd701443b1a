//! A cgroup of its own for a test's processes, with the freezer of this host (v1 or v2).

use super::offer::stretched;
use migrate::runtime::{self, Task};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A cgroup that can be frozen. Dropping it kills what is in it and removes it.
pub struct Freezer {
    dir: PathBuf,
    v1: bool,
}

impl Freezer {
    pub fn new(name: &str) -> Freezer {
        let v1 = Path::new("/sys/fs/cgroup/freezer");
        let is_v1 = v1.is_dir();
        let root = if is_v1 {
            v1
        } else {
            Path::new("/sys/fs/cgroup")
        };
        let dir = root.join(format!(
            "migrate-test-tracker-{name}-{}",
            std::process::id()
        ));
        fs::create_dir(&dir)
            .unwrap_or_else(|error| panic!("a cgroup freezer is needed: {dir:?}: {error}"));
        let freezer = Freezer { dir, v1: is_v1 };
        assert!(
            freezer.procs().exists(),
            "a cgroup freezer is needed, and {root:?} holds no cgroups"
        );
        freezer
    }

    /// The file a process joins by writing its pid.
    pub fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    pub fn freeze(&self) {
        if self.v1 {
            self.set("freezer.state", "FROZEN");
        } else {
            self.set("cgroup.freeze", "1");
        }
        self.wait(|| self.is_frozen());
    }

    pub fn is_frozen(&self) -> bool {
        if self.v1 {
            self.get("freezer.state").trim() == "FROZEN"
        } else {
            self.get("cgroup.events").contains("frozen 1")
        }
    }

    /// As the engine knows it.
    pub fn of_the_engine(&self) -> runtime::Freezer {
        if self.v1 {
            runtime::Freezer::V1(self.dir.clone())
        } else {
            runtime::Freezer::V2(self.dir.clone())
        }
    }

    pub fn thaw(&self) {
        if self.v1 {
            self.set("freezer.state", "THAWED");
        } else {
            self.set("cgroup.freeze", "0");
        }
    }

    /// Its processes now, as a runtime would list them.
    pub fn tasks(&self) -> Vec<Task> {
        self.get("cgroup.procs")
            .lines()
            .filter_map(|pid| task(pid.parse().ok()?))
            .collect()
    }

    /// Its processes once `ready` holds of them.
    pub fn tasks_when(&self, ready: impl Fn(&[Task]) -> bool) -> Vec<Task> {
        let mut tasks = self.tasks();
        self.wait(|| {
            tasks = self.tasks();
            ready(&tasks)
        });
        tasks
    }

    fn wait(&self, mut until: impl FnMut() -> bool) {
        let patience = Instant::now() + stretched(Duration::from_secs(60));
        while !until() {
            assert!(
                Instant::now() < patience,
                "waited in vain on {:?}",
                self.dir
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn get(&self, file: &str) -> String {
        fs::read_to_string(self.dir.join(file)).unwrap()
    }

    fn set(&self, file: &str, value: &str) {
        fs::write(self.dir.join(file), value).unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let patience = Instant::now() + stretched(Duration::from_secs(60));
        loop {
            let pids = fs::read_to_string(self.procs()).unwrap_or_default();
            for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            let file = if self.v1 {
                "freezer.state"
            } else {
                "cgroup.freeze"
            };
            let _ = fs::write(self.dir.join(file), if self.v1 { "THAWED" } else { "0" });
            if fs::remove_dir(&self.dir).is_ok() || Instant::now() > patience {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn task(pid: i32) -> Option<Task> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let fields: Vec<&str> = stat[stat.rfind(')')? + 2..].split(' ').collect();
    let vpid = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    Some(Task {
        pid,
        vpid: vpid.split_whitespace().last()?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
        zombie: fields[0] == "Z",
    })
}
