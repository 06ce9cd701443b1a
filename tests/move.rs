//! Containers move between two hosts with real runc and real CRIU. Whether a move was right is the workload's own word.
//!
//! Needs root, runc and CRIU (`scripts/setup`); fails without them.

mod modes;
mod pair;

use anyhow::{Context, Result, ensure};
use pair::{LIMIT, Pair};
use rig::{Container, ContainerOptions, Host, Workload};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The bundle a container was started from, which is its owner's and stays where it is.
const OWN_BUNDLE: &str = "file /srv/web*";

/// Moves one container from host a to host b, once, and checks all that always holds.
fn move_once(workload: &Workload) -> Result<Value> {
    move_once_with(workload, &[])
}

/// The same with options.
fn move_once_with(workload: &Workload, options: &[&str]) -> Result<Value> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let before = a.snapshot()?;
    let container = Container::create(&a, "web", workload, &ContainerOptions::default())?;
    let report = pair.move_with(&a, options, "web")?;
    ensure!(report["outcome"]["result"] == "moved", "{report:#}");
    ensure!(report["dump"] == "skeleton", "{report:#}");
    pair.ensure_lives_only_on(&b, &container)?;
    pair.ensure_nothing_left(&a, &before, &[OWN_BUNDLE])?;
    let config = a.path("/srv/web/config.json");
    ensure!(config.is_file(), "the owner's bundle is gone");
    Ok(report)
}

#[test]
fn one_process_moves_with_every_byte() -> Result<()> {
    // A link that makes the first round long enough, and no switch.
    let options = ["--mode=pre-copy", "--bandwidth-limit=100M"];
    let report = move_once_with(&Workload::memory_writer(64, 20), &options)?;
    let rounds = report["rounds"].as_array().map_or(0, Vec::len);
    ensure!(
        rounds >= 2,
        "what was dirtied during the first round takes a second: {report:#}"
    );
    Ok(())
}

/// Zombies, threads, sessions, pipes, sockets, timers, pending signals, memory and files mapped shared.
#[test]
fn forty_processes_move_with_all_that_joins_them() -> Result<()> {
    move_once(&Workload::zoo(false)).map(drop)
}

#[test]
fn processes_that_fork_and_execute_during_the_rounds_move() -> Result<()> {
    move_once(&Workload::zoo(true)).map(drop)
}

#[test]
fn redis_keeps_its_records_and_its_connection() -> Result<()> {
    move_once(&Workload::redis(64)).map(drop)
}

/// Seven processes see 64 MiB each. Each worker's own are one page in 64 of that, and 4 MiB.
#[test]
fn what_the_processes_of_a_prefork_server_share_crosses_once() -> Result<()> {
    let workers = ["--table-mib=64", "--workers=6"];
    let report = move_once(&Workload::new("prefork", workers))?;
    let sent = |what: &str| report["sent"][what].as_u64().context("not in the report");
    let (raw_mib, all_mib) = (sent("bytes_raw")? >> 20, sent("pages")? >> 8);
    ensure!(all_mib >= 7 * 64, "{all_mib} MiB were looked at");
    let own = 64 + 6 * (64 / 64 + 4);
    ensure!(raw_mib < own + 16, "{raw_mib} MiB were sent of {own}");
    Ok(())
}

#[test]
fn files_that_change_during_the_rounds_arrive_as_they_are_at_the_freeze() -> Result<()> {
    move_once(&Workload::file_mutator()).map(drop)
}

#[test]
fn two_gibibytes_move_while_they_are_written_and_stand_still_for_a_small_part_of_the_move()
-> Result<()> {
    let report = move_once(&Workload::memory_writer(2048, 50))?;
    println!("{report:#}");
    let field = |value: &Value| {
        value
            .as_f64()
            .with_context(|| format!("a time is missing in {report:#}"))
    };
    let (downtime, total) = (
        field(&report["downtime"]["total_ms"])?,
        field(&report["total_ms"])?,
    );
    println!("{downtime} of {total} ms");
    // Neither was more than a small part of the memory sent in the gap, nor all of it filled in.
    let delta = report["delta"]["pages"].as_u64().context("no delta")?;
    ensure!(
        delta < (2048 << 8) / 8,
        "{delta} pages were sent in the gap"
    );
    ensure!(field(&report["fill_after_release_ms"])? > 0.0);
    Ok(())
}

/// Moves a container with options from host a to host b and checks that it is whole.
fn move_with(workload: &Workload, options: &[&str]) -> Result<Value> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let container = Container::create(&a, "web", workload, &ContainerOptions::default())?;
    let report = pair.move_with(&a, options, "web")?;
    ensure!(report["outcome"]["result"] == "moved", "{report:#}");
    pair.ensure_lives_only_on(&b, &container)?;
    Ok(report)
}

