//! The bodies of the control messages, as plain structs whose fields hold only what is allowed.

use super::shared::Shared;
use super::text::PeerText;
use crate::memory::SpaceId;
use crate::wire::id::{ContainerId, JournalId, MigrationId};
use crate::wire::path::{AbsolutePath, RelativePath};
use crate::wire::peer_error::PeerError;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;
use thiserror::Error;

/// The most page streams of one migration.
pub const MAX_PAGE_STREAMS: usize = 64;

/// The most address spaces in a manifest.
pub const MAX_SPACES: usize = 65_536;

/// The most address spaces of one container that a target takes: each costs it a descriptor, and its pager another.
pub const MOST_SPACES: usize = 4096;

/// The most image files in a manifest.
pub const MAX_IMAGE_FILES: usize = 65_536;

/// The most refusals in one answer.
pub const MAX_REFUSALS: usize = 64;

/// The most bytes one figure of memory or disk may claim: 1 PiB, far above any host and far below overflow.
pub const MAX_BYTES: u64 = 1 << 50;

const MAX_CPU_FLAGS: usize = 1024;
const MAX_BIND_SOURCES: usize = 1024;
/// The kernel's `PID_MAX_LIMIT` on 64 bits.
const MAX_PID: u32 = 4 << 20;

/// May this container come?
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Begin {
    /// Names this attempt in every later message, in both journals and in a [`Query`].
    pub migration: MigrationId,
    /// The container's name, the same on both hosts.
    pub container: ContainerId,
    /// What the target must be able to give.
    pub requirements: Requirements,
    /// Only ask: nothing will follow an [`Accepted`].
    pub dry_run: bool,
}

/// What a container needs at the target.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Requirements {
    /// Resident memory of all processes, in bytes.
    pub memory_bytes: u64,
    /// Size of the bundle and root filesystem to copy, in bytes; 0 if shared.
    pub rootfs_bytes: u64,
    /// Processor features the container may have found at the source (`flags` or `Features` of /proc/cpuinfo).
    #[serde(deserialize_with = "at_most::<MAX_CPU_FLAGS, _, _>")]
    pub cpu_flags: Vec<CpuFlag>,
    /// The cgroup version the container's cgroups are of.
    pub cgroup_version: CgroupVersion,
    /// The container's memory limit in bytes, if it has one.
    pub memory_limit: Option<u64>,
    /// The CRIU that will write the images.
    pub criu_version: CriuVersion,
    /// The source's processor architecture.
    pub arch: Arch,
    /// Whether the root filesystem is copied or already there.
    pub rootfs: RootfsMode,
    /// Where a shared root filesystem is, on both hosts.
    pub shared_rootfs: Option<AbsolutePath>,
    /// Host paths that the container mounts and the target must have, each host its own.
    #[serde(deserialize_with = "at_most::<MAX_BIND_SOURCES, _, _>")]
    pub bind_sources: Vec<AbsolutePath>,
    /// What must be the same at both hosts: declared bind mounts, and a shared root filesystem.
    #[serde(deserialize_with = "at_most::<MAX_BIND_SOURCES, _, _>")]
    pub shared: Vec<Shared>,
    /// How many page streams the source will open, 1 to [`MAX_PAGE_STREAMS`].
    pub page_streams: u16,
}

impl Requirements {
    pub(super) fn broken_rule(&self) -> Option<&'static str> {
        if !(1..=MAX_PAGE_STREAMS).contains(&usize::from(self.page_streams)) {
            return Some("page_streams is between 1 and 64");
        }
        let limit = self.memory_limit.unwrap_or(0);
        if [self.memory_bytes, self.rootfs_bytes, limit]
            .iter()
            .any(|&bytes| bytes > MAX_BYTES)
        {
            return Some("a size is above 1 PiB");
        }
        if self.shared_rootfs.is_some() != (self.rootfs == RootfsMode::Shared) {
            return Some("a path is given for a shared root filesystem, and only then");
        }
        let proven =
            |rootfs: &AbsolutePath| self.shared.iter().any(|shared| shared.path == *rootfs);
        if !self.shared_rootfs.iter().all(proven) {
            return Some("a shared root filesystem is among what is shared");
        }
        None
    }
}

/// One processor feature as /proc/cpuinfo writes it: 1 to 64 of `a-z 0-9 _ . -`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuFlag(String);

/// A text that is no processor feature.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("a processor feature is 1 to 64 of a-z 0-9 _ . -")]
pub struct CpuFlagError;

