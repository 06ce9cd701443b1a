//! A migration that is going to fail: two hosts, a container on the first, and what must hold after the failure.
//!
//! In goes a fault ([`migrate::fault`]) or a process to kill, out come the assertions that every failure shares.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::{Container, ContainerOptions, Host, Link, Running, Snapshot, Workload, introduce};
use std::fs;
use std::time::{Duration, Instant};

/// How long one step of a test may take.
pub const LIMIT: Duration = Duration::from_secs(180);

/// A lost peer is given up sooner than usual: after 5 s ([`migrate::fault`]).
pub const HASTE: &str = "MIGRATE_FAULT_HASTE=5";

/// What an engine keeps on purpose after a migration that failed, on a host that had never migrated anything: its records,
/// what it knows of this host's CRIU, empty directories, and the empty file that lets CRIU's options be mounted over it.
const KEPT: [&str; 4] = [
    "file /var/lib/migrate/work",
    "file /var/lib/migrate/containers",
    "file /etc/criu/runc.conf",
    "file /run/criu.kdat",
];

/// Directories whose files are kept as well.
const KEPT_WHOLE: [&str; 2] = [
    "file /var/lib/migrate/journal",
    "file /var/lib/migrate/criu",
];

/// Two hosts that trust each other, and the container `web` on the first.
pub struct Stage<'h> {
    pub a: &'h Host,
    pub b: &'h Host,
    pub link: Link<'h>,
    pub container: Container,
    before_a: Snapshot,
    before_b: Snapshot,
}

impl<'h> Stage<'h> {
    /// With 32 MiB of memory that is written all the time.
    pub fn new(a: &'h Host, b: &'h Host) -> Result<Stage<'h>> {
        Stage::with_workload(a, b, &Workload::memory_writer(32, 10))
    }

    pub fn with_workload(a: &'h Host, b: &'h Host, workload: &Workload) -> Result<Stage<'h>> {
        let link = Link::join(a, b)?;
        introduce(a, b)?;
        let container = Container::create(a, "web", workload, &ContainerOptions::default())?;
        Ok(Stage {
            a,
            b,
            link,
            container,
            before_a: a.snapshot()?,
            before_b: b.snapshot()?,
        })
    }

    /// Starts the agent of the second host with further environment, and waits until it listens.
    pub fn agent(&self, environment: &[&str]) -> Result<Running> {
        let listen = format!("{}:7070", self.link.second());
        let command = ["migrate", "agent", "--listen", &listen];
        let mut agent = self.b.spawn("env", [environment, &command].concat())?;
        agent.wait_for("listening", LIMIT)?;
        Ok(agent)
    }

    /// Starts to move a container to the second host.
    pub fn start_move(&self, id: &str, environment: &[&str]) -> Result<Running> {
        let to = format!("{}:7070", self.link.second());
        let command = ["migrate", "--to", &to, id];
        self.a.spawn("env", [environment, &command].concat())
    }

    /// Starts to move `web` with further options.
    pub fn start_move_with(&self, options: &[&str], environment: &[&str]) -> Result<Running> {
        let to = format!("{}:7070", self.link.second());
        let command = [&["migrate", "--to", &to], options, &["web"]].concat();
        self.a.spawn("env", [environment, &command].concat())
    }

    /// Waits for the end of a command and compares its exit code.
    pub fn expect_exit(&self, command: &mut Running, code: i32) -> Result<()> {
        let status = command.wait(LIMIT)?;
        ensure!(
            status.code() == Some(code),
            "{status} and not exit code {code}\n{}",
            command.output()?
        );
        Ok(())
    }

    /// The container works at the source with every byte right, and a failed migration left nothing at either end.
    pub fn expect_rolled_back(&self, agent: Option<&Running>) -> Result<()> {
        self.expect_works_at(self.a)?;
        // A target that lost its source while prepared waits before it gives up.
        let deadline = Instant::now() + LIMIT;
        while self.container.state(self.b)?.is_some() {
            ensure!(
                Instant::now() < deadline,
                "the target's runtime still knows the container"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        expect_clean(self.a, &self.before_a, None)?;
        expect_clean(self.b, &self.before_b, agent)
    }

    /// Of a container that did not move, nothing is at the target: no container, no process, no file.
    pub fn expect_nothing_there(&self, agent: &Running) -> Result<()> {
        ensure!(
            self.container.state(self.b)?.is_none(),
            "the target's runtime knows the container"
        );
        expect_clean(self.b, &self.before_b, Some(agent))
    }

    /// The same for a migration that did not begin.
    pub fn expect_untouched(&self, agent: &Running) -> Result<()> {
        self.expect_rolled_back(Some(agent))
    }

    /// A fresh attempt moves the container.
    pub fn expect_next_try(&self) -> Result<()> {
        let mut moving = self.start_move("web", &[])?;
        self.expect_exit(&mut moving, 0)
            .context("the next try fails")?;
        self.expect_moved()
    }

    /// The container works at the target with every byte right, and nothing of it is left at the source.
    pub fn expect_moved(&self) -> Result<()> {
        self.expect_works_at(self.b)?;
        // Who killed the source has to wait for its guard.
        let deadline = Instant::now() + LIMIT;
        while let Some(state) = self.container.state(self.a)? {
            // What is killed frozen is thawed to die: the runtime calls that running, though no instruction of it is.
            let pid = state["pid"].as_i64().unwrap_or_default();
            ensure!(
                state["status"] != "running" || is_dying(pid),
                "it runs at both hosts: {state}"
            );
            ensure!(
                Instant::now() < deadline,
                "the source's runtime still knows the container: {state}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        expect_clean(self.a, &self.before_a, None)
    }

    fn expect_works_at(&self, host: &Host) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !self.container.is_running(host)? {
            if let Some(state) = self.container.state(host)? {
                ensure!(state["status"] != "stopped", "the container died: {state}");
            }
            ensure!(
                Instant::now() < deadline,
                "the container does not run on host {}: {:?}",
                host.name(),
                self.container.state(host)?
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let verified = self.container.verify(host, LIMIT)?;
        ensure!(verified.verified, "{verified:?}");
        Ok(())
    }
}

/// Whether a process has a SIGKILL that it has not met yet, is on its way out, or is gone: it will run no more code of its own.
fn is_dying(pid: i64) -> bool {
    const SIGKILL: u64 = 1 << 8;
    // Of linux/sched.h: set by a fatal signal, and on the way out.
    const PF_EXITING: u64 = 0x4;
    const PF_SIGNALED: u64 = 0x400;
    let pending = |status: &str, name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & SIGKILL != 0)
    };
    // Between taking the signal and being marked there is a moment: it is looked at again.
    (0..100).any(|_| {
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
            return true;
        };
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest.split_whitespace().collect())
            .unwrap_or_default();
        let flags: u64 = fields
            .get(6)
            .and_then(|flags| flags.parse().ok())
            .unwrap_or(0);
        let dying = pending(&status, "SigPnd:")
            || pending(&status, "ShdPnd:")
            || flags & (PF_EXITING | PF_SIGNALED) != 0
            || matches!(fields.first(), Some(&"Z" | &"X") | None);
        if !dying {
            std::thread::sleep(Duration::from_millis(10));
        }
        dying
    })
}

