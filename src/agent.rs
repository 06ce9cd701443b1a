//! The daemon at the target: lets trusted sources in and gives each arriving container a thread.
//!
//! ```text
//!  start ─▶ settle what a crash left ─▶ listen ─┬▶ session: Begin ─▶ preflight ─▶ arrival
//!                                               ├▶ session: Query ─▶ the running arrival, or the journal
//!  SIGTERM ─▶ no new arrivals ─▶ the running ones end ─▶ exit
//! ```

mod bounds;

use crate::criu::binary::{Criu, NoCriu};
use crate::criu::kernel_cache::{KernelCache, KernelCacheError};
use crate::journal::prune::prune;
use crate::journal::{JournalDir, JournalError};
use crate::migration::MigrationId;
use crate::migration::event::Side;
use crate::runtime::apart;
use crate::runtime::lock::{ContainerLock, Holder, LockError};
use crate::runtime::runc::Runc;
use crate::source::settle::{self as source, Settled};
use crate::target::arrival::{Arrival, Host, Resumption, Signal};
use crate::target::{preflight, settle};
use crate::transport::{
    Connection, Control, ControlReceiver, ControlSender, Identity, IdentityError, Listener,
    Settings, TransportError, TransportThread, TrustStore,
};
use crate::wire::message::{
    Accepted, Begin, Fate, Message, Outcome, Query, Refusal, Refused, Resume, RolledBack,
};
use crate::wire::peer_error::PeerError;
use bounds::{MAX_ARRIVALS, Seats, TurnedAway};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

/// How long a connected source may take to say what it wants.
const FIRST_WORD_PATIENCE: Duration = Duration::from_secs(10);

/// How long a running arrival may take to answer a question.
const ANSWER_PATIENCE: Duration = Duration::from_secs(8);

/// How long the last attempt to bring a container may take to be gone.
const LAST_ARRIVAL_PATIENCE: Duration = Duration::from_secs(1);

/// How long a source may take to close the connection when all is said.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(5);

/// How long the target of a migration from here is asked how it ended.
const SOURCE_PATIENCE: Duration = Duration::from_secs(60);

/// How the agent is to work.
#[derive(Clone, Debug)]
pub struct AgentPlan {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Journals, identity, containers and working files.
    pub state_dir: PathBuf,
    /// runc's state directory.
    pub runtime_root: PathBuf,
    /// The `migrate` program.
    pub program: PathBuf,
}

