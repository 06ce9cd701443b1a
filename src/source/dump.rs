//! CRIU's skeleton dump through the runtime, with the two places where it waits for the engine.
//!
//! ```text
//!  prepare   directories, hook, options                                   (the container runs)
//!  start     runc checkpoint ─▶ criu ─▶ pre-dump hook waits               (it still runs)
//!            frozen; the last scan is done, the synthetic parent written
//!  let_look  ───────────────────────▶ criu seizes and dumps
//!            post-dump hook waits ─▶ Held
//!  Held      go: CRIU kills the tasks     refuse: CRIU resumes them
//! ```

use super::dump_processes::DumpProcesses;
use super::handover::Window;
use crate::criu::binary::Criu;
use crate::criu::environment::Environment;
use crate::criu::hook::{HookPoint, HookServer, WaitingHook};
use crate::criu::kernel_cache::{KernelCache, Skeleton};
use crate::criu::options::{NetworkLock, Options};
use crate::criu::skeleton::{self, Claim};
use crate::kernel::pagemap::ScanError;
use crate::runtime::Task;
use crate::runtime::runc::{Container, Runc};
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// What a dump tells the engine, from its own threads.
#[derive(Debug)]
pub enum DumpSignal {
    /// CRIU has started up and waits before it looks at any task.
    AtGate,
    /// The images are complete and the tasks stopped.
    Held(WaitingHook),
    /// A hook that was held is gone without an answer.
    HookGone,
}

/// The runtime's standard error, which CRIU inherits.
const STDERR: &str = "runtime.err";

/// How long a killed process may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_secs(5);

/// Why a dump could not be driven.
#[derive(Debug, Error)]
pub enum DumpError {
    /// A file of the dump cannot be made.
    #[error("cannot prepare the dump in {path}: {source}")]
    Prepare {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The container would have to stand still for it for too long, or the user wants to stop.
    #[error("this host's disk does not take CRIU's directory in time")]
    GivenUp,
    /// The tasks cannot be made to look unwritten.
    #[error(transparent)]
    ForgetWrites(#[from] ScanError),
    /// runc cannot be started.
    #[error("cannot start runc: {0}")]
    Start(#[source] io::Error),
}

/// A dump made ready while the container still runs.
#[derive(Debug)]
pub struct PreparedDump {
    _hooks: HookServer,
    directory: PathBuf,
    environment: Environment,
    gate: Arc<Gate>,
    skeleton: Skeleton,
}

/// A dump under way.
#[derive(Debug)]
pub struct Dump {
    child: Child,
    processes: DumpProcesses,
    prepared: PreparedDump,
}

impl PreparedDump {
    /// Makes everything in `directory` that CRIU will need.
    ///
    /// `program` is the `migrate` program; `journal` is the file its hook consults if the engine dies.
    #[expect(clippy::too_many_arguments, reason = "what a dump consists of")]
    pub fn new<E: Send + 'static>(
        program: &Path,
        directory: &Path,
        journal: &Path,
        container: &Container,
        criu: Criu,
        cache: &KernelCache,
        network_lock: NetworkLock,
        signals: Sender<E>,
        wrap: impl Fn(DumpSignal) -> E + Clone + Send + 'static,
    ) -> Result<PreparedDump, DumpError> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |source| DumpError::Prepare { path, source }
        };
        for name in ["images", "parent", "work"] {
            let path = directory.join(name);
            fs::create_dir(&path).map_err(at(&path))?;
        }
        // Its processes work below it, and are known by that.
        let directory = &fs::canonicalize(directory).map_err(at(directory))?;
        let gate = Arc::new(Gate::default());
        let at_gate = Arc::clone(&gate);
        let hooks = HookServer::start(program, directory, journal, signals.clone(), move |hook| {
            answer(hook, &at_gate, &signals, &wrap)
        })
        .map_err(at(directory))?;
        let options_file = directory.join("criu.conf");
        let options = Options {
            hook: &hooks.script(),
            network_lock: Some(network_lock),
            lazy_pages: false,
        };
        fs::write(&options_file, options.text()).map_err(at(&options_file))?;
        let early_file = directory.join("criu-early.conf");
        fs::write(&early_file, options.early_text()).map_err(at(&early_file))?;
        let environment = Environment::new(
            criu,
            &early_file,
            &options_file,
            container.annotated_criu_config(),
            Some(&cache.file),
        );
        Ok(PreparedDump {
            _hooks: hooks,
            directory: directory.to_path_buf(),
            environment,
            gate,
            skeleton: cache.skeleton.clone(),
        })
    }

