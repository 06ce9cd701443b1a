//! For tests: a process that shares this one's memory.
#![allow(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A copy of this process that does nothing until it is killed, by dropping this. One at a time: a second one would share
/// with the first.
pub(crate) struct Forked {
    pid: libc::pid_t,
    _only: MutexGuard<'static, ()>,
}

impl Forked {
    pub(crate) fn new() -> Forked {
        static ONLY: Mutex<()> = Mutex::new(());
        let only = ONLY.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the child calls nothing but pause, which is safe after a fork of a process with threads.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            loop {
                // SAFETY: it takes no arguments and touches no memory.
                unsafe { libc::pause() };
            }
        }
        Forked { pid, _only: only }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        // SAFETY: the process is our child and not yet waited for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}
