//! What the daemon may ask the kernel for: seccomp (seccomp(2), kernel's seccomp_filter.rst).
//!
//! Four filters, of whose answers the strictest counts: what is not on [`ALLOWED`] fails with `EPERM` and is told on standard error
//! by its number (`sys::tell_refused`); what no daemon of ours ever does ([`DEADLY`]) ends it, since somebody else is at work then;
//! processes fail without a word; and `clone3`, whose flags a filter cannot see, says that it does not exist, so that libraries use
//! `clone`, of which threads alone are left.
//!
//! The list was made from what the daemon does: its own calls, glibc's, libvirt's, SQLite's, io_uring's. All tests run under it.

use std::collections::BTreeMap;

use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

use super::sys;

/// By what they are for.
const ALLOWED: &[libc::c_long] = &[
    // descriptors and what is in them
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_ftruncate,
    libc::SYS_truncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_pipe2,
    libc::SYS_pidfd_open, // to see the end of who takes over
    // files by name; where they lie is Landlock's to judge
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_umask,
    // memory
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_mlock,
    libc::SYS_munlock,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    // threads and their order
    libc::SYS_futex,
    libc::SYS_clone, // of threads alone, see `processes`
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_getpriority,
    libc::SYS_setpriority,
    libc::SYS_ioprio_get,
    libc::SYS_ioprio_set,
    libc::SYS_getcpu,
    libc::SYS_wait4,
    libc::SYS_waitid,
    // signals
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_signalfd4,
    // time and waiting
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    // sockets; of which families, see below
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_shutdown,
    // io_uring; no new one once the daemon runs, see `seal`
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // what a process knows of itself and of the host
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getpgid,
    libc::SYS_getsid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getresuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_capget,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    // another filter of its own: it can only take away
    libc::SYS_seccomp,
];

/// Calls of this architecture that newer ones replace; glibc still makes some.
#[cfg(target_arch = "x86_64")]
const OLDER: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_getpgrp,
    libc::SYS_time,
    libc::SYS_arch_prctl,
    libc::SYS_getrlimit,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[libc::c_long] = &[];

/// Calls that set permissions, and which of their arguments is the mode.
const CHMOD: &[(libc::c_long, u8)] = &[
    (libc::SYS_fchmod, 1),
    (libc::SYS_fchmodat, 2),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chmod, 1),
];

/// What no daemon of ours ever does.
const DEADLY: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_fsopen,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_open_by_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// <linux/prctl.h>: names of threads and mappings, and questions.
const PRCTL: [u64; 5] = [
    libc::PR_SET_NAME as u64,
    libc::PR_GET_NAME as u64,
    libc::PR_GET_DUMPABLE as u64,
    libc::PR_CAPBSET_READ as u64,
    0x5356_4d41, // PR_SET_VMA
];
/// Of descriptors in general and of block devices: <asm-generic/ioctls.h>, <linux/fs.h>.
const IOCTL: [u64; 12] = [
    0x5401,      // TCGETS
    0x541b,      // FIONREAD
    0x5421,      // FIONBIO
    0x5451,      // FIOCLEX
    0x125e,      // BLKROGET
    0x1268,      // BLKSSZGET
    0x1277,      // BLKDISCARD
    0x1278,      // BLKIOMIN
    0x127b,      // BLKPBSZGET
    0x127f,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
    0xc020_660b, // FS_IOC_FIEMAP
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// A rule for each value that an argument may have.
fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value| SeccompRule::new(vec![SeccompCondition::new(argument, Dword, Eq, value)?]);
    values.iter().map(|value| rule(*value)).collect()
}

