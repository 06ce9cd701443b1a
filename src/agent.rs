//! The daemon at the target: lets trusted sources in and gives each arriving container a thread.
//!
//! ```text
//!  start ─▶ settle what a crash left ─▶ listen ─┬▶ session: Begin ─▶ preflight ─▶ arrival
//!                                               ├▶ session: Query ─▶ the running arrival, or the journal
//!  SIGTERM ─▶ no new arrivals ─▶ the running ones end ─▶ exit
//! ```

use crate::criu::binary::{Criu, NoCriu};
use crate::criu::kernel_cache::{KernelCache, KernelCacheError};
use crate::journal::{JournalDir, JournalError};
use crate::migration::MigrationId;
use crate::migration::event::Side;
use crate::runtime::runc::Runc;
use crate::source::settle as source;
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
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

/// How long a connected source may take to say what it wants.
const FIRST_WORD_PATIENCE: Duration = Duration::from_secs(10);

/// How long a running arrival may take to answer a question.
const ANSWER_PATIENCE: Duration = Duration::from_secs(8);

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
        arrivals: Mutex::default(),
        draining: AtomicBool::new(false),
    });

    let transport =
        TransportThread::spawn("transport").map_err(system("starting the transport's thread"))?;
    let (arrived, arrivals) = mpsc::channel();
    let trust = TrustStore::in_dir(&plan.state_dir);
    let listen = plan.listen;
    let listening =
        transport.run(async move { Listener::bind(listen, identity, trust, Settings::default()) });
    let joined = transport.handle().block_on(listening);
    let listener = Arc::new(joined.unwrap_or(Err(TransportError::ClosedHere))?);
    // Before anybody is let in: a source that comes to go on must find the copy.
    for migration in owing {
        adopt(&agent, migration, transport.handle())?;
    }
    tracing::info!(address = %listener.local_addr()?, "listening");
    let accepting = Arc::clone(&listener);
    transport.run(async move {
        while let Some(arrival) = accepting.accept().await {
            let arrived = arrived.clone();
            tokio::spawn(async move {
                let from = arrival.addr();
                match arrival.handshake().await {
                    Ok(connected) => drop(arrived.send(connected)),
                    Err(error) => tracing::warn!(%from, %error, "not let in"),
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

    loop {
        match arrivals.recv_timeout(Duration::from_millis(100)) {
            Ok((connection, control)) => {
                let (agent, runtime) = (Arc::clone(&agent), transport.handle().clone());
                let started = thread::Builder::new()
                    .name("session".into())
                    .spawn(move || agent.session(&connection, control, &runtime));
                started.map_err(system("starting a session's thread"))?;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
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
    transport.handle().block_on(listener.close(PeerError::Done));
    tracing::info!("stopped");
    Ok(())
}

/// Takes over a copy whose agent died while pages were owed to it, and waits on a thread of its own for their source.
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
/// copy runs and is owed pages.
fn settle_what_a_crash_left(
    journals: &JournalDir,
    state_dir: &Path,
) -> Result<Vec<MigrationId>, AgentError> {
    let mut owing = Vec::new();
    for name in journals.list()? {
        if name.side == Side::Source {
            let state_dir = state_dir.to_path_buf();
            thread::spawn(move || {
                match source::settle(&state_dir, name.migration, SOURCE_PATIENCE) {
                    Ok(settled) => {
                        tracing::debug!(migration = %name.migration, ?settled, "settled")
                    }
                    Err(error) => {
                        tracing::error!(migration = %name.migration, %error, "not settled")
                    }
                }
            });
            continue;
        }
        match settle::settle(state_dir, name.migration) {
            Ok(None) => {}
            Ok(Some(settle::Settled::Owing)) => owing.push(name.migration),
            Ok(Some(fate)) => tracing::debug!(migration = %name.migration, ?fate, "settled"),
            Err(error) => tracing::error!(migration = %name.migration, %error, "not settled"),
        }
    }
    Ok(owing)
}

/// Between two attempts to take over a copy whose pager is busy.
const ADOPTION_PAUSE: Duration = Duration::from_secs(2);

struct Agent {
    host: Host,
    journals: JournalDir,
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
    container: String,
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
            container: orphan.opened.container.as_str().to_string(),
            peer: orphan.opened.peer_fingerprint.clone(),
            signal: signal.clone(),
            connection: None,
        };
        self.arrivals().insert(migration, under_way);
        tracing::info!(container = %orphan.opened.container, "taken over: it waits for pages and their source");
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
        let refusals = self.admit(&begin, connection, &signal);
        let answer: Message = if refusals.is_empty() {
            Accepted {
                lazy: self.host.lazy,
            }
            .into()
        } else {
            Refused { refusals }.into()
        };
        let accepted = matches!(answer, Message::Accepted(_)) && !begin.dry_run;
        tracing::info!(container = %begin.container, from = %connection.peer().name, accepted, dry_run = begin.dry_run, "a container asks to come");
        if !accepted {
            self.arrivals().remove(&begin.migration);
            if let Err(error) = runtime.block_on(sender.send(answer)) {
                tracing::debug!(%error, "the source does not hear");
            }
            return;
        }
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
        );
        match arrival {
            Ok(mut arrival) => {
                arrival.say(answer);
                runtime.spawn(listen(receiver, signal, 0));
                let end = arrival.run();
                tracing::info!(container = %begin.container, ?end, "the migration is over");
            }
            Err(reason) => {
                tracing::error!(container = %begin.container, %reason, "cannot receive");
                connection.close(PeerError::Internal);
                // What little was made is taken away as after a crash.
                if let Err(error) = settle::settle(&self.host.state_dir, begin.migration) {
                    tracing::error!(%error, "not settled");
                }
            }
        }
        self.arrivals().remove(&begin.migration);
    }

    /// Why the container cannot come; if it can, its arrival is entered in the same moment.
    fn admit(
        &self,
        begin: &Begin,
        connection: &Connection,
        signal: &Sender<Signal>,
    ) -> Vec<Refusal> {
        let refuse = |code: PeerError| {
            vec![Refusal {
                code,
                text: "".into(),
            }]
        };
        if self.draining.load(Ordering::Relaxed) {
            return refuse(PeerError::Draining);
        }
        let refusals = preflight::refusals(
            begin,
            &self.host.criu,
            &self.host.runc,
            &self.host.state_dir,
        );
        if !refusals.is_empty() {
            return refusals;
        }
        let mut arrivals = self.arrivals();
        let taken = arrivals.contains_key(&begin.migration)
            || arrivals
                .values()
                .any(|other| other.container == begin.container.as_str());
        if taken {
            return refuse(PeerError::Busy);
        }
        let under_way = UnderWay {
            container: begin.container.as_str().to_string(),
            peer: connection.peer().fingerprint.to_string(),
            signal: signal.clone(),
            connection: Some(connection.clone()),
        };
        arrivals.insert(begin.migration, under_way);
        Vec::new()
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
