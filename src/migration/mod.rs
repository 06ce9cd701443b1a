//! The decisions of a migration, and nothing else: when to freeze, who may run, what is told.
//!
//! In come measurements, events and times as plain values; out come decisions, actions to take and
//! records to write. Nothing here does I/O or reads a clock, so both ends of a migration run inside one
//! test and can be killed after every step ([`handoff`]).
//!
//! ```text
//!  scans        ──▶ ledger      ──▶ what a round sends, what waits
//!  measurements ──▶ convergence ──▶ decision ──▶ another round | freeze, why, and what is owed   (as mode allows)
//!  events       ──▶ handoff     ──▶ next state + actions      (source table, target table)
//!  records      ──▶ journal     ──▶ the state to recover into (the file itself: crate::journal)
//!  marks        ──▶ phase       ──▶ downtime and its parts ──▶ report
//!  all of it    ──▶ event       ──▶ --json, the progress display, the library's stream
//! ```

pub mod convergence;
pub mod decision;
pub mod event;
pub mod handoff;
pub mod journal;
pub mod ledger;
pub mod mode;
pub mod phase;
pub mod report;

mod id;
mod millis;

pub use id::{
    ContainerId, ContainerIdError, JournalId, MigrationId, ParseIdError, PeerAddress,
    PeerAddressError,
};
