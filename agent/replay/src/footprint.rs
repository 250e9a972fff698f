//! The first pass over a trace: how many distinct pages it touches, and which is the last.

use crate::trace::{Request, TraceError};
use prestage_predictor::{Op, PAGE_BYTES};
use rustc_hash::FxHashMap;
use std::ops::RangeInclusive;

/// Smallest cache of a replay, in pages.
const MIN_PAGES: u64 = 64;
/// Pages of a region (256 MiB), the unit in which pages are remembered.
const REGION_PAGES: u64 = 1 << 16;
/// A region with more pages than this is a bitmap (8 KiB) until it has all; others are sorted lists of two bytes a page.
const SPARSE: usize = 4096;
/// Most bitmaps: 1 GiB. No trace of one machine comes near it, for each is of at least 16 MiB that were touched and none is whole.
const BITMAPS_MAX: usize = 1 << 17;

/// How large a replay's cache is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CacheSize {
    /// Share of the trace's distinct pages.
    Fraction(f64),
    Bytes(u64),
}

/// What a trace touches. Pages are 4 KiB; discards touch none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Requests of any kind.
    pub requests: u64,
    pub distinct_pages: u64,
    /// The last page and one: nothing is prefetched from there on.
    pub end_page: u64,
}

impl Footprint {
    /// Reads a whole trace. `progress` is called now and then with the number of requests so far; `false` ends the pass
    /// early, with what was seen until then. Memory: at most 8 KiB for each 256 MiB that are touched and not whole, and no more
    /// than 1 GiB of them. Errors: those of the requests, [`TraceError::Scattered`].
    pub fn of(
        requests: impl IntoIterator<Item = Result<Request, TraceError>>,
        progress: impl FnMut(u64) -> bool,
    ) -> Result<Self, TraceError> {
        Self::within(requests, progress, BITMAPS_MAX)
    }

    fn within(
        requests: impl IntoIterator<Item = Result<Request, TraceError>>,
        mut progress: impl FnMut(u64) -> bool,
        bitmaps_max: usize,
    ) -> Result<Self, TraceError> {
        let mut footprint = Self::default();
        let mut pages = Pages::default();
        for request in requests {
            let request = request?;
            footprint.requests += 1;
            if footprint.requests.is_multiple_of(crate::driver::PROGRESS_EVERY) && !progress(footprint.requests) {
                break;
            }
            if request.op != Op::Discard {
                let range = request.pages();
                footprint.end_page = footprint.end_page.max(range.end() + 1);
                footprint.distinct_pages += pages.insert(range);
                if pages.bitmaps > bitmaps_max {
                    return Err(TraceError::Scattered { requests: footprint.requests });
                }
            }
        }
        Ok(footprint)
    }

    /// Capacity of a cache of `size`, in pages: `max(64, floor(fraction × distinct pages))`.
    #[must_use]
    pub fn capacity_pages(&self, size: CacheSize) -> u64 {
        let pages = match size {
            CacheSize::Fraction(fraction) => (self.distinct_pages as f64 * fraction) as u64,
            CacheSize::Bytes(bytes) => bytes / PAGE_BYTES,
        };
        pages.max(MIN_PAGES)
    }

    /// `size` as a share of the distinct pages.
    #[must_use]
    pub fn fraction(&self, size: CacheSize) -> f64 {
        match size {
            CacheSize::Fraction(fraction) => fraction,
            CacheSize::Bytes(_) => self.capacity_pages(size) as f64 / self.distinct_pages.max(1) as f64,
        }
    }
}

/// A set of pages that can only grow.
#[derive(Default)]
struct Pages {
    regions: FxHashMap<u64, Region>,
    /// Regions that are bitmaps.
    bitmaps: usize,
}

enum Region {
    Sparse(Vec<u16>),
    /// With the number of its pages.
    Dense(Box<[u64]>, u32),
    Whole,
}

impl Pages {
    /// Returns how many pages are new.
    fn insert(&mut self, range: RangeInclusive<u64>) -> u64 {
        let (mut at, last) = range.into_inner();
        let mut new = 0;
        while at <= last {
            let end = (at / REGION_PAGES * REGION_PAGES + REGION_PAGES - 1).min(last);
            let region = self.regions.entry(at / REGION_PAGES).or_insert_with(|| Region::Sparse(Vec::new()));
            self.bitmaps -= usize::from(matches!(region, Region::Dense(..)));
            new += region.insert_all((at % REGION_PAGES) as u16..=(end % REGION_PAGES) as u16);
            self.bitmaps += usize::from(matches!(region, Region::Dense(..)));
            at = end + 1;
        }
        new
    }
}

impl Region {
    fn pages(&self) -> u64 {
        match self {
            Self::Sparse(pages) => pages.len() as u64,
            Self::Dense(_, pages) => u64::from(*pages),
            Self::Whole => REGION_PAGES,
        }
    }