/// System calls are forbidden that tracking needs elsewhere, and little more memory is allowed than there is.
#[test]
fn a_container_under_seccomp_and_within_tight_limits_moves_in_every_way() -> Result<()> {
    for mode in ["pre-copy", "post-copy"] {
        let (a, b) = (Host::new("a")?, Host::new("b")?);
        let pair = Pair::new(&a, &b)?;
        let forbidden = ["userfaultfd", "ptrace", "process_vm_readv", "memfd_create"];
        let options = ContainerOptions {
            memory_limit_mib: Some(80),
            forbidden_calls: forbidden.map(str::to_owned).to_vec(),
            ..ContainerOptions::default()
        };
        let container = Container::create(&a, "web", &Workload::memory_writer(64, 20), &options)?;
        let mode = format!("--mode={mode}");
        let report = pair.move_with(&a, &[&mode], "web")?;
        ensure!(report["dump"] == "skeleton", "{report:#}");
        pair.ensure_lives_only_on(&b, &container)?;
    }
    Ok(())
}

#[test]
fn pages_that_are_written_all_the_time_wait_for_the_freeze() -> Result<()> {
    let workload = Workload::memory_writer(256, 300).arg("--working-set-mib=16");
    let options = [
        "--mode=pre-copy",
        "--bandwidth-limit=100M",
        "--downtime-limit=500",
    ];
    let report = move_with(&workload, &options)?;
    let rounds = report["rounds"].as_array().context("no rounds")?;
    let held = rounds
        .iter()
        .filter_map(|round| round["pages_held"].as_u64());
    ensure!(held.max() > Some(0), "{report:#}");
    println!(
        "wire bytes {}, downtime {} ms",
        report["sent"]["bytes_wire"], report["downtime"]["total_ms"]
    );
    Ok(())
}

/// A system call that ends when CRIU takes hold of its thread writes its results then: after the scan at the freeze.
#[test]
fn what_system_calls_write_that_end_under_criu_arrives() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    // Many threads, so that CRIU takes hold of the last of them after their pages were read. A libaio context that is not in use,
    // as a web server has it, keeps nobody from moving.
    let workload = Workload::kernel_writer(8)
        .arg("--readers=0")
        .arg("--waiters=200")
        .arg("--idle-aio");
    let container = Container::create(&a, "web", &workload, &ContainerOptions::default())?;
    for (mode, from) in [("pre-copy", &a), ("hybrid", &b)] {
        pair.move_with(from, &[&format!("--mode={mode}")], "web")?;
        let to = pair.other(from);
        pair.ensure_lives_only_on(to, &container)?;
    }
    Ok(())
}

/// A device writes into pages that were pinned when the read began, and sets no bit in any page table.
#[test]
fn what_devices_write_to_memory_during_the_rounds_arrives() -> Result<()> {
    for mode in ["pre-copy", "hybrid"] {
        let (a, b) = (Host::new("a")?, Host::new("b")?);
        let pair = Pair::new(&a, &b)?;
        let options = ContainerOptions {
            reads_a_second: Some(400),
            ..ContainerOptions::default()
        };
        let workload = Workload::kernel_writer(64);
        let container = Container::create(&a, "web", &workload, &options)?;
        let mode = format!("--mode={mode}");
        let report = pair.move_with(&a, &[&mode, "--bandwidth-limit=100M"], "web")?;
        ensure!(report["outcome"]["result"] == "moved", "{report:#}");
        pair.ensure_lives_only_on(&b, &container)?;
    }
    Ok(())
}

#[test]
fn auto_stops_the_rounds_of_a_container_that_writes_faster_than_the_link() -> Result<()> {
    // A small part of what the container writes, also where it has to share its processor.
    let options = ["--bandwidth-limit=20M"];
    let report = move_with(&Workload::memory_writer(128, 400), &options)?;
    ensure!(report["switch"] == "post-copy", "{report:#}");
    ensure!(report["rounds_ended"] == "outrun", "{report:#}");
    let pages: u64 = report["rounds"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|round| round["pages"].as_u64())
        .sum();
    ensure!(
        pages < (128 << 20) / 4096 / 2,
        "half of it was sent in vain: {report:#}"
    );
    ensure!(
        report["predicted"]["last_page_ms"].is_number(),
        "{report:#}"
    );
    Ok(())
}

