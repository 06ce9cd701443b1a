//! Page frames from a hostile peer: what is believed is within the promised bounds.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use migrate::memory::{PAGE_SIZE, PageNumber, PageRange, SpaceId};
use migrate::wire::codec::Codec;
use migrate::wire::page_frame::{
    Frame, FrameEncoder, HEADER_LEN, Header, MAX_OWED, MAX_PAGES, MAX_RAW, MAX_REST, MAX_RUNS, Run,
    RunKind, Scratch,
};
use migrate_fuzz::write_seeds;

fuzz_target!(
    init: write_seeds(frames()),
    |input: &[u8]| {
        let Some((head, rest)) = input.split_first_chunk::<HEADER_LEN>() else { return };
        let Ok(header) = Header::decode(head) else { return };
        assert!(header.rest_len() <= MAX_REST);
        // Longer inputs are cut as a stream would be; shorter ones must be refused.
        let rest = &rest[..rest.len().min(header.rest_len())];
        let Ok(frame) = Frame::decode(header, Bytes::copy_from_slice(rest)) else { return };
        assert!((1..=MAX_PAGES + MAX_OWED).contains(&frame.pages()));
        assert!((1..=MAX_RUNS).contains(&frame.runs().len()));
        let mut free_from = PageNumber(0);
        for run in frame.runs() {
            assert!(run.range.start() >= free_from && run.range.end() <= PageNumber::LIMIT);
            free_from = run.range.end();
        }
        if let Ok(raw) = frame.raw(&mut Scratch::new()) {
            assert!(raw.len() <= MAX_RAW);
            assert_eq!(raw.len(), frame.runs().iter().map(Run::raw_len).sum::<usize>());
        }
    }
);

fn frames() -> Vec<Vec<u8>> {
    let run = |first, pages, kind| Run {
        range: PageRange::from_start_len(PageNumber(first), pages).expect("a run"),
        kind,
    };
    let runs = [
        run(16, 1, RunKind::Data),
        run(17, 100, RunKind::Zero),
        run(200, 512, RunKind::Owed),
        run(800, 7, RunKind::Same(SpaceId(2))),
        run(1 << 35, 2, RunKind::Data),
    ];
    let raw = |pages: u64| -> Bytes {
        b"a key and its value; "
            .iter()
            .copied()
            .cycle()
            .take((pages * PAGE_SIZE) as usize)
            .collect()
    };
    let mut frames = Vec::new();
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let frame = FrameEncoder::new().encode(SpaceId(1), &runs, raw(3), codec);
        frames.push(frame.expect("a seed encodes").to_bytes().to_vec());
    }
    let zeros = [run(0, 256, RunKind::Zero)];
    let frame = FrameEncoder::new().encode(SpaceId(0), &zeros, Bytes::new(), Codec::None);
    frames.push(frame.expect("a seed encodes").to_bytes().to_vec());
    frames
}
