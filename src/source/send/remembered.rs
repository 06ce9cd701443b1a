//! What the target is known to have.

use super::REGION_PAGES;
use crate::memory::{PageNumber, SpaceId};
use std::collections::HashMap;

/// Hashes of pages that a worker remembers: with 24 bytes each 3 MiB, whatever the container's size.
pub(super) const REMEMBERED: usize = 1 << 17;

/// What zero pages are remembered as; no hash of a page is likelier to be it than any other value.
pub(super) const ZERO_HASH: u128 = 0;

/// What no page is remembered as, likewise.
const NOTHING: u128 = u128::MAX;

/// The content the target has of the pages sent last, by hash, in a table of fixed size; and of chosen spaces that of every
/// page, which takes 4 MiB for each GiB.
///
/// A page that fell out of the table is sent again: that costs bytes, never correctness. 128 bits, so that two
/// contents of one page do not meet by chance.
pub(super) struct Remembered {
    slots: Vec<Slot>,
    whole: HashMap<SpaceId, Regions>,
}

/// The hashes of a space's pages, by region.
type Regions = HashMap<u64, Box<[u128]>>;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Slot {
    /// Space and page, mixed; 0 is empty.
    key: u64,
    /// In two words: as a u128 it would be aligned to 16 bytes and a third of the table would be padding.
    hash: [u64; 2],
}

impl Remembered {
    pub fn new() -> Remembered {
        Remembered {
            slots: Vec::new(),
            whole: HashMap::new(),
        }
    }

    /// Remembers every page of the space that is looked at from here on.
    pub fn remember_all(&mut self, space: SpaceId) {
        self.whole.entry(space).or_default();
    }

    /// Forgets spaces that are no more.
    pub fn retain(&mut self, is_there: impl Fn(SpaceId) -> bool) {
        self.whole.retain(|space, _| is_there(*space));
    }

    /// Forgets what any page holds.
    pub fn forget(&mut self) {
        self.slots.clear();
        self.whole.values_mut().for_each(Regions::clear);
    }

    /// Whether the page has this content at the target; from now on it has.
    pub fn is_same(&mut self, space: SpaceId, page: PageNumber, hash: u128) -> bool {
        if let Some(regions) = self.whole.get_mut(&space) {
            let region = regions
                .entry(page.0 / REGION_PAGES)
                .or_insert_with(|| vec![NOTHING; REGION_PAGES as usize].into());
            let known = &mut region[(page.0 % REGION_PAGES) as usize];
            return std::mem::replace(known, hash) == hash;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_chosen_space_no_page_falls_out() {
        let (chosen, other) = (SpaceId(1), SpaceId(2));
        let mut remembered = Remembered::new();
        remembered.remember_all(chosen);
        let pages = 3 * REMEMBERED as u64;
        let all = |remembered: &mut Remembered, space| {
            let same = (0..pages).filter(|page| {
                let hash = u128::from(*page);
                remembered.is_same(space, PageNumber(*page), hash)
            });
            same.count() as u64
        };
        assert_eq!(all(&mut remembered, chosen), 0);
        assert_eq!(all(&mut remembered, other), 0);
        assert_eq!(all(&mut remembered, chosen), pages);
        assert!(all(&mut remembered, other) < pages / 2);
        remembered.forget();
        assert_eq!(all(&mut remembered, chosen), 0);
        assert_eq!(all(&mut remembered, chosen), pages, "still chosen");
        remembered.retain(|space| space != chosen);
        assert_eq!(all(&mut remembered, chosen), 0);
    }
}
