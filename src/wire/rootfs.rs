//! The bytes of the root filesystem transfer: frames both ways over one ordered stream.
//!
//! The source describes the tree and sends what is new; the target answers only where an answer is
//! needed. Nothing here touches a tree: [`ToTarget`] and [`ToSource`] are what enters and leaves, and
//! everything a peer sends is checked against its bounds before it is allocated or believed.
//!
//! ```text
//! frame    | kind u16 | zero u16 | payload length u32 | payload |        all integers little-endian
//!
//! source → target                                 target → source
//!   1 Begin    magic, version, first, seed          1 Ready    the destination is empty
//!   2 Query    paths                                2 Digests  index in the query, (chunk, digest)…
//!   3 Put      one entry (see `entry`)              3 Answered end of the answer to one query
//!   4 Data     offset u64, bytes                    4 Ack      counts
//!   5 Hole     offset u64, length u64               5 Failed   refusal u32
//!   6 FileEnd  xxh3-128 of the frames since Put
//!   7 Link     new path, existing path
//!   8 Remove   path, with all below it
//!   9 DirTime  path, mtime
//!  10 End      counts
//!  11 Done
//!
//! a pass   Begin [Ready] { Put-directory | Link | Remove | Query… | Put (Data|Hole)* FileEnd } DirTime* End → Ack
//! ```
//!
//! `Ready` answers only the `Begin` of a first pass; queries are asked only if that `Ready` says the
//! destination already holds something. A `Put` of a regular file is always closed by `FileEnd`.

mod content;
mod entry;

pub use content::{CHUNK, ChunkDigest, ContentHash};
pub use entry::{Entry, Kind, MAX_NAME, MAX_PATH, Owner, Placement, Timestamp, TreePath, Xattr};

use entry::Cursor;
use std::io::{self, Read};
use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of this protocol, carried by every `Begin`. Version 1 is the first.
pub const VERSION: u16 = 1;
/// Most paths one `Query` may ask about.
pub const MAX_QUERY: usize = 256;
/// Most chunk digests in one `Digests` frame.
pub const MAX_DIGESTS: usize = 8192;
/// Largest payload of an entry or a query: a path, a symlink target and 64 KiB xattrs, several times over.
pub const MAX_ENTRY: usize = 4 << 20;

const MAGIC: [u8; 4] = *b"MGRF";

/// What the source says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToTarget<'a> {
    /// A pass begins. `seed` keys the chunk digests of all passes since the last first pass, so that
    /// nobody inside the container can prepare colliding content.
    Begin {
        /// Whether the source knows nothing yet of what the target holds.
        first: bool,
        /// Seed of every [`ChunkDigest`].
        seed: u64,
    },
    /// Which of these files does the target hold already, and what is in them?
    Query(Vec<TreePath>),
    /// Make this path be this entry. Content of a regular file follows.
    Put(Entry),
    /// Bytes of the file opened by the last `Put`.
    Data {
        /// Where in the file, in bytes.
        offset: u64,
        /// At most [`CHUNK`] bytes, at least one.
        bytes: &'a [u8],
    },
    /// A hole in the file opened by the last `Put`: reads as zeros, takes no space.
    Hole {
        /// Where in the file, in bytes.
        offset: u64,
        /// Bytes, at least one.
        len: u64,
    },
    /// The content of the file is complete; [`ContentHash`] of all its `Data` and `Hole` frames.
    FileEnd(u128),
    /// Make `path` another name of the file that is at `existing`.
    Link {
        /// The new name.
        path: TreePath,
        /// A name the file has already.
        existing: TreePath,
    },
    /// Remove what is at this path, with everything below it.
    Remove(TreePath),
    /// All changes inside this directory are done: set its modification time.
    DirTime(TreePath, Timestamp),
    /// The pass is complete, and this is what was sent in it.
    End(Counts),
    /// No more passes.
    Done,
}

/// What the target says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToSource {
    /// Ready for a first pass.
    Ready {
        /// Nothing is at the destination: there is nothing to query.
        empty: bool,
    },
    /// The file asked about as number `index` of the query exists and holds these chunks of data. May be
    /// sent several times for one file, in ascending chunk order; a file never mentioned is not there.
    Digests {
        /// Position in the query.
        index: u32,
        /// Chunks that are not holes.
        digests: Vec<ChunkDigest>,
    },
    /// The query is answered.
    Answered,
    /// The pass is applied, and this is what was received in it.
    Ack(Counts),
    /// The target gave up.
    Failed(Refusal),
}