fn allowed() -> Result<Rules, BackendError> {
    let mut rules: Rules = ALLOWED.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(|family| family as u64);
    rules.insert(libc::SYS_socket, one_of(0, &families)?);
    rules.insert(libc::SYS_socketpair, one_of(0, &[libc::AF_UNIX as u64])?);
    rules.insert(libc::SYS_prctl, one_of(0, &PRCTL)?);
    rules.insert(libc::SYS_ioctl, one_of(1, &IOCTL)?);
    // Nothing of this user's becomes a program that others start with its rights: it may be root.
    let set_id = u64::from(libc::S_ISUID | libc::S_ISGID);
    for (call, mode) in CHMOD {
        let plain = SeccompCondition::new(*mode, Dword, MaskedEq(set_id), 0)?;
        rules.insert(*call, vec![SeccompRule::new(vec![plain])?]);
    }
    // Its own, by its number: glibc's abort and Rust's. Another process may have that number later, but then this one is gone.
    let own = one_of(0, &[u64::from(std::process::id())])?;
    rules.insert(libc::SYS_tgkill, own);
    // Limits of its own alone.
    let own = one_of(0, &[0, u64::from(std::process::id())])?;
    rules.insert(libc::SYS_prlimit64, own);
    Ok(rules)
}

/// Another process, not a thread: what a program is to do for the daemon the broker starts.
fn processes() -> Result<Rules, BackendError> {
    let thread = libc::CLONE_THREAD as u64;
    let process = SeccompRule::new(vec![SeccompCondition::new(0, Qword, MaskedEq(thread), 0)?])?;
    Ok(Rules::from([(libc::SYS_clone, vec![process])]))
}

fn filter(rules: Rules, matched: SeccompAction, other: SeccompAction) -> Result<BpfProgram, String> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
    SeccompFilter::new(rules, other, matched, arch).and_then(TryInto::try_into).map_err(|error| error.to_string())
}

fn plain(calls: &[libc::c_long]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// Confines this thread and those it starts. Returns how many calls are allowed.
///
/// # Errors
/// In words: why it does not hold.
pub(super) fn confine() -> Result<usize, String> {
    let failed = |error: &dyn std::fmt::Display| format!("not confined: {error}");
    let rules = allowed().map_err(|error| failed(&error))?;
    let count = rules.len();
    let number = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    let filters = [
        filter(plain(&[libc::SYS_clone3]), number(libc::ENOSYS), SeccompAction::Allow),
        // Not trapped: who makes a process has all signals blocked meanwhile, and would be ended by one more.
        filter(processes().map_err(|error| failed(&error))?, number(libc::EPERM), SeccompAction::Allow),
        filter(plain(DEADLY), SeccompAction::KillProcess, SeccompAction::Allow),
        // The last: it allows seccomp(2) itself, but nothing is to hang on that.
        filter(rules, SeccompAction::Allow, if sys::TELLS { SeccompAction::Trap } else { number(libc::EPERM) }),
    ];
    sys::tell_refused().map_err(|error| failed(&error))?;
    for filter in filters {
        let filter = filter.map_err(|error| failed(&error))?;
        sys::install(&filter, false).map_err(|error| failed(&error))?;
    }
    Ok(count)
}

/// What keeps a program from what no program of ours does; but it is started by other programs.
///
/// # Errors
/// In words: why it cannot be made.
pub(super) fn of_programs() -> Result<BpfProgram, String> {
    let calls: Vec<_> =
        DEADLY.iter().copied().filter(|call| ![libc::SYS_execve, libc::SYS_execveat].contains(call)).collect();
    filter(plain(&calls), SeccompAction::Errno(libc::EPERM.unsigned_abs()), SeccompAction::Allow)
}

/// No more io_urings, in any thread.
pub(super) fn seal() -> Result<(), String> {
    let rules = plain(&[libc::SYS_io_uring_setup]);
    let filter = filter(rules, SeccompAction::Errno(libc::EPERM.unsigned_abs()), SeccompAction::Allow)?;
    sys::install(&filter, true).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_allowed_and_deadly() {
        let allowed = allowed().unwrap();
        for call in DEADLY {
            assert!(!allowed.contains_key(call), "{call}");
        }
    }

    #[test]
    fn filters_fit() {
        // BPF_MAXINSNS of <linux/bpf_common.h>
        let all = filter(allowed().unwrap(), SeccompAction::Allow, SeccompAction::Errno(1)).unwrap();
        assert!(all.len() < 4096, "{}", all.len());
    }
}
