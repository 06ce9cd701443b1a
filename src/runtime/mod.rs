//! Container runtimes: find a container, freeze it, slow it, adopt it.

pub mod apart;
pub mod cgroup;
pub mod cpu_quota;
mod freezer;
pub mod home;
pub mod instance;
pub mod lock;
pub mod runc;
pub mod stopped;
mod task;
mod visitors;

pub use freezer::{FreezeError, Freezer, FreezerState, Frozen, Pinned, is_gone};
pub use instance::Instance;
pub use task::{Task, pids_of_cgroup, tasks_of_cgroup, threads_of_cgroup};
pub use visitors::{name_of, visitors};
