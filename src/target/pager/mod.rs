//! The pager: CRIU's lazy-pages daemon for one migration, in a process of its own.
//!
//! Enters: the memfds of the page store, and the userfaultfds CRIU hands over. Leaves: every page in its place. Faults are
//! answered first, the rest is filled in the background, and what is filled is freed from the memfd, so that
//! memory is not held twice. The container runs meanwhile, which is why downtime does not grow with its memory.
//!
//! In post-copy some pages are *owed*: still at the source when the container runs. The agent brings them into the memfds and
//! puts them on record ([`Arrivals`](crate::target::arrivals)); the pager asks for what somebody waits for, and places what is
//! on record and nothing else.
//!
//! ```text
//!            control (stdin)              standby link
//!   agent ◀───────────────────▶ pager ◀───────────────▶ standby
//!     ▲                          ▲ ▲ │                     ┆ holds every descriptor, reads none
//!     │ supply line: Want, Came  │ │ │
//!     └──────────────────────────┘ │ ▼
//!   CRIU ── lazy-pages.socket ─────┘ 1–2 workers: events → arrivals → faults → requests → fill
//!            userfaultfds            container
//! ```
//!
//! # Who may die
//!
//! If a userfaultfd is closed while pages are missing, the kernel fills them with zeros and nobody notices. So every
//! userfaultfd is held by two processes:
//!
//! - *The agent dies* before `Released`: pager and standby drop everything; CRIU's hook fails too and no
//!   task has run. After `Released`: nothing changes. A restarted agent sees by their lock and their mark whether they work,
//!   are done, or died ([`Life`]).
//! - *The pager dies* after `Released`: the standby has the memfds, the userfaultfds, the maps and CRIU's connection, wakes
//!   all sleepers and serves on. What the pager had placed is found in place (EEXIST) or freed (a hole, and never
//!   asked for again). If the pager died while it was reading events, what it read is lost and the standby
//!   cannot know the address space any more: it kills every process of the container, and leaves `pager-death.json` in the
//!   state directory. It does the same if it fails itself.
//! - *The standby dies*: the pager says so (`StandbyLost`) and goes on alone.
//!
//! While pages are owed, after `Released`:
//!
//! - *The agent dies*, or its supply line ends: what has come is placed, who needs more waits. The pager opens
//!   [`SUPPLY_SOCKET`] in the parent of CRIU's work directory; there a restarted agent adopts it ([`adopt`]), with the memfds,
//!   the records of arrivals and a new supply line. What was asked for is asked for again.
//! - *Nobody comes* within the patience: the pager freezes the container's cgroups and leaves [`STALL_RECORD`] beside the
//!   socket. Nothing is killed and nothing is lost; an adoption thaws it.
//! - *The pager dies*: the standby has the records and the supply line too. An arrival that the dead pager had read from the line
//!   is on record; a request that it had sent is sent again, so the agent may be asked twice for a page it is bringing. The
//!   agent has nothing to do (it hears `TookOver`).
//! - *A process exits while it waits*: no event tells, so those who wait for owed pages are probed four times a second.
//!
//! What remains: both dying together (SIGKILL to both, a host-wide OOM although both ask to be spared), and the pager dying
//! after a standby was lost. They are in a cgroup of their own, so that a service manager that kills the agent's does not
//! kill them. The agent sees the end of its socket, or the next agent their lock without a holder; it kills the container, and
//! the source goes on with what it has kept. And a child whose fork the
//! pager had read when it died, before the standby had its userfaultfd: it runs on zeros for the moment until the standby kills
//! the container.
//!
//! A thread whose *system call* waits for an owed page and that gets a signal, as it does when its cgroup is frozen, faults in a
//! circle until the page is there: the kernel (6.18 does; `FAULT_FLAG_INTERRUPTIBLE` is from 5.7) can neither interrupt such a
//! call nor let it sleep again. It computes in vain, its cgroup may stay `FREEZING`, and no byte is wrong.
//!
//! A mapping that the process makes one of `MADV_WIPEONFORK` while its pages are missing, and then forks, shows the child those
//! pages instead of zeros: no event tells. (What is one at the dump is never lazy.)
//!
//! Events of one userfaultfd come in the order in which the threads that caused them got to wait, which is after they let go of the
//! address space. So if two threads change the same addresses at once (one unmaps what the kernel then gives to another's
//! `mremap`, or one forks while another moves), and the first is held up in between for as long as the second takes, the pager
//! learns of them the wrong way round. Nothing the kernel offers tells.

mod adoption;
mod channel;
mod control;
mod daemon;
mod family;
mod last_resort;
mod pending;
mod provision;
mod service;
mod standby;
mod standby_link;
mod supply;
mod wanted;
mod window;
mod worker;

pub use adoption::{Adopted, AdoptedTask, adopt};
pub use channel::ChannelError;
pub use control::{
    FillSummary, OwedMemory, PagerEvent, PagerHandle, PagerHandleError, TaskFill, TaskMemory,
};
pub use daemon::PagerError;
pub use family::FamilyError;
pub use provision::{Life, STALL_RECORD, SUPPLY_SOCKET};
pub use standby::{DEATH_RECORD, StandbyFailure};
pub use standby_link::StandbyError;
pub use supply::{Heard, SupplyLine, SupplyMessage};
pub use worker::WorkerError;

use crate::kernel::open_files;
use crate::runtime::apart;
use nix::sys::signal::{SigSet, Signal};
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

/// Runs this process as a pager, or with `--standby` as a pager's standby; `arguments` are those after `migrate pager`.
///
/// Its standard input is the socket to the process that started it. Exit code 0: all was filled, or the
/// standby was not needed; 1: given up; 2: wrong arguments.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let standby = match arguments.as_slice() {
        [] => false,
        [flag] if flag == "--standby" => true,
        _ => {
            eprintln!("migrate pager is started by the agent and takes no arguments");
            return ExitCode::from(2);
        }
    };
    if !standby && let Err(error) = apart::leave() {
        eprintln!(
            "migrate pager: it stays in a cgroup of the agent's ({error}): a service manager must not kill that with the agent"
        );
    }
    let outcome = detach().and_then(|control| {
        if standby {
            standby::run(control).map_err(|error| error.to_string())
        } else {
            daemon::run(control).map_err(|error| error.to_string())
        }
    });
    apart::end();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(standby, "{error}");
            // The agent's log is where standard error goes; there is no subscriber of its own here.
            eprintln!(
                "migrate pager{}: {error}",
                if standby { " (standby)" } else { "" }
            );
            ExitCode::FAILURE
        }
    }
}

/// Makes this process hard to end by accident, and takes the socket from standard input.
fn detach() -> Result<UnixStream, String> {
    let attempt = || -> io::Result<UnixStream> {
        // Ctrl-C and the end of the agent's session are not for us. (EPERM: already a group's leader.)
        let _ = nix::unistd::setsid();
        let mut signals = SigSet::empty();
        for signal in [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGQUIT,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
        ] {
            signals.add(signal);
        }
        signals.thread_block()?;
        // A userfaultfd for every process, and one for every child: as many as the host allows.
        open_files::allow_most()?;
        // Best effort: lowering it needs a privilege that root in a container may lack.
        let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
        // A thread that panics must not leave the others serving half of the tasks: the process ends, the standby takes over.
        std::panic::set_hook(Box::new(|panic| {
            eprintln!("migrate pager: {panic}");
            standby::on_panic(&panic.to_string());
            std::process::abort();
        }));
        Ok(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))
    };
    attempt().map_err(|error| format!("setting up the pager process: {error}"))
}
