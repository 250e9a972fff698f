//! What a task on a shard's thread can ask for.
//!
//! - [`Shard`]: spawn, I/O, timers; cheap to clone, stays on its thread
//! - [`EventWatch`]: kicks of a virtqueue, one after the other
//! - [`Elapsed`]: a time limit was reached

use super::bufs::{IoBuf, total_len};
use super::exec::{JoinHandle, Shared};
use super::handle::{Call, EngineKind, ShardGone, call_pair};
use super::net::{RawAddress, SocketAddress};
use super::op::{Frame, Op};
use super::polling::PollSource;
use super::reactor::{Driver, Inner, Operation, State};
use super::timer::TimerKey;
use crate::arena::Arena;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use std::{fmt, io};

fn count(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

fn unit(result: i32) -> io::Result<()> {
    count(result).map(|_| ())
}

/// A time limit was reached before the future was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the time limit was reached")]
pub struct Elapsed;

/// The event loop as seen by the tasks on its thread.
///
/// Operations take their buffers by value and give them back with the result, also on failure. Nothing happens before
/// the future is first polled. Dropping it afterwards cancels the operation if the kernel has not done it yet; its
/// buffers are freed when the kernel has let go of them.
#[derive(Clone)]
pub struct Shard {
    inner: Rc<Inner>,
}

impl Shard {
    pub(super) fn new(shared: Arc<Shared>, driver: Driver) -> Shard {
        Shard { inner: Inner::new(shared, driver) }
    }

    pub(super) fn inner(&self) -> &Rc<Inner> {
        &self.inner
    }

    pub fn name(&self) -> &str {
        &self.inner.shared.name
    }

    pub fn kind(&self) -> EngineKind {
        self.inner.kind
    }

    /// Whether it ends: what is spawned now may never run.
    pub(super) fn is_stopping(&self) -> bool {
        self.inner.shared.stopping.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// Tasks that have panicked on this shard so far.
    pub fn panicked_tasks(&self) -> u64 {
        self.inner.tasks.panics.get()
    }

    /// Operations that the kernel, or a thread of the pool, has not given back yet.
    pub fn operations_in_flight(&self) -> usize {
        self.inner.operations()
    }

    /// Starts a task on this shard. It runs whether or not the handle is kept.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
        self.inner.tasks.spawn(future)
    }

    /// Runs blocking code on a thread of its own: opening files and looking up names may hang, and a shard must not.
    ///
    /// # Errors
    /// The thread could not be started, or `f` panicked.
    pub fn blocking<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = io::Result<T>> + 'static {
        let name = format!("{}-aux", self.name());
        async move {
            let (answer, call): (_, Call<T>) = call_pair();
            std::thread::Builder::new().name(name).spawn(move || answer.send(f()))?;
            call.await.map_err(|ShardGone| io::Error::other("a helper thread panicked"))
        }
    }

    /// Registers the RAM tier's memory with this shard's ring, so that transfers of a single [`IoBuf::Arena`] need no
    /// page pinning each. The arena lives as long as the shard then. At most one arena a shard.
    ///
    /// # Errors
    /// `Unsupported` on the thread pool; otherwise what the kernel says, mostly `ENOMEM` when `RLIMIT_MEMLOCK` is lower
    /// than the arena. Everything works without registration, so this is worth one log line and no more.
    pub fn register_arena(&self, arena: Arc<Arena>) -> io::Result<()> {
        match &mut *self.inner.driver.borrow_mut() {
            Driver::Ring(ring) => ring.register(arena),
            Driver::Pool(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Has the kernel let go of the arena's pages from `keep` bytes on; transfers there pin theirs one by one from now on. To be
    /// called by every shard before the arena shrinks to that, see [`Arena::shrink`].
    ///
    /// # Errors
    /// The kernel keeps them.
    pub fn unregister_arena(&self, keep: usize) -> io::Result<()> {
        match &mut *self.inner.driver.borrow_mut() {
            Driver::Ring(ring) => ring.unregister(keep),
            Driver::Pool(_) => Ok(()),
        }
    }

    /// Says that operations on this file may block in the kernel where others wait for their device: see
    /// [`blocks_in_kernel`]. They cost a change of threads each then. The thread pool has a thread for each operation
    /// anyway, up to its limit.
    pub fn run_aside(&self, file: &Rc<OwnedFd>) {
        if let Driver::Ring(ring) = &mut *self.inner.driver.borrow_mut() {
            ring.run_aside(file);
        }
    }

    fn operation(&self, fd: &Rc<OwnedFd>, op: Op) -> Operation {
        Operation::new(&self.inner, Frame::new(Rc::clone(fd), op))
    }

    fn transfer(&self, fd: &Rc<OwnedFd>, op: Op) -> impl Future<Output = (io::Result<usize>, Vec<IoBuf>)> + 'static {
        let operation = self.operation(fd, op);
        async move {
            let (result, frame) = operation.await;
            (count(result), frame.into_bufs())
        }
    }

    fn simple(&self, fd: &Rc<OwnedFd>, op: Op) -> impl Future<Output = io::Result<()>> + 'static {
        let operation = self.operation(fd, op);
        async move { unit(operation.await.0) }
    }

    /// Reads from `offset` into the buffers, one after the other. May read less, 0 at the end of the file.
    pub fn readv(
        &self,
        fd: &Rc<OwnedFd>,
        bufs: Vec<IoBuf>,
        offset: u64,
    ) -> impl Future<Output = (io::Result<usize>, Vec<IoBuf>)> + 'static {
        let range = 0..total_len(&bufs);
        self.transfer(fd, Op::Read { bufs, range, offset })
    }

    /// Writes the buffers, one after the other, from `offset`. May write less. With `dsync` the data is durable when
    /// this completes (`RWF_DSYNC`).
    pub fn writev(
        &self,
        fd: &Rc<OwnedFd>,
        bufs: Vec<IoBuf>,
        offset: u64,
        dsync: bool,
    ) -> impl Future<Output = (io::Result<usize>, Vec<IoBuf>)> + 'static {
        let range = 0..total_len(&bufs);
        self.transfer(fd, Op::Write { bufs, range, offset, dsync })
    }

    /// [`Shard::readv`] into bytes `range` of the buffers seen as one run.
    pub(crate) fn read_part(
        &self,
        fd: &Rc<OwnedFd>,
        bufs: Vec<IoBuf>,
        range: Range<usize>,
        offset: u64,
    ) -> impl Future<Output = (io::Result<usize>, Vec<IoBuf>)> + 'static {
        self.transfer(fd, Op::Read { bufs, range, offset })
    }

    /// Reads until the buffers are full or the file ends; the count says how much there was.
    pub fn read_exact_at(
        &self,
        fd: &Rc<OwnedFd>,
        mut bufs: Vec<IoBuf>,
        offset: u64,
    ) -> impl Future<Output = (io::Result<usize>, Vec<IoBuf>)> + 'static {
        let (this, fd) = (self.clone(), Rc::clone(fd));
        async move {
            let len = total_len(&bufs);
            let mut done = 0usize;
            while done < len {
                let op = Op::Read { bufs, range: done..len, offset: offset.saturating_add(done as u64) };
                let (result, back) = this.transfer(&fd, op).await;
                bufs = back;
                match result {
                    Ok(0) => break,
                    Ok(n) => done += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return (Err(error), bufs),
                }
            }
            (Ok(done), bufs)
        }
    }

    /// Writes all of the buffers. After a failure an unknown part may have been written.
    pub fn write_all_at(
        &self,
        fd: &Rc<OwnedFd>,
        mut bufs: Vec<IoBuf>,
        offset: u64,
        dsync: bool,
    ) -> impl Future<Output = (io::Result<()>, Vec<IoBuf>)> + 'static {
        let (this, fd) = (self.clone(), Rc::clone(fd));
        async move {
            let len = total_len(&bufs);
            let mut done = 0usize;
            while done < len {
                let op = Op::Write { bufs, range: done..len, offset: offset.saturating_add(done as u64), dsync };
                let (result, back) = this.transfer(&fd, op).await;
                bufs = back;
                match result {
                    Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), bufs),
                    Ok(n) => done += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return (Err(error), bufs),
                }
            }
            (Ok(()), bufs)
        }
    }

    /// Makes data written before durable, with the metadata needed to read it back (`fdatasync(2)`).
    pub fn fdatasync(&self, fd: &Rc<OwnedFd>) -> impl Future<Output = io::Result<()>> + 'static {
        self.simple(fd, Op::Datasync)
    }

    /// `fallocate(2)` with `FALLOC_FL_*` flags as `mode`.
    pub fn fallocate(
        &self,
        fd: &Rc<OwnedFd>,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> impl Future<Output = io::Result<()>> + 'static {
        self.simple(fd, Op::Fallocate { mode, offset, len })
    }

    /// Receives into bytes `range` of the buffers seen as one run. 0 means the peer has closed.
    pub fn recv(
        &self,
        fd: &Rc<OwnedFd>,
        bufs: Vec<IoBuf>,
        range: Range<usize>,
    ) -> impl Future<Output = (io::Result<usize>, Vec<IoBuf>)> + 'static {
        self.transfer(fd, Op::Recv { bufs, range, wait_all: false })
    }

    /// Receives all of bytes `range` of the buffers. `UnexpectedEof` if the peer closes before.
    pub fn recv_exact(
        &self,
        fd: &Rc<OwnedFd>,
        mut bufs: Vec<IoBuf>,
        range: Range<usize>,
    ) -> impl Future<Output = (io::Result<()>, Vec<IoBuf>)> + 'static {
        let (this, fd) = (self.clone(), Rc::clone(fd));
        async move {
            let mut at = range.start;
            while at < range.end {
                let op = Op::Recv { bufs, range: at..range.end, wait_all: true };
                let (result, back) = this.transfer(&fd, op).await;
                bufs = back;
                match result {
                    Ok(0) => return (Err(io::ErrorKind::UnexpectedEof.into()), bufs),
                    Ok(n) => at += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return (Err(error), bufs),
                }
            }
            (Ok(()), bufs)
        }
    }

    /// Sends all of the buffers on a stream socket. After a failure an unknown part may have been sent.
    pub fn send_all(
        &self,
        fd: &Rc<OwnedFd>,
        bufs: Vec<IoBuf>,
    ) -> impl Future<Output = (io::Result<()>, Vec<IoBuf>)> + 'static {
        let range = 0..total_len(&bufs);
        self.send_part(fd, bufs, range)
    }

    /// Sends bytes `range` of the buffers seen as one run.
    pub fn send_part(
        &self,
        fd: &Rc<OwnedFd>,
        mut bufs: Vec<IoBuf>,
        range: Range<usize>,
    ) -> impl Future<Output = (io::Result<()>, Vec<IoBuf>)> + 'static {
        let (this, fd) = (self.clone(), Rc::clone(fd));
        async move {
            let mut at = range.start;
            while at < range.end {
                let (result, back) = this.transfer(&fd, Op::Send { bufs, range: at..range.end }).await;
                bufs = back;
                match result {
                    Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), bufs),
                    Ok(n) => at += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return (Err(error), bufs),
                }
            }
            (Ok(()), bufs)
        }
    }

    /// Connects a socket made by [`SocketAddress::socket`].
    pub fn connect(&self, fd: &Rc<OwnedFd>, address: &SocketAddress) -> impl Future<Output = io::Result<()>> + 'static {
        let operation = RawAddress::new(address).map(|address| self.simple(fd, Op::Connect { address }));
        async move { operation?.await }
    }

    /// Waits until there is something to read, or the peer has hung up.
    pub fn readable(&self, fd: &Rc<OwnedFd>) -> impl Future<Output = io::Result<()>> + 'static {
        self.simple(fd, Op::Poll { events: libc::POLLIN })
    }

    /// Reads an eventfd's counter, waiting until it is not zero. For a stream of events see [`Shard::watch_eventfd`].
    pub fn wait_eventfd(&self, fd: &Rc<OwnedFd>) -> impl Future<Output = io::Result<u64>> + 'static {
        let (this, fd) = (self.clone(), Rc::clone(fd));
        async move {
            loop {
                let (result, frame) = this.operation(&fd, Op::ReadCounter).await;
                match count(result) {
                    Ok(_) => return Ok(frame.counter()),
                    // A non-blocking descriptor on an older kernel.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => this.readable(&fd).await?,
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Watches an eventfd until the watch is dropped. A signal costs no system call and no submission: one request
    /// stays in the ring and completes again and again (`IORING_POLL_ADD_MULTI`, edge-triggered), and the counter is not
    /// read. Events that were signalled before the watch began are seen, too. Meant for virtqueue kicks.
    pub fn watch_eventfd(&self, fd: &Rc<OwnedFd>) -> EventWatch {
        let frame = Frame::new(Rc::clone(fd), Op::Watch);
        let state = State::Watch { signalled: false, failed: None, waker: None };
        EventWatch { user_data: self.inner.submit(frame, state), inner: Rc::clone(&self.inner) }
    }

    /// Something that can be looked at without a system call, to be waited for while this shard polls.
    pub fn poll_source(&self, ready: impl Fn() -> bool + 'static) -> PollSource {
        PollSource::new(&self.inner, ready)
    }

    /// Adds 1 to an eventfd's counter. Goes out with the loop's next submission, without a system call of its own.
    ///
    /// Meant for non-blocking eventfds, which is what QEMU hands over. The kernel gives a blocking one to a worker thread
    /// (60 µs instead of 5 µs there and back, measured on Linux 6.18): whoever may hold the counter at its maximum must
    /// not be able to stop this shard.
    pub fn notify_eventfd(&self, fd: &Rc<OwnedFd>) {
        self.inner.submit(Frame::new(Rc::clone(fd), Op::WriteCounter), State::Detached);
    }

    /// Waits. Sleeps that end at the same instant end in the order in which they began.
    pub fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        // A century stands for "never": an `Instant` cannot hold much more.
        let limit = Duration::from_secs(100 * 365 * 86_400);
        self.sleep_until(Instant::now() + duration.min(limit))
    }

    /// Waits until `deadline`.
    pub fn sleep_until(&self, deadline: Instant) -> impl Future<Output = ()> + 'static {
        Sleep { inner: Rc::clone(&self.inner), deadline, key: None }
    }

    /// Runs `future` for at most `duration`, then drops it.
    ///
    /// # Errors
    /// [`Elapsed`] if it was not done by then.
    pub fn timeout<T>(
        &self,
        duration: Duration,
        future: impl Future<Output = T> + 'static,
    ) -> impl Future<Output = Result<T, Elapsed>> + 'static {
        let sleep = self.sleep(duration);
        async move {
            let (mut sleep, mut future) = (pin!(sleep), pin!(future));
            std::future::poll_fn(|context| {
                if let Poll::Ready(value) = future.as_mut().poll(context) {
                    return Poll::Ready(Ok(value));
                }
                sleep.as_mut().poll(context).map(|()| Err(Elapsed))
            })
            .await
        }
    }

    /// Lets other tasks, and completions, have their turn.
    pub fn yield_now(&self) -> impl Future<Output = ()> + 'static {
        let mut yielded = false;
        std::future::poll_fn(move |context| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard")
            .field("name", &self.name())
            .field("kind", &self.kind())
            .field("tasks", &self.inner.tasks.len())
            .field("operations", &self.operations_in_flight())
            .finish()
    }
}