/// What moved in one pass, counted by each side for itself and compared at the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// `Put` frames.
    pub puts: u64,
    /// `Link` frames.
    pub links: u64,
    /// `Remove` frames.
    pub removals: u64,
    /// Bytes in `Data` frames.
    pub data_bytes: u64,
}

/// Why the target gave up, as far as the source may know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refusal {
    /// A frame was malformed, out of order, or named a place outside the tree.
    #[error("it was sent something it must refuse")]
    Request,
    /// The filesystem or the quota is full.
    #[error("no space is left there")]
    NoSpace,
    /// More bytes than it allows for this tree.
    #[error("the tree is larger than its limit")]
    TooManyBytes,
    /// More entries than it allows for this tree.
    #[error("the tree has more entries than its limit")]
    TooManyEntries,
    /// A hash or the counts did not match.
    #[error("what arrived is not what was sent")]
    Integrity,
    /// Something is mounted inside the destination.
    #[error("something is mounted inside its destination")]
    Mounted,
    /// A system call failed there.
    #[error("its filesystem failed")]
    Filesystem,
}

impl Refusal {
    const ALL: [Refusal; 7] = [
        Refusal::Request,
        Refusal::NoSpace,
        Refusal::TooManyBytes,
        Refusal::TooManyEntries,
        Refusal::Integrity,
        Refusal::Mounted,
        Refusal::Filesystem,
    ];

    /// The number on the wire, from 1.
    pub fn code(self) -> u32 {
        1 + Refusal::ALL.iter().position(|r| *r == self).unwrap_or(0) as u32
    }

    fn from_code(code: u32) -> Option<Refusal> {
        Refusal::ALL
            .get(usize::try_from(code).ok()?.checked_sub(1)?)
            .copied()
    }
}

