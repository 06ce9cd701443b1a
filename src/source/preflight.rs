//! What must be right at the source before anything is touched, and what the target must be able to give.
//!
//! Every finding that forbids the move is one line that says what is wrong and what to do. The target looks at the
//! [`Requirements`] in its turn.

use super::going_on::{traced_by, tracer_of};
use crate::criu::binary::Criu;
use crate::kernel::ptrace::living_thread;
use crate::migration::event::{Finding, Verdict};
use crate::runtime::runc::{Container, Status};
use crate::runtime::{Freezer, Task};
use crate::wire::message::{
    Arch, CgroupVersion, CpuFlag, CriuVersion, Requirements, RootfsMode, StdStream,
};
use crate::wire::path::AbsolutePath;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What preflight found out about a container.
#[derive(Debug)]
pub struct Survey {
    /// Its processes at this moment.
    pub tasks: Vec<Task>,
    /// What was looked at; it can be moved if none of them refuses.
    pub findings: Vec<Finding>,
    /// What the target must have.
    pub requirements: Requirements,
    /// Its standard streams.
    pub stdio: [StdStream; 3],
    /// Whether TCP is spoken inside, now or soon: then CRIU must keep packets still during the dump.
    pub speaks_tcp: bool,
}

impl Survey {
    /// Why the container cannot be moved, a line each; empty if it can.
    pub fn refusals(&self) -> Vec<String> {
        let refused = self
            .findings
            .iter()
            .filter(|finding| finding.verdict == Verdict::Refused);
        refused.map(|finding| finding.detail.clone()).collect()
    }
}

/// Findings as they are made: what is refused in the course of one look becomes that look's finding.
#[derive(Default)]
struct Looks {
    findings: Vec<Finding>,
}

impl Looks {
    /// One look is over: its refusals, or that all is well.
    fn over(&mut self, what: &str, refusals: &mut Vec<String>, well: String) {
        let finding = |verdict, detail| Finding {
            what: what.to_owned(),
            verdict,
            detail,
            fix: None,
        };
        if refusals.is_empty() {
            self.findings.push(finding(Verdict::Ok, well));
        }
        let refused = refusals
            .drain(..)
            .map(|detail| finding(Verdict::Refused, detail));
        self.findings.extend(refused);
    }
}

/// Looks at everything that can be known before the move.
pub fn survey(
    container: &Container,
    criu: &Criu,
    rootfs: RootfsMode,
    page_streams: u16,
) -> io::Result<Survey> {
    let mut looks = Looks::default();
    let mut refusals = Vec::new();
    match container.status {
        Status::Running => {}
        Status::Paused => refusals.push(format!(
            "container {} is paused: resume it first (runc resume {0})",
            container.id
        )),
        Status::Created => refusals.push(format!(
            "container {} was created and never started: start it first",
            container.id
        )),
        Status::Stopped => refusals.push(format!(
            "container {} is stopped: there is nothing to move",
            container.id
        )),
    }
    looks.over("status", &mut refusals, "running".into());
    let tasks = match container.status {
        Status::Stopped => Vec::new(),
        _ => container.tasks()?,
    };
    let stdio = stdio(container, &mut refusals);
    looks.over(
        "standard streams",
        &mut refusals,
        "pipes or /dev/null".into(),
    );
    let mut speaks_tcp = false;
    if container.status == Status::Running {
        check_namespaces(container, &mut refusals)?;
        looks.over("namespaces", &mut refusals, "its own".into());
        check_network(container.init_pid, &mut refusals)?;
        speaks_tcp = has_tcp(container.init_pid, &[TCP_ESTABLISHED, TCP_LISTEN]);
        looks.over("network", &mut refusals, "loopback only".into());
        check_open_files(container, &tasks, &mut refusals)?;
        check_limits(container, &tasks, &mut refusals)?;
        looks.over(
            "open files",
            &mut refusals,
            format!(
                "{} processes, none has a file of this host open",
                tasks.len()
            ),
        );
    }
    let memory_bytes = tasks.iter().map(|task| resident_bytes(task.pid)).sum();
    let memory_limit = memory_limit(&container.spec);
    if let Some(limit) = memory_limit
        && limit < memory_bytes
    {
        refusals.push(format!(
            "the memory limit in the bundle's config.json, {limit} bytes, is below the {memory_bytes} bytes in use: raise it"
        ));
    }
    looks.over(
        "memory",
        &mut refusals,
        format!("{memory_bytes} bytes in use, within its limit"),
    );
    let cgroup_version = match container.freezer {
        Freezer::V1(_) => CgroupVersion::V1,
        Freezer::V2(_) => CgroupVersion::V2,
    };
    let rootfs_bytes = match rootfs {
        RootfsMode::Copied => tree_bytes(&container.rootfs)?,
        RootfsMode::Shared => 0,
    };
    let requirements = Requirements {
        memory_bytes,
        rootfs_bytes,
        cpu_flags: CpuFlag::in_cpuinfo(&fs::read_to_string("/proc/cpuinfo")?),
        cgroup_version,
        memory_limit,
        criu_version: CriuVersion(criu.version()),
        arch: Arch::HERE,
        rootfs,
        shared_rootfs: match rootfs {
            RootfsMode::Copied => None,
            RootfsMode::Shared => shared_rootfs(&container.rootfs, &mut refusals),
        },
        bind_sources: bind_sources(&container.spec, &mut refusals),
        page_streams,
    };
    looks.over(
        "mounts",
        &mut refusals,
        "their sources can be named to the target".into(),
    );
    Ok(Survey {
        tasks,
        findings: looks.findings,
        requirements,
        stdio,
        speaks_tcp,
    })
}

