//! The SSD tier against a slow and obvious model, on random operations: inserts and reads that stay open while others
//! come, invalidations in between, failures, changed stores, reopening with the same or another size.
//!
//! The model keeps the current version of every page of every store, and what was written to every slot. What the tier
//! hands out must always be the current version.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

use prestage_cache::ssd::{
    Clock, Found, Outcome, SlotRead, SlotWrite, SsdOptions, SsdStorage, SsdTier, Stamp, Step as Progress,
};
use prestage_cache::types::{BlockIndex, PageMask};
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const STORAGES: usize = 3;
const BLOCKS: u64 = 5;
const PAGES: u64 = 16;

type Key = (usize, u64);
type Versions = [u64; 16];

#[derive(Clone, Debug)]
enum Step {
    BeginInsert { storage: usize, block: u64, mask: u16 },
    FinishInsert { which: usize, ok: bool },
    CancelInsert { which: usize },
    BeginRead { storage: usize, block: u64 },
    EndRead { which: usize, outcome: Option<Outcome> },
    Write { storage: usize, page: u64, pages: u64 },
    ChangeUnwatched { storage: usize },
    Release { storage: usize },
    DropStorage { storage: usize },
    DropAll,
    Reopen { slots: u64, quickly: bool },
    Checkpoint { flushed: bool },
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let storage = || 0..STORAGES;
    let mask = prop_oneof![3 => Just(u16::MAX), 3 => any::<u16>(), 1 => Just(0)];
    let outcome = prop_oneof![
        6 => Just(Some(Outcome::Good)),
        1 => Just(Some(Outcome::BadChecksum)),
        1 => Just(Some(Outcome::IoError)),
        1 => Just(None),
    ];
    let pages = prop_oneof![6 => 0..4u64, 3 => 0..40u64, 1 => Just(u64::MAX), 1 => Just(1u64 << 40)];
    let step = prop_oneof![
        12 => (storage(), 0..BLOCKS, mask).prop_map(|(storage, block, mask)| Step::BeginInsert { storage, block, mask }),
        12 => (any::<usize>(), prop::bool::weighted(0.93)).prop_map(|(which, ok)| Step::FinishInsert { which, ok }),
        1 => any::<usize>().prop_map(|which| Step::CancelInsert { which }),
        8 => (storage(), 0..BLOCKS).prop_map(|(storage, block)| Step::BeginRead { storage, block }),
        8 => (any::<usize>(), outcome).prop_map(|(which, outcome)| Step::EndRead { which, outcome }),
        8 => (storage(), 0..BLOCKS * PAGES, pages).prop_map(|(storage, page, pages)| Step::Write { storage, page, pages }),
        1 => storage().prop_map(|storage| Step::ChangeUnwatched { storage }),
        1 => storage().prop_map(|storage| Step::Release { storage }),
        1 => storage().prop_map(|storage| Step::DropStorage { storage }),
        1 => Just(Step::DropAll),
        3 => (3..10u64, any::<bool>()).prop_map(|(slots, quickly)| Step::Reopen { slots, quickly }),
        4 => any::<bool>().prop_map(|flushed| Step::Checkpoint { flushed }),
        2 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..120)
}

/// How a run ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Close,
    CloseQuickly,
    Crash,
}

struct Live {
    slot: u32,
    mask: PageMask,
    readers: u32,
}

struct Writing {
    guard: SlotWrite,
    key: Key,
    versions: Versions,
    aborted: bool,
}

struct Reading {
    guard: SlotRead,
    key: Key,
    /// What the slot held when the read began; it must not change before it ends.
    held: Versions,
}

struct World {
    _dir: tempfile::TempDir,
    path: PathBuf,
    slots: u64,
    tier: SsdTier,
    handles: Vec<SsdStorage>,
    stamps: Vec<Stamp>,
    store: HashMap<Key, Versions>,
    version: u64,
    /// What was last written to each slot.
    slab: HashMap<u32, Versions>,
    live: HashMap<Key, Live>,
    /// Out of the index with reads under way.
    leaving: HashMap<u32, (u32, bool)>,
    retired: Vec<u32>,
    writing: Vec<Writing>,
    reading: Vec<Reading>,
    overtaken: u64,
}

fn slab_bytes(slots: u64) -> u64 {
    (4 << 20) + (256 << 10) + slots * 65536
}

