//! File frames: one file with its name, mode and content; CRIU's images and other small files.
//!
//! ```text
//!  0       4          6          8      12     20
//!  | magic | name len | reserved | mode | size | name | content | xxh3-128 |
//!  | MFIL  | u16      | u16 = 0  | u32  | u64  |      | size B  | u128     |
//! ```
//!
//! All integers are little-endian. The name is a relative path that cannot leave the directory it is put in. The mode
//! has permission bits only. The hash covers everything before it. Content is streamed: who reads a frame limits the
//! size by what he expects, this room cannot know it.

use crate::wire::path::{MAX_PATH, PathError, RelativePath};
use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a file frame before the name.
pub const HEADER_LEN: usize = size_of::<RawHeader>();

/// Bytes of the hash after the content.
pub const TRAILER_LEN: usize = 16;

/// The largest file, in bytes: 1 PiB, so that sums cannot overflow.
pub const MAX_SIZE: u64 = 1 << 50;

const MAGIC: u32 = u32::from_le_bytes(*b"MFIL");
const PERMISSION_BITS: u32 = 0o7777;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    name_len: U16,
    reserved: U16,
    mode: U32,
    size: U64,
}

/// A file about to be sent or received.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileHeader {
    /// Where it goes, relative to a directory both sides know.
    pub name: RelativePath,
    /// Permission bits, at most `0o7777`.
    pub mode: u32,
    /// Bytes of content.
    pub size: u64,
}

/// The fixed part of a file frame, with every field within bounds but the name still to come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    name_len: u16,
    mode: u32,
    size: u64,
}

/// Why bytes are not a file frame, or a file cannot be sent as one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum FileFrameError {
    /// The first bytes are not a file frame's.
    #[error("a file frame begins with {0:#010x}, which no file frame does")]
    Magic(u32),
    /// Reserved bits are set.
    #[error("a file frame sets reserved bits")]
    Reserved,
    /// A name of no bytes or too many.
    #[error("a file frame has a name of {0} bytes, between 1 and {MAX_PATH} are allowed")]
    NameLength(u16),
    /// A name that is not UTF-8.
    #[error("a file frame has a name that is not UTF-8")]
    NameEncoding,
    /// A name that could leave its directory.
    #[error("a file frame has a wrong name: {0}")]
    Name(#[from] PathError),
    /// Mode bits beyond permissions.
    #[error("a file frame has the mode {0:#o}, only permission bits are allowed")]
    Mode(u32),
    /// A size above [`MAX_SIZE`].
    #[error("a file frame claims {0} bytes")]
    Size(u64),
    /// The content is not what was sent.
    #[error("a file's content does not match its hash")]
    Hash,
}

impl FileHeader {
    /// The bytes before the content, and the hash to feed with it.
    pub fn encode(&self) -> Result<(Bytes, FileHash), FileFrameError> {
        check(self.mode, self.size)?;
        let header = RawHeader {
            magic: MAGIC.into(),
            name_len: (self.name.as_str().len() as u16).into(),
            reserved: 0.into(),
            mode: self.mode.into(),
            size: self.size.into(),
        };
        let mut bytes = BytesMut::with_capacity(HEADER_LEN + self.name.as_str().len());
        bytes.put_slice(header.as_bytes());
        bytes.put_slice(self.name.as_str().as_bytes());
        let hash = FileHash::over(&bytes);
        Ok((bytes.freeze(), hash))
    }
}

impl Header {
    /// Reads the fixed part.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, FileFrameError> {
        let raw = RawHeader::ref_from_bytes(bytes)
            .expect("the header has no alignment and its exact size");
        if raw.magic.get() != MAGIC {
            return Err(FileFrameError::Magic(raw.magic.get()));
        }
        if raw.reserved.get() != 0 {
            return Err(FileFrameError::Reserved);
        }
        let name_len = raw.name_len.get();
        if name_len == 0 || usize::from(name_len) > MAX_PATH {
            return Err(FileFrameError::NameLength(name_len));
        }
        let (mode, size) = (raw.mode.get(), raw.size.get());
        check(mode, size)?;
        Ok(Header {
            name_len,
            mode,
            size,
        })
    }

    /// Bytes of the name that follows, 1 to 4095.
    pub fn name_len(&self) -> usize {
        usize::from(self.name_len)
    }

    /// Reads the name; gives the file and the hash to feed with its content.
    pub fn with_name(self, name: &[u8]) -> Result<(FileHeader, FileHash), FileFrameError> {
        if name.len() != self.name_len() {
            return Err(FileFrameError::NameLength(
                u16::try_from(name.len()).unwrap_or(u16::MAX),
            ));
        }
        let name = std::str::from_utf8(name).map_err(|_| FileFrameError::NameEncoding)?;
        let file = FileHeader {
            name: name.parse()?,
            mode: self.mode,
            size: self.size,
        };
        let (_, hash) = file.encode()?;
        Ok((file, hash))
    }
}

fn check(mode: u32, size: u64) -> Result<(), FileFrameError> {
    if mode & !PERMISSION_BITS != 0 {
        return Err(FileFrameError::Mode(mode));
    }
    if size > MAX_SIZE {
        return Err(FileFrameError::Size(size));
    }
    Ok(())
}

