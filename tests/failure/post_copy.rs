//! The same failures when the container goes first and its memory follows: until the target may run it all is taken back, and
//! afterwards the pages come all the same.

use crate::at_commit::moved_though_the_reply_was_lost;
use crate::stage::{HASTE, LIMIT, Stage};
use anyhow::Result;
use rig::Host;

const POST_COPY: [&str; 1] = ["--mode=post-copy"];

/// One end is killed before `step`, which comes before the decision.
fn rolls_back(source: &str, target: &str) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE, target])?;
    let mut moving = stage.start_move_with(&POST_COPY, &[HASTE, source])?;
    if source == NO_FAULT {
        agent.wait(LIMIT)?;
        agent = stage.agent(&[HASTE])?;
        stage.expect_exit(&mut moving, 4)?;
    } else {
        moving.wait_for("fault injected", LIMIT)?;
        moving.wait(LIMIT)?;
    }
    stage.expect_rolled_back(Some(&agent)).map_err(|error| {
        let said = [&moving, &agent].map(|who| who.output().unwrap_or_default());
        error.context(said.join("\n"))
    })?;
    stage.expect_next_try()
}

/// Of a process that is to live.
const NO_FAULT: &str = "MIGRATE_FAULT=";

#[test]
fn an_agent_killed_while_it_holds_a_copy_that_lacks_pages_leaves_no_copy() -> Result<()> {
    rolls_back(NO_FAULT, "MIGRATE_FAULT=target:VerifyCopy:kill")
}

#[test]
fn an_agent_killed_before_it_says_that_it_holds_one_leaves_no_copy() -> Result<()> {
    rolls_back(NO_FAULT, "MIGRATE_FAULT=target:AnswerPrepared:kill")
}

#[test]
fn a_source_killed_before_it_decides_on_post_copy_is_survived_by_its_guard() -> Result<()> {
    rolls_back("MIGRATE_FAULT=source:RecordDeciding:kill", NO_FAULT)
}

#[test]
fn a_source_killed_after_it_decided_and_before_it_said_so_gets_its_container_back() -> Result<()> {
    rolls_back("MIGRATE_FAULT=source:SendCommit:kill", NO_FAULT)
}

/// The agent is killed before `step`, when `committed` is on its disk and pages are owed. The next one adopts the pager, and the
/// source brings what is missing.
fn moves_without_the_agent(step: &str) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let fault = format!("MIGRATE_FAULT=target:{step}:kill");
    let mut agent = stage.agent(&[HASTE, &fault])?;
    // Far less than all of it goes over before the agent dies.
    let slow = [&POST_COPY[..], &["--bandwidth-limit=10M"]].concat();
    let mut moving = stage.start_move_with(&slow, &[])?;
    agent.wait(LIMIT)?;
    let agent = stage.agent(&[HASTE])?;
    stage
        .expect_exit(&mut moving, 0)
        .and_then(|()| stage.expect_moved())
        .map_err(|error| error.context(agent.output().unwrap_or_default()))
}

#[test]
fn an_agent_killed_between_commit_and_release_of_a_copy_that_lacks_pages_is_replaced() -> Result<()>
{
    moves_without_the_agent("ReleaseCopy")
}

#[test]
fn an_agent_killed_between_release_and_its_record_is_replaced() -> Result<()> {
    moves_without_the_agent("RecordReleased")
}

#[test]
fn an_agent_killed_before_it_says_that_the_copy_runs_is_replaced() -> Result<()> {
    moves_without_the_agent("AnswerCommitted")
}

/// The source is killed before `step`, when the copy runs: its guard sends the rest and destroys what is frozen.
fn moves_without_the_source(step: &str) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let fault = format!("MIGRATE_FAULT=source:{step}:kill");
    let mut moving = stage.start_move_with(&POST_COPY, &[HASTE, &fault])?;
    moving.wait_for("fault injected", LIMIT)?;
    moving.wait(LIMIT)?;
    stage
        .expect_moved()
        .map_err(|error| error.context(agent.output().unwrap_or_default()))
}

#[test]
fn a_source_killed_before_it_has_on_record_that_it_serves_is_replaced_by_its_guard() -> Result<()> {
    moves_without_the_source("RecordServing")
}

#[test]
fn a_source_killed_when_the_copy_is_whole_never_runs_its_own_again() -> Result<()> {
    moves_without_the_source("DestroyFrozenCopy")
}

#[test]
fn a_reply_lost_with_the_link_is_asked_for_again_and_the_pages_follow() -> Result<()> {
    moved_though_the_reply_was_lost(&POST_COPY)
}
