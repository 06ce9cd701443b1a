//! migrate itself: agent and trust beforehand, then one command.

use anyhow::{Context, Result};
use rig::{Container, Running, introduce, start_agent};
use serde::Deserialize;

use crate::measure::{Downtime, Site};

/// What is wanted of a report.
#[derive(Deserialize)]
struct Report {
    downtime: Option<Downtime>,
}

/// What has to stay alive until the container has moved, and where the agent listens.
pub struct Agent {
    _running: Running,
    address: String,
}

/// Lets the hosts trust each other and starts the agent.
pub fn prepare(site: &Site, _container: &Container) -> Result<Agent> {
    introduce(site.source, site.target)?;
    let (running, address) = start_agent(site.target, site.link.second(), &[])?;
    Ok(Agent {
        _running: running,
        address: address.to_string(),
    })
}

impl Agent {
    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// Moves the container. Returns the downtime of the report.
pub fn finish(site: &Site, container: &Container, agent: &Agent) -> Result<Option<Downtime>> {
    let report_file = "/run/report.json";
    site.source.run(
        "migrate",
        [
            "--to",
            &agent.address,
            "--report",
            report_file,
            container.id(),
        ],
    )?;
    let text = std::fs::read(site.source.path(report_file)).context("reading the report")?;
    let report: Report = serde_json::from_slice(&text).context("parsing the report")?;
    Ok(report.downtime)
}
