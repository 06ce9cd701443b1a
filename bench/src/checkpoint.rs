//! The baseline: `runc checkpoint`, the images over plain TCP, `runc restore`.
//!
//! As fast as it can be had without changing either program: the images are in memory and not on disk, nothing is
//! compressed or encrypted, and the root filesystem is at the target already but for the log written meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::{Container, Running, checkpoint, copy_container_files, restore};

use crate::measure::{Downtime, Site};

/// On tmpfs: the speed of this machine's disk is not what is measured.
pub const IMAGES: &str = "/run/images";
const PORT: u16 = 7071;
/// How long a step may take.
pub const LIMIT: Duration = Duration::from_secs(300);

/// Copies the bundle, and waits at the target for the images.
pub fn prepare(site: &Site, container: &Container) -> Result<(Running, SocketAddrV4)> {
    std::fs::create_dir_all(site.source.path(IMAGES))?;
    copy_container_files(site.source, site.target, container, IMAGES)?;
    receiver(site, PORT)
}

/// Waits at the target for one [`send`].
pub fn receiver(site: &Site, port: u16) -> Result<(Running, SocketAddrV4)> {
    let address = SocketAddrV4::new(site.link.second(), port);
    let bench = std::env::current_exe()?;
    let arguments = ["part", "tree-receive", &address.to_string()];
    let mut receiver = site.target.spawn(&bench.to_string_lossy(), arguments)?;
    receiver.wait_for("listening", LIMIT)?;
    Ok((receiver, address))
}

/// Stops, copies, starts.
pub fn finish(
    site: &Site,
    container: &Container,
    receiver: &(Running, SocketAddrV4),
) -> Result<Option<Downtime>> {
    checkpoint(site.source, container, IMAGES)?;
    let log = format!("/srv/{}/rootfs/log", container.id());
    send(site, receiver, &[IMAGES, &log])?;
    restore(site.target, container, IMAGES)?;
    Ok(None)
}

/// Copies directories of the source to the waiting target.
pub fn send(site: &Site, receiver: &(Running, SocketAddrV4), directories: &[&str]) -> Result<()> {
    let bench = std::env::current_exe()?;
    let address = receiver.1.to_string();
    let arguments = [&["part", "tree-send", &address], directories].concat();
    let sent = site.source.run(&bench.to_string_lossy(), arguments);
    sent.map(drop).with_context(|| {
        format!(
            "the receiver said: {}",
            receiver.0.output().unwrap_or_default()
        )
    })
}

/// Packs directories and sends them; returns when the other end has unpacked all.
pub fn send_tree(to: SocketAddrV4, directories: &[PathBuf]) -> Result<()> {
    let mut connection = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
    let mut tar = Command::new("tar");
    tar.args(["--create", "--file=-", "--absolute-names"])
        .args(directories)
        .stdout(Stdio::piped());
    let mut tar = tar.spawn().context("starting tar")?;
    std::io::copy(
        &mut tar.stdout.take().context("tar has no stdout")?,
        &mut connection,
    )?;
    // 1: a file changed while it was read. It is sent again when the container has stopped.
    ensure!(matches!(tar.wait()?.code(), Some(0 | 1)), "tar failed");
    connection.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer)?;
    ensure!(answer == b"unpacked", "the other end could not unpack");
    Ok(())
}

/// Unpacks what one connection brings.
pub fn receive_tree(listen: SocketAddrV4) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
    println!("listening");
    let (mut connection, _) = listener.accept()?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--file=-", "--absolute-names"])
        .stdin(Stdio::piped());
    let mut tar = tar.spawn().context("starting tar")?;
    let mut stdin = tar.stdin.take().context("tar has no stdin")?;
    match std::io::copy(&mut connection, &mut stdin) {
        // tar does not wait for the padding behind the archive's end.
        Err(why) if why.kind() == ErrorKind::BrokenPipe => {
            std::io::copy(&mut connection, &mut std::io::sink())?;
        }
        copied => drop(copied?),
    }
    drop(stdin);
    ensure!(tar.wait()?.success(), "tar failed");
    connection.write_all(b"unpacked")?;
    Ok(())
}
