//! Sending one regular file: a read of its data chunks, of which only those the target lacks travel.

use super::conversation::SourceError;
use super::known::Held;
use super::leases::Access;
use super::scan::Stamp;
use super::tree::{FoundFile, shown};
use super::{Pass, RootfsSource};
use crate::kernel::sparse_file::{Chunk, ChunkReader};
use crate::wire::rootfs::{
    CHUNK, ChunkDigest, ContentHash, Entry, Kind, Placement, ToTarget, TreePath,
};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

/// Where the content of the target's file comes from.
enum Base {
    /// Nothing: the file is made.
    Nothing,
    /// A file this source sent, under this name or another.
    Held(Held),
    /// A file left by an earlier attempt.
    LeftThere,
}

/// A file open for reading.
struct Opened {
    file: OwnedFd,
    /// Its position is not shared with a process of the container.
    is_ours: bool,
}

impl<S: Read + Write> Pass<'_, S> {
    /// Brings the file at `path` up to date; `at_target` are the chunks of a file left there by an earlier
    /// attempt.
    pub(super) fn send_regular(
        &mut self,
        path: &TreePath,
        scanned: &Stamp,
        at_target: Option<Vec<ChunkDigest>>,
    ) -> Result<(), SourceError> {
        if let Some(held) = self.source.known.held_as(scanned)
            && self.source.known.was_sent_this_pass(held)
        {
            return self.link(path, held);
        }
        if scanned.mount_point {
            return self.send_mounted_file(path, scanned);
        }
        let Some((found, stamp)) = self.source.tree.find_regular(path)? else {
            self.summary.skipped += 1;
            return Ok(());
        };
        if stamp.id != scanned.id {
            self.summary.skipped += 1;
            return Ok(());
        }
        let content = self.open(path, &found, &stamp)?;
        let known = &self.source.known;
        let (base, before) = if let Some(held) = known.held_as(&stamp) {
            (Base::Held(held), known.chunks_of(held).to_vec())
        } else if let Some(held) = known.orphan_at(path) {
            (Base::Held(held), known.chunks_of(held).to_vec())
        } else if let Some(chunks) = at_target {
            (Base::LeftThere, chunks)
        } else {
            (Base::Nothing, Vec::new())
        };
        if let Base::Held(held) = base {
            self.link(path, held)?;
        }
        let placement = if matches!(base, Base::Nothing) {
            Placement::New
        } else {
            Placement::Update
        };
        let Some(entry) = self.source.tree.entry(path, &stamp, placement)? else {
            self.summary.skipped += 1;
            return Ok(());
        };
        // Of a file whose stamp is the one already sent, only the content may differ, if anything does.
        let same_stamp = matches!(base, Base::Held(held)
            if *self.source.known.stamp_of(held) == stamp && !self.source.known.is_racy(held));
        let chunks = self.send_content(&content, entry, !same_stamp, &before)?;

        let held = match base {
            Base::Held(held) => held,
            Base::Nothing | Base::LeftThere => {
                self.touch_parent(path);
                self.source.known.set_new_file(path, stamp, false)
            }
        };
        let (racy, compare) = (self.is_racy(&stamp), self.may_be_written(&stamp));
        self.source
            .known
            .set_content(held, stamp, racy, compare, chunks);
        Ok(())
    }

    /// Opens a file without a sign to those who have it open.
    fn open(
        &mut self,
        path: &TreePath,
        found: &FoundFile,
        stamp: &Stamp,
    ) -> Result<Opened, SourceError> {
        let RootfsSource { leases, tasks, .. } = &mut *self.source;
        match leases.access(stamp.id, tasks) {
            Ok(Access::Free) => match found.open() {
                Ok(file) => Ok(Opened {
                    file,
                    is_ours: true,
                }),
                Err(errno) => Err(SourceError::tree("opening", path.as_bytes(), errno)),
            },
            Ok(Access::Through(file)) => Ok(Opened {
                file,
                is_ours: false,
            }),
            Ok(Access::Unreadable) => Err(SourceError::Leased(shown(path.as_bytes()))),
            Err(error) => Err(SourceError::Leases(error)),
        }
    }

    /// A file that is mounted over: the place alone, an empty file.
    fn send_mounted_file(&mut self, path: &TreePath, stamp: &Stamp) -> Result<(), SourceError> {
        let Some(entry) = self.source.tree.entry(path, stamp, Placement::New)? else {
            self.summary.skipped += 1;
            return Ok(());
        };
        self.say_put(entry)?;
        self.target
            .say(&ToTarget::FileEnd(ContentHash::new().finish()))?;
        self.touch_parent(path);
        let racy = self.is_racy(stamp);
        self.source.known.set_new_file(path, *stamp, racy);
        Ok(())
    }

    /// Sends `entry` with the chunks that differ from `before`, or nothing if none do and the entry itself
    /// need not be sent. Returns what the target holds then.
    fn send_content(
        &mut self,
        file: &Opened,
        entry: Entry,
        entry_differs: bool,
        before: &[ChunkDigest],
    ) -> Result<Vec<ChunkDigest>, SourceError> {
        let size = match entry.kind {
            Kind::Regular { size, .. } => size,
            _ => 0,
        };
        let mut buffer = std::mem::take(&mut self.source.buffer);
        let sent = self.send_chunks(file, entry, entry_differs, before, size, &mut buffer);
        self.source.buffer = buffer;
        sent
    }

    fn send_chunks(
        &mut self,
        file: &Opened,
        entry: Entry,
        entry_differs: bool,
        before: &[ChunkDigest],
        size: u64,
        buffer: &mut [u8],
    ) -> Result<Vec<ChunkDigest>, SourceError> {
        let path = entry.path.clone();
        let mut reader = match file.is_ours {
            true => ChunkReader::new(file.file.as_fd(), size),
            false => ChunkReader::without_seeking(file.file.as_fd(), size),
        };
        let mut content = Content {
            pass: self,
            entry: Some(entry),
            hash: ContentHash::new(),
        };
        if entry_differs {
            content.open()?;
        }
        let mut before = before.iter().copied().peekable();
        let mut now = Vec::new();
        loop {
            let chunk = reader
                .next(buffer)
                .map_err(|errno| SourceError::tree("reading", path.as_bytes(), errno))?;
            let number = chunk.as_ref().map_or(u64::MAX, |chunk| chunk.number);
            // What was data and is none any more. Neighbouring chunks make one hole.
            let mut hole: Option<(u64, u64)> = None;
            while let Some(old) = before.next_if(|old| old.chunk < number) {
                match &mut hole {
                    Some((_, end)) if *end == old.chunk => *end += 1,
                    _ => {
                        content.hole_chunks(hole, size)?;
                        hole = Some((old.chunk, old.chunk + 1));
                    }
                }
            }
            content.hole_chunks(hole, size)?;
            let Some(chunk) = chunk else { break };
            let old = before.next_if(|old| old.chunk == number);
            let digest = ChunkDigest::of(content.pass.source.seed, number, &chunk.extents);
            if old != Some(digest) {
                content.send_chunk(&chunk, old.is_some())?;
            }
            now.push(digest);
            content.pass.summary.read_bytes += chunk
                .extents
                .iter()
                .map(|(_, b)| b.len() as u64)
                .sum::<u64>();
        }
        content.close()?;
        Ok(now)
    }
}

