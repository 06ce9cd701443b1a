//! Framed messages with at most one descriptor each, over a unix stream socket between two processes of ours.
//!
//! ```text
//!  u32 length of the JSON │ u32 number of page runs │ JSON │ per run: u64 first page, u64 pages      (host byte order)
//!  the descriptor, if any, rides on the first byte
//! ```
//!
//! Runs travel as numbers, because a fragmented address space has hundreds of thousands and they are sent while the
//! container stands still. Both ends are this program, but lengths are checked all the same.

use crate::memory::{PageNumber, PageRange};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const MAX_JSON: usize = 1 << 20;
const MAX_RUNS: usize = 1 << 24;

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Writing failed; the other end may be gone.
    #[error("sending on a pager channel: {0}")]
    Send(#[source] io::Error),
    /// Reading failed, or the other end left in the middle of a message.
    #[error("receiving on a pager channel: {0}")]
    Receive(#[source] io::Error),
    /// A message announces more than any of ours has.
    #[error("a pager message announces {json} bytes of JSON and {runs} runs")]
    TooLong {
        /// Bytes of JSON.
        json: usize,
        /// Page runs.
        runs: usize,
    },
    /// The JSON is not the message expected here.
    #[error("a pager message does not parse: {0}")]
    Json(#[from] serde_json::Error),
    /// A page run is empty or beyond any address.
    #[error("a pager message names {pages} pages from page {start:#x}")]
    Run {
        /// First page.
        start: u64,
        /// How many.
        pages: u64,
    },
}

/// One message as it arrived.
#[derive(Debug)]
pub(super) struct Received<M> {
    pub message: M,
    pub runs: Vec<PageRange>,
    pub fd: Option<OwnedFd>,
}

/// One end of a channel. Sending and receiving block.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
}

impl Channel {
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Channel { stream })
    }

    /// Sending fails instead of waiting longer than this for the other end to read.
    pub fn set_send_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.stream.set_write_timeout(Some(timeout))
    }

    pub fn send<M: Serialize>(&self, message: &M) -> Result<(), ChannelError> {
        self.send_with(message, &[], None)
    }

    pub fn send_fd<M: Serialize>(
        &self,
        message: &M,
        fd: BorrowedFd<'_>,
    ) -> Result<(), ChannelError> {
        self.send_with(message, &[], Some(fd))
    }

    pub fn send_with<M: Serialize>(
        &self,
        message: &M,
        runs: &[PageRange],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ChannelError> {
        let json = serde_json::to_vec(message)?;
        if json.len() > MAX_JSON || runs.len() > MAX_RUNS {
            return Err(ChannelError::TooLong {
                json: json.len(),
                runs: runs.len(),
            });
        }
        let mut frame = Vec::with_capacity(8 + json.len() + runs.len() * 16);
        frame.extend_from_slice(&(json.len() as u32).to_ne_bytes());
        frame.extend_from_slice(&(runs.len() as u32).to_ne_bytes());
        frame.extend_from_slice(&json);
        for run in runs {
            frame.extend_from_slice(&run.start().0.to_ne_bytes());
            frame.extend_from_slice(&run.pages().to_ne_bytes());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        if !fds.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(&fds));
            debug_assert!(fits, "the space was made for one descriptor");
        }
        let sent = loop {
            // A dead peer is an error to handle, not a signal to die from.
            match sendmsg(
                &self.stream,
                &[IoSlice::new(&frame)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(ChannelError::Send(errno.into())),
                Ok(sent) => break sent,
            }
        };
        (&self.stream)
            .write_all(&frame[sent..])
            .map_err(ChannelError::Send)
    }

    /// The next message; `None` when the other end has closed.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<Option<Received<M>>, ChannelError> {
        let mut header = [0u8; 8];
        let mut have = 0;
        let mut fd = None;
        while have < header.len() {
            let (count, fds) = self.receive_bytes(&mut header[have..])?;
            if count == 0 {
                return if have == 0 {
                    Ok(None)
                } else {
                    Err(ChannelError::Receive(io::ErrorKind::UnexpectedEof.into()))
                };
            }
            have += count;
            fd = fd.or(fds);
        }
        let [j0, j1, j2, j3, r0, r1, r2, r3] = header;
        let json = u32::from_ne_bytes([j0, j1, j2, j3]) as usize;
        let runs = u32::from_ne_bytes([r0, r1, r2, r3]) as usize;
        if json > MAX_JSON || runs > MAX_RUNS {
            return Err(ChannelError::TooLong { json, runs });
        }
        let mut body = vec![0u8; json + runs * 16];
        (&self.stream)
            .read_exact(&mut body)
            .map_err(ChannelError::Receive)?;
        let (json, runs) = body.split_at(json);
        Ok(Some(Received {
            message: serde_json::from_slice(json)?,
            runs: runs.chunks_exact(16).map(run).collect::<Result<_, _>>()?,
            fd,
        }))
    }

    fn receive_bytes(&self, into: &mut [u8]) -> Result<(usize, Option<OwnedFd>), ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(into)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                // A peer that died with unread messages in its queue resets the connection: to us that is its end.
                Err(rustix::io::Errno::CONNRESET) => return Ok((0, None)),
                Err(errno) => return Err(ChannelError::Receive(errno.into())),
                Ok(received) => break received,
            }
        };
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        Ok((received.bytes, fd))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn run(bytes: &[u8]) -> Result<PageRange, ChannelError> {
    let (start, pages) = bytes.split_at(8);
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("half of sixteen bytes"));
    let (start, pages) = (word(start), word(pages));
    PageRange::from_start_len(PageNumber(start), pages).ok_or(ChannelError::Run { start, pages })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Channel, Channel) {
        let (one, other) = UnixStream::pair().expect("a socket pair");
        (
            Channel::new(one).expect("a channel"),
            Channel::new(other).expect("a channel"),
        )
    }

    #[test]
    fn messages_runs_and_descriptors_arrive_together_and_in_order() {
        let (one, other) = pair();
        let runs: Vec<PageRange> = (0..50_000)
            .map(|i| PageRange::from_start_len(PageNumber(i * 3), 2).expect("valid"))
            .collect();
        let file = tempfile::tempfile().expect("a file");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                one.send(&"first").expect("sent");
                one.send_with(&"second", &runs, Some(file.as_fd()))
                    .expect("sent");
                one.send(&"third").expect("sent");
            });
            let next = || {
                other
                    .receive::<String>()
                    .expect("well-formed")
                    .expect("open")
            };
            let first = next();
            assert_eq!(
                (first.message.as_str(), first.fd.is_some()),
                ("first", false)
            );
            let second = next();
            assert_eq!(
                (second.message.as_str(), second.fd.is_some()),
                ("second", true)
            );
            assert_eq!(second.runs, runs);
            assert_eq!(next().message, "third");
        });
        drop(one);
        assert!(other.receive::<String>().expect("a clean end").is_none());
    }

    #[test]
    fn lengths_and_runs_out_of_range_are_refused() {
        let (one, other) = UnixStream::pair().expect("a socket pair");
        let other = Channel::new(other).expect("a channel");
        (&one)
            .write_all(&[0xff; 8])
            .expect("a header that announces too much");
        assert!(matches!(
            other.receive::<String>(),
            Err(ChannelError::TooLong { .. })
        ));
        let (one, other) = UnixStream::pair().expect("a socket pair");
        let other = Channel::new(other).expect("a channel");
        let mut frame = Vec::new();
        frame.extend_from_slice(&2u32.to_ne_bytes());
        frame.extend_from_slice(&1u32.to_ne_bytes());
        frame.extend_from_slice(b"\"\"");
        frame.extend_from_slice(&u64::MAX.to_ne_bytes());
        frame.extend_from_slice(&2u64.to_ne_bytes());
        (&one).write_all(&frame).expect("an impossible run");
        assert!(matches!(
            other.receive::<String>(),
            Err(ChannelError::Run { .. })
        ));
    }
}
