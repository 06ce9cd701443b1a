//! One thread that owns some families: it answers their faults, follows their changes and fills them.
//!
//! Nothing of a family is shared with another thread. That is what makes the order of things right: an event is
//! read, sent to the standby and applied to the map before the same thread places another page, so no page can be
//! placed by a map from before a change that the process has already gone on from.
//!
//! ```text
//!  loop:  poll ─▶ events of every ready userfaultfd, all that wait ─▶ arrivals ─▶ faults ─▶ requests ─▶ one chunk of the fill
//! ```
//!
//! In post-copy the worker reads and writes the supply line itself: from a fault to its request, and from an arrival to the
//! answer, it is one wake-up.
//!
//! **Order trap.** The kernel hands out waiting faults before waiting events, and refuses to place any page (EAGAIN) while an
//! event waits. So a fault read first may belong to a page whose removal is still in the queue; it cannot be
//! answered until that event has been read, and then the answer is zero, not the old page. Therefore all events are drained
//! before faults are answered, and a fault refused with EAGAIN is looked up afresh after the next draining. (Firecracker's
//! example handlers in src/firecracker/examples/uffd treat the same trap.)

mod orders;
mod post_copy;

pub(super) use orders::{Notices, WorkerHandle, WorkerNotice, WorkerOrder};

use super::family::{Family, FamilyError, LARGE_CHUNK, Member, MemberId, Step};
use super::standby_link::{Change, ReadMarks, StandbyError, StandbyLink, StandbyOrder};
use crate::kernel::userfaultfd_missing::{MissingEvent, UffdError};
use crate::memory::{PAGE_SIZE, PageRange};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use orders::wake_up;
use post_copy::Supplies;
use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};
use userfaultfd::EventBuffer;

/// The key of the wake-up descriptor among the member ids, which have 32 bits.
const WAKE: u64 = u64::MAX;
/// The key of the supply line.
const SUPPLY: u64 = u64::MAX - 1;
const EVENTS_AT_ONCE: usize = 32;

