//! Making a userfaultfd inside another process, whatever that process itself may do.
//!
//! A pid and the open `/dev/userfaultfd` enter; a descriptor of a userfaultfd that belongs to that process's memory
//! leaves. Such a descriptor can only be made by a thread that has the memory, so one thread of the process is stopped
//! and made to make a few system calls. It needs no capability for them, and its seccomp filter is suspended meanwhile:
//!
//! ```text
//!   us                                        the stopped thread
//!   PTRACE_SEIZE, INTERRUPT, save   ────────▶ (registers, signal mask, rseq)
//!                                             mmap        a scratch page
//!                                             socketpair  a ⇄ b
//!   take a by pidfd_getfd, send the device ─▶ recvmsg(b)  /dev/userfaultfd
//!                                             ioctl(USERFAULTFD_IOC_NEW)
//!   take the new fd by pidfd_getfd  ◀──────── close all, munmap
//!   restore, detach                 ────────▶ (goes on; a system call it was in restarts)
//! ```
//!
//! Its code is never changed: a `syscall` instruction it already has is used. Signals that arrive meanwhile wait, as
//! every signal is blocked, and are delivered after. If the engine is killed in those few hundred microseconds the thread
//! runs on with foreign registers; nothing the kernel offers prevents that.
#![allow(unsafe_code)]

use super::arch::{Registers, SYSCALL_INSTRUCTION};
use super::maps::{self, FileKinds, MapsError, VmaKind};
use super::pidfd::{Pidfd, PidfdError};
use super::ptrace::{
    HaltedBy, StopError, StoppedThread, TraceOptions, Tracer, living_thread, trace,
};
use super::userfaultfd::{NEW_FLAGS, USERFAULTFD_IOC_NEW};
use crate::memory::PAGE_SIZE;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// A userfaultfd that belongs to another process's memory, not yet given its features.
#[derive(Debug)]
pub struct ForeignUserfaultfd {
    /// The descriptor, in this process only.
    pub fd: OwnedFd,
    /// How long one thread of the process stood still.
    pub stopped: Duration,
}

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

