//! What the engine asks of the kernel about another process, and the only room with `unsafe` in it.
//!
//! Process ids and page ranges enter; memory, page states, file descriptors and answers about this kernel leave.
//! An errno gets its meaning here, once, and callers match on meanings. Nothing here knows of rounds or containers.
//!
//! ```text
//!  maps ──────────── which mappings a process has
//!  pagemap ───────── which pages are populated, written, soft-dirty; arms write tracking
//!  page_tables ───── which page tables have been replaced by others
//!  process_memory ── what is in them
//!  inject ────────── makes a userfaultfd inside the process   (ptrace, x86_64: its hands)
//!  userfaultfd ───── registers ranges with it
//!  address_space ─── which processes share one memory
//!  loopback ──────── brings up the loopback device of a restored container
//!  tcp_repair ────── gives connections back that a dead CRIU was reading
//!  private_mounts ── starts a program in a mount namespace of its own
//!  userfaultfd_missing  fills missing pages of restored processes
//!  ksm ───────────── whether the kernel merges equal pages
//!  readiness ─────── waits for a descriptor in async tasks
//!  sparse_file ───── reads the data of a file and skips its holes
//!  probe ─────────── what this kernel can do, found by trying   (scratch: memory to try it on)
//!  bugs ──────────── what is known to go wrong, and what is done about it   (bug_probes: does it here?)
//! ```

pub mod address_space;
pub mod bug_probes;
pub mod bugs;
#[cfg(test)]
pub(crate) mod forked;
pub mod inject;
pub mod ksm;
pub mod loopback;
pub mod maps;
pub mod page_tables;
pub mod pagemap;
pub mod pidfd;
pub mod private_mounts;
pub mod probe;
pub mod process_memory;
pub mod ptrace;
pub mod readiness;
pub(crate) mod scratch;
pub mod sparse_file;
pub mod tcp_repair;
pub mod userfaultfd;
pub mod userfaultfd_missing;
pub mod zero_frames;

#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod arch;
#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "src/kernel/x86_64.rs needs a sibling for this architecture: registers, system call numbers, calling convention"
);

/// Whether this process has CAP_SYS_RESOURCE. Without it CRIU can neither read the resource limits of another user's process
/// nor give a process limits above its own.
pub fn has_sys_resource() -> std::io::Result<bool> {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let own = procfs::process::Process::myself().and_then(|own| own.status());
    Ok(own.map_err(std::io::Error::other)?.capeff & CAP_SYS_RESOURCE != 0)
}

/// This boot of this host (`/proc/sys/kernel/random/boot_id`): after a restart nothing of a process is left.
pub fn boot_id() -> std::io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_string())
}