/// The running hash of a file frame.
#[derive(Clone)]
pub struct FileHash(Box<Xxh3>);

impl FileHash {
    fn over(head: &[u8]) -> FileHash {
        let mut hash = Box::new(Xxh3::new());
        hash.update(head);
        FileHash(hash)
    }

    /// Takes in the next piece of content.
    pub fn update(&mut self, content: &[u8]) {
        self.0.update(content);
    }

    /// The bytes after the content.
    pub fn trailer(&self) -> [u8; TRAILER_LEN] {
        self.0.digest128().to_le_bytes()
    }

    /// Compares with the bytes received after the content.
    pub fn verify(&self, trailer: [u8; TRAILER_LEN]) -> Result<(), FileFrameError> {
        if self.trailer() == trailer {
            Ok(())
        } else {
            Err(FileFrameError::Hash)
        }
    }
}

impl std::fmt::Debug for FileHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileHash").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(name: &str) -> FileHeader {
        FileHeader {
            name: name.parse().expect("a name"),
            mode: 0o640,
            size: 5,
        }
    }

    fn decode(bytes: &[u8]) -> Result<(FileHeader, FileHash), FileFrameError> {
        let (header, rest) = bytes.split_first_chunk().expect("a whole header");
        let header = Header::decode(header)?;
        header.with_name(&rest[..header.name_len().min(rest.len())])
    }

    #[test]
    fn the_bytes_of_a_file_frame_are_pinned() {
        let (head, mut hash) = file("a/b").encode().expect("encodes");
        assert_eq!(
            &head[..],
            b"MFIL\x03\0\0\0\xa0\x01\0\0\x05\0\0\0\0\0\0\0a/b"
        );
        hash.update(b"hello");
        assert_eq!(
            hash.trailer(),
            xxhash_rust::xxh3::xxh3_128(&[&head[..], b"hello"].concat()).to_le_bytes()
        );
    }

    #[test]
    fn changed_content_or_another_name_does_not_match_the_hash() {
        let (head, mut sent) = file("core-1.img").encode().expect("encodes");
        sent.update(b"hello");
        let (_, mut received) = decode(&head).expect("decodes");
        received.update(b"he");
        received.update(b"llo");
        assert_eq!(received.verify(sent.trailer()), Ok(()));
        let (_, mut changed) = decode(&head).expect("decodes");
        changed.update(b"hallo");
        assert_eq!(changed.verify(sent.trailer()), Err(FileFrameError::Hash));
        let (_, mut renamed) = file("core-2.img").encode().expect("encodes");
        renamed.update(b"hello");
        assert_eq!(renamed.verify(sent.trailer()), Err(FileFrameError::Hash));
    }

    #[test]
    fn a_header_that_lies_is_refused() {
        let (good, _) = file("ab/cd").encode().expect("encodes");
        let with = |change: fn(&mut Vec<u8>)| {
            let mut bytes = good.to_vec();
            change(&mut bytes);
            decode(&bytes).map(|_| ())
        };
        assert!(matches!(with(|b| b[0] = 0), Err(FileFrameError::Magic(_))));
        assert_eq!(with(|b| b[6] = 1), Err(FileFrameError::Reserved));
        assert_eq!(
            with(|b| b[4..6].fill(0)),
            Err(FileFrameError::NameLength(0))
        );
        assert_eq!(
            with(|b| b[4..6].fill(255)),
            Err(FileFrameError::NameLength(u16::MAX))
        );
        assert_eq!(with(|b| b[4] = 9), Err(FileFrameError::NameLength(5)));
        assert_eq!(with(|b| b[10] = 1), Err(FileFrameError::Mode(0o200640)));
        assert!(matches!(with(|b| b[19] = 1), Err(FileFrameError::Size(_))));
        for name in [b"/b/cd", b"../cd", b"ab/..", b"ab//d", b"ab\0cd"] {
            let mut bytes = good.to_vec();
            bytes[HEADER_LEN..].copy_from_slice(name);
            assert!(
                matches!(decode(&bytes), Err(FileFrameError::Name(_))),
                "{name:?} was accepted"
            );
        }
        let mut bytes = good.to_vec();
        bytes[HEADER_LEN] = 0xff;
        assert_eq!(
            decode(&bytes).map(|_| ()),
            Err(FileFrameError::NameEncoding)
        );
    }

    proptest! {
        #[test]
        fn a_file_header_survives_the_wire(name in "[a-z]{1,9}(/[a-z.]{3,9}){0,3}", mode in 0u32..0o10000, size in 0..=MAX_SIZE) {
            prop_assume!(name.parse::<RelativePath>().is_ok());
            let file = FileHeader { name: name.parse().expect("assumed"), mode, size };
            let (head, _) = file.encode().expect("encodes");
            prop_assert_eq!(decode(&head).expect("decodes").0, file);
        }

        #[test]
        fn no_bytes_make_the_file_header_decoder_panic(bytes in prop::collection::vec(any::<u8>(), HEADER_LEN..300), mark in any::<bool>()) {
            let mut bytes = bytes;
            if mark {
                bytes[..4].copy_from_slice(b"MFIL");
            }
            let _ = decode(&bytes);
        }
    }
}
