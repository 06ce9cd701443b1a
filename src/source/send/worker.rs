//! One page stream's worker: reads pages, sorts out what need not be sent, and makes frames of the rest.

use super::buffers::Buffers;
use super::remembered::{Remembered, ZERO_HASH};
use super::{
    FrameSink, Looked, PagesToSend, Progress, REGION_PAGES, SendError, Share, bytes_of, in_regions,
};
use crate::kernel::process_memory::{ProcessMemory, ReadError};
use crate::memory::{PAGE_SIZE, PageNumber, PageRange, PageSet, SpaceId};
use crate::migration::report::Sent;
use crate::wire::codec::{Codec, CodecChooser, Compression};
use crate::wire::page_frame::{FrameEncoder, MAX_OWED, MAX_PAGES, MAX_RUNS, Run, RunKind};
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_128;

/// Pages of a window: 256 MiB. The frames of what several processes share in it are remembered, at most 4 MiB a worker.
const WINDOW_PAGES: u64 = 1 << 16;

/// Sends what belongs to one stream.
pub(super) struct Worker<S> {
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

impl<S> Worker<S> {
    pub fn new(sink: S, compression: Compression) -> Worker<S> {
        Worker {
            sink,
            buffers: Buffers::default(),
            frames: 0,
            encoder: FrameEncoder::new(),
            chooser: CodecChooser::new(compression),
            remembered: Remembered::new(),
            shared: HashMap::new(),
        }
    }

    /// Frames sent so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Remembers what is sent of every page of the space from here on.
    pub fn remember_all(&mut self, space: SpaceId) {
        self.remembered.remember_all(space);
    }

    /// Forgets spaces that are no more.
    pub fn retain(&mut self, is_there: impl Fn(SpaceId) -> bool) {
        self.remembered.retain(is_there);
    }

    pub fn into_sink(self) -> S {
        self.sink
    }
}

impl<S: FrameSink> Worker<S> {
    /// Sends those of `pages` that are `mine`. `alone`: there is no other space that they could be shared with.
    pub fn send(
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
    pub fn owe(
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
        self.remembered.forget();
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

/// Whether a page holds nothing but zeros.
pub(in crate::source) fn is_zero(page: &[u8]) -> bool {
    // Folding 64 bytes at a time lets the compiler use vectors, and the first block decides for most pages.
    let (blocks, rest) = page.as_chunks::<64>();
    let nothing_set = |block: &[u8]| block.iter().fold(0, |all, byte| all | byte) == 0;
    blocks.iter().all(|block| nothing_set(block)) && nothing_set(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
