//! Timers of one shard, ordered by deadline and, among equals, by creation.

use std::collections::BTreeMap;
use std::task::Waker;
use std::time::Instant;

/// Identifies a timer: deadline and a number that no other timer of this shard has.
pub(super) type TimerKey = (Instant, u64);

#[derive(Default)]
pub(super) struct Timers {
    // Ordered and removable: a request's timeout is dropped long before it would fire.
    pending: BTreeMap<TimerKey, Waker>,
    next: u64,
}

impl Timers {
    pub(super) fn add(&mut self, deadline: Instant, waker: Waker) -> TimerKey {
        self.next += 1;
        let key = (deadline, self.next);
        self.pending.insert(key, waker);
        key
    }

    /// Replaces the waker of a timer that has not fired yet; whether there was one.
    pub(super) fn rearm(&mut self, key: TimerKey, waker: &Waker) -> bool {
        match self.pending.get_mut(&key) {
            Some(old) => {
                old.clone_from(waker);
                true
            }
            None => false,
        }
    }

    pub(super) fn remove(&mut self, key: TimerKey) {
        self.pending.remove(&key);
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.pending.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// The earliest timer if it is due.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let (deadline, _) = *self.pending.first_key_value()?.0;
        if deadline > now {
            return None;
        }
        self.pending.pop_first().map(|(_, waker)| waker)
    }
}
