//! The policy core: what is cached where, what leaves, what is prefetched. Sans-I/O and deterministic: events come in,
//! decisions go out, time is an argument. The engine runs it on real devices, a replay on a recorded trace, and the
//! property tests on random schedules.
//!
//! - [`Core`]: the index and every decision about the RAM tier
//! - [`Eviction`]: S3-FIFO with a probation place for prefetched blocks, or plain LRU (`evict.rs`)
//! - reads and fills (`read.rs`), writes (`write.rs`), prefetch (`prefetch.rs`)
//! - growing and shrinking while in use (`resize.rs`)
//! - [`PrefetchQueue`], [`Budget`]: what waits, and how much may be under way
//! - [`Whereabouts`], [`BudgetState`]: answers to an operator's questions (`whereabouts.rs`)
//!
//! A block's life: pages are *filling* while the store or the SSD tier reads them, then *valid*. A page that a write
//! overtakes while it is filling is *cancelled*: the reader that asked gets the bytes, the cache does not keep them.
//! Pages that came by prefetch and nobody has read are *unused*; a block that has only such pages is on probation.

mod budget;
mod evict;
mod ghost;
mod list;
mod prefetch;
mod queue;
mod read;
mod resize;
mod whereabouts;
mod write;

#[cfg(test)]
mod tests;

pub use budget::{Budget, BudgetConfig};
pub use evict::Eviction;
pub use prefetch::{Outcome, OutcomeKind, PrefetchIo, PrefetchStep};
pub use queue::{MAX_REQUEST_PAGES, PrefetchQueue, PrefetchRequest};
pub use read::{BlockPlan, HIT_BLOCKS};
pub use resize::ShrinkStep;
pub use whereabouts::{BudgetState, Whereabouts};
pub use write::{WriteEnd, WriteId};

use crate::types::{BlockIndex, PAGES_PER_BLOCK, PageMask, PageRange, StorageId, fit_block_pages};
use ghost::Ghost;
use hashbrown::HashTable;
use list::{Link, List};
use rustc_hash::FxHasher;
use slab::Slab;
use std::collections::VecDeque;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

/// Tells which slots are being read or filled right now and must stay.
pub trait SlotGuard: Send + Sync {
    fn busy(&self, slot: u32) -> bool;
}

impl SlotGuard for crate::arena::Arena {
    fn busy(&self, slot: u32) -> bool {
        crate::arena::Arena::busy(self, slot)
    }
}

/// Settings of the policy.
#[derive(Clone, Copy, Debug)]
pub struct CoreConfig {
    /// Slots of the RAM tier.
    pub slots: u32,
    /// Pages in a slot: 16 in the engine, whose arena and SSD tier have 64 KiB blocks. A driver without memory of its
    /// own may choose another size, see [`fit_block_pages`].
    pub block_pages: u64,
    pub eviction: Eviction,
    /// Whether a write is a use, as a read is, and brings every page that it touches into the tier. For replays only: a
    /// page that was written in part counts as cached although nobody has read the rest of it, and the engine leaves
    /// blocks that are not resident to the store.
    pub write_allocate: bool,
    /// Share of the slots that prefetched and not yet used blocks may take at least; it grows while such blocks leave
    /// before they are used, and shrinks back while what is in use leaves too early.
    pub probation_share: f64,
    /// A prefetched block that nobody used for so long is the first to leave.
    pub probation_age: Duration,
    /// Prefetch budget of each store.
    pub budget: BudgetConfig,
    /// Pages that may wait for budget, for each storage.
    pub queue_pages: u64,
    /// Whether there is an SSD tier for used blocks to go to.
    pub destage: bool,
}

