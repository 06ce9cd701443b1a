//! The target's half of a fault stream: page requests, whole or not at all.

use super::connection::Connection;
use super::error::TransportError;
use crate::wire::page_request::{PageRequest, RECORD_LEN};
use bytes::{Buf, BytesMut};
use quinn::{RecvStream, SendStream};

/// As much as is taken from the stream at once.
const READ: usize = 64 << 10;

/// Sends page requests.
pub struct RequestSender {
    stream: SendStream,
    /// Keeps the connection open as long as somebody may ask.
    _connection: Connection,
}

/// Receives page requests.
pub struct RequestReceiver {
    stream: RecvStream,
    /// What came and was not given out yet.
    partial: BytesMut,
    _connection: Connection,
}

impl RequestSender {
    pub(super) fn new(stream: SendStream, connection: Connection) -> RequestSender {
        // A request is worth more than anything else this side sends.
        let _ = stream.set_priority(1);
        RequestSender {
            stream,
            _connection: connection,
        }
    }

    /// Sends requests. Cancelling the future may leave half of one on the stream: then nothing more can be sent.
    pub async fn send(&mut self, requests: &[PageRequest]) -> Result<(), TransportError> {
        let bytes: Vec<u8> = requests.iter().flat_map(|r| r.encode()).collect();
        self.stream.write_all(&bytes).await?;
        Ok(())
    }

    /// Says that no request follows. Fails if it was said before.
    pub fn finish(&mut self) -> Result<(), TransportError> {
        self.stream
            .finish()
            .map_err(|_| TransportError::StreamEnded)
    }
}

impl RequestReceiver {
    pub(super) fn new(stream: RecvStream, connection: Connection) -> RequestReceiver {
        RequestReceiver {
            stream,
            partial: BytesMut::new(),
            _connection: connection,
        }
    }

    /// The next request, or `None` when the peer said that no more follow.
    ///
    /// Safe to cancel: what came of a request is kept for the next call.
    pub async fn receive(&mut self) -> Result<Option<PageRequest>, TransportError> {
        loop {
            if let Some(record) = self.partial.first_chunk::<RECORD_LEN>() {
                let request = PageRequest::decode(record)?;
                self.partial.advance(RECORD_LEN);
                return Ok(Some(request));
            }
            match self.stream.read_chunk(READ, true).await? {
                Some(chunk) => self.partial.extend_from_slice(&chunk.bytes),
                None if self.partial.is_empty() => return Ok(None),
                None => return Err(TransportError::Truncated("a page request")),
            }
        }
    }
}