/// Nothing is on the host that was not there before, except what the engine keeps on purpose. Undoing takes a moment.
fn expect_clean(host: &Host, before: &Snapshot, agent: Option<&Running>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let alive = agent.map(|agent| format!("process {} ", agent.pid()));
    loop {
        let mut left = before.leftovers(host)?;
        left.retain(|thing| !KEPT.contains(&thing.as_str()));
        left.retain(|thing| !KEPT_WHOLE.iter().any(|kept| thing.starts_with(kept)));
        left.retain(|thing| !alive.as_ref().is_some_and(|agent| thing.starts_with(agent)));
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "left on host {}:\n{}",
            host.name(),
            left.join("\n")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until a process has stopped at its fault.
pub fn wait_stopped(running: &mut Running) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let stat = format!("/proc/{}/stat", running.pid());
    loop {
        let state = fs::read_to_string(&stat)
            .ok()
            .and_then(|stat| stat.rsplit(") ").next()?.chars().next());
        if state == Some('T') {
            return Ok(());
        }
        if !running.is_alive()? || Instant::now() > deadline {
            bail!("it does not come to its fault:\n{}", running.output()?);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The process on the same host as `beside` with all these words in its command line.
pub fn find(beside: &Running, words: &[&str]) -> Result<i32> {
    let deadline = Instant::now() + LIMIT;
    let host = host_of(beside.pid()).context("it is gone")?;
    loop {
        for entry in fs::read_dir("/proc")? {
            let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if words.iter().all(|word| line.contains(word)) && host_of(pid).as_ref() == Some(&host)
            {
                return Ok(pid);
            }
        }
        ensure!(
            Instant::now() < deadline,
            "no process {words:?} on that host"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What all processes of one host share, in the container or out of it: they were started below its cgroup namespace.
fn host_of(pid: i32) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/cgroup")).ok()
}

/// Sends a signal to a process that is not a test's child.
pub fn signal(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("signalling {pid}"))?;
    // Only when it is dead are its sockets closed, and can anybody know.
    let deadline = Instant::now() + LIMIT;
    while signal == Signal::SIGKILL && is_alive(pid) {
        ensure!(Instant::now() < deadline, "process {pid} does not die");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Whether any thread of a process lives: its first may be a zombie while others still hold its sockets.
fn is_alive(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let rest = stat.rsplit_once(") ").map(|(_, rest)| rest);
        !matches!(
            rest.and_then(|rest| rest.chars().next()),
            None | Some('Z' | 'X')
        )
    })
}

/// Takes the cgroup of [`slow_down`] away again, when nothing is in it any more.
pub fn tidy_slowed(host: &Host) -> Result<()> {
    const SCRIPT: &str = "rmdir /sys/fs/cgroup/cpu/slow 2>/dev/null || rmdir /sys/fs/cgroup/slow";
    host.run("sh", ["-c", SCRIPT]).map(drop)
}

/// Leaves a process of a host so many milliseconds of a processor in every hundred, whatever else there is to do.
pub fn slow_down(host: &Host, pid: i32, milliseconds: u32) -> Result<()> {
    const SCRIPT: &str = r#"set -e
        if [ -d /sys/fs/cgroup/cpu ]; then
            slow=/sys/fs/cgroup/cpu/slow
            mkdir $slow
            echo 100000 >$slow/cpu.cfs_period_us
            echo $1 >$slow/cpu.cfs_quota_us
        else
            slow=/sys/fs/cgroup/slow
            mkdir $slow
            echo "$1 100000" >$slow/cpu.max
        fi
        echo $2 >$slow/cgroup.procs"#;
    let (quota, pid) = ((milliseconds * 1000).to_string(), pid.to_string());
    host.run("sh", ["-c", SCRIPT, "slow-down", &quota, &pid])
        .map(drop)
}
