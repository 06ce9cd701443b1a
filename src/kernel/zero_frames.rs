//! Which physical frames are the kernel's shared pages of zeros, for kernels whose pagemap does not say.
//!
//! Nothing enters; a set of frames leaves. `PAGEMAP_SCAN` flags such pages itself ([`super::pagemap::PageIs::ZERO`]).
#![allow(unsafe_code)]

use super::pagemap::{Pagemap, ScanError};
use crate::memory::{PAGE_SIZE, PageNumber, PageRange, VirtAddr};
use nix::errno::Errno;
use std::ops::Range;

/// The frames of zeros of this host. Holds a mapping of each, so that the kernel keeps them where they are.
#[derive(Debug)]
pub struct ZeroFrames {
    small: u64,
    /// The transparent huge page of zeros, if the kernel uses one.
    huge: Option<Range<u64>>,
    _mapped: Mapping,
}

impl ZeroFrames {
    /// Finds them by mapping them. Needs `CAP_SYS_ADMIN`, without which pagemap hides frames.
    pub fn find() -> Result<ZeroFrames, ScanError> {
        let pid = std::process::id() as i32;
        let mapping = Mapping::new(2 * HUGE_PAGE).map_err(|errno| ScanError::Refused {
            what: "mapping the pages of zeros",
            pid,
            errno,
        })?;
        let pagemap = Pagemap::open(pid)?;
        let frame = |page: PageNumber| {
            let mut frame = None;
            if let Some(page) = PageRange::from_start_len(page, 1) {
                pagemap.read(page, |_, entry| frame = entry.frame())?;
            }
            frame.ok_or(ScanError::Refused {
                what: "reading the frame of the page of zeros",
                pid,
                errno: Errno::EPERM,
            })
        };
        // The aligned huge page inside the mapping is allowed to be huge, the page before or behind it is not.
        let huge_at = mapping.start.next_multiple_of(HUGE_PAGE);
        let small_at = if huge_at > mapping.start {
            mapping.start
        } else {
            huge_at + HUGE_PAGE
        };
        mapping.allow_huge(huge_at);
        mapping.touch(huge_at);
        mapping.touch(small_at);
        let (first, small) = (
            frame(VirtAddr(huge_at).page())?,
            frame(VirtAddr(small_at).page())?,
        );
        Ok(ZeroFrames {
            small,
            huge: (first != small).then(|| first..first + HUGE_PAGE / PAGE_SIZE),
            _mapped: mapping,
        })
    }

    /// Whether `frame` holds the kernel's zeros.
    pub fn contains(&self, frame: u64) -> bool {
        frame == self.small || self.huge.as_ref().is_some_and(|huge| huge.contains(&frame))
    }
}

/// Bytes in a transparent huge page on x86-64, and on arm64 with 4 KiB base pages.
const HUGE_PAGE: u64 = 2 << 20;

/// Anonymous memory of our own.
#[derive(Debug)]
struct Mapping {
    start: u64,
    len: u64,
}

impl Mapping {
    fn new(len: u64) -> Result<Mapping, Errno> {
        // SAFETY: a new private mapping overlaps nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let mapping = Mapping {
            start: start as u64,
            len,
        };
        // SAFETY: the range is the mapping made above.
        unsafe { libc::madvise(start, len as usize, libc::MADV_NOHUGEPAGE) };
        Ok(mapping)
    }

    fn allow_huge(&self, at: u64) {
        assert!(at >= self.start && at + HUGE_PAGE <= self.start + self.len);
        // SAFETY: the range was just checked to be inside our own mapping. A refusal only means there is no huge zero page.
        unsafe { libc::madvise(at as *mut _, HUGE_PAGE as usize, libc::MADV_HUGEPAGE) };
    }

    fn touch(&self, at: u64) {
        assert!(at >= self.start && at < self.start + self.len);
        // SAFETY: the address was just checked to be inside our own readable mapping.
        unsafe { std::ptr::read_volatile(at as *const u8) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing but this struct refers to the mapping.
        unsafe { libc::munmap(self.start as *mut _, self.len as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_only_read_is_zero_frames_and_written_memory_is_not() {
        let zero = ZeroFrames::find().expect("this test needs CAP_SYS_ADMIN");
        let mapping = Mapping::new(2 * HUGE_PAGE).unwrap();
        mapping.touch(mapping.start);
        let mut written = vec![1u8; 3 * PAGE_SIZE as usize];
        written[4096] = 2;
        let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let in_zeros = |at: u64| {
            let mut found = None;
            let page = PageRange::from_start_len(VirtAddr(at).page(), 1).unwrap();
            pagemap
                .read(page, |_, entry| found = entry.frame())
                .unwrap();
            zero.contains(found.unwrap())
        };
        assert!(in_zeros(mapping.start));
        assert!(!in_zeros(written.as_ptr() as u64 + PAGE_SIZE));
        let huge_at = mapping.start.next_multiple_of(HUGE_PAGE);
        mapping.allow_huge(huge_at);
        mapping.touch(huge_at + 4096);
        assert!(in_zeros(huge_at + 4096));
    }
}
