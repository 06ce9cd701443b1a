//! Who brings the owed pages, and what happens when nobody does.
//!
//! Enters: the tasks that are owed pages, supply lines and their ends. Leaves: a socket through which another agent takes
//! over, and, when none does in time, a frozen container and a record of it.
//!
//! ```text
//!  supplied ──line ends, pages missing──▶ stranded ──patience over──▶ stalled
//!     ▲                                     supply.sock is open         also: cgroups frozen, pager-stalled.json
//!     └──────────── a new line by the agent, or an adoption ◀───────────┘   (thaws, removes both)
//! ```
//!
//! Both files lie in the parent of CRIU's work directory: it belongs to one migration, so that two pagers do not meet, and it
//! outlives the agent. Whoever clears it away must leave it alone while the pager lives.

use super::adoption::Handover;
use super::channel::{Channel, ChannelError};
use super::control::Terms;
use super::supply::SupplyLine;
use crate::memory::PageRange;
use crate::runtime::Freezer;
use crate::target::arrivals::Arrivals;
use rustix::fs::FlockOperation;
use rustix::net::sockopt;
use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The socket for an agent that adopts a pager, in the parent of CRIU's work directory.
pub const SUPPLY_SOCKET: &str = "supply.sock";

/// A file beside [`SUPPLY_SOCKET`] that pager and standby have locked as long as they live, and that a pager renames when every
/// page is in its place: that needs no room on the disk, and there is no moment in which it is neither.
const LOCK: &str = "pager.lock";

/// The mark of a pager that has brought every page to its place: what [`LOCK`] is called then.
const DONE_MARK: &str = "pager-done";

/// What can be seen of a pager by those that do not have its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It or its standby lives, and pages are missing.
    Filling,
    /// Every page is in its place, or nobody wants it any more.
    Done,
    /// Both died with pages missing.
    Dead,
}

impl Life {
    /// Of the pager of a copy that was released on this host since it was started; `directory` is where its files are.
    pub fn of(directory: &Path) -> Life {
        let done = || directory.join(DONE_MARK).exists();
        let held = match File::open(directory.join(LOCK)) {
            Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err(),
            Err(_) => false,
        };
        // The mark is looked for last: it may have been made a moment ago, and its maker has ended since.
        match held {
            _ if done() => Life::Done,
            true => Life::Filling,
            false => Life::Dead,
        }
    }
}

/// The record of a container that was frozen because nobody brought its pages, beside [`SUPPLY_SOCKET`].
pub const STALL_RECORD: &str = "pager-stalled.json";

/// An adopter that reads nothing for so long is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the tasks of a cgroup may take to stop. One that does not is left to stop when it can.
const FREEZE_WITHIN: Duration = Duration::from_secs(5);

/// What the container's operator finds.
#[derive(Debug, Serialize)]
struct StallRecord<'a> {
    unix_ms: u128,
    reason: &'static str,
    /// Pages not on record, of tasks that still want some.
    missing_pages: u64,
    cgroups: &'a [PathBuf],
    /// Whether every task of them stands still.
    frozen: bool,
    /// Where the pager can be adopted.
    adopt_at: PathBuf,
}

/// What the main thread of a pager, or of a standby in its place, knows about the owed pages.
#[derive(Debug, Default)]
pub(super) struct Provision {
    directory: PathBuf,
    terms: Terms,
    /// Locked as long as this process lives: see [`Life`].
    _lock: Option<File>,
    /// Those that still want pages.
    tasks: Vec<OwingTask>,
    /// Of the last supply line.
    number: u64,
    supplied: bool,
    stranded: Option<Stranded>,
    /// The container is frozen for want of pages.
    stalled: bool,
}

#[derive(Debug)]
struct OwingTask {
    vpid: i32,
    memfd: OwnedFd,
    arrivals: Arrivals,
    owed: Vec<PageRange>,
}

/// An adoption that lacks only the last word.
#[derive(Debug)]
pub(super) struct Adoption {
    /// The control socket from now on.
    pub agent: Channel,
    /// The pager's end of the supply line.
    pub line: SupplyLine,
    theirs: SupplyLine,
}

#[derive(Debug)]
struct Stranded {
    /// `None` if the socket could not be made.
    listener: Option<UnixListener>,
    /// `None`: that is done.
    freeze_at: Option<Instant>,
}

impl Provision {
    /// What is known before anything is: where the files are, and that this process lives.
    pub fn new(work_dir: &Path, state_dir: &Path) -> io::Result<Self> {
        let directory = work_dir.parent().unwrap_or(state_dir).to_owned();
        let lock = OpenOptions::new()
            .create(true)
            .append(true)
            .open(directory.join(LOCK))?;
        rustix::fs::flock(&lock, FlockOperation::LockShared)?;
        Ok(Provision {
            directory,
            _lock: Some(lock),
            ..Provision::default()
        })
    }

