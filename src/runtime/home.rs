//! Where the engine keeps a container that came by migration: bundle, root filesystem, logs.
//!
//! The directory is the engine's own, below its state directory. It is made when a container arrives and goes when the
//! container moves on. A bundle anywhere else is its owner's and is never touched.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a directory of the engine stays.
#[derive(Debug, Error)]
pub enum HomeError {
    /// What is mounted may be somebody's data: nothing was removed.
    #[error("something is mounted at {0}: unmount it first")]
    Mounted(PathBuf),
    /// Part of it may be gone.
    #[error("cannot remove {path}: {source}")]
    Remove {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The directory of the container `id`, had it come by migration.
pub fn home_of(state_dir: &Path, id: &str) -> PathBuf {
    state_dir.join("containers").join(id)
}

/// Removes the bundle of the container `id`, which has left, if it is the engine's own. Can be repeated.
pub fn remove_home(state_dir: &Path, id: &str, bundle: &Path) -> Result<(), HomeError> {
    let home = home_of(state_dir, id);
    // One of the two may be written with a symlink or a "..".
    let real = |path: &Path| fs::canonicalize(path);
    match (real(&home), real(bundle)) {
        (Ok(home), Ok(bundle)) if home == bundle => remove(&home),
        _ => Ok(()),
    }
}

fn remove(home: &Path) -> Result<(), HomeError> {
    let failed = |source| HomeError::Remove {
        path: home.to_path_buf(),
        source,
    };
    let mounts = fs::read("/proc/self/mountinfo").map_err(failed)?;
    if let Some(mounted) = mount_points(&mounts).find(|at| at.starts_with(home)) {
        return Err(HomeError::Mounted(mounted));
    }
    match fs::remove_dir_all(home) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

/// The fifth field of each line of `/proc/PID/mountinfo` (proc(5)).
fn mount_points(mountinfo: &[u8]) -> impl Iterator<Item = PathBuf> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(|line| {
        let field = line.split(|&byte| byte == b' ').nth(4)?;
        Some(PathBuf::from(std::ffi::OsString::from_vec(unescape(field))))
    })
}

/// Blanks, newlines and backslashes are written as three octal digits after a backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let code = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_of_the_engine_goes_and_any_other_stays() {
        let state = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let home = home_of(state.path(), "web");
        fs::create_dir_all(home.join("rootfs/bin")).unwrap();
        remove_home(state.path(), "web", elsewhere.path()).unwrap();
        assert!(home.exists() && elsewhere.path().exists());
        remove_home(
            state.path(),
            "web",
            &state.path().join("./containers/../containers/web"),
        )
        .unwrap();
        assert!(!home.exists());
        remove_home(state.path(), "web", &home).unwrap();
    }

    #[test]
    fn mount_points_are_read_with_their_blanks() {
        let line = b"36 35 98:0 /m /srv/a\\040b\\134c rw - ext4 /dev/sda rw\n";
        let points: Vec<PathBuf> = mount_points(line).collect();
        assert_eq!(points, [PathBuf::from("/srv/a b\\c")]);
    }
}
