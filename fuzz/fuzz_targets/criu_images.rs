//! CRIU's image files from a hostile peer: what parses holds only user pages, in order.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::criu::images::{Mappings, PagePlace, Pagemap, PagemapEntry};
use migrate::memory::{PageNumber, PageRange};
use migrate_fuzz::write_seeds;

fuzz_target!(
    init: write_seeds(seeds()),
    |input: &[u8]| {
        if let Ok(pagemap) = Pagemap::parse(input) {
            let mut free_from = PageNumber(0);
            for entry in &pagemap.entries {
                assert!(entry.range.start() >= free_from && entry.range.end() <= PageNumber::LIMIT);
                free_from = entry.range.end();
            }
            assert_eq!(Pagemap::parse(&pagemap.to_bytes()), Ok(pagemap));
        }
        if let Ok(mappings) = Mappings::parse(input) {
            assert!(mappings.vmas.is_sorted_by_key(|vma| vma.range));
            assert!(mappings.vmas.iter().all(|vma| vma.range.end() <= PageNumber::LIMIT));
        }
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let entry = |first, pages, place| PagemapEntry {
        range: PageRange::from_start_len(PageNumber(first), pages).expect("a range"),
        place,
    };
    let pagemap = Pagemap {
        pages_id: 1,
        entries: vec![
            entry(0x400, 3, PagePlace::Parent),
            entry(0x7_f000, 1, PagePlace::Here),
            entry(0x7_f001, 512, PagePlace::Lazy),
        ],
    };
    // IMG_COMMON_MAGIC, MM_MAGIC, then one record: field 14 twice, each a mapping of start, end, flags and status.
    let mapping = |start: [u8; 3], end: [u8; 3], status: u8| {
        let [s0, s1, s2] = start;
        let [e0, e1, e2] = end;
        vec![
            14 << 3 | 2,
            12,
            8,
            s0,
            s1,
            s2,
            16,
            e0,
            e1,
            e2,
            48,
            0x22,
            56,
            status,
        ]
    };
    let record = [
        mapping([0x80, 0x80, 0x01], [0x80, 0xc0, 0x01], 1),
        mapping([0x80, 0xc0, 0x01], [0x80, 0x80, 0x02], 4),
    ]
    .concat();
    let mut mm = 0x5456_4319u32.to_le_bytes().to_vec();
    mm.extend(0x5749_2820u32.to_le_bytes());
    mm.extend((record.len() as u32).to_le_bytes());
    mm.extend(record);
    Mappings::parse(&mm).expect("the hand-written seed is an mm image");
    vec![pagemap.to_bytes(), mm]
}
