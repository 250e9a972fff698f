//! Who may be under way on a store at the same time.
//!
//! - [`Drain`]: counts requests, so that closing can wait for them
//! - [`Gate`]: ordinary writes run side by side, a read-modify-write runs alone
//!
//! A read-modify-write that overlapped another write of the same unit would put the old bytes back over the new ones.
//! Such requests are rare (guests with 512-byte sectors on a store with larger ones), so one gate for the whole store
//! is enough.

use crate::engine::Notify;
use std::cell::Cell;
use std::rc::Rc;

#[derive(Debug, Default)]
pub(super) struct Drain {
    under_way: Cell<usize>,
    closed: Cell<bool>,
    empty: Notify,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct UnderWay(Rc<Drain>);

impl Drain {
    /// `None` after [`Drain::close`].
    pub(super) fn enter(self: &Rc<Self>) -> Option<UnderWay> {
        if self.closed.get() {
            return None;
        }
        self.under_way.set(self.under_way.get() + 1);
        Some(UnderWay(Rc::clone(self)))
    }

    /// Lets nobody in any more and waits until all are out.
    pub(super) async fn close(&self) {
        self.closed.set(true);
        while self.under_way.get() > 0 {
            self.empty.notified().await;
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.set(self.0.under_way.get() - 1);
        if self.0.closed.get() {
            self.0.empty.notify_all();
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Gate {
    shared: Cell<usize>,
    alone: Cell<bool>,
    /// Those who want to be alone; new shared ones let them go first, or they would wait for ever.
    waiting: Cell<usize>,
    changed: Notify,
}

#[derive(Debug)]
pub(super) struct Shared(Rc<Gate>);

#[derive(Debug)]
pub(super) struct Alone(Rc<Gate>);

impl Gate {
    pub(super) async fn shared(self: &Rc<Self>) -> Shared {
        while self.alone.get() || self.waiting.get() > 0 {
            self.changed.notified().await;
        }
        self.shared.set(self.shared.get() + 1);
        Shared(Rc::clone(self))
    }

    pub(super) async fn alone(self: &Rc<Self>) -> Alone {
        let waiting = Waiting::new(self);
        while self.alone.get() || self.shared.get() > 0 {
            self.changed.notified().await;
        }
        self.alone.set(true);
        drop(waiting);
        Alone(Rc::clone(self))
    }
}

/// Counts a waiter also when its future is dropped.
struct Waiting<'a>(&'a Gate);

impl Waiting<'_> {
    fn new(gate: &Gate) -> Waiting<'_> {
        gate.waiting.set(gate.waiting.get() + 1);
        Waiting(gate)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
        self.0.changed.notify_all();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.0.shared.set(self.0.shared.get() - 1);
        if self.0.shared.get() == 0 && self.0.waiting.get() > 0 {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.0.alone.set(false);
        self.0.changed.notify_all();
    }
}
