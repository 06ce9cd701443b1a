//! Container runtimes: find a container, freeze it, slow it, adopt it.

pub mod cgroup;
pub mod cpu_quota;
mod freezer;
pub mod home;
pub mod runc;
pub mod stopped;
mod task;

pub use freezer::{FreezeError, Freezer, FreezerState, Frozen};
pub use task::{Task, tasks_of_cgroup};