#[test]
fn a_container_moves_in_every_mode() -> Result<()> {
    for mode in ["pre-copy", "post-copy", "hybrid", "auto"] {
        let option = format!("--mode={mode}");
        // Little enough for auto to stay with pre-copy on any machine.
        let dirty_mb_s = if mode == "auto" { 1 } else { 20 };
        let report = move_with(&Workload::memory_writer(64, dirty_mb_s), &[&option])?;
        ensure!(report["mode"] == mode, "{report:#}");
        let rounds = report["rounds"].as_array().map_or(0, Vec::len);
        ensure!((rounds == 0) == (mode == "post-copy"), "{report:#}");
        let switch = if matches!(mode, "pre-copy" | "auto") {
            "pre-copy"
        } else {
            "post-copy"
        };
        ensure!(report["switch"] == switch, "{report:#}");
    }
    Ok(())
}

#[test]
fn a_container_goes_back_and_forth_and_leaves_nothing_where_it_was() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let (a_before, b_before) = (a.snapshot()?, b.snapshot()?);
    // What reads its output at each host it comes to has to go with it.
    let piped = ContainerOptions {
        piped: true,
        ..ContainerOptions::default()
    };
    let container = Container::create(&a, "web", &Workload::memory_writer(64, 20), &piped)?;
    for (number, from) in (1..=20).zip([&a, &b].into_iter().cycle()) {
        let to = pair.other(from);
        pair.move_container(from, "web")
            .and_then(|_| pair.ensure_lives_only_on(to, &container))
            .with_context(|| format!("move {number}, to host {}", to.name()))?;
        let before = if std::ptr::eq(from, &a) {
            &a_before
        } else {
            &b_before
        };
        pair.ensure_nothing_left(from, before, &[OWN_BUNDLE])
            .with_context(|| format!("after move {number}"))?;
    }
    ensure!(
        a.path("/srv/web/config.json").is_file(),
        "the owner's bundle is gone"
    );
    Ok(())
}

#[test]
fn a_tree_that_somebody_else_writes_to_keeps_the_container_where_it_is() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let before = b.snapshot()?;
    let workload = Workload::memory_writer(64, 20);
    let container = Container::create(&a, "web", &workload, &ContainerOptions::default())?;
    let directory = a.path("/srv/web/rootfs/tmp");
    let done = AtomicBool::new(false);
    let said = std::thread::scope(|scope| {
        let writer = scope.spawn(|| come_and_go(&directory, &done));
        let said = pair.migrate(&a, &[], "web");
        done.store(true, Ordering::Relaxed);
        writer
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        said
    })?;
    ensure!(
        said.status.code() == Some(4),
        "{}\n{}",
        said.status,
        said.output
    );
    ensure!(
        said.output.contains("somebody else writes to"),
        "{}",
        said.output
    );
    pair.ensure_lives_only_on(&a, &container)?;
    pair.ensure_nothing_left(&b, &before, &[])
}

/// Makes files and deletes each a hundred files later. One large file changes with each, so that a pass takes long enough
/// for others of its list to be gone when it gets to them.
fn come_and_go(directory: &Path, done: &AtomicBool) -> Result<()> {
    fs::write(directory.join("large"), vec![b'x'; 64 << 20])?;
    let large = fs::File::options()
        .write(true)
        .open(directory.join("large"))?;
    for number in 0_u64.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        large.write_all_at(&number.to_le_bytes(), 0)?;
        fs::write(
            directory.join(number.to_string()),
            b"by nobody in the container",
        )?;
        if let Some(old) = number.checked_sub(100) {
            fs::remove_file(directory.join(old.to_string()))?;
        }
    }
    Ok(())
}

#[test]
fn a_shared_root_filesystem_stays_where_it_is() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    // What a network filesystem does: one directory at the same path of both hosts.
    let shared = tempfile::tempdir_in("/var/tmp")?;
    for host in [&a, &b] {
        fs::create_dir(host.path("/srv/web"))?;
        let directory = shared.path().display().to_string();
        host.run("mount", ["--bind", &directory, "/srv/web"])?;
    }
    let workload = Workload::memory_writer(64, 20);
    let container = Container::create(&a, "web", &workload, &ContainerOptions::default())?;
    let inode = inode_of(&a.path("/srv/web/rootfs/bin/memory-writer"))?;
    for from in [&a, &b] {
        pair.move_with(from, &["--rootfs", "shared"], "web")?;
        let to = pair.other(from);
        pair.ensure_lives_only_on(to, &container)?;
        let root = container.state(to)?.context("it runs")?["rootfs"].clone();
        ensure!(root == "/srv/web/rootfs", "its root is {root}");
        let copied = to.path("/var/lib/migrate/containers/web/rootfs");
        ensure!(!copied.exists(), "the root filesystem was copied");
    }
    ensure!(inode_of(&a.path("/srv/web/rootfs/bin/memory-writer"))? == inode);
    Ok(())
}