    /// Starts the runtime; CRIU waits before it looks at any task.
    pub fn start(self, runc: &Runc, container: &Container) -> Result<Dump, DumpError> {
        let parent = self.skeleton.works().then_some(Path::new("../parent"));
        let mut command = runc.checkpoint(
            &container.id,
            &self.images(),
            &self.directory.join("work"),
            parent,
        );
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // What CRIU says before it has a log, such as of an option it does not know, goes there.
            .stderr(File::create(self.directory.join(STDERR)).map_err(DumpError::Start)?)
            // What the terminal kills us with must not kill a dump that is half done.
            .process_group(0)
            .current_dir(self.directory.join("work"));
        self.environment
            .apply(&mut command)
            .map_err(DumpError::Start)?;
        let child = command.spawn().map_err(DumpError::Start)?;
        let pid = child.id().cast_signed();
        // A child that nobody has waited for is there, if only as a zombie.
        let runtime = Task::read(pid).map_err(DumpError::Start)?;
        let runtime = runtime.unwrap_or_else(|| Task::on_record(pid, 0));
        Ok(Dump {
            child,
            processes: DumpProcesses::new(runtime, &self.directory),
            prepared: self,
        })
    }

    /// Where CRIU writes.
    pub fn images(&self) -> PathBuf {
        self.directory.join("images")
    }
}

impl Dump {
    /// Writes the synthetic parent for these frozen processes and lets CRIU begin.
    ///
    /// Where CRIU looks at soft-dirty bits they are cleared first: a soft-dirty tracker must have read them.
    pub(super) fn let_look(
        &self,
        claims: Vec<Claim>,
        window: &Window<'_>,
    ) -> Result<(), DumpError> {
        if self.prepared.skeleton == Skeleton::Native {
            skeleton::forget_writes(&claims)?;
        }
        if self.prepared.skeleton.works() {
            let path = self.prepared.directory.join("parent");
            let parent = path.clone();
            let written = window.apart(move || skeleton::write_parent(&parent, &claims));
            written
                .ok_or(DumpError::GivenUp)?
                .map_err(|source| DumpError::Prepare { path, source })?;
        }
        self.prepared.gate.open(true);
        Ok(())
    }

    /// Makes a CRIU that has not looked yet give up.
    pub fn call_off(&self) {
        self.prepared.gate.open(false);
    }

    /// Where CRIU writes.
    pub fn images(&self) -> PathBuf {
        self.prepared.images()
    }

    /// The runtime's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The runtime's exit status, once it has ended.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// All its processes.
    pub fn processes(&self) -> &DumpProcesses {
        &self.processes
    }

    /// Grows while CRIU gets on.
    pub fn progress(&self) -> u64 {
        let log = self.prepared.directory.join("work/dump.log");
        fs::metadata(log).map_or(0, |log| log.len())
    }

    /// Waits for the runtime to end; after `patience` it and CRIU are killed, and waited for no longer. Without a dump nothing
    /// holds the tasks.
    pub fn wait(&mut self, patience: Duration) -> io::Result<()> {
        let mut deadline = Instant::now() + patience;
        let mut killed = false;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                if killed {
                    return Err(io::Error::other("it was killed and does not die"));
                }
                self.processes.kill();
                (killed, deadline) = (true, Instant::now() + DEATH_PATIENCE);
            }
            thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// What CRIU, or else the runtime, said went wrong.
    pub fn last_words(&self) -> String {
        let work = self.prepared.directory.join("work");
        let error_in = |file: PathBuf| {
            let text = fs::read_to_string(file).unwrap_or_default();
            let mut errors = text
                .lines()
                .filter(|line| line.contains("Error (") && !line.contains("rlimit"));
            errors.next().map(|line| line.trim().to_string())
        };
        error_in(work.join("dump.log"))
            .or_else(|| error_in(self.prepared.directory.join(STDERR)))
            .unwrap_or_else(|| Runc::last_words(&work))
    }
}

/// Answers the pre-dump hook from the gate, hands the post-dump hook to the engine.
fn answer<E: Send + 'static>(
    hook: WaitingHook,
    gate: &Arc<Gate>,
    signals: &Sender<E>,
    wrap: &(impl Fn(DumpSignal) -> E + Clone + Send + 'static),
) -> Option<E> {
    if hook.point() == HookPoint::PreDump {
        let _ = signals.send(wrap(DumpSignal::AtGate));
        let answered = if gate.wait() {
            hook.go()
        } else {
            hook.refuse()
        };
        if let Err(error) = answered {
            tracing::warn!(%error, "CRIU did not wait for the last scan");
        }
        return None;
    }
    if let Ok(watch) = hook.watch() {
        let (signals, wrap) = (signals.clone(), wrap.clone());
        thread::spawn(move || {
            watch();
            let _ = signals.send(wrap(DumpSignal::HookGone));
        });
    }
    Some(wrap(DumpSignal::Held(hook)))
}

/// Closed until the engine says yes or no.
#[derive(Debug, Default)]
struct Gate {
    decision: Mutex<Option<bool>>,
    decided: Condvar,
}

impl Gate {
    /// The first decision stands.
    fn open(&self, yes: bool) {
        let mut decision = self.decision.lock().unwrap_or_else(PoisonError::into_inner);
        decision.get_or_insert(yes);
        self.decided.notify_all();
    }

    fn wait(&self) -> bool {
        let mut decision = self.decision.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *decision {
                Some(yes) => return yes,
                None => {
                    decision = self
                        .decided
                        .wait(decision)
                        .unwrap_or_else(PoisonError::into_inner)
                }
            }
        }
    }
}
