//! The push: everything that nobody asked for yet, as fast as it does not get in a fault's way.

use super::books::Batch;
use super::{ServeError, Shared, frame};
use crate::transport::PageSender;
use crate::wire::codec::CodecChooser;
use crate::wire::page_frame::FrameEncoder;
use std::sync::PoisonError;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Pushes until the end, on the calling thread.
pub(super) fn push(
    pages: &mut PageSender,
    shared: &Shared,
    runtime: &Handle,
) -> Result<(), ServeError> {
    let mut over = shared.over.subscribe();
    let mut encoder = FrameEncoder::new();
    let mut chooser = CodecChooser::new(shared.compression);
    loop {
        let batch = match next(shared, &mut chooser) {
            Next::Batch(batch) => batch,
            Next::End(end) => return end,
        };
        let codec = chooser.choose();
        let start = Instant::now();
        let (frame, raw) = frame::of_batch(&batch, &mut encoder, codec)?;
        let count: u64 = batch.ranges.iter().map(|range| range.pages()).sum();
        let bytes = frame.wire_len() as u64;
        chooser.encoded(codec, raw, frame.payload.len(), start.elapsed());
        shared.lock().credit.sending(bytes, Instant::now());
        runtime.block_on(async {
            tokio::select! {
                biased;
                sent = pages.send(frame) => Ok(sent?),
                // What ended the service is told in the next turn.
                _ = over.wait_for(|&over| over) => Ok::<(), ServeError>(()),
            }
        })?;
        shared.progress.pushed(count, bytes);
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
