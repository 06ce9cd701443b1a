//! runc: finding its containers and driving its checkpoint and restore.
//!
//! Facts about a container come from `ROOT/ID/state.json` (libcontainer's `State`), its status from `runc state`.

use super::cpu_quota::CpuCgroup;
use super::{Freezer, Task, task};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use thiserror::Error;

/// Where runc keeps the state of root's containers.
pub const DEFAULT_ROOT: &str = "/run/runc";

/// runc's log in a work directory.
const LOG: &str = "runc.log";

/// runc with one state directory.
#[derive(Clone, Debug)]
pub struct Runc {
    root: PathBuf,
}

/// A container as runc knows it.
#[derive(Clone, Debug)]
pub struct Container {
    /// runc's id.
    pub id: String,
    /// Where it lives: created, running, paused or stopped.
    pub status: Status,
    /// The bundle directory, absolute.
    pub bundle: PathBuf,
    /// The root filesystem, absolute.
    pub rootfs: PathBuf,
    /// Its first process, in our pid namespace.
    pub init_pid: i32,
    /// Its cgroup's freezer.
    pub freezer: Freezer,
    /// Its directory in every cgroup hierarchy, by controller (one entry, "", under cgroup v2).
    pub cgroups: BTreeMap<String, PathBuf>,
    /// What its standard streams were when it started: `pipe:[INODE]`, or a path.
    pub stdio: Vec<String>,
    /// The bundle's `config.json`.
    pub spec: serde_json::Value,
}

/// What runc says of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Set up, its program not started.
    Created,
    /// Running.
    Running,
    /// Frozen by its cgroup.
    Paused,
    /// Its first process has exited.
    Stopped,
}

/// What went wrong with runc.
#[derive(Debug, Error)]
pub enum RuncError {
    /// No such container.
    #[error("no container {id:?} under {root}")]
    NoSuchContainer {
        /// The id asked for.
        id: String,
        /// runc's state directory.
        root: PathBuf,
    },
    /// runc's own files are not as expected.
    #[error("cannot understand {path}: {why}")]
    BadState {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// runc could not be run.
    #[error("cannot run runc: {0}")]
    NotRun(#[source] io::Error),
    /// runc reported a failure.
    #[error("runc {doing}: {message}")]
    Failed {
        /// The subcommand.
        doing: &'static str,
        /// The last line it printed.
        message: String,
    },
}

impl Runc {
    /// runc with the state directory `root`.
    pub fn new(root: &Path) -> Runc {
        Runc {
            // runc may be started in another directory.
            root: std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf()),
        }
    }

    /// The state directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// runc's version line.
    pub fn version() -> Result<String, RuncError> {
        let output = Command::new("runc")
            .arg("--version")
            .output()
            .map_err(RuncError::NotRun)?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or("runc").to_string())
    }

    /// Whether runc has state for `id`, whatever its status.
    pub fn knows(&self, id: &str) -> bool {
        self.root.join(id).exists()
    }

    /// The container `id`.
    pub fn container(&self, id: &str) -> Result<Container, RuncError> {
        let state_file = self.root.join(id).join("state.json");
        let text = match fs::read_to_string(&state_file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RuncError::NoSuchContainer {
                    id: id.to_string(),
                    root: self.root.clone(),
                });
            }
            Err(error) => return Err(bad_state(&state_file, &error)),
        };
        let state: StateFile =
            serde_json::from_str(&text).map_err(|error| bad_state(&state_file, &error))?;
        let reported = self.state(id)?;
        let spec_file = reported.bundle.join("config.json");
        let spec = fs::read(&spec_file)
            .map_err(|error| bad_state(&spec_file, &error))
            .and_then(|bytes| {
                serde_json::from_slice(&bytes).map_err(|error| bad_state(&spec_file, &error))
            })?;
        let freezer = state
            .cgroup_paths
            .get("freezer")
            .map(|path| Freezer::V1(path.clone()))
            .or_else(|| {
                state
                    .cgroup_paths
                    .get("")
                    .map(|path| Freezer::V2(path.clone()))
            })
            .ok_or_else(|| bad_state(&state_file, &"it names no freezer cgroup"))?;
        Ok(Container {
            id: id.to_string(),
            status: reported.status,
            bundle: reported.bundle,
            rootfs: reported.rootfs,
            init_pid: state.init_process_pid,
            freezer,
            cgroups: state.cgroup_paths,
            stdio: state.external_descriptors,
            spec,
        })
    }

    /// The command that dumps `id`; `parent` is relative to `images`. runc's own messages go to `work/runc.log`.
    pub fn checkpoint(
        &self,
        id: &str,
        images: &Path,
        work: &Path,
        parent: Option<&Path>,
    ) -> Command {
        let mut command = self.command();
        command.arg("--log").arg(work.join(LOG));
        command.arg("checkpoint").arg("--image-path").arg(images);
        command.arg("--work-path").arg(work);
        if let Some(parent) = parent {
            command.arg("--parent-path").arg(parent);
        }
        command.arg(id);
        command
    }

    /// The command that restores `id` from `images` with the bundle `bundle`, and ends when it runs.
    ///
    /// The command's standard streams become the container's; runc's own messages go to `work/runc.log`.
    pub fn restore(&self, id: &str, bundle: &Path, images: &Path, work: &Path) -> Command {
        let mut command = self.command();
        command.arg("--log").arg(work.join(LOG));
        command
            .args(["restore", "--detach", "--bundle"])
            .arg(bundle);
        command.arg("--image-path").arg(images);
        command.arg("--work-path").arg(work);
        command.arg(id);
        command
    }

    /// What a checkpoint or restore with the work directory `work` said last.
    pub fn last_words(work: &Path) -> String {
        last_message(&fs::read_to_string(work.join(LOG)).unwrap_or_default())
    }

    /// Removes what runc keeps of `id`, killing what is left of it. Nothing to remove is no error.
    pub fn delete(&self, id: &str) -> Result<(), RuncError> {
        if !self.knows(id) {
            return Ok(());
        }
        self.run("delete", &["delete", "--force", id]).map(drop)
    }

    /// [`Runc::delete`], and if a restore died so early that runc does not know its own directory, that directory.
    pub fn forget(&self, id: &str) -> Result<(), RuncError> {
        let directory = self.root.join(id);
        if directory.join("state.json").exists() {
            self.delete(id)?;
        }
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(bad_state(&directory, &error))
            }
            _ => Ok(()),
        }
    }

    /// Removes the mark of a checkpoint that was called off: runc sets it when the images are complete, whatever follows.
    pub fn forget_checkpoint(&self, id: &str) -> Result<(), RuncError> {
        let mark = self.root.join(id).join("checkpoint");
        match fs::remove_file(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(bad_state(&mark, &error)),
            _ => Ok(()),
        }
    }

    fn state(&self, id: &str) -> Result<ReportedState, RuncError> {
        let text = self.run("state", &["state", id])?;
        serde_json::from_str(&text).map_err(|error| RuncError::Failed {
            doing: "state",
            message: format!("prints no state: {error}"),
        })
    }

    fn run(&self, doing: &'static str, arguments: &[&str]) -> Result<String, RuncError> {
        let output = self
            .command()
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(RuncError::NotRun)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(RuncError::Failed {
            doing,
            message: last_message(&String::from_utf8_lossy(&output.stderr)),
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.root);
        command
    }
}

