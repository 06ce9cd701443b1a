//! What a batch of a frozen process's pages holds, to be sent as one frame.

use super::ServeError;
use super::books::Batch;
use crate::kernel::process_memory::ReadError;
use crate::memory::{PAGE_SIZE, PageNumber, PageRange, SpaceId};
use crate::source::send::is_zero;
use crate::wire::codec::Codec;
use crate::wire::page_frame::{EncodedFrame, FrameEncoder, FrameError, Run, RunKind};
use bytes::Bytes;
use std::sync::Arc;

/// What the pages of a batch hold.
pub(super) struct Content {
    pub space: SpaceId,
    pub runs: Vec<Run>,
    /// Of the data pages, one after another.
    pub bytes: Bytes,
}

impl Content {
    /// Reads a batch.
    ///
    /// # Errors
    /// If a page is not there: the process is frozen, so it was never a page, or somebody let the process go.
    pub fn read(batch: &Batch) -> Result<Content, ServeError> {
        let mut bytes = batch.read()?;
        let (runs, data) = sort(&batch.ranges, &mut bytes);
        bytes.truncate(data);
        Ok(Content {
            space: batch.space,
            runs,
            bytes: Bytes::from(bytes),
        })
    }

    /// As a frame; pages of zeros are only named.
    pub fn encode(
        &self,
        encoder: &mut FrameEncoder,
        codec: Codec,
    ) -> Result<EncodedFrame, FrameError> {
        encoder.encode(self.space, &self.runs, self.bytes.clone(), codec)
    }
}

impl Batch {
    /// The bytes of all its pages, which are there.
    pub fn read(&self) -> Result<Vec<u8>, ServeError> {
        let mut bytes = vec![0; bytes_of(self.pages())];
        let gone = self.memory.read_runs(&self.ranges, &mut bytes);
        match gone.map_err(|source| self.failed(source))?.first() {
            None => Ok(bytes),
            Some(&pages) => Err(ServeError::Gone {
                space: self.space,
                pages,
            }),
        }
    }

    /// Those of its pages that hold data.
    pub fn data_of(&self, content: &Content) -> Batch {
        let data = content.runs.iter().filter(|run| run.kind == RunKind::Data);
        Batch {
            space: self.space,
            memory: Arc::clone(&self.memory),
            ranges: data.map(|run| run.range).collect(),
        }
    }

    /// For each page the frame that it shares with another process.
    pub fn shared_frames(&self) -> Result<Vec<Option<u64>>, ServeError> {
        let frames = self.memory.shared_frames(&self.ranges);
        frames.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: ReadError) -> ServeError {
        ServeError::Read {
            pid: self.memory.pid(),
            source,
        }
    }
}

/// Sorts pages into data and zero. Afterwards `bytes` begins with the data pages, in order; they take as many bytes as
/// returned.
fn sort(ranges: &[PageRange], bytes: &mut [u8]) -> (Vec<Run>, usize) {
    let mut runs: Vec<Run> = Vec::new();
    let (mut from, mut to) = (0, 0);
    let page_bytes = bytes_of(1);
    let pages = ranges.iter().flat_map(|range| range.chunks(1));
    for page in pages {
        let kind = if is_zero(&bytes[from..from + page_bytes]) {
            RunKind::Zero
        } else {
            if from != to {
                bytes.copy_within(from..from + page_bytes, to);
            }
            to += page_bytes;
            RunKind::Data
        };
        from += page_bytes;
        match runs.last_mut() {
            Some(last) if last.kind == kind && last.range.end() == page.start() => {
                last.range = joined(last.range.start(), page.end());
            }
            _ => runs.push(Run { range: page, kind }),
        }
    }
    (runs, to)
}

fn joined(start: PageNumber, end: PageNumber) -> PageRange {
    PageRange::new(start, end).expect("a longer run is a run")
}

pub(super) fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages * PAGE_SIZE).expect("a frame fits in memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_are_named_and_the_others_moved_together() {
        let range = |start, pages| {
            PageRange::from_start_len(PageNumber(start), pages).expect("a test range is valid")
        };
        let page = |byte: u8| vec![byte; bytes_of(1)];
        let mut bytes = [page(1), page(0), page(0), page(2), page(3)].concat();
        let (runs, data) = sort(&[range(10, 4), range(20, 1)], &mut bytes);
        let run = |range, kind| Run { range, kind };
        assert_eq!(
            runs,
            [
                run(range(10, 1), RunKind::Data),
                run(range(11, 2), RunKind::Zero),
                run(range(13, 1), RunKind::Data),
                run(range(20, 1), RunKind::Data),
            ]
        );
        assert_eq!(bytes[..data], [page(1), page(2), page(3)].concat());
    }
}
