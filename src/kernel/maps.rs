//! The mappings of a process: `/proc/PID/maps`, told apart as far as dirty tracking needs.
//!
//! A pid enters, the list of its [`Vma`]s in address order leaves. `maps` does not say which mappings are huge pages
//! or devices; `smaps` does, but walks every page table to do so (hundreds of milliseconds for a big process). So each
//! distinct mapped file is asked instead, through `/proc/PID/map_files`, once per [`FileKinds`].
//!
//! The parser is ours and works on bytes: file names in `maps` are chosen by the container, and the `procfs` crate
//! refuses those that are not UTF-8 and panics on a short `/SYSV`.

use crate::memory::{PageRange, VirtAddr};
use nix::errno::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

/// One mapping of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// The pages it covers.
    pub range: PageRange,
    /// `PROT_READ`.
    pub readable: bool,
    /// `PROT_WRITE`.
    pub writable: bool,
    /// `PROT_EXEC`.
    pub executable: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// What is mapped.
    pub kind: VmaKind,
}

/// What a mapping maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmaKind {
    /// Memory without a file (also a private mapping of `/dev/zero`).
    Anonymous,
    /// The brk heap.
    Heap,
    /// The stack of the first thread.
    Stack,
    /// A file on a disk, in tmpfs or in a memfd.
    File {
        /// Device the file is on, major and minor.
        dev: (u32, u32),
        /// Inode on that device.
        inode: u64,
    },
    /// Huge pages of hugetlbfs (not transparent huge pages, which are ordinary memory).
    Hugetlb,
    /// A character or block device other than `/dev/zero`.
    Device,
    /// Where libaio's completions are written (`io_setup`).
    AioRing,
    /// The queues of an io_uring.
    IoUring,
    /// The kernel's code for user space.
    Vdso,
    /// The kernel's data for the vdso.
    Vvar,
    /// Another mapping the kernel made for itself (`[uprobes]`, …).
    Special,
}

/// Why the mappings of a process are not known.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    /// The process has exited, or never had user memory.
    #[error("process {pid} has no memory (it has exited)")]
    Exited {
        /// The process.
        pid: i32,
    },
    /// A file of `/proc` could not be read.
    #[error("reading {path}: {error}")]
    Unreadable {
        /// The file.
        path: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// A line of `maps` is not what proc(5) says.
    #[error("/proc/{pid}/maps has a line that is not a mapping: {line:?}")]
    Malformed {
        /// The process.
        pid: i32,
        /// The line, lossily decoded.
        line: String,
    },
}

/// The mappings of `pid` in address order, without the vsyscall page (it belongs to no process).
///
/// While the process runs the list may miss what changes during the call; a mapping that stays put is never missed. A
/// private file mapping that vanishes before its file could be asked is left out.
pub fn read(pid: i32, kinds: &mut FileKinds) -> Result<Vec<Vma>, MapsError> {
    let path = format!("/proc/{pid}/maps");
    let text = std::fs::read(&path).map_err(|error| unreadable(pid, path, error))?;
    if text.is_empty() {
        return Err(MapsError::Exited { pid });
    }
    let mut vmas = Vec::new();
    for line in text.split(|&byte| byte == b'\n').filter(|l| !l.is_empty()) {
        let entry = Entry::parse(line).ok_or_else(|| MapsError::Malformed {
            pid,
            line: String::from_utf8_lossy(line).into_owned(),
        })?;
        let Some(range) = PageRange::from_addrs(VirtAddr(entry.start), VirtAddr(entry.end)) else {
            continue; // the vsyscall page, above every user address
        };
        let Some(kind) = entry.kind(pid, kinds)? else {
            continue;
        };
        vmas.push(Vma {
            range,
            readable: entry.perms[0] == b'r',
            writable: entry.perms[1] == b'w',
            executable: entry.perms[2] == b'x',
            shared: entry.perms[3] == b's',
            kind,
        });
    }
    Ok(vmas)
}

/// The memory a process had at some moment, whatever the process does since.
#[derive(Debug)]
pub struct Image {
    maps: File,
}

