//! The supply line: how a pager asks for owed pages and hears of their arrival.
//!
//! Two ends of a socket that keeps messages whole (`SOCK_SEQPACKET`), one in the pager, one in the agent, which talks to the
//! source. Contents do not pass here: the agent puts them into the page store's memfd, marks them in the space's
//! [`Arrivals`](crate::target::arrivals::Arrivals), and only then says that they came.
//!
//! ```text
//!  pager ── Want{vpid, pages} ──▶ agent      a task stands still at the first of these pages; the rest are its neighbours
//!  pager ◀── Came{vpid, pages} ── agent      they are in the store, and on record
//!  pager ◀── AskAgain ─────────── agent      what was asked for before may be lost: the source was away
//!
//!  | kind u32 | vpid i32 | first page u64 | pages u64 |        host byte order, pages are those of the store
//! ```
//!
//! Neither end blocks. A message that finds the queue full is kept by its sender and tried again; if a `Came` is lost with
//! an agent that dies, its successor says `AskAgain`. The end of the socket means that nobody brings pages for now.

use crate::memory::{PageNumber, PageRange};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const LENGTH: usize = 24;

/// What is said on a supply line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SupplyMessage {
    /// Pager: these pages of the store are needed, the first one now.
    Want {
        /// The task's pid inside the container.
        vpid: i32,
        /// Pages of its store.
        pages: PageRange,
    },
    /// Agent: these pages are in the store and on record.
    Came {
        /// The task's pid inside the container.
        vpid: i32,
        /// Pages of its store.
        pages: PageRange,
    },
    /// Agent: what was asked for and has not come must be asked for again.
    AskAgain,
}

/// What is to be read on a supply line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A message.
    Message(SupplyMessage),
    /// Nothing for now.
    Nothing,
    /// The other end is closed.
    End,
}

/// One end of a supply line.
#[derive(Debug)]
pub struct SupplyLine {
    socket: OwnedFd,
}

