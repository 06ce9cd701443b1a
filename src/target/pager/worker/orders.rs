//! How the main thread and its workers talk: orders one way, notices the other, each with a descriptor to poll.

use super::WorkerError;
use crate::kernel::userfaultfd_missing::MissingUffd;
use crate::target::pager::family::{Family, MemberId, Tally};
use crate::target::pager::supply::SupplyLine;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Main thread → worker.
#[derive(Debug)]
pub(in crate::target::pager) enum WorkerOrder {
    /// Serve this family, with the address spaces it already has.
    Family(Box<Family>),
    /// A task's userfaultfd has come.
    Uffd {
        vpid: i32,
        member: MemberId,
        uffd: MissingUffd,
    },
    /// CRIU has registered all it will.
    Restored,
    /// The standby has closed this address space.
    Closed { vpid: i32, member: MemberId },
    /// There is no standby any more.
    Alone,
    /// Owed pages are asked for here from now on. `number` tells this supply line from those before.
    Supply { line: SupplyLine, number: u64 },
}

/// Worker → main thread.
#[derive(Debug)]
pub(in crate::target::pager) enum WorkerNotice {
    /// A family is complete and let go. Its address spaces are closed already.
    Filled { vpid: i32, tally: Tally },
    /// The supply line of this number has ended.
    SupplyEnded { number: u64 },
    /// The standby could not be told something; it has been killed.
    StandbyLost,
    /// The worker has stopped. It keeps its userfaultfds open until the process ends.
    Failed(WorkerError),
}

/// The main thread's end of a worker.
#[derive(Debug)]
pub(in crate::target::pager) struct WorkerHandle {
    orders: Sender<WorkerOrder>,
    wake: Arc<EventFd>,
}

impl WorkerHandle {
    pub(super) fn new(orders: Sender<WorkerOrder>, wake: Arc<EventFd>) -> Self {
        WorkerHandle { orders, wake }
    }

    /// Hands over an order. A worker that is gone has said so in a notice.
    pub fn order(&self, order: WorkerOrder) {
        if self.orders.send(order).is_ok() {
            // The counter of an eventfd overflows after 2^64 orders.
            let _ = self.wake.write(1);
        }
    }
}

/// Where workers leave their notices for the main thread to poll.
#[derive(Clone, Debug)]
pub(in crate::target::pager) struct Notices {
    sender: Sender<WorkerNotice>,
    wake: Arc<EventFd>,
}

impl Notices {
    pub fn new() -> Result<(Self, Receiver<WorkerNotice>), Errno> {
        let (sender, receiver) = channel();
        let wake = Arc::new(wake_up()?);
        Ok((Notices { sender, wake }, receiver))
    }

    /// Empties the wake-up counter.
    pub fn acknowledge(&self) {
        let _ = self.wake.read();
    }

    pub(super) fn send(&self, notice: WorkerNotice) {
        if self.sender.send(notice).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// A descriptor that becomes readable when it is written to.
pub(super) fn wake_up() -> Result<EventFd, Errno> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
}
