//! What can go wrong between two hosts, in words a user can act on.

use super::fingerprint::Fingerprint;
use super::trust::TrustError;
use crate::wire::file_frame::FileFrameError;
use crate::wire::message::MessageError;
use crate::wire::page_frame::FrameError;
use crate::wire::page_request::PageRequestError;
use crate::wire::path::RelativePath;
use crate::wire::peer_error::PeerError;
use crate::wire::stream::StreamHeaderError;
use crate::wire::version::{HelloError, Version};
use quinn::{ConnectError, ConnectionError, ReadError, ReadExactError, VarInt, WriteError};
use rustls::AlertDescription;
use std::io;
use std::net::SocketAddr;
use thiserror::Error;

/// Why a connection was not made, or broke.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The socket could not be made.
    #[error("cannot use a UDP socket at {addr}: {source}")]
    Socket {
        /// The local address.
        addr: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// This host has no route to the peer.
    #[error("there is no route to {peer}: {source}")]
    NoRoute {
        /// The peer.
        peer: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Nobody answered.
    #[error("nobody answers at {peer}: is `migrate agent` running there, and UDP let through?")]
    Unreachable {
        /// The peer.
        peer: SocketAddr,
    },
    /// The peer's certificate is not in this host's trust store.
    #[error(
        "the peer is not trusted here; if it is the right one: migrate trust add NAME {fingerprint}"
    )]
    UnknownPeer {
        /// The certificate it showed.
        fingerprint: Fingerprint,
    },
    /// This host's certificate is not in the peer's trust store.
    #[error(
        "the peer does not trust this host; there: migrate trust add NAME with what `migrate identity` prints here"
    )]
    NotTrusted,
    /// The trust store could not be read.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// This host's identity does not work for TLS.
    #[error("this host's identity cannot be used: {0}")]
    Identity(#[from] rustls::Error),
    /// No protocol version is spoken by both.
    #[error(
        "no common protocol version: here {}, there {}",
        list(ours),
        list(theirs)
    )]
    VersionMismatch {
        /// What this build speaks.
        ours: Vec<Version>,
        /// What the peer speaks.
        theirs: Vec<Version>,
    },
    /// The peer's first bytes are wrong.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The peer was heard once, and then no more for the idle timeout.
    #[error("the peer has gone silent")]
    TimedOut,
    /// The peer closed the connection and said why.
    #[error("the peer closed the connection: {0}")]
    ClosedByPeer(PeerError),
    /// This side closed the connection.
    #[error("the connection was closed here")]
    ClosedHere,
    /// The connection broke in another way.
    #[error("the connection broke: {0}")]
    Broken(ConnectionError),
    /// A connection could not be begun.
    #[error("cannot connect: {0}")]
    Connect(#[from] ConnectError),
    /// The peer gave one stream up and said why.
    #[error("the peer gave a stream up: {0}")]
    StreamGivenUp(PeerError),
    /// A stream ended inside a frame or message.
    #[error("a stream ended in the middle of {0}")]
    Truncated(&'static str),
    /// A stream was used after its end.
    #[error("a stream was used after its end")]
    StreamEnded,
    /// The peer opened a stream of no known kind.
    #[error(transparent)]
    StreamHeader(#[from] StreamHeaderError),
    /// A control message is wrong.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More control messages came than a conversation has.
    #[error("the peer says more than any migration has to say")]
    Endless,
    /// A page frame is wrong.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A page request is wrong.
    #[error(transparent)]
    PageRequest(#[from] PageRequestError),
    /// A file frame is wrong.
    #[error(transparent)]
    File(#[from] FileFrameError),
    /// A file is larger than whoever reads it expects.
    #[error("the peer sends {name} with {size} bytes, at most {limit} are expected")]
    FileTooLarge {
        /// The file.
        name: RelativePath,
        /// Its size.
        size: u64,
        /// What was expected.
        limit: u64,
    },
    /// A file's content could not be read or written on this host.
    #[error("cannot copy the content of {name}: {source}")]
    Content {
        /// The file.
        name: RelativePath,
        /// Why not.
        source: io::Error,
    },
    /// A file became shorter while it was sent.
    #[error("{name} became shorter while it was sent")]
    Shrunk {
        /// The file.
        name: RelativePath,
    },
}

impl TransportError {
    /// The number this failure has on the wire, for telling the peer.
    pub fn as_peer_error(&self) -> PeerError {
        match self {
            TransportError::Hello(_)
            | TransportError::StreamHeader(_)
            | TransportError::Message(_)
            | TransportError::PageRequest(_)
            | TransportError::Truncated(_)
            | TransportError::FileTooLarge { .. } => PeerError::Malformed,
            TransportError::Frame(FrameError::Hash | FrameError::Decompress(_))
            | TransportError::File(FileFrameError::Hash) => PeerError::Corrupt,
            TransportError::Frame(_) | TransportError::File(_) => PeerError::Malformed,
            TransportError::VersionMismatch { .. } => PeerError::NoCommonVersion,
            TransportError::TimedOut => PeerError::TimedOut,
            TransportError::Endless => PeerError::Unexpected,
            TransportError::ClosedByPeer(error) | TransportError::StreamGivenUp(error) => *error,
            _ => PeerError::Internal,
        }
    }
}

fn list(versions: &[Version]) -> String {
    let texts: Vec<String> = versions.iter().map(Version::to_string).collect();
    texts.join(", ")
}

/// The error number in a close, reset or stop.
pub(super) fn peer_error(code: VarInt) -> PeerError {
    PeerError::from(u16::try_from(code.into_inner()).unwrap_or(u16::MAX))
}

/// The number of an error in a close, reset or stop.
pub(super) fn code(error: PeerError) -> VarInt {
    VarInt::from(u16::from(error))
}

/// TLS alerts that say "your certificate does not get you in here".
fn says_not_trusted(error: quinn::TransportErrorCode) -> bool {
    [
        AlertDescription::AccessDenied,
        AlertDescription::BadCertificate,
        AlertDescription::UnknownCA,
        AlertDescription::CertificateUnknown,
        AlertDescription::CertificateRequired,
    ]
    .into_iter()
    .any(|alert| error == quinn::TransportErrorCode::crypto(alert.into()))
}

impl From<ConnectionError> for TransportError {
    fn from(error: ConnectionError) -> TransportError {
        match error {
            ConnectionError::TimedOut => TransportError::TimedOut,
            ConnectionError::LocallyClosed => TransportError::ClosedHere,
            ConnectionError::ApplicationClosed(close) => {
                TransportError::ClosedByPeer(peer_error(close.error_code))
            }
            ConnectionError::ConnectionClosed(close) if says_not_trusted(close.error_code) => {
                TransportError::NotTrusted
            }
            other => TransportError::Broken(other),
        }
    }
}

impl From<WriteError> for TransportError {
    fn from(error: WriteError) -> TransportError {
        match error {
            WriteError::ConnectionLost(lost) => lost.into(),
            WriteError::Stopped(code) => TransportError::StreamGivenUp(peer_error(code)),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => TransportError::StreamEnded,
        }
    }
}

impl From<ReadError> for TransportError {
    fn from(error: ReadError) -> TransportError {
        match error {
            ReadError::ConnectionLost(lost) => lost.into(),
            ReadError::Reset(code) => TransportError::StreamGivenUp(peer_error(code)),
            ReadError::ClosedStream
            | ReadError::IllegalOrderedRead
            | ReadError::ZeroRttRejected => TransportError::StreamEnded,
        }
    }
}

/// What an exact read inside `part` says when it fails.
pub(super) fn in_part(part: &'static str) -> impl Fn(ReadExactError) -> TransportError {
    move |error| match error {
        ReadExactError::FinishedEarly(_) => TransportError::Truncated(part),
        ReadExactError::ReadError(error) => error.into(),
    }
}