/// A watch over an eventfd; see [`Shard::watch_eventfd`]. Dropping it ends the watch.
pub struct EventWatch {
    inner: Rc<Inner>,
    user_data: u64,
}

impl EventWatch {
    /// Waits for the next signal. Signals that came since the last call count as one.
    ///
    /// # Errors
    /// The descriptor cannot be polled.
    pub fn wait(&mut self) -> impl Future<Output = io::Result<()>> + '_ {
        std::future::poll_fn(|context| {
            let polled = self.inner.with_slot(self.user_data, |slot| match &mut slot.state {
                State::Watch { signalled, failed, waker } => {
                    if std::mem::take(signalled) {
                        return Poll::Ready(Ok(()));
                    }
                    if let Some(errno) = *failed {
                        return Poll::Ready(unit(errno));
                    }
                    *waker = Some(context.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Pending,
            });
            polled.unwrap_or(Poll::Pending)
        })
    }
}

impl Drop for EventWatch {
    fn drop(&mut self) {
        self.inner.abandon(self.user_data);
    }
}

impl fmt::Debug for EventWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventWatch")
    }
}

struct Sleep {
    inner: Rc<Inner>,
    deadline: Instant,
    key: Option<TimerKey>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut timers = this.inner.timers.borrow_mut();
        match this.key {
            None => {
                this.key = Some(timers.add(this.deadline, context.waker().clone()));
                Poll::Pending
            }
            Some(key) if timers.rearm(key, context.waker()) => Poll::Pending,
            // Fired.
            Some(_) => Poll::Ready(()),
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.inner.timers.borrow_mut().remove(key);
        }
    }
}

/// Whether the kernel runs operations on a file of this file system in the thread that submits them to io_uring, for as long
/// as a server takes to answer: FUSE and what stands on it, 9p, and the network file systems, which differ from version to
/// version. Asks the file system, so it may block itself.
///
/// # Errors
/// `fstatfs(2)` failed.
pub fn blocks_in_kernel(file: impl std::os::fd::AsFd) -> io::Result<bool> {
    use nix::sys::statfs;
    /// Not in libc: `include/uapi/linux/magic.h` and `fs/smb/client/cifsfs.h`.
    const CEPH: statfs::FsType = statfs::FsType(0x00c3_6400);
    const SMB2: statfs::FsType = statfs::FsType(0xfe53_4d42);
    const V9FS: statfs::FsType = statfs::FsType(0x0102_1997);
    const CIFS: statfs::FsType = statfs::FsType(0xff53_4d42);
    let kind = statfs::fstatfs(file)?.filesystem_type();
    let remote = [statfs::FUSE_SUPER_MAGIC, statfs::NFS_SUPER_MAGIC, V9FS, CEPH, SMB2, CIFS];
    Ok(remote.contains(&kind))
}
