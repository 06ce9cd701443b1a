//! The target's side of a migration.
//!
//! ```text
//!  agent ─▶ preflight ─▶ arrival ─┬▶ receive      pages into page_store, image files into a directory
//!                                 ├▶ rootfs       the root filesystem
//!                                 ├▶ restore      the runtime, started before there is anything to restore
//!                                 ├▶ compose      skeleton + page store → images
//!                                 ├▶ post_copy    owed pages, after the container is let go
//!                                 ├▶ pager        fills the restored memory, a process of its own
//!                                 ├▶ owing        post-copy: what the copy lacks, taken in by post_copy, on record in arrivals
//!                                 └▶ stdio        what the container's pipes lead to here
//!  settle ─▶ remains              the end after a crash, and of every copy that must go
//! ```

pub mod arrival;
pub mod arrivals;
pub mod compose;
mod owing;
pub mod page_store;
pub mod pager;
pub mod post_copy;
pub mod preflight;
mod processor;
pub mod receive;
pub mod remains;
pub mod restore;
pub mod rootfs;
pub mod settle;
pub mod shared;
mod stall;
pub mod stdio;
