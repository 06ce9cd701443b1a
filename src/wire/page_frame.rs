//! Page frames: up to 256 pages of one address space, with their content.
//!
//! ```text
//!  0       4       8       9          10          12        16            20         24           40
//!  | magic | space | codec | reserved | run count | raw len | payload len | origin   | xxh3-128   |
//!  | MPGF  | u32   | u8    | u8 = 0   | u16       | u32     | u32         | u32      | u128       |
//!
//!  then `run count` times:                             then `payload len` bytes:
//!  | first page | pages | kind             |           the data pages of all runs in order,
//!  | u64        | u32   | u32: 0 data      |           encoded with the codec as one block
//!  |            |       | 1 zero 2 owed    |
//!  |            |       | 3 same           |
//! ```
//!
//! All integers are little-endian. A zero run says that its pages hold only zeros; it has no bytes in the payload. An owed
//! run says that its pages exist and that their content comes later: an older copy is worth nothing. It has no bytes
//! either, and its pages do not count among the 256: what a container owes at the freeze is said in few frames.
//! A same run says that its pages hold what the pages of the same numbers in the *origin* hold, another space, by what came
//! earlier on the same stream: pages that forked processes share cross once. In post-copy it is the frame with data that
//! came last. It has no bytes either. A frame has one origin, 0 if it has no same run.
//! Runs are in order of address and share no page. The raw length is the number of data pages times 4096. The payload
//! is never longer than that: what does not shrink is sent as it is. The hash covers the runs as sent and the raw
//! payload, seeded with space and origin, so that bytes cannot end up at another place than they were read from.
//!
//! A frame is read in two steps, so that nothing is allocated for a header that lies: [`Header::decode`] gives the
//! length of the rest (at most [`MAX_REST`]), [`Frame::decode`] reads it, [`Frame::raw`] decompresses and verifies.

mod codecs;

use self::codecs::Compressors;
pub use self::codecs::Scratch;
use crate::memory::{PAGE_SIZE, PageNumber, PageRange, SpaceId};
use crate::wire::codec::Codec;
use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most pages one frame may carry, zero pages counted, owed ones not.
pub const MAX_PAGES: u64 = 256;

/// The most pages one frame may call owed: 4 GiB.
pub const MAX_OWED: u64 = 1 << 20;

/// The most runs one frame may carry.
pub const MAX_RUNS: usize = 256;

/// The most raw bytes one frame may carry.
pub const MAX_RAW: usize = (MAX_PAGES * PAGE_SIZE) as usize;

/// Bytes of a frame before its runs.
pub const HEADER_LEN: usize = size_of::<RawHeader>();

/// The most bytes that can follow a header.
pub const MAX_REST: usize = MAX_RUNS * size_of::<RawRun>() + MAX_RAW;

const MAGIC: u32 = u32::from_le_bytes(*b"MPGF");

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    space: U32,
    codec: u8,
    reserved_codec: u8,
    run_count: U16,
    raw_len: U32,
    payload_len: U32,
    origin: U32,
    hash: U128,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRun {
    first: U64,
    pages: U32,
    kind: U32,
}

/// What a run's pages hold.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RunKind {
    /// Bytes, in the payload.
    Data,
    /// Only zeros.
    Zero,
    /// Not known here yet: it comes later, and what came before is no longer true.
    Owed,
    /// What the same pages of this other space hold by what came before on the stream.
    Same(SpaceId),
}

impl RunKind {
    fn number(self) -> u32 {
        match self {
            RunKind::Data => 0,
            RunKind::Zero => 1,
            RunKind::Owed => 2,
            RunKind::Same(_) => 3,
        }
    }
}

/// Consecutive pages of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Which pages.
    pub range: PageRange,
    /// What they hold.
    pub kind: RunKind,
}

impl Run {
    /// Bytes of the raw payload that belong to this run.
    pub fn raw_len(&self) -> usize {
        match self.kind {
            RunKind::Data => self.range.bytes() as usize,
            RunKind::Zero | RunKind::Owed | RunKind::Same(_) => 0,
        }
    }
}

