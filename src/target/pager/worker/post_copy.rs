//! What a worker does for pages that are still at the source: it reads and writes the supply line, and looks after those who
//! wait for nothing else.

use super::{SUPPLY, Worker, WorkerError, WorkerNotice};
use crate::kernel::userfaultfd_missing::MissingEvent;
use crate::memory::PageRange;
use crate::target::pager::family::{Family, MemberId};
use crate::target::pager::supply::{Heard, SupplyLine, SupplyMessage};
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Messages read in one turn, so that faults are answered between them.
const HEARD_AT_ONCE: usize = 16;

/// How often address spaces that wait for owed pages are asked whether they still live: a process that exits says nothing.
const PROBE_EVERY: Duration = Duration::from_millis(250);

/// How long a userfaultfd that says nothing new is not listened to.
///
/// When a signal comes for a thread whose system call waits for a page, the kernel (6.18 does) lets it fault again and again until
/// the page is there, each time with another event. This must not keep the worker from the others.
const MUTED_FOR: Duration = Duration::from_millis(1);

/// A worker's supply line and what belongs to it.
#[derive(Debug, Default)]
pub(super) struct Supplies {
    line: Option<SupplyLine>,
    number: u64,
    /// The line takes no more requests for now.
    full: bool,
    probed: Option<Instant>,
    /// Members that are not listened to, and until when; the earliest first.
    muted: VecDeque<(Instant, MemberId)>,
    /// Families that are done; what still comes for them is freed.
    done: HashMap<i32, Family>,
}

impl Supplies {
    /// Keeps the store of a family that is done while pages may still come for it.
    pub fn keep(&mut self, family: Family) {
        if family.is_post_copy() {
            self.done.insert(family.vpid, family);
        }
    }
}

impl Worker {
    /// Asks on a new line from now on, again for everything that somebody waits for.
    pub(super) fn supply(&mut self, line: SupplyLine, number: u64) -> Result<(), WorkerError> {
        self.drop_line()?;
        let wanted = EpollEvent::new(EpollFlags::EPOLLIN, SUPPLY);
        self.epoll.add(&line, wanted)?;
        self.supplies.line = Some(line);
        self.supplies.number = number;
        self.supplies.full = false;
        self.ask_again()
    }

    /// Reads what was said on the supply line.
    pub(super) fn hear_supply(&mut self) -> Result<(), WorkerError> {
        for _ in 0..HEARD_AT_ONCE {
            let Some(line) = &self.supplies.line else {
                return Ok(());
            };
            match line.receive() {
                Ok(Heard::Nothing) => return Ok(()),
                Ok(Heard::Message(SupplyMessage::Came { vpid, pages })) => {
                    self.came(vpid, pages)?
                }
                Ok(Heard::Message(SupplyMessage::AskAgain)) => self.ask_again()?,
                // Ours to say.
                Ok(Heard::Message(SupplyMessage::Want { .. })) => {}
                Ok(Heard::End) => self.end_supply()?,
                Err(error) => {
                    tracing::warn!("the supply line: {error}");
                    self.end_supply()?;
                }
            }
        }
        Ok(())
    }

