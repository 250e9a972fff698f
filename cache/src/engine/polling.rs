//! Looking for requests instead of sleeping, for a moment, while they come fast.
//!
//! - [`PollSource`]: something that a shard can look at without a system call, such as a virtqueue in guest memory
//! - [`Polled`]: what came of waiting for it
//! - [`Pollers`]: the sources that are looked at now, and how long a look lasts
//!
//! To sleep and be woken costs a request two switches and its guest a kick, more than the request itself where the RAM
//! tier answers. So a shard with nothing to do looks at its sources for a while before it sleeps. For how long is adapted as in
//! the halt polling of KVM (Linux, `Documentation/virt/kvm/halt-polling.rst`): a sleep that was short says that looking on
//! would have spared it, and the window grows; a long one says that nobody is in a hurry, and there is none. An idle shard
//! therefore never polls, and one whose requests are further apart than [`WINDOW_MAX`] doesn't either. Nor does one whose
//! processor others want: a thread that looks uses up its share, and is then kept waiting longer than one that sleeps.

use super::reactor::Inner;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Longest look. A guest that answers a completion with its next request takes 10 to 20 µs for it on a quiet host, wake-up
/// included; a core is spent in vain for at most this long after the last request of a burst.
pub(super) const WINDOW_MAX: Duration = Duration::from_micros(50);
/// The first window after a short sleep.
const WINDOW_MIN: Duration = Duration::from_micros(10);

/// A look that stood still for so long was interrupted: somebody else had the processor. The learner takes less at a time.
pub(super) const INTERRUPTED: Duration = Duration::from_micros(500);
/// How long such a processor is left to others.
const CROWDED: Duration = Duration::from_millis(20);

/// How waiting for a [`PollSource`] ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Polled {
    /// There is something.
    Ready,
    /// The shard is about to sleep, or does not poll at present: ask to be woken, look once more, and wait for that.
    Sleep,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    Off,
    On,
    Ended(Polled),
}

struct Entry {
    ready: Box<dyn Fn() -> bool>,
    watch: Cell<Watch>,
    waker: Cell<Option<Waker>>,
}

impl Entry {
    fn end(&self, how: Polled) {
        self.watch.set(Watch::Ended(how));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// The sources that are waited for, and the window.
#[derive(Default)]
pub(super) struct Pollers {
    watched: RefCell<Vec<Rc<Entry>>>,
    window: Cell<Duration>,
    crowded_until: Cell<Option<Instant>>,
}

impl Pollers {
    /// How long to look before sleeping; zero with no source.
    pub(super) fn window(&self) -> Duration {
        if self.watched.borrow().is_empty() { Duration::ZERO } else { self.window.get() }
    }

    /// Ends the wait for every source that has something; whether there was one.
    pub(super) fn look(&self) -> bool {
        let mut any = false;
        self.watched.borrow_mut().retain(|entry| {
            let ready = (entry.ready)();
            if ready {
                any = true;
                entry.end(Polled::Ready);
            }
            !ready
        });
        any
    }

    /// The look is over: ends all waits; whether there were any.
    pub(super) fn release(&self) -> bool {
        let watched = self.watched.take();
        watched.iter().for_each(|entry| entry.end(Polled::Sleep));
        !watched.is_empty()
    }

    /// A look was interrupted at `now`: none for a while.
    pub(super) fn interrupted(&self, now: Instant) {
        self.window.set(Duration::ZERO);
        self.crowded_until.set(Some(now + CROWDED));
    }

    /// The shard has slept for so long, until `now`.
    pub(super) fn slept(&self, time: Duration, now: Instant) {
        if self.crowded_until.get().is_some_and(|until| now < until) {
            return;
        }
        let window = self.window.get();
        self.window.set(match time <= WINDOW_MAX {
            true => (window * 2).clamp(WINDOW_MIN, WINDOW_MAX),
            false => Duration::ZERO,
        });
    }
}

/// Something to look at; see the head of this module.
pub struct PollSource {
    inner: Rc<Inner>,
    entry: Rc<Entry>,
}

impl PollSource {
    /// `ready` is asked often: it should be a few loads, and must not use this shard.
    pub(super) fn new(inner: &Rc<Inner>, ready: impl Fn() -> bool + 'static) -> PollSource {
        let entry = Entry { ready: Box::new(ready), watch: Cell::new(Watch::Off), waker: Cell::new(None) };
        PollSource { inner: Rc::clone(inner), entry: Rc::new(entry) }
    }

    /// Waits until there is something, at most until the shard sleeps.
    pub fn wait(&mut self) -> impl Future<Output = Polled> + '_ {
        Wait(self)
    }

    fn unwatch(&self) {
        if self.entry.watch.replace(Watch::Off) == Watch::On {
            self.inner.pollers.watched.borrow_mut().retain(|entry| !Rc::ptr_eq(entry, &self.entry));
        }
    }
}

impl fmt::Debug for PollSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PollSource")
    }
}

struct Wait<'a>(&'a PollSource);

