//! The codecs' working memory, and their bounds.

use crate::wire::codec::Codec;
use bytes::Bytes;
use lz4_flex::block::{self, CompressTable};
use zstd::bulk::{Compressor, Decompressor};

/// zstd's fast levels: −1 was measured at about 1.1 GB/s with a ratio near 7 on heap pages (DESIGN, section 9).
const ZSTD_LEVEL: i32 = -1;

/// What compression needs between frames.
#[derive(Default)]
pub(super) struct Compressors {
    lz4: Option<CompressTable>,
    zstd: Option<Compressor<'static>>,
    out: Vec<u8>,
}

impl Compressors {
    /// `raw` in fewer bytes, or `None` if `codec` does not make it smaller.
    pub(super) fn compress(&mut self, codec: Codec, raw: &[u8]) -> Option<Bytes> {
        if raw.is_empty() {
            return None;
        }
        let len = match codec {
            Codec::None => return None,
            Codec::Lz4 => {
                self.grow(block::get_maximum_output_size(raw.len()));
                let table = self.lz4.get_or_insert_with(CompressTable::large);
                block::compress_into_with_table(raw, &mut self.out, table).ok()?
            }
            Codec::Zstd => {
                self.grow(raw.len());
                if self.zstd.is_none() {
                    self.zstd = Compressor::new(ZSTD_LEVEL).ok();
                }
                // A full buffer is reported as an error, which here means "not smaller".
                self.zstd
                    .as_mut()?
                    .compress_to_buffer(raw, &mut self.out[..raw.len() - 1])
                    .ok()?
            }
        };
        (len < raw.len()).then(|| Bytes::copy_from_slice(&self.out[..len]))
    }

    fn grow(&mut self, len: usize) {
        if self.out.len() < len {
            self.out.resize(len, 0);
        }
    }
}

/// Working memory for reading frames: the decompressed pages and a codec's tables. One per thread.
#[derive(Default)]
pub struct Scratch {
    raw: Vec<u8>,
    zstd: Option<Decompressor<'static>>,
}

impl Scratch {
    /// Working memory that is allocated when it is first needed.
    pub fn new() -> Scratch {
        Scratch::default()
    }

    /// `payload` decompressed to exactly `raw_len` bytes, or `None` if it is anything else.
    ///
    /// Both decoders write into a slice of that length and stop at its end, so a payload that would grow beyond
    /// what its header says costs nothing.
    pub(super) fn decompress(
        &mut self,
        codec: Codec,
        payload: &[u8],
        raw_len: usize,
    ) -> Option<&[u8]> {
        if self.raw.len() < raw_len {
            self.raw.resize(raw_len, 0);
        }
        let raw = &mut self.raw[..raw_len];
        let len = match codec {
            Codec::None => return None,
            Codec::Lz4 => block::decompress_into(payload, raw).ok()?,
            Codec::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = Decompressor::new().ok();
                }
                self.zstd
                    .as_mut()?
                    .decompress_to_buffer(payload, raw)
                    .ok()?
            }
        };
        (len == raw_len).then_some(&*raw)
    }
}
