//! Which of the known kernel bugs show here, found by trying them on memory of our own.
//!
//! What the kernel can do enters ([`KernelFeatures`]); [`Sightings`] leave. Only what is safe is tried: no probe can
//! hang, change another process or leave anything behind. What cannot be tried here (the feature is missing, no huge page
//! was to be had) is no sighting, and [`super::bugs`] goes by the version then.

use super::bugs::Bug;
use super::pagemap::{Entry, PageIs, Pagemap, Query, ScanError, clear_soft_dirty};
use super::probe::{KernelFeatures, Missing, scan, userfaultfd};
use super::scratch::{HUGE_PAGES, Scratch};
use super::userfaultfd::WriteTracker;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;

/// What was seen of each bug.
#[derive(Debug, Default)]
pub struct Sightings(Vec<(Bug, bool)>);

impl Sightings {
    /// Tries all that can be tried; takes a few milliseconds. Where there is soft-dirty, it clears this process's bits.
    pub fn look(kernel: &KernelFeatures) -> Sightings {
        let (tracks, soft_dirty) = (kernel.write_tracking.is_ok(), kernel.soft_dirty.is_ok());
        let mut sightings = Sightings::default();
        if let Ok(tracking) = &kernel.write_tracking {
            sightings.add(
                Bug::MremapKeepsProtection,
                Some(tracking.mremap_keeps_protection),
            );
            sightings.add(
                Bug::CloseKeepsProtection,
                Some(tracking.close_keeps_protection),
            );
            sightings.try_out(Bug::DroppedCopyLooksSwapped, dropped_copy_looks_swapped);
        }
        if kernel.pagemap_scan.is_ok() {
            sightings.try_out(Bug::HugeZeroNotFlagged, huge_zero_not_flagged);
            sightings.try_out(Bug::ScanLacksSoftDirty, scan_lacks_soft_dirty);
            if tracks || soft_dirty {
                let losing = || zero_split_loses_bits(tracks);
                sightings.try_out(Bug::ZeroSplitLosesBits, losing);
            }
        }
        if soft_dirty {
            sightings.try_out(Bug::MremapLosesSoftDirty, mremap_loses_soft_dirty);
        }
        sightings
    }

    /// Whether the bug showed; `None` if it was not or could not be tried.
    pub fn of(&self, bug: Bug) -> Option<bool> {
        let seen = self.0.iter().find(|(seen, _)| *seen == bug);
        seen.map(|(_, shows)| *shows)
    }

    /// Notes what was seen.
    pub fn add(&mut self, bug: Bug, shows: Option<bool>) {
        self.0.extend(shows.map(|shows| (bug, shows)));
    }

    fn try_out(&mut self, bug: Bug, probe: impl FnOnce() -> Result<Option<bool>, Missing>) {
        match probe() {
            Ok(shows) => self.add(bug, shows),
            Err(error) => tracing::debug!(?bug, %error, "could not be tried"),
        }
    }
}

/// Whether a private copy of a file's page, dropped while armed, looks swapped and not written.
pub fn dropped_copy_looks_swapped() -> Result<Option<bool>, Missing> {
    let file = File::from(
        memfd_create("migrate-probe", MFdFlags::MFD_CLOEXEC).map_err(refused("memfd_create"))?,
    );
    file.set_len(2 * crate::memory::PAGE_SIZE)
        .map_err(|error| Missing::Call {
            call: "ftruncate",
            errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        })?;
    let scratch = Scratch::of_file(&file, 2)?;
    (0..2).for_each(|page| scratch.write(page));
    let tracker = WriteTracker::new(userfaultfd()?)?;
    tracker.register(scratch.range)?;
    let own = Query {
        any_of: PageIs::PRESENT.or(PageIs::SWAPPED),
        none_of: PageIs::FILE,
        tracked: true,
        arm: true,
        ..report(PageIs::WRITTEN.or(PageIs::SWAPPED))
    };
    scan(&scratch, own)?;
    if !scratch.advise(scratch.first(1), libc::MADV_DONTNEED) {
        return Ok(None);
    }
    let mut hidden = false;
    each(&scratch, own, |page, is| {
        hidden |= page == 0 && is.has(PageIs::SWAPPED) && !is.has(PageIs::WRITTEN);
    })?;
    Ok(Some(hidden))
}

/// Whether pages lose their bits when a huge page is split and they become the page of zeros.
///
/// The split is asked for by `MADV_COLD` on one page of a huge page of which all others are zeros.
pub fn zero_split_loses_bits(by_protection: bool) -> Result<Option<bool>, Missing> {
    let Some(scratch) = huge_page(|scratch| scratch.write(0))? else {
        return Ok(None);
    };
    // Holds the protection as long as it lives.
    let _tracker = if by_protection {
        let tracker = WriteTracker::new(userfaultfd()?)?;
        tracker.register(scratch.range)?;
        let arm = Query {
            all_of: PageIs::WRITTEN,
            tracked: true,
            arm: true,
            ..report(PageIs::NOTHING)
        };
        scan(&scratch, arm)?;
        Some(tracker)
    } else {
        clear_soft_dirty(own_pid())?;
        scratch.write(0);
        None
    };
    let kept = |entry: Entry| {
        if by_protection {
            entry.uffd_protected()
        } else {
            entry.soft_dirty()
        }
    };
    let pagemap = Pagemap::open(own_pid())?;
    let count = |of: &dyn Fn(Entry) -> bool| {
        let mut pages = 0;
        pagemap.read(scratch.range, |_, entry| pages += u64::from(of(entry)))?;
        Ok::<u64, ScanError>(pages)
    };
    if count(&kept)? != HUGE_PAGES || !scratch.advise(scratch.first(1), libc::MADV_COLD) {
        return Ok(None);
    }
    let mut zeros = 0;
    each(&scratch, report(PageIs::ZERO), |_, is| {
        zeros += u64::from(is.has(PageIs::ZERO));
    })?;
    // Without zeros this kernel does not split, or does not replace: nothing was tried.
    Ok((zeros > 0).then_some(count(&kept)? < HUGE_PAGES))
}

