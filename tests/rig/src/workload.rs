//! What runs in a container, and what it says of itself.
//!
//! A workload is a static C program below `bench-workloads/` that knows what its memory, files and sockets should hold. It
//! appends JSON lines to `/log/<name>.jsonl` in its root: `{"ready":true}` when it is set up, lines on its progress while it runs,
//! and on SIGUSR1 a verdict with `"verified"`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::rootfs::Rootfs;

/// A program for a container, with its arguments and the files it needs.
#[derive(Debug, Clone)]
pub struct Workload {
    name: String,
    args: Vec<String>,
    /// Programs of this machine it needs beside itself, and where.
    programs: Vec<(PathBuf, String)>,
    /// Files of `bench-workloads/<name>/` it needs, and where.
    files: Vec<(String, String)>,
}

/// What a workload says on SIGUSR1, after it has looked at everything it holds.
#[derive(Debug, Clone, Deserialize)]
pub struct Verified {
    /// Everything is as it should be.
    pub verified: bool,
    /// Things found wrong.
    pub errors: u64,
    /// The longest time between two steps of the workload's clock since it started, in milliseconds: when it did not run.
    pub longest_gap_ms: f64,
    /// Steps done since it started; never goes back.
    pub seq: u64,
    /// What was found wrong, as the workload logged it since it was asked.
    #[serde(skip)]
    pub complaints: Vec<Value>,
    /// The rest, by workload: pages, keys, files looked at.
    #[serde(flatten)]
    pub more: serde_json::Map<String, Value>,
}

impl Workload {
    /// The workload in `bench-workloads/<name>/`, with arguments.
    pub fn new<I>(name: &str, args: I) -> Workload
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        Workload {
            name: name.to_string(),
            args: args.into_iter().map(Into::into).collect(),
            programs: Vec::new(),
            files: Vec::new(),
        }
    }

    /// `memory_mib` of checksummed memory, `dirty_mb_s` of it rewritten every second at random.
    pub fn memory_writer(memory_mib: u32, dirty_mb_s: u32) -> Workload {
        Workload::new(
            "memory-writer",
            [
                format!("--memory-mib={memory_mib}"),
                format!("--dirty-mb-s={dirty_mb_s}"),
            ],
        )
    }

    /// Forty processes with one of everything a kernel offers. With `churn` some keep forking and executing.
    pub fn zoo(churn: bool) -> Workload {
        Workload::new("zoo", churn.then_some("--churn"))
    }

    /// Debian's redis-server with `data_mib` of checksummed records, and a writer that adds to them over one connection.
    pub fn redis(data_mib: u32) -> Workload {
        let mut redis = Workload::new("redis", [format!("--data-mib={data_mib}")]);
        // Debian's redis-server is this program under another name; the package of that name would bring a service along.
        redis.programs.push((
            PathBuf::from("/usr/bin/redis-check-rdb"),
            "/bin/redis-server".to_string(),
        ));
        redis
            .files
            .push(("redis.conf".to_string(), "/etc/redis.conf".to_string()));
        redis
    }

    /// `memory_mib` that devices write to past the page tables (`O_DIRECT`), and what the kernel writes of signals waited for.
    pub fn kernel_writer(memory_mib: u32) -> Workload {
        Workload::new("kernel-writer", [format!("--memory-mib={memory_mib}")])
    }

    /// Files that are written, truncated, renamed, linked and deleted all the time.
    pub fn file_mutator() -> Workload {
        Workload::new("file-mutator", [] as [&str; 0])
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Workload {
        self.args.push(arg.into());
        self
    }

    /// The name of its directory and program.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The command line in the container.
    pub(crate) fn command_line(&self) -> Vec<String> {
        let program = format!("/bin/{}", self.name);
        std::iter::once(program)
            .chain(self.args.iter().cloned())
            .collect()
    }

    /// Builds the container's root with the program in it.
    pub(crate) fn install(&self, dir: &Path) -> Result<()> {
        let rootfs = Rootfs::create(dir)?;
        rootfs.program(&compile(&self.name)?, &format!("/bin/{}", self.name))?;
        for (program, inside) in &self.programs {
            rootfs.program(program, inside)?;
        }
        for (file, inside) in &self.files {
            let source = source_dir(&self.name).join(file);
            rootfs.file(
                inside,
                &fs::read_to_string(&source)
                    .with_context(|| format!("reading {}", source.display()))?,
            )?;
        }
        Ok(())
    }
}

/// The lines of a workload's log. A last line without its end is still being written and left out.
pub(crate) fn read_log(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(|line| {
            serde_json::from_str(line).with_context(|| format!("in {}: {line}", path.display()))
        })
        .collect()
}

/// Compiles a workload, together with what all share, unless that was done since a source last changed.
fn compile(name: &str) -> Result<PathBuf> {
    let changed = |path: &Path| fs::metadata(path).and_then(|about| about.modified());
    let mut sources = Vec::new();
    let mut newest = UNIX_EPOCH;
    for dir in [source_dir(name), source_dir("common")] {
        for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry?.path();
            newest = newest.max(changed(&path)?);
            sources.extend(
                path.extension()
                    .is_some_and(|kind| kind == "c")
                    .then_some(path),
            );
        }
    }
    let dir = repository().join("target/workloads");
    let program = dir.join(name);
    if changed(&program).is_ok_and(|built| built > newest) {
        return Ok(program);
    }
    fs::create_dir_all(&dir)?;
    // Under another name first: another test may be compiling or copying the same program.
    let fresh = dir.join(format!("{name}.{}", std::process::id()));
    let output = Command::new("cc")
        .args([
            "-static",
            "-O2",
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pthread",
            "-I",
        ])
        .arg(source_dir("common"))
        .arg("-o")
        .arg(&fresh)
        .args(&sources)
        .output()
        .context("running cc")?;
    ensure!(
        output.status.success(),
        "cc {name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::rename(&fresh, &program)?;
    Ok(program)
}

fn source_dir(name: &str) -> PathBuf {
    repository().join("bench-workloads").join(name)
}

/// Compiles every workload.
pub(crate) fn compile_all() -> Result<()> {
    let names = [
        "memory-writer",
        "zoo",
        "redis",
        "file-mutator",
        "prefork",
        "kernel-writer",
    ];
    names
        .into_iter()
        .try_for_each(|name| compile(name).map(drop))
}

/// The top of this repository: this crate lies in `tests/rig`.
pub(crate) fn repository() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here)
}
