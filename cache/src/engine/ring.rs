//! The io_uring driver: plain operations in, completions out.
//!
//! Leaf module: it hands pointers to the kernel. They come from [`RawOp`], whose frame the caller keeps in place until
//! the completion with the same `user_data` has been taken.
//!
//! Set-up flags: `SINGLE_ISSUER | DEFER_TASKRUN | TASKRUN_FLAG` (Linux ≥ 6.1), so that completion work runs when this
//! thread asks for it instead of interrupting it; without them on older kernels. Needed at least: Linux 5.13 (multishot
//! poll, timeouts in `io_uring_enter`).

use super::op::RawOp;
use crate::arena::Arena;
use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use std::collections::VecDeque;
use std::os::fd::{OwnedFd, RawFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

/// `user_data` of requests whose completion nobody waits for.
const IGNORED: u64 = u64::MAX;
/// Worker threads of the kernel for requests that block, at most.
const WORKERS_MAX: u32 = 4096;
/// The kernel takes at most this much as one registered buffer. A multiple of the block, so no block straddles two.
const REGISTERED_MAX_BYTES: usize = 1 << 30;

/// What a ring of ours does. What a ring does no seccomp filter sees, so nothing else is in it: nothing that opens files or makes
/// sockets above all.
const OPERATIONS: [u8; 14] = [
    opcode::Nop::CODE,
    opcode::Read::CODE,
    opcode::ReadFixed::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::RecvMsg::CODE,
    opcode::SendMsg::CODE,
    opcode::Connect::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];
/// `IORING_REGISTER_…` of <linux/io_uring.h>: buffers, their end, other buffers in their place, and how many workers.
const REGISTRATIONS: [u8; 4] = [0, 1, 16, 19];
/// `IOSQE_…`: none of them lets a request do more.
const FLAGS: u8 = u8::MAX;

/// The end, or with `more` one event, of the operation that was submitted with this `user_data`.
#[derive(Clone, Copy)]
pub(super) struct Completion {
    pub(super) user_data: u64,
    /// Negative errno on failure.
    pub(super) result: i32,
    pub(super) more: bool,
}

pub(super) struct Ring {
    ring: IoUring,
    /// Entries that found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
    /// The arena that the kernel has pinned: kept alive for as long as the ring.
    /// With the bytes from its start that the kernel has.
    registered: Option<(Arc<Arena>, usize)>,
    /// Files whose operations may block where they are submitted.
    blocking: Vec<Weak<OwnedFd>>,
}

impl Ring {
    /// Opens a ring and proves that it works.
    ///
    /// # Errors
    /// `ENOSYS`, `EPERM` (seccomp, `kernel.io_uring_disabled`), or `Unsupported` where the kernel is too old.
    pub(super) fn open(entries: u32) -> io::Result<Ring> {
        let modern = IoUring::builder()
            .setup_clamp()
            .setup_cqsize(entries.saturating_mul(4))
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_r_disabled()
            .build(entries);
        let ring = match modern {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let mut older = IoUring::builder();
                older.setup_clamp().setup_cqsize(entries.saturating_mul(4)).setup_r_disabled().build(entries)?
            }
            other => other?,
        };
        let params = ring.params();
        // Resource tagging came with 5.13, as multishot poll did, which has no flag of its own.
        if !(params.is_feature_ext_arg() && params.is_feature_nodrop() && params.is_feature_resource_tagging()) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring is older than Linux 5.13"));
        }
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::Recv::CODE,
            opcode::RecvMsg::CODE,
            opcode::Send::CODE,
            opcode::SendMsg::CODE,
            opcode::Connect::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if let Some(code) = needed.into_iter().find(|code| !probe.is_supported(*code)) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("io_uring operation {code} is not allowed here"),
            ));
        }
        restrict(&ring)?;
        // Files on NFS, FUSE and the like block in the kernel's worker threads, of which there are four a processor: some
        // requests to a server that hangs would leave none for the other disks of this shard. So there may be one for
        // each request; idle ones end by themselves. Since Linux 5.15; without it the kernel's limit stays.
        let _ = ring.submitter().register_iowq_max_workers(&mut [WORKERS_MAX, 0]);
        let mut ring = Ring { ring, backlog: VecDeque::new(), registered: None, blocking: Vec::new() };
        ring.submit(-1, RawOp::Nop, 0, false);
        let mut done = Vec::new();
        ring.turn(Some(Some(Duration::from_secs(5))), &mut done)?;
        match done.as_slice() {
            [Completion { user_data: 0, result: 0, .. }] => Ok(ring),
            _ => Err(io::Error::other("io_uring does not complete operations here")),
        }
    }

    /// Lets the kernel pin the arena once instead of at every read into it.
    ///
    /// # Errors
    /// What `io_uring_register(2)` says: mostly `ENOMEM`, when `RLIMIT_MEMLOCK` is lower than the arena.
    pub(super) fn register(&mut self, arena: Arc<Arena>) -> io::Result<()> {
        if self.registered.is_some() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "an arena is registered with this shard already"));
        }
        let (base, len) = arena.raw_parts();
        let chunks: Vec<libc::iovec> = (0..len)
            .step_by(REGISTERED_MAX_BYTES)
            .map(|at| libc::iovec {
                iov_base: base.wrapping_add(at).cast(),
                iov_len: (len - at).min(REGISTERED_MAX_BYTES),
            })
            .collect();
        // SAFETY: the chunks lie within the arena's mapping, which `registered` keeps alive as long as the ring.
        unsafe { self.ring.submitter().register_buffers(&chunks)? };
        self.registered = Some((arena, len));
        Ok(())
    }

    /// Has the kernel let go of what it pinned of the arena from `keep` bytes on, rounded down to whole chunks. Operations
    /// under way end with what they have.
    ///
    /// # Errors
    /// The kernel keeps it, or takes no entries just now.
    pub(super) fn unregister(&mut self, keep: usize) -> io::Result<()> {
        let Some((_, len)) = &self.registered else { return Ok(()) };
        if keep / REGISTERED_MAX_BYTES >= len.div_ceil(REGISTERED_MAX_BYTES) {
            return Ok(());
        }
        // The kernel looks a buffer up when it takes an operation: those that wait in the queue name what would be gone then,
        // and would fail with `EFAULT`.
        self.send_all()?;
        let Some((_, len)) = &mut self.registered else { return Ok(()) };
        let first = keep / REGISTERED_MAX_BYTES;
        let chunks = len.div_ceil(REGISTERED_MAX_BYTES).saturating_sub(first);
        let nothing = vec![libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; chunks];
        // SAFETY: no memory is handed to the kernel: entries of its table become empty.
        unsafe { self.ring.submitter().register_buffers_update(first as u32, &nothing, None)? };
        *len = first * REGISTERED_MAX_BYTES;
        Ok(())
    }

    /// Gives the kernel all entries that are queued.
    fn send_all(&mut self) -> io::Result<()> {
        loop {
            self.refill();
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submitter().submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Index of the registered buffer that contains all of `iov`.
    fn fixed_index(&self, iov: &libc::iovec) -> Option<u16> {
        let (arena, len) = self.registered.as_ref()?;
        let start = (iov.iov_base as usize).checked_sub(arena.start() as usize)?;
        let end = start.checked_add(iov.iov_len)?;
        if iov.iov_len == 0 || end > *len || start / REGISTERED_MAX_BYTES != (end - 1) / REGISTERED_MAX_BYTES {
            return None;
        }
        u16::try_from(start / REGISTERED_MAX_BYTES).ok()
    }

    /// From now on operations on this file are run by the kernel's worker threads from their start: where the file's
    /// server hangs they would hold whoever submits them, and with it every disk of the shard.
    pub(super) fn run_aside(&mut self, file: &Rc<OwnedFd>) {
        self.blocking.retain(|other| other.strong_count() > 0);
        self.blocking.push(Rc::downgrade(file));
    }

    pub(super) fn runs_aside(&self, file: &Rc<OwnedFd>) -> bool {
        self.blocking.iter().any(|other| other.as_ptr() == Rc::as_ptr(file))
    }

    /// Queues an operation; it goes to the kernel with the next [`Ring::turn`]. `aside`: see [`Ring::run_aside`].
    pub(super) fn submit(&mut self, fd: RawFd, op: RawOp, user_data: u64, aside: bool) {
        let entry = self.entry(fd, op, aside).user_data(user_data);
        self.push(if aside { entry.flags(squeue::Flags::ASYNC) } else { entry });
    }

    /// Asks for the end of an operation. Its own completion still arrives, maybe with `ECANCELED`.
    pub(super) fn cancel(&mut self, user_data: u64) {
        self.push(opcode::AsyncCancel::new(user_data).build().user_data(IGNORED));
    }

    fn entry(&self, fd: RawFd, op: RawOp, aside: bool) -> squeue::Entry {
        let fd = Fd(fd);
        // A worker looks the buffer up when it comes to it: by then it may be registered no more.
        let fixed_index = |iov| if aside { None } else { self.fixed_index(iov) };
        match op {
            RawOp::Nop => opcode::Nop::new().build(),
            RawOp::Read { iov, count: 1, offset } => {
                // SAFETY: the frame keeps `count` initialised entries at `iov` until completion.
                let one = unsafe { *iov };
                let len = one.iov_len as u32;
                match fixed_index(&one) {
                    Some(index) => opcode::ReadFixed::new(fd, one.iov_base.cast(), len, index).offset(offset).build(),
                    None => opcode::Read::new(fd, one.iov_base.cast(), len).offset(offset).build(),
                }
            }
            RawOp::Read { iov, count, offset } => opcode::Readv::new(fd, iov, count).offset(offset).build(),
            RawOp::Write { iov, count: 1, offset, dsync } => {
                // SAFETY: as above.
                let one = unsafe { *iov };
                let (len, flags) = (one.iov_len as u32, if dsync { libc::RWF_DSYNC } else { 0 });
                match fixed_index(&one) {
                    Some(index) => opcode::WriteFixed::new(fd, one.iov_base.cast(), len, index)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                    None => opcode::Write::new(fd, one.iov_base.cast(), len).offset(offset).rw_flags(flags).build(),
                }
            }
            RawOp::Write { iov, count, offset, dsync } => opcode::Writev::new(fd, iov, count)
                .offset(offset)
                .rw_flags(if dsync { libc::RWF_DSYNC } else { 0 })
                .build(),
            RawOp::Datasync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            RawOp::Fallocate { mode, offset, len } => opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build(),
            RawOp::Recv { msg, flags } => opcode::RecvMsg::new(fd, msg).flags(flags as u32).build(),
            RawOp::Send { msg, flags } => opcode::SendMsg::new(fd, msg).flags(flags as u32).build(),
            RawOp::Connect { address, len } => opcode::Connect::new(fd, address, len).build(),
            RawOp::Poll { events, multishot } => opcode::PollAdd::new(fd, events as u32).multi(multishot).build(),
            // Offset -1 means "at the file's own position", the only one that an eventfd knows.
            RawOp::ReadCounter { value } => opcode::Read::new(fd, value.cast(), 8).offset(u64::MAX).build(),
            RawOp::WriteCounter { value } => opcode::Write::new(fd, value.cast(), 8).offset(u64::MAX).build(),
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: the entry's pointers are valid until its completion (see the head of this module).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.backlog.push_back(entry);
        }
    }

    fn refill(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            // SAFETY: as in `push`.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_err() {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    /// Submits what is queued, waits if asked to, and takes completions.
    ///
    /// `wait`: `None` doesn't wait, `Some(None)` waits for a completion, `Some(Some(t))` for at most `t`.
    ///
    /// # Errors
    /// Only for failures that make the ring unusable.
    pub(super) fn turn(&mut self, wait: Option<Option<Duration>>, out: &mut Vec<Completion>) -> io::Result<()> {
        let before = out.len();
        self.take(out);
        loop {
            self.refill();
            let (queued, work) = {
                let queue = self.ring.submission();
                (!queue.is_empty(), queue.taskrun() || queue.cq_overflow())
            };
            let waiting = wait.is_some() && out.len() == before && self.backlog.is_empty();
            if !(queued || work || waiting) {
                break;
            }
            let entered = match wait {
                Some(Some(limit)) if waiting => {
                    let limit = Timespec::from(limit);
                    self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit))
                }
                Some(None) if waiting => self.ring.submitter().submit_and_wait(1),
                _ => self.ring.submitter().submit(),
            };
            let stuck = match entered {
                Ok(_) => false,
                Err(error) => match error.raw_os_error() {
                    Some(libc::ETIME | libc::EINTR) => false,
                    // Completions must be taken, or memory come free, before more goes in.
                    Some(libc::EBUSY | libc::EAGAIN) => true,
                    _ => return Err(error),
                },
            };
            self.take(out);
            if self.backlog.is_empty() || stuck {
                break;
            }
        }
        Ok(())
    }

    /// Whether completions wait, or work of the kernel's that makes some, or entries to submit.
    pub(super) fn has_completions(&mut self) -> bool {
        let (queued, work) = {
            let queue = self.ring.submission();
            (!queue.is_empty(), queue.taskrun() || queue.cq_overflow())
        };
        queued || work || !self.backlog.is_empty() || !self.ring.completion().is_empty()
    }

    fn take(&mut self, out: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            if entry.user_data() != IGNORED {
                out.push(Completion {
                    user_data: entry.user_data(),
                    result: entry.result(),
                    more: cqueue::more(entry.flags()),
                });
            }
        }
    }
}

/// Takes everything from the ring that the engine does not do, and switches it on: for good (io_uring_register(2),
/// `IORING_REGISTER_RESTRICTIONS`, Linux 5.10).
fn restrict(ring: &IoUring) -> io::Result<()> {
    // An older kernel does not know the newest operations, and takes no restriction that names them.
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let operations = OPERATIONS.into_iter().filter(|code| probe.is_supported(*code)).map(Restriction::sqe_op);
    let mut all: Vec<_> = operations.chain(REGISTRATIONS.map(Restriction::register_op)).collect();
    all.push(Restriction::sqe_flags_allowed(FLAGS));
    ring.submitter().register_restrictions(&mut all)?;
    ring.submitter().register_enable_rings()
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("backlog", &self.backlog.len()).finish_non_exhaustive()
    }
}
