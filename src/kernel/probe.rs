//! What this kernel can do for dirty tracking, found by trying it on memory of our own; never by version number.
//!
//! Nothing enters, [`KernelFeatures`] leaves, with a reason for each "no".
//! Which known kernel bugs bite here is another room's question ([`super::bug_probes`], [`super::bugs`]).

use super::pagemap::{PageIs, Pagemap, Query, ScanError, clear_soft_dirty};
use super::scratch::Scratch;
use super::userfaultfd::{TrackError, WriteTracker, new_for_self};
use crate::memory::PageRange;
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::io::IoSliceMut;

/// What works here.
#[derive(Debug)]
pub struct KernelFeatures {
    /// The soft-dirty bit, cleared by `clear_refs` and set by writes.
    pub soft_dirty: Result<(), Missing>,
    /// `PAGEMAP_SCAN`.
    pub pagemap_scan: Result<(), Missing>,
    /// userfaultfd(2) makes userfaultfds.
    pub userfaultfd: Result<(), Missing>,
    /// Writes are tracked through a userfaultfd with `WP_ASYNC`.
    pub write_tracking: Result<WriteTracking, Missing>,
    /// `process_vm_readv`.
    pub read_memory: Result<(), Missing>,
    /// Other processes may be traced and their seccomp filters suspended.
    pub inject: Result<(), Missing>,
}

/// How write tracking behaves here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteTracking {
    /// Pages moved by `mremap` stay write-protected in memory that is no longer tracked (a kernel bug): such memory must
    /// be disarmed when it is registered.
    pub mremap_keeps_protection: bool,
    /// Pages stay write-protected when the userfaultfd is closed (a kernel bug): the next tracker finds them so.
    pub close_keeps_protection: bool,
}

impl WriteTracking {
    /// Whether memory that was never tracked by us may have protected pages, so that it must be disarmed first.
    pub fn protection_outlives_tracking(self) -> bool {
        self.mremap_keeps_protection || self.close_keeps_protection
    }
}

/// Why a feature cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// The kernel is built without the soft-dirty bit, or another tool holds it.
    #[error(
        "writes do not set the soft-dirty bit: the kernel is built without CONFIG_MEM_SOFT_DIRTY"
    )]
    SoftDirty,
    /// Pages could not be scanned.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The userfaultfd cannot track.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// A scan did not report exactly the written pages.
    #[error("a scan reported {reported} written pages where {expected} were")]
    Inexact {
        /// Pages reported.
        reported: u64,
        /// Pages written.
        expected: u64,
    },
    /// A system call is refused.
    #[error("{call}: {errno}")]
    Call {
        /// The system call.
        call: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The engine lacks a capability.
    #[error("the capability {0} is missing")]
    Capability(&'static str),
    /// The engine itself runs under a seccomp filter, and may then not suspend another's.
    #[error("this process runs under a seccomp filter (Seccomp: in /proc/self/status)")]
    Filtered,
}

impl KernelFeatures {
    /// Tries everything; takes about a millisecond.
    pub fn probe() -> KernelFeatures {
        KernelFeatures {
            soft_dirty: soft_dirty(),
            pagemap_scan: pagemap_scan(),
            userfaultfd: userfaultfd().map(drop),
            write_tracking: write_tracking(),
            read_memory: read_memory(),
            inject: inject(),
        }
    }
}

/// Tries the soft-dirty bit. It clears the bits of this process, which no one else tracks.
pub fn soft_dirty() -> Result<(), Missing> {
    let scratch = Scratch::new(1)?;
    let pid = std::process::id() as i32;
    let pagemap = Pagemap::open(pid)?;
    let dirty = || {
        let mut dirty = false;
        pagemap
            .read(scratch.range, |_, entry| dirty = entry.soft_dirty())
            .map(|()| dirty)
    };
    scratch.write(0);
    clear_soft_dirty(pid)?;
    let after_clear = dirty()?;
    scratch.write(0);
    if !after_clear && dirty()? {
        Ok(())
    } else {
        Err(Missing::SoftDirty)
    }
}

/// Tries `PAGEMAP_SCAN`.
pub fn pagemap_scan() -> Result<(), Missing> {
    let scratch = Scratch::new(4)?;
    scratch.write(1);
    let query = Query {
        all_of: PageIs::PRESENT,
        any_of: PageIs::NOTHING,
        none_of: PageIs::NOTHING,
        report: PageIs::PRESENT,
        tracked: false,
        arm: false,
    };
    expect(1, scan(&scratch, query)?)
}

/// Tries to track writes, on our own memory.
pub fn write_tracking() -> Result<WriteTracking, Missing> {
    const WRITTEN: Query = Query {
        all_of: PageIs::WRITTEN,
        any_of: PageIs::PRESENT,
        none_of: PageIs::FILE,
        report: PageIs::WRITTEN,
        tracked: true,
        arm: true,
    };
    let scratch = Scratch::new(4)?;
    (0..4).for_each(|page| scratch.write(page));
    let tracker = WriteTracker::new(userfaultfd()?)?;
    tracker.register(scratch.range)?;
    expect(4, scan(&scratch, WRITTEN)?)?;
    expect(0, scan(&scratch, WRITTEN)?)?;
    scratch.write(2);
    expect(1, scan(&scratch, WRITTEN)?)?;
    // All four pages are protected now. Where are they still, out of the tracked memory, and without a tracker?
    let moved = scratch.moved_over(Scratch::new(4)?)?;
    let mremap_keeps_protection = protected(moved.range)?;
    let left = Scratch::new(4)?;
    (0..4).for_each(|page| left.write(page));
    tracker.register(left.range)?;
    expect(4, scan(&left, WRITTEN)?)?;
    drop(tracker);
    Ok(WriteTracking {
        mremap_keeps_protection,
        close_keeps_protection: protected(left.range)?,
    })
}

/// Whether a page of the range is write-protected by a userfaultfd.
fn protected(range: PageRange) -> Result<bool, ScanError> {
    let mut protected = false;
    Pagemap::open(std::process::id() as i32)?
        .read(range, |_, entry| protected |= entry.uffd_protected())?;
    Ok(protected)
}

pub(super) fn userfaultfd() -> Result<std::os::fd::OwnedFd, Missing> {
    new_for_self().map_err(|errno| Missing::Call {
        call: "userfaultfd",
        errno,
    })
}

fn read_memory() -> Result<(), Missing> {
    let theirs = 7u8;
    let mut ours = [0u8];
    let remote = RemoteIoVec {
        base: std::ptr::from_ref(&theirs) as usize,
        len: 1,
    };
    let read = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut ours)], &[remote]);
    let call = "process_vm_readv";
    let read = read.map_err(|errno| Missing::Call { call, errno })?;
    expect(1, read as u64)?;
    capability("CAP_SYS_PTRACE", 19)
}

