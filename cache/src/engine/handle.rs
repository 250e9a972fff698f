//! A shard as other threads see it.
//!
//! - [`ShardConfig`], [`EngineMode`], [`EngineKind`]: how to start one, what it runs on
//! - [`ShardHandle`]: starts, feeds and stops a shard
//! - [`Call`], [`ShardGone`]: an answer from a shard, awaited or waited for

use super::exec::{Shared, is_own_thread};
use super::pool::Pool;
use super::reactor::{Driver, ThreadGuard, run};
use super::ring::Ring;
use super::shard::Shard;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use parking_lot::{Condvar, Mutex};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fmt, io};

/// Which engine to use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineMode {
    /// io_uring where it works, else the thread pool.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// Threads and `poll(2)`.
    ThreadPool,
}

/// Which engine runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    IoUring,
    ThreadPool,
}

/// How to start a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardConfig {
    /// Name of the thread; the kernel shows its first 15 bytes.
    pub name: String,
    /// Submission queue entries of the ring, rounded up to a power of two. More operations than this may be in flight;
    /// it is how many go to the kernel with one system call.
    pub entries: u32,
    pub mode: EngineMode,
    /// Keeps the thread on this CPU.
    pub cpu: Option<usize>,
}

impl Default for ShardConfig {
    fn default() -> ShardConfig {
        ShardConfig { name: "shard".to_owned(), entries: 256, mode: EngineMode::Auto, cpu: None }
    }
}

/// A running shard. Clones refer to the same one; when the last is dropped the shard stops.
#[derive(Clone, Debug)]
pub struct ShardHandle {
    inner: Arc<HandleInner>,
}

struct HandleInner {
    shared: Arc<Shared>,
    kind: EngineKind,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for HandleInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandleInner").field("name", &self.shared.name).field("kind", &self.kind).finish()
    }
}

impl ShardHandle {
    /// Starts a shard's thread and waits until its engine works.
    ///
    /// # Errors
    /// The thread or its descriptors cannot be had, or `EngineMode::IoUring` was asked for and io_uring does not work
    /// on this host.
    pub fn start(config: ShardConfig) -> io::Result<ShardHandle> {
        let shared = Shared::new(config.name.clone())?;
        let (started, result) = mpsc::channel();
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(config.name.clone()).spawn(move || {
                if let Some(cpu) = config.cpu {
                    pin_to_cpu(&config.name, cpu);
                }
                // On this thread: the ring accepts submissions only from the thread that made it.
                match open_driver(&config, &shared) {
                    Ok(driver) => {
                        let _guard = ThreadGuard::new(&shared);
                        let _ = started.send(Ok(driver.kind()));
                        run(&Shard::new(shared, driver));
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
            })?
        };
        let kind = result.recv().map_err(|_| io::Error::other("the shard's thread ended while starting"))??;
        Ok(ShardHandle { inner: Arc::new(HandleInner { shared, kind, thread: Mutex::new(Some(thread)) }) })
    }

    pub fn name(&self) -> &str {
        &self.inner.shared.name
    }

    /// Which engine runs.
    pub fn mode(&self) -> EngineKind {
        self.inner.kind
    }

    /// Runs a task on the shard. `f` is called on its thread. Without effect if the shard has stopped.
    pub fn spawn<F, Fut>(&self, f: F)
    where
        F: FnOnce(Shard) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        self.inner.shared.post(|inbox| {
            inbox.jobs.push(Box::new(move |shard: Shard| {
                shard.spawn(f(shard.clone()));
            }));
        });
    }

    /// Runs a task on the shard and brings its value back.
    pub fn call<T, F, Fut>(&self, f: F) -> Call<T>
    where
        T: Send + 'static,
        F: FnOnce(Shard) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (answer, call) = call_pair();
        self.spawn(move |shard| {
            let future = f(shard);
            async move { answer.send(future.await) }
        });
        call
    }

    /// Stops the shard: drops its tasks, cancels their operations, waits until the kernel has given all memory back,
    /// and joins the thread. Without effect when it has stopped already. Called on the shard's own thread it only asks.
    pub fn shutdown(&self) {
        self.inner.stop();
    }
}

