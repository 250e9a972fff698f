//! Units and identifiers of the cache.
//!
//! - [`PAGE_BYTES`], [`BLOCK_BYTES`]: unit of validity and unit of allocation
//! - [`StorageId`], [`BlockIndex`], [`PageMask`]: keys of the index
//! - [`PageRange`]: a run of pages of one storage
//! - [`fit_block_pages`]: sizes of a block other than the engine's

use std::fmt;

/// Unit of validity: a guest page, and the smallest extent worth one direct I/O.
pub const PAGE_BYTES: usize = 4096;
/// Unit of allocation in the RAM and SSD tiers. 64 KiB keeps the index at a thousandth of the data; pages within a
/// block are valid one by one, so that a 4 KiB miss never has to read 64 KiB.
pub const BLOCK_BYTES: usize = 65536;
/// Pages in a block.
pub const PAGES_PER_BLOCK: u64 = (BLOCK_BYTES / PAGE_BYTES) as u64;

/// Pages in a block as a policy core can have them: the largest of 1, 2, 4, 8 and 16 that divides `pages`.
pub fn fit_block_pages(pages: u64) -> u64 {
    1 << block_shift(pages)
}

fn block_shift(pages: u64) -> u32 {
    pages.trailing_zeros().min(PAGES_PER_BLOCK.trailing_zeros())
}

/// A backing file, device or export, as numbered by this process. Fifty disks on one golden image share one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct StorageId(pub u32);

/// A block of a storage, counted from its start; 64 KiB unless a policy core was set up with smaller ones.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlockIndex(pub u64);

/// Pages of one block, bit `i` is the page at `i * 4096`.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct PageMask(pub u16);

impl PageMask {
    pub const NONE: PageMask = PageMask(0);
    pub const ALL: PageMask = PageMask(u16::MAX);

    /// Pages `first..first + count` of a block; whatever lies beyond the block is cut off.
    pub fn run(first: u64, count: u64) -> PageMask {
        let end = (first + count).min(PAGES_PER_BLOCK);
        if first >= end {
            return PageMask::NONE;
        }
        let width = end - first;
        PageMask((((1u32 << width) - 1) << first) as u16)
    }
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
    pub fn count(self) -> u64 {
        u64::from(self.0.count_ones())
    }
    pub fn contains(self, other: PageMask) -> bool {
        self.0 & other.0 == other.0
    }
    pub fn minus(self, other: PageMask) -> PageMask {
        PageMask(self.0 & !other.0)
    }
    pub fn has(self, page: u64) -> bool {
        page < PAGES_PER_BLOCK && self.0 >> page & 1 == 1
    }
    /// Maximal runs of set pages as `(first, count)`, ascending.
    pub fn runs(self) -> impl Iterator<Item = (u64, u64)> {
        let mut rest = u32::from(self.0);
        let mut base = 0u64;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let skip = rest.trailing_zeros();
            rest >>= skip;
            base += u64::from(skip);
            let first = base;
            let width = rest.trailing_ones();
            rest >>= width;
            base += u64::from(width);
            Some((first, u64::from(width)))
        })
    }
}

impl std::ops::BitAnd for PageMask {
    type Output = PageMask;
    fn bitand(self, other: PageMask) -> PageMask {
        PageMask(self.0 & other.0)
    }
}

impl std::ops::BitOr for PageMask {
    type Output = PageMask;
    fn bitor(self, other: PageMask) -> PageMask {
        PageMask(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for PageMask {
    fn bitor_assign(&mut self, other: PageMask) {
        self.0 |= other.0;
    }
}

impl fmt::Debug for PageMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageMask({:016b})", self.0)
    }
}

/// A run of pages of one storage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRange {
    pub first: u64,
    pub count: u64,
}

impl PageRange {
    /// The pages that bytes `offset..offset + len` touch.
    pub fn covering(offset: u64, len: u64) -> PageRange {
        let page = PAGE_BYTES as u64;
        let first = offset / page;
        let end = offset.saturating_add(len).div_ceil(page);
        PageRange { first, count: end.saturating_sub(first) }
    }
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }
    pub fn bytes(self) -> u64 {
        self.count.saturating_mul(PAGE_BYTES as u64)
    }
    pub fn overlaps(self, other: PageRange) -> bool {
        self.first < other.end() && other.first < self.end()
    }
    /// The same pages, block by block.
    pub fn blocks(self) -> impl Iterator<Item = (BlockIndex, PageMask)> {
        self.blocks_of(PAGES_PER_BLOCK)
    }
    /// The same pages, in blocks of `block_pages` pages, see [`fit_block_pages`].
    pub fn blocks_of(self, block_pages: u64) -> impl Iterator<Item = (BlockIndex, PageMask)> {
        let shift = block_shift(block_pages);
        let last = (1u64 << shift) - 1;
        let mut at = self.first;
        let end = self.end();
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let block = at >> shift;
            let within = at & last;
            let count = (last + 1 - within).min(end - at);
            at += count;
            // As `run`, which need not cut anything off here.
            Some((BlockIndex(block), PageMask((((1u32 << count) - 1) << within) as u16)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_mask_are_maximal_and_ascending() {
        for mask in 0..=u16::MAX {
            let runs: Vec<_> = PageMask(mask).runs().collect();
            let back = runs.iter().fold(PageMask::NONE, |m, (first, count)| m | PageMask::run(*first, *count));
            assert_eq!(back, PageMask(mask));
            assert!(runs.windows(2).all(|w| w[0].0 + w[0].1 < w[1].0), "{runs:?}");
        }
    }

    #[test]
    fn a_range_splits_into_its_blocks() {
        let blocks: Vec<_> = PageRange { first: 14, count: 20 }.blocks().collect();
        assert_eq!(
            blocks,
            [
                (BlockIndex(0), PageMask::run(14, 2)),
                (BlockIndex(1), PageMask::ALL),
                (BlockIndex(2), PageMask::run(0, 2))
            ]
        );
        for block_pages in [1, 2, 4, 8, 16] {
            let range = PageRange { first: 13, count: 41 };
            let pages = range.blocks_of(block_pages).flat_map(|(block, mask)| {
                assert!(PageMask::run(0, block_pages).contains(mask));
                mask.runs()
                    .flat_map(move |(first, count)| (first..first + count).map(move |p| block.0 * block_pages + p))
                    .collect::<Vec<_>>()
            });
            assert!(pages.eq(13..54), "blocks of {block_pages} pages");
        }
        assert_eq!([0, 1, 2, 4, 8, 12, 16, 17, 32, u64::MAX].map(fit_block_pages), [16, 1, 2, 4, 8, 4, 16, 1, 16, 1]);
        assert_eq!(PageRange::covering(4095, 2), PageRange { first: 0, count: 2 });
        assert_eq!(PageRange::covering(4096, 0).count, 0);
    }
}
