//! Whether a container can come here: looked at before anything is received.

use super::processor::a_program_may_need;
use super::shared::Proven;
use crate::criu::binary::Criu;
use crate::runtime::home::{Home, HomeError};
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
    let home = Home::new(state_dir, begin.container.as_str(), begin.migration);
    if home.is_taken() {
        let text = HomeError::Taken(home.path().to_path_buf()).to_string();
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
    if !can_restore(needs.cgroup_version, cgroup_version()) {
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
    for shared in &needs.shared {
        if let Err(why) = Proven::new(shared) {
            let code = match needs.shared_rootfs.as_ref() == Some(&shared.path) {
                true => PeerError::RootfsNotShared,
                false => PeerError::BindSourceDiffers,
            };
            refuse(code, why);
        }
    }
    refusals
}

/// CRIU restores a v2 cgroup as a v1 cgroup, and not the other way round.
fn can_restore(container: CgroupVersion, here: CgroupVersion) -> bool {
    (container, here) != (CgroupVersion::V1, CgroupVersion::V2)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::MigrationId;
    use crate::wire::message::shared::{Proof, Secret, Shared};
    use crate::wire::message::{CriuVersion, Requirements, RootfsMode};

    /// A directory of this host, and a proof that nobody has written.
    fn unproven() -> Shared {
        Shared {
            path: "/proc".parse().expect("a path"),
            real: "/proc".parse().expect("a path"),
            proof: Proof::Written {
                name: Secret::from_bytes([1; 16]),
                content: Secret::from_bytes([2; 16]),
            },
        }
    }

    /// A container that any host has room for.
    fn modest(criu: &Criu) -> Begin {
        Begin {
            migration: MigrationId::from_bytes([7; 16]),
            container: "web".parse().expect("a container id"),
            requirements: Requirements {
                memory_bytes: 1 << 20,
                rootfs_bytes: 1 << 20,
                cpu_flags: Vec::new(),
                cgroup_version: cgroup_version(),
                memory_limit: None,
                criu_version: CriuVersion(criu.version()),
                arch: Arch::HERE,
                rootfs: RootfsMode::Copied,
                shared_rootfs: None,
                bind_sources: vec!["/proc".parse().expect("a path")],
                shared: Vec::new(),
                page_streams: 1,
            },
            dry_run: false,
        }
    }

    /// Needs CRIU and runc (`scripts/setup`).
    #[test]
    fn each_thing_that_is_missing_here_has_a_refusal_of_its_own() {
        type Spoil = fn(&mut Requirements);
        let cases: [(Spoil, PeerError); 8] = [
            (|needs| needs.memory_bytes = 1 << 49, PeerError::MemoryShort),
            (|needs| needs.rootfs_bytes = 1 << 49, PeerError::DiskShort),
            (
                |needs| {
                    needs.arch = match Arch::HERE {
                        Arch::X86_64 => Arch::Aarch64,
                        Arch::Aarch64 => Arch::X86_64,
                    }
                },
                PeerError::ArchitectureDiffers,
            ),
            (
                |needs| {
                    needs.cpu_flags = vec!["telepathy".to_owned().try_into().expect("a flag")];
                },
                PeerError::CpuFeatureMissing,
            ),
            (
                |needs| needs.criu_version = CriuVersion(990_000),
                PeerError::CriuTooOld,
            ),
            (
                |needs| {
                    needs
                        .bind_sources
                        .push("/nonexistent".parse().expect("a path"))
                },
                PeerError::BindSourceMissing,
            ),
            (
                |needs| {
                    needs.shared_rootfs = Some("/proc".parse().expect("a path"));
                    needs.shared.push(unproven());
                },
                PeerError::RootfsNotShared,
            ),
            (
                |needs| needs.shared.push(unproven()),
                PeerError::BindSourceDiffers,
            ),
        ];
        let criu = Criu::find().expect("CRIU: scripts/setup installs it");
        let directory = tempfile::tempdir().expect("a directory");
        let runc = Runc::new(&directory.path().join("runc"));
        let refused = |begin: &Begin| -> Vec<PeerError> {
            let refusals = refusals(begin, &criu, &runc, directory.path());
            refusals.iter().map(|refusal| refusal.code).collect()
        };
        assert_eq!(refused(&modest(&criu)), []);
        for (spoil, code) in cases {
            let mut begin = modest(&criu);
            spoil(&mut begin.requirements);
            assert_eq!(refused(&begin), [code]);
        }
        fs::create_dir_all(runc.root().join("web")).expect("a directory");
        assert_eq!(refused(&modest(&criu)), [PeerError::ContainerExists]);
        fs::remove_dir(runc.root().join("web")).expect("removed");
        fs::create_dir_all(directory.path().join("containers/web")).expect("a directory");
        assert_eq!(refused(&modest(&criu)), [PeerError::ContainerExists]);
    }

    #[test]
    fn cgroups_move_to_v1_and_among_v2_only() {
        use CgroupVersion::{V1, V2};
        assert!(can_restore(V1, V1) && can_restore(V2, V2) && can_restore(V2, V1));
        assert!(!can_restore(V1, V2));
    }
}