/// Standard streams that another host can offer as well: `/dev/null` and pipes.
fn stdio(container: &Container, refusals: &mut Vec<String>) -> [StdStream; 3] {
    if container
        .spec
        .pointer("/process/terminal")
        .and_then(Value::as_bool)
        == Some(true)
    {
        refusals.push("the container has a terminal, which stays on this host: start it with \"terminal\": false".into());
    }
    let names = ["standard input", "standard output", "standard error"];
    std::array::from_fn(|index| {
        let is = container
            .stdio
            .get(index)
            .map_or("/dev/null", String::as_str);
        let pipe = is
            .strip_prefix("pipe:[")
            .and_then(|rest| rest.strip_suffix(']'));
        match (is, pipe.and_then(|inode| inode.parse().ok())) {
            ("/dev/null", _) => StdStream::Null,
            (_, Some(inode)) => StdStream::Pipe { inode },
            _ => {
                refusals.push(format!(
                    "{} of the container is {is}, which stays on this host: use a pipe or /dev/null",
                    names[index]
                ));
                StdStream::Null
            }
        }
    })
}

/// CRIU moves whole namespaces: processes of the host's pid or mount namespace would bring the host with them.
fn check_namespaces(container: &Container, refusals: &mut Vec<String>) -> io::Result<()> {
    for (kind, name) in [("pid", "process"), ("mnt", "mount"), ("net", "network")] {
        let theirs = fs::read_link(format!("/proc/{}/ns/{kind}", container.init_pid))?;
        let ours = fs::read_link(format!("/proc/self/ns/{kind}"))?;
        if theirs == ours {
            refusals.push(format!(
                "the container shares this host's {name} namespace: give it its own in config.json"
            ));
        }
    }
    Ok(())
}

/// Only loopback can move yet.
fn check_network(init_pid: i32, refusals: &mut Vec<String>) -> io::Result<()> {
    let devices = fs::read_to_string(format!("/proc/{init_pid}/net/dev"))?;
    let others: Vec<&str> = devices
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next())
        .map(str::trim)
        // Every namespace has the fallback devices of the tunnel modules a kernel has built in.
        .filter(|name| !name.is_empty() && *name != "lo" && !FALLBACK_DEVICES.contains(name))
        .collect();
    if !others.is_empty() {
        refusals.push(format!(
            "the container's network has {}: only loopback can move yet",
            others.join(", ")
        ));
    }
    Ok(())
}

/// Whether a TCP connection is established in the container's network. CRIU must then have locked it.
pub(super) fn is_connected(init_pid: i32) -> bool {
    has_tcp(init_pid, &[TCP_ESTABLISHED])
}

fn has_tcp(init_pid: i32, states: &[&str]) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        let text = fs::read_to_string(format!("/proc/{init_pid}/net/{table}")).unwrap_or_default();
        let mut lines = text.lines().skip(1);
        lines.any(|line| {
            line.split_whitespace()
                .nth(3)
                .is_some_and(|state| states.contains(&state))
        })
    })
}

/// Devices that kernel modules put into every network namespace and that carry nothing by themselves.
const FALLBACK_DEVICES: [&str; 10] = [
    "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0",
    "teql0",
];

/// The state column of `/proc/net/tcp` for an established connection.
const TCP_ESTABLISHED: &str = "01";

/// The same for a socket that waits for connections: without one none can come to be inside.
const TCP_LISTEN: &str = "0A";

