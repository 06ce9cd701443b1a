//! Where the engine keeps a container that came by migration: bundle, root filesystem, logs.
//!
//! ```text
//!  <state dir>/containers/
//!      <container>/          a home
//!          arrival           the migration it was made for: without this mark the directory is somebody else's
//!      @<migration>/         a home on its way in or out; no container can be called so
//! ```
//!
//! A home is made when a container arrives and goes when the container moves on. It comes into being and goes with one rename,
//! so that it is marked as long as it has the container's name. A directory of that name without the mark, or with another
//! migration's, is never touched; nor is a bundle anywhere else.

use crate::migration::MigrationId;
use crate::target::rootfs::{RemoveError, remove_tree};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The file in a home that says whose it is.
const MARK: &str = "arrival";

/// Why a directory of the engine could not be made, or stays.
#[derive(Debug, Error)]
pub enum HomeError {
    /// Somebody else has a directory there: nothing was touched.
    #[error(
        "{0} exists already, with the files of another container: move it away, or remove it if nobody needs it"
    )]
    Taken(PathBuf),
    /// It cannot be made.
    #[error("cannot make {path}: {source}")]
    Make {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// What is mounted may be somebody's data: nothing was removed.
    #[error("something is mounted at {0}: unmount it first")]
    Mounted(PathBuf),
    /// It cannot be looked at or moved aside; nothing was removed.
    #[error("cannot remove {path}: {source}")]
    Remove {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Part of it may be gone.
    #[error("cannot remove {path}: {source}")]
    Tree {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: RemoveError,
    },
}

/// The directory of one container that came by one migration.
#[derive(Clone, Debug)]
pub struct Home {
    path: PathBuf,
    aside: PathBuf,
    migration: MigrationId,
}

impl Home {
    /// The home of the container `id`, had it come by `migration`.
    pub fn new(state_dir: &Path, id: &str, migration: MigrationId) -> Home {
        let containers = state_dir.join("containers");
        Home {
            path: containers.join(id),
            aside: containers.join(format!("@{migration}")),
            migration,
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The migration it is, or was to be, made for.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    /// Whether a directory of that name is there, whoever's it is.
    pub fn is_taken(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok()
    }

    /// Makes it, with its mark. Only root may pass through: root filesystems hold setuid programs and devices.
    pub fn make(&self) -> Result<(), HomeError> {
        let failed = |source| HomeError::Make {
            path: self.path.clone(),
            source,
        };
        let mut private = DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(&self.aside).map_err(failed)?;
        File::create(self.aside.join(MARK))
            .and_then(|mut mark| {
                writeln!(mark, "{}", self.migration).and_then(|()| mark.sync_all())
            })
            .map_err(failed)?;
        match renameat_with(CWD, &self.aside, CWD, &self.path, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {
                self.remove_aside()?;
                Err(HomeError::Taken(self.path.clone()))
            }
            renamed => renamed.map_err(|errno| failed(errno.into())),
        }
    }

    /// Whether the directory there was made for this migration.
    pub fn is_ours(&self) -> bool {
        mark_in(&self.path) == Some(self.migration)
    }

    /// Removes it, if it is there and was made for this migration. Can be repeated.
    pub fn remove(&self) -> Result<(), HomeError> {
        // An attempt that was cut short.
        self.remove_aside()?;
        if !self.is_ours() {
            return Ok(());
        }
        let failed = |source| HomeError::Remove {
            path: self.path.clone(),
            source,
        };
        let real = fs::canonicalize(&self.path).map_err(failed)?;
        let mounts = fs::read("/proc/self/mountinfo").map_err(failed)?;
        if let Some(mounted) = mount_points(&mounts).find(|at| at.starts_with(&real)) {
            return Err(HomeError::Mounted(mounted));
        }
        fs::rename(&self.path, &self.aside).map_err(failed)?;
        if mark_in(&self.aside) != Some(self.migration) {
            // It was replaced in this very moment.
            return fs::rename(&self.aside, &self.path).map_err(failed);
        }
        self.remove_aside()
    }

    fn remove_aside(&self) -> Result<(), HomeError> {
        let removed = remove_tree(&self.aside);
        removed.map(drop).map_err(|source| HomeError::Tree {
            path: self.aside.clone(),
            source,
        })
    }
}

/// The migration by which a container with this bundle came here; `None` if its bundle is not its home.
pub fn came_by(state_dir: &Path, id: &str, bundle: &Path) -> Option<MigrationId> {
    let home = state_dir.join("containers").join(id);
    // One of the two may be written with a symlink or a "..".
    match (fs::canonicalize(&home), fs::canonicalize(bundle)) {
        (Ok(home), Ok(bundle)) if home == bundle => mark_in(&home),
        _ => None,
    }
}

fn mark_in(directory: &Path) -> Option<MigrationId> {
    let text = fs::read_to_string(directory.join(MARK)).ok()?;
    text.trim_end().parse().ok()
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

    const ONE: MigrationId = MigrationId::from_bytes([1; 16]);
    const TWO: MigrationId = MigrationId::from_bytes([2; 16]);

    #[test]
    fn a_home_goes_with_the_migration_it_was_made_for_and_with_no_other() {
        let state = tempfile::tempdir().unwrap();
        let home = Home::new(state.path(), "web", ONE);
        home.make().unwrap();
        fs::create_dir_all(home.path().join("rootfs/bin")).unwrap();
        assert_eq!(came_by(state.path(), "web", home.path()), Some(ONE));
        let elsewhere = tempfile::tempdir().unwrap();
        assert_eq!(came_by(state.path(), "web", elsewhere.path()), None);
        let roundabout = state.path().join("./containers/../containers/web");
        assert_eq!(came_by(state.path(), "web", &roundabout), Some(ONE));

        let later = Home::new(state.path(), "web", TWO);
        assert!(matches!(later.make(), Err(HomeError::Taken(_))));
        later.remove().unwrap();
        assert!(home.path().join("rootfs/bin").exists());
        home.remove().unwrap();
        home.remove().unwrap();
        let left = fs::read_dir(state.path().join("containers")).unwrap();
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn a_directory_that_somebody_else_put_there_is_neither_used_nor_removed() {
        let state = tempfile::tempdir().unwrap();
        let home = Home::new(state.path(), "web", ONE);
        // Even an empty one.
        fs::create_dir_all(home.path()).unwrap();
        assert!(home.is_taken() && !home.is_ours());
        assert!(matches!(home.make(), Err(HomeError::Taken(_))));
        fs::write(home.path().join("data"), "theirs").unwrap();
        home.remove().unwrap();
        assert!(home.path().join("data").exists());
        assert_eq!(came_by(state.path(), "web", home.path()), None);
    }

    #[test]
    fn a_removal_that_was_cut_short_is_finished() {
        let state = tempfile::tempdir().unwrap();
        let home = Home::new(state.path(), "web", ONE);
        home.make().unwrap();
        fs::rename(home.path(), &home.aside).unwrap();
        fs::remove_file(home.aside.join(MARK)).unwrap();
        home.remove().unwrap();
        assert!(!home.aside.exists());
    }

    #[test]
    fn mount_points_are_read_with_their_blanks() {
        let line = b"36 35 98:0 /m /srv/a\\040b\\134c rw - ext4 /dev/sda rw\n";
        let points: Vec<PathBuf> = mount_points(line).collect();
        assert_eq!(points, [PathBuf::from("/srv/a b\\c")]);
    }
}
