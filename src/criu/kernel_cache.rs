//! CRIU's feature cache, and the one bit of it that the engine may set.
//!
//! CRIU refuses an incremental dump where the kernel cannot track dirty pages by soft-dirty. The engine does the
//! tracking itself and needs from CRIU only the *form* of such a dump ([`super::skeleton`]), so it hands CRIU a private
//! copy of the cache in which `has_dirty_track` is set. The copy is proven before it is used: a scratch process is
//! dumped with a synthetic parent, restored, and its memory compared. Where any of that fails there is no copy, and the
//! engine asks for full dumps.
//!
//! The cache is made once per boot, CRIU and kernel, in a directory of the engine's; about a second.

use super::binary::Criu;
use super::environment::{KERNEL_CACHE, ensure_mount_point};
use super::images::{PagePlace, Pagemap};
use super::skeleton::{self, Claim};
use crate::kernel::private_mounts::{self, PrivateMounts};
use crate::memory::{PAGE_SIZE, PageRange, VirtAddr};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use thiserror::Error;

/// A cache file for CRIU, and what may be asked of CRIU with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelCache {
    /// The file to show CRIU as its `criu.kdat`.
    pub file: PathBuf,
    /// How much CRIU can be spared.
    pub skeleton: Skeleton,
}

/// Whether dumps without memory work here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Skeleton {
    /// The kernel has soft-dirty: CRIU does it by itself.
    Native,
    /// Proven with the prepared cache.
    Prepared,
    /// Dumps are full; the reason.
    Unavailable(String),
}

/// Why no cache could be made.
#[derive(Debug, Error)]
pub enum KernelCacheError {
    /// A file of the engine's own could not be used.
    #[error("cannot keep CRIU's kernel cache in {path}: {source}")]
    Store {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// CRIU did not leave a cache.
    #[error("CRIU wrote no kernel cache: {0}")]
    NotWritten(String),
}

impl KernelCache {
    /// The cache for this CRIU on this boot of this kernel, from `directory` or newly made there.
    pub fn prepare(criu: &Criu, directory: &Path) -> Result<KernelCache, KernelCacheError> {
        let store = |path: &Path| {
            let path = path.to_path_buf();
            move |source| KernelCacheError::Store { path, source }
        };
        fs::create_dir_all(directory).map_err(store(directory))?;
        let key = key(criu).map_err(store(directory))?;
        let file = directory.join(format!("{key}.kdat"));
        let verdict_file = directory.join(format!("{key}.verdict"));
        if let (true, Ok(text)) = (file.is_file(), fs::read_to_string(&verdict_file)) {
            return Ok(KernelCache {
                file,
                skeleton: Skeleton::from_text(&text),
            });
        }
        let scratch = Scratch::new(directory).map_err(store(directory))?;
        let honest = written_by_criu(criu)?;
        let (bytes, skeleton) = prove(criu, &honest, &scratch)
            .unwrap_or_else(|why| (honest, Skeleton::Unavailable(why)));
        let staged = scratch.path.join("staged");
        fs::write(&staged, bytes).map_err(store(&staged))?;
        fs::rename(&staged, &file).map_err(store(&file))?;
        // The verdict comes last: without it the cache is made again. A failure may have a cause that passes, such as a
        // full disk, so it is not kept.
        if !skeleton.works() {
            return Ok(KernelCache { file, skeleton });
        }
        fs::write(&staged, skeleton.to_text()).map_err(store(&staged))?;
        fs::rename(&staged, &verdict_file).map_err(store(&verdict_file))?;
        Ok(KernelCache { file, skeleton })
    }
}

impl Skeleton {
    /// Whether dumps need not contain memory.
    pub fn works(&self) -> bool {
        !matches!(self, Skeleton::Unavailable(_))
    }

    fn to_text(&self) -> String {
        match self {
            Skeleton::Native => "native".into(),
            Skeleton::Prepared => "prepared".into(),
            Skeleton::Unavailable(why) => format!("unavailable: {why}"),
        }
    }