    /// Returns how many pages are new.
    fn insert_all(&mut self, pages: RangeInclusive<u16>) -> u64 {
        let before = self.pages();
        if pages == (0..=u16::MAX) {
            *self = Self::Whole;
        } else if pages.len() > SPARSE {
            self.insert_bits(pages);
        } else {
            pages.for_each(|page| self.insert(page));
        }
        self.pages() - before
    }

    fn insert(&mut self, page: u16) {
        if let Self::Sparse(pages) = self {
            match pages.binary_search(&page) {
                Ok(_) => return,
                Err(at) if pages.len() < SPARSE => {
                    pages.insert(at, page);
                    return;
                }
                Err(_) => {}
            }
        }
        self.insert_bits(page..=page);
    }

    /// Into a bitmap, which the region becomes if it is none.
    fn insert_bits(&mut self, range: RangeInclusive<u16>) {
        if let Self::Sparse(pages) = self {
            let mut words = vec![0u64; REGION_PAGES as usize / 64].into_boxed_slice();
            for page in &*pages {
                words[usize::from(*page) / 64] |= 1 << (page % 64);
            }
            *self = Self::Dense(words, pages.len() as u32);
        }
        let Self::Dense(words, pages) = self else { return };
        let (first, last) = range.into_inner();
        let (from, to) = (usize::from(first) / 64, usize::from(last) / 64);
        for (at, word) in words.iter_mut().enumerate().take(to + 1).skip(from) {
            let low = if at == from { u64::MAX << (first % 64) } else { u64::MAX };
            let high = if at == to { u64::MAX >> (63 - last % 64) } else { u64::MAX };
            *pages += (low & high & !*word).count_ones();
            *word |= low & high;
        }
        if u64::from(*pages) == REGION_PAGES {
            *self = Self::Whole;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_of_pages_is_the_oracle(
            requests in prop::collection::vec(
                (any::<bool>(), 0u64..400_000_000, prop_oneof![40 => 0u32..3_000_000, 1 => 0u32..600_000_000], 0u8..8), 1..40),
        ) {
            let requests: Vec<Request> = requests.into_iter().map(|(read, offset, len, kind)| Request {
                at_us: 0,
                op: if kind == 0 { Op::Discard } else if read { Op::Read } else { Op::Write },
                offset,
                len: len.max(1),
            }).collect();
            let mut oracle = BTreeSet::new();
            for request in requests.iter().filter(|request| request.op != Op::Discard) {
                oracle.extend(request.pages());
            }
            let footprint = Footprint::of(requests.iter().map(|request| Ok(*request)), |_| true).unwrap();
            prop_assert_eq!(footprint.distinct_pages, oracle.len() as u64);
            prop_assert_eq!(footprint.end_page, oracle.last().map_or(0, |last| last + 1));
            prop_assert_eq!(footprint.requests, requests.len() as u64);
        }
    }

    #[test]
    fn what_is_read_whole_takes_no_bitmaps_and_what_is_scattered_without_end_is_refused() {
        let read = |offset, len| Request { at_us: 0, op: Op::Read, offset, len };
        let region = REGION_PAGES * PAGE_BYTES;
        // 256 TiB, in two unequal parts each.
        let regions = crate::trace::MAX_OFFSET / region;
        let mut pages = Pages::default();
        let part = region / 4096;
        let whole = (0..regions).flat_map(|n| [read(n * region, part as u32), read(n * region, region as u32)]);
        let new: u64 = whole.map(|request| pages.insert(request.pages())).sum();
        assert_eq!((new, pages.bitmaps), (regions * REGION_PAGES, 0));

        let bytes = (SPARSE as u64 + 1) * PAGE_BYTES;
        let scattered = (0..regions).map(|n| Ok(read(n * region, bytes as u32)));
        let error = Footprint::within(scattered, |_| true, 100).unwrap_err();
        assert!(matches!(error, TraceError::Scattered { requests } if requests == 101), "{error}");
    }

    #[test]
    fn a_cache_is_never_smaller_than_64_pages() {
        let footprint = Footprint { requests: 1, distinct_pages: 10_007, end_page: 20_000 };
        assert_eq!(footprint.capacity_pages(CacheSize::Fraction(0.05)), 500);
        assert_eq!(footprint.capacity_pages(CacheSize::Fraction(0.001)), 64);
        assert_eq!(footprint.capacity_pages(CacheSize::Bytes(1 << 20)), 256);
        assert_eq!(footprint.capacity_pages(CacheSize::Bytes(1)), 64);
        assert!((footprint.fraction(CacheSize::Bytes(1 << 20)) - 256.0 / 10_007.0).abs() < 1e-12);
    }
}