/// A file outside the container's mounts cannot be found again at the target.
fn check_open_files(
    container: &Container,
    tasks: &[Task],
    refusals: &mut Vec<String>,
) -> io::Result<()> {
    let mut reported = BTreeSet::new();
    for task in tasks.iter().filter(|task| !task.zombie) {
        if living_thread(task.pid).is_ok_and(|thread| thread != task.pid) {
            refusals.push(format!(
                "process {} in container {} goes on without its first thread, which CRIU cannot dump: end it first",
                task.vpid, container.id
            ));
        }
        if let Some(tracer) = tracer_of(task.pid) {
            refusals.push(traced_by(task.vpid, &container.id, tracer));
        }
        let process = PathBuf::from(format!("/proc/{}", task.pid));
        let Ok(mountinfo) = fs::read_to_string(process.join("mountinfo")) else {
            continue;
        };
        let mounts: BTreeSet<&str> = mountinfo
            .lines()
            .filter_map(|line| line.split(' ').next())
            .collect();
        let Ok(descriptors) = fs::read_dir(process.join("fd")) else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            let number = descriptor.file_name();
            let Ok(target) = fs::read_link(descriptor.path()) else {
                continue;
            };
            if target == Path::new("anon_inode:[userfaultfd]") && reported.insert(target.clone()) {
                refusals.push(format!(
                    "process {} in container {} watches its own memory by userfaultfd, which neither CRIU nor the engine can take along: end it first",
                    task.vpid, container.id
                ));
            }
            let named_file = target.starts_with("/") && !target.starts_with("/memfd:");
            // Standard streams were looked at by name.
            if !named_file || target == Path::new("/dev/null") {
                continue;
            }
            let Ok(info) = fs::read_to_string(process.join("fdinfo").join(&number)) else {
                continue;
            };
            let mount = info
                .lines()
                .find_map(|line| line.strip_prefix("mnt_id:"))
                .map(str::trim);
            if mount.is_some_and(|mount| !mounts.contains(mount)) && reported.insert(target.clone())
            {
                refusals.push(format!(
                    "process {} in container {} has {} of this host open: close it first",
                    task.vpid,
                    container.id,
                    target.display()
                ));
            }
        }
    }
    Ok(())
}

/// CRIU reads the resource limits of every process by `prlimit`, which of another user's needs CAP_SYS_RESOURCE.
fn check_limits(
    container: &Container,
    tasks: &[Task],
    refusals: &mut Vec<String>,
) -> io::Result<()> {
    if crate::kernel::has_sys_resource()? {
        return Ok(());
    }
    let (user, group) = (
        nix::unistd::getuid().as_raw(),
        nix::unistd::getgid().as_raw(),
    );
    for task in tasks.iter().filter(|task| !task.zombie) {
        // One that is gone has none.
        let process = procfs::process::Process::new(task.pid);
        let Ok(theirs) = process.and_then(|process| process.status()) else {
            continue;
        };
        let users = [theirs.ruid, theirs.euid, theirs.suid];
        let groups = [theirs.rgid, theirs.egid, theirs.sgid];
        if users.iter().any(|theirs| *theirs != user)
            || groups.iter().any(|theirs| *theirs != group)
        {
            refusals.push(format!(
                "process {} in container {} runs as user {}, whose limits CRIU may not read without CAP_SYS_RESOURCE: run migrate with it",
                task.vpid, container.id, theirs.ruid
            ));
            break;
        }
    }
    Ok(())
}

/// Anonymous and shared memory; files come from the root filesystem.
pub(super) fn resident_bytes(pid: i32) -> u64 {
    let status = procfs::process::Process::new(pid).and_then(|process| process.status());
    // A process that is gone has none.
    let kib = status.map_or(0, |status| {
        [status.rssanon, status.rssshmem, status.vmswap]
            .into_iter()
            .flatten()
            .sum::<u64>()
    });
    kib << 10
}

fn memory_limit(spec: &Value) -> Option<u64> {
    spec.pointer("/linux/resources/memory/limit")
        .and_then(Value::as_u64)
}

/// Host paths that `config.json` mounts into the container.
fn bind_sources(spec: &Value, refusals: &mut Vec<String>) -> Vec<AbsolutePath> {
    let mounts = spec
        .get("mounts")
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let mut sources = Vec::new();
    for mount in mounts {
        let is_bind = mount.get("type").and_then(Value::as_str) == Some("bind")
            || mount
                .get("options")
                .and_then(Value::as_array)
                .is_some_and(|options| {
                    options
                        .iter()
                        .any(|option| option == "bind" || option == "rbind")
                });
        if !is_bind {
            continue;
        }
        let source = mount
            .get("source")
            .and_then(Value::as_str)
            .unwrap_or_default();
        match source.parse() {
            Ok(path) => sources.push(path),
            Err(_) => refusals.push(format!(
                "the bind mount source {source:?} in config.json is no plain absolute path: only those can be found at the target"
            )),
        }
    }
    sources
}

fn shared_rootfs(rootfs: &Path, refusals: &mut Vec<String>) -> Option<AbsolutePath> {
    let path = rootfs.to_str().and_then(|path| path.parse().ok());
    if path.is_none() {
        refusals.push(format!(
            "{} cannot be named to the target: use a plain absolute path",
            rootfs.display()
        ));
    }
    path
}

/// What a tree takes on disk, on its own filesystem.
fn tree_bytes(root: &Path) -> io::Result<u64> {
    let device = fs::metadata(root)?.dev();
    let mut bytes = 0;
    let mut directories = vec![root.to_path_buf()];
    while let Some(directory) = directories.pop() {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            bytes += metadata.blocks() * 512;
            if metadata.is_dir() && metadata.dev() == device {
                directories.push(entry.path());
            }
        }
    }
    Ok(bytes)
}
