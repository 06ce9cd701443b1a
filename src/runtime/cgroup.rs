//! The cgroups of a container that may not have become one: what a runtime killed half way leaves behind.
//!
//! In goes a container's configuration before the runtime starts, and out come its directories. They are made here, so that
//! it is known which they are, and the runtime takes them over; later those very ones are emptied and removed. A cgroup that
//! was there before, or comes after, is somebody's and is never among them.

use super::freezer::{Freezer, is_gone};
use super::instance::inode_of;
use super::{pids_of_cgroup, tasks_of_cgroup};
use crate::kernel::pidfd::Pidfd;
use crate::migration::journal::MadeCgroup;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Makes one of the directories of [`of_container`], and what lies above it; the runtime takes what is there. `None` if it was
/// there already: then it is somebody's.
pub fn make(path: &Path) -> io::Result<Option<MadeCgroup>> {
    if let Some(above) = path.parent() {
        fs::create_dir_all(above)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        made => made?,
    }
    Ok(Some(MadeCgroup {
        path: path.to_path_buf(),
        inode: inode_of(path)?,
    }))
}

/// Whether any process is in a cgroup or below it.
pub fn is_occupied(path: &Path) -> io::Result<bool> {
    Ok(!pids_of_cgroup(path)?.is_empty())
}

/// Sends SIGKILL to every process in a cgroup and below.
pub fn kill_all(cgroup: &Path) -> io::Result<()> {
    let listed: Vec<i32> = pids_of_cgroup(cgroup)?.into_iter().collect();
    // So many descriptors at once; there may be more processes than a process may have descriptors.
    for part in listed.chunks(256) {
        let open = |&pid: &i32| Some((pid, Pidfd::open(pid).ok()?));
        let held: Vec<(i32, Pidfd)> = part.iter().filter_map(open).collect();
        // A pid that is still listed was this cgroup's when its descriptor was opened.
        let still = pids_of_cgroup(cgroup)?;
        for (_, process) in held.iter().filter(|(pid, _)| still.contains(pid)) {
            // It may be gone already.
            let _ = process.send_signal(Signal::SIGKILL);
        }
    }
    Ok(())
}

/// The directories, one for each hierarchy, that runc will put a container `id` with this `config.json` into. Never the root of
/// a hierarchy, which is everybody's.
///
/// As runc's cgroupfs driver does: an absolute `linux.cgroupsPath` lies below the hierarchy's root, any other below the
/// caller's own cgroup, and without one the id is taken.
pub fn of_container(config: &Value, id: &str) -> io::Result<Vec<PathBuf>> {
    let asked = config
        .pointer("/linux/cgroupsPath")
        .and_then(Value::as_str)
        .filter(|path| !path.is_empty())
        .unwrap_or(id);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let directories = mounts.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let (mount, kind, options) = (fields.get(1)?, fields.get(2)?, fields.get(3)?);
        let base = match (*kind, asked.starts_with('/')) {
            ("cgroup" | "cgroup2", true) => "/",
            ("cgroup", false) => own_path(&own, |controllers| {
                !controllers.is_empty()
                    && controllers
                        .split(',')
                        .all(|one| options.split(',').any(|option| option == one))
            })?,
            ("cgroup2", false) => own_path(&own, str::is_empty)?,
            _ => return None,
        };
        let below = Path::new(base.trim_start_matches('/')).join(asked.trim_start_matches('/'));
        let path = Path::new(mount).join(below);
        (path.as_path() != Path::new(mount)).then_some(path)
    });
    Ok(directories.collect())
}

/// Our own cgroup in the hierarchy whose controllers fit.
fn own_path(own: &str, fits: impl Fn(&str) -> bool) -> Option<&str> {
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        fits(controllers).then_some(path)
    })
}