fn open(path: &Path, slots: u64) -> (SsdTier, Found) {
    // Each look at the clock is an hour later: a back-off is always over.
    let ticks = AtomicU64::new(0);
    let clock: Clock = Arc::new(move || Duration::from_secs(3600 * ticks.fetch_add(1, Ordering::Relaxed)));
    let options = SsdOptions { preallocate: false, clock, ..SsdOptions::default() };
    let (tier, report) = SsdTier::open_with(path, slab_bytes(slots), options).unwrap();
    assert_eq!((report.slots, report.damaged_records), (slots, 0));
    (tier, report.found)
}

fn name(storage: usize) -> String {
    format!("file:/store/{storage}.img")
}

fn sum(versions: &Versions, mask: PageMask) -> u32 {
    (0..16).filter(|p| mask.has(*p)).fold(1, |h: u32, p| h.wrapping_mul(31).wrapping_add(versions[p as usize] as u32))
}

impl World {
    fn new(slots: u64) -> World {
        // In memory where there is a place for it: thousands of openings, each with its syncs.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let path = dir.path().join("slab");
        let (tier, found) = open(&path, slots);
        assert_eq!(found, Found::Created);
        let stamps = vec![Stamp::default(); STORAGES];
        let handles = (0..STORAGES).map(|s| tier.storage(&name(s), Some(stamps[s])).unwrap()).collect();
        World {
            _dir: dir,
            path,
            slots,
            tier,
            handles,
            stamps,
            store: HashMap::new(),
            version: 0,
            slab: HashMap::new(),
            live: HashMap::new(),
            leaving: HashMap::new(),
            retired: Vec::new(),
            writing: Vec::new(),
            reading: Vec::new(),
            overtaken: 0,
        }
    }

    fn current(&self, key: Key) -> Versions {
        self.store.get(&key).copied().unwrap_or_default()
    }

    fn lose(&mut self, key: Key) {
        let Some(live) = self.live.remove(&key) else { return };
        if live.readers > 0 {
            self.leaving.insert(live.slot, (live.readers, false));
        }
    }

    fn lose_storage(&mut self, storage: usize) {
        (0..BLOCKS).for_each(|block| self.lose((storage, block)));
        self.writing.iter_mut().filter(|w| w.key.0 == storage).for_each(|w| w.aborted = true);
    }

    fn begin_insert(&mut self, key: Key, mask: PageMask) {
        let free = self.slots as usize - self.live.len() - self.leaving.len() - self.retired.len() - self.writing.len();
        let wanted = !mask.is_empty()
            && !self.live.get(&key).is_some_and(|l| l.mask.contains(mask))
            && !self.writing.iter().any(|w| w.key == key);
        let room = free > 0 || self.live.values().any(|l| l.readers == 0);
        let evictions = self.tier.stats().evictions;
        let guard = self.tier.begin_insert(self.handles[key.0], BlockIndex(key.1), mask);
        assert_eq!(guard.is_some(), wanted && room, "{key:?} {mask:?}, {free} free");
        let Some(guard) = guard else { return };
        if free == 0 {
            assert_eq!(self.tier.stats().evictions, evictions + 1);
            let victim =
                *self.live.iter().find(|(_, l)| l.slot == guard.slot()).expect("the victim's slot is reused").0;
            assert_eq!(self.live[&victim].readers, 0, "a slot being read is not reused");
            self.live.remove(&victim);
        } else {
            assert_eq!(self.tier.stats().evictions, evictions, "nothing leaves while there is room");
        }
        let slot = guard.slot();
        assert!(self.live.values().all(|l| l.slot != slot) && self.writing.iter().all(|w| w.guard.slot() != slot));
        assert!(!self.leaving.contains_key(&slot) && !self.retired.contains(&slot));
        let versions = self.current(key);
        // The device may write at any time from now on.
        self.slab.insert(slot, versions);
        self.writing.push(Writing { guard, key, versions, aborted: false });
    }

    fn finish_insert(&mut self, which: usize, ok: bool) {
        if self.writing.is_empty() {
            return;
        }
        let writing = self.writing.swap_remove(which % self.writing.len());
        let (slot, mask) = (writing.guard.slot(), writing.guard.mask());
        let visible = self.tier.finish_insert(writing.guard, sum(&writing.versions, mask), ok);
        assert_eq!(visible, ok && !writing.aborted);
        if !ok {
            self.retired.push(slot);
        }
        if visible {
            self.lose(writing.key);
            self.live.insert(writing.key, Live { slot, mask, readers: 0 });
        }
    }

