//! Reading another process's memory in large runs.
//!
//! Runs of pages enter, their bytes leave in one buffer, with the list of pages that could not be read. A page is never
//! passed off as zeros: what is not there is named.
//!
//! # Pages that forked processes share
//!
//! `process_vm_readv` pins what it reads, and the kernel pins no anonymous page that another process may still share: it
//! gives the one that is read a copy of its own first (`gup_must_unshare` in mm/internal.h, since Linux 5.19). Read that way, a
//! prefork server's memory would grow at the source to the sum of what its processes see. `/proc/PID/mem` looks without
//! pinning and leaves such pages shared; it copies page by page and takes about four times as long.

use super::maps::{self, FileKinds, MapsError};
use super::pagemap::{Entry, Pagemap, ScanError};
use crate::memory::{PAGE_SIZE, PageNumber, PageRange, PageSet};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

/// The memory of one process, open for reading.
///
/// Fast reads go by pid, so after an exec they show the new image; the dirty tracker notices the exec and numbers the
/// new image as a new space.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: i32,
    /// `/proc/PID/mem`, for pages that `process_vm_readv` may not read (no `PROT_READ`) or would copy.
    mem: File,
    /// Says which pages are shared, if any may be.
    pagemap: Option<Pagemap>,
}

/// Why memory could not be read at all.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The process has exited.
    #[error("process {pid} has exited")]
    Exited {
        /// The process.
        pid: i32,
    },
    /// The buffer and the runs have different sizes.
    #[error("a buffer of {buffer} bytes for runs of {runs} bytes")]
    BufferSize {
        /// Bytes in the buffer.
        buffer: u64,
        /// Bytes in the runs.
        runs: u64,
    },
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
    /// The mappings, needed to tell missing pages from unreadable ones, are not known.
    #[error("telling missing pages from unreadable ones")]
    Maps(#[source] MapsError),
    /// The page map, needed to tell shared pages from others, is not known.
    #[error("telling shared pages from others")]
    Sharing(#[source] ScanError),
}

impl ProcessMemory {
    /// Opens the memory of `pid` (a process id or, if its leader has exited, the id of a living thread), which shares no
    /// page with another.
    pub fn open(pid: i32) -> Result<ProcessMemory, ReadError> {
        let mem = File::open(format!("/proc/{pid}/mem"))
            .map_err(|error| refused("opening the memory", pid, errno_of(&error)))?;
        Ok(ProcessMemory {
            pid,
            mem,
            pagemap: None,
        })
    }

    /// Opens memory that may share pages with other processes. Reading leaves them shared.
    pub fn open_shared(pid: i32) -> Result<ProcessMemory, ReadError> {
        let pagemap = Pagemap::open(pid).map_err(sharing)?;
        Ok(ProcessMemory {
            pagemap: Some(pagemap),
            ..ProcessMemory::open(pid)?
        })
    }

    /// The pid it was opened with.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// For each page of `runs`, in order, the frame it shares with another process; `None` if it shares none, or was
    /// opened as memory that does not.
    ///
    /// True at the moment of asking. Frames are used again: two pages are one only if their content is the same, too.
    pub fn shared_frames(&self, runs: &[PageRange]) -> Result<Vec<Option<u64>>, ReadError> {
        let mut frames = Vec::new();
        for &run in runs {
            match &self.pagemap {
                Some(pagemap) => pagemap
                    .read(run, |_, entry| {
                        frames.push(entry.frame().filter(|_| is_shared(entry)));
                    })
                    .map_err(sharing)?,
                None => frames.resize(frames.len() + run.pages() as usize, None),
            }
        }
        Ok(frames)
    }

    /// Reads `runs`, in order, into `buffer`, which must hold exactly their bytes.
    ///
    /// Returns the pages that are not there (unmapped since they were listed, or without content to read). Their bytes
    /// in `buffer` mean nothing.
    pub fn read_runs(
        &self,
        runs: &[PageRange],
        buffer: &mut [u8],
    ) -> Result<Vec<PageRange>, ReadError> {
        let bytes = runs.iter().map(|run| run.bytes()).sum();
        if buffer.len() as u64 != bytes {
            return Err(ReadError::BufferSize {
                buffer: buffer.len() as u64,
                runs: bytes,
            });
        }
        let mut missing = PageSet::new();
        let Some(pagemap) = &self.pagemap else {
            self.read_pinned(runs, buffer, &mut missing)?;
            return Ok(missing.iter().collect());
        };
        let mut rest = buffer;
        let mut here;
        for (shared, runs) in by_sharing(pagemap, runs).map_err(sharing)? {
            let bytes: u64 = runs.iter().map(|run| run.bytes()).sum();
            (here, rest) = rest.split_at_mut(bytes as usize);
            if !shared {
                self.read_pinned(&runs, here, &mut missing)?;
                continue;
            }
            for run in runs {
                let buffer;
                (buffer, here) = here.split_at_mut(run.bytes() as usize);
                self.read_slowly(run, buffer, &mut missing)?;
            }
        }
        Ok(missing.iter().collect())
    }

    /// Reads `runs` with as few calls as possible, and adds to `missing` what is not there.
    fn read_pinned(
        &self,
        runs: &[PageRange],
        buffer: &mut [u8],
        missing: &mut PageSet,
    ) -> Result<(), ReadError> {
        let mut todo = Todo::new(runs);
        let mut mapped: Option<PageSet> = None;
        let mut done = 0usize;
        while let Some(next) = todo.front() {
            let read = self.read_some(&todo, &mut buffer[done..])?;
            todo.advance(read / PAGE_SIZE);
            done += (read - read % PAGE_SIZE) as usize;
            if read > 0 {
                continue;
            }
            // The first page cannot be read. Skip what is unmapped in one step, and try the rest the slow way.
            let mapped = match &mapped {
                Some(mapped) => mapped,
                None => mapped.insert(self.mapped()?),
            };
            let (run, there) = leading(mapped, next);
            let bytes = run.bytes() as usize;
            if there {
                self.read_slowly(run, &mut buffer[done..done + bytes], missing)?;
            } else {
                missing.insert(run);
            }
            todo.advance(run.pages());
            done += bytes;
        }
        Ok(())
    }

    /// One `process_vm_readv`: whole pages from the front of `todo`, zero if the first cannot be read that way.
    fn read_some(&self, todo: &Todo<'_>, buffer: &mut [u8]) -> Result<u64, ReadError> {
        let (mut vectors, mut bytes) = (Vec::with_capacity(IOV_MAX), 0);
        for run in todo.runs() {
            let len = run.bytes().min(RW_MAX - bytes);
            vectors.push(RemoteIoVec {
                base: run.start().addr().0 as usize,
                len: len as usize,
            });
            bytes += len;
            if bytes == RW_MAX || vectors.len() == IOV_MAX {
                break;
            }
        }
        let mut local = [IoSliceMut::new(&mut buffer[..bytes as usize])];
        match process_vm_readv(Pid::from_raw(self.pid), &mut local, &vectors) {
            // A short count stops at the first page that cannot be read; a part of a page is read again.
            Ok(read) => Ok(read as u64 / PAGE_SIZE * PAGE_SIZE),
            Err(Errno::EFAULT) => Ok(0),
            Err(errno) => Err(refused("process_vm_readv", self.pid, errno)),
        }
    }

    /// Reads one mapped run through `/proc/PID/mem`, which ignores protection, and adds to `missing` what is not there.
    fn read_slowly(
        &self,
        run: PageRange,
        buffer: &mut [u8],
        missing: &mut PageSet,
    ) -> Result<(), ReadError> {
        let mut done = 0u64;
        while done < run.bytes() {
            let read = self
                .mem
                .read_at(&mut buffer[done as usize..], run.start().addr().0 + done);
            match read {
                Ok(0) => return Err(ReadError::Exited { pid: self.pid }),
                Ok(read) => done += read as u64,
                // Mapped, yet without content: past the end of a file, a guard page, poisoned.
                Err(error) if errno_of(&error) == Errno::EIO => {
                    let page = PageNumber(run.start().0 + done / PAGE_SIZE);
                    if let Some(page) = PageRange::from_start_len(page, 1) {
                        missing.insert(page);
                    }
                    done = (done / PAGE_SIZE + 1) * PAGE_SIZE;
                }
                Err(error) => {
                    return Err(refused("reading /proc/PID/mem", self.pid, errno_of(&error)));
                }
            }
        }
        Ok(())
    }

    fn mapped(&self) -> Result<PageSet, ReadError> {
        match maps::read(self.pid, &mut FileKinds::default()) {
            Ok(vmas) => Ok(vmas.iter().map(|vma| vma.range).collect()),
            Err(MapsError::Exited { pid }) => Err(ReadError::Exited { pid }),
            Err(error) => Err(ReadError::Maps(error)),
        }
    }
}

/// Whether reading the page by pinning it would copy it. One in swap may be.
fn is_shared(entry: Entry) -> bool {
    (entry.present() || entry.swapped()) && !entry.exclusive() && !entry.file()
}

/// `runs` cut where sharing begins and ends: groups in order, each with whether its pages are shared.
fn by_sharing(
    pagemap: &Pagemap,
    runs: &[PageRange],
) -> Result<Vec<(bool, Vec<PageRange>)>, ScanError> {
    let mut groups: Vec<(bool, Vec<PageRange>)> = Vec::new();
    for &run in runs {
        // A run begins anew even where the one before ends: they need not be one.
        let mut begins = true;
        pagemap.read(run, |page, entry| {
            let (shared, one) = (is_shared(entry), PageRange::from_start_len(page, 1));
            let begins = std::mem::take(&mut begins);
            let Some(one) = one else { return };
            match groups.last_mut() {
                Some((like, runs)) if *like == shared => match runs.last_mut() {
                    Some(last) if !begins => {
                        *last = PageRange::new(last.start(), one.end()).unwrap_or(*last);
                    }
                    _ => runs.push(one),
                },
                _ => groups.push((shared, vec![one])),
            }
        })?;
    }
    Ok(groups)
}

fn sharing(error: ScanError) -> ReadError {
    match error {
        ScanError::Exited { pid } => ReadError::Exited { pid },
        error => ReadError::Sharing(error),
    }
}

/// The kernel's `UIO_MAXIOV`.
const IOV_MAX: usize = 1024;
/// The kernel's `MAX_RW_COUNT`: a larger request is silently cut short.
const RW_MAX: u64 = 2_147_479_552;

/// What is left to read of a list of runs.
struct Todo<'a> {
    runs: &'a [PageRange],
    /// Pages of the first run that are done.
    skip: u64,
}

