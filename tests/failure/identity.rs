//! A container is known by what it is and not by its name: who may touch it, and what has only its name.

use crate::stage::{HASTE, LIMIT, Stage, find, signal, wait_stopped};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{Container, ContainerOptions, Host, Link, Running, Workload, introduce};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where an agent keeps what came to its host under the name `web`.
const HOME: &str = "/var/lib/migrate/containers/web";

fn small() -> Workload {
    Workload::memory_writer(8, 0)
}

/// Waits until a condition holds.
fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !holds()? {
        ensure!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn status(container: &Container, host: &Host) -> Result<Option<String>> {
    let state = container.state(host)?;
    Ok(state.and_then(|state| state["status"].as_str().map(str::to_owned)))
}

/// Kills the source with its guard, as a host's out-of-memory killer might.
fn kill_with_guard(moving: &mut Running) -> Result<()> {
    let guard = find(moving, &["migrate", "guard"])?;
    signal(guard, Signal::SIGKILL)?;
    moving.signal(Signal::SIGKILL)?;
    moving.wait(LIMIT).map(drop)
}

/// Starts an agent at the first host, which is a target for once.
fn agent_at_source(stage: &Stage) -> Result<Running> {
    let listen = format!("{}:7070", stage.link.first());
    let mut agent = stage.a.spawn("migrate", ["agent", "--listen", &listen])?;
    agent.wait_for("listening", LIMIT)?;
    Ok(agent)
}

#[test]
fn a_container_that_is_being_moved_is_refused_to_everyone_else_and_told_who_has_it() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let _agent = stage.agent(&[HASTE])?;
    let mut moving = stage.start_move("web", &["MIGRATE_FAULT=source:Round:stop"])?;
    wait_stopped(&mut moving)?;
    let holder = format!("process {} is moving it to", moving.pid());
    let elsewhere = [
        "--state-dir",
        "/srv/state",
        "--runtime-root",
        "/run/../run/runc",
    ];
    for options in [
        &[][..],
        &["--dry-run"],
        &["--mode", "post-copy"],
        &elsewhere,
    ] {
        let mut second = stage.start_move_with(options, &[])?;
        stage.expect_exit(&mut second, 3)?;
        let said = second.output()?;
        ensure!(
            said.contains("container web is taken") && said.contains(&holder),
            "{options:?}: {said}"
        );
        ensure!(
            said.contains("since 20") && said.contains(":7070"),
            "{said}"
        );
    }
    ensure!(!a.path("/srv/state").exists(), "something was touched");
    let said = a.run("migrate", ["recover"])?;
    ensure!(
        said.contains("left alone") && said.contains(&holder),
        "{said}"
    );
    moving.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 0)?;
    stage.expect_moved()
}

/// The engine dies, and its guard cannot learn how it ended: nobody comes in between.
#[test]
fn the_guard_has_the_container_without_a_gap_when_the_engine_dies() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let mut moving = stage.start_move("web", &["MIGRATE_FAULT=source:SendCommit:stop"])?;
    wait_stopped(&mut moving)?;
    stage.link.down()?;
    moving.kill()?;
    moving.wait(LIMIT)?;
    for _ in 0..10 {
        let mut second = stage.start_move("web", &[])?;
        stage.expect_exit(&mut second, 3)?;
        let said = second.output()?;
        ensure!(said.contains("container web is taken"), "{said}");
    }
    let said = a.run("migrate", ["recover"])?;
    ensure!(said.contains("left alone"), "{said}");
    ensure!(status(&stage.container, &a)?.as_deref() == Some("paused"));
    stage.link.up()?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

