//! The socket on which CRIU hands over the userfaultfds of a lazy restore.
//!
//! Enters: a listening unix stream socket named `lazy-pages.socket` in CRIU's work directory. Leaves: for each task a
//! userfaultfd, and the word that every mapping is restored.
//!
//! ```text
//!  CRIU connects before it forks the root task, and keeps the connection until its end
//!   task:    i32 vpid          then one byte carrying the userfaultfd by SCM_RIGHTS   (criu/uffd.c send_uffd)
//!   zombie:  i32 -vpid         nothing follows
//!   end:     u32 0x52535446    after every task is restored and caught, before any runs (lazy_pages_finish_restore)
//! ```
//!
//! The daemon says nothing back. All tasks share the one connection and take turns under a lock, so a task's two
//! parts are never mixed with another's; tasks come in any order. The descriptor arrives with its `UFFDIO_API` handshake done
//! (FORK, REMAP, UNMAP, REMOVE events) and **nothing registered yet**: the restorer registers each mapping later.
//! The end marker comes after the post-restore hook; if it cannot be sent CRIU kills the container, so the
//! daemon must not close the connection before it has read the marker. If the daemon closes earlier, sending a task's
//! descriptor fails and so does the restore. Numbers are in host byte order.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg, sockopt,
};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// The name CRIU connects to, relative to its work directory.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// `LAZY_PAGES_RESTORE_FINISHED` of criu/uffd.c: "RSTF". Larger than any pid, so it cannot be taken for one.
const RESTORE_FINISHED: i32 = 0x5253_5446;

/// The kernel's upper bound for a pid (`PID_MAX_LIMIT` on 64 bits).
const PID_LIMIT: i32 = 4 * 1024 * 1024;

