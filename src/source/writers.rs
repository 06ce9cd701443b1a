//! Who writes to the memory of a container without a page fault, found by looking.
//!
//! A device writes into pages that the kernel pinned when the request began: their protection was lifted *then*, and what
//! lands later leaves no trace in any page table. What was sent of such a page is right only if it was read after the last
//! of it had landed. A request that began after a scan is in the next one. So only those matter that are under way from
//! a scan until its pages are read, and their file is open all that time: one look in between, every round, sees every one.
//!
//! | seen                                                     | then                                                      |
//! |----------------------------------------------------------|-----------------------------------------------------------|
//! | a file open with `O_DIRECT`, or on a filesystem that may not use the page cache (FUSE, 9p, nfs, …) | the memory is in doubt |
//! | a disk, or a device that is not known to be harmless     | the memory is in doubt                                    |
//! | a thread that reads from a file closed meanwhile         | the memory is in doubt                                    |
//! | a ring of libaio                                         | the memory is in doubt                                    |
//! | a thread waiting in `process_vm_writev`                  | all memory is in doubt                                    |
//! | a ring of libaio and a file for direct I/O               | not moved: nobody can tell when such requests are over    |
//! | io_uring, performance events                             | not moved: CRIU cannot take them along                    |
//!
//! What is sent of memory in doubt is compared when the container is frozen
//! ([`Sender::doubt`](super::send::Sender::doubt)). The freezer waits for calls that are under way, so all has landed by then.
//!
//! Not seen: a thread that *runs* in `process_vm_writev`, or writes to `/proc/PID/mem` or by ptrace, and is preempted
//! between pinning a page and writing to it for as long as a scan and the reading behind it take.

use super::tracker::SpaceScan;
use crate::kernel::address_space::shares_files;
use crate::kernel::maps::{self, FileKinds, Vma, VmaKind};
use crate::runtime::Task;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Filesystems whose files are read through the page cache unless `O_DIRECT` says otherwise, so that memory is written by
/// faults; and those that have no files to read. Any other is taken for one that is not.
const CACHED: [&str; 38] = [
    "autofs",
    "bcachefs",
    "binfmt_misc",
    "bpf",
    "btrfs",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "ecryptfs",
    "efivarfs",
    "erofs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "fusectl",
    "hugetlbfs",
    "iso9660",
    "jfs",
    "mqueue",
    "msdos",
    "nsfs",
    "ntfs3",
    "overlay",
    "proc",
    "pstore",
    "ramfs",
    "rootfs",
    "securityfs",
    "squashfs",
    "sysfs",
    "tmpfs",
    "vfat",
    "xfs",
];

/// What a task cannot be moved with.
#[derive(Debug, Error)]
#[error("process {vpid} ({command}) in container {container} {what}")]
pub struct Unmovable {
    /// The process, as the container knows it.
    vpid: i32,
    /// Its program.
    command: String,
    /// The container.
    container: String,
    /// What it has.
    what: Holds,
}

/// What a process holds that keeps it here.
#[derive(Debug, Error)]
enum Holds {
    #[error("uses io_uring, which CRIU cannot take along: have it use other I/O, or end it first")]
    IoUring,
    #[error("counts performance events, which CRIU cannot take along: end that first")]
    PerfEvents,
    #[error(
        "uses libaio and has {} open for direct I/O, and nobody can tell when such I/O is over: have it use other I/O (as by innodb_use_native_aio=OFF), or end it first",
        .0.display()
    )]
    DirectAio(PathBuf),
}

/// Whether copies of memory that were read in a round may be older than they look.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Doubt {
    /// No.
    None,
    /// Those of the memory looked at.
    Own,
    /// Those of any process's memory.
    All,
}

/// One look at a container's processes; what it learns of mounts is true for a moment only.
#[derive(Debug)]
pub struct Look<'a> {
    container: &'a str,
    /// Whether the files of a mount, by its id, are read through the page cache.
    cached: HashMap<u64, bool>,
}

/// What was seen of one process.
#[derive(Debug, Default)]
struct Seen {
    direct: Option<PathBuf>,
    writes_to_others: bool,
}

