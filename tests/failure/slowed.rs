//! `--auto-converge`: a container that was slowed has its own CPU quota again, however its migration ends.

use crate::stage::{HASTE, LIMIT, Stage, wait_stopped};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{Host, Running, Workload};
use serde_json::Value;
use std::time::{Duration, Instant};

/// The quota the container has of its own: one and a half processors. v1 writes the first number, v2 both.
const OWN: &str = "150000";

/// A container that rewrites its 16 MiB many times while they cross the link once.
const OPTIONS: [&str; 4] = [
    "--auto-converge",
    "--mode=pre-copy",
    "--bandwidth-limit=10M",
    "--downtime-limit=200",
];

fn stage<'h>(a: &'h Host, b: &'h Host, dirty_mb_s: u32) -> Result<Stage<'h>> {
    let stage = Stage::with_workload(a, b, &Workload::memory_writer(16, dirty_mb_s))?;
    let limit = ["update", "--cpu-period=100000", "--cpu-quota", OWN, "web"];
    a.run("runc", limit)?;
    ensure!(quota(a)? == OWN, "{}", quota(a)?);
    Ok(stage)
}

/// The CPU quota of the container on a host: `-1` or `max` for none.
fn quota(host: &Host) -> Result<String> {
    let state = host.run("cat", ["/run/runc/web/state.json"])?;
    let state: Value = serde_json::from_str(&state)?;
    let directory = |controller: &str| state["cgroup_paths"][controller].as_str();
    let file = match directory("cpu") {
        Some(cpu) => format!("{cpu}/cpu.cfs_quota_us"),
        None => format!(
            "{}/cpu.max",
            directory("").context("no cgroup has its quota")?
        ),
    };
    let text = host.run("cat", [file.as_str()])?;
    let quota = text.split_whitespace().next().context("an empty quota")?;
    Ok(quota.to_string())
}

fn ensure_slowed(host: &Host) -> Result<()> {
    let now = quota(host)?;
    let lowered = now.parse::<u32>().is_ok_and(|now| now < 150_000);
    ensure!(lowered, "it is not slowed: its quota is {now}");
    Ok(())
}

fn ensure_its_own_again(stage: &Stage, moving: &Running) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while quota(stage.a)? != OWN {
        let now = quota(stage.a)?;
        ensure!(
            Instant::now() < deadline,
            "its quota stays {now}\n{}",
            moving.output()?
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn a_slowed_container_that_stays_has_its_own_quota_again() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = stage(&a, &b, 300)?;
    let mut agent = stage.agent(&[HASTE])?;
    let mut moving =
        stage.start_move_with(&OPTIONS, &[HASTE, "MIGRATE_FAULT=source:Slowed:stop"])?;
    wait_stopped(&mut moving)?;
    ensure_slowed(&a)?;
    agent.signal(Signal::SIGKILL)?;
    agent.wait(LIMIT)?;
    moving.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 4)?;
    ensure!(quota(&a)? == OWN, "{}", quota(&a)?);
    let agent = stage.agent(&[HASTE])?;
    stage.expect_rolled_back(Some(&agent))
}

#[test]
fn a_slowed_container_whose_move_is_cancelled_has_its_own_quota_again() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = stage(&a, &b, 300)?;
    let agent = stage.agent(&[HASTE])?;
    let mut moving =
        stage.start_move_with(&OPTIONS, &[HASTE, "MIGRATE_FAULT=source:Slowed:stop"])?;
    wait_stopped(&mut moving)?;
    ensure_slowed(&a)?;
    moving.signal(Signal::SIGTERM)?;
    moving.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 4)?;
    ensure!(quota(&a)? == OWN, "{}", quota(&a)?);
    stage.expect_rolled_back(Some(&agent))
}

#[test]
fn a_source_killed_with_the_container_slowed_is_survived_by_its_guard() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = stage(&a, &b, 300)?;
    let agent = stage.agent(&[HASTE])?;
    let mut moving =
        stage.start_move_with(&OPTIONS, &[HASTE, "MIGRATE_FAULT=source:Slowed:stop"])?;
    wait_stopped(&mut moving)?;
    ensure_slowed(&a)?;
    moving.signal(Signal::SIGKILL)?;
    moving.wait(LIMIT)?;
    ensure_its_own_again(&stage, &moving)?;
    stage.expect_rolled_back(Some(&agent))
}

#[test]
fn a_slowed_container_converges_and_is_not_slowed_at_the_target() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = stage(&a, &b, 30)?;
    let _agent = stage.agent(&[])?;
    let mut moving = stage.start_move_with(&OPTIONS, &[])?;
    stage.expect_exit(&mut moving, 0)?;
    let said = moving.output()?;
    ensure!(said.contains("slowed: the container is left"), "{said}");
    println!("{said}");
    // The bundle's configuration, which goes along, has no quota.
    let now = quota(&b)?;
    ensure!(now == "-1" || now == "max", "{now}");
    stage.expect_moved()
}
