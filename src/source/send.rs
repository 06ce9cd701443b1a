//! Sending pages: what a round, the delta and the residue have in common.
//!
//! ```text
//!              ┌ worker 0: read ─ drop zero, same ─ encode ─▶ page stream 0
//!  dirty pages ┤
//!              └ worker 1: read ─ drop zero, same ─ encode ─▶ page stream 1
//! ```
//!
//! Pages that forked processes share are read from each, so that they stay shared and are known to be the same, and sent
//! once: whose page lies in the same frame as a page of the same number that was just sent, and holds the same, is only
//! referred to it. Both are on one stream, so the target has the first when it reads of the second. To remember few
//! frames, all spaces' pages of a *window* of addresses are sent before those of the next.
//!
//! A page belongs to the stream that its 2 MiB region hashes to, always. So the copies of one page arrive in the order
//! they were sent, and at the target the newest wins without a lock. Each worker holds one frame at a time and blocks
//! when its stream does: memory stays bounded whatever the container's size.

mod buffers;
mod remembered;
mod worker;

pub(super) use self::worker::is_zero;

use self::worker::Worker;
use crate::kernel::process_memory::ReadError;
use crate::memory::{PAGE_SIZE, PageNumber, PageRange, PageSet, SpaceId};
use crate::migration::report::Sent;
use crate::wire::codec::Compression;
use crate::wire::page_frame::{EncodedFrame, FrameError};
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use thiserror::Error;

/// Pages of a region; a region's pages share a stream. 2 MiB, so that a huge page is not torn apart.
const REGION_PAGES: u64 = 512;

/// Pages of one space to send.
#[derive(Clone, Debug)]
pub struct PagesToSend {
    /// Whose.
    pub space: SpaceId,
    /// The process to read them from.
    pub pid: i32,
    /// Which.
    pub pages: PageSet,
}

/// Where a worker's frames go: one page stream.
pub trait FrameSink: Send {
    /// Hands over a frame, waiting for room. Returns how long it waited.
    fn send(&mut self, frame: EncodedFrame) -> io::Result<Duration>;
}

