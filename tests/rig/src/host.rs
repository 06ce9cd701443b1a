//! One test host: the namespaces, cgroups and directories that make a part of this machine a host of its own.
//!
//! A keeper process (`host.sh`) makes the host and removes it when its stdin closes. Whatever happens to this process, the
//! kernel closes that pipe, so no way of ending a test leaves a host behind.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::running::Running;
use crate::snapshot::Snapshot;

/// Where `scripts/setup` puts CRIU when the system's own does not work; `MIGRATE_CRIU_PREFIX` overrides it.
pub const CRIU_PREFIX: &str = "/opt/migrate/criu";

const KEEPER: &str = include_str!("host.sh");

/// What a host that was restarted says in place of its kernel, whose file is mounted over.
pub(crate) const BOOT_ID: &str = "/run/boot_id";
pub(crate) const KERNELS_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How long a command on a host may take unless the caller says otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(300);

/// How long the keeper may take to remove a host. It gives up after a minute by itself.
const REMOVED: Duration = Duration::from_secs(90);

/// A host: commands run in it, containers run on it, [`Link`](crate::Link)s join it to others.
///
/// Dropping it kills everything that runs in its cgroups and removes its mounts, cgroups, interfaces and files.
pub struct Host {
    name: String,
    cgroup: String,
    dir: PathBuf,
    /// Process whose namespaces are the host.
    pid: i32,
    keeper: Child,
    next_log: AtomicU32,
}

/// What may differ from host to host.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// Size of `/var/lib/migrate` in MiB, to run out of disk on purpose. `None`: as large as the machine's disk.
    pub state_mib: Option<u32>,
    /// `/var/lib/migrate` is an ext4 of its own on a loop device, which `fsfreeze` can stall; it needs a size.
    pub state_on_ext4: bool,
}

impl Host {
    /// Makes a host. `name` is for messages and interface names: a few letters.
    pub fn new(name: &str) -> Result<Host> {
        Host::with_options(name, &HostOptions::default())
    }

    /// Makes a host with [`HostOptions`].
    pub fn with_options(name: &str, options: &HostOptions) -> Result<Host> {
        static MADE: AtomicU32 = AtomicU32::new(0);

        ensure!(
            nix::unistd::geteuid().is_root(),
            "a test host needs root: run the tests as root"
        );
        let unique = format!(
            "{}-{}-{name}",
            std::process::id(),
            MADE.fetch_add(1, Ordering::Relaxed)
        );
        let cgroup = format!("migrate-test-{unique}");
        let dir = hosts_dir().join(&unique);
        let mut keeper = Command::new("setsid")
            .args(["bash", "-c", KEEPER, "keeper", &cgroup])
            .arg(&dir)
            .arg(options.state_mib.unwrap_or(0).to_string())
            .arg(if options.state_on_ext4 {
                "ext4"
            } else {
                "tmpfs"
            })
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting the keeper of a host")?;

        let mut said = String::new();
        BufReader::new(keeper.stdout.take().context("the keeper has no stdout")?)
            .read_line(&mut said)?;
        let Some(pid) = said
            .trim()
            .strip_prefix("ready ")
            .and_then(|pid| pid.parse().ok())
        else {
            drop(keeper.stdin.take());
            let mut why = String::new();
            keeper
                .stderr
                .take()
                .context("the keeper has no stderr")?
                .read_to_string(&mut why)?;
            keeper.wait()?;
            bail!("cannot make host {name}: {}", why.trim());
        };
        Ok(Host {
            name: name.to_string(),
            cgroup,
            dir,
            pid,
            keeper,
            next_log: AtomicU32::new(0),
        })
    }

