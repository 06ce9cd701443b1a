//! The source's connection to the target's agent, for a protocol that runs on threads.
//!
//! Everything async stays on the transport's own thread; what the target says arrives as signals among all others.

use super::handover::Window;
use crate::migration::PeerAddress;
use crate::transport::{
    BlockingStream, Connection, Connector, Control, ControlSender, IdentityError, PageQueue, Peer,
    TransportError, TransportThread, TwoWay,
};
use crate::wire::file_frame::FileHeader;
use crate::wire::message::Message;
use crate::wire::path::RelativePath;
use crate::wire::peer_error::PeerError;
use bytes::Bytes;
use std::fs;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;
use thiserror::Error;

/// Frames that wait between an encoding thread and its stream; each is at most about 1 MiB.
const QUEUED_FRAMES: usize = 4;

/// Why the target could not be talked to.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The name has no address.
    #[error("cannot find {host}: {source}")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's reason.
        source: io::Error,
    },
    /// This host has no identity to show.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The connection failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The transport's thread could not be started.
    #[error("cannot start the transport's thread: {0}")]
    Thread(#[source] io::Error),
    /// It took longer than the container may stand still, or the user wants to stop.
    #[error("the target did not take what was sent in time")]
    GivenUp,
    /// A file to send cannot be read.
    #[error("cannot send {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// A connection to a target's agent.
pub struct Link {
    control: ControlSender,
    connection: Connection,
    thread: TransportThread,
}

impl Link {
    /// Connects, and from then on sends what the target says to `heard`; the last thing is why it says no more.
    pub fn connect<E: Send + 'static>(
        target: &PeerAddress,
        connector: Connector,
        heard: Sender<E>,
        wrap: impl Fn(Result<Message, TransportError>) -> E + Send + 'static,
    ) -> Result<Link, LinkError> {
        let address = resolve(target)?;
        let thread = TransportThread::spawn("transport").map_err(LinkError::Thread)?;
        // The connection must be born on the runtime it will live on.
        let connecting = thread.run(async move { connector.connect(address).await });
        let joined = thread.handle().block_on(connecting);
        let (connection, control) = joined.unwrap_or(Err(TransportError::ClosedHere))?;
        let Control {
            sender,
            mut receiver,
        } = control;
        thread.run(async move {
            loop {
                let (said, is_last) = match receiver.receive().await {
                    Ok(Some(message)) => (Ok(message), false),
                    Ok(None) => (Err(TransportError::StreamEnded), true),
                    Err(error) => (Err(error), true),
                };
                if heard.send(wrap(said)).is_err() || is_last {
                    return;
                }
            }
        });
        Ok(Link {
            control: sender,
            connection,
            thread,
        })
    }

    /// Who the target is.
    pub fn peer(&self) -> &Peer {
        self.connection.peer()
    }

    /// The connection, for its figures.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// How long the target takes to answer, as the connection has it now.
    pub fn round_trip(&self) -> Duration {
        self.connection.stats().rtt
    }

    /// Says something to the target.
    pub fn say(&mut self, message: impl Into<Message>) -> Result<(), LinkError> {
        let said = self.control.send(message);
        Ok(self.thread.handle().block_on(said)?)
    }

    /// As [`say`](Link::say), as long as it may take.
    pub(super) fn say_within(
        &mut self,
        message: impl Into<Message>,
        window: &Window<'_>,
    ) -> Result<(), LinkError> {
        let said = self.control.send(message);
        let said = self.thread.handle().block_on(async {
            tokio::select! {
                said = said => Ok(said?),
                () = window.end() => Err(LinkError::GivenUp),
            }
        });
        self.broken_if_given_up(said)
    }

    /// Half of what was to be sent may be on its stream: the target must not take what follows for the rest.
    fn broken_if_given_up<T>(&self, sent: Result<T, LinkError>) -> Result<T, LinkError> {
        if matches!(sent, Err(LinkError::GivenUp)) {
            self.break_off();
        }
        sent
    }

    /// Ends the connection at once: whoever waits to send over it fails.
    pub(super) fn break_off(&self) {
        self.connection.close(PeerError::SourceAborted);
    }

    /// Opens the page streams.
    pub fn page_queues(&self, streams: u16) -> Result<Vec<PageQueue>, LinkError> {
        (0..streams)
            .map(|index| {
                let opened = self
                    .thread
                    .handle()
                    .block_on(self.connection.open_pages(index))?;
                Ok(opened.into_queue(QUEUED_FRAMES))
            })
            .collect()
    }

    /// Opens the stream on which the root filesystem is copied.
    pub fn rootfs_stream(&self) -> Result<BlockingStream, LinkError> {
        let opened = self
            .thread
            .handle()
            .block_on(self.connection.open_stream(TwoWay::Rootfs, 0));
        let (send, receive) = opened?;
        Ok(BlockingStream::new(send, receive, self.connection.clone()))
    }

    /// Sends files out of a directory, as long as it may take, and returns how many bytes they have.
    pub(super) fn send_files(
        &self,
        directory: &Path,
        names: &[RelativePath],
        window: &Window<'_>,
    ) -> Result<u64, LinkError> {
        let sent = self.thread.handle().block_on(async {
            tokio::select! {
                sent = self.send_all(directory, names) => sent,
                () = window.end() => Err(LinkError::GivenUp),
            }
        });
        self.broken_if_given_up(sent)
    }

    async fn send_all(&self, directory: &Path, names: &[RelativePath]) -> Result<u64, LinkError> {
        let mut stream = self.connection.open_files(0).await?;
        let mut total = 0;
        for name in names {
            let path = directory.join(name.as_str());
            let failed = |source| LinkError::File {
                path: path.clone(),
                source,
            };
            let size = fs::metadata(&path).map_err(failed)?.len();
            let header = FileHeader {
                name: name.clone(),
                size,
                mode: 0o600,
            };
            if size <= SMALL_FILE {
                let content = Bytes::from(fs::read(&path).map_err(failed)?);
                stream.send_bytes(&header, content).await?;
            } else {
                let opened = tokio::fs::File::open(&path).await.map_err(failed)?;
                stream.send(&header, opened).await?;
            }
            total += size;
        }
        stream.finish()?;
        Ok(total)
    }

    /// Ends the connection and gives the target a moment to hear it.
    pub fn close(self, why: PeerError) {
        self.thread
            .handle()
            .block_on(self.connection.close_and_wait(why));
    }
}

/// Files up to this size are read whole.
const SMALL_FILE: u64 = 1 << 20;

fn resolve(target: &PeerAddress) -> Result<SocketAddr, LinkError> {
    let failed = |source| LinkError::Resolve {
        host: target.host().to_string(),
        source,
    };
    let none = || failed(io::Error::new(io::ErrorKind::NotFound, "it has no address"));
    let mut addresses = (target.host(), target.port())
        .to_socket_addrs()
        .map_err(failed)?;
    addresses.next().ok_or_else(none)
}