/// Makes a userfaultfd in the memory of `pid`, waiting at most `patience` for a thread of it to stop.
///
/// `device` is `/dev/userfaultfd`. Needs `CAP_SYS_ADMIN` and `CAP_SYS_PTRACE`, and not to run under seccomp.
pub fn userfaultfd(
    pid: i32,
    device: &File,
    patience: Duration,
) -> Result<ForeignUserfaultfd, InjectError> {
    trace(|tracer| make(tracer, pid, device, patience)).map_err(|error| {
        // A process that is killed while it is worked on fails in any of a dozen ways; what it is in truth shows as soon
        // as the kernel is done with it.
        for _ in 0..200 {
            if error.exited() {
                break;
            }
            if living_thread(pid).is_err() {
                return InjectError::Stop(StopError::Exited { tid: pid });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        error
    })
}

fn make(
    tracer: &Tracer,
    pid: i32,
    device: &File,
    patience: Duration,
) -> Result<ForeignUserfaultfd, InjectError> {
    let tid = living_thread(pid)?;
    // The descriptors of a process whose leader has exited can only be reached through a living thread.
    let pidfd = if tid == pid {
        Pidfd::open(pid)?
    } else {
        Pidfd::open_thread(tid)?
    };
    let stopped_at = Instant::now();
    let mut hands = Hijacked::take(tracer.stop(tid, TraceOptions::INJECT, patience)?, pid)?;
    let mut fds = Vec::new();
    let made = exchange(&mut hands, &pidfd, device, &mut fds);
    for fd in fds {
        hands.call("close", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0])?;
    }
    let made = made?;
    hands.release()?;
    Ok(ForeignUserfaultfd {
        fd: made,
        stopped: stopped_at.elapsed(),
    })
}

/// The conversation of the module's picture. Every descriptor opened in the process is put in `fds` to be closed.
fn exchange(
    hands: &mut Hijacked<'_>,
    pidfd: &Pidfd,
    device: &File,
    fds: &mut Vec<RawFd>,
) -> Result<OwnedFd, InjectError> {
    let page = hands.call(
        "mmap",
        libc::SYS_mmap,
        [
            0,
            PAGE_SIZE,
            (libc::PROT_READ | libc::PROT_WRITE) as u64,
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64,
            u64::MAX,
            0,
        ],
    )?;
    let made = exchange_over(hands, pidfd, device, fds, page);
    hands.call("munmap", libc::SYS_munmap, [page, PAGE_SIZE, 0, 0, 0, 0])?;
    made
}

fn exchange_over(
    hands: &mut Hijacked<'_>,
    pidfd: &Pidfd,
    device: &File,
    fds: &mut Vec<RawFd>,
    page: u64,
) -> Result<OwnedFd, InjectError> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    hands.call(
        "socketpair",
        libc::SYS_socketpair,
        [libc::AF_UNIX as u64, kind as u64, 0, page, 0, 0],
    )?;
    let pair: [u8; 8] = hands.read(page)?;
    let (a, b) = (fd_at(&pair, 0), fd_at(&pair, 4));
    fds.extend([a, b]);
    let ours = pidfd.getfd(a)?;
    sendmsg::<()>(
        ours.as_raw_fd(),
        &[IoSlice::new(b"u")],
        &[ControlMessage::ScmRights(&[device.as_raw_fd()])],
        MsgFlags::empty(),
        None,
    )
    .map_err(|errno| hands.exchange_error("sending /dev/userfaultfd to", errno))?;

    let message = Message::at(page);
    hands.write(page, &message.bytes)?;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    hands.call(
        "recvmsg",
        libc::SYS_recvmsg,
        [b as u64, page, flags as u64, 0, 0, 0],
    )?;
    // struct cmsghdr is 16 bytes (length, level, type), then the descriptor.
    let control: [u8; 24] = hands.read(message.control)?;
    let header = (
        u64::from_ne_bytes(*control.first_chunk().expect("8 of 24 bytes")),
        fd_at(&control, 12),
    );
    if header != (20, libc::SCM_RIGHTS) {
        return Err(hands.exchange_error("handing /dev/userfaultfd to", Errno::EPROTO));
    }
    let device_there = fd_at(&control, 16);
    fds.push(device_there);

    let uffd = hands.call(
        "ioctl(USERFAULTFD_IOC_NEW)",
        libc::SYS_ioctl,
        [
            device_there as u64,
            USERFAULTFD_IOC_NEW,
            NEW_FLAGS as u64,
            0,
            0,
            0,
        ],
    )? as RawFd;
    fds.push(uffd);
    Ok(pidfd.getfd(uffd)?)
}

/// A `struct msghdr` with one buffer of one byte and room for one descriptor, laid out in a scratch page.
struct Message {
    bytes: [u8; 80],
    /// Where the control message will be.
    control: u64,
}

impl Message {
    fn at(page: u64) -> Message {
        let (iovec, payload, control) = (page + 56, page + 72, page + 80);
        let words = [
            0,       // msg_name
            0,       // msg_namelen
            iovec,   // msg_iov
            1,       // msg_iovlen
            control, // msg_control
            24,      // msg_controllen
            0,       // msg_flags
            payload, // iov_base
            1,       // iov_len
            0,       // the payload
        ];
        let mut bytes = [0; 80];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        Message { bytes, control }
    }
}

fn fd_at(bytes: &[u8], offset: usize) -> RawFd {
    let bytes = bytes[offset..]
        .first_chunk()
        .expect("a descriptor is in the buffer");
    RawFd::from_ne_bytes(*bytes)
}

