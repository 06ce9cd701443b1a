//! Making userfaultfds inside other processes, whatever those processes themselves may do.
//!
//! Processes enter; descriptors of userfaultfds that belong to their memory leave. Such a descriptor can only be made by a
//! thread that has the memory, so one thread of each process is made to call userfaultfd(2). It needs no capability for that:
//! the kernel gives everybody one that leaves its own faults alone (`UFFD_USER_MODE_ONLY`), and one that only tracks writes
//! (`WP_ASYNC`) never handles any. Its seccomp filter is suspended meanwhile.
//!
//! ```text
//!   us                                        a thread of the process         every other thread of the container
//!   PTRACE_SEIZE, INTERRUPT all     ────────▶ stops                           stops
//!   save its registers, signal mask, rseq
//!   take the new fd by pidfd_getfd  ◀──────── userfaultfd()                   stands still
//!                                             close()                         stands still
//!   restore, detach all             ────────▶ goes on; a system call it was   goes on
//!                                             in restarts
//! ```
//!
//! For the time between the two calls the descriptor is in the process's table, from which its threads, whoever shares the
//! table, and whoever may trace it could take it. So nothing of the container runs then. Nothing of ours enters the process,
//! no memory of it is written, and what the calls gave is read from registers.
//!
//! Its code is never changed: a `syscall` instruction it already has is used. Signals that arrive meanwhile wait, as
//! every signal is blocked, and are delivered after. Nothing that a process of the container could make wait for ever is
//! waited for: memory is only read where it is present, and a call that does not come back ends the standstill of the others,
//! who may be what it waits for. If the engine is killed in those few hundred microseconds the thread
//! runs on with foreign registers; nothing the kernel offers prevents that.
#![allow(unsafe_code)]

use super::arch::{Registers, SYSCALL_INSTRUCTION};
use super::maps::{self, FileKinds, MapsError, VmaKind};
use super::pagemap::{Pagemap, ScanError};
use super::pidfd::{Pidfd, PidfdError};
use super::ptrace::{
    HaltedBy, Standstill, StopError, StoppedThread, TraceOptions, Tracer, living_thread,
    living_threads, trace_within,
};
use super::userfaultfd::NEW_FLAGS;
use crate::memory::{PAGE_SIZE, PageRange, VirtAddr};
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// What came of making userfaultfds.
#[derive(Debug)]
pub struct Injected {
    /// For each memory asked for a userfaultfd not yet given its features, in this process only, or why there is none. Where
    /// there is none the process goes on as it was.
    pub each: Vec<Result<OwnedFd, InjectError>>,
    /// How many threads stood still.
    pub threads: usize,
    /// How long at a time, at most.
    pub stopped: Duration,
}

/// The threads that must not run while a descriptor of ours is in a table of theirs, listed anew at each call.
pub type Everyone = Box<dyn FnMut() -> io::Result<Vec<i32>> + Send>;

