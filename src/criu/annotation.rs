//! The file of CRIU options that a container's annotation `org.criu.config` makes the runtime use.
//!
//! Whoever writes a container's annotations need not be who administers the host, and CRIU's options can make it run
//! programs as root. So no path outside the administrator's own directory is followed, and none is made.

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, statat};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Where an administrator keeps CRIU's options.
const DIRECTORY: &str = "/etc/criu";

/// The annotation names something else than a file of the administrator.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "the annotation org.criu.config names {0:?}, which is no plain file in {DIRECTORY} of this host: start the container without it"
)]
pub struct BadAnnotation(PathBuf);

/// Whether `path` is a plain file of the administrator's.
pub fn check(path: &Path) -> Result<(), BadAnnotation> {
    let bad = || BadAnnotation(path.to_path_buf());
    let text = path.to_str().ok_or_else(bad)?;
    // Compared as text: Path takes `/etc/criu/./x` and `/etc//criu/x` for the same.
    let name = text
        .strip_prefix(DIRECTORY)
        .and_then(|rest| rest.strip_prefix('/'));
    let name = name.filter(|name| Path::new(name).file_name() == Some(OsStr::new(name)));
    let name = name.ok_or_else(bad)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(CWD, DIRECTORY, flags, Mode::empty()).map_err(|_| bad())?;
    let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| bad())?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_the_administrators_directory_is_taken_or_made() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("options");
        std::fs::write(&file, "").unwrap();
        let absent = directory.path().join("made/on/the/way");
        for path in [
            file.as_path(),
            &absent,
            Path::new("/etc/criu"),
            Path::new("/etc/criu/"),
            Path::new("/etc/criu/../passwd"),
            Path::new("/etc/criu/a/b"),
            Path::new("/etc/criu/."),
            Path::new("/etc/criuser.conf"),
            Path::new("/etc/criu/migrate-test-none.conf"),
            Path::new("etc/criu/x"),
        ] {
            assert!(check(path).is_err(), "{path:?}");
        }
        assert!(!absent.parent().unwrap().exists());
    }
}