#[test]
fn a_container_of_that_name_that_comes_while_the_move_runs_survives_its_end() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    // Files that take long: until they are there the restore is not begun, and the name is free.
    let blob: Vec<u8> = (0..48 << 20).map(|at: u32| (at >> 8 ^ at) as u8).collect();
    fs::write(a.path("/srv/web/rootfs/blob"), blob)?;
    let mut agent = stage.agent(&[HASTE])?;
    let slow = [
        "--bandwidth-limit",
        "1M",
        "--compress",
        "none",
        "--mode",
        "pre-copy",
    ];
    let mut moving = stage.start_move_with(&slow, &[HASTE])?;
    agent.wait_for("accepted=true", LIMIT)?;
    let other = Container::create(&b, "web", &small(), &ContainerOptions::default())?;
    let pid = other.pid(&b)?;
    moving.signal(Signal::SIGINT)?;
    stage.expect_exit(&mut moving, 4)?;
    wait_until("the arrival is undone", || Ok(!b.path(HOME).exists()))?;
    ensure!(other.verify(&b, LIMIT)?.verified && other.pid(&b)? == pid);
    // Nor is it harmed when it has ended: what it left is somebody's, too.
    b.run("runc", ["kill", "web", "KILL"])?;
    wait_until("it is stopped", || {
        Ok(status(&other, &b)?.as_deref() == Some("stopped"))
    })?;
    let said = b.run("migrate", ["recover"])?;
    ensure!(said.contains("nothing to recover"), "{said}");
    ensure!(status(&other, &b)?.as_deref() == Some("stopped"));
    other.delete(&b)?;
    fs::remove_dir_all(b.path("/srv/web"))?;
    fs::remove_file(a.path("/srv/web/rootfs/blob"))?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

#[test]
fn a_directory_and_a_cgroup_that_are_somebody_elses_are_left_alone() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    fs::create_dir_all(b.path(HOME))?;
    fs::write(b.path(HOME).join("only-copy"), "theirs")?;
    let mut refused = stage.start_move("web", &[HASTE])?;
    stage.expect_exit(&mut refused, 3)?;
    let said = refused.output()?;
    ensure!(said.contains("exists already"), "{said}");
    ensure!(fs::read(b.path(HOME).join("only-copy"))? == b"theirs");
    fs::remove_dir_all(b.path(HOME))?;

    // The cgroup that the restore is to make, with a process in it that has nothing to do with the container.
    const OCCUPY: &str = r#"set -e
        for root in /sys/fs/cgroup/freezer /sys/fs/cgroup; do
            [ -e $root/cgroup.procs ] || continue
            mkdir $root/web
            echo $$ >$root/web/cgroup.procs
            exec sleep 1000
        done"#;
    let mut theirs = b.spawn("sh", ["-c", OCCUPY])?;
    wait_until("it is in the cgroup", || {
        let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", theirs.pid()))?;
        Ok(cgroups.lines().any(|line| line.ends_with("/web")))
    })?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    stage.expect_exit(&mut moving, 4)?;
    let said = moving.output()?;
    ensure!(said.contains("not its own"), "{said}");
    ensure!(theirs.is_alive()?, "a stranger's process was killed");
    theirs.kill()?;
    theirs.wait(LIMIT)?;
    b.run(
        "sh",
        [
            "-c",
            "rmdir /sys/fs/cgroup/freezer/web || rmdir /sys/fs/cgroup/web",
        ],
    )?;
    stage.expect_rolled_back(Some(&agent))?;
    stage.expect_next_try()
}

#[test]
fn a_journal_never_acts_on_a_container_that_came_back() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let _at_b = stage.agent(&[HASTE])?;
    let mut at_a = agent_at_source(&stage)?;
    // "committed" is on disk at both ends, the frozen copy is there, and nobody is left to end it.
    let mut moving = stage.start_move("web", &["MIGRATE_FAULT=source:DestroyFrozenCopy:stop"])?;
    wait_stopped(&mut moving)?;
    kill_with_guard(&mut moving)?;
    a.run("runc", ["delete", "--force", "web"])?;
    let back = format!("{}:7070", stage.link.first());
    let mut returning = b.spawn("migrate", ["--to", &back, "web"])?;
    stage.expect_exit(&mut returning, 0)?;
    let pid = stage.container.pid(&a)?;
    let lives = |after: &str| -> Result<()> {
        let verified = stage
            .container
            .verify(&a, LIMIT)
            .context(after.to_owned())?;
        ensure!(verified.verified, "{after}: {verified:?}");
        ensure!(
            stage.container.pid(&a)? == pid,
            "{after}: another container"
        );
        ensure!(
            status(&stage.container, &b)?.is_none(),
            "{after}: at both hosts"
        );
        Ok(())
    };
    lives("before recovery")?;
    let said = a.run("migrate", ["recover"])?;
    ensure!(said.contains("lives at the target"), "{said}");
    lives("after recovery")?;
    at_a.kill()?;
    at_a.wait(LIMIT)?;
    let _at_a = agent_at_source(&stage)?;
    lives("after a restart of the agent")?;
    let said = a.run("migrate", ["recover"])?;
    ensure!(said.contains("nothing to recover"), "{said}");
    lives("in the end")
}

