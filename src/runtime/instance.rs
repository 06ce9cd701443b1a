//! What a container is, apart from its name: a name is used again.
//!
//! Out of the runtime's record and the kernel comes an [`Instance`], taken down when a migration begins. Whatever is later done
//! to "the container" is done to the one that still has it, and to none that came in its place.

use crate::migration::journal::{Inode, ProcessName, SourceOpened};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What tells a container from any other that has its name, before or after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Its first process.
    pub init: ProcessName,
    /// When its runtime made it, as the runtime's own record says.
    pub created: String,
    /// The cgroup that freezes it.
    pub cgroup: Inode,
}

impl Instance {
    /// The container that a journal is about.
    pub fn on_record(opened: &SourceOpened) -> Instance {
        Instance {
            init: opened.init,
            created: opened.created.clone(),
            cgroup: opened.cgroup,
        }
    }
}

impl From<&fs::Metadata> for Inode {
    fn from(metadata: &fs::Metadata) -> Inode {
        Inode {
            device: metadata.dev(),
            number: metadata.ino(),
        }
    }
}

/// Which file or directory has this path now; `None` if there is none.
pub fn inode_of(path: &Path) -> io::Result<Option<Inode>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(Inode::from(&metadata))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
