//! File streams: files one after the other, streamed, verified at their end.

use super::connection::Connection;
use super::error::{TransportError, in_part};
use crate::wire::file_frame::{FileHash, FileHeader, HEADER_LEN, Header, TRAILER_LEN};
use bytes::{Bytes, BytesMut};
use quinn::{ReadExactError, RecvStream, SendStream};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// As much content as is read, sent or taken from the stream at once.
const PIECE: usize = 256 << 10;

/// Sends files on one stream.
pub struct FileSender {
    stream: SendStream,
    connection: Connection,
}

impl FileSender {
    pub(super) fn new(stream: SendStream, connection: Connection) -> FileSender {
        FileSender { stream, connection }
    }

    /// Sends a file whose content is in memory; `file.size` must be its length.
    pub async fn send_bytes(
        &mut self,
        file: &FileHeader,
        content: Bytes,
    ) -> Result<(), TransportError> {
        self.send(file, &content[..]).await
    }

    /// Sends a file of `file.size` bytes from `content`; more than that is left unread.
    ///
    /// After an error the stream cannot be used any more: half a file may be on it.
    pub async fn send(
        &mut self,
        file: &FileHeader,
        mut content: impl AsyncRead + Unpin,
    ) -> Result<(), TransportError> {
        let (head, mut hash) = file.encode()?;
        self.stream.write_chunk(head).await?;
        let mut left = file.size;
        while left > 0 {
            let piece = left.min(PIECE as u64) as usize;
            let mut bytes = BytesMut::zeroed(piece);
            content
                .read_exact(&mut bytes)
                .await
                .map_err(|source| match source.kind() {
                    io::ErrorKind::UnexpectedEof => TransportError::Shrunk {
                        name: file.name.clone(),
                    },
                    _ => TransportError::Content {
                        name: file.name.clone(),
                        source,
                    },
                })?;
            hash.update(&bytes);
            self.connection.acquire(piece).await;
            self.stream.write_chunk(bytes.freeze()).await?;
            left -= piece as u64;
        }
        self.stream.write_all(&hash.trailer()).await?;
        Ok(())
    }

    /// Says that no file follows. Fails if it was said before.
    pub fn finish(&mut self) -> Result<(), TransportError> {
        self.stream
            .finish()
            .map_err(|_| TransportError::StreamEnded)
    }
}

/// Receives files on one stream.
pub struct FileReceiver {
    stream: RecvStream,
    index: u16,
    /// Set while a file's content is outstanding: what follows is then not a header.
    inside: bool,
    connection: Connection,
}

impl FileReceiver {
    pub(super) fn new(stream: RecvStream, index: u16, connection: Connection) -> FileReceiver {
        FileReceiver {
            stream,
            index,
            inside: false,
            connection,
        }
    }

    /// The index the peer gave the stream.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The next file, or `None` when the peer said that no more follow. Its content must be taken before the next
    /// one is asked for.
    pub async fn receive(&mut self) -> Result<Option<IncomingFile<'_>>, TransportError> {
        if self.inside {
            return Err(TransportError::StreamEnded);
        }
        let mut header = [0; HEADER_LEN];
        match self.stream.read_exact(&mut header).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(error) => return Err(in_part("a file frame")(error)),
        }
        let header = Header::decode(&header)?;
        let mut name = vec![0; header.name_len()];
        self.stream
            .read_exact(&mut name)
            .await
            .map_err(in_part("a file frame"))?;
        let (header, hash) = header.with_name(&name)?;
        self.inside = true;
        Ok(Some(IncomingFile {
            header,
            hash,
            receiver: self,
        }))
    }
}

/// A file whose content is still to come.
pub struct IncomingFile<'a> {
    header: FileHeader,
    hash: FileHash,
    receiver: &'a mut FileReceiver,
}

impl IncomingFile<'_> {
    /// Its name, mode and size.
    pub fn header(&self) -> &FileHeader {
        &self.header
    }

    /// The content, verified. A file above `limit` bytes is refused before any of it is read.
    pub async fn into_bytes(self, limit: u64) -> Result<Vec<u8>, TransportError> {
        let mut content = Vec::new();
        self.copy_to(&mut content, limit).await?;
        Ok(content)
    }

    /// Writes the content to `to` and verifies it. A file above `limit` bytes is refused before any of it is read;
    /// after any other error, what was written is not to be used.
    pub async fn copy_to(
        mut self,
        to: &mut (impl AsyncWrite + Unpin),
        limit: u64,
    ) -> Result<(), TransportError> {
        let size = self.header.size;
        if size > limit {
            return Err(TransportError::FileTooLarge {
                name: self.header.name,
                size,
                limit,
            });
        }
        let (stream, connection) = (&mut self.receiver.stream, &self.receiver.connection);
        let mut left = size;
        while left > 0 {
            let most = left.min(PIECE as u64) as usize;
            let piece = stream
                .read_chunk(most, true)
                .await?
                .ok_or(TransportError::Truncated("a file's content"))?
                .bytes;
            connection.took(piece.len());
            self.hash.update(&piece);
            to.write_all(&piece)
                .await
                .map_err(|source| TransportError::Content {
                    name: self.header.name.clone(),
                    source,
                })?;
            left -= piece.len() as u64;
        }
        let mut trailer = [0; TRAILER_LEN];
        stream
            .read_exact(&mut trailer)
            .await
            .map_err(in_part("a file's hash"))?;
        self.hash.verify(trailer)?;
        to.flush().await.map_err(|source| TransportError::Content {
            name: self.header.name.clone(),
            source,
        })?;
        self.receiver.inside = false;
        Ok(())
    }
}
