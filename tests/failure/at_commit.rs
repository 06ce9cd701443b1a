//! Failures when a migration is being decided, and after.

use crate::stage::{HASTE, LIMIT, Stage, find, signal, slow_down, wait_stopped};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use rig::{Host, Workload};
use std::thread::sleep;
use std::time::Duration;

/// After so long without a link a connection is lost at both ends, if either is in [`HASTE`]: the shorter patience counts.
const LOST: Duration = Duration::from_secs(10);

#[test]
fn a_source_killed_after_it_decided_and_before_it_said_so_gets_its_container_back() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let mut moving = stage.start_move("web", &[HASTE, "MIGRATE_FAULT=source:SendCommit:kill"])?;
    moving.wait_for("fault injected", LIMIT)?;
    moving.wait(LIMIT)?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

#[test]
fn a_source_killed_after_it_sent_commit_loses_its_container_to_the_target() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE, "MIGRATE_FAULT=target:ReleaseCopy:stop"])?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    wait_stopped(&mut agent)?;
    moving.signal(Signal::SIGKILL)?;
    moving.wait(LIMIT)?;
    agent.signal(Signal::SIGCONT)?;
    stage.expect_moved()
}

#[test]
fn a_source_killed_before_it_destroys_its_copy_never_runs_it_again() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let _agent = stage.agent(&[HASTE])?;
    let fault = "MIGRATE_FAULT=source:DestroyFrozenCopy:kill";
    let mut moving = stage.start_move("web", &[HASTE, fault])?;
    moving.wait_for("fault injected", LIMIT)?;
    moving.wait(LIMIT)?;
    stage.expect_moved()
}

#[test]
fn an_agent_killed_before_it_recorded_the_commit_sends_the_container_back() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE, "MIGRATE_FAULT=target:RecordCommitted:kill"])?;
    let mut moving = stage.start_move("web", &[])?;
    agent.wait(LIMIT)?;
    let agent = stage.agent(&[HASTE])?;
    stage.expect_exit(&mut moving, 4)?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

/// The agent is killed before `step`, when `committed` is on its disk, and started again: the container moved.
fn moved_without_the_agent(step: &str) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let fault = format!("MIGRATE_FAULT=target:{step}:kill");
    let mut agent = stage.agent(&[HASTE, &fault])?;
    let mut moving = stage.start_move("web", &[])?;
    agent.wait(LIMIT)?;
    let _agent = stage.agent(&[HASTE])?;
    stage.expect_exit(&mut moving, 0)?;
    stage.expect_moved()
}

#[test]
fn an_agent_killed_between_commit_and_release_is_replaced_by_its_hook() -> Result<()> {
    moved_without_the_agent("ReleaseCopy")
}

#[test]
fn an_agent_killed_between_release_and_its_record_still_says_committed() -> Result<()> {
    moved_without_the_agent("RecordReleased")
}

#[test]
fn an_agent_killed_before_it_answers_still_says_committed() -> Result<()> {
    moved_without_the_agent("AnswerCommitted")
}

#[test]
fn a_reply_lost_with_the_link_is_asked_for_again() -> Result<()> {
    moved_though_the_reply_was_lost(&[])
}

/// The link is cut while the target's answer to the commit is on its way, and comes back when the connection is lost.
pub fn moved_though_the_reply_was_lost(options: &[&str]) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE, "MIGRATE_FAULT=target:AnswerCommitted:stop"])?;
    let mut moving = stage.start_move_with(options, &[])?;
    wait_stopped(&mut agent)?;
    stage.link.down()?;
    agent.signal(Signal::SIGCONT)?;
    sleep(LOST);
    ensure!(
        !stage.container.is_running(&a)?,
        "two containers: it runs at the source before the target's word is known"
    );
    stage.link.up()?;
    stage.expect_exit(&mut moving, 0)?;
    stage.expect_moved()
}

#[test]
fn a_commit_lost_with_the_link_is_taken_back_by_both() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let mut moving = stage.start_move("web", &["MIGRATE_FAULT=source:SendCommit:stop"])?;
    wait_stopped(&mut moving)?;
    stage.link.down()?;
    moving.signal(Signal::SIGCONT)?;
    // Over a connection that lives a late commit would be a commit.
    sleep(LOST);
    ensure!(
        !stage.container.is_running(&a)?,
        "it went on without asking"
    );
    stage.link.up()?;
    stage.expect_exit(&mut moving, 4)?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

