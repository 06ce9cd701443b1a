//! Stock CRIU's post-copy, as fast as it can be had without changing CRIU or runc: images in memory, and all that listens
//! at the target waiting before the clock runs.
//!
//! ```text
//!  source                                      target
//!  tar of bundle and root           ─ files ─▶ tar                       while the container runs
//!  runc checkpoint --lazy-pages                                          it is frozen
//!  tar of images and of the log     ─ files ─▶ tar
//!  serves pages                     ◀─ asks ── criu lazy-pages ◀─ runc restore --lazy-pages      it runs
//! ```

use std::net::SocketAddrV4;
use std::time::Instant;

use anyhow::{Context, Result};
use rig::{Container, Running, checkpoint_lazily, lazy_pages_daemon, restore_lazily};

use super::{LIMIT, Moved};
use crate::checkpoint;
use crate::measure::Site;

const BUNDLE_PORT: u16 = 7071;
const IMAGES_PORT: u16 = 7072;
const PAGES_PORT: u16 = 7073;

const IMAGES: &str = "/run/images";
const WORK: &str = "/run/work";

/// What waits at the target.
pub struct Waiting {
    for_bundle: (Running, SocketAddrV4),
    for_images: (Running, SocketAddrV4),
}

/// Lets what takes files before the freeze and after it wait at the target.
pub fn prepare(site: &Site) -> Result<Waiting> {
    Ok(Waiting {
        for_bundle: checkpoint::receiver(site, BUNDLE_PORT)?,
        for_images: checkpoint::receiver(site, IMAGES_PORT)?,
    })
}

/// Moves the container, and waits for its last page.
pub fn finish(site: &Site, container: &Container, waiting: &Waiting) -> Result<Moved> {
    let start = Instant::now();
    let bundle = format!("/srv/{}", container.id());
    checkpoint::send(site, &waiting.for_bundle, &[&bundle])?;
    let pages = SocketAddrV4::new(site.link.first(), PAGES_PORT);
    let mut dump = checkpoint_lazily(site.source, container, (IMAGES, WORK), pages, LIMIT)?;
    let log = format!("{bundle}/rootfs/log");
    checkpoint::send(site, &waiting.for_images, &[IMAGES, &log])?;
    let mut daemon = lazy_pages_daemon(site.target, (IMAGES, WORK), pages, LIMIT)?;
    restore_lazily(&daemon, container, (IMAGES, WORK))?;
    daemon.wait(LIMIT).context("fetching pages")?;
    let last_page_s = start.elapsed().as_secs_f64();
    dump.wait(LIMIT).context("serving pages")?;
    Ok(Moved {
        total_s: start.elapsed().as_secs_f64(),
        last_page_s: Some(last_page_s),
        report: None,
    })
}
