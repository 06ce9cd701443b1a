//! A two-way stream for threads that block: std's `Read` and `Write` over QUIC.

use super::connection::Connection;
use quinn::{RecvStream, SendStream};
use std::io::{self, Read, Write};
use tokio::io::AsyncReadExt;

/// Both directions of a stream, for use on a thread that is not the transport's. Keeps the connection open.
pub struct BlockingStream {
    send: SendStream,
    receive: RecvStream,
    connection: Connection,
}

impl BlockingStream {
    /// The halves of a stream of `connection`.
    pub fn new(send: SendStream, receive: RecvStream, connection: Connection) -> BlockingStream {
        BlockingStream {
            send,
            receive,
            connection,
        }
    }
}

impl Read for BlockingStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = AsyncReadExt::read(&mut self.receive, buffer);
        let read = self.connection.runtime().block_on(read)?;
        self.connection.took(read);
        Ok(read)
    }
}

impl Write for BlockingStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let connection = &self.connection;
        let send = &mut self.send;
        connection.runtime().block_on(async {
            connection.acquire(bytes.len()).await;
            Ok(send.write(bytes).await?)
        })
    }

    /// QUIC sends what it has as soon as it may.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
