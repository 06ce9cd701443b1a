//! runc: finding its containers and driving its checkpoint and restore.
//!
//! Facts about a container come from `ROOT/ID/state.json` (libcontainer's `State`), its status from `runc state`.

use super::cpu_quota::CpuCgroup;
use super::instance::{Instance, inode_of};
use super::{Freezer, Task, home, task};
use crate::migration::MigrationId;
use crate::migration::journal::ProcessName;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use thiserror::Error;

/// Where runc keeps the state of root's containers.
pub const DEFAULT_ROOT: &str = "/run/runc";

/// The annotation that says by which migration a container came to its host.
pub const MARK: &str = "org.migrate.arrival";

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
    /// What tells it from any other of its name.
    pub instance: Instance,
    /// What its standard streams were when it started: `pipe:[INODE]`, or a path.
    pub stdio: Vec<String>,
    /// The bundle's `config.json`.
    pub spec: serde_json::Value,
    /// The CRIU options file that its `org.criu.config` annotation names: as it was started, which is what runc goes by.
    pub annotated_criu_config: Option<PathBuf>,
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

    /// runc's own directory for `id`.
    pub fn directory(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// Whether the container that now has the name `id` is this one.
    pub fn is(&self, id: &str, instance: &Instance) -> Result<bool, RuncError> {
        let now = self.state_file(id)?;
        Ok(now.is_some_and(|now| now.init() == instance.init && now.created == instance.created))
    }

    /// What runc has on record of `id`; `None` if it has no record.
    pub fn record(&self, id: &str) -> Result<Option<RuntimeRecord>, RuncError> {
        let state = self.state_file(id)?;
        Ok(state.map(|state| RuntimeRecord {
            init: state.init(),
            came_by: state.config.label(MARK).and_then(|id| id.parse().ok()),
            bundle: state.config.label("bundle").map(PathBuf::from),
            cgroups: state.cgroup_paths.into_values().collect(),
        }))
    }

    fn state_file(&self, id: &str) -> Result<Option<StateFile>, RuncError> {
        let path = self.directory(id).join("state.json");
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| bad_state(&path, &error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(bad_state(&path, &error)),
        }
    }

    /// The container `id`.
    pub fn container(&self, id: &str) -> Result<Container, RuncError> {
        let state_file = self.directory(id).join("state.json");
        let Some(state) = self.state_file(id)? else {
            return Err(RuncError::NoSuchContainer {
                id: id.to_string(),
                root: self.root.clone(),
            });
        };
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
            instance: Instance {
                cgroup: inode_of(freezer.path())
                    .map_err(|error| bad_state(freezer.path(), &error))?
                    .unwrap_or_default(),
                init: state.init(),
                created: state.created,
            },
            freezer,
            cgroups: state.cgroup_paths,
            stdio: state.external_descriptors,
            annotated_criu_config: state
                .config
                .label("org.criu.config")
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
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

    /// Removes what runc keeps of `id`, whose processes are dead. runc refuses this for one that lives, so that a container
    /// which has come to have the name in this moment is safe. Nothing to remove is no error.
    pub fn delete_dead(&self, id: &str) -> Result<(), RuncError> {
        if !self.knows(id) {
            return Ok(());
        }
        self.run("delete", &["delete", id]).map(drop)
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

    /// What lists the pids of its processes, for another thread.
    pub fn list_tasks(&self) -> Box<dyn Fn() -> io::Result<Vec<i32>> + Send> {
        let cgroup = self.freezer.path().to_path_buf();
        Box::new(move || task::pids_of_cgroup(&cgroup).map(|pids| pids.into_iter().collect()))
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

    /// The migration by which it came here, if it lives in the directory that the engine made for it then: its configuration
    /// and the directory say the same.
    pub fn came_by(&self, state_dir: &Path) -> Option<MigrationId> {
        let mark = self.spec.get("annotations")?.get(MARK)?.as_str()?;
        let marked = home::came_by(state_dir, &self.id, &self.bundle)?;
        (mark.parse() == Ok(marked)).then_some(marked)
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

/// What runc's own record says of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeRecord {
    /// Its first process.
    pub init: ProcessName,
    /// The migration it came by, as its annotation [`MARK`] says.
    pub came_by: Option<MigrationId>,
    /// The bundle directory.
    pub bundle: Option<PathBuf>,
    /// Its directories in the cgroup hierarchies.
    pub cgroups: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct StateFile {
    init_process_pid: i32,
    init_process_start: u64,
    created: String,
    config: ConfigInState,
    cgroup_paths: BTreeMap<String, PathBuf>,
    #[serde(default)]
    external_descriptors: Vec<String>,
}

impl StateFile {
    fn init(&self) -> ProcessName {
        ProcessName {
            pid: self.init_process_pid,
            start_time: self.init_process_start,
        }
    }
}

#[derive(Deserialize)]
struct ConfigInState {
    /// Annotations and the bundle, each as `name=value`.
    #[serde(default)]
    labels: Option<Vec<String>>,
}

impl ConfigInState {
    fn label(&self, name: &str) -> Option<&str> {
        let mut labels = self.labels.iter().flatten();
        labels.find_map(|label| label.strip_prefix(name)?.strip_prefix('='))
    }
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
    fn a_container_of_the_same_name_that_was_made_later_is_another() {
        let root = tempfile::tempdir().unwrap();
        let runc = Runc::new(root.path());
        let write = |pid: i32, start: u64, created: &str, labels: &str| {
            let state = format!(
                r#"{{"init_process_pid":{pid},"init_process_start":{start},"created":"{created}",
                "config":{{"labels":{labels}}},"cgroup_paths":{{"":"/sys/fs/cgroup/web"}}}}"#
            );
            fs::create_dir_all(runc.directory("web")).unwrap();
            fs::write(runc.directory("web").join("state.json"), state).unwrap();
        };
        let instance = Instance {
            init: ProcessName {
                pid: 7,
                start_time: 99,
            },
            created: "then".into(),
            cgroup: Default::default(),
        };
        assert!(!runc.is("web", &instance).unwrap());
        assert_eq!(runc.record("web").unwrap(), None);
        write(7, 99, "then", "null");
        assert!(runc.is("web", &instance).unwrap());
        assert_eq!(runc.record("web").unwrap().unwrap().came_by, None);
        // The pid used again, and a restart with the very same pid and tick.
        for (start, created) in [(100, "then"), (99, "now")] {
            let id = "07".repeat(16);
            write(
                7,
                start,
                created,
                &format!(r#"["{MARK}={id}","bundle=/b"]"#),
            );
            assert!(!runc.is("web", &instance).unwrap());
            let record = runc.record("web").unwrap().unwrap();
            assert_eq!(record.came_by.unwrap().to_string(), id);
            assert_eq!(record.bundle.as_deref(), Some(Path::new("/b")));
        }
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
