//! Making things go wrong on two hosts, and mending them again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::{Host, Link, Process, Running};

use super::scenario::{End, Fault, Moment, Role};

/// How long a moment is waited for.
const MOMENT: Duration = Duration::from_secs(60);

/// How long a process is looked for that a fault is for: many live for an instant.
const SEARCH: Duration = Duration::from_millis(1500);

/// How often it is looked whether a moment has come.
const LOOK: Duration = Duration::from_millis(1);

/// The file that takes all of a disk.
const FILLER: &str = "/var/lib/migrate/.filler";

/// The directory whose filesystem fails.
const STATE: &str = "/var/lib/migrate";

/// Where faults happen.
#[derive(Clone, Copy)]
pub struct Field<'h> {
    pub source: &'h Host,
    pub destination: &'h Host,
    pub link: &'h Link<'h>,
    /// `migrate --to --json`.
    pub mover: &'h Running,
}

impl<'h> Field<'h> {
    fn host(&self, end: End) -> &'h Host {
        match end {
            End::Source => self.source,
            End::Destination => self.destination,
        }
    }

    /// Waits for the moment, lets the fault happen and, if it is one that passes, mends it. Returns whether it happened: a moment
    /// may never come, and a process not be there.
    pub fn inflict(&self, moment: Moment, fault: Fault) -> Result<bool> {
        if !self.await_moment(moment)? {
            return Ok(false);
        }
        match fault {
            Fault::Kill(role) => self.signal(role, Signal::SIGKILL).map(|hit| hit.is_some()),
            Fault::Pause(role, ms) => {
                let Some(pid) = self.signal(role, Signal::SIGSTOP)? else {
                    return Ok(false);
                };
                pause(ms);
                // ESRCH: it has been killed meanwhile.
                let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
                Ok(true)
            }
            Fault::CutLink(ms) => {
                self.link.down()?;
                pause(ms);
                self.link.up().map(|()| true)
            }
            Fault::FillDisk(end) => {
                let fill = format!("cat /dev/zero >{FILLER} 2>/dev/null; test -s {FILLER}");
                self.host(end).run("sh", ["-c", &fill]).map(|_| true)
            }
            Fault::StallDisk(end, ms) => {
                let host = self.host(end);
                host.run("fsfreeze", ["--freeze", STATE])?;
                pause(ms);
                host.run("fsfreeze", ["--unfreeze", STATE]).map(|_| true)
            }
            Fault::Restart(end) => self.host(end).restart().map(|()| true),
        }
    }

    /// Ends what lasts: a disk that was filled.
    pub fn mend(&self) -> Result<()> {
        for host in [self.source, self.destination] {
            host.run("rm", ["-f", FILLER])?;
        }
        Ok(())
    }

    fn await_moment(&self, moment: Moment) -> Result<bool> {
        let (event, ms) = match moment {
            Moment::Order(ms) => {
                pause(ms);
                return Ok(true);
            }
            Moment::Event(event, ms) => (format!("\"event\":\"{event}\""), ms),
        };
        let deadline = Instant::now() + MOMENT;
        while Instant::now() < deadline {
            // Asked before its output is read: what it said last is then read too.
            let ended = !is_there(self.mover.pid());
            if self.mover.stdout()?.contains(&event) {
                pause(ms);
                return Ok(true);
            }
            if ended {
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
        Ok(false)
    }

    /// Sends a signal to a process with this role; returns which it was.
    fn signal(&self, role: Role, signal: Signal) -> Result<Option<i32>> {
        let host = self.host(role.end());
        let deadline = Instant::now() + SEARCH;
        while Instant::now() < deadline {
            let suits: Vec<Process> = host
                .processes()?
                .into_iter()
                .filter(|process| has_role(process, role))
                .collect();
            if !suits.is_empty() {
                let victim = &suits[fastrand::usize(..suits.len())];
                match kill(Pid::from_raw(victim.pid), signal) {
                    Ok(()) => return Ok(Some(victim.pid)),
                    Err(Errno::ESRCH) => {}
                    Err(why) => return Err(why).context("signalling a process of a host"),
                }
            }
            std::thread::sleep(LOOK);
        }
        Ok(None)
    }
}

/// Whether it is a process that the engine is made of or has started.
pub fn is_engine(process: &Process) -> bool {
    is_migrate(process) || is_runtime(process) || is_criu(process)
}

/// Whether it is the daemon that is always there.
pub fn is_agent(process: &Process) -> bool {
    is_migrate(process) && process.arguments.get(1).is_some_and(|word| word == "agent")
}

fn has_role(process: &Process, role: Role) -> bool {
    let says = |word: &str| process.arguments.iter().any(|argument| argument == word);
    match role {
        Role::Mover => is_migrate(process) && says("--to"),
        Role::Guard => is_migrate(process) && says("guard"),
        Role::Agent => is_agent(process),
        Role::Pager => is_migrate(process) && says("pager") && !says("--standby"),
        Role::Standby => is_migrate(process) && says("--standby"),
        Role::Runtime(_) => is_runtime(process) && (says("checkpoint") || says("restore")),
        Role::Criu(_) => is_criu(process),
        Role::Any(_) => is_engine(process),
    }
}

fn is_migrate(process: &Process) -> bool {
    process.program == "migrate"
}

/// runc runs from a sealed copy of itself, which has another name.
fn is_runtime(process: &Process) -> bool {
    let name = process.arguments.first().map_or("", String::as_str);
    name == "runc" || name.ends_with("/runc")
}

fn is_criu(process: &Process) -> bool {
    process.program == "criu"
}

fn is_there(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !matches!(
        stat.rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next()),
        None | Some('Z' | 'X')
    )
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}
