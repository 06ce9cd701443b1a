//! Migrations that fail, at every step, with real runc and real CRIU. The container works at one host with every byte right,
//! never at two, and in the end never at none; nothing else is left; the next try succeeds.
//!
//! Faults come from [`migrate::fault`] and from outside. Needs root, runc and CRIU (`scripts/setup`); fails without them.

mod at_commit;
mod before_commit;
mod frozen;
mod post_copy;
mod refusal;
mod slowed;
mod stage;
