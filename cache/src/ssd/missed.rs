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
#[derive(Debug)]
pub(super) struct Missed {
    /// By storage and first page: the end of a run. No two of a storage overlap or touch.
    runs: BTreeMap<(u16, u64), u64>,
    whole: BTreeSet<u16>,
    everything: bool,
    most: usize,
}

impl Missed {
    pub(super) fn new() -> Missed {
        Missed::bounded(MOST)
    }

    fn bounded(most: usize) -> Missed {
        Missed { runs: BTreeMap::new(), whole: BTreeSet::new(), everything: false, most }
    }

    pub(super) fn pages(&mut self, storage: u16, range: PageRange) {
        if range.count == 0 || self.everything || self.whole.contains(&storage) {
            return;
        }
        let (mut first, mut end) = (range.first, range.end());
        // Those that it touches become one with it.
        while let Some((key, other)) = self.runs.range(..=(storage, end)).next_back().map(|(key, end)| (*key, *end)) {
            if key.0 != storage || other < first {
                break;
            }
            first = first.min(key.1);
            end = end.max(other);
            self.runs.remove(&key);
        }
        self.runs.insert((storage, first), end);
        if self.runs.len() > self.most {
            self.storage(storage);
        }
    }

    pub(super) fn storage(&mut self, storage: u16) {
        self.whole.insert(storage);
        self.runs.retain(|key, _| key.0 != storage);
    }

    pub(super) fn everything(&mut self) {
        (self.runs, self.whole, self.everything) = (BTreeMap::new(), BTreeSet::new(), true);
    }

    /// Pages of a block that were taken away.
    pub(super) fn of(&self, storage: u16, block: BlockIndex) -> PageMask {
        if self.everything || self.whole.contains(&storage) {
            return PageMask::ALL;
        }
        let first = block.0 * PAGES_PER_BLOCK;
        let before = self.runs.range(..(storage, first + PAGES_PER_BLOCK)).rev();
        let hits = before.take_while(|(key, end)| key.0 == storage && **end > first);
        hits.fold(PageMask::NONE, |mask, ((_, from), end)| {
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
                prop_assert!(missed.runs.len() <= most);
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
}