    /// Sends as many requests as the line takes; the rest when it can be written to.
    pub(super) fn send_wants(&mut self) -> Result<(), WorkerError> {
        let Some(line) = &self.supplies.line else {
            return Ok(());
        };
        let mut full = false;
        'families: for family in self.families.values_mut() {
            let vpid = family.vpid;
            let Some(wants) = family.wants() else {
                continue;
            };
            while let Some(&pages) = wants.front() {
                match line.send(SupplyMessage::Want { vpid, pages }) {
                    Ok(true) => wants.pop_front(),
                    Ok(false) => {
                        full = true;
                        break 'families;
                    }
                    // Its end is there to be read, and then all is asked for again.
                    Err(_) => break 'families,
                };
            }
        }
        if full != self.supplies.full {
            self.supplies.full = full;
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, full);
            self.epoll
                .modify(line, &mut EpollEvent::new(flags, SUPPLY))?;
        }
        Ok(())
    }

    /// When the waiting are asked whether they live, if any wait.
    pub(super) fn next_probe(&self) -> Option<Instant> {
        let probed = self.supplies.probed?;
        let mut families = self
            .families
            .values()
            .filter(|family| family.is_post_copy());
        let waits = families.any(|family| family.members.values().any(|member| member.is_owed()));
        waits.then_some(probed + PROBE_EVERY)
    }

    /// Gives up the address spaces that ended while they waited.
    pub(super) fn probe_the_waiting(&mut self) -> Result<(), WorkerError> {
        let now = Instant::now();
        let recent = |probed: Instant| now.duration_since(probed) < PROBE_EVERY;
        if self.supplies.probed.is_some_and(recent) {
            return Ok(());
        }
        self.supplies.probed = Some(now);
        let mut ended: Vec<MemberId> = Vec::new();
        for family in self
            .families
            .values_mut()
            .filter(|family| family.is_post_copy())
        {
            let members: Vec<MemberId> = family.members.keys().copied().collect();
            for id in members {
                if family.has_ended(id) {
                    family.abandon(id)?;
                    ended.push(id);
                }
            }
        }
        for id in ended {
            self.queue_up(id);
        }
        Ok(())
    }

    /// Whether an event is a fault that waits already.
    pub(super) fn is_known(&self, id: MemberId, event: &MissingEvent) -> bool {
        let MissingEvent::Fault(page) = event else {
            return false;
        };
        self.member(id).is_some_and(|member| member.waits_at(*page))
    }

    /// Does not listen to a member for [`MUTED_FOR`].
    pub(super) fn mute(&mut self, id: MemberId) -> Result<(), Errno> {
        self.listen_to(id, EpollFlags::empty())?;
        self.supplies
            .muted
            .push_back((Instant::now() + MUTED_FOR, id));
        Ok(())
    }

    /// When the first of the muted is listened to again.
    pub(super) fn next_unmuting(&self) -> Option<Instant> {
        self.supplies.muted.front().map(|&(until, _)| until)
    }

    /// Listens again to those who were muted for long enough.
    pub(super) fn unmute(&mut self, now: Instant) -> Result<(), Errno> {
        while let Some(&(until, id)) = self.supplies.muted.front()
            && until <= now
        {
            self.supplies.muted.pop_front();
            self.listen_to(id, EpollFlags::EPOLLIN)?;
        }
        Ok(())
    }

    /// An event has to be read before pages can be placed, maybe from one who is muted.
    pub(super) fn unmute_all(&mut self) -> Result<(), Errno> {
        for (_, id) in std::mem::take(&mut self.supplies.muted) {
            self.listen_to(id, EpollFlags::EPOLLIN)?;
        }
        Ok(())
    }

    fn listen_to(&self, id: MemberId, flags: EpollFlags) -> Result<(), Errno> {
        match self.member(id) {
            Some(member) => {
                let mut event = EpollEvent::new(flags, u64::from(id.0));
                self.epoll.modify(&member.uffd, &mut event)
            }
            None => Ok(()),
        }
    }

    /// Something may be left to do for this member.
    pub(super) fn queue_up(&mut self, id: MemberId) {
        if self.home.contains_key(&id) && !self.queue.contains(&id) {
            self.queue.push_back(id);
        }
    }

    fn came(&mut self, vpid: i32, pages: PageRange) -> Result<(), WorkerError> {
        if let Some(family) = self.supplies.done.get_mut(&vpid) {
            return Ok(family.came(pages)?);
        }
        let Some(family) = self.families.get_mut(&vpid) else {
            return Ok(());
        };
        family.came(pages)?;
        let members: Vec<MemberId> = family.members.keys().copied().collect();
        for id in members {
            self.queue_up(id);
        }
        Ok(())
    }

    fn ask_again(&mut self) -> Result<(), WorkerError> {
        for family in self.families.values_mut() {
            family.ask_again();
        }
        self.review()
    }

    /// Words may have been lost with an agent that died between the record and its message.
    fn review(&mut self) -> Result<(), WorkerError> {
        for family in self.families.values_mut() {
            family.review()?;
        }
        let members: Vec<MemberId> = self.home.keys().copied().collect();
        for id in members {
            self.queue_up(id);
        }
        Ok(())
    }

    fn end_supply(&mut self) -> Result<(), WorkerError> {
        self.drop_line()?;
        self.review()?;
        let number = self.supplies.number;
        self.notices.send(WorkerNotice::SupplyEnded { number });
        Ok(())
    }

    fn drop_line(&mut self) -> Result<(), Errno> {
        if let Some(line) = self.supplies.line.take() {
            self.epoll.delete(&line)?;
            // The standby has a copy of it; the agent must not go on talking to that.
            line.hang_up();
        }
        Ok(())
    }
}
