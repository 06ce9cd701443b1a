//! What a host holds at one moment, so that a test can say "nothing is left".

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::host::Host;

/// Directories of a host whose files count.
const WATCHED: [&str; 4] = ["/run", "/srv", "/var/lib/migrate", "/etc/criu"];

/// What CRIU and runc keep on every host they have ever run on: a cache of kernel features, the root of runc's state. And what a
/// restart of the host has made of it.
const KEPT: [&str; 3] = ["/run/criu.kdat", "/run/runc", crate::host::BOOT_ID];

/// Everything that could be left behind on a host: processes, cgroups, mounts, interfaces, nftables tables and files.
pub struct Snapshot {
    things: BTreeSet<String>,
}

impl Snapshot {
    pub(crate) fn take(host: &Host) -> Result<Snapshot> {
        let mut things = BTreeSet::new();
        for root in host.cgroups()? {
            cgroups_below(&root, &root, &mut things)?;
        }
        // The process that is the host changes its name while the host starts.
        things.retain(|thing| !thing.starts_with(&format!("process {} ", host.pid())));
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", host.pid()))
            .context("reading a host's mounts")?;
        things.extend(
            mounts
                .lines()
                .filter_map(|line| line.split(' ').nth(4))
                .filter(|at| *at != crate::host::KERNELS_BOOT_ID)
                .map(|at| format!("mount {at}")),
        );
        let links: Vec<serde_json::Value> =
            serde_json::from_str(&host.in_network("ip -json link show")?)?;
        things.extend(
            links
                .iter()
                .filter_map(|link| link["ifname"].as_str())
                .map(|name| format!("interface {name}")),
        );
        things.extend(
            host.in_network("nft list tables")?
                .lines()
                .map(|table| format!("nft {table}")),
        );
        for watched in WATCHED {
            files_below(&host.path(watched), Path::new(watched), &mut things)?;
        }
        Ok(Snapshot { things })
    }

    /// What is on the host now and was not when the snapshot was taken, one line each, in order: `process`, `cgroup`, `mount`,
    /// `interface`, `nft table` or `file`, and its name.
    pub fn leftovers(&self, host: &Host) -> Result<Vec<String>> {
        Ok(Snapshot::take(host)?
            .things
            .difference(&self.things)
            .cloned()
            .collect())
    }

    /// What has come to the host since the snapshot, and what has gone from it, one line each.
    pub fn differences(&self, host: &Host) -> Result<Vec<String>> {
        Ok(Snapshot::take(host)?
            .things
            .symmetric_difference(&self.things)
            .cloned()
            .collect())
    }
}

fn cgroups_below(root: &Path, cgroup: &Path, things: &mut BTreeSet<String>) -> Result<()> {
    // A cgroup may go away while it is looked at; then it is not left.
    for pid in fs::read_to_string(cgroup.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
    {
        if let Ok(name) = fs::read_to_string(format!("/proc/{pid}/comm")) {
            things.insert(format!("process {pid} {}", name.trim()));
        }
    }
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            // One container has a cgroup of the same name in every hierarchy: once is enough to fail a test.
            things.insert(format!("cgroup {}", path.strip_prefix(root)?.display()));
            cgroups_below(root, &path, things)?;
        }
    }
    Ok(())
}

fn files_below(seen: &Path, inside: &Path, things: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(seen).into_iter().flatten().flatten() {
        let name = inside.join(entry.file_name());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files_below(&entry.path(), &name, things)?;
        }
        if !KEPT.iter().any(|kept| name == Path::new(kept)) {
            things.insert(format!("file {}", name.display()));
        }
    }
    Ok(())
}
