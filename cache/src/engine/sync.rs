//! Hand-overs between tasks of one shard. Nothing here is thread-safe, hence nothing here locks.
//!
//! - [`oneshot`]: one value from one task to another
//! - [`Notify`]: "look again", remembered if nobody is waiting yet
//! - [`Semaphore`]: at most so many at a time, first come first served

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

struct OneshotState<T> {
    value: Cell<Option<T>>,
    waker: Cell<Option<Waker>>,
    closed: Cell<bool>,
}

/// Gives one value to the [`OneshotReceiver`].
pub struct OneshotSender<T>(Rc<OneshotState<T>>);

/// Waits for the value; `None` when the sender was dropped without sending.
pub struct OneshotReceiver<T>(Rc<OneshotState<T>>);

/// A channel for one value within a shard.
pub fn oneshot<T>() -> (OneshotSender<T>, OneshotReceiver<T>) {
    let state = Rc::new(OneshotState { value: Cell::new(None), waker: Cell::new(None), closed: Cell::new(false) });
    (OneshotSender(Rc::clone(&state)), OneshotReceiver(state))
}

impl<T> OneshotSender<T> {
    pub fn send(self, value: T) {
        self.0.value.set(Some(value));
    }

    /// Whether nobody waits for the value any more.
    pub fn is_closed(&self) -> bool {
        Rc::strong_count(&self.0) == 1
    }
}

impl<T> Drop for OneshotSender<T> {
    fn drop(&mut self) {
        self.0.closed.set(true);
        if let Some(waker) = self.0.waker.take() {
            waker.wake();
        }
    }
}

impl<T> Future for OneshotReceiver<T> {
    type Output = Option<T>;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        if let Some(value) = self.0.value.take() {
            return Poll::Ready(Some(value));
        }
        if self.0.closed.get() {
            return Poll::Ready(None);
        }
        self.0.waker.set(Some(context.waker().clone()));
        Poll::Pending
    }
}

impl<T> fmt::Debug for OneshotSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OneshotSender")
    }
}

impl<T> fmt::Debug for OneshotReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OneshotReceiver")
    }
}

/// Wakes tasks that wait for a change. A notification with nobody waiting is kept for the next [`Notify::notified`].
#[derive(Default)]
pub struct Notify {
    pending: Cell<bool>,
    // Bumped by `notify_all`, so that every waiter of that moment sees it.
    round: Cell<u64>,
    waiters: RefCell<Vec<Waker>>,
}

impl Notify {
    pub fn new() -> Notify {
        Notify::default()
    }

    /// Wakes all who wait now, and the next one to wait if none of them takes it: waiters may have gone since.
    pub fn notify_all(&self) {
        self.round.set(self.round.get().wrapping_add(1));
        self.pending.set(true);
        self.waiters.take().into_iter().for_each(Waker::wake);
    }

    /// Waits for a notification. May return without one: look at the condition again.
    pub fn notified(&self) -> impl Future<Output = ()> + '_ {
        let mut seen = None;
        std::future::poll_fn(move |context| {
            let pending = self.pending.replace(false);
            if pending || seen.is_some_and(|round| round != self.round.get()) {
                return Poll::Ready(());
            }
            seen = Some(self.round.get());
            let mut waiters = self.waiters.borrow_mut();
            if !waiters.iter().any(|waker| waker.will_wake(context.waker())) {
                waiters.push(context.waker().clone());
            }
            Poll::Pending
        })
    }
}

impl fmt::Debug for Notify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Notify({} waiting)", self.waiters.borrow().len())
    }
}

/// Lets at most so many tasks in at a time, in the order in which they asked.
pub struct Semaphore {
    free: Cell<usize>,
    queue: RefCell<VecDeque<OneshotSender<Permit>>>,
}

/// The right to be in; dropping it lets the next one in.
pub struct Permit {
    semaphore: Option<Rc<Semaphore>>,
}

impl Semaphore {
    pub fn new(permits: usize) -> Rc<Semaphore> {
        Rc::new(Semaphore { free: Cell::new(permits), queue: RefCell::default() })
    }

    /// Waits for a permit.
    pub fn acquire(self: &Rc<Self>) -> impl Future<Output = Permit> + 'static {
        let this = Rc::clone(self);
        async move {
            if this.free.get() > 0 {
                this.free.set(this.free.get() - 1);
                return Permit { semaphore: Some(this) };
            }
            let (sender, receiver) = oneshot();
            this.queue.borrow_mut().push_back(sender);
            match receiver.await {
                Some(permit) => permit,
                // The queue lives as long as `this`, which this future holds, and senders leave it only by sending.
                None => std::future::pending().await,
            }
        }
    }

    /// Permits free at the moment.
    pub fn available(&self) -> usize {
        self.free.get()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(semaphore) = self.semaphore.take() else { return };
        loop {
            let next = semaphore.queue.borrow_mut().pop_front();
            match next {
                // Gave up waiting.
                Some(waiter) if waiter.is_closed() => {}
                Some(waiter) => {
                    waiter.send(Permit { semaphore: Some(Rc::clone(&semaphore)) });
                    return;
                }
                None => {
                    semaphore.free.set(semaphore.free.get() + 1);
                    return;
                }
            }
        }
    }
}

impl fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Semaphore({} free, {} waiting)", self.free.get(), self.queue.borrow().len())
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}
