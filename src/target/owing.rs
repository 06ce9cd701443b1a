//! What a copy that runs is still owed, and who brings it: one connection after the other.
//!
//! ```text
//!  Owing::new ─▶ attach(connection) ─▶ whole                         nothing is needed of the source any more
//!                     ▲      └──────▶ lost: the supply line ends ─▶ the pager waits, then freezes the container
//!                     └─── resume(connection) ◀──┘                  the pager gets a new line, and thaws what it froze
//! ```

use super::arrivals::Arrivals;
use super::page_store::PageStore;
use super::pager::{PagerHandle, PagerHandleError, SupplyLine};
use super::post_copy::{OwingTask, PostCopy, PostCopyError, PostCopying};
use crate::memory::{PageSet, SpaceId};
use crate::migration::journal::OwedTask;
use crate::transport::Connection;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long the source may take to hear that all has come; nothing depends on it.
const END_GRACE: Duration = Duration::from_secs(5);

/// How long threads of a connection that is gone may take to place the frame they have in hand.
const LET_GO_WITHIN: Duration = Duration::from_secs(5);

/// Why owed pages cannot be taken in.
#[derive(Debug, Error)]
pub enum OwingError {
    /// The pager cannot be given a supply line.
    #[error(transparent)]
    Pager(#[from] PagerHandleError),
    /// The pages cannot be taken in.
    #[error(transparent)]
    PostCopy(#[from] PostCopyError),
    /// A record of arrivals cannot be made.
    #[error("making a record of arrivals: {0}")]
    Arrivals(#[from] io::Error),
}

/// A task that is owed pages, over all connections.
#[derive(Debug)]
pub struct Debt {
    /// Its pid inside the container.
    pub vpid: i32,
    /// Its memory's name on the wire.
    pub space: SpaceId,
    /// Every page it was owed at the beginning.
    pub pages: PageSet,
    /// Those that have come.
    pub arrivals: Arrivals,
}

/// What a copy is owed.
#[derive(Debug)]
pub struct Owing {
    store: Arc<PageStore>,
    /// How many have the store when no connection places anything in it.
    holders: usize,
    debts: Vec<Debt>,
    link: Link,
}

/// Who brings it.
#[derive(Debug)]
enum Link {
    /// Nobody for now.
    None,
    /// The source.
    Attached(PostCopying),
    /// All has come, or nothing is needed any more; the source is being told.
    Whole {
        since: Instant,
        last: Option<PostCopying>,
    },
}

/// What happened.
#[derive(Debug)]
pub enum OwingEvent {
    /// Every owed page has arrived.
    Whole,
    /// The source is gone while pages are owed.
    Lost(PostCopyError),
}

impl Owing {
    /// The books of a copy that is owed these pages. Nobody brings them yet.
    pub fn new(store: Arc<PageStore>, debts: Vec<Debt>) -> Owing {
        Owing {
            holders: Arc::strong_count(&store),
            store,
            debts,
            link: Link::None,
        }
    }

    /// What the journal needs to know.
    pub fn tasks(&self) -> Vec<OwedTask> {
        let tasks = self.debts.iter();
        tasks
            .map(|debt| OwedTask {
                vpid: debt.vpid,
                space: debt.space,
            })
            .collect()
    }

    /// Begins to take pages in over `connection`; the pager asks on `line`.
    pub fn attach(&mut self, line: SupplyLine, connection: &Connection) -> Result<(), OwingError> {
        // The one before has to let go of the store first: a page that it is still placing would be counted as missing.
        self.link = Link::None;
        let deadline = Instant::now() + LET_GO_WITHIN;
        while Arc::strong_count(&self.store) > self.holders && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut tasks = Vec::with_capacity(self.debts.len());
        for debt in &self.debts {
            tasks.push(OwingTask {
                space: debt.space,
                vpid: debt.vpid,
                owed: debt.pages.clone(),
                arrivals: debt.arrivals.try_clone()?,
            });
        }
        let post_copy = PostCopy::new(Arc::clone(&self.store), line, tasks)?;
        self.link = Link::Attached(post_copy.attach(connection));
        Ok(())
    }

    /// [`Owing::attach`] with a new line to the pager.
    pub fn resume(
        &mut self,
        pager: &PagerHandle,
        connection: &Connection,
    ) -> Result<(), OwingError> {
        self.attach(pager.supply()?, connection)
    }

    /// What happened since the last call.
    pub fn event(&mut self) -> Option<OwingEvent> {
        let Link::Attached(taking) = &self.link else {
            return None;
        };
        let whole = taking.wait_all_here(Duration::ZERO);
        if !whole && !taking.is_over() {
            return None;
        }
        let Link::Attached(taking) = std::mem::replace(&mut self.link, Link::None) else {
            return None;
        };
        if whole {
            self.link = Link::Whole {
                since: Instant::now(),
                last: Some(taking),
            };
            return Some(OwingEvent::Whole);
        }
        let (_, taken) = taking.wait();
        Some(match taken {
            Ok(()) => OwingEvent::Whole,
            Err(error) => OwingEvent::Lost(error),
        })
    }

    /// The container needs nothing any more, whatever has not come.
    pub fn forget(&mut self) {
        if !self.is_whole() {
            self.link = Link::Whole {
                since: Instant::now(),
                last: None,
            };
        }
    }

    /// Nobody brings anything any more.
    pub fn detach(&mut self) {
        self.link = Link::None;
    }

    /// Whether pages are missing and nobody brings them.
    pub fn is_alone(&self) -> bool {
        matches!(self.link, Link::None)
    }

    /// Whether nothing is needed of the source any more.
    pub fn is_whole(&self) -> bool {
        matches!(self.link, Link::Whole { .. })
    }

    /// Whether the source has heard that too, or has had the time to.
    pub fn is_over(&self) -> bool {
        match &self.link {
            Link::Whole { since, last } => {
                last.as_ref().is_some_and(PostCopying::is_over) || since.elapsed() > END_GRACE
            }
            _ => false,
        }
    }
}
