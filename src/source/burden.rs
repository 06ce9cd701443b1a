//! What CRIU itself carries while the container stands still, and how long that takes.
//!
//! Memory crosses during the rounds. Contents of tmpfs, deleted files that are still open and shared memory that no file
//! backs do not: CRIU reads them when everything is frozen, writes them into its images, and they cross then. Processes and
//! threads cost time each. All of it grows with the container, so it is counted before the freeze, and once more right
//! before it, since a tmpfs may fill up during the rounds.

use crate::memory::PAGE_SIZE;
use crate::runtime::Task;
use nix::sys::statvfs::statvfs;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes a second of tmpfs contents, which CRIU packs with `tar` and `gzip`: 60 MiB were seen to take 2.2 to 2.7 s.
const TMPFS_RATE: u64 = 25 << 20;

/// Bytes a second of a deleted file: read, written into an image, read, sent, written twice.
const DELETED_RATE: u64 = 300 << 20;

/// Bytes a second of shared memory that is dumped in full.
const SHARED_RATE: u64 = 500 << 20;

/// What each thread beyond a process's first costs CRIU.
const PER_THREAD: Duration = Duration::from_micros(300);

/// Bytes of a deleted file from which on CRIU, told so by the engine's options, does not take it along.
pub const MOST_DELETED: u64 = 4000 << 20;

/// Less than this is not worth a word.
const WORTH_SAYING: Duration = Duration::from_millis(100);

/// What has to be carried while the container stands still.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Burden {
    /// Bytes used in the container's own tmpfs mounts.
    pub tmpfs: u64,
    /// Bytes that deleted but open or mapped files take on disk.
    pub deleted: u64,
    /// The largest of these and its bytes.
    pub largest: Option<(PathBuf, u64)>,
    /// Bytes of anonymous shared memory.
    pub shared: u64,
    /// Threads beyond the first of each process.
    pub threads: u64,
}

impl Burden {
    /// Of these processes; what cannot be read is gone, or seen by other looks.
    pub fn of(tasks: &[Task]) -> Burden {
        let mut burden = Burden::default();
        let mut namespaces = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut shared = BTreeMap::new();
        let (mut shared_resident, host) = (0, devices_here());
        for task in tasks.iter().filter(|task| !task.zombie) {
            let process = PathBuf::from(format!("/proc/{}", task.pid));
            if let Ok(namespace) = fs::read_link(process.join("ns/mnt"))
                && namespaces.insert(namespace)
            {
                burden.tmpfs += tmpfs_bytes(&process, &host, &mut seen);
            }
            burden.deleted_descriptors(&process, &mut seen);
            burden.mappings(&process, &mut seen, &mut shared);
            let status = procfs::process::Process::new(task.pid).and_then(|one| one.status());
            if let Ok(status) = status {
                burden.threads += status.threads.saturating_sub(1);
                shared_resident += status.rssshmem.unwrap_or(0) << 10;
            }
        }
        // A mapping's length says what it may be, what is resident what it is; forked processes count the latter twice.
        burden.shared = shared.values().sum::<u64>().min(shared_resident);
        burden
    }

    /// How much longer the container stands still for it, at this many pages a second.
    pub fn time(&self, link: Option<f64>) -> Duration {
        let at =
            |bytes: u64, rate: u64| Duration::from_micros(bytes.saturating_mul(1_000_000) / rate);
        let here = at(self.tmpfs, TMPFS_RATE)
            + at(self.deleted, DELETED_RATE)
            + at(self.shared, SHARED_RATE)
            + self.time_of_threads();
        let pages = (self.tmpfs + self.deleted + self.shared) as f64 / PAGE_SIZE as f64;
        let on_the_way = link.map_or(Duration::ZERO, |link| {
            Duration::try_from_secs_f64(pages / link.max(1e-6)).unwrap_or(Duration::MAX)
        });
        here.saturating_add(on_the_way)
    }

    fn time_of_threads(&self) -> Duration {
        PER_THREAD * u32::try_from(self.threads).unwrap_or(u32::MAX)
    }