fn inode_of(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(path)
        .with_context(|| format!("looking at {}", path.display()))?
        .ino())
}

#[test]
fn a_dry_run_says_what_would_happen_and_touches_nothing() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let workload = Workload::memory_writer(64, 20);
    let container = Container::create(&a, "web", &workload, &ContainerOptions::default())?;
    let (pid, gap) = (container.pid(&a)?, container.verify(&a, LIMIT)?);
    let before = [a.snapshot()?, b.snapshot()?];
    let said = pair.migrate(&a, &["--dry-run", "--json"], "web")?;
    ensure!(said.status.success(), "{}", said.output);
    let events = events(&said.stdout)?;
    let done = events.last().context("no event")?;
    ensure!(
        done["report"]["outcome"]["result"] == "would_move",
        "{done:#}"
    );
    for (host, before) in [&a, &b].into_iter().zip(&before) {
        // What the move itself needed may be on its way out.
        let deadline = Instant::now() + LIMIT;
        loop {
            let changed = before.differences(host)?;
            if changed.is_empty() {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "on host {}: {changed:?}",
                host.name()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    ensure!(container.pid(&a)? == pid, "it was started anew");
    let verified = container.verify(&a, LIMIT)?;
    ensure!(verified.verified && verified.seq > gap.seq, "{verified:?}");
    Ok(())
}

/// CRIU itself writes to three pages of a thread that it stops (code it borrows, the rseq area, the stack), which the
/// soft-dirty bit shows it: no more than that may be in its images, and no byte that was written last may be missing.
#[test]
fn next_to_no_page_is_dumped_of_a_container_that_writes_until_it_is_frozen() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let workload = Workload::memory_writer(32, 20);
    let container = Container::create(&a, "web", &workload, &ContainerOptions::default())?;
    let threads = fs::read_dir(format!("/proc/{}/task", container.pid(&a)?))?.count() as u64;
    let said = pair.migrate(&a, &["--json"], "web")?;
    ensure!(said.status.success(), "{}", said.output);
    let events = events(&said.stdout)?;
    let of = |kind: &str| {
        let event = events.iter().find(|event| event["event"] == kind);
        event.with_context(|| format!("no {kind} in {events:?}"))
    };
    let (hold, delta) = (of("hold")?, of("delta")?);
    println!("{hold}\n{delta}");
    ensure!(hold["dump"] == "skeleton", "{hold}");
    let dumped = hold["pages_dumped"].as_u64();
    ensure!(dumped.is_some_and(|pages| pages <= 4 * threads), "{hold}");
    // It wrote between the last scan while it ran and the freeze.
    ensure!(delta["pages"].as_u64() > Some(0), "{delta}");
    pair.ensure_lives_only_on(&b, &container)
}

#[test]
fn events_are_one_json_object_a_line_and_the_report_is_in_the_last() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let workload = Workload::memory_writer(64, 20);
    let container = Container::create(&a, "web", &workload, &ContainerOptions::default())?;
    let options = ["--json", "--report", "/srv/report.json"];
    let said = pair.migrate(&a, &options, "web")?;
    ensure!(said.status.success(), "{}", said.output);
    let events = events(&said.stdout)?;
    let kinds: Vec<&str> = events
        .iter()
        .filter_map(|event| event["event"].as_str())
        .collect();
    ensure!(kinds.first() == Some(&"started"), "{kinds:?}");
    for kind in [
        "preflight",
        "tracking",
        "rootfs",
        "round_finished",
        "freezing",
        "frozen",
        "delta",
        "hold",
        "prepared",
        "commit_sent",
        "committed",
        "filled",
        "done",
    ] {
        ensure!(kinds.contains(&kind), "no {kind} in {kinds:?}");
    }
    let times: Vec<f64> = events
        .iter()
        .filter_map(|event| event["at_ms"].as_f64())
        .collect();
    ensure!(
        times.len() == events.len() && times.is_sorted(),
        "{times:?}"
    );
    let report: Value = serde_json::from_slice(&fs::read(a.path("/srv/report.json"))?)?;
    ensure!(
        events.last().is_some_and(|done| done["report"] == report),
        "{report:#}"
    );
    pair.ensure_lives_only_on(&b, &container)
}

/// The events on a standard output that has nothing else; the last is `done`, which comes once.
fn events(stdout: &str) -> Result<Vec<Value>> {
    let events: Vec<Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("not an event: {line}")))
        .collect::<Result<_>>()?;
    let done = |event: &&Value| event["event"] == "done";
    ensure!(events.iter().filter(done).count() == 1, "{stdout}");
    ensure!(events.last().is_some_and(|last| done(&last)), "{stdout}");
    Ok(events)
}
