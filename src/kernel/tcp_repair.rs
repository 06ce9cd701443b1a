//! TCP sockets that a CRIU which died left in repair mode.
//!
//! CRIU puts every established connection into repair mode before it reads it, and takes it out when it lets go of the tasks.
//! Killed in between it leaves it there, and the process that goes on can neither read nor write: EPERM.

use super::pidfd::{Pidfd, PidfdError};
use nix::sys::socket::{getsockopt, setsockopt, sockopt::TcpRepair};
use std::fs;
use std::io;
use std::os::fd::RawFd;

/// Takes every TCP socket of the process `pid` out of repair mode. One that is not in it is left alone, and a process that is gone
/// has none.
pub fn end(pid: i32) -> io::Result<()> {
    let process = match Pidfd::open(pid) {
        Ok(process) => process,
        Err(PidfdError::Exited { .. }) => return Ok(()),
        Err(error) => return Err(io::Error::other(error)),
    };
    for number in sockets(pid)? {
        // Closed in between by another process of the same table.
        let Ok(socket) = process.getfd(number) else {
            continue;
        };
        // No TCP socket has no such option.
        if getsockopt(&socket, TcpRepair).is_ok_and(|repair| repair != 0) {
            setsockopt(&socket, TcpRepair, &0)?;
        }
    }
    Ok(())
}

fn sockets(pid: i32) -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
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
        let mut said = [0; 6];
        there.read_exact(&mut said).expect("nothing is lost");
        assert_eq!(&said, b"before");
        there.write_all(b"after").expect("sent");
        here.read_exact(&mut said[..5]).expect("received");
        assert_eq!(&said[..5], b"after");
    }
}
