//! Post-copy at the target: takes in owed pages as they come, and asks for those that are waited for.
//!
//! Enters: the owed pages of every task with their record of arrivals, the agent's end of the supply line, a connection.
//! Leaves: every owed page in the page store, on record and announced to the pager. It ends when all have arrived; when
//! the connection ends before, its books stay and it is attached to the next one.
//!
//! ```text
//!  pager ── Want ──▶ supply line ──▶ the fault stream with the fewest answers under way ──▶ source
//!        ◀─ Came ──────────────────┬─ answers: placed on the connection's own thread ◀──────┤
//!                                  └─ push: a placing thread per page stream ◀──────────────┘
//!                                      │ bytes placed
//!                                      └──▶ Received on the first fault stream: the push's credit
//! ```
//!
//! A page that forked processes share is pushed to one of them, and named to the others by the frames that follow: a placing
//! thread keeps what came last in hand.
//!
//! After each connection is made the source is told what is missing, and the pager is told to ask again. What a source can
//! make this host hold is bounded: a few frames a stream, a few streams, and pages that are owed; anything else is an error.

mod in_hand;
mod session;

use self::in_hand::InHand;
use self::session::Session;
use super::arrivals::Arrivals;
use super::page_store::{PageRun, PageStore, PageStoreError};
use super::pager::{SupplyLine, SupplyMessage};
use crate::memory::{PageRange, PageSet, SpaceId};
use crate::transport::{Connection, TransportError};
use crate::wire::page_frame::{Frame, FrameError, MAX_PAGES, Scratch};
use crate::wire::page_request::PageRequest;
use crate::wire::peer_error::PeerError;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// The most streams of each kind that a source may open for this.
const MAX_STREAMS: usize = 8;

