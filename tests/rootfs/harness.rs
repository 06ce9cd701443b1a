//! A pair of trees with both ends between them, and a full comparison of the two.

use migrate::source::rootfs::{ListTasks, RootfsSource, SourceError, Summary};
use migrate::target::rootfs::{Limits, RootfsTarget, TargetError};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{SeekFrom, lgetxattr, llistxattr, seek};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use tempfile::TempDir;

pub const ROOMY: Limits = Limits {
    bytes: 1 << 40,
    entries: 1 << 20,
};

/// A source tree and a destination, each in a directory of its own.
pub struct Trees {
    pub home: TempDir,
    pub source: PathBuf,
    pub target: PathBuf,
}

impl Trees {
    pub fn new() -> Trees {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make device nodes and owners: run them as root"
        );
        let home = TempDir::with_prefix("migrate-rootfs-test-").unwrap();
        let (source, target) = (home.path().join("source"), home.path().join("target"));
        fs::create_dir(&source).unwrap();
        Trees {
            home,
            source,
            target,
        }
    }

    pub fn connect(&self) -> Link {
        Link::new(&self.source, &self.target, ROOMY)
    }

    /// With processes that may write to the source.
    pub fn connect_with(&self, tasks: ListTasks) -> Link {
        Link::with_tasks(&self.source, &self.target, ROOMY, tasks)
    }

    #[track_caller]
    pub fn assert_same(&self) {
        assert_same(&self.source, &self.target);
    }
}

impl Drop for Trees {
    /// What a test mounted in its own namespace stands in the way of removing the directories.
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| Path::new(point).starts_with(self.home.path())) {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
    }
}

/// Both ends, connected.
pub struct Link {
    pub source: RootfsSource,
    stream: UnixStream,
    target: JoinHandle<Result<(), TargetError>>,
}

impl Link {
    pub fn new(source: &Path, target: &Path, limits: Limits) -> Link {
        Link::with_tasks(source, target, limits, Box::new(|| Ok(Vec::new())))
    }

    /// With processes that may write to the source.
    pub fn with_tasks(source: &Path, target: &Path, limits: Limits, tasks: ListTasks) -> Link {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut receiver = RootfsTarget::new(target, limits).unwrap();
        Link {
            source: RootfsSource::new(source, tasks).unwrap(),
            stream: ours,
            target: std::thread::spawn(move || receiver.serve(&mut theirs)),
        }
    }

    #[track_caller]
    pub fn first(&mut self) -> Summary {
        self.try_first().unwrap()
    }

    pub fn try_first(&mut self) -> Result<Summary, SourceError> {
        self.source.first_pass(&mut self.stream)
    }

    #[track_caller]
    pub fn changed(&mut self) -> Summary {
        self.source.changed_pass(&mut self.stream).unwrap()
    }

    #[track_caller]
    pub fn last(&mut self) -> Summary {
        self.source.last_pass(&mut self.stream).unwrap()
    }

    /// Ends the transfer without complaint from either end.
    #[track_caller]
    pub fn finish(mut self) {
        self.source.finish(&mut self.stream).unwrap();
        self.target.join().unwrap().unwrap();
    }

    /// Drops the source's end and returns what the target makes of it.
    pub fn hang_up(self) -> Result<(), TargetError> {
        drop(self.stream);
        self.target.join().unwrap()
    }
}

/// Everything a program in the container could see of an entry, access and change times aside.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    device: u64,
    size: u64,
    link_target: Option<PathBuf>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Which names are the same file: the first of them.
    same_as: PathBuf,
    content: Vec<u8>,
    /// Where its data lies, holes left out.
    extents: Vec<(u64, u64)>,
}

