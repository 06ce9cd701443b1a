//! Reading another process's memory in large runs.
//!
//! Runs of pages enter, their bytes leave in one buffer, with the list of pages that could not be read. A page is never
//! passed off as zeros: what is not there is named.

use super::maps::{self, FileKinds, MapsError};
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
    /// `/proc/PID/mem`, for pages that `process_vm_readv` may not read (no `PROT_READ`).
    mem: File,
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
}

impl ProcessMemory {
    /// Opens the memory of `pid` (a process id or, if its leader has exited, the id of a living thread).
    pub fn open(pid: i32) -> Result<ProcessMemory, ReadError> {
        let mem = File::open(format!("/proc/{pid}/mem"))
            .map_err(|error| refused("opening the memory", pid, errno_of(&error)))?;
        Ok(ProcessMemory { pid, mem })
    }

    /// The pid it was opened with.
    pub fn pid(&self) -> i32 {
        self.pid
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
        let mut todo = Todo::new(runs);
        let mut missing = PageSet::new();
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
                self.read_slowly(run, &mut buffer[done..done + bytes], &mut missing)?;
            } else {
                missing.insert(run);
            }
            todo.advance(run.pages());
            done += bytes;
        }
        Ok(missing.iter().collect())
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

    #[test]
    fn unmapped_pages_are_named_and_unreadable_ones_are_read() {
        let page = 4096;
        let file = tempfile::tempfile().unwrap();
        file.set_len(page as u64).unwrap();
        // SAFETY: the mappings are new, or replace pages inside the first one, which nothing else uses.
        let start = unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                3000 * page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
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
        let mut buffer = vec![0xee; 3000 * page];
        let missing = this_process().read_runs(&[range], &mut buffer).unwrap();
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