    fn from_text(text: &str) -> Skeleton {
        match text {
            "native" => Skeleton::Native,
            "prepared" => Skeleton::Prepared,
            other => Skeleton::Unavailable(other.trim_start_matches("unavailable: ").into()),
        }
    }
}

/// Names a boot, a kernel and a CRIU binary: the cache is good for exactly these.
fn key(criu: &Criu) -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let binary = fs::metadata(criu.path())?;
    Ok(format!(
        "{}-{}-{}-{}",
        boot.trim(),
        criu.version(),
        binary.ino(),
        binary.mtime()
    ))
}

/// What CRIU itself finds out: made on a private tmpfs, for it keeps no cache elsewhere.
fn written_by_criu(criu: &Criu) -> Result<Vec<u8>, KernelCacheError> {
    let not_written = |why: String| KernelCacheError::NotWritten(why);
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", r#""$0" check >/dev/null 2>&1; exec cat "$1""#])
        .arg(criu.path())
        .arg(KERNEL_CACHE);
    PrivateMounts::new()
        .tmpfs(Path::new("/run"))
        .map_err(|error| not_written(error.to_string()))?
        .apply(&mut command);
    let output = command
        .output()
        .map_err(|error| not_written(error.to_string()))?;
    if output.stdout.len() < 64 {
        return Err(not_written(
            String::from_utf8_lossy(&output.stderr).trim().to_string(),
        ));
    }
    Ok(output.stdout)
}

/// A cache with which a dump without memory was seen to work, or why there is none.
fn prove(criu: &Criu, honest: &[u8], scratch: &Scratch) -> Result<(Vec<u8>, Skeleton), String> {
    let file = scratch.path.join("candidate");
    let with = |bytes: &[u8], arguments: &[&str]| -> Result<Output, String> {
        fs::write(&file, bytes).map_err(|error| error.to_string())?;
        run_criu(criu, &file, arguments).map_err(|error| error.to_string())
    };
    let feature = ["check", "--feature", "mem_dirty_track"];
    if with(honest, &feature)?.status.success() {
        canary(criu, &file, scratch, Skeleton::Native)?;
        return Ok((honest.to_vec(), Skeleton::Native));
    }
    // `has_dirty_track` follows two magics, a dev_t, an int and a u64 (criu/include/kerndat.h): offset 32 today. A
    // CRIU that moved it is searched near there.
    for offset in [32].into_iter().chain(8..honest.len().min(160)) {
        if honest[offset] != 0 {
            continue;
        }
        let mut candidate = honest.to_vec();
        candidate[offset] = 1;
        if with(&candidate, &feature)?.status.success() {
            canary(criu, &file, scratch, Skeleton::Prepared)?;
            return Ok((candidate, Skeleton::Prepared));
        }
    }
    Err("CRIU's kernel cache has no dirty-tracking flag where it could be found".into())
}

/// How many pages of the canary CRIU may write to itself, where the kernel's soft-dirty shows it: the code it lends to make
/// system calls, the thread's rseq area and the rest of the time to sleep on the stack (three, seen with 4.1.1 and 4.2.1).
const TOUCHED_BY_CRIU: u64 = 4;

fn run_criu(criu: &Criu, cache: &Path, arguments: &[&str]) -> io::Result<Output> {
    let mut command = Command::new(criu.path());
    command.args(arguments).stdin(Stdio::null());
    ensure_mount_point(Path::new(KERNEL_CACHE))?;
    PrivateMounts::new()
        .bind(cache, Path::new(KERNEL_CACHE))?
        .apply(&mut command);
    command.output()
}

