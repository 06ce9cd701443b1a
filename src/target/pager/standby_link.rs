//! What the pager tells its standby, so that the standby could go on at any moment.
//!
//! The pager sends the standby every descriptor it gets and every change of an address space. The change is sent after the
//! event was read, which is when the process goes on: a pager that died in between would leave the standby with a
//! wrong map and, after a fork, without the child's userfaultfd. So before it reads events a worker sets its
//! [`ReadMarks`] mark in a file both processes hold, and clears it when everything it read has been sent. A standby that
//! finds a mark set does not serve; it kills the container.

use super::channel::{Channel, ChannelError};
use super::control::Terms;
use super::family::MemberId;
use crate::memory::{PageNumber, PageRange};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A standby that reads nothing for so long is stuck, and is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// Pager → standby.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum StandbyOrder {
    /// With a pidfd of the pager.
    Watch {
        work_dir: PathBuf,
        state_dir: PathBuf,
    },
    /// With the file of the read marks.
    Marks,
    /// With a copy of the pager's control socket, to report to the agent. Sent again when another agent has adopted the pager.
    Agent,
    /// With the memfd and the lazy runs of a task.
    Task { vpid: i32 },
    /// With the record of arrivals and the owed runs of a task named before.
    Owed { vpid: i32 },
    /// The tasks are complete.
    Serve { terms: Terms },
    /// With a copy of the pager's end of a supply line, in place of the one before.
    Supply,
    /// With a copy of CRIU's connection, so that it outlives the pager.
    Connection,
    /// With a task's userfaultfd.
    Uffd { vpid: i32, member: MemberId },
    /// CRIU has restored everything.
    Restored,
    /// Answer when everything up to here is understood.
    Sync,
    /// The pager takes custody; from now on its death must not lose pages. Answered.
    Release,
    /// An address space changed. A fork's userfaultfd comes along.
    Changed {
        vpid: i32,
        member: MemberId,
        change: Change,
    },
    /// An address space is filled: close its userfaultfd and say so.
    Close { vpid: i32, member: MemberId },
    /// All is done, or given up before anything ran: end.
    StandDown,
}

/// Standby → pager.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum StandbyReply {
    Synced,
    Released,
    Closed { vpid: i32, member: MemberId },
}

/// A change of an address space.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Change {
    /// A child has a copy of it.
    Fork { child: MemberId },
    /// Pages moved to page `to` on.
    Remap { from: Pages, to: u64 },
    /// Pages were thrown away or unmapped.
    Drop { pages: Pages },
}

/// A page range on the channel.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Pages {
    start: u64,
    pages: u64,
}

impl Pages {
    /// The range, `None` if it is none.
    pub fn range(self) -> Option<PageRange> {
        PageRange::from_start_len(PageNumber(self.start), self.pages)
    }
}

impl From<PageRange> for Pages {
    fn from(range: PageRange) -> Self {
        Pages {
            start: range.start().0,
            pages: range.pages(),
        }
    }
}

/// The pager's end, shared by its threads.
///
/// A standby that cannot be told something knows less than it must, so at the first failed send it is killed: a
/// standby that takes over with an old map would place pages wrongly.
#[derive(Debug)]
pub(super) struct StandbyLink {
    channel: Mutex<Channel>,
    /// For receiving; only the main thread does.
    receiver: Channel,
    child: Mutex<Child>,
}

