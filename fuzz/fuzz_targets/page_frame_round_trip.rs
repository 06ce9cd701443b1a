//! Pages that were encoded come out as they went in, whatever they hold and wherever they lie.
//!
//! The input says which runs there are (gap, pages, kind; three bytes each up to a zero byte count) and gives the
//! bytes that their pages repeat.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use migrate::memory::{PAGE_SIZE, PageNumber, PageRange, SpaceId};
use migrate::wire::codec::Codec;
use migrate::wire::page_frame::{Frame, FrameEncoder, HEADER_LEN, Header, Run, RunKind, Scratch};
use migrate_fuzz::write_seeds;
use std::cell::RefCell;

/// Enough for every shape of frame; a full one takes milliseconds.
const MOST_PAGES: u64 = 32;

thread_local! {
    /// Kept between inputs, as the engine keeps them between frames; making them is most of the work.
    static CODECS: RefCell<(FrameEncoder, Scratch)> = RefCell::default();
}

fuzz_target!(
    init: write_seeds([
        b"\x00\x00\x01\x00\x00\x00\x00abc".to_vec(),
        b"\x01\x00\x09\x00\x01\x03\x01\x07\x20\x02\x00\x00\x00\xff\x00\x10\x80".to_vec(),
        b"\x02\x05\x80\x00\x00\x00\x00".to_vec(),
    ]),
    |input: &[u8]| {
        let Some((&codec, mut input)) = input.split_first() else { return };
        let codec = Codec::from_number(codec % 3).expect("one of three");
        let (mut runs, mut next, mut pages) = (Vec::new(), 0, 0);
        while let Some((&[gap, len, kind], rest)) = input.split_first_chunk::<3>() {
            input = rest;
            pages += u64::from(len);
            if len == 0 || pages > MOST_PAGES {
                break;
            }
            let first = PageNumber(next + u64::from(gap) * u64::from(gap));
            let range = PageRange::from_start_len(first, u64::from(len)).expect("far below the limit");
            next = range.end().0;
            let same = RunKind::Same(SpaceId(u32::MAX));
            let kind = [RunKind::Data, RunKind::Zero, RunKind::Owed, same][usize::from(kind % 4)];
            runs.push(Run { range, kind });
        }
        let len = runs.iter().map(Run::raw_len).sum::<usize>();
        assert_eq!(len % PAGE_SIZE as usize, 0);
        let content = if input.is_empty() { b"\0" } else { input };
        let raw: Bytes = content.iter().copied().cycle().take(len).collect();
        let encoded = CODECS.with_borrow_mut(|(encoder, _)| {
            encoder.encode(SpaceId(9), &runs, raw.clone(), codec)
        });
        if runs.is_empty() {
            assert!(encoded.is_err());
            return;
        }
        let bytes = encoded.expect("valid runs encode").to_bytes();
        let (head, _) = bytes.split_first_chunk().expect("a whole header");
        let header = Header::decode(head).expect("our own header");
        let frame = Frame::decode(header, bytes.slice(HEADER_LEN..)).expect("our own frame");
        assert_eq!(frame.runs(), runs);
        CODECS.with_borrow_mut(|(_, scratch)| {
            assert_eq!(frame.raw(scratch).expect("our own content"), raw);
        });
    }
);
