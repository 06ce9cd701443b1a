//! Threads of other processes, stopped for a moment without their noticing.
//!
//! `PTRACE_SEIZE` + `PTRACE_INTERRUPT`: no signal is sent, job control is left alone, parents see nothing. A
//! [`StoppedThread`] runs on when it is dropped. A blocking system call is interrupted and restarts by itself (a few,
//! like `epoll_wait`, return `EINTR` instead: signal(7), "Interruption by stop signals").
//!
//! The kernel ties a tracee to one tracer *thread*, and a tracee that has not stopped cannot be let go except by that
//! thread's end. So all tracing happens inside [`trace`], on a thread made for it; or inside [`trace_within`], where it may
//! touch what a hostile process can make wait, and whoever asked must not wait with it.
#![allow(unsafe_code)]

use nix::errno::Errno;
use std::cell::Cell;
use std::collections::HashSet;
use std::io;
use std::marker::PhantomData;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Leave to trace, given to the closure of [`trace`]; cannot leave its thread.
#[derive(Debug)]
pub struct Tracer {
    _one_thread: PhantomData<*const ()>,
    /// Every thread that was seized, for [`reap`].
    seized: Arc<Mutex<Vec<i32>>>,
}

/// A thread held in a ptrace stop. Dropping it lets it run on.
#[derive(Debug)]
pub struct StoppedThread<'t> {
    tid: i32,
    running: Cell<bool>,
    _tracer: PhantomData<&'t Tracer>,
}

/// Every thread of a process held in a ptrace stop. Dropping it lets them run on.
#[derive(Debug)]
pub struct StoppedProcess<'t> {
    _threads: Vec<StoppedThread<'t>>,
}

/// All threads of several processes at a standstill: none of them executes an instruction of its own. Dropping it lets them run on.
#[derive(Debug)]
pub struct Standstill<'t> {
    threads: Vec<StoppedThread<'t>>,
    over: Cell<bool>,
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
    /// New threads came faster than they were stopped.
    #[error("new threads kept coming while the threads were stopped")]
    Restless,
    /// The tracing thread has not come back. It goes on, and lets go of all that it holds as soon as it can.
    #[error("the threads were held for {} s and not given back: is the container paused?", waited.as_secs())]
    Stuck {
        /// How long was waited.
        waited: Duration,
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
        let tracer = scope.spawn(|| work(&Tracer::new(Arc::default())));
        match tracer.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// As [`trace`], for at most `patience`. After [`StopError::Stuck`] the work goes on by itself until it has put everything back:
/// nobody else can, and [`wait_for_stuck`] waits for it.
pub fn trace_within<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce(&Tracer) -> T + Send + 'static,
) -> Result<T, StopError> {
    let seized = Arc::new(Mutex::new(Vec::new()));
    let (done, result) = mpsc::channel();
    let theirs = Arc::clone(&seized);
    let under_way = UnderWay::begin();
    let spawned = std::thread::Builder::new()
        .name("tracer".into())
        .spawn(move || {
            let made = work(&Tracer::new(theirs));
            drop(under_way);
            // Whoever asked may have gone.
            let _ = done.send(made);
        });
    let tracer =
        spawned.map_err(|error| refused("making a thread to trace", 0, errno_of(&error)))?;
    let asked = Instant::now();
    loop {
        match result.recv_timeout(Duration::from_millis(20)) {
            Ok(made) => {
                // What it failed to stop is let go by its end.
                drop(tracer.join());
                return Ok(made);
            }
            Err(RecvTimeoutError::Timeout) if asked.elapsed() > patience => {
                return Err(StopError::Stuck { waited: patience });
            }
            Err(RecvTimeoutError::Timeout) => reap(&seized),
            Err(RecvTimeoutError::Disconnected) => match tracer.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => return Err(StopError::Stuck { waited: patience }),
            },
        }
    }
}

/// Waits until nothing is held any more that [`trace_within`] was given up on. Before the process ends: the kernel would let go
/// of a thread that is in the middle of a system call of ours, and it would run on with foreign registers.
pub fn wait_for_stuck() {
    let mut count = UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner);
    while *count > 0 {
        let waited = NONE_UNDER_WAY.wait(count);
        count = waited.unwrap_or_else(PoisonError::into_inner);
    }
}

/// How many works of [`trace_within`] have not ended.
static UNDER_WAY: Mutex<usize> = Mutex::new(0);
static NONE_UNDER_WAY: Condvar = Condvar::new();

struct UnderWay;

impl UnderWay {
    fn begin() -> UnderWay {
        *UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        UnderWay
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        *UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        NONE_UNDER_WAY.notify_all();
    }
}

