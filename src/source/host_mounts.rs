//! Which parts of this host a container has mounted, and which of them the user said the target has as well.
//!
//! What `config.json` binds counts, and what is really mounted: a mount can come later by propagation. Each must be
//! declared with `--shared`, and is then to be proven ([`super::proofs`]). Left alone are the kernel's own filesystems
//! (proc, sysfs, cgroup, …), character devices, and what was mounted inside the container, which CRIU carries.

use crate::kernel::mount_table::Mount;
use crate::runtime::runc::Container;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use serde_json::Value;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A directory or file of this host that the target must have as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// As `config.json` or the table of mounts names it.
    pub path: PathBuf,
    /// Without symbolic links.
    pub real: PathBuf,
    /// How it can be proven to be the same.
    pub provable: Provable,
}

/// How a place can be proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provable {
    /// By a file written into the directory.
    Within,
    /// By a file written beside the file.
    Beside,
    /// By its content: the container can only read it.
    Content,
}

/// What was found.
#[derive(Debug, Default)]
pub struct HostMounts {
    /// Declared places.
    pub shared: Vec<Place>,
    /// Sources that only have to exist: every host has its own.
    pub everywhere: Vec<PathBuf>,
}

/// Filesystems in which the kernel of each host shows itself.
const OF_THE_KERNEL: [&str; 18] = [
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "efivarfs",
    "fusectl",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
];

/// Looks at the mounts of a running container; what it must not have is added to `refusals`.
pub fn look(
    container: &Container,
    declared: &[PathBuf],
    refusals: &mut Vec<String>,
) -> io::Result<HostMounts> {
    let mut look = Look {
        ours: Mount::list("thread-self")?,
        theirs: Mount::list(&container.init_pid.to_string())?,
        declared: Vec::new(),
        explained: Vec::new(),
        found: HostMounts::default(),
        refusals,
    };
    for path in declared {
        match path.canonicalize() {
            Ok(real) => look.declared.push(real),
            Err(error) => look
                .refusals
                .push(format!("--shared {}: {error}", path.display())),
        }
    }
    for bind in binds(&container.spec) {
        look.at_bind(&bind)?;
    }
    look.at_other_mounts()?;
    Ok(look.found)
}

/// A bind mount of `config.json`.
struct Bind {
    source: PathBuf,
    destination: PathBuf,
}

fn binds(spec: &Value) -> Vec<Bind> {
    let mounts = spec.get("mounts").and_then(Value::as_array);
    let mut binds = Vec::new();
    for mount in mounts.map_or(&[][..], Vec::as_slice) {
        let text = |name| mount.get(name).and_then(Value::as_str).unwrap_or_default();
        let options = mount.get("options").and_then(Value::as_array);
        let mut options = options.into_iter().flatten();
        if text("type") == "bind" || options.any(|option| option == "bind" || option == "rbind") {
            binds.push(Bind {
                source: text("source").into(),
                destination: Path::new("/").join(text("destination")),
            });
        }
    }
    binds
}

struct Look<'r> {
    ours: Vec<Mount>,
    theirs: Vec<Mount>,
    /// Without symbolic links.
    declared: Vec<PathBuf>,
    /// Filesystem and place in it of what `config.json` binds.
    explained: Vec<((u32, u32), PathBuf)>,
    found: HostMounts,
    refusals: &'r mut Vec<String>,
}

