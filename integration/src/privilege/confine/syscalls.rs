//! What the daemon may ask the kernel for: seccomp (seccomp(2), kernel's seccomp_filter.rst).
//!
//! Five filters, of whose answers the strictest counts: what is not on [`ALLOWED`] fails with `EPERM` and is told on standard error
//! by its number (`sys::tell_refused`); what no daemon of ours ever does ([`DEADLY`]) ends it, since somebody else is at work then, as
//! do calls by the numbers of another way to make them ([`other_numbers`]); processes fail without a word; and `clone3`, whose flags a
//! filter cannot see, says that it does not exist, so that libraries use `clone`, of which threads alone are left. Calls of another
//! architecture end the process by each filter.
//!
//! The list was made from what the daemon does: its own calls, glibc's, libvirt's, SQLite's, io_uring's. All tests run under it. Not
//! on it, and so refused: `openat2`, whose mode a filter cannot see, and all that makes device nodes.
//!
//! Programs of others that work on guests' data cannot be given such a list, as what they and their libraries do differs by host:
//! they are refused what is on [`DEADLY`] and [`FOREIGN`].

use std::collections::BTreeMap;
use std::mem::offset_of;

use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

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

/// Calls that set permissions, and which of their arguments is the mode. Where `open` makes no file its mode is no concern of the
/// kernel's; libraries pass zero or what they would make one with.
const MODES: &[(libc::c_long, u8)] = &[
    (libc::SYS_fchmod, 1),
    (libc::SYS_fchmodat, 2),
    (libc::SYS_openat, 3),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chmod, 1),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, 2),
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

/// What no program does either that works on guests' data: device nodes, modules, the host's clock, name, quotas, swap and log, other
/// processes, other files than by their names, new mounts and io_urings, which do what no filter sees.
const FOREIGN: &[libc::c_long] = &[
    libc::SYS_mknodat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ustat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_sysfs,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    libc::SYS_acct,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_settimeofday,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_personality,
    libc::SYS_kcmp,
    libc::SYS_pidfd_send_signal,
    libc::SYS_process_mrelease,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
];

/// What says to programs that it does not exist, so that they use what a filter sees into.
const UNSEEN: &[libc::c_long] = &[libc::SYS_clone3, libc::SYS_openat2, libc::SYS_fchmodat2];

/// Namespaces that `clone` makes (clone(2)): each would be a host of its own, with its own root.
const NAMESPACES: &[libc::c_int] = &[
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWUTS,
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

/// inode(7)
const SET_ID: u64 = (libc::S_ISUID | libc::S_ISGID) as u64;

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
    for (call, mode) in MODES {
        let plain = SeccompCondition::new(*mode, Dword, MaskedEq(SET_ID), 0)?;
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

/// `__X32_SYSCALL_BIT` of <asm/unistd.h>: the same calls by other numbers, which name the same architecture to a filter
/// (seccomp(2), "Caveats"). Kernels that have them are rare.
const X32: u32 = 0x4000_0000;

/// Refuses calls that are made by such numbers; `action` as the kernel has it.
fn other_numbers(action: u32) -> BpfProgram {
    let instruction = |code: u32, jf: u8, k: u32| sock_filter { code: code as u16, jt: 0, jf, k };
    // On other architectures no call has such a number.
    vec![
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, offset_of!(libc::seccomp_data, nr) as u32),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, X32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, action),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

fn plain(calls: &[libc::c_long]) -> Rules {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// What the daemon is confined by, and how many calls are allowed.
fn of_daemons() -> Result<(Vec<BpfProgram>, usize), String> {
    let rules = allowed().map_err(|error| error.to_string())?;
    let count = rules.len();
    let number = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    let filters = vec![
        filter(plain(&[libc::SYS_clone3]), number(libc::ENOSYS), SeccompAction::Allow)?,
        // Not trapped: who makes a process has all signals blocked meanwhile, and would be ended by one more.
        filter(processes().map_err(|error| error.to_string())?, number(libc::EPERM), SeccompAction::Allow)?,
        filter(plain(DEADLY), SeccompAction::KillProcess, SeccompAction::Allow)?,
        other_numbers(libc::SECCOMP_RET_KILL_PROCESS),
        // The last: it allows seccomp(2) itself, but nothing is to hang on that.
        filter(rules, SeccompAction::Allow, if sys::TELLS { SeccompAction::Trap } else { number(libc::EPERM) })?,
    ];
    Ok((filters, count))
}

/// Confines this thread and those it starts. Returns how many calls are allowed.
///
/// # Errors
/// In words: why it does not hold.
pub(super) fn confine() -> Result<usize, String> {
    let failed = |error: &dyn std::fmt::Display| format!("not confined: {error}");
    let (filters, count) = of_daemons().map_err(|error| failed(&error))?;
    sys::tell_refused().map_err(|error| failed(&error))?;
    filters.iter().try_for_each(|filter| sys::install(filter, false)).map_err(|error| failed(&error))?;
    Ok(count)
}

/// What keeps a program from what no program of ours does; but it is started by other programs.
///
/// # Errors
/// In words: why it cannot be made.
pub(super) fn of_programs() -> Result<Vec<BpfProgram>, String> {
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let rules = foreign().map_err(|error| error.to_string())?;
    Ok(vec![
        filter(plain(UNSEEN), SeccompAction::Errno(libc::ENOSYS.unsigned_abs()), SeccompAction::Allow)?,
        filter(rules, refused, SeccompAction::Allow)?,
        other_numbers(libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
    ])
}

/// What a program is refused.
fn foreign() -> Result<Rules, BackendError> {
    let starts = [libc::SYS_execve, libc::SYS_execveat];
    let calls: Vec<_> = DEADLY.iter().chain(FOREIGN).copied().filter(|call| !starts.contains(call)).collect();
    let mut rules = plain(&calls);
    let any = |argument, bits: &[u64]| -> Result<Vec<SeccompRule>, BackendError> {
        let rule = |bit: &u64| SeccompRule::new(vec![SeccompCondition::new(argument, Dword, MaskedEq(*bit), *bit)?]);
        bits.iter().map(rule).collect()
    };
    let set_id = [libc::S_ISUID, libc::S_ISGID].map(u64::from);
    for (call, mode) in MODES {
        rules.insert(*call, any(*mode, &set_id)?);
    }
    let namespaces: Vec<_> = NAMESPACES.iter().map(|flag| u64::from(flag.unsigned_abs())).collect();
    rules.insert(libc::SYS_clone, any(0, &namespaces)?);
    // Names of hosts are looked up over AF_NETLINK, too.
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let others = families.iter().map(|family| SeccompCondition::new(0, Dword, Ne, u64::from(family.unsigned_abs())));
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(others.collect::<Result<_, _>>()?)?]);
    Ok(rules)
}

/// No more io_urings, in any thread.
pub(super) fn seal() -> Result<(), String> {
    let rules = plain(&[libc::SYS_io_uring_setup]);
    let filter = filter(rules, SeccompAction::Errno(libc::EPERM.unsigned_abs()), SeccompAction::Allow)?;
    sys::install(&filter, true).map_err(|error| error.to_string())
}

#[cfg(test)]
#[path = "syscalls_tests.rs"]
mod tests;
