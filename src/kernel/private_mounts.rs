//! Starting a program in a mount namespace of its own, with a few files and directories replaced.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// What the program sees instead of the host's own files.
#[derive(Clone, Debug, Default)]
pub struct PrivateMounts {
    mounts: Vec<Mount>,
    own_session: bool,
}

#[derive(Clone, Debug)]
enum Mount {
    Bind { source: CString, target: CString },
    Tmpfs { target: CString },
}

impl PrivateMounts {
    /// No replacement yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// `target` shows `source`; both must exist and be of one kind (file or directory).
    pub fn bind(mut self, source: &Path, target: &Path) -> io::Result<Self> {
        self.mounts.push(Mount::Bind {
            source: c_string(source.as_os_str())?,
            target: c_string(target.as_os_str())?,
        });
        Ok(self)
    }

    /// `target` shows an empty tmpfs, gone with the program.
    pub fn tmpfs(mut self, target: &Path) -> io::Result<Self> {
        self.mounts.push(Mount::Tmpfs {
            target: c_string(target.as_os_str())?,
        });
        Ok(self)
    }

    /// The program is started as the leader of a new session, without a terminal.
    pub fn own_session(mut self) -> Self {
        self.own_session = true;
        self
    }

    /// Makes `command` start in this namespace, with no descriptors but the standard three. Mounts and unmounts of the
    /// host still reach it, its own stay inside.
    pub fn apply(self, command: &mut Command) {
        let enter = move || self.enter();
        // SAFETY: between fork and exec the closure only makes system calls on memory that was allocated before the
        // fork; it neither allocates nor takes a lock.
        unsafe {
            command.pre_exec(enter);
        }
    }

    fn enter(&self) -> io::Result<()> {
        // A descriptor that some ancestor forgot to close must not leak into a container.
        // SAFETY: close_range takes no pointers; marking descriptors keeps them usable until the exec.
        check(unsafe {
            libc::close_range(
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC.cast_signed(),
            )
        })?;
        if self.own_session {
            nix::unistd::setsid()?;
        }
        // SAFETY: unshare takes no pointers.
        check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
        mount(None, c"/", None, libc::MS_REC | libc::MS_SLAVE)?;
        for step in &self.mounts {
            match step {
                Mount::Bind { source, target } => mount(Some(source), target, None, libc::MS_BIND)?,
                Mount::Tmpfs { target } => mount(Some(c"tmpfs"), target, Some(c"tmpfs"), 0)?,
            }
        }
        Ok(())
    }
}

/// Makes `command` start in the mount namespace of an existing process, given as `/proc/PID/ns/mnt` opened.
pub fn join(namespace: OwnedFd, command: &mut Command) {
    let enter = move || {
        // SAFETY: setns takes no pointers; the descriptor lives as long as the closure.
        check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) })
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(enter);
    }
}

fn mount(
    source: Option<&std::ffi::CStr>,
    target: &std::ffi::CStr,
    kind: Option<&std::ffi::CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let pointer =
        |text: Option<&std::ffi::CStr>| text.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
    // SAFETY: every pointer is null or a NUL-terminated string that outlives the call; null data is allowed.
    check(unsafe {
        libc::mount(
            pointer(source),
            target.as_ptr(),
            pointer(kind),
            flags,
            std::ptr::null(),
        )
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a path contains NUL"))
}
