use super::*;
use proptest::prelude::*;

fn run(first: u64, pages: u64, kind: RunKind) -> Run {
    Run {
        range: PageRange::from_start_len(PageNumber(first), pages).expect("a test run is valid"),
        kind,
    }
}

/// Pages of text, which compress.
fn text(pages: usize) -> Bytes {
    b"live migration "
        .iter()
        .copied()
        .cycle()
        .take(pages * PAGE_SIZE as usize)
        .collect()
}

/// Pages of noise, which do not.
fn noise(pages: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..pages * PAGE_SIZE as usize / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

fn encode(runs: &[Run], raw: Bytes, codec: Codec) -> Result<EncodedFrame, FrameError> {
    FrameEncoder::new().encode(SpaceId(3), runs, raw, codec)
}

fn decode(bytes: &[u8]) -> Result<Frame, FrameError> {
    let (header, rest) = bytes.split_first_chunk().expect("a whole header");
    Frame::decode(Header::decode(header)?, Bytes::copy_from_slice(rest))
}

/// Decodes and verifies, as a receiver does.
fn receive(bytes: &[u8]) -> Result<Vec<u8>, FrameError> {
    decode(bytes)?.raw(&mut Scratch::new()).map(<[u8]>::to_vec)
}

/// A frame's bytes, put together by hand so that they can lie.
struct Lie {
    codec: u8,
    raw_len: u32,
    payload_len: u32,
    run_count: u16,
    runs: Vec<(u64, u32, u32)>,
    payload: Vec<u8>,
}

impl Lie {
    /// One data page of zeros from page 16, uncompressed: nothing wrong but the hash.
    fn new() -> Lie {
        Lie {
            codec: 0,
            raw_len: 4096,
            payload_len: 4096,
            run_count: 1,
            runs: vec![(16, 1, 0)],
            payload: vec![0; 4096],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"MPGF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend([self.codec, 0]);
        bytes.extend(self.run_count.to_le_bytes());
        bytes.extend(self.raw_len.to_le_bytes());
        bytes.extend(self.payload_len.to_le_bytes());
        bytes.extend([0; 20]);
        for (first, pages, kind) in &self.runs {
            bytes.extend(first.to_le_bytes());
            bytes.extend(pages.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
        }
        bytes.extend(&self.payload);
        bytes
    }

    fn error(change: impl FnOnce(&mut Lie)) -> FrameError {
        let mut lie = Lie::new();
        change(&mut lie);
        receive(&lie.bytes()).expect_err("a lie was believed")
    }
}

#[test]
fn the_bytes_of_a_frame_are_pinned() {
    let runs = [
        run(0x10, 2, RunKind::Zero),
        run(0x7fff_0000, 1, RunKind::Data),
    ];
    let frame = encode(&runs, Bytes::from(vec![0xaa; 4096]), Codec::None).expect("encodes");
    let expected_runs =
        b"\x10\0\0\0\0\0\0\0\x02\0\0\0\x01\0\0\0\0\0\xff\x7f\0\0\0\0\x01\0\0\0\0\0\0\0";
    assert_eq!(
        frame.head[..24],
        *b"MPGF\x03\0\0\0\0\0\x02\0\0\x10\0\0\0\x10\0\0\0\0\0\0"
    );
    assert_eq!(frame.head[40..], *expected_runs);
    let hashed = [&expected_runs[..], &[0xaa; 4096]].concat();
    assert_eq!(
        frame.head[24..40],
        xxhash_rust::xxh3::xxh3_128_with_seed(&hashed, 3).to_le_bytes()
    );
    assert_eq!(
        frame.head[24..40],
        [
            160, 91, 159, 174, 227, 14, 38, 94, 157, 130, 29, 202, 143, 182, 153, 120
        ]
    );
    assert_eq!(frame.payload, vec![0xaa; 4096]);
}

#[test]
fn content_survives_every_codec() {
    let runs = [
        run(1, 100, RunKind::Data),
        run(101, 56, RunKind::Zero),
        run(1000, 100, RunKind::Data),
    ];
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let raw = text(200);
        let frame = encode(&runs, raw.clone(), codec).expect("encodes");
        assert_eq!(frame.codec, codec);
        if codec != Codec::None {
            assert!(frame.payload.len() < raw.len() / 50, "text must shrink");
        }
        let bytes = frame.to_bytes();
        let received = decode(&bytes).expect("decodes");
        assert_eq!(received.space(), SpaceId(3));
        assert_eq!(received.runs(), runs);
        assert_eq!(received.pages(), 256);
        assert_eq!(received.wire_len(), frame.wire_len());
        assert_eq!(receive(&bytes).expect("verifies"), raw);
    }
}

#[test]
fn noise_is_sent_as_it_is_without_being_copied() {
    for codec in [Codec::Lz4, Codec::Zstd] {
        let raw = noise(256);
        let frame = encode(&[run(0, 256, RunKind::Data)], raw.clone(), codec).expect("encodes");
        assert_eq!(frame.codec, Codec::None);
        assert_eq!(frame.payload.as_ptr(), raw.as_ptr());
        assert_eq!(receive(&frame.to_bytes()).expect("verifies"), raw);
    }
}

#[test]
fn the_bytes_of_an_owed_run_are_pinned() {
    let runs = [
        run(0x10, 0x200, RunKind::Owed),
        run(0x300, 1, RunKind::Zero),
    ];
    let frame = encode(&runs, Bytes::new(), Codec::Lz4).expect("encodes");
    assert!(frame.payload.is_empty());
    let head: Vec<u8> = [
        &b"MPGF"[..],
        &[3, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    assert_eq!(frame.head[..24], head);
    assert_eq!(
        frame.head[HEADER_LEN..],
        [
            0x10, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 2, 0, 0, 0, // owed
            0, 3, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, // zero
        ]
    );
    let received = decode(&frame.to_bytes()).expect("decodes");
    assert_eq!(received.runs(), runs);
    assert_eq!(receive(&frame.to_bytes()).expect("verifies"), b"");
}

#[test]
fn owed_pages_do_not_count_as_carried_but_have_a_limit_of_their_own() {
    let data = run(0, 256, RunKind::Data);
    let most = run(256, MAX_OWED, RunKind::Owed);
    encode(&[data, most], text(256), Codec::None).expect("both limits reached");
    let error = encode(
        &[most, run(MAX_OWED + 256, 1, RunKind::Owed)],
        Bytes::new(),
        Codec::None,
    )
    .expect_err("one page more");
    assert_eq!(error, FrameError::OwedCount);
    assert_eq!(
        Lie::error(|l| l.runs = vec![(16, u32::MAX, 2)]),
        FrameError::OwedCount
    );
}

#[test]
fn zero_pages_cost_no_payload() {
    let frame = encode(&[run(0, 256, RunKind::Zero)], Bytes::new(), Codec::Lz4).expect("encodes");
    assert_eq!(frame.wire_len(), HEADER_LEN + 16);
    assert_eq!(receive(&frame.to_bytes()).expect("verifies"), b"");
}

#[test]
fn the_encoder_refuses_what_the_decoder_would() {
    let page = || Bytes::from(vec![1; 4096]);
    let data = |first, pages| run(first, pages, RunKind::Data);
    let error = |runs: &[Run], raw| encode(runs, raw, Codec::None).expect_err("was encoded");
    assert_eq!(error(&[], Bytes::new()), FrameError::RunCount(0));
    assert_eq!(
        error(&[data(1, 1)], page().slice(1..)),
        FrameError::RawLength(4095)
    );
    assert_eq!(
        error(&[data(1, 2)], page()),
        FrameError::RunBytes {
            claimed: 4096,
            runs: 8192
        }
    );
    assert_eq!(
        error(&[run(1, 257, RunKind::Zero)], Bytes::new()),
        FrameError::PageCount
    );
    assert_eq!(
        error(&[run(5, 2, RunKind::Zero), data(6, 1)], page()),
        FrameError::RunOrder(6)
    );
}

#[test]
fn a_header_that_lies_is_refused_before_anything_is_allocated() {
    assert_eq!(Lie::error(|_| ()), FrameError::Hash);
    assert_eq!(Lie::error(|l| l.codec = 3), FrameError::Codec(3));
    assert_eq!(Lie::error(|l| l.run_count = 0), FrameError::RunCount(0));
    assert_eq!(Lie::error(|l| l.run_count = 257), FrameError::RunCount(257));
    assert_eq!(
        Lie::error(|l| l.raw_len = u32::MAX),
        FrameError::RawLength(u32::MAX as usize)
    );
    assert_eq!(
        Lie::error(|l| l.raw_len = 4095),
        FrameError::RawLength(4095)
    );
    for (codec, raw_len, payload_len) in [
        (0, 4096, 4095),
        (0, 4096, u32::MAX),
        (1, 4096, 4096),
        (2, 4096, 0),
        (1, 0, 0),
        (2, 0, 1),
    ] {
        let error = Lie::error(|l| {
            l.codec = codec;
            l.raw_len = raw_len;
            l.payload_len = payload_len;
        });
        assert!(
            matches!(error, FrameError::PayloadLength { .. }),
            "{codec} {raw_len} {payload_len}: {error}"
        );
    }
    let mut bytes = Lie::new().bytes();
    bytes[9] = 1;
    assert_eq!(receive(&bytes), Err(FrameError::Reserved));
    bytes[0] = 0;
    assert!(matches!(receive(&bytes), Err(FrameError::Magic(_))));
}

#[test]
fn a_frame_names_the_one_space_that_its_same_pages_are_taken_from() {
    let same = |first, space| run(first, 2, RunKind::Same(SpaceId(space)));
    let runs = [same(16, 7), run(18, 1, RunKind::Data), same(19, 7)];
    let frame = encode(&runs, text(1), Codec::None).expect("encodes");
    assert_eq!(frame.head[20..24], [7, 0, 0, 0]);
    assert_eq!(frame.head[HEADER_LEN + 12], 3);
    let bytes = frame.to_bytes();
    assert_eq!(decode(&bytes).expect("decodes").runs(), runs);
    let mut other_origin = bytes.to_vec();
    other_origin[20] = 8;
    assert_eq!(receive(&other_origin), Err(FrameError::Hash));

    let error = |origin| FrameError::Origin { space: 3, origin };
    let mut itself = bytes.to_vec();
    itself[20] = 3;
    assert_eq!(receive(&itself), Err(error(3)));
    let mut unused = Lie::new().bytes();
    unused[20] = 8;
    assert_eq!(receive(&unused), Err(error(8)));
    let two = [same(16, 7), same(18, 8)];
    let refused = encode(&two, Bytes::new(), Codec::None);
    assert_eq!(refused.expect_err("two origins"), error(8));
}

#[test]
fn content_is_found_where_all_pages_are_data_and_nowhere_else() {
    let runs = [
        run(16, 2, RunKind::Data),
        run(18, 3, RunKind::Data),
        run(21, 1, RunKind::Zero),
        run(22, 1, RunKind::Data),
        run(24, 2, RunKind::Data),
    ];
    let raw = noise(8);
    let pages: Vec<&[u8]> = raw.chunks(PAGE_SIZE as usize).collect();
    let data: Vec<(u64, &[u8])> = [16, 17, 18, 19, 20, 22, 24, 25]
        .into_iter()
        .zip(pages)
        .collect();
    for first in 14..27 {
        for pages in 1..=27 - first {
            let of = |page| {
                data.iter()
                    .find(|(at, _)| *at == page)
                    .map(|(_, bytes)| *bytes)
            };
            let expected: Option<Vec<&[u8]>> = (first..first + pages).map(of).collect();
            let range = PageRange::from_start_len(PageNumber(first), pages).expect("a range");
            let found = content_of(&runs, &raw, range).map(<[u8]>::to_vec);
            assert_eq!(found, expected.map(|pages| pages.concat()), "{range}");
        }
    }
}

#[test]
fn content_can_be_kept_whatever_the_codec() {
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let frame = encode(&[run(16, 3, RunKind::Data)], text(3), codec).expect("encodes");
        let frame = decode(&frame.to_bytes()).expect("decodes");
        let mut scratch = Scratch::new();
        let kept = frame.raw_to_keep(&mut scratch).expect("verifies");
        drop((frame, scratch));
        assert_eq!(kept, text(3), "{codec:?}");
    }
}

#[test]
fn runs_that_lie_are_refused() {
    let limit = PageNumber::LIMIT.0;
    for (first, pages) in [
        (16, 0),
        (limit, 1),
        (limit - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
    ] {
        assert_eq!(
            Lie::error(|l| l.runs = vec![(first, pages, 0)]),
            FrameError::Run { first, pages }
        );
    }
    assert_eq!(
        Lie::error(|l| l.runs = vec![(16, 1, 4)]),
        FrameError::RunKind(4)
    );
    assert_eq!(
        Lie::error(|l| l.runs = vec![(16, 2, 0)]),
        FrameError::RunBytes {
            claimed: 4096,
            runs: 8192
        }
    );
    assert_eq!(
        Lie::error(|l| l.runs = vec![(16, 1, 1)]),
        FrameError::RunBytes {
            claimed: 4096,
            runs: 0
        }
    );
    let two = |first: (u64, u32, u32), second: (u64, u32, u32)| {
        Lie::error(|l| {
            l.run_count = 2;
            l.runs = vec![first, second];
        })
    };
    assert_eq!(two((16, 1, 0), (16, 1, 1)), FrameError::RunOrder(16));
    assert_eq!(two((16, 8, 1), (20, 1, 0)), FrameError::RunOrder(20));
    assert_eq!(two((16, 1, 0), (3, 1, 1)), FrameError::RunOrder(3));
    assert_eq!(two((16, 1, 0), (17, 256, 1)), FrameError::PageCount);
}

#[test]
fn a_truncated_or_longer_frame_is_refused() {
    let bytes = Lie::new().bytes();
    for len in [HEADER_LEN, HEADER_LEN + 15, bytes.len() - 1] {
        assert!(matches!(
            receive(&bytes[..len]),
            Err(FrameError::Length { .. })
        ));
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(receive(&longer), Err(FrameError::Length { .. })));
}

#[test]
fn a_payload_that_grows_beyond_its_header_is_refused() {
    let gigabyte_of_zeros = zstd::bulk::compress(&vec![0; 1 << 28], 1).expect("compresses");
    let many_zeros = lz4_flex::block::compress(&vec![0; 1 << 19]);
    for (codec, payload) in [(2, gigabyte_of_zeros), (1, many_zeros)] {
        let error = Lie::error(|l| {
            l.codec = codec;
            l.raw_len = 64 * 4096;
            l.runs = vec![(16, 64, 0)];
            l.payload_len = payload.len() as u32;
            l.payload = payload;
        });
        assert_eq!(error, FrameError::Decompress(64 * 4096));
    }
}

#[test]
fn a_payload_that_ends_short_of_its_header_is_refused() {
    let short = zstd::bulk::compress(&[0; 4096], 1).expect("compresses");
    let short_lz4 = lz4_flex::block::compress(&[0; 4096]);
    for (codec, payload) in [
        (2, short),
        (1, short_lz4),
        (1, vec![0xff; 40]),
        (2, vec![0xff; 40]),
    ] {
        let error = Lie::error(|l| {
            l.codec = codec;
            l.raw_len = 2 * 4096;
            l.runs = vec![(16, 2, 0)];
            l.payload_len = payload.len() as u32;
            l.payload = payload;
        });
        assert_eq!(error, FrameError::Decompress(2 * 4096));
    }
}

#[test]
fn pages_moved_to_another_place_do_not_match_the_hash() {
    let frame = encode(&[run(16, 1, RunKind::Data)], text(1), Codec::Lz4).expect("encodes");
    let bytes = frame.to_bytes();
    receive(&bytes).expect("the unchanged frame verifies");
    let mut elsewhere = bytes.to_vec();
    elsewhere[HEADER_LEN] = 17;
    assert_eq!(receive(&elsewhere), Err(FrameError::Hash));
    let mut other_space = bytes.to_vec();
    other_space[4] = 4;
    assert_eq!(receive(&other_space), Err(FrameError::Hash));
}

prop_compose! {
    /// Valid runs: gaps and lengths, with a kind each.
    fn any_runs()(parts in prop::collection::vec((0u64..3, 1u64..8, 0usize..4), 1..30), base in 0u64..1 << 40) -> Vec<Run> {
        let mut next = base;
        parts
            .into_iter()
            .map(|(gap, pages, kind)| {
                let first = next + gap;
                next = first + pages;
                let kinds = [RunKind::Data, RunKind::Zero, RunKind::Owed, RunKind::Same(SpaceId(9))];
                run(first, pages, kinds[kind])
            })
            .collect()
    }
}

proptest! {
    #[test]
    fn a_frame_survives_the_wire(runs in any_runs(), codec in 0u8..3, compressible in any::<bool>()) {
        let codec = Codec::from_number(codec).expect("a codec");
        let pages = runs.iter().map(Run::raw_len).sum::<usize>() / PAGE_SIZE as usize;
        let raw = if compressible { text(pages) } else { noise(pages) };
        let frame = encode(&runs, raw.clone(), codec).expect("encodes");
        let bytes = frame.to_bytes();
        let received = decode(&bytes).expect("decodes");
        prop_assert_eq!(received.runs(), runs);
        prop_assert_eq!(receive(&bytes).expect("verifies"), raw);
    }

    #[test]
    fn a_changed_frame_is_never_taken_for_another(codec in 0u8..3, at in any::<prop::sample::Index>(), bits in 1u8..) {
        let codec = Codec::from_number(codec).expect("a codec");
        let runs = [run(16, 3, RunKind::Data), run(40, 5, RunKind::Zero)];
        let raw = text(3);
        let mut bytes = encode(&runs, raw, codec).expect("encodes").to_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= bits;
        // A compressed payload can hold bits that do not matter; then the content is still the right one.
        if let Ok(frame) = decode(&bytes)
            && let Ok(content) = frame.raw(&mut Scratch::new())
        {
            prop_assert_eq!(frame.runs(), runs);
            prop_assert_eq!(content, text(3));
        }
    }

    #[test]
    fn no_bytes_make_the_frame_decoder_panic(bytes in prop::collection::vec(any::<u8>(), HEADER_LEN..400), mark in any::<bool>()) {
        let mut bytes = bytes;
        if mark {
            bytes[..4].copy_from_slice(b"MPGF");
        }
        let _ = receive(&bytes);
    }
}
