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

use crate::kernel::process_memory::{ProcessMemory, ReadError};
use crate::memory::{PAGE_SIZE, PageNumber, PageRange, PageSet, SpaceId};
use crate::migration::report::Sent;
use crate::wire::codec::{Codec, CodecChooser, Compression};
use crate::wire::page_frame::{
    EncodedFrame, FrameEncoder, FrameError, MAX_OWED, MAX_PAGES, MAX_RUNS, Run, RunKind,
};
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_128;

/// Pages of a region; a region's pages share a stream. 2 MiB, so that a huge page is not torn apart.
const REGION_PAGES: u64 = 512;

/// Pages of a window: 256 MiB. The frames of what several processes share in it are remembered, at most 4 MiB a worker.
const WINDOW_PAGES: u64 = 1 << 16;

/// Hashes of pages that a worker remembers: with 24 bytes each 3 MiB, whatever the container's size.
const REMEMBERED: usize = 1 << 17;

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

struct Worker<S> {
    sink: S,
    buffers: Buffers,
    frames: u64,
    encoder: FrameEncoder,
    chooser: CodecChooser,
    remembered: Remembered,
    shared: HashMap<u64, SharedPage>,
}

/// A page sent in the current window, found by its frame.
#[derive(Clone, Copy)]
struct SharedPage {
    space: SpaceId,
    page: PageNumber,
    /// Frames are used again: the page found there later may be another.
    hash: u128,
}

impl<S: FrameSink> Sender<S> {
    /// A sender over these streams, in the order of their indexes.
    pub fn new(sinks: Vec<S>, compression: Compression) -> Sender<S> {
        let worker = |sink| Worker {
            sink,
            buffers: Buffers::default(),
            frames: 0,
            encoder: FrameEncoder::new(),
            chooser: CodecChooser::new(compression),
            remembered: Remembered::new(),
            shared: HashMap::new(),
        };
        Sender {
            workers: sinks.into_iter().map(worker).collect(),
            sent: HashMap::new(),
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
            if let Some(sent) = self.sent.get_mut(space) {
                sent.subtract(pages);
            }
        }
        Ok(bytes_wire)
    }

    /// The pages of `space` that the target has some copy of.
    pub fn sent(&self, space: SpaceId) -> Option<&PageSet> {
        self.sent.get(&space)
    }

    /// Frames sent so far on each stream.
    pub fn frames(&self) -> Vec<u64> {
        self.workers.iter().map(|worker| worker.frames).collect()
    }

