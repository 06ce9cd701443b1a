//! A batch of a frozen process's pages as one frame.

use super::ServeError;
use super::books::Batch;
use crate::memory::{PAGE_SIZE, PageNumber, PageRange};
use crate::source::send::is_zero;
use crate::wire::codec::Codec;
use crate::wire::page_frame::{EncodedFrame, FrameEncoder, Run, RunKind};
use bytes::Bytes;

/// Reads a batch and encodes it; pages of zeros are only named. Gives the bytes of the others, too.
///
/// # Errors
/// If a page is not there: the process is frozen, so it was never a page, or somebody let the process go.
pub(super) fn of_batch(
    batch: &Batch,
    encoder: &mut FrameEncoder,
    codec: Codec,
) -> Result<(EncodedFrame, usize), ServeError> {
    let pages: u64 = batch.ranges.iter().map(|range| range.pages()).sum();
    let mut bytes = vec![0; bytes_of(pages)];
    let gone = batch.memory.read_runs(&batch.ranges, &mut bytes);
    let gone = gone.map_err(|source| ServeError::Read {
        pid: batch.memory.pid(),
        source,
    })?;
    if let Some(&pages) = gone.first() {
        return Err(ServeError::Gone {
            space: batch.space,
            pages,
        });
    }
    let (runs, data) = sort(&batch.ranges, &mut bytes);
    bytes.truncate(data);
    let frame = encoder.encode(batch.space, &runs, Bytes::from(bytes), codec)?;
    Ok((frame, data))
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

fn bytes_of(pages: u64) -> usize {
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
