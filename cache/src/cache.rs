//! The cache as a whole: shards, tiers and the storages that share them.
//!
//! - [`Cache`]: made once; opens storages, takes prefetches, answers questions; any thread
//! - [`StorageHandle`]: an open storage, from any thread
//! - [`Shared`]: what storages on their shards share

use crate::access::AccessQueue;
use crate::arena::{Arena, HugePages};
use crate::backend::{Below, LayerMap, StoreError, StoreInfo, StoreOptions, StoreSpec};
use crate::counters::{StorageCounters, StorageStats};
use crate::disk::{Storage, extents_of, local, read_copy};
use crate::engine::{EngineKind, EngineMode, Shard, ShardConfig, ShardGone, ShardHandle};
use crate::policy::{
    BudgetState, Core, CoreConfig, Occupancy, Outcome, PrefetchCounters, PrefetchRequest, Whereabouts,
};
use crate::ssd::{SsdStats, SsdStorage, SsdTier};
use crate::types::{BLOCK_BYTES, BlockIndex, PAGES_PER_BLOCK, PageMask, PageRange, StorageId};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustc_hash::FxHashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fmt, io};
use thiserror::Error;

/// Accesses that may wait for the learner: a quarter of a second at 256k requests a second.
const ACCESS_QUEUE: usize = 1 << 16;

/// Settings of the cache.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    pub ram_bytes: u64,
    pub huge_pages: HugePages,
    /// Event-loop threads; at least 1.
    pub shards: usize,
    pub engine: EngineMode,
    /// Policy settings; `slots`, `block_pages`, `write_allocate` and `destage` follow from the tiers.
    pub policy: CoreConfig,
}

/// How to close a storage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Closing {
    /// What waits for the SSD tier is written first, for at most this long.
    pub drain: Duration,
    /// The store leaves prestage's hands and others may write to it, as after a detach; as opposed to a restart. What the
    /// SSD tier holds of a store without a version of its own (NBD, block devices) is dropped then: nobody could tell
    /// whether it is still true.
    pub parted: bool,
}

/// Why a storage could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error(
        "{identity} is open already, and one of the two is to write; two disks on one store would corrupt it. Make both read-only, or remove the other disk first"
    )]
    InUse { identity: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{identity} stands in its own chain of images; name each of them once")]
    Loop { identity: String },
    #[error("the thread that should serve the store has stopped; restart prestaged")]
    ShardGone,
}

impl From<ShardGone> for OpenError {
    fn from(_: ShardGone) -> OpenError {
        OpenError::ShardGone
    }
}

/// What storages on their shards share.
pub(crate) struct Shared {
    arena: Arc<Arena>,
    core: Mutex<Core>,
    ssd: Option<SsdTier>,
    accesses: AccessQueue,
    started: Instant,
}

impl Shared {
    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock()
    }
    pub(crate) fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }
    pub(crate) fn ssd(&self) -> Option<&SsdTier> {
        self.ssd.as_ref()
    }
    pub(crate) fn accesses(&self) -> &AccessQueue {
        &self.accesses
    }
    /// Time since the cache was made: the clock of policy, accesses and prefetch deadlines.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("arena", &self.arena).finish_non_exhaustive()
    }
}

struct Opened {
    handle: StorageHandle,
    read_only: bool,
    users: usize,
}

#[derive(Default)]
struct Registry {
    /// `None`: being opened or closed at this moment.
    by_identity: FxHashMap<String, Option<Opened>>,
    ids: FxHashMap<String, StorageId>,
}

/// RAM and SSD tiers, the shards that serve them, and the storages in front of which they stand.
#[derive(Clone)]
pub struct Cache(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    shards: Vec<ShardHandle>,
    registry: Mutex<Registry>,
    /// A storage has been opened or closed.
    settled: Condvar,
}

