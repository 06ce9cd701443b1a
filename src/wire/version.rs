//! Offer and select of the protocol version, before anything else is said.
//!
//! These bytes never change between versions, so two builds that share no version can still tell each other so. The
//! connecting side sends an offer, the accepting side answers; both have the same layout, all integers little-endian:
//!
//! ```text
//!  0        8        10       12
//!  | magic  | status | count  | version | version | ...
//!  | 8 B    | u16    | u16    | u16     | u16     |
//! ```
//!
//! In an offer the status is 0 and the versions are those the connecting side speaks, best first. In an answer status
//! 0 is followed by the one selected version, status 1 by all versions the accepting side speaks.
//!
//! # Versions
//!
//! - 1: the first: control messages, page frames, file frames, root filesystem streams.
//! - 2: post-copy: owed runs in page frames, and what is said on fault streams. Same runs in page frames.

use std::fmt;
use thiserror::Error;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first eight bytes of every hello.
pub const MAGIC: [u8; 8] = *b"MIGRATE\0";

/// The most versions one hello may list.
pub const MAX_VERSIONS: usize = 32;

/// Bytes of a hello before its list of versions.
pub const HEAD_LEN: usize = size_of::<Head>();

/// A version of the wire protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Version(pub u16);

impl Version {
    /// The versions this build speaks, best first.
    pub const SUPPORTED: &[Version] = &[Version(2)];
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the connecting side says first: the versions it speaks, best first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// At least one, at most [`MAX_VERSIONS`].
    pub versions: Vec<Version>,
}

/// What the accepting side says to an [`Offer`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Both sides go on in this version.
    Selected(Version),
    /// There is no common version; these are the ones the accepting side speaks.
    Unsupported(Vec<Version>),
}

/// Why bytes are not a hello.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum HelloError {
    /// The first bytes are not ours: the peer is something else.
    #[error("the peer does not speak the migrate protocol")]
    Magic,
    /// A status number that no version defines.
    #[error("the hello has the unknown status {0}")]
    Status(u16),
    /// No version at all, or more than [`MAX_VERSIONS`].
    #[error("the hello lists {0} versions, between 1 and {MAX_VERSIONS} are allowed")]
    Count(u16),
    /// The bytes end early or go on after the list.
    #[error("the hello has {got} bytes where {expected} belong")]
    Length {
        /// What the head promises.
        expected: usize,
        /// What was there.
        got: usize,
    },
}

const STATUS_SELECTED: u16 = 0;
const STATUS_UNSUPPORTED: u16 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    status: U16,
    count: U16,
}

impl Offer {
    /// The offer of this build.
    pub fn ours() -> Offer {
        Offer {
            versions: Version::SUPPORTED.to_vec(),
        }
    }

    /// The answer of a side that speaks `supported`: the first offered version it speaks too.
    pub fn answer(&self, supported: &[Version]) -> Answer {
        match self.versions.iter().find(|v| supported.contains(v)) {
            Some(&version) => Answer::Selected(version),
            None => Answer::Unsupported(supported.to_vec()),
        }
    }

    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        encode(STATUS_SELECTED, &self.versions)
    }

    /// Reads a whole offer: [`HEAD_LEN`] bytes and the list they promise.
    pub fn decode(bytes: &[u8]) -> Result<Offer, HelloError> {
        match decode(bytes)? {
            (STATUS_SELECTED, versions) => Ok(Offer { versions }),
            (status, _) => Err(HelloError::Status(status)),
        }
    }
}

impl Answer {
    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Answer::Selected(version) => encode(STATUS_SELECTED, &[*version]),
            Answer::Unsupported(versions) => encode(STATUS_UNSUPPORTED, versions),
        }
    }

    /// Reads a whole answer: [`HEAD_LEN`] bytes and the list they promise.
    pub fn decode(bytes: &[u8]) -> Result<Answer, HelloError> {
        match decode(bytes)? {
            (STATUS_SELECTED, versions) => match versions[..] {
                [version] => Ok(Answer::Selected(version)),
                _ => Err(HelloError::Count(versions.len() as u16)),
            },
            (STATUS_UNSUPPORTED, versions) => Ok(Answer::Unsupported(versions)),
            (status, _) => Err(HelloError::Status(status)),
        }
    }
}

