//! The system calls behind the thread pool. Leaf module: each function runs one [`RawOp`] and returns what the kernel
//! would put into a completion, a count or a negative errno.

use super::op::RawOp;
use std::io;
use std::os::fd::RawFd;

fn errno() -> i32 {
    -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn outcome(result: isize) -> i32 {
    if result < 0 { errno() } else { i32::try_from(result).unwrap_or(i32::MAX) }
}

/// Runs a file operation; may block for as long as the storage takes.
///
/// # Safety
/// The operation's frame must stay in place until this returns.
pub(super) unsafe fn file_op(fd: RawFd, op: RawOp) -> i32 {
    loop {
        let result = match op {
            RawOp::Read { iov, count, offset } => {
                // SAFETY: the frame keeps the vectors and the buffers that they name valid (the caller's promise).
                unsafe { libc::preadv2(fd, iov, count as libc::c_int, offset as libc::off_t, 0) }
            }
            RawOp::Write { iov, count, offset, dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above.
                unsafe { libc::pwritev2(fd, iov, count as libc::c_int, offset as libc::off_t, flags) }
            }
            RawOp::Datasync => {
                // SAFETY: takes numbers only.
                unsafe { libc::fdatasync(fd) as isize }
            }
            RawOp::Fallocate { mode, offset, len } => {
                // SAFETY: takes numbers only.
                unsafe { libc::fallocate(fd, mode, offset as libc::off_t, len as libc::off_t) as isize }
            }
            _ => return -libc::EINVAL,
        };
        let result = outcome(result);
        if result != -libc::EINTR {
            return result;
        }
    }
}

/// Tries a socket or eventfd operation without blocking; `None` if it would have to wait.
///
/// # Safety
/// As for [`file_op`].
pub(super) unsafe fn try_now(fd: RawFd, op: RawOp) -> Option<i32> {
    let result = match op {
        RawOp::Nop => 0,
        RawOp::Recv { msg, flags } => {
            // SAFETY: the frame keeps the message and the buffers that it names valid (the caller's promise).
            unsafe { libc::recvmsg(fd, msg, (flags & !libc::MSG_WAITALL) | libc::MSG_DONTWAIT) }
        }
        RawOp::Send { msg, flags } => {
            // SAFETY: as above.
            unsafe { libc::sendmsg(fd, msg, (flags & !libc::MSG_WAITALL) | libc::MSG_DONTWAIT) }
        }
        RawOp::WriteCounter { value } => {
            // SAFETY: the frame keeps the 8 bytes at `value` valid.
            unsafe { libc::write(fd, value.cast(), 8) }
        }
        _ => return Some(-libc::EINVAL),
    };
    match outcome(result) {
        error if error == -libc::EAGAIN || error == -libc::EINTR => None,
        result => Some(result),
    }
}

/// Reads an eventfd that `poll` called readable.
pub(super) fn read_counter(fd: RawFd, value: &mut u64) -> i32 {
    // SAFETY: `value` is 8 writable bytes.
    outcome(unsafe { libc::read(fd, (&raw mut *value).cast(), 8) })
}

/// Starts to connect without waiting; `None` while the connection is being made.
///
/// # Safety
/// As for [`file_op`].
pub(super) unsafe fn connect_start(fd: RawFd, address: *const libc::sockaddr, len: libc::socklen_t) -> Option<i32> {
    set_nonblocking(fd, true);
    // SAFETY: the frame keeps the address in place (the caller's promise).
    let result = outcome(unsafe { libc::connect(fd, address, len) } as isize);
    if result == -libc::EINPROGRESS {
        return None;
    }
    set_nonblocking(fd, false);
    // A unix socket whose listener's queue is full: the caller tries again later, as it does after a refusal.
    Some(result)
}

/// The result of a connect that `poll` called done.
pub(super) fn connect_end(fd: RawFd) -> i32 {
    set_nonblocking(fd, false);
    let mut error: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `error` and `len` are valid for the call, and `len` says how large `error` is.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut error).cast(), &raw mut len) };
    if result < 0 { errno() } else { -error }
}

fn set_nonblocking(fd: RawFd, on: bool) {
    // SAFETY: reads the descriptor's flags; a bad descriptor is an error return.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags >= 0 {
        let flags = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
        // SAFETY: as above.
        unsafe { libc::fcntl(fd, libc::F_SETFL, flags) };
    }
}

/// `poll(2)` for at most `timeout_ms` (-1: without limit). An interrupted wait reports nothing ready.
pub(super) fn poll(fds: &mut [libc::pollfd], timeout_ms: i32) -> io::Result<()> {
    // SAFETY: the slice is valid for its own length.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
    if result < 0 {
        fds.iter_mut().for_each(|fd| fd.revents = 0);
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EINTR) { Ok(()) } else { Err(error) };
    }
    Ok(())
}