impl Image {
    /// The memory `pid` has now.
    pub fn of(pid: i32) -> Result<Image, MapsError> {
        let path = format!("/proc/{pid}/maps");
        match File::open(&path) {
            Ok(maps) => Ok(Image { maps }),
            Err(error) => Err(unreadable(pid, path, error)),
        }
    }

    /// Whether some process still has it: not so when the last of them has exited or called exec.
    pub fn in_use(&self) -> bool {
        // The open file belongs to the memory, not to the pid, and ends at once when that is gone.
        self.maps.read_at(&mut [0], 0).is_ok_and(|read| read > 0)
    }
}

/// What each mapped file turned out to be. Keep one for a round and all its processes, not longer: inodes are reused.
#[derive(Debug, Default)]
pub struct FileKinds {
    known: HashMap<((u32, u32), u64), VmaKind>,
}

impl FileKinds {
    /// Asks the file behind `start..end` of `pid`; `None` if that mapping is gone.
    fn ask(&mut self, pid: i32, entry: &Entry<'_>) -> Result<Option<VmaKind>, MapsError> {
        let key = (entry.dev, entry.inode);
        if let Some(kind) = self.known.get(&key) {
            return Ok(Some(*kind));
        }
        // This link leads to the mapped file itself, whether or not it still has a name.
        let link = format!("/proc/{pid}/map_files/{:x}-{:x}", entry.start, entry.end);
        let kind = match file_kind(&link, entry) {
            Ok(kind) => kind,
            Err(Errno::ENOENT | Errno::ESRCH) => return Ok(None),
            Err(errno) => {
                return Err(MapsError::Unreadable {
                    path: link,
                    error: errno.into(),
                });
            }
        };
        self.known.insert(key, kind);
        Ok(Some(kind))
    }
}

fn file_kind(link: &str, entry: &Entry<'_>) -> Result<VmaKind, Errno> {
    if nix::sys::statfs::statfs(link)?.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC {
        return Ok(VmaKind::Hugetlb);
    }
    let file = std::fs::metadata(link)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    let device = file.file_type().is_char_device() || file.file_type().is_block_device();
    Ok(if device && file.rdev() == libc::makedev(1, 5) {
        VmaKind::Anonymous // drivers/char/mem.c mmap_zero(): a private mapping of /dev/zero is anonymous memory
    } else if device {
        VmaKind::Device
    } else {
        VmaKind::File {
            dev: entry.dev,
            inode: entry.inode,
        }
    })
}

fn unreadable(pid: i32, path: String, error: io::Error) -> MapsError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => MapsError::Exited { pid },
        _ => MapsError::Unreadable { path, error },
    }
}

/// One line: `55d0-55d2 r-xp 00002000 fe:01 1234   /path, which may be absent and may hold any byte but a newline`.
struct Entry<'a> {
    start: u64,
    end: u64,
    perms: [u8; 4],
    dev: (u32, u32),
    inode: u64,
    name: &'a [u8],
}

