//! The control stream: messages in both directions, whole or not at all.

use super::connection::Connection;
use super::error::TransportError;
use crate::wire::message::{HEADER_LEN, Header, Message};
use bytes::{Buf, BytesMut};
use quinn::{RecvStream, SendStream};

/// Both directions of the control stream.
pub struct Control {
    /// What this side says.
    pub sender: ControlSender,
    /// What the peer says.
    pub receiver: ControlReceiver,
}

/// Sends control messages.
pub struct ControlSender {
    stream: SendStream,
    /// Keeps the connection open as long as the control stream is in use.
    _connection: Connection,
}

/// Receives control messages.
pub struct ControlReceiver {
    stream: RecvStream,
    /// What came of a message that is not yet complete.
    partial: BytesMut,
    /// How many messages came so far, and how many bytes of them.
    heard: (u64, u64),
    _connection: Connection,
}

/// The most messages, and bytes of them, that a peer may say on one connection. A conversation is a few messages a round; they may
/// wait unread while whoever reads them is busy, so that without an end a peer could fill the memory with them.
const MAX_MESSAGES: u64 = 1 << 17;
const MAX_BYTES: u64 = 64 << 20;

/// As much as is taken from the stream at once; a message larger than this comes in several pieces.
const READ: usize = 64 << 10;

impl Control {
    pub(super) fn new(send: SendStream, receive: RecvStream, connection: &Connection) -> Control {
        Control {
            sender: ControlSender {
                stream: send,
                _connection: connection.clone(),
            },
            receiver: ControlReceiver {
                stream: receive,
                partial: BytesMut::new(),
                heard: (0, 0),
                _connection: connection.clone(),
            },
        }
    }

    /// Sends a message; see [`ControlSender::send`].
    pub async fn send(&mut self, message: impl Into<Message>) -> Result<(), TransportError> {
        self.sender.send(message).await
    }

    /// The peer's next message; see [`ControlReceiver::receive`].
    pub async fn receive(&mut self) -> Result<Option<Message>, TransportError> {
        self.receiver.receive().await
    }
}

impl ControlSender {
    /// Sends a message. Cancelling the future may leave half of it on the stream: then nothing more can be sent.
    pub async fn send(&mut self, message: impl Into<Message>) -> Result<(), TransportError> {
        let message = message.into();
        tracing::debug!(message = message.name(), "control message sent");
        self.stream.write_chunk(message.encode()?).await?;
        Ok(())
    }

    /// Says that no message follows. Fails if it was said before.
    pub fn finish(&mut self) -> Result<(), TransportError> {
        self.stream
            .finish()
            .map_err(|_| TransportError::StreamEnded)
    }
}

impl ControlReceiver {
    /// The next message, or `None` when the peer said that no more follow.
    ///
    /// Safe to cancel: what came of a message is kept for the next call.
    pub async fn receive(&mut self) -> Result<Option<Message>, TransportError> {
        loop {
            if let Some(message) = self.take_message()? {
                tracing::debug!(message = message.name(), "control message received");
                return Ok(Some(message));
            }
            match self.stream.read_chunk(READ, true).await? {
                Some(chunk) => self.partial.extend_from_slice(&chunk.bytes),
                None if self.partial.is_empty() => return Ok(None),
                None => return Err(TransportError::Truncated("a control message")),
            }
        }
    }

    fn take_message(&mut self) -> Result<Option<Message>, TransportError> {
        let Some(header) = self.partial.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let header = Header::decode(header)?;
        if self.partial.len() < HEADER_LEN + header.body_len {
            return Ok(None);
        }
        self.heard.0 += 1;
        self.heard.1 += (HEADER_LEN + header.body_len) as u64;
        if self.heard.0 > MAX_MESSAGES || self.heard.1 > MAX_BYTES {
            return Err(TransportError::Endless);
        }
        self.partial.advance(HEADER_LEN);
        let body = self.partial.split_to(header.body_len);
        Ok(Some(Message::decode(header, &body)?))
    }
}

#[cfg(test)]
impl ControlSender {
    /// Writes bytes as a hostile peer would.
    pub(super) async fn write_raw(&mut self, bytes: &[u8]) {
        assert!(self.try_write_raw(bytes).await);
    }

    /// Writes bytes as long as the peer takes them.
    pub(super) async fn try_write_raw(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).await.is_ok()
    }
}
