//! The first bytes of every QUIC stream but the control stream: what the stream is for, and which one of its kind.
//!
//! ```text
//!  0      1       3
//!  | kind | index | ...
//!  | u8   | u16   |
//! ```

use thiserror::Error;

/// Bytes of a stream header.
pub const HEADER_LEN: usize = 3;

/// What a stream is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum StreamKind {
    /// Page frames, source to target; one direction. The index says which of the migration's page streams it is.
    Pages = 1,
    /// File frames, source to target; one direction.
    Files = 2,
    /// The root filesystem's own protocol; both directions.
    Rootfs = 3,
    /// Page requests of a post-copy target and their answers; both directions.
    Faults = 4,
}

/// Why bytes are not a stream header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum StreamHeaderError {
    /// A kind that this version does not know.
    #[error("the peer opened a stream of the unknown kind {0}")]
    Kind(u8),
}

impl StreamKind {
    /// The header of stream `index` of this kind.
    pub fn header(self, index: u16) -> [u8; HEADER_LEN] {
        let [low, high] = index.to_le_bytes();
        [self as u8, low, high]
    }

    /// Reads a stream header.
    pub fn decode(header: [u8; HEADER_LEN]) -> Result<(StreamKind, u16), StreamHeaderError> {
        let [kind, low, high] = header;
        let kind = match kind {
            1 => StreamKind::Pages,
            2 => StreamKind::Files,
            3 => StreamKind::Rootfs,
            4 => StreamKind::Faults,
            unknown => return Err(StreamHeaderError::Kind(unknown)),
        };
        Ok((kind, u16::from_le_bytes([low, high])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_stream_header_are_pinned() {
        assert_eq!(StreamKind::Pages.header(0x0203), [1, 3, 2]);
        assert_eq!(StreamKind::Faults.header(0), [4, 0, 0]);
    }

    #[test]
    fn every_kind_decodes_to_itself_and_no_other_byte_decodes() {
        let kinds = [
            StreamKind::Pages,
            StreamKind::Files,
            StreamKind::Rootfs,
            StreamKind::Faults,
        ];
        for kind in kinds {
            assert_eq!(StreamKind::decode(kind.header(513)), Ok((kind, 513)));
        }
        for byte in 0..=255u8 {
            if !(1..=4).contains(&byte) {
                assert_eq!(
                    StreamKind::decode([byte, 0, 0]),
                    Err(StreamHeaderError::Kind(byte))
                );
            }
        }
    }
}
