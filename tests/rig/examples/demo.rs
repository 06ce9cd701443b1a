//! A redis-server with half a gigabyte of data moves from host to host while it is written to. `scripts/demo` runs it.
//!
//! Both hosts are namespaces of this machine with their own network, mounts, cgroups, runtime root and state. Everything
//! goes away when this program ends, however it ends.

use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::{Container, ContainerOptions, Host, Link, Verified, Workload, introduce, start_agent};

const DATA_MIB: u32 = 512;
const VERDICT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("\ndemo: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<()> {
    let start = Instant::now();
    let heading = |what: &str| {
        let at = start.elapsed().as_secs_f64();
        println!("\n\x1b[1m{what}\x1b[0m  \x1b[2m{at:.1} s\x1b[0m")
    };

    heading("Two hosts");
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let link = Link::join(&a, &b)?;
    note(&format!(
        "a ({}) and b ({}): each with its own network, mounts, cgroups and runtime, joined by a cable",
        link.first(),
        link.second()
    ));
    introduce(&a, &b)?;
    note("they know each other's fingerprints: migrate identity, migrate trust add");
    let (agent, address) = start_agent(&b, link.second(), &[])?;
    note(&format!("on b runs: {}", agent.what()));

    heading("A container on a");
    note(&format!(
        "Debian's redis-server; a client beside it writes {DATA_MIB} MiB of records with checksums, then goes on and on"
    ));
    let redis = Container::create(
        &a,
        "redis",
        &Workload::redis(DATA_MIB),
        &ContainerOptions::default(),
    )?;
    let before = redis.verify(&a, VERDICT)?;
    tell(&before);
    ensure!(
        before.verified,
        "redis was not right to begin with: {:?}",
        before.complaints
    );

    heading(&format!("On a: migrate --to {address} redis"));
    let to = address.to_string();
    let moved = a
        .command("migrate")
        .args(["--to", &to, "redis"])
        .stdin(Stdio::null())
        .status()
        .context("starting migrate")?;
    ensure!(
        moved.success(),
        "migrate ended with {moved}; the agent said:\n{}",
        agent.output()?
    );

    heading("Is it right?");
    ensure!(redis.is_running(&b)?, "redis does not run on b");
    ensure!(
        redis.state(&a)?.is_none(),
        "something of redis is still on a"
    );
    note("redis runs on b and nothing of it is left on a; reading back every record");
    let after = redis.verify(&b, VERDICT)?;
    tell(&after);
    ensure!(
        after.verified,
        "redis is not right after the move: {:?}",
        after.complaints
    );
    ensure!(after.seq > before.seq, "the writer stood still");
    for fact in [
        "every record has its checksum".to_string(),
        format!(
            "the sequence went from {} to {} without a gap or a repeat",
            before.seq, after.seq
        ),
        "over one TCP connection that never broke".to_string(),
        format!(
            "for the client it was a pause of {:.0} ms",
            after.longest_gap_ms
        ),
    ] {
        println!("  \x1b[32m✓\x1b[0m {fact}");
    }
    println!();
    Ok(())
}

fn note(what: &str) {
    println!("  {what}");
}

fn tell(verdict: &Verified) {
    note(&format!(
        "{} records, {} wrong; sequence at {}",
        verdict.more["keys"], verdict.errors, verdict.seq
    ));
}