/// Why a worker stopped.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A family could not be served.
    #[error(transparent)]
    Family(#[from] FamilyError),
    /// Events could not be read.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The read mark could not be written.
    #[error(transparent)]
    Standby(#[from] StandbyError),
    /// Waiting for events failed.
    #[error("waiting for userfaultfd events: {0}")]
    Poll(#[from] Errno),
    /// A task's userfaultfd came twice, or for a task nobody named.
    #[error("an unexpected userfaultfd for task {vpid}")]
    UnexpectedUffd {
        /// The task's pid inside the container.
        vpid: i32,
    },
}

/// What a worker keeps its standby informed with.
#[derive(Clone, Debug)]
pub(super) struct Mirror {
    pub link: Arc<StandbyLink>,
    pub marks: Arc<ReadMarks>,
}

/// Starts worker number `number`. `mirror` is `None` in the standby itself.
pub(super) fn start(
    number: u64,
    ids: Arc<AtomicU32>,
    notices: Notices,
    mirror: Option<Mirror>,
) -> Result<WorkerHandle, Errno> {
    let (sender, receiver) = channel();
    let wake = Arc::new(wake_up()?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(wake.as_ref(), EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
    let mut worker = Worker {
        number,
        ids,
        notices,
        mirror,
        orders: receiver,
        wake: wake.clone(),
        epoll,
        families: HashMap::new(),
        home: HashMap::new(),
        queue: VecDeque::new(),
        supplies: Supplies::default(),
        restored: false,
        buffer: vec![0; (LARGE_CHUNK * PAGE_SIZE) as usize],
        events: EventBuffer::new(EVENTS_AT_ONCE),
    };
    std::thread::Builder::new()
        .name(format!("pager-{number}"))
        .spawn(move || {
            if let Err(error) = worker.run() {
                worker.notices.send(WorkerNotice::Failed(error));
                // To close the userfaultfds now would hand out zeros before the main thread has decided anything.
                loop {
                    std::thread::park();
                }
            }
        })
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)))?;
    Ok(WorkerHandle::new(sender, wake))
}

struct Worker {
    number: u64,
    ids: Arc<AtomicU32>,
    notices: Notices,
    mirror: Option<Mirror>,
    orders: Receiver<WorkerOrder>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    families: HashMap<i32, Family>,
    /// Which family a member belongs to.
    home: HashMap<MemberId, i32>,
    /// Members that may have something to fill, the next one first.
    queue: VecDeque<MemberId>,
    supplies: Supplies,
    restored: bool,
    buffer: Vec<u8>,
    events: EventBuffer,
}

impl Worker {
    /// Ends without error when the main thread drops its handle.
    fn run(&mut self) -> Result<(), WorkerError> {
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut ready, self.patience()) {
                Err(Errno::EINTR) => 0,
                other => other?,
            };
            self.unmute(Instant::now())?;
            let mut supplied = false;
            for event in &ready[..count] {
                if event.data() == WAKE {
                    let _ = self.wake.read();
                } else if event.data() == SUPPLY {
                    supplied = true;
                } else if let Ok(id) = u32::try_from(event.data()) {
                    self.read_events(MemberId(id))?;
                }
            }
            if !self.follow_orders()? {
                return Ok(());
            }
            if supplied {
                self.hear_supply()?;
            }
            self.probe_the_waiting()?;
            let refused = self.serve_faults()?;
            self.send_wants()?;
            let idle = !self.fill_a_chunk()?;
            if refused {
                self.unmute_all()?;
            }
            if refused && idle {
                // The thread that caused the event must run before the kernel lets pages be placed again.
                std::thread::sleep(Duration::from_micros(20));
            }
        }
    }

    /// How long to wait for events: not at all while there is work.
    fn patience(&self) -> EpollTimeout {
        let mut next = self
            .next_probe()
            .into_iter()
            .chain(self.next_unmuting())
            .min();
        let queued = self.queue.iter().filter_map(|id| self.member(*id));
        let faulted = self
            .families
            .values()
            .flat_map(|family| family.members.values())
            .filter(|member| !member.faults.is_empty());
        for member in queued.chain(faulted) {
            match member.retry_at {
                None => return EpollTimeout::ZERO,
                Some(at) => next = Some(next.map_or(at, |next| next.min(at))),
            }
        }
        match next {
            None => EpollTimeout::NONE,
            // Whole milliseconds only, and too late is better than a busy loop.
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now()).as_micros();
                EpollTimeout::try_from(left.div_ceil(1000).min(1000) as i32)
                    .unwrap_or(EpollTimeout::ZERO)
            }
        }
    }

    fn member(&self, id: MemberId) -> Option<&Member> {
        self.families.get(self.home.get(&id)?)?.members.get(&id)
    }

    /// `false`: the main thread is done with this worker.
    fn follow_orders(&mut self) -> Result<bool, WorkerError> {
        loop {
            match self.orders.try_recv() {
                Err(TryRecvError::Empty) => return Ok(true),
                Err(TryRecvError::Disconnected) => return Ok(false),
                Ok(WorkerOrder::Family(mut family)) => {
                    let vpid = family.vpid;
                    let members: Vec<MemberId> = family.members.keys().copied().collect();
                    family.review()?;
                    self.families.insert(vpid, *family);
                    for member in members {
                        self.adopt(vpid, member)?;
                    }
                    self.let_go_if_done(vpid);
                }
                Ok(WorkerOrder::Uffd { vpid, member, uffd }) => {
                    let claimed = self
                        .families
                        .get_mut(&vpid)
                        .is_some_and(|family| family.claim(member, uffd));
                    if !claimed {
                        return Err(WorkerError::UnexpectedUffd { vpid });
                    }
                    self.adopt(vpid, member)?;
                }
                Ok(WorkerOrder::Restored) => {
                    self.restored = true;
                    let families = self.families.values_mut();
                    families
                        .flat_map(|family| family.members.values_mut())
                        .for_each(Member::resume);
                    // What was complete before may be closed now.
                    self.queue = self.home.keys().copied().collect();
                }
                Ok(WorkerOrder::Supply { line, number }) => self.supply(line, number)?,
                Ok(WorkerOrder::Closed { vpid, member }) => self.let_go(vpid, member)?,
                Ok(WorkerOrder::Alone) => {
                    self.mirror = None;
                    let closing: Vec<(i32, MemberId)> = self
                        .home
                        .iter()
                        .map(|(&id, &vpid)| (vpid, id))
                        .filter(|&(_, id)| self.member(id).is_some_and(|member| member.closing))
                        .collect();
                    for (vpid, member) in closing {
                        self.let_go(vpid, member)?;
                    }
                }
            }
        }
    }

    /// Polls and fills a member that is already in its family.
    fn adopt(&mut self, vpid: i32, id: MemberId) -> Result<(), WorkerError> {
        if let Some(member) = self
            .families
            .get(&vpid)
            .and_then(|family| family.members.get(&id))
        {
            self.epoll.add(
                &member.uffd,
                EpollEvent::new(EpollFlags::EPOLLIN, u64::from(id.0)),
            )?;
            self.home.insert(id, vpid);
            self.queue.push_back(id);
        }
        Ok(())
    }

    /// Reads everything that waits on a member's userfaultfd and applies it, the standby being told first.
    fn read_events(&mut self, id: MemberId) -> Result<(), WorkerError> {
        let Some(&vpid) = self.home.get(&id) else {
            return Ok(());
        };
        if let Some(mirror) = &self.mirror {
            mirror.marks.set(self.number)?;
        }
        let mut freed = Vec::new();
        while let Some(member) = self
            .families
            .get_mut(&vpid)
            .and_then(|family| family.members.get_mut(&id))
        {
            let events = member.uffd.read_events(&mut self.events)?;
            if events.is_empty() {
                break;
            }
            let mut news = false;
            for event in events {
                if !self.is_known(id, &event) {
                    news = true;
                    freed.extend(self.follow(vpid, id, event)?);
                }
            }
            if !news {
                self.mute(id)?;
                break;
            }
        }
        if let Some(mirror) = &self.mirror {
            mirror.marks.clear(self.number)?;
        }
        if let Some(family) = self.families.get(&vpid) {
            family.free(&freed)?;
            if family.is_post_copy() {
                // The last owed page may have been dropped.
                self.queue_up(id);
            }
        }
        Ok(())
    }

    /// Applies one event; says which store pages the member does not want any more.
    fn follow(
        &mut self,
        vpid: i32,
        id: MemberId,
        event: MissingEvent,
    ) -> Result<Vec<PageRange>, WorkerError> {
        let Some(family) = self.families.get_mut(&vpid) else {
            return Ok(Vec::new());
        };
        let (change, child) = match event {
            MissingEvent::Fault(page) => {
                if let Some(member) = family.members.get_mut(&id) {
                    member.faults.push_back(page);
                }
                return Ok(Vec::new());
            }
            MissingEvent::Fork(uffd) => {
                let child = MemberId(self.ids.fetch_add(1, Ordering::Relaxed));
                (Change::Fork { child }, Some((child, uffd)))
            }
            MissingEvent::Remap { from, to, pages } => {
                let Some(from) = PageRange::from_start_len(from, pages) else {
                    return Ok(Vec::new());
                };
                let from = from.into();
                (Change::Remap { from, to: to.0 }, None)
            }
            MissingEvent::Remove(pages) | MissingEvent::Unmap(pages) => {
                let pages = pages.into();
                (Change::Drop { pages }, None)
            }
        };
        if let Some(mirror) = &self.mirror {
            let order = StandbyOrder::Changed {
                vpid,
                member: id,
                change,
            };
            let fd = child.as_ref().map(|(_, uffd)| uffd.as_fd());
            if let Err(error) = mirror.link.send_with(&order, &[], fd) {
                tracing::warn!("{error}");
                self.mirror = None;
                self.notices.send(WorkerNotice::StandbyLost);
            }
        }
        let Some((child, uffd)) = child else {
            return Ok(family.apply(id, &change, None));
        };
        let freed = family.apply(id, &change, Some(uffd));
        self.adopt(vpid, child)?;
        Ok(freed)
    }

    /// Answers what can be answered now. `true`: some fault has to wait for an event to be read.
    fn serve_faults(&mut self) -> Result<bool, WorkerError> {
        let waiting: Vec<(i32, MemberId)> = self
            .families
            .values()
            .flat_map(|family| {
                let faulted = family
                    .members
                    .iter()
                    .filter(|(_, member)| !member.faults.is_empty());
                faulted.map(|(&id, _)| (family.vpid, id))
            })
            .collect();
        let mut refused = false;
        for (vpid, id) in waiting {
            let Some(family) = self.families.get_mut(&vpid) else {
                continue;
            };
            loop {
                match family.serve_fault(id)? {
                    Step::Progress => {}
                    Step::Complete | Step::Waiting | Step::Later => break,
                    Step::Changing => {
                        refused = true;
                        break;
                    }
                    Step::Gone => {
                        family.abandon(id)?;
                        self.queue.push_back(id);
                        break;
                    }
                }
            }
            // Whoever runs now profits most from being filled.
            if let Some(at) = self.queue.iter().position(|&queued| queued == id) {
                self.queue.swap(0, at);
            }
        }
        Ok(refused)
    }

    /// Fills one chunk of the first member that can take one. `false`: nobody could.
    fn fill_a_chunk(&mut self) -> Result<bool, WorkerError> {
        for _ in 0..self.queue.len() {
            let Some(id) = self.queue.pop_front() else {
                break;
            };
            let Some(&vpid) = self.home.get(&id) else {
                continue;
            };
            let Some(family) = self.families.get_mut(&vpid) else {
                continue;
            };
            if let Some(member) = family.members.get_mut(&id)
                && let Some(at) = member.retry_at
            {
                if Instant::now() < at {
                    self.queue.push_back(id);
                    continue;
                }
                member.retry_at = None;
            }
            match family.fill(id, &mut self.buffer, self.restored)? {
                Step::Progress => {
                    self.queue.push_back(id);
                    return Ok(true);
                }
                Step::Later | Step::Changing => self.queue.push_back(id),
                Step::Gone => {
                    family.abandon(id)?;
                    self.close(vpid, id)?;
                }
                Step::Complete if self.restored => self.close(vpid, id)?,
                // Comes back to the queue when the restore is finished, or pages have come.
                Step::Complete | Step::Waiting => {}
            }
        }
        Ok(false)
    }

    /// A member has all it needs: the standby lets go first, because while it holds the userfaultfd too, closing ours
    /// would leave faults on zero pages without an answer.
    fn close(&mut self, vpid: i32, id: MemberId) -> Result<(), WorkerError> {
        let Some(member) = self
            .families
            .get_mut(&vpid)
            .and_then(|family| family.members.get_mut(&id))
        else {
            return Ok(());
        };
        if member.closing {
            return Ok(());
        }
        member.closing = true;
        if let Some(mirror) = &self.mirror {
            match mirror.link.send(&StandbyOrder::Close { vpid, member: id }) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!("{error}");
                    self.mirror = None;
                    self.notices.send(WorkerNotice::StandbyLost);
                }
            }
        }
        self.let_go(vpid, id)
    }

    fn let_go(&mut self, vpid: i32, id: MemberId) -> Result<(), WorkerError> {
        // A fork that waits to be read is a child of whose memory we may be the only one to know.
        self.read_events(id)?;
        if let Some(family) = self.families.get_mut(&vpid)
            && let Some(member) = family.members.remove(&id)
        {
            self.epoll.delete(&member.uffd)?;
        }
        self.home.remove(&id);
        self.let_go_if_done(vpid);
        Ok(())
    }

    fn let_go_if_done(&mut self, vpid: i32) {
        if self.families.get(&vpid).is_some_and(Family::done)
            && let Some(family) = self.families.remove(&vpid)
        {
            let tally = family.tally;
            self.notices.send(WorkerNotice::Filled { vpid, tally });
            self.supplies.keep(family);
        }
    }
}
