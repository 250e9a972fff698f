//! Tables are written before a guest is answered, and two writes do not allocate the same cluster.
//!
//! - [`Commits`]: those who wait for the tables; one turn of writing them serves all that wait when it begins
//! - [`Inner::settle_freed`]: nothing is taken again while the tables in the file still point there
//! - [`Ranges`]: clusters that somebody allocates and whose pointers are not in the file yet

use super::{Inner, StoreError};
use crate::engine::{Notify, OneshotSender, oneshot};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// How long the tables may wait for allocations that are about to be ready. While tables are written imago allocates
/// nothing, so without this each write of a deep queue would have a turn of its own.
const GATHER: Duration = Duration::from_millis(2);
/// As many as wait begin a turn at once.
const GATHER_MAX: usize = 64;

#[derive(Default)]
pub(super) struct Commits {
    waiting: RefCell<Vec<OneshotSender<Result<(), StoreError>>>>,
    running: Cell<bool>,
    /// Allocations that will soon want the tables written.
    coming: Cell<usize>,
    changed: Notify,
}

/// An allocation that will soon want the tables written.
#[must_use]
pub(super) struct Coming<'a>(&'a Commits);

impl Commits {
    pub(super) fn coming(&self) -> Coming<'_> {
        self.coming.set(self.coming.get() + 1);
        Coming(self)
    }

    async fn gathered(&self) {
        while self.coming.get() > 0 && self.waiting.borrow().len() < GATHER_MAX {
            self.changed.notified().await;
        }
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        self.0.coming.set(self.0.coming.get() - 1);
        self.0.changed.notify_all();
    }
}

impl Inner {
    /// Writes all tables that have changed so far.
    pub(super) async fn commit(self: &Rc<Self>) -> Result<(), StoreError> {
        let (sender, receiver) = oneshot();
        self.commits.waiting.borrow_mut().push(sender);
        if !self.commits.running.replace(true) {
            let inner = Rc::clone(self);
            self.shard.spawn(async move { inner.run_commits().await });
        }
        receiver.await.unwrap_or_else(|| Err(self.damaged("its tables could not be written")))
    }

    /// Waits until nothing in the file points to clusters that were given up. imago takes such a cluster for a table of its own
    /// as soon as it is free in memory, while the old pointer is still in the file: then both would lead there. So whoever may
    /// make imago take clusters comes through here first, and nobody gives any up meanwhile. That the pointers' going is
    /// durable before the cluster is written to is seen to by [`super::order`].
    pub(super) async fn settle_freed(self: &Rc<Self>) -> Result<(), StoreError> {
        while self.container.has_unwritten_frees() {
            self.commit().await?;
        }
        Ok(())
    }

    async fn run_commits(&self) {
        // Reset also when imago panics: those who wait are told by their senders, which are dropped.
        let running = Running(&self.commits.running);
        loop {
            // Too late is as good as in time: the rest has the next turn.
            let commits = Rc::clone(&self.commits);
            let _ = self.shard.timeout(GATHER, async move { commits.gathered().await }).await;
            // imago writes counts and then pointers. A cluster that is counted in memory behind the first and pointed to ahead of
            // the second would be in use and free in the file.
            let alone = self.preparing.alone().await;
            let batch = self.commits.waiting.take();
            if batch.is_empty() {
                break;
            }
            let epoch = self.container.epoch();
            let result = imago::format::drivers::FormatDriverInstance::flush(&self.image).await;
            let result = result.map_err(|error| self.failed("write tables", error));
            if result.is_ok() {
                self.container.tables_written(epoch);
            }
            drop(alone);
            for sender in batch {
                sender.send(result.clone());
            }
        }
        drop(running);
    }
}

struct Running<'a>(&'a Cell<bool>);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// Ranges that are being allocated. Few at a time: as many as requests are under way.
#[derive(Default)]
pub(super) struct Ranges {
    held: RefCell<Vec<Range<u64>>>,
    changed: Notify,
}

impl Ranges {
    fn is_held(&self, range: &Range<u64>) -> bool {
        self.held.borrow().iter().any(|held| range.start < held.end && held.start < range.end)
    }

    /// Waits until nobody allocates in the range.
    pub(super) async fn settled(&self, range: &Range<u64>) {
        while self.is_held(range) {
            self.changed.notified().await;
        }
    }

    /// Takes the range for an allocation.
    pub(super) async fn hold(&self, range: Range<u64>) -> Held<'_> {
        self.settled(&range).await;
        self.held.borrow_mut().push(range.clone());
        Held { ranges: self, range }
    }
}

#[must_use]
pub(super) struct Held<'a> {
    ranges: &'a Ranges,
    range: Range<u64>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.ranges.held.borrow_mut();
        if let Some(at) = held.iter().position(|range| *range == self.range) {
            held.swap_remove(at);
        }
        drop(held);
        self.ranges.changed.notify_all();
    }
}