impl Cache {
    /// Reserves the RAM tier and starts the shards. The SSD tier is opened beforehand by the caller, who decides what
    /// to do without one.
    ///
    /// # Errors
    /// The memory cannot be reserved or a thread not started.
    pub fn new(config: CacheConfig, ssd: Option<SsdTier>) -> io::Result<Cache> {
        let slots = u32::try_from(config.ram_bytes / BLOCK_BYTES as u64)
            .map_err(|_| io::Error::other("the RAM tier is limited to 256 TiB"))?
            .max(16);
        let arena = Arena::new(slots, config.huge_pages)?;
        let policy = CoreConfig {
            slots,
            // The arena's and the SSD tier's geometry, and no page in RAM of which only a part is known.
            block_pages: PAGES_PER_BLOCK,
            write_allocate: false,
            destage: ssd.is_some(),
            ..config.policy
        };
        let core = Core::new(policy, Arc::clone(&arena) as Arc<dyn crate::policy::SlotGuard>);
        let shared = Arc::new(Shared {
            arena,
            core: Mutex::new(core),
            ssd,
            accesses: AccessQueue::new(ACCESS_QUEUE),
            started: Instant::now(),
        });
        let mut shards = Vec::new();
        for i in 0..config.shards.max(1) {
            let shard = ShardConfig { name: format!("shard{i}"), mode: config.engine, ..ShardConfig::default() };
            shards.push(ShardHandle::start(shard)?);
        }
        for shard in &shards {
            let arena = Arc::clone(shared.arena());
            shard.spawn(move |shard| async move {
                if let Err(error) = shard.register_arena(arena) {
                    tracing::info!(%error, "RAM tier not registered with io_uring; transfers pin its pages one by one");
                }
            });
        }
        let inner = Inner { shared, shards, registry: Mutex::default(), settled: Condvar::new() };
        Ok(Cache(Arc::new(inner)))
    }

