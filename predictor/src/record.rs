//! Records the first touches of a run: which pages were read before they were written, in order, with times.

use crate::pageset::PageSet;

/// Touches are joined into extents of at most this many pages (256 KiB) …
pub(crate) const MAX_EXTENT_PAGES: u32 = 64;
/// … if they are no further apart in time than this …
const JOIN_WITHIN_MS: u32 = 5000;
/// … and the extent is one of the last so many.
const JOIN_AMONG: usize = 16;

/// Pages first read at about one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Touched {
    pub(crate) first: u64,
    pub(crate) pages: u32,
    /// Since the run's start.
    pub(crate) at_ms: u32,
}

/// A run being recorded. At most `limit_pages` pages are kept.
#[derive(Clone, Debug)]
pub(crate) struct Recording {
    start_us: u64,
    latest_us: u64,
    limit_pages: u64,
    read: PageSet,
    written: PageSet,
    in_place: PageSet,
    order: Vec<Touched>,
}

impl Recording {
    pub(crate) fn new(start_us: u64, limit_pages: u64) -> Self {
        Self {
            start_us,
            latest_us: start_us,
            limit_pages,
            read: PageSet::default(),
            written: PageSet::default(),
            in_place: PageSet::default(),
            order: Vec::new(),
        }
    }

    /// Takes in a read; returns how many pages were touched for the first time.
    pub(crate) fn read(&mut self, first: u64, pages: u32, at_us: u64) -> u32 {
        self.latest_us = self.latest_us.max(at_us);
        if self.is_full() {
            return 0;
        }
        let at_ms = self.elapsed_ms(at_us);
        let (read, order) = (&mut self.read, &mut self.order);
        let mut count = 0;
        self.written.runs(first, pages, false, |first, pages| {
            read.insert(first, pages, |first, pages| {
                count += pages;
                append(order, first, pages, at_ms);
            });
        });
        count
    }

    /// Takes in a write or discard: from now on these pages need not be fetched, unless they were read before.
    pub(crate) fn write(&mut self, first: u64, pages: u32, at_us: u64) {
        self.latest_us = self.latest_us.max(at_us);
        if self.written.len() < self.limit_pages {
            self.written.insert(first, pages, |_, _| {});
        }
    }

    /// Reads of these pages are not seen: that the run is not known to have read them says nothing.
    pub(crate) fn in_place(&mut self, first: u64, pages: u32) {
        if self.in_place.len() < self.limit_pages {
            self.in_place.insert(first, pages, |_, _| {});
        }
    }

    /// Whether a read of any of these pages may have gone unseen.
    pub(crate) fn is_blind(&self, first: u64, pages: u32) -> bool {
        let mut blind = false;
        self.in_place.runs(first, pages, true, |_, _| blind = true);
        blind
    }

    /// Moves the end of the run without an access.
    pub(crate) fn extend_to(&mut self, at_us: u64) {
        self.latest_us = self.latest_us.max(at_us);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.read.len() >= self.limit_pages
    }

    pub(crate) fn start_us(&self) -> u64 {
        self.start_us
    }

    /// Length of the run so far.
    pub(crate) fn span_ms(&self) -> u32 {
        self.elapsed_ms(self.latest_us)
    }

    /// First touches in order of time.
    pub(crate) fn order(&self) -> &[Touched] {
        &self.order
    }

    /// The pages of [`Recording::order`].
    pub(crate) fn pages(&self) -> &PageSet {
        &self.read
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.read.memory_bytes()
            + self.written.memory_bytes()
            + self.in_place.memory_bytes()
            + self.order.capacity() * size_of::<Touched>()
    }

    fn elapsed_ms(&self, at_us: u64) -> u32 {
        u32::try_from(at_us.saturating_sub(self.start_us) / 1000).unwrap_or(u32::MAX)
    }
}

fn append(order: &mut Vec<Touched>, mut first: u64, mut pages: u32, at_ms: u32) {
    let recent = order.len().saturating_sub(JOIN_AMONG);
    let neighbour = order[recent..].iter_mut().rev().find(|touched| {
        (touched.first + u64::from(touched.pages) == first || first + u64::from(pages) == touched.first)
            && touched.pages < MAX_EXTENT_PAGES
            && at_ms.saturating_sub(touched.at_ms) <= JOIN_WITHIN_MS
    });
    if let Some(touched) = neighbour {
        let room = MAX_EXTENT_PAGES - touched.pages;
        let joined = pages.min(room);
        if touched.first + u64::from(touched.pages) == first {
            first += u64::from(joined);
        } else {
            touched.first -= u64::from(joined);
        }
        touched.pages += joined;
        pages -= joined;
    }
    while pages > 0 {
        let part = pages.min(MAX_EXTENT_PAGES);
        order.push(Touched { first, pages: part, at_ms });
        first += u64::from(part);
        pages -= part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn pages_written_before_they_are_read_are_not_needed() {
        let mut run = Recording::new(0, 1000);
        run.write(10, 4, 5);
        assert_eq!(run.read(8, 8, 2_000), 4);
        run.write(8, 2, 7);
        assert_eq!(run.read(8, 8, 9_000), 0);
        assert_eq!(run.order(), [Touched { first: 8, pages: 2, at_ms: 2 }, Touched { first: 14, pages: 2, at_ms: 2 }]);
        assert_eq!(run.span_ms(), 9);
    }

    #[test]
    fn neighbours_near_in_time_become_one_extent() {
        let mut run = Recording::new(0, 1000);
        for (first, at_us) in [(0, 0), (500, 10), (32, 1000), (468, 1000), (64, 60_000_000)] {
            run.read(first, 32, at_us);
        }
        let extents: Vec<_> = run.order().iter().map(|t| (t.first, t.pages)).collect();
        assert_eq!(extents, [(0, 64), (468, 64), (64, 32)]);
    }

    #[test]
    fn a_recording_is_bounded() {
        let mut run = Recording::new(0, 100);
        for i in 0..1000 {
            run.read(i * 10, 10, 0);
            run.write(1_000_000 + i * 10, 10, 0);
        }
        assert!(run.is_full());
        assert_eq!(run.pages().len(), 100);
        assert!(run.memory_bytes() < 100_000);
    }

    proptest! {
        #[test]
        fn the_order_holds_exactly_the_pages_read_first(
            ops in prop::collection::vec((any::<bool>(), 0u64..600, 1u32..90, 0u64..9_000_000), 1..60),
        ) {
            let mut run = Recording::new(0, u64::MAX);
            let (mut read, mut written, mut at) = (BTreeSet::new(), BTreeSet::new(), 0);
            for (is_read, first, pages, pause_us) in ops {
                at += pause_us;
                let range = first..first + u64::from(pages);
                if is_read {
                    let fresh: Vec<_> = range.filter(|p| !written.contains(p) && !read.contains(p)).collect();
                    prop_assert_eq!(run.read(first, pages, at) as usize, fresh.len());
                    read.extend(fresh);
                } else {
                    run.write(first, pages, at);
                    written.extend(range);
                }
            }
            let mut seen = BTreeSet::new();
            for touched in run.order() {
                prop_assert!(touched.pages >= 1 && touched.pages <= MAX_EXTENT_PAGES);
                for page in touched.first..touched.first + u64::from(touched.pages) {
                    prop_assert!(seen.insert(page));
                }
            }
            prop_assert_eq!(seen, read);
            prop_assert!(run.order().is_sorted_by_key(|touched| touched.at_ms));
        }
    }
}
