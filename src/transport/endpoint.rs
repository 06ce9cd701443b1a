//! Making connections: from TLS to an agreed version, at both ends.

use super::connection::{Connection, Peer};
use super::control::Control;
use super::door::{Door, Guest, Verdict};
use super::error::{TransportError, code};
use super::fingerprint::Fingerprint;
use super::identity::Identity;
use super::socket::{self, MAX_PAYLOAD, SegmentCap};
use super::tls::{self, PeerVerifier, SERVER_NAME};
use super::trust::{TrustStore, Trusted};
use crate::wire::peer_error::PeerError;
use crate::wire::version::Version;
use quinn::congestion::CubicConfig;
use quinn::{
    ConnectionError, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TokioRuntime,
    TransportConfig, VarInt,
};
use rustls::pki_types::CertificateDer;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// What can be chosen about connections; the rest was measured (DESIGN, section 9) and is fixed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// A peer from which nothing was heard for this long is lost. At least twice `keep_alive`.
    pub idle_timeout: Duration,
    /// After this long without traffic a sign of life is asked for.
    pub keep_alive: Duration,
    /// How long a connection may take to be made, TLS and hello together. A busy host of one slow processor (an emulated
    /// one) was seen to take 2 s, and more than 5 s where it got half of a processor.
    pub connect_timeout: Duration,
    /// What page and file senders may write, in bytes per second, until changed on the connection.
    pub bandwidth_limit: Option<NonZeroU64>,
    /// The protocol versions to speak, best first.
    pub versions: Vec<Version>,
}

impl Settings {
    /// [`Settings::connect_timeout`] for one of many attempts at a peer that was there before. The handshake's first
    /// packet is repeated after ever longer pauses: a new attempt meets a link that came back sooner.
    pub const RETRY_TIMEOUT: Duration = Duration::from_secs(5);
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            idle_timeout: crate::fault::patience(Duration::from_secs(10)),
            keep_alive: crate::fault::patience(Duration::from_secs(2)),
            connect_timeout: Duration::from_secs(15),
            bandwidth_limit: None,
            versions: Version::SUPPORTED.to_vec(),
        }
    }
}

/// Bytes in flight at the start; a migration is one long bulk transfer and does not wait for slow start.
const INITIAL_WINDOW: u64 = 2 << 20;
/// Bytes written but not acknowledged, of all streams.
const SEND_WINDOW: u64 = 16 << 20;
/// Bytes received but not read, of all streams and of one.
const RECEIVE_WINDOW: u32 = 64 << 20;
const STREAM_RECEIVE_WINDOW: u32 = 32 << 20;
/// Streams the peer may have open in each direction: 64 page streams and as many others.
const MAX_STREAMS: u32 = 128;
/// The largest packet we take, IPv6's larger one; it only tells the peer that we do not mind.
const MAX_PACKET: u16 = 65_527;
/// First packets that quinn keeps for us to decide on, and bytes of those that follow them. We decide at once.
const MAX_UNDECIDED: usize = 1024;
const UNDECIDED_BYTES: u64 = 64 << 10;
const ALL_UNDECIDED_BYTES: u64 = 4 << 20;

/// Connects to agents.
#[derive(Clone)]
pub struct Connector {
    identity: Arc<Identity>,
    trust: TrustStore,
    settings: Settings,
}

impl Connector {
    /// A connector that shows `identity` and connects to the peers in `trust`.
    pub fn new(identity: Arc<Identity>, trust: TrustStore, settings: Settings) -> Connector {
        Connector {
            identity,
            trust,
            settings,
        }
    }

