//! The machinery of a shard: operations in flight, and the loop that moves them.
//!
//! - [`Driver`]: io_uring or the thread pool
//! - [`Inner`]: tasks, timers and operations of one shard
//! - [`Operation`]: the future of one operation
//! - [`run`]: the loop; [`ThreadGuard`]: which thread it is on

use super::exec::{self, Shared, TASKS_PER_TURN, Tasks};
use super::handle::EngineKind;
use super::op::Frame;
use super::polling::{INTERRUPTED, Pollers};
use super::pool::Pool;
use super::ring::{Completion, Ring};
use super::shard::Shard;
use super::timer::Timers;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// How long a stopping shard waits for operations that the kernel has not given back. Storage that takes longer than
/// this to answer a cancelled request is dead; the memory of such requests is leaked, since the kernel may still use it.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) enum Driver {
    Ring(Box<Ring>),
    Pool(Box<Pool>),
}

impl Driver {
    pub(super) fn kind(&self) -> EngineKind {
        match self {
            Driver::Ring(_) => EngineKind::IoUring,
            Driver::Pool(_) => EngineKind::ThreadPool,
        }
    }

    fn submit(&mut self, frame: &mut Box<Frame>, user_data: u64) {
        let (fd, op) = (frame.fd(), frame.prepare());
        match self {
            Driver::Ring(ring) => {
                let aside = ring.runs_aside(frame.file());
                ring.submit(fd, op, user_data, aside);
            }
            Driver::Pool(pool) => pool.submit(fd, op, user_data),
        }
    }

    fn cancel(&mut self, user_data: u64) {
        match self {
            Driver::Ring(ring) => ring.cancel(user_data),
            Driver::Pool(pool) => pool.cancel(user_data),
        }
    }

    /// Whether a turn would find something now. No system call.
    fn has_completions(&mut self) -> bool {
        match self {
            Driver::Ring(ring) => ring.has_completions(),
            // Its threads post to the inbox; descriptors can only be asked by the kernel.
            Driver::Pool(_) => false,
        }
    }

    fn turn(&mut self, wait: Option<Option<Duration>>, out: &mut Vec<Completion>) -> io::Result<()> {
        match self {
            Driver::Ring(ring) => ring.turn(wait, out),
            Driver::Pool(pool) => pool.turn(wait, out),
        }
    }
}

pub(super) enum State {
    /// A future waits.
    Waiting(Option<Waker>),
    Done(i32),
    /// Nobody waits; the frame is kept until the kernel is done with it.
    Detached,
    /// An [`EventWatch`]: edges seen and not yet taken, and the error that ended it.
    Watch {
        signalled: bool,
        failed: Option<i32>,
        waker: Option<Waker>,
    },
}

pub(super) struct Slot {
    frame: Box<Frame>,
    user_data: u64,
    pub(super) state: State,
}

pub(super) struct Inner {
    pub(super) shared: Arc<Shared>,
    pub(super) tasks: Rc<Tasks>,
    pub(super) timers: RefCell<Timers>,
    pub(super) pollers: Pollers,
    pub(super) driver: RefCell<Driver>,
    slots: RefCell<Slab<Slot>>,
    generation: Cell<u32>,
    pub(super) kind: EngineKind,
}

impl Inner {
    pub(super) fn new(shared: Arc<Shared>, driver: Driver) -> Rc<Inner> {
        let tasks = Rc::new(Tasks::new(Arc::clone(&shared)));
        let kind = driver.kind();
        Rc::new(Inner {
            shared,
            tasks,
            timers: RefCell::default(),
            pollers: Pollers::default(),
            driver: RefCell::new(driver),
            slots: RefCell::default(),
            generation: Cell::new(0),
            kind,
        })
    }

    pub(super) fn operations(&self) -> usize {
        self.slots.borrow().len()
    }

    /// Starts an operation; the number identifies it until its slot is freed.
    pub(super) fn submit(&self, mut frame: Box<Frame>, state: State) -> u64 {
        let generation = self.generation.get().wrapping_add(1);
        self.generation.set(generation);
        let mut slots = self.slots.borrow_mut();
        let entry = slots.vacant_entry();
        // The generation tells a late completion from one of the slot's next user. Bit 63 stays free: all ones is
        // taken by the ring.
        let user_data = u64::from(generation & 0x7fff_ffff) << 32 | entry.key() as u64;
        self.driver.borrow_mut().submit(&mut frame, user_data);
        entry.insert(Slot { frame, user_data, state });
        user_data
    }

