//! What a post-copy target says on fault streams: which pages it needs, and what it has got.
//!
//! ```text
//!  0      4       8            16      24
//!  | kind | space | first page | pages |
//!  | u32  | u32   | u64        | u64   |
//! ```
//!
//! Records of one size, so that a reader never waits for a length. All integers are little-endian; a field that a kind
//! does not use is 0. The answers on the same stream are page frames.
//!
//! | kind | | space | first page | pages |
//! |---|---|---|---|---|
//! | 1 | want: the first page now, the others if it costs little | x | x | 1 to 256 |
//! | 2 | received: so many bytes of push frames are in the store, counted from the connection's start | | bytes | |
//! | 3 | missing: these owed pages have not arrived | x | x | x |
//! | 4 | end of the list of missing pages | | | |
//! | 5 | complete: every owed page has arrived | | | |

use super::page_frame::MAX_PAGES;
use crate::memory::{PageNumber, PageRange, SpaceId};
use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a record.
pub const RECORD_LEN: usize = size_of::<Record>();

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Default)]
#[repr(C)]
struct Record {
    kind: U32,
    space: U32,
    first: U64,
    pages: U64,
}

/// A target's word about owed pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageRequest {
    /// A task stands still at the first of these pages. At most [`MAX_PAGES`].
    Want {
        /// Whose.
        space: SpaceId,
        /// Which.
        pages: PageRange,
    },
    /// So many bytes of push frames are in the store by now, counted on this connection.
    Received {
        /// Their length on the streams, headers included.
        bytes: u64,
    },
    /// These owed pages have not arrived.
    Missing {
        /// Whose.
        space: SpaceId,
        /// Which.
        pages: PageRange,
    },
    /// No more are missing than were named.
    MissingEnd,
    /// Every owed page has arrived.
    Complete,
}

/// Why bytes are not a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum PageRequestError {
    /// A kind that this version does not know.
    #[error("a page request has the unknown kind {0}")]
    Kind(u32),
    /// No run, one that ends above the highest page, or one too long for its kind.
    #[error("a page request names {pages} pages from page {first:#x}")]
    Pages {
        /// The first page.
        first: u64,
        /// How many.
        pages: u64,
    },
    /// A field is set that its kind does not use.
    #[error("a page request of kind {0} sets a field it has no use for")]
    Unused(u32),
}

const WANT: u32 = 1;
const RECEIVED: u32 = 2;
const MISSING: u32 = 3;
const MISSING_END: u32 = 4;
const COMPLETE: u32 = 5;

impl PageRequest {
    /// The bytes to send.
    pub fn encode(self) -> [u8; RECORD_LEN] {
        let run = |kind: u32, space: SpaceId, pages: PageRange| Record {
            kind: kind.into(),
            space: space.0.into(),
            first: pages.start().0.into(),
            pages: pages.pages().into(),
        };
        let bare = |kind: u32| Record {
            kind: kind.into(),
            ..Record::default()
        };
        let record = match self {
            PageRequest::Want { space, pages } => run(WANT, space, pages),
            PageRequest::Received { bytes } => Record {
                first: bytes.into(),
                ..bare(RECEIVED)
            },
            PageRequest::Missing { space, pages } => run(MISSING, space, pages),
            PageRequest::MissingEnd => bare(MISSING_END),
            PageRequest::Complete => bare(COMPLETE),
        };
        zerocopy::transmute!(record)
    }