/// Takes dead threads out of the way of an exec. It waits until its thread's siblings are gone, and seized ones are gone only
/// when they have been reaped; seizing waits for the exec, so the tracing thread cannot do it.
fn reap(seized: &Mutex<Vec<i32>>) {
    let seized = seized
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    for tid in seized {
        // A tracee's stop would be taken by any wait for it, so that it is only looked at first.
        let Err(StopError::Exited { .. }) = wait(tid, libc::WNOHANG) else {
            continue;
        };
        let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
        let leader = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
        let leader: Option<i32> = leader.and_then(|pid| pid.trim().parse().ok());
        // A process's own end is its parent's to reap.
        if leader.is_none_or(|pid| pid == tid) {
            continue;
        }
        let flags = libc::WEXITED | libc::WNOHANG | libc::__WALL;
        // SAFETY: all zeros is a valid siginfo_t, and it outlives the call.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(libc::P_PID, tid as libc::id_t, &raw mut info, flags);
        }
    }
}

/// The most that counts as waited from one look at a thread to the next. If it was longer we did not run meanwhile, as on a
/// host that is overloaded or stood still, and then the thread had no chance to stop either.
const LOOK: Duration = Duration::from_millis(5);

impl Tracer {
    fn new(seized: Arc<Mutex<Vec<i32>>>) -> Tracer {
        Tracer {
            _one_thread: PhantomData,
            seized,
        }
    }

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
        self.seize(tid, options)?;
        match self.stopped(tid, patience, &|_| false)? {
            Some(thread) => Ok(thread),
            None => Err(StopError::Uninterruptible {
                tid,
                waited: patience,
            }),
        }
    }

    /// Brings `everyone` to a standstill, waiting at most `patience` for each thread. `everyone` lists the threads of now; it is
    /// asked until it names none that is new, for what was not yet stopped may have started others.
    ///
    /// A thread in an uninterruptible wait does not stop, and need not: on its way out of the kernel it would.
    ///
    /// # Errors
    /// All run on when a thread can neither be stopped nor is known to stand still.
    pub fn hold(
        &self,
        everyone: &mut dyn FnMut() -> io::Result<Vec<i32>>,
        options: TraceOptions,
        patience: Duration,
    ) -> Result<Standstill<'_>, StopError> {
        let mut standstill = Standstill {
            threads: Vec::new(),
            over: Cell::new(false),
        };
        let mut seen = HashSet::new();
        for _pass in 0..HOLD_PASSES {
            let listed =
                everyone().map_err(|error| refused("listing the threads", 0, errno_of(&error)))?;
            let fresh: Vec<i32> = listed.into_iter().filter(|tid| seen.insert(*tid)).collect();
            if fresh.is_empty() {
                return Ok(standstill);
            }
            let mut coming = Vec::new();
            for tid in fresh {
                match self.seize(tid, options) {
                    Ok(()) => coming.push(tid),
                    Err(StopError::Exited { .. }) => {}
                    // Held by a debugger. One in the container is held itself, and nobody else lets this one run.
                    Err(StopError::NotAllowed { .. }) if state(tid, tid) == Some(b't') => {}
                    Err(error) => return Err(error),
                }
            }
            for tid in coming {
                let stands_still = Cell::new(false);
                let enough = |waited| {
                    stands_still.set(waited > AT_ONCE && state(tid, tid) == Some(b'D'));
                    stands_still.get()
                };
                match self.stopped(tid, patience, &enough) {
                    Ok(Some(thread)) => standstill.threads.push(thread),
                    Ok(None) if stands_still.get() => {}
                    Ok(None) => {
                        return Err(StopError::Uninterruptible {
                            tid,
                            waited: patience,
                        });
                    }
                    Err(StopError::Exited { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Err(StopError::Restless)
    }

    /// Seizes a thread and asks it to stop.
    fn seize(&self, tid: i32, options: TraceOptions) -> Result<(), StopError> {
        request(libc::PTRACE_SEIZE, tid, 0, options.0 as usize).map_err(|errno| match errno {
            // The kernel also answers so for a thread that is exiting.
            Errno::EPERM if !alive(tid, tid) => StopError::Exited { tid },
            Errno::EPERM => StopError::NotAllowed { tid },
            errno => refused("PTRACE_SEIZE", tid, errno),
        })?;
        let mut seized = self.seized.lock().unwrap_or_else(PoisonError::into_inner);
        seized.push(tid);
        drop(seized);
        interrupt(tid)
    }

    /// Waits until a thread that was asked to stops has; `None` if `patience` or `enough` (asked with the time waited) ends first.
    fn stopped(
        &self,
        tid: i32,
        patience: Duration,
        enough: &dyn Fn(Duration) -> bool,
    ) -> Result<Option<StoppedThread<'_>>, StopError> {
        let (mut waited, mut looked) = (Duration::ZERO, Instant::now());
        loop {
            let stop = wait(tid, libc::WNOHANG)?;
            waited += looked.elapsed().min(LOOK);
            looked = Instant::now();
            match stop {
                Some(Stop::Event) => break,
                // Signals it was just receiving go on to it. Any stop takes back the one that was asked for.
                Some(Stop::Signal(signal)) => {
                    interrupt(tid)?;
                    resume(libc::PTRACE_CONT, tid, signal)?;
                }
                Some(Stop::Syscall) => {
                    interrupt(tid)?;
                    resume(libc::PTRACE_CONT, tid, 0)?;
                }
                None if waited > patience || enough(waited) => return Ok(None),
                None => pause(waited),
            }
        }
        Ok(Some(StoppedThread {
            tid,
            running: Cell::new(false),
            _tracer: PhantomData,
        }))
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

/// How long a thread may be in a wait that only looks uninterruptible, as for a lock.
const AT_ONCE: Duration = Duration::from_millis(5);

/// How often the threads are listed, at most, until none is new. Each pass leaves only children of what the pass before missed.
const HOLD_PASSES: usize = 16;

/// A running thread stops within microseconds: gives way first, and sleeps only if it takes longer.
fn pause(waited: Duration) {
    if waited < Duration::from_micros(200) {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(100));
    }
}

impl<'t> Standstill<'t> {
    /// How many threads were stopped for it.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    /// The one with this id, unless it stands still in the kernel only.
    pub fn thread(&self, tid: i32) -> Option<&StoppedThread<'t>> {
        self.threads.iter().find(|thread| thread.tid == tid)
    }

    /// Whether it has been ended.
    pub fn is_over(&self) -> bool {
        self.over.get()
    }

    /// Lets all but one run on.
    pub fn end_for_all_but(&self, tid: i32) {
        self.over.set(true);
        let others = self.threads.iter().filter(|thread| thread.tid != tid);
        others.for_each(StoppedThread::run_on);
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
    !matches!(state(pid, tid), None | Some(b'Z' | b'X' | b'x'))
}

/// The state that `/proc/PID/task/TID/stat` shows, if the thread is there.
fn state(pid: i32, tid: i32) -> Option<u8> {
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    // The state follows the name, which is in parentheses and may hold any byte, these included.
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    stat.get(end + 2).copied()
}

impl StoppedThread<'_> {
    /// Its thread id.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Lets it run to the next entry to or exit from a system call. Its memory of signals is kept: those that arrive
    /// and are not blocked are delivered on the way. `late` is told, once, when it takes longer than `patience`, and it is
    /// waited for further: its registers can only be put back when it stops.
    pub(super) fn run_to_syscall(
        &self,
        patience: Duration,
        late: &mut dyn FnMut(),
    ) -> Result<(), HaltedBy> {
        let mut signal = 0;
        loop {
            resume(libc::PTRACE_SYSCALL, self.tid, signal)?;
            match wait_patiently(self.tid, patience, late)? {
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
        let mut signal = 0;
        loop {
            interrupt(self.tid)?;
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

impl StoppedThread<'_> {
    /// Lets it run on before it is dropped.
    fn run_on(&self) {
        if !self.running.replace(true) {
            // Fails only if the thread is dead, which leaves nothing to let go. A stop by job control resumes as one.
            let _ = request(libc::PTRACE_DETACH, self.tid, 0, 0);
        }
    }
}

impl Drop for StoppedThread<'_> {
    fn drop(&mut self) {
        self.run_on();
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

fn wait_patiently(tid: i32, patience: Duration, late: &mut dyn FnMut()) -> Result<Stop, StopError> {
    let (mut waited, mut looked) = (Duration::ZERO, Instant::now());
    loop {
        if let Some(stop) = wait(tid, libc::WNOHANG)? {
            return Ok(stop);
        }
        waited += looked.elapsed().min(LOOK);
        looked = Instant::now();
        if waited > patience {
            late();
            return wait_blocking(tid);
        }
        pause(waited);
    }
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

/// Asks a seized thread to stop; one that is stopped, to stop again as soon as it is resumed.
fn interrupt(tid: i32) -> Result<(), StopError> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0)
        .map_err(|errno| refused("PTRACE_INTERRUPT", tid, errno))
}

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