/// Why taking in owed pages ended before all had arrived.
#[derive(Debug, Error)]
pub enum PostCopyError {
    /// The connection broke, or the source ended it.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A frame's content is wrong.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The store could not take it, or it was not owed.
    #[error(transparent)]
    Store(#[from] PageStoreError),
    /// Pages of a space that owes nothing.
    #[error("pages came for {0:?}, which owes none")]
    UnknownSpace(SpaceId),
    /// Pages were said to be another space's, and these are not what came last.
    #[error(
        "{pages} of {space:?} are said to be what came of {origin:?}, which is not the last data on that stream"
    )]
    NotInHand {
        /// The space.
        space: SpaceId,
        /// Whose they were said to be.
        origin: SpaceId,
        /// Which.
        pages: PageRange,
    },
    /// More streams than a source has use for.
    #[error("the source opens more than {MAX_STREAMS} streams of a kind")]
    TooManyStreams,
    /// The source ended its streams before all had come.
    #[error("the source ended a stream while {0} pages are owed")]
    EndedEarly(u64),
    /// Two spaces or two tasks of the same name.
    #[error("{0:?} is named twice among those that owe pages")]
    Twice(SpaceId),
    /// The pager asks for what no source owes.
    #[error("the pager wants {pages} of task {vpid}, which are not owed")]
    WantNotOwed {
        /// The task.
        vpid: i32,
        /// The pages.
        pages: PageRange,
    },
    /// The pager is gone.
    #[error("the pager has left the supply line")]
    PagerGone,
    /// The supply line failed.
    #[error("the supply line to the pager: {0}")]
    Line(#[source] io::Error),
    /// A record of arrivals cannot be read or duplicated.
    #[error("the record of arrivals of {space:?}: {source}")]
    Arrivals {
        /// Whose.
        space: SpaceId,
        /// Why.
        source: io::Error,
    },
    /// A placing thread could not be started.
    #[error("cannot start a placing thread: {0}")]
    Thread(#[source] io::Error),
    /// [`PostCopying::stop`].
    #[error("taking in owed pages was stopped")]
    Stopped,
}

impl PostCopyError {
    /// The number this failure has on the wire, for telling the peer.
    pub fn as_peer_error(&self) -> PeerError {
        match self {
            PostCopyError::Transport(error) => error.as_peer_error(),
            PostCopyError::Frame(FrameError::Hash | FrameError::Decompress(_)) => {
                PeerError::Corrupt
            }
            PostCopyError::Frame(_) => PeerError::Malformed,
            PostCopyError::Store(PageStoreError::NotOwed { .. })
            | PostCopyError::UnknownSpace(_)
            | PostCopyError::NotInHand { .. }
            | PostCopyError::TooManyStreams
            | PostCopyError::EndedEarly(_) => PeerError::Unexpected,
            PostCopyError::Store(
                PageStoreError::Full { .. } | PageStoreError::OutOfMemory { .. },
            ) => PeerError::StorageFull,
            PostCopyError::Stopped => PeerError::Cancelled,
            _ => PeerError::Internal,
        }
    }

    /// Whether another connection can go on where this one ended.
    pub fn is_transient(&self) -> bool {
        matches!(self, PostCopyError::Transport(_))
    }
}

/// A task that waits for owed pages.
#[derive(Debug)]
pub struct OwingTask {
    /// Its address space.
    pub space: SpaceId,
    /// Its pid inside the container, as the pager calls it.
    pub vpid: i32,
    /// Every page that is owed to it, arrived or not.
    pub owed: PageSet,
    /// Where its arrivals are on record.
    pub arrivals: Arrivals,
}

/// The owed pages of a container, to be taken in over one connection after the other.
#[derive(Debug)]
pub struct PostCopy {
    books: Arc<Books>,
}

/// Owed pages being taken in. Dropping it stops that.
#[derive(Debug)]
pub struct PostCopying {
    books: Arc<Books>,
    stop: Arc<Notify>,
    runtime: tokio::runtime::Handle,
    task: Option<JoinHandle<Result<(), PostCopyError>>>,
}

/// What outlives a connection.
#[derive(Debug)]
struct Books {
    store: Arc<PageStore>,
    tasks: HashMap<i32, Task>,
    vpids: HashMap<SpaceId, i32>,
    line: SupplyLine,
    /// What the pager could not be told yet, its queue being full.
    untold: Mutex<BTreeMap<i32, PageSet>>,
    /// Something is to be said: to the source, or to the pager.
    news: Notify,
    /// Owed pages that have not arrived.
    left: AtomicU64,
    all_here: Mutex<bool>,
    arrived: Condvar,
}

#[derive(Debug)]
struct Task {
    space: SpaceId,
    owed: PageSet,
    arrivals: Arrivals,
}

impl PostCopy {
    /// Makes the store take the owed pages of these tasks, and nothing else of theirs, from now on.
    pub fn new(
        store: Arc<PageStore>,
        line: SupplyLine,
        tasks: Vec<OwingTask>,
    ) -> Result<PostCopy, PostCopyError> {
        let (mut by_vpid, mut vpids, mut left) = (HashMap::new(), HashMap::new(), 0);
        for task in tasks {
            let space = task.space;
            let record = task
                .arrivals
                .try_clone()
                .map_err(|source| PostCopyError::Arrivals { space, source })?;
            store.track(space, record)?;
            left += store.owed(space).pages();
            let kept = Task {
                space,
                owed: task.owed,
                arrivals: task.arrivals,
            };
            if by_vpid.insert(task.vpid, kept).is_some() || vpids.insert(space, task.vpid).is_some()
            {
                return Err(PostCopyError::Twice(space));
            }
        }
        Ok(PostCopy {
            books: Arc::new(Books {
                store,
                tasks: by_vpid,
                vpids,
                line,
                untold: Mutex::default(),
                news: Notify::new(),
                left: AtomicU64::new(left),
                all_here: Mutex::new(left == 0),
                arrived: Condvar::new(),
            }),
        })
    }

    /// Owed pages that have not arrived.
    pub fn left(&self) -> u64 {
        self.books.left.load(Ordering::Relaxed)
    }

    /// Takes pages in over `connection`, on its runtime and on placing threads. The source has to attach its end, too.
    ///
    /// If that fails the connection is closed, with the reason told to the peer. Must not be called twice at a time.
    pub fn attach(self, connection: &Connection) -> PostCopying {
        let stop = Arc::new(Notify::new());
        let (books, stopped, connection) = (
            Arc::clone(&self.books),
            Arc::clone(&stop),
            connection.clone(),
        );
        let runtime = connection.runtime().clone();
        let task = runtime.spawn(async move {
            let mut session = Session::new(&books);
            let taken = tokio::select! {
                taken = session.take_in(&connection) => taken,
                () = stopped.notified() => Err(PostCopyError::Stopped),
            };
            if let Err(error) = &taken {
                // Before the session's streams are dropped, which would end them as if all were well.
                connection.close(error.as_peer_error());
            }
            taken
        });
        PostCopying {
            books: self.books,
            stop,
            runtime,
            task: Some(task),
        }
    }
}

impl PostCopying {
    /// Owed pages that have not arrived.
    pub fn left(&self) -> u64 {
        self.books.left.load(Ordering::Relaxed)
    }

    /// Waits until every owed page has arrived, at most so long; whether they have. For threads, not for async tasks.
    pub fn wait_all_here(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut here = self.books.all_here();
        while !*here {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.books.arrived.wait_timeout(here, left);
            here = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Whether [`PostCopying::wait`] would return at once.
    pub fn is_over(&self) -> bool {
        self.task.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Makes [`PostCopying::wait`] return soon, with [`PostCopyError::Stopped`] unless it was over.
    pub fn stop(&self) {
        self.stop.notify_one();
    }

    /// Waits for the end: every page has arrived and the source knows it, or an error after which it can be attached again.
    /// For threads, not for async tasks.
    pub fn wait(mut self) -> (PostCopy, Result<(), PostCopyError>) {
        let taken = match self.task.take().map(|task| self.runtime.block_on(task)) {
            Some(Ok(taken)) => taken,
            // The runtime was shut down, and the connection with it.
            Some(Err(_)) => Err(TransportError::ClosedHere.into()),
            None => Err(PostCopyError::Stopped),
        };
        let post_copy = PostCopy {
            books: Arc::clone(&self.books),
        };
        (post_copy, taken)
    }
}

impl Drop for PostCopying {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

impl Books {
    /// Places an answer.
    fn place_answer(&self, frame: &Frame, scratch: &mut Scratch) -> Result<(), PostCopyError> {
        let runs: Vec<PageRun> = frame.runs().iter().map(PageRun::from).collect();
        self.place(frame.space(), &runs, frame.raw(scratch)?)
    }

    /// Places what was pushed behind what is in hand.
    fn place_pushed(&self, frame: &Frame, in_hand: &mut InHand) -> Result<(), PostCopyError> {
        let (runs, payload) = in_hand.take(frame)?;
        self.place(frame.space(), &runs, &payload)
    }

    /// Places what a frame brings, and says so to the pager.
    fn place(&self, space: SpaceId, runs: &[PageRun], payload: &[u8]) -> Result<(), PostCopyError> {
        let vpid = self.vpids.get(&space);
        let &vpid = vpid.ok_or(PostCopyError::UnknownSpace(space))?;
        let came = self.store.place(space, runs, payload)?;
        let arrived: u64 = came.iter().map(|pages| pages.pages()).sum();
        for pages in came {
            self.came(vpid, pages)?;
        }
        if arrived > 0 && self.left.fetch_sub(arrived, Ordering::AcqRel) == arrived {
            *self.all_here() = true;
            self.arrived.notify_all();
            self.news.notify_one();
        }
        Ok(())
    }

    /// Says that pages came, or keeps it until the pager can be told.
    fn came(&self, vpid: i32, pages: PageRange) -> Result<(), PostCopyError> {
        let mut untold = self.untold();
        let told = untold.is_empty() && self.tell(SupplyMessage::Came { vpid, pages })?;
        if !told {
            untold.entry(vpid).or_default().insert(pages);
            self.news.notify_one();
        }
        Ok(())
    }

    /// Tells the pager what it could not be told. Whether that was all of it.
    fn tell_untold(&self) -> Result<bool, PostCopyError> {
        let mut untold = self.untold();
        while let Some(mut entry) = untold.first_entry() {
            let vpid = *entry.key();
            let next = |untold: &PageSet| untold.iter().next();
            while let Some(pages) = next(entry.get()) {
                if !self.tell(SupplyMessage::Came { vpid, pages })? {
                    return Ok(false);
                }
                entry.get_mut().remove(pages);
            }
            entry.remove();
        }
        Ok(true)
    }

    fn tell(&self, message: SupplyMessage) -> Result<bool, PostCopyError> {
        self.line
            .send(message)
            .map_err(|_| PostCopyError::PagerGone)
    }

    /// What the source is to be asked for when the pager wants these pages; `None` if the first has come meanwhile.
    fn wanted(&self, vpid: i32, pages: PageRange) -> Result<Option<PageRequest>, PostCopyError> {
        let not_owed = || PostCopyError::WantNotOwed { vpid, pages };
        let task = self.tasks.get(&vpid).ok_or_else(not_owed)?;
        let space = task.space;
        let owed = task.owed.intersecting(pages);
        let owed = owed.first().filter(|run| run.start() == pages.start());
        let owed = owed.ok_or_else(not_owed)?;
        let pages = owed.chunks(MAX_PAGES).next().expect("a run is not empty");
        let arrived = task.arrivals.among(pages);
        let arrived = arrived.map_err(|source| PostCopyError::Arrivals { space, source })?;
        match arrived.first() {
            Some(run) if run.start() == pages.start() => {
                // The pager asked before it could hear of it.
                self.came(vpid, *run)?;
                Ok(None)
            }
            _ => Ok(Some(PageRequest::Want { space, pages })),
        }
    }

    /// The list of what has not arrived, for the source.
    fn missing(&self) -> Vec<PageRequest> {
        let mut spaces: Vec<SpaceId> = self.vpids.keys().copied().collect();
        spaces.sort_unstable();
        let missing = spaces.into_iter().flat_map(|space| {
            let owed: Vec<PageRange> = self.store.owed(space).iter().collect();
            let missing = move |pages| PageRequest::Missing { space, pages };
            owed.into_iter().map(missing)
        });
        missing.chain([PageRequest::MissingEnd]).collect()
    }

    fn all_here(&self) -> MutexGuard<'_, bool> {
        self.all_here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn untold(&self) -> MutexGuard<'_, BTreeMap<i32, PageSet>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
