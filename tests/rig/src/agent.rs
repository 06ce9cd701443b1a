//! Starting what a migration needs at its ends: trust between two hosts, and the agent at the target.

use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::host::Host;
use crate::listening::{Protocol, listens};
use crate::running::Running;

/// The port agents listen on.
const PORT: u16 = 7070;

/// How long an agent may take until it listens.
const STARTED: Duration = Duration::from_secs(180);

/// Makes two hosts trust each other: what an administrator does once with `migrate identity` and `migrate trust add`.
pub fn introduce(a: &Host, b: &Host) -> Result<()> {
    for (host, peer) in [(a, b), (b, a)] {
        trust(host, peer.name(), &fingerprint(peer)?)?;
    }
    Ok(())
}

/// A host's fingerprint; its identity is made if it has none.
pub fn fingerprint(host: &Host) -> Result<String> {
    let said = host.run("migrate", ["identity"])?;
    said.split_whitespace()
        .find(|word| word.starts_with("sha256:"))
        .map(str::to_string)
        .with_context(|| format!("no fingerprint in what `migrate identity` says: {said}"))
}

/// Makes a host trust a peer.
pub fn trust(host: &Host, name: &str, fingerprint: &str) -> Result<()> {
    host.run("migrate", ["trust", "add", name, fingerprint])
        .map(drop)
}

/// Starts `migrate agent` on a host with further arguments, and returns it with its address when it listens there.
pub fn start_agent(
    host: &Host,
    address: std::net::Ipv4Addr,
    arguments: &[&str],
) -> Result<(Running, SocketAddrV4)> {
    let address = SocketAddrV4::new(address, PORT);
    let listen = address.to_string();
    let mut agent = host.spawn(
        "migrate",
        [&["agent", "--listen", &listen], arguments].concat(),
    )?;
    // Asked of the kernel and not of the agent's log: how that is worded is its own affair.
    let deadline = std::time::Instant::now() + STARTED;
    while !listens(host.pid(), Protocol::Udp, address)? {
        anyhow::ensure!(
            agent.is_alive()?,
            "the agent ended at its start:\n{}",
            agent.output()?
        );
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "the agent does not listen on {address}:\n{}",
            agent.output()?
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((agent, address))
}
