//! A guest's write as the tier sees it: what was cached of the range is gone, and the region's bit is on the disk before
//! the store is touched. And what becomes of the tier when that cannot be had.

use super::health::Work;
use super::open::{self, Mark};
use super::storages::Unflushed;
use super::tier::{Shared, State, Trust};
use super::{SsdStorage, SsdTier, Stamp, device::AlignedBuf, format::SECTOR_BYTES, intents::Regions, veto};
use crate::types::{PAGES_PER_BLOCK, PageRange};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// A guest's write, from before it goes to the store until the store has answered, see [`SsdTier::begin_write`].
///
/// Dropped without [`GuestWrite::end`] nobody knows whether the store will still take it: its regions stay marked.
#[derive(Debug)]
pub struct GuestWrite {
    shared: Arc<Shared>,
    storage: SsdStorage,
    epoch: u64,
    regions: Regions,
    batch: u64,
    submitted: bool,
}

/// A flush of a store, which may write to it too (an image's tables), see [`SsdTier::begin_flush`].
///
/// Dropped without [`StoreFlush::end`] nobody knows whether it still goes on.
#[derive(Debug)]
pub struct StoreFlush {
    shared: Arc<Shared>,
    storage: SsdStorage,
    epoch: u64,
}

impl StoreFlush {
    /// The store has answered.
    pub fn end(self) {
        self.shared.own.end(self.storage.index, self.epoch);
    }
}

impl SsdTier {
    /// The store is about to be flushed: if that changes its times, it is our doing.
    pub fn begin_flush(&self, s: SsdStorage) -> StoreFlush {
        let epoch = self.shared.state.lock().index.storages.epoch(s.index);
        self.shared.own.begin(s.index, epoch);
        StoreFlush { shared: self.shared.clone(), storage: s, epoch }
    }

    /// A guest is about to write or discard pages: when this returns nothing of them is served any more, and no insert begun
    /// before it that has any of them will become visible. The write may go to the store when
    /// [`GuestWrite::poll_ready`] says so.
    pub fn begin_write(&self, s: SsdStorage, first_page: u64, pages: u64) -> GuestWrite {
        let range = PageRange { first: first_page, count: pages };
        self.shared.invalidate(s, range);
        let mut state = self.shared.state.lock();
        let regions = state.index.storages.regions(s.index, range);
        let epoch = state.index.storages.epoch(s.index);
        state.index.storages.begin_write(s, range);
        let mut batch = state.intents.begin(regions);
        if batch > 0 {
            self.shared.work.notify_all();
        }
        // Of a storage without a record on the disk nothing can come back. Its bits go there before its first record.
        if state.closed || !state.index.storages.is_on_disk(s.index) {
            batch = 0;
        }
        drop(state);
        GuestWrite { shared: self.shared.clone(), storage: s, epoch, regions, batch, submitted: false }
    }

    /// Writes what guests' writes wait for, with one sync. Blocking I/O, for a thread of its own. `false`: there was
    /// nothing to do. A device that fails is given up, see [`SsdTier::distrust`].
    pub fn write_intents(&self) -> bool {
        self.shared.write_intents()
    }

    /// Waits until there is something for [`SsdTier::write_intents`], for at most `limit`.
    pub fn wait_for_intents(&self, limit: Duration) {
        let mut state = self.shared.state.lock();
        if !state.has_intents() {
            self.shared.work.wait_for(&mut state, limit);
        }
    }

    /// Ends [`SsdTier::wait_for_intents`].
    pub fn wake_keepers(&self) {
        self.shared.work.notify_all();
    }

    /// The slab takes no intents (any more): the tier is bypassed, guests' writes wait for nothing but the veto that keeps
    /// the slab from being believed after a crash. [`SsdTier::try_again`] brings it back, empty.
    pub fn distrust(&self, reason: &str) {
        self.shared.distrust(reason);
    }

    /// Brings a distrusted tier back if its back-off is over: under a new identity and empty, since the records on the
    /// disk are true no longer. Blocking I/O. `false`: nothing to do, or the device still fails.
    pub fn try_again(&self) -> bool {
        self.shared.try_again()
    }

    /// Drops what the tier holds of a storage, durably: others may write to its store from now on. Blocking I/O.
    pub fn forget(&self, s: SsdStorage) {
        self.shared.forget(s);
    }

