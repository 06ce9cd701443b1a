//! One of two guests on a wire: moves a container there and back, and lets the workload judge at each end.
//!
//! ```text
//!  first (10.77.0.1)                         second (10.77.0.2)
//!   fingerprint       ◀──── line ────▶        fingerprint
//!   trust, agent      ◀──── line ────▶        trust, agent
//!   container, migrate ────"moved"───▶        runs? verified?
//!   runs? verified?   ◀────"moved"────        migrate
//! ```
//!
//! `tests/kernels.rs` boots both guests with this program. A line on standard output for each move; the exit code says
//! whether all was as expected.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rig::{Container, ContainerOptions, Host, Workload, fingerprint, start_agent, trust};
use serde_json::{Value, json};

const FIRST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PORT: u16 = 7000;

/// Exit code of `migrate` for a move that preflight refused.
const REFUSED: i32 = 3;

/// How long the other guest may take to boot, and then for a step. Guests are emulated, on a machine that may have other things
/// to do.
const PATIENCE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["first", moves @ ..] if !moves.is_empty() => play(true, moves),
        ["second", moves @ ..] if !moves.is_empty() => play(false, moves),
        _ => Err(anyhow::anyhow!(
            "usage: guest-end first|second MOVE..., each MOVE \"moves\" or \"refused\", the same at both ends"
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-end: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn play(first: bool, moves: &[&str]) -> Result<()> {
    let (name, peer_name) = if first {
        ("first", "second")
    } else {
        ("second", "first")
    };
    let (here, there) = if first {
        (FIRST, SECOND)
    } else {
        (SECOND, FIRST)
    };
    let host = Host::new(name)?;
    host.take_interface("eth0", &format!("{here}/24"))?;
    let mut peer = Peer::meet(&host, first)?;

    peer.say(json!({ "fingerprint": fingerprint(&host)? }))?;
    let answer = peer.hear("fingerprint")?;
    trust(&host, peer_name, answer.as_str().context("no fingerprint")?)?;
    let (agent, _) = start_agent(&host, here, &[])?;
    peer.say(json!({ "ready": true }))?;
    peer.hear("ready")?;

    let workload = Workload::redis(16);
    let mut container = Container::from_elsewhere("web", &workload);
    if first {
        container = Container::create(&host, "web", &workload, &ContainerOptions::default())?;
    }
    let mut is_here = first;
    for expected in moves {
        let refused = *expected == "refused";
        let result = if is_here {
            send(&host, &container, there, refused, &mut peer)
        } else {
            receive(&host, &container, refused, &mut peer)
        };
        result.with_context(|| {
            format!(
                "the agent here said\n{}",
                agent.output().unwrap_or_default()
            )
        })?;
        is_here ^= !refused;
    }
    Ok(())
}

/// Moves the container to the other guest and hears what became of it.
fn send(
    host: &Host,
    container: &Container,
    to: Ipv4Addr,
    refused: bool,
    peer: &mut Peer,
) -> Result<()> {
    let report = "/run/report.json";
    let address = format!("{to}:7070");
    let mut moving = host.spawn(
        "migrate",
        ["--to", &address, "--report", report, container.id()],
    )?;
    let status = moving.wait(PATIENCE)?;
    let said = moving.output()?;
    if refused {
        ensure!(
            status.code() == Some(REFUSED),
            "expected a refusal, not {status}\n{said}"
        );
        let verdict = container.verify(host, PATIENCE)?;
        ensure!(verdict.verified, "after the refusal: {verdict:?}");
        println!("refused: {}", said.lines().last().unwrap_or_default());
        return peer.say(json!({ "moved": false }));
    }
    ensure!(status.success(), "{status}\n{said}");
    ensure!(
        container.state(host)?.is_none(),
        "the container is still here\n{said}"
    );
    let report: Value = serde_json::from_slice(&std::fs::read(host.path(report))?)?;
    ensure!(report["dump"] == "skeleton", "{report:#}");
    println!(
        "moved: tracker {}, {} rounds, downtime {:.0} ms, total {:.1} s",
        report["tracker"].as_str().unwrap_or("none"),
        report["rounds"].as_array().map_or(0, Vec::len),
        report["downtime"]["total_ms"].as_f64().unwrap_or(f64::NAN),
        report["total_ms"].as_f64().unwrap_or(f64::NAN) / 1000.0,
    );
    peer.say(json!({ "moved": true }))?;
    let verified = peer.hear("verified")?;
    ensure!(verified == true, "the other guest says {verified}");
    Ok(())
}

/// Waits for the container, and asks it whether all of it has come.
fn receive(host: &Host, container: &Container, refused: bool, peer: &mut Peer) -> Result<()> {
    let moved = peer.hear("moved")?;
    ensure!(
        moved == !refused,
        "the other guest says that moved is {moved}"
    );
    if refused {
        ensure!(
            container.state(host)?.is_none(),
            "something of the refused container is here"
        );
        return Ok(());
    }
    ensure!(
        container.is_running(host)?,
        "the container does not run here"
    );
    let verdict = container.verify(host, PATIENCE)?;
    println!("{verdict:?}");
    peer.say(json!({ "verified": verdict.verified }))?;
    ensure!(verdict.verified, "{verdict:?}");
    Ok(())
}

/// The program in the other guest.
struct Peer {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Peer {
    fn meet(host: &Host, listens: bool) -> Result<Peer> {
        let stream = host.on_its_network(|| {
            if listens {
                let listener = TcpListener::bind((FIRST, PORT)).context("listening")?;
                return Ok(listener.accept().context("waiting for the other guest")?.0);
            }
            let deadline = Instant::now() + PATIENCE;
            loop {
                match TcpStream::connect((FIRST, PORT)) {
                    Ok(stream) => return Ok(stream),
                    Err(error) if Instant::now() > deadline => {
                        return Err(error).context("the other guest does not answer");
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(200)),
                }
            }
        })?;
        stream.set_read_timeout(Some(2 * PATIENCE))?;
        Ok(Peer {
            lines: BufReader::new(stream.try_clone()?),
            stream,
        })
    }

    fn say(&mut self, what: Value) -> Result<()> {
        writeln!(self.stream, "{what}").context("telling the other guest")
    }

    /// The value of the line that must come next.
    fn hear(&mut self, what: &str) -> Result<Value> {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        if read.with_context(|| format!("waiting for \"{what}\" of the other guest"))? == 0 {
            bail!("the other guest is gone instead of saying \"{what}\"");
        }
        let said: Value = serde_json::from_str(&line)?;
        said.get(what)
            .cloned()
            .with_context(|| format!("expected \"{what}\", heard {said}"))
    }
}
