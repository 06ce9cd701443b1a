//! Post-copy and hybrid moves, and what can go wrong while pages are owed. Whether a move was right is the workload's own
//! word.

use crate::pair::{LIMIT, Pair};
use anyhow::{Context, Result, ensure};
use rig::{Container, ContainerOptions, Host, Running, Workload, start_agent};
use serde_json::Value;
use std::thread;
use std::time::{Duration, Instant};

/// The bundle a container was started from, which is its owner's and stays where it is.
const OWN_BUNDLE: &str = "file /srv/web*";

/// Megabits a second at which 64 MiB take some five seconds: long enough to do something in the middle.
const SLOW: u32 = 100;

/// A lost link is given up after five seconds and not ten.
const HASTE: &str = "MIGRATE_FAULT_HASTE=5";

/// Megabits a second at which something is to be done while pages are owed: 64 MiB take 18 s, so that it is done in time even
/// where the test, or this machine, stands still for a while.
const SERVING: u32 = 30;

/// In the middle: of 16384 pages so many are left, and take 12 s more.
const MIDDLE: u64 = 11_000;

/// For what is left afterwards.
const FAST: u32 = 1000;

/// Exit code of `migrate` for a container that lives at the target and lacks pages.
const INCOMPLETE: i32 = 6;

/// Exit code of `migrate` for a container that goes on at the source.
const ROLLED_BACK: i32 = 4;

/// Moves one container from host a to host b and checks all that always holds.
fn move_once(workload: &Workload, options: &[&str], megabits: Option<u32>) -> Result<Value> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    if let Some(megabits) = megabits {
        pair.link.limit_rate(megabits)?;
    }
    let before = a.snapshot()?;
    let container = Container::create(&a, "web", workload, &ContainerOptions::default())?;
    let report = pair.move_with(&a, options, "web")?;
    ensure!(report["outcome"]["result"] == "moved", "{report:#}");
    ensure!(report["dump"] == "skeleton", "{report:#}");
    pair.ensure_lives_only_on(&b, &container)?;
    pair.ensure_nothing_left(&a, &before, &[OWN_BUNDLE])?;
    Ok(report)
}

fn owed_pages(report: &Value) -> u64 {
    report["post_copy"]["owed_pages"].as_u64().unwrap_or(0)
}

#[test]
fn post_copy_moves_first_and_brings_every_byte_afterwards() -> Result<()> {
    let workload = Workload::memory_writer(64, 20);
    let report = move_once(&workload, &["--mode", "post-copy"], Some(SLOW))?;
    println!("{report:#}");
    ensure!(report["switch"] == "post-copy", "{report:#}");
    ensure!(report["rounds"].as_array().is_some_and(Vec::is_empty));
    ensure!(owed_pages(&report) >= 16_384, "{report:#}");
    ensure!(report["post_copy"]["last_page_ms"].is_f64(), "{report:#}");
    ensure!(
        report["post_copy"]["faults"].as_u64() > Some(0),
        "a container that writes at random must have waited for something: {report:#}"
    );
    Ok(())
}

#[test]
fn forty_processes_move_in_post_copy() -> Result<()> {
    let report = move_once(&Workload::zoo(false), &["--mode", "post-copy"], Some(SLOW))?;
    ensure!(owed_pages(&report) > 0, "{report:#}");
    Ok(())
}

#[test]
fn processes_that_fork_execute_and_end_while_pages_are_owed_move() -> Result<()> {
    let report = move_once(&Workload::zoo(true), &["--mode", "post-copy"], Some(SLOW))?;
    ensure!(owed_pages(&report) > 0, "{report:#}");
    Ok(())
}

#[test]
fn redis_under_load_moves_in_post_copy() -> Result<()> {
    let report = move_once(&Workload::redis(64), &["--mode", "post-copy"], Some(SLOW))?;
    ensure!(owed_pages(&report) > 0, "{report:#}");
    Ok(())
}