/// A stopped thread that makes system calls for us. Dropping it puts everything back and lets the thread go on.
struct Hijacked<'t> {
    thread: StoppedThread<'t>,
    pid: i32,
    memory: File,
    registers: Registers,
    signal_mask: u64,
    /// Address and value of the thread's `rseq_cs`. The kernel clears it when the thread runs outside the critical
    /// section it names; the section must still be aborted when the thread goes on inside.
    critical_section: Option<(u64, u64)>,
    instruction: u64,
    /// Nothing has been run yet, or everything is back in place.
    in_place: bool,
}

impl<'t> Hijacked<'t> {
    fn take(thread: StoppedThread<'t>, pid: i32) -> Result<Hijacked<'t>, InjectError> {
        let tid = thread.tid();
        let exchange = |what| move |errno| exchange_error(tid, pid, what, errno);
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{tid}/mem"))
            .map_err(|error| exchange("opening the memory of")(errno_of(&error)))?;
        let registers = Registers::read(tid).map_err(exchange("reading the registers of"))?;
        if !registers.native() {
            return Err(InjectError::NotNative { pid });
        }
        let critical_section = match thread.rseq()? {
            Some(rseq) => {
                let mut value = [0; 8];
                memory
                    .read_exact_at(&mut value, rseq + RSEQ_CS)
                    .map_err(|error| exchange("reading struct rseq of")(errno_of(&error)))?;
                Some((rseq + RSEQ_CS, u64::from_ne_bytes(value))).filter(|(_, value)| *value != 0)
            }
            None => None,
        };
        let instruction = syscall_instruction(tid, &memory, registers.instruction())?
            .ok_or(InjectError::NoSyscallInstruction { pid })?;
        // SIGKILL and SIGSTOP cannot be blocked; the kernel leaves them out.
        let signal_mask = thread.set_signal_mask(u64::MAX)?;
        Ok(Hijacked {
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
            self.thread
                .run_to_syscall()
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

    fn read<const N: usize>(&self, address: u64) -> Result<[u8; N], InjectError> {
        let mut bytes = [0; N];
        self.memory
            .read_exact_at(&mut bytes, address)
            .map_err(|error| {
                self.exchange_error("reading the scratch page of", errno_of(&error))
            })?;
        Ok(bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), InjectError> {
        self.memory
            .write_all_at(bytes, address)
            .map_err(|error| self.exchange_error("writing the scratch page of", errno_of(&error)))
    }

    /// Puts everything back and lets the thread go on.
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
            self.write(address, &value.to_ne_bytes())?;
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

impl Drop for Hijacked<'_> {
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

/// The address of a system call instruction in the thread's code: the one it stands behind, one of the vdso's, or any.
fn syscall_instruction(tid: i32, memory: &File, next: u64) -> Result<Option<u64>, InjectError> {
    let is_syscall = |address: u64| {
        let mut code = SYSCALL_INSTRUCTION.map(|_| 0);
        memory.read_exact_at(&mut code, address).is_ok() && code == SYSCALL_INSTRUCTION
    };
    let behind = next.saturating_sub(SYSCALL_INSTRUCTION.len() as u64);
    if is_syscall(behind) {
        return Ok(Some(behind));
    }
    let mut code: Vec<_> = maps::read(tid, &mut FileKinds::default())?
        .into_iter()
        .filter(|vma| vma.executable)
        .collect();
    code.sort_by_key(|vma| vma.kind != VmaKind::Vdso);
    let mut buffer = vec![0; CODE_CHUNK as usize];
    for chunk in code
        .iter()
        .flat_map(|vma| vma.range.chunks(CODE_CHUNK / PAGE_SIZE))
    {
        let start = chunk.start().addr().0;
        // Code that cannot be read has nothing for us.
        let Ok(read) = memory.read_at(&mut buffer[..chunk.bytes() as usize], start) else {
            continue;
        };
        let found = buffer[..read]
            .windows(SYSCALL_INSTRUCTION.len())
            .position(|bytes| bytes == SYSCALL_INSTRUCTION);
        if let Some(offset) = found {
            return Ok(Some(start + offset as u64));
        }
    }
    Ok(None)
}

/// How much code is searched at once.
const CODE_CHUNK: u64 = 256 * 1024;

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
