//! Whether a directory or a file here is the one that the container has mounted at the source.

use crate::wire::message::shared::{PROOF_PREFIX, Proof, Shared};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, fstat, openat, statx};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A place that was proven, held so that it can be told whether its path still leads there.
#[derive(Debug)]
pub struct Proven {
    path: PathBuf,
    held: OwnedFd,
}

impl Proven {
    /// Looks for the proof; why it is not there, if it is not.
    pub fn new(shared: &Shared) -> Result<Proven, String> {
        let path = Path::new(shared.path.as_str());
        let missing = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let real = path.canonicalize().map_err(|error| missing(&error))?;
        if real != Path::new(shared.real.as_str()) {
            return Err(format!(
                "{} is {} here and {} at the source",
                path.display(),
                real.display(),
                shared.real.as_str()
            ));
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = openat(CWD, &real, flags, Mode::empty()).map_err(|errno| missing(&errno))?;
        match is_proven(&held, &real, &shared.proof) {
            Ok(true) => Ok(Proven { path: real, held }),
            Ok(false) => Err(path.display().to_string()),
            Err(error) => Err(missing(&error)),
        }
    }

    /// Whether the path leads there still: to the same file, on the same mount.
    pub fn holds(&self) -> bool {
        let place = |stat: io::Result<rustix::fs::Statx>| {
            let stat = stat.ok()?;
            let device = (stat.stx_dev_major, stat.stx_dev_minor);
            Some((device, stat.stx_ino, stat.stx_mnt_id))
        };
        let what = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let now = statx(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW, what);
        let then = statx(&self.held, c"", AtFlags::EMPTY_PATH, what);
        let now = place(now.map_err(io::Error::from));
        now.is_some() && now == place(then.map_err(io::Error::from))
    }

    /// The place.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn is_proven(held: &OwnedFd, real: &Path, proof: &Proof) -> io::Result<bool> {
    let stat = statx(held, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    let kind = rustix::fs::FileType::from_raw_mode(stat.stx_mode.into());
    match proof {
        Proof::Written { name, content } => {
            let name = format!("{PROOF_PREFIX}{}", name.as_str());
            let directory = if kind.is_dir() {
                None
            } else if kind.is_file() && !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
                let parent = real.parent().unwrap_or(Path::new("/"));
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let parent = openat(CWD, parent, flags, Mode::empty())?;
                let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
                if fstat(&parent)?.st_dev != device {
                    return Ok(false);
                }
                Some(parent)
            } else {
                return Ok(false);
            };
            let directory = directory.as_ref().map_or(held.as_fd(), AsFd::as_fd);
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = match openat(directory, name, flags, Mode::empty()) {
                Ok(file) => file,
                Err(rustix::io::Errno::NOENT) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            };
            let mut text = Vec::new();
            let longer = content.as_str().len() as u64 + 1;
            File::from(file).take(longer).read_to_end(&mut text)?;
            Ok(text == content.as_str().as_bytes())
        }
        Proof::Content { sha256 } => {
            if !kind.is_file() {
                return Ok(false);
            }
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = openat(CWD, real, flags, Mode::empty())?;
            let mut hash = Sha256::new();
            io::copy(&mut File::from(file), &mut hash)?;
            let mut text = String::new();
            for byte in hash.finalize() {
                let _ = write!(text, "{byte:02x}");
            }
            Ok(text == sha256.as_str())
        }
    }
}