/// Why bytes are not a page frame, or pages do not make one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum FrameError {
    /// The first bytes are not a page frame's.
    #[error("a page frame begins with {0:#010x}, which no page frame does")]
    Magic(u32),
    /// A codec this version does not know.
    #[error("a page frame has the unknown codec {0}")]
    Codec(u8),
    /// Reserved bits are set.
    #[error("a page frame sets reserved bits")]
    Reserved,
    /// No run, or more than [`MAX_RUNS`].
    #[error("a page frame has {0} runs, between 1 and {MAX_RUNS} are allowed")]
    RunCount(usize),
    /// More raw bytes than [`MAX_RAW`], or no multiple of a page.
    #[error("a page frame claims {0} raw bytes, which is no number of pages up to {MAX_PAGES}")]
    RawLength(usize),
    /// A payload longer than the raw bytes, missing, or not as long as the codec `none` says.
    #[error("a page frame has a payload of {payload} bytes for {raw} raw bytes")]
    PayloadLength {
        /// The payload's length.
        payload: usize,
        /// The raw length.
        raw: usize,
    },
    /// The bytes after the header are fewer or more than it says.
    #[error("a page frame has {got} bytes after its header where {expected} belong")]
    Length {
        /// What the header promises.
        expected: usize,
        /// What was there.
        got: usize,
    },
    /// A run that is empty or ends above the highest page.
    #[error("a page frame has a run of {pages} pages from page {first:#x}")]
    Run {
        /// Its first page.
        first: u64,
        /// Its length.
        pages: u32,
    },
    /// A kind of run this version does not know.
    #[error("a page frame has a run of the unknown kind {0}")]
    RunKind(u32),
    /// Runs out of order or overlapping.
    #[error("a page frame's runs are out of order or overlap at page {0:#x}")]
    RunOrder(u64),
    /// More pages in all runs than [`MAX_PAGES`].
    #[error("a page frame carries more than {MAX_PAGES} pages")]
    PageCount,
    /// More owed pages than [`MAX_OWED`].
    #[error("a page frame calls more than {MAX_OWED} pages owed")]
    OwedCount,
    /// An origin without a run that needs one, or two of them, or the space itself.
    #[error(
        "a page frame of space {space} has the origin {origin}, which its runs cannot refer to"
    )]
    Origin {
        /// The frame's space.
        space: u32,
        /// The origin.
        origin: u32,
    },
    /// The data pages of the runs are not the raw length.
    #[error("a page frame claims {claimed} raw bytes, its runs have {runs}")]
    RunBytes {
        /// What the header says.
        claimed: usize,
        /// What the runs add up to.
        runs: usize,
    },
    /// The payload does not decompress to exactly the raw length.
    #[error("a page frame's payload does not decompress to its {0} raw bytes")]
    Decompress(usize),
    /// The content is not what was hashed when it was read.
    #[error("a page frame's content does not match its hash")]
    Hash,
}

/// A page frame ready to be sent: its bytes are `head` followed by `payload`.
///
/// In two pieces because an uncompressed payload is passed on without copying it.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    /// Header and runs.
    pub head: Bytes,
    /// The payload; empty when there are only zero pages.
    pub payload: Bytes,
    /// The codec that was used in the end.
    pub codec: Codec,
}

impl EncodedFrame {
    /// Bytes on the stream.
    pub fn wire_len(&self) -> usize {
        self.head.len() + self.payload.len()
    }

    /// The frame in one piece; for tests and tools.
    pub fn to_bytes(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(self.wire_len());
        bytes.put_slice(&self.head);
        bytes.put_slice(&self.payload);
        bytes.freeze()
    }
}

/// Makes page frames; keeps the codecs' working memory between frames. One per thread.
#[derive(Default)]
pub struct FrameEncoder {
    compressors: Compressors,
}

impl FrameEncoder {
    /// An encoder that allocates a codec's memory when the codec is first used.
    pub fn new() -> FrameEncoder {
        FrameEncoder::default()
    }

    /// Encodes `runs` of `space`, whose data pages are `raw` in the order of the runs.
    ///
    /// A payload that `codec` does not make smaller is sent as it is. Fails if the runs break the rules that
    /// [`Frame::decode`] checks, or do not fit `raw`.
    pub fn encode(
        &mut self,
        space: SpaceId,
        runs: &[Run],
        raw: Bytes,
        codec: Codec,
    ) -> Result<EncodedFrame, FrameError> {
        if raw.len() > MAX_RAW || !raw.len().is_multiple_of(PAGE_SIZE as usize) {
            return Err(FrameError::RawLength(raw.len()));
        }
        check_run_count(runs.len())?;
        check_runs(runs, raw.len())?;
        let origin = origin_of(space, runs)?;
        let raw_runs: Vec<RawRun> = runs
            .iter()
            .map(|run| RawRun {
                first: run.range.start().0.into(),
                pages: (run.range.pages() as u32).into(),
                kind: run.kind.number().into(),
            })
            .collect();
        let run_bytes = raw_runs.as_slice().as_bytes();
        let hash = content_hash(space, origin, run_bytes, &raw);
        let raw_len = raw.len();
        let (codec, payload) = match self.compressors.compress(codec, &raw) {
            Some(smaller) => (codec, smaller),
            None => (Codec::None, raw),
        };
        let header = RawHeader {
            magic: MAGIC.into(),
            space: space.0.into(),
            codec: codec.number(),
            reserved_codec: 0,
            run_count: (runs.len() as u16).into(),
            raw_len: (raw_len as u32).into(),
            payload_len: (payload.len() as u32).into(),
            origin: origin.0.into(),
            hash: hash.into(),
        };
        let mut head = BytesMut::with_capacity(HEADER_LEN + run_bytes.len());
        head.put_slice(header.as_bytes());
        head.put_slice(run_bytes);
        Ok(EncodedFrame {
            head: head.freeze(),
            payload,
            codec,
        })
    }
}