    /// Connects to the agent at `addr` and agrees on a version. Must be called on the runtime the connection is to
    /// live on; it gets a socket of its own.
    pub async fn connect(&self, addr: SocketAddr) -> Result<(Connection, Control), TransportError> {
        let deadline = Instant::now() + self.settings.connect_timeout;
        let no_route = |source| TransportError::NoRoute { peer: addr, source };
        let payload = socket::largest_payload(addr).map_err(no_route)?;
        let verifier = PeerVerifier::new(self.trust.current()?);
        let mut config = tls::client(&self.identity, verifier.clone())?;
        config.transport_config(Arc::new(transport_config(&self.settings, payload)));

        let (endpoint, socket) = bind(socket::unspecified_for(addr), None)?;
        socket.allow_packets_of(payload);
        let connecting = endpoint.connect_with(config, addr, SERVER_NAME)?;
        let quic = match timeout_at(deadline, connecting).await {
            Ok(Ok(quic)) => quic,
            Ok(Err(ConnectionError::TimedOut)) | Err(_) => {
                return Err(TransportError::Unreachable { peer: addr });
            }
            Ok(Err(error)) => return Err(refusal_or(&verifier, error)),
        };
        let peer = peer_of(&quic, verifier.trusted())?;
        let hello = Connection::offer(
            quic,
            endpoint,
            peer,
            &self.settings.versions,
            self.settings.bandwidth_limit,
        );
        timeout_at(deadline, hello)
            .await
            .unwrap_or(Err(TransportError::TimedOut))
    }
}

/// Accepts connections.
pub struct Listener {
    endpoint: quinn::Endpoint,
    socket: Arc<SegmentCap>,
    identity: Arc<Identity>,
    trust: TrustStore,
    settings: Settings,
    door: Arc<Door>,
}

impl Listener {
    /// Listens at `addr`. Must be called on the runtime that is to sort out what comes; who is let in is carried by the one
    /// that [`Arrival::handshake`] is called on.
    pub fn bind(
        addr: SocketAddr,
        identity: Arc<Identity>,
        trust: TrustStore,
        settings: Settings,
    ) -> Result<Listener, TransportError> {
        // Every connection gets a configuration of its own; this one only lets packets be understood.
        let mut config = tls::server(&identity, PeerVerifier::new(Arc::new(Trusted::default())))?;
        config
            .max_incoming(MAX_UNDECIDED)
            .incoming_buffer_size(UNDECIDED_BYTES)
            .incoming_buffer_size_total(ALL_UNDECIDED_BYTES);
        let (endpoint, socket) = bind(addr, Some(config))?;
        Ok(Listener {
            endpoint,
            socket,
            identity,
            trust,
            settings,
            door: Arc::default(),
        })
    }

    /// The address listened at, with the port the kernel chose if 0 was asked for.
    pub fn local_addr(&self) -> Result<SocketAddr, TransportError> {
        let unbound = SocketAddr::from(([0, 0, 0, 0], 0));
        self.endpoint
            .local_addr()
            .map_err(|source| TransportError::Socket {
                addr: unbound,
                source,
            })
    }

    /// The next host that knocks and may try, or `None` after [`Listener::close`].
    ///
    /// Who it is has not been checked yet: let [`Arrival::handshake`] run in a task of its own.
    pub async fn accept(&self) -> Option<Arrival> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let proven = incoming.remote_address_validated();
            let now = std::time::Instant::now();
            match self.door.knock(incoming.remote_address(), proven, now) {
                Verdict::Begin(guest) => {
                    return Some(Arrival {
                        incoming,
                        guest,
                        socket: self.socket.clone(),
                        identity: self.identity.clone(),
                        trust: self.trust.clone(),
                        settings: self.settings.clone(),
                    });
                }
                // Who has come back from one Retry is proven and gets no second.
                Verdict::Prove => drop(incoming.retry()),
                Verdict::Ignore => incoming.ignore(),
            }
        }
    }

    /// Closes all connections and takes no new ones.
    pub async fn close(&self, error: PeerError) {
        self.endpoint.close(code(error), b"");
        self.endpoint.wait_idle().await;
    }
}

/// A host that knocks.
pub struct Arrival {
    incoming: quinn::Incoming,
    guest: Guest,
    socket: Arc<SegmentCap>,
    identity: Arc<Identity>,
    trust: TrustStore,
    settings: Settings,
}