    pub fn set_terms(&mut self, terms: Terms) {
        self.terms = terms;
    }

    /// A task is owed these pages.
    pub fn owe(
        &mut self,
        vpid: i32,
        memfd: BorrowedFd<'_>,
        arrivals: &Arrivals,
        owed: Vec<PageRange>,
    ) -> io::Result<()> {
        self.tasks.push(OwingTask {
            vpid,
            memfd: memfd.try_clone_to_owned()?,
            arrivals: arrivals.try_clone()?,
            owed,
        });
        Ok(())
    }

    /// The number of a new supply line. Whatever was done because there was none is undone.
    pub fn supplied(&mut self) -> u64 {
        self.number += 1;
        self.supplied = true;
        self.clear();
        self.number
    }

    /// Supply line `number` has ended.
    pub fn ended(&mut self, number: u64) {
        self.supplied &= number != self.number;
    }

    /// Opens the socket for an adopter if pages are missing and nobody brings them. In custody only: before that the end of
    /// the agent is the end of all.
    pub fn strand_if_alone(&mut self) -> io::Result<()> {
        if self.supplied || self.stranded.is_some() || self.missing()? == 0 {
            return Ok(());
        }
        let listener = bind(&self.directory, SUPPLY_SOCKET).inspect_err(|error| {
            let directory = self.directory.display();
            tracing::error!("no adoption of this pager: {SUPPLY_SOCKET} in {directory}: {error}");
        });
        // A pager that had frozen the container before its standby took over left the record.
        self.stalled |= self.record().exists();
        self.stranded = Some(Stranded {
            listener: listener.ok(),
            freeze_at: (!self.stalled).then(|| Instant::now() + self.terms.patience),
        });
        Ok(())
    }

    /// The adoption socket, while it is open.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        let listener = self.stranded.as_ref()?.listener.as_ref()?;
        Some(listener.as_fd())
    }

    /// How long until [`Provision::freeze_if_due`] has something to do.
    pub fn patience(&self) -> Option<Duration> {
        let at = self.stranded.as_ref()?.freeze_at?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    /// Freezes the container if nobody came in time. `true`: this was done now.
    pub fn freeze_if_due(&mut self) -> io::Result<bool> {
        if self.patience() != Some(Duration::ZERO) {
            return Ok(false);
        }
        if let Some(stranded) = &mut self.stranded {
            stranded.freeze_at = None;
        }
        let missing_pages = self.missing()?;
        if missing_pages == 0 {
            return Ok(false);
        }
        self.stalled = true;
        // The record first: it is what a successor knows the freezing by.
        self.write_record(missing_pages, false)?;
        let frozen = freeze(&self.terms.cgroups);
        self.write_record(missing_pages, frozen)?;
        Ok(true)
    }

    /// A task has all it wants: what is still owed to it is nobody's concern.
    pub fn filled(&mut self, vpid: i32) {
        self.tasks.retain(|task| task.vpid != vpid);
    }

    /// Hands everything but the supply line to whoever has connected. `None`: they were a stranger, or left.
    ///
    /// The line is for [`Adoption::complete`], when the standby knows it too: an adopter that has been told that all is complete
    /// may take the end of its control socket for the end of everything.
    pub fn hand_over(&mut self) -> Option<Adoption> {
        let listener = self.stranded.as_ref()?.listener.as_ref()?;
        Adoption::begin(listener, &self.tasks)
            .inspect_err(|error| tracing::warn!("an adoption failed: {error}"))
            .ok()
    }

    /// Removes what lies about: nobody waits any more. An agent that comes back finds no pager, and must not take that for
    /// one that died.
    pub fn finish(&mut self) {
        let [lock, mark] = [LOCK, DONE_MARK].map(|name| self.directory.join(name));
        if let Err(error) = fs::rename(lock, mark) {
            eprintln!("migrate pager: the mark of a pager that is done: {error}");
        }
        self.clear();
    }

    /// Owed pages that are not on record, of tasks that still want some.
    fn missing(&self) -> io::Result<u64> {
        let mut missing = 0;
        for task in &self.tasks {
            for &run in &task.owed {
                let come = task.arrivals.among(run)?;
                missing += run.pages() - come.iter().map(|run| run.pages()).sum::<u64>();
            }
        }
        Ok(missing)
    }

    fn clear(&mut self) {
        let _ = fs::remove_file(self.directory.join(SUPPLY_SOCKET));
        self.stranded = None;
        if self.stalled || self.record().exists() {
            self.stalled = false;
            for freezer in freezers(&self.terms.cgroups) {
                if let Err(error) = freezer.thaw() {
                    tracing::error!("{error}");
                }
            }
            let _ = fs::remove_file(self.record());
        }
    }

    fn record(&self) -> PathBuf {
        self.directory.join(STALL_RECORD)
    }

    fn write_record(&self, missing_pages: u64, frozen: bool) -> io::Result<()> {
        let line = serde_json::to_string(&StallRecord {
            unix_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_millis()),
            reason: "nobody brings the pages that are still at the source",
            missing_pages,
            cgroups: &self.terms.cgroups,
            frozen,
            adopt_at: self.directory.join(SUPPLY_SOCKET),
        })?;
        let mut file = File::create(self.record())?;
        writeln!(file, "{line}")?;
        file.sync_all()
    }
}

