//! The UDP socket under QUIC: its buffers, its packet size and one bound that quinn does not keep.

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

/// Bytes of kernel buffer asked for in each direction; below this a burst is lost before the runtime is scheduled.
const SOCKET_BUFFER: usize = 32 << 20;

/// The largest UDP payload: 65535 bytes of IPv4 packet without its header and UDP's.
pub const MAX_PAYLOAD: usize = 65_507;

/// UDP over IPv4 has 28 bytes of headers, over IPv6 48.
const HEADERS_V4: u32 = 28;
const HEADERS_V6: u32 = 48;

/// A bound socket with large buffers, for quinn.
///
/// Buffers above the host's limit need CAP_NET_ADMIN; without it the kernel's limit is what we get.
pub fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    }
    if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        socket.set_send_buffer_size(SOCKET_BUFFER)?;
    }
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// The address from which any address of `peer`'s family can be reached.
pub fn unspecified_for(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// The largest UDP payload that the route to `peer` could carry, as far as this host knows.
///
/// It is the upper bound of path MTU discovery, not a promise: a smaller link further on is found by probing.
pub fn largest_payload(peer: SocketAddr) -> io::Result<u16> {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let probe = UdpSocket::bind(unspecified_for(peer))?;
    // Connecting a UDP socket sends nothing; it makes the kernel look up the route.
    probe.connect(peer)?;
    let (mtu, headers) = match probe.local_addr()?.ip() {
        IpAddr::V4(_) => (
            getsockopt(&probe, sockopt::IpMtu)?.unsigned_abs(),
            HEADERS_V4,
        ),
        IpAddr::V6(local) => (interface_mtu_v6(local)?, HEADERS_V6),
    };
    let payload = mtu.min(65_535).saturating_sub(headers);
    Ok(u16::try_from(payload).unwrap_or(u16::MAX))
}

/// The MTU of the interface that has the address `local`.
///
/// From /proc/sys/net, which shows the reader's network namespace; /sys/class/net shows the one it was mounted in.
fn interface_mtu_v6(local: Ipv6Addr) -> io::Result<u32> {
    let interface = getifaddrs()?
        .find(|i| {
            i.address
                .and_then(|a| a.as_sockaddr_in6().map(|a| a.ip()))
                .is_some_and(|ip| ip == local)
        })
        .ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?;
    fs::read_to_string(format!(
        "/proc/sys/net/ipv6/conf/{}/mtu",
        interface.interface_name
    ))?
    .trim()
    .parse()
    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// quinn's socket, with one system call never asked to send more than fits one.
///
/// quinn hands the kernel up to 10 packets a call for it to cut apart (GSO). With packets above about 6550 bytes that
/// is more than the 64 KiB a call may carry: the kernel answers EMSGSIZE and all of them vanish.
#[derive(Debug)]
pub struct SegmentCap {
    inner: Arc<dyn AsyncUdpSocket>,
    largest_packet: AtomicUsize,
}

impl SegmentCap {
    /// Wraps a bound socket. Must be called inside a tokio runtime.
    pub fn new(socket: UdpSocket) -> io::Result<Arc<SegmentCap>> {
        Ok(Arc::new(SegmentCap {
            inner: TokioRuntime.wrap_udp_socket(socket)?,
            largest_packet: AtomicUsize::new(1200),
        }))
    }

    /// Says that packets of up to `payload` bytes may be sent from now on.
    pub fn allow_packets_of(&self, payload: u16) {
        self.largest_packet
            .fetch_max(usize::from(payload), Ordering::Relaxed);
    }
}

impl AsyncUdpSocket for SegmentCap {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fit = MAX_PAYLOAD / self.largest_packet.load(Ordering::Relaxed);
        self.inner.max_transmit_segments().min(fit.max(1))
    }

    /// One: quinn multiplies this with the largest packet to size each receive buffer, and we allow packets of 64 KiB,
    /// which is also the most that the kernel merges into one buffer.
    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_route_over_loopback_carries_the_largest_packets() {
        let v4 = largest_payload("127.0.0.1:9".parse().expect("an address")).expect("a route");
        assert!(v4 > 16_000, "the loopback interface has a large MTU: {v4}");
        let mapped =
            largest_payload("[::ffff:127.0.0.1]:9".parse().expect("an address")).expect("a route");
        assert_eq!(mapped, v4);
    }

    #[tokio::test]
    async fn one_send_call_never_carries_more_than_a_packet_can() {
        let socket = bind("127.0.0.1:0".parse().expect("an address")).expect("binds");
        let cap = SegmentCap::new(socket).expect("wraps");
        for payload in [1472u16, 8972, 65507] {
            cap.allow_packets_of(payload);
            let segments = cap.max_transmit_segments();
            assert!(segments >= 1);
            assert!(segments * usize::from(payload) <= MAX_PAYLOAD);
        }
        cap.allow_packets_of(1472);
        assert_eq!(cap.max_transmit_segments(), 1, "the bound only tightens");
    }
}
