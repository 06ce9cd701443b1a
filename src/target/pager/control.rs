//! What the agent and its pager say to each other, and the agent's end of it.
//!
//! ```text
//!  agent                                 pager (its standard input is the socket)
//!    Listen{work_dir, state_dir}  ──▶    starts the standby, binds lazy-pages.socket
//!                                 ◀──    Listening
//!    Task{vpid} + memfd + runs    ──▶    once per living task, when the store is complete
//!    Hot{vpid} + runs             ──▶    optional: fill these first, in this order
//!    Owed{vpid} + arrivals + runs ──▶    post-copy: these are not in the store yet
//!    Serve{terms}                 ──▶
//!                                 ◀──    Serving            userfaultfds are filled as CRIU hands them over
//!                                 ◀──    Armed              every task's userfaultfd is here and with the standby
//!    Supply + socket              ──▶    post-copy, at any time from here: owed pages are asked for there
//!    Release                      ──▶
//!                                 ◀──    Released           the pager serves to the end even if the agent dies
//!                                 ◀──    Filled             per task
//!                                 ◀──    StandbyLost | TookOver | Stalled
//!                                 ◀──    Done | Failed
//! ```
//!
//! **When to release.** Before `Released` the end of the agent is the end of the pager: everything is dropped, and the
//! post-restore hook, which sees the agent's end too, makes CRIU kill the tasks before they ran. So the agent
//! must have the answer `Released` before it lets the hook go. To ask for it earlier, even before commit, is safe: if the hook
//! then fails, CRIU kills the tasks, their userfaultfds report it and the pager ends.

use super::channel::{Channel, ChannelError};
use super::supply::SupplyLine;
use crate::memory::PageRange;
use crate::target::arrivals::Arrivals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a pager that is not wanted any more may take to leave by itself.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

/// See [`PagerHandle::set_supply_patience`].
const SUPPLY_PATIENCE: Duration = Duration::from_secs(300);

/// Agent → pager.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum AgentOrder {
    /// Bind the socket in CRIU's work directory.
    Listen {
        work_dir: PathBuf,
        state_dir: PathBuf,
    },
    /// A living task: its memfd and the runs of its lazy pages come along.
    Task { vpid: i32 },
    /// Ranges to fill first.
    Hot { vpid: i32 },
    /// Pages of a task named before that are not in the store yet: the record of arrivals and the runs come along.
    Owed { vpid: i32 },
    /// All tasks are named: start.
    Serve { terms: Terms },
    /// A supply line comes along, in place of the one before.
    Supply,
    /// Take custody.
    Release,
}

/// What is done with the container when things go wrong.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Terms {
    /// Killed if pages are lost, frozen if nobody brings them.
    pub cgroups: Vec<PathBuf>,
    /// How long nobody may bring owed pages before the container is frozen.
    pub patience: Duration,
}

/// Pager → agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PagerEvent {
    /// CRIU can connect.
    Listening,
    /// The tasks are known; what CRIU hands over is filled from now on.
    Serving {
        /// How many tasks.
        tasks: usize,
    },
    /// Every task's userfaultfd has arrived, and the standby holds all of them too.
    Armed {
        /// How many tasks.
        tasks: usize,
    },
    /// The pager serves to the end now, with or without the agent.
    Released,
    /// A task and all it forked meanwhile have all their pages.
    Filled(TaskFill),
    /// The standby died; the pager goes on, but nothing would take over from it.
    StandbyLost,
    /// The pager died and the standby serves in its place.
    TookOver,
    /// Nobody brought owed pages for too long: the container is frozen until somebody adopts the pager or supplies it.
    Stalled,
    /// Every task is filled and let go.
    Done(FillSummary),
    /// The pager gave up. After `Released` the standby tries next.
    Failed {
        /// What happened, for the log.
        reason: String,
    },
}

/// How one task was filled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskFill {
    /// The task's pid inside the container.
    pub vpid: i32,
    /// Address spaces filled: one, and one for each child forked while pages were missing.
    pub spaces: u32,
    /// Pages of data copied into them, those of faults included.
    pub pages: u64,
    /// Faults answered, with data or with zeros.
    pub faults: u64,
    /// Pages of data that had no place after the restore was finished, although every change of the address space was known. Anything
    /// but zero means that the copy is not whole.
    pub unregistered: u64,
    /// Microseconds from `Serve` until it was done.
    pub micros: u64,
}

/// All tasks together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FillSummary {
    /// How many tasks.
    pub tasks: usize,
    /// Pages of data copied.
    pub pages: u64,
    /// Faults answered.
    pub faults: u64,
    /// See [`TaskFill::unregistered`].
    pub unregistered: u64,
    /// Microseconds from `Serve` until the last task was done.
    pub micros: u64,
}