/// Why no userfaultfd was made. The process goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// A thread could not be stopped or was lost while stopped.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// A descriptor could not be taken.
    #[error(transparent)]
    Pidfd(#[from] PidfdError),
    /// The mappings are not known.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// The process runs 32-bit code.
    #[error("process {pid} runs 32-bit code")]
    NotNative {
        /// The process.
        pid: i32,
    },
    /// No system call instruction was found in the process's code.
    #[error("process {pid} has no system call instruction to use")]
    NoSyscallInstruction {
        /// The process.
        pid: i32,
    },
    /// A system call failed inside the process (`EMFILE`: it has no free descriptor).
    #[error("{call} inside process {pid}: {errno}")]
    Call {
        /// The system call.
        call: &'static str,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The injected code raised a signal.
    #[error("process {pid} raised signal {signal} in an injected system call")]
    Fault {
        /// The process.
        pid: i32,
        /// The signal.
        signal: i32,
    },
    /// A call did not come back in time. It was waited for and undone.
    #[error("process {pid} took more than {} ms for a system call", CALL_PATIENCE.as_millis())]
    Late {
        /// The process.
        pid: i32,
    },
    /// The process made something else than was asked for.
    #[error("process {pid} gave {what} for a userfaultfd")]
    NotUserfaultfd {
        /// The process.
        pid: i32,
        /// What the descriptor is of.
        what: String,
    },
    /// Our side of the exchange failed.
    #[error("{what} process {pid}: {errno}")]
    Exchange {
        /// What was being done.
        what: &'static str,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl InjectError {
    /// Whether the process (or the thread) had simply exited.
    pub fn exited(&self) -> bool {
        matches!(
            self,
            InjectError::Stop(StopError::Exited { .. })
                | InjectError::Pidfd(PidfdError::Exited { .. })
                | InjectError::Maps(MapsError::Exited { .. })
        )
    }
}

/// Makes a userfaultfd in each of several memories while `everyone`, in which the processes must be, stands still: all in one
/// standstill, or in several with pauses between where there are many, as none may become long. A memory is named by its processes: the first of which a thread can be stopped is the way in. Each thread may take `patience` to stop.
///
/// Needs `CAP_SYS_ADMIN` and `CAP_SYS_PTRACE`, and not to run under seccomp.
pub fn userfaultfds(
    memories: Vec<Vec<i32>>,
    everyone: Everyone,
    patience: Duration,
) -> Result<Injected, StopError> {
    let count = memories.len();
    let asked = memories.clone();
    let in_all = patience + TRACE_PATIENCE + EACH_PATIENCE * count as u32;
    let mut injected = trace_within(in_all, move |tracer| {
        make_all(tracer, &memories, everyone, patience)
    })??;
    debug_assert_eq!(injected.each.len(), count);
    for (made, pids) in injected.each.iter_mut().zip(&asked) {
        if let Err(error) = made
            && !error.exited()
            && pids.iter().all(|&pid| is_dying(pid))
        {
            *error = InjectError::Stop(StopError::Exited { tid: pids[0] });
        }
    }
    Ok(injected)
}

/// How long a call in a process may take until the others run on.
const CALL_PATIENCE: Duration = Duration::from_millis(500);

/// How long all of it may take, beside waiting for threads to stop.
const TRACE_PATIENCE: Duration = Duration::from_secs(10);
const EACH_PATIENCE: Duration = Duration::from_millis(20);

/// How long a standstill lasts in which all that is to be done has not been: this, or as long as it took to come to.
const STANDSTILL: Duration = Duration::from_millis(5);

/// A process that is killed while it is worked on fails in any of a dozen ways; what it is in truth shows as soon
/// as the kernel is done with it.
fn is_dying(pid: i32) -> bool {
    (0..200).any(|_| {
        let gone = living_thread(pid).is_err();
        if !gone {
            std::thread::sleep(Duration::from_millis(1));
        }
        gone
    })
}

fn make_all(
    tracer: &Tracer,
    memories: &[Vec<i32>],
    mut everyone: Everyone,
    patience: Duration,
) -> Result<Injected, StopError> {
    let mut injected = Injected {
        each: Vec::with_capacity(memories.len()),
        threads: 0,
        stopped: Duration::ZERO,
    };
    loop {
        let began = Instant::now();
        let standstill = tracer.hold(&mut everyone, TraceOptions::INJECT, patience)?;
        let enough = STANDSTILL.max(began.elapsed()) + began.elapsed();
        for pids in &memories[injected.each.len()..] {
            injected.each.push(make(&standstill, pids, patience));
            if began.elapsed() > enough {
                break;
            }
        }
        injected.threads = injected.threads.max(standstill.threads());
        drop(standstill);
        injected.stopped = injected.stopped.max(began.elapsed());
        if injected.each.len() == memories.len() {
            return Ok(injected);
        }
        // As long as it stood still it runs.
        std::thread::sleep(began.elapsed());
    }
}

/// Makes one userfaultfd, unless the standstill has been ended because a call was late.
fn make(
    standstill: &Standstill<'_>,
    pids: &[i32],
    patience: Duration,
) -> Result<OwnedFd, InjectError> {
    let mut reason = StopError::Exited { tid: pids[0] };
    // A vfork parent cannot be stopped while it waits, but the child it waits for has the same memory.
    for &pid in pids {
        let threads = match living_threads(pid) {
            Ok(threads) => threads,
            Err(StopError::Exited { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        if standstill.is_over() {
            return Err(InjectError::Late { pid });
        }
        // The leader is the first; the descriptors of a process whose leader has exited can only be reached through another.
        match threads.iter().find_map(|&tid| standstill.thread(tid)) {
            Some(thread) => return make_in(standstill, thread, pid),
            None => {
                reason = StopError::Uninterruptible {
                    tid: pid,
                    waited: patience,
                };
            }
        }
    }
    Err(reason.into())
}

fn make_in(
    standstill: &Standstill<'_>,
    thread: &StoppedThread<'_>,
    pid: i32,
) -> Result<OwnedFd, InjectError> {
    let pidfd = if thread.tid() == pid {
        Pidfd::open(pid)?
    } else {
        Pidfd::open_thread(thread.tid())?
    };
    let mut hands = Hijacked::take(standstill, thread, pid)?;
    let there = hands.call(
        "userfaultfd",
        libc::SYS_userfaultfd,
        [NEW_FLAGS as u64, 0, 0, 0, 0, 0],
    )?;
    let taken = pidfd.getfd(there as RawFd);
    hands.call("close", libc::SYS_close, [there, 0, 0, 0, 0, 0])?;
    hands.release()?;
    let taken = taken?;
    if standstill.is_over() {
        return Err(InjectError::Late { pid });
    }
    is_userfaultfd(&taken, pid)?;
    Ok(taken)
}

/// No call is made on a descriptor that may be of anything: on some files it would wait for whoever serves them.
fn is_userfaultfd(fd: &OwnedFd, pid: i32) -> Result<(), InjectError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let link = link
        .map_err(|error| exchange_error(pid, pid, "looking at what came from", errno_of(&error)))?;
    if link.as_os_str() != "anon_inode:[userfaultfd]" {
        let what = link.display().to_string();
        return Err(InjectError::NotUserfaultfd { pid, what });
    }
    Ok(())
}

/// A stopped thread that makes system calls for us. Dropping it puts everything back.
struct Hijacked<'s, 't> {
    standstill: &'s Standstill<'t>,
    thread: &'s StoppedThread<'t>,
    pid: i32,
    memory: Memory,
    registers: Registers,
    signal_mask: u64,
    /// Address and value of the thread's `rseq_cs`. The kernel clears it when the thread runs outside the critical
    /// section it names; the section must still be aborted when the thread goes on inside.
    critical_section: Option<(u64, u64)>,
    instruction: u64,
    /// Everything is back in place.
    in_place: bool,
}

impl<'s, 't> Hijacked<'s, 't> {
    fn take(
        standstill: &'s Standstill<'t>,
        thread: &'s StoppedThread<'t>,
        pid: i32,
    ) -> Result<Hijacked<'s, 't>, InjectError> {
        let tid = thread.tid();
        let exchange = |what| move |errno| exchange_error(tid, pid, what, errno);
        let memory = Memory::open(tid, pid)?;
        let registers = Registers::read(tid).map_err(exchange("reading the registers of"))?;
        if !registers.native() {
            return Err(InjectError::NotNative { pid });
        }
        let critical_section = match thread.rseq()? {
            // A critical section that the thread is in was entered just now, so that its mark is present.
            Some(rseq) => {
                let mut value = [0; 8];
                let present = memory.read_present(&mut value, rseq + RSEQ_CS)?;
                let value = u64::from_ne_bytes(value);
                (present && value != 0).then_some((rseq + RSEQ_CS, value))
            }
            None => None,
        };
        let instruction = syscall_instruction(tid, &memory, registers.instruction())?
            .ok_or(InjectError::NoSyscallInstruction { pid })?;
        // SIGKILL and SIGSTOP cannot be blocked; the kernel leaves them out.
        let signal_mask = thread.set_signal_mask(u64::MAX)?;
        Ok(Hijacked {
            standstill,
            thread,
            pid,
            memory,
            registers,
            signal_mask,
            critical_section,
            instruction,
            in_place: false,
        })
    }

    fn call(
        &mut self,
        call: &'static str,
        number: libc::c_long,
        args: [u64; 6],
    ) -> Result<u64, InjectError> {
        let tid = self.thread.tid();
        let pid = self.pid;
        self.registers
            .calling(self.instruction, number, args)
            .write(tid)
            .map_err(|errno| self.exchange_error("writing the registers of", errno))?;
        for _entry_then_exit in 0..2 {
            // What it waits for may be one of the others.
            let mut late = || self.standstill.end_for_all_but(tid);
            self.thread
                .run_to_syscall(CALL_PATIENCE, &mut late)
                .map_err(|halted| match halted {
                    HaltedBy::Fault(signal) => InjectError::Fault { pid, signal },
                    HaltedBy::Stop(error) => InjectError::Stop(error),
                })?;
        }
        Registers::read(tid)
            .map_err(|errno| self.exchange_error("reading the registers of", errno))?
            .result()
            .map_err(|errno| InjectError::Call { call, pid, errno })
    }

    /// Puts everything back, so that the thread may go on.
    fn release(mut self) -> Result<(), InjectError> {
        self.put_back()
    }

    fn put_back(&mut self) -> Result<(), InjectError> {
        if self.in_place {
            return Ok(());
        }
        self.in_place = true;
        self.thread.settle()?;
        if let Some((address, value)) = self.critical_section {
            self.memory.write(address, &value.to_ne_bytes())?;
        }
        self.registers
            .write(self.thread.tid())
            .map_err(|errno| self.exchange_error("restoring the registers of", errno))?;
        self.thread.set_signal_mask(self.signal_mask)?;
        Ok(())
    }

    fn exchange_error(&self, what: &'static str, errno: Errno) -> InjectError {
        exchange_error(self.thread.tid(), self.pid, what, errno)
    }
}

/// A thread that is killed while it is stopped is no longer there to be asked (ESRCH), nor is its directory in /proc.
fn exchange_error(tid: i32, pid: i32, what: &'static str, errno: Errno) -> InjectError {
    match errno {
        Errno::ESRCH | Errno::ENOENT => InjectError::Stop(StopError::Exited { tid }),
        errno => InjectError::Exchange { what, pid, errno },
    }
}

impl Drop for Hijacked<'_, '_> {
    fn drop(&mut self) {
        if let Err(error) = self.put_back()
            && !error.exited()
        {
            tracing::error!(pid = self.pid, %error, "a thread could not be put back as it was");
        }
    }
}

/// Offset of `rseq_cs` in `struct rseq` (linux/rseq.h).
const RSEQ_CS: u64 = 8;

/// The memory of a process, of which only what is present is read: what is not might come from a file system or a userfaultfd
/// that a process of the container serves, which stands still.
struct Memory {
    file: File,
    pagemap: Pagemap,
    tid: i32,
    pid: i32,
}

impl Memory {
    fn open(tid: i32, pid: i32) -> Result<Memory, InjectError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{tid}/mem"))
            .map_err(|error| exchange_error(tid, pid, "opening the memory of", errno_of(&error)))?;
        let pagemap = Pagemap::open(tid).map_err(|error| not_scanned(tid, pid, &error))?;
        Ok(Memory {
            file,
            pagemap,
            tid,
            pid,
        })
    }

    /// Reads what is at `address`. `false` if it is not all present or not to be read.
    fn read_present(&self, bytes: &mut [u8], address: u64) -> Result<bool, InjectError> {
        let end = address.saturating_add(bytes.len() as u64);
        let last = VirtAddr(end.saturating_sub(1)).page();
        let first = VirtAddr(address).page();
        let Some(pages) = PageRange::from_start_len(first, last.0 - first.0 + 1) else {
            return Ok(false);
        };
        let mut present = 0;
        let read = self
            .pagemap
            .read(pages, |_, entry| present += u64::from(entry.present()));
        match read {
            Ok(()) => {}
            Err(ScanError::Exited { .. }) => {
                return Err(StopError::Exited { tid: self.tid }.into());
            }
            Err(_) => return Ok(false),
        }
        Ok(present == pages.pages() && self.file.read_exact_at(bytes, address).is_ok())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), InjectError> {
        let written = self.file.write_all_at(bytes, address);
        written.map_err(|error| {
            exchange_error(
                self.tid,
                self.pid,
                "putting back struct rseq of",
                errno_of(&error),
            )
        })
    }
}

fn not_scanned(tid: i32, pid: i32, error: &ScanError) -> InjectError {
    match error {
        ScanError::Exited { .. } => StopError::Exited { tid }.into(),
        _ => exchange_error(tid, pid, "looking at the pages of", Errno::EIO),
    }
}

/// The address of a system call instruction in the thread's code: the one it stands behind, one of the vdso's, or any.
fn syscall_instruction(tid: i32, memory: &Memory, next: u64) -> Result<Option<u64>, InjectError> {
    let behind = next.saturating_sub(SYSCALL_INSTRUCTION.len() as u64);
    let mut code = SYSCALL_INSTRUCTION.map(|_| 0);
    if memory.read_present(&mut code, behind)? && code == SYSCALL_INSTRUCTION {
        return Ok(Some(behind));
    }
    let mut code: Vec<_> = maps::read(tid, &mut FileKinds::default())?
        .into_iter()
        .filter(|vma| vma.executable && vma.kind != VmaKind::Special)
        .collect();
    code.sort_by_key(|vma| vma.kind != VmaKind::Vdso);
    let mut page = [0; PAGE_SIZE as usize];
    for vma in code {
        for part in vma.range.chunks(1) {
            let start = part.start().addr().0;
            // The kernel keeps the vdso itself; it need not have been used yet.
            let read = match vma.kind {
                VmaKind::Vdso => memory.file.read_exact_at(&mut page, start).is_ok(),
                _ => memory.read_present(&mut page, start)?,
            };
            let found = page
                .windows(SYSCALL_INSTRUCTION.len())
                .position(|bytes| bytes == SYSCALL_INSTRUCTION);
            if let (true, Some(offset)) = (read, found) {
                return Ok(Some(start + offset as u64));
            }
        }
    }
    Ok(None)
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
