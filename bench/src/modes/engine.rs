//! migrate in one of its modes.

use std::time::Instant;

use anyhow::{Context, Result};
use rig::Container;
use serde_json::Value;

use super::{LIMIT, Moved};
use crate::engine::Agent;
use crate::measure::Site;

/// Moves the container. migrate ends when nothing is left to do at the source, in post-copy after the last page.
pub fn finish(
    site: &Site,
    container: &Container,
    agent: &Agent,
    mode: &'static str,
) -> Result<Moved> {
    const REPORT: &str = "/run/report.json";
    let start = Instant::now();
    let mut migrate = site.source.spawn(
        "migrate",
        [
            "--to",
            agent.address(),
            "--mode",
            mode,
            "--report",
            REPORT,
            container.id(),
        ],
    )?;
    let status = migrate.wait(LIMIT)?;
    let total_s = start.elapsed().as_secs_f64();
    anyhow::ensure!(
        status.success(),
        "migrate failed: {status}: {}",
        migrate.output()?.trim()
    );
    let text = std::fs::read(site.source.path(REPORT)).context("reading the report")?;
    let report: Value = serde_json::from_slice(&text).context("parsing the report")?;
    Ok(Moved {
        total_s,
        last_page_s: None,
        report: Some(report),
    })
}