    /// Opens a store, or joins those who have it open. Blocks until the store answers: not for shard threads.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(&self, spec: &StoreSpec, options: StoreOptions) -> Result<StorageHandle, OpenError> {
        let mut chain: Vec<String> = spec.chain().map(identity).collect();
        chain.sort_unstable();
        // It would wait for itself.
        if let Some(twice) = chain.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(OpenError::Loop { identity: twice[0].clone() });
        }
        let identity = identity(spec);
        let read_only = options.read_only;
        let (id, shard) = {
            let mut registry = self.0.registry.lock();
            // Read-only disks of one image start side by side: the first opens it, the others join.
            while matches!(registry.by_identity.get(&identity), Some(None)) {
                self.0.settled.wait(&mut registry);
            }
            match registry.by_identity.get_mut(&identity) {
                Some(Some(opened)) if opened.read_only && read_only => {
                    opened.users += 1;
                    return Ok(opened.handle.clone());
                }
                Some(_) => return Err(OpenError::InUse { identity }),
                // Taken before the store is asked: a store that hangs must hold up nobody but who wants it.
                None => registry.by_identity.insert(identity.clone(), None),
            };
            let next = StorageId(registry.ids.len() as u32);
            let id = *registry.ids.entry(identity.clone()).or_insert(next);
            (id, self.0.shards[id.0 as usize % self.0.shards.len()].clone())
        };
        let opened = self.open_on(id, shard, spec, options, &identity);
        let mut registry = self.0.registry.lock();
        self.0.settled.notify_all();
        match opened {
            Ok(handle) => {
                registry.by_identity.insert(identity, Some(Opened { handle: handle.clone(), read_only, users: 1 }));
                Ok(handle)
            }
            Err(error) => {
                registry.by_identity.remove(&identity);
                Err(error)
            }
        }
    }

    fn open_on(
        &self,
        id: StorageId,
        shard: ShardHandle,
        spec: &StoreSpec,
        options: StoreOptions,
        identity: &str,
    ) -> Result<StorageHandle, OpenError> {
        // Whatever is below is shared by all who stand on it, so nobody writes to it.
        let below = match spec.below() {
            Some(below) => Some(self.open(below, StoreOptions { read_only: true, ..options.clone() })?),
            None => None,
        };
        let counters = Arc::new(StorageCounters::default());
        let starting = Starting {
            id,
            shared: Arc::clone(&self.0.shared),
            spec: spec.clone(),
            options,
            counters: Arc::clone(&counters),
            identity: identity.to_owned(),
            below: below.clone(),
        };
        let started = shard.call(move |shard| start(shard, starting)).wait();
        let started = started.map_err(OpenError::from).and_then(|started| started.map_err(OpenError::from));
        let Started { info, ssd, map } = match (started, &below) {
            (Ok(started), _) => started,
            (Err(error), Some(below)) => {
                self.close(below, Closing { drain: Duration::ZERO, parted: false });
                return Err(error);
            }
            (Err(error), None) => return Err(error),
        };
        let pages = PageRange::covering(0, info.size_bytes).count;
        Ok(StorageHandle(Arc::new(HandleInner {
            id,
            identity: identity.to_owned(),
            info: Mutex::new(info),
            pages: std::sync::atomic::AtomicU64::new(pages),
            shard,
            counters,
            ssd,
            below,
            map,
            pump: AtomicBool::new(false),
        })))
    }

    /// Gives a storage back; the last one who does closes the store. Guest requests on it must have ended.
    /// Returns whether this was the last.
    pub fn close(&self, handle: &StorageHandle, closing: Closing) -> bool {
        !self.close_chain(handle, closing).is_empty()
    }

    /// [`Cache::close`], with what the storage stands on. Returns the storages that are closed now.
    pub fn close_chain(&self, handle: &StorageHandle, closing: Closing) -> Vec<StorageId> {
        let (mut closed, mut next) = (Vec::new(), Some(handle));
        while let Some(handle) = next.filter(|handle| self.close_one(handle, closing)) {
            closed.push(handle.id());
            next = handle.below();
        }
        closed
    }

    fn close_one(&self, handle: &StorageHandle, closing: Closing) -> bool {
        match self.0.registry.lock().by_identity.get_mut(handle.identity()) {
            Some(Some(opened)) if opened.users > 1 => {
                opened.users -= 1;
                return false;
            }
            Some(entry @ Some(_)) => *entry = None,
            _ => return false,
        }
        let id = handle.id();
        let done = handle.0.shard.call(move |_| async move {
            if let Some(storage) = local(id) {
                storage.drain_destage(Instant::now() + closing.drain).await;
                storage.close(closing.parted).await;
            }
        });
        if done.wait().is_err() {
            tracing::warn!(store = handle.identity(), "the store's shard stopped before the store was closed");
        }
        self.0.registry.lock().by_identity.remove(handle.identity());
        self.0.settled.notify_all();
        true
    }

    /// Ends everything: the SSD tier is made ready for a later start, the shards stop. Storages must be closed.
    pub fn shutdown(&self) {
        if let Some(tier) = self.0.shared.ssd()
            && let Err(error) = tier.close()
        {
            tracing::error!(%error, "SSD tier not closed cleanly; it will start empty");
        }
        for shard in &self.0.shards {
            shard.shutdown();
        }
    }

    /// Hands pages to load ahead of demand to a storage's queue. Returns the pages refused because it is full.
    pub fn prefetch(&self, handle: &StorageHandle, requests: &[PrefetchRequest]) -> u64 {
        if requests.is_empty() {
            return 0;
        }
        let refused = self.0.shared.core().push_prefetch(handle.id(), requests);
        if !handle.0.pump.swap(true, Ordering::AcqRel) {
            let (id, inner) = (handle.id(), Arc::clone(&handle.0));
            handle.0.shard.spawn(move |_| async move {
                inner.pump.store(false, Ordering::Release);
                if let Some(storage) = local(id) {
                    storage.pump_prefetch();
                }
            });
        }
        refused
    }

    /// Outcomes of prefetches since the last call, and how many were lost.
    pub fn take_outcomes(&self) -> (Vec<Outcome>, u64) {
        self.0.shared.core().take_outcomes()
    }
    pub fn accesses(&self) -> &AccessQueue {
        self.0.shared.accesses()
    }
    pub fn now(&self) -> Duration {
        self.0.shared.now()
    }
    pub fn occupancy(&self) -> Occupancy {
        let core = self.0.shared.core().occupancy();
        Occupancy { index_bytes: core.index_bytes + self.0.shared.arena().index_bytes() as u64, ..core }
    }
    pub fn prefetch_counters(&self, id: StorageId) -> PrefetchCounters {
        self.0.shared.core().prefetch_counters(id)
    }
    /// Pages of the storage that wait in its prefetch queue.
    pub fn prefetch_backlog(&self, id: StorageId) -> u64 {
        self.0.shared.core().prefetch_backlog(id)
    }
    /// Pages of the range that the RAM tier holds.
    pub fn resident_pages(&self, id: StorageId, range: PageRange) -> u64 {
        self.0.shared.core().resident_pages(id, range)
    }
    /// Pages of the range that either tier holds. Looks at no more slots than there are, which may take a second on a large
    /// SSD tier: not for an event loop.
    pub fn cached_pages(&self, handle: &StorageHandle, range: PageRange) -> u64 {
        let in_ram = self.resident_pages(handle.id(), range);
        let Some((tier, storage)) = self.0.shared.ssd().zip(handle.0.ssd) else { return in_ram };
        let alone = |block: BlockIndex, found: PageMask| match found.is_empty() {
            true => 0,
            false => found.minus(self.0.shared.core().resident_mask(handle.id(), block)).count(),
        };
        if range.count / PAGES_PER_BLOCK < tier.stats().slots {
            let blocks = range.blocks();
            return in_ram + blocks.map(|(block, mask)| alone(block, tier.lookup(storage, block) & mask)).sum::<u64>();
        }
        let mut on_ssd = 0;
        tier.each_block(storage, |block, valid| {
            let first = block.0 * PAGES_PER_BLOCK;
            let (from, to) = (range.first.max(first), range.end().min(first + PAGES_PER_BLOCK));
            on_ssd += alone(block, valid & PageMask::run(from.saturating_sub(first), to.saturating_sub(from)));
        });
        in_ram + on_ssd
    }
    /// Where a page is.
    pub fn place(&self, handle: &StorageHandle, page: u64) -> Whereabouts {
        let (block, within) = (BlockIndex(page / PAGES_PER_BLOCK), page % PAGES_PER_BLOCK);
        let tier = self.0.shared.ssd().zip(handle.0.ssd);
        let ssd = tier.is_some_and(|(tier, storage)| tier.lookup(storage, block).has(within));
        Whereabouts { ssd, ..self.0.shared.core().place(handle.id(), page) }
    }
    /// The prefetch budget of a storage.
    pub fn budget(&self, id: StorageId) -> BudgetState {
        self.0.shared.core().budget_state(id)
    }
    /// Slots in use, by storage.
    pub fn usage(&self) -> Vec<(StorageId, u64)> {
        self.0.shared.core().usage()
    }
    /// New limits for prefetch.
    pub fn set_budget(&self, budget: crate::policy::BudgetConfig) {
        self.0.shared.core().set_budget(budget);
    }
    pub fn ssd(&self) -> Option<&SsdTier> {
        self.0.shared.ssd()
    }
    pub fn ssd_stats(&self) -> Option<SsdStats> {
        self.0.shared.ssd().map(SsdTier::stats)
    }
    pub fn arena(&self) -> &Arena {
        self.0.shared.arena()
    }
    pub fn shards(&self) -> usize {
        self.0.shards.len()
    }
    /// Which engine the shards run on.
    pub fn engine(&self) -> EngineKind {
        self.0.shards[0].mode()
    }

    /// Empties the RAM tier, of one storage or of all. Returns the bytes that were valid.
    pub fn drop_ram(&self, storage: Option<&StorageHandle>) -> u64 {
        let mut core = self.0.shared.core();
        let before = core.occupancy().valid_pages;
        match storage {
            Some(handle) => core.drop_storage(handle.id()),
            None => core.drop_all(),
        }
        PageRange { first: 0, count: before - core.occupancy().valid_pages }.bytes()
    }

    /// Empties the SSD tier, of one storage or of all. Returns the bytes that were valid.
    pub fn drop_ssd(&self, storage: Option<&StorageHandle>) -> u64 {
        let Some(tier) = self.0.shared.ssd() else { return 0 };
        let before = tier.stats().valid_pages;
        match storage {
            Some(handle) => {
                if let Some(storage) = handle.0.ssd {
                    tier.drop_storage(storage);
                }
            }
            None => tier.drop_all(),
        }
        self.0.shared.core().ssd_emptied(storage.map(StorageHandle::id));
        PageRange { first: 0, count: before.saturating_sub(tier.stats().valid_pages) }.bytes()
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("shards", &self.0.shards.len()).finish_non_exhaustive()
    }
}

