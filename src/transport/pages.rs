//! Page streams: frames in order, one direction, for tasks and for threads.
//!
//! ```text
//!  encoding thread ─▶ PageQueue ─▶ PageSender ═══ QUIC ═══▶ PageReceiver ─▶ PageInbox ─▶ placing thread
//!                     blocks when full                      stops reading when full
//! ```
//!
//! When placing is slow the inbox fills, QUIC's windows close, the sender waits, the queue fills and encoding blocks:
//! the whole way holds a bounded number of frames of at most about 1 MiB each.

use super::connection::Connection;
use super::error::{TransportError, code, in_part};
use crate::wire::page_frame::{EncodedFrame, Frame, HEADER_LEN, Header};
use crate::wire::peer_error::PeerError;
use bytes::{BufMut, BytesMut};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream};
use std::io;
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot};

/// Sends page frames on one stream.
pub struct PageSender {
    stream: SendStream,
    index: u16,
    frames: u64,
    /// Somebody stands still until it arrives: no limit holds it up, and it says nothing about the link's speed.
    urgent: bool,
    connection: Connection,
}

impl PageSender {
    pub(super) fn new(stream: SendStream, index: u16, connection: Connection) -> PageSender {
        PageSender {
            stream,
            index,
            frames: 0,
            urgent: false,
            connection,
        }
    }

    /// A sender whose frames go before all others and outside the bandwidth limit.
    pub(super) fn urgent(stream: SendStream, index: u16, connection: Connection) -> PageSender {
        // Fails on a stream that is closed already, and then so will every frame.
        let _ = stream.set_priority(1);
        PageSender {
            urgent: true,
            ..PageSender::new(stream, index, connection)
        }
    }

    /// The stream's index.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Frames sent so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Sends a frame, waiting for the bandwidth limit and for QUIC to take it. The payload is not copied.
    ///
    /// Cancelling the future may leave half a frame on the stream: then nothing more can be sent.
    pub async fn send(&mut self, frame: EncodedFrame) -> Result<(), TransportError> {
        if self.urgent {
            self.write(frame).await?;
        } else {
            let bytes = frame.wire_len();
            let waiting = self.connection.link().wait();
            self.connection.acquire(bytes).await;
            self.write(frame).await?;
            drop(waiting);
            self.connection.link().wrote(bytes);
        }
        self.frames += 1;
        Ok(())
    }

    async fn write(&mut self, frame: EncodedFrame) -> Result<(), TransportError> {
        if frame.payload.is_empty() {
            self.stream.write_chunk(frame.head).await?;
        } else {
            let mut chunks = [frame.head, frame.payload];
            self.stream.write_all_chunks(&mut chunks).await?;
        }
        Ok(())
    }

    /// Says that no frame follows. Fails if it was said before.
    pub fn finish(&mut self) -> Result<(), TransportError> {
        self.stream
            .finish()
            .map_err(|_| TransportError::StreamEnded)
    }

    /// Moves the sender onto the connection's runtime and gives threads a queue of `depth` frames to it.
    pub fn into_queue(mut self, depth: usize) -> PageQueue {
        let (frames, mut queued) = mpsc::channel::<EncodedFrame>(depth.max(1));
        let (ended, end) = oneshot::channel();
        let index = self.index;
        let runtime = self.connection.runtime().clone();
        runtime.spawn(async move {
            let sent = loop {
                match queued.recv().await {
                    Some(frame) => {
                        if let Err(error) = self.send(frame).await {
                            break Err(error);
                        }
                    }
                    None => break self.finish().map(|()| self.frames),
                }
            };
            // Nobody listens any more when the queue was dropped without finish(); the peer then sees the stream end
            // without the RoundEnd that would count these frames.
            let _ = ended.send(sent);
        });
        PageQueue {
            frames,
            end: Some(end),
            index,
            queued: 0,
        }
    }
}

/// A page stream for a thread that encodes: hands frames over and blocks when too many wait.
///
/// Its methods must not be called from async tasks.
pub struct PageQueue {
    frames: mpsc::Sender<EncodedFrame>,
    end: Option<oneshot::Receiver<Result<u64, TransportError>>>,
    index: u16,
    queued: u64,
}

impl PageQueue {
    /// The stream's index.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Frames handed over so far: all of them will be sent, in order, unless the stream fails.
    pub fn frames(&self) -> u64 {
        self.queued
    }

