//! A process held by file descriptor, so that a reused pid is never mistaken for it.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Kernel ≥ 6.9: the descriptor names one thread, not its process.
const PIDFD_THREAD: libc::c_uint = libc::O_EXCL as libc::c_uint;

/// A descriptor of one process; it never names another, whatever becomes of the pid.
#[derive(Debug)]
pub struct Pidfd {
    fd: OwnedFd,
    pid: i32,
}

/// Why a process could not be reached through its descriptor.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum PidfdError {
    /// The process has exited.
    #[error("process {pid} has exited")]
    Exited {
        /// Its pid while it lived.
        pid: i32,
    },
    /// The kernel refused.
    #[error("{call} on process {pid}: {errno}")]
    Refused {
        /// The system call that failed.
        call: &'static str,
        /// The process it was about.
        pid: i32,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl Pidfd {
    /// Opens the process that has `pid` now.
    pub fn open(pid: i32) -> Result<Pidfd, PidfdError> {
        Pidfd::open_with(pid, 0)
    }

    /// Opens the single thread `tid`, which need not lead its process. Needs a kernel ≥ 6.9 (else `EINVAL`).
    pub fn open_thread(tid: i32) -> Result<Pidfd, PidfdError> {
        Pidfd::open_with(tid, PIDFD_THREAD)
    }

    fn open_with(pid: i32, flags: libc::c_uint) -> Result<Pidfd, PidfdError> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
        let fd = Errno::result(fd).map_err(|errno| refused("pidfd_open", pid, errno))?;
        // SAFETY: the call returned a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        Ok(Pidfd { fd, pid })
    }

    /// The pid it was opened with.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether the process has exited (it may still be a zombie).
    pub fn exited(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        // A poll that fails says nothing about the process; the next call on it will.
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Sends `signal` to the process.
    pub fn send_signal(&self, signal: Signal) -> Result<(), PidfdError> {
        // SAFETY: a null siginfo is allowed and means "as kill(2) would fill it".
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        Errno::result(sent)
            .map(drop)
            .map_err(|errno| refused("pidfd_send_signal", self.pid, errno))
    }

    /// Duplicates descriptor `target_fd` of the process into this one (close-on-exec). Needs ptrace rights over it.
    pub fn getfd(&self, target_fd: RawFd) -> Result<OwnedFd, PidfdError> {
        // SAFETY: pidfd_getfd takes three integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.fd.as_raw_fd(), target_fd, 0) };
        let fd = Errno::result(fd).map_err(|errno| refused("pidfd_getfd", self.pid, errno))?;
        // SAFETY: the call returned a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn refused(call: &'static str, pid: i32, errno: Errno) -> PidfdError {
    match errno {
        Errno::ESRCH => PidfdError::Exited { pid },
        errno => PidfdError::Refused { call, pid, errno },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn a_killed_process_is_seen_to_have_exited_and_takes_no_more_signals() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = Pidfd::open(child.id() as i32).unwrap();
        assert!(!pidfd.exited());
        pidfd.send_signal(Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        assert!(pidfd.exited());
        assert_eq!(
            pidfd.send_signal(Signal::SIGKILL),
            Err(PidfdError::Exited { pid: pidfd.pid() })
        );
    }

    #[test]
    fn a_descriptor_of_another_process_can_be_taken() {
        let mut child = Command::new("sleep")
            .arg("1000")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pidfd = Pidfd::open(child.id() as i32).unwrap();
        let mut theirs = std::fs::File::from(pidfd.getfd(1).unwrap());
        theirs.write_all(b"through the taken end").unwrap();
        drop(theirs);
        child.kill().unwrap();
        child.wait().unwrap();
        let mut text = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "through the taken end");
        assert!(matches!(
            pidfd.getfd(1),
            Err(PidfdError::Exited { .. } | PidfdError::Refused { .. })
        ));
    }
}
