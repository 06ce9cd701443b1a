//! Two endpoints on loopback: who gets in, what crosses, and what happens when it does not.

mod support {
    pub mod strangers;
}

use bytes::Bytes;
use migrate::memory::{PAGE_SIZE, PageNumber, PageRange, SpaceId};
use migrate::transport::{
    Connection, Connector, Control, Identity, Listener, PeerName, Settings, TransportError,
    TransportThread, TrustStore, TwoWay,
};
use migrate::wire::codec::Codec;
use migrate::wire::file_frame::FileHeader;
use migrate::wire::message::{Accepted, Commit, Message, RoundEnd, RoundReceived};
use migrate::wire::page_frame::{EncodedFrame, FrameEncoder, Run, RunKind, Scratch};
use migrate::wire::peer_error::PeerError;
use migrate::wire::version::Version;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::strangers::first_flights;
use tempfile::TempDir;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A host: its identity and whom it trusts.
struct Host {
    _dir: TempDir,
    identity: Arc<Identity>,
    trust: TrustStore,
}

impl Host {
    fn new() -> Host {
        let dir = tempfile::tempdir().expect("a directory");
        Host {
            identity: Arc::new(Identity::load_or_create(dir.path()).expect("an identity")),
            trust: TrustStore::in_dir(dir.path()),
            _dir: dir,
        }
    }

    fn trusts(&self, name: &str, other: &Host) {
        self.trust
            .add(peer(name), other.identity.fingerprint())
            .expect("the trust store takes it");
    }

    fn connector(&self, settings: Settings) -> Connector {
        Connector::new(self.identity.clone(), self.trust.clone(), settings)
    }

    fn listener(&self, settings: Settings) -> Listener {
        let any = "127.0.0.1:0".parse().expect("an address");
        Listener::bind(any, self.identity.clone(), self.trust.clone(), settings).expect("listens")
    }
}

fn peer(name: &str) -> PeerName {
    name.parse().expect("a name")
}

fn two_hosts() -> (Host, Host) {
    let (source, target) = (Host::new(), Host::new());
    source.trusts("target", &target);
    target.trusts("source", &source);
    (source, target)
}

/// A peer that is silent is not given up while a test lasts: what is learned is learned from what it says.
fn patient() -> Settings {
    Settings {
        connect_timeout: Duration::from_secs(3600),
        idle_timeout: Duration::from_secs(3600),
        ..Settings::default()
    }
}

type Handshake = Result<(Connection, Control), TransportError>;

/// What both sides say about one connection.
async fn meet(
    source: &Host,
    target: &Host,
    from: Settings,
    to: Settings,
) -> (Handshake, Handshake) {
    let listener = target.listener(to);
    let addr = listener.local_addr().expect("has an address");
    let connector = source.connector(from);
    let accepted = async {
        let arrival = listener.accept().await.expect("somebody knocks");
        arrival.handshake().await
    };
    tokio::join!(connector.connect(addr), accepted)
}

async fn connected(source: &Host, target: &Host) -> ((Connection, Control), (Connection, Control)) {
    let (from, to) = meet(source, target, Settings::default(), Settings::default()).await;
    (from.expect("connects"), to.expect("accepts"))
}

fn data_run(first: u64, pages: u64) -> Run {
    Run {
        range: PageRange::from_start_len(PageNumber(first), pages).expect("a run"),
        kind: RunKind::Data,
    }
}

fn frame(first: u64, content: u8, pages: u64, codec: Codec) -> EncodedFrame {
    let raw = Bytes::from(vec![content; (pages * PAGE_SIZE) as usize]);
    FrameEncoder::new()
        .encode(SpaceId(1), &[data_run(first, pages)], raw, codec)
        .expect("encodes")
}

