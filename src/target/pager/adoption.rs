//! How an agent takes over a pager whose agent died.
//!
//! An adopter connects to the socket; its user must be ours. It is sent, on what is its control socket from then on:
//!
//! ```text
//!  ◀── Task{vpid} + memfd + owed runs      ◀── Arrivals{vpid} + record      once per task that still wants pages
//!  ◀── Complete + its end of a supply line
//! ```

use super::channel::{Channel, ChannelError};
use super::control::{OwedMemory, PagerHandle, PagerHandleError};
use super::provision::beside;
use super::supply::SupplyLine;
use crate::memory::PageRange;
use crate::target::arrivals::Arrivals;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Between two attempts to adopt.
const ADOPT_RETRY: Duration = Duration::from_millis(10);

/// Pager → adopter.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Handover {
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
    /// The tasks that still want pages which were owed to them at the beginning.
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

/// Takes over a pager whose agent is gone, at its [`SUPPLY_SOCKET`](super::SUPPLY_SOCKET). A container that was frozen meanwhile goes on.
///
/// An attempt that fails half-way is repeated until `timeout`: the pager may have died just now, and its standby opens
/// the socket anew.
pub fn adopt(path: &Path, timeout: Duration) -> Result<Adopted, PagerHandleError> {
    let deadline = Instant::now() + timeout;
    loop {
        match try_adopt(path, deadline) {
            Err(error) if between_two(&error) && Instant::now() < deadline => {
                std::thread::sleep(ADOPT_RETRY);
            }
            other => {
                return other.map_err(|source| PagerHandleError::Adopt {
                    path: path.to_owned(),
                    source,
                });
            }
        }
    }
}

/// The socket was about to be closed or was left behind by a pager that died, or it died within the adoption; then its standby
/// says so in the middle of it.
fn between_two(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, InvalidData, UnexpectedEof};
    matches!(
        error.kind(),
        ConnectionRefused | ConnectionReset | InvalidData | UnexpectedEof
    )
}

fn try_adopt(path: &Path, deadline: Instant) -> io::Result<Adopted> {
    let stream = connect(path)?;
    let left = deadline.saturating_duration_since(Instant::now());
    stream.set_read_timeout(Some(left.max(ADOPT_RETRY)))?;
    let channel = Channel::new(stream.try_clone()?)?;
    let wrong = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut tasks: Vec<AdoptedTask> = Vec::new();
    let mut named: Option<(i32, OwnedFd, Vec<PageRange>)> = None;
    let line = loop {
        let received = match channel.receive::<Handover>() {
            Ok(received) => received.ok_or(io::ErrorKind::UnexpectedEof)?,
            Err(ChannelError::Receive(error)) => return Err(error),
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
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
    stream.set_read_timeout(None)?;
    Ok(Adopted {
        pager: PagerHandle::adopted(channel),
        tasks,
        line,
    })
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = File::open(directory)?;
    UnixStream::connect(beside(&directory, name))
}
