//! At the source, when a copy that runs is not complete, and a connection was lost or the process that served has died: connect
//! again and go on.
//!
//! ```text
//!  Resume ──▶  Resumed ─▶ owed pages that the target still lacks are sent, if any ─▶ Outcome: complete, or lost
//!         ──▶  Outcome: it was already
//! ```
//!
//! A running migration does this after its connection broke, the guard and `migrate resume` after its process ended. The
//! frozen container is the same for all of them, so all go on from what the target has.

use super::link::{Link, LinkError};
use super::serve::{PageServer, ServeError, Served};
use super::settle::{connector, meaning};
use crate::migration::handoff::SourceEvent;
use crate::migration::journal::{Owing, OwingSpace};
use crate::migration::{JournalId, MigrationId, PeerAddress};
use crate::runtime::Task;
use crate::transport::{Settings, TransportError};
use crate::wire::codec::Compression;
use crate::wire::message::{Filled, Message, Outcome, Resume, Whole};
use crate::wire::peer_error::PeerError;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long the answer to `Resume` may take.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// How often is told how far the serving is.
const PROGRESS_PERIOD: Duration = Duration::from_millis(500);

/// How long the target may take to say that every owed page has arrived, when it has them.
const WHOLE_PATIENCE: Duration = Duration::from_secs(10);

/// Whom to send owed pages to, and whose.
#[derive(Clone, Copy, Debug)]
pub struct Owed<'a> {
    /// Where identity and trust store are.
    pub state_dir: &'a Path,
    /// The target's agent.
    pub target: &'a PeerAddress,
    /// Its certificate: nobody else's word counts.
    pub peer: &'a str,
    /// The migration.
    pub migration: MigrationId,
    /// The journal whose word counts.
    pub target_journal: JournalId,
    /// The frozen processes.
    pub owing: &'a Owing,
}

/// What is told while pages are sent.
#[derive(Clone, Debug)]
pub enum Told {
    /// The target is there and not complete.
    Connected {
        /// It lacks pages.
        owed: bool,
    },
    /// So far.
    Progress(Served),
    /// Every owed page has arrived.
    Whole(Whole),
    /// Every page is in its place.
    Filled(Filled),
}

/// Why pages cannot be sent for now.
#[derive(Debug, Error)]
pub enum ServingError {
    /// A process that owes pages is gone: they are lost.
    #[error("process {pid}, which owes pages of the container that moved, is gone: they are lost")]
    ProcessGone {
        /// Its pid.
        pid: i32,
    },
    /// The target cannot be talked to.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The target's answer makes no sense here.
    #[error("the target says {0}")]
    Answer(String),
    /// The target has lost its records: what it says of the outcome proves nothing.
    #[error(
        "the target has lost the records it had when the container went there: its word does not count"
    )]
    OtherJournal,
    /// Sending pages failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl Owed<'_> {
    /// Connects, serves, and waits until the copy is complete or lost, or the connection breaks. What the target said last is
    /// the event; the text says more, for people.
    pub fn serve(&self, tell: &mut dyn FnMut(Told)) -> (SourceEvent, String) {
        match self.try_serve(tell) {
            Ok(answer) => answer,
            Err(error) => (
                SourceEvent::TargetUnreachable,
                crate::chain::one_line(&error),
            ),
        }
    }

    fn try_serve(&self, tell: &mut dyn FnMut(Told)) -> Result<(SourceEvent, String), ServingError> {
        let (heard, signals) = mpsc::channel::<Result<Message, TransportError>>();
        let settings = Settings {
            bandwidth_limit: self.owing.bandwidth_limit,
            connect_timeout: Settings::RETRY_TIMEOUT,
            ..Settings::default()
        };
        let mut link = Link::connect(
            self.target,
            connector(self.state_dir, settings)?,
            heard,
            |said| said,
        )?
        .only_to(self.peer, self.target)?;
        link.say(Resume {
            migration: self.migration,
        })?;
        let owed = match signals.recv_timeout(ANSWER_PATIENCE) {
            Ok(Ok(Message::Resumed(resumed))) => resumed.owed,
            Ok(Ok(Message::Outcome(outcome))) => {
                link.close(PeerError::Done);
                return Ok(self.meaning(outcome));
            }
            Ok(Ok(other)) => return Err(ServingError::Answer(other.name().into())),
            Ok(Err(error)) => return Err(LinkError::from(error).into()),
            Err(_) => return Err(ServingError::Answer("nothing".into())),
        };
        let (mut serving, progress) = if owed {
            let server = self.server()?;
            let progress = server.progress();
            (Some(server.attach(link.connection())?), Some(progress))
        } else {
            (None, None)
        };
        tell(Told::Connected { owed });
        let mut told = Instant::now();
        let mut whole_by: Option<Instant> = None;
        loop {
            match signals.recv_timeout(Duration::from_millis(50)) {
                Ok(Ok(Message::Outcome(outcome))) => {
                    drop(serving);
                    link.close(PeerError::Done);
                    return Ok(self.meaning(outcome));
                }
                Ok(Ok(Message::Whole(whole))) => {
                    tell(Told::Whole(whole));
                    whole_by = None;
                }
                Ok(Ok(Message::Filled(filled))) => tell(Told::Filled(filled)),
                Ok(Ok(_)) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Err(error)) => return Err(LinkError::from(error).into()),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(LinkError::from(TransportError::ClosedHere).into());
                }
            }
            if let Some(progress) = &progress
                && told.elapsed() > PROGRESS_PERIOD
            {
                told = Instant::now();
                tell(Told::Progress(progress.now()));
            }
            if let Some(over) = serving.take_if(|serving| serving.is_over()) {
                let (_, served) = over.wait();
                // All was sent and has arrived: the target says so on the other stream.
                served?;
                whole_by = Some(Instant::now() + WHOLE_PATIENCE);
            }
            if whole_by.is_some_and(|by| Instant::now() > by) {
                return Err(ServingError::Answer("nothing".into()));
            }
        }
    }

    fn server(&self) -> Result<PageServer, ServingError> {
        let gone = self.owing.spaces.iter().find(|space| !is_there(space));
        if let Some(space) = gone {
            return Err(ServingError::ProcessGone {
                pid: space.process.pid,
            });
        }
        let spaces: Vec<_> = self
            .owing
            .spaces
            .iter()
            .map(|owing| (owing.space, owing.process.pid))
            .collect();
        Ok(PageServer::resume(&spaces, Compression::Auto)?)
    }

    /// What an outcome means while the copy is not known to be complete.
    fn meaning(&self, outcome: Outcome) -> (SourceEvent, String) {
        let event = match meaning(self.target_journal, outcome.journal, outcome.fate) {
            // It was said to run before.
            SourceEvent::TargetSaysServing | SourceEvent::TargetSaysRolledBack => {
                SourceEvent::TargetSaysPending
            }
            event => event,
        };
        (event, format!("the target says {:?}", outcome.fate))
    }
}

fn is_there(space: &OwingSpace) -> bool {
    Task::on_record(space.process.pid, space.process.start_time).exists()
}
