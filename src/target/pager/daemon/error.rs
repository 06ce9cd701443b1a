//! Why a pager gives up.

use crate::criu::lazy_pages::LazyPagesError;
use crate::kernel::userfaultfd_missing::UffdError;
use crate::target::pager::channel::ChannelError;
use crate::target::pager::standby_link::StandbyError;
use crate::target::pager::worker::WorkerError;
use nix::errno::Errno;
use std::io;
use std::path::PathBuf;

/// Why a pager gave up.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The agent closed its socket before it released the container.
    #[error("the agent left before the container was released")]
    AgentLeft,
    /// The socket to the agent failed.
    #[error("the agent's socket: {0}")]
    Agent(#[source] ChannelError),
    /// The agent said something where it does not belong.
    #[error("the agent sent {order} at the wrong time")]
    OutOfTurn {
        /// What it sent.
        order: &'static str,
    },
    /// CRIU's socket could not be made.
    #[error("listening for CRIU in {}: {source}", work_dir.display())]
    Listen {
        /// CRIU's work directory.
        work_dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// CRIU's connection failed.
    #[error(transparent)]
    Criu(#[from] LazyPagesError),
    /// CRIU left before it had restored everything.
    #[error("CRIU ended before the restore was finished")]
    RestoreFailed,
    /// CRIU finished without every task's userfaultfd.
    #[error("CRIU finished the restore but sent no userfaultfd for tasks {0:?}")]
    TasksMissing(Vec<i32>),
    /// CRIU sent a userfaultfd for a task the agent did not name, or a second one, or named a living task a zombie.
    #[error("CRIU sent task {vpid}, which the agent did not name, or twice")]
    UnknownTask {
        /// The task's pid inside the container.
        vpid: i32,
    },
    /// The agent named a task twice, or gave two tasks one memfd.
    #[error("the agent named task {vpid} or its memory twice")]
    DuplicateTask {
        /// The task's pid inside the container.
        vpid: i32,
    },
    /// A received descriptor is not usable.
    #[error("task {vpid}: {source}")]
    Uffd {
        /// The task's pid inside the container.
        vpid: i32,
        /// Why.
        source: UffdError,
    },
    /// There is no standby before release; without one nothing is released.
    #[error("no standby: {0}")]
    Standby(#[from] StandbyError),
    /// The standby ended before release.
    #[error("the standby ended before the container was released")]
    StandbyLeft,
    /// A worker gave up.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The record of arrivals could not be read, or that of a stalled container not be written.
    #[error("watching over the owed pages: {0}")]
    Provision(#[source] io::Error),
    /// A system call of the main thread failed.
    #[error("{action}: {errno}")]
    System {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        errno: Errno,
    },
}
