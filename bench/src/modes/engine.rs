//! migrate in one of its modes.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use rig::Container;
use serde_json::Value;

use super::{LIMIT, Moved, System};
use crate::engine::Agent;
use crate::measure::Site;

/// Which modes this build of migrate can be asked for.
#[derive(Debug, Clone, Copy)]
pub struct Modes {
    selectable: bool,
}

impl Modes {
    /// Asks the program.
    pub fn of_this_build() -> Result<Modes> {
        let migrate = rig::binary("migrate")?;
        let help = Command::new(&migrate)
            .arg("--help")
            .output()
            .with_context(|| format!("running {}", migrate.display()))?;
        Ok(Modes {
            selectable: String::from_utf8_lossy(&help.stdout).contains("--mode"),
        })
    }

    /// Whether modes can be chosen at all.
    pub fn are_selectable(self) -> bool {
        self.selectable
    }

    /// Whether a system can be measured: without a choice of modes migrate does pre-copy.
    pub fn has(self, system: System) -> bool {
        self.selectable || matches!(system, System::PreCopy | System::CriuLazyPages)
    }

    /// The arguments that choose a system's mode.
    pub fn arguments(self, system: System) -> Vec<&'static str> {
        match self.selectable {
            true => vec!["--mode", system.name()],
            false => Vec::new(),
        }
    }
}

/// Moves the container. migrate ends when nothing is left to do at the source, in post-copy after the last page.
pub fn finish(
    site: &Site,
    container: &Container,
    agent: &Agent,
    mode: Vec<&'static str>,
) -> Result<Moved> {
    const REPORT: &str = "/run/report.json";
    let arguments = ["--to", agent.address(), "--report", REPORT];
    let start = Instant::now();
    let mut migrate = site.source.spawn(
        "migrate",
        [&arguments[..], &mode, &[container.id()]].concat(),
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
