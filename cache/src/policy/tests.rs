//! The core against a naive oracle of what a cache may never do, on random schedules of reads, writes and prefetches.

use super::*;
use crate::types::PAGES_PER_BLOCK;
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Mutex;

mod replay;

/// Pins and claims as a test sees them.
#[derive(Default)]
struct Holds(Mutex<HashMap<u32, u32>>);

impl Holds {
    fn hold(&self, slot: u32) {
        *self.0.lock().unwrap().entry(slot).or_default() += 1;
    }
    fn release(&self, slot: u32) {
        let mut held = self.0.lock().unwrap();
        let count = held.get_mut(&slot).unwrap();
        *count -= 1;
        if *count == 0 {
            held.remove(&slot);
        }
    }
}

impl SlotGuard for Holds {
    fn busy(&self, slot: u32) -> bool {
        self.0.lock().unwrap().contains_key(&slot)
    }
}

const DISK: StorageId = StorageId(0);
const PAGES: u64 = 40 * PAGES_PER_BLOCK;
const EVICTIONS: [Eviction; 2] = [Eviction::S3Fifo, Eviction::Lru];

fn core(slots: u32) -> (Core, Arc<Holds>) {
    core_of(CoreConfig::with_slots(slots))
}

fn core_of(config: CoreConfig) -> (Core, Arc<Holds>) {
    let holds = Arc::new(Holds::default());
    let mut core = Core::new(config, holds.clone());
    core.add_storage(DISK, PAGES);
    (core, holds)
}

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange { first, count }
}

fn fill_block(core: &mut Core, block: u64, mask: PageMask, now: Duration) {
    let plan = core.plan_read(DISK, BlockIndex(block), mask, now);
    core.finish_fill(plan.slot.unwrap(), plan.fill, true);
}

fn request(first: u64, count: u64) -> PrefetchRequest {
    PrefetchRequest { range: range(first, count), due: Duration::ZERO, probability: 0.9, tag: 7 }
}

fn io(step: PrefetchStep) -> PrefetchIo {
    match step {
        PrefetchStep::Io(io) => io,
        other => panic!("expected an I/O, got {other:?}"),
    }
}

fn finish(core: &mut Core, io: &PrefetchIo, ok: bool) {
    for (slot, first, count) in &io.parts {
        core.finish_fill(*slot, PageMask::run(*first, *count), ok);
    }
    core.finish_prefetch(DISK, io.pages, ok, at(1), at(5));
}

#[test]
fn a_write_that_overtakes_a_fill_keeps_old_bytes_out_of_the_cache() {
    let (mut core, _) = core(4);
    let plan = core.plan_read(DISK, BlockIndex(0), PageMask::ALL, at(0));
    let write = core.begin_write(DISK, 8192, 4096).unwrap();
    core.end_write(DISK, write, WriteEnd::Written, at(0), |_, _, _| panic!("nothing is valid yet"));
    let valid = core.finish_fill(plan.slot.unwrap(), plan.fill, true);
    assert_eq!(valid, PageMask::ALL.minus(PageMask::run(2, 1)));
    assert!(!core.read_hit(DISK, range(2, 1), at(0), |_, _| {}));
    assert!(core.read_hit(DISK, range(3, 13), at(0), |_, _| {}));
}

#[test]
fn a_fill_that_starts_under_a_write_is_not_kept() {
    let (mut core, _) = core(4);
    let write = core.begin_write(DISK, 0, 4096).unwrap();
    let plan = core.plan_read(DISK, BlockIndex(0), PageMask::run(0, 2), at(0));
    core.end_write(DISK, write, WriteEnd::Written, at(0), |_, _, _| {});
    assert_eq!(core.finish_fill(plan.slot.unwrap(), plan.fill, true), PageMask::run(1, 1));
}