impl HandleInner {
    fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.wake_up();
        if is_own_thread(&self.shared) {
            return;
        }
        // Held while joining, so that a second caller waits as well.
        let mut thread = self.thread.lock();
        if let Some(thread) = thread.take()
            && thread.join().is_err()
        {
            tracing::error!(shard = %self.shared.name, "the shard's thread panicked");
        }
    }
}

impl Drop for HandleInner {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open_driver(config: &ShardConfig, shared: &Arc<Shared>) -> io::Result<Driver> {
    if config.mode != EngineMode::ThreadPool {
        match Ring::open(config.entries.clamp(8, 4096)) {
            Ok(ring) => return Ok(Driver::Ring(Box::new(ring))),
            Err(error) if config.mode == EngineMode::IoUring => {
                return Err(io::Error::new(
                    error.kind(),
                    format!(
                        "io_uring does not work here ({error}); see sysctl kernel.io_uring_disabled and seccomp filters"
                    ),
                ));
            }
            Err(error) => {
                tracing::warn!(
                    shard = %config.name,
                    "io_uring does not work here ({error}), using threads; see sysctl kernel.io_uring_disabled"
                );
            }
        }
    }
    Ok(Driver::Pool(Box::new(Pool::new(Arc::clone(shared))?)))
}

fn pin_to_cpu(name: &str, cpu: usize) {
    let mut set = CpuSet::new();
    if let Err(error) = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
        tracing::warn!(shard = name, "cannot keep the thread on CPU {cpu}: {error}");
    }
}

/// The shard stopped, or the task panicked, before there was an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the shard stopped or its task panicked before it answered")]
pub struct ShardGone;

struct CallState<T> {
    slot: Mutex<CallSlot<T>>,
    changed: Condvar,
}

struct CallSlot<T> {
    value: Option<T>,
    closed: bool,
    waker: Option<Waker>,
}

/// An answer on its way from another thread. A future, and [`Call::wait`] for threads that have no executor.
pub struct Call<T> {
    state: Arc<CallState<T>>,
}

pub(super) struct Answer<T> {
    state: Arc<CallState<T>>,
}

pub(super) fn call_pair<T>() -> (Answer<T>, Call<T>) {
    let state = Arc::new(CallState {
        slot: Mutex::new(CallSlot { value: None, closed: false, waker: None }),
        changed: Condvar::new(),
    });
    (Answer { state: Arc::clone(&state) }, Call { state })
}

impl<T> Answer<T> {
    pub(super) fn send(self, value: T) {
        self.state.slot.lock().value = Some(value);
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        let waker = {
            let mut slot = self.state.slot.lock();
            slot.closed = true;
            slot.waker.take()
        };
        self.state.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Call<T> {
    /// Blocks this thread until the answer is there. Not for shard threads: await it there.
    ///
    /// # Errors
    /// [`ShardGone`].
    pub fn wait(self) -> Result<T, ShardGone> {
        let mut slot = self.state.slot.lock();
        while !slot.closed {
            self.state.changed.wait(&mut slot);
        }
        slot.value.take().ok_or(ShardGone)
    }

    /// Like [`Call::wait`] for at most `limit`; `None` when the answer is not there by then. It may be asked for again.
    ///
    /// # Errors
    /// [`ShardGone`].
    pub fn wait_timeout(&mut self, limit: Duration) -> Result<Option<T>, ShardGone> {
        let deadline = Instant::now() + limit;
        let mut slot = self.state.slot.lock();
        while !slot.closed {
            if self.state.changed.wait_until(&mut slot, deadline).timed_out() {
                break;
            }
        }
        if slot.closed { slot.value.take().map(Some).ok_or(ShardGone) } else { Ok(None) }
    }
}

impl<T> Future for Call<T> {
    type Output = Result<T, ShardGone>;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slot = self.state.slot.lock();
        if slot.closed {
            return Poll::Ready(slot.value.take().ok_or(ShardGone));
        }
        slot.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> fmt::Debug for Call<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}
