//! One fault stream: hears what the target wants and has, and answers.

use super::books::Breach;
use super::frame::Content;
use super::{ServeError, Shared};
use crate::transport::{Connection, PageSender, RequestReceiver};
use crate::wire::codec::{Codec, Compression};
use crate::wire::page_frame::FrameEncoder;
use crate::wire::page_request::PageRequest;
use std::time::Instant;

/// Only this stream carries what is said once for all of them: what is missing, what was received, the end.
const FIRST_STREAM: u16 = 0;

/// Below this many bytes per second, compressing an answer takes less time than it saves.
const SLOW_LINK: f64 = 200e6;

/// Answers until the target says that all has come, on this stream or another.
pub(super) async fn answer(
    (pages, requests): &mut (PageSender, RequestReceiver),
    shared: &Shared,
    connection: &Connection,
) -> Result<(), ServeError> {
    let mut encoder = FrameEncoder::new();
    while let Some(request) = requests.receive().await? {
        if let PageRequest::Want {
            space,
            pages: wanted,
        } = request
        {
            let start = Instant::now();
            let (batch, rate) = {
                let mut state = shared.lock();
                let batch = state.books.answer(space, wanted)?;
                shared.count_left(&state);
                (batch, state.credit.rate())
            };
            let codec = codec(shared.compression, rate);
            let frame = Content::read(&batch)?.encode(&mut encoder, codec)?;
            let bytes = frame.wire_len() as u64;
            pages.send(frame).await?;
            let progress = &shared.progress;
            progress.answered(batch.pages(), bytes, start.elapsed());
            continue;
        }
        if pages.index() != FIRST_STREAM {
            return Err(Breach::OutOfPlace("what belongs on the first stream").into());
        }
        let mut state = shared.lock();
        match request {
            PageRequest::Want { .. } => unreachable!("answered above"),
            PageRequest::Received { bytes } => {
                let rtt = connection.stats().rtt;
                state.credit.received(bytes, rtt, Instant::now())?;
            }
            PageRequest::Missing { space, pages } => state.books.missing(space, pages)?,
            PageRequest::MissingEnd => {
                state.books.end_list()?;
                shared.count_left(&state);
            }
            PageRequest::Complete => {
                state.books.complete()?;
                drop(state);
                shared.end(Ok(()));
                return Ok(());
            }
        }
        shared.changed.notify_all();
    }
    // It has a reason to end streams only after it has said that all has come.
    if matches!(shared.lock().end, Some(Ok(()))) {
        Ok(())
    } else {
        Err(Breach::OutOfPlace("the end of a fault stream").into())
    }
}

/// How answers are encoded: they are small, so only a slow link is worth it.
fn codec(compression: Compression, rate: Option<f64>) -> Codec {
    match compression {
        Compression::Always(codec) => codec,
        Compression::Auto if rate.is_some_and(|rate| rate < SLOW_LINK) => Codec::Lz4,
        Compression::Auto => Codec::None,
    }
}