    /// Reads a record.
    pub fn decode(bytes: &[u8; RECORD_LEN]) -> Result<PageRequest, PageRequestError> {
        let record = Record::ref_from_bytes(bytes).expect("a record has no alignment and its size");
        let (kind, space) = (record.kind.get(), record.space.get());
        let (first, pages) = (record.first.get(), record.pages.get());
        let run = |most: u64| {
            PageRange::from_start_len(PageNumber(first), pages)
                .filter(|run| run.pages() <= most)
                .ok_or(PageRequestError::Pages { first, pages })
        };
        let unused = |fields: &[u64]| match fields.iter().all(|&field| field == 0) {
            true => Ok(()),
            false => Err(PageRequestError::Unused(kind)),
        };
        Ok(match kind {
            WANT => PageRequest::Want {
                space: SpaceId(space),
                pages: run(MAX_PAGES)?,
            },
            RECEIVED => {
                unused(&[space.into(), pages])?;
                PageRequest::Received { bytes: first }
            }
            MISSING => PageRequest::Missing {
                space: SpaceId(space),
                pages: run(u64::MAX)?,
            },
            MISSING_END | COMPLETE => {
                unused(&[space.into(), first, pages])?;
                if kind == COMPLETE {
                    PageRequest::Complete
                } else {
                    PageRequest::MissingEnd
                }
            }
            unknown => return Err(PageRequestError::Kind(unknown)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(first: u64, pages: u64) -> PageRange {
        PageRange::from_start_len(PageNumber(first), pages).expect("a test range is valid")
    }

    #[test]
    fn the_bytes_of_every_record_are_pinned() {
        let want = PageRequest::Want {
            space: SpaceId(0x0102),
            pages: pages(0x0304_0506, 0x0100),
        };
        assert_eq!(
            want.encode(),
            [
                1, 0, 0, 0, 2, 1, 0, 0, 6, 5, 4, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0
            ]
        );
        let received = PageRequest::Received {
            bytes: 0x0807_0605_0403_0201,
        };
        assert_eq!(
            received.encode(),
            [
                2, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0
            ]
        );
        let missing = PageRequest::Missing {
            space: SpaceId(7),
            pages: pages(1, 0x0001_0000_0000),
        };
        assert_eq!(
            missing.encode(),
            [
                3, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0
            ]
        );
        for (kind, record) in [(4, PageRequest::MissingEnd), (5, PageRequest::Complete)] {
            let mut bytes = [0; RECORD_LEN];
            bytes[0] = kind;
            assert_eq!(record.encode(), bytes);
        }
    }

    #[test]
    fn a_record_that_lies_is_refused() {
        let limit = PageNumber::LIMIT.0;
        let lie = |kind: u32, space: u32, first: u64, pages: u64| {
            let record = Record {
                kind: kind.into(),
                space: space.into(),
                first: first.into(),
                pages: pages.into(),
            };
            PageRequest::decode(&zerocopy::transmute!(record)).expect_err("a lie was believed")
        };
        for kind in [0, 6, u32::MAX] {
            assert_eq!(lie(kind, 0, 0, 0), PageRequestError::Kind(kind));
        }
        for kind in [WANT, MISSING] {
            for (first, pages) in [(1, 0), (limit, 1), (limit - 1, 2), (u64::MAX, u64::MAX)] {
                assert_eq!(
                    lie(kind, 1, first, pages),
                    PageRequestError::Pages { first, pages }
                );
            }
        }
        let long = PageRequestError::Pages {
            first: 0,
            pages: MAX_PAGES + 1,
        };
        assert_eq!(lie(WANT, 1, 0, MAX_PAGES + 1), long);
        for (kind, space, first, pages) in [
            (RECEIVED, 1, 9, 0),
            (RECEIVED, 0, 9, 1),
            (MISSING_END, 1, 0, 0),
            (MISSING_END, 0, 1, 0),
            (COMPLETE, 0, 0, 1),
        ] {
            assert_eq!(
                lie(kind, space, first, pages),
                PageRequestError::Unused(kind)
            );
        }
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(
            kind in 0u32..7, space in any::<u32>(), first in any::<u64>(), pages in 0u64..400, bare in any::<bool>()
        ) {
            let (space, pages) = if bare { (0, 0) } else { (space, pages) };
            let record = Record { kind: kind.into(), space: space.into(), first: first.into(), pages: pages.into() };
            let bytes: [u8; RECORD_LEN] = zerocopy::transmute!(record);
            if let Ok(request) = PageRequest::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
        }
    }
}
