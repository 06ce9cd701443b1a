//! Two hosts between which containers move: what the end-to-end tests have in common.

use anyhow::{Context, Result, ensure};
use rig::{Container, Host, Link, Running, Snapshot, introduce, start_agent};
use serde_json::Value;
use std::net::SocketAddrV4;
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long one step of a test may take.
pub const LIMIT: Duration = Duration::from_secs(300);

/// Where a move leaves its report, on the host it is asked on.
const REPORT: &str = "/run/report.json";
const REPORT_FILE: &str = "file /run/report.json";

/// What a host may keep of a container that left: outcomes on record, what was learned of the kernel, and the empty file
/// that lies where a runtime looks for CRIU's options (a mount needs something to lie on).
const KEPT: [&str; 7] = [
    "file /var/lib/migrate/journal",
    "file /var/lib/migrate/journal/*",
    "file /var/lib/migrate/criu*",
    "file /var/lib/migrate/work",
    "file /var/lib/migrate/containers",
    "file /etc/criu*",
    REPORT_FILE,
];

/// Two hosts that know each other, with an agent on each.
pub struct Pair<'h> {
    /// The first host.
    pub a: &'h Host,
    /// The second host.
    pub b: &'h Host,
    /// What joins them.
    pub link: Link<'h>,
    agents: Vec<(Running, SocketAddrV4)>,
    _alone: MutexGuard<'static, ()>,
}

/// What a command said.
#[derive(Debug)]
pub struct Said {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Both streams.
    pub output: String,
}

impl<'h> Pair<'h> {
    /// Introduces the hosts and starts an agent on each.
    ///
    /// One pair at a time: a test measures time and takes the machine's memory, whatever the number of test threads.
    pub fn new(a: &'h Host, b: &'h Host) -> Result<Pair<'h>> {
        static ALONE: Mutex<()> = Mutex::new(());

        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let link = Link::join(a, b)?;
        introduce(a, b)?;
        let agents = vec![
            start_agent(a, link.first(), &[])?,
            start_agent(b, link.second(), &[])?,
        ];
        Ok(Pair {
            a,
            b,
            link,
            agents,
            _alone: alone,
        })
    }

    /// The host that `from` is not.
    pub fn other(&self, from: &Host) -> &'h Host {
        if std::ptr::eq(from, self.a) {
            self.b
        } else {
            self.a
        }
    }

    /// Moves a container from one host to the other and returns the report.
    pub fn move_container(&self, from: &Host, id: &str) -> Result<Value> {
        self.move_with(from, &[], id)
    }

    /// Moves a container with further options and returns the report.
    pub fn move_with(&self, from: &Host, options: &[&str], id: &str) -> Result<Value> {
        let said = self.migrate(from, &[&["--report", REPORT], options].concat(), id)?;
        ensure!(
            said.status.success(),
            "{}\n{}\n{}",
            said.status,
            said.output,
            self.agents_said()
        );
        println!("{}", said.output);
        let report = std::fs::read(from.path(REPORT)).context("reading the report")?;
        Ok(serde_json::from_slice(&report)?)
    }

    /// Runs `migrate --to <the other host>` with options to its end, however it ends.
    pub fn migrate(&self, from: &Host, options: &[&str], id: &str) -> Result<Said> {
        let to = if std::ptr::eq(from, self.a) {
            self.link.second()
        } else {
            self.link.first()
        };
        let to = format!("{to}:7070");
        let mut moving = from.spawn("migrate", [&["--to", &to], options, &[id]].concat())?;
        Ok(Said {
            status: moving.wait(LIMIT)?,
            stdout: moving.stdout()?,
            output: moving.output()?,
        })
    }

    /// The agent that was started on a host.
    pub fn agent_of(&self, host: &Host) -> &Running {
        let second = std::ptr::eq(host, self.b);
        &self.agents[usize::from(second)].0
    }

    /// What the agents wrote so far.
    pub fn agents_said(&self) -> String {
        self.agents
            .iter()
            .map(|(agent, _)| agent.output().unwrap_or_default())
            .collect()
    }

    /// The container is whole and runs on `to`, and there only.
    pub fn ensure_lives_only_on(&self, to: &Host, container: &Container) -> Result<()> {
        ensure!(
            container.is_running(to)?,
            "{} does not run on host {}\n{}",
            container.id(),
            to.name(),
            self.agents_said()
        );
        let from = self.other(to);
        let left = container.state(from)?;
        ensure!(left.is_none(), "host {} still has {left:?}", from.name());
        let verified = container.verify(to, LIMIT)?;
        println!("{verified:?}");
        ensure!(verified.verified, "{verified:?}\n{}", self.agents_said());
        Ok(())
    }

    /// Since the snapshot nothing has come to the host but what a host keeps anyway, and what is `allowed`: the name of a
    /// thing, or with `*` at the end how it begins. What tidies up after itself, as a guard does, is waited for.
    pub fn ensure_nothing_left(
        &self,
        host: &Host,
        before: &Snapshot,
        allowed: &[&str],
    ) -> Result<()> {
        let is_allowed = |thing: &str| {
            let fits = |name: &&str| match name.strip_suffix('*') {
                Some(beginning) => thing.starts_with(beginning),
                None => thing == *name,
            };
            KEPT.iter().chain(allowed).any(fits)
        };
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut left = before.leftovers(host)?;
            left.retain(|thing| !is_allowed(thing));
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "left on host {}:\n{}",
                host.name(),
                left.join("\n")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
