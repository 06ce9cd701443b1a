//! From CRIU's skeleton and the page store to images that restore.
//!
//! The skeleton's pagemaps say which pages exist; the pages CRIU left to its (synthetic) parent are in the store.
//!
//! ```text
//!  pagemap entry          mapping           becomes
//!  data in the skeleton   any               the same, data copied to its new place
//!  in the parent          lazy-eligible     LAZY: the pager brings it
//!  in the parent          any other         data, taken from the store
//! ```
//!
//! In post-copy pages of the second kind may still be owed; one of the third kind may not.
//!
//! A page that is in the parent and was never received fails the composing: it is proven here, before anything is
//! committed, that no byte is missing. Pages in the store that no process has any more are dropped from it.

use super::page_store::{PageStore, PageStoreError};
use crate::criu::images::{ImageError, MappedArea, Mappings, PagePlace, Pagemap, PagemapEntry};
use crate::memory::{PageRange, PageSet, SpaceId};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Pages of memory taken from the store at a time.
const CHUNK_PAGES: u64 = 256;

/// Why the images could not be composed.
#[derive(Debug, Error)]
pub enum ComposeError {
    /// An image file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// An image file is not what CRIU writes.
    #[error("{path}: {source}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ImageError,
    },
    /// The container has pages that were not sent.
    #[error("{pages} pages of process {vpid} were never received, the first at {first}")]
    Missing {
        /// The process, by its pid in the container.
        vpid: u32,
        /// How many.
        pages: u64,
        /// The first run of them.
        first: PageRange,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] PageStoreError),
}

/// How memory gets into the restored processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Where CRIU can, through userfaultfd from the store.
    Lazy,
    /// All of it in the images.
    InImages,
}

/// Composes the images of the process `vpid`, whose memory is `space`, in the directory `images`.
///
/// Afterwards the store holds of the space exactly what is delivered lazily. Returns those pages, in runs that do not
/// cross the end of a mapping.
pub fn compose(
    images: &Path,
    vpid: u32,
    space: SpaceId,
    store: &PageStore,
    delivery: Delivery,
) -> Result<Vec<PageRange>, ComposeError> {
    let pagemap_path = images.join(format!("pagemap-{vpid}.img"));
    let mut pagemap = read(&pagemap_path, Pagemap::parse)?;
    let mappings = read(&images.join(format!("mm-{vpid}.img")), Mappings::parse)?;
    let wanted: PageSet = pagemap.in_parent().collect();
    let mut lazy = mappings.vmas;
    lazy.retain(|vma| vma.lazy && delivery == Delivery::Lazy);
    let mut missing = store.missing(space, &wanted);
    missing.extend(&owed_for_ever(&store.owed(space), &wanted, &lazy));
    if let Some(first) = missing.iter().next() {
        return Err(ComposeError::Missing {
            vpid,
            pages: missing.pages(),
            first,
        });
    }

    let pages_path = images.join(format!("pages-{}.img", pagemap.pages_id));
    let composed_path = images.join(format!("pages-{}.img.composed", pagemap.pages_id));
    let mut dumped = File::open(&pages_path).map_err(at(&pages_path))?;
    let mut composed = BufWriter::new(File::create(&composed_path).map_err(at(&composed_path))?);
    let mut entries = Vec::with_capacity(pagemap.entries.len());
    let mut delivered = Vec::new();
    for entry in pagemap.entries {
        match entry.place {
            PagePlace::Here => {
                let copied = io::copy(&mut (&mut dumped).take(entry.range.bytes()), &mut composed)
                    .map_err(at(&pages_path))?;
                if copied != entry.range.bytes() {
                    let short = io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "shorter than its pagemap says",
                    );
                    return Err(at(&pages_path)(short));
                }
                entries.push(entry);
            }
            PagePlace::Lazy => entries.push(entry),
            PagePlace::Parent => {
                for (range, is_lazy) in split(entry.range, &lazy) {
                    if is_lazy {
                        delivered.push(range);
                    } else {
                        copy_from_store(store, space, range, &mut composed).map_err(|error| {
                            match error {
                                CopyError::Store(error) => ComposeError::Store(error),
                                CopyError::File(error) => at(&composed_path)(error),
                            }
                        })?;
                    }
                    let place = if is_lazy {
                        PagePlace::Lazy
                    } else {
                        PagePlace::Here
                    };
                    entries.push(PagemapEntry { range, place });
                }
            }
        }
    }
    composed.flush().map_err(at(&composed_path))?;
    pagemap.entries = entries;
    fs::write(&pagemap_path, pagemap.to_bytes()).map_err(at(&pagemap_path))?;
    fs::rename(&composed_path, &pages_path).map_err(at(&pages_path))?;
    store.retain(space, &delivered.iter().copied().collect())?;
    Ok(delivered)
}

