//! Control messages: the conversation of a migration, on one stream in both directions.
//!
//! Each message is a fixed header and a JSON body. They are rare and small, and JSON lets a version add a field
//! without breaking the one before; unknown fields are ignored.
//!
//! ```text
//!  0        4      6          8        12
//!  | magic  | type | reserved | length | body     |
//!  | "MCTL" | u16  | u16 = 0  | u32    | length B |
//! ```
//!
//! ```text
//!  source                         target
//!  Begin          ──────▶  Accepted or Refused
//!  RoundEnd       ──────▶  RoundReceived          once a round
//!  SpacesEnded    ──────▶                         between rounds
//!  Prestart       ──────▶
//!  Manifest       ──────▶  Prepared or RolledBack
//!  Commit         ──────▶  Committed, later Filled, then Outcome; or RolledBack
//!  Abort          ──────▶  RolledBack             at any time before Commit
//!  Query          ──────▶  Outcome                on a connection of its own
//!  Resume         ──────▶  Resumed, later Filled, then Outcome; or Outcome at once      the same
//! ```
//!
//! The copy runs before it is complete: the `Outcome` that says so comes some time after `Committed`, or never on this
//! connection; then the source connects again and says `Resume`. In post-copy `Whole` comes before it.
//!
//! What the types in [`body`] promise is checked when a message is read and again when one is written.

pub mod body;
pub mod shared;
mod text;

pub use body::*;
pub use text::PeerText;

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first four bytes of every message, "MCTL" in the order of the wire.
pub const MAGIC: u32 = u32::from_le_bytes(*b"MCTL");

/// Bytes of a message before its body.
pub const HEADER_LEN: usize = size_of::<RawHeader>();

/// The largest body, in bytes.
pub const MAX_BODY: usize = 4 << 20;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    kind: U16,
    reserved: U16,
    length: U32,
}

/// What a message header says, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    kind: Kind,
    /// Bytes of the body that follows, at most [`MAX_BODY`].
    pub body_len: usize,
}

/// Why bytes are not a message, or a message cannot be sent.
#[derive(Debug, Error)]
pub enum MessageError {
    /// The first bytes are not a message's.
    #[error("a control message begins with {0:#010x}, which no message does")]
    Magic(u32),
    /// A message type this version does not know.
    #[error("a control message has the unknown type {0}")]
    Kind(u16),
    /// Reserved bits are set.
    #[error("a control message sets reserved bits")]
    Reserved,
    /// The body is larger than [`MAX_BODY`].
    #[error("a control message of {0} bytes is larger than {MAX_BODY}")]
    TooLarge(usize),
    /// The body is shorter or longer than the header says.
    #[error("a control message has {got} bytes of body where {expected} belong")]
    Length {
        /// What the header promises.
        expected: usize,
        /// What was there.
        got: usize,
    },
    /// The body is not what the type says, or breaks a rule of [`body`].
    #[error("the body of a {name} message is wrong: {source}")]
    Body {
        /// The message's name.
        name: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Fields that are each right do not fit together.
    #[error("the body of a {name} message is wrong: {rule}")]
    Rule {
        /// The message's name.
        name: &'static str,
        /// The rule that is broken.
        rule: &'static str,
    },
}

macro_rules! messages {
    ($($number:literal $name:ident $doc:literal)*) => {
        /// A control message.
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub enum Message {
            $(#[doc = $doc] $name($name),)*
        }

        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u16)]
        enum Kind {
            $($name = $number,)*
        }

        impl Kind {
            fn from_number(number: u16) -> Option<Kind> {
                match number {
                    $($number => Some(Kind::$name),)*
                    _ => None,
                }
            }

            fn parse(self, body: &[u8]) -> Result<Message, MessageError> {
                match self {
                    $(Kind::$name => serde_json::from_slice(body)
                        .map(Message::$name)
                        .map_err(|source| MessageError::Body { name: stringify!($name), source }),)*
                }
            }
        }

        impl Message {
            /// The message's name, for logs and errors.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Message::$name(_) => stringify!($name),)*
                }
            }

