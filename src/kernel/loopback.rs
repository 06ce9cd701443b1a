//! Bringing up the loopback device of another network namespace.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread;

/// Brings `lo` up in the network namespace of the process `pid`; the kernel gives it its addresses.
pub fn bring_up(pid: i32) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    // A namespace belongs to a thread: a short-lived one enters it, and this one stays where it is.
    let inside = thread::spawn(move || {
        nix::sched::setns(namespace.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)?;
        set_up_flag()
    });
    inside
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}

fn set_up_flag() -> io::Result<()> {
    // SAFETY: socket takes no pointers; a result that is not negative is a descriptor nobody else owns.
    let socket = unsafe {
        match libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) {
            -1 => return Err(io::Error::last_os_error()),
            descriptor => OwnedFd::from_raw_fd(descriptor),
        }
    };
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = byte.cast_signed();
    }
    // SAFETY: the request outlives the calls and names a device; SIOCGIFFLAGS fills the flags that SIOCSIFFLAGS reads.
    unsafe {
        if libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS as _,
            &raw mut request,
        ) == -1
        {
            return Err(io::Error::last_os_error());
        }
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16;
        if libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        ) == -1
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
