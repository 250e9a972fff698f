//! Tasks of one shard, and waking them from anywhere.
//!
//! - [`Shared`]: the part of a shard that other threads reach: inbox and wake-up eventfd
//! - [`Tasks`]: the local tasks and the queue of those ready to run
//! - [`JoinHandle`], [`JoinError`]: a task's result
//!
//! A wake on the shard's own thread pushes onto a thread-local queue: no lock, no system call. A wake from another
//! thread goes through the inbox, and writes the eventfd only if the shard is asleep or about to be. That cannot miss a
//! wake: the sleeper publishes `sleeping` and *then* looks at the inbox, the waker fills the inbox and *then* looks at
//! `sleeping` (both sequentially consistent), so at least one of them sees the other.

use super::shard::Shard;
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use slab::Slab;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::{fmt, io, mem};

/// Tasks run in one turn of the loop before completions are looked at again. Large enough to spread the cost of a
/// system call over many requests, small enough that a burst of new requests cannot hold up finished ones for long.
pub const TASKS_PER_TURN: usize = 128;

type Job = Box<dyn FnOnce(Shard) + Send>;

#[derive(Default)]
pub(super) struct Inbox {
    pub(super) woken: Vec<Arc<TaskWaker>>,
    pub(super) jobs: Vec<Job>,
    /// Results of the thread pool: operation key and result (negative errno on failure).
    pub(super) completions: Vec<(u64, i32)>,
    /// The shard has stopped; nothing is taken any more.
    closed: bool,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.woken.is_empty() && self.jobs.is_empty() && self.completions.is_empty()
    }
}

/// What other threads see of a shard.
pub(super) struct Shared {
    pub(super) name: String,
    inbox: Mutex<Inbox>,
    /// The inbox may hold something: spares a look into it.
    posted: AtomicBool,
    sleeping: AtomicBool,
    pub(super) stopping: AtomicBool,
    eventfd: EventFd,
}

impl Shared {
    pub(super) fn new(name: String) -> io::Result<Arc<Shared>> {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Shared {
            name,
            inbox: Mutex::default(),
            posted: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            eventfd,
        }))
    }

    /// A second descriptor of the wake-up eventfd, for the loop to wait on.
    pub(super) fn wake_fd(&self) -> io::Result<OwnedFd> {
        self.eventfd.as_fd().try_clone_to_owned()
    }

    /// Changes the inbox and wakes the shard if it sleeps. Without effect once the shard has stopped.
    pub(super) fn post(&self, change: impl FnOnce(&mut Inbox)) {
        {
            let mut inbox = self.inbox.lock();
            if inbox.closed {
                return;
            }
            change(&mut inbox);
            self.posted.store(true, Ordering::Release);
        }
        self.wake_up();
    }

    /// Takes nothing more; what waits in the inbox is dropped, which tells its senders.
    pub(super) fn close(&self) {
        let (woken, jobs) = {
            let mut inbox = self.inbox.lock();
            inbox.closed = true;
            (mem::take(&mut inbox.woken), mem::take(&mut inbox.jobs))
        };
        // Outside of the lock: destructors may post.
        drop((woken, jobs));
    }

    pub(super) fn wake_up(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // Fails only when the counter is full, and then the shard is being woken anyway.
            let _ = self.eventfd.write(1);
        }
    }

    /// Whether there is something to take or the shard is to stop. A look without a lock, for as long as it is awake.
    pub(super) fn has_posts(&self) -> bool {
        self.posted.load(Ordering::Relaxed) || self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn take(&self) -> Inbox {
        if !self.posted.swap(false, Ordering::AcqRel) {
            return Inbox::default();
        }
        let mut inbox = self.inbox.lock();
        let closed = inbox.closed;
        mem::replace(&mut *inbox, Inbox { closed, ..Inbox::default() })
    }

    /// A thread of the pool is done. Taken even while the shard stops: it waits for its operations then.
    pub(super) fn post_completion(&self, user_data: u64, result: i32) {
        {
            let mut inbox = self.inbox.lock();
            inbox.completions.push((user_data, result));
            self.posted.store(true, Ordering::Release);
        }
        self.wake_up();
    }

    /// Announces sleep; false if there is something to do first.
    pub(super) fn try_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        let idle = {
            let inbox = self.inbox.lock();
            inbox.is_empty() && (inbox.closed || !self.stopping.load(Ordering::SeqCst))
        };
        if !idle {
            self.awake();
        }
        idle
    }

    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({})", self.name)
    }
}

