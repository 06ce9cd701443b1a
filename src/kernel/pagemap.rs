//! The state of a process's pages, and arming the next look: `PAGEMAP_SCAN`, the classic pagemap and `clear_refs`.
//!
//! A pid and a range of pages enter; runs of populated, written or soft-dirty pages leave. Sources: the kernel's
//! Documentation/admin-guide/mm/pagemap.rst and fs/proc/task_mmu.c.
#![allow(unsafe_code)]

use crate::memory::{PAGE_SIZE, PageNumber, PageRange};
use nix::errno::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// `/proc/PID/pagemap`, open. It stays with the memory the process had when it was opened: after an exec it shows
/// nothing, not the new image.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    pid: i32,
    /// Made at the first scan; who only reads entries needs none.
    regions: Vec<PageRegion>,
}

/// What a page is, as `PAGEMAP_SCAN` says it; a set of flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageIs(u64);

impl PageIs {
    /// No flag.
    pub const NOTHING: PageIs = PageIs(0);
    /// Written since it was last armed. Only has a meaning where a write-tracking userfaultfd is registered.
    pub const WRITTEN: PageIs = PageIs(1 << 1);
    /// Still the mapped file's page, not a private copy.
    pub const FILE: PageIs = PageIs(1 << 2);
    /// In memory.
    pub const PRESENT: PageIs = PageIs(1 << 3);
    /// In swap (also: a userfaultfd marker on a page that does not exist; such a page is never `WRITTEN`).
    pub const SWAPPED: PageIs = PageIs(1 << 4);
    /// The shared page of zeros.
    pub const ZERO: PageIs = PageIs(1 << 5);
    /// Written since `clear_refs`.
    pub const SOFT_DIRTY: PageIs = PageIs(1 << 7);

    /// The flags of both.
    pub const fn or(self, other: PageIs) -> PageIs {
        PageIs(self.0 | other.0)
    }

    /// Whether every flag of `other` is set.
    pub const fn has(self, other: PageIs) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Which pages a scan selects and whether it arms them.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Flags a page must have, all of them.
    pub all_of: PageIs,
    /// Flags of which a page must have one; [`PageIs::NOTHING`] asks for none.
    pub any_of: PageIs,
    /// Flags a page must not have.
    pub none_of: PageIs,
    /// Flags to report with each run. Fewer flags make longer runs.
    pub report: PageIs,
    /// Demand that a write-tracking userfaultfd covers the range ([`ScanError::NotTracked`] otherwise).
    pub tracked: bool,
    /// Write-protect what is selected, so that [`PageIs::WRITTEN`] means "since now" at the next scan. Needs `tracked`.
    pub arm: bool,
}

