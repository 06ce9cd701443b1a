//! A container that cannot move is refused before anything is touched, and moves when the reason is gone.

use crate::stage::{HASTE, LIMIT, Stage, wait_stopped};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{Container, ContainerOptions, Host, HostOptions, Running, Workload};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// The move of a container is refused with a line that has `why` in it.
fn expect_refusal(stage: &Stage, id: &str, why: &str) -> Result<()> {
    let mut moving = stage.start_move(id, &[HASTE])?;
    stage.expect_exit(&mut moving, 3)?;
    let said = moving.output()?;
    ensure!(said.contains(why), "it does not say {why:?}:\n{said}");
    Ok(())
}

/// The same for `web`, and all is as it was.
fn expect_refused(stage: &Stage, agent: &Running, why: &str) -> Result<()> {
    expect_refusal(stage, "web", why)?;
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
    expect_refusal(&stage, "web", "exists at the target")?;
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
    expect_refused(&stage, &agent, "does not trust this host")?;
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
    expect_refused(&stage, &agent, "is not trusted here")
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
        expect_refusal(&stage, "odd", why)?;
        ensure!(odd.verify(&a, LIMIT)?.verified);
        odd.delete(&a)?;
        std::fs::remove_dir_all(a.path("/srv/odd"))?;
    }
    stage.expect_untouched(&agent)?;
    stage.expect_next_try()
}

/// Whoever writes to memory when nobody can tell is refused before anything is touched, with the process as the container knows it.
#[test]
fn rings_that_the_kernel_writes_by_are_refused_by_name() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    for (ring, why) in [
        (
            "--ring",
            "process 1 (kernel-writer) in container odd uses io_uring",
        ),
        (
            "--aio",
            "process 1 (kernel-writer) in container odd uses libaio and has /blocks open",
        ),
    ] {
        let workload = Workload::kernel_writer(8).arg("--readers=0").arg(ring);
        let odd = Container::create(&a, "odd", &workload, &ContainerOptions::default())?;
        expect_refusal(&stage, "odd", why)?;
        ensure!(odd.verify(&a, LIMIT)?.verified);
        odd.delete(&a)?;
        std::fs::remove_dir_all(a.path("/srv/odd"))?;
    }
    stage.expect_untouched(&agent)?;
    stage.expect_next_try()
}

/// The move ends with the same words: before the freeze, or in it if it came after the last look.
#[test]
fn a_ring_that_comes_during_the_move_ends_it() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    for (late, step, why) in [
        ("--late-ring", "Round", "uses io_uring"),
        (
            "--late-aio",
            "FreezeContainer",
            "uses libaio and has /blocks open",
        ),
    ] {
        let workload = Workload::kernel_writer(64).arg("--readers=0").arg(late);
        let odd = Container::create(&a, "late", &workload, &ContainerOptions::default())?;
        let fault = format!("MIGRATE_FAULT=source:{step}:stop");
        let mut moving = stage.start_move("late", &[&fault, HASTE])?;
        wait_stopped(&mut moving)?;
        odd.signal(&a, "USR2")?;
        let deadline = Instant::now() + LIMIT;
        while !odd.log(&a)?.iter().any(|line| line["late"] == true) {
            ensure!(Instant::now() < deadline, "it makes no ring");
            std::thread::sleep(Duration::from_millis(10));
        }
        moving.signal(Signal::SIGCONT)?;
        stage.expect_exit(&mut moving, 4)?;
        let said = moving.output()?;
        let why = format!("process 1 (kernel-writer) in container late {why}");
        ensure!(said.contains(&why), "{said}");
        ensure!(said.contains("of downtime") == (step != "Round"), "{said}");
        ensure!(odd.verify(&a, LIMIT)?.verified);
        odd.delete(&a)?;
        std::fs::remove_dir_all(a.path("/srv/late"))?;
    }
    stage.expect_untouched(&agent)
}

