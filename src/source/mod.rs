//! The source's side of a migration.
//!
//! ```text
//!  plan ─▶ run ─┬▶ preflight      what moves, may it?
//!               ├▶ link           the connection to the target
//!               ├▶ rounds         tracker finds dirty pages, send sends them, rootfs_copy the files beside
//!               ├▶ handover       the handoff table: dump, residue, commit
//!               └▶ guard          a process that ends the migration if this one dies
//!               ├▶ serve          post-copy: owed pages to the target, faults first
//!  settle ─────▶ remains          the end after a crash, and the end of every migration
//! ```

pub mod dump;
pub mod dump_processes;
pub mod going_on;
pub mod guard;
pub mod handover;
pub mod link;
pub mod plan;
pub mod preflight;
pub mod remains;
pub mod residue;
pub mod resume;
pub mod rootfs;
pub mod rootfs_copy;
pub mod rounds;
pub mod run;
pub mod send;
pub mod serve;
pub mod settle;
pub mod slowing;
pub mod tracker;
