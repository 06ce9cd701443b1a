//! A userfaultfd that tracks writes and never blocks a fault (`WP_ASYNC`, kernel ≥ 6.7).
//!
//! A fresh userfaultfd enters (made inside the tracked process by [`super::inject`]), ranges of that process are
//! registered with it, and [`super::pagemap`] then tells which of their pages were written. The kernel resolves every
//! write-protect fault by itself, so nobody has to listen on the descriptor; closing it takes all protection off (not on
//! every kernel: [`super::bugs::Bug::CloseKeepsProtection`]).
//! Sources: Documentation/admin-guide/mm/userfaultfd.rst, include/uapi/linux/userfaultfd.h, fs/userfaultfd.c.
#![allow(unsafe_code)]

use crate::memory::PageRange;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use userfaultfd::{RegisterMode, Uffd};

/// Write tracking of one address space. Registered ranges stay registered until unmapped, moved or dropped by exec.
#[derive(Debug)]
pub struct WriteTracker {
    uffd: Uffd,
}

/// Why a userfaultfd does not track.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The address space is gone: the process exited or replaced it by exec.
    #[error("the tracked memory is gone: its process has exited or called exec")]
    TargetExited,
    /// Nothing is mapped in the range any more.
    #[error("nothing is mapped at {range}")]
    NotMapped {
        /// The range asked for.
        range: PageRange,
    },
    /// Another userfaultfd, of the application or of a second tracker, holds part of the range.
    #[error("{range} is registered with another userfaultfd")]
    Taken {
        /// The range asked for.
        range: PageRange,
    },
    /// The kernel cannot track this kind of memory (`MAP_DROPPABLE`).
    #[error("the memory at {range} cannot be tracked")]
    Untrackable {
        /// The range asked for.
        range: PageRange,
    },
    /// The kernel has userfaultfd but not `WP_ASYNC`.
    #[error("this kernel's userfaultfd has no WP_ASYNC (it came with 6.7)")]
    NoAsync,
    /// The kernel refused.
    #[error("{what}: {errno}")]
    Refused {
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl WriteTracker {
    /// Takes a fresh userfaultfd into write-tracking use.
    pub fn new(fd: OwnedFd) -> Result<WriteTracker, TrackError> {
        let mut api = Api {
            api: UFFD_API,
            features: UFFD_FEATURE_PAGEFAULT_FLAG_WP
                | UFFD_FEATURE_WP_UNPOPULATED
                | UFFD_FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        // SAFETY: `api` has the layout of struct uffdio_api and outlives the call.
        let answer = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        match Errno::result(answer) {
            Ok(_) => {}
            Err(Errno::EINVAL) => return Err(TrackError::NoAsync),
            Err(errno) => {
                return Err(TrackError::Refused {
                    what: "UFFDIO_API",
                    errno,
                });
            }
        }
        // SAFETY: `fd` is an open userfaultfd and its ownership moves into the Uffd.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        Ok(WriteTracker { uffd })
    }

    /// Starts tracking every mapping in `range` (holes are allowed). Its pages all count as written until armed.
    pub fn register(&self, range: PageRange) -> Result<(), TrackError> {
        let (start, len) = extent(range);
        self.uffd
            .register_with_mode(start, len, RegisterMode::WRITE_PROTECT)
            .map(drop)
            .map_err(|error| meaning("UFFDIO_REGISTER", range, &error))
    }

    /// Takes the protection off every page of a registered range, so that all of it counts as written.
    pub fn disarm(&self, range: PageRange) -> Result<(), TrackError> {
        let (start, len) = extent(range);
        self.uffd
            .remove_write_protection(start, len, false)
            .map_err(|error| meaning("UFFDIO_WRITEPROTECT", range, &error))
    }
}

/// Makes a userfaultfd for this process's own memory, for probing.
pub fn new_for_self() -> Result<OwnedFd, Errno> {
    // SAFETY: userfaultfd(2) takes flags by value and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, NEW_FLAGS) };
    let fd = Errno::result(fd)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The flags every userfaultfd is made with. One that leaves the kernel's own faults alone (`UFFD_USER_MODE_ONLY`) is given to
/// everybody, and with `WP_ASYNC` none handles any.
pub(super) const NEW_FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
const USER_MODE_ONLY: libc::c_int = 1;

/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;

/// `struct uffdio_api`. The crate's own handshake cannot ask for `WP_ASYNC` on a descriptor it did not make.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

fn extent(range: PageRange) -> (*mut libc::c_void, usize) {
    (
        range.start().addr().0 as *mut libc::c_void,
        range.bytes() as usize,
    )
}

fn meaning(what: &'static str, range: PageRange, error: &userfaultfd::Error) -> TrackError {
    let errno = match error {
        userfaultfd::Error::SystemError(errno) => Errno::from_raw(*errno as i32),
        _ => Errno::EIO,
    };
    match errno {
        Errno::ESRCH => TrackError::TargetExited,
        // register: nothing at or above the range (ENOMEM), nothing in it or memory that cannot be tracked (EINVAL).
        Errno::ENOMEM | Errno::ENOENT => TrackError::NotMapped { range },
        Errno::EINVAL | Errno::EPERM => TrackError::Untrackable { range },
        Errno::EBUSY => TrackError::Taken { range },
        errno => TrackError::Refused { what, errno },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::pagemap::{PageIs, Pagemap, Query};
    use crate::memory::{PageNumber, VirtAddr};

    const WRITTEN: Query = Query {
        all_of: PageIs::WRITTEN,
        any_of: PageIs::PRESENT,
        none_of: PageIs::NOTHING,
        report: PageIs::WRITTEN,
        tracked: true,
        arm: true,
    };

    fn tracker() -> WriteTracker {
        WriteTracker::new(new_for_self().unwrap()).expect("this test needs WP_ASYNC")
    }

    /// Anonymous, populated pages of this process.
    fn populated(pages: usize) -> (*mut u8, PageRange) {
        // SAFETY: a new private mapping overlaps nothing; it is leaked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages * 4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        let range = PageRange::from_start_len(VirtAddr(start as u64).page(), pages as u64);
        (start.cast(), range.unwrap())
    }

    #[test]
    fn every_write_after_arming_is_seen_once() {
        let tracker = tracker();
        let (memory, range) = populated(8);
        tracker.register(range).unwrap();
        let mut pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let mut written = || {
            let mut pages = 0;
            let seen = |run: PageRange, _| pages += run.pages();
            pagemap.scan(range, WRITTEN, seen).unwrap();
            pages
        };
        assert_eq!(written(), 8);
        assert_eq!(written(), 0);
        // SAFETY: page 3 of the eight mapped above.
        unsafe { memory.add(3 * 4096).write_volatile(1) };
        assert_eq!(written(), 1);
        tracker.disarm(range).unwrap();
        assert_eq!(written(), 8);
    }

    #[test]
    fn a_range_held_by_another_userfaultfd_or_by_nothing_is_told_apart() {
        let (first, second) = (tracker(), tracker());
        let (_, range) = populated(2);
        first.register(range).unwrap();
        let taken = second.register(range);
        assert!(matches!(taken, Err(TrackError::Taken { .. })), "{taken:?}");
        let nowhere = PageRange::from_start_len(PageNumber(1), 1).unwrap();
        let nothing = second.register(nowhere);
        assert!(
            matches!(
                nothing,
                Err(TrackError::NotMapped { .. } | TrackError::Untrackable { .. })
            ),
            "{nothing:?}"
        );
    }
}
