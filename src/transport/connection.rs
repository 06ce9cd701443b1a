//! A connection after its hello: who is on the other side, and the streams between.

use super::control::Control;
use super::error::{TransportError, code, in_part};
use super::files::{FileReceiver, FileSender};
use super::fingerprint::Fingerprint;
use super::link::{LinkMeter, LinkSample};
use super::pages::{PageReceiver, PageSender};
use super::rate::RateLimit;
use super::requests::{RequestReceiver, RequestSender};
use super::trust::PeerName;
use crate::wire::peer_error::PeerError;
use crate::wire::stream::{HEADER_LEN, StreamKind};
use crate::wire::version::{Answer, HEAD_LEN, Offer, Version, list_len};
use quinn::{ReadExactError, RecvStream, SendStream};
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long a side waits for the other to notice the end of a connection.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// A connection to a trusted peer in an agreed version. Clones share it.
///
/// When the last clone, control stream, sender and receiver of it are dropped, it is closed as
/// [`PeerError::Internal`], because whoever ends well says so with [`Connection::close`].
#[derive(Clone)]
pub struct Connection(Arc<Inner>);

struct Inner {
    quic: quinn::Connection,
    /// The client's endpoint carries this connection alone; a server's carries many and is its listener's.
    own_endpoint: Option<quinn::Endpoint>,
    runtime: Handle,
    peer: Peer,
    version: Version,
    limit: RateLimit,
    link: Arc<LinkMeter>,
    /// Bytes of pages and files that came.
    came: AtomicU64,
    arrivals: Arrivals,
}

/// Streams the peer opened, sorted by what they are for and waiting to be accepted.
///
/// The queues have no bound of their own: a waiting stream counts against the number of streams that
/// `endpoint` lets the peer have open.
struct Arrivals {
    pages: Queue<(u16, RecvStream)>,
    files: Queue<(u16, RecvStream)>,
    rootfs: Queue<(u16, SendStream, RecvStream)>,
    faults: Queue<(u16, SendStream, RecvStream)>,
    sorters: [JoinHandle<()>; 2],
}

type Queue<T> = Mutex<mpsc::UnboundedReceiver<T>>;

/// Who is on the other side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// What the trust store calls it.
    pub name: PeerName,
    /// Its certificate.
    pub fingerprint: Fingerprint,
    /// Where it is.
    pub addr: SocketAddr,
}

/// What a connection has carried so far, and how the path is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WireStats {
    /// UDP payload bytes sent, retransmissions and QUIC's own frames counted.
    pub sent_bytes: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// Packets lost on the way to the peer.
    pub lost_packets: u64,
    /// The estimated round-trip time.
    pub rtt: Duration,
    /// The largest UDP payload that was found to pass.
    pub packet_bytes: u16,
    /// Bytes that may be in flight before an acknowledgement.
    pub window_bytes: u64,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection to {}", self.0.peer.name)
    }
}

impl Connection {
    /// What the connecting side does after TLS: offers `versions`.
    pub(super) async fn offer(
        quic: quinn::Connection,
        endpoint: quinn::Endpoint,
        peer: Peer,
        versions: &[Version],
        limit: Option<NonZeroU64>,
    ) -> Result<(Connection, Control), TransportError> {
        match offer_hello(&quic, versions).await {
            Ok((version, send, receive)) => {
                let connection = Connection::new(quic, Some(endpoint), peer, version, limit);
                let control = Control::new(send, receive, &connection);
                Ok((connection, control))
            }
            Err(error) => {
                quic.close(code(error.as_peer_error()), b"");
                // Without this the endpoint would be dropped before the close is sent.
                let _ = timeout(CLOSE_GRACE, endpoint.wait_idle()).await;
                Err(error)
            }
        }
    }

    /// What the accepting side does after TLS: selects one of `versions`.
    pub(super) async fn answer(
        quic: quinn::Connection,
        peer: Peer,
        versions: &[Version],
    ) -> Result<(Connection, Control), TransportError> {
        match answer_hello(&quic, versions).await {
            Ok((version, send, receive)) => {
                let connection = Connection::new(quic, None, peer, version, None);
                let control = Control::new(send, receive, &connection);
                Ok((connection, control))
            }
            Err(error) => {
                quic.close(code(error.as_peer_error()), b"");
                Err(error)
            }
        }
    }