impl CpuFlag {
    /// The features in the text of `/proc/cpuinfo`: its first `flags` (x86) or `Features` (arm) line.
    pub fn in_cpuinfo(text: &str) -> Vec<CpuFlag> {
        let line = text.lines().find_map(|line| {
            let (name, flags) = line.split_once(':')?;
            matches!(name.trim(), "flags" | "Features").then_some(flags)
        });
        let flags = line.unwrap_or_default().split_whitespace();
        flags
            .filter_map(|flag| CpuFlag::try_from(flag.to_owned()).ok())
            .collect()
    }

    /// The feature as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for CpuFlag {
    type Error = CpuFlagError;

    fn try_from(flag: String) -> Result<CpuFlag, CpuFlagError> {
        let plain =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'.' | b'-');
        if (1..=64).contains(&flag.len()) && flag.bytes().all(plain) {
            Ok(CpuFlag(flag))
        } else {
            Err(CpuFlagError)
        }
    }
}

impl From<CpuFlag> for String {
    fn from(flag: CpuFlag) -> String {
        flag.0
    }
}

impl fmt::Debug for CpuFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for CpuFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which cgroup hierarchy a container lives in. A hybrid host's controllers are on v1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupVersion {
    /// One hierarchy per controller.
    V1,
    /// The unified hierarchy.
    V2,
}

/// A CRIU version as CRIU's own RPC gives it: major × 10000 + minor × 100 + sublevel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CriuVersion(pub u32);

impl fmt::Display for CriuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CriuVersion(v) = self;
        write!(f, "{}.{}.{}", v / 10_000, v / 100 % 100, v % 100)
    }
}

/// A processor architecture.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// AMD and Intel, 64 bits.
    X86_64,
    /// Arm, 64 bits.
    Aarch64,
}

impl Arch {
    /// What this program was built for, and runs on.
    pub const HERE: Arch = if cfg!(target_arch = "aarch64") {
        Arch::Aarch64
    } else {
        Arch::X86_64
    };
}

/// How the root filesystem gets to the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootfsMode {
    /// The engine copies it.
    Copied,
    /// Both hosts see the same path.
    Shared,
}

/// These are all the frames of a round.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RoundEnd {
    /// 1 for the first round.
    pub round: u32,
    /// Pages sent in this round, zero pages counted.
    pub pages: u64,
    /// Frames sent since the beginning on each page stream, by its index.
    #[serde(deserialize_with = "at_most::<MAX_PAGE_STREAMS, _, _>")]
    pub frames_per_stream: Vec<u64>,
}

/// These address spaces ended while rounds were sent: their pages are of no use any more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpacesEnded {
    /// Which; none of them comes again.
    #[serde(deserialize_with = "at_most::<MAX_SPACES, _, _>")]
    pub spaces: Vec<SpaceId>,
}

/// The rounds are nearly done: start a restore that waits for its images.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Prestart {
    /// The bundle's `config.json`, a JSON object.
    pub config: String,
    /// What the container's standard input, output and error are.
    pub stdio: [StdStream; 3],
    /// Pages come on the page streams, and the images leave them out; otherwise the images have them all.
    pub pages_apart: bool,
}

impl Prestart {
    pub(super) fn broken_rule(&self) -> Option<&'static str> {
        let object = serde_json::from_str::<serde_json::Value>(&self.config)
            .is_ok_and(|config| config.is_object());
        (!object).then_some("the config is not a JSON object")
    }
}

/// A standard stream that can move to another host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StdStream {
    /// `/dev/null`.
    Null,
    /// A pipe, named by its inode at the source as the images name it.
    Pipe {
        /// The inode number.
        inode: u64,
    },
}

/// All pages and files are sent; this is what there must be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The address space of every process that has one.
    #[serde(deserialize_with = "at_most::<MAX_SPACES, _, _>")]
    pub spaces: Vec<SpaceOwner>,
    /// The image files sent on file streams.
    #[serde(deserialize_with = "at_most::<MAX_IMAGE_FILES, _, _>")]
    pub image_files: Vec<ImageFile>,
    /// Frames sent since the beginning on each page stream, by its index.
    #[serde(deserialize_with = "at_most::<MAX_PAGE_STREAMS, _, _>")]
    pub frames_per_stream: Vec<u64>,
    /// Pages that were declared owed on the page streams: the copy runs before they come. 0 in pre-copy.
    #[serde(default)]
    pub owed_pages: u64,
    /// How long the copy may wait for a lost source before it is stopped and kept, in seconds.
    #[serde(default)]
    pub reconnect_s: u32,
}

