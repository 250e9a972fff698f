//! Prefetch: from the predictor's wish to an I/O within budget, and what became of it.

use super::evict::For;
use super::{Core, Key, PrefetchRequest};
use crate::types::{BlockIndex, PageMask, PageRange, StorageId};
use std::time::Duration;

/// Outcomes kept for the learner; beyond it they are counted and dropped.
const MAX_OUTCOMES: usize = 1 << 16;

/// What became of prefetched pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OutcomeKind {
    /// Read by demand after they had arrived.
    Used,
    /// Read by demand, which had to wait for the rest of the transfer.
    Late,
    /// Left the cache, or were overwritten, without having been read.
    Evicted,
    /// Left the cache after they had been used, however they came: they may be prefetched again.
    Left,
}

/// What became of prefetched pages of one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub storage: StorageId,
    pub block: BlockIndex,
    pub pages: PageMask,
    /// As given with the request.
    pub tag: u8,
    pub kind: OutcomeKind,
}

/// One prefetch to issue: contiguous on the store, in one or more slots.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrefetchIo {
    /// First page; the parts continue from there without a gap.
    pub first: u64,
    /// `(slot, first page within the block, pages)`; the caller claims and fills them.
    pub parts: Vec<(u32, u64, u64)>,
    pub pages: u64,
}

/// What the issuer should do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PrefetchStep {
    /// Issue this now.
    Io(PrefetchIo),
    /// Nothing waits.
    Idle,
    /// Something waits for budget or for room: ask again after a completion or in a while.
    Wait,
}

impl Core {
    /// Queues prefetches; what is cached already is left out when its turn comes. Returns the pages refused because the
    /// queue is full.
    pub fn push_prefetch(&mut self, storage: StorageId, requests: &[PrefetchRequest]) -> u64 {
        let room = self.config.slots > 0;
        let Some(state) = self.storage(storage) else { return 0 };
        let mut refused = 0;
        for request in requests {
            let end = request.range.end().min(state.pages);
            if request.range.first < end {
                let range = PageRange { first: request.range.first, count: end - request.range.first };
                if !room {
                    refused += range.count;
                    continue;
                }
                refused += state.queue.push(PrefetchRequest { range, ..*request });
            }
        }
        state.counters.cancelled += refused;
        refused
    }

    /// Pages that wait for their turn.
    pub fn prefetch_backlog(&self, storage: StorageId) -> u64 {
        self.storages.get(storage.0 as usize).and_then(Option::as_ref).map_or(0, |s| s.queue.pages())
    }