    /// Whether the slab was recovered from a crash: what an earlier run wrote to stores may not be durable there. Whoever
    /// opens a store flushes it before anything of it is inserted.
    pub fn is_recovered(&self) -> bool {
        self.shared.found == super::Found::Recovered
    }

    /// A store that is to be closed has been flushed, with no write under way. Without it what was written to is dropped
    /// at [`SsdTier::close`].
    pub fn note_flushed(&self, s: SsdStorage) {
        self.shared.state.lock().index.storages.flushed(s);
    }

    /// Writes begun on a storage, if none is under way. A stamp taken between two equal answers is the store's own.
    pub fn quiet_since(&self, s: SsdStorage) -> Option<u64> {
        self.shared.state.lock().index.storages.quiet_since(s)
    }

    /// The storage's stamp, taken after [`SsdTier::quiet_since`] said `since`. Of no effect if anything was written
    /// meanwhile.
    pub fn settle_stamp(&self, s: SsdStorage, since: u64, stamp: Option<Stamp>) {
        let mut state = self.shared.state.lock();
        if state.index.storages.quiet_since(s) == Some(since) {
            state.index.storages.set_stamp(s, stamp);
        }
    }
}

impl GuestWrite {
    /// Ready when the store may be written to: the regions are marked on the disk, or the tier is no longer believed. To
    /// be bounded by whoever waits, who calls [`SsdTier::distrust`] then.
    pub fn poll_ready(&self, context: &mut Context<'_>) -> Poll<()> {
        if self.batch == 0 {
            return Poll::Ready(());
        }
        let mut state = self.shared.state.lock();
        let there = state.intents.done_batch() >= self.batch && state.trust == Trust::Ok;
        if there || state.trust == Trust::Vetoed || state.closed {
            return Poll::Ready(());
        }
        if !state.waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            state.waiting.push(context.waker().clone());
        }
        Poll::Pending
    }

    /// Whether it has to wait at all.
    pub fn must_wait(&self) -> bool {
        self.batch > 0
    }

    /// The write goes to the store now.
    pub fn submit(&mut self) {
        if !self.submitted {
            self.submitted = true;
            self.shared.own.begin(self.storage.index, self.epoch);
        }
    }

    /// The store has answered, whatever it said: the write is over.
    pub fn end(self) {
        if self.submitted {
            self.shared.own.end(self.storage.index, self.epoch);
        }
        let mut state = self.shared.state.lock();
        state.index.storages.end_write(self.storage);
        state.intents.end(self.regions);
    }
}

impl State {
    pub(super) fn has_intents(&self) -> bool {
        self.trust == Trust::Ok && !self.closed && self.intents.has_work()
    }

    pub(super) fn wake(&mut self) {
        self.waiting.drain(..).for_each(std::task::Waker::wake);
    }
}

impl Shared {
    pub(super) fn write_intents(&self) -> bool {
        let _writing = self.intents_io.lock();
        let (batch, slab_id) = {
            let mut state = self.state.lock();
            if !state.has_intents() {
                return false;
            }
            (state.intents.take_batch(), state.superblock.slab_id)
        };
        let mut buf = AlignedBuf::zeroed(SECTOR_BYTES);
        let mut sectors = batch.encoded(&slab_id);
        let written = sectors.try_for_each(|(offset, bytes)| {
            buf.get_mut().copy_from_slice(&bytes);
            self.device.write(offset, buf.get())
        });
        drop(sectors);
        let written = written.and_then(|()| self.device.sync());
        let mut state = self.state.lock();
        match written {
            Ok(()) => {
                state.intents.finish_batch(&batch);
                state.wake();
            }
            Err(error) => {
                state.intents.fail_batch(&batch);
                drop(state);
                self.distrust(&format!("marking what guests write to failed: {error}"));
            }
        }
        true
    }

