//! System calls that change what this process may. Leaf module.

use std::io;

use seccompiler::{BpfProgram, sock_filter};

/// <linux/prctl.h>, Linux 6.3.
const PR_SET_MDWE: libc::c_int = 65;
const PR_MDWE_REFUSE_EXEC_GAIN: libc::c_ulong = 1;
/// More capabilities than any kernel has; the kernel has said `EINVAL` before.
const CAPABILITIES: libc::c_ulong = 64;

fn outcome(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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

/// `struct sock_fprog` of <linux/filter.h>.
#[repr(C)]
struct Program {
    length: libc::c_ushort,
    filter: *const sock_filter,
}

/// Installs a filter, whose refusals go to the kernel's log (`SECCOMP_FILTER_FLAG_LOG`), for this thread and those it starts, or
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