impl<'a> Todo<'a> {
    fn new(runs: &'a [PageRange]) -> Todo<'a> {
        Todo { runs, skip: 0 }
    }

    fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.runs.iter().enumerate().filter_map(|(index, run)| {
            let skip = if index == 0 { self.skip } else { 0 };
            PageRange::new(PageNumber(run.start().0 + skip), run.end())
        })
    }

    fn front(&self) -> Option<PageRange> {
        self.runs().next()
    }

    fn advance(&mut self, mut pages: u64) {
        while let Some((first, rest)) = self.runs.split_first() {
            let left = first.pages() - self.skip;
            if pages < left {
                self.skip += pages;
                return;
            }
            pages -= left;
            self.runs = rest;
            self.skip = 0;
        }
    }
}

/// The longest run at the front of `run` that is all mapped or all unmapped, and which. A mapped one is cut to
/// [`SLOW_RUN`] pages, so that fast reads are tried again soon.
fn leading(mapped: &PageSet, run: PageRange) -> (PageRange, bool) {
    let first = mapped.intersecting(run).into_iter().next();
    let (end, there) = match first {
        Some(hit) if hit.start() == run.start() => {
            (hit.end().min(PageNumber(run.start().0 + SLOW_RUN)), true)
        }
        Some(hit) => (hit.start(), false),
        None => (run.end(), false),
    };
    (PageRange::new(run.start(), end).unwrap_or(run), there)
}

