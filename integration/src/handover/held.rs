//! A process that is held by a pidfd (pidfd_open(2)): its number may go to another, the descriptor stays its own. One of the
//! leaf modules with `unsafe`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long a process may take to end that was killed: the kernel waits for its I/O.
const END: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(crate) struct Held {
    pid: i32,
    pidfd: OwnedFd,
}

impl Held {
    /// Holds the process that has this number now.
    pub(crate) fn new(pid: i32) -> io::Result<Self> {
        // SAFETY: no memory is touched; the result is checked.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor for us, and nothing else knows it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { pid, pidfd })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Kills it. Nothing happens where that is not allowed, or if it has ended.
    pub(crate) fn kill(&self) {
        let number = libc::c_long::from(self.pidfd.as_raw_fd());
        let signal = libc::c_long::from(libc::SIGKILL);
        let nothing = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open, and without siginfo no memory is read.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, number, signal, nothing, 0) };
    }

    /// Waits for its end. False: it is still there.
    pub(super) fn ends(&self) -> bool {
        let limit = PollTimeout::try_from(END).unwrap_or(PollTimeout::MAX);
        let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut ended, limit), Ok(1))
    }
}
