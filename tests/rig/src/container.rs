//! A runc container with a workload in it, followed from host to host.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::host::Host;
use crate::workload::{Verified, Workload, read_log};

/// How often a log is looked at while waiting for a line.
const LOOK: Duration = Duration::from_millis(10);

/// A container by its id and its workload. It does not know which host it is on: every method is asked about one.
pub struct Container {
    id: String,
    log_name: String,
    /// The other ends of its standard output and error, if they are pipes: held, for a pipe without reader kills.
    _heard: Option<Child>,
}

/// What may differ from container to container.
#[derive(Debug, Clone, Default)]
pub struct ContainerOptions {
    /// Limit of the memory cgroup in MiB.
    pub memory_limit_mib: Option<u32>,
    /// System calls that fail with EPERM, by a seccomp filter.
    pub forbidden_calls: Vec<String>,
    /// User and group the workload runs as; 0 unless said.
    pub user: u32,
    /// Standard output and error are pipes that somebody on the first host reads, and not `/dev/null`.
    pub piped: bool,
    /// Reads from the disk that the host lies on are held to so many a second, where the kernel can do that: each is under way
    /// for long.
    pub reads_a_second: Option<u32>,
}

impl Container {
    /// Makes the bundle `/srv/<id>` on the host, starts it with `runc run` and waits until the workload is ready.
    pub fn create(
        host: &Host,
        id: &str,
        workload: &Workload,
        options: &ContainerOptions,
    ) -> Result<Container> {
        let bundle = format!("/srv/{id}");
        let rootfs = host.path(&bundle).join("rootfs");
        std::fs::create_dir_all(&rootfs).with_context(|| format!("creating the bundle of {id}"))?;
        workload.install(&rootfs)?;
        std::os::unix::fs::chown(rootfs.join("log"), Some(options.user), Some(options.user))?;
        host.run("runc", ["spec", "--bundle", &bundle])?;
        let config = host.path(&bundle).join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&config)?)?;
        adapt(&mut spec, id, workload, options);
        if let (Some(rate), Some((major, minor))) = (options.reads_a_second, throttled(&rootfs)?) {
            let limit = json!([{ "major": major, "minor": minor, "rate": rate }]);
            spec["linux"]["resources"]["blockIO"] = json!({ "throttleReadIOPSDevice": limit });
        }
        std::fs::write(&config, serde_json::to_vec_pretty(&spec)?)?;

        // Detached, the container keeps runc's own stdio: a file there could be dumped by nobody.
        let log = format!("{bundle}/runc.log");
        let stream = || match options.piped {
            true => Stdio::piped(),
            false => Stdio::null(),
        };
        let mut runc = host
            .command("runc")
            .args(["--log", &log, "run", "--detach", "--bundle", &bundle, id])
            .stdin(Stdio::null())
            .stdout(stream())
            .stderr(stream())
            .spawn()?;
        let status = runc.wait()?;
        let said = || std::fs::read_to_string(host.path(&log)).unwrap_or_default();
        ensure!(
            status.success(),
            "runc run {id} on host {}: {status}\n{}",
            host.name(),
            said()
        );
        let container = Container {
            id: id.to_string(),
            log_name: format!("{}.jsonl", workload.name()),
            _heard: options.piped.then_some(runc),
        };
        container.wait_ready(host, Duration::from_secs(300))?;
        Ok(container)
    }

    /// A container that another machine's rig created.
    pub fn from_elsewhere(id: &str, workload: &Workload) -> Container {
        Container {
            id: id.to_string(),
            log_name: format!("{}.jsonl", workload.name()),
            _heard: None,
        }
    }

    /// The id it has with runc.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What `runc state` says on this host; `None` when the host has no such container.
    pub fn state(&self, host: &Host) -> Result<Option<Value>> {
        let output = host.command("runc").args(["state", &self.id]).output()?;
        if output.status.success() {
            return Ok(Some(serde_json::from_slice(&output.stdout)?));
        }
        let why = String::from_utf8_lossy(&output.stderr);
        ensure!(
            why.contains("does not exist"),
            "runc state {} on host {}: {}",
            self.id,
            host.name(),
            why.trim()
        );
        Ok(None)
    }

    /// Whether it runs on this host: not stopped, not paused, its first process alive.
    pub fn is_running(&self, host: &Host) -> Result<bool> {
        Ok(self
            .state(host)?
            .is_some_and(|state| state["status"] == "running"))
    }

    /// The first process, as seen on every host.
    pub fn pid(&self, host: &Host) -> Result<i32> {
        let pid = self
            .state(host)?
            .and_then(|state| state["pid"].as_i64())
            .unwrap_or(0);
        ensure!(
            pid > 0,
            "container {} has no process on host {}",
            self.id,
            host.name()
        );
        Ok(pid as i32)
    }

    /// The lines the workload has logged, oldest first.
    pub fn log(&self, host: &Host) -> Result<Vec<Value>> {
        read_log(&self.log_path(host)?)
    }

    /// Makes the workload look at everything it holds, and returns its verdict. An error when there is none within `limit`;
    /// a verdict of "not verified" is no error: the caller asserts.
    pub fn verify(&self, host: &Host, limit: Duration) -> Result<Verified> {
        let path = self.log_path(host)?;
        let pid = self.pid(host)?;
        let asked_at = read_log(&path)?.len();
        self.signal(host, "USR1")?;
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            // Asked before the log is read: a workload that ends over what it finds has said so by then.
            let alive = is_alive(pid);
            let since = read_log(&path)?.split_off(asked_at);
            if let Some(place) = since.iter().position(|line| line.get("verified").is_some()) {
                let mut verdict: Verified = serde_json::from_value(since[place].clone())?;
                // What is said every second, or of a gap, carries a time; complaints do not.
                verdict.complaints = since[..place]
                    .iter()
                    .filter(|line| line.get("t").is_none())
                    .cloned()
                    .collect();
                return Ok(verdict);
            }
            ensure!(
                alive,
                "container {} ended on host {} instead of verifying; it said:\n{}",
                self.id,
                host.name(),
                self.last_words(host)
            );
            std::thread::sleep(LOOK);
        }
        bail!(
            "container {} gave no verdict within {limit:?}; it said:\n{}",
            self.id,
            self.last_words(host)
        )
    }

    /// Sends a signal to the first process.
    pub fn signal(&self, host: &Host, signal: &str) -> Result<()> {
        host.run("runc", ["kill", &self.id, signal]).map(drop)
    }

    /// Kills it and removes its runtime state from this host. The bundle stays.
    pub fn delete(&self, host: &Host) -> Result<()> {
        host.run("runc", ["delete", "--force", &self.id]).map(drop)
    }

    fn wait_ready(&self, host: &Host, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        // One that has ended already has no process, and last words all the same.
        let pid = self.pid(host).unwrap_or_default();
        let path = self.log_path(host)?;
        while Instant::now() < deadline {
            let alive = is_alive(pid);
            // There is no log until the workload has opened it.
            let log = read_log(&path).unwrap_or_default();
            if log.iter().any(|line| line["ready"] == true) {
                return Ok(());
            }
            ensure!(
                alive,
                "container {} ended at its start:\n{}",
                self.id,
                self.last_words(host)
            );
            std::thread::sleep(LOOK);
        }
        bail!(
            "container {} is not ready after {limit:?}:\n{}",
            self.id,
            self.last_words(host)
        )
    }

    fn log_path(&self, host: &Host) -> Result<PathBuf> {
        let state = self.state(host)?;
        let rootfs = state.as_ref().and_then(|state| state["rootfs"].as_str());
        let rootfs = rootfs.with_context(|| {
            format!("there is no container {} on host {}", self.id, host.name())
        })?;
        Ok(host.path(rootfs).join("log").join(&self.log_name))
    }

    fn last_words(&self, host: &Host) -> String {
        let log = self
            .log_path(host)
            .and_then(|path| Ok(std::fs::read_to_string(path)?))
            .unwrap_or_else(|why| why.to_string());
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }
}