impl SupplyLine {
    /// Both ends of a new line.
    pub fn pair() -> io::Result<(SupplyLine, SupplyLine)> {
        let (one, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok((SupplyLine { socket: one }, SupplyLine { socket: other }))
    }

    /// The end behind a descriptor that another process handed over.
    pub fn from_fd(socket: OwnedFd) -> SupplyLine {
        SupplyLine { socket }
    }

    /// Says something. `false`: the queue is full, try again when the socket can be written to.
    ///
    /// An error means that the other end is gone.
    pub fn send(&self, message: SupplyMessage) -> io::Result<bool> {
        loop {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.socket, &encode(message), flags) {
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Ends the line for the other end too, whoever else holds a copy of this one.
    pub fn hang_up(self) {
        // The only error is that it has ended already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// The next message, without waiting.
    ///
    /// # Errors
    /// If the socket fails or something else than a message comes.
    pub fn receive(&self) -> io::Result<Heard> {
        let mut bytes = [0u8; LENGTH];
        loop {
            match rustix::net::recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Ok(Heard::End),
                Ok((LENGTH, LENGTH)) => return decode(&bytes).map(Heard::Message),
                Ok((length, _)) => return Err(invalid(format!("{length} bytes"))),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(Heard::Nothing),
                // A peer that died with unread messages in its queue resets the connection.
                Err(rustix::io::Errno::CONNRESET) => return Ok(Heard::End),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for SupplyLine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<SupplyLine> for OwnedFd {
    fn from(line: SupplyLine) -> OwnedFd {
        line.socket
    }
}

const WANT: u32 = 1;
const CAME: u32 = 2;
const ASK_AGAIN: u32 = 3;

fn encode(message: SupplyMessage) -> [u8; LENGTH] {
    let (kind, vpid, first, pages) = match message {
        SupplyMessage::Want { vpid, pages } => (WANT, vpid, pages.start().0, pages.pages()),
        SupplyMessage::Came { vpid, pages } => (CAME, vpid, pages.start().0, pages.pages()),
        SupplyMessage::AskAgain => (ASK_AGAIN, 0, 0, 0),
    };
    let mut bytes = [0; LENGTH];
    bytes[..4].copy_from_slice(&kind.to_ne_bytes());
    bytes[4..8].copy_from_slice(&vpid.to_ne_bytes());
    bytes[8..16].copy_from_slice(&first.to_ne_bytes());
    bytes[16..].copy_from_slice(&pages.to_ne_bytes());
    bytes
}

fn decode(bytes: &[u8; LENGTH]) -> io::Result<SupplyMessage> {
    let (kind, rest) = bytes.split_first_chunk::<4>().expect("24 bytes");
    let (vpid, rest) = rest.split_first_chunk::<4>().expect("20 bytes");
    let (first, rest) = rest.split_first_chunk::<8>().expect("16 bytes");
    let (pages, _) = rest.split_first_chunk::<8>().expect("8 bytes");
    let vpid = i32::from_ne_bytes(*vpid);
    let (first, pages) = (u64::from_ne_bytes(*first), u64::from_ne_bytes(*pages));
    let range = || {
        PageRange::from_start_len(PageNumber(first), pages)
            .ok_or_else(|| invalid(format!("{pages} pages from page {first:#x}")))
    };
    match u32::from_ne_bytes(*kind) {
        WANT => Ok(SupplyMessage::Want {
            vpid,
            pages: range()?,
        }),
        CAME => Ok(SupplyMessage::Came {
            vpid,
            pages: range()?,
        }),
        ASK_AGAIN => Ok(SupplyMessage::AskAgain),
        other => Err(invalid(format!("kind {other}"))),
    }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("no message of a supply line: {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_in_order_and_the_end_is_told() {
        let (pager, agent) = SupplyLine::pair().expect("a pair");
        assert_eq!(agent.receive().expect("open"), Heard::Nothing);
        let pages = PageRange::from_start_len(PageNumber(1 << 34), 16).expect("valid");
        let said = [
            SupplyMessage::Want { vpid: 7, pages },
            SupplyMessage::Came { vpid: -1, pages },
            SupplyMessage::AskAgain,
        ];
        for message in said {
            assert!(pager.send(message).expect("open"));
        }
        for message in said {
            assert_eq!(agent.receive().expect("open"), Heard::Message(message));
        }
        drop(pager);
        assert_eq!(agent.receive().expect("a clean end"), Heard::End);
        assert!(agent.send(SupplyMessage::AskAgain).is_err());
    }

    #[test]
    fn to_hang_up_ends_the_line_for_every_copy() {
        let (pager, agent) = SupplyLine::pair().expect("a pair");
        let copy = pager.as_fd().try_clone_to_owned().expect("duplicated");
        let standby = SupplyLine::from_fd(copy);
        assert!(pager.send(SupplyMessage::AskAgain).expect("open"));
        pager.hang_up();
        let said = Heard::Message(SupplyMessage::AskAgain);
        assert_eq!(agent.receive().expect("still there"), said);
        assert_eq!(agent.receive().expect("a clean end"), Heard::End);
        assert_eq!(standby.receive().expect("a clean end"), Heard::End);
    }

    #[test]
    fn a_full_queue_is_told_and_loses_nothing() {
        let (pager, agent) = SupplyLine::pair().expect("a pair");
        let mut sent = 0;
        while pager.send(SupplyMessage::AskAgain).expect("open") {
            sent += 1;
        }
        for _ in 0..sent {
            assert!(matches!(agent.receive(), Ok(Heard::Message(_))));
        }
        assert_eq!(agent.receive().expect("open"), Heard::Nothing);
        assert!(pager.send(SupplyMessage::AskAgain).expect("open"));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (pager, agent) = SupplyLine::pair().expect("a pair");
        let mut empty_run = encode(SupplyMessage::AskAgain);
        empty_run[..4].copy_from_slice(&WANT.to_ne_bytes());
        let mut unknown = encode(SupplyMessage::AskAgain);
        unknown[..4].copy_from_slice(&9u32.to_ne_bytes());
        for bytes in [&empty_run[..], &unknown[..], &[1, 2, 3]] {
            rustix::net::send(&pager.socket, bytes, SendFlags::empty()).expect("sent");
            assert!(agent.receive().is_err());
        }
    }
}