/// What names a store before it is opened: symbolic links to one file are one store.
fn identity(spec: &StoreSpec) -> String {
    match spec {
        StoreSpec::File(path) => {
            let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            format!("file:{}", path.display())
        }
        StoreSpec::Nbd { .. } => spec.to_string(),
        StoreSpec::Qcow2 { path, .. } => {
            let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            format!("qcow2:{}", path.display())
        }
    }
}

/// What it takes to open a store on its shard.
struct Starting {
    id: StorageId,
    shared: Arc<Shared>,
    spec: StoreSpec,
    options: StoreOptions,
    counters: Arc<StorageCounters>,
    identity: String,
    below: Option<StorageHandle>,
}

struct Started {
    info: StoreInfo,
    ssd: Option<SsdStorage>,
    map: Option<Arc<LayerMap>>,
}

/// Opens the store on its shard.
async fn start(shard: Shard, starting: Starting) -> Result<Started, StoreError> {
    let Starting { id, shared, spec, options, counters, identity, below } = starting;
    let stands_on = below.clone().zip(spec.below()).map(|(handle, spec)| stands_on(handle, spec));
    let backend = crate::backend::open(&shard, &spec, stands_on, &options).await?;
    let (info, map) = (backend.info(), backend.map());
    shared.core().add_storage(id, PageRange::covering(0, info.size_bytes).count);
    let ssd = shared.ssd().and_then(|tier| match open_ssd(tier, &identity, &info) {
        Ok(opened) => Some(opened),
        Err(error) => {
            tracing::warn!(store = identity, %error, "this store goes without the SSD tier");
            None
        }
    });
    let number = ssd.as_ref().map(|(_, storage)| *storage);
    Storage::start(shard, shared, id, backend, counters, ssd, below);
    Ok(Started { info, ssd: number, map })
}