/// Whether a scan does not say of the huge page of zeros that it is one.
pub fn huge_zero_not_flagged() -> Result<Option<bool>, Missing> {
    let read = |scratch: &Scratch| {
        scratch.read(0);
    };
    let Some(scratch) = huge_page(read)? else {
        return Ok(None);
    };
    let mut zeros = 0;
    each(&scratch, report(PageIs::ZERO), |_, is| {
        zeros += u64::from(is.has(PageIs::ZERO));
    })?;
    Ok(Some(zeros < HUGE_PAGES))
}

/// Whether a scan refuses to report the soft-dirty bit.
pub fn scan_lacks_soft_dirty() -> Result<Option<bool>, Missing> {
    let scratch = Scratch::new(1)?;
    scratch.write(0);
    match scan(&scratch, report(PageIs::SOFT_DIRTY)) {
        Ok(_) => Ok(Some(false)),
        Err(ScanError::Refused {
            errno: Errno::EINVAL,
            ..
        }) => Ok(Some(true)),
        Err(error) => Err(error.into()),
    }
}

/// Whether pages moved by `mremap` together with their page table do not get the soft-dirty bit.
pub fn mremap_loses_soft_dirty() -> Result<Option<bool>, Missing> {
    let (scratch, target) = (Scratch::aligned(HUGE_PAGES)?, Scratch::aligned(HUGE_PAGES)?);
    (0..HUGE_PAGES).for_each(|page| scratch.write(page));
    clear_soft_dirty(own_pid())?;
    let moved = scratch.moved_over(target)?;
    let mut clean = false;
    Pagemap::open(own_pid())?.read(moved.range, |_, entry| clean |= !entry.soft_dirty())?;
    Ok(Some(clean))
}

/// Whether the kernel shows which physical frames pages are in: what some remedies need.
pub fn shows_frames() -> Result<bool, Missing> {
    let scratch = Scratch::new(1)?;
    scratch.write(0);
    let mut shows = false;
    Pagemap::open(own_pid())?.read(scratch.range, |_, entry| shows = entry.frame().is_some())?;
    Ok(shows)
}

/// Memory that one touch of its first page has populated as a whole, if the kernel gives a huge page for it.
fn huge_page(touch: impl FnOnce(&Scratch)) -> Result<Option<Scratch>, Missing> {
    let scratch = Scratch::aligned(HUGE_PAGES)?;
    if !scratch.advise(scratch.range, libc::MADV_HUGEPAGE) {
        return Ok(None);
    }
    touch(&scratch);
    let populated = scan(&scratch, report(PageIs::NOTHING))?;
    Ok((populated == HUGE_PAGES).then_some(scratch))
}

/// All pages in memory, with these flags.
fn report(flags: PageIs) -> Query {
    Query {
        all_of: PageIs::NOTHING,
        any_of: PageIs::PRESENT,
        none_of: PageIs::NOTHING,
        report: flags,
        tracked: false,
        arm: false,
    }
}

/// Calls `each` with the number of every page selected, counted from the first of the mapping.
fn each(
    scratch: &Scratch,
    query: Query,
    mut each: impl FnMut(u64, PageIs),
) -> Result<(), ScanError> {
    Pagemap::open(own_pid())?.scan(scratch.range, query, |run, is| {
        for page in run.start().0..run.end().0 {
            each(page - scratch.range.start().0, is);
        }
    })
}

fn own_pid() -> i32 {
    std::process::id() as i32
}

fn refused(call: &'static str) -> impl FnOnce(Errno) -> Missing {
    move |errno| Missing::Call { call, errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_with_the_features_lets_try_is_tried() {
        let kernel = KernelFeatures::probe();
        let sightings = Sightings::look(&kernel);
        println!("{sightings:?}");
        if kernel.write_tracking.is_ok() {
            for bug in [
                Bug::MremapKeepsProtection,
                Bug::CloseKeepsProtection,
                Bug::DroppedCopyLooksSwapped,
            ] {
                assert!(sightings.of(bug).is_some(), "{bug:?}");
            }
        }
        if kernel.pagemap_scan.is_ok() {
            assert!(sightings.of(Bug::ScanLacksSoftDirty).is_some());
        }
        if kernel.soft_dirty.is_ok() {
            assert!(sightings.of(Bug::MremapLosesSoftDirty).is_some());
        }
        assert_eq!(sightings.of(Bug::HugetlbHoleHangs), None);
    }

    #[test]
    fn frames_are_shown_to_root() {
        assert!(shows_frames().unwrap());
    }
}
