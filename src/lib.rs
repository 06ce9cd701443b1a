//! Live migration of Linux containers: memory crosses in rounds over QUIC while the container works, then it freezes
//! for an instant, the last delta and CRIU's skeleton of it follow, and it goes on at the target.
//!
//! **The engine owns memory, CRIU owns everything else.**
//!
//! ```text
//!  source host                                              target host
//!  Migration::run                                           migrate agent
//!  ┌───────────────────────────────┐                        ┌───────────────────────────────┐
//!  │ survey    what moves, can it? │        QUIC,           │ preflight  can it come?       │
//!  │ rounds    scan→read→encode ───┼──── page frames ──────▶│ receive → page store (memfds) │
//!  │ files     beside the rounds ──┼──── rootfs stream ────▶│ rootfs                        │
//!  │ dump      CRIU waits at a gate│     mutual TLS         │ restore    CRIU waits, a FIFO │
//!  │ freeze    cgroup freezer      │                        │                               │
//!  │ delta     last dirty pages ───┼───────────────────────▶│                               │
//!  │ skeleton  dump without pages ─┼──── image files ──────▶│ compose    skeleton + store   │
//!  │ hold      post-dump hook      │◀─── prepared ──────────│ hold       post-restore hook  │
//!  │ handover  journal, decide ────┼──── commit ───────────▶│ release    journal, it runs   │
//!  │ destroy   the frozen copy     │◀─── committed ─────────│ pager      fills the rest     │
//!  │ (serve    owed pages first)   │◀─── faults, push ─────▶│ (owing     what is missing)   │
//!  └───────────────────────────────┘                        └───────────────────────────────┘
//! ```
//!
//! Where to read on:
//!
//! | room | what is in it |
//! |---|---|
//! | [`api`] | [`Migration`]: the engine as a library, with events and a report |
//! | [`source`] | the source's side: survey, rounds, dump, handover, settling after a crash |
//! | [`target`] | its mirror: arrivals, page store, composing, restore, pager |
//! | [`agent`] | the daemon at the target |
//! | [`migration`] | decisions only: convergence, the handoff tables, journal records, report, events |
//! | [`journal`] | the durable files behind those records |
//! | [`wire`] | what the hosts say to each other, as bytes, checked |
//! | [`transport`] | QUIC, identities and trust |
//! | [`runtime`] | runc: find a container, freeze it, dump and restore it |
//! | [`criu`] | the external tool: options, hooks, images, the kernel cache, lazy pages |
//! | [`kernel`] | userfaultfd, page maps, process memory, injection: the only unsafe code |
//! | [`memory`] | addresses, pages, ranges and sets of pages |
//! | [`check`], [`recover`], [`cli`] | what this host can do; ending what a crash left; the command line |
//!
//! Imports run one way: `source` and `target` use the rooms below them and never each other.

pub mod agent;
pub mod api;
mod chain;
pub mod check;
pub mod cli;
pub mod criu;
pub mod fault;
pub mod journal;
pub mod kernel;
pub mod memory;
pub mod migration;
pub mod recover;
pub mod runtime;
pub mod source;
pub mod target;
pub mod transport;
pub mod wire;

pub use api::{Canceller, Migration, MigrationError};
