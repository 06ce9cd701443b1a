//! A migration fails before it is decided: the container goes on where it is, nothing is left of the attempt, and the next
//! one succeeds.

use crate::stage::{HASTE, LIMIT, Stage, find, signal, wait_stopped};
use anyhow::Result;
use nix::sys::signal::Signal;
use rig::{Host, Running, Workload};
use std::fs;

/// What is done while the source is stopped.
type Harm = fn(&Stage, &mut Running, &mut Running) -> Result<()>;

/// Stops the source before `step`, does the harm, and lets the source go on: it must roll back.
fn source_rolls_back(step: &str, harm: Harm) -> Result<()> {
    source_rolls_back_of(&Workload::memory_writer(32, 10), step, harm)
}

fn source_rolls_back_of(workload: &Workload, step: &str, harm: Harm) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::with_workload(&a, &b, workload)?;
    let mut agent = stage.agent(&[HASTE])?;
    let fault = format!("MIGRATE_FAULT=source:{step}:stop");
    let mut moving = stage.start_move("web", &[HASTE, &fault])?;
    wait_stopped(&mut moving)?;
    harm(&stage, &mut moving, &mut agent)?;
    moving.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 4)?;
    settle(&stage, &moving, agent)
}

/// Stops the target before `step`, does the harm, and lets the target go on: the source must roll back.
fn target_rolls_back(step: &str, harm: Harm) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let fault = format!("MIGRATE_FAULT=target:{step}:stop");
    let mut agent = stage.agent(&[HASTE, &fault])?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    wait_stopped(&mut agent)?;
    harm(&stage, &mut moving, &mut agent)?;
    if agent.is_alive()? {
        agent.signal(Signal::SIGCONT)?;
    }
    stage
        .expect_exit(&mut moving, 4)
        .map_err(|error| error.context(agent.output().unwrap_or_default()))?;
    settle(&stage, &moving, agent)
}

/// Kills the source before `step`: the guard alone must let the container go on.
fn guard_rolls_back(step: &str) -> Result<()> {
    guard_rolls_back_of(&Workload::memory_writer(32, 10), step)
}

fn guard_rolls_back_of(workload: &Workload, step: &str) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::with_workload(&a, &b, workload)?;
    let agent = stage.agent(&[HASTE])?;
    let fault = format!("MIGRATE_FAULT=source:{step}:kill");
    let mut moving = stage.start_move("web", &[HASTE, &fault])?;
    moving.wait_for("fault injected", LIMIT)?;
    moving.wait(LIMIT)?;
    // The guard lets the target know, which else would find out when it misses the source.
    let mut agent = agent;
    agent.wait_for("asked what became of it", LIMIT)?;
    settle(&stage, &moving, agent)
}

/// After a failure: all is as before, with the agent or a new one, and the next try succeeds.
fn settle(stage: &Stage, moving: &Running, mut agent: Running) -> Result<()> {
    let agent = if agent.is_alive()? {
        agent
    } else {
        stage.agent(&[HASTE])?
    };
    stage.expect_rolled_back(Some(&agent)).map_err(|error| {
        let said = [moving, &agent].map(|who| who.output().unwrap_or_default());
        error.context(said.join("\n"))
    })?;
    stage.expect_next_try()
}

fn kill_agent(_: &Stage, _: &mut Running, agent: &mut Running) -> Result<()> {
    agent.signal(Signal::SIGKILL)?;
    agent.wait(LIMIT).map(drop)
}

fn cut_link(stage: &Stage, _: &mut Running, _: &mut Running) -> Result<()> {
    stage.link.down()
}

#[test]
fn an_agent_killed_during_the_rounds_costs_the_container_nothing() -> Result<()> {
    source_rolls_back("Round", kill_agent)
}

#[test]
fn an_agent_killed_while_the_container_is_frozen_costs_it_only_the_wait() -> Result<()> {
    source_rolls_back("SendDelta", kill_agent)
}

#[test]
fn an_agent_killed_before_the_restore_leaves_nothing_behind() -> Result<()> {
    target_rolls_back("StartRestore", kill_agent)
}

#[test]
fn an_agent_killed_while_the_hook_holds_the_copy_leaves_no_copy() -> Result<()> {
    target_rolls_back("VerifyCopy", kill_agent)
}

#[test]
fn an_agent_killed_before_it_says_prepared_leaves_no_copy() -> Result<()> {
    target_rolls_back("AnswerPrepared", kill_agent)
}

#[test]
fn a_source_killed_during_the_rounds_leaves_the_container_running() -> Result<()> {
    guard_rolls_back("Round")
}

#[test]
fn a_source_killed_with_the_container_frozen_is_survived_by_its_guard() -> Result<()> {
    guard_rolls_back("SendDelta")
}

#[test]
fn a_source_killed_while_criu_dumps_is_survived_by_its_guard() -> Result<()> {
    guard_rolls_back("FreezeAgain")
}

#[test]
fn a_source_killed_while_it_holds_the_dump_is_survived_by_its_guard() -> Result<()> {
    guard_rolls_back("SendImages")
}

#[test]
fn a_source_killed_before_it_decides_is_survived_by_its_guard() -> Result<()> {
    guard_rolls_back("RecordDeciding")
}