    /// Hands a frame over. An error may concern an earlier frame.
    pub fn send(&mut self, frame: EncodedFrame) -> Result<(), TransportError> {
        match self.frames.blocking_send(frame) {
            Ok(()) => {
                self.queued += 1;
                Ok(())
            }
            Err(_) => Err(self.failure()),
        }
    }

    /// Ends the stream after the frames handed over; gives their number when QUIC has taken all of them.
    pub fn finish(self) -> Result<u64, TransportError> {
        let PageQueue { frames, end, .. } = self;
        drop(frames);
        match end.map(oneshot::Receiver::blocking_recv) {
            Some(Ok(sent)) => sent,
            Some(Err(_)) | None => Err(TransportError::StreamEnded),
        }
    }

    /// Why the sending task ended: it only does so before us with an error.
    fn failure(&mut self) -> TransportError {
        match self.end.take().map(oneshot::Receiver::blocking_recv) {
            Some(Ok(Err(error))) => error,
            // The runtime is gone, or the error was given before.
            _ => TransportError::StreamEnded,
        }
    }
}

/// Receives page frames on one stream.
pub struct PageReceiver {
    stream: RecvStream,
    index: u16,
    frames: u64,
    connection: Connection,
}

impl PageReceiver {
    pub(super) fn new(stream: RecvStream, index: u16, connection: Connection) -> PageReceiver {
        PageReceiver {
            stream,
            index,
            frames: 0,
            connection,
        }
    }

    /// The index the peer gave the stream; not checked against any number of streams.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Frames received so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// The next frame, or `None` when the peer said that no more follow. Its content is not verified yet: that is
    /// work for the thread that places it, by `Frame::raw`.
    pub async fn receive(&mut self) -> Result<Option<Frame>, TransportError> {
        let mut header = [0; HEADER_LEN];
        match self.stream.read_exact(&mut header).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(error) => return Err(in_part("a page frame")(error)),
        }
        let header = Header::decode(&header)?;
        let mut rest = BytesMut::with_capacity(header.rest_len());
        while rest.len() < header.rest_len() {
            let missing = header.rest_len() - rest.len();
            let read = self.stream.read_buf(&mut (&mut rest).limit(missing)).await;
            let read = read.map_err(read_error)?;
            if read == 0 {
                return Err(TransportError::Truncated("a page frame"));
            }
            self.connection.took(read);
        }
        let frame = Frame::decode(header, rest.freeze())?;
        self.frames += 1;
        Ok(Some(frame))
    }

    /// Moves the receiver onto the connection's runtime and gives a thread an inbox of at most `depth` frames.
    pub fn into_inbox(mut self, depth: usize) -> PageInbox {
        let (to_inbox, frames) = mpsc::channel(depth.max(1));
        let index = self.index;
        let runtime = self.connection.runtime().clone();
        runtime.spawn(async move {
            loop {
                let received = tokio::select! {
                    received = self.receive() => received.transpose(),
                    () = to_inbox.closed() => break,
                };
                let Some(received) = received else { return };
                let failed = received.is_err();
                if to_inbox.send(received).await.is_err() || failed {
                    break;
                }
            }
            // Without a number of ours quinn would stop the stream as if all were done. No effect on a dead stream.
            let _ = self.stream.stop(code(PeerError::Cancelled));
        });
        PageInbox {
            frames,
            index,
            received: 0,
        }
    }
}

/// A page stream for a thread that places pages. Its methods must not be called from async tasks.
///
/// Dropping it stops the stream: the sender gets [`PeerError::Cancelled`], also one that waits for room.
pub struct PageInbox {
    frames: mpsc::Receiver<Result<Frame, TransportError>>,
    index: u16,
    received: u64,
}

impl PageInbox {
    /// The index the peer gave the stream.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Frames given out so far.
    pub fn frames(&self) -> u64 {
        self.received
    }

    /// Blocks for the next frame; `None` when the peer said that no more follow, and after an error.
    pub fn receive(&mut self) -> Result<Option<Frame>, TransportError> {
        match self.frames.blocking_recv().transpose()? {
            Some(frame) => {
                self.received += 1;
                Ok(Some(frame))
            }
            None => Ok(None),
        }
    }
}

/// quinn's error inside the one that `AsyncRead` gives.
fn read_error(error: io::Error) -> TransportError {
    match error.get_ref().and_then(|e| e.downcast_ref::<ReadError>()) {
        Some(read) => read.clone().into(),
        None => TransportError::StreamEnded,
    }
}
