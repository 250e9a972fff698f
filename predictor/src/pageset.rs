//! Sets of pages as one 16-bit mask a 64 KiB block, and the mask arithmetic shared by the experts.

use crate::access::BLOCK_PAGES;
use rustc_hash::FxHashMap;

/// The blocks a page range falls on, each with the mask of the range's pages in it. `first + pages` must not overflow.
pub(crate) fn block_masks(first: u64, pages: u32) -> impl Iterator<Item = (u64, u16)> {
    let end = first + u64::from(pages);
    let mut at = first;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let block = at / BLOCK_PAGES;
        let from = (at % BLOCK_PAGES) as u32;
        let count = (end - at).min(BLOCK_PAGES - u64::from(from)) as u32;
        at += u64::from(count);
        Some((block, run_mask(from, count)))
    })
}

/// `count` bits from bit `from` on; `from + count <= 16`.
pub(crate) fn run_mask(from: u32, count: u32) -> u16 {
    (((1u32 << count) - 1) << from) as u16
}

/// Runs of set bits, ascending: (first bit, bits).
pub(crate) fn mask_runs(mask: u16) -> impl Iterator<Item = (u32, u32)> {
    let mut left = u32::from(mask);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let from = left.trailing_zeros();
        let count = (!(left >> from)).trailing_zeros();
        left &= !(((1u32 << count) - 1) << from);
        Some((from, count))
    })
}

/// Joins ascending runs that touch, across blocks.
#[derive(Debug, Default)]
pub(crate) struct RunJoiner {
    first: u64,
    pages: u32,
}

impl RunJoiner {
    /// Adds the runs of `mask` in `block`; hands completed runs to `sink`.
    pub(crate) fn push(&mut self, block: u64, mask: u16, sink: &mut impl FnMut(u64, u32)) {
        for (from, count) in mask_runs(mask) {
            let first = block * BLOCK_PAGES + u64::from(from);
            if self.pages > 0 && self.first + u64::from(self.pages) == first {
                self.pages += count;
            } else {
                self.flush(sink);
                (self.first, self.pages) = (first, count);
            }
        }
    }

    pub(crate) fn flush(&mut self, sink: &mut impl FnMut(u64, u32)) {
        if self.pages > 0 {
            sink(self.first, self.pages);
            self.pages = 0;
        }
    }
}

/// A set of pages; about 16 bytes for each 64 KiB block with a page in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageSet {
    blocks: FxHashMap<u64, u16>,
    pages: u64,
}

impl PageSet {
    /// Adds a range and hands the runs that were not in the set to `fresh`.
    pub(crate) fn insert(&mut self, first: u64, pages: u32, mut fresh: impl FnMut(u64, u32)) {
        let mut joiner = RunJoiner::default();
        for (block, mask) in block_masks(first, pages) {
            let held = self.blocks.entry(block).or_insert(0);
            let new = mask & !*held;
            *held |= mask;
            self.pages += u64::from(new.count_ones());
            joiner.push(block, new, &mut fresh);
        }
        joiner.flush(&mut fresh);
    }

    /// Runs of the range that are in the set (`held`) or not in it.
    pub(crate) fn runs(&self, first: u64, pages: u32, held: bool, mut sink: impl FnMut(u64, u32)) {
        let mut joiner = RunJoiner::default();
        for (block, mask) in block_masks(first, pages) {
            let present = self.blocks.get(&block).copied().unwrap_or(0);
            joiner.push(block, if held { mask & present } else { mask & !present }, &mut sink);
        }
        joiner.flush(&mut sink);
    }

    #[cfg(test)]
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.blocks.get(&(page / BLOCK_PAGES)).is_some_and(|mask| mask >> (page % BLOCK_PAGES) & 1 == 1)
    }

    /// Pages in the set.
    pub(crate) fn len(&self) -> u64 {
        self.pages
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.blocks.capacity() * 17
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn runs_of(pages: &BTreeSet<u64>) -> Vec<(u64, u32)> {
        let mut runs: Vec<(u64, u32)> = Vec::new();
        for &page in pages {
            match runs.last_mut() {
                Some((first, count)) if *first + u64::from(*count) == page => *count += 1,
                _ => runs.push((page, 1)),
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn page_set_agrees_with_a_plain_set(ops in prop::collection::vec((0u64..400, 0u32..70), 1..60)) {
            let (mut fast, mut plain) = (PageSet::default(), BTreeSet::new());
            for (first, pages) in ops {
                let range: BTreeSet<u64> = (first..first + u64::from(pages)).collect();
                let fresh: BTreeSet<u64> = range.difference(&plain).copied().collect();
                let held: BTreeSet<u64> = range.intersection(&plain).copied().collect();
                let mut got = Vec::new();
                fast.runs(first, pages, true, |a, n| got.push((a, n)));
                prop_assert_eq!(&got, &runs_of(&held));
                got.clear();
                fast.runs(first, pages, false, |a, n| got.push((a, n)));
                prop_assert_eq!(&got, &runs_of(&fresh));
                got.clear();
                fast.insert(first, pages, |a, n| got.push((a, n)));
                prop_assert_eq!(&got, &runs_of(&fresh));
                plain.extend(range);
                prop_assert_eq!(fast.len(), plain.len() as u64);
            }
            for page in 0..500 {
                prop_assert_eq!(fast.contains(page), plain.contains(&page));
            }
        }

        #[test]
        fn mask_runs_rebuild_the_mask(mask: u16) {
            let rebuilt = mask_runs(mask).fold(0u16, |sum, (from, count)| {
                assert_eq!(sum & run_mask(from, count), 0);
                sum | run_mask(from, count)
            });
            prop_assert_eq!(rebuilt, mask);
        }
    }
}