/// The content frames of one file, opened by its `Put` when the first of them is due.
struct Content<'c, 'p, S> {
    pass: &'c mut Pass<'p, S>,
    /// Not yet sent.
    entry: Option<Entry>,
    hash: ContentHash,
}

impl<S: Read + Write> Content<'_, '_, S> {
    fn open(&mut self) -> Result<(), SourceError> {
        match self.entry.take() {
            Some(entry) => self.pass.say_put(entry),
            None => Ok(()),
        }
    }

    /// Sends the data of a chunk and, if it held other data before, the holes between.
    fn send_chunk(&mut self, chunk: &Chunk<'_>, over_data: bool) -> Result<(), SourceError> {
        self.open()?;
        let start = chunk.number * CHUNK as u64;
        let mut reached = 0;
        for (offset, bytes) in &chunk.extents {
            if over_data && *offset > reached {
                self.hole(start + reached as u64, (offset - reached) as u64)?;
            }
            let at = start + *offset as u64;
            self.hash.data(at, bytes);
            self.pass.summary.data_bytes += bytes.len() as u64;
            self.pass
                .target
                .say(&ToTarget::Data { offset: at, bytes })?;
            reached = offset + bytes.len();
        }
        if over_data && chunk.len > reached {
            self.hole(start + reached as u64, (chunk.len - reached) as u64)?;
        }
        Ok(())
    }

    /// Sends a hole over whole chunks `start..end`, as far as they lie in a file of `size` bytes.
    fn hole_chunks(&mut self, chunks: Option<(u64, u64)>, size: u64) -> Result<(), SourceError> {
        let Some((start, end)) = chunks else {
            return Ok(());
        };
        let start = start.saturating_mul(CHUNK as u64);
        let end = end.saturating_mul(CHUNK as u64).min(size);
        if start >= end {
            // Cut off by the new size already.
            return Ok(());
        }
        self.open()?;
        self.hole(start, end - start)
    }

    fn hole(&mut self, offset: u64, len: u64) -> Result<(), SourceError> {
        self.hash.hole(offset, len);
        self.pass.target.say(&ToTarget::Hole { offset, len })
    }

    fn close(self) -> Result<(), SourceError> {
        match self.entry {
            // Nothing differed.
            Some(_) => Ok(()),
            None => self.pass.target.say(&ToTarget::FileEnd(self.hash.finish())),
        }
    }
}
