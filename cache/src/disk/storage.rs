//! A storage on its shard.

use crate::backend::{Backend, LayerMap, OpenFile, StoreError, StoreInfo};
use crate::cache::{Shared, StorageHandle};
use crate::counters::StorageCounters;
use crate::engine::aside::AsideFile;
use crate::engine::{OneshotReceiver, OneshotSender, Shard, oneshot};
use crate::ssd::{SsdStorage, SsdTier};
use crate::types::{PageRange, StorageId};
use rustc_hash::FxHashMap;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

thread_local! {
    /// Storages whose home is this thread. A task that other threads send here finds its storage by number, because
    /// an `Rc` cannot travel.
    static LOCAL: RefCell<FxHashMap<StorageId, Rc<Storage>>> = RefCell::default();
}

/// The storage of this number, if its home is the calling shard.
pub fn local(id: StorageId) -> Option<Rc<Storage>> {
    LOCAL.with_borrow(|map| map.get(&id).cloned())
}

/// How often it is looked whether something is over that nobody tells the end of.
const LOOK: Duration = Duration::from_millis(2);

/// A storage's part of the SSD tier.
pub(crate) struct SsdPart {
    pub(crate) tier: SsdTier,
    /// The tier's file on this shard.
    pub(crate) fd: AsideFile,
    pub(crate) storage: SsdStorage,
    /// What was written to the store before the tier heard of its writes is over, and durable there. Before that nothing is
    /// inserted: a loss of power could take from the store what the tier has.
    pub(crate) settled: Cell<bool>,
}

/// A store with its part of the cache.
pub struct Storage {
    pub(super) id: StorageId,
    pub(super) shard: Shard,
    pub(super) shared: Arc<Shared>,
    pub(super) backend: Rc<dyn Backend>,
    pub(super) counters: Arc<StorageCounters>,
    ssd: RefCell<Option<Rc<SsdPart>>>,
    /// Writes under way that no SSD tier was told of.
    pub(super) unannounced: Cell<u32>,
    /// The versions of what it stands on.
    seal: u64,
    /// What the store holds itself, and what it stands on otherwise.
    pub(super) map: Option<Arc<LayerMap>>,
    pub(super) below: Option<StorageHandle>,
    waiters: RefCell<FxHashMap<u32, Vec<OneshotSender<()>>>>,
    pub(super) prefetches: Cell<u32>,
    pub(super) prefetch_retry: Cell<bool>,
    pub(super) destaging: Cell<bool>,
    pub(super) requests: Cell<u32>,
    closing: Cell<bool>,
}

impl Storage {
    pub(crate) fn start(
        shard: Shard,
        shared: Arc<Shared>,
        id: StorageId,
        backend: Rc<dyn Backend>,
        counters: Arc<StorageCounters>,
        ssd: Option<SsdPart>,
        below: Option<StorageHandle>,
    ) -> Rc<Storage> {
        let storage = Rc::new(Storage {
            id,
            shard,
            shared,
            map: backend.map(),
            seal: crate::cache::seal(below.as_ref()),
            below,
            backend,
            counters,
            ssd: RefCell::new(ssd.map(Rc::new)),
            unannounced: Cell::new(0),
            waiters: RefCell::default(),
            prefetches: Cell::new(0),
            prefetch_retry: Cell::new(false),
            destaging: Cell::new(false),
            requests: Cell::new(0),
            closing: Cell::new(false),
        });
        LOCAL.with_borrow_mut(|map| map.insert(id, Rc::clone(&storage)));
        storage
    }

    pub fn id(&self) -> StorageId {
        self.id
    }
    pub fn shard(&self) -> &Shard {
        &self.shard
    }
    pub fn info(&self) -> StoreInfo {
        self.backend.info()
    }
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
    pub(super) fn closing(&self) -> bool {
        self.closing.get()
    }

    /// Its part of the SSD tier, if there is one.
    pub(super) fn ssd(&self) -> Option<Rc<SsdPart>> {
        self.ssd.borrow().clone()
    }

    /// The store's pages, the last one perhaps in part.
    pub(super) fn pages(&self) -> u64 {
        PageRange::covering(0, self.backend.info().size_bytes).count
    }

    /// Waits until somebody's fill of `slot` has ended.
    pub(super) fn fill_ended(&self, slot: u32) -> OneshotReceiver<()> {
        let (sender, receiver) = oneshot();
        self.waiters.borrow_mut().entry(slot).or_default().push(sender);
        receiver
    }

    /// Wakes everybody who waits for a fill of `slot`; each looks again at what is valid.
    pub(super) fn wake_waiters(&self, slot: u32) {
        if let Some(waiting) = self.waiters.borrow_mut().remove(&slot) {
            drop(waiting);
        }
    }

    /// Asks the store for its size anew and takes note of a change.
    ///
    /// # Errors
    /// The store cannot be asked, or has shrunk.
    pub async fn refresh_size(&self) -> Result<u64, StoreError> {
        let size = self.backend.refresh_size().await?;
        self.shared.core().add_storage(self.id, self.pages());
        Ok(size)
    }

