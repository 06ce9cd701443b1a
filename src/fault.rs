//! Failures on order, for the tests: the process dies or stops at a named step of a real migration.
//!
//! In goes the environment, out comes a signal to this very process; nothing is imitated. Without the feature
//! `fault-injection` both functions are empty. docs/faults.md lists the steps.
//!
//! ```text
//!  MIGRATE_FAULT=source:SendCommit:kill      die, as from SIGKILL, before the source does this action of its table
//!  MIGRATE_FAULT=target:ReleaseCopy:stop     stop, as from SIGSTOP, until somebody continues it; once
//!  MIGRATE_FAULT_HASTE=10                    patience with a lost peer is a tenth, but 5 s at least
//! ```

use std::time::Duration;

/// Fails here if that was ordered: before `step` of `end`.
#[cfg(feature = "fault-injection")]
pub fn before(end: &str, step: impl std::fmt::Debug) {
    use nix::sys::signal::{Signal, raise};
    use std::sync::atomic::{AtomicBool, Ordering};

    static DONE: AtomicBool = AtomicBool::new(false);
    let Ok(order) = std::env::var("MIGRATE_FAULT") else {
        return;
    };
    let signal = match order.strip_prefix(&format!("{end}:{step:?}:")) {
        Some("kill") => Signal::SIGKILL,
        Some("stop") => Signal::SIGSTOP,
        _ => return,
    };
    if !DONE.swap(true, Ordering::Relaxed) {
        eprintln!("migrate: fault injected: {order}");
        if let Err(errno) = raise(signal) {
            eprintln!("migrate: cannot raise {signal}: {errno}");
        }
    }
}

/// Fails nowhere: this build has no fault injection.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn before(_end: &str, _step: impl std::fmt::Debug) {}

/// How long a lost peer is waited for: as given, or less if a test is in a hurry.
#[cfg(feature = "fault-injection")]
pub fn patience(usual: Duration) -> Duration {
    /// A peer on a busy host may be silent for seconds and not be lost.
    const LEAST: Duration = Duration::from_secs(5);
    let haste = std::env::var("MIGRATE_FAULT_HASTE").ok();
    let haste = haste.and_then(|haste| haste.parse().ok()).unwrap_or(1u32);
    (usual / haste.max(1)).max(usual.min(LEAST))
}

/// How long a lost peer is waited for: as given.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn patience(usual: Duration) -> Duration {
    usual
}
