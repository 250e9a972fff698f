//! The same operations without io_uring, for hosts that forbid it: file operations run on a few threads, sockets and
//! eventfds on the shard's own thread with `poll(2)`.
//!
//! Leaf module: it passes a [`RawOp`] to another thread. Its frame stays in place until the completion has been taken,
//! and a job gives exactly one completion, whether it ran or was cancelled in the queue.

use super::exec::Shared;
use super::op::RawOp;
use super::ring::Completion;
use super::sys;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fmt, io};

/// Enough to keep a few disks busy; the fallback is about working at all, not about depth.
const THREADS_MAX: usize = 4;

struct Job {
    fd: RawFd,
    op: RawOp,
    user_data: u64,
}

// SAFETY: the pointers in `op` are used by one thread at a time: the shard doesn't touch the frame between submission
// and completion, and the memory behind it is not tied to a thread.
unsafe impl Send for Job {}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

struct Work {
    queue: Mutex<Queue>,
    ready: Condvar,
}

/// An operation that waits for its descriptor.
struct Waiting {
    fd: RawFd,
    events: i16,
    op: RawOp,
    user_data: u64,
}

pub(super) struct Pool {
    shared: Arc<Shared>,
    work: Arc<Work>,
    threads: Vec<JoinHandle<()>>,
    waiting: Vec<Waiting>,
    done: Vec<Completion>,
    wake: OwnedFd,
    fds: Vec<libc::pollfd>,
}

impl Pool {
    /// # Errors
    /// No descriptor is left for the wake-up eventfd.
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<Pool> {
        Ok(Pool {
            wake: shared.wake_fd()?,
            shared,
            work: Arc::new(Work { queue: Mutex::default(), ready: Condvar::new() }),
            threads: Vec::new(),
            waiting: Vec::new(),
            done: Vec::new(),
            fds: Vec::new(),
        })
    }

    pub(super) fn submit(&mut self, fd: RawFd, op: RawOp, user_data: u64) {
        let mut wait = |events| self.waiting.push(Waiting { fd, events, op, user_data });
        match op {
            RawOp::Read { .. } | RawOp::Write { .. } | RawOp::Datasync | RawOp::Fallocate { .. } => {
                self.enqueue(Job { fd, op, user_data });
            }
            RawOp::Nop => self.finish(user_data, 0),
            RawOp::Recv { .. } => wait(libc::POLLIN),
            RawOp::ReadCounter { .. } => wait(libc::POLLIN),
            RawOp::Poll { events, .. } => wait(events),
            RawOp::Send { .. } | RawOp::WriteCounter { .. } => {
                // SAFETY: the frame is in place (head of this module).
                match unsafe { sys::try_now(fd, op) } {
                    Some(result) => self.finish(user_data, result),
                    None => wait(libc::POLLOUT),
                }
            }
            RawOp::Connect { address, len } => {
                // SAFETY: the frame is in place (head of this module).
                match unsafe { sys::connect_start(fd, address, len) } {
                    Some(result) => self.finish(user_data, result),
                    None => wait(libc::POLLOUT),
                }
            }
        }
    }

    fn finish(&mut self, user_data: u64, result: i32) {
        self.done.push(Completion { user_data, result, more: false });
    }

    fn enqueue(&mut self, job: Job) {
        let spawn = {
            let mut queue = self.work.queue.lock();
            queue.jobs.push_back(job);
            queue.jobs.len() > queue.idle && self.threads.len() < THREADS_MAX
        };
        if spawn {
            let (work, shared) = (Arc::clone(&self.work), Arc::clone(&self.shared));
            let name = format!("{}-io{}", self.shared.name, self.threads.len());
            match std::thread::Builder::new().name(name).spawn(move || run(&work, &shared)) {
                Ok(thread) => self.threads.push(thread),
                Err(error) if self.threads.is_empty() => {
                    let job = self.work.queue.lock().jobs.pop_back();
                    tracing::error!("cannot start an I/O thread: {error}");
                    if let Some(job) = job {
                        self.finish(job.user_data, -libc::EAGAIN);
                    }
                }
                // Those that run will get to it.
                Err(_) => {}
            }
        }
        self.work.ready.notify_one();
    }

