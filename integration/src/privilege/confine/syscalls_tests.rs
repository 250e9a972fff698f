//! What the filters answer, by a machine that runs them as the kernel does (kernel's filter.rst): no call is made.

use super::*;

/// `AUDIT_ARCH_*` of <linux/audit.h>.
const HERE: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
/// 32-bit programs of x86, which number their calls otherwise.
const I386: u32 = 0x4000_0003;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();

fn run(program: &BpfProgram, number: u32, arch: u32, arguments: [u64; 6]) -> u32 {
    let mut data = [number.to_ne_bytes(), arch.to_ne_bytes(), [0; 4], [0; 4]].concat();
    arguments.iter().for_each(|argument| data.extend(argument.to_ne_bytes()));
    let (mut at, mut register) = (0, 0_u32);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { jt } else { jf });
        match u32::from(code) {
            0x20 => register = u32::from_ne_bytes(data[k as usize..][..4].try_into().unwrap()), // BPF_LD | BPF_W | BPF_ABS
            0x05 => at += k as usize,                                                           // BPF_JMP | BPF_JA
            0x15 => at += jump(register == k),                                                  // BPF_JMP | BPF_JEQ
            0x25 => at += jump(register > k),                                                   // BPF_JMP | BPF_JGT
            0x35 => at += jump(register >= k),                                                  // BPF_JMP | BPF_JGE
            0x54 => register &= k,                                                              // BPF_ALU | BPF_AND
            0x06 => return k,                                                                   // BPF_RET
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// The strictest answer counts, which is the one with the lowest number in its upper half, signed (seccomp(2)).
fn all(programs: &[BpfProgram], number: u32, arch: u32, arguments: [u64; 6]) -> u32 {
    let said = programs.iter().map(|program| run(program, number, arch, arguments));
    said.min_by_key(|said| (said & libc::SECCOMP_RET_ACTION_FULL).cast_signed()).unwrap()
}

fn number(call: libc::c_long) -> u32 {
    u32::try_from(call).unwrap()
}

fn of_daemon(call: libc::c_long, arguments: [u64; 6]) -> u32 {
    all(&of_daemons().unwrap().0, number(call), HERE, arguments)
}

fn of_program(call: libc::c_long, arguments: [u64; 6]) -> u32 {
    all(&of_programs().unwrap(), number(call), HERE, arguments)
}

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
    for program in of_daemons().unwrap().0.iter().chain(&of_programs().unwrap()) {
        assert!(program.len() < 4096, "{}", program.len());
    }
}

#[test]
fn no_file_is_made_or_given_a_set_id_bit() {
    let refused = if sys::TELLS { libc::SECCOMP_RET_TRAP } else { EPERM };
    let mut calls = vec![(libc::SYS_fchmod, 1_u8), (libc::SYS_fchmodat, 2), (libc::SYS_openat, 3)];
    #[cfg(target_arch = "x86_64")]
    calls.extend([(libc::SYS_chmod, 1), (libc::SYS_open, 2)]);
    for (call, argument) in &calls {
        let with = |mode: u64| {
            let mut arguments = [7; 6];
            arguments[usize::from(*argument)] = mode;
            arguments
        };
        for mode in [0, 0o600, 0o1777, 0xffff_0000_0000] {
            assert_eq!(of_daemon(*call, with(mode)), ALLOW, "{call} {mode:o}");
            assert_eq!(of_program(*call, with(mode)), ALLOW, "{call} {mode:o}");
        }
        for mode in [0o4755, 0o2755, 0o6000, 0xffff_0000_4755] {
            assert_eq!(of_daemon(*call, with(mode)), refused, "{call} {mode:o}");
            assert_eq!(of_program(*call, with(mode)), EPERM, "{call} {mode:o}");
        }
    }
    // Where the mode cannot be seen, or there is no telling what is made.
    for call in [libc::SYS_openat2, libc::SYS_fchmodat2, libc::SYS_mknodat, libc::SYS_open_by_handle_at] {
        assert_ne!(of_daemon(call, [0; 6]), ALLOW, "{call}");
        assert_ne!(of_program(call, [0; 6]), ALLOW, "{call}");
    }
    #[cfg(target_arch = "x86_64")]
    for call in [libc::SYS_creat, libc::SYS_mknod] {
        assert_eq!(of_daemon(call, [0; 6]), refused, "{call}");
    }
}

#[test]
fn programs_are_refused_what_the_daemon_is() {
    let daemon = allowed().unwrap();
    let later = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
    for call in FOREIGN.iter().chain(DEADLY).filter(|call| ![libc::SYS_execve, libc::SYS_execveat].contains(call)) {
        assert_eq!(of_program(*call, [0; 6]), EPERM, "{call}");
        assert!(later.contains(call) || !daemon.contains_key(call), "{call}");
    }
    for call in [libc::SYS_execve, libc::SYS_read, libc::SYS_futex, libc::SYS_setresuid, libc::SYS_wait4] {
        assert_eq!(of_program(call, [0; 6]), ALLOW, "{call}");
    }
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK] {
        assert_eq!(of_program(libc::SYS_socket, [family as u64, 0, 0, 0, 0, 0]), ALLOW, "{family}");
    }
    for family in [libc::AF_PACKET, libc::AF_ALG, libc::AF_VSOCK, libc::AF_BLUETOOTH] {
        assert_eq!(of_program(libc::SYS_socket, [family as u64, 0, 0, 0, 0, 0]), EPERM, "{family}");
    }
    // A process and a thread as glibc makes them, and a host of its own.
    let (process, thread) = (libc::SIGCHLD, 0x003d_0f00);
    for (flags, said) in
        [(process, ALLOW), (thread, ALLOW), (process | libc::CLONE_NEWUSER, EPERM), (libc::CLONE_NEWNET, EPERM)]
    {
        assert_eq!(of_program(libc::SYS_clone, [u64::from(flags.cast_unsigned()), 0, 0, 0, 0, 0]), said, "{flags:#x}");
    }
    assert_eq!(of_program(libc::SYS_clone3, [0; 6]), ENOSYS);
}

#[test]
fn the_daemon_makes_threads_and_no_processes() {
    let clone = |flags: u64| of_daemon(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]);
    assert_eq!((clone(0x003d_0f00), clone(libc::SIGCHLD as u64)), (ALLOW, EPERM));
    assert_eq!(of_daemon(libc::SYS_clone3, [0; 6]), ENOSYS);
}

#[test]
fn no_call_passes_by_another_number() {
    let (daemon, programs) = (of_daemons().unwrap().0, of_programs().unwrap());
    let x32 = 1 << 30;
    for call in ALLOWED.iter().chain(OLDER).chain(DEADLY).chain(FOREIGN) {
        assert_eq!(all(&daemon, number(*call) | x32, HERE, [0; 6]), KILL, "{call}");
        assert_eq!(all(&programs, number(*call) | x32, HERE, [0; 6]), EPERM, "{call}");
        for filters in [&daemon, &programs] {
            assert_eq!(all(filters, number(*call), I386, [0; 6]), KILL, "{call}");
        }
    }
}
