//! The pager's main thread: the agent's orders, CRIU's connection, the standby's replies and the workers' notices.

mod error;

pub use error::PagerError;

use super::channel::Channel;
use super::control::{AgentOrder, PagerEvent, Terms};
use super::family::Family;
use super::provision::{Provision, bind};
use super::service::{Service, ServiceEvent};
use super::standby_link::{ReadMarks, StandbyLink, StandbyOrder, StandbyReply};
use super::supply::SupplyLine;
use super::worker::Mirror;
use crate::criu::lazy_pages::{LazyPagesConnection, LazyPagesError, LazyPagesMessage, SOCKET_NAME};
use crate::kernel::userfaultfd_missing::MissingUffd;
use crate::target::arrivals::Arrivals;
use nix::errno::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

/// How far the custody of the missing pages has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Custody {
    /// Userfaultfds are still missing.
    Gathering,
    /// All are here; the standby is asked whether it has them all.
    Arming,
    /// The agent may release.
    Armed,
    /// The agent wants to release; the standby is told.
    Releasing,
    /// The pages are ours alone.
    Released,
}

/// Serves one migration.
pub(super) fn run(control: UnixStream) -> Result<(), PagerError> {
    let agent = Channel::new(control).map_err(|source| PagerError::System {
        action: "using the agent's socket",
        errno: errno_of(&source),
    })?;
    let mut pager = match Pager::start(agent) {
        Ok(pager) => pager,
        Err((agent, error)) => {
            report_failure(&agent, &error);
            return Err(error);
        }
    };
    let outcome = pager.serve();
    if let Err(error) = &outcome {
        report_failure(&pager.agent, error);
    }
    // A pager that gave up after release is replaced: its standby must not be told to end.
    if (outcome.is_ok() || pager.custody < Custody::Released)
        && let Some(mirror) = &pager.mirror
    {
        mirror.link.stand_down();
    }
    if outcome.is_ok()
        && let Some(summary) = pager.service.as_ref().and_then(Service::done)
    {
        // An agent that is gone needs no summary.
        let _ = pager.agent.send(&PagerEvent::Done(summary));
    }
    outcome
}

fn report_failure(agent: &Channel, error: &PagerError) {
    let _ = agent.send(&PagerEvent::Failed {
        reason: error.to_string(),
    });
}

struct Pager {
    agent: Channel,
    agent_open: bool,
    mirror: Option<Mirror>,
    /// Until CRIU has connected.
    listener: Option<UnixListener>,
    socket: PathBuf,
    connection: Option<LazyPagesConnection>,
    /// Named by the agent, not yet served.
    named: BTreeMap<i32, Family>,
    /// The inodes of their memfds.
    memfds: Vec<u64>,
    /// Userfaultfds that came before the agent named the tasks.
    early: Vec<(i32, OwnedFd)>,
    /// Tasks whose userfaultfd has not come.
    awaited: Vec<i32>,
    service: Option<Service>,
    provision: Provision,
    custody: Custody,
    restored: bool,
}

/// What the main thread polls.
#[derive(Clone, Copy)]
enum Source {
    Agent,
    Standby,
    Listener,
    Criu,
    Workers,
    Adopter,
}

impl Pager {
    /// Waits for the first order, starts the standby and listens for CRIU.
    fn start(agent: Channel) -> Result<Self, (Channel, PagerError)> {
        let prepared = (|| {
            let first = agent.receive::<AgentOrder>().map_err(PagerError::Agent)?;
            let Some(AgentOrder::Listen {
                work_dir,
                state_dir,
            }) = first.map(|received| received.message)
            else {
                return Err(PagerError::OutOfTurn {
                    order: "something other than Listen",
                });
            };
            let provision = Provision::new(&work_dir, &state_dir).map_err(PagerError::Provision)?;
            let marks = Arc::new(ReadMarks::create()?);
            let link = Arc::new(StandbyLink::start(
                &work_dir,
                &state_dir,
                agent.as_fd(),
                &marks,
            )?);
            let listener = bind(&work_dir, SOCKET_NAME).map_err(|source| PagerError::Listen {
                work_dir: work_dir.clone(),
                source,
            })?;
            agent
                .send(&PagerEvent::Listening)
                .map_err(PagerError::Agent)?;
            Ok((
                Mirror { link, marks },
                listener,
                work_dir.join(SOCKET_NAME),
                provision,
            ))
        })();
        match prepared {
            Err(error) => Err((agent, error)),
            Ok((mirror, listener, socket, provision)) => Ok(Pager {
                agent,
                agent_open: true,
                mirror: Some(mirror),
                listener: Some(listener),
                socket,
                connection: None,
                named: BTreeMap::new(),
                memfds: Vec::new(),
                early: Vec::new(),
                awaited: Vec::new(),
                service: None,
                provision,
                custody: Custody::Gathering,
                restored: false,
            }),
        }
    }