impl<'a> Entry<'a> {
    fn parse(line: &'a [u8]) -> Option<Entry<'a>> {
        let mut fields = line.splitn(6, |&byte| byte == b' ');
        let mut text = || std::str::from_utf8(fields.next()?).ok();
        let (start, end) = text()?.split_once('-')?;
        let perms = text()?.as_bytes().try_into().ok()?;
        let _offset = text()?;
        let (major, minor) = text()?.split_once(':')?;
        let inode = text()?.parse().ok()?;
        Some(Entry {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            perms,
            dev: (
                u32::from_str_radix(major, 16).ok()?,
                u32::from_str_radix(minor, 16).ok()?,
            ),
            inode,
            name: fields.next().unwrap_or_default().trim_ascii_start(),
        })
    }

    fn kind(&self, pid: i32, kinds: &mut FileKinds) -> Result<Option<VmaKind>, MapsError> {
        if self.inode != 0 {
            // Only private mappings can be tracked, so only their files are worth asking.
            let shared = self.perms[3] == b's';
            return if shared {
                Ok(Some(match self.name {
                    // A filesystem of the kernel's own; a disk has another major number.
                    b"/[aio] (deleted)" if self.dev.0 == 0 => VmaKind::AioRing,
                    b"anon_inode:[io_uring]" => VmaKind::IoUring,
                    _ => VmaKind::File {
                        dev: self.dev,
                        inode: self.inode,
                    },
                }))
            } else {
                kinds.ask(pid, self)
            };
        }
        Ok(Some(match self.name {
            b"[heap]" => VmaKind::Heap,
            b"[stack]" => VmaKind::Stack,
            b"[vdso]" => VmaKind::Vdso,
            // 6.13 split the clock pages off as [vvar_vclock].
            name if name.starts_with(b"[vvar") => VmaKind::Vvar,
            // prctl(PR_SET_VMA_ANON_NAME) gives a process's own memory a name.
            name if name.starts_with(b"[anon:") => VmaKind::Anonymous,
            name if name.starts_with(b"[") => VmaKind::Special,
            _ => VmaKind::Anonymous,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageNumber;

    #[test]
    fn a_line_is_parsed_whatever_bytes_the_file_name_has() {
        let entry =
            Entry::parse(b"7f00-9f00 rw-p 00001000 fe:0a 12345    /SYSV \xff name (deleted)")
                .unwrap();
        assert_eq!((entry.start, entry.end), (0x7f00, 0x9f00));
        assert_eq!(&entry.perms, b"rw-p");
        assert_eq!(entry.dev, (0xfe, 0xa));
        assert_eq!(entry.inode, 12345);
        assert_eq!(entry.name, b"/SYSV \xff name (deleted)");
        assert_eq!(
            Entry::parse(b"1000-2000 r--p 0 00:00 0 ").unwrap().name,
            b""
        );
    }

    #[test]
    fn what_is_not_a_mapping_is_refused() {
        for line in [
            &b""[..],
            b"1000 rw-p 0 00:00 0",
            b"1000-2000 rw- 0 00:00 0",
            b"x-y rw-p 0 00:00 0",
            b"1000-2000 rw-p 0 0000 0",
            b"1000-2000 rw-p 0 00:00 zero",
            b"1000-2000 rw-p 0 00:00",
        ] {
            assert!(
                Entry::parse(line).is_none(),
                "{:?}",
                String::from_utf8_lossy(line)
            );
        }
    }

    #[test]
    fn this_process_has_a_heap_a_stack_code_and_a_vdso() {
        let vmas = read(std::process::id() as i32, &mut FileKinds::default()).unwrap();
        let stack_variable = 0u8;
        let address = VirtAddr(std::ptr::from_ref(&stack_variable) as u64);
        let holding = |page: PageNumber| vmas.iter().find(|vma| vma.range.contains(page)).unwrap();
        assert!(holding(address.page()).readable && holding(address.page()).writable);
        let code = VirtAddr(Entry::parse as *const () as u64).page();
        assert!(holding(code).executable && matches!(holding(code).kind, VmaKind::File { .. }));
        for kind in [VmaKind::Heap, VmaKind::Stack, VmaKind::Vdso, VmaKind::Vvar] {
            assert!(
                vmas.iter().any(|vma| vma.kind == kind),
                "no {kind:?} among {vmas:#?}"
            );
        }
        assert!(
            vmas.windows(2)
                .all(|pair| pair[0].range.end() <= pair[1].range.start())
        );
    }

    #[test]
    fn an_image_is_out_of_use_after_exec() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read go; exec sleep 1000"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let old = Image::of(pid).unwrap();
        assert!(old.in_use());
        drop(child.stdin.take());
        let patience = std::time::Instant::now();
        while old.in_use() {
            assert!(patience.elapsed().as_secs() < 10, "exec was not noticed");
        }
        assert!(Image::of(pid).unwrap().in_use());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_has_gone_is_said_to_have_exited() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        child.wait().unwrap();
        let gone = read(pid, &mut FileKinds::default());
        assert!(matches!(gone, Err(MapsError::Exited { .. })), "{gone:?}");
    }
}