/// Cuts the link for good while the target's answer is on its way, and returns with the source gone and its guard killed.
fn leave_unknown(stage: &Stage, fault: &str) -> Result<rig::Running> {
    let mut agent = stage.agent(&[HASTE, fault])?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    wait_stopped(&mut agent)?;
    stage.link.down()?;
    let guard = find(&moving, &["migrate", "guard"])?;
    agent.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 5)?;
    ensure!(
        moving.output()?.contains("migrate recover"),
        "it does not say how to find out: {}",
        moving.output()?
    );
    // It would ask on by itself; here a person has to.
    signal(guard, Signal::SIGKILL)?;
    let state = stage.container.state(stage.a)?;
    ensure!(
        state
            .as_ref()
            .is_some_and(|state| state["status"] == "paused"),
        "the source's copy is not frozen: {state:?}"
    );
    Ok(agent)
}

#[test]
fn an_unknown_outcome_stays_frozen_until_recover_learns_that_it_moved() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let _agent = leave_unknown(&stage, "MIGRATE_FAULT=target:AnswerCommitted:stop")?;
    ensure!(
        stage.container.is_running(&b)?,
        "it does not run at the target"
    );
    let mut recover = a.spawn("migrate", ["recover"])?;
    stage.expect_exit(&mut recover, 5)?;
    ensure!(!stage.container.is_running(&a)?, "recover guessed");
    stage.link.up()?;
    let said = a.run("migrate", ["recover"])?;
    ensure!(said.contains("lives at the target"), "{said}");
    stage.expect_moved()
}

#[test]
fn an_unknown_outcome_stays_frozen_until_recover_learns_that_it_did_not_move() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = leave_unknown(&stage, "MIGRATE_FAULT=target:RecordCommitted:stop")?;
    drop(agent);
    let agent = stage.agent(&[HASTE])?;
    stage.link.up()?;
    a.run("migrate", ["recover"])?;
    // Whether the commit was on disk when the agent died is a matter of microseconds; that it is one of both is not.
    if stage.container.is_running(&b)? {
        return stage.expect_moved();
    }
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

/// After the decision, before the first instruction: without a pager the missing pages would read as zeros.
#[test]
fn a_pager_killed_with_its_standby_before_the_release_sends_the_container_back() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE, "MIGRATE_FAULT=target:ReleaseCopy:stop"])?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    wait_stopped(&mut agent)?;
    let pager = find(&agent, &["migrate", "pager"])?;
    let standby = find(&agent, &["pager", "--standby"])?;
    // The standby first: it would take over.
    signal(standby, Signal::SIGKILL)?;
    signal(pager, Signal::SIGKILL)?;
    agent.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 4)?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

#[test]
fn a_pager_killed_while_it_fills_is_replaced_with_every_byte_right() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    // Idle until it verifies: a pager that dies while it reads a fault loses it, and its standby then kills the container
    // rather than guess (the pager's module header). What is tested here is the usual case.
    let stage = Stage::with_workload(&a, &b, &Workload::memory_writer(384, 0))?;
    let mut agent = stage.agent(&["MIGRATE_FAULT=target:StartRestore:stop"])?;
    let mut moving = stage.start_move("web", &[])?;
    wait_stopped(&mut agent)?;
    let pager = find(&agent, &["migrate", "pager"])?;
    // Else all would be in its place before the container runs.
    slow_down(&b, pager, 3)?;
    agent.signal(Signal::SIGCONT)?;
    moving.wait_for("committed after", LIMIT)?;
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", stage.container.pid(&b)?))?;
    let resident: u64 = statm.split(' ').nth(1).unwrap_or("0").parse()?;
    ensure!(
        resident < 352 << 8,
        "{resident} pages were in their place before the pager could be killed"
    );
    signal(pager, Signal::SIGKILL)?;
    stage.expect_exit(&mut moving, 0)?;
    stage.expect_moved().map_err(|error| {
        let record = std::fs::read_to_string(b.path("/var/lib/migrate/pager-death.json"));
        let said = agent.output().unwrap_or_default();
        error.context(format!("{said}\n{}", record.unwrap_or_default()))
    })
}
