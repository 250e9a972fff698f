//! The core as a replay drives it: small blocks, LRU, writes that allocate.

use super::*;

fn lru(slots: u32, block_pages: u64) -> Core {
    let config = CoreConfig { block_pages, eviction: Eviction::Lru, ..CoreConfig::with_slots(slots) };
    core_of(CoreConfig { write_allocate: true, ..config }).0
}

/// Reads as the example at [`Core`] does; returns the pages that were resident.
fn read(core: &mut Core, wanted: PageRange) -> u64 {
    let mut hits = 0;
    for resident in [true, false] {
        for (block, mask) in wanted.blocks_of(core.block_pages()) {
            if core.valid(DISK, block).is_some() == resident {
                let plan = core.plan_read(DISK, block, mask, at(0));
                hits += plan.hit.count();
                core.finish_fill(plan.slot.unwrap(), plan.fill, true);
            }
        }
    }
    hits
}

/// Writes bytes; returns what the caller is told to copy, in its order.
fn write(core: &mut Core, offset: u64, len: u64) -> Vec<(u64, PageMask)> {
    let mut updates = Vec::new();
    let id = core.begin_write(DISK, offset, len).unwrap();
    core.end_write(DISK, id, WriteEnd::Written, at(0), |block, _, mask| updates.push((block.0, mask)));
    updates
}

fn prefetch(core: &mut Core, wanted: PageRange) {
    core.push_prefetch(DISK, &[request(wanted.first, wanted.count)]);
    while let PrefetchStep::Io(io) = core.next_prefetch(DISK, at(0), |_| PageMask::NONE) {
        finish(core, &io, true);
    }
}

fn resident(core: &Core) -> Vec<u64> {
    (0..PAGES).filter(|page| core.resident_pages(DISK, range(*page, 1)) == 1).collect()
}

#[test]
fn a_slot_of_one_page_holds_one_page() {
    let mut core = lru(4, 1);
    assert_eq!(read(&mut core, range(30, 4)), 0);
    assert_eq!(resident(&core), [30, 31, 32, 33]);
    assert_eq!(core.occupancy().used_slots, 4);
    assert_eq!(read(&mut core, range(33, 2)), 1);
    assert_eq!(resident(&core), [31, 32, 33, 34]);
    let odd = core_of(CoreConfig { block_pages: 12, ..CoreConfig::with_slots(4) }).0;
    assert_eq!(odd.block_pages(), 4);
}

#[test]
fn lru_drops_what_was_not_used_for_longest_prefetched_or_not() {
    let mut core = lru(4, 1);
    read(&mut core, range(0, 2));
    prefetch(&mut core, range(10, 2));
    assert_eq!(core.occupancy().main_slots, 4);
    assert_eq!(read(&mut core, range(0, 1)), 1);
    // The guesses are older than page 0 and younger than page 1; no share of the tier is theirs.
    prefetch(&mut core, range(20, 3));
    assert_eq!(resident(&core), [0, 20, 21, 22]);
    let counters = core.prefetch_counters(DISK);
    assert_eq!((counters.issued, counters.evicted_unused), (5, 2));
}

#[test]
fn a_request_does_not_evict_its_own_pages() {
    for eviction in EVICTIONS {
        let (mut core, _) = core_of(CoreConfig { block_pages: 1, eviction, ..CoreConfig::with_slots(20) });
        read(&mut core, range(100, 20));
        // The next to leave are used first, and another two make room.
        assert_eq!(read(&mut core, range(98, 4)), 2, "{eviction:?}");
        assert_eq!(read(&mut core, range(98, 4)), 4, "{eviction:?}");
    }
}