/// Dumps a scratch process without its memory, restores it from memory read beforehand, and compares.
fn canary(criu: &Criu, cache: &Path, scratch: &Scratch, skeleton: Skeleton) -> Result<(), String> {
    let (parent, images) = (scratch.path.join("parent"), scratch.path.join("images"));
    let text = |error: io::Error| format!("the canary dump failed: {error}");
    fs::create_dir(&parent).map_err(text)?;
    fs::create_dir(&images).map_err(text)?;
    let mut bird = Bird::hatch(cache).map_err(text)?;
    let pid = bird.pid();
    let before = bird.memory().map_err(text)?;
    let claims = [Claim {
        pid: pid.cast_signed(),
        vpid: pid.cast_signed(),
        areas: before.iter().map(|area| area.range).collect(),
    }];
    skeleton::write_parent(&parent, &claims).map_err(text)?;
    if skeleton == Skeleton::Native {
        skeleton::forget_writes(&claims).map_err(|error| error.to_string())?;
    }

    let (images_path, pid_text) = (images.display().to_string(), pid.to_string());
    let common = ["--images-dir", &images_path, "--manage-cgroups=ignore"];
    let mut dump = vec![
        "dump",
        "--tree",
        &pid_text,
        "--track-mem",
        "--prev-images-dir",
        "../parent",
    ];
    dump.extend(common);
    expect_success("dump", &bird.run_criu(criu, &dump).map_err(text)?)?;
    bird.reap();

    let pagemap_path = images.join(format!("pagemap-{pid}.img"));
    let mut pagemap = fs::read(&pagemap_path)
        .map_err(|error| error.to_string())
        .and_then(|bytes| Pagemap::parse(&bytes).map_err(|error| error.to_string()))?;
    let pages_path = images.join(format!("pages-{}.img", pagemap.pages_id));
    let dumped = fs::read(&pages_path).map_err(text)?;
    if dumped.len() as u64 > TOUCHED_BY_CRIU * PAGE_SIZE {
        return Err(format!(
            "the canary dump holds {} bytes of memory although its parent claims all",
            dumped.len()
        ));
    }
    let (mut pages, mut dumped) = (Vec::new(), dumped.as_slice());
    for entry in &mut pagemap.entries {
        let short = || format!("the canary dump lacks {}", entry.range);
        if entry.place == PagePlace::Here {
            let length = usize::try_from(entry.range.bytes()).map_err(|_| short())?;
            let (bytes, rest) = dumped.split_at_checked(length).ok_or_else(short)?;
            pages.extend_from_slice(bytes);
            dumped = rest;
        } else {
            pages.extend_from_slice(&bytes_of(&before, entry.range).ok_or_else(short)?);
            entry.place = PagePlace::Here;
        }
    }
    fs::write(&pages_path, pages).map_err(text)?;
    fs::write(&pagemap_path, pagemap.to_bytes()).map_err(text)?;
    fs::remove_file(images.join("parent")).map_err(text)?;

    let mut restore = vec!["restore", "--restore-detached"];
    restore.extend(common);
    let restored = bird.run_criu(criu, &restore).map_err(text)?;
    let verdict = expect_success("restore", &restored).and_then(|()| {
        let after = memory_of(pid).map_err(text)?;
        let heap = |areas: &[Area]| {
            areas
                .iter()
                .find(|area| area.heap)
                .map(|area| area.bytes.clone())
        };
        match (heap(&before), heap(&after)) {
            (Some(before), Some(after)) if before == after => Ok(()),
            _ => Err("the restored canary's heap differs from the dumped one's".to_string()),
        }
    });
    bird.kill_restored();
    verdict
}

fn expect_success(what: &str, output: &Output) -> Result<(), String> {
    if output.status.success() {
        return Ok(());
    }
    // The first error is the cause, the last ones only its echo; a limit CRIU cannot raise is no error of its own.
    let text = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("Error") && !line.contains("rlimit"))
        .collect();
    Err(format!(
        "the canary {what} failed: {}",
        errors.first().map_or("no reason given", |line| line.trim())
    ))
}

/// A scratch process that only sleeps, leader of its own session.
///
/// A session led from outside is more than CRIU can dump where the leader is not in this pid namespace, as for whatever
/// an init process starts that never called setsid. CRIU must see the process in its own mount namespace, too, or it
/// would have to move that.
struct Bird {
    child: Child,
    mounts: File,
}

