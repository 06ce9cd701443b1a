//! What CRIU carries while the container stands still is said or refused by its figure before the freeze; and a link that is
//! slow is no link that is dead.

use crate::stage::{HASTE, Stage};
use anyhow::{Context, Result, ensure};
use rig::{Host, Workload};
use std::fs;

/// Pages cross at a megabyte a second, much longer than a dead link is waited for.
#[test]
fn a_slow_link_is_waited_for_as_long_as_anything_comes() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::with_workload(&a, &b, &Workload::memory_writer(16, 0))?;
    stage.link.limit_rate(8)?;
    let haste = "MIGRATE_FAULT_HASTE=60";
    let _agent = stage.agent(&[haste])?;
    let options = ["--compress=none", "--mode=pre-copy"];
    let mut moving = stage.start_move_with(&options, &[haste])?;
    stage.expect_exit(&mut moving, 0)?;
    stage.expect_moved()
}

#[test]
fn contents_of_tmpfs_are_refused_by_their_figure_where_a_limit_was_asked_for() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let shm = format!("/proc/{}/root/dev/shm/full", stage.container.pid(&a)?);
    fs::write(&shm, vec![7; 24 << 20]).context("filling the container's tmpfs")?;

    let limit = ["--downtime-limit=400", "--mode=pre-copy"];
    let mut moving = stage.start_move_with(&limit, &[HASTE])?;
    stage.expect_exit(&mut moving, 3)?;
    let said = moving.output()?;
    ensure!(said.contains("24 MiB in tmpfs would be carried"), "{said}");

    // A tmpfs that fills up during the rounds is seen before the freeze.
    fs::remove_file(&shm)?;
    let mut moving = stage.start_move_with(&limit, &[HASTE, "MIGRATE_FAULT=source:Round:stop"])?;
    crate::stage::wait_stopped(&mut moving)?;
    fs::write(&shm, vec![7; 24 << 20])?;
    moving.signal(nix::sys::signal::Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 4)?;
    let said = moving.output()?;
    ensure!(said.contains("24 MiB in tmpfs would be carried"), "{said}");
    ensure!(!said.contains("frozen after"), "{said}");
    stage.expect_rolled_back(Some(&agent))?;

    // Without such a limit it is said, and moves.
    let mut moving = stage.start_move_with(&["--dry-run"], &[])?;
    stage.expect_exit(&mut moving, 0)?;
    let said = moving.output()?;
    ensure!(
        said.contains("24 MiB in tmpfs: the container stands still"),
        "{said}"
    );
    stage.expect_next_try()?;
    let arrived = format!("/proc/{}/root/dev/shm/full", stage.container.pid(&b)?);
    ensure!(
        fs::read(arrived)? == vec![7; 24 << 20],
        "its tmpfs is another"
    );
    Ok(())
}
