//! CRIU, the external tool: everything about a process except its memory.
//!
//! ```text
//!  binary       which criu runs here, its version, where it lies
//!  environment  the private mount namespace in which a runtime runs it: our options, our kernel cache
//!  options      the configuration file that reaches CRIU under any runtime
//!  hook         CRIU's action script: the place where a dump or a restore waits for the engine
//!  images       the few image files the engine reads and writes (inventory, pagemap, mm)
//!  skeleton     the synthetic parent that makes CRIU dump everything but memory
//!  kernel_cache the feature cache that lets the skeleton work where the kernel lacks soft-dirty
//!  lazy_pages   the socket on which CRIU hands over userfaultfds at a restore
//! ```

pub mod annotation;
pub mod binary;
pub mod environment;
pub mod hook;
pub mod images;
pub mod kernel_cache;
pub mod lazy_pages;
pub mod options;
pub mod skeleton;
