//! Whether somebody listens on a port, asked of the kernel and not of the program: how that words its log is its own affair.

use std::net::SocketAddrV4;
use std::path::Path;

use anyhow::{Context, Result};

/// Whose ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// A bound socket listens.
    Udp,
    /// A socket listens when it is in the state of that name.
    Tcp,
}

/// `TCP_LISTEN` in /proc/net/tcp (include/net/tcp_states.h).
const LISTEN: &str = "0A";

/// Whether a socket listens on the address in the network of the process `pid`.
pub(crate) fn listens(pid: i32, protocol: Protocol, address: SocketAddrV4) -> Result<bool> {
    let name = match protocol {
        Protocol::Udp => "udp",
        Protocol::Tcp => "tcp",
    };
    let table = Path::new("/proc")
        .join(pid.to_string())
        .join("net")
        .join(name);
    let sockets =
        std::fs::read_to_string(&table).with_context(|| format!("reading {}", table.display()))?;
    // The kernel prints the address as one hexadecimal number in the machine's own byte order.
    let [local, any] = [address.ip().octets(), [0; 4]]
        .map(|octets| format!("{:08X}:{:04X}", u32::from_ne_bytes(octets), address.port()));
    Ok(sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let bound = fields.next().unwrap_or_default();
        let state = fields.nth(1).unwrap_or_default();
        (bound == local || bound == any) && (protocol == Protocol::Udp || state == LISTEN)
    }))
}