impl Arrival {
    /// Where it comes from. Not verified: anybody can write a sender address.
    pub fn addr(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    /// Lets the peer in if the trust store knows it now, and agrees on a version. The connection lives on the runtime this is
    /// called on.
    pub async fn handshake(self) -> Result<(Connection, Control), TransportError> {
        let deadline = Instant::now() + self.settings.connect_timeout;
        let addr = self.incoming.remote_address();
        let payload = socket::largest_payload(addr)
            .map_err(|source| TransportError::NoRoute { peer: addr, source })?;
        let verifier = PeerVerifier::new(self.trust.current()?);
        let mut config = tls::server(&self.identity, verifier.clone())?;
        config.transport_config(Arc::new(transport_config(&self.settings, payload)));
        self.socket.allow_packets_of(payload);

        let connecting = self.incoming.accept_with(Arc::new(config))?;
        let quic = match timeout_at(deadline, connecting).await {
            Ok(Ok(quic)) => quic,
            Ok(Err(error)) => {
                let error = refusal_or(&verifier, error);
                if matches!(error, TransportError::UnknownPeer { .. }) {
                    self.guest.refuse();
                }
                return Err(error);
            }
            Err(_) => return Err(TransportError::TimedOut),
        };
        let peer = peer_of(&quic, verifier.trusted())?;
        // From here on it is a peer, whatever it says.
        self.guest.let_in();
        let hello = Connection::answer(quic, peer, &self.settings.versions);
        timeout_at(deadline, hello)
            .await
            .unwrap_or(Err(TransportError::TimedOut))
    }
}

fn bind(
    addr: SocketAddr,
    server: Option<quinn::ServerConfig>,
) -> Result<(quinn::Endpoint, Arc<SegmentCap>), TransportError> {
    let failed = |source| TransportError::Socket { addr, source };
    let socket = socket::bind(addr)
        .and_then(SegmentCap::new)
        .map_err(failed)?;
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(MAX_PACKET)
        .expect("the packet size is within QUIC's range");
    let runtime = Arc::new(TokioRuntime);
    let endpoint =
        quinn::Endpoint::new_with_abstract_socket(config, server, socket.clone(), runtime)
            .map_err(failed)?;
    Ok((endpoint, socket))
}

fn transport_config(settings: &Settings, payload: u16) -> TransportConfig {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW);
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(payload.min(MAX_PAYLOAD as u16));
    // A timeout too long for QUIC to say is as good as none.
    let idle = IdleTimeout::try_from(settings.idle_timeout).ok();

    let mut config = TransportConfig::default();
    config
        .max_concurrent_uni_streams(MAX_STREAMS.into())
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_idle_timeout(idle)
        .keep_alive_interval(Some(settings.keep_alive))
        .send_window(SEND_WINDOW)
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .stream_receive_window(VarInt::from_u32(STREAM_RECEIVE_WINDOW))
        // Without fairness a small answer starved for seconds behind bulk streams.
        .send_fairness(true)
        .congestion_controller_factory(Arc::new(cubic))
        .mtu_discovery_config(Some(discovery))
        .datagram_receive_buffer_size(None);
    config
}

fn refusal_or(verifier: &PeerVerifier, error: ConnectionError) -> TransportError {
    match verifier.refused() {
        Some(fingerprint) => TransportError::UnknownPeer { fingerprint },
        None => error.into(),
    }
}

/// Who the peer is, from the certificate it proved to own.
fn peer_of(quic: &quinn::Connection, trusted: &Trusted) -> Result<Peer, TransportError> {
    let fingerprint = quic
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .and_then(|chain| chain.first().map(Fingerprint::of));
    // TLS has demanded and verified a certificate, so these cannot fail; if they did, nobody would get in.
    let fingerprint = fingerprint.ok_or(TransportError::NotTrusted)?;
    let name = trusted
        .name_of(fingerprint)
        .ok_or(TransportError::UnknownPeer { fingerprint })?;
    Ok(Peer {
        name: name.clone(),
        fingerprint,
        addr: quic.remote_address(),
    })
}