    /// The name it was made with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run on the host: its network, mounts and cgroups. The tests' own build of `migrate` and a
    /// working CRIU come first in its `PATH`.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.enter(&["--net", "--mount", "--cgroup"]);
        command
            .arg("/run/.enter")
            .arg(program)
            .env("PATH", search_path());
        command
    }

    /// Runs a command on the host to its end and returns what it printed; fails with its output when it does.
    pub fn run<I>(&self, program: &str, args: I) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut running = self.spawn(program, args)?;
        let status = running.wait(COMMAND_LIMIT)?;
        ensure!(
            status.success(),
            "{} on host {}: {status}\n{}",
            running.what(),
            self.name,
            running.output()?
        );
        running.stdout()
    }

    /// Starts a command on the host; it is killed when the returned value is dropped. Its output goes to files.
    pub fn spawn<I>(&self, program: &str, args: I) -> Result<Running>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut command = self.command(program);
        command.args(args);
        let number = self.next_log.fetch_add(1, Ordering::Relaxed);
        Running::start(command, program, &self.dir.join(format!("log-{number}")))
    }

    /// Where a file of the host is seen from here. Good for reading and writing as long as the host lives.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        Path::new(&format!("/proc/{}/root", self.pid))
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// Cuts the power and starts the host again: nothing that ran runs any more, what runtimes keep in memory is gone, and the
    /// kernel has another boot id. What was written to files is there: a disk that loses what it was not told to keep is not
    /// played.
    pub fn restart(&self) -> Result<()> {
        let deadline = Instant::now() + COMMAND_LIMIT;
        loop {
            let mut alive = 0;
            for root in self.cgroups()? {
                alive += end_all(&root, self.pid)?;
            }
            if alive == 0 {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "{alive} processes of host {} do not end",
                self.name
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        const SCRIPT: &str = "set -e
            rm -rf /run/runc
            cat /proc/sys/kernel/random/uuid >$1.new
            mv $1.new $1
            ! mountpoint -q $2 || umount $2
            mount --bind $1 $2";
        self.run("sh", ["-c", SCRIPT, "restart", BOOT_ID, KERNELS_BOOT_ID])
            .map(drop)
    }

    /// What is on the host now, to be compared with later.
    pub fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::take(self)
    }

    /// Runs a command line (split at blanks) in the host's network only, and returns what it printed.
    pub(crate) fn in_network(&self, command_line: &str) -> Result<String> {
        let output = self
            .enter(&["--net"])
            .args(command_line.split_whitespace())
            .output()?;
        let why = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{command_line} on host {}: {}",
            self.name,
            why.trim()
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Takes a network interface from this machine and gives it an address ("10.77.0.1/24").
    pub fn take_interface(&self, interface: &str, address: &str) -> Result<()> {
        let status = Command::new("ip")
            .args(["link", "set", interface, "netns", &self.pid.to_string()])
            .status()
            .context("running ip")?;
        ensure!(
            status.success(),
            "cannot take {interface} from this machine"
        );
        self.in_network(&format!("ip address add {address} dev {interface}"))?;
        self.in_network(&format!("ip link set {interface} up"))
            .map(drop)
    }

    /// Runs `work` on a thread of this process that is in the host's network: sockets it makes stay there.
    pub fn on_its_network<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let network = std::fs::File::open(format!("/proc/{}/ns/net", self.pid))
            .context("opening the network of a host")?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET)
                    .context("entering the network of a host")?;
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a command line as [`Host::in_network`] does, its output to be read by the caller.
    pub(crate) fn start_in_network(&self, command_line: &str) -> Result<Child> {
        self.enter(&["--net"])
            .args(command_line.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {command_line} on host {}", self.name))
    }

    /// Process whose namespaces are the host.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// The host's cgroup in each hierarchy, as seen from outside.
    pub(crate) fn cgroups(&self) -> Result<Vec<PathBuf>> {
        let mounts = std::fs::read_to_string("/proc/self/mounts")
            .context("reading this machine's mounts")?;
        Ok(mounts
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ').skip(1);
                let (place, kind) = (fields.next()?, fields.next()?);
                matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(place).join(&self.cgroup))
            })
            .filter(|cgroup| cgroup.is_dir())
            .collect())
    }

    fn enter(&self, namespaces: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg("--target")
            .arg(self.pid.to_string())
            .args(namespaces)
            .arg("--");
        // Ctrl-C at the terminal is for the test, which then ends its commands in order.
        command.process_group(0);
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let deadline = Instant::now() + REMOVED;
        while Instant::now() < deadline {
            match self.keeper.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                Ok(Some(_)) | Err(_) => break,
            }
        }
        let left: Vec<_> = self.cgroups().unwrap_or_default();
        if self.dir.exists() || !left.is_empty() {
            let what = format!(
                "host {} was not removed: {} {left:?}",
                self.name,
                self.dir.display()
            );
            // A second panic while one unwinds would abort and hide the first.
            if std::thread::panicking() {
                eprintln!("{what}")
            } else {
                panic!("{what}")
            }
        }
    }
}

/// Kills all that is in a cgroup and below but `spared`, and removes the cgroups below that only containers had; how many were
/// still there.
fn end_all(cgroup: &Path, spared: i32) -> Result<usize> {
    let mut alive = 0;
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            alive += end_all(&entry.path(), spared)?;
            // Busy while anything is in it, as the host's own always is.
            let _ = std::fs::remove_dir(entry.path());
        }
    }
    let procs = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    for pid in procs.lines().filter_map(|pid| pid.parse().ok()) {
        // 0: of another pid namespace; none here.
        if pid == spared || pid == 0 {
            continue;
        }
        alive += 1;
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    // A frozen process dies when it is thawed.
    for (file, thawed) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
        if cgroup.join(file).exists() {
            let _ = std::fs::write(cgroup.join(file), thawed);
        }
    }
    Ok(alive)
}

/// A program built along with this test, demo or benchmark.
pub fn binary(name: &str) -> Result<PathBuf> {
    let path = build_dir()?.join(name);
    ensure!(path.is_file(), "{} is not built", path.display());
    Ok(path)
}

/// `target/<profile>`, found from the running program: tests and examples lie one directory below it, programs in it.
fn build_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("finding this program's own file")?;
    let mut dir = exe
        .parent()
        .context("this program does not lie in a target directory")?;
    if dir.ends_with("deps") || dir.ends_with("examples") {
        dir = dir.parent().unwrap_or(dir);
    }
    Ok(dir.to_path_buf())
}

fn search_path() -> String {
    let criu = std::env::var("MIGRATE_CRIU_PREFIX").unwrap_or_else(|_| CRIU_PREFIX.to_string());
    let build = build_dir()
        .map(|dir| dir.display().to_string())
        .unwrap_or_default();
    format!("{build}:{criu}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

/// On disk and not in memory: a host's disk must not compete with the containers it holds.
fn hosts_dir() -> PathBuf {
    std::env::var_os("MIGRATE_RIG_DIR")
        .map_or_else(|| PathBuf::from("/var/tmp/migrate-rig"), PathBuf::from)
}