/// Every entry of a tree, the root as the empty path.
pub fn see(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut names = BTreeMap::new();
    let mut ahead = vec![PathBuf::new()];
    let mut paths = BTreeSet::new();
    while let Some(directory) = ahead.pop() {
        for child in fs::read_dir(root.join(&directory)).unwrap() {
            let child = child.unwrap();
            let path = directory.join(child.file_name());
            if child.file_type().unwrap().is_dir() {
                ahead.push(path.clone());
            }
            paths.insert(path);
        }
        paths.insert(directory);
    }
    for path in paths {
        let full = if path.as_os_str().is_empty() {
            root.to_path_buf()
        } else {
            root.join(&path)
        };
        let meta = fs::symlink_metadata(&full).unwrap();
        let kind = meta.file_type();
        let same_as = match kind.is_dir() {
            true => path.clone(),
            false => names
                .entry((meta.dev(), meta.ino()))
                .or_insert(path.clone())
                .clone(),
        };
        let (content, extents) = if kind.is_file() {
            (fs::read(&full).unwrap(), extents(&full))
        } else {
            Default::default()
        };
        let is_device = kind.is_char_device() || kind.is_block_device();
        let described = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            device: if is_device { meta.rdev() } else { 0 },
            size: if kind.is_dir() { 0 } else { meta.size() },
            link_target: kind.is_symlink().then(|| fs::read_link(&full).unwrap()),
            xattrs: xattrs(&full),
            same_as,
            content,
            extents,
        };
        seen.insert(path, described);
    }
    seen
}

#[track_caller]
pub fn assert_same(source: &Path, target: &Path) {
    let (source, target) = (see(source), see(target));
    for (path, ours) in &source {
        let theirs = target
            .get(path)
            .unwrap_or_else(|| panic!("{path:?} is missing at the target"));
        let same = ours == theirs;
        let brief = |s: &Seen| {
            format!(
                "mode {:o} owner {:?} mtime {:?} size {} device {} link {:?} same as {:?} xattrs {:?} extents {:?}",
                s.mode,
                s.owner,
                s.mtime,
                s.size,
                s.device,
                s.link_target,
                s.same_as,
                s.xattrs.keys(),
                s.extents
            )
        };
        let content = if ours.content == theirs.content {
            "same"
        } else {
            "different"
        };
        assert!(
            same,
            "{path:?} differs, content {content}\n{}\n{}",
            brief(ours),
            brief(theirs)
        );
    }
    let surplus: Vec<_> = target
        .keys()
        .filter(|path| !source.contains_key(*path))
        .collect();
    assert!(surplus.is_empty(), "only at the target: {surplus:?}");
}

pub fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut buffer = vec![0; 65536];
    let len = llistxattr(path, &mut buffer[..]).unwrap();
    let names: Vec<Vec<u8>> = buffer[..len]
        .split(|b| *b == 0)
        .filter(|n| !n.is_empty())
        .map(<[u8]>::to_vec)
        .collect();
    names
        .into_iter()
        .map(|name| {
            let len = lgetxattr(path, name.as_slice(), &mut buffer[..]).unwrap();
            (name, buffer[..len].to_vec())
        })
        .collect()
}

pub fn extents(path: &Path) -> Vec<(u64, u64)> {
    let file = fs::File::open(path).unwrap();
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(data)).unwrap();
        found.push((data, at));
    }
    found
}

/// Sets the modification time `seconds_ago`, with odd nanoseconds; of a symlink its own.
pub fn age(path: &Path, seconds_ago: i64) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
    let time = rustix::fs::Timespec {
        tv_sec: now - seconds_ago,
        tv_nsec: 123_456_789,
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(
        rustix::fs::CWD,
        path,
        &times,
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .unwrap();
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

/// An ACL in the kernel's form (linux/posix_acl_xattr.h) that gives user 1234 the permissions `perm`.
pub fn acl(perm: u16) -> Vec<u8> {
    let entries: [(u16, u16, u32); 5] = [
        (1, 6, !0),
        (2, perm, 1234),
        (4, 4, !0),
        (0x10, 7, !0),
        (0x20, 0, !0),
    ];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&perm.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

/// Ends a thread that watches the flag, also when the test fails: else the scope would wait for it forever.
pub struct StopOnDrop<'f>(pub &'f AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// From here on this thread, and what it starts, mounts for itself alone; the mounts go when it ends.
pub fn private_mounts() {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
}

/// Bytes that look random but are the same on every run (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound as u64) as usize
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8))
            .flat_map(|_| self.roll().to_le_bytes())
            .take(len)
            .collect()
    }
}
