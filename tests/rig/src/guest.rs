//! Guests: real kernels other than this machine's, in QEMU, through `scripts/guest`.
//!
//! A [`Job`] (programs of this build, a shell script) and a kernel enter; what the job printed, its exit code and the
//! files it left come out. In a guest this repository stands at the same path as here, with only what the job took along,
//! so that programs which know their paths from the build find everything.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::host::CRIU_PREFIX;
use crate::workload::{compile_all, repository};

/// Kernels of `scripts/guest`: 6.1 has soft-dirty but neither `WP_ASYNC` nor `PAGEMAP_SCAN`, 6.12 has all three.
pub const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// What a guest is to do.
#[derive(Debug)]
pub struct Job {
    dir: TempDir,
    script: String,
}

impl Job {
    /// A job that takes the workloads along. `script` is run by bash in the repository, with `-eu`; what it leaves in
    /// `/job/out` comes back.
    pub fn new(script: &str) -> Result<Job> {
        let job = Job {
            dir: TempDir::new().context("making a directory for a guest's job")?,
            script: script.to_string(),
        };
        compile_all()?;
        for inside in ["bench-workloads", "target/workloads"] {
            job.copy(&repository().join(inside), &job.inside(inside))?;
        }
        Ok(job)
    }

    /// Takes a program of this build along, at its own path but without its debug information, and returns that path.
    pub fn program(&self, program: &Path) -> Result<PathBuf> {
        let inside = program.strip_prefix(repository()).with_context(|| {
            format!(
                "{} is not below {}: a guest has only this repository",
                program.display(),
                repository().display()
            )
        })?;
        let copy = self.inside(inside);
        make_parent(&copy)?;
        run(Command::new("strip").arg("-o").arg(&copy).arg(program))?;
        Ok(program.to_path_buf())
    }

    /// Takes a directory of this repository along.
    pub fn directory(&self, directory: &Path) -> Result<()> {
        let inside = directory
            .strip_prefix(repository())
            .with_context(|| format!("{} is not in this repository", directory.display()))?;
        self.copy(directory, &self.inside(inside))
    }

    /// Takes the newer CRIU of this machine along (`scripts/setup`), to be found before Debian 13's own.
    pub fn newer_criu(&self) -> Result<()> {
        let prefix = Path::new(CRIU_PREFIX);
        ensure!(
            prefix.join("bin/criu").exists(),
            "{CRIU_PREFIX} is missing: run scripts/setup with MIGRATE_CRIU_PREFIX={CRIU_PREFIX}"
        );
        self.copy(prefix, &self.dir.path().join("criu"))
    }

    fn inside(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join("tree").join(path)
    }

    /// Times are kept: a workload older than its sources would be compiled again, and there is no compiler.
    fn copy(&self, from: &Path, to: &Path) -> Result<()> {
        make_parent(to)?;
        run(Command::new("cp").arg("-a").arg(from).arg(to))
    }

    fn write(&self) -> Result<()> {
        let text = format!(
            "#!/bin/bash\nset -eu\nmkdir -p {here}\nmount --bind /job/tree {here}\n\
             if [ -e /job/criu ]; then mkdir -p {CRIU_PREFIX}; mount --bind /job/criu {CRIU_PREFIX}; fi\n\
             cd {here}\nexport RUST_BACKTRACE=0\n{script}\n",
            here = repository().display(),
            script = self.script,
        );
        let path = self.dir.path().join("run");
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        run(Command::new("chmod").arg("755").arg(&path))
    }
}

/// A machine to boot.
#[derive(Debug, Clone)]
pub struct Guest {
    /// One of [`KERNELS`].
    pub kernel: &'static str,
    /// Its memory.
    pub memory_mib: u32,
    /// Its processors.
    pub cpus: u32,
    /// When it is killed.
    pub limit: Duration,
    /// The socket that joins two guests, and whether this one makes it.
    pub wire: Option<(PathBuf, WireEnd)>,
}