/// What a frame header says, with every length within bounds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    space: SpaceId,
    origin: SpaceId,
    codec: Codec,
    run_count: usize,
    raw_len: usize,
    payload_len: usize,
    hash: u128,
}

impl Header {
    /// Reads a header; its lengths are within bounds and fit each other when this succeeds.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
        let raw = RawHeader::ref_from_bytes(bytes)
            .expect("the header has no alignment and its exact size");
        if raw.magic.get() != MAGIC {
            return Err(FrameError::Magic(raw.magic.get()));
        }
        let codec = Codec::from_number(raw.codec).ok_or(FrameError::Codec(raw.codec))?;
        if raw.reserved_codec != 0 {
            return Err(FrameError::Reserved);
        }
        let header = Header {
            space: SpaceId(raw.space.get()),
            origin: SpaceId(raw.origin.get()),
            codec,
            run_count: usize::from(raw.run_count.get()),
            raw_len: raw.raw_len.get() as usize,
            payload_len: raw.payload_len.get() as usize,
            hash: raw.hash.get(),
        };
        check_run_count(header.run_count)?;
        if header.raw_len > MAX_RAW || !header.raw_len.is_multiple_of(PAGE_SIZE as usize) {
            return Err(FrameError::RawLength(header.raw_len));
        }
        // A compressed payload is shorter than the raw bytes, an uncompressed one is as long.
        let fits = match codec {
            Codec::None => header.payload_len == header.raw_len,
            Codec::Lz4 | Codec::Zstd => (1..header.raw_len).contains(&header.payload_len),
        };
        if !fits {
            return Err(FrameError::PayloadLength {
                payload: header.payload_len,
                raw: header.raw_len,
            });
        }
        Ok(header)
    }

    fn wrong_origin(&self) -> FrameError {
        FrameError::Origin {
            space: self.space.0,
            origin: self.origin.0,
        }
    }

    /// Bytes that follow the header, at most [`MAX_REST`].
    pub fn rest_len(&self) -> usize {
        self.run_count * size_of::<RawRun>() + self.payload_len
    }
}

/// A received frame whose runs are checked. Its content is only trusted after [`Frame::raw`].
#[derive(Clone, Debug)]
pub struct Frame {
    header: Header,
    runs: Vec<Run>,
    /// Runs as received, then the payload.
    rest: Bytes,
}

impl Frame {
    /// Reads what follows `header`; `rest` must be [`Header::rest_len`] bytes.
    pub fn decode(header: Header, rest: Bytes) -> Result<Frame, FrameError> {
        if rest.len() != header.rest_len() {
            return Err(FrameError::Length {
                expected: header.rest_len(),
                got: rest.len(),
            });
        }
        let run_bytes = &rest[..header.run_count * size_of::<RawRun>()];
        let raw_runs = <[RawRun]>::ref_from_bytes(run_bytes)
            .expect("runs have no alignment and divide evenly");
        let runs = raw_runs
            .iter()
            .map(|run| decode_run(run, header.origin))
            .collect::<Result<Vec<Run>, FrameError>>()?;
        check_runs(&runs, header.raw_len)?;
        if origin_of(header.space, &runs)? != header.origin {
            return Err(header.wrong_origin());
        }
        Ok(Frame { header, runs, rest })
    }

    /// The space the pages belong to.
    pub fn space(&self) -> SpaceId {
        self.header.space
    }