/// Of a container that works, one thing at a time is made so that it cannot move.
#[test]
fn a_container_that_is_tied_to_its_host_is_refused_until_it_is_not() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;

    let config = a.path("/srv/web/config.json");
    let good = std::fs::read_to_string(&config)?;
    type Edit = fn(&mut Value);
    let edits: [(Edit, &str); 2] = [
        (
            |spec| spec["process"]["terminal"] = json!(true),
            "has a terminal",
        ),
        (
            |spec| {
                let mount = json!({ "destination": "/x", "source": "data", "options": ["bind"] });
                spec["mounts"] = json!([mount]);
            },
            "no plain absolute path",
        ),
    ];
    for (edit, why) in edits {
        let mut spec = serde_json::from_str(&good)?;
        edit(&mut spec);
        std::fs::write(&config, spec.to_string())?;
        expect_refusal(&stage, "web", why)?;
    }
    std::fs::write(&config, good)?;

    let network = format!("--net=/proc/{}/ns/net", stage.container.pid(&a)?);
    let link = |what: &[&str]| a.run("nsenter", [&[&network, "ip", "link"], what].concat());
    link(&["add", "dev0", "type", "veth", "peer", "name", "dev1"])?;
    expect_refusal(&stage, "web", "network has dev")?;
    link(&["del", "dev0"])?;

    a.run("runc", ["pause", "web"])?;
    expect_refusal(&stage, "web", "is paused")?;
    a.run("runc", ["resume", "web"])?;

    stage.expect_untouched(&agent)?;
    stage.expect_next_try()
}

/// Each is started in its own way from one bundle.
#[test]
fn a_container_that_was_started_so_that_it_cannot_move_is_refused() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let plain = Container::create(
        &a,
        "odd",
        &Workload::memory_writer(8, 0),
        &ContainerOptions::default(),
    )?;
    plain.delete(&a)?;
    let config = a.path("/srv/odd/config.json");
    let good = std::fs::read_to_string(&config)?;
    let with_namespace_of_host = |kind: &str| -> Result<String> {
        let mut spec: Value = serde_json::from_str(&good)?;
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        namespaces
            .context("it has namespaces")?
            .retain(|namespace| namespace["type"] != kind);
        Ok(spec.to_string())
    };
    let null = "</dev/null >/dev/null 2>&1";
    let cases = [
        (
            good.clone(),
            format!("runc create --bundle /srv/odd odd {null}"),
            "never started",
        ),
        (
            good.clone(),
            format!(
                "runc run --detach --bundle /srv/odd odd {null}; runc kill odd KILL; while ! runc state odd | grep -q stopped; do sleep 0.05; done"
            ),
            "is stopped",
        ),
        (
            good.clone(),
            "runc run --detach --bundle /srv/odd odd </dev/null >/srv/odd/said 2>/dev/null".into(),
            "standard output of the container is /srv/odd/said",
        ),
        (
            good.clone(),
            format!(
                "runc run --detach --preserve-fds 1 --bundle /srv/odd odd {null} 3>/srv/odd/said"
            ),
            "of this host open",
        ),
        (
            with_namespace_of_host("network")?,
            format!("runc run --detach --bundle /srv/odd odd {null}"),
            "shares this host's network namespace",
        ),
    ];
    for (spec, start, why) in cases {
        std::fs::write(&config, spec)?;
        a.run("sh", ["-c", &start])
            .and_then(|_| expect_refusal(&stage, "odd", why))
            .with_context(|| start)?;
        a.run("runc", ["delete", "--force", "odd"])?;
    }
    std::fs::remove_dir_all(a.path("/srv/odd"))?;
    stage.expect_untouched(&agent)
}

/// CRIU would fail at the freeze.
#[test]
fn processes_of_another_user_are_refused_without_the_right_to_read_their_limits() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let other = ContainerOptions {
        user: 1000,
        ..ContainerOptions::default()
    };
    let odd = Container::create(&a, "odd", &Workload::memory_writer(8, 0), &other)?;
    let without = ["setpriv", "--bounding-set=-sys_resource"];
    let mut moving = stage.start_move("odd", &without)?;
    stage.expect_exit(&mut moving, 3)?;
    let said = moving.output()?;
    ensure!(said.contains("CAP_SYS_RESOURCE"), "{said}");
    odd.delete(&a)?;
    std::fs::remove_dir_all(a.path("/srv/odd"))?;
    stage.expect_untouched(&agent)
}