impl<'a> Look<'a> {
    /// A look at the processes of this container.
    pub fn at(container: &'a str) -> Look<'a> {
        Look {
            container,
            cached: HashMap::new(),
        }
    }

    /// Looks at processes that are one memory, with these mappings. What exits meanwhile writes no more.
    pub fn look(&mut self, tasks: &[&Task], vmas: &[Vma]) -> Result<Doubt, Unmovable> {
        let has = |kind| vmas.iter().any(|vma| vma.kind == kind);
        let aio = has(VmaKind::AioRing);
        let mut doubt = if aio { Doubt::Own } else { Doubt::None };
        for task in tasks.iter().filter(|task| !task.zombie) {
            let unmovable = |what| Unmovable {
                vpid: task.vpid,
                command: command(task.pid),
                container: self.container.to_owned(),
                what,
            };
            if has(VmaKind::IoUring) {
                return Err(unmovable(Holds::IoUring));
            }
            let seen = look_at_process(task.pid, &mut self.cached).map_err(unmovable)?;
            if let Some(file) = seen.direct {
                if aio {
                    return Err(unmovable(Holds::DirectAio(file)));
                }
                doubt = doubt.max(Doubt::Own);
            }
            if seen.writes_to_others {
                doubt = Doubt::All;
            }
        }
        Ok(doubt)
    }

    /// Which of these processes keep the container here, each looked at by itself.
    pub fn unmovable(&mut self, tasks: &[Task]) -> Vec<Unmovable> {
        let mut kinds = FileKinds::default();
        let living = tasks.iter().filter(|task| !task.zombie);
        living
            .filter_map(|task| {
                // A process whose mappings are not known is gone, or found out by who must know them.
                let vmas = maps::read(task.pid, &mut kinds).ok()?;
                self.look(&[task], &vmas).err()
            })
            .collect()
    }
}

/// The processes whose memory a scan is of.
pub fn sharing<'t>(scan: &SpaceScan, tasks: &'t [Task]) -> Vec<&'t Task> {
    let of_it = |task: &&Task| task.vpid == scan.vpid || scan.sharers.contains(&task.vpid);
    tasks.iter().filter(of_it).collect()
}

fn look_at_process(pid: i32, cached: &mut HashMap<u64, bool>) -> Result<Seen, Holds> {
    let mut seen = Seen::default();
    let process = PathBuf::from(format!("/proc/{pid}"));
    // Threads share one table of descriptors, but for those that were made otherwise.
    let mut tables: Vec<i32> = Vec::new();
    for thread in numbers_in(&process.join("task")) {
        if !tables.iter().any(|other| shares_files(*other, thread)) {
            tables.push(thread);
        }
        look_at_thread(&process, thread, &mut seen);
    }
    for thread in tables {
        let thread = process.join(format!("task/{thread}"));
        look_at_table(&thread, cached, &mut seen)?;
    }
    Ok(seen)
}

/// A thread that sleeps in a call is in it until that ends, whatever becomes of the descriptor it was made with.
fn look_at_thread(process: &Path, thread: i32, seen: &mut Seen) {
    let thread = process.join(format!("task/{thread}"));
    let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
    let sleeps = stat
        .rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('D'));
    if !sleeps {
        return;
    }
    let Some((call, first)) =
        call_of(&fs::read_to_string(thread.join("syscall")).unwrap_or_default())
    else {
        return;
    };
    if call == libc::SYS_process_vm_writev {
        seen.writes_to_others = true;
    }
    let reads = [
        libc::SYS_read,
        libc::SYS_pread64,
        libc::SYS_readv,
        libc::SYS_preadv,
        libc::SYS_preadv2,
        libc::SYS_ioctl,
    ];
    let descriptor = format!("fd/{}", first.cast_signed() as i32);
    if reads.contains(&call) && fs::read_link(thread.join(descriptor)).is_err() {
        seen.direct = Some(PathBuf::from("a file closed meanwhile"));
    }
}

/// The call, and its first argument, in a line of `/proc/PID/syscall` ("35 0x7ffc… 0x7ffc… …", "running", "-1 …").
fn call_of(line: &str) -> Option<(libc::c_long, u64)> {
    let mut words = line.split_whitespace();
    let call = words.next()?.parse().ok()?;
    let first = words.next()?.strip_prefix("0x")?;
    (call >= 0).then_some((call, u64::from_str_radix(first, 16).ok()?))
}

fn look_at_table(
    thread: &Path,
    cached: &mut HashMap<u64, bool>,
    seen: &mut Seen,
) -> Result<(), Holds> {
    for number in numbers_in(&thread.join("fd")) {
        let Ok(target) = fs::read_link(thread.join(format!("fd/{number}"))) else {
            continue; // closed
        };
        match target.as_os_str().as_bytes() {
            b"anon_inode:[io_uring]" => return Err(Holds::IoUring),
            b"anon_inode:[perf_event]" => return Err(Holds::PerfEvents),
            name if !name.starts_with(b"/") => continue,
            _ => {}
        }
        if seen.direct.is_none() && is_direct(thread, number, &target, cached).unwrap_or(true) {
            seen.direct = Some(target);
        }
    }
    Ok(())
}

