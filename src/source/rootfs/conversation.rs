//! Talking to the target: frames gathered into large writes, answers read when they are due.

use crate::wire::rootfs::{Counts, FrameError, Refusal, ToSource, ToTarget};
use rustix::io::Errno;
use std::io::{Read, Write};
use std::path::PathBuf;
use thiserror::Error;

/// Frames are written once this many bytes are gathered.
const WRITE_AT: usize = 256 << 10;

/// Why a pass failed. The target's tree is then in some state between the last pass and this one, and only
/// a first pass (on a new stream) can follow.
#[derive(Debug, Error)]
pub enum SourceError {
    /// A changed pass without a first pass before it, or after a pass that failed: what the target holds is
    /// not known then.
    #[error("the rootfs needs a first pass")]
    FirstPassNeeded,
    /// A call on the container's tree failed for a reason other than the entry having gone.
    #[error("{action} {path:?} in the container's rootfs")]
    Tree {
        /// What was being done.
        action: &'static str,
        /// To which path, relative to the root (lossily), or the root itself.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// The tree holds something that cannot be carried: a path of 4096 bytes or more.
    #[error("an entry of the container's rootfs cannot be carried")]
    Entry(#[source] FrameError),
    /// All extended attributes of one entry together are too large.
    #[error("{0:?} has more than 4 MiB of extended attributes")]
    XattrsTooLarge(PathBuf),
    /// The container's tasks could not be looked at.
    #[error("looking at the files that the container's processes have open")]
    Tasks(#[source] std::io::Error),
    /// Leases could not be looked up.
    #[error("looking at the leases on files")]
    Leases(#[source] std::io::Error),
    /// To open the file would break a lease, and the descriptor that it was taken with is for writing only.
    #[error("{0:?} is under a lease by a descriptor that cannot read: give the lease up first")]
    Leased(PathBuf),
    /// Writing to the target failed.
    #[error("sending the rootfs")]
    Send(#[source] std::io::Error),
    /// What the target answered could not be read or was malformed.
    #[error("hearing from the target of the rootfs")]
    Hear(#[source] FrameError),
    /// The target answered something else than what was due.
    #[error("the target did not answer with {0}")]
    OutOfTurn(&'static str),
    /// The target gave up and said why.
    #[error("the target gave up on the rootfs: {0}")]
    Refused(Refusal),
    /// The two ends disagree about what was sent.
    #[error("sent {sent:?} but the target received {received:?}")]
    CountsDiffer {
        /// As counted here.
        sent: Counts,
        /// As counted there.
        received: Counts,
    },
}

impl From<FrameError> for SourceError {
    /// Frames are decoded in `Conversation::hear` alone; every other use of the wire types at the source
    /// is to parse paths of its own tree.
    fn from(error: FrameError) -> Self {
        SourceError::Entry(error)
    }
}

/// The source's side of the stream.
pub(super) struct Conversation<'s, S> {
    stream: &'s mut S,
    out: Vec<u8>,
    heard: Vec<u8>,
}

impl<'s, S: Read + Write> Conversation<'s, S> {
    pub(super) fn new(stream: &'s mut S) -> Self {
        Conversation {
            stream,
            out: Vec::new(),
            heard: Vec::new(),
        }
    }

    pub(super) fn say(&mut self, message: &ToTarget<'_>) -> Result<(), SourceError> {
        message.encode(&mut self.out);
        if self.out.len() >= WRITE_AT {
            self.flush()
        } else {
            Ok(())
        }
    }

    pub(super) fn flush(&mut self) -> Result<(), SourceError> {
        let written = self
            .stream
            .write_all(&self.out)
            .and_then(|()| self.stream.flush());
        self.out.clear();
        written.map_err(|error| self.why_closed(error))
    }

    pub(super) fn hear(&mut self) -> Result<ToSource, SourceError> {
        self.flush()?;
        match ToSource::read(self.stream, &mut self.heard) {
            Ok(ToSource::Failed(refusal)) => Err(SourceError::Refused(refusal)),
            Ok(message) => Ok(message),
            Err(error) => Err(SourceError::Hear(error)),
        }
    }

    /// A target that gives up says why and closes; what it said is still there to be read, and explains
    /// more than the broken pipe does.
    fn why_closed(&mut self, error: std::io::Error) -> SourceError {
        match ToSource::read(self.stream, &mut self.heard) {
            Ok(ToSource::Failed(refusal)) => SourceError::Refused(refusal),
            _ => SourceError::Send(error),
        }
    }
}
