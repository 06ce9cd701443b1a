//! Which owed pages of an address space have arrived: a file in memory that outlives whoever writes or reads it.
//!
//! In post-copy the agent puts pages into the page store while the pager takes them out. Both may die and be replaced, so
//! what has arrived is on record where neither of them keeps it alone: in a memfd with one byte per page, at the page's
//! number. 0: not yet. 1: its content, data or a hole of zeros, is in the store's memfd. The byte is written after the
//! content, and never taken back. A byte and not a bit, so that writers need no lock; the file is sparse, and costs one page
//! for each 16 MiB of address space that owes anything.

use crate::memory::{PageNumber, PageRange};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Bytes read or written at once.
const CHUNK: u64 = 1 << 16;

/// The owed pages of one address space that have arrived.
#[derive(Debug)]
pub struct Arrivals {
    file: File,
}

impl Arrivals {
    /// Nothing has arrived.
    pub fn new() -> io::Result<Arrivals> {
        let memfd = memfd_create("migrate-arrivals", MFdFlags::MFD_CLOEXEC)?;
        Ok(Arrivals { file: memfd.into() })
    }

    /// The record behind a descriptor that another process handed over.
    pub fn from_fd(fd: OwnedFd) -> Arrivals {
        Arrivals { file: fd.into() }
    }

    /// Another handle of the same record.
    pub fn try_clone(&self) -> io::Result<Arrivals> {
        Ok(Arrivals {
            file: self.file.try_clone()?,
        })
    }

    /// Puts `pages` on record. Their content must be in the store already.
    pub fn mark(&self, pages: PageRange) -> io::Result<()> {
        let ones = [1u8; 256];
        for part in pages.chunks(ones.len() as u64) {
            let ones = &ones[..part.pages() as usize];
            self.file.write_all_at(ones, part.start().0)?;
        }
        Ok(())
    }

    /// The runs of `pages` that have arrived, in order.
    pub fn among(&self, pages: PageRange) -> io::Result<Vec<PageRange>> {
        let mut runs: Vec<PageRange> = Vec::new();
        let mut buffer = Vec::new();
        for part in pages.chunks(CHUNK) {
            buffer.clear();
            buffer.resize(part.pages() as usize, 0);
            self.read_or_zeros(&mut buffer, part.start())?;
            let mut at = 0;
            for marked in buffer.chunk_by(|one, next| one == next) {
                let first = PageNumber(part.start().0 + at);
                at += marked.len() as u64;
                if marked[0] == 0 {
                    continue;
                }
                let run = PageRange::from_start_len(first, marked.len() as u64);
                let run = run.expect("inside a valid range");
                match runs.last_mut() {
                    Some(last) if last.end() == run.start() => {
                        *last = PageRange::new(last.start(), run.end()).expect("longer than one");
                    }
                    _ => runs.push(run),
                }
            }
        }
        Ok(runs)
    }

    /// What lies beyond the end of the file has not arrived.
    fn read_or_zeros(&self, buffer: &mut [u8], from: PageNumber) -> io::Result<()> {
        let mut have = 0;
        while have < buffer.len() {
            match self.file.read_at(&mut buffer[have..], from.0 + have as u64) {
                Ok(0) => return Ok(()),
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Arrivals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(start: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(start), pages).expect("a test range is valid")
    }

    #[test]
    fn what_was_marked_is_found_through_another_handle_in_runs() {
        let arrivals = Arrivals::new().expect("a memfd");
        let far = (1 << 35) - 3;
        for range in [pages(7, 1), pages(10, 5), pages(15, 600), pages(far, 3)] {
            arrivals.mark(range).expect("marked");
        }
        let other = arrivals.as_fd().try_clone_to_owned().expect("duplicated");
        let other = Arrivals::from_fd(other);
        let among = |range| other.among(range).expect("read");
        assert_eq!(among(pages(0, 1000)), [pages(7, 1), pages(10, 605)]);
        assert_eq!(among(pages(12, 4)), [pages(12, 4)]);
        assert_eq!(among(pages(616, CHUNK * 2)), []);
        assert_eq!(among(pages(far - 1, 3)), [pages(far, 2)]);
    }

    #[test]
    fn a_run_over_the_chunks_of_a_read_is_one() {
        let arrivals = Arrivals::new().expect("a memfd");
        arrivals.mark(pages(CHUNK - 2, 5)).expect("marked");
        let found = arrivals.among(pages(0, CHUNK * 2)).expect("read");
        assert_eq!(found, [pages(CHUNK - 2, 5)]);
    }
}