    fn begin_read(&mut self, key: Key) {
        let guard = self.tier.begin_read(self.handles[key.0], BlockIndex(key.1));
        assert_eq!(guard.is_some(), self.live.contains_key(&key));
        let (Some(guard), Some(live)) = (guard, self.live.get_mut(&key)) else { return };
        assert_eq!((guard.slot(), guard.mask()), (live.slot, live.mask));
        live.readers += 1;
        let held = self.slab[&guard.slot()];
        assert_eq!(guard.checksum(), sum(&held, guard.written_mask()), "the checksum is of what was written");
        self.reading.push(Reading { guard, key, held });
    }

    fn end_read(&mut self, which: usize, outcome: Option<Outcome>) {
        if self.reading.is_empty() {
            return;
        }
        let Reading { guard, key, held } = self.reading.swap_remove(which % self.reading.len());
        let slot = guard.slot();
        assert_eq!(self.slab[&slot], held, "the slot was reused under the read");
        let was_live = self.live.get(&key).is_some_and(|l| l.slot == slot);
        let expected = if was_live { self.live[&key].mask } else { PageMask::NONE };
        match outcome {
            None => drop(guard),
            Some(outcome) => {
                let valid = self.tier.end_read(guard, outcome);
                assert_eq!(valid, if outcome == Outcome::Good { expected } else { PageMask::NONE });
                let current = self.current(key);
                assert!((0..16).all(|p| !valid.has(p) || held[p as usize] == current[p as usize]), "stale page");
            }
        }
        let (bad, failed) = (!matches!(outcome, None | Some(Outcome::Good)), outcome == Some(Outcome::IoError));
        if was_live {
            self.live.get_mut(&key).unwrap().readers -= 1;
            if bad {
                let last = self.live[&key].readers == 0;
                self.lose(key);
                match self.leaving.get_mut(&slot) {
                    Some(leaving) => leaving.1 |= failed,
                    None if failed && last => self.retired.push(slot),
                    None => {}
                }
            }
        } else {
            let leaving = self.leaving.get_mut(&slot).unwrap();
            leaving.0 -= 1;
            leaving.1 |= failed;
            if leaving.0 == 0 && self.leaving.remove(&slot).unwrap().1 {
                self.retired.push(slot);
            }
        }
    }

    fn write(&mut self, storage: usize, page: u64, pages: u64) {
        let write = self.tier.begin_write(self.handles[storage], page, pages);
        while self.tier.write_intents() {}
        write.end();
        self.version += 1;
        for p in page..page.saturating_add(pages).min(BLOCKS * PAGES) {
            let (key, at) = ((storage, p / PAGES), p % PAGES);
            self.store.entry(key).or_default()[at as usize] = self.version;
            let mask = PageMask::run(at, 1);
            let hit = |w: &&mut Writing| w.key == key && w.guard.mask().has(at);
            self.writing.iter_mut().filter(hit).for_each(|w| w.aborted = true);
            if let Some(live) = self.live.get_mut(&key) {
                live.mask = live.mask.minus(mask);
                if live.mask.is_empty() {
                    self.lose(key);
                }
            }
        }
        self.stamps[storage].mtime_ns += i64::from(pages > 0);
    }

    fn release(&mut self, storage: usize) {
        self.tier.release_storage(self.handles[storage], Some(self.stamps[storage]));
        self.handles[storage] = self.tier.storage(&name(storage), Some(self.stamps[storage])).unwrap();
    }

    fn change_unwatched(&mut self, storage: usize) {
        self.tier.release_storage(self.handles[storage], Some(self.stamps[storage]));
        self.stamps[storage].mtime_ns += 1;
        self.version += 1;
        (0..BLOCKS).for_each(|b| *self.store.entry((storage, b)).or_default() = [self.version; 16]);
        let before = self.tier.stats().dropped_changed_store;
        self.handles[storage] = self.tier.storage(&name(storage), Some(self.stamps[storage])).unwrap();
        let lost = self.live.keys().filter(|k| k.0 == storage).count() as u64;
        assert_eq!(self.tier.stats().dropped_changed_store - before, lost);
        self.lose_storage(storage);
    }

    fn checkpoint(&self, flushed: bool) {
        let Some(mut checkpoint) = self.tier.begin_checkpoint() else { return };
        if !flushed {
            checkpoint.unflushed().into_iter().for_each(|s| checkpoint.not_flushed(s));
        }
        while checkpoint.step().unwrap() == Progress::More {}
        drop(checkpoint);
        if flushed {
            (0..STORAGES).for_each(|s| self.tier.set_stamp(self.handles[s], Some(self.stamps[s])));
        }
    }

