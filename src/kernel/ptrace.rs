//! Threads of other processes, stopped for a moment without their noticing.
//!
//! `PTRACE_SEIZE` + `PTRACE_INTERRUPT`: no signal is sent, job control is left alone, parents see nothing. A
//! [`StoppedThread`] runs on when it is dropped. A blocking system call is interrupted and restarts by itself (a few,
//! like `epoll_wait`, return `EINTR` instead: signal(7), "Interruption by stop signals").
//!
//! The kernel ties a tracee to one tracer *thread*, and a tracee that has not stopped cannot be let go except by that
//! thread's end. So all tracing happens inside [`trace`], on a thread made for it.
#![allow(unsafe_code)]

use nix::errno::Errno;
use std::collections::HashSet;
use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

/// Leave to trace, given to the closure of [`trace`]; cannot leave its thread.
#[derive(Debug)]
pub struct Tracer {
    _one_thread: PhantomData<*const ()>,
}

/// A thread held in a ptrace stop. Dropping it lets it run on.
#[derive(Debug)]
pub struct StoppedThread<'t> {
    tid: i32,
    _tracer: PhantomData<&'t Tracer>,
}

/// Every thread of a process held in a ptrace stop. Dropping it lets them run on.
#[derive(Debug)]
pub struct StoppedProcess<'t> {
    _threads: Vec<StoppedThread<'t>>,
}

