//! What keeps a frozen container waiting: it goes on at the source within its bound, whoever stands still or dies, and is
//! afterwards as it was before. Processes that were stopped stay stopped, on either host.

use crate::stage::{HASTE, LIMIT, Stage, find, signal, wait_stopped};
use anyhow::{Result, ensure};
use migrate::kernel::ptrace::{TraceOptions, trace};
use nix::sys::signal::Signal;
use rig::{Host, Running, Workload};
use std::fs;
use std::time::{Duration, Instant};

#[test]
fn a_stopped_process_moves_and_stays_stopped() -> Result<()> {
    moves_stopped("pre-copy")
}

#[test]
fn a_stopped_process_moves_without_its_memory_and_stays_stopped() -> Result<()> {
    moves_stopped("post-copy")
}

fn moves_stopped(mode: &str) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[])?;
    stop(stage.container.pid(&a)?)?;
    let mut moving = stage.start_move_with(&["--mode", mode], &[])?;
    stage
        .expect_exit(&mut moving, 0)
        .map_err(|error| error.context(agent.output().unwrap_or_default()))?;
    goes_on_when_continued(&stage, &b)?;
    ensure!(agent.is_alive()?);
    stage.expect_moved()
}

#[test]
fn a_stopped_process_is_stopped_still_after_a_rollback() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[])?;
    stop(stage.container.pid(&a)?)?;
    for step in ["SendDelta", "SendImages"] {
        let fault = format!("MIGRATE_FAULT=source:{step}:stop");
        let mut moving = stage.start_move("web", &[&fault])?;
        wait_stopped(&mut moving)?;
        moving.signal(Signal::SIGINT)?;
        moving.signal(Signal::SIGCONT)?;
        stage.expect_exit(&mut moving, 4)?;
        // Not in passing: nothing that is still to come lets it run.
        wait_for_state(stage.container.pid(&a)?, 'T')?;
    }
    goes_on_when_continued(&stage, &a)?;
    stage.expect_rolled_back(Some(&agent))
}

/// Before, it was waited for as long as the connection lived, and its end was the reason given.
#[test]
fn ctrl_c_is_heard_while_the_target_takes_nothing() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[])?;
    let mut moving = stage.start_move("web", &["MIGRATE_FAULT=source:SendDelta:stop"])?;
    wait_stopped(&mut moving)?;
    agent.signal(Signal::SIGSTOP)?;
    moving.signal(Signal::SIGCONT)?;
    // It has gone on when CRIU has.
    wait_for_tracer(stage.container.pid(&a)?, "criu")?;
    moving.signal(Signal::SIGINT)?;
    stage.expect_exit(&mut moving, 4)?;
    let said = moving.output()?;
    ensure!(said.contains("cancelled"), "{said}");
    agent.signal(Signal::SIGCONT)?;
    stage.expect_rolled_back(Some(&agent))
}

#[test]
fn criu_killed_in_the_middle_of_its_dump_costs_the_container_only_the_wait() -> Result<()> {
    harmed_in_the_dump(|_, criu| signal(criu, Signal::SIGKILL))
}

/// CRIU goes on without it, and nobody would wait for it.
#[test]
fn a_runtime_killed_in_the_middle_of_the_dump_leaves_no_criu_at_work() -> Result<()> {
    harmed_in_the_dump(|moving, _| signal(find(moving, &["runc", "checkpoint"])?, Signal::SIGKILL))
}

#[test]
fn a_criu_that_stands_still_does_not_hold_the_container() -> Result<()> {
    harmed_in_the_dump(|moving, criu| {
        signal(criu, Signal::SIGSTOP)?;
        moving.signal(Signal::SIGINT)
    })
}

/// Does the harm to a dump of many processes when CRIU has taken hold of the first.
fn harmed_in_the_dump(harm: impl FnOnce(&mut Running, i32) -> Result<()>) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::with_workload(&a, &b, &Workload::zoo(false))?;
    let agent = stage.agent(&[HASTE])?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    let criu = wait_for_tracer(stage.container.pid(&a)?, "criu")?;
    harm(&mut moving, criu)?;
    stage.expect_exit(&mut moving, 4)?;
    stage
        .expect_rolled_back(Some(&agent))
        .map_err(|error| error.context(moving.output().unwrap_or_default()))?;
    stage.expect_next_try()
}

#[test]
fn a_container_with_a_debugger_in_it_is_refused() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[])?;
    let pid = stage.container.pid(&a)?;
    trace(|tracer| -> Result<()> {
        let held = tracer.stop(pid, TraceOptions::NONE, LIMIT)?;
        let mut moving = stage.start_move("web", &[])?;
        stage.expect_exit(&mut moving, 3)?;
        let said = moving.output()?;
        ensure!(said.contains("is traced by"), "{said}");
        drop(held);
        Ok(())
    })?;
    stage.expect_untouched(&agent)
}

fn stop(pid: i32) -> Result<()> {
    signal(pid, Signal::SIGSTOP)?;
    wait_for_state(pid, 'T')
}

/// The container's first process is stopped on `host`, and works once it is told to continue.
fn goes_on_when_continued(stage: &Stage, host: &Host) -> Result<()> {
    let pid = stage.container.pid(host)?;
    wait_for_state(pid, 'T')?;
    let before = stage.container.log(host)?.len();
    signal(pid, Signal::SIGCONT)?;
    wait_until("it does not go on", || {
        Ok(stage.container.log(host)?.len() > before)
    })
}

fn wait_for_state(pid: i32, state: char) -> Result<()> {
    wait_until(&format!("process {pid} is not in state {state}"), || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let now = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        Ok(now == Some(state))
    })
}

/// Waits until a process is traced by a program of that name, and returns its id.
fn wait_for_tracer(pid: i32, name: &str) -> Result<i32> {
    let mut tracer = 0;
    wait_until(&format!("no {name} has hold of process {pid}"), || {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let found = status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"));
        tracer = found
            .and_then(|found| found.trim().parse().ok())
            .unwrap_or(0);
        let comm = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
        Ok(tracer != 0 && comm.trim() == name)
    })?;
    Ok(tracer)
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
