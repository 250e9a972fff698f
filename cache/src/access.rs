//! What guests did, for the learner: a bounded lock-free queue that never delays a guest, nor lets learning take the processor
//! from serving: of the reads that the RAM tier answers it takes at most [`HITS`] in each [`WINDOW`], those that come first.
//! Reads that wait, and changes, are all taken.

use crate::types::StorageId;
use crossbeam_queue::ArrayQueue;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

/// Time in which [`HITS`] are taken. Hits in a row are more use to a predictor than single ones, so it is long enough for a
/// thousand of them and short enough that no phase of a guest falls into the gap.
const WINDOW: Duration = Duration::from_millis(50);
const WINDOW_US: u64 = WINDOW.as_micros() as u64;
const WINDOWS_A_SECOND: u64 = 1_000_000 / WINDOW_US;
/// 41,000 a second. The learner takes 1 to 1.5 µs over each: with these at most a sixteenth of a processor, where all the hits
/// that one shard can serve (300,000 a second) took nearly half of one, the same one on a small host.
const HITS: u32 = 2048;
/// How long the consumer, once it was woken for a guest that waits, takes no more wake-ups, and then looks by itself. One for
/// each read costs more than the read where 40,000 a second miss; a first miss is heard at once, those of a store that takes
/// longer than this too.
const MODERATION: Duration = Duration::from_micros(250);

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
    /// Which window it is, and the hits taken in it. Two shards that begin one together may take a few more.
    window: AtomicU64,
    hits: AtomicU32,
    /// Somebody wants every access.
    whole: AtomicBool,
    asleep: AtomicBool,
    /// A guest waits whose access was pushed since the consumer last went to sleep.
    urged: AtomicBool,
    /// The consumer looks within [`MODERATION`] by itself.
    moderated: AtomicBool,
    consumer: OnceLock<Thread>,
}

impl AccessQueue {
    pub fn new(capacity: usize) -> AccessQueue {
        AccessQueue {
            queue: ArrayQueue::new(capacity.max(1)),
            dropped: AtomicU64::new(0),
            window: AtomicU64::new(0),
            hits: AtomicU32::new(0),
            whole: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            urged: AtomicBool::new(false),
            moderated: AtomicBool::new(false),
            consumer: OnceLock::new(),
        }
    }

    /// Adds an access; a full queue, or a hit too many, drops it and counts. With `urgent` (the guest waits for the store
    /// anyway) a sleeping consumer is woken unless it was woken for another just now, otherwise only one that has gone to
    /// sleep for long.
    pub(crate) fn push(&self, access: Access, urgent: bool) {
        let hit = access.op == AccessOp::Read && !access.waits;
        if hit && !self.takes_hit(access.at) || self.queue.push(access).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        if urgent {
            self.urged.store(true, Ordering::Relaxed);
        }
        if urgent && !self.moderated.load(Ordering::SeqCst) || self.asleep.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    fn takes_hit(&self, at: Duration) -> bool {
        // Whole seconds and the rest apart: a division of 128 bits would cost more than all else here.
        let window = at.as_secs() * WINDOWS_A_SECOND + u64::from(at.subsec_micros()) / WINDOW_US;
        if self.window.load(Ordering::Relaxed) != window {
            self.window.store(window, Ordering::Relaxed);
            self.hits.store(0, Ordering::Relaxed);
        }
        // Looked at first: an increment at every hit would wrap, and costs more.
        if self.hits.load(Ordering::Relaxed) >= HITS {
            return self.whole.load(Ordering::Relaxed);
        }
        self.hits.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Whether every hit is taken from now on, for as long as the queue has room: somebody records a disk.
    pub fn take_all(&self, whole: bool) {
        self.whole.store(whole, Ordering::Relaxed);
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

    /// Accesses not taken so far: hits too many, and what found the queue full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Makes the calling thread the consumer: the one that [`AccessQueue::wait`] may be called on.
    pub fn consume_here(&self) {
        let _ = self.consumer.set(std::thread::current());
    }

    /// Waits for accesses, at most `timeout`. With `deep` any access ends the wait; without it, only urgent ones do,
    /// which spares the data path a system call for every hit while the consumer looks often anyway. After an urgent one the
    /// wait is short and nothing ends it.
    pub fn wait(&self, timeout: Duration, deep: bool) {
        if deep {
            self.asleep.store(true, Ordering::SeqCst);
            // Whoever pushed before the store was seen did not wake us: look once more.
            if !self.queue.is_empty() {
                self.asleep.store(false, Ordering::Relaxed);
                return;
            }
        }
        // Whoever pushes from here on and does not wake us is found when this short sleep is over.
        let moderated = !deep && self.urged.swap(false, Ordering::Relaxed);
        self.moderated.store(moderated, Ordering::SeqCst);
        std::thread::park_timeout(if moderated { timeout.min(MODERATION) } else { timeout });
        self.moderated.store(false, Ordering::SeqCst);
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Ends a wait of the consumer from outside.
    pub fn interrupt(&self) {
        self.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(at_ms: u64, op: AccessOp, waits: bool) -> Access {
        let at = Duration::from_millis(at_ms);
        Access { at, disk: 0, storage: StorageId(0), op, offset: 0, len: 4096, waits }
    }

    #[test]
    fn hits_leave_the_learner_time_and_nothing_else_is_lost_for_them() {
        let queue = AccessQueue::new(1 << 16);
        let hit = |at_ms| queue.push(access(at_ms, AccessOp::Read, false), false);
        (0..3 * HITS).for_each(|_| hit(1000));
        assert_eq!((queue.queue.len() as u32, queue.dropped()), (HITS, u64::from(2 * HITS)));
        for (op, waits) in [(AccessOp::Read, true), (AccessOp::Write, false), (AccessOp::Discard, false)] {
            (0..HITS).for_each(|_| queue.push(access(1000, op, waits), waits));
        }
        assert_eq!((queue.queue.len() as u32, queue.dropped()), (4 * HITS, u64::from(2 * HITS)));
        // The next window has hits of its own.
        (0..2 * HITS).for_each(|_| hit(1050));
        assert_eq!((queue.queue.len() as u32, queue.dropped()), (5 * HITS, u64::from(3 * HITS)));
        // Somebody who records wants them all.
        queue.take_all(true);
        (0..2 * HITS).for_each(|_| hit(1051));
        assert_eq!((queue.queue.len() as u32, queue.dropped()), (7 * HITS, u64::from(3 * HITS)));
    }

    #[test]
    fn no_access_of_a_guest_that_waits_is_slept_over() {
        const ALL: u64 = 200_000;
        let queue = AccessQueue::new(1 << 10);
        queue.consume_here();
        std::thread::scope(|scope| {
            let producer = scope.spawn(|| {
                for turn in 0..ALL {
                    while queue.queue.is_full() {
                        std::thread::yield_now();
                    }
                    queue.push(access(0, AccessOp::Read, true), true);
                    // Every pace: in a row, and with the consumer asleep in between.
                    if turn % 1000 == 0 {
                        while !queue.queue.is_empty() {
                            std::thread::yield_now();
                        }
                    }
                }
            });
            let mut taken = 0;
            while taken < ALL {
                while queue.pop().is_some() {
                    taken += 1;
                }
                if taken < ALL {
                    // Whoever is slept over waits for an hour, and so does this test.
                    queue.wait(Duration::from_secs(3600), false);
                }
            }
            producer.join().unwrap();
        });
        assert_eq!(queue.dropped(), 0);
    }
}
