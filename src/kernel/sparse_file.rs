//! Reading a file by chunks of its data, holes left out (`SEEK_DATA` and `SEEK_HOLE`, lseek(2)).

use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// One chunk as it was read.
#[derive(Debug)]
pub struct Chunk<'a> {
    /// Its number: its first byte divided by the length of a chunk.
    pub number: u64,
    /// Bytes of the file it spans, holes included.
    pub len: usize,
    /// Its data: offset in the chunk, bytes. Ascending, disjoint, at least one.
    pub extents: Vec<(usize, &'a [u8])>,
}

/// Reads the chunks of a file that hold data, in ascending order, skipping holes by `SEEK_DATA` and
/// `SEEK_HOLE` (lseek(2)).
///
/// The file may change meanwhile: what has gone beyond its end reads as zeros, so that a reader always
/// gets a chunk of the length it was promised.
pub struct ChunkReader<'f> {
    file: BorrowedFd<'f>,
    seeks: bool,
    size: u64,
    position: u64,
    /// The extent of data around or after `position`, remembered so that a dense file costs two seeks and
    /// so that the chunk it was found for has data even if it is punched out meanwhile.
    extent: (u64, u64),
}

impl<'f> ChunkReader<'f> {
    /// Reads the first `size` bytes of `file`.
    pub fn new(file: BorrowedFd<'f>, size: u64) -> Self {
        ChunkReader {
            file,
            seeks: true,
            size,
            position: 0,
            extent: (0, 0),
        }
    }

    /// The same for a descriptor whose position belongs to somebody else, and seeking would move it: what is all zeros
    /// counts as holes.
    pub fn without_seeking(file: BorrowedFd<'f>, size: u64) -> Self {
        ChunkReader {
            seeks: false,
            extent: (0, size),
            ..ChunkReader::new(file, size)
        }
    }

    /// The next chunk with data in it. `buffer`, never empty, has the length of a chunk and holds its bytes.
    pub fn next<'b>(&mut self, buffer: &'b mut [u8]) -> Result<Option<Chunk<'b>>, Errno> {
        let chunk_len = buffer.len() as u64;
        let (chunk, start, end, spans) = loop {
            let Some((data, _)) = self.data_from(self.position)? else {
                return Ok(None);
            };
            let chunk = data / chunk_len;
            let start = chunk * chunk_len;
            let end = self.size.min(start + chunk_len);
            let spans = self.read_chunk(buffer, start, end)?;
            if !spans.is_empty() {
                break (chunk, start, end, spans);
            }
        };
        let buffer: &'b [u8] = buffer;
        let extents = spans.into_iter().map(|s| (s.start, &buffer[s])).collect();
        Ok(Some(Chunk {
            number: chunk,
            len: (end - start) as usize,
            extents,
        }))
    }

    /// Reads what lies in `start..end` to the beginning of `buffer`; says where there is data.
    fn read_chunk(
        &mut self,
        buffer: &mut [u8],
        start: u64,
        end: u64,
    ) -> Result<Vec<Range<usize>>, Errno> {
        let mut spans = Vec::new();
        self.position = start;
        while self.position < end {
            let Some((data, hole)) = self.data_from(self.position)? else {
                break;
            };
            if data >= end {
                break;
            }
            let (from, to) = ((data - start) as usize, (hole.min(end) - start) as usize);
            read_or_zero(self.file, &mut buffer[from..to], data)?;
            if self.seeks {
                spans.push(from..to);
            } else {
                spans.extend(not_zero(buffer, from..to));
            }
            self.position = start + to as u64;
        }
        self.position = end;
        Ok(spans)
    }

    /// The first extent of data that ends after `position`, cut to start there; `None` if only hole follows.
    fn data_from(&mut self, position: u64) -> Result<Option<(u64, u64)>, Errno> {
        if position >= self.size {
            return Ok(None);
        }
        if position >= self.extent.1 {
            let data = match seek(self.file, SeekFrom::Data(position)) {
                Ok(data) if data < self.size => data,
                Ok(_) | Err(Errno::NXIO) => return Ok(None),
                Err(errno) => return Err(errno),
            };
            let hole = match seek(self.file, SeekFrom::Hole(data)) {
                // A file cut short between the two seeks: its promised length is read as zeros.
                Ok(hole) if hole <= data => self.size,
                Err(Errno::NXIO) => self.size,
                Ok(hole) => hole.min(self.size),
                Err(errno) => return Err(errno),
            };
            self.extent = (data, hole);
        }
        Ok(Some((self.extent.0.max(position), self.extent.1)))
    }
}

/// The runs of blocks in `range` of `buffer` that are not all zeros.
fn not_zero(buffer: &[u8], range: Range<usize>) -> Vec<Range<usize>> {
    const BLOCK: usize = 4096;
    let mut runs: Vec<Range<usize>> = Vec::new();
    for start in range.clone().step_by(BLOCK) {
        let block = start..range.end.min(start + BLOCK);
        if buffer[block.clone()].iter().all(|byte| *byte == 0) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == block.start => run.end = block.end,
            _ => runs.push(block),
        }
    }
    runs
}

fn read_or_zero(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match pread(file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => {
                buffer[done..].fill(0);
                return Ok(());
            }
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    const CHUNK: usize = 256 << 10;

    #[test]
    fn without_seeking_the_position_stays_and_zeros_are_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * CHUNK as u64).unwrap();
        rustix::io::pwrite(&file, &[7; 5000], 2 * CHUNK as u64 + 4096).unwrap();
        seek(&file, SeekFrom::Start(77)).unwrap();
        let mut buffer = vec![1; CHUNK];
        let mut reader = ChunkReader::without_seeking(file.as_fd(), 3 * CHUNK as u64);
        let chunk = reader.next(&mut buffer).unwrap().unwrap();
        assert_eq!((chunk.number, chunk.extents.len()), (2, 1));
        let (offset, bytes) = chunk.extents[0];
        assert_eq!(
            (offset, bytes.len(), &bytes[..5000]),
            (4096, 8192, &[7; 5000][..])
        );
        assert!(reader.next(&mut buffer).unwrap().is_none());
        assert_eq!(seek(&file, SeekFrom::Current(0)).unwrap(), 77);
    }

    #[test]
    fn a_file_cut_short_while_it_is_read_reads_as_zeros() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &vec![7; 3 * CHUNK]).unwrap();
        let mut buffer = vec![1; CHUNK];
        let mut reader = ChunkReader::new(file.as_fd(), 3 * CHUNK as u64);
        let full = reader.next(&mut buffer).unwrap().unwrap();
        assert_eq!(
            (full.number, full.extents.len(), full.extents[0].1),
            (0, 1, &vec![7; CHUNK][..])
        );
        file.set_len(CHUNK as u64 + 5).unwrap();
        let cut = reader.next(&mut buffer).unwrap().unwrap();
        assert_eq!(cut.extents[0].1[..5], [7; 5]);
        assert_eq!(cut.extents[0].1[5..], vec![0; CHUNK - 5]);
        let gone = reader.next(&mut buffer).unwrap().unwrap();
        assert_eq!((gone.number, gone.extents[0].1), (2, &vec![0; CHUNK][..]));
        assert!(reader.next(&mut buffer).unwrap().is_none());
        // Looked at anew, only what is there counts.
        let mut reader = ChunkReader::new(file.as_fd(), 3 * CHUNK as u64);
        reader.next(&mut buffer).unwrap().unwrap();
        reader.next(&mut buffer).unwrap().unwrap();
        assert!(reader.next(&mut buffer).unwrap().is_none());
    }
}