impl Look<'_> {
    fn at_bind(&mut self, bind: &Bind) -> io::Result<()> {
        if !bind.source.is_absolute() {
            self.refusals.push(format!(
                "the bind mount source {:?} in config.json is no plain absolute path: only those can be found at the target",
                bind.source
            ));
            return Ok(());
        }
        let real = match bind.source.canonicalize() {
            Ok(real) => real,
            Err(error) => {
                self.refusals.push(format!(
                    "the container mounts {} of this host, which is not there any more: {error}",
                    bind.source.display()
                ));
                return Ok(());
            }
        };
        let (device, inside) = self.place_of(&real)?;
        let mounted = self
            .theirs
            .iter()
            .rfind(|mount| mount.at == bind.destination);
        let read_only = mounted.is_some_and(|mount| mount.read_only);
        if mounted.is_some_and(|mount| (mount.device, &mount.root) != (device, &inside)) {
            self.refusals.push(format!(
                "what the container has mounted at {} is not {} of this host any more: start it anew",
                bind.destination.display(),
                bind.source.display()
            ));
            return Ok(());
        }
        self.explained.push((device, inside));
        self.judge(&bind.source, &real, &bind.destination, read_only)
    }

    /// Mounts below those of `config.json`, and such as came since the start.
    fn at_other_mounts(&mut self) -> io::Result<()> {
        let root = self.theirs.iter().rfind(|mount| mount.at == Path::new("/"));
        let root = root.map(|mount| (mount.device, mount.root.clone()));
        for mount in self.theirs.clone() {
            let of_root = root.as_ref().is_some_and(|(device, directory)| {
                *device == mount.device && mount.root.starts_with(directory)
            });
            let explained = self
                .explained
                .iter()
                .any(|(device, inside)| *device == mount.device && *inside == mount.root);
            let of_this_host = self.ours.iter().any(|ours| ours.device == mount.device);
            if of_root || explained || !of_this_host || OF_THE_KERNEL.contains(&mount.kind.as_str())
            {
                continue;
            }
            match self.path_of(&mount)? {
                Some(real) => self.judge(&real, &real, &mount.at, mount.read_only)?,
                None => self.refusals.push(format!(
                    "the container has a {} of this host mounted at {}, which has no path here: unmount it first",
                    mount.kind,
                    mount.at.display()
                )),
            }
        }
        Ok(())
    }

    /// Sorts in a place that the container has mounted at `at`.
    fn judge(&mut self, path: &Path, real: &Path, at: &Path, read_only: bool) -> io::Result<()> {
        let metadata = fs::symlink_metadata(real)?;
        let kind = self
            .mount_of(real)?
            .map_or(String::new(), |mount| mount.kind.clone());
        if OF_THE_KERNEL.contains(&kind.as_str()) || metadata.file_type().is_char_device() {
            self.found.everywhere.push(path.to_path_buf());
            return Ok(());
        }
        let name = path.display();
        if !self.declared.iter().any(|shared| real.starts_with(shared)) {
            self.refusals.push(format!(
                "the container has {name} of this host mounted at {}, which does not move with it: if the target has the same, say --shared {name}",
                at.display()
            ));
            return Ok(());
        }
        match provable(real, &metadata, read_only)? {
            Some(provable) => {
                let place = Place {
                    path: path.to_path_buf(),
                    real: real.to_path_buf(),
                    provable,
                };
                if !self.found.shared.contains(&place) {
                    self.found.shared.push(place);
                }
            }
            None => self.refusals.push(format!(
                "{name}, which the container has mounted at {}, cannot be proven to be the same at the target: only directories and regular files can",
                at.display()
            )),
        }
        Ok(())
    }

    /// The filesystem that `real` lies on, and what it is called there.
    fn place_of(&self, real: &Path) -> io::Result<((u32, u32), PathBuf)> {
        let place = self
            .mount_of(real)?
            .and_then(|mount| Some((mount.device, mount.inside(real)?)));
        place.ok_or_else(|| {
            let missing = format!("the mount of {} is not listed", real.display());
            io::Error::new(io::ErrorKind::NotFound, missing)
        })
    }

    fn mount_of(&self, real: &Path) -> io::Result<Option<&Mount>> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let id = statx(CWD, real, flags, StatxFlags::MNT_ID)?.stx_mnt_id;
        Ok(self.ours.iter().find(|mount| mount.id == id))
    }

    /// A path of this host that leads to what is mounted, best a declared one.
    fn path_of(&self, mounted: &Mount) -> io::Result<Option<PathBuf>> {
        let mut best = None;
        for ours in &self.ours {
            let Ok(below) = mounted.root.strip_prefix(&ours.root) else {
                continue;
            };
            if ours.device != mounted.device {
                continue;
            }
            let path = match below.as_os_str().is_empty() {
                true => ours.at.clone(),
                false => ours.at.join(below),
            };
            // Another mount may lie over it.
            let leads_there =
                matches!(self.mount_of(&path), Ok(Some(mount)) if mount.id == ours.id);
            if !leads_there {
                continue;
            }
            if self.declared.iter().any(|shared| path.starts_with(shared)) {
                return Ok(Some(path));
            }
            best.get_or_insert(path);
        }
        Ok(best)
    }
}

fn provable(real: &Path, metadata: &Metadata, read_only: bool) -> io::Result<Option<Provable>> {
    if metadata.is_dir() {
        return Ok(Some(Provable::Within));
    }
    if !metadata.is_file() {
        return Ok(None);
    }
    if read_only {
        return Ok(Some(Provable::Content));
    }
    Ok(lies_beside(real, metadata)?.then_some(Provable::Beside))
}

/// Whether the file is one of its parent's filesystem, and not mounted there.
fn lies_beside(real: &Path, metadata: &Metadata) -> io::Result<bool> {
    let Some(parent) = real.parent() else {
        return Ok(false);
    };
    let stat = statx(
        CWD,
        real,
        AtFlags::SYMLINK_NOFOLLOW,
        StatxFlags::BASIC_STATS,
    )?;
    let mounted = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    Ok(!mounted && fs::metadata(parent)?.dev() == metadata.dev())
}