/// Tracing is not tried: there is no process here that it would be right to stop.
fn inject() -> Result<(), Missing> {
    capability("CAP_SYS_PTRACE", 19)?;
    capability("CAP_SYS_ADMIN", 21)?;
    match status_field("Seccomp:")?.trim() {
        "0" => Ok(()),
        _ => Err(Missing::Filtered),
    }
}

/// Whether this process has a capability, by its number in linux/capability.h.
fn capability(name: &'static str, number: u32) -> Result<(), Missing> {
    let effective = u64::from_str_radix(status_field("CapEff:")?.trim(), 16).unwrap_or(0);
    if effective >> number & 1 == 1 {
        Ok(())
    } else {
        Err(Missing::Capability(name))
    }
}

fn status_field(name: &str) -> Result<String, Missing> {
    let status =
        std::fs::read_to_string("/proc/thread-self/status").map_err(|error| Missing::Call {
            call: "reading /proc/thread-self/status",
            errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        })?;
    let field = status.lines().find_map(|line| line.strip_prefix(name));
    Ok(field.unwrap_or_default().to_owned())
}

pub(super) fn scan(scratch: &Scratch, query: Query) -> Result<u64, ScanError> {
    let mut pages = 0;
    Pagemap::open(std::process::id() as i32)?
        .scan(scratch.range, query, |run, _| pages += run.pages())?;
    Ok(pages)
}

fn expect(expected: u64, reported: u64) -> Result<(), Missing> {
    if expected == reported {
        Ok(())
    } else {
        Err(Missing::Inexact { reported, expected })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's own word on how it was built, where it gives it.
    fn configured(option: &str) -> Option<bool> {
        let config = std::process::Command::new("zcat")
            .arg("/proc/config.gz")
            .output()
            .ok()?;
        let text = String::from_utf8(config.stdout).ok()?;
        (!text.is_empty()).then(|| text.contains(&format!("{option}=y")))
    }

    #[test]
    fn soft_dirty_is_found_exactly_where_the_kernel_was_built_with_it() {
        let found = soft_dirty();
        println!("soft-dirty: {found:?}");
        if let Some(built) = configured("CONFIG_MEM_SOFT_DIRTY") {
            assert_eq!(found.is_ok(), built, "{found:?}");
        }
        assert!(
            matches!(found, Ok(()) | Err(Missing::SoftDirty)),
            "{found:?}"
        );
    }

    #[test]
    fn a_kernel_with_write_tracking_also_has_what_it_is_made_of() {
        let features = KernelFeatures::probe();
        println!("{features:#?}");
        features.read_memory.expect("tests run as root");
        features.inject.expect("tests run as root, without seccomp");
        if features.write_tracking.is_ok() {
            features.pagemap_scan.unwrap();
            features.userfaultfd.unwrap();
        }
    }
}
