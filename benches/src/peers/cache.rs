//! A page cache of fixed capacity: least recently used, or, where each page's next use is known, Belady's optimum.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

/// Next use of a page that is never used again.
pub(super) const NEVER: usize = usize::MAX;
/// End of the list.
const NONE: u32 = u32::MAX;

/// A cached page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page {
    page: u64,
    /// Brought in by a prefetch and not used since.
    pub(super) prefetched: bool,
    /// When it is there: in the future while its transfer is under way.
    pub(super) ready_us: f64,
    next_use: usize,
    newer: u32,
    older: u32,
}

/// Pages in the order of their last use, newest first.
#[derive(Debug)]
pub(super) struct PageCache {
    capacity: usize,
    index: FxHashMap<u64, u32>,
    slots: Vec<Page>,
    newest: u32,
    oldest: u32,
    /// Belady's order (next use, page); none for LRU.
    by_next_use: Option<BTreeSet<(usize, u64)>>,
    /// Prefetched pages that left without a use.
    pub(super) wasted: u64,
}

impl PageCache {
    /// An empty cache; `optimal` evicts what is used last, and needs true next uses.
    pub(super) fn new(capacity: usize, optimal: bool) -> Self {
        Self {
            capacity,
            index: FxHashMap::default(),
            slots: Vec::new(),
            newest: NONE,
            oldest: NONE,
            by_next_use: optimal.then(BTreeSet::new),
            wasted: 0,
        }
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        self.index.contains_key(&page)
    }

    /// The page, made the most recently used one.
    pub(super) fn touch(&mut self, page: u64, next_use: usize) -> Option<&mut Page> {
        let slot = *self.index.get(&page)?;
        self.unlink(slot);
        self.link_newest(slot);
        let entry = &mut self.slots[slot as usize];
        if let Some(order) = &mut self.by_next_use {
            order.remove(&(entry.next_use, page));
            order.insert((next_use, page));
        }
        entry.next_use = next_use;
        Some(entry)
    }

    /// Adds a page that is not there yet, at the cost of the one that leaves first. The optimum passes by pages that would
    /// leave before all others.
    pub(super) fn insert(&mut self, page: u64, prefetched: bool, ready_us: f64, next_use: usize) {
        if self.contains(page) || (self.by_next_use.is_some() && next_use == NEVER) {
            return;
        }
        let fresh = Page { page, prefetched, ready_us, next_use, newer: NONE, older: NONE };
        let slot = if self.index.len() < self.capacity {
            self.slots.push(fresh);
            self.slots.len() as u32 - 1
        } else {
            let victim = match &self.by_next_use {
                Some(order) => match order.last() {
                    Some(&(furthest, victim)) if furthest >= next_use => victim,
                    _ => return,
                },
                None => self.slots[self.oldest as usize].page,
            };
            let Some(slot) = self.remove(victim) else { return };
            self.slots[slot as usize] = fresh;
            slot
        };
        self.link_newest(slot);
        self.index.insert(page, slot);
        if let Some(order) = &mut self.by_next_use {
            order.insert((next_use, page));
        }
    }

    fn remove(&mut self, page: u64) -> Option<u32> {
        let slot = self.index.remove(&page)?;
        self.unlink(slot);
        let entry = self.slots[slot as usize];
        self.wasted += u64::from(entry.prefetched);
        if let Some(order) = &mut self.by_next_use {
            order.remove(&(entry.next_use, page));
        }
        Some(slot)
    }

    fn unlink(&mut self, slot: u32) {
        let Page { newer, older, .. } = self.slots[slot as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older as usize].newer = newer,
        }
    }

    fn link_newest(&mut self, slot: u32) {
        let before = std::mem::replace(&mut self.newest, slot);
        let entry = &mut self.slots[slot as usize];
        (entry.newer, entry.older) = (NONE, before);
        match before {
            NONE => self.oldest = slot,
            before => self.slots[before as usize].newer = slot,
        }
    }
}