/// What was wrong with the bytes of a peer, or with the stream they came on.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The stream ended or failed.
    #[error("reading from the peer")]
    Stream(#[from] io::Error),
    /// No such kind of frame in this direction.
    #[error("frame of unknown kind {0}")]
    Kind(u16),
    /// The header announces more than this kind may carry; nothing was allocated for it.
    #[error("frame of kind {kind} announces {len} bytes, at most {limit} allowed")]
    TooLong {
        /// Kind of the frame.
        kind: u16,
        /// Announced payload.
        len: usize,
        /// Bound for this kind.
        limit: usize,
    },
    /// The payload ends before its fields do.
    #[error("a {0} frame is cut short")]
    Short(&'static str),
    /// The payload goes on after its fields.
    #[error("a {0} frame has bytes left over")]
    LeftOver(&'static str),
    /// A field holds a value outside its range.
    #[error("a {frame} frame holds a bad {field}")]
    Field {
        /// Which frame.
        frame: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// The peer speaks another version.
    #[error("the peer speaks version {0} of the rootfs protocol, this end {VERSION}")]
    Version(u16),
    /// A path that could lead outside the tree, or cannot exist in one.
    #[error("path {path:?} is refused: {why}")]
    Path {
        /// The path, lossily.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    kind: U16,
    zero: U16,
    len: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BeginBody {
    magic: [u8; 4],
    version: U16,
    first: U16,
    seed: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CountsBody {
    puts: U64,
    links: U64,
    removals: U64,
    data_bytes: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SpanBody {
    offset: U64,
    len: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DigestBody {
    chunk: U64,
    digest: U128,
}

impl ToTarget<'_> {
    /// Appends the frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            ToTarget::Begin { first, seed } => frame(out, 1, |out| {
                let body = BeginBody {
                    magic: MAGIC,
                    version: VERSION.into(),
                    first: u16::from(*first).into(),
                    seed: (*seed).into(),
                };
                out.extend_from_slice(body.as_bytes());
            }),
            ToTarget::Query(paths) => frame(out, 2, |out| paths.iter().for_each(|p| p.encode(out))),
            ToTarget::Put(entry) => frame(out, 3, |out| entry.encode(out)),
            ToTarget::Data { offset, bytes } => frame(out, 4, |out| {
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(bytes);
            }),
            ToTarget::Hole { offset, len } => frame(out, 5, |out| {
                let body = SpanBody {
                    offset: (*offset).into(),
                    len: (*len).into(),
                };
                out.extend_from_slice(body.as_bytes());
            }),
            ToTarget::FileEnd(hash) => {
                frame(out, 6, |out| out.extend_from_slice(&hash.to_le_bytes()))
            }
            ToTarget::Link { path, existing } => frame(out, 7, |out| {
                path.encode(out);
                existing.encode(out);
            }),
            ToTarget::Remove(path) => frame(out, 8, |out| path.encode(out)),
            ToTarget::DirTime(path, mtime) => frame(out, 9, |out| {
                path.encode(out);
                mtime.encode(out);
            }),
            ToTarget::End(counts) => frame(out, 10, |out| counts.encode(out)),
            ToTarget::Done => frame(out, 11, |_| {}),
        }
    }

    /// Reads one frame. `buffer` is scratch space that the result borrows; it grows to the largest frame
    /// seen and never beyond [`MAX_ENTRY`].
    pub fn read<'b>(
        stream: &mut impl Read,
        buffer: &'b mut Vec<u8>,
    ) -> Result<ToTarget<'b>, FrameError> {
        let kind = read_frame(stream, buffer, |kind| match kind {
            1 => Some(size_of::<BeginBody>()),
            2 | 3 => Some(MAX_ENTRY),
            4 => Some(8 + CHUNK),
            5 | 6 => Some(16),
            7 => Some(2 * (2 + MAX_PATH)),
            8 => Some(2 + MAX_PATH),
            9 => Some(2 + MAX_PATH + 12),
            10 => Some(size_of::<CountsBody>()),
            11 => Some(0),
            _ => None,
        })?;
        let name = match kind {
            1 => "Begin",
            2 => "Query",
            3 => "Put",
            4 => "Data",
            5 => "Hole",
            6 => "FileEnd",
            7 => "Link",
            8 => "Remove",
            9 => "DirTime",
            10 => "End",
            _ => "Done",
        };
        let mut body = Cursor::new(name, buffer);
        let message = match kind {
            1 => {
                let begin: BeginBody = body.fixed()?;
                if begin.magic != MAGIC {
                    return Err(body.bad("magic"));
                }
                if begin.version.get() != VERSION {
                    return Err(FrameError::Version(begin.version.get()));
                }
                ToTarget::Begin {
                    first: body.flag(begin.first.get(), "first")?,
                    seed: begin.seed.get(),
                }
            }
            2 => {
                let mut paths = Vec::new();
                while !body.is_empty() {
                    if paths.len() == MAX_QUERY {
                        return Err(body.bad("number of paths"));
                    }
                    paths.push(TreePath::decode(&mut body)?);
                }
                ToTarget::Query(paths)
            }
            3 => ToTarget::Put(Entry::decode(&mut body)?),
            4 => {
                let offset: U64 = body.fixed()?;
                let bytes = body.rest();
                if bytes.is_empty() {
                    return Err(body.bad("length"));
                }
                ToTarget::Data {
                    offset: offset.get(),
                    bytes,
                }
            }
            5 => {
                let span: SpanBody = body.fixed()?;
                if span.len.get() == 0 {
                    return Err(body.bad("length"));
                }
                ToTarget::Hole {
                    offset: span.offset.get(),
                    len: span.len.get(),
                }
            }
            6 => ToTarget::FileEnd(body.fixed::<U128>()?.get()),
            7 => ToTarget::Link {
                path: TreePath::decode(&mut body)?,
                existing: TreePath::decode(&mut body)?,
            },
            8 => ToTarget::Remove(TreePath::decode(&mut body)?),
            9 => ToTarget::DirTime(TreePath::decode(&mut body)?, Timestamp::decode(&mut body)?),
            10 => ToTarget::End(Counts::decode(&mut body)?),
            _ => ToTarget::Done,
        };
        body.finish()?;
        Ok(message)
    }
}

impl ToSource {
    /// Appends the frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            ToSource::Ready { empty } => {
                frame(out, 1, |out| {
                    out.extend_from_slice(&u16::from(*empty).to_le_bytes())
                });
            }
            ToSource::Digests { index, digests } => frame(out, 2, |out| {
                out.extend_from_slice(&index.to_le_bytes());
                for found in digests {
                    let body = DigestBody {
                        chunk: found.chunk.into(),
                        digest: found.digest.into(),
                    };
                    out.extend_from_slice(body.as_bytes());
                }
            }),
            ToSource::Answered => frame(out, 3, |_| {}),
            ToSource::Ack(counts) => frame(out, 4, |out| counts.encode(out)),
            ToSource::Failed(refusal) => {
                frame(out, 5, |out| {
                    out.extend_from_slice(&refusal.code().to_le_bytes())
                });
            }
        }
    }

    /// Reads one frame; `buffer` is scratch space.
    pub fn read(stream: &mut impl Read, buffer: &mut Vec<u8>) -> Result<ToSource, FrameError> {
        let kind = read_frame(stream, buffer, |kind| match kind {
            1 => Some(2),
            2 => Some(4 + MAX_DIGESTS * size_of::<DigestBody>()),
            3 => Some(0),
            4 => Some(size_of::<CountsBody>()),
            5 => Some(4),
            _ => None,
        })?;
        let name = match kind {
            1 => "Ready",
            2 => "Digests",
            3 => "Answered",
            4 => "Ack",
            _ => "Failed",
        };
        let mut body = Cursor::new(name, buffer);
        let message = match kind {
            1 => {
                let empty: U16 = body.fixed()?;
                ToSource::Ready {
                    empty: body.flag(empty.get(), "empty")?,
                }
            }
            2 => {
                let index: U32 = body.fixed()?;
                let mut digests: Vec<ChunkDigest> = Vec::new();
                while !body.is_empty() {
                    let found: DigestBody = body.fixed()?;
                    if digests
                        .last()
                        .is_some_and(|last| last.chunk >= found.chunk.get())
                    {
                        return Err(body.bad("chunk order"));
                    }
                    digests.push(ChunkDigest {
                        chunk: found.chunk.get(),
                        digest: found.digest.get(),
                    });
                }
                ToSource::Digests {
                    index: index.get(),
                    digests,
                }
            }
            3 => ToSource::Answered,
            4 => ToSource::Ack(Counts::decode(&mut body)?),
            _ => {
                let code: U32 = body.fixed()?;
                ToSource::Failed(Refusal::from_code(code.get()).ok_or(body.bad("refusal"))?)
            }
        };
        body.finish()?;
        Ok(message)
    }
}

