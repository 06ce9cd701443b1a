//! What a user does with a container while it is being moved: the move ends, says why, and leaves the container so.

use crate::stage::{HASTE, LIMIT, Stage, signal, wait_stopped};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use rig::{Host, Running};
use std::time::Instant;

/// Stops the source before `step`, does what a user does, and lets the source go on: it must fail and say `why`.
fn ends_the_move(step: &str, user: &[&str], why: &str) -> Result<(Host, Host)> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    {
        let stage = Stage::new(&a, &b)?;
        let agent = stage.agent(&[HASTE])?;
        let mut moving = stopped_before(&stage, step)?;
        a.run("runc", user)?;
        fails_with(&stage, &mut moving, why)?;
        stage.expect_nothing_there(&agent)?;
    }
    Ok((a, b))
}

fn stopped_before(stage: &Stage, step: &str) -> Result<Running> {
    let fault = format!("MIGRATE_FAULT=source:{step}:stop");
    let mut moving = stage.start_move("web", &[HASTE, &fault])?;
    wait_stopped(&mut moving)?;
    Ok(moving)
}

fn fails_with(stage: &Stage, moving: &mut Running, why: &str) -> Result<()> {
    moving.signal(Signal::SIGCONT)?;
    stage.expect_exit(moving, 4)?;
    let said = moving.output()?;
    ensure!(said.contains(why), "it does not say {why:?}:\n{said}");
    Ok(())
}

fn status(stage: &Stage) -> Result<String> {
    let state = stage.container.state(stage.a)?.unwrap_or_default();
    Ok(state["status"].as_str().unwrap_or("none").to_string())
}

#[test]
fn a_container_paused_during_the_rounds_stays_paused_where_it_is() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let mut moving = stopped_before(&stage, "Round")?;
    a.run("runc", ["pause", "web"])?;
    fails_with(&stage, &mut moving, "was paused")?;
    ensure!(status(&stage)? == "paused", "{}", status(&stage)?);
    stage.expect_nothing_there(&agent)?;

    // Nor does a guard thaw what its engine had not frozen.
    a.run("runc", ["resume", "web"])?;
    let moving = stopped_before(&stage, "Round")?;
    a.run("runc", ["pause", "web"])?;
    moving.kill()?;
    let rolled_back = || -> Result<bool> {
        let journals = a.run("sh", ["-c", "cat /var/lib/migrate/journal/*source*"])?;
        // The working directory goes last of all.
        let over = a.run("ls", ["/var/lib/migrate/work"])?.is_empty();
        Ok(journals.matches("\"rolled_back\"").count() >= 2 && over)
    };
    let deadline = Instant::now() + LIMIT;
    while !rolled_back()? {
        ensure!(Instant::now() < deadline, "the guard does not settle it");
    }
    stage.expect_nothing_there(&agent)?;
    ensure!(status(&stage)? == "paused", "{}", status(&stage)?);
    a.run("runc", ["resume", "web"])?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

#[test]
fn a_container_killed_during_the_rounds_has_ended_and_is_nowhere() -> Result<()> {
    ends_the_move("Round", &["kill", "web", "KILL"], "ended at the source").map(drop)
}

#[test]
fn a_container_deleted_during_the_rounds_has_ended_and_is_nowhere() -> Result<()> {
    ends_the_move(
        "Round",
        &["delete", "--force", "web"],
        "ended at the source",
    )
    .map(drop)
}

/// In the v1 freezer a kill waits for the thaw: at the target the container would go on.
#[test]
fn a_container_killed_while_it_is_frozen_does_not_go_on_elsewhere() -> Result<()> {
    ends_the_move(
        "ConfirmHold",
        &["kill", "web", "KILL"],
        "ended at the source",
    )
    .map(drop)
}

#[test]
fn limits_changed_during_the_rounds_end_the_move() -> Result<()> {
    ends_the_move(
        "Round",
        &["update", "--pids-limit", "77", "web"],
        "pids.max",
    )
    .map(drop)
}

#[test]
fn a_process_of_runc_exec_is_named_and_a_brief_one_waited_for() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let exec = || -> Result<i32> {
        const SCRIPT: &str = "runc exec --detach --pid-file /srv/exec.pid web /bin/memory-writer --memory-mib=1 --dirty-mb-s=0 </dev/null >/dev/null 2>&1; cat /srv/exec.pid; rm /srv/exec.pid";
        Ok(a.run("sh", ["-c", SCRIPT])?.trim().parse()?)
    };
    let visitor = exec()?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    stage.expect_exit(&mut moving, 3)?;
    let said = moving.output()?;
    let named = format!("process {visitor} (memory-writer) was started in container web");
    ensure!(said.contains(&named), "{said}");
    signal(visitor, Signal::SIGKILL)?;

    let mut moving = stopped_before(&stage, "Round")?;
    let visitor = exec()?;
    let named = format!("process {visitor} (memory-writer) was started in container web");
    fails_with(&stage, &mut moving, &named)?;
    signal(visitor, Signal::SIGKILL)?;
    stage.expect_rolled_back(Some(&agent))?;

    let mut moving = stopped_before(&stage, "Round")?;
    let visitor = exec()?;
    moving.signal(Signal::SIGCONT)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    signal(visitor, Signal::SIGKILL)?;
    stage.expect_exit(&mut moving, 0)?;
    stage.expect_moved()
}
