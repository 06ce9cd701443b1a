//! Failures of a destination whose copy runs and is not complete: the source has kept the container, and takes it back where the
//! copy is lost; where it is not, it never does.

use crate::stage::{HASTE, LIMIT, Stage, find, signal, slow_down, tidy_slowed, wait_stopped};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{Host, Running, Workload};
use std::fs;
use std::time::Instant;

/// A copy that runs at the second host while its pager, slowed down, has most pages still to bring.
fn filling<'h>(a: &'h Host, b: &'h Host) -> Result<(Stage<'h>, Running, Running, i32)> {
    let stage = Stage::with_workload(a, b, &Workload::memory_writer(384, 0))?;
    let mut agent = stage.agent(&[HASTE, "MIGRATE_FAULT=target:StartRestore:stop"])?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    wait_stopped(&mut agent)?;
    let standby = find(&agent, &["pager", "--standby"])?;
    let pager = parent(standby)?;
    slow_down(b, pager, 3)?;
    agent.signal(Signal::SIGCONT)?;
    moving.wait_for("committed after", LIMIT)?;
    expect_kept(&stage)?;
    Ok((stage, agent, moving, pager))
}

fn parent(pid: i32) -> Result<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    line.and_then(|pid| pid.trim().parse().ok())
        .context("it has no parent")
}

/// The source still has the container, frozen.
fn expect_kept(stage: &Stage) -> Result<()> {
    let state = stage.container.state(stage.a)?;
    ensure!(
        state
            .as_ref()
            .is_some_and(|state| state["status"] == "paused"),
        "the source has not kept its container: {state:?}"
    );
    Ok(())
}

/// The source takes the container back, says why, and the next try moves it.
fn expect_taken_back(stage: &Stage, moving: &mut Running, agent: &Running) -> Result<()> {
    stage.expect_exit(moving, 4)?;
    let said = moving.output()?;
    ensure!(
        said.contains("was lost there before it was complete"),
        "it does not say what happened: {said}"
    );
    stage
        .expect_rolled_back(Some(agent))
        .map_err(|error| error.context(agent.output().unwrap_or_default()))?;
    stage.expect_next_try()
}

#[test]
fn a_copy_whose_agent_pager_and_standby_die_at_once_is_lost_and_taken_back() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let (stage, mut agent, mut moving, pager) = filling(&a, &b)?;
    let standby = find(&agent, &["pager", "--standby"])?;
    agent.signal(Signal::SIGKILL)?;
    agent.wait(LIMIT)?;
    signal(standby, Signal::SIGKILL)?;
    signal(pager, Signal::SIGKILL)?;
    tidy_slowed(&b)?;
    let said = b.run("migrate", ["recover"])?;
    ensure!(said.contains("lost before it was complete"), "{said}");
    ensure!(
        !stage.container.is_running(&b)?,
        "a copy with holes in its memory runs on"
    );
    let agent = stage.agent(&[HASTE])?;
    expect_taken_back(&stage, &mut moving, &agent)
}

/// As a service manager does that kills a unit's control group.
#[test]
fn a_pager_outlives_all_that_is_in_its_agents_cgroup() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let (stage, mut agent, mut moving, pager) = filling(&a, &b)?;
    let cgroup = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup"));
    let units = cgroup(agent.pid())?;
    let standby = find(&agent, &["pager", "--standby"])?;
    for pid in [pager, standby] {
        let own = cgroup(pid)?;
        ensure!(
            !own.lines()
                .any(|line| units.lines().any(|unit| unit == line)),
            "process {pid} shares a cgroup with the agent: {own}"
        );
    }
    agent.signal(Signal::SIGKILL)?;
    agent.wait(LIMIT)?;
    let agent = stage.agent(&[HASTE])?;
    stage.expect_exit(&mut moving, 0)?;
    stage
        .expect_moved()
        .map_err(|error| error.context(agent.output().unwrap_or_default()))
}

#[test]
fn a_container_that_ends_at_the_destination_before_it_is_complete_is_not_run_again() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let (stage, _agent, mut moving, _) = filling(&a, &b)?;
    b.run("runc", ["kill", "web", "KILL"])?;
    stage.expect_exit(&mut moving, 0)?;
    ensure!(
        stage.container.state(&a)?.is_none(),
        "the source kept a container that had run to its end"
    );
    Ok(())
}

/// The power of the destination fails while its copy runs and is not complete.
fn taken_back_after_a_power_cut(options: &[&str], fault: &str) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE, fault])?;
    let mut moving = stage.start_move_with(options, &[HASTE])?;
    moving.wait_for("committed after", LIMIT)?;
    if fault != NO_FAULT {
        wait_stopped(&mut agent)?;
    }
    ensure!(stage.container.is_running(&b)?, "the copy does not run");
    expect_kept(&stage)?;
    b.restart()?;
    agent.wait(LIMIT)?;
    let agent = stage.agent(&[HASTE])?;
    expect_taken_back(&stage, &mut moving, &agent)
}

/// Of a process that is to live.
const NO_FAULT: &str = "MIGRATE_FAULT=";

#[test]
fn a_destination_whose_power_fails_before_the_files_are_on_disk_gives_the_container_back()
-> Result<()> {
    taken_back_after_a_power_cut(&[], "MIGRATE_FAULT=target:SyncFiles:stop")
}

#[test]
fn a_destination_whose_power_fails_while_pages_are_owed_gives_the_container_back() -> Result<()> {
    let options = ["--mode=post-copy", "--bandwidth-limit=4M"];
    taken_back_after_a_power_cut(&options, NO_FAULT)
}

/// What the copy has written to files of both hosts may not fit what the source has kept of its memory.
#[test]
fn a_container_whose_lost_copy_used_the_same_files_waits_for_a_person() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    // What a network filesystem does: one directory at the same path of both hosts.
    let shared = tempfile::tempdir_in("/var/tmp")?;
    for host in [&a, &b] {
        fs::create_dir(host.path("/srv/web"))?;
        let directory = shared.path().display().to_string();
        host.run("mount", ["--bind", &directory, "/srv/web"])?;
    }
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE, "MIGRATE_FAULT=target:SyncFiles:stop"])?;
    let mut moving = stage.start_move_with(&["--rootfs=shared"], &[HASTE])?;
    wait_stopped(&mut agent)?;
    b.restart()?;
    agent.wait(LIMIT)?;
    let _agent = stage.agent(&[HASTE])?;
    stage.expect_exit(&mut moving, 6)?;
    expect_kept(&stage)?;
    let said = moving.output()?;
    let order = said.split_once("--resume-source ").map(|(_, id)| id);
    let migration = order
        .and_then(|id| id.split(|c: char| !c.is_ascii_hexdigit()).next())
        .with_context(|| format!("it does not say what a person can do: {said}"))?;
    // The guard may be looking, too.
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut recover = a.spawn("migrate", ["recover"])?;
        let code = recover.wait(LIMIT)?.code();
        if code == Some(6) {
            break;
        }
        ensure!(
            code == Some(0) && Instant::now() < deadline,
            "{code:?}: {}",
            recover.output()?
        );
    }
    expect_kept(&stage)?;
    let said = a.run("migrate", ["recover", "--resume-source", migration])?;
    ensure!(
        said.contains("goes on here as it was at the switch"),
        "{said}"
    );
    let verified = stage.container.verify(&a, LIMIT)?;
    ensure!(verified.verified, "{verified:?}");
    Ok(())
}
