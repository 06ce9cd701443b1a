//! The push: everything that nobody asked for yet, as fast as it does not get in a fault's way.
//!
//! Behind each frame of a process's pages go those of the other processes that share any of them, which only name them.

use super::books::Batch;
use super::frame::Content;
use super::sharing::Pushed;
use super::{ServeError, Shared};
use crate::memory::SpaceId;
use crate::transport::PageSender;
use crate::wire::codec::{Codec, CodecChooser};
use crate::wire::page_frame::{EncodedFrame, FrameEncoder, Run, RunKind};
use bytes::Bytes;
use std::sync::PoisonError;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Pushes until the end, on the calling thread.
pub(super) fn push(
    pages: &mut PageSender,
    shared: &Shared,
    runtime: &Handle,
) -> Result<(), ServeError> {
    let mut push = Push {
        pages,
        shared,
        runtime,
        over: shared.over.subscribe(),
        encoder: FrameEncoder::new(),
    };
    let mut chooser = CodecChooser::new(shared.compression);
    loop {
        match next(shared, &mut chooser) {
            Next::Batch(batch) => push.batch(&batch, &mut chooser)?,
            Next::End(end) => return end,
        }
    }
}

struct Push<'a> {
    pages: &'a mut PageSender,
    shared: &'a Shared,
    runtime: &'a Handle,
    over: watch::Receiver<bool>,
    encoder: FrameEncoder,
}

impl Push<'_> {
    fn batch(&mut self, batch: &Batch, chooser: &mut CodecChooser) -> Result<(), ServeError> {
        let codec = chooser.choose();
        let start = Instant::now();
        let content = Content::read(batch)?;
        let frame = content.encode(&mut self.encoder, codec)?;
        chooser.encoded(
            codec,
            content.bytes.len(),
            frame.payload.len(),
            start.elapsed(),
        );
        let bytes = self.send(frame)?;
        self.shared.progress.pushed(batch.pages(), bytes);
        self.name_sharers(batch, &content)
    }

    /// Names the pages just pushed to every other process that shares them.
    fn name_sharers(&mut self, batch: &Batch, content: &Content) -> Result<(), ServeError> {
        let pages = batch.data_of(content);
        let (mut pushed, mut after) = (None, None);
        while let Some(other) = sharer(self.shared, &pages, after) {
            after = Some(other.space);
            let pushed = match &pushed {
                Some(pushed) => pushed,
                None => pushed.insert(Pushed::of(&pages, content)?),
            };
            if !pushed.is_shared() {
                break;
            }
            let same = pushed.shared_with(&other)?;
            let same = {
                let mut state = self.shared.lock();
                let same = state.books.take(other.space, &same);
                self.shared.count_left(&state);
                same
            };
            if same.is_empty() {
                continue;
            }
            let runs: Vec<Run> = same
                .iter()
                .map(|&range| Run {
                    range,
                    kind: RunKind::Same(content.space),
                })
                .collect();
            let encoder = &mut self.encoder;
            let frame = encoder.encode(other.space, &runs, Bytes::new(), Codec::None)?;
            let bytes = self.send(frame)?;
            let count = same.iter().map(|range| range.pages()).sum();
            self.shared.progress.pushed_same(count, bytes);
        }
        Ok(())
    }

    /// Hands a frame to the stream, unless the end comes before there is room. Returns its bytes.
    fn send(&mut self, frame: EncodedFrame) -> Result<u64, ServeError> {
        let bytes = frame.wire_len() as u64;
        self.shared.lock().credit.sending(bytes, Instant::now());
        let (pages, over) = (&mut *self.pages, &mut self.over);
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                sent = pages.send(frame) => Ok(sent?),
                // What ended the service is told in the next turn.
                _ = over.wait_for(|&over| over) => Ok::<(), ServeError>(()),
            }
        })?;
        Ok(bytes)
    }
}

/// The next that may share these pages, unless the end has come: then half a frame may be on the stream.
fn sharer(shared: &Shared, pages: &Batch, after: Option<SpaceId>) -> Option<Batch> {
    let state = shared.lock();
    match state.end {
        None => state.books.sharer(pages, after),
        Some(_) => None,
    }
}

enum Next {
    Batch(Batch),
    End(Result<(), ServeError>),
}

/// Waits until there is something to push and credit to push it.
fn next(shared: &Shared, chooser: &mut CodecChooser) -> Next {
    let mut state = shared.lock();
    loop {
        if let Some(end) = state.end.take() {
            // Answering tasks look at how it ended, too.
            if end.is_ok() {
                state.end = Some(Ok(()));
            }
            return Next::End(end);
        }
        if state.books.is_listed() {
            match state.credit.next_frame() {
                Some(pages) => {
                    if let Some(batch) = state.books.push(pages) {
                        shared.count_left(&state);
                        return Next::Batch(batch);
                    }
                }
                // It is the link that takes its time.
                None => {
                    if let Some(rate) = state.credit.rate() {
                        chooser.link_took(rate as u64, Duration::from_secs(1));
                    }
                }
            }
        }
        state = shared
            .changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
}