#[test]
fn overlapping_writes_invalidate_instead_of_guessing_their_order() {
    let (mut core, _) = core(4);
    fill_block(&mut core, 0, PageMask::ALL, at(0));
    let first = core.begin_write(DISK, 0, 4096).unwrap();
    let second = core.begin_write(DISK, 512, 512).unwrap();
    core.end_write(DISK, second, WriteEnd::Written, at(0), |_, _, _| panic!("conflict"));
    core.end_write(DISK, first, WriteEnd::Written, at(0), |_, _, _| panic!("conflict"));
    assert!(!core.read_hit(DISK, range(0, 1), at(0), |_, _| {}));
    assert!(core.read_hit(DISK, range(1, 15), at(0), |_, _| {}));
}

#[test]
fn a_partial_write_patches_a_valid_page_and_leaves_an_invalid_one_alone() {
    let (mut core, _) = core(4);
    fill_block(&mut core, 0, PageMask::run(0, 1), at(0));
    let write = core.begin_write(DISK, 2048, 4096).unwrap();
    let mut updates = Vec::new();
    core.end_write(DISK, write, WriteEnd::Written, at(0), |block, _, mask| updates.push((block, mask)));
    assert_eq!(updates, [(BlockIndex(0), PageMask::run(0, 1))]);
    assert!(!core.read_hit(DISK, range(1, 1), at(0), |_, _| {}));
}

#[test]
fn an_unused_prefetch_leaves_before_anything_that_was_used() {
    let (mut core, _) = core(10);
    core.push_prefetch(DISK, &[request(0, 3 * PAGES_PER_BLOCK)]);
    let fetched = io(core.next_prefetch(DISK, at(0), |_| PageMask::NONE));
    assert_eq!(fetched.pages, 48);
    finish(&mut core, &fetched, true);
    for block in 10..17 {
        fill_block(&mut core, block, PageMask::ALL, at(1));
    }
    // The tier is full; after their time the three guesses make room.
    for block in 20..23 {
        fill_block(&mut core, block, PageMask::ALL, at(200_000));
    }
    let counters = core.prefetch_counters(DISK);
    assert_eq!((counters.evicted_unused, counters.used), (48, 0));
    for block in 10..17 {
        assert!(core.read_hit(DISK, range(block * 16, 16), at(0), |_, _| {}), "block {block} was in use");
    }
}

#[test]
fn a_prefetch_wanted_later_waits_for_room_and_one_wanted_now_takes_the_place_of_an_older() {
    let (mut core, _) = core(10);
    for block in 0..10 {
        fill_block(&mut core, block, PageMask::ALL, at(0));
    }
    let run = |core: &mut Core| {
        let mut pages = 0;
        while let PrefetchStep::Io(io) = core.next_prefetch(DISK, at(1), |_| PageMask::NONE) {
            finish(core, &io, true);
            pages += io.pages;
        }
        pages
    };
    let later = PrefetchRequest { due: at(60_000), ..request(20 * PAGES_PER_BLOCK, 10 * PAGES_PER_BLOCK) };
    core.push_prefetch(DISK, &[later]);
    assert_eq!(run(&mut core), 9 * PAGES_PER_BLOCK);
    assert_eq!((core.occupancy().probation_slots, core.prefetch_backlog(DISK)), (9, PAGES_PER_BLOCK), "one waits");
    core.push_prefetch(DISK, &[request(12 * PAGES_PER_BLOCK, 2 * PAGES_PER_BLOCK)]);
    assert_eq!(run(&mut core), 2 * PAGES_PER_BLOCK);
    assert_eq!(core.occupancy().probation_slots, 9, "its share is not exceeded");
    assert_eq!(core.prefetch_counters(DISK).evicted_unused, 2 * PAGES_PER_BLOCK);
}

