//! What the target is known to have.

use crate::memory::{PageNumber, SpaceId};

/// Hashes of pages that a worker remembers: with 24 bytes each 3 MiB, whatever the container's size.
pub(super) const REMEMBERED: usize = 1 << 17;

/// What zero pages are remembered as; no hash of a page is likelier to be it than any other value.
pub(super) const ZERO_HASH: u128 = 0;

/// The content the target has of the pages sent last, by hash, in a table of fixed size.
///
/// A page that fell out of the table is sent again: that costs bytes, never correctness. 128 bits, so that two
/// contents of one page do not meet by chance.
pub(super) struct Remembered {
    slots: Vec<Slot>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Slot {
    /// Space and page, mixed; 0 is empty.
    key: u64,
    /// In two words: as a u128 it would be aligned to 16 bytes and a third of the table would be padding.
    hash: [u64; 2],
}

impl Remembered {
    pub fn new() -> Remembered {
        Remembered { slots: Vec::new() }
    }

    /// Whether the page has this content at the target; from now on it has.
    pub fn is_same(&mut self, space: SpaceId, page: PageNumber, hash: u128) -> bool {
        if self.slots.is_empty() {
            self.slots.resize(
                REMEMBERED,
                Slot {
                    key: 0,
                    hash: [0; 2],
                },
            );
        }
        // Page numbers have 45 bits and a container has far fewer than 2^18 spaces: the key is unique but for that.
        let key = (page.0 << 18) | ((u64::from(space.0) + 1) & 0x3_ffff);
        let index = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - REMEMBERED.trailing_zeros());
        let slot = &mut self.slots[usize::try_from(index).expect("the index has 17 bits")];
        let hash = [hash as u64, (hash >> 64) as u64];
        let now = Slot { key, hash };
        std::mem::replace(slot, now) == now
    }
}
