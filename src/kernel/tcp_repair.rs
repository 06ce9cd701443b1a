//! TCP sockets that a CRIU which died left in repair mode.
//!
//! CRIU puts every established connection into repair mode before it reads it, and takes it out when it lets go of the tasks.
//! Killed in between it leaves it there, and the process that goes on can neither read nor write: EPERM.

use super::pidfd::{Pidfd, PidfdError};
use nix::sys::socket::{
    getsockopt, setsockopt,
    sockopt::{ReuseAddr, TcpRepair},
};
use std::fs;
use std::io;
use std::os::fd::RawFd;

/// Takes every TCP socket of the process `pid` out of repair mode. One that is not in it is left alone, and a process that is gone
/// has none. What fails for one socket is done for the others all the same.
///
/// The kernel takes SO_REUSEADDR away with repair mode, and what it was before nobody knows any more: it is set, as servers have
/// it, or one could not be started again while its connections last.
pub fn end(pid: i32) -> io::Result<()> {
    let process = match Pidfd::open(pid) {
        Ok(process) => process,
        Err(PidfdError::Exited { .. }) => return Ok(()),
        Err(error) => return Err(io::Error::other(error)),
    };
    let mut ended = Ok(());
    for number in sockets(pid)? {
        // Closed in between by another process of the same table.
        let Ok(socket) = process.getfd(number) else {
            continue;
        };
        // No TCP socket has no such option.
        if getsockopt(&socket, TcpRepair).is_ok_and(|repair| repair != 0) {
            let off = setsockopt(&socket, TcpRepair, &0);
            let off = off.and_then(|()| setsockopt(&socket, ReuseAddr, &true));
            ended = ended.and(off.map_err(io::Error::from));
        }
    }
    ended
}

fn sockets(pid: i32) -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(numbers),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(numbers),
        entries => entries?,
    };
    for entry in entries.flatten() {
        let is_socket = fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("socket:["));
        if let Ok(number) = entry.file_name().to_string_lossy().parse()
            && is_socket
        {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};

    /// Needs root.
    #[test]
    fn a_connection_left_in_repair_mode_works_again() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
        let address = listener.local_addr().expect("an address");
        let mut here = TcpStream::connect(address).expect("connects");
        let (mut there, _) = listener.accept().expect("accepts");
        let _other = UdpSocket::bind("127.0.0.1:0").expect("a socket of another kind");
        setsockopt(&there, TcpRepair, &1).expect("root may");
        here.write_all(b"before").expect("sent");
        assert!(
            there.read(&mut [0; 6]).is_err(),
            "it was not in repair mode"
        );

        end(std::process::id().cast_signed()).expect("taken out");
        assert!(getsockopt(&there, ReuseAddr).expect("an option"));
        let mut said = [0; 6];
        there.read_exact(&mut said).expect("nothing is lost");
        assert_eq!(&said, b"before");
        there.write_all(b"after").expect("sent");
        here.read_exact(&mut said[..5]).expect("received");
        assert_eq!(&said[..5], b"after");
    }
}
