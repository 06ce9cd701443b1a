//! One move with its faults, and what is true when they are over.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::{
    Container, ContainerOptions, Host, HostOptions, Link, Running, Snapshot, introduce, start_agent,
};

use super::faults::{Field, is_agent, is_engine};
use super::scenario::{End, Scenario};

/// How long a container runs before it is moved.
const SETTLE: Duration = Duration::from_millis(700);

/// How long `migrate` may take after the last fault is over: it waits a minute for a container that stands still.
const MOVE: Duration = Duration::from_secs(240);

/// How long it looks for a destination that it has lost, in seconds.
const RECONNECT: &str = "30";

/// How long recovery may take until one copy runs and nothing is left.
const RECOVERY: Duration = Duration::from_secs(240);

/// How long a verdict of the workload, or another command, may take.
const STEP: Duration = Duration::from_secs(120);

/// Size of a disk that is going to fail, in MiB.
const DISK_MIB: u32 = 512;

/// The container's name.
const ID: &str = "web";

/// What an engine keeps on purpose on a host that has never had one: records, what it knows of the host's CRIU, and
/// directories.
const KEPT: [&str; 6] = [
    "file /var/lib/migrate/journal",
    "file /var/lib/migrate/criu",
    "file /etc/criu/runc.conf",
    "file /run/criu.kdat",
    "file /run/boot_id",
    "mount /proc/sys/kernel/random/boot_id",
];

/// Directories that may stay empty.
const KEPT_EMPTY: [&str; 2] = [
    "file /var/lib/migrate/work",
    "file /var/lib/migrate/containers",
];

/// What was found at the end.
#[derive(Debug, Default)]
pub struct Found {
    /// Exit code of `migrate`, or how else it ended.
    pub outcome: String,
    /// Its last line, for people.
    pub said: String,
    /// Faults that did not come about: the move was over, or the process not there.
    pub missed: u32,
    /// Copies that run at the end.
    pub copies: u32,
    /// One died with its host, as every container does: of the source before the copy had all, of the destination after.
    pub lost_with_host: bool,
    /// The workload found its memory, files and connections as they should be, and no copy ran beside it.
    pub right: bool,
    /// What a settled migration should have removed.
    pub left_over: Vec<String>,
    /// A command did not end.
    pub hung: bool,
    /// The next move of the container, faultless, went well and the container is right after it.
    pub next_move: bool,
    /// Why, if something is not as it should be.
    pub why: String,
}

impl Found {
    /// Whether nothing was lost, doubled, corrupted, hung or left over.
    pub fn is_good(&self) -> bool {
        let copies = if self.lost_with_host { 0..=1 } else { 1..=1 };
        copies.contains(&self.copies)
            && (self.right || self.copies == 0)
            && self.left_over.is_empty()
            && !self.hung
            && self.next_move
    }
}

/// Carries out the scenario. An error is one of the test's own.
pub fn run(scenario: &Scenario) -> Result<Found> {
    let options = |end| HostOptions {
        state_mib: scenario.hits_disk(end).then_some(DISK_MIB),
        state_on_ext4: true,
    };
    let a = Host::with_options("a", &options(End::Source))?;
    let b = Host::with_options("b", &options(End::Destination))?;
    let link = Link::join(&a, &b)?;
    if let Some(megabits) = scenario.link {
        link.limit_rate(megabits)?;
    }
    introduce(&a, &b)?;
    let workload = scenario.workload.workload();
    let mut stage = Stage {
        hosts: [&a, &b],
        link: &link,
        agents: [None, None],
        container: Container::create(&a, ID, &workload, &ContainerOptions::default())?,
        // With the container there: its bundle stays where its operator made it.
        before: [a.snapshot()?, b.snapshot()?],
    };
    stage.ensure_agent(1)?;
    std::thread::sleep(SETTLE);

    let mut found = Found::default();
    let mut mover = stage.start_move(0, scenario.mode)?;
    stage.inflict(scenario, &mover, &mut found)?;
    stage.ensure_agent(1)?;
    let ended = mover.wait(MOVE).ok();
    found.hung = ended.is_none();
    let committed = ended.and_then(|status| status.code()) == Some(0);
    found.outcome = match ended.map(|status| status.code()) {
        Some(Some(code)) => outcome(code).to_string(),
        Some(None) => "killed".to_string(),
        None => "hung".to_string(),
    };
    found.said = last_line(&mover)?;
    drop(mover);
    stage.recover(scenario, committed, &mut found)?;
    stage.judge(&mut found)?;
    stage.move_on(&workload, &mut found)?;
    Ok(found)
}