/// Why the agent cannot work.
#[derive(Debug, Error)]
pub enum AgentError {
    /// No CRIU that works.
    #[error(transparent)]
    Criu(#[from] NoCriu),
    /// CRIU's kernel cache cannot be made.
    #[error(transparent)]
    KernelCache(#[from] KernelCacheError),
    /// This host has no identity to show.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The address cannot be listened on.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The journals cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The system fails us.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

/// Receives containers until told to stop by SIGTERM or SIGINT; then waits for the arrivals under way.
pub fn run(plan: &AgentPlan) -> Result<(), AgentError> {
    let system = |doing| move |source| AgentError::System { doing, source };
    let criu = Criu::find()?;
    let cache = KernelCache::prepare(&criu, &plan.state_dir.join("criu"))?;
    let journals = JournalDir::open(&plan.state_dir)?;
    let owing = settle_what_a_crash_left(&journals, &plan.state_dir)?;
    let identity = Arc::new(Identity::load_or_create(&plan.state_dir)?);
    let lazy = criu.restores_lazily();
    tracing::info!(criu = %criu.version_text(), skeleton = ?cache.skeleton, lazy, fingerprint = %identity.fingerprint(), "ready");
    let agent = Arc::new(Agent {
        host: Host {
            state_dir: plan.state_dir.clone(),
            runc: Runc::new(&plan.runtime_root),
            criu,
            cache,
            program: plan.program.clone(),
            lazy,
        },
        journals,
        seats: Arc::default(),
        arrivals: Mutex::default(),
        draining: AtomicBool::new(false),
    });

    // What strangers send is sorted out beside what running moves carry.
    let [door, transport] = ["listener", "transport"].map(TransportThread::spawn);
    let door = door.map_err(system("starting the listener's thread"))?;
    let transport = transport.map_err(system("starting the transport's thread"))?;
    let (arrived, arrivals) = mpsc::channel();
    let trust = TrustStore::in_dir(&plan.state_dir);
    let listen = plan.listen;
    let listening =
        door.run(async move { Listener::bind(listen, identity, trust, Settings::default()) });
    let joined = door.handle().block_on(listening);
    let listener = Arc::new(joined.unwrap_or(Err(TransportError::ClosedHere))?);
    // Before anybody is let in: a source that comes to go on must find the copy.
    for migration in owing {
        adopt(&agent, migration, transport.handle())?;
    }
    tracing::info!(address = %listener.local_addr()?, "listening");
    let accepting = Arc::clone(&listener);
    let carrier = transport.handle().clone();
    let turned_away = Arc::new(TurnedAway::default());
    door.run(async move {
        while let Some(arrival) = accepting.accept().await {
            let (arrived, turned_away) = (arrived.clone(), Arc::clone(&turned_away));
            carrier.spawn(async move {
                let from = arrival.addr();
                match arrival.handshake().await {
                    Ok(connected) => drop(arrived.send(connected)),
                    Err(error) => turned_away.say(from, &error),
                }
            });
        }
    });
    let told = Arc::clone(&agent);
    let stopping = transport.run(async move {
        let (mut term, mut int) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        told.draining.store(true, Ordering::Relaxed);
        tracing::info!("told to stop: what is under way is finished, nothing new is taken");
        Ok::<(), io::Error>(())
    });

    let mut swept = Instant::now();
    loop {
        match arrivals.recv_timeout(Duration::from_millis(100)) {
            Ok((connection, control)) => {
                let Some(seat) = agent.seats.take(connection.peer().fingerprint) else {
                    tracing::warn!(from = %connection.peer().name, "a peer has as many connections as it may have at once");
                    connection.close(PeerError::Overloaded);
                    continue;
                };
                let (agent, runtime) = (Arc::clone(&agent), transport.handle().clone());
                let started = thread::Builder::new()
                    .name("session".into())
                    .spawn(move || {
                        agent.session(&connection, control, &runtime);
                        drop(seat);
                    });
                started.map_err(system("starting a session's thread"))?;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if swept.elapsed() > SWEEP_PAUSE {
            swept = Instant::now();
            apart::sweep();
        }
        if agent.draining.load(Ordering::Relaxed) {
            let arrivals = agent.arrivals();
            if arrivals.is_empty() {
                break;
            }
            for arrival in arrivals.values() {
                let _ = arrival.signal.send(Signal::Leave);
            }
        }
    }
    stopping.abort();
    door.handle().block_on(listener.close(PeerError::Done));
    tracing::info!("stopped");
    Ok(())
}

/// Takes over a copy whose agent died before it was complete, and sees it through on a thread of its own.
fn adopt(agent: &Arc<Agent>, migration: MigrationId, runtime: &Handle) -> Result<(), AgentError> {
    let first = agent.try_adopt(migration);
    let (agent, runtime) = (Arc::clone(agent), runtime.clone());
    let waiting = thread::Builder::new().name("session".into());
    let started = waiting.spawn(move || {
        let mut adoption = first;
        let (orphan, signal, signals) = loop {
            match adoption {
                TriedToAdopt::Taken(orphan, signal, signals) => break (orphan, signal, signals),
                TriedToAdopt::Later if !agent.draining.load(Ordering::Relaxed) => {
                    thread::sleep(ADOPTION_PAUSE);
                    adoption = agent.try_adopt(migration);
                }
                TriedToAdopt::Later | TriedToAdopt::Nothing => return,
            }
        };
        let journal_id = agent.journals.id();
        match Arrival::adopt(&agent.host, *orphan, journal_id, &runtime, signal, signals) {
            Ok(arrival) => drop(arrival.run()),
            Err(reason) => tracing::error!(%migration, %reason, "not taken over"),
        }
        agent.arrivals().remove(&migration);
    });
    started.map(drop).map_err(|source| AgentError::System {
        doing: "starting a session's thread",
        source,
    })
}

/// How an attempt to take a copy over went.
enum TriedToAdopt {
    /// It is entered among the arrivals, and signals to it go through these.
    Taken(Box<settle::Orphan>, Sender<Signal>, Receiver<Signal>),
    Later,
    Nothing,
}

/// Ends every migration whose process died: those to here before anyone is let in, so that no commit can meet one that
/// is being undone; those from here beside the work, for their targets may have to be asked. Returns those to here whose
/// copy ran and is not complete.
fn settle_what_a_crash_left(
    journals: &JournalDir,
    state_dir: &Path,
) -> Result<Vec<MigrationId>, AgentError> {
    prune(journals, SystemTime::now());
    let mut owing = Vec::new();
    let mut unsettled = VecDeque::new();
    for name in journals.list()? {
        if name.side == Side::Source {
            if source::is_unsettled(state_dir, name.migration) {
                unsettled.push_back(name.migration);
            }
            continue;
        }
        match settle::settle(state_dir, name.migration, None) {
            Ok(None) => {}
            Ok(Some(settle::Settled::Owing)) => owing.push(name.migration),
            Ok(Some(fate)) => tracing::debug!(migration = %name.migration, ?fate, "settled"),
            Err(error) => tracing::error!(migration = %name.migration, %error, "not settled"),
        }
    }
    // A few at a time: each may wait for its target.
    let threads = unsettled.len().min(SETTLERS);
    let unsettled = Arc::new(Mutex::new(unsettled));
    for _ in 0..threads {
        let (unsettled, state_dir) = (Arc::clone(&unsettled), state_dir.to_path_buf());
        thread::spawn(move || {
            let next = || {
                let mut unsettled = unsettled.lock().unwrap_or_else(PoisonError::into_inner);
                unsettled.pop_front()
            };
            while let Some(migration) = next() {
                match source::settle(&state_dir, migration, SOURCE_PATIENCE, None) {
                    Ok(Some(Settled::Held { by })) => {
                        tracing::info!(%migration, by, "left alone");
                    }
                    Ok(settled) => tracing::debug!(%migration, ?settled, "settled"),
                    Err(error) => tracing::error!(%migration, %error, "not settled"),
                }
            }
        });
    }
    Ok(owing)
}

/// How many migrations from here are asked after at once.
const SETTLERS: usize = 4;
/// Between two looks for cgroups that pagers have left.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);

/// Between two attempts to take over a copy whose pager is busy.
const ADOPTION_PAUSE: Duration = Duration::from_secs(2);

struct Agent {
    host: Host,
    journals: JournalDir,
    seats: Arc<Seats>,
    /// Arrivals under way, and where to ask them.
    arrivals: Mutex<HashMap<MigrationId, UnderWay>>,
    draining: AtomicBool,
}

/// Sends on what a source says on its connection number `link`, the end of it included.
async fn listen(mut receiver: ControlReceiver, signal: Sender<Signal>, link: u32) {
    loop {
        let said = match receiver.receive().await {
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(TransportError::StreamEnded),
            Err(error) => Err(error),
        };
        let is_last = said.is_err();
        if signal.send(Signal::Heard { link, said }).is_err() || is_last {
            return;
        }
    }
}

struct UnderWay {
    peer: String,
    signal: Sender<Signal>,
    /// The connection it began on.
    connection: Option<Connection>,
}

impl Agent {
    fn try_adopt(&self, migration: MigrationId) -> TriedToAdopt {
        let orphan = match settle::adopt(&self.host.state_dir, migration) {
            Ok(settle::Adoption::Taken(orphan)) => orphan,
            Ok(settle::Adoption::Later) => return TriedToAdopt::Later,
            Ok(settle::Adoption::Nothing) => return TriedToAdopt::Nothing,
            Err(error) => {
                tracing::error!(%migration, %error, "not taken over");
                return TriedToAdopt::Nothing;
            }
        };
        let (signal, signals) = mpsc::channel();
        let under_way = UnderWay {
            peer: orphan.opened.peer_fingerprint.clone(),
            signal: signal.clone(),
            connection: None,
        };
        self.arrivals().insert(migration, under_way);
        tracing::info!(container = %orphan.opened.container, owed = !orphan.owed.is_empty(), "taken over: it is seen through until it is complete");
        TriedToAdopt::Taken(orphan, signal, signals)
    }

    fn session(&self, connection: &Connection, mut control: Control, runtime: &Handle) {
        let first = runtime
            .block_on(async { tokio::time::timeout(FIRST_WORD_PATIENCE, control.receive()).await });
        let Control { sender, receiver } = control;
        match first {
            Ok(Ok(Some(Message::Begin(begin)))) => {
                self.begin(begin, connection, sender, receiver, runtime)
            }
            Ok(Ok(Some(Message::Query(query)))) => self.query(query, connection, sender, runtime),
            Ok(Ok(Some(Message::Resume(resume)))) => {
                match self.resume(resume, connection, sender, receiver, runtime) {
                    // The arrival has it now.
                    None => return,
                    Some((fate, mut sender)) => {
                        let answer = self.outcome(fate);
                        if let Err(error) = runtime.block_on(sender.send(answer)) {
                            tracing::debug!(%error, "the source does not hear");
                        }
                    }
                }
            }
            Ok(Ok(Some(other))) => {
                tracing::warn!(
                    message = other.name(),
                    "a source begins with a message that no conversation begins with"
                );
                connection.close(PeerError::Unexpected);
                return;
            }
            Ok(Ok(None)) | Err(_) => connection.close(PeerError::TimedOut),
            Ok(Err(error)) => {
                tracing::warn!(%error, "a source says nothing that can be read");
                connection.close(error.as_peer_error());
                return;
            }
        }
        let farewell = async { tokio::time::timeout(FAREWELL_PATIENCE, connection.closed()).await };
        if runtime.block_on(farewell).is_err() {
            connection.close(PeerError::Done);
        }
    }

    fn begin(
        &self,
        begin: Begin,
        connection: &Connection,
        mut sender: ControlSender,
        receiver: ControlReceiver,
        runtime: &Handle,
    ) {
        let (signal, signals) = mpsc::channel();
        let (lock, answer): (_, Message) = match self.admit(&begin, connection, &signal) {
            Ok(lock) => {
                let lazy = self.host.lazy;
                (lock.filter(|_| !begin.dry_run), Accepted { lazy }.into())
            }
            Err(refusals) => (None, Refused { refusals }.into()),
        };
        let accepted = lock.is_some();
        tracing::info!(container = %begin.container, from = %connection.peer().name, accepted, dry_run = begin.dry_run, "a container asks to come");
        let Some(lock) = lock else {
            if let Err(error) = runtime.block_on(sender.send(answer)) {
                tracing::debug!(%error, "the source does not hear");
            }
            return;
        };
        // Accepted is only said when there is room: directories, journal and store.
        let arrival = Arrival::begin(
            &self.host,
            &begin,
            connection,
            sender,
            runtime,
            signal.clone(),
            signals,
            &self.journals,
            lock,
        );
        match arrival {
            Ok(mut arrival) => {
                arrival.say(answer);
                runtime.spawn(listen(receiver, signal, 0));
                let end = arrival.run();
                tracing::info!(container = %begin.container, ?end, "the migration is over");
                prune(&self.journals, SystemTime::now());
            }
            Err(reason) => {
                tracing::error!(container = %begin.container, %reason, "cannot receive");
                connection.close(PeerError::Internal);
                // What little was made is taken away as after a crash.
                if let Err(error) = settle::settle(&self.host.state_dir, begin.migration, None) {
                    tracing::error!(%error, "not settled");
                }
            }
        }
        self.arrivals().remove(&begin.migration);
    }

    /// Why the container cannot come; if it can, it is locked, and its arrival is entered in the same moment. A dry run locks
    /// nothing.
    fn admit(
        &self,
        begin: &Begin,
        connection: &Connection,
        signal: &Sender<Signal>,
    ) -> Result<Option<ContainerLock>, Vec<Refusal>> {
        let refuse = |code: PeerError, text: &str| {
            let text = text.into();
            vec![Refusal { code, text }]
        };
        if self.draining.load(Ordering::Relaxed) {
            return Err(refuse(PeerError::Draining, ""));
        }
        let refusals = preflight::refusals(
            begin,
            &self.host.criu,
            &self.host.runc,
            &self.host.state_dir,
        );
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let (root, id) = (self.host.runc.root(), begin.container.as_str());
        if begin.dry_run {
            return match ContainerLock::look(root, id) {
                Some(holder) => Err(refuse(PeerError::Busy, &holder.to_string())),
                None => Ok(None),
            };
        }
        let taken = ContainerLock::take(root, id, LAST_ARRIVAL_PATIENCE);
        let mut lock = taken.map_err(|error| match error {
            LockError::Held { holder, .. } => refuse(PeerError::Busy, &holder.to_string()),
            error => refuse(PeerError::Internal, &error.to_string()),
        })?;
        let mut arrivals = self.arrivals();
        if arrivals.contains_key(&begin.migration) {
            return Err(refuse(PeerError::Busy, ""));
        }
        if arrivals.len() >= MAX_ARRIVALS {
            return Err(refuse(PeerError::Overloaded, ""));
        }
        let peer = connection.peer();
        // Whatever an earlier migration left unsettled, the runtime knows no such container: nothing of it is here any more.
        let holder = Holder::new(
            begin.migration,
            Side::Target,
            peer.name.to_string(),
            &self.host.state_dir,
        );
        if let Err(error) = lock.claim(holder) {
            return Err(refuse(PeerError::Internal, &error.to_string()));
        }
        let under_way = UnderWay {
            peer: peer.fingerprint.to_string(),
            signal: signal.clone(),
            connection: Some(connection.clone()),
        };
        arrivals.insert(begin.migration, under_way);
        Ok(Some(lock))
    }

    /// Tells a source how its migration ended.
    fn query(
        &self,
        query: Query,
        connection: &Connection,
        mut sender: ControlSender,
        runtime: &Handle,
    ) {
        let peer = connection.peer().fingerprint.to_string();
        let running = self.arrivals().get(&query.migration).map(|arrival| {
            (
                arrival.peer == peer,
                arrival.signal.clone(),
                arrival.connection.clone(),
            )
        });
        let fate = match running {
            Some((false, ..)) => None,
            Some((true, arrival, first)) => {
                let (asker, answer) = mpsc::channel();
                // Whoever asks has lost it. A killed source never closed it: what waits for more from there need not wait until
                // it is missed.
                if let Some(first) = first {
                    first.close(PeerError::SourceLost);
                }
                let asked = arrival.send(Signal::Query(asker)).is_ok();
                let answered = asked
                    .then(|| answer.recv_timeout(ANSWER_PATIENCE).ok())
                    .flatten();
                Some(answered.unwrap_or(Fate::InProgress))
            }
            None => self.fate_on_record(query.migration, &peer),
        };
        tracing::info!(migration = %query.migration, from = %connection.peer().name, ?fate, "asked what became of it");
        if let Err(error) = runtime.block_on(sender.send(self.outcome(fate))) {
            tracing::debug!(%error, "the source does not hear");
        }
    }

    /// Gives a connection on which a source wants to go on to the arrival it belongs to. If there is none that goes on,
    /// gives back what to say.
    fn resume(
        &self,
        resume: Resume,
        connection: &Connection,
        control: ControlSender,
        receiver: ControlReceiver,
        runtime: &Handle,
    ) -> Option<(Option<Fate>, ControlSender)> {
        let peer = connection.peer().fingerprint.to_string();
        let running = self
            .arrivals()
            .get(&resume.migration)
            .map(|arrival| (arrival.peer == peer, arrival.signal.clone()));
        tracing::info!(migration = %resume.migration, from = %connection.peer().name, "a source wants to go on");
        match running {
            Some((false, _)) => Some((None, control)),
            Some((true, signal)) => {
                let (runtime, heard) = (runtime.clone(), signal.clone());
                let resumption = Resumption {
                    connection: connection.clone(),
                    control,
                    listen: Box::new(move |link| {
                        runtime.spawn(listen(receiver, heard, link));
                    }),
                };
                match signal.send(Signal::Resume(resumption)) {
                    Ok(()) => None,
                    // Over in this moment: the journal has the rest.
                    Err(mpsc::SendError(Signal::Resume(resumption))) => {
                        Some((Some(Fate::InProgress), resumption.control))
                    }
                    Err(_) => None,
                }
            }
            None => Some((self.fate_on_record(resume.migration, &peer), control)),
        }
    }

    /// What the journal says; `None` if the asker is not the one the migration came from.
    fn fate_on_record(&self, migration: MigrationId, peer: &str) -> Option<Fate> {
        match settle::fate(&self.journals, migration, peer) {
            Ok(fate) => fate,
            Err(error) => {
                tracing::error!(%migration, %error, "cannot say what became of it");
                Some(Fate::InProgress)
            }
        }
    }

    fn outcome(&self, fate: Option<Fate>) -> Message {
        match fate {
            Some(fate) => Outcome {
                journal: self.journals.id(),
                fate,
            }
            .into(),
            None => RolledBack {
                code: PeerError::UnknownMigration,
                text: "it is another source's".into(),
            }
            .into(),
        }
    }

    fn arrivals(&self) -> MutexGuard<'_, HashMap<MigrationId, UnderWay>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
