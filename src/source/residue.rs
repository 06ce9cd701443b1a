//! What CRIU says the container has and the target has no copy of.
//!
//! CRIU's pagemaps, written while everything is frozen, are the last word on which pages exist. Whatever they leave to
//! the parent must be at the target: pages that no scan reported (CRIU's own parasite touches a page of code, a mapping
//! may appear in the last instant) are found here and sent.
//!
//! What the last scan found, under CRIU's hold, is sent here as well. While CRIU's parasite is in a process, one page of code
//! holds its code, and a read at that moment carries it away; and the kernel writes when CRIU interrupts a system call, which a task
//! that sleeps in the v1 freezer is in until then.

use crate::criu::images::{ImageError, Mappings, Pagemap};
use crate::memory::PageSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why the skeleton's pagemaps cannot be read.
#[derive(Debug, Error)]
pub enum ResidueError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The pagemap.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is not a pagemap.
    #[error("{path}: {source}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ImageError,
    },
}

/// The pages of the process `vpid` that the dump in `images` leaves to the engine and that are not in `sent`, and those
/// that are in `written`.
pub fn residue(
    images: &Path,
    vpid: i32,
    sent: Option<&PageSet>,
    written: &PageSet,
) -> Result<PageSet, ResidueError> {
    let pagemap = read(images, &format!("pagemap-{vpid}.img"), Pagemap::parse)?;
    let wanted: PageSet = pagemap.in_parent().collect();
    let mut missing = wanted.clone();
    if let Some(sent) = sent {
        missing.subtract(sent);
    }
    for range in written.iter() {
        for part in wanted.intersecting(range) {
            missing.insert(part);
        }
    }
    Ok(missing)
}

/// Takes those of `pages` of the process `vpid` out that its copy can run without: CRIU restores their mappings through
/// userfaultfd.
pub fn take_lazy(images: &Path, vpid: i32, pages: &mut PageSet) -> Result<PageSet, ResidueError> {
    let mappings = read(images, &format!("mm-{vpid}.img"), Mappings::parse)?;
    let lazy: PageSet = mappings
        .vmas
        .iter()
        .filter(|vma| vma.lazy)
        .flat_map(|vma| pages.intersecting(vma.range))
        .collect();
    pages.subtract(&lazy);
    Ok(lazy)
}

fn read<T>(
    images: &Path,
    name: &str,
    parse: impl Fn(&[u8]) -> Result<T, ImageError>,
) -> Result<T, ResidueError> {
    let path = images.join(name);
    let bytes = fs::read(&path).map_err(|source| ResidueError::File {
        path: path.clone(),
        source,
    })?;
    parse(&bytes).map_err(|source| ResidueError::Image { path, source })
}