/// Pages read through `/proc/PID/mem` at once; it copies page by page, so more gains nothing.
const SLOW_RUN: u64 = 256;

fn refused(what: &'static str, pid: i32, errno: Errno) -> ReadError {
    match errno {
        Errno::ESRCH | Errno::ENOENT => ReadError::Exited { pid },
        errno => ReadError::Refused { what, pid, errno },
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use crate::kernel::forked::Forked;
    use crate::memory::VirtAddr;

    /// Pages of this process, page `i` filled with byte `i + 1`.
    fn numbered(pages: usize) -> (*mut u8, PageRange) {
        let bytes = vec![0u8; (pages + 1) * 4096].leak();
        let start = bytes.as_ptr() as usize;
        let skip = start.next_multiple_of(4096) - start;
        let bytes = &mut bytes[skip..skip + pages * 4096];
        for (index, page) in bytes.chunks_mut(4096).enumerate() {
            page.fill(index as u8 + 1);
        }
        let first = VirtAddr(bytes.as_ptr() as u64).page();
        let range = PageRange::from_start_len(first, pages as u64).unwrap();
        (bytes.as_mut_ptr(), range)
    }

    fn run(range: PageRange, first: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(range.start().0 + first), pages).unwrap()
    }

    fn this_process() -> ProcessMemory {
        ProcessMemory::open(std::process::id() as i32).unwrap()
    }

    #[test]
    fn runs_are_read_in_order_with_nothing_between() {
        let (_, range) = numbered(20);
        let runs = [run(range, 3, 2), run(range, 9, 1), run(range, 17, 3)];
        let mut buffer = vec![0; 6 * 4096];
        assert!(
            this_process()
                .read_runs(&runs, &mut buffer)
                .unwrap()
                .is_empty()
        );
        let numbers: Vec<u8> = buffer.chunks(4096).map(|page| page[4095]).collect();
        assert_eq!(numbers, [4, 5, 10, 18, 19, 20]);
    }

    #[test]
    fn more_runs_than_one_call_takes_are_all_read() {
        let (_, range) = numbered(200);
        let runs: Vec<_> = (0..3000).map(|index| run(range, index % 200, 1)).collect();
        let mut buffer = vec![0; 3000 * 4096];
        assert!(
            this_process()
                .read_runs(&runs, &mut buffer)
                .unwrap()
                .is_empty()
        );
        for (index, page) in buffer.chunks(4096).enumerate() {
            assert!(page.iter().all(|&byte| byte == (index % 200) as u8 + 1));
        }
    }

    #[test]
    fn a_buffer_of_another_size_is_refused() {
        let (_, range) = numbered(2);
        let read = this_process().read_runs(&[range], &mut [0; 4096]);
        assert!(
            matches!(read, Err(ReadError::BufferSize { .. })),
            "{read:?}"
        );
    }

    fn frames_of(pid: i32, range: PageRange) -> Vec<Option<u64>> {
        let mut frames = Vec::new();
        Pagemap::open(pid)
            .unwrap()
            .read(range, |_, entry| frames.push(entry.frame()))
            .unwrap();
        frames
    }

    #[test]
    fn reading_leaves_what_forked_processes_share_shared() {
        let (start, range) = numbered(40);
        let child = Forked::new();
        // SAFETY: pages of a leaked vector that nothing else refers to. Writing gives this process its own copy.
        unsafe { start.add(7 * 4096).write_bytes(99, 4096) };
        let before = frames_of(child.pid(), range);
        let runs = [run(range, 0, 20), run(range, 20, 10), run(range, 35, 2)];
        let memory = ProcessMemory::open_shared(child.pid()).unwrap();
        let mut buffer = vec![0; 32 * 4096];
        assert!(memory.read_runs(&runs, &mut buffer).unwrap().is_empty());
        let numbers: Vec<u8> = buffer.chunks(4096).map(|page| page[4095]).collect();
        let expected: Vec<u8> = (1..=30).chain(36..=37).collect();
        assert_eq!(numbers, expected);

        assert_eq!(
            frames_of(child.pid(), range),
            before,
            "the child got copies"
        );
        let ours = frames_of(std::process::id() as i32, range);
        let same = |page: &usize| ours[*page].is_some() && ours[*page] == before[*page];
        let shared: Vec<usize> = (0..40).filter(same).collect();
        let expected: Vec<usize> = (0..40).filter(|&page| page != 7).collect();
        assert_eq!(shared, expected, "needs CAP_SYS_ADMIN, which shows frames");
        let told = memory.shared_frames(&[range]).unwrap();
        let shared_page = |page: usize| told[page] == before[page];
        assert!((0..40).all(|page| shared_page(page) == (page != 7)));
    }

    /// Why the other way exists. A kernel before 5.19 shares on.
    #[test]
    fn reading_by_pinning_copies_what_is_shared() {
        let (_, range) = numbered(4);
        let child = Forked::new();
        let before = frames_of(child.pid(), range);
        let memory = ProcessMemory::open(child.pid()).unwrap();
        let mut buffer = vec![0; 4 * 4096];
        memory.read_runs(&[range], &mut buffer).unwrap();
        let after = frames_of(child.pid(), range);
        assert!(
            after
                .iter()
                .zip(&before)
                .all(|(after, before)| after != before)
        );
    }

    #[test]
    fn unmapped_pages_are_named_and_unreadable_ones_are_read() {
        let page = 4096;
        let file = tempfile::tempfile().unwrap();
        file.set_len(page as u64).unwrap();
        // Far below where the kernel puts mappings by itself: those of other tests would fill the hole that is made here.
        let far_below = std::ptr::without_provenance_mut(0x20_0000_0000);
        // SAFETY: the mappings are new, or replace pages inside the first one, which nothing else uses.
        let start = unsafe {
            let start = libc::mmap(
                far_below,
                3000 * page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            let memory: *mut u8 = start.cast();
            for index in 0..3000 {
                memory.add(index * page).write_bytes(index as u8, page);
            }
            assert_eq!(libc::munmap(memory.add(10 * page).cast(), 2000 * page), 0);
            assert_eq!(
                libc::mprotect(memory.add(2100 * page).cast(), 5 * page, libc::PROT_NONE),
                0
            );
            // Two pages of a file that has one: reading the second is SIGBUS.
            let mapped = libc::mmap(
                memory.add(2200 * page).cast(),
                2 * page,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_FIXED,
                std::os::fd::AsRawFd::as_raw_fd(&file),
                0,
            );
            assert_ne!(mapped, libc::MAP_FAILED);
            VirtAddr(start as u64).page()
        };
        let range = PageRange::from_start_len(start, 3000).unwrap();
        let shared = ProcessMemory::open_shared(std::process::id() as i32).unwrap();
        for memory in [this_process(), shared] {
            check_unreadable(&memory, range);
        }
    }

    /// Reads what the test above has laid out.
    fn check_unreadable(memory: &ProcessMemory, range: PageRange) {
        let page = 4096;
        let mut buffer = vec![0xee; 3000 * page];
        let missing = memory.read_runs(&[range], &mut buffer).unwrap();
        assert_eq!(missing, [run(range, 10, 2000), run(range, 2201, 1)]);
        for (index, bytes) in buffer.chunks(page).enumerate() {
            match index {
                10..2010 | 2201 => {}
                2200 => assert!(bytes.iter().all(|&byte| byte == 0)),
                _ => assert!(
                    bytes.iter().all(|&byte| byte == index as u8),
                    "page {index}"
                ),
            }
        }
    }
}
