//! Serving owed pages of frozen processes: faults at once, the rest pushed in the background.
//!
//! Enters: the owed pages of every space, and a connection. Leaves: every one of them, on fault streams as answers to what
//! the target wants, and on a page stream of its own as the push. It ends when the target says that every page has
//! arrived; when the connection ends before, the server is what it was and is attached to the next one.
//!
//! ```text
//!   target ── Want ─────▶ answer, a task per fault stream ──▶ frozen memory ──▶ frame on the same stream
//!          ── Received ─▶ credit ──▶ push, a thread ────────▶ frozen memory ──▶ frame on the push stream
//!                                                         └─▶ who shares that ──▶ frames that name it, behind it
//!          ── Missing… ─▶ books: what is left
//!          ── Complete ─▶ the end
//! ```
//!
//! Faults are answered on the connection's own thread: to read a few pages takes less time than to wake another thread.
//! Several streams, so that an answer which lost a packet does not hold up the next. The push has its own new page stream
//! and not those of the rounds: after a cut these are gone anyway, so there is one way and not two, and the order of
//! copies no longer matters, because the processes are frozen and every copy of a page is the same. How much of the push
//! may be under way is [`credit`]'s.

mod answer;
mod books;
pub mod credit;
mod frame;
mod progress;
mod push;
mod sharing;

pub use self::books::Breach;
pub use self::credit::CreditError;
pub use self::progress::{ServeProgress, Served};

use self::books::Books;
use self::credit::Credit;
use crate::kernel::process_memory::ReadError;
use crate::memory::{PageRange, SpaceId};
use crate::source::send::PagesToSend;
use crate::transport::{Connection, TransportError};
use crate::wire::codec::Compression;
use crate::wire::page_frame::FrameError;
use crate::wire::peer_error::PeerError;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use thiserror::Error;
use tokio::sync::watch;

/// Fault streams of a connection.
const FAULT_STREAMS: u16 = 4;