    /// Whether anybody would notice.
    pub fn is_worth_saying(&self) -> bool {
        self.time(None) > WORTH_SAYING
    }

    /// Why it cannot be carried at all, one line.
    pub fn too_large(&self) -> Option<String> {
        let (path, bytes) = self
            .largest
            .as_ref()
            .filter(|(_, bytes)| *bytes > MOST_DELETED)?;
        Some(format!(
            "the deleted file {} that is still open takes {} MiB, of which CRIU carries at most {} MiB: close it first",
            path.display(),
            bytes >> 20,
            MOST_DELETED >> 20
        ))
    }

    /// Why the container cannot keep a limit, one line; `None` if it can.
    pub fn breaks(&self, limit: Duration, link: Option<f64>) -> Option<String> {
        let time = self.time(link);
        (time > limit).then(|| {
            format!(
                "{self} would be carried while the container stands still, for about {} ms; the downtime limit is {} ms: free some of it, or raise --downtime-limit",
                time.as_millis(),
                limit.as_millis()
            )
        })
    }

    /// Open files that have no name any more.
    fn deleted_descriptors(&mut self, process: &Path, seen: &mut BTreeSet<(u64, u64)>) {
        for descriptor in fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = descriptor.path();
            let Ok(target) = fs::read_link(&path) else {
                continue;
            };
            if is_deleted_file(&target)
                && let Ok(file) = fs::metadata(&path)
            {
                self.deleted_file(&target, &file, seen);
            }
        }
    }

    /// Mapped files that have no name any more, and memory that is shared and is no file at all.
    fn mappings(
        &mut self,
        process: &Path,
        seen: &mut BTreeSet<(u64, u64)>,
        shared: &mut BTreeMap<(String, u64), u64>,
    ) {
        let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
        for line in maps.lines().filter(|line| line.ends_with(" (deleted)")) {
            let mut fields = line.split_ascii_whitespace();
            let (Some(range), Some(_), Some(_), Some(device), Some(inode)) = (
                fields.next(),
                fields.next(),
                fields.next(),
                fields.next(),
                fields.next(),
            ) else {
                continue;
            };
            let target = Path::new(line.find('/').map_or("", |start| &line[start..]));
            if is_deleted_file(target) {
                if let Ok(file) = fs::metadata(process.join("map_files").join(range)) {
                    self.deleted_file(target, &file, seen);
                }
            } else if let (Some((start, end)), Ok(inode)) = (range.split_once('-'), inode.parse()) {
                let number = |text| u64::from_str_radix(text, 16).unwrap_or(0);
                let bytes = number(end).saturating_sub(number(start));
                let most = shared.entry((device.to_owned(), inode)).or_insert(0);
                *most = bytes.max(*most);
            }
        }
    }

    fn deleted_file(&mut self, target: &Path, file: &Metadata, seen: &mut BTreeSet<(u64, u64)>) {
        if !file.is_file() || file.nlink() > 0 || !seen.insert((file.dev(), file.ino())) {
            return;
        }
        // What it takes, not how long it is: CRIU leaves holes out.
        let bytes = file.blocks() * 512;
        self.deleted += bytes;
        if self
            .largest
            .as_ref()
            .is_none_or(|(_, largest)| bytes > *largest)
        {
            let name = target.to_string_lossy();
            let name = name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned();
            self.largest = Some((name.into(), bytes));
        }
    }
}

/// `60 MiB in tmpfs, 200 MiB in deleted files`.
impl std::fmt::Display for Burden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        for (bytes, what) in [
            (self.tmpfs, "in tmpfs"),
            (self.deleted, "in deleted files that are open"),
            (self.shared, "of shared memory"),
        ] {
            if bytes >> 20 > 0 {
                parts.push(format!("{} MiB {what}", bytes >> 20));
            }
        }
        if self.time_of_threads() > WORTH_SAYING {
            parts.push(format!("{} further threads", self.threads));
        }
        f.write_str(&parts.join(", "))
    }
}