/// Seven processes are owed 64 MiB each. What they fault on before the push is there crosses for each.
#[test]
fn what_the_processes_of_a_prefork_server_share_is_pushed_once() -> Result<()> {
    let workload = Workload::new("prefork", ["--table-mib=64", "--workers=6"]);
    let report = move_once(&workload, &["--mode", "post-copy"], None)?;
    let wire = report["post_copy"]["bytes_wire"].as_u64();
    let wire_mib = wire.context("not in the report")? >> 20;
    let owed_mib = owed_pages(&report) >> 8;
    println!("{owed_mib} MiB were owed, {wire_mib} MiB crossed");
    ensure!(owed_mib >= 7 * 64, "{report:#}");
    ensure!(wire_mib < owed_mib / 2, "{report:#}");
    Ok(())
}

#[test]
fn hybrid_owes_only_what_the_rounds_left() -> Result<()> {
    // Far more is dirtied than the link carries.
    let workload = Workload::memory_writer(64, 100).arg("--working-set-mib=32");
    let report = move_once(&workload, &["--mode", "hybrid"], Some(SLOW))?;
    ensure!(report["switch"] == "post-copy", "{report:#}");
    let owed = owed_pages(&report);
    ensure!(owed > 0 && owed < 12_000, "{report:#}");
    Ok(())
}

/// The few pages that are owed have arrived before the target says that the copy runs.
#[test]
fn hybrid_that_owes_next_to_nothing_does_not_wait_for_more() -> Result<()> {
    // A limit that leaves next to no time for a delta.
    let options = ["--mode", "hybrid", "--downtime-limit", "95"];
    let report = move_once(&Workload::memory_writer(64, 0), &options, None)?;
    ensure!(report["switch"] == "post-copy", "{report:#}");
    ensure!(owed_pages(&report) < 2_000, "{report:#}");
    ensure!(report["fill_after_release_ms"].is_f64(), "{report:#}");
    Ok(())
}

#[test]
fn an_idle_container_owes_nothing_when_the_engine_decides() -> Result<()> {
    let report = move_once(&Workload::memory_writer(64, 0), &[], None)?;
    ensure!(report["switch"] == "pre-copy", "{report:#}");
    ensure!(report["post_copy"].is_null(), "{report:#}");
    Ok(())
}

/// A post-copy move under way over a slow link: the container runs at host b and pages are owed.
struct Serving<'p> {
    container: Container,
    moving: Running,
    _pair: &'p Pair<'p>,
}

impl<'p> Serving<'p> {
    /// `pages_left`: how far it is.
    fn reach(pair: &'p Pair<'p>, pages_left: u64, options: &[&str]) -> Result<Serving<'p>> {
        pair.link.limit_rate(SERVING)?;
        let workload = Workload::memory_writer(64, 20);
        let container = Container::create(pair.a, "web", &workload, &ContainerOptions::default())?;
        let to = format!("{}:7070", pair.link.second());
        let arguments = [
            &[HASTE, "migrate", "--to", &to][..],
            &["--mode", "post-copy", "--json"],
            options,
            &["web"],
        ];
        let mut moving = pair.a.spawn("env", arguments.concat())?;
        moving.wait_for("\"event\":\"committed\"", LIMIT)?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let said = moving.stdout()?;
            let left = said
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok())
                .filter(|event| event["event"] == "serving")
                .filter_map(|event| event["pages_left"].as_u64())
                .next_back();
            if left.is_some_and(|left| left <= pages_left) {
                break;
            }
            ensure!(moving.is_alive()?, "it ended too soon: {said}");
            ensure!(Instant::now() < deadline, "it does not go on: {said}");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(Serving {
            container,
            moving,
            _pair: pair,
        })
    }

    /// Waits until the copy that was kept for its pages is gone, for somebody has brought them, and the other one, which may
    /// have been stopped for want of them, goes on.
    fn wait_until_served(&self, pair: &Pair<'_>) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while self.container.state(pair.a)?.is_some() || !self.container.is_running(pair.b)? {
            ensure!(
                Instant::now() < deadline,
                "host a has {:?}, host b {:?}\n{}",
                self.container.state(pair.a)?,
                self.container.state(pair.b)?,
                pair.agents_said()
            );
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// The move ends well and the container is whole at host b.
    fn ends_well(mut self, pair: &Pair<'_>) -> Result<String> {
        pair.link.limit_rate(FAST)?;
        let status = self.moving.wait(LIMIT)?;
        let said = self.moving.output()?;
        ensure!(status.success(), "{status}\n{said}\n{}", pair.agents_said());
        pair.ensure_lives_only_on(pair.b, &self.container)?;
        Ok(said)
    }
}