/// How many bytes follow the first [`HEAD_LEN`] of a hello; at most 2 × [`MAX_VERSIONS`].
pub fn list_len(head: &[u8; HEAD_LEN]) -> Result<usize, HelloError> {
    let head = Head::ref_from_bytes(head).expect("the head has no alignment and its exact size");
    if head.magic != MAGIC {
        return Err(HelloError::Magic);
    }
    let count = head.count.get();
    if count == 0 || usize::from(count) > MAX_VERSIONS {
        return Err(HelloError::Count(count));
    }
    Ok(usize::from(count) * size_of::<U16>())
}

fn encode(status: u16, versions: &[Version]) -> Vec<u8> {
    assert!(
        (1..=MAX_VERSIONS).contains(&versions.len()),
        "a build speaks between 1 and {MAX_VERSIONS} versions"
    );
    let head = Head {
        magic: MAGIC,
        status: status.into(),
        count: (versions.len() as u16).into(),
    };
    let mut bytes = head.as_bytes().to_vec();
    for version in versions {
        bytes.extend_from_slice(&version.0.to_le_bytes());
    }
    bytes
}

fn decode(bytes: &[u8]) -> Result<(u16, Vec<Version>), HelloError> {
    let Some((head, list)) = bytes.split_first_chunk::<HEAD_LEN>() else {
        return Err(HelloError::Length {
            expected: HEAD_LEN,
            got: bytes.len(),
        });
    };
    let expected = list_len(head)?;
    if list.len() != expected {
        return Err(HelloError::Length {
            expected: HEAD_LEN + expected,
            got: bytes.len(),
        });
    }
    let status = u16::from_le_bytes([head[8], head[9]]);
    let versions = list
        .chunks_exact(2)
        .map(|v| Version(u16::from_le_bytes([v[0], v[1]])))
        .collect();
    Ok((status, versions))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bytes_of_a_hello_are_pinned_for_every_version_to_come() {
        let offer = Offer {
            versions: vec![Version(0x0201), Version(1)],
        };
        assert_eq!(
            offer.encode(),
            b"MIGRATE\0\x00\x00\x02\x00\x01\x02\x01\x00".to_vec()
        );
        assert_eq!(
            Answer::Selected(Version(1)).encode(),
            b"MIGRATE\0\x00\x00\x01\x00\x01\x00".to_vec()
        );
        assert_eq!(
            Answer::Unsupported(vec![Version(7), Version(3)]).encode(),
            b"MIGRATE\0\x01\x00\x02\x00\x07\x00\x03\x00".to_vec()
        );
    }

    #[test]
    fn the_best_offered_version_that_both_speak_is_selected() {
        let offer = Offer {
            versions: vec![Version(9), Version(3), Version(1)],
        };
        assert_eq!(
            offer.answer(&[Version(1), Version(3)]),
            Answer::Selected(Version(3))
        );
        assert_eq!(
            offer.answer(&[Version(2)]),
            Answer::Unsupported(vec![Version(2)])
        );
    }

    #[test]
    fn a_hello_with_a_wrong_magic_count_status_or_length_is_refused() {
        let good = Offer::ours().encode();
        let mut wrong = good.clone();
        wrong[0] = b'm';
        assert_eq!(Offer::decode(&wrong), Err(HelloError::Magic));
        let mut wrong = good.clone();
        wrong[10] = 0;
        assert_eq!(Offer::decode(&wrong), Err(HelloError::Count(0)));
        let mut wrong = good.clone();
        wrong[10..12].copy_from_slice(&33u16.to_le_bytes());
        assert_eq!(Offer::decode(&wrong), Err(HelloError::Count(33)));
        let mut wrong = good.clone();
        wrong[8] = 1;
        assert_eq!(Offer::decode(&wrong), Err(HelloError::Status(1)));
        wrong[8] = 2;
        assert_eq!(Answer::decode(&wrong), Err(HelloError::Status(2)));
        for cut in 0..good.len() {
            assert!(matches!(
                Offer::decode(&good[..cut]),
                Err(HelloError::Length { .. })
            ));
        }
        let two = encode(STATUS_SELECTED, &[Version(1), Version(2)]);
        assert_eq!(Answer::decode(&two), Err(HelloError::Count(2)));
    }

    proptest! {
        #[test]
        fn a_hello_survives_the_wire(versions in prop::collection::vec(any::<u16>().prop_map(Version), 1..=MAX_VERSIONS)) {
            let offer = Offer { versions: versions.clone() };
            prop_assert_eq!(Offer::decode(&offer.encode()), Ok(offer));
            let answer = Answer::Unsupported(versions);
            prop_assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }

        #[test]
        fn no_bytes_make_the_hello_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Offer::decode(&bytes);
            let _ = Answer::decode(&bytes);
        }
    }
}
