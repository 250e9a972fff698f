//! The cache as a whole: shards, tiers and the storages that share them.
//!
//! - [`Cache`]: made once; opens storages, takes prefetches, answers questions; any thread
//! - [`Shared`]: what storages on their shards share
//! - [`StorageHandle`] (`handle`): an open storage, from any thread; [`Looked`]: what became of its file
//! - `opening`: a store and its part of the SSD tier, on its shard
//! - `registry`: which stores are open
//! - [`Resized`], [`ResizeError`] (`resize`): other sizes while in use
//! - [`DrainedTier`] (`service`): the SSD tier is taken out of service, and another comes into it

mod handle;
mod opening;
mod registry;
mod resize;
mod service;

pub use handle::{Looked, StorageHandle};
pub(crate) use opening::{forget, seal, ssd_stamp};
pub use resize::{ResizeError, Resized};
pub use service::DrainedTier;

use crate::access::AccessQueue;
use crate::arena::{Arena, HugePages};
use crate::backend::{StoreError, StoreOptions, StoreSpec};
use crate::counters::StorageCounters;
use crate::disk::local;
use crate::engine::{EngineKind, EngineMode, ShardConfig, ShardGone, ShardHandle};
use crate::keeper::{self, Keeper, Unsettled};
use crate::policy::{
    BudgetState, Core, CoreConfig, Occupancy, Outcome, PrefetchCounters, PrefetchRequest, Whereabouts,
};
use crate::ssd::{SsdError, SsdStats, SsdStorage, SsdTier};
use crate::types::{BLOCK_BYTES, BlockIndex, PAGES_PER_BLOCK, PageMask, PageRange, StorageId};
use handle::HandleInner;
use opening::{Started, Starting, identity, start};
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use registry::{Opened, Registry, settle};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    ssd: RwLock<Option<SsdTier>>,
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
    /// The SSD tier that is in use now.
    pub(crate) fn ssd(&self) -> Option<SsdTier> {
        self.ssd.read().clone()
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

/// RAM and SSD tiers, the shards that serve them, and the storages in front of which they stand.
#[derive(Clone)]
pub struct Cache(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    shards: Vec<ShardHandle>,
    registry: Arc<Mutex<Registry>>,
    /// Keeps the SSD tier fit to survive a crash.
    keeper: Mutex<Option<Keeper>>,
    /// A storage has been opened or closed.
    settled: Condvar,
    /// Counts how often another SSD tier, or none, came into use.
    tiers_changed: AtomicU64,
    /// One change of the RAM tier's size at a time.
    resizing: Mutex<()>,
    /// One at a time takes an SSD tier out of service or into it.
    serving: Mutex<()>,
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
            ssd: RwLock::new(ssd),
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
        let registry = Arc::new(Mutex::new(Registry::default()));
        let keeper = shared.ssd().map(|tier| keep(tier, &registry)).transpose()?;
        let inner = Inner {
            shared,
            shards,
            registry,
            keeper: Mutex::new(keeper),
            settled: Condvar::new(),
            tiers_changed: AtomicU64::new(0),
            resizing: Mutex::default(),
            serving: Mutex::default(),
        };
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
        let tiers = self.0.tiers_changed.load(Ordering::Acquire);
        let opened = self.open_on(id, shard, spec, options, &identity);
        let mut registry = self.0.registry.lock();
        self.0.settled.notify_all();
        match opened {
            Ok(handle) => {
                registry.by_identity.insert(identity, Some(Opened { handle: handle.clone(), read_only, users: 1 }));
                drop(registry);
                if self.0.tiers_changed.load(Ordering::Acquire) != tiers {
                    self.bring_into_line(&handle);
                }
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
            ssd: Mutex::new(ssd),
            below,
            map,
            joining: Mutex::default(),
            pump: AtomicBool::new(false),
            astray: Mutex::default(),
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
        // Whoever still has the handle must not keep a tier open that is taken out of service.
        handle.0.ssd.lock().take();
        self.0.registry.lock().by_identity.remove(handle.identity());
        self.0.settled.notify_all();
        true
    }

    /// Writes down what the SSD tier holds, as is done every few seconds, but for what stores would have to flush before: its
    /// end has little to write then. Blocks for as long as the device takes, and for a checkpoint that is under way.
    pub fn checkpoint(&self) {
        if let Some(tier) = self.0.shared.ssd() {
            let unsettled = |unflushed: &[SsdStorage]| {
                let all = unflushed.to_vec();
                Box::new(move || all) as Unsettled
            };
            keeper::checkpoint(&tier, &unsettled, || false);
        }
    }

    /// Ends everything: the SSD tier is made ready for a later start, the shards stop. Storages must be closed.
    pub fn shutdown(&self) {
        self.end(SsdTier::close);
    }

    /// [`Cache::shutdown`] for a successor that starts at once, while guests wait, see [`SsdTier::close_quickly`].
    pub fn shutdown_quickly(&self) {
        self.end(SsdTier::close_quickly);
    }

    fn end(&self, close: impl FnOnce(&SsdTier) -> Result<(), SsdError>) {
        drop(self.0.keeper.lock().take());
        if let Some(tier) = self.ssd()
            && let Err(error) = close(&tier)
        {
            tracing::error!(%error, "SSD tier not closed cleanly; the next start has what its last checkpoint vouches for");
        }
        for shard in &self.0.shards {
            shard.shutdown();
        }
        self.let_go();
        // Only shards read and fill slots.
        if let Err(error) = self.0.shared.arena().vacate() {
            tracing::warn!(%error, "the RAM tier's memory is not given back before the process ends");
        }
    }

    /// Lets another process open the SSD tier, which is closed. A successor that could not open it would serve writes that the
    /// tier does not know of. What a shard that has not ended still writes there lands in slots whose checksum it then fails.
    pub fn let_go(&self) {
        if let Some(tier) = self.ssd() {
            tier.let_go();
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
        let Some((tier, storage)) = handle.ssd() else { return in_ram };
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
        let ssd = handle.ssd().is_some_and(|(tier, storage)| tier.lookup(storage, block).has(within));
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
    /// The SSD tier that is in use now.
    pub fn ssd(&self) -> Option<SsdTier> {
        self.0.shared.ssd()
    }
    pub fn ssd_stats(&self) -> Option<SsdStats> {
        self.ssd().map(|tier| tier.stats())
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
        let Some(tier) = self.ssd() else { return 0 };
        let before = tier.stats().valid_pages;
        match storage {
            Some(handle) => {
                if let Some((tier, storage)) = handle.ssd() {
                    tier.drop_storage(storage);
                }
            }
            None => tier.drop_all(),
        }
        self.0.shared.core().ssd_emptied(storage.map(StorageHandle::id));
        PageRange { first: 0, count: before.saturating_sub(tier.stats().valid_pages) }.bytes()
    }
}

/// Starts the threads that keep a tier.
fn keep(tier: SsdTier, registry: &Arc<Mutex<Registry>>) -> io::Result<Keeper> {
    let open = Arc::clone(registry);
    Keeper::start(tier, move |unflushed| settle(&open, unflushed))
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("shards", &self.0.shards.len()).finish_non_exhaustive()
    }
}