fn a_link_that_is_down_for_five_seconds(pages_left: u64) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let before = a.snapshot()?;
    let mut serving = Serving::reach(&pair, pages_left, &[])?;
    pair.link.down()?;
    thread::sleep(Duration::from_secs(5));
    // Near the end all may have come before the link is down.
    let is_missed = pages_left >= 8_000;
    if is_missed {
        serving.moving.wait_for("\"event\":\"link_lost\"", LIMIT)?;
    }
    pair.link.up()?;
    let said = serving.ends_well(&pair)?;
    if is_missed {
        for event in ["link_back", "whole"] {
            let event = format!("\"event\":\"{event}\"");
            ensure!(said.contains(&event), "no {event}: {said}");
        }
    }
    pair.ensure_nothing_left(&a, &before, &[OWN_BUNDLE])
}

#[test]
fn a_link_that_is_down_for_five_seconds_right_after_the_switch_is_waited_for() -> Result<()> {
    a_link_that_is_down_for_five_seconds(u64::MAX)
}

#[test]
fn a_link_that_is_down_for_five_seconds_in_the_middle_is_waited_for() -> Result<()> {
    a_link_that_is_down_for_five_seconds(MIDDLE)
}

#[test]
fn a_link_that_is_down_for_five_seconds_near_the_end_is_waited_for() -> Result<()> {
    a_link_that_is_down_for_five_seconds(1_500)
}

fn a_link_that_is_down_for_good(pages_left: u64) -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let before = a.snapshot()?;
    let mut serving = Serving::reach(&pair, pages_left, &["--reconnect-timeout", "3"])?;
    pair.link.down()?;
    let status = serving.moving.wait(LIMIT)?;
    let said = serving.moving.output()?;
    ensure!(status.code() == Some(INCOMPLETE), "{status}\n{said}");
    ensure!(said.contains("migrate resume"), "{said}");

    // Both copies stand still: the one here is kept for its pages, the one there lacks some.
    let state = |host: &Host| -> Result<Option<String>> {
        let state = serving.container.state(host)?;
        Ok(state.and_then(|state| state["status"].as_str().map(str::to_string)))
    };
    let deadline = Instant::now() + LIMIT;
    while state(&b)?.as_deref() != Some("paused") {
        ensure!(Instant::now() < deadline, "it is {:?}", state(&b)?);
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(state(&a)?.as_deref() == Some("paused"), "{:?}", state(&a)?);
    let record = b.run(
        "sh",
        ["-c", "cat /var/lib/migrate/work/*/pager-stalled.json"],
    )?;
    ensure!(record.contains("missing_pages"), "{record}");
    let asked = a.run("sh", ["-c", "migrate resume 2>&1; echo exit $?"])?;
    ensure!(asked.contains("exit 6"), "{asked}");

    pair.link.up()?;
    pair.link.limit_rate(FAST)?;
    let resumed = a.run("migrate", ["resume"])?;
    println!("{resumed}");
    // The guard, which looks for the target for a while, may have been sooner.
    serving.wait_until_served(&pair)?;
    pair.ensure_lives_only_on(&b, &serving.container)?;
    pair.ensure_nothing_left(&a, &before, &[OWN_BUNDLE])?;
    let nothing = a.run("migrate", ["resume"])?;
    ensure!(nothing.contains("no container"), "{nothing}");
    Ok(())
}

