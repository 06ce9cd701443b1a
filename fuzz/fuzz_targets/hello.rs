//! Hellos and stream headers: whatever decodes must encode to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::wire::stream::{self, StreamKind};
use migrate::wire::version::{Answer, HEAD_LEN, MAX_VERSIONS, Offer, Version, list_len};
use migrate_fuzz::write_seeds;

fuzz_target!(
    init: {
        let versions: Vec<Version> = (1..=MAX_VERSIONS as u16).map(Version).collect();
        write_seeds([
            Offer::ours().encode(),
            Offer { versions: versions.clone() }.encode(),
            Answer::Selected(Version(1)).encode(),
            Answer::Unsupported(versions).encode(),
            StreamKind::Pages.header(3).to_vec(),
        ]);
    },
    |input: &[u8]| {
        if let Some(head) = input.first_chunk::<HEAD_LEN>()
            && let Ok(len) = list_len(head)
        {
            assert!(len <= 2 * MAX_VERSIONS);
        }
        if let Ok(offer) = Offer::decode(input) {
            assert_eq!(offer.encode(), input);
            let _ = offer.answer(Version::SUPPORTED);
        }
        if let Ok(answer) = Answer::decode(input) {
            assert_eq!(answer.encode(), input);
        }
        if let Some(&header) = input.first_chunk::<{ stream::HEADER_LEN }>()
            && let Ok((kind, index)) = StreamKind::decode(header)
        {
            assert_eq!(kind.header(index), header);
        }
    }
);