#[test]
fn a_write_is_a_use_and_brings_its_pages_in_where_it_may() {
    let mut core = lru(4, 1);
    prefetch(&mut core, range(5, 1));
    // From the middle of page 4 to the middle of page 6; page 5 is resident and comes first.
    let pages = [5, 4, 6].map(|page| (page, PageMask::run(0, 1)));
    assert_eq!(write(&mut core, 4 * 4096 + 2048, 8192), pages);
    assert_eq!(resident(&core), [4, 5, 6]);
    assert_eq!(core.prefetch_counters(DISK).used, 1);
    read(&mut core, range(30, 2));
    assert_eq!(resident(&core), [4, 6, 30, 31], "page 5 was used before its neighbours came in");
    let (mut core, _) = core_of(CoreConfig { write_allocate: false, ..core.config });
    assert_eq!(write(&mut core, 0, 8192), []);
    assert_eq!(core.occupancy().used_slots, 0);
}

#[test]
fn a_write_in_a_larger_block_adds_to_its_pages() {
    let mut core = lru(2, 4);
    read(&mut core, range(0, 1));
    assert_eq!(write(&mut core, 2 * 4096, 4 * 4096), [(0, PageMask::run(2, 2)), (1, PageMask::run(0, 2))]);
    assert_eq!(resident(&core), [0, 2, 3, 4, 5]);
}

/// LRU by page as a list: what is wanted and resident moves to the front, then what is missing enters there.
#[derive(Default)]
struct Oracle {
    /// Least recently used last.
    pages: Vec<u64>,
    /// Of those, prefetched and not used.
    guesses: Vec<u64>,
    used: u64,
    wasted: u64,
}

impl Oracle {
    fn insert(&mut self, slots: usize, page: u64) {
        if self.pages.contains(&page) {
            return;
        }
        if self.pages.len() == slots {
            let victim = self.pages.pop();
            self.wasted += self.guesses.extract_if(.., |guess| Some(*guess) == victim).count() as u64;
        }
        self.pages.insert(0, page);
    }
    fn demand(&mut self, slots: usize, wanted: PageRange) -> u64 {
        let mut hits = 0;
        for page in wanted.first..wanted.end() {
            if let Some(found) = self.pages.iter().position(|p| *p == page) {
                self.pages.remove(found);
                self.pages.insert(0, page);
                self.used += self.guesses.extract_if(.., |guess| *guess == page).count() as u64;
                hits += 1;
            }
        }
        (wanted.first..wanted.end()).for_each(|page| self.insert(slots, page));
        hits
    }
    fn prefetch(&mut self, slots: usize, wanted: PageRange) {
        for page in wanted.first..wanted.end() {
            if !self.pages.contains(&page) {
                self.insert(slots, page);
                self.guesses.push(page);
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Read,
    Write,
    Prefetch,
}

proptest! {
    #[test]
    fn lru_by_page_is_lru_by_page(
        slots in 8usize..80,
        steps in prop::collection::vec(
            (prop_oneof![4 => Just(Step::Read), 2 => Just(Step::Write), 1 => Just(Step::Prefetch)], 0u64..150, 1u64..24),
            1..300,
        ),
    ) {
        let (mut core, mut oracle) = (lru(slots as u32, 1), Oracle::default());
        for (step, first, count) in steps {
            // A prefetch in one I/O may not exceed the tier: what is being filled cannot leave. Requests may.
            let wanted = range(first, if matches!(step, Step::Prefetch) { count.min(8) } else { count });
            match step {
                Step::Read => prop_assert_eq!(read(&mut core, wanted), oracle.demand(slots, wanted)),
                Step::Write => {
                    write(&mut core, first * 4096 + 7, count * 4096 - 14);
                    oracle.demand(slots, wanted);
                }
                Step::Prefetch => {
                    prefetch(&mut core, wanted);
                    oracle.prefetch(slots, wanted);
                }
            }
            let mut pages = oracle.pages.clone();
            pages.sort_unstable();
            prop_assert_eq!(resident(&core), pages);
            let counters = core.prefetch_counters(DISK);
            prop_assert_eq!((counters.used, counters.evicted_unused), (oracle.used, oracle.wasted));
        }
    }
}
