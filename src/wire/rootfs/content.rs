//! The content of a file as both ends see it: chunks of 256 KiB, each with the digest of its data and of
//! where its data lies.
//!
//! The source keeps the digests of what the target holds, so a changed file costs a read but only its
//! changed chunks travel; the target computes them for files left by an earlier attempt.

use xxhash_rust::xxh3::Xxh3;

/// Bytes of a chunk; the last one of a file may be shorter.
pub const CHUNK: usize = 256 << 10;

/// What one chunk of a file holds. A chunk without data (all hole) has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkDigest {
    /// Number of the chunk: its first byte divided by [`CHUNK`].
    pub chunk: u64,
    /// Seeded xxh3-128 of the chunk's extents (offset and length in the chunk) and their bytes.
    pub digest: u128,
}

impl ChunkDigest {
    /// The digest of chunk number `chunk` under `seed`, from its data: offset in the chunk and bytes,
    /// ascending.
    pub fn of(seed: u64, chunk: u64, extents: &[(usize, &[u8])]) -> ChunkDigest {
        let mut hash = Xxh3::with_seed(seed);
        for (offset, bytes) in extents {
            hash.update(&(*offset as u64).to_le_bytes());
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
        ChunkDigest {
            chunk,
            digest: hash.digest128(),
        }
    }
}

/// Running xxh3-128 of the content frames of one file, in the order they are sent.
pub struct ContentHash(Xxh3);

impl ContentHash {
    /// The hash of no frames.
    pub fn new() -> Self {
        ContentHash(Xxh3::new())
    }

    /// Adds a `Data` frame.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) {
        self.0.update(b"D");
        self.0.update(&offset.to_le_bytes());
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// Adds a `Hole` frame.
    pub fn hole(&mut self, offset: u64, len: u64) {
        self.0.update(b"H");
        self.0.update(&offset.to_le_bytes());
        self.0.update(&len.to_le_bytes());
    }

    /// The hash of all frames added.
    pub fn finish(&self) -> u128 {
        self.0.digest128()
    }
}

impl Default for ContentHash {
    fn default() -> Self {
        ContentHash::new()
    }
}
