//! Which tasks share one memory, or one table of descriptors: `kcmp(2)`.
#![allow(unsafe_code)]

use nix::errno::Errno;
use std::cmp::Ordering;

/// `linux/kcmp.h`: compare the memory of two tasks.
const KCMP_VM: libc::c_int = 1;
/// The same for their tables of descriptors.
const KCMP_FILES: libc::c_int = 2;

/// Why two processes could not be compared.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum CompareError {
    /// One of them has exited.
    #[error("process {a} or {b} has exited")]
    Exited {
        /// The first process.
        a: i32,
        /// The second.
        b: i32,
    },
    /// The kernel refused (`ENOSYS`: it is built without `CONFIG_KCMP`).
    #[error("kcmp of the memory of processes {a} and {b}: {errno}")]
    Refused {
        /// The first process.
        a: i32,
        /// The second.
        b: i32,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// Compares the address spaces of two tasks. `Equal` means that they are one.
///
/// The order is the kernel's own: total, meaningless, and the same until one of the two execs or exits, so a list of
/// processes can be searched in it.
pub fn compare(a: i32, b: i32) -> Result<Ordering, CompareError> {
    // SAFETY: kcmp takes five integers and touches no memory of ours.
    let answer = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0usize, 0usize) };
    match Errno::result(answer) {
        Ok(0) => Ok(Ordering::Equal),
        Ok(1) => Ok(Ordering::Less),
        Ok(_) => Ok(Ordering::Greater),
        Err(Errno::ESRCH) => Err(CompareError::Exited { a, b }),
        Err(errno) => Err(CompareError::Refused { a, b, errno }),
    }
}

/// Whether two tasks are known to have one table of descriptors.
pub fn shares_files(a: i32, b: i32) -> bool {
    // SAFETY: kcmp takes five integers and touches no memory of ours.
    let answer = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_FILES, 0usize, 0usize) };
    answer == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_descriptors_and_children_do_not() {
        let me = std::process::id() as i32;
        assert!(shares_files(me, nix::unistd::gettid().as_raw()));
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        assert!(!shares_files(me, child.id() as i32));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_shares_memory_with_its_threads_and_with_no_child() {
        let me = std::process::id() as i32;
        let tid = nix::unistd::gettid().as_raw();
        assert_eq!(compare(me, tid), Ok(Ordering::Equal));
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let forth = compare(me, pid).unwrap();
        assert_ne!(forth, Ordering::Equal);
        assert_eq!(compare(pid, me), Ok(forth.reverse()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(
            compare(me, pid),
            Err(CompareError::Exited { a: me, b: pid })
        );
    }
}
