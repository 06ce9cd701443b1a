//! Stock post-copy: `runc checkpoint --lazy-pages`, `criu lazy-pages` and `runc restore --lazy-pages`, without the engine.
//!
//! ```text
//!  source                                        target
//!  runc checkpoint --lazy-pages --page-server    │
//!   └ all images but pages, then says "ready"    │
//!                              ── the images ──▶ │ (the caller's work)
//!   serves pages       ◀───── faults, rest ───── criu lazy-pages --page-server ◀─ uffd ─ runc restore --lazy-pages
//!   ends when all have gone                      ends when all have come
//! ```

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::baseline::{Configured, criu_complaints};
use crate::container::Container;
use crate::host::Host;
use crate::running::Running;

/// How often something that is waited for in a hurry is looked at: downtime runs meanwhile.
const LOOK: Duration = Duration::from_millis(1);

/// A dump that serves pages, or the daemon that asks for them. Dropping it kills it.
pub struct LazyEnd<'h> {
    running: Running,
    host: &'h Host,
    log: String,
    _configured: Configured,
    _pipes: Option<LargePipes>,
}

/// Freezes the container, dumps all but its pages to `images` and returns as soon as these are there and pages are served
/// at `serve`, an address of the host. `work` takes the log.
pub fn checkpoint_lazily<'h>(
    host: &'h Host,
    container: &Container,
    (images, work): (&str, &str),
    serve: SocketAddrV4,
    limit: Duration,
) -> Result<LazyEnd<'h>> {
    for directory in [images, work] {
        std::fs::create_dir_all(host.path(directory))?;
    }
    let configured = Configured::new(host)?;
    let pipes = LargePipes::allow()?;
    let serve = serve.to_string();
    // CRIU writes one zero byte to the status descriptor: here runc's standard output, which nothing else is written to.
    let running = host.spawn(
        "runc",
        [
            "checkpoint",
            "--tcp-established",
            "--lazy-pages",
            "--page-server",
            &serve,
            "--status-fd",
            "1",
            "--image-path",
            images,
            "--work-path",
            work,
            container.id(),
        ],
    )?;
    let mut end = LazyEnd {
        running,
        host,
        log: format!("{work}/dump.log"),
        _configured: configured,
        _pipes: Some(pipes),
    };
    end.wait_until(limit, |running| Ok(running.stdout()?.contains('\0')))?;
    Ok(end)
}

/// Starts the daemon that fetches pages from a lazy dump at `serve`, for the container in `images`. It shares `work` with
/// [`restore_lazily`], and ends when the last page is there.
pub fn lazy_pages_daemon<'h>(
    host: &'h Host,
    (images, work): (&str, &str),
    serve: SocketAddrV4,
    limit: Duration,
) -> Result<LazyEnd<'h>> {
    std::fs::create_dir_all(host.path(work))?;
    let configured = Configured::new(host)?;
    let (ip, port) = (serve.ip().to_string(), serve.port().to_string());
    let running = host.spawn(
        "criu",
        [
            "lazy-pages",
            "--page-server",
            "--address",
            &ip,
            "--port",
            &port,
            "--images-dir",
            images,
            "--work-dir",
            work,
            "--log-file",
            "lazy-pages.log",
        ],
    )?;
    let mut end = LazyEnd {
        running,
        host,
        log: format!("{work}/lazy-pages.log"),
        _configured: configured,
        _pipes: None,
    };
    let socket = host.path(work).join("lazy-pages.socket");
    end.wait_until(limit, |_| Ok(socket.exists()))?;
    Ok(end)
}

/// Starts the container from `images`; the daemon, started with the same `work`, gives it its pages. CRIU's configuration
/// is the daemon's.
pub fn restore_lazily(
    daemon: &LazyEnd,
    container: &Container,
    (images, work): (&str, &str),
) -> Result<()> {
    let host = daemon.host;
    let bundle = format!("/srv/{}", container.id());
    let arguments = [
        "restore",
        "--detach",
        "--tcp-established",
        "--lazy-pages",
        "--image-path",
        images,
        "--work-path",
        work,
        "--bundle",
        &bundle,
        container.id(),
    ];
    host.run("runc", arguments).map(drop).map_err(|why| {
        let complaints = criu_complaints(host, &format!("{work}/restore.log"));
        why.context(format!("{complaints}\nand {}", daemon.words("was asked")))
    })
}

impl LazyEnd<'_> {
    /// Waits for its end: all pages have gone over.
    pub fn wait(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while self.running.is_alive()? {
            ensure!(Instant::now() < deadline, "{}", self.words("is not done"));
            std::thread::sleep(LOOK);
        }
        let status = self.running.wait(limit)?;
        ensure!(status.success(), "{}", self.words(&status.to_string()));
        Ok(())
    }

    fn wait_until(
        &mut self,
        limit: Duration,
        reached: impl Fn(&Running) -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !reached(&self.running).context(self.running.what().to_owned())? {
            ensure!(self.running.is_alive()?, "{}", self.words("ended too soon"));
            ensure!(Instant::now() < deadline, "{}", self.words("is not ready"));
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn words(&self, what: &str) -> String {
        format!(
            "{} {what}: {}\n{}",
            self.running.what(),
            self.running.output().unwrap_or_default(),
            criu_complaints(self.host, &self.log)
        )
    }
}

/// Pipes of 4 MiB are allowed to everybody on this machine for as long as this lives.
///
/// CRIU makes one when the first page is asked for (`pipe_read_dest_init` in its page-pipe.c) and does not look whether it
/// could: without CAP_SYS_RESOURCE, which a container host on a virtual machine may lack, it sends no page and fails with
/// "splice: -1: Bad file descriptor".
struct LargePipes {
    before: Option<String>,
}

impl LargePipes {
    const LIMIT: &str = "/proc/sys/fs/pipe-max-size";
    const BYTES: u64 = 4 << 20;

    fn allow() -> Result<LargePipes> {
        let before = std::fs::read_to_string(Self::LIMIT)?;
        if before.trim().parse::<u64>()? >= Self::BYTES {
            return Ok(LargePipes { before: None });
        }
        std::fs::write(Self::LIMIT, Self::BYTES.to_string()).context("allowing large pipes")?;
        Ok(LargePipes {
            before: Some(before),
        })
    }
}

impl Drop for LargePipes {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Larger than before harms nobody.
            let _ = std::fs::write(Self::LIMIT, before);
        }
    }
}