/// Why a thread is not stopped.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum StopError {
    /// It has exited.
    #[error("thread {tid} has exited")]
    Exited {
        /// The thread.
        tid: i32,
    },
    /// It sits in an uninterruptible wait (a `vfork` whose child has not exec'd yet, a disk, a frozen cgroup). It was
    /// let go untouched.
    #[error("thread {tid} did not stop within {} ms: it is in an uninterruptible wait", waited.as_millis())]
    Uninterruptible {
        /// The thread.
        tid: i32,
        /// How long was waited.
        waited: Duration,
    },
    /// Tracing it is not allowed: another debugger has it, or privileges are missing.
    #[error(
        "thread {tid} may not be traced: a debugger holds it or CAP_SYS_PTRACE and CAP_SYS_ADMIN are missing"
    )]
    NotAllowed {
        /// The thread.
        tid: i32,
    },
    /// The kernel refused something else.
    #[error("{what} of thread {tid}: {errno}")]
    Refused {
        /// What was being done.
        what: &'static str,
        /// The thread.
        tid: i32,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// Runs `work` on a thread of its own that may trace. When it returns nothing is traced any more, even what it failed
/// to stop.
pub fn trace<T: Send>(work: impl FnOnce(&Tracer) -> T + Send) -> T {
    std::thread::scope(|scope| {
        let tracer = scope.spawn(|| {
            work(&Tracer {
                _one_thread: PhantomData,
            })
        });
        match tracer.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The most that counts as waited from one look at a thread to the next. If it was longer we did not run meanwhile, as on a
/// host that is overloaded or stood still, and then the thread had no chance to stop either.
const LOOK: Duration = Duration::from_millis(5);

impl Tracer {
    /// Stops thread `tid`, waiting at most `patience` for it.
    ///
    /// # Errors
    /// After [`StopError::Uninterruptible`] the thread stays seized (and runs) until [`trace`] ends.
    pub fn stop(
        &self,
        tid: i32,
        options: TraceOptions,
        patience: Duration,
    ) -> Result<StoppedThread<'_>, StopError> {
        request(libc::PTRACE_SEIZE, tid, 0, options.0 as usize).map_err(|errno| match errno {
            // The kernel also answers so for a thread that is exiting.
            Errno::EPERM if !alive(tid, tid) => StopError::Exited { tid },
            Errno::EPERM => StopError::NotAllowed { tid },
            errno => refused("PTRACE_SEIZE", tid, errno),
        })?;
        request(libc::PTRACE_INTERRUPT, tid, 0, 0)
            .map_err(|errno| refused("PTRACE_INTERRUPT", tid, errno))?;
        let (mut waited, mut looked) = (Duration::ZERO, Instant::now());
        loop {
            let stop = wait(tid, libc::WNOHANG)?;
            waited += looked.elapsed().min(LOOK);
            looked = Instant::now();
            match stop {
                Some(Stop::Event) => break,
                // Signals it was just receiving go on to it; the stop we asked for comes after.
                Some(Stop::Signal(signal)) => resume(libc::PTRACE_CONT, tid, signal)?,
                Some(Stop::Syscall) => resume(libc::PTRACE_CONT, tid, 0)?,
                None if waited > patience => {
                    return Err(StopError::Uninterruptible {
                        tid,
                        waited: patience,
                    });
                }
                // A running thread stops within microseconds; give way first, sleep only if it takes longer.
                None if waited < Duration::from_micros(200) => std::thread::yield_now(),
                None => std::thread::sleep(Duration::from_micros(100)),
            }
        }
        Ok(StoppedThread {
            tid,
            _tracer: PhantomData,
        })
    }

    /// Stops every thread of process `pid`, waiting at most `patience` for each.
    pub fn stop_process(
        &self,
        pid: i32,
        patience: Duration,
    ) -> Result<StoppedProcess<'_>, StopError> {
        let mut threads = Vec::new();
        let mut seen = HashSet::new();
        // A running thread may start others, so list again until a whole pass finds none that is new.
        loop {
            let fresh: Vec<i32> = living_threads(pid)?
                .into_iter()
                .filter(|tid| !seen.contains(tid))
                .collect();
            if fresh.is_empty() {
                return Ok(StoppedProcess { _threads: threads });
            }
            for tid in fresh {
                match self.stop(tid, TraceOptions::NONE, patience) {
                    Ok(thread) => threads.push(thread),
                    Err(StopError::Exited { .. }) => {}
                    Err(error) => return Err(error),
                }
                seen.insert(tid);
            }
        }
    }
}

/// What a seized thread reports besides the stop asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceOptions(libc::c_int);

impl TraceOptions {
    /// Nothing.
    pub const NONE: TraceOptions = TraceOptions(0);
    /// For injecting system calls: they are told from signals, and no seccomp filter sees them while traced.
    pub const INJECT: TraceOptions =
        TraceOptions(libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_SUSPEND_SECCOMP);
}

/// A thread of `pid` that still has the process's memory: its leader, or another if the leader alone has exited.
pub fn living_thread(pid: i32) -> Result<i32, StopError> {
    if alive(pid, pid) {
        return Ok(pid);
    }
    Ok(living_threads(pid)?[0])
}

/// The threads of `pid` that have not exited, at least one, the leader first if it lives.
pub fn living_threads(pid: i32) -> Result<Vec<i32>, StopError> {
    let listed = std::fs::read_dir(format!("/proc/{pid}/task"))
        .map_err(|error| refused("listing the threads", pid, errno_of(&error)))?;
    let mut threads = Vec::new();
    for entry in listed {
        // The process may exit while it is listed.
        let entry = entry.map_err(|error| refused("listing the threads", pid, errno_of(&error)))?;
        let tid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        threads.extend(tid.filter(|&tid: &i32| alive(pid, tid)));
    }
    if threads.is_empty() {
        return Err(StopError::Exited { tid: pid });
    }
    threads.sort_by_key(|&tid| (tid != pid, tid));
    Ok(threads)
}

/// Whether `/proc/PID/task/TID/stat` shows a thread that still has its memory.
fn alive(pid: i32, tid: i32) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    // The state follows the name, which is in parentheses and may hold any byte, these included.
    let state = stat
        .iter()
        .rposition(|&byte| byte == b')')
        .and_then(|end| stat.get(end + 2));
    !matches!(state, None | Some(b'Z' | b'X' | b'x'))
}

impl StoppedThread<'_> {
    /// Its thread id.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Lets it run to the next entry to or exit from a system call. Its memory of signals is kept: those that arrive
    /// and are not blocked are delivered on the way.
    pub(super) fn run_to_syscall(&self) -> Result<(), HaltedBy> {
        let mut signal = 0;
        loop {
            resume(libc::PTRACE_SYSCALL, self.tid, signal)?;
            match wait_blocking(self.tid)? {
                Stop::Syscall => return Ok(()),
                Stop::Event => signal = 0,
                Stop::Signal(
                    fault @ (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGSYS),
                ) => {
                    return Err(HaltedBy::Fault(fault));
                }
                Stop::Signal(other) => signal = other,
            }
        }
    }

    /// From a system call stop back to the kind of stop [`Tracer::stop`] makes, executing nothing. Only there, inside
    /// the kernel's signal delivery, does an interrupted system call restart when the thread is let go.
    pub(super) fn settle(&self) -> Result<(), StopError> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0)
            .map_err(|errno| refused("PTRACE_INTERRUPT", self.tid, errno))?;
        let mut signal = 0;
        loop {
            resume(libc::PTRACE_CONT, self.tid, signal)?;
            match wait_blocking(self.tid)? {
                Stop::Event => return Ok(()),
                Stop::Syscall => signal = 0,
                Stop::Signal(other) => signal = other,
            }
        }
    }

    /// Replaces its signal mask, returning the old one. A thread inside `sigsuspend` has two; the one that lasts is
    /// returned, and restarting the call brings the other back.
    pub(super) fn set_signal_mask(&self, mask: u64) -> Result<u64, StopError> {
        let mut old = 0u64;
        request(
            libc::PTRACE_GETSIGMASK as _,
            self.tid,
            size_of::<u64>(),
            (&raw mut old) as usize,
        )
        .map_err(|errno| refused("PTRACE_GETSIGMASK", self.tid, errno))?;
        request(
            libc::PTRACE_SETSIGMASK as _,
            self.tid,
            size_of::<u64>(),
            (&raw const mask) as usize,
        )
        .map_err(|errno| refused("PTRACE_SETSIGMASK", self.tid, errno))?;
        Ok(old)
    }

    /// The address of the thread's `struct rseq`, if it registered one.
    pub(super) fn rseq(&self) -> Result<Option<u64>, StopError> {
        // struct ptrace_rseq_configuration: abi pointer, size, signature, flags, padding.
        let mut config = [0u64; 3];
        match request(
            libc::PTRACE_GET_RSEQ_CONFIGURATION as _,
            self.tid,
            size_of_val(&config),
            config.as_mut_ptr() as usize,
        ) {
            Ok(()) => Ok((config[0] != 0).then_some(config[0])),
            // Kernels without rseq.
            Err(Errno::EIO | Errno::EINVAL) => Ok(None),
            Err(errno) => Err(refused("PTRACE_GET_RSEQ_CONFIGURATION", self.tid, errno)),
        }
    }
}