impl CoreConfig {
    pub fn with_slots(slots: u32) -> CoreConfig {
        CoreConfig {
            slots,
            block_pages: PAGES_PER_BLOCK,
            eviction: Eviction::S3Fifo,
            write_allocate: false,
            // Half: a boot's set must fit before the guest asks, and what is in use must keep the other half.
            probation_share: 0.5,
            probation_age: Duration::from_secs(120),
            budget: BudgetConfig::default(),
            // 1 GiB of pages: bounds the queue's memory at some 20 MiB a storage in the worst case.
            queue_pages: 1 << 18,
            destage: false,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Place {
    #[default]
    Free,
    Probation,
    Small,
    Main,
}

/// Storage in the upper 16 bits, block in the lower 48.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key(u64);

impl Key {
    const BLOCK_BITS: u32 = 48;
    /// Of no block: what has it is never resident.
    const NOWHERE: Key = Key(u64::MAX);

    /// Blocks of the 65,536th storage of a process and later ones, and those beyond 16 EiB, have no key and are not cached.
    fn new(storage: StorageId, block: BlockIndex) -> Key {
        if storage.0 >= u32::from(u16::MAX) || block.0 >> Key::BLOCK_BITS != 0 {
            return Key::NOWHERE;
        }
        Key(u64::from(storage.0) << Key::BLOCK_BITS | block.0)
    }

    fn storage(self) -> StorageId {
        StorageId((self.0 >> Key::BLOCK_BITS) as u32)
    }

    fn block(self) -> BlockIndex {
        BlockIndex(self.0 & ((1 << Key::BLOCK_BITS) - 1))
    }

    fn hash64(self) -> u64 {
        let mut hasher = FxHasher::default();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// One slot of the RAM tier: half a cache line. With its link, its places in the tables and the arena's counters less than 64
/// bytes a block, whatever the number of slots.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
struct Entry {
    key: Key,
    /// Bumped by every write that touches the block, so that a copy made for the SSD tier can be told stale.
    version: u32,
    /// When the block entered probation, in tenths of a second.
    entered_ds: u32,
    valid: PageMask,
    filling: PageMask,
    cancelled: PageMask,
    unused: PageMask,
    /// Pages of this block that the SSD tier holds.
    on_ssd: PageMask,
    place: Place,
    frequency: u8,
    tag: u8,
    /// Probability of use that it was prefetched with, in 255ths.
    likely: u8,
    destage_queued: bool,
}

impl Entry {
    const BLANK: Entry = Entry {
        key: Key::NOWHERE,
        version: 0,
        entered_ds: 0,
        valid: PageMask::NONE,
        filling: PageMask::NONE,
        cancelled: PageMask::NONE,
        unused: PageMask::NONE,
        on_ssd: PageMask::NONE,
        place: Place::Free,
        frequency: 0,
        tag: 0,
        likely: 0,
        destage_queued: false,
    };
}

/// Prefetch bookkeeping of one storage, in pages unless said.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct PrefetchCounters {
    pub issued: u64,
    pub completed: u64,
    pub used: u64,
    /// Of the used ones, those that demand had to wait for.
    pub late: u64,
    pub evicted_unused: u64,
    /// Overtaken by demand, overwritten, or refused by a full queue before they were issued.
    pub cancelled: u64,
}

struct Storage {
    pages: u64,
    writes: Slab<write::InFlight>,
    queue: PrefetchQueue,
    budget: Budget,
    counters: PrefetchCounters,
    /// Blocks to write to the SSD tier, oldest first, with the time they were queued.
    destage: VecDeque<(u32, BlockIndex, Duration)>,
}

/// Occupancy of the RAM tier.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Occupancy {
    pub slots: u32,
    pub used_slots: u32,
    pub probation_slots: u32,
    pub small_slots: u32,
    pub main_slots: u32,
    pub valid_pages: u64,
    /// Blocks that were given a slot, and blocks that lost theirs to another, since the start.
    pub insertions: u64,
    pub evictions: u64,
    /// Memory of the index itself, bytes: of the core alone, or of all that the RAM tier keeps beside its blocks.
    pub index_bytes: u64,
}

/// The index of the RAM tier and every decision about it.
///
/// A driver without real I/O settles each step as it takes it. A request first uses what is resident and only then makes
/// room for what is not, or it might evict its own pages:
///
/// ```
/// use prestage_cache::policy::{Core, CoreConfig, Eviction, SlotGuard};
/// use prestage_cache::types::{PageRange, StorageId};
/// use std::{sync::Arc, time::Duration};
///
/// /// Nothing is under way between two calls.
/// struct Idle;
/// impl SlotGuard for Idle {
///     fn busy(&self, _: u32) -> bool {
///         false
///     }
/// }
///
/// /// Reads pages; returns how many of them were cached.
/// fn read(core: &mut Core, disk: StorageId, range: PageRange, now: Duration) -> u64 {
///     let mut hits = 0;
///     for resident in [true, false] {
///         for (block, wanted) in range.blocks_of(core.block_pages()) {
///             if core.valid(disk, block).is_some() != resident {
///                 continue;
///             }
///             let plan = core.plan_read(disk, block, wanted, now);
///             hits += plan.hit.count();
///             if let Some(slot) = plan.slot {
///                 core.finish_fill(slot, plan.fill, true);
///             }
///         }
///     }
///     hits
/// }
///
/// let config = CoreConfig { block_pages: 1, eviction: Eviction::Lru, ..CoreConfig::with_slots(4) };
/// let (mut core, disk) = (Core::new(config, Arc::new(Idle)), StorageId(0));
/// core.add_storage(disk, 1 << 20);
/// assert_eq!(read(&mut core, disk, PageRange { first: 10, count: 4 }, Duration::ZERO), 0);
/// // Page 10 is the oldest and the tier is full: page 9 takes the place of another one.
/// assert_eq!(read(&mut core, disk, PageRange { first: 9, count: 2 }, Duration::ZERO), 1);
/// ```
pub struct Core {
    config: CoreConfig,
    guard: Arc<dyn SlotGuard>,
    table: HashTable<u32>,
    entries: Vec<Entry>,
    links: Vec<Link>,
    free: List,
    probation: List,
    small: List,
    main: List,
    ghost: Ghost,
    /// Blocks that left probation unused.
    lapsed: Ghost,
    /// Share of the slots that probation may take now.
    probation_share: f64,
    valid_pages: u64,
    insertions: u64,
    evictions: u64,
    storages: Vec<Option<Storage>>,
    outcomes: Vec<Outcome>,
    outcomes_dropped: u64,
}

impl Core {
    pub fn new(config: CoreConfig, guard: Arc<dyn SlotGuard>) -> Core {
        let config = CoreConfig { block_pages: fit_block_pages(config.block_pages), ..config };
        let slots = config.slots as usize;
        let (mut links, mut free) = (vec![Link::default(); slots], List::default());
        // Taken from the head: slot 0 first, so that a half-empty tier touches only the front of the arena.
        (0..config.slots).rev().for_each(|slot| free.push_head(&mut links, slot));
        Core {
            config,
            guard,
            table: HashTable::with_capacity(slots),
            entries: vec![Entry::BLANK; slots],
            links,
            free,
            probation: List::default(),
            small: List::default(),
            main: List::default(),
            ghost: Ghost::new(config.slots),
            lapsed: Ghost::new(config.slots),
            probation_share: evict::MAX_SHARE,
            valid_pages: 0,
            insertions: 0,
            evictions: 0,
            storages: Vec::new(),
            outcomes: Vec::new(),
            outcomes_dropped: 0,
        }
    }

    /// Pages in a slot, and in a block of every mask and [`BlockIndex`] of this core.
    pub fn block_pages(&self) -> u64 {
        self.config.block_pages
    }

    /// Makes a storage known, or takes note of its new size.
    pub fn add_storage(&mut self, id: StorageId, pages: u64) {
        let at = id.0 as usize;
        if self.storages.len() <= at {
            self.storages.resize_with(at + 1, || None);
        }
        match &mut self.storages[at] {
            Some(storage) => storage.pages = pages,
            none => {
                *none = Some(Storage {
                    pages,
                    writes: Slab::new(),
                    queue: PrefetchQueue::new(self.config.queue_pages),
                    budget: Budget::new(self.config.budget),
                    counters: PrefetchCounters::default(),
                    destage: VecDeque::new(),
                });
            }
        }
    }

    /// Forgets a storage and every block of it that nothing is using. The caller has ended its I/O.
    pub fn remove_storage(&mut self, id: StorageId) {
        self.drop_storage(id);
        if let Some(storage) = self.storages.get_mut(id.0 as usize) {
            *storage = None;
        }
    }

    fn storage(&mut self, id: StorageId) -> Option<&mut Storage> {
        self.storages.get_mut(id.0 as usize)?.as_mut()
    }

    pub fn prefetch_counters(&self, id: StorageId) -> PrefetchCounters {
        self.storages.get(id.0 as usize).and_then(Option::as_ref).map(|s| s.counters).unwrap_or_default()
    }

    pub fn occupancy(&self) -> Occupancy {
        Occupancy {
            slots: self.config.slots,
            used_slots: self.probation.len() + self.small.len() + self.main.len(),
            probation_slots: self.probation.len(),
            small_slots: self.small.len(),
            main_slots: self.main.len(),
            valid_pages: self.valid_pages,
            insertions: self.insertions,
            evictions: self.evictions,
            index_bytes: (self.entries.len() * (size_of::<Entry>() + size_of::<Link>())
                + self.table.allocation_size()
                + self.ghost.memory_bytes()
                + self.lapsed.memory_bytes()) as u64,
        }
    }

    /// Slots in use, by storage.
    pub fn usage(&self) -> Vec<(StorageId, u64)> {
        let mut by_storage = std::collections::BTreeMap::<StorageId, u64>::new();
        for entry in self.entries.iter().filter(|entry| entry.place != Place::Free) {
            *by_storage.entry(entry.key.storage()).or_default() += 1;
        }
        by_storage.into_iter().collect()
    }

    /// New limits for the prefetch of every store, known and to come.
    pub fn set_budget(&mut self, budget: BudgetConfig) {
        self.config.budget = budget;
        for storage in self.storages.iter_mut().flatten() {
            storage.budget.configure(budget);
        }
    }

    /// Pages of `range` that the RAM tier holds. Looks at no more slots than there are, however long the range.
    pub fn resident_pages(&self, storage: StorageId, range: PageRange) -> u64 {
        let block_pages = self.config.block_pages;
        if range.count / block_pages < u64::from(self.config.slots) {
            let blocks = range.blocks_of(block_pages).filter_map(|(block, mask)| {
                let slot = self.find(Key::new(storage, block))?;
                Some((self.entries[slot as usize].valid & mask).count())
            });
            return blocks.sum();
        }
        let ours = self.entries.iter().filter(|entry| entry.place != Place::Free && entry.key.storage() == storage);
        ours.map(|entry| {
            let first = entry.key.block().0 * block_pages;
            (first..first + block_pages)
                .filter(|page| (range.first..range.end()).contains(page) && entry.valid.has(page - first))
                .count() as u64
        })
        .sum()
    }

    /// Empties the RAM tier of one storage's blocks, or of all, and its prefetch queue with it. Blocks that are being
    /// read or filled at this moment stay until that is done, without valid pages.
    pub fn drop_storage(&mut self, id: StorageId) {
        self.drop_where(|key| key.storage() == id);
        if let Some(storage) = self.storage(id) {
            storage.counters.cancelled += storage.queue.clear();
        }
    }

    /// [`Core::drop_storage`] for every storage.
    pub fn drop_all(&mut self) {
        self.drop_where(|_| true);
        for storage in self.storages.iter_mut().flatten() {
            storage.counters.cancelled += storage.queue.clear();
        }
        self.ghost = Ghost::new(self.config.slots);
        self.lapsed = Ghost::new(self.config.slots);
    }

    fn drop_where(&mut self, selects: impl Fn(Key) -> bool) {
        for slot in 0..self.slots_now() {
            let entry = &self.entries[slot as usize];
            if entry.place != Place::Free && selects(entry.key) {
                let (valid, filling) = (entry.valid, entry.filling);
                self.invalidate(slot, valid | filling);
            }
        }
    }

    /// Takes the outcomes of prefetches since the last call, and how many were lost because nobody asked for long.
    pub fn take_outcomes(&mut self) -> (Vec<Outcome>, u64) {
        (std::mem::take(&mut self.outcomes), std::mem::take(&mut self.outcomes_dropped))
    }

    fn find(&self, key: Key) -> Option<u32> {
        self.table.find(key.hash64(), |slot| self.entries[*slot as usize].key == key).copied()
    }

    /// Makes pages of a slot invalid; pages that are filling are cancelled. Frees the slot if nothing is left of it.
    fn invalidate(&mut self, slot: u32, mask: PageMask) {
        let entry = &mut self.entries[slot as usize];
        entry.version = entry.version.wrapping_add(1);
        entry.cancelled |= entry.filling & mask;
        let gone = entry.valid & mask;
        entry.valid = entry.valid.minus(mask);
        let unused = entry.unused & mask;
        entry.unused = entry.unused.minus(mask);
        self.valid_pages -= gone.count();
        self.report(slot, unused, OutcomeKind::Evicted);
        self.free_if_empty(slot);
    }

    fn free_if_empty(&mut self, slot: u32) {
        let entry = &self.entries[slot as usize];
        if entry.place != Place::Free && entry.valid.is_empty() && entry.filling.is_empty() && !self.guard.busy(slot) {
            self.release(slot);
        }
    }

    /// Unlinks a slot and makes it free. Its pages must be accounted for already.
    fn release(&mut self, slot: u32) {
        self.unlink(slot);
        let key = self.entries[slot as usize].key;
        if let Ok(found) = self.table.find_entry(key.hash64(), |s| *s == slot) {
            found.remove();
        }
        let entry = &mut self.entries[slot as usize];
        entry.place = Place::Free;
        entry.destage_queued = false;
        if slot < self.config.slots {
            self.free.push_head(&mut self.links, slot);
        } else {
            self.links[slot as usize] = Link::WITHDRAWN;
        }
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("occupancy", &self.occupancy()).finish_non_exhaustive()
    }
}
