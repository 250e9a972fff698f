//! Queue of prefetches that wait for budget: earliest deadline first, neighbours merged into one request.
//!
//! Pages are queued at most once. A demand read or a write of queued pages takes them out again: whoever needs them
//! now reads them now.

use crate::types::{PAGE_BYTES, PageRange};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What the predictor wants loaded.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PrefetchRequest {
    pub range: PageRange,
    /// When the pages are expected to be used, on the cache's clock; earlier goes first.
    pub due: Duration,
    /// Calibrated probability of use, for the record.
    pub probability: f32,
    /// Who proposed it; comes back with the outcome.
    pub tag: u8,
}

/// The largest merged request. At 5 ms a round trip 512 KiB keeps a store busy, and demand waits behind it for less
/// than a millisecond on a 1 GB/s link.
pub const MAX_REQUEST_PAGES: u64 = (512 << 10) / PAGE_BYTES as u64;

#[derive(Clone, Copy, Debug)]
struct Waiting {
    count: u64,
    due: Duration,
    probability: f32,
    tag: u8,
}

/// Prefetches of one storage that have not been issued.
#[derive(Debug, Default)]
pub struct PrefetchQueue {
    by_page: BTreeMap<u64, Waiting>,
    by_due: BTreeSet<(Duration, u64)>,
    pages: u64,
    max_pages: u64,
}

impl PrefetchQueue {
    /// A queue of at most `max_pages` pages; what comes after is refused.
    pub fn new(max_pages: u64) -> PrefetchQueue {
        PrefetchQueue { max_pages, ..PrefetchQueue::default() }
    }
    pub fn is_empty(&self) -> bool {
        self.by_page.is_empty()
    }
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn put(&mut self, first: u64, waiting: Waiting) {
        if waiting.count > 0 {
            self.pages += waiting.count;
            self.by_due.insert((waiting.due, first));
            self.by_page.insert(first, waiting);
        }
    }
    fn take(&mut self, first: u64) -> Option<Waiting> {
        let waiting = self.by_page.remove(&first)?;
        self.by_due.remove(&(waiting.due, first));
        self.pages -= waiting.count;
        Some(waiting)
    }

    /// First queued run that ends after `page`.
    fn at_or_after(&self, page: u64) -> Option<(u64, Waiting)> {
        let before = self.by_page.range(..=page).next_back().filter(|(first, w)| *first + w.count > page);
        before.or_else(|| self.by_page.range(page..).next()).map(|(first, w)| (*first, *w))
    }

    /// Whether a page waits.
    pub fn holds(&self, page: u64) -> bool {
        self.at_or_after(page).is_some_and(|(first, _)| first <= page)
    }

    /// Queues what is not queued yet. Returns the pages refused because the queue is full.
    pub fn push(&mut self, request: PrefetchRequest) -> u64 {
        let PrefetchRequest { range, due, probability, tag } = request;
        let mut at = range.first;
        let mut refused = 0;
        while at < range.end() {
            let (gap_end, next) = match self.at_or_after(at) {
                Some((first, waiting)) if first < range.end() => (first.max(at), first + waiting.count),
                _ => (range.end(), range.end()),
            };
            let room = self.max_pages.saturating_sub(self.pages).min(gap_end - at);
            refused += gap_end - at - room;
            self.put(at, Waiting { count: room, due, probability, tag });
            at = next.max(gap_end);
        }
        refused
    }

    /// Takes pages out. Returns how many were queued.
    pub fn remove(&mut self, range: PageRange) -> u64 {
        let mut removed = 0;
        while let Some((first, _)) = self.at_or_after(range.first).filter(|(first, _)| *first < range.end()) {
            let Some(waiting) = self.take(first) else { break };
            let end = first + waiting.count;
            if first < range.first {
                self.put(first, Waiting { count: range.first - first, ..waiting });
            }
            if end > range.end() {
                self.put(range.end(), Waiting { count: end - range.end(), ..waiting });
            }
            removed += end.min(range.end()) - first.max(range.first);
        }
        removed
    }

    /// The most urgent run together with queued runs that continue it, up to [`MAX_REQUEST_PAGES`]: contiguous and
    /// ascending.
    pub fn pop(&mut self) -> Option<Vec<PrefetchRequest>> {
        let &(_, first) = self.by_due.first()?;
        let mut parts = Vec::new();
        let (mut at, end) = (first, first + MAX_REQUEST_PAGES);
        while at < end
            && let Some(head) = self.take(at)
        {
            let count = head.count.min(end - at);
            self.put(at + count, Waiting { count: head.count - count, ..head });
            let Waiting { due, probability, tag, .. } = head;
            parts.push(PrefetchRequest { range: PageRange { first: at, count }, due, probability, tag });
            at += count;
        }
        Some(parts)
    }

    pub fn clear(&mut self) -> u64 {
        let pages = self.pages;
        *self = PrefetchQueue::new(self.max_pages);
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(first: u64, count: u64, due_ms: u64) -> PrefetchRequest {
        PrefetchRequest {
            range: PageRange { first, count },
            due: Duration::from_millis(due_ms),
            probability: 1.0,
            tag: due_ms as u8,
        }
    }

    #[test]
    fn the_earliest_deadline_goes_first_and_takes_its_neighbours_along() {
        let mut queue = PrefetchQueue::new(1 << 20);
        queue.push(request(100, 4, 9));
        queue.push(request(0, 4, 5));
        queue.push(request(4, 4, 7));
        assert_eq!(queue.pop().unwrap(), [request(0, 4, 5), request(4, 4, 7)]);
        assert_eq!(queue.pop().unwrap(), [request(100, 4, 9)]);
        assert!(queue.pop().is_none());
    }

    proptest! {
        #[test]
        fn a_set_of_pages_is_the_oracle(ops in prop::collection::vec((0u8..4, 0u64..300, 1u64..200, 0u64..50), 1..200)) {
            let mut queue = PrefetchQueue::new(1000);
            let mut oracle = std::collections::BTreeMap::<u64, Duration>::new();
            for (op, first, count, due) in ops {
                match op {
                    0 | 1 => {
                        let r = request(first, count, due);
                        let mut refused = 0;
                        for page in first..first + count {
                            if oracle.contains_key(&page) { continue; }
                            if oracle.len() < 1000 { oracle.insert(page, r.due); } else { refused += 1; }
                        }
                        prop_assert_eq!(queue.push(r), refused);
                    }
                    2 => {
                        let mut removed = 0;
                        for page in first..first + count { removed += u64::from(oracle.remove(&page).is_some()); }
                        prop_assert_eq!(queue.remove(PageRange { first, count }), removed);
                    }
                    _ => match queue.pop() {
                        None => prop_assert!(oracle.is_empty()),
                        Some(parts) => {
                            let least = oracle.values().min().copied();
                            prop_assert_eq!(oracle.get(&parts[0].range.first).copied(), least);
                            let mut at = parts[0].range.first;
                            for PrefetchRequest { range, .. } in &parts {
                                prop_assert_eq!(range.first, at);
                                for page in range.first..range.end() { prop_assert!(oracle.remove(&page).is_some()); }
                                at = range.end();
                            }
                            let total = at - parts[0].range.first;
                            prop_assert!(total <= MAX_REQUEST_PAGES);
                            prop_assert!(total == MAX_REQUEST_PAGES || !oracle.contains_key(&at), "stopped early");
                        }
                    },
                }
                prop_assert_eq!(queue.pages(), oracle.len() as u64);
            }
        }
    }
}
