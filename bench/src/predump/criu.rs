//! CRIU's own pre-copy: a pre-dump a round to a page server at the target, then the last dump, then the other images.
//!
//! ```text
//!  source                                      target
//!  tar of bundle and root           ─ files ─▶ tar
//!  runc checkpoint --pre-dump       ─ pages ─▶ criu page-server, images/1
//!  runc checkpoint --pre-dump       ─ pages ─▶ criu page-server, images/2 (parent ../1)
//!  …
//!  runc checkpoint                  ─ pages ─▶ criu page-server, images/n (parent ../n-1)
//!  tar of images/n and of the log   ─ files ─▶ tar, then runc restore from images/n
//! ```
//!
//! The rounds end by the rule of p.haul, the migrator of CRIU's own project (phaul/iters.py): [`Rounds::another`]. Where
//! p.haul left a choice, CRIU is given the faster one: images in memory, and all that listens at the target waiting before
//! the clock runs.

use std::net::SocketAddrV4;

use anyhow::{Context, Result, bail, ensure};
use rig::{Container, Increment, Running, checkpoint_increment, page_server, restore};

use super::journey::{Journey, Stopwatch};
use super::statistics::{self, DumpStatistics};
use crate::checkpoint;
use crate::measure::Site;

/// A page server for each round; rounds by p.haul's rule are fewer.
const SERVERS: usize = MAX_ITERATIONS + 2;

const BUNDLE_PORT: u16 = 7071;
const IMAGES_PORT: u16 = 7072;

/// The first page server's port; the next ones follow.
const FIRST_PORT: u16 = 7080;

/// Pre-dumps after the first at most (`MAX_ITERS_COUNT`).
const MAX_ITERATIONS: usize = 8;

/// As few pages as this are left to the last dump (`MIN_ITER_PAGES_COUNT`).
const FEW_PAGES: u64 = 64;

/// A round that wrote so many percent more pages than the one before is the last (`MAX_ITER_GROW_RATE`).
const MAX_GROWTH_PERCENT: u64 = 10;

/// What waits at the target.
pub struct Waiting {
    servers: Vec<Running>,
    for_bundle: (Running, SocketAddrV4),
    for_images: (Running, SocketAddrV4),
}

/// Lets a page server for each round, and one that takes files before the rounds and one after them, wait at the target.
pub fn prepare(site: &Site) -> Result<Waiting> {
    let for_bundle = checkpoint::receiver(site, BUNDLE_PORT)?;
    let for_images = checkpoint::receiver(site, IMAGES_PORT)?;
    let mut servers = Vec::new();
    for round in 1..=SERVERS {
        servers.push(page_server(
            site.target,
            &images(round),
            parent(round).as_deref(),
            server_address(site, round)?,
        )?);
    }
    Ok(Waiting {
        servers,
        for_bundle,
        for_images,
    })
}

/// Moves the container.
pub fn finish(site: &Site, container: &Container, mut waiting: Waiting) -> Result<Journey> {
    let mut clock = Stopwatch::start(site)?;
    let bundle = format!("/srv/{}", container.id());
    checkpoint::send(site, &waiting.for_bundle, &[&bundle])?;
    let mut rounds = Rounds::default();
    loop {
        let round = rounds.done.len() + 1;
        let statistics =
            dump(site, container, round, false).with_context(|| format!("pre-dump {round}"))?;
        ended_well(&mut waiting.servers[round - 1])?;
        clock.round_ends()?;
        rounds.done.push(statistics);
        if !rounds.another() {
            break;
        }
    }
    let last = rounds.done.len() + 1;
    rounds
        .done
        .push(dump(site, container, last, true).context("the last dump")?);
    ended_well(&mut waiting.servers[last - 1])?;
    let log = format!("{bundle}/rootfs/log");
    checkpoint::send(site, &waiting.for_images, &[&images(last), &log])?;
    restore(site.target, container, &images(last))?;
    let mut journey = clock.stop()?;
    journey.criu_frozen_ms = rounds
        .done
        .iter()
        .map(|dump| f64::from(dump.freezing_time + dump.frozen_time) / 1000.0)
        .collect();
    Ok(journey)
}

/// What the pre-dumps so far came to.
#[derive(Default)]
struct Rounds {
    done: Vec<DumpStatistics>,
}

impl Rounds {
    /// Whether p.haul would pre-dump once more.
    fn another(&self) -> bool {
        let Some(last) = self.done.last() else {
            return true;
        };
        if last.pages_written <= FEW_PAGES || self.done.len() > MAX_ITERATIONS {
            return false;
        }
        let Some(before) = self.done.iter().rev().nth(1) else {
            return true;
        };
        last.pages_written * 100 <= before.pages_written * (100 + MAX_GROWTH_PERCENT)
    }
}

fn dump(site: &Site, container: &Container, round: usize, last: bool) -> Result<DumpStatistics> {
    let work = format!("{}/work-{round}", checkpoint::IMAGES);
    let (images, parent) = (images(round), parent(round));
    let increment = Increment {
        images: &images,
        work: &work,
        parent: parent.as_deref(),
        server: server_address(site, round)?,
        last,
    };
    checkpoint_increment(site.source, container, &increment)?;
    statistics::read(&site.source.path(&work))
}

/// A page server ends with its only connection, when all pages are in its images.
fn ended_well(server: &mut Running) -> Result<()> {
    let status = server.wait(checkpoint::LIMIT)?;
    ensure!(
        status.success(),
        "{} failed: {status}\n{}",
        server.what(),
        server.output()?
    );
    Ok(())
}

fn images(round: usize) -> String {
    format!("{}/{round}", checkpoint::IMAGES)
}

fn parent(round: usize) -> Option<String> {
    (round > 1).then(|| format!("../{}", round - 1))
}

fn server_address(site: &Site, round: usize) -> Result<SocketAddrV4> {
    let Some(port) = u16::try_from(round - 1)
        .ok()
        .and_then(|n| FIRST_PORT.checked_add(n))
    else {
        bail!("no port for round {round}");
    };
    Ok(SocketAddrV4::new(site.link.second(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(pages: &[u64]) -> bool {
        let done = pages.iter().map(|&pages_written| DumpStatistics {
            freezing_time: 0,
            frozen_time: 0,
            pages_written,
        });
        Rounds {
            done: done.collect(),
        }
        .another()
    }

    #[test]
    fn rounds_end_as_in_p_haul() {
        assert!(after(&[]));
        assert!(after(&[32_000]));
        assert!(!after(&[64]));
        assert!(after(&[32_000, 65]));
        assert!(!after(&[32_000, 64]));
        assert!(after(&[1000, 1100]));
        assert!(!after(&[1000, 1101]));
        assert!(after(&[1000; 8]));
        assert!(!after(&[1000; 9]));
    }
}
