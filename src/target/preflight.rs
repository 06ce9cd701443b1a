//! Whether a container can come here: looked at before anything is received.

use super::processor::a_program_may_need;
use crate::criu::binary::Criu;
use crate::runtime::runc::Runc;
use crate::wire::message::{Arch, Begin, CgroupVersion, CpuFlag, Refusal};
use crate::wire::peer_error::PeerError;
use procfs::Current;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Memory the host keeps for itself beside the container.
const MEMORY_RESERVE: u64 = 64 << 20;

/// Disk space kept beside the root filesystem: images, journal, logs.
const DISK_RESERVE: u64 = 64 << 20;

/// Why the container cannot come; empty if it can.
pub fn refusals(begin: &Begin, criu: &Criu, runc: &Runc, state_dir: &Path) -> Vec<Refusal> {
    let needs = &begin.requirements;
    let mut refusals = Vec::new();
    let mut refuse = |code, text: String| {
        refusals.push(Refusal {
            code,
            text: text.as_str().into(),
        });
    };
    if needs.arch != Arch::HERE {
        refuse(
            PeerError::ArchitectureDiffers,
            format!("it is {:?} here", Arch::HERE),
        );
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let have: BTreeSet<CpuFlag> = CpuFlag::in_cpuinfo(&cpuinfo).into_iter().collect();
    let lacking: Vec<&str> = needs
        .cpu_flags
        .iter()
        .filter(|flag| !have.contains(flag) && a_program_may_need(flag))
        .map(CpuFlag::as_str)
        .collect();
    if !lacking.is_empty() {
        refuse(PeerError::CpuFeatureMissing, lacking.join(" "));
    }
    if runc.knows(begin.container.as_str()) {
        let text = format!("{} under {}", begin.container, runc.root().display());
        refuse(PeerError::ContainerExists, text);
    }
    if let Err(error) = Runc::version() {
        refuse(PeerError::RuntimeMissing, error.to_string());
    }
    if criu.version() < needs.criu_version.0 {
        let text = format!(
            "{} here, {} at the source",
            criu.version_text(),
            needs.criu_version
        );
        refuse(PeerError::CriuTooOld, text);
    }
    let cgroups = cgroup_version();
    if needs.cgroup_version == CgroupVersion::V1 && cgroups == CgroupVersion::V2 {
        refuse(
            PeerError::CgroupIncompatible,
            "v1 at the source, v2 here: not possible".into(),
        );
    }
    let available = available_memory();
    let wanted = needs.memory_bytes.saturating_add(MEMORY_RESERVE);
    if available < wanted {
        refuse(
            PeerError::MemoryShort,
            format!("{available} bytes available, {wanted} needed"),
        );
    }
    match nix::sys::statvfs::statvfs(state_dir) {
        Ok(disk) => {
            let free = disk.blocks_available() * disk.fragment_size();
            let wanted = needs.rootfs_bytes.saturating_add(DISK_RESERVE);
            if free < wanted {
                refuse(
                    PeerError::DiskShort,
                    format!(
                        "{free} bytes free below {}, {wanted} needed",
                        state_dir.display()
                    ),
                );
            }
        }
        Err(errno) => refuse(
            PeerError::DiskShort,
            format!("{}: {errno}", state_dir.display()),
        ),
    }
    for source in &needs.bind_sources {
        if !Path::new(source.as_str()).exists() {
            refuse(PeerError::BindSourceMissing, source.as_str().to_string());
        }
    }
    if let Some(rootfs) = &needs.shared_rootfs
        && !Path::new(rootfs.as_str()).is_dir()
    {
        refuse(PeerError::RootfsNotShared, rootfs.as_str().to_string());
    }
    refusals
}

/// runc uses the unified hierarchy only where nothing else is mounted.
fn cgroup_version() -> CgroupVersion {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        CgroupVersion::V2
    } else {
        CgroupVersion::V1
    }
}

/// Memory that could be given out without swapping, in bytes; 0 if the kernel does not say.
fn available_memory() -> u64 {
    let available = procfs::Meminfo::current().map(|info| info.mem_available);
    available.ok().flatten().unwrap_or(0)
}
