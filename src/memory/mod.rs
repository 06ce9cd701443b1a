//! Addresses, pages, ranges and sets of pages: the vocabulary every other room speaks.
//!
//! Nothing here does I/O. A [`VirtAddr`] is a byte address in some process, a [`PageNumber`] is that
//! address divided by [`PAGE_SIZE`], a [`PageRange`] is a non-empty half-open run of pages, and a
//! [`PageSet`] is a sorted set of disjoint runs. All are in the *container's* address spaces unless a
//! doc comment says otherwise.

mod page;
mod page_set;

pub use page::{PAGE_SIZE, PageNumber, PageRange, SpaceId, VirtAddr};
pub use page_set::PageSet;