impl Container {
    /// Its processes, read from its cgroup.
    pub fn tasks(&self) -> io::Result<Vec<Task>> {
        task::tasks_of_cgroup(self.freezer.path())
    }

    /// The directory of a controller: `memory` under v1, the unified directory under v2.
    pub fn cgroup(&self, controller: &str) -> Option<&Path> {
        self.cgroups
            .get(controller)
            .or_else(|| self.cgroups.get(""))
            .map(PathBuf::as_path)
    }

    /// Where its CPU quota is; `None` if its cgroup has none.
    pub fn cpu(&self) -> Option<CpuCgroup> {
        match self.freezer {
            Freezer::V1(_) => Some(CpuCgroup::V1 {
                cpu: self.cgroups.get("cpu")?.clone(),
                usage: self.cgroups.get("cpuacct")?.clone(),
            }),
            Freezer::V2(ref path) => Some(CpuCgroup::V2(path.clone())),
        }
    }

    /// The CRIU options file its `org.criu.config` annotation names.
    pub fn annotated_criu_config(&self) -> Option<&Path> {
        let path = self
            .spec
            .get("annotations")?
            .get("org.criu.config")?
            .as_str()?;
        (!path.is_empty()).then_some(Path::new(path))
    }
}

/// The line of runc's or CRIU's output that says what went wrong.
fn last_message(output: &str) -> String {
    let line = output
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("no message");
    // runc logs `time="…" level=error msg="…"` when its output is not a terminal.
    match line.split_once("msg=") {
        Some((_, message)) => message
            .trim_end()
            .trim_start_matches('"')
            .strip_suffix('"')
            .unwrap_or(message)
            .replace("\\\"", "\""),
        None => line.trim().to_string(),
    }
}

fn bad_state(path: &Path, why: &dyn std::fmt::Display) -> RuncError {
    RuncError::BadState {
        path: path.to_path_buf(),
        why: why.to_string(),
    }
}

#[derive(Deserialize)]
struct StateFile {
    init_process_pid: i32,
    cgroup_paths: BTreeMap<String, PathBuf>,
    #[serde(default)]
    external_descriptors: Vec<String>,
}

#[derive(Deserialize)]
struct ReportedState {
    status: Status,
    bundle: PathBuf,
    rootfs: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_of_a_logged_error_is_found() {
        let output = "time=\"2026-01-01\" level=error msg=\"criu failed: \\\"x\\\"\"\n\n";
        assert_eq!(last_message(output), "criu failed: \"x\"");
        assert_eq!(
            last_message("container does not exist\n"),
            "container does not exist"
        );
        assert_eq!(last_message(""), "no message");
    }

    #[test]
    fn a_container_that_does_not_exist_is_said_to_be_missing() {
        let root = tempfile::tempdir().unwrap();
        let error = Runc::new(root.path()).container("web").unwrap_err();
        assert!(
            matches!(error, RuncError::NoSuchContainer { .. }),
            "{error}"
        );
    }
}