struct Stage<'h> {
    hosts: [&'h Host; 2],
    link: &'h Link<'h>,
    agents: [Option<Running>; 2],
    container: Container,
    before: [Snapshot; 2],
}

impl Stage<'_> {
    fn address(&self, host: usize) -> std::net::Ipv4Addr {
        [self.link.first(), self.link.second()][host]
    }

    /// Starts the agent of a host that has none, as its service manager would.
    fn ensure_agent(&mut self, host: usize) -> Result<()> {
        if let Some(agent) = &mut self.agents[host]
            && agent.is_alive()?
        {
            return Ok(());
        }
        let (agent, _) = start_agent(self.hosts[host], self.address(host), &[])?;
        self.agents[host] = Some(agent);
        Ok(())
    }

    fn start_move(&self, from: usize, mode: &str) -> Result<Running> {
        let to = format!("{}:7070", self.address(1 - from));
        let link = ["--reconnect-timeout", RECONNECT, "--to", &to, ID];
        self.hosts[from].spawn("migrate", [&["--json", "--mode", mode][..], &link].concat())
    }

    /// Lets every fault happen at its moment, each on its own, and returns when they are over.
    fn inflict(&self, scenario: &Scenario, mover: &Running, found: &mut Found) -> Result<()> {
        let field = Field {
            source: self.hosts[0],
            destination: self.hosts[1],
            link: self.link,
            mover,
        };
        let hits = std::thread::scope(|scope| {
            let faults = scenario.faults.iter();
            let threads: Vec<_> = faults
                .map(|&(moment, fault)| scope.spawn(move || field.inflict(moment, fault)))
                .collect();
            let hits = threads.into_iter().map(|thread| {
                let hit = thread.join();
                hit.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            hits.collect::<Result<Vec<bool>>>()
        })?;
        found.missed = hits.iter().map(|hit| u32::from(!hit)).sum();
        // A disk that stays full until the move is over: for a moment longer than the move could go on.
        std::thread::sleep(SETTLE);
        field.mend()
    }

    /// What an operator does: the agent runs again, `migrate recover` at both ends, `migrate resume` at the source, until one copy
    /// runs and nothing is under way.
    fn recover(&mut self, scenario: &Scenario, committed: bool, found: &mut Found) -> Result<()> {
        let deadline = Instant::now() + RECOVERY;
        loop {
            self.ensure_agent(1)?;
            for (host, command) in [(0, "recover"), (1, "recover"), (0, "resume")] {
                let mut running = self.hosts[host].spawn("migrate", [command])?;
                if running.wait(STEP).is_err() {
                    found.hung = true;
                    found.why = format!("migrate {command} does not end at host {host}");
                    return Ok(());
                }
            }
            found.copies = self.copies()?;
            found.left_over = self.leftovers()?;
            found.lost_with_host = (scenario.restarts(End::Source)
                && !committed
                && self.container.state(self.hosts[1])?.is_none())
                || (scenario.restarts(End::Destination)
                    && self.container.state(self.hosts[0])?.is_none());
            let over = found.copies == 1 || (found.copies == 0 && found.lost_with_host);
            if (over && found.left_over.is_empty()) || Instant::now() > deadline {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    fn copies(&self) -> Result<u32> {
        let mut copies = 0;
        for host in self.hosts {
            copies += u32::from(self.container.is_running(host)?);
        }
        Ok(copies)
    }

    /// What is left of the migration: on the host that has the container anything of the engine's, on the other all of it.
    fn leftovers(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for (host, before) in self.hosts.iter().zip(&self.before) {
            let has_it = self.container.state(host)?.is_some();
            let engine: Vec<String> = host
                .processes()?
                .iter()
                .filter(|process| is_engine(process) && !is_agent(process))
                .map(|process| format!("process {} ", process.pid))
                .collect();
            let agents: Vec<String> = host
                .processes()?
                .iter()
                .filter(|process| is_agent(process))
                .map(|process| format!("process {} ", process.pid))
                .collect();
            let things = before.leftovers(host)?.into_iter().filter(|thing| {
                let starts = |with: &str| thing.starts_with(with);
                if KEPT.iter().any(|kept| starts(kept)) || KEPT_EMPTY.contains(&thing.as_str()) {
                    return false;
                }
                if agents.iter().any(|agent| starts(agent)) {
                    return false;
                }
                !has_it
                    || starts("file /var/lib/migrate/work")
                    || engine.iter().any(|process| starts(process))
            });
            left.extend(things.map(|thing| format!("{}: {thing}", host.name())));
        }
        Ok(left)
    }

    /// Asks the copy that runs, and looks whether another ran beside it: the log of the source ends where the move began.
    fn judge(&self, found: &mut Found) -> Result<()> {
        let Some(host) = self.where_it_runs()? else {
            return Ok(());
        };
        match self.container.verify(host, STEP) {
            Ok(verdict) => {
                found.right = verdict.verified;
                if !verdict.verified {
                    found.why = format!("{:?}", verdict.complaints);
                }
            }
            Err(why) => found.why = format!("{why:#}"),
        }
        if host.name() == "b" && !self.source_log_is_a_prefix()? {
            found.right = false;
            found.why = "the source went on logging after the switch".to_string();
        }
        Ok(())
    }

    fn where_it_runs(&self) -> Result<Option<&Host>> {
        for host in self.hosts {
            if self.container.is_running(host)? {
                return Ok(Some(host));
            }
        }
        Ok(None)
    }

    fn source_log_is_a_prefix(&self) -> Result<bool> {
        let logs = self.hosts[0].path(format!("/srv/{ID}/rootfs/log"));
        let there = self.container.log(self.hosts[1])?;
        for entry in fs::read_dir(&logs).with_context(|| format!("reading {}", logs.display()))? {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "jsonl")
            {
                let here = lines(&path)?;
                let same = here.iter().zip(&there).all(|(here, there)| {
                    serde_json::from_str::<serde_json::Value>(here)
                        .ok()
                        .as_ref()
                        == Some(there)
                });
                return Ok(same && here.len() <= there.len());
            }
        }
        Ok(true)
    }

    /// Moves the container, or a new one of its name if it is lost, once more and without faults.
    fn move_on(&mut self, workload: &rig::Workload, found: &mut Found) -> Result<()> {
        let from = match self.where_it_runs()? {
            Some(host) => usize::from(host.name() == "b"),
            None if found.lost_with_host => {
                self.hosts[0].run("rm", ["-rf", &format!("/srv/{ID}")])?;
                self.container =
                    Container::create(self.hosts[0], ID, workload, &ContainerOptions::default())?;
                0
            }
            None => return Ok(()),
        };
        self.ensure_agent(1 - from)?;
        let mut mover = self.start_move(from, "auto")?;
        let status = match mover.wait(MOVE) {
            Ok(status) => status,
            Err(why) => {
                found.why += &format!("; next move: {why:#}");
                return Ok(());
            }
        };
        let verified = status.success()
            && self
                .container
                .verify(self.hosts[1 - from], STEP)
                .is_ok_and(|verdict| verdict.verified);
        found.next_move = verified && self.copies()? == 1;
        if !found.next_move {
            found.why += &format!("; next move: {status}: {}", last_line(&mover)?);
        }
        Ok(())
    }
}

/// The lines of a log that are complete.
fn lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
    Ok(complete.lines().map(str::to_string).collect())
}

fn last_line(running: &Running) -> Result<String> {
    let output = running.output()?;
    // Events are for programs.
    let mut words = output.lines().rev().filter(|line| !line.starts_with('{'));
    let line = words.find(|line| !line.trim().is_empty());
    Ok(line.unwrap_or_default().chars().take(600).collect())
}

fn outcome(code: i32) -> &'static str {
    match code {
        0 => "moved",
        1 => "internal error",
        3 => "refused",
        4 => "rolled back",
        5 => "unknown",
        6 => "incomplete",
        _ => "other",
    }
}

/// That a host can be stalled and restarted at all, before anything is blamed on the engine.
pub fn rehearse() -> Result<()> {
    let options = HostOptions {
        state_mib: Some(64),
        state_on_ext4: true,
    };
    let host = Host::with_options("r", &options)?;
    host.run("fsfreeze", ["--freeze", "/var/lib/migrate"])?;
    host.run("fsfreeze", ["--unfreeze", "/var/lib/migrate"])?;
    let mut sleeper = host.spawn("sh", ["-c", "echo here; exec sleep 1000"])?;
    sleeper.wait_for("here", STEP)?;
    host.restart()?;
    ensure!(
        !sleeper.is_alive()?,
        "a process survived the restart of its host"
    );
    Ok(())
}
