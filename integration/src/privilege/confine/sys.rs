//! System calls that change what this process may. Leaf module.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use seccompiler::{BpfProgram, sock_filter};

/// <linux/prctl.h>, Linux 6.3.
const PR_SET_MDWE: libc::c_int = 65;
const PR_MDWE_REFUSE_EXEC_GAIN: libc::c_ulong = 1;
/// More capabilities than any kernel has; the kernel has said `EINVAL` before.
const CAPABILITIES: libc::c_ulong = 64;

fn outcome(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A variable of the environment. To be called while there is one thread.
pub(super) fn set_variable(name: &str, value: &Path) {
    // SAFETY: no other thread can read the environment meanwhile.
    unsafe { std::env::set_var(name, value) };
}

pub(super) fn no_new_privileges() -> io::Result<()> {
    Ok(nix::sys::prctl::set_no_new_privs()?)
}

/// `PR_SET_MDWE`: no mapping is made executable that was not from the start, and none is writable and executable.
pub(super) fn no_new_programs() -> io::Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: takes numbers only.
    outcome(unsafe { libc::prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, zero, zero, zero) }.into())
}

/// Also of capabilities that are newer than this program. Needs `CAP_SETPCAP`.
pub(super) fn empty_bounding_set() -> io::Result<()> {
    for capability in 0..CAPABILITIES {
        // SAFETY: takes numbers only.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match outcome(result.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

/// Refusals that are told, at most: who has taken this process over is not to fill the log.
#[cfg(target_arch = "x86_64")]
const TOLD: u32 = 64;
#[cfg(target_arch = "x86_64")]
static REFUSED: AtomicU32 = AtomicU32::new(0);

/// Whether refusals can be told on this architecture.
pub(super) const TELLS: bool = cfg!(target_arch = "x86_64");

/// From now on a system call that a filter traps fails with `EPERM`, and is told on standard error (seccomp(2), `SECCOMP_RET_TRAP`).
#[cfg(target_arch = "x86_64")]
pub(super) fn tell_refused() -> io::Result<()> {
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_NODEFER | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::SigAction(refused), flags, SigSet::empty());
    // SAFETY: the handler does nothing but what signal-safety(7) allows.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
}

#[cfg(target_arch = "x86_64")]
extern "C" fn refused(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the context of the interrupted thread, which is this handler's to change (sigaction(2)).
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    // Here the kernel leaves the call's number, and here its result is looked for.
    let result = &mut context.uc_mcontext.gregs[libc::REG_RAX as usize];
    let call = *result;
    *result = -i64::from(libc::EPERM);
    if REFUSED.fetch_add(1, Ordering::Relaxed) < TOLD {
        tell(call);
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn tell_refused() -> io::Result<()> {
    Ok(())
}

#[cfg(target_arch = "x86_64")]
/// Without memory or locks: it may have interrupted whoever has them.
fn tell(call: i64) {
    let mut line = *b"prestaged: system call .... is refused by the sandbox\n";
    let digits = line.iter().position(|byte| *byte == b'.').unwrap_or(0);
    let (mut rest, mut at) = (call.clamp(0, 9999), digits + 4);
    while at > digits {
        at -= 1;
        line[at] = if rest > 0 || at == digits + 3 { b'0' + (rest % 10) as u8 } else { b' ' };
        rest /= 10;
    }
    // SAFETY: the bytes live until this returns.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
}

/// Version of Landlock that the kernel has; `None`: it has none, or it is switched off (landlock_create_ruleset(2)).
pub(super) fn landlock_version() -> Option<i64> {
    const VERSION: libc::c_ulong = 1;
    let nothing: libc::c_ulong = 0;
    // SAFETY: without attributes no memory is read.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, nothing, VERSION) };
    (version > 0).then_some(version)
}

/// Enters a Landlock ruleset (landlock_restrict_self(2)).
pub(super) fn restrict_self(rules: &OwnedFd) -> io::Result<()> {
    // SAFETY: takes numbers only; the descriptor is open.
    outcome(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) })
}

/// `struct sock_fprog` of <linux/filter.h>.
#[repr(C)]
struct Program {
    length: libc::c_ushort,
    filter: *const sock_filter,
}

/// Installs a filter, whose kills go to the kernel's log (`SECCOMP_FILTER_FLAG_LOG`), for this thread and those it starts, or
/// for all there are.
pub(super) fn install(filter: &BpfProgram, all_threads: bool) -> io::Result<()> {
    let length = filter.len().try_into().map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = Program { length, filter: filter.as_ptr() };
    let all = if all_threads { libc::SECCOMP_FILTER_FLAG_TSYNC } else { 0 };
    let flags = libc::SECCOMP_FILTER_FLAG_LOG | all;
    // SAFETY: the kernel copies `length` instructions from `filter`, which live until this returns.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result > 0 {
        return Err(io::Error::other(format!("thread {result} has another filter")));
    }
    outcome(result)
}