    fn serve(&mut self) -> Result<(), PagerError> {
        while !self.restored || self.service.as_ref().and_then(Service::done).is_none() {
            for source in self.wait()? {
                match source {
                    Source::Agent => self.hear_agent()?,
                    Source::Standby => self.hear_standby()?,
                    Source::Listener => self.accept_criu()?,
                    Source::Criu => self.hear_criu()?,
                    Source::Workers => self.hear_workers()?,
                    Source::Adopter => self.be_adopted()?,
                }
            }
            let frozen = self.provision.freeze_if_due();
            if frozen.map_err(PagerError::Provision)? {
                self.say(&PagerEvent::Stalled)?;
            }
        }
        // Without the mark of one that is done, a pager that is gone is one whose pages are lost.
        let done = self.service.as_ref().and_then(Service::done);
        if done.is_some_and(|summary| summary.is_whole()) {
            self.provision.finish();
        }
        Ok(())
    }

    fn wait(&self) -> Result<Vec<Source>, PagerError> {
        let mut sources = Vec::new();
        let mut fds = Vec::new();
        let mut watch = |source, fd| {
            sources.push(source);
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        };
        if self.agent_open {
            watch(Source::Agent, self.agent.as_fd());
        }
        if let Some(mirror) = &self.mirror {
            watch(Source::Standby, mirror.link.as_fd());
        }
        if let Some(listener) = &self.listener {
            watch(Source::Listener, listener.as_fd());
        }
        if let Some(connection) = &self.connection {
            watch(Source::Criu, connection.as_fd());
        }
        if let Some(service) = &self.service {
            watch(Source::Workers, service.as_fd());
        }
        if let Some(listener) = self.provision.listener() {
            watch(Source::Adopter, listener);
        }
        // Too late is better than a busy loop.
        let patience = self.provision.patience().map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()) as _,
        });
        loop {
            match poll(&mut fds, patience.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    return Err(PagerError::System {
                        action: "waiting for events",
                        errno: Errno::from_raw(errno.raw_os_error()),
                    });
                }
                Ok(_) => break,
            }
        }
        Ok(sources
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(source, _)| source)
            .collect())
    }

    fn hear_agent(&mut self) -> Result<(), PagerError> {
        let received = match self.agent.receive::<AgentOrder>() {
            Ok(Some(received)) => received,
            Ok(None) if self.custody == Custody::Released => {
                self.agent_open = false;
                return Ok(());
            }
            Ok(None) => return Err(PagerError::AgentLeft),
            Err(_) if self.custody == Custody::Released => {
                self.agent_open = false;
                return Ok(());
            }
            Err(error) => return Err(PagerError::Agent(error)),
        };
        let out_of_turn = |order| Err(PagerError::OutOfTurn { order });
        match received.message {
            AgentOrder::Listen { .. } => out_of_turn("Listen twice"),
            AgentOrder::Task { .. }
            | AgentOrder::Hot { .. }
            | AgentOrder::Owed { .. }
            | AgentOrder::Serve { .. }
                if self.service.is_some() =>
            {
                out_of_turn("a task after Serve")
            }
            AgentOrder::Task { vpid } => {
                let Some(memfd) = received.fd else {
                    return out_of_turn("a task without a memfd");
                };
                self.tell_standby(
                    &StandbyOrder::Task { vpid },
                    &received.runs,
                    Some(memfd.as_fd()),
                )?;
                let inode = nix::sys::stat::fstat(&memfd)
                    .map_err(|errno| PagerError::System {
                        action: "inspecting a memfd",
                        errno,
                    })?
                    .st_ino;
                if self.memfds.contains(&inode) || self.named.contains_key(&vpid) {
                    return Err(PagerError::DuplicateTask { vpid });
                }
                self.memfds.push(inode);
                self.named
                    .insert(vpid, Family::new(vpid, memfd, received.runs));
                Ok(())
            }
            AgentOrder::Hot { vpid } => match self.named.get_mut(&vpid) {
                Some(family) => {
                    family.set_hot(received.runs);
                    Ok(())
                }
                None => out_of_turn("hot pages of an unknown task"),
            },
            AgentOrder::Owed { vpid } => {
                let (Some(family), Some(record)) = (self.named.get_mut(&vpid), received.fd) else {
                    return out_of_turn("owed pages of an unknown task, or without a record");
                };
                let record = Arrivals::from_fd(record);
                self.provision
                    .owe(vpid, family.store(), &record, received.runs.clone())
                    .map_err(PagerError::Provision)?;
                let copy = record.try_clone().map_err(PagerError::Provision)?;
                family.set_owed(record, &received.runs);
                let order = StandbyOrder::Owed { vpid };
                self.tell_standby(&order, &received.runs, Some(copy.as_fd()))
            }
            AgentOrder::Serve { terms } => self.start_service(terms),
            AgentOrder::Supply => match received.fd {
                Some(line) if self.service.is_some() => self.supply(SupplyLine::from_fd(line)),
                _ => out_of_turn("a supply line before Serve, or none"),
            },
            AgentOrder::Release => {
                if self.custody != Custody::Armed {
                    return out_of_turn("Release before Armed");
                }
                self.custody = Custody::Releasing;
                self.tell_standby(&StandbyOrder::Release, &[], None)
            }
        }
    }

    fn start_service(&mut self, terms: Terms) -> Result<(), PagerError> {
        self.provision.set_terms(terms.clone());
        self.tell_standby(&StandbyOrder::Serve { terms }, &[], None)?;
        let families: Vec<Family> = std::mem::take(&mut self.named).into_values().collect();
        self.awaited = families.iter().map(|family| family.vpid).collect();
        let tasks = families.len();
        let service = Service::start(families, 0, self.mirror.as_ref()).map_err(|errno| {
            PagerError::System {
                action: "starting the workers",
                errno,
            }
        })?;
        self.service = Some(service);
        self.say(&PagerEvent::Serving { tasks })?;
        for (vpid, uffd) in std::mem::take(&mut self.early) {
            self.take_uffd(vpid, uffd)?;
        }
        if self.restored {
            self.all_restored()?;
        }
        self.arm_if_complete()
    }

    /// Owed pages are asked for on `line` from now on. The standby first, so that it never has only an older one.
    fn supply(&mut self, line: SupplyLine) -> Result<(), PagerError> {
        self.tell_standby(&StandbyOrder::Supply, &[], Some(line.as_fd()))?;
        if let Some(service) = &self.service {
            service.supply(line, self.provision.supplied());
        }
        Ok(())
    }

    /// Another agent comes in place of the one that is gone.
    fn be_adopted(&mut self) -> Result<(), PagerError> {
        let Some(adoption) = self.provision.hand_over() else {
            return Ok(());
        };
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(PagerError::Provision);
        let (control, line) = (copy(adoption.agent.as_fd())?, copy(adoption.line.as_fd())?);
        self.tell_standby(&StandbyOrder::Agent, &[], Some(control.as_fd()))?;
        self.tell_standby(&StandbyOrder::Supply, &[], Some(line.as_fd()))?;
        let (agent, line) = adoption.complete();
        self.agent = agent;
        self.agent_open = true;
        if let Some(service) = &self.service {
            service.supply(line, self.provision.supplied());
        }
        Ok(())
    }

    fn accept_criu(&mut self) -> Result<(), PagerError> {
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        let connection = match LazyPagesConnection::accept(listener) {
            Err(LazyPagesError::Stranger { uid }) => {
                tracing::warn!(uid, "a stranger connected to the lazy-pages socket");
                return Ok(());
            }
            other => other?,
        };
        self.tell_standby(&StandbyOrder::Connection, &[], Some(connection.as_fd()))?;
        self.connection = Some(connection);
        // CRIU connects once. A name left behind would keep the next restore in this directory from listening.
        self.listener = None;
        let _ = std::fs::remove_file(&self.socket);
        Ok(())
    }

    fn hear_criu(&mut self) -> Result<(), PagerError> {
        while let Some(connection) = &mut self.connection {
            let message = match connection.receive() {
                Ok(None) => return Ok(()),
                Ok(Some(message)) => message,
                // After release a broken connection says no more than a closed one.
                Err(_) if self.custody == Custody::Released => LazyPagesMessage::Closed,
                Err(error) => return Err(error.into()),
            };
            match message {
                LazyPagesMessage::Task { vpid, uffd } if self.service.is_some() => {
                    self.take_uffd(vpid, uffd)?;
                    self.arm_if_complete()?;
                }
                LazyPagesMessage::Task { vpid, uffd } => self.early.push((vpid, uffd)),
                LazyPagesMessage::Zombie { vpid } if self.awaited.contains(&vpid) => {
                    return Err(PagerError::UnknownTask { vpid });
                }
                LazyPagesMessage::Zombie { .. } => {}
                LazyPagesMessage::RestoreFinished => self.all_restored()?,
                LazyPagesMessage::Closed => {
                    self.connection = None;
                    // After release CRIU's end means that it finished, or that it and the tasks are being killed.
                    if !self.restored && self.custody < Custody::Released {
                        return Err(PagerError::RestoreFailed);
                    }
                    self.all_restored()?;
                }
            }
        }
        Ok(())
    }

    fn take_uffd(&mut self, vpid: i32, uffd: OwnedFd) -> Result<(), PagerError> {
        let Some(at) = self.awaited.iter().position(|&awaited| awaited == vpid) else {
            return Err(PagerError::UnknownTask { vpid });
        };
        self.awaited.swap_remove(at);
        let Some(member) = self.service.as_ref().map(Service::new_id) else {
            return Ok(());
        };
        let order = StandbyOrder::Uffd { vpid, member };
        self.tell_standby(&order, &[], Some(uffd.as_fd()))?;
        let uffd = MissingUffd::new(uffd).map_err(|source| PagerError::Uffd { vpid, source })?;
        if let Some(service) = &self.service {
            service.uffd(vpid, member, uffd);
        }
        Ok(())
    }

    fn all_restored(&mut self) -> Result<(), PagerError> {
        self.restored = true;
        let Some(service) = &self.service else {
            return Ok(());
        };
        if !self.awaited.is_empty() {
            return Err(PagerError::TasksMissing(std::mem::take(&mut self.awaited)));
        }
        service.restored();
        self.tell_standby(&StandbyOrder::Restored, &[], None)
    }

    fn arm_if_complete(&mut self) -> Result<(), PagerError> {
        if self.custody == Custody::Gathering && self.awaited.is_empty() {
            self.custody = Custody::Arming;
            self.tell_standby(&StandbyOrder::Sync, &[], None)?;
        }
        Ok(())
    }

    fn hear_standby(&mut self) -> Result<(), PagerError> {
        let Some(mirror) = &self.mirror else {
            return Ok(());
        };
        match mirror.link.receive() {
            Ok(Some(StandbyReply::Synced)) => {
                self.custody = Custody::Armed;
                let tasks = self.service.as_ref().map_or(0, Service::tasks);
                self.say(&PagerEvent::Armed { tasks })
            }
            Ok(Some(StandbyReply::Released)) => {
                self.custody = Custody::Released;
                let alone = self.provision.strand_if_alone();
                alone.map_err(PagerError::Provision)?;
                self.say(&PagerEvent::Released)
            }
            Ok(Some(StandbyReply::Closed { vpid, member })) => {
                if let Some(service) = &self.service {
                    service.closed(vpid, member);
                }
                Ok(())
            }
            Ok(None) | Err(_) => self.lose_standby(),
        }
    }

    fn hear_workers(&mut self) -> Result<(), PagerError> {
        let events = self.service.as_mut().map(Service::events);
        for event in events.unwrap_or_default() {
            match event {
                ServiceEvent::Filled(fill) => {
                    self.provision.filled(fill.vpid);
                    self.say(&PagerEvent::Filled(fill))?;
                }
                ServiceEvent::SupplyEnded(number) => {
                    self.provision.ended(number);
                    if self.custody == Custody::Released {
                        let alone = self.provision.strand_if_alone();
                        alone.map_err(PagerError::Provision)?;
                    }
                }
                ServiceEvent::StandbyLost => self.lose_standby()?,
                ServiceEvent::Failed(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn tell_standby(
        &mut self,
        order: &StandbyOrder,
        runs: &[crate::memory::PageRange],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), PagerError> {
        let Some(mirror) = &self.mirror else {
            return Ok(());
        };
        match mirror.link.send_with(order, runs, fd) {
            Ok(()) => Ok(()),
            Err(_) if self.custody == Custody::Released => self.lose_standby(),
            Err(error) => Err(error.into()),
        }
    }

    fn lose_standby(&mut self) -> Result<(), PagerError> {
        let Some(mirror) = self.mirror.take() else {
            return Ok(());
        };
        // It may be alive behind a broken channel, and must not take over with an old map.
        mirror.link.kill();
        if self.custody < Custody::Released {
            return Err(PagerError::StandbyLeft);
        }
        if let Some(service) = &self.service {
            service.alone();
        }
        self.say(&PagerEvent::StandbyLost)
    }

    /// Tells the agent, who may be gone once it has released.
    fn say(&mut self, event: &PagerEvent) -> Result<(), PagerError> {
        if !self.agent_open {
            return Ok(());
        }
        match self.agent.send(event) {
            Ok(()) => Ok(()),
            Err(_) if self.custody == Custody::Released => {
                self.agent_open = false;
                Ok(())
            }
            Err(error) => Err(PagerError::Agent(error)),
        }
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
