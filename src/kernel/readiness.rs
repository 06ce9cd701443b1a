//! Waiting for a descriptor in async tasks.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use tokio::io::unix::AsyncFd;

/// `fd` on the runtime this is called on: tasks can wait until it can be read from or written to.
///
/// # Errors
/// If it is of a kind that cannot be waited for (epoll(7)).
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open until it is dropped, always names the same descriptor, and the AsyncFd owns it.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}