#[test]
fn a_dead_attempt_is_ended_without_touching_what_a_later_one_holds() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let _agent = stage.agent(&[HASTE])?;
    let mut dead = stage.start_move("web", &["MIGRATE_FAULT=source:Round:stop"])?;
    wait_stopped(&mut dead)?;
    kill_with_guard(&mut dead)?;
    // What the target has of it goes when the connection is seen to be lost.
    wait_until("the first arrival is undone", || Ok(!b.path(HOME).exists()))?;
    let mut later = stage.start_move("web", &["MIGRATE_FAULT=source:SendImages:stop"])?;
    wait_stopped(&mut later)?;
    ensure!(status(&stage.container, &a)?.as_deref() == Some("paused"));
    a.run("migrate", ["recover"])?;
    ensure!(
        status(&stage.container, &a)?.as_deref() == Some("paused"),
        "it was thawed under the later attempt's hands"
    );
    later.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut later, 0)?;
    stage.expect_moved()
}

/// It even has the same journal id, and a record that says what would make a second copy run.
#[test]
fn another_trusted_host_at_the_targets_address_is_not_believed() -> Result<()> {
    let (a, b, c) = (Host::new("a")?, Host::new("b")?, Host::new("c")?);
    let stage = Stage::new(&a, &b)?;
    let mut agent = stage.agent(&[HASTE, "MIGRATE_FAULT=target:AnswerCommitted:stop"])?;
    let mut moving = stage.start_move("web", &[HASTE])?;
    wait_stopped(&mut agent)?;
    stage.link.down()?;
    let guard = find(&moving, &["migrate", "guard"])?;
    agent.signal(Signal::SIGCONT)?;
    stage.expect_exit(&mut moving, 5)?;
    signal(guard, Signal::SIGKILL)?;

    let _cable = Link::join(&a, &c)?;
    introduce(&a, &c)?;
    let taken = format!("{}/32", stage.link.second());
    a.run("ip", ["route", "replace", &taken, "dev", "to-c"])?;
    c.run("ip", ["address", "add", &taken, "dev", "to-a"])?;
    let journals = Path::new("/var/lib/migrate/journal");
    fs::create_dir_all(c.path(journals))?;
    for file in fs::read_dir(b.path(journals))? {
        let file = file?;
        let mut text = fs::read_to_string(file.path())?;
        if let Some(at) = text.find("{\"record\":\"committed\"}") {
            text.truncate(at);
            text += "{\"record\":\"aborted\"}\n";
        }
        fs::write(c.path(journals).join(file.file_name()), text)?;
    }
    let listen = format!("{}:7070", stage.link.second());
    let mut impostor = c.spawn("migrate", ["agent", "--listen", &listen])?;
    impostor.wait_for("listening", LIMIT)?;
    let mut recover = a.spawn("migrate", ["recover"])?;
    stage.expect_exit(&mut recover, 5)?;
    let said = recover.output()?;
    ensure!(said.contains("its word does not count"), "{said}");
    ensure!(
        status(&stage.container, &a)?.as_deref() == Some("paused"),
        "a stranger's word let it go on"
    );

    a.run("ip", ["route", "del", &taken, "dev", "to-c"])?;
    stage.link.up()?;
    let said = a.run("migrate", ["recover"])?;
    ensure!(said.contains("lives at the target"), "{said}");
    ensure!(stage.container.verify(&b, LIMIT)?.verified);
    ensure!(status(&stage.container, &a)?.is_none());
    Ok(())
}
