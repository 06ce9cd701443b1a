//! Page requests from a hostile target: what is believed is within the promised bounds and encodes to what came.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::memory::{PageNumber, PageRange, SpaceId};
use migrate::wire::page_frame::MAX_PAGES;
use migrate::wire::page_request::{PageRequest, RECORD_LEN};
use migrate_fuzz::write_seeds;

fuzz_target!(
    init: write_seeds(seeds()),
    |input: &[u8]| {
        for bytes in input.as_chunks::<RECORD_LEN>().0 {
            let Ok(request) = PageRequest::decode(bytes) else { return };
            assert_eq!(request.encode(), *bytes);
            match request {
                PageRequest::Want { pages, .. } => assert!((1..=MAX_PAGES).contains(&pages.pages())),
                PageRequest::Missing { pages, .. } => assert!(pages.end() <= PageNumber::LIMIT),
                PageRequest::Received { .. } | PageRequest::MissingEnd | PageRequest::Complete => {}
            }
        }
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let pages = PageRange::from_start_len(PageNumber(1 << 34), 16).expect("a run");
    let space = SpaceId(3);
    let said = [
        PageRequest::Missing { space, pages },
        PageRequest::MissingEnd,
        PageRequest::Want { space, pages },
        PageRequest::Received { bytes: 1 << 20 },
        PageRequest::Complete,
    ];
    vec![said.iter().flat_map(|request| request.encode()).collect()]
}