#[test]
fn a_prefetch_wanted_later_takes_the_place_of_one_that_is_half_as_likely() {
    let (mut core, _) = core(10);
    let run = |core: &mut Core, first: u64, probability: f32| {
        let range = range(first * PAGES_PER_BLOCK, 9 * PAGES_PER_BLOCK);
        core.push_prefetch(DISK, &[PrefetchRequest { range, due: at(60_000), probability, tag: 7 }]);
        let mut pages = 0;
        while let PrefetchStep::Io(io) = core.next_prefetch(DISK, at(1), |_| PageMask::NONE) {
            finish(core, &io, true);
            pages += io.pages;
        }
        pages
    };
    for block in 0..10 {
        fill_block(&mut core, block, PageMask::ALL, at(0));
    }
    assert_eq!(run(&mut core, 31, 0.2), 9 * PAGES_PER_BLOCK);
    assert_eq!(run(&mut core, 21, 0.35), 0, "hardly likelier");
    // The queue is in the order of use: what is due as soon and lies before goes first.
    assert_eq!(run(&mut core, 11, 0.9), 9 * PAGES_PER_BLOCK);
    assert_eq!((core.occupancy().probation_slots, core.prefetch_backlog(DISK)), (9, 9 * PAGES_PER_BLOCK));
}

#[test]
fn probation_gives_slots_to_what_is_in_use_while_that_leaves_too_early() {
    let (mut core, _) = core(20);
    let share = |core: &mut Core| {
        core.push_prefetch(DISK, &[request(20 * PAGES_PER_BLOCK, 40 * PAGES_PER_BLOCK)]);
        while let PrefetchStep::Io(io) = core.next_prefetch(DISK, at(1), |_| PageMask::NONE) {
            finish(core, &io, true);
        }
        core.occupancy().probation_slots
    };
    for block in 0..20 {
        fill_block(&mut core, block, PageMask::ALL, at(0));
    }
    assert_eq!(share(&mut core), 18);
    for round in 0..40 {
        for block in 0..12 {
            fill_block(&mut core, block, PageMask::ALL, at(2 + round));
        }
    }
    assert_eq!(share(&mut core), 10, "down to the share that it has at least");
}

#[test]
fn demand_for_a_page_in_flight_counts_as_late_and_once() {
    let (mut core, _) = core(4);
    core.push_prefetch(DISK, &[request(0, 4)]);
    let fetched = io(core.next_prefetch(DISK, at(0), |_| PageMask::NONE));
    let plan = core.plan_read(DISK, BlockIndex(0), PageMask::run(0, 2), at(1));
    assert_eq!((plan.wait, plan.fill), (PageMask::run(0, 2), PageMask::NONE));
    finish(&mut core, &fetched, true);
    assert!(core.read_hit(DISK, range(0, 4), at(0), |_, _| {}));
    let counters = core.prefetch_counters(DISK);
    assert_eq!((counters.issued, counters.used, counters.late), (4, 4, 2));
    let kinds: Vec<_> = core.take_outcomes().0.iter().map(|o| (o.kind, o.pages.count(), o.tag)).collect();
    assert_eq!(kinds, [(OutcomeKind::Late, 2, 7), (OutcomeKind::Used, 2, 7)]);
}

#[test]
fn demand_takes_queued_pages_out_of_the_queue() {
    let (mut core, _) = core(4);
    core.push_prefetch(DISK, &[request(0, 8)]);
    let plan = core.plan_read(DISK, BlockIndex(0), PageMask::run(2, 2), at(0));
    assert_eq!(plan.fill, PageMask::run(2, 2));
    assert_eq!(core.prefetch_backlog(DISK), 6);
    assert_eq!(io(core.next_prefetch(DISK, at(0), |_| PageMask::NONE)).pages, 2);
    assert_eq!(io(core.next_prefetch(DISK, at(0), |_| PageMask::NONE)).first, 4);
    assert_eq!(core.prefetch_counters(DISK).cancelled, 2);
}

