//! One connection's time: its streams, its placing threads, and what is said on both sides meanwhile.

use super::in_hand::InHand;
use super::{Books, MAX_STREAMS, PostCopyError};
use crate::kernel::readiness;
use crate::target::pager::{Heard, SupplyMessage};
use crate::transport::{Connection, PageInbox, PageReceiver, RequestSender, TransportError};
use crate::wire::page_frame::Scratch;
use crate::wire::page_request::PageRequest;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Frames that wait between a page stream and its placing thread.
const WAITING_FRAMES: usize = 2;

/// How long the source may take to end its streams when all has arrived; nothing depends on it.
const END_GRACE: Duration = Duration::from_secs(5);

/// The source's ends of one connection's streams.
pub(super) struct Session<'a> {
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
    pub fn new(books: &'a Arc<Books>) -> Session<'a> {
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
    pub async fn take_in(&mut self, connection: &Connection) -> Result<(), PostCopyError> {
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
                books.place_answer(&frame, &mut scratch)?;
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
    let mut in_hand = InHand::new();
    while let Some(frame) = inbox.receive()? {
        books.place_pushed(&frame, &mut in_hand)?;
        received.fetch_add(frame.wire_len() as u64, Ordering::Release);
        books.news.notify_one();
    }
    Ok(())
}
