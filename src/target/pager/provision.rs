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
//!
//! An adopter connects to the socket; its user must be ours. It is sent, on what is its control socket from then on:
//!
//! ```text
//!  ◀── Task{vpid} + memfd + owed runs      ◀── Arrivals{vpid} + record      once per task that is owed pages
//!  ◀── Complete + its end of a supply line
//! ```

use super::channel::{Channel, ChannelError};
use super::control::{OwedMemory, PagerHandle, PagerHandleError, Terms};
use super::supply::SupplyLine;
use crate::memory::PageRange;
use crate::runtime::Freezer;
use crate::target::arrivals::Arrivals;
use rustix::net::sockopt;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The socket for an agent that adopts a pager, in the parent of CRIU's work directory.
pub const SUPPLY_SOCKET: &str = "supply.sock";

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
    /// Pages not on record.
    missing_pages: u64,
    cgroups: &'a [PathBuf],
    /// Whether every task of them stands still.
    frozen: bool,
    /// Where the pager can be adopted.
    adopt_at: PathBuf,
}

/// Pager → adopter.
#[derive(Debug, Serialize, Deserialize)]
enum Handover {
    /// With the memfd and the owed runs.
    Task { vpid: i32 },
    /// With the record of arrivals of the task just named.
    Arrivals { vpid: i32 },
    /// With the agent's end of a supply line.
    Complete,
}

/// A pager taken over from an agent that died.
#[derive(Debug)]
pub struct Adopted {
    /// For the events from now on, and further supply lines.
    pub pager: PagerHandle,
    /// Every task that was owed pages at the beginning.
    pub tasks: Vec<AdoptedTask>,
    /// Where the pager asks from now on. It has asked again for all that somebody waits for.
    pub line: SupplyLine,
}

/// A task of an adopted pager.
#[derive(Debug)]
pub struct AdoptedTask {
    /// Its pid inside the container.
    pub vpid: i32,
    /// The memfd of its space.
    pub memfd: OwnedFd,
    /// What was owed at the beginning, and the record of what has come since.
    pub owed: OwedMemory,
}

/// Takes over a pager whose agent is gone, at its [`SUPPLY_SOCKET`]. A container that was frozen meanwhile goes on.
pub fn adopt(path: &Path, timeout: Duration) -> Result<Adopted, PagerHandleError> {
    let failed = |source| PagerHandleError::Adopt {
        path: path.to_owned(),
        source,
    };
    let stream = connect(path).map_err(failed)?;
    stream.set_read_timeout(Some(timeout)).map_err(failed)?;
    let channel = Channel::new(stream.try_clone().map_err(failed)?).map_err(failed)?;
    let mut tasks: Vec<AdoptedTask> = Vec::new();
    let mut named: Option<(i32, OwnedFd, Vec<PageRange>)> = None;
    let line = loop {
        let received = channel
            .receive::<Handover>()
            .map_err(|error| failed(io::Error::other(error)))?
            .ok_or_else(|| failed(io::ErrorKind::UnexpectedEof.into()))?;
        let wrong = |what| failed(io::Error::new(io::ErrorKind::InvalidData, what));
        let fd = received.fd.ok_or_else(|| wrong("no descriptor"))?;
        match (received.message, named.take()) {
            (Handover::Task { vpid }, None) => named = Some((vpid, fd, received.runs)),
            (Handover::Arrivals { vpid }, Some((task, memfd, pages))) if vpid == task => {
                let arrivals = Arrivals::from_fd(fd);
                let owed = OwedMemory { pages, arrivals };
                tasks.push(AdoptedTask { vpid, memfd, owed });
            }
            (Handover::Complete, None) => break SupplyLine::from_fd(fd),
            _ => return Err(wrong("a message out of turn")),
        }
    };
    stream.set_read_timeout(None).map_err(failed)?;
    Ok(Adopted {
        pager: PagerHandle::adopted(channel),
        tasks,
        line,
    })
}

/// What the main thread of a pager, or of a standby in its place, knows about the owed pages.
#[derive(Debug, Default)]
pub(super) struct Provision {
    directory: PathBuf,
    terms: Terms,
    tasks: Vec<OwingTask>,
    /// Of the last supply line.
    number: u64,
    supplied: bool,
    stranded: Option<Stranded>,
}

#[derive(Debug)]
struct OwingTask {
    vpid: i32,
    memfd: OwnedFd,
    arrivals: Arrivals,
    owed: Vec<PageRange>,
}

#[derive(Debug)]
struct Stranded {
    /// `None` if the socket could not be made.
    listener: Option<UnixListener>,
    /// `None`: the container is frozen already.
    freeze_at: Option<Instant>,
}

impl Provision {
    pub fn new(work_dir: &Path, state_dir: &Path) -> Self {
        Provision {
            directory: work_dir.parent().unwrap_or(state_dir).to_owned(),
            ..Provision::default()
        }
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
        let stalled = self.record().exists();
        self.stranded = Some(Stranded {
            listener: listener.ok(),
            freeze_at: (!stalled).then(|| Instant::now() + self.terms.patience),
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
        let now = Instant::now();
        let missing_pages = self.missing()?;
        let Some(stranded) = &mut self.stranded else {
            return Ok(false);
        };
        if stranded.freeze_at.is_none_or(|at| now < at) || missing_pages == 0 {
            return Ok(false);
        }
        stranded.freeze_at = None;
        // The record first: it is what a successor knows the freezing by.
        self.write_record(missing_pages, false)?;
        let frozen = freeze(&self.terms.cgroups);
        self.write_record(missing_pages, frozen)?;
        Ok(true)
    }

    /// Hands everything to whoever has connected. `None`: they were a stranger, or left.
    pub fn hand_over(&mut self) -> Option<(Channel, SupplyLine)> {
        let listener = self.stranded.as_ref()?.listener.as_ref()?;
        let attempt = || -> Result<(Channel, SupplyLine), ChannelError> {
            let (stream, _) = listener.accept().map_err(ChannelError::Receive)?;
            let peer = sockopt::socket_peercred(&stream)
                .map_err(|errno| ChannelError::Receive(errno.into()))?;
            if peer.uid != rustix::process::geteuid() {
                return Err(ChannelError::Receive(
                    io::ErrorKind::PermissionDenied.into(),
                ));
            }
            let channel = Channel::new(stream).map_err(ChannelError::Send)?;
            channel
                .set_send_timeout(SEND_TIMEOUT)
                .map_err(ChannelError::Send)?;
            for task in &self.tasks {
                let vpid = task.vpid;
                let memfd = Some(task.memfd.as_fd());
                channel.send_with(&Handover::Task { vpid }, &task.owed, memfd)?;
                channel.send_fd(&Handover::Arrivals { vpid }, task.arrivals.as_fd())?;
            }
            let (ours, theirs) = SupplyLine::pair().map_err(ChannelError::Send)?;
            channel.send_fd(&Handover::Complete, theirs.as_fd())?;
            Ok((channel, ours))
        };
        attempt()
            .inspect_err(|error| tracing::warn!("an adoption failed: {error}"))
            .ok()
    }

    /// Removes what lies about. Every page has come.
    pub fn finish(&mut self) {
        if !self.tasks.is_empty() {
            self.clear();
        }
    }

    /// Owed pages that are not on record.
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
        self.stranded = None;
        let _ = fs::remove_file(self.directory.join(SUPPLY_SOCKET));
        if self.record().exists() {
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

fn connect(path: &Path) -> io::Result<UnixStream> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = File::open(directory)?;
    UnixStream::connect(beside(&directory, name))
}

fn beside(directory: &File, name: impl AsRef<Path>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name)
}
