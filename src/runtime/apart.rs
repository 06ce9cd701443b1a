//! A cgroup of their own for processes that must outlive the agent: pagers, standbys, and those that keep a container's output.
//!
//! A service manager ends, limits and freezes what is in its unit's cgroups. The agent's children are born into these, and they
//! hold what a running container cannot do without; so each of them leaves as the first thing it does. The cgroup lies below the
//! root of every hierarchy, and goes when the last process in it does, or with the next look of an agent.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What it is called in every hierarchy.
const NAME: &str = "migrate-pagers";

/// How often a cgroup that another process removes in this moment is made again.
const TRIES: u32 = 20;

/// Moves this process out of the cgroups it was born into. What it starts from now on comes after it.
///
/// # Errors
/// Why not in some hierarchy; in the others it was done all the same.
pub fn leave() -> io::Result<()> {
    for_each(|cgroup| enter(cgroup, &std::process::id().to_string()))
}

/// Removes the cgroups when this process, at its end, was the last in them. Those of others stay.
pub fn end() {
    let _ = for_each(|cgroup| {
        let root = cgroup.parent().unwrap_or(cgroup);
        fs::write(root.join("cgroup.procs"), std::process::id().to_string())
    });
    sweep();
}

/// Removes the cgroups if nobody is in them: who was killed could not.
pub fn sweep() {
    let _ = for_each(|cgroup| {
        // Busy is what it usually is.
        let _ = fs::remove_dir(cgroup);
        Ok(())
    });
}

/// Whether [`leave`] can work here, for processes of this user.
///
/// # Errors
/// Why not.
pub fn try_out() -> io::Result<()> {
    let made = for_each(make);
    sweep();
    made
}

fn for_each(mut work: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let mut all = Ok(());
    for cgroup in cgroups(&fs::read_to_string("/proc/self/mounts")?) {
        let done = work(&cgroup).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", cgroup.display()))
        });
        all = all.and(done);
    }
    all
}

/// One for each hierarchy among these mounts.
fn cgroups(mounts: &str) -> Vec<PathBuf> {
    let mounted = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, kind) = (fields.next()?, fields.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(at).join(NAME))
    });
    mounted.collect()
}

fn enter(cgroup: &Path, process: &str) -> io::Result<()> {
    let mut entered = Ok(());
    for _ in 0..TRIES {
        make(cgroup)?;
        entered = fs::write(cgroup.join("cgroup.procs"), process);
        match &entered {
            // Removed between the two, or while it was entered.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(nix::libc::ENODEV) => {}
            _ => break,
        }
    }
    entered
}

fn make(cgroup: &Path) -> io::Result<()> {
    match fs::create_dir(cgroup) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // A new v1 cpuset is empty and takes no process until it is filled.
    let parent = cgroup.parent().unwrap_or(cgroup);
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (own, above) = (cgroup.join(file), parent.join(file));
        if fs::read_to_string(&own).is_ok_and(|set| set.trim().is_empty())
            && let Ok(set) = fs::read_to_string(above)
        {
            fs::write(own, set)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_below_the_root_of_every_hierarchy() {
        let mounts = "sysfs /sys sysfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let expected = ["systemd", "unified"]
            .map(|root| PathBuf::from(format!("/sys/fs/cgroup/{root}/migrate-pagers")));
        assert_eq!(cgroups(mounts), expected);
    }
}