impl Counts {
    fn encode(&self, out: &mut Vec<u8>) {
        let body = CountsBody {
            puts: self.puts.into(),
            links: self.links.into(),
            removals: self.removals.into(),
            data_bytes: self.data_bytes.into(),
        };
        out.extend_from_slice(body.as_bytes());
    }

    fn decode(body: &mut Cursor<'_>) -> Result<Counts, FrameError> {
        let counts: CountsBody = body.fixed()?;
        Ok(Counts {
            puts: counts.puts.get(),
            links: counts.links.get(),
            removals: counts.removals.get(),
            data_bytes: counts.data_bytes.get(),
        })
    }
}

fn frame(out: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; size_of::<Header>()]);
    body(out);
    let len = out.len() - start - size_of::<Header>();
    // Senders bound their payloads (a path, an entry checked against MAX_ENTRY, a chunk) far below 4 GiB.
    let header = Header {
        kind: kind.into(),
        zero: 0.into(),
        len: (len as u32).into(),
    };
    out[start..start + size_of::<Header>()].copy_from_slice(header.as_bytes());
}

fn read_frame(
    stream: &mut impl Read,
    buffer: &mut Vec<u8>,
    limit: impl FnOnce(u16) -> Option<usize>,
) -> Result<u16, FrameError> {
    let mut header = Header {
        kind: 0.into(),
        zero: 0.into(),
        len: 0.into(),
    };
    stream.read_exact(header.as_mut_bytes())?;
    let (kind, len) = (header.kind.get(), header.len.get() as usize);
    let limit = limit(kind).ok_or(FrameError::Kind(kind))?;
    if header.zero.get() != 0 {
        return Err(FrameError::Field {
            frame: "any",
            field: "header",
        });
    }
    if len > limit {
        return Err(FrameError::TooLong { kind, len, limit });
    }
    buffer.resize(len, 0);
    stream.read_exact(buffer)?;
    Ok(kind)
}

#[cfg(test)]
mod tests;
