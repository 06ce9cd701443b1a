//! A trusted source that breaks the protocol, against a running agent: refused, nothing left, and the agent goes on.
//!
//! Strangers, versions and lengths are tests/transport.rs's, paths are tests/rootfs.rs's. Needs root and CRIU.

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use migrate::memory::{PageNumber, PageRange, SpaceId};
use migrate::migration::MigrationId;
use migrate::transport::{
    Connection, Connector, Control, Identity, Settings, TransportThread, TrustStore,
};
use migrate::wire::codec::Codec;
use migrate::wire::message::{
    Arch, Begin, CgroupVersion, CriuVersion, Message, Requirements, RootfsMode, RoundEnd,
    RoundReceived,
};
use migrate::wire::page_frame::{EncodedFrame, FrameEncoder, Run, RunKind};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

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
