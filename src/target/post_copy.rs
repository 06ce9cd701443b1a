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
//! After each connection is made the source is told what is missing, and the pager is told to ask again. What a source can
//! make this host hold is bounded: a few frames a stream, a few streams, and pages that are owed; anything else is an error.

use super::arrivals::Arrivals;
use super::page_store::{PageRun, PageStore, PageStoreError, RunContent};
use super::pager::{Heard, SupplyLine, SupplyMessage};
use crate::kernel::readiness;
use crate::memory::{PageRange, PageSet, SpaceId};
use crate::transport::{Connection, PageInbox, PageReceiver, RequestSender, TransportError};
use crate::wire::page_frame::{Frame, FrameError, MAX_PAGES, RunKind, Scratch};
use crate::wire::page_request::PageRequest;
use crate::wire::peer_error::PeerError;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

/// The most streams of each kind that a source may open for this.
const MAX_STREAMS: usize = 8;

/// Frames that wait between a page stream and its placing thread.
const WAITING_FRAMES: usize = 2;

/// How long the source may take to end its streams when all has arrived; nothing depends on it.
const END_GRACE: Duration = Duration::from_secs(5);

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
    /// Places what a frame brings, and says so to the pager.
    fn place(&self, frame: &Frame, scratch: &mut Scratch) -> Result<(), PostCopyError> {
        let space = frame.space();
        let vpid = self.vpids.get(&space);
        let &vpid = vpid.ok_or(PostCopyError::UnknownSpace(space))?;
        let payload = frame.raw(scratch)?;
        let runs: Vec<PageRun> = frame
            .runs()
            .iter()
            .map(|run| PageRun {
                pages: run.range,
                content: match run.kind {
                    RunKind::Data => RunContent::Data,
                    RunKind::Zero => RunContent::Zero,
                    RunKind::Owed => RunContent::Owed,
                    RunKind::Same(origin) => RunContent::Same(origin),
                },
            })
            .collect();
        let came = self.store.place(space, &runs, payload)?;
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

/// The source's ends of one connection's streams.
struct Session<'a> {
    books: &'a Arc<Books>,
    /// By index: what asks, and how many answers are under way.
    streams: BTreeMap<u16, (RequestSender, Arc<AtomicU64>)>,
    /// Bytes of push frames in the store.
    received: Arc<AtomicU64>,
    confirmed: u64,
    ask_again: bool,
    readers: JoinSet<Result<(), PostCopyError>>,
    /// How placing threads end.
    placed: mpsc::UnboundedReceiver<Result<(), PostCopyError>>,
    placers: mpsc::UnboundedSender<Result<(), PostCopyError>>,
    placing: usize,
}