/// What CRIU's side of the connection did wrong.
#[derive(Debug, thiserror::Error)]
pub enum LazyPagesError {
    /// Accepting CRIU's connection failed.
    #[error("accepting CRIU's lazy-pages connection: {0}")]
    Accept(#[source] io::Error),
    /// The peer of the socket is not root: it is not CRIU.
    #[error("a process of user {uid} connected to the lazy-pages socket")]
    Stranger {
        /// Its user id.
        uid: u32,
    },
    /// Receiving failed.
    #[error("receiving from CRIU on the lazy-pages socket: {0}")]
    Receive(#[source] io::Error),
    /// The number is neither a pid, a negated pid nor the end marker.
    #[error("CRIU sent {0:#x} where a pid or the end marker belongs")]
    NotAPid(i32),
    /// The connection ended inside a message.
    #[error("CRIU closed the lazy-pages socket in the middle of a message")]
    Cut,
    /// The byte that should carry a userfaultfd carried none, or several.
    #[error("CRIU sent {count} descriptors for task {vpid}, not one")]
    WrongDescriptors {
        /// The task.
        vpid: i32,
        /// How many came.
        count: usize,
    },
    /// A descriptor came with a pid, where none belongs.
    #[error("CRIU sent a descriptor together with a pid")]
    UnexpectedDescriptor,
}

/// One message of CRIU.
#[derive(Debug)]
pub enum LazyPagesMessage {
    /// The userfaultfd of a task.
    Task {
        /// Its pid inside the container; positive.
        vpid: i32,
        /// Its userfaultfd, nothing registered yet.
        uffd: OwnedFd,
    },
    /// A task that is only a zombie and has no memory.
    Zombie {
        /// Its pid inside the container; positive.
        vpid: i32,
    },
    /// Every mapping of every task is restored and registered; no task runs yet.
    RestoreFinished,
    /// CRIU closed the connection.
    Closed,
}

/// CRIU's connection, read without blocking.
#[derive(Debug)]
pub struct LazyPagesConnection {
    stream: UnixStream,
    /// Bytes of a pid that came so far.
    pid: Vec<u8>,
    /// A pid whose descriptor has not come yet.
    awaiting: Option<i32>,
}

impl LazyPagesConnection {
    /// Accepts one connection. Only root may be at the other end.
    pub fn accept(listener: &UnixListener) -> Result<Self, LazyPagesError> {
        let (stream, _) = listener.accept().map_err(LazyPagesError::Accept)?;
        let peer = sockopt::socket_peercred(&stream)
            .map_err(|errno| LazyPagesError::Accept(errno.into()))?;
        if !peer.uid.is_root() {
            return Err(LazyPagesError::Stranger {
                uid: peer.uid.as_raw(),
            });
        }
        Self::from_stream(stream)
    }

    /// Goes on with a connection on which every message so far was complete.
    pub fn from_stream(stream: UnixStream) -> Result<Self, LazyPagesError> {
        stream
            .set_nonblocking(true)
            .map_err(LazyPagesError::Accept)?;
        Ok(LazyPagesConnection {
            stream,
            pid: Vec::with_capacity(4),
            awaiting: None,
        })
    }

    /// The next whole message, or `None` if it has not all come yet (wait until the socket is readable).
    ///
    /// After [`LazyPagesMessage::Closed`] and after any error the connection is of no more use.
    pub fn receive(&mut self) -> Result<Option<LazyPagesMessage>, LazyPagesError> {
        if let Some(vpid) = self.awaiting {
            return self.receive_uffd(vpid);
        }
        // Never ask for more than the pid: a longer read may swallow the next byte together with its descriptor.
        while self.pid.len() < 4 {
            let mut bytes = [0u8; 4];
            let missing = 4 - self.pid.len();
            let Some((count, fds)) = self.receive_bytes(&mut bytes[..missing])? else {
                return Ok(None);
            };
            if !fds.is_empty() {
                return Err(LazyPagesError::UnexpectedDescriptor);
            }
            if count == 0 {
                return if self.pid.is_empty() {
                    Ok(Some(LazyPagesMessage::Closed))
                } else {
                    Err(LazyPagesError::Cut)
                };
            }
            self.pid.extend_from_slice(&bytes[..count]);
        }
        let number = i32::from_ne_bytes([self.pid[0], self.pid[1], self.pid[2], self.pid[3]]);
        self.pid.clear();
        match number {
            RESTORE_FINISHED => Ok(Some(LazyPagesMessage::RestoreFinished)),
            vpid if (1..=PID_LIMIT).contains(&vpid) => {
                self.awaiting = Some(vpid);
                self.receive_uffd(vpid)
            }
            negated if (-PID_LIMIT..=-1).contains(&negated) => {
                Ok(Some(LazyPagesMessage::Zombie { vpid: -negated }))
            }
            other => Err(LazyPagesError::NotAPid(other)),
        }
    }

    fn receive_uffd(&mut self, vpid: i32) -> Result<Option<LazyPagesMessage>, LazyPagesError> {
        let Some((count, mut fds)) = self.receive_bytes(&mut [0u8; 1])? else {
            return Ok(None);
        };
        if count == 0 {
            return Err(LazyPagesError::Cut);
        }
        self.awaiting = None;
        match (fds.pop(), fds.len()) {
            (Some(uffd), 0) => Ok(Some(LazyPagesMessage::Task { vpid, uffd })),
            (None, _) => Err(LazyPagesError::WrongDescriptors { vpid, count: 0 }),
            (Some(_), more) => Err(LazyPagesError::WrongDescriptors {
                vpid,
                count: more + 1,
            }),
        }
    }

    /// Bytes and descriptors that wait, `None` if nothing does.
    fn receive_bytes(
        &self,
        into: &mut [u8],
    ) -> Result<Option<(usize, Vec<OwnedFd>)>, LazyPagesError> {
        // Room for more than the one that belongs here, so that a wrong peer is noticed and its extras are closed.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(into)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(LazyPagesError::Receive(errno.into())),
                Ok(received) => break received,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(LazyPagesError::Receive(io::Error::from_raw_os_error(
                libc::EMFILE,
            )));
        }
        Ok(Some((received.bytes, fds)))
    }
}

impl AsFd for LazyPagesConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::{IoSlice, Write};

    fn pair() -> (UnixStream, LazyPagesConnection) {
        let (criu, daemon) = UnixStream::pair().expect("a socket pair");
        (
            criu,
            LazyPagesConnection::from_stream(daemon).expect("a connection"),
        )
    }

