//! The cgroups of a container that may not have become one: what a runtime killed half way leaves behind.
//!
//! In goes a container's configuration before the runtime starts, out come the directories that the runtime is about to
//! make; later those are emptied and removed. A cgroup that was there before is nobody's leftover and is never among them.

use super::tasks_of_cgroup;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// The directories that runc will make for a container `id` with this `config.json`: those of [`of_container`] that are not
/// there yet.
pub fn about_to_be_made(config: &Value, id: &str) -> io::Result<Vec<PathBuf>> {
    let mut directories = of_container(config, id)?;
    directories.retain(|path| !path.exists());
    Ok(directories)
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

/// Kills whatever is in a cgroup and below, and removes it. One that is gone is no error.
pub fn remove(cgroup: &Path, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match empty_and_remove(cgroup) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(5)),
            Ok(()) => return Ok(()),
        }
    }
}

fn empty_and_remove(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            empty_and_remove(&entry.path())?;
        }
    }
    for task in tasks_of_cgroup(cgroup)? {
        // ESRCH: it is gone already.
        let _ = kill(Pid::from_raw(task.pid), Signal::SIGKILL);
    }
    // Under v1 a frozen task dies when it is thawed; elsewhere there is no such file, and none is made.
    let state = cgroup.join("freezer.state");
    if state.exists() {
        fs::write(state, "THAWED")?;
    }
    fs::remove_dir(cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_cgroup_that_is_there_already_is_never_taken_for_a_leftover() {
        let root = json!({"linux": {"cgroupsPath": "/"}});
        assert!(about_to_be_made(&root, "web").unwrap().is_empty());
    }

    #[test]
    fn a_container_has_its_cgroup_in_every_hierarchy() {
        let name = format!("migrate-unit-test-{}", std::process::id());
        for config in [
            json!({}),
            json!({"linux": {"cgroupsPath": format!("/{name}")}}),
        ] {
            let made = about_to_be_made(&config, &name).unwrap();
            assert!(!made.is_empty());
            assert!(
                made.iter()
                    .all(|path| path.starts_with("/sys/fs/cgroup") && path.ends_with(&name)),
                "{made:?}"
            );
        }
    }
}
