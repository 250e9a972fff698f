//! Idle priority of the calling thread and those it starts. Leaf module: three system calls.

use std::io;

/// `ioprio_set`'s "a process or thread" and class "idle" (linux/ioprio.h).
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_IDLE: libc::c_int = 3 << 13;

/// Lets the calling thread run only when nobody else wants the CPU (`SCHED_IDLE`, nice 19) or the disk (I/O class idle).
/// Returns what the kernel refused: the thread then runs all the same, less politely.
#[must_use]
pub(crate) fn become_idle() -> Vec<(&'static str, io::Error)> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread; the parameters are read before the call returns.
    let policy = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    let policy = outcome("SCHED_IDLE", policy.into());
    // SAFETY: takes numbers only; 0 is the calling thread.
    let nice = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
    let nice = outcome("nice 19", nice.into());
    // SAFETY: takes numbers only; 0 is the calling thread.
    let disk = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE) };
    let disk = outcome("I/O class idle", disk);
    [policy, nice, disk].into_iter().flatten().collect()
}

/// Must be called right after the system call: the error is the thread's last.
fn outcome(what: &'static str, result: libc::c_long) -> Option<(&'static str, io::Error)> {
    (result < 0).then(|| (what, io::Error::last_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_and_no_other_is_idle() {
        let policy = || {
            // SAFETY: takes a number only; 0 is the calling thread.
            unsafe { libc::sched_getscheduler(0) }
        };
        let before = policy();
        std::thread::spawn(move || {
            // Lowering oneself needs no privilege.
            let refused = become_idle();
            assert!(refused.is_empty(), "{refused:?}");
            assert_eq!(policy(), libc::SCHED_IDLE);
            // SAFETY: takes numbers only.
            assert_eq!(unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }, 19);
            // SAFETY: takes numbers only.
            let disk = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) };
            assert_eq!(disk, libc::c_long::from(IOPRIO_IDLE));
        })
        .join()
        .unwrap();
        assert_eq!(policy(), before);
    }
}
