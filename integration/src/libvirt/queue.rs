//! The bounded queue of calls between callers and the worker thread.
//!
//! A caller waits for a limited time only. While libvirt hangs, calls whose callers gave up stay queued behind the one that
//! hangs; they make room for others as soon as room is needed, so that only calls somebody still waits for count.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::error::HypervisorError;
use super::link::Link;

/// A call for the worker thread.
pub(super) trait Job: Send {
    /// Whether nobody waits for it any more.
    fn abandoned(&self) -> bool;
    /// Runs it with the connection, or with why there is none. `true` asks to be run once more on a new connection.
    fn run(&mut self, link: Result<&Arc<Link>, HypervisorError>) -> bool;
}

/// A [`Job`] that answers a waiting caller.
pub(super) struct Call<T, F> {
    pub(super) reply: Option<oneshot::Sender<Result<T, HypervisorError>>>,
    /// Run once more if the connection was lost under it: for calls that change nothing.
    pub(super) again: bool,
    pub(super) work: F,
}

impl<T, F> Job for Call<T, F>
where
    T: Send,
    F: FnMut(&Arc<Link>) -> Result<T, HypervisorError> + Send,
{
    fn abandoned(&self) -> bool {
        self.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    fn run(&mut self, link: Result<&Arc<Link>, HypervisorError>) -> bool {
        if self.abandoned() {
            return false; // a caller that gave up wants nothing done any more
        }
        let result = match link {
            Ok(link) => {
                let result = (self.work)(link);
                if result.is_err() && !link.is_alive() && std::mem::take(&mut self.again) {
                    return true;
                }
                result
            }
            Err(e) => Err(e),
        };
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(result); // it may have given up meanwhile
        }
        false
    }
}

/// A queued job and when it was submitted.
pub(super) struct Queued {
    pub(super) job: Box<dyn Job>,
    pub(super) submitted: Instant,
}

/// What the worker is woken for.
pub(super) enum Next {
    Job(Queued),
    /// Time is up, or something happened to the connection.
    Look,
    /// The last handle is gone.
    Closed,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Queued>,
    woken: bool,
    closed: bool,
}

pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl Queue {
    pub(super) fn new(capacity: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), capacity }
    }

    /// Queues a job.
    ///
    /// # Errors
    /// `Busy` if as many callers wait already as fit.
    pub(super) fn submit(&self, job: Box<dyn Job>) -> Result<(), HypervisorError> {
        let mut state = self.state.lock();
        if state.jobs.len() >= self.capacity {
            state.jobs.retain(|q| !q.job.abandoned());
        }
        if state.jobs.len() >= self.capacity {
            return Err(HypervisorError::Busy);
        }
        state.jobs.push_back(Queued { job, submitted: Instant::now() });
        self.changed.notify_one();
        Ok(())
    }

    /// Has the worker look at its connection soon.
    pub(super) fn wake(&self) {
        self.state.lock().woken = true;
        self.changed.notify_one();
    }

    /// Ends the worker once it is done with its present job.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_one();
    }

    /// Waits for something to do, at most for `patience`.
    pub(super) fn next(&self, patience: Duration) -> Next {
        let until = Instant::now() + patience;
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return Next::Closed;
            }
            if std::mem::take(&mut state.woken) {
                return Next::Look;
            }
            if let Some(queued) = state.jobs.pop_front() {
                return Next::Job(queued);
            }
            if self.changed.wait_until(&mut state, until).timed_out() {
                return Next::Look;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> (Box<dyn Job>, oneshot::Receiver<Result<u8, HypervisorError>>) {
        let (reply, answer) = oneshot::channel();
        (Box::new(Call { reply: Some(reply), again: true, work: |_: &Arc<Link>| Ok(1) }), answer)
    }

    fn unreachable() -> HypervisorError {
        HypervisorError::Unreachable { uri: "u".into(), reason: "r".into() }
    }

    #[test]
    fn a_full_queue_turns_callers_away_until_others_give_up() {
        let queue = Queue::new(2);
        let (first, gives_up) = call();
        let (second, mut waits) = call();
        queue.submit(first).unwrap();
        queue.submit(second).unwrap();
        assert_eq!(queue.submit(call().0).unwrap_err(), HypervisorError::Busy);
        drop(gives_up);
        let (third, mut also_waits) = call();
        queue.submit(third).unwrap();
        while let Next::Job(mut queued) = queue.next(Duration::ZERO) {
            assert!(!queued.job.run(Err(unreachable())));
        }
        assert_eq!(waits.try_recv().unwrap(), Err(unreachable()));
        assert_eq!(also_waits.try_recv().unwrap(), Err(unreachable()));
    }

    #[test]
    fn waking_and_closing_come_before_jobs() {
        let queue = Queue::new(2);
        let (job, _answer) = call();
        queue.submit(job).unwrap();
        queue.wake();
        assert!(matches!(queue.next(Duration::ZERO), Next::Look));
        queue.close();
        assert!(matches!(queue.next(Duration::ZERO), Next::Closed));
    }
}