/// Why serving ended before every page had arrived.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The connection broke, or the target ended it.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The frozen memory cannot be read.
    #[error("reading memory of process {pid}: {source}")]
    Read {
        /// The process.
        pid: i32,
        /// Why.
        source: ReadError,
    },
    /// An owed page is not there.
    #[error("{pages} of {space:?} are owed and not there")]
    Gone {
        /// The space.
        space: SpaceId,
        /// The first such run.
        pages: PageRange,
    },
    /// The target says what cannot be.
    #[error(transparent)]
    Breach(#[from] Breach),
    /// The target claims to have received what it cannot have.
    #[error(transparent)]
    Credit(#[from] CreditError),
    /// A frame could not be made: a bug.
    #[error("encoding pages: {0}")]
    Encode(#[from] FrameError),
    /// The thread could not be started.
    #[error("cannot start the thread that serves pages: {0}")]
    Thread(#[source] io::Error),
    /// [`Serving::stop`].
    #[error("serving was stopped")]
    Stopped,
}

impl ServeError {
    /// The number this failure has on the wire, for telling the peer.
    pub fn as_peer_error(&self) -> PeerError {
        match self {
            ServeError::Transport(error) => error.as_peer_error(),
            ServeError::Breach(_) | ServeError::Credit(_) => PeerError::Unexpected,
            ServeError::Stopped => PeerError::Cancelled,
            ServeError::Read { .. }
            | ServeError::Gone { .. }
            | ServeError::Encode(_)
            | ServeError::Thread(_) => PeerError::Internal,
        }
    }

    /// Whether another connection can go on where this one ended.
    pub fn is_transient(&self) -> bool {
        matches!(self, ServeError::Transport(_))
    }
}

/// The owed pages of frozen processes, to be served over one connection after the other.
#[derive(Debug)]
pub struct PageServer {
    shared: Arc<Shared>,
}

/// A page server at work. Dropping it stops it.
#[derive(Debug)]
pub struct Serving {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

#[derive(Debug)]
struct Shared {
    compression: Compression,
    progress: Arc<ServeProgress>,
    state: Mutex<State>,
    /// Something in the state has changed, for the thread that pushes.
    changed: Condvar,
    /// The end has come, for a push that waits for the network.
    over: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    books: Books,
    credit: Credit,
    end: Option<Result<(), ServeError>>,
}

impl PageServer {
    /// A server of these pages. Their processes are there, and frozen until all is over.
    pub fn new(
        pages: Vec<PagesToSend>,
        compression: Compression,
    ) -> Result<PageServer, ServeError> {
        Self::over(Books::new(pages), compression)
    }

    /// A server in place of one that is gone: what these processes still owe the target will say.
    pub fn resume(
        processes: &[(SpaceId, i32)],
        compression: Compression,
    ) -> Result<PageServer, ServeError> {
        Self::over(Books::resume(processes), compression)
    }

    fn over(
        books: Result<Books, (i32, ReadError)>,
        compression: Compression,
    ) -> Result<PageServer, ServeError> {
        let books = books.map_err(|(pid, source)| ServeError::Read { pid, source })?;
        let shared = Shared {
            compression,
            progress: Arc::default(),
            state: Mutex::new(State {
                books,
                credit: Credit::default(),
                end: None,
            }),
            changed: Condvar::new(),
            over: watch::Sender::new(false),
        };
        shared.count_left(&shared.lock());
        Ok(PageServer {
            shared: Arc::new(shared),
        })
    }

    /// What it does, to be watched from elsewhere.
    pub fn progress(&self) -> Arc<ServeProgress> {
        Arc::clone(&self.shared.progress)
    }

    /// Serves over `connection`, on a thread of its own and on the connection's. The target has to attach its end, too.
    ///
    /// If serving fails the connection is closed, with the reason told to the peer.
    pub fn attach(self, connection: &Connection) -> Result<Serving, ServeError> {
        let mut state = self.shared.lock();
        state.books.begin_list();
        state.credit = Credit::default();
        state.end = None;
        drop(state);
        self.shared.over.send_replace(false);
        let (shared, connection) = (Arc::clone(&self.shared), connection.clone());
        let thread = thread::Builder::new()
            .name("serve-pages".to_owned())
            .spawn(move || serve(&shared, &connection))
            .map_err(ServeError::Thread)?;
        Ok(Serving {
            shared: self.shared,
            thread: Some(thread),
        })
    }
}

impl Serving {
    /// Whether [`Serving::wait`] would return at once.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Makes [`Serving::wait`] return soon, with [`ServeError::Stopped`] unless all has arrived.
    pub fn stop(&self) {
        self.shared.end(Err(ServeError::Stopped));
    }

    /// Waits for the end: every page has arrived, or an error after which the server can be attached again.
    pub fn wait(mut self) -> (PageServer, Result<(), ServeError>) {
        let served = match self.thread.take().map(JoinHandle::join) {
            Some(Ok(served)) => served,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Err(ServeError::Stopped),
        };
        let server = PageServer {
            shared: Arc::clone(&self.shared),
        };
        (server, served)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop();
            // It has told its error by closing the connection.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first end counts.
    fn end(&self, how: Result<(), ServeError>) {
        self.lock().end.get_or_insert(how);
        self.changed.notify_all();
        self.over.send_replace(true);
    }

    fn count_left(&self, state: &State) {
        self.progress
            .left
            .store(state.books.left(), Ordering::Relaxed);
    }
}

/// Opens the streams, answers and pushes until the end.
fn serve(shared: &Arc<Shared>, connection: &Connection) -> Result<(), ServeError> {
    let runtime = connection.runtime();
    let opened = runtime.block_on(async {
        let mut faults = Vec::new();
        for index in 0..FAULT_STREAMS {
            faults.push(connection.open_faults(index).await?);
        }
        Ok::<_, TransportError>((faults, connection.open_pages(0).await?))
    });
    let (faults, mut pages) = opened?;
    let answering: Vec<_> = faults
        .into_iter()
        .map(|(pages, requests)| {
            let (shared, connection) = (Arc::clone(shared), connection.clone());
            runtime.spawn(async move {
                let mut stream = (pages, requests);
                if let Err(error) = answer::answer(&mut stream, &shared, &connection).await {
                    // Before the stream is dropped, which would end it as if all were well.
                    connection.close(error.as_peer_error());
                    shared.end(Err(error));
                }
            })
        })
        .collect();
    let pushed = push::push(&mut pages, shared, runtime);
    if let Err(error) = &pushed {
        connection.close(error.as_peer_error());
    }
    // Streams that are dropped now end well if the connection is open: everything has arrived.
    for task in answering {
        task.abort();
        // Cancelled, or over before.
        let _ = runtime.block_on(task);
    }
    pushed
}
