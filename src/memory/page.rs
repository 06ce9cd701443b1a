//! Addresses and pages as types, so that a byte count is never taken for a page count.

use std::fmt;

/// Bytes in a base page. The engine supports x86-64 and arm64 kernels with 4 KiB base pages.
pub const PAGE_SIZE: u64 = 4096;

/// A byte address in a process of the container.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtAddr(pub u64);

impl VirtAddr {
    /// The page this address lies in.
    pub const fn page(self) -> PageNumber {
        PageNumber(self.0 / PAGE_SIZE)
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The number of a page: its address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(pub u64);

impl PageNumber {
    /// One past the largest page number a user address can have (2^57 bytes: five-level paging).
    pub const LIMIT: PageNumber = PageNumber((1 << 57) / PAGE_SIZE);

    /// The address of the page's first byte.
    pub const fn addr(self) -> VirtAddr {
        VirtAddr(self.0 * PAGE_SIZE)
    }
}

impl fmt::Debug for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// A non-empty half-open run of pages, `start..end`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    start: PageNumber,
    end: PageNumber,
}

impl PageRange {
    /// The run `start..end`, or `None` if it is empty, reversed or beyond [`PageNumber::LIMIT`].
    pub const fn new(start: PageNumber, end: PageNumber) -> Option<PageRange> {
        if start.0 < end.0 && end.0 <= PageNumber::LIMIT.0 {
            Some(PageRange { start, end })
        } else {
            None
        }
    }

    /// The run of `pages` pages from `start`, or `None` on the terms of [`PageRange::new`].
    pub const fn from_start_len(start: PageNumber, pages: u64) -> Option<PageRange> {
        match start.0.checked_add(pages) {
            Some(end) => PageRange::new(start, PageNumber(end)),
            None => None,
        }
    }

    /// The pages that the bytes `start..end` touch, or `None` if there are none.
    pub const fn from_addrs(start: VirtAddr, end: VirtAddr) -> Option<PageRange> {
        PageRange::new(
            PageNumber(start.0 / PAGE_SIZE),
            PageNumber(end.0.div_ceil(PAGE_SIZE)),
        )
    }

    /// The first page.
    pub const fn start(self) -> PageNumber {
        self.start
    }

    /// One past the last page.
    pub const fn end(self) -> PageNumber {
        self.end
    }

    /// How many pages; at least one.
    pub const fn pages(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// How many bytes.
    pub const fn bytes(self) -> u64 {
        self.pages() * PAGE_SIZE
    }

    /// Whether `page` is in the run.
    pub const fn contains(self, page: PageNumber) -> bool {
        self.start.0 <= page.0 && page.0 < self.end.0
    }

    /// What the two runs share, if anything.
    pub fn intersection(self, other: PageRange) -> Option<PageRange> {
        PageRange::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The run cut into pieces of at most `pages` pages, in order. `pages` must not be zero.
    pub fn chunks(self, pages: u64) -> impl Iterator<Item = PageRange> {
        (self.start.0..self.end.0)
            .step_by(usize::try_from(pages).expect("a chunk fits in memory"))
            .map(move |start| PageRange {
                start: PageNumber(start),
                end: PageNumber((start + pages).min(self.end.0)),
            })
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}..{:?}", self.start.addr(), self.end.addr())
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One address space of the container, numbered by the source in order of discovery.
///
/// A process keeps its number until it execs; a forked child gets a new one. Process ids are mapped to spaces only at
/// the freeze, so reuse of a pid during the rounds cannot mix two memories.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct SpaceId(pub u32);