    /// The streams again, to be closed in order.
    pub fn into_sinks(self) -> Vec<S> {
        self.workers.into_iter().map(|worker| worker.sink).collect()
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

impl<S: FrameSink> Worker<S> {
    fn send(
        &mut self,
        pages: &[PagesToSend],
        alone: bool,
        mine: impl Fn(PageRange) -> bool,
        progress: &Progress,
    ) -> Result<Share, SendError> {
        let mut share = Share {
            counts: Sent::default(),
            spaces: pages
                .iter()
                .map(|to_send| (to_send.space, Looked::default()))
                .collect(),
        };
        for window in windows(pages) {
            self.shared.clear();
            for (to_send, (_, looked)) in pages.iter().zip(&mut share.spaces) {
                let regions = to_send.pages.intersecting(window).into_iter();
                let regions = regions.flat_map(in_regions).filter(|&range| mine(range));
                let mut source = Source {
                    to_send,
                    alone,
                    looked,
                    counts: &mut share.counts,
                    progress,
                };
                self.send_regions(&mut source, regions)?;
            }
        }
        Ok(share)
    }

    /// Sends regions of one space, in as few frames as they fit in.
    fn send_regions(
        &mut self,
        source: &mut Source<'_>,
        regions: impl Iterator<Item = PageRange>,
    ) -> Result<(), SendError> {
        let mut regions = regions.peekable();
        if regions.peek().is_none() {
            return Ok(());
        }
        let memory = match source.open() {
            Ok(memory) => memory,
            // Its pages are gone with it; whether any is wanted after all shows at the freeze.
            Err(ReadError::Exited { .. }) => return Ok(()),
            Err(error) => return Err(source.failed(error)),
        };
        let mut batch = Vec::new();
        let mut batch_pages = 0;
        // A region is at most twice a frame.
        for range in regions.flat_map(|region| region.chunks(MAX_PAGES)) {
            if batch_pages + range.pages() > MAX_PAGES || batch.len() == MAX_RUNS / 2 {
                self.batch(&memory, source, &batch)?;
                batch.clear();
                batch_pages = 0;
            }
            batch_pages += range.pages();
            batch.push(range);
        }
        self.batch(&memory, source, &batch)
    }

    /// Calls `regions` of `space` owed, in as few frames as they fit in.
    fn owe(
        &mut self,
        space: SpaceId,
        regions: impl Iterator<Item = PageRange>,
    ) -> Result<u64, SendError> {
        let mut bytes_wire = 0;
        let mut runs: Vec<Run> = Vec::new();
        let mut pages = 0;
        let mut regions = regions.peekable();
        while let Some(range) = regions.next() {
            match runs.last_mut() {
                Some(last) if last.range.end() == range.start() => {
                    last.range = PageRange::new(last.range.start(), range.end())
                        .expect("a longer run is a run");
                }
                _ => runs.push(Run {
                    range,
                    kind: RunKind::Owed,
                }),
            }
            pages += range.pages();
            let full = runs.len() == MAX_RUNS || pages + REGION_PAGES > MAX_OWED;
            if full || regions.peek().is_none() {
                let frame = self
                    .encoder
                    .encode(space, &runs, Bytes::new(), Codec::None)?;
                bytes_wire += frame.wire_len() as u64;
                self.sink.send(frame)?;
                self.frames += 1;
                runs.clear();
                pages = 0;
            }
        }
        // What the table says of them is no longer true; few of the others will be asked about again.
        self.remembered = Remembered::new();
        Ok(bytes_wire)
    }

    /// Reads up to a frame's worth of pages and sends what the target does not have.
    fn batch(
        &mut self,
        memory: &ProcessMemory,
        source: &mut Source<'_>,
        ranges: &[PageRange],
    ) -> Result<(), SendError> {
        if source.progress.cancelled.load(Ordering::Relaxed) {
            return Err(SendError::Cancelled);
        }
        let pages: u64 = ranges.iter().map(|range| range.pages()).sum();
        let mut buffer = self.buffers.take();
        let read = memory.shared_frames(ranges).and_then(|frames| {
            let gone = memory.read_runs(ranges, &mut buffer.bytes[..bytes_of(pages)])?;
            Ok((frames, gone))
        });
        let (frames, gone) = match read {
            Ok((frames, gone)) => (frames, gone.into_iter().collect()),
            Err(ReadError::Exited { .. }) => return Ok(()),
            Err(error) => return Err(source.failed(error)),
        };
        let space = source.to_send.space;
        let read = Read {
            ranges,
            frames,
            gone,
        };
        let (sorted, data) = self.sort(space, &read, &mut buffer.bytes, source.counts);
        for &range in ranges {
            source.looked.sent.insert(range);
        }
        source.looked.sent.subtract(&read.gone);
        source.looked.gone.extend(&read.gone);
        source.progress.pages.fetch_add(pages, Ordering::Relaxed);
        if sorted.is_empty() {
            return Ok(());
        }
        // Runs alternate between kinds at worst; a frame takes only so many.
        let mut raw = Bytes::from_owner(buffer).slice(..data);
        for runs in in_frames(&sorted) {
            let data = raw.split_to(runs.iter().map(Run::raw_len).sum());
            let raw_len = data.len();
            let codec = self.chooser.choose();
            let start = Instant::now();
            let frame = self.encoder.encode(space, runs, data, codec)?;
            let encoded = if raw_len == 0 { 0 } else { frame.payload.len() };
            self.chooser
                .encoded(codec, raw_len, encoded, start.elapsed());
            let wire_len = frame.wire_len() as u64;
            let waited = self.sink.send(frame)?;
            if waited > Duration::from_micros(200) {
                self.chooser.link_took(wire_len, waited);
            }
            self.frames += 1;
            source.counts.bytes_wire += wire_len;
            let progress = &source.progress.bytes_wire;
            progress.fetch_add(wire_len, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Sorts pages into data, zero, another space's and unchanged. Afterwards `buffer` begins with the data pages, in order; they take as
    /// many bytes as returned.
    fn sort(
        &mut self,
        space: SpaceId,
        read: &Read<'_>,
        buffer: &mut [u8],
        counts: &mut Sent,
    ) -> (Vec<Run>, usize) {
        let mut runs: Vec<Run> = Vec::new();
        let (mut from, mut to) = (0, 0);
        let page_bytes = bytes_of(1);
        let pages = read
            .ranges
            .iter()
            .flat_map(|range| range.start().0..range.end().0);
        for (page, frame) in pages.map(PageNumber).zip(&read.frames) {
            let content = &buffer[from..from + page_bytes];
            let at = from;
            from += page_bytes;
            if !read.gone.is_empty() && read.gone.contains(page) {
                continue;
            }
            counts.pages += 1;
            let kind = if is_zero(content) {
                if self.remembered.is_same(space, page, ZERO_HASH) {
                    counts.same_pages += 1;
                    continue;
                }
                counts.zero_pages += 1;
                RunKind::Zero
            } else {
                let hash = xxh3_128(content);
                let origin = frame.and_then(|frame| {
                    let here = SharedPage { space, page, hash };
                    self.seen(frame, here)
                });
                if self.remembered.is_same(space, page, hash) {
                    counts.same_pages += 1;
                    continue;
                }
                if let Some(origin) = origin {
                    counts.same_pages += 1;
                    RunKind::Same(origin)
                } else {
                    counts.data_pages += 1;
                    counts.bytes_raw += PAGE_SIZE;
                    buffer.copy_within(at..at + page_bytes, to);
                    to += page_bytes;
                    RunKind::Data
                }
            };
            let one = PageRange::from_start_len(page, 1).expect("a page of a range is a range");
            match runs.last_mut() {
                Some(last) if last.kind == kind && last.range.end() == page => {
                    last.range = PageRange::new(last.range.start(), one.end())
                        .expect("a longer run is a run");
                }
                _ => runs.push(Run { range: one, kind }),
            }
        }
        (runs, to)
    }

    /// The other space that has this very page, sent earlier in the window; if there is none, this is the one for others.
    fn seen(&mut self, frame: u64, here: SharedPage) -> Option<SpaceId> {
        let first = *self.shared.entry(frame).or_insert(here);
        let same = first.space != here.space && (first.page, first.hash) == (here.page, here.hash);
        same.then_some(first.space)
    }
}

/// What a worker sends pages of, and where it keeps account of that.
struct Source<'a> {
    to_send: &'a PagesToSend,
    /// There is no other space that it could share pages with.
    alone: bool,
    looked: &'a mut Looked,
    counts: &'a mut Sent,
    progress: &'a Progress,
}

impl Source<'_> {
    fn open(&self) -> Result<ProcessMemory, ReadError> {
        match self.alone {
            true => ProcessMemory::open(self.to_send.pid),
            false => ProcessMemory::open_shared(self.to_send.pid),
        }
    }

    fn failed(&self, source: ReadError) -> SendError {
        SendError::Read {
            pid: self.to_send.pid,
            source,
        }
    }
}

/// Pages that were read, in order.
struct Read<'a> {
    ranges: &'a [PageRange],
    /// For each page the frame it shares with another process.
    frames: Vec<Option<u64>>,
    /// Pages that were not there.
    gone: PageSet,
}

/// `runs` cut into what a frame takes: so many, and those that are another space's from one space only.
fn in_frames(runs: &[Run]) -> Vec<&[Run]> {
    let (mut frames, mut from, mut named) = (Vec::new(), 0, None);
    for (index, run) in runs.iter().enumerate() {
        let origin = match run.kind {
            RunKind::Same(origin) => Some(origin),
            RunKind::Data | RunKind::Zero | RunKind::Owed => None,
        };
        let another = origin.is_some() && named.is_some() && origin != named;
        if another || index - from == MAX_RUNS {
            frames.push(&runs[from..index]);
            (from, named) = (index, None);
        }
        named = named.or(origin);
    }
    frames.push(&runs[from..]);
    frames
}

/// The windows in which any space has pages, in order. A space that is alone has one window of everything.
fn windows(pages: &[PagesToSend]) -> Vec<PageRange> {
    let ranges = || pages.iter().flat_map(|to_send| to_send.pages.iter());
    if pages.len() == 1 {
        let end = ranges().map(|range| range.end()).max();
        let all = end.and_then(|end| PageRange::new(PageNumber(0), end));
        return all.into_iter().collect();
    }
    let numbers: BTreeSet<u64> = ranges()
        .flat_map(|range| range.start().0 / WINDOW_PAGES..=(range.end().0 - 1) / WINDOW_PAGES)
        .collect();
    let window =
        |number| PageRange::from_start_len(PageNumber(number * WINDOW_PAGES), WINDOW_PAGES);
    numbers.into_iter().filter_map(window).collect()
}

/// A worker's frame buffers, used again when the network is done with them.
///
/// A new one for every frame would be a fresh mapping each time, and the kernel would zero a MiB for nothing.
#[derive(Default)]
struct Buffers {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// One frame's worth of bytes, on loan. What is in it is whatever was read last.
struct Buffer {
    bytes: Vec<u8>,
    home: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Buffers {
    fn take(&self) -> Buffer {
        let used = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        Buffer {
            bytes: used.unwrap_or_else(|| vec![0; bytes_of(MAX_PAGES)]),
            home: Arc::clone(&self.free),
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.home
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(bytes);
    }
}

/// What zero pages are remembered as; no hash of a page is likelier to be it than any other value.
const ZERO_HASH: u128 = 0;

/// The content the target has of the pages sent last, by hash, in a table of fixed size.
///
/// A page that fell out of the table is sent again: that costs bytes, never correctness. 128 bits, so that two
/// contents of one page do not meet by chance.
struct Remembered {
    slots: Vec<Slot>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Slot {
    /// Space and page, mixed; 0 is empty.
    key: u64,
    /// In two words: as a u128 it would be aligned to 16 bytes and a third of the table would be padding.
    hash: [u64; 2],
}

impl Remembered {
    fn new() -> Remembered {
        Remembered { slots: Vec::new() }
    }

    /// Whether the page has this content at the target; from now on it has.
    fn is_same(&mut self, space: SpaceId, page: PageNumber, hash: u128) -> bool {
        if self.slots.is_empty() {
            self.slots.resize(
                REMEMBERED,
                Slot {
                    key: 0,
                    hash: [0; 2],
                },
            );
        }
        // Page numbers have 45 bits and a container has far fewer than 2^18 spaces: the key is unique but for that.
        let key = (page.0 << 18) | ((u64::from(space.0) + 1) & 0x3_ffff);
        let index = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - REMEMBERED.trailing_zeros());
        let slot = &mut self.slots[usize::try_from(index).expect("the index has 17 bits")];
        let hash = [hash as u64, (hash >> 64) as u64];
        let now = Slot { key, hash };
        std::mem::replace(slot, now) == now
    }
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

/// Whether a page holds nothing but zeros.
pub(super) fn is_zero(page: &[u8]) -> bool {
    // Folding 64 bytes at a time lets the compiler use vectors, and the first block decides for most pages.
    let (blocks, rest) = page.as_chunks::<64>();
    let nothing_set = |block: &[u8]| block.iter().fold(0, |all, byte| all | byte) == 0;
    blocks.iter().all(|block| nothing_set(block)) && nothing_set(rest)
}

fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages * PAGE_SIZE).expect("a frame fits in memory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::forked::Forked;
    use crate::wire::page_frame::{Frame, HEADER_LEN, Header, Scratch};
    use std::collections::BTreeMap;

    const SPACE: SpaceId = SpaceId(3);

    /// A stream that ends in memory.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<Bytes>>>);

    impl FrameSink for Kept {
        fn send(&mut self, frame: EncodedFrame) -> io::Result<Duration> {
            self.0.lock().expect("not poisoned").push(frame.to_bytes());
            Ok(Duration::ZERO)
        }
    }

    impl Kept {
        /// The pages of [`SPACE`] that came, in order of arrival, with their content; `None` is zero.
        fn pages(&self) -> Vec<(u64, Option<Vec<u8>>)> {
            let came = self.came().into_iter();
            came.map(|(space, page, _, content)| {
                assert_eq!(space, SPACE);
                (page, content)
            })
            .collect()
        }

        fn came(&self) -> Vec<(SpaceId, u64, RunKind, Option<Vec<u8>>)> {
            let mut pages = Vec::new();
            for bytes in self.0.lock().expect("not poisoned").drain(..) {
                let header = Header::decode(bytes[..HEADER_LEN].try_into().expect("a header"));
                let frame = Frame::decode(header.expect("sound"), bytes.slice(HEADER_LEN..));
                let frame = frame.expect("sound");
                let mut scratch = Scratch::new();
                let mut data = frame.raw(&mut scratch).expect("sound").chunks(bytes_of(1));
                for run in frame.runs() {
                    for page in run.range.start().0..run.range.end().0 {
                        let content = match run.kind {
                            RunKind::Data => Some(data.next().expect("a data page").to_vec()),
                            RunKind::Zero | RunKind::Same(_) => None,
                            RunKind::Owed => Some(b"owed".to_vec()),
                        };
                        pages.push((frame.space(), page, run.kind, content));
                    }
                }
            }
            pages
        }
    }

    /// Memory of this process, on page borders, over several regions.
    struct Memory {
        bytes: Vec<u8>,
        first: PageNumber,
        pages: u64,
    }

    impl Memory {
        fn new(pages: u64) -> Memory {
            let bytes = vec![0; bytes_of(pages + 1)];
            let first = PageNumber((bytes.as_ptr() as u64).div_ceil(PAGE_SIZE));
            Memory {
                bytes,
                first,
                pages,
            }
        }

        fn page(&mut self, index: u64) -> &mut [u8] {
            let start =
                usize::try_from((self.first.0 + index) * PAGE_SIZE - self.bytes.as_ptr() as u64);
            let start = start.expect("inside");
            &mut self.bytes[start..start + bytes_of(1)]
        }

        fn to_send(&self) -> Vec<PagesToSend> {
            let range = PageRange::from_start_len(self.first, self.pages).expect("not empty");
            vec![PagesToSend {
                space: SPACE,
                pid: std::process::id().cast_signed(),
                pages: [range].into_iter().collect(),
            }]
        }
    }

    fn sender(streams: usize) -> (Sender<Kept>, Vec<Kept>) {
        let kept: Vec<Kept> = (0..streams).map(|_| Kept::default()).collect();
        (Sender::new(kept.clone(), Compression::Auto), kept)
    }

    #[test]
    fn every_page_arrives_once_with_its_content_and_zero_pages_cost_nothing() {
        let mut memory = Memory::new(1500);
        for index in (0..1500).step_by(3) {
            let byte = u8::try_from(index % 251 + 1).expect("small");
            memory.page(index).fill(byte);
        }
        let (mut sender, kept) = sender(2);
        let sent = sender
            .send(&memory.to_send(), &Progress::default())
            .expect("sent");
        assert_eq!(
            (sent.pages, sent.data_pages, sent.zero_pages),
            (1500, 500, 1000)
        );
        assert_eq!(sent.bytes_raw, 500 * PAGE_SIZE);
        let mut arrived = BTreeMap::new();
        for (page, content) in kept.iter().flat_map(Kept::pages) {
            assert!(
                arrived.insert(page, content).is_none(),
                "page {page:#x} came twice"
            );
        }
        for index in 0..1500 {
            let content = arrived.remove(&(memory.first.0 + index)).expect("it came");
            let zero = memory.page(index).iter().all(|&byte| byte == 0);
            assert_eq!(content.as_deref(), (!zero).then_some(&*memory.page(index)));
        }
        assert!(arrived.is_empty());
        assert_eq!(sender.sent(SPACE).map(PageSet::pages), Some(1500));
    }

    #[test]
    fn a_page_the_target_has_is_not_sent_again_until_it_changes() {
        let mut memory = Memory::new(100);
        for index in 0..100 {
            memory.page(index).fill(7);
        }
        let (mut sender, kept) = sender(1);
        sender
            .send(&memory.to_send(), &Progress::default())
            .expect("sent");
        kept[0].pages();
        memory.page(5).fill(8);
        memory.page(6).fill(0);
        let sent = sender
            .send(&memory.to_send(), &Progress::default())
            .expect("sent");
        assert_eq!(
            (sent.same_pages, sent.data_pages, sent.zero_pages),
            (98, 1, 1)
        );
        let base = memory.first.0;
        assert_eq!(
            kept[0].pages(),
            [(base + 5, Some(vec![8; bytes_of(1)])), (base + 6, None)]
        );
    }

    #[test]
    fn what_forked_processes_share_is_sent_once_and_stays_shared() {
        const CHILD: SpaceId = SpaceId(4);
        let mut memory = Memory::new(1500);
        for index in 0..1500 {
            memory.page(index).fill(index as u8 | 1);
        }
        memory.page(3).fill(0);
        let child = Forked::new();
        // These are two pages now.
        memory.page(700).fill(77);
        let mut to_send = memory.to_send();
        to_send.push(PagesToSend {
            space: CHILD,
            pid: child.pid(),
            ..to_send[0].clone()
        });
        let (mut sender, kept) = sender(2);
        let sent = sender.send(&to_send, &Progress::default()).expect("sent");
        assert_eq!(
            (sent.data_pages, sent.zero_pages, sent.same_pages),
            (1500, 2, 1498)
        );
        let mut target: BTreeMap<(SpaceId, u64), Vec<u8>> = BTreeMap::new();
        for (space, page, kind, content) in kept.iter().flat_map(Kept::came) {
            let content = match kind {
                // What is there by then counts, as at a target.
                RunKind::Same(origin) => target[&(origin, page)].clone(),
                _ => content.unwrap_or_else(|| vec![0; bytes_of(1)]),
            };
            target.insert((space, page), content);
        }
        for index in 0..1500 {
            let page = memory.first.0 + index;
            assert_eq!(target[&(SPACE, page)], memory.page(index));
            let childs = match index {
                700 => vec![700u64 as u8 | 1; bytes_of(1)],
                _ => memory.page(index).to_vec(),
            };
            assert_eq!(target[&(CHILD, page)], childs, "page {index}");
        }
        // The reading has copied nothing.
        let shared = ProcessMemory::open_shared(child.pid()).expect("opens");
        let range = PageRange::from_start_len(memory.first, 1500).expect("a range");
        let frames = shared.shared_frames(&[range]).expect("told");
        assert_eq!(frames.iter().flatten().count(), 1499);
    }

    #[test]
    fn a_frame_names_one_other_space_only() {
        let same = |first, origin| Run {
            range: PageRange::from_start_len(PageNumber(first), 1).expect("a page"),
            kind: RunKind::Same(SpaceId(origin)),
        };
        let zero = |first| Run {
            kind: RunKind::Zero,
            ..same(first, 0)
        };
        let runs = [
            zero(1),
            same(2, 7),
            zero(3),
            same(4, 8),
            same(6, 8),
            zero(8),
            same(9, 7),
        ];
        let lengths: Vec<usize> = in_frames(&runs).iter().map(|runs| runs.len()).collect();
        assert_eq!(lengths, [3, 3, 1]);
        let many: Vec<Run> = (0..600).map(|index| zero(2 * index)).collect();
        let lengths: Vec<usize> = in_frames(&many).iter().map(|runs| runs.len()).collect();
        assert_eq!(lengths, [256, 256, 88]);
    }

    #[test]
    fn a_page_always_takes_the_same_stream() {
        let mut memory = Memory::new(3000);
        let (mut sender, kept) = sender(3);
        let mut streams = BTreeMap::new();
        for round in 1..4 {
            for index in 0..3000 {
                memory.page(index).fill(round);
            }
            sender
                .send(&memory.to_send(), &Progress::default())
                .expect("sent");
            for (stream, kept) in kept.iter().enumerate() {
                for (page, _) in kept.pages() {
                    assert_eq!(*streams.entry(page).or_insert(stream), stream);
                }
            }
        }
        assert_eq!(streams.len(), 3000);
    }

    #[test]
    fn an_owed_page_follows_its_older_copies_and_is_no_longer_counted_as_sent() {
        let mut memory = Memory::new(3000);
        for index in 0..3000 {
            memory.page(index).fill(7);
        }
        let (mut sender, kept) = sender(3);
        let progress = Progress::default();
        sender.send(&memory.to_send(), &progress).expect("sent");
        let mut streams = BTreeMap::new();
        for (stream, kept) in kept.iter().enumerate() {
            streams.extend(kept.pages().into_iter().map(|(page, _)| (page, stream)));
        }
        let first = memory.first.0;
        let range = |start, pages| {
            PageRange::from_start_len(PageNumber(first + start), pages).expect("a range")
        };
        let owed: PageSet = [range(0, 2000), range(2500, 1)].into_iter().collect();
        let frames: u64 = sender.frames().iter().sum();
        let bytes = sender.owe(&[(SPACE, owed.clone())]).expect("said");
        let frames = sender.frames().iter().sum::<u64>() - frames;
        assert!(
            frames <= 3 && bytes < 3 * 1024,
            "{frames} frames, {bytes} bytes"
        );
        let mut said = PageSet::new();
        for (stream, kept) in kept.iter().enumerate() {
            for (page, content) in kept.pages() {
                assert_eq!(content.as_deref(), Some(&b"owed"[..]));
                assert_eq!(streams[&page], stream, "page {page:#x} changed its stream");
                said.insert(PageRange::from_start_len(PageNumber(page), 1).expect("a page"));
            }
        }
        assert_eq!(said, owed);
        let sent = sender.sent(SPACE).expect("some");
        assert_eq!(sent.pages(), 999);
        assert!(!sent.contains(PageNumber(first)));
        // The content has not changed, and has to be sent all the same.
        let sent = sender.send(&memory.to_send(), &progress).expect("sent");
        assert_eq!(sent.same_pages, 0);
    }

    #[test]
    fn pages_that_are_gone_are_left_out() {
        let mut memory = Memory::new(4);
        memory.page(0).fill(1);
        let mut to_send = memory.to_send();
        // The first page of an address space is never mapped.
        to_send[0]
            .pages
            .insert(PageRange::from_start_len(PageNumber(0), 1).expect("a page"));
        let (mut sender, kept) = sender(1);
        let sent = sender.send(&to_send, &Progress::default()).expect("sent");
        assert_eq!(sent.pages, 4);
        assert!(kept[0].pages().iter().all(|(page, _)| *page != 0));
        let sent = sender.sent(SPACE).expect("some");
        assert!(
            !sent.contains(PageNumber(0)),
            "a page that was not read counts as missing"
        );
    }

    #[test]
    fn a_cancelled_send_stops() {
        let mut memory = Memory::new(600);
        memory.page(0).fill(1);
        let (mut sender, _kept) = sender(1);
        let progress = Progress::default();
        progress.cancelled.store(true, Ordering::Relaxed);
        let stopped = sender.send(&memory.to_send(), &progress);
        assert!(matches!(stopped, Err(SendError::Cancelled)));
    }
}
