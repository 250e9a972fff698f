//! Which pages of a template a clone needs first, in which order.

use serde::{Deserialize, Serialize};

use super::PAGE_BYTES;

/// Pages between two wanted ones that are read along: a read of a few pages more costs less than another read.
pub const MERGE_PAGES: u64 = 8;

/// Pages that are read together at most, so that what comes next in order does not wait for all of a large region.
const TOGETHER_PAGES: u64 = 256;

/// Pages of guest memory that follow each other. As JSON `[first, pages]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Extent {
    pub first: u64,
    pub pages: u64,
}

impl From<(u64, u64)> for Extent {
    fn from((first, pages): (u64, u64)) -> Self {
        Self { first, pages }
    }
}

impl From<Extent> for (u64, u64) {
    fn from(extent: Extent) -> Self {
        (extent.first, extent.pages)
    }
}

impl Extent {
    /// The extents of pages in the order given; one that follows the page before it lengthens its extent.
    pub fn of(pages: impl IntoIterator<Item = u64>) -> Vec<Self> {
        let mut extents: Vec<Self> = Vec::new();
        for page in pages {
            match extents.last_mut() {
                Some(last) if last.end() == page => last.pages += 1,
                _ => extents.push(Self { first: page, pages: 1 }),
            }
        }
        extents
    }

    fn end(self) -> u64 {
        self.first.saturating_add(self.pages)
    }
}

/// How a working set became known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learned {
    /// All pages of the machine that were not zero when it was saved, by address.
    #[default]
    Residency,
    /// What a clone touched after its start, in order.
    FirstTouch,
}

/// Pages that a clone needs first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    pub learned: Learned,
    /// In order of first touch where that is known. No page is in two.
    pub extents: Vec<Extent>,
}

impl WorkingSet {
    /// From pages in order of first touch; a page that comes again is left out.
    #[must_use]
    pub fn of_touches(pages: impl IntoIterator<Item = u64>) -> Self {
        let mut seen = std::collections::HashSet::new();
        let extents = Extent::of(pages.into_iter().filter(|&page| seen.insert(page)));
        Self { learned: Learned::FirstTouch, extents }
    }

    #[must_use]
    pub fn pages(&self) -> u64 {
        self.extents.iter().map(|extent| extent.pages).sum()
    }

    /// Whether all pages lie within a memory of `bytes`.
    #[must_use]
    pub fn fits(&self, bytes: u64) -> bool {
        self.extents
            .iter()
            .all(|e| e.pages > 0 && e.first.checked_add(e.pages).is_some_and(|n| n <= bytes / PAGE_BYTES))
    }

    /// What to read, in order, as ranges of the memory in bytes: neighbours at most `gap` pages apart are one, of 256 pages at
    /// most, and nothing is read twice.
    #[must_use]
    pub fn plan(&self, gap: u64) -> Vec<std::ops::Range<u64>> {
        let mut sorted = self.extents.clone();
        sorted.sort_by_key(|extent| extent.first);
        let mut merged: Vec<Extent> = Vec::with_capacity(sorted.len());
        for extent in sorted {
            match merged.last_mut() {
                Some(last)
                    if extent.first <= last.end().saturating_add(gap)
                        && extent.end() - last.first <= TOGETHER_PAGES =>
                {
                    last.pages = last.pages.max(extent.end() - last.first);
                }
                _ => merged.push(extent),
            }
        }
        let mut taken = vec![false; merged.len()];
        let mut ranges = Vec::with_capacity(merged.len());
        for extent in &self.extents {
            // each lies in exactly one of the merged
            let index = merged.partition_point(|m| m.first <= extent.first).saturating_sub(1);
            if let (Some(taken), Some(m)) = (taken.get_mut(index), merged.get(index))
                && !std::mem::replace(taken, true)
            {
                ranges.push(m.first * PAGE_BYTES..m.end() * PAGE_BYTES);
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn touches_keep_their_order_and_first_places() {
        let set = WorkingSet::of_touches([7, 8, 3, 8, 9, 4]);
        let extents: Vec<_> = set.extents.iter().map(|e| (e.first, e.pages)).collect();
        assert_eq!(extents, [(7, 2), (3, 1), (9, 1), (4, 1)]);
        assert_eq!(set.pages(), 5);
        assert!(set.fits(10 * PAGE_BYTES));
        assert!(!set.fits(9 * PAGE_BYTES));
    }

    #[test]
    fn neighbours_are_read_together_at_the_time_of_the_first() {
        let set = WorkingSet::of_touches([100, 7, 108, 50, 9]);
        let pages = |gap| -> Vec<_> { set.plan(gap).iter().map(|r| r.start / 4096..r.end / 4096).collect() };
        assert_eq!(pages(8), [100..109, 7..10, 50..51]);
        assert_eq!(pages(0), [100..101, 7..8, 108..109, 50..51, 9..10]);
    }

    proptest! {
        #[test]
        fn a_plan_reads_every_page_once(pages in prop::collection::vec(0_u64..2000, 0..600), gap in 0_u64..20) {
            let set = WorkingSet::of_touches(pages.iter().copied());
            let mut read = std::collections::HashSet::new();
            for range in set.plan(gap) {
                for page in range.start / PAGE_BYTES..range.end / PAGE_BYTES {
                    prop_assert!(read.insert(page), "page {} twice", page);
                }
            }
            for page in &pages {
                prop_assert!(read.contains(page));
            }
            for page in read {
                prop_assert!(pages.iter().any(|p| p.abs_diff(page) <= gap), "page {} for nothing", page);
            }
        }
    }
}