impl Bird {
    fn hatch(cache: &Path) -> io::Result<Bird> {
        let mut command = Command::new("/bin/sh");
        command
            // Its descriptors, too, must come from its own mount namespace.
            .args(["-c", "exec </dev/null >/dev/null 2>&1; exec sleep 3600"])
            .current_dir("/")
            .stdin(Stdio::null());
        PrivateMounts::new()
            .bind(cache, Path::new(KERNEL_CACHE))?
            .own_session()
            .apply(&mut command);
        let child = command.spawn()?;
        let mounts = File::open(format!("/proc/{}/ns/mnt", child.id()))?;
        let bird = Bird { child, mounts };
        // It must be past its exec and asleep, or the memory read now is not the memory dumped later.
        // An emulated host that has other things to do takes many seconds.
        let deadline = Instant::now() + Duration::from_secs(60);
        while !bird.asleep()? {
            if Instant::now() > deadline {
                let late = "the scratch process does not start";
                return Err(io::Error::new(io::ErrorKind::TimedOut, late));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(bird)
    }

    fn asleep(&self) -> io::Result<bool> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        Ok(stat.contains("(sleep) S "))
    }

    fn run_criu(&self, criu: &Criu, arguments: &[&str]) -> io::Result<Output> {
        let mut command = Command::new(criu.path());
        command.args(arguments).stdin(Stdio::null());
        private_mounts::join(self.mounts.try_clone()?.into(), &mut command);
        command.output()
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn memory(&self) -> io::Result<Vec<Area>> {
        memory_of(self.pid())
    }

    /// After a successful dump CRIU has killed it.
    fn reap(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The restored process has the old pid and no parent here.
    fn kill_restored(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
}

impl Drop for Bird {
    fn drop(&mut self) {
        self.reap();
    }
}

/// One private mapping of the scratch process, with its bytes.
struct Area {
    range: PageRange,
    heap: bool,
    bytes: Vec<u8>,
}

fn memory_of(pid: u32) -> io::Result<Vec<Area>> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut areas = Vec::new();
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let mut fields = line.split_whitespace();
        let (Some(span), Some(permissions)) = (fields.next(), fields.next()) else {
            continue;
        };
        let range = span.split_once('-').and_then(|(start, end)| {
            let start = u64::from_str_radix(start, 16).ok()?;
            let end = u64::from_str_radix(end, 16).ok()?;
            PageRange::from_addrs(VirtAddr(start), VirtAddr(end))
        });
        let Some(range) = range else { continue };
        if !permissions.starts_with('r')
            || line.ends_with("[vvar]")
            || line.contains("[vvar_")
            || line.ends_with("[vsyscall]")
        {
            continue;
        }
        let mut bytes =
            vec![0; usize::try_from(range.bytes()).expect("a mapping of sleep is small")];
        memory.read_exact_at(&mut bytes, range.start().addr().0)?;
        areas.push(Area {
            range,
            heap: line.ends_with("[heap]"),
            bytes,
        });
    }
    Ok(areas)
}

/// The bytes of `range`, which may span adjacent mappings.
fn bytes_of(areas: &[Area], range: PageRange) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for area in areas {
        if let Some(part) = area.range.intersection(range) {
            let start =
                usize::try_from((part.start().0 - area.range.start().0) * PAGE_SIZE).ok()?;
            let length = usize::try_from(part.bytes()).ok()?;
            bytes.extend_from_slice(area.bytes.get(start..start + length)?);
        }
    }
    (bytes.len() as u64 == range.bytes()).then_some(bytes)
}

/// A directory that is gone at the end.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(directory: &Path) -> io::Result<Scratch> {
        let path = directory.join(format!("scratch-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path)?;
        Ok(Scratch { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skeleton_dump_is_proven_on_this_kernel() {
        let criu = Criu::find().expect("this test needs CRIU: run scripts/setup");
        let directory = tempfile::tempdir().unwrap();
        let cache = KernelCache::prepare(&criu, directory.path()).expect("this test needs root");
        assert!(cache.skeleton.works(), "{:?}", cache.skeleton);
        assert_eq!(
            KernelCache::prepare(&criu, directory.path()).unwrap(),
            cache
        );
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            2,
            "nothing else is left"
        );
    }
}
