//! Taking in pages and files as they come.
//!
//! ```text
//!  page stream 0 ─▶ placing thread 0 ─┐
//!  page stream 1 ─▶ placing thread 1 ─┴▶ page store      frames counted per stream
//!  file stream   ─▶ image directory
//! ```
//!
//! A page's copies all come on one stream and are placed by one thread, in order: the newest wins.

use super::page_store::{PageRun, PageStore, PageStoreError};
use super::stall::Stall;
use crate::transport::{Connection, PageInbox, TransportError};
use crate::wire::message::ImageFile;
use crate::wire::page_frame::Scratch;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::runtime::Handle;

/// Frames that wait between a stream and its placing thread; each is at most about 1 MiB.
const WAITING_FRAMES: usize = 4;

/// How often bytes are looked for that are less than a frame or a file.
const LOOK: Duration = Duration::from_millis(200);

/// Why pages or files could not be taken in.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// The stream broke or carried something wrong.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A frame's content is wrong.
    #[error(transparent)]
    Frame(#[from] crate::wire::page_frame::FrameError),
    /// The store could not take it.
    #[error(transparent)]
    Store(#[from] PageStoreError),
    /// A file could not be written.
    #[error("cannot write {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// What was announced did not come.
    #[error("{0} did not arrive: nothing came for {1:?}")]
    Missing(&'static str, Duration),
    /// A stream came that was not announced.
    #[error("page stream {0} was not announced")]
    UnknownStream(u16),
    /// Files came that are not in the manifest, or have another size.
    #[error("the image files that came are not the ones announced")]
    OtherFiles,
}

/// The receiving half of a migration.
#[derive(Debug)]
pub struct Receiver {
    shared: Arc<Shared>,
    connection: Connection,
}

#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    /// Frames placed, by stream.
    frames: Vec<u64>,
    /// Image files that are whole, with their sizes.
    files: BTreeMap<String, u64>,
    failed: Option<ReceiveError>,
}

impl Receiver {
    /// Begins to take in `streams` page streams into `store`, and image files into `images`.
    ///
    /// A file named `held_aside` goes to the path given instead: the image directory has something else by that name.
    pub fn start(
        connection: &Connection,
        runtime: &Handle,
        streams: u16,
        store: &Arc<PageStore>,
        images: &Path,
        held_aside: (&'static str, PathBuf),
        disk_limit: u64,
    ) -> Receiver {
        let shared = Arc::new(Shared {
            progress: Mutex::new(Progress {
                frames: vec![0; usize::from(streams)],
                ..Progress::default()
            }),
            changed: Condvar::new(),
        });
        for _ in 0..streams {
            let (connection, shared, store) =
                (connection.clone(), Arc::clone(&shared), Arc::clone(store));
            runtime.spawn(async move {
                match connection.accept_pages().await {
                    Ok(stream) => {
                        let inbox = stream.into_inbox(WAITING_FRAMES);
                        thread::spawn(move || shared.report(place(inbox, &store, &shared)));
                    }
                    Err(error) => shared.report(Err(error.into())),
                }
            });
        }
        let kept = connection.clone();
        let (connection, files, images) = (
            connection.clone(),
            Arc::clone(&shared),
            images.to_path_buf(),
        );
        runtime.spawn(async move {
            let received =
                receive_files(&connection, &images, &held_aside, disk_limit, &files).await;
            files.report(received);
        });
        Receiver {
            shared,
            connection: kept,
        }
    }

    /// Waits until that many frames of each stream are placed, as long as anything comes: `patience` is for a link that is dead.
    pub fn wait_for_frames(&self, frames: &[u64], patience: Duration) -> Result<(), ReceiveError> {
        self.wait("the announced pages", patience, |progress| {
            progress.frames.len() == frames.len()
                && progress
                    .frames
                    .iter()
                    .zip(frames)
                    .all(|(have, want)| have >= want)
        })
    }

    /// Waits in the same way until every announced file is there, and checks that they are the ones announced.
    pub fn wait_for_files(
        &self,
        files: &[ImageFile],
        patience: Duration,
    ) -> Result<(), ReceiveError> {
        self.wait("the announced images", patience, |progress| {
            progress.files.len() >= files.len()
        })?;
        let progress = self.shared.lock();
        let same = files
            .iter()
            .all(|file| progress.files.get(file.name.as_str()) == Some(&file.size));
        if same && progress.files.len() == files.len() {
            Ok(())
        } else {
            Err(ReceiveError::OtherFiles)
        }
    }

    /// What went wrong, if something did.
    pub fn failure(&self) -> Option<ReceiveError> {
        self.shared.lock().failed.take()
    }

    fn wait(
        &self,
        what: &'static str,
        patience: Duration,
        done: impl Fn(&Progress) -> bool,
    ) -> Result<(), ReceiveError> {
        let mut progress = self.shared.lock();
        let seen = |progress: &Progress| {
            let placed: u64 = progress.frames.iter().sum();
            (self.connection.bytes_taken(), placed, progress.files.len())
        };
        let mut stall = Stall::begin(patience, seen(&progress), Instant::now());
        loop {
            if let Some(error) = progress.failed.take() {
                return Err(error);
            }
            if done(&progress) {
                return Ok(());
            }
            let Some(left) = stall.left(seen(&progress), Instant::now()) else {
                return Err(ReceiveError::Missing(what, patience));
            };
            // Bytes come without a word: they are looked for.
            let waited = self.shared.changed.wait_timeout(progress, left.min(LOOK));
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, result: Result<(), ReceiveError>) {
        if let Err(error) = result {
            self.lock().failed.get_or_insert(error);
            self.changed.notify_all();
        }
    }
}

/// Places frames until the stream ends.
fn place(mut inbox: PageInbox, store: &PageStore, shared: &Shared) -> Result<(), ReceiveError> {
    let index = usize::from(inbox.index());
    if index >= shared.lock().frames.len() {
        return Err(ReceiveError::UnknownStream(inbox.index()));
    }
    let mut scratch = Scratch::new();
    let mut runs = Vec::new();
    while let Some(frame) = inbox.receive()? {
        let payload = frame.raw(&mut scratch)?;
        runs.clear();
        runs.extend(frame.runs().iter().map(PageRun::from));
        store.place(frame.space(), &runs, payload)?;
        shared.lock().frames[index] = inbox.frames();
        shared.changed.notify_all();
    }
    Ok(())
}

async fn receive_files(
    connection: &Connection,
    images: &Path,
    held_aside: &(&'static str, PathBuf),
    disk_limit: u64,
    shared: &Shared,
) -> Result<(), ReceiveError> {
    let mut stream = connection.accept_files().await?;
    let mut left = disk_limit;
    while let Some(incoming) = stream.receive().await? {
        let header = incoming.header().clone();
        let name = header.name.as_str();
        if !header.name.is_single() {
            return Err(ReceiveError::OtherFiles);
        }
        let path = if name == held_aside.0 {
            held_aside.1.clone()
        } else {
            images.join(name)
        };
        let failed = |source| ReceiveError::File {
            path: path.clone(),
            source,
        };
        // Replaced as a whole: the directory is ours, so a link planted there is not followed.
        let mut options = tokio::fs::OpenOptions::new();
        let options = options
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(&path).await.map_err(failed)?;
        incoming.copy_to(&mut file, left).await?;
        tokio::io::AsyncWriteExt::flush(&mut file)
            .await
            .map_err(failed)?;
        left = left.saturating_sub(header.size);
        shared.lock().files.insert(name.to_string(), header.size);
        shared.changed.notify_all();
    }
    Ok(())
}