impl MadeCgroup {
    /// Kills whatever is in it and below, and removes it. One that is gone is no error, and another of its path is left alone.
    pub fn remove(&self, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            match self.try_remove() {
                Err(error) if is_gone(&error) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(5)),
                Ok(()) => return Ok(()),
            }
        }
    }

    /// Whether a process lives in it or below. Another of its path says nothing about it.
    pub fn is_in_use(&self) -> io::Result<bool> {
        let Some(inode) = self.inode else {
            return Ok(false);
        };
        let Some(pinned) = Freezer::V1(self.path.clone()).pinned(inode)? else {
            return Ok(false);
        };
        match tasks_of_cgroup(pinned.freezer.path()) {
            Err(error) if is_gone(&error) => Ok(false),
            tasks => Ok(tasks?.iter().any(|task| !task.zombie)),
        }
    }

    /// Removes it if nobody is in it: the runtime had no use for it. That it stays is no error.
    pub fn remove_if_empty(&self) {
        if self.inode.is_some() && inode_of(&self.path).ok().flatten() == self.inode {
            let _ = fs::remove_dir(&self.path);
        }
    }

    fn try_remove(&self) -> io::Result<()> {
        let Some(inode) = self.inode else {
            // Made and not taken down: then nobody was put into it. The kernel removes none that is in use.
            return match fs::remove_dir(&self.path) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
                removed => removed,
            };
        };
        // Which version it has makes no difference to who it is.
        match Freezer::V1(self.path.clone()).pinned(inode)? {
            Some(pinned) => empty(pinned.freezer.path())?,
            None => return Ok(()),
        }
        match inode_of(&self.path)? {
            Some(now) if now == inode => fs::remove_dir(&self.path),
            _ => Ok(()),
        }
    }
}

/// Kills whatever is in a cgroup and below, and removes what is below.
fn empty(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            empty(&entry.path())?;
            fs::remove_dir(entry.path())?;
        }
    }
    kill_all(cgroup)?;
    // Under v1 a frozen task dies when it is thawed; elsewhere there is no such file, and none is made.
    let state = cgroup.join("freezer.state");
    if state.exists() {
        fs::write(state, "THAWED")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_root_of_a_hierarchy_is_never_a_containers() {
        let root = json!({"linux": {"cgroupsPath": "/"}});
        assert!(of_container(&root, "web").unwrap().is_empty());
    }

    #[test]
    fn a_directory_that_is_there_already_or_comes_later_is_never_taken_for_ours() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("above/web");
        let made = make(&path).unwrap().expect("it was not there");
        assert_eq!(make(&path).unwrap(), None, "it is there already");
        fs::rename(&path, place.path().join("ours")).unwrap();
        fs::create_dir(&path).unwrap();
        made.remove_if_empty();
        made.remove(Duration::ZERO).unwrap();
        assert!(path.exists(), "another one was removed");
        fs::remove_dir(&path).unwrap();
        made.remove(Duration::ZERO).unwrap();
    }

    #[test]
    fn the_processes_of_a_cgroup_are_killed_and_it_is_removed() {
        let own = of_container(&json!({}), "x").unwrap();
        let name = format!("migrate-unit-test-kill-{}", std::process::id());
        let path = own[0].with_file_name(name);
        let made = make(&path).unwrap().expect("new");
        // A new v1 cpuset takes no process; any other hierarchy does.
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let entered = fs::write(path.join("cgroup.procs"), child.id().to_string());
        if entered.is_ok() {
            assert!(is_occupied(&path).unwrap());
            kill_all(&path).unwrap();
        } else {
            child.kill().unwrap();
        }
        assert!(!child.wait().unwrap().success());
        made.remove(Duration::from_secs(10)).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_container_has_its_cgroup_in_every_hierarchy() {
        let name = format!("migrate-unit-test-{}", std::process::id());
        for config in [
            json!({}),
            json!({"linux": {"cgroupsPath": format!("/{name}")}}),
        ] {
            let made = of_container(&config, &name).unwrap();
            assert!(!made.is_empty());
            assert!(
                made.iter()
                    .all(|path| path.starts_with("/sys/fs/cgroup") && path.ends_with(&name)),
                "{made:?}"
            );
        }
    }
}