/// The ready queue of the shard that runs on this thread.
struct ReadyQueue {
    shared: Option<Arc<Shared>>,
    tasks: VecDeque<Arc<TaskWaker>>,
}

thread_local! {
    static READY: RefCell<ReadyQueue> = const { RefCell::new(ReadyQueue { shared: None, tasks: VecDeque::new() }) };
}

/// Makes this thread the shard's own.
pub(super) fn adopt_thread(shared: Option<Arc<Shared>>) {
    READY.with(|ready| {
        let mut ready = ready.borrow_mut();
        ready.shared = shared;
        ready.tasks.clear();
    });
}

pub(super) fn is_own_thread(shared: &Arc<Shared>) -> bool {
    READY.try_with(|ready| ready.borrow().shared.as_ref().is_some_and(|own| Arc::ptr_eq(own, shared))).unwrap_or(false)
}

pub(super) struct TaskWaker {
    shared: Arc<Shared>,
    key: usize,
    queued: AtomicBool,
}

impl TaskWaker {
    pub(super) fn enqueue(self: Arc<Self>) {
        let local = READY.try_with(|ready| {
            let mut ready = ready.borrow_mut();
            let own = ready.shared.as_ref().is_some_and(|own| Arc::ptr_eq(own, &self.shared));
            if own {
                ready.tasks.push_back(Arc::clone(&self));
            }
            own
        });
        if !local.unwrap_or(false) {
            let shared = Arc::clone(&self.shared);
            shared.post(|inbox| inbox.woken.push(self));
        }
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.enqueue();
        }
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            Arc::clone(self).enqueue();
        }
    }
}

struct Task {
    // `None` while the task is being polled.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    waker: Arc<TaskWaker>,
}

/// The tasks of one shard.
pub(super) struct Tasks {
    shared: Arc<Shared>,
    slab: RefCell<Slab<Task>>,
    pub(super) panics: Cell<u64>,
}

impl Tasks {
    pub(super) fn new(shared: Arc<Shared>) -> Tasks {
        Tasks { shared, slab: RefCell::default(), panics: Cell::new(0) }
    }

