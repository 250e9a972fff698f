//! One operation and all memory that the kernel may touch on its behalf.
//!
//! - [`Op`]: what is asked for, with the descriptor and the buffers that it owns
//! - [`Frame`]: an operation at a fixed place in memory, with the `iovec`s, `msghdr` and address it points to
//! - [`RawOp`]: the same as plain pointers, for a driver to submit or run
//!
//! A frame is boxed before it is prepared and is not touched again until its completion, so every pointer in its
//! [`RawOp`] stays valid for exactly as long as a driver may use it. Leaf module: it holds the raw pointers.

use super::bufs::{IoBuf, parts};
use super::net::RawAddress;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::rc::Rc;

/// At most this many parts go into one vectored call (`UIO_MAXIOV`); the rest is left for the caller's next call.
const IOV_MAX: usize = 1024;

/// What is asked for. Buffer ranges count through the list of buffers as one run of bytes.
pub(super) enum Op {
    Read {
        bufs: Vec<IoBuf>,
        range: Range<usize>,
        offset: u64,
    },
    Write {
        bufs: Vec<IoBuf>,
        range: Range<usize>,
        offset: u64,
        dsync: bool,
    },
    Datasync,
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    /// With `wait_all` the kernel may gather the whole range before it completes; it need not.
    Recv {
        bufs: Vec<IoBuf>,
        range: Range<usize>,
        wait_all: bool,
    },
    Send {
        bufs: Vec<IoBuf>,
        range: Range<usize>,
    },
    Connect {
        address: RawAddress,
    },
    Poll {
        events: i16,
    },
    /// Poll that completes again on every new edge until it is cancelled.
    Watch,
    ReadCounter,
    WriteCounter,
}

/// An operation as plain pointers. Valid while the [`Frame`] that it came from lives.
#[derive(Clone, Copy)]
pub(super) enum RawOp {
    Nop,
    Read { iov: *const libc::iovec, count: u32, offset: u64 },
    Write { iov: *const libc::iovec, count: u32, offset: u64, dsync: bool },
    Datasync,
    Fallocate { mode: i32, offset: u64, len: u64 },
    Recv { msg: *mut libc::msghdr, flags: i32 },
    Send { msg: *const libc::msghdr, flags: i32 },
    Connect { address: *const libc::sockaddr, len: libc::socklen_t },
    Poll { events: i16, multishot: bool },
    ReadCounter { value: *mut u64 },
    WriteCounter { value: *const u64 },
}

pub(super) struct Frame {
    op: Op,
    fd: Rc<OwnedFd>,
    iov: Vec<libc::iovec>,
    msg: libc::msghdr,
    counter: u64,
}

impl Frame {
    pub(super) fn new(fd: Rc<OwnedFd>, op: Op) -> Box<Frame> {
        // SAFETY: `msghdr` is a plain C structure for which all zeroes mean "nothing".
        let msg = unsafe { std::mem::zeroed() };
        Box::new(Frame { op, fd, iov: Vec::new(), msg, counter: 1 })
    }

    pub(super) fn file(&self) -> &Rc<OwnedFd> {
        &self.fd
    }

    pub(super) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Fills in the pointers. The frame must stay boxed and unmoved until the operation has completed.
    pub(super) fn prepare(self: &mut Box<Frame>) -> RawOp {
        let frame: &mut Frame = self;
        match &mut frame.op {
            Op::Read { bufs, range, offset } => {
                fill(&mut frame.iov, bufs, range);
                RawOp::Read { iov: frame.iov.as_ptr(), count: frame.iov.len() as u32, offset: *offset }
            }
            Op::Write { bufs, range, offset, dsync } => {
                fill(&mut frame.iov, bufs, range);
                RawOp::Write { iov: frame.iov.as_ptr(), count: frame.iov.len() as u32, offset: *offset, dsync: *dsync }
            }
            Op::Datasync => RawOp::Datasync,
            Op::Fallocate { mode, offset, len } => RawOp::Fallocate { mode: *mode, offset: *offset, len: *len },
            Op::Recv { bufs, range, wait_all } => {
                let flags = if *wait_all { libc::MSG_WAITALL } else { 0 };
                fill(&mut frame.iov, bufs, range);
                frame.msg.msg_iov = frame.iov.as_mut_ptr();
                frame.msg.msg_iovlen = frame.iov.len();
                RawOp::Recv { msg: &raw mut frame.msg, flags }
            }
            Op::Send { bufs, range } => {
                fill(&mut frame.iov, bufs, range);
                frame.msg.msg_iov = frame.iov.as_mut_ptr();
                frame.msg.msg_iovlen = frame.iov.len();
                // Without NOSIGNAL a server that hangs up would kill this process.
                RawOp::Send { msg: &raw const frame.msg, flags: libc::MSG_NOSIGNAL | libc::MSG_WAITALL }
            }
            Op::Connect { address } => {
                let (address, len) = address.as_ptr();
                RawOp::Connect { address, len }
            }
            Op::Poll { events } => RawOp::Poll { events: *events, multishot: false },
            Op::Watch => RawOp::Poll { events: libc::POLLIN, multishot: true },
            Op::ReadCounter => RawOp::ReadCounter { value: &raw mut frame.counter },
            Op::WriteCounter => RawOp::WriteCounter { value: &raw const frame.counter },
        }
    }

    /// The buffers, after completion.
    pub(super) fn into_bufs(self: Box<Frame>) -> Vec<IoBuf> {
        match self.op {
            Op::Read { bufs, .. } | Op::Write { bufs, .. } | Op::Recv { bufs, .. } | Op::Send { bufs, .. } => bufs,
            _ => Vec::new(),
        }
    }

    /// The value read from an eventfd, after completion.
    pub(super) fn counter(&self) -> u64 {
        self.counter
    }
}

fn fill(iov: &mut Vec<libc::iovec>, bufs: &mut [IoBuf], range: &Range<usize>) {
    iov.clear();
    iov.extend(
        parts(bufs, range.clone())
            .take(IOV_MAX)
            .map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() }),
    );
    if iov.is_empty() {
        // An empty transfer still needs a list to point to.
        iov.push(libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 });
    }
}