/// Whether a link in `/proc` leads to a file that was on a filesystem. Memory of other kinds is called deleted too.
fn is_deleted_file(target: &Path) -> bool {
    let text = target.to_string_lossy();
    let memory = ["/memfd:", "/SYSV", "/dev/zero (deleted)", "/anon_hugepage"];
    text.starts_with('/')
        && text.ends_with(" (deleted)")
        && !memory.iter().any(|kind| text.starts_with(kind))
}

/// Bytes used on the tmpfs mounts of a process's mount namespace that are nobody else's.
fn tmpfs_bytes(process: &Path, host: &BTreeSet<String>, seen: &mut BTreeSet<(u64, u64)>) -> u64 {
    let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
    let of_mount = |mount: &Mount<'_>| {
        let path = process
            .join("root")
            .join(mount.point.trim_start_matches('/'));
        let device = fs::metadata(&path).ok()?.dev();
        let is_it = format!("{}:{}", libc::major(device), libc::minor(device)) == mount.device;
        // Inode 0 stands for the whole of it.
        if !is_it || !seen.insert((device, 0)) {
            return None;
        }
        let used = statvfs(&path).ok()?;
        Some((used.blocks() - used.blocks_free()) * used.fragment_size())
    };
    // A tmpfs of the host that is bound into the container stays where it is.
    Mount::all(&mounts)
        .filter(|mount| mount.kind == "tmpfs" && !host.contains(mount.device))
        .collect::<Vec<_>>()
        .iter()
        .filter_map(of_mount)
        .sum()
}

fn devices_here() -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    Mount::all(&mounts)
        .map(|mount| mount.device.to_owned())
        .collect()
}

/// A line of mountinfo: `36 35 98:0 /root /point options - kind source super`.
struct Mount<'a> {
    device: &'a str,
    point: String,
    kind: &'a str,
}

impl Mount<'_> {
    fn all(text: &str) -> impl Iterator<Item = Mount<'_>> {
        text.lines().filter_map(|line| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(2);
            Some(Mount {
                device: fields.next()?,
                point: fields.nth(1)?.replace("\\040", " "),
                kind: filesystem.split(' ').next()?,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deleted_file_counts_by_what_it_takes_and_not_by_its_length() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 3 << 20], 20 << 30).unwrap();
        file.sync_all().unwrap();
        let me = Task::read(std::process::id().cast_signed())
            .unwrap()
            .unwrap();
        let burden = Burden::of(&[me]);
        let (_, largest) = burden.largest.clone().expect("the file is found");
        assert!((3 << 20..64 << 20).contains(&largest), "{burden:?}");
        assert_eq!(burden.too_large(), None);
    }

    #[test]
    fn a_burden_is_refused_by_its_figures_where_a_limit_was_asked_for() {
        let burden = Burden {
            tmpfs: 60 << 20,
            ..Burden::default()
        };
        let why = burden.breaks(Duration::from_millis(300), None).unwrap();
        assert!(
            why.contains("60 MiB in tmpfs") && why.contains("2400 ms"),
            "{why}"
        );
        assert_eq!(burden.breaks(Duration::from_secs(3), None), None);
        // A slow link carries 60 MiB in a minute.
        assert!(burden.breaks(Duration::from_secs(3), Some(256.0)).is_some());

        let burden = Burden {
            deleted: 5 << 30,
            largest: Some(("/tmp/g".into(), 5 << 30)),
            ..Burden::default()
        };
        assert!(burden.too_large().unwrap().contains("/tmp/g"));
    }

    #[test]
    fn a_mount_is_read_from_its_line() {
        let line = "40 22 0:51 / /dev/sh\\040m rw,nosuid shared:1 - tmpfs shm rw,size=65536k\n";
        let mount = Mount::all(line).next().unwrap();
        assert_eq!((mount.device, mount.kind), ("0:51", "tmpfs"));
        assert_eq!(mount.point, "/dev/sh m");
    }
}