/// Why pages could not be sent.
#[derive(Debug, Error)]
pub enum SendError {
    /// The container's memory cannot be read.
    #[error("reading memory of process {pid}: {source}")]
    Read {
        /// The process.
        pid: i32,
        /// Why.
        source: ReadError,
    },
    /// The stream is closed.
    #[error("sending pages: {0}")]
    Stream(#[from] io::Error),
    /// A frame could not be made: a bug.
    #[error("encoding pages: {0}")]
    Encode(#[from] FrameError),
    /// The migration was cancelled meanwhile.
    #[error("cancelled")]
    Cancelled,
}

/// The sending half of a migration: one worker per page stream, kept from the first round to the residue.
pub struct Sender<S> {
    workers: Vec<Worker<S>>,
    sent: HashMap<SpaceId, PageSet>,
    /// Of spaces in doubt, the pages that were sent since they are.
    in_doubt: HashMap<SpaceId, PageSet>,
}

/// What watches a sender at work from another thread.
#[derive(Debug, Default)]
pub struct Progress {
    /// Pages done so far in this call, in whatever way.
    pub pages: AtomicU64,
    /// Bytes handed to the streams so far in this call.
    pub bytes_wire: AtomicU64,
    /// Set to stop at the next frame.
    pub cancelled: AtomicBool,
}

impl<S: FrameSink> Sender<S> {
    /// A sender over these streams, in the order of their indexes.
    pub fn new(sinks: Vec<S>, compression: Compression) -> Sender<S> {
        let worker = |sink| Worker::new(sink, compression);
        Sender {
            workers: sinks.into_iter().map(worker).collect(),
            sent: HashMap::new(),
            in_doubt: HashMap::new(),
        }
    }

    /// Holds in doubt what is sent of a space from here on: it may be changed behind the tracker's back after it was read
    /// ([`writers`](super::writers)). A digest is kept of all of it, so that sending it once more costs reading, and bytes
    /// only where it is another.
    pub fn doubt(&mut self, space: SpaceId) {
        self.in_doubt.entry(space).or_default();
        for worker in &mut self.workers {
            worker.remember_all(space);
        }
    }

    /// The pages of `space` whose copies are in doubt.
    pub fn in_doubt(&self, space: SpaceId) -> Option<&PageSet> {
        self.in_doubt.get(&space)
    }

    /// How many pages are in doubt.
    pub fn pages_in_doubt(&self) -> u64 {
        self.in_doubt.values().map(PageSet::pages).sum()
    }

    /// Drops what is kept of doubtful spaces that are no more.
    pub fn retain(&mut self, is_there: impl Fn(SpaceId) -> bool) {
        self.in_doubt.retain(|space, _| is_there(*space));
        for worker in &mut self.workers {
            worker.retain(&is_there);
        }
    }

    /// Sends the pages and returns what that took. Pages that are gone by the time they are read are left out.
    pub fn send(&mut self, pages: &[PagesToSend], progress: &Progress) -> Result<Sent, SendError> {
        progress.pages.store(0, Ordering::Relaxed);
        progress.bytes_wire.store(0, Ordering::Relaxed);
        let streams = self.workers.len() as u64;
        let mut spaces: HashSet<SpaceId> = self.sent.keys().copied().collect();
        spaces.extend(pages.iter().map(|to_send| to_send.space));
        let alone = spaces.len() == 1;
        let results: Vec<Result<Share, SendError>> = thread::scope(|scope| {
            let running: Vec<_> = (0..streams)
                .zip(&mut self.workers)
                .map(|(index, worker)| {
                    let mine = move |range: PageRange| stream_of(range.start(), streams) == index;
                    thread::Builder::new()
                        .name(format!("pages-{index}"))
                        .spawn_scoped(scope, move || worker.send(pages, alone, mine, progress))
                })
                .collect();
            running
                .into_iter()
                .map(|thread| match thread?.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        });
        let mut total = Sent::default();
        for result in results {
            let share = result?;
            total = total.plus(share.counts);
            for (space, pages) in share.spaces {
                let sent = self.sent.entry(space).or_default();
                sent.extend(&pages.sent);
                // An older copy of a page that cannot be read any more is worth nothing.
                sent.subtract(&pages.gone);
                if let Some(in_doubt) = self.in_doubt.get_mut(&space) {
                    in_doubt.extend(&pages.sent);
                    in_doubt.subtract(&pages.gone);
                }
            }
        }
        Ok(total)
    }

    /// Calls pages owed: they exist, their content comes later, and a copy the target has of them is worth nothing.
    ///
    /// Said on the stream that each page belongs to, after everything that was sent of it. Returns the bytes that took.
    pub fn owe(&mut self, pages: &[(SpaceId, PageSet)]) -> Result<u64, SendError> {
        let streams = self.workers.len() as u64;
        let mut bytes_wire = 0;
        for (index, worker) in (0..streams).zip(&mut self.workers) {
            for (space, pages) in pages {
                let mine = |range: &PageRange| stream_of(range.start(), streams) == index;
                let regions = pages.iter().flat_map(in_regions).filter(mine);
                bytes_wire += worker.owe(*space, regions)?;
            }
        }
        for (space, pages) in pages {
            self.forget(*space, pages);
        }
        Ok(bytes_wire)
    }

    /// Takes it that the target has no copy of these pages.
    pub fn forget(&mut self, space: SpaceId, pages: &PageSet) {
        for copies in [&mut self.sent, &mut self.in_doubt] {
            if let Some(copies) = copies.get_mut(&space) {
                copies.subtract(pages);
            }
        }
    }

    /// The pages of `space` that the target has some copy of.
    pub fn sent(&self, space: SpaceId) -> Option<&PageSet> {
        self.sent.get(&space)
    }

    /// Frames sent so far on each stream.
    pub fn frames(&self) -> Vec<u64> {
        self.workers.iter().map(Worker::frames).collect()
    }

    /// The streams again, to be closed in order.
    pub fn into_sinks(self) -> Vec<S> {
        self.workers.into_iter().map(Worker::into_sink).collect()
    }
}

/// What one worker did of a call.
#[derive(Default)]
struct Share {
    counts: Sent,
    spaces: Vec<(SpaceId, Looked)>,
}

/// The pages of one space that were asked for, by what became of them.
#[derive(Default)]
struct Looked {
    sent: PageSet,
    gone: PageSet,
}

/// The stream of a page, the same in every round.
fn stream_of(page: PageNumber, streams: u64) -> u64 {
    ((page.0 / REGION_PAGES).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % streams.max(1)
}

/// `range` cut at the borders of regions.
fn in_regions(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut at = range.start().0;
    std::iter::from_fn(move || {
        let end = ((at / REGION_PAGES + 1) * REGION_PAGES).min(range.end().0);
        let piece = PageRange::new(PageNumber(at), PageNumber(end))?;
        at = end;
        Some(piece)
    })
}

fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages * PAGE_SIZE).expect("a frame fits in memory")
}

#[cfg(test)]
mod tests;