    pub(super) fn spawn<T: 'static>(self: &Rc<Self>, future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
        let result =
            Rc::new(JoinState { value: RefCell::new(None), waker: RefCell::new(None), task: RefCell::new(None) });
        let guard = FinishGuard(Rc::clone(&result));
        let future = Box::pin(async move {
            let guard = guard;
            let value = future.await;
            guard.0.finish(Ok(value));
        });
        let waker = {
            let mut slab = self.slab.borrow_mut();
            let entry = slab.vacant_entry();
            let waker = Arc::new(TaskWaker {
                shared: Arc::clone(&self.shared),
                key: entry.key(),
                queued: AtomicBool::new(true),
            });
            entry.insert(Task { future: Some(future), waker: Arc::clone(&waker) });
            waker
        };
        *result.task.borrow_mut() = Some((Rc::clone(self), Arc::clone(&waker)));
        waker.enqueue();
        JoinHandle { state: result }
    }

    /// Runs up to `limit` ready tasks. Returns whether more are ready.
    pub(super) fn run(&self, limit: usize) -> bool {
        for _ in 0..limit {
            let Some(waker) = READY.with(|ready| ready.borrow_mut().tasks.pop_front()) else { return false };
            self.poll(&waker);
        }
        self.has_ready()
    }

    pub(super) fn has_ready(&self) -> bool {
        READY.with(|ready| !ready.borrow().tasks.is_empty())
    }

    fn poll(&self, waker: &Arc<TaskWaker>) {
        let future = {
            let mut slab = self.slab.borrow_mut();
            // The slot may hold another task by now: a wake can outlive its task.
            match slab.get_mut(waker.key) {
                Some(task) if Arc::ptr_eq(&task.waker, waker) => task.future.take(),
                _ => None,
            }
        };
        let Some(mut future) = future else { return };
        waker.queued.store(false, Ordering::Release);
        let std_waker = Waker::from(Arc::clone(waker));
        let mut context = Context::from_waker(&std_waker);
        // A panicking task must not take the other disks of this shard with it. Whoever waits for it gets
        // `JoinError::Panicked` through the finish guard, which unwinding drops.
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut context)));
        match polled {
            Ok(Poll::Pending) => {
                let back = {
                    let mut slab = self.slab.borrow_mut();
                    match slab.get_mut(waker.key) {
                        Some(task) if Arc::ptr_eq(&task.waker, waker) => {
                            task.future = Some(future);
                            None
                        }
                        // Aborted itself while running.
                        _ => Some(future),
                    }
                };
                drop_quietly(back);
            }
            Ok(Poll::Ready(())) => {
                self.forget(waker);
                drop_quietly(future);
            }
            Err(panic) => {
                self.panics.set(self.panics.get() + 1);
                tracing::error!(shard = %self.shared.name, "a task panicked and was dropped: {}", panic_text(&*panic));
                self.forget(waker);
                drop_quietly(future);
            }
        }
    }

    fn forget(&self, waker: &Arc<TaskWaker>) -> Option<Task> {
        let mut slab = self.slab.borrow_mut();
        match slab.get(waker.key) {
            Some(task) if Arc::ptr_eq(&task.waker, waker) => slab.try_remove(waker.key),
            _ => None,
        }
    }

    /// Drops every task, with whatever it owns.
    pub(super) fn clear(&self) {
        loop {
            let task = {
                let mut slab = self.slab.borrow_mut();
                let key = slab.iter().next().map(|(key, _)| key);
                key.and_then(|key| slab.try_remove(key))
            };
            match task {
                Some(task) => drop_quietly(task),
                None => return,
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slab.borrow().len()
    }
}

/// Drops a value whose destructor may panic, as a task's future may.
fn drop_quietly<T>(value: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        tracing::error!("dropping a task panicked: {}", panic_text(&*panic));
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Why a task gave no result.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JoinError {
    #[error("the task panicked")]
    Panicked,
    #[error("the task was aborted, or its shard stopped")]
    Aborted,
}

struct JoinState<T> {
    value: RefCell<Option<Result<T, JoinError>>>,
    waker: RefCell<Option<Waker>>,
    task: RefCell<Option<(Rc<Tasks>, Arc<TaskWaker>)>>,
}

impl<T> JoinState<T> {
    fn finish(&self, value: Result<T, JoinError>) {
        {
            let mut slot = self.value.borrow_mut();
            if slot.is_none() && self.task.borrow_mut().take().is_some() {
                *slot = Some(value);
            }
        }
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

struct FinishGuard<T>(Rc<JoinState<T>>);

impl<T> Drop for FinishGuard<T> {
    fn drop(&mut self) {
        // Without effect after a regular finish.
        self.0.finish(Err(if std::thread::panicking() { JoinError::Panicked } else { JoinError::Aborted }));
    }
}

/// Waits for a task of the same shard. Dropping it lets the task run on.
pub struct JoinHandle<T> {
    state: Rc<JoinState<T>>,
}

impl<T> JoinHandle<T> {
    /// Drops the task now, with everything it owns. Its result becomes [`JoinError::Aborted`] unless it had finished.
    pub fn abort(&self) {
        let task = self.state.task.borrow().clone();
        if let Some((tasks, waker)) = task {
            drop_quietly(tasks.forget(&waker));
            self.state.finish(Err(JoinError::Aborted));
        }
    }

    pub fn is_finished(&self) -> bool {
        self.state.task.borrow().is_none()
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(value) = self.state.value.borrow_mut().take() {
            return Poll::Ready(value);
        }
        *self.state.waker.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinHandle").field("finished", &self.is_finished()).finish()
    }
}
