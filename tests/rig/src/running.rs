//! A command running on a host: its output in files, its end awaited with a limit, killed when forgotten.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// How often a condition is looked at while waiting for it.
const LOOK: Duration = Duration::from_millis(5);

/// A process started by [`Host::spawn`](crate::Host::spawn). Dropping it kills the process.
pub struct Running {
    what: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Running {
    pub(crate) fn start(mut command: Command, program: &str, log: &Path) -> Result<Running> {
        let (stdout, stderr) = (log.with_extension("out"), log.with_extension("err"));
        let open = |path: &Path| {
            File::create(path).with_context(|| format!("creating {}", path.display()))
        };
        command
            .stdin(Stdio::null())
            .stdout(open(&stdout)?)
            .stderr(open(&stderr)?);
        let child = command
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let arguments = command
            .get_args()
            .map(|argument| argument.to_string_lossy().into_owned());
        let what = arguments
            .skip_while(|argument| argument != "/run/.enter")
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ");
        Ok(Running {
            what,
            child,
            stdout,
            stderr,
        })
    }

    /// The command line, for messages.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The process id, as seen on this machine and on every host alike.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for the end. An error when it has not come within `limit`; the process then goes on.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!(
                    "{} is not done after {limit:?}\n{}",
                    self.what,
                    self.output()?
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Whether it has not ended.
    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits until a line with `text` is in its output, and returns that line. An error when the process ends first.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            // Asked before the output is read: what it wrote last is then read too.
            let ended = self.child.try_wait()?;
            let output = self.output()?;
            if let Some(line) = output.lines().find(|line| line.contains(text)) {
                return Ok(line.to_string());
            }
            if let Some(status) = ended {
                bail!(
                    "{} ended ({status}) without saying {text:?}\n{output}",
                    self.what
                );
            }
            if Instant::now() > deadline {
                bail!(
                    "{} has not said {text:?} within {limit:?}\n{output}",
                    self.what
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid()), signal).with_context(|| format!("signalling {}", self.what))
    }

    /// Kills it, and returns when it is dead as a whole: its last thread gone, its sockets closed.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        // Left to be waited for: whoever asks later whether it lives has to find out.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(Pid::from_raw(self.pid())), flags)
            .map(drop)
            .with_context(|| format!("waiting for the end of {}", self.what))
    }

    /// What it has written to stdout.
    pub fn stdout(&self) -> Result<String> {
        read(&self.stdout)
    }

    /// What it has written to stdout and stderr, one after the other.
    pub fn output(&self) -> Result<String> {
        Ok(read(&self.stdout)? + &read(&self.stderr)?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails when it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
