//! An open storage, from any thread.

use super::OpenError;
use crate::backend::{Astray, LayerMap, OpenFile, StoreError, StoreInfo};
use crate::counters::{StorageCounters, StorageStats};
use crate::disk::{Storage, local};
use crate::engine::ShardHandle;
use crate::ssd::{SsdStorage, SsdTier};
use crate::types::{PageRange, StorageId};
use parking_lot::Mutex;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub(super) struct HandleInner {
    pub(super) id: StorageId,
    pub(super) identity: String,
    pub(super) info: Mutex<StoreInfo>,
    pub(super) pages: AtomicU64,
    pub(super) shard: ShardHandle,
    pub(super) counters: Arc<StorageCounters>,
    /// Its number in the SSD tier, with the tier that it is of.
    pub(super) ssd: Mutex<Option<(SsdTier, SsdStorage)>>,
    pub(super) below: Option<StorageHandle>,
    pub(super) map: Option<Arc<LayerMap>>,
    /// Held by whoever has it leave a tier or join one.
    pub(super) joining: Mutex<()>,
    pub(super) pump: AtomicBool,
    pub(super) astray: Mutex<Option<Astray>>,
}

/// What a look for a store's file has changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Looked {
    pub before: Option<Astray>,
    pub now: Option<Astray>,
}

/// An open storage. Clones are the same one.
#[derive(Clone)]
pub struct StorageHandle(pub(super) Arc<HandleInner>);

impl StorageHandle {
    pub fn id(&self) -> StorageId {
        self.0.id
    }
    /// Names the store over restarts and across disks.
    pub fn identity(&self) -> &str {
        &self.0.identity
    }
    /// The storage that this one stands on, of an image.
    pub fn below(&self) -> Option<&StorageHandle> {
        self.0.below.as_ref()
    }
    /// This storage and those below it.
    pub fn chain(&self) -> impl Iterator<Item = &StorageHandle> {
        std::iter::successors(Some(self), |handle| handle.below())
    }
    /// What an image holds itself.
    pub fn map(&self) -> Option<&Arc<LayerMap>> {
        self.0.map.as_ref()
    }
    /// What the store said when it was opened or last asked.
    pub fn info(&self) -> StoreInfo {
        self.0.info.lock().clone()
    }
    pub fn pages(&self) -> u64 {
        self.0.pages.load(Ordering::Relaxed)
    }
    pub fn stats(&self) -> StorageStats {
        self.0.counters.snapshot()
    }
    /// Why the store's last request failed; `None` if it did not.
    pub fn trouble(&self) -> Option<String> {
        self.0.counters.health.trouble()
    }
    /// The thread that does all I/O of this storage.
    pub fn shard(&self) -> &ShardHandle {
        &self.0.shard
    }

    pub(super) fn ssd(&self) -> Option<(SsdTier, SsdStorage)> {
        self.0.ssd.lock().clone()
    }

    /// Asks the store for its size anew. Blocks: not for shard threads.
    ///
    /// # Errors
    /// The store cannot be asked or has shrunk.
    pub fn refresh_size(&self) -> Result<u64, OpenError> {
        self.sized(|storage| async move { storage.refresh_size().await })
    }

    /// Makes the store as large as this: a raw file. What it had stays, and nothing is ever cut. Blocks: not for shard threads.
    ///
    /// # Errors
    /// `NotGrown` with who has it to do, `Smaller`, or what the file system says.
    pub fn grow(&self, size_bytes: u64) -> Result<u64, OpenError> {
        self.sized(move |storage| async move { storage.grow(size_bytes).await })
    }

    /// What the last look for the store's file has found; `None`: its path leads to it, as far as is known.
    pub fn astray(&self) -> Option<Astray> {
        self.0.astray.lock().clone()
    }

    /// Looks whether the store's path still leads to its file. Nobody waits for it: it is done by the calling thread, for as long
    /// as the file systems take. Returns `None` of what is no file, or cannot be looked at.
    pub fn look_for_file(&self) -> Option<Looked> {
        let now = self.file()?.look().ok()?;
        let before = std::mem::replace(&mut *self.0.astray.lock(), now.clone());
        Some(Looked { before, now })
    }

    /// The store's file, where it is one. It stays open for as long as this is kept, with its locks.
    pub fn file(&self) -> Option<OpenFile> {
        let id = self.0.id;
        let asked = self.0.shard.call(move |_| async move { local(id).and_then(|storage| storage.file()) });
        asked.wait().ok()?
    }

    fn sized<F>(&self, change: impl FnOnce(Rc<Storage>) -> F + Send + 'static) -> Result<u64, OpenError>
    where
        F: Future<Output = Result<u64, StoreError>> + 'static,
    {
        let id = self.0.id;
        let asked = self.0.shard.call(move |_| async move {
            match local(id) {
                Some(storage) => change(Rc::clone(&storage)).await.map(|size| (size, storage.info())),
                None => Err(StoreError::Closed { store: "the store".into() }),
            }
        });
        let (size, info) = asked.wait()??;
        self.0.pages.store(PageRange::covering(0, size).count, Ordering::Relaxed);
        *self.0.info.lock() = info;
        Ok(size)
    }
}

impl fmt::Debug for StorageHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StorageHandle")
            .field("id", &self.0.id)
            .field("identity", &self.0.identity)
            .finish_non_exhaustive()
    }
}
