//! What CRIU says the container has and the target has no copy of.
//!
//! CRIU's pagemaps, written while everything is frozen, are the last word on which pages exist. Whatever they leave to
//! the parent must be at the target: pages that no scan reported (CRIU's own parasite touches a page of code, a mapping
//! may appear in the last instant) are found here and sent.
//!
//! Two kinds of pages are held back from the delta and sent here as well, under CRIU's hold. Pages of executable mappings:
//! while CRIU's parasite is in a process, one such page holds its code, and a read at that moment would carry it away. And
//! pages to which the kernel writes when CRIU interrupts a system call ([`crate::kernel::interruption`]): a task that sleeps in
//! the v1 freezer is interrupted only then.

use crate::criu::images::{ImageError, Pagemap};
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
/// that are in `held_back`.
pub fn residue(
    images: &Path,
    vpid: i32,
    sent: Option<&PageSet>,
    held_back: &PageSet,
) -> Result<PageSet, ResidueError> {
    let path = images.join(format!("pagemap-{vpid}.img"));
    let bytes = fs::read(&path).map_err(|source| ResidueError::File {
        path: path.clone(),
        source,
    })?;
    let pagemap = Pagemap::parse(&bytes).map_err(|source| ResidueError::Image { path, source })?;
    let wanted: PageSet = pagemap.in_parent().collect();
    let mut missing = wanted.clone();
    if let Some(sent) = sent {
        missing.subtract(sent);
    }
    for range in held_back.iter() {
        for part in wanted.intersecting(range) {
            missing.insert(part);
        }
    }
    Ok(missing)
}
