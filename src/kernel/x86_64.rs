//! Everything about another thread's registers and system calls that depends on the processor.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::unistd::Pid;

/// The bytes of the `syscall` instruction.
pub(super) const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// User registers of a stopped thread.
#[derive(Clone, Copy)]
pub(super) struct Registers(libc::user_regs_struct);

impl Registers {
    /// Reads those of a stopped tracee.
    pub(super) fn read(tid: i32) -> Result<Registers, Errno> {
        ptrace::getregs(Pid::from_raw(tid)).map(Registers)
    }

    /// Writes them to a stopped tracee. The call number an interrupted system call was made with goes along, so that
    /// the kernel restarts it as it would have.
    pub(super) fn write(&self, tid: i32) -> Result<(), Errno> {
        ptrace::setregs(Pid::from_raw(tid), self.0)
    }

    /// Whether the thread runs 64-bit code (the selector `__USER_CS`).
    pub(super) fn native(&self) -> bool {
        self.0.cs == 0x33
    }

    /// The address of the next instruction.
    pub(super) fn instruction(&self) -> u64 {
        self.0.rip
    }

    /// These registers, about to make system call `number` with the `syscall` instruction at `instruction`.
    pub(super) fn calling(
        &self,
        instruction: u64,
        number: libc::c_long,
        args: [u64; 6],
    ) -> Registers {
        let mut regs = self.0;
        regs.rip = instruction;
        regs.rax = number as u64;
        // "Not in a system call": otherwise the kernel would restart the interrupted one on the way out.
        regs.orig_rax = u64::MAX;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        Registers(regs)
    }

    /// What the system call that just returned gave back.
    pub(super) fn result(&self) -> Result<u64, Errno> {
        // The kernel's MAX_ERRNO.
        if self.0.rax > u64::MAX - 4095 {
            Err(Errno::from_raw((self.0.rax as i64).wrapping_neg() as i32))
        } else {
            Ok(self.0.rax)
        }
    }
}