    pub(super) fn with_slot<T>(&self, user_data: u64, f: impl FnOnce(&mut Slot) -> T) -> Option<T> {
        let mut slots = self.slots.borrow_mut();
        slots.get_mut(user_data as u32 as usize).filter(|slot| slot.user_data == user_data).map(f)
    }

    fn remove(&self, user_data: u64) -> Option<Slot> {
        self.with_slot(user_data, |_| ())?;
        self.slots.borrow_mut().try_remove(user_data as u32 as usize)
    }

    /// Nobody waits any more: cancels what still runs, frees what has ended.
    pub(super) fn abandon(&self, user_data: u64) {
        let ended = self.with_slot(user_data, |slot| match slot.state {
            State::Done(_) | State::Watch { failed: Some(_), .. } => true,
            _ => {
                slot.state = State::Detached;
                false
            }
        });
        match ended {
            Some(true) => drop(self.remove(user_data)),
            Some(false) => self.driver.borrow_mut().cancel(user_data),
            None => {}
        }
    }

    fn complete(&self, done: Completion) {
        let Completion { user_data, result, more } = done;
        let mut rearm = false;
        let woken = self.with_slot(user_data, |slot| match &mut slot.state {
            State::Waiting(waker) => {
                let waker = waker.take();
                slot.state = State::Done(result);
                (waker, false)
            }
            State::Watch { signalled, failed, waker } => {
                if result >= 0 {
                    *signalled = true;
                    // The kernel ends a multishot request when it cannot post; the watch goes on.
                    rearm = !more;
                } else {
                    *failed = Some(result);
                }
                (waker.take(), false)
            }
            State::Detached => (None, !more),
            State::Done(_) => (None, false),
        });
        let Some((waker, ended)) = woken else { return };
        if ended {
            drop(self.remove(user_data));
        }
        if rearm {
            let mut driver = self.driver.borrow_mut();
            self.with_slot(user_data, |slot| driver.submit(&mut slot.frame, user_data));
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A submitted, or about to be submitted, operation.
pub(super) struct Operation {
    inner: Rc<Inner>,
    state: OperationState,
}

impl Operation {
    pub(super) fn new(inner: &Rc<Inner>, frame: Box<Frame>) -> Operation {
        Operation { inner: Rc::clone(inner), state: OperationState::New(Some(frame)) }
    }
}

enum OperationState {
    New(Option<Box<Frame>>),
    InFlight(u64),
    Taken,
}

impl Future for Operation {
    type Output = (i32, Box<Frame>);
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        match &mut this.state {
            OperationState::New(frame) => {
                if let Some(frame) = frame.take() {
                    let user_data = this.inner.submit(frame, State::Waiting(Some(context.waker().clone())));
                    this.state = OperationState::InFlight(user_data);
                }
                Poll::Pending
            }
            OperationState::InFlight(user_data) => {
                let user_data = *user_data;
                let result = this.inner.with_slot(user_data, |slot| match &mut slot.state {
                    State::Done(result) => Some(*result),
                    State::Waiting(waker) => {
                        *waker = Some(context.waker().clone());
                        None
                    }
                    _ => None,
                });
                let Some(result) = result.flatten() else { return Poll::Pending };
                let Some(slot) = this.inner.remove(user_data) else { return Poll::Pending };
                this.state = OperationState::Taken;
                Poll::Ready((result, slot.frame))
            }
            OperationState::Taken => Poll::Pending,
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let OperationState::InFlight(user_data) = self.state {
            self.inner.abandon(user_data);
        }
    }
}

/// The loop of a shard; returns when it has been told to stop and everything is back.
pub(super) fn run(shard: &Shard) {
    let inner = shard.inner();
    let wake = match (&*inner.driver.borrow(), inner.shared.wake_fd()) {
        // The pool's driver polls the eventfd itself.
        (Driver::Pool(_), _) => None,
        (Driver::Ring(_), Ok(fd)) => Some(Rc::new(fd)),
        (Driver::Ring(_), Err(error)) => {
            tracing::error!(shard = shard.name(), "no descriptor for the wake-up eventfd, the shard stops: {error}");
            inner.shared.close();
            return;
        }
    };
    let watch = wake.map(|fd| shard.watch_eventfd(&fd));
    let mut completions = Vec::new();
    while !inner.shared.stopping.load(Ordering::SeqCst) {
        turn(shard, &mut completions, None);
    }
    inner.shared.close();
    inner.tasks.clear();
    drop(watch);
    let deadline = Instant::now() + DRAIN_LIMIT;
    while inner.operations() > 0 && Instant::now() < deadline {
        turn(shard, &mut completions, Some(deadline));
    }
    inner.tasks.clear();
    let left = inner.operations();
    if left > 0 {
        tracing::error!(
            shard = shard.name(),
            "{left} operations did not end within {DRAIN_LIMIT:?}; their memory is leaked"
        );
        std::mem::forget(inner.slots.take());
    }
}

fn turn(shard: &Shard, completions: &mut Vec<Completion>, limit: Option<Instant>) {
    let inner = shard.inner();
    let inbox = inner.shared.take();
    for (user_data, result) in inbox.completions {
        inner.complete(Completion { user_data, result, more: false });
    }
    for task in inbox.woken {
        task.enqueue();
    }
    for job in inbox.jobs {
        job(shard.clone());
    }
    let ready = inner.tasks.run(TASKS_PER_TURN);
    let fired = fire_timers(inner);
    let polled = inner.pollers.look();
    let mut wait = None;
    let idle = !ready && !fired && !polled && !inner.tasks.has_ready();
    // Sources that are let go have their say before this thread sleeps: their tasks run in the next turn.
    if idle && !look_for_work(inner, limit) && !inner.pollers.release() && inner.shared.try_sleep() {
        let next = inner.timers.borrow().next_deadline();
        let next = next.into_iter().chain(limit).min();
        wait = Some(next.map(|at| at.saturating_duration_since(Instant::now())));
    }
    let asleep_since = wait.map(|_| Instant::now());
    let outcome = inner.driver.borrow_mut().turn(wait, completions);
    inner.shared.awake();
    if let Some(since) = asleep_since {
        let now = Instant::now();
        inner.pollers.slept(now - since, now);
    }
    if let Err(error) = outcome {
        // Never seen; a ring whose enter fails for good serves nobody, and silence would hang guests.
        tracing::error!(shard = shard.name(), "the engine failed and the shard stops: {error}");
        inner.shared.stopping.store(true, Ordering::SeqCst);
    }
    for done in completions.drain(..) {
        inner.complete(done);
    }
}

/// Looks at the sources, and at what else there may be to do, for as long as the window lasts; whether there is something.
fn look_for_work(inner: &Inner, limit: Option<Instant>) -> bool {
    let window = inner.pollers.window();
    if window.is_zero() {
        return false;
    }
    let mut before = Instant::now();
    let until = before + window;
    let due = inner.timers.borrow().next_deadline().into_iter().chain(limit).min();
    loop {
        if inner.pollers.look() || inner.shared.has_posts() || inner.driver.borrow_mut().has_completions() {
            return true;
        }
        let now = Instant::now();
        if due.is_some_and(|due| due <= now) {
            return true;
        }
        if now - before >= INTERRUPTED {
            inner.pollers.interrupted(now);
            return false;
        }
        before = now;
        if now >= until {
            return false;
        }
        std::hint::spin_loop();
    }
}

/// Wakes the tasks whose timers are due; whether there were any.
fn fire_timers(inner: &Inner) -> bool {
    if inner.timers.borrow().next_deadline().is_none() {
        return false;
    }
    let now = Instant::now();
    let mut fired = false;
    loop {
        let due = inner.timers.borrow_mut().pop_due(now);
        let Some(waker) = due else { return fired };
        waker.wake();
        fired = true;
    }
}

/// Makes this thread the shard's until the guard is dropped.
pub(super) struct ThreadGuard;

impl ThreadGuard {
    pub(super) fn new(shared: &Arc<Shared>) -> ThreadGuard {
        exec::adopt_thread(Some(Arc::clone(shared)));
        ThreadGuard
    }
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        exec::adopt_thread(None);
    }
}