    /// The store's file, where it is one.
    pub fn file(&self) -> Option<OpenFile> {
        self.backend.file()
    }

    /// Makes the store larger and takes note of it.
    ///
    /// # Errors
    /// See [`Backend::grow`].
    pub async fn grow(&self, size_bytes: u64) -> Result<u64, StoreError> {
        let size = self.backend.grow(size_bytes).await?;
        self.shared.core().add_storage(self.id, self.pages());
        Ok(size)
    }

    /// Ends background work, lets go of the store and forgets what is cached in RAM. Guest requests must have ended. With
    /// `parted` others may write to the store from now on: what the SSD tier holds of it is dropped, unless the store
    /// has a version by which a change would be noticed.
    pub(crate) async fn close(self: &Rc<Self>, parted: bool) {
        self.closing.set(true);
        self.shared.core().drop_storage(self.id);
        while self.prefetches.get() > 0 || self.destaging.get() || self.requests.get() > 0 {
            self.shard.sleep(LOOK).await;
        }
        if let Some(part) = self.ssd() {
            let (tier, ssd) = (&part.tier, part.storage);
            if parted && self.backend.info().version_stamp.is_none() {
                // On record before others may write.
                crate::cache::forget(&self.shard, tier, ssd, "a store that is given away").await;
            }
            // A loss of power after this must not take from the store what the tier has.
            if self.flush_store().await.is_ok() {
                tier.note_flushed(ssd);
            }
            tier.release_storage(ssd, self.stamp_now().await);
        }
        self.backend.close().await;
        self.shared.core().remove_storage(self.id);
        LOCAL.with_borrow_mut(|map| map.remove(&self.id));
    }

    /// Flushes the store. An image may write its tables then: our own doing, as far as the SSD tier is concerned.
    pub(super) async fn flush_store(&self) -> Result<(), StoreError> {
        let writes = self.map.is_some() && !self.backend.info().read_only;
        let flushing = self.ssd().filter(|_| writes).map(|part| part.tier.begin_flush(part.storage));
        let result = self.backend.flush().await;
        if let Some(flushing) = flushing {
            flushing.end();
        }
        result
    }

    /// Makes durable on the store what was written, for a checkpoint of the SSD tier, and tells the tier the store's
    /// version if nothing was written meanwhile.
    pub(crate) async fn settle(&self) -> bool {
        let Some(part) = self.ssd() else { return true };
        if self.closing() || !part.settled.get() {
            return false;
        }
        let (tier, ssd) = (&part.tier, part.storage);
        let quiet = tier.quiet_since(ssd);
        if self.flush_store().await.is_err() {
            return false;
        }
        if let Some(quiet) = quiet {
            tier.settle_stamp(ssd, quiet, self.stamp_now().await);
        }
        true
    }

    /// Takes a part in an SSD tier that came into use while the store is served. Nothing of the store is in it.
    pub(crate) fn join_ssd(self: &Rc<Self>, part: SsdPart) {
        if self.closing() || self.ssd.borrow().is_some() {
            part.tier.release_storage(part.storage, None);
            return;
        }
        let part = Rc::new(part);
        // From here on the tier hears of every write that begins.
        *self.ssd.borrow_mut() = Some(Rc::clone(&part));
        let storage = Rc::clone(self);
        self.shard.spawn(async move {
            while storage.unannounced.get() > 0 && !storage.closing() {
                storage.shard.sleep(LOOK).await;
            }
            match storage.backend.harden().await {
                Ok(()) => part.settled.set(true),
                Err(error) => {
                    tracing::warn!(%error, "this store goes without the SSD tier: it cannot be flushed");
                    let here = storage.ssd().is_some_and(|now| Rc::ptr_eq(&now, &part));
                    if here && !storage.closing() {
                        storage.ssd.borrow_mut().take();
                        part.tier.release_storage(part.storage, None);
                    }
                }
            }
        });
    }

    /// Gives up the part in an SSD tier that is no longer in use, and waits until nothing of this storage is under way there. What
    /// still is at `deadline` keeps the tier's file open until it has ended.
    pub(crate) async fn leave_ssd(&self, deadline: Instant) {
        let Some(part) = self.ssd.borrow_mut().take() else { return };
        while (Rc::strong_count(&part) > 1 || part.fd.is_in_use()) && Instant::now() < deadline {
            self.shard.sleep(LOOK).await;
        }
    }

    /// The store's version as it is now: our own writes have changed it since it was opened.
    async fn stamp_now(&self) -> Option<crate::ssd::Stamp> {
        let _ = self.backend.refresh_size().await;
        self.backend.info().version_stamp.map(|stamp| crate::cache::ssd_stamp(stamp, self.seal))
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Storage").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Counts a guest request for as long as it lives, so that closing can wait for it.
pub(super) struct Running(Rc<Storage>);

impl Running {
    pub(super) fn new(storage: &Rc<Storage>) -> Running {
        storage.requests.set(storage.requests.get() + 1);
        Running(Rc::clone(storage))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.requests.set(self.0.requests.get() - 1);
    }
}