/// Owed pages that nothing would wait for: those outside of mappings that are restored lazily.
fn owed_for_ever(owed: &PageSet, wanted: &PageSet, lazy: &[MappedArea]) -> PageSet {
    let mut for_ever: PageSet = wanted
        .iter()
        .flat_map(|range| owed.intersecting(range))
        .collect();
    for vma in lazy {
        for_ever.remove(vma.range);
    }
    for_ever
}

/// `range` cut at the borders of the lazy mappings, in order; whether each part is in one.
fn split(range: PageRange, lazy: &[MappedArea]) -> Vec<(PageRange, bool)> {
    let mut parts = Vec::new();
    let mut at = range.start();
    let first = lazy.partition_point(|vma| vma.range.end() <= range.start());
    for inside in lazy[first..]
        .iter()
        .map_while(|vma| vma.range.intersection(range))
    {
        parts.extend(PageRange::new(at, inside.start()).map(|gap| (gap, false)));
        parts.push((inside, true));
        at = inside.end();
    }
    parts.extend(PageRange::new(at, range.end()).map(|gap| (gap, false)));
    parts
}

enum CopyError {
    Store(PageStoreError),
    File(io::Error),
}

fn copy_from_store(
    store: &PageStore,
    space: SpaceId,
    range: PageRange,
    to: &mut impl Write,
) -> Result<(), CopyError> {
    let mut buffer = Vec::new();
    for chunk in range.chunks(CHUNK_PAGES) {
        buffer.resize(
            usize::try_from(chunk.bytes()).expect("a chunk fits in memory"),
            0,
        );
        store
            .read(space, chunk, &mut buffer)
            .map_err(CopyError::Store)?;
        to.write_all(&buffer).map_err(CopyError::File)?;
    }
    Ok(())
}

fn read<T>(path: &Path, parse: impl Fn(&[u8]) -> Result<T, ImageError>) -> Result<T, ComposeError> {
    let bytes = fs::read(path).map_err(at(path))?;
    parse(&bytes).map_err(|source| ComposeError::Image {
        path: path.to_path_buf(),
        source,
    })
}