/// Why a range could not be scanned.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum ScanError {
    /// Part of the range is not registered with a write-tracking userfaultfd. The part before it may have been armed
    /// and its runs are lost: treat every populated page of the range as written.
    #[error("{range} of process {pid} is not registered for write tracking")]
    NotTracked {
        /// The process.
        pid: i32,
        /// The range asked for.
        range: PageRange,
    },
    /// The process has exited.
    #[error("process {pid} has exited")]
    Exited {
        /// The process.
        pid: i32,
    },
    /// This kernel has no `PAGEMAP_SCAN` (before 6.7).
    #[error("this kernel has no PAGEMAP_SCAN")]
    NoScan,
    /// The kernel refused.
    #[error("{what} of process {pid}: {errno}")]
    Refused {
        /// What was being done.
        what: &'static str,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl Pagemap {
    /// Opens the pagemap of `pid`.
    pub fn open(pid: i32) -> Result<Pagemap, ScanError> {
        let file = File::open(format!("/proc/{pid}/pagemap"))
            .map_err(|error| refused("opening the pagemap", pid, errno_of(&error)))?;
        Ok(Pagemap {
            file,
            pid,
            regions: Vec::new(),
        })
    }

    /// Calls `each` with the runs of `range` that `query` selects, in address order, and their reported flags.
    ///
    /// Arming and selecting are one step for each page: a write is either in this scan or in the next.
    pub fn scan(
        &mut self,
        range: PageRange,
        query: Query,
        mut each: impl FnMut(PageRange, PageIs),
    ) -> Result<(), ScanError> {
        self.regions.resize(REGIONS, PageRegion::default());
        let mut arg = ScanArg::new(range, query, &mut self.regions);
        while arg.start < arg.end {
            // SAFETY: `arg` has the layout of struct pm_scan_arg and `arg.vec` points at `vec_len` regions that live
            // in `self` and are not touched during the call.
            let filled = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let filled = Errno::result(filled).map_err(|errno| match errno {
                Errno::EPERM if query.tracked => ScanError::NotTracked {
                    pid: self.pid,
                    range,
                },
                Errno::ENOTTY => ScanError::NoScan,
                errno => refused("PAGEMAP_SCAN", self.pid, errno),
            })?;
            for region in &self.regions[..filled as usize] {
                let (start, end) = (region.start / PAGE_SIZE, region.end / PAGE_SIZE);
                if let Some(run) = PageRange::new(PageNumber(start), PageNumber(end)) {
                    each(run, PageIs(region.categories));
                }
            }
            // `walk_end` lags behind the runs when a call reaches the end after flushing the kernel's own smaller buffer
            // (seen on 6.18); going on from there would report those runs twice.
            let reported = self.regions[..filled as usize]
                .last()
                .map_or(0, |last| last.end);
            let walked = arg.walk_end.max(reported);
            if walked <= arg.start {
                return Err(refused(
                    "PAGEMAP_SCAN made no progress",
                    self.pid,
                    Errno::EIO,
                ));
            }
            arg.start = walked;
        }
        Ok(())
    }

    /// Calls `each` with every page of `range` and its classic pagemap entry, in address order. Works on every kernel.
    pub fn read(
        &self,
        range: PageRange,
        mut each: impl FnMut(PageNumber, Entry),
    ) -> Result<(), ScanError> {
        let mut buffer = [0u8; 32 * 1024];
        for chunk in range.chunks(buffer.len() as u64 / ENTRY_BYTES) {
            let bytes = &mut buffer[..(chunk.pages() * ENTRY_BYTES) as usize];
            let read = self
                .file
                .read_at(bytes, chunk.start().0 * ENTRY_BYTES)
                .map_err(|error| refused("reading the pagemap", self.pid, errno_of(&error)))?;
            if read < bytes.len() {
                return Err(ScanError::Exited { pid: self.pid });
            }
            for (index, entry) in bytes.chunks_exact(ENTRY_BYTES as usize).enumerate() {
                let entry = Entry(u64::from_ne_bytes(entry.try_into().expect("eight bytes")));
                each(PageNumber(chunk.start().0 + index as u64), entry);
            }
        }
        Ok(())
    }
}

/// One 64-bit entry of the classic pagemap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry(u64);

impl Entry {
    /// In memory (bit 63).
    pub const fn present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }
    /// In swap (bit 62).
    pub const fn swapped(self) -> bool {
        self.0 >> 62 & 1 == 1
    }
    /// Still the mapped file's page, or shared anonymous memory (bit 61).
    pub const fn file(self) -> bool {
        self.0 >> 61 & 1 == 1
    }
    /// Write-protected by a userfaultfd (bit 57).
    pub const fn uffd_protected(self) -> bool {
        self.0 >> 57 & 1 == 1
    }
    /// Mapped by this process alone (bit 56).
    pub const fn exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }
    /// Written since `clear_refs` (bit 55).
    pub const fn soft_dirty(self) -> bool {
        self.0 >> 55 & 1 == 1
    }
    /// Where the page is: its frame, or its slot in swap. Pages of one process in the same place are one page.
    /// `None` if it does not exist, or the kernel does not show frames (`CAP_SYS_ADMIN`).
    pub const fn place(self) -> Option<u64> {
        let place = self.0 & ((1 << 55) - 1);
        if (self.present() || self.swapped()) && place != 0 {
            Some(place | (self.swapped() as u64) << 55)
        } else {
            None
        }
    }
    /// The physical frame of a present page, if the kernel shows it (`CAP_SYS_ADMIN`).
    pub const fn frame(self) -> Option<u64> {
        let frame = self.0 & ((1 << 55) - 1);
        if self.present() && frame != 0 {
            Some(frame)
        } else {
            None
        }
    }
}

/// Clears every soft-dirty bit of `pid`. Writes between reading the bits and this call are lost: stop the process first.
pub fn clear_soft_dirty(pid: i32) -> Result<(), ScanError> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "4")
        .map_err(|error| refused("clearing the soft-dirty bits", pid, errno_of(&error)))
}

/// Runs one `PAGEMAP_SCAN` call can fill in; 96 KiB.
const REGIONS: usize = 4096;
const ENTRY_BYTES: u64 = 8;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