#[test]
fn a_disk_that_fills_up_at_the_target_costs_the_container_nothing() -> Result<()> {
    let small = HostOptions {
        state_mib: Some(96),
        ..HostOptions::default()
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

/// A container whose bind mounts are other ones at the target would go on with other data.
#[test]
fn what_is_mounted_from_the_host_moves_only_if_the_target_has_proven_the_same() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let _agent = stage.agent(&[HASTE])?;
    // What a network filesystem does: one directory at the same path of both hosts.
    let network = tempfile::tempdir_in("/var/tmp")?;
    let source = network.path().display().to_string();
    for host in [&a, &b] {
        std::fs::create_dir(host.path("/srv/volume"))?;
        std::fs::write(host.path("/srv/fixed"), host.name())?;
    }
    a.run("mount", ["--bind", &source, "/srv/volume"])?;
    std::fs::create_dir(network.path().join("data"))?;
    std::fs::create_dir(b.path("/srv/volume/data"))?;
    let bind = |source: &str, access: &str| json!({ "destination": source, "type": "bind", "source": source, "options": ["rbind", access] });
    let options = ContainerOptions {
        mounts: vec![bind("/srv/volume/data", "rw"), bind("/srv/fixed", "ro")],
        ..ContainerOptions::default()
    };
    let workload = Workload::memory_writer(8, 0);
    let bound = Container::create(&a, "bound", &workload, &options)?;
    let to = format!("{}:7070", stage.link.second());
    let expect = |shared: &[&str], code: i32, why: &str| -> Result<()> {
        let mut command = vec!["migrate", "--to", &to, "bound"];
        command.extend(shared.iter().flat_map(|path| ["--shared", *path]));
        let mut moving = a.spawn("env", [&[HASTE][..], &command].concat())?;
        stage.expect_exit(&mut moving, code)?;
        let said = moving.output()?;
        ensure!(said.contains(why), "it does not say {why:?}:\n{said}");
        let left = std::fs::read_dir(network.path().join("data"))?.count();
        ensure!(left == 0, "proofs are left in the volume");
        Ok(())
    };
    expect(&[], 3, "say --shared /srv/volume/data")?;
    expect(&["/srv/volume"], 3, "say --shared /srv/fixed")?;
    expect(
        &["/srv/volume", "/srv/fixed"],
        3,
        "does not have the same: /srv/volume/data",
    )?;
    b.run("mount", ["--bind", &source, "/srv/volume"])?;
    expect(
        &["/srv/volume", "/srv/fixed"],
        3,
        "does not have the same: /srv/fixed",
    )?;
    ensure!(bound.verify(&a, LIMIT)?.verified);
    ensure!(
        bound.state(&b)?.is_none(),
        "something of it is at the target"
    );
    std::fs::write(b.path("/srv/fixed"), a.name())?;
    expect(&["/srv/volume", "/srv/fixed"], 0, "")?;
    ensure!(bound.verify(&b, LIMIT)?.verified);
    std::fs::write(network.path().join("data/seen"), "by both")?;
    let inside = format!("/proc/{}/root/srv/volume/data/seen", bound.pid(&b)?);
    ensure!(std::fs::read_to_string(inside)? == "by both");
    Ok(())
}

/// Whoever writes a container's annotations need not be root of the host.
#[test]
fn an_annotation_makes_no_path_of_the_host() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let stage = Stage::new(&a, &b)?;
    let agent = stage.agent(&[HASTE])?;
    let annotation = (
        "org.criu.config".to_owned(),
        json!("/srv/made/by/annotation"),
    );
    let options = ContainerOptions {
        annotations: [annotation].into_iter().collect(),
        ..ContainerOptions::default()
    };
    let workload = Workload::memory_writer(8, 0);
    let noted = Container::create(&a, "noted", &workload, &options)?;
    expect_refusal(
        &stage,
        "noted",
        "org.criu.config names \"/srv/made/by/annotation\"",
    )?;
    for host in [&a, &b] {
        ensure!(!host.path("/srv/made").exists());
    }
    ensure!(noted.verify(&a, LIMIT)?.verified);
    noted.delete(&a)?;
    std::fs::remove_dir_all(a.path("/srv/noted"))?;
    stage.expect_untouched(&agent)
}