    fn new(
        quic: quinn::Connection,
        own_endpoint: Option<quinn::Endpoint>,
        peer: Peer,
        version: Version,
        limit: Option<NonZeroU64>,
    ) -> Connection {
        let arrivals = Arrivals::sort(&quic);
        Connection(Arc::new(Inner {
            quic,
            own_endpoint,
            runtime: Handle::current(),
            peer,
            version,
            limit: RateLimit::new(limit),
            link: Arc::new(LinkMeter::default()),
            came: AtomicU64::new(0),
            arrivals,
        }))
    }

    /// Who is on the other side.
    pub fn peer(&self) -> &Peer {
        &self.0.peer
    }

    /// The protocol version both sides agreed on.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// Opens page stream `index` towards the peer.
    pub async fn open_pages(&self, index: u16) -> Result<PageSender, TransportError> {
        let stream = self.open_one_way(StreamKind::Pages, index).await?;
        Ok(PageSender::new(stream, index, self.clone()))
    }

    /// The next page stream the peer opened, in no particular order.
    pub async fn accept_pages(&self) -> Result<PageReceiver, TransportError> {
        let (index, stream) = self.next(&self.0.arrivals.pages).await?;
        Ok(PageReceiver::new(stream, index, self.clone()))
    }

    /// Opens file stream `index` towards the peer.
    pub async fn open_files(&self, index: u16) -> Result<FileSender, TransportError> {
        let stream = self.open_one_way(StreamKind::Files, index).await?;
        Ok(FileSender::new(stream, self.clone()))
    }

    /// The next file stream the peer opened.
    pub async fn accept_files(&self) -> Result<FileReceiver, TransportError> {
        let (index, stream) = self.next(&self.0.arrivals.files).await?;
        Ok(FileReceiver::new(stream, index, self.clone()))
    }

    /// Opens fault stream `index`: page requests come, page frames go, and neither waits for the bandwidth limit.
    pub async fn open_faults(
        &self,
        index: u16,
    ) -> Result<(PageSender, RequestReceiver), TransportError> {
        let (send, receive) = self.open_stream(TwoWay::Faults, index).await?;
        let pages = PageSender::urgent(send, index, self.clone());
        Ok((pages, RequestReceiver::new(receive, self.clone())))
    }

    /// The next fault stream the peer opened.
    pub async fn accept_faults(&self) -> Result<(RequestSender, PageReceiver), TransportError> {
        let (index, send, receive) = self.next(&self.0.arrivals.faults).await?;
        let pages = PageReceiver::new(receive, index, self.clone());
        Ok((RequestSender::new(send, self.clone()), pages))
    }

    /// Opens stream `index` in both directions for another room's protocol.
    ///
    /// The two halves do not keep the connection open: keep a clone of it.
    pub async fn open_stream(
        &self,
        kind: TwoWay,
        index: u16,
    ) -> Result<(SendStream, RecvStream), TransportError> {
        let (mut send, receive) = self.0.quic.open_bi().await?;
        send.write_all(&kind.on_wire().header(index)).await?;
        Ok((send, receive))
    }

    /// The next stream of this kind the peer opened, with its index.
    pub async fn accept_stream(
        &self,
        kind: TwoWay,
    ) -> Result<(u16, SendStream, RecvStream), TransportError> {
        match kind {
            TwoWay::Rootfs => self.next(&self.0.arrivals.rootfs).await,
            TwoWay::Faults => self.next(&self.0.arrivals.faults).await,
        }
    }

    /// Limits what page and file senders of this connection write, in bytes per second, or lifts the limit.
    pub fn set_bandwidth_limit(&self, bytes_per_second: Option<NonZeroU64>) {
        self.0.limit.set(bytes_per_second);
    }

    /// Waits until the bandwidth limit lets `bytes` go; for what is written to an [`open_stream`] directly.
    ///
    /// [`open_stream`]: Connection::open_stream
    pub async fn acquire(&self, bytes: usize) {
        self.0.limit.acquire(bytes).await;
    }

    /// How fast the link took page frames since the last call; `None` if the link was not what held them up.
    ///
    /// Feed it to `CodecChooser::link_took`.
    pub fn link_sample(&self) -> Option<LinkSample> {
        self.0.link.sample()
    }

    /// Bytes of pages and files that the peer sent and that were taken in so far: as long as it grows the link works, however
    /// slow it is.
    pub fn bytes_taken(&self) -> u64 {
        self.0.came.load(Ordering::Relaxed)
    }

