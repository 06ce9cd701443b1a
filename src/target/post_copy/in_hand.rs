//! What came last on a push stream, for the frames behind it that only name it.
//!
//! Enters: every frame of a push stream, in order. Leaves: its runs and payload, with the bytes put in of what it says to be
//! the same as another space's pages. Only the last frame with data counts, and only on its own stream: the pager may have
//! taken these pages out of the store already, so their bytes are kept here, and no source can make a stream keep more.

use super::PostCopyError;
use crate::memory::SpaceId;
use crate::target::page_store::{PageRun, RunContent};
use crate::wire::page_frame::{Frame, Run, Scratch, content_of};
use bytes::Bytes;

/// The last frame with data of a stream, and the working memory for reading the next.
pub(super) struct InHand {
    scratch: Scratch,
    space: SpaceId,
    runs: Vec<Run>,
    bytes: Bytes,
}

impl InHand {
    /// Nothing: the stream begins.
    pub fn new() -> InHand {
        InHand {
            scratch: Scratch::new(),
            space: SpaceId(0),
            runs: Vec::new(),
            bytes: Bytes::new(),
        }
    }

    /// What a frame brings, with the content of its pages; if it has data, that is in hand from now on.
    pub fn take(&mut self, frame: &Frame) -> Result<(Vec<PageRun>, Bytes), PostCopyError> {
        let raw = frame.raw_to_keep(&mut self.scratch)?;
        if !raw.is_empty() {
            self.space = frame.space();
            self.runs = frame.runs().to_vec();
            self.bytes = raw.clone();
        }
        let mut runs: Vec<PageRun> = frame.runs().iter().map(PageRun::from).collect();
        let mut named = Vec::new();
        for run in &mut runs {
            let RunContent::Same(origin) = run.content else {
                continue;
            };
            // Never so in a frame with data: what is in hand is then of its own space, which is no origin.
            let bytes = (origin == self.space)
                .then(|| content_of(&self.runs, &self.bytes, run.pages))
                .flatten();
            let bytes = bytes.ok_or(PostCopyError::NotInHand {
                space: frame.space(),
                origin,
                pages: run.pages,
            })?;
            named.extend_from_slice(bytes);
            run.content = RunContent::Data;
        }
        let payload = if named.is_empty() { raw } else { named.into() };
        Ok((runs, payload))
    }
}
