//! migrate, watched through its events: a phase begins when it says so.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use rig::Container;
use serde_json::Value;

use super::journey::{Journey, Stopwatch};
use crate::engine::Agent;
use crate::measure::Site;

/// Moves the container with a tracker of its choice.
pub fn finish(site: &Site, container: &Container, agent: &Agent, tracker: &str) -> Result<Journey> {
    let messages = site.source.path("/run/migrate.err");
    let mut clock = Stopwatch::start(site)?;
    let mut migrate = site
        .source
        .command("migrate")
        .args(["--to", agent.address(), "--tracker", tracker, "--json"])
        .arg(container.id())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&messages)?)
        .spawn()
        .context("starting migrate")?;
    let mut done = None;
    for line in BufReader::new(migrate.stdout.take().context("migrate has no stdout")?).lines() {
        let line = line?;
        let event: Value =
            serde_json::from_str(&line).with_context(|| format!("migrate wrote {line:?}"))?;
        match event["event"].as_str() {
            Some("round_finished") => clock.round_ends()?,
            Some("done") => done = Some(event),
            _ => {}
        }
    }
    let status = migrate.wait()?;
    let mut journey = clock.stop()?;
    ensure!(
        status.success(),
        "migrate failed: {status}: {}",
        std::fs::read_to_string(&messages)?.trim()
    );
    let done = done.context("migrate ended without an event of that")?;
    journey.reported_downtime = serde_json::from_value(done["report"]["downtime"].clone())
        .context("the downtime in migrate's report")?;
    Ok(journey)
}