    /// Closes (or not) and opens again.
    fn reopen(&mut self, slots: u64, end: End) {
        let clean = end != End::Crash;
        self.writing.clear();
        self.reading.clear();
        self.leaving.clear();
        self.retired.clear();
        if clean {
            for s in 0..STORAGES {
                self.tier.note_flushed(self.handles[s]);
                self.tier.set_stamp(self.handles[s], Some(self.stamps[s]));
            }
            if end == End::CloseQuickly { self.tier.close_quickly() } else { self.tier.close() }.unwrap();
            assert!((0..STORAGES).all(|s| self.tier.lookup(self.handles[s], BlockIndex(0)).is_empty()));
            assert!(self.tier.begin_insert(self.handles[0], BlockIndex(0), PageMask::ALL).is_none());
        }
        // The lock goes with the file.
        let spare = self._dir.path().join("spare");
        self.tier = open(&spare, 1).0;
        let (tier, found) = open(&self.path, slots);
        assert_eq!(found, if clean { Found::Clean } else { Found::Recovered });
        self.tier = tier;
        self.handles = (0..STORAGES).map(|s| self.tier.storage(&name(s), Some(self.stamps[s])).unwrap()).collect();
        self.live.iter_mut().for_each(|(_, l)| l.readers = 0);
        self.slots = slots;
        if clean {
            self.live.retain(|_, l| u64::from(l.slot) < slots);
            return;
        }
        // What is on record is not what was there last; `check` sees that it is true.
        self.live.clear();
        for key in (0..STORAGES).flat_map(|s| (0..BLOCKS).map(move |b| (s, b))) {
            let Some(read) = self.tier.begin_read(self.handles[key.0], BlockIndex(key.1)) else { continue };
            let held = self.slab.get(&read.slot()).copied().unwrap_or_default();
            let (slot, mask) = (read.slot(), read.mask());
            if sum(&held, read.written_mask()) == read.checksum() {
                self.live.insert(key, Live { slot, mask, readers: 0 });
            } else {
                assert_eq!(self.tier.end_read(read, Outcome::BadChecksum), PageMask::NONE);
                self.overtaken += 1;
            }
        }
        assert_eq!(self.tier.stats().dropped_overtaken, std::mem::take(&mut self.overtaken));
    }

    fn check(&self) {
        let mut pages = 0;
        for key in (0..STORAGES).flat_map(|s| (0..BLOCKS).map(move |b| (s, b))) {
            let expected = self.live.get(&key).map_or(PageMask::NONE, |l| l.mask);
            assert_eq!(self.tier.lookup(self.handles[key.0], BlockIndex(key.1)), expected, "{key:?}");
            if let Some(live) = self.live.get(&key) {
                let (held, current) = (self.slab[&live.slot], self.current(key));
                assert!((0..16).all(|p| !live.mask.has(p) || held[p as usize] == current[p as usize]), "stale page");
            }
            pages += expected.count();
        }
        let stats = self.tier.stats();
        assert_eq!((stats.used_slots, stats.valid_pages), (self.live.len() as u64, pages));
        assert_eq!(stats.pending_slots, self.writing.len() as u64);
        assert_eq!(stats.retired_slots, self.retired.len() as u64);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::BeginInsert { storage, block, mask } => self.begin_insert((storage, block), PageMask(mask)),
            Step::FinishInsert { which, ok } => self.finish_insert(which, ok),
            Step::CancelInsert { which } => {
                let at = which.checked_rem(self.writing.len());
                drop(at.map(|at| self.writing.swap_remove(at)));
            }
            Step::BeginRead { storage, block } => self.begin_read((storage, block)),
            Step::EndRead { which, outcome } => self.end_read(which, outcome),
            Step::Write { storage, page, pages } => self.write(storage, page, pages),
            Step::ChangeUnwatched { storage } => self.change_unwatched(storage),
            Step::Release { storage } => self.release(storage),
            Step::DropStorage { storage } => {
                self.tier.drop_storage(self.handles[storage]);
                self.lose_storage(storage);
            }
            Step::DropAll => {
                self.tier.drop_all();
                (0..STORAGES).for_each(|s| self.lose_storage(s));
            }
            Step::Reopen { slots, quickly } => self.reopen(slots, if quickly { End::CloseQuickly } else { End::Close }),
            Step::Checkpoint { flushed } => self.checkpoint(flushed),
            Step::Crash => self.reopen(self.slots, End::Crash),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_tier_holds_what_the_model_holds_and_nothing_stale(slots in 2..20u64, steps in steps()) {
        let mut world = World::new(slots);
        for step in &steps {
            world.step(step);
            world.check();
        }
    }
}