            fn kind(&self) -> Kind {
                match self {
                    $(Message::$name(_) => Kind::$name,)*
                }
            }

            fn write_body(&self, out: impl std::io::Write) -> serde_json::Result<()> {
                match self {
                    $(Message::$name(body) => serde_json::to_writer(out, body),)*
                }
            }
        }

        $(impl From<$name> for Message {
            fn from(body: $name) -> Message {
                Message::$name(body)
            }
        })*
    };
}

messages! {
    1 Begin "Source: may this container come?"
    2 RoundEnd "Source: these are all the frames of a round."
    3 Prestart "Source: start a restore that waits for its images."
    4 Manifest "Source: all pages and files are sent; this is what there must be."
    5 Commit "Source: from here on only the target may run the container."
    6 Abort "Source: the migration ends, the container goes on at the source."
    7 Query "Source: what became of this migration?"
    8 Resume "Source: this connection takes the place of a lost one; is the copy complete, and which pages are still owed?"
    9 SpacesEnded "Source: these address spaces are gone; their pages are of no use any more."
    101 Accepted "Target: the container may come."
    102 Refused "Target: the container may not come."
    103 RoundReceived "Target: every frame of the round is in the page store."
    104 Prepared "Target: the container is restored and held before its first instruction."
    105 Committed "Target: the container runs here."
    106 RolledBack "Target: nothing of the container is left here."
    107 Outcome "Target: what became of a migration."
    108 Filled "Target: every page is in its place."
    109 Whole "Target: every owed page has arrived."
    110 Resumed "Target: the copy is not complete; wait for its outcome, and send what it is owed."
}

impl Message {
    /// The bytes to send.
    pub fn encode(&self) -> Result<Bytes, MessageError> {
        self.check()?;
        let mut bytes = BytesMut::zeroed(HEADER_LEN);
        self.write_body((&mut bytes).writer())
            .map_err(|source| MessageError::Body {
                name: self.name(),
                source,
            })?;
        let body_len = bytes.len() - HEADER_LEN;
        if body_len > MAX_BODY {
            return Err(MessageError::TooLarge(body_len));
        }
        let header = RawHeader {
            magic: MAGIC.into(),
            kind: (self.kind() as u16).into(),
            reserved: 0.into(),
            length: (body_len as u32).into(),
        };
        bytes[..HEADER_LEN].copy_from_slice(header.as_bytes());
        Ok(bytes.freeze())
    }

    /// Reads the body that follows `header`; `body` must be exactly as long as the header says.
    pub fn decode(header: Header, body: &[u8]) -> Result<Message, MessageError> {
        if body.len() != header.body_len {
            return Err(MessageError::Length {
                expected: header.body_len,
                got: body.len(),
            });
        }
        let message = header.kind.parse(body)?;
        message.check()?;
        Ok(message)
    }

    /// The rules that no single field can keep.
    fn check(&self) -> Result<(), MessageError> {
        let rule = match self {
            Message::Begin(body) => body.requirements.broken_rule(),
            Message::Prestart(body) => body.broken_rule(),
            Message::Manifest(body) => body.broken_rule(),
            Message::Refused(body) => body.broken_rule(),
            _ => None,
        };
        match rule {
            Some(rule) => Err(MessageError::Rule {
                name: self.name(),
                rule,
            }),
            None => Ok(()),
        }
    }
}

impl Header {
    /// Reads a header; its length is within bounds when this succeeds.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, MessageError> {
        let raw = RawHeader::ref_from_bytes(bytes)
            .expect("the header has no alignment and its exact size");
        if raw.magic.get() != MAGIC {
            return Err(MessageError::Magic(raw.magic.get()));
        }
        if raw.reserved.get() != 0 {
            return Err(MessageError::Reserved);
        }
        let kind = Kind::from_number(raw.kind.get()).ok_or(MessageError::Kind(raw.kind.get()))?;
        let body_len = raw.length.get() as usize;
        if body_len > MAX_BODY {
            return Err(MessageError::TooLarge(body_len));
        }
        Ok(Header { kind, body_len })
    }
}

#[cfg(test)]
mod tests;