    pub(super) fn cancel(&mut self, user_data: u64) {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| waiting.user_data != user_data);
        let mut removed = self.waiting.len() < before;
        if !removed {
            let mut queue = self.work.queue.lock();
            let before = queue.jobs.len();
            queue.jobs.retain(|job| job.user_data != user_data);
            removed = queue.jobs.len() < before;
        }
        if removed {
            self.finish(user_data, -libc::ECANCELED);
        }
    }

    /// Waits for descriptors and threads; see [`super::ring::Ring::turn`]. Completions of threads arrive in the shard's
    /// inbox, which also ends the wait.
    pub(super) fn turn(&mut self, wait: Option<Option<Duration>>, out: &mut Vec<Completion>) -> io::Result<()> {
        let timeout_ms = match wait {
            Some(limit) if self.done.is_empty() => limit.map_or(-1, |limit| {
                // Rounded up: a timer must not find itself woken early and spin.
                i32::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
            }),
            _ => 0,
        };
        self.fds.clear();
        self.fds.push(libc::pollfd { fd: self.wake.as_raw_fd(), events: libc::POLLIN, revents: 0 });
        self.fds.extend(self.waiting.iter().map(|w| libc::pollfd { fd: w.fd, events: w.events, revents: 0 }));
        sys::poll(&mut self.fds, timeout_ms)?;
        if self.fds[0].revents != 0 {
            sys::read_counter(self.wake.as_raw_fd(), &mut 0);
        }
        let mut at = 0;
        let fds = &self.fds;
        let done = &mut self.done;
        self.waiting.retain(|waiting| {
            at += 1;
            let revents = fds[at].revents;
            if revents == 0 {
                return true;
            }
            let mut complete = |result, more| done.push(Completion { user_data: waiting.user_data, result, more });
            match waiting.op {
                RawOp::Poll { multishot: false, .. } => complete(i32::from(revents), false),
                RawOp::Poll { .. } => {
                    // Polling here is level-triggered: without the read it would report the same kick for ever.
                    let result = sys::read_counter(waiting.fd, &mut 0);
                    let alive = result >= 0 || result == -libc::EAGAIN;
                    complete(if alive { i32::from(revents) } else { result }, alive);
                    return alive;
                }
                RawOp::ReadCounter { value } => {
                    // SAFETY: the frame is in place (head of this module), and only this driver uses it now.
                    let value = unsafe { &mut *value };
                    match sys::read_counter(waiting.fd, value) {
                        again if again == -libc::EAGAIN => return true,
                        result => complete(result, false),
                    }
                }
                RawOp::Connect { .. } => complete(sys::connect_end(waiting.fd), false),
                op => {
                    // SAFETY: the frame is in place (head of this module).
                    match unsafe { sys::try_now(waiting.fd, op) } {
                        None => return true,
                        Some(result) => complete(result, false),
                    }
                }
            }
            false
        });
        out.append(&mut self.done);
        Ok(())
    }
}

fn run(work: &Work, shared: &Shared) {
    loop {
        let job = {
            let mut queue = work.queue.lock();
            loop {
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                if queue.closed {
                    return;
                }
                queue.idle += 1;
                work.ready.wait(&mut queue);
                queue.idle -= 1;
            }
        };
        // SAFETY: the frame is in place until the completion posted below has been taken.
        let result = unsafe { sys::file_op(job.fd, job.op) };
        shared.post_completion(job.user_data, result);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.work.queue.lock().closed = true;
        self.work.ready.notify_all();
        // Not joined: a thread may hang in a dead storage. The shard has drained its operations before, so the threads
        // are idle and end by themselves; those that are not own no memory of ours that has not been leaked for them.
        self.threads.clear();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads.len()).field("waiting", &self.waiting.len()).finish()
    }
}
