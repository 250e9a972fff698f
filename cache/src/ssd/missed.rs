//! What was taken away from a slab whose records are still being read. Sans-I/O.
//!
//! Guests write while a large slab is loaded ([`super::load`]). What a record that has not been read yet says of pages that were
//! written meanwhile must not be believed when it is: these pages are noted here, exactly, up to a bound; of a storage with more
//! than that nothing more is taken from the slab.

use crate::types::{BlockIndex, PAGES_PER_BLOCK, PageMask, PageRange};
use std::collections::{BTreeMap, BTreeSet};

/// Runs of pages remembered: some 40 MB, and two seconds of half a million writes each.
const MOST: usize = 1 << 20;

/// Pages of which nothing that is still to be read may be believed.
///
/// Every call takes a moment, whatever is remembered: runs that are forgotten are put aside, see [`Missed::take_forgotten`].
#[derive(Debug)]
pub(super) struct Missed {
    runs: BTreeMap<u16, Runs>,
    /// Of all storages.
    count: usize,
    whole: BTreeSet<u16>,
    everything: bool,
    most: usize,
    forgotten: Vec<Runs>,
}

/// Of one storage, by first page: the end of a run. No two overlap or touch.
pub(super) type Runs = BTreeMap<u64, u64>;

impl Missed {
    pub(super) fn new() -> Missed {
        Missed::bounded(MOST)
    }

    fn bounded(most: usize) -> Missed {
        Missed {
            runs: BTreeMap::new(),
            count: 0,
            whole: BTreeSet::new(),
            everything: false,
            most,
            forgotten: Vec::new(),
        }
    }

    pub(super) fn pages(&mut self, storage: u16, range: PageRange) {
        if range.count == 0 || self.everything || self.whole.contains(&storage) {
            return;
        }
        let (mut first, mut end) = (range.first, range.end());
        let runs = self.runs.entry(storage).or_default();
        // Those that it touches become one with it.
        while let Some((from, to)) = runs.range(..=end).next_back().map(|(from, to)| (*from, *to)) {
            if to < first {
                break;
            }
            first = first.min(from);
            end = end.max(to);
            runs.remove(&from);
            self.count -= 1;
        }
        runs.insert(first, end);
        self.count += 1;
        if self.count > self.most {
            self.storage(storage);
        }
    }

    pub(super) fn storage(&mut self, storage: u16) {
        self.whole.insert(storage);
        if let Some(runs) = self.runs.remove(&storage) {
            self.count -= runs.len();
            self.forgotten.push(runs);
        }
    }

    pub(super) fn everything(&mut self) {
        self.everything = true;
        self.count = 0;
        self.forgotten.extend(std::mem::take(&mut self.runs).into_values());
        self.whole.clear();
    }

    /// What nobody asks about any more. A million runs take some tens of milliseconds to be freed, which is for whoever holds no lock.
    pub(super) fn take_forgotten(&mut self) -> Vec<Runs> {
        std::mem::take(&mut self.forgotten)
    }

    /// Pages of a block that were taken away.
    pub(super) fn of(&self, storage: u16, block: BlockIndex) -> PageMask {
        if self.everything || self.whole.contains(&storage) {
            return PageMask::ALL;
        }
        let Some(runs) = self.runs.get(&storage) else { return PageMask::NONE };
        let first = block.0 * PAGES_PER_BLOCK;
        let before = runs.range(..first + PAGES_PER_BLOCK).rev();
        let hits = before.take_while(|(_, end)| **end > first);
        hits.fold(PageMask::NONE, |mask, (from, end)| {
            let from = (*from).max(first);
            mask | PageMask::run(from - first, end - from)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Op {
        Pages(u16, PageRange),
        Storage(u16),
    }

    fn op() -> impl Strategy<Value = Op> {
        let range = (0u64..160, 0u64..50).prop_map(|(first, count)| PageRange { first, count });
        prop_oneof![30 => (0u16..3, range).prop_map(|(s, range)| Op::Pages(s, range)), 1 => (0u16..3).prop_map(Op::Storage)]
    }

    proptest! {
        #[test]
        fn nothing_that_was_taken_away_is_forgotten(ops in prop::collection::vec(op(), 0..60), most in 1usize..12) {
            let mut missed = Missed::bounded(most);
            let mut exact = Missed::bounded(usize::MAX);
            let mut model = BTreeSet::new();
            for op in &ops {
                match op {
                    Op::Pages(s, range) => {
                        missed.pages(*s, *range);
                        exact.pages(*s, *range);
                        model.extend((range.first..range.end()).map(|page| (*s, page)));
                    }
                    Op::Storage(s) => {
                        missed.storage(*s);
                        exact.storage(*s);
                        model.extend((0..400).map(|page| (*s, page)));
                    }
                }
                let held: usize = missed.runs.values().map(BTreeMap::len).sum();
                prop_assert!(held == missed.count && held <= most);
            }
            for (storage, block) in (0..3u16).flat_map(|s| (0..16u64).map(move |block| (s, block))) {
                let first = block * PAGES_PER_BLOCK;
                let pages = (0..PAGES_PER_BLOCK).filter(|p| model.contains(&(storage, first + p)));
                let wanted = pages.fold(PageMask::NONE, |mask, p| mask | PageMask::run(p, 1));
                prop_assert_eq!(exact.of(storage, BlockIndex(block)), wanted);
                prop_assert!(missed.of(storage, BlockIndex(block)).contains(wanted));
            }
        }
    }

    #[test]
    fn the_last_pages_that_can_be_named_are_remembered() {
        let mut missed = Missed::new();
        let last = super::super::format::MAX_BLOCK;
        missed.pages(7, PageRange { first: last * PAGES_PER_BLOCK + 3, count: u64::MAX });
        assert_eq!(missed.of(7, BlockIndex(last)), PageMask::run(3, 13));
        assert_eq!(missed.of(7, BlockIndex(last - 1)), PageMask::NONE);
        missed.everything();
        assert_eq!(missed.of(3, BlockIndex(0)), PageMask::ALL);
    }

    /// What is forgotten is neither searched nor freed where it is forgotten: a guest's write holds the tier's lock then.
    #[test]
    fn what_is_forgotten_is_put_aside_as_it_is() {
        let mut missed = Missed::bounded(1000);
        (0..600).for_each(|page| missed.pages(1, PageRange { first: 2 * page, count: 1 }));
        (0..401).for_each(|page| missed.pages(2, PageRange { first: 2 * page, count: 1 }));
        assert_eq!(missed.of(2, BlockIndex(50)), PageMask::ALL);
        assert_eq!(missed.take_forgotten().iter().map(BTreeMap::len).collect::<Vec<_>>(), [401]);
        missed.everything();
        assert_eq!(missed.take_forgotten().iter().map(BTreeMap::len).collect::<Vec<_>>(), [600]);
        assert!(missed.take_forgotten().is_empty());
    }
}