    fn send_fds(criu: &UnixStream, fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        sendmsg(
            criu,
            &[IoSlice::new(&[0])],
            &mut control,
            SendFlags::empty(),
        )
        .expect("descriptors are sent");
    }

    #[test]
    fn tasks_zombies_and_the_end_are_told_apart() {
        let (mut criu, mut daemon) = pair();
        let file = tempfile::tempfile().expect("a file");
        assert!(daemon.receive().expect("nothing yet").is_none());
        for vpid in [1i32, 4_194_304] {
            criu.write_all(&vpid.to_ne_bytes()).expect("pid");
            send_fds(&criu, &[file.as_fd()]);
        }
        criu.write_all(&(-7i32).to_ne_bytes()).expect("zombie");
        criu.write_all(&0x5253_5446u32.to_ne_bytes())
            .expect("marker");
        drop(criu);
        let mut seen = Vec::new();
        while let Some(message) = daemon.receive().expect("well-formed") {
            seen.push(match &message {
                LazyPagesMessage::Task { vpid, .. } => format!("task {vpid}"),
                LazyPagesMessage::Zombie { vpid } => format!("zombie {vpid}"),
                LazyPagesMessage::RestoreFinished => "end".to_owned(),
                LazyPagesMessage::Closed => "closed".to_owned(),
            });
            if matches!(message, LazyPagesMessage::Closed) {
                break;
            }
        }
        assert_eq!(
            seen,
            ["task 1", "task 4194304", "zombie 7", "end", "closed"]
        );
    }

    #[test]
    fn a_message_may_come_in_pieces() {
        let (mut criu, mut daemon) = pair();
        let file = tempfile::tempfile().expect("a file");
        let pid = 300i32.to_ne_bytes();
        criu.write_all(&pid[..1]).expect("first byte");
        assert!(daemon.receive().expect("waits for the rest").is_none());
        criu.write_all(&pid[1..]).expect("rest");
        assert!(
            daemon
                .receive()
                .expect("waits for the descriptor")
                .is_none()
        );
        send_fds(&criu, &[file.as_fd()]);
        assert!(matches!(
            daemon.receive().expect("whole"),
            Some(LazyPagesMessage::Task { vpid: 300, .. })
        ));
    }

    #[test]
    fn numbers_that_are_no_pids_are_refused() {
        for number in [0i32, i32::MIN, i32::MAX, 4_194_305, -4_194_305] {
            let (mut criu, mut daemon) = pair();
            criu.write_all(&number.to_ne_bytes()).expect("number");
            assert!(
                matches!(daemon.receive(), Err(LazyPagesError::NotAPid(n)) if n == number),
                "{number}"
            );
        }
    }

    #[test]
    fn a_task_without_exactly_one_descriptor_is_refused() {
        let file = tempfile::tempfile().expect("a file");
        let (mut criu, mut daemon) = pair();
        criu.write_all(&9i32.to_ne_bytes()).expect("pid");
        criu.write_all(&[0]).expect("a byte alone");
        assert!(matches!(
            daemon.receive(),
            Err(LazyPagesError::WrongDescriptors { vpid: 9, count: 0 })
        ));
        let (mut criu, mut daemon) = pair();
        criu.write_all(&9i32.to_ne_bytes()).expect("pid");
        send_fds(&criu, &[file.as_fd(), file.as_fd()]);
        assert!(matches!(
            daemon.receive(),
            Err(LazyPagesError::WrongDescriptors { vpid: 9, count: 2 })
        ));
    }

    #[test]
    fn a_connection_that_ends_inside_a_message_is_cut() {
        let (mut criu, mut daemon) = pair();
        criu.write_all(&[1, 0]).expect("half a pid");
        drop(criu);
        assert!(matches!(daemon.receive(), Err(LazyPagesError::Cut)));
        let (mut criu, mut daemon) = pair();
        criu.write_all(&5i32.to_ne_bytes()).expect("pid");
        drop(criu);
        assert!(matches!(daemon.receive(), Err(LazyPagesError::Cut)));
    }
}
