//! Copying the root filesystem on a thread of its own, beside the rounds and beside the dump.

use super::handover::Window;
use super::rootfs::{FileId, RootfsSource, SourceError, Summary};
use crate::migration::event::Event;
use crate::transport::BlockingStream;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Between two looks whether a pass is still wanted.
const LOOK: Duration = Duration::from_millis(2);

/// Why a pass over the root filesystem failed.
#[derive(Debug, Error)]
pub enum RootfsCopyError {
    /// The tree could not be read or sent.
    #[error("copying the root filesystem: {}", crate::chain::one_line(.0))]
    Copy(#[from] SourceError),
    /// The thread could not be started.
    #[error("cannot start copying the root filesystem: {0}")]
    Thread(#[source] io::Error),
    /// The container would have to stand still for it for too long, or the user wants to stop.
    #[error("the target did not take the container's files in time")]
    GivenUp,
    /// The thread has ended before.
    #[error("copying the root filesystem ended before")]
    Ended,
}

/// A copy under way: passes are asked for and waited for.
#[derive(Debug)]
pub struct RootfsCopy {
    orders: Sender<BTreeSet<FileId>>,
    results: Receiver<Result<(Summary, Duration), SourceError>>,
    passes: u32,
    busy: bool,
    _thread: JoinHandle<()>,
}

impl RootfsCopy {
    /// Opens the tree and begins the first pass.
    pub fn start(root: &Path, mut stream: BlockingStream) -> Result<RootfsCopy, RootfsCopyError> {
        let mut source = RootfsSource::new(root)?;
        let (orders, ordered) = channel::<BTreeSet<FileId>>();
        let (finished, results) = channel();
        let thread = thread::Builder::new()
            .name("rootfs".into())
            .spawn(move || {
                let mut is_first = true;
                while let Ok(mapped) = ordered.recv() {
                    let start = Instant::now();
                    let pass = if is_first {
                        source.first_pass(&mut stream, &mapped)
                    } else {
                        source.changed_pass(&mut stream, &mapped)
                    };
                    is_first = false;
                    if finished
                        .send(pass.map(|summary| (summary, start.elapsed())))
                        .is_err()
                    {
                        return;
                    }
                }
                let _ = source.finish(&mut stream);
            })
            .map_err(RootfsCopyError::Thread)?;
        let mut copy = RootfsCopy {
            orders,
            results,
            passes: 0,
            busy: false,
            _thread: thread,
        };
        copy.begin_pass(BTreeSet::new())?;
        Ok(copy)
    }

    /// Begins a pass over what changed; files in `mapped` may have changed without a trace.
    pub fn begin_pass(&mut self, mapped: BTreeSet<FileId>) -> Result<(), RootfsCopyError> {
        self.passes += 1;
        self.busy = true;
        self.orders.send(mapped).map_err(|_| RootfsCopyError::Ended)
    }

    /// Waits for the pass begun last, as long as it may take.
    pub(super) fn finish_pass(
        &mut self,
        window: &Window<'_>,
    ) -> Result<(Summary, Duration), RootfsCopyError> {
        loop {
            match self.results.recv_timeout(LOOK) {
                Ok(pass) => {
                    self.busy = false;
                    return Ok(pass?);
                }
                Err(RecvTimeoutError::Timeout) if window.over().is_none() => {}
                // Its thread ends with the connection that it waits for.
                Err(RecvTimeoutError::Timeout) => return Err(RootfsCopyError::GivenUp),
                Err(RecvTimeoutError::Disconnected) => return Err(RootfsCopyError::Ended),
            }
        }
    }

    /// Whether the pass begun last is done, and how it went.
    pub fn poll_pass(&mut self) -> Option<Result<(Summary, Duration), RootfsCopyError>> {
        let pass = self.results.try_recv().ok()?;
        self.busy = false;
        Some(pass.map_err(RootfsCopyError::Copy))
    }

    /// Whether a pass is under way.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Passes begun so far.
    pub fn passes(&self) -> u32 {
        self.passes
    }

    /// The event that tells of the pass that was waited for last.
    pub fn event(&self, summary: Summary, frozen: bool, duration: Duration) -> Event {
        Event::Rootfs {
            pass: self.passes,
            frozen,
            entries: summary.puts + summary.links,
            deleted: summary.removals,
            bytes_wire: summary.data_bytes,
            duration,
        }
    }
}
