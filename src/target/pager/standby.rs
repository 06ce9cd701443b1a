//! The standby: holds what the pager holds, and serves in its place if it dies.
//!
//! Enters: everything the pager sends over its link. Leaves: nothing while the pager lives. What it does at the
//! pager's death is told in the docs of [`super`].

use super::channel::{Channel, ChannelError, Received};
use super::control::{AgentOrder, PagerEvent};
use super::family::Family;
use super::last_resort;
use super::provision::Provision;
use super::service::{Service, ServiceEvent};
use super::standby_link::{Change, ReadMarks, StandbyError, StandbyOrder, StandbyReply};
use super::supply::SupplyLine;
use super::worker::WorkerError;
use crate::criu::lazy_pages::{LazyPagesConnection, LazyPagesMessage};
use crate::kernel::userfaultfd_missing::{MissingUffd, UffdError};
use crate::target::arrivals::Arrivals;
use nix::errno::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;

/// The record of a container that was killed because its memory was lost, in the pager's state directory.
pub const DEATH_RECORD: &str = "pager-death.json";

/// Why a standby could not do its duty.
#[derive(Debug, thiserror::Error)]
pub enum StandbyFailure {
    /// The link to the pager failed.
    #[error("the pager's link: {0}")]
    Link(#[from] ChannelError),
    /// Something that had to come along did not.
    #[error("the pager sent {order} without its descriptor, or at the wrong time")]
    Incomplete {
        /// The order.
        order: &'static str,
    },
    /// The pager died while it was reading events.
    #[error("the pager died while it read events: changes of the address spaces are lost")]
    EventsLost,
    /// The read marks could not be read.
    #[error(transparent)]
    Marks(#[from] StandbyError),
    /// A userfaultfd is not usable.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// A worker gave up.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The owed pages could not be watched over.
    #[error("watching over the owed pages: {0}")]
    Provision(#[source] io::Error),
    /// A system call failed.
    #[error("{action}: {errno}")]
    System {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        errno: Errno,
    },
    /// The container's memory is lost and it could not be killed for sure either.
    #[error("recording that the container was killed: {0}")]
    LastResort(#[source] io::Error),
}

/// What to kill if all fails; set when the pager takes custody, so that a panic finds it too.
static DOOMED: OnceLock<Doomed> = OnceLock::new();

#[derive(Debug)]
struct Doomed {
    cgroups: Vec<PathBuf>,
    record: PathBuf,
}

/// Stands by until the pager says that it is done, or dies.
pub(super) fn run(link: UnixStream) -> Result<(), StandbyFailure> {
    let link = Channel::new(link).map_err(|error| StandbyFailure::System {
        action: "using the pager's link",
        errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
    })?;
    let mut standby = Standby::default();
    let ended = standby.follow(&link);
    if matches!(ended, Ok(Ended::StoodDown)) || DOOMED.get().is_none() {
        return ended.map(|_| ());
    }
    // In custody: from here on either every page gets to its place or the container dies.
    match ended.and_then(|_| standby.take_over()) {
        Ok(()) => Ok(()),
        Err(error) => {
            let reason = error.to_string();
            if let Some(agent) = &standby.agent {
                let _ = agent.send(&PagerEvent::Failed { reason });
            }
            // The userfaultfds, in `standby` and its workers, stay open until every process is dead.
            kill_doomed(&error.to_string()).map_err(StandbyFailure::LastResort)?;
            Err(error)
        }
    }
}

/// For the panic hook: a standby in custody that panics closes userfaultfds, so the container must die first.
pub(super) fn on_panic(reason: &str) {
    let _ = kill_doomed(reason);
}

fn kill_doomed(reason: &str) -> Result<(), io::Error> {
    match DOOMED.get() {
        Some(doomed) => last_resort::kill_container(&doomed.cgroups, &doomed.record, reason),
        None => Ok(()),
    }
}

/// How the pager's link came to its end.
enum Ended {
    /// The pager told the standby to end.
    StoodDown,
    /// The pager is dead.
    PagerDied,
}

#[derive(Debug, Default)]
struct Standby {
    state_dir: PathBuf,
    pager: Option<OwnedFd>,
    marks: Option<ReadMarks>,
    agent: Option<Channel>,
    families: BTreeMap<i32, Family>,
    cgroups: Vec<PathBuf>,
    provision: Provision,
    line: Option<SupplyLine>,
    connection: Option<OwnedFd>,
    restored: bool,
    next_id: u32,
    service: Option<Service>,
}

impl Standby {
    fn follow(&mut self, link: &Channel) -> Result<Ended, StandbyFailure> {
        while let Some(received) = link.receive::<StandbyOrder>()? {
            let missing = |order| StandbyFailure::Incomplete { order };
            let Received { message, runs, fd } = received;
            match message {
                StandbyOrder::Watch {
                    work_dir,
                    state_dir,
                } => {
                    self.provision =
                        Provision::new(&work_dir, &state_dir).map_err(StandbyFailure::Provision)?;
                    self.state_dir = state_dir;
                    self.pager = Some(fd.ok_or(missing("Watch"))?);
                }
                StandbyOrder::Marks => {
                    self.marks = Some(ReadMarks::from_fd(fd.ok_or(missing("Marks"))?));
                }
                StandbyOrder::Agent => {
                    let socket = UnixStream::from(fd.ok_or(missing("Agent"))?);
                    self.agent = Channel::new(socket).ok();
                }
                StandbyOrder::Task { vpid } => {
                    let memfd = fd.ok_or(missing("Task"))?;
                    self.families.insert(vpid, Family::new(vpid, memfd, runs));
                }
                StandbyOrder::Owed { vpid } => {
                    let record = Arrivals::from_fd(fd.ok_or(missing("Owed"))?);
                    let family = self.families.get_mut(&vpid).ok_or(missing("Owed"))?;
                    self.provision
                        .owe(vpid, family.store(), &record, runs.clone())
                        .map_err(StandbyFailure::Provision)?;
                    family.set_owed(record, &runs);
                }
                StandbyOrder::Serve { terms } => {
                    self.cgroups.clone_from(&terms.cgroups);
                    self.provision.set_terms(terms);
                }
                StandbyOrder::Supply => {
                    self.line = Some(SupplyLine::from_fd(fd.ok_or(missing("Supply"))?));
                }
                StandbyOrder::Connection => self.connection = fd,
                StandbyOrder::Uffd { vpid, member } => {
                    let uffd = MissingUffd::new(fd.ok_or(missing("Uffd"))?)?;
                    self.next_id = self.next_id.max(member.0 + 1);
                    if !self
                        .families
                        .get_mut(&vpid)
                        .is_some_and(|family| family.claim(member, uffd))
                    {
                        return Err(missing("Uffd"));
                    }
                }
                StandbyOrder::Restored => self.restored = true,
                StandbyOrder::Sync => link.send(&StandbyReply::Synced)?,
                StandbyOrder::Release => {
                    let doomed = Doomed {
                        cgroups: self.cgroups.clone(),
                        record: self.state_dir.join(DEATH_RECORD),
                    };
                    if DOOMED.set(doomed).is_err() {
                        return Err(missing("Release"));
                    }
                    link.send(&StandbyReply::Released)?;
                }
                StandbyOrder::Changed {
                    vpid,
                    member,
                    change,
                } => {
                    let child = fd.map(MissingUffd::new).transpose()?;
                    if let Change::Fork { child: id } = change {
                        self.next_id = self.next_id.max(id.0 + 1);
                        if child.is_none() {
                            return Err(missing("Changed"));
                        }
                    }
                    if let Some(family) = self.families.get_mut(&vpid) {
                        // What is freed is for the pager to punch: only it knows what it has placed.
                        family.apply(member, &change, child);
                    }
                }
                StandbyOrder::Close { vpid, member } => {
                    if let Some(family) = self.families.get_mut(&vpid) {
                        family.members.remove(&member);
                    }
                    link.send(&StandbyReply::Closed { vpid, member })?;
                }
                StandbyOrder::StandDown => return Ok(Ended::StoodDown),
            }
        }
        self.await_death()?;
        Ok(Ended::PagerDied)
    }

    /// The link may break before the pager is dead. Two that serve would place pages over each other's events.
    fn await_death(&self) -> Result<(), StandbyFailure> {
        let Some(pager) = &self.pager else {
            return Err(StandbyFailure::Incomplete { order: "Watch" });
        };
        loop {
            match poll(&mut [PollFd::new(pager, PollFlags::IN)], None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    return Err(StandbyFailure::System {
                        action: "waiting for the pager's end",
                        errno: Errno::from_raw(errno.raw_os_error()),
                    });
                }
                Ok(_) => return Ok(()),
            }
        }
    }

    fn take_over(&mut self) -> Result<(), StandbyFailure> {
        let lost = match &self.marks {
            Some(marks) => marks.any_set()?,
            None => true,
        };
        if lost {
            return Err(StandbyFailure::EventsLost);
        }
        let families: Vec<Family> = std::mem::take(&mut self.families).into_values().collect();
        for member in families.iter().flat_map(|family| family.members.values()) {
            // Faults the pager had read and not answered would sleep for ever.
            member.uffd.wake_all();
        }
        let mut service = Service::start(families, self.next_id, None).map_err(|errno| {
            StandbyFailure::System {
                action: "starting the workers",
                errno,
            }
        })?;
        if self.restored {
            service.restored();
        }
        if let Some(line) = self.line.take() {
            service.supply(line, self.provision.supplied());
        }
        self.provision
            .strand_if_alone()
            .map_err(StandbyFailure::Provision)?;
        self.tell_agent(&PagerEvent::TookOver);
        let mut connection = match self.connection.take() {
            Some(fd) if !self.restored => {
                LazyPagesConnection::from_stream(UnixStream::from(fd)).ok()
            }
            _ => None,
        };
        if connection.is_none() && !self.restored {
            service.restored();
        }
        let outcome = self.serve(&mut service, &mut connection);
        // Kept open on failure: its workers hold the userfaultfds.
        self.service = Some(service);
        outcome
    }

    /// Does what is left of the pager's work.
    fn serve(
        &mut self,
        service: &mut Service,
        connection: &mut Option<LazyPagesConnection>,
    ) -> Result<(), StandbyFailure> {
        loop {
            if let Some(summary) = service.done() {
                if summary.is_whole() {
                    self.provision.finish();
                }
                self.tell_agent(&PagerEvent::Done(summary));
                return Ok(());
            }
            let ready = self.wait(service, connection.as_ref())?;
            if let Some(criu) = connection {
                // Every userfaultfd has come before release, so only the end marker or the end can. The pager may have
                // read the marker and died before it said so; then the end stands for it.
                match criu.receive() {
                    Ok(None) => {}
                    Ok(Some(LazyPagesMessage::Zombie { .. })) => {}
                    Ok(Some(_)) | Err(_) => {
                        *connection = None;
                        service.restored();
                    }
                }
            }
            if ready.agent {
                self.hear_agent(service);
            }
            if ready.adopter
                && let Some(adoption) = self.provision.hand_over()
            {
                let (agent, line) = adoption.complete();
                self.agent = Some(agent);
                service.supply(line, self.provision.supplied());
            }
            for event in service.events() {
                match event {
                    ServiceEvent::Filled(fill) => {
                        self.provision.filled(fill.vpid);
                        self.tell_agent(&PagerEvent::Filled(fill));
                    }
                    ServiceEvent::SupplyEnded(number) => {
                        self.provision.ended(number);
                        self.provision
                            .strand_if_alone()
                            .map_err(StandbyFailure::Provision)?;
                    }
                    // The standby has no standby.
                    ServiceEvent::StandbyLost => {}
                    ServiceEvent::Failed(error) => return Err(error.into()),
                }
            }
            let frozen = self.provision.freeze_if_due();
            if frozen.map_err(StandbyFailure::Provision)? {
                self.tell_agent(&PagerEvent::Stalled);
            }
        }
    }

    /// A new supply line is all the agent may still have for us.
    fn hear_agent(&mut self, service: &Service) {
        let Some(agent) = &self.agent else {
            return;
        };
        match agent.receive::<AgentOrder>() {
            Ok(Some(Received {
                message: AgentOrder::Supply,
                fd: Some(line),
                ..
            })) => service.supply(SupplyLine::from_fd(line), self.provision.supplied()),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => self.agent = None,
        }
    }

    fn wait(
        &self,
        service: &Service,
        connection: Option<&LazyPagesConnection>,
    ) -> Result<Ready, StandbyFailure> {
        let agent = self.agent.as_ref().map(AsFd::as_fd);
        let sources = [
            Some(service.as_fd()),
            agent,
            self.provision.listener(),
            connection.map(AsFd::as_fd),
        ];
        let fds = sources.iter().flatten();
        let mut fds: Vec<PollFd<'_>> = fds
            .map(|&fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let patience = self.provision.patience().map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()) as _,
        });
        loop {
            match poll(&mut fds, patience.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    return Err(StandbyFailure::System {
                        action: "waiting for events",
                        errno: Errno::from_raw(errno.raw_os_error()),
                    });
                }
                Ok(_) => break,
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let [_, agent, adopter, _] =
            sources.map(|source| source.is_some() && ready.next() == Some(true));
        Ok(Ready { agent, adopter })
    }

    fn tell_agent(&self, event: &PagerEvent) {
        if let Some(agent) = &self.agent {
            // The agent may be gone; the pages get to their places all the same.
            let _ = agent.send(event);
        }
    }
}

/// Who is to be heard, besides CRIU and the workers.
struct Ready {
    agent: bool,
    adopter: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::pager::control::Terms;
    use std::path::Path;
    use std::process::{Command, Stdio};

    /// A cgroup of its own, wherever this host keeps them.
    struct Cgroup(PathBuf);

    impl Cgroup {
        fn new() -> Self {
            let name = format!("migrate-standby-test-{}", std::process::id());
            let made = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup"]
                .map(|root| Path::new(root).join(&name))
                .into_iter()
                .find(|path| std::fs::create_dir(path).is_ok());
            Cgroup(made.expect("root may make a cgroup"))
        }
    }

    impl Drop for Cgroup {
        fn drop(&mut self) {
            // A failed test must not leave frozen processes behind.
            let below = self.0.join("below");
            let _ = std::fs::write(below.join("freezer.state"), "THAWED");
            let _ = std::fs::remove_dir(below);
            let _ = std::fs::remove_dir(&self.0);
        }
    }

    #[test]
    fn a_standby_that_cannot_know_what_was_read_kills_the_container() {
        let cgroup = Cgroup::new();
        let below = cgroup.0.join("below");
        std::fs::create_dir(&below).expect("a cgroup below");
        let state = tempfile::tempdir().expect("a state directory");
        let mut container: Vec<_> = (0..3)
            .map(|_| Command::new("sleep").arg("600").spawn().expect("a process"))
            .collect();
        for (process, cgroup) in container.iter().zip([&cgroup.0, &below, &below]) {
            std::fs::write(cgroup.join("cgroup.procs"), process.id().to_string())
                .expect("the process moves into the cgroup");
        }
        // A v1 freezer keeps even SIGKILL waiting; on v2 the file is not there.
        if below.join("freezer.state").exists() {
            std::fs::write(below.join("freezer.state"), "FROZEN").expect("frozen");
        }

        // Stands for the pager: dead when its pidfd becomes readable, a mark left behind.
        let mut pager = Command::new("sleep")
            .arg("600")
            .stdout(Stdio::null())
            .spawn()
            .expect("a process");
        let pid = rustix::process::Pid::from_child(&pager);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .expect("a pidfd");
        let marks = ReadMarks::create().expect("marks");
        marks.set(1).expect("set");
        let (link, theirs) = UnixStream::pair().expect("a socket pair");
        let link = Channel::new(link).expect("a channel");
        let (agent, agents) = UnixStream::pair().expect("a socket pair");
        let agent = Channel::new(agent).expect("a channel");
        let standby = std::thread::spawn(move || run(theirs));
        let watch = StandbyOrder::Watch {
            work_dir: state.path().join("work"),
            state_dir: state.path().to_owned(),
        };
        link.send_fd(&watch, pidfd.as_fd()).expect("sent");
        link.send_fd(&StandbyOrder::Marks, marks.fd().as_fd())
            .expect("sent");
        link.send_fd(&StandbyOrder::Agent, agents.as_fd())
            .expect("sent");
        drop(agents);
        let cgroups = vec![cgroup.0.clone()];
        let terms = Terms {
            cgroups,
            ..Terms::default()
        };
        link.send(&StandbyOrder::Serve { terms }).expect("sent");
        link.send(&StandbyOrder::Release).expect("sent");
        assert!(matches!(
            link.receive::<StandbyReply>()
                .expect("a reply")
                .expect("open")
                .message,
            StandbyReply::Released
        ));
        drop(link);
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(
            container[0].try_wait().expect("waited").is_none(),
            "a broken link alone is no reason: the pager may be alive"
        );
        pager.kill().expect("killed");
        pager.wait().expect("dead");

        let outcome = standby.join().expect("no panic");
        assert!(
            matches!(outcome, Err(StandbyFailure::EventsLost)),
            "{outcome:?}"
        );
        let told = agent
            .receive::<PagerEvent>()
            .expect("a report")
            .expect("open");
        assert!(matches!(told.message, PagerEvent::Failed { .. }));
        let record = std::fs::read_to_string(state.path().join(DEATH_RECORD)).expect("a record");
        assert_eq!(record.lines().count(), 1);
        let record: serde_json::Value = serde_json::from_str(&record).expect("JSON");
        assert_eq!(record["all_gone"], true);
        for process in &mut container {
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(process.wait().expect("dead").signal(), Some(libc::SIGKILL));
        }
        for process in &container {
            let killed = record["killed"].as_array().expect("a list");
            assert!(killed.iter().any(|pid| *pid == process.id()));
        }
    }
}
