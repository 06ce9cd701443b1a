//! Which trackers a test runs with: all that the running kernel offers, or the test fails.
//!
//! - `MIGRATE_TEST_TRACKERS=uffd-wp,soft-dirty`: exactly these must be offered. A job on a known kernel sets it, so that
//!   it cannot test less than it says.
//! - `MIGRATE_TEST_SLOWNESS=20`: how many times slower than real hardware this machine is. It stretches what tests wait
//!   for and how long they let things happen, never what they expect.

use migrate::source::tracker::{Tracker, TrackerKind, open};
use std::sync::OnceLock;
use std::time::Duration;

const EXPECTED: &str = "MIGRATE_TEST_TRACKERS";
const SLOWNESS: &str = "MIGRATE_TEST_SLOWNESS";

/// The trackers of this kernel, at least one.
pub fn offered() -> &'static [TrackerKind] {
    static OFFERED: OnceLock<Vec<TrackerKind>> = OnceLock::new();
    OFFERED.get_or_init(|| {
        let mut offered = Vec::new();
        for kind in [TrackerKind::UffdWp, TrackerKind::SoftDirty] {
            match open(kind) {
                Ok(_) => offered.push(kind),
                Err(error) => println!(
                    "not offered: {error}: {:?}",
                    std::error::Error::source(&error)
                ),
            }
        }
        assert!(
            !offered.is_empty(),
            "this kernel offers no tracker (or this is not root)"
        );
        if let Some(expected) = expected() {
            let mut names: Vec<String> = offered.iter().map(TrackerKind::to_string).collect();
            names.sort();
            assert_eq!(
                names, expected,
                "offered by this kernel, and expected by {EXPECTED}"
            );
        }
        offered
    })
}

/// Runs `test` with each tracker of this kernel, telling which.
pub fn with_each(mut test: impl FnMut(TrackerKind)) {
    for &kind in offered() {
        println!("with {kind}:");
        test(kind);
    }
}

/// A tracker that has been found to be offered.
pub fn opened(kind: TrackerKind) -> Box<dyn Tracker> {
    open(kind).unwrap_or_else(|error| panic!("{kind} was offered before: {error}"))
}

/// Whether a test of what only uffd-wp does, making a userfaultfd in another process, applies to this kernel. It is left
/// out, and says so, only where `MIGRATE_TEST_TRACKERS` names the trackers of the kernel and uffd-wp is not among them.
pub fn injects(test: &str) -> bool {
    if offered().contains(&TrackerKind::UffdWp) {
        return true;
    }
    assert!(
        expected().is_some(),
        "{test} needs userfaultfd WP_ASYNC (kernel 6.7); {EXPECTED} may say that this kernel has none"
    );
    println!(
        "LEFT OUT: {test}: by {EXPECTED} this kernel has no uffd-wp, and nothing is made in other processes"
    );
    false
}

/// `time` on real hardware, on this machine.
pub fn stretched(time: Duration) -> Duration {
    time * slowness()
}

/// How many times slower than real hardware this machine is.
pub fn slowness() -> u32 {
    match std::env::var(SLOWNESS) {
        Ok(times) => times
            .parse()
            .ok()
            .filter(|&times| times > 0)
            .unwrap_or_else(|| panic!("{SLOWNESS}={times:?} is not a whole number from 1 up")),
        Err(_) => 1,
    }
}

/// The trackers that must be offered, sorted.
fn expected() -> Option<Vec<String>> {
    let names = std::env::var(EXPECTED).ok()?;
    let mut names: Vec<String> = names
        .split(',')
        .map(|name| name.trim().to_owned())
        .collect();
    names.sort();
    Some(names)
}