impl StandbyLink {
    /// Starts this program again as `pager --standby` and introduces the pager to it.
    pub fn start(
        work_dir: &Path,
        state_dir: &Path,
        agent: BorrowedFd<'_>,
        marks: &ReadMarks,
    ) -> Result<Self, StandbyError> {
        let (ours, theirs) = UnixStream::pair().map_err(StandbyError::Start)?;
        let child = Command::new("/proc/self/exe")
            .args(["pager", "--standby"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(StandbyError::Start)?;
        let receiver = Channel::new(ours.try_clone().map_err(StandbyError::Start)?)
            .map_err(StandbyError::Start)?;
        let channel = Channel::new(ours).map_err(StandbyError::Start)?;
        channel
            .set_send_timeout(SEND_TIMEOUT)
            .map_err(StandbyError::Start)?;
        // A pidfd made here, not by the standby from a number, cannot name a later process.
        let pidfd = rustix::process::pidfd_open(
            rustix::process::getpid(),
            rustix::process::PidfdFlags::empty(),
        )
        .map_err(|errno| StandbyError::Start(errno.into()))?;
        channel.send_fd(
            &StandbyOrder::Watch {
                work_dir: work_dir.to_owned(),
                state_dir: state_dir.to_owned(),
            },
            pidfd.as_fd(),
        )?;
        channel.send_fd(&StandbyOrder::Marks, marks.fd())?;
        channel.send_fd(&StandbyOrder::Agent, agent)?;
        Ok(StandbyLink {
            channel: Mutex::new(channel),
            receiver,
            child: Mutex::new(child),
        })
    }

    /// Sends an order without a descriptor.
    pub fn send(&self, order: &StandbyOrder) -> Result<(), StandbyError> {
        self.send_with(order, &[], None)
    }

    /// Sends an order with what comes along.
    pub fn send_with(
        &self,
        order: &StandbyOrder,
        runs: &[PageRange],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), StandbyError> {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel.send_with(order, runs, fd).map_err(|error| {
            self.kill();
            StandbyError::Channel(error)
        })
    }

    /// The next reply; `None` when the standby is gone.
    pub fn receive(&self) -> Result<Option<StandbyReply>, ChannelError> {
        Ok(self.receiver.receive()?.map(|received| received.message))
    }

    /// Ends the standby and waits for it.
    pub fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have died by itself; there is nothing else to do about it here.
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Tells the standby to end, and waits for it.
    pub fn stand_down(&self) {
        if self.send(&StandbyOrder::StandDown).is_ok() {
            let _ = self
                .child
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .wait();
        }
    }
}

impl AsFd for StandbyLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.receiver.as_fd()
    }
}

/// Why there is no standby.
#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    /// It could not be started.
    #[error("starting the pager's standby: {0}")]
    Start(#[source] io::Error),
    /// It could not be told something.
    #[error("the pager's standby: {0}")]
    Channel(#[from] ChannelError),
    /// The file of the read marks failed.
    #[error("the pager's read marks: {0}")]
    Marks(#[source] io::Error),
}

/// One byte per worker in a file in memory: set while what the worker reads is not yet known to the standby.
#[derive(Debug)]
pub(super) struct ReadMarks {
    file: File,
}

impl ReadMarks {
    pub fn create() -> Result<Self, StandbyError> {
        let memfd = memfd_create("migrate-pager-read-marks", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| StandbyError::Marks(errno.into()))?;
        Ok(ReadMarks { file: memfd.into() })
    }

    pub fn from_fd(fd: OwnedFd) -> Self {
        ReadMarks { file: fd.into() }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn set(&self, worker: u64) -> Result<(), StandbyError> {
        self.write(worker, 1)
    }

    pub fn clear(&self, worker: u64) -> Result<(), StandbyError> {
        self.write(worker, 0)
    }

    /// Whether any worker was reading.
    pub fn any_set(&self) -> Result<bool, StandbyError> {
        let length = self.file.metadata().map_err(StandbyError::Marks)?.len();
        let mut marks = vec![0u8; usize::try_from(length).unwrap_or(0)];
        self.file
            .read_exact_at(&mut marks, 0)
            .map_err(StandbyError::Marks)?;
        Ok(marks.iter().any(|&mark| mark != 0))
    }

    fn write(&self, worker: u64, mark: u8) -> Result<(), StandbyError> {
        self.file
            .write_all_at(&[mark], worker)
            .map_err(StandbyError::Marks)
    }
}
