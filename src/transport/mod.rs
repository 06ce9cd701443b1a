//! QUIC between two hosts that know each other.
//!
//! In: what the roles want to send, as `wire` types. Out: what the peer sent, decoded and within bounds, or a typed
//! [`TransportError`]. Nothing here knows what a migration is.
//!
//! ```text
//!  Identity, TrustStore ──▶ Connector::connect ┐                     ┌ Listener::accept ◀── Identity, TrustStore
//!                                              ├─ (Connection, Control) ─┤
//!    mutual TLS, then the hello on the first stream: version offered and selected
//!
//!  Connection ──▶ open_pages(i)  ── PageSender ─────────▶ PageReceiver ── accept_pages() ◀── Connection
//!             ──▶ open_files(i)  ── FileSender ─────────▶ FileReceiver ── accept_files()
//!             ──▶ open_faults(i) ── PageSender, RequestReceiver  ◀─▶  RequestSender, PageReceiver ── accept_faults()
//!             ──▶ open_stream(k, i) ◀── both ways ──▶ accept_stream(k)
//! ```
//!
//! Everything async runs on one [`TransportThread`] per connection; page reading and placing happen on other threads
//! and meet it through [`PageQueue`] and [`PageInbox`], which block when the other side cannot keep up.

mod blocking;
mod connection;
mod control;
mod door;
mod endpoint;
mod error;
mod files;
mod fingerprint;
mod identity;
mod link;
mod pages;
mod rate;
mod requests;
mod socket;
mod thread;
mod tls;
mod trust;

pub use blocking::BlockingStream;
pub use connection::{Connection, Peer, TwoWay, WireStats};
pub use control::{Control, ControlReceiver, ControlSender};
pub use endpoint::{Arrival, Connector, Listener, Settings};
pub use error::TransportError;
pub use files::{FileReceiver, FileSender, IncomingFile};
pub use fingerprint::{Fingerprint, FingerprintError};
pub use identity::{Identity, IdentityError};
pub use link::LinkSample;
pub use pages::{PageInbox, PageQueue, PageReceiver, PageSender};
pub use quinn::{RecvStream, SendStream};
pub use requests::{RequestReceiver, RequestSender};
pub use thread::TransportThread;
pub use trust::{PeerName, TrustError, TrustStore, Trusted, TrustedPeer};
