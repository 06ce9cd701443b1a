//! Which pages of other processes are those that were just pushed.
//!
//! Enters: pages that were pushed, with their content, and the same pages of another space that are left. Leaves: those of
//! them that both processes share, to be named in a frame of their own and not sent again.
//!
//! Two pages are one if they lie in the same frame. To be told so takes two looks at two page maps, and between them the
//! kernel may give a frame to another page: it moves pages of frozen processes, too. So the frame only says which pages are
//! worth reading; the bytes decide. What they are now they stay: all is frozen.

use super::ServeError;
use super::books::Batch;
use super::frame::{Content, bytes_of};
use crate::memory::{PageNumber, PageRange, PageSet};
use crate::wire::page_frame::content_of;
use std::collections::HashMap;
use std::sync::Arc;

/// Pages just pushed that other processes may share.
pub(super) struct Pushed<'a> {
    content: &'a Content,
    /// Of the pages that any other process shares.
    frames: HashMap<PageNumber, u64>,
}

impl<'a> Pushed<'a> {
    /// Looks which of these pages are shared. They are data pages of `content`.
    pub fn of(pages: &Batch, content: &'a Content) -> Result<Pushed<'a>, ServeError> {
        let frames = frames(pages)?.collect();
        Ok(Pushed { content, frames })
    }

    /// Whether it makes sense to look who shares them.
    pub fn is_shared(&self) -> bool {
        !self.frames.is_empty()
    }

    /// The pages of `other` that are these pages.
    pub fn shared_with(&self, other: &Batch) -> Result<Vec<PageRange>, ServeError> {
        let alike = frames(other)?.filter(|(page, frame)| self.frames.get(page) == Some(frame));
        let alike: PageSet = alike.map(|(page, _)| one(page)).collect();
        let alike = Batch {
            space: other.space,
            memory: Arc::clone(&other.memory),
            ranges: alike.iter().collect(),
        };
        Ok(self.same(&alike.ranges, &alike.read()?))
    }

    /// Those of `ranges` whose `bytes` are what was pushed.
    fn same(&self, ranges: &[PageRange], bytes: &[u8]) -> Vec<PageRange> {
        let Content {
            runs, bytes: sent, ..
        } = self.content;
        let pages = ranges.iter().flat_map(|range| range.chunks(1));
        let same = pages
            .zip(bytes.chunks(bytes_of(1)))
            .filter(|&(page, bytes)| content_of(runs, sent, page) == Some(bytes));
        let same: PageSet = same.map(|(page, _)| page).collect();
        same.iter().collect()
    }
}

/// The pages of a batch that another process shares, each with its frame.
fn frames(batch: &Batch) -> Result<impl Iterator<Item = (PageNumber, u64)>, ServeError> {
    let pages = batch.ranges.iter().flat_map(|range| range.chunks(1));
    let frames = pages.zip(batch.shared_frames()?);
    Ok(frames.filter_map(|(page, frame)| Some((page.start(), frame?))))
}

fn one(page: PageNumber) -> PageRange {
    PageRange::from_start_len(page, 1).expect("a page of a range is a range")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SpaceId;
    use crate::wire::page_frame::{Run, RunKind};
    use bytes::Bytes;

    #[test]
    fn a_frame_that_was_given_to_another_page_is_not_believed() {
        let page = |byte: u8| vec![byte; bytes_of(1)];
        let range = |first, pages| {
            PageRange::from_start_len(PageNumber(first), pages).expect("a test range is valid")
        };
        let run = |range, kind| Run { range, kind };
        let content = Content {
            space: SpaceId(1),
            runs: vec![
                run(range(10, 2), RunKind::Data),
                run(range(12, 1), RunKind::Zero),
                run(range(13, 2), RunKind::Data),
            ],
            bytes: Bytes::from([page(1), page(2), page(3), page(4)].concat()),
        };
        let pushed = Pushed {
            content: &content,
            frames: HashMap::new(),
        };
        // Their frames are equal, and of two of them not the bytes.
        let ranges = [range(10, 4), range(14, 1)];
        let read = [page(1), page(9), page(0), page(3), page(4)].concat();
        assert_eq!(pushed.same(&ranges, &read), [range(10, 1), range(13, 2)]);
    }
}