    /// The runs, in order of address.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Pages in all runs, owed ones too; at least 1.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.range.pages()).sum()
    }

    /// The codec of the payload.
    pub fn codec(&self) -> Codec {
        self.header.codec
    }

    /// Bytes the frame took on the stream.
    pub fn wire_len(&self) -> usize {
        HEADER_LEN + self.rest.len()
    }

    /// The content of the data runs, in order, decompressed and verified against the hash.
    ///
    /// `scratch` is only written when the payload is compressed, and never grows beyond [`MAX_RAW`].
    pub fn raw<'a>(&'a self, scratch: &'a mut Scratch) -> Result<&'a [u8], FrameError> {
        let (run_bytes, payload) = self
            .rest
            .split_at(self.header.run_count * size_of::<RawRun>());
        let raw = match self.header.codec {
            Codec::None => payload,
            codec => scratch
                .decompress(codec, payload, self.header.raw_len)
                .ok_or(FrameError::Decompress(self.header.raw_len))?,
        };
        let hash = content_hash(self.header.space, self.header.origin, run_bytes, raw);
        if hash != self.header.hash {
            return Err(FrameError::Hash);
        }
        Ok(raw)
    }

    /// [`Frame::raw`] to be kept longer than the frame; copied only if it was compressed.
    pub fn raw_to_keep(&self, scratch: &mut Scratch) -> Result<Bytes, FrameError> {
        let raw = self.raw(scratch)?;
        Ok(match self.header.codec {
            Codec::None => self.rest.slice_ref(raw),
            Codec::Lz4 | Codec::Zstd => Bytes::copy_from_slice(raw),
        })
    }
}

/// The bytes of `pages` in `raw`, which holds the data pages of `runs`; `None` if not all of them are data pages.
pub fn content_of<'a>(runs: &[Run], raw: &'a [u8], pages: PageRange) -> Option<&'a [u8]> {
    let mut offset = 0;
    let mut first = None;
    // Data pages that follow each other in memory do so in `raw`, also those of two runs.
    let mut next = pages.start();
    for run in runs.iter().filter(|run| run.kind == RunKind::Data) {
        if let Some(part) = run.range.intersection(pages) {
            if part.start() != next {
                return None;
            }
            let skipped = (part.start().0 - run.range.start().0) * PAGE_SIZE;
            first.get_or_insert(offset + skipped as usize);
            next = part.end();
        }
        offset += run.raw_len();
    }
    if next != pages.end() {
        return None;
    }
    raw.get(first?..)?.get(..pages.bytes() as usize)
}

fn decode_run(raw: &RawRun, origin: SpaceId) -> Result<Run, FrameError> {
    let (first, pages) = (raw.first.get(), raw.pages.get());
    let range = PageRange::from_start_len(PageNumber(first), u64::from(pages))
        .ok_or(FrameError::Run { first, pages })?;
    let kind = match raw.kind.get() {
        0 => RunKind::Data,
        1 => RunKind::Zero,
        2 => RunKind::Owed,
        3 => RunKind::Same(origin),
        unknown => return Err(FrameError::RunKind(unknown)),
    };
    Ok(Run { range, kind })
}

/// The space that same runs of a frame of `space` refer to, 0 if there are none.
fn origin_of(space: SpaceId, runs: &[Run]) -> Result<SpaceId, FrameError> {
    let mut found = None;
    for run in runs {
        let RunKind::Same(origin) = run.kind else {
            continue;
        };
        if origin == space || *found.get_or_insert(origin) != origin {
            return Err(FrameError::Origin {
                space: space.0,
                origin: origin.0,
            });
        }
    }
    Ok(found.unwrap_or(SpaceId(0)))
}

fn check_run_count(count: usize) -> Result<(), FrameError> {
    if (1..=MAX_RUNS).contains(&count) {
        Ok(())
    } else {
        Err(FrameError::RunCount(count))
    }
}

/// Runs are in order, disjoint, at most [`MAX_PAGES`] and [`MAX_OWED`] together, and their data is `raw_len` bytes.
fn check_runs(runs: &[Run], raw_len: usize) -> Result<(), FrameError> {
    let mut free_from = 0;
    let (mut pages, mut owed) = (0, 0);
    let mut bytes = 0;
    for run in runs {
        if run.range.start().0 < free_from {
            return Err(FrameError::RunOrder(run.range.start().0));
        }
        free_from = run.range.end().0;
        match run.kind {
            RunKind::Data | RunKind::Zero | RunKind::Same(_) => pages += run.range.pages(),
            RunKind::Owed => owed += run.range.pages(),
        }
        if pages > MAX_PAGES {
            return Err(FrameError::PageCount);
        }
        if owed > MAX_OWED {
            return Err(FrameError::OwedCount);
        }
        bytes += run.raw_len();
    }
    if bytes == raw_len {
        Ok(())
    } else {
        Err(FrameError::RunBytes {
            claimed: raw_len,
            runs: bytes,
        })
    }
}

fn content_hash(space: SpaceId, origin: SpaceId, run_bytes: &[u8], raw: &[u8]) -> u128 {
    let mut hash = Xxh3::with_seed(u64::from(space.0) | u64::from(origin.0) << 32);
    hash.update(run_bytes);
    hash.update(raw);
    hash.digest128()
}

#[cfg(test)]
mod tests;
