//! Moving a container with runc and CRIU alone: stop it, copy, start it. What migrate is measured against, and what shows
//! that a test host is host enough.

use std::fs::Permissions;
use std::net::SocketAddrV4;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::container::Container;
use crate::host::Host;
use crate::listening::{Protocol, listens};
use crate::running::Running;

/// How long a page server may take until it listens.
const SERVER_STARTED: Duration = Duration::from_secs(120);

/// Dumps the container to `images` (a directory on the host) and ends it there.
pub fn checkpoint(host: &Host, container: &Container, images: &str) -> Result<()> {
    std::fs::create_dir_all(host.path(images))?;
    let log = format!("{images}/dump.log");
    run_criu(
        host,
        &[
            "checkpoint",
            "--tcp-established",
            "--image-path",
            images,
            "--work-path",
            images,
            container.id(),
        ],
        &log,
    )
}

/// Starts the container from `images` and its bundle `/srv/<id>` on the host.
pub fn restore(host: &Host, container: &Container, images: &str) -> Result<()> {
    let bundle = format!("/srv/{}", container.id());
    let log = format!("{images}/restore.log");
    let arguments = [
        "restore",
        "--detach",
        "--tcp-established",
        "--image-path",
        images,
        "--work-path",
        images,
    ];
    run_criu(
        host,
        &[&arguments[..], &["--bundle", &bundle, container.id()]].concat(),
        &log,
    )
}

/// One step of CRIU's own pre-copy: what changed since the step before it, its pages straight to a page server.
#[derive(Debug, Clone)]
pub struct Increment<'a> {
    /// Directory for the images that are not pages, on the source; its parent is that of the step before, too.
    pub images: &'a str,
    /// Directory for logs and statistics, of this step alone.
    pub work: &'a str,
    /// The directory of the step before, relative to `images`; none for the first.
    pub parent: Option<&'a str>,
    /// Where the [`page_server`] listens.
    pub server: SocketAddrV4,
    /// The container ends with it and all else is dumped too; it goes on otherwise.
    pub last: bool,
}

/// Takes a step: `runc checkpoint`, with `--pre-dump` unless it is the last.
pub fn checkpoint_increment(
    host: &Host,
    container: &Container,
    increment: &Increment,
) -> Result<()> {
    for directory in [increment.images, increment.work] {
        std::fs::create_dir_all(host.path(directory))?;
    }
    let server = increment.server.to_string();
    let mut arguments = vec![
        "checkpoint",
        "--tcp-established",
        "--page-server",
        &server,
        "--image-path",
        increment.images,
        "--work-path",
        increment.work,
    ];
    if !increment.last {
        arguments.push("--pre-dump");
    }
    if let Some(parent) = increment.parent {
        arguments.extend(["--parent-path", parent]);
    }
    arguments.push(container.id());
    let log = format!("{}/dump.log", increment.work);
    run_criu(host, &arguments, &log)
}

/// Starts CRIU's page server on a host, for the pages of one step, and returns it when it listens.
pub fn page_server(
    host: &Host,
    images: &str,
    parent: Option<&str>,
    address: SocketAddrV4,
) -> Result<Running> {
    std::fs::create_dir_all(host.path(images))?;
    let (ip, port) = (address.ip().to_string(), address.port().to_string());
    let mut arguments = vec![
        "page-server",
        "--images-dir",
        images,
        "--address",
        &ip,
        "--port",
        &port,
    ];
    if let Some(parent) = parent {
        arguments.extend(["--prev-images-dir", parent]);
    }
    let mut server = host.spawn("criu", arguments)?;
    let deadline = Instant::now() + SERVER_STARTED;
    while !listens(server.pid(), Protocol::Tcp, address)? {
        ensure!(
            server.is_alive()?,
            "the page server ended at its start:\n{}",
            server.output()?
        );
        ensure!(
            Instant::now() < deadline,
            "the page server does not listen on {address}:\n{}",
            server.output()?
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(server)
}

/// Copies the bundle and a directory of images from host to host through this machine's file system.
pub fn copy_container_files(
    from: &Host,
    to: &Host,
    container: &Container,
    images: &str,
) -> Result<()> {
    for directory in [format!("/srv/{}", container.id()), images.to_string()] {
        let target = to.path(&directory);
        std::fs::create_dir_all(&target)
            .with_context(|| format!("creating {}", target.display()))?;
        let output = Command::new("cp")
            .arg("-aT")
            .arg(from.path(&directory))
            .arg(&target)
            .output()
            .context("running cp")?;
        ensure!(
            output.status.success(),
            "copying {directory}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Brings up the loopback of a container's restored network: runc asks CRIU for an empty one, in which no connection can be
/// restored.
const LOOPBACK_UP: &str = r#"#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" != setup-namespaces ] || nsenter --net --target "$CRTOOLS_INIT_PID" ip link set lo up
"#;

/// Runs runc, and when CRIU fails says what CRIU said.
fn run_criu(host: &Host, arguments: &[&str], log: &str) -> Result<()> {
    let _configured = Configured::new(host)?;
    host.run("runc", arguments)
        .map(drop)
        .map_err(|why| why.context(criu_complaints(host, log)))
}

/// What CRIU complained of in a log of its own.
pub(crate) fn criu_complaints(host: &Host, log: &str) -> String {
    let said = std::fs::read_to_string(host.path(log)).unwrap_or_default();
    let complaints: Vec<_> = said
        .lines()
        .filter(|line| line.contains("Error") || line.contains("Warn"))
        .collect();
    format!("CRIU said:\n{}", complaints.join("\n"))
}

/// CRIU's configuration on a host, there for one call only: a host under test must not be prepared for CRIU in any way.
pub(crate) struct Configured {
    directory: PathBuf,
}

impl Configured {
    pub(crate) fn new(host: &Host) -> Result<Configured> {
        let configured = Configured {
            directory: host.path("/etc/criu"),
        };
        let script = configured.directory.join("loopback-up");
        std::fs::create_dir_all(&configured.directory)?;
        std::fs::write(&script, LOOPBACK_UP)?;
        std::fs::set_permissions(&script, Permissions::from_mode(0o755))?;
        // CRIU's own choice for the lock is iptables, which is slower and not on every machine.
        // Not in runc.conf: there CRIU 4.1 crashes on the lock (see the engine's criu/options.rs).
        let options = "network-lock=nftables\naction-script /etc/criu/loopback-up\n";
        std::fs::write(configured.directory.join("default.conf"), options)?;
        Ok(configured)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // What stays is found by the test that asks for leftovers.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
