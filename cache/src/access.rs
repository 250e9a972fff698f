//! What guests did, for the learner: a bounded lock-free queue that never delays a guest.

use crate::types::StorageId;
use crossbeam_queue::ArrayQueue;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

/// Kind of a guest request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessOp {
    Read,
    Write,
    /// Discard or write-zeroes.
    Discard,
}

/// One guest request, as it arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// On the cache's monotonic clock.
    pub at: Duration,
    pub disk: u32,
    pub storage: StorageId,
    pub op: AccessOp,
    pub offset: u64,
    pub len: u32,
    /// A read that the RAM tier could not answer at once.
    pub waits: bool,
}

/// Accesses on their way to the learner.
#[derive(Debug)]
pub struct AccessQueue {
    queue: ArrayQueue<Access>,
    dropped: AtomicU64,
    asleep: AtomicBool,
    consumer: OnceLock<Thread>,
}

impl AccessQueue {
    pub fn new(capacity: usize) -> AccessQueue {
        AccessQueue {
            queue: ArrayQueue::new(capacity.max(1)),
            dropped: AtomicU64::new(0),
            asleep: AtomicBool::new(false),
            consumer: OnceLock::new(),
        }
    }

    /// Adds an access; a full queue drops it and counts. With `urgent` (the guest waits for the store anyway) a
    /// sleeping consumer is woken, otherwise only one that has gone to sleep for long.
    pub(crate) fn push(&self, access: Access, urgent: bool) {
        if self.queue.push(access).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        if urgent || self.asleep.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    fn wake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
        if let Some(thread) = self.consumer.get() {
            thread.unpark();
        }
    }

    /// Takes the oldest access.
    pub fn pop(&self) -> Option<Access> {
        self.queue.pop()
    }

    /// Accesses lost to a full queue so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Makes the calling thread the consumer: the one that [`AccessQueue::wait`] may be called on.
    pub fn consume_here(&self) {
        let _ = self.consumer.set(std::thread::current());
    }

    /// Waits for accesses, at most `timeout`. With `deep` any access ends the wait; without it, only urgent ones do,
    /// which spares the data path a system call for every hit while the consumer looks often anyway.
    pub fn wait(&self, timeout: Duration, deep: bool) {
        if deep {
            self.asleep.store(true, Ordering::SeqCst);
            // Whoever pushed before the store was seen did not wake us: look once more.
            if !self.queue.is_empty() {
                self.asleep.store(false, Ordering::Relaxed);
                return;
            }
        }
        std::thread::park_timeout(timeout);
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Ends a wait of the consumer from outside.
    pub fn interrupt(&self) {
        self.wake();
    }
}
