//! Whole trees through the real protocol, both ends in this process over a socket pair. Needs root: owners,
//! device nodes, `trusted.*` attributes and mounts are made.

#[path = "rootfs/attacks.rs"]
mod attacks;
#[path = "rootfs/changes.rs"]
mod changes;
#[path = "rootfs/harness.rs"]
mod harness;
#[path = "rootfs/holder.rs"]
mod holder;
#[path = "rootfs/kinds.rs"]
mod kinds;
#[path = "rootfs/leases.rs"]
mod leases;
#[path = "rootfs/random.rs"]
mod random;
#[path = "rootfs/stores.rs"]
mod stores;
