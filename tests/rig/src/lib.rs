//! Hosts, containers and workloads for end-to-end tests, the demo and the benchmarks.
//!
//! Several hosts live on one machine, each with its own network, mounts and cgroups, joined by virtual cables; real runc
//! containers with self-checking workloads run on them. In goes a description of hosts and workloads, out come commands
//! that run on a host, and the workloads' own verdicts. Nothing here knows how a migration works, so nothing here can make
//! one look good.
//!
//! ```text
//!  Host "a" ────────── Link ────────── Host "b"       namespaces: net, mnt, cgroup
//!   /srv/<id>  bundle and rootfs        /srv           each host's own, by bind mount
//!   /var/lib/migrate                    …              each host's own
//!   /run, /etc, /sys/fs/cgroup          …              private tmpfs, overlay, cgroup root
//!    └ Container ─ Workload ─ /log/<workload>.jsonl    what the workload says of itself
//! ```
//!
//! Needs root, runc, and CRIU ([`CRIU_PREFIX`] or the system's): see `scripts/setup`. Everything a host holds is removed
//! when it is dropped, and also when the test is killed.

mod agent;
mod baseline;
mod container;
mod guest;
mod host;
mod lazy;
mod link;
mod listening;
mod processes;
mod rootfs;
mod running;
mod snapshot;
mod usage;
mod workload;

pub use agent::{fingerprint, introduce, start_agent, trust};
pub use baseline::{
    Increment, checkpoint, checkpoint_increment, copy_container_files, page_server, restore,
};
pub use container::{Container, ContainerOptions};
pub use guest::{Finished, Guest, Job, KERNELS, RunningGuest, WireEnd, built};
pub use host::{CRIU_PREFIX, Host, HostOptions, binary};
pub use lazy::{LazyEnd, checkpoint_lazily, lazy_pages_daemon, restore_lazily};
pub use link::{Link, WireBytes};
pub use processes::Process;
pub use rootfs::Rootfs;
pub use running::Running;
pub use snapshot::Snapshot;
pub use usage::{ContainerMemory, PeakMemory, cpu_seconds};
pub use workload::{Verified, Workload};
