//! Pages of our own to try the kernel on.
//!
//! A size enters, a private mapping leaves that nothing else refers to and that goes away when it is dropped.
#![allow(unsafe_code)]

use super::probe::Missing;
use crate::memory::{PAGE_SIZE, PageRange, VirtAddr};
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;

/// Pages in a transparent huge page, and in a page of page tables, on x86-64.
pub(crate) const HUGE_PAGES: u64 = 512;

/// A private mapping to try things on.
pub(crate) struct Scratch {
    pub(crate) range: PageRange,
}

impl Scratch {
    /// Memory without a file, of small pages.
    pub(crate) fn new(pages: u64) -> Result<Scratch, Missing> {
        let scratch = Scratch::map(pages, libc::PROT_READ | libc::PROT_WRITE, None)?;
        scratch.advise(scratch.range, libc::MADV_NOHUGEPAGE);
        Ok(scratch)
    }

    /// The first pages of `file`.
    pub(crate) fn of_file(file: &File, pages: u64) -> Result<Scratch, Missing> {
        Scratch::map(pages, libc::PROT_READ | libc::PROT_WRITE, Some(file))
    }

    /// So many pages beginning where a huge page could, within a larger mapping that is trimmed to them.
    pub(crate) fn aligned(pages: u64) -> Result<Scratch, Missing> {
        let whole = Scratch::new(pages + HUGE_PAGES)?;
        let start = whole.range.start().0.next_multiple_of(HUGE_PAGES);
        let range = PageRange::from_start_len(crate::memory::PageNumber(start), pages);
        let range = range.ok_or(Missing::Call {
            call: "mmap",
            errno: Errno::ENOMEM,
        })?;
        let before = PageRange::new(whole.range.start(), range.start());
        let behind = PageRange::new(range.end(), whole.range.end());
        for part in [before, behind].into_iter().flatten() {
            unmap(part);
        }
        std::mem::forget(whole);
        Ok(Scratch { range })
    }

    fn map(pages: u64, protection: libc::c_int, file: Option<&File>) -> Result<Scratch, Missing> {
        let (kind, fd) = match file {
            Some(file) => (0, file.as_raw_fd()),
            None => (libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: a new private mapping overlaps nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                (pages * PAGE_SIZE) as usize,
                protection,
                libc::MAP_PRIVATE | kind,
                fd,
                0,
            )
        };
        Scratch::at(start, pages, "mmap")
    }

    /// The same pages in the place of `target`, whose own are gone.
    pub(crate) fn moved_over(self, target: Scratch) -> Result<Scratch, Missing> {
        assert_eq!(self.range.pages(), target.range.pages());
        // SAFETY: both ranges are whole mappings of ours to which no reference exists; the second is replaced.
        let start = unsafe {
            libc::mremap(
                self.start().cast(),
                self.range.bytes() as usize,
                self.range.bytes() as usize,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                target.start(),
            )
        };
        let moved = Scratch::at(start, self.range.pages(), "mremap")?;
        std::mem::forget((self, target));
        Ok(moved)
    }

    fn at(start: *mut libc::c_void, pages: u64, call: &'static str) -> Result<Scratch, Missing> {
        let range = PageRange::from_start_len(VirtAddr(start as u64).page(), pages);
        match range {
            Some(range) if start != libc::MAP_FAILED => Ok(Scratch { range }),
            _ => Err(Missing::Call {
                call,
                errno: Errno::last(),
            }),
        }
    }

    fn start(&self) -> *mut u8 {
        self.range.start().addr().0 as *mut u8
    }

    /// Writes one byte of page number `page`, counted from the first.
    pub(crate) fn write(&self, page: u64) {
        // SAFETY: the byte is inside our own writable mapping.
        unsafe { self.byte(page).write_volatile(1) };
    }

    /// Reads that byte.
    pub(crate) fn read(&self, page: u64) -> u8 {
        // SAFETY: the byte is inside our own readable mapping.
        unsafe { self.byte(page).read_volatile() }
    }

    fn byte(&self, page: u64) -> *mut u8 {
        assert!(page < self.range.pages());
        self.start().wrapping_add((page * PAGE_SIZE) as usize)
    }

    /// The first `pages` of it.
    pub(crate) fn first(&self, pages: u64) -> PageRange {
        assert!((1..=self.range.pages()).contains(&pages));
        PageRange::from_start_len(self.range.start(), pages).unwrap_or(self.range)
    }

    /// `madvise` on a part of it. `false` if the kernel refuses.
    pub(crate) fn advise(&self, part: PageRange, advice: libc::c_int) -> bool {
        assert!(part.start() >= self.range.start() && part.end() <= self.range.end());
        // SAFETY: the range is inside our own mapping and nothing refers to what is in it.
        unsafe {
            libc::madvise(
                part.start().addr().0 as *mut libc::c_void,
                part.bytes() as usize,
                advice,
            ) == 0
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        unmap(self.range);
    }
}

/// Only for what belongs to a [`Scratch`].
fn unmap(range: PageRange) {
    // SAFETY: the range is (part of) a mapping that only its Scratch refers to, which is being dropped or trimmed.
    unsafe {
        libc::munmap(
            range.start().addr().0 as *mut libc::c_void,
            range.bytes() as usize,
        )
    };
}
