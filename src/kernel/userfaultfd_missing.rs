//! Supplying the missing pages of another process through a userfaultfd in MISSING mode.
//!
//! Enters: a userfaultfd that someone else created and registered (CRIU's restorer). Leaves: events and the
//! results of `UFFDIO_COPY`, `UFFDIO_ZEROPAGE` and `UFFDIO_WAKE`, with errno turned into meaning here and
//! nowhere else. Errno meanings are those of `fs/userfaultfd.c` and `mm/userfaultfd.c`, kernels 4.14 to 6.18.
#![allow(unsafe_code)]

use crate::memory::{PAGE_SIZE, PageNumber, PageRange, VirtAddr};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use userfaultfd::{Event, EventBuffer, Uffd};

/// What went wrong in a way that no retry repairs.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Reading the event queue failed.
    #[error("reading userfaultfd events: {0}")]
    Read(#[source] userfaultfd::Error),
    /// Making the descriptor non-blocking failed (poll reports an error on a blocking one).
    #[error("making a userfaultfd non-blocking: {0}")]
    NonBlocking(#[source] Errno),
    /// The kernel said an address is not page aligned, which a page number cannot be.
    #[error("an event names the unaligned address {0}")]
    Unaligned(VirtAddr),
    /// `UFFDIO_COPY` failed.
    #[error("UFFDIO_COPY of {bytes} bytes to {to}: {errno}")]
    Copy {
        /// Where to.
        to: VirtAddr,
        /// How much was asked for.
        bytes: usize,
        /// Why.
        errno: Errno,
    },
    /// `UFFDIO_ZEROPAGE` failed.
    #[error("UFFDIO_ZEROPAGE at {to}: {errno}")]
    Zero {
        /// Where.
        to: VirtAddr,
        /// Why.
        errno: Errno,
    },
}

/// What became of an attempt to place pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// So many pages, from the first on, are in place now; at least one. It may be fewer than asked for: the next
    /// attempt at the rest says why.
    Pages(u64),
    /// The first page is there already (EEXIST), and no event about it is unread. Nothing was placed and **nobody was woken**.
    Exists,
    /// The address space is being changed and an event about it waits to be read (EAGAIN). Read events, look the
    /// addresses up again, retry.
    Changing,
    /// The range is not inside one registered mapping (ENOENT), and no event about it is unread: it was not registered yet, was
    /// never registered, or spans the end of a mapping.
    NotRegistered,
    /// The address space is gone: the process has exited or called exec (ESRCH; ENOSPC before Linux 4.13).
    Gone,
    /// No memory for the page now, usually the memory limit of the process's own cgroup (ENOMEM). The kernel has
    /// run that cgroup's OOM killer already; retry later.
    NoMemory,
}

/// One event on a userfaultfd, in pages.
#[derive(Debug)]
pub enum MissingEvent {
    /// A thread touched this page and sleeps.
    Fault(PageNumber),
    /// The process forked; the child's memory has this descriptor.
    Fork(MissingUffd),
    /// `pages` pages moved from `from` to `to` (mremap).
    Remap {
        /// First page before.
        from: PageNumber,
        /// First page now.
        to: PageNumber,
        /// How many.
        pages: u64,
    },
    /// The contents of the range were thrown away (DONTNEED, FREE, REMOVE): it reads as zero from now on.
    Remove(PageRange),
    /// The range was unmapped.
    Unmap(PageRange),
}

/// A userfaultfd through which missing pages of one address space are supplied.
#[derive(Debug)]
pub struct MissingUffd {
    uffd: Uffd,
}