impl Drop for StoppedThread<'_> {
    fn drop(&mut self) {
        // Fails only if the thread is dead, which leaves nothing to let go. A stop by job control resumes as one.
        let _ = request(libc::PTRACE_DETACH, self.tid, 0, 0);
    }
}

/// What kept a thread from reaching a system call.
pub(super) enum HaltedBy {
    /// It raised this signal by itself.
    Fault(libc::c_int),
    /// It is gone, or tracing failed.
    Stop(StopError),
}

impl From<StopError> for HaltedBy {
    fn from(error: StopError) -> HaltedBy {
        HaltedBy::Stop(error)
    }
}

/// Why a tracee is stopped.
enum Stop {
    /// `PTRACE_EVENT_STOP`: our interrupt, or job control.
    Event,
    /// Entry to or exit from a system call.
    Syscall,
    /// This signal is about to be delivered.
    Signal(libc::c_int),
}

fn wait_blocking(tid: i32) -> Result<Stop, StopError> {
    // Without WNOHANG waitpid returns nothing only by mistake; ask again.
    loop {
        if let Some(stop) = wait(tid, 0)? {
            return Ok(stop);
        }
    }
}

/// The stop tracee `tid` is in, if it is in one. It is only looked at (`WNOWAIT`): a death is left for the real parent to
/// reap, even if that is this process, and a stop ends when the thread is resumed.
fn wait(tid: i32, flags: libc::c_int) -> Result<Option<Stop>, StopError> {
    let flags = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT | libc::__WALL | flags;
    // SAFETY: all zeros is a valid siginfo_t, and it outlives the call.
    let (waited, info) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let waited = libc::waitid(libc::P_PID, tid as libc::id_t, &raw mut info, flags);
        (waited, info)
    };
    match Errno::result(waited) {
        Ok(_) => {}
        Err(Errno::EINTR) => return Ok(None),
        // It was released without our leave: another thread of it called exec.
        Err(Errno::ECHILD) => return Err(StopError::Exited { tid }),
        Err(errno) => return Err(refused("waiting", tid, errno)),
    }
    // SAFETY: waitid fills in the fields of SIGCHLD, or leaves the zeros.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    if !matches!(info.si_code, libc::CLD_TRAPPED | libc::CLD_STOPPED) {
        return Err(StopError::Exited { tid });
    }
    // The exit code of a ptrace stop: the signal, and above it the event.
    Ok(Some(match (status & 0xff, status >> 8) {
        (SYSCALL_STOP, _) => Stop::Syscall,
        (signal, 0) => Stop::Signal(signal),
        _ => Stop::Event,
    }))
}

/// `PTRACE_O_TRACESYSGOOD` marks system call stops so.
const SYSCALL_STOP: libc::c_int = libc::SIGTRAP | 0x80;

fn resume(how: libc::c_uint, tid: i32, signal: libc::c_int) -> Result<(), StopError> {
    request(how, tid, 0, signal as usize).map_err(|errno| refused("resuming", tid, errno))
}

fn request(request: libc::c_uint, tid: i32, addr: usize, data: usize) -> Result<(), Errno> {
    // SAFETY: `data` is an integer or, for the requests that take one, a pointer to a live object of the size the
    // request expects; `addr` is an integer. Nothing else of ours is touched.
    let answer = unsafe { libc::ptrace(request, tid, addr, data) };
    Errno::result(answer).map(drop)
}

fn refused(what: &'static str, tid: i32, errno: Errno) -> StopError {
    match errno {
        Errno::ESRCH | Errno::ENOENT => StopError::Exited { tid },
        errno => StopError::Refused { what, tid, errno },
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