    /// The next prefetch of a storage. `skip` tells pages of a block that need no loading (the SSD tier has them).
    /// Every slot of a returned I/O must be claimed before the lock is released.
    pub fn next_prefetch(
        &mut self,
        storage: StorageId,
        now: Duration,
        skip: impl Fn(BlockIndex) -> PageMask,
    ) -> PrefetchStep {
        loop {
            let Some(state) = self.storage(storage) else { return PrefetchStep::Idle };
            if state.queue.is_empty() {
                return PrefetchStep::Idle;
            }
            // One page of budget at least; the I/O may then be as large as a merged request.
            if !state.budget.admits(now, crate::types::PAGE_BYTES as u64) {
                return PrefetchStep::Wait;
            }
            let Some(parts) = state.queue.pop() else { return PrefetchStep::Idle };
            let block_pages = self.config.block_pages;
            let mut pieces = parts
                .iter()
                .flat_map(|part| part.range.blocks_of(block_pages).map(move |(block, mask)| (block, mask, part)));
            let mut io: Option<PrefetchIo> = None;
            let mut left = None;
            for (block, mask, part) in pieces.by_ref() {
                let key = Key::new(storage, block);
                let known = self.find(key);
                let mut want = mask.minus(skip(block)).minus(self.pages_under_write(storage, block));
                if let Some(slot) = known {
                    let entry = &self.entries[slot as usize];
                    want = want.minus(entry.valid | entry.filling);
                }
                for (first, count) in want.runs() {
                    let page = block.0 * block_pages + first;
                    if io.as_ref().is_some_and(|io| io.first + io.pages != page) {
                        left = Some((block, want, first, part));
                        break;
                    }
                    let slot = match self.find(key) {
                        Some(slot) => slot,
                        None => match self.allocate(
                            key,
                            For::Prefetch { due: part.due, likely: likely(part.probability) },
                            now,
                        ) {
                            Some(slot) => slot,
                            None => {
                                left = Some((block, want, first, part));
                                break;
                            }
                        },
                    };
                    let run = PageMask::run(first, count);
                    self.begin_fill(slot, run);
                    let entry = &mut self.entries[slot as usize];
                    entry.unused |= run;
                    (entry.tag, entry.likely) = (part.tag, likely(part.probability));
                    let io = io.get_or_insert(PrefetchIo { first: page, parts: Vec::new(), pages: 0 });
                    io.parts.push((slot, first, count));
                    io.pages += count;
                }
                if left.is_some() {
                    break;
                }
            }
            // What did not fit goes back with the urgency it had: at the front.
            let mut back: Vec<PrefetchRequest> = Vec::new();
            let mut put_back = |block: BlockIndex, mask: PageMask, part: &PrefetchRequest| {
                for (first, count) in mask.runs() {
                    back.push(PrefetchRequest {
                        range: PageRange { first: block.0 * block_pages + first, count },
                        ..*part
                    });
                }
            };
            if let Some((block, want, first, part)) = left {
                put_back(block, want & PageMask::run(first, block_pages - first), part);
            }
            for (block, mask, part) in pieces {
                put_back(block, mask, part);
            }
            let Some(state) = self.storage(storage) else { return PrefetchStep::Idle };
            for request in &back {
                state.queue.push(*request);
            }
            match io {
                Some(io) => {
                    let bytes = io.pages * crate::types::PAGE_BYTES as u64;
                    state.budget.issued(bytes);
                    state.counters.issued += io.pages;
                    return PrefetchStep::Io(io);
                }
                None if !back.is_empty() => return PrefetchStep::Wait,
                None => {}
            }
        }
    }

    /// A prefetch ended; its pages are settled with [`Core::finish_fill`] first.
    pub fn finish_prefetch(&mut self, storage: StorageId, pages: u64, ok: bool, now: Duration, latency: Duration) {
        if let Some(state) = self.storage(storage) {
            state.budget.completed(now, pages * crate::types::PAGE_BYTES as u64, latency);
            if ok {
                state.counters.completed += pages;
            }
        }
    }

    /// A demand read of the store took `latency`: prefetch gives way if that is too long.
    pub fn demand_latency(&mut self, storage: StorageId, now: Duration, latency: Duration) {
        if let Some(state) = self.storage(storage) {
            state.budget.demand_completed(now, latency);
        }
    }

    /// Demand reads these pages now: they need not be prefetched any more.
    pub(super) fn overtaken(&mut self, storage: StorageId, block: BlockIndex, mask: PageMask) {
        let block_pages = self.config.block_pages;
        let Some(state) = self.storage(storage) else { return };
        if state.queue.is_empty() {
            return;
        }
        for (first, count) in mask.runs() {
            let range = PageRange { first: block.0 * block_pages + first, count };
            state.counters.cancelled += state.queue.remove(range);
        }
    }

    pub(super) fn report(&mut self, slot: u32, pages: PageMask, kind: OutcomeKind) {
        if pages.is_empty() {
            return;
        }
        let entry = &self.entries[slot as usize];
        let outcome = Outcome { storage: entry.key.storage(), block: entry.key.block(), pages, tag: entry.tag, kind };
        if let Some(state) = self.storage(outcome.storage) {
            match kind {
                OutcomeKind::Used => state.counters.used += pages.count(),
                OutcomeKind::Late => {
                    state.counters.used += pages.count();
                    state.counters.late += pages.count();
                }
                OutcomeKind::Evicted => state.counters.evicted_unused += pages.count(),
                OutcomeKind::Left => {}
            }
        }
        if self.outcomes.len() < MAX_OUTCOMES {
            self.outcomes.push(outcome);
        } else {
            self.outcomes_dropped += 1;
        }
    }
}

/// A probability in 255ths.
fn likely(probability: f32) -> u8 {
    (probability.clamp(0.0, 1.0) * 255.0) as u8
}