/// A storage as what an image stands on.
fn stands_on(handle: StorageHandle, spec: &StoreSpec) -> Below {
    let path = match spec {
        StoreSpec::File(path) | StoreSpec::Qcow2 { path, .. } => Some(path.clone()),
        StoreSpec::Nbd { .. } => None,
    };
    let of = handle.clone();
    Below {
        name: handle.identity().to_owned(),
        path,
        size_bytes: handle.info().size_bytes,
        read: Box::new(move |offset, len| {
            let handle = handle.clone();
            Box::pin(async move { read_copy(&handle, offset, len).await })
        }),
        extents: Box::new(move |offset, len, most| {
            let handle = of.clone();
            Box::pin(async move { extents_of(&handle, offset, len, most).await })
        }),
    }
}

fn open_ssd(
    tier: &SsdTier,
    identity: &str,
    info: &StoreInfo,
) -> Result<(Rc<OwnedFd>, SsdStorage), Box<dyn std::error::Error>> {
    let storage = tier.storage(identity, info.version_stamp.map(ssd_stamp))?;
    let fd: OwnedFd = tier.data_fd().as_fd().try_clone_to_owned()?;
    Ok((Rc::new(fd), storage))
}

pub(crate) fn ssd_stamp(stamp: crate::backend::Stamp) -> crate::ssd::Stamp {
    crate::ssd::Stamp {
        size_bytes: stamp.size_bytes,
        // Nanoseconds since 1970 fit until 2262.
        mtime_ns: stamp.mtime_ns as i64,
        ctime_ns: stamp.ctime_ns as i64,
        inode: stamp.inode,
        device: stamp.device,
    }
}

struct HandleInner {
    id: StorageId,
    identity: String,
    info: Mutex<StoreInfo>,
    pages: std::sync::atomic::AtomicU64,
    shard: ShardHandle,
    counters: Arc<StorageCounters>,
    ssd: Option<SsdStorage>,
    below: Option<StorageHandle>,
    map: Option<Arc<LayerMap>>,
    pump: AtomicBool,
}

/// An open storage, from any thread.
#[derive(Clone)]
pub struct StorageHandle(Arc<HandleInner>);

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

    /// Asks the store for its size anew. Blocks: not for shard threads.
    ///
    /// # Errors
    /// The store cannot be asked or has shrunk.
    pub fn refresh_size(&self) -> Result<u64, OpenError> {
        let id = self.0.id;
        let asked = self.0.shard.call(move |_| async move {
            match local(id) {
                Some(storage) => storage.refresh_size().await.map(|size| (size, storage.info())),
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