impl MissingUffd {
    /// Takes over a userfaultfd whose `UFFDIO_API` handshake is done, and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> Result<Self, UffdError> {
        set_nonblocking(fd.as_fd()).map_err(UffdError::NonBlocking)?;
        // SAFETY: the number comes from an OwnedFd given up in the same expression, so the new owner is the only one.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        Ok(MissingUffd { uffd })
    }

    /// Reads the waiting events, at most as many as `buffer` holds, in the kernel's order. Empty: none waits.
    ///
    /// Reading an event *completes* it: the thread that caused it goes on. The caller must have applied every event
    /// to its address map before it places another page, and must hold off placing pages meanwhile.
    pub fn read_events(&self, buffer: &mut EventBuffer) -> Result<Vec<MissingEvent>, UffdError> {
        let mut events = Vec::new();
        for event in self.uffd.read_events(buffer).map_err(UffdError::Read)? {
            events.push(match event.map_err(UffdError::Read)? {
                Event::Pagefault { addr, .. } => {
                    MissingEvent::Fault(VirtAddr(addr as usize as u64).page())
                }
                Event::Fork { uffd } => MissingEvent::Fork(MissingUffd { uffd }),
                Event::Remap { from, to, len } => MissingEvent::Remap {
                    from: aligned(from)?,
                    to: aligned(to)?,
                    pages: len as u64 / PAGE_SIZE,
                },
                Event::Remove { start, end } => match range(start, end) {
                    Some(range) => MissingEvent::Remove(range),
                    None => continue,
                },
                Event::Unmap { start, end } => match range(start, end) {
                    Some(range) => MissingEvent::Unmap(range),
                    None => continue,
                },
            });
        }
        Ok(events)
    }

    /// Copies whole pages from `data` to `to` on, waking whoever waits for the pages that were placed.
    ///
    /// `data` is a whole number of pages, at least one.
    pub fn copy(&self, to: PageNumber, data: &[u8]) -> Result<Placed, UffdError> {
        believable(|| self.copy_once(to, data))
    }

    fn copy_once(&self, to: PageNumber, data: &[u8]) -> Result<Placed, UffdError> {
        debug_assert!(!data.is_empty() && (data.len() as u64).is_multiple_of(PAGE_SIZE));
        let dst = to.addr();
        // SAFETY: the kernel only reads `data.len()` bytes at `data`, which is borrowed for the call. `dst` is an
        // address in the other process, checked by the kernel; it is never dereferenced here. Should the userfaultfd
        // belong to this very process, UFFDIO_COPY only fills pages that are not mapped, so it changes no live object.
        let copied = unsafe {
            self.uffd.copy(
                data.as_ptr().cast(),
                dst.0 as usize as *mut _,
                data.len(),
                true,
            )
        };
        match copied {
            Ok(bytes) => Ok(Placed::Pages(bytes as u64 / PAGE_SIZE)),
            // The crate hands on the kernel's signed count: negative or zero when nothing was copied.
            Err(userfaultfd::Error::PartiallyCopied(bytes)) => match i64::try_from(bytes) {
                Ok(bytes) if bytes >= PAGE_SIZE as i64 => {
                    Ok(Placed::Pages(bytes as u64 / PAGE_SIZE))
                }
                _ => Ok(Placed::Changing),
            },
            Err(userfaultfd::Error::CopyFailed(errno)) => meaning(Errno::from_raw(errno as i32))
                .map_err(|errno| UffdError::Copy {
                    to: dst,
                    bytes: data.len(),
                    errno,
                }),
            Err(other) => Err(UffdError::Read(other)),
        }
    }

    /// Maps the zero page at `to`, waking whoever waits for it.
    pub fn zero(&self, to: PageNumber) -> Result<Placed, UffdError> {
        believable(|| self.zero_once(to))
    }

    fn zero_once(&self, to: PageNumber) -> Result<Placed, UffdError> {
        let dst = to.addr();
        // SAFETY: as in `copy`: only a page that is not mapped is changed, in the address space of the userfaultfd.
        let zeroed = unsafe {
            self.uffd
                .zeropage(dst.0 as usize as *mut _, PAGE_SIZE as usize, true)
        };
        match zeroed {
            Ok(_) => Ok(Placed::Pages(1)),
            Err(userfaultfd::Error::ZeropageFailed(errno)) => {
                meaning(Errno::from_raw(errno as i32))
                    .map_err(|errno| UffdError::Zero { to: dst, errno })
            }
            Err(other) => Err(UffdError::Read(other)),
        }
    }

    /// Whether the address space is gone: its last process has exited or called exec, of which no event tells.
    ///
    /// Found by asking for a copy that cannot be made: the kernel looks whether the address space lives (ESRCH) before it
    /// reads the source, which lies where nothing is mapped. So whatever is at `page`, nothing is placed. (EFAULT, or
    /// before that ENOENT, EEXIST or EAGAIN: it lives.)
    pub fn is_gone(&self, page: PageNumber) -> bool {
        let dst = page.addr().0 as usize as *mut _;
        // SAFETY: the kernel reads the source as user memory and fails with EFAULT: page 0 is never mapped in this process,
        // which asks for no such mapping (`vm.mmap_min_addr`). `dst` is checked by the kernel and never dereferenced here.
        let copied = unsafe {
            let nowhere = std::ptr::null();
            self.uffd.copy(nowhere, dst, PAGE_SIZE as usize, false)
        };
        match copied {
            Err(userfaultfd::Error::CopyFailed(errno)) => {
                matches!(meaning(Errno::from_raw(errno as i32)), Ok(Placed::Gone))
            }
            _ => false,
        }
    }

    /// Wakes every thread that waits for a page in `range`; it faults again if the page is still missing.
    ///
    /// A range outside the address space is no error: nobody can wait there.
    pub fn wake(&self, range: PageRange) {
        // The only errors are "outside the address space" and a bad pointer, which this is not.
        let _ = self.uffd.wake(
            range.start().addr().0 as usize as *mut _,
            range.bytes() as usize,
        );
    }

    /// Wakes every waiting thread of the address space, wherever it waits.
    ///
    /// For one who takes over from a reader that died: faults it had read would otherwise sleep for ever. The kernel
    /// refuses a range that ends beyond the address space, whose size differs by architecture, so the user half
    /// is covered in powers of two, each without its last page and then that page.
    pub fn wake_all(&self) {
        for bit in 4..PageNumber::LIMIT.0.ilog2() {
            let (start, end) = (1u64 << bit, 1u64 << (bit + 1));
            for (start, end) in [(start, end - 1), (end - 1, end)] {
                if let Some(range) = PageRange::new(PageNumber(start), PageNumber(end)) {
                    self.wake(range);
                }
            }
        }
    }

    /// The same userfaultfd as a plain descriptor.
    pub fn into_fd(self) -> OwnedFd {
        // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, which the OwnedFd takes.
        unsafe { OwnedFd::from_raw_fd(self.uffd.into_raw_fd()) }
    }
}