#[test]
fn a_link_that_stays_down_stops_the_copy_until_it_is_resumed() -> Result<()> {
    a_link_that_is_down_for_good(MIDDLE)
}

#[test]
fn a_link_that_is_lost_right_after_the_switch_stops_the_copy_until_it_is_resumed() -> Result<()> {
    a_link_that_is_down_for_good(u64::MAX)
}

#[test]
fn a_source_that_is_killed_while_it_serves_is_replaced_by_its_guard() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let before = a.snapshot()?;
    let serving = Serving::reach(&pair, MIDDLE, &[])?;
    serving.moving.kill()?;
    pair.link.limit_rate(FAST)?;
    serving.wait_until_served(&pair)?;
    pair.ensure_lives_only_on(&b, &serving.container)?;
    pair.ensure_nothing_left(&a, &before, &[OWN_BUNDLE])
}

#[test]
fn an_agent_that_is_killed_while_pages_are_owed_is_replaced_by_the_next_one() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let before = a.snapshot()?;
    let serving = Serving::reach(&pair, MIDDLE, &[])?;
    pair.agent_of(&b).kill()?;
    let (_agent, _) = start_agent(&b, pair.link.second(), &[])?;
    serving.ends_well(&pair)?;
    pair.ensure_nothing_left(&a, &before, &[OWN_BUNDLE])
}

/// A pager that dies while it reads a fault takes the container with it: its standby cannot know what was read. That is rare, and
/// not what is tested here.
#[test]
fn a_pager_that_is_killed_while_pages_are_owed_is_replaced_by_its_standby() -> Result<()> {
    for _ in 0..3 {
        if a_pager_is_killed_and_replaced()? {
            return Ok(());
        }
    }
    anyhow::bail!("three pagers in a row died while they read events");
}

fn a_pager_is_killed_and_replaced() -> Result<bool> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let serving = Serving::reach(&pair, MIDDLE, &["--reconnect-timeout", "2"])?;
    // The standby has another command line; the pattern keeps the shell that asks out.
    let pids = b.run("sh", ["-c", "pgrep -f '[m]igrate pager$'"])?;
    let pid = pids.trim();
    b.run("kill", ["-9", pid])
        .with_context(|| format!("the pager is not one process: {pids:?}"))?;
    let ended = serving.ends_well(&pair);
    let events_lost = b.path("/var/lib/migrate/pager-death.json").exists();
    if ended.is_err() && events_lost {
        return Ok(false);
    }
    ended.map(|_| true)
}

/// Nothing has the missing pages any more but the source: the copy ends rather than run on zeros, and the source keeps its own.
#[test]
fn a_pager_that_is_killed_with_its_standby_ends_the_copy_and_the_source_goes_on() -> Result<()> {
    let (a, b) = (Host::new("a")?, Host::new("b")?);
    let pair = Pair::new(&a, &b)?;
    let mut serving = Serving::reach(&pair, MIDDLE, &["--reconnect-timeout", "2"])?;
    // The standby first: it would take over.
    let kill = "pkill -9 -f '[p]ager --standby'; pkill -9 -f '[m]igrate pager$'";
    b.run("sh", ["-c", kill])?;
    let status = serving.moving.wait(LIMIT)?;
    let said = serving.moving.output()?;
    ensure!(status.code() == Some(ROLLED_BACK), "{status}\n{said}");
    ensure!(said.contains("as it was at the switch"), "{said}");
    ensure!(!serving.container.is_running(&b)?, "it runs on zeros");
    let verified = serving.container.verify(&a, LIMIT)?;
    ensure!(verified.verified, "{verified:?}");
    Ok(())
}
