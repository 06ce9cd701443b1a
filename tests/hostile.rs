//! A trusted source that breaks the protocol, against a running agent: refused, nothing left, and the agent goes on.
//!
//! Strangers, versions and lengths are tests/transport.rs's, paths are tests/rootfs.rs's. Needs root and CRIU.

mod support {
    pub mod strangers;
}

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use migrate::memory::{PageNumber, PageRange, SpaceId};
use migrate::migration::MigrationId;
use migrate::transport::{
    Connection, Connector, Control, Identity, Settings, TransportThread, TrustStore,
};
use migrate::wire::codec::Codec;
use migrate::wire::message::{
    Arch, Begin, CgroupVersion, CriuVersion, Message, Query, Requirements, RootfsMode, RoundEnd,
    RoundReceived,
};
use migrate::wire::page_frame::{EncodedFrame, FrameEncoder, Run, RunKind};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::strangers::first_flights;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An agent on a port of its own choice, and that address.
fn agent(state: &Path, runtime: &Path) -> Result<(Agent, SocketAddr)> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_migrate"))
        .args([
            "agent",
            "--listen",
            "127.0.0.1:0",
            "--log-format",
            "json",
            "--state-dir",
        ])
        .arg(state)
        .arg("--runtime-root")
        .arg(runtime)
        .stderr(Stdio::piped())
        .spawn()?;
    let mut log = BufReader::new(child.stderr.take().context("no log")?);
    let agent = Agent(child);
    let mut line = String::new();
    while log.read_line(&mut line)? > 0 {
        let said: serde_json::Value = serde_json::from_str(&line)?;
        if let Some(address) = said
            .pointer("/fields/address")
            .and_then(|address| address.as_str())
        {
            let address = address.parse()?;
            std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
            return Ok((agent, address));
        }
        line.clear();
    }
    bail!("the agent does not listen: it needs root and CRIU (scripts/setup)")
}

fn begin(migration: u8) -> Result<Begin> {
    Ok(Begin {
        migration: MigrationId::from_bytes([migration; 16]),
        container: "hostile".parse()?,
        requirements: Requirements {
            memory_bytes: 1 << 20,
            rootfs_bytes: 0,
            cpu_flags: Vec::new(),
            cgroup_version: CgroupVersion::V1,
            memory_limit: None,
            criu_version: CriuVersion(40100),
            arch: Arch::HERE,
            rootfs: RootfsMode::Copied,
            shared_rootfs: None,
            bind_sources: Vec::new(),
            shared: Vec::new(),
            page_streams: 1,
        },
        dry_run: false,
    })
}

fn frame() -> Result<EncodedFrame> {
    let run = Run {
        range: PageRange::from_start_len(PageNumber(16), 1).context("a page")?,
        kind: RunKind::Data,
    };
    let raw = Bytes::from(vec![7; 4096]);
    Ok(FrameEncoder::new().encode(SpaceId(0), &[run], raw, Codec::None)?)
}

/// Sends the frame as the only one of a migration and then, if any, what else there is to say; what the agent answers after
/// it accepted the container.
async fn send(
    connection: &Connection,
    control: &mut Control,
    migration: u8,
    frame: EncodedFrame,
    then: Option<RoundEnd>,
) -> Result<Message> {
    control.send(begin(migration)?).await?;
    match control.receive().await? {
        Some(Message::Accepted(_)) => {}
        other => bail!("not accepted: {other:?}"),
    }
    let mut pages = connection.open_pages(0).await?;
    pages.send(frame).await?;
    if let Some(end) = then {
        control.send(end).await?;
    }
    let answer = tokio::time::timeout(PATIENCE, control.receive());
    answer
        .await
        .context("no answer: the frame was taken for a good one")??
        .context("the agent says nothing")
}

