//! A container that cannot move is refused before anything is touched, and moves when the reason is gone.

use crate::stage::{HASTE, LIMIT, Stage, wait_stopped};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use rig::{Container, ContainerOptions, Host, HostOptions, Running, Workload};

/// A move is refused with a line that has `why` in it, and all is as it was.
fn expect_refused(stage: &Stage, agent: &Running, why: &str) -> Result<()> {
    let mut moving = stage.start_move("web", &[HASTE])?;
    stage.expect_exit(&mut moving, 3)?;
    let said = moving.output()?;
    ensure!(said.contains(why), "it does not say {why:?}:\n{said}");
    stage.expect_untouched(agent)
}

#[test]
fn a_target_that_has_such_a_container_refuses_it_and_keeps_its_own() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let other = Container::create(
        &b,
        "web",
        &Workload::memory_writer(8, 0),
        &ContainerOptions::default(),
    )?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    stage.expect_exit(&mut moving, 3)?;
    ensure!(other.verify(&b, LIMIT)?.verified);
    other.delete(&b)?;
    std::fs::remove_dir_all(b.path("/srv/web"))?;
    stage.expect_untouched(&agent)?;
    stage.expect_next_try()
}

#[test]
fn an_agent_that_was_told_to_stop_finishes_one_move_and_refuses_another() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let late = Container::create(
        &a,
        "late",
        &Workload::memory_writer(8, 0),
        &ContainerOptions::default(),
    )?;
    let mut agent = stage.agent(&[])?;
    let mut moving = stage.start_move("web", &["MIGRATE_FAULT=source:Round:stop"])?;
    wait_stopped(&mut moving)?;
    agent.signal(Signal::SIGTERM)?;
    agent.wait_for("nothing new is taken", LIMIT)?;
    let mut refused = stage.start_move("late", &[])?;
    stage.expect_exit(&mut refused, 3)?;
    ensure!(late.verify(&a, LIMIT)?.verified);
    late.delete(&a)?;
    moving.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 0)?;
    ensure!(agent.wait(LIMIT)?.success(), "{}", agent.output()?);
    let verified = stage.container.verify(&b, LIMIT)?;
    ensure!(verified.verified, "{verified:?}");
    Ok(())
}

#[test]
fn a_source_that_the_target_does_not_trust_is_not_let_in() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    b.run("migrate", ["trust", "remove", "a"])?;
    expect_refused(&stage, &agent, "")?;
    rig::introduce(&b, &a)?;
    stage.expect_next_try()
}

#[test]
fn a_target_that_shows_another_certificate_than_the_trusted_gets_nothing() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    a.run("migrate", ["trust", "remove", "b"])?;
    let wrong = format!("sha256:{}", "ab".repeat(32));
    a.run("migrate", ["trust", "add", "b", &wrong])?;
    expect_refused(&stage, &agent, "")
}

#[test]
fn a_memory_limit_below_what_is_in_use_is_refused() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let config = a.path("/srv/web/config.json");
    let good = std::fs::read_to_string(&config)?;
    let mut spec: serde_json::Value = serde_json::from_str(&good)?;
    spec["linux"]["resources"]["memory"] = serde_json::json!({ "limit": 8 << 20 });
    std::fs::write(&config, spec.to_string())?;
    expect_refused(&stage, &agent, "memory limit")?;
    std::fs::write(&config, good)?;
    stage.expect_next_try()
}

/// Such a container would only fail at the freeze, or worse, be carried off without what cannot move.
#[test]
fn processes_that_criu_cannot_take_along_are_refused_before_anything_is_touched() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    for (oddity, why) in [
        ("--watched", "watches its own memory by userfaultfd"),
        ("--leaderless", "goes on without its first thread"),
    ] {
        let workload = Workload::memory_writer(8, 0).arg(oddity);
        let odd = Container::create(&a, "odd", &workload, &ContainerOptions::default())?;
        let mut moving = stage.start_move("odd", &[HASTE])?;
        stage.expect_exit(&mut moving, 3)?;
        let said = moving.output()?;
        ensure!(said.contains(why), "it does not say {why:?}:\n{said}");
        ensure!(odd.verify(&a, LIMIT)?.verified);
        odd.delete(&a)?;
        std::fs::remove_dir_all(a.path("/srv/odd"))?;
    }
    stage.expect_untouched(&agent)?;
    stage.expect_next_try()
}

#[test]
fn a_disk_that_fills_up_at_the_target_costs_the_container_nothing() -> Result<()> {
    let small = HostOptions {
        state_mib: Some(96),
    };
    let (a, b) = (Host::new("a")?, Host::with_options("b", &small)?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let mut moving = stage.start_move("web", &[HASTE, "MIGRATE_FAULT=source:Round:stop"])?;
    wait_stopped(&mut moving)?;
    let filler = b.path("/var/lib/migrate/filler");
    let full = std::fs::write(&filler, vec![0; 128 << 20]);
    ensure!(full.is_err(), "the disk is larger than it should be");
    moving.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 4)?;
    std::fs::remove_file(&filler)?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}