fn at(path: &Path) -> impl Fn(io::Error) -> ComposeError + use<> {
    let path = path.to_path_buf();
    move |source| ComposeError::File {
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::images::mm_image;
    use crate::memory::PageNumber;
    use crate::target::page_store::{PageRun, PageStoreLimits, RunContent};

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(start), pages).unwrap()
    }

    #[test]
    fn a_run_is_cut_where_lazy_mappings_begin_and_end() {
        let lazy =
            [range(4, 2), range(8, 2), range(10, 2)].map(|range| MappedArea { range, lazy: true });
        assert_eq!(
            split(range(2, 9), &lazy),
            [
                (range(2, 2), false),
                (range(4, 2), true),
                (range(6, 2), false),
                (range(8, 2), true),
                (range(10, 1), true)
            ]
        );
        assert_eq!(split(range(20, 1), &lazy), [(range(20, 1), false)]);
    }

    const SPACE: SpaceId = SpaceId(1);

    /// A skeleton of process 1: two pages dumped, four left to the parent, the last two of them in a locked mapping.
    fn skeleton() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let entry = |range, place| PagemapEntry { range, place };
        let pagemap = Pagemap {
            pages_id: 5,
            entries: vec![
                entry(range(16, 1), PagePlace::Here),
                entry(range(17, 4), PagePlace::Parent),
                entry(range(40, 1), PagePlace::Here),
            ],
        };
        let write =
            |name: &str, bytes: &[u8]| fs::write(directory.path().join(name), bytes).unwrap();
        write("pagemap-1.img", &pagemap.to_bytes());
        write(
            "pages-5.img",
            &[vec![0xaa; 4096], vec![0xbb; 4096]].concat(),
        );
        write(
            "mm-1.img",
            &mm_image(&[
                (range(16, 3), false),
                (range(19, 2), true),
                (range(40, 1), false),
            ]),
        );
        directory
    }

    fn store(pages: &[(PageRange, RunContent)]) -> PageStore {
        let store = PageStore::new(PageStoreLimits {
            spaces: 4,
            bytes: 1 << 30,
        });
        for &(pages, content) in pages {
            let payload = match content {
                RunContent::Data => (pages.start().0..pages.end().0)
                    .flat_map(|page| vec![page as u8; 4096])
                    .collect(),
                RunContent::Zero | RunContent::Owed | RunContent::Same(_) => Vec::new(),
            };
            store
                .place(SPACE, &[PageRun { pages, content }], &payload)
                .unwrap();
        }
        store
    }

    fn composed(directory: &Path) -> (Pagemap, Vec<u8>) {
        let pagemap = fs::read(directory.join("pagemap-1.img")).unwrap();
        (
            Pagemap::parse(&pagemap).unwrap(),
            fs::read(directory.join("pages-5.img")).unwrap(),
        )
    }

    #[test]
    fn pages_of_the_parent_become_lazy_or_data_as_their_mapping_allows() {
        let directory = skeleton();
        let store = store(&[
            (range(17, 1), RunContent::Data),
            (range(18, 1), RunContent::Zero),
            (range(19, 2), RunContent::Data),
            (range(90, 1), RunContent::Data),
        ]);
        let lazy = compose(directory.path(), 1, SPACE, &store, Delivery::Lazy).unwrap();
        assert_eq!(lazy, [range(17, 2)]);
        let (pagemap, pages) = composed(directory.path());
        let places: Vec<_> = pagemap
            .entries
            .iter()
            .map(|entry| (entry.range, entry.place))
            .collect();
        assert_eq!(
            places,
            [
                (range(16, 1), PagePlace::Here),
                (range(17, 2), PagePlace::Lazy),
                (range(19, 2), PagePlace::Here),
                (range(40, 1), PagePlace::Here),
            ]
        );
        let expected = [
            vec![0xaa; 4096],
            vec![19; 4096],
            vec![20; 4096],
            vec![0xbb; 4096],
        ]
        .concat();
        assert_eq!(pages, expected);
        let kept: PageSet = [range(17, 2)].into_iter().collect();
        assert_eq!(
            store.received(SPACE),
            kept,
            "what no process has any more, and what went into the images, is dropped"
        );
    }

    #[test]
    fn without_a_pager_every_page_goes_into_the_images() {
        let directory = skeleton();
        let store = store(&[
            (range(17, 1), RunContent::Data),
            (range(18, 1), RunContent::Zero),
            (range(19, 2), RunContent::Data),
        ]);
        assert_eq!(
            compose(directory.path(), 1, SPACE, &store, Delivery::InImages).unwrap(),
            []
        );
        let (pagemap, pages) = composed(directory.path());
        assert!(
            pagemap
                .entries
                .iter()
                .all(|entry| entry.place == PagePlace::Here)
        );
        let expected = [
            vec![0xaa; 4096],
            vec![17; 4096],
            vec![0; 4096],
            vec![19; 4096],
            vec![20; 4096],
            vec![0xbb; 4096],
        ];
        assert_eq!(pages, expected.concat());
    }

    #[test]
    fn a_page_that_was_never_received_fails_the_composing() {
        let directory = skeleton();
        let store = store(&[
            (range(17, 1), RunContent::Data),
            (range(19, 2), RunContent::Data),
        ]);
        let missing = compose(directory.path(), 1, SPACE, &store, Delivery::Lazy);
        assert!(
            matches!(missing, Err(ComposeError::Missing { vpid: 1, pages: 1, first }) if first == range(18, 1))
        );
    }

    #[test]
    fn an_owed_page_may_only_be_one_that_is_restored_lazily() {
        let pages = |second| {
            [
                (range(17, 1), RunContent::Data),
                (range(18, 1), RunContent::Owed),
                (range(19, 2), second),
            ]
        };
        let directory = skeleton();
        let whole = store(&pages(RunContent::Data));
        let lazy = compose(directory.path(), 1, SPACE, &whole, Delivery::Lazy).unwrap();
        assert_eq!(lazy, [range(17, 2)]);
        assert_eq!(whole.owed(SPACE), [range(18, 1)].into_iter().collect());

        let locked = store(&pages(RunContent::Owed));
        let refused = compose(skeleton().path(), 1, SPACE, &locked, Delivery::Lazy);
        assert!(
            matches!(refused, Err(ComposeError::Missing { pages: 2, first, .. }) if first == range(19, 2))
        );
        let whole = store(&pages(RunContent::Data));
        let refused = compose(skeleton().path(), 1, SPACE, &whole, Delivery::InImages);
        assert!(
            matches!(refused, Err(ComposeError::Missing { pages: 1, first, .. }) if first == range(18, 1))
        );
    }

    #[test]
    fn a_pages_file_shorter_than_its_pagemap_says_is_refused() {
        let directory = skeleton();
        fs::write(directory.path().join("pages-5.img"), [0; 100]).unwrap();
        let store = store(&[(range(17, 4), RunContent::Data)]);
        let short = compose(directory.path(), 1, SPACE, &store, Delivery::Lazy);
        assert!(matches!(short, Err(ComposeError::File { .. })));
    }
}