impl Future for Wait<'_> {
    type Output = Polled;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Polled> {
        let PollSource { inner, entry } = self.0;
        match entry.watch.get() {
            Watch::Ended(how) => {
                entry.watch.set(Watch::Off);
                Poll::Ready(how)
            }
            Watch::Off if inner.pollers.window.get().is_zero() => Poll::Ready(Polled::Sleep),
            watch => {
                entry.waker.set(Some(context.waker().clone()));
                if watch == Watch::Off {
                    entry.watch.set(Watch::On);
                    inner.pollers.watched.borrow_mut().push(Rc::clone(entry));
                }
                Poll::Pending
            }
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.unwatch();
    }
}

#[cfg(test)]
mod tests {
    use super::super::{EngineMode, Shard, ShardConfig, ShardHandle};
    use super::*;
    use futures_util::future::{Either, select};
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    const SHORT: Duration = Duration::from_micros(1);
    const LONG: Duration = Duration::from_millis(1);

    /// Runs a task on a shard of each kind, which polls as after a short sleep.
    fn polling<T, Fut>(f: impl FnOnce(Shard) -> Fut + Clone + Send + 'static) -> [T; 2]
    where
        T: Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        [EngineMode::IoUring, EngineMode::ThreadPool].map(|mode| {
            let f = f.clone();
            let shard = ShardHandle::start(ShardConfig { mode, ..ShardConfig::default() }).unwrap();
            let call = shard.call(move |shard| async move {
                shard.inner().pollers.slept(SHORT, Instant::now());
                f(shard).await
            });
            call.wait().unwrap()
        })
    }

    #[test]
    fn the_window_grows_while_sleeps_are_short_and_is_gone_after_a_long_one() {
        let (pollers, now) = (Pollers::default(), Instant::now());
        assert_eq!(pollers.window.get(), Duration::ZERO, "nobody polls who has not had short sleeps");
        let windows: Vec<u128> = (0..5)
            .map(|_| {
                pollers.slept(SHORT, now);
                pollers.window.get().as_micros()
            })
            .collect();
        assert_eq!(windows, [10, 20, 40, 50, 50]);
        assert_eq!(pollers.window(), Duration::ZERO, "with nothing to look at there is no look");
        pollers.slept(LONG, now);
        assert_eq!(pollers.window.get(), Duration::ZERO);
    }

    #[test]
    fn a_processor_that_others_want_is_left_to_them_for_a_while() {
        let (pollers, now) = (Pollers::default(), Instant::now());
        pollers.slept(SHORT, now);
        pollers.interrupted(now);
        assert_eq!(pollers.window.get(), Duration::ZERO);
        pollers.slept(SHORT, now + CROWDED / 2);
        assert_eq!(pollers.window.get(), Duration::ZERO);
        pollers.slept(SHORT, now + CROWDED);
        assert_eq!(pollers.window.get(), WINDOW_MIN);
    }

    #[test]
    fn what_is_there_is_found_and_what_is_not_ends_in_sleep() {
        let seen = polling(|shard| async move {
            let mut there = shard.poll_source(|| true);
            let mut never = shard.poll_source(|| false);
            let found = (there.wait().await, there.wait().await, never.wait().await);
            let left = shard.inner().pollers.watched.borrow().len();
            (found, left)
        });
        assert_eq!(seen, [((Polled::Ready, Polled::Ready, Polled::Sleep), 0); 2]);
    }

    #[test]
    fn a_shard_that_does_not_poll_says_so_at_once() {
        let seen = polling(|shard| async move {
            shard.inner().pollers.slept(LONG, Instant::now());
            shard.poll_source(|| unreachable!("nobody looks")).wait().await
        });
        assert_eq!(seen, [Polled::Sleep; 2]);
    }

    #[test]
    fn what_another_thread_makes_ready_is_found_or_slept_for() {
        let ends = polling(|shard| async move {
            let flag = Arc::new(AtomicBool::new(false));
            let (seen, raised) = (Arc::clone(&flag), Arc::clone(&flag));
            let mut source = shard.poll_source(move || seen.load(Ordering::Acquire));
            let helper = shard.blocking(move || raised.store(true, Ordering::Release));
            let join = shard.spawn(helper);
            // Windows end; the answer of the helper's thread comes through the inbox all the same.
            while source.wait().await == Polled::Sleep && !flag.load(Ordering::Acquire) {
                shard.inner().pollers.slept(SHORT, Instant::now());
                shard.yield_now().await;
            }
            join.await.is_ok_and(|ended| ended.is_ok()) && flag.load(Ordering::Acquire)
        });
        assert_eq!(ends, [true; 2]);
    }

    #[test]
    fn a_wait_that_is_given_up_is_not_looked_at_any_more() {
        let left = polling(|shard| async move {
            let mut source = shard.poll_source(|| false);
            let watched = || shard.inner().pollers.watched.borrow().len();
            let during = {
                let (wait, other) = (pin!(source.wait()), pin!(shard.yield_now()));
                assert!(matches!(select(wait, other).await, Either::Right(_)));
                watched()
            };
            (during, watched())
        });
        assert_eq!(left, [(1, 0); 2]);
    }
}
