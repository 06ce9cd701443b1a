//! How many files this process may have open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;

/// Raises this process's soft limit of open files to its hard limit, and says what that is.
///
/// A move has a few descriptors open for every process of the container. The soft limit of old, 1024, is for programs that use
/// `select`, which none of ours does.
pub fn allow_most() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_limit() {
        let most = allow_most().expect("a process may use its own hard limit");
        let limits = getrlimit(Resource::RLIMIT_NOFILE).expect("limits");
        assert_eq!(limits, (most, most));
    }
}
