//! The pages of a family that are still at the source.
//!
//! Enters: the record of arrivals, and the word that something came. Leaves: what to ask for; pages that have come become
//! pages like all others. An owed page is never placed before it is on record: neither from the store, where there is
//! nothing or an old copy of it, nor as zeros.
//!
//! A fault on an owed page waits in [`Member::waiting`](super::Member) until its page has come or the process has dropped it.
//! Requests go by pages of the store, once for all address spaces, so what a parent and its children miss comes once.

use super::{Family, FamilyError, MemberId};
use crate::memory::{PageNumber, PageRange, PageSet};
use crate::target::arrivals::Arrivals;
use crate::target::pager::pending::Pending;
use crate::target::pager::window::Windows;
use std::collections::VecDeque;
use std::io;

/// What a family knows of its owed pages. Which they are is in the [`Wanted`](super::Wanted) of each address space.
#[derive(Debug)]
pub(super) struct Owed {
    record: Arrivals,
    /// Asked for on this supply line.
    asked: PageSet,
    windows: Windows,
    /// To be sent.
    wants: VecDeque<PageRange>,
}

impl Owed {
    /// Asks for `page` and neighbours of it that are `owed` too, unless it was asked for already.
    fn ask(&mut self, page: PageNumber, owed: &Pending) -> io::Result<()> {
        if self.asked.contains(page) {
            return Ok(());
        }
        let reach = PageRange::from_start_len(page, self.windows.open(page))
            .or_else(|| PageRange::from_start_len(page, 1));
        let run = reach.and_then(|reach| owed.wants(reach).first().copied());
        let Some(run) = run.filter(|run| run.start() == page) else {
            return Ok(());
        };
        // Up to what is under way or has come by itself.
        let stop = [self.record.among(run)?, self.asked.intersecting(run)]
            .iter()
            .filter_map(|there| there.first().map(|first| first.start()))
            .min();
        let run = PageRange::new(page, stop.unwrap_or(run.end()));
        if let Some(run) = run {
            self.asked.insert(run);
            self.wants.push_back(run);
        }
        Ok(())
    }
}

impl Family {
    /// These of its lazy pages have to come from the source first. Before the task's userfaultfd has come.
    pub fn set_owed(&mut self, record: Arrivals, runs: &[PageRange]) {
        if let Some(wanted) = &mut self.unclaimed {
            wanted.owe(runs);
        }
        self.owed = Some(Owed {
            record,
            asked: PageSet::new(),
            windows: Windows::default(),
            wants: VecDeque::new(),
        });
    }

    /// Whether pages of it were owed at the beginning.
    pub fn is_post_copy(&self) -> bool {
        self.owed.is_some()
    }

    /// Takes what is on record of `store` pages into the reach of those that want it, and frees what nobody does.
    pub fn came(&mut self, store: PageRange) -> Result<(), FamilyError> {
        let vpid = self.vpid;
        let Some(owed) = &mut self.owed else {
            return Ok(());
        };
        let come = owed
            .record
            .among(store)
            .map_err(|source| failed(vpid, source))?;
        for &run in &come {
            owed.asked.remove(run);
            if let Some(wanted) = &mut self.unclaimed {
                wanted.arrive(run);
            }
            for member in self.members.values_mut() {
                for part in member.wanted.arrive(run) {
                    member.answer_within(part.now);
                }
            }
        }
        self.free(&come)
    }

    /// Takes in all that is on record: what was said of it before may have been lost.
    pub fn review(&mut self) -> Result<(), FamilyError> {
        let owed = self.wanted().map(|wanted| wanted.owed.store_pages());
        let owed: PageSet = owed.flat_map(PageSet::iter).collect();
        for run in owed.iter() {
            self.came(run)?;
        }
        Ok(())
    }

    /// What was asked for is asked for again as far as somebody waits for it.
    pub fn ask_again(&mut self) {
        if let Some(owed) = &mut self.owed {
            owed.asked = PageSet::new();
            owed.wants.clear();
        }
        for member in self.members.values_mut() {
            member.try_again();
        }
    }

    /// The requests to be sent, the oldest first.
    pub fn wants(&mut self) -> Option<&mut VecDeque<PageRange>> {
        self.owed.as_mut().map(|owed| &mut owed.wants)
    }

    /// Whether the address space of a member that waits for owed pages is gone. It ends without an event.
    pub fn has_ended(&self, id: MemberId) -> bool {
        let member = self.members.get(&id);
        member.is_some_and(|member| {
            let owed = member.wanted.owed.next_from(PageNumber(0));
            owed.is_some_and(|run| member.uffd.is_gone(run.now.start()))
        })
    }

    /// Whether the fault of a member at `page` has to wait for the page. If so it does, and the page is asked for.
    pub(super) fn wait_for_owed(
        &mut self,
        id: MemberId,
        page: PageNumber,
    ) -> Result<bool, FamilyError> {
        let owed_at = |family: &Family| family.members.get(&id)?.wanted.owed.lookup(page);
        let Some(store) = owed_at(self) else {
            return Ok(false);
        };
        // It may have come without a word yet.
        if let Some(one) = PageRange::from_start_len(store, 1) {
            self.came(one)?;
        }
        if owed_at(self).is_none() {
            return Ok(false);
        }
        let vpid = self.vpid;
        if let (Some(member), Some(owed)) = (self.members.get_mut(&id), &mut self.owed) {
            member.faults.pop_front();
            member.waiting.insert(page);
            let asked = owed.ask(store, &member.wanted.owed);
            asked.map_err(|source| failed(vpid, source))?;
        }
        Ok(true)
    }
}

impl super::Member {
    /// The faults that wait in `now` can be answered.
    fn answer_within(&mut self, now: PageRange) {
        let waiting = self.waiting.range(now.start()..now.end());
        let come: Vec<PageNumber> = waiting.copied().collect();
        for page in come {
            self.waiting.remove(&page);
            self.faults.push_back(page);
        }
    }
}

fn failed(vpid: i32, source: io::Error) -> FamilyError {
    FamilyError::Store {
        vpid,
        action: "reading the record of arrivals",
        source,
    }
}