impl Manifest {
    pub(super) fn broken_rule(&self) -> Option<&'static str> {
        let mut spaces = HashSet::new();
        let mut pids = HashSet::new();
        for owner in &self.spaces {
            if !(1..=MAX_PID).contains(&owner.vpid) {
                return Some("a process id is out of range");
            }
            if !spaces.insert(owner.space) || !pids.insert(owner.vpid) {
                return Some("a space or a process is listed twice");
            }
        }
        let mut names = HashSet::new();
        for file in &self.image_files {
            if !file.name.is_single() {
                return Some("an image file's name has a slash");
            }
            if file.size > MAX_BYTES {
                return Some("an image file is above 1 PiB");
            }
            if !names.insert(&file.name) {
                return Some("an image file is listed twice");
            }
        }
        None
    }
}

/// Which process an address space belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpaceOwner {
    /// The space, as page frames name it.
    pub space: SpaceId,
    /// The process's id inside the container, as image files name it.
    pub vpid: u32,
}

/// One of CRIU's image files.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ImageFile {
    /// Its name, a single component.
    pub name: RelativePath,
    /// Its size in bytes.
    pub size: u64,
}

/// From here on only the target may run the container.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Commit {}

/// The migration ends, the container goes on at the source.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Abort {
    /// Why.
    pub code: PeerError,
    /// What the source wants to add, for the target's log.
    pub text: PeerText,
}

/// What became of this migration?
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Query {
    /// The attempt asked about.
    pub migration: MigrationId,
}

/// This connection takes the place of a lost one, on which owed pages were sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Resume {
    /// The migration whose copy is owed pages.
    pub migration: MigrationId,
}

/// The container may come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Accepted {
    /// It may be released here before all its pages have come. Absent from what an older target says: it cannot.
    #[serde(default)]
    pub lazy: bool,
}

/// The container may not come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refused {
    /// Every reason found, at least one.
    #[serde(deserialize_with = "at_most::<MAX_REFUSALS, _, _>")]
    pub refusals: Vec<Refusal>,
}

impl Refused {
    pub(super) fn broken_rule(&self) -> Option<&'static str> {
        self.refusals
            .is_empty()
            .then_some("a refusal has at least one reason")
    }
}

/// One reason why a container may not come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// Which reason.
    pub code: PeerError,
    /// The figures and names that go with it, in the target's words.
    pub text: PeerText,
}

/// Every frame of the round is in the page store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RoundReceived {
    /// The round of the [`RoundEnd`] this answers.
    pub round: u32,
}

/// The container is restored and held before its first instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// The target's journal, in which *prepared* is on record. Only its word counts later.
    pub journal: JournalId,
    /// From the manifest to complete images on disk, in microseconds.
    pub compose_us: u64,
    /// From complete images to CRIU's hold, in microseconds.
    pub restore_us: u64,
    /// Pages put into restored processes so far.
    pub filled_pages: u64,
}

/// The container runs here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Committed {
    /// From the commit message to the container running, in microseconds.
    pub resume_us: u64,
    /// Time spent putting pages into restored processes before the release, in microseconds.
    pub fill_us: u64,
}

/// Nothing of the container is left here.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RolledBack {
    /// Why.
    pub code: PeerError,
    /// What the target wants to add.
    pub text: PeerText,
}

/// Every page is in its place: nothing of the container's memory is in the page store any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Filled {
    /// From the release to the last page, in microseconds; 0 if all was filled before.
    pub after_release_us: u64,
}

/// Every owed page has arrived. The source is still needed until it hears [`Fate::Complete`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Whole {
    /// From the release to the last page's arrival, in microseconds.
    pub after_release_us: u64,
}

/// The copy runs and is not complete: an [`Outcome`] follows when it is, or when it is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Resumed {
    /// Go on sending owed pages: which are still missing comes on the fault streams.
    pub owed: bool,
}

/// What became of a migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The journal that was read. Another one than prepared the migration proves nothing.
    pub journal: JournalId,
    /// What it says.
    pub fate: Fate,
}

/// What a target's journal says of a migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// The container was released here, every page is in its place and every file on disk: nothing of it is needed at the
    /// source any more.
    Complete,
    /// The container was released here: only the target may run it. What the source has is still needed.
    Serving,
    /// The container was released here and was lost before it was complete. It can never run here again.
    Lost,
    /// The container was not released here and never will be.
    RolledBack,
    /// The target's journal does not know the migration.
    UnknownMigration,
    /// The target has not settled it yet.
    InProgress,
}

/// Reads a list of at most `MAX` entries; a longer one fails before it takes memory.
fn at_most<'de, const MAX: usize, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct Bounded<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            write!(f, "a list of at most {MAX} entries")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(entry) = entries.next_element()? {
                if list.len() == MAX {
                    return Err(de::Error::invalid_length(MAX + 1, &self));
                }
                list.push(entry);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(Bounded::<T, MAX>(PhantomData))
}
