//! Writes: write-through, with the RAM tier following the store and never ahead of it.
//!
//! While a write is in flight the cached pages stay as they were: a read that runs beside an unacknowledged write may
//! see either. When it ends, pages it covers wholly become valid and pages it covers in part are patched. Two writes
//! that overlap while both are in flight reach the store in an order that nobody knows, so both invalidate.

use super::evict::For;
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
        for (block, mask) in range.blocks_of(self.config.block_pages) {
            if let Some(slot) = self.find(Key::new(storage, block)) {
                let entry = &mut self.entries[slot as usize];
                entry.version = entry.version.wrapping_add(1);
                entry.cancelled |= entry.filling & mask;
                entry.on_ssd = entry.on_ssd.minus(mask);
            }
        }
        Some(WriteId(id))
    }

    /// The write ended. With [`WriteEnd::Written`], `update` gets `(block, slot, pages)` for each resident block: the
    /// caller copies the written bytes that fall into those pages before it lets go of the lock. With
    /// [`CoreConfig::write_allocate`](super::CoreConfig::write_allocate) all of the write's blocks are resident then, as
    /// far as slots can be had.
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
        let block_pages = self.config.block_pages;
        let written = end == WriteEnd::Written && !write.conflict;
        for (block, mask) in range.blocks_of(block_pages) {
            let Some(slot) = self.find(Key::new(storage, block)) else { continue };
            if !written {
                self.invalidate(slot, mask);
                continue;
            }
            let whole = if self.config.write_allocate {
                self.demand(slot, mask, now);
                mask
            } else {
                whole_pages(write.offset, write.len, block, block_pages) & mask
            };
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
        if written && self.config.write_allocate {
            self.allocate_written(storage, range, now, update);
        }
    }

    /// Makes the rest of a write resident, once what is resident of it has been used: as for reads, see [`Core`].
    fn allocate_written(
        &mut self,
        storage: StorageId,
        range: PageRange,
        now: Duration,
        mut update: impl FnMut(BlockIndex, u32, PageMask),
    ) {
        for (block, mask) in range.blocks_of(self.config.block_pages) {
            let key = Key::new(storage, block);
            if self.find(key).is_some() {
                continue;
            }
            let Some(slot) = self.allocate(key, For::Demand, now) else { continue };
            self.entries[slot as usize].valid = mask;
            self.valid_pages += mask.count();
            update(block, slot, mask);
            self.queue_destage(slot, now);
        }
    }

    pub(super) fn pages_under_write(&self, storage: StorageId, block: BlockIndex) -> PageMask {
        let Some(state) = self.storages.get(storage.0 as usize).and_then(Option::as_ref) else {
            return PageMask::NONE;
        };
        let block_pages = self.config.block_pages;
        let first = block.0 * block_pages;
        state.writes.iter().fold(PageMask::NONE, |mask, (_, write)| {
            let range = PageRange::covering(write.offset, write.len);
            let from = range.first.max(first);
            let to = range.end().min(first + block_pages);
            if from < to { mask | PageMask::run(from - first, to - from) } else { mask }
        })
    }
}

/// Pages of `block` that bytes `offset..offset + len` cover from first to last byte.
fn whole_pages(offset: u64, len: u64, block: BlockIndex, block_pages: u64) -> PageMask {
    let page = PAGE_BYTES as u64;
    let base = block.0 * block_pages;
    let first = offset.div_ceil(page).max(base);
    let end = (offset.saturating_add(len) / page).min(base + block_pages);
    if first < end { PageMask::run(first - base, end - first) } else { PageMask::NONE }
}