#[tokio::test]
async fn hosts_that_trust_each_other_talk() {
    let (source, target) = two_hosts();
    let ((from, mut ask), (to, mut answer)) = connected(&source, &target).await;
    assert_eq!(from.version(), Version::SUPPORTED[0]);
    assert_eq!(from.peer().name, peer("target"));
    assert_eq!(from.peer().fingerprint, target.identity.fingerprint());
    assert_eq!(to.peer().name, peer("source"));

    ask.send(Commit {}).await.expect("sent");
    let said = answer.receive().await.expect("received");
    assert_eq!(said, Some(Message::Commit(Commit {})));
    answer.send(Accepted { lazy: false }).await.expect("sent");
    let said = ask.receive().await.expect("received");
    assert_eq!(said, Some(Message::Accepted(Accepted { lazy: false })));

    ask.sender.finish().expect("finished once");
    assert_eq!(answer.receive().await.expect("a clean end"), None);
    from.close_and_wait(PeerError::Done).await;
    assert!(matches!(
        to.closed().await,
        TransportError::ClosedByPeer(PeerError::Done)
    ));
}

#[tokio::test]
async fn a_client_with_an_unknown_certificate_is_refused_and_told() {
    let (source, target) = (Host::new(), Host::new());
    source.trusts("target", &target);
    let (from, to) = meet(&source, &target, Settings::default(), Settings::default()).await;
    assert!(
        matches!(from, Err(TransportError::NotTrusted)),
        "{:?}",
        from.err()
    );
    match to {
        Err(TransportError::UnknownPeer { fingerprint }) => {
            assert_eq!(fingerprint, source.identity.fingerprint());
        }
        other => panic!("the agent said {:?}", other.err()),
    }
}

#[tokio::test]
async fn a_server_with_an_unknown_certificate_is_refused() {
    let (source, target) = (Host::new(), Host::new());
    target.trusts("source", &source);
    let (from, to) = meet(&source, &target, Settings::default(), Settings::default()).await;
    match from {
        Err(TransportError::UnknownPeer { fingerprint }) => {
            assert_eq!(fingerprint, target.identity.fingerprint());
        }
        other => panic!("the source said {:?}", other.err()),
    }
    assert!(
        matches!(to, Err(TransportError::NotTrusted)),
        "{:?}",
        to.err()
    );
}

#[tokio::test]
async fn trust_given_and_taken_counts_from_the_next_handshake() {
    let (source, target) = (Host::new(), Host::new());
    source.trusts("target", &target);
    let listener = target.listener(Settings::default());
    let addr = listener.local_addr().expect("has an address");
    let connector = source.connector(Settings::default());
    let attempt = async || {
        let accepted = async {
            let arrival = listener.accept().await.expect("somebody knocks");
            arrival.handshake().await
        };
        let (from, to) = tokio::join!(connector.connect(addr), accepted);
        (from.is_ok(), to.is_ok())
    };
    assert_eq!(attempt().await, (false, false));
    target.trusts("source", &source);
    assert_eq!(attempt().await, (true, true));
    target.trust.remove(&peer("source")).expect("removed");
    assert_eq!(attempt().await, (false, false));
}