impl AsFd for MissingUffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// Asks until the kernel's answer says something about the address space that the caller knows.
///
/// The kernel counts the changes whose events were not read, and refuses to place pages (EAGAIN) while there are any. But it looks
/// at the count before it looks for the mapping (since 6.9 also for longer, because the mapping is locked and not the address
/// space), so a change in between makes the mapping of a moved page absent (ENOENT), or shows the page of another mapping that
/// was moved over it (EEXIST). A change is counted before it can be seen, and until its event was read. So if the same is said
/// a second time, and no event was read meanwhile, then nothing was uncounted when it was said first, and it was true of
/// the address space as the events tell it. A success needs no such proof: it is counted and placed under one lock.
fn believable(mut place: impl FnMut() -> Result<Placed, UffdError>) -> Result<Placed, UffdError> {
    let mut before = None;
    loop {
        let placed = place()?;
        let doubtful = matches!(placed, Placed::Exists | Placed::NotRegistered);
        if !doubtful || before == Some(placed) {
            return Ok(placed);
        }
        before = Some(placed);
    }
}

fn meaning(errno: Errno) -> Result<Placed, Errno> {
    match errno {
        Errno::EEXIST => Ok(Placed::Exists),
        Errno::EAGAIN => Ok(Placed::Changing),
        Errno::ENOENT => Ok(Placed::NotRegistered),
        Errno::ESRCH | Errno::ENOSPC => Ok(Placed::Gone),
        Errno::ENOMEM => Ok(Placed::NoMemory),
        other => Err(other),
    }
}

fn aligned(addr: *mut std::ffi::c_void) -> Result<PageNumber, UffdError> {
    let addr = VirtAddr(addr as usize as u64);
    if addr.0.is_multiple_of(PAGE_SIZE) {
        Ok(addr.page())
    } else {
        Err(UffdError::Unaligned(addr))
    }
}

fn range(start: *mut std::ffi::c_void, end: *mut std::ffi::c_void) -> Option<PageRange> {
    PageRange::from_addrs(
        VirtAddr(start as usize as u64),
        VirtAddr(end as usize as u64),
    )
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