#[test]
fn a_block_used_twice_survives_a_scan() {
    let (mut core, _) = core(10);
    fill_block(&mut core, 0, PageMask::ALL, at(0));
    assert!(core.read_hit(DISK, range(0, 1), at(0), |_, _| {}));
    for block in 1..39 {
        fill_block(&mut core, block, PageMask::ALL, at(block));
    }
    assert!(core.read_hit(DISK, range(0, 16), at(0), |_, _| {}));
}

#[test]
fn counting_what_is_resident_does_not_depend_on_the_way_it_is_counted() {
    let (mut core, _) = core(8);
    fill_block(&mut core, 1, PageMask::run(3, 5), at(0));
    fill_block(&mut core, 4, PageMask::ALL, at(0));
    for (first, count) in [(0u64, 40u64), (20, 60), (0, PAGES), (70, PAGES - 70), (0, u64::MAX)] {
        let by_page = (first..PAGES.min(first.saturating_add(count))).map(|p| core.resident_pages(DISK, range(p, 1)));
        assert_eq!(core.resident_pages(DISK, range(first, count)), by_page.sum::<u64>(), "{first} + {count}");
    }
}

#[test]
fn no_slot_is_taken_from_a_reader() {
    let (mut core, holds) = core(2);
    let first = core.plan_read(DISK, BlockIndex(0), PageMask::ALL, at(0));
    holds.hold(first.slot.unwrap());
    core.finish_fill(first.slot.unwrap(), first.fill, true);
    let second = core.plan_read(DISK, BlockIndex(1), PageMask::ALL, at(0));
    assert_eq!(core.plan_read(DISK, BlockIndex(2), PageMask::ALL, at(0)).slot, None, "one read, one filling");
    core.finish_fill(second.slot.unwrap(), second.fill, true);
    assert_eq!(core.plan_read(DISK, BlockIndex(2), PageMask::ALL, at(0)).slot, second.slot);
    assert!(core.read_hit(DISK, range(0, 16), at(0), |_, _| {}));
    holds.release(first.slot.unwrap());
}

/// A fill under way.
struct Filling {
    slot: u32,
    mask: PageMask,
    /// Versions of the block's pages when the store was read.
    seen: Vec<u32>,
    /// Pages of the prefetch that ends with this fill.
    group: Option<u64>,
}

/// What the model knows of the store and of I/O under way.
struct Model {
    core: Core,
    holds: Arc<Holds>,
    /// Version of each page on the store; a write bumps it when it ends.
    store: Vec<u32>,
    /// Version held by each slot's page.
    memory: HashMap<(u32, u64), u32>,
    fills: Vec<Filling>,
    writes: Vec<(WriteId, PageRange)>,
    now: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Read {
        first: u64,
        count: u64,
    },
    BeginWrite {
        first: u64,
        count: u64,
    },
    EndWrite {
        which: usize,
        fails: bool,
    },
    Fill {
        which: usize,
        fails: bool,
    },
    Push {
        first: u64,
        count: u64,
    },
    Prefetch,
    Drop,
    /// Another number of slots; a shrink goes on with `Shrink`.
    Resize {
        slots: u32,
    },
    Shrink,
}

fn op() -> impl Strategy<Value = Op> {
    let run = (0..PAGES - 64, 1u64..40);
    prop_oneof![
        6 => run.clone().prop_map(|(first, count)| Op::Read { first, count }),
        2 => run.clone().prop_map(|(first, count)| Op::BeginWrite { first, count }),
        2 => (any::<usize>(), prop::bool::weighted(0.2)).prop_map(|(which, fails)| Op::EndWrite { which, fails }),
        6 => (any::<usize>(), prop::bool::weighted(0.1)).prop_map(|(which, fails)| Op::Fill { which, fails }),
        2 => run.prop_map(|(first, count)| Op::Push { first, count }),
        3 => Just(Op::Prefetch),
        1 => Just(Op::Drop),
        1 => (0u32..40).prop_map(|slots| Op::Resize { slots }),
        2 => Just(Op::Shrink),
    ]
}