#[test]
fn criu_killed_before_it_looked_at_the_tasks_does_no_harm() -> Result<()> {
    source_rolls_back("SendDelta", |_, moving, _| {
        signal(find(moving, &["criu: dump"])?, Signal::SIGKILL)
    })
}

#[test]
fn criu_killed_when_its_dump_is_complete_does_no_harm() -> Result<()> {
    source_rolls_back("FreezeAgain", |_, moving, _| {
        signal(find(moving, &["criu: dump"])?, Signal::SIGKILL)
    })
}

/// CRIU has cut the container's network off by then and taken its connections in hand; with CRIU dead nobody but the engine
/// undoes that.
#[test]
fn criu_killed_with_the_network_locked_leaves_no_connection_cut() -> Result<()> {
    source_rolls_back_of(&Workload::redis(16), "SendImages", |_, moving, _| {
        signal(find(moving, &["criu: dump"])?, Signal::SIGKILL)
    })
}

#[test]
fn a_source_killed_with_the_network_locked_leaves_no_connection_cut() -> Result<()> {
    guard_rolls_back_of(&Workload::redis(16), "SendImages")
}

#[test]
fn a_runtime_killed_during_its_checkpoint_does_no_harm() -> Result<()> {
    source_rolls_back("SendDelta", |_, moving, _| {
        signal(find(moving, &["runc", "checkpoint"])?, Signal::SIGKILL)
    })
}

#[test]
fn a_hook_killed_at_the_source_ends_the_dump_and_nothing_else() -> Result<()> {
    source_rolls_back("ConfirmHold", |_, moving, _| {
        signal(find(moving, &["hook", "source.jsonl"])?, Signal::SIGKILL)
    })
}

#[test]
fn a_hook_killed_at_the_target_ends_the_copy() -> Result<()> {
    target_rolls_back("VerifyCopy", |_, _, agent| {
        signal(find(agent, &["hook", "target.jsonl"])?, Signal::SIGKILL)
    })
}

#[test]
fn a_restore_killed_while_it_waits_leaves_no_copy() -> Result<()> {
    target_rolls_back("StartRestore", |_, _, agent| {
        signal(find(agent, &["runc", "restore"])?, Signal::SIGKILL)
    })
}

/// The container's cgroups are made by its runtime: a copy that is owed pages must not be given up for want of them before
/// the runtime came to that.
#[test]
fn a_runtime_that_is_slow_to_restore_is_waited_for() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let runc = b.run("which", ["runc"])?;
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' restore '*) sleep 2;; esac\nexec {} \"$@\"\n",
        runc.trim()
    );
    fs::create_dir_all(b.path("/srv/slow"))?;
    fs::write(b.path("/srv/slow/runc"), script)?;
    b.run("chmod", ["755", "/srv/slow/runc"])?;
    let path = b.run("printenv", ["PATH"])?;
    let _agent = stage.agent(&[&format!("PATH=/srv/slow:{}", path.trim())])?;
    let mut moving = stage.start_move_with(&["--mode", "post-copy"], &[])?;
    stage.expect_exit(&mut moving, 0)?;
    stage.expect_moved()
}

#[test]
fn a_restore_killed_with_the_copy_restored_leaves_no_copy() -> Result<()> {
    target_rolls_back("VerifyCopy", |_, _, agent| {
        signal(find(agent, &["runc", "restore"])?, Signal::SIGKILL)
    })
}

#[test]
fn criu_killed_with_the_copy_restored_leaves_no_copy() -> Result<()> {
    target_rolls_back("VerifyCopy", |_, _, agent| {
        signal(find(agent, &["criu: restore"])?, Signal::SIGKILL)
    })
}

#[test]
fn a_pager_killed_before_the_commit_ends_the_copy() -> Result<()> {
    target_rolls_back("StartRestore", |_, _, agent| {
        signal(find(agent, &["migrate", "pager"])?, Signal::SIGKILL)
    })
}

#[test]
fn a_link_cut_during_the_rounds_costs_the_container_nothing() -> Result<()> {
    link_cut_at("Round")
}

#[test]
fn a_link_cut_during_the_freeze_costs_the_container_only_the_wait() -> Result<()> {
    link_cut_at("SendImages")
}

/// As [`source_rolls_back`], but the link comes back when the source has given up.
fn link_cut_at(step: &str) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE])?;
    let fault = format!("MIGRATE_FAULT=source:{step}:stop");
    let mut moving = stage.start_move("web", &[HASTE, &fault])?;
    wait_stopped(&mut moving)?;
    cut_link(&stage, &mut moving, &mut agent)?;
    moving.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 4)?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.link.up()?;
    stage.expect_next_try()
}

#[test]
fn ctrl_c_during_the_rounds_ends_the_migration_and_not_the_container() -> Result<()> {
    source_rolls_back("Round", |_, moving, _| moving.signal(Signal::SIGINT))
}

#[test]
fn ctrl_c_while_frozen_ends_the_migration_and_not_the_container() -> Result<()> {
    source_rolls_back("SendImages", |_, moving, _| moving.signal(Signal::SIGINT))
}