    /// So many bytes of a page or file were taken in.
    pub(super) fn took(&self, bytes: usize) {
        self.0.came.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// What was carried so far.
    pub fn stats(&self) -> WireStats {
        let stats = self.0.quic.stats();
        WireStats {
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            lost_packets: stats.path.lost_packets,
            rtt: stats.path.rtt,
            packet_bytes: stats.path.current_mtu,
            window_bytes: stats.path.cwnd,
        }
    }

    /// Closes the connection and tells the peer why. What is still on its way may be lost.
    pub fn close(&self, error: PeerError) {
        self.0.quic.close(code(error), b"");
    }

    /// Closes the connection and waits until the peer can know it, at most a second.
    pub async fn close_and_wait(&self, error: PeerError) {
        self.close(error);
        if let Some(endpoint) = &self.0.own_endpoint {
            let _ = timeout(CLOSE_GRACE, endpoint.wait_idle()).await;
        }
    }

    /// Waits until the connection is closed or lost, and says why.
    pub async fn closed(&self) -> TransportError {
        self.0.quic.closed().await.into()
    }

    /// Why the connection is closed, if it is.
    pub fn close_reason(&self) -> Option<TransportError> {
        self.0.quic.close_reason().map(TransportError::from)
    }

    /// The runtime the connection lives on, to spawn on it or to wait for its futures on another thread.
    pub fn runtime(&self) -> &Handle {
        &self.0.runtime
    }

    pub(super) fn link(&self) -> &Arc<LinkMeter> {
        &self.0.link
    }

    async fn open_one_way(
        &self,
        kind: StreamKind,
        index: u16,
    ) -> Result<SendStream, TransportError> {
        let mut stream = self.0.quic.open_uni().await?;
        stream.write_all(&kind.header(index)).await?;
        Ok(stream)
    }

    async fn next<T>(&self, queue: &Queue<T>) -> Result<T, TransportError> {
        match queue.lock().await.recv().await {
            Some(stream) => Ok(stream),
            // The sorters end only with the connection.
            None => Err(self.closed().await),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for sorter in &self.arrivals.sorters {
            sorter.abort();
        }
        // No effect if it was closed before.
        self.quic.close(code(PeerError::Internal), b"");
    }
}

impl Arrivals {
    fn sort(quic: &quinn::Connection) -> Arrivals {
        let (to_pages, pages) = mpsc::unbounded_channel();
        let (to_files, files) = mpsc::unbounded_channel();
        let (to_rootfs, rootfs) = mpsc::unbounded_channel();
        let (to_faults, faults) = mpsc::unbounded_channel();
        let one_way = tokio::spawn({
            let quic = quic.clone();
            async move {
                while let Ok(mut stream) = quic.accept_uni().await {
                    let (quic, pages, files) = (quic.clone(), to_pages.clone(), to_files.clone());
                    // Its own task, so that a stream whose header is late does not hold up the others.
                    tokio::spawn(async move {
                        match read_header(&quic, &mut stream).await {
                            Some((StreamKind::Pages, index)) => drop(pages.send((index, stream))),
                            Some((StreamKind::Files, index)) => drop(files.send((index, stream))),
                            Some(_) => quic.close(code(PeerError::Malformed), b""),
                            None => {}
                        }
                    });
                }
            }
        });
        let two_way = tokio::spawn({
            let quic = quic.clone();
            async move {
                while let Ok((send, mut receive)) = quic.accept_bi().await {
                    let (quic, rootfs, faults) =
                        (quic.clone(), to_rootfs.clone(), to_faults.clone());
                    tokio::spawn(async move {
                        match read_header(&quic, &mut receive).await {
                            Some((StreamKind::Rootfs, index)) => {
                                drop(rootfs.send((index, send, receive)));
                            }
                            Some((StreamKind::Faults, index)) => {
                                drop(faults.send((index, send, receive)));
                            }
                            Some(_) => quic.close(code(PeerError::Malformed), b""),
                            None => {}
                        }
                    });
                }
            }
        });
        Arrivals {
            pages: Mutex::new(pages),
            files: Mutex::new(files),
            rootfs: Mutex::new(rootfs),
            faults: Mutex::new(faults),
            sorters: [one_way, two_way],
        }
    }
}

/// The header of a stream; a wrong one ends the connection, a stream given up before its header is forgotten.
async fn read_header(
    quic: &quinn::Connection,
    stream: &mut RecvStream,
) -> Option<(StreamKind, u16)> {
    let mut header = [0; HEADER_LEN];
    match stream.read_exact(&mut header).await {
        Ok(()) => {}
        Err(ReadExactError::ReadError(_)) => return None,
        Err(ReadExactError::FinishedEarly(_)) => {
            quic.close(code(PeerError::Malformed), b"");
            return None;
        }
    }
    match StreamKind::decode(header) {
        Ok(read) => Some(read),
        Err(error) => {
            tracing::warn!(%error, "the connection is closed");
            quic.close(code(PeerError::Malformed), b"");
            None
        }
    }
}

async fn offer_hello(
    quic: &quinn::Connection,
    versions: &[Version],
) -> Result<(Version, SendStream, RecvStream), TransportError> {
    let (mut send, mut receive) = quic.open_bi().await?;
    let offer = Offer {
        versions: versions.to_vec(),
    };
    send.write_all(&offer.encode()).await?;
    match Answer::decode(&read_hello(&mut receive).await?)? {
        Answer::Selected(version) if versions.contains(&version) => Ok((version, send, receive)),
        Answer::Selected(version) => Err(mismatch(versions, vec![version])),
        Answer::Unsupported(theirs) => Err(mismatch(versions, theirs)),
    }
}

async fn answer_hello(
    quic: &quinn::Connection,
    versions: &[Version],
) -> Result<(Version, SendStream, RecvStream), TransportError> {
    let (mut send, mut receive) = quic.accept_bi().await?;
    let offer = Offer::decode(&read_hello(&mut receive).await?)?;
    let answer = offer.answer(versions);
    send.write_all(&answer.encode()).await?;
    match answer {
        Answer::Selected(version) => Ok((version, send, receive)),
        Answer::Unsupported(_) => {
            // Closing now would overtake the answer. The other side closes as soon as it has read it.
            let _ = timeout(CLOSE_GRACE, quic.closed()).await;
            Err(mismatch(versions, offer.versions))
        }
    }
}

async fn read_hello(stream: &mut RecvStream) -> Result<Vec<u8>, TransportError> {
    let mut head = [0; HEAD_LEN];
    stream
        .read_exact(&mut head)
        .await
        .map_err(in_part("the hello"))?;
    let mut hello = head.to_vec();
    hello.resize(HEAD_LEN + list_len(&head)?, 0);
    stream
        .read_exact(&mut hello[HEAD_LEN..])
        .await
        .map_err(in_part("the hello"))?;
    Ok(hello)
}

fn mismatch(ours: &[Version], theirs: Vec<Version>) -> TransportError {
    TransportError::VersionMismatch {
        ours: ours.to_vec(),
        theirs,
    }
}

/// What a stream in both directions is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TwoWay {
    /// The root filesystem's own protocol.
    Rootfs,
    /// Page requests of a post-copy target and their answers.
    Faults,
}

impl TwoWay {
    fn on_wire(self) -> StreamKind {
        match self {
            TwoWay::Rootfs => StreamKind::Rootfs,
            TwoWay::Faults => StreamKind::Faults,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Connector, Identity, Listener, Settings, TrustStore};
    use crate::wire::message::{Commit, Message};

    /// Two ends of a connection over loopback, and what they live in.
    async fn pair() -> (Connection, Control, Connection, Control) {
        let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let [near, far] = dirs
            .each_ref()
            .map(|dir| Arc::new(Identity::load_or_create(dir.path()).expect("an identity")));
        let [near_trust, far_trust] = dirs.each_ref().map(|dir| TrustStore::in_dir(dir.path()));
        let name: PeerName = "other".parse().expect("a name");
        near_trust
            .add(name.clone(), far.fingerprint())
            .expect("added");
        far_trust.add(name, near.fingerprint()).expect("added");
        let any = "127.0.0.1:0".parse().expect("an address");
        let listener = Listener::bind(any, far, far_trust, Settings::default()).expect("listens");
        let connector = Connector::new(near, near_trust, Settings::default());
        let addr = listener.local_addr().expect("has an address");
        let accepted = async {
            let arrival = listener.accept().await.expect("somebody knocks");
            arrival.handshake().await.expect("accepts")
        };
        let (connected, accepted) = tokio::join!(connector.connect(addr), accepted);
        let (from, ask) = connected.expect("connects");
        (from, ask, accepted.0, accepted.1)
    }

    async fn is_closed_as_malformed(connection: &Connection) {
        assert!(matches!(
            connection.closed().await,
            TransportError::ClosedByPeer(PeerError::Malformed)
        ));
    }

    #[tokio::test]
    async fn a_stream_of_an_unknown_kind_closes_the_connection() {
        let (from, _ask, _to, _answer) = pair().await;
        let mut stream = from.0.quic.open_uni().await.expect("opens");
        stream.write_all(&[99, 0, 0]).await.expect("written");
        is_closed_as_malformed(&from).await;
    }

    #[tokio::test]
    async fn a_stream_in_the_wrong_direction_closes_the_connection() {
        let (from, _ask, _to, _answer) = pair().await;
        let (mut stream, _) = from.0.quic.open_bi().await.expect("opens");
        let header = StreamKind::Pages.header(0);
        stream.write_all(&header).await.expect("written");
        is_closed_as_malformed(&from).await;
    }

    #[tokio::test]
    async fn a_stream_that_ends_inside_its_header_closes_the_connection() {
        let (from, _ask, _to, _answer) = pair().await;
        let mut stream = from.0.quic.open_uni().await.expect("opens");
        stream.write_all(&[1, 0]).await.expect("written");
        stream.finish().expect("finished once");
        is_closed_as_malformed(&from).await;
    }

    #[tokio::test]
    async fn a_stream_whose_header_is_late_does_not_hold_up_the_others() {
        let (from, _ask, to, _answer) = pair().await;
        let mut silent = from.0.quic.open_uni().await.expect("opens");
        silent.write_all(&[1]).await.expect("written");
        let _pages = from.open_pages(3).await.expect("opens");
        let accepted = to.accept_pages().await.expect("accepts");
        assert_eq!(accepted.index(), 3);
    }

    #[tokio::test]
    async fn first_bytes_that_are_no_hello_are_refused() {
        let (from, _ask, to, _answer) = pair().await;
        for sorter in &to.0.arrivals.sorters {
            sorter.abort();
        }
        let (mut send, _receive) = from.0.quic.open_bi().await.expect("opens");
        send.write_all(b"GET / HTTP/1.1\r\n")
            .await
            .expect("written");
        assert!(matches!(
            answer_hello(&to.0.quic, Version::SUPPORTED).await,
            Err(TransportError::Hello(_))
        ));
    }

    #[tokio::test]
    async fn a_peer_that_says_more_than_any_migration_has_to_say_is_not_heard_further() {
        let (_from, mut ask, _to, mut answer) = pair().await;
        let commit = Message::from(Commit {}).encode().expect("encodes");
        let body_len = crate::wire::message::MAX_BODY;
        let mut long = commit[..commit.len() - 2].to_vec();
        let header_len = long.len();
        long[header_len - 4..].copy_from_slice(&(body_len as u32).to_le_bytes());
        long.extend_from_slice(b"{}");
        long.resize(header_len + body_len, b' ');
        let saying = async {
            // It is cut off while it speaks.
            while ask.sender.try_write_raw(&long).await {}
        };
        let hearing = async {
            let mut heard = 0;
            loop {
                match answer.receive().await {
                    Ok(Some(Message::Commit(_))) => heard += 1,
                    Ok(other) => panic!("{other:?}"),
                    Err(error) => break (heard, error),
                }
            }
        };
        let (heard, error) = tokio::select! {
            heard = hearing => heard,
            () = saying => panic!("nobody ended it"),
        };
        assert!(matches!(error, TransportError::Endless), "{error}");
        assert!(heard >= 8, "{heard}");
    }

    #[tokio::test]
    async fn garbage_on_the_control_stream_is_an_error_for_its_reader() {
        let (_from, mut ask, _to, mut answer) = pair().await;
        ask.send(Commit {}).await.expect("sent");
        ask.sender.write_raw(b"this is no message").await;
        answer
            .receive()
            .await
            .expect("the good one")
            .expect("a message");
        let error = answer.receive().await.expect_err("the bad one");
        assert!(matches!(error, TransportError::Message(_)));
        assert_eq!(error.as_peer_error(), PeerError::Malformed);
    }
}
