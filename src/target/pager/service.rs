//! The workers of a process and which task each serves, as the main thread sees them. Used by the pager and, after its
//! death, by the standby.

use super::control::{FillSummary, TaskFill};
use super::family::{Family, MemberId, Tally};
use super::supply::SupplyLine;
use super::worker::{self, Mirror, Notices, WorkerError, WorkerHandle, WorkerNotice, WorkerOrder};
use crate::kernel::userfaultfd_missing::MissingUffd;
use nix::errno::Errno;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Instant;

/// More threads would take the cores from the container that was just released.
const MAX_WORKERS: usize = 2;

/// In post-copy one is faster than any link, and reads the supply line without asking another.
const POST_COPY_WORKERS: usize = 1;

/// What happened among the workers.
#[derive(Debug)]
pub(super) enum ServiceEvent {
    Filled(TaskFill),
    /// The supply line of this number.
    SupplyEnded(u64),
    StandbyLost,
    Failed(WorkerError),
}

/// The running workers.
#[derive(Debug)]
pub(super) struct Service {
    workers: Vec<WorkerHandle>,
    /// Which worker serves a task.
    home: HashMap<i32, usize>,
    notices: Notices,
    inbox: Receiver<WorkerNotice>,
    ids: Arc<AtomicU32>,
    filled: usize,
    summary: FillSummary,
    started: Instant,
}

impl Service {
    /// Starts workers for `families`, the largest spread first so that the workers end together. New members are numbered
    /// from `first_id`.
    pub fn start(
        mut families: Vec<Family>,
        first_id: u32,
        mirror: Option<&Mirror>,
    ) -> Result<Self, Errno> {
        let (notices, inbox) = Notices::new()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let most = if families.iter().any(Family::is_post_copy) {
            POST_COPY_WORKERS
        } else {
            MAX_WORKERS.min(cores)
        };
        let count = families.len().clamp(1, most);
        let ids = Arc::new(AtomicU32::new(first_id));
        let workers = (0..count as u64)
            .map(|number| worker::start(number, ids.clone(), notices.clone(), mirror.cloned()))
            .collect::<Result<Vec<_>, _>>()?;
        let mut service = Service {
            workers,
            home: HashMap::new(),
            notices,
            inbox,
            ids,
            filled: 0,
            summary: FillSummary {
                tasks: families.len(),
                ..FillSummary::default()
            },
            started: Instant::now(),
        };
        families.sort_by_key(|family| std::cmp::Reverse(family.pending_pages()));
        let mut load = vec![0u64; count];
        for family in families {
            let (lightest, _) = load
                .iter()
                .enumerate()
                .min_by_key(|(_, load)| **load)
                .expect("there is at least one worker");
            load[lightest] += family.pending_pages();
            service.home.insert(family.vpid, lightest);
            service.workers[lightest].order(WorkerOrder::Family(Box::new(family)));
        }
        Ok(service)
    }

    /// How many tasks there are.
    pub fn tasks(&self) -> usize {
        self.summary.tasks
    }

    /// A number for a new member.
    pub fn new_id(&self) -> MemberId {
        MemberId(self.ids.fetch_add(1, Ordering::Relaxed))
    }

    /// Hands a task's userfaultfd to its worker.
    pub fn uffd(&self, vpid: i32, member: MemberId, uffd: MissingUffd) {
        self.tell(vpid, WorkerOrder::Uffd { vpid, member, uffd });
    }

    /// The standby has closed a member.
    pub fn closed(&self, vpid: i32, member: MemberId) {
        self.tell(vpid, WorkerOrder::Closed { vpid, member });
    }

    /// CRIU has registered all it will.
    pub fn restored(&self) {
        for worker in &self.workers {
            worker.order(WorkerOrder::Restored);
        }
    }

    /// There is no standby any more.
    pub fn alone(&self) {
        for worker in &self.workers {
            worker.order(WorkerOrder::Alone);
        }
    }

    /// Gives the pager's end of supply line `number` to the worker, the only one in post-copy.
    pub fn supply(&self, line: SupplyLine, number: u64) {
        self.workers[0].order(WorkerOrder::Supply { line, number });
    }

    /// What happened since the last call.
    pub fn events(&mut self) -> Vec<ServiceEvent> {
        self.notices.acknowledge();
        let mut events = Vec::new();
        while let Ok(notice) = self.inbox.try_recv() {
            events.push(match notice {
                WorkerNotice::Filled { vpid, tally } => {
                    ServiceEvent::Filled(self.count(vpid, tally))
                }
                WorkerNotice::SupplyEnded { number } => ServiceEvent::SupplyEnded(number),
                WorkerNotice::StandbyLost => ServiceEvent::StandbyLost,
                WorkerNotice::Failed(error) => ServiceEvent::Failed(error),
            });
        }
        events
    }

    /// The sum, once every task is filled.
    pub fn done(&self) -> Option<FillSummary> {
        (self.filled == self.summary.tasks).then_some(self.summary)
    }

    fn count(&mut self, vpid: i32, tally: Tally) -> TaskFill {
        let micros = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.filled += 1;
        self.summary.pages += tally.pages;
        self.summary.faults += tally.faults;
        self.summary.unregistered += tally.unregistered;
        self.summary.micros = micros;
        TaskFill {
            vpid,
            spaces: tally.spaces,
            pages: tally.pages,
            faults: tally.faults,
            unregistered: tally.unregistered,
            micros,
        }
    }

    fn tell(&self, vpid: i32, order: WorkerOrder) {
        if let Some(&worker) = self.home.get(&vpid) {
            self.workers[worker].order(order);
        }
    }
}

impl AsFd for Service {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notices.as_fd()
    }
}