impl FillSummary {
    /// Whether every page got to its place.
    pub fn is_whole(&self) -> bool {
        self.unregistered == 0
    }
}

/// The memory of one living task, for [`PagerHandle::serve`].
#[derive(Debug)]
pub struct TaskMemory {
    /// Its pid inside the container.
    pub vpid: i32,
    /// The memfd of its space: the page at address A at offset A. No other task may have the same one.
    pub memfd: OwnedFd,
    /// The pages that are lazy in CRIU's final pagemap, best split where mappings end. All others read as zero, whatever the
    /// memfd holds.
    pub lazy: Vec<PageRange>,
    /// Filled first, in this order. May be empty.
    pub hot: Vec<PageRange>,
    /// In post-copy: what has to come from the source first.
    pub owed: Option<OwedMemory>,
}

/// Pages of a task that are still at the source.
#[derive(Debug)]
pub struct OwedMemory {
    /// Which: pages of the store, all of them lazy. They are not in the store, whatever the memfd holds there.
    pub pages: Vec<PageRange>,
    /// Where those are marked that have come.
    pub arrivals: Arrivals,
}

/// What went wrong between the agent and its pager.
#[derive(Debug, thiserror::Error)]
pub enum PagerHandleError {
    /// The pager could not be started.
    #[error("starting the pager: {0}")]
    Spawn(#[source] io::Error),
    /// The socket to it failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Waiting for it failed.
    #[error("waiting for the pager: {0}")]
    Wait(#[source] io::Error),
    /// A supply line could not be made.
    #[error("making a supply line: {0}")]
    Supply(#[source] io::Error),
    /// The pager's adoption socket could not be reached, or it sent something else than its tasks.
    #[error("adopting the pager at {}: {source}", path.display())]
    Adopt {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("the pager did not say {awaited} within {after:?}")]
    Timeout {
        /// What should have come.
        awaited: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// It reported that it gave up.
    #[error("the pager gave up: {reason}")]
    Failed {
        /// Its reason.
        reason: String,
    },
    /// It and its standby are gone without a word. After release, the container's missing pages are lost: kill it.
    #[error("the pager is gone")]
    Gone,
}

/// The agent's end: a pager process and the socket to it. All calls block; none panics.
///
/// Dropped before [`PagerHandle::release`] has succeeded, it ends the pager and waits for it; afterwards it lets the pager
/// go on alone.
#[derive(Debug)]
pub struct PagerHandle {
    channel: Channel,
    /// None: adopted from an agent that died.
    child: Option<Child>,
    released: bool,
    supply_patience: Duration,
    /// Events that came while something else was awaited.
    waiting: VecDeque<PagerEvent>,
}

impl PagerHandle {
    /// Starts `command` (this program as `migrate pager`) and has it listen in CRIU's `work_dir`, which must exist. If all
    /// goes wrong later, the standby leaves its record in `state_dir`.
    pub fn spawn(
        mut command: Command,
        work_dir: &Path,
        state_dir: &Path,
        timeout: Duration,
    ) -> Result<Self, PagerHandleError> {
        let (ours, theirs) = UnixStream::pair().map_err(PagerHandleError::Spawn)?;
        let child = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(PagerHandleError::Spawn)?;
        // The command keeps its copy of the pager's end; with it open the pager's end would never be noticed.
        drop(command);
        let mut handle = PagerHandle {
            channel: Channel::new(ours).map_err(PagerHandleError::Spawn)?,
            child: Some(child),
            released: false,
            supply_patience: SUPPLY_PATIENCE,
            waiting: VecDeque::new(),
        };
        handle.channel.send(&AgentOrder::Listen {
            work_dir: work_dir.to_owned(),
            state_dir: state_dir.to_owned(),
        })?;
        handle.await_event("listening", timeout, |event| {
            matches!(event, PagerEvent::Listening).then_some(())
        })?;
        Ok(handle)
    }

    /// How long, from the end of a supply line on, nobody may bring owed pages before the pager freezes the container: 5
    /// minutes if this is not called. Before [`PagerHandle::serve`].
    pub fn set_supply_patience(&mut self, patience: Duration) {
        self.supply_patience = patience;
    }

    /// The handle of a pager that another agent had started and released; `channel` is open.
    pub(super) fn adopted(channel: Channel) -> Self {
        PagerHandle {
            channel,
            child: None,
            released: true,
            supply_patience: SUPPLY_PATIENCE,
            waiting: VecDeque::new(),
        }
    }

    /// Gives the pager a new supply line and returns the agent's end. The line before is closed, and whatever somebody waits
    /// for is asked for again. From [`PagerHandle::serve`] on. A line that ends while the pager or its standby lives (a pager
    /// that died before it could tell its standby of it) is replaced by calling this again.
    pub fn supply(&self) -> Result<SupplyLine, PagerHandleError> {
        let (ours, theirs) = SupplyLine::pair().map_err(PagerHandleError::Supply)?;
        self.channel.send_fd(&AgentOrder::Supply, theirs.as_fd())?;
        Ok(ours)
    }

    /// Names every living task and its memory, and the cgroup directories (one per hierarchy is enough) whose processes the
    /// standby must kill if pages are lost. CRIU may have connected already.
    pub fn serve(
        &mut self,
        tasks: Vec<TaskMemory>,
        cgroups: &[PathBuf],
        timeout: Duration,
    ) -> Result<(), PagerHandleError> {
        for task in &tasks {
            let vpid = task.vpid;
            self.channel.send_with(
                &AgentOrder::Task { vpid },
                &task.lazy,
                Some(task.memfd.as_fd()),
            )?;
            if let Some(owed) = &task.owed {
                self.channel.send_with(
                    &AgentOrder::Owed { vpid },
                    &owed.pages,
                    Some(owed.arrivals.as_fd()),
                )?;
            }
            if !task.hot.is_empty() {
                self.channel
                    .send_with(&AgentOrder::Hot { vpid }, &task.hot, None)?;
            }
        }
        let terms = Terms {
            cgroups: cgroups.to_vec(),
            patience: self.supply_patience,
        };
        self.channel.send(&AgentOrder::Serve { terms })?;
        self.await_event("serving", timeout, |event| {
            matches!(event, PagerEvent::Serving { .. }).then_some(())
        })
    }

    /// Waits until every task's userfaultfd is in the hands of the pager and of its standby.
    pub fn wait_armed(&mut self, timeout: Duration) -> Result<usize, PagerHandleError> {
        self.await_event("armed", timeout, |event| match event {
            PagerEvent::Armed { tasks } => Some(*tasks),
            _ => None,
        })
    }

    /// Gives the pager custody of the missing pages. When this has returned, the container may run.
    pub fn release(&mut self, timeout: Duration) -> Result<(), PagerHandleError> {
        self.channel.send(&AgentOrder::Release)?;
        // A standby takes over only if it had been told of the release.
        self.await_event("released", timeout, |event| {
            matches!(event, PagerEvent::Released | PagerEvent::TookOver).then_some(())
        })?;
        self.released = true;
        Ok(())
    }

    /// Waits until every task has all its pages.
    pub fn wait_done(&mut self, timeout: Duration) -> Result<FillSummary, PagerHandleError> {
        self.await_event("done", timeout, |event| match event {
            PagerEvent::Done(summary) => Some(*summary),
            _ => None,
        })
    }

    /// The next event, `None` if none comes in time.
    pub fn next_event(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<PagerEvent>, PagerHandleError> {
        match self.waiting.pop_front() {
            Some(event) => Ok(Some(event)),
            None => self.read_event(timeout),
        }
    }

    /// The pager's process id.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn await_event<T>(
        &mut self,
        awaited: &'static str,
        timeout: Duration,
        pick: impl Fn(&PagerEvent) -> Option<T>,
    ) -> Result<T, PagerHandleError> {
        if let Some((at, found)) = self
            .waiting
            .iter()
            .enumerate()
            .find_map(|(at, event)| Some((at, pick(event)?)))
        {
            self.waiting.remove(at);
            return Ok(found);
        }
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(event) = self.read_event(left)? else {
                return Err(PagerHandleError::Timeout {
                    awaited,
                    after: timeout,
                });
            };
            match (pick(&event), event) {
                (Some(found), _) => return Ok(found),
                // After release the standby may still save it, and says so; what follows decides.
                (None, PagerEvent::Failed { reason }) if !self.released => {
                    return Err(PagerHandleError::Failed { reason });
                }
                (None, event) => self.waiting.push_back(event),
            }
        }
    }

    fn read_event(&self, timeout: Duration) -> Result<Option<PagerEvent>, PagerHandleError> {
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()) as _,
        };
        let ready = loop {
            match poll(
                &mut [PollFd::new(&self.channel, PollFlags::IN)],
                Some(&timeout),
            ) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map_err(|errno| PagerHandleError::Wait(errno.into()))?,
            }
        };
        if ready == 0 {
            return Ok(None);
        }
        match self.channel.receive()? {
            Some(received) => Ok(Some(received.message)),
            None => Err(PagerHandleError::Gone),
        }
    }
}

impl Drop for PagerHandle {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        if self.released {
            // It may take long; only its exit status must not stay behind as a zombie of the agent.
            std::thread::spawn(move || child.wait());
            return;
        }
        // The end of the agent's socket ends the pager and its standby, as it would had the agent died.
        let _ = rustix::net::shutdown(&self.channel, rustix::net::Shutdown::Both);
        let deadline = Instant::now() + LEAVE_WITHIN;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                // The standby was told of no release and ends with it.
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