/// None of the strangers is given up while the test lasts, and none is there to prove its address.
#[tokio::test]
async fn a_trusted_host_gets_in_while_hundreds_of_strangers_knock_and_few_of_them_are_listened_to()
{
    let (source, target) = two_hosts();
    let flights = first_flights(400).await;
    let listener = Arc::new(target.listener(patient()));
    let addr = listener.local_addr().expect("has an address");
    let (begun, mut handshakes) = (Arc::new(AtomicUsize::new(0)), mpsc::unbounded_channel());
    let (accepting, counted) = (listener.clone(), begun.clone());
    tokio::spawn(async move {
        while let Some(arrival) = accepting.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let done = handshakes.0.clone();
            tokio::spawn(async move { done.send(arrival.handshake().await) });
        }
    });
    let strangers = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    let knock = async || {
        for (sent, flight) in (1..).zip(&flights) {
            strangers.send_to(flight, addr).await.expect("sent");
            if sent % 50 == 0 {
                // Where none is answered the rest is lost in the socket.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    knock().await;
    let (_connection, mut ask) = source
        .connector(patient())
        .connect(addr)
        .await
        .expect("a trusted host gets in");
    ask.send(Commit {}).await.expect("sent");
    let (_connection, mut answer) = handshakes.1.recv().await.expect("one").expect("trusted");
    assert_eq!(
        answer.receive().await.expect("received"),
        Some(Message::Commit(Commit {}))
    );
    knock().await;
    // Those that were listened to from the start, and the trusted one.
    let begun = begun.load(Ordering::Relaxed);
    assert!(begun <= 8 + 1, "{begun} handshakes were begun");
}

#[tokio::test]
async fn hosts_without_a_common_version_tell_each_other_what_they_speak() {
    let (source, target) = two_hosts();
    let newer = Settings {
        versions: vec![Version(9), Version(8)],
        ..patient()
    };
    let told = tokio::time::timeout(PATIENCE, meet(&source, &target, newer, patient())).await;
    let (from, to) = told.expect("not by timeout");
    match from {
        Err(TransportError::VersionMismatch { ours, theirs }) => {
            assert_eq!(ours, [Version(9), Version(8)]);
            assert_eq!(theirs, Version::SUPPORTED);
        }
        other => panic!("the source said {:?}", other.err()),
    }
    match to {
        Err(TransportError::VersionMismatch { ours, theirs }) => {
            assert_eq!(ours, Version::SUPPORTED);
            assert_eq!(theirs, [Version(9), Version(8)]);
        }
        other => panic!("the agent said {:?}", other.err()),
    }
}

#[tokio::test]
async fn an_address_where_nobody_listens_is_unreachable() {
    let (source, _) = two_hosts();
    let free = std::net::UdpSocket::bind("127.0.0.1:0").expect("binds");
    let addr = free.local_addr().expect("has an address");
    let connector = source.connector(Settings {
        connect_timeout: Duration::from_millis(300),
        ..Settings::default()
    });
    match connector.connect(addr).await {
        Err(TransportError::Unreachable { peer }) => assert_eq!(peer, addr),
        other => panic!("connected or said {:?}", other.err()),
    }
}

#[tokio::test]
async fn frames_keep_their_order_and_their_content() {
    let (source, target) = two_hosts();
    let ((from, _ask), (to, _answer)) = connected(&source, &target).await;
    let mut sender = from.open_pages(7).await.expect("opens");
    for (first, codec) in [(0, Codec::None), (300, Codec::Lz4), (600, Codec::Zstd)] {
        let frame = frame(first, first as u8, 256, codec);
        sender.send(frame).await.expect("sent");
    }
    sender.finish().expect("finished once");
    let mut receiver = to.accept_pages().await.expect("accepts");
    assert_eq!(receiver.index(), 7);
    let mut scratch = Scratch::new();
    for first in [0, 300, 600] {
        let frame = receiver
            .receive()
            .await
            .expect("received")
            .expect("a frame");
        assert_eq!(frame.runs(), [data_run(first, 256)]);
        let raw = frame.raw(&mut scratch).expect("verifies");
        assert!(raw.len() == 1 << 20 && raw.iter().all(|&b| b == first as u8));
    }
    assert!(receiver.receive().await.expect("a clean end").is_none());
    assert_eq!(receiver.frames(), sender.frames());
}

#[tokio::test]
async fn garbage_on_a_page_stream_is_an_error_for_its_reader() {
    let (source, target) = two_hosts();
    let ((from, _ask), (to, _answer)) = connected(&source, &target).await;
    let mut sender = from.open_pages(0).await.expect("opens");
    let mut lying = frame(0, 1, 1, Codec::None);
    lying.payload = lying.payload.slice(1..);
    sender.send(lying).await.expect("sent");
    sender.finish().expect("finished once");
    let mut receiver = to.accept_pages().await.expect("accepts");
    assert!(matches!(
        receiver.receive().await,
        Err(TransportError::Truncated(_))
    ));
}

#[tokio::test]
async fn a_two_way_stream_carries_another_rooms_bytes_in_both_directions() {
    let (source, target) = two_hosts();
    let ((from, _ask), (to, _answer)) = connected(&source, &target).await;
    let mut byte = [0];
    for (kind, index) in [(TwoWay::Rootfs, 0), (TwoWay::Faults, 515)] {
        let (mut send, mut receive) = from.open_stream(kind, index).await.expect("opens");
        send.write_all(b"?").await.expect("written");
        let (arrived, mut answer, mut ask) = to.accept_stream(kind).await.expect("accepts");
        assert_eq!(arrived, index);
        ask.read_exact(&mut byte).await.expect("read");
        assert_eq!(&byte, b"?");
        answer.write_all(b"!").await.expect("written");
        receive.read_exact(&mut byte).await.expect("read");
        assert_eq!(&byte, b"!");
    }
}

#[tokio::test]
async fn files_arrive_whole_and_large_ones_are_refused() {
    let (source, target) = two_hosts();
    let ((from, _ask), (to, _answer)) = connected(&source, &target).await;
    let large: Bytes = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    let header = |name: &str, size: usize| FileHeader {
        name: name.parse().expect("a name"),
        mode: 0o600,
        size: size as u64,
    };
    let mut sender = from.open_files(0).await.expect("opens");
    let content = large.clone();
    let sending = tokio::spawn(async move {
        for (name, content) in [
            ("empty", Bytes::new()),
            ("pages-1.img", content.clone()),
            ("large", content),
        ] {
            sender
                .send_bytes(&header(name, content.len()), content)
                .await?;
        }
        sender.finish()?;
        Ok::<_, TransportError>(())
    });
    let mut receiver = to.accept_files().await.expect("accepts");
    let file = receiver.receive().await.expect("received").expect("a file");
    assert_eq!(file.header(), &header("empty", 0));
    assert_eq!(file.into_bytes(0).await.expect("verifies"), b"");
    let file = receiver.receive().await.expect("received").expect("a file");
    assert_eq!(file.header().name.as_str(), "pages-1.img");
    assert_eq!(file.into_bytes(4_000_000).await.expect("verifies"), large);
    let file = receiver.receive().await.expect("received").expect("a file");
    assert!(matches!(
        file.into_bytes(3_999_999).await,
        Err(TransportError::FileTooLarge { .. })
    ));
    assert!(
        receiver.receive().await.is_err(),
        "content that was not taken is not read as a header"
    );
    drop(receiver);
    // The content that nobody took fits the windows, so the sender may or may not notice; it must end.
    let _ = sending.await.expect("ends");
}

#[tokio::test]
async fn a_file_that_shrinks_while_it_is_sent_is_noticed() {
    let (source, target) = two_hosts();
    let ((from, _ask), (_to, _answer)) = connected(&source, &target).await;
    let mut sender = from.open_files(0).await.expect("opens");
    let file = FileHeader {
        name: "log".parse().expect("a name"),
        mode: 0o644,
        size: 10,
    };
    assert!(matches!(
        sender.send(&file, &b"short"[..]).await,
        Err(TransportError::Shrunk { .. })
    ));
}

#[tokio::test]
async fn a_message_that_was_cancelled_half_way_is_received_whole_later() {
    let (source, target) = two_hosts();
    let ((_from, mut ask), (_to, mut answer)) = connected(&source, &target).await;
    let round = RoundEnd {
        round: 1,
        pages: 2,
        frames_per_stream: vec![3; 64],
    };
    let sent = round.clone();
    let sending = tokio::spawn(async move {
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            ask.send(sent.clone()).await.expect("sent");
        }
        ask
    });
    let mut received = 0;
    while received < 50 {
        let waited = tokio::time::timeout(Duration::from_micros(300), answer.receive()).await;
        if let Ok(message) = waited {
            assert_eq!(message.expect("received"), Some(round.clone().into()));
            received += 1;
        }
    }
    drop(sending.await.expect("ends"));
}

#[tokio::test]
async fn a_dropped_connection_is_told_to_the_peer() {
    let (source, target) = two_hosts();
    let (from, to) = meet(&source, &target, patient(), patient()).await;
    let ((from, ask), (to, mut answer)) = (from.expect("connects"), to.expect("accepts"));
    drop(ask);
    drop(from);
    let told = async {
        assert!(matches!(
            answer.receive().await,
            Err(TransportError::ClosedByPeer(PeerError::Internal)) | Ok(None)
        ));
        to.closed().await
    };
    let told = tokio::time::timeout(PATIENCE, told).await;
    told.expect("not by timeout");
}

#[tokio::test]
async fn the_bandwidth_limit_holds() {
    let (source, target) = two_hosts();
    let limited = Settings {
        bandwidth_limit: NonZeroU64::new(20 << 20),
        ..Settings::default()
    };
    let (from, to) = meet(&source, &target, limited, Settings::default()).await;
    let ((from, _ask), (to, _answer)) = (from.expect("connects"), to.expect("accepts"));
    let reading = tokio::spawn(async move {
        let mut receiver = to.accept_pages().await?;
        while receiver.receive().await?.is_some() {}
        Ok::<_, TransportError>(())
    });
    let start = Instant::now();
    let mut sender = from.open_pages(0).await.expect("opens");
    for i in 0..10 {
        sender
            .send(frame(i * 256, 1, 256, Codec::None))
            .await
            .expect("sent");
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(450), "10 MiB in {took:?}");
    let sample = from.link_sample().expect("the link was the bottleneck");
    let rate = sample.bytes as f64 / sample.time.as_secs_f64();
    assert!(rate < 25e6, "the limit is what the link gives: {rate}");
    sender.finish().expect("finished once");
    reading.await.expect("ends").expect("reads all");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_is_held_up_by_a_slow_reader_and_told_when_it_leaves() {
    let (source, target) = two_hosts();
    let ((from, _ask), (to, _answer)) = connected(&source, &target).await;
    let mut queue = from.open_pages(0).await.expect("opens").into_queue(2);
    let inbox = to.accept_pages().await.expect("accepts").into_inbox(2);
    let (told, sent) = std::sync::mpsc::channel();
    let sending = std::thread::spawn(move || {
        loop {
            match queue.send(frame(0, 1, 256, Codec::None)) {
                Ok(()) => told.send(queue.frames()).expect("somebody counts"),
                Err(error) => return error,
            }
        }
    });
    // Nobody reads: what fits in the queues and QUIC's windows is taken, then the sender blocks.
    let mut frames = 0;
    let silence = |frames| match frames {
        0..2 => PATIENCE,
        _ => Duration::from_secs(1),
    };
    while let Ok(count) = sent.recv_timeout(silence(frames)) {
        frames = count;
    }
    assert!((2..=128).contains(&frames), "{frames} MiB are on the way");
    assert!(!sending.is_finished());
    drop(inbox);
    let error = sending.join().expect("ends");
    assert!(
        matches!(error, TransportError::StreamGivenUp(PeerError::Cancelled)),
        "{error}"
    );
}

/// A UDP relay that can be cut, like a cable.
struct Cable {
    addr: SocketAddr,
    relay: tokio::task::JoinHandle<()>,
}

impl Cable {
    async fn to(target: SocketAddr) -> Cable {
        let near = tokio::net::UdpSocket::bind("127.0.0.1:0")
            .await
            .expect("binds");
        let far = tokio::net::UdpSocket::bind("127.0.0.1:0")
            .await
            .expect("binds");
        let addr = near.local_addr().expect("has an address");
        let relay = tokio::spawn(async move {
            let (mut there, mut back) = (vec![0; 65_536], vec![0; 65_536]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((len, from)) = near.recv_from(&mut there) => {
                        client = Some(from);
                        let _ = far.send_to(&there[..len], target).await;
                    }
                    Ok((len, _)) = far.recv_from(&mut back) => {
                        if let Some(client) = client {
                            let _ = near.send_to(&back[..len], client).await;
                        }
                    }
                }
            }
        });
        Cable { addr, relay }
    }

    async fn cut(self) {
        self.relay.abort();
        let _ = self.relay.await;
    }
}

#[tokio::test]
async fn a_cut_link_is_noticed_by_both_sides_within_the_idle_timeout() {
    let (source, target) = two_hosts();
    // Long enough for a host that has other things to do, and stands still for a while.
    let settings = Settings {
        idle_timeout: Duration::from_secs(6),
        keep_alive: Duration::from_secs(1),
        ..Settings::default()
    };
    let idle_timeout = settings.idle_timeout;
    let listener = target.listener(settings.clone());
    let cable = Cable::to(listener.local_addr().expect("has an address")).await;
    let connector = source.connector(settings);
    let accepted = async {
        let arrival = listener.accept().await.expect("somebody knocks");
        arrival.handshake().await
    };
    let (from, to) = tokio::join!(connector.connect(cable.addr), accepted);
    let ((from, mut ask), (_to, mut answer)) = (from.expect("connects"), to.expect("accepts"));
    // Longer than the idle timeout: signs of life keep an idle connection open.
    tokio::time::sleep(idle_timeout * 5 / 4).await;
    assert!(from.close_reason().is_none(), "idle is not dead");

    cable.cut().await;
    let both = async { tokio::join!(ask.receive(), answer.receive()) };
    let noticed = tokio::time::timeout(PATIENCE, both).await;
    let (asked, answered) = noticed.expect("noticed");
    assert!(matches!(asked, Err(TransportError::TimedOut)), "{asked:?}");
    assert!(
        matches!(answered, Err(TransportError::TimedOut)),
        "{answered:?}"
    );
    let late = ask.send(RoundReceived { round: 1 }).await;
    assert!(matches!(late, Err(TransportError::TimedOut)));
}

/// Moves `mebibytes` over `streams` page streams between threads, as the engine does, and prints the rate.
fn throughput(
    name: &str,
    streams: u16,
    mebibytes: u64,
    codec: Codec,
    content: fn(usize) -> Vec<u8>,
) {
    let (source, target) = two_hosts();
    let (near, far) = (
        TransportThread::spawn("near").expect("a thread"),
        TransportThread::spawn("far").expect("a thread"),
    );
    let (told, addr) = std::sync::mpsc::channel();
    let accepting = far.run(async move {
        let listener = target.listener(Settings::default());
        told.send(listener.local_addr().expect("has an address"))
            .expect("somebody listens");
        let arrival = listener.accept().await.expect("somebody knocks");
        let (to, control) = arrival.handshake().await.expect("accepts");
        let mut inboxes = Vec::new();
        for _ in 0..streams {
            inboxes.push(to.accept_pages().await.expect("accepts").into_inbox(2));
        }
        (to, control, inboxes)
    });
    let addr = addr.recv().expect("listens");
    let connecting = near.run(async move {
        let connector = source.connector(Settings::default());
        let (from, control) = connector.connect(addr).await.expect("connects");
        let mut queues = Vec::new();
        for index in 0..streams {
            queues.push(from.open_pages(index).await.expect("opens").into_queue(2));
        }
        (from, control, queues)
    });
    let (from, _ask, queues) = near.handle().block_on(connecting).expect("connects");
    let (_to, _answer, inboxes) = far.handle().block_on(accepting).expect("accepts");

    let start = Instant::now();
    let per_stream = mebibytes / u64::from(streams);
    let received: u64 = std::thread::scope(|scope| {
        let placing: Vec<_> = inboxes
            .into_iter()
            .map(|mut inbox| {
                scope.spawn(move || {
                    let mut scratch = Scratch::new();
                    let mut pages = 0;
                    while let Some(frame) = inbox.receive().expect("received") {
                        frame.raw(&mut scratch).expect("verifies");
                        pages += frame.pages();
                    }
                    pages
                })
            })
            .collect();
        for mut queue in queues {
            scope.spawn(move || {
                let mut encoder = FrameEncoder::new();
                let raw = Bytes::from(content(1 << 20));
                for i in 0..per_stream {
                    let frame = encoder
                        .encode(SpaceId(0), &[data_run(i * 256, 256)], raw.clone(), codec)
                        .expect("encodes");
                    queue.send(frame).expect("sent");
                }
                assert_eq!(queue.finish().expect("all taken"), per_stream);
            });
        }
        placing.into_iter().map(|t| t.join().expect("ends")).sum()
    });
    let took = start.elapsed().as_secs_f64();
    assert_eq!(received, per_stream * u64::from(streams) * 256);
    let stats = from.stats();
    println!(
        "{name}: {streams} streams, {codec}: {:.2} GB/s raw, {:.2} GB/s on the wire, packets of {} bytes, rtt {:?}, {} lost",
        (received * PAGE_SIZE) as f64 / took / 1e9,
        stats.sent_bytes as f64 / took / 1e9,
        stats.packet_bytes,
        stats.rtt,
        stats.lost_packets,
    );
    near.handle().block_on(from.close_and_wait(PeerError::Done));
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..len / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

fn text(len: usize) -> Vec<u8> {
    b"a key and its value; "
        .iter()
        .copied()
        .cycle()
        .take(len)
        .collect()
}

#[test]
fn every_page_crosses_between_threads_at_a_rate_worth_printing() {
    throughput("noise", 1, 1024, Codec::None, noise);
    throughput("noise", 4, 1024, Codec::None, noise);
    throughput("text", 4, 1024, Codec::Lz4, text);
}
