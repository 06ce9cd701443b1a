//! The engine as a library: what the command line uses, and all it uses.

use crate::migration::event::{Event, TimedEvent};
use crate::migration::mode::Mode;
use crate::migration::report::Report;
use crate::migration::{ContainerId, PeerAddress};
use crate::source::plan::Plan;
use crate::source::run::{RunError, run};
use crate::source::tracker::TrackerKind;
use crate::wire::codec::Compression;
use crate::wire::message::RootfsMode;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

/// One migration, to be set up and run.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let mut migration = migrate::Migration::new("web".parse()?, "10.0.0.2:7070".parse()?)
///     .downtime_limit(std::time::Duration::from_millis(200));
/// let mut events = migration.events();
/// tokio::spawn(async move {
///     while let Some(event) = events.recv().await {
///         println!("{event:?}");
///     }
/// });
/// let report = migration.run().await?;
/// println!("{:?}, down for {:?}", report.outcome, report.downtime);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Migration {
    plan: Plan,
    events: Option<mpsc::UnboundedSender<TimedEvent>>,
    cancelled: Arc<AtomicBool>,
}

/// Why there is no [`Report`]: a failure of the engine itself. Every other end, a refusal too, is in the report.
#[derive(Debug, Error)]
pub enum MigrationError {
    /// It failed before the beginning: nothing was touched.
    #[error(transparent)]
    NotBegun(#[from] RunError),
    /// The engine's thread could not be started or panicked: run `migrate recover`.
    #[error("the engine's thread failed: {0}; run `migrate recover`")]
    Thread(String),
}

/// Stops a migration from elsewhere. Before the commit it rolls back; afterwards it is too late and nothing happens.
#[derive(Clone, Debug)]
pub struct Canceller(Arc<AtomicBool>);

impl Migration {
    /// A migration of `container` to the agent at `target`, with the defaults of the command line.
    pub fn new(container: ContainerId, target: PeerAddress) -> Migration {
        Migration {
            plan: Plan::new(container, target),
            events: None,
            cancelled: Arc::default(),
        }
    }

    /// runc's state directory, `/run/runc` by default.
    pub fn runtime_root(mut self, root: impl AsRef<Path>) -> Self {
        self.plan.runtime_root = root.as_ref().to_path_buf();
        self
    }

    /// Where identity, trusted peers and journals are kept, `/var/lib/migrate` by default.
    pub fn state_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.plan.state_dir = directory.as_ref().to_path_buf();
        self
    }

    /// How memory gets to the target; by default decided while running.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.plan.mode = mode;
        self
    }

    /// How dirty pages are found; by default the first way that works on this kernel.
    pub fn tracker(mut self, tracker: TrackerKind) -> Self {
        self.plan.tracker = Some(tracker);
        self
    }

    /// Rounds after which the container is frozen whatever is dirty, 30 by default.
    pub fn max_rounds(mut self, rounds: u32) -> Self {
        self.plan.max_rounds = rounds;
        self
    }

    /// How long the container should stand still at most, 300 ms by default. An aim: the rounds end when it can be kept,
    /// or when more rounds would not help. A container is refused if what CRIU carries while it stands still (contents of
    /// tmpfs, deleted files) takes longer than a limit that was set here.
    pub fn downtime_limit(mut self, limit: Duration) -> Self {
        self.plan.downtime_limit = limit;
        self.plan.strict_downtime = true;
        self
    }

    /// Bytes a second for pages and files; unlimited by default.
    pub fn bandwidth_limit(mut self, bytes_a_second: NonZeroU64) -> Self {
        self.plan.bandwidth_limit = Some(bytes_a_second);
        self
    }

    /// How pages are compressed; by default whatever moves the most.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.plan.compression = compression;
        self
    }

    /// How long the migration may take before it is given up, an hour by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.plan.timeout = timeout;
        self
    }

    /// How long a lost link is waited for while the container runs at the target with pages missing, five minutes by
    /// default. Then the copy there is stopped and kept.
    pub fn reconnect_timeout(mut self, timeout: Duration) -> Self {
        self.plan.reconnect_timeout = timeout;
        self
    }

    /// Slows the container by its CPU quota when rounds do not converge; in pre-copy and auto. It has its full quota back
    /// whatever the outcome.
    pub fn auto_converge(mut self, auto_converge: bool) -> Self {
        self.plan.auto_converge = auto_converge;
        self
    }

    /// Only looks at both ends whether it would work.
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.plan.dry_run = dry_run;
        self
    }

    /// How the root filesystem gets to the target; copied by default.
    pub fn rootfs(mut self, mode: RootfsMode) -> Self {
        self.plan.rootfs = mode;
        self
    }

    /// A directory or a file that both hosts have under this path: a container that has it mounted may move. Both ends
    /// prove it before anything is touched. It may be called more than once.
    pub fn shared(mut self, path: impl Into<PathBuf>) -> Self {
        self.plan.shared.push(path.into());
        self
    }

    /// The `migrate` program, for a program that embeds the engine: CRIU's hook and the guard are started from it. By
    /// default the program that runs.
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.plan.program = program.into();
        self
    }

    /// The events of the migration, from now on.
    pub fn events(&mut self) -> mpsc::UnboundedReceiver<TimedEvent> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.events = Some(sender);
        receiver
    }

    /// What stops it.
    pub fn canceller(&self) -> Canceller {
        Canceller(Arc::clone(&self.cancelled))
    }

    /// Moves the container. The engine works on threads of its own: dropping the future does not stop it, a
    /// [`Canceller`] does.
    pub async fn run(self) -> Result<Report, MigrationError> {
        let (done, outcome) = oneshot::channel();
        let engine = thread::Builder::new()
            .name("migration".into())
            .spawn(move || {
                let Migration {
                    plan,
                    events,
                    cancelled,
                } = self;
                let began = Instant::now();
                let emit = |event: Event| {
                    if let Some(events) = &events {
                        let at = began.elapsed();
                        // A listener that went away does not stop the migration.
                        let _ = events.send(TimedEvent { at, event });
                    }
                };
                let result = run(&plan, &emit, &cancelled);
                if let Ok(report) = &result {
                    emit(Event::Done {
                        report: Box::new(report.clone()),
                    });
                }
                let _ = done.send(result);
            });
        engine.map_err(|error| MigrationError::Thread(error.to_string()))?;
        let result = outcome
            .await
            .map_err(|_| MigrationError::Thread("it panicked".into()))?;
        Ok(result?)
    }
}

impl Canceller {
    /// Asks the migration to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