    pub(super) fn distrust(&self, reason: &str) {
        let slab_id = {
            let mut state = self.state.lock();
            if state.trust != Trust::Ok || state.closed {
                return;
            }
            state.trust = Trust::Vetoing;
            state.superblock.slab_id
        };
        self.note_outage(Work::Write, reason);
        let Some(this) = self.me.upgrade() else { return };
        let veto = move || {
            let written = this.veto.as_ref().map(|path| (veto::write(path, &slab_id), path.display()));
            if let Some((Err(error), path)) = written {
                tracing::error!(
                    %path, %error,
                    "SSD tier: it could not be noted that its slab must not be believed; delete {} if this host crashes \
                     before the tier is in use again",
                    this.device.path.display()
                );
            }
            let mut state = this.state.lock();
            if state.trust == Trust::Vetoing {
                state.trust = Trust::Vetoed;
            }
            state.wake();
        };
        // A thread that cannot be started leaves it to the waiters' patience, and to the stores' stamps.
        if let Err(error) = std::thread::Builder::new().name("ssd-veto".to_owned()).spawn(veto) {
            tracing::error!(%error, "SSD tier: no thread for its veto");
        }
    }

    pub(super) fn try_again(&self) -> bool {
        // The new superblock names the slots that there are: not while that changes.
        let Some(_sized) = self.resizing.try_lock() else { return false };
        let _alone = self.keeping.lock();
        let _writing = self.intents_io.lock();
        {
            let mut state = self.state.lock();
            let now = (self.clock)();
            if state.trust != Trust::Vetoed || state.closed || !state.health.usable(|| now) {
                return false;
            }
        }
        // Writes go on meanwhile; what they mark is written with the first batch, before any record is.
        self.sweep_all();
        let (mut superblock, batch, bytes) = {
            let mut state = self.state.lock();
            let superblock = open::new_superblock(state.index.limit(), state.superblock.generation);
            state.intents.forget_disk();
            let (batch, bytes) = state.intents.whole(&superblock.slab_id);
            (superblock, batch, bytes)
        };
        let mut buf = AlignedBuf::zeroed(bytes.len());
        buf.get_mut().copy_from_slice(&bytes);
        let device = &self.device;
        let written = device.write(super::format::INTENT_OFFSET, buf.get()).and_then(|()| device.sync());
        let written = written.and_then(|()| open::mark(device, &mut superblock, Mark::Kept));
        let mut state = self.state.lock();
        if let Err(error) = written {
            state.intents.fail_batch(&batch);
            // Half of it may be there: the next try is under yet another identity.
            state.superblock.generation = superblock.generation;
            drop(state);
            self.note_outage(Work::Write, &format!("cannot be made anew: {error}"));
            return false;
        }
        state.intents.finish_batch(&batch);
        self.own.renew(&superblock.slab_id);
        state.superblock = superblock;
        state.index.storages.none_on_disk();
        state.index.touch_all();
        state.trust = Trust::Ok;
        state.health.note_good(Work::Write);
        drop(state);
        self.note_lineage();
        if let Some(Err(error)) = self.veto.as_ref().map(|path| veto::lift(path)) {
            tracing::debug!(%error, "SSD tier: its veto stays; it is against a slab that is no more");
        }
        tracing::info!(path = %self.device.path.display(), "SSD tier: in use again, empty");
        true
    }

    pub(super) fn forget(&self, s: SsdStorage) {
        if !self.state.lock().index.storages.is_current(s) {
            return;
        }
        let _alone = self.keeping.lock();
        loop {
            self.sweep_storage(s.index);
            let mut state = self.state.lock();
            if state.index.storages.slots(s.index) > 0 {
                // A slot that was being written; it has been told that it is not wanted.
                drop(state);
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let was_on_disk = state.index.storages.is_on_disk(s.index);
            state.index.storages.renew_epoch(s.index);
            if state.closed || !was_on_disk {
                return;
            }
            break;
        }
        if let Err(error) = self.write_table().and_then(|()| self.device.sync()) {
            self.distrust(&format!("a storage that others may write to could not be forgotten: {error}"));
        }
    }

    /// Drops what is not sure to be durable on its store, before the slab is closed for good.
    pub(super) fn drop_unflushed(&self, state: &mut State) {
        let unflushed: Vec<Unflushed> = state.index.storages.take_unflushed();
        for Unflushed { storage, .. } in unflushed {
            let State { index, intents, .. } = &mut *state;
            let first_bit = index.storages.first_bit(storage.index);
            index.sweep(0, u32::MAX, |key| {
                let pages = PageRange { first: key.block() * PAGES_PER_BLOCK, count: 1 };
                let marked = key.storage() == storage.index && intents.is_wanted(Regions::of(first_bit, pages));
                super::tier::all_if(marked)
            });
        }
    }
}