impl Model {
    fn new(config: CoreConfig) -> Model {
        let (core, holds) = core_of(config);
        Model {
            core,
            holds,
            store: vec![0; PAGES as usize],
            memory: HashMap::new(),
            fills: Vec::new(),
            writes: Vec::new(),
            now: 0,
        }
    }

    fn start_fill(&mut self, slot: u32, block: BlockIndex, mask: PageMask, group: Option<u64>) {
        self.holds.hold(slot);
        // The store is read at some moment between start and end: the start is the oldest content it can be.
        let first = (block.0 * self.core.block_pages()) as usize;
        let seen = self.store[first..first + self.core.block_pages() as usize].to_vec();
        self.fills.push(Filling { slot, mask, seen, group });
    }

    fn step(&mut self, op: &Op) -> Result<(), TestCaseError> {
        self.now += 10;
        let now = at(self.now);
        let block_pages = self.core.block_pages();
        match *op {
            Op::Read { first, count } => {
                let wanted = range(first, count);
                let mut pinned = Vec::new();
                if self.core.read_hit(DISK, wanted, at(0), |block, slot| pinned.push((block, slot))) {
                    for (block, mask) in wanted.blocks_of(block_pages) {
                        let slot = pinned.iter().find(|(b, _)| *b == block).unwrap().1;
                        for page in (0..block_pages).filter(|p| mask.has(*p)) {
                            self.check(slot, block, page)?;
                        }
                    }
                    return Ok(());
                }
                for (block, mask) in wanted.blocks_of(block_pages) {
                    let plan = self.core.plan_read(DISK, block, mask, now);
                    let Some(slot) = plan.slot else { continue };
                    prop_assert_eq!(plan.hit | plan.wait | plan.fill, mask);
                    prop_assert!((plan.hit & plan.wait).is_empty() && (plan.fill & (plan.hit | plan.wait)).is_empty());
                    for page in (0..block_pages).filter(|p| plan.hit.has(*p)) {
                        self.check(slot, block, page)?;
                    }
                    if !plan.fill.is_empty() {
                        self.start_fill(slot, block, plan.fill, None);
                    }
                }
            }
            Op::Fill { which, fails } => {
                if self.fills.is_empty() {
                    return Ok(());
                }
                let Filling { slot, mask, seen, group } = self.fills.swap_remove(which % self.fills.len());
                if !fails {
                    for page in (0..block_pages).filter(|p| mask.has(*p)) {
                        self.memory.insert((slot, page), seen[page as usize]);
                    }
                }
                self.holds.release(slot);
                self.core.finish_fill(slot, mask, !fails);
                if let Some(pages) = group {
                    self.core.finish_prefetch(DISK, pages, !fails, now, at(5));
                }
            }
            Op::BeginWrite { first, count } => {
                let id = self.core.begin_write(DISK, first * 4096, count * 4096).unwrap();
                self.writes.push((id, range(first, count)));
            }
            Op::EndWrite { which, fails } => {
                if self.writes.is_empty() {
                    return Ok(());
                }
                let (id, pages) = self.writes.swap_remove(which % self.writes.len());
                // Even a failed write may have reached the store.
                for page in pages.first..pages.end() {
                    self.store[page as usize] += 1;
                }
                let (store, memory) = (&self.store, &mut self.memory);
                let end = if fails { WriteEnd::Changed } else { WriteEnd::Written };
                self.core.end_write(DISK, id, end, now, |block, slot, mask| {
                    for page in (0..block_pages).filter(|p| mask.has(*p)) {
                        memory.insert((slot, page), store[(block.0 * block_pages + page) as usize]);
                    }
                });
            }
            Op::Push { first, count } => {
                self.core.push_prefetch(DISK, &[request(first, count)]);
            }
            Op::Prefetch => {
                if let PrefetchStep::Io(io) = self.core.next_prefetch(DISK, now, |_| PageMask::NONE) {
                    let mut page = io.first;
                    for (i, (slot, first, count)) in io.parts.iter().enumerate() {
                        prop_assert_eq!(page % block_pages, *first);
                        let group = (i == 0).then_some(io.pages);
                        self.start_fill(*slot, BlockIndex(page / block_pages), PageMask::run(*first, *count), group);
                        page += count;
                    }
                    prop_assert_eq!(page, io.first + io.pages);
                }
            }
            Op::Drop => self.core.drop_all(),
            Op::Resize { slots } => {
                // One that is under way is taken back first, as the cache does.
                let before = self.core.slots_now();
                while !self.core.grow_step(before) {}
                if slots < before {
                    self.core.begin_shrink(slots);
                }
                while slots > before && !self.core.grow_step(slots) {}
                prop_assert_eq!(self.core.slots_now(), before.max(slots));
            }
            Op::Shrink => {
                let slots = self.core.occupancy().slots;
                let (mut below, mut held) = (self.core.slots_now(), 0);
                while below > slots {
                    let (holds, memory) = (&self.holds, &mut self.memory);
                    let mut strange = false;
                    let step = self.core.shrink_step(below, now, |from, to, pages| {
                        strange |= holds.busy(from) || holds.busy(to) || from < slots || to >= slots;
                        for page in (0..block_pages).filter(|p| pages.has(*p)) {
                            let held = memory[&(from, page)];
                            memory.insert((to, page), held);
                        }
                        true
                    });
                    prop_assert!(!strange && step.next < below);
                    below = step.next;
                    held += step.held;
                }
                let busy = (slots..self.core.slots_now()).any(|slot| self.holds.busy(slot));
                // Only what somebody holds may hold up a shrink, unless nothing else can leave either.
                let ended = self.core.end_shrink();
                prop_assert_eq!(ended, held == 0);
                prop_assert!(ended || busy || (0..slots).any(|slot| self.holds.busy(slot)));
            }
        }
        Ok(())
    }