/// Which end of a wire a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireEnd {
    /// It makes the socket.
    Listens,
    /// It waits for the socket and connects.
    Connects,
}

impl Guest {
    /// A guest with one processor and 2 GiB that may take a quarter of an hour: it may have to share this machine.
    ///
    /// With a second processor kernel 6.12 died now and then in `__schedule`, in the middle of an instruction that it was
    /// patching: QEMU 7.2's emulation does not make such a change visible to other processors in order. The guest's init
    /// keeps the one patch that was seen from happening; tests, which run two guests at a time, do without.
    pub fn new(kernel: &'static str) -> Guest {
        Guest {
            kernel,
            memory_mib: 2048,
            cpus: 1,
            limit: Duration::from_secs(900),
            wire: None,
        }
    }

    /// Boots it with a job. Dropping what is returned ends it.
    pub fn start(&self, job: Job) -> Result<RunningGuest> {
        job.write()?;
        let out = TempDir::new().context("making a directory for a guest's results")?;
        let log = out.path().join(".log");
        let file = fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        // Told to end when this process does, however that happens.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "TERM"])
            .arg(repository().join("scripts/guest"))
            .arg("run")
            .args(["--memory", &self.memory_mib.to_string()])
            .args(["--cpus", &self.cpus.to_string()])
            .args(["--limit", &self.limit.as_secs().to_string()])
            .arg("--out")
            .arg(out.path().join("files"));
        if let Some((path, end)) = &self.wire {
            let end = match end {
                WireEnd::Listens => "listen",
                WireEnd::Connects => "connect",
            };
            command
                .arg("--wire")
                .arg(format!("{end}:{}", path.display()));
        }
        let child = command
            .arg(self.kernel)
            .arg(job.dir.path())
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("starting scripts/guest")?;
        Ok(RunningGuest {
            kernel: self.kernel,
            // Building the images comes on top, once.
            deadline: Instant::now() + self.limit + Duration::from_secs(600),
            child,
            log,
            out,
            _job: job,
        })
    }

    /// Boots it, waits for the job's end, and fails with all it printed unless it succeeded.
    pub fn run(&self, job: Job) -> Result<Finished> {
        self.start(job)?.wait()
    }
}

/// A guest at work.
#[derive(Debug)]
pub struct RunningGuest {
    kernel: &'static str,
    deadline: Instant,
    child: Child,
    log: PathBuf,
    out: TempDir,
    _job: Job,
}

/// What a job that succeeded left.
#[derive(Debug)]
pub struct Finished {
    /// What it printed.
    pub output: String,
    out: TempDir,
}

impl Finished {
    /// A file that the job left in `/job/out`.
    pub fn file(&self, name: &str) -> Result<String> {
        let path = self.out.path().join("files").join(name);
        fs::read_to_string(&path)
            .with_context(|| format!("the job left no {name}; it said\n{}", self.output))
    }
}

impl RunningGuest {
    /// Waits for the job's end; an error with all it printed unless it succeeded.
    pub fn wait(mut self) -> Result<Finished> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                let output = self.said();
                ensure!(
                    status.success(),
                    "the job in the {} guest ended with {status}\n{output}",
                    self.kernel
                );
                let out = std::mem::replace(&mut self.out, TempDir::new()?);
                return Ok(Finished { output, out });
            }
            if Instant::now() > self.deadline {
                bail!("the {} guest does not end\n{}", self.kernel, self.said());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        // The script ends QEMU with itself.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        if let Ok(None) = self.child.try_wait() {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

/// The path of the program or test program `name` of this workspace, built if it has to be by `cargo` with `arguments`.
pub fn built(name: &str, arguments: &[&str]) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(arguments)
        .args(["--quiet", "--message-format=json"])
        .current_dir(repository())
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo")?;
    ensure!(
        output.status.success(),
        "cargo {}: {}",
        arguments.join(" "),
        output.status
    );
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo {} built no program {name}", arguments.join(" ")))
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().context("a path without a directory")?;
    fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("running {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