impl<'a> Session<'a> {
    fn new(books: &'a Arc<Books>) -> Session<'a> {
        let (placers, placed) = mpsc::unbounded_channel();
        Session {
            books,
            streams: BTreeMap::new(),
            received: Arc::default(),
            confirmed: 0,
            ask_again: true,
            readers: JoinSet::new(),
            placed,
            placers,
            placing: 0,
        }
    }

    /// Takes pages in until all have arrived and the source has heard of it.
    async fn take_in(&mut self, connection: &Connection) -> Result<(), PostCopyError> {
        let line = self.books.line.as_fd().try_clone_to_owned();
        let line = line
            .and_then(readiness::watch)
            .map_err(PostCopyError::Line)?;
        let mut accepted_faults = 0;
        let mut accepted_pages = 0;
        let mut pager_is_full = false;
        // News of an earlier connection's time.
        self.books.news.notify_one();
        loop {
            let talking = self.streams.contains_key(&0);
            tokio::select! {
                faults = connection.accept_faults() => {
                    accepted_faults += 1;
                    if accepted_faults > MAX_STREAMS {
                        return Err(PostCopyError::TooManyStreams);
                    }
                    let (requests, pages) = faults?;
                    self.add_faults(requests, pages).await?;
                }
                pages = connection.accept_pages() => {
                    accepted_pages += 1;
                    if accepted_pages > MAX_STREAMS {
                        return Err(PostCopyError::TooManyStreams);
                    }
                    self.add_pages(pages?)?;
                }
                ready = line.readable(), if talking => {
                    let mut ready = ready.map_err(PostCopyError::Line)?;
                    if self.hear_pager().await? {
                        ready.clear_ready();
                    }
                }
                ready = line.writable(), if pager_is_full => {
                    let mut ready = ready.map_err(PostCopyError::Line)?;
                    pager_is_full = !self.tell_pager()?;
                    if pager_is_full {
                        ready.clear_ready();
                    }
                }
                () = self.books.news.notified() => {
                    pager_is_full = !self.tell_pager()?;
                    if talking && self.tell_source().await? {
                        return self.end().await;
                    }
                }
                Some(ended) = self.readers.join_next() => {
                    // A reader does not panic, and nobody cancels it.
                    ended.unwrap_or(Err(TransportError::StreamEnded.into()))?;
                    self.ended_early()?;
                }
                Some(ended) = self.placed.recv() => {
                    self.placing -= 1;
                    ended?;
                    self.ended_early()?;
                }
            }
        }
    }

    /// Begins to read answers from a fault stream; the first one is told what is missing.
    async fn add_faults(
        &mut self,
        mut requests: RequestSender,
        mut pages: PageReceiver,
    ) -> Result<(), PostCopyError> {
        let index = pages.index();
        if index == 0 {
            requests.send(&self.books.missing()).await?;
            self.books.news.notify_one();
        }
        let under_way = Arc::new(AtomicU64::new(0));
        let (books, answered) = (Arc::clone(self.books), Arc::clone(&under_way));
        self.readers.spawn(async move {
            let mut scratch = Scratch::new();
            while let Some(frame) = pages.receive().await? {
                books.place(&frame, &mut scratch)?;
                // A source that answers more than it was asked for is only asked more.
                let _ = answered.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
                    count.checked_sub(1)
                });
            }
            Ok(())
        });
        match self.streams.insert(index, (requests, under_way)) {
            None => Ok(()),
            Some(_) => Err(PostCopyError::TooManyStreams),
        }
    }

    /// Begins to place what is pushed on a page stream.
    fn add_pages(&mut self, pages: PageReceiver) -> Result<(), PostCopyError> {
        let inbox = pages.into_inbox(WAITING_FRAMES);
        let (books, received) = (Arc::clone(self.books), Arc::clone(&self.received));
        let ended = self.placers.clone();
        thread::Builder::new()
            .name("place-owed".to_owned())
            .spawn(move || {
                // Nobody listens when the connection was given up.
                let _ = ended.send(place_pushed(inbox, &books, &received));
            })
            .map_err(PostCopyError::Thread)?;
        self.placing += 1;
        Ok(())
    }

    /// Reads what the pager wants, and asks the source for it. Whether there is nothing more to read for now.
    async fn hear_pager(&mut self) -> Result<bool, PostCopyError> {
        match self.books.line.receive().map_err(PostCopyError::Line)? {
            Heard::Nothing => return Ok(true),
            Heard::End => return Err(PostCopyError::PagerGone),
            Heard::Message(SupplyMessage::Want { vpid, pages }) => {
                if let Some(want) = self.books.wanted(vpid, pages)? {
                    let least = self.streams.values_mut();
                    let least =
                        least.min_by_key(|(_, under_way)| under_way.load(Ordering::Relaxed));
                    let (stream, under_way) = least.expect("talking means that there is a stream");
                    under_way.fetch_add(1, Ordering::Relaxed);
                    stream.send(&[want]).await?;
                }
            }
            // Only this side says these.
            Heard::Message(SupplyMessage::Came { .. } | SupplyMessage::AskAgain) => {
                let what = "the pager says what only the agent can know";
                let error = io::Error::new(io::ErrorKind::InvalidData, what);
                return Err(PostCopyError::Line(error));
            }
        }
        Ok(false)
    }

    /// Says to the pager what it has not been told. Whether that was all.
    fn tell_pager(&mut self) -> Result<bool, PostCopyError> {
        if self.ask_again && !self.streams.is_empty() {
            if !self.books.tell(SupplyMessage::AskAgain)? {
                return Ok(false);
            }
            self.ask_again = false;
        }
        self.books.tell_untold()
    }

    /// Says to the source what has come. Whether that was everything.
    async fn tell_source(&mut self) -> Result<bool, PostCopyError> {
        let (first, _) = self
            .streams
            .get_mut(&0)
            .expect("talking means that there is one");
        let received = self.received.load(Ordering::Acquire);
        if received > self.confirmed {
            self.confirmed = received;
            first
                .send(&[PageRequest::Received { bytes: received }])
                .await?;
        }
        if *self.books.all_here() {
            first.send(&[PageRequest::Complete]).await?;
            return Ok(true);
        }
        Ok(false)
    }

    /// The source ended a stream: an error as long as something is owed.
    fn ended_early(&self) -> Result<(), PostCopyError> {
        match self.books.left.load(Ordering::Acquire) {
            0 => Ok(()),
            left => Err(PostCopyError::EndedEarly(left)),
        }
    }

    /// All has arrived: the source is given time to end its streams. What goes wrong now does not matter.
    async fn end(&mut self) -> Result<(), PostCopyError> {
        for (requests, _) in self.streams.values_mut() {
            let _ = requests.finish();
        }
        let ended = async {
            while self.readers.join_next().await.is_some() {}
            while self.placing > 0 && self.placed.recv().await.is_some() {
                self.placing -= 1;
            }
        };
        let _ = timeout(END_GRACE, ended).await;
        // The pager may have been too busy to be told.
        while !self.tell_pager()? {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

/// Places what is pushed until the stream ends.
fn place_pushed(
    mut inbox: PageInbox,
    books: &Books,
    received: &AtomicU64,
) -> Result<(), PostCopyError> {
    let mut scratch = Scratch::new();
    while let Some(frame) = inbox.receive()? {
        books.place(&frame, &mut scratch)?;
        received.fetch_add(frame.wire_len() as u64, Ordering::Release);
        books.news.notify_one();
    }
    Ok(())
}
