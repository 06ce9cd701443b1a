//! The rig itself: hosts are apart, leave nothing, and hold real containers that CRIU can move.
//! Needs root, runc and CRIU; fails without them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use rig::{
    Container, ContainerOptions, Host, HostOptions, Link, PeakMemory, Workload, checkpoint,
    copy_container_files, cpu_seconds, restore,
};

const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn a_host_has_its_own_network_mounts_and_cgroups() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    for host in [&a, &b] {
        assert_eq!(
            host.run("ip", ["-brief", "link"])?.lines().count(),
            1,
            "only the loopback"
        );
        std::fs::write(host.path("/run/mark"), host.name())?;
        std::fs::write(host.path("/var/lib/migrate/mark"), host.name())?;
        std::fs::create_dir_all(host.path("/etc/criu"))?;
        let cgroups = host.run("cat", ["/proc/self/cgroup"])?;
        assert!(
            cgroups.lines().all(|line| line.ends_with(":/rig")),
            "{cgroups}"
        );
    }
    for host in [&a, &b] {
        assert_eq!(
            host.run("cat", ["/run/mark", "/var/lib/migrate/mark"])?,
            host.name().repeat(2)
        );
    }
    assert!(
        !PathBuf::from("/etc/criu").exists(),
        "the machine's own /etc stays as it was"
    );
    Ok(())
}

#[test]
fn a_link_carries_packets_until_it_is_cut() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let link = Link::join(&a, &b)?;
    // Nobody listens there: a refusal is an answer of the other host.
    let knock = format!("timeout 60 bash -c 'echo > /dev/tcp/{}/7'", link.second());
    let answers = || {
        Ok::<_, anyhow::Error>(
            a.run("sh", ["-c", &knock])
                .unwrap_err()
                .to_string()
                .contains("refused"),
        )
    };
    assert!(answers()?);
    link.down()?;
    assert!(!answers()?);
    link.up()?;
    link.set_mtu(9000)?;
    link.limit_rate(100)?;
    assert!(answers()?);
    assert!(link.bytes_sent()?.iter().all(|&bytes| bytes > 0));
    Ok(())
}

#[test]
fn a_dropped_host_leaves_nothing() -> Result<()> {
    let host = Host::new("gone")?;
    let mut sleeper = host.spawn("sleep", ["1000"])?;
    // What a daemon does: out of the process group and session of whoever started it.
    host.run(
        "sh",
        ["-c", "setsid sleep 1000 >/dev/null 2>&1 </dev/null &"],
    )?;
    let seen = std::fs::canonicalize(host.path("/srv"))?;
    drop(host);
    assert!(!sleeper.wait(LIMIT)?.success());
    assert!(!seen.join("srv").exists());
    Ok(())
}

#[test]
fn what_appears_on_a_host_is_found_as_left_over() -> Result<()> {
    let host = Host::new("a")?;
    let before = host.snapshot()?;
    assert_eq!(before.leftovers(&host)?, Vec::<String>::new());
    host.run("sh", ["-c", "set -e; touch /run/file; nft add table inet left; ip link add left0 type veth peer name left1; mount -t tmpfs x /mnt"])?;
    let mut sleeper = host.spawn("sh", ["-c", "echo up; sleep 1000"])?;
    sleeper.wait_for("up", LIMIT)?;
    let found = before.leftovers(&host)?;
    let process = format!("process {} sh", sleeper.pid());
    for thing in [
        "file /run/file",
        "nft table inet left",
        "interface left0",
        "mount /mnt",
        &process,
    ] {
        assert!(
            found.iter().any(|left| left == thing),
            "{thing} is not in {found:?}"
        );
    }
    Ok(())
}

#[test]
fn a_state_directory_of_a_set_size_runs_full() -> Result<()> {
    let host = Host::with_options(
        "small",
        &HostOptions {
            state_mib: Some(4),
            ..HostOptions::default()
        },
    )?;
    let why = host
        .run(
            "dd",
            [
                "if=/dev/zero",
                "of=/var/lib/migrate/big",
                "bs=1M",
                "count=8",
            ],
        )
        .unwrap_err();
    assert!(why.to_string().contains("No space left"), "{why}");
    Ok(())
}

#[test]
fn a_container_is_dumped_and_restored_on_one_host() -> Result<()> {
    let host = Host::new("a")?;
    let container = Container::create(
        &host,
        "writer",
        &Workload::memory_writer(64, 20),
        &ContainerOptions::default(),
    )?;
    let before = container.verify(&host, LIMIT)?;
    checkpoint(&host, &container, "/srv/images")?;
    let stopped = Instant::now();
    assert!(!container.is_running(&host)?);
    std::thread::sleep(Duration::from_millis(500));
    let stopped_ms = stopped.elapsed().as_secs_f64() * 1000.0;
    restore(&host, &container, "/srv/images")?;
    let after = container.verify(&host, LIMIT)?;
    assert!(after.verified && after.errors == 0, "{after:?}");
    assert!(after.seq > before.seq, "{before:?} then {after:?}");
    // By the real-time clock: CRIU sets the monotonic one back.
    let gap = after.more["longest_gap_realtime_ms"].as_f64();
    assert!(
        gap.is_some_and(|gap| gap >= stopped_ms),
        "the stop of {stopped_ms} ms must be seen: {after:?}"
    );
    container.delete(&host)
}

#[test]
fn a_container_is_dumped_on_one_host_and_restored_on_another() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let nothing = b.snapshot()?;
    let options = ContainerOptions {
        memory_limit_mib: Some(256),
        ..ContainerOptions::default()
    };
    let container = Container::create(&a, "writer", &Workload::memory_writer(64, 20), &options)?;
    checkpoint(&a, &container, "/srv/images")?;
    copy_container_files(&a, &b, &container, "/srv/images")?;
    restore(&b, &container, "/srv/images")?;
    let verdict = container.verify(&b, LIMIT)?;
    assert!(verdict.verified && verdict.errors == 0, "{verdict:?}");
    assert!(!container.is_running(&a)?);
    container.delete(&b)?;
    b.run("rm", ["-r", "/srv/writer", "/srv/images"])?;
    assert_eq!(nothing.leftovers(&b)?, Vec::<String>::new());
    Ok(())
}

#[test]
fn the_cost_of_a_hosts_own_work_is_measured_apart_from_its_containers() -> Result<()> {
    let host = Host::new("a")?;
    let workload = Workload::memory_writer(256, 0).arg("--check-mb-s=max");
    let container = Container::create(&host, "writer", &workload, &ContainerOptions::default())?;
    let (memory, cpu) = (PeakMemory::watch(&host)?, cpu_seconds(&host)?);
    std::thread::sleep(Duration::from_millis(500));
    let idle_cpu = cpu_seconds(&host)? - cpu;
    assert!(
        idle_cpu < 0.1,
        "the container's {idle_cpu} s count as the host's"
    );
    host.run("sh", ["-c", "dd if=/dev/zero of=/run/held bs=1M count=64; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"])?;
    let peak = memory.peak_mib();
    assert!(peak > 60.0 && peak < 120.0, "{peak} MiB");
    assert!(cpu_seconds(&host)? - cpu > idle_cpu + 0.05);
    container.delete(&host)
}
