//! Writes: write-through, with the RAM tier following the store and never ahead of it.
//!
//! While a write is in flight the cached pages stay as they were: a read that runs beside an unacknowledged write may
//! see either. When it ends, pages it covers wholly become valid and pages it covers in part are patched. Two writes
//! that overlap while both are in flight reach the store in an order that nobody knows, so both invalidate.

use super::{Core, Key};
use crate::types::{BlockIndex, PAGE_BYTES, PageMask, PageRange, StorageId};
use std::time::Duration;

/// A write, discard or write-zeroes that the store has not acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    offset: u64,
    len: u64,
    conflict: bool,
}

/// Names a write in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteId(usize);

/// How a write ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteEnd {
    /// The store has the new data and the caller will copy it into the returned slots.
    Written,
    /// The store's content is not what the caller holds (discard, zeroes, error): the pages become invalid.
    Changed,
}

impl Core {
    /// A write to bytes `offset..offset + len` is about to go to the store. Fills of these pages are cancelled, and
    /// prefetches of them taken back.
    pub fn begin_write(&mut self, storage: StorageId, offset: u64, len: u64) -> Option<WriteId> {
        let range = PageRange::covering(offset, len);
        let state = self.storages.get_mut(storage.0 as usize)?.as_mut()?;
        state.counters.cancelled += state.queue.remove(range);
        let mut conflict = false;
        for (_, other) in state.writes.iter_mut() {
            if PageRange::covering(other.offset, other.len).overlaps(range) {
                other.conflict = true;
                conflict = true;
            }
        }
        let id = state.writes.insert(InFlight { offset, len, conflict });
        for (block, mask) in range.blocks() {
            if let Some(slot) = self.find(Key { storage, block }) {
                let entry = &mut self.entries[slot as usize];
                entry.version = entry.version.wrapping_add(1);
                entry.cancelled |= entry.filling & mask;
                entry.on_ssd = entry.on_ssd.minus(mask);
            }
        }
        Some(WriteId(id))
    }

    /// The write ended. With [`WriteEnd::Written`], `update` gets `(block, slot, pages)` for each resident block: the
    /// caller copies the written bytes that fall into those pages before it lets go of the lock.
    pub fn end_write(
        &mut self,
        storage: StorageId,
        id: WriteId,
        end: WriteEnd,
        now: Duration,
        mut update: impl FnMut(BlockIndex, u32, PageMask),
    ) {
        let Some(state) = self.storages.get_mut(storage.0 as usize).and_then(Option::as_mut) else { return };
        let Some(write) = state.writes.try_remove(id.0) else { return };
        let range = PageRange::covering(write.offset, write.len);
        for (block, mask) in range.blocks() {
            let Some(slot) = self.find(Key { storage, block }) else { continue };
            if end == WriteEnd::Changed || write.conflict {
                self.invalidate(slot, mask);
                continue;
            }
            let whole = whole_pages(write.offset, write.len, block) & mask;
            let entry = &mut self.entries[slot as usize];
            entry.version = entry.version.wrapping_add(1);
            // Pages being filled belong to the filler, whose bytes are cancelled; they stay invalid.
            let new = whole.minus(entry.filling | entry.valid);
            let updated = (entry.valid & mask) | new;
            entry.valid |= new;
            let unused = entry.unused & mask;
            entry.unused = entry.unused.minus(mask);
            self.valid_pages += new.count();
            self.report(slot, unused, super::OutcomeKind::Evicted);
            if !updated.is_empty() {
                update(block, slot, updated);
                self.queue_destage(slot, now);
            }
        }
    }

    pub(super) fn pages_under_write(&self, storage: StorageId, block: BlockIndex) -> PageMask {
        let Some(state) = self.storages.get(storage.0 as usize).and_then(Option::as_ref) else {
            return PageMask::NONE;
        };
        let first = block.0 * crate::types::PAGES_PER_BLOCK;
        state.writes.iter().fold(PageMask::NONE, |mask, (_, write)| {
            let range = PageRange::covering(write.offset, write.len);
            let from = range.first.max(first);
            let to = range.end().min(first + crate::types::PAGES_PER_BLOCK);
            if from < to { mask | PageMask::run(from - first, to - from) } else { mask }
        })
    }
}

/// Pages of `block` that bytes `offset..offset + len` cover from first to last byte.
fn whole_pages(offset: u64, len: u64, block: BlockIndex) -> PageMask {
    let page = PAGE_BYTES as u64;
    let base = block.0 * crate::types::PAGES_PER_BLOCK;
    let first = offset.div_ceil(page).max(base);
    let end = (offset.saturating_add(len) / page).min(base + crate::types::PAGES_PER_BLOCK);
    if first < end { PageMask::run(first - base, end - first) } else { PageMask::NONE }
}