impl Adoption {
    fn begin(listener: &UnixListener, tasks: &[OwingTask]) -> Result<Self, ChannelError> {
        let (stream, _) = listener.accept().map_err(ChannelError::Receive)?;
        let peer = sockopt::socket_peercred(&stream)
            .map_err(|errno| ChannelError::Receive(errno.into()))?;
        if peer.uid != rustix::process::geteuid() {
            return Err(ChannelError::Receive(
                io::ErrorKind::PermissionDenied.into(),
            ));
        }
        let agent = Channel::new(stream).map_err(ChannelError::Send)?;
        agent
            .set_send_timeout(SEND_TIMEOUT)
            .map_err(ChannelError::Send)?;
        for task in tasks {
            let vpid = task.vpid;
            let memfd = Some(task.memfd.as_fd());
            agent.send_with(&Handover::Task { vpid }, &task.owed, memfd)?;
            agent.send_fd(&Handover::Arrivals { vpid }, task.arrivals.as_fd())?;
        }
        let (line, theirs) = SupplyLine::pair().map_err(ChannelError::Send)?;
        Ok(Adoption {
            agent,
            line,
            theirs,
        })
    }

    /// Says the last word. If it does not arrive the supply line ends, and another may adopt.
    pub fn complete(self) -> (Channel, SupplyLine) {
        let _ = self.agent.send_fd(&Handover::Complete, self.theirs.as_fd());
        (self.agent, self.line)
    }
}

/// Whether every task of `cgroups` stopped. One that did not (D state) stops as soon as it can.
fn freeze(cgroups: &[PathBuf]) -> bool {
    let freezers = freezers(cgroups);
    let mut asked = !freezers.is_empty();
    for freezer in &freezers {
        if let Err(error) = freezer.request_freeze() {
            tracing::error!("{error}");
            asked = false;
        }
    }
    let deadline = Instant::now() + FREEZE_WITHIN;
    let still = |freezer: &Freezer| freezer.is_frozen().unwrap_or(false);
    while asked && !freezers.iter().all(still) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    asked
}

/// The freezers among cgroup directories of any hierarchy.
fn freezers(cgroups: &[PathBuf]) -> Vec<Freezer> {
    let freezer = |path: &PathBuf| {
        if path.join("freezer.state").exists() {
            Some(Freezer::V1(path.clone()))
        } else if path.join("cgroup.freeze").exists() {
            Some(Freezer::V2(path.clone()))
        } else {
            None
        }
    };
    cgroups.iter().filter_map(freezer).collect()
}

/// Binds through the directory's descriptor: a socket address takes 107 bytes, and a directory's name may be longer.
pub(super) fn bind(directory: &Path, name: &str) -> io::Result<UnixListener> {
    let directory = File::open(directory)?;
    let path = beside(&directory, name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(&path)
}

/// The path of a file in an open directory.
pub(super) fn beside(directory: &File, name: impl AsRef<Path>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pager_works_is_done_or_died_by_what_it_leaves() {
        let state = tempfile::tempdir().expect("a directory");
        let work = state.path().join("work");
        assert_eq!(Life::of(state.path()), Life::Dead, "there was never one");
        let mut pager = Provision::new(&work, state.path()).expect("a lock");
        let standby = Provision::new(&work, state.path()).expect("the same");
        assert_eq!(Life::of(state.path()), Life::Filling);
        pager.finish();
        assert_eq!(Life::of(state.path()), Life::Done);
        drop((pager, standby));
        assert_eq!(Life::of(state.path()), Life::Done);
    }

    #[test]
    fn a_pager_that_died_has_a_standby_or_is_dead() {
        let state = tempfile::tempdir().expect("a directory");
        let work = state.path().join("work");
        let pager = Provision::new(&work, state.path()).expect("a lock");
        let standby = Provision::new(&work, state.path()).expect("the same");
        drop(pager);
        assert_eq!(Life::of(state.path()), Life::Filling);
        drop(standby);
        assert_eq!(Life::of(state.path()), Life::Dead);
    }
}