    /// A page that the core calls valid holds what the store holds, unless a write to it is in flight.
    fn check(&self, slot: u32, block: BlockIndex, page: u64) -> Result<(), TestCaseError> {
        let global = block.0 * self.core.block_pages() + page;
        let held = self.memory.get(&(slot, page)).copied();
        if !self.writes.iter().any(|(_, w)| w.overlaps(range(global, 1))) {
            prop_assert_eq!(held, Some(self.store[global as usize]), "stale page {}", global);
        }
        Ok(())
    }
}

/// Any geometry and eviction on the same number of pages: 2 to 23 blocks of 16.
fn config() -> impl Strategy<Value = CoreConfig> {
    let (geometry, eviction) = (prop::sample::select(vec![1u64, 4, 16]), prop::sample::select(EVICTIONS.to_vec()));
    (geometry, eviction, any::<bool>(), 2u32..24).prop_map(|(block_pages, eviction, write_allocate, blocks)| {
        let slots = blocks * (16 / block_pages) as u32;
        CoreConfig { block_pages, eviction, write_allocate, ..CoreConfig::with_slots(slots) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn a_valid_page_is_never_stale_and_the_books_balance(ops in prop::collection::vec(op(), 1..400), config in config()) {
        let mut model = Model::new(config);
        for op in &ops {
            model.step(op)?;
            let o = model.core.occupancy();
            prop_assert_eq!(o.used_slots, o.probation_slots + o.small_slots + o.main_slots);
            prop_assert!(model.core.slots_now() > o.slots || o.used_slots + model.core.free.len() == o.slots);
            prop_assert!(config.eviction == Eviction::S3Fifo || o.used_slots == o.main_slots);
            let valid: u64 = (0..PAGES / config.block_pages)
                .filter_map(|b| model.core.valid(DISK, BlockIndex(b)))
                .map(|(_, mask)| mask.count())
                .sum();
            prop_assert_eq!(valid, o.valid_pages);
        }
        // Let everything end and drop it: no slot may be lost.
        while !model.fills.is_empty() { model.step(&Op::Fill { which: 0, fails: false })?; }
        while !model.writes.is_empty() { model.step(&Op::EndWrite { which: 0, fails: false })?; }
        let c = model.core.prefetch_counters(DISK);
        model.core.drop_all();
        let o = model.core.occupancy();
        prop_assert_eq!((o.used_slots, o.valid_pages), (0, 0));
        model.step(&Op::Shrink)?;
        let slots = model.core.occupancy().slots;
        prop_assert_eq!((model.core.slots_now(), model.core.free.len()), (slots, slots), "a shrink ends, and no slot is lost");
        let after = model.core.prefetch_counters(DISK);
        prop_assert_eq!(after.issued, after.used + after.evicted_unused, "{:?} then {:?}", c, after);
    }
}

/// What stays is the policy's choice, wherever it lies.
#[test]
fn a_tier_that_shrinks_keeps_what_is_used_and_a_tier_of_nothing_refuses() {
    let (mut core, _) = core(64);
    for block in 0..40 {
        fill_block(&mut core, block, PageMask::ALL, at(0));
    }
    // Blocks in the slots that are to go, read again and again.
    for _ in 0..3 {
        for block in 30..40 {
            assert!(core.read_hit(DISK, range(block * 16, 16), at(1), |_, _| {}));
        }
    }
    let resident = |core: &Core, blocks: std::ops::Range<u64>| {
        blocks
            .filter(|block| core.valid(DISK, BlockIndex(*block)).is_some_and(|(_, mask)| mask == PageMask::ALL))
            .count()
    };
    core.begin_shrink(16);
    let mut below = core.slots_now();
    while below > 16 {
        below = core.shrink_step(below, at(2), |_, _, _| true).next;
    }
    assert!(core.end_shrink());
    assert_eq!((core.occupancy().slots, core.occupancy().used_slots), (16, 16), "no more leaves than must");
    assert_eq!(resident(&core, 30..40), 10);
    core.begin_shrink(0);
    assert_eq!(core.shrink_step(16, at(3), |_, _, _| true), ShrinkStep { next: 0, held: 0 });
    assert!(core.end_shrink());
    assert_eq!(core.push_prefetch(DISK, &[request(0, 32)]), 32);
    assert_eq!(core.plan_read(DISK, BlockIndex(0), PageMask::ALL, at(4)).slot, None);
    assert!(core.grow_step(4));
    fill_block(&mut core, 0, PageMask::ALL, at(5));
    assert_eq!(resident(&core, 0..1), 1);
}

#[test]
fn a_page_is_followed_from_the_queue_to_its_first_read() {
    let (mut core, _) = core(4);
    assert_eq!(core.place(DISK, 3), Whereabouts::default());
    core.push_prefetch(DISK, &[request(2, 4)]);
    assert_eq!(core.place(DISK, 3), Whereabouts { queued: true, ..Whereabouts::default() });
    assert_eq!(core.place(DISK, 6), Whereabouts::default());
    assert_eq!(core.budget_state(DISK).queued_pages, 4);
    let io = io(core.next_prefetch(DISK, at(0), |_| PageMask::NONE));
    assert_eq!(core.place(DISK, 3), Whereabouts { loading: true, ..Whereabouts::default() });
    let budget = core.budget_state(DISK);
    assert_eq!((budget.queued_pages, budget.in_flight_bytes), (0, 4 * 4096));
    finish(&mut core, &io, true);
    assert_eq!(core.place(DISK, 3), Whereabouts { ram: true, unread: true, ..Whereabouts::default() });
    assert!(core.read_hit(DISK, range(3, 1), at(0), |_, _| {}));
    assert_eq!(core.place(DISK, 3), Whereabouts { ram: true, ..Whereabouts::default() });
    assert_eq!(core.place(DISK, 4), Whereabouts { ram: true, unread: true, ..Whereabouts::default() });
}
