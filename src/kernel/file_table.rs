//! Whether two threads have one table of descriptors.
#![allow(unsafe_code)]

/// linux/kcmp.h
const KCMP_FILES: libc::c_int = 2;

/// Whether `one` and `other` share their descriptors. No if the kernel does not say: then both are to be looked at.
pub fn is_shared(one: i32, other: i32) -> bool {
    // SAFETY: kcmp takes five integers and touches no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) };
    order == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_their_descriptors_and_processes_do_not() {
        let ours = std::process::id().cast_signed();
        let this = nix::unistd::gettid().as_raw();
        assert!(is_shared(ours, this));
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        assert!(!is_shared(ours, child.id().cast_signed()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