/// Whether a process exists. Much cheaper than asking runc, and asked often.
fn is_alive(pid: i32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

/// The disk that a directory lies on, if this machine can hold back what is read from it.
fn throttled(directory: &Path) -> Result<Option<(u64, u64)>> {
    use std::os::unix::fs::MetadataExt;
    let of_v1 = Path::new("/sys/fs/cgroup/blkio/blkio.throttle.read_iops_device").exists();
    let of_v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control")
        .is_ok_and(|controllers| controllers.split_whitespace().any(|name| name == "io"));
    let device = std::fs::metadata(directory)?.dev();
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff);
    let block = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // Only whole disks can be; a filesystem without one has a device that is none.
    let disk = match block.join("partition").exists() {
        true => block.join("../dev"),
        false => block.join("dev"),
    };
    let Ok(numbers) = std::fs::read_to_string(disk) else {
        return Ok(None);
    };
    let numbers = numbers
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    Ok(numbers.filter(|_| of_v1 || of_v2))
}

/// Makes `runc spec`'s default container into one that runs without a terminal.
fn adapt(spec: &mut Value, id: &str, workload: &Workload, options: &ContainerOptions) {
    let process = &mut spec["process"];
    process["terminal"] = json!(false);
    process["args"] = json!(workload.command_line());
    process["user"] = json!({ "uid": options.user, "gid": options.user });
    // CRIU sets the limits again at restore, and may not raise them above its own without CAP_SYS_RESOURCE.
    process["rlimits"] = json!([
        { "type": "RLIMIT_NOFILE", "soft": 16384, "hard": 16384 },
        { "type": "RLIMIT_NPROC", "soft": 16384, "hard": 16384 },
    ]);
    spec["root"]["readonly"] = json!(false);
    spec["hostname"] = json!(id);
    let linux = &mut spec["linux"];
    linux["cgroupsPath"] = json!(format!("/{id}"));
    if let Some(mib) = options.memory_limit_mib {
        linux["resources"]["memory"] = json!({ "limit": i64::from(mib) << 20 });
    }
    if !options.forbidden_calls.is_empty() {
        linux["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": options.forbidden_calls, "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }],
        });
    }
}
