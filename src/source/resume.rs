//! Post-copy at the source, when a connection was lost or the process that served has died: connect again and go on.
//!
//! ```text
//!  Resume ──▶  Resumed: the target says which owed pages it still lacks ─▶ they are sent ─▶ Whole
//!         ──▶  Outcome: it lacks nothing any more, or there is nobody left to send pages to
//! ```
//!
//! A running migration does this after its connection broke, the guard and `migrate resume` after its process ended. The
//! frozen container is the same for all of them, so all go on from what the target has.

use super::link::{Link, LinkError};
use super::serve::{PageServer, ServeError, Served};
use super::settle::connector;
use crate::migration::handoff::SourceEvent;
use crate::migration::journal::{Owing, OwingSpace};
use crate::migration::{JournalId, MigrationId, PeerAddress};
use crate::runtime::Task;
use crate::transport::{Settings, TransportError};
use crate::wire::codec::Compression;
use crate::wire::message::{Fate, Message, Resume, Whole};
use crate::wire::peer_error::PeerError;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long the answer to `Resume` may take.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// How often is told how far the serving is.
const PROGRESS_PERIOD: Duration = Duration::from_millis(500);

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
    /// The target is there and lacks pages.
    Connected,
    /// So far.
    Progress(Served),
    /// The target lacks nothing any more.
    Whole(Whole),
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
    /// Connects, and serves until the target has every page or the connection breaks. What the target said last is the
    /// event; the text says more, for people.
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
        let gone = self.owing.spaces.iter().find(|space| !is_there(space));
        if let Some(space) = gone {
            return Err(ServingError::ProcessGone {
                pid: space.process.pid,
            });
        }
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
        match signals.recv_timeout(ANSWER_PATIENCE) {
            Ok(Ok(Message::Resumed(_))) => {}
            Ok(Ok(Message::Outcome(outcome))) => {
                link.close(PeerError::Done);
                if outcome.journal != self.target_journal {
                    return Err(ServingError::OtherJournal);
                }
                return Ok(match outcome.fate {
                    Fate::Committed => {
                        tell(Told::Whole(Whole::default()));
                        (SourceEvent::TargetSaysCommitted, "it is whole".into())
                    }
                    Fate::Lost => return Err(ServingError::Answer(LOST.into())),
                    fate => return Err(ServingError::Answer(format!("{fate:?}"))),
                });
            }
            Ok(Ok(other)) => return Err(ServingError::Answer(other.name().into())),
            Ok(Err(error)) => return Err(LinkError::from(error).into()),
            Err(_) => return Err(ServingError::Answer("nothing".into())),
        }
        let spaces: Vec<_> = self
            .owing
            .spaces
            .iter()
            .map(|owing| (owing.space, owing.process.pid))
            .collect();
        let server = PageServer::resume(&spaces, Compression::Auto)?;
        let progress = server.progress();
        let mut serving = Some(server.attach(link.connection())?);
        tell(Told::Connected);
        let mut told = Instant::now();
        let mut answer_by: Option<Instant> = None;
        loop {
            match signals.recv_timeout(Duration::from_millis(50)) {
                Ok(Ok(Message::Whole(whole))) => {
                    tell(Told::Whole(whole));
                    drop(serving);
                    link.close(PeerError::Done);
                    return Ok((SourceEvent::TargetSaysCommitted, "it is whole".into()));
                }
                Ok(Ok(_)) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Err(error)) => return Err(LinkError::from(error).into()),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(LinkError::from(TransportError::ClosedHere).into());
                }
            }
            if told.elapsed() > PROGRESS_PERIOD {
                told = Instant::now();
                tell(Told::Progress(progress.now()));
            }
            if let Some(over) = serving.take_if(|serving| serving.is_over()) {
                let (_, served) = over.wait();
                // All was sent and has arrived: the target says so on the other stream.
                served?;
                answer_by = Some(Instant::now() + ANSWER_PATIENCE);
            }
            if answer_by.is_some_and(|by| Instant::now() > by) {
                return Err(ServingError::Answer("nothing".into()));
            }
        }
    }
}

const LOST: &str = "that the copy ended while pages were missing; what is frozen here is the container as it was at the switch \
     (thaw it to go back to that, or delete it)";

fn is_there(space: &OwingSpace) -> bool {
    Task::on_record(space.process.pid, space.process.start_time).exists()
}
