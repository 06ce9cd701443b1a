//! The surroundings in which a runtime runs CRIU for us.
//!
//! A runtime takes CRIU from the `PATH` and its extra options from a fixed file (`/etc/criu/runc.conf`, or the one an
//! annotation names); CRIU takes its knowledge of the kernel from `/run/criu.kdat`, and options of its own from the file
//! that `CRIU_CONFIG_FILE` names. The engine replaces all four for its own runtime only: it starts with other environment
//! variables and in a mount namespace of its own, in which our files lie over those paths. Of the fixed ones, what is not
//! there is made, empty, for a mount needs something to lie on; what an annotation names must be there ([`annotation`]). Several migrations can run side by side, and other users of CRIU notice
//! nothing. `/etc/criu/default.conf` and `~/.criu/default.conf` still count: the administrator wrote them for every CRIU.

use super::annotation;
use super::binary::Criu;
use crate::kernel::private_mounts::PrivateMounts;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The file runc, Podman and Docker point CRIU at.
pub const RUNTIME_CONFIG: &str = "/etc/criu/runc.conf";
/// Where CRIU keeps what it found out about the kernel.
pub const KERNEL_CACHE: &str = "/run/criu.kdat";

/// One prepared environment; cheap to apply to any number of commands.
#[derive(Clone, Debug)]
pub struct Environment {
    criu: Criu,
    options: PathBuf,
    options_seen_at: PathBuf,
    kernel_cache: Option<PathBuf>,
    early_options: PathBuf,
}

impl Environment {
    /// CRIU with the options in the files `early_options` and `options` ([`super::options::Options`]) and, if given, the
    /// kernel cache in that file.
    ///
    /// `annotated` is the value of the container's `org.criu.config` annotation, which the runtime would use instead of
    /// its own file.
    pub fn new(
        criu: Criu,
        early_options: &Path,
        options: &Path,
        annotated: Option<&Path>,
        kernel_cache: Option<&Path>,
    ) -> Self {
        Environment {
            criu,
            options: options.to_path_buf(),
            options_seen_at: annotated.unwrap_or(Path::new(RUNTIME_CONFIG)).to_path_buf(),
            kernel_cache: kernel_cache.map(Path::to_path_buf),
            early_options: early_options.to_path_buf(),
        }
    }

    /// Makes `command` (a runtime, or CRIU itself) run in this environment.
    pub fn apply(&self, command: &mut Command) -> io::Result<()> {
        command.env("PATH", self.criu.search_path());
        command.env("CRIU_CONFIG_FILE", &self.early_options);
        let mut mounts = PrivateMounts::new();
        if self.options_seen_at == Path::new(RUNTIME_CONFIG) {
            ensure_mount_point(&self.options_seen_at)?;
        } else {
            annotation::check(&self.options_seen_at).map_err(io::Error::other)?;
        }
        mounts = mounts.bind(&self.options, &self.options_seen_at)?;
        if let Some(cache) = &self.kernel_cache {
            ensure_mount_point(Path::new(KERNEL_CACHE))?;
            mounts = mounts.bind(cache, Path::new(KERNEL_CACHE))?;
        }
        mounts.apply(command);
        Ok(())
    }
}

/// A mount needs an inode to lie on: an empty file means "no options" and "no cache" to every other user of CRIU.
pub(super) fn ensure_mount_point(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}