#[test]
fn a_source_whose_pages_lie_is_rolled_back_and_leaves_nothing() -> Result<()> {
    let (target, source, runtime) = (
        tempfile::tempdir()?,
        tempfile::tempdir()?,
        tempfile::tempdir()?,
    );
    let identity = Arc::new(Identity::load_or_create(source.path())?);
    let theirs = Identity::load_or_create(target.path())?;
    TrustStore::in_dir(target.path()).add("source".parse()?, identity.fingerprint())?;
    TrustStore::in_dir(source.path()).add("target".parse()?, theirs.fingerprint())?;
    let (_agent, address) = agent(target.path(), runtime.path())?;

    let changed = |change: fn(&mut Vec<u8>)| -> Result<EncodedFrame> {
        let frame = frame()?;
        let mut head = frame.head.to_vec();
        change(&mut head);
        Ok(EncodedFrame {
            head: head.into(),
            ..frame
        })
    };
    // The run's first page is at the end of the head, before its length and kind; the lengths and the hash before that.
    let lies = [
        (
            "an address above every user address",
            changed(|head| {
                let at = head.len() - 16;
                head[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            })?,
        ),
        (
            "another page than was hashed",
            changed(|head| {
                let at = head.len() - 16;
                head[at] ^= 1;
            })?,
        ),
        (
            "more pages than there are",
            changed(|head| {
                let at = head.len() - 8;
                head[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            })?,
        ),
        ("no frame at all", changed(|head| head[0] ^= 0xff)?),
    ];
    let thread = TransportThread::spawn("hostile")?;
    for (migration, (lie, frame)) in (1..).zip(lies) {
        let connector = Connector::new(
            identity.clone(),
            TrustStore::in_dir(source.path()),
            Settings::default(),
        );
        let answer = thread.run(async move {
            let (connection, mut control) = connector.connect(address).await?;
            send(&connection, &mut control, migration, frame, None).await
        });
        let answer = thread
            .handle()
            .block_on(answer)?
            .with_context(|| lie.to_owned())?;
        assert!(
            matches!(answer, Message::RolledBack(_)),
            "{lie}: {answer:?}"
        );
        for left in ["containers", "work"] {
            let directory = target.path().join(left);
            let entries = || std::fs::read_dir(&directory).map_or(0, Iterator::count);
            let deadline = Instant::now() + PATIENCE;
            while entries() != 0 {
                assert!(
                    Instant::now() < deadline,
                    "{lie}: something is left in {}",
                    directory.display()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        assert_eq!(
            std::fs::read_dir(runtime.path())?.count(),
            0,
            "{lie}: the runtime knows something"
        );
    }
    // What is true is taken, and the agent is as it was.
    let connector = Connector::new(
        identity,
        TrustStore::in_dir(source.path()),
        Settings::default(),
    );
    let truth = frame()?;
    let end = RoundEnd {
        round: 1,
        pages: 1,
        frames_per_stream: vec![1],
    };
    let taken = thread.run(async move {
        let (connection, mut control) = connector.connect(address).await?;
        send(&connection, &mut control, 100, truth, Some(end)).await
    });
    let taken = thread.handle().block_on(taken)??;
    assert!(
        matches!(taken, Message::RoundReceived(RoundReceived { round: 1 })),
        "{taken:?}"
    );
    Ok(())
}

/// An agent, and a host that it trusts.
struct Scene {
    agent: Agent,
    address: SocketAddr,
    identity: Arc<Identity>,
    source: tempfile::TempDir,
    _target: [tempfile::TempDir; 2],
}

impl Scene {
    fn new() -> Result<Scene> {
        let [target, source, runtime] = [(); 3].map(|()| tempfile::tempdir());
        let (target, source, runtime) = (target?, source?, runtime?);
        let identity = Arc::new(Identity::load_or_create(source.path())?);
        let theirs = Identity::load_or_create(target.path())?;
        TrustStore::in_dir(target.path()).add("source".parse()?, identity.fingerprint())?;
        TrustStore::in_dir(source.path()).add("target".parse()?, theirs.fingerprint())?;
        let (agent, address) = agent(target.path(), runtime.path())?;
        Ok(Scene {
            agent,
            address,
            identity,
            source,
            _target: [target, runtime],
        })
    }

    fn connector(&self) -> Connector {
        let trust = TrustStore::in_dir(self.source.path());
        let settings = Settings {
            connect_timeout: PATIENCE,
            ..Settings::default()
        };
        Connector::new(self.identity.clone(), trust, settings)
    }

    /// The agent's memory, in KiB.
    fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.agent.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let words = line.context("no VmRSS")?.split_whitespace().next();
        Ok(words.context("no figure")?.parse()?)
    }
}

/// Asks what became of a migration that never was.
async fn ask(connector: &Connector, address: SocketAddr) -> Result<Message> {
    let (_connection, mut control) = connector.connect(address).await?;
    let migration = MigrationId::from_bytes([9; 16]);
    control.send(Query { migration }).await?;
    let answer = tokio::time::timeout(PATIENCE, control.receive()).await??;
    answer.context("the agent says nothing")
}

/// Sends first flights at `rate` a second, for at least `lasting` and until all are sent, and asks meanwhile: how many were sent,
/// how often an answer came, and the longest time to one.
async fn flood(
    scene: &Scene,
    flights: Vec<Vec<u8>>,
    rate: u32,
    lasting: Duration,
) -> Result<(usize, usize, Duration)> {
    let (address, connector) = (scene.address, scene.connector());
    let (over, mut is_over) = tokio::sync::watch::channel(false);
    let asking = tokio::spawn(async move {
        let (mut answers, mut longest) = (0, Duration::ZERO);
        loop {
            let asked = Instant::now();
            let answer = ask(&connector, address).await?;
            anyhow::ensure!(matches!(answer, Message::Outcome(_)), "{answer:?}");
            (answers, longest) = (answers + 1, longest.max(asked.elapsed()));
            if *is_over.borrow_and_update() {
                return anyhow::Ok((answers, longest));
            }
        }
    });
    // Of a thread of its own, with a new sender for each, as if they were many hosts.
    let sending = tokio::task::spawn_blocking(move || -> Result<usize> {
        let (start, mut sent) = (Instant::now(), 0);
        while sent < flights.len() || start.elapsed() < lasting {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
            socket.send_to(&flights[sent % flights.len()], address)?;
            sent += 1;
            let due = start + Duration::from_secs(1) * u32::try_from(sent)? / rate;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        Ok(sent)
    });
    let sent = sending.await??;
    over.send_replace(true);
    let (answers, longest) = asking.await??;
    Ok((sent, answers, longest))
}

#[test]
fn a_flood_of_strangers_costs_next_to_no_memory_and_a_trusted_host_is_answered() -> Result<()> {
    let scene = Scene::new()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let flights = runtime.block_on(first_flights(3000));
    runtime.block_on(ask(&scene.connector(), scene.address))?;
    let before = scene.resident()?;
    let (sent, answers, longest) =
        runtime.block_on(flood(&scene, flights, 10_000, Duration::ZERO))?;
    let grown = scene.resident()?.saturating_sub(before);
    println!("{sent} strangers: {grown} KiB more; {answers} answers, after {longest:?} at most");
    assert!(grown < 64 << 10, "{sent} strangers cost {grown} KiB");
    Ok(())
}

/// The figures of docs/strangers.md: cargo test --release --features measure --test hostile -- --nocapture measured
#[test]
#[cfg(feature = "measure")]
fn measured_under_ten_thousand_first_flights_a_second() -> Result<()> {
    let scene = Scene::new()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let flights = runtime.block_on(first_flights(10_000));
    for rate in [0, 1_000, 10_000] {
        let before = scene.resident()?;
        let flights = match rate {
            0 => Vec::new(),
            _ => flights.clone(),
        };
        let (sent, answers, longest) = match rate {
            0 => {
                let asked = Instant::now();
                runtime.block_on(ask(&scene.connector(), scene.address))?;
                (0, 1, asked.elapsed())
            }
            rate => runtime.block_on(flood(&scene, flights, rate, Duration::from_secs(10)))?,
        };
        let now = scene.resident()?;
        println!(
            "{rate} a second: {sent} sent; memory {before} → {now} KiB; {answers} answers, the last to come after {longest:?}"
        );
    }
    Ok(())
}
