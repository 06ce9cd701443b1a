//! What two hosts say to each other, as bytes: no I/O, no runtime, no clock.
//!
//! In: bytes from a peer. Out: values that hold what their types promise, or a typed error. This is the only place
//! where a length, an address or a name from a peer is looked at before it is believed; nothing past it sees an
//! unchecked one. The same types encode, so both directions are tested against each other.
//!
//! ```text
//!  control stream:  hello offer ▶ ◀ hello answer, then messages both ways     version, message
//!  page streams:    stream header, page frame, page frame, ...                stream, page_frame, codec
//!  fault streams:   stream header, then page requests ◀ ▶ page frames         stream, page_request, page_frame
//!  file streams:    stream header, file frame, file frame, ...                stream, file_frame
//! ```
//!
//! `docs/wire.md` draws every byte.

pub mod codec;
pub mod file_frame;
pub mod id;
pub mod message;
pub mod page_frame;
pub mod page_request;
pub mod path;
pub mod peer_error;
pub mod rootfs;
pub mod stream;
pub mod version;
