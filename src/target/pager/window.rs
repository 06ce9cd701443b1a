//! How many neighbours of a faulting page to ask for with it.
//!
//! **The rule.** Every request opens a window of pages from the fault on. A fault that no request covers and that lies in a
//! recent window or at most [`MOST`] pages behind it goes on with that window's stream: its window is twice as large as the
//! last, up to [`MOST`]; if it is the very page the window began with, it is asked for again and the window stays as it is.
//! Any other fault begins a stream, with [`FEW`] pages. So one scan soon asks for a quarter of a MiB at a
//! time, several scans at once (the last [`STREAMS`] are remembered) do not disturb each other, and faults at random
//! never ask for more than a few pages, which at 1 Gbit/s delay what comes behind them by 0.13 ms.

use crate::memory::PageNumber;
use std::collections::VecDeque;

/// Pages asked for at a fault that continues nothing.
const FEW: u64 = 4;
/// Pages asked for at most.
pub(super) const MOST: u64 = 64;
/// Streams of faults that are remembered.
const STREAMS: usize = 8;

/// The recent streams of faults in one store, the latest first.
#[derive(Debug, Default)]
pub(super) struct Windows {
    streams: VecDeque<Stream>,
}

/// The last window of a stream.
#[derive(Debug)]
struct Stream {
    start: u64,
    pages: u64,
}

impl Windows {
    /// How many pages to ask for from the faulting `page` on.
    pub fn open(&mut self, page: PageNumber) -> u64 {
        let reaches =
            |stream: &Stream| (stream.start..stream.start + stream.pages + MOST).contains(&page.0);
        let continued = self.streams.iter().position(reaches);
        let pages = match continued.and_then(|at| self.streams.remove(at)) {
            Some(stream) if stream.start == page.0 => stream.pages,
            Some(stream) => (stream.pages * 2).min(MOST),
            None => FEW,
        };
        let start = page.0;
        self.streams.push_front(Stream { start, pages });
        self.streams.truncate(STREAMS);
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_grows_to_the_most_and_stays_there() {
        let mut windows = Windows::default();
        let mut page = 1000;
        let mut opened = Vec::new();
        for _ in 0..7 {
            let pages = windows.open(PageNumber(page));
            opened.push(pages);
            page += pages;
        }
        assert_eq!(opened, [4, 8, 16, 32, 64, 64, 64]);
    }

    #[test]
    fn faults_at_random_ask_for_few_even_after_a_scan() {
        let mut windows = Windows::default();
        for page in [0, 4, 12, 28, 60] {
            windows.open(PageNumber(page));
        }
        for i in 1..50u64 {
            assert_eq!(windows.open(PageNumber(i * 7919 % 50_000 * 1000)), FEW);
        }
    }

    #[test]
    fn scans_side_by_side_grow_each_by_itself() {
        let mut windows = Windows::default();
        let mut scans = [0u64, 1 << 20, 1 << 21, 1 << 22];
        for round in 0..6 {
            for scan in &mut scans {
                let pages = windows.open(PageNumber(*scan));
                assert_eq!(pages, (FEW << round).min(MOST));
                *scan += pages;
            }
        }
    }

    #[test]
    fn a_stride_within_reach_counts_as_a_scan_and_a_step_back_does_not() {
        let mut windows = Windows::default();
        assert_eq!(windows.open(PageNumber(500)), 4);
        assert_eq!(windows.open(PageNumber(500 + 4 + 63)), 8);
        assert_eq!(windows.open(PageNumber(499)), 4);
    }

    #[test]
    fn to_ask_again_is_no_scan() {
        let mut windows = Windows::default();
        let opened = [500, 500, 504, 504].map(|page| windows.open(PageNumber(page)));
        assert_eq!(opened, [4, 4, 8, 8]);
    }
}
