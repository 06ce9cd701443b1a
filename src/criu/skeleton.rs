//! The synthetic parent: a previous dump that never happened.
//!
//! CRIU asked for an incremental dump writes, for every page its parent claims and that is not soft-dirty, only the
//! word "in the parent". The engine has the pages already, so it claims them all, and CRIU's dump shrinks to a skeleton
//! whose size and time do not depend on memory.

use super::images::{PagePlace, Pagemap, PagemapEntry, synthetic_inventory};
use crate::kernel::pagemap::{ScanError, clear_soft_dirty};
use crate::memory::PageRange;
use std::fs;
use std::io;
use std::path::Path;

/// CRIU before 4.2 counts the pages of an entry in 32 bits.
const MOST_PAGES_AN_ENTRY: u64 = 1 << 30;

/// A process all of whose pages are claimed.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The process (or a living thread of it) on this host.
    pub pid: i32,
    /// Its id in the container.
    pub vpid: i32,
    /// Its mappings when it was frozen, in ascending order.
    pub areas: Vec<PageRange>,
}

/// Writes a parent into the empty directory `parent`, in which every process has every page of its areas.
pub fn write_parent(parent: &Path, claims: &[Claim]) -> io::Result<()> {
    fs::write(
        parent.join("inventory.img"),
        synthetic_inventory(uptime_us()?),
    )?;
    fs::write(parent.join("pages-1.img"), [])?;
    for claim in claims {
        let entries = claim
            .areas
            .iter()
            .flat_map(|area| area.chunks(MOST_PAGES_AN_ENTRY))
            .map(|range| PagemapEntry {
                range,
                place: PagePlace::Here,
            })
            .collect();
        let pagemap = Pagemap {
            pages_id: 1,
            entries,
        };
        fs::write(
            parent.join(format!("pagemap-{}.img", claim.vpid)),
            pagemap.to_bytes(),
        )?;
    }
    Ok(())
}

/// Makes nothing of frozen processes look written since the claim was made, where the kernel has soft-dirty and CRIU will
/// look at it. Bits that are wanted must have been read before.
pub fn forget_writes(claims: &[Claim]) -> Result<(), ScanError> {
    claims
        .iter()
        .try_for_each(|claim| match clear_soft_dirty(claim.pid) {
            // A process that is gone has nothing to dump.
            Err(ScanError::Exited { .. }) => Ok(()),
            cleared => cleared,
        })
}

/// Microseconds since boot, suspend included, a minute ahead.
///
/// CRIU compares a task's start with the parent's time, in clock ticks, and takes a task that is not older for another
/// one that got the same pid (`detect_pid_reuse` in criu/mem.c); a task forked just before the freeze is not older.
fn uptime_us() -> io::Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    let seconds = now.tv_sec().cast_unsigned();
    Ok((seconds + 60) * 1_000_000 + now.tv_nsec().cast_unsigned() / 1000)
}