/// Whether what is read through a descriptor may get into memory by other ways than a copy. An error says that it is not known.
fn is_direct(
    thread: &Path,
    number: i32,
    target: &Path,
    cached: &mut HashMap<u64, bool>,
) -> io::Result<bool> {
    let info = match fs::read_to_string(thread.join(format!("fdinfo/{number}"))) {
        Ok(info) => info,
        Err(error) if is_gone(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let field = |name| {
        info.lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    let flags = field("flags:").and_then(|text| i32::from_str_radix(text, 8).ok());
    if flags.ok_or_else(malformed)? & libc::O_DIRECT != 0 {
        return Ok(true);
    }
    // Memory with a name lies on a mount that nobody sees.
    if is_memory(target.as_os_str()) {
        return Ok(false);
    }
    let mount: u64 = field("mnt_id:")
        .and_then(|text| text.parse().ok())
        .ok_or_else(malformed)?;
    if !cached.contains_key(&mount) {
        cached.extend(mounts(&fs::read_to_string(thread.join("mountinfo"))?));
    }
    if cached.get(&mount) != Some(&true) {
        return Ok(true);
    }
    // It is asked only where no server has to answer.
    let file = match fs::metadata(thread.join(format!("fd/{number}"))) {
        Ok(file) => file,
        Err(error) if is_gone(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    let kind = file.file_type();
    Ok(kind.is_block_device() || kind.is_char_device() && !is_harmless(libc::major(file.rdev())))
}

/// memfds, System V shared memory, shared anonymous memory.
fn is_memory(target: &OsStr) -> bool {
    let name = target.as_bytes();
    [&b"/memfd:"[..], b"/SYSV", b"/dev/zero (deleted)"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// Character devices that copy: memory devices (`/dev/null`, `urandom`), terminals and their masters.
fn is_harmless(major: u32) -> bool {
    matches!(major, 1 | 4 | 5 | 128..=143)
}

/// Each mount of a `mountinfo`, by id, with whether its files are read through the page cache.
fn mounts(mountinfo: &str) -> impl Iterator<Item = (u64, bool)> {
    mountinfo.lines().filter_map(|line| {
        let id = line.split(' ').next()?.parse().ok()?;
        let (_, rest) = line.split_once(" - ")?;
        let kind = rest.split(' ').next()?;
        Some((id, CACHED.contains(&kind)))
    })
}

/// The numbers that entries of a directory of `/proc` are named by; none of what is gone.
fn numbers_in(directory: &Path) -> Vec<i32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn command(pid: i32) -> String {
    let comm = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(&comm)
        .trim_end()
        .escape_debug()
        .to_string()
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;

    fn own() -> Task {
        Task::read(std::process::id().cast_signed())
            .unwrap()
            .unwrap()
    }

    fn seen() -> Result<Doubt, Unmovable> {
        let task = own();
        let vmas = maps::read(task.pid, &mut FileKinds::default()).unwrap();
        Look::at("web").look(&[&task], &vmas)
    }

    #[test]
    fn calls_are_read_with_their_first_argument() {
        assert_eq!(
            call_of("17 0x3 0x7ffc20 0x10 0x0 0x0 0x0 0x7ffc00 0x7f00"),
            Some((17, 3))
        );
        for line in ["running", "-1 0x7ffc00 0x7f00", "", "17", "17 x"] {
            assert_eq!(call_of(line), None, "{line:?}");
        }
    }

    #[test]
    fn only_known_filesystems_are_taken_for_cached() {
        let text = "36 35 98:0 /m /m rw,noatime shared:1 - ext4 /dev/root rw\n\
                    37 35 0:33 / /n rw - fuse.sshfs server rw\n38 35 0:34 / /x rw master:2 - nfs4 s:/ rw\n\
                    39 35 0:35 / /o rw - overlay overlay rw\nnonsense\n";
        let found: Vec<(u64, bool)> = mounts(text).collect();
        assert_eq!(found, [(36, true), (37, false), (38, false), (39, true)]);
    }

    /// One test: all of them are about the descriptors of this process.
    #[test]
    fn direct_files_of_any_thread_are_seen_and_packets_are_not() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("file");
        fs::write(&path, [1; 4096]).unwrap();
        let direct = || {
            let mut seen = Seen::default();
            let thread = PathBuf::from(format!("/proc/self/task/{}", nix::unistd::gettid()));
            look_at_table(&thread, &mut HashMap::new(), &mut seen).unwrap();
            seen.direct
        };
        let (_read, _write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_DIRECT).unwrap();
        let _plain = File::open(&path).unwrap();
        let _random = File::open("/dev/urandom").unwrap();
        assert_eq!(direct(), None);
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .unwrap();
        assert_eq!(direct(), Some(path));
        assert_eq!(seen().unwrap(), Doubt::Own);
        drop(file);
        assert_eq!(direct(), None);
    }

    #[test]
    fn what_keeps_a_process_here_is_said_with_its_name() {
        let said = Unmovable {
            vpid: 7,
            command: "mysqld".into(),
            container: "db".into(),
            what: Holds::DirectAio("/data/ib".into()),
        }
        .to_string();
        assert!(
            said.starts_with(
                "process 7 (mysqld) in container db uses libaio and has /data/ib open"
            ),
            "{said}"
        );
    }
}