impl ScanArg {
    fn new(range: PageRange, query: Query, regions: &mut [PageRegion]) -> ScanArg {
        let mut flags = 0;
        if query.tracked {
            flags |= PM_SCAN_CHECK_WPASYNC;
        }
        if query.arm {
            flags |= PM_SCAN_WP_MATCHING;
        }
        ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start: range.start().addr().0,
            end: range.end().addr().0,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            // An inverted flag in the mask means "must not be".
            category_inverted: query.none_of.0,
            category_mask: query.all_of.0 | query.none_of.0,
            category_anyof_mask: query.any_of.0,
            return_mask: query.report.0,
        }
    }
}

fn refused(what: &'static str, pid: i32, errno: Errno) -> ScanError {
    match errno {
        Errno::ESRCH | Errno::ENOENT => ScanError::Exited { pid },
        errno => ScanError::Refused { what, pid, errno },
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{PageSet, VirtAddr};

    const POPULATED: Query = Query {
        all_of: PageIs::NOTHING,
        any_of: PageIs::PRESENT.or(PageIs::SWAPPED),
        none_of: PageIs::FILE,
        report: PageIs::PRESENT,
        tracked: false,
        arm: false,
    };

    fn pages_of(memory: &[u8]) -> PageRange {
        let start = memory.as_ptr() as u64;
        PageRange::from_addrs(VirtAddr(start), VirtAddr(start + memory.len() as u64)).unwrap()
    }

    /// Anonymous pages of which none exists yet.
    fn fresh(pages: usize) -> &'static mut [u8] {
        let bytes = pages * PAGE_SIZE as usize;
        // SAFETY: a new private mapping overlaps nothing and is leaked, so the slice stays valid.
        unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            assert_eq!(libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE), 0);
            std::slice::from_raw_parts_mut(start.cast(), bytes)
        }
    }

    #[test]
    fn a_scan_goes_on_where_a_full_vector_stopped_it() {
        let memory = fresh(4 * REGIONS);
        for page in memory.chunks_mut(2 * PAGE_SIZE as usize) {
            page[0] = 1;
        }
        let mut pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let (mut set, mut runs) = (PageSet::new(), 0);
        pagemap
            .scan(pages_of(memory), POPULATED, |run, flags| {
                assert!(flags.has(PageIs::PRESENT));
                set.insert(run);
                runs += 1;
            })
            .unwrap();
        assert_eq!((set.pages(), runs), (2 * REGIONS as u64, 2 * REGIONS));
    }

    #[test]
    fn the_classic_pagemap_and_the_scan_agree() {
        let memory = fresh(64);
        memory[5 * 4096] = 1;
        memory[9 * 4096] = 1;
        assert_eq!(std::hint::black_box(memory[20 * 4096]), 0);
        let range = pages_of(memory);
        let mut pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let (mut scanned, mut read, mut zero) = (PageSet::new(), PageSet::new(), PageSet::new());
        let query = Query {
            report: PageIs::ZERO,
            ..POPULATED
        };
        pagemap
            .scan(range, query, |run, flags| {
                scanned.insert(run);
                if flags.has(PageIs::ZERO) {
                    zero.insert(run);
                }
            })
            .unwrap();
        pagemap
            .read(range, |page, entry| {
                if entry.present() || entry.swapped() {
                    read.insert(PageRange::from_start_len(page, 1).unwrap());
                    assert!(!entry.file() && !entry.uffd_protected());
                }
            })
            .unwrap();
        assert_eq!(scanned.pages(), 3);
        assert_eq!(scanned, read);
        assert_eq!(zero.pages(), 1);
        assert!(zero.contains(PageNumber(range.start().0 + 20)));
    }

    #[test]
    fn a_range_without_a_userfaultfd_is_not_tracked() {
        let memory = fresh(1);
        memory[0] = 1;
        let pid = std::process::id() as i32;
        let query = Query {
            tracked: true,
            ..POPULATED
        };
        let range = pages_of(memory);
        assert_eq!(
            Pagemap::open(pid).unwrap().scan(range, query, |_, _| {}),
            Err(ScanError::NotTracked { pid, range })
        );
    }

    #[test]
    fn the_pagemap_of_a_dead_process_says_so() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let pagemap = Pagemap::open(pid).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let range = PageRange::from_start_len(PageNumber(16), 1).unwrap();
        assert_eq!(
            pagemap.read(range, |_, _| {}),
            Err(ScanError::Exited { pid })
        );
        assert!(matches!(Pagemap::open(pid), Err(ScanError::Exited { .. })));
    }
}
